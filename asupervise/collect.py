"""From exits and error files to the result of a group."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

from asupervise import files
from asupervise.failures import ProcessFailure, RunProcsResult, read_error_file
from asupervise.handler import SubprocessHandler
from asupervise.plan import GroupPlan

_STDERR_TAIL_BYTES = 8192
_STDERR_TAIL_LINES = 20


async def result_of(
    plan: GroupPlan, handlers: Mapping[int, SubprocessHandler], warnings: list[str]
) -> RunProcsResult:
    """The result of a group that has ended. Reads what failed workers left, in a thread."""
    failed = [h for _, h in sorted(handlers.items()) if h.exit is None or h.exit.code != 0]
    if not failed:
        removed = await files.remove_run_folder(plan)
        return _result(plan, {}, warnings, removed=removed)
    failures = await asyncio.to_thread(lambda: [_failure(handler) for handler in failed])
    return _result(plan, {f.local_rank: f for f in failures}, warnings, removed=False)


def _result(
    plan: GroupPlan, failures: dict[int, ProcessFailure], warnings: list[str], *, removed: bool
) -> RunProcsResult:
    def written(paths: Mapping[int, str]) -> dict[int, str]:
        return {} if removed else {r: p for r, p in paths.items() if p and p != os.devnull}

    return RunProcsResult(
        return_values={} if failures else dict.fromkeys(range(plan.nprocs)),
        failures=failures,
        stdouts=written(plan.logs.stdouts),
        stderrs=written(plan.logs.stderrs),
        log_dir=None if removed else plan.logs.run_dir or None,
        warnings=tuple(warnings),
    )


def _failure(handler: SubprocessHandler) -> ProcessFailure:
    exit = handler.exit_or_unkillable()
    path = handler.plan.error_file
    record = (
        read_error_file(path, not_before=handler.started_at, not_after=exit.wall_time)
        if path
        else None
    )
    our_signals, signalled_at = handler.our_signals(exit)
    return ProcessFailure.from_exit(
        local_rank=handler.local_rank,
        pid=handler.pid,
        exitcode=exit.code,
        error_file=path or "",
        record=record,
        observed_at=exit.wall_time,
        observed_monotonic_ns=exit.monotonic_ns,
        our_signals=our_signals,
        signalled_at=signalled_at,
        stderr_tail=_last_lines(handler.plan.stderr),
    )


def _last_lines(path: str | None) -> str:
    if not path or path == os.devnull:
        return ""
    lines = files.read_tail(path, _STDERR_TAIL_BYTES).splitlines()
    return "\n".join(lines[-_STDERR_TAIL_LINES:])
