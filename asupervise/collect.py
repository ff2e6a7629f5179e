"""From exits and error files to the result of a group."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from asupervise import files
from asupervise.handler import SubprocessHandler
from asupervise.plan import GroupPlan
from asupervise.result import RunProcsResult
from asupervise.work import Work

if TYPE_CHECKING:
    from asupervise.failures import ProcessFailure
    from asupervise.postmortem import DetailsOf


async def result_of(
    plan: GroupPlan,
    handlers: Mapping[int, SubprocessHandler],
    warnings: list[str],
    *,
    details_of: DetailsOf,
    faulty: Collection[int] = (),
    work: Work,
    keeps_folder: bool = False,
) -> RunProcsResult:
    """The result of a group that has ended. Reads what failed workers left, in a thread.

    Args:
        plan: of the group.
        handlers: its workers, by local rank.
        warnings: what went wrong beside them.
        details_of: further fields of a worker's failure; called in the thread.
        faulty: the local ranks that have failed however they took our signal.
        work: of the workers.
        keeps_folder: whether a temporary folder stays unless all have succeeded.
    """
    if warning := files.full_disk_warning(plan):
        warnings = [*warnings, warning]
    failed = [
        handler
        for rank, handler in sorted(handlers.items())
        if handler.exit is None or handler.exit.code != 0 or rank in faulty
    ]
    values: dict[int, Any] = dict.fromkeys(range(plan.nprocs))
    problems: dict[int, str] = {}
    if not failed:
        if work.returns_values:
            values, problems = await asyncio.to_thread(work.values, sorted(handlers))
        if not problems:
            removed = await files.remove_run_folder(plan)
            return _result(plan, values, {}, warnings, removed=removed)
        failed = [handlers[rank] for rank in problems]

    def failures() -> dict[int, ProcessFailure]:
        # Imported here, in the thread: most groups end well.
        from asupervise.postmortem import failures_of

        return failures_of(failed, problems, details_of=details_of, work=work)

    found = await asyncio.to_thread(failures)
    # Of those that were only ended nobody wants to know more, unless it took a look at where they
    # were.
    only_ended = all(failure.ended_by_us and not failure.stack for failure in found.values())
    removed = only_ended and not keeps_folder and await files.remove_run_folder(plan)
    return _result(plan, {}, found, warnings, removed=removed)


def _result(
    plan: GroupPlan,
    values: dict[int, Any],
    failures: dict[int, ProcessFailure],
    warnings: list[str],
    *,
    removed: bool,
) -> RunProcsResult:
    def written(paths: Mapping[int, str]) -> dict[int, str]:
        return {} if removed else {r: p for r, p in paths.items() if p and p != os.devnull}

    return RunProcsResult(
        return_values=dict(sorted(values.items())),
        failures=failures,
        stdouts=written(plan.logs.stdouts),
        stderrs=written(plan.logs.stderrs),
        log_dir=None if removed else plan.logs.run_dir or None,
        warnings=tuple(warnings),
    )
