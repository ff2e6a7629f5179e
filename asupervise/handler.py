"""One worker process: start it, learn of its exit, signal its group."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from asupervise import procfs
from asupervise._compat import Exit, ExitCallback, exit_now, spawn
from asupervise.plan import WorkerPlan

# Appending, so that a log that somebody truncates goes on at its new end instead of leaving a
# hole of zero bytes (open(2)). The mode keeps other users out.
_LOG_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
_LOG_MODE = 0o600


class WorkerProcess(Protocol):
    """A process that has been started, and whose exit will be told.

    Attributes:
        pid: its process id, which nobody else gets before its exit has been told.
    """

    pid: int

    def has_ended(self) -> bool:
        """Whether it has ended, also where that has not been told yet."""

    def abandon(self) -> None:
        """Wait no longer for it."""


class Surroundings(NamedTuple):
    """What a process is started with, beside its argv.

    Attributes:
        std: its standard streams: descriptors, None for ours, or ``subprocess.DEVNULL``.
        env: its whole environment.
        cwd: its working directory; None for ours.
    """

    std: tuple[int | None, int | None, int | None]
    env: Mapping[str, str]
    cwd: str | None = None


class Launch(Protocol):
    """Starts the process of a plan in a session of its own."""

    async def __call__(
        self, plan: WorkerPlan, around: Surroundings, on_exit: ExitCallback, /
    ) -> WorkerProcess:
        """`on_exit` is called in the loop when it has ended.

        Raises:
            OSError: if it cannot be started.
        """


async def exec_program(
    plan: WorkerPlan,
    around: Surroundings,
    on_exit: ExitCallback,
    /,
    *,
    descriptors: tuple[int, ...] = (),
) -> WorkerProcess:
    """Start a program: the usual `Launch`.

    Args:
        plan: of the worker.
        around: what it is started with.
        on_exit: called in the loop when it has ended.
        descriptors: handed on to it, and their numbers as its last arguments.
    """
    stdin, stdout, stderr = around.std
    return await spawn(
        (*plan.argv, *map(str, descriptors)),
        on_exit=on_exit,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=around.env,
        cwd=around.cwd,
        pass_fds=descriptors,
        start_new_session=True,
    )


class SubprocessHandler:
    """One worker process in its own session.

    Made by :meth:`start`. The process is the leader of its own session and process group, so
    that its group can be signalled as a whole and a terminal's Ctrl-C reaches the supervisor
    alone.

    Args:
        plan: argv, environment, files.
        on_exit: called in the loop when it has ended.

    Attributes:
        plan: what was started.
        pid: its process id, which is its process group's and session's id as well.
        started_ns: when it was started, on ``time.monotonic_ns()``.
        exit: how it ended, or None while it runs.
        left_group: whether members of its group were alive when it ended, or may have been.

    Example::

        handler = await SubprocessHandler.start(plan, os.environ, on_exit=print)
        handler.send_signal(signal.SIGUSR1)
        exit = await handler.wait_exit()
    """

    def __init__(
        self, plan: WorkerPlan, on_exit: Callable[[SubprocessHandler, Exit], None] | None = None
    ) -> None:
        self.plan = plan
        self.pid = 0
        self.exit: Exit | None = None
        # None while it is still to be found out.
        self._stragglers: tuple[procfs.ProcessEntry, ...] | None = ()
        self.left_group = False
        self.started_ns = 0
        self._ended_with: set[int] = set()
        self._told_to_end_ns: int | None = None
        self._passed_on: set[int] = set()
        self._on_exit = on_exit
        self._exited: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._child: WorkerProcess | None = None

    @classmethod
    async def start(
        cls,
        plan: WorkerPlan,
        parent_env: Mapping[str, str],
        *,
        cwd: str | None = None,
        on_exit: Callable[[SubprocessHandler, Exit], None] | None = None,
        launch: Launch = exec_program,
    ) -> SubprocessHandler:
        """Start the process of `plan`.

        Args:
            plan: argv, environment, files.
            parent_env: what the worker's environment is laid over.
            cwd: the worker's working directory; None for ours.
            on_exit: called in the loop when it has ended.
            launch: starts the process.

        Raises:
            OSError: if it cannot be started, with the rank and the program in the message.
        """
        self = cls(plan, on_exit)
        self.started_ns = time.monotonic_ns()
        opened: list[int] = []
        try:
            stdout = _open_log(plan, plan.stdout, opened)
            stderr = _open_log(plan, plan.stderr, opened)
            stdin = None if plan.stdin else subprocess.DEVNULL
            around = Surroundings((stdin, stdout, stderr), {**parent_env, **plan.env}, cwd)
            self._child = await self._launched(launch, around)
        finally:
            for fd in opened:
                os.close(fd)
        self.pid = self._child.pid
        if self.exit is not None:
            self._settle(self.exit)
        return self

    async def _launched(self, launch: Launch, around: Surroundings) -> WorkerProcess:
        try:
            return await launch(self.plan, around, self._ended)
        except OSError as exc:
            raise _named(exc, self.plan, f"cannot start {_shown(self.plan)!r}") from exc

    def _ended(self, exit: Exit) -> None:
        self.exit = exit
        # A short-lived process can be reaped before `spawn` has told us its pid.
        if self.pid:
            self._settle(exit)

    def _settle(self, exit: Exit) -> None:
        # Here the leader's pid has only just been given back: a group of that number can only
        # be ours, and whoever is in it now is proven ours for good.
        self.left_group = procfs.group_exists(self.pid)
        if self.left_group:
            self._stragglers = None
            _find_stragglers_soon(self)
        if not self._exited.done():
            self._exited.set_result(exit)
        on_exit, self._on_exit = self._on_exit, None
        if on_exit is not None:
            on_exit(self, exit)

    @property
    def stragglers(self) -> tuple[procfs.ProcessEntry, ...]:
        """Members of its group that were alive when it ended."""
        if self._stragglers is None:
            # Asked by somebody who was woken in the same turn of the loop for another reason.
            _find_stragglers(asyncio.get_running_loop())
        return self._stragglers or ()

    @property
    def local_rank(self) -> int:
        """The worker's rank on its node."""
        return self.plan.local_rank

    @property
    def running(self) -> bool:
        """Whether its exit has not been learnt yet."""
        return self.exit is None

    async def wait_exit(self) -> Exit:
        """Wait until the process has ended, whatever its descendants and pipes do."""
        return await asyncio.shield(self._exited)

    def send_signal(self, sig: int, *, group: bool = True) -> bool:
        """Signal the whole process group, also where the leader is dead and members live on.

        While the leader is not reaped its pid cannot have been given away; afterwards only
        the members that were seen at that moment are signalled, each checked by start time.

        Args:
            sig: signal number.
            group: False signals the leader alone.

        Returns:
            Whether anybody was there to be signalled.

        Raises:
            PermissionError: if the kernel does not let us (a worker that changed its user).
        """
        if self._may_be_changed():
            self._passed_on.add(sig)
        return self._send(sig, group=group)

    def _send(self, sig: int, *, group: bool = True) -> bool:
        if not self.running:
            return any([procfs.send_to_process(entry, sig) for entry in self.stragglers])
        if group:
            return procfs.send_to_group(self.pid, sig)
        os.kill(self.pid, sig)
        return True

    def _may_be_changed(self) -> bool:
        # A worker that has crashed a moment ago, unknown to us so far, did so by itself, whatever
        # we send now.
        return self.running and self._child is not None and not self._child.has_ended()

    def close(self, death_sig: int = signal.SIGTERM, *, resume: bool = True) -> bool:
        """Ask the whole group to end (see :meth:`send_signal`); a stopped one is continued.

        Args:
            death_sig: the signal.
            resume: False where the caller will continue it, by :meth:`resume`.
        """
        if self._may_be_changed():
            self._ended_with.add(death_sig)
            self._told_to_end_ns = self._told_to_end_ns or time.monotonic_ns()
        reached = self._send(death_sig)
        if reached and resume and death_sig != signal.SIGKILL:
            self.resume()
        return reached

    def resume(self) -> None:
        """Continue what is stopped, so that it can answer a signal."""
        self._send(signal.SIGCONT)

    def abandon(self) -> None:
        """Wait no longer for a process that even SIGKILL did not end."""
        if self._child is not None and self.running:
            self._child.abandon()

    def our_signals(self, exit: Exit) -> tuple[set[int], int | None]:
        """The signals of ours that may explain `exit`, and when the first was sent (monotonic).

        A signal that was passed on without the wish to end the worker explains only a death by
        just that signal.
        """
        if self._told_to_end_ns is not None:
            return self._ended_with, self._told_to_end_ns
        passed_on = {sig for sig in self._passed_on if exit.code in (-sig, 128 + sig)}
        return passed_on, exit.monotonic_ns if passed_on else None

    def exit_or_unkillable(self) -> Exit:
        """How it ended; for one that even SIGKILL did not end, as if that had."""
        return self.exit or exit_now(-signal.SIGKILL)

    def __repr__(self) -> str:
        state = "running" if self.exit is None else f"exit {self.exit.code}"
        return f"<SubprocessHandler rank {self.local_rank} pid {self.pid}: {state}>"


