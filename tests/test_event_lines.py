"""``--events FILE``: lines of JSON to files, pipes and terminals; whoever reads slows nobody."""

from __future__ import annotations

import asyncio
import io
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import asupervise
from asupervise import EventBus, handle_events
from asupervise.events import Event, Warned, from_dict
from asupervise.exporters import lines
from asupervise.exporters.lines import Lines, lines_to
from tests.conftest import ROOT, Run, clean_environment

HEADER = {"event": "header", "format": 1, "version": asupervise.__version__}
RUN = ["round_completed", "group_starting", "worker_started", "worker_exited", "group_ended",
       "run_ended"]  # fmt: skip

pytestmark = pytest.mark.usefixtures("own_temporary_folder")


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


def told(text: str | bytes) -> list[list[Event]]:
    """The events of each run that begins in there."""
    runs: list[list[Event]] = []
    for line in text.splitlines():
        data = json.loads(line)
        if data == HEADER:
            runs.append([])
            continue
        event = from_dict(data)
        assert event is not None
        runs[-1].append(event)
    return runs


def kinds(events: Sequence[Event]) -> list[str]:
    passing = ("resource_sample", "first_output")
    return [event.kind for event in events if event.kind not in passing]


def warned(*texts: str) -> list[Warned]:
    return [Warned(monotonic_ns=1, time=2.0, text=text) for text in texts]


def texts(events: Sequence[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Warned)]


def write(handler: Lines, *what: str) -> None:
    for event in warned(*what):
        handler.handle(event)


# --- files ----------------------------------------------------------------------------------------


def test_a_file_has_a_header_and_an_event_a_line(run_cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    done = run_cli("--events", file, "--no-python", "true")
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", b"")
    (events,) = told(file.read_text())
    assert kinds(events) == RUN
    assert len({event.run_id for event in events}) == 1
    # As the logs: the user's alone.
    assert file.stat().st_mode & 0o777 == 0o600


def test_what_is_in_a_file_stays(run_cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    for status in (0, 3):
        done = run_cli("--events", file, "--no-python", "sh", "-c", f"exit {status}")
        assert done.returncode == status
    first, second = told(file.read_text())
    assert kinds(first) == RUN
    assert "worker_failed" in kinds(second)
    assert first[0].run_id != second[0].run_id


def test_first_output_and_heartbeats_are_in_it(run_cli: Run, tmp_path: Path) -> None:
    """Whoever writes a file for others to read is a listener."""
    file, script = tmp_path / "run.jsonl", tmp_path / "job.py"
    script.write_text(
        "import asupervise\nprint(1, flush=True)\nasupervise.heartbeat()\n"
        "asupervise.progress(1, 2)\n"
    )
    done = run_cli("--events", file, "--redirects", 3, script)
    assert done.returncode == 0
    (events,) = told(file.read_text())
    assert {"first_output", "heartbeat", "progress"} <= {event.kind for event in events}


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("no/such/folder/run.jsonl", "No such file or directory"),
        (".", "Is a directory"),
        ("file/run.jsonl", "Not a directory"),
        ("socket", "No such device or address"),
        ("/dev/fd/377", "Bad file descriptor"),
    ],
)
def test_what_cannot_be_opened_is_refused_before_anything_starts(
    run_cli: Run, tmp_path: Path, path: str, why: str
) -> None:
    (tmp_path / "file").touch()
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(tmp_path)
        listener.bind("socket")
        os.chdir(ROOT)
    started = tmp_path / "started"
    done = run_cli("--events", path if path[0] == "/" else tmp_path / path,
                   "--no-python", "touch", started)  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("error: --events ")
    assert line.endswith(f": {why}")
    assert not started.exists()


def test_an_empty_name_is_refused(run_cli: Run) -> None:
    done = run_cli("--events", "", "--no-python", "true")
    assert done.stderr == b"error: --events '': expected a file\n"
    assert done.returncode == 2


def test_a_dry_run_writes_nothing(run_cli: Run, tmp_path: Path) -> None:
    done = run_cli("--events", tmp_path / "run.jsonl", "--dry-run", "--no-python", "true")
    assert done.returncode == 0
    assert not (tmp_path / "run.jsonl").exists()


def test_a_full_disk_is_a_warning_and_said_once(run_cli: Run) -> None:
    done = run_cli("--events", "/dev/full", "--no-python", "sh", "-c", "exit 3")
    assert done.returncode == 3
    (warning,) = [line for line in done.stderr.decode().splitlines() if line[:7] == "warning"]
    assert warning == (
        "warning: --events /dev/full: events could not be handled: "
        "[Errno 28] No space left on device"
    )


