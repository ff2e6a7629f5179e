"""From real workers to the console, end to end: nothing lost, torn, doubled or held up."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from asupervise import (
    DefaultLogsSpecs,
    LogsSpecs,
    RunProcsResult,
    Std,
    start_processes,
    streaming,
)
from asupervise.logs import LogsDest
from asupervise.plan import GroupPlan, WorkerPlan
from asupervise.streaming import FilteredLog, open_streams
from asupervise.tailing import Tailer
from asupervise.watches import InotifyWatches

ROOT = Path(__file__).resolve().parent.parent
CEILING_S = 40.0
PYTHON = (sys.executable, "-I", "-S", "-c")

pytestmark = pytest.mark.usefixtures("own_temporary_folder")


def starting(*scripts: str, specs: LogsSpecs | None = None, **options: Any) -> Any:
    """A group of one shell script a rank, with stdout teed."""
    return start_processes(
        "w",
        ["/bin/sh", "-c"],
        {rank: (script,) for rank, script in enumerate(scripts)},
        {rank: {} for rank in range(len(scripts))},
        specs if specs is not None else DefaultLogsSpecs(tee=Std.OUT),
        **options,
    )


async def run(*scripts: str, **options: Any) -> RunProcsResult:
    async with asyncio.timeout(CEILING_S), starting(*scripts, **options) as ctx:
        result = await ctx.wait()
    assert isinstance(result, RunProcsResult)
    return result


@contextmanager
def shown_in(path: Path) -> Iterator[None]:
    """Both streams go to one file, as with ``> path 2>&1``."""
    with (
        open(path, "w") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        yield


class Reader:
    """The reading end of a pipe that is our console."""

    def __init__(self) -> None:
        self.fd, writing = os.pipe()
        self.stream = os.fdopen(writing, "w")
        self.data = b""

    def close_writing(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.close()

    def close(self) -> None:
        self.close_writing()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def read_rest(self) -> bytes:
        """All that is still to come; the writing end must be closed or be closed soon."""
        while piece := os.read(self.fd, 1 << 20):
            self.data += piece
        return self.data

    async def until_shown(self, text: bytes) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        async with asyncio.timeout(CEILING_S):
            while text not in self.data:
                ready.clear()
                loop.add_reader(self.fd, ready.set)
                await ready.wait()
                loop.remove_reader(self.fd)
                self.data += os.read(self.fd, 1 << 16)


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.close()


def drained(reader: Reader) -> threading.Thread:
    """Reads in a thread of its own, as another process would, until the end."""
    thread = threading.Thread(target=reader.read_rest)
    thread.start()
    return thread


async def exited(pid: int) -> None:
    """Wait until a process has ended, whoever else waits for it."""
    pidfd = os.pidfd_open(pid)
    try:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, ended.set)
        async with asyncio.timeout(CEILING_S):
            await ended.wait()
        loop.remove_reader(pidfd)
    finally:
        os.close(pidfd)


# --- every line, once, whole, in order ----------------------------------------------------------

CHATTER = rb"""
import os, random, sys, time

def lines(rank, stream, count):
    "What a worker writes: text as written, and as it is to be shown."
    tails = [b"", b" caf\xc3\xa9", b" \xff\xfe\x80", b" \0", b" " + b"x" * 150, b"\r", b" \xc3"]
    for number in range(count):
        text = b"%s%d:%06d" % (stream, rank, number) + tails[number % 7]
        yield (b"10%%\r %d%%\r" % (number % 90) + text if number % 5 == 0 else text), text

def write(rank, count, seed):
    dice = random.Random(seed)
    held = {1: b"", 2: b""}
    todo = {1: lines(rank, b"out", count), 2: lines(rank, b"err", count)}
    while todo:
        fd = dice.choice(list(todo))
        batch = [text for _, (text, _) in zip(range(dice.randrange(1, 400)), todo[fd])]
        if not batch:
            os.write(fd, held[fd])
            del todo[fd]
            continue
        held[fd] += b"\n".join(batch) + b"\n"
        # In mid-line, wherever that is, and a pause there.
        cut = dice.randrange(len(held[fd]) + 1)
        os.write(fd, held[fd][:cut])
        held[fd] = held[fd][cut:]
        if dice.random() < 0.2:
            time.sleep(dice.random() * 0.004)
