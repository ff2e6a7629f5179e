"""Who sent a SIGKILL, how much memory there was, and that looking costs next to nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise import ChildFailedError, ProcessFailure, memory, start_processes
from asupervise.memory import MemoryGroup, MemorySampler, OomCounts
from tests.conftest import Run
from tests.small_cgroup import LIMIT, MIB
from tests.workers import PYTHON, READY, SLEEP, Channel, settle, start

pytestmark = pytest.mark.usefixtures("own_temporary_folder")


def failure_of(result: Any, rank: int = 0) -> ProcessFailure:
    assert result is not None
    failure: ProcessFailure = result.failures[rank]
    return failure


def report_of(result: Any) -> str:
    with pytest.raises(ChildFailedError) as caught:
        result.raise_for_failure("t")
    return str(caught.value)


# --- reading, from small trees ------------------------------------------------------------------


def written(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


V1_UNLIMITED = "9223372036854771712\n"


def test_cgroup_v2(tmp_path: Path) -> None:
    root = written(
        tmp_path,
        {
            "proc/7/cgroup": "0::/a/b\n",
            "proc/vmstat": "nr_free_pages 12\noom_kill 5\n",
            "sys/fs/cgroup/cgroup.controllers": "memory\n",
            "sys/fs/cgroup/a/b/memory.events": "low 0\noom 3\noom_kill 2\noom_group_kill 9\n",
            "sys/fs/cgroup/a/b/memory.max": f"{LIMIT}\n",
        },
    )
    folder = memory.memory_cgroup(7, root)
    assert folder == f"{root}/sys/fs/cgroup/a/b"
    # The memory controller is not handed on to the cgroup below, and counts here.
    written(tmp_path, {"proc/8/cgroup": "0::/a/b/c\n", "sys/fs/cgroup/a/b/c/cgroup.procs": ""})
    assert memory.memory_cgroup(8, root) == folder
    assert memory.read_counts([folder], root) == OomCounts(
        {folder: MemoryGroup(folder, 2, LIMIT)}, 5
    )


def test_cgroup_v1(tmp_path: Path) -> None:
    root = written(
        tmp_path,
        {
            "proc/7/cgroup": "9:name=systemd:/\n4:memory:/a:b/c\n1:cpu:/x\n0::/\n",
            "sys/fs/cgroup/memory/a:b/c/memory.oom_control": "oom_kill_disable 0\noom_kill 1\n",
            "sys/fs/cgroup/memory/a:b/c/memory.limit_in_bytes": V1_UNLIMITED,
        },
    )
    folder = memory.memory_cgroup(7, root)
    assert folder == f"{root}/sys/fs/cgroup/memory/a:b/c"
    assert memory.read_counts([folder], root) == OomCounts(
        {folder: MemoryGroup(folder, 1, None)}, None
    )


def test_a_container_sees_its_own_cgroup_at_the_top(tmp_path: Path) -> None:
    root = written(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/0123\n",
            "proc/8/cgroup": "4:memory:/../../../../proc\n",
            "sys/fs/cgroup/memory/memory.oom_control": "oom_kill 1\n",
        },
    )
    assert memory.memory_cgroup("self", root) == f"{root}/sys/fs/cgroup/memory"
    assert memory.memory_cgroup(8, root) == f"{root}/sys/fs/cgroup/memory"


def test_hybrid_has_v2_beside_v1(tmp_path: Path) -> None:
    root = written(
        tmp_path,
        {
            "proc/7/cgroup": "1:cpu:/\n0::/a\n",
            "sys/fs/cgroup/unified/a/memory.events": "oom_kill 4\n",
        },
    )
    folder = memory.memory_cgroup(7, root)
    assert folder == f"{root}/sys/fs/cgroup/unified/a"
    assert memory.read_group(folder) == MemoryGroup(folder, 4, None)


def test_where_nothing_is_told(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert memory.memory_cgroup(7, root) is None
    assert memory.read_counts([root], root) == OomCounts({}, None)
    (tmp_path / "proc/self").mkdir(parents=True)
    assert memory.memory_of(7, root) is None


def test_memory_of_a_process(tmp_path: Path) -> None:
    root = written(
        tmp_path,
        {"proc/7/status": "Name:\tx VmRSS: 9\nVmHWM:\t    2048 kB\nVmRSS:\t 1024 kB\nRssAnon:\t"},
    )
    assert memory.memory_of(7, root) == memory.MemoryUse(MIB, 2 * MIB)
    ours = memory.memory_of("self")
    assert ours is not None
    assert MIB < ours.last <= ours.peak


def test_psutil_tells_where_there_is_no_proc(tmp_path: Path) -> None:
    used = memory.memory_of("self", str(tmp_path))
    assert used is not None
    assert used.last > MIB
    assert memory.memory_of(2**22 + 1, str(tmp_path)) is None


lines = st.text(st.sampled_from("oom_kil :\t\n0123456789²٣,/max(deleted)"), max_size=60)


@given(lines | st.text())
def test_no_text_is_too_strange(text: str) -> None:
    version, path = memory.parse_cgroup(text)
    assert version in (0, 1, 2)
    assert version or not path
    value = memory.parse_value(f"oom_kill {text}", "oom_kill")
    assert value is None or value >= 0
    limit = memory.parse_limit(text)
    assert limit is None or limit >= 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max\n", None), ("67108864\n", LIMIT), (V1_UNLIMITED, None), ("", None), ("²", None)],
)
def test_limits(text: str, expected: int | None) -> None:
    assert memory.parse_limit(text) == expected


# --- what follows from it -----------------------------------------------------------------------


def counts(group: int | None, machine: int | None, limit: int | None = LIMIT) -> OomCounts:
    groups = {} if group is None else {"/g": MemoryGroup("/g", group, limit)}
    return OomCounts(groups, machine)


OUTSIDE = "SIGKILL from outside: sent neither by this supervisor nor by the OOM killer"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (counts(0, 0), counts(1, 1), "the kernel's OOM killer (cgroup /g, limit 64 MiB)"),
        (counts(3, None), counts(4, None, None), "the kernel's OOM killer (cgroup /g)"),
        (counts(1, 7), counts(1, 7), OUTSIDE),
        (counts(1, None), counts(1, None), OUTSIDE),
        (counts(None, 7), counts(None, 7), OUTSIDE),
        (
            counts(None, 7),
            counts(None, 8),
            "the kernel's OOM killer, most likely: it has struck once on this machine meanwhile",
        ),
        # The cgroup has been removed.
        (
            counts(0, 7),
            counts(None, 9),
            "the kernel's OOM killer, most likely: it has struck 2 times on this machine meanwhile",
        ),
        (
            counts(0, 7),
            counts(0, 8),
            "SIGKILL from outside: not sent by this supervisor, and hardly by the OOM killer: it "
            "has struck once on this machine meanwhile, but not in cgroup /g",
        ),
        (
            counts(None, None),
            counts(None, None),
            "SIGKILL, not from this supervisor; this kernel does not tell about its OOM killer",
        ),
    ],
)
def test_who_sent_it(before: OomCounts, after: OomCounts, expected: str) -> None:
    assert memory.explain_sigkill(before, after, "/g") == expected


# --- with real workers --------------------------------------------------------------------------


async def test_a_kill_from_outside_is_said_to_be_that(channel: Channel) -> None:
    async with start(channel, SLEEP, SLEEP) as ctx:
        pids = await channel.pids(2)
        os.kill(pids[1], signal.SIGKILL)
        result = await ctx.wait()
    assert failure_of(result, 1).cause == OUTSIDE
    assert failure_of(result, 0).cause == ""
    assert f"cause     : {OUTSIDE}\n" in report_of(result)


async def test_a_kill_during_the_grace_is_not_taken_for_ours(channel: Channel) -> None:
    script = 'trap "" TERM; ' + READY + "while :; do sleep 0.01; done"
    async with start(channel, script) as ctx:
        pid = (await channel.pids(1))[0]
        closing = asyncio.create_task(ctx.close(timeout=20))
        await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        await closing
        failure = failure_of(await ctx.wait())
    assert not failure.ended_by_us
    assert failure.cause == OUTSIDE


async def test_our_own_kill_needs_no_explanation(channel: Channel) -> None:
    async with start(channel, SLEEP) as ctx:
        await channel.lines(1)
        await ctx.close(signal.SIGKILL)
        failure = failure_of(await ctx.wait())
    assert (failure.exitcode, failure.cause, failure.ended_by_us) == (-9, "", True)


async def test_a_shell_that_tells_of_a_kill_is_explained_too(channel: Channel) -> None:
    async with start(channel, "sh -c 'kill -9 $$'; exit $?") as ctx:
        failure = failure_of(await ctx.wait())
    assert (failure.exitcode, failure.cause) == (137, OUTSIDE)


async def test_who_is_killed_before_the_first_look_is_explained_too(channel: Channel) -> None:
    async with start(channel, "kill -9 $$") as ctx:
        failure = failure_of(await ctx.wait())
    assert failure.cause == OUTSIDE
    assert failure.last_rss_bytes is None


def test_the_peak_is_the_workers_and_not_ours(channel: Channel) -> None:
    # Until it runs its program, a child has our memory, which counts for the kernel (vfork).
    ours = bytearray(300 * MIB)

    async def main() -> ProcessFailure:
        async with start(channel, SLEEP, memory_sample_interval=0.02) as ctx:
            pid = (await channel.pids(1))[0]
            await asyncio.sleep(0.2)
            os.kill(pid, signal.SIGKILL)
            return failure_of(await ctx.wait())

    failure = asyncio.run(main())
    assert len(ours) == 300 * MIB
    assert failure.peak_rss_bytes is not None
    assert failure.last_rss_bytes is not None
    assert 0 < failure.last_rss_bytes <= failure.peak_rss_bytes < 50 * MIB


async def test_the_report_tells_a_killed_workers_memory(channel: Channel) -> None:
    code = f"b = bytearray({40 * MIB}); del b; open({str(channel.path)!r}, 'w').write('x\\n')\n"
    code += "import time; time.sleep(100)"
    options = {"memory_sample_interval": 0.02}
    async with start_processes("t", PYTHON, {0: (code,)}, {0: {}}, **options) as ctx:
        await channel.lines(1)
        await asyncio.sleep(0.2)
        ctx._handlers[0]._send(signal.SIGKILL)
        result = await ctx.wait()
    failure = failure_of(result)
    assert failure.peak_rss_bytes is not None
    assert failure.last_rss_bytes is not None
    assert failure.peak_rss_bytes > 40 * MIB > failure.last_rss_bytes
    assert f"memory    : peak {failure.peak_rss_bytes / MIB:.1f} MiB, last seen " in report_of(
        result
    )


def test_memory_is_told_only_of_those_who_were_killed() -> None:
    of = {"record": None, "peak_rss_bytes": 3 * MIB // 2}
    killed = ChildFailedError("t", {0: ProcessFailure(0, 1, -9, "", **of)})
    failed = ChildFailedError("t", {0: ProcessFailure(0, 1, 1, "", **of)})
    assert "memory    : peak 1.5 MiB\n" in str(killed)
    assert "memory" not in str(failed)


async def test_who_is_ending_keeps_the_cgroup_that_it_was_in(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a zombie v1 says that it is in the topmost cgroup, where nothing is counted."""
    async with start(channel, SLEEP, memory_sample_interval=0) as ctx:
        pid = (await channel.pids(1))[0]
        diagnosis = ctx._diagnosis
        diagnosis._look_at_memory()
        before = dict(diagnosis._cgroups)
        assert list(before) == [pid]
        os.kill(pid, signal.SIGKILL)
        # Ended and not yet reaped: the loop has had no turn.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        monkeypatch.setattr(memory, "cgroup_text", lambda pid: "4:memory:/\n0::/\n")
        diagnosis._look_at_memory()
        assert diagnosis._cgroups == before


