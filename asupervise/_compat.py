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
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

T = TypeVar("T")

_HAS_WATCHERS = sys.version_info < (3, 14)
_KILLED_S = 2.0


class Exit(NamedTuple):
    """How and when one process ended.

    Attributes:
        code: its exit status, negative for a death by signal, as ``Popen.returncode``.
        monotonic_ns: when we learnt of it, on ``time.monotonic_ns()``.
        peak_rss_bytes: the largest resident set that it ever had, where the kernel told us.
        core_dumped: whether the kernel says that it wrote a core dump; None if unknown.
    """

    code: int
    monotonic_ns: int
    peak_rss_bytes: int | None = None
    core_dumped: bool | None = None


ExitCallback = Callable[[Exit], None]


def exit_now(code: int, *, status: int | None = None, peak_kib: int | None = None) -> Exit:
    """An :class:`Exit` stamped with the present moment."""
    unit = 1 if sys.platform == "darwin" else 1024
    return Exit(
        code=code,
        monotonic_ns=time.monotonic_ns(),
        peak_rss_bytes=peak_kib * unit if peak_kib else None,
        core_dumped=os.WCOREDUMP(status) if status is not None else None,
    )


def has_ended(pid: int) -> bool:
    """Whether a child of ours has ended, also where nobody has told us yet; reaps nothing.

    False where that cannot be asked (``os.waitid`` is missing on macOS before Python 3.13).
    """
    if not hasattr(os, "waitid"):
        return False
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True  # reaped already, by the event loop or by somebody in the host


class Child:
    """A started process whose exit is waited for; made by :func:`spawn`.

    Attributes:
        pid: its process id.
    """

    def __init__(self, process: asyncio.subprocess.Process, stop_waiting: Callable[[], None]):
        self.pid = process.pid
        self._process = process
        self._stop_waiting = stop_waiting

    def has_ended(self) -> bool:
        """Whether it has ended, also where nobody has told us yet; reaps nothing."""
        return has_ended(self.pid)

    def abandon(self) -> None:
        """Wait no longer: for a process that cannot be ended. It stays unreaped."""
        self._stop_waiting()
        # Otherwise asyncio complains, once it is collected, that it was not closed. There is no
        # public way: `Process` has none.
        self._process._transport.close()  # type: ignore[attr-defined]


class _ReapingWatcher:
    """A child watcher for one child: waits on its pidfd, reaps it with ``wait4``."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_exit: ExitCallback) -> None:
        self._loop = loop
        self._on_exit = on_exit
        self._pid = 0
        self._pidfd = -1
        self._tell_asyncio: Callable[[int], object] = int

    def __enter__(self) -> _ReapingWatcher:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def is_active(self) -> bool:
        return True

    @property
    def was_asked(self) -> bool:
        return self._pid != 0

    def add_child_handler(self, pid: int, callback: Callable[..., object], *args: object) -> None:
        self._pid = pid
        self._tell_asyncio = lambda code: callback(pid, code, *args)
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError:
            # No descriptor is left (EMFILE). Nobody would ever hear of this child.
            os.kill(pid, signal.SIGKILL)
            self._tell_asyncio(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            raise
        self._loop.add_reader(self._pidfd, self._on_readable)

    def stop(self) -> None:
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_readable(self) -> None:
        self.stop()
        ended = self._reap(os.WNOHANG)
        if ended is not None:
            self._finish(ended)
            return
        # A tracer (strace, gdb) is told first, and until it has looked there is nothing to reap
        # for the parent (ptrace(2)): the one case that needs a thread.
        reaping = self._loop.run_in_executor(None, self._reap, 0)
        reaping.add_done_callback(lambda done: self._finish(done.result()))

    def _reap(self, options: int) -> Exit | None:
        try:
            pid, status, usage = os.wait4(self._pid, options)
        except ChildProcessError:
            # Somebody in the host reaped it (waitpid(-1), SIGCHLD ignored): the status is gone.
            return exit_now(255)
        if pid == 0:
            return None
        code = os.waitstatus_to_exitcode(status)
        return exit_now(code, status=status, peak_kib=usage.ru_maxrss)

    def _finish(self, ended: Exit | None) -> None:
        assert ended is not None, "a blocking wait has a result"
        self._on_exit(ended)
        self._tell_asyncio(ended.code)


if _HAS_WATCHERS:

    class _WatcherPolicy(asyncio.AbstractEventLoopPolicy):
        """The host's policy in everything but the child watcher, and that for this thread only."""

        def __init__(self, host: asyncio.AbstractEventLoopPolicy, watcher: _ReapingWatcher) -> None:
            self._host = host
            self._watcher = watcher
            self._thread = threading.get_ident()

        def get_event_loop(self) -> asyncio.AbstractEventLoop:
            return self._host.get_event_loop()

        def set_event_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
            self._host.set_event_loop(loop)

        def new_event_loop(self) -> asyncio.AbstractEventLoop:
            return self._host.new_event_loop()

        def get_child_watcher(self) -> Any:
            if threading.get_ident() == self._thread:
                return self._watcher
            return self._host.get_child_watcher()

        def set_child_watcher(self, watcher: Any) -> None:
            self._host.set_child_watcher(watcher)


# The policy is one for the whole process: two loops in two threads must not put back each other's.
# By process, because a forked child may inherit a lock that is held.
_policy_locks: dict[int, threading.Lock] = {}


@contextmanager
def _watching_with(watcher: _ReapingWatcher | None) -> Iterator[None]:
    """For one synchronous step, asyncio has its children watched by `watcher`."""
    if watcher is None:
        yield
        return
    with _policy_locks.setdefault(os.getpid(), threading.Lock()):
        host = asyncio.get_event_loop_policy()
        asyncio.set_event_loop_policy(_WatcherPolicy(host, watcher))
        try:
            yield
        finally:
            asyncio.set_event_loop_policy(host)


