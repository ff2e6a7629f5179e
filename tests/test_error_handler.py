"""`error_handler.py`: what real workers leave behind, and what they do themselves."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from asupervise import error_handler
from asupervise.error_files import MAX_ERROR_FILE_BYTES, ErrorRecord, read_error_file
from asupervise.error_handler import ErrorHandler, get_error_handler, record
from asupervise.failures import ProcessFailure
from asupervise.result import ChildFailedError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    return path


def run_worker(
    tmp_path: Path, body: str, *options: str, error_file: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program that uses `record`, as a worker of its own."""
    script = tmp_path / "worker.py"
    script.write_text(f"from asupervise.error_handler import record\n{textwrap.dedent(body)}")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env["TORCHELASTIC_ERROR_FILE"] = str(error_file or tmp_path / "error.json")
    return subprocess.run(
        [sys.executable, *options, str(script)],
        env=env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def load(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def only_file(folder: Path, *names: str) -> bool:
    return sorted(os.listdir(folder)) == sorted(names)


# --- in workers ------------------------------------------------------------------------------

RAISES = """
    @record
    def main():
        raise ValueError("no such batch")

    main()
"""


def test_an_exception_is_recorded_and_raised(tmp_path: Path) -> None:
    before = time.time()
    done = run_worker(tmp_path, RAISES)
    after = time.time()
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: no such batch\n")
    message = load(tmp_path / "error.json")["message"]
    assert message["message"] == "ValueError: no such batch"
    assert message["extraInfo"]["py_callstack"].endswith("ValueError: no such batch\n")
    assert 'raise ValueError("no such batch")' in message["extraInfo"]["py_callstack"]
    assert before - 1 <= int(message["extraInfo"]["timestamp"]) <= after
    assert before <= int(message["extraInfo"]["timestamp_ns"]) / 1e9 <= after
    assert (tmp_path / "error.json").stat().st_mode & 0o777 == 0o600
    assert only_file(tmp_path, "error.json", "worker.py")
    read = read_error_file(tmp_path / "error.json", not_before=before, not_after=after)
    assert read is not None
    assert read.timestamp is not None
    assert read.note == ""


def test_an_async_main_is_recorded(tmp_path: Path) -> None:
    body = """
        import asyncio

        @record
        async def main():
            await asyncio.sleep(0)
            raise ValueError("no such batch")

        asyncio.run(main())
    """
    assert run_worker(tmp_path, body).returncode == 1
    assert load(tmp_path / "error.json")["message"]["message"] == "ValueError: no such batch"


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        ("SystemExit(0)", 0),
        ("SystemExit()", 0),
        ("SystemExit(False)", 0),
        ("SystemExit(3)", 3),
        ("SystemExit('give up')", 1),
        ("SystemExit('')", 1),
        ("KeyboardInterrupt()", -2),
        ("__import__('asyncio').CancelledError()", 1),
    ],
)
def test_a_decision_is_not_recorded(tmp_path: Path, raised: str, status: int) -> None:
    body = f"""
        @record
        def main():
            raise {raised}

        assert main() is None
        print("went on")
    """
    done = run_worker(tmp_path, body)
    assert done.returncode == status, done.stderr
    assert (done.stdout == "went on\n") is (status == 0)
    assert only_file(tmp_path, "worker.py")


def test_a_crash_prints_every_threads_stack(tmp_path: Path) -> None:
    body = """
        import os, resource, signal

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        @record
        def main():
            os.kill(os.getpid(), signal.SIGSEGV)

        main()
    """
    done = run_worker(tmp_path, body)
    assert done.returncode == -11
    assert "Fatal Python error: Segmentation fault" in done.stderr


def test_a_crash_is_shown_where_stderr_is_no_file(tmp_path: Path) -> None:
    body = """
        import io, os, resource, signal, sys

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        @record
        def main():
            os.kill(os.getpid(), signal.SIGSEGV)

        sys.stderr = io.StringIO()
        main()
    """
    done = run_worker(tmp_path, body)
    assert "Fatal Python error: Segmentation fault" in done.stderr