def test_services_tell_theirs(run_cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    done = run_cli("--events", file, "--restart", "worker", "--max-restarts", 1,
                   "--restart-backoff", 0, "--min-uptime", 0,
                   "--no-python", "sh", "-c", "exit 3")  # fmt: skip
    assert done.returncode == 3
    (events,) = told(file.read_text())
    assert kinds(events).count("worker_started") == 2
    assert kinds(events)[-1] == "group_ended"


# --- the descriptors that we were started with ----------------------------------------------------


@pytest.mark.parametrize("path", ["-", "/dev/stderr", "/dev/fd/2", "/proc/self/fd/2"])
def test_standard_error(run_cli: Run, path: str) -> None:
    done = run_cli("--events", path, "--no-python", "true")
    assert done.returncode == 0
    assert [kinds(run) for run in told(done.stderr)] == [RUN]


def test_standard_output_is_possible(run_cli: Run) -> None:
    done = run_cli("--events", "/dev/stdout", "--no-python", "echo", "from a worker")
    (_, _, *_) = lines_ = done.stdout.decode().splitlines()
    lines_.remove("from a worker")
    assert [kinds(run) for run in told("\n".join(lines_))] == [RUN]


def run_with(fd: int, path: str) -> int:
    command = [sys.executable, "-m", "asupervise", "--events", path, "--no-python", "true"]
    return subprocess.run(
        command, pass_fds=(fd,), env=clean_environment(), cwd=ROOT, timeout=50
    ).returncode


def test_a_file_that_the_shell_has_opened_is_written_where_it_is(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as log:
        log.write("before\n")
        log.flush()
        assert run_with(log.fileno(), f"/dev/fd/{log.fileno()}") == 0
        log.seek(0, os.SEEK_END)
        log.write("after\n")
        log.seek(0)
        first, *between, last = log.read().splitlines()
    assert (first, last) == ("before", "after")
    assert [kinds(run) for run in told("\n".join(between))] == [RUN]


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_pipe_or_a_socket_of_the_shell(kind: str) -> None:
    """As with ``--events >(jq .)`` in bash."""
    if kind == "pipe":
        ours, theirs = os.pipe()
    else:
        pair = socket.socketpair()
        ours, theirs = pair[0].detach(), pair[1].detach()
    with os.fdopen(ours, "rb") as read_end:
        try:
            assert run_with(theirs, f"/dev/fd/{theirs}") == 0
        finally:
            os.close(theirs)
        assert [kinds(run) for run in told(read_end.read())] == [RUN]


# --- pipes by name --------------------------------------------------------------------------------


@contextmanager
def reading(fifo: Path) -> Iterator[list[bytes]]:
    """Somebody who reads it to its end."""
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(fifo.read_bytes()))
    thread.start()
    yield found
    thread.join()


def test_a_pipe_that_is_read(run_cli: Run, fifo: Path) -> None:
    with reading(fifo) as found:
        done = run_cli("--events", fifo, "--no-python", "true")
    assert (done.returncode, done.stderr) == (0, b"")
    assert [kinds(run) for run in told(found[0])] == [RUN]


async def hand(bus: EventBus, path: Path, warnings: list[str], **more: Any) -> Any:
    return handle_events(
        bus, lines_to(str(path)), name="--events", on_warning=warnings.append, **more
    )


async def test_a_pipe_that_nobody_reads_is_given_up_in_the_end(fifo: Path) -> None:
    bus, warnings = EventBus(), []
    async with await hand(bus, fifo, warnings, patience_s=0.05):
        bus.tell("Warned", text="a")
        bus.tell("Warned", text="b")
    assert warnings == ["--events: 2 events left out: too slow"]
    await _threads_ended()


async def test_a_pipe_that_nobody_reads_costs_nothing_where_nothing_is_told(fifo: Path) -> None:
    warnings: list[str] = []
    async with await hand(EventBus(), fifo, warnings):
        pass
    assert warnings == []


async def test_a_reader_that_comes_late_gets_all_from_the_beginning(fifo: Path) -> None:
    bus, warnings = EventBus(), []
    with reading(fifo) as found:
        async with await hand(bus, fifo, warnings):
            for number in range(100):
                bus.tell("Warned", text=str(number))
    assert warnings == []
    (events,) = told(found[0])
    assert texts(events) == [str(number) for number in range(100)]


async def test_a_reader_that_does_not_read_is_not_waited_for(fifo: Path) -> None:
    """More than a pipe holds."""
    bus, warnings = EventBus(), []
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        async with await hand(bus, fifo, warnings, patience_s=0.3):
            for number in range(500):
                bus.tell("Warned", text=f"{number} " + "x" * 1000)
        taken = os.read(fd, 1 << 20)
    finally:
        os.close(fd)
    *whole, _torn = taken.split(b"\n")
    arrived = len(whole) - 1
    assert 20 < arrived < 100
    (warning,) = warnings
    assert warning == f"--events: {500 - arrived} events left out: too slow"
    await _threads_ended()


async def _threads_ended() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("asupervise---events"):
            await asyncio.to_thread(thread.join)


async def test_what_comes_while_a_reader_is_slow_is_bounded(fifo: Path) -> None:
    bus, warnings = EventBus(), []
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        async with await hand(bus, fifo, warnings, maxsize=10):
            bus.tell("Warned", text="x" * (1 << 20))
            # It has begun with the first: the pipe is full.
            await _readable(fd)
            for number in range(100):
                bus.tell("Warned", text=str(number))
            data = b""
            while data.count(b"\n") < 13:
                await _readable(fd)
                data += os.read(fd, 1 << 20)
    finally:
        os.close(fd)
    (events,) = told(data)
    assert texts(events)[1:] == ["90 events were left out here", *map(str, range(90, 100))]
    assert warnings == ["--events: 90 events left out: too slow"]


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(fd)


async def test_a_reader_that_has_gone_is_warned_of_and_the_next_one_goes_on(fifo: Path) -> None:
    bus, warnings = EventBus(), []
    first = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    handler = lines_to(str(fifo))
    async with handle_events(bus, handler, name="--events", on_warning=warnings.append):
        bus.tell("Warned", text="a")
        await _readable(first)
        assert b'"a"' in await _lines(first, 2)
        os.close(first)
        bus.tell("Warned", text="b")
        await _until(lambda: bool(warnings))
        second = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        bus.tell("Warned", text="c")
        assert b'"c"' in await _lines(second, 1)
        os.close(second)
    assert warnings == ["--events: events could not be handled: [Errno 32] Broken pipe"]


async def _lines(fd: int, count: int) -> bytes:
    data = b""
    while data.count(b"\n") < count:
        await _readable(fd)
        data += os.read(fd, 1 << 16)
    return data


async def _until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0)


