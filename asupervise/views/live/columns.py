"""The rows of a table: which columns a terminal has room for, and what stands in them. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from rich.cells import cell_len

from asupervise.views.live.rows import NS, Picture, Row, State, how_ended
from asupervise.views.live.spans import (
    Glyphs,
    Line,
    Span,
    bar,
    brief,
    cut,
    fitted,
    joined,
    memory,
    number,
    percent,
    rough,
)
from asupervise.views.live.text import in_a_cell

__all__ = ["OVER", "Columns"]

OVER: Final = frozenset({State.ENDED, State.DONE})
# Their words are worth a look.
_URGENT: Final = frozenset({State.FAILED, State.RESTARTING, State.QUIET, State.ENDING})
# Below this a last line says nothing.
_LINE_CELLS: Final = 16
# From such a width on, progress has its numbers, too; below the other it has no bar.
_WIDE, _NARROW = 120, 70
_ORDER: Final = ("UP", "CPU", "MEMORY", "GPU", "RESTARTS", "PROGRESS")


class _Column(NamedTuple):
    """One column.

    Attributes:
        head: what stands above it.
        width: its cells.
        cell: what stands in it.
        right: whether that stands at its right.
    """

    head: str
    width: int
    cell: Callable[[Row], Sequence[Span]]
    right: bool = False


class Columns:
    """Makes lines of rows, for one picture and one width."""

    def __init__(self, picture: Picture, width: int, glyphs: Glyphs) -> None:
        self._picture = picture
        self._width = width
        self._glyphs = glyphs
        self._several = len({row.group for row in picture.rows}) > 1
        self._columns = self._chosen()

    def name(self, row: Row) -> str:
        """The rank, after the group's name where there are several."""
        return f"{in_a_cell(row.group)}{row.rank}" if self._several else str(row.rank)

    def heads(self) -> Line:
        return self._line(lambda column: [Span(column.head, "head")])

    def row(self, row: Row) -> Line:
        line = self._line(lambda column: column.cell(row))
        if row.state not in OVER:
            return line
        return tuple(Span(text, style or "dim") for text, style in line)

    def _line(self, cell: Callable[[_Column], Sequence[Span]]) -> Line:
        spans: list[Span] = []
        for place, column in enumerate(self._columns):
            text = self._fitted(cell(column), column.width)
            pad = " " * (column.width - sum(cell_len(span.text) for span in text))
            before, after = (pad, "") if column.right else ("", pad)
            spans += [Span(f"{'  ' if place else ''}{before}"), *text, Span(after)]
        return joined(spans)

    def _fitted(self, spans: Sequence[Span], width: int) -> Iterable[Span]:
        if len(spans) > 1:
            return cut(spans, width)
        return [Span(fitted(text, width, self._glyphs.ellipsis), style) for text, style in spans]

    # --- which --------------------------------------------------------------------------------

    def _chosen(self) -> list[_Column]:
        """The columns that there is room for, and something to say in."""
        names = max((cell_len(self.name(row)) for row in self._picture.rows), default=1)
        fixed = [
            _text("RANK", min(max(names, 4), 20), self.name, right=True),
            _Column("STATE", 11, self._state),
        ]
        room = self._width - sum(column.width + 2 for column in fixed)
        chosen = []
        for column in self._wanted():
            if room - column.width - 2 >= _LINE_CELLS:
                chosen.append(column)
                room -= column.width + 2
        chosen.sort(key=lambda column: _ORDER.index(column.head))
        last = [_Column("LAST LINE", room, self._last)] if room >= _LINE_CELLS // 2 else []
        return [*fixed, *chosen, *last]

    def _wanted(self) -> list[_Column]:
        """Columns that are left out first stand last."""
        rows, now_ns = self._picture.rows, self._picture.now_ns
        columns = []
        if any(row.done is not None for row in rows):
            width = 34 if self._width >= _WIDE else 15 if self._width >= _NARROW else 8
            columns.append(_Column("PROGRESS", width, self._done))
        columns.append(_text("UP", 7, lambda row: brief(row.uptime_s(now_ns)), right=True))
        if any(row.cpu is not None or row.rss_bytes is not None for row in rows):
            columns.append(_text("CPU", 5, lambda row: percent(row.cpu), right=True))
            columns.append(_text("MEMORY", 6, lambda row: memory(row.rss_bytes), right=True))
        if any(row.gpu for row in rows):
            columns.append(_text("GPU", 12, lambda row: in_a_cell(row.gpu)))
        if any(row.restarts for row in rows):
            columns.append(_text("RESTARTS", 8, lambda row: str(row.restarts or ""), right=True))
        return columns

    # --- what stands in them --------------------------------------------------------------------

    def _state(self, row: Row) -> list[Span]:
        word = self._word(row)
        style = row.state.value
        glyph = Span(f"{self._glyphs.of[row.state]} ", style)
        return [glyph, Span(word, style if row.state in _URGENT else "")]

    def _word(self, row: Row) -> str:
        now_ns = self._picture.now_ns
        if row.state is State.FAILED:
            return how_ended(row)
        if row.state is State.QUIET:
            return f"quiet {rough(row.quiet_s(now_ns))}"
        if row.state is State.RESTARTING:
            wait_s = max(row.due_ns - now_ns, 0) / NS
            return f"in {math.ceil(wait_s)} s" if wait_s else "restart"
        return str(row.state.value)

    def _done(self, row: Row) -> list[Span]:
        if row.done is None:
            return []
        amount = number(row.done)
        if (fraction := row.fraction) is None:
            return [Span(amount)]
        if self._width < _NARROW:
            return [Span(f"{percent(fraction):>8}")]
        wide = self._width >= _WIDE
        text = f"  {amount}/{number(row.total or 0)}" if wide else ""
        bars = bar(fraction, 14 if wide else 10, self._glyphs)
        return [*bars, Span(f" {percent(fraction):>4}{text}")]

    def _last(self, row: Row) -> list[Span]:
        if row.message:
            return [Span(in_a_cell(row.message), "bad" if row.state is State.FAILED else "quiet")]
        return [Span(in_a_cell(row.last_line))]


def _text(head: str, width: int, text: Callable[[Row], str], *, right: bool = False) -> _Column:
    return _Column(head, width, lambda row: [Span(text(row))], right)
