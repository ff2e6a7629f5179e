"""Where a pipe ends: ``asupervise --live ... | tee log`` writes to the terminal all the same."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from asupervise.procfs import all_pids

__all__ = ["leads_to"]

# Of a pipeline; one of more programs than that is none that a person has typed.
_MOST_PIPES: Final = 8
_OUTPUTS: Final = (1, 2)


def leads_to(fd: int, device: int) -> bool:
    """Whether what is written to a pipe comes out on a terminal, as far as ``/proc`` can tell.

    Looks for the pipe's readers in our session, and where they write to in turn.

    Args:
        fd: of the pipe; anything else leads nowhere.
        device: of the terminal.
    """
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    pipes = {status.st_ino} if stat.S_ISFIFO(status.st_mode) else set()
    seen: set[int] = set()
    while pipes and len(seen) < _MOST_PIPES:
        seen |= pipes
        outputs = [out for pid in _readers(pipes) for out in _outputs(pid)]
        if any(stat.S_ISCHR(out.st_mode) and out.st_rdev == device for out in outputs):
            return True
        pipes = {out.st_ino for out in outputs if stat.S_ISFIFO(out.st_mode)} - seen
    return False


def _readers(pipes: set[int]) -> Iterator[int]:
    """Processes of our session that read from one of the pipes."""
    names = {f"pipe:[{inode}]" for inode in pipes}
    session = os.getsid(0)
    for pid in all_pids():
        with suppress(OSError):  # it has ended, or is somebody else's
            # A program of a pipeline reads from its standard input.
            if os.getsid(pid) == session and os.readlink(f"/proc/{pid}/fd/0") in names:
                yield pid


def _outputs(pid: int) -> Iterator[os.stat_result]:
    for fd in _OUTPUTS:
        with suppress(OSError):
            yield os.stat(f"/proc/{pid}/fd/{fd}")
