"""What a worker is told: the environment of each rank, macros in its arguments, its log prefix.

Pure: nothing here reads the environment of this process; callers pass it in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

__all__ = ["fair_share", "log_line_prefix", "rank_environments", "substitute_macros"]

# What string.Template recognises: "$$", "$name", "${name}".
_PLACEHOLDER = r"\$(?:(\$)|([_a-zA-Z][_a-zA-Z0-9]*)|\{([_a-zA-Z][_a-zA-Z0-9]*)\})"


def rank_environments(
    local_world_size: int,
    *,
    parent_env: Mapping[str, str],
    group_rank: int = 0,
    group_world_size: int = 1,
    first_rank: int | None = None,
    world_size: int | None = None,
    role: str = "default",
    role_first_rank: int | None = None,
    role_world_size: int | None = None,
    master_addr: str = "127.0.0.1",
    master_port: int = 29500,
    run_id: str = "none",
    restart_count: int = 0,
    max_restarts: int = 0,
    omp_num_threads: int | Mapping[int, int] | None = None,
    gpu_visibility: Mapping[int, Mapping[str, str]] | None = None,
    virtual_local_rank: bool = False,
) -> dict[int, dict[str, str]]:
    """The variables that `torchrun` gives each worker, by local rank.

    With them `torch.distributed.init_process_group()` works untouched. They are laid over the
    parent's environment; `TORCHELASTIC_ERROR_FILE` is added by whoever knows the log folder.

    Args:
        local_world_size: how many workers this node runs.
        parent_env: what the workers inherit (`os.environ`); the user's own settings in it win.
        group_rank: this node's rank among the nodes.
        group_world_size: how many nodes there are.
        first_rank: global rank of local rank 0; by default every node runs equally many workers.
        world_size: how many workers all nodes run; by default the same.
        role: name of the workers' role.
        role_first_rank: rank of local rank 0 among the workers of its role; by default all have
            the same.
        role_world_size: how many workers of the role all nodes run; by default likewise.
        master_addr: where rank 0 listens; brackets around an IPv6 address are taken off.
        master_port: the port that rank 0 listens on.
        run_id: identifies the job.
        restart_count: how often the group has been restarted.
        max_restarts: how often it may be.
        omp_num_threads: threads for OpenMP, one number for all or one for each local rank; not
            used where the user has set `OMP_NUM_THREADS`.
        gpu_visibility: variables that choose the GPUs of each local rank.
        virtual_local_rank: every worker is told local rank 0, because it sees one GPU only.

    Raises:
        ValueError: if a count is not positive or a rank is out of range.

    Example:
        >>> envs = rank_environments(2, parent_env={}, group_rank=1, group_world_size=2)
        >>> envs[0]["RANK"], envs[1]["RANK"], envs[1]["LOCAL_RANK"], envs[1]["WORLD_SIZE"]
        ('2', '3', '1', '4')
    """
    first = group_rank * local_world_size if first_rank is None else first_rank
    size = group_world_size * local_world_size if world_size is None else world_size
    role_first = first if role_first_rank is None else role_first_rank
    _check_sizes(local_world_size, group_rank, group_world_size, first, size)
    shared = {
        "GROUP_RANK": str(group_rank),
        "ROLE_NAME": role,
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "GROUP_WORLD_SIZE": str(group_world_size),
        "ROLE_WORLD_SIZE": str(size if role_world_size is None else role_world_size),
        "MASTER_ADDR": _without_brackets(master_addr),
        "MASTER_PORT": str(master_port),
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": str(restart_count),
        "TORCHELASTIC_MAX_RESTARTS": str(max_restarts),
        # torch's agent hosts the store that ranks connect to; ours does not, so rank 0 hosts it.
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": parent_env.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
    }
    return {
        local_rank: {
            "RANK": str(first + local_rank),
            "LOCAL_RANK": "0" if virtual_local_rank else str(local_rank),
            "ROLE_RANK": str(role_first + local_rank),
            **shared,
            **_omp_threads(omp_num_threads, local_rank, parent_env),
            **(gpu_visibility or {}).get(local_rank, {}),
        }
        for local_rank in range(local_world_size)
    }


def _check_sizes(
    local_world_size: int, group_rank: int, group_world_size: int, first: int, size: int
) -> None:
    if local_world_size < 1:
        raise ValueError(f"local_world_size must be at least 1, got {local_world_size}")
    if not 0 <= group_rank < group_world_size:
        raise ValueError(
            f"group_rank must be 0 to {group_world_size - 1} in a group of {group_world_size}, "
            f"got {group_rank}"
        )
    if first < 0 or first + local_world_size > size:
        raise ValueError(
            f"ranks {first} to {first + local_world_size - 1} do not fit a world_size of {size}"
        )


def _without_brackets(address: str) -> str:
    return address[1:-1] if address.startswith("[") and address.endswith("]") else address


def _omp_threads(
    threads: int | Mapping[int, int] | None, local_rank: int, parent_env: Mapping[str, str]
) -> dict[str, str]:
    users = parent_env.get("OMP_NUM_THREADS")
    if users is not None:
        return {"OMP_NUM_THREADS": users}
    number = threads.get(local_rank) if isinstance(threads, Mapping) else threads
    return {} if number is None else {"OMP_NUM_THREADS": str(number)}


def fair_share(allowed_cpus: int, local_world_size: int) -> int:
    """Each worker's share of the CPUs: at least 1.

    torchrun gives every worker one OpenMP thread; up to 1.75 times the throughput was measured
    with the share (pytorch/torchtitan#4031).

    Example:
        >>> fair_share(64, 8), fair_share(2, 8)
        (8, 1)
    """
    return max(1, allowed_cpus // local_world_size)


def substitute_macros(
    args: Sequence[object],
    local_rank: int,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    local_world_size: int | None = None,
) -> list[object]:
    """Fill in the macros of one worker's arguments.

    ``${local_rank}`` and ``$local_rank`` are torch's. ``${rank}``, ``${world_size}`` and
    ``${local_world_size}`` are ours, where given, and only in braces: ``sh -c 'echo $rank'`` means
    a variable of the shell. ``$$`` stands for ``$``. Anything else is left as it is, and so is
    an argument that is no string.

    Example:
        >>> substitute_macros(["--out=${local_rank}.txt", "${HOME}", "$$5"], 3)
        ['--out=3.txt', '${HOME}', '$5']
    """
    extra = {"rank": rank, "world_size": world_size, "local_world_size": local_world_size}
    bare = {"local_rank": str(local_rank)}
    braced = {**bare, **{name: str(value) for name, value in extra.items() if value is not None}}
    return [_fill(arg, bare, braced) if isinstance(arg, str) else arg for arg in args]


def log_line_prefix(template: str, *, role_name: str, rank: int, local_rank: int) -> str:
    """The prefix of one worker's lines on the console.

    Args:
        template: may hold ``${role_name}``, ``${rank}`` and ``${local_rank}``.
        role_name: name of the workers' role.
        rank: global rank.
        local_rank: local rank.

    Example:
        >>> log_line_prefix("[${role_name} ${rank}] ", role_name="trainer", rank=5, local_rank=1)
        '[trainer 5] '
    """
    names = {"role_name": role_name, "rank": str(rank), "local_rank": str(local_rank)}
    return _fill(template, names, names)


def _fill(text: str, bare: Mapping[str, str], braced: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        escaped, name, name_in_braces = found.groups()
        if escaped:
            return "$"
        known, key = (bare, name) if name else (braced, name_in_braces)
        return known.get(key, found[0])

    return re.sub(_PLACEHOLDER, value, text) if "$" in text else text
