"""Many teed workers on one node: their start, their steady state, their end."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.measure import SUBJECT, Candidate, Case, Goal, Metric, Sample
from benchmarks.processes import Marked, Resident, ms
from benchmarks.topics import IN_MEMORY, WITH_REPORT, Setup, Topic, cleaned_up
from benchmarks.usage import SLEEPER, Usage, cpu_ns, is_worker

LIMIT = "bare asyncio"
START = Metric("start", "ms", 0)
STOP = Metric("stop", "ms", 0)
MEMORY = Metric("memory", "MiB", 1)
_THREADS = Metric("threads", "", 0)
_DESCRIPTORS = Metric("descriptors a worker", "", 2)
_CPU = Metric("CPU a minute", "s", 4)


# --- inside the candidates' processes -------------------------------------------------------------


class _Watch:
    """Takes the times around a start and a stop, and looks at us and our helpers between."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._request = request
        self._start_ns = time.monotonic_ns()

    def started(self) -> None:
        self._started_ns = time.monotonic_ns()

    def settled(self) -> None:
        # Ourselves and our helpers.
        pids = Marked().pids_and_children(os.getpid())
        self._pids = [pid for pid in pids if not is_worker(pid)]
        # Last: what the looking costs us is not to be counted.
        self._before_ns = cpu_ns(self._pids)

    def stopping(self) -> None:
        self._steady = Usage.of(self._pids)
        self._stopping_ns = time.monotonic_ns()

    def sample(self) -> Sample:
        stopped_ns = time.monotonic_ns()
        cleaned_up(self._request["log_dir"])
        cpu_s = (self._steady.cpu_ns - self._before_ns) / 1e9
        return {
            START.name: ms(self._start_ns, self._started_ns),
            STOP.name: ms(self._stopping_ns, stopped_ns),
            MEMORY.name: self._steady.memory_kib / 1024,
            _THREADS.name: self._steady.threads,
            _DESCRIPTORS.name: self._steady.descriptors / self._request["workers"],
            _CPU.name: cpu_s * 60 / max(self._request["window_s"], 0.001),
        }


async def supervised(request: dict[str, Any]) -> Sample:
    # Imported here and below: the others run without.
    from asupervise import DefaultLogsSpecs, Std, start_processes

    ranks = range(request["workers"])
    logs = DefaultLogsSpecs(request["log_dir"], tee=Std.ALL)
    watch = _Watch(request)
    ctx = await start_processes(
        *("bench", SLEEPER, {rank: () for rank in ranks}, {rank: {} for rank in ranks}, logs),
        report=request.get("report", False),
    )
    watch.started()
    await asyncio.sleep(request["settle_s"])
    watch.settled()
    await asyncio.sleep(request["window_s"])
    watch.stopping()
    await ctx.close()
    return watch.sample()


def torch(request: dict[str, Any]) -> Sample:
    from benchmarks import torch_api

    program, *words = SLEEPER
    args = {rank: words for rank in range(request["workers"])}
    watch = _Watch(request)
    context = torch_api.start(program, args, request["log_dir"], tee=3)
    watch.started()
    time.sleep(request["settle_s"])
    watch.settled()
    time.sleep(request["window_s"])
    watch.stopping()
    context.close()
    return watch.sample()


async def bare(request: dict[str, Any]) -> Sample:
    from benchmarks.programs.bare_asyncio import start_all

    watch = _Watch(request)
    processes = await start_all(request["workers"], *SLEEPER)
    watch.started()
    await asyncio.sleep(request["settle_s"])
    watch.settled()
    await asyncio.sleep(request["window_s"])
    watch.stopping()
    for process in processes:
        process.terminate()
    for process in processes:
        await process.wait()
    return watch.sample()


# --- the comparison -------------------------------------------------------------------------------


def run_fresh(function: str, request: dict[str, Any], python: str = sys.executable) -> Sample:
    """In a process of its own, which has done it once with few workers: imports are not counted,
    and neither is the memory of the round before."""
    with Resident(f"scale:{function}", python=python) as resident:
        resident.ask({**request, "workers": 2, "settle_s": 0.0, "window_s": 0.0})
        return resident.ask(request)


def _cases(setup: Setup) -> Iterator[Case]:
    workers = 128 if setup.quick else 1024
    request = {
        "workers": workers,
        "settle_s": 1.0,
        "window_s": 1.0 if setup.quick else 3.0,
        "log_dir": str(setup.scratch / "scale"),
    }
    candidates = [
        Candidate(LIMIT, partial(run_fresh, "bare", request)),
        Candidate(SUBJECT, partial(run_fresh, "supervised", request)),
    ]
    with_report = partial(run_fresh, "supervised", {**request, "report": True})
    candidates.append(Candidate(WITH_REPORT, with_report, rounds=2))
    for memory in setup.memory_folder("scale"):
        in_memory = {**request, "log_dir": memory}
        candidates.append(
            Candidate(IN_MEMORY, partial(run_fresh, "supervised", in_memory), rounds=2)
        )
    if setup.peers.torch_python is not None:
        torch = partial(run_fresh, "torch", request, setup.peers.torch_python)
        candidates.append(Candidate("torch", torch, rounds=1))
    yield Case(
        name=f"{workers:,} teed workers",
        metrics=[START, STOP, MEMORY, _THREADS, _DESCRIPTORS, _CPU],
        candidates=candidates,
        limit=LIMIT,
        goals=[
            Goal(START.name, "<=", 700),
            Goal(_DESCRIPTORS.name, "<=", 4),
            Goal(MEMORY.name, "<=", 38),
            Goal(STOP.name, "<=", 1.5, against=LIMIT),
        ],
        rounds=setup.rounds(4),
        warmups=0,
    )


TOPIC = Topic(
    name="scale",
    title="1,024 teed workers that sleep: until start_processes() has returned, while nothing "
    "happens, and until close() has returned; memory, threads and descriptors with those of the "
    "supervisor's helpers",
    limit="an asyncio program that starts as many by create_subprocess_exec, without logs, and "
    "ends them by SIGTERM",
    cases=_cases,
    plots=(START.name, STOP.name, MEMORY.name, _THREADS.name, _DESCRIPTORS.name),
    notes=(
        "Like the others, asupervise leaves log files and nothing else; one row shows what "
        "events.jsonl and report.html take besides.",
    ),
)
