"""A run into the document that ``results.json`` is."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import asupervise
from benchmarks.documents import (
    CaseDocument,
    Document,
    GoalDocument,
    Machine,
    SummaryDocument,
    TopicDocument,
)
from benchmarks.measure import Case, Goal, Outcome, Summary
from benchmarks.peers import ROOT
from benchmarks.topics import Setup, Topic


@dataclass
class Measured:
    """One topic's outcomes so far; `failed` says why there are no more."""

    topic: Topic
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    failed: str = ""


def document(setup: Setup, measured: Sequence[Measured], left_behind: Sequence[str]) -> Document:
    """All of a run, without names of this machine."""
    made: Document = {
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "asupervise": asupervise.__version__,
        "machine": _machine(setup.scratch),
        "peers": setup.peers.versions(),
        "quick": setup.quick,
        "seconds": round(sum(one.seconds for one in measured), 1),
        "left_out": sorted({*setup.left_out, *setup.peers.missing}),
        "left_behind": list(left_behind),
        "topics": [topic_document(one) for one in measured],
    }
    cleaned: Document = json.loads(_without_names(json.dumps(made), setup.scratch))
    return cleaned


def topic_document(measured: Measured) -> TopicDocument:
    topic = measured.topic
    return {
        "name": topic.name,
        "title": topic.title,
        "limit": topic.limit,
        "notes": list(topic.notes),
        "plots": list(topic.plots),
        "seconds": round(measured.seconds, 1),
        "failed": measured.failed,
        "cases": [_case(outcome) for outcome in measured.outcomes],
    }


def write(path: Path, made: Document) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, indent=1) + "\n")


def _case(outcome: Outcome) -> CaseDocument:
    case = outcome.case
    return {
        "name": case.name,
        "group": case.group,
        "size": case.size,
        "limit": case.limit,
        "metrics": [
            {"name": metric.name, "unit": metric.unit, "digits": metric.digits}
            for metric in case.metrics
        ],
        "candidates": [candidate.name for candidate in case.candidates],
        "samples": outcome.samples,
        "summaries": _summaries(outcome),
        "ratios": _ratios(outcome),
        "goals": [_goal(outcome, goal) for goal in case.goals],
        "check": outcome.check,
        "check_failed": outcome.check_failed,
        "errors": outcome.errors,
    }


def _goal(outcome: Outcome, goal: Goal) -> GoalDocument:
    verdict = outcome.judged(goal)
    units = {metric.name: metric.unit for metric in outcome.case.metrics}
    return {
        "goal": goal.text(units.get(goal.metric, "")),
        "metric": goal.metric,
        "value": None if verdict is None else verdict.value,
        "met": None if verdict is None else verdict.met,
    }


def _summaries(outcome: Outcome) -> dict[str, dict[str, SummaryDocument]]:
    return _by_metric(outcome.case, lambda who, metric: outcome.figures(who, metric))


def _ratios(outcome: Outcome) -> dict[str, dict[str, SummaryDocument]]:
    limit = outcome.case.limit
    if limit is None:
        return {}
    return _by_metric(
        outcome.case,
        lambda who, metric: [] if who == limit else outcome.ratios(who, limit, metric),
    )


def _by_metric(
    case: Case, figures: Callable[[str, str], list[float]]
) -> dict[str, dict[str, SummaryDocument]]:
    return {
        metric.name: {
            candidate.name: _summary(summary)
            for candidate in case.candidates
            if (summary := Summary.of(figures(candidate.name, metric.name)))
        }
        for metric in case.metrics
    }


def _summary(summary: Summary) -> SummaryDocument:
    return {
        "count": summary.count,
        "median": summary.median,
        "low_quartile": summary.low_quartile,
        "high_quartile": summary.high_quartile,
        "ninth_decile": summary.ninth_decile,
    }


# --- the machine ----------------------------------------------------------------------------------


def _machine(scratch: Path) -> Machine:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        # Behind the numbers a distribution, or a cloud, writes its own name.
        "system": f"{platform.system()} {platform.release().partition('-')[0]} "
        f"{platform.machine()}",
        "scratch": _file_system(scratch),
    }


def _file_system(folder: Path) -> str:
    """The type of the file system that `folder` is on."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [(point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(above, key=lambda mount: len(mount[0]))[1]


def _without_names(text: str, scratch: Path) -> str:
    """`text` without what only this machine is called: errors may quote paths."""
    names = {
        str(scratch): "$TMPDIR",
        str(ROOT): ".",
        sys.prefix: "$VENV",
        str(Path.home()): "~",
        socket.gethostname(): "localhost",
    }
    for name, instead in names.items():
        if len(name) > 2:
            text = text.replace(name, instead)
    return text
