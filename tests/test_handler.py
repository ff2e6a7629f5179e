"""`handler.py` and `_compat.py`: one process, from its start to its exit."""

from __future__ import annotations

import asyncio
import errno
import operator
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from asupervise import _compat, procfs
from asupervise._compat import Exit, run_quietly, spawn
from asupervise.handler import SubprocessHandler
from asupervise.plan import WorkerPlan
from tests.workers import (
    HELD,
    PYTHON,
    READY,
    RUNNERS,
    SLEEP,
    STUBBORN,
    Channel,
    by_asyncio,
    count_threads,
    gone,
    is_alive,
    settle,
    stopped,
)

Runner = Callable[[Callable[[], Coroutine[Any, Any, Any]]], Any]

every_loop = pytest.mark.parametrize("run", RUNNERS, ids=lambda run: run.__name__)

pytestmark = pytest.mark.usefixtures("uvloop_has_its_pipe")


def worker(script: str, channel: Channel | None = None, **fields: Any) -> WorkerPlan:
    env = {"RANK": "3", **fields.pop("env", {})}
    if channel is not None:
        env["CHANNEL"] = str(channel.path)
    return WorkerPlan(3, ("/bin/sh", "-c", script), env, **fields)


async def begin(script: str, channel: Channel | None = None, **fields: Any) -> SubprocessHandler:
    options = {name: fields.pop(name) for name in ("cwd", "on_exit") if name in fields}
    return await SubprocessHandler.start(worker(script, channel, **fields), os.environ, **options)


async def ended(handler: SubprocessHandler) -> int:
    return (await handler.wait_exit()).code


# --- start and exit -------------------------------------------------------------------------------


@every_loop
def test_an_exit_is_learnt_once_with_its_code(run: Runner) -> None:
    exits: list[tuple[SubprocessHandler, Exit]] = []

    async def main() -> None:
        for script, code in (("exit 0", 0), ("exit 7", 7), ("kill -9 $$", -9)):
            handler = await begin(script, on_exit=lambda *args: exits.append(args))
            before_ns = time.monotonic_ns()
            assert await ended(handler) == code
            assert handler.exit is not None
            assert handler.exit.monotonic_ns >= handler.started_ns
            assert handler.exit.monotonic_ns - before_ns < 30 * 10**9
            assert not handler.running
            assert await ended(handler) == code
            assert exits.pop() == (handler, handler.exit)
            await settle()
            assert exits == []

    run(main)


async def test_peak_memory_is_known() -> None:
    program = "a = bytearray(64 << 20)"
    handler = await SubprocessHandler.start(WorkerPlan(0, (*PYTHON, program), {}), os.environ)
    exit = await handler.wait_exit()
    assert exit.peak_rss_bytes is not None
    assert 64 << 20 < exit.peak_rss_bytes < 1 << 30
    assert exit.core_dumped is False


async def test_it_leads_a_session_and_a_group_of_its_own(channel: Channel) -> None:
    handler = await begin(SLEEP, channel)
    await channel.lines(1)
    assert os.getsid(handler.pid) == os.getpgid(handler.pid) == handler.pid
    assert repr(handler) == f"<SubprocessHandler rank 3 pid {handler.pid}: running>"
    handler.close()
    assert await ended(handler) == -15
    assert "exit -15" in repr(handler)


async def test_the_environment_is_laid_over_the_parents(tmp_path: Path) -> None:
    parent = {"PATH": os.environ["PATH"], "KEPT": "parent", "COVERED": "parent"}
    plan = worker("env", env={"COVERED": "worker", "OWN": "ü\udcff"}, stdout=str(tmp_path / "out"))
    handler = await SubprocessHandler.start(plan, parent)
    assert await ended(handler) == 0
    lines = (tmp_path / "out").read_bytes().splitlines()
    assert {b"KEPT=parent", b"COVERED=worker", "OWN=ü".encode() + b"\xff"} <= set(lines)
    assert not any(line.startswith(b"HOME=") for line in lines)


