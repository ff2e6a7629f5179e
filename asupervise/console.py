"""Writing to whatever ``sys.stdout`` is, without ever blocking the event loop.

One :class:`Console` stands for one stream in one event loop, shared by all tailers of all
groups there, so that a line of one is never put into the middle of another's.
"""

from __future__ import annotations

import asyncio
import codecs
import os
import select
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, TextIO

from asupervise.framing import Framed


class Console:
    """A destination of lines: a terminal, a pipe, a file, or any object with ``write(str)``.

    Bytes that are not UTF-8 pass unharmed where the stream has a byte layer, and as escapes
    (``\\xff``) where it takes text alone (a notebook's stream, ``io.StringIO``).

    Args:
        stream: as ``sys.stdout``.
        executor: where blocking writes run.
    """

    def __init__(self, stream: TextIO, executor: Executor) -> None:
        self._stream = stream
        self._executor = executor
        self._turn = asyncio.Lock()
        self._unfinished_by: object | None = None
        self._fd = _descriptor(stream)
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self.broken: OSError | None = None

    @property
    def turn(self) -> asyncio.Lock:
        """Held by whoever writes; a tailer keeps it over the pieces of one very long line."""
        return self._turn

    async def write(self, owner: object, framed: Framed) -> None:
        """Write what `owner` has framed; `turn` must be held.

        Returns once the stream has taken it: a slow reader slows us here, and nobody else. A
        stream whose reader has gone (EPIPE) takes nothing any more; see :attr:`broken`.
        """
        data = self._joined(owner, framed)
        if data and self.broken is None:
            await self._put(data)

    def _joined(self, owner: object, framed: Framed) -> bytes:
        resumes = self._unfinished_by is owner
        lead = framed.resumed if resumes else framed.fresh
        if self._unfinished_by is not None and not resumes:
            if not (lead or framed.rest):
                return b""
            lead = b"\n" + lead
        self._unfinished_by = owner if framed.unfinished else None
        return lead + framed.rest if framed.rest else lead

    async def _put(self, data: bytes) -> None:
        try:
            if self._fd is None:
                self._write_here(data)
            else:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(
                    self._executor, _write_bytes, self._stream, self._fd, data
                )
        except OSError as exc:
            self.broken = exc
        except ValueError as exc:
            # "I/O operation on closed file": the host has closed its stream under us.
            self.broken = OSError(str(exc))

    def _write_here(self, data: bytes) -> None:
        # No descriptor: memory, or a notebook's stream that hands on without blocking. Such
        # streams tell by the calling thread whose cell it is, so it has to be this one.
        stream: Any = self._stream
        buffer = getattr(stream, "buffer", None)
        stream.flush()
        if buffer is not None:
            buffer.write(data)
            buffer.flush()
        else:
            stream.write(self._decoder.decode(data))
            stream.flush()


def _descriptor(stream: Any) -> int | None:
    """The stream's descriptor, if writing bytes there is the same as writing to the stream."""
    try:
        fd: int = stream.fileno()
        os.fstat(fd)
    except (AttributeError, OSError, ValueError):
        return None
    return fd


def _write_bytes(stream: TextIO, fd: int, data: bytes) -> None:
    # What the host has printed comes first. Flushing is safe in another thread; writing *text*
    # there is not: two writers can overwrite each other's pending text (torch's tee loses lines
    # so), which is why our bytes go to the descriptor.
    stream.flush()
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            # Somebody has made the pipe or terminal non-blocking (it is shared with us).
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            poller.poll()


class Consoles:
    """The consoles of one event loop, one for each stream object in use."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._in_use: dict[int, tuple[Console, int, TextIO]] = {}

    @contextmanager
    def shared(self, stream: TextIO) -> Iterator[Console]:
        """The one :class:`Console` of `stream`, for the duration of the context."""
        key = id(stream)
        console, users, _ = self._in_use.get(key) or (Console(stream, self._executor), 0, stream)
        self._in_use[key] = console, users + 1, stream
        try:
            yield console
        finally:
            console, users, _ = self._in_use.pop(key)
            if users > 1:
                self._in_use[key] = console, users - 1, stream
