"""Agents on nodes: network namespaces where those are permitted, else this machine alone."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster import netns
from tests.cluster.netns import cluster_network, not_permitted
from tests.conftest import ROOT, RUNS, clean_environment
from tests.elastic.etcd_server import EtcdCluster, etcd_cluster, not_installed
from tests.workers import Channel

__all__ = ["WORKERS", "Agent", "Cluster", "cluster", "needs_links"]

WORKERS = Path(__file__).parent / "workers"
# What a machine needs at the most that starts a dozen interpreters at once.
TIMEOUT_S = 60.0
# The kernel's name for the node, and all names with their addresses: whoever looks one up that is
# nowhere waits for a server that there is none of (torch's store does so for its peers' names).
# `ip netns exec` has given the program mounts of its own.
NAMED = (
    *("unshare", "--uts", "sh", "-ec"),
    'echo "$0" > /proc/sys/kernel/hostname; mount --bind "$1" /etc/hosts; shift; exec "$@"',
)


def needs_links() -> None:
    """Skip the test where there are no links to cut."""
    if reason := not_permitted():
        pytest.skip(reason)


class Agent:
    """``python -m asupervise`` on one node.

    Attributes:
        node: the node's number.
        process: the agent's own.
        ended_at: when it ended, on ``time.monotonic()``; 0.0 until then.
    """

    def __init__(
        self, node: int, argv: Sequence[str], env: Mapping[str, str], stdout: int, stderr: Path
    ) -> None:
        self.node = node
        self.argv = argv
        self.ended_at = 0.0
        self._stderr = stderr
        with stderr.open("wb") as file:
            self.process = subprocess.Popen(
                argv, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=file
            )
        self._waiter = threading.Thread(target=self._wait)
        self._waiter.start()

    def _wait(self) -> None:
        self.process.wait()
        self.ended_at = time.monotonic()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(errors="replace")

    @property
    def told(self) -> list[str]:
        """What the agent itself has said; its workers write to the same file."""
        beginning = "asupervise: "
        lines = self.stderr.splitlines()
        return [line.removeprefix(beginning) for line in lines if line.startswith(beginning)]

    async def status(self, timeout_s: float = TIMEOUT_S) -> int:
        """Its exit status, once it has ended."""
        await asyncio.to_thread(self._waiter.join, timeout_s)
        if self._waiter.is_alive():
            pytest.fail(f"node {self.node} has not ended within {timeout_s:g} s", pytrace=False)
        return self.process.returncode

    def kill(self) -> None:
        """As ``kill -9`` does it."""
        self.process.kill()

    def close(self) -> None:
        self.process.kill()
        self._waiter.join()


class Cluster:
    """Nodes, an etcd that all of them reach, and what their workers say; made by :func:`cluster`.

    What workers write to their standard output comes here, line by line.

    Attributes:
        etcd: of three members.
        network: the nodes' links, or None where there are none.
        folder: that all nodes share.
        history: every line that was read.
    """

    def __init__(self, folder: Path, etcd: EtcdCluster, network: netns.Network | None) -> None:
        self.folder = folder
        self.etcd = etcd
        self.network = network
        self.agents: list[Agent] = []
        self.history: list[list[str]] = []
        self._channel = Channel(folder)
        self._run_id = f"tests-{secrets.token_hex(4)}"
        self._hosts = folder / "hosts"
        self._hosts.write_text("127.0.0.1 localhost\n" + "".join(self._host_lines()))

    def _host_lines(self) -> Iterator[str]:
        for node in range(len(self.network.nodes) if self.network else 0):
            # torch's store listens for both families, and asks for the names of mapped addresses.
            yield f"{self.address(node)} {self.host(node)}\n"
            yield f"::ffff:{self.address(node)} {self.host(node)}\n"

    def close(self) -> None:
        for agent in self.agents:
            agent.close()
        self._channel.close()

    # --- agents ----------------------------------------------------------------------------------

    def start(
        self,
        node: int,
        script: Path,
        *args: object,
        nnodes: str,
        nproc: int = 1,
        conf: str = "lease_ttl=3",
        flags: Sequence[str] = (),
    ) -> Agent:
        """Start the agent of a node.

        Args:
            node: its number, from 0.
            script: what its workers run.
            args: the script's.
            nnodes: ``"MIN:MAX"``.
            nproc: how many workers.
            conf: for ``--rdzv-conf``.
            flags: more of them.
        """
        options = {
            "nnodes": nnodes,
            "nproc-per-node": nproc,
            "rdzv-backend": "etcd",
            "rdzv-endpoint": ",".join(self.etcd.endpoints),
            "rdzv-id": self._run_id,
            "rdzv-conf": conf,
            "local-addr": self.address(node),
            "max-restarts": 0,
        }
        given = [f"--{name}={value}" for name, value in options.items()]
        argv = [sys.executable, "-m", "asupervise", *given, *flags, str(script), *map(str, args)]
        stderr = self.folder / f"agent{len(self.agents)}.err"
        with self._channel.path.open("r+b", buffering=0) as stdout:
            env = self._environment(node)
            agent = Agent(node, self._on(node, argv), env, stdout.fileno(), stderr)
        self.agents.append(agent)
        return agent

    def address(self, node: int) -> str:
        return self.network.nodes[node].address if self.network else "127.0.0.1"

    def host(self, node: int) -> str:
        """The name that a node has for itself."""
        return f"node-{node}" if self.network else os.uname().nodename

    def _on(self, node: int, argv: list[str]) -> list[str]:
        if self.network is None:
            return argv
        return self.network.nodes[node].argv([*NAMED, self.host(node), str(self._hosts), *argv])

    def _environment(self, node: int) -> dict[str, str]:
        return clean_environment() | {
            "TMPDIR": str(self.folder),
            "NODE": str(node),
            # gloo goes by the host's name otherwise.
            "GLOO_SOCKET_IFNAME": "eth0" if self.network else "lo",
        }

    # --- what workers say ------------------------------------------------------------------------

    async def said(
        self, count: int, *words: object, timeout_s: float = TIMEOUT_S
    ) -> list[list[str]]:
        """The next `count` lines that begin with these words; others are passed over."""
        beginning = [str(word) for word in words]
        found: list[list[str]] = []
        try:
            async with asyncio.timeout(timeout_s):
                while len(found) < count:
                    [line] = await self._channel.lines(1)
                    self.history.append(line)
                    if line[: len(beginning)] == beginning:
                        found.append(line)
        except TimeoutError:
            message = f"{len(found)} of {count} workers said {beginning} within {timeout_s:g} s"
            pytest.fail(message, pytrace=False)
        return found

    async def present(self, count: int) -> None:
        """Wait until so many agents have come to the run."""
        await asyncio.to_thread(self._wait_present, count)

    def _wait_present(self, count: int) -> None:
        under = f"/asupervise/{self._run_id}/node/".encode()
        keys = {"key": under, "range_end": under[:-1] + b"0"}
        wish = {name: base64.b64encode(key).decode() for name, key in keys.items()}
        # From the beginning; etcd's gateway sends a line for each message.
        request = json.dumps({"create_request": {**wish, "start_revision": 1}})
        connection = http.client.HTTPConnection(self.etcd.endpoints[0], timeout=TIMEOUT_S)
        with contextlib.closing(connection):
            connection.request("POST", "/v3/watch", request)
            found: set[str] = set()
            with connection.getresponse() as response:
                while len(found) < count:
                    result = json.loads(response.readline())["result"]
                    found |= {event["kv"]["key"] for event in result.get("events", ())}

    def runs(self) -> list[subprocess.CompletedProcess[bytes]]:
        """What is to be shown when the test fails."""
        said = "\n".join(" ".join(line) for line in self.history[-200:]).encode()
        of_agents = [
            subprocess.CompletedProcess(list(a.argv), a.process.poll(), b"", a.stderr.encode())
            for a in self.agents
        ]
        all_workers = subprocess.CompletedProcess(["all", "workers"], 0, said, b"")
        return [*of_agents, all_workers]


@contextlib.contextmanager
def cluster(request: pytest.FixtureRequest, folder: Path, nodes: int) -> Iterator[Cluster]:
    """Nodes and an etcd of three members; all that was started on them is ended.

    Args:
        request: of the test, which shows what was written when it fails.
        folder: that all nodes share.
        nodes: how many.
    """
    if reason := not_installed():
        pytest.skip(reason)
    # etcd syncs every write to the disk, which is quicker where there is none.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with ExitStack() as stack:
        network = None if not_permitted() else stack.enter_context(cluster_network(nodes))
        temporary = tempfile.TemporaryDirectory(prefix="asupervise-etcd-", dir=memory)
        data = Path(stack.enter_context(temporary))
        host = network.host_address if network else "127.0.0.1"
        etcd = stack.enter_context(etcd_cluster(data, 3, host=host))
        made = Cluster(folder, etcd, network)
        stack.callback(made.close)
        try:
            yield made
        finally:
            request.node.stash.setdefault(RUNS, []).extend(made.runs())
