"""The machine as binding sees it: CPUs, cores, sockets, caches, NUMA nodes and GPUs, read once.

Everything is read below one root, so that another machine's ``/sys`` (a snapshot, a test's small
tree) can be read as well as our own. What is missing or unreadable degrades to the nearest
sensible reading; only a root without any CPU is an error.

The files are described in the Linux kernel's Documentation/admin-guide/cputopology.rst and
Documentation/ABI/stable/sysfs-devices-{node,system-cpu}. Where a file has two forms, the mask
(``core_cpus``) is preferred to the list (``core_cpus_list``): only the mask is on every kernel.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from asupervise.errors import BindingError
from asupervise.gpus import Gpu, machine_root, read_gpus, read_text, visible_gpus
from asupervise.ranges import format_ranges

__all__ = [
    "Cache",
    "Gpu",
    "NumaNode",
    "Socket",
    "Topology",
    "format_ranges",
    "parse_ranges",
    "read_gpus",
    "read_topology",
    "visible_gpus",
]

_MAX_NUMBER = 1 << 20  # far beyond any kernel's CPUs; keeps "0-9999999999" from filling memory
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")


@dataclass(frozen=True, slots=True)
class NumaNode:
    """One NUMA node of the host's own memory.

    Args:
        index: its number; numbers may have gaps.
        cpus: its online CPUs; none for a node of memory alone.
        memory_bytes: its memory; 0 for a node of CPUs alone, None where the kernel does not say.
        distances: pairs of a node's number and its distance, 10 being the node itself.

    Example:
        >>> NumaNode(1, frozenset({4, 5}), memory_bytes=0).has_memory
        False
    """

    index: int
    cpus: frozenset[int]
    memory_bytes: int | None = None
    distances: tuple[tuple[int, int], ...] = ()

    @property
    def has_memory(self) -> bool:
        """Whether memory can be allocated on it, as far as is known."""
        return self.memory_bytes != 0


@dataclass(frozen=True, slots=True)
class Socket:
    """One processor package: its number as the kernel gives it (None where it does not), its CPUs.

    Sockets may share a number (on s390, within different books): compare CPUs, not numbers.
    """

    package_id: int | None
    cpus: frozenset[int]


@dataclass(frozen=True, slots=True)
class Cache:
    """One last-level cache: its level (3 for an L3) and the online CPUs that share it."""

    level: int
    cpus: frozenset[int]


@dataclass(frozen=True, slots=True)
class Topology:
    """What there is to bind to. All CPU numbers are the kernel's own logical CPU numbers.

    Args:
        cpus: the online logical CPUs.
        allowed: those of them that we may run on (cpuset, affinity).
        nodes: the NUMA nodes of the host by number; those without CPUs are among them.
        sockets: the processor packages; each online CPU is in exactly one.
        cores: the physical cores, each as its SMT siblings; each online CPU is in exactly one.
        last_level_caches: for each CPU the outermost data or unified cache; CPUs for which the
            kernel shows no cache are in none.
        gpus: the GPUs, in the vendor's order.
        allowed_nodes: the NUMA nodes that we may allocate memory on; None for all.
        gpu_memory_nodes: the numbers of NUMA nodes that are the memory of an NVIDIA GPU. They are
            not in ``nodes``, as nothing of the host should be placed there unasked.

    Example:
        >>> topology = read_topology()
        >>> topology.allowed <= topology.cpus
        True
    """

    cpus: frozenset[int]
    allowed: frozenset[int]
    nodes: tuple[NumaNode, ...]
    sockets: tuple[Socket, ...]
    cores: tuple[frozenset[int], ...]
    last_level_caches: tuple[Cache, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    allowed_nodes: frozenset[int] | None = None
    gpu_memory_nodes: frozenset[int] = frozenset()


def read_topology(
    root: Path | str = "/",
    *,
    allowed: Iterable[int] | None = None,
    gpus: Iterable[Gpu] | None = None,
) -> Topology:
    """Read the machine whose file system starts at ``root``.

    Args:
        root: the folder that holds ``sys`` and ``proc``, or that ``sys`` itself.
        allowed: the logical CPUs that may be used; those that are not online are left out. None:
            for our own machine what the scheduler allows us, for another root all that is online.
        gpus: the GPUs; None: `read_gpus` of ``root``.

    Raises:
        BindingError: there is no CPU below ``root``.

    Example:
        >>> len(read_topology().cpus) > 0
        True
    """
    root = machine_root(root)
    ours = root == Path("/")
    affinity = _own_affinity() if ours else None
    cpus = _online_cpus(root, affinity)
    if not cpus:
        raise BindingError(
            f"no CPU found below root={str(root)!r}: expected sys/devices/system/cpu/cpu<N> there"
        )
    if allowed is None:
        allowed = cpus if affinity is None else affinity
    cpu_dir = root / "sys/devices/system/cpu"
    cores = _cores(root, cpu_dir, cpus)
    gpu_memory = _gpu_memory_nodes(root)
    return Topology(
        cpus=cpus,
        allowed=cpus & frozenset(allowed),
        nodes=tuple(n for n in _nodes(root, cpus) if n.index not in gpu_memory),
        sockets=_sockets(cpu_dir, cpus),
        cores=cores,
        last_level_caches=_last_level_caches(cpu_dir, cpus, cores),
        gpus=read_gpus(root) if gpus is None else tuple(gpus),
        allowed_nodes=_own_memory_nodes(root) if ours else None,
        gpu_memory_nodes=gpu_memory,
    )


# --- CPU sets as text ---------------------------------------------------------------------------


def parse_ranges(text: str) -> frozenset[int]:
    """The numbers of a kernel list such as ``"0-2,4"``; an empty text is an empty set.

    The inverse of `format_ranges`; order and repetitions do not matter.

    Raises:
        ValueError: a part is neither a decimal number nor ``first-last`` with first <= last, or
            is beyond any CPU number.

    Example:
        >>> sorted(parse_ranges("0-2,4"))
        [0, 1, 2, 4]
    """
    numbers: set[int] = set()
    for part in text.split(",") if text.strip() else ():
        found = _RANGE.fullmatch(part.strip())
        if found is None:
            raise ValueError(f"{part!r} in {text!r} is neither a number nor a range such as 0-3")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last <= _MAX_NUMBER:
            raise ValueError(f"{part!r} in {text!r} runs backwards or exceeds {_MAX_NUMBER}")
        numbers.update(range(first, last + 1))
    return frozenset(numbers)


def _parse_mask(text: str) -> frozenset[int]:
    """The bits of a kernel mask: 32-bit hexadecimal words, the highest first."""
    value = 0
    for word in text.split(","):
        value = value << 32 | int(word, 16)
    return frozenset(i for i in range(value.bit_length()) if value >> i & 1)


def _read_set(folder: Path, *names: str) -> frozenset[int] | None:
    """The first of the files that can be read, as a mask, or as a list where named ``*list``."""
    for name in names:
        text = read_text(folder / name)
        if not text:
            continue  # an empty list is written as an empty line, and so is nothing at all
        try:
            return (parse_ranges if name.endswith("list") else _parse_mask)(text)
        except ValueError:
            continue
    return None


def _read_int(path: Path) -> int | None:
    try:
        return int(read_text(path) or "")
    except ValueError:
        return None


def _read_ranges(path: Path) -> frozenset[int] | None:
    try:
        return parse_ranges(read_text(path) or "") or None
    except ValueError:
        return None


def _numbered(folder: Path, prefix: str) -> list[int]:
    """The numbers N of the entries ``<prefix>N`` of a folder, ascending."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return []
    pattern = re.compile(re.escape(prefix) + r"([0-9]{1,6})")
    return sorted(int(found[1]) for name in names if (found := pattern.fullmatch(name)))


