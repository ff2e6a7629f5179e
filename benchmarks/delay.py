"""How long a line takes from the worker's write to the reader of our console."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
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
from benchmarks.processes import PROGRAMS, running, wait_readable
from benchmarks.topics import Setup, Topic

_LIMIT = "inotify and read"
_RANKS = 4
_BETWEEN_S = 0.02
# The first lines come while other workers are still being started.
_SETTLE_NS = 500_000_000

_MEDIAN = Metric("median", "ms", 3)
_SLOWEST = Metric("99 %", "ms", 3)


def _run(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Sample:
    with running(argv, stdout=subprocess.PIPE, env=env) as (process, _):
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
            written_ns = int(line.rpartition(b":")[2])
            first_ns = first_ns or written_ns
            if written_ns - first_ns > _SETTLE_NS:
                yield (now_ns - written_ns) / 1e6


def _cases(setup: Setup) -> Iterator[Case]:
    lines = 75 if setup.quick else 275
    worker = [
        *(sys.executable, "-I", "-S"),
        *(str(PROGRAMS / "tick.py"), str(lines), str(_BETWEEN_S)),
    ]
    flags = ["--no-python", "--nproc-per-node", str(_RANKS), "--tee", "1"]
    tail = [sys.executable, str(PROGRAMS / "inotify_tail.py"), str(_RANKS), str(setup.scratch)]
    candidates = [
        Candidate(_LIMIT, partial(_run, [*tail, *worker])),
        Candidate(SUBJECT, partial(_run, [sys.executable, "-m", "asupervise", *flags, *worker])),
    ]
    if setup.torchrun is not None:
        torchrun = [str(setup.torchrun), *flags, *worker]
        candidates += [
            Candidate("torchrun", partial(_run, torchrun), rounds=2),
            Candidate(
                "torchrun, unbuffered",
                partial(_run, torchrun, {"PYTHONUNBUFFERED": "1"}),
                rounds=2,
            ),
        ]
    yield Case(
        name=f"{_RANKS} ranks",
        metrics=[_MEDIAN, _SLOWEST],
        candidates=candidates,
        limit=_LIMIT,
        goals=[Goal(_MEDIAN.name, "<=", 0.3), Goal(_SLOWEST.name, "<=", 2)],
        rounds=setup.rounds(5),
        warmups=0,
    )


TOPIC = Topic(
    name="delay",
    title=f"{_RANKS} ranks write a line each {_BETWEEN_S * 1000:g} ms: from the write to its "
    "arrival in the pipe that is our console",
    limit="one thread in poll() on inotify, then read and write: two wake-ups of a process and "
    "the interpreter's few calls between",
    cases=_cases,
)
