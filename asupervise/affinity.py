"""The words of binding: to what a rank is bound, and what came of it. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from asupervise.topology import Gpu

_E = TypeVar("_E", bound=StrEnum)


class AffinityMode(StrEnum):
    """To which part of the machine a rank is bound.

    Where there is a GPU for each rank, rank ``r`` is bound near the ``r``-th visible GPU.
    Otherwise (no GPUs, or fewer than ranks) the ranks are spread over the machine in contiguous
    blocks, each part getting ranks in proportion to its physical cores.
    """

    NODE = "node"
    """All CPUs of one NUMA node. If in doubt, take this one.

    Example: GPU 3 is attached to NUMA node 1, so rank 3 may run on all CPUs of node 1. Without
    GPUs, 4 ranks on 2 equal nodes: ranks 0 and 1 on node 0, ranks 2 and 3 on node 1.
    """

    SOCKET = "socket"
    """All CPUs of all NUMA nodes of one socket; the same as ``node`` where a socket is one node.

    Example: GPU 3 is attached to NUMA node 1, and nodes 0 and 1 are socket 0, so rank 3 may run
    on all CPUs of nodes 0 and 1. Without GPUs, 4 ranks on 2 sockets: two on each.
    """

    EXCLUSIVE = "exclusive"
    """Physical cores of one NUMA node that no other rank gets, with all their hardware threads.

    Example: NUMA node 1 has 16 cores and the GPUs 2 and 3, so rank 2 gets its cores 0-7 and rank
    3 its cores 8-15. Of 17 cores, rank 2 would get 9. Without GPUs, 3 ranks on 2 nodes of 8
    cores: 4 and 4 of node 0, and the 8 of node 1.
    """

    CORE_COMPLEX = "core-complex"
    """The CPUs under one last-level cache, a different one for each rank as long as there are any.

    Example: NUMA node 1 has the GPUs 2 and 3 and two L3 caches, over cores 0-7 and 8-15: rank 2
    gets cores 0-7, rank 3 cores 8-15; with a third GPU there, its rank would get cores 0-7 again.
    """


class MemoryPolicy(StrEnum):
    """Where a rank's memory is allocated (numactl(8))."""

    NONE = "none"
    """As the parent's policy has it: nothing is asked of the kernel.

    Example: ``numactl --physcpubind=0-7``.
    """

    LOCAL = "local"
    """On the node of the CPU that the allocating thread runs on, else on another.

    Example: ``numactl --physcpubind=0-7 --localalloc``.
    """

    PREFERRED = "preferred"
    """On the rank's one node (the GPU's, or that of most of its CPUs), else on another.

    Example: ``numactl --physcpubind=0-7 --preferred=1``. Where that node has no memory, the
    nearest that has.
    """

    INTERLEAVE = "interleave"
    """Page by page on all nodes that have both CPUs and memory, also where the CPUs are on one.

    Example: ``numactl --physcpubind=0-7 --interleave=0-3``. The memory of GPUs and of nodes
    without CPUs (CXL, high-bandwidth memory) is left alone.
    """


@dataclass(frozen=True)
class NumaOptions:
    """What the caller wishes of binding. Modes and policies may be given by their values.

    Args:
        affinity_mode: see `AffinityMode`.
        should_fall_back_if_binding_fails: start the ranks unbound, with a warning, where they
            cannot be bound as wished, rather than refuse.
        memory_policy: see `MemoryPolicy`.

    Raises:
        ValueError: an unknown mode or policy.

    Example:
        >>> NumaOptions("core-complex", memory_policy="local").affinity_mode.name
        'CORE_COMPLEX'
    """

    affinity_mode: AffinityMode
    should_fall_back_if_binding_fails: bool = False
    memory_policy: MemoryPolicy = MemoryPolicy.NONE

    def __post_init__(self) -> None:
        mode = _member(AffinityMode, "affinity_mode", self.affinity_mode)
        policy = _member(MemoryPolicy, "memory_policy", self.memory_policy)
        object.__setattr__(self, "affinity_mode", mode)
        object.__setattr__(self, "memory_policy", policy)


def _member(kind: type[_E], name: str, value: object) -> _E:
    try:
        return kind(str(value))
    except ValueError:
        known = ", ".join(repr(str(member)) for member in kind)
        raise ValueError(f"{name}={value!r} is unknown: expected one of {known}") from None


@dataclass(frozen=True, slots=True)
class RankBinding:
    """What one rank is bound to.

    Args:
        local_rank: the rank.
        cpus: the logical CPUs that it may run on; never empty.
        memory_policy: see `MemoryPolicy`.
        memory_nodes: the NUMA nodes that its memory comes from first; empty without a policy.
        gpu: the GPU whose place decided; None where ranks are spread over the machine.
        why: one line that says how the CPUs were chosen.
    """

    local_rank: int
    cpus: frozenset[int]
    memory_policy: MemoryPolicy
    memory_nodes: frozenset[int]
    gpu: Gpu | None
    why: str
