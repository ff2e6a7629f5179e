"""A job on this node: one group of workers after another, as the run's rounds demand.

join ──► start ──► watch ──► report ──► join ...
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine, Generator, Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from asupervise.context import PContext
from asupervise.elastic.gate import Gate
from asupervise.elastic.interruption import Interruption
from asupervise.elastic.ports import HeldPort, is_taken
from asupervise.elastic.records import Culprit, Round
from asupervise.elastic.rendezvous import Rendezvous
from asupervise.elastic.telling import RunTeller
from asupervise.elastic.watchdog import Watchdog, watched
from asupervise.errors import NotPermittedError, SupervisorError
from asupervise.result import RunProcsResult
from asupervise.shielding import run_in_any_case

if TYPE_CHECKING:
    from signal import Signals

    from asupervise.failures import ProcessFailure
    from asupervise.signals import Signalled

__all__ = ["NO_HOOKS", "Agent", "Hooks", "Outcome", "Standing", "by_global_rank"]


# What the end of the others' workers may take beyond the time from SIGTERM to SIGKILL.
_OTHERS_END_S: Final = 5.0


class Standing(NamedTuple):
    """Where this node stands in a round.

    Attributes:
        round: the round.
        group_rank: the node's place in it.
        attempt: how many groups this node has started before.
        master_addr: where rank 0 listens, as far as the round knows; "" if not at all.
    """

    round: Round
    group_rank: int
    attempt: int

    @property
    def first_rank(self) -> int:
        return self.round.first_rank(self.group_rank)

    @property
    def master_addr(self) -> str:
        return self.round.members[0].address


class Outcome(NamedTuple):
    """How a run ended, as far as this node knows.

    Attributes:
        round: its last state.
        result: of this node's last group; None if it has started none.
        standing: in which round that was.
        stopped: whether this node was told to leave, by a signal.
    """

    round: Round | None
    result: RunProcsResult | None = None
    standing: Standing | None = None
    stopped: bool = False

    @property
    def culprit(self) -> Culprit | None:
        """What the run failed of; None while it may go on, or if no worker has failed."""
        if self.round is None or self.round.state != "over":
            return None
        return self.round.culprit


class Hooks(NamedTuple):
    """What whoever runs an agent wants to hear of.

    Attributes:
        on_group: called with each group, once it has been started, and with None when it has
            ended.
        on_round: called with each round, once, as soon as it is known that there will be one, and
            with the end of the run.
        stop: set when the node is to leave the run, as soon as its group has ended.
        on_warning: called with what is not as it should be between two groups, a sentence.
        stopped_by: by which signal the node has been told to leave; None if by none.
    """

    on_group: Callable[[Signalled | None], None] = lambda _: None
    on_round: Callable[[Round], None] = lambda _: None
    stop: asyncio.Event | None = None
    on_warning: Callable[[str], None] = lambda _: None
    stopped_by: Callable[[], Signals | None] = lambda: None


NO_HOOKS: Final = Hooks()


class Starting(Protocol):
    """What `start_processes` returns.

    Attributes:
        token: that all processes of the group will have in their environment.
        permit: asked before each worker's start.
        keeps_folder: whether a temporary folder stays unless all workers succeed.
    """

    permit: Callable[[], bool]
    keeps_folder: bool

    @property
    def token(self) -> str: ...

    def __await__(self) -> Generator[Any, Any, PContext]: ...


class Agent:
    """Runs a job on this node.

    Args:
        rendezvous: the node's part in the run.
        start: starts this node's group of a round.
        nproc: how many workers that has.
        shutdown_timeout_s: from SIGTERM to SIGKILL.
        hooks: see :class:`Hooks`.
        fixed_port: where the master's port was given, and none is to be held.
        gate: what is waited for between two groups.
        told: about rounds, and what becomes of them.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        start: Callable[[Standing], Starting],
        *,
        shutdown_timeout_s: float,
        hooks: Hooks = NO_HOOKS,
        fixed_port: int | None = None,
        gate: Gate,
        told: RunTeller,
    ) -> None:
        self._rendezvous = rendezvous
        self._told = told
        self._start = start
        self._shutdown_timeout_s = shutdown_timeout_s
        self._hooks = hooks
        self._fixed_port = fixed_port
        self._gate = gate
        self._watchdog = Watchdog()
        self._attempts = 0
        self._fenced = False

    async def run(self) -> Outcome:
        """Run rounds until the run is over, or this node leaves it.

        Raises:
            SupervisorError, OSError: if a group cannot be started here, or the engine is gone.
        """
        self._rendezvous.on_opened = self._on_round
        async with watched(self._rendezvous) as self._watchdog:
            return await self._run()

    def _on_round(self, round: Round) -> None:
        """There will be a round, or the run is over."""
        if self._told.round_is_news(round):
            self._hooks.on_round(round)

    async def _run(self) -> Outcome:
        last = Outcome(None)
        while True:
            with ExitStack() as stack:
                port = self._fixed_port
                if port is None:
                    port = stack.enter_context(HeldPort()).number
                round = await self._joined(port)
                if round is None:
                    return last._replace(stopped=True)
                self._on_round(round)
                if round.state == "over":
                    return last._replace(round=round)
                self._told.round_completed(round)
                if round.retries:
                    # It may be us whom rank 0's server cannot listen beside (no SO_REUSEADDR).
                    stack.close()
                last = await self._attend(round) or last
            self._hooks.on_group(None)

    async def _joined(self, port: int) -> Round | None:
        """The next round; None if we are to leave the run before there is one."""
        if self._hooks.stop is None:
            return await self._join(port)
        if self._hooks.stop.is_set():
            return None
        round = await _first(self._join(port), self._hooks.stop.wait())
        return round if isinstance(round, Round) else None

    async def _join(self, port: int) -> Round:
        await self._gate.passed()
        if self._fenced:
            # As long as the engine is away: a signal ends the wait, as any other.
            await self._rendezvous.rejoin()
            self._fenced = False
        return await self._rendezvous.join(port)

    async def _attend(self, round: Round) -> Outcome | None:
        """Run our group of the round; None if our lease has ended before it was there."""
        group_rank = round.group_rank(self._rendezvous.node.id)
        assert group_rank is not None, "a round that we have joined"
        standing = Standing(round, group_rank, self._attempts)
        self._attempts += 1
        await self._gate.before_start()
        started_ns = time.monotonic_ns()
        with ExitStack() as guarded:
            try:
                starting = self._start(standing)
                starting.permit = self._watchdog.permits
                starting.keeps_folder = True
                guarded.enter_context(self._watchdog.guarding(starting.token))
                ctx = await starting
            except NotPermittedError:
                # We have stood still, and others may have our ranks by now.
                self._fenced = True
                return None
            except (SupervisorError, OSError, ValueError) as error:
                await self._could_not_start(standing, error)
                raise
            async with ctx:
                self._watchdog.adopt(ctx)
                self._hooks.on_group(ctx)
                group = _Group(
                    ctx, standing, started_ns, self._rendezvous, self._shutdown_timeout_s,
                    lambda: self._watchdog.has_ended(starting.token), self._leaving,
                )  # fmt: skip
                result = await group.watch()
        self._fenced = group.fenced
        self._gate.shut(round, result, ctx.survivors, listened=group_rank == 0)
        return Outcome(round, result, standing)

    def _leaving(self) -> bool:
        return self._hooks.stop is not None and self._hooks.stop.is_set()

    async def _could_not_start(self, standing: Standing, error: Exception) -> None:
        from asupervise.elastic.culprits import culprit_of
        from asupervise.failures import ProcessFailure

        rank = standing.first_rank + (getattr(error, "local_rank", None) or 0)
        node = self._rendezvous.node
        said = ProcessFailure(
            rank - standing.first_rank, 0, 1, "", record=None,
            cause=f"could not be started: {error}",
        )  # fmt: skip
        told = culprit_of(
            said, node=node.id, host=node.host, round=standing.round.number, rank=rank,
            started_ns=time.monotonic_ns(),
        )  # fmt: skip
        await run_in_any_case(lambda: self._rendezvous.failing(told))
        await run_in_any_case(lambda: self._rendezvous.ended("failed"))
        # Who leaves before all others have ended their workers is lost, and no culprit.
        stop = self._hooks.stop or asyncio.Event()
        limit_s = self._shutdown_timeout_s + _OTHERS_END_S
        await _first(self._rendezvous.interruption(), asyncio.sleep(limit_s), stop.wait())


