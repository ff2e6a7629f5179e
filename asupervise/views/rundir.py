"""Reading what a run has left in its folder, without trusting any of it.

A file may be missing, cut short, huge, of another version, written to just now, or something else
than a file: what can be said is said, and what cannot is a note. Nothing here is ever written.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Final, get_args, get_origin, get_type_hints

import asupervise
from asupervise import events as ev
from asupervise import procfs
from asupervise.error_files import ErrorRecord, read_error_file
from asupervise.errors import SupervisorError
from asupervise.views.files import STREAMS, read_ends
from asupervise.views.lives import Failure, Life
from asupervise.views.story import Run, told_run

__all__ = [
    "EVENTS_FILE",
    "RunFolderError",
    "find_run",
    "folders_of",
    "is_alive",
    "is_run",
    "read_run",
    "with_folders",
]

EVENTS_FILE: Final = "events.jsonl"
FORMAT: Final = 1
# Of a file of events that is longer the beginning and the end are read.
_HEAD_BYTES: Final = 2 << 20
_TAIL_BYTES: Final = 12 << 20
_HEADER_BYTES: Final = 64 << 10
# attempt_<n>/<local rank>/stdout.log
_DEPTH: Final = 3
_MAX_ERROR_FILES: Final = 64
_MAX_LIVES: Final = 20_000
_LARGEST: Final = 2**53
_YEAR_3000: Final = 32_503_680_000
_TICKS: Final = os.sysconf("SC_CLK_TCK")
# Between the kernel's stamp of a start, in clock ticks, and ours.
_SAME_START_S: Final = 2.0


class RunFolderError(SupervisorError):
    """A folder is missing, is no run's, or is of a later version.

    Attributes:
        hint: what to do.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


# --- which folder -------------------------------------------------------------------------------


def find_run(path: str) -> str:
    """The run's folder at `path`, or around it, or the newest one in it if it is a ``--log-dir``.

    Raises:
        RunFolderError: if there is none.
    """
    path = os.path.abspath(path)
    if is_run(path):
        return path
    if runs := [each.path for each in _folders(path) if is_run(each.path)]:
        return max(runs, key=_began)
    if os.path.exists(path) and (around := _run_around(path)):
        return around
    if not os.path.isdir(path):
        what = "it is no folder" if os.path.exists(path) else "there is no such folder"
        raise RunFolderError(f"{path}: {what}", "a failed run says at its end where its logs are")
    raise RunFolderError(
        f"{path}: no run has left anything here: there is neither {EVENTS_FILE} nor attempt_0",
        "give a run's folder, <log-dir>/<run id>_<random>, or the --log-dir itself",
    )


def _run_around(path: str) -> str:
    """The run in whose folder it lies, as its report and its logs do; "" if in none's."""
    for _ in range(_DEPTH):
        path = os.path.dirname(path)
        if is_run(path):
            return path
    return ""


def is_run(path: str) -> bool:
    """Whether a run has left something in this folder."""
    return os.path.isfile(os.path.join(path, EVENTS_FILE)) or bool(_attempts(path))


def _began(run_dir: str) -> tuple[float, str]:
    """When the run began. Its folder is as new as its last report: that does not tell."""
    try:
        data, _ = read_ends(os.path.join(run_dir, EVENTS_FILE), _HEADER_BYTES, 0)
        for event in _events(data, []):
            return event.time, run_dir
    except OSError:
        pass  # no events, as torchrun leaves it: the first attempt tells
    times = [_mtime(folder) for _, folder in _attempts(run_dir)[:1]]
    return times[0] if times else 0.0, run_dir


