"""What came out, as tables for a terminal; and the wording that the page shares with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.documents import (
    CaseDocument,
    GoalDocument,
    MetricDocument,
    SummaryDocument,
    TopicDocument,
)

_Row = tuple[str, str, str, str, str, str]
_HEAD: _Row = ("case", "metric", "candidate", "median", "quartiles", "by the limit")
_ALIGNED = "<<<>><"


def table(topic: TopicDocument) -> str:
    """The figures of one topic, and what became of its goals."""
    by_case = [list(_rows(case)) for case in topic["cases"]]
    every = [_HEAD, *(row for rows in by_case for row in rows)]
    widths = [max(len(row[column]) for row in every) for column in range(len(_HEAD))]
    lines = [f"{topic['name']}: {topic['title']}", f"limit: {topic['limit']}"]
    lines += [f"note: {note}" for note in topic["notes"]]
    lines += ["", _line(_HEAD, widths)]
    for case, rows in zip(topic["cases"], by_case, strict=True):
        lines += [_line(row, widths) for row in rows]
        lines += [f"  {remark}" for remark in (*map(judged, case["goals"]), *remarks(case))]
    if topic["failed"]:
        lines.append(f"FAILED: {topic['failed']}")
    return "\n".join(lines) + "\n"


def _line(row: _Row, widths: Sequence[int]) -> str:
    cells = zip(row, _ALIGNED, widths, strict=True)
    return "  ".join(f"{cell:{aligned}{width}}" for cell, aligned, width in cells).rstrip()


def _rows(case: CaseDocument) -> Iterator[_Row]:
    name = case["name"]
    for metric in case["metrics"]:
        named = with_unit(metric)
        for candidate, summary in case["summaries"][metric["name"]].items():
            median = number(summary["median"], metric["digits"])
            spread = quartiles(summary, metric["digits"])
            yield name, named, candidate, median, spread, _by_limit(case, metric, candidate)
            name = named = ""


def _by_limit(case: CaseDocument, metric: MetricDocument, candidate: str) -> str:
    if candidate == case["limit"]:
        return "(limit)"
    ratio = case["ratios"].get(metric["name"], {}).get(candidate)
    if ratio is None:
        return ""
    spread = quartiles(ratio, ratio_digits(ratio))
    return times(ratio) + (f" ({spread})" if spread else "")


def with_unit(metric: MetricDocument) -> str:
    return f"{metric['name']}, {metric['unit']}" if metric["unit"] else metric["name"]


def number(figure: float, digits: int) -> str:
    return f"{figure:,.{digits}f}"


def quartiles(summary: SummaryDocument, digits: int) -> str:
    """Between which half of the rounds lie; nothing for a single one."""
    if summary["count"] < 2:
        return ""
    low, high = summary["low_quartile"], summary["high_quartile"]
    return f"{number(low, digits)} to {number(high, digits)}"


def ratio_digits(ratio: SummaryDocument) -> int:
    return 2 if ratio["median"] < 10 else 1


def times(ratio: SummaryDocument) -> str:
    return f"x {number(ratio['median'], ratio_digits(ratio))}"


def judged(goal: GoalDocument) -> str:
    if goal["value"] is None:
        return f"goal: {goal['goal']}: not measured"
    return f"goal: {goal['goal']}: {goal['value']:.4g}, {'met' if goal['met'] else 'MISSED'}"


def remarks(case: CaseDocument) -> Iterator[str]:
    if case["check"]:
        yield f"check: {case['check']}" + (": WRONG" if case["check_failed"] else "")
    for candidate, errors in case["errors"].items():
        yield f"{candidate}: {len(errors)} runs gave no figure: {errors[0]}"


def totals(topics: Sequence[TopicDocument]) -> str:
    """How many goals were met, and which were not."""
    goals = [
        (f"{topic['name']}, {case['name']}", goal)
        for topic in topics
        for case in topic["cases"]
        for goal in case["goals"]
    ]
    met = sum(goal["met"] is True for _, goal in goals)
    lines = [f"{met} of {len(goals)} goals met"]
    for where, goal in goals:
        if goal["met"] is False:
            lines.append(f"  missed: {where}: {goal['goal']}: {goal['value']:.4g}")
        elif goal["met"] is None:
            lines.append(f"  not measured: {where}: {goal['goal']}")
    return "\n".join(lines)
