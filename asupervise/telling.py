"""Tells an event bus what happens in one group: what each event says is decided here."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from asupervise.bus import EventBus
from asupervise.plan import GroupPlan, WorkerPlan

if TYPE_CHECKING:
    from asupervise._compat import Exit
    from asupervise.affinity import RankBinding
    from asupervise.failures import ProcessFailure
    from asupervise.handler import SubprocessHandler
    from asupervise.memory import MemoryUse
    from asupervise.result import RunProcsResult
    from asupervise.stacks import Stack

__all__ = ["GroupTeller", "ranks_of"]

_RUN_ID = "TORCHELASTIC_RUN_ID"
_ATTEMPTS = ("ASUPERVISE_ATTEMPT", "TORCHELASTIC_RESTART_COUNT")
# Of a message and of each text in a failure: a consumer holds thousands of events.
_TEXT_CHARS = 16_384


class GroupTeller:
    """What happens in one group, as events of it.

    Args:
        bus: who is told.
        plan: of the group.
        part: whether it is only a worker of a service, which tells its own start and end.
    """

    def __init__(self, bus: EventBus, plan: GroupPlan, *, part: bool = False) -> None:
        self.bus = bus
        self._plan = plan
        self._part = part
        self._started: set[int] = set()
        self._told_to_end = 0
        self._began_ns = time.monotonic_ns()
        self._ranks = ranks_of(plan)
        self._ids: dict[str, Any] = {
            "run_id": _first(plan, _RUN_ID),
            "group": plan.name,
            "attempt": _attempt(plan),
            "node": os.uname().nodename,
        }

    def _tell(self, kind: str, at_ns: int | None = None, /, **fields: Any) -> None:
        self.bus.tell(kind, at_ns, **self._ids, **fields)

    def _of_worker(
        self, kind: str, local_rank: int, pid: int, *, at_ns: int | None = None, **fields: Any
    ) -> None:
        rank = self._ranks.get(local_rank, local_rank)
        self._tell(kind, at_ns, local_rank=local_rank, rank=rank, pid=pid, **fields)

    # --- the group ----------------------------------------------------------------------------

    def starting(self, cwd: str | None) -> None:
        """The group is about to be started, in that folder or, if it is None, in ours."""
        self._began_ns = time.monotonic_ns()
        if self._part:
            return
        plan = self._plan
        self._tell(
            "GroupStarting",
            nprocs=plan.nprocs,
            entrypoint=plan.workers[0].program if plan.workers else "",
            log_dir=plan.logs.run_dir or None,
            temporary=plan.logs.temporary,
            cwd=_absolute(cwd),
        )

    def ended(self, result: RunProcsResult, *, failures_told: bool = False) -> None:
        """The result is there: each failure, each warning, and the end.

        Args:
            result: of the group.
            failures_told: whether all failures have been told of, as they came. Of a part they
                are told by the service, which knows what follows.
        """
        cause = result.root_cause
        if not (failures_told or self._part):
            for local_rank, failure in result.failures.items():
                self.failed(failure, root_cause=cause is not None and cause[0] == local_rank)
        for warning in result.warnings:
            self.warned(warning)
        if self._part:
            return
        self._tell(
            "GroupEnded",
            succeeded=not result.is_failed(),
            root_cause=self._ranks.get(cause[0], cause[0]) if cause else None,
            duration_s=(time.monotonic_ns() - self._began_ns) / 10**9,
        )

    def warned(self, text: str) -> None:
        self._tell("Warned", text=text)

    def signal_sent(self, sig: int, ranks: Sequence[int]) -> None:
        """As somebody has asked for."""
        self._tell("SignalSent", signal=_name(sig), ranks=tuple(ranks))

    def ending(self, sig: int, ranks: Sequence[int]) -> None:
        """A signal that ends the group: the first, or one that goes further."""
        if sig == self._told_to_end:
            return  # to those that a hurried request has just sent it to
        kind = "Escalated" if self._told_to_end else "SignalSent"
        why = {} if self._told_to_end else {"why": "ending"}
        self._told_to_end = sig
        self._tell(kind, signal=_name(sig), ranks=tuple(ranks), **why)

    def not_started(self, error: BaseException) -> None:
        """Somebody could not be started, and the group is over."""
        self.warned(f"the group could not be started: {error}")
        if self._part:
            return
        self._tell(
            "GroupEnded",
            succeeded=False,
            duration_s=(time.monotonic_ns() - self._began_ns) / 10**9,
        )

    def restarting(self, local_rank: int, restarts: int, reason: str, delay_s: float) -> None:
        """A worker of a service."""
        self._tell(
            "Restarting",
            restarts=restarts, reason=reason, delay_s=delay_s, local_rank=local_rank,
        )  # fmt: skip

    def stacks_dumped(self, stacks: Mapping[int, Stack]) -> None:
        texts = {rank: stack.summary for rank, stack in sorted(stacks.items())}
        self._tell("StacksDumped", stacks=texts)

    # --- its workers --------------------------------------------------------------------------

    def worker_started(self, handler: SubprocessHandler) -> None:
        plan = handler.plan
        if plan.local_rank in self._started:
            return
        self._started.add(plan.local_rank)
        self._of_worker(
            "WorkerStarted", plan.local_rank, handler.pid, at_ns=handler.started_ns,
            argv=plan.argv, binding=_bound(plan.binding), stdout=plan.stdout, stderr=plan.stderr,
        )  # fmt: skip

    def worker_exited(self, handler: SubprocessHandler, exit: Exit, peak: int | None) -> None:
        self._of_worker(
            "WorkerExited", handler.local_rank, handler.pid, at_ns=exit.monotonic_ns,
            exitcode=exit.code,
            uptime_s=(exit.monotonic_ns - handler.started_ns) / 10**9,
            peak_rss_bytes=peak,
        )  # fmt: skip

    def first_output(self, worker: WorkerPlan, pid: int, stream: str) -> None:
        self._of_worker("FirstOutput", worker.local_rank, pid, stream=stream)

    def heartbeat(self, local_rank: int, pid: int) -> None:
        self._of_worker("Heartbeat", local_rank, pid)

    def progress(self, local_rank: int, pid: int, done: float, total: float | None) -> None:
        self._of_worker("Progress", local_rank, pid, done=done, total=total)

    def sampled(self, handler: SubprocessHandler, used: MemoryUse, cpu_s: float) -> None:
        self._of_worker(
            "ResourceSample", handler.local_rank, handler.pid, rss_bytes=used.last, cpu_s=cpu_s
        )

    def failed(self, failure: ProcessFailure, *, root_cause: bool) -> None:
        """What is known of a worker's failure."""
        message = failure.message
        self._of_worker(
            "WorkerFailed", failure.local_rank, failure.pid,
            exitcode=failure.exitcode,
            signal=_name(-failure.exitcode) if failure.exitcode < 0 else "",
            cause=failure.cause,
            message=_cut(message if isinstance(message, str) else str(message.get("message", ""))),
            traceback=_cut(failure.traceback),
            stack=failure.stack,
            stderr_tail=_cut(failure.stderr_tail),
            error_file=failure.error_file if failure.record is not None else "",
            peak_rss_bytes=failure.peak_rss_bytes,
            ended_by_us=failure.ended_by_us,
            root_cause=root_cause,
        )  # fmt: skip


