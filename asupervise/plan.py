"""From the caller's wish to one frozen plan a worker: pure, so it can be printed and tested.

Nothing is opened, created or started here. ``--dry-run`` prints what :func:`plan_group` returns.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from asupervise.logs import LogsDest, line_prefixes
from asupervise.spec import GroupSpec, check_ranks
from asupervise.worker import HEARTBEAT_VARIABLE, PROGRESS_VARIABLE, STACKS_VARIABLE

if TYPE_CHECKING:
    from asupervise.binding import BindingTools, RankBinding

TOKEN_VARIABLE = "ASUPERVISE_TOKEN"
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"


class WorkerPlan(NamedTuple):
    """All that is needed to start one worker.

    Attributes:
        local_rank: its rank on this node, from 0.
        argv: program and arguments, after the rewrite for binding; empty for a worker that a
            zygote forks. For a function, two descriptors follow at the start.
        program: the user's program, before that rewrite, or the name of the function.
        function: whether it runs a Python function.
        env: what is laid over the supervisor's environment.
        stdin: whether it reads our standard input; otherwise ``/dev/null``.
        stdout: file for its standard output; None for our console.
        stderr: likewise for standard error.
        tee_stdout: whether `stdout` is shown on the console as well.
        tee_stderr: likewise for `stderr`.
        prefix: stands before each teed line.
        error_file: where its ``@record`` writes an exception; None for nowhere.
        binding: CPUs, memory and GPU that it is bound to, or None.

    Example:
        >>> plan = plan_processes("echo", "echo", {0: ("a",)}, {0: {"RANK": "0"}})
        >>> plan.workers[0].argv, plan.workers[0].env["RANK"], plan.workers[0].prefix
        (('echo', 'a'), '0', '[echo0]:')
    """

    local_rank: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    program: str = ""
    function: bool = False
    stdin: bool = False
    stdout: str | None = None
    stderr: str | None = None
    tee_stdout: bool = False
    tee_stderr: bool = False
    prefix: str = ""
    error_file: str | None = None
    binding: RankBinding | None = None

    @property
    def rank(self) -> int:
        """Its rank over all nodes: ``RANK`` in its environment, or the local one."""
        # A caller's own environment may say anything.
        text = self.env.get("RANK", "")
        known = text.isascii() and text.isdigit() and len(text) < 10
        return int(text) if known else self.local_rank


class GroupPlan(NamedTuple):
    """All that is needed to start a group on this node.

    Attributes:
        name: names the group in prefixes and reports.
        workers: by local rank.
        logs: the files of this attempt.
        stdout_filters: substrings; matching teed lines go to ``logs.filtered_stdout`` as well.
        stderr_filters: likewise for stderr.
        token: marks every process of the group, and what descends from it, in its environment.
        warnings: what the user should know before it starts, a sentence each.

    Example:
        >>> plan_processes("echo", "echo", {0: ("a",), 1: ("b",)}, {0: {}, 1: {}}).nprocs
        2
    """

    name: str
    workers: tuple[WorkerPlan, ...]
    logs: LogsDest
    stdout_filters: tuple[str, ...] = ()
    stderr_filters: tuple[str, ...] = ()
    token: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def nprocs(self) -> int:
        """The number of workers."""
        return len(self.workers)


def plan_group(spec: GroupSpec, parent_env: Mapping[str, str]) -> GroupPlan:
    """Decide everything about a group.

    Args:
        spec: the wish; its rank maps are checked already.
        parent_env: the environment that the workers' are laid over.

    Raises:
        RankMapError: if the logs specs name files for other ranks than there are.
        ValueError: if an argument has a zero byte.
        BindingError: if the binding cannot be expressed with the tools that there are.
    """
    nprocs = len(spec.args)
    # Copies: a logs specs class made for torch writes the error file's name into them.
    envs = {rank: dict(spec.envs[rank]) for rank in range(nprocs)}
    logs = spec.logs_specs.reify(envs)
    check_ranks("logs_specs: stdouts", logs.stdouts, nprocs)
    check_ranks("logs_specs: stderrs", logs.stderrs, nprocs)
    prefixes = line_prefixes(spec.name, nprocs, spec.log_line_prefixes)
    # An outer supervisor must find our workers, too: its token stays in front of ours.
    outer = parent_env.get(TOKEN_VARIABLE)
    token = f"{outer}:{spec.token}" if outer and spec.token else spec.token
    workers = tuple(
        _plan_worker(spec, rank, envs[rank], logs, prefixes[rank], token) for rank in range(nprocs)
    )
    return GroupPlan(
        name=spec.name,
        workers=workers,
        logs=logs,
        stdout_filters=tuple(spec.stdout_filters),
        stderr_filters=tuple(spec.stderr_filters),
        token=spec.token,
        warnings=spec.warnings,
    )


def _plan_worker(
    spec: GroupSpec, rank: int, env: dict[str, str], logs: LogsDest, prefix: str, token: str
) -> WorkerPlan:
    argv = _argv(spec, rank)
    binding = spec.bindings[rank] if spec.bindings else None
    error_file = logs.error_files.get(rank)
    env[ERROR_FILE_VARIABLE] = "" if error_file in (None, os.devnull) else str(error_file)
    if env[ERROR_FILE_VARIABLE]:
        folder = os.path.dirname(env[ERROR_FILE_VARIABLE])
        env[STACKS_VARIABLE] = os.path.join(folder, "stacks.txt")
        env[HEARTBEAT_VARIABLE] = os.path.join(folder, "heartbeat")
        env[PROGRESS_VARIABLE] = os.path.join(folder, "progress")
    if token:
        env[TOKEN_VARIABLE] = token
    return WorkerPlan(
        local_rank=rank,
        argv=_bound(argv, binding, spec.tools),
        program=spec.function.name if spec.function else argv[0],
        function=spec.function is not None,
        env=env,
        stdin=rank == spec.stdin,
        stdout=logs.stdouts[rank] or None,
        stderr=logs.stderrs[rank] or None,
        tee_stdout=rank in logs.tee_stdouts and logs.tee_stdouts[rank] != os.devnull,
        tee_stderr=rank in logs.tee_stderrs and logs.tee_stderrs[rank] != os.devnull,
        prefix=prefix,
        error_file=env[ERROR_FILE_VARIABLE] or None,
        binding=binding,
    )


def _argv(spec: GroupSpec, rank: int) -> tuple[str, ...]:
    if spec.function is not None:
        return spec.function.argv
    leading = (spec.entrypoint,) if isinstance(spec.entrypoint, str) else tuple(spec.entrypoint)
    argv = (*leading, *(str(arg) for arg in spec.args[rank]))
    for part in argv:
        if "\0" in part:
            raise ValueError(f"args: local rank {rank}: {part!r}: an argument has no zero byte")
    return argv


def _bound(
    argv: tuple[str, ...], binding: RankBinding | None, tools: BindingTools | None
) -> tuple[str, ...]:
    if binding is None or tools is None or not argv:
        return argv  # a forked worker binds itself
    from asupervise.binding import rewrite_argv

    return rewrite_argv(argv, binding, tools)
