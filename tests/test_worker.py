"""What runs inside workers: arming stack dumps, and heartbeats. No supervisor is needed here."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import asupervise
from asupervise import worker
from asupervise.worker import (
    HEARTBEAT_VARIABLE,
    PROGRESS_VARIABLE,
    STACKS_SIGNAL,
    STACKS_VARIABLE,
    parse_progress,
)


@pytest.fixture(autouse=True)
def _no_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HEARTBEAT_VARIABLE, raising=False)
    monkeypatch.delenv(PROGRESS_VARIABLE, raising=False)
    monkeypatch.delenv(STACKS_VARIABLE, raising=False)


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(
        argv, env={**os.environ, **env}, capture_output=True, text=True, timeout=30
    )


# --- heartbeats ---------------------------------------------------------------------------------


def test_a_heartbeat_outside_a_supervisor_does_nothing() -> None:
    assert asupervise.heartbeat is worker.heartbeat
    assert worker.heartbeat() is None


def test_each_heartbeat_sets_the_files_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beat = tmp_path / "heartbeat"
    monkeypatch.setenv(HEARTBEAT_VARIABLE, str(beat))
    worker.heartbeat()
    assert beat.stat().st_mode & 0o777 == 0o600
    os.utime(beat, (1, 1))
    worker.heartbeat()
    assert beat.stat().st_mtime > 1_000_000_000
    assert beat.stat().st_size == 0
    # The folder's owner has tidied up.
    beat.unlink()
    worker.heartbeat()
    assert beat.exists()


def test_a_heartbeat_that_cannot_be_sent_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HEARTBEAT_VARIABLE, str(tmp_path / "gone" / "heartbeat"))
    worker.heartbeat()
    monkeypatch.setenv(HEARTBEAT_VARIABLE, str(tmp_path / "heartbeat"))

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "open", full)
    worker.heartbeat()
    monkeypatch.setattr(os, "utime", full)
    worker.heartbeat()


def test_heartbeats_count_on_a_full_disk(tmp_path: Path) -> None:
    """A file system of one page, all of it used."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        beat = folder / "heartbeat"
        done = run(
            """
            import errno, os, asupervise
            path = os.environ["ASUPERVISE_HEARTBEAT_FILE"]
            with open(os.path.join(os.path.dirname(path), "fill"), "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(b"x" * 4096)
                except OSError as error:
                    assert error.errno == errno.ENOSPC
            asupervise.heartbeat()
            os.utime(path, (1, 1))
            asupervise.heartbeat()
            """,
            ASUPERVISE_HEARTBEAT_FILE=str(beat),
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert beat.stat().st_mtime > 1_000_000_000
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_heartbeat_costs_no_descriptor_and_no_import(tmp_path: Path) -> None:
    done = run(
        """
        import os, sys, asupervise
        before = set(os.listdir("/proc/self/fd"))
        asupervise.heartbeat()
        assert set(os.listdir("/proc/self/fd")) == before
        print({"asyncio", "anyio", "psutil", "subprocess"} & set(sys.modules))
        """,
        ASUPERVISE_HEARTBEAT_FILE=str(tmp_path / "heartbeat"),
    )
    assert (done.stdout, done.stderr) == ("set()\n", "")


# --- progress -----------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**300), 10**300)


def test_progress_outside_a_supervisor_does_nothing() -> None:
    assert asupervise.progress is worker.progress
    assert worker.progress(1) is None
    assert worker.progress(1.5, total=3) is None


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("progress") / "progress"


@given(finite, st.none() | finite)
def test_progress_is_read_as_it_was_told(told: Path, done: float, total: float | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PROGRESS_VARIABLE, str(told))
        worker.progress(done, total)
    done, total = float(done), None if total is None else float(total)
    assert parse_progress(told.read_bytes()) == (done, total)
    # Of one length, so that what was told before shows through nowhere.
    assert told.stat().st_size == 64
    assert told.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("supervised", [False, True])
def test_progress_that_is_no_finite_number_is_refused(
    told: Path, monkeypatch: pytest.MonkeyPatch, value: float, supervised: bool
) -> None:
    """Also where nobody watches: a mistake shows itself in the first test of a program."""
    if supervised:
        monkeypatch.setenv(PROGRESS_VARIABLE, str(told))
    with pytest.raises(ValueError, match=r"done: .*: expected a finite number"):
        worker.progress(value)
    with pytest.raises(ValueError, match=r"total: .*: expected a finite number"):
        worker.progress(1, value)


def test_progress_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="abc"):
        worker.progress("abc")
    with pytest.raises(TypeError):
        worker.progress(None)
    with pytest.raises(ValueError, match="expected a finite number"):
        worker.progress(10**400)


