"""A node that is lost to the others ends its workers before they go on, and comes back."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cluster.nodes import WORKERS, Cluster, cluster, needs_links

LEASE_S = 3
# Longer than the lease, and long enough for a round without the node.
FAULT_S = 60.0 if os.environ.get("ASUPERVISE_TEST_LONG") == "1" else 8.0
NODES, NPROC = 3, 2

pytestmark = pytest.mark.timeout(180 + FAULT_S)


class Life(NamedTuple):
    """When a worker has lived, in nanoseconds by the clock of all."""

    node: int
    rank: int
    pid: int
    first: int
    last: int


def lives(pulses: Path) -> list[Life]:
    """Of all workers, as they wrote it down themselves."""
    stamps: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for line in pulses.read_text().splitlines():
        node, rank, pid, stamp = map(int, line.split())
        stamps[node, rank, pid].append(stamp)
    return [Life(*who, min(times), max(times)) for who, times in stamps.items()]


def check_no_rank_twice(found: list[Life]) -> None:
    by_rank = defaultdict(list)
    for life in found:
        by_rank[life.rank].append(life)
    for of_rank in by_rank.values():
        for former, latter in itertools.pairwise(sorted(of_rank, key=lambda life: life.first)):
            assert former.last < latter.first, (former, latter)


async def started(nodes: Cluster, count: int) -> dict[int, list[int]]:
    """The pids of a round's workers, by node."""
    found = defaultdict(list)
    for _, _, node, _, pid, _ in await nodes.said(count * NPROC, "started", count * NPROC):
        found[int(node)].append(int(pid))
    assert [len(pids) for pids in found.values()] == [NPROC] * count, dict(found)
    return found


class Fault(NamedTuple):
    """What happens to one node.

    Attributes:
        group_rank: its place.
        halted: the agent itself stands still, instead of the link being cut.
        stubborn: workers do not end when they are told to.
    """

    group_rank: int
    halted: bool = False
    stubborn: bool = False

    def begin(self, nodes: Cluster, node: int) -> None:
        if self.halted:
            nodes.agents[node].process.send_signal(signal.SIGSTOP)
        else:
            assert nodes.network is not None
            nodes.network.nodes[node].cut()

    def end(self, nodes: Cluster, node: int) -> None:
        if self.halted:
            nodes.agents[node].process.send_signal(signal.SIGCONT)
        else:
            assert nodes.network is not None
            nodes.network.nodes[node].mend()


FAULTS = {
    "cut, rank 0": Fault(0),
    "cut, last rank": Fault(NODES - 1),
    "cut, stubborn workers": Fault(1, stubborn=True),
    "agent halted": Fault(0, halted=True),
}


def start(nodes: Cluster, node: int, fault: Fault) -> None:
    pulses, finish = nodes.folder / "pulses", nodes.folder / "finish"
    nodes.start(
        node, WORKERS / "pulse.py", pulses, finish, *["stubborn"] * fault.stubborn,
        nnodes=f"2:{NODES}", nproc=NPROC, conf=f"lease_ttl={LEASE_S}",
        flags=("--shutdown-timeout=1",),
    )  # fmt: skip


def check_dead_before(pulses: Path, lost: int, pids: Collection[int]) -> int:
    """That no worker of the node lived when the first of these began.

    Returns:
        The last sign of life of the node's.
    """
    found = lives(pulses)
    last = max(life.last for life in found if life.node == lost)
    assert last < min(life.first for life in found if life.pid in pids)
    return last


@pytest.mark.parametrize("name", FAULTS)
async def test_workers_are_dead_before_the_others_go_on_and_it_comes_back(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    fault = FAULTS[name]
    if not fault.halted:
        needs_links()
    pulses = tmp_path / "pulses"
    with cluster(request, tmp_path, NODES) as nodes:
        for node in range(NODES):
            start(nodes, node, fault)
        lines = await nodes.said(NODES * NPROC, "started", NODES * NPROC)
        lost = {int(group): int(node) for _, _, node, _, _, group in lines}[fault.group_rank]
        fault.begin(nodes, lost)
        began = time.monotonic()
        second = await started(nodes, NODES - 1)
        assert lost not in second
        # A renewal may just have come, and the others end their workers.
        assert time.monotonic() - began < LEASE_S + 10
        last = check_dead_before(pulses, lost, {pid for pids in second.values() for pid in pids})
        # How long the fault lasts, and no wait for anything.
        await asyncio.sleep(began + FAULT_S - time.monotonic())
        assert max(life.last for life in lives(pulses) if life.node == lost) == last
        fault.end(nodes, lost)
        assert lost in await started(nodes, NODES)
        (tmp_path / "finish").touch()
        statuses = await asyncio.gather(*(agent.status() for agent in nodes.agents))
        assert statuses == [0] * NODES
        check_no_rank_twice(lives(pulses))
        # Each worker that there was belongs to one of three rounds.
        assert len(lives(pulses)) == (NODES + NODES - 1 + NODES) * NPROC
        told = [f"node {nodes.host(lost)} is lost", "a node has joined"]
        others = [agent for agent in nodes.agents if agent.node != lost]
        assert [agent.told for agent in others] == [told] * (NODES - 1)
