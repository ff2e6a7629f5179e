"""How nodes come together: the same tests on every engine. No workers are started."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol, TypeVar

import pytest

from asupervise.elastic.coordinator import Coordinator, TermsError
from asupervise.elastic.decide import Policy
from asupervise.elastic.engine import Condition, Delete, Engine, EngineError, Put, Write
from asupervise.elastic.interruption import Interruption
from asupervise.elastic.log_engine import LogEngine, Reader
from asupervise.elastic.records import Culprit, Node, RecordError, Round, Terms
from asupervise.elastic.rendezvous import Request, c10d, static
from asupervise.elastic.store_log import StoreLog
from tests.elastic.etcd_server import EtcdCluster, etcd, etcd_cluster, not_installed
from tests.elastic.memory_engine import MemoryEngines
from tests.elastic.memory_store import MemoryStore

__all__ = ["etcd"]  # a fixture

T = TypeVar("T")

# For whatever must come, on a machine that has much else to do.
PATIENCE_S = 30.0
# Nobody waits for it in a test that passes.
LONG_S = 600.0

QUICK = Policy(
    last_call_s=LONG_S, join_timeout_s=LONG_S, backoff_s=0.0, min_uptime_s=1.0, stable_s=300.0
)


# --- engines --------------------------------------------------------------------------------------


class Backend(Protocol):
    """What stands between the nodes."""

    async def engine(self) -> Engine:
        """One for another node of the same run."""

    async def lose_data(self) -> None:
        """All keys and leases are gone."""


class MemoryBackend:
    lease_s = 1.0

    def __init__(self) -> None:
        self.engines = MemoryEngines()

    async def engine(self) -> LogEngine:
        return await self.engines.open(self.lease_s, timeout_s=1.0)

    async def lose_data(self) -> None:
        self.engines.reset()


class StoreBackend:
    """The log of the c10d backend, in a store of ours."""

    lease_s = 1.0

    def __init__(self) -> None:
        self.store = MemoryStore()

    async def engine(self) -> LogEngine:
        async def opener(reader: Reader) -> StoreLog:
            store = self.store
            return await StoreLog.open(
                "the store", "run/", store.connect, store.reachable, 0.08 * self.lease_s, reader
            )

        return await LogEngine.open(opener, lease_s=self.lease_s, timeout_s=5.0)

    async def lose_data(self) -> None:
        self.store.lose()


class EtcdBackend:
    # etcd grants no less.
    lease_s = 2.0

    def __init__(self, cluster: EtcdCluster) -> None:
        self._cluster = cluster
        self._prefix = f"/tests/{secrets.token_hex(8)}/"

    async def engine(self) -> Engine:
        from asupervise.elastic.rendezvous.etcd_engine import EtcdConfig, EtcdEngine

        return await EtcdEngine.open(
            EtcdConfig(self._cluster.endpoints, self._prefix, lease_s=self.lease_s, timeout_s=10.0)
        )

    async def lose_data(self) -> None:
        await asyncio.to_thread(self._cluster.wipe)


@pytest.fixture(scope="module", autouse=True)
def cluster(request: pytest.FixtureRequest) -> Iterator[EtcdCluster | None]:
    """Started before any test, which would be blamed for leaving it."""
    if not_installed() or importlib.util.find_spec("aetcd") is None:
        yield None
        return
    yield request.getfixturevalue("etcd")


@pytest.fixture
def closed_files(cluster: EtcdCluster | None) -> Iterator[None]:
    """gRPC closes connections in threads of its own, and tells nobody when it has."""
    before = open_files()
    yield
    gc.collect()
    deadline = time.monotonic() + 5.0
    while open_files() - before and time.monotonic() < deadline:
        time.sleep(0.01)


def open_files() -> set[tuple[str, str]]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        # The one that lists them is gone.
        with contextlib.suppress(FileNotFoundError):
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
    return found


@pytest.fixture(params=["memory", "store", "etcd"])
def backend(
    request: pytest.FixtureRequest, cluster: EtcdCluster | None, closed_files: None
) -> Backend:
    if request.param == "memory":
        return MemoryBackend()
    if request.param == "store":
        return StoreBackend()
    if cluster is None:
        pytest.skip(not_installed() or "aetcd is not installed")
    return EtcdBackend(cluster)


@pytest.fixture
def own_backend(backend: Backend, tmp_path: Any) -> Iterator[Backend]:
    """One whose data may be lost."""
    if isinstance(backend, EtcdBackend):
        with etcd_cluster(tmp_path) as cluster:
            yield EtcdBackend(cluster)
    else:
        yield backend


# --- nodes ----------------------------------------------------------------------------------------


async def soon(what: Awaitable[T]) -> T:
    async with asyncio.timeout(PATIENCE_S):
        return await what


class Peer:
    """A node, without workers; the test does what its agent would."""

    def __init__(self, name: str, engine: Engine, coordinator: Coordinator) -> None:
        self.name = name
        self.engine = engine
        self.coordinator = coordinator
        self.round: Round | None = None

    @property
    def id(self) -> str:
        return self.coordinator.node.id

    @property
    def leads(self) -> bool:
        return self.coordinator.leads

    async def join(self, port: int = 0) -> Round:
        self.round = await soon(self.coordinator.join(port))
        return self.round

    async def interrupted(self) -> Interruption:
        return await soon(self.coordinator.interruption())

    async def end(self, how: str) -> None:
        await soon(self.coordinator.ended(how))

    async def fail(self, rank: int | None = None, **more: Any) -> None:
        """A worker of it fails, and all of its workers have ended."""
        await self.report(rank, **more)
        await self.end("failed")

    async def report(self, rank: int | None = None, **more: Any) -> None:
        assert self.round is not None
        place = self.round.group_rank(self.id)
        assert place is not None
        rank = self.round.first_rank(place) if rank is None else rank
        more = {"uptime_s": 60.0, **more}
        await soon(self.coordinator.failing(Culprit(self.id, self.round.number, rank, **more)))

    async def fall_silent(self) -> None:
        """What is left of a node that was killed: a lease that nobody renews."""
        await self.coordinator._close()
        self.halt_renewals()

    def halt_renewals(self) -> None:
        keeper = self.engine._keeper  # type: ignore[attr-defined]
        keeper.cancel()

    async def leave(self) -> None:
        await self.coordinator._close()
        await self.engine.close()


class Nodes:
    """The nodes of a run."""

    def __init__(self, backend: Backend, stack: AsyncExitStack) -> None:
        self.backend = backend
        self._stack = stack

    async def add(
        self,
        name: str,
        terms: Terms,
        policy: Policy = QUICK,
        *,
        nproc: int = 1,
        node_rank: int | None = None,
    ) -> Peer:
        engine = await soon(self.backend.engine())
        self._stack.push_async_callback(engine.close)
        node = Node(f"{name}-{secrets.token_hex(2)}", name, f"10.0.0.{name}", nproc, "default")
        opened = Coordinator.open(engine, node._replace(node_rank=node_rank), terms, policy)
        return Peer(name, engine, await soon(self._stack.enter_async_context(opened)))

    async def started(
        self, names: str, terms: Terms, policy: Policy = QUICK, **more: Any
    ) -> list[Peer]:
        """Several that are in a round together, in this order."""
        peers: list[Peer] = []
        joining = []
        for name in names:
            peers.append(await self.add(name, terms, policy, **more))
            joining.append(asyncio.ensure_future(peers[-1].join()))
            await self.present(peers[-1])
        await asyncio.gather(*joining)
        return peers

    async def present(self, peer: Peer) -> None:
        """Wait until the others can see it."""
        await self.wait_for(peer, lambda keys: f"node/{peer.id}" in keys)

    async def gone(self, peer: Peer, seen_by: Peer) -> None:
        await self.wait_for(seen_by, lambda keys: f"node/{peer.id}" not in keys)

    async def wait_for(self, peer: Peer, condition: Any) -> None:
        async with asyncio.timeout(PATIENCE_S):
            snapshot = await peer.engine.read()
            keys = set(snapshot.entries)
            changes = peer.engine.watch("", snapshot.revision)
            try:
                while not condition(keys):
                    for change in await anext(changes):
                        if change.entry is None:
                            keys.discard(change.key)
                        else:
                            keys.add(change.key)
            finally:
                await changes.aclose()  # type: ignore[attr-defined]


@asynccontextmanager
async def nodes_on(backend: Backend) -> AsyncIterator[Nodes]:
    async with AsyncExitStack() as stack:
        yield Nodes(backend, stack)


@pytest.fixture
async def nodes(backend: Backend) -> AsyncIterator[Nodes]:
    async with nodes_on(backend) as found:
        yield found


async def joined(*peers: Peer) -> Round:
    """The round that all of them are in."""
    rounds = await asyncio.gather(*(peer.join() for peer in peers))
    assert all(round == rounds[0] for round in rounds), rounds
    return rounds[0]


def hosts(round: Round) -> str:
    return "".join(member.host for member in round.members)


def leader_of(*peers: Peer) -> Peer:
    (leader,) = [peer for peer in peers if peer.leads]
    return leader


# --- coming together ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_a_round_begins_at_once_when_all_are_there(nodes: Nodes, count: int) -> None:
    peers = [await nodes.add(name, Terms(1, count)) for name in "abc"[:count]]
    round = await joined(*peers)
    assert (round.state, round.number, round.restarts) == ("running", 0, 0)
    assert sorted(hosts(round)) == list("abc"[:count])
    assert {round.group_rank(peer.id) for peer in peers} == set(range(count))


async def test_a_round_begins_with_the_fewest_after_the_last_call(nodes: Nodes) -> None:
    policy = QUICK._replace(last_call_s=0.5)
    before = time.monotonic()
    peers = await nodes.started("ab", Terms(2, 3), policy)
    assert time.monotonic() - before >= 0.5
    assert hosts(peers[0].round) == "ab"


async def test_ranks_are_laid_out_node_by_node(nodes: Nodes) -> None:
    terms = Terms(3, 3)
    peers = [
        await nodes.add(name, terms, nproc=nproc, node_rank=rank)
        for rank, (name, nproc) in enumerate([("a", 2), ("b", 1), ("c", 4)])
    ]
    round = await joined(*peers)
    assert [round.first_rank(place) for place in range(3)] == [0, 2, 3]
    assert round.world_size == 7
    assert [member.nproc for member in round.members] == [2, 1, 4]


async def test_node_ranks_that_are_given_win(nodes: Nodes) -> None:
    terms = Terms(3, 3)
    peers = [
        await nodes.add(name, terms, node_rank=rank)
        for name, rank in [("a", 2), ("b", 0), ("c", 1)]
    ]
    assert hosts(await joined(*peers)) == "bca"


async def test_the_port_is_that_of_the_first_node(nodes: Nodes) -> None:
    one = await nodes.add("a", Terms(2, 2), node_rank=1)
    other = await nodes.add("b", Terms(2, 2), node_rank=0)
    rounds = await asyncio.gather(one.join(port=1111), other.join(port=2222))
    assert [(round.master_port, round.members[0].address) for round in rounds] == [
        (2222, "10.0.0.b")
    ] * 2


async def test_a_node_that_is_one_too_many_waits_as_a_spare(nodes: Nodes) -> None:
    terms = Terms(2, 2)
    one, other = await nodes.started("ab", terms)
    spare = await nodes.add("c", terms)
    waiting = asyncio.ensure_future(spare.join())
    await nodes.present(spare)
    await other.leave()
    assert (await one.interrupted()).kind == "superseded"
    await one.end("stopped")
    assert hosts(await one.join()) == "ac"
    assert (await waiting).number == 1
    await one.end("succeeded")
    await spare.end("succeeded")
    assert (await joined(one, spare)).succeeded


async def test_a_spare_is_told_when_the_run_is_over(nodes: Nodes) -> None:
    (one,) = await nodes.started("a", Terms(1, 1))
    spare = await nodes.add("b", Terms(1, 1))
    waiting = asyncio.ensure_future(spare.join())
    await nodes.present(spare)
    await one.end("succeeded")
    over = await one.join()
    assert (over.number, over.state, over.succeeded) == (0, "over", True)
    assert await waiting == over


async def test_a_late_node_with_room_causes_a_new_round_without_a_restart(nodes: Nodes) -> None:
    terms, policy = Terms(1, 3), QUICK._replace(last_call_s=1.0)
    (one,) = await nodes.started("a", terms, policy)
    late = await nodes.add("b", terms, policy)
    joining = asyncio.ensure_future(late.join())
    assert await one.interrupted() == Interruption("superseded", "a node has joined")
    await one.end("stopped")
    round = await one.join()
    assert await joining == round
    assert (round.number, hosts(round), round.restarts) == (1, "ab", 0)


@pytest.mark.parametrize("how", ["leaves", "falls silent"])
async def test_without_a_node_the_others_go_on_in_the_same_order(nodes: Nodes, how: str) -> None:
    peers = await nodes.started("abcd", Terms(2, 4))
    lost = peers.pop(1)
    await (lost.leave() if how == "leaves" else lost.fall_silent())
    for peer in peers:
        assert await peer.interrupted() == Interruption("superseded", "node b is lost")
        await peer.end("stopped")
    round = await joined(*peers)
    assert (round.number, hosts(round), round.restarts) == (1, "acd", 0)


async def test_below_the_fewest_it_waits_for_another(nodes: Nodes) -> None:
    terms = Terms(2, 2)
    one, other = await nodes.started("ab", terms)
    await other.leave()
    assert (await one.interrupted()).kind == "superseded"
    await one.end("stopped")
    joining = asyncio.ensure_future(one.join())
    other = await nodes.add("c", terms)
    assert hosts(await other.join()) == "ac"
    assert (await joining).number == 1


async def test_who_waits_for_too_long_gives_up_and_says_so(nodes: Nodes) -> None:
    policy = QUICK._replace(join_timeout_s=0.5)
    one = await nodes.add("a", Terms(2, 3), policy)
    over = await one.join()
    assert (over.state, over.succeeded) == ("over", False)
    assert over.why == "1 of at least 2 nodes came within 0.5 s"


# --- failures -------------------------------------------------------------------------------------


async def test_all_end_at_once_and_name_the_same_culprit(nodes: Nodes) -> None:
    peers = await nodes.started("abc", Terms(3, 3), nproc=4)
    await peers[1].report(5, exitcode=7, failure={"message": "bad shard"})
    for peer in (peers[0], peers[2]):
        assert await peer.interrupted() == Interruption("failed", "rank 5 failed")
        await peer.end("stopped")
    await peers[1].end("failed")
    over = await joined(*peers)
    assert (over.state, over.succeeded, over.why) == ("over", False, "rank 5 failed")
    culprit = over.culprit
    assert (culprit.node, culprit.rank, culprit.exitcode) == (peers[1].id, 5, 7)
    assert culprit.failure == {"message": "bad shard"}


async def test_the_earliest_failure_counts_not_the_first_report(nodes: Nodes) -> None:
    peers = await nodes.started("abc", Terms(3, 3))
    await peers[2].report(age_s=0.0)
    # Its node only learns of it, or gets to say so, when others have long felt it.
    assert (await peers[0].interrupted()).kind == "failed"
    await peers[0].report(age_s=50.0)
    for peer in peers:
        await peer.end("failed")
    assert (await joined(*peers)).culprit.node == peers[0].id


async def test_what_is_told_again_replaces_what_was_told(nodes: Nodes) -> None:
    peers = await nodes.started("ab", Terms(2, 2))
    await peers[0].report(age_s=0.0)
    await peers[1].report(age_s=5.0)
    await peers[0].report(age_s=9.0, exitcode=3)
    for peer in peers:
        await peer.end("failed")
    assert (await joined(*peers)).culprit.exitcode == 3


async def test_restarts_are_counted_over_the_job(nodes: Nodes) -> None:
    peers = await nodes.started("ab", Terms(2, 2, max_restarts=2))
    for restart in range(3):
        await peers[restart % 2].fail()
        await peers[1 - restart % 2].end("stopped")
        round = await joined(*peers)
        assert hosts(round) == "ab"
        assert round.restarts == min(restart + 1, 2)
        assert round.state == ("running" if restart < 2 else "over")
    assert round.culprit.node == peers[0].id


async def test_a_start_that_is_broken_is_not_tried_for_ever(nodes: Nodes) -> None:
    policy = QUICK._replace(max_broken_starts=2)
    (one,) = await nodes.started("a", Terms(1, 1, max_restarts=100), policy)
    await one.fail(uptime_s=0.1)
    assert (await one.join()).state == "running"
    await one.fail(uptime_s=0.1)
    over = await one.join()
    assert over.state == "over"
    assert over.why == (
        "rank 0 failed: 2 times in a row sooner than 1 s after its start, which no restart mends"
    )


async def test_a_port_that_was_taken_costs_no_restart_but_not_for_ever(nodes: Nodes) -> None:
    (one,) = await nodes.started("a", Terms(1, 1))
    for retry in range(3):
        await one.fail(port_taken=True)
        round = await one.join()
        assert (round.state, round.restarts, round.retries) == ("running", 0, retry + 1)
    await one.fail(port_taken=True)
    assert (await one.join()).state == "over"


async def test_a_restart_waits_for_the_backoff(nodes: Nodes) -> None:
    policy = QUICK._replace(backoff_s=1.0)
    (one,) = await nodes.started("a", Terms(1, 1, max_restarts=1), policy)
    await one.fail()
    before = time.monotonic()
    round = await one.join()
    # Between a half of it and the whole, from when the round was opened.
    assert time.monotonic() - before >= 0.5 * round.delay_s
    assert 0.5 <= round.delay_s <= 1.0


# --- the end --------------------------------------------------------------------------------------


async def test_the_run_is_over_for_all_when_all_have_succeeded(nodes: Nodes) -> None:
    peers = await nodes.started("abc", Terms(3, 3))
    for peer in peers:
        await peer.end("succeeded")
    over = await joined(*peers)
    assert (over.state, over.succeeded, over.culprit) == ("over", True, None)
    assert await peers[0].interrupted() == Interruption("over", "all workers succeeded")


async def test_a_straggler_is_told_that_the_run_is_over(nodes: Nodes) -> None:
    peers = await nodes.started("ab", Terms(2, 2))
    await peers[1].fail()
    await peers[0].end("stopped")
    over = await joined(*peers)
    straggler = await nodes.add("c", Terms(2, 2))
    assert await straggler.join() == over
    for peer in (*peers, straggler):
        await peer.leave()
    last = await nodes.add("d", Terms(2, 2))
    assert await last.join() == over


# --- losses ---------------------------------------------------------------------------------------

GOES = pytest.mark.parametrize("how", ["leaves", "falls silent"])


async def go(peer: Peer, how: str) -> None:
    await (peer.leave() if how == "leaves" else peer.fall_silent())


@GOES
async def test_a_leader_lost_before_a_round(nodes: Nodes, how: str) -> None:
    terms = Terms(3, 3)
    peers = [await nodes.add(name, terms) for name in "ab"]
    joining = [asyncio.ensure_future(peer.join()) for peer in peers]
    for peer in peers:
        await nodes.present(peer)
    place = peers.index(leader_of(*peers))
    await go(peers[place], how)
    joining[place].cancel()
    rest = [await nodes.add(name, terms) for name in "cd"]
    round = await joined(*rest)
    assert await joining[1 - place] == round
    assert sorted(hosts(round)) == sorted(f"{peers[1 - place].name}cd")
    assert len([peer for peer in (*peers, *rest) if peer.leads and peer is not peers[place]]) == 1


@GOES
async def test_a_leader_lost_in_a_round(nodes: Nodes, how: str) -> None:
    peers = await nodes.started("abc", Terms(2, 3))
    lost = leader_of(*peers)
    await go(lost, how)
    rest = [peer for peer in peers if peer is not lost]
    for peer in rest:
        assert await peer.interrupted() == Interruption("superseded", f"node {lost.name} is lost")
        await peer.end("stopped")
    round = await joined(*rest)
    assert (round.number, hosts(round)) == (1, "abc".replace(lost.name, ""))
    for peer in rest:
        await peer.end("succeeded")
    assert (await joined(*rest)).succeeded


@GOES
async def test_a_leader_lost_after_a_failure(nodes: Nodes, how: str) -> None:
    """What the others fail of when a node goes is no failure of the job."""
    peers = await nodes.started("abc", Terms(2, 3))
    lost = leader_of(*peers)
    rest = [peer for peer in peers if peer is not lost]
    await rest[0].report()
    assert (await rest[1].interrupted()).kind == "failed"
    await go(lost, how)
    for peer in rest:
        await peer.end("failed")
    round = await joined(*rest)
    assert (round.state, round.number, round.restarts) == ("running", 1, 0)
    assert hosts(round) == "abc".replace(lost.name, "")


async def test_a_leadership_that_ends_while_it_decides(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hears of that before it is told that its decision does not count, and of nothing later."""
    (one,) = await nodes.started("a", Terms(1, 1, max_restarts=1))
    other = await soon(nodes.backend.engine())
    board, commit = one.coordinator._board, one.engine.commit
    overtaken = asyncio.Event()

    async def late(conditions: Sequence[Condition], writes: Sequence[Write]) -> int | None:
        decided = [write.value for write in writes if isinstance(write, Put)]
        if any('"state":"running"' in value for value in decided) and not overtaken.is_set():
            overtaken.set()
            await other.commit([], [Delete("state/leader")])
            while board.leader is not None:
                await board.next_news()
        return await commit(conditions, writes)

    monkeypatch.setattr(one.engine, "commit", late)
    try:
        await one.fail()
        assert (await one.join()).number == 1
        assert overtaken.is_set()
    finally:
        await other.close()


