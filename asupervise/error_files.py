"""Reading the error file that a worker has left, without trusting it.

The file that a worker leaves behind (``error.json``) has torch's format::

    {"message": {"message": "ValueError: no such batch",
                 "extraInfo": {"py_callstack": "Traceback ...",
                               "timestamp": "1700000000",
                               "timestamp_ns": "1700000000123456789"}}}

``timestamp_ns`` is our addition: torch stamps in whole seconds, in which two ranks that fail
together cannot be told apart.
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["MAX_ERROR_FILE_BYTES", "ErrorRecord", "join_notes", "read_error_file"]

MAX_ERROR_FILE_BYTES: Final = 1 << 20
"""How much of a worker's error file is read, in bytes."""

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
        note = join_notes(note, "its 'message' is neither text nor a record")
        message = ""
    time_s, slack_s = _time_of_error(data, mtime_s)
    if time_s is None and note and message:
        time_s = mtime_s  # cut off before its stamp: it was being written when the worker ended
    believed = _credible(time_s, slack_s, not_before, not_after)
    if time_s is not None and believed is None:
        note = join_notes(note, "its time of error lies outside the life of the worker: not used")
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
    import json

    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return _salvage(text, join_notes(note, _not_json(text)))
    if not isinstance(data, dict):
        return {}, join_notes(note, f"the error file holds no JSON object: {_excerpt(text)}")
    if _is_deeper_than(_MAX_JSON_DEPTH, data):
        # It would parse, and then break whoever prints, copies or pickles the result.
        return _salvage(text, join_notes(note, "the error file is nested too deeply"))
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
        import json

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


def join_notes(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
