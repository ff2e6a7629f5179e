"""Prometheus: what metrics real groups make, in a registry and by a real scrape."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from asupervise import (
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
from asupervise.events import Event
from asupervise.exporters.prometheus import PrometheusExporter, own_registry
from asupervise.exporters.scraping import serving
from tests.conftest import ROOT, Run, clean_environment
from tests.workers import READY, SH, SLEEP, STUBBORN, Channel, shell, start

COUNT = "$TORCHELASTIC_RESTART_COUNT"
QUICK: dict[str, Any] = {"min_uptime": 0, "restart_backoff": 0}

pytestmark = pytest.mark.usefixtures("own_temporary_folder")


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def value(registry: CollectorRegistry, name: str, **labels: object) -> float | None:
    return registry.get_sample_value(
        f"asupervise_{name}", {label: str(text) for label, text in labels.items()}
    )


def states(registry: CollectorRegistry, group: str = "t") -> dict[str, float | None]:
    names = ("running", "succeeded", "failed", "ended")
    found = {state: value(registry, "workers", group=group, state=state) for state in names}
    return {state: count for state, count in found.items() if count}


class Watched(PrometheusExporter):
    """One that says when it has been told of something."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self._told: list[str] = []
        self._changed = threading.Condition()

    def handle(self, event: Event) -> None:
        super().handle(event)
        with self._changed:
            self._told.append(event.kind)
            self._changed.notify_all()

    async def told(self, kind: str, times: int = 1) -> None:
        def wait() -> None:
            with self._changed:
                self._changed.wait_for(lambda: self._told.count(kind) >= times)

        await asyncio.to_thread(wait)


# --- metrics of real groups -----------------------------------------------------------------------


async def test_workers_are_counted_by_their_state(
    channel: Channel, registry: CollectorRegistry
) -> None:
    bus, exporter = EventBus(), Watched(registry)
    async with handle_events(bus, exporter):
        held = READY + 'read line < "$CHANNEL.gate"; exit 3'
        async with start(channel, SLEEP, held, "true", events=bus) as ctx:
            await channel.lines(2)
            await exporter.told("worker_exited")
            assert states(registry) == {"running": 2, "succeeded": 1}
            await channel.open_gate()
            await ctx.wait()
        await exporter.told("group_ended")
        assert states(registry) == {"ended": 1, "succeeded": 1, "failed": 1}
        assert value(registry, "worker_starts_total", group="t") == 3
        exits = {
            code: value(registry, "worker_exits_total", group="t", exitcode=code)
            for code in (0, 3, -15)
        }
        assert exits == {0: 1, 3: 1, -15: 1}
        assert value(registry, "worker_failures_total", group="t") == 1
        assert value(registry, "group_ends_total", group="t", outcome="failed") == 1
        assert value(registry, "group_ends_total", group="t", outcome="succeeded") is None
    # It has taken its metrics with it.
    assert list(registry.collect()) == []


async def test_memory_and_cpu_time_are_those_of_the_moment(
    tmp_path: Path, channel: Channel, registry: CollectorRegistry
) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import os, time\n"
        "x = bytearray(50 << 20)\n"
        "while time.process_time() < 0.1: pass\n"
        "print('ready', 0, os.getpid(), file=open(os.environ['CHANNEL'], 'w'), flush=True)\n"
        "time.sleep(1000)\n"
    )
    envs = {0: {"RANK": "4", "CHANNEL": str(channel.path)}}
    bus, exporter = EventBus(), Watched(registry)
    group = start_processes(
        "t", (sys.executable, str(script)), {0: ()}, envs, events=bus, memory_sample_interval=0
    )
    labels = {"group": "t", "rank": 4, "local_rank": 0}
    async with handle_events(bus, exporter):
        async with group as ctx:
            await channel.lines(1)
            resident = value(registry, "worker_resident_memory_bytes", **labels)
            assert resident is not None
            assert 50 << 20 < resident < 500 << 20
            cpu_s = value(registry, "worker_cpu_seconds_total", **labels)
            assert cpu_s is not None
            assert cpu_s > 0.05
            started = value(registry, "worker_start_time_seconds", **labels)
            (told,) = [e for e in ctx.events().take() if e.kind == "worker_started"]
            assert started == told.time
        await exporter.told("group_ended")
        # Who does not run uses nothing, and has no series any more.
        for name in ("resident_memory_bytes", "cpu_seconds_total", "start_time_seconds"):
            assert value(registry, f"worker_{name}", **labels) is None


