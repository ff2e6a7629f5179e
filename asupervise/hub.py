"""What all that follow files in one event loop share: watches, threads, consoles."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from asupervise.console import Consoles
from asupervise.watches import Watches

_THREADS = 4


class Threads(ThreadPoolExecutor):
    """The threads that all tailers of an event loop share; knows whether any is at work."""

    def __init__(self) -> None:
        super().__init__(_THREADS, thread_name_prefix="asupervise-logs")
        self._at_work: set[Future[Any]] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(fn, *args, **kwargs)
        self._at_work.add(future)
        future.add_done_callback(self._at_work.discard)
        return future

    def close(self) -> None:
        # Idle threads end at once, and are waited for: there shall be none more than before. A
        # call that waits for a reader who does not read is left alone (after a cancellation).
        self.shutdown(wait=not self._at_work)


class Hub:
    """What the tailers of one event loop share."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.users = 0
        self.threads = Threads()
        self.consoles = Consoles(self.threads)
        self.watches = Watches(loop)

    async def close(self) -> None:
        try:
            await self.watches.close(self.threads)
        finally:
            self.threads.close()


_hubs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Hub] = weakref.WeakKeyDictionary()


@asynccontextmanager
async def shared_hub() -> AsyncIterator[Hub]:
    """The running loop's hub: made by its first user, closed by its last."""
    loop = asyncio.get_running_loop()
    hub = _hubs.get(loop)
    if hub is None:
        hub = _hubs[loop] = Hub(loop)
    hub.users += 1
    try:
        yield hub
    finally:
        hub.users -= 1
        if not hub.users:
            del _hubs[loop]
            await hub.close()
