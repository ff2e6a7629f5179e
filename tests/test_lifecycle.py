"""`wait`, `close`, `async with`: who waits for whom, and that nothing outlives a group."""

from __future__ import annotations

import asyncio
import json
import operator
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio
import pytest

from asupervise import DefaultLogsSpecs, RunProcsResult, Std, start_processes
from asupervise._compat import Exit
from asupervise.handler import SubprocessHandler
from asupervise.plan import WorkerPlan
from asupervise.shielding import run_in_any_case
from tests.workers import (
    HELD,
    READY,
    RUNNERS,
    SLEEP,
    STUBBORN,
    Channel,
    by_asyncio,
    by_uvloop,
    count_threads,
    gone,
    is_alive,
    settle,
    start,
    stopped,
)

Runner = Callable[[Callable[[], Coroutine[Any, Any, Any]]], Any]

every_loop = pytest.mark.parametrize("run", RUNNERS, ids=lambda run: run.__name__)

pytestmark = pytest.mark.usefixtures("uvloop_has_its_pipe", "own_temporary_folder")


def codes(result: RunProcsResult | None) -> dict[int, int]:
    assert result is not None
    return {rank: failure.exitcode for rank, failure in result.failures.items()}


# --- wait ---------------------------------------------------------------------------------------


@every_loop
def test_wait_returns_when_all_have_succeeded(run: Runner, channel: Channel) -> None:
    async def main() -> None:
        ctx = await start(channel, READY, READY + HELD, READY)
        await channel.lines(3)
        waiting = asyncio.create_task(ctx.wait())
        await settle()
        assert not waiting.done()
        await channel.open_gate()
        result = await waiting
        assert result is not None
        assert not result.is_failed()
        assert result.return_values == {0: None, 1: None, 2: None}

    run(main)


@every_loop
def test_wait_returns_when_one_has_failed_and_the_rest_is_ended(
    run: Runner, channel: Channel
) -> None:
    async def main() -> None:
        ctx = await start(channel, SLEEP, READY + HELD + "exit 3", SLEEP)
        pids = await channel.pids(3)
        assert pids == ctx.pids()
        await channel.open_gate()
        result = await ctx.wait()
        assert codes(result) == {0: -15, 1: 3, 2: -15}
        assert result is not None
        assert result.root_cause is not None
        assert result.root_cause[0] == 1
        assert [f.ended_by_us for f in result.failures.values()] == [True, False, True]
        assert not any(map(is_alive, pids.values()))

    run(main)


async def test_wait_gives_up_after_its_timeout_and_can_be_called_again(channel: Channel) -> None:
    async with start(channel, SLEEP) as ctx:
        assert await ctx.wait(0) is None
        assert await ctx.wait(timeout=0.01) is None
        with pytest.raises(ValueError, match=r"timeout: -1"):
            await ctx.wait(-1)
        with pytest.raises(ValueError, match="timeout: nan"):
            await ctx.wait(float("nan"))
        assert "1 running" in repr(ctx)
    assert "ended" in repr(ctx)
    assert codes(await ctx.wait(0)) == {0: -15}


async def test_wait_after_the_end_gives_the_same_result_again() -> None:
    ctx = await start(None, "exit 7")
    first = await ctx.wait()
    assert codes(first) == {0: 7}
    assert await ctx.wait() is first
    assert await ctx.wait(0) is first


async def test_two_tasks_wait_at_once(channel: Channel) -> None:
    async with start(channel, SLEEP) as ctx:
        waiting = [asyncio.create_task(ctx.wait()) for _ in range(2)]
        await channel.lines(1)
        ctx.send_signal(signal.SIGKILL)
        first, second = await asyncio.gather(*waiting)
        assert first is second
        assert codes(first) == {0: -9}


async def test_cancelling_who_waits_harms_no_worker(channel: Channel) -> None:
    async with start(channel, SLEEP, SLEEP) as ctx:
        pids = await channel.pids(2)
        other = asyncio.create_task(ctx.wait())
        waiting = asyncio.create_task(ctx.wait())
        await settle()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ctx.wait(), 0.01)
        with anyio.move_on_after(0.01):
            await ctx.wait()
        assert all(map(is_alive, pids.values()))
        assert not other.done()
    assert codes(await other) == {0: -15, 1: -15}