# --- the sampler --------------------------------------------------------------------------------


async def test_looks_become_rarer_and_an_error_does_not_end_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    due: list[float] = []
    ticks: list[Any] = []

    def call_later(delay: float, tick: Any) -> asyncio.TimerHandle:
        due.append(delay)
        ticks.append(tick)
        return loop.call_at(loop.time() + 1000, tick)

    def look() -> None:
        raise ValueError("a look goes wrong")

    monkeypatch.setattr(loop, "call_later", call_later)
    sampler = MemorySampler(look, 50.0)
    sampler.start()
    for _ in range(6):
        with pytest.raises(ValueError, match="goes wrong"):
            ticks[-1]()
    sampler.stop()
    assert due == [0.1, 3.0, 50.0, 50.0, 50.0, 50.0, 50.0]


def timers() -> list[asyncio.TimerHandle]:
    loop: Any = asyncio.get_running_loop()
    return [timer for timer in loop._scheduled if not timer.cancelled()]


async def test_no_look_at_memory_where_it_is_turned_off(channel: Channel) -> None:
    async with start(channel, SLEEP, memory_sample_interval=0, guardian=False) as ctx:
        await channel.lines(1)
        await asyncio.sleep(0.15)
        assert timers() == []
        ctx.send_signal(signal.SIGKILL)
        failure = failure_of(await ctx.wait())
    assert failure.last_rss_bytes is None


