"""A job of a chaos run over nodes: its agents, and how they end."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.chaos.nodes_history import History, Life
from tests.chaos.run import processes_with
from tests.conftest import clean_environment

__all__ = ["NODES", "NPROC", "Agent", "Job", "Stuck", "Timeline", "until"]

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("nodes_worker.py")
NODES, NPROC = 3, 2
LEASE_S = 3.0
# Within that a job is whole again, or over: many times what it takes.
RECOVERY_S = 60.0
# Within that no worker is left of a job whose agents have ended.
ENDING_S = 10.0
# Of a report: `rank      : 3 (local_rank: 1)`, `exitcode  : -9 (pid: 4711)`.
ROOT_CAUSE = re.compile(
    r"Root Cause.*?\n\s+rank\s+: (\d+).*?\n\s+exitcode\s+: (-?\d+) \(pid: (\d+)\)", re.DOTALL
)


class Stuck(Exception):
    """Something that was to happen did not."""


def until(done: Callable[[], bool], what: str, within_s: float = RECOVERY_S) -> None:
    """Wait for what others write or do.

    Raises:
        Stuck: if it does not come.
    """
    deadline = time.monotonic() + within_s
    while not done():
        if time.monotonic() > deadline:
            raise Stuck(f"not within {within_s:g} s: {what}")
        # Workers tell of themselves in a file, and nobody else at all.
        time.sleep(0.02)


class Timeline:
    """What was done and seen, with seconds on CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, what: str) -> None:
        self.lines.append(f"{time.monotonic():.3f} {what}")


class Cause(NamedTuple):
    """The root cause as an agent reports it."""

    rank: int
    exitcode: int
    pid: int


@dataclass
class Agent:
    """One `asupervise` on a node."""

    process: subprocess.Popen[bytes]
    stderr: Path

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def cause(self) -> Cause | None:
        found = ROOT_CAUSE.search(self.stderr.read_text(errors="replace"))
        return Cause(*map(int, found.groups())) if found else None


