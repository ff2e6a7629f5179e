"""Several nodes on this machine, as processes of the command line, that agree through a real etcd.

To start a node takes 0.3 s of a CPU (half of it gRPC), so the tests go a longer way with few.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT, Run, clean_environment
from tests.elastic.etcd_server import EtcdCluster, etcd, etcd_cluster, not_installed  # noqa: F401
from tests.workers import PYTHON, Channel, gone

pytest.importorskip("aetcd", reason="the extra etcd is not installed")
pytestmark = pytest.mark.skipif(not_installed() is not None, reason=not_installed() or "")

LEASE_S = 2
# The promise for the ends of all nodes; a machine that has more to do than it can gets longer.
TOGETHER_S = 0.5 if os.getloadavg()[0] < 1.5 * (os.cpu_count() or 1) else 3.0
# Says who it is: rank, place of its node, number of all ranks, restarts so far, process.
SAYS = 'echo "$RANK $GROUP_RANK $WORLD_SIZE $TORCHELASTIC_RESTART_COUNT $$$$" > "$CHANNEL"; '
HELD = 'read line < "$CHANNEL.$RANK"; '
GATES = 6
LATE = "asupervise: the run was over before this node came"
SLEEPS = SAYS + "exec sleep 1000"


class Member:
    """A node: a running ``python -m asupervise``."""

    def __init__(self, process: subprocess.Popen[bytes], said: Path) -> None:
        self.process = process
        self._said = said

    def signal(self, sig: int) -> None:
        self.process.send_signal(sig)

    async def ended(self) -> tuple[int, float]:
        """Its exit status, and when it ended."""
        await gone(self.process.pid)
        at = time.monotonic()
        return self.process.wait(), at

    async def status(self) -> int:
        return (await self.ended())[0]

    def said(self) -> str:
        """What it wrote to stderr."""
        return self._said.read_text()


class Nodes:
    """A run, and its nodes.

    Attributes:
        channel: through which the workers speak.
    """

    def __init__(self, folder: Path, endpoints: Sequence[str]) -> None:
        self.channel = Channel(folder)
        # A rank that waits at its own goes on when there is a line for it.
        self._gates = [self._gate(f"{self.channel.path}.{rank}") for rank in range(GATES)]
        self._folder = folder
        self._id = secrets.token_hex(6)
        self._endpoints = ",".join(endpoints)
        self._members: list[Member] = []

    def start(
        self, script: str, *flags: object, nnodes: str, nproc: int = 1, shell: str = "sh"
    ) -> Member:
        """Start a node, whose workers each run the shell script."""
        said = self._folder / f"stderr{len(self._members)}"
        words = (
            "--rdzv-backend", "etcd", "--rdzv-endpoint", self._endpoints, "--rdzv-id", self._id,
            "--rdzv-conf", f"lease_ttl={LEASE_S},join_timeout=30", "--nnodes", nnodes,
            "--nproc-per-node", nproc, "--restart-backoff", 0, "--min-uptime", 0, *flags,
            "--no-python", shell, "-c", script,
        )  # fmt: skip
        with said.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "asupervise", *map(str, words)],
                cwd=ROOT,
                env=clean_environment() | {"CHANNEL": str(self.channel.path)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        self._members.append(Member(process, said))
        return self._members[-1]

    @staticmethod
    def _gate(path: str) -> int:
        os.mkfifo(path)
        # Both ends, so that nobody waits for the other one (fifo(7)).
        return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def let_go(self, rank: int) -> None:
        """Let the worker of this rank go on that is held."""
        os.write(self._gates[rank], b"go\n")

    async def heard(self, count: int) -> list[tuple[int, ...]]:
        """What the next so many workers say, in order."""
        lines = await asyncio.wait_for(self.channel.lines(count), 40)
        return sorted(tuple(map(int, line)) for line in lines)

    async def round(self, ranks: int, *, places: Sequence[int], restarts: int = 0) -> list[int]:
        """Wait for a round of so many ranks, on these nodes by rank; returns the processes."""
        told = await self.heard(ranks)
        expected = [(rank, place, ranks, restarts) for rank, place in enumerate(places)]
        assert [worker[:4] for worker in told] == expected
        return [worker[4] for worker in told]

    def close(self) -> None:
        """Kill what still runs: its guardians end the workers."""
        for member in self._members:
            member.process.kill()
            member.process.wait()
        self.channel.close()
        for gate in self._gates:
            os.close(gate)


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))


@pytest.fixture
def run(tmp_path: Path, etcd: EtcdCluster) -> Iterator[Nodes]:  # noqa: F811
    run = Nodes(tmp_path, etcd.endpoints)
    yield run
    run.close()


async def statuses(*members: Member) -> list[int]:
    return [status for status, _ in await asyncio.gather(*(m.ended() for m in members))]


# --- one failure, everywhere ----------------------------------------------------------------------

# One rank fails once it is told to; its exception is recorded.
RECORDED = """
import os
from asupervise import record
@record
def main():
    with open(os.environ["CHANNEL"] + ".5") as gate:
        gate.readline()
    raise LookupError("shard 17 is truncated")
