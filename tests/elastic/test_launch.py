"""`launch`: what it returns and raises, what it refuses, and that it leaves nothing."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from asupervise import (
    ChildFailedError,
    DefaultLogsSpecs,
    LaunchConfig,
    Std,
    SupervisorError,
    Zygote,
    launch,
)
from asupervise.elastic.agent import Hooks
from asupervise.elastic.blueprint import Blueprint
from asupervise.elastic.decide import Policy
from asupervise.elastic.node import this_node
from asupervise.elastic.records import Round, Terms
from asupervise.elastic.rendezvous import Request
from asupervise.elastic.rendezvous.static import StaticRendezvous
from asupervise.elastic.running import run
from tests.elastic.launch_workers import failing_until, who_and_what
from tests.workers import READY, SH, SLEEP, STUBBORN, Channel, settle, start

# What most tests need: no restart, and none of the waits before one.
QUICK: dict[str, Any] = {"max_restarts": 0, "min_uptime": 0, "restart_backoff": 0}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of our own."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def channel(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> Channel:
    """Its name is known to our own environment, and so to all workers."""
    monkeypatch.setenv("CHANNEL", str(channel.path))
    return channel


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> asyncio.Queue[float]:
    """The wait before each group, as it begins."""
    told: asyncio.Queue[float] = asyncio.Queue()
    join = StaticRendezvous.join

    async def telling(self: StaticRendezvous, port: int) -> Round:
        told.put_nowait(self._round.delay_s)
        return await join(self, port)

    monkeypatch.setattr(StaticRendezvous, "join", telling)
    return told


def config(nproc: int = 1, **changes: Any) -> LaunchConfig:
    return LaunchConfig(1, 1, nproc, **(QUICK | changes))


# --- values ---------------------------------------------------------------------------------------


async def test_functions_return_by_global_rank(temporary: Path) -> None:
    values = await launch(config(2, role="trainer", run_id="job-7"), who_and_what, "a", 1)
    assert sorted(values) == [0, 1]
    for rank, (env, args) in values.items():
        expected = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ROLE_NAME": "trainer",
            "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "job-7",
            "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0",
        }  # fmt: skip
        assert {name: env[name] for name in expected} == expected
        assert args == ("a", 1)
    assert values[0][0]["MASTER_PORT"] == values[1][0]["MASTER_PORT"] != "0"
    assert not list(temporary.iterdir())


async def test_programs_return_none(tmp_path: Path) -> None:
    program = 'echo "$RANK $0 ${local_rank}" > "$1/$RANK"'
    values = await launch(config(2), SH, program, "x${rank}", str(tmp_path))
    assert values == {0: None, 1: None}
    assert [(tmp_path / f"{rank}").read_text() for rank in (0, 1)] == ["0 x0 0\n", "1 x1 1\n"]


async def test_a_node_that_is_not_the_first(tmp_path: Path) -> None:
    """With torch's fields for it, and with ours."""
    theirs = {"rdzv_endpoint": "node-0:1234", "rdzv_configs": {"rank": 1}}
    ours = {"node_rank": 1, "master_addr": "node-0", "master_port": 1234}
    program = 'echo "$MASTER_ADDR $MASTER_PORT $GROUP_RANK $WORLD_SIZE" > "$0/$RANK"'
    for fields in (theirs, ours):
        values = await launch(LaunchConfig(3, 3, 2, **QUICK, **fields), SH, program, str(tmp_path))
        assert values == {2: None, 3: None}
        for rank in (2, 3):
            assert (tmp_path / f"{rank}").read_text() == "node-0 1234 1 6\n"
            (tmp_path / f"{rank}").unlink()


async def test_two_at_once_have_two_ports(channel: Channel) -> None:
    program = 'echo "port $MASTER_PORT" > "$CHANNEL"; ' + 'read line < "$CHANNEL.gate"'
    jobs = [asyncio.create_task(launch(config(), SH, program)) for _ in range(2)]
    ports = {port for _, port in await channel.lines(2)}
    assert len(ports) == 2
    for job in jobs:
        job.cancel()
    await asyncio.gather(*jobs, return_exceptions=True)


