"""The watchdog: a node's workers are dead in time, also where its agent stands still."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asupervise import EventBus, procfs, start_processes
from asupervise.elastic.agent import Agent, Standing
from asupervise.elastic.gate import Gate
from asupervise.elastic.interruption import Interruption
from asupervise.elastic.records import Culprit, Member, Node, Round
from asupervise.elastic.telling import RunTeller
from asupervise.elastic.watchdog import Watchdog, deadlines_of, watched
from asupervise.elastic.watchdog_main import Orders, end_group
from asupervise.procs import StartingProcesses
from tests.conftest import ROOT, clean_environment, own_children, wait_gone
from tests.elastic.etcd_server import EtcdCluster, etcd
from tests.workers import PYTHON, gone, is_alive, shell, waits_of

__all__ = ["etcd"]  # a fixture

# Its own in each run of the tests: whoever holds it is killed, whoever started it.
TOKEN = f"asv-{os.getpid():016x}"
# Later than any deadline of ours; on a machine that has much else to do.
LATE_S = 5.0


class Lease:
    """A rendezvous of which there is only what a watchdog needs."""

    def __init__(self, lasts_s: float | None) -> None:
        self._lasts_s = lasts_s

    def tell_deadlines(self, tell: Callable[[float], None]) -> bool:
        self.tell = tell
        if self._lasts_s is not None:
            self.last(self._lasts_s)
        return self._lasts_s is not None

    def last(self, seconds: float) -> float:
        """Be renewed; returns the deadline."""
        deadline = time.monotonic() + seconds
        self.tell(deadline)
        return deadline


def watchdog_of(lease: Lease) -> AbstractAsyncContextManager[Watchdog]:
    return watched(lease)  # type: ignore[arg-type]


class Workers:
    """A group without a supervisor: whoever ends it, it is not us."""

    cgroup = ""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.spared: list[int] = []

    def start(self, script: str, token: str = TOKEN) -> int:
        """Run a shell script in a session of its own; returns when it has written a line."""
        process = subprocess.Popen(
            ["sh", "-c", script], stdout=subprocess.PIPE, cwd=self._folder, start_new_session=True,
            env={**clean_environment(), "ASUPERVISE_TOKEN": f"outer:{token}"},
        )  # fmt: skip
        self.processes.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process.pid

    def pids(self) -> dict[int, int]:
        return {rank: process.pid for rank, process in enumerate(self.processes)}

    def spare(self, pid: int) -> None:
        self.spared.append(pid)

    def lives(self, pid: int) -> bool:
        [process] = [process for process in self.processes if process.pid == pid]
        return process.poll() is None

    def end(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()  # those who left their group may have it open


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path)
    yield made
    made.end()


READY = "echo; "
SLEEP = f"{READY}exec sleep 1000"


async def ended_at(*pids: int) -> float:
    async with asyncio.timeout(2 * LATE_S):
        for pid in pids:
            await gone(pid)
    return time.monotonic()


# --- the process ----------------------------------------------------------------------------------


async def test_it_kills_at_the_deadline_and_not_before(workers: Workers) -> None:
    pid = workers.start(SLEEP)
    lease = Lease(LATE_S)
    async with watchdog_of(lease) as dog:
        with dog.guarding(TOKEN):
            dog.adopt(workers)  # type: ignore[arg-type]
            assert workers.spared == [dog.pid]
            deadline = lease.last(0.3)
            late = await ended_at(pid) - deadline
            assert 0 <= late < LATE_S
            assert dog.has_ended(TOKEN)
            assert not dog.has_ended("asv-another")
            assert not dog.permits()
        assert workers.processes[0].wait() == -signal.SIGKILL
        assert not dog.lost


async def test_each_renewal_moves_the_deadline(workers: Workers) -> None:
    pid = workers.start(SLEEP)
    lease = Lease(0.8)
    async with watchdog_of(lease) as dog:
        with dog.guarding(TOKEN):
            dog.adopt(workers)  # type: ignore[arg-type]
            for _ in range(10):
                deadline = lease.last(0.8)
                # As long as an agent waits until it renews its lease, or shorter.
                await asyncio.sleep(0.8 / 8)
            assert not dog.has_ended(TOKEN)
            assert await ended_at(pid) >= deadline


async def test_a_group_is_known_by_its_token_before_its_start_is_over(workers: Workers) -> None:
    lease = Lease(LATE_S)
    async with watchdog_of(lease) as dog:
        with dog.guarding(TOKEN):
            pid = workers.start(SLEEP)
            lease.last(0.0)
            await ended_at(pid)


async def test_who_left_session_group_or_environment_dies_as_well(workers: Workers) -> None:
    """One of each: by token, by session, by its parent, by its process group."""
    sleep = "echo $$ >> pids; exec sleep 1000"
    wiped = f"env -i PATH=$PATH sh -c '{sleep}'"
    script = (
        f"mkfifo pids; exec 3<>pids; set -m; (setsid sh -c '{sleep}' &); {wiped} & set +m; "
        f"setsid {wiped} & {wiped} & echo; exec sleep 1000"
    )
    leader = workers.start(script)
    with (workers._folder / "pids").open() as told:
        pids = [int(told.readline()) for _ in range(4)]
    assert all(is_alive(pid) for pid in pids)
    lease = Lease(LATE_S)
    async with watchdog_of(lease) as dog:
        with dog.guarding(TOKEN):
            dog.adopt(workers)  # type: ignore[arg-type]
            lease.last(0.0)
            await ended_at(leader, *pids)


async def test_who_is_none_of_the_group_lives(workers: Workers) -> None:
    stranger = workers.start(SLEEP, token="asv-another")
    workers.processes.reverse()
    lease = Lease(LATE_S)
    async with watchdog_of(lease) as dog:
        with dog.guarding(TOKEN):
            pid = workers.start(SLEEP)
            lease.last(0.0)
            await ended_at(pid)
        assert workers.lives(stranger)


def test_a_reused_pid_is_somebody_else(workers: Workers) -> None:
    stranger = workers.start(SLEEP, token="asv-another")
    entry = procfs.read_entry(stranger)
    assert entry is not None
    orders = Orders()
    orders.take(f"group {TOKEN}\nleaders {stranger}:{entry.start_ticks - 1}\n".encode())
    end_group(orders)
    assert workers.lives(stranger)
    orders.take(f"leaders {stranger}:{entry.start_ticks}\n".encode())
    end_group(orders)
    assert workers.processes[0].wait() == -signal.SIGKILL


async def test_without_a_group_nothing_happens(workers: Workers) -> None:
    pid = workers.start(SLEEP)
    lease = Lease(LATE_S)
    async with watchdog_of(lease) as dog:
        with dog.guarding(TOKEN):
            dog.adopt(workers)  # type: ignore[arg-type]
        lease.last(0.0)
        # When it has done this it has thought about that, too.
        with dog.guarding("asv-another"):
            other = workers.start(SLEEP, token="asv-another")
            lease.last(0.0)
            await ended_at(other)
        assert workers.lives(pid)
        assert not dog.has_ended(TOKEN)


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def test_it_is_small_and_idle(workers: Workers) -> None:
    lease = Lease(LATE_S)
    async with watchdog_of(lease) as dog:
        with dog.guarding(TOKEN):
            other = workers.start(SLEEP)
            lease.last(0.0)
            await ended_at(other)
            before = await waits_of(dog.pid)
            for _ in range(20):
                lease.last(1000.0)
                await asyncio.sleep(0.02)
            # It wakes up when it is told something, and hardly ever else.
            assert await waits_of(dog.pid) - before <= 25
        assert resident_bytes(dog.pid) <= 16 * 2**20
        assert os.getsid(dog.pid) == dog.pid
        assert os.readlink(f"/proc/{dog.pid}/cwd") == "/"


async def test_without_a_lease_there_is_none() -> None:
    async with watchdog_of(Lease(None)) as dog:
        assert dog.pid == 0
        assert not own_children()
        with dog.guarding(TOKEN):
            assert dog.permits()
            assert not dog.has_ended(TOKEN)


async def test_it_is_gone_with_its_agent_and_reaped() -> None:
    async with watchdog_of(Lease(LATE_S)):
        assert own_children()
    assert not own_children()


async def test_a_stopped_one_does_not_outlive_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asupervise.elastic.watchdog._GOODBYE_LIMIT_S", 0.05)
    async with watchdog_of(Lease(LATE_S)) as dog:
        os.kill(dog.pid, signal.SIGSTOP)
    assert not is_alive(dog.pid)


async def test_a_killed_one_is_known_to_be_lost() -> None:
    async with watchdog_of(Lease(LATE_S)) as dog:
        os.kill(dog.pid, signal.SIGKILL)
        async with asyncio.timeout(LATE_S):
            await dog._exited.wait()
        assert dog.lost
        with dog.guarding(TOKEN):
            dog.until(0.0)


# An agent without a guardian: prints the pids of the watchdog and of a worker.
AGENT = f"""
import asyncio, os, subprocess, sys, time
from asupervise.elastic.watchdog import watched

