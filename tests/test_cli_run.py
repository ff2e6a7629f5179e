"""`python -m asupervise` as a process: what workers get, what comes out, how it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import clean_environment

ROOT = Path(__file__).resolve().parent.parent
CLI = (sys.executable, "-m", "asupervise")

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]
Write = Callable[..., Path]


# One write a line: ranks that share a pipe do not tear each other's lines then, as `print` does.
PREAMBLE = """
import json, os, signal, sys
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
"""


@pytest.fixture
def script(tmp_path: Path) -> Write:
    """Writes a Python program; returns its path."""

    def write(*lines: str, name: str = "worker.py") -> Path:
        path = tmp_path / name
        path.write_text("\n".join([PREAMBLE, *lines]) + "\n")
        return path

    return write


def said(done: subprocess.CompletedProcess[bytes]) -> str:
    return done.stderr.decode()


# --- what a worker gets -------------------------------------------------------------------------

TELL = """
ours = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_", "MASTER_", "TORCH", "OMP_")
env = {name: value for name, value in os.environ.items() if name.startswith(ours)}
say(json.dumps([env, sys.argv]))
"""


def told(done: subprocess.CompletedProcess[bytes]) -> dict[int, tuple[dict[str, str], list[str]]]:
    """Environment and arguments that each rank has printed."""
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {int(env["RANK"]): (env, argv) for env, argv in lines}


def test_each_rank_gets_its_environment(run_cli: Run, script: Write) -> None:
    done = run_cli("--nproc-per-node", 3, "--master-port", 29777, "--role", "t", script(TELL))
    ranks = told(done)
    assert sorted(ranks) == [0, 1, 2]
    for rank, (env, _) in ranks.items():
        shares = max(1, len(os.sched_getaffinity(0)) // 3)
        assert 1 <= int(env.pop("OMP_NUM_THREADS")) <= shares
        assert env.pop("TORCHELASTIC_ERROR_FILE").endswith(f"/attempt_0/{rank}/error.json")
        expected = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "ROLE_RANK": str(rank),
            "GROUP_RANK": "0",
            "ROLE_NAME": "t",
            "WORLD_SIZE": "3",
            "LOCAL_WORLD_SIZE": "3",
            "ROLE_WORLD_SIZE": "3",
            "GROUP_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29777",
            "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        }
        assert {name: env.get(name) for name in expected} == expected
    assert said(done) == ""


def test_arguments_are_the_scripts_own_with_macros_filled_in(run_cli: Run, script: Write) -> None:
    worker = script(TELL)
    done = run_cli("--nproc-per-node=2", worker, "--", "--tee", "${local_rank}", "$$x", "${y}")
    assert told(done)[1][1] == [str(worker), "--", "--tee", "1", "$x", "${y}"]


def test_launchs_argument_is_added_without_use_env(run_cli: Run, script: Write) -> None:
    worker = script(TELL)
    done = run_cli("--nproc-per-node=2", "--no-use-env", worker, "x")
    assert told(done)[1][1] == [str(worker), "--local-rank=1", "x"]
    done = run_cli("--use-env", worker, "x")
    assert told(done)[0][1] == [str(worker), "x"]


def test_a_module_is_run_as_python_runs_it(run_cli: Run, script: Write) -> None:
    worker = script("print(__name__, __spec__.name)", name="the_module.py")
    done = run_cli("-m", "the_module", env={"PYTHONPATH": f"{worker.parent}:{ROOT}"})
    assert done.stdout == b"__main__ the_module\n"


def test_run_path_records_what_the_script_raises(run_cli: Run, script: Write) -> None:
    worker = script("print(__name__, sys.argv[1:])", "raise ValueError('no such batch')")
    done = run_cli("--run-path", worker, "a")
    assert done.stdout == b"__main__ ['a']\n"
    assert done.returncode == 1
    assert "ValueError: no such batch" in said(done)
    assert "No traceback was recorded" not in said(done)


def test_standard_input_goes_to_one_rank(run_cli: Run, script: Write) -> None:
    worker = script("say(os.environ['RANK'], sys.stdin.read())")
    for flags, expected in (
        ([], [b"0 typed", b"1 "]),
        (["--stdin", "1"], [b"0 ", b"1 typed"]),
        (["--stdin", "none"], [b"0 ", b"1 "]),
    ):
        done = run_cli("--nproc-per-node", 2, *flags, worker, input=b"typed")
        assert sorted(done.stdout.splitlines()) == expected


def test_python_exec_runs_the_script(run_cli: Run, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o700)
    done = run_cli("elsewhere.py", "x", env={"PYTHON_EXEC": str(python)})
    assert done.stdout == b"-u elsewhere.py x\n"


# --- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("exit 0", 0),
        ("exit 3", 3),
        ("exit 255", 255),
        ("kill -KILL $$", 137),
        ("kill -SEGV $$", 139),
    ],
)
def test_the_exit_status_is_that_of_the_worker(run_cli: Run, program: str, status: int) -> None:
    done = run_cli("--no-python", "sh", "-c", program.replace("$$", "$$$$"))
    assert done.returncode == status
    assert bool(done.stderr) is (status != 0)


def test_the_rank_that_failed_first_decides(run_cli: Run, script: Write) -> None:
    worker = script(
        "if os.environ['RANK'] == '1': sys.exit(7)",
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))",
        "while True: signal.pause()",
    )
    done = run_cli("--nproc-per-node", 2, worker)
    assert done.returncode == 7
    assert re.search(r"rank +: 1 \(local_rank: 1\)\n +exitcode +: 7", said(done))


def test_after_a_failure_the_logs_are_kept_and_named(run_cli: Run, script: Write) -> None:
    worker = script("print('last words', file=sys.stderr)", "sys.exit(4)")
    done = run_cli("--redirects", 3, worker)
    folder = re.search(r"^logs: (.+)$", said(done), re.MULTILINE)
    assert folder is not None
    log = Path(folder[1], "attempt_0", "0", "stderr.log")
    assert log.read_text() == "last words\n"
    assert "last words" in said(done)
    assert f"{worker} FAILED" in said(done)


def last_lines(done: subprocess.CompletedProcess[bytes]) -> dict[str, str]:
    """What stands behind ``error:``, ``logs:``, ``report:``, ``hint:``, in that order."""
    lines = said(done).rpartition("=\n")[2].splitlines()
    found = dict(line.split(": ", 1) for line in lines)
    assert [*found] == [name for name in ("error", "logs", "report", "hint") if name in found]
    return found


@pytest.mark.parametrize(
    ("flags", "program", "error", "hint"),
    [
        (["--tee", "3"], "raise ValueError('bad')", "ValueError: bad", "See what it has written: "),
        (["--redirects", "3"], "import no_such_module", "ModuleNotFoundError: No module",
         f"no_such_module is not installed in {sys.executable}, which runs the workers."),
        ([], "raise ValueError('bad')", "exit code 1", "What it said went to the console."),
        (["--run-path"], "raise ValueError('bad')", "ValueError: bad", None),
        ([], "os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV", "A crash outside Python"),
        ([], "sys.exit(127)", "exit code 127", "A program was not found"),
        (["--tee", "2"], "raise OSError(98, 'Address already in use')", "OSError: [Errno 98]",
         "A port is taken"),
    ],
)  # fmt: skip
def test_the_last_lines_say_what_failed_and_what_to_do(
    run_cli: Run,
    script: Write,
    tmp_path: Path,
    flags: list[str],
    program: str,
    error: str,
    hint: str | None,
) -> None:
    worker = script("if os.environ['RANK'] == '1':", f"    {program}", "signal.pause()")
    done = run_cli("--nproc-per-node", 2, *flags, worker, env={"TMPDIR": str(tmp_path)})
    last = last_lines(done)
    assert last["error"].startswith(f"rank 1 failed: {error}")
    assert last.get("hint", "").startswith(hint or "")
    assert ("hint" in last) is (hint is not None)
    # The culprit stands before the others there, too.
    report = said(done)
    assert report.index("Root Cause") < report.index("Failures:\n")


def test_the_hint_has_a_command_that_shows_the_logs(
    run_cli: Run, script: Write, tmp_path: Path
) -> None:
    folder = tmp_path / "my logs"
    worker = script("print('said before', flush=True)", "raise ValueError('bad')")
    last = last_lines(run_cli("--redirects", 3, "--log-dir", folder, worker))
    words = shlex.split(last["hint"].partition(": ")[2])
    assert words == ["python", "-m", "asupervise.view", "logs", last["logs"], "--rank", "0"]


def test_of_a_hang_the_hint_names_the_file_of_all_frames(
    run_cli: Run, script: Write, tmp_path: Path
) -> None:
    worker = script("import time; from asupervise import record", "record(time.sleep)(1000)")
    last = last_lines(run_cli("--hang-timeout", 0.5, worker, env={"TMPDIR": str(tmp_path)}))
    assert last["error"].startswith("rank 0 failed: hang: ")
    path = Path(last["hint"].partition("All its frames: ")[2])
    assert path == Path(last["logs"], "attempt_0/0/stacks.txt")
    assert "worker.py" in path.read_text()


def test_success_says_nothing_and_leaves_nothing(run_cli: Run, tmp_path: Path) -> None:
    done = run_cli("--no-python", "true", env={"TMPDIR": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not list(tmp_path.iterdir())


def test_teed_lines_have_the_prefix_that_was_asked_for(run_cli: Run) -> None:
    env = {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "<${role_name} ${rank}> "}
    words = ["--nproc-per-node", 2, "--role", "t", "--tee", 3, "--no-python", "echo", "hello"]
    done = run_cli(*words, env=env)
    assert sorted(done.stdout.splitlines()) == [b"<t 0> hello", b"<t 1> hello"]
    done = run_cli(*words)
    assert sorted(done.stdout.splitlines()) == [b"[t0]:hello", b"[t1]:hello"]


def test_a_launcher_around_us_gets_the_workers_own_error(
    run_cli: Run, script: Write, tmp_path: Path
) -> None:
    worker = script("raise ValueError('no such batch')")
    outer = tmp_path / "outer" / "error.json"
    outer.parent.mkdir()
    run_cli("--run-path", worker, env={"TORCHELASTIC_ERROR_FILE": str(outer)})
    assert json.loads(outer.read_text())["message"]["message"] == "ValueError: no such batch"


@pytest.mark.parametrize("words", ["--help", "--version", "--dry-run --no-python true"])
def test_a_reader_that_goes_away_is_no_error(words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        argv = [*CLI, *words.split()]
        # Unbuffered, nothing would be left for the interpreter to write at its end.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run(
            argv, env=env, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_workers_have_standard_streams_even_where_we_have_none(tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    # A child writes the answer: the descriptors of the shell itself stay as they are.
    program = f"(ls -l /proc/$$$$/fd/) > {answer}"
    command = shlex.join([*CLI, "--no-python", "sh", "-c", program])
    done = subprocess.run(["sh", "-c", f"exec {command} <&- >&- 2>&-"], cwd=ROOT, check=False)
    assert done.returncode == 0
    streams = re.findall(r" ([012]) -> (\S+)", answer.read_text())
    assert streams == [("0", "/dev/null"), ("1", "/dev/null"), ("2", "/dev/null")]


# --- what is only planned -----------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_starts_nothing(
    run_cli: Run, script: Write, tmp_path: Path
) -> None:
    worker = script("open(sys.argv[1], 'w')")
    words = ["--nproc-per-node", 2, "--tee", "0:3", "--stdin", 1, "--numa-binding", "node"]
    logs = tmp_path / "logs"
    done = run_cli(*words, "--log-dir", logs, "--dry-run", worker, tmp_path / "${local_rank}")
    assert (done.returncode, done.stderr) == (0, b"")
    table = done.stdout.decode()
    assert re.search(rf"^logs +{logs}/\S+ \(kept\)$", table, re.MULTILINE)
    rows = [line.split(maxsplit=1) for line in table.splitlines()]
    first, second = (rest for rank, rest in filter(lambda row: len(row) == 2, rows) if rank in "01")
    assert "attempt_0/0/stdout.log + console" in first
    assert first.endswith(f"-u {worker} {tmp_path}/0")
    assert re.search(r" ours +console +console ", second)
    assert re.search(r"^rank 1: .+ of node \d+", table, re.MULTILINE)
    assert "  LOCAL_RANK=0 | 1\n" in table
    assert "  TORCHELASTIC_ERROR_FILE=<logs>/attempt_0/<local rank>/error.json\n" in table
    assert "  MASTER_PORT=<a free port>\n" in table
    assert not logs.exists()
    assert not (tmp_path / "0").exists()


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("", "no script"),
        ("--nproc-per-node 0 MARK", "--nproc-per-node '0'"),
        ("--nproc-per-node many MARK", "--nproc-per-node 'many'"),
        ("--nnodes 0 MARK", "--nnodes '0'"),
        ("--max-restarts -1 MARK", "--max-restarts '-1'"),
        ("--signals-to-handle SIGNONE MARK", "SIGNONE"),
        ("--numa-binding all MARK", "--numa-binding 'all'"),
        ("--redirects 4 MARK", "--redirects: '4'"),
        ("--tee 0:1,x:2 MARK", "--tee: '0:1,x:2': 'x'"),
        ("--local-ranks-filter a MARK", "--local-ranks-filter 'a'"),
        ("--logs-specs none-such MARK", "--logs-specs: no logs specs named 'none-such'"),
        ("--log-dir FILE MARK", "FILE"),
        (
            "--signals-to-handle TERM --forward-signals TERM MARK",
            "--signals-to-handle and --forward-signals cannot both have SIGTERM",
        ),
        ("missing.py", "error: no such script: 'missing.py'"),
        ("--no-python ./missing", "local rank 0: no such program: './missing'"),
        ("--no-python missing-program", "local rank 0: no such program on PATH: 'missing-program'"),
        ("--no-python FILE", "local rank 0: the program is not executable: 'FILE'"),
        ("--no-python BAD", "local rank 0: cannot start 'BAD'"),
    ],
)
def test_bad_input_is_one_clear_error(
    run_cli: Run, script: Write, tmp_path: Path, words: str, names: str
) -> None:
    mark, file, bad = tmp_path / "mark", tmp_path / "file", tmp_path / "bad"
    file.write_text("")
    bad.write_text("no program")
    bad.chmod(0o700)
    replaced = {"MARK": script(f"open({str(mark)!r}, 'w')"), "FILE": file, "BAD": bad}
    done = run_cli(*(replaced.get(word, word) for word in words.split()))
    assert (done.returncode, done.stdout) == (2, b"")
    error, *hint = said(done).splitlines()
    expected = re.sub("FILE|BAD", lambda word: str(replaced[word[0]]), names)
    assert error.startswith("error: ")
    assert expected in error
    assert all(line.startswith("hint: ") for line in hint)
    assert len(hint) <= 1
    assert not mark.exists()


def test_a_log_folder_that_cannot_be_made_is_named(run_cli: Run) -> None:
    done = run_cli("--log-dir", "/proc/none", "--no-python", "true")
    assert done.returncode == 2
    assert said(done).startswith("error: ")
    assert "/proc/none" in said(done)


# --- signals ------------------------------------------------------------------------------------


@contextmanager
def running(*args: object, ignore: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """The command line as a process whose output can be read line by line."""

    def settle_signals() -> None:
        # A test run in a shell's background ignores SIGINT, and so would everything below it.
        for sig in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            signal.signal(sig, signal.SIG_IGN if sig in ignore else signal.SIG_DFL)

    command = (*CLI, *map(str, args)) if args and args[0] != sys.executable else map(str, args)
    process = subprocess.Popen(
        [*command],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=settle_signals,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            # SIGTERM twice ends what a failed test has left, and its workers.
            for _ in range(2):
                process.terminate()


def ended(process: subprocess.Popen[bytes]) -> tuple[int, list[bytes], str]:
    stdout, stderr = process.communicate(timeout=40)
    return process.returncode, sorted(stdout.splitlines()), stderr.decode()


def read_lines(process: subprocess.Popen[bytes], count: int) -> list[bytes]:
    assert process.stdout is not None
    return sorted(process.stdout.readline().strip() for _ in range(count))


HANDLES = (
    "def handle(number, frame):",
    "    say('got', number)",
    "    if STOPS: sys.exit(0)",
    "for number in (1, 2, 3, 10, 15): signal.signal(number, handle)",
    "say('ready')",
    "while True: signal.pause()",
)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"])
def test_a_signal_is_forwarded_and_becomes_the_status(script: Write, name: str) -> None:
    sig = signal.Signals[name]
    with running("--nproc-per-node", 2, script("STOPS = True", *HANDLES)) as process:
        assert read_lines(process, 2) == [b"ready"] * 2
        process.send_signal(sig)
        status, lines, stderr = ended(process)
    assert status == 128 + sig
    assert lines == [b"got %d" % sig] * 2
    assert name in stderr
    assert "Traceback" not in stderr
    assert "FAILED" not in stderr


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_kills(script: Write, second: int) -> None:
    with running("--nproc-per-node", 2, script("STOPS = False", *HANDLES)) as process:
        assert read_lines(process, 2) == [b"ready"] * 2
        process.send_signal(signal.SIGINT)
        assert read_lines(process, 2) == [b"got 2"] * 2
        process.send_signal(second)
        status, lines, stderr = ended(process)
    assert (status, lines) == (130, [])
    assert "Traceback" not in stderr


def test_workers_that_do_not_end_in_time_are_killed(script: Write) -> None:
    with running("--shutdown-timeout", 0.2, script("STOPS = False", *HANDLES)) as process:
        read_lines(process, 1)
        process.send_signal(signal.SIGTERM)
        status, lines, _ = ended(process)
    assert (status, lines) == (143, [b"got 15"])


def test_only_the_signals_on_the_list_are_handled(script: Write) -> None:
    worker = script("STOPS = True", *HANDLES)
    with running("--signals-to-handle", "SIGUSR1,INT", worker) as process:
        read_lines(process, 1)
        process.send_signal(signal.SIGUSR1)
        status, lines, _ = ended(process)
    assert (status, lines) == (128 + signal.SIGUSR1, [b"got 10"])


def test_a_signal_that_nohup_ignores_stays_ignored(script: Write) -> None:
    worker = script("STOPS = True", *HANDLES)
    with running(worker, ignore=(signal.SIGHUP,)) as process:
        read_lines(process, 1)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        status, lines, stderr = ended(process)
    assert (status, lines) == (143, [b"got 15"])
    assert "SIGHUP" not in stderr


def test_ctrl_c_ends_us_even_where_it_is_not_on_the_list(script: Write) -> None:
    worker = script("STOPS = True", *HANDLES)
    with running("--signals-to-handle", "SIGTERM", worker) as process:
        read_lines(process, 1)
        process.send_signal(signal.SIGINT)
        status, lines, stderr = ended(process)
    assert (status, lines) == (130, [b"got 15"])
    assert "Traceback" not in stderr


def test_a_signal_can_be_passed_on_without_ending_anything(script: Write) -> None:
    worker = script(
        # A pipe: a signal that came before signal.pause() would be waited for in vain.
        "seen, come = os.pipe()",
        "def handle(number, frame):",
        "    say('got', number)",
        "    os.write(come, b'x')",
        "signal.signal(signal.SIGUSR1, handle)",
        "say('ready')",
        "os.read(seen, 1)",
        "say('goes on')",
    )
    with running("--nproc-per-node", 2, "--forward-signals", "SIGUSR1", worker) as process:
        assert read_lines(process, 2) == [b"ready"] * 2
        process.send_signal(signal.SIGUSR1)
        status, lines, stderr = ended(process)
    assert (status, stderr) == (0, "")
    assert lines == [b"goes on"] * 2 + [b"got 10"] * 2


SIGNALLED_AT_START = """
import os, signal, sys
import asupervise.procs
from asupervise.cli import main

