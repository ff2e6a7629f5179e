"""The terminal that a live view is shown on: found, measured, written to, and given back."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import termios
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Final, NamedTuple

from asupervise.views.live.pipes import leads_to
from asupervise.views.live.rows import Size

__all__ = ["Place", "Terminal", "find_terminal"]

_DUMB: Final = ("", "dumb", "unknown")
_DEFAULT_SIZE: Final = Size(80, 24)
# Where it cannot be had otherwise, so much is written at a time that it takes without waiting.
_AT_ONCE_BYTES: Final = 512
_LFLAG: Final = 3


class Place(NamedTuple):
    """Where a view can be shown.

    Attributes:
        fd: of a terminal; None for nowhere.
        why_not: why it is not shown, in words; "" if it is.
        streams: the names of those in `sys` that end there.
    """

    fd: int | None
    why_not: str = ""
    streams: tuple[str, ...] = ()


def find_terminal(streams: Mapping[str, Any], environ: Mapping[str, str]) -> Place:
    """Where to show a view.

    Args:
        streams: by name, as ``stdout`` and ``stderr``; a terminal behind the first is preferred.
        environ: where ``TERM`` stands.
    """
    fds = {name: fd for name, stream in streams.items() if (fd := _terminal(stream)) is not None}
    if not fds:
        return Place(None, "there is no terminal")
    if environ.get("TERM", "") in _DUMB:
        return Place(None, f"TERM={environ.get('TERM', '')} can show no table")
    fd = next(iter(fds.values()))
    if not in_foreground(fd):
        return Place(None, "it runs in the background")
    others = [_fd(stream) for name, stream in streams.items() if name not in fds]
    if any(leads_to(other, _device(fd)) for other in others if other is not None):
        return Place(None, "a pipe leads to this terminal")
    same = tuple(name for name, other in fds.items() if _device(other) == _device(fd))
    return Place(fd, "", same)


def _terminal(stream: Any) -> int | None:
    fd = _fd(stream)
    return fd if fd is not None and os.isatty(fd) else None


def _fd(stream: Any) -> int | None:
    try:
        fd: int = stream.fileno()
        return fd
    except (AttributeError, OSError, TypeError, ValueError):
        return None


def _device(fd: int) -> int:
    return os.fstat(fd).st_rdev


def in_foreground(fd: int) -> bool:
    """Whether this process may use the terminal as it likes, as far as a shell says so."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return True  # not the terminal that our session has: no shell manages it


class Terminal:
    """Writes to a terminal, in a thread, without being stuck there.

    Args:
        fd: of the terminal; stays open.
    """

    def __init__(self, fd: int) -> None:
        self._given = fd
        self._fd = _own(fd)
        self._cancelled, self._cancelling = os.pipe()
        self._modes: list[Any] | None = None

    def size(self) -> Size:
        """In cells, now."""
        with suppress(OSError):
            packed = fcntl.ioctl(self._given, termios.TIOCGWINSZ, b"\0" * 8)
            lines, columns, _, _ = struct.unpack("HHHH", packed)
            if lines and columns:
                return Size(columns, lines)
        return _DEFAULT_SIZE

    def mute(self) -> None:
        """What is typed is not shown any more: it would stand in the table."""
        if not in_foreground(self._given):
            return
        with suppress(OSError, termios.error):
            modes = termios.tcgetattr(self._given)
            self._modes = self._modes or modes[:]
            modes[_LFLAG] &= ~(termios.ECHO | termios.ECHONL)
            termios.tcsetattr(self._given, termios.TCSADRAIN, modes)

    def unmute(self) -> None:
        """As it was before."""
        modes, self._modes = self._modes, None
        # In the background it would stop us, and a shell has set it as it likes by then.
        if modes is not None and in_foreground(self._given):
            with suppress(OSError, termios.error):
                termios.tcsetattr(self._given, termios.TCSANOW, modes)

    @property
    def in_foreground(self) -> bool:
        return in_foreground(self._given)

    def write(self, text: str) -> None:
        """Write all of it; returns earlier after :meth:`cancel`. For a thread.

        Raises:
            OSError: the terminal is gone.
        """
        data = memoryview(text.encode("utf-8", "surrogateescape"))
        while data and self._is_writable(None):
            with suppress(BlockingIOError):
                data = data[self._write_some(data) :]

    def write_at_once(self, text: str) -> None:
        """Write what it takes without any waiting."""
        with suppress(OSError):
            if self._is_writable(0):
                self._write_some(memoryview(text.encode())[:_AT_ONCE_BYTES])

    def _write_some(self, data: memoryview) -> int:
        return os.write(self._fd, data if self._fd != self._given else data[:_AT_ONCE_BYTES])

    def _is_writable(self, timeout_ms: int | None) -> bool:
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        poller.register(self._cancelled, select.POLLIN)
        ready = dict(poller.poll(timeout_ms))
        return self._fd in ready and (timeout_ms == 0 or self._cancelled not in ready)

    def cancel(self) -> None:
        """Whoever writes, or will, is to return without waiting; for another thread."""
        os.write(self._cancelling, b".")

    def close(self) -> None:
        """Let go of it."""
        self.unmute()
        if self._fd != self._given:
            os.close(self._fd)
        os.close(self._cancelled)
        os.close(self._cancelling)


def _own(fd: int) -> int:
    """The same terminal, opened anew: so it can be made to never wait, for us alone."""
    try:
        own = os.open(os.ttyname(fd), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return fd  # another mount namespace, no permission
    if _device(own) == _device(fd):
        return own
    os.close(own)
    return fd


def flush(streams: Iterable[Any]) -> None:
    """What the host has printed comes first."""
    for stream in streams:
        with suppress(OSError, ValueError):
            stream.flush()
