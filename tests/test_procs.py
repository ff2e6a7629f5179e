"""`start_processes` as its callers see it: what workers get, what a result says, who is blamed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from asupervise import (
    ChildFailedError,
    DefaultLogsSpecs,
    PContext,
    RunProcsResult,
    Std,
    plan_processes,
    run_services,
    start_processes,
)
from asupervise._compat import has_ended
from asupervise.postmortem import WallClock
from asupervise.spec import RunOptions
from tests.workers import (
    HELD,
    PYTHON,
    READY,
    SLEEP,
    STUBBORN,
    Channel,
    gone,
    is_alive,
    shell,
    start,
)

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("own_temporary_folder")


async def run(*scripts: str, **options: Any) -> RunProcsResult:
    """The result of a group of one shell script a rank."""
    async with start(None, *scripts, **options) as ctx:
        result = await ctx.wait()
    assert result is not None
    return result


# --- what workers get -----------------------------------------------------------------------------


async def test_arguments_and_environment_by_rank(tmp_path: Path) -> None:
    program = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ.get('MINE')]))"
    ctx = await start_processes(
        "t",
        [*PYTHON, program],
        {0: ("--lr", 0.1), 1: [None, Path("/x")], 2: ()},
        {0: {"MINE": "a"}, 1: {"MINE": "b"}, 2: {}},
        DefaultLogsSpecs(str(tmp_path / "logs"), redirects=Std.OUT),
    )
    result = await ctx.wait()
    assert result is not None
    told = [json.loads(Path(result.stdouts[rank]).read_text()) for rank in range(3)]
    assert told == [[["--lr", "0.1"], "a"], [["None", "/x"], "b"], [[], None]]


async def test_a_plain_program() -> None:
    async with start_processes("t", "true", {0: ()}, {0: {}}) as ctx:
        result = await ctx.wait()
    assert result is not None
    assert not result.is_failed()
    assert result.return_values == {0: None}
    assert result.root_cause is None
    result.raise_for_failure("t")


async def test_what_a_context_tells(tmp_path: Path) -> None:
    logs = DefaultLogsSpecs(str(tmp_path / "logs"), redirects={1: Std.ALL})
    async with start(None, "exit 0", "exit 0", logs_specs=logs) as ctx:
        assert (ctx.name, ctx.nprocs) == ("t", 2)
        assert list(ctx.pids()) == [0, 1]
        assert ctx.stdouts[0] == ctx.stderrs[0] == ""
        assert ctx.log_dir is not None
        for rank, paths in ((1, ctx.stdouts), (1, ctx.stderrs), (0, ctx.error_files)):
            assert paths[rank].startswith(f"{ctx.log_dir}/attempt_0/{rank}/")
        result = await ctx.wait()
    assert result is not None
    assert result.stdouts == {1: ctx.stdouts[1]}
    assert result.stderrs == {1: ctx.stderrs[1]}
    assert result.log_dir == ctx.log_dir


async def test_the_working_directory(tmp_path: Path) -> None:
    logs = DefaultLogsSpecs(str(tmp_path / "logs"), redirects=Std.OUT)
    result = await run("pwd", logs_specs=logs, cwd="/")
    assert Path(result.stdouts[0]).read_text() == "/\n"


async def test_a_temporary_folder_goes_after_success_and_stays_after_a_failure(
    tmp_path: Path,
) -> None:
    for scripts, stays in ((["exit 0"] * 2, False), (["echo x; exit 0", "exit 3"], True)):
        for logs in (None, DefaultLogsSpecs(redirects=Std.ALL)):
            result = await run(*scripts, logs_specs=logs)
            assert (result.log_dir is not None) is stays
            assert len(list(tmp_path.glob("asupervise_*"))) == stays
            if result.log_dir is not None:
                assert Path(result.log_dir).stat().st_mode & 0o777 == 0o700
                shutil.rmtree(result.log_dir)


# --- signals --------------------------------------------------------------------------------------


TELLING = 'trap \'echo "got $RANK 0" > "$CHANNEL"\' USR1; ' + READY + "while :; do sleep 0.01; done"


async def test_send_signal(channel: Channel) -> None:
    async with start(channel, TELLING, TELLING, TELLING) as ctx:
        assert await channel.pids(3) == ctx.pids()
        ctx.send_signal(signal.SIGUSR1, ranks=[1])
        assert await channel.lines(1) == [["got", "1", "0"]]
        ctx.send_signal(signal.SIGUSR1, ranks=())
        ctx.send_signal(signal.SIGUSR1)
        assert sorted(rank for _, rank, _ in await channel.lines(3)) == ["0", "1", "2"]
        with pytest.raises(ValueError, match=r"ranks: no local ranks \[-1, 3\]: expected 0\.\.2"):
            ctx.send_signal(signal.SIGUSR1, ranks=(0, 3, -1))
        with pytest.raises(ValueError, match="4711 is not a signal of this system"):
            ctx.send_signal(4711)
        assert await ctx.wait(0) is None
        ctx.send_signal(signal.SIGKILL)
        result = await ctx.wait()
    assert result is not None
    assert {f.exitcode for f in result.failures.values()} == {-9}
    ctx.send_signal(signal.SIGUSR1)  # nobody is there to get it


# --- failures -------------------------------------------------------------------------------------


async def test_an_exit_code_and_a_signal() -> None:
    result = await run("exit 3")
    [failure] = result.failures.values()
    assert result.is_failed()
    assert result.return_values == {}
    assert (failure.local_rank, failure.exitcode, failure.signal_name()) == (0, 3, "<N/A>")
    assert not failure.ended_by_us

    [failure] = (await run("kill -SEGV $$")).failures.values()
    assert (failure.exitcode, failure.signal_name()) == (-11, "SIGSEGV")
    assert f"Signal 11 (SIGSEGV) ended PID {failure.pid}" in str(failure.message)


async def test_who_succeeded_before_is_no_failure(channel: Channel) -> None:
    async with start(channel, READY, HELD + "exit 3") as ctx:
        await gone((await channel.pids(1))[0])
        await channel.open_gate()
        result = await ctx.wait()
    assert result is not None
    assert list(result.failures) == [1]


async def test_the_report_has_the_last_lines_of_stderr(tmp_path: Path) -> None:
    script = "i=0; while [ $i -lt 100 ]; do echo line $i >&2; i=$((i + 1)); done; exit 3"
    logs = DefaultLogsSpecs(str(tmp_path / "logs"), redirects=Std.ERR)
    result = await run(script, logs_specs=logs)
    [failure] = result.failures.values()
    assert failure.stderr_tail.splitlines() == [f"line {i}" for i in range(80, 100)]
    with pytest.raises(ChildFailedError) as caught:
        result.raise_for_failure("t")
    assert "line 99" in str(caught.value)


# Rank 0 waits until rank 1 has failed, as far as can be seen from there, and fails so much later.
RAISING = """
import os, sys, time
sys.path.insert(0, {root!r})
{record}
def gone(pid):
    try:
        return " Z " in open(f"/proc/{{pid}}/stat").read()
    except FileNotFoundError:
        return True
