"""What the command line asks for → the arguments of `start_processes`, and why they are these.

Looks at the machine (CPUs, GPUs, a free port) where the options leave a choice. Starts nothing.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from asupervise import cpus
from asupervise.elastic.blueprint import Blueprint
from asupervise.elastic.meeting import meeting_of
from asupervise.elastic.node import own_gpus, preview
from asupervise.elastic.rendezvous import Request
from asupervise.environ import fair_share, substitute_macros
from asupervise.options import LaunchOptions, UsageError, check_stdin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asupervise.binding import NumaOptions
    from asupervise.formats import ConsoleFormat
    from asupervise.logs import LogsSpecs

    Threads = int | Mapping[int, int] | None

__all__ = ["Job", "prepare"]

T = TypeVar("T")


class Job(NamedTuple):
    """All that is needed to run what the command line asks for.

    Attributes:
        title: what is run, for the report.
        blueprint: what this node starts, in any round.
        backend: how the nodes come together.
        request: what the backend is given.
        choices: what was chosen and why, each under its name, for ``--dry-run``.
        warnings: what can hardly be meant so, a sentence each.
        python: the interpreter that runs the workers; "" where programs are run.
    """

    title: str
    blueprint: Blueprint
    backend: str
    request: Request
    choices: dict[str, str]
    python: str = ""
    warnings: tuple[str, ...] = ()


def prepare(options: LaunchOptions, environ: Mapping[str, str]) -> Job:
    """Decide all that the options leave open.

    Args:
        options: what the command line asks for.
        environ: our environment, which the workers inherit.

    Raises:
        UsageError: if it cannot be had: no GPU, no such script, no such stream mask.
        SupervisorError, ValueError, OSError: likewise, from the parts that know better.
    """
    workers, why_workers = _worker_count(options.nproc_per_node, environ)
    check_stdin(options, workers)
    meeting = meeting_of(options, environ, workers)
    program, template = _command(options, workers, environ)
    arguments: dict[str, Any] = {
        "logs_specs": _logs_specs(options, workers),
        "start_method": options.start_method,
        "numa_options": _numa_options(options),
        "duplicate_stdout_filters": options.duplicate_stdout_filters,
        "duplicate_stderr_filters": options.duplicate_stderr_filters,
        "shutdown_timeout": options.shutdown_timeout,
        "guardian": options.guardian,
        # This process is ours alone: orphans may become its children.
        "subreaper": True,
        "hang_timeout": options.hang_timeout,
        "memory_sample_interval": options.memory_sample_interval,
        "console": _console(options),
    }
    blueprint = Blueprint(
        nproc=workers,
        run_id=meeting.request.run_id,
        role=options.role,
        entrypoint=program,
        args=template,
        arguments=arguments,
        max_restarts=options.max_restarts,
        master_addr=meeting.request.master_addr,
        stdin=options.stdin,
        prefix_template=options.log_line_prefix_template,
        gpu_visibility=own_gpus(workers, environ) if options.virtual_local_rank else {},
        virtual_local_rank=options.virtual_local_rank,
    )
    threads, why_threads = _threads(blueprint, meeting.request, environ)
    choices = {
        "workers": f"{workers} ({why_workers})",
        **meeting.choices,
        "threads": why_threads,
    }
    teed = "streams that would go straight to the console are teed"
    if options.live:
        every = f"{options.memory_sample_interval:g} s"
        choices["live view"] = f"{teed}; memory and CPU are looked at every {every}"
    if options.hang_timeout is not None:
        choices["hang timeout"] = f"{options.hang_timeout:g} s; {teed}, and so seen"
    if options.max_restarts:
        how = "of them all, when one has failed"
        if options.restart == "worker":
            how = f"of single workers, within {options.restart_within:g} s"
        choices["restarts"] = f"{options.max_restarts} at the most, {how}"
    blueprint = blueprint._replace(omp_num_threads=threads)
    python = "" if options.no_python and not options.run_path else program
    return Job(
        *(options.script, blueprint, meeting.backend, meeting.request, choices, python),
        warnings=_warnings(options, workers, meeting.request.terms.max_nodes, environ),
    )


def _warnings(
    options: LaunchOptions, workers: int, nodes: int, environ: Mapping[str, str]
) -> tuple[str, ...]:
    """Ranks that there are not: torchrun passes over them, and so do we, but not in silence.

    And half of what makes a job of several nodes, which each would then run by itself.
    """
    from asupervise.logs import Std

    named = {
        "--redirects": Std.from_str(options.redirects),
        "--tee": Std.from_str(options.tee),
        "--local-ranks-filter": options.local_ranks_filter,
    }
    found = []
    if nodes == 1 and options.nnodes is None and environ.get("NNODES", "1") not in ("", "1"):
        found.append(
            f"NNODES={environ['NNODES']}, but NODE_RANK is not set: this is a job of one node"
        )
    for flag, given in named.items():
        ranks = set() if given is None or isinstance(given, Std) else set(given)
        if missing := sorted(ranks - set(range(workers))):
            from asupervise.ranges import format_ranges

            there = f"0 to {workers - 1}" if workers > 1 else "0"
            found.append(
                f"{flag}: there is no local rank {format_ranges(missing)}: expected {there}"
            )
    return tuple(found)


def _of_flag(name: str, read: Callable[[str], T], text: str) -> T:
    try:
        return read(text)
    except ValueError as error:
        raise UsageError(f"{name}: {error}", hint=getattr(error, "hint", None)) from None


# --- how many workers ------------------------------------------------------------------------

_VENDORS: Final = {"gpu": ("nvidia", "amd"), "xpu": ("intel",), "auto": ("nvidia", "amd", "intel")}


def _worker_count(wanted: int | str, environ: Mapping[str, str]) -> tuple[int, str]:
    """The number, and why."""
    if isinstance(wanted, int):
        return wanted, "as given"
    gpus = _count_gpus(_VENDORS[wanted], environ) if wanted in _VENDORS else 0
    if gpus:
        return gpus, f"{wanted}: one for each visible GPU"
    if wanted in ("gpu", "xpu"):
        raise UsageError(
            f"--nproc-per-node '{wanted}': no such device is visible",
            hint="give a number, or cpu for one worker for each CPU",
        )
    number, why = _cpu_time()
    return number, f"{wanted}: {why}"


def _count_gpus(vendors: Sequence[str], environ: Mapping[str, str]) -> int:
    from asupervise.topology import read_gpus, visible_gpus

    return sum(gpu.vendor in vendors for gpu in visible_gpus(read_gpus(), environ))


def _cpu_time() -> tuple[int, str]:
    allowed = len(cpus.allowed_cpus())
    quota = cpus.cpu_quota()
    if quota is not None and quota < allowed:
        return max(1, math.ceil(quota)), f"the cgroup grants {quota:g} of {allowed} CPUs"
    return allowed, f"{allowed} CPUs may be used"


# --- what they run ---------------------------------------------------------------------------

_RUN_PATH: Final = (
    "import runpy, sys; from asupervise.error_handler import record; "
    "sys.argv = sys.argv[1:]; record(runpy.run_path)(sys.argv[0], run_name='__main__')"
)


def _command(
    options: LaunchOptions, workers: int, environ: Mapping[str, str]
) -> tuple[str, tuple[object, ...]]:
    """The program, and its arguments with their macros."""
    program, leading = _program(options, environ)
    legacy = () if options.use_env else ("--local-rank=${local_rank}",)
    template = (*leading, *legacy, *options.script_args)
    if options.run_path or not (options.module or options.no_python):
        # torch's launcher leaves this to Python, whose every rank then says it in its own way.
        scripts = {
            rank: str(substitute_macros([options.script], rank)[0]) for rank in range(workers)
        }
        _check_scripts(options.script, scripts, environ)
    return program, template


def _program(options: LaunchOptions, environ: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    if options.run_path:
        return sys.executable, ("-u", "-c", _RUN_PATH, options.script)
    if options.no_python:
        return options.script, ()
    python = environ.get("PYTHON_EXEC") or sys.executable
    return python, ("-u", "-m", options.script) if options.module else ("-u", options.script)


def _check_scripts(given: str, scripts: Mapping[int, str], environ: Mapping[str, str]) -> None:
    if environ.get("PYTHON_EXEC"):
        return  # it may be a wrapper that runs Python elsewhere, where the script is
    for rank, script in scripts.items():
        if script != "-" and not os.path.exists(script):
            whose = f"local rank {rank}: " if script != given else ""
            raise UsageError(f"{whose}no such script: {script!r}", hint=_instead(script))


def _instead(script: str) -> str:
    if os.path.isfile(f"{script}.py"):
        return f"there is {script}.py"
    if script == "view":
        return "python -m asupervise.view shows what a run has left"
    return "-m runs a module, --no-python a program that is found on PATH"


# --- their logs, binding, GPUs ---------------------------------------------------------------


def _logs_specs(options: LaunchOptions, workers: int) -> LogsSpecs:
    from asupervise.logs import Std, load_logs_specs, to_map

    ranks = options.local_ranks_filter
    redirects = _of_flag("--redirects", Std.from_str, options.redirects)
    tee = _of_flag("--tee", Std.from_str, options.tee)
    if options.tees_all:
        to_files, teed = to_map(redirects, workers), to_map(tee, workers)
        tee = {rank: teed[rank] | (Std.ALL & ~to_files[rank]) for rank in range(workers)}
    specs = _of_flag("--logs-specs", lambda _: load_logs_specs(options.logs_specs), "")
    return specs(
        log_dir=options.log_dir,
        redirects=redirects,
        tee=tee,
        local_ranks_filter=None if ranks is None else set(ranks),
    )


def _console(options: LaunchOptions) -> ConsoleFormat | None:
    """None for the default: what that needs is imported by whoever shows something."""
    asked: dict[str, Any] = {
        "color": options.color,
        "timestamps": options.timestamps,
        "log_format": options.log_format,
        "dedup": options.dedup,
    }
    if asked == {name: LaunchOptions._field_defaults[name] for name in asked}:
        return None
    from asupervise.formats import ConsoleFormat

    return ConsoleFormat(**asked)


def _numa_options(options: LaunchOptions) -> NumaOptions | None:
    if options.numa_binding is None:
        return None
    from asupervise.binding import AffinityMode, MemoryPolicy, NumaOptions

    memory = options.memory_binding
    policy = {} if memory is None else {"memory_policy": MemoryPolicy(memory)}
    return NumaOptions(
        affinity_mode=AffinityMode(options.numa_binding),
        should_fall_back_if_binding_fails=options.numa_binding_fallback,
        **policy,
    )


# --- their threads ---------------------------------------------------------------------------


def _threads(
    blueprint: Blueprint, request: Request, environ: Mapping[str, str]
) -> tuple[Threads, str]:
    """Each worker's fair share of the cores that it may run on, and why it is that."""
    if "OMP_NUM_THREADS" in environ:
        return None, f"OMP_NUM_THREADS={environ['OMP_NUM_THREADS']} (set by you)"
    workers = blueprint.nproc
    quota = cpus.cpu_quota()
    most = math.inf if quota is None else max(1, math.floor(quota / workers))
    if blueprint.arguments["numa_options"] is None:
        cores = cpus.count_cores(cpus.allowed_cpus())
        share = min(fair_share(cores, workers), most)
        limit = "" if quota is None else f", the cgroup grants {quota:g} CPUs"
        return int(share), f"OMP_NUM_THREADS={share} ({cores} cores for {workers}{limit})"
    shares = {
        rank: int(min(share, most))
        for rank, share in _bound_shares(blueprint, request, environ).items()
    }
    return shares, "OMP_NUM_THREADS: the share of the cores that each is bound to"


def _bound_shares(
    blueprint: Blueprint, request: Request, environ: Mapping[str, str]
) -> dict[int, int]:
    """By local rank: ranks that are bound to the same CPUs share those."""
    from asupervise.procs import plan_processes

    asked = blueprint.start_arguments(preview(request), environ)
    # Logs specs that were written for torch make their folders when they are asked for names.
    plan = plan_processes(**{**asked, "logs_specs": None})
    allowed = cpus.allowed_cpus()
    bound = [
        frozenset(worker.binding.cpus) if worker.binding else allowed for worker in plan.workers
    ]
    sharing = Counter(bound)
    return {rank: fair_share(cpus.count_cores(own), sharing[own]) for rank, own in enumerate(bound)}
