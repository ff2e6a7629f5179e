"""The cleanup ladder's rungs, and the faults that a group survives.

What ends when is shown by `test_endings`. Here are the orders of events that no real process
produces on demand (uninterruptible sleep, EPERM, a pid that was given away), at the seam to the
kernel, and real faults: a full disk, no descriptor, no process, workers that misbehave.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asupervise import DefaultLogsSpecs, RunProcsResult, Std, cleanup, procfs, start_processes
from asupervise.cleanup import Cleanup
from asupervise.subreaper import subreaping
from tests.conftest import ROOT, clean_environment, own_children
from tests.workers import PYTHON, SLEEP, STUBBORN, Channel, gone, is_alive, settle, start

pytestmark = pytest.mark.usefixtures("own_temporary_folder")


def codes(result: RunProcsResult | None) -> dict[int, int]:
    assert result is not None
    return {rank: failure.exitcode for rank, failure in result.failures.items()}


def entry_of(pid: int) -> procfs.ProcessEntry:
    entry = procfs.read_entry(pid)
    assert entry is not None
    return entry


# --- who is signalled ---------------------------------------------------------------------------


@contextlib.contextmanager
def sleeper(**options: Any) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"], **options) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("pidfds", [True, False])
def test_a_pid_that_was_given_away_is_not_signalled(
    pidfds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not pidfds:
        monkeypatch.delattr(os, "pidfd_open")
    with sleeper() as process:
        before = entry_of(process.pid)._replace(start_ticks=1)
        assert procfs.send_to_process(before, signal.SIGKILL) is False
        assert not procfs.is_same(before)
        assert process.poll() is None
        assert procfs.send_to_process(entry_of(process.pid), signal.SIGTERM) is True
        assert process.wait() == -signal.SIGTERM


def test_who_has_ended_is_not_signalled() -> None:
    with sleeper() as process:
        entry = entry_of(process.pid)
        process.kill()
    assert procfs.send_to_process(entry, signal.SIGKILL) is False


def test_without_a_free_descriptor_it_is_the_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(24, "Too many open files")

    with sleeper() as process:
        monkeypatch.setattr(os, "pidfd_open", refuse)
        assert procfs.send_to_process(entry_of(process.pid), signal.SIGTERM) is True
        assert process.wait() == -signal.SIGTERM


async def test_only_what_is_proven_ours_is_ended(channel: Channel) -> None:
    """Started by the host while the group runs: a child of its own, a session of its own."""
    with sleeper() as child, sleeper(start_new_session=True) as other:
        async with start(channel, SLEEP):
            await channel.lines(1)
            with sleeper(start_new_session=True) as later:
                pass
        assert later.returncode == -signal.SIGKILL  # by ourselves
        assert child.poll() is None
        assert other.poll() is None


async def test_the_children_of_the_host_are_not_ended_with_the_group(channel: Channel) -> None:
    async with start(channel, SLEEP) as ctx:
        await channel.lines(1)
        with sleeper(start_new_session=True) as later:
            await ctx.close()
            assert later.poll() is None


async def test_a_child_that_forks_and_exits_again_and_again_is_caught(channel: Channel) -> None:
    """A process that hops from pid to pid is never there when it is looked at by its pid."""
    script = (
        "import os\n"
        "if not os.fork():\n"
        "    os.setsid()\n"
        "    open(os.environ['CHANNEL'], 'w').write('ready 1 %d\\n' % os.getpid())\n"
        "    for _ in range(100000):\n"
        "        if os.fork(): os._exit(0)\n"
        "os.execvp('sleep', ['sleep', '1000'])\n"
    )
    marker = "import os\n#" + os.urandom(8).hex()
    args = {0: (script.replace("import os", marker, 1),)}
    envs = {0: {"CHANNEL": str(channel.path)}}
    async with start_processes("t", list(PYTHON), args, envs, shutdown_timeout=0.2):
        await channel.lines(1)
    assert not [
        pid for pid in procfs.all_pids() if marker[11:] in procfs.read_text(f"/proc/{pid}/cmdline")
    ]


# --- the grace ----------------------------------------------------------------------------------


async def test_a_grace_of_zero(channel: Channel) -> None:
    ctx = await start(channel, STUBBORN, STUBBORN, shutdown_timeout=1000)
    await channel.lines(2)
    await ctx.close(timeout=0)
    assert codes(await ctx.wait()) == {0: -9, 1: -9}


async def test_no_grace_for_a_daemon_when_somebody_is_in_a_hurry(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup, "SWEEP_GRACE_S", 1000.0)
    daemon = (
        "(trap '' TERM; setsid sh -c 'echo ready 9 $$ > $CHANNEL; exec sleep 1000' &); " + STUBBORN
    )
    ctx = await start(channel, daemon)
    pids = await channel.pids(2)
    slow = asyncio.create_task(ctx.close(timeout=1000))
    await settle()
    await ctx.close(signal.SIGKILL, 0)
    await slow
    await gone(pids[9])


class Look:
    """What is called before workers are killed."""

    def __init__(self, error: Exception | None = None) -> None:
        self.began = asyncio.Event()
        self._error = error

    async def __call__(self) -> None:
        self.began.set()
        if self._error is not None:
            raise self._error
        await asyncio.sleep(1000)


async def test_a_look_that_hangs_is_cut_short_by_a_hurry(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Look()
    monkeypatch.setattr("asupervise.diagnosis.Diagnosis.before_kill", lambda self: look())
    monkeypatch.setattr(cleanup, "_LAST_LOOK_S", 1000.0)
    ctx = await start(channel, STUBBORN)
    await channel.lines(1)
    slow = asyncio.create_task(ctx.close(timeout=0.01))
    await look.began.wait()
    await ctx.close(signal.SIGKILL, 0)
    await slow


async def test_a_look_that_fails_does_not_keep_the_group_alive(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Look(OSError(28, "No space left on device"))
    monkeypatch.setattr("asupervise.diagnosis.Diagnosis.before_kill", lambda self: look())
    ctx = await start(channel, STUBBORN)
    await channel.lines(1)
    await ctx.close(timeout=0.01)
    assert codes(await ctx.wait()) == {0: -9}


# --- who cannot be ended ------------------------------------------------------------------------


async def test_a_daemon_in_uninterruptible_sleep_is_named(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel shows one: signals have no effect, state D, and where it waits."""
    daemon = "(setsid sh -c 'echo ready 9 $$ > $CHANNEL; exec sleep 1000' &); " + SLEEP
    ctx = await start(channel, daemon)
    pid = (await channel.pids(2))[9]
    read_entry, send = procfs.read_entry, procfs.send_to_process

    def shown(of: int) -> procfs.ProcessEntry | None:
        entry = read_entry(of)
        return entry._replace(state="D") if entry is not None and of == pid else entry

    monkeypatch.setattr(cleanup, "KILL_WAIT_S", 0.05)
    monkeypatch.setattr(cleanup, "SWEEP_GRACE_S", 0.05)
    monkeypatch.setattr(procfs, "read_entry", shown)
    monkeypatch.setattr(procfs, "wait_channel", lambda of: "nfs_wait")
    monkeypatch.setattr(
        procfs, "send_to_process", lambda entry, sig: entry.pid == pid or send(entry, sig)
    )
    await ctx.close(timeout=0.1)
    result = await ctx.wait()
    assert result is not None
    monkeypatch.undo()
    os.kill(pid, signal.SIGKILL)
    await gone(pid)
    [warning] = result.warnings
    assert f"process {pid} (sleep) could not be ended" in warning
    assert "(state D in nfs_wait)" in warning


