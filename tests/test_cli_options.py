"""From words and variables to `LaunchOptions`, and from those to a job; nothing is started."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise import cpus
from asupervise.elastic.node import preview
from asupervise.flags import FLAGS
from asupervise.job import Job, prepare
from asupervise.options import LaunchOptions, UsageError, help_text, parse_options

# `torchrun --help` of torch 2.13: name, a value (None for a switch), what we make of it.
TORCHRUN: list[tuple[str, str | None, Any]] = [
    ("--nnodes", "1:4", (1, 4)),
    ("--nproc-per-node", "4", 4),
    ("--rdzv-backend", "c10d", "c10d"),
    ("--rdzv-endpoint", "[::1]:29400", "[::1]:29400"),
    ("--rdzv-id", "job7", "job7"),
    ("--rdzv-conf", "timeout=30,read_timeout=5", (("timeout", "30"), ("read_timeout", "5"))),
    ("--standalone", None, True),
    ("--max-restarts", "3", 3),
    ("--monitor-interval", "0.5", 0.5),
    ("--start-method", "forkserver", "forkserver"),
    ("--event-log-handler", "null", ("null",)),
    ("--role", "trainer", "trainer"),
    ("--module", None, True),
    ("--no-python", None, True),
    ("--run-path", None, True),
    ("--log-dir", "logs", "logs"),
    ("--redirects", "0:1,10:3", "0:1,10:3"),
    ("--tee", "3", "3"),
    ("--local-ranks-filter", "0,2", frozenset({0, 2})),
    ("--duplicate-stdout-filters", "apple,a,,b", ("apple", "a,b")),
    ("--duplicate-stderr-filters", "pear", ("pear",)),
    ("--node-rank", "2", 2),
    ("--master-addr", "[::1]", "::1"),
    ("--master-port", "29477", 29477),
    ("--local-addr", "10.0.0.7", "10.0.0.7"),
    ("--logs-specs", "mine", "mine"),
    ("--numa-binding", "core-complex", "core-complex"),
    ("--signals-to-handle", "SIGTERM,SIGUSR1", (signal.SIGTERM, signal.SIGUSR1)),
    ("--shutdown-timeout", "5", 5.0),
    ("--virtual-local-rank", None, True),
]
OURS: list[tuple[str, str | None, Any]] = [
    ("--stdin", "none", None),
    ("--memory-binding", "none", "none"),
    ("--numa-binding-fallback", None, True),
    ("--log-line-prefix-template", "[${rank}]", "[${rank}]"),
    ("--dry-run", None, True),
    ("--use-env", None, True),
    ("--forward-signals", "usr1,SIGUSR2", (signal.SIGUSR1, signal.SIGUSR2)),
    ("--hang-timeout", "90", 90.0),
    ("--events", "run.jsonl", "run.jsonl"),
    ("--metrics-port", "9464", ("127.0.0.1", 9464)),
    ("--metrics-port", "[::1]:0", ("::1", 0)),
    ("--restart", "group", "group"),
    ("--restart-within", "90", 90.0),
    ("--min-uptime", "2.5", 2.5),
    ("--restart-backoff", "0", 0.0),
    ("--memory-sample-interval", "0", 0.0),
]
NAMES = [name for name, _, _ in TORCHRUN] + ["--help"]

every_flag = pytest.mark.parametrize(
    ("name", "text", "value"), TORCHRUN + OURS, ids=lambda given: str(given)
)


def field(name: str) -> str:
    return name[2:].replace("-", "_")


def parsed(*words: str, **environ: str) -> LaunchOptions:
    return parse_options([*words, "train.py"], environ)


def refused(*words: str, **environ: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        parse_options(words, environ)
    return caught.value


# --- flags --------------------------------------------------------------------------------------


@every_flag
def test_a_flag_is_understood_in_both_spellings(name: str, text: str | None, value: Any) -> None:
    for spelling in (name, "--" + field(name)):
        if text is None:
            options = [parsed(spelling)]
        else:
            options = [parsed(spelling, text), parsed(f"{spelling}={text}")]
        for option in options:
            assert getattr(option, field(name)) == value
            assert option.script == "train.py"


@every_flag
def test_a_flag_has_a_variable_that_yields_to_it(name: str, text: str | None, value: Any) -> None:
    variable = f"PET_{field(name).upper()}"
    assert getattr(parsed(**{variable: text or "1"}), field(name)) == value
    given = [name] if text is None else [name, text]
    other = "0" if text is None else "no such value"
    assert getattr(parsed(*given, **{variable: other}), field(name)) == value


@pytest.mark.parametrize(
    ("name", "text", "value"), [f for f in TORCHRUN if len(f[0]) > 3], ids=lambda given: str(given)
)
def test_torchruns_abbreviations_mean_what_they_mean_there(
    name: str, text: str | None, value: Any
) -> None:
    starts = [name[:end] for end in range(3, len(name))]
    clear = [start for start in starts if [n for n in NAMES if n.startswith(start)] == [name]]
    assert clear
    for start in clear:
        for spelling in (start, "--" + field(start)):
            given = [spelling] if text is None else [spelling, text]
            assert getattr(parsed(*given), field(name)) == value


def test_our_own_flags_can_be_abbreviated_where_torchruns_leave_room() -> None:
    assert parsed("--dry").dry_run
    assert parsed("--log-li", "x").log_line_prefix_template == "x"


@pytest.mark.parametrize("start", ["--rdzv", "--no", "--local", "--m"])
def test_an_abbreviation_of_several_flags_is_refused(start: str) -> None:
    error = refused(start, "x")
    assert str(error).startswith(f"{start} may stand for more than one flag: --")


def test_letters_can_stand_together() -> None:
    options = parsed("-mr", "3", "-t2")
    assert (options.module, options.redirects, options.tee) == (True, "3", "2")
    for words in (["-mr3"], ["-mr=3"], ["-m", "-r=3"], ["-mr=", "3"]):
        assert parsed(*words) == parsed("--module", "--redirects", "3")
    assert parse_options(["-mh", "--bogus"], {}).help


@pytest.mark.parametrize("word", ["a=b", "=", "", "-1", "-", "a -b", "-.5", "-7 of 8", "é\n"])
def test_a_value_may_look_like_something_else(word: str) -> None:
    assert parsed("--role", word).role == parsed(f"--role={word}").role == word


def test_the_guardian_is_a_default_that_no_variable_changes() -> None:
    assert parsed().guardian
    assert parsed(PET_NO_GUARDIAN="1", PET_GUARDIAN="0").guardian
    assert not parsed("--no-guardian").guardian
    assert not parsed("--no_guard").guardian


def test_the_later_of_two_wins() -> None:
    assert parsed("--tee", "1", "-t", "2").tee == "2"
    assert not parsed("--use-env", "--no-use-env").use_env
    assert parsed("--no-use-env", "--use_env").use_env


def test_defaults_are_those_of_torchrun() -> None:
    options = parsed()
    assert options == LaunchOptions(script="train.py")
    assert (options.nproc_per_node, options.nnodes, options.max_restarts) == (1, None, 0)
    assert (options.rdzv_backend, options.rdzv_id, options.role) == (None, "none", "default")
    assert (options.monitor_interval, options.start_method) == (0.1, "spawn")
    assert (options.shutdown_timeout, options.use_env) == (30.0, True)
    assert (options.hang_timeout, options.memory_sample_interval) == (None, 600.0)
    assert (options.forward_signals, options.guardian) == ((), True)


def test_each_field_has_a_flag() -> None:
    fields = {flag.field for flags in FLAGS.values() for flag in flags}
    assert fields | {"script", "script_args"} == set(LaunchOptions._fields)


# --- variables ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [("1", True), ("0", False), ("2", True), ("", False)])
def test_the_variable_of_a_switch_is_a_number(text: str, value: bool) -> None:
    assert parsed(PET_STANDALONE=text).standalone is value


def test_an_empty_variable_counts_as_none() -> None:
    assert parsed(PET_NPROC_PER_NODE="", PET_RDZV_ENDPOINT="") == LaunchOptions(script="train.py")


def test_a_bad_variable_is_named() -> None:
    assert str(refused("x.py", PET_MAX_RESTARTS="many")).startswith("PET_MAX_RESTARTS 'many': ")
    assert str(refused("x.py", PET_DRY_RUN="yes")) == "PET_DRY_RUN 'yes': expected 1 or 0"


def test_other_variables_yield_to_flags_and_pet() -> None:
    given = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "7"}
    assert parsed(**given).shutdown_timeout == 7
    assert parsed(**given, PET_SHUTDOWN_TIMEOUT="8").shutdown_timeout == 8
    assert parsed("--shutdown-timeout", "9", **given).shutdown_timeout == 9
    assert str(refused("x.py", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="-1")) == (
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT '-1': expected a number of seconds, 0 or more"
    )


# --- the script and what follows it -------------------------------------------------------------

SWITCH_OR_VALUE = st.lists(
    st.sampled_from([["--standalone"], ["--tee", "3"], ["--role=a b"], ["-m"], ["-r", "1"]])
).map(lambda parts: [word for part in parts for word in part])
WORD = st.text(ascii_lowercase + "-=_$ ", max_size=6)
# The last three stand for several flags, for none, and for one that lacks its value.
LIKE_OURS = st.sampled_from(["--", "--tee", "-h", "-m", "--nproc_per_node=2", "--no", "-x", "-r"])


@given(SWITCH_OR_VALUE, st.booleans(), st.lists(WORD | LIKE_OURS))
def test_what_follows_the_script_is_its_own(
    flags: list[str], dashes: bool, args: list[str]
) -> None:
    options = parse_options([*flags, *["--"] * dashes, "s.py", *args], {})
    assert (options.script, options.script_args) == ("s.py", tuple(args))


def test_after_dashes_even_a_flag_is_a_script() -> None:
    options = parse_options(["--no-python", "--", "--tee", "3"], {})
    assert (options.script, options.script_args, options.tee) == ("--tee", ("3",), "0")


def test_a_single_dash_is_a_script() -> None:
    assert parse_options(["-", "x"], {}).script == "-"


@given(st.lists(WORD | LIKE_OURS | st.sampled_from(["--no-guardian", "--role", "--standalone=1"])))
def test_any_words_are_either_understood_or_refused(words: list[str]) -> None:
    try:
        options = parse_options(words, {})
    except UsageError:
        return
    assert options.help or options.version or options.script in words
    assert words[len(words) - len(options.script_args) :] == [*options.script_args]


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "no script is given"),
        ("--tee 3", "no script is given"),
        ("--bogus x.py", "there is no flag --bogus"),
        ("-x x.py", "there is no flag -x"),
        ("--standalone=yes x.py", "--standalone is a switch and takes no value, got 'yes'"),
        ("--role", "--role needs a value"),
        ("--role --tee 3 x.py", "--role needs a value"),
        ("--nproc-per-node 0 x.py", "--nproc-per-node '0': expected a number of at least 1"),
        ("--nproc-per-node -2 x.py", "--nproc-per-node '-2': expected a number of at least 1"),
        ("--nproc-per-node tpu x.py", "or one of auto, cpu, gpu, xpu"),
        ("--nnodes 0 x.py", "--nnodes '0': expected a number of at least 1"),
        ("--nnodes 2:1 x.py", "MIN not above MAX"),
        ("--nnodes 1:1:1 x.py", "--nnodes '1:1:1': expected"),
        ("--node-rank -1 x.py", "--node-rank '-1': expected a number of at least 0"),
        ("--max-restarts -1 x.py", "--max-restarts '-1': expected a number of at least 0"),
        ("--min-uptime soon x.py", "--min-uptime 'soon': expected a number of seconds"),
        ("--event-log-handler a,,b x.py", "--event-log-handler 'a,,b': expected names with"),
        ("--event-log-handler prometheus x.py", "--event-log-handler prometheus needs --metrics-"),
        ("--metrics-port 70000 x.py", "--metrics-port '70000': expected a port from 0"),
        ("--metrics-port host x.py", "--metrics-port 'host': expected a port from 0"),
        ("--metrics-port -1 x.py", "--metrics-port '-1': expected a port from 0"),
        ("--rdzv-endpoint a:1,b:2 x.py", "--rdzv-endpoint 'a:1,b:2': the static backend has one"),
        ("--rdzv-endpoint host x.py", "--rdzv-endpoint 'host': the static backend needs a port"),
        ("--rdzv-endpoint host:x x.py", "--rdzv-endpoint 'host:x': expected HOST:PORT"),
        ("--rdzv-endpoint host:65536 x.py", "expected HOST:PORT"),
        ("--rdzv-conf a x.py", "--rdzv-conf 'a': expected KEY=VALUE pairs"),
        ("--rdzv-id a/b x.py", "--rdzv-id 'a/b': expected a name without a slash"),
        ("--master-port 65536 x.py", "--master-port '65536': expected a port"),
        ("--master-addr a/b x.py", "--master-addr 'a/b': expected a host name"),
        ("--monitor-interval often x.py", "--monitor-interval 'often': expected a number"),
        ("--shutdown-timeout -1 x.py", "--shutdown-timeout '-1': expected a number of seconds"),
        ("--shutdown-timeout nan x.py", "--shutdown-timeout 'nan': expected"),
        ("--shutdown-timeout inf x.py", "--shutdown-timeout 'inf': expected"),
        ("--start-method vfork x.py", "--start-method 'vfork': expected one of spawn, fork"),
        ("--signals-to-handle SIGFOO x.py", "there is no signal 'SIGFOO'"),
        ("--signals-to-handle SIGTERM, x.py", "there is no signal ''"),
        ("--signals-to-handle SIGKILL x.py", "SIGKILL cannot be handled"),
        ("--local-ranks-filter 0,x x.py", "--local-ranks-filter '0,x': expected local ranks"),
        ("--local-ranks-filter -1 x.py", "--local-ranks-filter '-1': expected local ranks"),
        ("--numa-binding core x.py", "--numa-binding 'core': expected one of node, socket"),
        (
            "--memory-binding far --numa-binding node x.py",
            "--memory-binding 'far': expected one of",
        ),
        ("--memory-binding local x.py", "--memory-binding local needs --numa-binding"),
        ("--stdin x x.py", "--stdin 'x': expected a local rank, or none"),
        ("--stdin 2 --nproc-per-node 2 x.py", "--stdin '2': expected a local rank from 0 to 1"),
        ("--no-python -m x", "--no-python and --module cannot be given together"),
        ("--no-python --no-use-env x", "--no-python and --no-use-env cannot be given together"),
        ("-mx x.py", "there is no flag -x"),
        ("-m=x x.py", "there is no flag -="),
        ("-r", "--redirects needs a value"),
        ("-mr --tee 3 x.py", "--redirects needs a value"),
        ("--role -- x.py", "--role needs a value"),
        ("--forward-signals SIGFOO x.py", "--forward-signals 'SIGFOO': there is no signal"),
        ("--forward-signals USR1,KILL x.py", "SIGKILL cannot be handled"),
        ("--forward-signals SIGCHLD x.py", "SIGCHLD cannot be handled"),
        ("--forward-signals --tee 3 x.py", "--forward-signals needs a value"),
        ("--hang-timeout 0 x.py", "--hang-timeout '0': expected a number of seconds above 0"),
        ("--hang-timeout -3 x.py", "--hang-timeout '-3': expected a number of seconds"),
        ("--hang-timeout nan x.py", "--hang-timeout 'nan': expected a number of seconds"),
        ("--hang-timeout soon x.py", "--hang-timeout 'soon': expected a number of seconds"),
        ("--memory-sample-interval -1 x.py", "--memory-sample-interval '-1': expected a number"),
        ("--memory-sample-interval inf x.py", "--memory-sample-interval 'inf': expected a number"),
        ("--no-guardian=1 x.py", "--no-guardian is a switch and takes no value, got '1'"),
    ],
)
def test_bad_input_is_one_line_that_names_it(words: str, said: str) -> None:
    message = str(refused(*words.split()))
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize("variable", [False, True])
def test_a_signal_cannot_end_the_job_and_be_passed_on(variable: bool) -> None:
    given = ["--signals-to-handle", "TERM,USR1,USR2", "--forward-signals", "USR2,HUP,USR1"]
    if variable:
        error = refused(*given[:2], "x.py", PET_FORWARD_SIGNALS=given[3])
    else:
        error = refused(*given, "x.py")
    assert str(error) == (
        "--signals-to-handle and --forward-signals cannot both have SIGUSR1, SIGUSR2"
    )
    assert error.hint


def test_one_of_the_ending_signals_can_be_passed_on_instead() -> None:
    assert parsed("--forward-signals", "SIGHUP").signals_to_handle is None


def test_an_unknown_flag_gets_a_suggestion() -> None:
    assert refused("--nproc-per-nod3", "2", "x.py").hint == "did you mean --nproc-per-node?"


@pytest.mark.parametrize("words", ["-n 4", "-np 4", "--nprocs 4", "--num_processes=4"])
def test_what_other_launchers_call_it_is_understood_for_the_hint(words: str) -> None:
    assert refused(*words.split(), "x.py").hint == "did you mean --nproc-per-node?"


def test_services_without_a_restart_are_no_services() -> None:
    error = refused("--restart", "worker", "x.py")
    assert "--max-restarts is 0" in str(error)
    assert parsed("--restart", "worker", "--max-restarts", "1").restart == "worker"


def test_standalone_overrides_even_what_would_be_refused() -> None:
    options = parsed("--standalone", "--rdzv-backend", "etcd", "--rdzv-endpoint", "?")
    assert (options.rdzv_backend, options.rdzv_endpoint) == (None, None)


# --- help ---------------------------------------------------------------------------------------


def test_help_shows_each_flag_once_under_a_heading() -> None:
    text = help_text()
    assert parse_options(["--help", "--bogus"], {}).help
    for heading, flags in FLAGS.items():
        assert f"\n{heading}:\n" in text
        for flag in flags:
            shown = re.findall(rf"^  (?:-\w.*, )?{flag.name}\b(?!-)", text, re.MULTILINE)
            assert len(shown) == 1, flag.name
    assert not re.findall(r"--\w+_", text)


def test_help_and_version_are_quick_to_say() -> None:
    program = (
        "import sys; from asupervise.cli import main; status = main([sys.argv[1]]); "
        "heavy = {'asyncio', 'anyio', 'psutil', 'subprocess', 'asupervise.procs'}; "
        "sys.exit(status or ' '.join(heavy & set(sys.modules)) or 0)"
    )
    for flag in ("--help", "--version"):
        done = subprocess.run(
            [sys.executable, "-c", program, flag], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "asupervise" in done.stdout


# --- the job ------------------------------------------------------------------------------------

SCRIPT = str(Path(__file__))


class Made(NamedTuple):
    """A job, and the arguments of `start_processes` in a round as it may be."""

    job: Job
    arguments: dict[str, Any]


def job(*words: str, script: str = SCRIPT, **environ: str) -> Made:
    options = parse_options([*words, script, "--lr", "${local_rank}"], environ)
    made = prepare(options, environ)
    return Made(made, made.blueprint.start_arguments(preview(made.request), environ))


def command(made: Made, rank: int = 0) -> list[str]:
    return [made.arguments["entrypoint"], *made.arguments["args"][rank]]


def test_a_script_is_run_by_python_unbuffered() -> None:
    made = job("--nproc-per-node", "2")
    assert command(made, 1) == [sys.executable, "-u", SCRIPT, "--lr", "1"]
    assert list(made.arguments["args"]) == list(made.arguments["envs"]) == [0, 1]


def test_python_exec_replaces_python_and_may_know_other_scripts() -> None:
    made = job(script="/elsewhere/train.py", PYTHON_EXEC="/opt/python")
    assert command(made)[:3] == ["/opt/python", "-u", "/elsewhere/train.py"]


def test_a_module_and_a_program() -> None:
    assert command(job("-m", script="pkg.train"))[:4] == [sys.executable, "-u", "-m", "pkg.train"]
    assert command(job("--no-python", script="./train")) == ["./train", "--lr", "0"]


def test_run_path_goes_before_module_and_no_python() -> None:
    made = job("--run-path", "-m", "--no-python", PYTHON_EXEC="/opt/python")
    assert command(made)[:3] == [sys.executable, "-u", "-c"]
    assert command(made)[4:] == [SCRIPT, "--lr", "0"]


@pytest.mark.parametrize("how", [[], ["-m"], ["--run-path"]])
def test_the_older_launchers_argument_stands_before_the_scripts_own(how: list[str]) -> None:
    args = command(job(*how, "--no-use-env", "--nproc-per-node", "2"), 1)
    assert args[args.index(SCRIPT) :] == [SCRIPT, "--local-rank=1", "--lr", "1"]


def test_a_missing_script_is_named_with_its_rank() -> None:
    with pytest.raises(UsageError, match=r"local rank 0: no such script: '/no/0\.py'"):
        job(script="/no/${local_rank}.py")


def told(made: Made) -> tuple[str, str]:
    env = made.arguments["envs"][0]
    return env["MASTER_ADDR"], env["MASTER_PORT"]


@pytest.mark.parametrize(
    ("words", "address", "port"),
    [
        ("--master-port 4444", "127.0.0.1", "4444"),
        ("--master-addr [::1] --master-port 4444", "::1", "4444"),
        ("--master-addr node7 --master-port 4444", "node7", "4444"),
        ("--rdzv-endpoint [::1]:4444", "::1", "4444"),
        ("--rdzv-endpoint node7:4444 --master-port 5555", "node7", "4444"),
        ("--local-addr 127.0.0.2 --master-port 4444", "127.0.0.2", "4444"),
    ],
)
def test_an_address_that_is_given_is_told(words: str, address: str, port: str) -> None:
    made = job(*words.split())
    assert told(made) == (address, port)
    assert made.arguments["envs"][0]["TORCHELASTIC_RUN_ID"] == "none"


@pytest.mark.parametrize(
    ("words", "address"),
    [
        ("", "127.0.0.1"),
        ("--standalone --local-addr 127.0.0.2", "127.0.0.2"),
        ("--standalone --master-addr node7 --master-port 4444", "127.0.0.1"),
        ("--rdzv-backend c10d --rdzv-endpoint localhost:4444", "127.0.0.1"),
        ("--master-port 0", "127.0.0.1"),
        ("--master-addr node7", "node7"),
        ("--rdzv-endpoint node7:0", "node7"),
    ],
)
def test_otherwise_a_free_port_is(words: str, address: str) -> None:
    made = job(*words.split())
    told_address, port = told(made)
    assert told_address == address
    assert port not in ("0", "4444")
    with socket.socket() as probe:
        probe.bind(("", int(port)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--nnodes 2", "--nnodes needs --node-rank"),
        ("--nnodes 2 --node-rank 2", "--node-rank 2: expected 0 to 1 with --nnodes 2"),
        ("--nnodes 2 --node-rank 1", "--master-addr: node 0's address is needed"),
        ("--nnodes 1:2 --node-rank 0", "--nnodes 1:2: the static backend has a fixed number"),
        ("--nnodes 2 --rdzv-backend etcd --rdzv-endpoint a:1", "--rdzv-id is needed"),
        ("--rdzv-conf last_call_timeout=x", "--rdzv-conf last_call_timeout=x: expected a number"),
        ("--rdzv-backend env", "--rdzv-backend env: no scheduler has started us"),
    ],
)
def test_nodes_that_cannot_meet_are_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        job(*words.split())


def test_ranks_are_laid_out_node_by_node() -> None:
    words = ["--nnodes", "3", "--node-rank", "1", "--master-addr", "a", "--nproc-per-node", "2"]
    made = job(*words, "--log-line-prefix-template", "<${rank}>")
    envs = made.arguments["envs"]
    assert [env["RANK"] for env in envs.values()] == ["2", "3"]
    expected = {
        "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "3", "WORLD_SIZE": "6", "ROLE_WORLD_SIZE": "6",
        "MASTER_ADDR": "a", "MASTER_PORT": "29500",
    }  # fmt: skip
    assert {name: envs[0][name] for name in expected} == expected
    assert made.arguments["log_line_prefixes"] == {0: "<2>", 1: "<3>"}
    # The first node's local rank 0 has the terminal.
    assert made.arguments["stdin"] is None


def test_a_scheduler_is_asked_where_nothing_else_is_said() -> None:
    slurm = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1", "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NNODES": "2",
        "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_LOCALID": "0",
    }  # fmt: skip
    made = job(**slurm)
    assert made.arguments["envs"][0]["GROUP_RANK"] == "1"
    assert made.arguments["envs"][0]["MASTER_ADDR"] == "n1"
    assert "SLURM" in made.job.choices["nodes"]
    # Of a worker of ours, which inherits them, nobody must think so.
    assert job(**slurm, TORCHELASTIC_RUN_ID="x").arguments["envs"][0]["WORLD_SIZE"] == "1"
    assert job("--nnodes", "1", **slurm).arguments["envs"][0]["WORLD_SIZE"] == "1"


def test_a_job_has_the_users_name_or_one_of_its_own() -> None:
    def run_id(*words: str) -> str:
        return str(job(*words).arguments["envs"][0]["TORCHELASTIC_RUN_ID"])

    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    assert re.fullmatch(uuid, run_id())
    assert run_id() != run_id()
    assert run_id("--rdzv-id", "job7") == "job7"
    assert re.fullmatch(uuid, run_id("--standalone", "--rdzv-id", "job7"))
    assert run_id("--rdzv-id", "job7", "--rdzv-backend", "c10d") == "job7"


def test_prefixes_come_from_the_template() -> None:
    assert job().arguments["log_line_prefixes"] is None
    template = {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "<${role_name}/${rank}>"}
    made = job("--nproc-per-node", "2", "--role", "t", **template)
    assert made.arguments["log_line_prefixes"] == {0: "<t/0>", 1: "<t/1>"}


def test_streams_and_filters_are_handed_on() -> None:
    from asupervise.logs import DefaultLogsSpecs, Std

    made = job("-r", "10:3", "-t", "1", "--local-ranks-filter", "0,1", "--log-dir", "new")
    assert made.arguments["logs_specs"] == DefaultLogsSpecs("new", {10: Std.ALL}, Std.OUT, {0, 1})


def test_what_watches_over_the_workers_is_handed_on() -> None:
    made = job("--no-guardian", "--hang-timeout", "5", "--memory-sample-interval", "0")
    names = ("guardian", "hang_timeout", "memory_sample_interval")
    assert [made.arguments[name] for name in names] == [False, 5.0, 0.0]
    assert [job().arguments[name] for name in names] == [True, None, 600.0]


def test_binding_is_handed_on() -> None:
    from asupervise.job import _numa_options

    def bound(*words: str) -> Any:
        return _numa_options(parsed(*words))

    assert bound() is None
    assert bound("--numa-binding", "socket").affinity_mode == "socket"
    given = bound("--numa-binding=node", "--memory-binding=interleave", "--numa-binding-fallback")
    assert given.memory_policy == "interleave"
    assert given.should_fall_back_if_binding_fails


# --- the machine --------------------------------------------------------------------------------

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes this machine look as if it had these CPUs, this quota and these GPUs."""

    def make(allowed: int = 8, quota: float | None = None, vendors: str = "") -> None:
        gpus = tuple(SimpleNamespace(vendor=vendor) for vendor in vendors.split())
        monkeypatch.setattr(cpus, "allowed_cpus", lambda: frozenset(range(allowed)))
        monkeypatch.setattr(cpus, "count_cores", lambda numbers: len(numbers) // 2)
        monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
        monkeypatch.setattr("asupervise.topology.read_gpus", lambda: gpus)
        monkeypatch.setattr("asupervise.topology.visible_gpus", lambda gpus, env: gpus)

    return make


@pytest.mark.parametrize(
    ("word", "has", "workers"),
    [
        ("cpu", {}, 8),
        ("cpu", {"quota": 2.5}, 3),
        ("cpu", {"quota": 64}, 8),
        ("cpu", {"vendors": "nvidia"}, 8),
        ("auto", {}, 8),
        ("auto", {"vendors": "nvidia nvidia"}, 2),
        ("auto", {"vendors": "intel intel intel"}, 3),
        ("gpu", {"vendors": "amd amd"}, 2),
        ("xpu", {"vendors": "intel"}, 1),
    ],
)
def test_a_word_counts_what_the_machine_has(
    machine: Machine, word: str, has: dict[str, Any], workers: int
) -> None:
    machine(**has)
    assert len(job("--nproc-per-node", word).arguments["envs"]) == workers


@pytest.mark.parametrize(("word", "vendors"), [("gpu", ""), ("gpu", "intel"), ("xpu", "nvidia")])
def test_devices_that_are_not_there_are_refused(machine: Machine, word: str, vendors: str) -> None:
    machine(vendors=vendors)
    with pytest.raises(UsageError, match=f"--nproc-per-node '{word}': no such device"):
        job("--nproc-per-node", word)


def test_a_rank_for_stdin_must_be_among_those_that_were_counted(machine: Machine) -> None:
    machine(allowed=4)
    with pytest.raises(UsageError, match="--stdin '4': expected a local rank from 0 to 3"):
        job("--nproc-per-node", "cpu", "--stdin", "4")


@pytest.mark.parametrize(
    ("workers", "quota", "threads"), [(2, None, "8"), (2, 5.0, "2"), (3, None, "5"), (99, 1.0, "1")]
)
def test_threads_are_a_fair_share_of_the_cores(
    machine: Machine, workers: int, quota: float | None, threads: str
) -> None:
    machine(allowed=32, quota=quota)
    envs = job("--nproc-per-node", str(workers)).arguments["envs"]
    assert {env["OMP_NUM_THREADS"] for env in envs.values()} == {threads}


def test_threads_that_the_user_has_set_are_left(machine: Machine) -> None:
    machine(allowed=32)
    assert job(OMP_NUM_THREADS="3").arguments["envs"][0]["OMP_NUM_THREADS"] == "3"


def test_bound_workers_share_the_cores_that_they_are_bound_to(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(allowed=32)
    bound = [frozenset(range(8)), frozenset(range(8)), frozenset(range(8, 32)), None]
    workers = [
        SimpleNamespace(binding=None if own is None else SimpleNamespace(cpus=own)) for own in bound
    ]
    plan = SimpleNamespace(workers=workers)
    monkeypatch.setattr("asupervise.procs.plan_processes", lambda **_: plan)
    envs = job("--nproc-per-node", "4", "--numa-binding", "node").arguments["envs"]
    assert [env["OMP_NUM_THREADS"] for env in envs.values()] == ["2", "2", "12", "16"]


def test_a_virtual_local_rank_comes_with_one_gpu_each(machine: Machine) -> None:
    machine(vendors="nvidia nvidia")
    made = job("--nproc-per-node", "2", "--virtual-local-rank", CUDA_VISIBLE_DEVICES="7,3")
    envs = made.arguments["envs"]
    assert [env["LOCAL_RANK"] for env in envs.values()] == ["0", "0"]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in envs.values()] == ["7", "3"]


def write(root: Path, **files: str) -> str:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu.max": "max 100000\n"}, None),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu.max": "250000 100000\n"}, 2.5),
        (
            {
                "proc__self__cgroup": "0::/pod/box\n",
                "sys__fs__cgroup__pod__cpu.max": "100000 100000\n",
                "sys__fs__cgroup__pod__box__cpu.max": "400000 100000\n",
            },
            1.0,
        ),
        (
            {
                "proc__self__cgroup": "5:cpuset:/\n4:cpu,cpuacct:/docker/1\n0::/\n",
                "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "50000\n",
                "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc__self__cgroup": "4:cpu:/\n",
                "sys__fs__cgroup__cpu__cpu.cfs_quota_us": "-1\n",
                "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__cpu.max": "nonsense"}, None),
    ],
)
def test_the_tightest_quota_of_the_cgroups_counts(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    assert cpus.cpu_quota(write(tmp_path, **files)) == quota


def test_hardware_threads_of_a_core_count_once(tmp_path: Path) -> None:
    cpu = "sys__devices__system__cpu__"
    siblings = {
        f"{cpu}cpu{number}__topology__thread_siblings_list": f"{number % 2},{number % 2 + 2}\n"
        for number in range(4)
    }
    root = write(tmp_path, **siblings, **{f"{cpu}smt__active": "1\n"})
    assert cpus.count_cores({0, 1, 2, 3}, root) == 2
    assert cpus.count_cores({0, 2}, root) == 1
    assert cpus.count_cores({0, 2, 9}, root) == 2
    write(tmp_path, **{f"{cpu}smt__active": "0\n"})
    assert cpus.count_cores({0, 1, 2, 3}, root) == 4
