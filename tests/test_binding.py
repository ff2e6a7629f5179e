"""Who gets which CPUs and memory, and the argv and variables that say so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise.binding import (
    AffinityMode,
    BindingTools,
    MemoryPolicy,
    NumaOptions,
    RankBinding,
    bind_ranks,
    binding_prefix,
    gpu_visibility,
    rewrite_argv,
)
from asupervise.errors import BindingError
from asupervise.topology import Cache, Gpu, NumaNode, Socket, Topology, format_ranges, parse_ranges

NODE, SOCKET = AffinityMode.NODE, AffinityMode.SOCKET
EXCLUSIVE, CORE_COMPLEX = AffinityMode.EXCLUSIVE, AffinityMode.CORE_COMPLEX
BOTH = BindingTools(numactl="/bin/numactl", taskset="/bin/taskset")


def machine(
    *,
    sockets: int = 2,
    nodes_per_socket: int = 1,
    caches_per_node: int = 1,
    cores_per_cache: int = 8,
    threads: int = 1,
    allowed: str | None = None,
    gpus: Sequence[int | None] = (),
) -> Topology:
    """A regular machine: the first threads of all cores come first, as Linux mostly numbers them.

    `gpus` gives the NUMA node of each GPU.
    """
    total = sockets * nodes_per_socket * caches_per_node * cores_per_cache
    cores = [frozenset(core + total * t for t in range(threads)) for core in range(total)]

    def groups(count: int) -> list[frozenset[int]]:
        size = total // count
        return [frozenset[int]().union(*cores[i * size : (i + 1) * size]) for i in range(count)]

    nodes = groups(sockets * nodes_per_socket)
    cpus = frozenset(range(total * threads))
    return Topology(
        cpus=cpus,
        allowed=cpus if allowed is None else cpus & parse_ranges(allowed),
        nodes=tuple(
            NumaNode(i, mine, 1 << 30, tuple((j, 10 + abs(i - j)) for j in range(len(nodes))))
            for i, mine in enumerate(nodes)
        ),
        sockets=tuple(Socket(i, mine) for i, mine in enumerate(groups(sockets))),
        cores=tuple(cores),
        last_level_caches=tuple(
            Cache(3, mine) for mine in groups(sockets * nodes_per_socket * caches_per_node)
        ),
        gpus=tuple(Gpu(i, "nvidia", f"0000:{i:02x}:00.0", node) for i, node in enumerate(gpus)),
    )


def bound(topology: Topology, mode: AffinityMode, nprocs: int) -> list[str]:
    return [format_ranges(b.cpus) for b in bind_ranks(topology, NumaOptions(mode), nprocs)]


# --- near GPUs: torch's own examples ------------------------------------------------------------


def test_node_is_that_of_the_gpu() -> None:
    topology = machine(gpus=[0, 1, 0, 1])
    assert bound(topology, NODE, 4) == ["0-7", "8-15", "0-7", "8-15"]
    assert bound(topology, NODE, 1) == ["0-7"]


def test_socket_is_all_nodes_of_it() -> None:
    topology = machine(nodes_per_socket=2, cores_per_cache=4, gpus=[1, 2])
    assert bound(topology, NODE, 2) == ["4-7", "8-11"]
    assert bound(topology, SOCKET, 2) == ["0-7", "8-15"]


def test_a_node_over_two_sockets_stays_whole() -> None:
    topology = machine(gpus=[0])
    one_node = replace(topology, nodes=(NumaNode(0, topology.cpus),))
    assert bound(one_node, SOCKET, 1) == ["0-15"]


def test_exclusive_divides_a_nodes_cores_among_its_gpus() -> None:
    topology = machine(cores_per_cache=16, threads=2, gpus=[0, 0, 1, 1])
    assert bound(topology, EXCLUSIVE, 4) == [
        "0-7,32-39",
        "8-15,40-47",
        "16-23,48-55",
        "24-31,56-63",
    ]


def test_exclusive_counts_gpus_without_a_rank_too() -> None:
    assert bound(machine(gpus=[0, 1, 0, 1]), EXCLUSIVE, 2) == ["0-3", "8-11"]


def test_exclusive_gives_the_first_ranks_what_is_over() -> None:
    assert bound(machine(cores_per_cache=8, gpus=[0, 0, 0]), EXCLUSIVE, 3) == ["0-2", "3-5", "6-7"]


def test_exclusive_with_more_gpus_than_cores_on_a_node_is_an_error() -> None:
    with pytest.raises(BindingError, match=r"rank 0.*node 0 among 3 GPUs.*0-1 are 2 cores"):
        bound(machine(cores_per_cache=2, gpus=[0, 0, 0]), EXCLUSIVE, 3)


def test_core_complexes_differ_and_then_repeat() -> None:
    topology = machine(caches_per_node=2, cores_per_cache=4, gpus=[1, 1, 1, 0])
    assert bound(topology, CORE_COMPLEX, 4) == ["8-11", "12-15", "8-11", "0-3"]


def test_of_core_complexes_the_one_with_most_allowed_cpus_is_first() -> None:
    topology = machine(caches_per_node=2, cores_per_cache=4, gpus=[0, 0], allowed="2-3,4-7")
    assert bound(topology, CORE_COMPLEX, 2) == ["4-7", "2-3"]


@pytest.mark.parametrize("node", [None, 7])
def test_a_gpu_of_no_known_node_is_on_the_lowest_with_cpus(node: int | None) -> None:
    topology = machine(gpus=[node])
    empty = replace(topology.nodes[0], cpus=frozenset[int]())
    assert bound(topology, NODE, 1) == ["0-7"]
    assert bound(replace(topology, nodes=(empty, topology.nodes[1])), NODE, 1) == ["8-15"]
    (binding,) = bind_ranks(topology, NumaOptions(NODE), 1)
    assert "not known" in binding.why


def test_a_gpu_on_a_node_without_cpus_is_near_the_nearest_that_has() -> None:
    topology = machine(sockets=4, cores_per_cache=2, gpus=[2])
    nodes = [replace(n, cpus=frozenset()) if n.index == 2 else n for n in topology.nodes]
    nodes[2] = replace(nodes[2], distances=((0, 30), (1, 20), (2, 10), (3, 12)))
    assert bound(replace(topology, nodes=tuple(nodes)), NODE, 1) == ["6-7"]


def test_a_gpu_whose_node_is_not_allowed_is_an_error_that_says_all() -> None:
    topology = machine(gpus=[0, 1], allowed="0-3")
    with pytest.raises(BindingError, match=r"rank 1.*8-15 of NUMA node 1.*allowed CPUs 0-3") as got:
        bound(topology, NODE, 2)
    assert got.value.local_rank == 1


def test_visible_gpus_are_in_rank_order() -> None:
    topology = machine(gpus=[0, 0, 1, 1])
    shuffled = [topology.gpus[i] for i in (3, 0)]
    bindings = bind_ranks(topology, NumaOptions(NODE), 2, gpus=shuffled)
    assert [format_ranges(b.cpus) for b in bindings] == ["8-15", "0-7"]
    assert [b.gpu for b in bindings] == shuffled
    assert bindings[0].why == "all of node 1: near GPU 3 (0000:03:00.0)"


def test_with_fewer_gpus_than_ranks_ranks_are_spread() -> None:
    topology = machine(gpus=[1, 1])
    bindings = bind_ranks(topology, NumaOptions(NODE), 4)
    assert [format_ranges(b.cpus) for b in bindings] == ["0-7", "0-7", "8-15", "8-15"]
    assert bindings[0].gpu is None
    assert "2 GPUs being too few" in bindings[0].why


# --- without GPUs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "nprocs", "expected"),
    [
        (NODE, 1, ["0-3"]),
        (NODE, 2, ["0-3", "8-11"]),  # two ranks, two sockets
        (NODE, 4, ["0-3", "4-7", "8-11", "12-15"]),
        (NODE, 6, ["0-3", "0-3", "4-7", "8-11", "8-11", "12-15"]),
        (SOCKET, 2, ["0-7", "8-15"]),
        (SOCKET, 4, ["0-7", "0-7", "8-15", "8-15"]),
        (EXCLUSIVE, 2, ["0-3", "8-11"]),
        (EXCLUSIVE, 4, ["0-3", "4-7", "8-11", "12-15"]),
        (EXCLUSIVE, 5, ["0-1", "2-3", "4-7", "8-11", "12-15"]),
        (EXCLUSIVE, 16, [str(i) for i in range(16)]),
        (CORE_COMPLEX, 2, ["0-1", "8-9"]),
        (CORE_COMPLEX, 8, ["0-1", "2-3", "4-5", "6-7", "8-9", "10-11", "12-13", "14-15"]),
        (CORE_COMPLEX, 9, ["0-1", "2-3", "0-1", "4-5", "6-7", *["8-9", "10-11", "12-13", "14-15"]]),
    ],
)
def test_ranks_are_spread_in_blocks(mode: AffinityMode, nprocs: int, expected: list[str]) -> None:
    topology = machine(nodes_per_socket=2, caches_per_node=2, cores_per_cache=2)
    assert bound(topology, mode, nprocs) == expected


def test_unequal_parts_get_ranks_in_proportion() -> None:
    topology = machine(allowed="0-5,8-9")  # 6 cores and 2
    assert bound(topology, NODE, 4) == ["0-5", "0-5", "0-5", "8-9"]
    assert bound(topology, EXCLUSIVE, 4) == ["0-1", "2-3", "4-5", "8-9"]
    assert bound(machine(allowed="0-7,8"), EXCLUSIVE, 2) == ["0-3", "4-7"]


def test_more_ranks_than_cores_cannot_be_exclusive() -> None:
    with pytest.raises(BindingError, match=r"16 ranks.*0-3,16-19 are 4 cores"):
        bound(machine(threads=2, allowed="0-3,16-19"), EXCLUSIVE, 16)


def test_cpus_of_no_node_are_a_place_of_their_own() -> None:
    topology = machine()
    topology = replace(topology, nodes=topology.nodes[1:])
    assert bound(topology, NODE, 2) == ["8-15", "0-7"]


def test_cpus_without_a_known_cache_are_a_complex_a_socket() -> None:
    topology = replace(machine(), last_level_caches=())
    assert bound(topology, CORE_COMPLEX, 3) == ["0-7", "0-7", "8-15"]
    bare = replace(topology, sockets=(), nodes=(NumaNode(0, topology.cpus),))
    assert bound(bare, CORE_COMPLEX, 1) == bound(bare, SOCKET, 1) == ["0-15"]


def test_nodes_without_cpus_get_no_rank() -> None:
    topology = machine()
    topology = replace(topology, nodes=(*topology.nodes, NumaNode(5, frozenset(), 1 << 40)))
    assert bound(topology, NODE, 3) == ["0-7", "0-7", "8-15"]


def test_nothing_allowed_is_an_error() -> None:
    with pytest.raises(BindingError, match=r"4 ranks.*0-15.*allowed"):
        bound(machine(allowed=""), NODE, 4)


@pytest.mark.parametrize("nprocs", [0, -1])
def test_ranks_are_counted_from_one(nprocs: int) -> None:
    with pytest.raises(ValueError, match=f"nprocs={nprocs}"):
        bound(machine(), NODE, nprocs)


# --- whatever the machine -----------------------------------------------------------------------


@st.composite
def machines(draw: st.DrawFn, *, regular: bool = False) -> Topology:
    """Any partition into cores, caches, nodes and sockets, with any cpuset.

    Regular: each core lies within one node and one socket, as hardware has it.
    """
    cpus = draw(st.lists(st.integers(0, 80), min_size=1, max_size=24, unique=True))

    def labels(most: int) -> list[int]:
        return draw(st.lists(st.integers(0, most), min_size=len(cpus), max_size=len(cpus)))

    def partition(*keys: Sequence[int]) -> list[frozenset[int]]:
        groups: dict[tuple[int, ...], set[int]] = {}
        for cpu, key in zip(cpus, zip(*keys, strict=True), strict=True):
            groups.setdefault(key, set()).add(cpu)
        return sorted(map(frozenset, groups.values()), key=min)

    of_node, of_socket, of_core = labels(3), labels(2), labels(6)
    gaps = draw(st.lists(st.integers(1, 9), min_size=5, max_size=5))
    nodes = [
        NumaNode(sum(gaps[: i + 1]), mine, draw(st.sampled_from([None, 0, 1 << 30])))
        for i, mine in enumerate([*partition(of_node), frozenset[int]()])
    ]
    if draw(st.booleans()):
        nodes = nodes[1:]  # its CPUs are in no node
    on_nodes = draw(st.lists(st.sampled_from([None, *(n.index for n in nodes)]), max_size=6))
    return Topology(
        cpus=frozenset(cpus),
        allowed=frozenset(draw(st.lists(st.sampled_from(cpus), min_size=1))),
        nodes=tuple(nodes),
        sockets=tuple(Socket(i, mine) for i, mine in enumerate(partition(of_socket))),
        cores=tuple(partition(of_core, *((of_node, of_socket) if regular else ()))),
        last_level_caches=tuple(Cache(3, mine) for mine in partition(labels(4))[1:]),
        gpus=tuple(Gpu(i, "nvidia", f"0000:{i:02x}:00.0", n) for i, n in enumerate(on_nodes)),
    )


def bind_or_none(
    topology: Topology, mode: AffinityMode, nprocs: int, gpus: Sequence[Gpu]
) -> tuple[RankBinding, ...] | None:
    try:
        return bind_ranks(topology, NumaOptions(mode), nprocs, gpus=gpus)
    except BindingError:
        return None


@given(machines(), st.sampled_from(AffinityMode), st.integers(1, 12), st.booleans())
def test_every_rank_gets_some_of_the_allowed_cpus(
    topology: Topology, mode: AffinityMode, nprocs: int, with_gpus: bool
) -> None:
    gpus = topology.gpus if with_gpus else ()
    bindings = bind_or_none(topology, mode, nprocs, gpus)
    assert bindings == bind_or_none(topology, mode, nprocs, gpus)
    if bindings is None:
        assert gpus or mode is EXCLUSIVE
        return
    assert [b.local_rank for b in bindings] == list(range(nprocs))
    for binding in bindings:
        assert binding.cpus
        assert binding.cpus <= topology.allowed
        assert "\n" not in binding.why


@given(machines(), st.integers(1, 12))
def test_spread_ranks_stay_on_one_node(topology: Topology, nprocs: int) -> None:
    in_nodes = frozenset[int]().union(*(node.cpus for node in topology.nodes))
    for mode in (NODE, EXCLUSIVE, CORE_COMPLEX):
        for binding in bind_or_none(topology, mode, nprocs, ()) or ():
            homes = [node for node in topology.nodes if node.cpus & binding.cpus]
            assert len(homes) == bool(binding.cpus & in_nodes)
            assert not homes or binding.cpus <= homes[0].cpus


@given(machines(regular=True), st.integers(1, 12), st.booleans())
def test_exclusive_ranks_share_no_core(topology: Topology, nprocs: int, with_gpus: bool) -> None:
    bindings = bind_or_none(topology, EXCLUSIVE, nprocs, topology.gpus if with_gpus else ()) or ()
    for core in topology.cores:
        usable = core & topology.allowed
        owners = [b.cpus & core for b in bindings if b.cpus & core]
        assert owners in ([], [usable])


@given(machines(regular=True), st.integers(1, 12))
def test_exclusive_is_refused_only_for_want_of_cores(topology: Topology, nprocs: int) -> None:
    cores = sum(1 for core in topology.cores if core & topology.allowed)
    assert (bind_or_none(topology, EXCLUSIVE, nprocs, ()) is None) == (nprocs > cores)


# --- memory -------------------------------------------------------------------------------------


def memory(topology: Topology, policy: str, nprocs: int = 2, mode: str = "node") -> list[str]:
    options = NumaOptions(AffinityMode(mode), memory_policy=MemoryPolicy(policy))
    return [format_ranges(b.memory_nodes) for b in bind_ranks(topology, options, nprocs)]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("none", ["", ""]),
        ("local", ["0-1", "2-3"]),
        ("preferred", ["0", "2"]),
        ("interleave", ["0-3", "0-3"]),
    ],
)
def test_memory_nodes(policy: str, expected: list[str]) -> None:
    topology = machine(nodes_per_socket=2)
    topology = replace(topology, nodes=(*topology.nodes, NumaNode(9, frozenset(), 1 << 40)))
    assert memory(topology, policy, mode="socket") == expected


def test_preferred_is_the_gpus_node() -> None:
    assert memory(machine(nodes_per_socket=2, gpus=[3, 1]), "preferred", mode="socket") == [
        "3",
        "1",
    ]


def test_preferred_without_memory_is_the_nearest_with() -> None:
    topology = machine(nodes_per_socket=2)
    bare = replace(topology.nodes[2], memory_bytes=0)
    topology = replace(topology, nodes=(*topology.nodes[:2], bare, topology.nodes[3]))
    assert memory(topology, "preferred", 4) == ["0", "1", "1", "3"]
    assert memory(topology, "interleave", 1) == ["0-1,3"]


def test_memory_keeps_to_the_nodes_that_are_allowed() -> None:
    topology = replace(machine(), allowed_nodes=frozenset({1}))
    assert memory(topology, "preferred") == ["1", "1"]
    assert memory(topology, "interleave") == ["1", "1"]


@pytest.mark.parametrize("policy", ["preferred", "interleave"])
def test_no_memory_anywhere_is_an_error(policy: str) -> None:
    topology = machine()
    nodes = tuple(replace(node, memory_bytes=0) for node in topology.nodes)
    with pytest.raises(BindingError, match=f"rank 0.*'{policy}'"):
        memory(replace(topology, nodes=nodes), policy)


# --- options ------------------------------------------------------------------------------------


def test_options_take_values_and_members() -> None:
    assert NumaOptions("core-complex") == NumaOptions(CORE_COMPLEX)  # type: ignore[arg-type]
    assert NumaOptions(NODE, memory_policy="local").memory_policy is MemoryPolicy.LOCAL  # type: ignore[arg-type]
    assert NumaOptions(NODE).memory_policy is MemoryPolicy.NONE
    assert isinstance(NODE, str)


@pytest.mark.parametrize("mode", ["NODE", "core_complex", "", None, 3])
def test_an_unknown_mode_names_what_is_known(mode: object) -> None:
    with pytest.raises(ValueError, match=r"affinity_mode=.*'node', 'socket', 'exclusive', 'core-"):
        NumaOptions(mode)  # type: ignore[arg-type]


def test_an_unknown_policy_names_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"memory_policy='far'.*'local', 'preferred'"):
        NumaOptions(NODE, memory_policy="far")  # type: ignore[arg-type]


# --- the argv -----------------------------------------------------------------------------------


def binding_of(policy: str = "none", cpus: str = "0-2,4", nodes: str = "") -> RankBinding:
    return RankBinding(2, parse_ranges(cpus), MemoryPolicy(policy), parse_ranges(nodes), None, "")


@pytest.mark.parametrize(
    ("policy", "nodes", "flags"),
    [
        ("none", "", []),
        ("local", "0", ["--localalloc"]),
        ("preferred", "1", ["--preferred=1"]),
        ("interleave", "0-1,8", ["--interleave=0-1,8"]),
    ],
)
def test_numactl(policy: str, nodes: str, flags: list[str]) -> None:
    argv = rewrite_argv(["-odd", "--physcpubind=9"], binding_of(policy, nodes=nodes), BOTH)
    rest = ["--", "-odd", "--physcpubind=9"]
    assert list(argv) == ["/bin/numactl", "--physcpubind=0-2,4", *flags, *rest]


def test_taskset_does_for_cpus_alone() -> None:
    argv = rewrite_argv(["prog", "-x"], binding_of(), BindingTools(taskset="/bin/taskset"))
    assert argv == ("/bin/taskset", "--cpu-list", "0-2,4", "prog", "-x")


def test_unbound_is_unchanged() -> None:
    assert rewrite_argv(["prog"], None, BindingTools()) == ("prog",)
    assert binding_prefix(None, BindingTools()) == ()


@pytest.mark.parametrize("taskset", [None, "/bin/taskset"])
def test_memory_without_numactl_says_what_to_install(taskset: str | None) -> None:
    with pytest.raises(BindingError, match=r"rank 2.*'local'.*numactl") as got:
        rewrite_argv(["prog"], binding_of("local"), BindingTools(taskset=taskset))
    assert "install numactl" in (got.value.hint or "")


def test_no_tool_at_all_says_what_to_install() -> None:
    with pytest.raises(BindingError, match="numactl or taskset") as got:
        rewrite_argv(["prog"], binding_of(), BindingTools())
    assert "util-linux" in (got.value.hint or "")


@pytest.mark.parametrize("tool", ["numactl", "taskset"])
def test_the_real_tools_understand_it(tool: str) -> None:
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed")
    cpu = min(os.sched_getaffinity(0))
    prefix = binding_prefix(binding_of(cpus=str(cpu)), BindingTools(**{tool: path}))
    probe = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if tool == "numactl" and probe.returncode:
        pytest.skip(f"numactl may not be used here: {probe.stderr.strip()}")
    program = [sys.executable, "-c", "import os; print(*os.sched_getaffinity(0))"]
    done = subprocess.run([*prefix, *program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (str(cpu), "")


# --- GPU visibility -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vendor", "env", "expected"),
    [
        (None, {}, {"CUDA_VISIBLE_DEVICES": "1"}),
        (None, {"CUDA_VISIBLE_DEVICES": "5, 3 ,4"}, {"CUDA_VISIBLE_DEVICES": "3"}),
        ("nvidia", {}, {"CUDA_VISIBLE_DEVICES": "1"}),
        ("nvidia", {"CUDA_VISIBLE_DEVICES": "GPU-b,GPU-a"}, {"CUDA_VISIBLE_DEVICES": "GPU-a"}),
        ("nvidia", {"HIP_VISIBLE_DEVICES": "7,8"}, {"CUDA_VISIBLE_DEVICES": "1"}),
        ("amd", {}, {"HIP_VISIBLE_DEVICES": "1"}),
        ("amd", {"HIP_VISIBLE_DEVICES": "3,2"}, {"HIP_VISIBLE_DEVICES": "2"}),
        ("amd", {"CUDA_VISIBLE_DEVICES": "3,2"}, {"CUDA_VISIBLE_DEVICES": "2"}),
        ("amd", {"ROCR_VISIBLE_DEVICES": "6,5"}, {"HIP_VISIBLE_DEVICES": "1"}),
        ("intel", {}, {"ZE_AFFINITY_MASK": "1"}),
        ("intel", {"ZE_AFFINITY_MASK": ""}, {"ZE_AFFINITY_MASK": "1"}),
        ("intel", {"ZE_AFFINITY_MASK": "10,0.1,2"}, {"ZE_AFFINITY_MASK": "2"}),
    ],
)
def test_gpu_visibility(vendor: str | None, env: dict[str, str], expected: dict[str, str]) -> None:
    gpus = [Gpu(0, vendor, ""), Gpu(1, vendor, "")] if vendor else []
    assert gpu_visibility(gpus, 1, env) == expected


def test_a_rank_beyond_the_list_has_no_gpu() -> None:
    with pytest.raises(ValueError, match=r"rank 2.*CUDA_VISIBLE_DEVICES='0,1'"):
        gpu_visibility((), 2, {"CUDA_VISIBLE_DEVICES": "0,1"})
