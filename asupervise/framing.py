"""Cutting a worker's byte stream into whole, prefixed lines: pure, no I/O.

A :class:`LineFramer` is fed whatever a read returned and says what may be shown. However the
bytes arrive in pieces, each line comes out once, whole, in order, with one prefix at its start.
Memory stays bounded: an unfinished line longer than `max_held` is given out in pieces, and the
part of a progress bar that a carriage return has overwritten is dropped at once.

A :class:`LineFilter` picks the lines that hold one of several strings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

MAX_HELD_BYTES = 1 << 20
# A match in so many bytes or more often is "dense", see `LineFilter`.
_DENSE_BYTES = 512
# A character that is there once in so many bytes or more seldom is found 10 to 40 times faster than
# a string. Which one that is, one block in so many is asked.
_SELDOM_BYTES = 512
_ASKED_BLOCKS = 64

# A carriage return that a character follows: what stands before it in its line is overwritten.
# Those at the end of a line belong to its ending ("\r\n") and stay as they are.
_next_overwrite = re.compile(rb"\r(?=[^\r\n])").search


class Framed(NamedTuple):
    """What may be shown next.

    The first line may continue one that is already on the console in part. Whether it can go
    on there depends on what others have written since, so both beginnings are given.

    Attributes:
        resumed: the beginning, if our unfinished line is still the console's last one.
        fresh: the beginning otherwise: with its prefix, and with the part already shown
            where that is still known, so that the whole line is there in one piece. Empty if
            all of the line is there but its end, which whoever wrote since has supplied.
        rest: what follows in both cases, in parts: putting them together would be one more copy
            of all that passes here.
        unfinished: whether the last line is without its end.
    """

    resumed: bytes
    fresh: bytes
    rest: tuple[bytes, ...]
    unfinished: bool


def with_prefix(framed: Framed, prefix: bytes, *, begun: bool) -> Framed:
    """What a framer without a prefix has given out of one line, with a prefix.

    Args:
        framed: of one line.
        prefix: is put before it.
        begun: whether part of the line has been given out before.
    """
    fresh = prefix + framed.fresh if framed.fresh else b""
    if not begun:
        return Framed(fresh, fresh, framed.rest, framed.unfinished)
    overwritten = framed.fresh and framed.resumed == b"\n" + framed.fresh
    resumed = b"\n" + fresh if overwritten else framed.resumed
    return Framed(resumed, fresh, framed.rest, framed.unfinished)


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

    # Thousands of workers have two each, most of them silent.
    __slots__ = ("_head_gone", "_held", "_max_held", "_overwrites", "_prefix", "_shown")

    def __init__(self, prefix: bytes, *, max_held: int = MAX_HELD_BYTES) -> None:
        self._prefix = prefix
        self._max_held = max_held
        self._reset()

    def _reset(self) -> None:
        self._held = b""
        # How much of the held text is on the console: -1 for something that has been
        # overwritten since.
        self._shown = 0
        # Whether text before it is there, too, that was too long to be held.
        self._head_gone = False
        self._overwrites = False

    @property
    def unfinished(self) -> bool:
        """Whether there is a begun line of which something is to be shown that is not yet."""
        return self._has_unshown()

    def _has_unshown(self) -> bool:
        # Of a "\r" at its end nobody can say yet what it will do.
        return len(self._held.rstrip(b"\r")) > self._shown

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
        if end == len(data) and not (self._held or self._shown or self._head_gone):
            return self._whole(data)
        first = data.find(b"\n") + 1
        resumed, fresh = self._completed(data[:first])
        rest = self._prefixed(data[first : end - 1]) if first < end else ()
        self._reset()
        # What follows the last newline cannot complete a line, but may be too long to be held.
        grown = self._grow(data[end:])
        if grown is not None:
            return Framed(resumed, fresh, (*rest, grown.fresh), unfinished=True)
        return Framed(resumed, fresh, rest, unfinished=False)

    def _whole(self, data: bytes) -> Framed:
        """Whole lines with no begun one before them, as most blocks are."""
        first = data.find(b"\n") + 1
        line = data[:first]
        fresh = self._prefix + (_without_overwritten(line) if b"\r" in line else line)
        rest = self._prefixed(data[first:-1]) if first < len(data) else ()
        return Framed(fresh, fresh, rest, unfinished=False)

    def peek(self) -> Framed | None:
        """Give out what there is of an unfinished line, which then is known to be shown."""
        if not self._has_unshown():
            return None
        text = self._held.rstrip(b"\r")
        resumed, fresh = self._begin(text)
        self._shown = len(text)
        return Framed(resumed, fresh, (), unfinished=True)

    def end(self) -> Framed | None:
        """The stream has ended: give out what is left, with a newline after it."""
        if not (self._held or self._head_gone):
            return None
        resumed, fresh = self._completed(b"\n")
        self._reset()
        return Framed(resumed, fresh, (), unfinished=False)

    def _grow(self, data: bytes) -> Framed | None:
        """Add to the begun line."""
        if not data:
            return None
        held = self._held + data
        if b"\r" in held:
            kept = _without_overwritten(held)
            if len(kept) < len(held):
                self._overwrites = True
                # What is on the console is not the beginning of this line any more.
                self._shown = -1 if self._is_on_console() else 0
                self._head_gone = False
            held = kept
        self._held = held
        if len(held) <= self._max_held:
            return None
        text = held.rstrip(b"\r") or held
        resumed, fresh = self._begin(text)
        self._held, self._shown, self._head_gone = held[len(text) :], 0, True
        return Framed(resumed, fresh, (), unfinished=True)

    def _completed(self, tail: bytes) -> tuple[bytes, bytes]:
        """The two beginnings (resumed, fresh) of the begun line, which `tail` ends."""
        only_its_end = not tail.rstrip(b"\r\n")
        if only_its_end and self._is_on_console() and not self._has_unshown():
            return self._held[self._shown :] + tail, b""
        return self._begin(self._held + tail)

    def _is_on_console(self) -> bool:
        return self._shown != 0 or self._head_gone

    def _begin(self, line: bytes) -> tuple[bytes, bytes]:
        """The two beginnings (resumed, fresh) of the line that is being built."""
        whole = _without_overwritten(line) if b"\r" in line else line
        fresh = self._prefix + whole
        if not self._is_on_console():
            return fresh, fresh
        if self._shown < 0 or len(whole) < len(line):
            # What is there has been overwritten: its present state goes on a line of its own.
            return b"\n" + fresh, fresh
        return whole[self._shown :], fresh

    def _prefixed(self, lines: bytes) -> tuple[bytes, ...]:
        """Whole lines, given without the last one's newline."""
        if b"\r" in lines:
            lines = _without_overwritten(lines)
        return self._prefix, lines.replace(b"\n", b"\n" + self._prefix), b"\n"