REFUSED = """
import asyncio, json, os, signal
from asupervise import cleanup, procfs, start_processes

def refuse(*_):
    raise PermissionError(1, "Operation not permitted")

async def main():
    cleanup.KILL_WAIT_S = 0.05
    procfs.send_to_group = refuse
    ctx = await start_processes("t", "/bin/sleep", {0: ("1000",)}, {0: {}})
    await ctx.close(timeout=0.01)
    result = await ctx.wait()
    print(json.dumps([ctx.pids()[0], result.warnings]))

asyncio.run(main())
"""


def test_a_setuid_worker_that_may_not_be_signalled_is_named() -> None:
    """EPERM; root, which may run this, never gets one."""
    argv = [sys.executable, "-c", REFUSED]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stderr == ""
    pid, [warning] = json.loads(done.stdout)
    # asyncio may have killed it after all, when the program ended.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    assert f"process {pid} (sleep) of local rank 0 could not be ended" in warning
    assert "EPERM" in warning


async def test_subreaping_in_another_thread_changes_nothing() -> None:
    """Signal handlers belong to the main thread: it is refused, and orphans stay init's."""

    async def main() -> None:
        with subreaping(lambda pid: True):
            pytest.fail("it was allowed")

    with pytest.raises((RuntimeError, ValueError)):
        await asyncio.to_thread(asyncio.run, main())
    process = await asyncio.create_subprocess_exec("sh", "-c", "sleep 0 & exit 0")
    await process.wait()
    assert not own_children()


