"""What ``results.json`` holds: every figure of every round, and what is made of them.

The tables, the page and the plots are all made from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict


class SummaryDocument(TypedDict):
    count: int
    median: float
    low_quartile: float
    high_quartile: float
    ninth_decile: float


class MetricDocument(TypedDict):
    name: str
    unit: str
    digits: int


class GoalDocument(TypedDict):
    """`value` and `met` are None where what it needs was not measured."""

    goal: str
    metric: str
    value: float | None
    met: bool | None


class CaseDocument(TypedDict):
    """`summaries` and `ratios` (to the limit) are by metric, then by candidate."""

    name: str
    group: str
    size: float | None
    limit: str | None
    metrics: list[MetricDocument]
    candidates: list[str]
    samples: dict[str, list[Mapping[str, float] | None]]
    summaries: dict[str, dict[str, SummaryDocument]]
    ratios: dict[str, dict[str, SummaryDocument]]
    goals: list[GoalDocument]
    check: str
    check_failed: bool
    errors: dict[str, list[str]]


class TopicDocument(TypedDict):
    name: str
    title: str
    limit: str
    notes: list[str]
    plots: list[str]
    seconds: float
    failed: str
    cases: list[CaseDocument]


class Machine(TypedDict):
    cpus: int
    memory_gib: float
    python: str
    system: str
    scratch: str


class Document(TypedDict):
    made: str
    asupervise: str
    machine: Machine
    peers: dict[str, str]
    quick: bool
    seconds: float
    left_out: list[str]
    left_behind: list[str]
    topics: list[TopicDocument]


def read(path: Path) -> Document:
    made: Document = json.loads(path.read_text())
    return made
