"""The report of a run as one page, made from what the run has left in its folder."""

from __future__ import annotations

__all__ = ["write_report"]


def write_report(run_dir: str) -> None:
    """Write ``report.html`` into the run's folder."""
