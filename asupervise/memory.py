"""Who sent a SIGKILL, as far as the kernel tells: the OOM killer's counters, and memory use."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from asupervise import procfs

_MIB = 1 << 20
_FIRST_SAMPLE_S = 0.1
# Each interval is so many times the one before: four looks in the first ten minutes.
_SELDOMER = 30
_NUMBER = re.compile(r"[0-9]{1,20}")
# proc(5), /proc/pid/status: neighbours since both are there (Linux 2.6).
_RESIDENT = re.compile(r"^VmHWM:\s+([0-9]{1,20}) kB\nVmRSS:\s+([0-9]{1,20}) kB$", re.MULTILINE)
_DELETED = " (deleted)"
# v1 says "no limit" with the largest page-aligned number that there is.
_NO_LIMIT = 1 << 60


class MemoryGroup(NamedTuple):
    """A memory cgroup, and how often the OOM killer has struck in it.

    Attributes:
        path: its folder.
        oom_kills: the counter, of any kind of OOM killer (cgroups(7)); hierarchical in v2, its
            own processes only in v1.
        limit_bytes: what it may use, or None for no limit.
    """

    path: str
    oom_kills: int
    limit_bytes: int | None


class OomCounts(NamedTuple):
    """The OOM killer's counters at one moment.

    Attributes:
        groups: memory cgroups, by folder.
        machine: kills on the whole machine (``oom_kill`` in ``/proc/vmstat``), or None.
    """

    groups: Mapping[str, MemoryGroup] = MappingProxyType({})
    machine: int | None = None


class MemoryUse(NamedTuple):
    """Resident memory of one process, in bytes; 0 for unknown."""

    last: int
    peak: int


# --- what the kernel tells ----------------------------------------------------------------------


def read_counts(folders: Iterable[str], root: str = "/") -> OomCounts:
    """Read the counters of these cgroups and of the machine."""
    groups = {f: group for f in folders if (group := read_group(f)) is not None}
    return OomCounts(groups, parse_value(_text(root, "proc/vmstat"), "oom_kill"))


def memory_cgroup(pid: int | str, root: str = "/") -> str | None:
    """The folder of the memory cgroup of a process, or None: v1's memory controller, else v2's.

    A container that sees the host's names has its own cgroup at the top (no cgroup namespace, as
    with v1): that is taken where the name is not there.
    """
    return folder_of(cgroup_text(pid, root), root)


def cgroup_text(pid: int | str, root: str = "/") -> str:
    """What the kernel says about the cgroups of a process (``/proc/<pid>/cgroup``)."""
    return _text(root, f"proc/{pid}/cgroup")


def folder_of(text: str, root: str = "/") -> str | None:
    """The folder of the memory cgroup in the text of :func:`cgroup_text`."""
    version, path = parse_cgroup(text)
    if version == 0:
        return None
    top = os.path.join(root, "sys/fs/cgroup", "memory" if version == 1 else "")
    if version == 2 and not _exists(top, "cgroup.controllers"):
        top = os.path.join(top, "unified")
    top = os.path.normpath(top)
    folder = os.path.normpath(os.path.join(top, path.lstrip("/")))
    if not (folder.startswith(top) and os.path.isdir(folder)):
        return top
    # In v2 memory is accounted in the nearest one above that the controller is handed down to.
    while version == 2 and folder != top and not _exists(folder, "memory.events"):
        folder = os.path.dirname(folder)
    return folder


def parse_cgroup(text: str) -> tuple[int, str]:
    """The cgroup version that accounts memory, and the path there; ``(0, "")`` for neither.

    Example:
        >>> parse_cgroup("3:cpu:/a\\n2:memory:/b\\n0::/c\\n")
        (1, '/b')
    """
    unified = None
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if "memory" in controllers.split(","):
            return 1, path
        if colon and not controllers:
            unified = path.removesuffix(_DELETED)
    return (0, "") if unified is None else (2, unified)


def read_group(folder: str) -> MemoryGroup | None:
    """A cgroup's counter and limit; None where it has none (the topmost one of v2)."""
    for counter, limit in (
        ("memory.events", "memory.max"),
        ("memory.oom_control", "memory.limit_in_bytes"),
    ):
        kills = parse_value(_text(folder, counter), "oom_kill")
        if kills is not None:
            return MemoryGroup(folder, kills, parse_limit(_text(folder, limit)))
    return None


