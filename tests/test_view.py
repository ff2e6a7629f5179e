"""``python -m asupervise.view``: logs merged and followed, a run's end in the terminal."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import asupervise
from asupervise import view
from asupervise.views import following, loglines
from asupervise.views.files import LogFile, log_files
from asupervise.views.following import Follower, whole_end
from asupervise.views.lives import Life
from asupervise.views.loglines import Choice, chosen, lines_of, merged, tail_start, whole_lines
from asupervise.views.printing import Format, printed
from asupervise.views.rundir import read_run
from asupervise.views.stamps import Clock
from tests.conftest import ROOT, clean_environment
from tests.run_folders import (
    NODE,
    a_failure,
    event,
    exited,
    group,
    group_ended,
    log,
    started,
    write,
)

DAY = 1_700_000_000.0  # 2023-11-14 22:13:20 UTC


@pytest.fixture(autouse=True)
def _berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


# --- when a line was written --------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "2023-11-14 23:13:25,500 INFO step 1",
        "2023-11-14T23:13:25.5 step 1",
        "[2023-11-14 23:13:25.500000] step 1",
        "2023-11-14T22:13:25.500Z step 1",
        "2023-11-14 23:13:25.500+01:00 step",
        "2023-11-14T16:43:25.5-0530 step",
        "(2023-11-14 23:13:25.5)",
        "WARNING: 2023-11-14 23:13:25,500 step",
        "[INFO] [2023-11-14 23:13:25,500] step",
        "INFO|2023-11-14 23:13:25.5|step",
    ],
)
def test_stamps(line: str) -> None:
    assert Clock((DAY, DAY + 60)).read(line) == DAY + 5.5


@pytest.mark.parametrize(
    "line",
    [
        "step 1 at 2023-11-14 23:13:25",
        "23:13:25 step 1",
        "2023-11-14 step 1",
        "2023-13-14 23:13:25 no such month",
        "2023-02-31 23:13:25 no such day",
        "2023-11-14 29:13:25 no such hour",
        "2023-11-14 23:13:251 more digits",
        "2019-01-01 00:00:00,3.5",  # of the data
        "2023-11-14 23:23:25 later than the file",
        "INFORMATION 2023-11-14 23:13:25",
        "",
    ],
)
def test_no_stamps(line: str) -> None:
    clock = Clock((DAY, DAY + 60))
    assert clock.read("2023-11-14 23:13:21 ready") == DAY + 1
    assert clock.read(line) is None


def test_a_file_has_one_zone() -> None:
    clock = Clock((DAY, DAY + 7200))
    assert clock.read("2023-11-14 22:13:25 in UTC") == DAY + 5
    # It would be true in the viewer's zone, too, and is not taken for that.
    assert clock.read("2023-11-14 23:13:25 an hour later") == DAY + 3605
    local = Clock((DAY, DAY + 7200))
    assert local.read("2023-11-14 23:13:25 in the viewer's zone") == DAY + 5
    assert local.read("2023-11-14 22:13:25 cannot be") is None


@given(st.text(st.sampled_from("0123456789-:.,TZ+[( INFO"), max_size=40) | st.text())
def test_no_line_is_too_strange(line: str) -> None:
    at = Clock((DAY, DAY + 60)).read(line)
    assert at is None or DAY - 3 < at < DAY + 63


# --- merging ------------------------------------------------------------------------------------


def a_file(
    folder: Path, rank: int, text: str, *, stream: str = "stdout", since: float | None = DAY,
    until: float = DAY + 60, attempt: int = 0,
) -> LogFile:  # fmt: skip
    path = folder / f"{attempt}.{rank}.{stream}"
    path.write_text(text)
    life = Life(attempt, rank, rank, started_at=since)
    return LogFile(life, stream, str(path), path.name, len(text.encode()), until)


def texts(files: list[LogFile]) -> list[str]:
    return [line.text for line in merged(chosen(files, Choice()))]


def test_lines_with_times_are_merged_and_those_without_stay_with_theirs(tmp_path: Path) -> None:
    first = a_file(
        tmp_path, 0,
        "before any\n2023-11-14 23:13:22 a\nTraceback\n  boom\n2023-11-14 23:13:28 d\n",
    )  # fmt: skip
    second = a_file(tmp_path, 1, "2023-11-14 23:13:21 z\n2023-11-14 23:13:25 c\nmore of c\n")
    assert [text[-9:] for text in texts([first, second])] == [
        "efore any", "3:13:21 z", "3:13:22 a", "Traceback", "  boom", "3:13:25 c", "more of c",
        "3:13:28 d",
    ]  # fmt: skip


def test_files_without_times_stand_one_after_the_other(tmp_path: Path) -> None:
    late = a_file(tmp_path, 0, "0a\n0b\n", since=DAY + 2)
    early = a_file(tmp_path, 1, "1a\n1b\n", since=DAY + 1)
    same = a_file(tmp_path, 2, "2a\n2b\n", since=DAY + 2)
    assert texts([late, early, same]) == ["1a", "1b", "0a", "0b", "2a", "2b"]


def test_at_the_same_time_the_order_is_that_of_attempts_ranks_and_streams(tmp_path: Path) -> None:
    stamp = "2023-11-14 23:13:25"
    files = [
        a_file(tmp_path, rank, f"{stamp} {rank} {stream} {attempt}\n", stream=stream,
               attempt=attempt)
        for attempt in (1, 0) for rank in (1, 0) for stream in ("stderr", "stdout")
    ]  # fmt: skip
    assert [text.removeprefix(stamp) for text in texts(files)] == [
        " 0 stdout 0", " 0 stderr 0", " 1 stdout 0", " 1 stderr 0",
        " 0 stdout 1", " 0 stderr 1", " 1 stdout 1", " 1 stderr 1",
    ]  # fmt: skip


def test_the_lines_of_one_file_keep_their_order_whatever_they_say(tmp_path: Path) -> None:
    backwards = "2023-11-14 23:13:29 1\n2023-11-14 23:13:21 2\n2023-11-14 23:13:30 3\n"
    other = "2023-11-14 23:13:25 x\n"
    found = texts([a_file(tmp_path, 0, backwards), a_file(tmp_path, 1, other)])
    assert [text[-1] for text in found] == ["x", "1", "2", "3"]


lines = st.lists(
    st.sampled_from([f"2023-11-14 23:13:{second:02}" for second in range(20, 60)])
    | st.just("more"),
    max_size=12,
)


@given(st.lists(lines, min_size=1, max_size=4))
def test_merging_loses_nothing_and_turns_nothing_round(
    tmp_path_factory: pytest.TempPathFactory, of_files: list[list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("logs")
    numbered = [[f"{text} #{n}" for n, text in enumerate(each)] for each in of_files]
    files = [
        a_file(folder, rank, "".join(f"{text}\n" for text in each))
        for rank, each in enumerate(numbered)
    ]
    found = list(merged(files))
    for file, expected in zip(files, numbered, strict=True):
        assert [line.text for line in found if line.file == file] == expected
    assert [line.key for line in found] == sorted(line.key for line in found)


def test_pieces_of_any_size(tmp_path: Path) -> None:
    text = "".join(f"line {n} {'x' * (n % 50)}\n" for n in range(300)) + "no end"
    file = a_file(tmp_path, 0, text)
    for size in (7, 64, 1 << 20):
        assert [line.text for line in lines_of(file, 0, size)] == text.split("\n")
    long = list(whole_lines([b"y" * 200_000 + b"\nz\n"]))
    assert b"".join(long[:-1]) == b"y" * 200_000
    assert max(map(len, long)) == loglines._LINE_BYTES
    assert long[-1] == b"z"


@given(st.lists(st.sampled_from(["", "a", "bb", "c" * 9]), max_size=20), st.booleans())
def test_tails(tmp_path_factory: pytest.TempPathFactory, of_lines: list[str], end: bool) -> None:
    text = "\n".join(of_lines) + ("\n" if end and of_lines else "")
    file = a_file(tmp_path_factory.mktemp("logs"), 0, text)
    expected = text.removesuffix("\n").split("\n") if text else []
    for count in (0, 1, 2, 5, 50):
        shown = text[tail_start(file, count) :]
        found = shown.removesuffix("\n").split("\n") if shown else []
        assert found == expected[len(expected) - count if count < len(expected) else 0 :]


def test_a_long_tail_over_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loglines, "_BLOCK_BYTES", 16)
    text = "".join(f"line {n}\n" for n in range(100))
    file = a_file(tmp_path, 0, text)
    assert text[tail_start(file, 7) :] == "".join(f"line {n}\n" for n in range(93, 100))


def test_what_is_written_on_is_left_for_later(tmp_path: Path) -> None:
    assert whole_end(a_file(tmp_path, 0, "a\nb")) == 2
    assert whole_end(a_file(tmp_path, 0, "ab")) == 0
    assert whole_end(a_file(tmp_path, 0, "")) == 0
    assert whole_end(a_file(tmp_path, 0, "x" * 100_000)) == 100_000
    gone = a_file(tmp_path, 0, "x")
    os.unlink(gone.path)
    assert whole_end(gone) == 0
    assert list(lines_of(gone)) == []


# --- how they are shown -------------------------------------------------------------------------


def shown(file: LogFile, **how: Any) -> str:
    return "".join(printed(lines_of(file), Format(**how)))


def test_prefixes_times_and_colours(tmp_path: Path) -> None:
    file = a_file(tmp_path, 3, "2023-11-14 23:13:25 a\nb\n", stream="stderr", attempt=1)
    assert shown(file) == "3 ! 2023-11-14 23:13:25 a\n3 ! b\n"
    assert shown(file, width=3, attempts=True, timestamps=True, pattern=re.compile("a$")) == (
        "2023-11-14 23:13:25.000 1/  3 ! 2023-11-14 23:13:25 a\n"
    )
    assert shown(file, timestamps=True, prefix=False).splitlines()[1] == " " * 24 + "b"
    assert shown(file, colours=True).splitlines()[1] == "\x1b[35m3 ! \x1b[0mb"


def test_nothing_that_workers_print_acts_on_the_terminal(tmp_path: Path) -> None:
    text = "\x1b[31mred\x1b[2J\x1b]0;title\x07\n\x00\x9b31m\u202e\r10 %\r20 %\r\n"
    file = a_file(tmp_path, 0, text)
    assert shown(file, prefix=False) == "red\n20 %\n"
    assert shown(file, prefix=False, colours=True) == "\x1b[31mred\x1b[0m\n20 %\n"


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write(tmp_path / "logs" / "run", a_failure(tmp_path / "logs" / "run"))
    for rank in range(3):
        log(folder, rank, f"out {rank}\nOUT {rank}\n", f"err {rank}\n")
    return folder


def output(capsys: pytest.CaptureFixture[str], *argv: object, status: int = 0) -> str:
    assert view.main(list(map(str, argv))) == status
    return capsys.readouterr().out


def test_logs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "logs", folder) == (
        "0 | out 0\n0 | OUT 0\n0 ! err 0\n1 | out 1\n1 | OUT 1\n1 ! err 1\n"
        "2 | out 2\n2 | OUT 2\n2 ! err 2\n"
    )
    assert output(capsys, "logs", folder, "--rank", "0,2-9", "--stream", "stderr") == (
        "0 ! err 0\n2 ! err 2\n"
    )
    assert output(capsys, "logs", folder, "--grep", "(?i)^out [12]", "--tail", 1) == (
        "1 | OUT 1\n2 | OUT 2\n"
    )
    assert output(capsys, "logs", folder, "--by-rank", "--rank", 1) == (
        "==> rank 1 stdout\nout 1\nOUT 1\n==> rank 1 stderr\nerr 1\n"
    )
    assert output(capsys, "logs", folder, "--by-rank", "--prefix", "--rank", 1, "--tail", 1) == (
        "1 | OUT 1\n1 ! err 1\n"
    )
    assert output(capsys, "logs", folder, "--no-prefix", "--tail", 1, "--stream", "stderr") == (
        "err 0\nerr 1\nerr 2\n"
    )


def test_attempts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(folder, 0, "again\n", attempt=1)
    assert output(capsys, "logs", folder, "--attempt", "last") == "0 | again\n"
    assert output(capsys, "logs", folder, "--attempt", 0, "--rank", 0, "--tail", 1) == (
        "0 | OUT 0\n0 ! err 0\n"
    )
    assert "1/0 | again\n" in output(capsys, "logs", folder, "--attempt", "all")


def test_a_log_dir_is_its_newest_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert view.main(["logs", str(folder.parent), "--tail", "0"]) == 0
    said = capsys.readouterr()
    assert said.err == f"the newest run in {folder.parent}: {folder}\n"
    assert said.out == ""


def test_colours_are_for_terminals(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\x1b" not in output(capsys, "logs", folder)
    assert "\x1b[36m0 | \x1b[0mout" in output(capsys, "logs", folder, "--color", "always")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b" in output(capsys, "show", folder)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in output(capsys, "show", folder)


def test_report(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert output(capsys, "report", folder) == f"{folder}/report.html\n"
    assert (folder / "report.html").exists()
    there = tmp_path / "page.html"
    assert output(capsys, "report", folder, "-o", there) == f"{there}\n"
    assert 'href="logs/run/attempt_0/1/stdout.log"' in there.read_text()
    page = output(capsys, "report", folder, "-o", "-")
    assert page.startswith("<!doctype html>")
    assert view.main(["report", str(folder), "-o", str(tmp_path / "none" / "x.html")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


def test_show(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "show", folder, "--events")
    assert text.startswith("train.py: Failed\nRank 1 failed first: exit code 1 after 1.9 s;")
    assert "Rank 1: ValueError: no such batch\n  Traceback (most recent" in text
    assert "ranks 0, 2: SIGTERM, by the supervisor; peak memory 100 MiB" in text
    assert "2.700  root cause: rank 1: ValueError: no such batch" in text
    assert text.endswith(f"\nlogs: {folder}\n")


def test_show_does_nothing_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "a\x1b[2J\x07\u202e\ud800"
    told = [
        group(1) | {"entrypoint": evil, "node": evil}, started(0, 0, argv=[]), exited(1, 0, 1),
        a_failure()[9] | {"message": evil, "traceback": evil, "stack": evil, "pid": 1000,
                          "local_rank": 0, "rank": 0},
        event("warned", 1, text=evil), group_ended(1, 0),
    ]  # fmt: skip
    text = output(capsys, "show", write(tmp_path, told), "--events")
    assert not re.search("[\x1b\x07\u202e]", text)
    assert "a\u2407\\u202e" in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("logs",), "the following arguments are required: RUN_DIR"),
        (("logs", ".", "--rank", "5-2"), "'5-2': expected ranks and ranges"),
        (("logs", ".", "--rank", "9" * 10), "expected ranks and ranges"),
        (("logs", ".", "--stream", "x"), "'x': expected stdout, stderr or both"),
        (("logs", ".", "--attempt", "-1"), "expected a number, last or all"),
        (("logs", ".", "--grep", "a["), "'a[': unterminated character set"),
        (("logs", ".", "--tail", "x"), "'x': expected a number of lines, 0 or more"),
        (("logs", ".", "--merge", "--by-rank"), "not allowed with argument --merge"),
        (("report", ".", "--tail", "1"), "unrecognized arguments"),
    ],
)
def test_usage_errors(argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        view.main(argv)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_folders_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("show", "logs", "report"):
        assert view.main([command, str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path}: no run has left anything here")
        assert "\nhint: give a run's folder" in said
    write(tmp_path, [], header={"event": "header", "format": 99})
    assert view.main(["show", str(tmp_path)]) == 2
    assert "this version reads format 1" in capsys.readouterr().err
    (tmp_path / "events.jsonl").write_text("")
    assert view.main(["logs", str(tmp_path)]) == 2
    assert "none of its workers has a log" in capsys.readouterr().err


@pytest.mark.parametrize(
    "inside", ["report.html", "events.jsonl", "attempt_0", "attempt_0/0", "attempt_0/0/stdout.log"]
)
def test_what_lies_in_a_runs_folder_leads_to_it(
    folder: Path, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "report.html").touch()
    assert view.main(["show", str(folder / inside)]) == 0
    told = capsys.readouterr()
    assert told.err == f"the run of {folder / inside}: {folder}\n"
    assert f"logs: {folder}\n" in told.out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ("--rank", "9"),
            "there is no such log\nhint: there are logs of stdout and stderr of rank 0",
        ),
        (("--attempt", "7"), "there is no such log\nhint: there are logs of"),
    ],
)
def test_logs_that_there_are_not(
    folder: Path, argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert view.main(["logs", str(folder), *argv]) == 2
    assert said in capsys.readouterr().err


def test_a_report_goes_into_a_folder_and_says_where_it_cannot(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert view.main(["report", str(folder), "-o", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()
    missing = tmp_path / "missing" / "a.html"
    assert view.main(["report", str(folder), "-o", str(missing)]) == 2
    assert capsys.readouterr().err == f"error: {missing}: No such file or directory\n"


def command(*argv: object) -> list[str]:
    return [sys.executable, "-m", "asupervise.view", *map(str, argv)]


def test_help_version_and_a_reader_that_has_enough(tmp_path: Path) -> None:
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command("--version"), capture_output=True, text=True, env=environment)
    assert done.stdout == f"asupervise {asupervise.__version__}\n"
    folder = write(tmp_path, a_failure(tmp_path))
    log(folder, 1, "a line\n" * 200_000)
    piped = f"{' '.join(command('logs', folder))} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", piped], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert (done.stdout, done.stderr) == ("1 | a line\n0\n", "")
    done = subprocess.run(
        command("logs", "--help"), capture_output=True, text=True, env=environment
    )
    assert "Merged by time" in done.stdout


# --- following ----------------------------------------------------------------------------------


class Following:
    """A follower of a run that the test makes up."""

    def __init__(self, folder: Path, choice: Choice | None = None) -> None:
        self.folder = folder
        files = chosen(log_files(read_run(str(folder))), choice or Choice())
        self.lines: list[str] = []
        self._wanted = 0
        self._come = asyncio.Event()
        starts = {file.path: whole_end(file) for file in files}
        follower = Follower(str(folder), choice or Choice(), starts, self._show)
        self.task = asyncio.create_task(follower.run())

    def _show(self, lines: Any) -> None:
        self.lines += [f"{line.file.life.rank} {line.text}" for line in lines]
        if len(self.lines) >= self._wanted:
            self._come.set()

    async def wait(self, count: int) -> list[str]:
        self._wanted = count
        while len(self.lines) < count:
            self._come.clear()
            await self._come.wait()
        found, self.lines = self.lines, []
        return found

    def tell(self, *events: dict[str, Any]) -> None:
        import json

        with (self.folder / "events.jsonl").open("a") as file:
            file.write("".join(json.dumps(each) + "\n" for each in events))

    def write(self, rank: int, text: str, attempt: int = 0, stream: str = "stdout") -> None:
        with (self.folder / f"attempt_{attempt}/{rank}/{stream}.log").open("a") as file:
            file.write(text)


async def test_what_is_written_is_shown_until_the_group_has_ended(tmp_path: Path) -> None:
    write(tmp_path, [group(2, tmp_path), started(0, 0, tmp_path), started(0, 1, tmp_path)])
    log(tmp_path, 0, "before\nhalf")
    following = Following(tmp_path)
    following.write(0, " a line\nnext\n")
    assert await following.wait(2) == ["0 half a line", "0 next"]
    following.write(1, "10 %\r20 %\n", stream="stderr")
    assert await following.wait(1) == ["1 20 %"]
    following.write(1, "no end")
    following.tell(exited(1, 0), exited(1, 1), group_ended(1))
    assert await following.task is True
    assert following.lines == ["1 no end"]


async def test_further_attempts_and_rounds(tmp_path: Path) -> None:
    write(tmp_path, [event("round_completed", members=[NODE]), group(1, tmp_path),
                     started(0, 0, tmp_path)])  # fmt: skip
    following = Following(tmp_path)
    following.write(0, "first\n")
    assert await following.wait(1) == ["0 first"]
    log(tmp_path, 0, "second\n", attempt=1)
    following.tell(
        exited(1, 0, 1), group_ended(1, 0), event("restarting", 1, restarts=1),
        group(1, tmp_path, attempt=1), started(2, 0, tmp_path, attempt=1, pid=7),
    )  # fmt: skip
    assert await following.wait(1) == ["0 second"]
    following.tell(exited(3, 0, attempt=1, pid=7), event("run_ended", 3, succeeded=True))
    assert await following.task is True


async def test_only_what_is_chosen(tmp_path: Path) -> None:
    write(tmp_path, [group(2, tmp_path), started(0, 0, tmp_path), started(0, 1, tmp_path)])
    following = Following(tmp_path, Choice(((1, 1),), ("stderr",)))
    for rank in (0, 1):
        for stream in ("stdout", "stderr"):
            following.write(rank, f"{stream}\n", stream=stream)
    following.tell(group_ended(1))
    await following.task
    assert following.lines == ["1 stderr"]


async def test_a_folder_without_events(tmp_path: Path) -> None:
    """torchrun's, or that of a run without a --log-dir, whose events come at the end."""
    log(tmp_path, 0, "a\n")
    following = Following(tmp_path)
    following.write(0, "b\n")
    assert await following.wait(1) == ["0 b"]
    log(tmp_path, 1, "c\n")
    assert await following.wait(1) == ["1 c"]
    log(tmp_path, 0, "d\n", attempt=1)
    assert await following.wait(1) == ["0 d"]
    write(tmp_path, [group_ended(1)])
    assert await following.task is True