class _Group:
    """One group of this node, for as long as it runs.

    Args:
        killed: whether the watchdog has ended its workers.
        leaving: whether this node was told to leave the run: workers that then end with status 0
            have not finished.
    """

    def __init__(
        self,
        ctx: PContext,
        standing: Standing,
        started_ns: int,
        rendezvous: Rendezvous,
        shutdown_timeout_s: float,
        killed: Callable[[], bool],
        leaving: Callable[[], bool],
    ) -> None:
        self._ctx = ctx
        self._standing = standing
        self._started_ns = started_ns
        self._rendezvous = rendezvous
        self._shutdown_timeout_s = shutdown_timeout_s
        self._killed = killed
        self._leaving = leaving
        self._fencing = False

    @property
    def fenced(self) -> bool:
        """Whether its workers were ended because our lease could not be renewed in time."""
        return self._fencing or self._killed()

    async def watch(self) -> RunProcsResult:
        """Wait until it has ended, by itself or because the run wants it; tell the others."""
        fence = asyncio.create_task(self._fence())
        try:
            why = await _first(self._ctx.wait_failing(), self._rendezvous.interruption())
            if isinstance(why, Interruption):
                return await self._interrupted()
            if why is not None:
                await self._tell_at_once(why)
            result = await self._ctx.wait()
            await self._report(result)
            return result
        finally:
            fence.cancel()
            await asyncio.gather(fence, return_exceptions=True)

    async def _fence(self) -> None:
        """End the workers in time when our lease cannot be renewed, whatever else goes on."""
        kill_by = await self._rendezvous.fenced()
        self._fencing = True
        left_s = max(0.0, kill_by - time.monotonic())
        # Not longer, whatever else is to be done between SIGTERM and SIGKILL.
        with suppress(TimeoutError):
            async with asyncio.timeout(left_s):
                await self._ctx.close(timeout=left_s)
        await self._ctx.close(signal.SIGKILL, 0.0)

    async def _interrupted(self) -> RunProcsResult:
        await self._ctx.close(timeout=self._shutdown_timeout_s)
        result = await self._ctx.wait()
        await self._leave_round("stopped")
        return result

    async def _leave_round(self, how: str) -> None:
        if not self.fenced:
            await self._rendezvous.ended(how)

    async def _tell_at_once(self, local_rank: int) -> None:
        """That it has failed: the others end their workers while ours are being ended."""
        if self.fenced:
            return
        from asupervise.failures import ProcessFailure

        failure = ProcessFailure(
            local_rank, self._ctx.pids().get(local_rank, 0), 1, "", record=None,
            observed_monotonic_ns=time.monotonic_ns(),
        )  # fmt: skip
        await self._rendezvous.failing(self._culprit(local_rank, failure))

    async def _report(self, result: RunProcsResult) -> None:
        cause = result.root_cause
        if self.fenced:
            return
        if not result.is_failed():
            await self._leave_round("stopped" if self._leaving() else "succeeded")
        elif cause is None:
            await self._leave_round("stopped")
        else:
            await self._rendezvous.failing(self._with_port(self._culprit(*cause)))
            await self._leave_round("failed")

    def _with_port(self, culprit: Culprit) -> Culprit:
        """With what only this node can see: whether rank 0's port is somebody else's."""
        from asupervise.elastic.culprits import START_S

        # What rank 0 has said of it we know only if it was recorded, or went to a file. None of
        # ours is alive: who listens there is not one of them.
        if culprit.rank or culprit.uptime_s >= START_S:
            return culprit
        taken = culprit.port_taken or is_taken(self._standing.round.master_port)
        return culprit._replace(port_taken=taken)

    def _culprit(self, local_rank: int, failure: ProcessFailure) -> Culprit:
        # Imported here: most groups end well.
        from asupervise.elastic.culprits import culprit_of

        node = self._rendezvous.node
        return culprit_of(
            failure,
            node=node.id,
            host=node.host,
            round=self._standing.round.number,
            rank=self._standing.first_rank + local_rank,
            started_ns=self._started_ns,
        )


async def _first(*waiting: Coroutine[Any, Any, Any]) -> Any:
    """What the first of them returns; the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in waiting]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        # In their order: what has happened here comes before what is heard.
        return next(task for task in tasks if task in done).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def by_global_rank(values: Mapping[int, Any], standing: Standing) -> dict[int, Any]:
    """A map by local rank, by global rank."""
    return {standing.first_rank + local: value for local, value in values.items()}
