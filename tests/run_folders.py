"""Folders as runs leave them, made without a run: for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NODE = "node7"
T0 = 1_800_000_000.0
NS0 = 5_000_000_000_000
HEADER = {"event": "header", "format": 1, "version": "0.1.0"}


def event(kind: str, at_s: float = 0.0, **fields: Any) -> dict[str, Any]:
    """An event as `events.jsonl` has it."""
    return {
        "event": kind,
        "monotonic_ns": NS0 + int(at_s * 10**9),
        "time": T0 + at_s,
        "run_id": "job7",
        "group": "trainer",
        "attempt": 0,
        "node": NODE,
        **fields,
    }


def worker(kind: str, at_s: float, rank: int, **fields: Any) -> dict[str, Any]:
    return event(kind, at_s, **{"local_rank": rank, "rank": rank, "pid": 1000 + rank, **fields})


def started(at_s: float, rank: int, folder: Path | str = "/runs/job7", **fields: Any) -> Any:
    inner = f"{folder}/attempt_{fields.get('attempt', 0)}/{rank}"
    return worker(
        "worker_started", at_s, rank,
        **{"argv": ["python", "-u", "train.py"], "binding": "", "stdout": f"{inner}/stdout.log",
           "stderr": f"{inner}/stderr.log", **fields},
    )  # fmt: skip


def exited(at_s: float, rank: int, exitcode: int = 0, **fields: Any) -> dict[str, Any]:
    return worker(
        "worker_exited", at_s, rank,
        **{"exitcode": exitcode, "uptime_s": at_s, "peak_rss_bytes": 100 << 20, **fields},
    )  # fmt: skip


def failed(at_s: float, rank: int, exitcode: int = 1, **fields: Any) -> dict[str, Any]:
    return worker("worker_failed", at_s, rank, exitcode=exitcode, **fields)


def group(nprocs: int, folder: Path | str = "/runs/job7", at_s: float = 0.0, **fields: Any) -> Any:
    return event(
        "group_starting", at_s, nprocs=nprocs, entrypoint="python", log_dir=str(folder), **fields
    )


def group_ended(at_s: float, root_cause: int | None = None, **fields: Any) -> dict[str, Any]:
    return event(
        "group_ended", at_s, succeeded=root_cause is None, root_cause=root_cause, duration_s=at_s,
        **fields,
    )  # fmt: skip


def a_failure(folder: Path | str = "/runs/job7") -> list[dict[str, Any]]:
    """Rank 1 of three fails, and the others are ended."""
    ended = {"signal": "SIGTERM", "ended_by_us": True, "message": "Signal 15 ended it"}
    return [
        group(3, folder),
        *(started(0.1 * rank, rank, folder) for rank in range(3)),
        exited(2.0, 1, 1),
        event("signal_sent", 2.1, signal="SIGTERM", ranks=[0, 2], why="ending"),
        exited(2.5, 0, -15),
        exited(2.6, 2, -15),
        failed(2.7, 0, -15, **ended),
        failed(2.7, 1, message="ValueError: no such batch", root_cause=True,
               traceback="Traceback (most recent call last):\n  boom\nValueError: no such batch\n"),
        failed(2.7, 2, -15, **ended),
        group_ended(2.8, 1),
    ]  # fmt: skip


def write(folder: Path, events: Iterable[dict[str, Any]], *, header: Any = HEADER) -> Path:
    """Write ``events.jsonl``, and the folders and empty logs of the workers that it starts."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*([header] if header else []), *events]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "events.jsonl").write_text(text)
    for line in lines:
        if line["event"] == "worker_started":
            log(folder, line["local_rank"], attempt=line["attempt"])
    return folder


def log(
    folder: Path, rank: int, stdout: bytes | str = b"", stderr: bytes | str = b"", attempt: int = 0
) -> Path:
    inner = folder / f"attempt_{attempt}" / str(rank)
    inner.mkdir(parents=True, exist_ok=True)
    for name, data in (("stdout.log", stdout), ("stderr.log", stderr)):
        (inner / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return inner
