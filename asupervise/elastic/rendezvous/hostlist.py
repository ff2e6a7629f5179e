"""Slurm's compressed lists of hosts, ``node[1-3,7],login1``, written out: pure.

The packages that do this are under the GPL (python-hostlist) or bring much more (ClusterShell),
and ``scontrol show hostnames`` needs Slurm's configuration, which a container does not have.
"""

from __future__ import annotations

import re
from itertools import product
from math import prod
from typing import Final

__all__ = ["expand"]

# What Slurm itself can have (MAX_SLURM_NODES), so that a slip cannot fill the memory.
_MAX_HOSTS: Final = 65_536
_HOST: Final = re.compile(r"(?:[^][,\s]+|\[[^][\s]+\])+")
_LIST: Final = re.compile(rf"(?:{_HOST.pattern})(?:[,\s]+{_HOST.pattern})*")
_PART: Final = re.compile(r"\[([^]]+)\]|([^][]+)")
_RANGE: Final = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


def expand(text: str) -> list[str]:
    """The hosts of a list, in its order, which is that of Slurm's node numbers.

    Raises:
        ValueError: if that is no list of hosts, saying which part is not.

    Example:
        >>> expand("node[08-10],login1")
        ['node08', 'node09', 'node10', 'login1']
    """
    if not _LIST.fullmatch(text):
        raise ValueError(f"{text!r} is no list of hosts such as node[1-3,7],login1")
    hosts: list[str] = []
    for host in _HOST.findall(text):
        parts = [_names(*part) for part in _PART.findall(host)]
        if len(hosts) + prod(map(len, parts)) > _MAX_HOSTS:
            raise ValueError(f"{text!r} has more than {_MAX_HOSTS:,} hosts")
        hosts += map("".join, product(*parts))
    return hosts


def _names(ranges: str, literal: str) -> list[str]:
    """What can stand in one place of a host's name."""
    if literal:
        return [literal]
    return [name for text in ranges.split(",") for name in _numbers(text)]


def _numbers(text: str) -> list[str]:
    found = _RANGE.fullmatch(text)
    if found is None:
        raise ValueError(f"[{text}] is no range of hosts such as [1-3]")
    first, last = found[1], found[2] or found[1]
    low, high = int(first), int(last)
    if not 0 <= high - low < _MAX_HOSTS:
        raise ValueError(f"[{text}] is no range of hosts: 1 to {_MAX_HOSTS:,}, the lower one first")
    # Leading zeros are part of the names, and it is the first that says how many.
    return [f"{number:0{len(first)}}" for number in range(low, high + 1)]
