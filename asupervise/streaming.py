"""The log tailers of one group, owned by an anyio task group."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
from anyio.abc import TaskGroup

from asupervise.framing import LineFilter, Picked
from asupervise.hub import Hub, shared_hub
from asupervise.plan import GroupPlan, WorkerPlan
from asupervise.showing import Showing
from asupervise.tailing import BLOCK_BYTES, Tailer, follow_successor

if TYPE_CHECKING:
    from asupervise.formats import ConsoleFormat
    from asupervise.merging import Lane

# Files are watched so long after the last worker's start: a program takes longer to say something,
# and one that is over by then is not worth a watch.
_SOON_S = 0.01
# And at the latest so long after the first one's: while a thousand are being started, most of
# them have said nothing yet, and each open file makes each further start slower.
_LATEST_S = 1.0
# To watch a file takes 30 us: after so many workers others have their turn of the loop.
_WATCHED_AT_ONCE = 16


class FilteredLog:
    """The one file that the matching lines of all ranks are copied to.

    Attributes:
        broken: why it takes nothing any more, or None.

    Raises:
        OSError: if it cannot be made.
    """

    def __init__(self, path: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        self.path = path
        self.broken: OSError | None = None
        self._fd = os.open(path, flags, 0o600)
        # Not one of asyncio's: it is written to by several threads.
        self._turn = threading.Lock()

    def append(self, prefix: bytes, picked: Picked, source: int | None) -> None:
        """Append the lines; `source` is the file that a long one is copied from. Blocks."""
        with self._turn:
            try:
                if self.broken is None:
                    _append(self._fd, prefix, picked, source)
            except OSError as exc:
                # The disk, not the worker: the console goes on, and the result says what is
                # missing here.
                self.broken = exc

    def close(self) -> None:
        with self._turn:
            os.close(self._fd)
            self.broken = OSError("closed")


def _append(fd: int, prefix: bytes, picked: Picked, source: int | None) -> None:
    if picked.long is not None and source is not None:
        start, end = picked.long
        _write_all(fd, prefix)
        block = b""
        while start < end and (block := os.pread(source, min(BLOCK_BYTES, end - start), start)):
            _write_all(fd, block)
            start += len(block)
        if not block.endswith(b"\n"):
            _write_all(fd, b"\n")
    _write_all(fd, picked.lines)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Sifter:
    """Copies the matching lines of one stream of one worker: a tailer's sideline."""

    def __init__(self, line_filter: LineFilter, log: FilteredLog) -> None:
        self._filter = line_filter
        self._log = log

    def feed(self, data: bytes, fd: int) -> Callable[[], None] | None:
        return self._copying(self._filter.feed(data), fd)

    def end(self, fd: int | None) -> Callable[[], None] | None:
        return self._copying(self._filter.end(), fd)

    def _copying(self, picked: Picked, source: int | None) -> Callable[[], None] | None:
        if picked.lines or picked.long:
            return partial(self._log.append, self._filter.prefix, picked, source)
        return None


class _Stream(NamedTuple):
    """One of the two streams of a group, as far as it is teed."""

    showing: Showing
    needles: tuple[str, ...]
    filtered: FilteredLog | None


class _Source(NamedTuple):
    """What a tailer follows; `succeeds` another file in the same place."""

    stream: _Stream
    worker: WorkerPlan
    succeeds: bool = False
    lane: Lane[Any] | None = None


