"""What happens in a group of workers, as typed values: a leaf.

Whatever shows something consumes these: the live view, the report, metrics, your own code::

    async with start_processes("trainer", "./train", args, envs) as ctx:
        async for event in ctx.events():
            if isinstance(event, events.WorkerFailed) and event.root_cause:
                print(event.rank, event.cause or event.message)

Each event has two clocks: `monotonic_ns` for order and durations, and `time` to show. `as_dict` is
what ``--events FILE`` and a run's ``events.jsonl`` hold, a line each; `from_dict` reads it back.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, get_args, get_origin, get_type_hints

__all__ = [
    "KINDS",
    "Escalated",
    "Event",
    "FirstOutput",
    "GroupEnded",
    "GroupStarting",
    "Heartbeat",
    "MemberLost",
    "Progress",
    "ResourceSample",
    "Restarting",
    "RoundCompleted",
    "RunEnded",
    "SignalSent",
    "StacksDumped",
    "Warned",
    "WorkerEvent",
    "WorkerExited",
    "WorkerFailed",
    "WorkerStarted",
    "from_dict",
]

_EMPTY: Final[Mapping[Any, Any]] = {}


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that has happened.

    Attributes:
        monotonic_ns: when, on ``time.monotonic_ns()`` of the supervisor's machine.
        time: when, in seconds since the epoch.
        run_id: of the run (``TORCHELASTIC_RUN_ID``); "" where there is none.
        group: the group's name; "" for what happens between groups.
        attempt: which group of the run on this node it is, from 0; of a service, how often that
            worker had been started before.
        node: the host's name.

    Example:
        >>> started = Heartbeat(monotonic_ns=1, time=2.0, local_rank=0, rank=4, pid=4711)
        >>> started.kind, started.as_dict()["rank"]
        ('heartbeat', 4)
    """

    kind: ClassVar[str] = ""

    monotonic_ns: int
    time: float
    run_id: str = ""
    group: str = ""
    attempt: int = 0
    node: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The event as JSON has it, its kind under ``"event"``."""
        # The fields in their order: that is how they were set.
        return {"event": self.kind, **{name: _plain(value) for name, value in vars(self).items()}}


@dataclass(frozen=True, kw_only=True)
class WorkerEvent(Event):
    """Something that has happened to one worker.

    Attributes:
        local_rank: on its node.
        rank: over all nodes; the local rank where nobody has said otherwise.
        pid: its process id; 0 if it has none.
    """

    local_rank: int
    rank: int
    pid: int = 0


@dataclass(frozen=True, kw_only=True)
class GroupStarting(Event):
    """A group is about to be started on this node.

    Attributes:
        nprocs: how many workers.
        entrypoint: the program or function.
        log_dir: the run's folder; None if it has none.
        temporary: whether that is removed after success.
        cwd: the folder that the workers start in; "" if unknown.
    """

    kind: ClassVar[str] = "group_starting"

    nprocs: int
    entrypoint: str = ""
    log_dir: str | None = None
    temporary: bool = False
    cwd: str = ""


@dataclass(frozen=True, kw_only=True)
class WorkerStarted(WorkerEvent):
    """A worker's process has been started.

    Attributes:
        argv: what was executed, binding included; empty for a fork of a zygote.
        binding: what it is bound to, in words; "" if to nothing.
        stdout: file of its standard output; None for the console.
        stderr: likewise for standard error.
    """

    kind: ClassVar[str] = "worker_started"

    argv: tuple[str, ...] = ()
    binding: str = ""
    stdout: str | None = None
    stderr: str | None = None


@dataclass(frozen=True, kw_only=True)
class FirstOutput(WorkerEvent):
    """A worker has written for the first time, to a stream that goes into a file.

    Attributes:
        stream: ``"stdout"`` or ``"stderr"``.
    """

    kind: ClassVar[str] = "first_output"

    stream: str


@dataclass(frozen=True, kw_only=True)
class Heartbeat(WorkerEvent):
    """A worker has called :func:`asupervise.heartbeat`.

    Told at most once in a tenth of a second for each worker.
    """

    kind: ClassVar[str] = "heartbeat"


@dataclass(frozen=True, kw_only=True)
class Progress(WorkerEvent):
    """A worker has called :func:`asupervise.progress`; the latest of what it said in a moment.

    Attributes:
        done: how much is done, in the worker's own unit.
        total: of how much; None if it did not say.
    """

    kind: ClassVar[str] = "progress"

    done: float
    total: float | None = None


@dataclass(frozen=True, kw_only=True)
class ResourceSample(WorkerEvent):
    """What a worker used when it was last looked at (``memory_sample_interval``).

    Attributes:
        rss_bytes: resident memory of its process.
        cpu_s: CPU seconds that its process has used since its start, user and system.
    """

    kind: ClassVar[str] = "resource_sample"

    rss_bytes: int
    cpu_s: float


@dataclass(frozen=True, kw_only=True)
class WorkerExited(WorkerEvent):
    """A worker's process has ended.

    Attributes:
        exitcode: its exit status, or minus the signal that it died of.
        uptime_s: seconds since its start.
        peak_rss_bytes: the most resident memory that it ever had, as the kernel says; None if
            unknown.
    """

    kind: ClassVar[str] = "worker_exited"

    exitcode: int
    uptime_s: float
    peak_rss_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class WorkerFailed(WorkerEvent):
    """What is known of a worker that did not succeed; told when its group has ended.

    Attributes:
        exitcode: as in `WorkerExited`.
        signal: the name of the signal that it died of; "" for none.
        cause: why, where the exit code does not say it (`ProcessFailure.cause`).
        message: the recorded exception, or a sentence where none was recorded.
        traceback: as recorded; "" if none was.
        stack: where it was before it was ended, in a line.
        stderr_tail: the last lines of its standard error, where that went into a file.
        error_file: where the exception was recorded; "" for nowhere.
        peak_rss_bytes: the most resident memory that it ever had; None if unknown.
        ended_by_us: whether we ended it.
        root_cause: whether it is the group's root cause.
    """

    kind: ClassVar[str] = "worker_failed"

    exitcode: int
    signal: str = ""
    cause: str = ""
    message: str = ""
    traceback: str = ""
    stack: str = ""
    stderr_tail: str = ""
    error_file: str = ""
    peak_rss_bytes: int | None = None
    ended_by_us: bool = False
    root_cause: bool = False


@dataclass(frozen=True, kw_only=True)
class SignalSent(Event):
    """A signal was sent to the process groups of workers.

    Attributes:
        signal: its name.
        ranks: the local ranks that were running.
        why: ``"asked"``: `send_signal`; ``"ending"``: the group is being ended.
    """

    kind: ClassVar[str] = "signal_sent"

    signal: str
    ranks: tuple[int, ...] = ()
    why: str = "asked"


@dataclass(frozen=True, kw_only=True)
class Escalated(Event):
    """The grace is over, or somebody is in a hurry: SIGKILL to those that are left.

    Attributes:
        signal: its name.
        ranks: the local ranks that still ran.
    """

    kind: ClassVar[str] = "escalated"

    signal: str = "SIGKILL"
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StacksDumped(Event):
    """It was asked where the workers are.

    Attributes:
        stacks: by local rank, in a line each; the whole is in ``<local_rank>/stacks.txt``.
    """

    kind: ClassVar[str] = "stacks_dumped"

    stacks: Mapping[int, str] = field(default_factory=lambda: _EMPTY)


@dataclass(frozen=True, kw_only=True)
class Restarting(Event):
    """Something is about to be started anew.

    Attributes:
        restarts: how often that has happened, this time included.
        max_restarts: how often it may; None for no such limit.
        reason: what made it necessary, in a sentence.
        delay_s: how long is waited before, in seconds.
        local_rank: the worker, of a service; None for the whole job.
    """

    kind: ClassVar[str] = "restarting"

    restarts: int
    max_restarts: int | None = None
    reason: str = ""
    delay_s: float = 0.0
    local_rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class RoundCompleted(Event):
    """The nodes have agreed on who takes part, and in which ranks.

    Attributes:
        round: its number, from 0.
        members: the nodes' host names, in the order of their ranks.
        world_size: the number of workers on all of them.
    """

    kind: ClassVar[str] = "round_completed"

    round: int
    members: tuple[str, ...] = ()
    world_size: int = 0


@dataclass(frozen=True, kw_only=True)
class MemberLost(Event):
    """A node takes part no more, without having said so.

    Attributes:
        member: its host's name.
        reason: in a sentence.
    """

    kind: ClassVar[str] = "member_lost"

    member: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something is not as it should be, and the run goes on.

    Attributes:
        text: a sentence.
    """

    kind: ClassVar[str] = "warned"

    text: str