def test_a_missing_folder_does_not_hide_the_exception(tmp_path: Path) -> None:
    done = run_worker(tmp_path, RAISES, error_file=tmp_path / "gone" / "error.json")
    assert done.returncode == 1
    assert "asupervise.record: cannot write the error file: FileNotFoundError" in done.stderr
    assert done.stderr.endswith("ValueError: no such batch\n")
    assert "During handling" not in done.stderr


@pytest.mark.parametrize("target", ["directory", "/proc/self/error.json", "\\0", "x" * 5000])
def test_a_file_that_cannot_be_written_does_not_hide_the_exception(
    tmp_path: Path, target: str
) -> None:
    if target == "directory":
        (tmp_path / target).mkdir()
        target = str(tmp_path / target)
    body = f"""
        import os
        from asupervise.error_handler import ErrorHandler

        class Elsewhere(ErrorHandler):
            def _get_error_file_path(self):
                return "{target}"

        def main():
            raise ValueError("no such batch")

        record(main, Elsewhere())()
    """
    done = run_worker(tmp_path, body)
    assert done.returncode == 1
    assert "cannot write the error file" in done.stderr
    assert done.stderr.endswith("ValueError: no such batch\n")
    assert "During handling" not in done.stderr
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_does_not_hide_the_exception(tmp_path: Path) -> None:
    (tmp_path / "error.json").write_text("the former content")
    body = """
        import resource, signal

        @record
        def main():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
            raise ValueError("no such batch")

        main()
    """
    done = run_worker(tmp_path, body)
    assert done.returncode == 1
    assert "cannot write the error file: OSError" in done.stderr
    assert done.stderr.endswith("ValueError: no such batch\n")
    assert (tmp_path / "error.json").read_text() == "the former content"
    assert only_file(tmp_path, "error.json", "worker.py")


def test_without_descriptors_and_without_stderr_the_exit_status_is_kept(tmp_path: Path) -> None:
    body = """
        import resource, sys

        @record
        def main():
            sys.stderr = None
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
            raise ValueError("no such batch")

        main()
    """
    assert run_worker(tmp_path, body).returncode == 1
    assert only_file(tmp_path, "worker.py")


def test_warnings_as_errors_do_not_hide_the_exception(tmp_path: Path) -> None:
    done = run_worker(tmp_path, RAISES, "-W", "error", error_file=tmp_path / "gone" / "x")
    assert done.stderr.endswith("ValueError: no such batch\n")


def test_a_worker_pays_for_no_heavy_import(tmp_path: Path) -> None:
    body = """
        import sys

        @record
        def main():
            heavy = {"asyncio", "anyio", "psutil", "json", "logging", "traceback", "inspect",
                     "socket", "subprocess", "tempfile", "dataclasses", "asupervise.failures"}
            print(sorted(heavy & set(sys.modules)))

        main()
    """
    done = run_worker(tmp_path, body, "-S")  # no .pth file of this environment imports any of them
    assert done.stdout == "[]\n", done.stderr


def test_a_nested_failure_is_passed_on(tmp_path: Path) -> None:
    body = """
        import pathlib
        from asupervise import ChildFailedError, ProcessFailure
        from asupervise.error_handler import ErrorHandler

        inner = pathlib.Path(__file__).with_name("inner.json")

        class Inner(ErrorHandler):
            def _get_error_file_path(self):
                return str(inner)

        @record
        def main():
            Inner().record_exception(ValueError("the worker's own"))
            raise ChildFailedError("inner", {3: ProcessFailure(3, 77, -11, str(inner))})

        main()
    """
    done = run_worker(tmp_path, body)
    assert done.returncode == 1
    assert "Root Cause" in done.stderr
    data, inner = load(tmp_path / "error.json"), load(tmp_path / "inner.json")
    assert data["message"].pop("errorCode") == -11
    assert data == inner
    assert data["message"]["message"] == "ValueError: the worker's own"


