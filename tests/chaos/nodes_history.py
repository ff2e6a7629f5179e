"""What the workers of a chaos run over nodes have written: who was alive when."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

__all__ = ["Generation", "History", "Life"]


class Generation(NamedTuple):
    """What the workers of one round have in common."""

    world_size: int
    master_port: int
    restarts: int


@dataclass
class Life:
    """A worker, from its first to its last line; nanoseconds on CLOCK_MONOTONIC."""

    rank: int
    generation: Generation
    slot: int
    pid: int
    first_ns: int
    last_ns: int

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on node {self.slot}, pid {self.pid}, of {self.generation}: alive "
            f"from {self.first_ns / 1e9:.3f} to {self.last_ns / 1e9:.3f}"
        )


class History:
    """A file that workers append to, read as it grows."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._fd = os.open(path, os.O_RDONLY)
        self._rest = b""
        # By rank, then by what tells a worker from all others.
        self._lives: dict[int, dict[bytes, Life]] = defaultdict(dict)

    def close(self) -> None:
        os.close(self._fd)

    def read_on(self) -> None:
        """Take in what was written since."""
        while data := os.read(self._fd, 1 << 20):
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._take(line)

    def _take(self, line: bytes) -> None:
        when, rank, world, port, restarts, slot, itself = line.split(b" ", 6)
        lives = self._lives[int(rank)]
        life = lives.get(itself)
        if life is None:
            generation = Generation(int(world), int(port), int(restarts))
            pid = int(itself.split()[0])
            lives[itself] = Life(int(rank), generation, int(slot), pid, int(when), int(when))
        else:
            life.last_ns = int(when)

    def alive_since(self, ns: int) -> list[Life]:
        """Who has written after `ns`."""
        return [
            life for lives in self._lives.values() for life in lives.values() if life.last_ns > ns
        ]

    def complete_since(self, ns: int, world_size: int) -> bool:
        """Whether all ranks of one round with so many workers have written after `ns`."""
        ranks = defaultdict(set)
        for life in self.alive_since(ns):
            ranks[life.generation].add(life.rank)
        return any(
            generation.world_size == world_size and len(found) == world_size
            for generation, found in ranks.items()
        )

    def overlaps(self) -> Iterator[tuple[Life, Life]]:
        """Pairs of workers of one global rank that were alive at once."""
        for lives in self._lives.values():
            ordered = sorted(lives.values(), key=lambda life: life.first_ns)
            latest = ordered[0]
            for life in ordered[1:]:
                if life.first_ns <= latest.last_ns:
                    yield latest, life
                latest = max(latest, life, key=lambda life: life.last_ns)

    def describe(self, after_ns: int) -> list[str]:
        """Everybody who was alive after `ns`, in the order of their beginnings."""
        return [str(life) for life in sorted(self.alive_since(after_ns), key=lambda x: x.first_ns)]
