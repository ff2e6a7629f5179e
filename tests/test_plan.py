"""`spec.py` and `plan.py`: what is refused, and what a worker will get. Nothing is started."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise import (
    BindingError,
    DefaultLogsSpecs,
    GroupPlan,
    LogsDest,
    LogsSpecs,
    MemoryPolicy,
    NotSupportedError,
    RankMapError,
    Std,
    plan_processes,
    start_processes,
)
from asupervise.binding import BindingTools, RankBinding
from asupervise.files import make_folders, read_tail
from asupervise.plan import TOKEN_VARIABLE, plan_group
from asupervise.spec import GroupSpec, check_rank_maps, check_timeout, checked_signal

PROGRAM = "/bin/true"


def plan(parent_env: Mapping[str, str] | None = None, **given: Any) -> GroupPlan:
    """A plan for two workers."""
    fields: dict[str, Any] = {
        "name": "job",
        "entrypoint": PROGRAM,
        "args": {0: (), 1: ()},
        "envs": {0: {}, 1: {}},
        "logs_specs": DefaultLogsSpecs("/logs"),
    }
    return plan_group(GroupSpec(**fields | given), parent_env or {})


# --- what is refused ----------------------------------------------------------------------------

GOOD: dict[str, Any] = {"name": "t", "entrypoint": PROGRAM, "args": {0: ()}, "envs": {0: {}}}

BAD_INPUT = {
    "no worker": ({"args": {}, "envs": {}}, RankMapError, "args: no worker at all"),
    "no environments": ({"envs": {}}, RankMapError, r"envs: expected .*0\.\.0.*missing \[0\]"),
    "gap": ({"args": {0: (), 2: ()}, "envs": {0: {}, 2: {}}}, RankMapError, r"missing \[1\]"),
    "from one": ({"args": {1: ()}, "envs": {1: {}}}, RankMapError, r"not expected \[1\]"),
    "negative": ({"args": {-1: ()}, "envs": {-1: {}}}, RankMapError, r"not expected \[-1\]"),
    "not numbers": ({"args": {"a": ()}, "envs": {"a": {}}}, RankMapError, r"not expected \['a'\]"),
    "other ranks": ({"envs": {0: {}, 1: {}}}, RankMapError, r"envs: .*not expected \[1\]"),
    "prefix": ({"log_line_prefixes": {1: "x"}}, RankMapError, r"log_line_prefixes: .*\[1\]"),
    "string for arguments": ({"args": {0: "--lr"}}, ValueError, "args: local rank 0: '--lr'"),
    "number for arguments": ({"args": {0: 7}}, ValueError, "args: local rank 0: 7"),
    "no map": ({"envs": {0: None}}, ValueError, "envs: local rank 0: None: expected a map"),
    "number in environment": ({"envs": {0: {"N": 1}}}, TypeError, "envs: local rank 0: 'N': 1"),
    "odd name": ({"envs": {0: {"A=B": "1"}}}, ValueError, "envs: local rank 0: 'A=B'"),
    "empty name": ({"envs": {0: {"": "1"}}}, ValueError, "envs: local rank 0: ''"),
    "zero byte": ({"envs": {0: {"A": "\0"}}}, ValueError, r"envs: local rank 0: 'A': '\\x00'"),
    "number as entrypoint": ({"entrypoint": 7}, ValueError, "entrypoint: 7"),
    "no program": ({"entrypoint": ""}, ValueError, "entrypoint: ''"),
    "empty sequence": ({"entrypoint": ()}, ValueError, r"entrypoint: \(\)"),
    "not strings": ({"entrypoint": ("a", 1)}, ValueError, r"entrypoint: \('a', 1\)"),
    "start method": ({"start_method": "thread"}, ValueError, "start_method: 'thread'"),
    "stdin": ({"stdin": 1}, ValueError, r"stdin: no local rank 1: expected 0\.\.0 or None"),
    "grace": ({"shutdown_timeout": -1}, ValueError, "shutdown_timeout: -1"),
    "no grace": ({"shutdown_timeout": float("nan")}, ValueError, "shutdown_timeout: nan"),
    "filter": ({"duplicate_stdout_filters": "x"}, ValueError, "duplicate_stdout_filters: 'x'"),
    "other filter": ({"duplicate_stderr_filters": "x"}, ValueError, "duplicate_stderr_filters"),
}


@pytest.mark.parametrize(("given", "error", "says"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_refused_at_the_call(
    given: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        start_processes(**GOOD | given)


def test_errors_have_torchs_types() -> None:
    assert issubclass(RankMapError, RuntimeError)
    assert issubclass(NotSupportedError, ValueError)


@given(
    st.dictionaries(st.integers(-3, 6), st.just(())),
    st.dictionaries(st.integers(-3, 6), st.just(())),
)
def test_only_whole_and_equal_rank_maps_pass(
    args: dict[int, tuple[()]], envs: dict[int, tuple[()]]
) -> None:
    if args and set(args) == set(envs) == set(range(len(args))):
        check_rank_maps(args, envs, None)
    else:
        with pytest.raises(RankMapError, match=r"^(args|envs): "):
            check_rank_maps(args, envs, None)


@pytest.mark.parametrize("sig", [0, -1, 65, 4711, "TERM", None])
def test_an_unknown_signal_is_refused(sig: Any) -> None:
    with pytest.raises(ValueError, match=r"is not a signal of this system"):
        checked_signal(sig)


def test_a_known_signal_and_any_timeout_from_zero_pass() -> None:
    assert checked_signal(signal.SIGTERM) == 15
    for timeout_s in (0, 0.5, 10**6, float("inf")):
        check_timeout("timeout", timeout_s)


# --- refused once it is planned -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "error", "says"),
    [
        ("no-such-program", FileNotFoundError, "local rank 0: no such program on PATH"),
        ("/no/such/program", FileNotFoundError, "local rank 0: no such program"),
        ("/", FileNotFoundError, "local rank 0: no such program"),
        (__file__, PermissionError, "local rank 0: the program is not executable"),
    ],
)
def test_a_program_that_cannot_be_started_is_named(
    program: str, error: type[OSError], says: str, tmp_path: Path
) -> None:
    if program == __file__:
        program = str(tmp_path / "plain")
        Path(program).write_text("")
    with pytest.raises(error, match=says) as caught:
        plan_processes(**GOOD | {"entrypoint": program})
    assert caught.value.filename == program


def test_the_rank_whose_path_lacks_the_program_is_named() -> None:
    envs = {0: {}, 1: {"PATH": "/nowhere"}}
    with pytest.raises(FileNotFoundError, match="local rank 1: no such program on PATH"):
        plan_processes("t", "sh", {0: (), 1: ()}, envs)


def test_a_program_is_looked_for_from_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mine").symlink_to("/bin/true")
    plan_processes("t", "bin/mine", {0: ()}, {0: {}}, cwd=str(tmp_path))
    plan_processes("t", "mine", {0: ()}, {0: {"PATH": "bin"}}, cwd=str(tmp_path))
    plan_processes("t", "mine", {0: ()}, {0: {"PATH": ":/x"}}, cwd=str(tmp_path / "bin"))
    with pytest.raises(FileNotFoundError):
        plan_processes("t", "mine", {0: ()}, {0: {"PATH": "bin"}})


def test_a_working_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="cwd: no such folder"):
        plan_processes(**GOOD, cwd=str(tmp_path / "no"))


def test_an_argument_with_a_zero_byte_is_refused() -> None:
    with pytest.raises(ValueError, match=r"args: local rank 0: 'a\\x00b'"):
        plan_processes(**GOOD | {"args": {0: ("a\0b",)}})


class WrongRanks(LogsSpecs):
    """Written for another number of workers."""

    def reify(self, envs: Mapping[int, Mapping[str, str]]) -> LogsDest:
        return LogsDest(stdouts={0: ""}, stderrs={0: "", 1: "", 2: ""})

    @property
    def root_log_dir(self) -> str:
        return ""


def test_logs_specs_for_other_ranks_are_refused() -> None:
    with pytest.raises(RankMapError, match=r"logs_specs: stdouts: .*missing \[1\]"):
        plan(logs_specs=WrongRanks())


# --- what a worker gets ---------------------------------------------------------------------------


def test_arguments_are_cast_to_strings() -> None:
    workers = plan(args={0: ("--lr", 0.1, Path("/x")), 1: [None, 7]}).workers
    assert workers[0].argv == (PROGRAM, "--lr", "0.1", "/x")
    assert workers[1].argv == (PROGRAM, "None", "7")


def test_a_sequence_is_a_program_with_leading_arguments() -> None:
    worker = plan(entrypoint=[sys.executable, "-m"], args={0: ("mod",), 1: ()}).workers[0]
    assert worker.argv == (sys.executable, "-m", "mod")
    assert worker.program == sys.executable


def test_the_callers_maps_are_left_alone() -> None:
    envs: dict[int, dict[str, str]] = {0: {"A": "1"}, 1: {}}
    args = {0: ("x",), 1: ()}
    plan(envs=envs, args=args, token="t")
    assert envs == {0: {"A": "1"}, 1: {}}
    assert args == {0: ("x",), 1: ()}


def test_the_error_file_is_the_ranks_own() -> None:
    for worker in plan().workers:
        assert worker.error_file is not None
        assert worker.error_file.endswith(f"/attempt_0/{worker.local_rank}/error.json")
        assert worker.env["TORCHELASTIC_ERROR_FILE"] == worker.error_file


def test_without_files_an_outer_supervisors_error_file_is_not_passed_on() -> None:
    worker = plan(logs_specs=DefaultLogsSpecs(os.devnull)).workers[0]
    assert worker.error_file is None
    assert worker.env["TORCHELASTIC_ERROR_FILE"] == ""


def test_streams_and_tees() -> None:
    logs = DefaultLogsSpecs("/logs", redirects={0: Std.ERR}, tee={1: Std.OUT})
    first, second = plan(logs_specs=logs).workers
    assert (first.stdout, first.tee_stdout, first.tee_stderr) == (None, False, False)
    assert first.stderr is not None
    assert first.stderr.endswith("/0/stderr.log")
    assert (second.stderr, second.tee_stdout, second.tee_stderr) == (None, True, False)
    assert second.stdout is not None
    assert second.stdout.endswith("/1/stdout.log")


def test_ranks_that_are_filtered_out_are_silent_but_written() -> None:
    logs = DefaultLogsSpecs("/logs", tee={1: Std.ALL}, local_ranks_filter=set())
    first, second = plan(logs_specs=logs).workers
    assert (first.stdout, first.stderr) == (os.devnull, os.devnull)
    assert second.stdout is not None
    assert second.stdout.endswith("/1/stdout.log")
    assert not second.tee_stdout


def test_prefixes() -> None:
    assert [w.prefix for w in plan(log_line_prefixes={1: "> "}).workers] == ["[job0]:", "> "]


def test_one_rank_reads_standard_input() -> None:
    assert [w.stdin for w in plan().workers] == [False, False]
    assert [w.stdin for w in plan(stdin=1).workers] == [False, True]


def test_an_outer_token_stays_in_front_of_ours() -> None:
    parent = {TOKEN_VARIABLE: "outer"}
    assert plan(parent, token="inner").workers[0].env[TOKEN_VARIABLE] == "outer:inner"
    assert plan(token="inner").workers[0].env[TOKEN_VARIABLE] == "inner"
    assert plan(parent, token="inner").token == "inner"


def test_each_call_has_a_token_of_its_own() -> None:
    tokens = {plan_processes(**GOOD).token for _ in range(3)}
    assert len(tokens) == 3
    assert "" not in tokens


def test_a_binding_is_a_rewrite_of_argv() -> None:
    share = RankBinding(0, frozenset({0}), MemoryPolicy.NONE, frozenset(), None, "a test's")
    tools = BindingTools(numactl=None, taskset="/t")
    bound = plan(bindings=(share, None), tools=tools, warnings=("w",))
    first, second = bound.workers
    assert first.argv[0] == "/t"
    assert first.argv[-1] == PROGRAM
    assert (first.program, first.binding) == (PROGRAM, share)
    assert (second.argv, second.binding) == ((PROGRAM,), None)
    assert bound.warnings == ("w",)
    with pytest.raises(BindingError):
        plan(bindings=(share, None), tools=BindingTools(numactl=None, taskset=None))


def test_planning_starts_and_writes_nothing(tmp_path: Path) -> None:
    logs = DefaultLogsSpecs(str(tmp_path / "logs"), tee=Std.ALL)
    planned = plan_processes("t", PROGRAM, {0: ()}, {0: {}}, logs)
    assert planned.nprocs == 1
    assert list(tmp_path.iterdir()) == []


# --- files --------------------------------------------------------------------------------------


def test_folders_are_the_users_alone(tmp_path: Path) -> None:
    logs = DefaultLogsSpecs(str(tmp_path / "a" / "b"), tee=Std.ALL)
    planned = plan(logs_specs=logs)
    make_folders(planned)
    made = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert len(made) == 6  # a, b, run, attempt, two ranks
    assert {path.stat().st_mode & 0o777 for path in made} == {0o700}
    make_folders(planned)  # the folders of a restart are there already


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    logs = DefaultLogsSpecs(str(tmp_path))
    planned = plan(logs_specs=logs)
    run_dir = Path(planned.logs.run_dir)
    run_dir.write_text("")
    with pytest.raises(NotADirectoryError) as caught:
        make_folders(planned)
    assert caught.value.filename == str(run_dir)


def test_the_tail_of_a_file_is_its_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"first\nsecond\n\xff third\n")
    assert read_tail(str(path), 1000) == "first\nsecond\n\\xff third\n"
    assert read_tail(str(path), 12) == "\\xff third\n"
    assert read_tail(str(tmp_path / "none"), 12) == ""
    os.mkfifo(tmp_path / "pipe")
    assert read_tail(str(tmp_path / "pipe"), 12) == ""
