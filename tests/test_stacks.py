"""Where each worker is: asked for, before a kill, and what the report makes of it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise import (
    ChildFailedError,
    DefaultLogsSpecs,
    PContext,
    Stack,
    Std,
    cleanup,
    procfs,
    stacks,
)
from asupervise import start_processes as start_group
from asupervise.postmortem import fatal_words
from asupervise.procs import StartingProcesses
from asupervise.stacks import Frame, group_equal, odd_one_out, parse_faulthandler, parse_py_spy
from tests.workers import (
    RUNNERS,
    SLEEP,
    STUBBORN,
    Channel,
    by_uvloop,
    gone,
    is_alive,
    start,
)

needs_py_spy = pytest.mark.skipif(
    stacks.find_py_spy() is None, reason="py-spy is not installed (extra `stacks`)"
)

pytestmark = pytest.mark.usefixtures("uvloop_has_its_pipe", "own_temporary_folder")


@pytest.fixture
def no_py_spy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "find_py_spy", lambda: None)


HEAD = """\
import os, re, signal, sys, threading, time
from asupervise import record

def ready():
    with open(os.environ["CHANNEL"], "w") as file:
        file.write(f"ready {os.environ['RANK']} {os.getpid()}\\n")

def wait():
    while True:
        time.sleep(1000)

def work():
    ready()
    wait()
