"""Who started us says where we stand: Slurm, Open MPI, PMIx, Kubernetes, or variables set by hand.

Pure, but for the one function that asks for this host's name. What is read, the innermost first:

========== ====================================================================================
openmpi    ``OMPI_COMM_WORLD_RANK``, ``_SIZE``, ``_LOCAL_SIZE``. No variable says where node 0 is:
           ``OMPI_MCA_orte_hnp_uri`` is where mpirun is, which need not run a rank, and
           ``PMIX_SERVER_URI*`` is each node's own daemon. So ``mpirun -x MASTER_ADDR=HOST``, or
           ``--master-addr``.
pmix       ``PMIX_RANK`` where Slurm has not set it; how many there are nobody says.
slurm      ``SLURM_NODEID``, ``SLURM_STEP_NUM_NODES``, ``SLURM_STEP_NUM_TASKS``,
           ``SLURM_STEP_NODELIST``: those of the step and not of the job, whose
           ``SLURM_NTASKS_PER_NODE`` and ``SLURM_NODELIST`` stay as they were in a smaller step.
           Node 0 is the first of the list; ``SLURM_LAUNCH_NODE_IPADDR`` is where srun is, and
           ``SLURM_PROCID`` may have another order (``srun -m arbitrary``). The shell of
           ``srun --pty``, which runs on node 0 alone, cannot be told from a step on all nodes.
kubernetes ``JOB_COMPLETION_INDEX`` of an Indexed Job. How many pods there are nobody says. Node 0
           is ``<job>-0.<service>`` where the pods' ``subdomain`` is a headless service, which is
           read from the pod's full name.
variables  ``NODE_RANK`` or ``GROUP_RANK``, ``NNODES`` or ``GROUP_WORLD_SIZE``. ``RANK`` and
           ``WORLD_SIZE`` are not: they count workers.
========== ====================================================================================

``NNODES``, ``MASTER_ADDR`` and ``MASTER_PORT`` complete any of them, and each may be written with
``PET_`` before it. A port that nobody has set follows from the job's number (:data:`PORTS`).
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from asupervise.elastic.rendezvous.hostlist import expand
from asupervise.elastic.rendezvous.variables import (
    COUNTS,
    RANKS,
    Environ,
    Number,
    SchedulerError,
    Text,
    agreed,
    check_same,
    job_named,
    needed,
    number_in,
    text_in,
)

__all__ = ["PORTS", "Found", "SchedulerError", "detect", "full_hostname"]

# Of ports that follow from a job's number: below those that systems give to whoever asks for any
# (Linux: 32768 and more) and Kubernetes to services (30000 and more).
PORTS: Final = range(20_000, 30_000)
# What torchrun takes where nothing is known of the job.
_USUAL_PORT: Final = 29_500
# The number of the step that salloc runs its shell in (slurm.h: SLURM_INTERACTIVE_STEP).
_INTERACTIVE_STEP: Final = str(0xFFFFFFFA)
# Jobs have consecutive numbers, and so must not have their steps.
_STEP_STRIDE: Final = 4_001

_ADDRESSES: Final = ("PET_MASTER_ADDR", "MASTER_ADDR")
_PORT_NAMES: Final = ("PET_MASTER_PORT", "MASTER_PORT")
_ALONE: Final = "--standalone for this node alone"


@dataclass(frozen=True)
class Found:
    """Where a node stands, by its environment.

    Attributes:
        scheduler: ``"slurm"``, ``"openmpi"``, ``"pmix"``, ``"kubernetes"`` or ``"variables"``.
        node_rank: this node's place.
        nodes: how many there are; None where that is not said. Then nothing shows that the nodes
            belong together: an Indexed Job's pods may each work on their own.
        master_addr: where node 0 is, or None where that is not said.
        master_port: the same on every node; None for a single node, which chooses its own.
        run_id: names the job, the same on every node, or None.
        why: a sentence that names the variables.
    """

    scheduler: str
    node_rank: int
    nodes: int | None
    master_addr: str | None = None
    master_port: int | None = None
    run_id: str | None = None
    why: str = ""


class _Place(NamedTuple):
    """What one scheduler says.

    Attributes:
        rank: of this node.
        nodes: how many there are.
        address: of node 0.
        run_id: names the job.
        job: its number, which the port follows from.
    """

    rank: Number | None
    nodes: Number | None = None
    address: Text | None = None
    run_id: str | None = None
    job: Number | None = None


class _Scheduler(NamedTuple):
    """One of them: the variable that shows it is there, how it is read, what it sets as well."""

    name: str
    title: str
    marker: str
    read: Callable[[Environ, str], _Place | None]
    also: tuple[str, ...] = ()


# --- what each scheduler says ----------------------------------------------------------------


def _openmpi(environ: Environ, hostname: str) -> _Place:
    rank = needed(environ, "OMPI_COMM_WORLD_RANK", "")
    size = needed(environ, "OMPI_COMM_WORLD_SIZE", rank.name)
    here = number_in(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
    if here is not None and here.value > 1:
        raise SchedulerError(
            f"{here}: mpirun has started {here.value} of us on this node, where one is to start "
            "all of its workers",
            hint=f"mpirun --map-by ppr:1:node python -m asupervise ..., or {_ALONE}",
        )
    job = text_in(environ, "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
    return _Place(rank, size, None, f"openmpi-{job.value}" if job else None, job_named(job))


def _pmix(environ: Environ, hostname: str) -> _Place | None:
    namespace = text_in(environ, "PMIX_NAMESPACE")
    # Slurm's own plugin (srun --mpi=pmix): Slurm's variables say more.
    if namespace is not None and namespace.value.startswith("slurm.pmix."):
        return None
    run_id = f"pmix-{namespace.value}" if namespace else None
    return _Place(number_in(environ, "PMIX_RANK"), None, None, run_id, job_named(namespace))


def _slurm(environ: Environ, hostname: str) -> _Place | None:
    step = text_in(environ, "SLURM_STEP_ID")
    if step is None or step.value == _INTERACTIVE_STEP:
        return _slurm_script(environ)
    nodes = needed(environ, "SLURM_STEP_NUM_NODES", step.name)
    tasks = needed(environ, "SLURM_STEP_NUM_TASKS", step.name)
    if tasks.value != nodes.value:
        raise SchedulerError(
            f"{tasks}, {nodes}: srun has started several of us on a node, where one is to start "
            "all of its workers",
            hint=f"{_srun(nodes.value)}, or {_ALONE}",
        )
    job, number = needed(environ, "SLURM_JOB_ID", step.name), needed(environ, step.name, "")
    return _Place(
        needed(environ, "SLURM_NODEID", step.name),
        nodes,
        _first_host(environ, "SLURM_STEP_NODELIST", nodes),
        f"slurm-{job.value}.{number.value}",
        Number(f"{job}, {step.name}", job.value + _STEP_STRIDE * number.value),
    )


def _slurm_script(environ: Environ) -> _Place | None:
    """Of a batch script, or of the shell that salloc gives: it runs once, on the first node."""
    nodes = number_in(environ, "SLURM_JOB_NUM_NODES")
    rank = number_in(environ, "SLURM_NODEID")
    if nodes is None or all(text_in(environ, *names) for names in (RANKS, COUNTS)):
        return None
    if nodes.value > 1:
        raise SchedulerError(
            f"{nodes}: the job has {nodes.value} nodes, and we are started outside of srun, on "
            "one of them",
            hint=f"{_srun(nodes.value)}, or {_ALONE}",
        )
    # Without a rank salloc's shell has stayed where it was called, which is no node of the job.
    job = needed(environ, "SLURM_JOB_ID", nodes.name)
    return _Place(rank, nodes, None, f"slurm-{job.value}", job)


def _srun(nodes: int) -> str:
    # --ntasks-per-node=1 alone is ignored, with a warning, in a job that was given more tasks.
    return f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 python -m asupervise ..."


def _first_host(environ: Environ, name: str, nodes: Number) -> Text | None:
    text = text_in(environ, name)
    if text is None:
        return None
    try:
        hosts = expand(text.value)
    except ValueError as error:
        raise SchedulerError(f"{name}={text.value!r}: {error}") from None
    if len(hosts) != nodes.value:
        raise SchedulerError(f"{name}={text.value!r} has {len(hosts)} hosts, but {nodes}")
    return Text(f"{name}={text.value}", hosts[0])


def _kubernetes(environ: Environ, hostname: str) -> _Place:
    index = needed(environ, "JOB_COMPLETION_INDEX", "")
    # With `setHostnameAsFQDN` it is the full name by itself.
    short = environ.get("HOSTNAME", "")
    # Name servers may know the pod by its address, 10-0-0-7, which looks like a job's name.
    same = not short or hostname.partition(".")[0] == short.partition(".")[0]
    full = hostname if hostname and same else short
    pod, _, domain = full.partition(".")
    job = pod.removesuffix(f"-{index.value}")
    if job in ("", pod):
        # Not the pod's own name: its host's (hostNetwork), or shortened to 63 letters.
        return _Place(index)
    address = Text(f"the pod's name {full}", f"{job}-0.{domain}") if domain else None
    return _Place(index, None, address, job, job_named(Text("the job's name", job)))


def _variables(environ: Environ, hostname: str) -> _Place | None:
    rank = agreed(environ, RANKS)
    name = text_in(environ, "PET_RDZV_ID")
    run_id = name.value if name else None
    return None if rank is None else _Place(rank, run_id=run_id, job=job_named(name))


# Innermost first. mpirun and prterun run inside of a job of Slurm's (its allocation is what they
# take their hosts from), and any of these may run inside of a pod.
_SCHEDULERS: Final = (
    _Scheduler("openmpi", "Open MPI", "OMPI_COMM_WORLD_RANK", _openmpi, ("PMIX_RANK",)),
    _Scheduler("pmix", "PMIx", "PMIX_RANK", _pmix),
    _Scheduler("slurm", "Slurm", "SLURM_JOB_ID", _slurm),
    _Scheduler("kubernetes", "Kubernetes", "JOB_COMPLETION_INDEX", _kubernetes),
    _Scheduler("variables", "set by hand", "", _variables),
)


# --- all of it -------------------------------------------------------------------------------


def detect(environ: Environ, *, hostname: str = "", scheduler: str | None = None) -> Found | None:
    """Where this node stands, by the variables of whoever started us.

    Args:
        environ: the environment.
        hostname: this host's full name, see :func:`full_hostname`.
        scheduler: the only one to be asked, by its name in `Found`; then the others' variables,
            and ``NODE_RANK`` and ``NNODES``, are not compared with its own.

    Returns:
        None where nobody says; also for a worker of torchrun or of ourselves, whose variables
        are about that worker.

    Raises:
        SchedulerError: if they contradict each other, are no numbers, or cannot be followed.

    Example:
        >>> found = detect({"NODE_RANK": "1", "NNODES": "2", "MASTER_ADDR": "10.0.0.1"})
        >>> found.node_rank, found.nodes, found.master_addr, found.master_port
        (1, 2, '10.0.0.1', 29500)
    """
    if "TORCHELASTIC_RUN_ID" in environ and "LOCAL_RANK" in environ:
        return None
    around = [one for one in _asked(scheduler) if not one.marker or text_in(environ, one.marker)]
    for at, inner in enumerate(around):
        place = inner.read(environ, hostname)
        if place is not None and place.rank is not None:
            outer = [one for one in around[at + 1 :] if one.marker not in ("", *inner.also)]
            return _found(environ, inner, place, place.rank, outer, alone=scheduler is not None)
    return None


def _asked(scheduler: str | None) -> list[_Scheduler]:
    asked = [one for one in _SCHEDULERS if scheduler in (None, one.name)]
    if not asked:
        known = ", ".join(one.name for one in _SCHEDULERS)
        raise SchedulerError(f"there is no scheduler {scheduler!r}; known: {known}")
    return asked


def _found(
    environ: Environ,
    inner: _Scheduler,
    place: _Place,
    rank: Number,
    outer: list[_Scheduler],
    *,
    alone: bool,
) -> Found:
    nodes = _count(environ, place, rank, alone=alone)
    # A single node has itself for an address, and need not be able to look its own name up.
    single = nodes is not None and nodes.value == 1
    address = text_in(environ, *_ADDRESSES) or (None if single else place.address)
    port, port_from = _port(environ, place, nodes)
    why = f"{inner.title}: node {rank.value}"
    why += f" of {nodes.value} ({rank}, {nodes})" if nodes else f" ({rank})"
    if address:
        why += f", node 0 at {address.value} ({address.name})"
    if port:
        why += f", port {port} ({port_from})"
    for other in outer:
        why += f"; {other.title} ({other.marker}) is around that, and left aside"
    return Found(
        inner.name,
        rank.value,
        nodes.value if nodes else None,
        address.value if address else None,
        port,
        place.run_id,
        why,
    )


def _count(environ: Environ, place: _Place, rank: Number, *, alone: bool) -> Number | None:
    """How many nodes there are, and checks on what was set by hand."""
    nodes = place.nodes
    if nodes is None or not alone:
        by_hand = agreed(environ, COUNTS)
        if nodes is not None and by_hand is not None:
            check_same(by_hand, nodes)
        nodes = nodes or by_hand
    if not alone and (given := agreed(environ, RANKS)) is not None:
        check_same(given, rank)
    if nodes is not None and rank.value >= nodes.value:
        raise SchedulerError(f"{rank}, {nodes}: expected a rank from 0 to below the number of them")
    return nodes


def _port_from(environ: Environ) -> Number | None:
    port = text_in(environ, *_PORT_NAMES)
    number = number_in(environ, port.name) if port else None
    if number is not None and number.value > 65_535:
        raise SchedulerError(f"{number}: expected a port, 1 to 65535")
    return number if number is not None and number.value else None


def _port(environ: Environ, place: _Place, nodes: Number | None) -> tuple[int | None, str]:
    """MASTER_PORT and where it comes from; every node comes to the same by itself."""
    if (given := _port_from(environ)) is not None:
        return given.value, given.name
    if nodes is not None and nodes.value == 1:
        return None, ""
    if place.job is None:
        return _USUAL_PORT, "as torchrun's"
    return PORTS[place.job.value % len(PORTS)], f"from {place.job.name}"


def full_hostname(environ: Environ) -> str:
    """This host's name with its domain, where that matters: in a pod of an Indexed Job.

    It stands in the pod's ``/etc/hosts``; where it does not, a name server may be asked, which
    takes seconds at the worst.
    """
    return socket.getfqdn() if "JOB_COMPLETION_INDEX" in environ else ""
