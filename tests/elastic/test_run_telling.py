"""What is told of a run: restarts, rounds, nodes that are lost, its end; and of services."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from asupervise import (
    ChildFailedError,
    DefaultLogsSpecs,
    LaunchConfig,
    Std,
    launch,
)
from asupervise.bus import EventBus, Subscription
from asupervise.elastic.decide import Policy
from asupervise.elastic.launching import RunError
from asupervise.elastic.records import Culprit, Member, Round
from asupervise.elastic.services import run_services
from asupervise.elastic.telling import RunTeller
from asupervise.events import (
    Event,
    GroupEnded,
    GroupStarting,
    Heartbeat,
    MemberLost,
    Restarting,
    RoundCompleted,
    RunEnded,
    Warned,
    WorkerEvent,
    WorkerFailed,
    WorkerStarted,
    from_dict,
)
from asupervise.logs import LogsDest
from tests.conftest import Run
from tests.elastic import test_nodes
from tests.elastic.etcd_server import etcd, etcd_cluster, not_installed  # noqa: F401
from tests.workers import READY, SH, SLEEP, Channel, shell

E = TypeVar("E", bound=Event)

QUICK: dict[str, Any] = {"min_uptime": 0, "restart_backoff": 0}
COUNT = "$TORCHELASTIC_RESTART_COUNT"
AT_ONCE = Policy(backoff_s=0.0, min_uptime_s=0.0)

pytestmark = pytest.mark.usefixtures("own_temporary_folder")


@pytest.fixture
def channel(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> Channel:
    """Its name is known to our own environment, and so to all workers."""
    monkeypatch.setenv("CHANNEL", str(channel.path))
    return channel


def of(told: Sequence[Event], kind: type[E]) -> list[E]:
    return [event for event in told if isinstance(event, kind)]


def kinds(told: Sequence[Event]) -> list[str]:
    return [event.kind for event in told]


async def all_of(stream: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in stream]


async def until(stream: Subscription, kind: type[E]) -> E:
    async for event in stream:
        if isinstance(event, kind):
            return event
    raise AssertionError(f"the stream has ended without {kind.__name__}")


# --- restarts -----------------------------------------------------------------------------------


async def test_what_is_told_of_a_run_with_restarts() -> None:
    bus = EventBus()
    config = LaunchConfig(1, 1, 2, max_restarts=2, run_id="job-7", role="trainer", **QUICK)
    script = f"[ {COUNT} = 2 ] || {{ [ $RANK = 0 ] && exit $((20 + {COUNT})); exec sleep 1000; }}"
    await launch(config, SH, script, events=bus)
    assert not bus.closed
    told = bus.subscribe().take()
    assert {event.run_id for event in told} == {"job-7"}
    between = (RoundCompleted, GroupStarting, GroupEnded, Restarting, RunEnded)
    assert kinds([event for event in told if isinstance(event, between)]) == [
        "round_completed", "group_starting", "group_ended", "restarting",
        "round_completed", "group_starting", "group_ended", "restarting",
        "round_completed", "group_starting", "group_ended", "run_ended",
    ]  # fmt: skip
    assert [event.attempt for event in of(told, GroupStarting)] == [0, 1, 2]
    assert {event.group for event in of(told, GroupStarting)} == {"trainer"}
    assert [event.attempt for event in of(told, GroupEnded)] == [0, 1, 2]
    assert [(e.succeeded, e.root_cause) for e in of(told, GroupEnded)] == [
        (False, 0), (False, 0), (True, None),
    ]  # fmt: skip
    assert [(e.restarts, e.max_restarts, e.delay_s) for e in of(told, Restarting)] == [
        (1, 2, 0.0), (2, 2, 0.0),
    ]  # fmt: skip
    assert of(told, Restarting)[0].reason == "rank 0 failed: restart 1 of 2"
    rounds = of(told, RoundCompleted)
    assert [each.world_size for each in rounds] == [2, 2, 2]
    assert [each.round for each in rounds] == [0, 1, 2]
    assert [len(each.members) for each in rounds] == [1, 1, 1]
    (ended,) = of(told, RunEnded)
    assert (ended.succeeded, ended.exit_status, ended.root_cause) == (True, 0, None)


async def test_a_restart_is_told_before_the_wait() -> None:
    bus = EventBus()
    stream = bus.subscribe()
    config = LaunchConfig(1, 1, 1, max_restarts=1, min_uptime=0, restart_backoff=1000)
    job = asyncio.create_task(launch(config, SH, "exit 3", events=bus))
    restarting = await until(stream, Restarting)
    # At the most 30 s, and at least half of that.
    assert 10 <= restarting.delay_s <= 30
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    ended = await until(stream, RunEnded)
    assert (ended.succeeded, ended.exit_status) == (False, 1)


async def test_the_end_of_a_run_that_fails() -> None:
    bus = EventBus()
    config = LaunchConfig(1, 1, 2, max_restarts=0, **QUICK)
    with pytest.raises(ChildFailedError):
        await launch(config, SH, "[ $RANK = 0 ] || kill -9 $$$$; exec sleep 1000", events=bus)
    (ended,) = of(bus.subscribe().take(), RunEnded)
    assert (ended.succeeded, ended.exit_status, ended.root_cause) == (False, 137, 1)
    assert ended.why == "rank 1 failed"


async def test_the_end_of_a_run_that_cannot_be_run(tmp_path: Path) -> None:
    bus = EventBus()
    config = LaunchConfig(1, 1, 1, max_restarts=3, **QUICK)
    with pytest.raises(FileNotFoundError):
        await launch(config, str(tmp_path / "no-such-program"), events=bus)
    told = bus.subscribe().take()
    assert kinds(told) == ["round_completed", "run_ended"]
    assert "no-such-program" in of(told, RunEnded)[0].why
    assert of(told, RunEnded)[0].exit_status == 1


async def test_a_run_that_is_cancelled_tells_its_end(channel: Channel) -> None:
    bus = EventBus()
    stream = bus.subscribe()
    job = asyncio.create_task(launch(LaunchConfig(1, 1, 1, max_restarts=3), SH, SLEEP, events=bus))
    await channel.lines(1)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    told = stream.take()
    assert kinds(told)[-3:] == ["worker_failed", "group_ended", "run_ended"]


async def test_what_is_told_by_a_run_reaches_who_consumes_it_meanwhile() -> None:
    """Also what is found out for consumers alone, of each attempt."""
    bus = EventBus()
    consuming = asyncio.create_task(all_of(bus.subscribe()))
    logs = DefaultLogsSpecs(redirects=Std.ALL)
    config = LaunchConfig(1, 1, 1, max_restarts=1, logs_specs=logs, **QUICK)
    script = f': > "$ASUPERVISE_HEARTBEAT_FILE"; [ {COUNT} = 1 ] || exit 3'
    await launch(config, SH, script, events=bus)
    bus.close()
    told = await consuming
    assert [event.attempt for event in of(told, Heartbeat)] == [0, 1]


# --- rounds, and nodes that are lost --------------------------------------------------------------


def members(names: str) -> tuple[Member, ...]:
    return tuple(Member(name, f"host-{name}", f"10.0.0.{name}", 2) for name in names)


def told_of(*rounds: Round) -> list[Event]:
    """What a node tells that hears of these rounds, and is in each of those that run."""
    bus = EventBus()
    teller = RunTeller(bus, "job", 3)
    for round in rounds:
        teller.round_is_news(round)
        if round.state == "running":
            teller.round_completed(round)
    return bus.subscribe().take()


def test_a_lost_node_is_told_as_soon_as_it_is_known() -> None:
    lost = Round(1, "open", why="node host-b is lost", lost=("host-b",))
    told = told_of(Round(0, "running", members("abc")), lost)
    assert kinds(told) == ["round_completed", "member_lost"]
    assert of(told, RoundCompleted)[0].members == ("host-a", "host-b", "host-c")
    assert of(told, RoundCompleted)[0].world_size == 6
    (one,) = of(told, MemberLost)
    assert (one.member, one.reason, one.run_id) == ("host-b", "node host-b is lost", "job")


def test_it_is_told_once_in_whatever_states_the_round_is_seen() -> None:
    lost = Round(1, "open", why="node host-b is lost", lost=("host-b",))
    running = lost._replace(state="running", members=members("ac"))
    over = running._replace(state="over", succeeded=True, why="all workers succeeded")
    begun = Round(0, "running", members("abc"))
    for seen in ([lost, lost, running, over], [running, over], [over], [lost, over]):
        assert len(of(told_of(begun, *seen), MemberLost)) == 1


def test_two_nodes_that_are_lost_at_once() -> None:
    lost = Round(1, "open", why="node host-b, host-c is lost", lost=("host-b", "host-c"))
    told = told_of(Round(0, "running", members("abc")), lost)
    assert [each.member for each in of(told, MemberLost)] == ["host-b", "host-c"]


def test_who_comes_into_a_round_tells_nothing_of_what_was_before() -> None:
    lost = Round(4, "open", why="node host-b is lost", lost=("host-b",), restarts=2, delay_s=3.0)
    assert kinds(told_of(lost, lost._replace(state="running", members=members("ax")))) == [
        "round_completed"
    ]


def test_a_restart_is_told_by_each_node_and_once() -> None:
    culprit = Culprit("b", 0, 3)
    again = Round(1, "open", restarts=1, delay_s=2.5, why="rank 3 failed: restart 1 of 3",
                  culprit=culprit)  # fmt: skip
    told = told_of(Round(0, "running", members("ab")), again, again,
                   again._replace(state="running", members=members("ab")))  # fmt: skip
    (one,) = of(told, Restarting)
    assert (one.restarts, one.max_restarts, one.delay_s) == (1, 3, 2.5)
    assert (one.reason, one.local_rank) == ("rank 3 failed: restart 1 of 3", None)


def test_a_round_for_another_reason_is_no_restart() -> None:
    joined = Round(1, "open", why="a node has joined")
    assert kinds(told_of(Round(0, "running", members("a")), joined)) == ["round_completed"]


run = test_nodes.run


@pytest.mark.skipif(not_installed() is not None, reason=not_installed() or "")
async def test_a_node_that_is_killed_is_told_of_by_the_others(
    run: test_nodes.Nodes, tmp_path: Path
) -> None:
    """Read from the folders of their runs, while they go on."""
    script = test_nodes.SLEEPS
    folders = [tmp_path / name for name in "ab"]
    nodes = [run.start(script, "--log-dir", folder, nnodes="1:2") for folder in folders]
    await run.round(2, places=[0, 1])
    nodes[1].signal(signal.SIGKILL)
    await nodes[1].ended()
    await run.round(1, places=[0])
    nodes[0].signal(signal.SIGTERM)
    assert await nodes[0].status() == 128 + signal.SIGTERM
    told = read(folders[0])
    (lost,) = of(told, MemberLost)
    assert lost.reason == f"node {lost.member} is lost"
    assert [each.world_size for each in of(told, RoundCompleted)] == [2, 1]
    assert [each.attempt for each in of(told, WorkerStarted)] == [0, 1]
    assert kinds(told)[-1] == "run_ended"
    assert of(told, RunEnded)[0].succeeded is False


def read(logs: Path) -> list[Event]:
    """The events of the one run with its folder in there."""
    (file,) = logs.glob("*/events.jsonl")
    header, *lines = map(json.loads, file.read_text().splitlines())
    assert header["event"] == "header"
    told = [from_dict(line) for line in lines]
    assert None not in told
    return [event for event in told if event is not None]


# --- services -----------------------------------------------------------------------------------


async def test_what_is_told_of_services(channel: Channel) -> None:
    once = f"[ {COUNT} = 0 ] && exit 3; "
    bus = EventBus()
    arguments = shell(channel, [SLEEP, once + SLEEP])
    async with run_services(**arguments, policy=AT_ONCE, max_restarts=9, events=bus) as services:
        await channel.lines(2)
        await services.close()
        told = await all_of(services.events())
    assert not bus.closed
    assert bus.subscribe().take() == told
    assert kinds(told)[0] == "group_starting"
    assert kinds(told)[-1] == "group_ended"
    assert len(of(told, GroupStarting)) == len(of(told, GroupEnded)) == 1
    of_1 = [e for e in told if isinstance(e, WorkerEvent | Restarting) and e.local_rank == 1]
    of_1 = [event for event in of_1 if event.kind != "resource_sample"]
    assert [(event.kind, event.attempt) for event in of_1] == [
        ("worker_started", 0), ("worker_exited", 0), ("worker_failed", 0), ("restarting", 0),
        ("worker_started", 1), ("worker_exited", 1), ("worker_failed", 1),
    ]  # fmt: skip
    (restarting,) = of(told, Restarting)
    assert (restarting.restarts, restarting.max_restarts) == (1, None)
    assert (restarting.reason, restarting.delay_s) == ("rank 1 failed, exit code 3", 0.0)
    assert of(told, GroupEnded)[0].root_cause is None
    assert [failed.root_cause for failed in of(told, WorkerFailed)] == [False] * 3


async def test_the_service_that_failed_too_often_is_the_root_cause() -> None:
    arguments = shell(None, ["exec sleep 1000", "exit 3"])
    async with run_services(**arguments, policy=AT_ONCE, max_restarts=2) as services:
        told = await all_of(services.events())
    causes = [failed for failed in of(told, WorkerFailed) if failed.root_cause]
    assert [(each.rank, each.exitcode) for each in causes] == [(1, 3)]
    (ended,) = of(told, GroupEnded)
    assert (ended.succeeded, ended.root_cause) == (False, 1)
    assert [each.restarts for each in of(told, Restarting)] == [1, 2]


class _Spoilt(DefaultLogsSpecs):
    """The second worker's file is to lie in a folder that is a file."""

    def reify(self, envs: Any) -> LogsDest:
        logs = super().reify(envs)
        logs.stdouts[1] = "/dev/null/stdout.log"
        return logs


