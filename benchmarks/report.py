"""What came out: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asupervise
from benchmarks.measure import Metric, Outcome, Summary
from benchmarks.topics import Setup, Topic

_Row = tuple[str, str, str, str, str, str]
_HEAD: _Row = ("case", "metric", "candidate", "median", "quartiles", "by the limit")
_ALIGNED = "<<<>><"


def table(topic: Topic, outcomes: Sequence[Outcome]) -> str:
    """The figures of one topic, and what became of its goals."""
    by_outcome = [_rows(outcome) for outcome in outcomes]
    every = [_HEAD, *(row for rows in by_outcome for row in rows)]
    widths = [max(len(row[column]) for row in every) for column in range(len(_HEAD))]
    lines = [f"{topic.name}: {topic.title}", f"limit: {topic.limit}", "", _line(_HEAD, widths)]
    for outcome, rows in zip(outcomes, by_outcome, strict=True):
        lines += [_line(row, widths) for row in rows]
        lines += [f"  {remark}" for remark in _remarks(outcome)]
    return "\n".join(lines) + "\n"


def _line(row: _Row, widths: Sequence[int]) -> str:
    cells = zip(row, _ALIGNED, widths, strict=True)
    return "  ".join(f"{cell:{aligned}{width}}" for cell, aligned, width in cells).rstrip()


def _rows(outcome: Outcome) -> list[_Row]:
    rows: list[_Row] = []
    case = outcome.case.name
    for metric in outcome.case.metrics:
        named = f"{metric.name}, {metric.unit}" if metric.unit else metric.name
        for candidate in outcome.case.candidates:
            summary = Summary.of(outcome.figures(candidate.name, metric.name))
            if summary is not None:
                figures = _figures(outcome, candidate.name, metric, summary)
                rows.append((case, named, candidate.name, *figures))
                case = named = ""
    return rows


def _figures(
    outcome: Outcome, candidate: str, metric: Metric, summary: Summary
) -> tuple[str, str, str]:
    return (
        f"{summary.median:,.{metric.digits}f}",
        _spread(summary, metric.digits),
        _ratio(outcome, candidate, metric),
    )


def _ratio(outcome: Outcome, candidate: str, metric: Metric) -> str:
    limit = outcome.case.limit
    if limit is None:
        return ""
    if candidate == limit:
        return "(limit)"
    ratio = Summary.of(outcome.ratios(candidate, limit, metric.name))
    if ratio is None:
        return ""
    digits = 2 if ratio.median < 10 else 1
    return f"x {ratio.median:.{digits}f}" + (
        f" ({_spread(ratio, digits)})" if ratio.count > 1 else ""
    )


def _spread(summary: Summary, digits: int) -> str:
    if summary.count < 2:
        return ""
    return f"{summary.low_quartile:,.{digits}f} to {summary.high_quartile:,.{digits}f}"


def _remarks(outcome: Outcome) -> list[str]:
    lines = []
    for goal in outcome.case.goals:
        verdict = outcome.judged(goal)
        if verdict is not None:
            lines.append(f"goal: {goal}: {verdict.value:.4g}, {'met' if verdict.met else 'MISSED'}")
    if outcome.check:
        lines.append(f"check: {outcome.check}" + (": WRONG" if outcome.check_failed else ""))
    for candidate, errors in outcome.errors.items():
        lines.append(f"{candidate}: {len(errors)} runs gave no figure: {errors[0]}")
    return lines


def totals(outcomes: Sequence[Outcome]) -> str:
    """How many goals were met, and which were not."""
    verdicts = [
        (outcome, verdict)
        for outcome in outcomes
        for goal in outcome.case.goals
        if (verdict := outcome.judged(goal)) is not None
    ]
    missed = [(o, v) for o, v in verdicts if not v.met]
    lines = [f"{len(verdicts) - len(missed)} of {len(verdicts)} goals met"]
    lines += [f"  missed: {o.case.name}: {v.goal}: {v.value:.4g}" for o, v in missed]
    return "\n".join(lines)


def write_json(
    path: Path, setup: Setup, measured: Sequence[tuple[Topic, Sequence[Outcome]]]
) -> None:
    """Every figure of every round, for plots and pages."""
    document = {
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "asupervise": asupervise.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)),
        "quick": setup.quick,
        "left_out": sorted(setup.left_out),
        "topics": [
            {
                "name": topic.name,
                "title": topic.title,
                "limit": topic.limit,
                "cases": [_document(outcome) for outcome in outcomes],
            }
            for topic, outcomes in measured
        ],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def _document(outcome: Outcome) -> dict[str, Any]:
    case = outcome.case
    goals = []
    for goal in case.goals:
        verdict = outcome.judged(goal)
        judged = {} if verdict is None else {"value": verdict.value, "met": verdict.met}
        goals.append({"goal": str(goal), **dataclasses.asdict(goal), **judged})
    return {
        "name": case.name,
        "limit": case.limit,
        "metrics": [dataclasses.asdict(metric) for metric in case.metrics],
        "samples": outcome.samples,
        "summaries": {
            metric.name: {
                candidate.name: dataclasses.asdict(summary)
                for candidate in case.candidates
                if (summary := Summary.of(outcome.figures(candidate.name, metric.name)))
            }
            for metric in case.metrics
        },
        "goals": goals,
        "check": outcome.check,
        "check_failed": outcome.check_failed,
        "errors": outcome.errors,
    }
