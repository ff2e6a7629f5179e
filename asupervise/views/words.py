"""How numbers, times and ends are said to a person: pure."""

from __future__ import annotations

import signal
import time

from asupervise.hints import is_hang, is_oom
from asupervise.views.lives import Life

__all__ = [
    "clock",
    "count",
    "duration",
    "how_ended",
    "moment",
    "offset",
    "share",
    "signal_name",
    "size",
]


def duration(seconds: float) -> str:
    """How long something took.

    Example:
        >>> duration(0.0123), duration(3.456), duration(192), duration(7500), duration(300_000)
        ('12.3 ms', '3.46 s', '3 min 12 s', '2 h 5 min', '3 d 11 h')
    """
    seconds = max(0.0, seconds)
    if seconds < 0.0995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days:,} d {hours} h" if hours else f"{days:,} d"


def offset(seconds: float) -> str:
    """When something happened, from the beginning of the run.

    Example:
        >>> offset(0.04712), offset(75.5), offset(3725)
        ('0.047', '1:15.5', '1:02:05')
    """
    if seconds < 60:
        return f"{seconds:.3f}"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:
        return f"{int(minutes)}:{int(rest):02}.{int(rest * 10) % 10}"
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{int(rest):02}"


def size(number: float) -> str:
    """So many bytes.

    Example:
        >>> size(570), size(11_730_944), size(3 << 30)
        ('570 B', '11.2 MiB', '3 GiB')
    """
    if number < 1000:
        return f"{number:.0f} B"
    units = iter(("KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    number /= 1024
    while number >= 1000 and (larger := next(units, "")):
        unit, number = larger, number / 1024
    return f"{number:.3g} {unit}"


def count(number: int, one: str, many: str = "") -> str:
    """So many of something.

    Example:
        >>> count(1, "worker"), count(1024, "worker"), count(2, "process", "processes")
        ('1 worker', '1,024 workers', '2 processes')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def moment(at: float) -> str:
    """A time in seconds since the epoch, as the clock on the wall shows it."""
    return _strftime("%Y-%m-%d %H:%M:%S", at)


def clock(at: float) -> str:
    """The same without its date, in milliseconds."""
    return f"{_strftime('%H:%M:%S', at)}.{int(at * 1000) % 1000:03}"


def _strftime(form: str, at: float) -> str:
    try:
        return time.strftime(form, time.localtime(at))
    except (ValueError, OverflowError, OSError):
        return "?"


def share(part: float, whole: float) -> str:
    """A part in per cent, as attributes have it."""
    return f"{100 * part / whole if whole else 0:.3f}".rstrip("0").rstrip(".") + "%"


def how_ended(life: Life) -> str:
    """How a start of a worker came to its end, in few words.

    Example:
        >>> how_ended(Life(0, 0, 0, exitcode=3)), how_ended(Life(0, 0, 0))
        ('exit code 3', 'no end known')
    """
    failure, code = life.failure, life.exitcode
    if failure is not None and is_hang(failure.cause):
        return "hung"
    if failure is not None and is_oom(failure.cause):
        return "out of memory"
    if code is None:
        return "running" if life.alive else "failed" if failure is not None else "no end known"
    if code < 0:
        return (failure.signal if failure is not None else "") or signal_name(-code)
    return f"exit code {code}" if code or failure is not None else "succeeded"


def signal_name(number: int) -> str:
    """The name of a signal, or its number where it has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"  # the real-time signals between the first and last are unnamed
