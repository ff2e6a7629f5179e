"""A whole command: from its launch to its end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

from benchmarks.measure import SUBJECT, Candidate, Case, Goal, Metric, Sample
from benchmarks.peers import Command, our_command
from benchmarks.processes import PROGRAMS, run_command
from benchmarks.topics import Setup, Topic

_LIMIT = "bare asyncio"
_WALL = Metric("wall", "ms", 1)
_PROGRAM = ("/bin/true",)
# Rounds, and seconds until a run counts as hung: Open MPI 4.1 now and then does not end after 32
# or more tiny workers, and has done what it does in a tenth of that time.
_PEERS = {"torchrun": (3, 30.0), "mpirun": (7, 2.0), "parallel": (5, 10.0), "honcho": (4, 10.0)}


def _run(command: Command, timeout_s: float = 30.0) -> Sample:
    return {_WALL.name: run_command(command.argv, env=command.env, timeout_s=timeout_s).wall_ms}


def _candidates(workers: int, setup: Setup) -> Iterator[Candidate]:
    """A further launcher is one more line here, or in `_PEERS`."""
    bare = Command([sys.executable, str(PROGRAMS / "bare_asyncio.py"), str(workers), *_PROGRAM])
    yield Candidate(_LIMIT, partial(_run, bare))
    yield Candidate(SUBJECT, partial(_run, our_command(workers, _PROGRAM)))
    for name, command in setup.peers.commands(tuple(_PEERS), workers, _PROGRAM):
        rounds, timeout_s = _PEERS[name]
        run = partial(_run, command, timeout_s)
        yield Candidate(name, run, rounds, cold=name == "torchrun", give_up_after=rounds)


def _goals(workers: int) -> Iterator[Goal]:
    if workers in (1, 128):
        yield Goal(_WALL.name, "<=", 1.5 if workers == 1 else 1.3, against=_LIMIT)
    if workers == 1:
        yield Goal(_WALL.name, ">=", 17, against="torchrun", inverse=True)
    for name in ("parallel", "honcho", *(["mpirun"] if workers == 128 else [])):
        yield Goal(_WALL.name, "<=", 1, against=name)


def _cases(setup: Setup) -> Iterator[Case]:
    for workers in (1, 8, 32, 128):
        yield Case(
            name=f"N = {workers}",
            size=workers,
            metrics=[_WALL],
            candidates=list(_candidates(workers, setup)),
            limit=_LIMIT,
            goals=list(_goals(workers)),
            rounds=setup.rounds(11),
        )


TOPIC = Topic(
    name="launch_cli",
    title="a command that starts N x /bin/true, from its launch to its end",
    limit="an asyncio program that starts them with create_subprocess_exec, in new sessions, and "
    "awaits them by pidfd: the interpreter's start and `import asyncio` are the most of it",
    cases=_cases,
    plots=(_WALL.name,),
    notes=("honcho ends the other workers as soon as one has ended.",),
)
