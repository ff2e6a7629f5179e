"""``PContext``: the life of one group of workers on one node.

One task owns the group: it starts the workers, waits for the event that ends the group (all
have succeeded, one has failed, somebody called ``close``), climbs the cleanup ladder, lets the
log tailers finish, and makes the result. Everybody else only waits for that task.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

from asupervise import cgroups, collect, files, procfs
from asupervise._compat import Exit
from asupervise.bus import EventBus, Subscription
from asupervise.cleanup import Cleanup, Survivor
from asupervise.diagnosis import Diagnosis
from asupervise.errors import NotPermittedError
from asupervise.guardian import Guardian, guarded
from asupervise.handler import SubprocessHandler
from asupervise.logs import Std
from asupervise.plan import GroupPlan
from asupervise.recording import Recorder
from asupervise.result import RunProcsResult
from asupervise.shielding import check_loop, finished_in_any_case, run_in_any_case
from asupervise.spec import RunOptions, check_timeout, checked_signal
from asupervise.subreaper import subreaping
from asupervise.telling import GroupTeller
from asupervise.work import ProgramWork, Work

if TYPE_CHECKING:
    from asupervise.formats import ConsoleFormat
    from asupervise.lines import LogLine
    from asupervise.pulses import Pulses
    from asupervise.stacks import Stack
    from asupervise.streaming import LogStreams

# When a group is no short-lived one any more; see `PContext._settle_soon`.
_SETTLED_S = 0.05


class PContext:
    """A group of running workers; made by :func:`start_processes`.

    Attributes:
        name: the group's name.
        plan: what was started.
        nprocs: number of workers.
        stdouts: by local rank, the file of its standard output; ``""`` for the console.
        stderrs: likewise for standard error.
        error_files: by local rank, where ``@record`` writes its exception.
        log_dir: the run's folder, or None if it has none.
        survivors: processes that could not be ended, a sentence each; known at the end.

    Example::

        async with start_processes("trainer", "./train", {0: ()}, {0: {}}) as ctx:
            result = await ctx.wait()
    """

    def __init__(
        self,
        plan: GroupPlan,
        options: RunOptions,
        work: Work | None = None,
        *,
        events: EventBus | None = None,
    ) -> None:
        self.plan = plan
        self.name = plan.name
        self.nprocs = plan.nprocs
        self.stdouts = dict(plan.logs.stdouts)
        self.stderrs = dict(plan.logs.stderrs)
        self.error_files = dict(plan.logs.error_files)
        self.log_dir: str | None = plan.logs.run_dir or None
        self.survivors: tuple[str, ...] = ()
        self._options = options
        self._work: Work = work or ProgramWork()
        self._handlers: dict[int, SubprocessHandler] = {}
        self._exited = 0
        self._bus = EventBus(parent=events)
        self._teller = self._told_by()
        self._pulses: Pulses | None = None
        self._recorder = Recorder(self._bus)
        self._diagnosis = Diagnosis(
            self._handlers,
            teller=self._teller,
            sample_interval_s=options.memory_sample_interval_s,
            hang_timeout_s=options.hang_timeout_s,
            end_group=self._end_hanging,
            on_helper=lambda pid: self._cleanup.helpers.add(pid),
        )
        self._cleanup = Cleanup(
            plan.token,
            adopts=self._is_stranger if options.subreaper else None,
            before_kill=self._diagnosis.before_kill,
            on_signal=self._teller.ending,
        )
        self._ending = asyncio.Event()
        self._end_signal = int(signal.SIGTERM)
        self._end_grace_s = options.shutdown_timeout_s
        self._unwanted = False
        # Asked before each worker's start; see `StartingProcesses.permit`.
        self.permit: Callable[[], bool] = lambda: True
        # Whether a temporary folder stays also if we have only been ended: there is more in it.
        self.keeps_folder = False
        self._streams: LogStreams | None = None
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._failing: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._life: asyncio.Task[RunProcsResult] | None = None

    # --- what callers do --------------------------------------------------------------------

    @overload
    async def wait(self, timeout: None = None) -> RunProcsResult: ...

    @overload
    async def wait(self, timeout: float) -> RunProcsResult | None: ...

    async def wait(self, timeout: float | None = None) -> RunProcsResult | None:
        """Wait until the group has ended.

        All or nothing: it has ended when every worker has succeeded, or when one has failed and
        the rest has been ended. Any number of tasks may wait; cancelling one harms no worker.

        Args:
            timeout: seconds; None waits for ever, 0 only looks.

        Returns:
            The result, or None if the time ran out first.

        Raises:
            ValueError: if `timeout` is negative (torch's -1 is None here).
        """
        if timeout is not None:
            check_timeout("timeout", timeout)
        life = self._task
        await asyncio.wait({life}, timeout=timeout)
        return life.result() if life.done() else None

    async def wait_failing(self) -> int | None:
        """Wait until a worker has failed of its own, while the others are only being ended.

        Returns:
            Its local rank; None if the group has ended otherwise. The failure that was observed
            first, which need not be the root cause: the result says that.
        """
        either: set[asyncio.Future[Any]] = {self._failing, self._task}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return self._failing.result() if self._failing.done() else None

    async def close(self, death_sig: int | None = None, timeout: float | None = None) -> None:
        """End the group: `death_sig` to every worker's process group, SIGKILL to what is left.

        Bounded in time, even if a process cannot die. May be called again, and while another
        call or ``wait`` runs: it then can only make the end come sooner.

        Args:
            death_sig: the first signal; SIGTERM by default.
            timeout: seconds from it to SIGKILL; None for the group's `shutdown_timeout`.

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
        """Process ids by local rank, also of workers that have ended."""
        return {rank: handler.pid for rank, handler in sorted(self._handlers.items())}

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
        chosen = list(self._handlers if ranks is None else ranks)
        known = [worker.local_rank for worker in self.plan.workers]
        if unknown := sorted(set(chosen) - set(known)):
            raise ValueError(f"ranks: no local ranks {unknown}: expected {known[0]}..{known[-1]}")
        running = [h for r in chosen if (h := self._handlers.get(r)) is not None and h.running]
        for handler in running:
            handler.send_signal(sig)
        self._teller.signal_sent(sig, [handler.local_rank for handler in running])

    def events(self, maxsize: int = 1024) -> Subscription:
        """What happens in the group, from its start, as values of :mod:`asupervise.events`.

        Any number of consumers; each gets all of it, and may take its time: where more than
        `maxsize` events wait for it, the oldest `Heartbeat`, `Progress` or `ResourceSample` is
        dropped, else the oldest event, and counted in ``dropped``. It ends after `GroupEnded`.

        Args:
            maxsize: how many may wait.

        Raises:
            ValueError: for a `maxsize` below 1.

        Example::

            async for event in ctx.events():
                print(event.kind, event.as_dict())
        """
        check_loop(f"group {self.name!r}", self._life)
        return self._bus.subscribe(maxsize)

    async def dump_stacks(self) -> dict[int, Stack]:
        """Where each running worker is, by local rank; also in ``<local_rank>/stacks.txt``.

        By faulthandler where the worker has it armed (``@record`` does), by py-spy where that is
        installed and permitted, by the kernel's view of it otherwise. Takes seconds at the most,
        and harms no worker.
        """
        check_loop(f"group {self.name!r}", self._life)
        return await self._diagnosis.dump_stacks()

    def lines(
        self, ranks: Iterable[int] | None = None, streams: Std = Std.ALL
    ) -> AsyncGenerator[LogLine, None]:
        """The workers' output, line by line, from the beginning to the end of the group.

        Each call is a consumer of its own. One that is slow makes nobody wait, neither a worker
        nor ``wait`` and ``close``: the files are its buffer. It gets all lines also where it is
        not through when the group has ended, and a temporary folder has been removed: its files
        are open from this call until it is through. So call it at once, before the first ``await``,
        where the logs have no folder of their own: a group that is over has removed them.

        Args:
            ranks: local ranks; None for all.
            streams: `Std.OUT` or `Std.ERR`, which must go to files; or `Std.ALL`, those that do.

        Returns:
            An asynchronous iterator. The lines of one file come in their order. Whoever leaves
            its loop early, and keeps the iterator, closes it (``aclose()``,
            ``contextlib.aclosing``).

        Raises:
            ValueError: for a rank that does not exist, or a stream that does not go to a file.
            FileNotFoundError: if a file is not there any more.
            OSError: at the call, if one cannot be opened; at the end of the lines, if one could
                not be read.

        Example::

            async with start_processes(..., logs_specs=DefaultLogsSpecs(tee=Std.ALL)) as ctx:
                async for line in ctx.lines(ranks=[0], streams=Std.OUT):
                    print(line.rank, line.text)
        """
        from asupervise.lines import LineReader, sources_of

        return LineReader(sources_of(self.plan, ranks, streams)).lines(self._task)

    async def __aenter__(self) -> PContext:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._request_end(signal.SIGTERM, self._options.shutdown_timeout_s)
        await finished_in_any_case(self._task)

    def spare(self, pid: int) -> None:
        """A child of ours is none of the group's, and nobody that a subreaper was left."""
        self._cleanup.helpers.add(pid)

    @property
    def cgroup(self) -> str:
        """The folder of the group's own cgroup, or ""."""
        return self._cleanup.cgroup.folder if self._cleanup.cgroup is not None else ""

    def __repr__(self) -> str:
        ended = self._life is not None and self._life.done()
        state = "ended" if ended else f"{self.nprocs - self._exited} running"
        return f"<PContext {self.name!r}: {self.nprocs} workers, {state}>"

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        from asupervise.views.notebook import RUNNING, group_html

        running = ((rank, handler.running) for rank, handler in self._handlers.items())
        states = {rank: RUNNING if runs else "ended" for rank, runs in running}
        return group_html(self.name, states, self.pids(), self.log_dir)

    # --- the group's own task ---------------------------------------------------------------

    @property
    def _task(self) -> asyncio.Task[RunProcsResult]:
        if self._life is None:
            raise RuntimeError(f"group {self.name!r} has not been started")
        check_loop(f"group {self.name!r}", self._life)
        return self._life

    async def _start(self) -> None:
        self._life = asyncio.get_running_loop().create_task(
            self._live(), name=f"asupervise {self.name}"
        )
        try:
            await asyncio.shield(self._started)
        except asyncio.CancelledError:
            # Nobody will ever hold this context: what it has started must not stay.
            self._unwanted = True
            self._request_end(signal.SIGTERM, self._options.shutdown_timeout_s)
            await finished_in_any_case(self._life)
            raise

    def _request_end(self, sig: int, grace_s: float) -> None:
        if self._cleanup.running:
            self._cleanup.hurry(sig, grace_s)
            return
        if self._ending.is_set():
            # Something else ends the group already, but has not begun: only ever sooner.
            grace_s = min(grace_s, self._end_grace_s)
            sig = self._end_signal if self._end_signal == signal.SIGKILL else sig
        self._end_signal, self._end_grace_s = sig, grace_s
        self._ending.set()

    def _end_hanging(self) -> None:
        self._request_end(signal.SIGTERM, self._options.shutdown_timeout_s)

    def _on_lost(self, why: str) -> None:
        self._diagnosis.on_lost(why)
        self._request_end(signal.SIGTERM, self._options.shutdown_timeout_s)

    def _on_exit(self, handler: SubprocessHandler, exit: Exit) -> None:
        self._exited += 1
        # One that ends at once may do so before we have heard that it runs.
        self._teller.worker_started(handler)
        if self._pulses is not None:
            self._pulses.ended(handler)
        self._teller.worker_exited(handler, exit, self._diagnosis.peak(handler, exit))
        if self._streams is not None:
            self._stop_watching(handler, self._streams)
        self._diagnosis.on_exit(handler, exit)
        if self._exited >= len(self._handlers):
            self._cleanup.woken_by_exit()
        if exit.code != 0 and not self._ending.is_set():
            self._failing.set_result(handler.local_rank)
        if self._exited == self.nprocs or exit.code != 0:
            self._ending.set()

    @staticmethod
    def _stop_watching(handler: SubprocessHandler, streams: LogStreams) -> None:
        if not handler.left_group:
            streams.ended(handler.plan)

    async def _live(self) -> RunProcsResult:
        warnings = list(self.plan.warnings)
        try:
            self._teller.starting(self._options.cwd)
            files.make_folders(self.plan)
            if self._options.subreaper:
                self._cleanup.cgroup = cgroups.make(self.plan.token)
            async with _streams_of(self.plan, warnings, self._options.console) as self._streams:
                try:
                    async with self._guarded(warnings) as guardian, self._prepared(warnings):
                        warnings += await self._run(guardian)
                finally:
                    if self._streams is not None:
                        self._streams.stop()
            result = await collect.result_of(
                self.plan,
                self._handlers,
                warnings,
                details_of=self._diagnosis.details,
                faulty=self._diagnosis.faulty,
                work=self._work,
                keeps_folder=self.keeps_folder,
            )
            self._teller.ended(result)
            result = await self._recorded(result)
        except asyncio.CancelledError:
            self._started.cancel()
            raise
        except BaseException as exc:
            if self._started.done():
                raise
            self._teller.not_started(exc)
            try:
                # Before anybody hears of it, whose next step may be the end of the loop.
                await files.remove_run_folder(self.plan)
            finally:
                # Whoever waits for the start gets the error; `wait` has nothing to say beyond it.
                self._started.set_exception(exc)
            return RunProcsResult()
        finally:
            self._bus.close()
            self._diagnosis.forget_owner()
            self._cleanup.forget_owner()
        return result

    def _told_by(self) -> GroupTeller:
        return GroupTeller(self._bus, self.plan)

    async def _recorded(self, result: RunProcsResult) -> RunProcsResult:
        problem = await self._recorder.finish()
        return replace(result, warnings=(*result.warnings, problem)) if problem else result

    def _feel_pulses(self) -> None:
        """Somebody wants to know of first output, heartbeats and progress."""
        from asupervise.pulses import Pulses

        self._pulses = Pulses(self._teller)
        for handler in self._handlers.values():
            if handler.running:
                self._pulses.follow(handler)

    def _prepared(self, warnings: list[str]) -> AbstractAsyncContextManager[None]:
        cgroup = self._cleanup.cgroup
        return self._work.prepared(
            self.plan, warnings, cgroup=cgroup.folder if cgroup else "", on_lost=self._on_lost
        )

    @asynccontextmanager
    async def _guarded(self, warnings: list[str]) -> AsyncIterator[Guardian | None]:
        if not self._options.guardian:
            yield None
            return
        cgroup = self._cleanup.cgroup
        async with guarded(self.plan.token, cgroup.folder if cgroup else "") as guardian:
            self._cleanup.helpers = {guardian.pid}
            yield guardian
            if guardian.lost:
                warnings.append(
                    f"the guardian (process {guardian.pid}) was killed: from then on a SIGKILL "
                    "of this process would have left the workers running"
                )

    async def _run(self, guardian: Guardian | None) -> list[str]:
        with ExitStack() as stack:
            if self._options.subreaper:
                reaper = stack.enter_context(subreaping(self._is_stranger))
                stack.callback(reaper.reap)
            try:
                self._diagnosis.before_start()
                self._bus.when_listened(self._feel_pulses)
                cgroup = self._cleanup.cgroup
                with cgroup.entered() if cgroup else nullcontext():
                    await self._start_workers()
                stack.callback(self._settle_soon(guardian).cancel)
                self._diagnosis.start()
                if self._options.report:
                    self._recorder.attend(self.plan.logs)
                self._started.set_result(None)
                await self._ending.wait()
            finally:
                self._bus.forget(self._feel_pulses)
                # For every way to get here: the end that was asked for, a worker that did not
                # start, this task being cancelled because the loop is shutting down.
                survivors = await run_in_any_case(self._end)
        self.survivors = tuple(map(str, survivors))
        return list(self.survivors)

    def _settle_soon(self, guardian: Guardian | None) -> asyncio.TimerHandle:
        # Not at once: a group that is over sooner need not pay for it, and until then the
        # workers have not had the time to overwrite the environment that they are known by.
        def settle() -> None:
            self._cleanup.note_forks()
            handlers = self._handlers.values()
            known = [procfs.read_entry(handler.pid) for handler in handlers if handler.running]
            if guardian is not None:
                guardian.adopt((entry.pid, entry.start_ticks) for entry in known if entry)

        return asyncio.get_running_loop().call_later(_SETTLED_S, settle)

    def _is_stranger(self, pid: int) -> bool:
        """Whether a child of this process is none that the group has started itself."""
        if not self._started.done():
            return False
        workers = {handler.pid for handler in self._handlers.values()}
        helpers = self._cleanup.helpers | self._work.helpers
        return pid not in workers and pid not in helpers

    async def _start_workers(self) -> None:
        parent_env = os.environ.copy()
        for worker in self.plan.workers:
            if self._unwanted:
                return
            if not self.permit():
                self._end_signal, self._end_grace_s = signal.SIGKILL, 0.0
                raise NotPermittedError(f"group {self.name!r} may not be started any more")
            handler = self._handlers[worker.local_rank] = await SubprocessHandler.start(
                worker,
                parent_env,
                cwd=self._options.cwd,
                on_exit=self._on_exit,
                launch=self._work.launch,
            )
            self._teller.worker_started(handler)
            if self._pulses is not None:
                self._pulses.follow(handler)
            if self._streams is not None:
                self._streams.follow(worker)
                if handler.exit is not None:
                    self._stop_watching(handler, self._streams)
            # Starting one takes half a millisecond of the loop's time; others get a turn.
            await asyncio.sleep(0)

    async def _end(self) -> list[Survivor]:
        handlers = list(self._handlers.values())
        await self._diagnosis.group_ends()
        survivors = await self._cleanup.run(handlers, self._end_signal, self._end_grace_s)
        if self._pulses is not None:
            await self._pulses.end()
        if self._cleanup.cgroup is not None:
            self._cleanup.cgroup.remove()
        for handler in handlers:
            if handler.running:
                handler.abandon()
        await self._diagnosis.group_has_ended()
        return survivors


def _streams_of(
    plan: GroupPlan, warnings: list[str], form: ConsoleFormat | None
) -> AbstractAsyncContextManager[LogStreams | None]:
    """The log streams of the group as a context manager; an empty one if nothing is teed."""
    if any(worker.tee_stdout or worker.tee_stderr for worker in plan.workers):
        # Imported here: a run that shows nothing pays neither for aiofiles nor for anyio.
        from asupervise.streaming import open_streams

        return open_streams(plan, warnings, form)
    return nullcontext()