@dataclass(frozen=True, kw_only=True)
class GroupEnded(Event):
    """All workers of a group have ended, and its result is known.

    Attributes:
        succeeded: whether none has failed.
        root_cause: the rank (over all nodes) that failed first by itself; None for nobody.
        duration_s: seconds since `GroupStarting`.
    """

    kind: ClassVar[str] = "group_ended"

    succeeded: bool
    root_cause: int | None = None
    duration_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """The run is over on this node: there will be no further group.

    Attributes:
        succeeded: whether the job has.
        why: in a sentence; "" if there is nothing to say.
        exit_status: what the command line will exit with, as far as the job decides it.
        root_cause: the rank, over all nodes, that the run failed of; None for nobody.
        signal: the name of the signal by which somebody outside ended it; "" for none.
    """

    kind: ClassVar[str] = "run_ended"

    succeeded: bool
    why: str = ""
    exit_status: int = 0
    root_cause: int | None = None
    signal: str = ""


KINDS: Final[Mapping[str, type[Event]]] = {
    each.kind: each
    for each in (
        GroupStarting, WorkerStarted, FirstOutput, Heartbeat, Progress, ResourceSample,
        WorkerExited, WorkerFailed, SignalSent, Escalated, StacksDumped, Restarting,
        RoundCompleted, MemberLost, Warned, GroupEnded, RunEnded,
    )
}  # fmt: skip
"""Every kind of event, by its name in JSON."""


