"""A run's events into its folder, and the report of it at the end.

``events.jsonl`` has a header, then an event a line. Where the folder is there to stay it is written
while the run goes on, so that a run whose supervisor was killed can be read, too; in a temporary
folder, only if that is kept.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import asupervise
from asupervise.bus import EventBus, Subscription
from asupervise.logs import LogsDest

if TYPE_CHECKING:
    from asupervise.events import Event

__all__ = ["EVENTS_FILE", "FORMAT", "REPORT_FILE", "Recorder", "header", "line_of"]

EVENTS_FILE: Final = "events.jsonl"
REPORT_FILE: Final = "report.html"
FORMAT: Final = 1
# So many may wait for a slow disk.
_QUEUE: Final = 10_000
# A group that is over sooner is written down when it is.
_SETTLED_S: Final = 0.05


def header() -> str:
    """The first line of a file of events."""
    return _json({"event": "header", "format": FORMAT, "version": asupervise.__version__})


def line_of(event: Event) -> str:
    """An event as a line of JSON, without its newline."""
    return _json(event.as_dict())


def _json(data: object) -> str:
    # Imported here: most runs leave no folder behind.
    import json

    # Paths and arguments may hold anything: a lone surrogate is written as its escape.
    return json.dumps(data, separators=(",", ":"), ensure_ascii=True)


class Recorder:
    """Writes what a bus tells into a run's folder.

    Args:
        bus: who tells; closed at the end.
        report: whether a report is made at the end.
    """

    def __init__(self, bus: EventBus, *, report: bool = True) -> None:
        self._bus = bus
        self._report = report
        self._run_dir = ""
        self._timer: asyncio.TimerHandle | None = None
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None
        self._finished = False

    def attend(self, logs: LogsDest) -> None:
        """A group of the run has been started, with these files. All have the same folder."""
        if self._run_dir or not logs.run_dir:
            return
        self._run_dir = logs.run_dir
        if not logs.temporary:
            self._timer = asyncio.get_running_loop().call_later(_SETTLED_S, self._begin)

    def _begin(self) -> None:
        self._subscription = self._bus.subscribe(_QUEUE, records=True)
        self._task = asyncio.get_running_loop().create_task(
            self._write_on(self._subscription), name="asupervise: events"
        )

    async def finish(self) -> str | None:
        """The run is over, and all is told: write it down, if the folder is still there.

        Returns:
            What went wrong, a sentence; None if nothing did.
        """
        if self._timer is not None:
            self._timer.cancel()
        stays = bool(self._run_dir) and _is_there(self._run_dir)
        if self._task is None and stays and not self._finished:
            self._begin()
        self._finished = True
        self._bus.close()
        try:
            if self._task is not None:
                await asyncio.wait({self._task})
                self._task.result()
        except Exception as exc:
            # Mostly a full disk. Whatever it is, it must not take the run's result away.
            return f"{self._run_dir}: what has happened could not be written down: {exc}"
        return await self._made_report() if stays and self._report else None

    async def _made_report(self) -> str | None:
        try:
            await asyncio.to_thread(_write_report, self._run_dir)
        except Exception as exc:
            # Likewise, whatever is wrong with a page.
            if _is_there(self._run_dir):
                return f"{self._run_dir}: no report could be made: {exc}"
        return None

    async def _write_on(self, subscription: Subscription) -> None:
        path = os.path.join(self._run_dir, EVENTS_FILE)
        lines = [header()]
        try:
            while await subscription.wait():
                lines += map(line_of, subscription.take_saying_gaps())
                await asyncio.to_thread(_append, path, lines)
                lines = []
        finally:
            subscription.close()


def _is_there(folder: str) -> bool:
    return os.path.isdir(folder)


def _append(path: str, lines: Sequence[str]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    with suppress(FileNotFoundError):  # somebody has removed the folder meanwhile
        fd = os.open(path, flags, 0o600)
        try:
            data = memoryview("".join(f"{line}\n" for line in lines).encode())
            while data:
                data = data[os.write(fd, data) :]
        finally:
            os.close(fd)


def _write_report(run_dir: str) -> None:
    from asupervise.views.report import write_report

    write_report(run_dir)
