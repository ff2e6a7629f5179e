"""Makes RESULTS.md and its plots from results.json: ``python -m benchmarks.page FILE``.

They are written beside it. Where matplotlib is not installed the page has no plots, and says so.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from benchmarks import report
from benchmarks.documents import (
    CaseDocument,
    Document,
    MetricDocument,
    TopicDocument,
    read,
)

_MADE_BY = "<!-- Made from results.json by `python -m benchmarks.page`; not to be edited. -->"


def main(argv: Sequence[str] | None = None) -> int:
    (path,) = map(Path, argv if argv is not None else sys.argv[1:])
    made = read(path)
    plots = _plots(made, path.parent / "plots")
    how = os.path.relpath(Path(__file__).with_name("README.md"), path.parent)
    (path.parent / "RESULTS.md").write_text("\n".join(_page(made, plots, how)) + "\n")
    return 0


def _plots(made: Document, folder: Path) -> dict[str, list[Path]] | None:
    """By topic, relative to the page; None where they cannot be drawn."""
    try:
        from benchmarks import plots
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
        return None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return {
        topic["name"]: [path.relative_to(folder.parent) for path in plots.draw(topic, folder)]
        for topic in made["topics"]
    }


def _page(made: Document, plots: dict[str, list[Path]] | None, how: str) -> Iterator[str]:
    yield from (_MADE_BY, "", "# How fast asupervise is, beside its peers", "")
    yield from _circumstances(made, how)
    if plots is None:
        yield from ("There are no plots: matplotlib is not installed.", "")
    yield from _goals(made["topics"])
    for topic in made["topics"]:
        yield from _topic(topic, [] if plots is None else plots[topic["name"]])


def _circumstances(made: Document, how: str) -> Iterator[str]:
    machine = made["machine"]
    minutes = made["seconds"] / 60
    peers = ", ".join(f"{name} {version}" for name, version in made["peers"].items()) or "none"
    if made["quick"]:
        yield from ("**A quick run: these figures say that it runs, and little more.**", "")
    yield (
        f"Measured on {made['made'][:10]} in {minutes:.1f} minutes: {machine['cpus']} CPUs, "
        f"{machine['memory_gib']:.0f} GiB, Python {machine['python']}, {machine['system']}; log "
        f"files on {machine['scratch']}. asupervise {made['asupervise']}; peers: {peers}."
    )
    yield ""
    yield (
        "Absolute figures of a shared machine are not worth much; what was measured in turn, a "
        "moment apart, can be compared. In the tables: the median of the rounds, in brackets "
        "their quartiles, and behind &times; the ratio to the limit: the median of the ratios "
        f"taken round by round. [README.md]({how}) says how each is measured."
    )
    yield ""
    for what in made["left_out"]:
        yield f"- Left out: {what}."
    for what in made["left_behind"]:
        yield f"- Had to be ended afterwards: `{what}`."
    yield ""


def _goals(topics: Sequence[TopicDocument]) -> Iterator[str]:
    rows = [
        (topic["name"], case["name"], goal)
        for topic in topics
        for case in topic["cases"]
        for goal in case["goals"]
    ]
    met = sum(goal["met"] is True for _, _, goal in rows)
    yield from (f"## Goals: {met} of {len(rows)} met", "")
    yield "| topic | case | goal | measured | |"
    yield "|---|---|---|---:|---|"
    for name, case, goal in rows:
        value = "" if goal["value"] is None else f"{goal['value']:.4g}"
        verdict = {True: "met", False: "**missed**", None: "not measured"}[goal["met"]]
        yield f"| [{name}](#{name}) | {case} | {_escaped(goal['goal'])} | {value} | {verdict} |"
    yield ""


def _topic(topic: TopicDocument, plots: Sequence[Path]) -> Iterator[str]:
    yield from (f"## {topic['name']}", "", f"{_sentence(topic['title'])}", "")
    yield from (f"The limit: {_sentence(topic['limit'], keep=True)}", "")
    for note in topic["notes"]:
        yield f"- {note}"
    if topic["notes"]:
        yield ""
    if topic["failed"]:
        yield from (f"**Broke off:** `{topic['failed']}`", "")
    for plot in plots:
        yield from (f"![{plot.stem.replace('-', ' ')}]({plot.as_posix()})", "")
    for group, cases in groupby(topic["cases"], key=lambda case: case["group"]):
        yield from _group(group, list(cases))


def _group(group: str, cases: Sequence[CaseDocument]) -> Iterator[str]:
    """Its tables: candidates down, cases (or metrics, where there is but one case) across."""
    if group:
        yield from (f"### {_sentence(group).rstrip('.')}", "")
    if len(cases) == 1:
        yield from _table_of_one(cases[0])
    else:
        for metric in cases[0]["metrics"]:
            yield from _table(metric, cases)
    remarks = [(case["name"], remark) for case in cases for remark in report.remarks(case)]
    for name, remark in remarks:
        yield f"- {name}: {remark}"
    if remarks:
        yield ""


def _table(metric: MetricDocument, cases: Sequence[CaseDocument]) -> Iterator[str]:
    if not any(case["summaries"].get(metric["name"]) for case in cases):
        return
    yield f"| {report.with_unit(metric)} | " + " | ".join(case["name"] for case in cases) + " |"
    yield "|---|" + "---|" * len(cases)
    for candidate in _candidates(cases):
        cells = [_cell(case, metric, candidate) for case in cases]
        if any(cells):
            yield f"| {_named(candidate, cases[0])} | " + " | ".join(cells) + " |"
    yield ""


def _table_of_one(case: CaseDocument) -> Iterator[str]:
    metrics = [metric for metric in case["metrics"] if case["summaries"].get(metric["name"])]
    heads = " | ".join(map(report.with_unit, metrics))
    yield f"| {case['name']} | {heads} |"
    yield "|---|" + "---|" * len(metrics)
    for candidate in case["candidates"]:
        cells = [_cell(case, metric, candidate) for metric in metrics]
        if any(cells):
            yield f"| {_named(candidate, case)} | " + " | ".join(cells) + " |"
    yield ""


def _candidates(cases: Sequence[CaseDocument]) -> list[str]:
    return list(dict.fromkeys(name for case in cases for name in case["candidates"]))


def _named(candidate: str, case: CaseDocument) -> str:
    if candidate == case["limit"]:
        return f"*{candidate}* (limit)"
    return f"**{candidate}**" if candidate == "asupervise" else candidate


def _cell(case: CaseDocument, metric: MetricDocument, candidate: str) -> str:
    summary = case["summaries"].get(metric["name"], {}).get(candidate)
    if summary is None:
        return ""
    cell = report.number(summary["median"], metric["digits"])
    if spread := report.quartiles(summary, metric["digits"]):
        cell += f" ({spread})"
    ratio = case["ratios"].get(metric["name"], {}).get(candidate)
    return cell + (f" &times;{report.times(ratio)[2:]}" if ratio else "")


def _sentence(text: str, *, keep: bool = False) -> str:
    begun = text if keep else text[:1].upper() + text[1:]
    return begun.rstrip(".") + "."


def _escaped(text: str) -> str:
    return text.replace("<=", "≤").replace(">=", "≥").replace(" x ", " &times; ")


if __name__ == "__main__":
    sys.exit(main())