def _without_overwritten(lines: bytes) -> bytes:
    # By hand: a pattern that spans the line would go back and forth in each one of them, in
    # quadratic time where a long one ends with "\r\n".
    kept: list[bytes] = []
    position = 0
    while (found := _next_overwrite(lines, position)) is not None:
        start = max(position, lines.rfind(b"\n", position, found.start()) + 1)
        end = lines.find(b"\n", found.end())
        line = lines[found.start() : end if end >= 0 else len(lines)]
        last = line.rfind(b"\r", 0, len(line.rstrip(b"\r")))
        kept += (lines[position:start], line[last + 1 :])
        position = found.start() + len(line)
    kept.append(lines[position:])
    return b"".join(kept)


class Picked(NamedTuple):
    """The matching lines that a block completed, in order.

    Attributes:
        long: where in the stream a line stands that matches and was too long to be held, its
            newline included if it has one. It comes before `lines`.
        lines: the others, each with its prefix.
    """

    long: tuple[int, int] | None
    lines: bytes


class LineFilter:
    r"""Picks the whole lines that hold any of the given strings.

    A line is matched as the worker wrote it, its newline included, and given out as such.

    Args:
        needles: substrings, searched as UTF-8; an empty one matches every line.
        prefix: put before each line given out.
        max_held: how many bytes of an unfinished line are held at the most.

    Example:
        >>> LineFilter(["loss"], b"[w0]:").feed(b"step 1\nloss 3\nlo").lines
        b'[w0]:loss 3\n'
    """

    def __init__(
        self, needles: Iterable[str], prefix: bytes, *, max_held: int = MAX_HELD_BYTES
    ) -> None:
        self._needles = _distinct(n.encode("utf-8", "surrogateescape") for n in needles)
        # A character that is not there at all is found out ten times faster than a string.
        self._chars = [sorted(set(needle)) for needle in self._needles]
        # So much of a line that is not held is kept to find a needle across two blocks.
        self._overlap = max((len(needle) for needle in self._needles), default=1) - 1
        self._prefix = prefix
        self._max_held = max_held
        # Where most lines match, going from match to match is ten times slower than looking at
        # each line; which of the two it is, the last block tells.
        self._dense = False
        self._may_be_dense = not any(needle.endswith(b"\n") for needle in self._needles)
        # By needle, where in it stands the character to look for, and that; and for how many blocks
        # that is taken to be so.
        self._seldom: dict[bytes, tuple[int, bytes]] = {}
        self._taken_for = 0
        self._search = re.compile(b"|".join(map(re.escape, self._needles))).search
        self._held = b""
        self._read = 0
        self._long_from: int | None = None
        self._long_matches = False

    @property
    def prefix(self) -> bytes:
        return self._prefix

    def feed(self, data: bytes) -> Picked:
        """Take what was read; returns the matching lines that it completed."""
        begins = self._read
        self._read += len(data)
        end = data.rfind(b"\n") + 1
        if not end:
            self._hold(self._held + data)
            return Picked(None, b"")
        long, lines = None, b""
        first = 0
        if self._long_from is not None:
            first = data.find(b"\n") + 1
            long = self._long_ended(self._held + data[:first], begins + first)
        elif self._held:
            first = data.find(b"\n") + 1
            lines = self._matching(self._held + data[:first])
        lines += self._matching(data, first, end)
        self._held = b""
        self._hold(data[end:])
        return Picked(long, lines)

    def end(self) -> Picked:
        """The stream has ended: its last line, if it matches. What follows is a new stream."""
        picked = Picked(None, b"")
        if self._long_from is not None:
            picked = Picked(self._long_ended(self._held + b"\n", self._read), b"")
        elif self._held:
            picked = Picked(None, self._matching(self._held + b"\n"))
        self._held, self._read = b"", 0
        return picked

    def _hold(self, tail: bytes) -> None:
        if self._long_from is None and len(tail) <= self._max_held:
            self._held = tail
            return
        if self._long_from is None:
            self._long_from = self._read - len(tail)
        self._long_matches = self._long_matches or self._is_in(tail)
        self._held = tail[len(tail) - self._overlap :] if len(tail) > self._overlap else tail

    def _long_ended(self, tail: bytes, at: int) -> tuple[int, int] | None:
        start, matches = self._long_from, self._long_matches or self._is_in(tail)
        self._long_from, self._long_matches = None, False
        return (start, at) if matches and start is not None else None

    def _is_in(self, text: bytes) -> bool:
        return any(needle in text for needle in self._needles)

    def _matching(self, block: bytes, start: int = 0, end: int | None = None) -> bytes:
        """The matching lines of a block of whole lines."""
        end = len(block) if end is None else end
        needles = self._needles
        if needles != (b"\n",):
            needles = tuple(
                n
                for n, chars in zip(needles, self._chars, strict=True)
                if all(char in block for char in chars)
            )
        if not needles or start == end:
            return b""
        if needles == (b"\n",):
            lines = block[start : end - 1].split(b"\n")
        elif self._dense:
            lines = list(filter(self._search, block[start : end - 1].split(b"\n")))
        else:
            lines = list(_lines_at(block, start, end, [self._finder(n, block) for n in needles]))
        self._dense = self._may_be_dense and len(lines) * _DENSE_BYTES > end - start
        if not lines:
            return b""
        prefix = self._prefix
        return b"".join((prefix, (b"\n" + prefix).join(lines), b"\n"))

    def _finder(self, needle: bytes, block: bytes) -> Callable[[bytes, int, int], int]:
        """How to find it in this block, and in those that are like it."""
        if not self._taken_for:
            self._taken_for = _ASKED_BLOCKS * len(self._needles)
            self._seldom = _seldom_characters(self._needles, block)
        self._taken_for -= 1
        if needle in self._seldom:
            return partial(_find_by_character, needle, *self._seldom[needle])
        return partial(_find, needle)


