"""Events into rows: what a person sees of a run at each moment, without any process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from asupervise import events
from asupervise.views.live.board import QUIET_S, Board
from asupervise.views.live.rows import NS, Picture, Row, State, how_ended

S = State
Kind = Callable[..., events.Event]


class Story:
    """Tells a board events at given seconds."""

    def __init__(self, nprocs: int = 2, *, begin: bool = True, **options: Any) -> None:
        self.board = Board(**options)
        self.now_s = 100.0
        if begin:
            self.tell(events.GroupStarting, nprocs=nprocs, entrypoint="/opt/train.py")
            for rank in range(nprocs):
                self.started(rank)

    def tell(self, kind: Kind, after_s: float = 0.0, **fields: Any) -> None:
        self.now_s += after_s
        at_ns = int(self.now_s * NS)
        values = {"group": "job", "time": 0.0, **fields}
        self.board.tell(kind(monotonic_ns=at_ns, **values))

    def of(self, kind: Kind, local_rank: int, after_s: float = 0.0, **fields: Any) -> None:
        values = {"local_rank": local_rank, "rank": local_rank, "pid": 7, **fields}
        self.tell(kind, after_s, **values)

    def started(self, rank: int, **fields: Any) -> None:
        self.of(events.WorkerStarted, rank, **fields)

    def exited(self, local_rank: int, exitcode: int, **fields: Any) -> None:
        self.of(events.WorkerExited, local_rank, exitcode=exitcode, uptime_s=1.0, **fields)

    def after(self, seconds: float = 0.0) -> Picture:
        self.now_s += seconds
        return self.board.picture(int(self.now_s * NS))

    def row(self, rank: int) -> Row:
        return next(row for row in self.after().rows if row.local_rank == rank)

    def states(self) -> list[State]:
        return [row.state for row in self.after().rows]


def test_before_anything_is_told() -> None:
    picture = Board().picture(5 * NS)
    assert (picture.rows, picture.elapsed_s, picture.over) == ((), 0, None)


def test_workers_wait_run_and_are_done() -> None:
    story = Story(2, begin=False)
    story.tell(events.GroupStarting, nprocs=2, entrypoint="/opt/train.py")
    assert story.states() == [S.WAITING, S.WAITING]
    story.started(0, after_s=1)
    story.started(1)
    story.exited(0, 0, after_s=20)
    assert story.states() == [S.DONE, S.RUNNING]
    picture = story.after(5)
    assert [row.uptime_s(picture.now_ns) for row in picture.rows] == [20, 25]
    assert (picture.title, picture.elapsed_s) == ("train.py", 26)
    assert picture.counts == {S.DONE: 1, S.RUNNING: 1}


def test_who_failed_and_who_was_ended() -> None:
    story = Story(3)
    story.exited(1, -11)
    assert how_ended(story.row(1)) == "SIGSEGV"
    story.tell(events.SignalSent, signal="SIGTERM", ranks=(0, 2), why="ending")
    assert story.states() == [S.ENDING, S.FAILED, S.ENDING]
    story.exited(0, -15)
    story.exited(2, 0)
    assert story.states() == [S.ENDED, S.FAILED, S.DONE]
    assert story.after().news[:2] == ("rank 1 failed: SIGSEGV; ending the others: SIGTERM", True)
    story.of(
        events.WorkerFailed, 1, exitcode=-11, signal="SIGSEGV", root_cause=True,
        message="Signal 11 (SIGSEGV)", cause="core dumped\nmore",
    )  # fmt: skip
    story.of(events.WorkerFailed, 0, exitcode=-15, ended_by_us=True, message="SIGTERM")
    story.tell(events.GroupEnded, succeeded=False, root_cause=1)
    assert story.row(1).root_cause
    assert story.row(1).message == "core dumped"
    assert story.after().news[:2] == ("rank 1 failed: SIGSEGV: core dumped", True)
    assert story.row(0).message == ""
    picture = story.after(10)
    assert picture.over is False
    assert picture.elapsed_s == 0  # the clock stands still at the end


@pytest.mark.parametrize(
    ("exitcode", "shown"), [(3, "exit 3"), (-9, "SIGKILL"), (-40, "signal 40"), (0, "exit 0")]
)
def test_how_a_worker_ended(exitcode: int, shown: str) -> None:
    assert how_ended(Row(exitcode=exitcode)) == shown


def test_cpu_is_what_was_used_between_two_looks() -> None:
    story = Story(1)
    story.of(events.ResourceSample, 0, after_s=2, rss_bytes=10, cpu_s=1.0)
    assert story.row(0).cpu == 0.5
    story.of(events.ResourceSample, 0, after_s=1, rss_bytes=20, cpu_s=3.0)
    assert (story.row(0).cpu, story.row(0).rss_bytes) == (2.0, 20)
    story.exited(0, 0)
    assert story.row(0).cpu is None


def test_a_worker_without_a_sign_of_life_is_quiet() -> None:
    story = Story(2)
    story.of(events.ResourceSample, 1, after_s=QUIET_S - 1, rss_bytes=1, cpu_s=30.0)
    story.after(1)
    assert story.states() == [S.QUIET, S.RUNNING]
    # It waits, and says that it does.
    story.of(events.ResourceSample, 1, after_s=QUIET_S, rss_bytes=1, cpu_s=30.01)
    story.of(events.Heartbeat, 0)
    assert story.states() == [S.RUNNING, S.QUIET]
    now_ns = int(story.now_s * NS)
    assert story.board.lines_seen({("job", 1): "a line", ("job", 9): "of nobody"}, now_ns)
    assert not story.board.lines_seen({("job", 1): "a line"}, now_ns)
    assert story.states() == [S.RUNNING, S.RUNNING]
    assert story.row(1).last_line == "a line"


def test_progress_of_all_and_how_long_it_will_take() -> None:
    story = Story(2)
    assert story.after().fraction is None
    story.of(events.Progress, 0, done=10, total=100)
    story.of(events.Progress, 1, done=3, total=None)
    assert (story.after().fraction, story.after().left_s) == (0.1, None)
    story.of(events.Progress, 0, after_s=10, done=30, total=100)
    assert story.after().left_s == 35
    story.of(events.Progress, 1, done=900, total=300)
    assert story.after().fraction == 0.65
    story.of(events.Progress, 1, done=1, total=0)
    assert story.after().fraction == 0.3


def test_a_job_that_is_started_anew_keeps_its_counts() -> None:
    story = Story(2)
    story.exited(0, 1)
    story.tell(events.GroupEnded, succeeded=False, root_cause=0)
    story.tell(
        events.Restarting,
        restarts=1,
        max_restarts=3,
        reason="rank 0 failed: restart 1 of 3",
        delay_s=2.0,
    )
    picture = story.after(1)
    assert picture.restarts == (1, 3)
    assert picture.news == ("rank 0 failed: restart 1 of 3", True, int((story.now_s + 1) * NS))
    story.tell(events.GroupStarting, nprocs=2, attempt=1)
    assert story.states() == [S.WAITING, S.WAITING]
    assert [row.restarts for row in story.after().rows] == [1, 1]
    story.started(0, attempt=1)
    assert (story.row(0).state, story.row(0).restarts, story.after().over) == (S.RUNNING, 1, None)
    story.started(1, attempt=1)
    # The clock goes on over all attempts; what has been overcome is no news for long.
    assert story.after(9).elapsed_s == 10
    assert story.after(60).news is None


def test_a_service_of_which_one_worker_is_started_anew() -> None:
    story = Story(2)
    story.exited(1, 7)
    story.tell(events.Restarting, restarts=1, local_rank=1, reason="rank 1 failed", delay_s=4.0)
    assert story.states() == [S.RUNNING, S.RESTARTING]
    assert story.row(1).due_ns == int((story.now_s + 4) * NS)
    story.started(1, attempt=1, pid=9)
    assert (story.row(1).state, story.row(1).pid, story.row(1).restarts) == (S.RUNNING, 9, 1)
    assert story.row(0).restarts == 0
    assert story.after().restarts == (1, None)


def test_a_second_job_of_the_same_name_begins_at_nothing() -> None:
    story = Story(1)
    story.exited(0, 0)
    story.tell(events.GroupEnded, succeeded=True)
    story.tell(events.GroupStarting, nprocs=1)
    assert [row.restarts for row in story.after().rows] == [0]


def test_groups_side_by_side_and_one_after_the_other() -> None:
    story = Story(1)
    story.tell(events.GroupStarting, nprocs=2, group="other")
    assert [(row.group, row.rank) for row in story.after().rows] == [
        ("job", 0), ("other", 0), ("other", 1),
    ]  # fmt: skip
    story.tell(events.GroupEnded, succeeded=True)
    assert story.after().over is None
    story.tell(events.GroupStarting, nprocs=1, group="third")
    assert {row.group for row in story.after().rows} == {"other", "third"}


def test_ranks_of_a_node_that_is_not_the_first() -> None:
    story = Story(begin=False)
    story.tell(events.RoundCompleted, round=2, members=("a", "b"), world_size=8)
    story.tell(events.GroupStarting, nprocs=4)
    story.of(events.WorkerStarted, 0, rank=4)
    assert [row.rank for row in story.after().rows] == [4, 5, 6, 7]
    assert story.after().round == (2, 2, 8)
    story.tell(events.MemberLost, member="b", reason="its lease has ended")
    assert story.after().news[:2] == ("node b is lost: its lease has ended", True)


def test_who_comes_late_shows_what_it_hears_of() -> None:
    story = Story(begin=False)
    story.of(events.ResourceSample, 3, rss_bytes=5, cpu_s=1.0, rank=7)
    story.exited(3, 0, rank=7)
    assert [(row.rank, row.state) for row in story.after().rows] == [(7, S.DONE)]


def test_where_workers_are_and_what_is_told_of_them() -> None:
    story = Story(2)
    story.tell(events.StacksDumped, stacks={0: "in wait (a.py:3)", 7: "nobody"})
    assert story.row(0).message == "in wait (a.py:3)"
    story.tell(events.Escalated, ranks=(0, 1))
    assert story.after().news[:2] == ("2 workers still there: SIGKILL", True)
    story.exited(0, -9)
    assert story.states() == [S.ENDED, S.ENDING]
    story.tell(events.Warned, text="the disk is full")
    assert story.after().news[:2] == ("the disk is full", True)


def test_a_run_that_could_not_be_started_says_why() -> None:
    story = Story(2, begin=False)
    story.tell(events.GroupStarting, nprocs=1)
    story.tell(events.RunEnded, succeeded=False, why="no such file", exit_status=1, group="")
    assert (story.after().over, story.after().news) == (False, ("no such file", True, 0))
