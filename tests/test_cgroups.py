"""The group's own cgroup: found only where delegated, and nobody in it outlives the group."""

import os
import secrets
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from asupervise import cgroups

UNIFIED = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")]

# Wipes its environment and leaves its session: neither token nor group nor parent tell of it.
HIDER = 'env -i setsid sleep "$0" </dev/null >/dev/null 2>&1 & echo ready; exec sleep 1000'

HOST = """
import asyncio, os, sys
from asupervise import DefaultLogsSpecs, Std, start_processes

async def main(marker, script):
    async with start_processes(
        "w", ["sh", "-c", script, marker], {0: ()}, {0: {}}, DefaultLogsSpecs(tee=Std.OUT),
        subreaper=True,
    ) as ctx:
        print(ctx._cleanup.cgroup.folder, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        await ctx.close(timeout=1)
    print("closed", flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def delegated():
    """A delegated cgroup v2, as systemd would make it."""
    for mount in UNIFIED:
        folder = mount / f"asupervise-test-{secrets.token_hex(4)}"
        if not (mount / "cgroup.procs").exists():
            continue
        try:
            folder.mkdir()
            os.setxattr(folder, "user.delegate", b"1")
        except OSError:
            continue
        if not (folder / "cgroup.kill").exists():
            folder.rmdir()
            continue
        yield folder
        _wait_empty(folder)
        for below in [*folder.glob("*/"), folder]:
            below.rmdir()
        return
    pytest.skip("no cgroup v2 with cgroup.kill that this user may make cgroups in")


def start_host(folder, marker):
    host = subprocess.Popen(
        [
            *("sh", "-c", 'echo $$ > "$0"/cgroup.procs; exec "$@"', folder),
            *(sys.executable, "-c", HOST, marker, HIDER),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    said = {host.stdout.readline() for _ in range(2)}
    assert "[w0]:ready\n" in said
    own = Path((said - {"[w0]:ready\n"}).pop().strip())
    assert own.parent == folder
    return host, own


def alive(marker):
    words = (f"/proc/{pid}/cmdline" for pid in os.listdir("/proc") if pid.isdigit())
    sleeper = b"sleep\0" + marker.encode()
    return [path for path in words if sleeper in _read(path)]


def _read(path):
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def test_who_hides_from_everything_else_is_found_when_the_group_is_closed(delegated):
    marker = f"1000.{secrets.randbelow(10**9)}"
    host, own = start_host(delegated, marker)
    with host:
        assert alive(marker)
        host.stdin.write("\n")
        host.stdin.flush()
        assert host.stdout.readline() == "closed\n"
        assert not alive(marker)
        assert not own.exists()


def test_who_hides_from_everything_else_is_found_when_the_host_is_killed(delegated):
    marker = f"1000.{secrets.randbelow(10**9)}"
    host, own = start_host(delegated, marker)
    with host:
        pids = [int(p) for p in (own / "cgroup.procs").read_text().split()]
        watched = [os.pidfd_open(pid) for pid in pids]
        host.send_signal(signal.SIGKILL)
        for pidfd in watched:
            _wait_ended(pidfd)
        assert not alive(marker)


def _wait_empty(folder):
    """The guardian of a killed host is in there, too, and goes last (cgroup-v2: "populated")."""
    with (folder / "cgroup.events").open() as events:
        poller = select.poll()
        poller.register(events, select.POLLPRI)
        while "populated 0" not in events.read():
            assert poller.poll(20_000), "somebody stays in the cgroup"
            events.seek(0)


def _wait_ended(pidfd):
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    assert poller.poll(20_000), "the process outlived its supervisor"
    os.close(pidfd)


def test_a_cgroup_that_nobody_has_delegated_is_left_alone(tmp_path):
    """Small trees: whose the folder is decides, not whether it could be written."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/user.slice\n")
    folder = tmp_path / "sys/fs/cgroup/user.slice"
    folder.mkdir(parents=True)
    (folder / "cgroup.procs").touch()
    expected = str(folder) if os.geteuid() else None
    assert cgroups.delegated(str(tmp_path)) == expected


def test_without_cgroup_v2_there_is_none(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/job\n")
    assert cgroups.make("group", str(tmp_path)) is None
