"""Log lines as a stream: ``async for line in ctx.lines()``.

Each consumer follows the files by itself, with descriptors of its own: it may be slower than the
workers, and than the group. The files are the buffer: no worker waits, and memory stays bounded.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import AsyncGenerator, Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from asupervise.framing import Framed
from asupervise.hub import Hub, shared_hub
from asupervise.logs import Std
from asupervise.plan import GroupPlan, WorkerPlan
from asupervise.sinks import Sink
from asupervise.tailing import Tailer, follow_successor
from asupervise.whole_lines import WholeLineFramer

__all__ = ["LineFeed", "LineReader", "LogLine", "Source", "sources_of"]

# Blocks that were read and that nobody has taken yet: enough to read one while another is used.
_BLOCKS_AHEAD = 4
# To watch a file takes 30 us, and so do some dozen lines: then others have a turn of the loop.
_WATCHED_AT_ONCE = 16
_LINES_AT_ONCE = 256
_NAMES = {Std.OUT: "stdout", Std.ERR: "stderr", Std.ALL: "output"}


class LogLine(NamedTuple):
    """One line of a worker's output.

    Attributes:
        rank: the worker's global rank (its ``RANK``; the local one where it has none).
        local_rank: its rank on this node.
        stream: ``"stdout"`` or ``"stderr"``.
        time: when it was read, in seconds since the epoch.
        text: the line without its newline. Bytes that are not UTF-8 are shown as escapes
            (``\\xff``). Of a progress bar, which overwrites its line with carriage returns, there
            is what stood there in the end.
        continues: whether more of the line follows in the next one of this file: a line longer
            than 1 MiB comes in pieces.

    Example:
        >>> LogLine(rank=9, local_rank=1, stream="stdout", time=1.5, text="ready").text
        'ready'
    """

    rank: int
    local_rank: int
    stream: str
    time: float
    text: str
    continues: bool = False


class Source(NamedTuple):
    """A file whose lines are wanted.

    Attributes:
        path: where it is.
        rank: the global rank of who writes it.
        local_rank: its local rank.
        stream: ``"stdout"`` or ``"stderr"``.
        succeeds: whether it has taken the place of another file.
    """

    path: str
    rank: int
    local_rank: int
    stream: str
    succeeds: bool = False


def sources_of(plan: GroupPlan, ranks: Iterable[int] | None, streams: Std) -> list[Source]:
    """The files that hold what was asked for.

    Args:
        plan: of the group.
        ranks: local ranks; None for all.
        streams: which streams; of `Std.ALL` those that go to files are taken.

    Raises:
        ValueError: for a rank that does not exist, a stream that does not go to a file, and if no
            stream does.
    """
    known = {worker.local_rank: worker for worker in plan.workers}
    chosen = list(known) if ranks is None else sorted(set(ranks))
    if unknown := [rank for rank in chosen if rank not in known]:
        expected = f"{min(known)}..{max(known)}"
        raise ValueError(f"ranks: no local ranks {unknown}: expected {expected}")
    if streams not in _NAMES:
        raise ValueError(f"streams: {streams!r}: expected Std.OUT, Std.ERR or Std.ALL")
    if not chosen:
        raise ValueError("ranks: no local rank is given")
    found = {rank: _sources(known[rank], streams) for rank in chosen}
    without = [rank for rank in chosen if not found[rank]]
    if len(without) == len(chosen) or (without and (ranks is not None or streams != Std.ALL)):
        raise ValueError(
            f"streams: the {_NAMES[streams]} of local ranks {without} does not go to a file: "
            "expected logs_specs that tee or redirect it, as DefaultLogsSpecs(tee=Std.ALL)"
        )
    return [source for rank in chosen for source in found[rank]]


def _sources(worker: WorkerPlan, streams: Std) -> list[Source]:
    paths = {Std.OUT: worker.stdout, Std.ERR: worker.stderr}
    return [
        Source(path, worker.rank, worker.local_rank, _NAMES[stream])
        for stream, path in paths.items()
        if stream & streams and path and path != os.devnull
    ]


class LineReader:
    """Reads the lines of several files, for one consumer.

    Args:
        sources: the files. They are opened here and now, so that nothing is lost if they are
            removed before the first line is asked for.

    Raises:
        OSError: if one cannot be opened.
    """

    def __init__(self, sources: Iterable[Source]) -> None:
        self.turn = asyncio.Lock()
        self.blocks = asyncio.Semaphore(_BLOCKS_AHEAD)
        self._opened: list[tuple[Source, int]] = []
        self._hub: Hub | None = None
        self._outlets: dict[Tailer, _Outlet] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = self._closed = False
        self._failure: OSError | None = None
        # One block of lines that waits to be taken.
        self._block: list[LogLine] | None = None
        self._changed, self._taken = asyncio.Event(), asyncio.Event()
        for source in sources:
            self._opened.append((source, _open(source)))

    def __del__(self) -> None:
        # Nobody has ever asked for a line.
        self._close_opened()

    def _close_opened(self) -> None:
        while self._opened:
            os.close(self._opened.pop()[1])

    def add(self, source: Source) -> None:
        """Read the lines of one more file. If it cannot be opened the lines end with that error."""
        if self._closed:
            return
        try:
            fd = _open(source)
        except OSError as exc:
            self._failure = self._failure or exc
            return
        if self._hub is None:
            self._opened.append((source, fd))
        else:
            self._follow(source, self._hub, fd)

    def stop_worker(self, local_rank: int) -> None:
        """Nobody writes to this worker's files any more: they are read to their end and closed."""
        for tailer, outlet in list(self._outlets.items()):
            if outlet.source.local_rank == local_rank:
                self._stop(tailer)

    async def lines(self, ended: asyncio.Future[Any]) -> AsyncGenerator[LogLine, None]:
        """The lines, until `ended` is done and all that there was is delivered."""
        async with shared_hub() as self._hub:
            ended.add_done_callback(self.stop)
            try:
                await self._begin(self._hub)
                while (block := await self._next_block()) is not None:
                    for number, line in enumerate(block, 1):
                        yield line
                        if not number % _LINES_AT_ONCE:
                            await asyncio.sleep(0)
            finally:
                ended.remove_done_callback(self.stop)
                await self._close()
        if self._failure is not None:
            raise self._failure

    def stop(self, _: object = None) -> None:
        """Let the lines end when all that is in the files now is delivered."""
        self._stopped = True
        # There may be none left whose end would tell.
        self._changed.set()
        for tailer in list(self._outlets):
            self._stop(tailer)

    def _stop(self, tailer: Tailer) -> None:
        tailer.stop()
        if tailer.fd < 0:
            self._finished(tailer)

    async def _begin(self, hub: Hub) -> None:
        await hub.watches.prepare()
        while self._opened:
            for _ in self._opened[:_WATCHED_AT_ONCE]:
                # From here on the descriptor is the tailer's.
                source, fd = self._opened.pop(0)
                self._follow(source, hub, fd)
            await asyncio.sleep(0)

    def _follow(self, source: Source, hub: Hub, fd: int) -> None:
        tailer = self._tailer(source, hub, fd)
        if self._stopped:
            self._stop(tailer)
        else:
            tailer.follow()

    def _tailer(self, source: Source, hub: Hub, fd: int) -> Tailer:
        outlet = _Outlet(self, source)

        def succeeded(tailer: Tailer) -> bool:
            after = source._replace(succeeds=True)
            return follow_successor(
                tailer,
                lambda: self._tailer(after, hub, _open(after)),
                is_successor=source.succeeds,
            )

        tailer = Tailer(
            source.path,
            outlet.framer,
            outlet,
            hub.watches,
            hub.threads,
            start=self._start,
            on_replaced=succeeded,
            fd=fd,
        )
        self._outlets[tailer] = outlet
        return tailer

    def _start(self, tailer: Tailer) -> None:
        task = asyncio.get_running_loop().create_task(
            self._run(tailer), name=f"asupervise lines {tailer.path}"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, tailer: Tailer) -> None:
        try:
            await tailer.run()
        except OSError as exc:
            # What the other files hold is delivered first.
            self._failure = self._failure or exc
        finally:
            self._finished(tailer)

    def _finished(self, tailer: Tailer) -> None:
        self._outlets.pop(tailer, None)
        self._changed.set()

    async def hand_over(self, block: list[LogLine]) -> None:
        """Wait until the consumer has taken it; `turn` must be held."""
        self._block = block
        self._changed.set()
        self._taken.clear()
        await self._taken.wait()

    async def _next_block(self) -> list[LogLine] | None:
        while self._block is None:
            if self._stopped and not self._outlets:
                return None
            self._changed.clear()
            await self._changed.wait()
        block, self._block = self._block, None
        self._taken.set()
        return block

    async def _close(self) -> None:
        self._closed = True
        self._close_opened()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        # One that is cancelled before its first step does not close its file.
        for tailer in list(self._outlets):
            tailer.close()
        self._outlets.clear()
        if tasks:
            await asyncio.wait(tasks)


