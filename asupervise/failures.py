"""What is known of a worker that failed, who failed first, and the report that says so.

Everything here is a value, made once the workers have ended. One function does I/O,
`read_error_file`; `root_cause` and `failed_by_itself` decide, and are pure.

The file that a worker leaves behind (``error.json``) has torch's format::

    {"message": {"message": "ValueError: no such batch",
                 "extraInfo": {"py_callstack": "Traceback ...",
                               "timestamp": "1700000000",
                               "timestamp_ns": "1700000000123456789"}}}

``timestamp_ns`` is our addition: torch stamps in whole seconds, in which two ranks that fail
together cannot be told apart.
"""

from __future__ import annotations

import copyreg
import errno
import json
import math
import os
import re
import signal
import stat
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from asupervise.errors import SupervisorError

__all__ = [
    "MAX_ERROR_FILE_BYTES",
    "ChildFailedError",
    "ErrorRecord",
    "ProcessFailure",
    "RunProcsResult",
    "exit_status",
    "failed_by_itself",
    "read_error_file",
    "root_cause",
]

MAX_ERROR_FILE_BYTES: Final = 1 << 20
"""How much of a worker's error file is read, in bytes."""

_NOT_AVAILABLE: Final = "<N/A>"
_NO_TRACEBACK: Final = (
    "No traceback was recorded. Decorate the worker's main function with @record to see it here."
)


# --- reading what a worker wrote -------------------------------------------------------------

_MAX_JSON_DEPTH = 32
_MAX_TIME_S = 32_503_680_000  # the year 3000: a later stamp is not a time in seconds
# File times come from the kernel's coarse clock, which lags by up to a tick (10 ms at HZ=100).
_CLOCK_SLACK_S = 0.02
# torch writes its file right after it takes the stamp; a later mtime says that somebody touched it.
_MTIME_NEAR_STAMP_S = 2.0
_JSON_TEXT = r'"{}"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)'


@dataclass(frozen=True, kw_only=True)
class ErrorRecord:
    """What an error file says, as far as it could be read and believed.

    Attributes:
        data: the parsed file; empty where nothing could be made of it.
        message: the file's ``message``: torch's record (a dict with ``message``, ``extraInfo``
            and possibly ``errorCode``), plain text, or ``""``.
        timestamp: when the error happened, in seconds since the epoch, with its fraction; None
            where the file gives no credible time.
        note: what was wrong with the file, for the user; ``""`` where nothing was.
    """

    data: dict[str, Any] = field(default_factory=dict, hash=False)
    message: str | dict[str, Any] = field(default="", hash=False)
    timestamp: float | None = None
    note: str = ""

    @property
    def traceback(self) -> str:
        """The recorded traceback, or else the message alone; ``""`` where there is neither."""
        if isinstance(self.message, str):
            return self.message
        extra = self.message.get("extraInfo")
        stack = extra.get("py_callstack") if isinstance(extra, dict) else None
        text = stack if isinstance(stack, str) and stack else self.message.get("message")
        return text if isinstance(text, str) else ""


