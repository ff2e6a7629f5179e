"""Starting candidates, timing them, and leaving none of their processes behind.

``subprocess.Popen.wait(timeout)`` polls with naps of up to 50 ms on Python 3.11: the ends of
processes are learnt here from pidfds, which wake at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import secrets
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.measure import MeasureError

ROOT: Final = Path(__file__).resolve().parent.parent
PROGRAMS: Final = Path(__file__).resolve().parent / "programs"

TIMEOUT_S: Final = 60.0
_GRACE_S: Final = 3.0
_GRACE_OF_THE_HUNG_S: Final = 0.5
_MARK: Final = "ASUPERVISE_BENCHMARK"
# What a candidate reads from the environment must not differ from machine to machine.
_UNWANTED: Final = (
    *("PET_", "PYTHON", "TORCHELASTIC_", "TORCH_", "OMP_"),
    *("OMPI_", "PMIX_", "PRTE_", "PARALLEL"),
)

_left: set[str] = set()


def ms(start_ns: int, end_ns: int) -> float:
    return (end_ns - start_ns) / 1e6


class Marked:
    """A mark in the environment of a process and of all that descends from it."""

    def __init__(self) -> None:
        self.mark = f"{_MARK}={secrets.token_hex(8)}"

    def environ(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(_UNWANTED)}
        name, _, value = self.mark.partition("=")
        return {**kept, **(more or {}), name: value}

    def pids(self) -> Iterator[int]:
        """Who carries the mark now."""
        for name in os.listdir("/proc"):
            if name.isdigit() and self.mark.encode() in _read(f"/proc/{name}/environ"):
                yield int(name)

    def pids_and_children(self, root: int) -> set[int]:
        """Likewise, and what descends from `root`: a helper may have an environment of its own."""
        children: dict[int, list[int]] = {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            if fields := _read(f"/proc/{name}/stat").rpartition(b")")[2].split():
                children.setdefault(int(fields[1]), []).append(int(name))
        found, new = set(self.pids()), [root]
        while new:
            pid = new.pop()
            found.add(pid)
            new += children.get(pid, [])
        return found

    def end(self, what: str, grace_s: float = 1.0) -> None:
        """Kill whoever still carries the mark after `grace_s`, and remember that it was there."""
        deadline = time.monotonic() + grace_s
        while list(self.pids()) and time.monotonic() < deadline:
            time.sleep(0.01)
        for pid in list(self.pids()):
            _left.add(f"{what} left behind: {_words(pid)}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def left_behind() -> list[str]:
    """What candidates have left running, and we have ended."""
    return sorted(_left)


def _words(pid: int) -> str:
    words = _read(f"/proc/{pid}/cmdline").split(b"\0")[:-1]
    return " ".join(os.path.basename(w.decode(errors="replace")) for w in words[:4])


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""  # it has ended, or is somebody else's


# --- one command, from launch to end --------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    wall_ms: float
    output: bytes


def run_command(
    argv: Sequence[str],
    *,
    timeout_s: float = TIMEOUT_S,
    env: Mapping[str, str] | None = None,
    output: bool = False,
    stdout: int = subprocess.DEVNULL,
    any_status: bool = False,
) -> Finished:
    """Run a whole command, and time it from before its start until it is reaped.

    Args:
        argv: its words.
        timeout_s: after this it is ended.
        env: variables beside ours.
        output: whether its standard output (less than a pipe holds) is wanted.
        stdout: where that goes otherwise.
        any_status: whether it may fail.

    Raises:
        MeasureError: if it fails or takes too long.
    """
    marked = Marked()
    environ = marked.environ(env)
    start_ns = time.monotonic_ns()
    with _start(argv, environ, subprocess.PIPE if output else stdout) as process:
        ended = wait_readable(os.pidfd_open(process.pid), timeout_s, close=True)
        status = process.wait() if ended else None
        wall_ms = ms(start_ns, time.monotonic_ns())
        if status is None:
            end_process(process, _GRACE_OF_THE_HUNG_S)
        said = process.stdout.read() if process.stdout and ended else b""
    if status is None:
        marked.end(os.path.basename(argv[0]))
        raise MeasureError(f"not over after {timeout_s:g} s")
    if status != 0 and not any_status:
        raise MeasureError(f"exit status {status}")
    return Finished(wall_ms, said)


def _start(argv: Sequence[str], environ: Mapping[str, str], stdout: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        env=environ,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_readable(fd: int, timeout_s: float, *, close: bool = False) -> bool:
    """Whether `fd` (a pipe, or a pidfd: the process has ended) became readable in time."""
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(max(0.0, timeout_s) * 1000))
    finally:
        if close:
            os.close(fd)


def end_process(process: subprocess.Popen[bytes], grace_s: float = _GRACE_S) -> None:
    """SIGTERM to its group, SIGKILL if that is not enough."""
    for sig in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sig)
        if wait_readable(os.pidfd_open(process.pid), grace_s, close=True):
            break
    process.wait()


@contextlib.contextmanager
def running(
    argv: Sequence[str], *, stdout: int = subprocess.DEVNULL, env: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], Marked]]:
    """A command that runs for as long as the context lasts, and its mark.

    Its workers are ended with it, and not counted as left behind: it was not asked to end them.
    """
    marked = Marked()
    with _start(argv, marked.environ(env), stdout) as process:
        try:
            yield process, marked
        finally:
            end_process(process)
            for pid in list(marked.pids()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


# --- a process that measures itself ---------------------------------------------------------------


class Resident:
    """A warm process that runs one function of this package again and again, as asked.

    Each candidate has a process of its own: what one imports, allocates or leaves open is no
    burden to another, and another interpreter (torch's) can be one as well. It starts when it is
    asked first, and afresh after it has failed.

    Args:
        function: ``module:function``, relative to this package; takes the request and returns
            the sample. It may be a coroutine function.
        stdout: its standard output.
        python: its interpreter.
        env: variables beside ours.
    """

    def __init__(
        self,
        function: str,
        *,
        stdout: int = subprocess.DEVNULL,
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._function = function
        self._stdout = stdout
        self._python = python
        self._env = env
        self._marked = Marked()
        self._process: subprocess.Popen[bytes] | None = None
        self._replies = -1

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._replies, reply_fd = os.pipe()
            self._process = subprocess.Popen(
                [self._python, "-m", "benchmarks.resident", self._function, str(reply_fd)],
                env=self._marked.environ(self._env),
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=self._stdout,
                stderr=subprocess.DEVNULL,
                pass_fds=(reply_fd,),
                start_new_session=True,
            )
            os.close(reply_fd)
        return self._process

    def ask(self, request: Mapping[str, Any], timeout_s: float = TIMEOUT_S) -> dict[str, float]:
        """Have the function run once.

        Raises:
            MeasureError: if it fails or takes too long.
        """
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            reply: dict[str, Any] = json.loads(self._line(time.monotonic() + timeout_s) or b"{}")
        except BrokenPipeError:
            reply = {}
        if "error" in reply or not reply:
            status = process.poll()
            self.close()
            nothing = "no answer in time" if status is None else f"ended with status {status}"
            raise MeasureError(str(reply.get("error", f"{self._function}: {nothing}")))
        return reply

    def _line(self, deadline: float) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            if not wait_readable(self._replies, deadline - time.monotonic()):
                return b""
            more = os.read(self._replies, 65536)
            if not more:
                return b""
            line += more
        return line

    def close(self) -> None:
        """End it, and whatever it has started. May be called again."""
        process, self._process = self._process, None
        if process is None:
            return
        os.close(self._replies)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        if not wait_readable(os.pidfd_open(process.pid), _GRACE_S, close=True):
            end_process(process)
        process.wait()
        self._marked.end(self._function)

    def __enter__(self) -> Resident:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


@contextlib.contextmanager
def drained_terminal() -> Iterator[int]:
    """A terminal of 80 by 24 that ``cat`` empties; on leaving, cat has ended."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    drain = subprocess.Popen(
        ["cat"],
        stdin=ours,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # where all have closed a terminal, reading is an error
        start_new_session=True,
    )
    os.close(ours)
    try:
        yield theirs
    finally:
        os.close(theirs)
        if not wait_readable(os.pidfd_open(drain.pid), _GRACE_S, close=True):
            drain.kill()
        drain.wait()


@contextlib.contextmanager
def drained_pipe(path: str = os.devnull) -> Iterator[int]:
    """The writing end of a pipe that ``cat`` empties into `path`; on leaving, cat has ended."""
    with open(path, "wb") as sink:
        drain = subprocess.Popen(
            ["cat"], stdin=subprocess.PIPE, stdout=sink, start_new_session=True
        )
    assert drain.stdin is not None
    with drain.stdin as pipe:
        yield pipe.fileno()
    if not wait_readable(os.pidfd_open(drain.pid), _GRACE_S, close=True):
        drain.kill()
    drain.wait()
