"""First output, heartbeats and progress of a group's workers, as the kernel tells of their files.

Only where somebody consumes the events: each costs a wake-up of the loop.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from functools import partial
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
    """Watches the files of one group's workers, from now until :meth:`end`.

    Args:
        teller: who is told.
    """

    def __init__(self, teller: GroupTeller) -> None:
        self._teller = teller
        self._files: dict[int, list[_File]] = {}
        self._watches: Watches | None = None
        self._ending = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(
            self._watch(), name="asupervise: pulses"
        )

    def follow(self, handler: SubprocessHandler) -> None:
        """A worker has been started; may be called again."""
        if handler.local_rank in self._files or self._ending.is_set():
            return
        self._files[handler.local_rank] = files = list(_files_of(self._teller, handler))
        if self._watches is not None:
            for each in files:
                each.begin(self._watches)

    def ended(self, handler: SubprocessHandler) -> None:
        """It has exited: what it has written last is looked at, before its end is told."""
        self.follow(handler)
        for each in self._files.get(handler.local_rank, ()):
            each.end()

    async def end(self) -> None:
        """The group is over."""
        self._ending.set()
        await asyncio.wait({self._task})

    async def _watch(self) -> None:
        async with shared_hub() as hub:
            await hub.watches.prepare()
            self._watches = hub.watches
            for each in self._all():
                each.begin(hub.watches)
            await self._ending.wait()
            # Only of workers that could not be ended is any left.
            for each in self._all():
                each.end()

    def _all(self) -> Iterator[_File]:
        return (each for files in self._files.values() for each in files)


def _files_of(teller: GroupTeller, handler: SubprocessHandler) -> Iterator[_File]:
    plan = handler.plan
    for stream, path in (("stdout", plan.stdout), ("stderr", plan.stderr)):
        if path and path != os.devnull:
            yield _Output(path, partial(teller.first_output, plan, handler.pid, stream))
    if path := plan.env.get(HEARTBEAT_VARIABLE):
        yield _Signs(path, lambda _: teller.heartbeat(plan.local_rank, handler.pid))
    if path := plan.env.get(PROGRESS_VARIABLE):
        yield _Signs(path, partial(_tell_progress, teller, handler))


def _tell_progress(teller: GroupTeller, handler: SubprocessHandler, text: bytes) -> None:
    if (told := parse_progress(text)) is not None:
        teller.progress(handler.local_rank, handler.pid, *told)


class _File:
    """A file that is waited for; what `Watches` watches."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = -1
        self._watches: Watches | None = None
        self._over = False

    def begin(self, watches: Watches) -> None:
        if not self._over:
            self._watches = watches
            self.look()

    def look(self) -> None:
        """See what there is, and ask to be woken for more."""

    def changed(self, *, only_written: bool = False) -> bool:
        """Something has happened; the watch ends, and is renewed where there may be more."""
        self.look()
        return False

    def last_look(self) -> None:
        """See what there is; there will be nothing more."""

    def end(self) -> None:
        """Look once more, and never again."""
        if self._over:
            return
        self._over = True
        self.last_look()
        if self._watches is not None:
            self._watches.forget(self)
            self._watches = None
        self._close()

    def _opened(self) -> int:
        """Its descriptor.

        Raises:
            OSError: it is not there (yet).
        """
        if self.fd < 0:
            self.fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return self.fd

    def _close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _Output(_File):
    """A log file in which nothing stands yet."""

    def __init__(self, path: str, tell: Callable[[], None]) -> None:
        super().__init__(path)
        self._tell = tell

    def look(self) -> None:
        if self._over:
            return
        if self._has_something() or self.fd < 0:
            # Or the worker has moved it away: nobody knows what it writes where.
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

    def last_look(self) -> None:
        if self._has_something():
            self._tell()

    def _has_something(self) -> bool:
        try:
            return os.fstat(self._opened()).st_size > 0
        except OSError:
            return False


class _Signs(_File):
    """A file that a worker touches, or writes anew, each time that it has something to say."""

    def __init__(self, path: str, tell: Callable[[bytes], None]) -> None:
        super().__init__(path)
        self._tell = tell
        self._seen: tuple[int, bytes] | None = None
        self._pause: asyncio.TimerHandle | None = None

    def look(self) -> None:
        if self._over or self._pause is not None:
            return
        self._take()
        self._pause = asyncio.get_running_loop().call_later(_PAUSE_S, self._arm)

    def _arm(self) -> None:
        self._pause = None
        if self._watches is None:
            return
        state = self._state()
        try:
            if state is None:
                self._watches.arm_folder(self)
            else:
                self._watches.arm(self)
        except OSError:
            self.end()
            return
        # What has happened before the watch was there woke nobody.
        if self._state() not in (None, self._seen):
            self._watches.forget(self)
            self.look()

    def last_look(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        self._take()

    def _take(self) -> None:
        state = self._state()
        if state is not None and state != self._seen:
            self._seen = state
            self._tell(state[1])

    def _state(self) -> tuple[int, bytes] | None:
        """When it was touched last, and what stands in it; None where it is not there (yet)."""
        try:
            status = os.fstat(self._opened())
            if not status.st_nlink:
                # It was removed, and is made anew with the next sign.
                self._close()
                status = os.fstat(self._opened())
            # A few bytes that have just been written: no disk is waited for.
            return status.st_mtime_ns, os.pread(self.fd, _PROGRESS_BYTES, 0)
        except OSError:
            return None