# --- failures -------------------------------------------------------------------------------------


async def test_an_exception_is_in_the_report_and_its_cause() -> None:
    with pytest.raises(ChildFailedError) as caught:
        await launch(config(2), failing_until, 9)
    rank, failure = caught.value.get_first_failure()
    assert (rank, failure.local_rank, failure.exitcode) == (1, 1, 1)
    assert isinstance(caught.value.__cause__, ValueError)
    report = str(caught.value)
    assert "failing_until FAILED" in report
    assert "ValueError: no luck in attempt 0" in report
    assert "rank      : 1 (local_rank: 1)" in report


async def test_a_program_is_named(channel: Channel) -> None:
    program = f'if [ $RANK = 1 ]; then read line < "$CHANNEL"; exit 7; fi; {SLEEP}'
    with pytest.raises(ChildFailedError, match="/bin/sh -c FAILED") as caught:
        await launch(config(2), SH, program)
    assert {rank: f.ended_by_us for rank, f in caught.value.failures.items()} == {0: True, 1: False}
    assert caught.value.get_first_failure()[1].exitcode == 7


async def test_a_program_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match="/no/such"):
        await launch(config(2, max_restarts=3), "/no/such/program")


# --- restarts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
async def test_functions_are_started_anew(temporary: Path, method: str) -> None:
    values = await launch(config(2, max_restarts=1, start_method=method), failing_until, 1)
    assert {rank: count for rank, (count, _) in values.items()} == {0: 1, 1: 1}
    # Of the attempt that has failed, too, nothing is left once the job has succeeded.
    assert not list(temporary.iterdir())


async def test_a_zygote_is_kept_over_restarts() -> None:
    async with Zygote(["tests.elastic.launch_workers"]) as zygote:
        for _ in range(2):
            values = await launch(config(2, max_restarts=2, start_method=zygote), failing_until, 2)
            assert set(values.values()) == {(2, zygote.pid)}


async def test_each_attempt_has_its_logs_in_one_folder(tmp_path: Path) -> None:
    specs = DefaultLogsSpecs(str(tmp_path / "logs"), redirects=Std.ALL)
    program = 'echo "attempt $TORCHELASTIC_RESTART_COUNT of $TORCHELASTIC_MAX_RESTARTS"; exit 5'
    for _ in range(2):
        # The same specs again are another run.
        with pytest.raises(ChildFailedError):
            await launch(config(1, max_restarts=2, logs_specs=specs, max_broken_starts=9,
                                run_id="job"), SH, program)  # fmt: skip
    runs = list((tmp_path / "logs").iterdir())
    assert len(runs) == 2
    for folder in runs:
        assert folder.name.startswith("job_")
        said = {log.parent.parent.name: log.read_text() for log in folder.glob("*/0/stdout.log")}
        assert said == {f"attempt_{n}": f"attempt {n} of 2\n" for n in range(3)}


async def test_what_is_left_of_a_failed_job_is_one_folder(temporary: Path) -> None:
    with pytest.raises(ChildFailedError):
        await launch(config(1, max_restarts=2), SH, "exit 5")
    (run,) = temporary.iterdir()
    attempts = sorted(attempt.name for attempt in run.iterdir() if attempt.is_dir())
    assert attempts == ["attempt_0", "attempt_1", "attempt_2"]