async def test_no_timer_is_left_when_nothing_runs(channel: Channel) -> None:
    async with start(channel, SLEEP, hang_timeout=100) as ctx:
        await channel.lines(1)
        await asyncio.sleep(0.1)
        assert timers()
        await ctx.close()
        await settle()
        assert timers() == []


# --- the OOM killer -----------------------------------------------------------------------------


# Grows by a megabyte at a time, so that somebody can watch.
EAT = textwrap.dedent(
    """
    import os, time
    with open(os.environ["SMALL"] + "/cgroup.procs", "w") as file:
        file.write("0")
    eaten = []
    for n in range(400):
        eaten.append(b"x" * (1 << 20))
        time.sleep(0.01)
    """
)


async def test_the_oom_killer_is_named_with_the_peak(small_cgroup: Path, channel: Channel) -> None:
    async with start_processes(
        "t", PYTHON, {0: (EAT,)}, {0: {"SMALL": str(small_cgroup)}}, memory_sample_interval=0.05
    ) as ctx:
        result = await ctx.wait()
    failure = failure_of(result)
    assert failure.exitcode == -9
    assert not failure.ended_by_us
    assert failure.cause == f"the kernel's OOM killer (cgroup {small_cgroup}, limit 64 MiB)"
    assert failure.peak_rss_bytes is not None
    assert 40 * MIB < failure.peak_rss_bytes < 90 * MIB
    report = report_of(result)
    assert "cause     : the kernel's OOM killer (" in report
    assert "memory    : peak " in report


