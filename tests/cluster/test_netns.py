"""Nodes in network namespaces do as nodes on a network do."""

from __future__ import annotations

import http.client
import os
import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.netns import Network, Node, cluster_network, ip, not_permitted
from tests.elastic.etcd_server import etcd_cluster, not_installed

# Answers each line; says where first.
SERVER = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    while True:
        with server.accept()[0] as connection, connection.makefile("rwb", buffering=0) as file:
            for line in file:
                file.write(line)
"""
# Sends each line there, and writes what comes back.
CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as connection:
    with connection.makefile("rwb", buffering=0) as file:
        for line in sys.stdin.buffer:
            file.write(line)
            print(file.readline().decode(), end="", flush=True)
"""
REACH = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3])).close()
except OSError as exc:
    print(type(exc).__name__)
else:
    print("reached")
"""


@pytest.fixture(autouse=True, scope="module")
def _permitted() -> None:
    if reason := not_permitted():
        pytest.skip(reason)


@pytest.fixture
def network() -> Iterator[Network]:
    with cluster_network(3) as network:
        yield network


@contextmanager
def program(node: Node, source: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    process = node.run(
        [sys.executable, "-c", source, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str], timeout_s: float = 20.0) -> str | None:
    """What it says next, or None if it says nothing for so long."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline().strip() if selector.select(timeout_s) else None


@contextmanager
def server(node: Node) -> Iterator[int]:
    with program(node, SERVER, node.address) as process:
        yield int(line(process) or "0")


def say(client: subprocess.Popen[str], word: str) -> None:
    assert client.stdin is not None
    client.stdin.write(f"{word}\n")


def reach(node: Node, address: str, port: object, timeout_s: float = 10.0) -> str | None:
    with program(node, REACH, address, port, timeout_s) as process:
        return line(process)


def test_nodes_reach_each_other_and_the_host(network: Network) -> None:
    one, two, three = network.nodes
    assert len({node.address for node in network.nodes} | {network.host_address}) == 4
    with server(one) as port:
        assert reach(two, one.address, port) == "reached"
        assert reach(three, one.address, port) == "reached"
        # A port of one is none of another.
        assert reach(two, three.address, port) == "ConnectionRefusedError"
        assert reach(one, "127.0.0.1", port) == "ConnectionRefusedError"
    with socket.create_server((network.host_address, 0)) as host:
        port = host.getsockname()[1]
        assert [reach(n, network.host_address, port) for n in network.nodes] == ["reached"] * 3


def test_a_node_that_is_cut_reaches_nobody_and_nobody_it(network: Network) -> None:
    one, two, three = network.nodes
    with server(one) as of_one, server(two) as of_two:
        one.cut()
        assert reach(one, two.address, of_two, 0.5) != "reached"
        assert reach(two, one.address, of_one, 0.5) != "reached"
        # The others go on, and it has itself.
        assert reach(three, two.address, of_two) == "reached"
        assert reach(one, one.address, of_one) == "reached"
        one.mend()
        assert reach(one, two.address, of_two) == "reached"
        assert reach(two, one.address, of_one) == "reached"


def test_a_connection_stalls_while_the_link_is_cut_and_goes_on_after_it(network: Network) -> None:
    one, two, _ = network.nodes
    with server(one) as port, program(two, CLIENT, one.address, port) as client:
        say(client, "before")
        assert line(client) == "before"
        one.cut()
        say(client, "meanwhile")
        # Not even an error.
        assert line(client, 1.0) is None
        one.mend()
        assert line(client) == "meanwhile"
        say(client, "after")
        assert line(client) == "after"


@pytest.mark.skipif(not_installed() is not None, reason=not_installed() or "")
def test_nodes_reach_etcd_on_the_bridge(network: Network, tmp_path: Path) -> None:
    node = network.nodes[0]
    with etcd_cluster(tmp_path, host=network.host_address) as cluster:
        address, _, port = cluster.endpoints[0].partition(":")
        assert address == network.host_address
        assert reach(node, address, port) == "reached"
        node.cut()
        assert reach(node, address, port, 0.5) != "reached"
        # As the host sees it, nothing is the matter.
        connection = http.client.HTTPConnection(cluster.endpoints[0], timeout=10)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()


def test_a_program_on_a_node_is_the_process_that_was_started(network: Network) -> None:
    show = "import os; print(os.getpid(), os.readlink('/proc/self/ns/net'))"
    with program(network.nodes[0], show) as process:
        pid, namespace = (line(process) or "").split()
        assert int(pid) == process.pid
        assert namespace != os.readlink("/proc/self/ns/net")


def left(names: list[str]) -> list[str]:
    there = ip("netns", "list") + ip("-o", "link", "show")
    return [name for name in names if name in there]


@pytest.mark.parametrize("failing", [False, True])
def test_nothing_is_left(failing: bool) -> None:
    names = []
    with cluster_network(2) as network:
        names = [network._bridge, *(n.name for n in network.nodes)]
        names += [n._link for n in network.nodes]
        assert left(names) == names
        network.nodes[0].cut()
        if failing:
            # Also where something of it is gone already.
            ip("netns", "delete", network.nodes[1].name)
    assert left(names) == []


def test_nothing_is_left_of_one_that_could_not_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(2)
    names = [network._bridge, *(n.name for n in network.nodes), *(n._link for n in network.nodes)]
    monkeypatch.setattr(network.nodes[1], "address", "not an address")
    with pytest.raises(OSError, match="not an address"):
        network.__enter__()
    assert left(names) == []