async def test_a_folder_that_is_removed_was_a_temporary_one(tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "run"
    log(folder, 0, "a\n")
    following = Following(folder)
    following.write(0, "b\n")
    await following.wait(1)
    shutil.rmtree(folder)
    assert await following.task is True


async def test_files_that_were_emptied_begin_anew(tmp_path: Path) -> None:
    write(tmp_path, [group(1, tmp_path), started(0, 0, tmp_path)])
    log(tmp_path, 0, "before\n")
    following = Following(tmp_path)
    following.write(0, "more\n")
    await following.wait(1)
    (tmp_path / "attempt_0/0/stdout.log").write_text("new\n")
    assert await following.wait(1) == ["0 new"]
    following.tell(group_ended(1))
    await following.task


async def test_garbage_among_the_events_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, [group(1, tmp_path), started(0, 0, tmp_path)])
    following = Following(tmp_path)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b"\xff\n[]\n{\n" + b"[" * 100_000 + b"\n")
    following.write(0, "a\n")
    await following.wait(1)
    following.tell(group_ended(1))
    assert await following.task is True


async def test_without_inotify_a_timer_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asupervise.watches.InotifyWatches", None)
    monkeypatch.setattr(
        "asupervise.watches.Watches._opened", lambda self: setattr(self, "_has_inotify", False)
    )
    write(tmp_path, [group(1, tmp_path), started(0, 0, tmp_path)])
    following = Following(tmp_path)
    following.write(0, "a\n")
    assert await following.wait(1) == ["0 a"]
    following.write(0, "b\n")
    assert await following.wait(1) == ["0 b"]
    following.tell(group_ended(1))
    assert await following.task is True


