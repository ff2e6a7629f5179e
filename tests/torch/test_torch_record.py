"""Error files written by torch and read by us, and the other way round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

torch_errors = pytest.importorskip(
    "torch.distributed.elastic.multiprocessing.errors",
    reason="needs torch: `make test-torch` installs it",
)

from asupervise.error_files import read_error_file  # noqa: E402
from asupervise.error_handler import ErrorHandler, record  # noqa: E402
from asupervise.failures import ProcessFailure, root_cause  # noqa: E402
from asupervise.result import ChildFailedError  # noqa: E402

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    return path


def start_worker(script: Path, error_file: Path, body: str) -> subprocess.Popen[str]:
    script.write_text(textwrap.dedent(body))
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        "TORCHELASTIC_ERROR_FILE": str(error_file),
    }
    return subprocess.Popen(
        [sys.executable, str(script)],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


TORCH_WORKER = """
    from torch.distributed.elastic.multiprocessing.errors import record

    @record
    def main():
        print("ready", flush=True)
        input()
        raise ValueError("no such batch")

    main()
"""


@pytest.mark.timeout(120)
def test_we_read_torchs_record_below_the_second(tmp_path: Path) -> None:
    """Rank 1 raises 50 ms before rank 0, both under torch's own `record`."""
    files = [tmp_path / f"error{rank}.json" for rank in range(2)]
    workers = [
        start_worker(tmp_path / f"worker{rank}.py", files[rank], TORCH_WORKER) for rank in range(2)
    ]
    before = time.time()
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n", worker.communicate()[1]
        told = []
        for worker in (workers[1], workers[0]):
            assert worker.stdin is not None
            told.append(time.time())
            worker.stdin.write("\n")
            worker.stdin.flush()
            time.sleep(0.05)
        errors = [worker.communicate(timeout=60)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [1, 1], errors
    made = {}
    for rank, worker in enumerate(workers):
        found = read_error_file(files[rank], not_before=before, not_after=time.time())
        assert found is not None
        assert found.note == ""
        assert found.timestamp is not None
        made[rank] = ProcessFailure(rank, worker.pid, 1, str(files[rank]), record=found)
    assert made[1].timestamp >= told[0] - 0.02
    assert made[0].timestamp >= told[1] - 0.02
    assert root_cause(made) == (1, made[1])
    report = str(ChildFailedError("job", made))
    assert 'raise ValueError("no such batch")' in report


def test_torch_reads_our_record(file: Path) -> None:
    ErrorHandler().record_exception(ValueError("caf\xe9 \U0001f600"))
    theirs = torch_errors.ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    ours = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    assert theirs.message == ours.message
    assert theirs.error_file_data == ours.error_file_data
    assert theirs.timestamp == int(ours.timestamp)
    assert "ValueError: caf\xe9" in str(torch_errors.ChildFailedError("job", {0: theirs}))


def test_failures_without_a_file_agree(tmp_path: Path) -> None:
    for exitcode in (1, -9):
        path = str(tmp_path / "none.json")
        theirs = torch_errors.ProcessFailure(0, 1, exitcode, path)
        ours = ProcessFailure(0, 1, exitcode, path)
        assert ours.error_file == theirs.error_file
        assert ours.signal_name() == theirs.signal_name()
        assert ours.error_file_data["message"] == theirs.error_file_data["message"]
        assert abs(ours.timestamp - theirs.timestamp) < 10
        assert len(ours.timestamp_isoformat()) == len(theirs.timestamp_isoformat()) + 7


def test_torchs_handler_passes_our_file_on(tmp_path: Path, file: Path) -> None:
    ErrorHandler().record_exception(ValueError("boom"))
    inner = file.rename(tmp_path / "inner.json")
    torch_errors.ErrorHandler().dump_error_file(str(inner), -11)
    ours, theirs = json.loads(inner.read_text()), json.loads(file.read_text())
    assert theirs["message"].pop("errorCode") == -11
    assert theirs == ours
    found = read_error_file(file)
    assert found is not None
    assert found.timestamp == int(ours["message"]["extraInfo"]["timestamp_ns"]) / 10**9


def test_our_record_passes_torchs_nested_failure_on(tmp_path: Path, file: Path) -> None:
    try:
        raise ValueError("boom")
    except ValueError as error:
        torch_errors.ErrorHandler().record_exception(error)
    inner = file.rename(tmp_path / "inner.json")
    nested = torch_errors.ProcessFailure(2, 77, -11, str(inner))

    @record
    def main() -> None:
        raise torch_errors.ChildFailedError("inner", {2: nested})

    with pytest.raises(torch_errors.ChildFailedError):
        main()
    again = torch_errors.ProcessFailure(0, 1, 1, str(file))
    assert again.message["errorCode"] == -11
    assert again.message["message"] == "ValueError: boom"
    assert again.timestamp == nested.timestamp


def test_torch_reads_what_we_save_of_a_truncated_file(tmp_path: Path, file: Path) -> None:
    inner = tmp_path / "inner.json"
    inner.write_text('{"message": {"message": "boom", "extraInfo": {"py_')
    with pytest.raises(json.JSONDecodeError):
        torch_errors.ProcessFailure(0, 1, 1, str(inner))
    ErrorHandler().dump_error_file(str(inner), 3)
    assert torch_errors.ProcessFailure(0, 1, 1, str(file)).message["message"] == "boom"


def test_torchs_names_are_all_here() -> None:
    import asupervise

    assert {*torch_errors.__all__} <= {*asupervise.__all__}
    for method in ("initialize", "record_exception", "dump_error_file", "_get_error_file_path"):
        assert callable(getattr(ErrorHandler, method))
