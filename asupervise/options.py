"""The command line as a value: words and variables → frozen `LaunchOptions`.

Pure: the environment is passed in, and nothing is printed. A field's value is that of its flag,
or else that of ``PET_<FIELD>`` in the environment (torchrun's habit), or else its default.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from asupervise.errors import SupervisorError
from asupervise.flags import FLAGS, Flag

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
    logs_specs: str | None = None

    numa_binding: str | None = None
    memory_binding: str | None = None
    numa_binding_fallback: bool = False

    signals_to_handle: tuple[signal.Signals, ...] | None = None
    shutdown_timeout: float = 30.0

    standalone: bool = False
    master_addr: str | None = None
    master_port: int | None = None
    local_addr: str | None = None
    rdzv_backend: str = "static"
    rdzv_endpoint: tuple[str, int | None] | None = None
    rdzv_id: str = "none"
    rdzv_conf: tuple[tuple[str, str], ...] = ()

    nnodes: tuple[int, int] = (1, 1)
    node_rank: int = 0
    max_restarts: int = 0

    use_env: bool = True
    start_method: str = "spawn"
    monitor_interval: float = 0.1
    event_log_handler: str = "null"

    dry_run: bool = False
    help: bool = False
    version: bool = False


_ALL: dict[str, Flag] = {flag.name: flag for group in FLAGS.values() for flag in group}
_SHORT: dict[str, Flag] = {flag.short[1]: flag for flag in _ALL.values() if flag.short}
_ABOUT_US = ("help", "version")


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
    words, command = _split(argv)
    namespace, unknown = _parser().parse_known_args(words)
    typed: dict[str, Any] = vars(namespace)
    if any(name in typed for name in _ABOUT_US):
        return LaunchOptions(**{name: name in typed for name in _ABOUT_US})
    if unknown:
        raise _unknown_flag(unknown[0])
    values = _values(typed, environ)
    script, *args = command or [""]
    return _checked(LaunchOptions(script=script, script_args=tuple(args), **values))


def help_text() -> str:
    """What ``--help`` prints."""
    return _parser().format_help()


# --- where the flags end and the script begins -----------------------------------------------


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own flags, under their full names, and the script with its arguments, untouched.

    Argparse's REMAINDER cannot be left to do that: what it makes of ``--`` in the script's
    arguments differs between Python versions, and it knows no second spelling of a flag.
    """
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest[0]
        if word == "--":
            return words, rest[1:]
        if not word.startswith("-") or word == "-":
            return words, rest
        del rest[0]
        word, wants_value = _long(word) if word.startswith("--") else _cluster(word)
        words.append(word)
        if wants_value and rest:
            words.append(rest.pop(0))
    return words, []


def _long(word: str) -> tuple[str, bool]:
    """A word such as ``--tee=3`` with the flag's full name, and whether a value follows it."""
    name, equals, value = word.partition("=")
    name = _full_name(name.replace("_", "-"))
    flag = _ALL.get(name)
    return name + equals + value, flag is not None and flag.read is not None and not equals


def _full_name(name: str) -> str:
    """The flag that `name` abbreviates; `name` itself where that is unknown or not clear."""
    if name in _ALL:
        return name
    for candidates in (_names(ours=False), _names(ours=True)):
        matching = [full for full in candidates if full.startswith(name)]
        if matching:
            return matching[0] if len(matching) == 1 else name
    return name


def _names(*, ours: bool) -> Iterable[str]:
    return (flag.name for flag in _ALL.values() if flag.ours is ours)


def _cluster(word: str) -> tuple[str, bool]:
    """A word such as ``-mr``, and whether a value follows it."""
    for position, letter in enumerate(word[1:], 2):
        flag = _SHORT.get(letter)
        if flag is None:
            break
        if flag.read is not None:
            return word, position == len(word)
    return word, False


# --- argparse --------------------------------------------------------------------------------

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

Exit status: 0; that of the worker that failed first (128+N where signal N ended
it); 2 where the command line is wrong; 128+N where signal N ended the job."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=_HELP_HINT)


_HELP_HINT = "--help lists all flags"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="asupervise",
        usage=_USAGE,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    for heading, flags in FLAGS.items():
        group = parser.add_argument_group(heading)
        for flag in flags:
            _add(group, flag)
    return parser


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    names = [flag.short, flag.name] if flag.short else [flag.name]
    # argparse formats help texts with "%".
    text = flag.help.replace("%", "%%")
    if flag.read is None:
        constant = flag.negates is None
        group.add_argument(*names, dest=flag.field, action="store_const", const=constant, help=text)
    else:
        group.add_argument(*names, dest=flag.field, metavar=flag.metavar, help=text)


def _unknown_flag(word: str) -> UsageError:
    from difflib import get_close_matches

    name = word.partition("=")[0].replace("_", "-")
    alike = get_close_matches(name, _ALL, n=1)
    hint = f"did you mean {alike[0]}?" if alike else "flags of the script stand after the script"
    return UsageError(f"there is no flag {word.partition('=')[0]}", hint=hint)


# --- the values ------------------------------------------------------------------------------


def _values(typed: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for flag in _ALL.values():
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


def _check_endpoint(options: LaunchOptions) -> None:
    if options.standalone or options.rdzv_backend != "static":
        return
    if options.rdzv_endpoint is not None and options.rdzv_endpoint[1] is None:
        host = options.rdzv_endpoint[0]
        raise UsageError(
            f"--rdzv-endpoint {host!r}: the static backend needs a port",
            hint=f"--rdzv-endpoint {host}:29500",
        )
