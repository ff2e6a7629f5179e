"""Cutting a worker's byte stream into whole, prefixed lines: pure, no I/O.

A :class:`LineFramer` is fed whatever a read returned and says what may be shown. However the
bytes arrive in pieces, each line comes out once, whole, in order, with one prefix at its start.
Memory stays bounded: an unfinished line longer than `max_held` is given out in pieces, and the
part of a progress bar that a carriage return has overwritten is dropped at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_HELD_BYTES = 1 << 20

# What a carriage return has overwritten: everything in a line up to its last "\r" that a
# character follows. "\r\n" at the end is a line ending and stays as it is.
_OVERWRITTEN = re.compile(rb"[^\n]*\r(?=[^\r\n])")


@dataclass(frozen=True, slots=True)
class Framed:
    """What may be shown next.

    The first line may continue one that is already on the console in part. Whether it can go
    on there depends on what others have written since, so both beginnings are given.

    Attributes:
        resumed: the beginning, if our unfinished line is still the console's last one.
        fresh: the beginning otherwise: with its prefix, and with the part already shown
            where that is still known, so that the whole line is there in one piece.
        rest: what follows in both cases.
        unfinished: whether the last line is without its end.
    """

    resumed: bytes
    fresh: bytes
    rest: bytes
    unfinished: bool


class LineFramer:
    r"""Frames one stream of one worker.

    Args:
        prefix: put before each line, for example ``b"[trainer0]:"``.
        max_held: how many bytes of an unfinished line are held back at the most.

    Example:
        >>> framer = LineFramer(b"[w0]:")
        >>> framer.feed(b"hel")
        >>> framer.feed(b"lo\nwor").fresh
        b'[w0]:hello\n'
        >>> framer.end().fresh
        b'[w0]:wor\n'
    """

    def __init__(self, prefix: bytes, *, max_held: int = MAX_HELD_BYTES) -> None:
        self._prefix = prefix
        self._separator = b"\n" + prefix
        self._max_held = max_held
        self._held = b""
        # How much of the held line is on the console, and whether text before it is, too, that
        # is no longer held because the line was too long.
        self._shown = 0
        self._head_gone = False
        self._overwrites = False

    @property
    def unfinished(self) -> bool:
        """Whether there is a begun line of which something is not shown yet."""
        return len(self._held) > self._shown

    @property
    def in_progress(self) -> bool:
        """Whether the begun line has been overwritten by carriage returns, as progress bars do."""
        return self._overwrites

    @property
    def partly_shown(self) -> bool:
        """Whether something of the begun line, in its present or an earlier state, is shown."""
        return self._shown != 0

    @property
    def in_long_line(self) -> bool:
        """Whether the begun line was too long to be held, and is out in part."""
        return self._head_gone

    def feed(self, data: bytes) -> Framed | None:
        """Take what was read; returns the lines that it completed, or None if there are none."""
        end = data.rfind(b"\n") + 1
        if not end:
            return self._grow(data)
        first = data.find(b"\n") + 1
        lead = self._begin(self._held + data[:first])
        rest = self._prefixed(data[first:end])
        self._reset()
        # What follows the last newline cannot complete a line, but may be too long to be held.
        grown = self._grow(data[end:])
        if grown is not None:
            return Framed(lead[0], lead[1], rest + grown.fresh, unfinished=True)
        return Framed(*lead, rest, unfinished=False)

    def peek(self) -> Framed | None:
        """Give out what there is of an unfinished line, which then is known to be shown."""
        if not self.unfinished:
            return None
        lead = self._begin(self._held)
        self._shown = len(self._held)
        return Framed(*lead, b"", unfinished=True)

    def end(self) -> Framed | None:
        """The stream has ended: give out what is left, with a newline after it."""
        if not (self._held or self._head_gone):
            return None
        if self.unfinished:
            lead = self._begin(self._held + b"\n")
        else:
            # All of it is on the console but for the newline, which whoever wrote there after
            # us has supplied already.
            lead = (b"\n", b"")
        self._reset()
        return Framed(*lead, b"", unfinished=False)

    def _grow(self, data: bytes) -> Framed | None:
        """Add to the begun line."""
        if not data:
            return None
        held = self._held + data
        if b"\r" in held:
            kept = _OVERWRITTEN.sub(b"", held)
            if len(kept) < len(held):
                self._overwrites = True
                # What is on the console is not the beginning of this line any more.
                self._shown = -1 if self._shown else 0
            held = kept
        self._held = held
        if len(held) <= self._max_held:
            return None
        lead = self._begin(held)
        self._held, self._shown, self._head_gone = b"", 0, True
        return Framed(*lead, b"", unfinished=True)

    def _begin(self, line: bytes) -> tuple[bytes, bytes]:
        """The two beginnings (resumed, fresh) of the line that is being built."""
        whole = _OVERWRITTEN.sub(b"", line) if b"\r" in line else line
        fresh = self._prefix + whole
        if self._head_gone:
            return whole, fresh
        if self._shown <= 0:
            # Nothing of it is shown, or something that has been overwritten since.
            return (b"\n" + fresh if self._shown else fresh), fresh
        if len(whole) < len(line):
            return b"\n" + fresh, fresh
        return whole[self._shown :], fresh

    def _prefixed(self, lines: bytes) -> bytes:
        if not lines:
            return b""
        if b"\r" in lines:
            lines = _OVERWRITTEN.sub(b"", lines)
        return self._prefix + lines[:-1].replace(b"\n", self._separator) + b"\n"

    def _reset(self) -> None:
        self._held, self._shown, self._head_gone, self._overwrites = b"", 0, False, False


class LineFilter:
    r"""Picks the whole lines that hold any of the given strings.

    Args:
        needles: substrings, searched as UTF-8; an empty one matches every line.
        prefix: put before each line given out.

    Example:
        >>> LineFilter(["loss"], b"[w0]:").feed(b"step 1\nloss 3\nlo")
        b'[w0]:loss 3\n'
    """

    def __init__(
        self, needles: list[str], prefix: bytes, *, max_held: int = MAX_HELD_BYTES
    ) -> None:
        parts = (re.escape(n.encode("utf-8", "surrogateescape")) for n in needles)
        # One search in C over the whole block; only the lines that match are touched in Python.
        self._search = re.compile(b"|".join(parts)).search
        self._prefix = prefix
        self._max_held = max_held
        self._held = b""
        self._skipping = False

    def feed(self, data: bytes) -> bytes:
        """The matching lines that `data` completed, each with its prefix."""
        end = data.rfind(b"\n") + 1
        if not end:
            self._hold(self._held + data)
            return b""
        block = self._held + data[:end]
        if self._skipping:
            # The beginning of this line was too long to be held and is gone.
            block = block[block.find(b"\n") + 1 :]
            self._skipping = False
        self._held = b""
        self._hold(data[end:])
        return self._matching(block)

    def end(self) -> bytes:
        """The stream has ended: its last line, if it matches."""
        return self.feed(b"\n") if self._held else b""

    def _hold(self, tail: bytes) -> None:
        if len(tail) > self._max_held:
            tail, self._skipping = b"", True
        self._held = tail

    def _matching(self, block: bytes) -> bytes:
        found: list[bytes] = []
        position = 0
        while position < len(block) and (match := self._search(block, position)):
            start = block.rfind(b"\n", 0, match.start()) + 1
            position = block.find(b"\n", match.start()) + 1
            found += (self._prefix, block[start:position])
        return b"".join(found)
