"""What a benchmark is made of, for those who write one: see README.md."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import Case


@dataclass
class Setup:
    """How to measure, and with whom.

    Attributes:
        scratch: a folder for log files and data.
        quick: few rounds and small sizes: does it run, not how fast is it.
        seconds: the length of the windows in which nothing happens.
        only_rounds: the number of rounds, if it was given.
        torchrun: torch's launcher, if there is one.
        left_out: candidates that are not here, a sentence each.
    """

    scratch: Path
    quick: bool = False
    seconds: float = 15.0
    only_rounds: int | None = None
    torchrun: Path | None = None
    left_out: set[str] = field(default_factory=set)

    def rounds(self, usual: int, quick: int = 2) -> int:
        return self.only_rounds or (quick if self.quick else usual)

    @property
    def torch_python(self) -> str | None:
        """The interpreter that torchrun belongs to."""
        if self.torchrun is None:
            return None
        beside = self.torchrun.parent / "python"
        return str(beside) if beside.exists() else None


@dataclass(frozen=True)
class Topic:
    """One benchmark.

    Attributes:
        name: on the command line.
        title: what is measured.
        limit: what the limit does that is measured beside it, and why it is one.
        cases: gives the cases one by one; what a case needs is open until the next is asked for.
    """

    name: str
    title: str
    limit: str
    cases: Callable[[Setup], Iterator[Case]]


def find_torchrun(given: str | None) -> tuple[Path | None, str]:
    """torch's launcher: as given, beside our interpreter, or on PATH; or else why there is none."""
    if given is not None:
        path = Path(given).absolute()
        return (path, "") if path.is_file() else (None, "torchrun: --torchrun names no file")
    beside = Path(sys.executable).with_name("torchrun")
    found = str(beside) if beside.is_file() else shutil.which("torchrun")
    if found is None:
        return None, "torchrun: not installed here (--torchrun PATH names one)"
    return Path(found).absolute(), ""
