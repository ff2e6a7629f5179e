"""Keeps a table on a terminal: hears of events, decides when to draw, and draws.

One task hears of events, another draws; all that may have to wait for the terminal or for a disk is
in one thread. The table is laid out a few times a second at the most, however much is told and
written: lines that come meanwhile are shown above the table as it was.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, NamedTuple

from asupervise.bus import Subscription
from asupervise.views.live.above import Above
from asupervise.views.live.board import Board
from asupervise.views.live.gpu_use import GpuUse
from asupervise.views.live.last_lines import LastLines
from asupervise.views.live.layout import Layout, lay_out, room
from asupervise.views.live.painting import HIDE_CURSOR, SHOW_CURSOR, Drawn, Painter, end_of
from asupervise.views.live.rows import Size
from asupervise.views.live.spans import UNICODE, Glyphs, Line, Span
from asupervise.views.live.tty import Terminal

__all__ = ["LiveView", "Look"]

# So often the table is laid out anew at the most, where something has changed...
_TABLE_S: Final = 0.125
# ... and so often in any case: clocks go on.
_TICK_S: Final = 1.0
# Lines that come one by one are put together for so long, unless there are as many as this.
_LINES_S: Final = 0.04
_LINES_CHARS: Final = 32 * 1024
# Who has more than that waiting waits for the terminal.
_WAITING_CHARS: Final = 256 * 1024

Key = tuple[str, int]
Lines = Mapping[Key, str]


class Look(NamedTuple):
    """How it looks.

    Attributes:
        draw: makes text of a line of the table.
        glyphs: what is drawn with.
        colours: whether the workers' colours stay.
    """

    draw: Callable[[Line], Drawn]
    glyphs: Glyphs = UNICODE
    colours: bool = True


class LiveView:
    """A table that is on a terminal; made by :func:`live_view`.

    Attributes:
        streams: by name, what is to stand in the place of those in `sys`.

    Args:
        board: what there is to show.
        heard: what it is told.
        terminal: where.
        look: how it looks.
        streams: the names of those in `sys` that end there.
        gpus: tells of the GPUs; None where there are none.
    """

    def __init__(
        self,
        board: Board,
        heard: Subscription,
        terminal: Terminal,
        look: Look,
        streams: Sequence[str] = (),
        gpus: GpuUse | None = None,
    ) -> None:
        self._board = board
        self._heard = heard
        self._terminal = terminal
        self._look = look
        self._gpus = gpus
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="asupervise-live")
        self._painter = Painter()
        self._last_lines: LastLines[Key] = LastLines()
        self.streams = {name: Above(self, colours=look.colours) for name in streams}
        self._waiting = _Waiting(self._stir)
        self._stirred = asyncio.Event()
        self._layout = Layout([])
        self._table: list[Drawn] = []
        self._size = Size(0, 0)
        # Whether something has happened since the table was laid out, and when that was.
        self._changed = True
        self._laid_out_s = self._painted_s = 0.0
        # Whether the terminal is given back for a while; whether it is (still, again) the shell's.
        self._paused = False
        self._away = True
        self._ending = False
        self._tasks: list[asyncio.Task[None]] = []

    # --- what others do -------------------------------------------------------------------------

    def take(self, lines: str) -> None:
        """Show lines above the table, soon; may be called in any thread."""
        self._waiting.add(lines)

    async def wait_taken(self) -> None:
        """Return when more lines may come.

        Raises:
            OSError: the terminal is gone.
        """
        await self._waiting.wait_taken()

    def resized(self) -> None:
        """The terminal may have another size; without this it is seen within a second."""
        self._layout_soon()

    def pause(self) -> None:
        """Give the terminal back, because this process is about to be stopped."""
        self._paused = True
        self._terminal.write_at_once(f"\r\n{SHOW_CURSOR}")
        self._terminal.unmute()

    def resume(self) -> None:
        """Take the terminal again."""
        self._paused, self._away = False, True
        self._layout_soon()

    # --- its life -------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        if self._gpus is not None:
            self._gpus.start()
        self._tasks = [
            self._loop.create_task(self._hear(), name="asupervise: live view, events"),
            self._loop.create_task(self._paint_on(), name="asupervise: live view"),
        ]

    async def end(self) -> None:
        """Show the last state, and leave it there. May wait for the terminal; see :meth:`close`."""
        self._ending = True
        self._stirred.set()
        await asyncio.wait({self._tasks[1]})
        for event in self._heard.take():
            self._board.tell(event)
        self._heard.close()
        await asyncio.wait(self._tasks)
        with suppress(OSError):
            await self._last_paint()

    def hurry(self) -> None:
        """Wait for the terminal no more."""
        self._terminal.cancel()

    def close(self) -> None:
        """Give the terminal back; after :meth:`end`."""
        self._thread.shutdown()
        self._terminal.write_at_once(SHOW_CURSOR)
        self._terminal.close()
        if self._gpus is not None:
            self._gpus.stop()

    async def _hear(self) -> None:
        while await self._heard.wait():
            for event in self._heard.take():
                self._board.tell(event)
            self._board.dropped = self._heard.dropped
            self._layout_soon()

    def _layout_soon(self) -> None:
        if not self._changed:
            self._changed = True
            self._stir()

    def _stir(self) -> None:
        self._stirred.set()

    # --- when ---------------------------------------------------------------------------------

    async def _paint_on(self) -> None:
        while not self._ending:
            left_s = self._due_s() - self._loop.time()
            if left_s > 0:
                self._stirred.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(left_s):
                        await self._stirred.wait()
                continue
            try:
                await self._paint()
            except OSError as exc:
                # The terminal is gone: whoever has lines for it is told.
                self._waiting.give_up(exc)
                return

    def _due_s(self) -> float:
        """When to paint next, on the loop's clock."""
        if self._waiting.chars >= _LINES_CHARS:
            return self._painted_s
        due = self._laid_out_s + (_TABLE_S if self._changed else _TICK_S)
        if self._waiting.touched:
            due = min(due, self._painted_s + _LINES_S)
        return due

    # --- what -----------------------------------------------------------------------------------

    async def _paint(self) -> None:
        """Draw what there is; the last lines are looked at meanwhile, for the next time."""
        self._painted_s = self._loop.time()
        size = self._terminal.size()
        due_s = self._laid_out_s + (_TABLE_S if self._changed else _TICK_S)
        lays_out = self._painted_s >= due_s or size != self._size
        if lays_out:
            self._lay_out(size)
        text = self._waiting.take_all()
        data = self._painted(text, size)
        lines = await self._in_thread(data, look=lays_out)
        # Who has written something has another last line, most likely.
        if self._board.lines_seen(lines, time.monotonic_ns()) or text:
            self._changed = True

    async def _last_paint(self) -> None:
        self._board.lines_seen(await self._in_thread("", look=True), time.monotonic_ns())
        size = self._terminal.size()
        self._lay_out(size)
        text = self._painted(self._waiting.take_all(), size)
        await self._in_thread(f"{text}{SHOW_CURSOR}\r\n", look=False)

    def _lay_out(self, size: Size) -> None:
        self._changed = False
        self._laid_out_s = self._loop.time()
        self._size = size
        if self._gpus is not None:
            self._board.gpus_seen(self._gpus.latest)
        picture = self._board.picture(time.monotonic_ns())
        height = room(len(picture.rows), size.lines)
        # A cell less than there are: behind a line that fills its row terminals differ.
        self._layout = lay_out(picture, size.columns - 1, height, self._look.glyphs)
        self._table = [self._look.draw(line) for line in self._layout.lines]

    def _painted(self, text: str, size: Size) -> str:
        if self._paused or not self._terminal.in_foreground:
            # The terminal is the shell's: lines may appear there, as those of any program.
            self._away = True
            return text
        begin = ""
        if self._away:
            self._away = False
            self._painter.forget_table()
            self._terminal.mute()
            begin = HIDE_CURSOR
        begun = [each.unfinished for each in self.streams.values() if each.unfinished]
        above = [self._look.draw((Span(end_of(line, size.columns - 1)),)) for line in begun]
        return begin + self._painter.paint(text, [*above, *self._table], size)

    async def _in_thread(self, data: str, *, look: bool) -> Lines:
        rows = self._layout.rows if look else ()
        files = {row.key: row.files for row in rows if row.files}
        return await self._loop.run_in_executor(self._thread, self._write_and_look, data, files)

    def _write_and_look(self, data: str, files: Mapping[Key, Sequence[str]]) -> Lines:
        self._terminal.write(data)
        return self._last_lines.read(files) if files else {}