async def test_heartbeats_and_progress(
    tmp_path: Path, channel: Channel, registry: CollectorRegistry
) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import asupervise, time\n"
        "asupervise.heartbeat()\nasupervise.progress(3, 10)\ntime.sleep(1000)\n"
    )
    bus, exporter = EventBus(), Watched(registry)
    logs = DefaultLogsSpecs(redirects=Std.ALL)
    group = start_processes("t", (sys.executable, str(script)), {0: ()}, {0: {}}, logs, events=bus)
    labels = {"group": "t", "rank": 0, "local_rank": 0}
    async with handle_events(bus, exporter), group as ctx:
        await exporter.told("heartbeat")
        await exporter.told("progress")
        assert value(registry, "worker_progress_done", **labels) == 3
        assert value(registry, "worker_progress_expected", **labels) == 10
        at = value(registry, "worker_heartbeat_timestamp_seconds", **labels)
        told = {event.kind: event.time for event in ctx.events().take()}
        assert at == told["heartbeat"]


async def test_a_run_with_restarts(registry: CollectorRegistry) -> None:
    bus, exporter = EventBus(), Watched(registry)
    async with handle_events(bus, exporter):
        assert value(registry, "restarts_total", scope="job") is None
        assert value(registry, "rounds_total") == 0
        config = LaunchConfig(1, 1, 2, max_restarts=1, run_id="job-7", role="trainer", **QUICK)
        await launch(config, SH, f"[ {COUNT} = 1 ] || exit 3", events=bus)
        await exporter.told("run_ended")
        assert value(registry, "restarts_total", scope="job") == 1
        assert value(registry, "rounds_total") == 2
        assert (value(registry, "round_nodes"), value(registry, "round_workers")) == (1, 2)
        # Of the latest attempt alone.
        assert states(registry, "trainer") == {"succeeded": 2}
        assert value(registry, "worker_starts_total", group="trainer") == 4
        info = {
            "run_id": "job-7", "group": "trainer", "node": os.uname().nodename,
            "entrypoint": "/bin/sh",
        }  # fmt: skip
        assert value(registry, "run_info", **info) == 1


async def test_services(registry: CollectorRegistry) -> None:
    bus, exporter = EventBus(), Watched(registry)
    async with handle_events(bus, exporter):
        async with run_services(
            **shell(None, ["exec sleep 1000", "exit 3"]), events=bus, max_restarts=2,
            policy=Policy(backoff_s=0.0, min_uptime_s=0.0),
        ) as services:  # fmt: skip
            await services.wait()
        await exporter.told("group_ended")
        assert value(registry, "restarts_total", scope="worker") == 2
        assert value(registry, "worker_starts_total", group="t") == 4
        assert value(registry, "worker_exits_total", group="t", exitcode=3) == 3
        assert states(registry) == {"failed": 1, "ended": 1}


async def test_escalations_and_warnings(channel: Channel, registry: CollectorRegistry) -> None:
    bus, exporter = EventBus(), Watched(registry)
    async with handle_events(bus, exporter):
        async with start(channel, STUBBORN, events=bus) as ctx:
            await channel.lines(1)
            await ctx.close(signal.SIGTERM, 0.05)
        bus.tell("Warned", text="x")
        bus.tell("MemberLost", member="n")
        await exporter.told("member_lost")
        assert value(registry, "escalations_total", group="t") == 1
        assert value(registry, "warnings_total") == 1
        assert value(registry, "lost_nodes_total") == 1


# --- registries and names -------------------------------------------------------------------------


def test_the_default_registry_is_theirs() -> None:
    exporter = PrometheusExporter()
    try:
        assert value(REGISTRY, "rounds_total") == 0
    finally:
        exporter.close()
    assert value(REGISTRY, "rounds_total") is None