"""


def parsed(data: bytes, ranks: int) -> dict[bytes, list[bytes]]:
    """By stream and rank, as in ``out0``, the lines of the console without their prefix."""
    found: dict[bytes, list[bytes]] = {}
    for line in data.split(b"\n")[:-1]:
        prefix, text = line[:5], line[5:]
        assert prefix[:2] + prefix[3:] == b"[w]:", line[:80]
        assert text[3:4] == prefix[2:3], line[:80]
        found.setdefault(text[:4], []).append(text)
    return found


async def test_each_line_once_whole_in_order(tmp_path: Path) -> None:
    """Four ranks, 100,000 lines on each of two streams at the same time, all to one place."""
    ranks, count = 4, 100_000
    namespace: dict[str, Any] = {}
    exec(CHATTER, namespace)
    script = CHATTER.decode("latin-1") + "\nwrite(int(sys.argv[1]), int(sys.argv[2]), sys.argv[1])"
    program = tmp_path / "chatter.py"
    program.write_text("# -*- coding: latin-1 -*-\n" + script, encoding="latin-1")
    with shown_in(tmp_path / "console"):
        async with start_processes(
            "w",
            [sys.executable, "-I", "-S", str(program)],
            {rank: (rank, count) for rank in range(ranks)},
            {rank: {} for rank in range(ranks)},
            DefaultLogsSpecs(str(tmp_path / "logs"), tee=Std.ALL),
        ) as ctx:
            result = await ctx.wait()
    assert result is not None
    assert not result.is_failed()
    assert result.warnings == ()
    found = parsed((tmp_path / "console").read_bytes(), ranks)
    assert len(found) == 2 * ranks
    for rank in range(ranks):
        for stream in (b"out", b"err"):
            wanted = [shown for _, shown in namespace["lines"](rank, stream, count)]
            assert found[b"%s%d" % (stream, rank)] == wanted


@pytest.mark.parametrize("way", ["inotify", "polling"])
@pytest.mark.parametrize("consumer", ["pipe", "file", "memory"])
async def test_all_is_out_before_wait_returns(
    tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch, way: str, consumer: str
) -> None:
    if way == "polling":

        def refuse(*_: object) -> None:
            raise OSError("no inotify")

        monkeypatch.setattr(InotifyWatches, "__init__", refuse)
    file = open(tmp_path / "console", "w")  # noqa: SIM115
    memory = io.StringIO()
    stream: Any = {"pipe": reader.stream, "file": file, "memory": memory}[consumer]
    with file, contextlib.redirect_stdout(stream):
        thread = drained(reader)
        result = await run(*[f"seq {rank}000000 {rank}060000; printf last" for rank in (1, 2, 3)])
        reader.close_writing()
        thread.join()
    assert not result.is_failed()
    out = {
        "pipe": reader.data,
        "file": (tmp_path / "console").read_bytes(),
        "memory": memory.getvalue().encode(),
    }[consumer]
    for rank in (1, 2, 3):
        prefix = b"[w%d]:" % (rank - 1)
        lines = [line[5:] for line in out.splitlines() if line.startswith(prefix)]
        numbers = [b"%d" % number for number in range(rank * 1_000_000, rank * 1_000_000 + 60_001)]
        assert lines == [*numbers, b"last"]


async def test_a_line_in_pieces_is_one_line(tmp_path: Path) -> None:
    """torch prints ``[w0]:hel[w0]:lo``."""
    with shown_in(tmp_path / "console"):
        await run("printf hel; sleep 0.03; printf lo; sleep 0.03; echo .")
    assert (tmp_path / "console").read_bytes() == b"[w0]:hello.\n"


async def test_two_streams_to_one_place(tmp_path: Path) -> None:
    with shown_in(tmp_path / "console"):
        await run("printf out; echo err >&2", specs=DefaultLogsSpecs(tee=Std.ALL))
    lines = sorted((tmp_path / "console").read_bytes().splitlines())
    assert lines == [b"[w0]:err", b"[w0]:out"]


async def test_the_prefix_is_the_callers(tmp_path: Path) -> None:
    with shown_in(tmp_path / "console"):
        await run("echo a", "echo b", log_line_prefixes={0: "é> "})
    lines = sorted((tmp_path / "console").read_text().splitlines())
    assert lines == ["[w1]:b", "é> a"]


async def test_ranks_that_are_not_shown_have_their_files(tmp_path: Path) -> None:
    specs = DefaultLogsSpecs(str(tmp_path / "logs"), tee=Std.ALL, local_ranks_filter={1})
    with shown_in(tmp_path / "console"):
        result = await run("echo a; echo b >&2", "echo c; echo d >&2", specs=specs)
    lines = sorted((tmp_path / "console").read_bytes().splitlines())
    assert lines == [b"[w1]:c", b"[w1]:d"]
    assert Path(result.stdouts[0]).read_text() == "a\n"
    assert Path(result.stderrs[0]).read_text() == "b\n"


async def test_two_groups_share_a_console(tmp_path: Path) -> None:
    with shown_in(tmp_path / "console"):
        await asyncio.gather(*(run("seq 1000; printf end") for _ in range(3)))
    data = (tmp_path / "console").read_bytes()
    wanted = [*(b"[w0]:%d" % number for number in range(1, 1001)), b"[w0]:end"]
    assert sorted(data.splitlines()) == sorted(wanted * 3)


UNDER_UVLOOP = """
import sys, uvloop
from asupervise import DefaultLogsSpecs, Std, start_processes

