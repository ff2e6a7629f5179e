"""What a live view shows: a row a worker, and what is said of all of them. Values, no logic."""

from __future__ import annotations

import enum
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

__all__ = ["NS", "News", "Picture", "Row", "Size", "State", "how_ended"]

NS: Final = 10**9


class State(enum.Enum):
    """Where a worker is in its life; the order is that of what a person needs to see first."""

    FAILED = "failed"
    RESTARTING = "restarting"
    QUIET = "quiet"
    ENDING = "ending"
    RUNNING = "running"
    WAITING = "waiting"
    ENDED = "ended"
    DONE = "done"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One worker.

    Attributes:
        group: the name of its group.
        local_rank: on this node.
        rank: over all nodes.
        state: where it is; QUIET only in a picture.
        pid: its process id; 0 for none.
        started_ns: when it was started, on the monotonic clock; 0 for not yet.
        ended_ns: when it ended; 0 for not yet.
        changed_ns: when its state has changed last, its start not counted.
        sign_ns: its last sign of life.
        due_ns: when it is to be started anew; 0 for never.
        exitcode: as in `events.WorkerExited`.
        signal: the name of the signal that it died of.
        root_cause: whether its group failed of it.
        restarts: how often it was started anew.
        cpu: the share of one CPU that it has used lately; None for unknown.
        cpu_s: the CPU seconds that it has used, when last looked at.
        sampled_ns: when that was.
        rss_bytes: its memory; None for unknown.
        done: of its progress; None for unknown.
        total: likewise.
        told_first: when its progress was told first, and the fraction then.
        message: what is known of its failure, or where it is.
        files: where its output goes, as far as that is into files.
        last_line: of its output.
        gpu: what is known of its GPU.
    """

    group: str = ""
    local_rank: int = 0
    rank: int = 0
    state: State = State.WAITING
    pid: int = 0
    started_ns: int = 0
    ended_ns: int = 0
    changed_ns: int = 0
    sign_ns: int = 0
    due_ns: int = 0
    exitcode: int | None = None
    signal: str = ""
    root_cause: bool = False
    restarts: int = 0
    cpu: float | None = None
    cpu_s: float = 0.0
    sampled_ns: int = 0
    rss_bytes: int | None = None
    done: float | None = None
    total: float | None = None
    told_first: tuple[int, float] | None = None
    message: str = ""
    files: tuple[str, ...] = ()
    last_line: str = ""
    gpu: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """Names it among all rows."""
        return self.group, self.local_rank

    @property
    def fraction(self) -> float | None:
        """How much of its work is done, from 0 to 1; None for unknown."""
        if self.done is None or not self.total or self.total < 0:
            return None
        return min(max(self.done / self.total, 0.0), 1.0)

    def rate(self, now_ns: int) -> float:
        """How much of its work it does in a second, as a fraction; 0 for unknown."""
        if self.told_first is None or (fraction := self.fraction) is None:
            return 0.0
        since_ns, before = self.told_first
        return max(fraction - before, 0.0) * NS / max(now_ns - since_ns, 1)

    def uptime_s(self, now_ns: int) -> float | None:
        """Seconds since its start, or from there to its end."""
        if not self.started_ns:
            return None
        return max((self.ended_ns or now_ns) - self.started_ns, 0) / NS

    def quiet_s(self, now_ns: int) -> float:
        """Seconds without a sign of life."""
        return max(now_ns - max(self.sign_ns, self.started_ns), 0) / NS


class Size(NamedTuple):
    """Of a terminal, in cells."""

    columns: int
    lines: int


class News(NamedTuple):
    """The latest of what everybody should know.

    Attributes:
        text: a sentence.
        is_bad: whether somebody may have to do something about it.
        due_ns: when it comes to pass, where that is to be waited for; 0 otherwise.
    """

    text: str
    is_bad: bool
    due_ns: int = 0


class Picture(NamedTuple):
    """What there is to show at a moment.

    Attributes:
        now_ns: the moment, on the monotonic clock.
        rows: all workers, by rank.
        counts: how many there are in each state.
        title: what is run.
        elapsed_s: how long it has been run, or was.
        restarts: of the whole job, and how many there may be; None for no such limit.
        round: its number and its nodes, where there are several; None otherwise.
        fraction: how much of all work is done; None for unknown.
        left_s: how long the rest will take if it goes on like that; None for unknown.
        news: the latest of what everybody should know, or None.
        over: None while it runs; then whether it has succeeded.
        dropped: how many events were missed.
    """

    now_ns: int
    rows: tuple[Row, ...]
    counts: Mapping[State, int]
    title: str = ""
    elapsed_s: float = 0.0
    restarts: tuple[int, int | None] = (0, None)
    round: tuple[int, int, int] | None = None
    fraction: float | None = None
    left_s: float | None = None
    news: News | None = None
    over: bool | None = None
    dropped: int = 0


def how_ended(row: Row) -> str:
    """The exit code of a worker that has ended, or the signal that it died of."""
    code = row.exitcode or 0
    if row.signal or code >= 0:
        return row.signal or f"exit {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
