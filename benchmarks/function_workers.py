"""Workers that run a Python function, with what they need imported beforehand or not."""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.measure import SUBJECT, Candidate, Case, Goal, Metric, Sample
from benchmarks.processes import Resident, ms
from benchmarks.programs import functions
from benchmarks.topics import Setup, Topic
from benchmarks.usage import Usage, status

if TYPE_CHECKING:
    from asupervise import RunProcsResult, Zygote

_WALL = Metric("wall", "ms", 2)
_PEAK = Metric("peak memory / value", "", 2)
_DESCRIPTORS = Metric("descriptors more", "", 0)
_PROCESSES = Metric("processes more", "", 0)
_MEMORY = Metric("memory more", "KiB", 0)
_FORK = "fork of a warm process"
_MP_FORKSERVER = "multiprocessing forkserver, preloaded"
_MP_SPAWN = "multiprocessing spawn"
_TORCH = {method: f"torch {method}" for method in ("spawn", "forkserver", "fork")}
_OURS_SPAWN = "asupervise spawn"
_BARE_PYTHON = "python -c pass"
_PIPE = "a copy through a pipe"
_GIB = 1 << 30
_F_SETPIPE_SZ = 1031


# --- inside the candidates' processes -------------------------------------------------------------

_kept: list[Any] = []


async def _zygote(preload: list[str]) -> Zygote:
    # Imported here and below: the others run without.
    from asupervise import Zygote

    if not _kept:
        _kept.append(Zygote(preload=preload))
        await _kept[0].start()
    zygote: Zygote = _kept[0]
    return zygote


async def _run(
    function: Callable[..., Any], args: dict[int, tuple[Any, ...]], start_method: Any
) -> RunProcsResult:
    from asupervise import start_processes

    async with start_processes(
        "bench", function, args, {rank: {} for rank in args}, start_method=start_method
    ) as ctx:
        result = await ctx.wait()
    if result.is_failed():
        raise RuntimeError(f"a worker has failed: {result}")
    return result


async def supervised(request: dict[str, Any]) -> Sample:
    method = request["method"]
    if method == "zygote":
        method = await _zygote(request["preload"])
    function = getattr(functions, request["function"])
    args = {rank: (rank,) for rank in range(request["workers"])}
    start_ns = time.monotonic_ns()
    result = await _run(function, args, method)
    end_ns = time.monotonic_ns()
    if result.return_values != {rank: rank for rank in args}:
        raise RuntimeError(f"returned: {result.return_values}")
    return {_WALL.name: ms(start_ns, end_ns)}


def multiprocessing(request: dict[str, Any]) -> Sample:
    import multiprocessing as mp

    context: Any = mp.get_context(request["method"])
    context.set_forkserver_preload(request["preload"])
    ranks = range(request["workers"])
    start_ns = time.monotonic_ns()
    queue = context.SimpleQueue()
    workers = [
        context.Process(target=functions.with_torch_to, args=(queue, rank)) for rank in ranks
    ]
    for worker in workers:
        worker.start()
    returned = sorted(queue.get() for _ in workers)
    for worker in workers:
        worker.join()
    end_ns = time.monotonic_ns()
    queue.close()
    if returned != list(ranks):
        raise RuntimeError(f"returned: {returned}")
    return {_WALL.name: ms(start_ns, end_ns)}


def warm_fork(request: dict[str, Any]) -> Sample:
    functions.with_torch(0)
    start_ns = time.monotonic_ns()
    pids = []
    for rank in range(request["workers"]):
        pid = os.fork()
        if pid == 0:
            functions.with_torch(rank)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    return {_WALL.name: ms(start_ns, time.monotonic_ns())}


def torch(request: dict[str, Any]) -> Sample:
    from benchmarks import torch_api

    args = {rank: (rank,) for rank in range(request["workers"])}
    start_ns = time.monotonic_ns()
    context = torch_api.start(
        functions.with_torch, args, request["log_dir"], start_method=request["method"]
    )
    result = torch_api.wait(context)
    end_ns = time.monotonic_ns()
    if result is None or result.is_failed():
        raise RuntimeError("a worker has failed")
    return {_WALL.name: ms(start_ns, end_ns)}


