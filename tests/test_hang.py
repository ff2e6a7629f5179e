"""Workers that make no progress: noticed, explained, ended; and who is not to be taken for one."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise import ChildFailedError, DefaultLogsSpecs, RunProcsResult, Stack, Std, stacks
from asupervise import start_processes as start_group
from asupervise.hang import Pulse
from asupervise.procs import StartingProcesses
from tests.conftest import Run
from tests.workers import SLEEP, STUBBORN, Channel, by_asyncio, by_uvloop, start

pytestmark = pytest.mark.usefixtures("uvloop_has_its_pipe", "own_temporary_folder")


@pytest.fixture
def no_py_spy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "find_py_spy", lambda: None)


HEAD = """\
import os, re, sys, time
from asupervise import heartbeat, record

RANK = int(os.environ["RANK"])

def all_reduce():
    while True:
        time.sleep(0.2)

def load_batch():
    re.match(r"(a+)+$", "a" * 60 + "b")
"""


def python(tmp_path: Path, nprocs: int, code: str, **options: Any) -> StartingProcesses:
    script = tmp_path / "job.py"
    script.write_text(HEAD + textwrap.dedent(code))
    ranks = range(nprocs)
    envs = {rank: {"RANK": str(rank)} for rank in ranks}
    options.setdefault("logs_specs", DefaultLogsSpecs(redirects=Std.ALL))
    return start_group(
        "t", (sys.executable, "-u", str(script)), {r: () for r in ranks}, envs, **options
    )


def root_of(result: RunProcsResult | None) -> tuple[int, str]:
    assert result is not None
    assert result.root_cause is not None
    rank, failure = result.root_cause
    return rank, failure.cause


def report_of(result: Any) -> str:
    with pytest.raises(ChildFailedError) as caught:
        result.raise_for_failure("t")
    return str(caught.value)


# --- signs of life, pure ------------------------------------------------------------------------


def test_output_is_a_sign_of_life() -> None:
    pulse = Pulse(0.0)
    pulse.look(5.0, 0.0, 10, None)
    assert pulse.cause(14.9, 10) is None
    assert pulse.cause(15.0, 10) == "hang: no output and no CPU use for 10 s"


def test_a_log_that_was_truncated_is_a_sign_of_life() -> None:
    pulse = Pulse(0.0, output_bytes=10)
    pulse.look(5.0, 0.0, 3, None)
    assert pulse.since_s == 5.0


def test_cpu_use_is_a_sign_of_life_but_for_that_of_waiting_in_a_loop() -> None:
    pulse = Pulse(0.0)
    pulse.look(10.0, 0.1, 0, None)
    assert pulse.since_s == 0.0
    pulse.look(10.0, 1.0, 0, None)
    assert (pulse.since_s, pulse.cpu_s) == (10.0, 1.0)
    # A child that used a lot has gone, and its share with it.
    pulse.look(12.0, 0.2, 0, None)
    assert pulse.since_s == 12.0


def test_with_heartbeats_nothing_else_counts() -> None:
    pulse = Pulse(0.0)
    pulse.look(1.0, 0.0, 0, 100)
    pulse.look(5.0, 50.0, 5000, 100)
    assert pulse.since_s == 1.0
    assert pulse.cause(11.0, 10) == "hang: no heartbeat for 10 s"
    pulse.look(11.0, 50.0, 5000, 101)
    assert pulse.cause(11.0, 10) is None


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e6),
            st.floats(0, 1e6),
            st.integers(0, 10**12),
            st.none() | st.integers(1, 10**19),
        )
    )
)
def test_whatever_is_seen_a_new_heartbeat_is_life(looks: list[Any]) -> None:
    pulse, now_s = Pulse(0.0), 0.0
    for step_s, cpu_s, size, beat in looks:
        now_s += step_s
        before = pulse.since_s
        pulse.look(now_s, cpu_s, size, beat)
        assert pulse.since_s in (before, now_s)
        pulse.cause(now_s, 1.0)
    pulse.look(now_s, 0.0, 0, 10**20)
    assert pulse.cause(now_s, 0.1) is None


# --- real groups --------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [by_asyncio, by_uvloop], ids=lambda run: run.__name__)
def test_the_one_that_the_others_wait_for_is_singled_out(
    run: Callable[..., Any], tmp_path: Path, no_py_spy: None
) -> None:
    """8 ranks: one loops for ever in C code that holds the GIL, the others wait for it."""

    async def main() -> Any:
        code = """
            def main():
                if RANK == 5:
                    load_batch()
                all_reduce()
            record(main)()
        """
        async with python(tmp_path, 8, code, hang_timeout=1.5, shutdown_timeout=0.2) as ctx:
            return await ctx.wait()

    result = run(main)
    rank, cause = root_of(result)
    assert rank == 5
    assert cause.startswith("hang: no output and no CPU use for ")
    assert cause.endswith(" s in other ranks, which wait for it")
    lines = HEAD.splitlines()
    waiting = lines.index("        time.sleep(0.2)") + 1
    stuck = lines.index('    re.match(r"(a+)+$", "a" * 60 + "b")') + 1
    report = report_of(result)
    assert f"  ranks 0-4, 6-7: in all_reduce (job.py:{waiting}) < main (job.py:" in report
    assert "  rank 5: in match (" in report
    assert f" < load_batch (job.py:{stuck}) < main (job.py:" in report
    assert "rank      : 5 (local_rank: 5)" in report
    # Nor is our own wrapper shown.
    assert "error_handler.py" not in report


@pytest.mark.parametrize("seen", [False, True])
async def test_a_silent_idle_worker_is_a_hang(
    channel: Channel, no_py_spy: None, seen: bool
) -> None:
    began = time.monotonic()
    logs = DefaultLogsSpecs(redirects=Std.OUT if seen else Std.NONE)
    async with start(channel, SLEEP, hang_timeout=0.3, logs_specs=logs) as ctx:
        result = await ctx.wait()
    assert time.monotonic() - began >= 0.3
    rank, cause = root_of(result)
    signs, what = ("no output and no CPU use", "") if seen else ("no CPU use", "not seen")
    assert rank == 0
    assert cause.startswith(f"hang: {signs} for 0.3")
    assert what in cause
    assert result is not None
    assert "process sleep" in result.failures[0].stack


async def test_a_hang_is_a_failure_even_if_all_end_well_on_sigterm(
    channel: Channel, no_py_spy: None
) -> None:
    script = 'trap "exit 0" TERM; while :; do sleep 1000 & wait; done'
    async with start(channel, script, script, hang_timeout=0.2) as ctx:
        result = await ctx.wait()
    assert result is not None
    assert result.is_failed()
    assert root_of(result)[1].startswith("hang: ")
    assert result.failures[root_of(result)[0]].exitcode == -signal.SIGTERM


async def test_who_ignores_the_end_keeps_the_stack_of_the_hang(
    channel: Channel, no_py_spy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumps: list[int] = []
    dump = stacks.dump

    async def counting(handlers: Any, *rest: Any) -> dict[int, Stack]:
        dumps.append(len(handlers))
        return await dump(handlers, *rest)

    monkeypatch.setattr(stacks, "dump", counting)
    async with start(channel, STUBBORN, hang_timeout=0.2, shutdown_timeout=0.05) as ctx:
        result = await ctx.wait()
    assert root_of(result)[1].startswith("hang: ")
    assert dumps == [1]


async def test_busy_or_talkative_workers_do_not_hang(channel: Channel) -> None:
    busy = "i=0; while [ $i -lt 500000 ]; do i=$((i+1)); done"
    talkative = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do echo x; sleep 0.1; done"
    quiet = "sleep 0.05"
    async with start(
        channel, busy, talkative, quiet, hang_timeout=0.6,
        logs_specs=DefaultLogsSpecs(redirects=Std.ALL),
    ) as ctx:  # fmt: skip
        result = await ctx.wait()
    assert result is not None
    assert not result.is_failed()


async def test_the_work_of_a_child_counts(channel: Channel) -> None:
    child = "sh -c 'i=0; while [ $i -lt 500000 ]; do i=$((i+1)); done'; exit 0"
    async with start(channel, child, hang_timeout=0.3) as ctx:
        result = await ctx.wait()
    assert result is not None
    assert not result.is_failed()


async def test_who_sends_no_more_heartbeats_hangs_whatever_it_prints(
    tmp_path: Path, no_py_spy: None
) -> None:
    code = """
        heartbeat()
        while True:
            print("still here")
            time.sleep(0.02)
            if RANK == 0:
                heartbeat()
    """
    async with python(tmp_path, 2, code, hang_timeout=0.5) as ctx:
        result = await ctx.wait()
    assert root_of(result)[0] == 1
    assert root_of(result)[1].startswith("hang: no heartbeat for 0.")


async def test_who_sends_heartbeats_does_not_hang_however_silent(tmp_path: Path) -> None:
    code = """
        for _ in range(10):
            heartbeat()
            time.sleep(0.1)
    """
    async with python(tmp_path, 1, code, hang_timeout=0.4) as ctx:
        result = await ctx.wait()
    assert result is not None
    assert not result.is_failed()


async def test_a_beating_heart_is_not_the_culprit_for_being_elsewhere(
    tmp_path: Path, no_py_spy: None
) -> None:
    """Ranks 1 and 2 wait in the same place; rank 0 is elsewhere, and well."""
    code = """
        def beats():
            while True:
                heartbeat()
                time.sleep(0.02)
        heartbeat()
        record(beats if RANK == 0 else all_reduce)()
    """
    async with python(tmp_path, 3, code, hang_timeout=0.5) as ctx:
        result = await ctx.wait()
    assert root_of(result)[0] == 1
    assert root_of(result)[1].startswith("hang: no heartbeat")


# --- what happens at the same time --------------------------------------------------------------


class Gate:
    """Stands for a dump of stacks that takes as long as the test likes."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def dump(self, *_: object) -> dict[int, Stack]:
        self.reached.set()
        await self.open.wait()
        return {}


