"""An engine on a log: whatever can append to a list and tell what is appended can be one.

What the log's entries do is in :mod:`asupervise.elastic.replay`; this is the part with the clock:
it keeps our lease, asks for the end of others', answers and wakes whoever waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from math import isinf
from typing import Final, Protocol

from asupervise.elastic.engine import (
    Change,
    Condition,
    EngineError,
    LeaseLostError,
    Put,
    Snapshot,
    Write,
)
from asupervise.elastic.records import RecordError
from asupervise.elastic.replay import Applied, Command, Replica, command_of

__all__ = ["Log", "LogEngine", "Reader"]

# Of the time that a lease lasts: how much faster than ours another node's clock may run. Crystals
# differ by a ten-thousandth at the most.
_DRIFT: Final = 0.001
# So many entries are replaced by a summary: those who come late have no more than twice as many
# to read, and the log does not grow for ever.
_SUMMARY_EVERY: Final = 1000
# Watches may begin so many entries that changed something behind the present.
_REMEMBERED: Final = 1000


class Reader(Protocol):
    """Who is told what stands in the log, in its order, on the event loop."""

    def receive(self, text: str) -> None:
        """The next entry."""

    def begin_anew(self, summary: str) -> None:
        """Forget all; the log begins with this, or, if it is empty, with its first entry."""

    def fail(self, error: EngineError) -> None:
        """The log can never be read again."""


class Log(Protocol):
    """A list that all nodes append to and read.

    Attributes:
        name: for messages.
    """

    name: str

    async def append(self, text: str) -> None:
        """Append an entry. Whoever cancels this, or has an error of it, cannot know whether."""

    async def connected(self) -> None:
        """Return as soon as the log can be reached, as far as that is known."""

    async def summarise(self, index: int, summary: str) -> None:
        """Put this in the place of the entries until the `index`-th, in time."""

    async def close(self, last: str | None = None) -> None:
        """Let go of it, after a last entry where there is one.

        Whoever keeps the log may end as soon as that entry is read, so nothing is asked of it then.
        """


class LogEngine:
    """An `Engine`; made by :meth:`open`.

    Args:
        lease_s: after so long a silence a node is gone.
        timeout_s: how long a call may take.
    """

    def __init__(self, lease_s: float, timeout_s: float) -> None:
        self.lease_s = lease_s
        self.operations: dict[str, int] = Counter()
        self._timeout_s = timeout_s
        self._log: Log | None = None
        self._replica = Replica()
        self._id = os.urandom(8).hex()
        self._count = 0
        self._lease = ""
        self._alive_until = 0.0
        self.on_renewal: Callable[[], None] = lambda: None
        self._asked: dict[str, asyncio.Future[tuple[int, Applied]]] = {}
        self._watches: set[_Watch] = set()
        self._history: deque[tuple[int, Sequence[Change]]] = deque()
        self._forgotten = 0
        self._stirred = asyncio.Event()
        self._broken: EngineError | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls,
        opener: Callable[[Reader], Awaitable[Log]],
        *,
        lease_s: float,
        timeout_s: float,
    ) -> LogEngine:
        """Open the log, and begin a lease.

        Args:
            opener: gives the log, which tells the reader that it is given what stands in it.
            lease_s: see above.
            timeout_s: see above.

        Raises:
            EngineError: if the log cannot be had.
        """
        engine = cls(lease_s, timeout_s)
        engine._log = await opener(engine)
        try:
            await engine.new_lease()
            engine._start(engine._end_others())
        except BaseException:
            await engine.close()
            raise
        return engine

    @property
    def alive_until(self) -> float:
        return self._alive_until

    @property
    def others(self) -> bool:
        """Whether there are leases besides ours, as far as we have read."""
        return any(not name.startswith("keep/") for name in self._replica.leases - {self._lease})

    async def wait_alone(self) -> None:
        """Return when there are no other leases."""
        while self.others:
            await self._stir()

    # --- calls -------------------------------------------------------------------------------

    async def read(self, under: str = "") -> Snapshot:
        self.operations["read"] += 1
        # What we have read is as new as our last command that was answered; where the log is known
        # to be out of reach, it is not to pass for the present.
        async with self._limit(self._timeout_s):
            await self._the_log.connected()
        self._check()
        return self._replica.read(under)

    async def commit(self, conditions: Sequence[Condition], writes: Sequence[Write]) -> int | None:
        leased = any(isinstance(write, Put) and write.leased for write in writes)
        if leased and not self._lease:
            raise LeaseLostError("our lease has ended")
        command = Command(
            "commit", lease=self._lease, conditions=tuple(conditions), writes=tuple(writes)
        )
        index, applied = await self._do(command)
        if applied.lease_lost:
            self._lose(command.lease)
            raise LeaseLostError("our lease has ended")
        return index if applied.done else None

    async def watch(self, under: str, after: int) -> AsyncIterator[Sequence[Change]]:
        self.operations["watch"] += 1
        self._check()
        if after < self._forgotten or after > self._replica.index:
            raise EngineError(f"{self._the_log.name}: what was asked for is forgotten")
        watch = _Watch(under)
        for index, changes in self._history:
            if index > after:
                watch.add(changes)
        self._watches.add(watch)
        try:
            while True:
                yield await watch.next()
        finally:
            self._watches.discard(watch)

    async def new_lease(self) -> None:
        await self._stop_keeping()
        await self._give_back()
        name = os.urandom(8).hex()
        # Before it is appended: the others count from when they read it.
        sent = time.monotonic()
        await self._do(Command("begin", lease=name, lease_s=self.lease_s))
        self._lease = name
        self._lasts_until(sent + self.lease_s * (1 - _DRIFT))
        self._keeper = asyncio.create_task(self._keep(name), name="asupervise lease")

    async def close(self) -> None:
        await self._stop_keeping()
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.fail(EngineError(f"{self._the_log.name}: this connection is closed"))
        name, self._lease = self._lease, ""
        # Otherwise the lease ends by itself, later.
        await self._the_log.close(Command("end", lease=name).text() if name else None)

    # --- the lease ---------------------------------------------------------------------------

    async def _keep(self, name: str) -> None:
        """Let the others hear of us until the lease is lost."""
        while True:
            await asyncio.sleep(self.lease_s / 4)
            sent = time.monotonic()
            try:
                _, applied = await self._do(Command("beat", lease=name), self.lease_s / 4)
            except EngineError:
                # Tried again for as long as it may still be there; `alive_until` says the rest.
                continue
            if applied.lease_lost:
                return self._lose(name)
            self._lasts_until(sent + self.lease_s * (1 - _DRIFT))

    def _lose(self, name: str) -> None:
        if name == self._lease:
            self._lease = ""
            self._lasts_until(min(self._alive_until, time.monotonic()))

    def _lasts_until(self, moment: float) -> None:
        self._alive_until = moment
        self.on_renewal()

    async def _give_back(self) -> None:
        name, self._lease = self._lease, ""
        if name:
            # Otherwise it ends by itself, later.
            with contextlib.suppress(EngineError):
                await self._do(Command("end", lease=name), min(1.0, self._timeout_s))

    async def _stop_keeping(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    async def _end_others(self) -> None:
        """Ask for the end of leases that have not been heard of for too long."""
        while self._broken is None:
            due = self._replica.next_end(but=self._lease)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if isinf(due) else due - time.monotonic()):
                    await self._stir()
            for command in self._replica.overdue(time.monotonic(), but=self._lease):
                # Of an error: asked again, for it is still overdue; an error takes its time.
                with contextlib.suppress(EngineError):
                    await self._do(command)

    # --- commands ----------------------------------------------------------------------------

    async def _do(self, command: Command, timeout_s: float | None = None) -> tuple[int, Applied]:
        """Append a command; returns its place and what became of it."""
        self.operations[command.do] += 1
        self._check()
        self._count += 1
        command = replace(command, id=f"{self._id}/{self._count}")
        answer: asyncio.Future[tuple[int, Applied]] = asyncio.get_running_loop().create_future()
        self._asked[command.id] = answer
        try:
            async with self._limit(timeout_s or self._timeout_s):
                await self._the_log.append(command.text())
                return await answer
        finally:
            self._asked.pop(command.id, None)
            if not answer.cancel() and not answer.cancelled():
                answer.exception()  # of an answer that nobody waits for any more

    @contextlib.asynccontextmanager
    async def _limit(self, seconds: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise EngineError(
                f"{self._the_log.name} does not answer within {seconds:g} s",
                hint="is it running, and reachable from here? --rdzv-endpoint HOST:PORT",
            ) from None

    def _check(self) -> None:
        if self._broken is not None:
            raise self._broken

    @property
    def _the_log(self) -> Log:
        assert self._log is not None
        return self._log

    def _start(self, work: Awaitable[None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except EngineError:
                # Of a summary: the next one replaces more. Nothing else ends with an error.
                return

        task = asyncio.create_task(guarded(), name="asupervise log")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- what the log tells ------------------------------------------------------------------

    def receive(self, text: str) -> None:
        if self._broken is not None:
            return
        try:
            command = command_of(text, self._replica.index + 1)
        except RecordError as error:
            self.fail(error)
            return
        applied = self._replica.apply(command, time.monotonic())
        index = self._replica.index
        if applied.changes:
            self._remember(index, applied.changes)
        if (answer := self._asked.get(command.id)) is not None and not answer.done():
            answer.set_result((index, applied))
        if index % _SUMMARY_EVERY == 0 and command.id.startswith(f"{self._id}/"):
            self._start(self._the_log.summarise(index, self._replica.text()))
        self._tell()

    def _remember(self, index: int, changes: Sequence[Change]) -> None:
        self._history.append((index, changes))
        if len(self._history) > _REMEMBERED:
            self._forgotten, _ = self._history.popleft()
        for watch in self._watches:
            watch.add(changes)

    def begin_anew(self, summary: str) -> None:
        try:
            self._replica = Replica.of(summary, time.monotonic()) if summary else Replica()
        except RecordError as error:
            self.fail(error)
            return
        self._history.clear()
        self._forgotten = self._replica.index
        if self._lease not in self._replica.leases:
            self._lose(self._lease)
        name = "the log" if self._log is None else self._log.name
        self._refuse(EngineError(f"{name} does not have what it had"))

    def fail(self, error: EngineError) -> None:
        self._broken = self._broken or error
        self._refuse(error)

    def _refuse(self, error: EngineError) -> None:
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(error)
        for watch in self._watches:
            watch.fail(error)
        self._tell()

    def _tell(self) -> None:
        stirred, self._stirred = self._stirred, asyncio.Event()
        stirred.set()

    async def _stir(self) -> None:
        await self._stirred.wait()


class _Watch:
    """What one watch has not taken yet."""

    def __init__(self, under: str) -> None:
        self._under = under
        self._changes: asyncio.Queue[Sequence[Change] | EngineError] = asyncio.Queue()

    def add(self, changes: Sequence[Change]) -> None:
        ours = [change for change in changes if change.key.startswith(self._under)]
        if ours:
            self._changes.put_nowait(ours)

    def fail(self, error: EngineError) -> None:
        self._changes.put_nowait(error)

    async def next(self) -> Sequence[Change]:
        taken = await self._changes.get()
        if isinstance(taken, EngineError):
            raise taken
        return taken