main()
"""


async def test_every_node_names_the_culprit_and_ends_as_it_did(run: Nodes, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(RECORDED)
    script = f"[ $RANK = 5 ] && {{ {SAYS} exec {sys.executable} {worker}; }}; {SLEEPS}"
    members = [run.start(script, nnodes="3", nproc=4) for _ in range(3)]
    await run.round(12, places=[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    run.let_go(5)
    ends = await asyncio.gather(*(member.ended() for member in members))
    assert [status for status, _ in ends] == [1, 1, 1]
    assert max(at for _, at in ends) - min(at for _, at in ends) < TOGETHER_S
    for member in members:
        root = member.said().partition("Root Cause")[2]
        assert "rank      : 5 (local_rank: 1)" in root
        assert f"host      : {os.uname().nodename}" in root
        assert "LookupError: shard 17 is truncated" in root
        # Its own ranks were ended; that is not what the run failed of.
        assert "Ended by the supervisor: ranks" in member.said()


async def test_a_node_that_cannot_start_its_workers_is_the_culprit(run: Nodes) -> None:
    """Also if the others' workers take their time: it does not go before."""
    stubborn = f"trap '' TERM; {SLEEPS}"
    one = run.start(stubborn, "--shutdown-timeout", 1, nnodes="2", shell="sh")
    other = run.start("", nnodes="2", shell="/no/such/shell")
    assert await statuses(one, other) == [1, 2]
    assert "could not be started: " in one.said()
    assert other.said().startswith("error: local rank 0: no such program: '/no/such/shell'\n")


# --- restarts are the job's -----------------------------------------------------------------------


async def test_restarts_are_counted_over_all_nodes(run: Nodes) -> None:
    """Nodes of 1 and of 2 workers; a rank of the one fails, then of the other, then of the one."""
    count = "$TORCHELASTIC_RESTART_COUNT"
    script = (
        f"{SAYS} [ $LOCAL_RANK = 0 ] && [ $GROUP_RANK = $(({count} % 2)) ] && "
        f"{{ {HELD} exit $((20 + {count})); }}; exec sleep 1000"
    )
    members = [run.start(script, "--max-restarts", 2, nnodes="2", nproc=n) for n in (1, 2)]
    first = await run.heard(3)
    places = [worker[1] for worker in first]
    assert places in ([0, 1, 1], [0, 0, 1])
    failing = [0, places.index(1), 0]
    for restarts, rank in enumerate(failing):
        if restarts:
            # Each keeps its place.
            await run.round(3, places=places, restarts=restarts)
        run.let_go(rank)
    assert await statuses(*members) == [22, 22]
    for member in members:
        for restart in (1, 2):
            rank, code = failing[restart - 1], 19 + restart
            line = f"rank {rank} failed: restart {restart} of 2, exit code {code}"
            assert f"asupervise: {line}\n" in member.said()
        assert "exitcode  : 22" in member.said()


# --- nodes come and go ----------------------------------------------------------------------------


async def test_nodes_come_and_go(run: Nodes) -> None:
    """A longer way: a node is killed, one comes, one is told to leave, all are told to end."""
    start = {"script": SLEEPS, "nnodes": "2:3", "nproc": 2}
    members = {run.start(**start) for _ in range(3)}
    pids = await run.round(6, places=[0, 0, 1, 1, 2, 2])
    lost = members.pop()
    lost.signal(signal.SIGKILL)
    await lost.ended()
    # No failure: the others go on in another round, when its lease has ended.
    pids = [*pids, *await run.round(4, places=[0, 0, 1, 1])]
    # One that does not fit is refused.
    stranger = run.start(SLEEPS, "--max-restarts", 5, nnodes="2:3", nproc=2)
    other = run.start(SLEEPS, nnodes="2:4", nproc=2)
    assert await statuses(stranger, other) == [2, 2]
    for member, flags in ((stranger, "--nnodes=2:3 --max-restarts=5"),
                          (other, "--nnodes=2:4 --max-restarts=0")):  # fmt: skip
        assert f"error: this node was started with {flags}, the run has" in member.said()
        assert "hint: " in member.said()
    members.add(run.start(**start))
    pids += await run.round(6, places=[0, 0, 1, 1, 2, 2])
    leaving = members.pop()
    leaving.signal(signal.SIGTERM)
    assert await leaving.status() == 128 + signal.SIGTERM
    pids += await run.round(4, places=[0, 0, 1, 1])
    for member in members:
        member.signal(signal.SIGTERM)
    assert await statuses(*members) == [128 + signal.SIGTERM] * 2
    for pid in pids:
        assert not os.path.exists(f"/proc/{pid}")
    for member in members:
        assert "FAILED" not in member.said()


