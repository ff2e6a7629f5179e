"""One call in a warm process: from the first spawn to the result."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from benchmarks.measure import SUBJECT, Candidate, Case, Goal, Metric, Sample
from benchmarks.processes import Resident, ms
from benchmarks.topics import IN_MEMORY, WITH_REPORT, Setup, Topic, cleaned_up

_BARE = "bare asyncio"
_BARE_FILES = "bare asyncio, to files"
_SPAWN = "os.posix_spawn"
_TORCH = "torch"
_TORCH_AS_SHIPPED = "torch, polling once a second"
_WALL = Metric("wall", "ms", 2)
_SIZES = (1, 8, 32, 128, 1024)
# Where output goes: to our console, to files, or to files and from there to our console.
_OUTPUTS = {"console": {}, "redirect": {"redirects": 3}, "tee": {"tee": 3}}


# --- inside the candidates' processes -------------------------------------------------------------


async def supervised(request: dict[str, Any]) -> Sample:
    # Imported here and below: the others run without.
    from asupervise import DefaultLogsSpecs, Std, start_processes

    ranks = range(request["workers"])
    redirects, tee = (Std(request["masks"].get(name, 0)) for name in ("redirects", "tee"))
    logs = DefaultLogsSpecs(request["log_dir"], redirects=redirects, tee=tee)
    start_ns = time.monotonic_ns()
    async with start_processes(
        *("bench", "/bin/true", {rank: () for rank in ranks}, {rank: {} for rank in ranks}, logs),
        report=request.get("report", False),
    ) as ctx:
        result = await ctx.wait()
    end_ns = time.monotonic_ns()
    if result.is_failed():
        raise RuntimeError("a worker has failed")
    return _sample(start_ns, end_ns, request)


def torch(request: dict[str, Any]) -> Sample:
    from benchmarks import torch_api

    args = {rank: () for rank in range(request["workers"])}
    start_ns = time.monotonic_ns()
    context = torch_api.start("/bin/true", args, request["log_dir"], **request["masks"])
    result = torch_api.wait(context, request.get("period_s", torch_api.SHORT_PERIOD_S))
    end_ns = time.monotonic_ns()
    if result is None or result.is_failed():
        raise RuntimeError("a worker has failed")
    return _sample(start_ns, end_ns, request)


async def bare(request: dict[str, Any]) -> Sample:
    from benchmarks.programs.bare_asyncio import run_all

    files = os.path.join(request["log_dir"], f"bare-{time.monotonic_ns()}")
    folder = files if request.get("to_files") else None
    start_ns = time.monotonic_ns()
    await run_all(request["workers"], "/bin/true", folder=folder)
    return _sample(start_ns, time.monotonic_ns(), request)


def posix_spawn(request: dict[str, Any]) -> Sample:
    start_ns = time.monotonic_ns()
    pids = [
        os.posix_spawn("/bin/true", ["true"], os.environ, setsid=True)
        for _ in range(request["workers"])
    ]
    for pid in pids:
        os.waitpid(pid, 0)
    return _sample(start_ns, time.monotonic_ns(), request)


def _sample(start_ns: int, end_ns: int, request: dict[str, Any]) -> Sample:
    cleaned_up(request["log_dir"])
    return {_WALL.name: ms(start_ns, end_ns)}


# --- the comparison -------------------------------------------------------------------------------


def _cases(setup: Setup) -> Iterator[Case]:
    with ExitStack() as stack:

        def resident(function: str, python: str = sys.executable) -> Resident:
            return stack.enter_context(Resident(f"launch_api:{function}", python=python))

        residents = {
            _BARE: resident("bare"),
            _BARE_FILES: resident("bare"),
            _SPAWN: resident("posix_spawn"),
            SUBJECT: resident("supervised"),
        }
        if setup.peers.torch_python is not None:
            residents[_TORCH] = resident("torch", setup.peers.torch_python)
            residents[_TORCH_AS_SHIPPED] = residents[_TORCH]
        for output in _OUTPUTS:
            for workers in _SIZES:
                yield _case(setup, residents, output, workers)


def _case(setup: Setup, residents: dict[str, Resident], output: str, workers: int) -> Case:
    request = {
        "workers": workers,
        "masks": _OUTPUTS[output],
        "log_dir": str(setup.scratch / "launch_api"),
    }
    candidates = list(_candidates(residents, output, request))
    candidates.append(
        Candidate(WITH_REPORT, partial(residents[SUBJECT].ask, {**request, "report": True}))
    )
    if output != "console":
        for memory in setup.memory_folder("launch_api"):
            in_memory = {**request, "log_dir": memory}
            candidates.append(Candidate(IN_MEMORY, partial(residents[SUBJECT].ask, in_memory)))
    return Case(
        name=f"N = {workers}, {output}",
        group=f"output: {output}",
        size=workers,
        metrics=[_WALL],
        candidates=candidates,
        limit=_BARE,
        goals=list(_goals(output, workers)),
        rounds=setup.rounds(11 if workers < 1024 else 3),
        warmups=0 if workers == 1024 else 1 if setup.quick else 2,
        budget_s=12.0,
    )


def _candidates(
    residents: dict[str, Resident], output: str, request: dict[str, Any]
) -> Iterator[Candidate]:
    for name, resident in residents.items():
        if name == _BARE_FILES and output != "console":
            yield Candidate(name, partial(resident.ask, {**request, "to_files": True}))
        elif name == _TORCH_AS_SHIPPED and request["workers"] == 8:
            yield Candidate(name, partial(resident.ask, {**request, "period_s": 1.0}), rounds=2)
        elif name == _TORCH:
            few = 4 if request["workers"] < 1024 else 1
            yield Candidate(name, partial(resident.ask, request), rounds=few)
        elif name not in (_BARE_FILES, _TORCH_AS_SHIPPED):
            yield Candidate(name, partial(resident.ask, request))


def _goals(output: str, workers: int) -> Iterator[Goal]:
    yield Goal(_WALL.name, "<=", 1.3 if output == "console" else 2, against=_BARE)
    if output == "tee" and workers == 8:
        yield Goal(_WALL.name, ">=", 10, against=_TORCH, inverse=True)


TOPIC = Topic(
    name="launch_api",
    title="start_processes() of N x /bin/true in a warm process, until the result is there; "
    "output to the console, to files (redirect), or to files and the console (tee)",
    limit="create_subprocess_exec in new sessions, awaited by pidfd; os.posix_spawn and waitpid "
    "show what the kernel's part of that is, and the same to two new files a worker what files "
    "cost",
    cases=_cases,
    plots=(_WALL.name,),
    notes=(
        "torch looks at its workers once a second; here, and in the other topics, it is told to "
        "do so each millisecond, except where it says otherwise.",
        "Like the others, asupervise leaves log files and nothing else; one row shows what "
        "events.jsonl and report.html take besides.",
    ),
)
