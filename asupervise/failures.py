"""What is known of a worker that failed, and who failed first.

Everything here is a value, made once the workers have ended; `root_cause` and `failed_by_itself`
decide, and are pure.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from asupervise.error_files import ErrorRecord, read_error_file

__all__ = [
    "NOT_AVAILABLE",
    "ProcessFailure",
    "exit_status",
    "failed_by_itself",
    "in_order",
    "root_cause",
]

NOT_AVAILABLE: Final = "<N/A>"
# What to do about it depends on the worker: `hints` says that.
_NO_TRACEBACK: Final = "No traceback was recorded."


# --- one failure -----------------------------------------------------------------------------

_UNREAD: Final = ErrorRecord(note="not read")


@dataclass(frozen=True)
class ProcessFailure:
    """One worker that did not end with exit status 0.

    The first four arguments are torch's. Given those alone, as a program that was written for
    torch does, the error file is read here and now: the result is then complete, can be compared
    and pickled, and does not change when the log folder is removed later, as one that read on
    first use would. The reading is bounded and never raises. Whoever must not do I/O here, such
    as our own supervisor, reads with `read_error_file` where that may block and passes ``record``;
    then nothing is read.

    Args:
        local_rank: the worker's rank on its node.
        pid: its process id.
        exitcode: its exit status, or minus the number of the signal that it died of.
        error_file: the path of its error file; ``"<N/A>"`` where it left none.
        record: what that file says; None where there is none. Left out: read from ``error_file``.
        ended_by_us: we ended it, so it is listed but never the root cause.
        observed_at: when its exit was observed, in seconds since the epoch.
        observed_monotonic_ns: the same on the monotonic clock, for the order of observation.
        stderr_tail: the last lines of its stderr, where that went into a file.
        note: anything else that the user should know, in a sentence.
        cause: why it died, where its exit code does not say it: a hang, the OOM killer, a
            SIGKILL from outside, a core dump.
        peak_rss_bytes: the most resident memory that it ever had, or None if unknown.
        last_rss_bytes: its resident memory when last sampled, or None.
        stack: where it was before it was ended, in a line; "" if nobody looked.
        exception: what a function worker raised, as an object, where it could be pickled; its
            ``__cause__`` shows the worker's own traceback.
        host: the node that it ran on; "" for this one.

    Example:
        >>> failure = ProcessFailure(3, 4711, -9, "<N/A>", record=None)
        >>> failure.signal_name(), failure.message
        ('SIGKILL', 'Signal 9 (SIGKILL) ended PID 4711')
    """

    local_rank: int
    pid: int
    exitcode: int
    error_file: str
    record: ErrorRecord | None = field(default=_UNREAD, kw_only=True, repr=False, hash=False)
    ended_by_us: bool = field(default=False, kw_only=True)
    observed_at: float = field(default_factory=time.time, kw_only=True)
    observed_monotonic_ns: int | None = field(default=None, kw_only=True)
    stderr_tail: str = field(default="", kw_only=True, repr=False)
    note: str = field(default="", kw_only=True)
    cause: str = field(default="", kw_only=True)
    peak_rss_bytes: int | None = field(default=None, kw_only=True)
    last_rss_bytes: int | None = field(default=None, kw_only=True)
    stack: str = field(default="", kw_only=True, repr=False)
    exception: BaseException | None = field(
        default=None, kw_only=True, repr=False, compare=False, hash=False
    )
    host: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if self.record is _UNREAD:
            object.__setattr__(self, "record", read_error_file(self.error_file))
        if self.record is None:
            object.__setattr__(self, "error_file", NOT_AVAILABLE)

    @classmethod
    def from_exit(
        cls,
        *,
        local_rank: int,
        pid: int,
        exitcode: int,
        error_file: str,
        record: ErrorRecord | None,
        observed_at: float,
        observed_monotonic_ns: int | None = None,
        our_signals: Collection[int] = (),
        signalled_at: float | None = None,
        own: bool | None = None,
        **details: Any,
    ) -> ProcessFailure:
        """Make a failure from an observed exit, and decide whether we were the cause of it.

        Args:
            our_signals: the signals that we sent before the exit was observed.
            signalled_at: when we sent the first of them, in seconds since the epoch; None where
                the worker was already dead by then, or was sent none.
            own: whether it failed by itself, where that is known by other means (a hang).
            details: further fields of the class.

        The other arguments are those of the class. Does no I/O.
        """
        if own is None:
            own = failed_by_itself(
                exitcode,
                our_signals=our_signals,
                signalled_at=signalled_at,
                error_time=record.timestamp if record is not None else None,
            )
        return cls(
            local_rank,
            pid,
            exitcode,
            error_file,
            record=record,
            ended_by_us=not own,
            observed_at=observed_at,
            observed_monotonic_ns=observed_monotonic_ns,
            **details,
        )

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        from asupervise.views.notebook import failure_html

        return failure_html(self)

    @property
    def error_file_data(self) -> dict[str, Any]:
        """The contents of the error file, or what torch has in their place where there is none."""
        if self.record is not None and self.record.data:
            return self.record.data
        data: dict[str, Any] = {"message": "<NONE>"}
        if self.exitcode >= 0:
            data["errorTraits"] = {"category": "system_terminated_error", "retryability": "False"}
        return data

    @property
    def message(self) -> str | dict[str, Any]:
        """The recorded error (torch's dict, or text), or a sentence made from the exit code."""
        if self.record is not None and self.record.message:
            return self.record.message
        if self.exitcode < 0:
            return f"Signal {-self.exitcode} ({self.signal_name()}) ended PID {self.pid}"
        return self.cause or _NO_TRACEBACK

    @property
    def why(self) -> str:
        """What it failed of, in a line: the recorded exception, the cause, its last words on
        stderr, or its signal or exit code; printable anywhere.

        Example:
            >>> ProcessFailure(0, 4711, 3, "<N/A>", record=None).why
            'exit code 3'
        """
        from asupervise.hints import what_failed
        from asupervise.views.plain import one_line

        message, name = self.message, self.signal_name()
        text = message if isinstance(message, str) else message.get("message")
        said = what_failed(
            self.exitcode,
            cause=self.cause,
            signal=name if name != NOT_AVAILABLE else "",
            message=text if isinstance(text, str) else "",
            traceback=self.traceback,
            stderr_tail=self.stderr_tail,
        )
        return one_line(said) or f"exit code {self.exitcode}"

    @property
    def timestamp(self) -> float:
        """When it failed, in seconds since the epoch: by its own record, or its observed exit."""
        if self.record is not None and self.record.timestamp is not None:
            return self.record.timestamp
        return self.observed_at

    @property
    def traceback(self) -> str:
        """The recorded traceback or message; ``""`` where the worker recorded nothing."""
        return self.record.traceback if self.record is not None else ""

    def signal_name(self) -> str:
        """The name of the signal that it died of; ``"<N/A>"`` where it died of none."""
        if self.exitcode >= 0:
            return NOT_AVAILABLE
        try:
            return signal.Signals(-self.exitcode).name
        except ValueError:
            return NOT_AVAILABLE  # the real-time signals between the first and last are unnamed

    def timestamp_isoformat(self) -> str:
        """The time of failure in local time, ``YYYY-MM-DD_HH:MM:SS.ffffff``."""
        try:
            from datetime import datetime

            return datetime.fromtimestamp(self.timestamp).isoformat("_", "microseconds")
        except (ValueError, OverflowError, OSError):
            return NOT_AVAILABLE


class RemoteTraceback(Exception):
    """Stands for the traceback of an exception that another process raised."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def failed_by_itself(
    exitcode: int,
    *,
    our_signals: Collection[int] = (),
    signalled_at: float | None = None,
    error_time: float | None = None,
) -> bool:
    """Tell a worker that failed of its own accord from one that we ended.

    Args:
        exitcode: exit status, or minus the signal.
        our_signals: the signals that we sent it before its exit was observed.
        signalled_at: when the first of them was sent, in seconds since the epoch; None where its
            exit had been observed before, or none was sent.
        error_time: the credible time of its error record, or None.

    Whatever a worker exits with once we have told it to end is taken as its answer to that: the
    signal itself, 128 plus the signal, or any status from a handler or a crash during teardown.
    There are two exceptions: its record shows that it had failed before; and it died of a SIGKILL
    that we did not send, which no handler can answer with (the OOM killer, most often).

    Example:
        >>> failed_by_itself(-15, our_signals={15}, signalled_at=100.0)
        False
        >>> failed_by_itself(1, our_signals={15}, signalled_at=100.0, error_time=99.95)
        True
    """
    if exitcode == 0:
        return False
    if signalled_at is None or not our_signals:
        return True
    if error_time is not None and error_time < signalled_at:
        return True
    return exit_status(exitcode) == 128 + signal.SIGKILL and signal.SIGKILL not in our_signals


def root_cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure] | None:
    """The rank that failed first of its own accord, and its failure.

    The earliest `ProcessFailure.timestamp` wins; of equal ones the exit that was observed first,
    then the lower rank. Wall-clock time leads, since only it compares with the stamp in an error
    file, and between nodes.

    Args:
        failures: by rank, local or global.

    Returns:
        None where no rank failed by itself: there are no failures, or we ended them all.

    Example:
        >>> first = ProcessFailure(1, 11, 1, "", record=None, observed_at=10.25)
        >>> later = ProcessFailure(0, 10, 1, "", record=None, observed_at=10.30)
        >>> rank, _ = root_cause({0: later, 1: first})
        >>> rank
        1
    """
    own = {rank: failure for rank, failure in failures.items() if not failure.ended_by_us}
    return in_order(own)[0] if own else None


def in_order(failures: Mapping[int, ProcessFailure]) -> list[tuple[int, ProcessFailure]]:
    """Ranks and failures, the first to fail first; see `root_cause`."""
    return sorted(failures.items(), key=_order)


def _order(item: tuple[int, ProcessFailure]) -> tuple[float, float, int]:
    rank, failure = item
    observed = failure.observed_monotonic_ns
    return failure.timestamp, math.inf if observed is None else observed, rank


def exit_status(exitcode: int) -> int:
    """The status to exit with for a worker's exit code: 128+N for a death by signal N.

    Example:
        >>> exit_status(3), exit_status(-15)
        (3, 143)
    """
    return 128 - exitcode if exitcode < 0 else exitcode
