"""Events as Prometheus metrics. Needs the extra ``prometheus``."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from asupervise import events, memory, procfs
from asupervise.events import Event, WorkerEvent

__all__ = ["PrometheusExporter", "own_registry"]

_RUNNING, _SUCCEEDED, _FAILED, _ENDED = _STATES = "running", "succeeded", "failed", "ended"
_WORKER: Final = ("group", "rank", "local_rank")


class _Told(NamedTuple):
    """A counter: name without its prefix and suffix, what it counts, and its labels."""

    name: str
    text: str
    labels: tuple[str, ...] = ()


_COUNTERS: Final = (
    _Told("worker_starts", "Workers that have been started.", ("group",)),
    _Told("worker_exits", "Workers that have ended, by exit code (-N: signal N).",
          ("group", "exitcode")),
    _Told("worker_failures", "Workers that have failed by themselves.", ("group",)),
    _Told("group_ends", "Groups that have ended.", ("group", "outcome")),
    _Told("restarts", "Restarts of the whole job, or of one worker of a service.", ("scope",)),
    _Told("rounds", "Rounds of nodes that were completed."),
    _Told("lost_nodes", "Nodes that were lost."),
    _Told("escalations", "Ends of a group that went as far as SIGKILL.", ("group",)),
    _Told("warnings", "Warnings."),
)  # fmt: skip


def own_registry() -> CollectorRegistry:
    """One with what Prometheus' clients tell of their own process: this one, the supervisor."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