async def test_a_supervisor_that_has_gone_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_SILENCE_S", 0.05)
    child = subprocess.Popen(["sleep", "1000"])
    told = [
        group(1, tmp_path),
        started(0, 0, tmp_path, pid=child.pid) | {
            "node": os.uname().nodename, "time": time.time(), "monotonic_ns": time.monotonic_ns(),
        },
    ]  # fmt: skip
    write(tmp_path, told)
    follower = Following(tmp_path)
    follower.write(0, "a\n")
    await follower.wait(1)
    await asyncio.sleep(0.1)
    assert not follower.task.done()
    child.kill()
    child.wait()
    assert await follower.task is False


@contextmanager
def running(argv: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A program that has ended, or is ended, afterwards."""
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(argv, env=environment, cwd=ROOT, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_following_a_real_run(tmp_path: Path) -> None:
    """Through a restart, to its end."""
    gate, logs, script = tmp_path / "gate", tmp_path / "logs", tmp_path / "work.sh"
    script.write_text(
        'echo "attempt $TORCHELASTIC_RESTART_COUNT of $RANK"\nread line < "$GATE"\n'
        'echo "$line"\nexit $((1 - TORCHELASTIC_RESTART_COUNT))\n'
    )
    os.mkfifo(gate)
    # Both ends, so that neither side waits for the other to open it.
    fd = os.open(gate, os.O_RDWR)
    flags = ("--log-dir", logs, "--redirects", 3, "--max-restarts", 1, "--restart-backoff", 0.01)
    argv = [sys.executable, "-m", "asupervise", *map(str, flags), "--min-uptime", "0"]
    try:
        with running([*argv, "--no-python", "sh", str(script)], env={"GATE": str(gate)}) as run:
            os.write(fd, b"one\n")
            while not list(logs.glob("*/attempt_1")) and run.poll() is None:
                time.sleep(0.01)  # the restart: from here on there is something to follow
            with running(command("logs", "-f", logs)) as follower:
                assert next_line(follower) == "0/0 | attempt 0 of 0\n"
                assert next_line(follower) == "0/0 | one\n"
                assert next_line(follower) == "1/0 | attempt 1 of 0\n"
                os.write(fd, b"two\n")
                stdout, stderr = follower.communicate(timeout=50)
                assert (follower.returncode, stdout) == (0, "1/0 | two\n")
                assert stderr.startswith("the newest run in ")
            assert run.wait(50) == 0
    finally:
        os.close(fd)


def test_ctrl_c_ends_it_quietly(tmp_path: Path) -> None:
    write(tmp_path, [group(1, tmp_path), started(0, 0, tmp_path)])
    log(tmp_path, 0, "a\n")
    with running(command("logs", "-f", tmp_path)) as follower:
        assert next_line(follower) == "0 | a\n"
        follower.send_signal(signal.SIGINT)
        stdout, stderr = follower.communicate(timeout=50)
    assert (follower.returncode, stdout, stderr) == (0, "", "")