async def test_the_program_is_found_on_the_workers_path(tmp_path: Path) -> None:
    (tmp_path / "mine").symlink_to("/bin/sh")
    plan = WorkerPlan(0, ("mine", "-c", "exit 5"), {"PATH": str(tmp_path)})
    assert await ended(await SubprocessHandler.start(plan, os.environ)) == 5


async def test_the_working_directory(tmp_path: Path) -> None:
    handler = await begin("pwd", stdout=str(tmp_path / "out"), cwd=str(tmp_path))
    assert await ended(handler) == 0
    assert (tmp_path / "out").read_text() == f"{tmp_path}\n"


@pytest.mark.parametrize(("stdin", "says"), [(True, "to us\n"), (False, "")])
def test_standard_input_is_ours_or_empty(stdin: bool, says: str, tmp_path: Path) -> None:
    async def main() -> None:
        handler = await begin("cat", stdin=stdin, stdout=str(tmp_path / "out"))
        assert await ended(handler) == 0

    given = tmp_path / "in"
    given.write_text("to us\n")
    ours = os.dup(0)
    fd = os.open(given, os.O_RDONLY)
    os.dup2(fd, 0)
    try:
        by_asyncio(main)
    finally:
        os.dup2(ours, 0)
        os.close(fd)
        os.close(ours)
    assert (tmp_path / "out").read_text() == says


async def test_standard_streams_go_straight_into_files(tmp_path: Path) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    out.write_text("of an earlier run")
    script = "readlink /proc/self/fd/1 /proc/self/fd/2; echo wrong >&2"
    assert await ended(await begin(script, stdout=str(out), stderr=str(err))) == 0
    assert out.read_text() == f"{out}\n{err}\n"
    assert err.read_text() == "wrong\n"
    assert err.stat().st_mode & 0o777 == 0o600