async def test_a_leader_lost_when_the_run_is_over(nodes: Nodes) -> None:
    peers = await nodes.started("ab", Terms(2, 2))
    for peer in peers:
        await peer.end("succeeded")
    leader = leader_of(*peers)
    await leader.join()
    await leader.leave()
    (rest,) = [peer for peer in peers if peer is not leader]
    assert (await rest.join()).succeeded


async def test_a_node_that_is_not_renewed_ends_before_the_others_begin(nodes: Nodes) -> None:
    """And comes back as a newcomer."""
    one, other = await nodes.started("ab", Terms(1, 2))
    former = one.id
    one.halt_renewals()
    kill_by = await soon(one.coordinator.fenced())
    lease_end = one.engine.alive_until
    assert kill_by < lease_end
    assert await other.interrupted() == Interruption("superseded", "node a is lost")
    assert time.monotonic() >= lease_end
    await other.end("stopped")
    assert hosts(await other.join()) == "b"
    await soon(one.coordinator.rejoin())
    assert one.id != former
    joining = asyncio.ensure_future(one.join())
    assert await other.interrupted() == Interruption("superseded", "a node has joined")
    await other.end("stopped")
    round = await other.join()
    assert await joining == round
    assert (round.number, hosts(round), round.restarts) == (2, "ba", 0)


