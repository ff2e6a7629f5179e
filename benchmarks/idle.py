"""What a supervisor costs while nothing happens."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from benchmarks.measure import SUBJECT, Candidate, Case, Goal, MeasureError, Metric, Sample
from benchmarks.peers import Command, our_command
from benchmarks.processes import PROGRAMS, running
from benchmarks.topics import Setup, Topic
from benchmarks.usage import SLEEPER, Usage, is_worker

_LIMIT = "asyncio, asleep"
_PEERS = ("torchrun", "mpirun", "circus", "honcho", "parallel")
_SIZES = (8, 64)
_SETTLE_S = 3.0
_START_TIMEOUT_S = 30.0

_CPU = Metric("CPU a minute", "s", 5)
_WAKE_UPS = Metric("wake-ups a minute", "", 1)
_MEMORY = Metric("memory", "MiB", 1)
_THREADS = Metric("threads", "", 0)
_MORE_THREADS = Metric(f"threads more than with {min(_SIZES)}", "", 0)
_PROCESSES = Metric("processes", "", 0)


class _Watched:
    """A supervisor whose workers sleep, and what it and its helpers use meanwhile."""

    def __init__(self, command: Command, workers: int, stack: ExitStack) -> None:
        self._workers = workers
        process, self._marked = stack.enter_context(running(command.argv, env=command.env))
        self._root = process.pid
        self._pids: list[int] = []
        self._before: Usage | None = None
        self.sample: Sample | None = None
        self.error = ""

    def wait_until_started(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while sum(map(is_worker, self._marked.pids())) < self._workers:
            if time.monotonic() > deadline:
                self.error = f"not {self._workers} workers after {_START_TIMEOUT_S:g} s"
                return
            time.sleep(0.1)

    def begin(self) -> None:
        found = self._marked.pids_and_children(self._root)
        self._pids = [pid for pid in found if not is_worker(pid)]
        self._before, self._start_ns = self._usage(), time.monotonic_ns()

    def end(self) -> None:
        before, after = self._before, self._usage()
        if before is None or after is None:
            return
        minutes = (time.monotonic_ns() - self._start_ns) / 60e9
        self.sample = {
            _CPU.name: (after.cpu_ns - before.cpu_ns) / 1e9 / minutes,
            _WAKE_UPS.name: (after.wake_ups - before.wake_ups) / minutes,
            _MEMORY.name: after.memory_kib / 1024,
            _THREADS.name: after.threads,
            _PROCESSES.name: after.processes,
        }

    def _usage(self) -> Usage | None:
        if self.error:
            return None
        try:
            return Usage.of(self._pids)
        except (OSError, StopIteration) as error:
            self.error = f"did not stay: {error!r}"
            return None

    def said(self) -> Sample:
        if self.sample is None:
            raise MeasureError(self.error)
        return self.sample


def _cases(setup: Setup) -> Iterator[Case]:
    """One window for all: they sleep, and do not disturb each other."""
    with ExitStack() as stack:
        watched = {
            (workers, name): _Watched(command, workers, stack)
            for workers in _SIZES
            for name, command in _commands(setup, workers)
        }
        for one in watched.values():
            one.wait_until_started()
        time.sleep(_SETTLE_S)
        for one in watched.values():
            one.begin()
        time.sleep(min(setup.seconds, 2.0) if setup.quick else setup.seconds)
        for one in watched.values():
            one.end()
    _more_threads(watched)
    for workers in _SIZES:
        yield _case(workers, {name: one.said for (n, name), one in watched.items() if n == workers})


def _commands(setup: Setup, workers: int) -> Iterator[tuple[str, Command]]:
    bare = [sys.executable, str(PROGRAMS / "bare_asyncio.py"), str(workers)]
    yield _LIMIT, Command([*bare, *SLEEPER])
    yield SUBJECT, our_command(workers, SLEEPER, tee=True)
    yield from setup.peers.commands(_PEERS, workers, SLEEPER, tee=True)


def _more_threads(watched: dict[tuple[int, str], _Watched]) -> None:
    """Adds to the samples of the larger groups how many threads they have more."""
    fewest = min(_SIZES)
    for (workers, name), one in watched.items():
        few = watched[fewest, name].sample
        if workers != fewest and one.sample is not None and few is not None:
            more = one.sample[_THREADS.name] - few[_THREADS.name]
            one.sample = {**one.sample, _MORE_THREADS.name: more}


def _case(workers: int, candidates: dict[str, Callable[[], Sample]]) -> Case:
    return Case(
        name=f"{workers} workers",
        size=workers,
        metrics=[_CPU, _WAKE_UPS, _MEMORY, _THREADS, _MORE_THREADS, _PROCESSES],
        candidates=[Candidate(name, said) for name, said in candidates.items()],
        limit=_LIMIT,
        goals=[
            Goal(_CPU.name, "<=", 0.001),
            Goal(_WAKE_UPS.name, "<=", 0),
            Goal(_MEMORY.name, "<=", 28),
            *([Goal(_MORE_THREADS.name, "<=", 0)] if workers > min(_SIZES) else []),
        ],
        rounds=1,
        warmups=0,
    )


TOPIC = Topic(
    name="idle",
    title="the supervisor and its helpers while N teed workers sleep: CPU time, voluntary "
    "context switches (a sleeper's wake-ups), resident memory, threads",
    limit="an asyncio program that awaits as many sleeping processes by pidfd, without logs",
    cases=_cases,
    plots=(_CPU.name, _WAKE_UPS.name, _MEMORY.name, _THREADS.name),
    notes=("All are watched in the same minute: asleep, they do not disturb each other.",),
)
