"""What it costs to be watched: the lines of `tee`, with and without those who consume a run."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import SUBJECT, Candidate, Case, Goal, Metric, Sample
from benchmarks.processes import PROGRAMS, Resident, drained_pipe, drained_terminal
from benchmarks.tee import write_lines
from benchmarks.topics import Setup, Topic

if TYPE_CHECKING:
    from asupervise import EventBus

_WITHOUT = "without"
# A line of JSON is twice as long as what is in it, which costs whatever makes it.
_AS_LONG = "without, a prefix as long"
_PREFIX_CHARS = 105
_WORKERS = 8
_TIME = Metric("time", "ms", 0)
_GOAL = 1.15
# Who consumes, under what name, what must be installed for it, and whether in a terminal.
_CASES = (
    ("events", "async for over ctx.events()", "", False),
    ("lines", "--events FILE", "", False),
    ("prometheus", "--metrics-port", "prometheus_client", False),
    ("otel", "OpenTelemetry, its API alone", "opentelemetry", False),
    ("json", "--log-format json", "", False),
    ("live", "--live", "rich", True),
)


# --- inside the candidates' processes -------------------------------------------------------------


async def run(request: dict[str, Any]) -> Sample:
    """A group whose lines are shown, from its start until all is on the console."""
    from asupervise import ConsoleFormat, DefaultLogsSpecs, EventBus, Std, start_processes

    ranks = range(_WORKERS)
    worker = (sys.executable, "-I", "-S", str(PROGRAMS / "blast.py"))
    words = (request["data"], request["times"])
    form = ConsoleFormat(log_format="json" if request["who"] == "json" else "text")
    prefixes = {rank: f"[bench{rank}]:".ljust(request.get("prefix", 0)) for rank in ranks}
    bus = EventBus()
    async with _consumed(request, bus):
        start_ns = time.monotonic_ns()
        async with start_processes(
            *("bench", worker, {rank: words for rank in ranks}, {rank: {} for rank in ranks}),
            DefaultLogsSpecs(tee=Std.OUT),
            log_line_prefixes=prefixes,
            console=form,
            events=bus,
        ) as ctx:
            result = await ctx.wait()
        bus.close()
    # Those who consume have come to their ends as well.
    elapsed_ms = (time.monotonic_ns() - start_ns) / 1e6
    if result.is_failed():
        raise RuntimeError("a worker has failed")
    return {_TIME.name: elapsed_ms}


@asynccontextmanager
async def _consumed(request: dict[str, Any], bus: EventBus) -> AsyncIterator[None]:
    """As the command line has it, or an application."""
    import asyncio

    from asupervise import handle_events, live_view

    who = request["who"]
    async with AsyncExitStack() as stack:
        if who == "events":
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            tasks.create_task(_count(bus))
        elif who == "lines":
            from asupervise.exporters.lines import lines_to

            await stack.enter_async_context(handle_events(bus, lines_to(request["file"])))
        elif who == "otel":
            from asupervise.exporters.otel import OtelExporter

            await stack.enter_async_context(handle_events(bus, OtelExporter()))
        elif who == "prometheus":
            from asupervise.exporters.prometheus import PrometheusExporter, own_registry

            exporter = PrometheusExporter(own_registry())
            await stack.enter_async_context(handle_events(bus, exporter))
        elif who == "live" and await stack.enter_async_context(live_view(bus)) is None:
            raise RuntimeError("there is no terminal")
        yield


async def _count(bus: EventBus) -> None:
    kinds = [event.kind async for event in bus.subscribe()]
    if kinds.count("worker_exited") != _WORKERS:
        raise RuntimeError(f"events are missing: {kinds}")


# --- the comparison -------------------------------------------------------------------------------


def _cases(setup: Setup) -> Iterator[Case]:
    data = write_lines(setup.scratch / "consumed-lines", 5_000 if setup.quick else 50_000)
    for who, name, package, in_terminal in _CASES:
        if package and importlib.util.find_spec(package) is None:
            setup.left_out.add(f"consumers, {name}: {package} is not installed")
            continue
        with ExitStack() as stack:
            yield _case(setup, stack, who, name, data, in_terminal=in_terminal)


def _case(
    setup: Setup, stack: ExitStack, who: str, name: str, data: Path, *, in_terminal: bool
) -> Case:
    # A terminal takes a tenth of what a pipe takes.
    times = 1 if setup.quick else 2 if in_terminal else 8
    request = {"data": str(data), "times": times, "file": str(setup.scratch / "events.jsonl")}
    asked: dict[str, dict[str, Any]] = {_WITHOUT: {"who": ""}, SUBJECT: {"who": who}}
    if who == "json":
        asked[_AS_LONG] = {"who": "", "prefix": _PREFIX_CHARS}
    sink = stack.enter_context(drained_terminal() if in_terminal else drained_pipe())
    candidates = []
    for candidate, more in asked.items():
        resident = Resident("consumers:run", stdout=sink, env={"TERM": "xterm-256color"})
        stack.enter_context(resident)
        candidates.append(Candidate(candidate, partial(resident.ask, {**request, **more})))
    against = _AS_LONG if who == "json" else _WITHOUT
    return Case(
        name=name,
        group=f"with, and without; to a {'terminal' if in_terminal else 'pipe'}",
        metrics=[_TIME],
        candidates=candidates,
        limit=_WITHOUT,
        goals=[Goal(_TIME.name, "<=", _GOAL, against=against)],
        rounds=setup.rounds(7),
    )


TOPIC = Topic(
    name="consumers",
    title=f"{_WORKERS} workers write lines of 100 bytes as fast as they can, and somebody consumes "
    "the run: from their start until all is on the console and whoever consumes has come to his "
    "end",
    limit="the same, while nobody consumes it",
    cases=_cases,
    notes=(
        "400,000 lines a worker to a pipe that cat empties; 100,000 to a terminal of 80 by 24 that "
        "cat empties.",
        "All are calls in a warm process.",
        "Each line of --log-format json is 205 bytes long; its goal is held against lines with a "
        "prefix that makes them as long.",
    ),
)
