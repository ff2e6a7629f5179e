"""Rounds of many nodes that agree through etcd: how long one takes, and what it asks of etcd."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.growth import Points, exponents, kept
from benchmarks.measure import SUBJECT, Case, Goal, Metric, Sample
from benchmarks.processes import Resident, ms
from benchmarks.topics import Setup, Topic

_LIMIT = "bare etcd"
_AGENTS = (2, 16, 128, 1000)
_TIMEOUT_S = 60.0
# Not so short that renewals are counted, or a lease ends where one process keeps a thousand.
_LEASE_S = 120.0

_ROUND = Metric("round", "ms", 1)
_HEARD = Metric("failure heard", "ms", 1)
_VERDICT = Metric("verdict", "ms", 1)
_CALLS = Metric("calls a node", "", 1)
_WATCHES = Metric("watches a node", "", 2)


# --- inside the candidates' processes -------------------------------------------------------------


class _Crowd:
    """All agents of a run: they go from step to step together, and each step is timed."""

    def __init__(self, request: dict[str, Any]) -> None:
        # Each time it would go through what all agents know, of which a node has its own.
        gc.disable()
        self.size: int = request["agents"]
        self.operations: Counter[str] = Counter()
        self._endpoint: str = request["endpoint"]
        # Each run has keys of its own.
        self._prefix = f"/benchmarks/{time.monotonic_ns()}/"
        self._barrier = asyncio.Barrier(self.size)
        self._since_ns = 0
        self._sample: dict[str, float] = {}

    @contextlib.asynccontextmanager
    async def engine(self) -> AsyncIterator[Any]:
        """A connection of its own, which is counted."""
        from asupervise.elastic.rendezvous.etcd_engine import EtcdConfig, EtcdEngine

        config = EtcdConfig((self._endpoint,), self._prefix, _LEASE_S, _TIMEOUT_S)
        engine = await EtcdEngine.open(config)
        try:
            yield engine
        finally:
            await engine.close()
            self.operations.update(engine.operations)

    async def begin(self) -> None:
        """Wait until all are here, and begin to count the time."""
        if await self._barrier.wait() == 0:
            self._since_ns = time.monotonic_ns()
        await self._barrier.wait()

    def done(self, metric: Metric) -> None:
        """This agent is done; the last one's time is kept."""
        self._sample[metric.name] = ms(self._since_ns, time.monotonic_ns())

    def sample(self) -> Sample:
        return {
            **self._sample,
            _CALLS.name: self.operations.total() / self.size,
            _WATCHES.name: self.operations["watch"] / self.size,
        }


async def supervised(request: dict[str, Any]) -> Sample:
    from asupervise.elastic.coordinator import Coordinator, new_id
    from asupervise.elastic.decide import Policy
    from asupervise.elastic.records import Culprit, Node, Terms

    crowd = _Crowd(request)
    terms = Terms(crowd.size, crowd.size)

    async def agent(place: int) -> None:
        node = Node(new_id(), f"node{place}", "127.0.0.1", nproc=8)
        async with (
            crowd.engine() as engine,
            Coordinator.open(engine, node, terms, Policy()) as coordinator,
        ):
            await crowd.begin()
            round = await coordinator.join(port=29500)
            crowd.done(_ROUND)
            await crowd.begin()
            if place == crowd.size // 2:
                failure = Culprit(node.id, round.number, rank=place * 8, uptime_s=9.0)
                await coordinator.failing(failure)
                await coordinator.ended("failed")
            else:
                await coordinator.interruption()
                crowd.done(_HEARD)
                await coordinator.ended("stopped")
            over = await coordinator.join(port=29500)
            crowd.done(_VERDICT)
            if over.culprit is None or over.culprit.rank != crowd.size // 2 * 8:
                raise RuntimeError(f"no verdict: {over.state}, {over.why}")

    async with asyncio.TaskGroup() as group:
        for place in range(crowd.size):
            group.create_task(agent(place))
    return crowd.sample()


async def bare(request: dict[str, Any]) -> Sample:
    """Each writes a key and watches one; one of them counts the keys, and writes that one."""
    from asupervise.elastic.engine import Put

    crowd = _Crowd(request)

    async def agent(place: int) -> None:
        async with crowd.engine() as engine, asyncio.TaskGroup() as group:
            revision = (await engine.read("said/")).revision
            if place == 0:
                group.create_task(_count(engine, revision, crowd.size))
            async with contextlib.aclosing(engine.watch("said/", revision)) as heard:
                for metric in (_ROUND, _VERDICT):
                    await crowd.begin()
                    await engine.commit([], [Put(f"own/{place}", metric.name, leased=True)])
                    await anext(heard)
                    crowd.done(metric)

    async with asyncio.TaskGroup() as group:
        for place in range(crowd.size):
            group.create_task(agent(place))
    return crowd.sample()


