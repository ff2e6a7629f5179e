"""Where each worker is: its stacks, by the best means there is, equal ones put together.

In this order: faulthandler, where the worker has it armed (`asupervise.worker`); py-spy, where
it is installed and permitted; the kernel's view in ``/proc`` otherwise.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from asupervise import procfs
from asupervise._compat import Child, Exit, spawn
from asupervise.handler import SubprocessHandler
from asupervise.worker import STACKS_SIGNAL, STACKS_VARIABLE

# A dump takes a millisecond; a machine that swaps may need longer.
_DUMP_LIMIT_S = 2.0
# For all workers together: py-spy takes a twentieth of a second for each.
_PY_SPY_LIMIT_S = 5.0
_PY_SPIES_AT_ONCE = 4
_QUIET_S = 0.05
# faulthandler shows 100 threads of 100 frames at the most.
_MAX_BYTES = 2 << 20
_FRAMES_SHOWN = 3

_THREAD = re.compile(r"^(?:Current thread|Thread) .*\(most recent call first\):$")
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\S+) in (?P<name>.*)$')
_SPY_THREAD = re.compile(r"^Thread .*$")
_SPY_FRAME = re.compile(r"^    (?P<name>\S.*?) \((?P<file>.*?)(?::(?P<line>[0-9]{1,9}))?\)$")
_NUMBER = re.compile(r"[0-9]{1,9}")
# What of ours is around the user's function says nothing about where that is.
_OURS = re.compile(r"(^|/)asupervise/(error_handler\.py|functions/\w+\.py)$")


@dataclass(frozen=True, slots=True)
class Frame:
    """One line of a stack: function, file, line (0 where unknown)."""

    name: str
    file: str
    line: int

    def __str__(self) -> str:
        where = f"{os.path.basename(self.file)}:{self.line}" if self.line else self.file
        return f"{self.name} ({where})"


@dataclass(frozen=True, slots=True)
class Stack:
    """Where one worker was.

    Attributes:
        local_rank: which worker.
        frames: of its main thread, the innermost first; empty where only the kernel was asked.
        text: all that was found, as it stands in ``<local_rank>/stacks.txt``.
        source: by which means: "faulthandler", "py-spy" or "/proc".

    Example::

        for rank, stack in (await ctx.dump_stacks()).items():
            print(rank, stack.summary)     # 0 in load (train.py:8) < main (train.py:18)
    """

    local_rank: int
    frames: tuple[Frame, ...]
    text: str
    source: str

    @property
    def summary(self) -> str:
        """One line: the innermost frames, or the kernel's words."""
        if not self.frames:
            return self.text.partition("\n")[0]
        return "in " + " < ".join(map(str, self.frames[:_FRAMES_SHOWN]))


# --- reading what was found ---------------------------------------------------------------------


def group_equal(stacks: Mapping[int, Stack]) -> list[tuple[tuple[int, ...], Stack]]:
    """Ranks with equal stacks together, the largest group first.

    Returns:
        ``(ranks, the stack of the first of them)`` for each different stack.
    """
    groups = _grouped(stacks, _lines)
    return [(ranks, stacks[ranks[0]]) for ranks in groups]


def odd_one_out(stacks: Mapping[int, Stack]) -> int | None:
    """The rank that is elsewhere than all the others; None if there is no such one.

    Who waits in a loop is now on this line of it and now on that: where the lines tell no single
    rank from the others, the functions may.
    """
    odd = _single(_grouped(stacks, _lines))
    return _single(_grouped(stacks, _functions)) if odd is None else odd


def _grouped(stacks: Mapping[int, Stack], key: Callable[[Stack], object]) -> list[tuple[int, ...]]:
    groups: dict[object, list[int]] = {}
    for rank, stack in sorted(stacks.items()):
        groups.setdefault(key(stack), []).append(rank)
    return [tuple(g) for g in sorted(groups.values(), key=lambda ranks: (-len(ranks), ranks))]


def _lines(stack: Stack) -> object:
    return stack.frames or stack.summary


def _functions(stack: Stack) -> object:
    return tuple((frame.name, frame.file) for frame in stack.frames) or stack.summary


def _single(groups: Sequence[tuple[int, ...]]) -> int | None:
    if len(groups) != 2 or len(groups[0]) < 2 or len(groups[1]) != 1:
        return None
    return groups[1][0]


def parse_faulthandler(text: str) -> tuple[Frame, ...]:
    """The frames of the thread that took the signal, innermost first, without those of ours.

    Python's signals reach the main thread; faulthandler calls it "Current thread". Empty where
    it is not shown: faulthandler stops after a hundred threads, and the main one comes last.
    """
    frames: list[Frame] = []
    current = False
    for line in text.splitlines():
        if _THREAD.match(line):
            if current and frames:
                break
            current = line.startswith("Current thread")
            frames = []
        elif current and (match := _FRAME.match(line)):
            frames.append(Frame(match["name"], match["file"], _line_number(match["line"])))
    return _without_ours(frames) if current else ()


