"""Workers that are started anew one by one: real processes, and what becomes of the others."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from asupervise import DefaultLogsSpecs, RunProcsResult, Std, rank_environments
from asupervise.affinity import MemoryPolicy, RankBinding
from asupervise.binding import BindingTools
from asupervise.cleanup import Survivor
from asupervise.context import PContext
from asupervise.elastic.alone import Attempts
from asupervise.elastic.decide import Policy
from asupervise.elastic.intensity import Restart
from asupervise.elastic.services import Services, StartingServices, run_services
from asupervise.errors import RankMapError
from asupervise.events import WorkerFailed
from asupervise.logs import ATTEMPT_VARIABLE, LogsDest, LogsSpecs
from asupervise.plan import TOKEN_VARIABLE
from asupervise.procfs import ProcessEntry, read_entry
from asupervise.signals import handle_signals
from asupervise.spec import RunOptions, checked_spec
from tests.conftest import ROOT, clean_environment, open_files
from tests.workers import SH, Channel, gone, is_alive, settle, shell

COUNT = "$TORCHELASTIC_RESTART_COUNT"
READY = f'echo "ready $RANK $$ {COUNT}" > "$CHANNEL"; '
SLEEP = READY + "exec sleep 1000"
HELD = 'read line < "$CHANNEL.gate"; '
STUBBORN = 'trap "" TERM; ' + SLEEP
ONCE = f"[ {COUNT} = 0 ] && exit 3; "

AT_ONCE = Policy(backoff_s=0.0, min_uptime_s=0.0)
NEVER_IN_TIME = Policy(backoff_s=1000.0, backoff_max_s=1000.0, min_uptime_s=0.0)

pytestmark = pytest.mark.usefixtures("own_temporary_folder")


class Told:
    """What `on_restart` was told, and an event for each time."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int | None, float]] = []
        self._called = asyncio.Event()

    def __call__(self, rank: int, count: int, failure: Any, delay_s: float) -> None:
        self.calls.append((rank, count, failure and failure.exitcode, delay_s))
        self._called.set()

    async def once(self) -> None:
        await self._called.wait()
        self._called.clear()


def serve(channel: Channel | None, *scripts: str, **options: Any) -> StartingServices:
    given = {"policy": AT_ONCE, "max_restarts": 100, **options}
    return run_services(**shell(channel, scripts), **given)


def codes(result: RunProcsResult | None) -> dict[int, int]:
    assert result is not None
    return {rank: failure.exitcode for rank, failure in result.failures.items()}


def ended_by_us(result: RunProcsResult | None) -> list[int]:
    assert result is not None
    return [rank for rank, failure in result.failures.items() if failure.ended_by_us]


def is_running(pid: int) -> bool:
    """Whether it is there and no zombie: an orphan is for others to reap."""
    entry = read_entry(pid)
    return entry is not None and entry.alive


async def starts(channel: Channel, count: int) -> dict[int, tuple[int, int]]:
    """By rank, pid and count of the next `count` workers that are ready."""
    lines = await channel.lines(count)
    return {int(rank): (int(pid), int(attempt)) for _, rank, pid, attempt in lines}


# --- one is started anew, the others go on ------------------------------------------------------


async def test_who_is_killed_is_started_anew_and_the_others_keep_their_pids(
    channel: Channel,
) -> None:
    told = Told()
    async with serve(channel, SLEEP, SLEEP, SLEEP, on_restart=told) as services:
        first = await starts(channel, 3)
        assert services.pids() == {rank: pid for rank, (pid, _) in first.items()}
        os.kill(first[1][0], signal.SIGKILL)
        second = await starts(channel, 1)
        assert list(second) == [1]
        assert second[1][0] != first[1][0]
        assert [attempt for _, attempt in [*first.values(), *second.values()]] == [0, 0, 0, 1]
        assert services.pids() == {0: first[0][0], 1: second[1][0], 2: first[2][0]}
        assert services.restarts() == {0: 0, 1: 1, 2: 0}
        assert await services.wait(0) is None
        assert told.calls == [(1, 1, -signal.SIGKILL, 0.0)]
    assert codes(await services.wait()) == {0: -15, 1: -15, 2: -15}
    assert ended_by_us(await services.wait()) == [0, 1, 2]


