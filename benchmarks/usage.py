"""What processes have used so far, as /proc tells it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# Nobody else on the machine sleeps so long: by this workers are told from their supervisor.
NAP_S: Final = "86399"
SLEEPER: Final = ("/bin/sleep", NAP_S)


@dataclass(frozen=True)
class Usage:
    """The sums over some processes; `wake_ups` are voluntary context switches."""

    cpu_ns: int
    wake_ups: int
    memory_kib: int
    threads: int
    processes: int
    descriptors: int

    @classmethod
    def of(cls, pids: Iterable[int]) -> Usage:
        pids = list(pids)
        tasks = [
            f"/proc/{pid}/task/{task}" for pid in pids for task in os.listdir(f"/proc/{pid}/task")
        ]
        return cls(
            cpu_ns=cpu_ns(pids),
            wake_ups=sum(status(task, "voluntary_ctxt_switches") for task in tasks),
            memory_kib=sum(status(f"/proc/{pid}", "VmRSS") for pid in pids),
            threads=len(tasks),
            processes=len(pids),
            descriptors=sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
        )


def cpu_ns(pids: Iterable[int]) -> int:
    """CPU time, in nanoseconds (schedstat); /proc/PID/stat counts ticks of 10 ms."""
    return sum(
        int(_text(f"/proc/{pid}/task/{task}/schedstat").split()[0])
        for pid in pids
        for task in os.listdir(f"/proc/{pid}/task")
    )


def is_worker(pid: int) -> bool:
    """Whether it is a `SLEEPER`."""
    try:
        return tuple(_text(f"/proc/{pid}/cmdline").split("\0")[:2]) == SLEEPER
    except OSError:
        return False  # it has ended


def status(folder: str, field: str) -> int:
    """A number of a ``status`` file."""
    lines = _text(f"{folder}/status").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _text(path: str) -> str:
    return Path(path).read_text()
