"""One call in a warm process: from the first spawn to the result."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from benchmarks.measure import SUBJECT, Candidate, Case, Goal, Metric, Sample
from benchmarks.processes import Resident, ms
from benchmarks.topics import Setup, Topic

_BARE = "bare asyncio"
_WALL = Metric("wall", "ms", 2)
_SIZES = (1, 8, 32, 128, 1024)


# --- inside the candidates' processes -------------------------------------------------------------


async def supervised(request: dict[str, Any]) -> Sample:
    # Imported here and below: the others run without.
    from asupervise import DefaultLogsSpecs, Std, start_processes

    ranks = range(request["workers"])
    logs = DefaultLogsSpecs(request["log_dir"], tee=Std(request["tee"]))
    start_ns = time.monotonic_ns()
    async with start_processes(
        "bench", "/bin/true", {rank: () for rank in ranks}, {rank: {} for rank in ranks}, logs
    ) as ctx:
        result = await ctx.wait()
    end_ns = time.monotonic_ns()
    if result is None or result.is_failed():
        raise RuntimeError("a worker has failed")
    return {_WALL.name: ms(start_ns, end_ns)}


async def bare(request: dict[str, Any]) -> Sample:
    from benchmarks.programs.bare_asyncio import run_all

    start_ns = time.monotonic_ns()
    await run_all(request["workers"], "/bin/true")
    return {_WALL.name: ms(start_ns, time.monotonic_ns())}


def posix_spawn(request: dict[str, Any]) -> Sample:
    start_ns = time.monotonic_ns()
    pids = [
        os.posix_spawn("/bin/true", ["true"], os.environ, setsid=True)
        for _ in range(request["workers"])
    ]
    for pid in pids:
        os.waitpid(pid, 0)
    return {_WALL.name: ms(start_ns, time.monotonic_ns())}


# --- the comparison -------------------------------------------------------------------------------


def _cases(setup: Setup) -> Iterator[Case]:
    with ExitStack() as stack:
        limit, spawn, ours = (
            stack.enter_context(Resident(f"launch_api:{function}"))
            for function in ("bare", "posix_spawn", "supervised")
        )
        for tee in (0, 3):
            for workers in _SIZES:
                request = {"workers": workers, "tee": tee, "log_dir": str(setup.scratch)}
                yield Case(
                    name=f"N = {workers}, tee {'on' if tee else 'off'}",
                    metrics=[_WALL],
                    candidates=[
                        Candidate(_BARE, partial(limit.ask, request)),
                        Candidate("os.posix_spawn", partial(spawn.ask, request)),
                        Candidate(SUBJECT, partial(ours.ask, request)),
                    ],
                    limit=_BARE,
                    goals=[Goal(_WALL.name, "<=", 2 if tee else 1.3, against=_BARE)],
                    rounds=setup.rounds(25 if workers < 1024 else 7),
                    warmups=2,
                )


TOPIC = Topic(
    name="launch_api",
    title="start_processes() of N x /bin/true in a warm process, until the result is there",
    limit="create_subprocess_exec in new sessions, awaited by pidfd; os.posix_spawn and waitpid "
    "show what the kernel's part of that is",
    cases=_cases,
)
