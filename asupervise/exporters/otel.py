"""Events as OpenTelemetry spans: a run, its attempts, their workers. Needs the extra ``otel``.

Only the API is used: what becomes of the spans is decided by the program that sets up an SDK, or by
``opentelemetry-instrument`` around the command line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.trace import Span, Status, StatusCode

import asupervise
from asupervise import events
from asupervise.events import Event, WorkerEvent

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import TracerProvider

__all__ = ["OtelExporter"]

# Of each worker's standard error in an attribute.
_TAIL_CHARS: Final = 4096
_EXCEPTION: Final = re.compile(r"([A-Za-z_][\w.]*)(?::|$)")

Attributes = Mapping[str, "str | bool | int | float | Sequence[str] | Sequence[int]"]


class OtelExporter:
    """An event handler (see `handle_events`) that makes spans.

    ``asupervise.run`` spans `launch` or the command line, ``asupervise.group`` each group of
    workers, ``asupervise.worker`` each worker; a group without a run has no span above it. A worker
    that failed by itself has the status ERROR and its exception; so have its group and its run.

    Args:
        tracer_provider: by default the global one.
        context: whose span the outermost ones are children of; by default the current one.

    Example::

        async with handle_events(bus, OtelExporter()):
            async with start_processes("trainer", "./train", args, envs, events=bus) as ctx:
                await ctx.wait()
    """

    def __init__(
        self, tracer_provider: TracerProvider | None = None, context: Context | None = None
    ) -> None:
        self._tracer = trace.get_tracer("asupervise", asupervise.__version__, tracer_provider)
        self._context = contexts.get_current() if context is None else context
        # By run; by run and group; and by local rank as well.
        self._runs: dict[str, Span] = {}
        self._groups: dict[tuple[str, str], Span] = {}
        self._workers: dict[tuple[str, str, int], _Worker] = {}
        self._last_ns = 0

    @staticmethod
    def is_set_up() -> bool:
        """Whether there is a tracer provider, and spans go anywhere."""
        return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)

    def handle(self, event: Event) -> None:
        """Begin, add to, or end a span."""
        self._last_ns = _ns(event)
        if isinstance(event, WorkerEvent):
            self._of_worker(event)
        elif isinstance(event, events.GroupStarting):
            self._group_starts(event)
        elif isinstance(event, events.GroupEnded):
            self._group_ends(event)
        elif isinstance(event, events.RunEnded):
            self._run_ends(event)
        else:
            span = (
                self._groups.get((event.run_id, event.group)) if event.group else self._run(event)
            )
            _add(span, event)

    def close(self) -> None:
        """End what has not ended."""
        for worker in self._workers.values():
            worker.end(self._last_ns)
        for span in (*self._groups.values(), *self._runs.values()):
            span.end(self._last_ns)
        self._workers.clear()
        self._groups.clear()
        self._runs.clear()

    # --- runs and groups ------------------------------------------------------------------------

    def _run(self, event: Event) -> Span:
        """The run's span, begun with the first that is told of it."""
        span = self._runs.get(event.run_id)
        if span is None:
            span = self._tracer.start_span(
                "asupervise.run", self._context, attributes=_ids(event), start_time=_ns(event)
            )
            self._runs[event.run_id] = span
        return span

    def _run_ends(self, event: events.RunEnded) -> None:
        span = self._run(event)
        span.set_attribute("asupervise.exit_status", event.exit_status)
        if not event.succeeded:
            _fail(span, event.why, event.root_cause)
        span.end(_ns(event))
        del self._runs[event.run_id]

    def _group_starts(self, event: events.GroupStarting) -> None:
        run = self._runs.get(event.run_id)
        above = self._context if run is None else trace.set_span_in_context(run, self._context)
        attributes = {
            **_ids(event),
            "asupervise.nprocs": event.nprocs,
            "asupervise.entrypoint": event.entrypoint,
            **({"asupervise.log_dir": event.log_dir} if event.log_dir else {}),
        }
        self._groups[event.run_id, event.group] = self._tracer.start_span(
            "asupervise.group", above, attributes=attributes, start_time=_ns(event)
        )

    def _group_ends(self, event: events.GroupEnded) -> None:
        key = event.run_id, event.group
        for worker in [worker for worker in self._workers if worker[:2] == key]:
            self._workers.pop(worker).end(_ns(event))
        if (span := self._groups.pop(key, None)) is None:
            return
        if not event.succeeded:
            cause = event.root_cause
            _fail(span, "" if cause is None else f"rank {cause} failed", cause)
        span.end(_ns(event))

    # --- workers --------------------------------------------------------------------------------

    def _of_worker(self, event: WorkerEvent) -> None:
        key = event.run_id, event.group, event.local_rank
        if isinstance(event, events.WorkerStarted):
            if (former := self._workers.get(key)) is not None:
                former.end(_ns(event))
            self._workers[key] = self._started(event)
        elif (worker := self._workers.get(key)) is not None:
            worker.hear(event)
            if worker.is_known:
                self._workers.pop(key).end(_ns(event))

    def _started(self, event: events.WorkerStarted) -> _Worker:
        group = self._groups.get((event.run_id, event.group))
        above = self._context if group is None else trace.set_span_in_context(group, self._context)
        attributes: dict[str, str | int | Sequence[str]] = {
            **_ids(event),
            "asupervise.rank": event.rank,
            "asupervise.local_rank": event.local_rank,
            "process.pid": event.pid,
        }
        if event.argv:
            attributes["process.command"] = event.argv[0]
            attributes["process.command_args"] = event.argv
        if event.binding:
            attributes["asupervise.binding"] = event.binding
        return _Worker(
            self._tracer.start_span(
                "asupervise.worker", above, attributes=attributes, start_time=_ns(event)
            )
        )