async def test_a_group_that_is_being_ended_does_not_hang(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    monkeypatch.setattr(stacks, "dump", gate.dump)
    async with start(channel, SLEEP, hang_timeout=0.1) as ctx:
        await gate.reached.wait()
        closing = asyncio.create_task(ctx.close())
        await asyncio.sleep(0.05)
        gate.open.set()
        await closing
        result = await ctx.wait()
    assert result is not None
    assert result.root_cause is None
    assert result.failures[0].cause == ""


async def test_no_hang_is_looked_for_during_the_grace(channel: Channel, no_py_spy: None) -> None:
    async with start(channel, STUBBORN, hang_timeout=0.2) as ctx:
        await channel.lines(1)
        await ctx.close(timeout=0.5)
        result = await ctx.wait()
    assert result is not None
    assert result.root_cause is None
    assert result.failures[0].cause == ""


async def test_who_ends_well_just_then_has_not_hung_and_others_are_still_watched(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    monkeypatch.setattr(stacks, "dump", gate.dump)
    os.mkfifo(f"{channel.path}.go")
    # The first is silent, and ends while the stacks are being taken; the second hangs later.
    silent = 'read x < "$CHANNEL.go"'
    busy = "i=0; while [ $i -lt 600000 ]; do i=$((i+1)); done; exec sleep 1000"
    async with start(channel, silent, busy, hang_timeout=0.3) as ctx:
        await gate.reached.wait()
        await asyncio.to_thread(Path(f"{channel.path}.go").write_text, "go\n")
        await asyncio.sleep(0.05)
        gate.open.set()
        result = await ctx.wait()
    assert result is not None
    assert list(result.failures) == [1]
    assert root_of(result)[1].startswith("hang: ")


async def test_a_failure_while_the_stacks_are_taken_is_the_root_cause(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    monkeypatch.setattr(stacks, "dump", gate.dump)
    async with start(channel, SLEEP, SLEEP, hang_timeout=0.2) as ctx:
        pids = await channel.pids(2)
        await gate.reached.wait()
        os.kill(pids[1], signal.SIGABRT)
        await asyncio.sleep(0.05)
        gate.open.set()
        result = await ctx.wait()
    assert result is not None
    assert result.root_cause is not None
    assert result.root_cause[0] == 1
    assert result.failures[1].exitcode == -signal.SIGABRT
    assert result.failures[0].ended_by_us


async def test_without_a_timeout_nothing_is_looked_for(channel: Channel) -> None:
    async with start(channel, "sleep 0.3", guardian=False, memory_sample_interval=0) as ctx:
        await asyncio.sleep(0.15)
        loop: Any = asyncio.get_running_loop()
        assert [timer for timer in loop._scheduled if not timer.cancelled()] == []
        result = await ctx.wait()
    assert result is not None
    assert not result.is_failed()


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_that_makes_no_sense(timeout: float) -> None:
    with pytest.raises(ValueError, match="hang_timeout"):
        start_group("t", "/bin/true", {0: ()}, {0: {}}, hang_timeout=timeout)


@pytest.mark.parametrize(
    ("words", "stdout", "stderr"),
    [
        ((), "0/stdout.log + console", "0/stderr.log + console"),
        (("--redirects", 1), "0/stdout.log  ", "0/stderr.log + console"),
        (("--tee", 1, "--redirects", 2), "0/stdout.log + console", "0/stderr.log  "),
    ],
)
def test_output_that_nobody_would_see_is_teed(
    run_cli: Run, words: tuple[object, ...], stdout: str, stderr: str
) -> None:
    """Else a worker that prints, and sleeps in between, counted as hanging."""
    done = run_cli("--hang-timeout", 9, *words, "--dry-run", "--no-python", "true")
    table = done.stdout.decode()
    assert f" attempt_0/{stdout}" in table
    assert f" attempt_0/{stderr}" in table


def test_by_the_command_line(run_cli: Run, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        HEAD + "def main():\n    load_batch() if RANK == 1 else all_reduce()\nrecord(main)()\n"
    )
    done = run_cli("--nproc-per-node", 3, "--hang-timeout", 1, script)
    assert done.returncode == 143
    report = done.stderr.decode()
    assert "cause     : hang: " in report
    assert "  ranks 0, 2: in all_reduce (job.py:" in report
    assert "  rank 1: in match (" in report
