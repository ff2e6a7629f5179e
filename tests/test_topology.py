"""Reading small hand-made machines: gaps, offline CPUs, old kernels, missing and broken files."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise.errors import BindingError
from asupervise.topology import (
    Cache,
    Gpu,
    NumaNode,
    Socket,
    Topology,
    format_ranges,
    parse_ranges,
    read_gpus,
    read_topology,
    visible_gpus,
)

CPU = "sys/devices/system/cpu"
NODE = "sys/devices/system/node"
PCI = "sys/bus/pci/devices"


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def mask(cpus: Iterable[int], words: int = 2) -> str:
    value = sum(1 << cpu for cpu in cpus)
    return ",".join(f"{value >> 32 * i & 0xFFFFFFFF:08x}" for i in reversed(range(words))) + "\n"


def cpu_files(cpu: int, core: Iterable[int], package: Iterable[int], **ids: int) -> dict[str, str]:
    """A CPU's topology folder as kernels before 5.3 write it: masks only."""
    folder = f"{CPU}/cpu{cpu}/topology"
    return {
        f"{folder}/thread_siblings": mask(core),
        f"{folder}/core_siblings": mask(package),
        f"{folder}/core_id": f"{ids.get('core_id', min(core))}\n",
        f"{folder}/physical_package_id": f"{ids.get('package_id', 0)}\n",
    }


def cache_files(
    cpu: int, index: int, level: int, cpus: Iterable[int], kind: str = "Unified"
) -> dict[str, str]:
    folder = f"{CPU}/cpu{cpu}/cache/index{index}"
    return {
        f"{folder}/level": f"{level}\n",
        f"{folder}/type": f"{kind}\n",
        f"{folder}/shared_cpu_map": mask(cpus),
    }


def two_sockets() -> dict[str, str]:
    """8 CPUs: 2 sockets of 2 cores of 2 threads (n and n+4), a node and an L3 for each socket."""
    files = {f"{CPU}/online": "0-7\n"}
    for cpu in range(8):
        core = {cpu % 4, cpu % 4 + 4}
        package = {0, 1, 4, 5} if cpu % 4 < 2 else {2, 3, 6, 7}
        files |= cpu_files(cpu, core, package, package_id=min(package) // 2, core_id=cpu % 2)
        files |= cache_files(cpu, 0, 1, core, "Data") | cache_files(cpu, 1, 1, core, "Instruction")
        files |= cache_files(cpu, 2, 2, core) | cache_files(cpu, 3, 3, package)
    for node, cpus in ((0, {0, 1, 4, 5}), (1, {2, 3, 6, 7})):
        files[f"{NODE}/node{node}/cpumap"] = mask(cpus)
        files[f"{NODE}/node{node}/meminfo"] = f"Node {node} MemTotal:  1024 kB\n"
        files[f"{NODE}/node{node}/distance"] = ["10 21\n", "21 10\n"][node]
    return files


def without(files: Mapping[str, str], *parts: str) -> dict[str, str]:
    return {name: text for name, text in files.items() if not any(part in name for part in parts)}


def sets(*groups: str) -> tuple[frozenset[int], ...]:
    return tuple(map(parse_ranges, groups))


# --- CPU sets as text ---------------------------------------------------------------------------


@given(st.frozensets(st.integers(0, 5000)))
def test_ranges_are_inverses(numbers: frozenset[int]) -> None:
    assert parse_ranges(format_ranges(numbers)) == numbers


@given(st.frozensets(st.integers(0, 300), min_size=1))
def test_ranges_are_as_short_as_can_be(numbers: frozenset[int]) -> None:
    text = format_ranges(numbers)
    starts = [n for n in numbers if n - 1 not in numbers]
    assert text.count(",") == len(starts) - 1
    assert format_ranges(parse_ranges(text)) == text


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("", set()), (" \n", set()), ("0-2,4", {0, 1, 2, 4}), ("7", {7}), ("3,1-3\n", {1, 2, 3})],
)
def test_ranges_are_parsed(text: str, numbers: set[int]) -> None:
    assert parse_ranges(text) == numbers