class Lease:
    def tell_deadlines(self, tell):
        tell(time.monotonic() + float(sys.argv[1]))
        return True

async def main():
    async with watched(Lease()) as dog:
        worker = 0
        with dog.guarding("{TOKEN}"):
            if sys.argv[2] == "worker":
                env = {{**os.environ, "ASUPERVISE_TOKEN": "{TOKEN}"}}
                worker = subprocess.Popen(["sleep", "1000"], env=env, start_new_session=True).pid
                print(dog.pid, worker, flush=True)
                await asyncio.sleep(1000)
        print(dog.pid, worker, flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


def agent(*args: object) -> tuple[subprocess.Popen[bytes], int, int]:
    command = [sys.executable, "-c", AGENT, *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=clean_environment())
    assert process.stdout is not None
    dog, worker = map(int, process.stdout.readline().split())
    return process, dog, worker


def test_it_ends_with_its_agent_where_there_is_no_group() -> None:
    process, dog, _ = agent(1000.0, "none")
    process.kill()
    process.communicate()
    assert not wait_gone([dog], LATE_S)


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSTOP])
def test_workers_of_a_dead_or_halted_agent_are_dead_in_time(sig: int) -> None:
    started = time.monotonic()
    process, dog, worker = agent(1.0, "worker")
    process.send_signal(sig)
    try:
        assert not wait_gone([worker], LATE_S)
        assert time.monotonic() - started >= 1.0
    finally:
        process.kill()
        process.communicate()
    assert not wait_gone([dog], LATE_S)


