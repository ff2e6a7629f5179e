"""What arrives on the console of what N workers write: lines lost, doubled and torn."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.measure import SUBJECT, Candidate, Case, Goal, Metric, Sample
from benchmarks.peers import Command, our_command
from benchmarks.processes import drained_pipe, run_command
from benchmarks.topics import Setup

_RANKS = 4
_PEERS = ("torchrun", "mpirun", "parallel", "honcho")
_METRICS = [Metric(f"lines {fault}", "%", 2) for fault in ("lost", "doubled", "torn")]
# Whatever a launcher puts before it; programs/speak.py writes the rest.
_LINE = re.compile(rb"[^{}]{0,60}\{(\d\d) (\d{8}) x{86}\}\n")


def cases(setup: Setup) -> Iterator[Case]:
    lines = 10_000 if setup.quick else 100_000
    worker = [sys.executable, "-S", "-m", "benchmarks.programs.speak"]
    commands = [(SUBJECT, our_command(_RANKS, [*worker, str(lines)], tee=True), lines)]
    for name, command in setup.peers.commands(_PEERS, _RANKS, [*worker, str(lines)], tee=True):
        if name != "honcho":
            commands.append((name, command, lines))
    # It takes a minute for as many as the others get.
    few = lines // 20
    for name, command in setup.peers.commands(["honcho"], _RANKS, [*worker, str(few)], tee=True):
        commands.append((name, command, few))
    yield Case(
        name=f"N = {_RANKS}, what arrives",
        group="what arrives",
        metrics=_METRICS,
        candidates=[
            Candidate(name, partial(_count, command, count, setup.scratch / "shown"))
            for name, command, count in commands
        ],
        limit=None,
        goals=[Goal(metric.name, "<=", 0) for metric in _METRICS],
        rounds=setup.rounds(2, quick=1),
        warmups=0,
    )


def _count(command: Command, lines: int, shown: Path) -> Sample:
    with drained_pipe(str(shown)) as pipe:
        run_command(command.argv, env=command.env, stdout=pipe)
    seen: Counter[tuple[bytes, bytes]] = Counter()
    torn = 0
    with open(shown, "rb") as output:
        for line in output:
            if match := _LINE.fullmatch(line):
                seen[match[1], match[2]] += 1
            elif b"x" * 20 in line:
                # What else is there (who has started, who has ended) is not a worker's.
                torn += 1
    shown.unlink()
    every = lines * _RANKS
    figures = (every - len(seen), seen.total() - len(seen), torn)
    return {
        metric.name: 100 * figure / every for metric, figure in zip(_METRICS, figures, strict=True)
    }
