"""The same line from many ranks within a moment, put together: pure, fed with times.

Conservative: lines that differ in anything are different; no rank's lines change their order; a
line waits for a moment at the most, and a rank's own repetitions are left alone. Lines of
different ranks may change theirs: what a rank has said alone goes before a line that it has in
common with others.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Generic, TypeVar

__all__ = ["HOLD_S", "Dedup", "Merged"]

Text = TypeVar("Text", bytes, str)

HOLD_S = 0.25
_MAX_LINES = 4096
_MAX_SIZE = 1 << 20
_ROOM = 1024


@dataclass(slots=True)
class Merged(Generic[Text]):
    """A line, and who has said it.

    Attributes:
        text: the line.
        ranks: those that have said it, in that order.
        at: when it was first read, in whatever the caller counts.
    """

    text: Text
    ranks: list[int]
    at: float
    # Where it stands among those that are held, and since when its moment runs.
    place: float = field(repr=False)
    since: float = field(repr=False)


def _place(merged: Merged[Text]) -> float:
    return merged.place


class Dedup(Generic[Text]):
    """Holds lines back for a moment, and puts equal ones of different ranks together.

    Args:
        hold_s: how long a line is held at the most; `HOLD_S` by default.
        max_lines: how many are held at the most.
        max_size: how many bytes or characters.

    Example:
        >>> dedup = Dedup[str]()
        >>> dedup.join(0); dedup.join(1)
        >>> for rank, text in ((0, "a"), (0, "b"), (1, "a")):
        ...     dedup.add(rank, text, now=1.0, at=1.0)
        >>> [(each.text, each.ranks) for each in dedup.take(now=1.0)]
        [('a', [0, 1])]
        >>> [(each.text, each.ranks) for each in dedup.take(now=1.0 + HOLD_S)]
        [('b', [0])]
    """

    def __init__(
        self, *, hold_s: float | None = None, max_lines: int = _MAX_LINES, max_size: int = _MAX_SIZE
    ) -> None:
        self._hold_s = HOLD_S if hold_s is None else hold_s
        self._max_lines = max_lines
        self._max_size = max_size
        # In the order in which they will be given out: by their places.
        self._held: list[Merged[Text]] = []
        self._by_text: dict[Text, list[Merged[Text]]] = {}
        self._by_rank: dict[int, deque[Merged[Text]]] = {}
        self._size = 0
        self._next_place = 0.0
        # How many streams each rank has; the place of the last line that it has in common with
        # others; and those without one, who may yet say what the first line is.
        self._streams: dict[int, int] = {}
        self._bound: dict[int, float] = {}
        self._free: set[int] = set()

    def join(self, rank: int) -> None:
        """A rank may speak from now on; its lines are waited for."""
        self._streams[rank] = self._streams.get(rank, 0) + 1
        if rank not in self._bound:
            self._free.add(rank)

    def leave(self, rank: int) -> None:
        """It has said all; to be called as often as :meth:`join`."""
        self._streams[rank] -= 1
        if not self._streams[rank]:
            del self._streams[rank]
            self._free.discard(rank)

    def add(self, rank: int, text: Text, *, now: float, at: float) -> None:
        """A rank says something.

        Args:
            rank: who.
            text: what.
            now: the time, of a clock that never goes back.
            at: kept with the line, if it is the first to say it.
        """
        own = self._by_rank.setdefault(rank, deque())
        merged = self._said_by_others(rank, text)
        if merged is not None and self._is_put_before(own, merged):
            merged.ranks.append(rank)
            for each in (merged.ranks[0], rank):
                self._bound[each] = max(merged.place, self._bound.get(each, merged.place))
                self._free.discard(each)
        else:
            merged = Merged(text, [rank], at, self._next_place, now)
            self._next_place += 1
            self._size += len(text)
            self._held.append(merged)
            self._by_text.setdefault(text, []).append(merged)
        own.append(merged)

    def _said_by_others(self, rank: int, text: Text) -> Merged[Text] | None:
        """The first held line that this rank may have in common with others."""
        bound = self._bound.get(rank, -1.0)
        alike = self._by_text.get(text, [])
        # Its own repetitions come before those of others: else it would have joined these.
        at = bisect_left(alike, True, key=lambda each: each.place > bound and each.ranks != [rank])
        return alike[at] if at < len(alike) else None

    def _is_put_before(self, own: deque[Merged[Text]], merged: Merged[Text]) -> bool:
        """Put what a rank has said before a line that it has said now; False if that cannot be.

        What stands behind that line so far the rank has said alone, and it may stand anywhere
        behind the last that it has in common with others.
        """
        behind: list[Merged[Text]] = []
        for each in reversed(own):
            if each.place < merged.place:
                break
            behind.append(each)
        if not behind:
            return True
        behind.reverse()
        before = bisect_left(self._held, merged.place, key=_place) - 1
        low = self._held[before].place if before >= 0 else merged.place - 1
        # Near the one before: there will be others, and there are not so many numbers.
        step = (merged.place - low) / (len(behind) + _ROOM)
        places: list[float] = [low + number * step for number in range(1, len(behind) + 1)]
        if any(a >= b for a, b in pairwise([low, *places, merged.place])):
            return False
        for each, place in zip(behind, places, strict=True):
            self._move(each, place)
            each.since = min(each.since, merged.since)
        return True

    def _move(self, merged: Merged[Text], place: float) -> None:
        both = (self._held, self._by_text[merged.text])
        for lines in both:
            del lines[bisect_left(lines, merged.place, key=_place)]
        merged.place = place
        for lines in both:
            insort(lines, merged, key=_place)

    @property
    def overfull(self) -> bool:
        """Whether more is held than there should be: :meth:`take` gives it out."""
        return len(self._held) > self._max_lines or self._size > self._max_size

    def due(self) -> float | None:
        """When :meth:`take` has something at the latest; None if nothing is held."""
        return self._held[0].since + self._hold_s if self._held else None

    def take(self, now: float) -> list[Merged[Text]]:
        """The lines that need not or must not be held any longer, in their order."""
        taken = []
        while self._held and (self._is_settled() or self._is_due(now) or self.overfull):
            taken.append(self._first())
        return taken

    def take_all(self) -> list[Merged[Text]]:
        """All that is held."""
        return [self._first() for _ in range(len(self._held))]

    def _is_settled(self) -> bool:
        """Whether nobody can say the first line any more who has not said it."""
        return not self._free or self._free == {*self._held[0].ranks}

    def _is_due(self, now: float) -> bool:
        return now >= self._held[0].since + self._hold_s

    def _first(self) -> Merged[Text]:
        first = self._held.pop(0)
        if not self._held:
            self._next_place = 0.0
        self._size -= len(first.text)
        alike = self._by_text[first.text]
        del alike[0]
        if not alike:
            del self._by_text[first.text]
        for rank in first.ranks:
            self._by_rank[rank].popleft()
            if self._bound.get(rank) == first.place:
                del self._bound[rank]
                if rank in self._streams:
                    self._free.add(rank)
        return first