@pytest.mark.parametrize(
    "text", ["a", "1-", "-1", "0x3", "3-1", "1,,2", "1 2", "0-99999999999", "٣", "1-2-3", ","]
)
def test_ranges_that_are_none_say_so(text: str) -> None:
    with pytest.raises(ValueError, match="in "):
        parse_ranges(text)


def test_negative_numbers_are_not_formatted() -> None:
    with pytest.raises(ValueError, match="-1"):
        format_ranges({-1, 3})


# --- a whole machine ----------------------------------------------------------------------------


def check_two_sockets(topology: Topology) -> None:
    assert topology.cpus == set(range(8))
    assert topology.cores == sets("0,4", "1,5", "2,6", "3,7")
    assert topology.sockets == (
        Socket(0, parse_ranges("0-1,4-5")),
        Socket(1, parse_ranges("2-3,6-7")),
    )
    assert {node.index: node.cpus for node in topology.nodes} == {
        0: parse_ranges("0-1,4-5"),
        1: parse_ranges("2-3,6-7"),
    }
    assert topology.last_level_caches == (
        Cache(3, parse_ranges("0-1,4-5")),
        Cache(3, parse_ranges("2-3,6-7")),
    )


def test_two_sockets(tmp_path: Path) -> None:
    topology = read_topology(write(tmp_path, two_sockets()))
    check_two_sockets(topology)
    assert topology.allowed == topology.cpus
    assert topology.allowed_nodes is None
    assert topology.nodes[1] == NumaNode(1, parse_ranges("2-3,6-7"), 1 << 20, ((0, 21), (1, 10)))


def test_the_sys_folder_itself_is_a_root_too(tmp_path: Path) -> None:
    write(tmp_path, two_sockets())
    assert read_topology(tmp_path / "sys") == read_topology(str(tmp_path))


def test_lists_do_where_there_are_no_masks(tmp_path: Path) -> None:
    renamed = {}
    for name, text in two_sockets().items():
        if name.endswith(("thread_siblings", "core_siblings", "shared_cpu_map", "cpumap")):
            bits = int(text.replace(",", ""), 16)
            text = format_ranges(i for i in range(64) if bits >> i & 1) + "\n"
            name = name.removesuffix("map") + "list" if name.endswith("map") else name + "_list"
        renamed[name] = text
    check_two_sockets(read_topology(write(tmp_path, renamed)))


def test_newer_names_win(tmp_path: Path) -> None:
    files = two_sockets()
    for name, text in list(files.items()):
        for old, new in (("thread_siblings", "core_cpus"), ("core_siblings", "package_cpus")):
            if name.endswith(old):
                files[name.replace(old, new)] = text
                files[name] = mask({0})
    check_two_sockets(read_topology(write(tmp_path, files)))


def test_allowed_cpus_are_cut_to_the_online_ones(tmp_path: Path) -> None:
    topology = read_topology(write(tmp_path, two_sockets()), allowed=[1, 2, 99])
    assert topology.allowed == {1, 2}
    assert topology.cpus == set(range(8))


def test_our_own_machine_can_be_read() -> None:
    topology = read_topology()
    assert topology.allowed
    assert topology.allowed <= topology.cpus
    for groups in (topology.cores, [socket.cpus for socket in topology.sockets]):
        assert sorted(cpu for group in groups for cpu in group) == sorted(topology.cpus)


