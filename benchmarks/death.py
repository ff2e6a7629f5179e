"""One rank dies: how soon it is known, and how soon all others are gone."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import SUBJECT, Candidate, Case, Goal, Metric, Sample
from benchmarks.processes import PROGRAMS, Resident, ms
from benchmarks.topics import Setup, Topic

_LIMIT = "blocking waitpid"
_VICTIM = 3
# Long enough for 64 workers to be there, and for the supervisor to have gone to sleep.
_LIFE_S = 0.3

_KNOWN = Metric("known", "ms")
_REAPED = Metric("all reaped", "ms")
_RETURNED = Metric("returned", "ms")


# --- inside the candidates' processes -------------------------------------------------------------


def _argv(request: Mapping[str, Any], rank: int) -> tuple[str, ...]:
    if rank != _VICTIM:
        return ("/bin/sleep", "60")
    die = str(PROGRAMS / "die.py")
    return (sys.executable, "-I", "-S", die, str(_LIFE_S), request["stamp"])


def _since(request: Mapping[str, Any], known: int, reaped: int, returned: int) -> Sample:
    killed_ns = int(Path(request["stamp"]).read_bytes())
    return {
        _KNOWN.name: ms(killed_ns, known),
        _REAPED.name: ms(killed_ns, reaped),
        _RETURNED.name: ms(killed_ns, returned),
    }


async def supervised(request: dict[str, Any]) -> Sample:
    # Imported here: the limit runs without.
    from asupervise import start_processes

    ranks = range(request["workers"])
    # The program of all is `env`, which becomes what its arguments say: ranks differ.
    async with start_processes(
        "bench", "/usr/bin/env", {r: _argv(request, r) for r in ranks}, {r: {} for r in ranks}
    ) as ctx:
        result = await ctx.wait()
        returned_ns = time.monotonic_ns()
    if result is None or len(result.failures) != request["workers"]:
        raise RuntimeError("not every rank is listed as ended")
    observed = {r: failure.observed_monotonic_ns or 0 for r, failure in result.failures.items()}
    return _since(request, observed[_VICTIM], max(observed.values()), returned_ns)


def blocking_waitpid(request: dict[str, Any]) -> Sample:
    pids = []
    for rank in range(request["workers"]):
        argv = ("env", *_argv(request, rank))
        pids.append(os.posix_spawn("/usr/bin/env", argv, os.environ, setsid=True))
    died, _ = os.wait()
    known_ns = time.monotonic_ns()
    for pid in pids:
        if pid != died:
            os.killpg(pid, signal.SIGTERM)
    for pid in pids:
        if pid != died:
            os.waitpid(pid, 0)
    reaped_ns = time.monotonic_ns()
    return _since(request, known_ns, reaped_ns, reaped_ns)


# --- the comparison -------------------------------------------------------------------------------


def _cases(setup: Setup) -> Iterator[Case]:
    with ExitStack() as stack:
        limit = stack.enter_context(Resident("death:blocking_waitpid"))
        ours = stack.enter_context(Resident("death:supervised"))
        for workers in (8, 64):
            request = {"workers": workers, "stamp": str(setup.scratch / "killed_at")}
            yield Case(
                name=f"{workers} ranks",
                metrics=[_KNOWN, _REAPED, _RETURNED],
                candidates=[
                    Candidate(_LIMIT, partial(limit.ask, request)),
                    Candidate(SUBJECT, partial(ours.ask, request)),
                ],
                limit=_LIMIT,
                goals=[
                    Goal(_KNOWN.name, "<=", 2, against=_LIMIT),
                    Goal(_KNOWN.name, "<=", 1.5, statistic="p90"),
                    Goal(_REAPED.name, "<=", 1.5, against=_LIMIT),
                ],
                rounds=setup.rounds(30, quick=4),
                warmups=2,
            )


TOPIC = Topic(
    name="death",
    title=f"rank {_VICTIM} sends itself SIGKILL: until its death is known, until all others have "
    "got SIGTERM and are reaped, until wait() has returned",
    limit="a program that does nothing but block in waitpid: the kernel's part, which takes a "
    "process apart before it says that it has ended",
    cases=_cases,
)
