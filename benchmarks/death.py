"""One rank dies: how soon it is known, and how soon all others are gone."""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import SUBJECT, Candidate, Case, Goal, MeasureError, Metric, Sample
from benchmarks.peers import Command, our_command
from benchmarks.processes import PROGRAMS, Resident, ms, running
from benchmarks.topics import Setup, Topic

_LIMIT = "blocking waitpid"
_VICTIM = 3
# Long enough for 64 workers to be there, and for the supervisor to have gone to sleep.
_LIFE_S = 0.3

_SIZES = (8, 64)
_START_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 10.0
# Rounds of each.
_PEERS = {"torchrun": 4, "mpirun": 4, "parallel": 5, "honcho": 4}

_KNOWN = Metric("known", "ms")
_REAPED = Metric("all reaped", "ms")
_RETURNED = Metric("returned", "ms")
_TOLD = Metric("first of the others told", "ms")
_GONE = Metric("all others gone", "ms")
_OVER = Metric("launcher over", "ms", 1)


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
    if len(result.failures) != request["workers"]:
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


def torch(request: dict[str, Any]) -> Sample:
    from benchmarks import torch_api

    args = {rank: _argv(request, rank) for rank in range(request["workers"])}
    context = torch_api.start("/usr/bin/env", args, request["log_dir"])
    known_ns = 0
    close = context.close

    def stamped_close(*args: Any) -> None:
        # The first thing that it does once it knows.
        nonlocal known_ns
        known_ns = known_ns or time.monotonic_ns()
        close(*args)

    context.close = stamped_close
    torch_api.wait(context, request["period_s"])
    returned_ns = time.monotonic_ns()
    return _since(request, known_ns, returned_ns, returned_ns)


# --- the comparison -------------------------------------------------------------------------------


def _cases(setup: Setup) -> Iterator[Case]:
    yield from _calls(setup)
    yield from _commands(setup)


def _calls(setup: Setup) -> Iterator[Case]:
    with ExitStack() as stack:
        limit = stack.enter_context(Resident("death:blocking_waitpid"))
        ours = stack.enter_context(Resident("death:supervised"))
        python = setup.peers.torch_python
        torch = stack.enter_context(Resident("death:torch", python=python)) if python else None
        for workers in _SIZES:
            request = {
                "workers": workers,
                "stamp": str(setup.scratch / "killed_at"),
                "log_dir": str(setup.scratch / "death"),
                "period_s": 1.0,
            }
            candidates = [
                Candidate(_LIMIT, partial(limit.ask, request)),
                Candidate(SUBJECT, partial(ours.ask, request)),
            ]
            if torch is not None:
                candidates.append(Candidate("torch", partial(torch.ask, request), rounds=3))
            yield Case(
                name=f"{workers} ranks",
                group="a call in a warm process",
                size=workers,
                metrics=[_KNOWN, _REAPED, _RETURNED],
                candidates=candidates,
                limit=_LIMIT,
                goals=[
                    Goal(_KNOWN.name, "<=", 2, against=_LIMIT),
                    Goal(_KNOWN.name, "<=", 1.5, statistic="p90"),
                    Goal(_REAPED.name, "<=", 1.5, against=_LIMIT),
                ],
                rounds=setup.rounds(10, quick=4),
                warmups=1,
            )


def _commands(setup: Setup) -> Iterator[Case]:
    for workers in _SIZES:
        folder = setup.scratch / f"death-{workers}"
        mortal = (sys.executable, "-S", "-m", "benchmarks.programs.mortal", str(folder))
        limit = [sys.executable, "-I", "-S", str(PROGRAMS / "waitpid_launcher.py"), str(workers)]
        commands = [
            (_LIMIT, Command([*limit, *mortal])),
            (SUBJECT, our_command(workers, mortal)),
            *setup.peers.commands(tuple(_PEERS), workers, mortal, all_or_nothing=True),
        ]
        yield Case(
            name=f"{workers} ranks, whole command",
            group="a whole command, seen by its workers",
            size=workers,
            metrics=[_TOLD, _GONE, _OVER],
            candidates=[
                Candidate(name, partial(_launch, command, folder, workers), _PEERS.get(name))
                for name, command in commands
            ],
            limit=_LIMIT,
            rounds=setup.rounds(3),
            warmups=0,
        )


def _launch(command: Command, folder: Path, workers: int) -> Sample:
    """Run a launcher whose rank `_VICTIM` dies, and see what becomes of the others."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with running(command.argv, env=command.env) as (process, _), ExitStack() as stack:
        pidfds = []
        for pid in [*_mourners(folder, workers - 1), process.pid]:
            pidfds.append(os.pidfd_open(pid))
            stack.callback(os.close, pidfds[-1])
        (folder / "go").touch()
        *gone_ns, over_ns = _ends(pidfds)
    killed_ns = int((folder / "killed_at").read_bytes())
    # Who got SIGKILL before it could write has told nothing.
    told_ns = [int(said) for path in folder.glob("told.*") if (said := path.read_bytes())]
    sample = {_GONE.name: ms(killed_ns, max(gone_ns)), _OVER.name: ms(killed_ns, over_ns)}
    if told_ns:
        sample[_TOLD.name] = ms(killed_ns, min(told_ns))
    return sample


def _mourners(folder: Path, count: int) -> list[int]:
    """The process ids of the others, once all are there."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while len(ready := [path.suffix for path in folder.glob("ready.*")]) < count:
        if time.monotonic() > deadline:
            raise MeasureError(f"{len(ready)} of {count} workers ready in {_START_TIMEOUT_S:g} s")
        time.sleep(0.01)
    return [int(suffix[1:]) for suffix in ready]


def _ends(pidfds: Sequence[int]) -> list[int]:
    """When each process ended."""
    poll = select.poll()
    for pidfd in pidfds:
        poll.register(pidfd, select.POLLIN)
    ended: dict[int, int] = {}
    while len(ended) < len(pidfds):
        ready = poll.poll(_END_TIMEOUT_S * 1000)
        now_ns = time.monotonic_ns()
        if not ready:
            raise MeasureError(f"not over {_END_TIMEOUT_S:g} s after a rank's death")
        for pidfd, _ in ready:
            ended[pidfd] = now_ns
            poll.unregister(pidfd)
    return [ended[pidfd] for pidfd in pidfds]


TOPIC = Topic(
    name="death",
    title=f"rank {_VICTIM} sends itself SIGKILL: until its death is known, until all others have "
    "got SIGTERM and are reaped, until wait() has returned",
    limit="a program that does nothing but block in waitpid: the kernel's part, which takes a "
    "process apart before it says that it has ended",
    cases=_cases,
    plots=(_KNOWN.name, _REAPED.name, _TOLD.name, _GONE.name),
    notes=(
        "torch looks at its workers once a second, as shipped.",
        "Of a whole command the workers see no more than its first SIGTERM, and their own ends. "
        "They are Python programs, which take longer to end than `sleep` does.",
        "parallel runs with --halt now,fail=1; without it a failure ends nobody.",
    ),
)
