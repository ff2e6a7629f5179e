"""The queue, and what runs: `JobService`. No web.

    async with JobService(at_once=4) as service:
        job = service.submit(JobSpec(command=("./train",), ranks=2))
        ...
        service.cancel(job.id)

Whatever is wrong with one job, and with its start, is the end of that job alone. Leaving the block
ends all of them, and no process is left.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
import tempfile
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from asupervise import (
    DefaultLogsSpecs,
    PContext,
    RunProcsResult,
    Std,
    rank_environments,
    start_processes,
)

from .jobs import Job, JobSpec, State
from .output import Bell

GRACE_S: Final = 5.0
# How long the lines of a job that was cancelled are still read after its end.
DRAIN_S: Final = 1.0


class Refused(Exception):
    """No job is accepted now: the queue is full, or the service is ending."""


class JobService:
    """Runs jobs in the order of their submission, at most `at_once` at a time.

    Args:
        at_once: how many jobs run at a time.
        max_queued: how many may wait; more are refused.
        keep_ended: how many that have ended are remembered, with their output and files.
        grace_s: seconds between SIGTERM and SIGKILL for a job that is cancelled.

    Attributes:
        bell: rings whenever the list of jobs has changed.
        closing: whether the service is ending.
    """

    def __init__(
        self,
        *,
        at_once: int = 4,
        max_queued: int = 1_000,
        keep_ended: int = 100,
        grace_s: float = GRACE_S,
    ) -> None:
        self.at_once, self.max_queued = at_once, max_queued
        self.keep_ended, self.grace_s = keep_ended, grace_s
        self.bell = Bell()
        self.closing = False
        self._jobs: dict[str, Job] = {}
        self._numbers = 0
        self._runners: list[asyncio.Task[None]] = []
        self._folder = Path()
        self._forgotten: list[str] = []

    async def __aenter__(self) -> Self:
        self._folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="job_service_"))
        self._runners = [asyncio.create_task(self._take_jobs()) for _ in range(self.at_once)]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self.close()
        finally:
            # Being cancelled while closing: leaving each `async with start_processes` ends its
            # processes all the same.
            for runner in self._runners:
                runner.cancel()
            await asyncio.gather(*self._runners, return_exceptions=True)
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    # --- what the web calls -----------------------------------------------------------------

    @property
    def jobs(self) -> list[Job]:
        """All that are remembered, in the order of their submission."""
        return list(self._jobs.values())

    def get(self, id: str) -> Job | None:
        return self._jobs.get(id)

    def count(self, state: State) -> int:
        return sum(job.state is state for job in self._jobs.values())

    def submit(self, spec: JobSpec) -> Job:
        """Put a job at the end of the queue.

        Raises:
            Refused: if the queue is full or the service is ending.
        """
        if self.closing:
            raise Refused("the service is ending")
        if self.count(State.QUEUED) >= self.max_queued:
            raise Refused(f"{self.max_queued} jobs are waiting already")
        self._numbers += 1
        # Not the number alone: a page that was open while the service was started anew would
        # show another job.
        job = Job(self._numbers, f"{self._numbers}-{secrets.token_hex(4)}", spec)
        self._jobs[job.id] = job
        self.bell.ring()
        return job

    def cancel(self, id: str) -> Job:
        """Ask a job to end; one that runs ends within the grace time. May be called again.

        Raises:
            KeyError: for a job that is not known (any more).
        """
        job = self._jobs[id]
        job.stop_asked.set()
        if job.state is State.QUEUED:
            job.end(State.CANCELLED)
            self._forget_the_oldest()
        job.changed()
        self.bell.ring()
        return job

    async def close(self) -> None:
        """Accept nothing more and end all jobs; returns when they have ended."""
        self.closing = True
        for job in self.jobs:
            if not job.ended:
                self.cancel(job.id)
        self.bell.ring()
        if self._runners:
            await asyncio.wait(self._runners)

    # --- what runs --------------------------------------------------------------------------

    async def _take_jobs(self) -> None:
        while True:
            # The jobs are the queue: one that has been cancelled waits for nothing.
            job = next((job for job in self._jobs.values() if job.state is State.QUEUED), None)
            if job is not None:
                await self._run(job)
                self._forget_the_oldest()
                self.bell.ring()
                await self._remove_files()
            elif self.closing:
                return
            else:
                await self.bell.wait()

    async def _run(self, job: Job) -> None:
        job.begin()
        self.bell.ring()
        try:
            result = await self._run_group(job)
        except asyncio.CancelledError:
            job.end(State.CANCELLED, "the service was ended")
            raise
        except Exception as exc:
            # A program that is missing, a folder that is full, a mistake of ours: the job has
            # failed, says why, and the next one has its turn.
            job.end(State.FAILED, _described(exc))
        else:
            job.end(_state_after(job, result))

    async def _run_group(self, job: Job) -> RunProcsResult:
        spec = job.spec
        starting = start_processes(
            f"job {job.number}",
            spec.argv,
            args={rank: () for rank in range(spec.ranks)},
            envs=_environments(job),
            # To files, which workers write themselves: nothing that we or a browser do with the
            # lines can slow a worker down.
            logs_specs=DefaultLogsSpecs(self._folder_of(job), redirects=Std.ALL),
            hang_timeout=spec.hang_timeout_s,
            shutdown_timeout=self.grace_s,
        )
        async with starting as ctx, asyncio.TaskGroup() as tasks:
            copier = tasks.create_task(_copy_lines(job, ctx))
            tasks.create_task(_copy_events(job, ctx))
            stopper = tasks.create_task(self._stop_when_asked(job, ctx, copier))
            result = await ctx.wait()
            await asyncio.wait({copier})
            stopper.cancel()
        if ctx.log_dir:
            job.keep_files(Path(ctx.log_dir))
        return result

    async def _stop_when_asked(self, job: Job, ctx: PContext, copier: asyncio.Task[None]) -> None:
        await job.stop_asked.wait()
        await ctx.close(timeout=self.grace_s)
        # A job may have written in a second what takes a minute to read.
        await asyncio.wait({copier}, timeout=DRAIN_S)
        if not copier.done():
            copier.cancel()
            job.add_note("its last lines are in its files only")

    def _forget_the_oldest(self) -> None:
        ended = [job for job in self._jobs.values() if job.ended_at is not None]
        ended.sort(key=lambda job: job.ended_at or 0.0)
        for job in ended[: max(0, len(ended) - self.keep_ended)]:
            del self._jobs[job.id]
            self._forgotten.append(self._folder_of(job))

    async def _remove_files(self) -> None:
        while self._forgotten:
            await asyncio.to_thread(shutil.rmtree, self._forgotten.pop(), ignore_errors=True)

    def _folder_of(self, job: Job) -> str:
        return str(self._folder / job.id)


async def _copy_lines(job: Job, ctx: PContext) -> None:
    async for line in ctx.lines():
        job.take_line(line.rank, line.stream, line.time, line.text)


async def _copy_events(job: Job, ctx: PContext) -> None:
    async for event in ctx.events():
        job.take(event)


def _state_after(job: Job, result: RunProcsResult) -> State:
    if not result.is_failed():
        return State.SUCCEEDED
    # Nobody has failed by itself: they were ended because somebody asked for it.
    if job.stop_asked.is_set() and result.root_cause is None:
        return State.CANCELLED
    return State.FAILED


def _described(exc: BaseException) -> str:
    while isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
        exc = exc.exceptions[0]
    return f"{type(exc).__name__}: {exc}"


def _environments(job: Job) -> dict[int, dict[str, str]]:
    ranks = rank_environments(
        job.spec.ranks, parent_env=os.environ, master_port=_free_port(), run_id=job.id
    )
    # Python holds back what it writes to a file until 8 KiB have come together. Whoever follows
    # a job wants to see its lines when they are written.
    return {rank: env | {"PYTHONUNBUFFERED": "1", **job.spec.env} for rank, env in ranks.items()}


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port: int = listener.getsockname()[1]
        return port