def _seldom_characters(needles: Iterable[bytes], block: bytes) -> dict[bytes, tuple[int, bytes]]:
    """By needle, the most seldom of its characters, where that is seldom enough."""
    found: dict[bytes, tuple[int, bytes]] = {}
    for needle in needles:
        characters = {needle[at : at + 1]: at for at in range(len(needle))}
        times, at = min((block.count(each), at) for each, at in characters.items())
        if times * _SELDOM_BYTES <= len(block):
            found[needle] = at, needle[at : at + 1]
    return found


def _find(needle: bytes, block: bytes, start: int, end: int) -> int:
    return block.find(needle, start, end)


def _find_by_character(
    needle: bytes, inside: int, character: bytes, block: bytes, start: int, end: int
) -> int:
    """As `bytes.find`, from one such character to the next (`memchr`)."""
    at = start + inside
    for _ in range(1 + (end - start) // _SELDOM_BYTES):
        at = block.find(character, at, end)
        if at < 0 or block.startswith(needle, at - inside, end):
            return at - inside if at >= 0 else -1
        at += 1
    # It is not so seldom here.
    return block.find(needle, at - inside, end)


def _distinct(needles: Iterable[bytes]) -> tuple[bytes, ...]:
    """Those that can match, without those that hold another one: it finds their lines, too."""
    # A line has its newline at the end, and no other. An empty needle is in every line, as its
    # newline is.
    possible = {needle or b"\n" for needle in needles if b"\n" not in needle[:-1]}
    distinct: list[bytes] = []
    for needle in sorted(possible, key=lambda needle: (needle != b"\n", len(needle))):
        if distinct != [b"\n"] and not any(other in needle for other in distinct):
            distinct.append(needle)
    return tuple(distinct)


def _lines_at(
    block: bytes, start: int, end: int, finders: Sequence[Callable[[bytes, int, int], int]]
) -> Iterator[bytes]:
    """The lines, without their newline, that hold a needle, by going from match to match."""
    # `bytes.find` is several times faster than `re`, also once for each of a few needles.
    nexts = [find(block, start, end) for find in finders]
    while (found := min((at for at in nexts if at >= 0), default=-1)) >= 0:
        line = block.rfind(b"\n", start, found) + 1 or start
        start = block.find(b"\n", found) + 1
        yield block[line : start - 1]
        nexts = [
            find(block, start, end) if 0 <= at < start else at
            for at, find in zip(nexts, finders, strict=True)
        ]
