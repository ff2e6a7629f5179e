"""Lines of logs as they are written to a terminal or into a pipe: pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from asupervise.views.files import LogFile
from asupervise.views.live.text import harmless
from asupervise.views.loglines import Line
from asupervise.views.plain import without_sequences
from asupervise.views.words import moment

__all__ = ["Format", "headline", "prefix_of", "printed"]

# Cyan, yellow, green, magenta, blue, and the bright ones: red is for what went wrong.
_COLOURS: Final = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)
_DIM: Final = "\x1b[2m"
_END: Final = "\x1b[0m"
_NO_TIME: Final = " " * 23


class Format(NamedTuple):
    """How lines are shown.

    Attributes:
        prefix: whether each begins with whose it is.
        timestamps: whether each begins with its time, as far as that is known.
        colours: whether there may be colours.
        pattern: what a line must match to be shown.
        width: of a rank.
        attempts: whether prefixes say the attempt.
    """

    prefix: bool = True
    timestamps: bool = False
    colours: bool = False
    pattern: re.Pattern[str] | None = None
    width: int = 1
    attempts: bool = False

    def of(self, files: Iterable[LogFile]) -> Format:
        """With what these files need."""
        lives = [file.life for file in files]
        width = max((len(str(life.rank)) for life in lives), default=1)
        several = len({life.attempt for life in lives}) > 1
        return self._replace(width=max(width, self.width), attempts=several or self.attempts)


def printed(lines: Iterable[Line], how: Format) -> Iterator[str]:
    """The lines that match, as they are shown, each with its end. They do nothing to a terminal."""
    prefixes: dict[str, str] = {}
    for line in lines:
        if how.pattern and not how.pattern.search(without_sequences(line.text)):
            continue
        path = line.file.path
        if how.prefix and path not in prefixes:
            prefixes[path] = prefix_of(line.file, how)
        stamp = _stamp(line.at, how) if how.timestamps else ""
        yield f"{stamp}{prefixes.get(path, '')}{harmless(line.text, colours=how.colours)}\n"


def _stamp(at: float | None, how: Format) -> str:
    text = _NO_TIME if at is None else f"{moment(at)}.{int(at * 1000) % 1000:03}"
    return f"{_DIM}{text}{_END} " if how.colours and at is not None else f"{text} "


def prefix_of(file: LogFile, how: Format) -> str:
    """Whose a line is: ``3 | `` of stdout, ``3 ! `` of stderr, ``1/3 | `` with the attempt."""
    life = file.life
    attempt = f"{life.attempt}/" if how.attempts else ""
    text = f"{attempt}{life.rank:>{how.width}} {'!' if file.stream == 'stderr' else '|'} "
    if not how.colours:
        return text
    return f"\x1b[{_COLOURS[life.rank % len(_COLOURS)]}m{text}{_END}"


def headline(file: LogFile, how: Format) -> str:
    """Stands before the lines of a file, where files are shown one after the other."""
    life = file.life
    attempt = f", attempt {life.attempt}" if how.attempts else ""
    text = f"==> rank {life.rank} {file.stream}{attempt}"
    return f"\x1b[1m{text}{_END}\n" if how.colours else f"{text}\n"
