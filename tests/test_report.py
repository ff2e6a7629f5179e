"""The report: what stands in it, and that nothing of a run can spoil it."""

from __future__ import annotations

import html
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from asupervise import DefaultLogsSpecs, LaunchConfig, Std, launch, recording, start_processes
from asupervise.views import report
from asupervise.views.excerpts import excerpts_of, limits_of, link_to
from asupervise.views.files import log_files
from asupervise.views.report import REPORT_FILE, render, write_report
from asupervise.views.rundir import RunFolderError, read_run
from tests.conftest import Run
from tests.run_folders import (
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
from tests.workers import SLEEP, Channel, start

MIB = 1 << 20


def page_of(folder: Path) -> str:
    return Path(write_report(str(folder))).read_text()


def text_of(page: str) -> str:
    """What a person reads, without the style and the script."""
    page = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "\n", page))


# --- one file, of the user alone ----------------------------------------------------------------


def test_the_file_is_the_users_alone_and_whole(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", a_failure(tmp_path / "run"))
    path = Path(write_report(str(folder)))
    assert path == folder / REPORT_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.stat().st_ino
    write_report(str(folder))
    assert path.stat().st_ino != before, "it was written over, and not replaced"
    assert sorted(each.name for each in folder.iterdir()) == [
        "attempt_0", "events.jsonl", "report.html",
    ]  # fmt: skip


def test_nothing_is_left_of_one_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, a_failure(tmp_path))
    page_of(folder)
    whole = (folder / REPORT_FILE).read_text()

    def full(*paths: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_report(str(folder))
    assert (folder / REPORT_FILE).read_text() == whole
    assert not list(folder.glob("*.tmp"))


def test_elsewhere_it_links_the_folders_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "a b", a_failure(tmp_path / "a b"))
    log(folder, 1, "x")
    path = tmp_path / "out" / "page.html"
    path.parent.mkdir()
    write_report(str(folder), str(path))
    assert 'href="../a%20b/attempt_0/1/stdout.log"' in path.read_text()


def test_its_policy_allows_its_own_script_and_style_alone(tmp_path: Path) -> None:
    page = page_of(write(tmp_path, a_failure(tmp_path)))
    policy = html.unescape(re.search(r'Policy" content="([^"]+)"', page)[1])  # type: ignore[index]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert page.count("<script") == page.count("<style") == 1
    assert " style=" not in page
    assert not re.findall(r'(?:src|href)="(?!#|data:|attempt_|events\.jsonl)[^"]*"', page)
    assert not re.findall(r"<[^>]+ on\w+=", page)


# --- what it says -------------------------------------------------------------------------------


def test_a_failure(tmp_path: Path) -> None:
    folder = write(tmp_path, a_failure(tmp_path))
    log(folder, 1, stderr="Traceback\nValueError: no such batch\n")
    text = text_of(page_of(folder))
    assert "Rank 1 failed first: exit code 1 after 1.9 s; 2 others were ended." in text
    assert text.index("ValueError: no such batch") < text.rindex("Timeline")
    assert "ended by the supervisor" in text
    assert "Empty: stdout of ranks 0-2; stderr of ranks 0, 2." in text


def test_a_success_says_nothing_of_failures(tmp_path: Path) -> None:
    folder = write(tmp_path, [group(1), started(0, 0), exited(1, 0), group_ended(1)])
    text = text_of(page_of(folder))
    assert "The worker succeeded." in text
    assert "ailed" not in text


def test_a_run_without_logs_says_how_to_have_some(tmp_path: Path) -> None:
    told = [group(1), started(0, 0, stdout=None, stderr=None), exited(1, 0), group_ended(1)]
    assert "--tee 3 keeps it here" in text_of(page_of(write_events_alone(tmp_path, told)))


def test_a_run_that_goes_on_and_one_that_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, [group(1), started(0, 0)])
    assert "No end known" in text_of(page_of(folder))
    monkeypatch.setattr("asupervise.views.rundir.is_alive", lambda started: True)
    text = text_of(page_of(folder))
    assert "It was still running at" in text
    assert "has run for" in text
    assert "\nrunning\n" in text


def test_a_run_that_was_told_to_end(run_cli: Run, tmp_path: Path) -> None:
    script = 'kill -TERM "$PPID"; exec sleep 100'
    done = run_cli("--no-python", "--log-dir", tmp_path, "--no-guardian", "sh", "-c", script)
    (folder,) = tmp_path.iterdir()
    assert (done.returncode, f"logs: {folder}\n" in done.stderr.decode()) == (143, True)
    text = text_of(page_of(folder))
    assert "Ended: sh" in text
    assert "Interrupted by SIGTERM. No rank failed by itself: those that ran were ended." in text
    assert "the run was ended by SIGTERM (exit status 143)" in text