async def test_a_lease_that_ends_while_it_waits_is_no_harm(nodes: Nodes) -> None:
    terms = Terms(2, 2)
    one = await nodes.add("a", terms)
    joining = asyncio.ensure_future(one.join())
    await nodes.present(one)
    former = one.id
    one.halt_renewals()
    other = await nodes.add("b", terms)
    await nodes.wait_for(other, lambda keys: f"node/{former}" not in keys)
    round = await other.join()
    assert sorted(hosts(round)) == ["a", "b"]
    assert await joining == round
    assert one.id != former


# --- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [Terms(1, 3), Terms(2, 2), Terms(1, 2, max_restarts=1)])
async def test_other_terms_are_refused(nodes: Nodes, terms: Terms) -> None:
    await nodes.started("a", Terms(1, 2), QUICK._replace(last_call_s=0.0))
    said = f"--nnodes={terms.min_nodes}:{terms.max_nodes} --max-restarts={terms.max_restarts}"
    with pytest.raises(TermsError) as caught:
        await (await nodes.add("b", terms)).join()
    assert str(caught.value) == (
        f"this node was started with {said}, the run has --nnodes=1:2 --max-restarts=0"
    )


async def test_a_node_rank_that_is_taken_is_refused(nodes: Nodes) -> None:
    one = await nodes.add("a", Terms(2, 2), node_rank=0)
    joining = asyncio.ensure_future(one.join())
    await nodes.present(one)
    other = await nodes.add("b", Terms(2, 2), node_rank=0)
    with pytest.raises(TermsError, match=r"^node rank 0 is taken by another node of this run"):
        await other.join()
    joining.cancel()
    await asyncio.gather(joining, return_exceptions=True)