async def bare_python(request: dict[str, Any]) -> Sample:
    start_ns = time.monotonic_ns()
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", "pass", start_new_session=True, stdin=subprocess.DEVNULL
        )
        for _ in range(request["workers"])
    ]
    for process in processes:
        await process.wait()
    return {_WALL.name: ms(start_ns, time.monotonic_ns())}


async def large_value(request: dict[str, Any]) -> Sample:
    size = request["size"]
    _forget_peak()
    zygote = await _zygote([])
    args = {rank: (rank, size) for rank in range(4)}
    start_ns = time.monotonic_ns()
    result = await _run(functions.large, args, zygote)
    end_ns = time.monotonic_ns()
    if len(result.return_values[2]) != size:
        raise RuntimeError("a value of another size came back")
    peak = status("/proc/self", "VmHWM") * 1024
    return {_WALL.name: ms(start_ns, end_ns), _PEAK.name: peak / size}


def _forget_peak() -> None:
    # Otherwise the peak would be that of the round before (proc(5): clear_refs).
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def pipe_copy(request: dict[str, Any]) -> Sample:
    """A forked process makes the value, and writes it into a pipe."""
    size = request["size"]
    start_ns = time.monotonic_ns()
    read_end, write_end = os.pipe()
    fcntl.fcntl(read_end, _F_SETPIPE_SZ, 1 << 20)
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        left = memoryview(bytes(size))
        while left.nbytes:
            left = left[os.write(write_end, left) :]
        os._exit(0)
    os.close(write_end)
    room = memoryview(bytearray(size))
    while room.nbytes and (count := os.readv(read_end, [room])):
        room = room[count:]
    os.close(read_end)
    os.waitpid(pid, 0)
    return {_WALL.name: ms(start_ns, time.monotonic_ns())}


async def many_groups(request: dict[str, Any]) -> Sample:
    zygote = await _zygote([])
    args = {rank: (rank,) for rank in range(2)}
    # The allocator has taken what it needs after some hundred.
    for _ in range(request["warmups"]):
        await _run(functions.trivial, args, zygote)
    # Which loads psutil, whose megabyte is not to be counted.
    children = _descendants()
    before = Usage.of([os.getpid(), zygote.pid])
    start_ns = time.monotonic_ns()
    for _ in range(request["groups"]):
        await _run(functions.trivial, args, zygote)
    wall_ms = ms(start_ns, time.monotonic_ns())
    after = Usage.of([os.getpid(), zygote.pid])
    return {
        _WALL.name: wall_ms / request["groups"],
        _DESCRIPTORS.name: after.descriptors - before.descriptors,
        _PROCESSES.name: _descendants() - children,
        _MEMORY.name: after.memory_kib - before.memory_kib,
    }


def _descendants() -> int:
    import psutil

    return len(psutil.Process().children(recursive=True))


# --- the comparison -------------------------------------------------------------------------------


def _cases(setup: Setup) -> Iterator[Case]:
    with ExitStack() as stack:

        def resident(function: str, python: str = sys.executable) -> Resident:
            return stack.enter_context(Resident(f"function_workers:{function}", python=python))

        if setup.peers.torch_python is None:
            setup.left_out.add("function workers that import torch: torch is not installed here")
        else:
            yield from _torch_cases(setup, partial(resident, python=setup.peers.torch_python))
        for workers in (1, 8):
            yield _spawn_case(setup, resident, workers)
        yield _large_case(setup, resident)
        yield _many_case(setup, resident)