@record
def main():
    rank, channel, gate = int(os.environ["RANK"]), os.environ["CHANNEL"], os.environ["GATE"]
    with open(channel, "w") as file:
        file.write(f"ready {{rank}} 0\\n")
    if rank == 1:
        with open(gate, "w") as file:
            file.write(f"{{os.getpid()}} {{os.environ['TORCHELASTIC_ERROR_FILE']}}\\n")
    else:
        with open(gate) as file:
            pid, recorded = file.readline().split()
        while not (os.path.exists(recorded) or gone(pid)):
            time.sleep(0.001)
        time.sleep({delay_s})
    raise ValueError(f"rank {{rank}}")
main()
"""
ROUNDS = int(os.environ.get("ASUPERVISE_TEST_ROUNDS", "10"))


# Who records its error is known to be the first, however long its end takes; of the others the
# end is all that is seen, and on a machine with too much to do an end may take 50 ms.
@pytest.mark.parametrize(
    ("recorded", "delay_s"),
    [(True, 0.05), (False, float(os.environ.get("ASUPERVISE_TEST_DELAY_S", "0.25")))],
    ids=["recorded", "bare"],
)
async def test_who_raises_first_is_to_blame(
    recorded: bool, delay_s: float, channel: Channel, tmp_path: Path
) -> None:
    """In every round; ``ASUPERVISE_TEST_ROUNDS`` says how many."""
    record = "from asupervise import record" if recorded else "record = lambda f: f"
    program = RAISING.format(root=str(ROOT), record=record, delay_s=delay_s)
    os.mkfifo(gate := tmp_path / "gate")
    env = {"CHANNEL": str(channel.path), "GATE": str(gate)}
    blamed = []
    for _ in range(ROUNDS):
        async with start_processes(
            "t",
            [*PYTHON, program],
            {0: (), 1: ()},
            {0: {**env, "RANK": "0"}, 1: {**env, "RANK": "1"}},
            DefaultLogsSpecs(redirects=Std.ERR),
        ) as ctx:
            result = await ctx.wait()
        assert result is not None
        assert result.root_cause is not None
        rank, failure = result.root_cause
        blamed.append(rank)
        assert not failure.ended_by_us
        assert ("ValueError: rank 1" in failure.traceback) is recorded
        assert recorded or "ValueError: rank 1" in failure.stderr_tail
        if 0 in result.failures:
            assert failure.timestamp < result.failures[0].timestamp
    assert blamed == [1] * ROUNDS


async def test_who_fails_while_being_ended_is_not_to_blame(channel: Channel) -> None:
    answering = f"trap 'exit 9' TERM; {READY} while :; do sleep 0.01; done"
    async with start(channel, answering, HELD + "exit 3") as ctx:
        await channel.lines(1)
        await channel.open_gate()
        result = await ctx.wait()
    assert result is not None
    assert result.failures[0].exitcode == 9
    assert result.failures[0].ended_by_us
    assert result.root_cause is not None
    assert result.root_cause[0] == 1


async def test_two_crashes_at_once_are_both_their_own(channel: Channel) -> None:
    """The second is dead before we signal anybody, though not yet known to be."""
    async with start(channel, SLEEP, SLEEP, SLEEP) as ctx:
        pids = await channel.pids(3)
        os.kill(pids[2], signal.SIGSEGV)
        os.kill(pids[0], signal.SIGBUS)
        while not (has_ended(pids[0]) and has_ended(pids[2])):
            pass  # without a turn of the loop
        result = await ctx.wait()
    assert result is not None
    ended_by_us = {rank: failure.ended_by_us for rank, failure in result.failures.items()}
    assert ended_by_us == {0: False, 1: True, 2: False}
    assert result.failures[0].exitcode == -signal.SIGBUS


async def test_the_order_survives_a_step_of_the_clock(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All wall-clock times are made from monotonic ones, by one reading of both clocks."""
    wall, wall_ns = time.time, time.time_ns
    async with start(channel, SLEEP, SLEEP) as ctx:
        pids = await channel.pids(2)
        os.kill(pids[1], signal.SIGKILL)
        await asyncio.sleep(0)
        monkeypatch.setattr(time, "time", lambda: wall() - 3600)
        monkeypatch.setattr(time, "time_ns", lambda: wall_ns() - 3600 * 10**9)
        result = await ctx.wait()
    assert result is not None
    first, second = result.failures[1], result.failures[0]
    assert first.observed_at < second.observed_at < first.observed_at + 60
    assert first.observed_monotonic_ns is not None
    assert second.observed_monotonic_ns is not None
    apart_ns = second.observed_monotonic_ns - first.observed_monotonic_ns
    assert second.observed_at - first.observed_at == pytest.approx(apart_ns / 10**9, abs=1e-5)