# --- bad input ------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"min_nodes": 0}, "min_nodes, max_nodes: 0, 1"),
    ({"min_nodes": 2}, "min_nodes, max_nodes: 2, 1"),
    ({"max_nodes": 2}, "min_nodes, max_nodes: 1, 2"),
    ({"nproc_per_node": 0}, "nproc_per_node: 0"),
    ({"nproc_per_node": "4"}, "nproc_per_node: '4'"),
    ({"max_restarts": -1}, "max_restarts: -1"),
    ({"max_broken_starts": 0}, "max_broken_starts: 0"),
    ({"shutdown_timeout": -1.0}, "shutdown_timeout: -1.0"),
    ({"shutdown_timeout": math.nan}, "shutdown_timeout: nan"),
    ({"min_uptime": -1}, "min_uptime: -1"),
    ({"restart_backoff": math.inf}, "restart_backoff: inf"),
    ({"restart_backoff_max": -2}, "restart_backoff_max: -2"),
    ({"run_id": "a/b"}, "run_id: 'a/b'"),
    ({"min_nodes": 2, "max_nodes": 2}, "node_rank: None: expected 0 to 1"),
    ({"node_rank": 1}, "node_rank: 1: expected 0 to 0"),
    ({"min_nodes": 2, "max_nodes": 2, "node_rank": -1}, "node_rank: -1"),
    ({"min_nodes": 2, "max_nodes": 2, "node_rank": 1}, "master_addr: "),
    ({"rdzv_configs": {"rank": "one"}}, "rdzv_configs: rank: 'one'"),
    ({"rdzv_endpoint": "host:port"}, "rdzv_endpoint: 'host:port'"),
    ({"rdzv_configs": {"join_timeout": "soon"}}, "join_timeout=soon"),
    ({"rdzv_backend": "etcd"}, "run_id: "),
    ({"rdzv_backend": "etcd", "run_id": "x"}, "needs to know where etcd is"),
    ({"rdzv_backend": "etcd", "run_id": "x", "rdzv_endpoint": "h", "rdzv_configs": {"a": 1}},
     "--rdzv-conf: a"),
    ({"rdzv_backend": "carrier-pigeon", "run_id": "x"}, "carrier-pigeon.*static, env, etcd, c10d"),
    ({"start_method": "telepathy"}, "start_method: 'telepathy'"),
    ({"hang_timeout": 0.0}, "hang_timeout: 0.0"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "named"), BAD)
async def test_bad_fields_are_named_before_anything_starts(
    tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    mark = tmp_path / "started"
    basic = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 1}
    with pytest.raises((ValueError, SupervisorError), match=named):
        await launch(LaunchConfig(**(basic | fields)), "touch", str(mark))
    assert not mark.exists()


def test_torchs_fields_come_first_and_in_its_order() -> None:
    """So that whoever passes them by place or by name is understood."""
    made = LaunchConfig(2, 4, 8, None, "id", "role", "host:1", "etcd", {"timeout": 9}, 60, 5, 0.2)
    assert made == LaunchConfig(
        min_nodes=2, max_nodes=4, nproc_per_node=8, logs_specs=None, run_id="id", role="role",
        rdzv_endpoint="host:1", rdzv_backend="etcd", rdzv_configs={"timeout": 9}, rdzv_timeout=60,
        max_restarts=5, monitor_interval=0.2,
    )  # fmt: skip
    assert made.policy.join_timeout_s == 60


# --- cancellation ---------------------------------------------------------------------------------


async def cancelled(job: asyncio.Task[Any]) -> None:
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 21, 34, 55])
async def test_cancelled_while_it_starts(temporary: Path, turns: int) -> None:
    """What is left would be found by the fixtures."""
    job = asyncio.create_task(launch(config(3), "sleep", "1000"))
    for _ in range(turns):
        await asyncio.sleep(0)
    await cancelled(job)
    assert not list(temporary.glob("*/attempt_0/*/stdout.log"))


@pytest.mark.parametrize("script", [SLEEP, STUBBORN, f"(setsid sh -c '{SLEEP}' &); {SLEEP}"])
async def test_cancelled_while_it_runs(channel: Channel, script: str) -> None:
    job = asyncio.create_task(launch(config(2, shutdown_timeout=0.2), SH, script))
    await channel.lines(4 if "setsid" in script else 2)
    await cancelled(job)


