"""Orphans of the group become our children instead of init's (prctl(2), Linux only).

For programs that own their process. Only children that nobody here has started are reaped, so
that no exit is taken away from asyncio; a host that starts children in other ways as well must
not use this.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from asupervise import procfs

_PR_SET_CHILD_SUBREAPER: Final = 36
# Exits come in crowds: one look for all of them.
_REAP_DELAY_S: Final = 0.05


class Subreaper:
    """Reaps adopted orphans as they die; made by :func:`subreaping`."""

    def __init__(self, is_stranger: Callable[[int], bool]) -> None:
        self._is_stranger = is_stranger
        self._timer: asyncio.TimerHandle | None = None

    def on_child_signal(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_REAP_DELAY_S, self.reap)

    def reap(self) -> None:
        """Reap every adopted orphan that has ended."""
        self.cancel()
        for pid in _children():
            if self._is_stranger(pid):
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    # It was not ours after all: the list was read a moment ago.
                    continue

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _children() -> list[int]:
    pids = procfs.own_children()
    if pids is not None:
        return pids
    ours = os.getpid()
    every = map(procfs.read_entry, procfs.all_pids())
    return [entry.pid for entry in every if entry is not None and entry.parent_pid == ours]


@contextmanager
def subreaping(is_stranger: Callable[[int], bool]) -> Iterator[Subreaper]:
    """Be the subreaper for the duration of the context, where the system can do that.

    Args:
        is_stranger: whether a child of this process is one that nobody here has started.

    Raises:
        RuntimeError: if not called in the main thread (signal(2) handlers belong to it).
    """
    reaper = Subreaper(is_stranger)
    if sys.platform != "linux":
        yield reaper
        return
    loop = asyncio.get_running_loop()
    # First, because it may be refused: orphans would come to us, and nobody would reap them.
    loop.add_signal_handler(signal.SIGCHLD, reaper.on_child_signal)
    try:
        _set_subreaper(True)
        yield reaper
    finally:
        loop.remove_signal_handler(signal.SIGCHLD)
        reaper.cancel()
        _set_subreaper(False)


def _set_subreaper(on: bool) -> bool:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [ctypes.c_ulong(value) for value in (int(on), 0, 0, 0)]
    return int(libc.prctl(_PR_SET_CHILD_SUBREAPER, *arguments)) == 0