# --- CPUs ---------------------------------------------------------------------------------------


def _own_affinity() -> frozenset[int] | None:
    if not hasattr(os, "sched_getaffinity"):
        return None  # not on macOS
    return frozenset(os.sched_getaffinity(0))


def _online_cpus(root: Path, affinity: frozenset[int] | None) -> frozenset[int]:
    folder = root / "sys/devices/system/cpu"
    found = _numbered(folder, "cpu")
    listed = _read_ranges(folder / "online")
    if listed is not None:
        online = {cpu for cpu in found if cpu in listed}
    else:
        # CPU 0 has no such file on most machines: it cannot be taken offline there.
        online = {cpu for cpu in found if read_text(folder / f"cpu{cpu}/online") != "0"}
    described = {cpu for cpu in online if (folder / f"cpu{cpu}/topology").is_dir()}
    # Where some are described, the others are on their way in or out. Where none is, this kernel
    # (or sandbox) describes no CPU.
    cpus = described or online or _cpus_of_proc_stat(root)
    # In a container /sys may show the first N CPUs instead of ours (lxcfs); where the scheduler
    # may put us is online in any case.
    return frozenset(cpus | (affinity or set()))


def _cpus_of_proc_stat(root: Path) -> set[int]:
    if found := re.findall(r"^cpu([0-9]{1,6}) ", read_text(root / "proc/stat") or "", re.MULTILINE):
        return {int(number) for number in found}
    return set(range(os.cpu_count() or 1)) if root == Path("/") else set()