async def test_a_fixed_number_is_waited_for(run: Nodes) -> None:
    """With a node lost the other one waits; with another one it goes on; who is late is told."""
    succeed = SAYS + HELD
    first, lost = (run.start(succeed, nnodes="2") for _ in range(2))
    before = await run.round(2, places=[0, 1])
    lost.signal(signal.SIGKILL)
    for pid in before:
        await asyncio.wait_for(gone(pid), 20)
    assert first.process.poll() is None
    second = run.start(succeed, nnodes="2")
    await run.round(2, places=[0, 1])
    run.let_go(0)
    run.let_go(1)
    assert await statuses(first, second) == [0, 0]
    late = run.start(succeed, nnodes="2")
    assert await late.status() == 0
    assert late.said() == f"{LATE}: all workers succeeded\n"


async def test_who_is_late_for_a_failure_is_told_of_it(run: Nodes) -> None:
    # It does not wait for another: what is given later counts.
    at_once = f"lease_ttl={LEASE_S},last_call_timeout=0"
    first = run.start("exit 7", "--rdzv-conf", at_once, nnodes="1:2")
    assert await first.status() == 7
    late = run.start("exit 0", nnodes="1:2")
    assert await late.status() == 7
    assert late.said().startswith(f"{LATE}: rank 0 failed\n")
    assert "exitcode  : 7" in late.said()


# --- fencing --------------------------------------------------------------------------------------

# Ignores SIGTERM, and writes down that it lives, each 10 ms, until it does not.
LIVES = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
log = os.open(os.environ["LIVES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
os.write(log, b"%.6f\\n" % time.monotonic())
os.system(os.environ["SAYS"])
while True:
    os.write(log, b"%.6f\\n" % time.monotonic())
    time.sleep(0.01)
"""


async def test_without_etcd_no_worker_outlives_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a signal ends a node that waits for etcd; the other one goes on when it is back."""
    program = tmp_path / "lives.py"
    program.write_text(LIVES)
    lives = tmp_path / "lives"
    monkeypatch.setenv("LIVES", str(lives))
    monkeypatch.setenv("SAYS", SAYS.replace("$$$$", "$PPID"))
    with etcd_cluster(tmp_path) as cluster:
        run = Nodes(tmp_path, cluster.endpoints)
        try:
            script = f"exec {PYTHON[0]} -I -S {program}"
            members = [
                run.start(script, "--shutdown-timeout", 0.2, nnodes="1:2", nproc=2)
                for _ in range(2)
            ]
            pids = await run.round(4, places=[0, 0, 1, 1])
            cluster.stop(0)
            halted = time.monotonic()
            for pid in pids:
                await asyncio.wait_for(gone(pid), 20)
            last = max(map(float, lives.read_text().split()))
            # The last renewal was before etcd was halted, and it counts from when it was sent.
            assert halted < last < halted + LEASE_S
            members[1].signal(signal.SIGTERM)
            assert await asyncio.wait_for(members[1].status(), 10) == 128 + signal.SIGTERM
            assert members[0].process.poll() is None
            cluster.cont(0)
            await run.round(2, places=[0, 0])
            members[0].signal(signal.SIGTERM)
            assert await members[0].status() == 128 + signal.SIGTERM
        finally:
            cluster.cont(0)
            run.close()


# --- what cannot be -------------------------------------------------------------------------------


def test_too_few_nodes_are_one_clear_error(run_cli: Run, etcd: EtcdCluster) -> None:  # noqa: F811
    done = run_cli("--rdzv-backend", "etcd", "--rdzv-endpoint", etcd.endpoints[0], "--rdzv-id",
                   secrets.token_hex(6), "--rdzv-conf", "join_timeout=0.5", "--nnodes", 2,
                   "--no-python", "true")  # fmt: skip
    assert done.stderr == b"error: 1 of at least 2 nodes came within 0.5 s\n"
    assert done.returncode == 1


def test_an_endpoint_that_does_not_answer_is_one_clear_error(run_cli: Run) -> None:
    done = run_cli("--rdzv-backend", "etcd", "--rdzv-endpoint", "127.0.0.1:1", "--rdzv-id", "x",
                   "--rdzv-conf", "timeout=0.5", "--no-python", "true")  # fmt: skip
    error, hint = done.stderr.decode().splitlines()
    assert error.startswith("error: etcd at 127.0.0.1:1 does not answer within 0.5 s")
    assert hint.startswith("hint: is it running")
    assert done.returncode == 2


def test_without_the_extra_the_hint_is_to_install_it(run_cli: Run) -> None:
    code = "import sys; sys.modules['aetcd'] = None; from asupervise.cli import main; exit(main())"
    done = run_cli("--rdzv-backend", "etcd", "--rdzv-endpoint", "127.0.0.1:1", "--rdzv-id", "x",
                   "--no-python", "true", command=(sys.executable, "-c", code))  # fmt: skip
    assert done.stderr.decode().splitlines() == [
        "error: etcd's backend needs the package aetcd",
        "hint: pip install 'asupervise[etcd]'",
    ]
    assert done.returncode == 2
