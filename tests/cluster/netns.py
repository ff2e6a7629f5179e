"""Nodes that are network namespaces on one bridge, so that their links can be cut."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["Network", "Node", "cluster_network", "not_permitted"]

# Ours among those of a machine: 10.213.X.0/24, where X is the process's.
NET = "10.213"
# No digits of a number in base 16.
TAGS = "ghijklmnopqrstuvwxyz"
COUNTER = itertools.count()


def ip(*args: str) -> str:
    """Run iproute2's ``ip``; returns what it writes."""
    done = subprocess.run(["ip", *args], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(args)}: {done.stderr.strip()}")
    return done.stdout


@functools.cache
def not_permitted() -> str | None:
    """Why no network namespaces can be had here, or None; tried out once."""
    if not shutil.which("ip"):
        return "ip is not installed (Debian: iproute2)"
    try:
        with cluster_network(1):
            return None
    except OSError as exc:
        return f"network namespaces are not permitted here: {exc}"


class Node:
    """A network namespace with one link to the bridge.

    Attributes:
        name: of the namespace.
        address: of the node.
    """

    def __init__(self, name: str, link: str, address: str) -> None:
        self.name = name
        self.address = address
        # The bridge's end of it.
        self._link = link

    def run(self, argv: Sequence[str], **popen: Any) -> subprocess.Popen[Any]:
        """Start a program on the node.

        ``ip netns exec`` becomes the program: its pid is the program's own.

        Example:
            >>> with node.run(["hostname", "-I"], stdout=subprocess.PIPE, text=True) as process:
            ...     print(process.communicate()[0])
        """
        return subprocess.Popen(self.argv(argv), **popen)

    def argv(self, argv: Sequence[str]) -> list[str]:
        """What starts a program on the node, for who starts it in another way."""
        return ["ip", "netns", "exec", self.name, *argv]

    def cut(self) -> None:
        """Cut the link: whatever is sent is lost, and nobody is told."""
        ip("link", "set", self._link, "down")

    def mend(self) -> None:
        """Mend the link; what was lost is sent again by whoever wants to."""
        ip("link", "set", self._link, "up")

    def _add(self, bridge: str, host_address: str) -> None:
        inner = "eth0"
        ip("netns", "add", self.name)
        ip("link", "add", self._link, "type", "veth", "peer", "name", inner, "netns", self.name)
        ip("link", "set", self._link, "master", bridge, "up")
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", inner)
        ip("-n", self.name, "link", "set", inner, "up")
        ip("-n", self.name, "link", "set", "lo", "up")
        ip("-n", self.name, "route", "add", "default", "via", host_address)

    def _remove(self) -> None:
        # Some may not have come into being. Without its namespace a link goes as well, but only
        # in a moment; so it goes first.
        with contextlib.suppress(OSError):
            ip("link", "delete", self._link)
        with contextlib.suppress(OSError):
            ip("netns", "delete", self.name)


class Network:
    """A bridge and its nodes; made by :func:`cluster_network`.

    Attributes:
        nodes: by number.
        host_address: of this machine on the bridge, for what all nodes reach, such as etcd.
    """

    def __init__(self, nodes: int) -> None:
        subnet = f"{NET}.{_free_subnet()}"
        # The process's, and one more for each network; names of interfaces have 15 characters at
        # the most.
        tag = f"{os.getpid():x}{TAGS[next(COUNTER) % len(TAGS)]}"
        self._bridge = f"asb{tag}"
        self.host_address = f"{subnet}.1"
        self.nodes = [
            Node(f"asn{tag}-{i}", f"asv{tag}-{i}", f"{subnet}.{i + 10}") for i in range(nodes)
        ]

    def __enter__(self) -> Network:
        try:
            ip("link", "add", self._bridge, "type", "bridge")
            ip("address", "add", f"{self.host_address}/24", "dev", self._bridge)
            ip("link", "set", self._bridge, "up")
            for node in self.nodes:
                node._add(self._bridge, self.host_address)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _remove(self) -> None:
        for node in self.nodes:
            node._remove()
        # It may not have come into being.
        with contextlib.suppress(OSError):
            ip("link", "delete", self._bridge)


def _free_subnet() -> int:
    taken = ip("-4", "-o", "address", "show")
    wishes = ((os.getpid() + i) % 256 for i in range(256))
    return next(n for n in wishes if f" {NET}.{n}." not in taken)


@contextlib.contextmanager
def cluster_network(nodes: int) -> Iterator[Network]:
    """Make `nodes` namespaces on a bridge of their own, and remove them.

    Processes on the nodes are to be ended by who started them.

    Raises:
        OSError: where it is not permitted; see `not_permitted`.

    Example:
        >>> with cluster_network(2) as network:
        ...     network.nodes[0].cut()
    """
    with Network(nodes) as network:
        yield network
