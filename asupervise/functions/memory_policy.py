"""The memory policy of the calling process, by libnuma: for workers that are not executed anew."""

from __future__ import annotations

import os

TYPE_CHECKING = False  # type checkers take this name for true; `typing` itself costs an import
if TYPE_CHECKING:
    from collections.abc import Iterable
    from ctypes import CDLL

__all__ = ["can_set_memory_policy", "set_memory_policy"]

# linux/mempolicy.h
_MODES = {"preferred": 1, "interleave": 3, "local": 4}
_MAX_NODES = 1024


def _libnuma() -> CDLL | None:
    import ctypes

    try:
        library = ctypes.CDLL("libnuma.so.1", use_errno=True)
    except OSError:
        return None
    return library if library.numa_available() >= 0 else None


def can_set_memory_policy() -> bool:
    """Whether libnuma is installed, and the kernel has NUMA and lets us use it."""
    return _libnuma() is not None


def set_memory_policy(policy: str, nodes: Iterable[int]) -> None:
    """Where memory comes from that this process touches first from now on (set_mempolicy(2)).

    Args:
        policy: ``local``, ``preferred`` or ``interleave``, as `MemoryPolicy` has them.
        nodes: numbers of NUMA nodes; not used for ``local``.

    Raises:
        OSError: if it cannot be set.
    """
    import ctypes

    library = _libnuma()
    if library is None:
        raise OSError(0, "libnuma.so.1 is missing or the kernel has no NUMA")
    mask = (ctypes.c_ulong * (_MAX_NODES // (8 * ctypes.sizeof(ctypes.c_ulong))))()
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    for node in () if policy == "local" else nodes:
        mask[node // bits] |= 1 << (node % bits)
    set_mempolicy = library.set_mempolicy
    set_mempolicy.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong)
    if set_mempolicy(_MODES[policy], mask if any(mask) else None, _MAX_NODES) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"set_mempolicy({policy}): {os.strerror(number)}")
