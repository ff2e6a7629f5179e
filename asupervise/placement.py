"""Which CPUs and which memory each rank gets: pure, from a topology that was read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

from asupervise.affinity import AffinityMode, MemoryPolicy, NumaOptions, RankBinding
from asupervise.errors import BindingError
from asupervise.topology import Gpu, NumaNode, Topology, format_ranges


@dataclass(frozen=True, slots=True)
class _Seat:
    """Where one rank goes, before its mode takes its share of the place.

    Args:
        place: what the CPUs belong to, to be shown.
        cpus: the allowed CPUs of the place.
        position: which of the ``sharers`` of the place this rank is, from 0.
        home: the NUMA node that the place stands for, if it is one.
        reason: why here, to be shown.
    """

    local_rank: int
    place: str
    cpus: frozenset[int]
    position: int
    sharers: int
    home: NumaNode | None
    gpu: Gpu | None
    reason: str


def bind_ranks(
    topology: Topology,
    options: NumaOptions,
    nprocs: int,
    *,
    gpus: Sequence[Gpu] | None = None,
) -> tuple[RankBinding, ...]:
    """One binding for each local rank ``0..nprocs-1``; the same for the same input.

    Args:
        topology: the machine; only its allowed CPUs are given to anybody.
        options: the mode and the memory policy.
        nprocs: how many ranks there are on this machine.
        gpus: the visible GPUs in local rank order; None: all of the machine's.

    With at least as many GPUs as ranks, rank ``r`` belongs to ``gpus[r]``, and ``exclusive`` and
    ``core-complex`` divide a node among all visible GPUs on it, also those without a rank. A GPU
    whose node is not known counts as on the lowest node with CPUs. With fewer GPUs than ranks the
    ranks are spread over the machine as if there were none: such a job either shares its GPUs in
    a way that we cannot know, or does not use them.

    Raises:
        ValueError: ``nprocs`` is not positive.
        BindingError: a rank would get no CPU, or no core of its own (``exclusive``), or no node
            with memory.

    Example:
        >>> cpus = frozenset({0, 1})
        >>> node = NumaNode(0, cpus)
        >>> topology = Topology(cpus, cpus, (node,), (), tuple(map(frozenset, [{0}, {1}])))
        >>> [format_ranges(b.cpus) for b in bind_ranks(topology, NumaOptions("exclusive"), 2)]
        ['0', '1']
    """
    if nprocs < 1:
        raise ValueError(f"nprocs={nprocs} ranks cannot be bound: expected at least 1")
    gpus = topology.gpus if gpus is None else gpus
    if not topology.allowed:
        raise BindingError(
            f"no CPU to bind {nprocs} ranks to: none of the online CPUs "
            f"{format_ranges(topology.cpus)} is allowed to this process"
        )
    seat = _seats_by_gpu if nprocs <= len(gpus) else _seats_spread
    seats = seat(topology, options.affinity_mode, gpus, nprocs)
    return tuple(_bind(topology, options, s) for s in seats)


def _bind(topology: Topology, options: NumaOptions, seat: _Seat) -> RankBinding:
    cpus, share = _share(topology, options.affinity_mode, seat)
    policy = options.memory_policy
    return RankBinding(
        local_rank=seat.local_rank,
        cpus=cpus,
        memory_policy=policy,
        memory_nodes=_memory_nodes(topology, policy, seat, cpus),
        gpu=seat.gpu,
        why=f"{share}: {seat.reason}",
    )


# --- near a GPU ---------------------------------------------------------------------------------


def _seats_by_gpu(
    topology: Topology, mode: AffinityMode, gpus: Sequence[Gpu], nprocs: int
) -> Iterator[_Seat]:
    homes = [_home(topology, gpu) for gpu in gpus]
    for local_rank, (gpu, home) in enumerate(zip(gpus[:nprocs], homes, strict=False)):
        place, cpus = f"node {home.index}", home.cpus & topology.allowed
        if not cpus:
            raise BindingError(
                f"rank {local_rank}: none of the CPUs {format_ranges(home.cpus)} of NUMA node "
                f"{home.index}, where its GPU {gpu.index} is, is among the allowed CPUs "
                f"{format_ranges(topology.allowed)}",
                local_rank=local_rank,
            )
        if mode is AffinityMode.SOCKET:
            place, cpus = _socket_around(topology, cpus)
        peers = [rank for rank, other in enumerate(homes) if other is home]
        reason = f"near GPU {gpu.index} ({gpu.pci_address or gpu.uuid or 'unknown'})"
        if gpu.numa_node != home.index:
            reason += ", whose NUMA node is not known or has no CPUs"
        position = peers.index(local_rank)
        yield _Seat(local_rank, place, cpus, position, len(peers), home, gpu, reason)


def _home(topology: Topology, gpu: Gpu) -> NumaNode:
    """The NUMA node whose CPUs are nearest to a GPU."""
    with_cpus = [node for node in topology.nodes if node.cpus]
    if not with_cpus:
        raise BindingError(f"no NUMA node has CPUs to bind to near GPU {gpu.index}")
    own = next((node for node in topology.nodes if node.index == gpu.numa_node), None)
    distances = dict(own.distances) if own is not None else {}
    return min(
        with_cpus, key=lambda node: (node is not own, distances.get(node.index, inf), node.index)
    )


def _socket_around(topology: Topology, cpus: frozenset[int]) -> tuple[str, frozenset[int]]:
    """The CPUs of all nodes of the socket of the lowest of these CPUs, where allowed.

    A node belongs to the socket of its lowest CPU, so that a node over two sockets stays whole:
    which half a GPU is nearer to is not known.
    """
    socket = _socket_place(topology, min(cpus))
    members = topology.sockets[socket].cpus if socket >= 0 else topology.cpus
    usable = (node.cpus & topology.allowed for node in topology.nodes)
    return _socket_name(topology, socket), frozenset().union(
        *(mine for mine in usable if mine and min(mine) in members)
    )


def _socket_place(topology: Topology, cpu: int) -> int:
    found = (place for place, socket in enumerate(topology.sockets) if cpu in socket.cpus)
    return next(found, -1)


def _socket_name(topology: Topology, place: int) -> str:
    package_id = topology.sockets[place].package_id if place >= 0 else None
    return f"socket {place if package_id is None else package_id}"


# --- spread over the machine --------------------------------------------------------------------


def _seats_spread(
    topology: Topology, mode: AffinityMode, gpus: Sequence[Gpu], nprocs: int
) -> Iterator[_Seat]:
    places = _places(topology, mode)
    divide = _complexes_in if mode is AffinityMode.CORE_COMPLEX else _cores_in
    weights = [len(divide(topology, cpus)) for _, cpus, _ in places]
    if mode is AffinityMode.EXCLUSIVE and sum(weights) < nprocs:
        raise BindingError(
            f"affinity_mode='exclusive' needs a physical core for each of {nprocs} ranks, but the "
            f"allowed CPUs {format_ranges(topology.allowed)} are {sum(weights)} cores",
            hint="fewer ranks, or an affinity that lets them share: node, socket, core-complex",
        )
    sockets = [_socket_place(topology, min(cpus)) for _, cpus, _ in places]
    few = f", {len(gpus)} GPUs being too few" if gpus else ""
    local_rank = 0
    for (place, cpus, home), count in zip(
        places, _apportion(weights, sockets, nprocs), strict=True
    ):
        for position in range(count):
            reason = f"rank {local_rank} of {nprocs} spread over the machine{few}"
            yield _Seat(local_rank, place, cpus, position, count, home, None, reason)
            local_rank += 1


def _places(
    topology: Topology, mode: AffinityMode
) -> list[tuple[str, frozenset[int], NumaNode | None]]:
    """The parts of the machine, in order, with their allowed CPUs (none is empty)."""
    allowed = topology.allowed
    names = [_socket_name(topology, place) for place in range(len(topology.sockets))]
    sockets = list(zip(names, (socket.cpus for socket in topology.sockets), strict=True))
    inside = frozenset[int]().union(*(cpus for _, cpus in sockets))
    sockets.append(("no socket", topology.cpus - inside))
    if mode is AffinityMode.SOCKET:
        found = [(name, cpus & allowed, None) for name, cpus in sockets]
        return [place for place in found if place[1]]
    places: list[tuple[str, frozenset[int], NumaNode | None]] = []
    left = allowed
    for node in topology.nodes:
        # Emulated nodes share CPUs; ranks on two places must not.
        places.append((f"node {node.index}", node.cpus & left, node))
        left -= node.cpus
    # A node can be offline while its CPUs are online; they are as good as any.
    places += [(f"{name} outside any node", cpus & left, None) for name, cpus in sockets]
    return [place for place in places if place[1]]


def _apportion(weights: Sequence[int], sockets: Sequence[int], nprocs: int) -> list[int]:
    """How many of ``nprocs`` ranks each place gets, in proportion to its weight.

    One after the other, each rank goes where its share is the largest (D'Hondt's method, which
    makes the smallest share as large as it can be, and never gives a place more ranks than its
    weight while another has room). Of equal shares it takes that on the socket with fewer ranks:
    two ranks on four nodes of two sockets are then on different sockets.
    """
    counts = [0] * len(weights)
    on_socket = dict.fromkeys(sockets, 0)
    for _ in range(nprocs):
        best = max(
            range(len(weights)),
            key=lambda i: (weights[i] / (counts[i] + 1), -on_socket[sockets[i]], -i),
        )
        counts[best] += 1
        on_socket[sockets[best]] += 1
    return counts


# --- a rank's share of its place ----------------------------------------------------------------


def _share(topology: Topology, mode: AffinityMode, seat: _Seat) -> tuple[frozenset[int], str]:
    """The rank's CPUs, and what they are, to be shown."""
    if mode is AffinityMode.EXCLUSIVE:
        cores = _cores_in(topology, seat.cpus)
        if len(cores) < seat.sharers:
            raise BindingError(
                f"rank {seat.local_rank}: affinity_mode='exclusive' divides {seat.place} among "
                f"{seat.sharers} GPUs, but its allowed CPUs {format_ranges(seat.cpus)} are "
                f"{len(cores)} cores",
                local_rank=seat.local_rank,
            )
        mine = cores[_part(len(cores), seat.sharers, seat.position)]
        text = f"{len(mine)} of the {len(cores)} cores of {seat.place}"
        return frozenset[int]().union(*mine), text
    if mode is AffinityMode.CORE_COMPLEX:
        complexes = _complexes_in(topology, seat.cpus)
        place = seat.position % len(complexes)
        text = f"core complex {place + 1} of {len(complexes)} of {seat.place}"
        return complexes[place], text
    return seat.cpus, f"all of {seat.place}"


