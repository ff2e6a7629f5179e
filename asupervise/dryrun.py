"""What ``--dry-run`` prints: a plan as a table, and why it is what it is. Pure."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Final

from asupervise.job import Job
from asupervise.plan import GroupPlan, WorkerPlan

__all__ = ["describe"]

_HEADINGS: Final = ("RANK", "CPUS", "MEMORY", "GPU", "STDIN", "STDOUT", "STDERR", "COMMAND")
# Made anew by every start.
_TOKEN: Final = "ASUPERVISE_TOKEN"


def describe(job: Job, plan: GroupPlan) -> str:
    """All that the plan says, for people.

    Args:
        job: what was chosen, and why.
        plan: what would be started.
    """
    parts = [
        _labelled({**job.choices, **_logs(plan)}),
        _table([_HEADINGS, *(_row(worker, plan) for worker in plan.workers)]),
        _reasons(plan.workers),
        _environment(job, plan),
    ]
    return "\n\n".join(part for part in parts if part)


def _labelled(lines: Mapping[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines.items())


def _logs(plan: GroupPlan) -> dict[str, str]:
    if not plan.logs.run_dir:
        return {}
    kept = "removed after success" if plan.logs.temporary else "kept"
    lines = {"logs": f"{plan.logs.run_dir} ({kept})"}
    for file, texts in (
        (plan.logs.filtered_stdout, plan.stdout_filters),
        (plan.logs.filtered_stderr, plan.stderr_filters),
    ):
        if texts:
            name = os.path.basename(file).removesuffix(".log")
            lines[name] = f"{_inside(plan, file)}: lines with {' or '.join(map(repr, texts))}"
    return lines


def _row(worker: WorkerPlan, plan: GroupPlan) -> tuple[str, ...]:
    return (
        str(worker.local_rank),
        _cpus(worker),
        _memory(worker),
        _gpu(worker),
        "ours" if worker.stdin else "empty",
        _stream(worker.stdout, worker.tee_stdout, plan),
        _stream(worker.stderr, worker.tee_stderr, plan),
        shlex.join(worker.argv),
    )


def _cpus(worker: WorkerPlan) -> str:
    if worker.binding is None:
        return "any"
    from asupervise.binding import format_ranges

    return format_ranges(worker.binding.cpus)


def _memory(worker: WorkerPlan) -> str:
    binding = worker.binding
    if binding is None or binding.memory_policy == "none":
        return "any"
    from asupervise.binding import format_ranges

    nodes = format_ranges(binding.memory_nodes)
    return f"{binding.memory_policy} {nodes}".rstrip()


def _gpu(worker: WorkerPlan) -> str:
    visible = [
        f"{name}={value}"
        for name, value in worker.env.items()
        if name.endswith("_VISIBLE_DEVICES") or name == "ZE_AFFINITY_MASK"
    ]
    if visible:
        return " ".join(visible)
    gpu = worker.binding.gpu if worker.binding is not None else None
    return "-" if gpu is None else f"{gpu.index} ({gpu.pci_address or gpu.uuid or gpu.vendor})"


def _stream(file: str | None, tee: bool, plan: GroupPlan) -> str:
    if file is None:
        return "console"
    if file == os.devnull:
        return "nowhere"
    return f"{_inside(plan, file)}{' + console' if tee else ''}"


def _inside(plan: GroupPlan, file: str) -> str:
    """The file's name from the run's folder on, which is shown above the table."""
    return file.removeprefix(f"{plan.logs.run_dir}/") if plan.logs.run_dir else file


def _table(rows: Sequence[Sequence[str]]) -> str:
    # The last column is the widest and the least even: nothing is gained by padding it.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return "\n".join(
        "  ".join(
            [*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]
        )
        for row in rows
    )


def _reasons(workers: Sequence[WorkerPlan]) -> str:
    return "\n".join(
        f"rank {worker.local_rank}: {worker.binding.why}"
        for worker in workers
        if worker.binding is not None
    )


def _environment(job: Job, plan: GroupPlan) -> str:
    """The variables, those that differ by rank with the value of each."""
    lines = []
    for name in plan.workers[0].env:
        values = [_value(job, plan, worker, name) for worker in plan.workers]
        shown = values[:1] if len(set(values)) == 1 else values
        lines.append(f"  {name}={' | '.join(shown)}")
    return "\n".join(["environment, added to ours:", *lines])


def _value(job: Job, plan: GroupPlan, worker: WorkerPlan, name: str) -> str:
    value = worker.env.get(name, "")
    if name == _TOKEN:
        return "<made anew by each start>"
    if name == "MASTER_PORT" and not job.request.master_port:
        return "<a free port>"
    if plan.logs.run_dir and value.startswith(f"{plan.logs.run_dir}/"):
        inside = f"/{_inside(plan, value)}".replace(f"/{worker.local_rank}/", "/<local rank>/")
        return f"<logs>{inside}"
    return value
