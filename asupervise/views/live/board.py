"""What a run looks like just now: events in, rows out. Pure, with no clock of its own.

A :class:`Board` is told every event; :meth:`Board.picture` is what there is to show at a moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from asupervise import events
from asupervise.views.live.rows import NS, News, Picture, Row, State, how_ended

__all__ = ["Board"]

# A worker without any sign of life for so long is shown as quiet.
QUIET_S: Final = 60.0
# Less than so much of a CPU is what an interpreter that waits uses.
_IDLE_CPU: Final = 0.02
# Who has a progress of so few seconds only says nothing about the time that is left.
_ESTIMATES_AFTER_S: Final = 2.0
_NEWS_S: Final = 60.0
_GOING_ON: Final = frozenset({State.RUNNING, State.QUIET, State.DONE, State.WAITING})
# Of a message in a row of a table.
_MESSAGE_CHARS: Final = 500


@dataclass
class _Group:
    """One group of workers, over all its attempts."""

    run_id: str
    attempt: int
    first_rank: int = 0
    ended: bool = False
    told_to_end: set[int] = field(default_factory=set)


class Board:
    """Keeps up with what is told.

    Args:
        title: what is run; by default the entrypoint of the first group.
        quiet_s: a worker without any sign of life for so many seconds is shown as quiet.

    Example:
        >>> board = Board()
        >>> at = {"time": 0.0, "group": "t"}
        >>> board.tell(events.GroupStarting(monotonic_ns=0, nprocs=2, **at))
        >>> board.tell(events.WorkerStarted(monotonic_ns=0, local_rank=0, rank=0, pid=7, **at))
        >>> [row.state.value for row in board.picture(5).rows]
        ['running', 'waiting']
    """

    def __init__(self, title: str = "", *, quiet_s: float = QUIET_S) -> None:
        self.rows: dict[tuple[str, int], Row] = {}
        self.dropped = 0
        self._title = title
        self._quiet_s = quiet_s
        self._groups: dict[str, _Group] = {}
        self._began_ns = 0
        self._ended_ns = 0
        self._over: bool | None = None
        self._restarts: tuple[int, int | None] = (0, None)
        self._round: tuple[int, int, int] | None = None
        self._news: News | None = None
        self._said_ns = 0

    def tell(self, event: events.Event) -> None:
        """Something has happened."""
        told: Callable[[Board, Any], None] | None = _TOLD.get(type(event))
        if told is not None:
            self._began_ns = self._began_ns or event.monotonic_ns
            told(self, event)

    def lines_seen(self, lines: Mapping[tuple[str, int], str], now_ns: int) -> bool:
        """The last lines of some workers, by key; returns whether one is new."""
        new = False
        for key, line in lines.items():
            row = self.rows.get(key)
            if row is not None and line != row.last_line:
                self.rows[key] = replace(row, last_line=line, sign_ns=now_ns)
                new = True
        return new

    def gpus_seen(self, gpus: Mapping[int, str]) -> None:
        """What is known of the GPUs, by local rank."""
        for key, row in self.rows.items():
            if (gpu := gpus.get(row.local_rank, "")) != row.gpu:
                self.rows[key] = replace(row, gpu=gpu)

    def picture(self, now_ns: int) -> Picture:
        """What there is to show now."""
        rows = sorted(self.rows.values(), key=lambda row: (row.group, row.rank))
        shown = tuple(self._shown(row, now_ns) for row in rows)
        known = [row for row in shown if row.fraction is not None]
        fraction = _mean(row.fraction or 0.0 for row in known)
        return Picture(
            now_ns=now_ns,
            rows=shown,
            counts=Counter(row.state for row in shown),
            title=self._title,
            elapsed_s=max((self._ended_ns or now_ns) - (self._began_ns or now_ns), 0) / NS,
            restarts=self._restarts,
            round=self._round,
            fraction=fraction,
            left_s=self._left_s(known, now_ns),
            news=self._still_news(shown, now_ns),
            over=self._over,
            dropped=self.dropped,
        )

    def _shown(self, row: Row, now_ns: int) -> Row:
        if row.state is State.RUNNING and row.quiet_s(now_ns) >= self._quiet_s:
            return replace(row, state=State.QUIET)
        return row

    def _still_news(self, rows: Sequence[Row], now_ns: int) -> News | None:
        """What was said last, for a minute; longer where it is the state of affairs."""
        goes_on = self._over is None and all(row.state in _GOING_ON for row in rows)
        return None if goes_on and now_ns - self._said_ns > _NEWS_S * NS else self._news

    def _left_s(self, rows: Sequence[Row], now_ns: int) -> float | None:
        """How long it will take if it goes on like that."""
        first_ns = min((row.told_first[0] for row in rows if row.told_first), default=now_ns)
        goes_on = self._over is None and all(row.state in _GOING_ON for row in rows)
        rate = _mean(row.rate(now_ns) for row in rows if row.fraction != 1)
        if not goes_on or not rate or now_ns - first_ns < _ESTIMATES_AFTER_S * NS:
            return None
        return (_mean(1 - (row.fraction or 0.0) for row in rows if row.fraction != 1) or 0) / rate

    # --- groups -------------------------------------------------------------------------------

    def _group_starting(self, event: events.GroupStarting) -> None:
        known = self._groups.get(event.group)
        again = known is not None and known.run_id == event.run_id and event.attempt > known.attempt
        self._forget_ended(event.group)
        before = {rank: self.rows.pop((event.group, rank), None) for rank in self._ranks(event)}
        first = known.first_rank if known is not None and again else 0
        self._groups[event.group] = _Group(event.run_id, event.attempt, first)
        for rank in range(event.nprocs):
            was = before.get(rank)
            restarts = was.restarts + bool(was.started_ns) if was is not None and again else 0
            self._put(Row(group=event.group, local_rank=rank, rank=first + rank, restarts=restarts))
        self._title = self._title or event.entrypoint.rpartition("/")[2]
        self._over, self._ended_ns = None, 0
        if not again:
            self._news = None

    def _ranks(self, event: events.GroupStarting) -> list[int]:
        return [rank for group, rank in self.rows if group == event.group]

    def _forget_ended(self, but: str) -> None:
        """Of groups that are over, when another one starts."""
        over = {name for name, group in self._groups.items() if group.ended and name != but}
        for name in over:
            del self._groups[name]
        self.rows = {key: row for key, row in self.rows.items() if key[0] not in over}

    def _group_ended(self, event: events.GroupEnded) -> None:
        if (group := self._groups.get(event.group)) is not None:
            group.ended = True
        for key, row in self.rows.items():
            if key[0] == event.group and row.state in (State.WAITING, State.RESTARTING):
                self.rows[key] = replace(row, state=State.ENDED, due_ns=0)
        if all(group.ended for group in self._groups.values()):
            self._over, self._ended_ns = event.succeeded, event.monotonic_ns

    def _run_ended(self, event: events.RunEnded) -> None:
        self._over, self._ended_ns = event.succeeded, event.monotonic_ns
        if event.why and not event.succeeded and self._news is None:
            self._say(event, event.why)

    def _restarting(self, event: events.Restarting) -> None:
        due_ns = event.monotonic_ns + int(event.delay_s * NS)
        if event.local_rank is None:
            self._restarts = event.restarts, event.max_restarts
            self._say(event, event.reason or f"restart {event.restarts}", due_ns=due_ns)
            return
        self._restarts = self._restarts[0] + 1, event.max_restarts
        if (row := self.rows.get((event.group, event.local_rank))) is not None:
            self._put(
                replace(
                    row,
                    state=State.RESTARTING,
                    restarts=event.restarts,
                    changed_ns=event.monotonic_ns,
                    due_ns=due_ns,
                )
            )
        self._say(event, f"{event.reason}: restart {event.restarts}", due_ns=due_ns)

    def _round_completed(self, event: events.RoundCompleted) -> None:
        if len(event.members) > 1:
            self._round = event.round, len(event.members), event.world_size

    def _member_lost(self, event: events.MemberLost) -> None:
        self._say(event, f"node {event.member} is lost: {event.reason}")

    def _warned(self, event: events.Warned) -> None:
        self._say(event, event.text)

    def _say(self, event: events.Event, text: str, *, is_bad: bool = True, due_ns: int = 0) -> None:
        self._news = News(text[:_MESSAGE_CHARS], is_bad, due_ns)
        self._said_ns = event.monotonic_ns

    # --- workers ------------------------------------------------------------------------------

    def _put(self, row: Row) -> None:
        self.rows[row.key] = row

    def _of(self, event: events.WorkerEvent) -> Row:
        row = self.rows.get((event.group, event.local_rank))
        # It may have been started before we were there to hear of it.
        return row or Row(group=event.group, local_rank=event.local_rank, rank=event.rank)

    def _worker_started(self, event: events.WorkerStarted) -> None:
        row = self._of(event)
        group = self._groups.setdefault(event.group, _Group(event.run_id, event.attempt))
        group.told_to_end.discard(event.local_rank)
        if event.rank - event.local_rank != group.first_rank:
            self._move(event.group, group, event.rank - event.local_rank)
        self._put(
            Row(
                group=row.group,
                local_rank=row.local_rank,
                rank=event.rank,
                state=State.RUNNING,
                pid=event.pid,
                started_ns=event.monotonic_ns,
                sign_ns=event.monotonic_ns,
                changed_ns=event.monotonic_ns if row.restarts else 0,
                restarts=row.restarts,
                files=tuple(path for path in (event.stdout, event.stderr) if path),
                gpu=row.gpu,
            )
        )

    def _move(self, name: str, group: _Group, first_rank: int) -> None:
        """Those that wait for their start have ranks after those of other nodes, too."""
        group.first_rank = first_rank
        for key, row in self.rows.items():
            if key[0] == name and row.state is State.WAITING:
                self.rows[key] = replace(row, rank=first_rank + row.local_rank)

    def _sign(self, event: events.WorkerEvent) -> None:
        self._put(replace(self._of(event), sign_ns=event.monotonic_ns))

    def _progress(self, event: events.Progress) -> None:
        row = replace(
            self._of(event), done=event.done, total=event.total, sign_ns=event.monotonic_ns
        )
        if row.told_first is None and (fraction := row.fraction) is not None:
            row = replace(row, told_first=(event.monotonic_ns, fraction))
        self._put(row)

    def _sampled(self, event: events.ResourceSample) -> None:
        row = self._of(event)
        since_s = (event.monotonic_ns - (row.sampled_ns or row.started_ns)) / NS
        cpu = max(event.cpu_s - row.cpu_s, 0.0) / since_s if since_s > 0 else row.cpu
        alive = cpu is not None and cpu >= _IDLE_CPU
        self._put(
            replace(
                row,
                rss_bytes=event.rss_bytes,
                cpu=cpu,
                cpu_s=event.cpu_s,
                sampled_ns=event.monotonic_ns,
                sign_ns=event.monotonic_ns if alive else row.sign_ns,
            )
        )

    def _exited(self, event: events.WorkerExited) -> None:
        row = self._of(event)
        group = self._groups.get(event.group)
        by_us = group is not None and event.local_rank in group.told_to_end
        failed = State.ENDED if by_us else State.FAILED
        row = replace(
            row,
            state=State.DONE if event.exitcode == 0 else failed,
            exitcode=event.exitcode,
            ended_ns=event.monotonic_ns,
            changed_ns=event.monotonic_ns,
            started_ns=row.started_ns or event.monotonic_ns - int(event.uptime_s * NS),
            cpu=None,
            message="",
        )
        self._put(row)
        if row.state is State.FAILED:
            self._say(event, f"rank {row.rank} failed: {how_ended(row)}")

    def _failed(self, event: events.WorkerFailed) -> None:
        text = _why(event)
        self._put(
            replace(
                self._of(event),
                state=State.ENDED if event.ended_by_us else State.FAILED,
                exitcode=event.exitcode,
                signal=event.signal,
                root_cause=event.root_cause,
                message="" if event.ended_by_us else text,
            )
        )
        if event.root_cause:
            how = how_ended(self._of(event))
            self._say(event, f"rank {event.rank} failed: {how}{f': {text}' if text else ''}")

    def _stacks(self, event: events.StacksDumped) -> None:
        for rank, text in event.stacks.items():
            row = self.rows.get((event.group, rank))
            if row is not None and row.state is State.RUNNING:
                self._put(replace(row, message=_first_line(text)))

    def _signal_sent(self, event: events.SignalSent) -> None:
        if event.why != "ending" or not event.ranks:
            return
        self._told_to_end(event)
        if self._news is not None and self._news.is_bad:
            self._say(event, f"{self._news.text}; ending the others: {event.signal}")
        else:
            self._say(event, f"ending {_workers(event.ranks)}: {event.signal}", is_bad=False)

    def _escalated(self, event: events.Escalated) -> None:
        self._told_to_end(event)
        if event.ranks:
            self._say(event, f"{_workers(event.ranks)} still there: {event.signal}")

    def _told_to_end(self, event: events.SignalSent | events.Escalated) -> None:
        if (group := self._groups.get(event.group)) is not None:
            group.told_to_end.update(event.ranks)
        for rank in event.ranks:
            row = self.rows.get((event.group, rank))
            if row is not None and row.state is State.RUNNING:
                self._put(replace(row, state=State.ENDING))


_TOLD: Final[dict[type[events.Event], Callable[[Board, Any], None]]] = {
    events.GroupStarting: Board._group_starting,
    events.WorkerStarted: Board._worker_started,
    events.FirstOutput: Board._sign,
    events.Heartbeat: Board._sign,
    events.Progress: Board._progress,
    events.ResourceSample: Board._sampled,
    events.WorkerExited: Board._exited,
    events.WorkerFailed: Board._failed,
    events.SignalSent: Board._signal_sent,
    events.Escalated: Board._escalated,
    events.StacksDumped: Board._stacks,
    events.Restarting: Board._restarting,
    events.RoundCompleted: Board._round_completed,
    events.MemberLost: Board._member_lost,
    events.Warned: Board._warned,
    events.GroupEnded: Board._group_ended,
    events.RunEnded: Board._run_ended,
}


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None


def _workers(ranks: Sequence[int]) -> str:
    return "1 worker" if len(ranks) == 1 else f"{len(ranks)} workers"


def _why(event: events.WorkerFailed) -> str:
    """What is known beyond the exit code, in a line."""
    if event.cause or event.traceback:
        return _first_line(event.cause or event.message)
    # Nothing was recorded: what it has said last is, most likely, what it died of.
    return _first_line("\n".join(reversed(event.stderr_tail.splitlines())))


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")[:_MESSAGE_CHARS]