async def test_a_group_that_its_application_has_ended(tmp_path: Path, channel: Channel) -> None:
    logs = DefaultLogsSpecs(str(tmp_path / "logs"))
    async with start(channel, SLEEP, logs_specs=logs) as ctx:
        await channel.pids(1)
    assert ctx.log_dir is not None
    text = text_of(page_of(Path(ctx.log_dir)))
    assert "Ended: sh" in text
    assert "No rank failed by itself: those that ran were ended." in text


def test_a_culprit_of_another_node(tmp_path: Path) -> None:
    told = [
        group(1), started(0, 0), exited(1, 0, -15), failed(1, 0, -15, ended_by_us=True),
        group_ended(1, 5),
        event("run_ended", 1, succeeded=False, why="rank 5 failed", exit_status=3, root_cause=5),
    ]  # fmt: skip
    text = text_of(page_of(write(tmp_path, told)))
    assert "\nRank 5, on another node, failed first.\n" in text


def test_three_attempts(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = [event("round_completed", members=["node7"], world_size=2)]
    for attempt in range(3):
        at = {"attempt": attempt}
        message = {"message": f"KeyError: {attempt}", "traceback": f"KeyError: {attempt}"}
        t = attempt * 10.0
        told += [
            group(2, at_s=t, **at), started(t, 0, **at), started(t, 1, **at),
            exited(t + 5, 1, 3, **at), exited(t + 6, 0, -15, **at),
            failed(t + 6, 0, -15, ended_by_us=True, **at),
            failed(t + 6, 1, 3, root_cause=True, **message, **at), group_ended(t + 6, 1, **at),
            event("restarting", t + 7, restarts=attempt + 1, max_restarts=2, delay_s=1.0),
        ]  # fmt: skip
    told[-1] = event("run_ended", 27, succeeded=False, why="rank 1 failed", exit_status=3)
    text = text_of(page_of(write(tmp_path, told)))
    assert "attempts\n\n3" in text
    assert text.index("KeyError: 2") < text.index("Earlier failures") < text.index("KeyError: 0")
    assert "restart 2 of 2 in 1 s" in text


def test_stacks_binding_and_progress(tmp_path: Path) -> None:
    told = [
        group(3), *(started(0, rank, tmp_path, binding="CPUs 0-3: node 0") for rank in range(3)),
        worker("progress", 1, 2, done=17.0, total=100.0),
        event("stacks_dumped", 5, stacks={"0": "in wait (a.py:3)", "1": "in wait (a.py:3)"}),
        exited(6, 2, -15),
        failed(6, 2, -15, cause="hang: no output and no CPU use for 5 s", stack="in read (b.py:4)",
               root_cause=True),
        group_ended(6, 2),
    ]  # fmt: skip
    folder = write(tmp_path, told)
    (folder / "attempt_0/2/stacks.txt").write_text("Current thread:\n  <b>whole</b> stack\n")
    text = text_of(page_of(folder))
    assert "hang: no output" in text
    assert "Compare where the ranks were" in text
    assert "<b>whole</b> stack" in text
    assert "Ranks 0-1\n in wait (a.py:3)" in text
    assert "17 of 100" in text
    assert "CPUs 0-3: node 0" in text


def test_a_culprit_that_recorded_nothing_is_told_by_its_last_line(tmp_path: Path) -> None:
    unrecorded = "No traceback was recorded. Decorate the worker's main function with @record"
    told = [group(1), started(0, 0, tmp_path), exited(1, 0, 1),
            failed(1, 0, 1, message=unrecorded, root_cause=True), group_ended(1, 0)]  # fmt: skip
    folder = write(tmp_path, told)
    log(folder, 0, stderr="Traceback (most recent call last):\n  boom\nKeyError: 'lr'\n")
    assert "\nKeyError: 'lr'\n" in text_of(page_of(folder)).split("Last lines of stderr")[0]


def test_a_service_and_what_was_lost(tmp_path: Path) -> None:
    told = [
        event("round_completed", round=1, members=["a", "b"], world_size=2),
        event("member_lost", 1, member="b", reason="its lease ran out"),
        event("escalated", 2, ranks=[0]), event("warned", 2, text="full disk"),
        event("signal_sent", 2, signal="SIGUSR1", ranks=[0]),
        event("run_ended", 3, succeeded=False, why="too few nodes", exit_status=1),
    ]  # fmt: skip
    text = text_of(page_of(write(tmp_path, told)))
    for said in (
        "Too few nodes.", "lost b: its lease ran out", "SIGKILL to local rank 0", "full disk",
        "asked for: SIGUSR1", "round 1: 2 workers on 2 nodes (a, b)",
    ):  # fmt: skip
        assert said in text


# --- what it can hold ---------------------------------------------------------------------------


def many(folder: Path, ranks: int) -> Path:
    others = [rank for rank in range(ranks) if rank != 7]
    stack = "in all_reduce (dist.py:88)"
    told = [
        group(ranks, folder),
        *(started(rank / ranks / 4, rank, folder, binding=f"CPUs {rank}") for rank in range(ranks)),
        *(worker("resource_sample", 10 * n, rank, rss_bytes=n * MIB + rank, cpu_s=float(9 * n))
          for n in range(1, 4) for rank in range(ranks)),
        exited(50, 7, 1),
        event("signal_sent", 50, signal="SIGTERM", ranks=others, why="ending"),
        *(exited(51, rank, -15) for rank in others),
        *(failed(52, rank, -15, ended_by_us=True, stack=stack) for rank in others),
        failed(52, 7, message="ValueError: shard 7", root_cause=True),
        group_ended(52, 7),
    ]  # fmt: skip
    write(folder, told)
    for rank in range(ranks):
        lines = "".join(f"step {n} of rank {rank}\n" for n in range(400))
        log(folder, rank, lines, "the cache is cold\n")
    return folder


def test_1024_ranks_are_a_few_megabytes(tmp_path: Path) -> None:
    page = page_of(many(tmp_path, 1024))
    assert len(page) < 6 * MIB
    text = text_of(page)
    assert "Rank 7 failed first" in text
    assert "1,023 ranks\n 0-6, 8-1023" in text
    assert "ranks 0-1023\n\nstderr" in text
    assert "step 399 of rank 1000" in text
    assert page.count('class="bar') < 50


def test_10000_events(tmp_path: Path) -> None:
    told = [
        group(1), started(0, 0),
        *(worker("heartbeat", n / 10, 0) for n in range(9000)),
        *(event("warned", n / 10, text=f"warning {n}") for n in range(1000)),
        exited(1000, 0), group_ended(1000),
    ]  # fmt: skip
    page = page_of(write(tmp_path, told))
    assert len(page) < MIB
    assert "more events" in text_of(page)


def test_a_service_of_many_starts(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = [group(1)]
    for n in range(3000):
        told += [started(n, 0, attempt=n, pid=n + 1), exited(n + 0.5, 0, 1, attempt=n, pid=n + 1)]
    page = render(read_run(str(write_events_alone(tmp_path, told))))
    assert len(page) < 2 * MIB
    assert "3,000" in text_of(page)


def write_events_alone(folder: Path, told: list[dict[str, Any]]) -> Path:
    lines = [{"event": "header", "format": 1}, *told]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_gigabyte_of_logs(tmp_path: Path) -> None:
    folder = write(tmp_path, a_failure(tmp_path))
    with (folder / "attempt_0/1/stdout.log").open("wb") as file:
        file.truncate(1 << 30)
        file.seek(0, os.SEEK_END)
        file.write(b"\nlast line\n")
    page = page_of(folder)
    assert len(page) < MIB
    assert "1 GiB before it are in" in text_of(page)
    assert "last line" in page


def test_the_room_that_logs_have() -> None:
    assert limits_of([], 0) == []
    assert limits_of([1 << 30], 1) == [256 << 10]
    assert sum(limits_of([1 << 20] * 4096, 0)) <= 3 << 20
    assert limits_of([1 << 20] * 10_000, 0)[0] == 0
    # What says little is all there, though others say more than there is room for.
    assert limits_of([10, *[1 << 20] * 500], 0)[0] == 10


def test_logs_that_end_the_same_are_shown_once(tmp_path: Path) -> None:
    folder = write(tmp_path, a_failure(tmp_path))
    for rank in range(3):
        log(folder, rank, "same", f"other {rank}")
    shown = excerpts_of(list(log_files(read_run(str(folder)))), (0, 1))
    assert [[file.life.rank for file in each.files] for each in shown] == [
        [1], [1, 0, 2], [0], [2],
    ]  # fmt: skip


def test_links_to_files_of_any_name() -> None:
    assert link_to("a b/ä#?%\udcff") == "a%20b/%C3%A4%23%3F%25%FF"


# --- what workers print -------------------------------------------------------------------------

EVIL = "<script>window.pwned = 1</script>\x1b[31m\0\u202e\ud800'\"&lt;</pre>"


def test_whatever_is_told_is_text(tmp_path: Path) -> None:
    """In every field that there is, of every kind of event."""
    told = [
        event("round_completed", members=[EVIL], world_size=1),
        group(1, tmp_path) | {"entrypoint": EVIL, "node": EVIL, "run_id": EVIL},
        started(0, 0, tmp_path, argv=[EVIL, EVIL], binding=EVIL),
        event("stacks_dumped", 1, stacks={"0": EVIL}), event("warned", 1, text=EVIL),
        event("restarting", 1, restarts=1, reason=EVIL),
        event("member_lost", 1, member=EVIL, reason=EVIL),
        event("signal_sent", 1, signal=EVIL, ranks=[0]), event("escalated", 1, signal=EVIL),
        exited(2, 0, 1),
        failed(2, 0, 1, message=EVIL, cause=EVIL, traceback=EVIL, stack=EVIL, signal=EVIL,
               stderr_tail=EVIL, root_cause=True),
        group_ended(2, 0) | {"group": EVIL},
        event("run_ended", 2, succeeded=False, why=EVIL, exit_status=1, root_cause=0),
    ]  # fmt: skip
    folder = write(tmp_path, told, header={"event": "header", "format": 1, "version": EVIL})
    log(folder, 0, EVIL.encode("utf-8", "surrogatepass"), b"\xff\xfe" + b"\0" * 100)
    (folder / "attempt_0/0/stacks.txt").write_bytes(EVIL.encode("utf-8", "surrogatepass"))
    page = page_of(folder)
    assert page.count("<script") == page.count("</script") == 1
    assert page.count("&lt;script&gt;window.pwned = 1") > 15
    assert not re.search("[\0\x1b\u202e\ud800]", page)


# --- at the end of runs -------------------------------------------------------------------------


async def a_group(log_dir: Path | None, code: str = "pass", **options: Any) -> Any:
    specs = DefaultLogsSpecs(str(log_dir) if log_dir else None, redirects=Std.ALL)
    args = {0: ("-c", code), 1: ("-c", "pass")}
    return await (
        await start_processes("t", "python3", args, {0: {}, 1: {}}, specs, **options)
    ).wait()


async def test_every_end_where_the_folder_stays_has_one(tmp_path: Path) -> None:
    result = await a_group(tmp_path)
    page = (Path(result.log_dir) / REPORT_FILE).read_text()
    assert "All 2 workers succeeded" in page
    assert result.warnings == ()


async def test_a_failure_keeps_its_temporary_folder_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    result = await a_group(None, "raise SystemExit(3)")
    assert "Rank 0 failed first: exit code 3" in (Path(result.log_dir) / REPORT_FILE).read_text()
    assert (await a_group(None)).log_dir is None


async def test_nobody_who_does_not_want_one_gets_one(tmp_path: Path) -> None:
    result = await a_group(tmp_path, report=False)
    assert not (Path(result.log_dir) / REPORT_FILE).exists()


async def test_a_report_that_cannot_be_made_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **more: object) -> str:
        raise ValueError("a fault of ours")

    monkeypatch.setattr(report, "write_report", fails)
    result = await a_group(tmp_path)
    assert result.warnings == (f"{result.log_dir}: no report could be made: a fault of ours",)
    assert not result.is_failed()


async def test_a_folder_that_is_gone_needs_none(tmp_path: Path) -> None:
    result = await a_group(
        tmp_path, f"import os, shutil, time; shutil.rmtree({str(tmp_path)!r}); time.sleep(0.1)"
    )
    assert not result.is_failed()
    assert not [each for each in result.warnings if "report" in each]
    with pytest.raises(RunFolderError):
        write_report(result.log_dir)


async def test_launch_leaves_one_of_all_attempts(tmp_path: Path) -> None:
    specs = DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL)
    config = LaunchConfig(1, 1, 1, specs, max_restarts=1, restart_backoff=0.01, min_uptime=0)
    code = "import os, sys; sys.exit(int(os.environ['TORCHELASTIC_RESTART_COUNT']) == 0)"
    await launch(config, ("python3", "-c"), code)
    (folder,) = tmp_path.iterdir()
    text = text_of((folder / REPORT_FILE).read_text())
    assert "The worker succeeded, after 1 restart." in text
    assert "Earlier failures" in text


async def test_launch_leaves_none_where_nobody_wants_one(tmp_path: Path) -> None:
    specs = DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL)
    await launch(LaunchConfig(1, 1, 1, specs, max_restarts=0, report=False), "true")
    await launch(LaunchConfig(1, 1, 1, specs, max_restarts=0), "true")
    assert len(list(tmp_path.iterdir())) == 2
    assert len(list(tmp_path.glob(f"*/{REPORT_FILE}"))) == 1


def test_the_command_line_says_where_it_is(run_cli: Run, tmp_path: Path) -> None:
    flags = ("--no-python", "--log-dir", tmp_path)
    done = run_cli(*flags, "sh", "-c", "exit 3")
    (folder,) = tmp_path.iterdir()
    assert f"\nreport: {folder}/{REPORT_FILE}\n" in done.stderr.decode()
    assert (folder / REPORT_FILE).exists()
    done = run_cli("--no-report", *flags, "sh", "-c", "exit 3")
    assert "report:" not in done.stderr.decode()
    assert [each.name for each in tmp_path.glob("*/*.*")].count(REPORT_FILE) == 1
    assert len(list(tmp_path.glob(f"*/{recording.EVENTS_FILE}"))) == 1
