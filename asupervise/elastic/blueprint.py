"""What a node starts, whatever round it is in → the arguments of `start_processes` in this one.

Pure, but for the environment, which is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from asupervise.elastic.agent import Standing
from asupervise.environ import log_line_prefix, rank_environments, substitute_macros
from asupervise.logs import ATTEMPT_VARIABLE

__all__ = ["Blueprint"]

_NOTHING: Final[Mapping[Any, Any]] = MappingProxyType({})


# NamedTuples here and around: each dataclass costs every start of the command line half a
# millisecond.
class Blueprint(NamedTuple):
    """All that a node's groups have in common.

    Attributes:
        nproc: how many workers.
        run_id: names the run.
        role: of the workers; names the groups, too.
        entrypoint: a program, or a callable.
        args: its arguments, the same for each worker but for macros (`substitute_macros`).
        arguments: those of `start_processes` that no round changes.
        max_restarts: what workers are told.
        master_addr: given by the user; None for that of rank 0's node.
        stdin: the local rank on the first node that reads our standard input.
        prefix_template: of teed lines, or None.
        omp_num_threads: as in `rank_environments`.
        gpu_visibility: likewise.
        virtual_local_rank: likewise.
    """

    nproc: int
    run_id: str
    role: str
    entrypoint: str | Sequence[str] | Callable[..., Any]
    args: Sequence[object] = ()
    arguments: Mapping[str, Any] = _NOTHING
    max_restarts: int = 0
    master_addr: str | None = None
    stdin: int | None = None
    prefix_template: str | None = None
    omp_num_threads: int | Mapping[int, int] | None = None
    gpu_visibility: Mapping[int, Mapping[str, str]] = _NOTHING
    virtual_local_rank: bool = False

    def start_arguments(self, standing: Standing, environ: Mapping[str, str]) -> dict[str, Any]:
        """The arguments of `start_processes` for the round.

        Args:
            standing: in which round, and where in it.
            environ: what the workers inherit.
        """
        return {
            "name": self.role,
            "entrypoint": self.entrypoint,
            "args": self._args(standing),
            "envs": self._envs(standing, environ),
            "log_line_prefixes": self._prefixes(standing),
            "stdin": self.stdin if standing.group_rank == 0 else None,
            **self.arguments,
        }

    def _args(self, standing: Standing) -> dict[int, tuple[object, ...]]:
        if callable(self.entrypoint):
            return {local: tuple(self.args) for local in range(self.nproc)}
        size = standing.round.world_size
        return {
            local: tuple(
                substitute_macros(
                    self.args,
                    local,
                    rank=standing.first_rank + local,
                    world_size=size,
                    local_world_size=self.nproc,
                )
            )
            for local in range(self.nproc)
        }

    def _envs(self, standing: Standing, environ: Mapping[str, str]) -> dict[int, dict[str, str]]:
        round = standing.round
        role_first = sum(
            m.nproc for m in round.members[: standing.group_rank] if m.role == self.role
        )
        envs = rank_environments(
            self.nproc,
            parent_env=environ,
            group_rank=standing.group_rank,
            group_world_size=len(round.members),
            first_rank=standing.first_rank,
            world_size=round.world_size,
            role=self.role,
            role_first_rank=role_first,
            role_world_size=sum(m.nproc for m in round.members if m.role == self.role),
            master_addr=self.master_addr or standing.master_addr,
            master_port=round.master_port,
            run_id=self.run_id,
            restart_count=round.restarts,
            max_restarts=self.max_restarts,
            omp_num_threads=self.omp_num_threads,
            gpu_visibility=self.gpu_visibility,
            virtual_local_rank=self.virtual_local_rank,
        )
        if standing.attempt:
            # A round that no failure has caused is a new attempt here, and no restart of the job.
            for env in envs.values():
                env[ATTEMPT_VARIABLE] = str(standing.attempt)
        return envs

    def _prefixes(self, standing: Standing) -> dict[int, str] | None:
        template = self.prefix_template
        if template is None:
            return None
        return {
            local: log_line_prefix(
                template, role_name=self.role, rank=standing.first_rank + local, local_rank=local
            )
            for local in range(self.nproc)
        }
