"""Reading the process table: who is alive, and whose it is (Linux ``/proc``, proc(5)).

A process is named by its pid and its start time together, because a pid alone may have been
given to somebody else by the time that a signal is sent. Where there is no ``/proc`` every
function answers "nothing known", and the cleanup falls back to process groups alone.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# State letters of processes that run nothing any more (proc(5): zombie, dead).
_ENDED_STATES = frozenset("ZXx")
# How long to wait for a program that is just being loaded: 20 ms at most.
_EXEC_LOOKS = 20
_EXEC_PAUSE_S = 0.001
# In which the kernel counts CPU time.
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class ProcessEntry(NamedTuple):
    """One line of the process table.

    Attributes:
        pid: process id, in our pid namespace.
        start_ticks: start time in clock ticks since boot; with `pid` it names one process.
        parent_pid: whose child it is now (1 or a subreaper once orphaned).
        process_group: process group id.
        session: session id.
        cpu_ticks: CPU time used so far, in clock ticks, user and system.
        state: the kernel's letter: R running, S sleeping, D uninterruptible, T stopped, …
        name: the command's name, as in ``/proc/<pid>/comm``.
    """

    pid: int
    start_ticks: int
    parent_pid: int
    process_group: int
    session: int
    cpu_ticks: int
    state: str
    name: str

    @property
    def alive(self) -> bool:
        return self.state not in _ENDED_STATES


def read_entry(pid: int) -> ProcessEntry | None:
    """The table's line for `pid`; None if there is none (any more)."""
    text = _read(f"/proc/{pid}/stat")
    if text is None:
        return None
    # The name may hold blanks and parentheses: the fields count from the last ")".
    head, _, tail = text.rpartition(b")")
    fields = tail.split()
    if len(fields) < 20:
        return None
    return ProcessEntry(
        pid=pid,
        start_ticks=int(fields[19]),
        parent_pid=int(fields[1]),
        process_group=int(fields[2]),
        session=int(fields[3]),
        cpu_ticks=int(fields[11]) + int(fields[12]),
        state=fields[0].decode(),
        name=head.partition(b"(")[2].decode(errors="replace"),
    )


def entries(pids: Iterable[int] | None = None) -> Iterator[ProcessEntry]:
    """Every living process that can be read, ours and others'."""
    for pid in all_pids() if pids is None else pids:
        entry = read_entry(pid)
        if entry is not None and entry.alive:
            yield entry


def all_pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def own_children() -> list[int] | None:
    """Our own children, ended ones included; None where the kernel does not list them.

    Without looking at every process there is (proc(5): ``children``, CONFIG_PROC_CHILDREN). The
    list may miss one only while others are just being given away; who has ended stays.
    """
    found: list[int] = []
    try:
        tasks = os.listdir("/proc/self/task")
    except OSError:
        return None
    for task in tasks:
        text = _read(f"/proc/self/task/{task}/children")
        if text is None and os.path.exists(f"/proc/self/task/{task}"):
            return None
        found += map(int, (text or b"").split())
    return found


def environment_holds(pid: int, token: bytes) -> bool:
    """Whether the environment that `pid` was started with holds `token`.

    False as well where it cannot be read: another user's process, or one without memory.
    """
    path = f"/proc/{pid}/environ"
    text = _read(path)
    for _ in range(_EXEC_LOOKS):
        if text != b"" or not _is_between_programs(pid):
            break
        # It will be there in a moment: who is just being started must not escape for that.
        time.sleep(_EXEC_PAUSE_S)
        text = _read(path)
    return text is not None and token in text


def _is_between_programs(pid: int) -> bool:
    """Whether execve(2) has replaced the memory, but not yet laid out the environment in it."""
    if pid == 1:
        return False  # a container's may have none for good
    text = _read(f"/proc/{pid}/stat")
    fields = (text or b"").rpartition(b")")[2].split()
    # vsize: kernel threads have none; env_end: 0 until it is laid out (proc(5)).
    return len(fields) >= 49 and int(fields[20]) > 0 and int(fields[48]) == 0


def newest_pid() -> int | None:
    """The pid given out last in our pid namespace (the last field of ``/proc/loadavg``)."""
    text = _read("/proc/loadavg")
    return int(text.split()[-1]) if text else None


def total_forks() -> int | None:
    """How many processes and threads have been started since boot, in all pid namespaces."""
    text = _read("/proc/stat") or b""
    start = text.find(b"\nprocesses ")
    return int(text[start:].split(None, 2)[1]) if start >= 0 else None


def pid_limit() -> int:
    """Where the kernel begins anew with small pids; the least that it may be, if unknown."""
    text = _read("/proc/sys/kernel/pid_max")
    return int(text) if text else 32_768


def group_exists(process_group: int) -> bool:
    """Whether the group has a member left, living or unreaped (kill(2) with signal 0)."""
    try:
        os.killpg(process_group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def send_to_group(process_group: int, sig: int) -> bool:
    """Signal a process group; False if it has no member left.

    Raises:
        PermissionError: if no member may be signalled by us (kill(2)).
    """
    try:
        os.killpg(process_group, sig)
    except ProcessLookupError:
        return False
    return True


def send_to_process(entry: ProcessEntry, sig: int) -> bool:
    """Signal exactly the process that `entry` named, and nobody who got its pid since.

    The pidfd is opened first and the start time compared afterwards: from then on the pidfd
    can only mean that process (pidfd_open(2)).

    Returns:
        False if it is gone.

    Raises:
        PermissionError: if it may not be signalled by us.
    """
    if not hasattr(os, "pidfd_open"):
        return _send_by_pid(entry, sig)
    try:
        pidfd = os.pidfd_open(entry.pid)
    except ProcessLookupError:
        return False
    except OSError:
        # No descriptor is left (EMFILE).
        return _send_by_pid(entry, sig)
    try:
        if not is_same(entry):
            return False
        signal.pidfd_send_signal(pidfd, sig)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True


def _send_by_pid(entry: ProcessEntry, sig: int) -> bool:
    if not is_same(entry):
        return False
    try:
        os.kill(entry.pid, sig)
    except ProcessLookupError:
        return False
    return True


def is_same(entry: ProcessEntry) -> bool:
    """Whether the process that `entry` named is still there and runs."""
    now = read_entry(entry.pid)
    return now is not None and now.start_ticks == entry.start_ticks and now.alive


def wait_channel(pid: int) -> str:
    """The kernel function in which a process sleeps, or "" (``/proc/<pid>/wchan``)."""
    text = _read(f"/proc/{pid}/wchan")
    return "" if text is None or text == b"0" else text.decode(errors="replace")


def read_text(path: str) -> str:
    """A small file of ``/proc`` or ``/sys`` as text; "" if it cannot be read."""
    return (_read(path) or b"").decode(errors="replace")


def _read(path: str) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        chunks = []
        while chunk := os.read(fd, 65536):
            chunks.append(chunk)
        return b"".join(chunks)
    except OSError:
        # The process ended between open and read (ESRCH), or is another user's (EACCES).
        return None
    finally:
        os.close(fd)
