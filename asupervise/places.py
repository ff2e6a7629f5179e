"""Where a log file is: whether another one has taken its place, and what it is stored on."""

from __future__ import annotations

import enum
import os
import stat
from functools import cache


class Place(enum.Enum):
    """What is where a file was opened."""

    OURS = enum.auto()
    EMPTY = enum.auto()
    TAKEN = enum.auto()


def place_of(path: str, ours: os.stat_result) -> Place:
    """What is there now, where the file of which `ours` tells was opened."""
    try:
        there = os.stat(path)
    except OSError:
        return Place.EMPTY
    if (there.st_ino, there.st_dev) == (ours.st_ino, ours.st_dev):
        return Place.OURS
    return Place.TAKEN if stat.S_ISREG(there.st_mode) else Place.EMPTY


@cache
def is_memory(device: int) -> bool:
    """Whether it is a tmpfs (proc_pid_mountinfo(5)), as /tmp is on many systems."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo") as file:
            mounts = [line.split() for line in file]
    except OSError:
        return False
    return any(m[2] == number and m[m.index("-") + 1] == "tmpfs" for m in mounts)
