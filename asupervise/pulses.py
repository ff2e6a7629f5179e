"""First output, heartbeats and progress of a group's workers, as the kernel tells of their files.

Only where somebody consumes the events: each costs a wake-up of the loop.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import Final

from asupervise.handler import SubprocessHandler
from asupervise.hub import shared_hub
from asupervise.telling import GroupTeller
from asupervise.watches import Watches
from asupervise.worker import HEARTBEAT_VARIABLE, PROGRESS_VARIABLE, parse_progress

__all__ = ["Pulses"]

# A worker that beats without pause is told of so often at the most.
_PAUSE_S: Final = 0.1
_PROGRESS_BYTES: Final = 256


class Pulses:
    """Watches the files of one group's workers; :meth:`begin` may be called at any time.

    Args:
        teller: who is told.
        handlers: the workers, by local rank, filled while they are started.
    """

    def __init__(self, teller: GroupTeller, handlers: Mapping[int, SubprocessHandler]) -> None:
        self._teller = teller
        self._handlers = handlers
        self._ending = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """All workers have been started, and somebody wants to know."""
        if self._task is None and not self._ending.is_set():
            self._task = asyncio.get_running_loop().create_task(
                self._watch(), name="asupervise: pulses"
            )

    async def end(self) -> None:
        """All workers have ended: what they have told last is looked at, and nothing more."""
        self._ending.set()
        if self._task is not None:
            await asyncio.wait({self._task})

    async def _watch(self) -> None:
        async with shared_hub() as hub:
            await hub.watches.prepare()
            watched = [each for handler in self._handlers.values() for each in self._files(handler)]
            for each in watched:
                each.begin(hub.watches)
            await self._ending.wait()
            for each in watched:
                each.end()

    def _files(self, handler: SubprocessHandler) -> list[_File]:
        rank, pid, env, teller = handler.local_rank, handler.pid, handler.plan.env, self._teller
        files: list[_File] = []
        for stream, path in (("stdout", handler.plan.stdout), ("stderr", handler.plan.stderr)):
            if path and path != os.devnull:
                files.append(_Output(path, _told_output(teller, handler, stream)))
        if path := env.get(HEARTBEAT_VARIABLE):
            files.append(_Signs(path, lambda _: teller.heartbeat(rank, pid)))
        if path := env.get(PROGRESS_VARIABLE):
            files.append(_Signs(path, lambda text: _tell_progress(teller, rank, pid, text)))
        return files


def _told_output(
    teller: GroupTeller, handler: SubprocessHandler, stream: str
) -> Callable[[], None]:
    return lambda: teller.first_output(handler.plan, handler.pid, stream)


def _tell_progress(teller: GroupTeller, rank: int, pid: int, text: bytes) -> None:
    if (told := parse_progress(text)) is not None:
        teller.progress(rank, pid, *told)


class _File:
    """A file that is waited for; what `Watches` watches."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = -1
        self._watches: Watches | None = None

    def begin(self, watches: Watches) -> None:
        self._watches = watches
        self.look()

    def look(self) -> None:
        """See what there is, and ask to be woken for more."""

    def changed(self, *, only_written: bool = False) -> bool:
        """Something has happened; the watch ends, and is renewed where there may be more."""
        self.look()
        return False

    def end(self) -> None:
        if self._watches is not None:
            self._watches.forget(self)
            self._watches = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _Output(_File):
    """A log file in which nothing stands yet."""

    def __init__(self, path: str, tell: Callable[[], None]) -> None:
        super().__init__(path)
        self._tell = tell

    def look(self) -> None:
        if self._watches is None:
            return
        try:
            if self.fd < 0:
                self.fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            self.end()  # the worker has moved it away: nobody knows what it writes where
            return
        if self._has_something():
            self.end()
        else:
            # Not within the callback that ends this watch.
            asyncio.get_running_loop().call_soon(self._arm)

    def _arm(self) -> None:
        if self._watches is not None:
            self._watches.arm(self)
            # What was written before the watch was there woke nobody.
            if self._has_something():
                self.end()

    def end(self) -> None:
        tell = self._watches is not None and self._has_something()
        super().end()
        if tell:
            self._tell()

    def _has_something(self) -> bool:
        try:
            return self.fd >= 0 and os.fstat(self.fd).st_size > 0
        except OSError:
            return False


class _Signs(_File):
    """A file that a worker touches, or writes anew, each time that it has something to say."""

    def __init__(self, path: str, tell: Callable[[bytes], None]) -> None:
        super().__init__(path)
        self._tell = tell
        self._seen = 0, b""
        self._pause: asyncio.TimerHandle | None = None

    def look(self) -> None:
        if self._watches is None or self._pause is not None:
            return
        self._take()
        self._pause = asyncio.get_running_loop().call_later(_PAUSE_S, self._arm)

    def _arm(self) -> None:
        self._pause = None
        if self._watches is None:
            return
        try:
            if self.fd < 0:
                self._watches.arm_folder(self)
            else:
                self._watches.arm(self)
        except OSError:
            self.end()
            return
        if self._is_new():
            self._watches.forget(self)
            self.look()

    def _is_new(self) -> bool:
        return self._state() not in (None, self._seen)

    def _state(self) -> tuple[int, bytes] | None:
        """When it was touched last, and what stands in it; None where it is not there (yet)."""
        try:
            if self.fd < 0:
                self.fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            # A few bytes that have just been written: no disk is waited for.
            return os.fstat(self.fd).st_mtime_ns, os.pread(self.fd, _PROGRESS_BYTES, 0)
        except OSError:
            return None

    def _take(self) -> None:
        state = self._state()
        if state is not None and state != self._seen:
            self._seen = state
            self._tell(state[1])

    def end(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        if self._watches is not None:
            self._take()
        super().end()
