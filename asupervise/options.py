"""The command line as a value: words and variables → frozen `LaunchOptions`.

Pure: the environment is passed in, and nothing is printed. A field's value is that of its flag,
or else that of ``PET_<FIELD>`` in the environment (torchrun's habit), or else its default.
"""

import argparse
import re
import signal
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from asupervise.errors import SupervisorError
from asupervise.flags import FLAGS, Flag, split_endpoint

__all__ = ["LaunchOptions", "UsageError", "help_text", "parse_options"]


class UsageError(SupervisorError, ValueError):
    """The command line, or a variable in its place, asks for what cannot be: exit status 2."""


# A NamedTuple and no dataclass: to make a class of forty fields costs every start 3 ms less.
class LaunchOptions(NamedTuple):
    """What the command line asks for, each value checked by itself and beside the others."""

    script: str = ""
    script_args: tuple[str, ...] = ()

    nproc_per_node: int | str = 1
    module: bool = False
    no_python: bool = False
    run_path: bool = False
    role: str = "default"
    stdin: int | None = 0
    virtual_local_rank: bool = False

    log_dir: str | None = None
    redirects: str = "0"
    tee: str = "0"
    local_ranks_filter: frozenset[int] | None = None
    duplicate_stdout_filters: tuple[str, ...] = ()
    duplicate_stderr_filters: tuple[str, ...] = ()
    log_line_prefix_template: str | None = None
    report: bool = True
    live: bool = False
    color: str = "auto"
    timestamps: bool = False
    log_format: str = "text"
    dedup: bool = False
    logs_specs: str | None = None

    numa_binding: str | None = None
    memory_binding: str | None = None
    numa_binding_fallback: bool = False

    signals_to_handle: tuple[signal.Signals, ...] | None = None
    shutdown_timeout: float = 30.0
    forward_signals: tuple[signal.Signals, ...] = ()
    guardian: bool = True

    events: str | None = None
    event_log_handler: tuple[str, ...] = ("null",)
    metrics_port: tuple[str, int] | None = None

    hang_timeout: float | None = None
    memory_sample_interval: float = 600.0

    standalone: bool = False
    master_addr: str | None = None
    master_port: int | None = None
    local_addr: str | None = None
    rdzv_backend: str | None = None
    rdzv_endpoint: str | None = None
    rdzv_id: str = "none"
    rdzv_conf: tuple[tuple[str, str], ...] = ()

    nnodes: tuple[int, int] | None = None
    node_rank: int | None = None
    max_restarts: int = 0
    restart: str = "group"
    restart_within: float = 60.0
    min_uptime: float = 1.0
    restart_backoff: float = 1.0

    use_env: bool = True
    start_method: str = "spawn"
    monitor_interval: float = 0.1

    dry_run: bool = False
    help: bool = False
    version: bool = False

    @property
    def runs_others_code(self) -> bool:
        """Whether this process runs code that is not ours, which may want whatever there is."""
        others = self.logs_specs is not None or self.rdzv_backend not in (None, "static")
        return others or self.is_consumed

    @property
    def is_consumed(self) -> bool:
        """Whether anybody wants to hear what happens."""
        handled = any(name != "null" for name in self.event_log_handler)
        return self.live or handled or (self.events, self.metrics_port) != (None, None)

    @property
    def tees_all(self) -> bool:
        """Whether what would go straight to the console is teed.

        A worker's own writing would stand in the middle of the live view; and only what goes to a
        file is seen as a sign of life.
        """
        return self.live or self.hang_timeout is not None