async def test_the_rank_of_a_node_that_died_is_free_again(nodes: Nodes) -> None:
    terms = Terms(2, 2)
    one = await nodes.add("a", terms, node_rank=0)
    joining = asyncio.ensure_future(one.join())
    await nodes.present(one)
    await one.fall_silent()
    joining.cancel()
    again = await nodes.add("b", terms, node_rank=0)
    other = await nodes.add("c", terms, node_rank=1)
    assert hosts(await joined(again, other)) == "bc"


@pytest.mark.parametrize("text", ["", "x", "{}", '{"format":99}', '{"format":1,"number":"one"}'])
@pytest.mark.parametrize("key", ["state/round", "state/failed/0/x", "state/leader"])
async def test_a_record_that_is_none_is_one_clear_error(nodes: Nodes, key: str, text: str) -> None:
    one = await nodes.add("a", Terms(2, 2))
    joining = asyncio.ensure_future(one.join())
    await nodes.present(one)
    await one.engine.commit([], [Put(key, text)])
    with pytest.raises(RecordError, match=f"^{key}: no "):
        await joining
    with pytest.raises(RecordError, match=f"^{key}: no "):
        await (await nodes.add("b", Terms(2, 2))).join()


async def test_a_node_that_is_none_is_one_clear_error(nodes: Nodes) -> None:
    one = await nodes.add("a", Terms(2, 2))
    joining = asyncio.ensure_future(one.join())
    await nodes.present(one)
    await one.engine.commit([], [Put("node/x", "{}")])
    with pytest.raises(RecordError, match=r"^node/x: no node "):
        await joining


