"""Which pids have been given out since a moment: who is older cannot be ours.

A look at the whole process table of a busy machine takes 10 ms and more. The kernel gives pids
out in a circle, from a counter that ``/proc/loadavg`` shows; as long as that has not come round,
the processes that have started since a moment are those between its place then and now. That it
has not come round follows from the number of forks since boot (``/proc/stat``), which is
dear to read on large machines, so within the first moments from the time that has passed.
"""

from __future__ import annotations

import os
import time

from asupervise import procfs

__all__ = ["Newcomers"]

# No kernel forks more often; 30,000 a second were seen on fast machines.
_FORKS_A_SECOND = 65_536
# So many pids are asked for one by one, sooner than the whole table is listed.
_FEW_PIDS = 64


class Newcomers:
    """The processes that have started since this was made.

    Example:
        >>> newcomers = Newcomers()
        >>> os.getpid() in (newcomers.pids() or ())
        False
    """

    def __init__(self) -> None:
        self._newest = procfs.newest_pid()
        self._since_s = time.monotonic()
        self._forks: int | None = None

    def note_forks(self) -> None:
        """To be called once, soon: from then on it can be told for long, not for moments only."""
        if self._forks is None and self._is_soon():
            self._forks = procfs.total_forks()

    def _is_soon(self) -> bool:
        return (time.monotonic() - self._since_s) * _FORKS_A_SECOND < procfs.pid_limit() // 2

    def pids(self) -> list[int] | None:
        """Their pids, as far as they are in use; None if that cannot be told any more."""
        if self._newest is None or not self._is_valid():
            return None
        newest = procfs.newest_pid()
        if newest is None:
            return None
        if 0 <= newest - self._newest <= _FEW_PIDS:
            since = range(self._newest + 1, newest + 1)
            return [pid for pid in since if os.path.exists(f"/proc/{pid}")]
        if newest >= self._newest:
            return [pid for pid in procfs.all_pids() if self._newest < pid <= newest]
        return [pid for pid in procfs.all_pids() if pid > self._newest or pid <= newest]

    def _is_valid(self) -> bool:
        if self._is_soon():
            return True
        forks = procfs.total_forks()
        if self._forks is None or forks is None:
            return False
        # The other half is for pids in use, which are passed over, and for the first moments.
        return forks - self._forks < procfs.pid_limit() // 4
