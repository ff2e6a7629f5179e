"""Text of a table: spans in styles, glyphs, numbers in few cells. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from rich.cells import cell_len, set_cell_size

from asupervise.views.live.rows import State

__all__ = ["ASCII", "UNICODE", "Glyphs", "Line", "Span", "cells", "cut", "fitted", "joined"]


class Span(NamedTuple):
    """Some text in one style."""

    text: str
    style: str = ""


Line = tuple[Span, ...]


class Glyphs(NamedTuple):
    """What is drawn with; a cell each, but for the ellipsis.

    Attributes:
        of: by state.
        full: of a bar, what is done.
        empty: likewise, what is left.
        rule: of the line above the table.
        ellipsis: where something was cut off.
    """

    of: dict[State, str]
    full: str
    empty: str
    rule: str
    ellipsis: str


UNICODE: Final = Glyphs(
    {
        State.FAILED: "✗",
        State.RESTARTING: "↻",
        State.QUIET: "○",
        State.ENDING: "◐",
        State.RUNNING: "●",
        State.WAITING: "·",
        State.ENDED: "■",
        State.DONE: "✓",
    },
    full="━",
    empty="─",
    rule="─",
    ellipsis="…",
)
ASCII: Final = Glyphs(
    {
        State.FAILED: "X",
        State.RESTARTING: "R",
        State.QUIET: "?",
        State.ENDING: "e",
        State.RUNNING: "*",
        State.WAITING: ".",
        State.ENDED: "-",
        State.DONE: "+",
    },
    full="#",
    empty=".",
    rule="-",
    ellipsis="...",
)


# --- text of a given width -----------------------------------------------------------------------


def cells(spans: Iterable[Span]) -> int:
    """How wide they are together."""
    return sum(cell_len(span.text) for span in spans)


def fitted(text: str, width: int, ellipsis: str) -> str:
    """The text, or as much of it as there is room for.

    Example:
        >>> fitted("a long line", 8, "...")
        'a lon...'
    """
    if cell_len(text) <= width:
        return text
    mark = ellipsis[: max(width, 0)]
    return set_cell_size(text, max(width - len(mark), 0)) + mark


def cut(line: Iterable[Span], width: int) -> Line:
    """No wider than that, whatever stands in it."""
    spans = []
    for text, style in line:
        size = cell_len(text)
        if size > width:
            text, size = set_cell_size(text, width), width
        width -= size
        if text:
            spans.append(Span(text, style))
    return tuple(spans)


def joined(spans: Iterable[Span]) -> Line:
    """Neighbours of one style as one."""
    together: list[Span] = []
    for span in spans:
        if together and together[-1].style == span.style:
            together[-1] = Span(together[-1].text + span.text, span.style)
        elif span.text:
            together.append(span)
    return tuple(together)


def bar(fraction: float, width: int, glyphs: Glyphs) -> tuple[Span, Span]:
    """How much is done, and what is left."""
    full = int(max(width, 0) * fraction)
    empty = max(width, 0) - full
    return Span(glyphs.full * full, "bar"), Span(glyphs.empty * empty, "left")


# --- numbers -------------------------------------------------------------------------------------


def clock(seconds: float | None) -> str:
    """As 0:07, 12:34, 1:02:03.

    Example:
        >>> clock(7), clock(3723)
        ('0:07', '1:02:03')
    """
    if seconds is None:
        return ""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def brief(seconds: float | None) -> str:
    """The same in seven cells at the most."""
    if seconds is None or seconds < 100 * 3600:
        return clock(seconds)
    days, rest = divmod(int(seconds), 86400)
    return f"{days}d{rest // 3600:02}h"


def rough(seconds: float) -> str:
    """One number and its unit.

    Example:
        >>> rough(59.9), rough(3600)
        ('59s', '1h')
    """
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds / size)}{unit}"
    return f"{int(seconds)}s"


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction * 100:.0f}%"


def memory(size: int | None) -> str:
    """As 345M, 1.2G.

    Example:
        >>> memory(3 << 20), memory(5 << 29), memory(200 << 30)
        ('3M', '2.5G', '200G')
    """
    if size is None:
        return ""
    amount = size / 2**20
    for unit in "MGTP":
        if amount < 1000:
            return f"{amount:.1f}{unit}" if amount < 10 and unit != "M" else f"{amount:.0f}{unit}"
        amount /= 1024
    return f"{amount:.0f}E"


def number(value: float) -> str:
    """As 1,200 or 0.25."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"