async def test_a_log_that_is_truncated_has_no_hole(channel: Channel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f'echo long enough; {READY} read line < "$CHANNEL.gate"; echo end'
    handler = await begin(script, channel, stdout=str(out))
    await channel.lines(1)
    os.truncate(out, 0)
    await channel.open_gate()
    assert await ended(handler) == 0
    assert out.read_bytes() == b"end\n"


# --- not started ----------------------------------------------------------------------------------


@every_loop
def test_a_program_that_does_not_start_is_named_with_its_rank(run: Runner, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text("#!/nonexistent\n")
    bad.chmod(0o755)

    async def main() -> None:
        plan = WorkerPlan(5, (str(bad),), {}, stdout=str(tmp_path / "out"))
        with pytest.raises(FileNotFoundError) as caught:
            await SubprocessHandler.start(plan, os.environ)
        assert caught.value.errno == errno.ENOENT
        assert str(caught.value).startswith(f"[Errno 2] local rank 5: cannot start '{bad}': No su")
        assert caught.value.filename == str(bad)

    run(main)


async def test_a_log_that_cannot_be_opened_is_named_with_the_rank(tmp_path: Path) -> None:
    with pytest.raises(
        IsADirectoryError, match="local rank 3: cannot open its log: Is a"
    ) as caught:
        await begin("exit 0", stdout=str(tmp_path / "out"), stderr=str(tmp_path))
    assert caught.value.filename == str(tmp_path)


async def test_no_descriptor_left_for_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process has been started by then: nobody would ever hear of it again."""
    pids = []

    def exhausted(pid: int) -> int:
        pids.append(pid)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", exhausted)
    with pytest.raises(OSError, match="local rank 3: cannot start '/bin/sh': Too many open files"):
        await begin("exec sleep 1000")
    monkeypatch.undo()
    await settle()
    assert not any(map(is_alive, pids))


async def test_no_descriptor_left_at_all() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), hard))
    try:
        with pytest.raises(OSError, match="local rank 3: cannot start") as caught:
            await begin("exec sleep 1000")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE


# --- signals --------------------------------------------------------------------------------------


async def test_a_signal_reaches_the_whole_group_or_the_leader_alone(channel: Channel) -> None:
    said = 'trap "echo $0 USR1 > $CHANNEL" USR1; echo $0 up > $CHANNEL; while :; do :; done'
    script = f"sh -c '{said}' child & exec sh -c '{said}' leader"
    handler = await begin(script, channel)
    await channel.lines(2)
    assert handler.send_signal(signal.SIGUSR1, group=False)
    assert await channel.lines(1) == [["leader", "USR1"]]
    assert handler.send_signal(signal.SIGUSR1)
    assert sorted(await channel.lines(2)) == [["child", "USR1"], ["leader", "USR1"]]
    assert handler.send_signal(signal.SIGKILL)
    assert await ended(handler) == -9


async def test_the_group_of_a_dead_leader_is_signalled(channel: Channel) -> None:
    script = 'sh -c "echo ready 0 \\$\\$ > $CHANNEL; exec sleep 1000" & ' + READY + "exit 3"
    handler = await begin(script, channel)
    children = await channel.pids(2)
    assert await ended(handler) == 3
    assert [entry.pid for entry in handler.stragglers] == [children[0]]
    assert handler.close()
    await gone(children[0])
    assert not handler.close()
    assert not handler.send_signal(signal.SIGKILL)


async def test_who_is_left_is_known_as_soon_as_the_exit_is(channel: Channel) -> None:
    """Also to whoever asks in the very turn of the loop in which it was learnt."""
    left: list[int] = []

    def on_exit(handler: SubprocessHandler, _: Exit) -> None:
        left.extend(entry.pid for entry in handler.stragglers)

    script = 'sh -c "echo ready 0 \\$\\$ > $CHANNEL; exec sleep 1000" & ' + READY + HELD + "exit 3"
    handler = await begin(script, channel, on_exit=on_exit)
    children = await channel.pids(2)
    await channel.open_gate()
    assert await ended(handler) == 3
    assert left == [children[0]]
    assert handler.close()
    await gone(children[0])


async def test_nobody_else_is_signalled_in_the_place_of_the_dead(channel: Channel) -> None:
    """A pid is given out again; the start time tells who has it now (proc(5))."""
    handler = await begin("exit 0", channel)
    await handler.wait_exit()
    stranger = await begin(SLEEP, channel)
    await channel.lines(1)
    entry = procfs.read_entry(stranger.pid)
    assert entry is not None
    earlier = procfs.ProcessEntry(**{**_fields(entry), "start_ticks": entry.start_ticks - 1})
    handler._stragglers = (earlier,)
    assert not handler.send_signal(signal.SIGKILL)
    assert stranger.running
    assert is_alive(stranger.pid)
    stranger.close(signal.SIGKILL)
    await stranger.wait_exit()


def _fields(entry: procfs.ProcessEntry) -> dict[str, Any]:
    return entry._asdict()


async def test_one_that_is_stopped_is_continued_to_end(channel: Channel) -> None:
    handler = await begin(SLEEP, channel)
    await channel.lines(1)
    handler.send_signal(signal.SIGSTOP)
    stopped(handler.pid)
    assert handler.close()
    assert await ended(handler) == -15


# --- whose doing it was ---------------------------------------------------------------------------


async def test_what_we_sent_may_explain_the_exit(channel: Channel) -> None:
    handler = await begin(STUBBORN, channel)
    await channel.lines(1)
    before_ns = time.monotonic_ns()
    handler.close(signal.SIGTERM)
    handler.close(signal.SIGKILL)
    exit = await handler.wait_exit()
    signals, signalled_ns = handler.our_signals(exit)
    assert signals == {signal.SIGTERM, signal.SIGKILL}
    assert signalled_ns is not None
    assert before_ns <= signalled_ns <= exit.monotonic_ns


@every_loop
def test_a_crash_just_before_our_signal_is_its_own(run: Runner, channel: Channel) -> None:
    """Dead already, though the event loop has had no turn to tell us."""

    async def main() -> None:
        handler = await begin(SLEEP, channel)
        await channel.lines(1)
        os.kill(handler.pid, signal.SIGSEGV)
        while not _compat.has_ended(handler.pid):
            pass  # without a turn of the loop
        assert handler.running
        handler.close(signal.SIGTERM)
        handler.send_signal(signal.SIGSEGV)
        exit = await handler.wait_exit()
        assert exit.code == -11
        assert handler.our_signals(exit) == (set(), None)

    run(main)


async def test_an_exit_before_our_signal_is_its_own() -> None:
    handler = await begin("exit 1")
    exit = await handler.wait_exit()
    handler.close()
    assert handler.our_signals(exit) == (set(), None)


async def test_a_signal_passed_on_explains_only_a_death_by_it(channel: Channel) -> None:
    handler = await begin(f"trap 'exit 4' USR1; {READY} while :; do :; done", channel)
    await channel.lines(1)
    handler.send_signal(signal.SIGUSR1)
    exit = await handler.wait_exit()
    assert exit.code == 4
    assert handler.our_signals(exit) == (set(), None)

    handler = await begin(SLEEP, channel)
    await channel.lines(1)
    handler.send_signal(signal.SIGUSR1)
    exit = await handler.wait_exit()
    assert exit.code == -signal.SIGUSR1
    assert handler.our_signals(exit) == ({signal.SIGUSR1}, exit.monotonic_ns)


# --- odd hosts ------------------------------------------------------------------------------------


async def test_a_host_that_reaps_our_children(channel: Channel) -> None:
    """``waitpid(-1)`` somewhere: the status is lost, the exit is not."""
    handler = await begin(SLEEP, channel)
    await channel.lines(1)
    os.kill(handler.pid, signal.SIGKILL)
    os.waitpid(handler.pid, 0)
    handler.close()
    exit = await handler.wait_exit()
    assert exit.code == 255
    assert handler.our_signals(exit) == (set(), None)


TRACER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4
seized = libc.ptrace(0x4206, int(sys.argv[1]), 0, 0)  # PTRACE_SEIZE
open(sys.argv[2], "w").write(f"tracer {seized}\\n")
sys.stdin.read()
"""


async def test_a_tracer_does_not_block_the_loop(channel: Channel) -> None:
    """Under strace or gdb the exit is the tracer's first; until it looks, wait4 would block."""
    handler = await begin(SLEEP, channel)
    await channel.lines(1)
    tracer = await asyncio.create_subprocess_exec(
        sys.executable, "-c", TRACER, str(handler.pid), channel.path, stdin=-1
    )
    [[_, seized]] = await channel.lines(1)
    if seized != "0":
        handler.close()
        tracer.kill()
        await asyncio.gather(handler.wait_exit(), tracer.wait())
        pytest.skip("tracing is not permitted here")
    os.kill(handler.pid, signal.SIGKILL)
    await gone(handler.pid)
    await settle()
    assert handler.running
    assert tracer.stdin is not None
    tracer.stdin.close()
    assert await ended(handler) == -9
    assert await tracer.wait() == 0


def test_no_thread_and_no_trace_in_the_policy() -> None:
    async def main() -> None:
        policy = asyncio.get_event_loop_policy()
        before = count_threads()
        handlers = [await begin("exec sleep 1000") for _ in range(20)]
        # One of an earlier test may end meanwhile.
        assert all(map(operator.le, count_threads(), before))
        assert asyncio.get_event_loop_policy() is policy
        for handler in handlers:
            handler.close(signal.SIGKILL)
            await handler.wait_exit()

    by_asyncio(main)


@pytest.mark.skipif(not _compat._HAS_WATCHERS, reason="policies have no watchers any more")
@pytest.mark.filterwarnings("ignore:'get_child_watcher':DeprecationWarning")
async def test_another_thread_keeps_its_watcher_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host starts in another thread while we start a process is the host's to watch."""
    seen: list[object] = []

    def look() -> None:
        seen.append(asyncio.get_event_loop_policy().get_child_watcher())

    class Looking(_compat._ReapingWatcher):
        def add_child_handler(self, pid: int, callback: Any, *args: Any) -> None:
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            look()
            super().add_child_handler(pid, callback, *args)

    monkeypatch.setattr(_compat, "_ReapingWatcher", Looking)
    await (await begin("exit 0")).wait_exit()
    elsewhere, here = seen
    assert isinstance(here, Looking)
    assert not isinstance(elsewhere, Looking)


# Not where asyncio's own watcher is left in place: its pidfd is out of our reach.
@pytest.mark.parametrize("run", RUNNERS[:3], ids=lambda run: run.__name__)
def test_abandoned_processes_hold_nothing(run: Runner, channel: Channel) -> None:
    async def main() -> None:
        exits: list[object] = []
        files = len(os.listdir("/proc/self/fd"))
        child = await spawn(
            ("/bin/sh", "-c", STUBBORN),
            on_exit=exits.append,
            env={**os.environ, "RANK": "0", "CHANNEL": str(channel.path)},
        )
        await channel.lines(1)
        child.abandon()
        child.abandon()
        await settle()
        assert len(os.listdir("/proc/self/fd")) == files
        assert len(asyncio.all_tasks()) == 1
        assert exits == []
        await gone(child.pid)  # killed by asyncio when its transport was closed
        # The subprocess module would complain that it is still running.
        popen = child._process._transport.get_extra_info("subprocess")  # type: ignore[attr-defined]
        if popen is not None and hasattr(popen, "wait"):
            popen.wait()

    run(main)


@every_loop
def test_a_cancellation_during_a_start_comes_after_it(run: Runner) -> None:
    """No process is there that nobody has been told of, and no cancellation is lost."""
    children: list[_compat.Child] = []

    async def start_and_wait() -> None:
        child = await spawn(("/bin/sleep", "1000"), on_exit=exited.append)
        children.append(child)
        await asyncio.get_running_loop().create_future()

    async def main() -> None:
        starting = asyncio.create_task(start_and_wait())
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert starting.cancelling() == 1
        [child] = children
        os.kill(child.pid, signal.SIGKILL)
        await gone(child.pid)
        while not exited:
            await asyncio.sleep(0)

    exited: list[Exit] = []
    run(main)
    assert exited[0].code == -9


# --- short commands -------------------------------------------------------------------------------


@every_loop
def test_a_short_command(run: Runner) -> None:
    async def main() -> None:
        assert await run_quietly(("/bin/sh", "-c", "exit 3")) == 3
        with pytest.raises(FileNotFoundError):
            await run_quietly(("/nonexistent",))

    run(main)


@every_loop
def test_a_short_command_is_killed_when_nobody_waits_for_it(run: Runner, channel: Channel) -> None:
    async def main() -> None:
        env = {**os.environ, "RANK": "0", "CHANNEL": str(channel.path)}
        running = asyncio.create_task(run_quietly(("/bin/sh", "-c", STUBBORN), env=env))
        [pid] = (await channel.pids(1)).values()
        await settle()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not is_alive(pid)

    run(main)


@every_loop
def test_a_short_command_does_not_outlive_the_loop(run: Runner, channel: Channel) -> None:
    async def main() -> int:
        env = {**os.environ, "RANK": "0", "CHANNEL": str(channel.path)}
        running.append(asyncio.create_task(run_quietly(("/bin/sh", "-c", STUBBORN), env=env)))
        [pid] = (await channel.pids(1)).values()
        await settle()
        return pid

    running: list[asyncio.Task[int]] = []
    assert not is_alive(run(main))
