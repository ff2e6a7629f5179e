"""Writing to whatever ``sys.stdout`` is, without ever blocking the event loop.

One :class:`Console` stands for one stream in one event loop, shared by all tailers of all
groups there, so that a line of one is never put into the middle of another's. Streams that end
in the same place (``2>&1``) share a :class:`Screen`, for the same reason.
"""

from __future__ import annotations

import asyncio
import codecs
import fcntl
import io
import os
import select
import stat
import struct
import termios
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from typing import Any, TextIO, TypeVar

from asupervise.framing import Framed

T = TypeVar("T")

# A pipe is written in the event loop, without ever waiting in it, if it holds so much: then what
# the host has printed and not flushed (8 KiB of text and as much of bytes, at the most) fits.
_PIPE_BYTES = 64 * 1024
# How many tailers may have a block in their hands that the console has not taken yet: enough
# to read one while another is written, however many tailers there are.
_BLOCKS_AHEAD = 4


class Screen:
    """A place that one or several streams write to: a terminal, a pipe, a file.

    Attributes:
        turn: held by whoever writes; a tailer keeps it over the pieces of one very long line.
        unfinished_by: whose line stands there without its end.
    """

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.unfinished_by: object | None = None


class Console:
    """A destination of lines: a terminal, a pipe, a file, or any object with ``write(str)``.

    Bytes that are not UTF-8 pass unharmed where the stream has a byte layer, and as escapes
    (``\\xff``) where it takes text alone (a notebook's stream, ``io.StringIO``).

    Args:
        stream: as ``sys.stdout``; None, as that may be, takes nothing.
        executor: where blocking writes run.
        screen: where it is known that another stream ends in the same place.

    Attributes:
        blocks: taken by a tailer for as long as it holds a block for this console, so that a
            reader that is slow makes us wait, and not our memory grow.
        broken: why the stream takes nothing any more, or None.
    """

    def __init__(
        self, stream: TextIO | None, executor: Executor, screen: Screen | None = None
    ) -> None:
        self._stream: Any = stream
        self._executor = executor
        self._screen = screen or Screen()
        self._fd = _descriptor(stream)
        self._takes_what_fits = self._fd is not None and _is_large_pipe(self._fd)
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self.blocks = asyncio.Semaphore(_BLOCKS_AHEAD)
        self.broken: Exception | None = None
        if stream is None:
            self.broken = ValueError("there is no such stream")

    @property
    def turn(self) -> asyncio.Lock:
        """To be held while writing; see :class:`Screen`."""
        return self._screen.turn

    async def write(self, owner: object, framed: Framed) -> None:
        """Write what `owner` has framed; `turn` must be held.

        Returns once the stream has taken it: a slow reader slows us here, and nobody else. A
        stream whose reader has gone (EPIPE) takes nothing any more; see :attr:`broken`.
        """
        data = self._joined(owner, framed)
        if not data or self.broken is not None:
            return
        try:
            await self._put(data)
        except Exception as exc:
            # Its reader has gone (EPIPE), the disk is full, the host has closed it under us
            # (ValueError), or it is an object of the host's that raises what it likes. The
            # workers go on, and the result says what was not shown.
            self.broken = exc
        except asyncio.CancelledError:
            # Whoever comes next must not go on in the middle of what was being written.
            self._screen.unfinished_by = self
            raise

    def _joined(self, owner: object, framed: Framed) -> bytes:
        screen = self._screen
        resumes = screen.unfinished_by is owner
        lead = framed.resumed if resumes else framed.fresh
        if not (lead or framed.rest):
            return b""
        if screen.unfinished_by is not None and not resumes:
            lead = b"\n" + lead
        screen.unfinished_by = owner if framed.unfinished else None
        return lead + framed.rest if framed.rest else lead

    async def _put(self, data: bytes) -> None:
        stream, fd = self._stream, self._fd
        if fd is not None:
            left = memoryview(data)
            if self._takes_what_fits:
                left = await self._write_what_fits(fd, left)
            if left:
                await self._in_thread(_write_to_descriptor, stream, fd, left)
        elif not _has_byte_layer(stream):
            await self._write_text(self._decoder.decode(data))
        elif _descriptor_below(stream) is None:
            _write_to_buffer(stream, data)
        else:
            # Compressed, a socket: something of its own stands between the stream and its file.
            await self._in_thread(_write_to_buffer, stream, data)

    async def _in_thread(self, call: Callable[..., object], *args: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, call, *args)

    async def _write_what_fits(self, fd: int, data: memoryview) -> memoryview:
        """Write to a pipe whenever there is room; returns what has to go another way.

        A thread costs 0.1 ms for each line, and would be stuck as long as nobody reads.
        """
        if self._stream.closed:
            raise ValueError("closed by its owner")
        if not _waiting_bytes(fd):
            # What the host has printed comes first, where that takes no waiting.
            self._stream.flush()
        while data:
            try:
                # Unlike O_NONBLOCK this flag is not shared with others that have the pipe.
                data = data[os.pwritev(fd, (data,), -1, os.RWF_NOWAIT) :]
            except BlockingIOError:
                await _wait_for_room(fd)
            except BrokenPipeError:
                raise
            except OSError:
                # EOPNOTSUPP: Linux knows this for pipes since 6.4.
                self._takes_what_fits = False
                break
        return data

    async def _write_text(self, text: str) -> None:
        # An object of the host's own. It is called in this thread, because it may tell by it
        # which cell of a notebook is meant, or not be made for several; where it has a
        # descriptor it is asked for no more than that takes without waiting.
        fd = _descriptor_below(self._stream)
        size = len(text) if fd is None else select.PIPE_BUF // 4
        for start in range(0, len(text), size):
            if fd is not None:
                await self._in_thread(_wait_writable, fd)
            _write_characters(self._stream, text[start : start + size])


