"""Where a node stands, by its environment: as schedulers set it, and as it should not be."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise.elastic.decide import Policy
from asupervise.elastic.records import Culprit, Node, Terms
from asupervise.elastic.rendezvous import Request, env
from asupervise.elastic.rendezvous.env import PORTS, Found, SchedulerError, detect, settle
from asupervise.elastic.rendezvous.hostlist import expand
from asupervise.errors import SupervisorError
from tests.conftest import ROOT, clean_environment


def read(text: str) -> dict[str, str]:
    """``env``'s output."""
    return dict(line.strip().split("=", 1) for line in text.strip().splitlines())


# --- environments as the schedulers set them -----------------------------------------------------

# `srun -N2 --ntasks-per-node=1`, Slurm 22.05; of a job of more tasks, whose number is inherited.
SRUN = read("""
    SLURMD_NODENAME=tux08
    SLURM_CLUSTER_NAME=tests
    SLURM_CPUS_ON_NODE=2
    SLURM_DISTRIBUTION=cyclic
    SLURM_GTIDS=1
    SLURM_JOBID=200505
    SLURM_JOB_CPUS_PER_NODE=2(x4)
    SLURM_JOB_ID=200505
    SLURM_JOB_NAME=job.sh
    SLURM_JOB_NODELIST=tux[05-06,08,10]
    SLURM_JOB_NUM_NODES=4
    SLURM_LAUNCH_NODE_IPADDR=192.0.2.5
    SLURM_LOCALID=0
    SLURM_NNODES=2
    SLURM_NODEID=1
    SLURM_NODELIST=tux[05-06,08,10]
    SLURM_NPROCS=2
    SLURM_NTASKS=2
    SLURM_NTASKS_PER_NODE=2
    SLURM_PROCID=1
    SLURM_SRUN_COMM_HOST=192.0.2.5
    SLURM_STEPID=1
    SLURM_STEP_ID=1
    SLURM_STEP_NODELIST=tux[06,08]
    SLURM_STEP_NUM_NODES=2
    SLURM_STEP_NUM_TASKS=2
    SLURM_STEP_TASKS_PER_NODE=1(x2)
    SLURM_SUBMIT_HOST=login1
    SLURM_TASKS_PER_NODE=1(x2)
""")
# The batch script of a job of two nodes, Slurm 22.05.
SBATCH = read("""
    SLURMD_NODENAME=tux05
    SLURM_GTIDS=0
    SLURM_JOBID=7
    SLURM_JOB_ID=7
    SLURM_JOB_NODELIST=tux[05-06]
    SLURM_JOB_NUM_NODES=2
    SLURM_LOCALID=0
    SLURM_NNODES=2
    SLURM_NODEID=0
    SLURM_NODELIST=tux[05-06]
    SLURM_NODE_ALIASES=(null)
    SLURM_NTASKS=4
    SLURM_NTASKS_PER_NODE=2
    SLURM_PROCID=0
    SLURM_TASKS_PER_NODE=2(x2)
""")
# salloc without an interactive step: a shell where it was called, Slurm 22.05.
SALLOC = read("""
    SLURM_JOBID=3
    SLURM_JOB_CPUS_PER_NODE=2(x2)
    SLURM_JOB_ID=3
    SLURM_JOB_NAME=interactive
    SLURM_JOB_NODELIST=tux[05-06]
    SLURM_JOB_NUM_NODES=2
    SLURM_NNODES=2
    SLURM_NODELIST=tux[05-06]
    SLURM_SUBMIT_HOST=login1
    SLURM_TASKS_PER_NODE=2(x2)
""")
# salloc with LaunchParameters=use_interactive_step.
INTERACTIVE = SBATCH | read("""
    SLURM_PTY_PORT=34889
    SLURM_STEPID=4294967290
    SLURM_STEP_ID=4294967290
    SLURM_STEP_NODELIST=tux05
    SLURM_STEP_NUM_NODES=1
    SLURM_STEP_NUM_TASKS=1
    SLURM_STEP_TASKS_PER_NODE=1
""")
# `mpirun -np 2 --map-by ppr:1:node`, Open MPI 4.1.
MPIRUN = read("""
    OMPI_APP_CTX_NUM_PROCS=2
    OMPI_COMM_WORLD_LOCAL_RANK=0
    OMPI_COMM_WORLD_LOCAL_SIZE=1
    OMPI_COMM_WORLD_NODE_RANK=0
    OMPI_COMM_WORLD_RANK=1
    OMPI_COMM_WORLD_SIZE=2
    OMPI_MCA_ess_base_jobid=308805633
    OMPI_MCA_orte_hnp_uri=308805632.0;tcp://192.0.2.2:47115;tcp6://[fd00::2]:51085
    OMPI_MCA_orte_num_nodes=2
    OMPI_UNIVERSE_SIZE=2
    PMIX_HOSTNAME=tux06
    PMIX_ID=308805633.1
    PMIX_NAMESPACE=308805633
    PMIX_RANK=1
    PMIX_SERVER_URI4=308805632.1;tcp4://127.0.0.1:55683
""")
# kubernetes.io: "Job with Pod-to-Pod Communication", and NNODES set by hand in its manifest.
POD = read("""
    HOSTNAME=example-job-2
    JOB_COMPLETION_INDEX=2
    KUBERNETES_SERVICE_HOST=10.96.0.1
    NNODES=3
""")
POD_NAME = "example-job-2.headless-svc.default.svc.cluster.local"
BY_HAND = {"NODE_RANK": "1", "NNODES": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}


