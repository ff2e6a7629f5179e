"""What a real Slurm sets, and what is made of it; `make test-cluster` installs one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from asupervise.elastic.rendezvous.env import PORTS
from tests.cluster.slurm import Slurm, slurm

__all__ = ["slurm"]

# Started once for all tests of this module, which takes a few seconds.
pytestmark = pytest.mark.timeout(120)

EACH_NODE = ("--nodes=2", "--ntasks=2", "--ntasks-per-node=1")

DETECT = """
import dataclasses, json, os
from asupervise.elastic.rendezvous.env import SchedulerError, detect
try:
    found = dataclasses.asdict(detect(os.environ))
except SchedulerError as error:
    found = {"error": str(error), "hint": error.hint}
more = {"on": os.environ["SLURMD_NODENAME"], "task": os.environ["SLURM_PROCID"]}
print(json.dumps(found | more))
"""

JOIN = """
import asyncio, json, os
from asupervise.elastic.decide import Policy
from asupervise.elastic.records import Node, Terms
from asupervise.elastic.rendezvous import Request, env

async def main():
    node = Node("x", "here", "127.0.0.1", nproc=3)
    async with env.open(Request("run", node, Terms(1, 1), Policy())) as rendezvous:
        round = await rendezvous.join(port=1)
        place = round.group_rank(rendezvous.node.id)
        if place == 0:
            (await asyncio.start_server(print, round.members[0].address, round.master_port)).close()
        print(json.dumps({
            "on": os.environ["SLURMD_NODENAME"], "world": round.world_size,
            "first": round.first_rank(place), "port": round.master_port,
        }))

asyncio.run(main())
"""


def on_nodes(lines: list[str]) -> dict[str, dict[str, Any]]:
    """What was written on each node."""
    found = [json.loads(line) for line in lines]
    assert len({item["on"] for item in found}) == len(found), found
    return {item.pop("on"): item for item in found}


def test_each_node_of_a_step_knows_its_place(slurm: Slurm) -> None:
    found = on_nodes(slurm.python(DETECT, *EACH_NODE))
    first, second = (found[node] for node in slurm.nodes)
    assert (first["scheduler"], first["node_rank"], first["nodes"]) == ("slurm", 0, 2)
    assert (second["scheduler"], second["node_rank"], second["nodes"]) == ("slurm", 1, 2)
    for name in ("master_addr", "master_port", "run_id"):
        assert first[name] == second[name]
    assert first["master_addr"] == slurm.nodes[0]
    assert first["master_port"] in PORTS
    assert f"SLURM_STEP_NODELIST={','.join(slurm.nodes)}" in second["why"]


def test_two_jobs_have_different_ports_and_names(slurm: Slurm) -> None:
    one, other = (on_nodes(slurm.python(DETECT, *EACH_NODE))[slurm.nodes[0]] for _ in range(2))
    assert one["master_port"] != other["master_port"]
    assert one["run_id"] != other["run_id"]


def test_the_rendezvous_of_two_nodes(slurm: Slurm) -> None:
    found = on_nodes(slurm.python(JOIN, *EACH_NODE))
    first, second = (found[node] for node in slurm.nodes)
    assert (first["world"], first["first"]) == (6, 0)
    assert (second["world"], second["first"]) == (6, 3)
    assert first["port"] == second["port"]


def test_a_step_may_be_smaller_than_its_job(slurm: Slurm) -> None:
    srun = ("srun", "--nodes=1", "--ntasks=1", f"--nodelist={slurm.nodes[1]}")
    done = slurm.run("salloc", "--nodes=2", *srun, sys.executable, "-c", DETECT)
    found = on_nodes(done.stdout.splitlines())[slurm.nodes[1]]
    assert (found["node_rank"], found["nodes"]) == (0, 1)


def test_places_follow_the_list_of_nodes_whatever_the_order_of_tasks(
    slurm: Slurm, tmp_path: Path
) -> None:
    # Task 0 is on the second node: SLURM_PROCID is no place.
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{node}\n" for node in reversed(slurm.nodes)))
    arbitrary = ("--nodes=2", "--ntasks=2", "--distribution=arbitrary")
    found = on_nodes(slurm.python(DETECT, *arbitrary, SLURM_HOSTFILE=str(hosts)))
    assert [found[node]["task"] for node in slurm.nodes] == ["1", "0"]
    assert [found[node]["node_rank"] for node in slurm.nodes] == [0, 1]
    assert {item["master_addr"] for item in found.values()} == {slurm.nodes[0]}


def test_several_tasks_on_a_node_are_an_error(slurm: Slurm) -> None:
    lines = slurm.python(DETECT, "--nodes=2", "--ntasks=4")
    found = [json.loads(line) for line in lines]
    assert len(found) == 4
    for item in found:
        assert item["error"].startswith("SLURM_STEP_NUM_TASKS=4, SLURM_STEP_NUM_NODES=2")
        assert "srun --nodes=2 --ntasks=2 --ntasks-per-node=1" in item["hint"]


def test_a_batch_script_is_told_to_use_srun_and_that_works(slurm: Slurm) -> None:
    # Of a job with two tasks a node: `srun --ntasks-per-node=1` alone would start two there.
    command = f"{sys.executable} -c '{DETECT}'"
    script = f"{command}\nsrun {' '.join(EACH_NODE)} {command}"
    outside, *inside = slurm.batch(script, "--nodes=2", "--ntasks-per-node=2").splitlines()
    refused = json.loads(outside)
    assert refused["error"].startswith("SLURM_JOB_NUM_NODES=2: the job has 2 nodes")
    assert f"srun {' '.join(EACH_NODE)}" in refused["hint"]
    found = on_nodes(inside)
    assert [found[node]["node_rank"] for node in slurm.nodes] == [0, 1]


def test_a_batch_script_on_one_node_needs_no_srun(slurm: Slurm) -> None:
    found = json.loads(slurm.batch(f"{sys.executable} -c '{DETECT}'", "--nodes=1"))
    assert (found["scheduler"], found["node_rank"], found["nodes"]) == ("slurm", 0, 1)
    assert found["master_port"] is None
