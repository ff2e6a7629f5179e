"""A run's events in its folder: when they are written, and what happens where they cannot be."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncinotify
import pytest

import asupervise
from asupervise import DefaultLogsSpecs, RunProcsResult, Std, recording, run_services
from asupervise.bus import EventBus
from asupervise.elastic.decide import Policy
from asupervise.events import Event, Warned, from_dict
from asupervise.logs import LogsDest
from asupervise.recording import EVENTS_FILE, REPORT_FILE, Recorder, header, line_of
from asupervise.views.report import write_report
from tests.conftest import ROOT, Run, clean_environment
from tests.workers import HELD, READY, SLEEP, Channel, gone, settle, shell, start

NEVER_S = 1000.0


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of our own."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written before the end."""
    monkeypatch.setattr(recording, "_SETTLED_S", NEVER_S)


def logs(folder: Path, **more: Any) -> DefaultLogsSpecs:
    return DefaultLogsSpecs(log_dir=str(folder), **more)


def read(run_dir: str | Path | None) -> list[Event]:
    """The events in the folder; an unfinished last line is left out."""
    assert run_dir is not None
    *lines, _ = (Path(run_dir) / EVENTS_FILE).read_text().split("\n")
    if not lines:
        return []  # made just now
    first, *rest = map(json.loads, lines)
    assert first == {"event": "header", "format": 1, "version": asupervise.__version__}
    told = [from_dict(line) for line in rest]
    assert None not in told
    return [event for event in told if event is not None]


def kinds(told: list[Event]) -> list[str]:
    return [event.kind for event in told if event.kind != "resource_sample"]


async def when(folder: Path, holds: Callable[[], bool]) -> None:
    """Wait until it holds, as often as something in the folder changes."""
    with asyncinotify.Inotify() as inotify:
        mask = asyncinotify.Mask
        inotify.add_watch(folder, mask.CREATE | mask.MODIFY | mask.MOVED_TO | mask.CLOSE_WRITE)
        while not holds():
            await inotify.get()


def warnings_of(result: RunProcsResult | None) -> tuple[str, ...]:
    assert result is not None
    return result.warnings


# --- when -----------------------------------------------------------------------------------------


async def test_a_folder_that_stays_has_them_while_the_run_goes_on(
    tmp_path: Path, channel: Channel
) -> None:
    async with start(channel, SLEEP, SLEEP, logs_specs=logs(tmp_path / "logs")) as ctx:
        assert ctx.log_dir is not None
        folder = Path(ctx.log_dir)
        await when(folder, lambda: (folder / EVENTS_FILE).exists())
        await when(folder, lambda: bool(read(folder)))
        assert kinds(read(folder)) == ["group_starting", "worker_started", "worker_started"]
        await channel.lines(2)
        ctx.send_signal(signal.SIGWINCH)
        await when(folder, lambda: "signal_sent" in kinds(read(folder)))
        assert not (folder / REPORT_FILE).exists()
    told = await _all(ctx)
    assert read(folder) == told
    assert kinds(told)[-1] == "group_ended"
    assert (folder / EVENTS_FILE).stat().st_mode & 0o777 == 0o600
    assert (folder / REPORT_FILE).exists()


async def _all(ctx: Any) -> list[Event]:
    return [event async for event in ctx.events()]


@pytest.mark.parametrize("script", ["true", "exit 3"])
async def test_a_short_run_has_all_of_them_in_the_end(tmp_path: Path, script: str) -> None:
    async with start(None, script, logs_specs=logs(tmp_path / "logs")) as ctx:
        result = await ctx.wait()
    assert warnings_of(result) == ()
    assert read(ctx.log_dir) == await _all(ctx)


async def test_a_temporary_folder_has_them_where_it_is_kept(temporary: Path) -> None:
    async with start(None, "exit 3", logs_specs=DefaultLogsSpecs(redirects=Std.ALL)) as ctx:
        result = await ctx.wait()
    assert result is not None
    assert Path(result.log_dir or "").parent == temporary
    assert read(result.log_dir) == await _all(ctx)
    assert (Path(result.log_dir or "") / REPORT_FILE).exists()


async def test_a_temporary_folder_that_goes_has_none(temporary: Path, channel: Channel) -> None:
    script = READY + 'read line < "$CHANNEL.gate"'
    async with start(channel, script, logs_specs=DefaultLogsSpecs(redirects=Std.ALL)) as ctx:
        await channel.lines(1)
        (folder,) = temporary.iterdir()
        # Longer than a short run is: nobody has begun to write.
        settled = asyncio.Event()
        asyncio.get_running_loop().call_later(2 * recording._SETTLED_S, settled.set)
        await settled.wait()
        assert not (folder / EVENTS_FILE).exists()
        await channel.open_gate()
        await ctx.wait()
    assert list(temporary.iterdir()) == []