def from_dict(data: object) -> Event | None:
    """The event that `as_dict` has written; None for anything else.

    Whoever reads a file distrusts it: a field that is missing or of another type than it should be
    gets its default, and where it has none the event is passed over. Unknown fields are left out.

    Example:
        >>> from_dict({"event": "warned", "monotonic_ns": 1, "time": 2.5, "text": "full disk"}).text
        'full disk'
        >>> from_dict({"event": "warned"}) is None
        True
    """
    if not isinstance(data, Mapping):
        return None
    kind = data.get("event")
    made = KINDS.get(kind) if isinstance(kind, str) else None
    if made is None:
        return None
    values: dict[str, Any] = {}
    for name, hint in _hints(made).items():
        value = _read(data.get(name), hint)
        if value is not _BAD:
            values[name] = value
    try:
        return made(**values)
    except TypeError:
        return None  # something that has no default is missing


_BAD: Final = object()
_TOO_LARGE: Final = 2**63
_RANK: Final = re.compile("[0-9]{1,9}")
_known_hints: dict[type[Event], dict[str, Any]] = {}


def _hints(kind: type[Event]) -> dict[str, Any]:
    if kind not in _known_hints:
        hints = get_type_hints(kind)
        _known_hints[kind] = {each.name: hints[each.name] for each in dataclasses.fields(kind)}
    return _known_hints[kind]


def _read(value: Any, hint: Any) -> Any:
    """The value, if it is of that type; `_BAD` if not."""
    if type(value) is hint:  # as most are
        return value if _is_sound(value) else _BAD
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple:
        items = [_read(item, args[0]) for item in value] if isinstance(value, list) else [_BAD]
        return _BAD if any(item is _BAD for item in items) else tuple(items)
    if origin is Mapping:
        return _read_stacks(value)
    if type(None) in args:
        if value is None:
            return None
        hint = next(arg for arg in args if arg is not type(None))
    # A bool is an int, and not meant.
    if hint is float and type(value) is int and _is_sound(value):
        value = float(value)
    return value if type(value) is hint and _is_sound(value) else _BAD


def _is_sound(value: Any) -> bool:
    """Whether it can be computed with, and nothing overflows."""
    if type(value) is float:
        return math.isfinite(value)
    return type(value) is not int or abs(value) < _TOO_LARGE


def _read_stacks(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return _BAD
    return {
        int(rank): text
        for rank, text in value.items()
        if isinstance(rank, str) and _RANK.fullmatch(rank) and isinstance(text, str)
    }


_PLAIN: Final = frozenset({bool, float, int, str, type(None)})


def _plain(value: Any) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return {str(key): text for key, text in value.items()}
    return value