def test_a_step_of_slurm_has_its_own_nodes() -> None:
    assert detect(SRUN) == Found(
        "slurm",
        node_rank=1,
        nodes=2,
        master_addr="tux06",
        master_port=24506,
        run_id="slurm-200505.1",
        why="Slurm: node 1 of 2 (SLURM_NODEID=1, SLURM_STEP_NUM_NODES=2), node 0 at tux06 "
        "(SLURM_STEP_NODELIST=tux[06,08]), port 24506 (from SLURM_JOB_ID=200505, SLURM_STEP_ID)",
    )


def test_open_mpi_knows_no_address() -> None:
    found = detect(MPIRUN)
    assert found is not None
    assert found.scheduler == "openmpi"
    assert (found.node_rank, found.nodes, found.master_addr) == (1, 2, None)
    assert found.run_id == "openmpi-308805633"
    assert found.master_port in PORTS
    assert "OMPI_COMM_WORLD_RANK=1" in found.why
    assert "PMIX_RANK" not in found.why, "it is Open MPI's own"


def test_a_pod_finds_pod_0_by_its_own_name() -> None:
    found = detect(POD, hostname=POD_NAME)
    assert found is not None
    assert (found.scheduler, found.node_rank, found.nodes) == ("kubernetes", 2, 3)
    assert found.master_addr == "example-job-0.headless-svc.default.svc.cluster.local"
    assert found.run_id == "example-job"
    assert found.master_port in PORTS
    assert POD_NAME in found.why
    assert detect(POD | {"HOSTNAME": POD_NAME}) == found, "setHostnameAsFQDN"


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"HOSTNAME": "worker-node-7"},
        {"HOSTNAME": "x" * 63},
        {"HOSTNAME": "example-job-2", "hostname": "example-job-2"},
        {"HOSTNAME": "example-job-2", "hostname": "10-0-0-2.svc.default.svc.cluster.local"},
    ],
    ids=["no name", "host's", "shortened", "no service", "by its address"],
)
def test_a_pod_that_does_not_know_its_full_name_knows_no_address(names: dict[str, str]) -> None:
    variables = {key: value for key, value in POD.items() if key != "HOSTNAME"}
    hostname = names.pop("hostname", "")
    found = detect(variables | names, hostname=hostname)
    assert found is not None
    assert (found.node_rank, found.nodes, found.master_addr) == (2, 3, None)