class PrometheusExporter(Collector):
    """An event handler (see `handle_events`) that keeps metrics.

    Args:
        registry: where they are registered; by default prometheus_client's own.

    Raises:
        ValueError: if there is one in this registry already.

    Example::

        registry = CollectorRegistry()
        async with handle_events(bus, PrometheusExporter(registry)):
            await launch(config, train, events=bus)
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        # Events come in one thread, and questions in others.
        self._turn = threading.Lock()
        self._counts: dict[str, Counter[tuple[str, ...]]] = {c.name: Counter() for c in _COUNTERS}
        self._workers: dict[tuple[str, int], _Worker] = {}
        self._run: dict[str, str] = {}
        self._round: tuple[int, int] | None = None
        registry.register(self)

    def close(self) -> None:
        """Take the metrics out of the registry."""
        self._registry.unregister(self)

    # --- what is told ---------------------------------------------------------------------------

    def handle(self, event: Event) -> None:
        """Count it."""
        with self._turn:
            if isinstance(event, WorkerEvent):
                self._of_worker(event)
            else:
                self._of_group(event)

    def _count(self, name: str, *labels: str) -> None:
        self._counts[name][labels] += 1

    def _of_group(self, event: Event) -> None:
        match event:
            case events.GroupStarting():
                self._run = {
                    "run_id": event.run_id, "group": event.group, "node": event.node,
                    "entrypoint": event.entrypoint,
                }  # fmt: skip
                for key in [key for key in self._workers if key[0] == event.group]:
                    del self._workers[key]
            case events.GroupEnded():
                outcome = _SUCCEEDED if event.succeeded else _FAILED
                self._count("group_ends", event.group, outcome)
            case events.Restarting():
                self._count("restarts", "job" if event.local_rank is None else "worker")
            case events.RoundCompleted():
                self._count("rounds")
                self._round = len(event.members), event.world_size
            case events.MemberLost():
                self._count("lost_nodes")
            case events.Escalated():
                self._count("escalations", event.group)
            case events.Warned():
                self._count("warnings")

    def _of_worker(self, event: WorkerEvent) -> None:
        key = event.group, event.local_rank
        if isinstance(event, events.WorkerStarted):
            self._workers[key] = _Worker(event)
            self._count("worker_starts", event.group)
            return
        worker = self._workers.get(key)
        match event:
            case events.WorkerExited():
                self._count("worker_exits", event.group, str(event.exitcode))
            case events.WorkerFailed() if not event.ended_by_us:
                self._count("worker_failures", event.group)
        # It may have been started anew before its failure is told.
        if worker is not None and worker.pid == event.pid:
            worker.hear(event)

    # --- what is asked --------------------------------------------------------------------------

    def describe(self) -> Iterator[Metric]:
        """The metrics without values: what `registry` looks at to find duplicates."""
        yield from self._families([])

    def collect(self) -> Iterator[Metric]:
        """All metrics as they are now: called in whatever thread serves them."""
        with self._turn:
            return iter([*self._families([*self._workers.values()])])

    def _families(self, workers: Sequence[_Worker]) -> Iterator[Metric]:
        run = InfoMetricFamily("asupervise_run", "What runs: the latest group.")
        if self._run:
            run.add_metric((), self._run)
        yield run
        for counter in _COUNTERS:
            family = CounterMetricFamily(
                f"asupervise_{counter.name}", counter.text, labels=counter.labels
            )
            counted = dict(self._counts[counter.name])
            if not counter.labels:
                # It is there from the beginning, so that its first rise is seen.
                counted.setdefault((), 0)
            for labels, count in counted.items():
                family.add_metric(labels, count)
            yield family
        yield from self._of_round()
        yield _states(workers)
        yield from _details(workers)

    def _of_round(self) -> Iterator[Metric]:
        nodes, workers = self._round or (None, None)
        yield GaugeMetricFamily("asupervise_round_nodes", "Nodes of the latest round.", nodes)
        yield GaugeMetricFamily(
            "asupervise_round_workers", "Workers on all nodes of the latest round.", workers
        )


class _Worker:
    """The latest start of a worker."""

    def __init__(self, event: events.WorkerStarted) -> None:
        self.pid = event.pid
        self.labels = event.group, str(event.rank), str(event.local_rank)
        self.state = _RUNNING
        self.started = event.time
        self.heartbeat: float | None = None
        self.done: float | None = None
        self.total: float | None = None

    def hear(self, event: WorkerEvent) -> None:
        match event:
            case events.Heartbeat():
                self.heartbeat = event.time
            case events.Progress():
                self.done, self.total = event.done, event.total
            case events.WorkerExited():
                self.state = _FAILED if event.exitcode else _SUCCEEDED
            case events.WorkerFailed():
                self.state = _ENDED if event.ended_by_us else _FAILED

    def memory_bytes(self) -> int | None:
        """As it is now: the samples among the events may be minutes old."""
        used = memory.memory_of(self.pid) if self.state == _RUNNING and self.pid else None
        return None if used is None else used.last

    def cpu_s(self) -> float | None:
        entry = procfs.read_entry(self.pid) if self.state == _RUNNING and self.pid else None
        return None if entry is None else entry.cpu_ticks * procfs.TICK_S


def _states(workers: Sequence[_Worker]) -> Metric:
    family = GaugeMetricFamily(
        "asupervise_workers",
        "Workers of the latest group, by state; ended: by us.",
        labels=("group", "state"),
    )
    counted = Counter((worker.labels[0], worker.state) for worker in workers)
    for group in dict.fromkeys(worker.labels[0] for worker in workers):
        for state in _STATES:
            family.add_metric((group, state), counted[group, state])
    return family


def _details(workers: Sequence[_Worker]) -> Iterator[Metric]:
    running = [worker for worker in workers if worker.state == _RUNNING]
    for name, text, value in (
        ("start_time_seconds", "When it was started, since the epoch.", lambda w: w.started),
        ("resident_memory_bytes", "Resident memory of its process.", _Worker.memory_bytes),
        ("heartbeat_timestamp_seconds", "Its latest heartbeat, since the epoch.",
         lambda w: w.heartbeat),
        ("progress_done", "How much it has done, in a unit of its own.", lambda w: w.done),
        ("progress_expected", "Of how much, in the same unit.", lambda w: w.total),
    ):  # fmt: skip
        gauge = GaugeMetricFamily(f"asupervise_worker_{name}", text, labels=_WORKER)
        for worker in running:
            if (now := value(worker)) is not None:
                gauge.add_metric(worker.labels, now)
        yield gauge
    cpu = CounterMetricFamily(
        "asupervise_worker_cpu_seconds", "CPU time of its process, user and system.", labels=_WORKER
    )
    for worker in running:
        if (used_s := worker.cpu_s()) is not None:
            cpu.add_metric(worker.labels, used_s)
    yield cpu