# --- in this process -------------------------------------------------------------------------


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even that")


class BrokenError(Exception):
    @property
    def __notes__(self) -> list[str]:  # type: ignore[override]
        raise RuntimeError("not even that")


def chained() -> Exception:
    try:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error
    except ValueError as error:
        return error


def test_an_exception_that_is_not_being_handled_is_formatted(file: Path) -> None:
    ErrorHandler().record_exception(chained())
    stack = load(file)["message"]["extraInfo"]["py_callstack"]
    assert "KeyError: 'first'" in stack
    assert "direct cause" in stack
    assert stack.endswith("ValueError: second\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UnprintableError(), "UnprintableError: <its text raised RuntimeError>"),
        (BrokenError("x"), "BrokenError: x"),
        (ExceptionGroup("two", [ValueError("a"), OSError("b")]), "ExceptionGroup: two (2 sub-"),
        (ValueError("\ud800 caf\xe9 \U0001f600"), "ValueError: \ud800 caf\xe9 \U0001f600"),
        (MemoryError(), "MemoryError: "),
        (RecursionError("deep"), "RecursionError: deep"),
    ],
)
def test_awkward_exceptions(file: Path, error: Exception, message: str) -> None:
    @record
    def main() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        main()
    assert raised.value is error
    assert load(file)["message"]["message"].startswith(message)
    made = ProcessFailure(0, 1, 1, str(file))
    assert message.encode("utf-8", "replace")
    assert type(error).__name__ in str(ChildFailedError("job", {0: made}))


def test_a_group_shows_its_members(file: Path) -> None:
    ErrorHandler().record_exception(ExceptionGroup("two", [ValueError("a"), OSError("b")]))
    stack = load(file)["message"]["extraInfo"]["py_callstack"]
    assert "ValueError: a" in stack
    assert "OSError: b" in stack


@pytest.mark.parametrize("letter", ["x", "\U0001f600", "\x00"])
def test_a_huge_message_stays_readable(file: Path, letter: str) -> None:
    ErrorHandler().record_exception(ValueError(letter * 3_000_000))
    assert file.stat().st_size < MAX_ERROR_FILE_BYTES
    read = read_error_file(file)
    assert read is not None
    assert read.note == ""
    assert "characters left out" in read.traceback


def test_an_endless_recursion_is_recorded(file: Path) -> None:
    def one(depth: int) -> None:
        other(depth + 1)

    def other(depth: int) -> None:
        one(depth + 1)

    with pytest.raises(RecursionError):
        record(one)(0)
    assert load(file)["message"]["message"].startswith("RecursionError: ")
    assert file.stat().st_size < MAX_ERROR_FILE_BYTES


def test_without_the_variable_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="x"):
        record(int)("x")
    assert only_file(tmp_path)
    assert capfd.readouterr().err == ""


def test_the_wrapper_is_the_function() -> None:
    @record
    def add(left: int, right: int = 2) -> int:
        """Add."""
        return left + right

    assert (add(1), add(1, right=5)) == (3, 6)
    assert (add.__name__, add.__doc__) == ("add", "Add.")


class Callable:
    async def __call__(self) -> int:
        return 1

    async def method(self) -> int:
        return 1


async def one(_ignored: int = 0) -> int:
    return 1


@pytest.mark.parametrize(
    "fn", [one, functools.partial(one, 3), Callable().method, functools.partial(Callable().method)]
)
def test_async_functions_stay_async(fn: Any) -> None:
    assert inspect.iscoroutinefunction(fn)
    assert asyncio.run(record(fn)()) == 1
    assert error_handler._is_async(record(fn))


def test_what_is_async_by_its_call_is_awaited(file: Path) -> None:
    assert asyncio.run(record(Callable())()) == 1
    assert not error_handler._is_async(int)
    assert not error_handler._is_async(len)