def _line_number(text: str) -> int:
    return int(text) if _NUMBER.fullmatch(text) else 0


def _without_ours(frames: Iterable[Frame]) -> tuple[Frame, ...]:
    return tuple(frame for frame in frames if not _OURS.search(frame.file))


def parse_py_spy(text: str) -> tuple[Frame, ...]:
    """The frames of the main thread in what ``py-spy dump`` says, innermost first.

    Where no thread is called so, those of the first.
    """
    threads: list[tuple[str, list[Frame]]] = []
    for line in text.splitlines():
        if _SPY_THREAD.match(line):
            threads.append((line, []))
        elif threads and (match := _SPY_FRAME.match(line)):
            threads[-1][1].append(Frame(match["name"], match["file"], int(match["line"] or 0)))
    named = [frames for title, frames in threads if title.endswith('"MainThread"')]
    for frames in (*named, *(frames for _, frames in threads)):
        if found := _without_ours(frames):
            return found
    return ()


# --- asking -------------------------------------------------------------------------------------


async def dump(
    handlers: Sequence[SubprocessHandler], on_helper: Callable[[int], None]
) -> dict[int, Stack]:
    """The stacks of all those workers that run, and a copy of each in its ``stacks.txt``.

    Bounded: about two seconds, and five more where py-spy is used. A worker that ends meanwhile
    is left out.

    Args:
        handlers: the workers.
        on_helper: called with the pid of each process that is started for this.
    """
    spies = _PySpies(on_helper)
    running = [handler for handler in handlers if handler.running]
    found = await asyncio.gather(*(_one(handler, spies) for handler in running))
    return {stack.local_rank: stack for stack in found if stack is not None}


async def _one(handler: SubprocessHandler, spies: _PySpies) -> Stack | None:
    looking = asyncio.ensure_future(_best(handler, spies))
    ended = asyncio.ensure_future(handler.wait_exit())
    try:
        await asyncio.wait({looking, ended}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ended.cancel()
        looking.cancel()
        # A helper process that has just been killed is still to be reaped.
        await asyncio.wait({looking, ended})
    if looking.cancelled():
        return None  # the worker has ended: there is nothing left to look at
    try:
        return looking.result()
    except (OSError, RuntimeError):
        # No descriptor or no thread is left: not knowing where it is must not keep a group from
        # being ended.
        return None


async def _best(handler: SubprocessHandler, spies: _PySpies) -> Stack | None:
    path = handler.plan.env.get(STACKS_VARIABLE) or ""
    rank, said = handler.local_rank, ""
    # A worker may be a shell that runs the program: the program is then in its session.
    armed = await asyncio.to_thread(_armed, handler.pid, path) if path else None
    if armed is not None:
        await asyncio.to_thread(_append, path, _title("faulthandler", armed.pid))
        said = await _by_faulthandler(handler, armed, path)
        if frames := parse_faulthandler(said):
            return Stack(rank, frames, said, "faulthandler")
    text = await spies.ask(handler.pid)
    frames = parse_py_spy(text)
    if not frames:
        text = await asyncio.to_thread(_by_kernel, handler.pid)
    if not text:
        return None
    source = "py-spy" if frames else "/proc"
    if path:
        await asyncio.to_thread(_append, path, _title(source, handler.pid) + _ended(text))
    # The kernel's line comes first, for the summary; what faulthandler said is in the file.
    return Stack(rank, frames, _ended(text) + said, source)


def _title(source: str, pid: int) -> str:
    return f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}, process {pid}, by {source}\n"


def _ended(text: str) -> str:
    return text if text.endswith("\n") else f"{text}\n"


def _armed(leader: int, path: str) -> procfs.ProcessEntry | None:
    """The process of this worker that answers the signal by writing into the file at `path`.

    It catches the signal and has that very file open: a program that uses the signal for
    something of its own, or has closed all its descriptors, is left in peace.
    """
    entry = procfs.read_entry(leader)
    if entry is not None and _answers(entry, path):
        return entry
    try:
        os.stat(path)
    except OSError:
        return None
    others = [e for e in procfs.entries() if e.session == leader and e.pid != leader]
    others.sort(key=lambda entry: (entry.start_ticks, entry.pid))
    return next((entry for entry in others if _answers(entry, path)), None)


def _answers(entry: procfs.ProcessEntry, path: str) -> bool:
    return entry.alive and _catches(entry.pid, STACKS_SIGNAL) and _has_open(entry.pid, path)


def _catches(pid: int, sig: int) -> bool:
    """Whether the process has a handler for the signal (``SigCgt`` in proc(5))."""
    for line in procfs.read_text(f"/proc/{pid}/status").splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (sig - 1) & 1)
    return False