async def test_who_wiped_everything_is_found_by_a_subreaper() -> None:
    """In a program of its own: it reaps every child that it does not know."""
    code = """
import asyncio, sys
from asupervise import start_processes

async def main():
    script = "(env -i setsid sh -c 'echo $$ >&2; exec sleep 1000' &); exec sleep 1000"
    args, envs = {0: ("-c", script)}, {0: {}}
    async with start_processes("t", "sh", args, envs, subreaper=True):
        await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""
    host = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, cwd=ROOT, env=clean_environment(),
        stdin=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert host.stderr is not None
    pid = int(await host.stderr.readline())
    await host.communicate(b"\n")
    assert host.returncode == 0
    assert not is_alive(pid)


# --- faults -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs a small file system of its own: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


FILLS = """
import errno, os
try:
    while True: os.write(1, b"x" * 1023 + b"\\n")
except OSError as exc:
    os._exit(exc.errno)
"""


@pytest.mark.parametrize("tee", [Std.NONE, Std.OUT])
async def test_a_log_disk_that_fills_up(tee: Std, small_disk: Path) -> None:
    logs = DefaultLogsSpecs(str(small_disk), Std.ALL, tee)
    args = {0: (FILLS,), 1: ("import time; time.sleep(1000)",)}
    async with start_processes("t", list(PYTHON), args, {0: {}, 1: {}}, logs) as ctx:
        result = await ctx.wait()
    assert codes(result)[0] == 28  # ENOSPC
    assert result is not None
    assert any("no space is left" in warning for warning in result.warnings)
    assert result.root_cause is not None
    assert result.root_cause[0] == 0


SHORT_OF = """
import asyncio, json, os, resource, sys
from asupervise import start_processes

async def main():
    args = {rank: ("1000",) for rank in range(int(sys.argv[2]))}
    envs = {rank: {} for rank in args}
    # Everything is imported then: another user may not read where the interpreter is.
    async with start_processes("t", "/bin/true", {0: ()}, {0: {}}) as ctx:
        await ctx.wait()
    if sys.argv[4] != "0":
        os.setgroups([])
        os.setresgid(*[int(sys.argv[4])] * 3)
        os.setresuid(*[int(sys.argv[4])] * 3)
    before = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(getattr(resource, sys.argv[1]))
    resource.setrlimit(getattr(resource, sys.argv[1]), (int(sys.argv[3]), hard))
    try:
        await start_processes("t", "/bin/sleep", args, envs)
    except Exception as exc:
        said = [type(exc).__name__, getattr(exc, "errno", 0), str(exc)]
    else:
        said = ["started"]
    resource.setrlimit(getattr(resource, sys.argv[1]), (soft, hard))
    children = [
        pid
        for thread in os.listdir("/proc/self/task")
        for pid in open(f"/proc/self/task/{thread}/children").read().split()
    ]
    files = len(os.listdir("/proc/self/fd")) - before
    print(json.dumps([said, children, files, len(asyncio.all_tasks())]))

