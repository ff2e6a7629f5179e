"""The lines of a run's logs: one file after the other, or merged by time.

Workers write their files themselves, so a file says of no line when that was written, unless the
line does (`stamps`). Merging is careful:

- the lines of one file keep their order, whatever they say;
- a line without a time was written when the line before it was (so a traceback stays in one piece);
- lines before the first that has one were written when the worker was started, and so were all
  lines of a file that never says a time: such files stand one after the other;
- at the same time the lower attempt comes first, then the lower rank, then stdout.
"""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from asupervise.views.files import LogFile, open_regular, pread
from asupervise.views.plain import decoded, overwritten, without_sequences
from asupervise.views.stamps import Clock

__all__ = ["Choice", "Line", "chosen", "lines_of", "merged", "tail_start", "whole_lines"]

# Of all files together; of each at least so much.
_BLOCKS_BYTES: Final = 64 << 20
_BLOCK_BYTES: Final = 256 << 10
_LEAST_BLOCK_BYTES: Final = 8 << 10
# A line that is longer comes in pieces.
_LINE_BYTES: Final = 64 << 10


class Choice(NamedTuple):
    """Which logs.

    Attributes:
        ranks: pairs of the first and the last of a range; None for all.
        streams: their names.
        attempt: None for all.
    """

    ranks: tuple[tuple[int, int], ...] | None = None
    streams: tuple[str, ...] = ("stdout", "stderr")
    attempt: int | None = None


def chosen(files: Iterable[LogFile], choice: Choice) -> list[LogFile]:
    """Those of the files that are meant, in the order of attempts, ranks and streams."""
    found = [file for file in files if _is_meant(file, choice)]
    return sorted(found, key=_place)


def _is_meant(file: LogFile, choice: Choice) -> bool:
    life = file.life
    return (
        file.stream in choice.streams
        and choice.attempt in (None, life.attempt)
        and (choice.ranks is None or any(a <= life.rank <= b for a, b in choice.ranks))
    )


def _place(file: LogFile) -> tuple[int, int, int, bool]:
    life = file.life
    return life.attempt, life.rank, life.local_rank, file.stream == "stderr"


class Line(NamedTuple):
    """One line of a log, as the worker has written it.

    Attributes:
        file: whose.
        text: without its end; it is not safe to be shown yet.
        key: when it was written at the earliest, in seconds since the epoch.
        at: when it says so itself; None if it does not.
    """

    file: LogFile
    text: str
    key: float
    at: float | None


def merged(files: Sequence[LogFile], starts: dict[str, int] | None = None) -> Iterator[Line]:
    """All their lines, in the order of time as far as that is known.

    Args:
        files: in the order that decides between equal times.
        starts: by path, where to begin to read; at the file's beginning by default.
    """
    block = min(_BLOCK_BYTES, max(_LEAST_BLOCK_BYTES, _BLOCKS_BYTES // max(1, len(files))))
    sources = [lines_of(file, (starts or {}).get(file.path, 0), block) for file in files]
    return heapq.merge(*sources, key=lambda line: line.key)


def lines_of(file: LogFile, start: int = 0, block: int = _BLOCK_BYTES) -> Iterator[Line]:
    """The lines of one file, up to where it ended when it was looked at."""
    life = file.life
    first = life.started_at if life.started_at is not None else -math.inf
    clock = Clock((first, file.mtime))
    key = first
    for raw in whole_lines(_blocks(file, start, block)):
        text = overwritten(decoded(raw))
        # Every other line is without: a quick look first.
        at = clock.read(without_sequences(text[:80])) if "-" in text[:80] else None
        key = key if at is None else max(key, at)
        yield Line(file, text, key, at)


def _blocks(file: LogFile, start: int, size: int) -> Iterator[bytes]:
    """Opened for each block: there may be more files than descriptors."""
    while start < file.size:
        try:
            fd = open_regular(file.path)
        except OSError:
            return  # it is gone: what was read is what there was
        try:
            data = pread(fd, min(size, file.size - start), start)
        finally:
            os.close(fd)
        if not data:
            return
        start += len(data)
        yield data


def whole_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    r"""Lines without their ends; the last one may have had none.

    Example:
        >>> list(whole_lines([b"a\nb", b"c\n", b"d"]))
        [b'a', b'bc', b'd']
    """
    held = b""
    for block in blocks:
        *lines, held = (held + block).split(b"\n")
        for line in lines:
            yield from _pieces(line)
        while len(held) > _LINE_BYTES:
            yield held[:_LINE_BYTES]
            held = held[_LINE_BYTES:]
    if held:
        yield from _pieces(held)


def _pieces(line: bytes) -> Iterator[bytes]:
    if len(line) <= _LINE_BYTES:
        yield line
        return
    for start in range(0, len(line), _LINE_BYTES):
        yield line[start : start + _LINE_BYTES]


def tail_start(file: LogFile, count: int) -> int:
    """Where the last lines of a file begin."""
    if count <= 0:
        return file.size
    try:
        fd = open_regular(file.path)
    except OSError:
        return 0
    try:
        return _tail_start(fd, file.size, count)
    finally:
        os.close(fd)


def _tail_start(fd: int, size: int, count: int) -> int:
    end, left = size, count
    while end > 0:
        start = max(0, end - _BLOCK_BYTES)
        data = pread(fd, end - start, start)
        at = len(data)
        # The newline at the very end begins no line.
        if end == size and data.endswith(b"\n"):
            at -= 1
        while (at := data.rfind(b"\n", 0, at)) >= 0:
            left -= 1
            if not left:
                return start + at + 1
        end = start
    return 0
