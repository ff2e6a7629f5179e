"""The last lines of a job, for any number of readers, each as fast as it can.

There is no queue for each reader. All look at the same bounded store, and each knows how far it
has got. So a slow browser costs no memory and holds up nobody, least of all the job: it lags, and
when what it has not read yet is older than what is kept, it is told how many items it has missed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

KEEP_ITEMS: Final = 2_000
KEEP_CHARS: Final = 500_000
# In one piece, so that a reader who is far behind is not handed all of it at once.
PIECE_ITEMS: Final = 500


class Bell:
    """Wakes whoever waits. It does not remember having rung: look first, then wait."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout: float | None = None) -> bool:
        """Whether it has rung before `timeout` seconds were over; None waits for ever."""
        try:
            async with asyncio.timeout(timeout):
                await self._event.wait()
        except TimeoutError:
            return False
        return True


@dataclass(frozen=True)
class Item:
    """A line of a worker, or a note of ours."""

    text: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """What a reader gets next.

    Attributes:
        items: as JSON has them, in order.
        lost: how many before them are not kept any more.
        last: the number of the last item, to go on from; that of the first ever is 1.
    """

    items: list[dict[str, Any]]
    lost: int
    last: int


class Output:
    """Keeps the last `keep_items`, and of these the last `keep_chars` characters."""

    def __init__(self, keep_items: int = KEEP_ITEMS, keep_chars: int = KEEP_CHARS) -> None:
        self._keep_items, self._keep_chars = keep_items, keep_chars
        self._items: deque[Item] = deque()
        self._chars = 0
        self.last = 0

    def add(self, text: str, **fields: Any) -> None:
        self._items.append(Item(text, fields))
        self._chars += len(text)
        self.last += 1
        while len(self._items) > self._keep_items or self._chars > self._keep_chars:
            self._chars -= len(self._items.popleft().text)

    def after(self, number: int) -> Piece:
        """What came after the item of that number; 0 for all that is kept."""
        kept_from = self.last - len(self._items)
        number = min(max(number, 0), self.last)
        start = max(number - kept_from, 0)
        stop = min(start + PIECE_ITEMS, len(self._items))
        items = [self._items[index] for index in range(start, stop)]
        return Piece(
            items=[{"text": item.text, **item.fields} for item in items],
            lost=max(kept_from - number, 0),
            last=kept_from + stop,
        )
