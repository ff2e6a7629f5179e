"""The starts of a run's workers as values, from what its events say: pure.

Times are seconds since the run's first event, by the supervisor's monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, Literal, NamedTuple

from asupervise import events as ev

__all__ = ["Failure", "Life", "Sample", "lives_of"]

# Longer than that, and than so many of its usual intervals, a heart that does not beat is told of.
_GAP_S: Final = 1.0
_GAP_INTERVALS: Final = 8
_MAX_GAPS: Final = 20


class Sample(NamedTuple):
    """What a worker used at a time of the run."""

    at_s: float
    rss_bytes: int
    cpu_s: float


class Failure(NamedTuple):
    """What is known of a worker that did not succeed; as `events.WorkerFailed` has it.

    Attributes:
        at: in seconds since the epoch, where the worker has said when it failed; else None.
    """

    message: str = ""
    cause: str = ""
    signal: str = ""
    traceback: str = ""
    stack: str = ""
    stderr_tail: str = ""
    ended_by_us: bool = False
    root_cause: bool = False
    at: float | None = None


class Life(NamedTuple):
    """One start of one worker.

    Attributes:
        attempt: of its group or, in a service, of the worker.
        local_rank: on its node.
        rank: over all nodes.
        pid: 0 if unknown.
        start_s: when it was started; None if unknown.
        end_s: when it ended; None if it has not, or nobody has seen it.
        started_at: in seconds since the epoch; None if unknown.
        exitcode: None if unknown.
        peak_rss_bytes: None if unknown.
        argv: what was executed.
        binding: in words.
        stdout: its file, relative to the run's folder; "" for none.
        stderr: likewise.
        failure: None if it has not failed, as far as is known.
        first_output_s: None if unknown.
        gaps: times from and to which its heart did not beat.
        samples: in the order of time.
        progress: what it said last: done, and of how much.
        stack: where it was when that was asked last, in a line.
        alive: whether it is known to run.
    """

    attempt: int
    local_rank: int
    rank: int
    pid: int = 0
    start_s: float | None = None
    end_s: float | None = None
    started_at: float | None = None
    exitcode: int | None = None
    peak_rss_bytes: int | None = None
    argv: tuple[str, ...] = ()
    binding: str = ""
    stdout: str = ""
    stderr: str = ""
    failure: Failure | None = None
    first_output_s: float | None = None
    gaps: tuple[tuple[float, float], ...] = ()
    samples: tuple[Sample, ...] = ()
    progress: tuple[float, float | None] | None = None
    stack: str = ""
    alive: bool = False

    @property
    def outcome(self) -> Literal["succeeded", "failed", "ended", "open"]:
        """How it ended; "ended": by us; "open": it runs, or nobody knows."""
        if self.failure is not None:
            return "ended" if self.failure.ended_by_us else "failed"
        if self.exitcode is None:
            return "open"
        return "succeeded" if self.exitcode == 0 else "failed"


_Key = tuple[int, int]


def lives_of(told: Sequence[ev.Event], zero_ns: int) -> tuple[Life, ...]:
    """All starts that these events tell of, by attempt and local rank.

    Args:
        told: in the order of time.
        zero_ns: the monotonic time of the run's begin.
    """
    found: dict[_Key, list[ev.WorkerEvent]] = {}
    keys: dict[tuple[int, int], _Key] = {}
    for event in told:
        if isinstance(event, ev.WorkerEvent):
            key = _key_of(event, found, keys)
            found.setdefault(key, []).append(event)
    stacks = _last_stacks(told)
    folders = {e.attempt: e.log_dir for e in told if isinstance(e, ev.GroupStarting) and e.log_dir}
    folder = next(iter(folders.values()), "")
    return tuple(
        _life(key, found[key], zero_ns, folders.get(key[0], folder))._replace(
            stack=stacks.get(key, "")
        )
        for key in sorted(found)
    )


def _key_of(
    event: ev.WorkerEvent,
    found: Mapping[_Key, list[ev.WorkerEvent]],
    keys: dict[tuple[int, int], _Key],
) -> _Key:
    """Which start of a worker an event is about: its process tells, wherever there is one.

    The root cause of a service is told with the service's attempt, which is no worker's.
    """
    key = (event.attempt, event.local_rank)
    process = (event.pid, event.local_rank)
    if isinstance(event, ev.WorkerStarted):
        keys[process] = key
    elif event.pid:
        key = keys.get(process, key)
    elif key in found:
        # It could not be started again: a life without a beginning.
        attempts = [attempt for attempt, rank in found if rank == event.local_rank]
        key = (max(attempts) + 1, event.local_rank)
    return key


def _last_stacks(told: Iterable[ev.Event]) -> dict[_Key, str]:
    return {
        (event.attempt, local_rank): stack
        for event in told
        if isinstance(event, ev.StacksDumped)
        for local_rank, stack in event.stacks.items()
    }


def _life(key: _Key, told: Sequence[ev.WorkerEvent], zero_ns: int, folder: str) -> Life:
    attempt, local_rank = key

    def at_s(event: ev.Event) -> float:
        return (event.monotonic_ns - zero_ns) / 10**9

    fields: dict[str, Any] = {"rank": told[0].rank}
    for event in told:
        fields["pid"] = event.pid or fields.get("pid", 0)
        if isinstance(event, ev.WorkerStarted):
            fields |= {"start_s": at_s(event), "started_at": event.time}
            fields |= {"argv": event.argv, "binding": event.binding}
            fields["stdout"] = _relative(event.stdout, folder)
            fields["stderr"] = _relative(event.stderr, folder)
        elif isinstance(event, ev.FirstOutput):
            fields.setdefault("first_output_s", at_s(event))
        elif isinstance(event, ev.Progress):
            fields["progress"] = (event.done, event.total)
        elif isinstance(event, ev.WorkerExited):
            fields |= {"end_s": at_s(event), "exitcode": event.exitcode}
            fields["peak_rss_bytes"] = event.peak_rss_bytes
        elif isinstance(event, ev.WorkerFailed):
            fields["failure"] = _failure(event)
            fields.setdefault("exitcode", event.exitcode)
            fields["peak_rss_bytes"] = event.peak_rss_bytes or fields.get("peak_rss_bytes")
    samples = (e for e in told if isinstance(e, ev.ResourceSample))
    fields["samples"] = tuple(Sample(at_s(e), e.rss_bytes, e.cpu_s) for e in samples)
    beats = [at_s(event) for event in told if isinstance(event, ev.Heartbeat)]
    fields["gaps"] = _gaps(beats, fields.get("end_s"))
    return Life(attempt, local_rank, **fields)


def _failure(event: ev.WorkerFailed) -> Failure:
    return Failure(
        message=event.message,
        cause=event.cause,
        signal=event.signal,
        traceback=event.traceback,
        stack=event.stack,
        stderr_tail=event.stderr_tail,
        ended_by_us=event.ended_by_us,
        root_cause=event.root_cause,
    )


def _relative(path: str | None, folder: str) -> str:
    """A file by its place in the run's folder, which may have been moved since; "" for none."""
    if not path or not folder or not path.startswith(f"{folder.rstrip('/')}/"):
        return ""
    inner = path[len(folder.rstrip("/")) + 1 :]
    parts = inner.split("/")
    return "" if any(part in ("", ".", "..") for part in parts) else inner


def _gaps(beats: Sequence[float], end_s: float | None) -> tuple[tuple[float, float], ...]:
    if len(beats) < 3:
        return ()
    pauses = sorted(later - sooner for sooner, later in pairwise(beats))
    usual_s = max(_GAP_S, _GAP_INTERVALS * pauses[len(pauses) // 2])
    until = [*beats[1:], end_s if end_s is not None else beats[-1]]
    found = [(a, b) for a, b in zip(beats, until, strict=True) if b - a > usual_s]
    return tuple(found[-_MAX_GAPS:])
