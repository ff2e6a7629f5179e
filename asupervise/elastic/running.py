"""Run a blueprint's groups in the rounds of a run, with whatever backend."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Final

from asupervise.bus import EventBus
from asupervise.elastic.agent import NO_HOOKS, Agent, Hooks, Outcome, Standing, Starting
from asupervise.elastic.blueprint import Blueprint
from asupervise.elastic.gate import Gate, nvml_memory
from asupervise.elastic.ports import HeldPort
from asupervise.elastic.rendezvous import Opener, Request
from asupervise.elastic.telling import RunTeller
from asupervise.errors import NotSupportedError
from asupervise.procs import PContext, start_processes
from asupervise.recording import Recorder
from asupervise.shielding import run_in_any_case

if TYPE_CHECKING:
    from asupervise.elastic.services import OnRestart
    from asupervise.signals import Signalled

__all__ = ["BACKENDS", "opener_of", "run", "serve"]

BACKENDS: Final = ("static", "env", "etcd", "c10d")
_ENTRY_POINT_GROUP: Final = "asupervise.rendezvous"


def opener_of(backend: str) -> Opener:
    """What opens the rendezvous of that name.

    Raises:
        NotSupportedError: if there is none, naming those that there are.
    """
    if backend in BACKENDS:
        opener: Opener = import_module(f"asupervise.elastic.rendezvous.{backend}").open
        return opener
    # Imported here: it takes as long as all of ours.
    from importlib.metadata import entry_points

    points = entry_points(group=_ENTRY_POINT_GROUP)
    for point in points.select(name=backend):
        loaded: Opener = point.load()
        return loaded
    known = ", ".join([*BACKENDS, *sorted(points.names)])
    raise NotSupportedError(f"there is no rendezvous backend {backend!r}; known: {known}")


async def serve(
    blueprint: Blueprint,
    request: Request,
    hooks: Hooks = NO_HOOKS,
    *,
    within_s: float = 60.0,
    on_restart: OnRestart | None = None,
    events: EventBus | None = None,
    report: bool = True,
) -> Outcome:
    """Keep services up on this node: one worker is started anew, and the others go on.

    Args:
        blueprint: what this node starts.
        request: whose policy and terms say when to give up.
        hooks: who wants to hear of it.
        within_s: `max_restarts` are so many within so many seconds.
        on_restart: see `run_services`.
        events: a bus that is told what happens.
        report: as in `start_processes`.

    Raises:
        NotSupportedError: for more than one node.
        SupervisorError, ValueError, OSError: if they cannot be started.
    """
    from asupervise.elastic.node import preview
    from asupervise.elastic.services import run_services

    if request.terms.max_nodes > 1:
        raise NotSupportedError("--restart worker: services run on one node each")
    with HeldPort() as port:
        asked = request._replace(master_port=request.master_port or port.number)
        standing = preview(asked)
        arguments = blueprint.start_arguments(standing, os.environ)
        arguments.pop("subreaper", None)
        async with run_services(
            **arguments,
            max_restarts=request.terms.max_restarts,
            within_s=within_s,
            policy=request.policy,
            on_restart=on_restart,
            events=events,
            report=report,
        ) as services:
            hooks.on_group(services)
            result = await services.wait()
    cause = result.root_cause
    over = standing.round._replace(
        state="over", succeeded=not result.is_failed(), why=cause[1].note if cause else ""
    )
    return Outcome(over, result, standing)


async def run(
    blueprint: Blueprint,
    backend: str,
    request: Request,
    hooks: Hooks = NO_HOOKS,
    *,
    events: EventBus | None = None,
    report: bool = True,
) -> Outcome:
    """Take part in a run until it is over.

    Args:
        blueprint: what this node starts.
        backend: how the nodes come together.
        request: what the backend is given.
        hooks: who wants to hear of it.
        events: a bus that is told what happens.
        report: as in `start_processes`, of all groups together.

    Raises:
        SupervisorError, ValueError, OSError: if the rendezvous or a group is not possible.
    """
    told = RunTeller(EventBus(parent=events), request.run_id, request.terms.max_restarts)
    recorder = Recorder(told.bus)

    def on_group(ctx: Signalled | None) -> None:
        if report and isinstance(ctx, PContext):
            recorder.attend(ctx.plan.logs)
        hooks.on_group(ctx)

    try:
        outcome = await _run(blueprint, backend, request, hooks._replace(on_group=on_group), told)
    except BaseException as exc:
        told.broke_off(exc)
        await run_in_any_case(recorder.finish)
        raise
    told.ended(outcome.round, outcome.culprit, outcome.result, hooks.stopped_by())
    if problem := await recorder.finish():
        hooks.on_warning(problem)
    return outcome


async def _run(
    blueprint: Blueprint, backend: str, request: Request, hooks: Hooks, told: RunTeller
) -> Outcome:
    def start(standing: Standing) -> Starting:
        arguments = blueprint.start_arguments(standing, os.environ)
        return start_processes(**arguments, events=told.bus, report=False)

    fixed = backend in ("static", "env")
    gate = Gate(
        max_restarts=request.terms.max_restarts,
        port=request.master_port or None,
        # Where there will be no other group nobody looks.
        memory=nvml_memory if request.terms.max_restarts or not fixed else lambda: None,
        on_warning=hooks.on_warning,
    )

    async with opener_of(backend)(request) as rendezvous:
        agent = Agent(
            rendezvous,
            start,
            shutdown_timeout_s=blueprint.arguments.get("shutdown_timeout", 30.0),
            hooks=hooks,
            fixed_port=request.master_port or None,
            gate=gate,
            told=told,
        )
        return await agent.run()
