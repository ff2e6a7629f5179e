"""`Services`: running workers, each started anew when it ends, while the others go on.

One task owns all of them and a keeper for each worker. A worker is a group of its own
(`LoneWorker`), so that its logs, its guardian, its end and its report are those of any group; its
keeper waits for the group's end, asks `after_end` what follows, and does it.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, overload

from asupervise import files
from asupervise.bus import EventBus, Subscription
from asupervise.elastic.alone import Attempts, LoneWorker
from asupervise.elastic.intensity import Anew, End, Exhausted, Limits, Past, Window, after_end
from asupervise.error_files import join_notes
from asupervise.errors import SupervisorError
from asupervise.failures import NOT_AVAILABLE, ProcessFailure
from asupervise.logs import Std
from asupervise.recording import Recorder
from asupervise.result import RunProcsResult
from asupervise.shielding import check_loop, finished_in_any_case, run_in_any_case
from asupervise.spec import (
    RunOptions,
    check_timeout,
    checked_signal,
)
from asupervise.telling import GroupTeller

if TYPE_CHECKING:
    from asupervise.lines import LineFeed, LogLine
    from asupervise.stacks import Stack

__all__ = ["OnRestart", "Services"]

OnRestart = Callable[[int, int, ProcessFailure | None, float], None]

# Of those of many restarts the last ones: a service runs for months.
_MAX_WARNINGS: Final = 100
# As shells say it (POSIX, XCU 2.8.2).
_NOT_FOUND: Final = 127
_NOT_STARTED: Final = 126


class Services:
    """Running workers, each started anew when it ends; made by :func:`run_services`.

    Attributes:
        name: the service's name.
        nprocs: number of workers.
        log_dir: the run's folder, the same for all starts, or None if it has none.

    Example::

        async with run_services("web", "./serve", {0: ()}, {0: {}}) as services:
            await until_told_to_stop()
        result = await services.wait()
    """

    def __init__(
        self,
        attempts: Attempts,
        options: RunOptions,
        limits: Limits,
        on_restart: OnRestart | None = None,
        *,
        events: EventBus | None = None,
    ) -> None:
        first = attempts.first
        self._bus = EventBus(parent=events)
        self._teller = GroupTeller(self._bus, first)
        self._recorder = Recorder(self._bus)
        self.name = first.name
        self.nprocs = first.nprocs
        self.log_dir: str | None = first.logs.run_dir or None
        self._attempts = attempts
        self._options = options
        self._limits = limits
        self._on_restart = on_restart
        self._workers: dict[int, LoneWorker] = {}
        self._last: dict[int, RunProcsResult] = {}
        self._pasts = {rank: Past() for rank in range(self.nprocs)}
        self._window = Window()
        # Who was not started anew any more because the service ended.
        self._cut_short: set[int] = set()
        self._culprit: tuple[int, ProcessFailure] | None = None
        self._warnings = deque(first.warnings, _MAX_WARNINGS)
        # Made when somebody asks for the first time.
        self._feed: LineFeed | None = None
        self._ending = asyncio.Event()
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._life: asyncio.Task[RunProcsResult] | None = None

    # --- what callers do --------------------------------------------------------------------

    @overload
    async def wait(self, timeout: None = None) -> RunProcsResult: ...

    @overload
    async def wait(self, timeout: float) -> RunProcsResult | None: ...

    async def wait(self, timeout: float | None = None) -> RunProcsResult | None:
        """Wait until the service has ended.

        It has when all workers have ended for good, when one has ended too often, or when it was
        closed. Any number of tasks may wait; cancelling one harms no worker.

        Args:
            timeout: seconds; None waits for ever, 0 only looks.

        Returns:
            The result, of each worker's last start; or None if the time ran out first. A worker
            that waited for its restart when the service ended is listed as ended by us, and is
            never the root cause.

        Raises:
            ValueError: if `timeout` is negative.
        """
        if timeout is not None:
            check_timeout("timeout", timeout)
        life = self._task
        await asyncio.wait({life}, timeout=timeout)
        return life.result() if life.done() else None

    async def close(self, death_sig: int | None = None, timeout: float | None = None) -> None:
        """End all workers, as `PContext.close`; nobody is started anew any more.

        Args:
            death_sig: the first signal; SIGTERM by default.
            timeout: seconds from it to SIGKILL; None for the service's `shutdown_timeout`.

        Raises:
            ValueError: for a signal that does not exist or a negative `timeout`.
        """
        if timeout is None:
            timeout = self._options.shutdown_timeout_s
        check_timeout("timeout", timeout)
        life = self._task
        self._request_end(
            checked_signal(signal.SIGTERM if death_sig is None else death_sig), timeout
        )
        await asyncio.wait({life})

    def pids(self) -> dict[int, int]:
        """Process ids by local rank, of the workers that run now."""
        running = ((rank, worker.pid) for rank, worker in sorted(self._workers.items()))
        return {rank: pid for rank, pid in running if pid is not None}

    def restarts(self) -> dict[int, int]:
        """By local rank, how often each worker has been started anew, or is about to be."""
        return {rank: past.restarts for rank, past in self._pasts.items()}

    def send_signal(self, sig: int, ranks: Iterable[int] | None = None) -> None:
        """Send a signal to the process groups of workers that run; ends nothing by itself.

        Args:
            sig: signal number.
            ranks: local ranks; None for all.

        Raises:
            ValueError: for a signal or a rank that does not exist.
            PermissionError: if the kernel refuses it.
        """
        sig = checked_signal(sig)
        chosen = list(self._pasts if ranks is None else ranks)
        if unknown := sorted(set(chosen) - self._pasts.keys()):
            raise ValueError(f"ranks: no local ranks {unknown}: expected 0..{self.nprocs - 1}")
        for rank in chosen:
            if (worker := self._workers.get(rank)) is not None:
                worker.pass_on(sig)

    def events(self, maxsize: int = 1024) -> Subscription:
        """What happens to all workers, over all their starts; as `PContext.events`."""
        check_loop(f"service {self.name!r}", self._life)
        return self._bus.subscribe(maxsize)

    async def dump_stacks(self) -> dict[int, Stack]:
        """Where each running worker is, by local rank; as `PContext.dump_stacks`."""
        dumps = await asyncio.gather(*(w.dump_stacks() for w in self._workers.values()))
        return {rank: stack for dump in dumps for rank, stack in sorted(dump.items())}

    def lines(
        self, ranks: Iterable[int] | None = None, streams: Std = Std.ALL
    ) -> AsyncGenerator[LogLine, None]:
        """The workers' output, line by line, as `PContext.lines`.

        Of each worker that runs now from the beginning of its present start, and then of all
        starts that follow.

        Args:
            ranks: local ranks; None for all.
            streams: as in `PContext.lines`.

        Raises:
            ValueError, OSError: as `PContext.lines`.
        """
        from asupervise.lines import LineFeed

        if self._feed is None:
            self._feed = LineFeed(self._attempts.first)
        running = [worker.plan for _, worker in sorted(self._workers.items())]
        reader = self._feed.reader(running, ranks, streams)
        return reader.lines(self._task)

    async def __aenter__(self) -> Services:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._request_end(signal.SIGTERM, self._options.shutdown_timeout_s)
        await finished_in_any_case(self._task)

    def __repr__(self) -> str:
        ended = self._life is not None and self._life.done()
        state = "ended" if ended else f"{len(self.pids())} running"
        return f"<Services {self.name!r}: {self.nprocs} workers, {state}>"

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        from asupervise.views.notebook import RUNNING, group_html

        pids = self.pids()
        otherwise = "ended" if self._life is not None and self._life.done() else "not running"
        states = {rank: RUNNING if rank in pids else otherwise for rank in self._pasts}
        return group_html(self.name, states, pids, self.log_dir, self.restarts())

    # --- the service's own task ---------------------------------------------------------------

    @property
    def _task(self) -> asyncio.Task[RunProcsResult]:
        if self._life is None:
            raise RuntimeError(f"service {self.name!r} has not been started")
        check_loop(f"service {self.name!r}", self._life)
        return self._life

    async def _start(self) -> None:
        self._life = asyncio.get_running_loop().create_task(
            self._live(), name=f"asupervise {self.name}"
        )
        try:
            await asyncio.shield(self._started)
        except BaseException:
            # Nobody will ever hold this object: what it has started must not stay.
            self._request_end(signal.SIGTERM, self._options.shutdown_timeout_s)
            await finished_in_any_case(self._life)
            raise

    def _request_end(self, sig: int, grace_s: float) -> None:
        self._ending.set()
        for worker in self._workers.values():
            worker.request_end(sig, grace_s)

    async def _live(self) -> RunProcsResult:
        try:
            return await self._lived()
        finally:
            self._bus.close()

    async def _lived(self) -> RunProcsResult:
        try:
            self._teller.starting(self._options.cwd)
            try:
                await self._run()
            finally:
                # For every way to get here: the end, a worker that did not start, this task
                # being cancelled because the loop is shutting down.
                await run_in_any_case(self._end)
        except asyncio.CancelledError:
            self._started.cancel()
            raise
        except BaseException as exc:
            if self._started.done():
                raise
            self._teller.not_started(exc)
            try:
                # Before anybody hears of it, whose next step may be the end of the loop.
                await files.remove_run_folder(self._attempts.first)
            finally:
                # Whoever waits for the start gets the error; `wait` has nothing to say beyond it.
                self._started.set_exception(exc)
            return RunProcsResult()
        result = await self._result()
        self._teller.ended(result, failures_told=True)
        problem = await self._recorder.finish()
        return replace(result, warnings=(*result.warnings, problem)) if problem else result

    async def _run(self) -> None:
        for rank in self._pasts:
            if self._ending.is_set():
                return
            await self._launch(rank)
        self._started.set_result(None)
        if self._options.report:
            self._recorder.attend(self._attempts.first.logs)
        async with asyncio.TaskGroup() as group:
            for rank in self._pasts:
                group.create_task(self._keep(rank), name=f"asupervise {self.name} {rank}")

    async def _end(self) -> None:
        self._request_end(signal.SIGTERM, self._options.shutdown_timeout_s)
        for worker in list(self._workers.values()):
            await worker.gone()

    # --- one worker's keeper ------------------------------------------------------------------

    async def _keep(self, rank: int) -> None:
        ended: LoneWorker | None = await self._ended(rank)
        while (delay_s := self._followed_by(rank, ended)) is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._ending.wait()
            if self._ending.is_set():
                self._cut_short.add(rank)
                return
            ended = await self._started_anew(rank)

    async def _launch(self, rank: int) -> None:
        worker = self._attempts.worker(rank, self._pasts[rank].restarts, self._bus)
        # Before it is started, so that the end of the service reaches it meanwhile.
        self._workers[rank] = worker
        try:
            await worker.start()
        except BaseException:
            del self._workers[rank]
            raise
        if self._feed is not None:
            self._feed.started(worker.plan)

    async def _ended(self, rank: int) -> LoneWorker:
        worker = self._workers[rank]
        self._last[rank] = await worker.wait()
        del self._workers[rank]
        if self._feed is not None:
            self._feed.ended(rank)
        self._warnings.extend(self._last[rank].warnings)
        return worker

    async def _started_anew(self, rank: int) -> LoneWorker | None:
        """Start it, and wait for its end; None where it could not be started."""
        try:
            await self._launch(rank)
        except (OSError, SupervisorError) as exc:
            # It may be possible again in a moment: descriptors, memory, a program that is being
            # replaced. If not, so many broken starts in a row end the service.
            self._last[rank] = RunProcsResult(failures={rank: _not_started(rank, exc)})
            return None
        return await self._ended(rank)

    def _followed_by(self, rank: int, worker: LoneWorker | None) -> float | None:
        """Seconds until it is to be started anew; None where it is not."""
        if self._ending.is_set():
            if worker is None:
                self._cut_short.add(rank)
            self._tell_failure(rank, worker)
            return None
        failure = self._last[rank].failures.get(rank)
        end = End(failure is not None, worker.uptime_s if worker else 0.0)
        follows = after_end(self._pasts[rank], self._window, end, self._limits, time.monotonic())
        if isinstance(follows, Anew) and worker is not None and worker.survivors:
            follows = Exhausted(
                "it cannot be started anew while something of it is still there: "
                + "; ".join(worker.survivors)
            )
        if isinstance(follows, Exhausted):
            self._culprit = rank, _blamed(failure or _too_soon(rank, worker), follows.why)
            self._request_end(signal.SIGTERM, self._options.shutdown_timeout_s)
        self._tell_failure(rank, worker, root_cause=isinstance(follows, Exhausted))
        if not isinstance(follows, Anew):
            return None
        self._pasts[rank], self._window = follows.past, follows.window
        self._tell(rank, follows, failure)
        return follows.delay_s

    def _tell_failure(
        self, rank: int, worker: LoneWorker | None, *, root_cause: bool = False
    ) -> None:
        failure = self._last[rank].failures.get(rank) if worker is not None else None
        if root_cause and self._culprit is not None:
            failure = self._culprit[1]
        if failure is not None:
            # Which start of it that was, its own plan says.
            teller = self._teller if worker is None else GroupTeller(self._bus, worker.plan)
            teller.failed(failure, root_cause=root_cause)

    def _tell(self, rank: int, follows: Anew, failure: ProcessFailure | None) -> None:
        how = "has ended" if failure is None else f"failed, exit code {failure.exitcode}"
        self._teller.restarting(rank, follows.past.restarts, f"rank {rank} {how}", follows.delay_s)
        if self._on_restart is None:
            return
        try:
            self._on_restart(rank, follows.past.restarts, failure, follows.delay_s)
        except Exception as exc:
            # Nobody waits here for an exception: it goes where the app has those of its event
            # loop go.
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"on_restart of {self!r} has failed", "exception": exc}
            )

    # --- the end ------------------------------------------------------------------------------

    async def _result(self) -> RunProcsResult:
        failures = self._failures()
        only_ended = all(failure.ended_by_us for failure in failures.values())
        removed = only_ended and await files.remove_run_folder(self._attempts.first)
        last = sorted(self._last.items())
        return RunProcsResult(
            return_values={} if failures else {r: _value(result) for r, result in last},
            failures=failures,
            stdouts={} if removed else {r: p for _, each in last for r, p in each.stdouts.items()},
            stderrs={} if removed else {r: p for _, each in last for r, p in each.stderrs.items()},
            log_dir=None if removed else self.log_dir,
            warnings=tuple(dict.fromkeys(self._warnings)),
        )

    def _failures(self) -> dict[int, ProcessFailure]:
        found = {
            rank: self._listed(rank, result.failures[rank])
            for rank, result in sorted(self._last.items())
            if rank in result.failures
        }
        if self._culprit is not None:
            rank, failure = self._culprit
            found[rank] = failure
        return dict(sorted(found.items()))

    def _listed(self, rank: int, failure: ProcessFailure) -> ProcessFailure:
        """The failure, such that none that would have been followed by a restart is blamed."""
        if rank in self._cut_short:
            note = "it was to be started anew when the service was ended"
        elif self._culprit is not None and not failure.ended_by_us:
            note = "it failed by itself while the service was being ended"
        else:
            return failure
        return replace(failure, ended_by_us=True, note=join_notes(failure.note, note))


def _value(result: RunProcsResult) -> Any:
    return next(iter(result.return_values.values()), None)


def _blamed(failure: ProcessFailure, why: str) -> ProcessFailure:
    """The root cause of a service's end, whoever has ended the worker itself."""
    return replace(failure, ended_by_us=False, note=join_notes(failure.note, why))


def _too_soon(rank: int, worker: LoneWorker | None) -> ProcessFailure:
    """Of a worker that has succeeded, and was not to be over."""
    pid = worker.pids().get(rank, 0) if worker else 0
    cause = "it ended with success, and was to go on"
    return ProcessFailure(rank, pid, 0, NOT_AVAILABLE, record=None, cause=cause)


def _not_started(rank: int, exc: OSError | SupervisorError) -> ProcessFailure:
    code = _NOT_FOUND if isinstance(exc, FileNotFoundError) else _NOT_STARTED
    cause = f"it could not be started: {exc}"
    return ProcessFailure(rank, 0, code, NOT_AVAILABLE, record=None, cause=cause)