async def test_who_wants_none_has_none(tmp_path: Path, channel: Channel) -> None:
    kept = logs(tmp_path / "logs")
    async with start(channel, SLEEP, "exit 3", logs_specs=kept, report=False) as ctx:
        await ctx.wait()
    assert sorted(os.listdir(ctx.log_dir or "")) == ["attempt_0"]


async def test_a_group_that_nobody_lets_write_costs_nothing(channel: Channel) -> None:
    """To the console alone: no folder, no task, no timer."""
    async with start(channel, SLEEP, logs_specs=_NoFolder()) as ctx:
        await channel.lines(1)
        await settle()
        assert ctx._recorder._timer is None
        assert [task for task in asyncio.all_tasks() if "events" in task.get_name()] == []


class _NoFolder(DefaultLogsSpecs):
    def reify(self, envs: Any) -> LogsDest:
        nothing = {rank: "" for rank in envs}
        return LogsDest(nothing, nothing, {}, {}, nothing)


async def test_a_bus_of_ones_own_stays_open(tmp_path: Path) -> None:
    bus = EventBus()
    async with start(None, "true", logs_specs=logs(tmp_path / "logs"), events=bus) as ctx:
        await ctx.wait()
    assert not bus.closed
    assert bus.subscribe().take() == read(ctx.log_dir)


async def test_services_write_what_all_their_starts_have_told(
    tmp_path: Path, channel: Channel
) -> None:
    once = f"[ $TORCHELASTIC_RESTART_COUNT = 0 ] && exit 3; {SLEEP}"
    async with run_services(
        **shell(channel, [SLEEP, once]), logs_specs=logs(tmp_path / "logs"),
        policy=Policy(backoff_s=0.0, min_uptime_s=0.0),
    ) as services:  # fmt: skip
        await channel.lines(2)
        await services.close()
    told = await _all(services)
    assert read(services.log_dir) == told
    assert "restarting" in kinds(told)
    assert len(list((tmp_path / "logs").glob(f"*/{EVENTS_FILE}"))) == 1


# --- what may go wrong ----------------------------------------------------------------------------