start = asupervise.procs.PContext._start

async def start_and_be_signalled(ctx):
    os.kill(os.getpid(), signal.SIGTERM)
    await start(ctx)

asupervise.procs.PContext._start = start_and_be_signalled
sys.exit(main(sys.argv[1:]))
"""


def test_a_signal_that_comes_while_the_workers_start_is_not_lost() -> None:
    words = ["--nproc-per-node", "4", "--no-python", "sleep", "600"]
    with running(sys.executable, "-c", SIGNALLED_AT_START, *words) as process:
        status, _, stderr = ended(process)
    assert status == 143
    assert stderr.count("SIGTERM") == 1


def test_what_failed_before_the_signal_is_reported_all_the_same(script: Write) -> None:
    worker = script(
        "if os.environ['RANK'] == '1': sys.exit(5 if sys.stdin.readline() else 0)",
        "STOPS = False",
        *HANDLES,
    )
    with running("--nproc-per-node", 2, "--stdin", 1, worker) as process:
        read_lines(process, 1)
        assert process.stdin is not None
        process.stdin.write(b"fail\n")
        process.stdin.flush()
        assert read_lines(process, 1) == [b"got 15"]
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        status, _, stderr = ended(process)
    assert status in (130, 143)
    assert re.search(r"rank +: 1 \(local_rank: 1\)", stderr)


# --- what watches over the workers --------------------------------------------------------------


def test_a_worker_that_hangs_ends_the_job(run_cli: Run) -> None:
    done = run_cli("--hang-timeout", 1, "--no-python", "sleep", 600)
    assert done.returncode == 128 + signal.SIGTERM
    assert "hang: no output and no CPU use for " in said(done)
    assert "Traceback" not in said(done)


def commands_of_children(pid: int) -> list[bytes]:
    children = Path(f"/proc/{pid}/task").glob("*/children")
    pids = " ".join(path.read_text() for path in children).split()
    return [Path(f"/proc/{child}/cmdline").read_bytes() for child in pids]


@pytest.mark.parametrize(("flags", "guardians"), [([], 1), (["--no-guardian"], 0)])
def test_the_guardian_can_be_done_without(script: Write, flags: list[str], guardians: int) -> None:
    with running(*flags, script("say('ready')", "sys.stdin.read()")) as process:
        assert read_lines(process, 1) == [b"ready"]
        commands = commands_of_children(process.pid)
        status, _, _ = ended(process)
    assert status == 0
    assert sum(b"worker.py" in command for command in commands) == 1
    assert sum(b"asupervise-guardian" in command for command in commands) == guardians


# --- plug-ins -----------------------------------------------------------------------------------

PLUG_IN = """
from asupervise.logs import DefaultLogsSpecs

