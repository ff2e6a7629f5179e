"""What it costs to import us, and to say --help and --version."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.measure import SUBJECT, Candidate, Case, Goal, Metric, Sample
from benchmarks.processes import run_command
from benchmarks.topics import Setup, Topic

_PYTHON = "python alone"
_ASYNCIO = "import asyncio"

_WALL = Metric("wall", "ms", 1)
_PEAK = Metric("peak memory", "MiB", 1)

# Asked from inside: to who reaps it, a child's peak is never below what its parent had when it
# started it (getrusage(2) keeps the figure over execve).
_SAY_PEAK = "; print(next(l.split()[1] for l in open('/proc/self/status') if l[:5] == 'VmHWM'))"
# `import asupervise` alone imports next to nothing: names are resolved at first use.
_USED = "import asupervise; asupervise.start_processes"
_IN_A_WORKER = "from asupervise import record"


def _statement(statement: str, python: str = sys.executable) -> Sample:
    finished = run_command([python, "-c", statement + _SAY_PEAK], output=True)
    return {_WALL.name: finished.wall_ms, _PEAK.name: int(finished.output) / 1024}


def _command(argv: Sequence[str]) -> Sample:
    return {_WALL.name: run_command(argv).wall_ms}


def _cases(setup: Setup) -> Iterator[Case]:
    rounds = setup.rounds(21)
    floor = Candidate(_PYTHON, partial(_statement, "import sys"))
    limit = Candidate(_ASYNCIO, partial(_statement, "import asyncio"))
    yield Case(
        name="import",
        metrics=[_WALL, _PEAK],
        candidates=[floor, limit, *_imports(setup)],
        limit=_ASYNCIO,
        goals=[Goal(_WALL.name, "<=", 1.6, against=_ASYNCIO)],
        rounds=rounds,
    )
    for flag in ("--help", "--version"):
        argv = [sys.executable, "-m", "asupervise", flag]
        yield Case(
            name=flag,
            metrics=[_WALL],
            candidates=[floor, limit, Candidate(SUBJECT, partial(_command, argv))],
            limit=_ASYNCIO,
            rounds=rounds,
        )


def _imports(setup: Setup) -> Iterator[Candidate]:
    # The row that the goal is for is the one that uses something: the harder one.
    yield Candidate(SUBJECT, partial(_statement, _USED))
    yield Candidate("import asupervise", partial(_statement, "import asupervise"))
    yield Candidate("import record", partial(_statement, _IN_A_WORKER))
    if setup.torch_python is not None:
        statement = "import torch.distributed.run"
        run = partial(_statement, statement, setup.torch_python)
        yield Candidate("import torch's run", run, rounds=3)
    elif setup.torchrun is not None:
        setup.left_out.add("import torch.distributed.run: no python beside torchrun")


TOPIC = Topic(
    name="imports",
    title="python -c 'import ...' and commands that start nothing, from launch to end",
    limit="`import asyncio`, without which there is no asyncio program; `python alone` is what "
    "the interpreter takes in any case",
    cases=_cases,
)
