"""etcd loses its leader: no worker is harmed, and no round is lost."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from tests.cluster.nodes import WORKERS, Agent, Cluster, cluster

pytestmark = pytest.mark.timeout(180)

NODES, NPROC = 3, 2
# The default. Members need about a second to agree on another leader.
LEASE_S = 10


def start(nodes: Cluster, node: int, nnodes: str) -> Agent:
    pulses, finish = nodes.folder / "pulses", nodes.folder / "finish"
    return nodes.start(
        node, WORKERS / "pulse.py", pulses, finish,
        nnodes=nnodes, nproc=NPROC, conf=f"lease_ttl={LEASE_S},last_call_timeout=2",
    )  # fmt: skip


async def started(nodes: Cluster, count: int) -> dict[int, int]:
    """The pids of a round's workers, by rank."""
    lines = await nodes.said(count * NPROC, "started", count * NPROC)
    found = {int(rank): int(pid) for _, _, _, rank, pid, _ in lines}
    assert sorted(found) == list(range(count * NPROC))
    return found


def last_pulses(nodes: Cluster) -> dict[int, int]:
    """Of each worker that has ever lived, by pid, in nanoseconds by the clock of all."""
    lines = (nodes.folder / "pulses").read_text().splitlines()
    return {int(pid): int(stamp) for _, _, pid, stamp in map(str.split, lines)}


async def lose_leader(nodes: Cluster) -> int:
    """Kill it; returns once there is another."""
    leader = await asyncio.to_thread(nodes.etcd.leader)
    nodes.etcd.kill(leader)
    assert await asyncio.to_thread(nodes.etcd.leader) != leader
    return leader


async def finish(nodes: Cluster) -> None:
    (nodes.folder / "finish").touch()
    statuses = await asyncio.gather(*(agent.status() for agent in nodes.agents))
    assert statuses == [0] * len(nodes.agents)


async def test_during_training(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with cluster(request, tmp_path, NODES) as nodes:
        for node in range(NODES):
            start(nodes, node, f"2:{NODES}")
        workers = await started(nodes, NODES)
        await lose_leader(nodes)
        # Longer than a lease: who could not renew it would be gone.
        await asyncio.sleep(1.5 * LEASE_S)
        now = time.monotonic_ns()
        await finish(nodes)
        assert sorted(last_pulses(nodes)) == sorted(workers.values())
        assert all(last > now - 1e9 for last in last_pulses(nodes).values())
        assert [agent.stderr for agent in nodes.agents] == [""] * NODES


async def test_before_the_first_round(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with cluster(request, tmp_path, NODES) as nodes:
        early = [start(nodes, node, f"{NODES}:{NODES}") for node in range(NODES - 1)]
        await nodes.present(NODES - 1)
        lost = await asyncio.to_thread(nodes.etcd.leader)
        nodes.etcd.kill(lost)
        # While the members agree on another one.
        start(nodes, NODES - 1, f"{NODES}:{NODES}")
        workers = await started(nodes, NODES)
        await asyncio.to_thread(nodes.etcd.start, lost)
        await finish(nodes)
        assert sorted(last_pulses(nodes)) == sorted(workers.values())
        assert [agent.stderr for agent in early] == ["", ""]


async def test_while_a_later_round_forms(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with cluster(request, tmp_path, NODES) as nodes:
        for node in range(NODES - 1):
            start(nodes, node, f"2:{NODES}")
        first = await started(nodes, NODES - 1)
        leader = await asyncio.to_thread(nodes.etcd.leader)
        start(nodes, NODES - 1, f"2:{NODES}")
        # They are told so because there is a new round, which none of them is ready for yet.
        await nodes.said(1, "ending")
        nodes.etcd.kill(leader)
        second = await started(nodes, NODES)
        await finish(nodes)
        # One round after another: nobody else was ever started.
        assert sorted(last_pulses(nodes)) == sorted([*first.values(), *second.values()])
        told = ["asupervise: a node has joined\n"] * NODES
        assert [agent.stderr for agent in nodes.agents] == told