class Mine(DefaultLogsSpecs):
    def reify(self, envs):
        print("reified for", sorted(envs), flush=True)
        return super().reify(envs)
"""


@pytest.mark.parametrize("group", ["asupervise.logs_specs", "torchrun.logs_specs"])
def test_logs_specs_are_found_by_their_entry_point(
    run_cli: Run, tmp_path: Path, group: str
) -> None:
    (tmp_path / "the_plug_in.py").write_text(PLUG_IN)
    info = tmp_path / "the_plug_in-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: the-plug-in\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nmine = the_plug_in:Mine\n")
    env: dict[str, Any] = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    words = ["--nproc-per-node", 2, "--logs-specs", "mine", "--no-python", "true"]
    done = run_cli(*words, env=env)
    assert done.stdout == b"reified for [0, 1]\n"
    assert done.returncode == 0


# --- what is loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "has_it"),
    [((), False), (("--tee", "3"), True), (("--event-log-handler", "console"), True)],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_ssl_is_loaded_where_somebody_may_want_it(words: tuple[str, ...], has_it: bool) -> None:
    """anyio does, and handlers may; asyncio alone takes a fifteenth of a short run for it."""
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('ssl', '_ssl' in sys.modules, file=sys.stderr))\n"
        "from asupervise.__main__ import main\n"
        "sys.exit(main())\n"
    )
    argv = [sys.executable, "-c", program, *words, "--no-python", "true"]
    done = subprocess.run(argv, env=clean_environment(), capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == f"ssl {has_it}"


def test_who_calls_the_command_line_keeps_asyncios_tls() -> None:
    program = (
        "from asupervise.cli import main\n"
        "main(['--no-python', 'true'])\n"
        "import asyncio.sslproto\n"
        "print(asyncio.sslproto.ssl is not None)\n"
    )
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, env=clean_environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_half_a_job_of_several_nodes_is_warned_of(run_cli: Run) -> None:
    done = run_cli("--dry-run", "--no-python", "true", env={"NNODES": "2"})
    assert b"warning: NNODES=2, but NODE_RANK is not set" in done.stderr
    assert run_cli("--dry-run", "--no-python", "true", env={"NNODES": "1"}).stderr == b""
