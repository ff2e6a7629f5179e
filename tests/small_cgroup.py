"""A memory cgroup of its own for a test, so small that the OOM killer comes soon."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from asupervise import memory

MIB = 1 << 20
LIMIT = 64 * MIB


def memory_cgroup_v1(own: str) -> Path:
    folder = Path(own, f"asupervise-test-{secrets.token_hex(4)}")
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text(str(LIMIT))
    return folder


def memory_cgroup_v2(own: str) -> Path:
    # A cgroup with processes may have no children with controllers (cgroups(7)): then beside it.
    for parent in (Path(own), Path(own).parent):
        control = parent / "cgroup.subtree_control"
        if control.is_file() and "memory" in control.read_text().split():
            folder = parent / f"asupervise-test-{secrets.token_hex(4)}"
            folder.mkdir()
            (folder / "memory.max").write_text(str(LIMIT))
            return folder
    raise OSError("no cgroup here hands the memory controller on to its children")


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup of 64 MiB below our own."""
    own = memory.memory_cgroup("self")
    if own is None:
        pytest.skip("this system has no memory cgroups")
    try:
        make = memory_cgroup_v1 if "/memory" in own else memory_cgroup_v2
        folder = make(own)
    except OSError as exc:
        pytest.skip(f"cannot make a memory cgroup: {exc}")
    try:
        # Swap must not save whom the limit is to kill.
        for name in ("memory.swap.max", "memory.swappiness"):
            if (folder / name).exists():
                (folder / name).write_text("0")
        yield folder
    finally:
        left = (folder / "cgroup.procs").read_text().split()
        for pid in left:
            os.kill(int(pid), signal.SIGKILL)
        folder.rmdir()
