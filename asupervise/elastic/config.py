"""`LaunchConfig`: torch's names and fields, for a job on this node as one of a run's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from asupervise.elastic.decide import Policy
from asupervise.elastic.records import Terms
from asupervise.elastic.values import policy_of
from asupervise.flags import split_endpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asupervise.binding import NumaOptions
    from asupervise.formats import ConsoleFormat
    from asupervise.functions.zygote import Zygote
    from asupervise.logs import LogsSpecs

__all__ = ["DEFAULT_MASTER_PORT", "LaunchConfig", "Place"]

T = TypeVar("T")

# torchrun's, where several nodes must agree on one without talking.
DEFAULT_MASTER_PORT: Final = 29500
_USUAL: Final = Policy()


class Place(NamedTuple):
    """Of a node that was told its rank, and the address of rank 0."""

    node_rank: int | None
    master_addr: str | None
    master_port: int | None


@dataclass(frozen=True)
class LaunchConfig:
    """How a job is run on this node. The first fields are torch's `LaunchConfig`.

    Attributes:
        min_nodes: fewest nodes that the job runs on.
        max_nodes: most.
        nproc_per_node: workers on this node.
        logs_specs: where their output goes; our own console by default.
        run_id: names the run; a random one by default, where one node runs alone.
        role: of the workers.
        rdzv_endpoint: ``host:port`` of the engine; several with commas between them.
        rdzv_backend: ``"static"``, ``"env"``, ``"etcd"``, ``"c10d"``, or that of an entry point.
        rdzv_configs: of the backend, as in ``--rdzv-conf``.
        rdzv_timeout: seconds that enough nodes are waited for; -1 for the backend's own.
        max_restarts: how often the job is restarted after failures, over all nodes; of services,
            how many restarts there may be within `restart_within`.
        monitor_interval: accepted; nothing is polled.
        start_method: of functions, as in `start_processes`.
        log_line_prefix_template: with ``${role_name}``, ``${rank}``, ``${local_rank}``.
        metrics_cfg: accepted; not used.
        local_addr: this node's address, where the one that it is found by is not the right one.
        numa_options: binding to CPUs and memory.
        duplicate_stdout_filters: as in `start_processes`.
        duplicate_stderr_filters: likewise.
        virtual_local_rank: each worker is told local rank 0.
        shutdown_timeout: seconds from SIGTERM to SIGKILL.
        node_rank: this node's place; needed for ``"static"`` with several nodes.
        master_addr: where rank 0 listens; by default on the node that has it.
        master_port: where; by default a port that this node holds.
        preload: as in `start_processes`.
        hang_timeout: likewise.
        min_uptime: seconds; a worker that fails sooner is a broken start.
        max_broken_starts: so many in a row end the job, whatever restarts are left.
        restart_backoff: seconds before the first restart; doubled with each in a row.
        restart_backoff_max: the longest wait.
        restart: what is started anew: ``"group"``, all workers of the job, or ``"worker"``, the
            one that has ended, for services that are no ranked job.
        restart_within: seconds.
        report: whether the run's folder gets ``events.jsonl`` and ``report.html``, if it stays.
        console: as in `start_processes`.

    Raises:
        ValueError: for fields that make no sense, naming field and value.

    Example:
        >>> LaunchConfig(1, 1, 4, max_restarts=0).nproc_per_node
        4
    """

    min_nodes: int
    max_nodes: int
    nproc_per_node: int
    logs_specs: LogsSpecs | None = None
    run_id: str = ""
    role: str = "default_role"
    rdzv_endpoint: str = ""
    rdzv_backend: str = "static"
    rdzv_configs: Mapping[str, Any] = field(default_factory=dict)
    rdzv_timeout: float = -1
    max_restarts: int = 3
    monitor_interval: float = 0.1
    start_method: str | Zygote = "spawn"
    log_line_prefix_template: str | None = None
    metrics_cfg: Mapping[str, str] = field(default_factory=dict)
    local_addr: str | None = None
    numa_options: NumaOptions | None = None
    duplicate_stdout_filters: Sequence[str] | None = None
    duplicate_stderr_filters: Sequence[str] | None = None
    virtual_local_rank: bool = False
    shutdown_timeout: float = 30.0
    node_rank: int | None = field(default=None, kw_only=True)
    master_addr: str | None = field(default=None, kw_only=True)
    master_port: int | None = field(default=None, kw_only=True)
    preload: Sequence[str] = field(default=(), kw_only=True)
    hang_timeout: float | None = field(default=None, kw_only=True)
    min_uptime: float = field(default=_USUAL.min_uptime_s, kw_only=True)
    max_broken_starts: int = field(default=_USUAL.max_broken_starts, kw_only=True)
    restart_backoff: float = field(default=_USUAL.backoff_s, kw_only=True)
    restart_backoff_max: float = field(default=_USUAL.backoff_max_s, kw_only=True)
    restart: str = field(default="group", kw_only=True)
    restart_within: float = field(default=60.0, kw_only=True)
    report: bool = field(default=True, kw_only=True)
    console: ConsoleFormat | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not 1 <= self.min_nodes <= self.max_nodes:
            raise ValueError(
                f"min_nodes, max_nodes: {self.min_nodes}, {self.max_nodes}: expected 1 or more, "
                "and the first not above the second"
            )
        for name, low in (("nproc_per_node", 1), ("max_restarts", 0), ("max_broken_starts", 1)):
            number = getattr(self, name)
            if not isinstance(number, int) or number < low:
                raise ValueError(f"{name}: {number!r}: expected a number, {low} or more")
        for name in ("shutdown_timeout", "min_uptime", "restart_backoff", "restart_backoff_max"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)}: expected seconds, 0 or more")
        if self.restart not in ("group", "worker"):
            raise ValueError(f"restart: {self.restart!r}: expected 'group' or 'worker'")
        if "/" in self.run_id:
            raise ValueError(f"run_id: {self.run_id!r}: expected a name without a slash")
        if self.rdzv_backend == "static":
            self._check_static()
        elif self.rdzv_backend != "env" and not self.run_id:
            raise ValueError("run_id: expected a name that all nodes of the run have in common")

    def _check_static(self) -> None:
        nodes, place = self.max_nodes, self.static_place
        if self.min_nodes != nodes:
            raise ValueError(
                f"min_nodes, max_nodes: {self.min_nodes}, {nodes}: rdzv_backend='static' has a "
                "fixed number"
            )
        if not 0 <= (-1 if place.node_rank is None and nodes > 1 else place.node_rank or 0) < nodes:
            raise ValueError(f"node_rank: {place.node_rank}: expected 0 to {nodes - 1}")
        if place.node_rank and place.master_addr is None:
            raise ValueError("master_addr: expected the address of node 0")

    @property
    def static_place(self) -> Place:
        """Where the static backend has us; torch has it in `rdzv_endpoint` and `rdzv_configs`.

        Raises:
            ValueError: for what is no endpoint or no rank.
        """
        rank, address, port = self.node_rank, self.master_addr, self.master_port
        if rank is None and "rank" in self.rdzv_configs:
            rank = _read("rdzv_configs: rank", int, self.rdzv_configs["rank"])
        if address is None and self.rdzv_endpoint:
            address, given = _read("rdzv_endpoint", split_endpoint, self.rdzv_endpoint)
            port = port or given
        if self.max_nodes > 1:
            # They do not talk, so that none could hold one for all.
            port = port or DEFAULT_MASTER_PORT
        return Place(rank, address, port or None)

    @property
    def terms(self) -> Terms:
        """What all nodes must agree on."""
        return Terms(self.min_nodes, self.max_nodes, self.max_restarts)

    @property
    def policy(self) -> Policy:
        """When to begin a round, and when to try again.

        Raises:
            ValueError: for a value in `rdzv_configs` that is no number of seconds.
        """
        conf = {key: str(value) for key, value in self.rdzv_configs.items()}
        policy = policy_of(
            conf,
            min_uptime_s=self.min_uptime,
            max_broken_starts=self.max_broken_starts,
            backoff_s=self.restart_backoff,
            backoff_max_s=self.restart_backoff_max,
        )
        if self.rdzv_timeout >= 0:
            policy = policy._replace(join_timeout_s=self.rdzv_timeout)
        return policy


def _read(name: str, read: Callable[[Any], T], value: object) -> T:
    try:
        return read(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {value!r}: {error}") from None