# --- what it was told -----------------------------------------------------------------------------


def test_orders_may_come_in_pieces() -> None:
    whole = b"until 20.5\ngroup asv-1\nleaders 7:100 8:101\nleaders 9:3\ncgroup /sys/fs/a b\n"
    for size in range(1, len(whole)):
        orders = Orders()
        for start in range(0, len(whole), size):
            orders.take(whole[start : start + size])
        assert (orders.deadline, orders.token, orders.cgroup) == (20.5, "asv-1", "/sys/fs/a b")
        assert orders.leaders == [(7, 100), (8, 101), (9, 3)]
        orders.take(b"none\n")
        assert (orders.token, orders.leaders, orders.cgroup) == ("", [], "")


def test_a_deadline_is_acted_on_once_and_again_for_whoever_comes_later() -> None:
    orders = Orders()
    assert orders.wait_s(now=5.0) is None
    orders.take(b"until 7.0\ngroup asv-1\n")
    assert (orders.wait_s(now=5.0), orders.wait_s(now=9.0)) == (2.0, 0.0)
    orders.done()
    assert orders.wait_s(now=9.0) is None
    orders.take(b"leaders 7:100\n")
    assert orders.wait_s(now=9.0) == 0.0


# --- the arithmetic -------------------------------------------------------------------------------

