"""A user's program: `mypy --strict` must accept it, and know the types that it asserts."""

from __future__ import annotations

import signal
import sys
from typing import Any, assert_type

import asupervise
from asupervise import (
    AffinityMode,
    ChildFailedError,
    ConsoleFormat,
    DefaultLogsSpecs,
    GroupPlan,
    LogLine,
    LogsDest,
    LogsSpecs,
    NumaOptions,
    PContext,
    ProcessFailure,
    RankMapError,
    RunProcsResult,
    Std,
    WorkerPlan,
    plan_processes,
    record,
    root_cause,
    start_processes,
)


async def awaited() -> int:
    ctx = await start_processes("trainer", "./train", {0: ("--lr", 0.1)}, {0: {"SEED": "1"}})
    assert_type(ctx, PContext)
    assert_type(ctx.pids(), dict[int, int])
    assert_type(ctx.nprocs, int)
    assert_type(ctx.stdouts, dict[int, str])
    assert_type(ctx.log_dir, str | None)
    ctx.send_signal(signal.SIGUSR1, ranks=[0])
    assert_type(await ctx.wait(timeout=1.5), RunProcsResult | None)
    if await ctx.wait(timeout=1.5) is None:
        await ctx.close(signal.SIGINT, timeout=5)
    result = await ctx.wait()
    assert_type(result, RunProcsResult)
    return judge(result)


async def followed() -> str:
    form = ConsoleFormat(color="never", timestamps=True, log_format="text", dedup=True)
    async with start_processes("t", "./train", {0: ()}, {0: {}}, console=form) as ctx:
        async for line in ctx.lines(ranks=[0], streams=Std.OUT):
            assert_type(line, LogLine)
            assert_type(line.time, float)
            return f"{line.rank} {line.local_rank} {line.stream} {line.text} {line.continues}"
    return ""


async def entered() -> None:
    logs: LogsSpecs = DefaultLogsSpecs(
        log_dir="logs", redirects=Std.ERR, tee={0: Std.ALL}, local_ranks_filter={0}
    )
    async with start_processes(
        name="trainer",
        entrypoint=[sys.executable, "train.py"],
        args={0: (), 1: ()},
        envs={0: {}, 1: {}},
        logs_specs=logs,
        log_line_prefixes={0: "> "},
        start_method="spawn",
        numa_options=NumaOptions(AffinityMode.NODE, should_fall_back_if_binding_fails=True),
        duplicate_stdout_filters=["loss"],
        duplicate_stderr_filters=None,
        stdin=0,
        cwd="/",
        shutdown_timeout=10,
    ) as ctx:
        assert_type(ctx, PContext)
        await ctx.wait()


def judge(result: RunProcsResult) -> int:
    assert_type(result.failures, dict[int, ProcessFailure])
    assert_type(result.return_values, dict[int, Any])
    assert_type(result.warnings, tuple[str, ...])
    if (cause := root_cause(result.failures)) is not None:
        rank, failure = cause
        assert_type(rank, int)
        assert_type(failure.ended_by_us, bool)
        assert_type(failure.timestamp, float)
    try:
        result.raise_for_failure("train.py", global_ranks={0: 8})
    except ChildFailedError as error:
        assert_type(error.get_first_failure(), tuple[int, ProcessFailure])
        return 1
    return 0


def planned() -> GroupPlan | None:
    try:
        plan = plan_processes("trainer", "./train", {0: ()}, {0: {}})
    except RankMapError as error:
        assert_type(error.hint, str | None)
        return None
    for worker in plan.workers:
        assert_type(worker, WorkerPlan)
        assert_type(worker.argv, tuple[str, ...])
    assert_type(plan.logs, LogsDest)
    return plan


@record
def main(path: str) -> int:
    return len(path)


assert_type(main("x"), int | None)
assert_type(asupervise.__version__, str)
