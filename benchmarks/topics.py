"""What a benchmark is made of, for those who write one: see README.md."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.measure import SUBJECT, Case
from benchmarks.peers import Peers

# Ours once more, to show what the disk's file system is in a figure.
IN_MEMORY: Final = f"{SUBJECT}, log files on tmpfs"
# And with what the others do not leave behind: events.jsonl and report.html.
WITH_REPORT: Final = f"{SUBJECT}, and its report"
_MEMORY_FOLDER: Final = Path("/dev/shm")


def cleaned_up(log_dir: str) -> None:
    """Remove the files of a round, if they are in memory. On a disk they stay until the end of all.

    ext4 gives out no inode that was freed in the last minutes, and looks at each of them to find
    another one (`recently_deleted` in Linux' fs/ext4/ialloc.c): where ten thousand files have just
    been removed each new one takes a millisecond. Whoever cleans up measures that.
    """
    if Path(log_dir).is_relative_to(_MEMORY_FOLDER):
        shutil.rmtree(log_dir, ignore_errors=True)


@dataclass
class Setup:
    """How to measure, and with whom.

    Attributes:
        scratch: a folder for log files and data.
        peers: the other launchers that are here.
        quick: few rounds and small sizes: does it run, not how fast is it.
        seconds: the length of the windows in which nothing happens.
        only_rounds: the number of rounds, if it was given.
        deadline_s: by time.monotonic(), after which each case gets one round.
        left_out: what is not measured here, and why, a sentence each.
    """

    scratch: Path
    peers: Peers
    quick: bool = False
    seconds: float = 60.0
    only_rounds: int | None = None
    deadline_s: float = math.inf
    left_out: set[str] = field(default_factory=set)

    def memory_folder(self, name: str) -> Iterator[str]:
        """A folder of that name where files are in memory; nothing if there is no such place."""
        if _MEMORY_FOLDER.is_dir() and os.access(_MEMORY_FOLDER, os.W_OK):
            yield str(_MEMORY_FOLDER / self.scratch.name / name)

    def remove_memory_folders(self) -> None:
        shutil.rmtree(_MEMORY_FOLDER / self.scratch.name, ignore_errors=True)

    def rounds(self, usual: int, quick: int = 2) -> int:
        return self.only_rounds or (quick if self.quick else usual)


@dataclass(frozen=True)
class Topic:
    """One benchmark.

    Attributes:
        name: on the command line.
        title: what is measured.
        limit: what the limit does that is measured beside it, and why it is one.
        cases: gives the cases one by one; what a case needs is open until the next is asked for.
        plots: the names of the metrics that are drawn.
        notes: what must be known to read its figures, a sentence each.
    """

    name: str
    title: str
    limit: str
    cases: Callable[[Setup], Iterator[Case]]
    plots: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
