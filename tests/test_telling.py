"""What is told of a group: real workers, and the events that come of them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from asupervise import DefaultLogsSpecs, Std, events, stacks, start_processes, watches
from asupervise.bus import EventBus, Subscription
from asupervise.context import PContext
from asupervise.errors import NotPermittedError
from asupervise.events import (
    Escalated,
    Event,
    FirstOutput,
    GroupEnded,
    GroupStarting,
    Heartbeat,
    Progress,
    ResourceSample,
    SignalSent,
    StacksDumped,
    Warned,
    WorkerEvent,
    WorkerExited,
    WorkerFailed,
    WorkerStarted,
)
from asupervise.handler import SubprocessHandler
from asupervise.plan import WorkerPlan
from asupervise.procs import StartingProcesses
from tests.workers import READY, RUNNERS, SH, SLEEP, STUBBORN, Channel, settle, start

E = TypeVar("E", bound=Event)
# Several times in a worker: whoever has opened it for the last line may not have closed it yet.
HELD = 'until read line < "$CHANNEL.gate"; do :; done; '
FILES = DefaultLogsSpecs

pytestmark = pytest.mark.usefixtures("uvloop_has_its_pipe", "own_temporary_folder")


def kinds(told: Sequence[Event]) -> list[str]:
    return [event.kind for event in told]


def of(told: Sequence[Event], kind: type[E], rank: int | None = None) -> list[E]:
    """Those of a kind, of a local rank."""
    found = [event for event in told if isinstance(event, kind)]
    return [each for each in found if rank is None or getattr(each, "local_rank", rank) == rank]


async def all_of(stream: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in stream]


async def until(stream: Subscription, kind: type[E], **fields: Any) -> E:
    """The next of this kind with these fields."""
    async for event in stream:
        if isinstance(event, kind) and all(getattr(event, f) == v for f, v in fields.items()):
            return event
    raise AssertionError(f"the stream has ended without {kind.__name__}")


async def told_by(starting: StartingProcesses) -> list[Event]:
    """All that a group tells that ends by itself."""
    async with starting as ctx:
        stream = ctx.events()
        await ctx.wait()
    return await all_of(stream)


def worker(tmp_path: Path, code: str, **options: Any) -> StartingProcesses:
    """A Python program with `heartbeat` and `progress`; it goes on at ``go()``."""
    script = tmp_path / "job.py"
    head = """\
        import os, signal, sys, time
        from asupervise import heartbeat, progress, record
        def say(*words):
            with open(os.environ["CHANNEL"], "w") as channel:
                print(*words, file=channel)
        def go():
            say("ready", 0, os.getpid())
            while True:
                with open(os.environ["CHANNEL"] + ".gate") as gate:
                    if gate.readline():
                        return
    """
    script.write_text(textwrap.dedent(head) + textwrap.dedent(code))
    envs = {0: {"RANK": "0", "CHANNEL": str(tmp_path / "channel")}}
    options.setdefault("logs_specs", FILES(redirects=Std.ALL))
    return start_processes("t", (sys.executable, str(script)), {0: ()}, envs, **options)


# --- a group that succeeds ----------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNNERS, ids=lambda run: run.__name__)
def test_what_is_told_of_a_success(run: Callable[[Any], Any], tmp_path: Path) -> None:
    async def main() -> list[Event]:
        envs = {
            0: {"RANK": "4", "TORCHELASTIC_RUN_ID": "job-7", "ASUPERVISE_ATTEMPT": "2"},
            1: {"RANK": "5", "TORCHELASTIC_RUN_ID": "job-7", "ASUPERVISE_ATTEMPT": "2"},
        }
        logs = FILES(log_dir=str(tmp_path), redirects={0: Std.OUT})
        args = {rank: ("true",) for rank in envs}
        return await told_by(start_processes("trainer", SH, args, envs, logs))

    told = run(main)
    assert kinds(told)[0] == "group_starting"
    assert kinds(told)[-1] == "group_ended"
    assert sorted(kinds(told)[1:-1]) == ["worker_exited"] * 2 + ["worker_started"] * 2
    for event in told:
        assert (event.run_id, event.group, event.attempt) == ("job-7", "trainer", 2)
        assert event.node == os.uname().nodename

    starting, ended = told[0], told[-1]
    assert isinstance(starting, GroupStarting)
    assert (starting.nprocs, starting.entrypoint, starting.temporary) == (2, "/bin/sh", False)
    assert starting.log_dir is not None
    assert Path(starting.log_dir).parent == tmp_path
    assert isinstance(ended, GroupEnded)
    assert (ended.succeeded, ended.root_cause) == (True, None)
    assert ended.duration_s == pytest.approx(ended.time - starting.time, abs=0.5)

    for rank in (0, 1):
        began, over = [event for event in told if getattr(event, "local_rank", None) == rank]
        assert isinstance(began, WorkerStarted)
        assert isinstance(over, WorkerExited)
        assert (began.rank, over.rank) == (4 + rank, 4 + rank)
        assert began.pid == over.pid > 1
        assert began.argv == ("/bin/sh", "-c", "true")
        assert began.binding == ""
        assert over.exitcode == 0
        assert over.uptime_s == (over.monotonic_ns - began.monotonic_ns) / 10**9
    of_0, of_1 = of(told, WorkerStarted, 0)[0], of(told, WorkerStarted, 1)[0]
    assert (of_0.stdout, of_0.stderr) == (f"{starting.log_dir}/attempt_2/0/stdout.log", None)
    assert (of_1.stdout, of_1.stderr) == (None, None)


async def test_the_peak_of_memory_is_told(tmp_path: Path) -> None:
    # Seen while it runs: what the kernel says at the end counts only where it exceeds ours, and
    # whatever runs the tests may be larger.
    code = "x = bytearray(200 << 20); time.sleep(1000)"
    async with worker(tmp_path, code, memory_sample_interval=0.05) as ctx:
        stream = ctx.events()
        while (await until(stream, ResourceSample)).rss_bytes < 200 << 20:
            pass
        await ctx.close()
        exited = await until(stream, WorkerExited)
    assert exited.peak_rss_bytes is not None
    assert exited.peak_rss_bytes > 200 << 20


async def test_ranks_that_the_environment_does_not_know_are_the_local_ones() -> None:
    envs = {0: {"RANK": "x"}, 1: {"RANK": "9" * 30}, 2: {}}
    args = {rank: ("true",) for rank in envs}
    told = await told_by(start_processes("t", SH, args, envs))
    assert {(each.local_rank, each.rank) for each in of(told, WorkerStarted)} == {
        (0, 0), (1, 1), (2, 2),
    }  # fmt: skip


async def test_a_binding_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from asupervise import AffinityMode, NumaOptions

    options = NumaOptions(affinity_mode=AffinityMode.NODE, should_fall_back_if_binding_fails=True)
    async with start(None, "true", numa_options=options) as ctx:
        bound = ctx.plan.workers[0].binding
        (started,) = of(await all_of(ctx.events()), WorkerStarted)
    assert (bound is not None) is started.binding.startswith("CPUs ")


# --- a group that fails -------------------------------------------------------------------------


async def test_what_is_told_of_a_failure(channel: Channel) -> None:
    logs = FILES(redirects=Std.ALL)
    failing = READY + HELD + "echo oh no >&2; exit 3"
    async with start(channel, SLEEP, failing, SLEEP, logs_specs=logs) as ctx:
        stream = ctx.events()
        await channel.lines(3)
        await channel.open_gate()
        await ctx.wait()
        told = await all_of(stream)
    told = [event for event in told if not isinstance(event, ResourceSample)]
    seen = [(event.kind, getattr(event, "local_rank", None)) for event in told]
    assert seen[:4] == [
        ("group_starting", None), ("worker_started", 0), ("worker_started", 1),
        ("worker_started", 2),
    ]  # fmt: skip
    assert seen[4:7] == [("first_output", 1), ("worker_exited", 1), ("signal_sent", None)]
    assert sorted(seen[7:9]) == [("worker_exited", 0), ("worker_exited", 2)]
    assert seen[9:] == [
        ("worker_failed", 0), ("worker_failed", 1), ("worker_failed", 2), ("group_ended", None),
    ]  # fmt: skip

    (sent,) = of(told, SignalSent)
    assert (sent.signal, sent.ranks, sent.why) == ("SIGTERM", (0, 2), "ending")
    ended_by_us, root, _ = of(told, WorkerFailed)
    assert (root.exitcode, root.signal, root.root_cause, root.ended_by_us) == (3, "", True, False)
    assert root.message.startswith("No traceback was recorded.")
    assert root.stderr_tail == "oh no"
    assert root.error_file == ""
    assert root.pid == of(told, WorkerStarted, 1)[0].pid
    assert (ended_by_us.exitcode, ended_by_us.signal) == (-15, "SIGTERM")
    assert (ended_by_us.root_cause, ended_by_us.ended_by_us) == (False, True)
    (ended,) = of(told, GroupEnded)
    assert (ended.succeeded, ended.root_cause) == (False, 1)


async def test_an_exception_is_told_with_its_traceback(tmp_path: Path) -> None:
    code = """
        @record
        def main():
            raise ValueError("x" * 40_000 + "end")
        main()
    """
    (failed,) = of(await told_by(worker(tmp_path, code)), WorkerFailed)
    assert failed.message.startswith("ValueError: xxx")
    assert failed.message.endswith("xend")
    # A consumer may hold thousands of them.
    assert len(failed.message) < 20_000
    assert "characters left out" in failed.message
    assert failed.traceback.startswith("Traceback")
    assert failed.error_file.endswith("/0/error.json")


async def test_a_global_rank_is_the_root_cause(channel: Channel) -> None:
    envs = {0: {"RANK": "6"}, 1: {"RANK": "7"}}
    args = {0: ("sleep 1000",), 1: ("exit 5",)}
    (ended,) = of(await told_by(start_processes("t", SH, args, envs)), GroupEnded)
    assert ended.root_cause == 7


async def test_a_signal_that_is_asked_for_is_told(channel: Channel) -> None:
    code = 'trap "exit 0" USR1; ' + READY + "while :; do sleep 1000 & wait $!; done"
    async with start(channel, code, code) as ctx:
        await channel.lines(2)
        ctx.send_signal(signal.SIGUSR1, [1])
        ctx.send_signal(signal.SIGRTMIN + 5, [])
        ctx.send_signal(signal.SIGUSR1)
        told = await all_of(ctx.events())
    sent = [(each.signal, each.ranks, each.why) for each in of(told, SignalSent)]
    assert sent[:2] == [
        ("SIGUSR1", (1,), "asked"), (f"signal {signal.SIGRTMIN + 5}", (), "asked"),
    ]  # fmt: skip
    assert sent[2][0] == "SIGUSR1"


async def test_a_signal_that_cannot_be_sent_is_not_told(channel: Channel) -> None:
    async with start(channel, SLEEP) as ctx:
        with pytest.raises(ValueError, match="ranks"):
            ctx.send_signal(signal.SIGUSR1, [3])
        with pytest.raises(ValueError, match="signal"):
            ctx.send_signal(4000)
        await ctx.close()
        sent = of(await all_of(ctx.events()), SignalSent)
    assert [each.why for each in sent] == ["ending"]


async def test_what_is_told_when_the_grace_is_over(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "find_py_spy", lambda: None)
    async with start(channel, STUBBORN, SLEEP) as ctx:
        await channel.lines(2)
        await ctx.close(timeout=0.2)
        told = await all_of(ctx.events())
    others = (WorkerStarted, WorkerExited, ResourceSample)
    assert kinds([event for event in told if not isinstance(event, others)]) == [
        "group_starting", "signal_sent", "stacks_dumped", "escalated", "worker_failed",
        "worker_failed", "group_ended",
    ]  # fmt: skip
    (sent,), (dumped,), (escalated,) = (
        of(told, SignalSent), of(told, StacksDumped), of(told, Escalated),
    )  # fmt: skip
    assert (sent.signal, sent.ranks) == ("SIGTERM", (0, 1))
    assert list(dumped.stacks) == [0]
    assert dumped.stacks[0]
    assert (escalated.signal, escalated.ranks) == ("SIGKILL", (0,))
    assert [each.signal for each in of(told, WorkerFailed)] == ["SIGKILL", "SIGTERM"]
    (ended,) = of(told, GroupEnded)
    assert (ended.succeeded, ended.root_cause) == (False, None)


async def test_what_is_told_when_somebody_is_in_a_hurry(channel: Channel) -> None:
    async with start(channel, STUBBORN) as ctx:
        await channel.lines(1)
        closing = asyncio.create_task(ctx.close(timeout=1000))
        await until(ctx.events(), SignalSent)
        await ctx.close(signal.SIGKILL, 0)
        await closing
        told = await all_of(ctx.events())
    assert [each.signal for each in of(told, Escalated)] == ["SIGKILL"]
    assert of(told, StacksDumped) == []


async def test_what_is_told_of_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "find_py_spy", lambda: None)
    code = """
        @record
        def main():
            heartbeat()
            time.sleep(1000)
        main()
    """
    told = await told_by(worker(tmp_path, code, hang_timeout=0.5))
    (dumped,), (failed,) = of(told, StacksDumped), of(told, WorkerFailed)
    assert "main" in dumped.stacks[0]
    assert failed.cause.startswith("hang: no heartbeat for 0.5")
    assert failed.stack == dumped.stacks[0]
    assert (failed.root_cause, failed.signal) == (True, "SIGTERM")
    names = kinds(told)
    assert names.index("heartbeat") < names.index("stacks_dumped") < names.index("signal_sent")


async def test_stacks_that_somebody_asks_for_are_told(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "find_py_spy", lambda: None)
    async with start(channel, SLEEP, SLEEP) as ctx:
        await channel.lines(2)
        found = await ctx.dump_stacks()
        (dumped,) = of(ctx.events().take(), StacksDumped)
    assert dumped.stacks == {rank: stack.summary for rank, stack in found.items()}


# --- pulses -------------------------------------------------------------------------------------


@pytest.fixture(params=["inotify", "no inotify"])
def _any_watches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no inotify":

        def refuse(_loop: object) -> None:
            raise OSError(24, "fs.inotify.max_user_instances")

        monkeypatch.setattr(watches, "InotifyWatches", refuse)


any_watches = pytest.mark.usefixtures("_any_watches")


@any_watches
@pytest.mark.parametrize("how", [{"redirects": Std.ALL}, {"tee": Std.ALL}], ids=str)
async def test_the_first_output_is_told_when_it_is_there(
    channel: Channel, how: dict[str, Std]
) -> None:
    script = READY + HELD + "echo one; echo two; " + READY + HELD + "echo three >&2; " + SLEEP
    async with start(channel, script, SLEEP, logs_specs=FILES(**how)) as ctx:
        stream = ctx.events()
        await channel.lines(2)
        # Nothing has been written: nothing is told.
        await channel.open_gate()
        first = await until(stream, FirstOutput)
        assert (first.local_rank, first.stream) == (0, "stdout")
        assert first.pid == ctx.pids()[0]
        await channel.lines(1)
        await channel.open_gate()
        second = await until(stream, FirstOutput)
        assert (second.local_rank, second.stream) == (0, "stderr")
        await channel.lines(1)
        await ctx.close()
        assert len(of(await all_of(ctx.events()), FirstOutput)) == 2


async def test_who_writes_and_ends_at_once_is_told_of_in_order() -> None:
    scripts = ["echo a", "echo b >&2", "true"] * 4
    bus = EventBus()
    stream = bus.subscribe()
    async with start(None, *scripts, logs_specs=FILES(redirects=Std.ALL), events=bus) as ctx:
        await ctx.wait()
    told = stream.take()
    for rank in range(12):
        own = [e for e in told if isinstance(e, WorkerEvent) and e.local_rank == rank]
        expected = ["worker_started", "first_output", "worker_exited"]
        assert kinds(own) == (expected if rank % 3 < 2 else expected[::2])


async def test_the_console_is_nobodys_file_to_look_at(channel: Channel) -> None:
    told = await told_by(start(channel, "true"))
    assert of(told, FirstOutput) == []


@any_watches
async def test_heartbeats_and_progress_are_told_when_they_come(
    tmp_path: Path, channel: Channel
) -> None:
    code = """
        go()
        heartbeat()
        go()
        progress(1, 3)
        go()
        progress(2.5)
        go()
        heartbeat()
        progress(3, 3)
    """
    async with worker(tmp_path, code) as ctx:
        stream = ctx.events()
        for expected in (None, (1.0, 3.0), (2.5, None)):
            await channel.lines(1)
            await channel.open_gate()
            if expected is None:
                beat = await until(stream, Heartbeat)
                assert (beat.local_rank, beat.pid) == (0, ctx.pids()[0])
            else:
                done = await until(stream, Progress)
                assert (done.done, done.total) == expected
        # What it says last is told though it ends at once, and before its end.
        await channel.lines(1)
        await channel.open_gate()
        rest = [event for event in await all_of(stream) if not isinstance(event, ResourceSample)]
    assert kinds(rest) == ["heartbeat", "progress", "worker_exited", "group_ended"]


async def test_who_beats_without_pause_does_not_flood_the_stream(tmp_path: Path) -> None:
    code = """
        began = time.monotonic()
        for step in range(20_000):
            heartbeat()
            progress(step)
        progress(1 << 60, 1e300)
        print(time.monotonic() - began)
    """
    logs = FILES(log_dir=str(tmp_path / "logs"), redirects=Std.ALL)
    async with worker(tmp_path, code, logs_specs=logs) as ctx:
        told = await all_of(ctx.events(100_000))
    took_s = float(Path(ctx.stdouts[0]).read_text())
    assert len(of(told, Heartbeat)) <= took_s / 0.1 + 2
    assert len(of(told, Progress)) <= took_s / 0.1 + 2
    last = of(told, Progress)[-1]
    assert (last.done, last.total) == (float(1 << 60), 1e300)


async def test_a_heartbeat_file_that_somebody_has_removed_is_found_again(
    tmp_path: Path, channel: Channel
) -> None:
    code = """
        go()
        heartbeat()
        go()
        os.unlink(os.environ["ASUPERVISE_HEARTBEAT_FILE"])
        go()
        heartbeat()
        go()
    """
    async with worker(tmp_path, code) as ctx:
        stream = ctx.events()
        await channel.lines(1)
        await channel.open_gate()
        await until(stream, Heartbeat)
        for _ in range(2):
            await channel.lines(1)
            await channel.open_gate()
        await until(stream, Heartbeat)


async def test_what_a_worker_has_made_of_its_files_harms_nobody(
    tmp_path: Path, channel: Channel
) -> None:
    code = """
        import shutil
        for name in ("HEARTBEAT", "PROGRESS"):
            path = os.environ[f"ASUPERVISE_{name}_FILE"]
            shutil.rmtree(path, ignore_errors=True)
            os.mkdir(path)
        go()
        for name in ("HEARTBEAT", "PROGRESS"):
            path = os.environ[f"ASUPERVISE_{name}_FILE"]
            os.rmdir(path)
            os.mkfifo(path)
        go()
        shutil.rmtree(os.path.dirname(path))
    """
    async with worker(tmp_path, code) as ctx:
        stream = ctx.events()
        for _ in range(2):
            await channel.lines(1)
            await channel.open_gate()
        told = await all_of(stream)
    assert kinds(told)[-2:] == ["worker_exited", "group_ended"]
    (ended,) = of(told, GroupEnded)
    assert ended.succeeded


@pytest.mark.parametrize(
    "text", [b"", b"x", b"1 2 3", b"nan", b"inf 1", b"\xff\xfe", b"1e999", b"\0" * 300]
)
async def test_progress_that_makes_no_sense_is_not_told(
    tmp_path: Path, channel: Channel, text: bytes
) -> None:
    code = f"""
        with open(os.environ["ASUPERVISE_PROGRESS_FILE"], "wb") as file:
            file.write({text!r})
        go()
    """
    async with worker(tmp_path, code) as ctx:
        stream = ctx.events()
        await channel.lines(1)
        await channel.open_gate()
        told = await all_of(stream)
    assert of(told, Progress) == []
    assert of(told, GroupEnded)[0].succeeded


async def test_pulses_are_felt_for_who_listens_and_once(tmp_path: Path, channel: Channel) -> None:
    bus = EventBus()
    async with worker(tmp_path, "go(); heartbeat()", events=bus) as ctx:
        await channel.lines(1)
        assert ctx._pulses is None
        streams = [ctx.events(), bus.subscribe(), ctx.events(), bus.subscribe()]
        assert [each.name for each in _tasks("pulses")] == [1]
        await channel.open_gate()
        for stream in streams[::2]:
            assert len(of(await all_of(stream), Heartbeat)) == 1
    assert len(of(streams[1].take(), Heartbeat)) == 1
    assert not bus.closed
    bus.close()


class _Named:
    def __init__(self, name: object) -> None:
        self.name = name


def _tasks(word: str) -> list[_Named]:
    found = [task for task in asyncio.all_tasks() if word in task.get_name()]
    return [_Named(len(found))] if found else []


async def test_who_only_records_costs_no_watching(tmp_path: Path, channel: Channel) -> None:
    logs = FILES(log_dir=str(tmp_path / "logs"), redirects=Std.ALL)
    async with worker(tmp_path, "print(1, flush=True); go()", logs_specs=logs) as ctx:
        await channel.lines(1)
        await settle()
        assert ctx._pulses is None
        await channel.open_gate()
        await ctx.wait()
        assert of(ctx.events().take(), FirstOutput) == []


@pytest.mark.parametrize("listening", [False, True])
async def test_a_silent_group_wakes_nobody(
    tmp_path: Path, channel: Channel, listening: bool
) -> None:
    """No timer is left once it has settled, whoever listens."""
    loop: Any = asyncio.get_running_loop()

    def timers() -> list[asyncio.TimerHandle]:
        return [handle for handle in loop._scheduled if not handle.cancelled()]

    async with worker(tmp_path, "go()", memory_sample_interval=0) as ctx:
        streams = [ctx.events()] if listening else []
        await channel.lines(1)
        await settle()
        while left := timers():
            await asyncio.sleep(max(handle.when() for handle in left) - loop.time())
            await settle()
        await channel.open_gate()
        await ctx.wait()
    assert len(streams) == listening


async def test_memory_and_cpu_time_are_told(tmp_path: Path, channel: Channel) -> None:
    code = """
        x = bytearray(50 << 20)
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
        go()
    """
    async with worker(tmp_path, code, memory_sample_interval=0.05) as ctx:
        stream = ctx.events()
        await channel.lines(1)
        while True:
            sample = await until(stream, ResourceSample)
            if sample.rss_bytes > 50 << 20 and sample.cpu_s >= 0.05:
                break
        assert (sample.local_rank, sample.pid) == (0, ctx.pids()[0])
        await channel.open_gate()


async def test_who_does_not_sample_tells_nothing_of_it(tmp_path: Path, channel: Channel) -> None:
    async with worker(tmp_path, "go()", memory_sample_interval=0) as ctx:
        stream = ctx.events()
        await channel.lines(1)
        # Past the moment of the first look.
        looked = asyncio.Event()
        asyncio.get_running_loop().call_later(0.08, looked.set)
        await looked.wait()
        await channel.open_gate()
        assert of(await all_of(stream), ResourceSample) == []


# --- other ways to begin and to end -------------------------------------------------------------


async def test_who_comes_after_the_end_hears_all_of_it() -> None:
    async with start(None, "true") as ctx:
        during = await all_of(ctx.events())
    assert await all_of(ctx.events()) == during
    assert kinds(during) == ["group_starting", "worker_started", "worker_exited", "group_ended"]


async def test_who_leaves_the_stream_harms_nobody(channel: Channel) -> None:
    async with start(channel, SLEEP, SLEEP) as ctx:
        async for event in ctx.events():
            if isinstance(event, WorkerStarted):
                break
        await ctx.close()
        assert kinds(await all_of(ctx.events()))[-1] == "group_ended"


async def test_a_slow_consumer_does_not_slow_the_group(channel: Channel) -> None:
    async with start(channel, *["true"] * 20) as ctx:
        slow = ctx.events(maxsize=2)
        result = await ctx.wait()
        told = await all_of(slow)
    assert result is not None
    assert not result.is_failed()
    assert kinds(told)[-1] == "group_ended"
    assert slow.dropped + len(told) == 42


@pytest.mark.parametrize("log_dir", [False, True])
async def test_what_is_told_when_a_group_cannot_be_started(
    channel: Channel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log_dir: bool
) -> None:
    start_one = SubprocessHandler.start

    async def second_fails(plan: WorkerPlan, *args: Any, **more: Any) -> SubprocessHandler:
        if plan.local_rank == 1:
            await channel.lines(1)
            raise OSError(11, "no more processes")
        return await start_one(plan, *args, **more)

    monkeypatch.setattr(SubprocessHandler, "start", second_fails)
    bus = EventBus()
    logs = FILES(log_dir=str(tmp_path / "logs") if log_dir else None, redirects=Std.OUT)
    with pytest.raises(OSError, match="no more processes"):
        await start(channel, SLEEP, SLEEP, events=bus, logs_specs=logs)
    told = bus.subscribe().take()
    assert kinds(told) == [
        "group_starting", "worker_started", "signal_sent", "worker_exited", "warned",
        "group_ended",
    ]  # fmt: skip
    (warned,), (ended,) = of(told, Warned), of(told, GroupEnded)
    assert "no more processes" in warned.text
    assert (ended.succeeded, ended.root_cause) == (False, None)


async def test_what_is_told_when_a_group_may_not_be_started() -> None:
    bus = EventBus()
    starting = start(None, "true", events=bus)
    starting.permit = lambda: False
    with pytest.raises(NotPermittedError):
        await starting
    assert kinds(bus.subscribe().take()) == ["group_starting", "warned", "group_ended"]


async def test_a_group_that_is_cancelled_tells_its_end(channel: Channel) -> None:
    consumed = asyncio.get_running_loop().create_future()

    async def main() -> None:
        async with start(channel, SLEEP) as ctx:
            consumed.set_result(ctx.events())
            await asyncio.Event().wait()

    task = asyncio.create_task(main())
    consuming = asyncio.create_task(all_of(await consumed))
    task.cancel()
    told = await consuming
    assert kinds(told)[-3:] == ["worker_exited", "worker_failed", "group_ended"]
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_start_that_is_cancelled_tells_its_end(channel: Channel) -> None:
    bus = EventBus()
    starting = asyncio.ensure_future(_awaited(start(channel, *[SLEEP] * 10, events=bus)))
    stream = bus.subscribe()
    await until(stream, WorkerStarted)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert kinds(stream.take())[-1] == "group_ended"


async def _awaited(starting: StartingProcesses) -> PContext:
    return await starting


def test_a_loop_that_is_shut_down_ends_its_consumers(channel: Channel) -> None:
    async def main() -> asyncio.Task[list[Event]]:
        ctx = await start(channel, SLEEP)
        await channel.lines(1)
        consuming = asyncio.create_task(all_of(ctx.events()))
        await settle()
        return consuming

    assert asyncio.run(main()).cancelled()


async def test_warnings_of_the_plan_are_told(tmp_path: Path) -> None:
    async with start(None, "true", logs_specs=FILES(redirects={0: Std.OUT, 5: Std.OUT})) as ctx:
        result = await ctx.wait()
        told = await all_of(ctx.events())
    assert result is not None
    assert [each.text for each in of(told, Warned)] == list(result.warnings)


def test_every_kind_is_a_public_name() -> None:
    assert {kind.__name__ for kind in events.KINDS.values()} <= set(events.__all__)
