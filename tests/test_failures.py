"""`failures.py` and `errors.py`: distrustful reading, the root cause, the report."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asupervise import error_files, errors, failures
from asupervise.error_files import ErrorRecord, read_error_file
from asupervise.errors import SignalException, SupervisorError
from asupervise.failures import ProcessFailure, exit_status, failed_by_itself, root_cause
from asupervise.report import format_report, headline, hint_for
from asupervise.result import ChildFailedError, RunProcsResult

STAMP_S = 1_700_000_000


def failure(rank: int = 0, exitcode: int = 1, **fields: Any) -> ProcessFailure:
    fields.setdefault("record", None)
    fields.setdefault("observed_at", float(STAMP_S))
    return ProcessFailure(rank, 1000 + rank, exitcode, "error.json", **fields)


def torch_record(message: str = "ValueError: boom", **extra: Any) -> dict[str, Any]:
    stack = f"Traceback (most recent call last):\n{message}\n"
    return {"message": {"message": message, "extraInfo": {"py_callstack": stack, **extra}}}


def write(path: Path, data: Any, mtime_s: float | None = None) -> Path:
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    path.write_bytes(raw)
    if mtime_s is not None:
        os.utime(path, ns=(round(mtime_s * 1e9),) * 2)
    return path


def read(path: Path, **window: float) -> ErrorRecord:
    record = read_error_file(path, **window)
    assert record is not None
    return record


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "error.json"


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in errors.__all__ if n != "SignalException"])
def test_errors_keep_everything_when_copied_and_pickled(name: str) -> None:
    error = getattr(errors, name)("bad", local_rank=3, pid=7, hint="try this")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert (str(other), other.local_rank, other.pid, other.hint) == ("bad", 3, 7, "try this")
        assert repr(other) == repr(error) == f"{name}('bad', local_rank=3, pid=7, hint='try this')"


def test_errors_have_torchs_types() -> None:
    assert issubclass(errors.RankMapError, RuntimeError)
    assert issubclass(errors.BindingError, RuntimeError)
    assert issubclass(errors.NotSupportedError, ValueError)
    assert repr(SupervisorError("bad")) == "SupervisorError('bad')"


def test_signal_exception_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(SignalException("ended", signal.SIGTERM)))
    assert (str(error), error.sigval) == ("ended", signal.SIGTERM)
    assert "SIGTERM" in repr(error)


# --- reading an error file -------------------------------------------------------------------


def test_no_file_is_no_record(tmp_path: Path, file: Path) -> None:
    assert read_error_file(file) is None
    assert read_error_file("") is None
    assert read_error_file(write(file, {}) / "below-a-file") is None


def test_a_record_with_our_own_time(file: Path) -> None:
    data = torch_record(timestamp=str(STAMP_S), timestamp_ns=str(STAMP_S * 10**9 + 250_000_000))
    record = read(write(file, data))
    assert record.data == data
    assert record.message == data["message"]
    assert record.timestamp == STAMP_S + 0.25
    assert record.traceback.startswith("Traceback")
    assert record.note == ""


@pytest.mark.parametrize(
    ("mtime_s", "expected_s"),
    [
        (STAMP_S + 0.5, STAMP_S + 0.5),
        (STAMP_S - 0.004, STAMP_S),  # the kernel's coarse clock lags behind ours
        (STAMP_S + 1.5, STAMP_S + 0.999_999),  # written late: the stamp's second still holds
        (STAMP_S + 60.0, STAMP_S),  # touched since
        (STAMP_S - 60.0, STAMP_S),
    ],
)
def test_torchs_whole_second_is_refined_by_the_files_time(
    file: Path, mtime_s: float, expected_s: float
) -> None:
    record = read(write(file, torch_record(timestamp=str(STAMP_S)), mtime_s))
    assert record.timestamp == pytest.approx(expected_s, abs=1e-6)


def test_the_form_with_a_plain_text_message(file: Path) -> None:
    record = read(write(file, {"message": "out of luck", "timestamp": STAMP_S + 0.125}))
    assert (record.message, record.traceback) == ("out of luck", "out of luck")
    assert record.timestamp == STAMP_S + 0.125


@pytest.mark.parametrize("told_s", [STAMP_S - 3600.0, STAMP_S + 3600.0, 1e30, -5.0, 0.0])
def test_a_time_outside_the_workers_life_is_not_believed(file: Path, told_s: float) -> None:
    write(file, torch_record(timestamp=told_s))
    record = read(file, not_before=STAMP_S - 10.0, not_after=STAMP_S + 10.0)
    assert record.timestamp is None
    assert "not used" in record.note
    assert record.traceback.startswith("Traceback")


def test_a_whole_second_stamp_may_be_just_before_the_start(file: Path) -> None:
    write(file, torch_record(timestamp=STAMP_S), mtime_s=STAMP_S + 3600)
    record = read(file, not_before=STAMP_S + 0.75, not_after=STAMP_S + 5.0)
    assert record.timestamp == STAMP_S + 0.75


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "empty"),
        (b"segfault at 0", "not JSON"),
        (b'{"mess', "truncated"),
        (b"[1, 2]", "no JSON object"),
        (b"null", "no JSON object"),
        (b'{"message": [1]}', "neither text nor a record"),
        (b"[" * 100_000, "not JSON"),
        (b'{"message": ' + b"[" * 200 + b"]" * 200 + b"}", "nested too deeply"),
        (b'{"message": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b'{"message": "caf\xe9"}', "not UTF-8"),
        (b"\x00" * 100, "not JSON"),
    ],
)
def test_a_bad_file_is_described(file: Path, raw: bytes, said: str) -> None:
    record = read(write(file, raw))
    assert said in record.note
    assert record.timestamp is None or record.message
    made = failure(record=record)
    assert made.timestamp > 0
    assert said in str(ChildFailedError("job", {0: made}))


def test_what_is_left_of_a_truncated_file_is_shown(file: Path) -> None:
    raw = json.dumps(torch_record('bad "quote"\n', timestamp=str(STAMP_S))).encode()
    record = read(write(file, raw[:-60], mtime_s=STAMP_S + 0.5))
    assert "truncated" in record.note
    assert isinstance(record.message, dict)
    assert record.message["message"] == 'bad "quote"\n'
    assert record.traceback.startswith("Traceback")
    assert record.timestamp == STAMP_S + 0.5


def test_a_huge_file_is_not_read_in_full(file: Path) -> None:
    data = torch_record("x" * 3 * error_files.MAX_ERROR_FILE_BYTES, timestamp=str(STAMP_S))
    record = read(write(file, data, mtime_s=STAMP_S + 0.5))
    assert "larger than 1 MiB" in record.note
    assert 1_000_000 < len(record.traceback) <= error_files.MAX_ERROR_FILE_BYTES
    assert record.timestamp == STAMP_S + 0.5
    assert len(str(ChildFailedError("job", {0: failure(record=record)}))) < 20_000


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "device", "link", "loop"])
def test_what_is_no_regular_file_is_not_waited_for(
    tmp_path: Path, file: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(file.name)
    elif kind == "device":
        file = Path("/dev/zero")
    elif kind == "link":
        write(tmp_path / "secret", torch_record("secret"))
        file.symlink_to("secret")
    else:
        file.symlink_to(file.name)
    record = read(file)
    assert record.note.startswith("the error file cannot be read: ")
    assert record.message == ""


def test_a_path_that_is_none(tmp_path: Path) -> None:
    assert "null" in read(tmp_path / "a\0b").note


def test_a_file_that_may_not_be_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")  # root may read every file: not by chmod

    monkeypatch.setattr(os, "open", refuse)
    assert read(file).note == "the error file cannot be read: Permission denied"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
SHAPED = st.fixed_dictionaries(
    {},
    optional={
        "message": JSON
        | st.fixed_dictionaries(
            {},
            optional={
                "message": JSON,
                "errorCode": JSON,
                "extraInfo": JSON
                | st.fixed_dictionaries(
                    {}, optional={"py_callstack": JSON, "timestamp": JSON, "timestamp_ns": JSON}
                ),
            },
        ),
        "timestamp": JSON,
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    raw=st.binary() | st.text().map(str.encode) | (JSON | SHAPED).map(json.dumps).map(str.encode),
    keep=st.integers(0, 200) | st.none(),
    window=st.none() | st.tuples(st.floats(), st.floats()),
    exitcode=st.integers(-70, 300).filter(bool),
)
def test_no_file_whatever_raises_out_of_a_result(
    file: Path,
    raw: bytes,
    keep: int | None,
    window: tuple[float, float] | None,
    exitcode: int,
) -> None:
    before, after = window or (None, None)
    record = read_error_file(write(file, raw[:keep]), not_before=before, not_after=after)
    assert record is not None
    made = failure(exitcode=exitcode, record=record)
    report = str(ChildFailedError("job", {0: made}))
    report.encode("utf-8")
    assert made.timestamp_isoformat()
    assert isinstance(made.error_file_data, dict)
    assert pickle.dumps(made)
    assert repr(made)


# --- one failure -----------------------------------------------------------------------------


def test_torchs_constructor_reads_the_file(file: Path) -> None:
    data = torch_record(timestamp_ns=STAMP_S * 10**9 + 1)
    made = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(write(file, data)))
    file.unlink()
    assert made.error_file == str(file)
    assert made.error_file_data == data
    assert made.message == data["message"]
    assert int(made.timestamp) == STAMP_S
    assert pickle.loads(pickle.dumps(made)) == made


def test_torchs_constructor_without_a_file(tmp_path: Path) -> None:
    made = ProcessFailure(0, 1, 1, str(tmp_path / "none.json"))
    assert made.error_file == "<N/A>"
    assert made.error_file_data["message"] == "<NONE>"
    assert made.error_file_data["errorTraits"]["category"] == "system_terminated_error"
    assert made.message == "No traceback was recorded."


def test_a_failure_that_is_given_its_record_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file was read")

    monkeypatch.setattr(failures, "read_error_file", refuse)
    made = failure(record=ErrorRecord(message="boom", data={"message": "boom"}))
    assert dataclasses.replace(made, stderr_tail="last words").message == "boom"
    assert dataclasses.replace(failure(), note="x").error_file == "<N/A>"
    with pytest.raises(AssertionError, match="a file was read"):
        ProcessFailure(0, 1, 1, "error.json")


@pytest.mark.parametrize(
    ("exitcode", "name"), [(-9, "SIGKILL"), (-11, "SIGSEGV"), (1, "<N/A>"), (-63, "<N/A>")]
)
def test_signal_names(exitcode: int, name: str) -> None:
    made = failure(exitcode=exitcode)
    assert made.signal_name() == name
    if exitcode < 0:
        assert made.message == f"Signal {-exitcode} ({name}) ended PID 1000"
        assert "errorTraits" not in made.error_file_data


def test_the_time_is_shown_below_the_second() -> None:
    assert failure(observed_at=STAMP_S + 0.25).timestamp_isoformat().endswith(":20.250000")
    assert failure(observed_at=float(STAMP_S)).timestamp_isoformat().endswith(":20.000000")
    assert failure(observed_at=1e300).timestamp_isoformat() == "<N/A>"


@pytest.mark.parametrize(
    ("exitcode", "ours", "signalled_at", "error_time", "own"),
    [
        (0, (), None, None, False),
        (1, (), None, None, True),
        (-11, (), None, None, True),
        (-15, (15,), None, None, True),  # observed before we had sent it
        (-15, (15,), 100.0, None, False),
        (143, (15,), 100.0, None, False),
        (1, (15,), 100.0, None, False),  # a handler of SIGTERM, a nested launcher
        (-6, (15,), 100.0, None, False),  # a crash in teardown
        (1, (15,), 100.0, 100.2, False),
        (1, (15,), 100.0, 99.9, True),
        (-15, (15,), 100.0, 99.9, True),  # it was on its way out when we ended it
        (-9, (15, 9), 100.0, None, False),
        (-9, (15,), 100.0, None, True),  # somebody else's SIGKILL
        (137, (15,), 100.0, None, True),  # the same, seen through a shell
    ],
)
def test_who_ended_a_worker(
    exitcode: int,
    ours: tuple[int, ...],
    signalled_at: float | None,
    error_time: float | None,
    own: bool,
) -> None:
    decided = failed_by_itself(
        exitcode, our_signals=ours, signalled_at=signalled_at, error_time=error_time
    )
    assert decided is own
    if exitcode:
        made = ProcessFailure.from_exit(
            local_rank=0,
            pid=1,
            exitcode=exitcode,
            error_file="error.json",
            record=None if error_time is None else ErrorRecord(timestamp=error_time),
            observed_at=101.0,
            our_signals=ours,
            signalled_at=signalled_at,
        )
        assert made.ended_by_us is not own
        assert made.timestamp == (101.0 if error_time is None else error_time)


def test_exit_status() -> None:
    assert [exit_status(code) for code in (0, 1, 255, -9, -15)] == [0, 1, 255, 137, 143]


# --- the root cause --------------------------------------------------------------------------


def test_the_record_outweighs_the_order_of_exits() -> None:
    slow = failure(1, observed_at=105.0, record=ErrorRecord(timestamp=100.05))
    quick = failure(0, observed_at=100.5, record=ErrorRecord(timestamp=100.10))
    silent = failure(2, observed_at=100.4)
    assert root_cause({0: quick, 1: slow, 2: silent}) == (1, slow)
    assert root_cause({0: quick, 2: silent}) == (0, quick)


def test_ties_go_by_observation_and_then_by_rank() -> None:
    tied = {rank: failure(rank, observed_monotonic_ns=10 - rank) for rank in range(3)}
    assert root_cause(tied) == (2, tied[2])
    unseen = {rank: failure(rank) for rank in (5, 3, 4)}
    assert root_cause(unseen) == (3, unseen[3])


def test_there_may_be_no_root_cause() -> None:
    assert root_cause({}) is None
    assert root_cause({0: failure(ended_by_us=True)}) is None


MOMENTS = st.integers(0, 5).map(float)
FAILURES = st.dictionaries(
    st.integers(0, 20),
    st.builds(
        failure,
        exitcode=st.sampled_from([1, -9, -15]),
        ended_by_us=st.booleans(),
        observed_at=MOMENTS,
        observed_monotonic_ns=st.none() | st.integers(0, 5),
        record=st.none() | st.builds(ErrorRecord, timestamp=st.none() | MOMENTS),
    ),
    max_size=8,
)


@given(made=FAILURES, seed=st.randoms())
def test_root_cause_properties(made: dict[int, ProcessFailure], seed: Any) -> None:
    found = root_cause(made)
    own = [f for f in made.values() if not f.ended_by_us]
    assert (found is None) == (not own)
    shuffled = list(made.items())
    seed.shuffle(shuffled)
    assert root_cause(dict(shuffled)) == found
    if found is not None:
        rank, first = found
        assert made[rank] is first
        assert not first.ended_by_us
        assert first.timestamp == min(f.timestamp for f in own)


# --- the result ------------------------------------------------------------------------------


def test_a_result_without_failures() -> None:
    result = RunProcsResult({0: None}, {}, {0: "out"}, {0: "err"})
    assert not result.is_failed()
    assert result.root_cause is None
    result.raise_for_failure("job")


def test_a_result_raises_by_global_rank() -> None:
    result = RunProcsResult(failures={0: failure(0, observed_at=2.0), 1: failure(1)})
    assert result.is_failed()
    assert result.root_cause == (0, result.failures[0])
    with pytest.raises(ChildFailedError) as raised:
        result.raise_for_failure("job", global_ranks={0: 8, 1: 9})
    assert raised.value.get_first_failure() == (8, result.failures[0])
    with pytest.raises(ChildFailedError) as raised:
        result.raise_for_failure("job")
    assert set(raised.value.failures) == {0, 1}


# --- the report ------------------------------------------------------------------------------


def test_the_shape_of_the_report() -> None:
    record = ErrorRecord(timestamp=STAMP_S + 0.5, message=torch_record()["message"])
    error = ChildFailedError(
        "train.py",
        {
            4: failure(0, exitcode=-15, ended_by_us=True),
            5: failure(1, observed_at=STAMP_S + 3.0, record=record),
            6: failure(2, exitcode=-9, observed_at=STAMP_S + 2.0),
            7: failure(3, exitcode=-15, ended_by_us=True),
            8: failure(4, exitcode=3, ended_by_us=True),
        },
    )
    head, others, root = str(error).split("-" * 60)
    host = os.uname().nodename
    time = error.failures[5].timestamp_isoformat()
    assert head == f"\n{'=' * 60}\ntrain.py FAILED\n"
    assert others.startswith("\nFailures:\n[1]:\n")
    assert "\n  rank      : 6 (local_rank: 2)\n  exitcode  : -9 (pid: 1002) (SIGKILL)\n" in others
    assert "\n  error_file: <N/A>\n  traceback : Signal 9 (SIGKILL) ended PID 1002\n" in others
    assert others.endswith(
        "\nEnded by the supervisor: ranks 4, 7 (SIGTERM); rank 8 (exit code 3)\n"
    )
    assert root == (
        "\nRoot Cause (first observed failure):\n"
        "[0]:\n"
        f"  time      : {time}\n"
        f"  host      : {host}\n"
        "  rank      : 5 (local_rank: 1)\n"
        "  exitcode  : 1 (pid: 1001)\n"
        "  error_file: error.json\n"
        "  traceback : Traceback (most recent call last):\n"
        "  ValueError: boom\n"
        f"{'=' * 60}"
    )
    assert (error.local_rank, error.pid) == (1, 1001)
    assert repr(error) == "ChildFailedError('train.py', ranks=[4, 5, 6, 7, 8])"


def test_a_single_failure_and_other_delimiters() -> None:
    report = ChildFailedError("job", {0: failure()}).format_msg("#", "~")
    assert "  <NO_OTHER_FAILURES>\n~~~~" in report
    assert report.endswith("\n" + "#" * 40)


def test_the_last_lines_of_stderr_stand_in_for_a_traceback() -> None:
    words = "loading\nterminate called after throwing\n"
    silent = failure(exitcode=-6, stderr_tail=words)
    report = str(ChildFailedError("job", {0: silent}))
    assert "  stderr    : last lines:\n  loading\n  terminate called after throwing\n==" in report
    told = failure(stderr_tail=words, record=ErrorRecord(message="boom"))
    assert "terminate called" not in str(ChildFailedError("job", {0: told}))
    long = failure(stderr_tail="x" * 100_000)
    assert len(str(ChildFailedError("job", {0: long}))) < 6_000


def test_all_ended_by_us_is_said() -> None:
    ended = {
        rank: failure(rank, -15, ended_by_us=True, observed_at=100.0 - rank) for rank in (0, 2, 3)
    }
    error = ChildFailedError("job", ended)
    assert "No rank failed by itself" in str(error)
    assert "Ended by the supervisor: ranks 0, 2-3 (SIGTERM)" in str(error)
    assert error.get_first_failure() == (3, ended[3])


def test_no_failures_is_an_error() -> None:
    with pytest.raises(AssertionError, match="at least one"):
        ChildFailedError("job", {})


def test_people_read_of_the_culprit_first() -> None:
    made = {0: failure(0, observed_at=STAMP_S + 1), 3: failure(3), 4: failure(4, ended_by_us=True)}
    torchs = ChildFailedError("job", made).format_msg()
    ours = format_report("job", made, "=", "-", culprit_first=True)
    width = len(torchs.rpartition("\n")[2])
    border, line = "\n" + "=" * width, "\n" + "-" * width
    head, others, root = torchs.removesuffix(border).split(line)
    assert ours == f"{head}{line}{root}{line}{others}{border}"
    assert ours.index("Root Cause") < ours.index("rank      : 3") < ours.index("Failures:")


TAIL = "loading\nTraceback (most recent call last):\n  File\nmy.BadError: no\nmore\n"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"exitcode": 3}, "rank 7 failed: exit code 3"),
        ({"exitcode": -11}, "rank 7 failed: SIGSEGV"),
        ({"exitcode": -9, "cause": "the kernel's OOM killer"}, "rank 7 failed: the kernel's OOM"),
        ({"exitcode": 1, "stderr_tail": TAIL}, "rank 7 failed: my.BadError: no"),
        ({"exitcode": 1, "stderr_tail": "an Error: of another kind"}, "rank 7 failed: exit code 1"),
        ({"exitcode": -6, "stderr_tail": "Fatal Python error: Aborted\n\nCurrent thread"},
         "rank 7 failed: Fatal Python error: Aborted"),
        ({"record": ErrorRecord(message="ValueError: a\nb")}, "rank 7 failed: ValueError: a"),
        ({"record": ErrorRecord(message={"message": "E: " + "x" * 999, "extraInfo": {}})},
         "rank 7 failed: E: xxxxxxx"),
        ({"record": ErrorRecord(message="\x1b[31mred\x07")}, "rank 7 failed: red\u2407"),
        ({"host": "node-b", "exitcode": 1}, "rank 7 on node-b failed: exit code 1"),
    ],
)  # fmt: skip
def test_the_culprit_in_a_line(given: dict[str, Any], line: str) -> None:
    shown = headline(7, failure(**given))
    assert shown.startswith(line)
    assert len(shown) < 300
    assert "\n" not in shown


def test_why_is_one_line_for_whoever_lists_jobs() -> None:
    assert RunProcsResult().why == ""
    raised = failure(1, record=ErrorRecord(message="ValueError: a\nb"))
    result = RunProcsResult(failures={0: failure(0, -15, ended_by_us=True), 1: raised})
    assert (raised.why, result.why) == ("ValueError: a", "rank 1 failed: ValueError: a")
    ended = RunProcsResult(failures={0: failure(0, -15, ended_by_us=True)})
    assert ended.why == "it was ended, and no rank failed by itself"


def test_a_hint_is_made_of_what_is_known_of_the_failure() -> None:
    message = {"message": "ModuleNotFoundError: No module named 'numpy'", "extraInfo": {}}
    missing = failure(record=ErrorRecord(message=message))
    assert (
        hint_for(missing, python="/py") == "numpy is not installed in /py, which runs the workers."
    )
    assert hint_for(failure(exitcode=-11)).startswith("A crash outside Python")
    assert hint_for(failure(exitcode=1), stderr_in_file=False).startswith("What it said went to")
    known = failure(record=ErrorRecord(message="ValueError: no such batch"))
    assert hint_for(known) == ""
    assert hint_for(known, look="view logs").endswith("written: view logs")


def test_a_large_job_has_a_short_report() -> None:
    record = ErrorRecord(message="x" * 500_000)
    made = {rank: failure(rank, observed_at=float(rank), record=record) for rank in range(1000)}
    report = str(ChildFailedError("job", made))
    assert len(report) < 100_000
    assert "characters left out" in report
    assert "Failed later: ranks 17-999 (exit code 1)" in report


def test_a_worker_cannot_drive_the_terminal() -> None:
    message = "\x1b[31mred\x1b[0m \x1b]0;title\x07\x08\ud800 50%\r\ndone $title"
    report = str(ChildFailedError("job", {0: failure(record=ErrorRecord(message=message))}))
    assert "red \N{REPLACEMENT CHARACTER}\\ud800 50%\n  done $title" in report
    assert "\x1b" not in report


def test_a_traceback_says_where_the_logs_are_and_what_to_do() -> None:
    crashed = RunProcsResult(failures={0: failure(exitcode=-11)}, log_dir="/logs/run")
    with pytest.raises(ChildFailedError) as caught:
        crashed.raise_for_failure("job")
    told = "".join(traceback.format_exception(caught.value))
    assert told.endswith("core file for gdb.\nlogs: /logs/run\n")
    assert "hint: A crash outside Python" in told
    assert caught.value.log_dir == "/logs/run"


def test_a_report_survives_pickling_and_copying() -> None:
    class_of = ChildFailedError
    error = class_of("job", {3: failure(3, record=ErrorRecord(message="boom"))})
    error.hint = "look there"
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is class_of
        assert (str(other), other.hint) == (str(error), "look there")
        assert other.get_first_failure() == error.get_first_failure()
        assert (other.name, other.local_rank, other.pid) == ("job", 3, 1003)


class PickierError(ChildFailedError):
    def __init__(self, attempt: int) -> None:
        super().__init__("job", {0: failure()})
        self.attempt = attempt


def test_a_subclass_with_other_arguments_survives_pickling() -> None:
    sys.modules.setdefault(PickierError.__module__, sys.modules[__name__])
    error = copy.copy(PickierError(4))
    assert (error.attempt, error.name) == (4, "job")


def test_of_another_nodes_worker_the_last_line_of_its_traceback_is_told() -> None:
    said = "Traceback (most recent call last):\n  File 'a.py', line 3\nValueError: no\n"
    told = failure(record=ErrorRecord(message=said), host="node-b")
    assert headline(3, told) == "rank 3 on node-b failed: ValueError: no"