def test_the_wall_clock_of_a_group() -> None:
    clock = WallClock.now()
    assert abs(clock.seconds(time.monotonic_ns()) - time.time()) < 60
    assert clock.seconds(5 * 10**9) - clock.seconds(3 * 10**9) == pytest.approx(2)


# --- not started ----------------------------------------------------------------------------------


async def test_nothing_is_started_for_a_program_that_is_missing(tmp_path: Path) -> None:
    marker = tmp_path / "started"
    envs = {0: {}, 1: {"PATH": "/nowhere"}}
    with pytest.raises(FileNotFoundError, match="local rank 1: no such program on PATH"):
        await start_processes("t", "touch", {0: (marker,), 1: (marker,)}, envs)
    assert not marker.exists()
    assert not list(tmp_path.glob("asupervise_*"))


async def test_a_log_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"log_dir: .*is a file"):
        DefaultLogsSpecs(str(tmp_path / "file"))
    logs = DefaultLogsSpecs(str(tmp_path / "file" / "below"), redirects=Std.ALL)
    with pytest.raises(NotADirectoryError) as caught:
        await start(None, "exit 0", logs_specs=logs)
    assert caught.value.filename == str(tmp_path / "file")


async def test_the_error_at_the_start_wins_over_what_others_did(
    channel: Channel, tmp_path: Path
) -> None:
    """Rank 0 has failed by itself before rank 1 turns out not to start."""
    (tmp_path / "bin").mkdir()
    bad = tmp_path / "bin" / "sh"
    bad.write_text("#!/nonexistent\n")
    bad.chmod(0o755)
    envs = {0: {}, 1: {"PATH": str(tmp_path / "bin")}}
    with pytest.raises(FileNotFoundError, match="local rank 1: cannot start 'sh'"):
        await start_processes("t", ["sh", "-c"], {0: ("exit 3",), 1: ("",)}, envs)


