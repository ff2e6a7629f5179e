"""A file that somebody else appends to: reading it without waiting where that can be had."""

from __future__ import annotations

import enum
import io
import os
import stat
from concurrent.futures import Executor
from functools import cache
from typing import Any

# What has only just been written is in memory still: so much of it is read without a thread.
_AT_ONCE_BYTES = 16 * 1024


class GrowingFile:
    """One log file, read from its beginning on while a worker writes it.

    Args:
        path: where it is.
        threads: where blocking reads run.
        fd: the file, where it is open already; from now on it is this object's to close.

    Attributes:
        fd: the open file; negative once it has been closed.
        position: where what is read next begins.

    Raises:
        OSError: if it cannot be opened.
    """

    # Thousands of workers have two each, most of them silent.
    __slots__ = ("_end", "_file", "_flags", "_path", "_raw", "_threads", "fd", "position")

    def __init__(self, path: str, threads: Executor, fd: int | None = None) -> None:
        self._path = path
        self._threads = threads
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if fd is None else fd
        self.position = 0
        # The same as a file object, and as one of aiofiles', once it has been read in a thread.
        self._raw: io.FileIO | None = None
        self._file: Any = None
        self._flags: int | None = getattr(os, "RWF_NOWAIT", None)
        # Where it is over, for us.
        self._end: int | None = None

    def unread(self, ours: os.stat_result | None = None, *, fd: int | None = None) -> int:
        """How much there is to read; negative if the file was truncated. Needs no disk.

        Args:
            ours: what fstat() has said of it; left out, it is asked.
            fd: another descriptor of the same file.
        """
        if ours is None:
            ours = os.fstat(self.fd if fd is None else fd)
        size = ours.st_size
        if self._end is not None and size > self._end:
            size = self._end
        return size - self.position

    def end_here(self) -> os.stat_result:
        """Nothing that is appended from now on is read; returns what fstat() says of it."""
        ours = os.fstat(self.fd)
        self._end = ours.st_size
        return ours

    async def read(self, size: int) -> bytes:
        """The next `size` bytes, or fewer."""
        data = self.read_at_once(size) if size <= _AT_ONCE_BYTES else b""
        if not data:
            data = await self._read_in_thread(size)
        self.position += len(data)
        return data

    async def _read_in_thread(self, size: int) -> bytes:
        if self._raw is None:
            # Imported here: who says little is read without.
            from aiofiles.threadpool import wrap

            self._raw = io.FileIO(self.fd)
            self._file = wrap(self._raw, executor=self._threads)
        self._raw.seek(self.position)
        data: bytes = await self._file.read(size)
        return data

    def read_at_once(self, size: int) -> bytes:
        """What can be had without waiting for a disk: a thread would cost 0.1 ms.

        The position stays where it is.
        """
        if self._flags is None:
            return b""
        buffer = bytearray(size)
        try:
            read = os.preadv(self.fd, (buffer,), self.position, self._flags)
        except BlockingIOError:
            return b""  # not in memory any more
        except OSError:
            # EOPNOTSUPP: this file system cannot tell. One that is nothing but memory need not.
            self._flags = 0 if is_memory(os.fstat(self.fd).st_dev) else None
            return b""
        return bytes(buffer[:read])

    def place(self, ours: os.stat_result) -> Place:
        """What is there now, where it was opened."""
        try:
            there = os.stat(self._path)
        except OSError:
            return Place.EMPTY
        if (there.st_ino, there.st_dev) == (ours.st_ino, ours.st_dev):
            return Place.OURS
        return Place.TAKEN if stat.S_ISREG(there.st_mode) else Place.EMPTY

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if self._raw is not None:
            self._raw.close()
        elif fd >= 0:
            os.close(fd)


class Place(enum.Enum):
    """What is where a file was opened."""

    OURS = enum.auto()
    EMPTY = enum.auto()
    TAKEN = enum.auto()


@cache
def is_memory(device: int) -> bool:
    """Whether it is a tmpfs (proc_pid_mountinfo(5)), as /tmp is on many systems."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo") as file:
            mounts = [line.split() for line in file]
    except OSError:
        return False
    return any(m[2] == number and m[m.index("-") + 1] == "tmpfs" for m in mounts)