async def test_an_exit_is_learnt_from_the_process_not_from_its_pipes(
    channel: Channel, capfd: pytest.CaptureFixture[str]
) -> None:
    """The grandchild has our stdout, stderr and a session of its own; its parent succeeds."""
    child = 'setsid sh -c "echo child 0 \\$\\$ > $CHANNEL; exec sleep 1000" & '
    exits: list[Exit] = []
    ended = asyncio.Event()

    def on_exit(_: SubprocessHandler, exit: Exit) -> None:
        exits.append(exit)
        ended.set()

    plan = WorkerPlan(0, ("/bin/sh", "-c", child + READY), {"CHANNEL": str(channel.path)})
    handler = await SubprocessHandler.start(plan, os.environ, on_exit=on_exit)
    await ended.wait()
    assert exits[0].code == 0
    assert handler.exit is exits[0]
    [grandchild] = [int(pid) for what, *_, pid in await channel.lines(2) if what == "child"]
    assert is_alive(grandchild)
    os.kill(grandchild, signal.SIGKILL)
    await gone(grandchild)


# --- close --------------------------------------------------------------------------------------


async def test_close_ends_all_and_may_be_called_again(channel: Channel) -> None:
    ctx = await start(channel, SLEEP, SLEEP)
    pids = await channel.pids(2)
    await ctx.close()
    assert not any(map(is_alive, pids.values()))
    await ctx.close()
    await ctx.close(signal.SIGKILL, 0)
    assert codes(await ctx.wait()) == {0: -15, 1: -15}


async def test_close_sends_the_signal_that_it_is_told(channel: Channel) -> None:
    ctx = await start(channel, SLEEP)
    await channel.lines(1)
    await ctx.close(signal.SIGINT)
    assert codes(await ctx.wait()) == {0: -2}


async def test_close_refuses_what_makes_no_sense(channel: Channel) -> None:
    async with start(channel, SLEEP) as ctx:
        for sig in (0, -1, 4711):
            with pytest.raises(ValueError, match="is not a signal"):
                await ctx.close(sig)
        with pytest.raises(ValueError, match="timeout: -1"):
            await ctx.close(timeout=-1)
        assert await ctx.wait(0) is None


async def test_close_while_somebody_waits(channel: Channel) -> None:
    ctx = await start(channel, SLEEP)
    waiting = asyncio.create_task(ctx.wait())
    await channel.lines(1)
    await asyncio.gather(ctx.close(), ctx.close(signal.SIGKILL), ctx.close())
    assert codes(await waiting) in ({0: -15}, {0: -9})


async def test_what_ignores_sigterm_is_killed_after_the_grace(channel: Channel) -> None:
    ctx = await start(channel, STUBBORN, SLEEP)
    await channel.lines(2)
    await ctx.close(timeout=0.05)
    result = await ctx.wait()
    assert codes(result) == {0: -9, 1: -15}
    assert result is not None
    assert result.root_cause is None


async def test_the_grace_after_a_failure_is_the_shutdown_timeout(channel: Channel) -> None:
    ctx = await start(channel, STUBBORN, HELD + "exit 3", shutdown_timeout=0.05)
    await channel.lines(1)
    await channel.open_gate()
    assert codes(await ctx.wait()) == {0: -9, 1: 3}


async def test_a_second_close_hurries_a_slow_one(channel: Channel) -> None:
    ctx = await start(channel, STUBBORN)
    await channel.lines(1)
    slow = asyncio.create_task(ctx.close(timeout=1000))
    await settle()
    assert await ctx.wait(0) is None
    await ctx.close(signal.SIGKILL, 0)
    await slow
    assert codes(await ctx.wait(0)) == {0: -9}


async def test_a_second_close_hurries_one_that_has_not_begun(channel: Channel) -> None:
    """Both in one turn of the loop, as two Ctrl-C's that were read together."""
    ctx = await start(channel, STUBBORN)
    await channel.lines(1)
    await asyncio.gather(ctx.close(timeout=1000), ctx.close(signal.SIGKILL, 0))
    assert codes(await ctx.wait(0)) == {0: -9}


