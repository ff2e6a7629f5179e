"""The time at which a line was written, where it begins with one: pure.

What counts is a date and a time at the very beginning, as ISO 8601 (RFC 3339) and `logging` write
them, after at most a bracket and the name of a level::

    2026-11-29 13:47:08,035 INFO step 1
    2026-11-29T13:47:08.035304+01:00 step 1
    [2026-11-29 13:47:08] step 1
    WARNING 2026-11-29 13:47:08,035 step 1
"""

from __future__ import annotations

import calendar
import re
import time
from typing import Final

__all__ = ["Clock", "Window"]

_STAMP: Final = re.compile(
    r"[\[(<]?(?:(?:TRACE|DEBUG|INFO|NOTICE|WARN(?:ING)?|ERROR|CRITICAL|FATAL)[\])>:|\s]+[\[(<]?)?"
    r"(?P<date>[12][0-9]{3}-[01][0-9]-[0-3][0-9])[T _](?P<time>[0-2][0-9]:[0-5][0-9]:[0-6][0-9])"
    r"(?:[.,](?P<fraction>[0-9]{1,9}))?(?![0-9])"
    r"(?:\s?(?P<zone>Z|UTC|[+-][0-9]{2}:?[0-9]{2}(?![0-9])))?"
)
# Of files and events: what is written at once may be stamped a little later or sooner.
_SLACK_S: Final = 2.0

Window = tuple[float, float]


class Clock:
    """Reads the times of one file's lines.

    A time that says no zone is the viewer's or UTC: whichever the first one that can be true is
    true in, and all that follow are read the same. A time that cannot be true, because the file was
    not there yet or was not written to any more, is something else that a program has printed.

    Args:
        window: from when to when the file was written to, in seconds since the epoch.

    Example:
        >>> clock = Clock((1_700_000_000, 1_700_000_060))
        >>> clock.read("2023-11-14T22:13:25.5Z ready")
        1700000005.5
        >>> clock.read("1999-12-31 23:59:59 of the data") is None
        True
    """

    def __init__(self, window: Window) -> None:
        self._first_s = window[0] - _SLACK_S
        self._last_s = window[1] + _SLACK_S
        self._local: bool | None = None
        # Most lines were written in the second of the one before.
        self._known: dict[tuple[str, str, bool], float | None] = {}

    def read(self, line: str) -> float | None:
        """When a line was written; None if it does not say so, or cannot be believed."""
        found = _STAMP.match(line)
        if found is None:
            return None
        fraction = float(f"0.{found['fraction']}") if found["fraction"] else 0.0
        zone = found["zone"]
        if zone is not None:
            at = self._second(found["date"], found["time"], local=False)
            at = None if at is None else at - _offset_s(zone)
            return self._believed(at, fraction)
        for local in (True, False) if self._local is None else (self._local,):
            at = self._believed(self._second(found["date"], found["time"], local), fraction)
            if at is not None:
                self._local = local
                return at
        return None

    def _believed(self, at: float | None, fraction: float) -> float | None:
        return at + fraction if at is not None and self._first_s <= at <= self._last_s else None

    def _second(self, date: str, clock: str, local: bool) -> float | None:
        key = (date, clock, local)
        if key not in self._known:
            if len(self._known) > 64:
                self._known.clear()
            self._known[key] = _epoch(date, clock, local)
        return self._known[key]


def _epoch(date: str, clock: str, local: bool) -> float | None:
    year, month, day = map(int, date.split("-"))
    hour, minute, second = map(int, clock.split(":"))
    if not (1 <= month <= 12 and 1 <= day <= 31 and hour < 24):
        return None
    parts = (year, month, day, hour, minute, second, 0, 0, -1)
    try:
        return time.mktime(parts) if local else float(calendar.timegm(parts))
    except (ValueError, OverflowError):
        return None  # the 30th of February


def _offset_s(zone: str) -> float:
    if zone in ("Z", "UTC"):
        return 0.0
    sign = -1 if zone[0] == "-" else 1
    return sign * (int(zone[1:3]) * 3600 + int(zone[-2:]) * 60)
