"""What a tailer asks of the place that its lines go to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Protocol

from asupervise.framing import Framed


class Sink(Protocol):
    """Where a tailer's lines go: a `Console`, or whoever else takes them.

    One that derives from this class takes a block at a time, by `write`, and nothing at once.

    Attributes:
        turn: held by whoever writes.
        blocks: taken by a tailer for as long as it holds a block for this sink, so that a reader
            that is slow makes it wait, and not our memory grow.
    """

    turn: asyncio.Lock
    blocks: asyncio.Semaphore

    @property
    def broken(self) -> Exception | None:
        """Why nothing is taken any more, or None."""
        return None

    @property
    def keeps_together(self) -> bool:
        """Whether the turn is worth keeping, so that nobody writes between the lines of one."""
        return False

    @property
    def takes_streams(self) -> bool:
        """Whether :meth:`write_all` is possible."""
        return False

    @property
    def takes_lines(self) -> bool:
        """Whether :meth:`write_lines` is worth a try."""
        return False

    async def write(self, owner: object, framed: Framed) -> None:
        """Take what `owner` has framed; `turn` must be held. Returns when more may come."""

    def write_lines(self, owner: object, framed: Framed) -> bool:
        """Take a few whole lines at once, all of them or none; `turn` must be free."""
        return False

    async def write_all(self, owner: object, framings: Generator[Framed, None, None]) -> None:
        """Take what comes out of an iterator, which may run in a thread."""
        for framed in framings:
            await self.write(owner, framed)


class Sideline(Protocol):
    """Who gets all that a tailer reads, beside the console.

    Both methods are quick, and return what is to be done in a thread, if anything.
    """

    def feed(self, data: bytes, fd: int) -> Callable[[], None] | None:
        """Take what was read from `fd`, the file's descriptor."""

    def end(self, fd: int | None) -> Callable[[], None] | None:
        """The file has ended; None for `fd` if what was in it is gone."""
