"""Random faults on three nodes, three members of etcd, and their links.

``python tests/chaos/nodes.py --seed 7 --rounds 200``. A round is a fault or two, and the recovery:
until all nodes work together again, or the job is over; then the next job begins. Always: no two
workers of one global rank are alive at once, by what each has written every 10 ms; nobody waits for
ever; a job ends with success, or with the culprit that was really made to fail, whom all nodes
report, with the same exit status. A violation is printed with what was done and seen.

Nodes are network namespaces. Where these are not permitted they share the loopback interface, and
no links are cut. What happens when depends on the machine as well: a seed gives the same faults,
and not always the same violation.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.chaos.nodes_job import LEASE_S, NODES, Job, Stuck, Timeline, until  # noqa: E402
from tests.cluster.netns import Network, cluster_network, not_permitted  # noqa: E402
from tests.elastic.etcd_server import EtcdCluster, etcd_cluster, not_installed  # noqa: E402

MEMBERS = 3
# A job has so many rounds at the most, that there be several jobs.
JOB_ROUNDS = 12
TOLD_LINES = 60


class World:
    """What faults happen to.

    Args:
        etcd: its members.
        network: of the nodes, or None for loopback.
        seed: of all that is random.
        folder: of the jobs' files.
    """

    def __init__(self, etcd: EtcdCluster, network: Network | None, seed: int, folder: Path) -> None:
        self.etcd = etcd
        self.network = network
        self.rng = random.Random(seed)
        self.folder = folder
        self.timeline = Timeline()
        self.jobs = 0
        self.job: Job | None = None

    def begin_job(self) -> Job:
        self.jobs += 1
        self.timeline = Timeline()
        restarts = self.rng.randint(2, 6)
        self.timeline.add(f"job {self.jobs} with {restarts} restarts")
        self.job = Job(
            self.folder / f"job{self.jobs}", self.etcd.endpoints, self._argv, self.rng,
            self.timeline, restarts,
        )  # fmt: skip
        self.job.wait_whole()
        return self.job

    def end_job(self) -> None:
        job, self.job = self.job, None
        if job is not None:
            job.close()

    def _argv(self, slot: int, words: Sequence[str]) -> list[str]:
        return self.network.nodes[slot].argv(words) if self.network else list(words)

    def hold(self, low: float, high: float) -> float:
        """For how long a fault lasts, in leases: that is what it is about, and no event's wait."""
        return self.rng.uniform(low, high) * LEASE_S


# --- faults: each mends what it breaks ------------------------------------------------------------


def a_worker_is_killed(world: World, job: Job) -> None:
    job.kill_worker()


def a_worker_fails(world: World, job: Job) -> None:
    job.fail_worker()


def two_workers_fail(world: World, job: Job) -> None:
    job.fail_worker()
    job.kill_worker()


def an_agent_is_killed(world: World, job: Job) -> None:
    slot = world.rng.randrange(NODES)
    job.end_agent(slot, signal.SIGKILL)
    if world.rng.random() < 0.5:
        time.sleep(world.hold(0.2, 1.6))
    job.start_agent(slot)


def two_agents_are_killed(world: World, job: Job) -> None:
    slots = world.rng.sample(range(NODES), 2)
    for slot in slots:
        job.end_agent(slot, signal.SIGKILL)
    for slot in slots:
        job.start_agent(slot)


def a_node_leaves(world: World, job: Job) -> None:
    slot = world.rng.randrange(NODES)
    job.end_agent(slot, signal.SIGTERM)
    job.start_agent(slot)


def a_member_is_killed(world: World, job: Job) -> None:
    _kill_members(world, 1)


def the_quorum_is_lost(world: World, job: Job) -> None:
    _kill_members(world, 2)


def _kill_members(world: World, count: int) -> None:
    members = world.rng.sample(range(MEMBERS), count)
    if world.rng.random() < 0.5:
        leader = world.etcd.leader()
        members = [leader, *[m for m in members if m != leader]][:count]
    for member in members:
        world.etcd.kill(member)
    world.timeline.add(f"SIGKILL to etcd's members {members}")
    time.sleep(world.hold(0, 1.2))
    for member in members:
        world.etcd.start(member)
    world.timeline.add(f"etcd's members {members} are back")


def a_member_stands_still(world: World, job: Job) -> None:
    member = world.rng.randrange(MEMBERS)
    world.timeline.add(f"SIGSTOP to etcd's member {member}")
    world.etcd.stop(member)
    time.sleep(world.hold(0.2, 1.6))
    world.etcd.cont(member)
    world.timeline.add(f"SIGCONT to etcd's member {member}")


def a_link_is_cut(world: World, job: Job) -> None:
    assert world.network is not None
    slot = world.rng.randrange(NODES)
    world.timeline.add(f"link of node {slot} cut")
    world.network.nodes[slot].cut()
    time.sleep(world.hold(0.2, 2.5))
    world.network.nodes[slot].mend()
    world.timeline.add(f"link of node {slot} mended")


