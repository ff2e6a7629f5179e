"""Following a run's logs while it goes on: woken by what is written, until the run has ended."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from asupervise import events as ev
from asupervise.views.files import LogFile, log_files, open_regular, pread
from asupervise.views.lives import lives_of
from asupervise.views.loglines import Choice, Line, chosen
from asupervise.views.plain import decoded, overwritten
from asupervise.views.rundir import EVENTS_FILE, folders_of, is_alive, with_folders
from asupervise.views.story import Run
from asupervise.watches import Watches

__all__ = ["Follower", "whole_end"]

_BLOCK_BYTES: Final = 256 << 10
_LONG_LINE_BYTES: Final = 64 << 10
# Of the events that were there before, what may tell of workers that still run.
_EVENTS_BYTES: Final = 16 << 20
# So long after the last worker has gone somebody must have said what follows.
_SILENCE_S: Final = 5.0

Show = Callable[[Sequence[Line]], None]


def whole_end(file: LogFile) -> int:
    """Where the last whole line of a file ends: what follows is still being written."""
    try:
        fd = open_regular(file.path)
    except OSError:
        return 0
    try:
        start = max(0, file.size - _LONG_LINE_BYTES)
        end = pread(fd, file.size - start, start).rfind(b"\n") + 1
    finally:
        os.close(fd)
    return start + end if end or not start else file.size


class _Watched:
    """A file or a folder that somebody waits for; see `watches.Watched`.

    Attributes:
        path: of the file; of a folder, of any that might be in it.
        fd: the open file; -1 for a folder.
        stirred: whether it has changed since it was looked at.
    """

    def __init__(self, path: str, fd: int, wake: Callable[[], None]) -> None:
        self.path = path
        self.fd = fd
        self.stirred = True
        self._wake = wake

    def changed(self, *, only_written: bool = False) -> bool:
        self.stirred = True
        self._wake()
        return True

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


class _Growing(_Watched):
    """A file that is read as it grows.

    Raises:
        OSError: if it cannot be opened.
    """

    def __init__(self, path: str, position: int, wake: Callable[[], None]) -> None:
        super().__init__(path, open_regular(path), wake)
        self._position = position
        self._held = b""

    def read(self, *, to_the_end: bool = False) -> Iterator[list[bytes]]:
        """The whole lines that have come; with the last one, if nothing more will."""
        self.stirred = False
        if os.fstat(self.fd).st_size < self._position:
            # Emptied by who writes it: it begins anew.
            self._position, self._held = 0, b""
        while data := pread(self.fd, _BLOCK_BYTES, self._position):
            self._position += len(data)
            *lines, self._held = (self._held + data).split(b"\n")
            if len(self._held) > _LONG_LINE_BYTES:
                lines.append(self._held)
                self._held = b""
            yield lines
        if to_the_end and self._held:
            held, self._held = self._held, b""
            yield [held]


class _Progress:
    """How far the run is, by its events: pure."""

    def __init__(self) -> None:
        self.ended = False
        self.alive: set[int] = set()
        self.new: list[ev.WorkerStarted] = []
        self._rounds = self._runs = False
        self._group: list[ev.Event] = []
        self._due_s = 0.0

    def take(self, event: ev.Event) -> None:
        if isinstance(event, ev.GroupStarting):
            self._group = [event]
        elif isinstance(event, ev.WorkerStarted):
            self.new.append(event)
            self.alive.add(event.pid)
            self._runs = True
        elif isinstance(event, ev.WorkerExited):
            self.alive.discard(event.pid)
        elif isinstance(event, ev.Restarting):
            self._due_s = event.time + event.delay_s
        elif isinstance(event, ev.RoundCompleted):
            # There may be another group after each.
            self._rounds = True
        elif isinstance(event, ev.RunEnded):
            self.ended = True
        elif isinstance(event, ev.GroupEnded):
            self.ended = self.ended or not self._rounds
            self._runs = False

    def files(self, run_dir: str) -> Iterator[LogFile]:
        """Of those that have been started since that was asked last."""
        new, self.new = self.new, []
        yield from log_files(Run(lives=lives_of([*self._group, *new], 0), run_dir=run_dir))

    def patience_s(self, now: float) -> float | None:
        """How long its supervisor may be silent; None for ever: as long as there are workers.

        And between two groups, where it may wait for other nodes.
        """
        if self.alive or not self._runs:
            return None
        return _SILENCE_S + max(0.0, self._due_s - now)


class Follower:
    """Follows the logs of one run.

    Args:
        run_dir: its folder.
        choice: which logs.
        starts: by path, how much of each has been shown already.
        show: gets the lines that come.
    """

    def __init__(self, run_dir: str, choice: Choice, starts: dict[str, int], show: Show) -> None:
        self._run_dir = run_dir
        self._choice = choice
        self._starts = starts
        self._show = show
        self._wake = asyncio.Event()
        self._watches = Watches(asyncio.get_running_loop())
        self._progress = _Progress()
        self._events: _Growing | None = None
        self._folders: dict[str, _Watched] = {}
        self._logs: dict[str, tuple[LogFile, _Growing]] = {}
        self._pidfds: dict[int, int] = {}

    async def run(self) -> bool:
        """Show what comes, until the run has ended.

        Returns:
            Whether its supervisor has said so; False where it has gone without a word.
        """
        threads = ThreadPoolExecutor(1)
        try:
            await self._watches.prepare()
            while not (ended := self._look()) and await self._woken():
                pass
            for file, log in self._logs.values():
                self._show_new(file, log, to_the_end=True)
            return ended
        finally:
            self._close()
            await self._watches.close(threads)
            threads.shutdown()

    def _close(self) -> None:
        for pid in list(self._pidfds):
            self._gone(pid)
        logs = (log for _, log in self._logs.values())
        for watched in (*self._folders.values(), *logs, *filter(None, [self._events])):
            self._watches.forget(watched)
            watched.close()

    async def _woken(self) -> bool:
        """Wait until something has changed; False if nobody is left to change anything."""
        try:
            async with asyncio.timeout(self._progress.patience_s(time.time())):
                await self._wake.wait()
        except TimeoutError:
            return False
        return True

    def _look(self) -> bool:
        """Show what is new; returns whether the run has ended."""
        self._wake.clear()
        if not os.path.isdir(self._run_dir):
            return True  # a temporary one, after success
        if self._events is None:
            self._look_for_events()
        if self._events is not None:
            self._read_events(self._events)
        for file, log in list(self._logs.values()):
            # With a timer in place of inotify each wait is asked for anew.
            self._watches.arm(log)
            if log.stirred:
                self._show_new(file, log)
        return self._progress.ended

    def _show_new(self, file: LogFile, log: _Growing, *, to_the_end: bool = False) -> None:
        for block in log.read(to_the_end=to_the_end):
            at = time.time()
            self._show([Line(file, overwritten(decoded(raw)), at, at) for raw in block])

    def _open(self, files: Iterable[LogFile]) -> None:
        for file in chosen(files, self._choice):
            if file.path in self._logs:
                continue
            try:
                log = _Growing(file.path, self._starts.get(file.path, 0), self._wake.set)
            except OSError:
                continue  # the worker has put something else in its place
            self._watches.arm(log)
            self._logs[file.path] = file, log

    # --- what happens -----------------------------------------------------------------------

    def _look_for_events(self) -> None:
        """Where events are told, they tell of files; else the folders do (torchrun's)."""
        path = os.path.join(self._run_dir, EVENTS_FILE)
        self._watch_folder(self._run_dir)
        try:
            start = max(0, os.stat(path).st_size - _EVENTS_BYTES)
            self._events = _Growing(path, start, self._wake.set)
        except OSError:
            self._look_at_folders()
            return
        for folder in self._folders.values():
            self._watches.forget(folder)
        self._folders.clear()

    def _look_at_folders(self) -> None:
        for path in folders_of(self._run_dir):
            self._watch_folder(path)
        run = Run(run_dir=self._run_dir)
        self._open(log_files(run._replace(lives=tuple(with_folders(run, self._run_dir)))))

    def _watch_folder(self, path: str) -> None:
        if path not in self._folders:
            self._folders[path] = _Watched(os.path.join(path, "."), -1, self._wake.set)
        self._watches.arm_folder(self._folders[path])

    def _read_events(self, file: _Growing) -> None:
        self._watches.arm(file)
        for lines in file.read():
            for line in lines:
                if (event := _parsed(line)) is not None:
                    self._progress.take(event)
        for started in self._progress.new:
            self._notice(started)
        self._open(self._progress.files(self._run_dir))

    def _notice(self, started: ev.WorkerStarted) -> None:
        """Be woken when the process is gone: whoever would tell of it may be gone, too."""
        pid = started.pid
        if started.node != os.uname().nodename or pid in self._pidfds:
            return
        if not is_alive(started):
            self._progress.alive.discard(pid)
            return
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            return  # the kernel has no such thing, or it has just ended: an event will tell
        self._pidfds[pid] = fd
        asyncio.get_running_loop().add_reader(fd, self._gone, pid)

    def _gone(self, pid: int) -> None:
        fd = self._pidfds.pop(pid)
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)
        self._progress.alive.discard(pid)
        self._wake.set()


def _parsed(line: bytes) -> ev.Event | None:
    try:
        return ev.from_dict(json.loads(line.decode()))
    except (ValueError, RecursionError):
        return None
