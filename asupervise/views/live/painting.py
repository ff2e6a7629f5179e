"""What is written to a terminal so that lines scroll above a table. Pure: text in, text out.

The table is redrawn over itself; where lines are to appear it is wiped, they are written in its
place, and it is drawn again below them. They go where all that a program writes goes: into the
terminal's own history. The cursor stays hidden at the table's end.

rich.live.Live does the same, but lays out anew for each line that is printed, writes from the
calling thread, and leaves a mess where the terminal's width changes: a table that was drawn for a
wider one is then broken into more lines than it had. Here the last lines are kept, and all of the
screen is drawn anew.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from rich.cells import cell_len, chop_cells
from rich.color import ColorSystem
from rich.style import Style

from asupervise.views.live.rows import Size
from asupervise.views.live.spans import Line

__all__ = ["Drawn", "Painter", "drawer", "end_of"]

HIDE_CURSOR: Final = "\x1b[?25l"
SHOW_CURSOR: Final = "\x1b[?25h"
# Synchronised output: who knows it shows all or nothing of what stands between; others ignore it.
_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"
_TO_LINE_END: Final = "\x1b[K"
_TO_SCREEN_END: Final = "\x1b[J"
# Lines are wiped by deleting them: where a terminal is asked to clear all from its first cell on,
# some keep a copy (tmux, "scroll-on-clear").
_HOME: Final = "\x1b[H"
# Enough to fill a large screen once more.
_TAIL_BYTES: Final = 64 * 1024
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")

_STYLES: Final = {
    "title": "bold",
    "head": "dim",
    "rule": "dim",
    "dim": "dim",
    "failed": "bold red",
    "bad": "red",
    "restarting": "magenta",
    "quiet": "yellow",
    "running": "green",
    "waiting": "dim",
    "ending": "yellow",
    "ended": "dim",
    "done": "cyan",
    "bar": "green",
    "left": "dim",
}


class Drawn(NamedTuple):
    """A line of the table as it is written.

    Attributes:
        text: with its colours.
        cells: how wide it is.
    """

    text: str
    cells: int


def drawer(*, coloured: bool) -> Callable[[Line], Drawn]:
    """What draws a line.

    Only the sixteen colours that a person has chosen for his terminal: they can be read on its
    background, whatever that is.

    Args:
        coloured: whether there are any, and not only bold and dim text.
    """
    marks = {name: _marks(style, coloured) for name, style in _STYLES.items()}
    nothing = "", ""

    def draw(line: Line) -> Drawn:
        parts, cells = [], 0
        for text, style in line:
            before, after = marks.get(style, nothing)
            parts.append(f"{before}{text}{after}")
            cells += cell_len(text)
        return Drawn("".join(parts), cells)

    return draw


def _marks(style: str, coloured: bool) -> tuple[str, str]:
    """What stands before and after text in a style."""
    parsed = Style.parse(style)
    rendered = (parsed if coloured else parsed.without_color).render(
        "\0", color_system=ColorSystem.STANDARD
    )
    before, _, after = rendered.partition("\0")
    return before, after


class Painter:
    """Knows what is on the screen, and says what is to be written to change it."""

    def __init__(self) -> None:
        self._drawn: tuple[Drawn, ...] = ()
        self._size: Size | None = None
        # The last lines above the table, in pieces, and how long those are together.
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        # Whether all of the screen was drawn by us: then it may be drawn anew.
        self._is_ours = False

    def paint(self, lines: Sequence[bytes], table: Sequence[Drawn], size: Size) -> list[bytes]:
        """Show lines above the table, and the table: what is to be written, in pieces.

        Args:
            lines: whole lines, harmless ones, in pieces.
            table: its lines, each narrower than the terminal.
            size: of the terminal, now.
        """
        rows = len(self._drawn)
        if self._size not in (None, size):
            begin = self._all_anew(size, len(table))
        else:
            # Where nothing is written above it, it is drawn over itself, and does not flicker.
            begin = _up(rows - 1) + (_delete_lines(rows) if any(lines) else "")
        end = f"{_TO_LINE_END}\r\n".join(line.text for line in table)
        # After the last line too, and below it: there may have been more of them.
        end += f"{_TO_LINE_END if table else ''}{_TO_SCREEN_END}{_END}"
        self._drawn, self._size = tuple(table), size
        self._keep(lines)
        return [f"{_BEGIN}{begin}".encode(), *lines, end.encode()]

    def _keep(self, lines: Sequence[bytes]) -> None:
        self._tail += lines
        self._tail_bytes += sum(map(len, lines))
        while self._tail and self._tail_bytes - len(self._tail[0]) >= _TAIL_BYTES:
            self._tail_bytes -= len(self._tail.popleft())

    def forget_table(self) -> None:
        """It stays where it is; the next one is drawn below what somebody else writes."""
        self._drawn = ()
        self._is_ours = False

    def _all_anew(self, size: Size, below: int) -> str:
        """The last lines, on a screen on which nobody knows what stands where."""
        lines, fill = self._last_lines(size, max(size.lines - below, 0))
        away = "" if fill or self._is_ours else self._all_away(size)
        self._is_ours = True
        return "".join([away, _HOME, *lines])

    def _all_away(self, size: Size) -> str:
        """What is on the screen goes into the terminal's history, as well as may be without us."""
        assert self._size is not None
        columns = min(size.columns, self._size.columns)
        # Most terminals have broken lines that are too wide by now.
        rows = sum(_rows(line.cells, columns) for line in self._drawn)
        rows = min(rows, size.lines)
        newlines = "\n" * size.lines
        return f"{_up(rows - 1)}{_delete_lines(rows)}\x1b[{size.lines};1H{newlines}"

    def _last_lines(self, size: Size, room: int) -> tuple[list[str], bool]:
        """The last lines, for so many rows, and whether they fill them."""
        lines: list[str] = []
        tail = b"".join(self._tail)[-_TAIL_BYTES:].decode("utf-8", "replace")
        for line in reversed(tail.split("\n")[:-1]):
            plain = _COLOUR.sub("", line).expandtabs()
            cells = cell_len(plain)
            rows = _rows(cells, size.columns)
            if rows > room:
                # The screen begins in the middle of it.
                end = chop_cells(plain, size.columns)[-room:] if room else []
                first = [_ended(row, cell_len(row), size) for row in end]
                return [*first, *reversed(lines)], True
            room -= rows
            lines.append(_ended(line, cells, size))
        return lines[::-1], not room


def end_of(text: str, cells: int) -> str:
    """The text; of one that is too long, the end, where more will be written."""
    text = text[-cells:] if cells > 0 else ""
    while (excess := cell_len(text) - cells) > 0:
        # No character is wider than two.
        text = text[(excess + 1) // 2 :]
    return text


def _up(lines: int) -> str:
    return f"\r\x1b[{lines}A" if lines > 0 else "\r"


def _ended(line: str, cells: int, size: Size) -> str:
    """A line, and nothing behind it."""
    # Behind a last cell that is taken, the terminal would wipe that.
    fills = cells and cells % size.columns == 0
    return f"{line}{'' if fills else _TO_LINE_END}\r\n"


def _delete_lines(count: int) -> str:
    return f"\x1b[{count}M" if count > 0 else ""


def _rows(cells: int, columns: int) -> int:
    return max(1, -(-cells // max(columns, 1)))
