"""How lines look on the console: options, colour, time, the prefix of several ranks; pure."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from asupervise.ranges import format_ranges

__all__ = [
    "COLORS",
    "FORMATS",
    "ConsoleFormat",
    "Speaker",
    "colored",
    "merged_prefix",
    "stamp",
    "wants_color",
]

COLORS: Final = ("auto", "always", "never")
FORMATS: Final = ("text", "json")
# Of the sixteen that every terminal has (ECMA-48, SGR). No red, which stands for errors, and no
# dark blue, which cannot be read on black.
_PALETTE: Final = (36, 33, 32, 35, 94, 96, 92, 95)
_BOLD: Final = 1
_NUMBER: Final = re.compile(r"([0-9]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleFormat:
    """How teed lines are shown on the console; files are never changed.

    Args:
        color: of the prefix, by rank: ``"auto"``, on a terminal that can, unless ``NO_COLOR`` is
            set; ``"always"``; ``"never"``.
        timestamps: whether the time when a line was read stands before it.
        log_format: ``"text"``, or ``"json"``: one object a line, with ``time``, ``rank``,
            ``local_rank``, ``stream``, ``group`` and ``text``.
        dedup: whether a line that several ranks of a group say within a moment (0.25 s) is shown
            once, with all their ranks in its prefix.

    Raises:
        ValueError: for a word that is none of these.

    Example:
        >>> ConsoleFormat(log_format="json").color
        'auto'
    """

    color: str = "auto"
    timestamps: bool = False
    log_format: str = "text"
    dedup: bool = False

    def __post_init__(self) -> None:
        for name, known in (("color", COLORS), ("log_format", FORMATS)):
            word = getattr(self, name)
            if word not in known:
                raise ValueError(f"{name}: {word!r}: expected one of {', '.join(known)}")


class Speaker(NamedTuple):
    """Who says something: one stream of one worker.

    Attributes:
        prefix: stands before its lines.
        local_rank: its rank on this node.
        rank: its global rank.
        stream: ``"stdout"`` or ``"stderr"``.
        group: the group's name.
    """

    prefix: str
    local_rank: int
    rank: int
    stream: str
    group: str


# --- colour ----------------------------------------------------------------------------------


def wants_color(color: str, environ: Mapping[str, str], *, is_terminal: bool) -> bool:
    """Whether prefixes are to be coloured.

    Args:
        color: as in `ConsoleFormat`.
        environ: for ``NO_COLOR`` (no-color.org) and ``TERM``.
        is_terminal: whether the stream is one.
    """
    if color == "auto":
        return is_terminal and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
    return color == "always"


def colored(prefix: str, local_ranks: Sequence[int]) -> str:
    """The prefix in the rank's colour; in bold where it is that of several."""
    if not prefix:
        return ""
    bold = len(local_ranks) > 1
    code = _BOLD if bold else _PALETTE[local_ranks[0] % len(_PALETTE)]
    return f"\x1b[{code}m{prefix}\x1b[0m"


# --- time ------------------------------------------------------------------------------------


def stamp(seconds: float) -> str:
    """Local time, as it stands before a line.

    Args:
        seconds: since the epoch.
    """
    whole, millis = divmod(int(seconds * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(whole))}.{millis:03d} "


# --- several ranks ---------------------------------------------------------------------------


def merged_prefix(speakers: Sequence[Speaker]) -> str:
    """One prefix for a line that several have said.

    Where their prefixes differ in numbers only, as those of a template do, these are put together;
    otherwise the prefixes stand side by side.

    Example:
        >>> ranks = [Speaker(f"[w{rank}]:", rank, rank, "stdout", "w") for rank in (0, 1, 3)]
        >>> merged_prefix(ranks)
        '[w0-1,3]:'
    """
    # Text and numbers, in turn.
    parts = [_NUMBER.split(speaker.prefix) for speaker in speakers]
    if len({tuple(each[::2]) for each in parts}) > 1:
        return ",".join(dict.fromkeys(speaker.prefix for speaker in speakers))
    return "".join(
        column[0] if len(set(column)) == 1 else _merged_numbers(column, speakers)
        for column in zip(*parts, strict=True)
    )


def _merged_numbers(numbers: Sequence[str], speakers: Sequence[Speaker]) -> str:
    """The numbers of several prefixes, in one place."""
    # A name may end in a number: "stage20" is rank 0 of "stage2".
    for ranks in ([s.local_rank for s in speakers], [s.rank for s in speakers]):
        both = list(zip(numbers, ranks, strict=True))
        names = {number.removesuffix(str(rank)) for number, rank in both}
        if len(names) == 1 and all(number.endswith(str(rank)) for number, rank in both):
            return f"{names.pop()}{format_ranges(ranks)}"
    return format_ranges(map(int, numbers))
