"""What a supervisor costs while nothing happens."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.measure import SUBJECT, Candidate, Case, Goal, MeasureError, Metric, Sample
from benchmarks.processes import PROGRAMS, Marked, running
from benchmarks.topics import Setup, Topic

_LIMIT = "asyncio, asleep"
_SETTLE_S = 2.0
_START_TIMEOUT_S = 30.0
# Nobody else on the machine sleeps so long: by this the workers are told from their supervisor.
_NAP_S = "86399"

_CPU = Metric("CPU s a minute", "s", 5)
_WAKE_UPS = Metric("wake-ups a minute", "", 1)
_MEMORY = Metric("memory", "MiB", 1)
_THREADS = Metric("threads", "", 0)
_PROCESSES = Metric("processes", "", 0)


@dataclass(frozen=True)
class _Usage:
    """What the supervisor's processes have used so far, its helpers included, its workers not."""

    cpu_ns: int
    wake_ups: int
    memory_kib: int
    threads: int
    processes: int


def _run(argv: Sequence[str], workers: int, window_s: float) -> Sample:
    with running([*argv, "/bin/sleep", _NAP_S]) as (process, marked):
        _wait_until_started(marked, workers)
        before, start_ns = _usage(marked, process.pid), time.monotonic_ns()
        time.sleep(window_s)
        after, end_ns = _usage(marked, process.pid), time.monotonic_ns()
    minutes = (end_ns - start_ns) / 60e9
    return {
        _CPU.name: (after.cpu_ns - before.cpu_ns) / 1e9 / minutes,
        _WAKE_UPS.name: (after.wake_ups - before.wake_ups) / minutes,
        _MEMORY.name: after.memory_kib / 1024,
        _THREADS.name: after.threads,
        _PROCESSES.name: after.processes,
    }


def _wait_until_started(marked: Marked, workers: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while sum(_is_worker(pid) for pid in marked.pids()) < workers:
        if time.monotonic() > deadline:
            raise MeasureError(f"not {workers} workers after {_START_TIMEOUT_S:g} s")
        time.sleep(0.1)
    time.sleep(_SETTLE_S)


def _is_worker(pid: int) -> bool:
    return _text(f"/proc/{pid}/cmdline").split("\0")[:2] == ["/bin/sleep", _NAP_S]


def _usage(marked: Marked, supervisor: int) -> _Usage:
    pids = [pid for pid in marked.pids_and_children(supervisor) if not _is_worker(pid)]
    tasks = [f"/proc/{pid}/task/{task}" for pid in pids for task in os.listdir(f"/proc/{pid}/task")]
    return _Usage(
        # In nanoseconds (schedstat); /proc/PID/stat counts ticks of 10 ms.
        cpu_ns=sum(int(_text(f"{task}/schedstat").split()[0]) for task in tasks),
        wake_ups=sum(_status(task, "voluntary_ctxt_switches") for task in tasks),
        memory_kib=sum(_status(f"/proc/{pid}", "VmRSS") for pid in pids),
        threads=len(tasks),
        processes=len(pids),
    )


def _status(folder: str, field: str) -> int:
    lines = _text(f"{folder}/status").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _text(path: str) -> str:
    return Path(path).read_text()


def _cases(setup: Setup) -> Iterator[Case]:
    window_s = min(setup.seconds, 2.0) if setup.quick else setup.seconds
    bare = [sys.executable, str(PROGRAMS / "bare_asyncio.py")]
    ours = [sys.executable, "-m", "asupervise"]
    for workers in (8, 64):
        flags = ["--no-python", "--tee", "3", "--nproc-per-node", str(workers)]
        commands = {_LIMIT: [*bare, str(workers)], SUBJECT: [*ours, *flags]}
        if setup.torchrun is not None:
            commands["torchrun"] = [str(setup.torchrun), *flags]
        yield Case(
            name=f"{workers} workers",
            metrics=[_CPU, _WAKE_UPS, _MEMORY, _THREADS, _PROCESSES],
            candidates=[
                Candidate(name, partial(_run, argv, workers, window_s))
                for name, argv in commands.items()
            ],
            limit=_LIMIT,
            goals=[
                Goal(_CPU.name, "<=", 0.001),
                Goal(_WAKE_UPS.name, "<=", 0),
                Goal(_MEMORY.name, "<=", 28),
            ],
            rounds=setup.rounds(1, quick=1),
            warmups=0,
        )


TOPIC = Topic(
    name="idle",
    title="the supervisor and its helpers while N teed workers sleep: CPU time, voluntary "
    "context switches (a sleeper's wake-ups), resident memory, threads",
    limit="an asyncio program that awaits as many sleeping processes by pidfd, without logs",
    cases=_cases,
)
