"""One node's part in the agreement of all: joining rounds, reporting, deciding where it leads.

Keys, relative to the run::

    state/round            the present round; whoever leads writes it
    state/leader           who leads, leased, and the terms that all share
    state/failed/N/NODE    a node's first failure of its own in round N
    node/NODE              a node, leased
    place/RANK             who has the node rank, leased, where nodes were given any

Every node watches ``state/``; the leader ``node/`` as well. A round so costs each node a write
when it is ready and one when it has ended, and the leader two: O(n) over all n nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Final

from asupervise.elastic.board import FAILED, FOR_GOOD, Board, TermsError
from asupervise.elastic.decide import Policy
from asupervise.elastic.engine import Absent, Engine, EngineError, LeaseLostError, Put, Write
from asupervise.elastic.interruption import Interruption
from asupervise.elastic.leading import NODE, Leading
from asupervise.elastic.records import Culprit, Node, RecordError, Round, Terms, text_of
from asupervise.elastic.watchdog import Deadlines, deadlines_of

__all__ = ["Coordinator", "Interruption", "TermsError", "new_id"]

_PLACE: Final = "place/"


def new_id() -> str:
    """Of a node: no other has had it."""
    return os.urandom(8).hex()


class Coordinator:
    """A node's membership in a run; made by :meth:`open`.

    Args:
        engine: with a lease.
        node: how we present ourselves.
        terms: that all nodes share.
        policy: of the run, where we lead.
    """

    def __init__(self, engine: Engine, node: Node, terms: Terms, policy: Policy) -> None:
        self.engine = engine
        self.node = node
        self._policy = policy
        self._board = Board(engine, terms)
        self._leading = Leading(engine, self._board, terms, policy, lambda: self.node.id)
        self._tasks: list[asyncio.Task[None]] = []
        self._present = False
        self.on_opened: Callable[[Round], None] = lambda _: None

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, engine: Engine, node: Node, terms: Terms, policy: Policy
    ) -> AsyncIterator[Coordinator]:
        """Take part for as long as the context lasts; leaving it takes us out of the run.

        Raises:
            TermsError: if the run has other terms, or our node rank is taken.
            EngineError: if the engine cannot be had.
        """
        coordinator = cls(engine, node, terms, policy)
        try:
            await coordinator._enter()
            yield coordinator
        finally:
            await coordinator._close()

    @property
    def leads(self) -> bool:
        """Whether this node decides for all, as far as it knows."""
        return self._leading.leads

    # --- what the agent does -----------------------------------------------------------------

    async def join(self, port: int) -> Round:
        """Be ready, and wait until a round with us runs, or the run is over.

        Args:
            port: that we hold, for the case that rank 0 is ours.

        Raises:
            EngineError: if the engine cannot be had for as long as a round is waited for.
        """
        self.node = self.node._replace(port=port)
        while True:
            if time.monotonic() >= self.engine.alive_until:
                await self.rejoin()
            round = self._board.round
            if round is not None:
                if round.state == "over":
                    return round
                if round.state == "running" and self._runs(round):
                    return round
                if round.state == "open":
                    self.on_opened(round)
                # A spare is ready for the next round, whatever brings it; who has ended this one
                # waits until the next is there, for that may come with a delay.
                ended = round.state == "running" and round.group_rank(self.node.id) is not None
                wanted = round.number + (round.state == "running")
                if not ended and (self.node.ready != wanted or not self._present):
                    if round.state == "open" and round.delay_s and self._present:
                        await self._unless_moved_on(round, round.delay_s)
                        if self._board.round is not round:
                            continue
                    try:
                        await self._present_ourselves(ready=wanted)
                    except FOR_GOOD:
                        raise
                    except EngineError:
                        # Until our lease is lost by it: then we are to come back.
                        await self._board.pause()
                    continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.engine.alive_until - time.monotonic()):
                    await self._board.next_news()

    def _runs(self, round: Round) -> bool:
        member = round.group_rank(self.node.id) is not None
        return member and self.node.ready == round.number and self.node.done < round.number

    async def _unless_moved_on(self, round: Round, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._board.round is round:
                    await self._board.next_news()

    async def interruption(self) -> Interruption:
        """Wait until our workers are to be ended; see :class:`Interruption`."""
        joined = self.node.ready
        while (why := self._interruption(joined)) is None:
            await self._board.next_news()
        return why

    async def fenced(self) -> float:
        """Wait until our lease has not been renewed for so long that our workers must end.

        Returns:
            By when none may be alive unless SIGKILL was sent before: seconds on
            ``time.monotonic()``.
        """
        # The arithmetic stands in `asupervise.elastic.watchdog`.
        while True:
            ask, kill, _ = self._deadlines
            if (wait_s := ask - time.monotonic()) <= 0:
                return kill
            await asyncio.sleep(wait_s)

    def tell_deadlines(self, tell: Callable[[float], None]) -> bool:
        """Call `tell` with when none of our workers may be alive; now, and with each renewal."""

        def renewed() -> None:
            tell(self._deadlines.watchdog)

        self.engine.on_renewal = renewed
        renewed()
        return True

    @property
    def _deadlines(self) -> Deadlines:
        return deadlines_of(self.engine.alive_until, self.engine.lease_s)

    def _interruption(self, joined: int) -> Interruption | None:
        round = self._board.round
        if round is None or round.number < joined:
            return Interruption("superseded", "the engine has lost its data")
        if round.state == "over":
            return Interruption("over", round.why)
        if round.number != joined:
            return Interruption("superseded", round.why)
        others = [c for c, _ in self._board.failed.values() if c.node != self.node.id]
        if others:
            return Interruption("failed", f"rank {others[0].rank} failed")
        return None

    async def failing(self, culprit: Culprit) -> None:
        """Tell the others at once that a worker of ours has failed; again, when more is known."""
        key = f"{FAILED}{culprit.round}/{self.node.id}"
        told = await self._persist([Put(key, text_of(culprit))])
        self.node = self.node._replace(told=told or 0)

    async def ended(self, how: str) -> None:
        """Tell the others that no worker of ours is left of this round."""
        number = self.node.ready
        self.node = self.node._replace(done=number, how=how)
        if self._present and self._board.round is not None and self._board.round.number == number:
            await self._present_ourselves(ready=number)

    async def rejoin(self) -> None:
        """After we were fenced: come back as another node, when the engine can be had again.

        Raises:
            EngineError: if it cannot be had for as long as a round is waited for.
        """
        self._present = False
        give_up = time.monotonic() + self._policy.join_timeout_s
        while True:
            try:
                await self.engine.new_lease()
                break
            except EngineError as error:
                # Nothing of ours runs meanwhile.
                if time.monotonic() >= give_up or isinstance(error, FOR_GOOD):
                    raise
                await self._board.pause()
        self.node = self.node._replace(id=new_id(), ready=-1, done=-1, how="", told=0)
        await self._board.load()

    # --- being there -------------------------------------------------------------------------

    async def _enter(self) -> None:
        revision = await self._board.load()
        self._tasks = [
            asyncio.create_task(
                self._guarded(self._board.follow(revision)), name="asupervise follow"
            ),
            asyncio.create_task(self._guarded(self._leading.run()), name="asupervise lead"),
        ]

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _guarded(self, work: Coroutine[object, object, None]) -> None:
        try:
            await work
        except Exception as exc:
            # Whoever waits for news hears of it.
            self._board.fail(exc)

    async def _present_ourselves(self, ready: int) -> None:
        node = self.node._replace(ready=ready)
        if not self._present and node.node_rank is not None:
            await self._take_place(node)
        await self._persist([Put(NODE + node.id, text_of(node), leased=True)])
        self.node, self._present = node, True

    async def _take_place(self, node: Node) -> None:
        key = f"{_PLACE}{node.node_rank}"
        deadline = time.monotonic() + 1.5 * self.engine.lease_s
        while True:
            if (
                await self.engine.commit([Absent(key)], [Put(key, node.id, leased=True)])
                is not None
            ):
                return
            left = deadline - time.monotonic()
            snapshot = await self.engine.read(key)
            holder = snapshot.entries.get(key)
            if holder is None:
                continue
            if holder.value == node.id:
                return
            if left <= 0:
                raise TermsError(
                    f"node rank {node.node_rank} is taken by another node of this run",
                    hint="each node has a --node-rank of its own, or none has any",
                )
            # Of a node that has just died, perhaps: then it is free when that one's lease ends.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    async for _ in self.engine.watch(key, snapshot.revision):
                        break

    async def _persist(self, writes: Sequence[Write]) -> int | None:
        """Write, for as long as the others take us to be there; afterwards they need not know."""
        while True:
            try:
                return await self.engine.commit([], writes)
            except LeaseLostError:
                return None
            except RecordError:
                raise
            except EngineError:
                if time.monotonic() >= self.engine.alive_until:
                    return None
                await self._board.pause()