# --- engines that lose their data -----------------------------------------------------------------


@pytest.mark.timeout(180)
async def test_an_engine_that_loses_its_data_in_a_round(own_backend: Backend) -> None:
    async with nodes_on(own_backend) as nodes:
        peers = await nodes.started("ab", Terms(2, 2, max_restarts=3))
        await peers[0].fail()
        await peers[1].end("stopped")
        assert (await joined(*peers)).number == 1
        await own_backend.lose_data()
        for peer in peers:
            assert (await peer.interrupted()).kind == "superseded"
            await peer.end("stopped")
        round = await joined(*peers)
        assert round.number > 1
        assert round.restarts == 1, "what was known of the run is kept"
        for peer in peers:
            await peer.end("succeeded")
        assert (await joined(*peers)).succeeded


@pytest.mark.timeout(180)
async def test_an_engine_that_loses_its_data_while_nodes_wait(own_backend: Backend) -> None:
    async with nodes_on(own_backend) as nodes:
        one = await nodes.add("a", Terms(2, 2))
        joining = asyncio.ensure_future(one.join())
        await nodes.present(one)
        await own_backend.lose_data()
        other = await nodes.add("b", Terms(2, 2))
        round = await other.join()
        assert await joining == round
        assert sorted(hosts(round)) == ["a", "b"]


