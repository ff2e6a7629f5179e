"""The guardian: small, idle, gone with its group, and there when its host is not."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import asupervise
from asupervise import procfs
from tests.conftest import ROOT, clean_environment, own_children, wait_gone
from tests.test_endings import WITHIN_S
from tests.workers import READY, SLEEP, Channel, gone, is_alive, start, waits_of

pytestmark = pytest.mark.usefixtures("own_temporary_folder")


def is_guardian(pid: int) -> bool:
    return b"asupervise-guardian" in Path(f"/proc/{pid}/cmdline").read_bytes()


def guardians(of: int | None = None) -> set[int]:
    """The guardians that are children of a process; of this one by default."""
    if of is None:
        children = own_children()
    else:
        tasks = Path(f"/proc/{of}/task").iterdir()
        children = {int(p) for t in tasks for p in (t / "children").read_text().split()}
    return {pid for pid in children if is_guardian(pid)}


async def the_guardian() -> int:
    """The one that there is, as soon as it can be seen.

    A list of children may leave one out (proc_tid_children(5)), and a process that has just been
    made has no command line for a moment.
    """
    while len(found := guardians()) != 1:
        await asyncio.sleep(0.01)
    return found.pop()


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- what it costs ------------------------------------------------------------------------------


async def test_it_is_small_and_idle(channel: Channel) -> None:
    async with start(channel, SLEEP, SLEEP):
        await channel.lines(2)
        guardian = await the_guardian()
        before = await waits_of(guardian)
        # More than the time after which it is told who the workers are: a line, and hardly more.
        await asyncio.sleep(0.3)
        assert await waits_of(guardian) - before <= 5
        assert resident_bytes(guardian) <= 10 * 1024 * 1024


async def test_it_can_be_switched_off(channel: Channel) -> None:
    async with start(channel, SLEEP, guardian=False):
        await channel.lines(1)
        assert not guardians()


async def test_it_holds_nothing_of_the_hosts(channel: Channel) -> None:
    """Neither a descriptor that the host lets its children inherit, nor its folder."""
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    try:
        async with start(channel, SLEEP):
            await channel.lines(1)
            guardian = await the_guardian()
            assert len(os.listdir(f"/proc/{guardian}/fd")) == 3
            assert os.readlink(f"/proc/{guardian}/cwd") == "/"
            assert os.getsid(guardian) == guardian
    finally:
        os.close(read_end)
        os.close(write_end)


# --- when it ends -------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [READY + "exit 0", READY + "exit 3", SLEEP])
async def test_it_never_outlives_the_group(script: str, channel: Channel) -> None:
    async with start(channel, script) as ctx:
        await channel.lines(1)
        await ctx.close()
        assert await ctx.wait() is not None
        # Reaped, not just dead.
        assert not own_children()


async def test_a_stopped_one_does_not_outlive_the_group(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asupervise.guardian._GOODBYE_LIMIT_S", 0.05)
    async with start(channel, SLEEP):
        await channel.lines(1)
        guardian = await the_guardian()
        os.kill(guardian, signal.SIGSTOP)
    assert not is_alive(guardian)


async def test_a_killed_one_is_reported_and_harms_nobody(channel: Channel) -> None:
    go = f"{channel.path}.go"
    os.mkfifo(go)
    ctx = await start(channel, READY + 'read line < "$CHANNEL.go"')
    await channel.lines(1)
    guardian = await the_guardian()
    os.kill(guardian, signal.SIGKILL)
    await gone(guardian)
    await asyncio.to_thread(Path(go).write_text, "go\n")
    result = await ctx.wait()
    assert result is not None
    assert not result.is_failed()
    assert any(f"the guardian (process {guardian}) was killed" in w for w in result.warnings)


async def test_one_that_cannot_be_started_stops_the_start(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("asupervise.guardian.subprocess.Popen", refuse)
    with pytest.raises(BlockingIOError):
        await start(channel, SLEEP)
    assert not own_children()


# --- whom it guards -----------------------------------------------------------------------------

HOST = """
import asyncio, json, os, sys, threading
from asupervise import start_processes

def group(name):
    script = "(setsid sh -c 'echo ready 0 $$ >> {channel}; exec sleep 1000' &) ; " \\
        "echo ready 1 $$ >> {channel}; exec sleep 1000"
    return start_processes(name, ["/bin/sh", "-c"], {{0: (script,)}}, {{0: {{}}}})

{code}
"""


class Host:
    """A program of its own, in which `code` runs; `group(name)` there starts a group."""

    def __init__(self, channel: Channel, code: str, **options: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOST.format(channel=channel.path, code=code)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            **{"cwd": ROOT, "env": clean_environment(), **options},
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def kill(self) -> None:
        self.process.kill()
        self.end()

    def end(self) -> None:
        self.process.communicate()


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    made: list[Host] = []
    yield made
    for host in made:
        host.kill()


async def workers_of(channel: Channel, groups: int = 1) -> list[int]:
    """The pids of each group's worker and daemon, once they are there."""
    async with asyncio.timeout(20):
        return [int(words[2]) for words in await channel.lines(2 * groups)]