class _Waiting:
    """Lines that wait to be shown.

    Args:
        stir: called in the event loop when there is something to do.

    Attributes:
        chars: how much there is.
        touched: whether there is anything new.
    """

    def __init__(self, stir: Callable[[], None]) -> None:
        self.chars = 0
        self.touched = False
        self._stir = stir
        self._loop = asyncio.get_running_loop()
        self._own_thread = threading.get_ident()
        self._parts: list[str] = []
        # The host may print in threads.
        self._turn = threading.Lock()
        self._taken = asyncio.Event()
        self._broken: OSError | None = None

    def add(self, lines: str) -> None:
        with self._turn:
            if self._broken is not None:
                return
            before, self.chars = self.chars, self.chars + len(lines)
            news = not self.touched or before < _LINES_CHARS <= self.chars
            self.touched = True
            self._parts.append(lines)
        if not news:
            return
        if threading.get_ident() == self._own_thread:
            self._stir()
        else:
            with suppress(RuntimeError):  # the loop has been closed meanwhile
                self._loop.call_soon_threadsafe(self._stir)

    def take_all(self) -> str:
        with self._turn:
            parts, self._parts, self.chars, self.touched = self._parts, [], 0, False
        # The next ones may come while these are being shown.
        self._taken.set()
        return "".join(parts)

    async def wait_taken(self) -> None:
        while self.chars > _WAITING_CHARS and self._broken is None:
            self._taken.clear()
            await self._taken.wait()
        if self._broken is not None:
            raise self._broken

    def give_up(self, why: OSError) -> None:
        """Nothing will be shown any more."""
        with self._turn:
            self._broken, self._parts, self.chars = why, [], 0
        self._taken.set()