class _Outlet(Sink):
    """Where the lines of one file go."""

    def __init__(self, reader: LineReader, source: Source) -> None:
        self.turn = reader.turn
        self.blocks = reader.blocks
        self.framer = WholeLineFramer()
        self._reader = reader
        self.source = source

    async def write(self, owner: object, framed: Framed) -> None:
        _, rank, local_rank, stream, _ = self.source
        at = self.framer.read_at
        await self._reader.hand_over(
            [
                LogLine(rank, local_rank, stream, at, text, continues)
                for text, continues in self.framer.texts(framed)
            ]
        )


class LineFeed:
    """The consumers of a service's lines: its files change, as workers are started anew.

    Args:
        plan: of all workers' first start.
    """

    def __init__(self, plan: GroupPlan) -> None:
        self._plan = plan
        # Whose lines each of them wants. Nobody holds a reader but who reads.
        self._readers: WeakKeyDictionary[LineReader, tuple[set[int], Std]] = WeakKeyDictionary()

    def reader(
        self, running: Iterable[GroupPlan], ranks: Iterable[int] | None, streams: Std
    ) -> LineReader:
        """For a new consumer.

        Args:
            running: the plans of the workers that run now, one for each.
            ranks: as in `sources_of`.
            streams: likewise.

        Raises:
            ValueError, OSError: as `sources_of` and `LineReader`.
        """
        chosen = {source.local_rank for source in sources_of(self._plan, ranks, streams)}
        plans = [plan for plan in running if plan.workers[0].local_rank in chosen]
        reader = LineReader(s for plan in plans for s in sources_of(plan, None, streams))
        self._readers[reader] = chosen, streams
        return reader

    def started(self, plan: GroupPlan) -> None:
        """A worker has been started (anew)."""
        for reader, (ranks, streams) in list(self._readers.items()):
            if plan.workers[0].local_rank in ranks:
                for source in sources_of(plan, None, streams):
                    reader.add(source)

    def ended(self, local_rank: int) -> None:
        """Nobody writes any more to the files of this worker's present start."""
        for reader in list(self._readers):
            reader.stop_worker(local_rank)


def _open(source: Source) -> int:
    who = f"{source.stream} of local rank {source.local_rank}"
    try:
        # Not to wait, if somebody has put a pipe there.
        fd = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as exc:
        why = f"{who}: its file is gone (a group's temporary folder is removed after success)"
        raise FileNotFoundError(exc.errno, why, source.path) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, f"{who}: not a regular file", source.path)
    return fd
