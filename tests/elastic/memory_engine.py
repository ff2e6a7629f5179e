"""An engine in this process, for tests of what stands above engines; links can be cut."""

from __future__ import annotations

import asyncio

from asupervise.elastic.log_engine import LogEngine, Reader
from asupervise.elastic.replay import Command

__all__ = ["MemoryEngines"]


class MemoryLog:
    """One node's way to the shared log."""

    name = "the log in memory"

    def __init__(self, shared: MemoryEngines, reader: Reader) -> None:
        self._shared = shared
        self._reader = reader
        self._read = 0
        self._link = asyncio.Event()
        self._link.set()
        self.delay_s = 0.0

    async def append(self, text: str) -> None:
        await self._link.wait()
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        self._shared.append(text)

    async def connected(self) -> None:
        await self._link.wait()

    async def summarise(self, index: int, summary: str) -> None:
        self._shared.summaries.append((index, summary))

    async def close(self, last: str | None = None) -> None:
        if last is not None and self._link.is_set():
            self._shared.append(last)
        self._shared.logs.discard(self)

    def pump(self) -> None:
        """Tell the reader what it has not heard yet."""
        while self._link.is_set() and self._read < len(self._shared.entries):
            self._read += 1
            self._reader.receive(self._shared.entries[self._read - 1])

    def cut(self) -> None:
        self._link.clear()

    def heal(self) -> None:
        self._link.set()
        self.pump()

    def reset(self) -> None:
        self._read = 0
        self._reader.begin_anew("")


class MemoryEngines:
    """The log that engines share, and what can be done to it.

    Example:
        >>> engines = MemoryEngines()
        >>> engine = await engines.open(lease_s=1.0)  # doctest: +SKIP
        >>> engines.cut(engine)  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.logs: set[MemoryLog] = set()
        self.summaries: list[tuple[int, str]] = []
        self._by_engine: dict[int, MemoryLog] = {}

    async def open(self, lease_s: float, timeout_s: float = 5.0) -> LogEngine:
        """Another node's engine."""
        made: list[MemoryLog] = []

        async def opener(reader: Reader) -> MemoryLog:
            log = MemoryLog(self, reader)
            made.append(log)
            self.logs.add(log)
            log.pump()
            return log

        engine = await LogEngine.open(opener, lease_s=lease_s, timeout_s=timeout_s)
        self._by_engine[id(engine)] = made[0]
        return engine

    def append(self, text: str) -> None:
        self.entries.append(text)
        loop = asyncio.get_running_loop()
        for log in self.logs:
            loop.call_soon(log.pump)

    def log_of(self, engine: LogEngine) -> MemoryLog:
        return self._by_engine[id(engine)]

    def cut(self, engine: LogEngine) -> None:
        """Neither what it writes nor what it would read gets through, until it is healed."""
        self.log_of(engine).cut()

    def heal(self, engine: LogEngine) -> None:
        self.log_of(engine).heal()

    def end_lease(self, engine: LogEngine) -> None:
        """As an administrator may; the engine is told nothing."""
        self.append(Command("end", lease=engine._lease).text())

    def reset(self) -> None:
        """All data is lost."""
        self.entries.clear()
        for log in list(self.logs):
            log.reset()