def _part(total: int, parts: int, position: int) -> slice:
    """One of ``parts`` contiguous parts of ``total`` things; the first ones get what is over."""
    size, over = divmod(total, parts)
    start = position * size + min(position, over)
    return slice(start, start + size + (position < over))


def _cores_in(topology: Topology, cpus: frozenset[int]) -> list[frozenset[int]]:
    """The physical cores among some CPUs, each cut down to these, by their lowest CPU."""
    return sorted((core & cpus for core in topology.cores if core & cpus), key=min)


def _complexes_in(topology: Topology, cpus: frozenset[int]) -> list[frozenset[int]]:
    """The groups of CPUs under one last-level cache, the largest first.

    CPUs for which no cache is known (some virtual machines) make up one group a socket.
    """
    groups = [cache.cpus & cpus for cache in topology.last_level_caches]
    rest = cpus.difference(*groups)
    groups += [socket.cpus & rest for socket in topology.sockets]
    groups.append(rest.difference(*groups))
    return sorted((group for group in groups if group), key=lambda group: (-len(group), min(group)))


# --- memory -------------------------------------------------------------------------------------


def _memory_nodes(
    topology: Topology, policy: MemoryPolicy, seat: _Seat, cpus: frozenset[int]
) -> frozenset[int]:
    if policy is MemoryPolicy.NONE:
        return frozenset()
    under = [node for node in topology.nodes if node.cpus & cpus]
    if policy is MemoryPolicy.LOCAL:
        return frozenset(node.index for node in under)
    permitted = topology.allowed_nodes
    usable = [n for n in topology.nodes if n.has_memory and (not permitted or n.index in permitted)]
    if policy is MemoryPolicy.INTERLEAVE:
        chosen = [node for node in usable if node.cpus]
    else:
        home = seat.home or max(under, key=lambda n: (len(n.cpus & cpus), -n.index), default=None)
        chosen = _nearest(usable, home)
    if not chosen:
        raise BindingError(
            f"rank {seat.local_rank}: memory_policy={str(policy)!r} finds no NUMA node with memory "
            f"for CPUs {format_ranges(cpus)}",
            local_rank=seat.local_rank,
        )
    return frozenset(node.index for node in chosen)


def _nearest(nodes: Sequence[NumaNode], home: NumaNode | None) -> list[NumaNode]:
    """The node of ``nodes`` that is ``home`` or else nearest to it; none without a home."""
    if home is None:
        return []
    distances = dict(home.distances)
    return sorted(
        nodes,
        key=lambda n: (n.index != home.index, distances.get(n.index, inf), not n.cpus, n.index),
    )[:1]
