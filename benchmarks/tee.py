"""Log lines from the workers' files to the console: how many bytes a second, and are all there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import SUBJECT, Candidate, Case, Goal, MeasureError, Metric, Sample
from benchmarks.processes import PROGRAMS, Resident, drained_pipe
from benchmarks.topics import Setup, Topic

_LIMIT = "block prefixer"
_RATE = Metric("rate", "MB/s", 0)
_LINE_BYTES = 100
_BLOCK_BYTES = 256 * 1024
_PREFIX = "[bench{rank}]:"
_LINE = re.compile(rb"\[bench(\d+)\]:(\d{8}) x{90}\n")


# --- inside the candidates' processes -------------------------------------------------------------


def _worker(request: dict[str, Any]) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", str(PROGRAMS / "blast.py"), request["data"])


def _rate(request: dict[str, Any], start_ns: int) -> Sample:
    size = request["workers"] * os.path.getsize(request["data"])
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
    if result is None or result.is_failed():
        raise RuntimeError("a worker has failed")
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
    data = setup.scratch / "lines"
    data.write_bytes(b"".join(b"%08d %s\n" % (i, b"x" * (_LINE_BYTES - 10)) for i in range(lines)))
    for to_pipe in (False, True):
        with ExitStack() as stack:
            limit, ours = (_resident(stack, name, to_pipe) for name in _FUNCTIONS)
            for workers in (1, 4, 8):
                request = {
                    "workers": workers, "data": str(data), "folder": str(setup.scratch)
                }  # fmt: skip
                yield Case(
                    name=f"N = {workers}, {'pipe' if to_pipe else '/dev/null'}",
                    metrics=[_RATE],
                    candidates=[
                        Candidate(_LIMIT, partial(limit.ask, request)),
                        Candidate(SUBJECT, partial(ours.ask, request)),
                    ],
                    limit=_LIMIT,
                    goals=[Goal(_RATE.name, ">=", 0.85, against=_LIMIT)],
                    rounds=setup.rounds(7),
                    check=partial(_check, request, setup.scratch / "shown", lines)
                    if to_pipe
                    else None,
                )


_FUNCTIONS = ("tee:block_prefixer", "tee:supervised")


def _resident(stack: ExitStack, function: str, to_pipe: bool) -> Resident:
    if not to_pipe:
        return stack.enter_context(Resident(function))
    pipe = stack.enter_context(drained_pipe())
    return stack.enter_context(Resident(function, stdout=pipe))


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
)