def test_a_handler_that_fails_does_not_hide_the_exception(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Bad(ErrorHandler):
        def record_exception(self, e: BaseException) -> None:
            raise OSError("handler's own")

    def main() -> None:
        raise ValueError("the user's")

    with pytest.raises(ValueError, match="the user's") as raised:
        record(main, Bad())()
    assert raised.value.__context__ is None
    assert "cannot record ValueError: OSError: handler's own" in capfd.readouterr().err


def test_a_subclass_decides(file: Path) -> None:
    seen: list[object] = []

    class Mine(ErrorHandler):
        def initialize(self) -> None:
            seen.append("initialize")

        def record_exception(self, e: BaseException) -> None:
            seen.append(e)

    error = ValueError("x")

    def main() -> None:
        raise error

    with pytest.raises(ValueError, match="x"):
        record(main, error_handler=Mine())()
    assert seen == ["initialize", error]
    assert type(get_error_handler()) is ErrorHandler


def test_a_file_that_cannot_be_replaced_is_overwritten(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Kubernetes' /dev/termination-log, which is a mount of its own."""

    def busy(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    file.write_text("x" * 5000)
    monkeypatch.setattr(os, "replace", busy)
    ErrorHandler().record_exception(ValueError("boom"))
    assert load(file)["message"]["message"] == "ValueError: boom"
    assert only_file(file.parent, "error.json")


# --- a launcher within a worker --------------------------------------------------------------


def nested(error_file: str, exitcode: int = 7) -> ChildFailedError:
    found = ErrorRecord(message="x") if os.path.exists(error_file) else None
    return ChildFailedError("inner", {2: ProcessFailure(2, 77, exitcode, error_file, record=found)})


def fail_with(error: Exception) -> None:
    def main() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        record(main)()
    assert raised.value is error


def test_a_nested_failure_without_a_file_writes_none(file: Path) -> None:
    fail_with(nested("gone.json"))
    assert only_file(file.parent)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff"])
def test_a_nested_failures_bad_file_is_passed_over(
    tmp_path: Path, file: Path, raw: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inner.json").write_bytes(raw)
    fail_with(nested(str(tmp_path / "inner.json")))
    assert not file.exists()
    assert "cannot pass on the worker's error file" in capfd.readouterr().err


def test_what_is_left_of_a_nested_failures_file_is_passed_on(tmp_path: Path, file: Path) -> None:
    (tmp_path / "inner.json").write_text('{"message": {"message": "boom", "extraInfo": {"py_')
    fail_with(nested(str(tmp_path / "inner.json")))
    message = load(file)["message"]
    assert (message["message"], message["errorCode"]) == ("boom", 7)
    assert int(message["extraInfo"]["timestamp"]) > 0


def test_a_plain_text_message_keeps_its_shape(
    tmp_path: Path, file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inner.json").write_text('{"message": "boom", "timestamp": 5}')
    fail_with(nested(str(tmp_path / "inner.json")))
    assert load(file) == {"message": "boom", "timestamp": 5}
    assert "exit code 7" in capfd.readouterr().err


def test_a_nested_failure_in_the_same_file(file: Path) -> None:
    ErrorHandler().record_exception(ValueError("boom"))
    fail_with(nested(str(file)))
    assert load(file)["message"]["errorCode"] == 7


def test_no_error_code_is_noted_for_zero(tmp_path: Path, file: Path) -> None:
    inner = tmp_path / "inner.json"
    inner.write_text('{"message": {"message": "boom"}}')
    ErrorHandler().dump_error_file(str(inner))
    assert "errorCode" not in load(file)["message"]


def test_dumping_without_the_variable_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    (tmp_path / "inner.json").write_text('{"message": {"message": "boom"}}')
    ErrorHandler().dump_error_file(str(tmp_path / "inner.json"), 3)
    assert "is not set" in capfd.readouterr().err
