"""Files that workers have written, read without trusting what is in their place."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import Final, NamedTuple

from asupervise.views.lives import Life
from asupervise.views.story import Run

__all__ = ["STREAMS", "LogFile", "log_files", "open_regular", "pread", "read_ends", "tail"]

STREAMS: Final = ("stdout", "stderr")


class LogFile(NamedTuple):
    """A file that a worker has written.

    Attributes:
        life: which start of which worker.
        stream: ``"stdout"`` or ``"stderr"``.
        path: where it is.
        relative: to the run's folder.
        size: in bytes.
        mtime: when it was written to last.
    """

    life: Life
    stream: str
    path: str
    relative: str
    size: int
    mtime: float


def log_files(run: Run) -> Iterator[LogFile]:
    """The log files that are there, in the order of attempts, ranks and streams."""
    for life in run.lives:
        for stream in STREAMS:
            relative = getattr(life, stream)
            path = os.path.join(run.run_dir, relative)
            status = _status(path) if relative else None
            if status is not None:
                yield LogFile(life, stream, path, relative, status.st_size, status.st_mtime)


def _status(path: str) -> os.stat_result | None:
    try:
        status = os.lstat(path)
    except (OSError, ValueError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def open_regular(path: str) -> int:
    """A descriptor of a regular file, to read it.

    Raises:
        OSError: it cannot be opened, or is something else: a worker may leave anything.
    """
    # Neither may a FIFO hold us up, nor a link show somebody else's file.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except ValueError as exc:  # a zero byte in its name
        raise OSError(errno.EINVAL, str(exc), path) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return fd


def read_ends(path: str, head: int, end: int) -> tuple[bytes, int]:
    """The file, or whole lines of its beginning and its end; and how much is left out.

    Raises:
        OSError: if it cannot be read.
    """
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size <= head + end:
            return pread(fd, size, 0), 0
        first = pread(fd, head, 0)
        first = first[: first.rfind(b"\n") + 1]
        last = pread(fd, end, size - end) if end else b""
        last = last[last.find(b"\n") + 1 :]
        return first + last, size - len(first) - len(last)
    finally:
        os.close(fd)


def pread(fd: int, size: int, start: int) -> bytes:
    parts: list[bytes] = []
    while size > 0 and (part := os.pread(fd, size, start)):
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return b"".join(parts)


def tail(path: str, limit: int) -> bytes:
    """Whole lines of the end of a file; "" if it cannot be read."""
    try:
        fd = open_regular(path)
    except OSError:
        return b""
    try:
        size = os.fstat(fd).st_size
        data = pread(fd, min(size, limit), max(0, size - limit))
    except OSError:
        return b""
    finally:
        os.close(fd)
    if size <= limit:
        return data
    # A line that is longer than all that is shown is shown in part.
    return data[data.find(b"\n") + 1 :] if b"\n" in data[:-1] else data
