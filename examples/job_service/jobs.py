"""A job: what is wanted, how far it has got, and how it ended. No web, and nothing is started here.

`JobSpec.from_json` is where what comes from outside is checked. `Job.take` is where the events of
a running group become what a page shows.
"""

from __future__ import annotations

import asyncio
import math
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from asupervise import events

from .output import Bell, Output
from .text import printable

MAX_RANKS: Final = 64
MAX_WORDS: Final = 1_000
MAX_VARIABLES: Final = 100
MAX_TEXT: Final = 64_000
REPORT: Final = "report.html"
_KNOWN: Final = frozenset({"command", "ranks", "env", "hang_timeout"})


class BadJob(ValueError):
    """A job that cannot be accepted; says which field is wrong, and what would be right."""


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What to run.

    Attributes:
        command: the program and its arguments. No shell takes part.
        ranks: how many processes.
        env: variables, laid over the service's own environment.
        hang_timeout_s: seconds without output and CPU use until the job counts as hanging;
            None for never.
    """

    command: tuple[str, ...]
    ranks: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    hang_timeout_s: float | None = None

    @classmethod
    def from_json(cls, data: object) -> JobSpec:
        """Check what somebody has sent.

        Args:
            data: an object with ``command`` (a list of strings, or one string that is split as a
                shell would), and maybe ``ranks``, ``env`` and ``hang_timeout``.

        Raises:
            BadJob: if it is anything else.
        """
        if not isinstance(data, dict):
            raise BadJob(f"expected an object with a command, got {_short(data)}")
        if unknown := sorted(set(data) - _KNOWN):
            raise BadJob(f"{_short(unknown[0])}: unknown; expected {', '.join(sorted(_KNOWN))}")
        return cls(
            command=_command(data.get("command")),
            ranks=_ranks(data.get("ranks", 1)),
            env=_env(data.get("env") or {}),
            hang_timeout_s=_hang_timeout(data.get("hang_timeout")),
        )

    @property
    def argv(self) -> tuple[str, ...]:
        """What is executed: a Python script by the service's own Python."""
        if self.command[0].endswith(".py"):
            return (sys.executable, *self.command)
        return self.command

    @property
    def shown(self) -> str:
        return printable(shlex.join(self.command))


def _command(value: object) -> tuple[str, ...]:
    words = value
    if isinstance(value, str):
        try:
            words = shlex.split(value)
        except ValueError as exc:
            raise BadJob(f"command: {exc}") from exc
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise BadJob(f"command: expected a string or a list of strings, got {_short(value)}")
    if not words or not words[0]:
        raise BadJob("command: expected a program, got nothing")
    if len(words) > MAX_WORDS:
        raise BadJob(f"command: {len(words)} words: expected at most {MAX_WORDS}")
    return tuple(_text("command", word) for word in words)


def _ranks(value: object) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANKS:
        raise BadJob(f"ranks: {_short(value)}: expected a whole number from 1 to {MAX_RANKS}")
    return value


def _env(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise BadJob(f"env: expected an object of strings, got {_short(value)}")
    if len(value) > MAX_VARIABLES:
        raise BadJob(f"env: {len(value)} variables: expected at most {MAX_VARIABLES}")
    for name in value:
        if not name or "=" in name:
            raise BadJob(f"env: {_short(name)} is no name of a variable")
    return {_text("env", name): _text("env", text) for name, text in value.items()}


def _hang_timeout(value: object) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not (0 < value < math.inf):  # type: ignore[operator]
        raise BadJob(f"hang_timeout: {_short(value)}: expected seconds, more than 0")
    return float(value)  # type: ignore[arg-type]


def _text(name: str, text: str) -> str:
    if "\0" in text:
        raise BadJob(f"{name}: {_short(text)} has a NUL in it, which no program can be given")
    if len(text) > MAX_TEXT:
        raise BadJob(f"{name}: {len(text)} characters in one string: expected at most {MAX_TEXT}")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise BadJob(f"{name}: {_short(text)}: not valid Unicode") from exc
    return text


def _short(value: object) -> str:
    return printable(repr(value), 60)


# --- how far it has got -------------------------------------------------------------------------


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED: Final = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})


@dataclass
class Rank:
    """One worker of a job: ``waiting``, ``running``, ``succeeded``, ``failed`` or ``ended``.

    ``ended`` is one that we ended, because another had failed or the job was cancelled. `how` is
    the exit code or the signal.
    """

    rank: int
    state: str = "waiting"
    pid: int = 0
    how: str = ""
    done: float | None = None
    total: float | None = None


@dataclass(frozen=True, kw_only=True)
class Culprit:
    """The rank that failed first by itself, and why, as far as is known."""

    rank: int
    how: str
    message: str
    traceback: str
    stack: str
    stderr_tail: str