_ALL: dict[str, Flag] = {flag.name: flag for group in FLAGS.values() for flag in group}
_SHORT: dict[str, Flag] = {flag.short[1]: flag for flag in _ALL.values() if flag.short}
_LETTERS = re.compile(
    "-([{}]*)(?:([{}])=?)?(.*)".format(
        "".join(letter for letter, flag in _SHORT.items() if flag.read is None),
        "".join(letter for letter, flag in _SHORT.items() if flag.read is not None),
    ),
    re.DOTALL,
)
# A table of who uses how much is looked at.
_LIVE_SAMPLE_INTERVAL_S = 1.0
_ABOUT_US = frozenset({"help", "version"})
_OVERRIDDEN_BY_STANDALONE = frozenset(
    {"rdzv_backend", "rdzv_endpoint", "rdzv_id", "nnodes", "node_rank"}
)


def parse_options(argv: Sequence[str], environ: Mapping[str, str]) -> LaunchOptions:
    """Read the command line.

    Args:
        argv: its words, without the name of the command.
        environ: where the ``PET_*`` variables are looked up.

    Raises:
        UsageError: for anything that cannot be, naming the flag or variable, and the value.

    Example:
        >>> options = parse_options(["--nproc_per_node=2", "train.py", "--epochs", "3"], {})
        >>> options.nproc_per_node, options.script, options.script_args
        (2, 'train.py', ('--epochs', '3'))
    """
    typed, command = _typed(argv)
    if not _ABOUT_US.isdisjoint(typed):
        return LaunchOptions(help="help" in typed, version="version" in typed)
    values = _values(typed, environ)
    if values.get("live"):
        values.setdefault("memory_sample_interval", _LIVE_SAMPLE_INTERVAL_S)
    script, *args = command or [""]
    return _checked(LaunchOptions(script=script, script_args=tuple(args), **values))


# --- which flags were typed ------------------------------------------------------------------

# argparse is given one flag at a time, its name in full. Given all words at once it would judge
# the script's arguments too, with verdicts that differ between Python versions where "--" or the
# start of a flag is among them.