async def test_a_later_close_never_slows_an_earlier_one(channel: Channel) -> None:
    ctx = await start(channel, STUBBORN)
    await channel.lines(1)
    await asyncio.gather(ctx.close(signal.SIGKILL, 1000), ctx.close(signal.SIGTERM, 1000))
    assert codes(await ctx.wait(0)) == {0: -9}


async def test_cancelling_close_does_not_stop_it(channel: Channel) -> None:
    ctx = await start(channel, SLEEP)
    [pid] = (await channel.pids(1)).values()
    closing = asyncio.create_task(ctx.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert codes(await ctx.wait()) == {0: -15}
    assert not is_alive(pid)


async def test_the_child_of_a_dead_leader_is_ended(channel: Channel) -> None:
    """torch signals no group whose leader is dead, and leaves the rest of it alive."""
    child = 'sh -c "echo ready 0 \\$\\$ > $CHANNEL; exec sleep 1000" & '
    ctx = await start(channel, child + HELD + "exit 3")
    [pid] = (await channel.pids(1)).values()
    await channel.open_gate()
    assert codes(await ctx.wait()) == {0: 3}
    await gone(pid)


async def test_a_stopped_worker_is_ended(channel: Channel) -> None:
    ctx = await start(channel, SLEEP)
    await channel.lines(1)
    ctx.send_signal(signal.SIGSTOP)
    stopped(ctx.pids()[0])
    await ctx.close(timeout=1000)
    assert codes(await ctx.wait()) == {0: -15}


# --- async with ---------------------------------------------------------------------------------


@every_loop
def test_leaving_the_block_ends_all(run: Runner, channel: Channel) -> None:
    async def main() -> None:
        async with start(channel, SLEEP, SLEEP):
            pids = await channel.pids(2)
        assert not any(map(is_alive, pids.values()))

    run(main)


async def test_leaving_the_block_by_an_exception_ends_all(channel: Channel) -> None:
    pids: dict[int, int] = {}

    async def use() -> None:
        async with start(channel, SLEEP, SLEEP):
            pids.update(await channel.pids(2))
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        await use()
    assert not any(map(is_alive, pids.values()))


@every_loop
def test_leaving_the_block_by_cancellation_ends_all(run: Runner, channel: Channel) -> None:
    pids: dict[int, int] = {}

    async def use() -> None:
        async with start(channel, SLEEP, STUBBORN, shutdown_timeout=0.05) as ctx:
            pids.update(await channel.pids(2))
            await ctx.wait()

    async def main() -> None:
        using = asyncio.create_task(use())
        while len(pids) < 2:
            await asyncio.sleep(0)
        using.cancel()
        await settle()
        using.cancel()  # once more, while it ends them
        with pytest.raises(asyncio.CancelledError):
            await using
        assert not any(map(is_alive, pids.values()))

    run(main)


async def test_leaving_the_block_by_a_timeout_ends_all(channel: Channel) -> None:
    pids: dict[int, int] = {}

    async def use() -> None:
        async with asyncio.timeout(None) as limit, start(channel, SLEEP, SLEEP) as ctx:
            pids.update(await channel.pids(2))
            limit.reschedule(0)
            await ctx.wait()

    with pytest.raises(TimeoutError):
        await use()
    assert not any(map(is_alive, pids.values()))


@pytest.mark.parametrize("inside", [True, False])
async def test_leaving_the_block_by_an_anyio_scope_ends_all(
    inside: bool, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """anyio cancels every await within its scope anew, those of the cleanup as well.

    Who only bears that is woken in every turn of the loop.
    """
    waits: list[object] = []
    wait = asyncio.wait

    async def counted(tasks: Any, **options: Any) -> Any:
        waits.append(tasks)
        return await wait(tasks, **options)

    monkeypatch.setattr(asyncio, "wait", counted)
    pids: dict[int, int] = {}
    with anyio.CancelScope() as scope:
        async with start(channel, STUBBORN, SLEEP, shutdown_timeout=0.05) as ctx:
            pids = await channel.pids(2)
            scope.cancel()
            if inside:
                await ctx.wait()
    assert scope.cancel_called
    assert not any(map(is_alive, pids.values()))
    assert len(waits) < 50


async def test_in_an_anyio_task_group_that_is_cancelled(channel: Channel) -> None:
    pids: dict[int, int] = {}

    async def use() -> None:
        async with start(channel, SLEEP) as ctx:
            pids.update(await channel.pids(1))
            started.set()
            await ctx.wait()

    started = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(use)
        await started.wait()
        group.cancel_scope.cancel()
    assert not any(map(is_alive, pids.values()))


async def test_the_block_gives_the_result_after_it(channel: Channel) -> None:
    starting = start(channel, SLEEP)
    async with starting as ctx:
        await channel.lines(1)
    assert codes(await ctx.wait()) == {0: -15}
    with pytest.raises(RuntimeError, match="started already"):
        await starting


async def test_a_context_can_be_entered(channel: Channel) -> None:
    async with await start(channel, SLEEP) as ctx:
        [pid] = (await channel.pids(1)).values()
        assert ctx.pids() == {0: pid}
    assert not is_alive(pid)


# --- cancelled at the start -----------------------------------------------------------------------


@every_loop
@pytest.mark.parametrize("after", range(8))
def test_cancelled_while_it_starts(
    run: Runner, after: int, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many turns of the loop: nothing is left (`conftest` looks), nothing goes on."""
    seen: list[int] = []
    begin = SubprocessHandler.start

    async def counted(*args: Any, **kwargs: Any) -> SubprocessHandler:
        seen.append(1)
        return await begin(*args, **kwargs)

    monkeypatch.setattr(SubprocessHandler, "start", counted)

    async def main() -> None:
        starting = asyncio.ensure_future(enter())
        for _ in range(after):
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert len(seen) < 30

    async def enter() -> None:
        async with start(channel, *[SLEEP] * 30):
            pytest.fail("it was cancelled")

    run(main)


# --- the loop ends ------------------------------------------------------------------------------


@every_loop
@pytest.mark.parametrize("script", [SLEEP, STUBBORN], ids=["sleep", "stubborn"])
def test_asyncio_run_ends_with_a_group_still_open(
    run: Runner, script: str, channel: Channel
) -> None:
    async def main() -> dict[int, int]:
        await start(channel, script, script, shutdown_timeout=0.05)
        return await channel.pids(2)

    assert not any(map(is_alive, run(main).values()))


@every_loop
def test_asyncio_run_ends_while_a_group_is_being_ended(run: Runner, channel: Channel) -> None:
    async def main() -> dict[int, int]:
        ctx = await start(channel, STUBBORN, STUBBORN)
        pids = await channel.pids(2)
        closing = asyncio.create_task(ctx.close(timeout=0.2))
        await settle()
        assert not closing.done()
        return pids

    assert not any(map(is_alive, run(main).values()))


@every_loop
def test_asyncio_run_ends_by_an_exception(run: Runner, channel: Channel) -> None:
    pids: dict[int, int] = {}

    async def main() -> None:
        ctx = await start(channel, SLEEP, SLEEP)
        pids.update(await channel.pids(2))
        _ = 1 / len(ctx.stdouts[0])

    with pytest.raises(ZeroDivisionError):
        run(main)
    assert not any(map(is_alive, pids.values()))


@every_loop
def test_with_teed_logs_as_well(run: Runner, channel: Channel) -> None:
    """The tailers are tasks of a task group, and `asyncio.run` cancels those, too."""
    pids: dict[int, int] = {}

    async def main() -> None:
        logs = DefaultLogsSpecs(tee=Std.ALL)
        async with start(channel, "echo x; " + SLEEP, STUBBORN, logs_specs=logs) as ctx:
            pids.update(await channel.pids(2))
            await ctx.close(timeout=0.05)
        with pytest.raises(FileNotFoundError):
            await start_processes("t", str(bad), {0: (), 1: ()}, {0: {}, 1: {}}, logs)
        await start(channel, "echo x; " + SLEEP, STUBBORN, logs_specs=logs, shutdown_timeout=0.05)
        pids.update({10 + rank: pid for rank, pid in (await channel.pids(2)).items()})

    bad = cannot_start(channel.path.parent)
    run(main)
    assert not any(map(is_alive, pids.values()))


@every_loop
@pytest.mark.parametrize("after", range(1, 8))
def test_asyncio_run_ends_while_it_starts(run: Runner, after: int, channel: Channel) -> None:
    async def main() -> None:
        starting = asyncio.ensure_future(start_it())
        for _ in range(after):
            await asyncio.sleep(0)
        assert not starting.done()

    async def start_it() -> None:
        await start(channel, *[SLEEP] * 50)

    run(main)


async def test_work_that_is_cancelled_itself_is_begun_anew() -> None:
    begun = []

    async def work() -> str:
        begun.append(asyncio.current_task())
        if len(begun) == 1:
            await asyncio.Event().wait()
        return "done"

    running = asyncio.create_task(run_in_any_case(work))
    await settle()
    begun[0].cancel()
    assert await running == "done"
    assert len(begun) == 2


async def test_the_error_of_shielded_work_is_not_lost() -> None:
    async def work() -> None:
        await settle()
        _ = 1 / 0

    running = asyncio.create_task(run_in_any_case(work))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(ZeroDivisionError):
        await running


# --- where it runs ------------------------------------------------------------------------------


@every_loop
def test_in_a_thread_that_is_not_the_main_one(run: Runner, channel: Channel) -> None:
    found: list[dict[int, int]] = []

    async def main() -> None:
        async with start(channel, SLEEP, READY + HELD + "exit 3") as ctx:
            await channel.lines(2)
            await channel.open_gate()
            found.append(codes(await ctx.wait()))

    thread = threading.Thread(target=run, args=(main,))
    thread.start()
    thread.join()
    assert found == [{0: -15, 1: 3}]


@pytest.mark.parametrize("run", [by_asyncio, by_uvloop], ids=["asyncio", "uvloop"])
def test_the_number_of_threads_is_constant(run: Runner, channel: Channel) -> None:
    async def main() -> None:
        async with start(channel, SLEEP):
            await channel.lines(1)
            with_one = count_threads()
        async with start(channel, *[SLEEP] * 256) as ctx:
            await channel.lines(256)
            # asyncio's own pool starts another where one that has just done something is not yet
            # counted as idle.
            with_many = count_threads()
            assert all(many <= one + 3 for many, one in zip(with_many, with_one, strict=True))
            ctx.send_signal(signal.SIGTERM)
            assert codes(await ctx.wait()) == dict.fromkeys(range(256), -15)

    run(main)


@every_loop
def test_the_hosts_event_loop_policy_is_untouched(run: Runner) -> None:
    policy = asyncio.get_event_loop_policy()
    seen = []

    async def watch() -> None:
        while True:
            seen.append(asyncio.get_event_loop_policy())
            await asyncio.sleep(0)

    async def main() -> None:
        watching = asyncio.create_task(watch())
        async with start(None, *["exit 0"] * 5) as ctx:
            await ctx.wait()
        watching.cancel()
        # The host's own processes are watched as ever.
        process = await asyncio.create_subprocess_exec("/bin/sh", "-c", "exit 5")
        assert await process.wait() == 5

    run(main)
    assert asyncio.get_event_loop_policy() is policy
    assert set(seen) == {policy}


def test_groups_in_two_loops_at_once(tmp_path: Path) -> None:
    """Each loop learns of its own workers, and the policy is the host's in the end."""
    policy = asyncio.get_event_loop_policy()
    found: list[dict[int, int]] = []
    together = threading.Barrier(2)

    async def main() -> None:
        together.wait()
        for _ in range(10):
            async with start(None, *["exit 3"] * 4) as ctx:
                found.append(codes(await ctx.wait()))

    threads = [threading.Thread(target=by_asyncio, args=(main,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all(3 in found_codes.values() for found_codes in found)
    assert asyncio.get_event_loop_policy() is policy


# --- what is left -------------------------------------------------------------------------------


@every_loop
def test_no_descriptor_is_lost_in_many_rounds(run: Runner, tmp_path: Path) -> None:
    async def main() -> None:
        for number in range(rounds):
            logs = DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL) if number % 20 else None
            ctx = await start_processes("t", "/bin/true", {0: ()}, {0: {}}, logs)
            result = await ctx.wait()
            assert result is not None
            assert not result.is_failed()
            if number == 20:
                await settle()
                after_some = len(os.listdir("/proc/self/fd"))
        await settle()
        assert len(os.listdir("/proc/self/fd")) <= after_some

    rounds = 201 if run is by_asyncio else 61  # the others are slower
    run(main)


DEVELOPMENT_MODE = """
import asyncio, gc, os, sys
from asupervise import start_processes

async def main():
    # A machine with much else to do is no slow callback of ours.
    asyncio.get_running_loop().slow_callback_duration = 1000
    async with start_processes(
        "t", "/bin/sh", {0: ("-c", "exit 3"), 1: ("-c", "exec sleep 1000")}, {0: {}, 1: {}}
    ) as ctx:
        assert (await ctx.wait()).is_failed()
    ctx = await start_processes("t", "/bin/true", {0: ()}, {0: {}})
    await ctx.wait()
    try:
        await start_processes("t", sys.argv[1], {0: (), 1: ()}, {0: {}, 1: {}})
    except FileNotFoundError:
        pass
    await start_processes("t", "/bin/sleep", {0: ("1000",)}, {0: {}})

asyncio.run(main())
gc.collect()
print("end")
"""


def test_development_mode_has_nothing_to_say(tmp_path: Path) -> None:
    argv = (
        sys.executable,
        "-X",
        "dev",
        "-W",
        "error",
        "-c",
        DEVELOPMENT_MODE,
        str(cannot_start(tmp_path)),
    )
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("end\n", "", 0)


def cannot_start(folder: Path) -> Path:
    """A program that looks as if it could be started, until one tries (execve(2): ENOENT)."""
    program = folder / "cannot-start"
    program.write_text("#!/nonexistent\n")
    program.chmod(0o755)
    return program


@every_loop
def test_a_program_that_does_not_start_leaves_nothing(
    run: Runner, channel: Channel, tmp_path: Path
) -> None:
    """Of rank 5 of 8; `conftest` looks for processes and files, too."""
    bad = cannot_start(tmp_path)
    args = {rank: ("-c", SLEEP) for rank in range(8)}
    envs = {rank: {"RANK": str(rank), "CHANNEL": str(channel.path)} for rank in range(8)}
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sh").symlink_to(bad)
    envs[5]["PATH"] = str(folder)

    async def fail() -> None:
        with pytest.raises(FileNotFoundError, match=r"local rank 5: cannot start 'sh'") as caught:
            await start_processes("t", "sh", args, envs)
        assert caught.value.errno == 2

    async def main() -> None:
        await fail()
        before = state()
        await fail()
        await settle()
        # Less is no leak: what an earlier test has used may be let go of meanwhile.
        assert all(map(operator.le, state(), before))

    def state() -> tuple[object, ...]:
        return len(asyncio.all_tasks()), count_threads(), len(os.listdir("/proc/self/fd"))

    run(main)
    assert not list(tmp_path.glob("asupervise_*"))


UNKILLABLE = """
import asyncio, json, os, signal, sys
from asupervise import cleanup, procfs, start_processes

async def main():
    cleanup.KILL_WAIT_S = 0.05
    procfs.send_to_group = procfs.send_to_process = lambda *_: True
    ctx = await start_processes("t", "/bin/sleep", {0: ("1000",)}, {0: {}}, shutdown_timeout=0.01)
    files = len(os.listdir("/proc/self/fd"))
    await ctx.close(timeout=0.01)
    result = await ctx.wait()
    closed = files - len(os.listdir("/proc/self/fd"))
    [failure] = result.failures.values()
    print(json.dumps([failure.pid, failure.exitcode, failure.ended_by_us, closed, result.warnings]))

asyncio.run(main())
"""


def test_who_cannot_be_ended_is_named_and_no_longer_waited_for() -> None:
    argv = (sys.executable, "-c", UNKILLABLE)
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    pid, exitcode, ended_by_us, closed, warnings = json.loads(done.stdout)
    assert (exitcode, ended_by_us) == (-signal.SIGKILL, True)
    assert closed == 3  # what told of its end and of the guardian's, and the guardian's pipe
    assert any(f"process {pid} (sleep) of local rank 0 could not be" in text for text in warnings)