async def test_a_kill_in_the_same_cgroup_is_not_the_oom_killers(
    small_cgroup: Path, channel: Channel
) -> None:
    join = f'echo 0 > "{small_cgroup}/cgroup.procs"; '
    async with start(channel, join + SLEEP) as ctx:
        pid = (await channel.pids(1))[0]
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        assert failure_of(await ctx.wait()).cause == OUTSIDE


def test_the_command_line_names_the_oom_killer(
    small_cgroup: Path, run_cli: Run, tmp_path: Path
) -> None:
    script = tmp_path / "eat.py"
    script.write_text(EAT)
    done = run_cli("--nproc-per-node", 2, script, env={"SMALL": str(small_cgroup)})
    assert done.returncode == 137
    report = done.stderr.decode()
    assert f"cause     : the kernel's OOM killer (cgroup {small_cgroup}, limit 64 MiB)" in report
    assert "memory    : peak " in report


def test_the_command_line_tells_of_a_kill_from_outside(run_cli: Run, tmp_path: Path) -> None:
    script = tmp_path / "kill.py"
    # Another process does it, as an administrator would.
    script.write_text(
        "import os, subprocess, time\n"
        "if os.environ['LOCAL_RANK'] == '1':\n"
        "    subprocess.run(['sh', '-c', f'sleep 0.1; kill -9 {os.getpid()}'])\n"
        "time.sleep(100)\n"
    )
    done = run_cli("--nproc-per-node", 2, script)
    assert done.returncode == 137
    report = done.stderr.decode()
    assert f"cause     : {OUTSIDE}" in report
    assert "rank      : 1 (local_rank: 1)" in report
    assert "memory    : peak " in report


# --- core dumps ---------------------------------------------------------------------------------


async def test_a_core_dump_is_mentioned(tmp_path: Path) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern.startswith(("|", "/")):
        pytest.skip(f"core dumps of this machine go elsewhere: {pattern}")
    code = (
        "import os, resource, signal\n"
        "hard = resource.getrlimit(resource.RLIMIT_CORE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))\n"
        "os.kill(os.getpid(), signal.SIGABRT)"
    )
    if subprocess.run([*PYTHON, "import resource as r, sys; "
                       "sys.exit(r.getrlimit(r.RLIMIT_CORE)[1] == 0)"]).returncode:  # fmt: skip
        pytest.skip("core dumps are turned off for good here")
    async with start_processes("t", PYTHON, {0: (code,)}, {0: {}}, cwd=str(tmp_path)) as ctx:
        failure = failure_of(await ctx.wait())
    assert failure.signal_name() == "SIGABRT"
    assert failure.cause == f"a core dump was written (core_pattern: {pattern})"
    assert list(tmp_path.glob("core*"))
