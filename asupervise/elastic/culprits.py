"""A node's failure, as the other nodes are told of it: pure."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any, Final

from asupervise.elastic.records import Culprit
from asupervise.error_files import ErrorRecord
from asupervise.failures import ProcessFailure

__all__ = ["START_S", "culprit_of", "failure_of"]

# An engine takes a megabyte or so in one piece (etcd: --max-request-bytes), and a character may
# take 12 bytes in JSON. A report shows less than that.
_TRACEBACK_CHARS: Final = 32 * 1024
_TEXT_CHARS: Final = 8 * 1024
_TEXTS: Final = ("error_file", "stderr_tail", "note", "cause", "stack")
_PORT_TAKEN: Final = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
# Rank 0 listens at its start.
START_S: Final = 60.0


def culprit_of(
    failure: ProcessFailure, *, node: str, host: str, round: int, rank: int, started_ns: int
) -> Culprit:
    """What the others are told.

    Args:
        failure: the node's first.
        node: its id.
        host: its name.
        round: the round's number.
        rank: the worker's global rank.
        started_ns: when the group was started, on ``time.monotonic_ns()``.
    """
    observed_ns = failure.observed_monotonic_ns or time.monotonic_ns()
    # Its own record is earlier than its exit, by the same clock of the same node.
    before_s = min(60.0, max(0.0, failure.observed_at - failure.timestamp))
    uptime_s = max(0.0, (observed_ns - started_ns) / 1e9 - before_s)
    said = f"{failure.traceback}\n{failure.stderr_tail}"
    return Culprit(
        node=node,
        round=round,
        rank=rank,
        age_s=(time.monotonic_ns() - observed_ns) / 1e9 + before_s,
        uptime_s=uptime_s,
        exitcode=failure.exitcode,
        port_taken=rank == 0 and uptime_s < START_S and bool(_PORT_TAKEN.search(said)),
        failure=_as_data(failure, host),
    )


def _as_data(failure: ProcessFailure, host: str) -> dict[str, Any]:
    return {
        "host": host,
        "local_rank": failure.local_rank,
        "pid": failure.pid,
        "timestamp": failure.timestamp,
        "traceback": failure.traceback[-_TRACEBACK_CHARS:],
        "ended_by_us": failure.ended_by_us,
        **{name: getattr(failure, name)[-_TEXT_CHARS:] for name in _TEXTS},
    }


def failure_of(culprit: Culprit) -> ProcessFailure:
    """The failure of another node, as far as it was told."""
    data: Mapping[str, Any] = culprit.failure

    def text(name: str) -> str:
        value = data.get(name)
        return value if isinstance(value, str) else ""

    def number(name: str) -> int:
        value = data.get(name)
        return value if isinstance(value, int) else 0

    when = data.get("timestamp")
    observed_at = float(when) if isinstance(when, (int, float)) else time.time()
    record = ErrorRecord(message=text("traceback"), timestamp=observed_at)
    return ProcessFailure(
        number("local_rank"),
        number("pid"),
        culprit.exitcode,
        text("error_file"),
        record=record if record.message else None,
        observed_at=observed_at,
        ended_by_us=data.get("ended_by_us") is True,
        stderr_tail=text("stderr_tail"),
        note=text("note"),
        cause=text("cause"),
        stack=text("stack"),
        host=text("host"),
    )