def _torch_cases(setup: Setup, resident: Callable[[str], Resident]) -> Iterator[Case]:
    for workers in (1, 8):
        request = {
            "workers": workers,
            "function": "with_torch",
            "log_dir": str(setup.scratch / "function_workers"),
        }

        def asked(
            function: str, method: str, request: dict[str, Any] = request
        ) -> Callable[[], Sample]:
            preload = ["torch", "benchmarks.programs.functions"]
            if function == "multiprocessing":
                # Its workers import the main module; here once, in the fork server.
                preload.insert(0, "__main__")
            return partial(
                resident(function).ask, {**request, "method": method, "preload": preload}
            )

        slow = 1
        yield Case(
            name=f"import torch, N = {workers}",
            group="import torch",
            size=workers,
            metrics=[_WALL],
            candidates=[
                Candidate(_FORK, asked("warm_fork", "")),
                Candidate(_MP_FORKSERVER, asked("multiprocessing", "forkserver")),
                Candidate(SUBJECT, asked("supervised", "zygote")),
                Candidate(_OURS_SPAWN, asked("supervised", "spawn"), rounds=slow, cold=True),
                Candidate(_MP_SPAWN, asked("multiprocessing", "spawn"), rounds=slow, cold=True),
                *(
                    Candidate(name, asked("torch", method), rounds=slow, cold=True)
                    for method, name in _TORCH.items()
                ),
            ],
            limit=_FORK,
            goals=[
                Goal(_WALL.name, "<=", 1.5, against=_MP_FORKSERVER),
                Goal(_WALL.name, ">=", 80, against=_TORCH["spawn"], inverse=True),
                Goal(_WALL.name, ">=", 50, against=_TORCH["forkserver"], inverse=True),
            ]
            if workers == 8
            else [],
            rounds=setup.rounds(8),
            budget_s=60.0,
        )


def _spawn_case(setup: Setup, resident: Callable[[str], Resident], workers: int) -> Case:
    request = {"workers": workers, "function": "trivial", "method": "spawn"}
    return Case(
        name=f"spawn of a trivial function, N = {workers}",
        group="spawn of a trivial function",
        size=workers,
        metrics=[_WALL],
        candidates=[
            Candidate(_BARE_PYTHON, partial(resident("bare_python").ask, request)),
            Candidate(SUBJECT, partial(resident("supervised").ask, request)),
        ],
        limit=_BARE_PYTHON,
        goals=[Goal(_WALL.name, "<=", 2, against=_BARE_PYTHON)],
        rounds=setup.rounds(11),
        budget_s=12.0,
    )


def _large_case(setup: Setup, resident: Callable[[str], Resident]) -> Case:
    size = _GIB // 8 if setup.quick else _GIB
    request = {"size": size}
    return Case(
        name=f"{size >> 20} MiB returned by one of 4 workers",
        metrics=[_WALL, _PEAK],
        candidates=[
            Candidate(_PIPE, partial(resident("pipe_copy").ask, request)),
            Candidate(SUBJECT, partial(resident("large_value").ask, request)),
        ],
        limit=_PIPE,
        goals=[Goal(_PEAK.name, "<=", 2.2)],
        rounds=setup.rounds(4),
        budget_s=30.0,
    )


def _many_case(setup: Setup, resident: Callable[[str], Resident]) -> Case:
    groups = 50 if setup.quick else 1000
    request = {"groups": groups, "warmups": 10 if setup.quick else 600}
    return Case(
        name=f"{groups:,} groups of 2 on one kept zygote",
        metrics=[_WALL, _DESCRIPTORS, _PROCESSES, _MEMORY],
        candidates=[Candidate(SUBJECT, partial(resident("many_groups").ask, request))],
        limit=None,
        goals=[
            Goal(_DESCRIPTORS.name, "<=", 0),
            Goal(_PROCESSES.name, "<=", 0),
            Goal(_MEMORY.name, "<=", 1024),
        ],
        rounds=1,
        warmups=0,
    )


TOPIC = Topic(
    name="function_workers",
    title="start_processes() of a Python function in N workers, until what they return is there",
    limit="os.fork of a process that has imported torch, and waitpid; python -c pass for workers "
    "that are started afresh; a copy through a pipe for large values",
    cases=_cases,
    plots=(_WALL.name,),
    notes=(
        "With a preload, what it has imported is there before the clock starts, for everybody.",
    ),
)
