"""All ranks and attempts of a run over its time, as a picture. Pure.

Positions are in per cent of the width and heights in pixels: so neither text nor lines are scaled,
whatever the width of the window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from asupervise.views.happenings import Happening
from asupervise.views.lives import Life
from asupervise.views.markup import Html, tag
from asupervise.views.plain import one_line, ranks_text
from asupervise.views.story import Run
from asupervise.views.words import count, duration, how_ended, offset, share

__all__ = ["Row", "rows_of", "ticks", "timeline"]

_MOST_ROWS: Final = 40
_MOST_BARS: Final = 2000
# Starts and ends that differ by less than this part of the whole look the same.
_LOOKS_EQUAL: Final = 50
_LANE_PX: Final = 26
_STEPS: Final = (1, 2, 5)
_CLOCK_STEPS: Final = (60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400)
_MARKS: Final = {
    "signal": "M-4 3 0-4 4 3z",
    "kill": "M-4-4 4 4M4-4-4 4",
    "stacks": "M-4-3H4M-4 0H4M-4 3H4",
    "restart": "M-3-4 4 0-3 4z",
    "round": "M0-4 4 0 0 4-4 0z",
    "lost": "M0-4 4 0 0 4-4 0z",
    "warn": "M0-4 4 4H-4z",
}
_MARK_NAMES: Final = {
    "signal": "signal", "kill": "SIGKILL", "stacks": "stacks taken", "restart": "restart",
    "round": "round", "lost": "node lost", "warn": "warning",
}  # fmt: skip
_BAR_NAMES: Final = {
    "succeeded": "succeeded", "failed": "failed", "ended": "ended by the supervisor",
    "open": "no end known",
}  # fmt: skip


class Row(NamedTuple):
    """One rank, or several with the same fate.

    Attributes:
        ranks: over all nodes.
        lives: of the first of them, or what stands for all.
    """

    ranks: tuple[int, ...]
    lives: tuple[Life, ...]


def rows_of(lives: Sequence[Life], length_s: float, most: int = _MOST_ROWS) -> list[Row]:
    """The lives by rank; where these are many, ranks that fared the same are one row.

    Those that failed by themselves come first then.
    """
    by_rank: dict[int, list[Life]] = {}
    for life in lives:
        by_rank.setdefault(life.rank, []).append(life)
    if len(by_rank) <= most:
        return [Row((rank,), tuple(own)) for rank, own in sorted(by_rank.items())]
    groups: dict[object, list[int]] = {}
    for rank, own in sorted(by_rank.items()):
        groups.setdefault(tuple(_look(life, length_s) for life in own), []).append(rank)
    rows = [Row(tuple(ranks), _together(ranks, by_rank)) for ranks in groups.values()]
    rows.sort(key=lambda row: (not _has_failed(row), row.ranks))
    if len(rows) > most:
        rest = [rank for row in rows[most - 1 :] for rank in row.ranks]
        rows[most - 1 :] = [Row(tuple(sorted(rest)), _together(rest, by_rank))]
    return rows


def _has_failed(row: Row) -> bool:
    return any(life.outcome == "failed" for life in row.lives)


def _look(life: Life, length_s: float) -> tuple[object, ...]:
    places = (life.start_s, life.end_s)
    return (
        life.attempt,
        life.outcome,
        *(None if at is None else round(_LOOKS_EQUAL * at / (length_s or 1)) for at in places),
    )


def _together(ranks: Sequence[int], by_rank: dict[int, list[Life]]) -> tuple[Life, ...]:
    """One life an attempt, from the first start to the last end."""
    first = {life.attempt: life for life in by_rank[ranks[0]]}
    for rank in ranks[1:]:
        for life in by_rank[rank]:
            one = first.setdefault(life.attempt, life)
            starts = [s for s in (one.start_s, life.start_s) if s is not None]
            ends = [s for s in (one.end_s, life.end_s) if s is not None]
            first[life.attempt] = one._replace(
                start_s=min(starts, default=None), end_s=max(ends, default=None)
            )
    return tuple(first[attempt] for attempt in sorted(first))


def timeline(run: Run, told: Sequence[Happening]) -> Html | None:
    """The picture; None where no time is known."""
    length_s = run.duration_s
    if length_s is None or not any(life.start_s is not None for life in run.lives):
        return None
    rows = rows_of(run.lives, length_s)
    row_px = 24 if len(rows) <= 12 else 18
    marks = [each for each in told if each.kind in _MARKS]
    labels = [tag("span", "group", class_="lane"), *map(_label, rows)]
    return tag(
        "section",
        tag("h2", "Timeline"),
        tag(
            "div",
            tag("div", labels, class_="labels", data_rows="tall" if row_px == 24 else "low"),
            _plot(run, rows, row_px, marks),
            class_="chart",
        ),
        _legend(rows, marks),
        id="timeline",
    )


def _label(row: Row) -> Html:
    if len(row.ranks) == 1:
        return tag("a", f"rank {row.ranks[0]}", href=f"#rank-{row.ranks[0]}")
    return tag("span", tag("b", f"{len(row.ranks):,} ranks"), " ", ranks_text(row.ranks, 3),
               title=ranks_text(row.ranks, 200))  # fmt: skip


def _plot(run: Run, rows: Sequence[Row], row_px: int, marks: Sequence[Happening]) -> Html:
    length_s = run.duration_s or 0.0
    height = _LANE_PX + row_px * len(rows)
    left = _MOST_BARS // len(rows)
    bars = [
        [_bar(life, row, length_s, _LANE_PX + row_px * index, row_px) for life in row.lives[-left:]]
        for index, row in enumerate(rows)
    ]
    return tag(
        "svg",
        tag("defs", [tag("path", id=f"m-{kind}", d=path) for kind, path in _MARKS.items()]),
        _bands(run, height),
        _axis(length_s, height),
        bars,
        _mark_lane(marks, length_s, height),
        class_="plot",
        width="100%",
        height=height + 20,
        role="img",
        aria_label=f"when each worker ran, over {duration(length_s)}",
    )


def _bands(run: Run, height: int) -> Iterator[Html]:
    if len(run.attempts) < 2:
        return
    length_s = run.duration_s or 0.0
    for attempt in run.attempts:
        end_s = length_s if attempt.end_s is None else attempt.end_s
        yield tag(
            "rect", tag("title", f"attempt {attempt.number}"),
            x=share(attempt.start_s, length_s), y=0, height=height,
            width=share(end_s - attempt.start_s, length_s), class_="band",
        )  # fmt: skip


def _axis(length_s: float, height: int) -> Iterator[Html]:
    for at_s, label in ticks(length_s):
        x = share(at_s, length_s)
        yield tag("line", x1=x, x2=x, y1=0, y2=height, class_="grid")
        anchor = "start" if at_s == 0 else "end" if at_s > 0.93 * length_s else "middle"
        yield tag("text", label, x=x, y=height + 15, text_anchor=anchor)


def ticks(length_s: float, most: int = 6) -> list[tuple[float, str]]:
    """Where an axis of time is marked, and how.

    Example:
        >>> [label for _, label in ticks(0.14)]
        ['0', '50 ms', '0.1 s']
        >>> [label for _, label in ticks(420)]
        ['0', '2 min', '4 min', '6 min']
    """
    if not 0 < length_s < math.inf:
        return [(0.0, "0")]
    if length_s >= 240:
        step = next((s for s in _CLOCK_STEPS if length_s / s < most), 0.0)
        step = step or 86400.0 * math.ceil(length_s / 86400 / most)
    else:
        power = 10.0 ** math.floor(math.log10(length_s / most))
        step = next(s * power for s in (*_STEPS, 10) if length_s / (s * power) < most)
    numbers = range(int(length_s / step) + 1)
    return [(n * step, duration(n * step) if n else "0") for n in numbers]


def _bar(life: Life, row: Row, length_s: float, y: int, row_px: int) -> Html | None:
    if life.start_s is None:
        return None
    end_s = length_s if life.end_s is None else max(life.end_s, life.start_s)
    x, width = share(life.start_s, length_s), share(end_s - life.start_s, length_s)
    thick = row_px - 8
    return tag(
        "g",
        tag("title", _title(life, row)),
        tag("rect", x=x, y=y + 4, width=width, height=thick, rx=2, class_=f"bar {life.outcome}"),
        [_gap(gap, length_s, y, thick) for gap in life.gaps],
        _tick(life.first_output_s, length_s, y, thick),
        tag(
            "use",
            href="#m-kill",
            x=share(end_s, length_s),
            y=y + 4 + thick // 2,
            transform="translate(7)",
            class_="cross",
        )
        if life.outcome == "failed"
        else None,
    )


def _title(life: Life, row: Row) -> str:
    who = f"rank {life.rank}" if len(row.ranks) == 1 else count(len(row.ranks), "rank")
    attempt = f", attempt {life.attempt}" if life.attempt else ""
    ran = "" if life.end_s is None or life.start_s is None else (
        f" after {duration(life.end_s - life.start_s)}")  # fmt: skip
    what = one_line(life.failure.cause or life.failure.message, 120) if life.failure else ""
    by_us = " by the supervisor" if life.outcome == "ended" else ""
    return f"{who}{attempt}: {how_ended(life)}{by_us}{ran}{': ' if what else ''}{what}"


def _gap(gap: tuple[float, float], length_s: float, y: int, thick: int) -> Html:
    text = f"no heartbeat for {duration(gap[1] - gap[0])}"
    return tag(
        "rect", tag("title", text), class_="gap", height=thick, y=y + 4,
        x=share(gap[0], length_s), width=share(gap[1] - gap[0], length_s),
    )  # fmt: skip


def _tick(at_s: float | None, length_s: float, y: int, thick: int) -> Html | None:
    if at_s is None:
        return None
    x = share(at_s, length_s)
    title = tag("title", f"first output at {offset(at_s)}")
    return tag("line", title, x1=x, x2=x, y1=y + 4, y2=y + 4 + thick, class_="first")


def _mark_lane(marks: Iterable[Happening], length_s: float, height: int) -> Iterator[Html]:
    for mark in marks:
        x = share(mark.at_s, length_s)
        if mark.kind in ("signal", "kill", "restart"):
            yield tag("line", x1=x, x2=x, y1=_LANE_PX // 2, y2=height, class_=f"when {mark.kind}")
        yield tag(
            "use", tag("title", f"{offset(mark.at_s)}: {mark.text}"), href=f"#m-{mark.kind}",
            x=x, y=_LANE_PX // 2, class_=f"mark {mark.kind}",
        )  # fmt: skip


def _legend(rows: Sequence[Row], marks: Sequence[Happening]) -> Html:
    lives = [life for row in rows for life in row.lives]
    bars = {life.outcome for life in lives}
    names = _BAR_NAMES | ({"open": "running"} if any(life.alive for life in lives) else {})
    parts = [
        tag("li", tag("i", class_=f"swatch {outcome}"), name)
        for outcome, name in names.items()
        if outcome in bars
    ]
    if any(life.first_output_s is not None for life in lives):
        parts.append(tag("li", tag("i", class_="swatch first"), "first output"))
    if any(life.gaps for life in lives):
        parts.append(tag("li", tag("i", class_="swatch gap"), "no heartbeat"))
    seen = {mark.kind for mark in marks}
    for kind, name in _MARK_NAMES.items():
        if kind in seen:
            sign = tag("svg", tag("use", href=f"#m-{kind}", x=7, y=7, class_=f"mark {kind}"),
                       width=14, height=14, aria_hidden="true")  # fmt: skip
            parts.append(tag("li", sign, name))
    return tag("ul", parts, class_="legend")
