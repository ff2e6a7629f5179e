"""`launch`: a job on this node as one of a run's agents, and what it returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from asupervise.bus import EventBus
from asupervise.elastic.agent import Outcome, by_global_rank
from asupervise.elastic.blueprint import Blueprint
from asupervise.elastic.config import LaunchConfig, Place
from asupervise.elastic.culprits import failure_of
from asupervise.elastic.meeting import random_id
from asupervise.elastic.node import own_gpus, this_node
from asupervise.elastic.rendezvous import Request
from asupervise.elastic.running import run, serve
from asupervise.errors import SupervisorError
from asupervise.failures import ProcessFailure
from asupervise.logs import DefaultLogsSpecs
from asupervise.result import ChildFailedError

__all__ = ["RunError", "failures_of", "launch"]


class RunError(SupervisorError):
    """The run has ended without success though no worker has failed: too few nodes, mostly.

    Its message says why, as the node that decided has written it down.
    """


async def launch(
    config: LaunchConfig,
    entrypoint: str | Sequence[str] | Callable[..., Any],
    *args: Any,
    events: EventBus | None = None,
) -> dict[int, Any]:
    """Run a job on this node, with the other nodes of its run.

    Restarts, rounds and rendezvous are the config's; cancelling ends this node's workers and
    takes it out of the run. Each worker gets the same arguments.

    Args:
        config: how.
        entrypoint: a program or a callable, as in `start_processes`.
        args: its arguments. In those of a program, ``${local_rank}``, ``${rank}``,
            ``${world_size}`` and ``${local_world_size}`` are filled in for each worker, and ``$$``
            stands for ``$``, as on the command line and in torch; a program's own words, where
            `entrypoint` is a sequence, and a callable's arguments are left alone.
        events: a bus that is told what happens; it stays open.

    Returns:
        What this node's workers returned, by global rank; None for programs.

    Raises:
        ChildFailedError: if the job failed: with this node's failures, and the root cause of the
            whole run wherever that was.
        RunError: if it ended for want of nodes.
        SupervisorError, ValueError, OSError: if it could not be run.

    Example::

        config = LaunchConfig(1, 1, 4, max_restarts=3)
        values = await launch(config, train, "data.bin")
    """
    request = _request(config)
    blueprint = Blueprint(
        nproc=config.nproc_per_node,
        run_id=request.run_id,
        role=config.role,
        entrypoint=entrypoint,
        args=args,
        arguments={
            # One for all attempts: so their files lie in one folder.
            "logs_specs": config.logs_specs or DefaultLogsSpecs(),
            "start_method": config.start_method,
            "numa_options": config.numa_options,
            "duplicate_stdout_filters": config.duplicate_stdout_filters,
            "duplicate_stderr_filters": config.duplicate_stderr_filters,
            "preload": config.preload,
            "shutdown_timeout": config.shutdown_timeout,
            "hang_timeout": config.hang_timeout,
            "console": config.console,
        },
        max_restarts=config.max_restarts,
        master_addr=request.master_addr,
        prefix_template=config.log_line_prefix_template,
        gpu_visibility=(
            own_gpus(config.nproc_per_node, os.environ) if config.virtual_local_rank else {}
        ),
        virtual_local_rank=config.virtual_local_rank,
    )
    told: dict[str, Any] = {"events": events, "report": config.report}
    if config.restart == "worker":
        outcome = await serve(blueprint, request, within_s=config.restart_within, **told)
    else:
        outcome = await run(blueprint, config.rdzv_backend, request, **told)
    return _values(outcome, _title(entrypoint))


def _title(entrypoint: str | Sequence[str] | Callable[..., Any]) -> str:
    if isinstance(entrypoint, str):
        return entrypoint
    if callable(entrypoint):
        return getattr(entrypoint, "__qualname__", repr(entrypoint))
    return " ".join(entrypoint)


def _request(config: LaunchConfig) -> Request:
    static = config.rdzv_backend == "static"
    place = Place(config.node_rank, config.master_addr, config.master_port)
    if static:
        place = config.static_place
    nameless = "none" if config.max_nodes > 1 else random_id()
    node = this_node(
        config.nproc_per_node,
        address=config.local_addr,
        endpoint="" if static else config.rdzv_endpoint,
        role=config.role,
        node_rank=place.node_rank,
    )
    return Request(
        run_id=config.run_id or nameless,
        node=node,
        terms=config.terms,
        policy=config.policy,
        endpoint=config.rdzv_endpoint,
        conf={key: str(value) for key, value in config.rdzv_configs.items()},
        master_addr=place.master_addr,
        master_port=place.master_port,
    )


def failures_of(outcome: Outcome) -> dict[int, ProcessFailure]:
    """The failures that this node knows of, by global rank: its own, and the run's root cause."""
    failures: dict[int, ProcessFailure] = {}
    culprit = outcome.culprit
    standing = outcome.standing
    if outcome.result is not None and standing is not None:
        failures = by_global_rank(outcome.result.failures, standing)
    if culprit is not None and culprit.rank not in failures:
        failures[culprit.rank] = failure_of(culprit)
    return failures


def _values(outcome: Outcome, name: str) -> dict[int, Any]:
    round = outcome.round
    if round is None or not round.succeeded:
        if failures := failures_of(outcome):
            culprit = outcome.culprit
            rank = culprit.rank if culprit else None
            log_dir = outcome.result.log_dir if outcome.result is not None else None
            error = ChildFailedError(name, failures, culprit=rank, log_dir=log_dir)
            if round is not None and round.why not in ("", f"rank {rank} failed"):
                error.add_note(f"no restart: {round.why}")
            raise error
        raise RunError(round.why if round is not None else "this node has left the run")
    if outcome.result is None or outcome.standing is None:
        return {}
    return by_global_rank(outcome.result.return_values, outcome.standing)
