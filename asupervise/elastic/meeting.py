"""Where this node's run comes together, from the options: backend, run id, place, address, port."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from asupervise.elastic.node import this_node
from asupervise.elastic.records import Terms
from asupervise.elastic.rendezvous import Request
from asupervise.elastic.values import policy_of
from asupervise.flags import split_endpoint
from asupervise.options import UsageError

if TYPE_CHECKING:
    from asupervise.elastic.rendezvous.schedulers import Found
    from asupervise.options import LaunchOptions

__all__ = ["Meeting", "meeting_of", "random_id"]

# torchrun's, where several nodes must agree on one without talking.
_MASTER_PORT: Final = 29500
# Of each scheduler, a variable that it sets and people do not.
_SCHEDULED: Final = (
    *("SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "JOB_COMPLETION_INDEX"),
)
_BY_HAND: Final = ("NODE_RANK", "NNODES")


class Meeting(NamedTuple):
    """What was chosen.

    Attributes:
        backend: its name.
        request: what it is given.
        choices: what was chosen and why, each under its name.
    """

    backend: str
    request: Request
    choices: dict[str, str]


def meeting_of(options: LaunchOptions, environ: Mapping[str, str], workers: int) -> Meeting:
    """Decide where the run comes together.

    Args:
        options: what the command line asks for.
        environ: where a scheduler's variables are.
        workers: how many this node runs.

    Raises:
        UsageError: for what cannot be.
    """
    low, high = options.nnodes or (1, 1)
    wish = _Wish(options, Terms(low, high, options.max_restarts), workers)
    if (found := _scheduler(options, environ)) is not None:
        return _scheduled(wish, found)
    backend = options.rdzv_backend or "static"
    if backend == "static" or options.standalone or (backend == "c10d" and high == 1):
        return _static(wish)
    return _shared(wish, backend)


class _Wish(NamedTuple):
    options: LaunchOptions
    terms: Terms
    workers: int

    def request(
        self, run_id: str, address: str | None, port: int | None, rank: int | None
    ) -> Request:
        options = self.options
        endpoint = options.rdzv_endpoint or ""
        node = this_node(
            self.workers,
            address=options.local_addr,
            endpoint="" if options.rdzv_backend in (None, "static", "env") else endpoint,
            role=options.role,
            node_rank=rank,
        )
        return Request(
            run_id=run_id,
            node=node,
            terms=self.terms,
            policy=policy_of(
                dict(options.rdzv_conf),
                min_uptime_s=options.min_uptime,
                backoff_s=options.restart_backoff,
            ),
            endpoint=endpoint,
            conf=dict(options.rdzv_conf),
            master_addr=address,
            master_port=port or None,
        )


# --- a scheduler that started us ---------------------------------------------------------------


def _scheduler(options: LaunchOptions, environ: Mapping[str, str]) -> Found | None:
    """What the scheduler says, where it was asked for or nothing else was said."""
    if options.standalone or options.rdzv_backend not in (None, "env"):
        return None
    asked = options.rdzv_backend == "env"
    if not asked and (options.nnodes or options.node_rank is not None or not _started(environ)):
        return None
    # Imported here: hardly anybody needs it.
    from asupervise.elastic.rendezvous.env import detect, full_hostname

    chosen = dict(options.rdzv_conf).get("scheduler")
    found = detect(environ, hostname=full_hostname(environ), scheduler=chosen)
    if found is None and asked:
        raise UsageError(
            "--rdzv-backend env: no scheduler has started us, as far as the variables say",
            hint="Slurm, Open MPI, Kubernetes Indexed Jobs, or NNODES, NODE_RANK and MASTER_ADDR",
        )
    if found is not None and found.nodes is None and not asked:
        return None  # each may be meant to work on its own
    return found


def _scheduled(wish: _Wish, found: Found) -> Meeting:
    from asupervise.elastic.rendezvous.env import settle

    options = wish.options
    asked = wish.request(
        options.rdzv_id, options.master_addr, options.master_port, options.node_rank
    )
    request = settle(asked, found)
    if options.rdzv_id == "none":
        request = request._replace(run_id=found.run_id or random_id())
    if request.master_addr is None:
        request = request._replace(master_addr=options.local_addr or "127.0.0.1")
    nodes, port = request.terms.max_nodes, request.master_port
    return Meeting(
        "static",
        request,
        {
            "run id": request.run_id,
            "master": f"{request.master_addr} port {port or 'any'} ({found.scheduler})",
            "nodes": f"{nodes}, this is {found.node_rank} ({found.why})",
        },
    )


def _started(environ: Mapping[str, str]) -> bool:
    """Whether a scheduler has started us, and not a worker of ours or of torchrun."""
    if "TORCHELASTIC_RUN_ID" in environ:
        return False
    by_hand = all(name in environ for name in _BY_HAND)
    return by_hand or any(name in environ for name in _SCHEDULED)


# --- nodes that know each other's places -------------------------------------------------------


def _static(wish: _Wish) -> Meeting:
    options = wish.options
    nodes = wish.terms.max_nodes
    if wish.terms.min_nodes != nodes:
        raise UsageError(
            f"--nnodes {wish.terms.min_nodes}:{nodes}: the static backend has a fixed number",
            hint="--rdzv-backend etcd",
        )
    rank = options.node_rank or 0
    if nodes > 1 and options.node_rank is None:
        raise UsageError("--nnodes needs --node-rank, or a backend that gives it")
    if rank >= nodes:
        raise UsageError(f"--node-rank {rank}: expected 0 to {nodes - 1} with --nnodes {nodes}")
    address, port, why = _master(wish, rank)
    run_id = _run_id(wish, alone=nodes == 1 and port is None)
    choices = {"run id": run_id, "master": f"{address} port {port or 'any'} ({why})"}
    if nodes > 1:
        choices["nodes"] = f"{nodes}, this is {rank}"
    return Meeting("static", wish.request(run_id, address, port, rank), choices)


def _master(wish: _Wish, rank: int) -> tuple[str, int | None, str]:
    options = wish.options
    own = options.local_addr or ("127.0.0.1" if wish.terms.max_nodes == 1 else None)
    if options.standalone or options.rdzv_backend == "c10d":
        return own or "127.0.0.1", None, "--standalone" if options.standalone else "c10d"
    address, port, why = options.master_addr, options.master_port, "as given"
    if options.rdzv_endpoint is not None:
        address, port = split_endpoint(options.rdzv_endpoint)
    if address is None:
        address = own or (os.uname().nodename if rank == 0 else None)
    if address is None:
        raise UsageError("--master-addr: node 0's address is needed on the other nodes")
    if not port and wish.terms.max_nodes > 1:
        return address, _MASTER_PORT, f"{why}; torchrun's port"
    return address, port or None, why if port else "a free port"


def _run_id(wish: _Wish, *, alone: bool) -> str:
    options = wish.options
    if options.standalone:
        return random_id()
    # torchrun ignores a --rdzv-id here; the user's log folder keeps the user's name.
    nameless = options.rdzv_id == "none" and options.rdzv_endpoint is None
    return random_id() if alone and nameless and options.rdzv_backend != "c10d" else options.rdzv_id


# --- nodes that agree through an engine --------------------------------------------------------


def _shared(wish: _Wish, backend: str) -> Meeting:
    options = wish.options
    if options.rdzv_id == "none" and backend == "etcd":
        raise UsageError(
            "--rdzv-id is needed: all nodes of a run have it in common, and no other run",
            hint="--rdzv-id my-job-1",
        )
    request = wish.request(
        options.rdzv_id, options.master_addr, options.master_port, options.node_rank
    )
    where = options.rdzv_endpoint or "(no --rdzv-endpoint)"
    low, high = wish.terms.min_nodes, wish.terms.max_nodes
    choices = {
        "run id": options.rdzv_id,
        "nodes": f"{low} to {high}, by {backend} at {where}",
        "master": "where rank 0 will be",
    }
    return Meeting(backend, request, choices)


def random_id() -> str:
    """A random UUID, as `uuid.uuid4()` makes them: importing that would cost a start 3 ms."""
    digits = list(os.urandom(16).hex())
    digits[12] = "4"
    digits[16] = "89ab"[int(digits[16], 16) % 4]
    text = "".join(digits)
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
