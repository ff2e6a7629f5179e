"""The terminal that a live view is shown on: found, measured, written to, and given back."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import termios
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from asupervise.views.live.pipes import leads_to
from asupervise.views.live.rows import Size

__all__ = ["Place", "Terminal", "find_terminal"]

_DUMB: Final = ("", "dumb", "unknown")
_DEFAULT_SIZE: Final = Size(80, 24)
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
    """Writes to a terminal, in a thread that :meth:`hurry` calls back.

    Args:
        fd: of the terminal; stays open.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        # Opened anew, so that what is changed there is changed for us alone: one that waits, and
        # one that never does. To wait in the kernel costs half of what waiting for it would: a
        # terminal takes 8 KiB at a time.
        self._patient, self._quick = _opened_anew(fd), _opened_anew(fd)
        if self._patient >= 0:
            os.set_blocking(self._patient, True)
        self._hurried = False
        self._modes: list[Any] | None = None

    def size(self) -> Size:
        """In cells, now."""
        with suppress(OSError):
            packed = fcntl.ioctl(self._fd, termios.TIOCGWINSZ, b"\0" * 8)
            lines, columns, _, _ = struct.unpack("HHHH", packed)
            if lines and columns:
                return Size(columns, lines)
        return _DEFAULT_SIZE

    @property
    def in_foreground(self) -> bool:
        """Whether we may draw on it."""
        return in_foreground(self._fd)

    def mute(self) -> None:
        """What is typed is not shown any more: it would stand in the table."""
        if not in_foreground(self._fd):
            return
        with suppress(OSError, termios.error):
            modes = termios.tcgetattr(self._fd)
            self._modes = self._modes or modes[:]
            modes[_LFLAG] &= ~(termios.ECHO | termios.ECHONL)
            termios.tcsetattr(self._fd, termios.TCSANOW, modes)

    def unmute(self) -> None:
        """As it was before."""
        modes, self._modes = self._modes, None
        # In the background it would stop us, and a shell has set it as it likes by then.
        if modes is not None and in_foreground(self._fd):
            with suppress(OSError, termios.error):
                termios.tcsetattr(self._fd, termios.TCSANOW, modes)

    def write(self, parts: Sequence[bytes]) -> None:
        """Write all of it, waiting where the terminal is slow; for a thread.

        Raises:
            OSError: the terminal is gone.
        """
        left: list[bytes | memoryview] = [part for part in parts if part]
        out = self._fd if self._patient < 0 else self._patient
        while left and not self._hurried:
            try:
                left = _without_first(left, os.writev(out, left))
            except BlockingIOError:
                # It was made so: by `hurry`, or by whoever else has our caller's open.
                if not self._hurried:
                    _wait_writable(out)

    def write_at_once(self, text: str) -> None:
        """Write a little, if that is possible without waiting."""
        if self._quick >= 0:
            with suppress(OSError):
                os.write(self._quick, text.encode())

    def hurry(self) -> None:
        """Whoever writes, or will, is not to wait any more."""
        self._hurried = True
        if self._patient < 0 or not self.in_foreground:
            return
        with suppress(OSError, termios.error):
            os.set_blocking(self._patient, False)
            # Who waits in the kernel looks at that when he is woken, which this does. It also lets
            # go on what was stopped (Ctrl-S).
            termios.tcflow(self._fd, termios.TCOOFF)
            termios.tcflow(self._fd, termios.TCOON)

    def close(self) -> None:
        """Let go of it."""
        self.unmute()
        for fd in (self._patient, self._quick):
            if fd >= 0:
                os.close(fd)


def _opened_anew(fd: int) -> int:
    """The same terminal, never to wait; -1 where that is not possible."""
    try:
        own = os.open(os.ttyname(fd), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return -1  # another mount namespace, no permission
    if _device(own) == _device(fd):
        return own
    os.close(own)
    return -1


def _without_first(parts: list[bytes | memoryview], size: int) -> list[bytes | memoryview]:
    """What is left when so much is written."""
    for number, part in enumerate(parts):
        if size < len(part):
            return [memoryview(part)[size:], *parts[number + 1 :]]
        size -= len(part)
    return []


def _wait_writable(fd: int) -> None:
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    poller.poll()


def flush(streams: Iterable[Any]) -> None:
    """What the host has printed comes first."""
    for stream in streams:
        with suppress(OSError, ValueError):
            stream.flush()