def test_progress_that_cannot_be_told_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROGRESS_VARIABLE, str(tmp_path / "gone" / "progress"))
    worker.progress(1)
    monkeypatch.setenv(PROGRESS_VARIABLE, "/dev/full")
    worker.progress(1)
    monkeypatch.setenv(PROGRESS_VARIABLE, str(tmp_path))
    worker.progress(1)


def test_progress_costs_no_descriptor_and_no_import(tmp_path: Path) -> None:
    done = run(
        """
        import os, sys, asupervise
        before = set(os.listdir("/proc/self/fd"))
        for step in range(100):
            asupervise.progress(step, 100)
        assert set(os.listdir("/proc/self/fd")) == before
        assert not {"asyncio", "json", "re", "signal"} & set(sys.modules)
        """,
        ASUPERVISE_PROGRESS_FILE=str(tmp_path / "progress"),
    )
    assert (done.returncode, done.stderr) == (0, "")


@given(st.binary(max_size=300))
def test_whatever_stands_there_is_progress_or_nothing(text: bytes) -> None:
    found = parse_progress(text)
    assert found is None or all(number is None or math.isfinite(number) for number in found)


@pytest.mark.parametrize(
    "text", [b"", b"\n", b"x", b"1 2 3", b"nan", b"1 inf", b"1e999", b"1 x", b"\xff", b"\x001"]
)
def test_what_is_no_progress_is_none(text: bytes) -> None:
    assert parse_progress(text) is None


# --- stack dumps --------------------------------------------------------------------------------


def test_no_stack_dumps_outside_a_supervisor() -> None:
    assert not worker.arm_stack_dumps()
    assert signal.getsignal(STACKS_SIGNAL) == signal.SIG_DFL


def test_armed_it_answers_the_signal_and_goes_on(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks.txt"
    done = run(
        """
        import os, signal
        from asupervise import worker
        assert worker.arm_stack_dumps()
        files = len(os.listdir("/proc/self/fd"))
        assert worker.arm_stack_dumps(), "twice: by two functions with @record"
        assert len(os.listdir("/proc/self/fd")) == files
        def here():
            signal.raise_signal(worker.STACKS_SIGNAL)
        here()
        here()
        print("goes on")
        """,
        ASUPERVISE_STACKS_FILE=str(stacks),
    )
    assert (done.stdout, done.stderr) == ("goes on\n", "")
    text = stacks.read_text()
    assert text.count("Current thread") == 2
    assert text.count(" in here\n") == 2
    assert stacks.stat().st_mode & 0o777 == 0o600


def test_a_file_that_cannot_be_opened_stops_no_program(tmp_path: Path) -> None:
    done = run(
        """
        from asupervise import record
        from asupervise.worker import arm_stack_dumps
        assert not arm_stack_dumps()
        record(lambda: print("goes on"))()
        """,
        ASUPERVISE_STACKS_FILE=str(tmp_path / "gone" / "stacks.txt"),
    )
    assert (done.stdout, done.stderr) == ("goes on\n", "")


def test_the_signal_interrupts_no_system_call(tmp_path: Path) -> None:
    """A read that C code makes, which knows no EINTR, is restarted (signal(7): SA_RESTART)."""
    done = run(
        """
        import ctypes, os, threading, time
        from asupervise import worker
        assert worker.arm_stack_dumps()
        reader, writer = os.pipe()
        def send():
            time.sleep(0.1)
            os.kill(os.getpid(), worker.STACKS_SIGNAL)
            time.sleep(0.1)
            os.write(writer, b"x")
        threading.Thread(target=send).start()
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.read(reader, ctypes.create_string_buffer(1), 1), ctypes.get_errno())
        """,
        ASUPERVISE_STACKS_FILE=str(tmp_path / "stacks.txt"),
    )
    assert (done.stdout, done.stderr) == ("1 0\n", "")
    assert "Current thread" in (tmp_path / "stacks.txt").read_text()
