"""What ends the workers when we are killed: a small process that outlives us.

The guardian is a POSIX shell that sleeps in ``read`` on a pipe whose only other end is ours: 1 MB
and no CPU, where a Python interpreter would take 9 MB. When we end without saying goodbye, by
SIGKILL, by a crash, by the event loop being thrown away, the kernel closes our end; the shell
then becomes a Python that climbs the same cleanup ladder for every process that carries the
token of the group. Each group has a guardian of its own, which never outlives it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

from asupervise._compat import Exit, spawn
from asupervise.shielding import run_in_any_case

# Between SIGTERM and SIGKILL for orphans. Their supervisor is gone, and with it whoever could
# have told them how long they have; within a second all is to be over, Python's start included.
ORPHAN_GRACE_S: Final = 0.25

_GOODBYE: Final = b"goodbye\n"
_GOODBYE_LIMIT_S: Final = 2.0
_REAP_LIMIT_S: Final = 0.1
# Each line names workers, "<pid>:<start time>" each. At the end of the pipe: become the sweeper.
_SHELL: Final = """\
workers=
while read -r line; do
    [ "$line" = goodbye ] && exit 0
    workers="$workers $line"
done
exec "$@" $workers"""
# ssl is a seventh of the imports' time, and asyncio does without it where it is missing.
_SWEEPER: Final = (
    "import sys; sys.modules['ssl'] = None; sys.path.insert(0, sys.argv.pop(1)); "
    "from asupervise.guardian import sweep; sweep(sys.argv[1:])"
)


class Guardian:
    """The guardian of one group; made by :func:`guarded`.

    Args:
        token: stands in the environment of every process of the group.
        cgroup: the folder of the group's own cgroup, or "".

    Attributes:
        pid: its process id.
        lost: whether it has ended before we told it to.
    """

    def __init__(self, token: str, cgroup: str = "") -> None:
        self._token = token
        self._cgroup = cgroup
        self.pid = 0
        self.lost = False
        self._said_goodbye = False
        self._exited = asyncio.Event()
        self._pipe = -1

    async def start(self) -> None:
        """Start the process.

        Raises:
            OSError: if it cannot be started.
        """
        read_end, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        _ours.add(self._pipe)
        # When the event loop is thrown away with workers in it, this object goes as well, and
        # our end of the pipe with it.
        self._close = weakref.finalize(self, _close_ours, self._pipe)
        command = (
            "/bin/sh", "-c", _SHELL, "asupervise-guardian",
            *_sweeper_command(self._token, self._cgroup),
        )  # fmt: skip
        options: dict[str, Any] = {
            "stdin": read_end,
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
            # Not ours: a token of an outer supervisor would make it a victim of that sweep.
            "env": {"PATH": os.defpath},
            "cwd": "/",
            "start_new_session": True,
        }
        try:
            if hasattr(os, "pidfd_open"):
                self.pid = self._popen(command, options)
            else:
                self.pid = (await spawn(command, on_exit=self._on_exit, **options)).pid
        except BaseException:
            self._close()
            raise
        finally:
            os.close(read_end)

    def _popen(self, command: tuple[str, ...], options: dict[str, Any]) -> int:
        # Not by asyncio: it kills its children when their loop is thrown away, which is when the
        # guardian is needed.
        process = subprocess.Popen(command, **options)
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError:
            # No descriptor is left.
            process.kill()
            process.wait()
            raise
        _ours.add(pidfd)
        close = weakref.finalize(self, _close_ours, pidfd)
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(pidfd)
            close()
            # With a limit, for a tracer is told before the parent is (ptrace(2)).
            with suppress(subprocess.TimeoutExpired):
                process.wait(_REAP_LIMIT_S)
            self._on_exit()

        loop.add_reader(pidfd, ended)
        return process.pid

    def _on_exit(self, exit: Exit | None = None) -> None:
        self.lost = not self._said_goodbye
        self._exited.set()

    def adopt(self, workers: Iterable[tuple[int, int]]) -> None:
        """Name workers, by pid and start time in ticks.

        The token would do for those that keep their environment; some overwrite it (as
        setproctitle does), and are then known by their session.
        """
        self._write(" ".join(f"{pid}:{start}" for pid, start in workers).encode() + b"\n")

    async def say_goodbye(self) -> None:
        """Everything has ended in order: the guardian is to go. Returns when it has."""
        if not self._said_goodbye:
            self._said_goodbye = True
            self._write(_GOODBYE)
            self._close()
        try:
            async with asyncio.timeout(_GOODBYE_LIMIT_S):
                await self._exited.wait()
        except TimeoutError:
            # Somebody has stopped it.
            os.kill(self.pid, signal.SIGKILL)
            await self._exited.wait()

    def _write(self, line: bytes) -> None:
        try:
            os.write(self._pipe, line)
        except (BrokenPipeError, BlockingIOError):
            # Gone, as `lost` will tell; or so slow that the pipe is full: the token remains.
            pass


# Our ends of the pipes, and pidfds. A process that the host forks without exec (multiprocessing)
# must not keep a pipe open: the guardian would not see us end.
_ours: set[int] = set()


def _close_ours(fd: int) -> None:
    if fd in _ours:
        _ours.discard(fd)
        os.close(fd)


def _close_in_child() -> None:
    for fd in list(_ours):
        _close_ours(fd)


_hooked = False


def _hook_fork() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        os.register_at_fork(after_in_child=_close_in_child)


def _sweeper_command(token: str, cgroup: str) -> tuple[str, ...]:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return (sys.executable, "-I", "-S", "-c", _SWEEPER, root, token, cgroup)


@asynccontextmanager
async def guarded(token: str, cgroup: str = "") -> AsyncIterator[Guardian]:
    """A guardian for the group of `token`, for as long as the context lasts.

    Args:
        token: the group's.
        cgroup: the folder of the group's own cgroup, or "".

    Raises:
        OSError: if it cannot be started.
    """
    _hook_fork()
    guardian = Guardian(token, cgroup)
    try:
        await guardian.start()
    except OSError as exc:
        why = exc.strerror or str(exc)
        raise OSError(exc.errno, f"cannot start the guardian: {why}") from exc
    try:
        yield guardian
    finally:
        await run_in_any_case(guardian.say_goodbye)


def sweep(words: list[str]) -> None:
    """What the shell becomes: end all that is left of the group of `words[0]`.

    Args:
        words: the token, the folder of the group's own cgroup or "", and the workers that were
            named, as ``<pid>:<start time>``.
    """
    from asupervise.cgroups import OwnCgroup
    from asupervise.cleanup import end_orphans

    token, cgroup, *workers = words
    leaders = []
    for word in workers:
        pid, _, start = word.partition(":")
        leaders.append((int(pid), int(start)))
    own = OwnCgroup(cgroup) if cgroup else None
    asyncio.run(end_orphans(token, leaders, ORPHAN_GRACE_S, own))
