"""A whole command: from its launch to its end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.measure import SUBJECT, Candidate, Case, Goal, Metric, Sample
from benchmarks.processes import PROGRAMS, run_command
from benchmarks.topics import Setup, Topic

_LIMIT = "bare asyncio"
_WALL = Metric("wall", "ms", 1)


def _run(argv: Sequence[str]) -> Sample:
    return {_WALL.name: run_command(argv).wall_ms}


def _candidates(workers: int, setup: Setup) -> Iterator[Candidate]:
    """A further launcher is one more line here."""
    count = str(workers)
    commands = {
        _LIMIT: [sys.executable, str(PROGRAMS / "bare_asyncio.py"), count, "/bin/true"],
        SUBJECT: [
            *(sys.executable, "-m", "asupervise"),
            *("--no-python", "--nproc-per-node", count, "/bin/true"),
        ],
    }
    for name, argv in commands.items():
        yield Candidate(name, partial(_run, argv))
    if workers == 1 and setup.torchrun is not None:
        argv = [str(setup.torchrun), "--no-python", "--nproc-per-node", count, "/bin/true"]
        yield Candidate("torchrun", partial(_run, argv), rounds=5)


def _goals(workers: int) -> list[Goal]:
    if workers == 1:
        return [
            Goal(_WALL.name, "<=", 1.5, against=_LIMIT),
            Goal(_WALL.name, ">=", 17, against="torchrun", inverse=True),
        ]
    return [Goal(_WALL.name, "<=", 1.3, against=_LIMIT)] if workers == 128 else []


def _cases(setup: Setup) -> Iterator[Case]:
    for workers in (1, 8, 32, 128):
        yield Case(
            name=f"N = {workers}",
            metrics=[_WALL],
            candidates=list(_candidates(workers, setup)),
            limit=_LIMIT,
            goals=_goals(workers),
            rounds=setup.rounds(21 if workers < 128 else 15),
            warmups=1,
        )


TOPIC = Topic(
    name="launch_cli",
    title="a command that starts N x /bin/true, from its launch to its end",
    limit="an asyncio program that starts them with create_subprocess_exec, in new sessions, and "
    "awaits them by pidfd: the interpreter's start and `import asyncio` are the most of it",
    cases=_cases,
)
