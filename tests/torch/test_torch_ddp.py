"""Training with DistributedDataParallel, under asupervise and under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Both ranks import torch, and train for real: slow on two shared cores.
pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ddp_text.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
RANKS = 2
TIMEOUT_S = 280


def losses(output: bytes) -> list[float]:
    return [float(loss) for loss in re.findall(rb"step +\d+  loss ([\d.]+)", output)]


def final_losses(output: bytes) -> dict[int, str]:
    """By rank, with all digits."""
    found = re.findall(rb"rank (\d+) final loss ([\d.]+)", output)
    return {int(rank): loss.decode() for rank, loss in found}


def check_training(done: subprocess.CompletedProcess[bytes]) -> str:
    """The final loss, once it is sure that training went well."""
    assert done.returncode == 0
    course = losses(done.stdout)
    assert len(course) > 3
    # ln 128 = 4.85 is what one who knows nothing has; below 2.5 it has learnt more than bigrams.
    assert course[0] > 4.5
    assert course[-1] < 2.5
    finals = final_losses(done.stdout)
    assert set(finals) == set(range(RANKS))
    assert finals[0] == finals[1]
    return finals[0]


def test_the_loss_falls_and_equals_torchruns(run_cli) -> None:
    job = ("--nproc-per-node", RANKS, EXAMPLE)
    ours = check_training(run_cli(*job, timeout=TIMEOUT_S))
    # --standalone: at a free port; torchrun's default is one port for all.
    theirs = check_training(run_cli("--standalone", *job, command=TORCHRUN, timeout=TIMEOUT_S))
    assert ours == theirs


def test_the_loss_does_not_depend_on_omp_num_threads(run_cli) -> None:
    job = ("--nproc-per-node", RANKS, EXAMPLE, "--steps", 20)
    by_threads = [
        final_losses(run_cli(*job, env={"OMP_NUM_THREADS": threads}, timeout=TIMEOUT_S).stdout)
        for threads in ("1", str(os.cpu_count() or 2))
    ]
    assert by_threads[0] == by_threads[1]
    assert set(by_threads[0]) == set(range(RANKS))


FAILS_LATE = """
import sys
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

@record
def main():
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise RuntimeError("rank 1 met a bad batch")
    dist.barrier()  # rank 0 waits for rank 1, and fails because of it

main()
"""


def test_torchs_own_record_is_read(run_cli, tmp_path: Path) -> None:
    script = tmp_path / "fails_late.py"
    script.write_text(FAILS_LATE)
    done = run_cli("--nproc-per-node", RANKS, "--log-dir", tmp_path / "logs", script, timeout=120)
    assert done.returncode == 1
    root_cause = done.stderr.decode().partition("Root Cause")[2]
    assert re.search(r"rank\s*: 1 \(local_rank: 1\)", root_cause)
    assert "RuntimeError: rank 1 met a bad batch" in root_cause
