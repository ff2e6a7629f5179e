"""What happened in a run, a sentence each: pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final, NamedTuple

from asupervise import events as ev
from asupervise.hints import what_failed
from asupervise.views.plain import one_line, ranks_text
from asupervise.views.story import Run
from asupervise.views.words import count, duration, signal_name

__all__ = ["Happening", "happenings"]

_MOST: Final = 400


class Happening(NamedTuple):
    """Something that happened, or several such things in a row.

    Attributes:
        at_s: when the first did, from the run's begin.
        kind: what its mark looks like: start, exit, fail, signal, kill, stacks, restart, round,
            lost, warn, end.
        text: what it was.
    """

    at_s: float
    kind: str
    text: str


def happenings(run: Run) -> tuple[list[Happening], int]:
    """In the order of time; and how many were left out in their middle."""
    found = list(_all(run))
    if len(found) <= _MOST:
        return found, 0
    half = _MOST // 2
    return [*found[:half], *found[-half:]], len(found) - _MOST


def _all(run: Run) -> Iterator[Happening]:
    by_us = {(life.pid, life.local_rank) for life in run.lives if life.outcome == "ended"}
    for key, group in groupby(run.events, lambda event: _series(event, by_us)):
        row = list(group)
        kind, text = _told(key, row)
        if text:
            yield Happening(run.since(row[0]), kind, text)


def _series(event: ev.Event, by_us: set[tuple[int, int]]) -> tuple[object, ...]:
    """Events in a row that have this in common are told of together."""
    if isinstance(event, ev.WorkerStarted | ev.FirstOutput):
        return event.kind, event.attempt
    if isinstance(event, ev.WorkerExited):
        ended = (event.pid, event.local_rank) in by_us
        return event.kind, event.attempt, event.exitcode, ended
    if isinstance(event, ev.WorkerFailed):
        return event.kind, event.attempt, event.root_cause, event.ended_by_us
    return (event.kind, id(event))


def _told(key: tuple[object, ...], row: Sequence[ev.Event]) -> tuple[str, str]:
    first = row[0]
    workers = [event for event in row if isinstance(event, ev.WorkerEvent)]
    if not workers:
        return _of_group(first)
    who = f"rank{'s' if len({w.rank for w in workers}) > 1 else ''} " + ranks_text(
        worker.rank for worker in workers
    )
    if isinstance(first, ev.WorkerStarted):
        pids = f", pid {first.pid}" if len(row) == 1 else ""
        return "start", f"{who} started{pids}"
    if isinstance(first, ev.FirstOutput):
        return "start", f"{who}: first output"
    if isinstance(first, ev.WorkerExited):
        how = "ended with success" if first.exitcode == 0 else f"ended: {_code(first.exitcode)}"
        return ("exit" if first.exitcode == 0 or key[-1] else "fail"), f"{who} {how}"
    if isinstance(first, ev.WorkerFailed) and not first.ended_by_us:
        what = one_line(_what(first))
        root = "root cause: " if first.root_cause else ""
        return "fail", f"{root}{who}: {what}"
    return "", ""


def _what(event: ev.WorkerFailed) -> str:
    return what_failed(
        event.exitcode, cause=event.cause, signal=event.signal, message=event.message,
        traceback=event.traceback, stderr_tail=event.stderr_tail,
    )  # fmt: skip


def _code(exitcode: int) -> str:
    return signal_name(-exitcode) if exitcode < 0 else f"exit code {exitcode}"


def _of_group(event: ev.Event) -> tuple[str, str]:
    match event:
        case ev.GroupStarting():
            attempt = f" (attempt {event.attempt})" if event.attempt else ""
            return "start", f"{count(event.nprocs, 'worker')} about to start{attempt}"
        case ev.SignalSent():
            why = "to end it: " if event.why == "ending" else "asked for: "
            return "signal", f"{why}{one_line(event.signal)} to {_to(event.ranks)}"
        case ev.Escalated():
            return "kill", f"{one_line(event.signal)} to {_to(event.ranks)}, which still ran"
        case ev.StacksDumped():
            return "stacks", f"stacks of {count(len(event.stacks), 'worker')} taken"
        case ev.Restarting():
            most = "" if event.max_restarts is None else f" of {event.max_restarts}"
            delay = f" in {duration(event.delay_s)}" if event.delay_s else ""
            why = f": {one_line(event.reason)}" if event.reason else ""
            return "restart", f"restart {event.restarts}{most}{delay}{why}"
        case _:
            return _of_run(event)


def _of_run(event: ev.Event) -> tuple[str, str]:
    match event:
        case ev.RoundCompleted():
            nodes = count(len(event.members), "node")
            names = ", ".join(map(one_line, event.members[:8]))
            return "round", (
                f"round {event.round}: {count(event.world_size, 'worker')} on {nodes} ({names})"
            )
        case ev.MemberLost():
            return "lost", f"lost {one_line(event.member)}: {one_line(event.reason)}"
        case ev.Warned():
            return "warn", one_line(event.text, 500)
        case ev.GroupEnded():
            failed = ", with a failure" if event.root_cause is not None else ""
            return "end", f"all workers have ended{', with success' if event.succeeded else failed}"
        case ev.RunEnded(signal=signal) if signal:
            return "end", f"the run was ended by {signal} (exit status {event.exit_status})"
        case ev.RunEnded():
            why = f": {one_line(event.why)}" if event.why else ""
            how = "succeeded" if event.succeeded else "failed"
            return "end", f"the run has {how}{why} (exit status {event.exit_status})"
        case _:
            return "", ""


def _to(local_ranks: Sequence[int]) -> str:
    if not local_ranks:
        return "nobody"
    return f"local rank{'s' if len(local_ranks) > 1 else ''} {ranks_text(local_ranks)}"