def read_error_file(
    path: str | os.PathLike[str],
    *,
    not_before: float | None = None,
    not_after: float | None = None,
) -> ErrorRecord | None:
    """Read the error file of a worker that has ended, without trusting it.

    Never raises on account of the file, and never waits for it. Does blocking file I/O of at
    most `MAX_ERROR_FILE_BYTES`: an event loop calls it in a thread.

    Args:
        path: the file that the worker was told to write.
        not_before: when the worker was started, in seconds since the epoch.
        not_after: when its exit was observed. A time of error outside these two is not believed.

    Returns:
        None where there is no file; otherwise a record whose ``note`` says what was wrong.

    The time of the error is the file's own ``timestamp_ns``; a whole-second stamp, as torch's
    ``@record`` writes it, is refined by the file's modification time where the two agree.

    Example:
        >>> read_error_file("/nonexistent/error.json") is None
        True
    """
    try:
        raw, mtime_s = _read_regular_file(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        return ErrorRecord(note=f"the error file cannot be read: {_reason(error)}")
    if not raw:
        return ErrorRecord(note="the error file is empty")
    data, note = _parse(raw)
    message = data.get("message", "")
    if not isinstance(message, str | dict):
        note = _join(note, "its 'message' is neither text nor a record")
        message = ""
    time_s, slack_s = _time_of_error(data, mtime_s)
    if time_s is None and note and message:
        time_s = mtime_s  # cut off before its stamp: it was being written when the worker ended
    believed = _credible(time_s, slack_s, not_before, not_after)
    if time_s is not None and believed is None:
        note = _join(note, "its time of error lies outside the life of the worker: not used")
    return ErrorRecord(data=data, message=message, timestamp=believed, note=note)


def _read_regular_file(path: str | os.PathLike[str]) -> tuple[bytes, float]:
    """One byte more than the limit at most, and the file's modification time."""
    # A worker may leave anything in this place. O_NONBLOCK: a FIFO must not hold us up.
    # O_NOFOLLOW: its link must not make a supervisor with more rights print someone else's file.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(path, flags)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        with open(fd, "rb", closefd=False) as file:
            return file.read(MAX_ERROR_FILE_BYTES + 1), status.st_mtime_ns / 10**9
    finally:
        os.close(fd)


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "it is a symbolic link, which is not followed"
    return getattr(error, "strerror", None) or str(error)


def _parse(raw: bytes) -> tuple[dict[str, Any], str]:
    """The file's object, and what was wrong with it."""
    note = ""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("utf-8", "replace")
        note = "the error file is not UTF-8 throughout"
    if len(raw) > MAX_ERROR_FILE_BYTES:
        limit = f"{MAX_ERROR_FILE_BYTES >> 20} MiB"
        return _salvage(text, f"the error file is larger than {limit}: only its start was read")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return _salvage(text, _join(note, _not_json(text)))
    if not isinstance(data, dict):
        return {}, _join(note, f"the error file holds no JSON object: {_excerpt(text)}")
    if _is_deeper_than(_MAX_JSON_DEPTH, data):
        # It would parse, and then break whoever prints, copies or pickles the result.
        return _salvage(text, _join(note, "the error file is nested too deeply"))
    return data, note


def _not_json(text: str) -> str:
    cut_off = text.lstrip().startswith("{") and not text.rstrip().endswith("}")
    what = "truncated" if cut_off else "not JSON"
    return f"the error file is {what}: {_excerpt(text)}"


def _excerpt(text: str, length: int = 80) -> str:
    return f"it starts with {text[:length]!a}"


def _salvage(text: str, note: str) -> tuple[dict[str, Any], str]:
    """Message and traceback from the start of a file that does not parse."""
    message, stack = _find_text(text, "message"), _find_text(text, "py_callstack")
    if not message and not stack:
        return {}, note
    record: dict[str, Any] = {"message": message}
    if stack:
        record["extraInfo"] = {"py_callstack": stack}
    return {"message": record}, note


def _find_text(text: str, key: str) -> str:
    found = re.search(_JSON_TEXT.format(key), text, re.DOTALL)
    if found is None:
        return ""
    try:
        return str(json.loads(f'"{found[1]}"', strict=False))
    except ValueError:
        return found[1]  # cut off within an escape: shown as it stands


def _is_deeper_than(limit: int, value: object) -> bool:
    level = [value]
    for _ in range(limit):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return False
    return True


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _time_of_error(data: dict[str, Any], mtime_s: float) -> tuple[float | None, float]:
    """When the error happened, and by how much it may have been later, both in seconds."""
    message = data.get("message")
    holder = message.get("extraInfo") if isinstance(message, dict) else data
    if not isinstance(holder, dict):
        return None, 0.0
    exact_ns = _integer(holder.get("timestamp_ns"))
    if exact_ns is not None:
        return exact_ns / 10**9, 0.0
    stamp_s = _number(holder.get("timestamp"))
    if stamp_s is None or stamp_s != math.floor(stamp_s):
        return stamp_s, 0.0
    if -_CLOCK_SLACK_S <= mtime_s - stamp_s <= _MTIME_NEAR_STAMP_S:
        # The stamp was rounded down, so the truth lies within its second.
        return min(max(mtime_s, stamp_s), stamp_s + 0.999_999), 0.0
    return stamp_s, 1.0


def _integer(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    try:
        number = int(value)  # a float has no room for nanoseconds since 1970
    except ValueError:
        return None
    return number if abs(number) < _MAX_TIME_S * 10**9 else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _credible(
    time_s: float | None, slack_s: float, not_before: float | None, not_after: float | None
) -> float | None:
    if time_s is None or not 0 < time_s < _MAX_TIME_S:
        return None
    if not_after is not None and time_s > not_after + _CLOCK_SLACK_S:
        return None
    if not_before is not None and time_s < not_before:
        return not_before if time_s + slack_s + _CLOCK_SLACK_S >= not_before else None
    return time_s


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


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

    def __post_init__(self) -> None:
        if self.record is _UNREAD:
            object.__setattr__(self, "record", read_error_file(self.error_file))
        if self.record is None:
            object.__setattr__(self, "error_file", _NOT_AVAILABLE)

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
        return _NO_TRACEBACK

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
            return _NOT_AVAILABLE
        try:
            return signal.Signals(-self.exitcode).name
        except ValueError:
            return _NOT_AVAILABLE  # the real-time signals between the first and last are unnamed

    def timestamp_isoformat(self) -> str:
        """The time of failure in local time, ``YYYY-MM-DD_HH:MM:SS.ffffff``."""
        try:
            return datetime.fromtimestamp(self.timestamp).isoformat("_", "microseconds")
        except (ValueError, OverflowError, OSError):
            return _NOT_AVAILABLE


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
    return _in_order(own)[0] if own else None


def _in_order(failures: Mapping[int, ProcessFailure]) -> list[tuple[int, ProcessFailure]]:
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


# --- the result of a group -------------------------------------------------------------------


@dataclass
class RunProcsResult:
    """How a group of workers on one node ended; every map is by local rank.

    Attributes:
        return_values: what each worker returned; None for a program.
        failures: the workers that did not end with exit status 0; empty after success.
        stdouts: the path of each worker's stdout file, where it was redirected.
        stderrs: the path of each worker's stderr file, where it was redirected.
        log_dir: the folder of this run's files, where it still exists.
        warnings: what went wrong beside the workers, a sentence each.

    Example:
        >>> RunProcsResult(return_values={0: None, 1: None}).is_failed()
        False
    """

    return_values: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, ProcessFailure] = field(default_factory=dict)
    stdouts: dict[int, str] = field(default_factory=dict)
    stderrs: dict[int, str] = field(default_factory=dict)
    log_dir: str | None = field(default=None, kw_only=True)
    warnings: tuple[str, ...] = field(default=(), kw_only=True)

    def is_failed(self) -> bool:
        """Whether any worker failed."""
        return len(self.failures) > 0

    @property
    def root_cause(self) -> tuple[int, ProcessFailure] | None:
        """The local rank that failed first of its own accord; see `root_cause`."""
        return root_cause(self.failures)

    def raise_for_failure(
        self, name: str, *, global_ranks: Mapping[int, int] | None = None
    ) -> None:
        """Raise `ChildFailedError` where any worker failed, and do nothing otherwise.

        Args:
            name: of the program, for the report's title.
            global_ranks: the global rank of each local rank; left out, they are the same.
        """
        if self.failures:
            ranks = global_ranks or {}
            raise ChildFailedError(
                name, {ranks.get(local, local): failure for local, failure in self.failures.items()}
            )


# --- the report ------------------------------------------------------------------------------

_MAX_WIDTH = 60
_MAX_OTHERS = 16
_ROOT_TEXT_CHARS = 16_384
_OTHER_TEXT_CHARS = 4_096
_TAIL_CHARS = 4_096
_ALL_ENDED: Final = "  No rank failed by itself: the supervisor ended them all."
_TERMINAL_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ChildFailedError(SupervisorError):
    """Workers failed. Its text is the report: who failed, who was ended, and the root cause.

    Raised out of a function under ``@record``, the error file of the first failure becomes that
    of this process, so that whoever supervises this process sees the worker's own error.

    Args:
        name: of what was run, for the title.
        failures: by global rank; not empty.

    Raises:
        AssertionError: there are no failures (torch's exception, too).

    Example:
        >>> failure = ProcessFailure(1, 4711, -11, "<N/A>", record=None)
        >>> error = ChildFailedError("train.py", {1: failure})
        >>> error.get_first_failure()[0], "(SIGSEGV)" in str(error)
        (1, True)
    """

    def __init__(self, name: str, failures: Mapping[int, ProcessFailure]) -> None:
        if not failures:
            raise AssertionError("ChildFailedError needs at least one failure")
        self.name = name
        self.failures = dict(failures)
        first = self.get_first_failure()[1]
        super().__init__(self.format_msg(), local_rank=first.local_rank, pid=first.pid)

    def __reduce__(self) -> tuple[Any, ...]:
        # Without calling `__init__`, whose arguments are not `args`: a subclass may have others.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, ranks={sorted(self.failures)})"

    def get_first_failure(self) -> tuple[int, ProcessFailure]:
        """The root cause: global rank and failure.

        Where we ended all of them there is no root cause; then it is the first that ended.
        """
        return root_cause(self.failures) or _in_order(self.failures)[0]

    def format_msg(self, boarder_delim: str = "=", section_delim: str = "-") -> str:
        """The report.

        Args:
            boarder_delim: the character above and below (spelt as torch spells it).
            section_delim: the character between the sections.
        """
        title = f"{_printable(self.name)} FAILED"
        others, root = self._sections()
        width = max(len(line) for part in (title, others, root) for line in part.split("\n"))
        width = min(width, _MAX_WIDTH)
        border, section = boarder_delim * width, section_delim * width
        root = f"Root Cause (first observed failure):\n{root}"
        return "\n".join(
            ["", border, title, section, f"Failures:\n{others}", section, root, border]
        )

    def _sections(self) -> tuple[str, str]:
        own = _in_order({r: f for r, f in self.failures.items() if not f.ended_by_us})
        ended = {r: f for r, f in self.failures.items() if f.ended_by_us}
        blocks = [
            _block(index, rank, failure, _OTHER_TEXT_CHARS)
            for index, (rank, failure) in enumerate(own[1 : _MAX_OTHERS + 1], 1)
        ]
        rest = dict(own[_MAX_OTHERS + 1 :])
        if rest:
            blocks.append(f"Failed later: {_grouped(rest)}")
        others = blocks or ["  <NO_OTHER_FAILURES>"]
        if ended:
            others.append(f"Ended by the supervisor: {_grouped(ended)}")
        if stacks := _stack_groups(self.failures):
            others.append(f"Where they were before they were ended:\n{stacks}")
        root = _block(0, *own[0], _ROOT_TEXT_CHARS, with_stderr=True) if own else _ALL_ENDED
        return "\n".join(others), root


def _block(
    index: int, rank: int, failure: ProcessFailure, limit: int, *, with_stderr: bool = False
) -> str:
    fields = _fields(rank, failure, limit)
    if with_stderr and not failure.traceback and failure.stderr_tail:
        tail = _printable(failure.stderr_tail).rstrip("\n")
        fields.append(("stderr", "last lines:\n" + _cut_head(tail, _TAIL_CHARS)))
    lines = [f"  {label:<10}: {_indented(text)}" for label, text in fields]
    return "\n".join([f"[{index}]:", *lines])


def _fields(rank: int, failure: ProcessFailure, limit: int) -> list[tuple[str, str]]:
    name = failure.signal_name()
    signal_text = f" ({name})" if name != _NOT_AVAILABLE else ""
    record_note = failure.record.note if failure.record is not None else ""
    text = failure.traceback or (failure.message if isinstance(failure.message, str) else "")
    fields = [
        ("time", failure.timestamp_isoformat()),
        ("host", os.uname().nodename),  # not getfqdn(): DNS can hold it up for seconds
        ("rank", f"{rank} (local_rank: {failure.local_rank})"),
        ("exitcode", f"{failure.exitcode} (pid: {failure.pid}){signal_text}"),
        ("cause", _printable(failure.cause)),
        ("memory", _memory_text(failure)),
        ("stack", _printable(failure.stack)),
        ("error_file", _printable(failure.error_file)),
        ("note", _printable(_join(failure.note, record_note))),
        ("traceback", _cut_middle(_printable(text).rstrip("\n"), limit) or _NOT_AVAILABLE),
    ]
    return [(label, text) for label, text in fields if text]


def _memory_text(failure: ProcessFailure) -> str:
    """For a death by SIGKILL alone: otherwise memory is beside the point."""
    known = (("peak", failure.peak_rss_bytes), ("last seen", failure.last_rss_bytes))
    if exit_status(failure.exitcode) != 128 + signal.SIGKILL:
        return ""
    return ", ".join(f"{label} {size / (1 << 20):.1f} MiB" for label, size in known if size)


def _stack_groups(failures: Mapping[int, ProcessFailure]) -> str:
    """``ranks 0-6: in wait (job.py:3)`` for each different stack, the largest group first."""
    groups: dict[str, list[int]] = {}
    for rank, failure in sorted(failures.items()):
        if failure.stack:
            groups.setdefault(failure.stack, []).append(rank)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[1]))
    return "\n".join(f"  {_ranks_text(ranks)}: {_printable(stack)}" for stack, ranks in ordered)


def _grouped(failures: Mapping[int, ProcessFailure]) -> str:
    """``ranks 0, 2-7 (SIGTERM); rank 9 (exit code 1)``."""
    groups: dict[str, list[int]] = {}
    for rank, failure in sorted(failures.items()):
        code = failure.exitcode
        how = failure.signal_name() if code < 0 else f"exit code {code}"
        groups.setdefault(f"signal {-code}" if how == _NOT_AVAILABLE else how, []).append(rank)
    return "; ".join(f"{_ranks_text(ranks)} ({how})" for how, ranks in groups.items())


def _ranks_text(ranks: list[int]) -> str:
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    text = ", ".join("-".join(map(str, run)) for run in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}"


def _printable(text: str) -> str:
    """The text as any terminal or UTF-8 file takes it: no control sequences, no surrogates."""
    text = _TERMINAL_SEQUENCE.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _indented(text: str) -> str:
    return text.replace("\n", "\n  ")


def _cut_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... ({len(text) - 2 * half} characters left out) ...\n{text[-half:]}"


def _cut_head(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"... {text[-limit:]}"