def parse_limit(text: str) -> int | None:
    """A limit in bytes; None for none (``max``; v1's largest number) or for nonsense."""
    number = _NUMBER.fullmatch(text.strip())
    return int(number[0]) if number and int(number[0]) < _NO_LIMIT else None


def parse_value(text: str, key: str) -> int | None:
    """The number after `key` in lines of ``key value``, ``key: value`` or ``key: value kB``."""
    # Not line by line: /proc/vmstat has 190 of them, and is read before each group.
    found = re.search(rf"^{re.escape(key)}:?[ \t]+([0-9]{{1,20}})(?:\s|$)", text, re.MULTILINE)
    return int(found[1]) if found else None


def memory_of(pid: int | str, root: str = "/") -> MemoryUse | None:
    """The resident memory of a process; None if it is gone.

    By ``/proc``, which knows the peak of the program since its start; by psutil elsewhere.
    """
    text = _text(root, f"proc/{pid}/status")
    if found := _RESIDENT.search(text):
        peak, last = int(found[1]) * 1024, int(found[2]) * 1024
        return MemoryUse(last, max(last, peak))
    return None if text or os.path.isdir(os.path.join(root, "proc/self")) else _by_psutil(pid)


def _by_psutil(pid: int | str) -> MemoryUse | None:
    import psutil

    try:
        used: int = psutil.Process(int(pid) if pid != "self" else None).memory_info().rss
    except psutil.Error:
        return None
    return MemoryUse(used, used)


def _exists(*parts: str) -> bool:
    return os.path.exists(os.path.join(*parts))


def _text(*parts: str) -> str:
    return procfs.read_text(os.path.join(*parts))


# --- what follows from it -----------------------------------------------------------------------


def explain_sigkill(before: OomCounts, after: OomCounts, folder: str | None) -> str:
    """Who sent a SIGKILL that was not ours.

    Args:
        before: the counters at the start, each cgroup's when it was first seen.
        after: the counters soon after the death.
        folder: the memory cgroup that the worker was last seen in, if known.
    """
    was, now = before.groups.get(folder or ""), after.groups.get(folder or "")
    counted = was is not None and now is not None
    if was is not None and now is not None and now.oom_kills > was.oom_kills:
        limit = "" if now.limit_bytes is None else f", limit {now.limit_bytes / _MIB:.0f} MiB"
        return f"the kernel's OOM killer (cgroup {now.path}{limit})"
    if before.machine is None or after.machine is None:
        if counted:
            return _FROM_OUTSIDE
        return "SIGKILL, not from this supervisor; this kernel does not tell about its OOM killer"
    kills = after.machine - before.machine
    if kills <= 0:
        return _FROM_OUTSIDE
    struck = f"it has struck {'once' if kills == 1 else f'{kills} times'} on this machine meanwhile"
    if counted:
        # Its cgroup would have counted it, unless the worker has moved since it was looked at.
        return (
            "SIGKILL from outside: not sent by this supervisor, and hardly by the OOM killer: "
            f"{struck}, but not in cgroup {folder}"
        )
    return f"the kernel's OOM killer, most likely: {struck}"


_FROM_OUTSIDE = "SIGKILL from outside: sent neither by this supervisor nor by the OOM killer"


def _look_no_more() -> None:
    """In the place of what refers to the sampler in turn."""


class MemorySampler:
    """Looks at the workers' memory from time to time.

    Soon at first and then ever more seldom, up to `interval_s`: who takes too much memory often
    does so at the start, and a worker that sleeps for a day costs next to nothing.

    Args:
        look: called each time.
        interval_s: seconds between two looks in the long run.
    """

    def __init__(self, look: Callable[[], None], interval_s: float) -> None:
        self._look = look
        self._interval_s = interval_s
        self._next_s = min(_FIRST_SAMPLE_S, interval_s)
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._next_s, self._tick)
        self._next_s = min(_SELDOMER * self._next_s, self._interval_s)

    def stop(self) -> None:
        """No look is taken any more; it is not to be started again."""
        if self._timer is not None:
            self._timer.cancel()
        self._look = _look_no_more

    def _tick(self) -> None:
        # First the next one: whatever the look does, the looks go on.
        self.start()
        self._look()
