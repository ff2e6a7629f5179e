"""Following log files while workers write them.

A :class:`Tailer` follows one file: it reads a block, frames it, hands it to the console, and
sleeps until the kernel says that the file has changed. All tailers of an event loop share one
inotify instance (the kernel grants a user only 128) and a constant number of threads.

Watches are one-shot: a worker that writes without pause costs no events at all, because its
tailer is busy reading; only a tailer that has caught up asks to be woken (inotify(7)).
"""

from __future__ import annotations

import asyncio
import os
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

from aiofiles.threadpool import wrap as async_file

from asupervise.console import Console, Consoles
from asupervise.framing import Framed, LineFilter, LineFramer

BLOCK_BYTES = 256 * 1024
_THREADS = 4

# An unfinished line (a prompt) is shown after this much silence.
IDLE_S = 0.5
# A progress bar is shown again after this long at the earliest: each time is a line of its own.
PROGRESS_S = 5.0
# Only where the kernel has no inotify for us (not Linux, or its limits are reached).
POLL_S = 0.05


class Watches(Protocol):
    """Wakes a tailer once when its file has changed."""

    def arm(self, fd: int, path: str, wake: asyncio.Event) -> None: ...
    def forget(self, wake: asyncio.Event) -> None: ...
    def close(self) -> None: ...