async def run():
    specs = DefaultLogsSpecs(tee=Std.OUT)
    args = {0: (100_000,), 1: (10,)}
    async with start_processes("w", ["seq"], args, {0: {}, 1: {}}, specs) as ctx:
        result = await ctx.wait()
        sys.exit(result.is_failed() or result.warnings != ())

uvloop.run(run())
"""


def test_under_uvloop() -> None:
    # In a process of its own: uvloop keeps a pipe of its own for signals.
    done = subprocess.run(
        [sys.executable, "-c", UNDER_UVLOOP], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for rank, count in ((b"[w0]:", 100_000), (b"[w1]:", 10)):
        lines = [line for line in done.stdout.splitlines() if line.startswith(rank)]
        assert lines == [rank + b"%d" % number for number in range(1, count + 1)]


def test_in_another_thread(tmp_path: Path) -> None:
    with shown_in(tmp_path / "console"):
        thread = threading.Thread(target=asyncio.run, args=(run("echo a"),))
        thread.start()
        thread.join()
    assert (tmp_path / "console").read_bytes() == b"[w0]:a\n"


async def test_what_ends_at_once_is_shown(tmp_path: Path) -> None:
    """Before anybody has begun to watch."""
    with shown_in(tmp_path / "console"):
        await run(*["echo a"] * 16)
    lines = sorted((tmp_path / "console").read_bytes().splitlines())
    assert lines == sorted(b"[w%d]:a" % rank for rank in range(16))


async def test_what_ends_before_it_is_watched_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_SOON_S", CEILING_S)
    monkeypatch.setattr(streaming, "_LATEST_S", CEILING_S)

    def refuse(*_: object) -> None:
        raise AssertionError("watched")

    monkeypatch.setattr(InotifyWatches, "__init__", refuse)
    with shown_in(tmp_path / "console"):
        await run("echo a", "echo b; true", "true")
    lines = sorted((tmp_path / "console").read_bytes().splitlines())
    assert lines == [b"[w0]:a", b"[w1]:b"]


async def test_the_first_is_watched_while_others_are_still_being_started(
    reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_SOON_S", CEILING_S)
    monkeypatch.setattr(streaming, "_LATEST_S", 0.0)
    with contextlib.redirect_stdout(reader.stream):
        async with starting("echo a; exec sleep 60", "exec sleep 60") as ctx:
            await reader.until_shown(b"[w0]:a\n")
            await ctx.close()


async def test_many_are_watched_while_the_loop_goes_round(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_WATCHED_AT_ONCE", 2)
    with contextlib.redirect_stdout(reader.stream):
        async with starting(*["echo a; exec sleep 60"] * 5) as ctx:
            for rank in range(5):
                await reader.until_shown(b"[w%d]:a\n" % rank)
            await ctx.close()


async def test_a_group_begins_while_the_last_one_ends(reader: Reader) -> None:
    """It has to be woken although the other one has let go of the watches that they share."""
    with contextlib.redirect_stdout(reader.stream):
        async with starting("echo a; exec sleep 60") as old:
            await reader.until_shown(b"[w0]:a\n")
            closing = asyncio.create_task(old.close())
            async with starting("echo b; exec sleep 60") as new:
                await reader.until_shown(b"[w0]:b\n")
                await closing
                await new.close()


LOADED_BY_A_RUN = """
import asyncio, os, sys, threading
from asupervise import DefaultLogsSpecs, Std, start_processes