def an_agent_stands_still(world: World, job: Job) -> None:
    agent = job.agents[world.rng.randrange(NODES)]
    world.timeline.add(f"SIGSTOP to the agent {agent.process.pid}")
    agent.process.send_signal(signal.SIGSTOP)
    time.sleep(world.hold(0.5, 2.5))
    agent.process.send_signal(signal.SIGCONT)
    world.timeline.add(f"SIGCONT to the agent {agent.process.pid}")


Fault = Callable[[World, Job], None]
FAULTS: dict[Fault, int] = {
    a_worker_is_killed: 3,
    a_worker_fails: 3,
    two_workers_fail: 2,
    an_agent_is_killed: 4,
    two_agents_are_killed: 1,
    a_node_leaves: 2,
    a_member_is_killed: 2,
    a_member_stands_still: 2,
    the_quorum_is_lost: 1,
    a_link_is_cut: 4,
    an_agent_stands_still: 3,
}


# --- the run --------------------------------------------------------------------------------------


def play(world: World, job: Job, faults: dict[Fault, int], number: int) -> list[str]:
    """One round; returns the violations."""
    rng = world.rng
    time.sleep(rng.choice((0.0, 0.05, 0.2, 0.5)))
    chosen = rng.choices(list(faults), list(faults.values()), k=rng.choice((1, 1, 1, 2)))
    world.timeline.add(f"round {number}: {', '.join(f.__name__ for f in chosen)}")
    ends = rng.random() < 0.05
    if ends:
        job.finish()
    for fault in chosen:
        # A second one finds a job that is not whole, or over.
        fault(world, job)
    job.wait_whole()
    return job.overlaps()


def conclude(job: Job) -> list[str]:
    """Have the job end, if it is not over; returns the violations."""
    if not job.over:
        job.finish()
        until(lambda: job.over, "the job's end after success")
    found = job.wait_over()
    return [*found, *job.overlaps()]


def run(world: World, faults: dict[Fault, int], rounds: int) -> int:
    begin, violations, number = time.monotonic(), 0, 0
    while number < rounds:
        found: list[str] = []
        try:
            job = world.begin_job()
            last = min(rounds, number + JOB_ROUNDS)
            while number < last and not job.over and not found:
                number += 1
                found = play(world, job, faults, number)
            found = found or conclude(job)
        except Stuck as stuck:
            found = [str(stuck)]
        if found:
            violations += 1
            tell(world, number, found)
        world.end_job()
        took = time.monotonic() - begin
        print(
            f"{number} rounds, {world.jobs} jobs, {violations} violations, {took:.0f} s",
            flush=True,
        )
    return violations


def tell(world: World, number: int, found: list[str]) -> None:
    print(f"VIOLATION in round {number}, {world.job.folder if world.job else ''}:")
    for words in found:
        print(f"  {words}")
    for line in world.timeline.lines[-TOLD_LINES:]:
        print(f"    {line}")
    if world.job is not None:
        for slot, agent in sorted(world.job.agents.items()):
            state = "running" if agent.running else agent.process.returncode
            print(f"    agent on node {slot}: {state}: {agent.stderr}")
        world.job.history.read_on()
        for line in world.job.history.describe(time.monotonic_ns() - 20_000_000_000)[-40:]:
            print(f"    {line}")
    sys.stdout.flush()


@contextlib.contextmanager
def world_of(seed: int, folder: Path, *, loopback: bool) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        network = None
        if reason := "--loopback" if loopback else not_permitted():
            print(f"no links are cut: {reason}", flush=True)
        else:
            network = stack.enter_context(cluster_network(NODES))
        host = network.host_address if network else "127.0.0.1"
        etcd = stack.enter_context(etcd_cluster(folder, MEMBERS, host=host))
        world = World(etcd, network, seed, folder)
        stack.callback(world.end_job)
        yield world


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--only", action="append", default=[], metavar="FAULT", help="such faults")
    parser.add_argument("--without", action="append", default=[], metavar="FAULT")
    parser.add_argument("--loopback", action="store_true", help="no network namespaces")
    options = parser.parse_args()
    if reason := not_installed():
        print(reason, file=sys.stderr)
        return 1
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="asupervise-chaos-nodes-"))
    with world_of(seed, folder, loopback=options.loopback) as world:
        faults = {
            fault: weight
            for fault, weight in FAULTS.items()
            if (not options.only or fault.__name__ in options.only)
            and fault.__name__ not in options.without
            and (world.network is not None or fault is not a_link_is_cut)
        }
        violations = run(world, faults, options.rounds)
    print(f"seed {seed}: {options.rounds} rounds, {violations} violations", flush=True)
    if violations:
        print(f"kept: {folder}", flush=True)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