async def test_a_round_that_is_deleted_is_begun_anew(nodes: Nodes) -> None:
    peers = await nodes.started("ab", Terms(2, 2))
    await peers[0].engine.commit([], [Delete("state/round")])
    for peer in peers:
        assert (await peer.interrupted()).kind == "superseded"
        await peer.end("stopped")
    round = await joined(*peers)
    assert (round.state, round.number, hosts(round)) == ("running", 1, "ab")


# --- links that are cut: where we can -------------------------------------------------------------


async def test_a_node_that_is_cut_off_is_fenced_and_comes_back() -> None:
    backend = MemoryBackend()
    async with nodes_on(backend) as nodes:
        one, other = await nodes.started("ab", Terms(1, 2))
        backend.engines.cut(one.engine)
        kill_by = await soon(one.coordinator.fenced())
        assert kill_by < one.engine.alive_until
        assert await other.interrupted() == Interruption("superseded", "node a is lost")
        await other.end("stopped")
        assert hosts(await other.join()) == "b"
        backend.engines.heal(one.engine)
        await soon(one.coordinator.rejoin())
        joining = asyncio.ensure_future(one.join())
        assert (await other.interrupted()).kind == "superseded"
        await other.end("stopped")
        assert hosts(await other.join()) == "ba"
        await joining


