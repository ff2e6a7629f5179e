"""``run_services``: workers that are no ranked job, each started anew when it ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from asupervise import binder, procs
from asupervise.elastic.alone import Attempts
from asupervise.elastic.decide import Policy
from asupervise.elastic.intensity import Limits, Restart
from asupervise.elastic.keeping import OnRestart, Services
from asupervise.logs import LogsSpecs
from asupervise.spec import (
    DEFAULT_MEMORY_SAMPLE_INTERVAL_S,
    DEFAULT_SHUTDOWN_TIMEOUT_S,
    GroupSpec,
    RunOptions,
    checked_spec,
)

if TYPE_CHECKING:
    from asupervise.binding import NumaOptions
    from asupervise.bus import EventBus
    from asupervise.formats import ConsoleFormat
    from asupervise.functions.zygote import Zygote

__all__ = ["OnRestart", "Services", "StartingServices", "run_services"]


def run_services(
    name: str,
    entrypoint: str | Sequence[str] | Callable[..., Any],
    args: Mapping[int, Sequence[object]],
    envs: Mapping[int, Mapping[str, str]],
    logs_specs: LogsSpecs | None = None,
    log_line_prefixes: Mapping[int, str] | None = None,
    start_method: str | Zygote = "spawn",
    numa_options: NumaOptions | None = None,
    duplicate_stdout_filters: Sequence[str] | None = None,
    duplicate_stderr_filters: Sequence[str] | None = None,
    *,
    restart: Restart = "permanent",
    max_restarts: int = 3,
    within_s: float = 60.0,
    policy: Policy | None = None,
    on_restart: OnRestart | None = None,
    preload: Sequence[str] = (),
    stdin: int | None = None,
    cwd: str | None = None,
    shutdown_timeout: float = DEFAULT_SHUTDOWN_TIMEOUT_S,
    guardian: bool = True,
    hang_timeout: float | None = None,
    memory_sample_interval: float = DEFAULT_MEMORY_SAMPLE_INTERVAL_S,
    events: EventBus | None = None,
    report: bool = True,
    console: ConsoleFormat | None = None,
) -> StartingServices:
    """Start one worker a local rank, and each of them anew when it ends.

    As `start_processes`, to be awaited or entered; all arguments that it has, too, mean the same.
    What is different: a worker that ends is started anew after a wait, while the others go on, with
    ``TORCHELASTIC_RESTART_COUNT`` and the folder ``attempt_<n>`` of its own count. Nothing of its
    former start is left by then. The lines of `duplicate_stdout_filters` go to one file a worker,
    ``filtered_stdout.<local_rank>.log``.

    Args:
        name: as in `start_processes`, and so are all that are not named here.
        restart: after which ends: ``"permanent"``: each; ``"transient"``: failures;
            ``"temporary"``: none.
        max_restarts: how many restarts there may be within `within_s`, over all workers. The end
            that would be followed by one more ends the whole service, and is its root cause. 0: the
            first end that would be followed by a restart does.
        within_s: seconds.
        policy: the wait before a restart (``backoff_s``, doubled with each in a row up to
            ``backoff_max_s``, and from the beginning after a run of ``stable_s``), and the broken
            starts: a worker that fails ``max_broken_starts`` times in a row sooner than
            ``min_uptime_s`` after its start ends the service, whatever restarts are left. A restart
            that is not possible (the program is gone) is a broken start.
        on_restart: called in the event loop before each wait with the local rank, the count of the
            coming start (from 1), the failure (None where the worker had succeeded) and the wait in
            seconds. What it raises goes to the event loop's exception handler.

    Returns:
        An object to ``await`` or to use in ``async with``; both give a :class:`Services`.

    Raises:
        ValueError: at the call, for limits that make no sense; as `start_processes` otherwise.

    Example::

        async with run_services(
            "web", "./serve", {0: ("--port", 8000), 1: ("--port", 8001)}, {0: {}, 1: {}},
            max_restarts=10, within_s=60.0,
        ) as services:
            result = await services.wait()
    """
    limits = Limits(restart, max_restarts, within_s, Policy() if policy is None else policy)
    spec = checked_spec(
        name, entrypoint, args, envs, logs_specs, log_line_prefixes, start_method, preload,
        duplicate_stdout_filters, duplicate_stderr_filters, stdin,
    )  # fmt: skip
    options = RunOptions(
        cwd=cwd,
        shutdown_timeout_s=shutdown_timeout,
        guardian=guardian,
        hang_timeout_s=hang_timeout,
        memory_sample_interval_s=memory_sample_interval,
        report=report,
        console=console,
    ).checked()
    return StartingServices(spec, numa_options, options, limits, on_restart, events)


class StartingServices(procs.Unstarted):
    """What :func:`run_services` returns: ``await`` it, or enter it with ``async with``."""

    def __init__(
        self,
        spec: GroupSpec,
        numa_options: NumaOptions | None,
        options: RunOptions,
        limits: Limits,
        on_restart: OnRestart | None,
        events: EventBus | None = None,
    ) -> None:
        self._events = events
        self._spec = spec
        self._numa_options = numa_options
        self._options = options
        self._limits = limits
        self._on_restart = on_restart
        super().__init__(f"service {spec.name!r}", Services)
        self._services: Services | None = None

    async def _start(self) -> Services:
        self._begin()
        spec = await binder.choose_and_probe(self._spec, self._numa_options, os.environ)
        self._services = Services(
            Attempts(spec, self._options), self._options, self._limits, self._on_restart,
            events=self._events,
        )  # fmt: skip
        await self._services._start()
        return self._services

    def __await__(self) -> Generator[Any, Any, Services]:
        return self._start().__await__()

    async def __aenter__(self) -> Services:
        return await self._start()

    async def __aexit__(self, *exc_info: object) -> None:
        if self._services is not None:
            await self._services.__aexit__(*exc_info)
