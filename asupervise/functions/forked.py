"""A worker that a zygote has forked, as its supervisor sees it."""

from __future__ import annotations

import asyncio
import os

from asupervise import procfs
from asupervise._compat import Exit, ExitCallback, exit_now

__all__ = ["ZygoteChild"]


class ZygoteChild:
    """A worker that a zygote has forked; as `_compat.Child` for those that we start ourselves.

    Attributes:
        pid: its process id, which stays its own until its end has been noted.
        is_zombie: whether it has ended, which is about to be noted.
    """

    def __init__(self, on_exit: ExitCallback) -> None:
        self.pid = 0
        self.is_zombie = False
        self._on_exit: ExitCallback | None = on_exit
        self._watching = -1

    def has_ended(self) -> bool:
        """Whether it has ended, also where nobody has told us yet."""
        entry = procfs.read_entry(self.pid)
        return self.is_zombie or entry is None or not entry.alive

    def abandon(self) -> None:
        """Wait no longer for it."""
        self._on_exit = None
        self._stop_watching()

    def ended(self, exit: Exit, core_dumped: bool | None = None) -> None:
        on_exit, self._on_exit = self._on_exit, None
        if on_exit is not None:
            on_exit(exit._replace(core_dumped=core_dumped))

    def orphaned(self) -> None:
        """The zygote is gone, and nobody will tell how this worker ends; only when."""
        if self._on_exit is None or not self.pid:
            return
        try:
            self._watching = os.pidfd_open(self.pid)
        except (OSError, AttributeError):
            self._lost()
            return
        entry = procfs.read_entry(self.pid)
        if entry is None or entry.session != self.pid:
            self._lost()
            return
        asyncio.get_running_loop().add_reader(self._watching, self._lost)

    def _lost(self) -> None:
        self._stop_watching()
        # As for a child that somebody else has reaped.
        self.ended(exit_now(255))

    def _stop_watching(self) -> None:
        if self._watching >= 0:
            asyncio.get_running_loop().remove_reader(self._watching)
            os.close(self._watching)
            self._watching = -1