DRIFT = 0.001
# Fractions of the lease, the unit of time here.
some = st.floats(0.0, 2.0)
brief = st.floats(0.0, 0.3)


@settings(max_examples=500, deadline=None)
@given(
    lease_s=st.floats(2.0, 60.0),
    rate=st.floats(1 - DRIFT, 1 / (1 - DRIFT)),
    kill_s=st.floats(0.0, 0.099),
    renewals=st.lists(st.tuples(some, brief, some, some), min_size=1, max_size=12),
)
def test_nobody_of_ours_is_alive_when_the_lease_ends(
    lease_s: float, rate: float, kill_s: float, renewals: list[tuple[float, float, float, float]]
) -> None:
    """On clocks of our own, whatever the network and the agent do.

    Each renewal: how long the agent stands still before it is sent, its way to the engine, the
    answer's way back, and how long the agent stands still before it tells the watchdog.
    """
    now = 0.0
    lease_end = 0.0
    orders = Orders()
    started = False
    dead_at: float | None = None
    for number, (pause, there, back, stall) in enumerate(renewals):
        sent = now + pause * lease_s
        handled = sent + there * lease_s
        if number and handled >= lease_end:
            break  # the engine has no such lease any more: this answer renews nothing
        # The engine counts from when it has handled it, on its own clock.
        lease_end = max(lease_end, handled + lease_s / rate)
        told = handled + (back + stall) * lease_s
        if started and (wait_s := orders.wait_s(now)) is not None and now + wait_s < told:
            break  # nobody tells the watchdog in time
        now = told
        deadline = deadlines_of(sent + lease_s * (1 - DRIFT), lease_s).watchdog
        orders.take(f"until {deadline!r}\n".encode())
        # As `Watchdog.permits`: a group is started as soon as there is a lease, or never.
        if not started and now < deadline:
            started = True
            orders.take(b"group asv-1\n")
    if started:
        wait_s = orders.wait_s(now)
        assert wait_s is not None
        dead_at = now + wait_s + kill_s * lease_s
        assert dead_at <= lease_end


def test_deadlines_are_in_order_and_before_the_end() -> None:
    ask, kill, watchdog = deadlines_of(100.0, 10.0)
    assert ask < kill < watchdog < 100.0
    # A renewal may fail and be tried again before anybody is asked to end.
    assert 100.0 - ask < 10.0 / 2


# --- with an agent --------------------------------------------------------------------------------


class OneRound:
    """A rendezvous whose lease is about to end, and comes back; it writes down what it is told."""

    def __init__(self, lasts_s: float) -> None:
        self.node = Node("n", "host", "127.0.0.1", 1)
        self.told: list[str] = []
        self._lasts_s = lasts_s
        self._tell: Callable[[float], None] = lambda _: None
        self._joined = 0

    def tell_deadlines(self, tell: Callable[[float], None]) -> bool:
        self._tell = tell
        tell(time.monotonic() + 1000.0)
        return True

    async def join(self, port: int) -> Round:
        self._joined += 1
        if self._joined > 1:
            return Round(1, "over", succeeded=True, why="all workers succeeded")
        members = (Member("n", "host", "127.0.0.1", 1),)
        self._tell(time.monotonic() + self._lasts_s)
        return Round(0, "running", members=members, master_port=port)

    async def interruption(self) -> Interruption:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async def fenced(self) -> float:
        # As after a renewal in the last moment.
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async def failing(self, culprit: Culprit) -> None:
        self.told.append("failing")

    async def ended(self, how: str) -> None:
        self.told.append(how)

    async def rejoin(self) -> None:
        self.told.append("rejoin")


def sleeping(standing: Standing) -> StartingProcesses:
    return start_processes(**shell(None, ["exec sleep 1000"]))


