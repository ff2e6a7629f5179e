"""A picture of a run into the lines of a table, for a terminal of any size. Pure.

Each line is spans of text with the name of a style, and never wider than asked for. Which style is
drawn how, is `views.live.painting`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from rich.cells import cell_len

from asupervise.views.live.columns import OVER, Columns
from asupervise.views.live.rows import NS, Picture, Row, State
from asupervise.views.live.spans import (
    UNICODE,
    Glyphs,
    Line,
    Span,
    bar,
    cells,
    clock,
    cut,
    fitted,
    joined,
    percent,
)
from asupervise.views.live.text import in_a_cell

__all__ = ["Layout", "lay_out", "room"]

# A worker whose state has changed so short ago is among those that are seen first.
_RECENT_S: Final = 10.0
# So much of a title is worth more than words in the same line.
_TITLE_CELLS: Final = 24
_STATES: Final = tuple(State)
_URGENT: Final = frozenset({State.FAILED, State.RESTARTING, State.QUIET})
# How many marks may stand in a line of the map: so that places can be counted.
_MARKS: Final = (128, 64, 32, 16, 8)


class Layout(NamedTuple):
    """A table.

    Attributes:
        lines: from above to below.
        rows: the workers that have a line of their own.
    """

    lines: list[Line]
    rows: Sequence[Row] = ()


def room(rows: int, lines: int) -> int:
    """How many lines a table of so many rows may have, on a terminal of so many lines.

    Example:
        >>> room(4, 24), room(256, 24), room(4, 3)
        (14, 12, 1)
    """
    # All that stands above the rows: title, progress, news, heads.
    fits = rows + 4 <= lines * 3 // 5
    return max(1, lines * 3 // 5 if fits else lines // 2)


def lay_out(picture: Picture, width: int, height: int, glyphs: Glyphs = UNICODE) -> Layout:
    """The lines of the table.

    Where there are more workers than lines, those are shown that somebody wants to look at, and all
    of them in a map, with one mark each.

    Args:
        picture: what there is to show.
        width: cells a line has at the most.
        height: lines there may be.
        glyphs: what is drawn with.
    """
    if width < 1 or height < 1:
        return Layout([])
    table = _Table(picture, width, glyphs)
    above, rows, below = _parts(table, height)
    lines = [*above, *map(table.columns.row, rows), *below]
    return Layout([cut(line, width) for line in lines[:height]], rows)


def _parts(table: _Table, height: int) -> tuple[list[Line], Sequence[Row], list[Line]]:
    """What there is room for: above the rows, the rows, and below them."""
    above, rows = [table.title()], table.picture.rows
    # What is most important takes its place first; some rows there are before the rest.
    news = table.news() if height > 2 else []
    left = height - 1 - len(news)
    progress = table.progress() if left > 2 else []
    left -= len(progress)
    above += [*progress, *news]
    if len(rows) + 1 <= left:
        return [*above, table.columns.heads()] if rows else above, rows, []
    marks = table.marks(left) if left > 2 else []
    left -= len(marks)
    heads = [table.columns.heads()] if left > 3 else []
    left -= len(heads)
    # The rest is counted where that costs no row that is needed more.
    chosen = _seen_first(table.picture)[: left - 1 if left > 2 else left]
    return [*above, *marks, *heads], chosen, table.rest(chosen) if left > 2 else []


def _seen_first(picture: Picture) -> list[Row]:
    """All rows, those first that a person wants to look at."""

    def order(row: Row) -> tuple[object, ...]:
        recent = row.changed_ns and picture.now_ns - row.changed_ns < _RECENT_S * NS
        urgent = row.state in _URGENT
        place = _STATES.index(row.state) if urgent else len(_STATES) - bool(recent)
        return not row.root_cause, place, row.state in OVER, row.group, row.rank

    return sorted(picture.rows, key=order)


class _Table:
    """Makes all lines but the rows, for one picture and one width."""

    def __init__(self, picture: Picture, width: int, glyphs: Glyphs) -> None:
        self.picture = picture
        self.columns = Columns(picture, width, glyphs)
        self._width = width
        self._glyphs = glyphs

    def title(self) -> Line:
        """What runs, how many are in which state, and since when."""
        rule = self._glyphs.rule
        end = self._ruled([f" {text} " for text in self._facts()])
        room = self._width - cells(end)
        name = in_a_cell(self.picture.title)
        counts = self._counts(words=True)
        # What the marks mean can be seen in the rows as well.
        if cells(counts) + min(cell_len(name), _TITLE_CELLS) + 5 > room:
            counts = self._counts(words=False)
        name = fitted(name, max(room - cells(counts) - 5, 0), self._glyphs.ellipsis)
        begin = [Span(rule * 2, "rule"), Span(f" {name} ", "title")] if name else []
        line = [*begin, *counts]
        fill = self._width - cells([*line, *end])
        return (*line, Span(rule * fill, "rule"), *end)

    def _facts(self) -> list[str]:
        picture = self.picture
        facts = []
        if picture.dropped:
            facts.append(f"{picture.dropped} events missed")
        if picture.round is not None:
            place, nodes, world = picture.round
            facts.append(f"round {place}, {nodes} nodes, {world} ranks")
        done, of = picture.restarts
        if done or of:
            facts.append(f"restarts {done}" if of is None else f"restarts {done}/{of}")
        facts.append(clock(picture.elapsed_s))
        return facts

    def _ruled(self, texts: Sequence[str]) -> list[Span]:
        """As many of the texts, the last first, as half of the line has room for."""
        spans: list[Span] = []
        room = self._width // 2
        for text in reversed(texts):
            room -= cell_len(text) + 1
            if room >= 0:
                spans[:0] = [Span(text), Span(self._glyphs.rule, "rule")]
        return spans

    def _counts(self, *, words: bool) -> list[Span]:
        spans = []
        for state in _STATES:
            if count := self.picture.counts.get(state, 0):
                word = f" {state.value}" if words else ""
                spans.append(Span(f" {self._glyphs.of[state]} {count}{word}", state.value))
        return [*spans, Span(" ")] if spans else []

    def progress(self) -> list[Line]:
        """How much of all work is done."""
        picture = self.picture
        if picture.fraction is None:
            return []
        left = f"  {clock(picture.left_s)} left" if picture.left_s is not None else ""
        text = f" {percent(picture.fraction)}{left}"
        return [(*bar(picture.fraction, self._width - cell_len(text), self._glyphs), Span(text))]

    def news(self) -> list[Line]:
        news = self.picture.news
        if news is None or not (text := in_a_cell(news.text)):
            return []
        if news.due_ns > self.picture.now_ns:
            text += f" in {math.ceil((news.due_ns - self.picture.now_ns) / NS)} s"
        text = fitted(text, self._width, self._glyphs.ellipsis)
        return [(Span(text, "bad" if news.is_bad else ""),)]

    def marks(self, height: int) -> list[Line]:
        """A map of all workers, in a part of so many lines."""
        rows = self.picture.rows
        label = max((cell_len(self.columns.name(row)) for row in rows), default=1)
        fitting = [count for count in _MARKS if label + count * 9 // 8 <= self._width]
        a_line = fitting[0] if fitting else max(self._width - label - 1, 1)
        lines = math.ceil(len(rows) / a_line)
        # Where one mark each is too much, one stands for several, and shows the worst of them.
        each = 1 if lines <= height // 2 else math.ceil(lines / max(height // 3, 1))
        marks = [rows[i : i + each] for i in range(0, len(rows), each)]
        return [self._marked(marks[i : i + a_line], label) for i in range(0, len(marks), a_line)]

    def _marked(self, marks: Sequence[Sequence[Row]], label: int) -> Line:
        spans = [Span(f"{self.columns.name(marks[0][0]):>{label}}", "dim")]
        for index, rows in enumerate(marks):
            if index % 8 == 0:
                spans.append(Span(" "))
            state = min((row.state for row in rows), key=_STATES.index)
            spans.append(Span(self._glyphs.of[state], state.value))
        return joined(spans)

    def rest(self, shown: Sequence[Row]) -> list[Line]:
        """Who is not shown in a row of their own."""
        keys = {row.key for row in shown}
        left = [row for row in self.picture.rows if row.key not in keys]
        if not left:
            return []
        counts = {state: sum(row.state is state for row in left) for state in _STATES}
        said = ", ".join(f"{count} {state.value}" for state, count in counts.items() if count)
        return [(Span(f"{self._glyphs.ellipsis} and {len(left)} more: {said}", "dim"),)]
