"""Following log files while workers write them.

A :class:`Tailer` follows one file: it reads a block, frames it, hands it to the console, and
sleeps until the kernel says that the file has changed. All tailers of an event loop share one
inotify instance (the kernel grants a user only 128) and a constant number of threads.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Generator
from concurrent.futures import Executor

from asupervise.framing import Framed, LineFramer
from asupervise.growing import GrowingFile, Place
from asupervise.sinks import Sideline, Sink
from asupervise.tracebacks import OpenTraceback, Stage, begun_in
from asupervise.watches import Watches

BLOCK_BYTES = 256 * 1024
# Some lines, which with their prefixes mostly are no more than a pipe takes as one (PIPE_BUF).
_LINES_BYTES = 2 * 1024
# One that is far behind goes on for so long before it lets another have the console.
_STREAM_S = 0.05

# An unfinished line (a prompt) is shown after this much silence.
IDLE_S = 0.5
# For the next line of a traceback others wait so long at the most, and so long in all: Python has
# to find the source, on a slow disk perhaps. Whether another one follows that goes with it shows
# soon.
NEXT_LINE_S = 0.2
_NEXT_TRACEBACK_S = 0.02
_TRACEBACK_S = 1.0
# A progress bar is shown again after this long at the earliest: each time is a line of its own.
PROGRESS_S = 5.0


class Tailer:
    """Follows one log file from its beginning until :meth:`stop`, then to its end.

    A truncated file is read from its start again. One that was moved away or deleted is
    followed all the same, because the worker goes on writing to it; for a new one in its place
    `on_replaced` is called.

    A tailer whose file nobody writes to costs no task and no thread; one that :meth:`stop` ends
    before :meth:`follow` has been called does its work all the same.

    Args:
        path: the file; it exists.
        framer: cuts its bytes into lines for `console`.
        console: where the lines go: a `Console`, as a rule.
        watches: tell of changes.
        threads: where blocking reads run.
        start: called once, at the first change: to run :meth:`run` in a task.
        on_replaced: called when another file has taken the place of this one.
        sideline: gets all that is read, too.
        prompts: whether somebody may be waiting for its prompts: they are shown sooner.
        fd: the file, where it is open already; from now on it is the tailer's to close.

    Raises:
        OSError: if the file cannot be opened.
    """

    # Thousands of workers have two each, most of them silent.
    __slots__ = (
        "_console",
        "_framer",
        "_idle_s",
        "_log",
        "_on_replaced",
        "_progress_since",
        "_ready",
        "_sideline",
        "_start",
        "_started",
        "_stopping",
        "_threads",
        "_wake",
        "_watches",
        "path",
    )

    def __init__(
        self,
        path: str,
        framer: LineFramer,
        console: Sink,
        watches: Watches,
        threads: Executor,
        *,
        start: Callable[[Tailer], object],
        on_replaced: Callable[[Tailer], bool],
        sideline: Sideline | None = None,
        prompts: bool = False,
        fd: int | None = None,
    ) -> None:
        self.path = path
        self._framer = framer
        self._console = console
        self._watches = watches
        self._threads = threads
        self._start = start
        self._on_replaced: Callable[[Tailer], bool] | None = on_replaced
        self._sideline = sideline
        self._idle_s = IDLE_S / 5 if prompts else IDLE_S
        self._log = GrowingFile(path, threads, fd)
        # Read and framed, and not on the console yet.
        self._ready: Framed | None = None
        self._started = self._stopping = False
        self._wake: asyncio.Future[bool] | None = None
        self._progress_since: float | None = None

    @property
    def fd(self) -> int:
        """The open file; negative once it has been closed."""
        return self._log.fd

    @property
    def position(self) -> int:
        """How much has been read of it."""
        return self._log.position

    # --- being woken ------------------------------------------------------------------------

    def follow(self) -> None:
        """Begin: `start` will be called as soon as there is something to do."""
        if not self._nothing_to_do():
            self._run_soon()

    def changed(self, *, only_written: bool = False) -> bool:
        """The file has changed, or something has appeared in its folder."""
        if self._started and self._wake is None:
            # It is busy, and looks for itself before it sleeps.
            return False
        if only_written and self._shown_at_once():
            return True
        if self._wake is not None:
            _set(self._wake, True)
        elif self._ready is not None:
            self._run_soon()
        else:
            self.follow()
        return True

    def _shown_at_once(self) -> bool:
        """Show some whole lines here and now, if neither file nor console makes us wait.

        Two turns of the event loop less, and half of what else a line costs.
        """
        if self._stopping or self._sideline is not None or self._framer.unfinished:
            return False
        if not self._console.takes_lines:
            return False
        # Whoever gets less than he asks for has it all. How much there is is not asked before: each
        # call of the kernel's is a twentieth of what a line takes from here to the console.
        data = self._log.read_at_once(_LINES_BYTES + 1)
        if len(data) > _LINES_BYTES or not data.endswith(b"\n") or begun_in(data) is not None:
            return False
        self._log.position += len(data)
        self._progress_since = None
        framed = self._framer.feed(data)
        if framed is not None and not self._console.write_lines(self, framed):
            self._ready = framed
        return self._ready is None

    def stop(self) -> None:
        """Let :meth:`run` return once it has read to the end of what is there now."""
        if self._stopping:
            return
        self._stopping = True
        ours = self._log.end_here()
        if self._started:
            self.changed()
        elif self._log.unread(ours):
            self._run_soon()
        else:
            self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self.fd >= 0:
            self._watches.forget(self)
            self._log.close()

    def _run_soon(self) -> None:
        self._started = True
        self._start(self)

    def _nothing_to_do(self) -> bool:
        """Ask to be woken, unless there is something to do already."""
        self._watches.arm(self)
        # Only now: whatever happened between the last look and the arming woke nobody.
        ours = os.fstat(self.fd)
        if self._on_replaced is not None:
            self._look_for_successor(ours)
        return not self._log.unread(ours) and self._ready is None

    def _look_for_successor(self, ours: os.stat_result) -> None:
        there = self._log.place(ours)
        if there is Place.EMPTY:
            self._watches.arm_folder(self)
            there = self._log.place(ours)
        if there is Place.TAKEN and self._on_replaced is not None and self._on_replaced(self):
            self._on_replaced = None

    # --- the task ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Follow the file. Returns after :meth:`stop`, when all is written."""
        try:
            while self._console.broken is None or self._sideline is not None:
                stopping = self._stopping
                await self._catch_up()
                if stopping:
                    break
                await self._wait_for_more()
            await self._end_line(self.fd)
        finally:
            self.close()

    async def _catch_up(self) -> None:
        """Read to the end of the file."""
        if self._ready is not None:
            framed, self._ready = self._ready, None
            await self._show(framed)
        while unread := self._log.unread():
            if unread < 0:
                # Truncated. What was written before it does not go on after it.
                await self._end_line(None)
                self._log.position = 0
                continue
            if unread > BLOCK_BYTES and self._console.takes_streams:
                await self._stream()
            else:
                async with self._console.blocks:
                    await self._take(await self._read(unread))
            if not self._log.unread():
                return
            # A worker that writes little and often must not keep the loop to itself.
            await asyncio.sleep(0)

    async def _stream(self) -> None:
        """Read, frame and write block after block in one thread: we are far behind."""
        failures: list[OSError] = []
        last: list[bytes] = []
        async with self._console.turn:
            await self._console.write_all(self, self._framings(failures, last))
            if last and not failures:
                await self._show_what_belongs_to(last[0])
        self._progress_since = None
        if failures:
            raise failures[0]

    def _framings(
        self, failures: list[OSError], last: list[bytes]
    ) -> Generator[Framed, None, None]:
        """What is to be shown of the next blocks; runs in a thread, while our task waits.

        Ends after some time, so that the other ranks have their turn at a slow console.
        """
        due = time.monotonic() + _STREAM_S
        try:
            # Ours is closed if we are cancelled, and its number then given to another file.
            with open(os.dup(self.fd), "rb", buffering=0) as file:
                fd = file.fileno()
                while (unread := self._log.unread(fd=fd)) > 0 and time.monotonic() < due:
                    data = os.pread(fd, min(unread, BLOCK_BYTES), self._log.position)
                    self._log.position += len(data)
                    last[:] = [data]
                    if self._sideline is not None and (work := self._sideline.feed(data, fd)):
                        work()
                    if (framed := self._framer.feed(data)) is not None:
                        yield framed
        except OSError as exc:
            # Not the console's, to which this iterator is given.
            failures.append(exc)

    async def _read(self, unread: int) -> bytes:
        return await self._log.read(min(unread, BLOCK_BYTES))

    async def _take(self, data: bytes) -> None:
        await self._feed_sideline(data)
        framed = self._framer.feed(data)
        if framed is not None:
            self._progress_since = None
            await self._show(framed, data)

    async def _feed_sideline(self, data: bytes) -> None:
        if self._sideline is not None and (work := self._sideline.feed(data, self.fd)):
            await self._in_thread(work)

    async def _in_thread(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _show(self, framed: Framed, data: bytes = b"") -> None:
        async with self._console.turn:
            await self._console.write(self, framed)
            await self._show_what_belongs_to(data)

    async def _show_what_belongs_to(self, data: bytes) -> None:
        """Keep the turn for what is to stand in one piece with what has just been shown."""
        if self._framer.in_long_line:
            await self._show_long_line()
        elif self._console.keeps_together and (begun := begun_in(data)) is not None:
            await self._show_traceback(begun)

    async def _show_traceback(self, begun: OpenTraceback) -> None:
        """Nobody may write between the lines of a traceback, as long as they come soon."""
        loop = asyncio.get_running_loop()
        due = loop.time() + _TRACEBACK_S
        while begun.stage is not Stage.OVER and loop.time() < due:
            patience = NEXT_LINE_S if begun.stage is Stage.INSIDE else _NEXT_TRACEBACK_S
            data = await self._read_within(min(patience, due - loop.time()))
            if not data:
                return
            begun.feed(data)
            await self._feed_sideline(data)
            if (framed := self._framer.feed(data)) is not None:
                await self._console.write(self, framed)

    async def _show_long_line(self) -> None:
        """A line too long to be held goes out in pieces.

        Nobody may write between them, as long as they keep coming at some speed: one that drips
        must not keep the console from the other ranks.
        """
        loop = asyncio.get_running_loop()
        due, size = loop.time() + self._idle_s, 0
        while self._framer.in_long_line:
            data = await self._read_within(due - loop.time())
            if not data:
                return
            size += len(data)
            if size >= BLOCK_BYTES:
                due, size = loop.time() + self._idle_s, 0
            await self._feed_sideline(data)
            if (framed := self._framer.feed(data)) is not None:
                await self._console.write(self, framed)

    async def _read_within(self, delay_s: float) -> bytes:
        """The next block; nothing if there is none in time, or no more at all."""
        while (unread := self._log.unread()) <= 0:
            if unread < 0 or self._stopping or not await self._woken_within(delay_s):
                return b""
        return await self._read(unread)

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
        due = max(0.0, self._progress_since + PROGRESS_S - now)
        # The first silence shows a progress bar that has stopped; one that keeps moving, or has
        # been shown before, comes out every `PROGRESS_S`.
        return due if self._framer.partly_shown else min(self._idle_s, due)

    async def _woken_within(self, delay_s: float | None) -> bool:
        """Wait for something to read, or for :meth:`stop`; False if neither came in time."""
        loop = asyncio.get_running_loop()
        due = None if delay_s is None else loop.time() + delay_s
        # Not every waking is about something to read: attributes change, too, and polling wakes
        # at any rate.
        while not self._stopping and self._nothing_to_do():
            wake: asyncio.Future[bool] = loop.create_future()
            self._wake = wake
            timer = None if due is None else loop.call_at(due, _set, wake, False)
            try:
                if not await wake:
                    return False
            finally:
                self._wake = None
                if timer is not None:
                    timer.cancel()
        return True

    async def _end_line(self, fd: int | None) -> None:
        if self._sideline is not None and (work := self._sideline.end(fd)):
            await self._in_thread(work)
        framed = self._framer.end()
        if framed is not None:
            await self._show(framed)


def follow_successor(tailer: Tailer, make: Callable[[], Tailer], *, is_successor: bool) -> bool:
    """Follow the new file in the place of another; False if there is none after all.

    Args:
        tailer: of the file that was there before.
        make: makes the new one's.
        is_successor: whether that file had taken the place of another, too.
    """
    try:
        successor = make()
    except OSError:
        return False
    successor.follow()
    # The worker's own descriptor stays with its first file for good. Of those that somebody has
    # put there since, only the newest is written to.
    if is_successor:
        asyncio.get_running_loop().call_soon(tailer.stop)
    return True


def _set(future: asyncio.Future[bool], value: bool) -> None:
    if not future.done():
        future.set_result(value)
