"""A run as a value, from what its events say: pure.

Times within a run are seconds since its first event, by the supervisor's monotonic clock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

from asupervise import events as ev
from asupervise.views.lives import Life, lives_of

__all__ = [
    "Attempt",
    "Run",
    "State",
    "told_run",
]

State = Literal["succeeded", "failed", "ended", "running", "unknown"]

# Somebody who is about to be started anew counts as running for so long after that was due.
_LATE_S: Final = 30.0
_PASSING: Final = (ev.Heartbeat, ev.Progress, ev.ResourceSample)
_LAUNCHERS: Final = frozenset({"numactl", "taskset", "nice", "env"})


class Attempt(NamedTuple):
    """One group of the run on this node; a service has one only.

    Attributes:
        number: from 0.
        start_s: when it was started.
        end_s: None if it has not ended, as far as is known.
        succeeded: None likewise.
        culprit: the worker's start that was its root cause.
    """

    number: int
    start_s: float
    end_s: float | None = None
    succeeded: bool | None = None
    culprit: Life | None = None


class Run(NamedTuple):
    """What a run's folder says about it.

    Attributes:
        state: how it ended. "ended": somebody ended it, by a signal or in the application, and no
            worker had failed; "unknown": its end is written down nowhere, and it does not go on.
        title: what ran.
        run_id: as the workers know it.
        group: the workers' role.
        node: host's name.
        cwd: the folder that its workers were started in; "" if unknown.
        nprocs: workers on this node.
        began_at: in seconds since the epoch; None if unknown.
        duration_s: until its end, or until the last that is known of it.
        why: of its end, in a sentence.
        exit_status: of the command line; None if unknown.
        root_cause: the rank over all nodes that it failed of; None for nobody or unknown.
        culprit: that worker's start, where it was on this node.
        attempts: in their order.
        lives: of all workers, in the order of attempts and ranks.
        events: in the order of time, without those that pass (heartbeats, progress, samples).
        zero_ns: the monotonic time of its begin.
        notes: what could not be read, a sentence each.
        version: of the asupervise that wrote the events; "" if unknown.
        run_dir: its folder.
        read_at: when that was read, in seconds since the epoch.
    """

    state: State = "unknown"
    title: str = ""
    run_id: str = ""
    group: str = ""
    node: str = ""
    cwd: str = ""
    nprocs: int = 0
    began_at: float | None = None
    duration_s: float | None = None
    why: str = ""
    exit_status: int | None = None
    root_cause: int | None = None
    culprit: Life | None = None
    attempts: tuple[Attempt, ...] = ()
    lives: tuple[Life, ...] = ()
    events: tuple[ev.Event, ...] = ()
    zero_ns: int = 0
    notes: tuple[str, ...] = ()
    version: str = ""
    run_dir: str = ""
    read_at: float = 0.0

    def since(self, event: ev.Event) -> float:
        """Seconds from the run's begin to an event."""
        return (event.monotonic_ns - self.zero_ns) / 10**9


def told_run(
    told: Sequence[ev.Event],
    *,
    is_alive: Callable[[ev.WorkerStarted], bool] = lambda started: False,
    now: float = 0.0,
) -> Run:
    """What these events tell.

    Args:
        told: events, in any order.
        is_alive: whether that worker still runs, as far as can be seen from here.
        now: in seconds since the epoch.

    Example:
        >>> told_run([]).state
        'unknown'
    """
    if not told:
        return Run()
    told = sorted(told, key=lambda event: event.monotonic_ns)
    first, last = told[0], told[-1]
    zero_ns = first.monotonic_ns
    lives = lives_of(told, zero_ns)
    run = Run(
        title=_title(told),
        run_id=next((event.run_id for event in told if event.run_id), ""),
        group=next((event.group for event in told if event.group), ""),
        node=first.node,
        cwd=next((event.cwd for event in told if isinstance(event, ev.GroupStarting)), ""),
        nprocs=max([e.nprocs for e in told if isinstance(e, ev.GroupStarting)], default=0)
        or len({life.local_rank for life in lives}),
        began_at=first.time,
        duration_s=(last.monotonic_ns - zero_ns) / 10**9,
        attempts=_attempts(told, lives, zero_ns),
        lives=lives,
        events=tuple(event for event in told if not isinstance(event, _PASSING)),
        zero_ns=zero_ns,
    )
    return _ended(run, told, is_alive, now)


# --- how it ended -------------------------------------------------------------------------------


