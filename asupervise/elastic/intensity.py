"""How often a worker that has ended is started anew: pure, as OTP's supervisors decide it.

The names are theirs (Erlang/OTP, `supervisor`): a worker is ``permanent``, ``transient`` or
``temporary``, and more restarts than an intensity within a period end the supervisor itself. Of
ours are the wait before a restart, which OTP does not have, and the broken starts.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, get_args

from asupervise.elastic.decide import Policy

__all__ = ["Anew", "End", "Exhausted", "Limits", "Past", "Restart", "Window", "after_end"]

Restart = Literal["permanent", "transient", "temporary"]

_POLICY_SECONDS: Final = ("min_uptime_s", "backoff_s", "backoff_max_s", "stable_s")


@dataclass(frozen=True, slots=True)
class Limits:
    """Which ends are followed by a restart, and how many may be.

    Attributes:
        restart: ``"permanent"``: after each end; ``"transient"``: after a failure; ``"temporary"``:
            never.
        max_restarts: how many restarts there may be within `within_s`, over all workers; one more
            ends them all. 0: the first end that would be followed by one does.
        within_s: seconds; OTP's period.
        policy: the waits and the broken starts; its fields about nodes are not used.

    Raises:
        ValueError: for values that make no sense, naming the argument and the value.

    Example:
        >>> Limits("transient", max_restarts=10, within_s=60.0).max_restarts
        10
    """

    restart: Restart = "permanent"
    max_restarts: int = 3
    within_s: float = 60.0
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        if self.restart not in get_args(Restart):
            raise ValueError(
                f"restart: {self.restart!r}: expected 'permanent', 'transient' or 'temporary'"
            )
        _check_count("max_restarts", self.max_restarts, 0)
        if not self.within_s > 0:
            raise ValueError(f"within_s: {self.within_s!r}: expected seconds above zero")
        _check_count("policy.max_broken_starts", self.policy.max_broken_starts, 1)
        for name in _POLICY_SECONDS:
            if not (seconds := getattr(self.policy, name)) >= 0:
                raise ValueError(f"policy.{name}: {seconds!r}: expected seconds, zero or more")


def _check_count(what: str, number: object, least: int) -> None:
    # True is an int, and half a restart is none.
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ValueError(f"{what}: {number!r}: expected an integer, {least} or more")


@dataclass(frozen=True, slots=True)
class Window:
    """The restarts of the last seconds, over all workers.

    Attributes:
        times_s: when they were, in the order in which they came.
    """

    times_s: tuple[float, ...] = ()

    def counted(self, now_s: float, within_s: float) -> Window:
        """With a restart now, and without those that are more than `within_s` ago.

        Example:
            >>> Window((0.0, 6.0)).counted(10.0, within_s=5.0)
            Window(times_s=(6.0, 10.0))
        """
        recent = (time_s for time_s in self.times_s if now_s - time_s <= within_s)
        return Window((*recent, now_s))


@dataclass(frozen=True, slots=True)
class Past:
    """What there was of one worker.

    Attributes:
        restarts: how often it has been started anew.
        in_a_row: how many of them without a long run (`Policy.stable_s`) in between.
        broken: how many failures soon after the start (`Policy.min_uptime_s`), in a row.
    """

    restarts: int = 0
    in_a_row: int = 0
    broken: int = 0


class End(NamedTuple):
    """How a worker has ended.

    Attributes:
        failed: whether not with success.
        uptime_s: seconds since its start.
    """

    failed: bool
    uptime_s: float


class Anew(NamedTuple):
    """It is to be started anew.

    Attributes:
        past: of the worker, this restart included.
        window: of all workers, likewise.
        delay_s: how long to wait before.
    """

    past: Past
    window: Window
    delay_s: float


class Exhausted(NamedTuple):
    """It is not to be started anew, and all the others are to be ended.

    Attributes:
        why: a sentence.
    """

    why: str


def after_end(
    past: Past,
    window: Window,
    end: End,
    limits: Limits,
    now_s: float,
    spread: Callable[[], float] = random.random,
) -> Anew | Exhausted | None:
    """What follows the end of a worker; None: it has ended for good, and nothing follows.

    Args:
        past: of that worker.
        window: of all workers.
        end: how it has ended.
        limits: of the service.
        now_s: the present, on any clock that only goes forward.
        spread: 0 to 1, see `Policy.delay_s`.

    Example:
        >>> after_end(Past(), Window(), End(True, 9.0), Limits(max_restarts=0), 0.0)
        Exhausted(why='no restart is allowed (max_restarts=0)')
    """
    if limits.restart == "temporary" or (limits.restart == "transient" and not end.failed):
        return None
    policy = limits.policy
    broken = past.broken + 1 if end.failed and end.uptime_s < policy.min_uptime_s else 0
    # First, because it says more: what fails at once also fails often.
    if broken >= policy.max_broken_starts:
        return Exhausted(
            f"it failed {_times(broken)} sooner than {policy.min_uptime_s:g} s after its start, "
            "which no restart mends"
        )
    window = window.counted(now_s, limits.within_s)
    if len(window.times_s) > limits.max_restarts:
        return Exhausted(_too_many(len(window.times_s), limits))
    in_a_row = 1 if end.uptime_s >= policy.stable_s else past.in_a_row + 1
    return Anew(
        Past(past.restarts + 1, in_a_row, broken), window, policy.delay_s(in_a_row, spread())
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times in a row"


def _too_many(count: int, limits: Limits) -> str:
    if not limits.max_restarts:
        return "no restart is allowed (max_restarts=0)"
    return (
        f"this would be restart {count} of all workers within {limits.within_s:g} s, and "
        f"{limits.max_restarts} are allowed (max_restarts={limits.max_restarts}, "
        f"within_s={limits.within_s:g})"
    )
