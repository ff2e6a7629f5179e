"""A live view of what runs: a table at the end of the terminal, and the log scrolling above it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from asupervise.bus import EventBus
from asupervise.errors import NotSupportedError
from asupervise.formats import COLORS, wants_color
from asupervise.shielding import finished_in_any_case
from asupervise.views.live.tty import Place, Terminal, find_terminal, flush

if TYPE_CHECKING:
    from asupervise.views.live.driving import LiveView

__all__ = ["live_view", "place_of_view"]

# What is told between two looks at it; of more, samples and heartbeats are missed first.
_QUEUE: Final = 10_000
# Who leaves by an exception, or is cancelled, waits no longer for a terminal that takes nothing.
_PATIENCE_S: Final = 2.0


@asynccontextmanager
async def live_view(
    bus: EventBus, *, title: str = "", color: str = "auto"
) -> AsyncIterator[LiveView | None]:
    """Show what runs as a table at the end of the terminal, with the log scrolling above it.

    To be entered before the workers are started: for the duration of the context, objects of the
    view stand in the place of ``sys.stdout`` and ``sys.stderr``, as far as they are the terminal,
    and what is written to them appears above the table, its control sequences made harmless. What
    has kept the former objects (a logging handler that was made before) writes into the table: make
    it inside. The table stays there at the end, in its last state.

    Where there is no terminal, or it can show no table, or a shell has put this process into the
    background, nothing is changed.

    Args:
        bus: who tells what happens; given to `start_processes`, `run_services` or `launch` as well.
        title: what is run; by default the entrypoint of the first group.
        color: as in `ConsoleFormat`; workers' own colours are shown where ours are.

    Returns:
        None where nothing is shown. Else what has ``resized()``, to be called when a SIGWINCH has
        come, if a second is too long to wait for it, and ``pause()`` and ``resume()``, for a
        process that is about to be stopped and that goes on.

    Raises:
        NotSupportedError: if Rich is not installed (extra ``ui``).
        ValueError: for a `color` that is none.

    Example::

        bus = EventBus()
        async with live_view(bus):
            async with start_processes("trainer", "./train", args, envs, logs, events=bus) as ctx:
                result = await ctx.wait()
        bus.close()
    """
    if color not in COLORS:
        raise ValueError(f"color: {color!r}: expected one of {', '.join(COLORS)}")
    place = place_of_view()
    if place.fd is None:
        yield None
        return
    try:
        from asupervise.views.live.above import standing_in
        from asupervise.views.live.driving import LiveView
    except ModuleNotFoundError as exc:
        if str(exc.name).partition(".")[0] != "rich":
            raise
        message = "the live view needs the package rich"
        raise NotSupportedError(message, hint="pip install 'asupervise[ui]'") from None
    flush([sys.stdout, sys.stderr])
    view = _made(LiveView, bus, title, color, place)
    view.start()
    try:
        with standing_in(view.streams):
            yield view
    except BaseException:
        await _ended(view, _PATIENCE_S)
        raise
    await _ended(view, None)


def place_of_view() -> Place:
    """Where a view would be shown, or why not."""
    return find_terminal({"stdout": sys.stdout, "stderr": sys.stderr}, os.environ)


def _made(kind: type[LiveView], bus: EventBus, title: str, color: str, place: Place) -> LiveView:
    from asupervise.views.live.board import Board
    from asupervise.views.live.driving import Look
    from asupervise.views.live.gpu_use import gpu_use
    from asupervise.views.live.painting import drawer
    from asupervise.views.live.spans import ASCII, UNICODE

    assert place.fd is not None
    coloured = wants_color(color, os.environ, is_terminal=True)
    encoding = getattr(getattr(sys, place.streams[0]), "encoding", None) or ""
    is_unicode = encoding.lower().replace("-", "").startswith("utf8")
    look = Look(drawer(coloured=coloured), UNICODE if is_unicode else ASCII, coloured)
    heard = bus.subscribe(_QUEUE)
    return kind(Board(title), heard, Terminal(place.fd), look, place.streams, gpu_use())


async def _ended(view: LiveView, patience_s: float | None) -> None:
    """Show the last state, and let go of the terminal."""
    ending = asyncio.get_running_loop().create_task(view.end(), name="asupervise: live view, end")
    try:
        await asyncio.wait({ending}, timeout=patience_s)
    finally:
        # Somebody is in a hurry, or the terminal too slow; it may be stopped (Ctrl-S).
        if not ending.done():
            view.hurry()
        try:
            await finished_in_any_case(ending)
        finally:
            view.close()
    ending.result()
