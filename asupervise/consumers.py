"""Who shows a run of the command line, or carries away what happens: begun before it, ended after.

Only imported where somebody does.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from asupervise.bus import EventBus
from asupervise.exporters.handling import EventHandler, handle_events
from asupervise.options import LaunchOptions, UsageError

__all__ = ["consuming"]

Say = Callable[[str], None]


@asynccontextmanager
async def consuming(options: LaunchOptions, say: Say, warn: Say) -> AsyncIterator[EventBus]:
    """The bus that they all hear of the run by.

    Args:
        options: who is wanted.
        say: prints a line.
        warn: prints a warning.

    Raises:
        UsageError, NotSupportedError: if one of them cannot begin. None has heard of anything then.
    """
    bus = EventBus()
    async with AsyncExitStack() as stack:

        async def hand_to(handler: EventHandler, name: str) -> None:
            await stack.enter_async_context(handle_events(bus, handler, name=name, on_warning=warn))

        if options.live:
            # First of all: it stands in the place of the standard streams.
            await _show(stack, bus, options, say)
        # Whoever shows the run is to see its end before it is asked to end itself.
        stack.callback(bus.close)
        if options.events is not None:
            await hand_to(_lines_to(options.events), f"--events {options.events}")
        for name in options.event_log_handler:
            if (handler := _named(name, warn)) is not None:
                await hand_to(handler, f"--event-log-handler {name}")
        if options.metrics_port is not None:
            exporter = await _served(stack, *options.metrics_port, say)
            await hand_to(exporter, "--metrics-port")
        yield bus


async def _show(stack: AsyncExitStack, bus: EventBus, options: LaunchOptions, say: Say) -> None:
    from asupervise.signals import handle_terminal
    from asupervise.views.live.view import live_view, place_of_view

    if why_not := place_of_view().why_not:
        say(f"note: --live: {why_not}; only lines are shown")
    title = os.path.basename(options.script)
    view = await stack.enter_async_context(live_view(bus, title=title, color=options.color))
    if view is not None:
        stack.enter_context(handle_terminal(view))


def _lines_to(path: str) -> EventHandler:
    from asupervise.exporters.lines import lines_to

    try:
        return lines_to(path)
    except OSError as exc:
        raise UsageError(f"--events {path!r}: {exc.strerror}") from None


def _named(name: str, warn: Say) -> EventHandler | None:
    from asupervise.exporters.loading import load_handler

    if name in ("null", "prometheus"):
        return None  # the latter is there with its port
    if name == "console":
        return _lines_to("-")
    return _otel(warn) if name == "otel" else load_handler(name)


def _otel(warn: Say) -> EventHandler:
    from asupervise.exporters.loading import of_extra

    with of_extra("otel", "opentelemetry-api", "opentelemetry"):
        from asupervise.exporters.otel import OtelExporter

    if not OtelExporter.is_set_up():
        warn("--event-log-handler otel: no tracer provider is set up, and spans go nowhere: "
             "put opentelemetry-instrument in front of the command")  # fmt: skip
    return OtelExporter()


async def _served(stack: AsyncExitStack, host: str, port: int, say: Say) -> EventHandler:
    from asupervise.exporters.loading import of_extra

    with of_extra("prometheus", "prometheus-client", "prometheus_client"):
        from asupervise.exporters.prometheus import PrometheusExporter, own_registry
        from asupervise.exporters.scraping import serving

    registry = own_registry()
    exporter = PrometheusExporter(registry)
    shown = f"[{host}]" if ":" in host else host
    try:
        found = await stack.enter_async_context(serving(registry, host, port))
    except OSError as exc:
        raise UsageError(f"--metrics-port {shown}:{port}: {exc.strerror}") from None
    if not port:
        say(f"asupervise: metrics: http://{shown}:{found}/metrics")
    return exporter