class Finder:
    def find_spec(self, name, path, target=None):
        if name in ("asyncinotify", "anyio", "aiofiles"):
            by = "loop" if threading.current_thread() is threading.main_thread() else "thread"
            print(name, by, file=sys.stderr)

sys.meta_path.insert(0, Finder())

async def run():
    specs = DefaultLogsSpecs(tee=Std.OUT)
    reading, writing = os.pipe()
    sys.stdout = os.fdopen(writing, "w")
    os.set_blocking(reading, False)
    shown = asyncio.Event()
    asyncio.get_running_loop().add_reader(reading, shown.set)
    async with start_processes("w", ["sleep"], {0: (60,)}, {0: {}}, specs):
        async with start_processes(
            "w", ["sh", "-c"], {0: ("echo a; exec sleep 60",)}, {0: {}}, specs
        ):
            await shown.wait()

asyncio.run(run())
"""


def test_what_a_run_with_little_output_loads() -> None:
    """The watches in a thread, because that takes 15 ms; aiofiles not before it is needed."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED_BY_A_RUN], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == b"anyio loop\nasyncinotify thread\n"


async def test_silent_workers_cost_no_thread_and_no_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = asyncio.Semaphore(0)
    arm = InotifyWatches.arm

    def counted(self: InotifyWatches, who: Any) -> None:
        arm(self, who)
        watched.release()

    monkeypatch.setattr(InotifyWatches, "arm", counted)
    before = threading.active_count()
    async with starting(*["exec sleep 60"] * 8, specs=DefaultLogsSpecs(tee=Std.ALL)) as ctx:
        async with asyncio.timeout(CEILING_S):
            for _ in range(16):
                await watched.acquire()
        assert threading.active_count() <= before
        assert not [task for task in asyncio.all_tasks() if "Tailer" in repr(task)]
        await ctx.close()
    assert not [thread for thread in threading.enumerate() if "asupervise-logs" in thread.name]


async def test_who_has_ended_and_left_nobody_behind_is_not_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has said is shown all the same: its files are looked at in the end."""
    armed: list[str] = []
    arm = InotifyWatches.arm

    def noted(self: InotifyWatches, who: Any) -> None:
        armed.append(Path(who.path).parent.name)
        arm(self, who)

    monkeypatch.setattr(InotifyWatches, "arm", noted)
    monkeypatch.setattr(streaming, "_SOON_S", 0.3)
    go = tmp_path / "go"
    os.mkfifo(go)
    with shown_in(tmp_path / "console"):
        async with starting("echo a", f"read _ < {go}; echo b", "sleep 0.5 & exit 0") as ctx:
            async with asyncio.timeout(CEILING_S):
                while not {"1", "2"} <= set(armed):
                    await asyncio.sleep(0.01)
            go.write_text("\n")
            await ctx.wait()
    assert "0" not in armed
    shown = (tmp_path / "console").read_text().splitlines()
    assert sorted(shown) == ["[w0]:a", "[w1]:b"]


# --- prompts ------------------------------------------------------------------------------------


async def test_a_prompt_is_shown_and_answered(
    tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a debugger's: without a newline, waiting for our standard input."""
    answers, questions = os.pipe()
    saved = os.dup(0)
    os.dup2(answers, 0)
    try:
        with contextlib.redirect_stdout(reader.stream):
            async with starting('printf "(Pdb) "; read x; echo "got $x"', stdin=0) as ctx:
                await reader.until_shown(b"[w0]:(Pdb) ")
                os.write(questions, b"next\n")
                await reader.until_shown(b"got next\n")
                await ctx.wait()
    finally:
        os.dup2(saved, 0)
        for fd in (saved, answers, questions):
            os.close(fd)
    reader.close_writing()
    assert reader.read_rest() == b"[w0]:(Pdb) got next\n"


