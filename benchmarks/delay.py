"""How long a line takes from the worker's write to the reader of our console."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

from benchmarks.measure import (
    SUBJECT,
    Candidate,
    Case,
    Goal,
    MeasureError,
    Metric,
    Sample,
    quantile,
)
from benchmarks.peers import Command, our_command
from benchmarks.processes import PROGRAMS, running, wait_readable
from benchmarks.topics import Setup, Topic

_LIMIT = "inotify and read"
_RANKS = 4
_PEERS = ("torchrun", "mpirun", "parallel", "honcho")
_BETWEEN_S = 0.02
# The first lines come while other workers are still being started.
_SETTLE_NS = 500_000_000

# What stands before it differs from launcher to launcher.
_STAMP = re.compile(rb"\d{9,}$")

_MEDIAN = Metric("median", "ms", 3)
_SLOWEST = Metric("99 %", "ms", 3)


def _run(command: Command) -> Sample:
    with running(command.argv, stdout=subprocess.PIPE, env=command.env) as (process, _):
        assert process.stdout is not None
        delays = list(_delays(process.stdout.fileno()))
    if len(delays) < 20:
        raise MeasureError(f"only {len(delays)} lines came")
    return {_MEDIAN.name: quantile(delays, 0.5), _SLOWEST.name: quantile(delays, 0.99)}


def _delays(fd: int, timeout_s: float = 30.0) -> Iterator[float]:
    """Milliseconds between what a line says and its arrival here."""
    held = b""
    first_ns = 0
    while wait_readable(fd, timeout_s) and (data := os.read(fd, 65536)):
        now_ns = time.monotonic_ns()
        *lines, held = (held + data).split(b"\n")
        for line in lines:
            if match := _STAMP.search(line):
                written_ns = int(match[0])
                first_ns = first_ns or written_ns
                if written_ns - first_ns > _SETTLE_NS:
                    yield (now_ns - written_ns) / 1e6


def _cases(setup: Setup) -> Iterator[Case]:
    lines = 75 if setup.quick else 175
    worker = [
        *(sys.executable, "-I", "-S"),
        *(str(PROGRAMS / "tick.py"), str(lines), str(_BETWEEN_S)),
    ]
    tail = [sys.executable, str(PROGRAMS / "inotify_tail.py"), str(_RANKS), str(setup.scratch)]
    candidates = [
        Candidate(_LIMIT, partial(_run, Command([*tail, *worker]))),
        Candidate(SUBJECT, partial(_run, our_command(_RANKS, worker, tee=True))),
    ]
    for name, command in setup.peers.commands(_PEERS, _RANKS, worker, tee=True):
        candidates.append(Candidate(name, partial(_run, command), rounds=2))
        if name == "torchrun":
            unbuffered = Command(command.argv, {**command.env, "PYTHONUNBUFFERED": "1"})
            candidates.append(Candidate(f"{name}, unbuffered", partial(_run, unbuffered), rounds=2))
    yield Case(
        name=f"{_RANKS} ranks",
        metrics=[_MEDIAN, _SLOWEST],
        candidates=candidates,
        limit=_LIMIT,
        goals=[Goal(_MEDIAN.name, "<=", 0.3), Goal(_SLOWEST.name, "<=", 2)],
        rounds=setup.rounds(4),
        warmups=0,
    )


TOPIC = Topic(
    name="delay",
    title=f"{_RANKS} ranks write a line each {_BETWEEN_S * 1000:g} ms: from the write to its "
    "arrival in the pipe that is our console",
    limit="one thread in poll() on inotify, then read and write: two wake-ups of a process and "
    "the interpreter's few calls between",
    cases=_cases,
    plots=(_MEDIAN.name, _SLOWEST.name),
    notes=("torchrun, unbuffered: with PYTHONUNBUFFERED=1, without which it shows blocks.",),
)