class Job:
    """One job, from its submission to its end and for as long as it is remembered.

    Attributes:
        stop_asked: set by whoever wants it to end.
        run_dir: the folder of its logs and its report, once it has ended; None if there is none.
        bell: rings whenever something about it has changed, its output included.
        version: grows with each change but those of its output.
    """

    def __init__(self, number: int, id: str, spec: JobSpec) -> None:
        self.number, self.id, self.spec = number, id, spec
        self.shown = spec.shown
        self.state = State.QUEUED
        self.created = time.time()
        self.started: float | None = None
        self.ended_at: float | None = None
        self.error = ""
        self.culprit: Culprit | None = None
        self.ranks = [Rank(rank) for rank in range(spec.ranks)]
        self.output = Output()
        self.run_dir: Path | None = None
        self.has_report = False
        self.stop_asked = asyncio.Event()
        self.bell = Bell()
        self.version = 0

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def begin(self) -> None:
        self.state, self.started = State.RUNNING, time.time()
        self.changed()

    def keep_files(self, run_dir: Path) -> None:
        """Nobody writes to its files any more."""
        self.run_dir = run_dir
        self.has_report = (run_dir / REPORT).is_file()

    def file(self, name: str) -> Path | None:
        """A file of its run's folder, by its path in it; None if there is none."""
        if self.run_dir is None:
            return None
        folder = self.run_dir.resolve()
        # Resolved: neither ".." nor a link that the job has put there leads out of the folder.
        try:
            found = (folder / name).resolve()
        except (OSError, ValueError):
            return None
        return found if found.is_relative_to(folder) and found.is_file() else None

    def end(self, state: State, error: str = "") -> None:
        self.state, self.ended_at, self.error = state, time.time(), printable(error)
        self.changed()

    def changed(self) -> None:
        self.version += 1
        self.bell.ring()

    def take_line(self, rank: int, stream: str, at: float, text: str) -> None:
        """A line that a worker has written."""
        self.output.add(printable(text), rank=rank, stream=stream, time=at)
        self.bell.ring()

    def take(self, event: events.Event) -> None:
        """Something has happened in its group."""
        if isinstance(event, events.WorkerEvent) and _take(self.ranks[event.local_rank], event):
            self.changed()
        if isinstance(event, events.WorkerFailed) and event.root_cause:
            self.culprit = _culprit(event)
            self.changed()
        if text := note(event):
            self.add_note(text, event.time)

    def add_note(self, text: str, at: float | None = None) -> None:
        """Say something among its lines."""
        self.output.add(printable(text), time=time.time() if at is None else at)
        self.bell.ring()

    def as_row(self) -> dict[str, Any]:
        """What the list of jobs shows."""
        return {
            "id": self.id,
            "number": self.number,
            "state": self.state,
            "stopping": self.stop_asked.is_set() and not self.ended,
            "command": self.shown,
            "ranks": self.spec.ranks,
            "created": self.created,
            "started": self.started,
            "ended": self.ended_at,
            "why": self.why,
        }

    @property
    def why(self) -> str:
        """Why it failed, in a line; "" where it has not."""
        if self.culprit is None:
            return self.error
        found = self.culprit
        said = found.message if found.traceback else found.stderr_tail
        last = said.strip().rpartition("\n")[2]
        return printable(f"rank {found.rank}: {found.how}" + (f": {last}" if last else ""), 300)

    def as_dict(self) -> dict[str, Any]:
        """What the page of this job shows, but for its output."""
        return {
            **self.as_row(),
            # Their values may be nobody's business.
            "env": [printable(name) for name in self.spec.env],
            "hang_timeout": self.spec.hang_timeout_s,
            "error": self.error,
            "culprit": asdict(self.culprit) if self.culprit else None,
            "by_rank": [asdict(rank) for rank in self.ranks],
            "has_report": self.has_report,
        }


def _take(rank: Rank, event: events.WorkerEvent) -> bool:
    """Whether the event has changed what is shown of a rank."""
    match event:
        case events.WorkerStarted():
            rank.state, rank.pid = "running", event.pid
        case events.Progress():
            rank.done, rank.total = event.done, event.total
        case events.WorkerExited():
            rank.state = "failed" if event.exitcode else "succeeded"
            rank.how = _how(event.exitcode) if event.exitcode else ""
        case events.WorkerFailed(ended_by_us=True):
            rank.state = "ended"
        case _:
            return False
    return True


def _culprit(event: events.WorkerFailed) -> Culprit:
    return Culprit(
        rank=event.rank,
        how=printable(event.cause or _how(event.exitcode)),
        message=printable(event.message),
        traceback=printable(event.traceback, 16_384),
        stack=printable(event.stack),
        stderr_tail=printable(event.stderr_tail),
    )


def _how(exitcode: int) -> str:
    if exitcode >= 0:
        return f"exit code {exitcode}"
    try:
        return signal.Signals(-exitcode).name
    except ValueError:
        return f"signal {-exitcode}"  # most real-time signals have no name


def note(event: events.Event) -> str:
    """What is said about an event among the lines; "" for what is seen elsewhere."""
    match event:
        case events.WorkerStarted():
            return f"rank {event.rank} started as process {event.pid}"
        case events.WorkerExited(exitcode=0):
            return f"rank {event.rank} succeeded after {event.uptime_s:.1f} s"
        case events.WorkerExited():
            return f"rank {event.rank} ended: {_how(event.exitcode)}, after {event.uptime_s:.1f} s"
        case events.SignalSent() | events.Escalated():
            return f"{event.signal} to {_ranks_text(event.ranks)}"
        case events.StacksDumped():
            return "\n".join(f"rank {rank}: {stack}" for rank, stack in event.stacks.items())
        case events.Warned():
            return f"warning: {event.text}"
    return ""


def _ranks_text(ranks: tuple[int, ...]) -> str:
    if len(ranks) > 8:
        return f"{len(ranks)} ranks"
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
