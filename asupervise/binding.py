"""Which CPUs and which memory each rank gets, and the argv that makes it so. Pure: no I/O.

`bind_ranks` decides for a whole group at once from a `Topology` that was read once; `rewrite_argv`
turns one rank's share into a program call under ``numactl`` or ``taskset``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asupervise.affinity import AffinityMode, MemoryPolicy, NumaOptions, RankBinding
from asupervise.errors import BindingError
from asupervise.placement import bind_ranks
from asupervise.topology import Gpu, format_ranges, parse_ranges

__all__ = [
    "AffinityMode",
    "BindingTools",
    "MemoryPolicy",
    "NumaOptions",
    "RankBinding",
    "bind_ranks",
    "binding_prefix",
    "format_ranges",
    "gpu_visibility",
    "parse_ranges",
    "rewrite_argv",
]

# --- the argv -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BindingTools:
    """The paths of the programs that bind, found by the caller; None for one that is missing."""

    numactl: str | None = None
    taskset: str | None = None


def rewrite_argv(
    argv: Sequence[str], binding: RankBinding | None, tools: BindingTools
) -> tuple[str, ...]:
    """The argv that runs ``argv`` under a binding; unchanged where there is none.

    Both tools replace themselves by the program (exec), so its pid and exit status stay its own.

    Raises:
        BindingError: no tool that is there can do it.

    Example:
        >>> cpus = frozenset({0, 1, 2})
        >>> binding = RankBinding(0, cpus, MemoryPolicy.LOCAL, frozenset({0}), None, "")
        >>> " ".join(rewrite_argv(["train.py"], binding, BindingTools(numactl="numactl")))
        'numactl --physcpubind=0-2 --localalloc -- train.py'
    """
    return (*binding_prefix(binding, tools), *argv)


def binding_prefix(binding: RankBinding | None, tools: BindingTools) -> tuple[str, ...]:
    """What stands before the program's own argv; ``(*prefix, "true")`` is a probe of it.

    `numactl` where there is one; else `taskset`, which knows nothing of memory. Numactl refuses
    where the kernel has no NUMA or a container forbids its system calls: then pass tools without.

    Sources: numactl(8), taskset(1).

    Raises:
        BindingError: no tool that is there can do it; names what to install.

    Example:
        >>> binding = RankBinding(0, frozenset({0}), MemoryPolicy.NONE, frozenset(), None, "")
        >>> binding_prefix(binding, BindingTools(taskset="/usr/bin/taskset"))
        ('/usr/bin/taskset', '--cpu-list', '0')
    """
    if binding is None:
        return ()
    cpus = format_ranges(binding.cpus)
    if tools.numactl:
        # The -- keeps a program whose name begins with a dash from being read as an option.
        return (tools.numactl, f"--physcpubind={cpus}", *_memory_flags(binding), "--")
    if binding.memory_policy is not MemoryPolicy.NONE:
        raise BindingError(
            f"rank {binding.local_rank}: memory_policy={str(binding.memory_policy)!r} needs the "
            "program numactl, which was not found",
            local_rank=binding.local_rank,
            hint="install numactl (Debian, Fedora: package numactl), or bind CPUs only",
        )
    if tools.taskset:
        # No -- here: taskset would take it for the program. It stops at the first operand itself.
        return (tools.taskset, "--cpu-list", cpus)
    raise BindingError(
        f"rank {binding.local_rank}: binding to CPUs {cpus} needs the program numactl or taskset, "
        "and neither was found",
        local_rank=binding.local_rank,
        hint="install numactl (package numactl) or taskset (package util-linux)",
    )


def _memory_flags(binding: RankBinding) -> tuple[str, ...]:
    nodes = format_ranges(binding.memory_nodes)
    flags: dict[MemoryPolicy, tuple[str, ...]] = {
        MemoryPolicy.NONE: (),
        MemoryPolicy.LOCAL: ("--localalloc",),
        MemoryPolicy.PREFERRED: (f"--preferred={nodes}",),
        MemoryPolicy.INTERLEAVE: (f"--interleave={nodes}",),
    }
    return flags[binding.memory_policy]


# --- GPU visibility -----------------------------------------------------------------------------


def gpu_visibility(gpus: Sequence[Gpu], local_rank: int, env: Mapping[str, str]) -> dict[str, str]:
    """The variable that leaves a worker only its own GPU, which it then sees as device 0.

    The GPU is the one that it would see as device ``local_rank`` without: that entry of the list
    in ``env``, else the number itself, as torch has it. One variable is set, by vendor:

    - NVIDIA, and where no GPU is known: ``CUDA_VISIBLE_DEVICES``.
    - AMD: ``HIP_VISIBLE_DEVICES``, or ``CUDA_VISIBLE_DEVICES`` where ``env`` has that one alone
      (HIP reads either). Never ``ROCR_VISIBLE_DEVICES``, which applies beneath: its numbers count
      in another order, and HIP's then count within what it leaves.
    - Intel: ``ZE_AFFINITY_MASK``, whose entries do not reorder devices.

    Raises:
        ValueError: the list in ``env`` has no entry for this rank.

    Example:
        >>> gpu_visibility((), 1, {"CUDA_VISIBLE_DEVICES": "6, 4"})
        {'CUDA_VISIBLE_DEVICES': '4'}
    """
    vendor = gpus[0].vendor if gpus else "nvidia"
    name = _visibility_variable(vendor, env)
    value = env.get(name)
    if value is None or (vendor == "intel" and not value):
        return {name: str(local_rank)}
    entries = [entry.strip() for entry in value.split(",")]
    if vendor == "intel":
        entries.sort(key=_mask_order)
    if local_rank >= len(entries):
        raise ValueError(f"rank {local_rank} has no GPU of its own in {name}={value!r}")
    return {name: entries[local_rank]}


def _visibility_variable(vendor: str, env: Mapping[str, str]) -> str:
    if vendor == "intel":
        return "ZE_AFFINITY_MASK"
    if vendor == "amd" and ("HIP_VISIBLE_DEVICES" in env or "CUDA_VISIBLE_DEVICES" not in env):
        return "HIP_VISIBLE_DEVICES"
    return "CUDA_VISIBLE_DEVICES"


def _mask_order(entry: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isascii() and part.isdigit() else 0 for part in entry.split("."))