def _groups(
    cpus: frozenset[int], read: Callable[[int], frozenset[int] | None]
) -> Iterator[tuple[int, frozenset[int]]]:
    """Partition CPUs by what each says that it belongs with; yields the asked CPU with its group.

    The lowest CPU of a group speaks for it, so that CPUs that contradict each other still end up
    in one group each, and each group's files are read once.
    """
    left = set(cpus)
    for cpu in sorted(cpus):
        if cpu in left and (group := read(cpu)) is not None:
            group = (group & left) | {cpu}
            left -= group
            yield cpu, group


def _cores(root: Path, cpu_dir: Path, cpus: frozenset[int]) -> tuple[frozenset[int], ...]:
    split_modules = _has_amd_modules(root)

    def siblings(cpu: int) -> frozenset[int]:
        folder = cpu_dir / f"cpu{cpu}/topology"
        found = _read_set(
            folder, "core_cpus", "thread_siblings", "core_cpus_list", "thread_siblings_list"
        )
        if found is None:
            return frozenset({cpu})
        if split_modules and len({_core_id(cpu_dir, sibling) for sibling in found & cpus}) > 1:
            return frozenset({cpu})
        return found

    return tuple(group for _, group in _groups(cpus, siblings))


def _core_id(cpu_dir: Path, cpu: int) -> int | None:
    return _read_int(cpu_dir / f"cpu{cpu}/topology/core_id")


def _has_amd_modules(root: Path) -> bool:
    """Whether these are AMD Bulldozer-class CPUs (families 21 and 22).

    Older kernels show the two cores of a module as siblings, each with a core id of its own.
    They have their own integer units and L1 data cache: cores, not threads of one.
    """
    cpuinfo = read_text(root / "proc/cpuinfo") or ""
    family = re.search(r"^cpu family\s*:\s*(\d+)", cpuinfo, re.MULTILINE)
    amd = re.search(r"^vendor_id\s*:\s*AuthenticAMD", cpuinfo, re.MULTILINE)
    return amd is not None and family is not None and family[1] in {"21", "22"}


def _sockets(cpu_dir: Path, cpus: frozenset[int]) -> tuple[Socket, ...]:
    names = ("package_cpus", "core_siblings", "package_cpus_list", "core_siblings_list")

    def package_id(cpu: int) -> int | None:
        number = _read_int(cpu_dir / f"cpu{cpu}/topology/physical_package_id")
        return number if number is not None and number >= 0 else None  # -1: not known

    def members(cpu: int) -> frozenset[int]:
        found = _read_set(cpu_dir / f"cpu{cpu}/topology", *names)
        if found is not None:
            return found
        mine = package_id(cpu)
        return frozenset(other for other in cpus if package_id(other) == mine)

    return tuple(Socket(package_id(cpu), group) for cpu, group in _groups(cpus, members))