def _folders(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _numbered(path: str, prefix: str) -> list[tuple[int, str]]:
    """The folders that are called so, with a number after it."""
    found = []
    for entry in _folders(path):
        number = entry.name.removeprefix(prefix)
        if entry.name == prefix + number and _is_number(number):
            found.append((int(number), entry.path))
    return sorted(found)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 8


def _attempts(path: str) -> list[tuple[int, str]]:
    return _numbered(path, "attempt_")


def _mtime(path: str) -> float:
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return 0.0


# --- the run ------------------------------------------------------------------------------------


def read_run(run_dir: str, told: Sequence[ev.Event] | None = None) -> Run:
    """What is known of a run, from its folder alone.

    Args:
        run_dir: the folder.
        told: the events, all of them, where they are at hand: they are not read again then.

    Raises:
        RunFolderError: for a folder that is missing, or was written by a later version.
    """
    if not os.path.isdir(run_dir):
        raise RunFolderError(f"{run_dir}: there is no such folder")
    notes: list[str] = []
    version = asupervise.__version__
    if told is None:
        told, version = _read_events(run_dir, notes)
    now = time.time()
    run = told_run(told, is_alive=is_alive, now=now)
    lives = with_folders(run, run_dir)
    if len(lives) > _MAX_LIVES:
        notes.append(f"{len(lives):,} starts of workers: the last {_MAX_LIVES:,} are shown")
        lives = lives[-_MAX_LIVES:]
    run = run._replace(
        lives=tuple(lives),
        nprocs=run.nprocs or len({life.local_rank for life in lives}),
        run_dir=run_dir,
        read_at=now,
        version=version,
        notes=tuple(notes),
    )
    if not told:
        return _guessed(run)
    return run if run.state in ("succeeded", "failed") else _blamed(run)


def _read_events(run_dir: str, notes: list[str]) -> tuple[list[ev.Event], str]:
    """The events, and which version wrote them."""
    path = os.path.join(run_dir, EVENTS_FILE)
    try:
        data, left_out = read_ends(path, _HEAD_BYTES, _TAIL_BYTES)
    except FileNotFoundError:
        notes.append(f"there is no {EVENTS_FILE}: what is shown is what the logs and files tell")
        return [], ""
    except OSError as exc:
        notes.append(f"{EVENTS_FILE} cannot be read: {exc.strerror}")
        return [], ""
    header = _parsed(data.partition(b"\n")[0])
    version = _checked_version(path, header)
    if not header:
        notes.append(f"{EVENTS_FILE} does not begin with its header: who wrote it is unknown")
    if left_out:
        notes.append(f"{EVENTS_FILE} is {_mib(left_out + len(data))}: {_mib(left_out)} in its "
                     "middle were not read")  # fmt: skip
    return list(_events(data, notes)), version


def _checked_version(path: str, header: dict[str, Any]) -> str:
    written = header.get("format") if header.get("event") == "header" else None
    version = header.get("version")
    version = version if isinstance(version, str) else ""
    if type(written) is int and written > FORMAT:
        by = f" by asupervise {version}" if version else ""
        raise RunFolderError(
            f"{path}: written{by} in format {written}; this version reads format {FORMAT}",
            "look at it with the version that has written it, or a later one",
        )
    return version


def _events(data: bytes, notes: list[str]) -> Iterator[ev.Event]:
    lines = data.split(b"\n")
    bad = 0
    # What follows the last newline is being written, or was when the writer was killed.
    for number, line in enumerate(lines[:-1]):
        parsed = _parsed(line)
        event = ev.from_dict(parsed)
        if event is not None and _is_plausible(event):
            yield event
        elif line.strip() and parsed.get("event") != "header":
            bad += not (parsed.get("event") and number)
    if lines[-1].strip():
        notes.append(f"the last line of {EVENTS_FILE} is cut short")
    if bad:
        notes.append(f"{bad:,} line{'s' if bad > 1 else ''} of {EVENTS_FILE} could not be read")


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(line.decode())
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _is_plausible(event: ev.Event) -> bool:
    """Whether its numbers are of a size with which one can reckon."""
    if not (0 <= event.monotonic_ns < 1 << 62 and 0 <= event.time < _YEAR_3000 and
            0 <= event.attempt < 1 << 31):  # fmt: skip
        return False
    if isinstance(event, ev.WorkerEvent) and not (
        0 <= event.local_rank < 1 << 24 and 0 <= event.rank < 1 << 31 and 0 <= event.pid < 1 << 31
    ):
        return False
    own = vars(event)
    for name in _numbers(type(event)):
        value = own[name]
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None and not -_LARGEST <= each <= _LARGEST:
                return False
    return True


_known_numbers: dict[type[ev.Event], tuple[str, ...]] = {}


def _numbers(kind: type[ev.Event]) -> tuple[str, ...]:
    """The names of its own fields that are numbers."""
    if kind not in _known_numbers:
        base = {each.name for each in fields(ev.WorkerEvent)}
        _known_numbers[kind] = tuple(
            name
            for name, hint in get_type_hints(kind).items()
            if name not in base
            and get_origin(hint) is not Mapping
            and {int, float} & {hint, *get_args(hint)}
        )
    return _known_numbers[kind]


def is_alive(started: ev.WorkerStarted) -> bool:
    """Whether that very process runs, here and now."""
    if started.node != os.uname().nodename or (entry := procfs.read_entry(started.pid)) is None:
        return False
    # Both count from the start of the system, but for the time that it slept.
    return entry.alive and (
        abs(entry.start_ticks / _TICKS - started.monotonic_ns / 10**9) < _SAME_START_S
        or abs(time.time() - started.time - _age_s(entry)) < _SAME_START_S
    )


def _age_s(entry: procfs.ProcessEntry) -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) - entry.start_ticks / _TICKS


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB"


