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
import sys
import termios
import threading
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, TextIO, TypeVar

from asupervise.framing import Framed

T = TypeVar("T")
Parts = Sequence[bytes | memoryview]
Blocks = Generator[T, None, None]

# So much is handed over without a thread at the most, to a pipe that is empty and holds
# `_PIPE_BYTES` or more: what the host itself has printed and not flushed (8 KiB of text and as
# much of bytes, at the most) fits beside it.
_AT_ONCE_BYTES = 16 * 1024
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

    One that has ``async awrite(str)`` as well is waited for where it is slow; what is much at once
    is given to its ``write_as_is`` (bytes, in parts) or, where that returns False, to its
    ``write_waiting(str)``, in a thread.

    Bytes that are not UTF-8 pass unharmed to a descriptor, and as escapes (``\\xff``) to what
    is read as text: ``io.StringIO``, a notebook's stream, pytest's `capsys` (which breaks off the
    whole run where its memory holds anything else).

    Args:
        stream: as ``sys.stdout``; None, as that may be, takes nothing.
        executor: where blocking writes run.
        screen: where it is known that another stream ends in the same place.

    Attributes:
        turn: to be held while writing; see :class:`Screen`.
        blocks: taken by a tailer for as long as it holds a block for this console, so that a
            reader that is slow makes us wait, and not our memory grow.
        broken: why the stream takes nothing any more, or None.
    """

    # People read here: see `Sink`.
    keeps_together = True

    def __init__(
        self, stream: TextIO | None, executor: Executor, screen: Screen | None = None
    ) -> None:
        self._stream: Any = stream
        self._executor = executor
        self._screen = screen or Screen()
        self.turn = self._screen.turn
        self._fd = _descriptor(stream)
        self._empty_pipe_takes = self._fd is not None and _is_large_pipe(self._fd)
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self.blocks = asyncio.Semaphore(_BLOCKS_AHEAD)
        self.broken: Exception | None = None
        if stream is None:
            self.broken = ValueError("there is no such stream")

    @property
    def takes_streams(self) -> bool:
        """Whether :meth:`write_all` is possible, and it is not broken."""
        return self.broken is None and (
            self._fd is not None or hasattr(type(self._stream), "write_waiting")
        )

    async def write(self, owner: object, framed: Framed) -> None:
        """Write what `owner` has framed; `turn` must be held.

        Returns once the stream has taken it: a slow reader slows us here, and nobody else. A
        stream whose reader has gone (EPIPE) takes nothing any more; see :attr:`broken`.
        """
        parts = self._joined(owner, framed)
        if parts:
            await self._unless_broken(self._put(parts))

    @property
    def takes_lines(self) -> bool:
        """Whether :meth:`write_lines` is worth a try: a pipe that nobody is writing to."""
        return self._empty_pipe_takes and self.broken is None and not self.turn.locked()

    def write_lines(self, owner: object, framed: Framed) -> bool:
        """Write a few whole lines at once, all of them or none; False if it would take waiting.

        `turn` must be free.
        """
        before = self._screen.unfinished_by
        parts = self._joined(owner, framed)
        # So much goes into a pipe as one, or not at all (pipe(7)).
        if sum(map(len, parts)) <= select.PIPE_BUF:
            try:
                if self._write_at_once(parts):
                    return True
            except Exception as exc:
                self.broken = exc
        self._screen.unfinished_by = before
        return False

    async def write_all(self, owner: object, framings: Blocks[Framed]) -> None:
        """Write what comes out of an iterator, which runs in the writing thread.

        For much at once: then crossing over from one thread to another, twice for each block,
        takes longer than the work itself.
        """
        blocks = self._all_joined(owner, framings)
        if self._fd is not None:
            await self._unless_broken(self._write_patiently(self._fd, blocks))
        else:
            await self._unless_broken(self._in_thread(self._write_waiting, blocks))

    def _write_waiting(self, blocks: Blocks[Parts]) -> None:
        stream = self._stream
        with closing(blocks):
            for parts in blocks:
                if parts and not stream.write_as_is(parts):
                    stream.write_waiting(self._decoder.decode(b"".join(parts)))

    def _all_joined(self, owner: object, framings: Blocks[Framed]) -> Blocks[Parts]:
        with closing(framings):
            for framed in framings:
                yield self._joined(owner, framed)

    async def _unless_broken(self, writing: Coroutine[Any, Any, None]) -> None:
        if self.broken is not None:
            writing.close()
            return
        try:
            await writing
        except Exception as exc:
            # Its reader has gone (EPIPE), the disk is full, the host has closed it under us
            # (ValueError), or it is an object of the host's that raises what it likes. The
            # workers go on, and the result says what was not shown.
            self.broken = exc
        except asyncio.CancelledError:
            # Whoever comes next must not go on in the middle of what was being written.
            self._screen.unfinished_by = self
            raise

    def _joined(self, owner: object, framed: Framed) -> list[bytes]:
        screen = self._screen
        resumes = screen.unfinished_by is owner
        lead = framed.resumed if resumes else framed.fresh
        if not (lead or framed.rest):
            return []
        if screen.unfinished_by is not None and not resumes:
            lead = b"\n" + lead
        screen.unfinished_by = owner if framed.unfinished else None
        return [lead, *framed.rest]

    async def _put(self, parts: list[bytes]) -> None:
        stream = self._stream
        if self._fd is not None:
            taken = self._write_at_once(parts) if self._empty_pipe_takes else 0
            if left := _without_first(parts, taken):
                await self._write_patiently(self._fd, _one(left))
        elif _has_byte_layer(stream) and _descriptor_below(stream) is not None:
            # Compressed, a socket: something of its own stands between the stream and its file.
            await self._in_thread(_write_to_buffer, stream, b"".join(parts))
        elif (awrite := getattr(type(stream), "awrite", None)) is not None:
            # One that can make us wait: that of a live view.
            await awrite(stream, self._decoder.decode(b"".join(parts)))
        else:
            await self._write_text(self._decoder.decode(b"".join(parts)))

    async def _in_thread(self, call: Callable[..., object], *args: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, call, *args)

    def _write_at_once(self, parts: Parts) -> int:
        """Write as much as a pipe takes without any waiting: a thread would cost 0.1 ms."""
        assert self._fd is not None
        if sum(map(len, parts)) > _AT_ONCE_BYTES or _waiting_bytes(self._fd):
            return 0
        self._stream.flush()
        try:
            # Unlike O_NONBLOCK this flag is not shared with the others that have the pipe open.
            return os.pwritev(self._fd, parts, -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except BrokenPipeError:
            raise
        except OSError:
            # EOPNOTSUPP: Linux knows this for pipes since 6.4.
            self._empty_pipe_takes = False
            return 0

    async def _write_patiently(self, fd: int, blocks: Blocks[Parts]) -> None:
        writing = Writing(self._stream, fd)
        thread = asyncio.get_running_loop().run_in_executor(self._executor, writing.run, blocks)
        try:
            await asyncio.shield(thread)
        except asyncio.CancelledError:
            # A thread that waits for a reader who does not read would outlive us, and keep the
            # interpreter from ending.
            writing.cancel()
            raise

    async def _write_text(self, text: str) -> None:
        # Memory, or an object of the host's own. It is called in this thread, because it may tell
        # by it which cell of a notebook is meant, or not be made for several; where it has a
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


def _waiting_bytes(fd: int) -> int:
    """How much stands in a pipe that its reader has not taken yet."""
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"), sys.byteorder)


class Writing:
    """Writes to a descriptor, in a thread; may be cancelled while nobody reads."""

    def __init__(self, stream: TextIO, fd: int) -> None:
        self._stream = stream
        self._fd = fd
        self._cancelled = os.eventfd(0) if hasattr(os, "eventfd") else -1
        self._closing = threading.Lock()

    def cancel(self) -> None:
        """Let :meth:`run` return as soon as it would have to wait; for another thread."""
        with self._closing:
            if self._cancelled >= 0:
                os.eventfd_write(self._cancelled, 1)

    def _close(self) -> None:
        with self._closing:
            if self._cancelled >= 0:
                os.close(self._cancelled)
            self._cancelled = -1

    def run(self, blocks: Blocks[Parts]) -> None:
        """Write all that comes out of `blocks`."""
        try:
            # What the host has printed comes first. Flushing is safe in another thread; writing
            # *text* there is not: two writers can overwrite each other's pending text (torch's
            # tee loses lines so), which is why our bytes go to the descriptor.
            self._when_writable(self._stream.flush)
            with closing(blocks):
                for parts in blocks:
                    self._write_block(parts)
        except asyncio.CancelledError:
            return
        finally:
            self._close()

    def _write_block(self, parts: Parts) -> None:
        while parts:
            taken = self._when_writable(partial(_write_some, self._fd, parts))
            parts = _without_first(parts, taken)

    def _when_writable(self, call: Callable[[], T]) -> T:
        while True:
            try:
                return call()
            except BlockingIOError:
                # It is full, and non-blocking: by our flag, or somebody has made it so.
                self._wait_writable()

    def _wait_writable(self) -> None:
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        if self._cancelled >= 0:
            poller.register(self._cancelled, select.POLLIN)
        if any(fd == self._cancelled for fd, _ in poller.poll()):
            raise asyncio.CancelledError


def _one(parts: Parts) -> Blocks[Parts]:
    yield parts


def _without_first(parts: Parts, size: int) -> Parts:
    """What is left of `parts` when so many bytes are written."""
    for number, part in enumerate(parts):
        if size < len(part):
            return [memoryview(part)[size:], *parts[number + 1 :]]
        size -= len(part)
    return []


def _write_some(fd: int, parts: Parts) -> int:
    try:
        return os.pwritev(fd, parts, -1, os.RWF_NOWAIT)
    except (BlockingIOError, BrokenPipeError):
        raise
    except (AttributeError, OSError):
        # No such flag for files, terminals, and before Linux 6.4 for pipes.
        return os.writev(fd, parts)


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
