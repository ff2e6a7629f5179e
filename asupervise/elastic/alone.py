"""A worker that is a group of its own, and is for the rest what it would be in a group of all.

All workers are planned together, so that each has the binding, the files and the prefix of its
local rank; then one worker's part of that plan is run. The folders of the logs are named once an
attempt, for all workers, whenever each of them comes to it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping

from asupervise import files
from asupervise.bus import EventBus
from asupervise.cleanup import Survivor
from asupervise.context import PContext
from asupervise.handler import SubprocessHandler
from asupervise.logs import ATTEMPT_VARIABLE, LogsDest, LogsSpecs
from asupervise.plan import TOKEN_VARIABLE, GroupPlan, plan_group
from asupervise.spec import GroupSpec, RunOptions, checked_signal
from asupervise.telling import GroupTeller
from asupervise.work import Work, work_of

__all__ = ["Attempts", "LoneWorker"]

_COUNT_VARIABLE = "TORCHELASTIC_RESTART_COUNT"


class Attempts:
    """The plan of each worker's n-th start.

    Args:
        spec: of all workers, with their bindings.
        options: of each group.

    Attributes:
        first: the plan of all workers' first start.

    Raises:
        OSError: a program is missing or not executable.
        RankMapError, ValueError, BindingError: as `plan_group`.
    """

    def __init__(self, spec: GroupSpec, options: RunOptions) -> None:
        self._spec = spec
        self._options = options
        # By attempt, its files, and who has not come to it yet. Logs specs are asked once an
        # attempt: those of ours give a second call of the same number another run's folder, those
        # that were made for torch remove what is in the first one's.
        self._named: dict[int, tuple[LogsDest, set[int]]] = {}
        self.first = self._planned(0)
        files.check_programs(self.first.workers, os.environ, options.cwd)

    def worker(self, rank: int, count: int, events: EventBus | None = None) -> LoneWorker:
        """A worker, to be started; to be called once for each number of a rank.

        Args:
            rank: its local rank.
            count: how often it has been started before.
            events: who is told what happens to it.

        Raises:
            OSError: the program is missing or not executable.
            NotPicklableError: a function or an argument cannot travel to it.
        """
        plan = only(self.first if count == 0 else self._planned(count), rank)
        self._forget(rank, count)
        files.check_programs(plan.workers, os.environ, self._options.cwd)
        args = {rank: self._spec.args[rank]}
        # What its starts have left is written down together, by the service.
        options = self._options._replace(report=False)
        work = work_of(self._spec._replace(args=args))
        return LoneWorker(plan, options, work, events=events)

    def _planned(self, count: int) -> GroupPlan:
        envs = {rank: _counted(env, count) for rank, env in self._spec.envs.items()}
        if count not in self._named:
            logs = LogsDest.of(self._spec.logs_specs.reify({r: dict(envs[r]) for r in envs}))
            self._named[count] = logs, set(envs)
        named = _Named(self._named[count][0])
        return plan_group(self._spec._replace(envs=envs, logs_specs=named), os.environ)

    def _forget(self, rank: int, count: int) -> None:
        left = self._named[count][1]
        left.discard(rank)
        if not left:
            del self._named[count]


def _counted(env: Mapping[str, str], count: int) -> dict[str, str]:
    # Its own count, not that of the job's attempts.
    kept = {name: value for name, value in env.items() if name != ATTEMPT_VARIABLE}
    return {**kept, _COUNT_VARIABLE: str(count)}


class _Named(LogsSpecs):
    """Files that have been named already."""

    def __init__(self, logs: LogsDest) -> None:
        super().__init__()
        self._logs = logs

    @property
    def root_log_dir(self) -> str:
        return ""

    def reify(self, envs: Mapping[int, Mapping[str, str]]) -> LogsDest:
        return self._logs


def only(plan: GroupPlan, rank: int) -> GroupPlan:
    """One worker's part of a plan, with a token of its own: nobody else is ended with it.

    The run's folder, if it is a temporary one, is not the part's to remove.

    Example:
        >>> from asupervise.spec import checked_spec
        >>> maps = {0: ("a",), 1: ("b",)}, {0: {}, 1: {}}
        >>> spec = checked_spec("t", "echo", *maps, None, None, "spawn", (), None, None, None)
        >>> [w.argv for w in only(plan_group(spec, {}), 1).workers]
        [('echo', 'b')]
    """
    worker = plan.workers[rank]
    token = f"asv-{os.urandom(8).hex()}"
    env = {**worker.env, TOKEN_VARIABLE: f"{worker.env[TOKEN_VARIABLE]}:{token}"}
    return plan._replace(
        workers=(worker._replace(env=env),),
        logs=_only_logs(plan.logs, rank),
        token=token,
        warnings=(),
    )


def _only_logs(logs: LogsDest, rank: int) -> LogsDest:
    def of(paths: Mapping[int, str]) -> dict[int, str]:
        return {rank: paths[rank]} if rank in paths else {}

    return LogsDest(
        stdouts=of(logs.stdouts),
        stderrs=of(logs.stderrs),
        tee_stdouts=of(logs.tee_stdouts),
        tee_stderrs=of(logs.tee_stderrs),
        error_files=of(logs.error_files),
        filtered_stdout=_own_file(logs.filtered_stdout, rank),
        filtered_stderr=_own_file(logs.filtered_stderr, rank),
        run_dir=logs.run_dir,
    )


def _own_file(path: str, rank: int) -> str:
    # A group empties its file of filtered lines when it starts: what the others have in it.
    stem, extension = os.path.splitext(path)
    return f"{stem}.{rank}{extension}" if path else ""


class LoneWorker(PContext):
    """A group of one worker, of any local rank.

    Attributes:
        local_rank: the worker's.
        survivors: processes of it that could not be ended, a sentence each; known at the end.
    """

    def __init__(
        self, plan: GroupPlan, options: RunOptions, work: Work, *, events: EventBus | None = None
    ) -> None:
        super().__init__(plan, options, work, events=events)
        self.local_rank = plan.workers[0].local_rank
        self.survivors: tuple[str, ...] = ()

    def _told_by(self) -> GroupTeller:
        return GroupTeller(self._bus, self.plan, part=True)

    async def start(self) -> None:
        """Start it.

        Raises:
            OSError, SupervisorError: as `start_processes` when awaited.
        """
        try:
            await self._start()
        except Exception:
            await self.gone()  # its task has said so, and has a step to do
            raise

    def request_end(self, sig: int, grace_s: float) -> None:
        """What `close` does, without waiting; also before and while it is started."""
        self._request_end(sig, grace_s)

    async def gone(self) -> None:
        """As `wait`, without a result: also where the loop that is shutting down took it."""
        if self._life is not None:
            await asyncio.wait({self._life})

    def pass_on(self, sig: int) -> None:
        """Send a signal to its process group, if it runs; ends nothing by itself.

        Raises:
            ValueError: for a signal that does not exist.
            PermissionError: if the kernel refuses it.
        """
        sig = checked_signal(sig)
        if (handler := self._handler) is not None and handler.running:
            handler.send_signal(sig)

    @property
    def pid(self) -> int | None:
        """Its process id while it runs, or None."""
        handler = self._handler
        return handler.pid if handler is not None and handler.running else None

    @property
    def uptime_s(self) -> float:
        """Seconds from its start to its exit, or until now; 0 if it has not been started."""
        handler = self._handler
        if handler is None:
            return 0.0
        end_ns = time.monotonic_ns() if handler.exit is None else handler.exit.monotonic_ns
        return (end_ns - handler.started_ns) / 10**9

    @property
    def _handler(self) -> SubprocessHandler | None:
        return self._handlers.get(self.local_rank)

    async def _end(self) -> list[Survivor]:
        survivors = await super()._end()
        self.survivors = tuple(map(str, survivors))
        return survivors