async def test_the_rank_that_can_be_answered_is_shown_sooner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = {}

    class Recording(Tailer):
        def __init__(self, path: str, *args: Any, **options: Any) -> None:
            super().__init__(path, *args, **options)
            prompts[Path(path).parent.name] = options["prompts"]

    monkeypatch.setattr(streaming, "Tailer", Recording)
    with shown_in(tmp_path / "console"):
        await run("echo a", "echo b", stdin=1)
    assert prompts == {"0": False, "1": True}


async def test_a_prompt_that_is_interrupted(tmp_path: Path, reader: Reader) -> None:
    go = [tmp_path / "go0", tmp_path / "go1"]
    for fifo in go:
        os.mkfifo(fifo)
    with contextlib.redirect_stdout(reader.stream):
        async with starting(
            f"printf 'name? '; read x < {go[0]}; echo Ada", f"read x < {go[1]}; echo hello"
        ) as ctx:
            await reader.until_shown(b"[w0]:name? ")
            go[1].write_text("\n")
            await reader.until_shown(b"hello\n")
            go[0].write_text("\n")
            await ctx.wait()
    reader.close_writing()
    assert reader.read_rest() == b"[w0]:name? \n[w1]:hello\n[w0]:name? Ada\n"


# --- consumers ----------------------------------------------------------------------------------


async def test_nobody_reads_for_a_while(reader: Reader) -> None:
    """The worker finishes and the event loop goes round, while the pipe is full."""
    with contextlib.redirect_stdout(reader.stream):
        async with starting("seq 1000000 2000000", "seq 10") as ctx:
            waiting = asyncio.create_task(ctx.wait())
            for pid in ctx.pids().values():
                with contextlib.suppress(ProcessLookupError):
                    await exited(pid)
            for _ in range(1000):
                await asyncio.sleep(0)
            assert not waiting.done()
            thread = drained(reader)
            result = await waiting
            reader.close_writing()
            await asyncio.to_thread(thread.join)
    assert result is not None
    assert not result.is_failed()
    lines = [line[5:] for line in reader.data.splitlines() if line.startswith(b"[w0]:")]
    assert lines == [b"%d" % number for number in range(1_000_000, 2_000_001)]


async def test_a_reader_that_goes_away(reader: Reader, tmp_path: Path) -> None:
    """``| head``: the workers go on, the files are complete, and the result says so."""
    go = tmp_path / "go"
    os.mkfifo(go)
    specs = DefaultLogsSpecs(str(tmp_path / "logs"), tee=Std.OUT)
    with contextlib.redirect_stdout(reader.stream):
        async with starting(f"echo first; read x < {go}; seq 100000", specs=specs) as ctx:
            await reader.until_shown(b"first\n")
            os.close(reader.fd)
            reader.fd = -1
            go.write_text("\n")
            result = await ctx.wait()
        reader.close_writing()
    assert result is not None
    assert not result.is_failed()
    (warning,) = result.warnings
    assert warning.startswith("stdout: ")
    assert "Broken pipe" in warning
    assert Path(result.stdouts[0]).read_text().endswith("\n100000\n")


