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
from asupervise.events import WorkerStarted
from asupervise.views.live.above import Above
from asupervise.views.live.board import Board
from asupervise.views.live.canvas import Canvas
from asupervise.views.live.gpu_use import GpuUse
from asupervise.views.live.last_lines import LastLines
from asupervise.views.live.layout import lay_out, room
from asupervise.views.live.painting import SHOW_CURSOR, Drawn
from asupervise.views.live.rows import Row
from asupervise.views.live.spans import UNICODE, Glyphs, Line
from asupervise.views.live.tty import Terminal

__all__ = ["LiveView", "Look"]

# So often the table is laid out anew at the most, where something has changed...
_TABLE_S: Final = 0.2
# ... and so often in any case: clocks go on.
_TICK_S: Final = 1.0
# Lines that come one by one are put together for so long, unless there are as many as this.
_LINES_S: Final = 0.04
_LINES_BYTES: Final = 32 * 1024
# Who has more than that waiting waits for the terminal.
_WAITING_BYTES: Final = 256 * 1024
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
        self._glyphs = look.glyphs
        self._gpus = gpus
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="asupervise-live")
        self._last_lines: LastLines[Key] = LastLines()
        self.streams = {name: Above(self, colours=look.colours) for name in streams}
        self._canvas = Canvas(terminal, look.draw, self._begun_lines)
        self._waiting = _Waiting(self._stir)
        self._stirred = asyncio.Event()
        self._rows: Sequence[Row] = ()
        # Whether something has happened since the table was laid out, and when that was.
        self._changed = True
        self._laid_out_s = self._painted_s = 0.0
        self._ending = False
        self._tasks: list[asyncio.Task[None]] = []

    # --- what others do -------------------------------------------------------------------------

    def take(self, lines: bytes) -> None:
        """Show lines above the table, soon; may be called in any thread."""
        self._waiting.add(lines)

    async def wait_taken(self) -> None:
        """Return when more lines may come.

        Raises:
            OSError: the terminal is gone.
        """
        await self._waiting.wait_taken()

    def show_now(self, lines: Sequence[bytes]) -> None:
        """Show lines above the table, given in pieces; for a thread that may wait.

        Raises:
            OSError: the terminal is gone.
        """
        if self._canvas.is_stale:
            # Nobody but the event loop can lay out the table anew.
            self._waiting.add(b"".join(lines))
            self._loop.call_soon_threadsafe(self._layout_soon)
            return
        self._canvas.show(lambda: [*self._waiting.take_all(), *lines])
        if not self._changed:
            # Who has written something has another last line, most likely.
            self._loop.call_soon_threadsafe(self._layout_soon)

    def resized(self) -> None:
        """The terminal may have another size; without this it is seen within a second."""
        self._layout_soon()

    def pause(self) -> None:
        """Give the terminal back, because this process is about to be stopped."""
        self._canvas.pause()

    def resume(self) -> None:
        """Take the terminal again."""
        self._canvas.resume()
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
        self._canvas.hurry()

    def close(self) -> None:
        """Give the terminal back; after :meth:`end`."""
        self._thread.shutdown()
        self._last_lines.close()
        self._canvas.close()
        if self._gpus is not None:
            self._gpus.stop()

    async def _hear(self) -> None:
        while await self._heard.wait():
            for event in self._heard.take():
                self._board.tell(event)
                if isinstance(event, WorkerStarted):
                    files = [path for path in (event.stdout, event.stderr) if path]
                    self._thread.submit(self._last_lines.keep, files)
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
        if self._waiting.size >= _LINES_BYTES:
            return self._painted_s
        due = self._laid_out_s + (_TABLE_S if self._changed else _TICK_S)
        if self._waiting.touched:
            due = min(due, self._painted_s + _LINES_S)
        return due

    # --- what -----------------------------------------------------------------------------------

    async def _paint(self) -> None:
        """Draw what there is; the last lines are looked at meanwhile, for the next time."""
        self._painted_s = self._loop.time()
        due_s = self._laid_out_s + (_TABLE_S if self._changed else _TICK_S)
        lays_out = self._painted_s >= due_s or self._canvas.is_stale
        if lays_out:
            self._lay_out()
        has_lines = self._waiting.touched
        seen = await self._show_and_look(self._rows if lays_out else ())
        if self._board.lines_seen(seen, time.monotonic_ns()) or has_lines:
            self._changed = True

    async def _last_paint(self) -> None:
        # Whoever has come since is looked at as well.
        self._lay_out()
        seen = await self._show_and_look(self._rows)
        self._board.lines_seen(seen, time.monotonic_ns())
        self._lay_out()
        await self._show_and_look((), end=f"{SHOW_CURSOR}\r\n")

    def _lay_out(self) -> None:
        self._changed = False
        self._laid_out_s = self._loop.time()
        if self._gpus is not None:
            self._board.gpus_seen(self._gpus.latest)
        picture = self._board.picture(time.monotonic_ns())
        size = self._terminal.size()
        height = room(len(picture.rows), size.lines)
        # A cell less than there are: behind a line that fills its row terminals differ.
        layout = lay_out(picture, size.columns - 1, height, self._glyphs)
        self._rows = layout.rows
        self._canvas.lay(layout.lines, size)

    def _begun_lines(self) -> list[str]:
        return [line for each in self.streams.values() if (line := each.unfinished)]

    async def _show_and_look(self, rows: Sequence[Row], end: str = "") -> Lines:
        """Draw, and see what these workers have said last."""
        files = {row.key: row.files for row in rows if row.files}

        def work() -> Lines:
            self._canvas.show(self._waiting.take_all, end)
            return self._last_lines.read(files) if files else {}

        return await self._loop.run_in_executor(self._thread, work)


class _Waiting:
    """Lines that wait to be shown.

    Args:
        stir: called in the event loop when there is something to do.

    Attributes:
        size: how much there is, in bytes.
        touched: whether there is anything new.
    """

    def __init__(self, stir: Callable[[], None]) -> None:
        self.size = 0
        self.touched = False
        self._stir = stir
        self._loop = asyncio.get_running_loop()
        self._own_thread = threading.get_ident()
        self._parts: list[bytes] = []
        # The host may print in threads.
        self._turn = threading.Lock()
        self._taken = asyncio.Event()
        self._broken: OSError | None = None

    def add(self, lines: bytes) -> None:
        with self._turn:
            if self._broken is not None:
                return
            before, self.size = self.size, self.size + len(lines)
            news = not self.touched or before < _LINES_BYTES <= self.size
            self.touched = True
            self._parts.append(lines)
        if news:
            self._in_loop(self._stir)

    def _in_loop(self, call: Callable[[], None]) -> None:
        if threading.get_ident() == self._own_thread:
            call()
        else:
            with suppress(RuntimeError):  # the loop has been closed meanwhile
                self._loop.call_soon_threadsafe(call)

    def take_all(self) -> Sequence[bytes]:
        with self._turn:
            parts, self._parts, self.size, self.touched = self._parts, [], 0, False
        # While these are written the next ones may come.
        self._in_loop(self._taken.set)
        # The kernel takes a thousand pieces at a time; many are small.
        return [b"".join(parts)]

    async def wait_taken(self) -> None:
        while self.size > _WAITING_BYTES and self._broken is None:
            self._taken.clear()
            await self._taken.wait()
        if self._broken is not None:
            raise self._broken

    def give_up(self, why: OSError) -> None:
        """Nothing will be shown any more."""
        with self._turn:
            self._broken, self._parts, self.size = why, [], 0
        self._taken.set()