def ranks_of(plan: GroupPlan) -> dict[int, int]:
    """Each worker's rank over all nodes, by local rank, as its environment says."""
    return {worker.local_rank: worker.rank for worker in plan.workers}


def _attempt(plan: GroupPlan) -> int:
    env = plan.workers[0].env if plan.workers else {}
    name = next((name for name in _ATTEMPTS if name in env), _ATTEMPTS[0])
    return _number(env, name, 0)


def _first(plan: GroupPlan, name: str) -> str:
    return plan.workers[0].env.get(name, "") if plan.workers else ""


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    # Of a caller's own environment, which may say anything.
    text = env.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else default


def _bound(binding: RankBinding | None) -> str:
    if binding is None:
        return ""
    from asupervise.binding import format_ranges

    memory = f", memory node {format_ranges(binding.memory_nodes)}" if binding.memory_nodes else ""
    return f"CPUs {format_ranges(binding.cpus)}{memory}: {binding.why}"


def _name(sig: int) -> str:
    try:
        return signal.Signals(sig).name
    except ValueError:
        return f"signal {sig}"  # the real-time signals between the first and last are unnamed


def _cut(text: str) -> str:
    if len(text) <= _TEXT_CHARS:
        return text
    half = _TEXT_CHARS // 2
    return f"{text[:half]}\n... ({len(text) - 2 * half} characters left out) ...\n{text[-half:]}"


def _absolute(folder: str | None) -> str:
    try:
        return os.path.abspath(folder or os.curdir)
    except OSError:
        return ""  # ours has been removed
