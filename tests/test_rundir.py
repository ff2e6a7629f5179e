"""What a run's folder says, however broken it is."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asupervise import events as ev
from asupervise import recording
from asupervise.views import files, rundir
from asupervise.views.files import log_files, tail
from asupervise.views.rundir import RunFolderError, find_run, read_run
from asupervise.views.story import told_run
from tests.run_folders import (
    HEADER,
    NS0,
    T0,
    a_failure,
    event,
    exited,
    failed,
    group,
    group_ended,
    log,
    started,
    worker,
    write,
)


def run_of(*told: dict[str, Any], **options: Any) -> Any:
    found = [parsed for line in told if (parsed := ev.from_dict(line)) is not None]
    assert len(found) == len(told), "an event that cannot be read"
    return told_run(found, **options)


# --- events into a run --------------------------------------------------------------------------


def test_the_names_are_those_that_are_written() -> None:
    assert rundir.EVENTS_FILE == recording.EVENTS_FILE
    assert rundir.FORMAT == recording.FORMAT


def test_a_failure() -> None:
    run = run_of(*a_failure())
    assert (run.state, run.title, run.nprocs, run.node) == ("failed", "train.py", 3, "node7")
    assert run.duration_s == pytest.approx(2.8)
    assert run.culprit is not None
    assert run.culprit.rank == run.root_cause == 1
    assert [life.outcome for life in run.lives] == ["ended", "failed", "ended"]
    assert run.lives[1].stdout == "attempt_0/1/stdout.log"
    assert run.attempts[0].culprit == run.culprit


def test_a_success() -> None:
    run = run_of(group(2), started(0, 0), started(0, 1), exited(1, 0), exited(1, 1), group_ended(1))
    assert (run.state, run.culprit, run.root_cause) == ("succeeded", None, None)
    assert [life.outcome for life in run.lives] == ["succeeded", "succeeded"]


def test_between_two_attempts_of_a_run_it_has_not_ended() -> None:
    told = [
        event("round_completed", 0, round=0, members=["node7"], world_size=1),
        group(1), started(0, 0), exited(1, 0, 1), failed(1.1, 0, root_cause=True),
        group_ended(1.2, 0),
        event("restarting", 1.3, restarts=1, max_restarts=2, reason="rank 0 failed", delay_s=5.0),
    ]  # fmt: skip
    assert run_of(*told, now=T0 + 2).state == "running"
    assert run_of(*told, now=T0 + 3600).state == "unknown"
    again = [
        *told, group(1, at_s=6, attempt=1), started(6, 0, attempt=1, pid=7),
        exited(8, 0, attempt=1, pid=7), group_ended(8, attempt=1),
        event("run_ended", 8, succeeded=True, why="all ranks succeeded", exit_status=0),
    ]  # fmt: skip
    run = run_of(*again)
    assert (run.state, run.why) == ("succeeded", "all ranks succeeded")
    assert [(a.number, a.succeeded) for a in run.attempts] == [(0, False), (1, True)]
    assert run.attempts[0].culprit is not None
    assert run.culprit is None


def test_who_is_alive_decides_whether_it_goes_on() -> None:
    told = [group(1), started(0, 0)]
    assert run_of(*told, now=T0 + 9).state == "unknown"
    assert run_of(*told, now=T0 + 9, is_alive=lambda started: True).state == "running"


def test_a_culprit_on_another_node() -> None:
    run = run_of(
        group(1), started(0, 0), exited(1, 0, -15), failed(1, 0, -15, ended_by_us=True),
        group_ended(1, 5),
        event("run_ended", 1, succeeded=False, why="rank 5 failed", exit_status=3, root_cause=5),
    )  # fmt: skip
    assert (run.state, run.root_cause, run.culprit, run.exit_status) == ("failed", 5, None, 3)


def test_a_service_has_lives_of_each_worker() -> None:
    run = run_of(
        group(1), started(0, 0), exited(1, 0, 3), failed(1, 0, 3),
        event("restarting", 1, restarts=1, local_rank=0),
        started(2, 0, attempt=1, pid=7), exited(3, 0, 4, attempt=1, pid=7),
        failed(3, 0, 4, attempt=1, pid=7, ended_by_us=False),
        # Told again, with the service's own attempt, when it is known to be the culprit.
        failed(3, 0, 4, pid=7, root_cause=True),
        # And it could not even be started any more.
        failed(4, 0, 127, pid=0, message="no such program"),
        group_ended(4, 0),
    )  # fmt: skip
    assert [(life.attempt, life.exitcode) for life in run.lives] == [(0, 3), (1, 4), (2, 127)]
    assert run.culprit == run.lives[1]
    assert len(run.attempts) == 1


def test_samples_beats_and_progress() -> None:
    beats = [worker("heartbeat", at_s, 0) for at_s in (1, 1.1, 1.2, 1.3, 4.0, 4.1)]
    run = run_of(
        group(1), started(0, 0), *beats,
        worker("first_output", 0.5, 0, stream="stdout"),
        worker("first_output", 0.6, 0, stream="stderr"),
        worker("resource_sample", 1, 0, rss_bytes=5, cpu_s=0.5),
        worker("progress", 1, 0, done=1), worker("progress", 2, 0, done=3.5, total=10),
        event("stacks_dumped", 5, stacks={"0": "in wait (a.py:3)"}),
        exited(9, 0), group_ended(9),
    )  # fmt: skip
    life = run.lives[0]
    assert life.first_output_s == 0.5
    assert life.samples[0].cpu_s == 0.5
    assert life.progress == (3.5, 10.0)
    assert life.stack == "in wait (a.py:3)"
    assert [(round(a, 1), round(b, 1)) for a, b in life.gaps] == [(1.3, 4.0), (4.1, 9.0)]
    assert not [each for each in run.events if each.kind in ("heartbeat", "progress")]


@pytest.mark.parametrize(
    ("entrypoint", "argv", "title"),
    [
        ("/usr/bin/python3", ["/usr/bin/python3", "-u", "/srv/train.py", "--lr", "1"], "train.py"),
        ("python", ["/usr/bin/numactl", "-N0", "--", "python", "-m", "pkg.run"], "pkg.run"),
        ("python", ["python", "-X", "dev", "-c", "pass"], "python -c …"),
        ("/bin/echo", ["/bin/echo", "hi"], "echo"),
        ("__main__.train", [], "__main__.train"),
        ("job.train", ["/usr/bin/python3", "-m", "asupervise.functions.bootstrap"], "job.train"),
        ("python", ["python"], "python"),
    ],
)  # fmt: skip
def test_titles(entrypoint: str, argv: list[str], title: str) -> None:
    start = event("group_starting", nprocs=1, entrypoint=entrypoint)
    assert run_of(start, started(0, 0, argv=argv)).title == title


# --- folders ------------------------------------------------------------------------------------


def test_a_folder_that_was_moved_keeps_its_logs(tmp_path: Path) -> None:
    folder = write(tmp_path / "moved", a_failure("/elsewhere/run"))
    log(folder, 1, "out", "err")
    run = read_run(str(folder))
    found = [(file.life.rank, file.stream, file.size) for file in log_files(run)]
    assert found == [(0, "stdout", 0), (0, "stderr", 0), (1, "stdout", 3), (1, "stderr", 3),
                     (2, "stdout", 0), (2, "stderr", 0)]  # fmt: skip


def test_what_events_say_of_files_is_not_believed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    folder = tmp_path / "run"
    paths = [f"{folder}/../secret", str(secret), f"{folder}/attempt_0/0/../../../secret", "\0"]
    for path in paths:
        write(folder, [group(1, folder), started(0, 0, folder, stdout=path)])
        assert "secret" not in [file.path for file in log_files(read_run(str(folder)))]
        assert all(file.size == 0 for file in log_files(read_run(str(folder))))


def test_other_things_in_the_place_of_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", a_failure(tmp_path / "run"))
    secret = tmp_path / "secret"
    secret.write_text("secret")
    inner = folder / "attempt_0/1"
    for name, make in (
        ("stdout.log", lambda path: path.symlink_to(secret)),
        ("stderr.log", os.mkfifo),
    ):
        (inner / name).unlink()
        make(inner / name)
    (folder / "attempt_0/2/stdout.log").unlink()
    (folder / "attempt_0/2/stdout.log").mkdir()
    found = [(file.life.rank, file.stream) for file in log_files(read_run(str(folder)))]
    assert found == [(0, "stdout"), (0, "stderr"), (2, "stderr")]
    assert tail(str(inner / "stdout.log"), 100) == b""
    assert tail(str(inner / "stderr.log"), 100) == b""


def test_events_in_the_place_of_a_fifo_do_not_hold_us_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "events.jsonl")
    run = read_run(str(tmp_path))
    assert run.state == "unknown"
    assert "cannot be read: it is not a regular file" in run.notes[0]


def test_a_folder_of_torchrun(tmp_path: Path) -> None:
    folder = tmp_path / "none_x3g6r"
    log(folder, 0, "out")
    inner = log(folder, 1, stderr="err")
    error = {"message": {"message": "ValueError: x", "extraInfo": {
        "py_callstack": "Traceback\nValueError: x", "timestamp": "1700000000"}}}  # fmt: skip
    (inner / "error.json").write_text(json.dumps(error))
    run = read_run(str(folder))
    assert (run.state, run.nprocs, run.title) == ("failed", 2, "none_x3g6r")
    assert run.culprit is not None
    assert run.culprit.rank == 1
    assert run.culprit.failure is not None
    assert run.culprit.failure.message == "ValueError: x"
    assert "there is no events.jsonl" in run.notes[0]


def test_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    told = [e for e in a_failure(tmp_path) if e["event"] not in ("worker_failed", "group_ended")]
    folder = write(tmp_path, told)
    (folder / "attempt_0/1/error.json").write_text('{"message": "no such batch", "timestamp": 1}')
    run = read_run(str(folder))
    assert run.state == "unknown"
    assert run.culprit is not None
    assert (run.culprit.rank, run.culprit.failure.message) == (1, "no such batch")  # type: ignore[union-attr]


def test_a_process_that_runs_is_known_as_that(tmp_path: Path) -> None:
    now, ns = time.time(), time.monotonic_ns()
    entry = rundir.procfs.read_entry(os.getpid())
    assert entry is not None
    age_s = rundir._age_s(entry)
    mine = {"pid": os.getpid(), "node": os.uname().nodename}
    at = {"time": now - age_s, "monotonic_ns": ns - int(age_s * 10**9)}
    write(tmp_path, [group(1), started(0, 0) | mine | at])
    assert read_run(str(tmp_path)).state == "running"
    # Another process that has been given the same number since.
    earlier = {"time": now - age_s - 1e5, "monotonic_ns": 1}
    write(tmp_path, [group(1), started(0, 0) | mine | earlier])
    assert read_run(str(tmp_path)).state == "unknown"


# --- broken events ------------------------------------------------------------------------------


def test_half_written(tmp_path: Path) -> None:
    folder = write(tmp_path, a_failure(tmp_path))
    path = folder / "events.jsonl"
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        run = read_run(str(folder))
        assert run.state in ("unknown", "failed", "running")
    path.write_bytes(whole[:-20])
    assert read_run(str(folder)).notes == ("the last line of events.jsonl is cut short",)


def test_garbage_between_events_is_counted(tmp_path: Path) -> None:
    folder = write(tmp_path, a_failure(tmp_path))
    path = folder / "events.jsonl"
    lines = path.read_bytes().split(b"\n")
    deep = b"[" * 100_000
    odd = b'{"event": "worker_exited", "local_rank": -1, "rank": 1, "exitcode": 1, "uptime_s": 1}'
    huge = json.dumps(exited(1, 10**20)).encode()
    number = b"9" * 5000
    lines[2:2] = [b"\xff\xfe\0", b"null", b"[]", deep, odd, b"", huge, number, b'{"event":"later"}']
    path.write_bytes(b"\n".join(lines))
    run = read_run(str(folder))
    assert run.state == "failed"
    assert len(run.lives) == 3
    assert run.notes == ("5 lines of events.jsonl could not be read",)


def test_events_of_a_later_version_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [], header={"event": "header", "format": 2, "version": "9.0"})
    with pytest.raises(RunFolderError, match=r"by asupervise 9\.0 in format 2; this version reads"):
        read_run(str(tmp_path))


@pytest.mark.parametrize("header", [None, {"event": "header"}, {"event": "header", "format": "x"}])
def test_a_header_that_says_nothing(tmp_path: Path, header: Any) -> None:
    write(tmp_path, a_failure(), header=header)
    assert read_run(str(tmp_path)).state == "failed"


def test_a_huge_file_of_events_is_read_at_both_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rundir, "_HEAD_BYTES", 4000)
    monkeypatch.setattr(rundir, "_TAIL_BYTES", 4000)
    first, *_, last = a_failure(tmp_path)
    beats = [worker("heartbeat", n / 100, 0) for n in range(1000)]
    write(tmp_path, [first, started(0, 0, tmp_path), *beats, last | {"monotonic_ns": NS0 + 10**11}])
    run = read_run(str(tmp_path))
    assert run.state == "failed"
    assert run.duration_s == 100
    assert "in its middle were not read" in run.notes[0]


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
json_values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
kinds = st.sampled_from([*ev.KINDS, "header", "later"])
names = ("monotonic_ns", "time", "attempt", "local_rank", "rank", "pid", "exitcode", "stacks",
         "argv", "stdout", "log_dir", "stream", "root_cause", "ranks", "uptime_s", "rss_bytes",
         "cpu_s", "message", "restarts", "delay_s", "round", "members")  # fmt: skip
small = st.integers(-2, 3)
odd_events = st.builds(
    lambda kind, fields: {**event(str(kind)), **fields},
    kinds,
    st.dictionaries(st.sampled_from(names), small | json_values, max_size=6),
)
odd_lines = (
    odd_events.map(lambda line: json.dumps(line).encode())
    | st.sampled_from(a_failure()).map(lambda line: json.dumps(line).encode())
    | st.binary(max_size=40)
)


@settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.lists(odd_lines, max_size=12), st.binary(max_size=40))
def test_no_folder_is_too_strange(tmp_path: Path, lines: list[bytes], end: bytes) -> None:
    from asupervise.views.report import render

    head = json.dumps(HEADER).encode()
    (tmp_path / "events.jsonl").write_bytes(b"\n".join([head, *lines, end]))
    log(tmp_path, 0, end, end)
    (tmp_path / "attempt_0/0/error.json").write_bytes(end)
    page = render(read_run(str(tmp_path)))
    page.encode()


# --- finding it ---------------------------------------------------------------------------------


def test_the_newest_run_of_a_log_dir(tmp_path: Path) -> None:
    assert find_run(str(write(tmp_path / "b", [group(1, at_s=5)]))) == str(tmp_path / "b")
    write(tmp_path / "a", [group(1, at_s=9)])
    write(tmp_path / "c", [group(1, at_s=7)])
    log(tmp_path / "of_torchrun", 0)
    os.utime(tmp_path / "of_torchrun/attempt_0", (1, 1))
    (tmp_path / "other").mkdir()
    # To make a report makes its folder new.
    os.utime(tmp_path / "b")
    assert find_run(str(tmp_path)) == str(tmp_path / "a")
    assert find_run(f"{tmp_path}/a/") == str(tmp_path / "a")


def test_one_error_says_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, text in (
        (tmp_path / "none", "there is no such folder"),
        (tmp_path / "file", "it is no folder"),
        (tmp_path, "no run has left anything here"),
    ):
        with pytest.raises(RunFolderError, match=text) as caught:
            find_run(str(path))
        assert caught.value.hint
    with pytest.raises(RunFolderError, match="no such folder"):
        read_run(str(tmp_path / "none"))


# --- the ends of files --------------------------------------------------------------------------


def test_tails_are_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"first\nsecond\nthird")
    assert tail(str(path), 100) == b"first\nsecond\nthird"
    assert tail(str(path), 12) == b"third"
    assert tail(str(path), 3) == b"ird"
    path.write_bytes(b"x" * 50 + b"\n")
    assert tail(str(path), 10) == b"x" * 9 + b"\n"
    assert tail(str(tmp_path / "none"), 10) == b""


def test_a_sparse_gigabyte_is_read_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        file.truncate(1 << 30)
        file.seek(0, os.SEEK_END)
        file.write(b"\nlast\n")
    assert tail(str(path), 4096) == b"last\n"
    assert files.read_ends(str(path), 0, 64)[1] > 1 << 29