def test_a_pipe_that_is_removed_is_a_warning_at_the_most(run_cli: Run, fifo: Path) -> None:
    with reading(fifo) as found:
        done = run_cli("--events", fifo, "--no-python", "rm", fifo)
    assert done.returncode == 0
    assert [kinds(run) for run in told(found[0])] == [RUN]


# --- targets, alone -------------------------------------------------------------------------------


def test_an_object_in_the_place_of_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = lines_to("-")
    write(handler, "a", "b")
    handler.close()
    (events,) = told(stream.getvalue())
    assert texts(events) == ["a", "b"]


def test_no_standard_error_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    handler = lines_to("-")
    write(handler, "a")
    handler.abandon()
    handler.close()


def test_a_line_that_was_broken_off_stays_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.jsonl"
    handler = lines_to(str(file))
    write(handler, "a")
    some = lines._Descriptor._write_some
    calls: list[int] = []

    def full(self: Any, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return some(self, data[:10])

    with monkeypatch.context() as patch:
        patch.setattr(lines._Descriptor, "_write_some", full)
        for text in ("b", "c"):
            with pytest.raises(OSError, match="No space"):
                write(handler, text)
    write(handler, "d")
    handler.close()
    header, first, torn, last = file.read_text().splitlines()
    assert json.loads(header) == HEADER
    assert [json.loads(line)["text"] for line in (first, last)] == ["a", "d"]
    assert len(torn) == 10


def test_a_descriptor_that_somebody_has_made_non_blocking() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        handler = Lines(lines._Descriptor(os.dup(theirs.fileno())))
        data: list[bytes] = []

        def read() -> None:
            while chunk := ours.recv(1 << 16):
                data.append(chunk)

        reader = threading.Thread(target=read)
        poller = select.poll()
        poller.register(theirs, select.POLLOUT)
        written = threading.Thread(target=lambda: write(handler, *["x" * 100_000] * 20))
        written.start()
        # Now it is full.
        while poller.poll(0):
            pass
        reader.start()
        written.join()
        handler.close()
        theirs.shutdown(socket.SHUT_WR)
        reader.join()
    (events,) = told(b"".join(data))
    assert len(events) == 20


def test_whoever_waits_returns_when_it_is_abandoned(fifo: Path) -> None:
    """Before there is a reader, and while one does not read."""
    for has_reader in (False, True):
        fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK) if has_reader else -1
        handler = lines_to(str(fifo))
        began = threading.Event()

        def fill(handler: Lines = handler, began: threading.Event = began) -> None:
            began.set()
            write(handler, *["x" * 1000] * 200)

        thread = threading.Thread(target=fill)
        thread.start()
        began.wait()
        handler.abandon()
        thread.join()
        write(handler, "too late")
        handler.close()
        if has_reader:
            os.close(fd)
