"""What follows the end of a worker: which restarts there are, how many, and after what wait."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise.elastic.decide import Policy
from asupervise.elastic.intensity import Anew, End, Exhausted, Limits, Past, Window, after_end

PATIENT = Policy(backoff_s=0.0, min_uptime_s=0.0)
FAILED = End(failed=True, uptime_s=10.0)
SUCCEEDED = End(failed=False, uptime_s=10.0)
ONE_EACH = st.lists(st.floats(0.0, 50.0), max_size=40)


def limits(**changes: Any) -> Limits:
    return replace(Limits(max_restarts=1000, policy=PATIENT), **changes)


def replay(given: Limits, steps: list[tuple[float, End]]) -> list[Anew | Exhausted | None]:
    """What follows each of the ends of one worker, up to the one that ends the service."""
    past, window, now_s = Past(), Window(), 0.0
    followed: list[Anew | Exhausted | None] = []
    for pause_s, end in steps:
        now_s += pause_s
        follows = after_end(past, window, end, given, now_s, spread=lambda: 1.0)
        followed.append(follows)
        if not isinstance(follows, Anew):
            break
        past, window = follows.past, follows.window
    return followed


# --- which ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("restart", "end", "again"),
    [
        ("permanent", FAILED, True),
        ("permanent", SUCCEEDED, True),
        ("transient", FAILED, True),
        ("transient", SUCCEEDED, False),
        ("temporary", FAILED, False),
        ("temporary", SUCCEEDED, False),
    ],
)
def test_which_ends_are_followed_by_a_restart(restart: Any, end: End, again: bool) -> None:
    follows = after_end(Past(), Window(), end, limits(restart=restart), 0.0)
    assert isinstance(follows, Anew) is again
    assert again or follows is None


def test_an_end_for_good_is_none_even_where_no_restart_is_left() -> None:
    given = limits(restart="transient", max_restarts=0)
    assert after_end(Past(), Window(), SUCCEEDED, given, 0.0) is None


# --- how many -----------------------------------------------------------------------------------


@given(ONE_EACH, st.integers(0, 5), st.floats(0.5, 100.0))
def test_the_first_restart_too_many_ends_the_service(
    pauses: list[float], most: int, within_s: float
) -> None:
    """Against OTP's words, naively: more than `most` restarts in the last `within_s` seconds."""
    given = limits(max_restarts=most, within_s=within_s)
    followed = replay(given, [(pause_s, FAILED) for pause_s in pauses])
    times_s: list[float] = []
    for pause_s, follows in zip(pauses, followed, strict=False):
        times_s.append((times_s[-1] if times_s else 0.0) + pause_s)
        recent = [t for t in times_s if times_s[-1] - t <= within_s]
        assert isinstance(follows, Exhausted) == (len(recent) > most)
    assert len(followed) == len(pauses) or isinstance(followed[-1], Exhausted)


@given(ONE_EACH, st.integers(0, 5))
def test_no_more_is_remembered_than_is_needed(pauses: list[float], most: int) -> None:
    for follows in replay(limits(max_restarts=most), [(p, FAILED) for p in pauses]):
        assert not isinstance(follows, Anew) or len(follows.window.times_s) <= most


def test_a_restart_that_is_just_within_the_time_counts() -> None:
    given = limits(max_restarts=1, within_s=5.0)
    assert isinstance(after_end(Past(), Window((0.0,)), FAILED, given, 5.0), Exhausted)
    assert isinstance(after_end(Past(), Window((0.0,)), FAILED, given, 5.001), Anew)


def test_without_an_end_of_the_period_all_restarts_count() -> None:
    given = limits(max_restarts=2, within_s=math.inf)
    followed = replay(given, [(1e9, FAILED)] * 5)
    assert [type(follows) for follows in followed] == [Anew, Anew, Exhausted]


def test_restarts_after_success_count_as_well() -> None:
    followed = replay(limits(max_restarts=1), [(0.0, SUCCEEDED)] * 2)
    assert isinstance(followed[-1], Exhausted)


def test_what_is_said_names_the_intensity() -> None:
    given = limits(max_restarts=3, within_s=60.0)
    follows = replay(given, [(1.0, FAILED)] * 4)[-1]
    assert isinstance(follows, Exhausted)
    assert "restart 4 of all workers within 60 s" in follows.why
    assert "3 are allowed (max_restarts=3, within_s=60)" in follows.why
    assert replay(limits(max_restarts=0), [(0.0, FAILED)]) == [
        Exhausted("no restart is allowed (max_restarts=0)")
    ]


# --- broken starts ------------------------------------------------------------------------------


