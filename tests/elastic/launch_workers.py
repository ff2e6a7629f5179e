"""Functions that the tests of `launch` run as workers: this module imports next to nothing."""

from __future__ import annotations

import os


def who_and_what(*args: object) -> tuple[dict[str, str], tuple[object, ...]]:
    """Our environment and our arguments."""
    return dict(os.environ), args


def failing_until(restarts: int, rank: int = 1) -> tuple[int, int]:
    """Fails on one rank until so many restarts; which one it is, and our parent."""
    count = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if count < restarts and int(os.environ["RANK"]) == rank:
        raise ValueError(f"no luck in attempt {count}")
    return count, os.getppid()
