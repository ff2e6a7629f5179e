"""Everybody knows beforehand who takes part: nothing to install, nothing to ask.

Every node is told its rank and the address of node 0, and takes the others to run as many workers
as it does itself. They do not hear of each other: what fails elsewhere is noticed when the
workers' connections break, and each node counts its own restarts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from asupervise.elastic.decide import after_failure
from asupervise.elastic.interruption import Interruption
from asupervise.elastic.records import Culprit, Member, Node, Round
from asupervise.elastic.rendezvous import Request

__all__ = ["StaticRendezvous", "open"]


class StaticRendezvous:
    """A :class:`~asupervise.elastic.rendezvous.Rendezvous` of nodes that do not talk."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._place = request.node.node_rank or 0
        count = request.terms.max_nodes
        me = request.node._replace(id=_id(self._place), node_rank=self._place)
        self.node: Node = me
        first = request.master_addr or (me.address if count == 1 else "")
        self._members = tuple(
            Member(
                _id(rank),
                me.host if rank == self._place else "",
                first if rank == 0 else me.address if rank == self._place else "",
                me.nproc,
                me.role,
                rank,
            )
            for rank in range(count)
        )
        self._round = Round(0, "open", why="the run begins")
        self._culprit: Culprit | None = None
        self.on_opened: Callable[[Round], None] = lambda _: None

    async def join(self, port: int) -> Round:
        if self._round.state == "open":
            self.on_opened(self._round)
            await asyncio.sleep(self._round.delay_s)
            self._round = self._round._replace(
                state="running",
                members=self._members,
                master_port=self._request.master_port or port,
            )
            self._culprit = None
        return self._round

    async def interruption(self) -> Interruption:
        if self._round.state == "running":
            # Nobody else ends it.
            await asyncio.get_running_loop().create_future()
        return Interruption("over", self._round.why)

    async def fenced(self) -> float:
        await asyncio.get_running_loop().create_future()
        raise AssertionError("there is no lease")

    def tell_deadlines(self, tell: Callable[[float], None]) -> bool:
        return False

    async def failing(self, culprit: Culprit) -> None:
        self._culprit = culprit

    async def ended(self, how: str) -> None:
        if self._culprit is not None:
            request = self._request
            self._round = after_failure(self._round, self._culprit, request.terms, request.policy)
        elif how == "succeeded":
            self._round = self._round._replace(
                state="over",
                succeeded=True,
                culprit=None,
                why="all workers succeeded",
            )
        else:
            why = "the workers were ended"
            self._round = self._round._replace(state="over", culprit=None, why=why)

    async def rejoin(self) -> None:
        return


def _id(rank: int) -> str:
    return f"node {rank}"


@asynccontextmanager
async def open(request: Request) -> AsyncIterator[StaticRendezvous]:
    """A run of nodes that know each other's places."""
    yield StaticRendezvous(request)