def _typed(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The texts of the flags by field; the script with its arguments, untouched."""
    parser, typed, rest = _parser(), argparse.Namespace(), list(argv)
    while rest and rest[0].startswith("-") and rest[0] != "-" and _ABOUT_US.isdisjoint(vars(typed)):
        word = rest.pop(0)
        if word == "--":
            break
        flag, full, wants_value = _long(word) if word.startswith("--") else _letters(word)
        words = [full, *rest[:wants_value]]
        del rest[:wants_value]
        try:
            parser.parse_args(words, typed)
        except argparse.ArgumentError:
            raise _refusal(flag, full) from None
    return vars(typed), rest


def _long(word: str) -> tuple[Flag, str, bool]:
    """Its flag, the word with the name in full, and whether the next word is the value."""
    name, equals, value = word.partition("=")
    flag = _named(name)
    return flag, f"{flag.name}{equals}{value}", flag.read is not None and not equals


def _letters(word: str) -> tuple[Flag, str, bool]:
    """The same of a word such as ``-m``, ``-r3`` or ``-mr``, by its last flag."""
    found = _LETTERS.fullmatch(word)
    assert found is not None, "any word matches that starts with a dash"
    switches, valued, rest = found.groups("")
    if rest and not valued:
        hint = _meant(_FOREIGN_SHORT.get(rest[0])) or _HINT_SCRIPT
        raise UsageError(f"there is no flag -{rest[0]}", hint=hint)
    # Python 3.11 takes the "=" of "-mr=3" for a part of the value.
    return _SHORT[valued or switches[-1]], f"-{switches}{valued}{rest}", bool(valued and not rest)


def _named(name: str) -> Flag:
    """The flag of this name, in either spelling, or of which this is the start."""
    dashed = name.replace("_", "-")
    if dashed in _ALL:
        return _ALL[dashed]
    for ours in (False, True):
        alike = [f for f in _ALL.values() if f.ours is ours and f.name.startswith(dashed)]
        if len(alike) > 1:
            names = ", ".join(flag.name for flag in alike)
            raise UsageError(f"{name} may stand for more than one flag: {names}")
        if alike:
            return alike[0]
    raise _unknown_flag(name, dashed)


_HINT_SCRIPT = "flags of the script stand after the script"


# What other launchers (mpirun, srun, honcho, accelerate) call ours.
_FOREIGN_SHORT = {"n": "--nproc-per-node", "N": "--nnodes", "v": "--version"}
_FOREIGN = {
    **dict.fromkeys(
        ("--np", "--nprocs", "--nproc", "--ntasks", "--num-processes", "--num-procs", "--workers"),
        "--nproc-per-node",
    ),
    **dict.fromkeys(("--nodes", "--num-nodes", "--num-machines"), "--nnodes"),
    **dict.fromkeys(("--restarts", "--retries"), "--max-restarts"),
    "--tag-output": "--tee 3",
}


def _meant(flag: str | None) -> str:
    return f"did you mean {flag}?" if flag else ""


def _unknown_flag(name: str, dashed: str) -> UsageError:
    from difflib import get_close_matches

    flag = _FOREIGN.get(dashed) or next(iter(get_close_matches(dashed, _ALL, n=1)), None)
    return UsageError(f"there is no flag {name}", hint=_meant(flag) or _HINT_SCRIPT)


def _refusal(flag: Flag, word: str) -> UsageError:
    """argparse's verdict on a flag that exists, in our words: it has no other."""
    if flag.read is None:
        value = word.partition("=")[2]
        return UsageError(f"{flag.name} is a switch and takes no value, got {value!r}")
    return UsageError(f"{flag.name} needs a value", hint=f"{flag.name}={flag.metavar}")


# --- the values ------------------------------------------------------------------------------


def _values(typed: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for flag in _ALL.values():
        if values.get("standalone") and flag.field in _OVERRIDDEN_BY_STANDALONE:
            continue
        if flag.field in typed:
            value = typed[flag.field]
            values[flag.field] = value if flag.read is None else _read(flag, value, flag.name)
        elif flag.negates is None and flag.field not in _ABOUT_US:
            for variable in (f"PET_{flag.field.upper()}", flag.variable):
                # An empty variable counts as none: job templates leave those behind.
                if variable and environ.get(variable):
                    values[flag.field] = _read(flag, environ[variable], variable)
                    break
    return values


def _read(flag: Flag, text: str, source: str) -> Any:
    try:
        return (flag.read or _switch)(text)
    except ValueError as error:
        raise UsageError(f"{source} {text!r}: {error}") from None


def _switch(text: str) -> bool:
    try:
        return bool(int(text))
    except ValueError:
        raise ValueError("expected 1 or 0") from None


def _checked(options: LaunchOptions) -> LaunchOptions:
    """The options, if each of them may stand beside the others."""
    if not options.script:
        raise UsageError(
            "no script is given", hint="asupervise --nproc-per-node 2 train.py --its-own-flags"
        )
    if options.no_python and options.module and not options.run_path:
        raise UsageError("--no-python and --module cannot be given together")
    if options.no_python and not options.use_env and not options.run_path:
        raise UsageError(
            "--no-python and --no-use-env cannot be given together",
            hint="a program finds its rank in LOCAL_RANK, or in the macro ${local_rank}",
        )
    if options.memory_binding not in (None, "none") and options.numa_binding is None:
        raise UsageError(
            f"--memory-binding {options.memory_binding} needs --numa-binding",
            hint="--numa-binding node",
        )
    if options.restart == "worker" and options.max_restarts < 1:
        raise UsageError(
            "--restart worker needs to know how often: --max-restarts is 0",
            hint="--max-restarts 3: so many within --restart-within 60 seconds",
        )
    _check_signals(options)
    _check_console(options)
    if "prometheus" in options.event_log_handler and options.metrics_port is None:
        raise UsageError(
            "--event-log-handler prometheus needs --metrics-port", hint="--metrics-port 9464"
        )
    if isinstance(options.nproc_per_node, int):
        check_stdin(options, options.nproc_per_node)
    _check_endpoint(options)
    return options


def check_stdin(options: LaunchOptions, workers: int) -> None:
    """Refuse a ``--stdin`` that is none of the workers' ranks."""
    if options.stdin is not None and options.stdin >= workers:
        raise UsageError(
            f"--stdin '{options.stdin}': expected a local rank from 0 to {workers - 1}, or none"
        )


def _check_console(options: LaunchOptions) -> None:
    """What is for teed lines needs some; logs specs of a name may tee what they like."""
    if options.tee != "0" or options.tees_all or options.logs_specs is not None:
        return
    asked = {
        "--timestamps": options.timestamps,
        "--log-format json": options.log_format == "json",
        "--dedup": options.dedup,
    }
    if name := next((name for name, wanted in asked.items() if wanted), None):
        raise UsageError(
            f"{name} is for lines that pass through this console, and --tee names none",
            hint="--tee 3",
        )


def _check_signals(options: LaunchOptions) -> None:
    both = set(options.signals_to_handle or ()) & set(options.forward_signals)
    if both:
        names = ", ".join(sig.name for sig in sorted(both))
        raise UsageError(
            f"--signals-to-handle and --forward-signals cannot both have {names}",
            hint="a signal either ends the job or is passed on to the workers",
        )


def _check_endpoint(options: LaunchOptions) -> None:
    if options.standalone or options.rdzv_backend not in (None, "static"):
        return
    if options.rdzv_endpoint is None:
        return
    if "," in options.rdzv_endpoint:
        raise UsageError(
            f"--rdzv-endpoint {options.rdzv_endpoint!r}: the static backend has one",
            hint="--rdzv-backend etcd",
        )
    host, port = split_endpoint(options.rdzv_endpoint)
    if port is None:
        raise UsageError(
            f"--rdzv-endpoint {host!r}: the static backend needs a port",
            hint=f"--rdzv-endpoint {host}:29500",
        )


# --- argparse's part, and help ---------------------------------------------------------------

_USAGE = """\
%(prog)s [flags] SCRIPT [arguments of the script]
       %(prog)s [flags] -m MODULE [arguments of the module]
       %(prog)s [flags] --no-python PROGRAM [arguments of the program]"""

_DESCRIPTION = """\
Starts a group of ranked workers, watches them, shows what they print, says
which rank failed first and why, and leaves no process behind."""

_EPILOG = """\
Flags stand before SCRIPT; what follows it is the script's own. In there,
${local_rank} is filled in for each worker, and so are ${rank}, ${world_size}
and ${local_world_size}; $$ stands for $.

A flag's default is taken from the variable PET_<NAME>, as PET_NPROC_PER_NODE=4.
PYTHON_EXEC, where it is set, is the Python that runs SCRIPT. OMP_NUM_THREADS,
where it is not, becomes each worker's fair share of the cores.

What a run has left is shown by python -m asupervise.view (show, logs, report).

Exit status: 0; that of the worker that failed first (128+N where signal N ended
it); 2 where the command line is wrong; 128+N where signal N ended the job."""


def help_text() -> str:
    """What ``--help`` prints."""
    return _parser().format_help()


def _parser() -> argparse.ArgumentParser:
    """Knows of the flags, in groups; names in full only, for `_named` has our abbreviations."""
    parser = argparse.ArgumentParser(
        prog="asupervise",
        usage=_USAGE,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    for heading, flags in FLAGS.items():
        group = parser.add_argument_group(heading)
        for flag in flags:
            names = [flag.short, flag.name] if flag.short else [flag.name]
            text = flag.help.replace("%", "%%")  # argparse formats it with "%"
            group.add_argument(*names, dest=flag.field, help=text, **_how(flag))
    return parser


def _how(flag: Flag) -> dict[str, Any]:
    if flag.read is not None:
        return {"metavar": flag.metavar}
    return {"action": "store_false" if flag.negates else "store_true"}