def test_how_many_pods_there_are_is_not_said() -> None:
    found = detect({"JOB_COMPLETION_INDEX": "2"})
    assert found is not None
    assert (found.node_rank, found.nodes) == (2, None)


def test_pmix_without_open_mpi() -> None:
    found = detect({"PMIX_RANK": "1", "PMIX_NAMESPACE": "prterun-tux-7@1", "PET_NNODES": "2:2"})
    assert found is not None
    assert (found.scheduler, found.node_rank, found.nodes) == ("pmix", 1, 2)
    assert found.run_id == "pmix-prterun-tux-7@1"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (BY_HAND, (1, 2, "10.0.0.1", 29400)),
        ({"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "4"}, (0, 4, None, 29500)),
        ({"PET_NODE_RANK": "3", "PET_NNODES": "4", "PET_MASTER_PORT": "1"}, (3, 4, None, 1)),
        ({"NODE_RANK": "0", "GROUP_RANK": "0", "NNODES": " 1 "}, (0, 1, None, None)),
        ({"NODE_RANK": "0", "NNODES": "2", "MASTER_PORT": "0"}, (0, 2, None, 29500)),
        ({"NODE_RANK": "0", "NNODES": "2", "MASTER_PORT": ""}, (0, 2, None, 29500)),
        ({"NODE_RANK": "1"}, (1, None, None, 29500)),
    ],
)
def test_variables_set_by_hand(variables: dict[str, str], expected: tuple[Any, ...]) -> None:
    found = detect(variables)
    assert found is not None
    assert found.scheduler == "variables"
    assert (found.node_rank, found.nodes, found.master_addr, found.master_port) == expected


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"PATH": "/usr/bin", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        {"NNODES": "2", "MASTER_ADDR": "10.0.0.1"},
        {"SLURM_JOB_ID": "7"},
        {"JOB_COMPLETION_INDEX": ""},
        SALLOC | {"SLURM_JOB_NUM_NODES": "1"},
        # A worker of torchrun's, or of ours, on a node of Slurm's.
        SRUN | {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "1", "GROUP_RANK": "0"},
    ],
)
def test_nobody_says(variables: dict[str, str]) -> None:
    assert detect(variables) is None


def test_a_single_node_needs_neither_address_nor_port() -> None:
    for variables in (SBATCH, INTERACTIVE):
        found = detect(variables | {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "tux05"})
        assert found is not None
        assert found == replace(found, scheduler="slurm", node_rank=0, nodes=1, run_id="slurm-7")
        assert (found.master_addr, found.master_port) == (None, None)


# --- several at once -----------------------------------------------------------------------------


def test_the_innermost_wins_and_it_is_said_who_is_left_aside() -> None:
    found = detect(POD | SBATCH | MPIRUN | {"NNODES": "2"})
    assert found is not None
    assert (found.scheduler, found.node_rank) == ("openmpi", 1)
    assert "Slurm (SLURM_JOB_ID) is around that, and left aside" in found.why
    assert "Kubernetes (JOB_COMPLETION_INDEX) is around that, and left aside" in found.why
    inner = detect(POD | SRUN | {"NNODES": "2"})
    assert inner is not None
    assert inner.scheduler == "slurm"


def test_slurms_own_pmix_is_slurm() -> None:
    found = detect(SRUN | {"PMIX_RANK": "1", "PMIX_NAMESPACE": "slurm.pmix.200505.1"})
    assert found == detect(SRUN)


def test_address_and_port_set_by_hand_win() -> None:
    hand = {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "1234"}
    found, without = detect(SRUN | hand), detect(SRUN)
    assert found is not None
    assert without is not None
    assert (found.master_addr, found.master_port) == ("10.0.0.9", 1234)
    assert found == replace(without, master_addr="10.0.0.9", master_port=1234, why=found.why)


