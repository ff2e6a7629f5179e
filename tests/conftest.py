"""What every test gets: a check that it left nothing behind, and a way to run the command line."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.browser import browser, open_page, page, pictures  # noqa: F401 (fixtures)
from tests.small_cgroup import small_cgroup  # noqa: F401 (a fixture)
from tests.workers import Channel, uvloop

# A machine with much else to do is slow, and no test is about that.
settings.register_profile("asupervise", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("asupervise")

ROOT = Path(__file__).resolve().parent.parent
PROC = Path("/proc")

# Whatever we start inherits this, so that it is known as ours wherever it ends up: in a session
# of its own, or orphaned and adopted by another process.
TOKEN_NAME = "ASUPERVISE_TESTS_TOKEN"
TOKEN = secrets.token_hex(8)
os.environ[TOKEN_NAME] = TOKEN

# A process that has been killed needs a moment until it is gone.
GRACE_S = 5.0

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]
RUNS = pytest.StashKey[list["subprocess.CompletedProcess[bytes]"]]()


# --- nothing is left behind ---------------------------------------------------------------------


def open_files() -> dict[int, str]:
    """Our descriptors and what each is open on."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue  # the one that listed the directory
    return found


def new_files(before: dict[int, str]) -> dict[int, str]:
    return {fd: name for fd, name in open_files().items() if before.get(fd) != name}


def all_pids() -> set[int]:
    return {int(name) for name in os.listdir(PROC) if name.isdigit()}


def carries_token(pid: int) -> bool:
    try:
        environment = (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return False
    return f"{TOKEN_NAME}={TOKEN}".encode() in environment.split(b"\0")


def own_children() -> set[int]:
    """Our direct children, those included that have ended and that nobody has reaped."""
    found = set()
    for thread in os.listdir(PROC / "self" / "task"):
        try:
            children = (PROC / "self" / "task" / thread / "children").read_text()
        except FileNotFoundError:
            continue  # the thread has ended since; its children are now those of another
        found |= {int(pid) for pid in children.split()}
    return found


def left_processes(before: set[int]) -> set[int]:
    """Processes that are there since `before` and come from us, orphans included."""
    new = all_pids() - before
    return {pid for pid in new if carries_token(pid)} | (own_children() - before)


def wait_gone(pids: Iterable[int], timeout: float = GRACE_S) -> set[int]:
    """Wait until the processes have ended; returns those that have not in time."""
    deadline = time.monotonic() + timeout
    return {pid for pid in pids if not _gone_by(pid, deadline)}


def _gone_by(pid: int, deadline: float) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        left_ms = max(0.0, deadline - time.monotonic()) * 1000
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        return bool(poller.poll(left_ms))
    finally:
        os.close(pidfd)


def describe(pid: int) -> str:
    try:
        command = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        command = "(gone)"
    return f"{pid}: {command.strip() or '(zombie)'}"


@pytest.fixture(autouse=True, scope="session")
def _temporary_folder_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What failed runs keep goes with the rest that tests have left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        yield


@pytest.fixture(autouse=True)
def _leaves_no_process_and_no_file() -> Iterator[None]:
    files, pids = open_files(), all_pids()
    yield
    complaints = []
    # Gone within a grace time is good enough for what we did not start ourselves; a child of ours
    # that is not reaped stays, as a zombie, and is found below.
    wait_gone(left_processes(pids))
    if left := left_processes(pids):
        complaints += [f"process left behind: {describe(pid)}" for pid in sorted(left)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    if new_files(files):
        gc.collect()
        complaints += [f"file left open: {fd} on {to}" for fd, to in new_files(files).items()]
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


@pytest.fixture(autouse=True)
def _leaves_no_task(request: pytest.FixtureRequest, _leaves_no_process_and_no_file: None) -> None:
    # Only for tests that have a loop: the others need none for this.
    if request.node.get_closest_marker("asyncio"):
        request.getfixturevalue("_loop_without_tasks")


@pytest.fixture
async def _loop_without_tasks() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    # What is being cancelled or has just been told to end needs a few turns of the loop.
    for _ in range(10):
        left = asyncio.all_tasks() - before - {asyncio.current_task()}
        if not left:
            return
        await asyncio.sleep(0)
    pytest.fail("\n".join(f"task left behind: {task!r}" for task in left), pytrace=False)


@pytest.fixture
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For who looks at what is left among the temporary files, or makes much of it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture(scope="session")
def uvloop_has_its_pipe() -> None:
    """Which it makes with its first loop, and keeps."""
    uvloop()


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[Channel]:
    """By which workers say that they are ready."""
    channel = Channel(tmp_path)
    yield channel
    channel.close()


# --- the command line ---------------------------------------------------------------------------


def clean_environment() -> dict[str, str]:
    """Ours, without what a launcher reads or sets: a test run may itself be a worker."""
    ours = ("PET_", "TORCH", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "SLURM_", "OMPI_", "PMIX_")
    exact = {
        *("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "NO_COLOR"),
        *("NODE_RANK", "NNODES", "JOB_COMPLETION_INDEX"),
    }
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ours) and name not in exact
    }


@pytest.fixture
def run_cli(request: pytest.FixtureRequest) -> Run:
    """Runs ``python -m asupervise`` with the given arguments to its end.

    Keyword arguments: ``env`` (laid over a clean environment), ``cwd``, ``input`` (bytes; nothing
    by default), ``timeout`` in seconds, ``command`` (another one than ``python -m asupervise``).
    Returns a ``CompletedProcess`` with bytes. If the test fails, all of it is shown.
    """
    runs = request.node.stash.setdefault(RUNS, [])

    def run(
        *args: object,
        env: dict[str, str] | None = None,
        cwd: Path = ROOT,
        input: bytes = b"",
        timeout: float = 50.0,
        command: tuple[str, ...] = (sys.executable, "-m", "asupervise"),
    ) -> subprocess.CompletedProcess[bytes]:
        argv = [*command, *map(str, args)]
        process = subprocess.Popen(
            argv,
            cwd=cwd,
            env=clean_environment() | (env or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        with process:
            try:
                stdout, stderr = process.communicate(input, timeout)
            except BaseException as exc:
                process.kill()
                stdout, stderr = process.communicate()
                runs.append(subprocess.CompletedProcess(argv, process.returncode, stdout, stderr))
                if isinstance(exc, subprocess.TimeoutExpired):
                    pytest.fail(f"not ended after {timeout} s: {argv}", pytrace=False)
                raise
        done = subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)
        runs.append(done)
        return done

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed:
        for run in item.stash.get(RUNS, []):
            title = f"exit status {run.returncode} of {' '.join(run.args)}"
            report.sections.append((f"{title}: stderr", run.stderr.decode(errors="replace")))
            report.sections.append((f"{title}: stdout", run.stdout.decode(errors="replace")))
    return report
