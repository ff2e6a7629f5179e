"""Which pids are new: with the kernel's counters as they are, and as they are seldom."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from asupervise import newcomers, procfs
from asupervise.newcomers import Newcomers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "100"])
    yield process
    process.kill()
    process.wait()


class Kernel:
    """The counters, set by hand: nobody can wait until a real one has come round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.newest, self.forks, self.now_s = 1000, 50_000, 0.0
        self.in_use = [1, 2, 900, 1000]
        monkeypatch.setattr(procfs, "newest_pid", lambda: self.newest)
        monkeypatch.setattr(procfs, "total_forks", lambda: self.forks)
        monkeypatch.setattr(procfs, "pid_limit", lambda: 32_768)
        monkeypatch.setattr(procfs, "all_pids", lambda: list(self.in_use))
        monkeypatch.setattr(newcomers, "time", SimpleNamespace(monotonic=lambda: self.now_s))

    def fork(self, *pids: int, skipped: int = 0) -> None:
        """Somebody starts these, after others that have ended since."""
        self.in_use += pids
        self.newest = pids[-1]
        self.forks += len(pids) + skipped


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


def test_a_process_that_was_started_since_is_there_and_no_older_one(
    request: pytest.FixtureRequest,
) -> None:
    since = Newcomers()
    child = request.getfixturevalue("child")
    pids = since.pids()
    assert pids is not None
    assert child.pid in pids
    assert os.getpid() not in pids
    assert Newcomers().pids() is not None
    assert child.pid not in (Newcomers().pids() or [])


def test_real_counters_are_read() -> None:
    before, limit = procfs.total_forks(), procfs.pid_limit()
    subprocess.run(["true"], check=True)
    after = procfs.total_forks()
    assert before is not None
    assert after is not None
    assert before < after
    assert limit > 300
    assert 0 < (procfs.newest_pid() or 0) <= limit


def test_it_can_be_told_long_afterwards(kernel: Kernel) -> None:
    since = Newcomers()
    kernel.now_s = 0.05
    since.note_forks()
    kernel.now_s = 3600.0
    kernel.fork(2000, 2001, skipped=900)
    assert since.pids() == [2000, 2001]


def test_without_the_forks_it_is_known_for_moments_only(kernel: Kernel) -> None:
    since = Newcomers()
    kernel.fork(2000)
    kernel.now_s = 0.1
    assert since.pids() == [2000]
    kernel.now_s = 1.0
    assert since.pids() is None


def test_forks_that_are_noted_too_late_count_for_nothing(kernel: Kernel) -> None:
    since = Newcomers()
    kernel.now_s = 1.0  # the event loop was held up
    since.note_forks()
    assert since.pids() is None


def test_the_counter_may_begin_anew_once(kernel: Kernel) -> None:
    kernel.newest = 32_700
    kernel.in_use = [1, 2, 20_000]
    since = Newcomers()
    since.note_forks()
    kernel.now_s = 60.0
    kernel.fork(32_750, 400, skipped=150)
    assert since.pids() == [1, 2, 32_750, 400]


def test_when_it_may_have_come_round_nothing_is_known(kernel: Kernel) -> None:
    since = Newcomers()
    since.note_forks()
    kernel.now_s = 60.0
    kernel.forks += 32_768
    kernel.newest = 1005
    assert since.pids() is None


def test_without_proc_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "_read", lambda path: None)
    since = Newcomers()
    since.note_forks()
    assert since.pids() is None
    assert procfs.total_forks() is None
    assert procfs.pid_limit() == 32_768


def test_a_small_interval_is_not_listed(kernel: Kernel) -> None:
    """Pids are asked for one by one then: what is in use is what the system says."""
    kernel.newest = own = os.getpid() - 1
    since = Newcomers()
    kernel.newest = own + 1
    kernel.in_use = []
    assert since.pids() == [os.getpid()]


def test_our_own_children_are_listed(child: subprocess.Popen[bytes]) -> None:
    before = procfs.own_children()
    if before is None:
        pytest.skip("this kernel does not list children")
    assert child.pid in before
    grandchild = subprocess.Popen(["sh", "-c", "sleep 100 & echo $!; wait"], stdout=subprocess.PIPE)
    try:
        assert grandchild.stdout is not None
        pid = int(grandchild.stdout.readline())
        listed = procfs.own_children()
        assert listed is not None
        assert grandchild.pid in listed
        assert pid not in listed
        # Who has ended stays listed until it is reaped.
        os.kill(pid, signal.SIGKILL)
        grandchild.kill()
        os.waitid(os.P_PID, grandchild.pid, os.WEXITED | os.WNOWAIT)
        assert grandchild.pid in (procfs.own_children() or [])
    finally:
        grandchild.communicate()


def test_a_kernel_that_does_not_list_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "_read", lambda path: None)
    assert procfs.own_children() is None
