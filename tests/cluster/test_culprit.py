"""A worker fails on one of three nodes: all of them name it, and end with its status at once."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import pytest

from tests.cluster.nodes import WORKERS, cluster

pytestmark = pytest.mark.timeout(180)

NODES, NPROC = 3, 4
RANK = 5
# The promise: all nodes end within this time. A machine that has much more to do than it can gets
# longer for what an agent does at its end.
WITHIN_S = 0.5 if os.getloadavg()[0] < 1.5 * (os.cpu_count() or 1) else 2.0


def root_cause(stderr: str) -> dict[str, str]:
    """The fields of the report's root cause."""
    section = stderr.partition("Root Cause")[2]
    return dict(re.findall(r"^ {2}(\w+) *: (.*)$", section, re.MULTILINE))


@pytest.mark.parametrize(("how", "status"), [("raise", 1), ("41", 41)])
async def test_all_nodes_name_it_and_end_with_its_status(
    request: pytest.FixtureRequest, tmp_path: Path, how: str, status: int
) -> None:
    gate = tmp_path / "gate"
    with cluster(request, tmp_path, NODES) as nodes:
        agents = [
            nodes.start(
                node, WORKERS / "culprit.py", gate, RANK, how,
                nnodes=f"{NODES}:{NODES}", nproc=NPROC,
            )
            for node in range(NODES)
        ]  # fmt: skip
        started = await nodes.said(NODES * NPROC, "started")
        assert sorted(int(rank) for _, rank in started) == list(range(NODES * NPROC))
        gate.touch()
        [[_, node, failed_at]] = await nodes.said(1, "failing")
        assert await asyncio.gather(*(agent.status() for agent in agents)) == [status] * NODES
        ends = [agent.ended_at for agent in agents]
        assert max(ends) - min(ends) < WITHIN_S, [end - float(failed_at) for end in ends]
        causes = [root_cause(agent.stderr) for agent in agents]
        for agent, cause in zip(agents, causes, strict=True):
            assert cause["rank"] == f"{RANK} (local_rank: {RANK % NPROC})", agent.stderr
            assert cause["exitcode"].startswith(f"{status} "), agent.stderr
            assert ("ValueError: shard 5 is truncated" in agent.stderr) is (how == "raise")
        # One node, one process, one time.
        assert [cause["host"] for cause in causes] == [causes[0]["host"]] * NODES
        assert [cause["exitcode"] for cause in causes] == [causes[0]["exitcode"]] * NODES
        assert [cause["time"] for cause in causes] == [causes[0]["time"]] * NODES
        assert causes[0]["host"] == nodes.host(int(node))
