"""The scheduler that started us has said to each node who it is: the rendezvous ``env``.

Every node runs one of us and reads its place from its own environment (`schedulers` says which
variables); after that it is the static rendezvous, with what that can and cannot do.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from asupervise.elastic.rendezvous import Request
from asupervise.elastic.rendezvous.schedulers import (
    PORTS,
    Found,
    SchedulerError,
    detect,
    full_hostname,
)
from asupervise.elastic.rendezvous.static import StaticRendezvous
from asupervise.flags import split_endpoint

__all__ = ["PORTS", "Found", "SchedulerError", "detect", "full_hostname", "open", "settle"]

_WHERE: Final = {
    "openmpi": "mpirun -x MASTER_ADDR=HOST, or --master-addr HOST",
    "kubernetes": "give the pods a headless service as their subdomain, or set "
    "MASTER_ADDR=<job>-0.<service>",
}
_HOW_MANY: Final = "set NNODES to their number, or --nnodes N"


def settle(request: Request, found: Found | None) -> Request:
    """The request with what was found; what the user has asked for wins.

    Raises:
        SchedulerError: if nothing was found, if it is not enough, or if it is not what was asked.
    """
    if found is None:
        raise SchedulerError(
            "--rdzv-backend env: no scheduler has left its variables here (Slurm, Open MPI, PMIx, "
            "a Kubernetes Indexed Job, or NODE_RANK and NNODES)",
            hint="start one of us on each node by the scheduler, or --rdzv-backend static",
        )
    rank, nodes = request.node.node_rank, _nodes(request, found)
    # 0 is also what the command line has where no rank was given.
    if rank not in (None, 0, found.node_rank):
        raise SchedulerError(f"--node-rank {rank}, but {found.why}")
    host, port = _split(request.endpoint)
    address = request.master_addr or host or found.master_addr
    if nodes > 1 and address is None:
        hint = _WHERE.get(found.scheduler, "set MASTER_ADDR, or --master-addr HOST")
        raise SchedulerError(f"nobody says where node 0 is; {found.why}", hint=hint)
    return request._replace(
        node=request.node._replace(node_rank=found.node_rank),
        terms=request.terms._replace(min_nodes=nodes, max_nodes=nodes),
        master_addr=address,
        master_port=request.master_port or port or found.master_port,
    )


def _nodes(request: Request, found: Found) -> int:
    terms = request.terms
    asked = (terms.min_nodes, terms.max_nodes)
    # 1 is also what the command line has where no number was given.
    if found.nodes is None and asked == (1, 1):
        raise SchedulerError(f"nobody says how many nodes there are; {found.why}", hint=_HOW_MANY)
    nodes = terms.max_nodes if found.nodes is None else found.nodes
    if asked not in ((1, 1), (nodes, nodes)):
        raise SchedulerError(
            f"--nnodes {terms.min_nodes}:{terms.max_nodes}, but {found.why}",
            hint="a number that changes needs --rdzv-backend etcd or c10d",
        )
    if found.node_rank >= nodes:
        raise SchedulerError(f"--nnodes {nodes}, but {found.why}")
    return nodes


def _split(endpoint: str) -> tuple[str | None, int | None]:
    try:
        return split_endpoint(endpoint) if endpoint else (None, None)
    except ValueError as error:
        raise SchedulerError(f"--rdzv-endpoint {endpoint!r}: {error}") from None


@asynccontextmanager
async def open(request: Request) -> AsyncIterator[StaticRendezvous]:
    """A run of the nodes that the scheduler has started us on.

    ``--rdzv-conf scheduler=NAME`` says which one, where several are around.

    Raises:
        SchedulerError: see :func:`detect` and :func:`settle`.
    """
    hostname = await asyncio.to_thread(full_hostname, os.environ)
    found = detect(os.environ, hostname=hostname, scheduler=request.conf.get("scheduler"))
    yield StaticRendezvous(settle(request, found))