@dataclass
class Job:
    """A run over all nodes, until it is over.

    Attributes:
        folder: of its files.
        endpoints: of etcd.
        argv: what starts a program on a node.
        rng: what is random in it.
        timeline: what happens is written there.
        max_restarts: of the job.
        made_to_fail: by pid, workers that were killed or told to fail, with the exit codes that
            they may have.
    """

    folder: Path
    endpoints: Sequence[str]
    argv: Callable[[int, Sequence[str]], list[str]]
    rng: random.Random
    timeline: Timeline
    max_restarts: int
    made_to_fail: dict[int, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.history = History(self.folder / "history")
        self.agents: dict[int, Agent] = {}
        self._started = 0
        for slot in range(NODES):
            self.start_agent(slot)

    def close(self) -> None:
        """End what is left of it."""
        for agent in self.agents.values():
            if agent.running:
                agent.process.kill()
            agent.process.wait()
        self.history.close()

    # --- agents ----------------------------------------------------------------------------------

    def start_agent(self, slot: int) -> None:
        self._started += 1
        stderr = self.folder / f"agent.{slot}.{self._started}"
        words = [
            *(sys.executable, "-m", "asupervise", "--nnodes", f"{NODES - 1}:{NODES}"),
            *("--nproc-per-node", str(NPROC), "--max-restarts", str(self.max_restarts)),
            *("--restart-backoff", "0.05", "--min-uptime", "0.05", "--shutdown-timeout", "0.5"),
            *("--rdzv-backend", "etcd", "--rdzv-endpoint", ",".join(self.endpoints)),
            *("--rdzv-id", self.folder.name, "--log-dir", str(self.folder / "logs")),
            *("--rdzv-conf", f"lease_ttl={LEASE_S:g},last_call_timeout=2"),
            *("--no-python", sys.executable, "-I", "-S", str(WORKER), str(self.folder)),
        ]
        with stderr.open("wb") as file:
            process = subprocess.Popen(
                self.argv(slot, words),
                cwd=ROOT,
                env=clean_environment()
                | {"CHAOS_SLOT": str(slot), "TMPDIR": str(self.folder), "GRPC_VERBOSITY": "NONE"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=file,
            )
        self.agents[slot] = Agent(process, stderr)
        self.timeline.add(f"agent on node {slot} started: pid {process.pid}")

    def end_agent(self, slot: int, sig: signal.Signals) -> None:
        agent = self.agents[slot]
        agent.process.send_signal(sig)
        self.timeline.add(f"{sig.name} to the agent on node {slot}")
        until(lambda: not agent.running, f"the end of an agent after {sig.name}")

    # --- workers ---------------------------------------------------------------------------------

    def workers(self) -> list[Life]:
        """Who is alive now, by what was written a moment ago."""
        self.history.read_on()
        return self.history.alive_since(time.monotonic_ns() - 100_000_000)

    def kill_worker(self) -> None:
        if victim := self._victim():
            self._blame(victim, -signal.SIGKILL)
            self.timeline.add(f"SIGKILL to a worker: {victim}")
            try:
                os.kill(victim.pid, signal.SIGKILL)
            except ProcessLookupError:
                self.timeline.add("which was gone already")

    def fail_worker(self) -> None:
        if victim := self._victim():
            code = self.rng.choice((1, 3, 7, 42))
            self._blame(victim, code)
            self.timeline.add(f"exit code {code} for a worker: {victim}")
            # Under another name first: a worker is not to read half of it.
            new = self.folder / f"new.{victim.pid}"
            new.write_text(str(code))
            new.rename(self.folder / f"order.{victim.pid}")

    def _blame(self, victim: Life, code: int) -> None:
        self.made_to_fail.setdefault(victim.pid, set()).add(code)

    def _victim(self) -> Life | None:
        workers = self.workers()
        return self.rng.choice(workers) if workers else None

    # --- its course ------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether an agent has ended that nobody has ended."""
        return any(not agent.running for agent in self.agents.values())

    def wait_whole(self) -> None:
        """Wait until all nodes work together, or the job is over.

        Raises:
            Stuck: if neither comes.
        """
        since = time.monotonic_ns()

        def whole() -> bool:
            self.history.read_on()
            return self.over or self.history.complete_since(since, NODES * NPROC)

        until(whole, "all nodes at work, or the job's end")

    def finish(self) -> None:
        """Have all workers end with success from now on."""
        self.timeline.add("done: workers end with success")
        (self.folder / "done").touch()

    # --- what must be ----------------------------------------------------------------------------

    def overlaps(self) -> list[str]:
        self.history.read_on()
        return [f"two at once: {one}; {other}" for one, other in self.history.overlaps()]

    def wait_over(self) -> list[str]:
        """Wait for the end of all agents and workers; returns what is wrong with it.

        Raises:
            Stuck: if one does not end.
        """
        agents = self.agents
        until(
            lambda: not any(a.running for a in agents.values()),
            "the end of all agents, after one has ended",
        )
        # Those of an agent that was killed are ended behind it.
        until(lambda: not processes_with(str(self.folder)), "the end of all workers", ENDING_S)
        ends = {slot: (a.process.returncode, a.cause()) for slot, a in sorted(agents.items())}
        self.timeline.add(f"over: {ends}")
        if len(set(ends.values())) > 1:
            return [f"the nodes report different ends: {ends}"]
        status, cause = ends[0]
        if status == 0:
            return [] if (self.folder / "done").exists() else ["success that nobody has had"]
        if cause is None:
            return [f"failed with {status}, and no culprit"]
        expected = self.made_to_fail.get(cause.pid, set())
        if cause.exitcode not in expected:
            return [f"blamed: {cause}, which was not made to fail so ({expected or 'at all'})"]
        wanted = 128 - cause.exitcode if cause.exitcode < 0 else cause.exitcode
        return [] if status == wanted else [f"exit status {status} and not {wanted}"]
