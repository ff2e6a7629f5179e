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
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Final

from asupervise.elastic.decide import Clock, Policy, View, decide
from asupervise.elastic.engine import (
    Absent,
    Change,
    Condition,
    Delete,
    Engine,
    EngineError,
    Entry,
    LeaseLostError,
    Put,
    Unchanged,
    Write,
)
from asupervise.elastic.interruption import Interruption
from asupervise.elastic.records import (
    Culprit,
    Node,
    RecordError,
    Round,
    Terms,
    read_record,
    text_of,
)
from asupervise.elastic.watchdog import Deadlines, deadlines_of

__all__ = ["Coordinator", "Interruption", "TermsError"]

_ROUND: Final = "state/round"
_LEADER: Final = "state/leader"
_FAILED: Final = "state/failed/"
_NODE: Final = "node/"
_PLACE: Final = "place/"
# A run that is over is remembered for those who come late.
_REMEMBERED_S: Final = 3600.0


class TermsError(EngineError):
    """This node and the run do not fit: other numbers of nodes, a place that is taken."""


# To try again brings nothing else.
_FOR_GOOD: Final = (TermsError, RecordError)


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
        first_number: of the first round, where there is none.
        restarts: had so far, likewise.
    """

    def __init__(
        self, engine: Engine, node: Node, terms: Terms, policy: Policy, hold_s: float | None = None
    ) -> None:
        self.engine = engine
        self.node = node
        self._terms = terms
        self._policy = policy
        self._hold_s = hold_s
        self._round: Round | None = None
        self._round_entry: Entry | None = None
        self._leader: Entry | None = None
        self._failed: dict[str, tuple[Culprit, float]] = {}
        self._nodes: dict[str, tuple[Node, int]] = {}
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._broken: BaseException | None = None
        self._opened_at = self._enough_since = 0.0
        self._enough = False
        self._seen_number = -1
        # What we know of the run, should the engine lose it.
        self._last: Round | None = None
        self._lost_at: float | None = None
        # How far we know what lies under `state/`.
        self._revision = 0
        self._present = False

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

    # --- what the agent does -----------------------------------------------------------------

    async def join(self, port: int) -> Round:
        """Be ready, and wait until a round with us runs, or the run is over.

        Args:
            port: that we hold, for the case that rank 0 is ours.

        Raises:
            EngineError: if the engine cannot be had for as long as a round is waited for.
        """
        self.node = replace(self.node, port=port)
        while True:
            if time.monotonic() >= self.engine.alive_until:
                await self.rejoin()
            round = self._round
            if round is not None:
                if round.state == "over":
                    return round
                if round.state == "running" and self._runs(round):
                    return round
                # A spare is ready for the next round, whatever brings it; who has ended this one waits
                # until the next is there, for that may tell it to wait.
                ended = round.state == "running" and round.group_rank(self.node.id) is not None
                wanted = round.number + (round.state == "running")
                if not ended and (self.node.ready != wanted or not self._present):
                    if round.state == "open" and round.delay_s and self._present:
                        await self._unless_moved_on(round, round.delay_s)
                        if self._round is not round:
                            continue
                    try:
                        await self._present_ourselves(ready=wanted)
                    except _FOR_GOOD:
                        raise
                    except EngineError:
                        # Until our lease is lost by it: then we are to come back.
                        await self._pause()
                    continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.engine.alive_until - time.monotonic()):
                    await self._next_news()

    def _runs(self, round: Round) -> bool:
        member = round.group_rank(self.node.id) is not None
        return member and self.node.ready == round.number and self.node.done < round.number

    async def _unless_moved_on(self, round: Round, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._round is round:
                    await self._next_news()

    async def interruption(self) -> Interruption:
        """Wait until our workers are to be ended; see :class:`Interruption`."""
        joined = self.node.ready
        while (why := self._interruption(joined)) is None:
            await self._next_news()
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
        round = self._round
        if round is None or round.number < joined:
            return Interruption("superseded", "the engine has lost its data")
        if round.state == "over":
            return Interruption("over", round.why)
        if round.number != joined:
            return Interruption("superseded", round.why)
        others = [c for c, _ in self._failed.values() if c.node != self.node.id]
        if others:
            return Interruption("failed", f"rank {others[0].rank} failed")
        return None

    async def failing(self, culprit: Culprit) -> None:
        """Tell the others at once that a worker of ours has failed; again, when more is known."""
        key = f"{_FAILED}{culprit.round}/{self.node.id}"
        told = await self._persist([Put(key, text_of(culprit))])
        self.node = replace(self.node, told=told or 0)

    async def ended(self, how: str) -> None:
        """Tell the others that no worker of ours is left of this round."""
        number = self.node.ready
        self.node = replace(self.node, done=number, how=how)
        if self._present and self._round is not None and self._round.number == number:
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
                if time.monotonic() >= give_up or isinstance(error, _FOR_GOOD):
                    raise
                await self._pause()
        self.node = replace(self.node, id=new_id(), ready=-1, done=-1, how="", told=0)
        await self._load()

    # --- being there -------------------------------------------------------------------------

    async def _enter(self) -> None:
        revision = await self._load()
        self._tasks = [
            asyncio.create_task(self._guarded(self._follow(revision)), name="asupervise follow"),
            asyncio.create_task(self._guarded(self._lead()), name="asupervise lead"),
        ]

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _guarded(self, work: object) -> None:
        try:
            await work  # type: ignore[misc]
        except Exception as exc:
            # Whoever waits for news hears of it.
            self._broken = self._broken or exc
            self._tell()

    async def _load(self, *, anew: bool = False) -> int:
        snapshot = await self.engine.read("state/")
        if snapshot.revision < self._revision and not anew:
            # The watch was faster: this is older than what we know.
            self._tell()
            return self._revision
        self._revision = snapshot.revision
        self._round, self._round_entry, self._leader, self._failed = None, None, None, {}
        for key, entry in snapshot.entries.items():
            self._learn(Change(key, entry, entry.modified))
        self._tell()
        return snapshot.revision

    async def _follow(self, revision: int) -> None:
        while True:
            try:
                async for changes in self.engine.watch("state/", revision):
                    for change in changes:
                        self._learn(change)
                    self._tell()
            except _FOR_GOOD:
                raise
            except EngineError:
                revision = await self._loaded_again()

    async def _loaded_again(self) -> int:
        """Read all anew, as soon as the engine can be had; the lease decides what that means."""
        while True:
            await self._pause()
            try:
                return await self._load(anew=True)
            except _FOR_GOOD:
                raise
            except EngineError:
                continue

    def _learn(self, change: Change) -> None:
        key, entry = change.key, change.entry
        self._revision = max(self._revision, change.revision)
        known = {_LEADER: self._leader, _ROUND: self._round_entry}.get(key)
        if known is not None and change.revision < known.modified:
            return  # read already, in a newer state than the watch has come to
        if key == _LEADER:
            self._leader = entry
            if entry is not None:
                self._check_terms(entry)
        elif key == _ROUND:
            self._round_entry = entry
            self._round = None if entry is None else read_record(Round, entry.value, key)
            if self._round is not None:
                self._last = self._round
            self._failed = {
                node: known
                for node, known in self._failed.items()
                if self._round is not None and known[0].round == self._round.number
            }
        elif key.startswith(_FAILED) and entry is not None:
            culprit = read_record(Culprit, entry.value, key)
            if self._round is not None and culprit.round >= self._round.number:
                # What is written again tells more of the same failure, at another age.
                self._failed[culprit.node] = (culprit, time.monotonic())

    def _check_terms(self, entry: Entry) -> None:
        theirs = read_record(Terms, entry.value, _LEADER)
        if theirs != self._terms:
            raise TermsError(
                f"this node was started with {_said(self._terms)}, the run has {_said(theirs)}",
                hint="all nodes of a run are started with the same --nnodes and --max-restarts",
            )

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _next_news(self) -> None:
        if self._broken is not None:
            raise self._broken
        await self._news.wait()
        if self._broken is not None:
            raise self._broken

    async def _present_ourselves(self, ready: int) -> None:
        node = replace(self.node, ready=ready)
        if not self._present and node.node_rank is not None:
            await self._take_place(node)
        await self._persist([Put(_NODE + node.id, text_of(node), leased=True)])
        self.node, self._present = node, True

    async def _take_place(self, node: Node) -> None:
        key = f"{_PLACE}{node.node_rank}"
        deadline = time.monotonic() + 1.5 * self.engine.lease_s
        while True:
            if await self._committed([Absent(key)], [Put(key, node.id, leased=True)]) is not None:
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
                return await self._committed([], writes)
            except LeaseLostError:
                return None
            except RecordError:
                raise
            except EngineError:
                if time.monotonic() >= self.engine.alive_until:
                    return None
                await self._pause()

    async def _pause(self) -> None:
        """Before something is tried again that the engine has refused, for the moment."""
        await asyncio.sleep(min(1.0, self.engine.lease_s / 10))

    async def _committed(
        self, conditions: Sequence[Condition], writes: Sequence[Write]
    ) -> int | None:
        return await self.engine.commit(conditions, writes)

    # --- leading -----------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        return self._leader is not None and _leader_of(self._leader) == self.node.id

    async def _lead(self) -> None:
        while True:
            try:
                if self._leader is None and self._broken is None:
                    # Everybody tries: O(n) calls, once for each leader that is lost.
                    await self._try_to_lead()
                elif self.leads:
                    await self._lead_on()
                else:
                    await self._next_news()
            except _FOR_GOOD:
                raise
            except LeaseLostError:
                await self._next_news()
            except EngineError:
                await self._pause()

    async def _try_to_lead(self) -> None:
        put = self._leadership()
        revision = await self._committed([Absent(_LEADER)], [put])
        if revision is not None:
            self._learn(Change(_LEADER, Entry(put.value, revision, revision), revision))
            self._tell()
        elif self._leader is None:
            # Another one: the watch is about to say who.
            await self._next_news()

    def _leadership(self) -> Put:
        terms = json.loads(text_of(self._terms))
        return Put(_LEADER, json.dumps({**terms, "leader": self.node.id}), leased=True)

    async def _lead_on(self) -> None:
        """Decide, for as long as we lead."""
        snapshot = await self.engine.read(_NODE)
        self._nodes = {}
        for key, entry in snapshot.entries.items():
            self._learn_node(Change(key, entry, entry.modified))
        watching = asyncio.create_task(self._follow_nodes(snapshot.revision))
        try:
            while self.leads and not watching.done():
                wait_s = await self._decide()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._next_news()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _follow_nodes(self, revision: int) -> None:
        try:
            async for changes in self.engine.watch(_NODE, revision):
                for change in changes:
                    self._learn_node(change)
                self._tell()
        finally:
            # Whoever waits for news of it has to look again.
            self._tell()

    def _learn_node(self, change: Change) -> None:
        name = change.key.removeprefix(_NODE)
        if change.entry is None:
            self._nodes.pop(name, None)
        else:
            node = read_record(Node, change.entry.value, change.key)
            self._nodes[name] = (node, change.entry.created)

    async def _decide(self) -> float | None:
        """Decide as long as there is something to; returns for how long there is not."""
        while self.leads:
            now = time.monotonic()
            if self._round is None:
                if (wait_s := self._after_loss_s(now)) > 0:
                    return wait_s
                await self._write(self._first_round(), ())
                continue
            self._lost_at = None
            if any(node.told > self._revision for node, _ in self._nodes.values()):
                return None  # it tells of a failure that our other watch has not come to
            view = View(self._round, self._nodes, list(self._failed.values()))
            decision = decide(view, self._terms, self._policy, self._clock(view, now))
            if decision is None:
                return None
            if isinstance(decision, float):
                return max(0.0, decision - now)
            await self._write(decision, [*self._cleared(decision)])
        return None

    def _after_loss_s(self, now: float) -> float:
        """How long, when the run is lost to the engine, it is to rest.

        A node that has not heard of it yet may run workers until the lease ends that it believes to
        have: which was renewed before the loss.
        """
        if self._last is None or self._last.state == "over":
            return 0.0
        if self._lost_at is None:
            self._lost_at = now
        return self._lost_at + self.engine.lease_s - now

    def _first_round(self) -> Round:
        last = self._last
        if last is None:
            return Round(0, "open", why="the run begins")
        if last.state == "over":
            return last
        return replace(
            last, number=last.number + 1, state="open", members=(), why="the engine lost its data",
            order=tuple(m.id for m in last.members) or last.order,
        )  # fmt: skip

    def _clock(self, view: View, now: float) -> Clock:
        if view.round.number != self._seen_number:
            self._seen_number, self._opened_at, self._enough = view.round.number, now, False
        enough = view.ready_count >= self._terms.min_nodes
        if enough and not self._enough:
            self._enough_since = now
        self._enough = enough
        return Clock(now, self._opened_at, self._enough_since if enough else None)

    def _cleared(self, decision: Round) -> list[Write]:
        if decision.state == "running":
            return []
        return [Delete(_FAILED, under=True)]

    async def _write(self, round: Round, more: Sequence[Write]) -> None:
        over = round.state == "over"
        text = Put(_ROUND, text_of(round), keep_s=_REMEMBERED_S if over else 0.0)
        before: Condition = Absent(_ROUND)
        if self._round_entry is not None:
            before = Unchanged(_ROUND, self._round_entry.modified)
        assert self._leader is not None
        conditions = [before, Unchanged(_LEADER, self._leader.modified)]
        revision = await self._committed(conditions, [text, *more])
        if revision is None:
            # Somebody else leads, or an attempt of ours that was not answered has come through.
            await self._load()
        else:
            created = self._round_entry.created if self._round_entry else revision
            self._learn(Change(_ROUND, Entry(text.value, created, revision), revision))
            self._tell()


def _leader_of(entry: Entry) -> str:
    return str(json.loads(entry.value).get("leader", ""))


def _said(terms: Terms) -> str:
    return f"--nnodes={terms.min_nodes}:{terms.max_nodes} --max-restarts={terms.max_restarts}"
