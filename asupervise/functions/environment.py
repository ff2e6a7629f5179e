"""What a fork does not survive, and environment variables that come too late for it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from asupervise.errors import ZygoteError

__all__ = ["check_facts", "common", "warnings"]

# Read when a program is loaded (ld.so(8), mallopt(3)) or when the interpreter starts.
_READ_AT_EXEC = ("LD_", "GLIBC_TUNABLES", "MALLOC_")
_READ_AT_START = frozenset({
    "PYTHONHASHSEED", "PYTHONMALLOC", "PYTHONUTF8", "PYTHONIOENCODING", "PYTHONOPTIMIZE",
    "PYTHONWARNINGS", "PYTHONDEVMODE", "PYTHONTRACEMALLOC", "PYTHONINTMAXSTRDIGITS",
})  # fmt: skip
# Read when the library is loaded (the OpenMP specification, chapter 6; the runtimes' manuals).
_READ_BY_OPENMP = ("OMP_", "GOMP_", "KMP_", "MKL_")
# Read by libraries at a time of their own, mostly once.
_READ_ONCE = (
    "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "ZE_", "OPENBLAS_", "NUMEXPR_", "NCCL_", "PYTORCH_",
    "TORCH_", "XLA_", "JAX_", "TF_", *_READ_BY_OPENMP,
)  # fmt: skip


def common(environments: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """What is the same for all workers: a zygote of their own is started with that.

    Example:
        >>> common([{"RANK": "0", "OMP_NUM_THREADS": "4"}, {"RANK": "1", "OMP_NUM_THREADS": "4"}])
        {'OMP_NUM_THREADS': '4'}
    """
    first, *others = environments
    return {
        name: value
        for name, value in first.items()
        if all(other.get(name) == value for other in others)
    }


def warnings(
    environments: Sequence[Mapping[str, str]],
    zygote: Mapping[str, str],
    facts: Mapping[str, Any],
) -> list[str]:
    """A sentence for each variable that comes too late, and for native threads.

    Args:
        environments: of the workers, as far as it differs from ours.
        zygote: the zygote's environment.
        facts: what its imports have read and started; see `zygote_main`.
    """
    found = []
    for name in sorted({name for env in environments for name in env}):
        ranks = [rank for rank, env in enumerate(environments)
                 if name in env and env[name] != zygote.get(name)]  # fmt: skip
        why = _too_late(name, facts) if ranks else ""
        if why:
            value = environments[ranks[0]][name]
            found.append(
                f"envs: {name}={value!r} of local rank {ranks[0]} comes too late: {why}; give it "
                "to the zygote (Zygote(env=...)), or use start_method 'spawn'"
            )
    found += [
        f"preload: the import of {module} has started native threads, which a fork does not copy: "
        "what they were to do is not done in a worker"
        for module in facts["native"]
    ]
    return found


def _too_late(name: str, facts: Mapping[str, Any]) -> str:
    if name.startswith(_READ_AT_EXEC):
        return "it is read when a program is loaded, and a forked worker is not"
    if name in _READ_AT_START:
        return "Python reads it when the interpreter starts"
    if name.startswith(_READ_ONCE) and name in facts["read"]:
        return f"the import of {facts['read'][name]} has already read it in the zygote"
    if name.startswith(_READ_BY_OPENMP) and facts["openmp"]:
        return f"the OpenMP library that the import of {facts['openmp']} has loaded has read it"
    return ""


def check_facts(facts: Mapping[str, Any]) -> None:
    """Refuse to fork from a process that holds what no fork survives.

    A fork copies one thread alone: a lock that another one held stays locked for ever (fork(2)).
    CUDA says of itself that it cannot be used in a forked process.
    """
    for path, module in facts["devices"].items():
        raise ZygoteError(
            f"preload: {_blamed(module)} has opened {path}: a forked process cannot use the "
            "context of an accelerator that its parent has made",
            hint="import it without using the device, or use start_method 'spawn'",
        )
    for name, module in facts["threads"].items():
        raise ZygoteError(
            f"preload: {_blamed(module)} has started the thread {name!r}, which a fork would not "
            "copy: a lock that it holds would stay locked in every worker",
            hint="start it in the worker's function, or use start_method 'spawn'",
        )


def _blamed(module: str) -> str:
    return f"the import of {module}" if module else "an import"