# --- what the folders tell beside ---------------------------------------------------------------


def folders_of(run_dir: str) -> list[str]:
    """The folders of attempts, and of the workers in them."""
    attempts = [folder for _, folder in _attempts(run_dir)]
    return [*attempts, *(inner for folder in attempts for _, inner in _numbered(folder, ""))]


def with_folders(run: Run, run_dir: str) -> list[Life]:
    """The workers' starts, those included of which only a folder tells; with their files."""
    known = {(life.attempt, life.local_rank): life for life in run.lives}
    for attempt, folder in _attempts(run_dir):
        for local_rank, inner in _numbered(folder, ""):
            life = known.get((attempt, local_rank)) or Life(attempt, local_rank, local_rank)
            known[attempt, local_rank] = _with_files(life, os.path.relpath(inner, run_dir), inner)
    return [known[key] for key in sorted(known)]


def _with_files(life: Life, relative: str, folder: str) -> Life:
    files: dict[str, Any] = {
        stream: f"{relative}/{stream}.log"
        for stream in STREAMS
        if not getattr(life, stream) and os.path.lexists(os.path.join(folder, f"{stream}.log"))
    }
    return life._replace(**files) if files else life


def _guessed(run: Run) -> Run:
    """Without events: what error files say. torchrun leaves such folders."""
    run = _blamed(run)
    times = [_mtime(os.path.join(run.run_dir, folder)) for folder in ("attempt_0", "")]
    began = next((found for found in times if found), None)
    title = os.path.basename(run.run_dir)
    return run._replace(title=title, began_at=began, state="failed" if run.culprit else "unknown")


def _blamed(run: Run) -> Run:
    """With what the error files say of workers whose end nobody has told."""
    lives, read = list(run.lives), 0
    for index, life in enumerate(lives):
        if life.failure is None and life.exitcode != 0 and read < _MAX_ERROR_FILES:
            path = os.path.join(run.run_dir, f"attempt_{life.attempt}", str(life.local_rank))
            record = read_error_file(os.path.join(path, "error.json"))
            if record is not None:
                read += 1
                lives[index] = life._replace(failure=_recorded(record))
    last = max((life.attempt for life in lives), default=0)
    own = [life for life in lives if life.attempt == last and life.outcome == "failed"]
    own.sort(key=lambda life: (life.failure and life.failure.at) or float("inf"))
    return run._replace(lives=tuple(lives), culprit=own[0] if own else None)


def _recorded(record: ErrorRecord) -> Failure:
    message = record.message
    if isinstance(message, dict):
        text = message.get("message")
        message = text if isinstance(text, str) else ""
    return Failure(message=message or record.note, traceback=record.traceback, at=record.timestamp)
