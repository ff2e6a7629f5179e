"""torch's own start_processes, called inside an interpreter that has torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# torch looks at its workers once a second unless told otherwise; so often a user might tell it.
SHORT_PERIOD_S = 0.001


def start(
    entrypoint: str | Callable[..., Any],
    args: Mapping[int, Sequence[Any]],
    log_dir: str,
    *,
    tee: int = 0,
    redirects: int = 0,
    filters: Sequence[str] | None = None,
    start_method: str = "spawn",
) -> Any:
    """Its context for a group whose output goes where the masks say."""
    from torch.distributed.elastic.multiprocessing import (
        DefaultLogsSpecs,
        Std,
        start_processes,
    )

    return start_processes(
        "bench",
        entrypoint,
        {rank: tuple(words) for rank, words in args.items()},
        {rank: {} for rank in args},
        DefaultLogsSpecs(log_dir, redirects=Std(redirects), tee=Std(tee)),
        start_method=start_method,
        duplicate_stdout_filters=list(filters) if filters else None,
    )


def wait(context: Any, period_s: float = SHORT_PERIOD_S) -> Any:
    """Its result, with all that it shows shown."""
    result = context.wait(period=period_s)
    sys.stdout.flush()
    return result
