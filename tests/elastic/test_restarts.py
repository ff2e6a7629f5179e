"""``--max-restarts`` on the command line: the whole group again, when, how often, after what."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asupervise.elastic.decide import Policy, after_failure
from asupervise.elastic.records import Culprit, Member, Round, Terms
from tests.conftest import ROOT, Run, clean_environment
from tests.workers import PYTHON

# At once, and without an end to broken starts.
AT_ONCE = ("--restart-backoff", 0, "--min-uptime", 0)
COUNT = "$TORCHELASTIC_RESTART_COUNT"

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of our own."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def start_cli() -> Iterator[Start]:
    """Starts ``python -m asupervise``, and kills it at the end if it still runs."""
    started = []

    def start(*args: object) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "asupervise", *map(str, args)],
            cwd=ROOT, env=clean_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def shell(script: str) -> tuple[str, ...]:
    """The words that run it, once a rank, beside what stands in dollars."""
    return "--no-python", "sh", "-c", script


def line_of(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().rstrip("\n")


def ended(process: subprocess.Popen[bytes], timeout: float = 10.0) -> tuple[int, str]:
    """Exit status and stderr of one that is ending."""
    _, stderr = process.communicate(timeout=timeout)
    return process.returncode, stderr.decode()


# --- the whole group, again -----------------------------------------------------------------------


def test_the_whole_group_is_started_anew(run_cli: Run, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # Rank 1 fails when rank 0 is there, which would never end by itself.
    script = (
        f'echo "$RANK: {COUNT} of $TORCHELASTIC_MAX_RESTARTS"; [ {COUNT} = 2 ] && exit 0; '
        f"[ $RANK = 0 ] && {{ echo > {fifo}; exec sleep 1000; }}; read line < {fifo}; "
        f"exit $((10 + {COUNT}))"
    )
    logs = tmp_path / "logs"
    done = run_cli("--nproc-per-node", 2, "--max-restarts", 3, *AT_ONCE, "--tee", 3,
                   "--log-dir", logs, *shell(script))  # fmt: skip
    assert done.returncode == 0
    assert sorted(done.stdout.decode().splitlines()) == [
        f"[default{rank}]:{rank}: {count} of 3" for rank in range(2) for count in range(3)
    ]
    assert done.stderr.decode().splitlines() == [
        "asupervise: rank 1 failed: restart 1 of 3, exit code 10",
        "asupervise: rank 1 failed: restart 2 of 3, exit code 11",
    ]
    (run,) = logs.iterdir()
    said = {log.relative_to(run).as_posix(): log.read_text() for log in run.glob("*/*/stdout.log")}
    assert said == {
        f"attempt_{count}/{rank}/stdout.log": f"{rank}: {count} of 3\n"
        for rank in range(2)
        for count in range(3)
    }


def test_the_last_failure_is_reported_and_is_the_exit_status(run_cli: Run, temporary: Path) -> None:
    done = run_cli("--max-restarts", 2, *AT_ONCE, *shell(f"exit $((10 + {COUNT}))"))
    assert done.returncode == 12
    report = done.stderr.decode()
    assert "exitcode  : 12" in report
    assert report.count("FAILED") == 1
    (run,) = temporary.iterdir()
    assert f"logs: {run}" in report
    attempts = sorted(attempt.name for attempt in run.iterdir() if attempt.is_dir())
    assert attempts == ["attempt_0", "attempt_1", "attempt_2"]


def test_nothing_is_left_of_what_failed_before_a_success(run_cli: Run, temporary: Path) -> None:
    done = run_cli("--max-restarts", 1, *AT_ONCE, "--tee", 3, *shell(f"exit $((1 - {COUNT}))"))
    assert done.returncode == 0
    assert not list(temporary.iterdir())


def test_without_restarts_a_failure_is_the_end(run_cli: Run) -> None:
    done = run_cli(*shell("echo once; exit 5"))
    assert (done.returncode, done.stdout) == (5, b"once\n")
    assert "asupervise:" not in done.stderr.decode()


# Everything of a rank holds its lock (flock(2) is the open file's, which children share). Rank 0
# has a grandchild in a session of its own, rank 1 is stopped; then rank 2 fails.
HOLDS = """
import fcntl, os, signal, subprocess, sys
folder, rank = sys.argv[1], os.environ["RANK"]
lock = os.open(f"{folder}/{rank}.lock", os.O_CREAT | os.O_RDWR)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    os.write(1, b"two at once\\n")
    sys.exit(99)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "2":
    sys.exit(0)
if rank == "2":
    with open(f"{folder}/ready") as ready:
        ready.readline()
    sys.exit(3)
tell = f"echo > {folder}/ready; exec sleep 1000"
if rank == "0":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    daemon = f"trap '' TERM; (kill -STOP {os.getpid()}; {tell}) & exec sleep 1000"
    subprocess.Popen(["sh", "-c", daemon], start_new_session=True, pass_fds=[lock])
