"""Real machines, read by us and by hwloc: the same sockets, nodes, cores, threads and caches.

The snapshots come from hwloc's own tests and are not part of this repository: they are looked for
in ``$ASUPERVISE_SHARED/topologies``, else in ``../shared/topologies`` beside the checkout.
"""

from __future__ import annotations

import os
import re
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from asupervise.binding import AffinityMode, NumaOptions, bind_ranks
from asupervise.topology import Topology, read_topology

SHARED = os.environ.get("ASUPERVISE_SHARED") or Path(__file__).resolve().parents[2] / "shared"
FOLDER = Path(SHARED) / "topologies"
MACHINES = (
    "128arm-2pa2n8cluster4co",
    "20em64t-hybrid-1p6c2t+2ca4co1t",
    "40intel64-2g2n4c+pcilocality",
    "48amd64-4pa2n6c-sparse",
    "64amd64-4s2n4ca2co",
    "nvidiagpunumanodes",
    "offline-cpu0-node0",
)
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(),
    reason=f"no machine snapshots in {FOLDER} (set ASUPERVISE_SHARED to the folder above)",
)

Cpus = frozenset[int]


@dataclass
class Thing:
    """One object of hwloc's tree: its kind, its number, its level where it is a cache."""

    kind: str
    number: int | None
    level: int = 0
    cpus: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Reading:
    """What is compared, in a form that either side can be put into."""

    sockets: frozenset[tuple[int | None, Cpus]]
    nodes: frozenset[tuple[int, Cpus]]
    cores: frozenset[Cpus]
    caches: frozenset[tuple[int, Cpus]]


def of_hwloc(things: list[tuple[Thing, list[Thing]]]) -> Reading:
    """From each object with its ancestors, outermost first."""
    last_level: dict[int, Thing] = {}
    for thing, above in things:
        if thing.kind != "PU":
            continue
        assert thing.number is not None
        for ancestor in [*above, thing]:
            ancestor.cpus.add(thing.number)
        caches = [ancestor for ancestor in above if ancestor.kind == "Cache"]
        last_level[thing.number] = max(caches, key=lambda cache: cache.level)
    everything = [thing for thing, _ in things]
    return Reading(
        sockets=frozenset((t.number, Cpus(t.cpus)) for t in everything if t.kind == "Package"),
        nodes=frozenset(
            (t.number, Cpus(above[-1].cpus))
            for t, above in things
            if t.kind == "NUMANode" and t.number is not None
        ),
        cores=frozenset(Cpus(t.cpus) for t in everything if t.kind == "Core"),
        caches=frozenset((t.level, Cpus(t.cpus)) for t in last_level.values()),
    )


def of_ours(topology: Topology) -> Reading:
    return Reading(
        sockets=frozenset((s.package_id, s.cpus) for s in topology.sockets),
        nodes=frozenset((n.index, n.cpus) for n in topology.nodes),
        cores=frozenset(topology.cores),
        caches=frozenset((c.level, c.cpus) for c in topology.last_level_caches),
    )


def kind_of(name: str) -> tuple[str, int]:
    cache = re.fullmatch(r"L([0-9])d?Cache", name)
    return ("Cache", int(cache[1])) if cache else (name, 0)


def read_console(path: Path) -> list[tuple[Thing, list[Thing]]]:
    """lstopo's text: an object a line, two spaces deeper than its parent."""
    found: list[tuple[Thing, list[Thing]]] = []
    stack: list[Thing] = []
    for line in path.read_text().splitlines():
        if line.startswith("depth"):
            break
        content = line.lstrip(" ")
        depth = (len(line) - len(content)) // 2
        number = re.search(r"\(P#([0-9]+)", content)
        kind, level = kind_of(content.split(" ")[0])
        thing = Thing(kind, int(number[1]) if number else None, level)
        stack[depth:] = [thing]
        found.append((thing, stack[:-1]))
    return found


def read_xml(path: Path) -> list[tuple[Thing, list[Thing]]]:
    def walk(element: ET.Element, above: list[Thing]) -> Iterator[tuple[Thing, list[Thing]]]:
        for child in element.findall("object"):
            kind, level = kind_of(child.attrib["type"])
            number = child.get("os_index")
            thing = Thing(kind, int(number) if number else None, level)
            yield thing, above
            yield from walk(child, [*above, thing])

    return list(walk(ET.parse(path).getroot(), []))


def unpack(archive: Path, target: Path) -> Path:
    """The regular files that describe CPUs and nodes; links and the rest are left out."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and re.search(r"/(devices/system|proc|bus/pci)/", member.name):
                assert ".." not in Path(member.name).parts
                path = target / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None
                path.write_bytes(source.read())
    (root,) = target.iterdir()
    return root


@pytest.fixture(scope="session", params=MACHINES)
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Topology]:
    root = unpack(FOLDER / f"{request.param}.tar.bz2", tmp_path_factory.mktemp("machine"))
    return request.param, read_topology(root)


@pytest.fixture
def reading(machine: tuple[str, Topology]) -> Reading:
    """hwloc's answer, stored beside the snapshot."""
    console, xml = (FOLDER / f"{machine[0]}.{end}" for end in ("console", "xml"))
    return of_hwloc(read_console(console) if console.exists() else read_xml(xml))


@pytest.mark.parametrize("what", ["sockets", "nodes", "cores", "caches"])
def test_as_hwloc_reads_it(machine: tuple[str, Topology], reading: Reading, what: str) -> None:
    expected = getattr(reading, what)
    assert expected
    assert getattr(of_ours(machine[1]), what) == expected


def test_what_the_readme_says_is_special_about_each(machine: tuple[str, Topology]) -> None:
    """Guards the comparison itself: both sides reading nothing would be equal as well."""
    name, topology = machine
    threads = sorted({len(core) for core in topology.cores})
    numbers = [node.index for node in topology.nodes]
    expected = {
        "128arm-2pa2n8cluster4co": (2, [0, 1, 2, 3], [1], 128),
        "20em64t-hybrid-1p6c2t+2ca4co1t": (1, [0], [1, 2], 20),
        "40intel64-2g2n4c+pcilocality": (4, [0, 1, 2, 3], [1], 40),
        "48amd64-4pa2n6c-sparse": (4, [0, 1, 2, 33, 34, 45, 72, 73], [1], 48),
        "64amd64-4s2n4ca2co": (4, list(range(8)), [1], 64),
        "nvidiagpunumanodes": (2, [0, 8], [4], 32),
        "offline-cpu0-node0": (2, [1], [1], 17),
    }
    assert (len(topology.sockets), numbers, threads, len(topology.cpus)) == expected[name]
    assert len(topology.gpu_memory_nodes) == (6 if name == "nvidiagpunumanodes" else 0)


@pytest.mark.parametrize("mode", AffinityMode)
@pytest.mark.parametrize("nprocs", [1, 3, 8])
def test_ranks_can_be_bound(machine: tuple[str, Topology], mode: AffinityMode, nprocs: int) -> None:
    topology = machine[1]
    bindings = bind_ranks(topology, NumaOptions(mode), nprocs)
    assert [b.local_rank for b in bindings] == list(range(nprocs))
    for binding in bindings:
        assert binding.cpus
        assert binding.cpus <= topology.allowed
    if mode is AffinityMode.EXCLUSIVE:
        assert len(frozenset().union(*(b.cpus for b in bindings))) == sum(
            len(b.cpus) for b in bindings
        )