async def test_a_supervisor_that_is_killed_leaves_them(tmp_path: Path, channel: Channel) -> None:
    script = SLEEP.replace("$$", "$$$$")  # the command line has macros
    words = ("--log-dir", tmp_path / "logs", "--no-python", "sh", "-c", script)
    process = subprocess.Popen(
        [sys.executable, "-m", "asupervise", *map(str, words)],
        cwd=ROOT, env=clean_environment() | {"CHANNEL": str(channel.path)},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        pids = await channel.pids(1)
        (folder,) = (tmp_path / "logs").iterdir()
        await when(folder, lambda: (folder / EVENTS_FILE).exists())
        await when(folder, lambda: "worker_started" in kinds(read(folder)))
    finally:
        process.kill()
        process.wait()
    await gone(pids[0])
    assert kinds(read(folder)) == ["round_completed", "group_starting", "worker_started"]


async def test_a_folder_that_is_removed_meanwhile_stays_removed(
    tmp_path: Path, channel: Channel
) -> None:
    async with start(channel, SLEEP, logs_specs=logs(tmp_path / "logs")) as ctx:
        await channel.lines(1)
        folder = Path(ctx.log_dir or "")
        await when(folder, lambda: (folder / EVENTS_FILE).exists())
        shutil.rmtree(folder)
    assert warnings_of(await ctx.wait()) == ()
    assert list((tmp_path / "logs").iterdir()) == []


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("script", ["true", "exit 3"])
async def test_a_full_disk_is_a_warning(tmp_path: Path, script: str) -> None:
    async with start(None, script, logs_specs=logs(tmp_path / "logs")) as ctx:
        os.symlink("/dev/full", Path(ctx.log_dir or "") / EVENTS_FILE)
        result = await ctx.wait()
    assert result is not None
    assert result.is_failed() is (script != "true")
    (warning,) = warnings_of(result)
    assert warning.startswith(f"{ctx.log_dir}: what has happened could not be written down: ")
    assert "No space left" in warning


async def test_a_disk_that_is_full_meanwhile_is_a_warning_in_the_end(
    tmp_path: Path, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start(channel, SLEEP, logs_specs=logs(tmp_path / "logs")) as ctx:
        await channel.lines(1)
        folder = Path(ctx.log_dir or "")
        await when(folder, lambda: (folder / EVENTS_FILE).exists())
        await when(folder, lambda: bool(read(folder)))
        (folder / EVENTS_FILE).unlink()
        os.symlink("/dev/full", folder / EVENTS_FILE)
        ctx.send_signal(signal.SIGWINCH)
    (warning,) = warnings_of(await ctx.wait())
    assert "No space left" in warning


@pytest.mark.usefixtures("late")
async def test_what_cannot_be_opened_is_a_warning(tmp_path: Path) -> None:
    async with start(None, "true", logs_specs=logs(tmp_path / "logs")) as ctx:
        os.mkdir(Path(ctx.log_dir or "") / EVENTS_FILE)
        result = await ctx.wait()
    (warning,) = warnings_of(result)
    assert "Is a directory" in warning


@pytest.mark.usefixtures("late")
async def test_our_own_mistakes_do_not_take_the_result_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(_event: Event) -> str:
        raise LookupError("a mistake")

    monkeypatch.setattr(recording, "line_of", mistaken)
    async with start(None, "exit 3", logs_specs=logs(tmp_path / "logs")) as ctx:
        result = await ctx.wait()
    assert result is not None
    assert result.failures[0].exitcode == 3
    (warning,) = warnings_of(result)
    assert warning.endswith("could not be written down: a mistake")


def test_the_command_line_says_that_it_could_not(run_cli: Run, tmp_path: Path) -> None:
    """Not a failure: the exit status is the job's."""
    script = 'ln -s /dev/full "$(dirname "$(dirname "$TORCHELASTIC_ERROR_FILE")")/../events.jsonl"'
    done = run_cli("--log-dir", tmp_path / "logs", "--no-python", "sh", "-c", script)
    assert done.returncode == 0
    assert b"warning: " in done.stderr
    assert b"could not be written down" in done.stderr


async def test_a_slow_disk_slows_nobody(
    tmp_path: Path, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes meanwhile waits, and is written at once."""
    released = asyncio.Event()
    writes: list[int] = []
    append = recording._append
    loop = asyncio.get_running_loop()

    def slow(run_dir: str, events: list[Event]) -> None:
        if not writes:
            asyncio.run_coroutine_threadsafe(released.wait(), loop).result()
        writes.append(len(events))
        append(run_dir, events)

    monkeypatch.setattr(recording, "_append", slow)
    monkeypatch.setattr(recording, "_SETTLED_S", 0.0)
    async with start(channel, SLEEP, logs_specs=logs(tmp_path / "logs")) as ctx:
        await channel.lines(1)
        for _ in range(100):
            ctx.send_signal(signal.SIGWINCH)
            await asyncio.sleep(0)
        await settle()
        assert writes == []
        released.set()
    assert kinds(read(ctx.log_dir)).count("signal_sent") == 101
    assert max(writes) >= 100


async def test_what_a_bus_has_dropped_is_said_in_the_file(tmp_path: Path) -> None:
    bus = EventBus(history=2)
    recorder = Recorder(bus, report=False)
    for number in range(5):
        bus.tell("Warned", text=f"{number}")
    recorder.attend(LogsDest(run_dir=str(tmp_path), temporary=True))
    assert await recorder.finish() is None
    told = read(tmp_path)
    assert [event.text for event in told if isinstance(event, Warned)] == [
        "3 events were left out here", "3", "4",
    ]  # fmt: skip


async def test_a_recorder_may_be_finished_twice(tmp_path: Path) -> None:
    bus = EventBus()
    bus.tell("Warned", text="a")
    recorder = Recorder(bus, report=False)
    recorder.attend(LogsDest(run_dir=str(tmp_path), temporary=True))
    assert await recorder.finish() is None
    assert await recorder.finish() is None
    assert len(read(tmp_path)) == 1


@pytest.mark.parametrize("settled_s", [0.0, NEVER_S])
async def test_the_report_is_as_it_is_made_again_from_the_files(
    tmp_path: Path, channel: Channel, monkeypatch: pytest.MonkeyPatch, settled_s: float
) -> None:
    monkeypatch.setattr(recording, "_SETTLED_S", settled_s)
    kept = logs(tmp_path / "logs", tee=Std.ALL)
    async with start(channel, SLEEP, READY + HELD + "exit 3", logs_specs=kept) as ctx:
        await channel.lines(2)
        ctx.send_signal(signal.SIGWINCH)
        await channel.open_gate()
        await ctx.wait()
    path = Path(ctx.log_dir or "") / REPORT_FILE
    made = path.read_text()
    write_report(str(path.parent))
    assert without_moment(made) == without_moment(path.read_text())


def without_moment(page: str) -> str:
    return re.sub("as of [^<]*", "", page)


# --- lines ----------------------------------------------------------------------------------------


def test_a_line_is_one_line_of_ascii() -> None:
    event = Warned(monotonic_ns=1, time=2.0, text="a\nb\r\x1b[31m ü \ud800 \u2028")
    line = line_of(event)
    assert line.isascii()
    assert line.isprintable()
    assert from_dict(json.loads(line)) == event
    assert json.loads(header())["event"] == "header"