def _has_open(pid: int, path: str) -> bool:
    folder = f"/proc/{pid}/fd"
    try:
        wanted = os.stat(path)
        return any(_is_same(f"{folder}/{name}", wanted) for name in os.listdir(folder))
    except OSError:
        return False


def _is_same(link: str, wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(link), wanted)
    except OSError:
        return False  # closed meanwhile


async def _by_faulthandler(
    handler: SubprocessHandler, armed: procfs.ProcessEntry, path: str
) -> str:
    """Ask for a dump and read it.

    faulthandler says not when it has finished, so this looks until the file has grown and then
    stayed as it is for a moment: a bounded poll, on request only.
    """
    before = _size(path)
    try:
        if not _send(handler, armed):
            return ""
    except OSError:
        return ""
    loop = asyncio.get_running_loop()
    end, size = loop.time() + _DUMP_LIMIT_S, before
    while loop.time() < end:
        await asyncio.sleep(_QUIET_S)
        last, size = size, _size(path)
        if size == last > before:
            break
    return await asyncio.to_thread(_read_from, path, before)


def _send(handler: SubprocessHandler, armed: procfs.ProcessEntry) -> bool:
    if armed.pid == handler.pid:
        # Remembered as ours: it could end a program that replaced its handlers just now.
        return handler.running and handler.send_signal(STACKS_SIGNAL, group=False)
    return procfs.send_to_process(armed, STACKS_SIGNAL)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _open_regular(path: str, flags: int) -> int:
    """The worker may have put anything in its place: a pipe must not hold us up.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"{path} is no regular file")
    return fd


def _read_from(path: str, start: int) -> str:
    """What has been written since, its end if it is too long: the main thread comes last."""
    try:
        with open(_open_regular(path, os.O_RDONLY), "rb") as file:
            file.seek(max(start, os.fstat(file.fileno()).st_size - _MAX_BYTES))
            return file.read(_MAX_BYTES).decode(errors="replace")
    except OSError:
        return ""


def _append(path: str, text: str) -> None:
    try:
        with open(_open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "wb") as file:
            file.write(text.encode(errors="backslashreplace"))
    except OSError:
        pass  # a full disk: the caller has the text in its hands, and in the report


class _PySpies:
    """``py-spy dump`` for one round of questions, of bounded length, a few at a time."""

    def __init__(self, on_helper: Callable[[int], None]) -> None:
        self._on_helper = on_helper
        self._end_s = asyncio.get_running_loop().time() + _DUMP_LIMIT_S + _PY_SPY_LIMIT_S
        self._free = asyncio.Semaphore(_PY_SPIES_AT_ONCE)
        self._program: str | None = None
        self._looked = False

    async def ask(self, pid: int) -> str:
        """What it says about a process; "" where it is not installed or may not look."""
        if not self._looked:
            self._looked, self._program = True, find_py_spy()
        if self._program is None:
            return ""
        argv = (self._program, "dump", "--nonblocking", "--pid", str(pid))
        try:
            async with asyncio.timeout_at(self._end_s), self._free:
                return await _output_of(argv, self._on_helper)
        except (OSError, TimeoutError):
            return ""


def find_py_spy() -> str | None:
    """py-spy beside our interpreter, where ``pip install asupervise[stacks]`` puts it, or on PATH.

    A virtual environment that is not activated is not on PATH.
    """
    folders = (os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath))
    return shutil.which("py-spy", path=os.pathsep.join(filter(None, folders)))


async def _output_of(argv: tuple[str, ...], on_start: Callable[[int], None]) -> str:
    """What a short-lived command prints; "" if it fails. Where this is cancelled, it is killed."""
    exits: list[Exit] = []
    ended = asyncio.Event()

    def on_exit(exit: Exit) -> None:
        exits.append(exit)
        ended.set()

    with tempfile.TemporaryFile() as output:
        child = await spawn(
            argv,
            on_exit=on_exit,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        on_start(child.pid)
        try:
            await ended.wait()
        finally:
            if not exits:
                await _kill(child, ended)
        output.seek(0)
        return output.read(_MAX_BYTES).decode(errors="replace") if exits[0].code == 0 else ""


async def _kill(child: Child, ended: asyncio.Event) -> None:
    """Kill it and wait until it is reaped; no longer where it cannot die."""
    with suppress(ProcessLookupError):  # ended just now
        os.kill(child.pid, signal.SIGKILL)
    try:
        async with asyncio.timeout(_DUMP_LIMIT_S):
            await ended.wait()
    except TimeoutError:
        child.abandon()


def _by_kernel(pid: int) -> str:
    """State, wait channel and kernel stack (the last for root only), as far as they are told."""
    entry = procfs.read_entry(pid)
    if entry is None or not entry.alive:
        return ""
    channel = procfs.wait_channel(pid)
    head = f"state {entry.state}" + (f", waiting in {channel}" if channel else "")
    return f"{head} (process {entry.name})\n{procfs.read_text(f'/proc/{pid}/stack')}"