signal.pause()
"""


def test_the_old_group_is_gone_before_the_new_one_starts(run_cli: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    done = run_cli("--nproc-per-node", 3, "--max-restarts", 2, *AT_ONCE, "--shutdown-timeout", 0.2,
                   "--no-python", *PYTHON, HOLDS, tmp_path)  # fmt: skip
    assert done.stdout == b""
    assert done.returncode == 0
    assert done.stderr.decode().count("rank 2 failed") == 2


# --- broken starts, and the wait ------------------------------------------------------------------


def test_three_broken_starts_in_a_row_end_the_job(run_cli: Run) -> None:
    done = run_cli("--max-restarts", 9, "--restart-backoff", 0, "--min-uptime", 30,
                   *shell("echo started; exit 6"))  # fmt: skip
    assert done.returncode == 6
    assert done.stdout == b"started\n" * 3
    said = (
        "no restart: rank 0 failed: 3 times in a row sooner than 30 s after its start, which no "
        "restart mends"
    )
    assert said in done.stderr.decode().splitlines()


def test_a_longer_run_is_no_broken_start(run_cli: Run) -> None:
    """The third lasts: it is not the third in a row. As long as a worker runs time must pass."""
    script = f"case {COUNT} in 2) sleep 1.1;; 5) exit 0;; esac; exit 6"
    done = run_cli("--max-restarts", 9, "--restart-backoff", 0, "--min-uptime", 1, *shell(script))
    assert done.returncode == 0
    assert done.stderr.decode().count("restart") == 5


def test_the_wait_is_waited_for(run_cli: Run) -> None:
    script = f"date +%s.%N; exit $((1 - {COUNT}))"
    done = run_cli("--max-restarts", 1, "--restart-backoff", 0.4, *shell(script))
    first, second = map(float, done.stdout.split())
    assert second - first >= 0.2


def failed(round: Round, *, uptime_s: float = 10.0, policy: Policy | None = None,
           max_restarts: int = 100, spread: float = 1.0) -> Round:  # fmt: skip
    """What follows when rank 3 of the round fails."""
    culprit = Culprit("n", round.number, 3, uptime_s=uptime_s)
    return after_failure(
        round, culprit, Terms(1, 1, max_restarts), policy or Policy(), lambda: spread
    )


def running(round: Round) -> Round:
    members = (Member("n", "host", "addr", 4),)
    return Round(
        round.number, "running", members=members, restarts=round.restarts, broken=round.broken
    )


def test_the_wait_grows_and_is_bounded() -> None:
    round, waits = Round(0, "running"), []
    for _ in range(8):
        after = failed(round)
        waits.append(after.delay_s)
        round = running(after)
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]


def test_the_wait_is_spread() -> None:
    assert [failed(Round(0, "running"), spread=s).delay_s for s in (0.0, 0.5, 1.0)] == [
        0.5,
        0.75,
        1,
    ]
    drawn = {
        after_failure(Round(0, "running"), Culprit("n", 0, 3, uptime_s=9), Terms(1, 1, 1),
                      Policy()).delay_s
        for _ in range(9)
    }  # fmt: skip
    assert len(drawn) > 1
    assert all(0.5 <= wait <= 1 for wait in drawn)


def test_after_a_long_run_the_wait_is_the_first_again() -> None:
    round = running(Round(7, "open", restarts=6))
    assert failed(round).delay_s == 30
    assert failed(round, uptime_s=300.0).delay_s == 1


def test_no_number_of_restarts_is_too_many_to_reckon_with() -> None:
    assert failed(running(Round(7, "open", restarts=10**6)), max_restarts=10**7).delay_s == 30


# --- signals --------------------------------------------------------------------------------------


def wait_ended(pid: int) -> None:
    """Wait until a process that is no child of ours has been reaped, or is about to be."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        select.select([pidfd], [], [], 10)
    finally:
        os.close(pidfd)


def test_a_signal_ends_the_wait_before_a_restart(start_cli: Start) -> None:
    job = start_cli("--max-restarts", 1, "--restart-backoff", 1000, *shell("echo $$$$; exit 3"))
    wait_ended(int(line_of(job)))
    started = time.monotonic()
    job.send_signal(signal.SIGTERM)
    status, said = ended(job)
    # The wait would be 15 s at the least.
    assert time.monotonic() - started < 15
    assert status == 128 + signal.SIGTERM
    assert "asupervise: SIGTERM" in said


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_job_that_is_being_restarted(start_cli: Start, sig: int) -> None:
    """At any moment, of jobs that do nothing but start; what is left the fixtures would find."""
    script = "echo $RANK; (setsid sleep 1000 &); [ $RANK = 0 ] && exit 3; exec sleep 1000"
    jobs = [
        start_cli("--nproc-per-node", 2, "--max-restarts", 10**6, *AT_ONCE, *shell(script))
        for _ in range(3)
    ]
    for lines, job in enumerate(jobs, 3):
        for _ in range(lines):
            line_of(job)
        job.send_signal(sig)
    for job in jobs:
        assert ended(job)[0] == 128 + sig


