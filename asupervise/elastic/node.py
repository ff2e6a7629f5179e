"""This machine as a node: how it presents itself, and a round as it may be."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from asupervise.elastic.agent import Standing
from asupervise.elastic.ports import HeldPort
from asupervise.elastic.records import Member, Node, Round
from asupervise.elastic.rendezvous import Request

__all__ = ["own_gpus", "preview", "this_node"]


def this_node(
    nproc: int,
    *,
    address: str | None = None,
    endpoint: str = "",
    role: str = "default",
    node_rank: int | None = None,
) -> Node:
    """How this machine presents itself.

    Args:
        nproc: how many workers it starts.
        address: where the others reach it; by default the one that it reaches `endpoint` from.
        endpoint: ``host:port`` of the engine, or "".
        role: of the workers.
        node_rank: its place, where it was given one.
    """
    host = os.uname().nodename
    own = address or (_address_towards(endpoint) if endpoint else "127.0.0.1")
    return Node(os.urandom(8).hex(), host, own, nproc, role, node_rank)


def _address_towards(endpoint: str) -> str:
    """Our address on the way to it; nothing is sent (connect(2) of a datagram socket)."""
    host, _, port = endpoint.split(",")[0].rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port or 0), type=socket.SOCK_DGRAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            own: str = probe.getsockname()[0]
            return own
    except (OSError, ValueError, IndexError):
        return os.uname().nodename


def preview(request: Request) -> Standing:
    """A round as it may be: with the fewest nodes, each like this one."""
    me = request.node
    count = request.terms.min_nodes
    place = min(me.node_rank or 0, count - 1)
    members = tuple(
        Member(
            me.id if rank == place else str(rank),
            me.host,
            request.master_addr or me.address,
            me.nproc,
            me.role,
        )
        for rank in range(count)
    )
    port = request.master_port
    if port is None:
        with HeldPort() as held:
            port = held.number
    return Standing(Round(0, "running", members=members, master_port=port), place, 0)


def own_gpus(nproc: int, environ: Mapping[str, str]) -> dict[int, dict[str, str]]:
    """By local rank, the variables that leave each worker one GPU: for a virtual local rank.

    Args:
        nproc: how many workers.
        environ: what they inherit, which may hide GPUs.
    """
    from asupervise.binding import gpu_visibility
    from asupervise.topology import read_gpus

    gpus = read_gpus()
    return {rank: gpu_visibility(gpus, rank, environ) for rank in range(nproc)}