class _Worker:
    """A worker's span. It ends with the process, but why that failed is told later.

    Attributes:
        is_known: whether all is.
    """

    def __init__(self, span: Span) -> None:
        self._span = span
        self._exited_ns: int | None = None
        self.is_known = False

    def hear(self, event: WorkerEvent) -> None:
        if isinstance(event, events.FirstOutput):
            self._span.add_event("first_output", {"stream": event.stream}, _ns(event))
        elif isinstance(event, events.Progress):
            # The latest, and no event each time: an SDK keeps few of those a span.
            self._span.set_attribute("asupervise.progress.done", event.done)
            if event.total is not None:
                self._span.set_attribute("asupervise.progress.total", event.total)
        elif isinstance(event, events.WorkerExited):
            self._exited(event)
        elif isinstance(event, events.WorkerFailed):
            self._failed(event)

    def _exited(self, event: events.WorkerExited) -> None:
        self._exited_ns = _ns(event)
        self.is_known = event.exitcode == 0
        self._span.set_attribute("process.exit.code", event.exitcode)
        if event.peak_rss_bytes is not None:
            self._span.set_attribute("asupervise.peak_rss_bytes", event.peak_rss_bytes)

    def _failed(self, event: events.WorkerFailed) -> None:
        self.is_known = True
        span = self._span
        span.set_attribute("asupervise.ended_by_us", event.ended_by_us)
        span.set_attribute("asupervise.root_cause", event.root_cause)
        for name in ("signal", "cause", "stack", "error_file"):
            if text := getattr(event, name):
                span.set_attribute(f"asupervise.{name}", text)
        if event.stderr_tail:
            span.set_attribute("asupervise.stderr_tail", event.stderr_tail[-_TAIL_CHARS:])
        if event.ended_by_us:
            return
        kind = _exception_of(event) or event.signal or str(event.exitcode)
        said = event.message if event.error_file or event.signal else f"exit code {event.exitcode}"
        span.set_attribute("error.type", kind)
        span.set_status(Status(StatusCode.ERROR, _first_line(event.cause or said)))
        if event.traceback:
            described = {
                "exception.type": kind,
                "exception.message": event.message,
                "exception.stacktrace": event.traceback,
            }
            span.add_event("exception", described, self._exited_ns or _ns(event))

    def end(self, at_ns: int) -> None:
        self._span.end(self._exited_ns or at_ns)


# --- what a span holds ----------------------------------------------------------------------------


def _ns(event: Event) -> int:
    return round(event.time * 10**9)


def _ids(event: Event) -> dict[str, str | int]:
    ids: dict[str, str | int] = {"host.name": event.node}
    if event.run_id:
        ids["asupervise.run_id"] = event.run_id
    if event.group:
        ids |= {"asupervise.group": event.group, "asupervise.attempt": event.attempt}
    return ids


def _fail(span: Span, why: str, cause: int | None) -> None:
    span.set_status(Status(StatusCode.ERROR, why or None))
    if cause is not None:
        span.set_attribute("asupervise.root_cause", cause)


def _add(span: Span | None, event: Event) -> None:
    """As an event of the span: its own fields, as attributes."""
    if span is not None:
        fields = event.as_dict()
        for common in ("event", "monotonic_ns", "time", "run_id", "group", "attempt", "node"):
            del fields[common]
        stacks = fields.pop("stacks", {})
        fields |= {"stacks": [f"{rank}: {text}" for rank, text in stacks.items()]} if stacks else {}
        known = {name: value for name, value in fields.items() if value is not None}
        span.add_event(event.kind, known, _ns(event))


def _exception_of(event: events.WorkerFailed) -> str:
    """The type of the exception that was recorded: what stands before the colon."""
    found = _EXCEPTION.match(event.message) if event.traceback else None
    return found[1] if found else ""


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