def broken_limits(**changes: Any) -> Limits:
    policy = Policy(backoff_s=0.0, min_uptime_s=2.0, max_broken_starts=3)
    return limits(policy=policy, **changes)


@given(st.lists(st.tuples(st.booleans(), st.floats(0.0, 4.0)), max_size=30))
def test_so_many_failures_soon_after_the_start_in_a_row_end_the_service(
    ends: list[tuple[bool, float]],
) -> None:
    followed = replay(broken_limits(), [(0.0, End(*end)) for end in ends])
    in_a_row = 0
    for (failed, uptime_s), follows in zip(ends, followed, strict=False):
        in_a_row = in_a_row + 1 if failed and uptime_s < 2.0 else 0
        assert isinstance(follows, Exhausted) == (in_a_row == 3)


def test_what_is_said_of_broken_starts_goes_before_the_intensity() -> None:
    soon = End(failed=True, uptime_s=0.5)
    follows = replay(broken_limits(max_restarts=2), [(0.0, soon)] * 3)[-1]
    assert follows == Exhausted(
        "it failed 3 times in a row sooner than 2 s after its start, which no restart mends"
    )


def test_a_single_broken_start_may_be_enough() -> None:
    policy = Policy(min_uptime_s=2.0, max_broken_starts=1)
    follows = replay(limits(policy=policy), [(0.0, End(failed=True, uptime_s=0.0))])[-1]
    assert isinstance(follows, Exhausted)
    assert "it failed once sooner than 2 s" in follows.why


# --- the wait -----------------------------------------------------------------------------------


@given(
    past=st.builds(Past, st.integers(0, 99), st.integers(0, 10**6)),
    uptime_s=st.floats(0.0, 1000.0),
    spread=st.floats(0.0, 1.0),
    backoff_s=st.floats(0.0, 100.0),
    backoff_max_s=st.floats(0.0, 1000.0),
)
def test_the_wait_is_bounded_and_jittered(
    past: Past, uptime_s: float, spread: float, backoff_s: float, backoff_max_s: float
) -> None:
    policy = PATIENT._replace(backoff_s=backoff_s, backoff_max_s=backoff_max_s)
    end = End(failed=True, uptime_s=uptime_s)
    follows = after_end(past, Window(), end, limits(policy=policy), 0.0, spread=lambda: spread)
    assert isinstance(follows, Anew)
    row = 1 if uptime_s >= policy.stable_s else past.in_a_row + 1
    whole = min(backoff_max_s, backoff_s * 2.0 ** min(row - 1, 32))
    assert whole / 2 <= follows.delay_s <= whole <= backoff_max_s
    assert follows.past == Past(past.restarts + 1, row, 0)


def test_the_wait_doubles_up_to_its_limit_and_begins_anew_after_a_long_run() -> None:
    policy = PATIENT._replace(backoff_s=1.0, backoff_max_s=5.0, stable_s=300.0)
    steps = [(1.0, FAILED)] * 5 + [(1.0, End(failed=True, uptime_s=300.0)), (1.0, FAILED)]
    followed = replay(limits(policy=policy), steps)
    assert [f.delay_s for f in followed if isinstance(f, Anew)] == [1, 2, 4, 5, 5, 1, 2]


def test_each_worker_has_its_own_wait_and_all_have_one_window() -> None:
    given = limits(max_restarts=1, policy=PATIENT._replace(backoff_s=1.0))
    first = after_end(Past(), Window(), FAILED, given, 0.0, spread=lambda: 1.0)
    assert isinstance(first, Anew)
    assert first.delay_s == 1.0
    assert isinstance(after_end(Past(), first.window, FAILED, given, 1.0), Exhausted)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"restart": "always"}, "restart: 'always': expected 'permanent'"),
        ({"max_restarts": -1}, "max_restarts: -1: expected an integer, 0 or more"),
        ({"max_restarts": 1.5}, "max_restarts: 1.5: expected an integer"),
        ({"max_restarts": True}, "max_restarts: True: expected an integer"),
        ({"within_s": 0}, "within_s: 0: expected seconds above zero"),
        ({"within_s": math.nan}, "within_s: nan: expected seconds above zero"),
        ({"policy": Policy(max_broken_starts=0)}, "policy.max_broken_starts: 0: expected"),
        ({"policy": Policy(min_uptime_s=-1)}, "policy.min_uptime_s: -1: expected seconds"),
        ({"policy": Policy(backoff_s=math.nan)}, "policy.backoff_s: nan: expected seconds"),
        ({"policy": Policy(backoff_max_s=-2)}, "policy.backoff_max_s: -2: expected seconds"),
        ({"policy": Policy(stable_s=-3)}, "policy.stable_s: -3: expected seconds"),
    ],
)
def test_limits_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits(**changes)
