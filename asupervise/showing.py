"""How one stream of a group is shown: by which framer, and whether straight to the console."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from asupervise.console import Console
from asupervise.framing import LineFramer
from asupervise.plan import GroupPlan, WorkerPlan
from asupervise.sinks import Sink

if TYPE_CHECKING:
    from asupervise.formats import ConsoleFormat, Speaker
    from asupervise.merging import Lane, Merger

__all__ = ["Outlet", "Showing"]

Spawn = Callable[[Callable[[], Coroutine[Any, Any, None]]], object]


class Outlet(NamedTuple):
    """What a tailer shows a file by.

    Attributes:
        framer: cuts it into lines.
        sink: takes them.
        lane: the same, where lines are put together with those of others; to be told of its end.
    """

    framer: LineFramer
    sink: Sink
    lane: Lane[Any] | None = None


class Showing:
    """How one stream of a group is shown.

    What a plain run does not need is not even imported.

    Args:
        console: of this stream.
        stream: what it writes to.
        name: ``"stdout"`` or ``"stderr"``.
        plan: of the group.
        form: how lines look; None for the default.
        spawn: runs a task that ends by itself soon after the tailers.
    """

    def __init__(
        self,
        console: Console,
        stream: TextIO | None,
        name: str,
        plan: GroupPlan,
        form: ConsoleFormat | None,
        spawn: Spawn,
    ) -> None:
        self.console = console
        self._name = name
        self._group = plan.name
        self._form = form
        self._color = _is_colored(stream, form)
        self._merger: Merger[Any] | None = None
        if form is not None and form.dedup:
            self._merger = self._make_merger(form, spawn)
            # From the first: those that start later may say the same.
            for worker in plan.workers:
                if worker.tee_stdout if name == "stdout" else worker.tee_stderr:
                    self._merger.join(self._speaker(worker))

    def _make_merger(self, form: ConsoleFormat, spawn: Spawn) -> Merger[Any]:
        from asupervise.merging import JsonMerger, TextMerger

        if form.log_format == "json":
            return JsonMerger(self.console, spawn)
        return TextMerger(self.console, spawn, color=self._color, timestamps=form.timestamps)

    def outlet(self, worker: WorkerPlan, *, another: bool = False) -> Outlet:
        """For a worker's file, or for another file of it."""
        form = self._form
        if self._merger is not None:
            speaker = self._speaker(worker)
            if another:
                self._merger.join(speaker)
            lane = self._merger.lane(speaker)
            return Outlet(lane.framer, lane, lane)
        if form is not None and form.log_format == "json":
            from asupervise.format_framers import JsonFramer

            return Outlet(JsonFramer(self._speaker(worker)), self.console)
        prefix = worker.prefix
        if self._color:
            from asupervise.formats import colored

            prefix = colored(prefix, [worker.local_rank])
        data = prefix.encode("utf-8", "surrogateescape")
        if form is not None and form.timestamps:
            from asupervise.format_framers import StampedFramer

            return Outlet(StampedFramer(data), self.console)
        return Outlet(LineFramer(data), self.console)

    def _speaker(self, worker: WorkerPlan) -> Speaker:
        from asupervise.formats import Speaker

        return Speaker(worker.prefix, worker.local_rank, worker.rank, self._name, self._group)


def _is_colored(stream: TextIO | None, form: ConsoleFormat | None) -> bool:
    is_terminal = _is_terminal(stream)
    if form is None and not is_terminal:
        return False
    from asupervise.formats import wants_color

    return wants_color(form.color if form else "auto", os.environ, is_terminal=is_terminal)


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except (AttributeError, ValueError):
        return False  # an object of the host's, or closed
