"""What tests start: small programs that say when they are ready, and a way to hear it."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from asupervise import _compat, procfs, start_processes
from asupervise.procs import StartingProcesses

T = TypeVar("T")

# Without site and environment: a worker that starts in 10 ms instead of 30.
PYTHON = (sys.executable, "-I", "-S", "-c")
SH = ("/bin/sh", "-c")

READY = 'echo "ready $RANK $$" > "$CHANNEL"; '
HELD = 'read line < "$CHANNEL.gate"; '
SLEEP = READY + "exec sleep 1000"
# Ignored signals stay ignored in what the shell starts.
STUBBORN = 'trap "" TERM; ' + READY + "exec sleep 1000"


class Channel:
    """A pipe by name: workers write lines into it, a test waits for them.

    Args:
        folder: where the pipe is made.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "channel"
        self._gate = folder / "channel.gate"
        os.mkfifo(self.path)
        os.mkfifo(self._gate)
        # Both ends, so that it never comes to an end between two writers (fifo(7)).
        self._fd = os.open(self.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._data = b""

    def close(self) -> None:
        os.close(self._fd)

    async def lines(self, count: int) -> list[list[str]]:
        """The next `count` lines, split into words."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        while self._data.count(b"\n") < count:
            loop.add_reader(self._fd, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(self._fd)
            readable.clear()
            self._data += os.read(self._fd, 65536)
        *found, rest = self._data.split(b"\n", count)
        self._data = rest
        return [line.decode().split() for line in found]

    async def open_gate(self) -> None:
        """Let the one worker go on that is `HELD`."""
        await asyncio.to_thread(self._gate.write_text, "go\n")

    async def pids(self, count: int) -> dict[int, int]:
        """By rank, the pids of the next `count` workers that are ready."""
        return {int(rank): int(pid) for _, rank, pid in await self.lines(count)}


def shell(
    channel: Channel | None, scripts: Sequence[str], *, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Arguments of `start_processes` for one shell script a rank."""
    told = {} if channel is None else {"CHANNEL": str(channel.path)}
    return {
        "name": "t",
        "entrypoint": SH,
        "args": {rank: (script,) for rank, script in enumerate(scripts)},
        "envs": {rank: {"RANK": str(rank), **told, **(env or {})} for rank in range(len(scripts))},
    }


def start(channel: Channel | None, *scripts: str, **options: Any) -> StartingProcesses:
    return start_processes(**shell(channel, scripts), **options)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def count_threads() -> tuple[int, int]:
    """As Python counts them, and as the kernel does."""
    return threading.active_count(), len(os.listdir("/proc/self/task"))


def by_asyncio(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return asyncio.run(main())


def by_asyncio_in_debug_mode(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return asyncio.run(main(), debug=True)


@cache
def uvloop() -> Any:
    """The module, its pipe open: libuv keeps one for signals from the first loop on."""
    import uvloop

    uvloop.new_event_loop().close()
    return uvloop


def by_uvloop(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    with asyncio.Runner(loop_factory=uvloop().new_event_loop) as runner:
        return runner.run(main())


def without_our_watcher(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """As on Python 3.14, whose policies have no watchers that could be put in the place of its."""
    has_watchers, _compat._HAS_WATCHERS = _compat._HAS_WATCHERS, False
    try:
        return asyncio.run(main())
    finally:
        _compat._HAS_WATCHERS = has_watchers


RUNNERS = (by_asyncio, by_asyncio_in_debug_mode, by_uvloop, without_our_watcher)


async def waits_of(pid: int) -> int:
    """How often a process has gone to sleep, told when it sleeps (proc_pid_status(5))."""
    count = -1
    while True:
        state = procfs.read_entry(pid)
        status = procfs.read_text(f"/proc/{pid}/status")
        former, count = count, int(status.partition("voluntary_ctxt_switches:")[2].split()[0])
        if state is not None and state.state == "S" and count == former:
            return count
        await asyncio.sleep(0.01)


async def settle() -> None:
    """Let everything that is ready to run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


async def gone(pid: int) -> None:
    """Wait until a process that is no child of ours has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    loop.add_reader(pidfd, ended.set_result, None)
    try:
        await ended
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def stopped(pid: int) -> None:
    """Wait until a child of ours has been stopped: of pending signals the lower comes first."""
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