async def _count(engine: Any, revision: int, size: int) -> None:
    from asupervise.elastic.engine import Put

    count = 0
    async for changes in engine.watch("own/", revision):
        before, count = count, count + len(changes)
        if before // size < count // size:
            await engine.commit([], [Put("said/all", str(count))])
        if count == 2 * size:
            return


# --- the comparison -------------------------------------------------------------------------------


def _cases(setup: Setup) -> Iterator[Case]:
    if missing := _missing():
        setup.left_out.add(f"rounds: {missing}")
        return
    points: Points = defaultdict(lambda: defaultdict(list))
    with _etcd(setup) as endpoint:
        for agents in _AGENTS[: 3 if setup.quick else None]:
            request = {"agents": agents, "endpoint": endpoint}
            runs = {
                _LIMIT: partial(_run_fresh, "bare", request),
                SUBJECT: partial(_run_fresh, "supervised", request),
            }
            yield Case(
                name=f"{agents:,} agents",
                group="number of agents",
                size=agents,
                metrics=[_ROUND, _HEARD, _VERDICT, _CALLS, _WATCHES],
                candidates=kept(points, "agents", agents, runs),
                limit=_LIMIT,
                goals=[Goal(_CALLS.name, "<=", 12), Goal(_WATCHES.name, "<=", 2)],
                rounds=1 if agents > 128 else setup.rounds(3, quick=1),
                warmups=0,
            )
    yield exponents("agents", points, (SUBJECT,), [_CALLS, _WATCHES], bound=0.1)


def _run_fresh(function: str, request: dict[str, Any]) -> Sample:
    with Resident(f"rounds:{function}", python=sys.executable) as resident:
        # Imports are not counted.
        resident.ask({**request, "agents": 2})
        return resident.ask(request, timeout_s=2 * _TIMEOUT_S)


def _missing() -> str:
    """What there is not, of what a round needs."""
    if shutil.which("etcd") is None:
        return "etcd is not installed (Debian: etcd-server)"
    if importlib.util.find_spec("aetcd") is None:
        return "aetcd is not installed (pip install 'asupervise[etcd]')"
    return ""


@contextlib.contextmanager
def _etcd(setup: Setup) -> Iterator[str]:
    """An etcd of one member; where clients find it."""
    # It syncs each write to the disk, which is not what is to be measured.
    folder = Path(next(setup.memory_folder("etcd"), str(setup.scratch / "etcd")))
    folder.mkdir(parents=True, exist_ok=True)
    client, peer = _free_ports(2)
    at, peers = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
    argv = [
        *("etcd", "--data-dir", str(folder / "data"), "--log-level", "error"),
        *("--listen-client-urls", at, "--advertise-client-urls", at),
        *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers),
        *("--initial-cluster", f"default={peers}"),
    ]
    null = subprocess.DEVNULL
    with subprocess.Popen(argv, stdin=null, stdout=null, stderr=null) as process:
        try:
            # Who connects waits until it answers.
            yield f"127.0.0.1:{client}"
        finally:
            process.kill()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in made]


TOPIC = Topic(
    name="rounds",
    title="2 to 1,000 agents on one etcd, without workers: from when all are connected until all "
    "have the round; from a worker's failure on one of them until all others have heard of it, "
    "and until all know that the run is over, and who is to blame; calls to etcd, from each "
    "agent's first to its last, by the number of agents",
    limit="the least that clients of etcd can do: each writes a key and watches one, which the "
    "first writes when all have written; and once more",
    cases=_cases,
    plots=(_ROUND.name, _HEARD.name, _VERDICT.name, _CALLS.name),
    notes=(
        "All agents are tasks of one process, which shares two CPUs or more with etcd: a thousand "
        "nodes have a CPU each. What each reads of a round grows with the nodes, and so that of "
        "all with their square.",
        "A watch that begins at an earlier revision etcd brings up to date every 100 ms "
        "(syncWatchersLoop): the first round of a few agents takes that long, with us and without.",
    ),
)
