"""The log tailers of one group, owned by an anyio task group."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import TextIO

import anyio
from anyio.abc import TaskGroup

from asupervise.console import Console
from asupervise.framing import LineFilter, LineFramer
from asupervise.plan import GroupPlan, WorkerPlan
from asupervise.tailing import FilteredLog, Hub, Tailer, shared_hub


class LogStreams:
    """Streams the teed files of a group to the console; made by :func:`open_streams`."""

    def __init__(self, hub: Hub, group: TaskGroup, stack: ExitStack, plan: GroupPlan) -> None:
        self._hub = hub
        self._group = group
        self._tailers: list[Tailer] = []
        self._warnings: list[str] = []
        self.consoles: dict[str, Console] = {}
        self._filters: dict[str, tuple[list[str], FilteredLog | None]] = {}
        for stream, needles, path, tees in (
            ("stdout", plan.stdout_filters, plan.logs.filtered_stdout, plan.logs.tee_stdouts),
            ("stderr", plan.stderr_filters, plan.logs.filtered_stderr, plan.logs.tee_stderrs),
        ):
            if tees:
                output: TextIO = getattr(sys, stream)
                self.consoles[stream] = stack.enter_context(hub.consoles.shared(output))
            filtered = None
            if needles and tees and path:
                filtered = FilteredLog(path)
                stack.callback(filtered.close)
            self._filters[stream] = list(needles), filtered

    def follow(self, worker: WorkerPlan) -> None:
        """Start to follow a worker's teed files; they exist, because it has been started."""
        if worker.tee_stdout and worker.stdout:
            self._follow("stdout", worker.stdout, worker)
        if worker.tee_stderr and worker.stderr:
            self._follow("stderr", worker.stderr, worker)

    def _follow(self, stream: str, path: str, worker: WorkerPlan) -> None:
        prefix = worker.prefix.encode("utf-8", "surrogateescape")
        needles, filtered = self._filters[stream]
        tailer = Tailer(
            self._hub,
            path,
            LineFramer(prefix),
            self.consoles[stream],
            LineFilter(needles, prefix) if filtered is not None else None,
            filtered,
            prompts=worker.stdin,
        )
        self._tailers.append(tailer)
        self._group.start_soon(self._run, tailer, path)

    async def _run(self, tailer: Tailer, path: str) -> None:
        try:
            await tailer.run()
        except OSError as exc:
            # The disk, not the worker: the group goes on, and the result says what is missing.
            self._warnings.append(f"{path}: no longer shown: {exc}")

    def stop(self) -> None:
        """Let every tailer end once it has shown all that is in its file now."""
        for tailer in self._tailers:
            tailer.stop()

    def warnings(self) -> list[str]:
        """What could not be shown, a sentence each."""
        broken = [
            f"{stream}: closed by its reader ({console.broken}); the log files are complete"
            for stream, console in self.consoles.items()
            if console.broken is not None
        ]
        return [*broken, *self._warnings]


@asynccontextmanager
async def open_streams(plan: GroupPlan, warnings: list[str]) -> AsyncIterator[LogStreams]:
    """Everything that is needed to stream a group's logs, for as long as the group lives.

    Leaving the context waits until every tailer has shown all that there was.
    """
    failure: BaseException | None = None
    with ExitStack() as stack:
        hub = stack.enter_context(shared_hub())
        async with anyio.create_task_group() as group:
            streams = LogStreams(hub, group, stack, plan)
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
