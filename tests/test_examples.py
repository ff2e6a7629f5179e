"""The examples that need no torch, run for real."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RANKS = 4


def by_rank(output: bytes, role: str = "default") -> dict[int, list[str]]:
    """The teed lines of each rank, without their prefixes; every line must have one."""
    lines: dict[int, list[str]] = {}
    for line in output.decode().splitlines():
        found = re.fullmatch(rf"\[{role}(\d+)\]:(.*)", line)
        assert found, f"no prefix: {line!r}"
        lines.setdefault(int(found[1]), []).append(found[2])
    return lines


def test_word_count_adds_up(run_cli) -> None:
    done = run_cli("--nproc-per-node", RANKS, "--tee", 3, EXAMPLES / "word_count.py")
    assert done.returncode == 0
    lines = by_rank(done.stdout)
    assert set(lines) == set(range(RANKS))
    counted = [re.match(r"counted ([\d,]+) words", lines[rank][0]) for rank in range(RANKS)]
    total = sum(int(found[1].replace(",", "")) for found in counted if found)
    assert lines[0][1].startswith(f"{total:,} words, ")
    assert lines[0][1].endswith(f" by {RANKS} ranks")
    assert re.fullmatch(r" +[\d,]+  self", lines[0][2])


def test_word_count_does_not_depend_on_the_number_of_ranks(run_cli) -> None:
    def totals(ranks: int) -> list[str]:
        done = run_cli("--nproc-per-node", ranks, "--tee", 1, EXAMPLES / "word_count.py")
        assert done.returncode == 0
        lines = by_rank(done.stdout)[0][1:]
        return [line.removesuffix(f" by {ranks} ranks") for line in lines]

    assert totals(1) == totals(3)


def test_word_count_reports_progress_on_stderr(run_cli) -> None:
    done = run_cli("--nproc-per-node", 2, "--tee", 2, "--redirects", 1, EXAMPLES / "word_count.py")
    assert done.returncode == 0
    assert done.stdout == b""
    progress = re.findall(r"^\[default[01]\]:\d+ of \d+ files$", done.stderr.decode(), re.MULTILINE)
    assert len(progress) >= 4


def test_failing_names_the_rank_and_its_error(run_cli, tmp_path: Path) -> None:
    # The other ranks wait for ever, and end on SIGTERM: nobody waits for the grace.
    arguments = ("--nproc-per-node", 3, "--log-dir", tmp_path, "--shutdown-timeout", 1000,
                 EXAMPLES / "failing.py")  # fmt: skip
    done = run_cli(*arguments)
    assert done.returncode == 1
    assert done.stdout == b""
    report = done.stderr.decode()
    root_cause = report[report.index("Root Cause") :]
    assert re.search(r"rank\s*: 1 \(local_rank: 1\)", root_cause)
    assert "ValueError: shard 1 is truncated: 1,024 records expected, 17 found" in root_cause


def test_async_app_runs_two_groups_and_ends_both(tmp_path: Path) -> None:
    argv = [sys.executable, "-W", "error", str(EXAMPLES / "async_app.py")]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=50, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {"[service0]:serving as rank 0", "[service1]:serving as rank 1"} <= set(lines)
    assert any(re.fullmatch(r"\[count0\]:[\d,]+ words, .* by 2 ranks", line) for line in lines)
    assert lines[-1] == "the batch is done and the service has ended"
    # The count's folder is gone. The service was ended, which is no success: its logs are kept.
    assert len(list(tmp_path.iterdir())) <= 1


def run_example(name: str, tmp_path: Path) -> list[str]:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    argv = [sys.executable, "-W", "error", str(EXAMPLES / name)]
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=50, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_sweep_names_the_best_trial_and_those_that_failed(tmp_path: Path) -> None:
    *trials, last = run_example("sweep.py", tmp_path)
    assert len(trials) == 12
    diverged = [line for line in trials if "ArithmeticError: diverged" in line]
    assert diverged
    assert all("learning_rate=3.0" in line for line in diverged)
    best = re.match(r"best of 12 in [\d.]+ s: (Trial\(.*?\)) -> ", last)
    assert best
    losses = {m[1]: float(m[2]) for line in trials if (m := re.match(r"(.*): loss (.*)", line))}
    assert losses[best[1]] == min(losses.values())


def test_notebook_runs_as_a_script(tmp_path: Path) -> None:
    lines = run_example("notebook.py", tmp_path)
    assert [line for line in lines if line.startswith("pi is about 3.")] == lines[4::5]
    assert {line[:9] for line in lines if line.startswith("[")} == {
        f"[darts{rank}]:" for rank in range(RANKS)
    }
