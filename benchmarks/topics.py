"""What a benchmark is made of, for those who write one: see README.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import Case
from benchmarks.peers import Peers


@dataclass
class Setup:
    """How to measure, and with whom.

    Attributes:
        scratch: a folder for log files and data.
        peers: the other launchers that are here.
        quick: few rounds and small sizes: does it run, not how fast is it.
        seconds: the length of the windows in which nothing happens.
        only_rounds: the number of rounds, if it was given.
        deadline_s: by time.monotonic(), after which each case gets one round.
        left_out: what is not measured here, and why, a sentence each.
    """

    scratch: Path
    peers: Peers
    quick: bool = False
    seconds: float = 60.0
    only_rounds: int | None = None
    deadline_s: float = math.inf
    left_out: set[str] = field(default_factory=set)

    def rounds(self, usual: int, quick: int = 2) -> int:
        return self.only_rounds or (quick if self.quick else usual)


@dataclass(frozen=True)
class Topic:
    """One benchmark.

    Attributes:
        name: on the command line.
        title: what is measured.
        limit: what the limit does that is measured beside it, and why it is one.
        cases: gives the cases one by one; what a case needs is open until the next is asked for.
        plots: the names of the metrics that are drawn.
        notes: what must be known to read its figures, a sentence each.
    """

    name: str
    title: str
    limit: str
    cases: Callable[[Setup], Iterator[Case]]
    plots: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
