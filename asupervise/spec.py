"""The caller's wish as a value, checked before anything is planned or started. Pure."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from asupervise.errors import RankMapError
from asupervise.logs import DefaultLogsSpecs, LogsSpecs

if TYPE_CHECKING:
    from asupervise.binding import BindingTools, RankBinding
    from asupervise.formats import ConsoleFormat
    from asupervise.functions.spec import FunctionSpec

DEFAULT_SHUTDOWN_TIMEOUT_S = 30.0
# Seldom enough that 64 idle workers cost the supervisor a thousandth of a second a minute; the
# peak of a worker that is larger than its supervisor is told by the kernel in any case.
DEFAULT_MEMORY_SAMPLE_INTERVAL_S = 600.0
_START_METHODS = ("spawn", "fork", "forkserver")


class GroupSpec(NamedTuple):
    """What is to be started, as given to ``start_processes``; see there.

    `function` is set where `entrypoint` is a callable; `entrypoint` is then its name. The fields
    from `bindings` on are added on the way from the call to the plan.
    """

    name: str
    entrypoint: str | Sequence[str]
    args: Mapping[int, Sequence[object]]
    envs: Mapping[int, Mapping[str, str]]
    logs_specs: LogsSpecs
    log_line_prefixes: Mapping[int, str] | None = None
    stdout_filters: Sequence[str] = ()
    stderr_filters: Sequence[str] = ()
    stdin: int | None = None
    function: FunctionSpec | None = None
    token: str = ""
    bindings: Sequence[RankBinding | None] = ()
    tools: BindingTools | None = None
    warnings: tuple[str, ...] = ()


class RunOptions(NamedTuple):
    """How the group is run, as given to ``start_processes``; see there, and :meth:`checked`."""

    cwd: str | None = None
    shutdown_timeout_s: float = DEFAULT_SHUTDOWN_TIMEOUT_S
    guardian: bool = True
    subreaper: bool = False
    hang_timeout_s: float | None = None
    memory_sample_interval_s: float = DEFAULT_MEMORY_SAMPLE_INTERVAL_S
    report: bool = True
    console: ConsoleFormat | None = None

    def checked(self) -> RunOptions:
        """The same.

        Raises:
            ValueError: for a time that makes no sense.
        """
        check_timeout("shutdown_timeout", self.shutdown_timeout_s)
        check_timeout("memory_sample_interval", self.memory_sample_interval_s)
        # Whatever the annotations say, callers pass what they have.
        hang: Any = self.hang_timeout_s
        if hang is not None and not (isinstance(hang, int | float) and hang > 0):
            raise ValueError(f"hang_timeout: {hang!r}: expected seconds above zero, or None")
        if self.console is not None and not hasattr(self.console, "log_format"):
            raise ValueError(
                f"console: {self.console!r}: expected a ConsoleFormat, as "
                "ConsoleFormat(log_format='json')"
            )
        return self


def checked_spec(
    name: str,
    entrypoint: str | Sequence[str] | Callable[..., Any],
    args: Mapping[int, Sequence[object]],
    envs: Mapping[int, Mapping[str, str]],
    logs_specs: LogsSpecs | None,
    prefixes: Mapping[int, str] | None,
    start_method: object,
    preload: Sequence[str],
    stdout_filters: Sequence[str] | None,
    stderr_filters: Sequence[str] | None,
    stdin: int | None,
) -> GroupSpec:
    """The arguments of ``start_processes`` as a value.

    Raises:
        RankMapError, ValueError, TypeError: as ``start_processes`` says.
    """
    maps: tuple[tuple[str, Any], ...] = (("args", args), ("envs", envs))
    for what, given in maps:
        if not isinstance(given, Mapping):
            raise ValueError(f"{what}: {given!r}: expected a mapping by local rank")
    check_rank_maps(args, envs, prefixes)
    if not str.isprintable(name):
        raise ValueError(f"name: {name!r}: expected printable text, for it stands before each line")
    _check_args(args)
    args = {rank: tuple(given) for rank, given in args.items()}  # an iterator is read but once
    _check_envs(envs)
    _check_start_method(start_method)
    if stdin is not None and stdin not in args:
        raise ValueError(f"stdin: no local rank {stdin!r}: expected 0..{len(args) - 1} or None")
    if logs_specs is not None and (
        isinstance(logs_specs, type) or not callable(getattr(logs_specs, "reify", None))
    ):
        raise ValueError(
            f"logs_specs: {logs_specs!r}: expected LogsSpecs, as DefaultLogsSpecs(tee=Std.ALL)"
        )
    function = None
    if callable(entrypoint):
        from asupervise.functions.spec import checked_function

        function = checked_function(entrypoint, args, start_method, preload)
    elif preload or not isinstance(start_method, str):
        what = "preload" if preload else "start_method"
        raise ValueError(
            f"{what}: entrypoint {entrypoint!r} is a program, which is always started afresh; a "
            "zygote forks workers that call a Python function"
        )
    return GroupSpec(
        name=name,
        entrypoint=function.name if function else _checked_entrypoint(cast(Any, entrypoint)),
        function=function,
        args=args,
        envs=envs,
        logs_specs=logs_specs if logs_specs is not None else DefaultLogsSpecs(),
        log_line_prefixes=prefixes,
        stdout_filters=_checked_filters("duplicate_stdout_filters", stdout_filters),
        stderr_filters=_checked_filters("duplicate_stderr_filters", stderr_filters),
        stdin=stdin,
        token=f"asv-{os.urandom(8).hex()}",
    )


def check_rank_maps(
    args: Mapping[int, object], envs: Mapping[int, object], prefixes: Mapping[int, object] | None
) -> None:
    """Every map must have the ranks ``0..n-1``, and the same n.

    Raises:
        RankMapError: naming the map and the ranks that are missing or too many.
    """
    if not args:
        raise RankMapError("args: no worker at all: expected a map of local ranks 0..n-1")
    check_ranks("args", args, len(args))
    check_ranks("envs", envs, len(args))
    if prefixes:
        unknown = sorted(set(prefixes) - set(range(len(args))), key=str)
        if unknown:
            raise RankMapError(f"log_line_prefixes: no such local ranks: {unknown}")


def check_ranks(what: str, given: Mapping[int, object], nprocs: int) -> None:
    """`given` must have the ranks ``0..nprocs-1``.

    Raises:
        RankMapError: naming the ranks that are missing or too many.
    """
    expected, actual = set(range(nprocs)), set(given)
    if actual == expected:
        return
    parts = []
    if missing := sorted(expected - actual):
        parts.append(f"missing {missing}")
    if extra := sorted(actual - expected, key=str):
        parts.append(f"not expected {extra}")
    raise RankMapError(
        f"{what}: expected local ranks 0..{nprocs - 1}, got {sorted(actual, key=str)}: "
        + ", ".join(parts)
    )


def check_timeout(what: str, timeout_s: Any) -> None:
    """Raises ValueError for a negative number, for NaN, and for what is none."""
    if not (isinstance(timeout_s, int | float) and timeout_s >= 0):
        raise ValueError(f"{what}: {timeout_s!r}: expected seconds, zero or more")


def checked_signal(sig: int) -> int:
    """Raises ValueError for a number that is no signal of this system."""
    if sig not in signal.valid_signals():
        raise ValueError(f"{sig!r} is not a signal of this system")
    return int(sig)


def _check_start_method(start_method: object) -> None:
    if start_method in _START_METHODS:
        return
    # By what it can do: nobody imports the zygote's module only to ask.
    if not isinstance(start_method, str) and hasattr(start_method, "fork"):
        return
    raise ValueError(
        f"start_method: {start_method!r}: expected 'spawn', 'fork', 'forkserver' or a Zygote"
    )


def _check_args(args: Mapping[int, Sequence[object]]) -> None:
    for rank, given in args.items():
        # A string is a sequence, too: each letter would become an argument.
        if isinstance(given, str | bytes) or not hasattr(given, "__iter__"):
            raise ValueError(
                f"args: local rank {rank}: {given!r}: expected a sequence of arguments, not one"
            )


def _check_envs(envs: Mapping[int, Mapping[Any, Any]]) -> None:
    for rank, env in envs.items():
        if not hasattr(env, "items"):
            raise ValueError(f"envs: local rank {rank}: {env!r}: expected a map of strings")
        for name, value in env.items():
            if not (isinstance(name, str) and isinstance(value, str)):
                raise TypeError(
                    f"envs: local rank {rank}: {name!r}: {value!r}: expected strings (torch's "
                    "maps hold strings, too)"
                )
            if not name or "=" in name or "\0" in name or "\0" in value:
                raise ValueError(
                    f"envs: local rank {rank}: {name!r}: {value!r}: a name is not empty and has no "
                    "'=', and neither has a zero byte"
                )


def _checked_entrypoint(entrypoint: str | Sequence[str]) -> str | tuple[str, ...]:
    if isinstance(entrypoint, str):
        parts: tuple[str, ...] = (entrypoint,)
    else:
        # Whatever the annotation says, callers pass what they have.
        parts = tuple(cast(Any, entrypoint)) if hasattr(entrypoint, "__iter__") else ()
    if not parts or not parts[0] or not all(isinstance(part, str) for part in parts):
        raise ValueError(
            f"entrypoint: {entrypoint!r}: expected a program, a sequence of strings whose first "
            "is a program, or a callable"
        )
    return entrypoint if isinstance(entrypoint, str) else parts


def _checked_filters(what: str, filters: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(filters, str):
        raise ValueError(f"{what}: {filters!r}: expected a sequence of strings, not one string")
    return tuple(filters or ())