async def test_an_ended_group_does_not_wait_for_a_reader_who_has_stopped(reader: Reader) -> None:
    """Cancelled as a whole (the loop shuts down): no thread is left in a write."""
    before = threading.active_count()

    async def main() -> None:
        async with starting("seq 1000000") as ctx:
            await ctx.wait()

    with contextlib.redirect_stdout(reader.stream):
        await asyncio.to_thread(_run_and_cancel, main)
    reader.close_writing()
    # Told to end, they do so by themselves: nobody waits for a write that may never be over.
    for thread in threading.enumerate():
        if thread.name.startswith("asupervise"):
            await asyncio.to_thread(thread.join, 30)
    assert threading.active_count() <= before + 1  # asyncio's own, of `to_thread`
    reader.read_rest()


def _run_and_cancel(main: Callable[[], Any]) -> None:
    async def shut_down() -> None:
        task = asyncio.create_task(main())
        # Until the pipe is full and somebody waits for room in it.
        while threading.active_count() < 3:
            await asyncio.sleep(0)
        for _ in range(1000):
            await asyncio.sleep(0)
        for other in asyncio.all_tasks() - {asyncio.current_task()}:
            other.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(shut_down())


async def test_capsys(capsys: pytest.CaptureFixture[str]) -> None:
    await run("echo a; printf '\\303\\251 \\377'", specs=DefaultLogsSpecs(tee=Std.ALL))
    assert capsys.readouterr().out == "[w0]:a\n[w0]:é \\xff\n"


async def test_capfd(capfd: pytest.CaptureFixture[str]) -> None:
    print("first")
    await run("echo a; echo b >&2", specs=DefaultLogsSpecs(tee=Std.ALL))
    assert capfd.readouterr() == ("first\n[w0]:a\n", "[w0]:b\n")


async def test_redirected_to_memory() -> None:
    memory = io.StringIO()
    with contextlib.redirect_stdout(memory):
        await run("echo a; printf '\\377'")
    assert memory.getvalue() == "[w0]:a\n[w0]:\\xff\n"


async def test_no_stdout_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    result = await run("echo a")
    monkeypatch.undo()
    assert not result.is_failed()
    assert result.warnings[0].startswith("stdout: ")


async def test_a_stdout_that_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open(tmp_path / "console", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
    result = await run("echo a")
    monkeypatch.undo()
    assert not result.is_failed()
    assert "closed" in result.warnings[0]


# --- files that change under us -----------------------------------------------------------------


async def test_a_worker_that_truncates_its_log(reader: Reader, tmp_path: Path) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    specs = DefaultLogsSpecs(str(tmp_path / "logs"), tee=Std.OUT)
    with contextlib.redirect_stdout(reader.stream):
        async with starting(
            f"seq 100; read x < {go}; : > /proc/self/fd/1; echo after", specs=specs
        ) as ctx:
            await reader.until_shown(b"[w0]:100\n")
            go.write_text("\n")
            result = await ctx.wait()
        reader.close_writing()
    assert reader.read_rest() == b"".join(b"[w0]:%d\n" % i for i in range(1, 101)) + b"[w0]:after\n"
    assert result is not None
    assert Path(result.stdouts[0]).read_text() == "after\n"


async def test_a_log_that_is_rotated(reader: Reader, tmp_path: Path) -> None:
    """Moved away, a new one in its place, twice: the worker's descriptor goes with the first."""
    # One for each time: a reader that is early could still find the writer of the time before.
    go = {number: tmp_path / f"go{number}" for number in (1, 2)}
    for fifo in go.values():
        os.mkfifo(fifo)
    specs = DefaultLogsSpecs(str(tmp_path / "logs"), tee=Std.OUT)
    with contextlib.redirect_stdout(reader.stream):
        async with starting(
            f"echo a; read x < {go[1]}; echo b; read x < {go[2]}; echo c", specs=specs
        ) as ctx:
            await reader.until_shown(b"[w0]:a\n")
            log = Path(ctx.stdouts[0])
            for number in (1, 2):
                log.rename(f"{log}.{number}")
                log.write_text(f"new {number}\n")
                await reader.until_shown(b"[w0]:new %d\n" % number)
                go[number].write_text("\n")
                await reader.until_shown(b"[w0]:%c\n" % b" bc"[number])
            await ctx.wait()
        reader.close_writing()
    lines = reader.read_rest().splitlines()
    assert lines == [b"[w0]:a", b"[w0]:new 1", b"[w0]:b", b"[w0]:new 2", b"[w0]:c"]


async def test_a_log_that_its_worker_removes(tmp_path: Path) -> None:
    specs = DefaultLogsSpecs(str(tmp_path / "logs"), tee=Std.OUT)
    with shown_in(tmp_path / "console"):
        result = await run(
            "echo a; rm $(readlink /proc/self/fd/1); echo b",
            specs=specs,
        )
    assert not result.is_failed()
    # Either it was open before, and is followed to its end, or the result says what is missing.
    if not result.warnings:
        assert (tmp_path / "console").read_bytes() == b"[w0]:a\n[w0]:b\n"


def plan_of(log: Path) -> GroupPlan:
    worker = WorkerPlan(0, ("true",), {}, stdout=str(log), tee_stdout=True, prefix="[w0]:")
    logs = LogsDest(stdouts={0: str(log)}, stderrs={0: ""}, tee_stdouts={0: str(log)})
    return GroupPlan("w", (worker,), logs)


async def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "missing.log")
    warnings: list[str] = []
    with shown_in(tmp_path / "console"):
        async with open_streams(plan, warnings) as streams:
            streams.follow(plan.workers[0])
    (warning,) = warnings
    assert "missing.log: no longer shown" in warning


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
async def test_tailers_that_are_cancelled_before_their_first_step(tmp_path: Path) -> None:
    """As when the loop is shut down: asyncio then runs nothing of them."""
    log = tmp_path / "stdout.log"
    log.write_bytes(b"a\n")
    plan, warnings = plan_of(log), list[str]()
    others = asyncio.all_tasks()
    with shown_in(tmp_path / "console"):
        async with open_streams(plan, warnings) as streams:
            streams.follow(plan.workers[0])
            (tailer,) = streams._sources
            streams.stop()
            for task in asyncio.all_tasks() - others:
                task.cancel()
    assert tailer.fd < 0
    # anyio's wrapper of the task warns, when it goes.
    gc.collect()