async def test_services_that_cannot_be_started_tell_it(channel: Channel) -> None:
    bus = EventBus()
    arguments = shell(channel, [SLEEP, SLEEP])
    with pytest.raises(NotADirectoryError):
        await run_services(**arguments, logs_specs=_Spoilt(redirects=Std.OUT), events=bus)
    told = bus.subscribe().take()
    assert kinds(told)[0] == "group_starting"
    assert kinds(told)[-1] == "group_ended"
    assert len(of(told, GroupEnded)) == 1
    assert of(told, Warned)


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(("restarts", "status"), [(1, 0), (0, 3)])
def test_the_command_lines_run_is_in_its_folder(
    run_cli: Run, tmp_path: Path, restarts: int, status: int
) -> None:
    logs = tmp_path / "logs"
    done = run_cli("--max-restarts", restarts, "--restart-backoff", 0, "--min-uptime", 0,
                   "--log-dir", logs, "--no-python", "sh", "-c",
                   f"[ {COUNT} = 1 ] || exit 3")  # fmt: skip
    assert done.returncode == status
    told = read(logs)
    assert [each.exit_status for each in of(told, RunEnded)] == [status]
    assert len(of(told, Restarting)) == restarts
    assert len(of(told, GroupStarting)) == restarts + 1


async def test_a_run_without_enough_nodes_has_an_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from asupervise.elastic.rendezvous.static import StaticRendezvous

    async def join(self: StaticRendezvous, port: int) -> Round:
        return self._round._replace(state="over", why="1 of at least 2 nodes came within 1 s")

    monkeypatch.setattr(StaticRendezvous, "join", join)
    bus = EventBus()
    with pytest.raises(RunError):
        await launch(LaunchConfig(1, 1, 1), SH, READY, events=bus)
    told = bus.subscribe().take()
    assert kinds(told) == ["run_ended"]
    assert of(told, RunEnded)[0].why == "1 of at least 2 nodes came within 1 s"
    assert of(told, RunEnded)[0].exit_status == 1
