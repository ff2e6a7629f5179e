"""Log lines from the workers' files to the console: how many bytes a second, and are all there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import complete
from benchmarks.measure import SUBJECT, Candidate, Case, Goal, MeasureError, Metric, Sample
from benchmarks.peers import Command, our_command
from benchmarks.processes import PROGRAMS, Resident, drained_pipe, run_command
from benchmarks.topics import Setup, Topic

_LIMIT = "block prefixer"
_WHOLE = f"{SUBJECT}, whole command"
_ROUNDS = {"torch": 3}
# honcho gets a quarter of the lines.
_FEWER = 4
_RATE = Metric("rate", "MB/s", 1)
_LINE_BYTES = 100
_BLOCK_BYTES = 256 * 1024
_PREFIX = "[bench{rank}]:"
_LINE = re.compile(rb"\[bench(\d+)\]:(\d{8}) x{90}\n")


# --- inside the candidates' processes -------------------------------------------------------------


def _worker(request: dict[str, Any]) -> tuple[str, ...]:
    times = str(request.get("times", 1))
    return (sys.executable, "-I", "-S", str(PROGRAMS / "blast.py"), request["data"], times)


def _rate(request: dict[str, Any], start_ns: int) -> Sample:
    size = request["workers"] * os.path.getsize(request["data"]) * request.get("times", 1)
    return {_RATE.name: size / 1e6 / ((time.monotonic_ns() - start_ns) / 1e9)}


async def supervised(request: dict[str, Any]) -> Sample:
    # Imported here: the limit runs without.
    from asupervise import DefaultLogsSpecs, Std, start_processes

    ranks = range(request["workers"])
    logs = DefaultLogsSpecs(tee=Std.OUT)
    start_ns = time.monotonic_ns()
    async with start_processes(
        "bench", _worker(request), {rank: () for rank in ranks}, {rank: {} for rank in ranks}, logs
    ) as ctx:
        result = await ctx.wait()
        sample = _rate(request, start_ns)
    if result.is_failed():
        raise RuntimeError("a worker has failed")
    return sample


def torch(request: dict[str, Any]) -> Sample:
    from benchmarks import torch_api

    python, *words = _worker(request)
    args = {rank: words for rank in range(request["workers"])}
    start_ns = time.monotonic_ns()
    context = torch_api.start(python, args, request["log_dir"], tee=1)
    torch_api.wait(context)
    sample = _rate(request, start_ns)
    shutil.rmtree(request["log_dir"], ignore_errors=True)
    return sample


def block_prefixer(request: dict[str, Any]) -> Sample:
    """Files that are still being written, a block at a time, with a nap where there is nothing."""
    folder = Path(request["folder"])
    workers, followers = [], []
    start_ns = time.monotonic_ns()
    for rank in range(request["workers"]):
        path = folder / f"{rank}.log"
        with open(path, "wb") as log:
            workers.append(subprocess.Popen(_worker(request), stdin=subprocess.DEVNULL, stdout=log))
        followers.append(_Follower(path, _PREFIX.format(rank=rank).encode()))
    running = True
    while running:
        # Asked before the files are read: what was written before the last exit is then shown.
        running = any([worker.poll() is None for worker in workers])
        while any([follower.show_block() for follower in followers]):
            pass
        if running:
            time.sleep(0.001)
    sample = _rate(request, start_ns)
    for follower in followers:
        follower.remove()
    return sample


class _Follower:
    def __init__(self, path: Path, prefix: bytes) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY)
        self._prefix = prefix
        self._held = b""

    def show_block(self) -> bool:
        block = os.read(self._fd, _BLOCK_BYTES)
        if not block:
            return False
        end = block.rfind(b"\n") + 1
        if end:
            self._show(block[:end])
            self._held = b""
        self._held += block[end:]
        return True

    def _show(self, lines: bytes) -> None:
        # One copy for the cut and one for the prefixes; the kernel puts the rest together.
        marked = lines.replace(b"\n", b"\n" + self._prefix)
        parts = (self._prefix, self._held, memoryview(marked)[: -len(self._prefix)])
        if os.writev(1, parts) != sum(map(len, parts)):
            raise RuntimeError("written in part only")

    def remove(self) -> None:
        os.close(self._fd)
        self._path.unlink()


# --- the comparison -------------------------------------------------------------------------------


def _cases(setup: Setup) -> Iterator[Case]:
    lines = 20_000 if setup.quick else 200_000
    data = write_lines(setup.scratch / "lines", lines)
    few = write_lines(setup.scratch / "few-lines", lines // _FEWER)
    for to_pipe in (False, True):
        with ExitStack() as stack:
            residents = dict(_residents(setup, stack, to_pipe))
            sink = stack.enter_context(drained_pipe()) if to_pipe else subprocess.DEVNULL
            for workers in (1, 4, 8):
                request = {
                    "workers": workers,
                    "data": str(data),
                    "folder": str(setup.scratch),
                    "log_dir": str(setup.scratch / "tee"),
                }
                check = partial(_check, request, setup.scratch / "shown", lines)
                yield Case(
                    name=f"N = {workers}, {'pipe' if to_pipe else '/dev/null'}",
                    group=f"to {'a pipe' if to_pipe else '/dev/null'}",
                    size=workers,
                    metrics=[_RATE],
                    candidates=[
                        *(
                            Candidate(name, partial(resident.ask, request), _ROUNDS.get(name))
                            for name, resident in residents.items()
                        ),
                        *_commands(setup, workers, data, few, sink),
                    ],
                    limit=_LIMIT,
                    goals=[Goal(_RATE.name, ">=", 0.85, against=_LIMIT)],
                    rounds=setup.rounds(3),
                    check=check if to_pipe else None,
                )
    yield from complete.cases(setup)


def write_lines(path: Path, lines: int) -> Path:
    path.write_bytes(b"".join(b"%08d %s\n" % (i, b"x" * (_LINE_BYTES - 10)) for i in range(lines)))
    return path


def _residents(setup: Setup, stack: ExitStack, to_pipe: bool) -> Iterator[tuple[str, Resident]]:
    functions = [
        (_LIMIT, "block_prefixer", sys.executable),
        (SUBJECT, "supervised", sys.executable),
    ]
    if setup.peers.torch_python is not None:
        functions.append(("torch", "torch", setup.peers.torch_python))
    for name, function, python in functions:
        stdout = stack.enter_context(drained_pipe()) if to_pipe else subprocess.DEVNULL
        yield name, stack.enter_context(Resident(f"tee:{function}", stdout=stdout, python=python))


def _commands(setup: Setup, workers: int, data: Path, few: Path, sink: int) -> Iterator[Candidate]:
    """Those that can only be run as a whole, their start included; ours like that as well."""
    words = [sys.executable, "-I", "-S", str(PROGRAMS / "blast.py")]
    ours = our_command(workers, [*words, str(data)], tee=True)
    yield Candidate(_WHOLE, _timed(ours, data, workers, sink))
    if (sed := shutil.which("sed")) is not None:
        finished = Command([sed, "s/^/[bench0]:/", *[str(data)] * workers])
        yield Candidate("sed, finished files", _timed(finished, data, workers, sink), rounds=2)
    names = ("mpirun", "parallel")
    for name, command in setup.peers.commands(names, workers, [*words, str(data)], tee=True):
        yield Candidate(name, _timed(command, data, workers, sink), rounds=2)
    if workers == 1:
        # It ends the others when one has ended, and is too slow for so many lines.
        for name, command in setup.peers.commands(["honcho"], 1, [*words, str(few)], tee=True):
            yield Candidate(name, _timed(command, few, workers, sink), rounds=2)


def _timed(command: Command, data: Path, workers: int, sink: int) -> Callable[[], Sample]:
    def run() -> Sample:
        wall_ms = run_command(command.argv, env=command.env, stdout=sink).wall_ms
        return {_RATE.name: workers * data.stat().st_size / 1e6 / (wall_ms / 1e3)}

    return run


def _check(request: dict[str, Any], shown: Path, lines: int) -> str:
    """Whether each rank's lines are all there, once, whole and in order."""
    with drained_pipe(str(shown)) as pipe, Resident("tee:supervised", stdout=pipe) as ours:
        ours.ask(request)
    expected = dict.fromkeys(range(request["workers"]), 0)
    with open(shown, "rb") as output:
        for number, line in enumerate(output, 1):
            match = _LINE.fullmatch(line)
            if match is None:
                raise MeasureError(f"line {number} is torn: {line[:60]!r}")
            rank, index = int(match[1]), int(match[2])
            if index != expected[rank]:
                raise MeasureError(
                    f"line {number}: rank {rank}'s line {index} where {expected[rank]} was due"
                )
            expected[rank] = index + 1
    shown.unlink()
    if missing := {rank: lines - got for rank, got in expected.items() if got != lines}:
        raise MeasureError(f"lines missing at the end, by rank: {missing}")
    return f"{sum(expected.values()):,} lines: none lost, torn, doubled or out of order"


TOPIC = Topic(
    name="tee",
    title="N workers write 200,000 lines of 100 bytes each as fast as they can: bytes a second "
    "from their start until all is on the console",
    limit="one loop that reads the same live files block by block, puts the prefixes in with "
    "bytes.replace() and writes, napping 1 ms where there is nothing new",
    cases=_cases,
    plots=(_RATE.name,),
    notes=(
        "block prefixer, asupervise and torch are calls in a warm process. The others are whole "
        "commands, their start included.",
        "sed has no workers: it reads files that are finished.",
        "Lost, doubled and torn lines are counted in what went through a pipe into a file; a torn "
        "line does not arrive as it was written, and is counted as lost as well.",
    ),
)
