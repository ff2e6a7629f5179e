"""The life of one group of workers on one node: ``start_processes`` and ``PContext``.

One task owns the group: it starts the workers, waits for the event that ends the group (all
have succeeded, one has failed, somebody called ``close``), climbs the cleanup ladder, lets the
log tailers finish, and makes the result. Everybody else only waits for that task.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from asupervise import binder, collect, files, procfs
from asupervise._compat import Exit
from asupervise.cleanup import Cleanup
from asupervise.errors import NotSupportedError
from asupervise.failures import RunProcsResult
from asupervise.guardian import Guardian, guarded
from asupervise.handler import SubprocessHandler
from asupervise.logs import DefaultLogsSpecs, LogsSpecs
from asupervise.plan import GroupPlan, GroupSpec, WorkerPlan, check_rank_maps, plan_group
from asupervise.subreaper import subreaping

if TYPE_CHECKING:
    from asupervise.binding import NumaOptions
    from asupervise.streaming import LogStreams

# When the guardian is told who the workers are; see `PContext._introduce_soon`.
_INTRODUCTION_S = 0.05

DEFAULT_SHUTDOWN_TIMEOUT_S = 30.0


def start_processes(
    name: str,
    entrypoint: str | Sequence[str] | Callable[..., Any],
    args: Mapping[int, Sequence[object]],
    envs: Mapping[int, Mapping[str, str]],
    logs_specs: LogsSpecs | None = None,
    log_line_prefixes: Mapping[int, str] | None = None,
    start_method: str = "spawn",
    numa_options: NumaOptions | None = None,
    duplicate_stdout_filters: Sequence[str] | None = None,
    duplicate_stderr_filters: Sequence[str] | None = None,
    *,
    stdin: int | None = None,
    cwd: str | None = None,
    shutdown_timeout: float = DEFAULT_SHUTDOWN_TIMEOUT_S,
    guardian: bool = True,
    subreaper: bool = False,
) -> StartingProcesses:
    """Start one process a local rank, each in its own session.

    torch's call of the same name, to be awaited or entered::

        ctx = await start_processes("trainer", "./train", {0: ("--lr", 0.1)}, {0: {}})
        result = await ctx.wait()

        async with start_processes("trainer", "./train", {0: ()}, {0: {}}) as ctx:
            result = await ctx.wait()      # leaving the block ends what still runs

    Args:
        name: names the group in prefixes and reports.
        entrypoint: a program, or a sequence: a program with its leading arguments.
        args: further arguments by local rank ``0..n-1``; each is passed as ``str(argument)``.
        envs: environment variables by local rank, laid over ours.
        logs_specs: where output goes; by default to our own console.
        log_line_prefixes: by local rank, instead of ``[<name><local_rank>]:``.
        start_method: accepted for torch's sake; programs are always started afresh.
        numa_options: binding to CPUs and memory.
        duplicate_stdout_filters: teed lines that contain any of these go to the attempt's
            ``filtered_stdout.log`` as well.
        duplicate_stderr_filters: likewise for stderr.
        stdin: the local rank that reads our standard input; the others read ``/dev/null``.
        cwd: the workers' working directory.
        shutdown_timeout: seconds between SIGTERM and SIGKILL for the other ranks when one has
            failed.
        guardian: whether a small process (1 MB, no CPU) watches over the group and ends it,
            daemonised grandchildren included, when this process is killed.
        subreaper: whether orphans of the group become children of this process
            (``PR_SET_CHILD_SUBREAPER``, prctl(2)), which finds even those that have wiped their
            environment. For programs that own their process, such as the command line: it
            needs the main thread and SIGCHLD, and reaps every child that it does not know.

    Returns:
        An object to ``await`` or to use in ``async with``; both give a :class:`PContext`.

    Raises:
        RankMapError: at the call, if `args` and `envs` are empty, gapped or of different ranks.
        ValueError: at the call, for other arguments that make no sense.
        FileNotFoundError, PermissionError: when awaited, for a program that is missing or not
            executable, a log folder that cannot be written. Nothing is left running then.
        BindingError: when awaited, if the binding is not possible here.
    """
    spec = _checked_spec(
        name, entrypoint, args, envs, logs_specs, log_line_prefixes,
        duplicate_stdout_filters, duplicate_stderr_filters, stdin,
    )  # fmt: skip
    _check_timeout("shutdown_timeout", shutdown_timeout)
    if start_method not in ("spawn", "fork", "forkserver"):
        raise ValueError(
            f"start_method: {start_method!r}: expected 'spawn', 'fork' or 'forkserver'"
        )
    return StartingProcesses(
        spec,
        numa_options,
        cwd=cwd,
        shutdown_timeout=shutdown_timeout,
        guardian=guardian,
        subreaper=subreaper,
    )


def plan_processes(
    name: str,
    entrypoint: str | Sequence[str] | Callable[..., Any],
    args: Mapping[int, Sequence[object]],
    envs: Mapping[int, Mapping[str, str]],
    logs_specs: LogsSpecs | None = None,
    log_line_prefixes: Mapping[int, str] | None = None,
    start_method: str = "spawn",
    numa_options: NumaOptions | None = None,
    duplicate_stdout_filters: Sequence[str] | None = None,
    duplicate_stderr_filters: Sequence[str] | None = None,
    *,
    stdin: int | None = None,
    cwd: str | None = None,
    shutdown_timeout: float = DEFAULT_SHUTDOWN_TIMEOUT_S,
    guardian: bool = True,
    subreaper: bool = False,
) -> GroupPlan:
    """What :func:`start_processes` would do with the same arguments; starts nothing.

    Raises:
        as :func:`start_processes`.
    """
    starting = start_processes(
        name, entrypoint, args, envs, logs_specs, log_line_prefixes, start_method, numa_options,
        duplicate_stdout_filters, duplicate_stderr_filters,
        stdin=stdin, cwd=cwd, shutdown_timeout=shutdown_timeout,
        guardian=guardian, subreaper=subreaper,
    )  # fmt: skip
    return starting.plan()


def _checked_spec(
    name: str,
    entrypoint: str | Sequence[str] | Callable[..., Any],
    args: Mapping[int, Sequence[object]],
    envs: Mapping[int, Mapping[str, str]],
    logs_specs: LogsSpecs | None,
    prefixes: Mapping[int, str] | None,
    stdout_filters: Sequence[str] | None,
    stderr_filters: Sequence[str] | None,
    stdin: int | None,
) -> GroupSpec:
    check_rank_maps(args, envs, prefixes)
    if stdin is not None and stdin not in args:
        raise ValueError(f"stdin: no local rank {stdin}: expected 0..{len(args) - 1} or None")
    return GroupSpec(
        name=name,
        entrypoint=_checked_entrypoint(entrypoint),
        args=args,
        envs=envs,
        logs_specs=logs_specs if logs_specs is not None else DefaultLogsSpecs(),
        log_line_prefixes=prefixes,
        stdout_filters=_checked_filters("duplicate_stdout_filters", stdout_filters),
        stderr_filters=_checked_filters("duplicate_stderr_filters", stderr_filters),
        stdin=stdin,
        token=f"asv-{secrets.token_hex(8)}",
    )


def _checked_entrypoint(
    entrypoint: str | Sequence[str] | Callable[..., Any],
) -> str | tuple[str, ...]:
    if callable(entrypoint):
        raise NotSupportedError(
            f"entrypoint: {entrypoint!r} is a function; only programs can be started so far",
            hint="put it into a script and pass [sys.executable, 'script.py']",
        )
    if isinstance(entrypoint, str):
        parts: tuple[str, ...] = (entrypoint,)
    else:
        parts = tuple(entrypoint)
    if not parts or not parts[0] or not all(isinstance(part, str) for part in parts):
        raise ValueError(
            f"entrypoint: {entrypoint!r}: expected a program, or a sequence of strings whose "
            "first is a program"
        )
    return entrypoint if isinstance(entrypoint, str) else parts


def _checked_filters(what: str, filters: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(filters, str):
        raise ValueError(f"{what}: {filters!r}: expected a sequence of strings, not one string")
    return tuple(filters or ())


def _check_timeout(what: str, timeout_s: float) -> None:
    # The comparison is False for NaN as well.
    if not timeout_s >= 0:
        raise ValueError(f"{what}: {timeout_s!r}: expected seconds, zero or more")


class StartingProcesses:
    """What :func:`start_processes` returns: ``await`` it, or enter it with ``async with``."""

    def __init__(
        self,
        spec: GroupSpec,
        numa_options: NumaOptions | None,
        **options: Any,
    ) -> None:
        self._spec = spec
        self._numa_options = numa_options
        self._options = options
        self._context: PContext | None = None

    def plan(self) -> GroupPlan:
        """The plan, without starting anything."""
        return self._plan(binder.choose(self._spec, self._numa_options, os.environ))

    def _plan(self, spec: GroupSpec) -> GroupPlan:
        plan = plan_group(spec, os.environ)
        files.check_programs(plan.workers, os.environ, self._options.get("cwd"))
        return plan

    async def _start(self) -> PContext:
        if self._context is not None:
            raise RuntimeError(f"group {self._spec.name!r} is started already")
        spec = await binder.choose_and_probe(self._spec, self._numa_options, os.environ)
        self._context = PContext(self._plan(spec), **self._options)
        await self._context._start()
        return self._context

    def __await__(self) -> Generator[Any, Any, PContext]:
        return self._start().__await__()

    async def __aenter__(self) -> PContext:
        return await self._start()

    async def __aexit__(self, *exc_info: object) -> None:
        if self._context is not None:
            await self._context.__aexit__(*exc_info)


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
    """

    def __init__(
        self,
        plan: GroupPlan,
        *,
        cwd: str | None = None,
        shutdown_timeout: float,
        guardian: bool = True,
        subreaper: bool = False,
    ) -> None:
        self.plan = plan
        self.name = plan.name
        self.nprocs = plan.nprocs
        self.stdouts = dict(plan.logs.stdouts)
        self.stderrs = dict(plan.logs.stderrs)
        self.error_files = dict(plan.logs.error_files)
        self.log_dir: str | None = plan.logs.run_dir or None
        self._cwd = cwd
        self._shutdown_timeout = shutdown_timeout
        self._handlers: dict[int, SubprocessHandler] = {}
        self._running = plan.nprocs
        self._guard = guardian
        self._subreaper = subreaper
        self._cleanup = Cleanup(plan.token, adopts=self._is_stranger if subreaper else None)
        self._ending = asyncio.Event()
        self._end_signal, self._end_grace_s = int(signal.SIGTERM), shutdown_timeout
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._life: asyncio.Task[RunProcsResult] | None = None

    # --- what callers do --------------------------------------------------------------------

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
            _check_timeout("timeout", timeout)
        life = self._task
        await asyncio.wait({life}, timeout=timeout)
        return life.result() if life.done() else None

    async def close(
        self, death_sig: int | None = None, timeout: float = DEFAULT_SHUTDOWN_TIMEOUT_S
    ) -> None:
        """End the group: `death_sig` to every worker's process group, SIGKILL to what is left.

        Bounded in time, even if a process cannot die. May be called again, and while another
        call or ``wait`` runs: it then can only make the end come sooner.

        Args:
            death_sig: the first signal; SIGTERM by default.
            timeout: seconds from it to SIGKILL.

        Raises:
            ValueError: for a signal that does not exist or a negative `timeout`.
        """
        _check_timeout("timeout", timeout)
        self._request_end(_checked_signal(death_sig or signal.SIGTERM), timeout)
        await asyncio.wait({self._task})

    def pids(self) -> dict[int, int]:
        """Process ids by local rank."""
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
        sig = _checked_signal(sig)
        chosen = list(self._handlers if ranks is None else ranks)
        if unknown := sorted(set(chosen) - set(range(self.nprocs))):
            raise ValueError(f"ranks: no local ranks {unknown}: expected 0..{self.nprocs - 1}")
        for rank in chosen:
            handler = self._handlers.get(rank)
            if handler is not None and handler.running:
                handler.send_signal(sig)

    async def __aenter__(self) -> PContext:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._request_end(signal.SIGTERM, self._shutdown_timeout)
        await _finished_in_any_case(self._task)

    def __repr__(self) -> str:
        state = "ended" if self._task.done() else f"{self._running} running"
        return f"<PContext {self.name!r}: {self.nprocs} workers, {state}>"

    # --- the group's own task ---------------------------------------------------------------

    @property
    def _task(self) -> asyncio.Task[RunProcsResult]:
        if self._life is None:
            raise RuntimeError(f"group {self.name!r} has not been started")
        return self._life

    async def _start(self) -> None:
        self._life = asyncio.get_running_loop().create_task(
            self._live(), name=f"asupervise {self.name}"
        )
        try:
            await asyncio.shield(self._started)
        except asyncio.CancelledError:
            # Nobody will ever hold this context: what it has started must not stay.
            self._request_end(signal.SIGTERM, self._shutdown_timeout)
            await _finished_in_any_case(self._life)
            raise

    def _request_end(self, sig: int, grace_s: float) -> None:
        if self._cleanup.running:
            self._cleanup.hurry(sig, grace_s)
        elif not self._ending.is_set():
            self._end_signal, self._end_grace_s = sig, grace_s
            self._ending.set()

    def _on_exit(self, handler: SubprocessHandler, exit: Exit) -> None:
        self._running -= 1
        if self._running == 0:
            self._cleanup.woken_by_exit()
        if self._running == 0 or exit.code != 0:
            self._ending.set()

    async def _live(self) -> RunProcsResult:
        warnings: list[str] = []
        try:
            files.make_folders(self.plan)
            async with _streams_of(self.plan, warnings) as streams:
                try:
                    async with self._guarded(warnings) as guardian:
                        warnings += await self._run(streams, guardian)
                finally:
                    if streams is not None:
                        streams.stop()
            result = await collect.result_of(self.plan, self._handlers, warnings)
        except asyncio.CancelledError:
            self._started.cancel()
            raise
        except BaseException as exc:
            if self._started.done():
                raise
            # Whoever waits for the start gets the error; `wait` has nothing to say beyond it.
            self._started.set_exception(exc)
            await files.remove_run_folder(self.plan)
            return RunProcsResult()
        return result

    @asynccontextmanager
    async def _guarded(self, warnings: list[str]) -> AsyncIterator[Guardian | None]:
        if not self._guard:
            yield None
            return
        async with guarded(self.plan.token) as guardian:
            self._cleanup.helpers = {guardian.pid}
            yield guardian
            if guardian.lost:
                warnings.append(
                    f"the guardian (process {guardian.pid}) was killed: from then on a SIGKILL "
                    "of this process would have left the workers running"
                )

    async def _run(self, streams: LogStreams | None, guardian: Guardian | None) -> list[str]:
        with ExitStack() as stack:
            if self._subreaper:
                reaper = stack.enter_context(subreaping(self._is_stranger))
                stack.callback(reaper.reap)
            try:
                for worker in self.plan.workers:
                    await self._start_worker(worker, streams)
                if guardian is not None:
                    stack.callback(self._introduce_soon(guardian).cancel)
                self._started.set_result(None)
                await self._ending.wait()
            finally:
                # For every way to get here: the end that was asked for, a worker that did not
                # start, this task being cancelled because the loop is shutting down.
                end = asyncio.get_running_loop().create_task(self._end())
                await _finished_in_any_case(end)
        return [str(survivor) for survivor in end.result()]

    def _introduce_soon(self, guardian: Guardian) -> asyncio.TimerHandle:
        # Not at once: a group that is over sooner need not pay for it, and until then the
        # workers have not had the time to overwrite the environment that they are known by.
        def introduce() -> None:
            handlers = self._handlers.values()
            known = [procfs.read_entry(handler.pid) for handler in handlers if handler.running]
            guardian.adopt((entry.pid, entry.start_ticks) for entry in known if entry)

        return asyncio.get_running_loop().call_later(_INTRODUCTION_S, introduce)

    def _is_stranger(self, pid: int) -> bool:
        """Whether a child of this process is none that the group has started itself."""
        if not self._started.done():
            return False
        workers = {handler.pid for handler in self._handlers.values()}
        return pid not in workers and pid not in self._cleanup.helpers

    async def _start_worker(self, worker: WorkerPlan, streams: LogStreams | None) -> None:
        handler = await SubprocessHandler.start(
            worker, os.environ, cwd=self._cwd, on_exit=self._on_exit
        )
        self._handlers[worker.local_rank] = handler
        if streams is not None:
            streams.follow(worker)

    async def _end(self) -> list[Any]:
        handlers = list(self._handlers.values())
        return await self._cleanup.run(handlers, self._end_signal, self._end_grace_s)


def _streams_of(plan: GroupPlan, warnings: list[str]) -> Any:
    """The log streams of the group as a context manager; an empty one if nothing is teed."""
    if any(worker.tee_stdout or worker.tee_stderr for worker in plan.workers):
        # Imported here: a run that shows nothing pays neither for aiofiles nor for anyio.
        from asupervise.streaming import open_streams

        return open_streams(plan, warnings)
    from contextlib import nullcontext

    return nullcontext()


def _checked_signal(sig: int) -> int:
    if sig not in signal.valid_signals():
        raise ValueError(f"{sig!r} is not a signal of this system")
    return int(sig)


async def _finished_in_any_case(task: asyncio.Task[Any]) -> None:
    """Wait for `task` even while being cancelled, and pass the cancellation on afterwards."""
    cancelled: asyncio.CancelledError | None = None
    with _anyio_shield():
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError as exc:
                cancelled = exc
    if cancelled is not None:
        raise cancelled


def _anyio_shield() -> Any:
    # In an anyio cancel scope, every await would be cancelled anew. Where nobody has imported
    # anyio there is no such scope.
    if "anyio" in sys.modules:
        import anyio

        return anyio.CancelScope(shield=True)
    from contextlib import nullcontext

    return nullcontext()
