"""What is on the terminal: lines, and below them a table. May be drawn on by several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from asupervise.views.live.painting import HIDE_CURSOR, SHOW_CURSOR, Drawn, Painter, end_of
from asupervise.views.live.rows import Size
from asupervise.views.live.spans import Line, Span
from asupervise.views.live.tty import Terminal

__all__ = ["Canvas"]


class Canvas:
    """Draws on a terminal, unless it belongs to a shell just now.

    Args:
        terminal: the terminal.
        draw: makes text of a line.
        begun: tells of lines that are not ended yet: they are shown above the table.
    """

    def __init__(
        self,
        terminal: Terminal,
        draw: Callable[[Line], Drawn],
        begun: Callable[[], Iterable[str]],
    ) -> None:
        self._terminal = terminal
        self._draw = draw
        self._begun = begun
        self._painter = Painter()
        # Whoever draws has it, also while the terminal makes him wait.
        self._turn = threading.Lock()
        self._table: tuple[Size, Sequence[Drawn]] = Size(0, 0), ()
        # Whether the terminal is given back for a while; whether it is (still, again) a shell's.
        self._paused = False
        self._away = True

    @property
    def is_stale(self) -> bool:
        """Whether the terminal has another size by now than the table was laid out for."""
        return self._terminal.size() != self._table[0]

    def lay(self, table: Iterable[Line], size: Size) -> None:
        """The table that is drawn from now on, and the size that it was laid out for."""
        self._table = size, [self._draw(line) for line in table]

    def show(self, lines: Callable[[], Sequence[bytes]], end: str = "") -> None:
        """Draw; for a thread that may wait.

        Args:
            lines: asked for what is to appear above the table, when it is our turn.
            end: written behind all.

        Raises:
            OSError: the terminal is gone.
        """
        with self._turn:
            self._terminal.write([*self._painted(lines()), end.encode()])

    def _painted(self, lines: Sequence[bytes]) -> list[bytes]:
        if self._paused or not self._terminal.in_foreground:
            # Lines may appear on a shell's terminal, as those of any program.
            self._away = True
            return list(lines)
        first = ""
        if self._away:
            self._away = False
            self._painter.forget_table()
            self._terminal.mute()
            first = HIDE_CURSOR
        size, table = self._table
        begun = [self._draw((Span(end_of(line, size.columns - 1)),)) for line in self._begun()]
        return [first.encode(), *self._painter.paint(lines, [*begun, *table], size)]

    # --- whose it is ----------------------------------------------------------------------------

    def pause(self) -> None:
        """Give it back for a while."""
        self._paused = True
        self._terminal.write_at_once(f"\r\n{SHOW_CURSOR}")
        self._terminal.unmute()

    def resume(self) -> None:
        """Take it again."""
        self._paused, self._away = False, True

    def hurry(self) -> None:
        """Whoever draws is not to wait any more."""
        self._terminal.hurry()

    def close(self) -> None:
        """Give it back for good."""
        self._terminal.write_at_once(SHOW_CURSOR)
        self._terminal.close()