class InotifyWatches:
    """One-shot watches on one inotify instance, read in the event loop.

    Raises:
        OSError: if the kernel grants no (more) inotify instance.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        import asyncinotify

        self._library = asyncinotify
        self._inotify = asyncinotify.Inotify(cache_size=64, sync_timeout=0)
        mask = asyncinotify.Mask
        # ATTRIB comes with unlink and rename-over (the link count), MOVE_SELF with rename.
        self._file_mask = mask.MODIFY | mask.ATTRIB | mask.MOVE_SELF | mask.ONESHOT
        self._folder_mask = mask.CREATE | mask.MOVED_TO | mask.ONESHOT
        self._waiting: dict[Any, list[asyncio.Event]] = {}
        self._loop = loop
        loop.add_reader(self._inotify.fd, self._dispatch)

    def arm(self, fd: int, path: str, wake: asyncio.Event) -> None:
        """Set `wake` once when the open file `fd` changes.

        Where nothing is at `path` any more, also when something appears there.

        Raises:
            OSError: if the kernel grants no (more) watches.
        """
        # By its descriptor: a file that was moved or deleted is still written to.
        self._add(f"/proc/self/fd/{fd}", self._file_mask, wake)
        if not os.path.exists(path):
            self._add(os.path.dirname(path), self._folder_mask, wake)

    def _add(self, path: str, mask: Any, wake: asyncio.Event) -> None:
        watch = self._inotify.add_watch(path, mask)
        waiting = self._waiting.setdefault(watch, [])
        if wake not in waiting:
            waiting.append(wake)

    def forget(self, wake: asyncio.Event) -> None:
        for watch, waiting in list(self._waiting.items()):
            if wake in waiting:
                waiting.remove(wake)
                if not waiting:
                    del self._waiting[watch]
                    self._remove(watch)

    def _remove(self, watch: Any) -> None:
        try:
            self._inotify.rm_watch(watch)
        except OSError:
            # EINVAL: the one-shot watch has fired already; its event is on the way.
            pass

    def _dispatch(self) -> None:
        # With `sync_timeout=0` the library says None when there is nothing more to read.
        while (event := self._inotify.sync_get()) is not None:
            for wake in self._waiting.pop(event.watch, ()):
                wake.set()
            if event.mask & self._library.Mask.Q_OVERFLOW:
                self._wake_all()

    def _wake_all(self) -> None:
        # Events were dropped: everybody looks for himself.
        for waiting in self._waiting.values():
            for wake in waiting:
                wake.set()
        self._waiting.clear()

    def close(self) -> None:
        self._loop.remove_reader(self._inotify.fd)
        self._inotify.close()


class PollWatches:
    """The fallback without inotify: wakes every armed tailer each `POLL_S` seconds.

    This is the one place that polls. It runs only while something is armed.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._armed: set[asyncio.Event] = set()
        self._timer: asyncio.TimerHandle | None = None

    def arm(self, fd: int, path: str, wake: asyncio.Event) -> None:
        self._armed.add(wake)
        if self._timer is None:
            self._timer = self._loop.call_later(POLL_S, self._tick)

    def forget(self, wake: asyncio.Event) -> None:
        self._armed.discard(wake)

    def _tick(self) -> None:
        self._timer = None
        armed, self._armed = self._armed, set()
        for wake in armed:
            wake.set()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class Hub:
    """What the tailers of one event loop share."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.users = 0
        self.executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="asupervise-logs")
        self.consoles = Consoles(self.executor)
        self.fallback = PollWatches(loop)
        self.watches: Watches = self.fallback
        if sys.platform == "linux":
            try:
                self.watches = InotifyWatches(loop)
            except OSError:
                # EMFILE: fs.inotify.max_user_instances is used up by other programs.
                pass

    def arm(self, fd: int, path: str, wake: asyncio.Event) -> None:
        try:
            self.watches.arm(fd, path, wake)
        except OSError:
            # ENOSPC: fs.inotify.max_user_watches is used up. Or the folder is gone.
            self.fallback.arm(fd, path, wake)

    def forget(self, wake: asyncio.Event) -> None:
        self.watches.forget(wake)
        self.fallback.forget(wake)

    def close(self) -> None:
        self.watches.close()
        self.fallback.close()
        self.executor.shutdown(wait=False)


_hubs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Hub] = weakref.WeakKeyDictionary()


@contextmanager
def shared_hub() -> Iterator[Hub]:
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
            hub.close()


class FilteredLog:
    """The one file that the matching lines of all ranks are copied to, made when needed."""

    def __init__(self, path: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        self._file = os.fdopen(os.open(path, flags, 0o600), "wb", buffering=0)
        self._turn = asyncio.Lock()

    async def write(self, hub: Hub, data: bytes) -> None:
        async with self._turn:
            await async_file(self._file, executor=hub.executor).write(data)

    def close(self) -> None:
        self._file.close()


class Tailer:
    """Follows one log file from its beginning until :meth:`stop`, then to its end.

    The file is followed as ``tail -F`` does: truncated, it is read from its start again;
    replaced, the new one is read after the old one's end.

    Args:
        path: the file; it exists.
        framer: cuts its bytes into lines for `console`.
        console: where the lines go; None for the filter alone.
        line_filter: picks the lines for `filtered`.
        filtered: where those go.
        prompts: whether somebody may be waiting for its prompts: they are shown sooner.
    """

    def __init__(
        self,
        hub: Hub,
        path: str,
        framer: LineFramer,
        console: Console,
        line_filter: LineFilter | None = None,
        filtered: FilteredLog | None = None,
        *,
        prompts: bool = False,
    ) -> None:
        self._hub = hub
        self._path = path
        self._framer = framer
        self._console = console
        self._filter = line_filter
        self._filtered = filtered
        self._idle_s = IDLE_S / 5 if prompts else IDLE_S
        self._wake = asyncio.Event()
        self._stopping = False
        self._position = 0
        self._progress_since: float | None = None
        self._open()

    def _open(self) -> None:
        raw = open(self._path, "rb", buffering=0)  # noqa: SIM115 - closed by `run` or `_reopen`
        self._raw = raw
        self._file = async_file(raw, executor=self._hub.executor)

    def stop(self) -> None:
        """Let :meth:`run` return once it has read to the end of what is there now."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Follow the file. Returns after :meth:`stop`, when all is written."""
        try:
            while True:
                stopping = self._stopping
                await self._catch_up()
                if stopping:
                    break
                await self._wait_for_more()
            await self._finish()
        finally:
            self._hub.forget(self._wake)
            self._raw.close()

    def close(self) -> None:
        """Let go of the file without having run."""
        self._raw.close()

    async def _catch_up(self) -> None:
        """Read to the end of the file, and of those that have replaced it."""
        while True:
            while data := await self._file.read(BLOCK_BYTES):
                self._position += len(data)
                await self._take(data)
                if len(data) < BLOCK_BYTES and not self._behind():
                    break
            if not self._reopen_if_replaced():
                return

    def _behind(self) -> bool:
        """Whether the file has more for us, or was truncated. Asks an open descriptor: no disk."""
        size = os.fstat(self._raw.fileno()).st_size
        if size < self._position:
            self._raw.seek(0)
            self._position = 0
            return size > 0
        return size > self._position

    def _reopen_if_replaced(self) -> bool:
        try:
            there = os.stat(self._path)
            ours = os.fstat(self._raw.fileno())
            if (there.st_ino, there.st_dev) == (ours.st_ino, ours.st_dev):
                return False
            old = self._raw
            self._open()
        except OSError:
            # Moved away or deleted, and nothing in its place yet: the old one goes on.
            return False
        old.close()
        self._position = 0
        return True

    async def _take(self, data: bytes) -> None:
        if self._filter is not None and self._filtered is not None:
            matching = self._filter.feed(data)
            if matching:
                await self._filtered.write(self._hub, matching)
        framed = self._framer.feed(data)
        if framed is not None:
            self._progress_since = None
            await self._show(framed)

    async def _show(self, framed: Framed) -> None:
        async with self._console.turn:
            await self._console.write(self, framed)
            # A line too long to be held goes out in pieces; nobody may write between them, as
            # long as they keep coming.
            while framed.unfinished and self._framer.in_long_line:
                data = await self._read_soon()
                if not data:
                    return
                if (more := self._framer.feed(data)) is not None:
                    framed = more
                    await self._console.write(self, framed)

    async def _read_soon(self) -> bytes:
        """The next block, waiting for it as long as an unfinished line may be silent."""
        data = b""
        while not data:
            if not self._behind() and not await self._woken_within(self._idle_s):
                return b""
            data = await self._file.read(BLOCK_BYTES)
            if not data and self._stopping:
                return b""
        self._position += len(data)
        return data

    async def _wait_for_more(self) -> None:
        """Sleep until the file has changed or we are stopped; show what is left unfinished."""
        while self._framer.unfinished:
            delay = self._until_shown()
            if delay > 0 and await self._woken_within(delay):
                return
            framed = self._framer.peek()
            if framed is not None:
                self._progress_since = asyncio.get_running_loop().time()
                await self._show(framed)
        await self._woken_within(None)

    def _until_shown(self) -> float:
        """Seconds of silence after which the unfinished line is shown; 0: at once."""
        if not self._framer.in_progress:
            self._progress_since = None
            return self._idle_s
        now = asyncio.get_running_loop().time()
        if self._progress_since is None:
            self._progress_since = now
        due = self._progress_since + PROGRESS_S - now
        # The first silence shows a progress bar that has stopped; one that keeps moving, or has
        # been shown before, comes out every `PROGRESS_S`.
        return min(self._idle_s, max(0.0, due)) if not self._framer.partly_shown else max(0.0, due)

    async def _woken_within(self, delay_s: float | None) -> bool:
        """Wait for a change of the file, or for :meth:`stop`; False if neither came in time."""
        self._wake.clear()
        if self._stopping:
            return True
        self._hub.arm(self._raw.fileno(), self._path, self._wake)
        # Whatever was written between our last read and the arming woke nobody.
        if self._behind():
            return True
        try:
            async with asyncio.timeout(delay_s):
                await self._wake.wait()
        except TimeoutError:
            return False
        return True

    async def _finish(self) -> None:
        if self._filter is not None and self._filtered is not None:
            rest = self._filter.end()
            if rest:
                await self._filtered.write(self._hub, rest)
        framed = self._framer.end()
        if framed is not None:
            await self._show(framed)