_asking: dict[asyncio.AbstractEventLoop, list[SubprocessHandler]] = {}


def _find_stragglers_soon(handler: SubprocessHandler) -> None:
    """Before anybody who waits for its exit has a turn of the loop.

    Workers end in crowds, and a look at the process table of a busy machine takes 10 ms: one for
    all whose exits were read together.
    """
    loop = asyncio.get_running_loop()
    if loop not in _asking:
        _asking[loop] = []
        loop.call_soon(_find_stragglers, loop)
    _asking[loop].append(handler)


def _find_stragglers(loop: asyncio.AbstractEventLoop) -> None:
    handlers = _asking.pop(loop, [])
    if not handlers:
        return  # one of them has been asked already
    groups: dict[int, list[procfs.ProcessEntry]] = {handler.pid: [] for handler in handlers}
    for entry in procfs.entries():
        if entry.process_group in groups:
            groups[entry.process_group].append(entry)
    for handler in handlers:
        handler._stragglers = tuple(groups[handler.pid])


def _open_log(plan: WorkerPlan, path: str | None, opened: list[int]) -> int | None:
    if path is None:
        return None
    try:
        fd = os.open(path, _LOG_FLAGS, _LOG_MODE)
    except OSError as exc:
        raise _named(exc, plan, "cannot open its log") from exc
    opened.append(fd)
    return fd


def _named(exc: OSError, plan: WorkerPlan, what: str) -> OSError:
    """The same error with the rank in it; OSError picks FileNotFoundError and the like by errno."""
    why = f"local rank {plan.local_rank}: {what}: {exc.strerror or exc}"
    return OSError(exc.errno, why, exc.filename or _shown(plan))


def _shown(plan: WorkerPlan) -> str:
    return plan.argv[0] if plan.argv else plan.program
