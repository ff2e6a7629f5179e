"""What other nodes are told of a failure: ProcessFailure -> Culprit -> text -> ProcessFailure."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asupervise.elastic.culprits import culprit_of, failure_of
from asupervise.elastic.engine import EngineError
from asupervise.elastic.records import Culprit, read_record, text_of
from asupervise.error_files import ErrorRecord
from asupervise.failures import ProcessFailure
from asupervise.result import ChildFailedError

# Well below what etcd takes in one piece (1.5 MiB), in any encoding of the texts.
MOST_BYTES = 1_000_000


def failure(**changes: Any) -> ProcessFailure:
    record = ErrorRecord(message="Traceback ...\nValueError: no such batch", timestamp=1000.5)
    made = ProcessFailure(
        1, 4711, 3, "/logs/attempt_0/1/error.json", record=record, observed_at=1001.0,
        observed_monotonic_ns=time.monotonic_ns(), stderr_tail="the last words\n",
        note="a note", cause="the kernel's OOM killer", stack="in main (train.py:5)",
    )  # fmt: skip
    return replace(made, **changes)


def told(known: ProcessFailure, *, rank: int = 5, uptime_s: float = 10.0) -> Culprit:
    started_ns = time.monotonic_ns() - round(uptime_s * 1e9)
    return culprit_of(known, node="n1", host="host-b", round=2, rank=rank, started_ns=started_ns)


def through_text(culprit: Culprit) -> Culprit:
    return read_record(Culprit, text_of(culprit), "state/failed/2/n1")


def test_the_report_of_another_node_is_that_of_its_own() -> None:
    known = failure()
    heard = failure_of(through_text(told(known)))
    here = str(ChildFailedError("train.py", {5: replace(known, host="host-b")}, culprit=5))
    assert str(ChildFailedError("train.py", {5: heard}, culprit=5)) == here
    shown = (
        *("host-b", "rank      : 5 (local_rank: 1)", "ValueError: no such batch", "a note"),
        *("exitcode  : 3 (pid: 4711)", "OOM killer", "in main (train.py:5)"),
    )
    for text in shown:
        assert text in here


def test_the_last_words_are_there_where_there_is_no_traceback() -> None:
    heard = failure_of(through_text(told(failure(record=None, exitcode=-11))))
    report = str(ChildFailedError("train.py", {5: heard}, culprit=5))
    assert "the last words" in report
    assert "(SIGSEGV)" in report


def test_age_and_uptime_are_of_the_exception_and_not_of_the_exit() -> None:
    """A worker that has recorded its exception half a second before it was seen to exit."""
    seen = failure(observed_monotonic_ns=time.monotonic_ns() - 2_000_000_000)
    culprit = told(seen, uptime_s=10.0)
    assert culprit.age_s == pytest.approx(2.5, abs=0.4)
    assert culprit.uptime_s == pytest.approx(7.5, abs=0.4)


@pytest.mark.parametrize("recorded_at", [-1e12, 2e12, 1e308])
def test_a_clock_that_has_jumped_makes_no_age(recorded_at: float) -> None:
    seen = failure(record=ErrorRecord(message="x", timestamp=recorded_at))
    culprit = through_text(told(seen))
    assert 0.0 <= culprit.age_s < 62.0
    assert 0.0 <= culprit.uptime_s < 62.0


@pytest.mark.parametrize(
    ("said", "rank", "uptime_s", "taken"),
    [
        ("RuntimeError: ... code: 98, name: EADDRINUSE, ...", 0, 2.0, True),
        ("OSError: [Errno 98] Address already in use", 0, 2.0, True),
        ("OSError: [Errno 98] Address already in use", 1, 2.0, False),
        ("OSError: [Errno 98] Address already in use", 0, 3600.0, False),
        ("OSError: [Errno 111] Connection refused", 0, 2.0, False),
    ],
)
def test_a_port_is_taken_if_rank_0_says_so_at_its_start(
    said: str, rank: int, uptime_s: float, taken: bool
) -> None:
    record = ErrorRecord(message=said, timestamp=1001.0)
    for seen in (failure(record=record), failure(record=None, stderr_tail=said)):
        assert told(seen, rank=rank, uptime_s=uptime_s).port_taken is taken


@pytest.mark.parametrize("char", ["x", "\0", "\N{SNOWMAN}", "\U0001f600", "\udc80"])
def test_it_is_bounded(char: str) -> None:
    much = char * 5_000_000
    seen = failure(
        record=ErrorRecord(message=much, timestamp=1.0), stderr_tail=much, note=much, cause=much,
        stack=much, error_file=much,
    )  # fmt: skip
    culprit = told(seen)
    text = text_of(culprit)
    assert len(text.encode()) < MOST_BYTES
    heard = failure_of(read_record(Culprit, text, "key"))
    # What was last is kept: there the exception is named.
    assert much.endswith(heard.traceback)
    assert len(heard.traceback) > 1000


# --- others may write anything there --------------------------------------------------------------

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["host", "local_rank", "pid", "timestamp", "traceback", "ended_by_us", "error_file",
     "stderr_tail", "note", "cause", "stack", "other"]
)  # fmt: skip


@settings(deadline=None)
@given(
    st.dictionaries(NAMES, ANYTHING),
    st.integers(-300, 300) | st.integers(),
    st.integers(0),
)
def test_whatever_was_written_becomes_a_report(data: dict[str, Any], code: int, rank: int) -> None:
    heard = failure_of(Culprit("n", 0, rank, exitcode=code, failure=data))
    report = str(ChildFailedError("train.py", {rank: heard}, culprit=rank))
    assert report.encode()


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["format", "node", "round", "rank", "age_s", "failure",
                                        "uptime_s", "exitcode", "port_taken"]), ANYTHING)
       | ANYTHING)  # fmt: skip
def test_a_record_is_read_or_refused(data: Any) -> None:
    text = json.dumps(data)
    with suppress(EngineError):
        culprit = read_record(Culprit, text, "key")
        assert str(ChildFailedError("train.py", {culprit.rank: failure_of(culprit)}))


def test_a_rank_below_zero_is_refused() -> None:
    with pytest.raises(EngineError, match="rank: -1"):
        read_record(Culprit, '{"format":1,"node":"n","round":0,"rank":-1}', "key")


@settings(deadline=None)
@given(st.builds(failure, exitcode=st.integers(-64, 255), stderr_tail=st.text(), cause=st.text(),
                 note=st.text(), stack=st.text()), st.integers(0, 10**6))  # fmt: skip
def test_nothing_that_a_worker_says_is_refused_elsewhere(seen: ProcessFailure, rank: int) -> None:
    heard = failure_of(through_text(told(seen, rank=rank)))
    assert (heard.exitcode, heard.local_rank, heard.pid) == (seen.exitcode, 1, 4711)
    assert (heard.stderr_tail, heard.cause) == (seen.stderr_tail, seen.cause)
    assert (heard.note, heard.stack, heard.host) == (seen.note, seen.stack, "host-b")
