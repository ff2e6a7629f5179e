"""How much CPU this process may use: its affinity, its cgroup's quota, the cores behind CPUs.

Cheap beside the whole topology: read at every start, for the workers' fair share.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

__all__ = ["allowed_cpus", "count_cores", "cpu_quota"]


def allowed_cpus() -> frozenset[int]:
    """The CPUs that we may run on."""
    try:
        return frozenset(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return frozenset(range(os.cpu_count() or 1))


def count_cores(cpus: Iterable[int], root: str = "/") -> int:
    """How many cores are behind `cpus`, of which two may be hardware threads of one core.

    Args:
        cpus: CPU numbers.
        root: the folder that holds ``sys``.
    """
    numbers = frozenset(cpus)
    if _first_line(f"{root}/sys/devices/system/cpu/smt/active") != "1":
        return len(numbers)
    siblings = f"{root}/sys/devices/system/cpu/cpu{{}}/topology/thread_siblings_list"
    return len({_first_line(siblings.format(cpu)) or str(cpu) for cpu in numbers})


def cpu_quota(root: str = "/") -> float | None:
    """How many CPUs' time the cgroups of this process grant it, or None where nothing limits it.

    Args:
        root: the folder that holds ``proc`` and ``sys``.
    """
    return min(_quotas(root), default=None)


def _quotas(root: str) -> Iterator[float]:
    cgroups = f"{root}/sys/fs/cgroup"
    for line in _lines(f"{root}/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        for folder in _and_parents(path):
            if not controllers:  # version 2
                limit = _first_line(f"{cgroups}{folder}/cpu.max")
            elif "cpu" in controllers.split(","):
                v1 = f"{cgroups}/cpu{folder}/cpu.cfs"
                limit = f"{_first_line(v1 + '_quota_us')} {_first_line(v1 + '_period_us')}"
            else:
                break
            yield from _ratio(limit)


def _and_parents(path: str) -> Iterator[str]:
    """``/a/b`` → ``/a/b``, ``/a``, and the root, which is all that a container may see."""
    folder = path.rstrip("/")
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]
    yield ""


def _ratio(limit: str) -> Iterator[float]:
    """The quota in ``200000 100000``; none in ``max 100000`` and ``-1 100000``."""
    quota, _, period = limit.partition(" ")
    if quota.isdigit() and period.isdigit() and int(quota) and int(period):
        yield int(quota) / int(period)


def _first_line(path: str) -> str:
    return next(_lines(path), "")


def _lines(path: str) -> Iterator[str]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            yield from file.read().splitlines()
    except OSError:
        return  # not there, or not ours to read: nothing is known, so nothing limits us