async def test_who_waits_behind_a_cut_link_gives_up_in_the_end() -> None:
    backend = MemoryBackend()
    async with nodes_on(backend) as nodes:
        one = await nodes.add("a", Terms(2, 2), QUICK._replace(join_timeout_s=1.0))
        joining = asyncio.ensure_future(one.join())
        await nodes.present(one)
        backend.engines.cut(one.engine)
        with pytest.raises(EngineError, match=r"^the log in memory does not answer"):
            await joining
        backend.engines.heal(one.engine)


# --- nodes that do not talk -----------------------------------------------------------------------


def static_request(rank: int, terms: Terms, **more: Any) -> Request:
    node = Node("", f"host-{rank}", f"10.0.0.{rank}", 2, node_rank=rank)
    return Request("job", node, terms, QUICK, master_addr="10.0.0.0", **more)


async def test_static_nodes_find_the_same_round_without_a_word() -> None:
    terms = Terms(3, 3)
    rounds = []
    for rank in range(3):
        async with static.open(static_request(rank, terms, master_port=29500)) as one:
            rounds.append(await soon(one.join(0)))
            assert rounds[-1].group_rank(one.node.id) == rank
    for round in rounds:
        assert (round.state, round.master_port, round.world_size) == ("running", 29500, 6)
        assert round.members[0].address == "10.0.0.0"
        assert [round.first_rank(place) for place in range(3)] == [0, 2, 4]