async def test_a_log_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails: the group goes on, and the result says what is not shown."""
    log = tmp_path / "stdout.log"
    log.write_bytes(b"a\n")

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    plan, warnings = plan_of(log), list[str]()
    with shown_in(tmp_path / "console"):
        async with open_streams(plan, warnings) as streams:
            streams.follow(plan.workers[0])
            monkeypatch.setattr("asupervise.tailing.Tailer._read", fail)
    (warning,) = warnings
    assert warning == f"{log}: no longer shown: [Errno 5] Input/output error"


async def test_no_descriptor_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the start fails, with the one error, and nothing is left (see conftest.py)."""
    opened = 0
    real = os.open

    def opening(path: Any, flags: int, *args: Any, **options: Any) -> int:
        nonlocal opened
        if str(path).endswith(".log") and not flags & os.O_WRONLY:
            opened += 1
            if opened > 9:
                raise OSError(errno.EMFILE, "Too many open files", path)
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", opening)
    with shown_in(tmp_path / "console"), pytest.raises(OSError, match="Too many open files"):
        await run(*["sleep 60"] * 16, specs=DefaultLogsSpecs(str(tmp_path / "logs"), tee=Std.ALL))


# --- filters ------------------------------------------------------------------------------------


def filtered(result: RunProcsResult, stream: str = "stdout") -> list[bytes]:
    folder = Path(result.stdouts[0]).parent.parent
    path = folder / f"filtered_{stream}.log"
    assert path.stat().st_mode & 0o777 == 0o600
    return sorted(path.read_bytes().splitlines())


