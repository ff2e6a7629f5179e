"""The one node that decides for all, from what all have written down."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Final

from asupervise.elastic.board import FAILED, FOR_GOOD, LEADER, ROUND, Board
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
from asupervise.elastic.records import Node, Round, Terms, read_record, text_of

__all__ = ["NODE", "Leading"]

NODE: Final = "node/"
# A run that is over is remembered for those who come late.
_REMEMBERED_S: Final = 3600.0


class Leading:
    """A node's part as the leader: it tries to become it, and decides while it is.

    Args:
        engine: with a lease.
        board: what the node knows.
        terms: that all nodes share.
        policy: of the run.
        node_id: gives the node's present id.
    """

    def __init__(
        self,
        engine: Engine,
        board: Board,
        terms: Terms,
        policy: Policy,
        node_id: Callable[[], str],
    ) -> None:
        self._engine = engine
        self._board = board
        self._terms = terms
        self._policy = policy
        self._node_id = node_id
        self._nodes: dict[str, tuple[Node, int]] = {}
        self._opened_at = self._enough_since = 0.0
        self._enough = False
        self._seen_number = -1
        self._lost_at: float | None = None

    @property
    def leads(self) -> bool:
        """Whether this node leads, as far as it knows."""
        return self._board.leader_id == self._node_id()

    async def run(self) -> None:
        """Lead whenever nobody else does; never returns."""
        while True:
            heard = self._board.heard
            try:
                if self._board.leader is None and self._board.broken is None:
                    # Everybody tries: O(n) calls, once for each leader that is lost.
                    await self._try_to_lead(heard)
                elif self.leads:
                    await self._lead_on()
                else:
                    await self._board.next_news()
            except FOR_GOOD:
                raise
            except LeaseLostError:
                await self._board.next_news(heard)
            except EngineError:
                await self._board.pause()

    async def _try_to_lead(self, heard: int) -> None:
        put = self._leadership()
        revision = await self._engine.commit([Absent(LEADER)], [put])
        if revision is not None:
            self._board.learn(Change(LEADER, Entry(put.value, revision, revision), revision))
            self._board.tell()
        elif self._board.leader is None:
            # Another one: the watch is about to say who.
            await self._board.next_news(heard)

    def _leadership(self) -> Put:
        terms = json.loads(text_of(self._terms))
        return Put(LEADER, json.dumps({**terms, "leader": self._node_id()}), leased=True)

    async def _lead_on(self) -> None:
        """Decide, for as long as we lead."""
        snapshot = await self._engine.read(NODE)
        self._nodes = {}
        for key, entry in snapshot.entries.items():
            self._learn_node(Change(key, entry, entry.modified))
        watching = asyncio.create_task(self._follow_nodes(snapshot.revision))
        try:
            while self.leads and not watching.done():
                heard = self._board.heard
                wait_s = await self._decide()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        # Of the end of our leadership, perhaps, and nobody would lead.
                        await self._board.next_news(heard)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _follow_nodes(self, revision: int) -> None:
        try:
            async for changes in self._engine.watch(NODE, revision):
                for change in changes:
                    self._learn_node(change)
                self._board.tell()
        finally:
            # Whoever waits for news of it has to look again.
            self._board.tell()

    def _learn_node(self, change: Change) -> None:
        name = change.key.removeprefix(NODE)
        if change.entry is None:
            self._nodes.pop(name, None)
        else:
            node = read_record(Node, change.entry.value, change.key)
            self._nodes[name] = (node, change.entry.created)

    async def _decide(self) -> float | None:
        """Decide as long as there is something to; returns for how long there is not."""
        while self.leads:
            now = time.monotonic()
            if self._board.round is None:
                if (wait_s := self._after_loss_s(now)) > 0:
                    return wait_s
                await self._write(self._first_round(), ())
                continue
            self._lost_at = None
            if any(node.told > self._board.revision for node, _ in self._nodes.values()):
                return None  # it tells of a failure that our other watch has not come to
            view = View(self._board.round, self._nodes, list(self._board.failed.values()))
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
        if self._board.last is None or self._board.last.state == "over":
            return 0.0
        if self._lost_at is None:
            self._lost_at = now
        return self._lost_at + self._engine.lease_s - now

    def _first_round(self) -> Round:
        last = self._board.last
        if last is None:
            return Round(0, "open", why="the run begins")
        if last.state == "over":
            return last
        return last._replace(
            number=last.number + 1, state="open", members=(), why="the engine lost its data",
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
        return [Delete(FAILED, under=True)]

    async def _write(self, round: Round, more: Sequence[Write]) -> None:
        over = round.state == "over"
        text = Put(ROUND, text_of(round), keep_s=_REMEMBERED_S if over else 0.0)
        before: Condition = Absent(ROUND)
        if self._board.round_entry is not None:
            before = Unchanged(ROUND, self._board.round_entry.modified)
        assert self._board.leader is not None
        conditions = [before, Unchanged(LEADER, self._board.leader.modified)]
        revision = await self._engine.commit(conditions, [text, *more])
        if revision is None:
            # Somebody else leads, or an attempt of ours that was not answered has come through.
            await self._board.load()
        else:
            created = self._board.round_entry.created if self._board.round_entry else revision
            self._board.learn(Change(ROUND, Entry(text.value, created, revision), revision))
            self._board.tell()