SLEEPS = """
async def main():
    ctx = await group("t")
    await asyncio.sleep(1000)
asyncio.run(main())
"""


async def test_two_groups_in_one_host(channel: Channel, hosts: list[Host]) -> None:
    """Each has its own; the end of one leaves the other's alone."""
    code = """
async def main():
    first, second = await group("a"), await group("b")
    await asyncio.to_thread(sys.stdin.readline)
    await first.close()
    print(json.dumps(second.pids()), flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""
    hosts.append(host := Host(channel, code))
    pids = await workers_of(channel, 2)
    pid = host.process.pid
    assert len(both := guardians(pid)) == 2
    assert host.process.stdin is not None
    host.process.stdin.write(b"\n")
    host.process.stdin.flush()
    await asyncio.to_thread(host.line)
    assert len(alive := [p for p in pids if is_alive_and_no_zombie(p)]) == 2
    assert len(guardians(pid)) == 1
    host.kill()
    assert not wait_gone({*alive, *both}, WITHIN_S)


async def test_a_forked_child_of_the_host_does_not_blind_it(
    channel: Channel, hosts: list[Host]
) -> None:
    """multiprocessing's "fork" copies our end of the pipe: the guardian must see us end."""
    code = """
async def main():
    ctx = await group("t")
    pid = os.fork()
    if not pid:
        import time
        os.close(1)
        time.sleep(1000)
        os._exit(0)
    print(pid, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""
    hosts.append(host := Host(channel, code))
    pids = await workers_of(channel)
    forked = int(await asyncio.to_thread(host.line))
    watching = guardians(host.process.pid)
    try:
        host.kill()
        assert not wait_gone({*pids, *watching}, WITHIN_S)
        assert is_alive(forked)
    finally:
        os.kill(forked, signal.SIGKILL)


async def test_a_supervisor_in_a_threads_loop(channel: Channel, hosts: list[Host]) -> None:
    code = """
async def main():
    ctx = await group("t")
    await asyncio.sleep(1000)
threading.Thread(target=lambda: asyncio.run(main())).start()
"""
    hosts.append(host := Host(channel, code))
    pids = await workers_of(channel)
    host.kill()
    assert not wait_gone(pids, WITHIN_S)


async def test_a_loop_that_is_thrown_away(channel: Channel, hosts: list[Host]) -> None:
    """asyncio kills its own children then, the workers, but nobody below them."""
    code = """
import gc
loop = asyncio.new_event_loop()
loop.run_until_complete(group("t").__aenter__())
sys.stdin.readline()
loop.close()
del loop
gc.collect()
print("closed", flush=True)
sys.stdin.readline()
"""
    hosts.append(host := Host(channel, code, stderr=subprocess.DEVNULL))
    pids = await workers_of(channel)
    assert host.process.stdin is not None
    host.process.stdin.write(b"\n")
    host.process.stdin.flush()
    assert await asyncio.to_thread(host.line) == "closed"
    assert not wait_gone(pids, WITHIN_S)
    assert host.process.poll() is None


async def test_a_worker_that_overwrites_its_environment(channel: Channel) -> None:
    """As setproctitle does: it is known by its session then (for the rest, `test_endings`)."""
    code = """
import asyncio, sys
from asupervise import start_processes

async def main():
    program = ["env", "-i", sys.executable, "-I", "-S", "-c", sys.argv[1]]
    ctx = await start_processes("t", program, {0: ()}, {0: {}})
    # Until the guardian has been told who the workers are.
    await asyncio.sleep(0.3)
    print(ctx.pids()[0], flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""
    host = subprocess.Popen(
        [sys.executable, "-c", code, "import time; time.sleep(1000)"],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
    )
    assert host.stdout is not None
    pid = int(await asyncio.to_thread(host.stdout.readline))
    host.kill()
    host.communicate()
    assert not wait_gone([pid], WITHIN_S)


@pytest.mark.parametrize("how", ["another folder", "PYTHONPATH", "a relative PYTHONPATH"])
async def test_it_finds_the_package_wherever_the_host_is(
    how: str, channel: Channel, hosts: list[Host], tmp_path: Path
) -> None:
    """It starts without site and environment, in the root folder."""
    package = Path(asupervise.__file__).parent.parent
    path = os.path.relpath(package, tmp_path) if how.startswith("a relative") else str(package)
    env = clean_environment() | {"PYTHONPATH": path}
    hosts.append(host := Host(channel, SLEEPS, cwd=tmp_path, env=env))
    pids = await workers_of(channel)
    host.kill()
    assert not wait_gone(pids, WITHIN_S)


def is_alive_and_no_zombie(pid: int) -> bool:
    entry = procfs.read_entry(pid)
    return entry is not None and entry.alive


def test_it_does_not_keep_a_forked_child_from_ending(channel: Channel) -> None:
    """A child that is forked while a group runs ends by itself, and the group goes on."""

    async def main() -> None:
        async with start(channel, SLEEP) as ctx:
            await channel.lines(1)
            pid = os.fork()
            if not pid:
                os._exit(0)
            assert os.waitpid(pid, 0) == (pid, 0)
            await the_guardian()
            assert await ctx.wait(0) is None

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    thread.join()