@pytest.mark.parametrize(
    ("needles", "wanted"),
    [
        (["loss"], [b"[w0]:loss 1", b"[w1]:a loss", b"[w1]:loss 2"]),
        (["loss", "los", "oss 2"], [b"[w0]:loss 1", b"[w1]:a loss", b"[w1]:loss 2"]),
        (["a", "2"], [b"[w0]:caf\xc3\xa9", b"[w1]:a loss", b"[w1]:loss 2"]),
        (["é"], [b"[w0]:caf\xc3\xa9"]),
        ([""], [b"[w0]:caf\xc3\xa9", b"[w0]:loss 1", b"[w1]:a loss", b"[w1]:end", b"[w1]:loss 2"]),
        (["none"], []),
    ],
)
async def test_filters(tmp_path: Path, needles: list[str], wanted: list[bytes]) -> None:
    specs = DefaultLogsSpecs(str(tmp_path / "logs"), tee={0: Std.OUT, 1: Std.OUT, 2: Std.NONE})
    with shown_in(tmp_path / "console"):
        result = await run(
            "echo loss 1; echo café",
            "echo a loss; echo loss 2; printf end",
            "echo loss of a rank that is not teed",
            specs=specs,
            duplicate_stdout_filters=needles,
        )
    assert filtered(result) == wanted
    assert result.warnings == ()


async def test_filters_of_both_streams(tmp_path: Path) -> None:
    specs = DefaultLogsSpecs(str(tmp_path / "logs"), tee=Std.ALL)
    with shown_in(tmp_path / "console"):
        result = await run(
            "echo a; echo b; echo a >&2; echo b >&2",
            specs=specs,
            duplicate_stdout_filters=["a"],
            duplicate_stderr_filters=["b"],
        )
    assert filtered(result) == [b"[w0]:a"]
    assert filtered(result, "stderr") == [b"[w0]:b"]


@pytest.mark.parametrize("ending", ["echo", "true"])
async def test_a_filter_copies_a_line_too_long_to_be_held(tmp_path: Path, ending: str) -> None:
    specs = DefaultLogsSpecs(str(tmp_path / "logs"), tee=Std.OUT)
    long = "head -c 3000000 /dev/zero | tr '\\0' x"
    with shown_in(tmp_path / "console"):
        result = await run(
            f"{long}; echo no; echo short needle; {long}; printf needle; {long}; {ending}",
            specs=specs,
            duplicate_stdout_filters=["needle"],
        )
    x = b"x" * 3_000_000
    assert filtered(result) == [b"[w0]:short needle", b"[w0]:" + x + b"needle" + x]


async def test_a_filter_whose_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    monkeypatch.setattr(FilteredLog, "__init__", _full)
    with shown_in(tmp_path / "console"):
        result = await run("seq 10", duplicate_stdout_filters=["1"])
    # The console has all of it, and the result says what is missing.
    assert (tmp_path / "console").read_bytes().count(b"\n") == 10
    (warning,) = result.warnings
    assert "filtered_stdout.log: incomplete" in warning
    assert "No space left" in warning


def _full(self: FilteredLog, path: str) -> None:
    self.path, self.broken = path, None
    self._fd = os.open("/dev/full", os.O_WRONLY)
    self._turn = threading.Lock()


# --- a line of 200 MB ---------------------------------------------------------------------------

SUPERVISE_LONG_LINE = """
import asyncio, resource, sys
from asupervise import DefaultLogsSpecs, Std, start_processes

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

async def run(script):
    async with start_processes("w", ["/bin/sh", "-c"], {0: (script,)}, {0: {}},
                               DefaultLogsSpecs(tee=Std.OUT)) as ctx:
        result = await ctx.wait()
        assert result is not None and not result.is_failed() and not result.warnings, result

async def main():
    await run("echo warm")
    before = peak_mib()
    await run("head -c 209715200 /dev/zero | tr '\\\\0' x; echo end; echo more")
    print(peak_mib() - before, file=sys.stderr)

asyncio.run(main())
"""


def test_a_line_of_200_megabytes_is_not_held_in_memory(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISE_LONG_LINE],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        size, rest = 0, b""
        while block := process.stdout.read(1 << 20):
            other = block.translate(None, b"x")
            size += len(block) - len(other)
            rest += other
        errors = process.stderr.read().decode()
    assert process.returncode == 0, errors
    assert size == 209_715_200
    assert rest == b"[w0]:warm\n[w0]:end\n[w0]:more\n"
    assert float(errors) < 40
