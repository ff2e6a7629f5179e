"""Memory and CPU of the workers over a run's time, as pictures. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from asupervise.views.lives import Life, Sample
from asupervise.views.markup import Child, Html, tag
from asupervise.views.story import Run
from asupervise.views.timeline import ticks
from asupervise.views.words import share, size

__all__ = ["resources"]

# The size that a plot is drawn in; it is stretched to what there is.
_WIDTH: Final = 1000
_HEIGHT: Final = 160
# So many lines are told from each other; more are a band around their middle.
_MOST_LINES: Final = 24
_MOST_POINTS: Final = 400
_COLUMNS: Final = 60
_COLOURS: Final = 8
# An axis of CPUs that goes so far at least: who did nothing is to look like it.
_LEAST: Final = 0.1

Point = tuple[float, float]


class Line(NamedTuple):
    """What one start of a worker used over time."""

    life: Life
    points: tuple[Point, ...]


def resources(run: Run) -> Html | None:
    """The section; None where nobody has looked at what the workers used."""
    length_s = run.duration_s or 0.0
    lives = [life for life in run.lives if life.samples]
    if not lives or not length_s:
        return None
    memory = [Line(life, _memory(life.samples)) for life in lives]
    cpu = [Line(life, _cpu(life)) for life in lives]
    return tag(
        "section",
        tag("h2", "Memory and CPU"),
        tag(
            "div",
            _plot("Resident memory of each worker", memory, run, _memory_step, size),
            _plot("CPUs that each worker kept busy", cpu, run, _number_step, lambda n: f"{n:.3g}"),
            class_="plots",
        ),
        _names(memory, run),
        id="resources",
    )


def _names(lines: Sequence[Line], run: Run) -> Html | None:
    """Which colour is whose, where there are few."""
    ranks = sorted({line.life.rank for line in lines})
    if not 1 < len(ranks) <= _COLOURS:
        return None
    culprit = run.culprit.rank if run.culprit is not None else None
    items = []
    for rank in ranks:
        css = "culprit" if rank == culprit else f"c{rank % _COLOURS}"
        items.append(tag("li", tag("i", class_=f"line {css}"), f"rank {rank}"))
    return tag("ul", items, class_="legend")


def _memory(samples: Sequence[Sample]) -> tuple[Point, ...]:
    return _thinned([(sample.at_s, float(sample.rss_bytes)) for sample in samples])


def _cpu(life: Life) -> tuple[Point, ...]:
    """How many CPUs it kept busy between two looks, drawn as steps."""
    start_s = life.samples[0].at_s if life.start_s is None else life.start_s
    steps: list[Point] = []
    for sooner, later in pairwise([Sample(start_s, 0, 0.0), *life.samples]):
        took_s = later.at_s - sooner.at_s
        if took_s > 0:
            busy = max(0.0, later.cpu_s - sooner.cpu_s) / took_s
            steps += [(sooner.at_s, busy), (later.at_s, busy)]
    return _thinned(steps)


def _thinned(points: list[Point]) -> tuple[Point, ...]:
    if len(points) <= _MOST_POINTS:
        return tuple(points)
    # The largest of each stretch: a peak must not be lost.
    stretch = math.ceil(len(points) / _MOST_POINTS)
    parts = (points[i : i + stretch] for i in range(0, len(points), stretch))
    return tuple(max(part, key=lambda point: point[1]) for part in parts)


def _number_step(top: float) -> float:
    power = 10.0 ** math.floor(math.log10(top / 3))
    return next(step * power for step in (1, 2, 5, 10) if top / (step * power) <= 3)


def _memory_step(top: float) -> float:
    return 2.0 ** math.ceil(math.log2(top / 3))


def _plot(
    title: str,
    lines: Sequence[Line],
    run: Run,
    step_of: Callable[[float], float],
    said: Callable[[float], str],
) -> Html:
    length_s = run.duration_s or 1.0
    most = max((value for line in lines for _, value in line.points), default=0.0)
    step = step_of(max(most, _LEAST))
    top = step * max(1, math.ceil(max(most, _LEAST) / step - 1e-9))
    scale = (_WIDTH / length_s, _HEIGHT / top)
    levels = [n * step for n in range(round(top / step) + 1)]
    labels = [tag("span", said(level) if level else "0") for level in reversed(levels)]
    return tag(
        "figure",
        tag("figcaption", title, tag("small", f"at most {said(most)}")),
        tag("div", labels, class_="levels"),
        tag(
            "svg",
            [_grid(level, scale[1]) for level in levels],
            _curves(lines, run, scale),
            viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
            preserveAspectRatio="none",
            role="img",
            aria_label=f"{title}, at most {said(most)}",
        ),
        tag("svg", _axis(length_s), class_="axis", width="100%", height=18, aria_hidden="true"),
        class_="graph",
    )


def _grid(level: float, scale: float) -> Html:
    return tag("path", d=f"M0 {_y(level, scale)}H{_WIDTH}", class_="grid")


def _axis(length_s: float) -> Iterator[Html]:
    for at_s, label in ticks(length_s, 5):
        anchor = "start" if at_s == 0 else "end" if at_s > 0.93 * length_s else "middle"
        yield tag("text", label, x=share(at_s, length_s), y=14, text_anchor=anchor)


def _y(value: float, scale: float) -> str:
    return f"{_HEIGHT - value * scale:.1f}"


def _path(points: Sequence[Point], scale: Point) -> str:
    return "M" + "L".join(f"{at_s * scale[0]:.1f} {_y(value, scale[1])}" for at_s, value in points)


def _curves(lines: Sequence[Line], run: Run, scale: Point) -> Child:
    rank = run.culprit.rank if run.culprit is not None else None
    culprit = [line for line in lines if line.life.rank == rank]
    rest = [line for line in lines if line.life.rank != rank]
    if len(lines) > _MOST_LINES:
        return [_band(lines, scale), *(_curve(line, scale, "curve culprit") for line in culprit)]
    return [
        *(_curve(line, scale, f"curve c{line.life.rank % _COLOURS}") for line in rest),
        *(_curve(line, scale, "curve culprit") for line in culprit),
    ]


def _curve(line: Line, scale: Point, css: str) -> Html:
    if not line.points:
        return tag("g")
    life = line.life
    attempt = f", attempt {life.attempt}" if life.attempt else ""
    title = tag("title", f"rank {life.rank}{attempt}")
    if len(line.points) == 1:
        # A point: a line of no length with round ends.
        return tag("path", title, d=f"{_path(line.points, scale)}h0.01", class_=f"{css} dot")
    return tag("path", title, d=_path(line.points, scale), class_=css)


def _band(lines: Sequence[Line], scale: Point) -> Child:
    """From the least to the most that any of many workers used, and the middle one."""
    width_s = _WIDTH / scale[0] / _COLUMNS
    columns: dict[int, list[float]] = {}
    for line in lines:
        for at_s, value in line.points:
            columns.setdefault(int(at_s / width_s), []).append(value)
    found = [((number + 0.5) * width_s, sorted(columns[number])) for number in sorted(columns)]
    upper = [(at_s, values[-1]) for at_s, values in found]
    lower = [(at_s, values[0]) for at_s, values in reversed(found)]
    middle = [(at_s, values[len(values) // 2]) for at_s, values in found]
    title = tag("title", f"from the least to the most of {len(lines):,} workers")
    dot = " dot" if len(middle) == 1 else ""
    return [
        tag("path", title, d=f"{_path([*upper, *lower], scale)}z", class_="range"),
        tag("path", d=_path(middle, scale) + ("h0.01" if dot else ""), class_=f"curve{dot}"),
    ]