async def test_a_group_cannot_be_used_before_it_is_started() -> None:
    ctx = PContext(plan_processes("t", "true", {0: ()}, {0: {}}), RunOptions())
    with pytest.raises(RuntimeError, match="group 't' has not been started"):
        await ctx.wait()
    starting = start(None, "exit 0")
    await (await starting).wait()
    with pytest.raises(RuntimeError, match="group 't' is started already"):
        await starting


def test_a_group_that_nobody_awaits_says_so() -> None:
    with pytest.warns(RuntimeWarning, match=r"group 't' was never started: `await` it, or"):
        start(None, "true")
    with pytest.warns(RuntimeWarning, match=r"service 't' was never started"):
        run_services(**shell(None, ["true"]))


async def test_what_is_not_awaited_yet_is_no_group() -> None:
    starting = start(None, "true")
    with pytest.raises(AttributeError, match=r"no attribute 'wait': `await` it first, or enter it"):
        starting.wait()  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"no attribute 'wiat'$"):
        starting.wiat()  # type: ignore[attr-defined]
    await (await starting).wait()


@pytest.mark.parametrize("what", ["group", "service"])
async def test_what_is_no_event_bus_is_refused(what: str) -> None:
    call: Any = start_processes if what == "group" else run_services
    with pytest.raises(ValueError, match=r"events: \[\]: expected an EventBus"):
        await call(**shell(None, ["true"]), events=[])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "a\nb"}, r"name: 'a\\nb': expected printable text"),
        ({"envs": None}, "envs: None: expected a mapping by local rank"),
        ({"console": "json"}, "console: 'json': expected a ConsoleFormat"),
        ({"shutdown_timeout": "3"}, "shutdown_timeout: '3': expected seconds"),
        ({"hang_timeout": "3"}, "hang_timeout: '3': expected seconds above zero"),
    ],
)
def test_what_has_another_type_is_refused_at_the_call(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        start_processes(**{**shell(None, ["true"]), **given})


async def test_another_event_loop_is_refused(channel: Channel) -> None:
    async with start(channel, SLEEP) as ctx:
        await channel.pids(1)
        calls = (ctx.wait, ctx.close, ctx.dump_stacks, ctx.wait_failing)

        async def elsewhere() -> None:
            for call in calls:
                with pytest.raises(RuntimeError, match="group 't' belongs to another event loop"):
                    await call()
            with pytest.raises(RuntimeError, match="another event loop"):
                ctx.events()

        await asyncio.to_thread(asyncio.run, elsewhere())
        assert repr(ctx) == "<PContext 't': 1 workers, 1 running>"
        # From where it does not run it is reached so:
        loop = asyncio.get_running_loop()
        closing = asyncio.to_thread(
            lambda: asyncio.run_coroutine_threadsafe(ctx.close(), loop).result()
        )
        await closing
    assert "ended" in repr(ctx)


async def test_close_has_the_patience_of_its_group(channel: Channel) -> None:
    """Which is none here; by itself it would have half a minute."""
    async with start(channel, STUBBORN, shutdown_timeout=0.0) as ctx:
        pids = await channel.pids(1)
        async with asyncio.timeout(20):
            await ctx.close()
        assert not is_alive(pids[0])


@pytest.mark.parametrize("what", ["group", "service"])
async def test_of_workers_that_were_only_ended_no_folder_stays(
    what: str, channel: Channel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    specs = DefaultLogsSpecs(redirects=Std.ALL)
    if what == "group":
        async with start(channel, SLEEP, logs_specs=specs) as ctx:
            await channel.pids(1)
            assert list(tmp_path.glob("asupervise_*"))
        result = await ctx.wait()
    else:
        async with run_services(**shell(channel, [SLEEP]), logs_specs=specs) as services:
            await channel.pids(1)
            assert list(tmp_path.glob("asupervise_*"))
        result = await services.wait()
    assert result is not None
    assert (result.is_failed(), result.root_cause, result.log_dir) == (True, None, None)
    assert not list(tmp_path.glob("asupervise_*"))


@pytest.mark.parametrize("given", [{"tee": 3}, 3, DefaultLogsSpecs], ids=["a", "b", "c"])
def test_what_is_no_logs_specs(given: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"logs_specs: .* expected LogsSpecs, as"):
        start(None, "true", logs_specs=given)


async def test_several_groups_at_once(channel: Channel) -> None:
    async with (
        start(channel, SLEEP, SLEEP) as one,
        start(channel, SLEEP) as two,
    ):
        await channel.lines(3)
        await one.close()
        assert await two.wait(0) is None
        assert all(map(is_alive, two.pids().values()))
    result = await one.wait()
    assert result is not None
    assert len(result.failures) == 2


def test_a_typed_user_program_is_accepted(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    argv = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(
        [*argv, "tests/typing/api.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