asyncio.run(main())
"""


def start_short_of(what: str, limit: int, user: int = 0) -> list[Any]:
    argv = [sys.executable, "-c", SHORT_OF, what, "40", str(limit), str(user)]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, cwd=ROOT, timeout=30,
        env=clean_environment() | {"TMPDIR": "/tmp"},
    )  # fmt: skip
    assert done.stderr == ""
    return json.loads(done.stdout)


# 3 are the standard ones, 3 more are the loop's own.
@pytest.mark.parametrize("limit", range(6, 40, 3))
def test_no_free_descriptor_at_the_start(limit: int) -> None:
    """Wherever in the start it happens: one error, and nothing of what was begun is left."""
    said, children, files, tasks = start_short_of("RLIMIT_NOFILE", limit)
    assert children == []
    assert files <= 0
    assert tasks == 1
    assert said[:2] == ["OSError", 24], said
    assert "Too many open files" in said[2]
    assert "local rank" in said[2] or "guardian" in said[2]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user: RLIMIT_NPROC")
@pytest.mark.parametrize("limit", [1, 2, 4])
def test_no_free_process_at_the_start(limit: int) -> None:
    # A user whom nothing else here runs as; the limit is his, not the process's.
    said, children, files, tasks = start_short_of("RLIMIT_NPROC", limit, user=54321)
    assert (children, files, tasks) == ([], 0, 1)
    assert said[:2] == ["BlockingIOError", 11], said


MISBEHAVIOURS = {
    "closes its stdout": "os.close(1); os.close(2)",
    "floods its stdout": "[os.write(1, b'x' * 65535 + b'\\n') for _ in range(200)]",
    "changes its name": "open('/proc/self/comm', 'w').write('a) R 1 (b')",
    "forks 3,000 times": "[os.waitpid(os.fork() or os._exit(0), 0) for _ in range(3000)]",
    "replaces its log": (
        "path = os.readlink('/proc/self/fd/1'); os.unlink(path); open(path, 'w').write('new')"
    ),
    "stops itself": "os.kill(os.getpid(), 19)",
    "changes the group of a child": "os.fork() or (os.setpgid(0, 0), os.execlp('sleep', 'sleep', '1000'))",  # noqa: E501
}


@pytest.mark.parametrize("what", MISBEHAVIOURS)
async def test_a_worker_that_misbehaves(what: str, channel: Channel, tmp_path: Path) -> None:
    """It is ended as any other, and harms no other (`conftest` looks for what is left)."""
    tell = "open(os.environ['CHANNEL'], 'w').write('ready 0 %d\\n' % os.getpid())\n"
    if what == "stops itself":
        tell, script = "", f"import os, time\n{tell}{MISBEHAVIOURS[what]}\ntime.sleep(1000)"
    else:
        script = f"import os, time\n{MISBEHAVIOURS[what]}\n{tell}time.sleep(1000)"
    args = {0: (script,), 1: (f"import os, time\n{tell}time.sleep(1000)",)}
    envs = {rank: {"CHANNEL": str(channel.path)} for rank in args}
    logs = DefaultLogsSpecs(str(tmp_path / "logs"), Std.ALL, Std.OUT)
    # It ends on SIGTERM: the test would be too long, were the grace waited for.
    options = {"logs_specs": logs, "shutdown_timeout": 1000}
    async with start_processes("t", list(PYTHON), args, envs, **options) as ctx:
        await channel.lines(1 if what == "stops itself" else 2)
        assert await ctx.wait(0) is None
    assert codes(await ctx.wait()) == {0: -15, 1: -15}


async def test_a_ladder_for_nobody() -> None:
    assert await Cleanup("token").run((), signal.SIGTERM, 0) == []