async def test_static_nodes_count_restarts_for_themselves() -> None:
    async with static.open(static_request(0, Terms(1, 1, max_restarts=1))) as one:
        for restarts in range(2):
            round = await soon(one.join(7))
            assert (round.state, round.number, round.restarts) == ("running", restarts, restarts)
            await one.failing(Culprit(one.node.id, round.number, 1, uptime_s=60.0))
            await one.ended("failed")
        over = await soon(one.join(7))
        assert (over.state, over.succeeded, over.culprit.rank) == ("over", False, 1)


async def test_static_nodes_are_told_of_their_own_success() -> None:
    async with static.open(static_request(0, Terms(1, 1))) as one:
        await soon(one.join(7))
        await one.ended("succeeded")
        assert (await soon(one.join(7))).succeeded


# --- c10d, as far as it goes without torch --------------------------------------------------------


def c10d_request(endpoint: str = "", **conf: str) -> Request:
    return Request("job", Node("a", "a", "", 1), Terms(1, 2), QUICK, endpoint, conf)


@pytest.mark.parametrize(
    ("endpoint", "host", "port"),
    [
        ("", "localhost", 29400),
        ("node7", "node7", 29400),
        ("node7:1234", "node7", 1234),
        ("10.1.2.3:0", "10.1.2.3", 0),
        ("[::1]", "::1", 29400),
        ("[::1]:5", "::1", 5),
    ],
)
def test_c10d_knows_torchs_endpoints(endpoint: str, host: str, port: int) -> None:
    options = c10d.C10dOptions.of(c10d_request(endpoint))
    assert (options.host, options.port) == (host, port)
    assert (options.is_host, options.read_timeout_s, options.lease_s) == (None, 60.0, 15.0)


def test_c10d_knows_torchs_pairs() -> None:
    conf = {"is_host": "1", "read_timeout": "5", "keep_alive_interval": "2", "store_type": "tcp"}
    conf |= {"keep_alive_max_attempt": "4", "join_timeout": "9", "close_timeout": "9"}
    options = c10d.C10dOptions.of(c10d_request(**conf))
    assert (options.is_host, options.read_timeout_s, options.lease_s) == (True, 5.0, 8.0)
    assert c10d.C10dOptions.of(c10d_request(is_host="no", lease_ttl="3")).lease_s == 3.0


@pytest.mark.parametrize(
    ("endpoint", "conf", "said"),
    [
        ("host:port", {}, "--rdzv-endpoint=host:port: HOST:PORT is expected"),
        ("host:70000", {}, "PORT below 65536"),
        ("", {"is_host": "perhaps"}, "is_host=perhaps: true or false is expected"),
        ("", {"read_timeout": "0"}, "read_timeout=0: expected more than 0"),
        ("", {"store_type": "file"}, "store_type=file: tcp is known"),
        ("", {"colour": "blue"}, "colour: not known to the c10d backend"),
    ],
)
def test_c10d_refuses_what_cannot_be(endpoint: str, conf: dict[str, str], said: str) -> None:
    with pytest.raises(EngineError, match=re.escape(said)):
        c10d.C10dOptions.of(c10d_request(endpoint, **conf))


async def test_c10d_without_torch_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EngineError, match="torch cannot be imported") as caught:
        await c10d.open(c10d_request()).__aenter__()
    assert caught.value.hint == "pip install torch, or use etcd: --rdzv-backend=etcd"


def test_our_own_names_and_addresses_are_known() -> None:
    assert all(map(c10d._is_ours, ["localhost", "127.0.0.1", "::1", socket.gethostname()]))
    # TEST-NET-3 is nobody's.
    assert not c10d._is_ours("203.0.113.7")