async def test_workers_have_the_environment_that_they_would_have_in_one_group(
    tmp_path: Path,
) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"]
    # Of an outer job that restarts this service: its attempts are not the workers' own.
    envs = rank_environments(2, parent_env={}, run_id="job", restart_count=7)
    envs = {rank: {**env, ATTEMPT_VARIABLE: "9"} for rank, env in envs.items()}
    script = ONCE + "echo " + " ".join(f"${name}" for name in [*names, COUNT[1:]])
    async with run_services(
        "t", SH, {rank: (script,) for rank in envs}, envs,
        DefaultLogsSpecs(str(tmp_path / "logs"), redirects=Std.OUT),
        restart="transient", policy=AT_ONCE,
    ) as services:  # fmt: skip
        result = await services.wait()
    assert not result.is_failed()
    said = {rank: Path(path).read_text().split() for rank, path in result.stdouts.items()}
    assert [path.split("/")[-3] for path in result.stdouts.values()] == ["attempt_1"] * 2
    assert said == {0: ["0", "0", "2", "2", "job", "1"], 1: ["1", "1", "2", "2", "job", "1"]}


def bound_attempts() -> Attempts:
    spec = checked_spec(
        "t", SH, {0: ("a",), 1: ("b",)}, {0: {}, 1: {}},
        DefaultLogsSpecs(tee=Std.OUT), None, "spawn", (), None, None, 1,
    )  # fmt: skip
    bindings = [
        RankBinding(rank, frozenset({rank}), MemoryPolicy.NONE, frozenset(), None, "")
        for rank in range(2)
    ]
    spec = spec._replace(bindings=bindings, tools=BindingTools(taskset="/usr/bin/taskset"))
    return Attempts(spec, RunOptions())


async def test_workers_are_bound_by_their_local_rank() -> None:
    attempts = bound_attempts()
    for rank, count in ((0, 0), (1, 0), (1, 1)):
        [worker] = attempts.worker(rank, count).plan.workers
        assert worker.argv[:3] == ("/usr/bin/taskset", "--cpu-list", str(rank))
        assert worker.local_rank == rank
        assert worker.stdin == (rank == 1)
        assert worker.prefix == f"[t{rank}]:"


async def test_each_start_has_a_token_of_its_own_behind_that_of_the_service() -> None:
    attempts = bound_attempts()
    plans = [attempts.worker(rank, count).plan for rank, count in ((0, 0), (1, 0), (1, 1))]
    assert len({plan.token for plan in plans}) == 3
    for plan in plans:
        expected = f"{attempts.first.token}:{plan.token}"
        assert plan.workers[0].env[TOKEN_VARIABLE] == expected


async def test_function_workers_are_started_anew_and_return_their_values() -> None:
    count = f"__import__('os').environ['{COUNT[1:]}']"
    async with run_services(
        "t", eval, {0: (f"1 // int({count})",), 1: ("'fine'",)}, {0: {}, 1: {}},
        restart="transient", policy=AT_ONCE,
    ) as services:  # fmt: skip
        result = await services.wait()
    assert result.return_values == {0: 1, 1: "fine"}
    assert services.restarts() == {0: 1, 1: 0}


async def test_who_hangs_is_started_anew(channel: Channel) -> None:
    told = Told()
    async with serve(channel, SLEEP, on_restart=told, hang_timeout=0.2) as services:
        before = await starts(channel, 1)
        assert before != await starts(channel, 1)
        assert told.calls[0][:2] == (0, 1)
        assert services.restarts()[0] >= 1


# --- logs ---------------------------------------------------------------------------------------