@pytest.mark.parametrize("lasts_s", [0.5, 0.0])
async def test_workers_that_it_has_killed_have_not_failed(lasts_s: float) -> None:
    """Also where they are not even started, because the lease has ended before."""
    rendezvous = OneRound(lasts_s)
    told = RunTeller(EventBus(), "run", max_restarts=0)
    gate = Gate(max_restarts=0)
    run = Agent(rendezvous, sleeping, shutdown_timeout_s=30.0, gate=gate, told=told)
    async with asyncio.timeout(20):
        outcome = await run.run()
    assert rendezvous.told == ["rejoin"]
    assert (outcome.result is not None) == (lasts_s > 0)


# --- two nodes on etcd ----------------------------------------------------------------------------

# Everything of a worker holds the lock of its rank: it and a daemon that ignores SIGTERM. Each line
# says who was started when, in which world. From the second time on, two together are the end.
WORKER = """
import fcntl, os, signal, subprocess, sys, time
rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
lock = os.open(f"{sys.argv[1]}/{rank}.lock", os.O_CREAT | os.O_RDWR)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    world = "two at once"
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["setsid", "sleep", "1000"], pass_fds=[lock])
said = f"{time.monotonic()} {os.getpid()} {rank} {sys.argv[2]} {world}\\n"
os.write(os.open(f"{sys.argv[1]}/lines", os.O_WRONLY), said.encode())
if world == "2" and int(os.environ.get("ASUPERVISE_ATTEMPT", 0)) > 0:
    sys.exit(0)
signal.pause()
"""


class Nodes:
    """Agents on one machine, and what their workers write."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self._folder = folder
        self._endpoint = endpoint
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        os.mkfifo(folder / "lines")
        self._fd = os.open(folder / "lines", os.O_RDWR | os.O_NONBLOCK)
        self._data = b""

    def start(self, name: str) -> None:
        command: list[Any] = [
            sys.executable, "-m", "asupervise", "--nnodes", "1:2", "--rdzv-backend", "etcd",
            "--rdzv-endpoint", self._endpoint, "--rdzv-id", self._folder.name,
            "--rdzv-conf", "lease_ttl=2", "--no-python", "--shutdown-timeout", 0.1,
            *PYTHON, WORKER, self._folder, name,
        ]  # fmt: skip
        self.agents[name] = subprocess.Popen(
            [*map(str, command)], cwd=ROOT, env=clean_environment(), start_new_session=True,
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def line(self) -> list[str]:
        while b"\n" not in self._data:
            assert select.select([self._fd], [], [], 20.0)[0], "no worker has started"
            self._data += os.read(self._fd, 65536)
        line, _, self._data = self._data.partition(b"\n")
        return line.decode().split(maxsplit=4)

    def close(self) -> None:
        os.close(self._fd)
        for process in self.agents.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.communicate()


@pytest.fixture
def nodes(tmp_path: Path, etcd: EtcdCluster) -> Iterator[Nodes]:
    pytest.importorskip("aetcd")
    made = Nodes(tmp_path, etcd.endpoints[0])
    yield made
    made.close()


def test_workers_of_a_halted_agent_are_dead_before_others_have_their_ranks(nodes: Nodes) -> None:
    nodes.start("a")
    nodes.start("b")
    first = {name: int(pid) for _, pid, _, name, _ in (nodes.line(), nodes.line())}
    nodes.agents["a"].send_signal(signal.SIGSTOP)
    halted = time.monotonic()
    assert not wait_gone([first["a"]], 10.0)
    dead = time.monotonic()
    assert dead - halted < 2.0
    began, _, _, name, world = nodes.line()
    assert (name, world) == ("b", "1")
    assert dead < float(began)
    nodes.agents["a"].send_signal(signal.SIGCONT)
    again = [nodes.line(), nodes.line()]
    assert sorted(line[3] for line in again) == ["a", "b"]
    assert {line[4] for line in again} == {"2"}
    for process in nodes.agents.values():
        _, said = process.communicate(timeout=20)
        assert process.returncode == 0, said.decode()
        assert b"failed" not in said