@contextmanager
def _tasks_run_at_once(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """For one synchronous step, what asyncio makes a task of is run on the spot.

    asyncio leaves the connecting of a child's pipes to a task, and waits for that, also where
    there are none. Should ``asyncio.run`` end just then, it cancels that task, and asyncio waits
    for ever (seen on 3.11 to 3.13). Without the task a start is one step that nothing interrupts.
    """
    if not isinstance(loop, asyncio.BaseEventLoop):
        yield
        return
    factory = loop.get_task_factory()
    loop.set_task_factory(_run_at_once)  # type: ignore[arg-type]
    try:
        yield
    finally:
        loop.set_task_factory(factory)


class _Finished(asyncio.Future[None]):
    """In the place of a task that has nothing left to do."""

    def set_name(self, name: object) -> None:
        pass  # what else asyncio asks of a task (3.13)


def _run_at_once(
    loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, None], **_: Any
) -> _Finished:
    done = _Finished(loop=loop)
    try:
        coro.send(None)
    except StopIteration:
        done.set_result(None)
        return done
    coro.close()
    raise RuntimeError("pipes are not supported")


async def _uninterrupted(coro: Coroutine[Any, Any, T], watcher: _ReapingWatcher | None) -> T:
    """``await coro``; a cancellation meanwhile takes effect at the caller's next await.

    Otherwise a process would be there that nobody has been told of.
    """
    cancelled = False
    with _tasks_run_at_once(asyncio.get_running_loop()), _watching_with(watcher):
        waited, result = _step(coro)
    while waited is not None:
        cancelled = await _done(waited) or cancelled
        waited, result = _step(coro)
    if cancelled and (task := asyncio.current_task()) is not None:
        task.uncancel()
        task.cancel()
    return cast(T, result)


def _step(coro: Coroutine[Any, Any, T]) -> tuple[asyncio.Future[Any] | None, T | None]:
    """Run `coro` up to its next wait: the future that it waits for, or its result."""
    try:
        waited: asyncio.Future[Any] = coro.send(None)
    except StopIteration as stop:
        return None, stop.value
    # The protocol between futures and tasks (asyncio.isfuture): the wait has been seen to.
    waited._asyncio_future_blocking = False
    return waited, None


async def _done(future: asyncio.Future[Any]) -> bool:
    """Wait for `future`; returns whether this was cancelled meanwhile."""
    done, cancelled = asyncio.Event(), False
    future.add_done_callback(lambda _: done.set())
    while not done.is_set():
        try:
            await done.wait()
        except asyncio.CancelledError:
            cancelled = True
    return cancelled


async def spawn(argv: tuple[str, ...], *, on_exit: ExitCallback, **options: Any) -> Child:
    """Start a process with ``asyncio.create_subprocess_exec``; `on_exit` is called once, in
    the loop, when it has ended and is reaped. No thread is used, however many children.

    Not interrupted by a cancellation, which takes effect at the caller's next await. It may not
    suspend at all: who starts many gives others a turn.

    Args:
        argv: program and arguments.
        on_exit: receives the :class:`Exit`.
        options: as for ``asyncio.create_subprocess_exec``; no pipes.

    Raises:
        OSError: if the program cannot be started.
    """
    loop = asyncio.get_running_loop()
    watcher = _ReapingWatcher(loop, on_exit) if _asks_for_a_watcher(loop) else None
    process = await _uninterrupted(asyncio.create_subprocess_exec(*argv, **options), watcher)
    if watcher is not None and watcher.was_asked:
        return Child(process, watcher.stop)
    return Child(process, _learn_from_wait(process, on_exit))


def _asks_for_a_watcher(loop: asyncio.AbstractEventLoop) -> bool:
    can_wait = isinstance(loop, asyncio.SelectorEventLoop) and hasattr(os, "pidfd_open")
    return _HAS_WATCHERS and can_wait


def _learn_from_wait(
    process: asyncio.subprocess.Process, on_exit: ExitCallback
) -> Callable[[], None]:
    """Call `on_exit` when the process has ended; returns what stops the waiting.

    Without a task: at its end ``asyncio.run`` cancels every task, and those that end the workers
    then must still learn of their exits.
    """
    waiting, stopped = process.wait(), False

    def go_on(_: object = None) -> None:
        if stopped:
            return
        waited, code = _step(waiting)
        if waited is not None:
            waited.add_done_callback(go_on)
        elif code is not None:
            on_exit(exit_now(code))

    def stop() -> None:
        nonlocal stopped
        stopped = True
        waiting.close()

    go_on()
    return stop


async def run_quietly(argv: tuple[str, ...], **options: Any) -> int:
    """Run a short-lived command and return its exit status, as :func:`spawn` without threads.

    Where this is cancelled, the process is killed.

    Raises:
        OSError: if it cannot be started.
    """
    exits: list[Exit] = []
    ended = asyncio.Event()

    def on_exit(exit: Exit) -> None:
        exits.append(exit)
        ended.set()

    child = await spawn(argv, on_exit=on_exit, **options)
    try:
        await ended.wait()
    except asyncio.CancelledError:
        if not exits:
            os.kill(child.pid, signal.SIGKILL)
            await _reaped_or_abandoned(child, ended)
        raise
    return exits[0].code


async def _reaped_or_abandoned(child: Child, ended: asyncio.Event) -> None:
    # The loop may be about to end: it must not do so with a descriptor of ours open.
    try:
        async with asyncio.timeout(_KILLED_S):
            await ended.wait()
    except (TimeoutError, asyncio.CancelledError):
        child.abandon()  # and the caller's own cancellation goes on