def _ended(
    run: Run, told: Sequence[ev.Event], is_alive: Callable[[ev.WorkerStarted], bool], now: float
) -> Run:
    if (end := _end(told)) is None:
        return _going_on(run, told, is_alive, now)
    run = run._replace(state=_state(end, run.lives), root_cause=end.root_cause)
    if isinstance(end, ev.RunEnded):
        run = run._replace(why=end.why, exit_status=end.exit_status)
    if end.succeeded:
        return run
    culprit = next((a.culprit for a in reversed(run.attempts) if a.culprit is not None), None)
    if culprit is not None and run.root_cause not in (None, culprit.rank):
        culprit = None  # it was on another node
    return run._replace(culprit=culprit)


def _state(end: ev.RunEnded | ev.GroupEnded, lives: Sequence[Life]) -> State:
    if isinstance(end, ev.RunEnded):
        from_outside = bool(end.signal) and end.root_cause is None
    else:
        nobody_failed = not end.succeeded and end.root_cause is None
        from_outside = nobody_failed and any(life.outcome == "ended" for life in lives)
    return "ended" if from_outside else "succeeded" if end.succeeded else "failed"


def _end(told: Sequence[ev.Event]) -> ev.RunEnded | ev.GroupEnded | None:
    """What ended the run. After a group there may be another one where nodes have agreed on it."""
    ends = [event for event in told if isinstance(event, ev.RunEnded)]
    if ends or any(isinstance(event, ev.RoundCompleted) for event in told):
        return ends[-1] if ends else None
    last = next(
        (e for e in reversed(told) if isinstance(e, ev.GroupStarting | ev.GroupEnded)), None
    )
    return last if isinstance(last, ev.GroupEnded) else None


def _going_on(
    run: Run, told: Sequence[ev.Event], is_alive: Callable[[ev.WorkerStarted], bool], now: float
) -> Run:
    """Without an end: some worker is alive, or is about to be started; or nobody knows."""
    started = {(e.pid, e.local_rank): e for e in told if isinstance(e, ev.WorkerStarted)}
    for event in told:
        if isinstance(event, ev.WorkerExited):
            started.pop((event.pid, event.local_rank), None)
    alive = {who for who, event in started.items() if is_alive(event)}
    last = told[-1]
    delay_s = last.delay_s if isinstance(last, ev.Restarting) else 0.0
    if not alive and (started or not -1 < now - last.time < delay_s + _LATE_S):
        return run
    lives = (life._replace(alive=(life.pid, life.local_rank) in alive) for life in run.lives)
    length_s = max(run.duration_s or 0.0, now - told[0].time)
    return run._replace(state="running", lives=tuple(lives), duration_s=length_s)


# --- its parts ----------------------------------------------------------------------------------


def _title(told: Sequence[ev.Event]) -> str:
    """What ran, as its user would call it."""
    entrypoint = next((e.entrypoint for e in told if isinstance(e, ev.GroupStarting)), "")
    argv = next((e.argv for e in told if isinstance(e, ev.WorkerStarted) and e.argv), ())
    if argv and os.path.basename(argv[0]) in _LAUNCHERS and "--" in argv:
        argv = argv[argv.index("--") + 1 :]
    if not argv or (entrypoint and os.path.basename(entrypoint) != os.path.basename(argv[0])):
        return os.path.basename(entrypoint) if os.path.isabs(entrypoint) else entrypoint
    if not os.path.basename(argv[0]).startswith("python"):
        return os.path.basename(argv[0])
    return _python_title(argv)


def _python_title(argv: tuple[str, ...]) -> str:
    words = iter(argv[1:])
    for word in words:
        if word == "-m":
            return next(words, "python -m")
        if word in ("-X", "-W"):
            next(words, "")
        elif word == "-c":
            return "python -c …"
        elif not word.startswith("-"):
            return os.path.basename(word)
    return os.path.basename(argv[0])


def _attempts(told: Sequence[ev.Event], lives: Sequence[Life], zero_ns: int) -> tuple[Attempt, ...]:
    culprits = {
        life.attempt: life for life in lives if life.failure is not None and life.failure.root_cause
    }
    begun = [event for event in told if isinstance(event, ev.GroupStarting)]
    # A service is one group, though its workers have attempts of their own.
    last_culprit = [culprits[max(culprits)]] if culprits else []
    found: dict[int, Attempt] = {}
    for event in told:
        at_s = (event.monotonic_ns - zero_ns) / 10**9
        if isinstance(event, ev.GroupStarting):
            found[event.attempt] = Attempt(event.attempt, at_s)
        elif isinstance(event, ev.GroupEnded):
            attempt = found.get(event.attempt) or Attempt(event.attempt, at_s)
            culprit = culprits.get(event.attempt)
            if len(begun) == 1 and last_culprit:
                culprit = last_culprit[0]
            found[event.attempt] = attempt._replace(
                end_s=at_s, succeeded=event.succeeded, culprit=culprit
            )
    return tuple(found[number] for number in sorted(found))