def test_two_in_one_registry_are_refused(registry: CollectorRegistry) -> None:
    exporter = PrometheusExporter(registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        PrometheusExporter(registry)
    exporter.close()
    PrometheusExporter(registry)


def test_ours_tells_of_the_supervisor_as_well() -> None:
    registry = own_registry()
    PrometheusExporter(registry)
    assert registry.get_sample_value("process_resident_memory_bytes")
    assert value(registry, "rounds_total") == 0


def told_all(exporter: PrometheusExporter) -> None:
    from asupervise import events

    worker = {"group": "t", "local_rank": 0, "rank": 0, "pid": os.getpid()}

    def tell(kind: str, **fields: Any) -> None:
        exporter.handle(getattr(events, kind)(monotonic_ns=1, time=2.0, **fields))

    tell("GroupStarting", group="t", nprocs=1, entrypoint='a "b"\n\\')
    tell("WorkerStarted", **worker)
    tell("Heartbeat", **worker)
    tell("Progress", done=1.0, total=2.0, **worker)
    tell("Escalated", group="t")
    tell("Restarting", restarts=1)
    tell("RoundCompleted", round=0, members=("a",), world_size=1)
    tell("WorkerExited", exitcode=3, uptime_s=1.0, group="t", local_rank=1, rank=1, pid=1)
    tell("WorkerFailed", exitcode=3, group="t", local_rank=1, rank=1, pid=1)
    tell("GroupEnded", group="t", succeeded=False)


def test_names_and_units_are_as_prometheus_wants_them(registry: CollectorRegistry) -> None:
    """https://prometheus.io/docs/practices/naming, as far as a machine can tell."""
    told_all(PrometheusExporter(registry))
    families = {
        f.name: f for f in text_string_to_metric_families(generate_latest(registry).decode())
    }
    assert len(families) == 19
    for name, family in families.items():
        assert re.fullmatch(r"asupervise_[a-z_]+", name)
        assert family.documentation.endswith(".")
        # A suffix says what it is of its kind, and base units.
        assert not re.search(r"_(count|sum|bucket|created|ms|kb|mib|percent|minutes)$", name)
        assert family.samples, name
        for sample in family.samples:
            assert sample.name.endswith("_total") is (family.type == "counter"), name
    infos = [family for family in families.values() if family.name == "asupervise_run_info"]
    assert infos[0].samples[0].labels["entrypoint"] == 'a "b"\n\\'


def test_it_may_be_asked_while_it_is_told(registry: CollectorRegistry) -> None:
    exporter = PrometheusExporter(registry)
    asking = threading.Thread(target=lambda: [generate_latest(registry) for _ in range(50)])
    asking.start()
    for _ in range(200):
        told_all(exporter)
    asking.join()
    assert value(registry, "worker_starts_total", group="t") == 200


def test_a_stream_that_is_joined_in_the_middle(registry: CollectorRegistry) -> None:
    from asupervise import events

    exporter = PrometheusExporter(registry)
    worker = {"group": "t", "local_rank": 0, "rank": 0, "pid": 7}
    for kind, fields in (
        ("Heartbeat", {}), ("Progress", {"done": 1.0}),
        ("WorkerExited", {"exitcode": 0, "uptime_s": 1.0}), ("WorkerFailed", {"exitcode": 1}),
    ):  # fmt: skip
        made = getattr(events, kind)
        exporter.handle(made(monotonic_ns=1, time=2.0, **worker, **fields))
    assert value(registry, "worker_exits_total", group="t", exitcode=0) == 1
    assert states(registry) == {}


# --- scraping -------------------------------------------------------------------------------------


def scrape(url: str, **headers: str) -> str:
    # None of the environment's proxies.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        assert answer.status == 200
        text: str = answer.read().decode()
        return text


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_a_scrape_is_answered(registry: CollectorRegistry, host: str) -> None:
    PrometheusExporter(registry)
    shown = f"[{host}]" if ":" in host else host
    try:
        async with serving(registry, host, 0) as port:
            url = f"http://{shown}:{port}/metrics"
            text = await asyncio.to_thread(scrape, url)
            assert "asupervise_rounds_total 0.0\n" in text
            openmetrics = await asyncio.to_thread(
                scrape, url, Accept="application/openmetrics-text; version=1.0.0"
            )
            assert openmetrics.endswith("# EOF\n")
    except OSError as exc:
        if host == "::1":
            pytest.skip(f"no IPv6 here: {exc}")
        raise


async def test_nobody_waits_for_who_connects_and_says_nothing(registry: CollectorRegistry) -> None:
    PrometheusExporter(registry)
    async with serving(registry, "127.0.0.1", 0) as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        gone = socket.create_connection(("127.0.0.1", port))
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        gone.close()
        text = await asyncio.to_thread(scrape, f"http://127.0.0.1:{port}/metrics")
        assert "asupervise_rounds_total" in text
        for connection in silent:
            connection.close()
    for thread in threading.enumerate():
        if "process_request" in thread.name:
            await asyncio.to_thread(thread.join)


async def test_no_thread_waits_for_a_scrape(registry: CollectorRegistry) -> None:
    before = threading.active_count()
    async with serving(registry, "127.0.0.1", 0):
        assert threading.active_count() <= before + 1  # the one that looks names up
        loop: Any = asyncio.get_running_loop()
        assert [handle for handle in loop._scheduled if not handle.cancelled()] == []


async def test_an_address_in_use_is_an_error(registry: CollectorRegistry) -> None:
    async with serving(registry, "127.0.0.1", 0) as port:
        with pytest.raises(OSError, match="in use"):
            async with serving(registry, "127.0.0.1", port):
                pass
    # And free again at once.
    async with serving(registry, "127.0.0.1", port):
        pass


# --- the command line -----------------------------------------------------------------------------


def lines_until(stream: Any, pattern: str) -> list[str]:
    """Its lines, up to one that matches."""
    found = []
    for line in stream:
        found.append(line.decode())
        if re.search(pattern, found[-1]):
            return found
    raise AssertionError(f"no line with {pattern!r} in {found}")


def test_the_command_line_serves_metrics(channel: Channel) -> None:
    script = SLEEP.replace("$$", "$$$$")
    words = ("--metrics-port", "0", "--nproc-per-node", "2", "--no-python", "sh", "-c", script)
    process = subprocess.Popen(
        [sys.executable, "-m", "asupervise", *words],
        cwd=ROOT, env=clean_environment() | {"CHANNEL": str(channel.path)},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    with process:
        try:
            assert process.stderr is not None
            (line,) = lines_until(process.stderr, "metrics")
            found = re.fullmatch(
                r"asupervise: metrics: (http://127\.0\.0\.1:[0-9]+/metrics)\n", line
            )
            assert found is not None
            pids = asyncio.run(channel.pids(2))
            assert sorted(pids) == [0, 1]
            running = {"group": "default", "state": "running"}, 2
            # They are told of in a thread: soon.
            while running not in (families := _families(scrape(found[1])))["asupervise_workers"]:
                pass
            assert "process_cpu_seconds" in families
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM


def _families(text: str) -> dict[str, Sequence[tuple[dict[str, str], float]]]:
    return {
        family.name: [(sample.labels, sample.value) for sample in family.samples]
        for family in text_string_to_metric_families(text)
    }


def test_a_port_in_use_is_one_clear_error_before_anything_starts(
    run_cli: Run, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_cli("--metrics-port", port, "--events", tmp_path / "run.jsonl",
                       "--no-python", "touch", tmp_path / "started")  # fmt: skip
    assert done.stderr.decode() == (
        f"error: --metrics-port 127.0.0.1:{port}: Address already in use\n"
    )
    assert done.returncode == 2
    assert not (tmp_path / "started").exists()
    assert (tmp_path / "run.jsonl").read_text() == ""


def test_an_address_that_is_none_is_one_clear_error(run_cli: Run) -> None:
    done = run_cli("--metrics-port", "no-such-host.invalid:0", "--no-python", "true")
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("error: --metrics-port no-such-host.invalid:0: ")
    assert done.returncode == 2


def test_the_handler_needs_its_port_and_adds_nothing_to_it(run_cli: Run) -> None:
    done = run_cli("--event-log-handler", "prometheus", "--no-python", "true")
    assert done.stderr.decode().splitlines() == [
        "error: --event-log-handler prometheus needs --metrics-port",
        "hint: --metrics-port 9464",
    ]
    assert done.returncode == 2
    done = run_cli("--event-log-handler", "prometheus", "--metrics-port", 0, "--no-python", "true")
    assert done.returncode == 0


def test_without_the_extra_the_hint_is_to_install_it(run_cli: Run) -> None:
    code = (
        "import sys; sys.modules['prometheus_client'] = None; "
        "from asupervise.cli import main; exit(main())"
    )
    done = run_cli("--metrics-port", "0", "--no-python", "true",
                   command=(sys.executable, "-c", code))  # fmt: skip
    assert done.stderr.decode().splitlines() == [
        "error: prometheus needs the package prometheus-client",
        "hint: pip install 'asupervise[prometheus]'",
    ]
    assert done.returncode == 2
