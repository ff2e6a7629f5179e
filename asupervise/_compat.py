"""What depends on the Python version or on the event loop: how a child's exit is learnt.

* Python 3.11 to 3.13, asyncio's own loop: ``create_subprocess_exec`` asks the event loop
  policy for a child watcher. On 3.11 that is ``ThreadedChildWatcher``, one thread a child
  (python/cpython#82591). For the one synchronous step that starts the process we answer with
  a watcher of ours: it waits on a pidfd and reaps with ``wait4``, which also tells the peak
  memory that the later watchers throw away. The host's policy is back before the coroutine
  suspends.
* Python 3.14 and later: policies have no watchers; asyncio's own one uses pidfds.
* uvloop and other loops: they bring their own reaping (libuv: SIGCHLD).

In the last two cases the exit is learnt from ``Process.wait()``, which asyncio completes once
the pipes are closed too; our workers have none, so nothing can hold it up.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import types
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any

_HAS_WATCHERS = sys.version_info < (3, 14)


@dataclass(frozen=True, slots=True)
class Exit:
    """How and when one process ended.

    Attributes:
        code: its exit status, negative for a death by signal, as ``Popen.returncode``.
        wall_time: seconds since the epoch at which we learnt of it.
        monotonic_ns: the same moment on ``time.monotonic_ns()``, for ordering.
        peak_rss_bytes: the largest resident set that it ever had, where the kernel told us.
        core_dumped: whether the kernel says that it wrote a core dump; None if unknown.
    """

    code: int
    wall_time: float
    monotonic_ns: int
    peak_rss_bytes: int | None = None
    core_dumped: bool | None = None


ExitCallback = Callable[[Exit], None]


def exit_now(code: int, *, status: int | None = None, peak_kib: int | None = None) -> Exit:
    """An :class:`Exit` stamped with the present moment."""
    unit = 1 if sys.platform == "darwin" else 1024
    return Exit(
        code=code,
        wall_time=time.time(),
        monotonic_ns=time.monotonic_ns(),
        peak_rss_bytes=peak_kib * unit if peak_kib else None,
        core_dumped=os.WCOREDUMP(status) if status is not None else None,
    )


class _ReapingWatcher:
    """A child watcher for one child: waits on its pidfd, reaps it with ``wait4``."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_exit: ExitCallback) -> None:
        self._loop = loop
        self._on_exit = on_exit
        self.armed = False

    def __enter__(self) -> _ReapingWatcher:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def is_active(self) -> bool:
        return True

    def add_child_handler(self, pid: int, callback: Callable[..., object], *args: object) -> None:
        pidfd = os.pidfd_open(pid)
        self._loop.add_reader(pidfd, self._reap, pidfd, pid, callback, args)
        self.armed = True

    def _reap(
        self, pidfd: int, pid: int, callback: Callable[..., object], args: tuple[object, ...]
    ) -> None:
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        try:
            _, status, usage = os.wait4(pid, 0)
        except ChildProcessError:
            # Somebody in the host reaped it (waitpid(-1), SIGCHLD ignored): the status is gone.
            ended = exit_now(255)
        else:
            code = os.waitstatus_to_exitcode(status)
            ended = exit_now(code, status=status, peak_kib=usage.ru_maxrss)
        self._on_exit(ended)
        callback(pid, ended.code, *args)


if _HAS_WATCHERS:

    class _WatcherPolicy(asyncio.AbstractEventLoopPolicy):
        """The host's policy in everything but the child watcher."""

        def __init__(self, host: asyncio.AbstractEventLoopPolicy, watcher: _ReapingWatcher) -> None:
            self._host = host
            self._watcher = watcher

        def get_event_loop(self) -> asyncio.AbstractEventLoop:
            return self._host.get_event_loop()

        def set_event_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
            self._host.set_event_loop(loop)

        def new_event_loop(self) -> asyncio.AbstractEventLoop:
            return self._host.new_event_loop()

        def get_child_watcher(self) -> Any:
            return self._watcher

        def set_child_watcher(self, watcher: Any) -> None:
            self._host.set_child_watcher(watcher)


def _first_step(coro: Coroutine[Any, Any, Any], watcher: _ReapingWatcher) -> Any:
    host = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_WatcherPolicy(host, watcher))
    try:
        return coro.send(None)
    finally:
        asyncio.set_event_loop_policy(host)


@types.coroutine
def _started_with(
    coro: Coroutine[Any, Any, Any], watcher: _ReapingWatcher
) -> Generator[Any, Any, Any]:
    """``await coro``, with `watcher` in place during its first synchronous step only."""
    try:
        yielded = _first_step(coro, watcher)
        while True:
            try:
                sent = yield yielded
            except GeneratorExit:
                coro.close()
                raise
            except BaseException as exc:
                yielded = coro.throw(exc)
            else:
                yielded = coro.send(sent)
    except StopIteration as stop:
        return stop.value


async def spawn(
    argv: tuple[str, ...], *, on_exit: ExitCallback, **options: Any
) -> asyncio.subprocess.Process:
    """Start a process with ``asyncio.create_subprocess_exec``; `on_exit` is called once, in
    the loop, when it has ended and is reaped. No thread is used, however many children.

    Args:
        argv: program and arguments.
        on_exit: receives the :class:`Exit`.
        options: as for ``asyncio.create_subprocess_exec``; no pipes.

    Raises:
        OSError: if the program cannot be started.
    """
    loop = asyncio.get_running_loop()
    start = asyncio.create_subprocess_exec(*argv, **options)
    if _HAS_WATCHERS and _waits_by_watcher(loop):
        watcher = _ReapingWatcher(loop, on_exit)
        process: asyncio.subprocess.Process = await _started_with(start, watcher)
        if watcher.armed:
            return process
    else:
        process = await start
    _learn_from_wait(process, on_exit)
    return process


def _waits_by_watcher(loop: asyncio.AbstractEventLoop) -> bool:
    return isinstance(loop, asyncio.SelectorEventLoop) and hasattr(os, "pidfd_open")


_waiters: set[asyncio.Task[None]] = set()


def _learn_from_wait(process: asyncio.subprocess.Process, on_exit: ExitCallback) -> None:
    async def wait() -> None:
        code = await process.wait()
        on_exit(exit_now(code, peak_kib=None))

    # The loop keeps weak references to tasks only (asyncio.create_task's documentation).
    task = asyncio.get_running_loop().create_task(wait(), name=f"exit of {process.pid}")
    _waiters.add(task)
    task.add_done_callback(_waiters.discard)


async def run_quietly(argv: tuple[str, ...], **options: Any) -> int:
    """Run a short-lived command and return its exit status, as :func:`spawn` without threads.

    Raises:
        OSError: if it cannot be started.
    """
    ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
    await spawn(argv, on_exit=ended.set_result, **options)
    return (await ended).code
