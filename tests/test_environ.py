"""The pure part of what a worker is told; `string.Template` is the reference for macros."""

from __future__ import annotations

from string import Template

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise.environ import (
    fair_share,
    log_line_prefix,
    rank_environments,
    substitute_macros,
)

# Seen with `torchrun --nproc-per-node 2 --master-port 29477 --no-python env` of torch 2.13,
# except for USE_AGENT_STORE and the number of threads, which differ by contract.
RANK_1_OF_2 = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "0",
    "ROLE_RANK": "1",
    "ROLE_NAME": "default",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "1",
    "ROLE_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29477",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_MAX_RESTARTS": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "False",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "OMP_NUM_THREADS": "4",
}


def test_a_rank_is_told_what_torchrun_tells_it() -> None:
    envs = rank_environments(2, parent_env={}, master_port=29477, omp_num_threads=4)
    assert list(envs) == [0, 1]
    assert envs[1] == RANK_1_OF_2


def test_ranks_of_a_later_node_follow_those_of_the_earlier_ones() -> None:
    envs = rank_environments(3, parent_env={}, group_rank=2, group_world_size=4, role="trainer")
    assert [env["RANK"] for env in envs.values()] == ["6", "7", "8"]
    assert [env["ROLE_RANK"] for env in envs.values()] == ["6", "7", "8"]
    assert [env["LOCAL_RANK"] for env in envs.values()] == ["0", "1", "2"]
    assert {env["WORLD_SIZE"] for env in envs.values()} == {"12"}
    assert envs[0]["GROUP_RANK"] == "2"
    assert envs[0]["ROLE_NAME"] == "trainer"


def test_nodes_may_run_different_numbers_of_workers() -> None:
    envs = rank_environments(
        2, parent_env={}, group_rank=1, group_world_size=2, first_rank=5, world_size=7
    )
    assert [env["RANK"] for env in envs.values()] == ["5", "6"]
    assert envs[0]["WORLD_SIZE"] == "7"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"local_world_size": 0}, "local_world_size must be at least 1, got 0"),
        ({"local_world_size": 1, "group_rank": 1}, "group_rank must be 0 to 0"),
        ({"local_world_size": 1, "group_rank": -1}, "got -1"),
        ({"local_world_size": 4, "first_rank": 5, "world_size": 8}, "ranks 5 to 8 do not fit"),
        ({"local_world_size": 1, "first_rank": -1}, "ranks -1 to -1 do not fit"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rank_environments(parent_env={}, **arguments)  # type: ignore[arg-type]


def test_the_users_own_settings_win() -> None:
    parent = {"OMP_NUM_THREADS": "7", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}
    env = rank_environments(1, parent_env=parent, omp_num_threads=2)[0]
    assert env["OMP_NUM_THREADS"] == "7"
    assert env["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"


def test_threads_may_differ_by_rank_or_be_left_alone() -> None:
    envs = rank_environments(2, parent_env={}, omp_num_threads={0: 8, 1: 4})
    assert [env["OMP_NUM_THREADS"] for env in envs.values()] == ["8", "4"]
    assert "OMP_NUM_THREADS" not in rank_environments(1, parent_env={})[0]


@pytest.mark.parametrize(
    ("given_addr", "told"), [("[::1]", "::1"), ("::1", "::1"), ("node7", "node7")]
)
def test_an_ipv6_address_is_told_without_brackets(given_addr: str, told: str) -> None:
    assert rank_environments(1, parent_env={}, master_addr=given_addr)[0]["MASTER_ADDR"] == told


def test_a_virtual_local_rank_is_0_beside_the_one_gpu_of_each_worker() -> None:
    visibility = {0: {"CUDA_VISIBLE_DEVICES": "3"}, 1: {"CUDA_VISIBLE_DEVICES": "1"}}
    envs = rank_environments(2, parent_env={}, virtual_local_rank=True, gpu_visibility=visibility)
    assert [env["LOCAL_RANK"] for env in envs.values()] == ["0", "0"]
    assert [env["RANK"] for env in envs.values()] == ["0", "1"]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in envs.values()] == ["3", "1"]


def test_ranks_do_not_share_one_dictionary() -> None:
    envs = rank_environments(2, parent_env={})
    envs[0]["EXTRA"] = "1"
    assert "EXTRA" not in envs[1]


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_shares_are_at_least_1_and_never_more_than_there_is(cpus: int, workers: int) -> None:
    share = fair_share(cpus, workers)
    assert share >= 1
    assert share == 1 or share * workers <= cpus < (share + 1) * workers


MACRO_TEXT = st.lists(
    st.sampled_from(
        ["$", "$$", "{", "}", "${local_rank}", "$local_rank", "${other}", "$other", "_x", "a", "é"]
    )
    | st.text(max_size=4)
).map("".join)


@given(MACRO_TEXT, st.integers(0, 999))
def test_macros_are_those_of_torch(text: str, local_rank: int) -> None:
    expected = Template(text).safe_substitute(local_rank=str(local_rank))
    assert substitute_macros([text], local_rank) == [expected]


@given(MACRO_TEXT, st.integers(0, 99), st.integers(0, 99))
def test_prefixes_are_those_of_torch(text: str, rank: int, local_rank: int) -> None:
    names = {"role_name": "trainer", "rank": rank, "local_rank": local_rank}
    template = text + "${rank}$role_name"
    expected = Template(template).safe_substitute(names)
    assert (
        log_line_prefix(template, role_name="trainer", rank=rank, local_rank=local_rank) == expected
    )


def test_our_own_macros_need_braces_and_a_value() -> None:
    args = ["${rank}/${world_size}", "$rank", "${local_world_size}", "${group_rank}"]
    assert substitute_macros(args, 1, rank=5, world_size=8) == [
        "5/8",
        "$rank",
        "${local_world_size}",
        "${group_rank}",
    ]


def test_arguments_that_are_no_strings_are_left_alone() -> None:
    assert substitute_macros([1, None, b"${local_rank}"], 1) == [1, None, b"${local_rank}"]
