"""Being told that files have changed: by inotify(7), or by a timer where there is none.

All files that are followed in one event loop share one inotify instance: the kernel grants a user
only 128.
"""

from __future__ import annotations

import asyncio
import os
import struct
import sys
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from importlib import import_module
from typing import Any, Protocol

# Only where the kernel has no inotify for us (not Linux, or its limits are reached).
POLL_S = 0.05

# Between the end of the watches and that of their instance; see `InotifyWatches.close`.
_SETTLE_S = 0.001

# struct inotify_event without its name: watch, mask, cookie, length of the name.
_EVENT = struct.Struct("iIII")
_EVENTS_BYTES = 64 * 1024


class Watched(Protocol):
    """Who waits for changes of a file.

    Attributes:
        path: where it was opened.
    """

    path: str

    @property
    def fd(self) -> int:
        """The open file."""

    def changed(self, *, only_written: bool = False) -> bool:
        """Called in the event loop when it has; False if nobody waits for more just now.

        Args:
            only_written: it is where it was, and nothing else has happened to it.
        """


class InotifyWatches:
    """Watches on one inotify instance, read in the event loop.

    A watch lasts for as long as each of its events finds somebody waiting. The first that does
    not ends it: a worker that writes without pause causes no events, because its tailer is busy
    reading. One that writes now and then costs one event each time, and no system call else.

    Raises:
        OSError: if the kernel grants no (more) inotify instance.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        from pathlib import Path

        import asyncinotify

        self._inotify = asyncinotify.Inotify()
        self._fd = self._inotify.fd
        # So that reading in a callback of the loop can never wait.
        os.set_blocking(self._fd, False)
        mask = asyncinotify.Mask
        # ATTRIB comes with unlink and rename-over (the link count), MOVE_SELF with rename.
        self._file_mask = mask.MODIFY | mask.ATTRIB | mask.MOVE_SELF
        self._folder_mask = mask.CREATE | mask.MOVED_TO
        self._ended, self._overflow = int(mask.IGNORED), int(mask.Q_OVERFLOW)
        self._written = int(mask.MODIFY)
        self._no_path = Path()
        self._waiting: dict[int, tuple[Watched, ...]] = {}
        self._file_watches: dict[Watched, Any] = {}
        self._folder_watches: dict[Watched, Any] = {}
        self._loop = loop
        loop.add_reader(self._fd, self._dispatch)

    def arm(self, who: Watched) -> None:
        """Call `who.changed()` when its file changes, until that returns False.

        Raises:
            OSError: if the kernel grants no (more) watches.
        """
        if who not in self._file_watches:
            # By its descriptor: a file that was moved or deleted is still written to.
            watch = self._add(f"/proc/self/fd/{who.fd}", self._file_mask, who)
            self._file_watches[who] = watch

    def arm_folder(self, who: Watched) -> None:
        """Likewise when something appears in the folder of its path.

        Raises:
            OSError: likewise, or if there is no such folder any more.
        """
        if who not in self._folder_watches:
            watch = self._add(os.path.dirname(who.path) or ".", self._folder_mask, who)
            self._folder_watches[who] = watch

    def _add(self, path: str, mask: Any, who: Watched) -> Any:
        # One file or folder is one watch, whoever asks.
        watch = self._inotify.add_watch(path, mask)
        # Ours are told apart by their numbers. A thousand workers have two thousand.
        watch.path = self._no_path
        self._waiting[watch.wd] = (*self._waiting.get(watch.wd, ()), who)
        return watch

    def forget(self, who: Watched) -> None:
        for watches in (self._file_watches, self._folder_watches):
            if who in watches:
                self._drop(watches.pop(who), who)

    def _drop(self, watch: Any, who: Watched) -> None:
        waiting = tuple(each for each in self._waiting[watch.wd] if each is not who)
        if waiting:
            self._waiting[watch.wd] = waiting
            return
        del self._waiting[watch.wd]
        self._remove(watch)

    def _remove(self, watch: Any) -> None:
        try:
            self._inotify.rm_watch(watch)
        except OSError:
            # EINVAL: the kernel has ended it, with the file.
            pass

    def _dispatch(self) -> None:
        # Not with the library's reader, which takes ten times as long: a third of the time that
        # a line needs to the console.
        try:
            events = os.read(self._fd, _EVENTS_BYTES)
        except BlockingIOError:
            return
        position = 0
        while position < len(events):
            watch, mask, _, name_bytes = _EVENT.unpack_from(events, position)
            position += _EVENT.size + name_bytes
            if mask & self._overflow:
                # Events were dropped: everybody looks for himself.
                for other in list(self._waiting):
                    self._fired(other, 0)
            if mask & self._ended:
                # What its reader does then, and all that it does: else it would keep them all.
                self._inotify._watches.pop(watch, None)
            self._fired(watch, mask)

    def _fired(self, watch: int, mask: int) -> None:
        for who in self._waiting.get(watch, ()):
            if not who.changed(only_written=mask == self._written) or mask & self._ended:
                self.forget(who)

    def close(self, threads: Executor) -> asyncio.Future[None]:
        """End all watches. In the end in a thread: the kernel may take 15 ms."""
        self._loop.remove_reader(self._fd)
        for watch in self._inotify.watches:
            self._remove(watch)
        return self._loop.run_in_executor(threads, self._close)

    def _close(self) -> None:
        # The kernel waits until nobody can be looking at the watches, and until nobody can be
        # looking at what they were on. The second wait is a slow one if the first is not over
        # (synchronize_srcu): 13 ms if we are quick here, mostly nothing if we are not.
        time.sleep(_SETTLE_S)
        self._inotify.close()


class PollWatches:
    """The fallback without inotify: wakes whoever has asked after `POLL_S` seconds.

    This is the one place that polls. It runs only while somebody has asked.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: set[Watched] = set()
        self._timer: asyncio.TimerHandle | None = None

    def arm(self, who: Watched) -> None:
        self._waiting.add(who)
        if self._timer is None:
            self._timer = self._loop.call_later(POLL_S, self._tick)

    def forget(self, who: Watched) -> None:
        self._waiting.discard(who)

    def _tick(self) -> None:
        self._timer = None
        waiting, self._waiting = self._waiting, set()
        for who in waiting:
            who.changed()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Watches:
    """Inotify's watches, and the fallback for what they do not cover."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._polling = PollWatches(loop)
        self._inotify: InotifyWatches | None = None
        self._has_inotify = sys.platform == "linux"
        self._in_threads: set[asyncio.Future[Any]] = set()

    async def prepare(self) -> None:
        """Load in a thread what the first watch would load in the event loop."""
        # 15 ms: its import runs ldconfig(8), to find the C library (ctypes.util.find_library).
        if self._has_inotify and "asyncinotify" not in sys.modules:
            # In one of its own, which then ends: silent workers cost no thread.
            thread = ThreadPoolExecutor(1, thread_name_prefix="asupervise-import")
            loading = self._loop.run_in_executor(thread, import_module, "asyncinotify")
            thread.shutdown(wait=False)
            self._ends_before_close(loading)
            await asyncio.wait({loading})

    def arm(self, who: Watched) -> None:
        """Call `who.changed()` when its open file changes, until that returns False."""
        try:
            if (inotify := self._opened()) is not None:
                inotify.arm(who)
                return
        except OSError:
            # ENOSPC: fs.inotify.max_user_watches is used up. Or there is no /proc.
            pass
        self._polling.arm(who)

    def arm_folder(self, who: Watched) -> None:
        """Likewise when something appears where it was opened."""
        try:
            if (inotify := self._opened()) is not None:
                inotify.arm_folder(who)
                return
        except FileNotFoundError:
            # The folder itself is gone, with whoever would have made a file there.
            return
        except OSError:
            pass
        self._polling.arm(who)

    def _opened(self) -> InotifyWatches | None:
        # At its first use: a group that is over at once has none.
        if self._inotify is None and self._has_inotify:
            try:
                self._inotify = InotifyWatches(self._loop)
            except OSError:
                # EMFILE: fs.inotify.max_user_instances is used up by other programs.
                self._has_inotify = False
        return self._inotify

    def forget(self, who: Watched) -> None:
        if self._inotify is not None:
            self._inotify.forget(who)
        self._polling.forget(who)

    def release(self, threads: Executor) -> None:
        """Nobody waits for anything any more: begin to close, while others have things to do.

        Whoever asks to be woken after that is, by a new inotify instance.
        """
        self._polling.close()
        if self._inotify is not None:
            self._ends_before_close(self._inotify.close(threads))
            self._inotify = None

    async def close(self, threads: Executor) -> None:
        self.release(threads)
        if self._in_threads:
            # Unlike `gather` it does not cancel them, whatever happens to us.
            await asyncio.wait(self._in_threads)

    def _ends_before_close(self, work: asyncio.Future[Any]) -> None:
        self._in_threads.add(work)
        work.add_done_callback(self._in_threads.discard)