"""
RECORDED = "record(work)()\n"


def python(
    tmp_path: Path, channel: Channel, code: str, nprocs: int = 1, **options: Any
) -> StartingProcesses:
    """A group of the program ``HEAD + code``; its lines are numbered from the end of HEAD."""
    script = tmp_path / "job.py"
    script.write_text(HEAD + textwrap.dedent(code))
    envs = {r: {"RANK": str(r), "CHANNEL": str(channel.path)} for r in range(nprocs)}
    return start_group(
        "t", (sys.executable, str(script)), {r: () for r in range(nprocs)}, envs, **options
    )


async def asleep(pids: Mapping[int, int]) -> None:
    """Wait until these are in their long sleep: ready is said a moment before."""
    for pid in pids.values():
        for _ in range(100):
            if "sleep" in procfs.wait_channel(pid):
                break
            await asyncio.sleep(0.01)


def line_of(text: str) -> int:
    return HEAD.splitlines().index(text) + 1


WAITS = f"in wait (job.py:{line_of('        time.sleep(1000)')}) < work (job.py:"


def file_of(ctx: PContext, rank: int = 0) -> str:
    return (Path(ctx.error_files[rank]).parent / "stacks.txt").read_text()


def report_of(result: Any) -> str:
    with pytest.raises(ChildFailedError) as caught:
        result.raise_for_failure("t")
    return str(caught.value)


# --- parsing ------------------------------------------------------------------------------------

BY_FAULTHANDLER = """\
Thread 0x00007f2a (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait
  File "/job.py", line 3 in helper

Current thread 0x00007f2b [python] (most recent call first):
  File "/job.py", line 9 in all_reduce
  File "/job.py", line ??? in <module>
  File "/venv/asupervise/error_handler.py", line 245 in wrapper

Thread 0x00007f2c (most recent call first):
  File "/job.py", line 5 in other
"""


def test_faulthandler_calls_the_main_thread_current() -> None:
    assert parse_faulthandler(BY_FAULTHANDLER) == (
        Frame("all_reduce", "/job.py", 9),
        Frame("<module>", "/job.py", 0),
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        'Thread 0x1 (most recent call first):\n  File "a", line 1 in b\n...\n',
        "Current thread 0x1 (most recent call first):\n  <no Python frame>\n",
        'Current thread\'s C stack trace (most recent call first):\n  Binary file "x", at y\n',
        'Current thread 0x1 (most recent call first):\n  File "/job.py", li',
    ],
)
def test_faulthandler_without_a_main_thread(text: str) -> None:
    assert parse_faulthandler(text) == ()


BY_PY_SPY = """\
Process 7: python job.py
Python v3.11.7 (/usr/bin/python3.11)

Thread 9 (idle): "helper (x)"
    wait (threading.py:320)
Thread 7 (active+gil): "MainThread"
    match (re/__init__.py:166)
    load_batch (job (1).py:6)
    _start (libc.so)
    wrapper (/venv/asupervise/error_handler.py:245)
"""


def test_py_spy_names_the_main_thread() -> None:
    assert parse_py_spy(BY_PY_SPY) == (
        Frame("match", "re/__init__.py", 166),
        Frame("load_batch", "job (1).py", 6),
        Frame("_start", "libc.so", 0),
    )
    assert parse_py_spy(BY_PY_SPY.replace("MainThread", "x"))[0].name == "wait"
    assert parse_py_spy("Process 7: python\n") == ()


PIECES = st.sampled_from(
    ["Current thread ", "Thread ", "0x1", " (most recent call first):", '  File "', '", line ',
     " in ", "    ", " (", ")", ":", "1", "²", "٣", "9" * 5000, '"MainThread"', "\n", "\r", "\0"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=40).map("".join) | st.text())
def test_no_text_is_too_strange(text: str) -> None:
    for parse in (parse_faulthandler, parse_py_spy):
        for frame in parse(text):
            assert frame.line >= 0
            assert str(frame)


# --- grouping -----------------------------------------------------------------------------------


def stack(rank: int, *names: str, line: int = 1) -> Stack:
    frames = tuple(Frame(name, "/a/job.py", line) for name in names)
    return Stack(rank, frames, "" if names else "state D, waiting in nfs (process x)\n", "py-spy")


def of(*found: Stack) -> dict[int, Stack]:
    return {s.local_rank: s for s in found}


def test_equal_stacks_are_put_together() -> None:
    found = of(*(stack(r, "all_reduce", "main") for r in (2, 0, 1)), stack(3, "load_batch"))
    assert [(ranks, s.summary) for ranks, s in group_equal(found)] == [
        ((0, 1, 2), "in all_reduce (job.py:1) < main (job.py:1)"),
        ((3,), "in load_batch (job.py:1)"),
    ]
    assert group_equal({}) == []


def test_the_summary_has_the_innermost_frames_or_the_kernels_words() -> None:
    assert stack(0, "a", "b", "c", "d").summary == ("in a (job.py:1) < b (job.py:1) < c (job.py:1)")
    assert stack(0).summary == "state D, waiting in nfs (process x)"
    assert str(Frame("f", "libc.so", 0)) == "f (libc.so)"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (of(stack(0, "b"), stack(1, "a"), stack(2, "a")), 0),
        (of(stack(0, "a"), stack(1, "a"), stack(2)), 2),
        (of(stack(0, "a", line=9), stack(1, "a"), stack(2, "a")), 0),
        # Now on this line of the loop and now on that.
        (of(stack(0, "a"), stack(1, "a", line=2), stack(2, "b"), stack(3, "a", line=3)), 2),
        (of(stack(0, "a"), stack(1, "b")), None),
        (of(stack(0, "a"), stack(1, "a"), stack(2, "a")), None),
        (of(stack(0, "a"), stack(1, "a"), stack(2, "b"), stack(3, "b")), None),
        (of(stack(0, "a"), stack(1, "a"), stack(2, "b"), stack(3, "c")), None),
        ({}, None),
    ],
)
def test_who_is_elsewhere(found: Mapping[int, Stack], expected: int | None) -> None:
    assert odd_one_out(found) == expected


# --- asking real workers ------------------------------------------------------------------------


async def test_a_recorded_program_answers_by_faulthandler(
    tmp_path: Path, channel: Channel, no_py_spy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody waits for it where all have answered.
    monkeypatch.setattr(stacks, "_DUMP_LIMIT_S", 1000.0)
    async with python(tmp_path, channel, RECORDED, 3) as ctx:
        await asleep(await channel.pids(3))
        found = await ctx.dump_stacks()
        assert sorted(found) == [0, 1, 2]
        for rank, stack in found.items():
            assert stack.source == "faulthandler"
            assert stack.summary.startswith(WAITS)
            # Our own wrapper is left out.
            assert [frame.name for frame in stack.frames] == ["wait", "work", "<module>"]
            text = file_of(ctx, rank)
            assert f"process {ctx.pids()[rank]}, by faulthandler" in text
            assert stack.text in text
        assert len(group_equal(found)) == 1
        assert await ctx.wait(0) is None, "it has harmed somebody"


async def test_a_worker_stuck_in_c_code_with_the_gil_answers(
    tmp_path: Path, channel: Channel, no_py_spy: None
) -> None:
    code = """
        def load_batch():
            ready()
            re.match(r"(a+)+$", "a" * 60 + "b")
        record(load_batch)()
    """
    async with python(tmp_path, channel, code) as ctx:
        await channel.lines(1)
        await asyncio.sleep(0.1)
        stack = (await ctx.dump_stacks())[0]
        assert [frame.name for frame in stack.frames][:2] == ["match", "load_batch"]


@needs_py_spy
async def test_an_unprepared_python_is_asked_by_py_spy(
    tmp_path: Path, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    which = shutil.which

    def counting(name: str, **options: Any) -> str | None:
        looked.append(name)
        return which(name, **options)

    monkeypatch.setattr(shutil, "which", counting)
    # Our own environment's is found even where it is not activated.
    monkeypatch.setenv("PATH", "/bin")
    async with python(tmp_path, channel, "work()", 3) as ctx:
        await asleep(await channel.pids(3))
        found = await ctx.dump_stacks()
        if {stack.source for stack in found.values()} == {"/proc"}:
            pytest.skip("py-spy may not look at processes here (ptrace)")
        assert {stack.summary.startswith(WAITS) for stack in found.values()} == {True}
        assert "by py-spy" in file_of(ctx, 2)
    assert looked == ["py-spy"]


@needs_py_spy
@pytest.mark.parametrize("run", RUNNERS, ids=lambda run: run.__name__)
def test_py_spy_is_nobodys_orphan(run: Any, tmp_path: Path, channel: Channel) -> None:
    """As a subreaper we reap strangers, and end those that are left; uvloop allows none."""

    async def main() -> None:
        async with python(tmp_path, channel, "work()", 2, subreaper=run is not by_uvloop) as ctx:
            pids = await channel.pids(2)
            await asleep(pids)
            for _ in range(3):
                found = await ctx.dump_stacks()
                if {stack.source for stack in found.values()} == {"/proc"}:
                    pytest.skip("py-spy may not look at processes here (ptrace)")
                assert [stack.source for stack in found.values()] == ["py-spy", "py-spy"]
            assert len(ctx._cleanup.helpers) == 1 + 6

    run(main)


async def test_any_other_program_is_seen_through_the_kernel(channel: Channel) -> None:
    async with start(channel, SLEEP) as ctx:
        await channel.lines(1)
        await asyncio.sleep(0.1)
        stack = (await ctx.dump_stacks())[0]
        assert (stack.source, stack.frames) == ("/proc", ())
        assert stack.summary.startswith("state S")
        assert stack.summary.endswith("(process sleep)")
        assert "by /proc\n" + stack.text in file_of(ctx)


async def test_a_python_below_a_shell_answers(
    tmp_path: Path, channel: Channel, no_py_spy: None
) -> None:
    script = tmp_path / "job.py"
    script.write_text(HEAD + RECORDED)
    async with start(channel, f"'{sys.executable}' '{script}'; exit 0") as ctx:
        pids = await channel.pids(1)
        assert pids != ctx.pids()
        await asleep(pids)
        stack = (await ctx.dump_stacks())[0]
        assert stack.source == "faulthandler"
        assert stack.summary.startswith(WAITS)


async def test_a_program_that_needs_the_signal_itself_is_left_in_peace(
    tmp_path: Path, channel: Channel, no_py_spy: None
) -> None:
    code = """
        from asupervise.worker import STACKS_SIGNAL
        signal.signal(STACKS_SIGNAL, lambda *_: os._exit(9))
        work()
    """
    async with python(tmp_path, channel, code) as ctx:
        await channel.lines(1)
        assert (await ctx.dump_stacks())[0].source == "/proc"
        assert await ctx.wait(0.1) is None


async def test_two_ask_at_once_and_one_of_them_is_cancelled(
    tmp_path: Path, channel: Channel, no_py_spy: None
) -> None:
    async with python(tmp_path, channel, RECORDED, 2) as ctx:
        await asleep(await channel.pids(2))
        tasks = [asyncio.create_task(ctx.dump_stacks()) for _ in range(3)]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        first, second = await asyncio.gather(*tasks[1:])
        assert first == second
        assert sorted(first) == [0, 1]
        assert file_of(ctx).count("Current thread") == 1
        again = await ctx.dump_stacks()
        assert again[0].frames == first[0].frames
        assert file_of(ctx).count("Current thread") == 2


async def test_who_died_meanwhile_is_left_out(
    tmp_path: Path, channel: Channel, no_py_spy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "_DUMP_LIMIT_S", 1000.0)
    async with python(tmp_path, channel, RECORDED, 2) as ctx:
        pids = await channel.pids(2)
        # Stopped, it cannot answer: the dump waits for it, until it has died.
        os.kill(pids[1], signal.SIGSTOP)
        asking = asyncio.create_task(ctx.dump_stacks())
        await asyncio.sleep(0.2)
        assert not asking.done()
        os.kill(pids[1], signal.SIGKILL)
        found = await asking
        assert sorted(found) == [0]
        await ctx.wait()
        assert await ctx.dump_stacks() == {}


async def test_a_stopped_worker_is_said_to_be_that(
    tmp_path: Path, channel: Channel, no_py_spy: None
) -> None:
    async with python(tmp_path, channel, RECORDED) as ctx:
        pid = (await channel.pids(1))[0]
        os.kill(pid, signal.SIGSTOP)
        assert (await ctx.dump_stacks())[0].summary.startswith("state T")


@pytest.mark.parametrize("threads", [30, 130])
async def test_many_threads(
    threads: int, tmp_path: Path, channel: Channel, no_py_spy: None
) -> None:
    code = f"""
        for _ in range({threads}):
            threading.Thread(target=wait, daemon=True).start()
        record(work)()
    """
    async with python(tmp_path, channel, code) as ctx:
        await asleep(await channel.pids(1))
        stack = (await ctx.dump_stacks())[0]
        if threads < 100:
            assert stack.summary.startswith(WAITS)
            assert stack.text.count(" in wait\n") == threads + 1
        else:
            # faulthandler stops after a hundred; what it said is kept all the same.
            assert stack.source == "/proc"
            assert stack.text.count(" in wait\n") == 100
        assert stack.text.splitlines()[-1] in file_of(ctx)


async def test_stacks_below_a_name_that_is_no_file(channel: Channel, no_py_spy: None) -> None:
    async with start(channel, SLEEP) as ctx:
        await channel.lines(1)
        os.mkfifo(Path(ctx.error_files[0]).parent / "stacks.txt")
        assert (await asyncio.wait_for(ctx.dump_stacks(), 2))[0].source == "/proc"


async def test_a_py_spy_that_hangs_holds_nobody_up(
    tmp_path: Path, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    spy = tmp_path / "py-spy"
    spy.write_text(f"#!/bin/sh\necho $$ >> '{pids}'\nexec sleep 1000\n")
    spy.chmod(0o700)
    monkeypatch.setattr(stacks, "find_py_spy", lambda: str(spy))
    monkeypatch.setattr(stacks, "_DUMP_LIMIT_S", 0.1)
    monkeypatch.setattr(stacks, "_PY_SPY_LIMIT_S", 0.2)
    async with start(channel, *[SLEEP] * 6) as ctx:
        await channel.lines(6)
        found = await asyncio.wait_for(ctx.dump_stacks(), 5)
        assert {stack.source for stack in found.values()} == {"/proc"}
        assert len(found) == 6
        # Killed and reaped by then, not some time later.
        started = list(map(int, pids.read_text().split()))
        assert started
        assert not any(map(is_alive, started))


async def test_a_py_spy_that_cannot_be_started(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "find_py_spy", lambda: "/nonexistent/py-spy")
    async with start(channel, SLEEP) as ctx:
        await channel.lines(1)
        assert (await ctx.dump_stacks())[0].source == "/proc"


# --- before a kill ------------------------------------------------------------------------------

IGNORES = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + RECORDED


async def test_who_ignores_the_grace_is_looked_at_before_the_kill(
    tmp_path: Path, channel: Channel, no_py_spy: None
) -> None:
    async with python(tmp_path, channel, IGNORES, 2) as ctx:
        await asleep(await channel.pids(2))
        await ctx.close(timeout=0.05)
        result = await ctx.wait()
    assert result is not None
    assert [failure.exitcode for failure in result.failures.values()] == [-9, -9]
    assert all(failure.stack.startswith(WAITS) for failure in result.failures.values())
    assert f"Where they were before they were ended:\n  ranks 0-1: {WAITS}" in report_of(result)
    assert "by faulthandler" in file_of(ctx)


@pytest.mark.parametrize("arguments", [(signal.SIGKILL, 0), (signal.SIGKILL, 10), (None, 0)])
async def test_who_is_in_a_hurry_waits_for_no_stacks(
    arguments: tuple[int | None, float], channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dump(*_: object) -> dict[int, Stack]:
        pytest.fail("looked")

    monkeypatch.setattr(stacks, "dump", dump)
    async with start(channel, STUBBORN) as ctx:
        await channel.lines(1)
        await ctx.close(*arguments)
        result = await ctx.wait()
    assert result is not None
    assert result.failures[0].stack == ""


async def test_a_second_close_with_sigkill_cuts_it_short(
    channel: Channel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spy = tmp_path / "py-spy"
    spy.write_text("#!/bin/sh\necho spying > $CHANNEL\nexec sleep 1000\n")
    spy.chmod(0o700)
    monkeypatch.setattr(stacks, "find_py_spy", lambda: str(spy))
    monkeypatch.setattr(stacks, "_PY_SPY_LIMIT_S", 1000.0)
    monkeypatch.setattr(cleanup, "_LAST_LOOK_S", 1000.0)
    monkeypatch.setenv("CHANNEL", str(channel.path))
    async with start(channel, STUBBORN) as ctx:
        pid = (await channel.pids(1))[0]
        closing = asyncio.create_task(ctx.close(timeout=0.02))
        assert await channel.lines(1) == [["spying"]]
        await ctx.close(signal.SIGKILL, 0)
        await closing
        await gone(pid)


async def test_no_descriptor_is_no_reason_to_leave_a_worker_alive(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def best(*args: object) -> Stack:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(stacks, "_best", best)
    async with start(channel, STUBBORN) as ctx:
        await channel.lines(1)
        await ctx.close(timeout=0.02)
        result = await ctx.wait()
    assert result is not None
    assert result.failures[0].exitcode == -9


async def test_stacks_of_long_ago_do_not_explain_an_end(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start(channel, SLEEP, SLEEP) as ctx:
        await channel.lines(2)
        assert (await ctx.dump_stacks())[0].summary
        monkeypatch.setattr("asupervise.diagnosis._STACKS_EXPLAIN_S", 0.0)
    result = await ctx.wait()
    assert result is not None
    assert [failure.stack for failure in result.failures.values()] == ["", ""]


# --- the interpreter's own words ----------------------------------------------------------------


async def test_a_segmentation_fault_shows_where(tmp_path: Path, channel: Channel) -> None:
    code = """
        import ctypes
        def crash():
            print("x\\n" * 100, file=sys.stderr)
            ctypes.string_at(0)
        record(crash)()
    """
    logs = DefaultLogsSpecs(redirects=Std.ALL)
    async with python(tmp_path, channel, code, logs_specs=logs) as ctx:
        result = await ctx.wait()
    assert result is not None
    assert result.failures[0].signal_name() == "SIGSEGV"
    report = report_of(result)
    assert "last lines:\n  Fatal Python error: Segmentation fault\n" in report
    assert f'File "{tmp_path}/job.py", line ' in report
    assert " in crash\n" in report
    assert "  x\n" not in report


FATAL = "Fatal Python error: Segmentation fault\n\n"
CURRENT = 'Current thread 0x1 (most recent call first):\n  File "a", line 1 in crash\n'


def test_what_counts_as_the_interpreters_own_words() -> None:
    words = FATAL + CURRENT + "\nExtension modules: numpy.core (total: 1)"
    assert fatal_words("warning: x\n" + words) == words
    # Of a child, long ago: the program has said other things since.
    assert fatal_words(words + "\nTraceback (most recent call last):\n") == ""
    assert fatal_words("all is well\n") == ""
    assert fatal_words("") == ""


def test_of_many_threads_the_one_that_crashed_is_shown() -> None:
    thread = 'Thread 0x2 (most recent call first):\n  File "a", line 2 in wait\n\n'
    shown = fatal_words(FATAL + thread * 90 + CURRENT).splitlines()
    assert shown[0] == FATAL.strip()
    assert shown[2:] == CURRENT.splitlines()


@given(st.text() | st.lists(PIECES).map("".join))
def test_no_stderr_is_too_strange(text: str) -> None:
    words = fatal_words("Fatal Python error: " + text)
    assert words == "" or words.startswith("Fatal Python error: ")