def test_a_signal_while_the_first_group_starts(start_cli: Start) -> None:
    job = start_cli("--nproc-per-node", 40, "--max-restarts", 3, *shell("echo; exec sleep 1000"))
    line_of(job)
    job.send_signal(signal.SIGTERM)
    status, said = ended(job)
    assert status == 128 + signal.SIGTERM
    assert "restart" not in said


def test_workers_that_end_well_on_a_signal_are_no_failure(start_cli: Start) -> None:
    script = "trap 'exit 0' TERM; echo; while :; do sleep 1; done"
    job = start_cli("--max-restarts", 3, *shell(script))
    line_of(job)
    job.send_signal(signal.SIGTERM)
    status, said = ended(job)
    assert status == 128 + signal.SIGTERM
    # The shell says "Terminated" of its own child.
    ours = [line for line in said.splitlines() if line != "Terminated"]
    assert ours == ["asupervise: SIGTERM: ending the workers (again: kill them)"]


# --- the port -------------------------------------------------------------------------------------

# A server that does not listen beside anybody who holds its port, as most do.
ALONE = """
import os, socket
port = int(os.environ["MASTER_PORT"])
os.write(1, f'{port} {os.environ["TORCHELASTIC_RESTART_COUNT"]}\\n'.encode())
socket.socket().bind(("", port))
"""


def test_a_server_that_cannot_have_a_held_port_gets_another(run_cli: Run, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    done = run_cli("--redirects", 3, "--log-dir", logs, "--no-python", *PYTHON, ALONE)
    assert done.returncode == 0
    assert done.stderr == b"asupervise: rank 0's port was taken\n"
    tries = [log.read_text().split() for log in sorted(logs.glob("*/attempt_*/0/stdout.log"))]
    assert [count for _, count in tries] == ["0", "0"]
    assert tries[0] != tries[1]


def test_a_port_that_stays_taken_is_a_failure(run_cli: Run, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run_cli("--master-port", port, "--no-python", *PYTHON, ALONE)
    assert done.stdout.decode().splitlines() == [f"{port} 0"] * 4
    assert done.returncode == 1
    report = done.stderr.decode()
    assert report.count("asupervise: rank 0's port was taken") == 3
    assert f"rank 0's port {port} was taken 4 times in a row" in report


def test_so_many_times_in_a_row_it_is_a_failure_as_any_other() -> None:
    terms, policy = Terms(1, 1, 1), Policy(min_uptime_s=0)
    round, states = Round(0, "running"), []
    for _ in range(8):
        after = after_failure(round, Culprit("n", 0, 0, port_taken=True), terms, policy)
        states.append((after.state, after.retries, after.restarts))
        round = Round(after.number, "running", restarts=after.restarts, retries=after.retries)
    retried = [("open", 1, 0), ("open", 2, 0), ("open", 3, 0), ("open", 0, 1)]
    assert states[:4] == retried
    assert states[4:7] == [("open", n, 1) for n in (1, 2, 3)]
    assert states[7][0] == "over"


# The first time the port is somebody's; from then on each waits until it is let go of.
BINDS = """
import os, socket
port = int(os.environ["MASTER_PORT"])
if os.environ.get("ASUPERVISE_ATTEMPT"):
    with open(os.environ["GATE"]) as gate:
        gate.readline()
    socket.create_server(("127.0.0.1", port)).close()
else:
    try:
        socket.create_server(("127.0.0.1", port))
    finally:
        os.write(1, b"tried\\n")
"""


@pytest.mark.parametrize("logs", [(), ("--tee", "3")])
def test_a_given_port_that_was_taken_is_tried_again(
    start_cli: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs: tuple[str, ...]
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    monkeypatch.setenv("GATE", str(gate))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        job = start_cli("--master-port", port, *logs, "--no-python", *PYTHON, BINDS)
        assert job.stderr is not None
        while (line := job.stderr.readline()) and b"asupervise:" not in line:
            pass
    assert line == b"asupervise: rank 0's port was taken\n"
    gate.write_text("go\n")
    assert ended(job) == (0, "")


def test_jobs_at_once_have_ports_of_their_own(start_cli: Start) -> None:
    jobs = [start_cli(*shell("echo $MASTER_PORT; exec sleep 1000")) for _ in range(3)]
    ports = [line_of(job) for job in jobs]
    assert len(set(ports)) == 3
    for job in jobs:
        job.send_signal(signal.SIGTERM)
    for job in jobs:
        ended(job)