def test_one_scheduler_can_be_asked_alone() -> None:
    variables = POD | SRUN | {"NODE_RANK": "0", "NNODES": "3"}
    slurm, by_hand = detect(variables, scheduler="slurm"), detect(variables, scheduler="variables")
    pod = detect(variables, scheduler="kubernetes")
    assert slurm is not None
    assert by_hand is not None
    assert pod is not None
    assert (slurm.node_rank, slurm.nodes) == (1, 2)
    assert (by_hand.node_rank, by_hand.nodes) == (0, 3)
    assert (pod.node_rank, pod.nodes) == (2, 3)
    assert detect(BY_HAND, scheduler="slurm") is None
    with pytest.raises(SchedulerError, match="no scheduler 'pbs'; known: openmpi, pmix, slurm"):
        detect(variables, scheduler="pbs")


def test_a_batch_script_may_name_the_places_by_hand() -> None:
    found = detect(SBATCH | BY_HAND)
    assert found is not None
    assert (found.scheduler, found.node_rank) == ("variables", 1)


@pytest.mark.skipif(not shutil.which("mpirun"), reason="Open MPI is not installed (openmpi-bin)")
def test_a_real_mpirun(tmp_path: Path) -> None:
    program = """
import os
from asupervise.elastic.rendezvous.env import SchedulerError, detect
try:
    found = detect(os.environ)
    print(found.scheduler, found.node_rank, found.nodes, found.master_addr, found.master_port)
except SchedulerError as error:
    print(error)
"""
    mpirun = ("mpirun", "--allow-run-as-root", "--oversubscribe")
    # Its folder for this session is to go with the test's.
    variables = clean_environment() | {"TMPDIR": str(tmp_path)}
    lines = {}
    for count in (1, 2):
        done = subprocess.run(
            [*mpirun, "-np", str(count), sys.executable, "-c", program],
            env=variables, cwd=ROOT, capture_output=True, text=True, timeout=50, check=True,
        )  # fmt: skip
        lines[count] = done.stdout.splitlines()
    assert lines[1] == ["openmpi 0 1 None None"]
    assert len(lines[2]) == 2
    assert all(line.startswith("OMPI_COMM_WORLD_LOCAL_SIZE=2: mpirun has") for line in lines[2])


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (SRUN | {"SLURM_NODEID": "2"}, "SLURM_NODEID=2, SLURM_STEP_NUM_NODES=2: expected a rank"),
        (SRUN | {"SLURM_NODEID": "one"}, "SLURM_NODEID='one': expected a number"),
        (SRUN | {"SLURM_NODEID": "-1"}, "SLURM_NODEID='-1': expected a number"),
        (SRUN | {"SLURM_NODEID": "٣"}, "SLURM_NODEID='٣': expected a number"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS=4, SLURM_STEP_NUM_NODES=2"),
        (SRUN | {"SLURM_STEP_NODELIST": "tux[05"}, "SLURM_STEP_NODELIST='tux.05': .* no list"),
        (SRUN | {"SLURM_STEP_NODELIST": "tux05"}, "='tux05' has 1 hosts, but SLURM_STEP_NUM_NODES"),
        (SRUN | {"SLURM_NODEID": ""}, "SLURM_STEP_ID is set, and SLURM_NODEID is not"),
        (SRUN | {"NODE_RANK": "0"}, "NODE_RANK=0 and SLURM_NODEID=1 contradict"),
        (SRUN | {"NNODES": "4"}, "NNODES=4 and SLURM_STEP_NUM_NODES=2 contradict"),
        (SBATCH, "SLURM_JOB_NUM_NODES=2: the job has 2 nodes, and we are started outside of srun"),
        (SBATCH | {"NNODES": "2"}, "SLURM_JOB_NUM_NODES=2: the job has 2 nodes"),
        (SALLOC, "SLURM_JOB_NUM_NODES=2: the job has 2 nodes"),
        (INTERACTIVE, "SLURM_JOB_NUM_NODES=2: the job has 2 nodes"),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "OMPI_COMM_WORLD_LOCAL_SIZE=2: mpirun has"),
        (MPIRUN | {"OMPI_COMM_WORLD_RANK": "7"}, "OMPI_COMM_WORLD_RANK=7, OMPI_COMM_WORLD_SIZE=2"),
        (POD | {"JOB_COMPLETION_INDEX": "3"}, "JOB_COMPLETION_INDEX=3, NNODES=3: expected a rank"),
        (BY_HAND | {"NODE_RANK": "2"}, "NODE_RANK=2, NNODES=2: expected a rank"),
        (BY_HAND | {"NNODES": "0"}, "NODE_RANK=1, NNODES=0: expected a rank"),
        (BY_HAND | {"NNODES": "1:2"}, "NNODES='1:2': expected a number"),
        (BY_HAND | {"GROUP_RANK": "0"}, "NODE_RANK=1 and GROUP_RANK=0 contradict"),
        (BY_HAND | {"GROUP_WORLD_SIZE": "3"}, "NNODES=2 and GROUP_WORLD_SIZE=3 contradict"),
        (BY_HAND | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999: expected a port"),
        (BY_HAND | {"MASTER_PORT": "http"}, "MASTER_PORT='http': expected a number"),
    ],
)
def test_what_cannot_be_names_variable_and_value(variables: dict[str, str], message: str) -> None:
    with pytest.raises(SchedulerError, match=message) as raised:
        detect(variables)
    assert isinstance(raised.value, SupervisorError)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(
    ("variables", "hint"),
    [
        (SBATCH, "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 "),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "4"}, "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 "),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "mpirun --map-by ppr:1:node "),
        (SRUN | {"NODE_RANK": "0"}, "a batch script's SLURM_NODEID is 0"),
    ],
)
def test_what_to_do_instead(variables: dict[str, str], hint: str) -> None:
    with pytest.raises(SchedulerError) as raised:
        detect(variables)
    assert hint in (raised.value.hint or "")


