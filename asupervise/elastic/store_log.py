"""A log in a store like torch's: keys that are set, counted, compared and waited for.

Who writes takes the next number and sets the entry of that number, where nobody else has; who
reads waits for the next entry. Eight nodes whose leases last 15 s append 7,700 beats an hour, of
some 70 bytes; a summary replaces them, so that no more than some 2,000 entries are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from asupervise.elastic.engine import EngineError
from asupervise.elastic.log_engine import Reader
from asupervise.elastic.replay import NOTHING

__all__ = ["Store", "StoreLog", "first_line"]

T = TypeVar("T")

# Entries are removed so many at a time, so that nothing of ours waits for long behind it.
_REMOVED_AT_ONCE: Final = 50
# How many entries stay behind the summary, for those who are only a little behind.
_KEPT: Final = 1000


class Store(Protocol):
    """What is used of torch's `Store`. Errors are `RuntimeError`, or `OSError`."""

    def add(self, key: str, value: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def delete_key(self, key: str, /) -> bool: ...
    def get(self, key: str, /) -> bytes: ...
    def set(self, key: str, value: str, /) -> None: ...


class _Line:
    """A connection to the store, and the one thread that waits in it, and ends with it.

    A call into the store cannot be cut short. A line that hangs is therefore left alone and another
    one is made; the thread ends when the call does, at the latest when the kernel gives it up.
    """

    def __init__(self, connect: Callable[[], Store]) -> None:
        self._connect = connect
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[tuple[Callable[[Store], Any], Any] | None]
        self._jobs = queue.SimpleQueue()
        self._waiting: set[asyncio.Future[Any]] = set()
        self.ended = False
        self._gone = asyncio.Event()
        # A thread that hangs must not keep the program from its end.
        threading.Thread(target=self._work, name="asupervise c10d", daemon=True).start()

    async def call(self, do: Callable[[Store], T]) -> T:
        """What the thread has of this.

        Raises:
            EngineError: if the line has ended, or ends meanwhile.
        """
        if self.ended:
            raise EngineError("the connection has ended")
        future: asyncio.Future[T] = self._loop.create_future()
        self._waiting.add(future)
        self._jobs.put((do, future))
        try:
            return await future
        finally:
            self._waiting.discard(future)

    def end(self) -> None:
        """Let no call begin any more; those that wait are told."""
        if not self.ended:
            self.ended = True
            self._jobs.put(None)
            for future in self._waiting:
                if not future.done():
                    future.set_exception(EngineError("the connection has ended"))

    async def wait_gone(self, timeout_s: float) -> None:
        """Wait until the thread has ended, or the time is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._gone.wait()

    def _work(self) -> None:
        store: Store | None = None
        while (job := self._jobs.get()) is not None:
            do, future = job
            if self.ended:
                break
            try:
                store = store or self._connect()
                result, error = do(store), None
            except Exception as exc:
                # Raised where it is waited for.
                result, error = None, exc
            self._tell(self._settle, future, result, error)
            del job, do, future
        del store
        self._tell(self._gone.set)

    def _tell(self, what: Callable[..., object], *args: object) -> None:
        # The loop is closed when nobody waits for this any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what, *args)

    @staticmethod
    def _settle(future: asyncio.Future[T], result: T, error: Exception | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)


class StoreLog:
    """A `Log` in a store; made by :meth:`open`.

    Keys, after the prefix: ``length``: the last number taken; ``log/N``: an entry; ``summary``:
    ``INDEX TEXT``; ``trimmed``: the last entry that was removed; ``id``: of this store.

    Args:
        name: for messages.
        prefix: of all keys.
        connect: gives a connection; blocks.
        reachable: returns when a connection can be made.
        hole_s: how long a number may be taken without an entry.
        reader: who is told the entries.
    """

    def __init__(
        self,
        name: str,
        prefix: str,
        connect: Callable[[], Store],
        reachable: Callable[[], Awaitable[None]],
        hole_s: float,
        reader: Reader,
    ) -> None:
        self.name = name
        self._prefix = prefix
        self._connect = connect
        self._reachable = reachable
        self._hole_s = hole_s
        self._reader = reader
        self._identity = ""
        self._read = 0
        self._written = 0
        self._last: str | None = None
        self._reading: _Line | None = None
        self._writing: _Line | None = None
        self._lines: set[_Line] = set()
        self._online = asyncio.Event()
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def open(
        cls,
        name: str,
        prefix: str,
        connect: Callable[[], Store],
        reachable: Callable[[], Awaitable[None]],
        hole_s: float,
        reader: Reader,
    ) -> StoreLog:
        """Begin to read. See the class for the arguments.

        Raises:
            EngineError: if what is reachable is no store.
        """
        log = cls(name, prefix, connect, reachable, hole_s, reader)
        try:
            await log._greet(await log._reading_line())
        except BaseException:
            await log.close()
            raise
        log._tasks = [
            asyncio.create_task(work(), name=f"asupervise c10d{work.__name__}")
            for work in (log._read_on, log._fill_holes)
        ]
        return log

    # --- writing -----------------------------------------------------------------------------

    async def append(self, text: str) -> None:
        index = await self._write(lambda store: self._appended(store, text))
        self._written = max(self._written, index)
        self._tell()

    def _appended(self, store: Store, text: str) -> int:
        while True:
            index = int(store.add(f"{self._prefix}length", 1))
            # What stands there already was put there because we took too long to.
            if store.compare_set(self._entry(index), "", text).decode() == text:
                return index

    async def _write(self, do: Callable[[Store], T]) -> T:
        line = await self._writing_line()
        try:
            return await line.call(do)
        except BaseException as exc:
            # Also when it was waited for in vain: what comes next is not to wait behind it.
            line.end()
            if isinstance(exc, (RuntimeError, OSError)):
                raise EngineError(f"{self.name}: {first_line(exc)}") from None
            raise

    async def _writing_line(self) -> _Line:
        await self.connected()
        if self._writing is None or self._writing.ended:
            await self._reachable()
            if self._writing is None or self._writing.ended:
                self._writing = self._new_line()
        return self._writing

    async def connected(self) -> None:
        await self._online.wait()

    async def summarise(self, index: int, summary: str) -> None:
        if not await self._write(lambda store: self._summarised(store, index, summary)):
            return
        trimmed = f"{self._prefix}trimmed"
        first = 1 + await self._write(lambda store: int(store.add(trimmed, 0)))
        for low in range(first, index - _KEPT + 1, _REMOVED_AT_ONCE):
            high = min(low + _REMOVED_AT_ONCE, index - _KEPT + 1)
            await self._write(partial(self._removed, entries=range(low, high)))

    def _summarised(self, store: Store, index: int, summary: str) -> bool:
        key = f"{self._prefix}summary"
        known = store.get(key).decode() if store.check([key]) else ""
        if known and int(known.partition(" ")[0]) >= index:
            return False
        text = f"{index} {summary}"
        return store.compare_set(key, known, text).decode() == text

    def _removed(self, store: Store, entries: range) -> None:
        for index in entries:
            store.delete_key(self._entry(index))
        store.set(f"{self._prefix}trimmed", str(entries[-1]))

    def _entry(self, index: int) -> str:
        return f"{self._prefix}log/{index}"

    # --- reading -----------------------------------------------------------------------------

    async def _read_on(self) -> None:
        while True:
            try:
                line = await self._reading_line()
                if not self._online.is_set():
                    await self._greet(line)
                return await self._read_from(line)
            except (EngineError, RuntimeError, OSError):
                # Another connection is tried for as long as anybody wants to know; who waits for an
                # answer has a limit of its own.
                self._online.clear()
                if self._reading is not None:
                    self._reading.end()

    async def _reading_line(self) -> _Line:
        if self._reading is None or self._reading.ended:
            await self._reachable()
            self._reading = self._new_line()
        return self._reading

    def _new_line(self) -> _Line:
        line = _Line(self._connect)
        self._lines = {known for known in self._lines if not known._gone.is_set()} | {line}
        return line

    async def _greet(self, line: _Line) -> None:
        try:
            identity, summary = await line.call(self._hello)
        except (RuntimeError, OSError) as exc:
            raise EngineError(
                f"{self.name}: {first_line(exc)}",
                hint="--rdzv-endpoint HOST:PORT of the node that hosts the store",
            ) from None
        if identity != self._identity:
            known, self._identity, self._read, self._written = self._identity, identity, 0, 0
            if known and not summary:
                self._reader.begin_anew("")
        self._skip(summary)
        self._online.set()

    def _hello(self, store: Store) -> tuple[str, str]:
        identity = store.compare_set(f"{self._prefix}id", "", os.urandom(8).hex()).decode()
        return identity, self._summary(store)

    def _summary(self, store: Store) -> str:
        key = f"{self._prefix}summary"
        return store.get(key).decode() if store.check([key]) else ""

    def _skip(self, summary: str) -> bool:
        """Go on behind the summary, if we have not come so far."""
        index, _, text = summary.partition(" ")
        if not summary or int(index) <= self._read:
            return False
        self._read = int(index)
        self._reader.begin_anew(text)
        return True

    async def _read_from(self, line: _Line) -> None:
        """Read until the last entry, or an error."""
        while True:
            text = await line.call(partial(self._got, index=self._read + 1))
            # What has come in the place of an entry may have come in the place of one that was
            # read and removed: then there is a summary, which is written before that.
            if text == NOTHING and self._skip(await line.call(self._summary)):
                continue
            self._read += 1
            self._reader.receive(text)
            self._tell()
            if text == self._last:
                return

    def _got(self, store: Store, index: int) -> str:
        # Blocks until it is there. It has a time limit of its own, for a store that is gone.
        return store.get(self._entry(index)).decode()

    # --- holes -------------------------------------------------------------------------------

    async def _fill_holes(self) -> None:
        """See to it that all come past a number that somebody took and died."""
        while True:
            while self._read >= self._written:
                await self._news.wait()
            read = self._read
            if await self._advances(read):
                continue
            try:
                await self._write(partial(self._filled, index=read + 1))
            except EngineError:
                continue
            if not await self._advances(read) and self._reading is not None:
                # It is there now: what does not come is our own reading.
                self._reading.end()

    def _filled(self, store: Store, index: int) -> None:
        store.compare_set(self._entry(index), "", NOTHING)

    async def _advances(self, read: int) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._hole_s):
                while self._read == read:
                    await self._news.wait()
        return self._read != read

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def close(self, last: str | None = None) -> None:
        """Let go of it. See :meth:`Log.close`.

        The thread that reads waits in the store for the next entry, so there has to be one for it
        to end; and with that it is to end. torch fills the console with its stacks when a store
        goes while somebody waits in it, or writes to it.
        """
        self._last = last or NOTHING
        if self._online.is_set() and self._tasks:
            with contextlib.suppress(EngineError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._write(partial(self._appended, text=self._last))
                    await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for line in self._lines:
            line.end()
        for line in self._lines:
            # One that just connects may wait for a name server.
            await line.wait_gone(3.0)


def first_line(exc: BaseException) -> str:
    # torch's messages go on with the stack of its own code.
    return str(exc).splitlines()[0] if str(exc) else type(exc).__name__
