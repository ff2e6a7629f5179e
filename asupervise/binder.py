"""Binding as it meets this machine: topology read, tools found, one probe before the start."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Mapping
from typing import TYPE_CHECKING

from asupervise.errors import BindingError
from asupervise.spec import GroupSpec

if TYPE_CHECKING:
    from asupervise.binding import BindingTools, NumaOptions

_PROBE_OUTPUT_BYTES = 4096


def choose(
    spec: GroupSpec, options: NumaOptions | None, parent_env: Mapping[str, str]
) -> GroupSpec:
    """The spec with a binding for each rank, from this machine's topology.

    Raises:
        BindingError: if there is none, unless the options say to go on without.
    """
    if options is None:
        return spec
    from asupervise.binding import bind_ranks, rewrite_argv
    from asupervise.topology import read_topology, visible_gpus

    try:
        topology = read_topology()
        gpus = visible_gpus(topology.gpus, parent_env)
        bindings = bind_ranks(topology, options, len(spec.args), gpus=gpus)
        if spec.function is not None and spec.function.forks:
            _check_forked(options)
            return spec._replace(bindings=bindings)
        tools = find_tools(parent_env)
        rewrite_argv(("true",), bindings[0], tools)
    except BindingError as exc:
        return _unbound(spec, options, exc)
    return spec._replace(bindings=bindings, tools=tools)


async def choose_and_probe(
    spec: GroupSpec, options: NumaOptions | None, parent_env: Mapping[str, str]
) -> GroupSpec:
    """:func:`choose`, and then one run of ``true`` under the binding of the first rank.

    Containers often forbid ``set_mempolicy``; numactl then fails in every rank with a message
    that nobody links to binding.

    Raises:
        BindingError: with the tool's own words.
    """
    if options is None:
        return spec
    # In a thread: /sys of a large machine is thousands of small files.
    bound = await asyncio.to_thread(choose, spec, options, parent_env)
    if not bound.bindings or bound.tools is None:
        return bound
    from asupervise.binding import rewrite_argv

    argv = rewrite_argv(("true",), bound.bindings[0], bound.tools)
    said = await _run(argv, parent_env)
    if said is None:
        return bound
    return _unbound(spec, options, BindingError(f"{' '.join(argv)} failed: {said}"))


def _check_forked(options: NumaOptions) -> None:
    """A forked worker binds itself: CPUs always, memory by libnuma.

    Raises:
        BindingError: libnuma is missing, or the kernel has no NUMA.
    """
    from asupervise.binding import MemoryPolicy
    from asupervise.functions.memory_policy import can_set_memory_policy

    if options.memory_policy is not MemoryPolicy.NONE and not can_set_memory_policy():
        raise BindingError(
            f"memory_policy={str(options.memory_policy)!r} in a forked worker needs libnuma.so.1 "
            "and a kernel with NUMA, and that is not so here",
            hint="install libnuma (Debian: libnuma1), use start_method 'spawn', or bind CPUs only",
        )


def _unbound(spec: GroupSpec, options: NumaOptions, exc: BindingError) -> GroupSpec:
    if not options.should_fall_back_if_binding_fails:
        raise exc
    return spec._replace(warnings=(*spec.warnings, f"running unbound: {exc}"))


def find_tools(env: Mapping[str, str]) -> BindingTools:
    """Where numactl and taskset are, on the PATH of `env`."""
    from asupervise.binding import BindingTools

    return BindingTools(numactl=_which("numactl", env), taskset=_which("taskset", env))


def _which(program: str, env: Mapping[str, str]) -> str | None:
    for folder in env.get("PATH", os.defpath).split(os.pathsep):
        path = os.path.join(folder, program)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def _said(read_fd: int) -> str:
    os.set_blocking(read_fd, False)
    try:
        return os.read(read_fd, _PROBE_OUTPUT_BYTES).decode(errors="replace").strip()
    except BlockingIOError:
        return ""  # it said nothing, and left somebody behind who might


async def _run(argv: tuple[str, ...], env: Mapping[str, str]) -> str | None:
    """Run a short command; None if it succeeded, else what it said."""
    from asupervise._compat import run_quietly

    read_fd, write_fd = os.pipe()
    try:
        try:
            code = await run_quietly(
                argv, env=dict(env), stdin=subprocess.DEVNULL, stdout=write_fd, stderr=write_fd
            )
        except OSError as exc:
            return exc.strerror or str(exc)
        finally:
            os.close(write_fd)
        return None if code == 0 else _said(read_fd) or f"exit status {code}"
    finally:
        os.close(read_fd)