NAMES = st.sampled_from([*SRUN, *MPIRUN, *POD, *BY_HAND, "PET_NNODES", "PET_RDZV_ID"])
VALUES = st.one_of(st.sampled_from(["", "0", "1", "2", "tux[1-2]", "a-0.b"]), st.text(max_size=5))


@given(st.dictionaries(NAMES, VALUES), st.sampled_from([{}, SRUN, MPIRUN, POD, BY_HAND]))
def test_whatever_is_set_there_is_a_place_or_one_clear_error(
    variables: dict[str, str], real: Mapping[str, str]
) -> None:
    try:
        found = detect({**real, **variables})
    except SchedulerError:
        return
    if found is not None:
        assert found.nodes is None or 0 <= found.node_rank < found.nodes
        assert found.master_port is None or 0 < found.master_port < 65_536
        assert str(found.node_rank) in found.why


# --- the port ------------------------------------------------------------------------------------


def port_of(job: int, step: int) -> int | None:
    found = detect(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
    return found.master_port if found else None


def test_all_nodes_come_to_the_same_port() -> None:
    found = detect(SRUN | {"SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURMD_NODENAME": "tux06"})
    assert found is not None
    assert found.master_port == port_of(200505, 1) == 20_000 + (200_505 + 4_001) % 10_000


def test_jobs_and_steps_at_the_same_time_have_different_ports() -> None:
    ports = [port_of(job, step) for job in range(200_000, 201_000) for step in range(2)]
    assert len(set(ports)) == len(ports)


@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_the_port_is_in_its_range(job: int, step: int) -> None:
    if step != 0xFFFFFFFA:
        assert port_of(job, step) in PORTS


# --- a run ---------------------------------------------------------------------------------------


def a_request(**fields: Any) -> Request:
    node = Node("id", "here", "127.0.0.1", 2)
    return Request("run", node, Terms(1, 1), Policy())._replace(**fields)


def test_the_request_is_completed() -> None:
    request = settle(a_request(), detect(SRUN))
    assert (request.node.node_rank, request.terms) == (1, Terms(2, 2))
    assert (request.master_addr, request.master_port) == ("tux06", 24_506)


@pytest.mark.parametrize(
    ("asked", "address", "port"),
    [
        ({"master_addr": "10.0.0.9", "master_port": 1234}, "10.0.0.9", 1234),
        ({"master_addr": "10.0.0.9"}, "10.0.0.9", 24_506),
        ({"endpoint": "[fd00::1]:29400"}, "fd00::1", 29_400),
        ({"endpoint": "10.0.0.8", "master_port": 1234}, "10.0.0.8", 1234),
    ],
)
def test_what_the_user_asks_for_wins(asked: dict[str, Any], address: str, port: int) -> None:
    request = settle(a_request(**asked), detect(SRUN))
    assert (request.master_addr, request.master_port) == (address, port)


def test_the_number_of_nodes_may_be_asked_for_where_nobody_says() -> None:
    pod = detect({"JOB_COMPLETION_INDEX": "2"}, hostname=POD_NAME)
    request = settle(a_request(terms=Terms(3, 3, 5)), pod)
    assert (request.node.node_rank, request.terms) == (2, Terms(3, 3, 5))


@pytest.mark.parametrize(
    ("asked", "variables", "message"),
    [
        ({}, {}, "no scheduler has left its variables here"),
        ({}, MPIRUN, "nobody says where node 0 is; Open MPI: node 1 of 2"),
        ({}, POD, "nobody says where node 0 is; Kubernetes: node 2 of 3"),
        ({}, {"NODE_RANK": "1", "NNODES": "2"}, "nobody says where node 0 is; set by hand"),
        ({}, {"JOB_COMPLETION_INDEX": "2"}, "nobody says how many nodes there are; Kubernetes"),
        ({"terms": Terms(2, 2)}, {"JOB_COMPLETION_INDEX": "2"}, "--nnodes 2, but Kubernetes"),
        ({"terms": Terms(3, 3)}, SRUN, "--nnodes 3:3, but Slurm: node 1 of 2"),
        ({"terms": Terms(1, 2)}, SRUN, "--nnodes 1:2, but Slurm: node 1 of 2"),
        ({"endpoint": "tux:0x1"}, SRUN, "--rdzv-endpoint 'tux:0x1': expected HOST:PORT"),
        ({"node": Node("id", "here", "", 2, node_rank=3)}, SRUN, "--node-rank 3, but Slurm"),
    ],
)
def test_what_is_not_enough_or_not_what_was_asked(
    asked: dict[str, Any], variables: dict[str, str], message: str
) -> None:
    with pytest.raises(SchedulerError, match=message):
        settle(a_request(**asked), detect(variables))


def set_all(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    for name in ("TORCHELASTIC_RUN_ID", *SRUN, *MPIRUN, *POD, *BY_HAND):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


async def test_a_run_of_what_slurm_says(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SRUN)
    async with env.open(a_request()) as rendezvous:
        round = await rendezvous.join(port=1)
    assert [member.address for member in round.members] == ["tux06", "127.0.0.1"]
    assert round.group_rank(rendezvous.node.id) == 1
    assert (round.master_port, round.world_size, round.first_rank(1)) == (24_506, 4, 2)


async def test_a_restart_keeps_place_and_port(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SRUN)
    request = a_request(terms=Terms(1, 1, max_restarts=1), policy=Policy(backoff_s=0))
    async with env.open(request) as rendezvous:
        first = await rendezvous.join(port=1)
        await rendezvous.failing(Culprit(rendezvous.node.id, 0, 2, uptime_s=100.0))
        await rendezvous.ended("failed")
        second = await rendezvous.join(port=2)
    assert (second.state, second.restarts) == ("running", 1)
    assert (second.members, second.master_port) == (first.members, first.master_port)


async def test_the_scheduler_to_ask_is_a_pair_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_all(monkeypatch, SRUN | {"NODE_RANK": "0", "NNODES": "3", "MASTER_ADDR": "10.0.0.1"})
    async with env.open(a_request(conf={"scheduler": "variables"})) as rendezvous:
        assert len((await rendezvous.join(port=1)).members) == 3
    with pytest.raises(SchedulerError, match="contradict"):
        async with env.open(a_request()):
            pass


# --- lists of hosts ------------------------------------------------------------------------------

LISTS = {
    "tux1": ["tux1"],
    "a,b": ["a", "b"],
    "tux[1-3,5],login1": ["tux1", "tux2", "tux3", "tux5", "login1"],
    "n[08-11]": ["n08", "n09", "n10", "n11"],
    "n[99-101]": ["n99", "n100", "n101"],
    "n[9-010]": ["n9", "n10"],
    "n[001-3]": ["n001", "n002", "n003"],
    "n[1,02]": ["n1", "n02"],
    "n[3,1]": ["n3", "n1"],
    "n[1-2,1]": ["n1", "n2", "n1"],
    "r[0-1]n[01-02]": ["r0n01", "r0n02", "r1n01", "r1n02"],
    "[1-2]": ["1", "2"],
    "a b": ["a", "b"],
    "a, b": ["a", "b"],
    "a,,b": ["a", "b"],
}


@pytest.mark.parametrize(("text", "hosts"), LISTS.items())
def test_a_list_of_hosts(text: str, hosts: list[str]) -> None:
    assert expand(text) == hosts


def test_what_stands_behind_the_numbers_belongs_to_the_name() -> None:
    assert expand("n[1-2]-ib.example.org") == ["n1-ib.example.org", "n2-ib.example.org"]


@pytest.mark.skipif(not shutil.which("scontrol"), reason="Slurm is not installed (slurm-wlm)")
def test_slurm_reads_the_lists_likewise(tmp_path: Path) -> None:
    configuration = tmp_path / "slurm.conf"
    configuration.write_text(
        "ClusterName=tests\nSlurmctldHost=localhost\nPlugStackConfig=/dev/null\n"
    )
    for text, hosts in LISTS.items():
        command = ["scontrol", "show", "hostnames", text]
        variables = {"SLURM_CONF": str(configuration)}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        assert done.stdout.split() == hosts, text


@pytest.mark.parametrize(
    "text",
    ["", ",", "n[", "n[1", "n1]", "n[]", "n[a]", "n[1-2,a]", "n[3-1]", "n[0-4/2]", "n[1--2]",
     "n[1 - 2]", "n[[1]]", ",a", "a,", "n[-1]"],
)  # fmt: skip
def test_what_is_no_list_of_hosts(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no list of hosts|is no range of hosts"):
        expand(text)


@pytest.mark.parametrize("text", ["n[0-999999999]", "n[1-300]m[1-300]", "n[1-60000],m[1-60000]"])
def test_a_list_that_no_cluster_has_is_refused_at_once(text: str) -> None:
    with pytest.raises(ValueError, match=r"65,?536"):
        expand(text)


PREFIXES = st.from_regex(r"[a-z][a-z0-9-]{0,5}[a-z]", fullmatch=True)


def compressed(prefix: str, numbers: list[int], width: int) -> str:
    """As Slurm writes them: consecutive numbers as a range."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][-1] + 1 == number:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    texts = [
        f"{run[0]:0{width}}-{run[-1]:0{width}}" if len(run) > 1 else f"{run[0]:0{width}}"
        for run in ranges
    ]
    return f"{prefix}[{','.join(texts)}]"


@given(PREFIXES, st.sets(st.integers(0, 999), min_size=1), st.integers(1, 5))
def test_what_was_compressed_comes_back(prefix: str, numbers: set[int], width: int) -> None:
    ordered = sorted(numbers)
    expected = [f"{prefix}{number:0{width}}" for number in ordered]
    assert expand(compressed(prefix, ordered, width)) == expected
    assert expand(",".join(expected)) == expected


@given(st.text(alphabet="n01-[],/ é", max_size=12))
def test_any_text_is_a_list_or_a_value_error(text: str) -> None:
    try:
        hosts = expand(text)
    except ValueError:
        return
    assert hosts
    assert all(host and not set(host) & set("[], ") for host in hosts)
