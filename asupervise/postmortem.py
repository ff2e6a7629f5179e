"""From the end of a worker that failed, and what it has left, to its failure."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from asupervise import files
from asupervise._compat import Exit
from asupervise.error_files import join_notes, read_error_file
from asupervise.failures import ProcessFailure, RemoteTraceback
from asupervise.handler import SubprocessHandler
from asupervise.work import Work

__all__ = ["DetailsOf", "WallClock", "failures_of", "fatal_words"]

# faulthandler's words about a program of many threads are long.
_STDERR_TAIL_BYTES = 256 * 1024
_STDERR_TAIL_LINES = 20
# The interpreter's own words about its end: how they begin and which lines follow (faulthandler's
# documentation; CPython's Python/traceback.c). Fewer lines are shown than the report has room for.
_FATAL = "Fatal Python error: "
_FATAL_LINES = 40
_FATAL_LINE = re.compile(
    r"$|Python runtime state: |Current thread|Thread |Extension modules: "
    r"|  (?:File|Binary file|Garbage-collecting|\.\.\.|<)"
)

DetailsOf = Callable[[SubprocessHandler, Exit], dict[str, Any]]


class WallClock(NamedTuple):
    """Turns monotonic times into wall-clock times, by one reading of both clocks.

    All of a group's times come from one such reading: a step of the system's clock cannot change
    the order of its ranks. It is taken when the group has ended, so that a step long before does
    not part our times from those that the workers wrote into their error files.
    """

    wall_ns: int
    monotonic_ns: int

    @classmethod
    def now(cls) -> WallClock:
        return cls(time.time_ns(), time.monotonic_ns())

    def seconds(self, monotonic_ns: int) -> float:
        """The time in seconds since the epoch.

        Example:
            >>> WallClock(wall_ns=1_700_000_000 * 10**9, monotonic_ns=50).seconds(50 - 10**9)
            1699999999.0
        """
        return (self.wall_ns - self.monotonic_ns + monotonic_ns) / 10**9


def failures_of(
    failed: Iterable[SubprocessHandler],
    problems: Mapping[int, str],
    *,
    details_of: DetailsOf,
    work: Work,
) -> dict[int, ProcessFailure]:
    """The failures of workers, by local rank. Reads what they have left: to be called in a thread.

    Args:
        failed: who has failed.
        problems: by local rank, what is wrong with one that ended well.
        details_of: further fields of a worker's failure.
        work: of the workers.
    """
    clock = WallClock.now()
    found = {}
    for handler in failed:
        rank = handler.local_rank
        found[rank] = _failure(handler, clock, details_of, problems.get(rank, ""))
        error = work.exception(rank)
        if isinstance(error, BaseException):
            found[rank] = _with_exception(found[rank], error)
        elif error is not None:
            note = f"the exception object cannot be unpickled here: {error}"
            failure = found[rank]
            found[rank] = dataclasses.replace(failure, note=join_notes(failure.note, note))
    return found


def _failure(
    handler: SubprocessHandler, clock: WallClock, details_of: DetailsOf, problem: str
) -> ProcessFailure:
    """The failure of one worker; `problem` says what is wrong with one that ended well."""
    exit = handler.exit_or_unkillable()
    path = handler.plan.error_file
    started_at, observed_at = clock.seconds(handler.started_ns), clock.seconds(exit.monotonic_ns)
    record = read_error_file(path, not_before=started_at, not_after=observed_at) if path else None
    our_signals, signalled_ns = handler.our_signals(exit)
    details = details_of(handler, exit)
    if problem:
        details |= {"cause": problem, "own": True}
    elif handler.plan.function and exit.code > 0 and record is None and not details["cause"]:
        details["cause"] = (
            f"the function ended its process with exit status {exit.code}, without an exception"
        )
    return ProcessFailure.from_exit(
        local_rank=handler.local_rank,
        pid=handler.pid,
        # One that hung, and took our signal for a reason to end well, has not ended well.
        exitcode=exit.code or (0 if problem else -signal.SIGTERM),
        error_file=path or "",
        record=record,
        observed_at=observed_at,
        observed_monotonic_ns=exit.monotonic_ns,
        our_signals=our_signals,
        signalled_at=None if signalled_ns is None else clock.seconds(signalled_ns),
        stderr_tail=_last_lines(handler.plan.stderr),
        **details,
    )


def _with_exception(failure: ProcessFailure, error: BaseException) -> ProcessFailure:
    # What led to it was left behind with the worker: its traceback, as text, stands for that.
    error.__cause__ = RemoteTraceback(failure.traceback) if failure.traceback else None
    return dataclasses.replace(failure, exception=error)


def _last_lines(path: str | None) -> str:
    if not path or path == os.devnull:
        return ""
    text = files.read_tail(path, _STDERR_TAIL_BYTES)
    return fatal_words(text) or "\n".join(text.splitlines()[-_STDERR_TAIL_LINES:])


def fatal_words(text: str) -> str:
    """What the interpreter said about its end, if a stderr ends with that; "" otherwise.

    With many threads only the one that it died in.
    """
    start = text.rfind(_FATAL)
    lines = text[start:].splitlines() if start >= 0 else []
    if not lines or not all(map(_FATAL_LINE.match, lines[1:])):
        return ""
    if len(lines) <= _FATAL_LINES:
        return "\n".join(lines)
    at = next((n for n, line in enumerate(lines) if line.startswith("Current thread ")), 1)
    return "\n".join([lines[0], "", *lines[at : at + _FATAL_LINES]])
