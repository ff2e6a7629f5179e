"""Noticing that a worker makes no progress any more."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from asupervise import procfs
from asupervise.handler import SubprocessHandler
from asupervise.worker import HEARTBEAT_VARIABLE

_LOOKS_PER_TIMEOUT = 4
# Who waits in a loop with a timeout, as collective libraries do, uses a little CPU all the same.
_IDLE_SHARE = 0.01
_IDLE_ALLOWANCE_S = 0.03


@dataclass(slots=True)
class Pulse:
    """The signs of life of one worker, as last seen: pure, fed by :class:`HangDetector`.

    Attributes:
        since_s: monotonic time of the last sign of life.
        cpu_s: CPU seconds used by its session at that time.
        output_bytes: size of its log files.
        beat: stamp of its last heartbeat, or None if it has never sent one.
        sees_output: whether its output goes to files, so that it counts.
    """

    since_s: float
    cpu_s: float = 0.0
    output_bytes: int = 0
    beat: int | None = None
    sees_output: bool = True

    def look(self, now_s: float, cpu_s: float, output_bytes: int, beat: int | None) -> None:
        """Take what was found; moves `since_s` if it is a sign of life."""
        if beat is not None:
            alive = beat != self.beat
        else:
            idle_s = _IDLE_ALLOWANCE_S + _IDLE_SHARE * (now_s - self.since_s)
            alive = output_bytes != self.output_bytes or abs(cpu_s - self.cpu_s) > idle_s
        if alive:
            self.since_s, self.cpu_s, self.output_bytes = now_s, cpu_s, output_bytes
            self.beat = beat

    def cause(self, now_s: float, timeout_s: float) -> str | None:
        """Why this worker counts as hanging, or None if it does not."""
        if now_s - self.since_s < timeout_s:
            return None
        span = f"{now_s - self.since_s:.3g} s"
        if self.beat is not None:
            return f"hang: no heartbeat for {span}"
        if self.sees_output:
            return f"hang: no output and no CPU use for {span}"
        return f"hang: no CPU use for {span}, and its output is not seen"


@dataclass(slots=True)
class HangDetector:
    """Looks at every worker four times in `timeout_s`, and reports the first that hangs.

    Args:
        handlers: the group's workers.
        timeout_s: seconds without a sign of life.
        on_hang: called once, with the cause by local rank.
    """

    handlers: Sequence[SubprocessHandler]
    timeout_s: float
    on_hang: Callable[[dict[int, str]], None]
    _pulses: dict[int, Pulse] = field(default_factory=dict)
    _timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        now_s = asyncio.get_running_loop().time()
        self._pulses = {
            h.local_rank: Pulse(now_s, sees_output=bool(_files(h))) for h in self.handlers
        }
        self._later()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def beats(self, rank: int) -> bool:
        """Whether a worker sends heartbeats, and has not missed any yet."""
        pulse = self._pulses[rank]
        now_s = asyncio.get_running_loop().time()
        return pulse.beat is not None and pulse.cause(now_s, self.timeout_s) is None

    def _later(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self.timeout_s / _LOOKS_PER_TIMEOUT, self._look)

    def _look(self) -> None:
        now_s = asyncio.get_running_loop().time()
        cpu_s = _cpu_by_session()
        causes: dict[int, str] = {}
        for handler in self.handlers:
            if not handler.running:
                continue
            pulse = self._pulses[handler.local_rank]
            pulse.look(now_s, cpu_s.get(handler.pid, 0.0), _output_bytes(handler), _beat(handler))
            if cause := pulse.cause(now_s, self.timeout_s):
                causes[handler.local_rank] = cause
        if causes:
            self.on_hang(causes)
        else:
            self._later()


def _cpu_by_session() -> dict[int, float]:
    used: dict[int, float] = {}
    for entry in procfs.entries():
        used[entry.session] = used.get(entry.session, 0.0) + entry.cpu_ticks * procfs.TICK_S
    return used


def _output_bytes(handler: SubprocessHandler) -> int:
    return sum(_stat(path)[0] for path in _files(handler))


def _files(handler: SubprocessHandler) -> list[str]:
    """What it writes to that is no console, which is not ours to look at."""
    return [path for path in (handler.plan.stdout, handler.plan.stderr) if path]


def _beat(handler: SubprocessHandler) -> int | None:
    path = handler.plan.env.get(HEARTBEAT_VARIABLE)
    return (_stat(path)[1] or None) if path else None


def _stat(path: str) -> tuple[int, int]:
    """Size and time of change; zeros if there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
