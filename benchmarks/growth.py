"""How time and memory grow: with the number of workers, and with the size of their logs."""

from __future__ import annotations

import math
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks import scale, tee
from benchmarks.measure import SUBJECT, Candidate, Case, Goal, MeasureError, Metric, Sample
from benchmarks.processes import Resident
from benchmarks.topics import Setup, Topic
from benchmarks.usage import status

_BARE = scale.LIMIT
_PREFIXER = "block prefixer"
_WORKERS = (8, 32, 128, 512, 1024)
_LOG_RANKS = 4
_MEGABYTES = (1, 10, 100, 1_000, 10_000)
_LINE_BYTES = 100
# A step is left out that would take longer than that, going by the one before.
_LONGEST_S = 60.0
# Growth cannot be told from fewer sizes: they have so much time when it is up for the others.
_RESERVED_S = 60.0
# Logs, and as much again for whoever else uses the disk.
_FREE_SHARE = 0.5

_TIME = Metric("time", "s", 3)
_PEAK = Metric("peak memory", "MiB", 1)

# By group, candidate, metric and size: what was measured so far.
Points = defaultdict[tuple[str, str], dict[float, list[Sample]]]


# --- inside the candidates' processes -------------------------------------------------------------


async def supervised(request: dict[str, Any]) -> Sample:
    await tee.supervised({**request, "workers": 1, "times": 1})
    return _grown(request, await tee.supervised(request))


def block_prefixer(request: dict[str, Any]) -> Sample:
    return _grown(request, tee.block_prefixer(request))


def _grown(request: dict[str, Any], sample: Sample) -> Sample:
    (megabytes_a_second,) = sample.values()
    return {
        _TIME.name: request["megabytes"] / megabytes_a_second,
        # Of this process: its helpers and workers are not counted.
        _PEAK.name: status("/proc/self", "VmHWM") / 1024,
    }


# --- the comparison -------------------------------------------------------------------------------


def _cases(setup: Setup) -> Iterator[Case]:
    points: Points = defaultdict(lambda: defaultdict(list))
    yield from _with_workers(setup, points)
    of_groups = [scale.START, scale.STOP, scale.MEMORY]
    yield exponents("workers", points, (_BARE, SUBJECT), of_groups)
    yield from _with_logs(setup, points)
    yield exponents("logs", points, (_PREFIXER, SUBJECT), [_TIME, _PEAK])


def _with_workers(setup: Setup, points: Points) -> Iterator[Case]:
    for workers in _WORKERS[: 3 if setup.quick else None]:
        request = {
            "workers": workers,
            "settle_s": 0.2,
            "window_s": 0.0,
            "log_dir": str(setup.scratch / "growth"),
        }
        runs = {
            _BARE: partial(scale.run_fresh, "bare", request),
            SUBJECT: partial(scale.run_fresh, "supervised", request),
        }
        yield Case(
            name=f"{workers:,} workers",
            group="number of workers",
            size=workers,
            metrics=[scale.START, scale.STOP, scale.MEMORY],
            candidates=kept(points, "workers", workers, runs),
            limit=_BARE,
            rounds=setup.rounds(3, quick=1),
            warmups=0,
        )


def _with_logs(setup: Setup, points: Points) -> Iterator[Case]:
    data = setup.scratch / "quarter-megabyte"
    tee.write_lines(data, 1_000_000 // _LOG_RANKS // _LINE_BYTES)
    took_s = 0.0
    for megabytes in _MEGABYTES[: 3 if setup.quick else None]:
        if why := _too_much(setup, megabytes, took_s * 10):
            setup.left_out.add(f"growth, {megabytes:,} MB of logs and more: {why}")
            return
        request = {
            "workers": _LOG_RANKS,
            "times": megabytes,
            "megabytes": megabytes,
            "data": str(data),
            "folder": str(setup.scratch),
        }
        runs = {
            _PREFIXER: partial(_run_fresh, "block_prefixer", request),
            SUBJECT: partial(_run_fresh, "supervised", request),
        }
        yield Case(
            name=f"{megabytes:,} MB",
            group="MB of logs",
            size=megabytes,
            metrics=[_TIME, _PEAK],
            candidates=kept(points, "logs", megabytes, runs),
            limit=_PREFIXER,
            rounds=1 if megabytes > 1_000 else setup.rounds(3, quick=1),
            warmups=0,
        )
        slowest = [max(points["logs", name][megabytes], key=_time_of, default={}) for name in runs]
        took_s = max(map(_time_of, slowest))


def _time_of(sample: Sample) -> float:
    return sample.get(_TIME.name, math.inf)


def _too_much(setup: Setup, megabytes: int, seconds: float) -> str:
    """Why so much is not written here, if so."""
    if megabytes * 1e6 > shutil.disk_usage(setup.scratch).free * _FREE_SHARE:
        return "not enough room on the disk"
    if seconds > min(_LONGEST_S, (setup.deadline_s + _RESERVED_S - time.monotonic()) / 2):
        return f"each candidate would take about {seconds:.0f} s"
    return ""


def _run_fresh(function: str, request: dict[str, Any]) -> Sample:
    with Resident(f"growth:{function}", python=sys.executable) as resident:
        return resident.ask(request, timeout_s=3 * _LONGEST_S)


def kept(
    points: Points, group: str, size: float, runs: Mapping[str, Callable[[], Sample]]
) -> list[Candidate]:
    """Candidates whose samples are kept for `exponents`."""

    def run(name: str) -> Sample:
        sample = runs[name]()
        points[group, name][size].append(sample)
        return sample

    return [Candidate(name, partial(run, name)) for name in runs]


def exponents(
    group: str,
    points: Points,
    names: Sequence[str],
    metrics: Sequence[Metric],
    bound: float = 1.0,
) -> Case:
    """How figures grow with what is counted in `group`: goals are for exponents up to `bound`."""

    def fitted(name: str) -> Sample:
        by_size = points[group, name]
        if len(by_size) < 2:
            raise MeasureError("too few sizes")
        return {f"exponent of {metric.name}": _slope(by_size, metric.name) for metric in metrics}

    fits = [Metric(f"exponent of {metric.name}", "", 2) for metric in metrics]
    return Case(
        name=f"growth with {group}",
        group=f"growth with {group}",
        metrics=fits,
        candidates=[Candidate(name, partial(fitted, name)) for name in names],
        limit=None,
        goals=[Goal(metric.name, "<=", bound) for metric in fits],
        rounds=1,
        warmups=0,
    )


def _slope(by_size: dict[float, list[Sample]], metric: str) -> float:
    """k in metric = c x size ** k, as it fits best: the slope of the logarithms."""
    sizes = [math.log(size) for size in by_size]
    medians = [statistics.median(s[metric] for s in samples) for samples in by_size.values()]
    return statistics.linear_regression(sizes, [math.log(figure) for figure in medians]).slope


TOPIC = Topic(
    name="growth",
    title="from 8 to 1,024 teed workers that sleep, and from 1 MB to 10 GB of logs that "
    f"{_LOG_RANKS} ranks write as fast as they can",
    limit="for workers, an asyncio program that starts as many without logs; for logs, the block "
    "prefixer of the topic `tee`",
    cases=_cases,
    plots=(scale.START.name, scale.STOP.name, scale.MEMORY.name, _TIME.name, _PEAK.name),
    notes=(
        "Growth is size to the power of the exponent, fitted over all sizes: 1 is linear, and "
        "fixed costs make it less.",
    ),
)
