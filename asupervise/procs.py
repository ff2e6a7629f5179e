"""``start_processes``: from a call to a running group; ``plan_processes``: to the plan alone."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from asupervise import binder, files
from asupervise.context import PContext
from asupervise.logs import LogsSpecs
from asupervise.plan import GroupPlan, plan_group
from asupervise.spec import (
    DEFAULT_MEMORY_SAMPLE_INTERVAL_S,
    DEFAULT_SHUTDOWN_TIMEOUT_S,
    GroupSpec,
    RunOptions,
    checked_spec,
)
from asupervise.work import work_of

if TYPE_CHECKING:
    from asupervise.binding import NumaOptions
    from asupervise.bus import EventBus
    from asupervise.formats import ConsoleFormat
    from asupervise.functions.zygote import Zygote

__all__ = ["PContext", "StartingProcesses", "Unstarted", "plan_processes", "start_processes"]


def start_processes(
    name: str,
    entrypoint: str | Sequence[str] | Callable[..., Any],
    args: Mapping[int, Sequence[object]],
    envs: Mapping[int, Mapping[str, str]],
    logs_specs: LogsSpecs | None = None,
    log_line_prefixes: Mapping[int, str] | None = None,
    start_method: str | Zygote = "spawn",
    numa_options: NumaOptions | None = None,
    duplicate_stdout_filters: Sequence[str] | None = None,
    duplicate_stderr_filters: Sequence[str] | None = None,
    *,
    preload: Sequence[str] = (),
    stdin: int | None = None,
    cwd: str | None = None,
    shutdown_timeout: float = DEFAULT_SHUTDOWN_TIMEOUT_S,
    guardian: bool = True,
    subreaper: bool = False,
    hang_timeout: float | None = None,
    memory_sample_interval: float = DEFAULT_MEMORY_SAMPLE_INTERVAL_S,
    events: EventBus | None = None,
    report: bool = True,
    console: ConsoleFormat | None = None,
) -> StartingProcesses:
    """Start one process a local rank, each in its own session.

    torch's call of the same name, to be awaited or entered::

        ctx = await start_processes("trainer", "./train", {0: ("--lr", 0.1)}, {0: {}})
        result = await ctx.wait()

        async with start_processes("trainer", "./train", {0: ()}, {0: {}}) as ctx:
            result = await ctx.wait()      # leaving the block ends what still runs

    Args:
        name: names the group in prefixes and reports.
        entrypoint: a program; a sequence, a program with its leading arguments; or a callable,
            plain or ``async``, which each worker calls with its own arguments.
        args: (further) arguments by local rank ``0..n-1``; to a program each is passed as
            ``str(argument)``, to a function by pickle, or by cloudpickle if that is installed and
            needed.
        envs: environment variables by local rank, laid over ours.
        logs_specs: where output goes; by default to our own console.
        log_line_prefixes: by local rank, instead of ``[<name><local_rank>]:``.
        start_method: how a function's workers start (programs are always started afresh).
            ``"spawn"``: each in a fresh interpreter. ``"forkserver"``: forked by a zygote, a fresh
            interpreter that has imported `preload` and the function's module; ``"fork"`` is the
            same, for a process that runs an event loop is never forked. A :class:`Zygote` that
            is kept over several groups.
        numa_options: binding to CPUs and memory.
        duplicate_stdout_filters: teed lines that contain any of these go to the attempt's
            ``filtered_stdout.log`` as well.
        duplicate_stderr_filters: likewise for stderr.
        preload: modules that the zygote imports first, with ``"forkserver"``.
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
            Where a cgroup v2 has been delegated to us, the workers get one of their own as well.
        hang_timeout: seconds without output and without CPU use (or, once a worker has called
            :func:`asupervise.heartbeat`, without a heartbeat) after which the stacks of all
            workers are taken and the group fails with the hang as its cause; None for never. Only
            output that goes to files is seen: without ``tee`` or ``redirects`` a worker that
            prints, and otherwise sleeps, counts as hanging.
        memory_sample_interval: seconds between looks at the workers' memory, which a report of a
            death by SIGKILL tells; 0 turns it off.
        events: a bus that is told what happens, besides ``ctx.events()``: for one that carries
            several groups. It stays open.
        report: whether ``events.jsonl`` and ``report.html`` are left in the run's folder, if that
            stays: one that `logs_specs` name, or a temporary one after a failure.
        console: how teed lines look on our console; by default with a prefix, which is coloured
            on a terminal.

    Returns:
        An object to ``await`` or to use in ``async with``; both give a :class:`PContext`.

    Raises:
        RankMapError: at the call, if `args` and `envs` are empty, gapped or of different ranks.
        ValueError: at the call, for other arguments that make no sense.
        TypeError: at the call, for arguments that do not fit a function's signature.
        NotPicklableError: when awaited, for a function or an argument that cannot travel.
        ZygoteError: when awaited, if a preload cannot be imported, or must not be forked from.
        FileNotFoundError, PermissionError: when awaited, for a program that is missing or not
            executable, a log folder that cannot be written. Nothing is left running then.
        BindingError: when awaited, if the binding is not possible here.
    """
    spec = checked_spec(
        name, entrypoint, args, envs, logs_specs, log_line_prefixes, start_method, preload,
        duplicate_stdout_filters, duplicate_stderr_filters, stdin,
    )  # fmt: skip
    options = RunOptions(
        cwd=cwd,
        shutdown_timeout_s=shutdown_timeout,
        guardian=guardian,
        subreaper=subreaper,
        hang_timeout_s=hang_timeout,
        memory_sample_interval_s=memory_sample_interval,
        report=report,
        console=console,
    ).checked()
    return StartingProcesses(spec, numa_options, options, events)


def plan_processes(
    name: str,
    entrypoint: str | Sequence[str] | Callable[..., Any],
    args: Mapping[int, Sequence[object]],
    envs: Mapping[int, Mapping[str, str]],
    logs_specs: LogsSpecs | None = None,
    log_line_prefixes: Mapping[int, str] | None = None,
    start_method: str | Zygote = "spawn",
    numa_options: NumaOptions | None = None,
    duplicate_stdout_filters: Sequence[str] | None = None,
    duplicate_stderr_filters: Sequence[str] | None = None,
    *,
    preload: Sequence[str] = (),
    stdin: int | None = None,
    cwd: str | None = None,
    shutdown_timeout: float = DEFAULT_SHUTDOWN_TIMEOUT_S,
    guardian: bool = True,
    subreaper: bool = False,
    hang_timeout: float | None = None,
    memory_sample_interval: float = DEFAULT_MEMORY_SAMPLE_INTERVAL_S,
    events: EventBus | None = None,
    report: bool = True,
    console: ConsoleFormat | None = None,
) -> GroupPlan:
    """What :func:`start_processes` would do with the same arguments; starts nothing.

    Returns:
        A frozen value: one :class:`WorkerPlan` a worker, with its argv, environment and files.

    Raises:
        RankMapError, ValueError, TypeError: as :func:`start_processes` at the call.
        FileNotFoundError, PermissionError: for a program that is missing or not executable.
        BindingError: if the binding is not possible here.

    Example:
        >>> plan = plan_processes("echo", "echo", {0: ("a",), 1: ("b",)}, {0: {}, 1: {}})
        >>> [worker.argv for worker in plan.workers]
        [('echo', 'a'), ('echo', 'b')]
    """
    starting = start_processes(
        name, entrypoint, args, envs, logs_specs, log_line_prefixes, start_method, numa_options,
        duplicate_stdout_filters, duplicate_stderr_filters,
        preload=preload, stdin=stdin, cwd=cwd, shutdown_timeout=shutdown_timeout,
        guardian=guardian, subreaper=subreaper, hang_timeout=hang_timeout,
        memory_sample_interval=memory_sample_interval, events=events, report=report,
        console=console,
    )  # fmt: skip
    return starting.plan()


class Unstarted:
    """What starts something once it is awaited or entered, and says so if it never is.

    Args:
        what: is started.
        gives: what awaiting it gives.
    """

    def __init__(self, what: str, gives: type) -> None:
        self._what = what
        self._gives = gives
        self._used = False
        self._forgotten = True

    def _begin(self) -> None:
        self._forgotten = False
        if self._used:
            raise RuntimeError(f"{self._what} is started already")
        self._used = True
        refuse_in_main_import()

    def __del__(self) -> None:
        if self._forgotten:
            warnings.warn(
                f"{self._what} was never started: `await` it, or enter it with `async with`",
                RuntimeWarning,
                stacklevel=2,
                source=self,
            )

    if not TYPE_CHECKING:  # for a type checker all attributes would be there

        def __getattr__(self, name: str) -> NoReturn:
            # With torch one has a running group here.
            problem = f"{type(self).__name__!r} object has no attribute {name!r}"
            if not name.startswith("_") and hasattr(self._gives, name):
                problem = f"{problem}: `await` it first, or enter it with `async with`"
            raise AttributeError(problem, name=name, obj=self)


class StartingProcesses(Unstarted):
    """What :func:`start_processes` returns: ``await`` it, or enter it with ``async with``.

    Attributes:
        permit: asked before each worker's start; if the answer is no, those that were started are
            killed, and awaiting this raises `NotPermittedError`.
        keeps_folder: whether a temporary folder stays unless all workers succeed: a run has more in
            it than this group.
    """

    def __init__(
        self,
        spec: GroupSpec,
        numa_options: NumaOptions | None,
        options: RunOptions,
        events: EventBus | None = None,
    ) -> None:
        self._events = events
        self._spec = spec
        self._numa_options = numa_options
        self._options = options
        self.permit: Callable[[], bool] = lambda: True
        self.keeps_folder = False
        super().__init__(f"group {spec.name!r}", PContext)
        self._context: PContext | None = None

    @property
    def token(self) -> str:
        """Marks every process of the group in its environment, from its start."""
        return self._spec.token

    def plan(self) -> GroupPlan:
        """The plan, without starting anything."""
        self._forgotten = False
        return self._plan(binder.choose(self._spec, self._numa_options, os.environ))

    def _plan(self, spec: GroupSpec) -> GroupPlan:
        plan = plan_group(spec, os.environ)
        files.check_programs(plan.workers, os.environ, self._options.cwd)
        return plan

    async def _start(self) -> PContext:
        self._begin()
        spec = await binder.choose_and_probe(self._spec, self._numa_options, os.environ)
        self._context = PContext(
            self._plan(spec), self._options, work_of(spec), events=self._events
        )
        self._context.permit = self.permit
        self._context.keeps_folder = self.keeps_folder
        await self._context._start()
        return self._context

    def __await__(self) -> Generator[Any, Any, PContext]:
        return self._start().__await__()

    async def __aenter__(self) -> PContext:
        return await self._start()

    async def __aexit__(self, *exc_info: object) -> None:
        if self._context is not None:
            await self._context.__aexit__(*exc_info)


def refuse_in_main_import() -> None:
    """A script without a guard would start workers that start workers, and so on."""
    running = sys.modules.get("asupervise.functions.running")
    if running is not None and running.importing_main():
        raise RuntimeError(
            "start_processes was called while a worker was importing the main script, to have its "
            'functions: put what the script does under `if __name__ == "__main__":`'
        )