async def test_both_attempts_have_their_logs_and_each_line_is_shown_once(
    channel: Channel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = f'echo "line $RANK {COUNT}"; echo "oops $RANK {COUNT}" >&2; {ONCE}{SLEEP}'
    logs = DefaultLogsSpecs(str(tmp_path / "logs"), tee=Std.ALL)
    async with serve(channel, script, script, logs_specs=logs) as services:
        await channel.lines(2)
    result = await services.wait()
    [run_dir] = (tmp_path / "logs").iterdir()
    assert services.log_dir == result.log_dir == str(run_dir)
    for rank in range(2):
        for attempt in range(2):
            folder = run_dir / f"attempt_{attempt}" / str(rank)
            assert (folder / "stdout.log").read_text() == f"line {rank} {attempt}\n"
            assert (folder / "stderr.log").read_text() == f"oops {rank} {attempt}\n"
        assert result.stdouts[rank] == str(run_dir / f"attempt_1/{rank}/stdout.log")
    out, err = capfd.readouterr()
    each = [(rank, attempt) for rank in range(2) for attempt in range(2)]
    assert sorted(out.splitlines()) == [f"[t{r}]:line {r} {a}" for r, a in each]
    assert sorted(err.splitlines()) == [f"[t{r}]:oops {r} {a}" for r, a in each]


async def test_filtered_lines_of_all_attempts_are_kept(channel: Channel, tmp_path: Path) -> None:
    script = f'echo "yes $RANK {COUNT}"; echo no; {ONCE}{SLEEP}'
    logs = DefaultLogsSpecs(str(tmp_path / "logs"), tee=Std.OUT)
    options = {"logs_specs": logs, "duplicate_stdout_filters": ["yes"]}
    async with serve(channel, script, script, **options):
        await channel.lines(2)
    [run_dir] = (tmp_path / "logs").iterdir()
    for rank in range(2):
        for attempt in range(2):
            path = run_dir / f"attempt_{attempt}" / f"filtered_stdout.{rank}.log"
            assert path.read_text() == f"[t{rank}]:yes {rank} {attempt}\n"


class Counted(LogsSpecs):
    """Names no files, and says how often it was asked for each attempt."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    @property
    def root_log_dir(self) -> str:
        return ""

    def reify(self, envs: Mapping[int, Mapping[str, str]]) -> LogsDest:
        [attempt] = {env[COUNT[1:]] for env in envs.values()}
        self.asked.append(attempt)
        return LogsDest({r: "" for r in envs}, {r: "" for r in envs})


async def test_logs_specs_are_asked_once_an_attempt(channel: Channel) -> None:
    """Those that were made for torch remove what is in an attempt's folder when they are."""
    logs = Counted()
    async with serve(channel, ONCE + SLEEP, ONCE + SLEEP, logs_specs=logs):
        await channel.lines(2)
    assert logs.asked == ["0", "1"]


async def test_a_temporary_folder_stays_while_anybody_runs_and_goes_after_success(
    channel: Channel, tmp_path: Path
) -> None:
    logs = DefaultLogsSpecs(redirects=Std.OUT)
    scripts = (READY, READY + HELD)
    async with serve(channel, *scripts, logs_specs=logs, restart="transient") as services:
        await channel.lines(2)
        await gone_of(services, 0)
        [folder] = tmp_path.glob("asupervise_*")
        assert (folder / "attempt_0" / "0" / "stdout.log").exists()
        await channel.open_gate()
        result = await services.wait()
    assert not result.is_failed()
    assert not folder.exists()
    assert result.stdouts == {}
    assert result.log_dir is None


async def test_a_temporary_folder_is_kept_after_a_failure(tmp_path: Path) -> None:
    async with serve(None, "exit 3", max_restarts=0) as services:
        result = await services.wait()
    [folder] = tmp_path.glob("asupervise_*")
    assert result.log_dir == str(folder)


async def gone_of(services: Services, rank: int) -> None:
    """Wait until a worker's group has ended, with all that belongs to it."""
    worker = services._workers.get(rank)
    if worker is not None:
        await worker.wait()
        await settle()


# --- which ends ---------------------------------------------------------------------------------


async def test_a_permanent_worker_is_started_anew_after_success(channel: Channel) -> None:
    told = Told()
    script = READY + f"[ {COUNT} = 2 ] || exit 0; exec sleep 1000"
    async with serve(channel, script, on_restart=told) as services:
        await channel.lines(3)
        assert told.calls == [(0, 1, None, 0.0), (0, 2, None, 0.0)]
        assert len(services.pids()) == 1


async def test_a_transient_worker_is_started_anew_after_a_failure_only(channel: Channel) -> None:
    told = Told()
    async with serve(
        channel, READY, ONCE + READY, restart="transient", on_restart=told
    ) as services:
        result = await services.wait()
    assert not result.is_failed()
    assert result.return_values == {0: None, 1: None}
    assert told.calls == [(1, 1, 3, 0.0)]


async def test_a_temporary_worker_is_never_started_anew(channel: Channel) -> None:
    told = Told()
    scripts = ("exit 3", READY + HELD)
    async with serve(channel, *scripts, restart="temporary", on_restart=told) as services:
        await channel.lines(1)
        await gone_of(services, 0)
        assert list(services.pids()) == [1]
        await channel.open_gate()
        result = await services.wait()
    assert codes(result) == {0: 3}
    assert result.root_cause is not None
    assert told.calls == []


# --- limits -------------------------------------------------------------------------------------


async def test_more_restarts_than_the_intensity_allows_end_the_service(channel: Channel) -> None:
    told = Told()
    scripts = (SLEEP, "exit 3")
    async with serve(
        channel, *scripts, max_restarts=2, within_s=1000.0, on_restart=told
    ) as services:
        result = await services.wait()
    assert [call[:3] for call in told.calls] == [(1, 1, 3), (1, 2, 3)]
    assert codes(result)[1] == 3
    assert ended_by_us(result) in ([0], [])  # it may have been ended before it had begun
    assert result.root_cause is not None
    rank, failure = result.root_cause
    assert rank == 1
    assert "restart 3 of all workers within 1000 s, and 2 are allowed" in failure.note
    assert result.stdouts == {}


async def test_the_intensity_counts_the_restarts_of_all_workers(channel: Channel) -> None:
    async with serve(channel, SLEEP, SLEEP, SLEEP, max_restarts=2) as services:
        pids = await starts(channel, 3)
        for rank in range(2):
            os.kill(pids[rank][0], signal.SIGKILL)
            await channel.lines(1)
        os.kill(pids[2][0], signal.SIGSEGV)
        result = await services.wait()
    assert codes(result) == {0: -15, 1: -15, 2: -signal.SIGSEGV}
    assert result.root_cause is not None
    assert result.root_cause[0] == 2
    assert ended_by_us(result) == [0, 1]


@pytest.mark.parametrize("script", ["exit 3", "exit 0"])
async def test_where_no_restart_is_allowed_the_first_end_ends_the_service(
    script: str, channel: Channel
) -> None:
    async with serve(channel, SLEEP, READY + HELD + script, max_restarts=0) as services:
        await channel.lines(2)
        await channel.open_gate()
        result = await services.wait()
    assert codes(result) == {0: -15, 1: int(script[-1])}
    assert result.root_cause is not None
    rank, failure = result.root_cause
    assert (rank, failure.note) == (1, "no restart is allowed (max_restarts=0)")
    assert failure.pid > 0


async def test_broken_starts_end_the_service_whatever_the_intensity_says(channel: Channel) -> None:
    told = Told()
    policy = Policy(backoff_s=0.0, min_uptime_s=1000.0, max_broken_starts=3)
    async with serve(
        channel, SLEEP, READY + HELD + "exit 4", policy=policy, on_restart=told
    ) as services:
        await channel.lines(2)
        for _ in range(2):
            await channel.open_gate()
            await channel.lines(1)
        await channel.open_gate()
        result = await services.wait()
    assert len(told.calls) == 2
    assert codes(result) == {0: -15, 1: 4}
    assert result.root_cause is not None
    assert "3 times in a row sooner than 1000 s after its start" in result.root_cause[1].note


async def test_who_waits_for_its_restart_is_not_blamed_for_the_failure_of_another(
    channel: Channel,
) -> None:
    told = Told()
    scripts = ("exit 3", READY + HELD + "exit 4")
    async with serve(
        channel, *scripts, policy=NEVER_IN_TIME, max_restarts=1, on_restart=told
    ) as services:
        await channel.lines(1)
        await told.once()
        assert list(services.pids()) == [1]
        await channel.open_gate()
        result = await services.wait()
    assert codes(result) == {0: 3, 1: 4}
    assert ended_by_us(result) == [0]
    assert "it was to be started anew" in result.failures[0].note
    assert result.root_cause is not None
    assert result.root_cause[0] == 1


async def test_who_is_still_being_ended_is_not_blamed_either(channel: Channel) -> None:
    """It failed first, but what it has left behind takes its time; another ends the service."""
    child = 'trap "" TERM; echo child 0 $$ x > $CHANNEL; exec sleep 1000'
    slow = f"setsid sh -c '{child}' & {HELD} exit 3"
    async with serve(channel, slow, SLEEP, max_restarts=0, shutdown_timeout=1.0) as services:
        pids = {rank: int(pid) for _, rank, pid, _ in await channel.lines(2)}
        first = services.pids()[0]
        await channel.open_gate()
        await gone(first)
        os.kill(pids["1"], signal.SIGSEGV)
        result = await services.wait()
    assert codes(result) == {0: 3, 1: -signal.SIGSEGV}
    assert ended_by_us(result) == [0]
    assert "failed by itself while the service was being ended" in result.failures[0].note
    assert result.failures[0].timestamp < result.failures[1].timestamp


@pytest.mark.parametrize("restart", ["permanent", "temporary"])
async def test_each_failure_is_told_once(restart: Restart) -> None:
    policy = Policy(backoff_s=0.0, min_uptime_s=0.0)
    async with run_services(
        **shell(None, ["exit 1"]), policy=policy, max_restarts=2, restart=restart
    ) as services:
        await services.wait()
    told = [event async for event in services.events()]
    failed = [event for event in told if isinstance(event, WorkerFailed)]
    starts = 3 if restart == "permanent" else 1
    assert len(failed) == len({event.pid for event in failed}) == starts
    assert [event.root_cause for event in failed] == [False] * (starts - 1) + [
        restart == "permanent"
    ]
    assert [event.attempt for event in failed] == list(range(starts))


async def test_a_worker_that_was_killed_through_us_may_be_the_root_cause(channel: Channel) -> None:
    async with serve(channel, SLEEP, SLEEP, max_restarts=0) as services:
        await channel.lines(2)
        services.send_signal(signal.SIGKILL, ranks=[1])
        result = await services.wait()
    assert codes(result) == {0: -15, 1: -9}
    assert ended_by_us(result) == [0]


async def test_a_program_that_is_gone_is_a_broken_start(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nrm $0\nexit 3\n")
    program.chmod(0o700)
    told = Told()
    policy = Policy(backoff_s=0.0, min_uptime_s=1000.0, max_broken_starts=3)
    services = await run_services(
        "t", str(program), {0: ()}, {0: {}}, policy=policy, on_restart=told
    )
    result = await services.wait()
    assert [call[:3] for call in told.calls] == [(0, 1, 3), (0, 2, 127)]
    assert codes(result) == {0: 127}
    assert "no such program" in result.failures[0].cause
    assert "could not be started" in str(result.failures[0].message)


async def test_a_program_that_comes_back_is_started(tmp_path: Path, channel: Channel) -> None:
    program = tmp_path / "program"

    def put_there(*_: object) -> None:
        if len(told.calls) < 2:
            program.write_text(f"#!/bin/sh\n{READY}\nrm $0\nexit 3\n")
            program.chmod(0o700)

    def on_restart(rank: int, count: int, failure: Any, delay_s: float) -> None:
        told(rank, count, failure, delay_s)
        if count == 2:
            put_there()
            program.write_text(f"#!/bin/sh\n{SLEEP}\n")
            program.chmod(0o700)

    told = Told()
    put_there()
    envs = {0: {"RANK": "0", "CHANNEL": str(channel.path)}}
    async with run_services(
        "t", str(program), {0: ()}, envs, policy=AT_ONCE, on_restart=on_restart
    ) as services:
        lines = await channel.lines(2)
        assert [line[3] for line in lines] == ["0", "2"]
        assert services.restarts() == {0: 2}


# --- nothing of the former start is left --------------------------------------------------------


async def test_a_grandchild_that_survives_is_gone_before_the_restart(channel: Channel) -> None:
    """It has a session of its own, and ignores SIGTERM."""
    child = 'trap "" TERM; echo child 0 $$ x > $CHANNEL; exec sleep 1000'
    first = f"[ {COUNT} = 0 ] && {{ setsid sh -c '{child}' & {HELD} exit 3; }}; "
    alive: list[bool] = []

    def on_restart(*_: object) -> None:
        alive.append(is_running(int(grandchild)))

    async with serve(
        channel, first + SLEEP, on_restart=on_restart, shutdown_timeout=0.05
    ) as services:
        [[_, _, grandchild, _]] = await channel.lines(1)
        assert is_running(int(grandchild))
        await channel.open_gate()
        assert (await starts(channel, 1))[0][1] == 1
        assert alive == [False]
        assert services.restarts() == {0: 1}


async def test_what_cannot_be_ended_is_not_started_anew(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PContext._end
    entry = ProcessEntry(4711, 1, 1, 4711, 4711, 0, "D", "stuck")

    async def end(self: PContext) -> list[Survivor]:
        found = await real(self)
        if self.plan.workers[0].local_rank == 1:
            found.append(Survivor(entry, 1, "nfs_wait", "still there"))
        return found

    monkeypatch.setattr(PContext, "_end", end)
    async with serve(channel, SLEEP, READY + HELD + "exit 3") as services:
        await channel.lines(2)
        await channel.open_gate()
        result = await services.wait()
    assert codes(result) == {0: -15, 1: 3}
    assert "cannot be started anew while something of it is still there" in result.failures[1].note
    assert "4711" in result.failures[1].note
    assert services.restarts() == {0: 0, 1: 0}


async def test_thirty_restarts_leave_nothing_behind(channel: Channel, tmp_path: Path) -> None:
    logs = DefaultLogsSpecs(str(tmp_path / "logs"), tee=Std.ALL)
    async with serve(channel, SLEEP, SLEEP, logs_specs=logs) as services:
        pid = (await starts(channel, 2))[1][0]
        await settle()
        before = len(open_files()), len(asyncio.all_tasks())
        for count in range(1, 31):
            os.kill(pid, signal.SIGKILL)
            pid, attempt = (await starts(channel, 1))[1]
            assert attempt == count
        await settle()
        after = len(open_files()), len(asyncio.all_tasks())
        # Files are watched a moment after the start: the two may differ by that.
        assert all(abs(now - then) <= 8 for now, then in zip(after, before, strict=True))
        assert len(services._attempts._named) == 30  # which the other worker may come to


async def test_files_that_all_have_come_to_are_forgotten() -> None:
    attempts = bound_attempts()
    for count in range(5):
        for rank in range(2):
            attempts.worker(rank, count)
    assert attempts._named == {}


# --- the end ------------------------------------------------------------------------------------


async def test_close_ends_all_and_may_be_called_again(channel: Channel) -> None:
    services = await serve(channel, SLEEP, SLEEP)
    pids = await starts(channel, 2)
    await services.close(signal.SIGINT)
    assert not any(is_alive(pid) for pid, _ in pids.values())
    await services.close()
    await services.close(signal.SIGKILL, 0)
    result = await services.wait()
    assert codes(result) == {0: -2, 1: -2}
    assert result.root_cause is None
    assert services.pids() == {}
    assert "ended" in repr(services)


async def test_a_second_close_hurries_a_slow_one(channel: Channel) -> None:
    services = await serve(channel, STUBBORN, STUBBORN)
    await channel.lines(2)
    slow = asyncio.create_task(services.close(timeout=1000))
    await settle()
    assert await services.wait(0) is None
    await services.close(signal.SIGKILL, 0)
    await slow
    assert codes(await services.wait(0)) == {0: -9, 1: -9}


async def test_close_during_the_wait_for_a_restart(channel: Channel) -> None:
    told = Told()
    async with serve(channel, "exit 3", SLEEP, policy=NEVER_IN_TIME, on_restart=told) as services:
        await channel.lines(1)
        await told.once()
        assert 500 <= told.calls[0][3] <= 1000
        await settle()
        await services.close()
        result = await services.wait(0)
    assert codes(result) == {0: 3, 1: -15}
    assert ended_by_us(result) == [0, 1]
    assert result is not None
    assert result.root_cause is None


async def test_the_end_of_the_block_ends_all_even_where_it_raised(channel: Channel) -> None:
    starting = serve(channel, SLEEP)

    async def app() -> None:
        async with starting:
            await channel.lines(1)
            raise RuntimeError("of the app")

    with pytest.raises(RuntimeError, match="of the app"):
        await app()
    assert starting._services is not None
    assert codes(await starting._services.wait(0)) == {0: -15}


async def test_cancelling_who_waits_harms_no_worker(channel: Channel) -> None:
    async with serve(channel, SLEEP) as services:
        pids = await starts(channel, 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(services.wait(), 0.01)
        assert services.pids() == {0: pids[0][0]}
        assert await services.wait(0.01) is None
        with pytest.raises(ValueError, match="timeout: -1"):
            await services.wait(-1)


@pytest.mark.parametrize("turns", [*range(24), 50, 100])
async def test_a_cancellation_around_the_start_leaves_nothing(turns: int, channel: Channel) -> None:
    async def run() -> None:
        async with serve(channel, SLEEP, SLEEP, SLEEP) as services:
            await services.wait()

    running = asyncio.create_task(run())
    for _ in range(turns):
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


@pytest.mark.parametrize("turns", [*range(0, 30, 3), *range(30, 300, 45)])
async def test_a_cancellation_around_a_restart_leaves_nothing(turns: int, channel: Channel) -> None:
    told = Told()

    async def run() -> None:
        async with serve(channel, SLEEP, "exit 3", on_restart=told) as services:
            await services.wait()

    running = asyncio.create_task(run())
    await told.once()
    for _ in range(turns):
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


@pytest.mark.parametrize("turns", [0, 1, 5, 20, 80])
def test_a_loop_that_is_shut_down_ends_all(turns: int, tmp_path: Path) -> None:
    """Nobody has closed the service: `asyncio.run` cancels its tasks."""
    channel = Channel(tmp_path)
    pids: list[int] = []

    async def main() -> None:
        told = Told()
        await serve(channel, SLEEP, "exit 3", on_restart=told)
        pids.append((await starts(channel, 1))[0][0])
        await told.once()
        for _ in range(turns):
            await asyncio.sleep(0)

    try:
        asyncio.run(main())
    finally:
        channel.close()
    assert not is_alive(pids[0])


HOST = """
import asyncio, sys
from asupervise.elastic.decide import Policy
from asupervise.elastic.services import run_services

async def main():
    args = {rank: (sys.argv[1],) for rank in range(2)}
    envs = {rank: {"RANK": str(rank)} for rank in args}
    await (await run_services(
        "t", ("/bin/sh", "-c"), args, envs, policy=Policy(backoff_s=0.0, min_uptime_s=0.0)
    )).wait()

asyncio.run(main())
"""


async def test_the_guardians_end_all_when_the_app_is_killed(channel: Channel) -> None:
    argv = [sys.executable, "-c", HOST, ONCE + SLEEP]
    with subprocess.Popen(
        argv, env={**clean_environment(), "CHANNEL": str(channel.path)}, cwd=ROOT
    ) as app:
        pids = await starts(channel, 2)
        app.kill()
        for pid, count in pids.values():
            assert count == 1
            await gone(pid)


class Spoilt(DefaultLogsSpecs):
    """The second worker's file is to lie in a folder that is a file."""

    def __init__(self, path: Path) -> None:
        super().__init__(redirects=Std.OUT)
        path.write_text("")
        self._path = path

    def reify(self, envs: Mapping[int, Mapping[str, str]]) -> LogsDest:
        logs = super().reify(envs)
        logs.stdouts[1] = str(self._path / "stdout.log")
        return logs


async def test_a_start_that_fails_halfway_ends_what_was_started(
    channel: Channel, tmp_path: Path
) -> None:
    before = asyncio.all_tasks()
    with pytest.raises(NotADirectoryError):
        await serve(channel, SLEEP, SLEEP, logs_specs=Spoilt(tmp_path / "file"))
    assert asyncio.all_tasks() == before
    assert list(tmp_path.glob("asupervise_*")) == []


async def test_a_service_can_be_started_once() -> None:
    starting = serve(None, "exit 0", restart="temporary")
    services = await starting
    with pytest.raises(RuntimeError, match="started already"):
        await starting
    assert not (await services.wait()).is_failed()


# --- signals, stacks, callbacks -----------------------------------------------------------------


async def test_signals_go_to_the_workers_that_run(channel: Channel) -> None:
    script = f'trap "echo usr1 $RANK $$ {COUNT} > $CHANNEL" USR1; {READY}'
    script += "while :; do sleep 1000 & wait; done"
    async with serve(channel, script, script, script) as services:
        await channel.lines(3)
        services.send_signal(signal.SIGUSR1, ranks=[2])
        assert [line[:2] for line in await channel.lines(1)] == [["usr1", "2"]]
        services.send_signal(signal.SIGUSR1)
        assert sorted(line[1] for line in await channel.lines(3)) == ["0", "1", "2"]
        with pytest.raises(ValueError, match=r"ranks: no local ranks \[3\]: expected 0\.\.2"):
            services.send_signal(signal.SIGUSR1, ranks=[3])
        with pytest.raises(ValueError, match="is not a signal"):
            services.send_signal(4711)


async def test_handled_signals_end_a_service(channel: Channel) -> None:
    with handle_signals(shutdown_timeout=30.0) as handling:
        async with serve(channel, SLEEP, SLEEP) as services:
            handling.attend(services)  # type: ignore[arg-type]
            await channel.lines(2)
            os.kill(os.getpid(), signal.SIGHUP)
            result = await services.wait()
    assert codes(result) == {0: -1, 1: -1}
    assert handling.received is signal.SIGHUP


async def test_stacks_are_those_of_the_workers_that_run(channel: Channel) -> None:
    told = Told()
    async with serve(
        channel, SLEEP, "exit 3", SLEEP, policy=NEVER_IN_TIME, on_restart=told
    ) as services:
        await channel.lines(2)
        await told.once()
        assert list(await services.dump_stacks()) == [0, 2]


async def test_what_the_callback_raises_goes_to_the_loop_and_harms_nobody(
    channel: Channel,
) -> None:
    heard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))

    def on_restart(*_: object) -> None:
        raise RuntimeError("of the app")

    async with serve(channel, ONCE + SLEEP, on_restart=on_restart):
        assert (await starts(channel, 1))[0][1] == 1
    assert [str(context["exception"]) for context in heard] == ["of the app"]


async def test_the_error_file_of_the_last_start_is_read(tmp_path: Path) -> None:
    words = json.dumps({"message": {"message": "of attempt X", "extraInfo": {"timestamp": "1"}}})
    script = f"echo '{words}' | sed \"s/X/{COUNT}/\" > $TORCHELASTIC_ERROR_FILE; exit 3"
    async with serve(None, script, max_restarts=1) as services:
        result = await services.wait()
    assert result.failures[0].error_file == f"{result.log_dir}/attempt_1/0/error.json"
    assert "of attempt 1" in str(result.failures[0].message)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"restart": "always"}, "restart: 'always'"),
        ({"max_restarts": -1}, "max_restarts: -1"),
        ({"within_s": 0.0}, r"within_s: 0\.0"),
        ({"policy": Policy(max_broken_starts=0)}, "policy.max_broken_starts: 0"),
        ({"shutdown_timeout": -1}, "shutdown_timeout: -1"),
        ({"stdin": 7}, "stdin: no local rank 7"),
    ],
)
def test_bad_input_is_refused_at_the_call(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        serve(None, "exit 0", **options)


def test_gaps_in_the_ranks_are_refused_at_the_call() -> None:
    with pytest.raises(RankMapError, match="missing"):
        run_services("t", SH, {0: (), 2: ()}, {0: {}, 2: {}})


async def test_a_missing_program_is_said_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such program"):
        await run_services("t", "/nowhere/at/all", {0: ()}, {0: {}})
    assert list(tmp_path.iterdir()) == []


async def test_close_ends_grandchildren_as_well(channel: Channel) -> None:
    """The end of a service waits for what its workers have left behind."""
    script = f'setsid sh -c "echo child 0 \\$\\$ x > $CHANNEL; exec sleep 1000" & {SLEEP}'
    services = await serve(channel, script)
    lines = await channel.lines(2)
    await services.close()
    assert not any(is_running(int(pid)) for _, _, pid, _ in lines)
