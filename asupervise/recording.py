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
from functools import cache
from typing import TYPE_CHECKING, Final

import asupervise
from asupervise.bus import EventBus, Subscription
from asupervise.logs import LogsDest

if TYPE_CHECKING:
    from json import JSONEncoder

    from asupervise.events import Event

__all__ = ["EVENTS_FILE", "FORMAT", "REPORT_FILE", "Recorder", "header", "line_of"]

EVENTS_FILE: Final = "events.jsonl"
REPORT_FILE: Final = "report.html"
FORMAT: Final = 1
# So many may wait for a slow disk.
_QUEUE: Final = 10_000
# A group that is over sooner is written down when it is.
_SETTLED_S: Final = 0.05
# No sooner after the last time is anything written.
_PACE_S: Final = 0.1


def header() -> str:
    """The first line of a file of events."""
    return _json({"event": "header", "format": FORMAT, "version": asupervise.__version__})


def line_of(event: Event) -> str:
    """An event as a line of JSON, without its newline."""
    return _json(event.as_dict())


def _json(data: object) -> str:
    return _encoder().encode(data)


@cache
def _encoder() -> JSONEncoder:
    # Imported here: most runs leave no folder behind.
    from json import JSONEncoder

    # Paths and arguments may hold anything: a lone surrogate is written as its escape.
    return JSONEncoder(separators=(",", ":"), ensure_ascii=True)


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
        self._over = asyncio.Event()

    def attend(self, logs: LogsDest) -> None:
        """A group of the run has been started, with these files. All have the same folder."""
        if self._run_dir or not logs.run_dir:
            return
        self._run_dir = logs.run_dir
        if not logs.temporary:
            self._timer = asyncio.get_running_loop().call_later(_SETTLED_S, self._begin)

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(
            self._write_on(self._subscribed()), name="asupervise: events"
        )

    def _subscribed(self) -> Subscription:
        if self._subscription is None:
            self._subscription = self._bus.subscribe(_QUEUE, records=True)
        return self._subscription

    async def finish(self) -> str | None:
        """The run is over, and all is told: write it down, if the folder is still there.

        Returns:
            What went wrong, a sentence; None if nothing did.
        """
        if self._timer is not None:
            self._timer.cancel()
        stays = bool(self._run_dir) and _is_there(self._run_dir)
        self._over.set()
        self._bus.close()
        try:
            if self._task is not None:
                await asyncio.wait({self._task})
                self._task.result()
            if stays:
                rest = self._subscribed().take_saying_gaps()
                return await asyncio.to_thread(self._complete, rest, self._whole_story())
        except Exception as exc:
            return self._not_written(exc)
        finally:
            if self._subscription is not None:
                self._subscription.close()
        return None

    def _whole_story(self) -> Subscription | None:
        """All events; None if the file alone has them."""
        return None if self._bus.dropped else self._bus.subscribe(_QUEUE, records=True)

    def _complete(self, rest: Sequence[Event], whole: Subscription | None) -> str | None:
        # In a thread, and in one go: most runs are over before they are settled. All events
        # are made here and not in the event loop (3 to 5 us each, and there may be ten thousand);
        # the bus is closed, so nobody adds to them meanwhile.
        try:
            _append(self._run_dir, rest)
        except Exception as exc:
            return self._not_written(exc)
        if self._report and _is_there(self._run_dir):
            from asupervise.views.report import write_report

            try:
                write_report(self._run_dir, told=None if whole is None else whole.take())
            except Exception as exc:
                # Whatever is wrong with a page.
                if _is_there(self._run_dir):
                    return f"{self._run_dir}: no report could be made: {exc}"
        return None

    def _not_written(self, exc: Exception) -> str:
        # Mostly a full disk. Whatever it is, it must not take the run's result away.
        return f"{self._run_dir}: what has happened could not be written down: {exc}"

    async def _write_on(self, subscription: Subscription) -> None:
        # Without a pause a group of many would be written down a few starts at a time, by a thread
        # that takes turns with the one that starts them.
        while not self._over.is_set() and await subscription.wait():
            await asyncio.to_thread(_append, self._run_dir, subscription.take_saying_gaps())
            with suppress(TimeoutError):
                async with asyncio.timeout(_PACE_S):
                    await self._over.wait()


def _is_there(folder: str) -> bool:
    return os.path.isdir(folder)


def _append(run_dir: str, events: Sequence[Event]) -> None:
    lines = [*map(line_of, events)]
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    try:
        fd = os.open(os.path.join(run_dir, EVENTS_FILE), flags, 0o600)
    except FileNotFoundError:
        return  # somebody has removed the folder meanwhile
    try:
        if not os.fstat(fd).st_size:
            lines.insert(0, header())
        data = memoryview("".join(f"{line}\n" for line in lines).encode())
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)
