"""OpenTelemetry: what spans real groups make, seen through the SDK."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from asupervise import (
    ChildFailedError,
    DefaultLogsSpecs,
    EventBus,
    LaunchConfig,
    Std,
    handle_events,
    launch,
    run_services,
    start_processes,
)
from asupervise.elastic.decide import Policy
from asupervise.events import Event, Heartbeat, Progress, WorkerStarted
from asupervise.exporters.otel import OtelExporter
from tests.conftest import Run
from tests.workers import SH, shell, start

COUNT = "$TORCHELASTIC_RESTART_COUNT"
QUICK: dict[str, Any] = {"min_uptime": 0, "restart_backoff": 0}

pytestmark = pytest.mark.usefixtures("own_temporary_folder")


class Traced:
    """A tracer provider in memory.

    Attributes:
        provider: to be given to an exporter.
    """

    def __init__(self) -> None:
        self._memory = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._memory))

    def spans(self, name: str = "") -> list[ReadableSpan]:
        """The finished ones, in the order of their starts."""
        found = sorted(self._memory.get_finished_spans(), key=lambda span: span.start_time or 0)
        return [span for span in found if not name or span.name == f"asupervise.{name}"]

    def exporter(self) -> OtelExporter:
        return OtelExporter(self.provider)


@pytest.fixture
def traced() -> Traced:
    return Traced()


def of(span: ReadableSpan, *names: str) -> list[Any]:
    attributes = span.attributes or {}
    return [attributes.get(name) for name in names]


def parent(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


def span_id(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.span_id


def events_of(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]


# --- spans of real groups -------------------------------------------------------------------------


async def test_a_run_has_a_span_with_its_groups_and_workers_below(traced: Traced) -> None:
    bus = EventBus()
    config = LaunchConfig(1, 1, 2, max_restarts=1, run_id="job-7", role="trainer", **QUICK)
    script = f"[ {COUNT} = 1 ] || {{ [ $RANK = 0 ] && exit 3; exec sleep 1000; }}"
    async with handle_events(bus, traced.exporter()):
        await launch(config, SH, script, events=bus)
    (run,) = traced.spans("run")
    first, second = traced.spans("group")
    workers = traced.spans("worker")
    assert parent(run) is None
    assert [parent(group) for group in (first, second)] == [span_id(run)] * 2
    assert [parent(worker) for worker in workers] == [span_id(first)] * 2 + [span_id(second)] * 2
    assert len({span.get_span_context().trace_id for span in traced.spans()}) == 1

    assert of(run, "asupervise.run_id", "asupervise.exit_status") == ["job-7", 0]
    assert run.status.status_code is StatusCode.UNSET
    assert events_of(run) == ["round_completed", "restarting", "round_completed"]
    restarting = run.events[1]
    assert restarting.attributes is not None
    assert restarting.attributes["reason"] == "rank 0 failed: restart 1 of 1"
    for attempt, group in enumerate((first, second)):
        assert of(group, "asupervise.group", "asupervise.attempt", "asupervise.nprocs") == [
            "trainer", attempt, 2,
        ]  # fmt: skip
    assert [group.status.status_code for group in (first, second)] == [
        StatusCode.ERROR, StatusCode.UNSET,
    ]  # fmt: skip
    assert first.status.description == "rank 0 failed"
    assert of(first, "asupervise.root_cause") == [0]
    assert events_of(first) == ["signal_sent"]
    for span in traced.spans():
        assert of(span, "host.name") == [os.uname().nodename]
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.end_time >= span.start_time
    assert run.start_time is not None
    assert first.start_time is not None
    assert run.start_time <= first.start_time


async def test_a_workers_span_is_as_long_as_its_process(traced: Traced) -> None:
    bus = EventBus()
    group = start(None, "true", "exit 3", events=bus)
    async with handle_events(bus, traced.exporter()), group as ctx:
        result = await ctx.wait()
        pids = ctx.pids()
    assert result is not None
    for event in bus.subscribe().take():
        if isinstance(event, WorkerStarted):
            span = traced.spans("worker")[event.local_rank]
            assert span.start_time == round(event.time * 1e9)
            assert of(span, "asupervise.rank", "process.pid") == [event.rank, pids[event.rank]]
            assert of(span, "process.command") == ["/bin/sh"]
            assert list(of(span, "process.command_args")[0]) == list(event.argv)
    failed = traced.spans("worker")[1]
    assert failed.end_time == pytest.approx(result.failures[1].observed_at * 1e9, abs=1e6)
    assert of(failed, "process.exit.code", "error.type") == [3, "3"]
    assert failed.status.description == "exit code 3"
    # No run: the group is the outermost.
    assert traced.spans("run") == []
    assert parent(traced.spans("group")[0]) is None


async def test_an_exception_is_that_of_the_span(traced: Traced, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent("""
        from asupervise import record
        @record
        def main():
            print("on stderr", file=__import__("sys").stderr)
            raise LookupError("no luck:\\nnone at all")
        main()
    """)
    )
    bus = EventBus()
    logs = DefaultLogsSpecs(redirects=Std.ALL)
    group = start_processes("t", (sys.executable, str(script)), {0: ()}, {0: {}}, logs, events=bus)
    async with handle_events(bus, traced.exporter()), group as ctx:
        await ctx.wait()
    (worker,) = traced.spans("worker")
    assert worker.status.status_code is StatusCode.ERROR
    assert worker.status.description == "LookupError: no luck:"
    assert events_of(worker) == ["first_output", "exception"]
    exception = dict(worker.events[1].attributes or {})
    assert exception["exception.type"] == "LookupError"
    assert exception["exception.message"] == "LookupError: no luck:\nnone at all"
    assert str(exception["exception.stacktrace"]).startswith("Traceback")
    assert worker.events[1].timestamp == worker.end_time
    assert of(worker, "error.type", "asupervise.root_cause") == ["LookupError", True]
    assert "on stderr" in of(worker, "asupervise.stderr_tail")[0]


async def test_who_was_ended_by_us_is_no_error(traced: Traced) -> None:
    bus = EventBus()
    group = start(None, "exec sleep 1000", "kill -9 $$", events=bus)
    async with handle_events(bus, traced.exporter()), group as ctx:
        await ctx.wait()
    ended, failed = traced.spans("worker")
    assert ended.status.status_code is StatusCode.UNSET
    assert of(ended, "asupervise.ended_by_us", "process.exit.code", "error.type") == [
        True, -15, None,
    ]  # fmt: skip
    assert failed.status.status_code is StatusCode.ERROR
    assert of(failed, "asupervise.signal", "error.type") == ["SIGKILL", "SIGKILL"]
    assert failed.status.description is not None
    assert failed.status.description.startswith("SIGKILL from outside")


async def test_a_run_that_fails_is_an_error(traced: Traced) -> None:
    bus = EventBus()
    async with handle_events(bus, traced.exporter()):
        with pytest.raises(ChildFailedError):
            await launch(LaunchConfig(1, 1, 1, max_restarts=0, **QUICK), SH, "exit 3", events=bus)
    (run,) = traced.spans("run")
    assert run.status.status_code is StatusCode.ERROR
    assert run.status.description == "rank 0 failed"
    assert of(run, "asupervise.exit_status", "asupervise.root_cause") == [3, 0]


async def test_each_start_of_a_service_has_a_span(traced: Traced) -> None:
    bus = EventBus()
    async with handle_events(bus, traced.exporter()), run_services(
        **shell(None, ["exec sleep 1000", "exit 3"]), events=bus, max_restarts=2,
        policy=Policy(backoff_s=0.0, min_uptime_s=0.0),
    ) as services:  # fmt: skip
        await services.wait()
    (group,) = traced.spans("group")
    assert group.status.status_code is StatusCode.ERROR
    assert events_of(group).count("restarting") == 2
    workers = [span for span in traced.spans("worker") if of(span, "asupervise.rank") == [1]]
    assert [of(span, "asupervise.attempt") for span in workers] == [[0], [1], [2]]
    assert {parent(span) for span in workers} == {span_id(group)}


async def test_spans_are_children_of_the_callers_own(traced: Traced) -> None:
    bus = EventBus()
    tracer = traced.provider.get_tracer("a web app")
    with tracer.start_as_current_span("request") as request:
        async with handle_events(bus, traced.exporter()), start(None, "true", events=bus) as ctx:
            await ctx.wait()
    (group,) = traced.spans("group")
    assert parent(group) == request.get_span_context().span_id


async def test_groups_at_the_same_time_are_told_apart(traced: Traced) -> None:
    bus = EventBus()
    async with handle_events(bus, traced.exporter()):
        groups = [
            start_processes(name, SH, {0: ("true",), 1: ("true",)}, {0: {}, 1: {}}, events=bus)
            for name in ("a", "b")
        ]
        async with groups[0] as first, groups[1] as second:
            await first.wait()
            await second.wait()
    names = {span_id(span): of(span, "asupervise.group")[0] for span in traced.spans("group")}
    assert sorted(names.values()) == ["a", "b"]
    for worker in traced.spans("worker"):
        assert [names[parent(worker) or 0]] == of(worker, "asupervise.group")


# --- events, alone --------------------------------------------------------------------------------

COMMON: dict[str, Any] = {"run_id": "job", "group": "t", "node": "n", "time": 10.0}


def event(kind: str, at: float = 10.0, **fields: Any) -> Event:
    from asupervise import events

    made: Event = getattr(events, kind)(
        monotonic_ns=int(at * 1e9), **{**COMMON, "time": at, **fields}
    )
    return made


def handled(traced: Traced, told: Sequence[Event]) -> None:
    exporter = traced.exporter()
    for each in told:
        exporter.handle(each)
    exporter.close()


WORKER = {"local_rank": 0, "rank": 4, "pid": 17}


def test_what_has_not_ended_ends_with_the_exporter(traced: Traced) -> None:
    handled(traced, [
        event("RoundCompleted", group="", round=0),
        event("GroupStarting", 11.0, nprocs=1),
        event("WorkerStarted", 12.0, **WORKER),
        event("Heartbeat", 13.0, **WORKER),
    ])  # fmt: skip
    assert [span.name for span in traced.spans()] == [
        "asupervise.run", "asupervise.group", "asupervise.worker",
    ]  # fmt: skip
    assert {span.end_time for span in traced.spans()} == {13 * 10**9}


def test_a_stream_that_is_joined_in_the_middle(traced: Traced) -> None:
    handled(traced, [
        event("WorkerExited", exitcode=3, uptime_s=1.0, **WORKER),
        event("WorkerFailed", exitcode=3, **WORKER),
        event("SignalSent", signal="SIGTERM", ranks=(0, 1)),
        event("Warned", text="x"),
        event("GroupEnded", succeeded=False),
    ])  # fmt: skip
    assert traced.spans() == []


def test_progress_is_an_attribute_and_heartbeats_are_nothing(traced: Traced) -> None:
    beats = [event("Heartbeat", 12.0, **WORKER) for _ in range(500)]
    steps = [event("Progress", 12.0, done=float(n), total=100.0, **WORKER) for n in range(500)]
    handled(traced, [event("WorkerStarted", **WORKER), *beats, *steps])
    (worker,) = traced.spans("worker")
    assert of(worker, "asupervise.progress.done", "asupervise.progress.total") == [499.0, 100.0]
    assert events_of(worker) == []
    assert isinstance(beats[0], Heartbeat)
    assert isinstance(steps[0], Progress)


def test_events_of_a_group_are_events_of_its_span(traced: Traced) -> None:
    handled(traced, [
        event("GroupStarting", nprocs=2, log_dir="/logs"),
        event("SignalSent", signal="SIGTERM", ranks=(0, 1), why="ending"),
        event("StacksDumped", stacks={0: "in f", 1: "in g"}),
        event("Escalated", ranks=(1,)),
        event("Warned", text="something"),
        event("GroupEnded", succeeded=False, root_cause=None),
    ])  # fmt: skip
    (group,) = traced.spans("group")
    told = {each.name: dict(each.attributes or {}) for each in group.events}
    assert told == {
        "signal_sent": {"signal": "SIGTERM", "ranks": (0, 1), "why": "ending"},
        "stacks_dumped": {"stacks": ("0: in f", "1: in g")},
        "escalated": {"signal": "SIGKILL", "ranks": (1,)},
        "warned": {"text": "something"},
    }
    assert of(group, "asupervise.log_dir") == ["/logs"]
    assert group.status.status_code is StatusCode.ERROR


def test_attributes_have_names_of_the_semantic_conventions(traced: Traced) -> None:
    from opentelemetry.semconv._incubating.attributes import process_attributes as process
    from opentelemetry.semconv.attributes import error_attributes, exception_attributes

    handled(traced, [
        event("GroupStarting", nprocs=1),
        event("WorkerStarted", argv=("/bin/x", "y"), **WORKER),
        event("WorkerExited", exitcode=1, uptime_s=1.0, **WORKER),
        event("WorkerFailed", exitcode=1, message="E: x", traceback="Traceback", **WORKER),
    ])  # fmt: skip
    (worker,) = traced.spans("worker")
    conventional = {
        process.PROCESS_PID, process.PROCESS_COMMAND, process.PROCESS_COMMAND_ARGS,
        process.PROCESS_EXIT_CODE, error_attributes.ERROR_TYPE, "host.name",
    }  # fmt: skip
    assert {n for n in worker.attributes or {} if not n.startswith("asupervise.")} == conventional
    assert set(worker.events[0].attributes or {}) == {
        exception_attributes.EXCEPTION_TYPE, exception_attributes.EXCEPTION_MESSAGE,
        exception_attributes.EXCEPTION_STACKTRACE,
    }  # fmt: skip


# --- the command line -----------------------------------------------------------------------------


def test_the_command_line_with_a_provider_of_the_environments(run_cli: Run, tmp_path: Path) -> None:
    """As ``opentelemetry-instrument`` does it: by a sitecustomize in front of it."""
    spans = tmp_path / "spans"
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
        provider = TracerProvider()
        exporter = ConsoleSpanExporter(
            out=open({str(spans)!r}, "a"),
            formatter=lambda span: span.to_json(indent=None) + "\\n",
        )
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
    """)
    )
    done = run_cli("--event-log-handler", "otel", "--nproc-per-node", 2, "--no-python",
                   "sh", "-c", "exit ${rank}", env={"PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert done.returncode == 1
    assert b"warning" not in done.stderr
    found = [json.loads(line) for line in spans.read_text().splitlines()]
    assert sorted(span["name"] for span in found) == [
        "asupervise.group", "asupervise.run", "asupervise.worker", "asupervise.worker",
    ]  # fmt: skip
    status = {span["name"]: span["status"]["status_code"] for span in found}
    assert status["asupervise.run"] == "ERROR"


def test_without_a_provider_it_is_said_that_spans_go_nowhere(run_cli: Run) -> None:
    done = run_cli("--event-log-handler", "otel", "--no-python", "true")
    assert done.returncode == 0
    (warning,) = done.stderr.decode().splitlines()
    assert warning.startswith("warning: --event-log-handler otel: no tracer provider is set up")


def test_without_the_extra_the_hint_is_to_install_it(run_cli: Run, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None; "
        "from asupervise.cli import main; exit(main())"
    )
    started = tmp_path / "started"
    done = run_cli("--event-log-handler", "otel", "--no-python", "touch", started,
                   command=(sys.executable, "-c", code))  # fmt: skip
    assert done.stderr.decode().splitlines() == [
        "error: otel needs the package opentelemetry-api",
        "hint: pip install 'asupervise[otel]'",
    ]
    assert done.returncode == 2
    assert not started.exists()