def _last_level_caches(
    cpu_dir: Path, cpus: frozenset[int], cores: tuple[frozenset[int], ...]
) -> tuple[Cache, ...]:
    levels: dict[int, int] = {}

    def sharers(cpu: int) -> frozenset[int] | None:
        level, found = max(_data_caches(cpu_dir / f"cpu{cpu}/cache"), default=(0, None), key=_level)
        levels[cpu] = level
        if found is not None and not found:
            # Itanium kernels leave the mask of some caches empty: one core's own.
            return next(core for core in cores if cpu in core)
        return found

    return tuple(Cache(levels[cpu], group) for cpu, group in _groups(cpus, sharers))


def _level(cache: tuple[int, frozenset[int] | None]) -> int:
    return cache[0]


def _data_caches(folder: Path) -> Iterator[tuple[int, frozenset[int] | None]]:
    """Level and sharers of each cache of a CPU that holds data."""
    for index in _numbered(folder, "index"):
        cache = folder / f"index{index}"
        level = _read_int(cache / "level")
        sharers = _read_set(cache, "shared_cpu_map", "shared_cpu_list")
        if level is None or sharers is None or read_text(cache / "type") == "Instruction":
            continue
        yield level, sharers


# --- NUMA nodes ---------------------------------------------------------------------------------


def _nodes(root: Path, cpus: frozenset[int]) -> Iterator[NumaNode]:
    folder = root / "sys/devices/system/node"
    numbers = _numbered(folder, "node")
    if not numbers:
        yield NumaNode(0, cpus)  # a kernel without NUMA: one node, of everything
        return
    # Emulated nodes share the CPUs of the real node that they are cut from; other nodes that
    # share a CPU are a firmware's mistake, and the first is believed.
    emulated = "numa=fake=" in (read_text(root / "proc/cmdline") or "")
    taken: set[int] = set()
    for number in numbers:
        path = folder / f"node{number}"
        mine = (_read_set(path, "cpumap", "cpulist") or frozenset()) & cpus
        if taken & mine and not emulated:
            continue
        taken |= mine
        yield NumaNode(number, mine, _memory_bytes(path), _distances(path, numbers))


def _memory_bytes(node: Path) -> int | None:
    found = re.search(r"MemTotal:\s*([0-9]+) kB", read_text(node / "meminfo") or "")
    return int(found[1]) * 1024 if found else None


def _distances(node: Path, numbers: list[int]) -> tuple[tuple[int, int], ...]:
    words = (read_text(node / "distance") or "").split()
    if len(words) != len(numbers) or not all(w.isascii() and w.isdigit() for w in words):
        return ()
    return tuple(zip(numbers, map(int, words), strict=True))


def _gpu_memory_nodes(root: Path) -> frozenset[int]:
    """The NUMA nodes that NVIDIA's driver made of its GPUs' memory (POWER9, Grace Hopper)."""
    try:
        gpus = list((root / "proc/driver/nvidia/gpus").iterdir())
    except OSError:
        return frozenset()
    texts = (read_text(gpu / "numa_status") or "" for gpu in gpus)
    found = (re.search(r"^Node:\s*([0-9]+)", text, re.MULTILINE) for text in texts)
    return frozenset(int(node[1]) for node in found if node)


def _own_memory_nodes(root: Path) -> frozenset[int] | None:
    status = read_text(root / "proc/self/status") or ""
    found = re.search(r"^Mems_allowed_list:\s*(\S+)", status, re.MULTILINE)
    try:
        return parse_ranges(found[1]) if found else None
    except ValueError:
        return None