def test_own_affinity_counts_though_sys_does_not_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose /sys shows CPUs 0 to N-1 in place of ours."""
    strange = max(read_topology().cpus) + 1000
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {strange})
    topology = read_topology(gpus=())
    assert topology.allowed == {strange}
    assert any(strange in socket.cpus for socket in topology.sockets)


# --- CPUs ---------------------------------------------------------------------------------------


def test_offline_cpus_are_in_nothing(tmp_path: Path) -> None:
    # The kernel removes the topology of an offline CPU, while stale caches may stay.
    files = without(two_sockets(), "cpu0/topology", "cpu7/topology")
    files[f"{CPU}/online"] = "1-6\n"
    topology = read_topology(write(tmp_path, files))
    assert topology.cpus == set(range(1, 7))
    assert topology.cores == sets("1,5", "2,6", "3", "4")
    assert [cache.cpus for cache in topology.last_level_caches] == list(sets("1,4-5", "2-3,6"))
    assert [node.cpus for node in topology.nodes] == list(sets("1,4-5", "2-3,6"))


def test_online_is_asked_of_each_cpu_where_there_is_no_list(tmp_path: Path) -> None:
    files = without(two_sockets(), f"{CPU}/online")
    files |= {f"{CPU}/cpu{cpu}/online": f"{int(cpu != 3)}\n" for cpu in range(1, 8)}
    assert read_topology(write(tmp_path, files)).cpus == set(range(8)) - {3}


def test_a_cpu_that_is_not_described_is_offline_where_others_are(tmp_path: Path) -> None:
    files = without(two_sockets(), f"{CPU}/online", "cpu6/topology")
    assert read_topology(write(tmp_path, files)).cpus == set(range(8)) - {6}


def test_a_kernel_that_describes_no_cpu(tmp_path: Path) -> None:
    files = {f"{CPU}/cpu{cpu}/uevent": "" for cpu in range(3)}
    topology = read_topology(
        write(tmp_path, files | {f"{CPU}/cpufreq/x": "", f"{CPU}/cpuidle": ""})
    )
    assert topology.cores == sets("0", "1", "2")
    assert topology.sockets == (Socket(None, frozenset({0, 1, 2})),)
    assert topology.nodes == (NumaNode(0, frozenset({0, 1, 2})),)
    assert topology.last_level_caches == ()


def test_proc_stat_is_the_last_resort(tmp_path: Path) -> None:
    write(tmp_path, {"proc/stat": "cpu  1 2 3\ncpu0 1 2 3\ncpu5 1 2 3\nintr 1\n"})
    assert read_topology(tmp_path).cpus == {0, 5}


def test_a_root_without_cpus_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BindingError, match=tmp_path.name):
        read_topology(tmp_path)


@pytest.mark.parametrize("broken", ["", "zz\n", "\0\0", "3-1", "-5", "9" * 40])
def test_broken_files_degrade(tmp_path: Path, broken: str) -> None:
    files = dict.fromkeys(two_sockets(), broken)
    topology = read_topology(write(tmp_path, files), gpus=())
    assert topology.cpus == set(range(8))
    assert {cpu for core in topology.cores for cpu in core} == topology.cpus
    assert {cpu for socket in topology.sockets for cpu in socket.cpus} == topology.cpus


def test_files_that_are_folders_or_not_text_degrade(tmp_path: Path) -> None:
    write(tmp_path, without(two_sockets(), f"{CPU}/online", "cpu0/topology/thread_siblings"))
    (tmp_path / CPU / "online").mkdir()
    (tmp_path / CPU / "cpu0/topology/thread_siblings").write_bytes(b"\xff\xfe\x00")
    assert read_topology(tmp_path).cores == sets("0", "1,5", "2,6", "3,7", "4")


def test_a_nul_at_the_end_of_a_copied_file_is_no_part_of_it(tmp_path: Path) -> None:
    files = {name: text + "\0" for name, text in two_sockets().items()}
    check_two_sockets(read_topology(write(tmp_path, files)))


def test_a_hybrid_machine(tmp_path: Path) -> None:
    """Two threads on core 0; four single cores, of which the last two share an L2 and no L3."""
    files = {f"{CPU}/online": "0-5"}
    for cpu in range(6):
        core = {0, 1} if cpu < 2 else {cpu}
        files |= cpu_files(cpu, core, range(6)) | cache_files(cpu, 0, 2, core)
        files |= cache_files(cpu, 1, 3, range(4)) if cpu < 4 else cache_files(cpu, 0, 2, {4, 5})
    topology = read_topology(write(tmp_path, files))
    assert topology.cores == sets("0-1", "2", "3", "4", "5")
    assert topology.last_level_caches == (
        Cache(3, parse_ranges("0-3")),
        Cache(2, frozenset({4, 5})),
    )


def test_core_ids_repeat_and_siblings_are_the_truth(tmp_path: Path) -> None:
    files: dict[str, str] = {}
    for cpu in range(4):
        files |= cpu_files(cpu, {cpu}, {cpu // 2 * 2, cpu // 2 * 2 + 1}, core_id=0, package_id=0)
    topology = read_topology(write(tmp_path, files))
    assert len(topology.cores) == 4
    assert topology.sockets == (Socket(0, frozenset({0, 1})), Socket(0, frozenset({2, 3})))


def test_a_package_id_of_minus_one_is_not_known(tmp_path: Path) -> None:
    files: dict[str, str] = {}
    for cpu in range(2):
        files |= cpu_files(cpu, {cpu}, {0, 1}, package_id=-1)
    assert read_topology(write(tmp_path, files)).sockets == (Socket(None, frozenset({0, 1})),)


def test_package_ids_do_where_no_siblings_are_shown(tmp_path: Path) -> None:
    files = without(two_sockets(), "core_siblings")
    assert [s.cpus for s in read_topology(write(tmp_path, files)).sockets] == list(
        sets("0-1,4-5", "2-3,6-7")
    )


@pytest.mark.parametrize(
    ("vendor", "family", "cores"),
    [("AuthenticAMD", 21, 4), ("AuthenticAMD", 25, 2), ("GenuineIntel", 21, 2)],
)
def test_the_two_cores_of_a_bulldozer_module_are_cores(
    tmp_path: Path, vendor: str, family: int, cores: int
) -> None:
    files = {"proc/cpuinfo": f"vendor_id\t: {vendor}\ncpu family\t: {family}\n"}
    for cpu in range(4):
        files |= cpu_files(cpu, {cpu // 2 * 2, cpu // 2 * 2 + 1}, range(4), core_id=cpu)
    assert len(read_topology(write(tmp_path, files)).cores) == cores


def test_an_empty_cache_mask_means_the_core(tmp_path: Path) -> None:
    files = two_sockets()
    files |= {name: mask(()) for name in files if name.endswith("index3/shared_cpu_map")}
    caches = read_topology(write(tmp_path, files)).last_level_caches
    assert [cache.cpus for cache in caches] == list(sets("0,4", "1,5", "2,6", "3,7"))


def test_instruction_caches_do_not_count(tmp_path: Path) -> None:
    files = two_sockets()
    for cpu in range(8):
        files |= cache_files(cpu, 4, 4, {cpu}, "Instruction")
    check_two_sockets(read_topology(write(tmp_path, files)))


def test_cpus_that_contradict_each_other_are_in_one_group_each(tmp_path: Path) -> None:
    files = two_sockets()
    files[f"{CPU}/cpu5/topology/thread_siblings"] = mask({0, 4, 5})
    files[f"{CPU}/cpu1/topology/thread_siblings"] = mask({1})
    cores = read_topology(write(tmp_path, files)).cores
    assert cores == sets("0,4", "1", "2,6", "3,7", "5")


# --- NUMA nodes ---------------------------------------------------------------------------------


def test_nodes_with_gaps_and_without_cpus_or_memory(tmp_path: Path) -> None:
    files = {name.replace("node1/", "node33/"): text for name, text in two_sockets().items()}
    files |= {
        f"{NODE}/node33/meminfo": "Node 33 MemTotal:  0 kB\n",
        f"{NODE}/node40/cpumap": mask(()),
        f"{NODE}/node40/meminfo": "Node 40 MemTotal:  2048 kB\n",
        f"{NODE}/has_cpu": "0,33\n",
    }
    nodes = read_topology(write(tmp_path, files)).nodes
    assert [(node.index, len(node.cpus), node.has_memory) for node in nodes] == [
        (0, 4, True),
        (33, 4, False),
        (40, 0, True),
    ]
    assert nodes[0].distances == ()  # two numbers for three nodes: whose are they?


def test_no_node_folder_is_one_node_of_everything(tmp_path: Path) -> None:
    topology = read_topology(write(tmp_path, without(two_sockets(), NODE)))
    assert topology.nodes == (NumaNode(0, frozenset(range(8))),)
    assert topology.nodes[0].has_memory


def test_the_memory_of_gpus_is_not_the_hosts(tmp_path: Path) -> None:
    files = two_sockets()
    for node in (254, 255):
        files[f"{NODE}/node{node}/cpumap"] = mask(())
    files["proc/driver/nvidia/gpus/0004:04:00.0/numa_status"] = "Node:      255\nStatus:  online\n"
    files["proc/driver/nvidia/gpus/0035:03:00.0/information"] = "Model: X\n"
    topology = read_topology(write(tmp_path, files))
    assert [node.index for node in topology.nodes] == [0, 1, 254]
    assert topology.gpu_memory_nodes == {255}


def test_of_nodes_that_share_cpus_the_first_is_believed(tmp_path: Path) -> None:
    files = two_sockets() | {f"{NODE}/node2/cpumap": mask({3})}
    assert [node.index for node in read_topology(write(tmp_path, files)).nodes] == [0, 1]


def test_emulated_nodes_may_share_cpus(tmp_path: Path) -> None:
    files = two_sockets() | {f"{NODE}/node2/cpumap": mask({3}), "proc/cmdline": "ro numa=fake=3U"}
    assert [node.index for node in read_topology(write(tmp_path, files)).nodes] == [0, 1, 2]


# --- GPUs ---------------------------------------------------------------------------------------


def pci_files(address: str, vendor: int, pci_class: int, node: int | None = -1) -> dict[str, str]:
    files = {
        f"{PCI}/{address}/vendor": f"{vendor:#06x}\n",
        f"{PCI}/{address}/class": f"{pci_class:#08x}\n",
    }
    return files if node is None else files | {f"{PCI}/{address}/numa_node": f"{node}\n"}


def test_gpus_by_pci_class_in_the_order_of_their_addresses(tmp_path: Path) -> None:
    files = (
        pci_files("0000:c1:00.0", 0x10DE, 0x030200, 1)
        | pci_files("0000:0a:00.0", 0x10DE, 0x030000, 0)
        | pci_files("0001:03:00.0", 0x10DE, 0x030200, None)
        | pci_files("10000:01:00.0", 0x10DE, 0x030200)
        | pci_files("ffff:01:00.0", 0x10DE, 0x030200)
        | pci_files("0000:0a:00.1", 0x10DE, 0x040300)  # its audio
        | pci_files("0000:03:00.0", 0x1A03, 0x030000)  # ASPEED: the board's management chip
        | pci_files("0000:02:00.0", 0x102B, 0x030000)  # Matrox: the same
    )
    gpus = read_gpus(write(tmp_path, files))
    assert [(gpu.index, gpu.pci_address, gpu.numa_node) for gpu in gpus] == [
        (0, "0000:0a:00.0", 0),
        (1, "0000:c1:00.0", 1),
        (2, "0001:03:00.0", None),
        (3, "ffff:01:00.0", None),
        (4, "10000:01:00.0", None),
    ]
    assert {gpu.vendor for gpu in gpus} == {"nvidia"}


@pytest.mark.parametrize(
    ("address", "vendor", "pci_class", "counts"),
    [
        ("0000:00:02.0", 0x8086, 0x030000, False),  # Intel's integrated graphics
        ("0000:03:00.0", 0x8086, 0x030000, True),  # Arc
        ("0000:18:00.0", 0x8086, 0x038000, True),  # Data Center GPU Max
        ("0000:00:1f.3", 0x8086, 0x040300, False),
        ("0000:29:00.0", 0x1002, 0x038000, True),  # Instinct MI250
        ("0000:05:00.0", 0x1002, 0x120000, True),  # Instinct MI300
        ("0000:01:03.0", 0x1002, 0x030000, False),  # ATI ES1000: a management chip
    ],
)
def test_what_counts_as_a_gpu(
    tmp_path: Path, address: str, vendor: int, pci_class: int, counts: bool
) -> None:
    assert len(read_gpus(write(tmp_path, pci_files(address, vendor, pci_class)))) == counts


def test_a_display_card_with_the_amdgpu_driver_counts(tmp_path: Path) -> None:
    write(tmp_path, pci_files("0000:03:00.0", 0x1002, 0x030000))
    driver = tmp_path / "sys/bus/pci/drivers/amdgpu"
    driver.mkdir(parents=True)
    (tmp_path / PCI / "0000:03:00.0/driver").symlink_to(driver)
    assert [gpu.vendor for gpu in read_gpus(tmp_path)] == ["amd"]


def test_of_several_vendors_one_is_meant(tmp_path: Path) -> None:
    files = pci_files("0000:03:00.0", 0x8086, 0x038000) | pci_files(
        "0000:41:00.0", 0x10DE, 0x030200
    )
    assert [gpu.vendor for gpu in read_gpus(write(tmp_path, files))] == ["nvidia"]


def test_amd_gpus_as_rocm_lists_them(tmp_path: Path) -> None:
    nodes = "sys/class/kfd/kfd/topology/nodes"
    files = {
        f"{nodes}/0/properties": "cpu_cores_count 64\nsimd_count 0\n",
        f"{nodes}/2/properties": "simd_count 440\ndomain 0\nlocation_id 10496\nunique_id 43981\n",
        f"{nodes}/2/name": "aldebaran\n",
        f"{nodes}/10/properties": "simd_count 440\ndomain 1\nlocation_id 33032\nunique_id x y\n",
    } | pci_files("0000:29:00.0", 0x1002, 0x038000, 3)
    assert read_gpus(write(tmp_path, files)) == (
        Gpu(0, "amd", "0000:29:00.0", 3, "GPU-000000000000abcd", "aldebaran"),
        Gpu(1, "amd", "0001:81:01.0"),
    )


def test_no_gpus_is_no_error(tmp_path: Path) -> None:
    assert read_gpus(tmp_path) == ()


class FakeNvml(SimpleNamespace):
    """What we ask of NVML: one GPU per PCI bus, the second one broken, the third one split."""

    class NVMLError(Exception):
        pass

    def __init__(self, starts: bool = True) -> None:
        super().__init__(starts=starts, open=0)

    def nvmlInit(self) -> None:
        if not self.starts:
            raise self.NVMLError("driver not loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index == 1:
            raise self.NVMLError("GPU is lost")
        return f"gpu{index}"

    def nvmlDeviceGetPciInfo(self, handle: str) -> Any:
        return SimpleNamespace(domain=0, bus=0x1B + int(handle[-1]), device=0)

    def nvmlDeviceGetUUID(self, handle: str) -> str | bytes:
        return f"MIG-{handle}" if handle.startswith("part") else f"GPU-{handle}".encode()

    def nvmlDeviceGetName(self, handle: str) -> str:
        raise self.NVMLError("not supported")

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        if handle == "gpu0":
            raise self.NVMLError("not supported")
        return 3

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, slot: int) -> str:
        if slot == 1:
            raise self.NVMLError("not found")
        return f"part{slot}"


def test_nvml_is_asked_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert read_gpus() == (
        Gpu(0, "nvidia", "0000:1b:00.0", uuid="GPU-gpu0"),
        Gpu(2, "nvidia", "0000:1d:00.0", uuid="GPU-gpu2", mig_uuids=("MIG-part0", "MIG-part2")),
    )
    assert nvml.open == 0


def test_nvml_that_does_not_start_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(starts=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert all(gpu.uuid is None for gpu in read_gpus())
    assert nvml.open == 0


def test_nvml_that_fails_halfway_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setattr(nvml, "nvmlDeviceGetCount", lambda: nvml.nvmlDeviceGetHandleByIndex(1))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert all(gpu.uuid is None for gpu in read_gpus())
    assert nvml.open == 0


def test_another_machine_is_not_asked_of_our_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert read_gpus(tmp_path) == ()


# --- visible GPUs -------------------------------------------------------------------------------


def some_gpus(vendor: str = "nvidia") -> list[Gpu]:
    uuids = ("GPU-aaaa-1", "GPU-aabb-2", "GPU-cccc-3", "GPU-dddd-4")
    migs = ((), (), (), ("MIG-1111", "MIG-1122"))
    return [
        Gpu(i, vendor, f"0000:{i:02x}:00.0", uuid=uuid, mig_uuids=mig)
        for i, (uuid, mig) in enumerate(zip(uuids, migs, strict=True))
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", []),
        ("0", [0]),
        ("3,1", [3, 1]),
        (" 2 , 0 ", [2, 0]),
        ("0,2,-1,1", [0, 2]),  # the CUDA guide's example
        ("0,7,1", [0]),
        ("1gpu2,2ampere", [1, 2]),
        ("x,1", []),
        ("1,1", []),
        ("0,,1", [0]),
        ("NoDevFiles", []),
        ("GPU-cccc,GPU-aaaa-1", [2, 0]),
        ("gpu-cccc", []),
        ("GPU-CCCC", [2]),
        ("GPU-aa", []),  # ambiguous
        ("GPU-dddd,GPU-eeee,GPU-aaaa", [3]),
        ("GPU-cccc,1", [2, 1]),
        ("GPU-cccc,2", []),  # named twice
        ("MIG-1122,MIG-1111", [3, 3]),
        ("MIG-GPU-cccc-3/1/0", [2]),
        ("MIG-9999", []),
    ],
)
def test_cuda_visible_devices(value: str, expected: list[int]) -> None:
    visible = visible_gpus(some_gpus(), {"CUDA_VISIBLE_DEVICES": value})
    assert [gpu.index for gpu in visible] == expected


def test_without_variables_all_are_visible() -> None:
    gpus = some_gpus()
    assert visible_gpus(gpus, {"HIP_VISIBLE_DEVICES": "1"}) == tuple(gpus)
    assert visible_gpus((), {"CUDA_VISIBLE_DEVICES": "0"}) == ()


def test_a_uuid_that_cannot_be_looked_up_is_kept() -> None:
    gpus = [Gpu(0, "nvidia", "0000:01:00.0"), Gpu(1, "nvidia", "0000:02:00.0")]
    visible = visible_gpus(gpus, {"CUDA_VISIBLE_DEVICES": "GPU-ee,1,MIG-ff"})
    assert [(gpu.index, gpu.uuid) for gpu in visible] == [(-1, "GPU-ee"), (1, None), (-1, "MIG-ff")]


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"ROCR_VISIBLE_DEVICES": "3,GPU-aaaa-1"}, [3, 0]),
        ({"ROCR_VISIBLE_DEVICES": "3,2", "HIP_VISIBLE_DEVICES": "1"}, [2]),
        ({"HIP_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "2"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, [2, 0]),
        ({"ZE_AFFINITY_MASK": "1"}, [0, 1, 2, 3]),
    ],
)
def test_amd_variables(env: dict[str, str], expected: list[int]) -> None:
    assert [gpu.index for gpu in visible_gpus(some_gpus("amd"), env)] == expected


@pytest.mark.parametrize(
    ("value", "expected"), [("2,0", [0, 2]), ("1.0,1.1", [1]), ("", [0, 1, 2, 3]), ("9,x", [])]
)
def test_intel_mask_selects_and_does_not_reorder(value: str, expected: list[int]) -> None:
    visible = visible_gpus(some_gpus("intel"), {"ZE_AFFINITY_MASK": value})
    assert [gpu.index for gpu in visible] == expected
