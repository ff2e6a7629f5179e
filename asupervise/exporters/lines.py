"""Events as lines of JSON, to a file, a pipe or the terminal: ``--events FILE``."""

from __future__ import annotations

import io
import os
import re
import select
import stat
import sys
import threading
from typing import TYPE_CHECKING, Any, Final, Protocol

from asupervise.recording import header, line_of

if TYPE_CHECKING:
    from asupervise.events import Event

__all__ = ["Lines", "lines_to"]

_OURS: Final = re.compile(r"/dev/(?:fd/([0-9]{1,9})|stdout|stderr)|/proc/self/fd/([0-9]{1,9})")
_STANDARD: Final = {"/dev/stdout": 1, "/dev/stderr": 2}
# How long to wait for a thread to see that it is to give up; a look at a flag, and no reader's.
_SEEN_S: Final = 1.0


class Lines:
    """An event handler (see `handle_events`) that writes a header, and then a line an event.

    Args:
        target: where to.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._begun = False

    def handle(self, event: Event) -> None:
        """Write it; waits for a reader that is slow.

        Raises:
            OSError: the disk is full, the reader has gone. What comes later is tried anew.
        """
        if not self._begun:
            self._target.write(f"{header()}\n".encode())
            self._begun = True
        self._target.write(f"{line_of(event)}\n".encode())

    def abandon(self) -> None:
        """Write nothing more; called in another thread."""
        self._target.abandon()

    def close(self) -> None:
        self._target.close()


def lines_to(path: str) -> Lines:
    """A handler that writes lines of JSON to a file.

    What is in the file stays: they are appended, each run with a header of its own. A pipe
    (mkfifo(1), ``>(...)`` of bash) is waited for until somebody reads it.

    Args:
        path: a file; ``-`` for standard error; ``/dev/fd/N``, ``/dev/stdout`` and ``/dev/stderr``
            are the descriptors that we were started with.

    Raises:
        OSError: if it cannot be opened.
    """
    if path == "-":
        return Lines(_to_stream(sys.stderr))
    if ours := _OURS.fullmatch(path):
        number = ours[1] or ours[2]
        # Not opened anew: that would begin at the start of a file, and is not possible for sockets.
        return Lines(_Descriptor(os.dup(_STANDARD[path] if number is None else int(number))))
    if _is_pipe(path):
        return Lines(_Pipe(path))
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY
    return Lines(_Descriptor(os.open(path, flags, 0o600)))


def _is_pipe(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _to_stream(stream: Any) -> Target:
    # Whoever stands in its place (a live view, a notebook) wants to see what is written.
    if type(stream) is not io.TextIOWrapper:
        return _Stream(stream)
    try:
        return _Descriptor(os.dup(stream.fileno()))
    except OSError:
        return _Stream(stream)


# --- where to -------------------------------------------------------------------------------------


class Target(Protocol):
    """Takes whole lines."""

    def write(self, data: bytes) -> None:
        """Raises OSError; returns without having written after `abandon`."""

    def abandon(self) -> None:
        """Let `write` return, and from now on at once; called in another thread."""

    def close(self) -> None: ...


class _Stream:
    """An object with ``write(str)``, such as may stand in the place of ``sys.stderr``."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, data: bytes) -> None:
        if self._stream is not None:
            self._stream.write(data.decode())
            if (flush := getattr(self._stream, "flush", None)) is not None:
                flush()

    def abandon(self) -> None:
        pass  # what it does is its own; it is not waited for any longer

    def close(self) -> None:
        pass


class _Descriptor:
    """An open file, pipe, socket or terminal; others may write to it as well."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._waits = not stat.S_ISREG(os.fstat(fd).st_mode)
        # Whoever waits for a reader is woken by its end.
        self._abandoned, self._abandon = os.pipe()
        self._given_up = False
        self._torn = False

    def write(self, data: bytes) -> None:
        # A line that was broken off stays alone.
        left = memoryview(b"\n" + data if self._torn else data)
        whole = len(left)
        try:
            while left and self._is_ready():
                left = left[self._write_some(left) :]
        finally:
            self._torn = 0 < len(left) < whole or (self._torn and len(left) == whole)

    def _write_some(self, data: memoryview) -> int:
        try:
            # Of a pipe with room at all so much is taken without any waiting (pipe(7)).
            return os.write(self._fd, data[: select.PIPE_BUF] if self._waits else data)
        except BlockingIOError:
            # Somebody else was faster, and has made it non-blocking.
            return 0

    def _is_ready(self) -> bool:
        """Wait until it takes something; False if that is not wanted any more."""
        if self._waits and not self._given_up:
            poller = select.poll()
            poller.register(self._fd, select.POLLOUT)
            poller.register(self._abandoned, select.POLLIN)
            poller.poll()
        return not self._given_up

    def abandon(self) -> None:
        self._given_up = True
        os.write(self._abandon, b"x")

    def close(self) -> None:
        for fd in (self._fd, self._abandoned, self._abandon):
            os.close(fd)


class _Pipe:
    """A pipe by its name, opened as soon as somebody reads it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._opened: _Descriptor | None = None
        self._opening = threading.Lock()
        self._past = threading.Event()
        self._given_up = False

    def write(self, data: bytes) -> None:
        if self._opened is None and not self._given_up:
            try:
                # Waits for a reader.
                fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
            finally:
                self._past.set()
            with self._opening:
                self._opened = _Descriptor(fd)
        if self._opened is not None and not self._given_up:
            self._opened.write(data)

    def abandon(self) -> None:
        self._given_up = True
        with self._opening:
            opened = self._opened
        if opened is not None:
            opened.abandon()
            return
        # Whoever waits for a reader, or is about to, gets one.
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return  # the pipe is gone: nobody can be helped
        try:
            self._past.wait(_SEEN_S)
        finally:
            os.close(fd)

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
