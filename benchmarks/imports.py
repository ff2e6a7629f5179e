"""What it costs to import us, and to say --help and --version."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.measure import SUBJECT, Candidate, Case, Goal, MeasureError, Metric, Sample
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
# What only some runs need: binding, stacks, function workers, the command line.
_SUPERFLUOUS = {
    *(f"{SUBJECT}.{name}" for name in ("binding", "topology", "cpus", "stacks", "hang", "cli")),
    *("argparse", "multiprocessing", "pickle", "pynvml", "torch"),
}
_IN_A_WORKER = "from asupervise import record"


def _statement(statement: str, python: str = sys.executable) -> Sample:
    finished = run_command([python, "-c", statement + _SAY_PEAK], output=True)
    return {_WALL.name: finished.wall_ms, _PEAK.name: int(finished.output) / 1024}


def _command(argv: Sequence[str]) -> Sample:
    return {_WALL.name: run_command(argv).wall_ms}


def _cases(setup: Setup) -> Iterator[Case]:
    rounds = setup.rounds(17)
    floor = Candidate(_PYTHON, partial(_statement, "import sys"))
    limit = Candidate(_ASYNCIO, partial(_statement, "import asyncio"))
    yield Case(
        name="import",
        group="import",
        metrics=[_WALL, _PEAK],
        candidates=[floor, limit, *_imports(setup)],
        limit=_ASYNCIO,
        goals=[Goal(_WALL.name, "<=", 1.6, against=_ASYNCIO)],
        rounds=rounds,
        check=_check,
    )
    for flag in ("--help", "--version"):
        argv = [sys.executable, "-m", "asupervise", flag]
        yield Case(
            name=flag,
            group="commands that start nothing",
            metrics=[_WALL],
            candidates=[
                floor,
                limit,
                Candidate(SUBJECT, partial(_command, argv)),
                *_peers(flag, setup),
            ],
            limit=_ASYNCIO,
            rounds=rounds,
        )


def _check() -> str:
    """Whether nothing is imported that a run of programs does not need."""
    say = f"import sys; {_USED}; print(*sys.modules)"
    modules = set(run_command([sys.executable, "-c", say], output=True).output.decode().split())
    if superfluous := modules & _SUPERFLUOUS:
        raise MeasureError(f"imported for nothing: {', '.join(sorted(superfluous))}")
    ours = sum(name.startswith(SUBJECT) for name in modules)
    return f"{len(modules)} modules, {ours} of them ours; none that a run of programs does not need"


def _imports(setup: Setup) -> Iterator[Candidate]:
    # The row that the goal is for is the one that uses something: the harder one.
    yield Candidate(SUBJECT, partial(_statement, _USED))
    yield Candidate("import asupervise", partial(_statement, "import asupervise"))
    yield Candidate("import record", partial(_statement, _IN_A_WORKER))
    if setup.peers.torch_python is not None:
        statement = "import torch.distributed.run"
        run = partial(_statement, statement, setup.peers.torch_python)
        yield Candidate(statement, run, rounds=3, cold=True)


def _peers(flag: str, setup: Setup) -> Iterator[Candidate]:
    for name in ("torchrun", "mpirun", "parallel", "honcho"):
        # torchrun knows no --version.
        if name in setup.peers.paths and (name, flag) != ("torchrun", "--version"):
            as_root = ["--allow-run-as-root"] if name == "mpirun" else []
            argv = [str(setup.peers.paths[name]), *as_root, flag]
            yield Candidate(name, partial(_command, argv), rounds=3, cold=True)


TOPIC = Topic(
    name="imports",
    title="python -c 'import ...' and commands that start nothing, from launch to end",
    limit="`import asyncio`, without which there is no asyncio program; `python alone` is what "
    "the interpreter takes in any case",
    cases=_cases,
    plots=(_WALL.name, _PEAK.name),
)