def _has_byte_layer(stream: Any) -> bool:
    """Whether writing bytes to its buffer is the same as writing text to the stream."""
    # One that has its own `write` wants to see what is written (pytest's ``tee-sys``).
    return isinstance(stream, io.TextIOWrapper) and type(stream).write is io.TextIOWrapper.write


def _descriptor(stream: Any) -> int | None:
    """The stream's descriptor, if writing bytes there is the same as writing to the stream."""
    if not _has_byte_layer(stream):
        return None
    buffer = stream.buffer
    return _descriptor_below(stream) if isinstance(_raw(buffer), io.FileIO) else None


def _raw(buffer: Any) -> Any:
    return buffer.raw if isinstance(buffer, io.BufferedWriter) else buffer


def _descriptor_below(stream: Any) -> int | None:
    """The descriptor that the stream says it has."""
    try:
        fd: int = stream.fileno()
        os.fstat(fd)
    except (AttributeError, OSError, TypeError, ValueError):
        return None
    return fd


def _is_large_pipe(fd: int) -> bool:
    if not hasattr(os, "RWF_NOWAIT") or not stat.S_ISFIFO(os.fstat(fd).st_mode):
        return False
    try:
        return fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) >= _PIPE_BYTES
    except (AttributeError, OSError):
        return False


async def _wait_for_room(fd: int) -> None:
    loop = asyncio.get_running_loop()
    room = loop.create_future()
    # The host may have its own transport on the descriptor, and may put another file there.
    same = os.dup(fd)
    loop.add_writer(same, lambda: room.done() or room.set_result(None))
    try:
        await room
    finally:
        loop.remove_writer(same)
        os.close(same)


def _waiting_bytes(fd: int) -> int:
    """How much stands in a pipe that its reader has not taken yet."""
    (waiting,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))
    return int(waiting)


def _write_to_descriptor(stream: TextIO, fd: int, data: memoryview) -> None:
    # What the host has printed comes first. Flushing is safe in another thread; writing *text*
    # there is not: two writers can overwrite each other's pending text (torch's tee loses lines
    # so), which is why our bytes go to the descriptor.
    _patiently(fd, stream.flush)
    while data:
        data = data[_patiently(fd, partial(os.write, fd, data)) :]


def _patiently(fd: int, call: Callable[[], T]) -> T:
    while True:
        try:
            return call()
        except BlockingIOError:
            # Somebody has made the pipe or terminal non-blocking (it is shared with us).
            _wait_writable(fd)


def _wait_writable(fd: int) -> None:
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    poller.poll()


def _write_to_buffer(stream: TextIO, data: bytes) -> None:
    stream.flush()
    stream.buffer.write(data)
    stream.buffer.flush()


def _write_characters(stream: Any, text: str) -> None:
    try:
        stream.write(text)
    except UnicodeEncodeError:
        stream.write(text.encode("ascii", "backslashreplace").decode())
    # Not every object that is put into `sys.stdout` has it.
    if (flush := getattr(stream, "flush", None)) is not None:
        flush()


class Consoles:
    """The consoles of one event loop, one for each stream object in use."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._in_use: dict[int, tuple[Console, int, TextIO | None]] = {}
        self._screens: dict[object, tuple[Screen, int]] = {}

    @contextmanager
    def shared(self, stream: TextIO | None) -> Iterator[Console]:
        """The one :class:`Console` of `stream`, for the duration of the context."""
        with self._screen_of(stream) as screen:
            key = id(stream)
            console, users, _ = self._in_use.get(key) or (
                Console(stream, self._executor, screen), 0, stream,
            )  # fmt: skip
            self._in_use[key] = console, users + 1, stream
            try:
                yield console
            finally:
                console, users, _ = self._in_use.pop(key)
                if users > 1:
                    self._in_use[key] = console, users - 1, stream

    @contextmanager
    def _screen_of(self, stream: TextIO | None) -> Iterator[Screen]:
        fd = _descriptor(stream)
        if fd is None:
            place: object = id(stream)
        else:
            status = os.fstat(fd)
            place = status.st_dev, status.st_ino
        screen, users = self._screens.get(place) or (Screen(), 0)
        self._screens[place] = screen, users + 1
        try:
            yield screen
        finally:
            screen, users = self._screens.pop(place)
            if users > 1:
                self._screens[place] = screen, users - 1
