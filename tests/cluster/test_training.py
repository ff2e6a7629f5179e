"""Real training over nodes that are lost and join: it goes on from the last checkpoint."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.nodes import Agent, Cluster, cluster
from tests.conftest import ROOT

# Ranks import torch three times, and train for real: slow on two shared cores.
pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed"),
]

EXAMPLE = ROOT / "examples" / "ddp_text.py"
LEASE_S = 3
# What a group needs until it trains: an interpreter that imports torch. Longer on a machine that
# has much more to do than it can.
START_S = 10.0 if os.getloadavg()[0] < 1.5 * (os.cpu_count() or 1) else 30.0
# So many that the job is not over before the third node has come.
STEPS, EVERY = 500, 10
# The held-out loss of the same parameters, summed up by another number of ranks.
TOLERANCE = 1e-3


def start(nodes: Cluster, node: int) -> Agent:
    # Few steps between two checkpoints, so that not many are made twice.
    given = ("--steps", STEPS, "--checkpoint-every", EVERY)
    files = ("--checkpoint", nodes.folder / "checkpoint", "--curve", nodes.folder / "curve")
    return nodes.start(node, EXAMPLE, *given, *files, nnodes="1:2", conf=f"lease_ttl={LEASE_S}")


def read_curve(nodes: Cluster) -> list[dict[str, Any]]:
    text = (nodes.folder / "curve").read_text()
    return [json.loads(line) for line in text.splitlines()]


async def until(nodes: Cluster, ranks: int, what: str) -> None:
    """Wait until so many ranks have ``resumed``, or have ``saved`` a checkpoint."""
    while True:
        [line] = await nodes.said(1, "step")
        if line[-3:] == ["ranks", str(ranks), what]:
            return


def check_continuous(curve: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """No step is left out, and none made again but those after the last checkpoint.

    Returns:
        For each time that it was gone on: from which step, with how many ranks.
    """
    step = saved_step = 0
    saved_loss = None
    resumed = []
    for line in curve:
        if line["event"] == "step":
            assert line["step"] == step + 1, line
        elif line["event"] == "checkpoint":
            assert line["step"] == step, line
            saved_step, saved_loss = step, line["loss"]
        else:
            # A rank 0 that is killed between the two has saved one that it has not told of.
            assert line["step"] in (saved_step, saved_step + EVERY), line
            assert line["step"] <= step, line
            if line["step"] == saved_step:
                assert line["saved"] == saved_loss
            assert line["loss"] == pytest.approx(line["saved"], abs=TOLERANCE)
            saved_step, saved_loss = line["step"], line["saved"]
            resumed.append((line["step"], line["ranks"]))
        step = line["step"]
    assert step == STEPS
    return resumed


def check_falling(curve: list[dict[str, Any]]) -> None:
    """Nothing of what was learnt is lost: each loss is near the best so far or below."""
    losses = [line["loss"] for line in curve if line["event"] == "checkpoint"]
    best = losses[0]
    for loss in losses:
        assert loss < best + 0.25
        best = min(best, loss)
    # ln 128 = 4.85 is what one who knows nothing has.
    assert losses[-1] < 2.4


@pytest.mark.parametrize("lost", ["rank 0", "rank 1"])
async def test_a_node_is_lost_and_another_joins(
    request: pytest.FixtureRequest, tmp_path: Path, lost: str
) -> None:
    with cluster(request, tmp_path, 3) as nodes:
        agents = [start(nodes, 0)]
        await nodes.present(1)
        # Ranks are laid out in the order in which nodes have come.
        agents.append(start(nodes, 1))
        for _ in range(5):
            await until(nodes, 2, "saved")
        killed, other = agents if lost == "rank 0" else reversed(agents)
        killed.kill()
        killed_at = time.monotonic()
        await until(nodes, 1, "resumed")
        assert time.monotonic() - killed_at < LEASE_S + START_S
        await until(nodes, 1, "saved")
        third = start(nodes, 2)
        await until(nodes, 2, "saved")
        assert await asyncio.gather(other.status(200), third.status(200)) == [0, 0]
        curve = read_curve(nodes)
        resumed = check_continuous(curve)
        assert [ranks for _, ranks in resumed] == [1, 2]
        check_falling(curve)
        assert other.told == [f"node {nodes.host(killed.node)} is lost", "a node has joined"]
