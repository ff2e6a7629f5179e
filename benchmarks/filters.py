"""Lines that match a filter, into a file of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import SUBJECT, Candidate, Case, Goal, Metric, Sample
from benchmarks.processes import PROGRAMS, Resident
from benchmarks.topics import Setup, Topic

_GREP = "grep, finished files"
_LIMIT = "workers, then grep"
_WORKERS = "workers alone"
_RANKS = 8
_ONE_IN = 1000
_WORD = "MATCH"
_RATE = Metric("rate", "MB/s", 0)


# --- inside the candidates' processes -------------------------------------------------------------


def _worker(request: dict[str, Any]) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", str(PROGRAMS / "blast.py"), request["data"])


def _sample(request: dict[str, Any], start_ns: int, matches: str) -> Sample:
    """The rate, once it is clear that each line that matches was found, and no other."""
    sample = _rate(request, start_ns)
    with open(matches, "rb") as found:
        lines = found.read().splitlines()
    shutil.rmtree(request["log_dir"])
    right = sum(_WORD.encode() in line for line in lines)
    if not right == len(lines) == request["matches"]:
        raise RuntimeError(f"{right} of {request['matches']} matches in {len(lines)} lines")
    return sample


def _rate(request: dict[str, Any], start_ns: int) -> Sample:
    seconds = (time.monotonic_ns() - start_ns) / 1e9
    return {_RATE.name: _RANKS * os.path.getsize(request["data"]) / 1e6 / seconds}


def _found(request: dict[str, Any]) -> str:
    return str(next(Path(request["log_dir"]).rglob("filtered_stdout.log")))


async def supervised(request: dict[str, Any]) -> Sample:
    # Imported here and below: the others run without.
    from asupervise import DefaultLogsSpecs, Std, start_processes

    ranks = range(_RANKS)
    logs = DefaultLogsSpecs(request["log_dir"], tee=Std.OUT)
    start_ns = time.monotonic_ns()
    async with start_processes(
        *("bench", _worker(request), {rank: () for rank in ranks}, {rank: {} for rank in ranks}),
        logs,
        duplicate_stdout_filters=[_WORD],
    ) as ctx:
        await ctx.wait()
        return _sample(request, start_ns, _found(request))


def torch(request: dict[str, Any]) -> Sample:
    from benchmarks import torch_api

    python, *words = _worker(request)
    args = {rank: words for rank in range(_RANKS)}
    start_ns = time.monotonic_ns()
    context = torch_api.start(python, args, request["log_dir"], tee=1, filters=[_WORD])
    torch_api.wait(context)
    return _sample(request, start_ns, _found(request))


def workers_then_grep(request: dict[str, Any]) -> Sample:
    start_ns = time.monotonic_ns()
    folder, paths = _write_files(request)
    return _sample(request, start_ns, _grep(folder, paths))


def workers_alone(request: dict[str, Any]) -> Sample:
    start_ns = time.monotonic_ns()
    _write_files(request)
    return _rate(request, start_ns)


def _write_files(request: dict[str, Any]) -> tuple[Path, list[str]]:
    folder = Path(request["log_dir"])
    folder.mkdir(exist_ok=True)
    paths = [str(folder / f"{rank}.log") for rank in range(_RANKS)]
    workers = []
    for path in paths:
        with open(path, "wb") as log:
            workers.append(subprocess.Popen(_worker(request), stdin=subprocess.DEVNULL, stdout=log))
    for worker in workers:
        worker.wait()
    return folder, paths


def grep(request: dict[str, Any]) -> Sample:
    folder = Path(request["log_dir"])
    folder.mkdir(exist_ok=True)
    start_ns = time.monotonic_ns()
    return _sample(request, start_ns, _grep(folder, [request["data"]] * _RANKS))


def _grep(folder: Path, paths: list[str]) -> str:
    matches = folder / "matches"
    with open(matches, "wb") as out:
        subprocess.run(["grep", "-hF", _WORD, *paths], stdout=out, check=True)
    return str(matches)


# --- the comparison -------------------------------------------------------------------------------


def _cases(setup: Setup) -> Iterator[Case]:
    lines = 20_000 if setup.quick else 200_000
    data = _write_lines(setup.scratch / "lines-to-filter", lines)
    request = {
        "data": str(data),
        "matches": _RANKS * lines // _ONE_IN,
        "log_dir": str(setup.scratch / "filters"),
    }
    functions = [
        (_LIMIT, "workers_then_grep"),
        (_WORKERS, "workers_alone"),
        (_GREP, "grep"),
        (SUBJECT, "supervised"),
    ]
    with ExitStack() as stack:
        candidates = [
            Candidate(
                name, partial(stack.enter_context(Resident(f"filters:{function}")).ask, request)
            )
            for name, function in functions
        ]
        if (python := setup.peers.torch_python) is not None:
            torch = stack.enter_context(Resident("filters:torch", python=python))
            candidates.append(Candidate("torch", partial(torch.ask, request), rounds=3))
        yield Case(
            name=f"{_RANKS} ranks",
            metrics=[_RATE],
            candidates=candidates,
            limit=_LIMIT,
            goals=[Goal(_RATE.name, ">=", 0.5, against=_LIMIT)],
            rounds=setup.rounds(7),
        )


def _write_lines(path: Path, lines: int) -> Path:
    with open(path, "wb") as file:
        for number in range(lines):
            word = _WORD if number % _ONE_IN == _ONE_IN // 2 else "line."
            file.write(b"%08d %s %s\n" % (number, word.encode(), b"x" * 84))
    return path


TOPIC = Topic(
    name="filters",
    title=f"{_RANKS} ranks write 200,000 lines of 100 bytes, one in {_ONE_IN:,} of which matches "
    "the filter: bytes a second from their start until all that match are in the filtered file, "
    "and all lines on the console",
    limit="the same workers write to files, and grep -F reads these when they are finished; "
    "nothing is shown. grep over finished files, without workers, is what reading costs alone",
    cases=_cases,
    plots=(_RATE.name,),
    notes=(
        "Each run checks that the filtered file holds each line that matches, and no other.",
        "grep alone is no limit that a job with live workers could come near: the writing alone "
        "takes longer, as the row `workers alone` shows.",
    ),
)
