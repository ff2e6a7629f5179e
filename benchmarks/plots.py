"""Draws a topic's figures as SVG, readable on a light and on a dark page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.documents import CaseDocument, MetricDocument, SummaryDocument, TopicDocument
from benchmarks.measure import SUBJECT
from benchmarks.report import with_unit

# Text, axes and limits: this on a light page, and the other on a dark one.
_INK: Final = "#57606b"
_INK_ON_DARK: Final = "#a9b4c0"
_DARK: Final = (
    f'@media (prefers-color-scheme: dark) {{ [style*="fill: {_INK}"] {{ fill: {_INK_ON_DARK} '
    f'!important }} [style*="stroke: {_INK}"] {{ stroke: {_INK_ON_DARK} !important }} }}'
)
# The same candidate has the same colour everywhere; each is to be seen on white and on black.
_COLOURS: Final = {
    "asupervise": "#2f81f7",
    "torch": "#e0662b",
    "mpirun": "#2da44e",
    "parallel": "#b65fd6",
    "honcho": "#b58a00",
    "circus": "#1a9a9a",
    "sed": "#c2527f",
}
_OTHERS: Final = ("#8a6d4b", "#7f7fd5", "#6b8e23")
_MARKERS: Final = "osD^vP*X<>hd"
_SETTINGS: Final = {
    # Text stays text; ids do not change from run to run.
    "svg.fonttype": "none",
    "svg.hashsalt": "asupervise",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titlecolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.2,
    "legend.frameon": False,
}
_MOST_COLUMNS: Final = 3
# Fewer sizes than this are dots, more are lines.
_FEWEST_OF_A_LINE: Final = 3


def draw(topic: TopicDocument, folder: Path) -> Iterator[Path]:
    """Its plots, a file for each group of cases that has something to show."""
    for group in dict.fromkeys(case["group"] for case in topic["cases"]):
        cases = [case for case in topic["cases"] if case["group"] == group]
        metrics = [m for m in cases[0]["metrics"] if m["name"] in topic["plots"]]
        shown = [metric for metric in metrics if _anything(metric, cases)]
        if shown:
            words = re.sub(r"[^a-z0-9]+", "-", f"{topic['name']} {group}".lower()).strip("-")
            path = folder / f"{words}.svg"
            with matplotlib.rc_context(_SETTINGS):
                _draw(shown, cases, path)
            yield path


def _anything(metric: MetricDocument, cases: Sequence[CaseDocument]) -> bool:
    return any(s["median"] > 0 for case in cases for s in _summaries(case, metric).values())


def _draw(metrics: Sequence[MetricDocument], cases: Sequence[CaseDocument], path: Path) -> None:
    if len({case["size"] for case in cases}) >= _FEWEST_OF_A_LINE:
        figure = _figure_of_lines(metrics, cases)
    else:
        figure = _figure_of_dots(metrics, cases)
    figure.savefig(
        path, transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None}
    )
    path.write_text(path.read_text().replace("</style>", f"{_DARK}</style>", 1))


def _figure_of_lines(metrics: Sequence[MetricDocument], cases: Sequence[CaseDocument]) -> Figure:
    figure = Figure(figsize=(max(6.5, 4.0 * len(metrics)), 3.8), layout="tight")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for metric, axis in zip(metrics, axes, strict=True):
        _lines(axis, metric, cases)
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _figure_of_dots(metrics: Sequence[MetricDocument], cases: Sequence[CaseDocument]) -> Figure:
    panels = [(case, metric) for case in cases for metric in metrics]
    columns = _MOST_COLUMNS if len(metrics) % _MOST_COLUMNS == 0 else min(2, len(metrics))
    rows = -(-len(panels) // columns)
    height = 1.1 + 0.26 * max(len(case["candidates"]) for case in cases)
    figure = Figure(figsize=(max(6.5, 3.9 * columns), rows * height), layout="tight")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for place, (axis, panel) in enumerate(zip_longest(axes, panels)):
        if panel is None or not _summaries(*panel):
            axis.set_visible(False)
        else:
            _dots(axis, *panel, named=place % columns == 0)
    return figure


def _lines(axis: Any, metric: MetricDocument, cases: Sequence[CaseDocument]) -> None:
    names = dict.fromkeys(name for case in cases for name in case["candidates"])
    for place, name in enumerate(names):
        points = [
            (case["size"], summary)
            for case in cases
            if (summary := _summaries(case, metric).get(name)) is not None
        ]
        if points:
            axis.errorbar(
                [size for size, _ in points],
                [summary["median"] for _, summary in points],
                yerr=list(zip(*(_whiskers(summary) for _, summary in points), strict=True)),
                label=name,
                color=_colour(name, cases),
                linestyle="--" if name == cases[0]["limit"] else "-",
                linewidth=2.2 if name == SUBJECT else 1.3,
                marker=_MARKERS[place % len(_MARKERS)],
                markersize=4,
                capsize=2,
            )
    _scales(axis, metric, cases)
    axis.set_title(with_unit(metric))
    # A group that is not named after what grows has sizes that are numbers of workers.
    named = cases[0]["group"].startswith(("MB", "number of "))
    axis.set_xlabel(cases[0]["group"].removeprefix("number of ") if named else "workers")
    axis.grid(visible=True)


def _scales(axis: Any, metric: MetricDocument, cases: Sequence[CaseDocument]) -> None:
    axis.set_xscale("log")
    axis.set_xticks([case["size"] for case in cases])
    axis.set_xticklabels([f"{case['size']:,.0f}" for case in cases])
    medians = [s["median"] for case in cases for s in _summaries(case, metric).values()]
    if _spans_much(medians):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if _few_decades(medians) else (1,)))
    else:
        axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter("{x:,.10g}")
    axis.minorticks_off()


def _few_decades(figures: Sequence[float]) -> bool:
    return max(figures) < 1000 * min(figures)


def _spans_much(figures: Sequence[float]) -> bool:
    """Whether small ones could not be told apart on a linear scale."""
    return min(figures) > 0 and max(figures) > 20 * min(figures)


def _dots(axis: Any, case: CaseDocument, metric: MetricDocument, *, named: bool) -> None:
    """One under the other; dots, because bars would need a zero, which a logarithm has not."""
    names, summaries = case["candidates"], _summaries(case, metric)
    for place, name in enumerate(names):
        if name in summaries:
            _dot(axis, place, summaries[name], metric["digits"], _colour(name, [case]))
    if _spans_much([summary["median"] for summary in summaries.values()]):
        axis.set_xscale("log")
    else:
        axis.locator_params(axis="x", nbins=5)
    axis.xaxis.set_major_formatter("{x:,.10g}")
    axis.set_yticks(range(len(names)), names if named else [""] * len(names))
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_title(f"{case['name']}:\n{with_unit(metric)}", loc="left")
    axis.margins(x=0.15)
    axis.grid(visible=True, axis="x")


def _dot(axis: Any, place: int, summary: SummaryDocument, digits: int, colour: str) -> None:
    median = summary["median"]
    low, high = _whiskers(summary)
    axis.errorbar([median], [place], xerr=[[low], [high]], fmt="o", color=colour, capsize=2)
    axis.annotate(
        f"{median:,.{digits}f}",
        (median + high, place),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        annotation_clip=False,
    )


def _summaries(case: CaseDocument, metric: MetricDocument) -> dict[str, SummaryDocument]:
    return case["summaries"].get(metric["name"], {})


def _whiskers(summary: SummaryDocument) -> tuple[float, float]:
    """From the median down to the lower and up to the upper quartile."""
    median = summary["median"]
    return median - summary["low_quartile"], summary["high_quartile"] - median


def _colour(name: str, cases: Sequence[CaseDocument]) -> str:
    if any(name == case["limit"] for case in cases):
        return _INK
    known = next((key for key in _COLOURS if name.startswith(key)), None)
    known = known or next((key for key in _COLOURS if key in name), None)
    if known is not None:
        return _COLOURS[known]
    others = dict.fromkeys(n for case in cases for n in case["candidates"])
    strangers = [n for n in others if not any(key in n for key in _COLOURS)]
    return _OTHERS[strangers.index(name) % len(_OTHERS)]