class LogStreams:
    """Streams the teed files of a group to the console; made by :func:`open_streams`."""

    def __init__(
        self,
        hub: Hub,
        group: TaskGroup,
        stack: AsyncExitStack,
        plan: GroupPlan,
        form: ConsoleFormat | None = None,
    ) -> None:
        self._temporary = plan.logs.temporary
        self._hub = hub
        self._group = group
        self._sources: dict[Tailer, _Source] = {}
        self._loop = asyncio.get_running_loop()
        # Those that are not watched yet, by local rank, and when the last of them was added.
        self._new: dict[int, list[Tailer]] = {}
        self._last_new_s = 0.0
        self._watching: anyio.CancelScope | None = None
        self._warnings: list[str] = []
        self._streams: dict[str, _Stream] = {}
        logs = plan.logs
        for name, needles, path, tees in (
            ("stdout", plan.stdout_filters, logs.filtered_stdout, logs.tee_stdouts),
            ("stderr", plan.stderr_filters, logs.filtered_stderr, logs.tee_stderrs),
        ):
            if not tees:
                continue
            place = getattr(sys, name)
            console = stack.enter_context(hub.consoles.shared(place))
            showing = Showing(console, place, name, plan, form, group.start_soon)
            filtered = None
            if needles and path:
                filtered = FilteredLog(path)
                stack.callback(filtered.close)
            self._streams[name] = _Stream(showing, needles, filtered)

    def follow(self, worker: WorkerPlan) -> None:
        """Start to follow a worker's teed files; they exist, because it has been started.

        Raises:
            OSError: if there are no descriptors left.
        """
        if worker.tee_stdout and worker.stdout:
            self._follow(worker.stdout, _Source(self._streams["stdout"], worker))
        if worker.tee_stderr and worker.stderr:
            self._follow(worker.stderr, _Source(self._streams["stderr"], worker))

    def _follow(self, path: str, source: _Source) -> None:
        try:
            tailer = self._tailer(path, source)
        except OSError as exc:
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                raise
            # A worker that has moved or removed its own file already.
            self._warn(path, exc)
            return
        self._new.setdefault(source.worker.local_rank, []).append(tailer)
        self._last_new_s = self._loop.time()
        if self._watching is None:
            self._watching = anyio.CancelScope()
            self._group.start_soon(self._watch_new, self._watching, self._last_new_s)

    async def _watch_new(self, scope: anyio.CancelScope, first_new_s: float) -> None:
        """Watch the new files, as soon as that is worth it."""
        with scope:
            delay_s = self._until_worth_it(first_new_s)
            while delay_s > 0:
                await asyncio.sleep(delay_s)
                # Those that were started meanwhile put it off.
                delay_s = self._until_worth_it(first_new_s)
            await self._hub.watches.prepare()
            while self._new:
                for rank in list(self._new)[:_WATCHED_AT_ONCE]:
                    for tailer in self._new.pop(rank):
                        self._watch(tailer)
                await asyncio.sleep(0)
            self._watching = None

    def _watch(self, tailer: Tailer) -> None:
        try:
            tailer.follow()
        except OSError as exc:
            self._warn(tailer.path, exc)

    def ended(self, worker: WorkerPlan) -> None:
        """A worker has ended and left nobody behind: its files are only looked at in the end.

        Where they are watched already that goes on: who has left its process group may write.
        """
        self._new.pop(worker.local_rank, None)

    def _until_worth_it(self, first_new_s: float) -> float:
        due = min(self._last_new_s + _SOON_S, first_new_s + _LATEST_S)
        return due - self._loop.time()

    def _tailer(self, path: str, source: _Source) -> Tailer:
        stream, worker = source.stream, source.worker
        sifter = None
        if stream.filtered is not None:
            prefix = worker.prefix.encode("utf-8", "surrogateescape")
            sifter = Sifter(LineFilter(stream.needles, prefix), stream.filtered)
        outlet = stream.showing.outlet(worker, another=source.succeeds)
        try:
            tailer = Tailer(
                path,
                outlet.framer,
                outlet.sink,
                self._hub.watches,
                self._hub.threads,
                start=self._start,
                on_replaced=self._follow_successor,
                sideline=sifter,
                prompts=worker.stdin,
            )
        except OSError:
            if outlet.lane is not None:
                outlet.lane.leave()
            raise
        self._sources[tailer] = source._replace(lane=outlet.lane)
        return tailer

    def _start(self, tailer: Tailer) -> None:
        self._group.start_soon(self._run, tailer)

    def _follow_successor(self, tailer: Tailer) -> bool:
        source = self._sources[tailer]
        return follow_successor(
            tailer,
            lambda: self._tailer(tailer.path, source._replace(succeeds=True)),
            is_successor=source.succeeds,
        )

    async def _run(self, tailer: Tailer) -> None:
        try:
            await tailer.run()
        except OSError as exc:
            # The disk, not the worker: the group goes on, and the result says what is missing.
            self._warn(tailer.path, exc)
        finally:
            lane = self._sources.pop(tailer).lane
        if lane is not None:
            await lane.finish()

    def _warn(self, path: str, exc: OSError) -> None:
        self._warnings.append(f"{path}: no longer shown: {exc}")

    def stop(self) -> None:
        """Let every tailer end once it has shown all that is in its file now."""
        if self._watching is not None:
            self._watching.cancel()
        if self._hub.users == 1:
            # Whoever has been told to stop waits for nothing more.
            self._hub.watches.release(self._hub.threads)
        for tailer in list(self._sources):
            tailer.stop()
            if tailer.fd < 0 and (lane := self._sources.pop(tailer).lane) is not None:
                lane.leave()

    def close(self) -> None:
        """Let go of all files."""
        # A task that is cancelled before its first step does not do it.
        for tailer in self._sources:
            tailer.close()

    def warnings(self) -> list[str]:
        """What could not be shown, a sentence each."""
        kept = "; the log files are complete"
        if self._temporary:
            kept = f"{kept}, and stay after a failure; in a log_dir they stay in any case"
        broken = [
            f"{name}: takes nothing any more ({broken}){kept}"
            for name, stream in self._streams.items()
            if (broken := stream.showing.console.broken) is not None
        ]
        filtered = [
            f"{log.path}: incomplete: {log.broken}"
            for stream in self._streams.values()
            if (log := stream.filtered) is not None and log.broken is not None
        ]
        return [*broken, *filtered, *self._warnings]


@asynccontextmanager
async def open_streams(
    plan: GroupPlan, warnings: list[str], form: ConsoleFormat | None = None
) -> AsyncIterator[LogStreams]:
    """Everything that is needed to stream a group's logs, for as long as the group lives.

    Leaving the context waits until every tailer has shown all that there was.
    """
    failure: BaseException | None = None
    async with AsyncExitStack() as stack:
        hub = await stack.enter_async_context(shared_hub())
        async with anyio.create_task_group() as group:
            streams = LogStreams(hub, group, stack, plan, form)
            stack.callback(streams.close)
            try:
                yield streams
            except BaseException as exc:
                # Kept out of the task group, which would wrap it and cancel the tailers before
                # they have shown the last lines.
                failure = exc
            streams.stop()
        warnings += streams.warnings()
    if failure is not None:
        raise failure