async def test_cancelled_while_it_ends(channel: Channel) -> None:
    """A rank has failed, another one takes its time: the cancellation does not make it escape."""
    program = (
        f"[ $RANK = 1 ] && {{ {READY} read line < $CHANNEL.gate; exit 3; }}; "
        f"trap 'echo ending > $CHANNEL' TERM; {READY} while :; do sleep 0.01; done"
    )
    job = asyncio.create_task(launch(config(2, shutdown_timeout=0.3), SH, program))
    await channel.lines(2)  # only now has the other one its trap
    await channel.open_gate()
    while (await channel.lines(1))[0][0] != "ending":
        pass
    await cancelled(job)


async def test_cancelled_before_a_restart(delays: asyncio.Queue[float]) -> None:
    """In the wait before it: no further attempt begins."""
    long = config(1, max_restarts=1, restart_backoff=1000.0, restart_backoff_max=1000.0)
    job = asyncio.create_task(launch(long, SH, "exit 3"))
    assert await delays.get() == 0
    assert 500 <= await delays.get() <= 1000
    await settle()
    await cancelled(job)
    assert delays.empty()


# --- wait_failing ---------------------------------------------------------------------------------


async def test_who_has_failed_is_known_while_the_others_are_ended(channel: Channel) -> None:
    failing = 'read line < "$CHANNEL.gate"; exit 3'
    async with start(channel, STUBBORN, READY + failing, shutdown_timeout=60) as ctx:
        pids = await channel.pids(2)
        waiting = [asyncio.create_task(ctx.wait_failing()) for _ in range(2)]
        await settle()
        assert not any(task.done() for task in waiting)
        await channel.open_gate()
        assert await asyncio.gather(*waiting) == [1, 1]
        os.kill(pids[0], 0)  # it takes no notice of SIGTERM
        assert await ctx.wait(0) is None
        await ctx.close(signal.SIGKILL, 0)
        result = await ctx.wait()
        assert result.root_cause is not None
        assert result.root_cause[0] == await ctx.wait_failing() == 1


async def test_nobody_has_failed() -> None:
    async with start(None, "exit 0", "exit 0") as ctx:
        assert await ctx.wait_failing() is None


async def test_nobody_fails_of_a_close(channel: Channel) -> None:
    async with start(channel, SLEEP, STUBBORN) as ctx:
        await channel.lines(2)
        waiting = asyncio.create_task(ctx.wait_failing())
        await settle()
        await ctx.close(timeout=0.1)
        assert await waiting is None


async def test_a_cancelled_wait_harms_nobody(channel: Channel) -> None:
    async with start(channel, SLEEP) as ctx:
        await channel.lines(1)
        waiting = asyncio.create_task(ctx.wait_failing())
        await settle()
        await cancelled(waiting)
        assert await ctx.wait(0) is None


async def test_a_failure_at_once_is_not_missed() -> None:
    """Some have ended before anybody waits, even before all are started."""
    async with start(None, "exit 4", *["exec sleep 1000"] * 3) as ctx:
        await asyncio.wait_for(ctx.wait(), 30)
        assert await ctx.wait_failing() == 0


# --- being told to leave --------------------------------------------------------------------------


async def test_a_node_that_is_to_leave_waits_for_no_restart(delays: asyncio.Queue[float]) -> None:
    node = this_node(1)
    policy = Policy(min_uptime_s=0, backoff_s=1000.0, backoff_max_s=1000.0)
    request = Request("run", node, Terms(1, 1, max_restarts=1), policy)
    blueprint = Blueprint(1, "run", "t", SH, ("exit 3",))
    stop = asyncio.Event()
    job = asyncio.create_task(run(blueprint, "static", request, Hooks(stop=stop)))
    assert await delays.get() == 0
    assert await delays.get() >= 500
    await settle()
    assert not job.done()
    stop.set()
    outcome = await asyncio.wait_for(job, 10)
    assert outcome.stopped
    assert outcome.result is not None
    assert outcome.result.failures[0].exitcode == 3
