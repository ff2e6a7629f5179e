"""The machine's GPUs, in the vendor's own order, and which of them an environment leaves visible.

Reading is I/O and happens once, in `read_gpus`; what an environment means for them is decided by
the pure `visible_gpus`. Start with `asupervise.topology`, which reads both CPUs and GPUs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Gpu", "machine_root", "read_gpus", "read_text", "visible_gpus"]

_NVIDIA, _AMD, _INTEL = "nvidia", "amd", "intel"
# The first of these that is found gives the GPUs of a machine.
_VENDORS = {0x10DE: _NVIDIA, 0x1002: _AMD, 0x8086: _INTEL}

# PCI Code and ID Assignment Specification: base class and sub-class.
_VGA, _3D, _OTHER_DISPLAY, _ACCELERATOR = 0x0300, 0x0302, 0x0380, 0x1200
_GPU_CLASSES = {
    _NVIDIA: {_VGA, _3D, _OTHER_DISPLAY},
    # An Instinct MI300 calls itself a processing accelerator.
    _AMD: {_VGA, _3D, _OTHER_DISPLAY, _ACCELERATOR},
    _INTEL: {_VGA, _3D, _OTHER_DISPLAY},
}
_PCI_ADDRESS = re.compile(r"([0-9a-f]{4,8}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])", re.IGNORECASE)
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of this machine.

    Args:
        index: its place in the vendor's own enumeration (for NVIDIA: NVML's, which is that of the
            PCI addresses, and what ``nvidia-smi`` shows). -1 for one that an environment variable
            names and that was not found.
        vendor: ``"nvidia"``, ``"amd"`` or ``"intel"``.
        pci_address: as sysfs writes it, such as ``0000:c1:00.0``; empty where unknown.
        numa_node: the number of the NUMA node that it is attached to; None where the firmware
            does not say (sysfs shows -1, as most machines with one node do).
        uuid: such as ``GPU-8932f937-d72c-4106-c12f-20bd9faed9f6``; None where unknown.
        name: the product, such as ``NVIDIA H200``; None where unknown.
        mig_uuids: the UUIDs of the MIG devices that it is split into.

    Example:
        >>> Gpu(3, "nvidia", "0000:c1:00.0", numa_node=1).numa_node
        1
    """

    index: int
    vendor: str
    pci_address: str
    numa_node: int | None = None
    uuid: str | None = None
    name: str | None = None
    mig_uuids: tuple[str, ...] = ()


def read_text(path: Path) -> str | None:
    """The text of a small kernel file without surrounding space; None where it cannot be read.

    A NUL at the end is dropped too: some copies of sysfs trees carry one.
    """
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE_BYTES).decode("utf-8", "replace").strip(" \t\r\n\0")
    except (OSError, ValueError):
        return None


def machine_root(root: Path | str) -> Path:
    """The folder that holds a machine's ``sys`` and ``proc``, given it or its ``sys``.

    Example:
        >>> machine_root("/sys")
        PosixPath('/')
    """
    root = Path(root)
    return root.parent if root.name == "sys" and (root / "devices").is_dir() else root


def read_gpus(root: Path | str = "/") -> tuple[Gpu, ...]:
    """The dedicated GPUs of the machine whose file system starts at ``root``, in vendor order.

    NVIDIA's are asked of NVML (package ``nvidia-ml-py``, extra ``gpu``) where ``root`` is ``/``,
    the package is installed and the driver answers; otherwise they are taken from sysfs by PCI
    class and vendor. AMD's are those that ROCm's kernel driver (kfd) lists, in its order;
    otherwise, and always for Intel's, those that sysfs shows.

    Where there are GPUs of several vendors, only those of the first in the order NVIDIA, AMD,
    Intel are given: a job runs on one kind, and local rank ``r`` belongs to the ``r``-th of it.

    Not counted are: the VGA chips of management controllers (ASPEED, Matrox, and the old ATI ones,
    which no amdgpu driver takes); Intel's integrated graphics (always on PCI bus 0). An AMD APU
    counts where kfd lists it, because ROCm then counts it too. A multi-tile Intel card counts
    once (``ZE_FLAT_DEVICE_HIERARCHY=COMPOSITE``).

    Never raises for a machine that has none, or whose driver fails.

    Example:
        >>> [gpu.pci_address for gpu in read_gpus()]  # doctest: +SKIP
        ['0000:1b:00.0', '0000:c1:00.0']
    """
    root = machine_root(root)
    nvidia = _read_nvml(root) if root == Path("/") else ()
    on_pci = list(_pci_gpus(root))
    by_vendor: dict[str, Callable[[], Sequence[Gpu]]] = {
        _NVIDIA: lambda: nvidia or _numbered(on_pci, _NVIDIA),
        _AMD: lambda: _read_kfd(root) or _numbered(on_pci, _AMD),
        _INTEL: lambda: _numbered(on_pci, _INTEL),
    }
    for read in by_vendor.values():
        if gpus := read():
            return tuple(gpus)
    return ()


def _numbered(found: Sequence[tuple[str, str, int | None]], vendor: str) -> tuple[Gpu, ...]:
    mine = [(address, node) for name, address, node in found if name == vendor]
    return tuple(Gpu(i, vendor, address, node) for i, (address, node) in enumerate(mine))


def _pci_gpus(root: Path) -> Iterator[tuple[str, str, int | None]]:
    """Vendor, address and NUMA node of what looks like a dedicated GPU, by PCI address."""
    try:
        devices = sorted((root / "sys/bus/pci/devices").iterdir(), key=_pci_order)
    except OSError:
        return
    for device in devices:
        vendor = _VENDORS.get(_read_hex(device / "vendor"))
        if vendor is not None and _is_gpu(device, vendor):
            yield vendor, device.name, _read_numa_node(root, device.name)


def _pci_order(device: Path) -> tuple[int, ...]:
    found = _PCI_ADDRESS.fullmatch(device.name)
    return tuple(int(part, 16) for part in found.groups()) if found else (-1,)


def _is_gpu(device: Path, vendor: str) -> bool:
    pci_class = _read_hex(device / "class") >> 8  # the last byte is the programming interface
    if pci_class not in _GPU_CLASSES[vendor]:
        return False
    if vendor == _INTEL:
        found = _PCI_ADDRESS.fullmatch(device.name)
        return found is not None and int(found[2], 16) != 0
    if vendor == _AMD and pci_class == _VGA:
        return (device / "driver").resolve().name == "amdgpu"
    return True


def _read_hex(path: Path) -> int:
    try:
        return int(read_text(path) or "", 16)
    except ValueError:
        return -1


def _read_numa_node(root: Path, pci_address: str) -> int | None:
    try:
        node = int(read_text(root / "sys/bus/pci/devices" / pci_address / "numa_node") or "")
    except ValueError:
        return None
    return node if node >= 0 else None


# --- NVIDIA's management library ----------------------------------------------------------------


def _read_nvml(root: Path) -> tuple[Gpu, ...]:
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except Exception:
        # No driver, no library, no permission: sysfs can still say what is plugged in. The
        # library raises more than its own NVMLError (OSError, AttributeError of an old driver).
        return ()
    try:
        count = pynvml.nvmlDeviceGetCount()
        found = (_read_nvml_gpu(pynvml, root, index) for index in range(count))
        return tuple(gpu for gpu in found if gpu is not None)
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def _read_nvml_gpu(nvml: Any, root: Path, index: int) -> Gpu | None:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        pci = nvml.nvmlDeviceGetPciInfo(handle)
    except nvml.NVMLError:
        return None  # fallen off the bus: CUDA does not see it either
    address = f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"
    return Gpu(
        index=index,
        vendor=_NVIDIA,
        pci_address=address,
        numa_node=_read_numa_node(root, address),
        uuid=_nvml_text(nvml, nvml.nvmlDeviceGetUUID, handle),
        name=_nvml_text(nvml, nvml.nvmlDeviceGetName, handle),
        mig_uuids=tuple(_nvml_mig_uuids(nvml, handle)),
    )


def _nvml_text(nvml: Any, ask: Callable[[Any], Any], handle: Any) -> str | None:
    try:
        answer = ask(handle)
    except nvml.NVMLError:
        return None
    return answer.decode() if isinstance(answer, bytes) else str(answer)


def _nvml_mig_uuids(nvml: Any, handle: Any) -> Iterator[str]:
    try:
        slots = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except nvml.NVMLError:
        return  # not a GPU that can be split
    for slot in range(slots):
        try:
            part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot)
        except nvml.NVMLError:
            continue  # an empty slot
        if uuid := _nvml_text(nvml, nvml.nvmlDeviceGetUUID, part):
            yield uuid


# --- AMD's kernel driver ------------------------------------------------------------------------


def _read_kfd(root: Path) -> tuple[Gpu, ...]:
    """The GPUs that kfd lists: what ROCr enumerates, in its order."""
    try:
        nodes = [p for p in (root / "sys/class/kfd/kfd/topology/nodes").iterdir() if _is_number(p)]
    except OSError:
        return ()
    found: list[Gpu] = []
    for node in sorted(nodes, key=lambda path: int(path.name)):
        properties = _read_properties(node / "properties")
        if not properties.get("simd_count"):
            continue  # a CPU
        address = _kfd_address(properties)
        serial = properties.get("unique_id", 0)
        uuid = f"GPU-{serial:016x}" if serial else None
        numa_node = _read_numa_node(root, address)
        found.append(Gpu(len(found), _AMD, address, numa_node, uuid, read_text(node / "name")))
    return tuple(found)


def _is_number(path: Path) -> bool:
    return path.name.isascii() and path.name.isdigit()


def _read_properties(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in (read_text(path) or "").splitlines())
    return {p[0]: int(p[1]) for p in pairs if len(p) == 2 and p[1].isascii() and p[1].isdigit()}


def _kfd_address(properties: Mapping[str, int]) -> str:
    # location_id packs bus, device and function as PCI's requester id does.
    location = properties.get("location_id", 0)
    domain, bus = properties.get("domain", 0), location >> 8 & 0xFF
    return f"{domain:04x}:{bus:02x}:{location >> 3 & 0x1F:02x}.{location & 7}"


# --- what an environment leaves visible ---------------------------------------------------------


def visible_gpus(gpus: Sequence[Gpu], env: Mapping[str, str]) -> tuple[Gpu, ...]:
    """The GPUs that a worker with the environment ``env`` sees, in the order that it sees them.

    - NVIDIA: ``CUDA_VISIBLE_DEVICES``, by index, by UUID or a prefix of one (``GPU-8932``), or by
      MIG device (``MIG-...``: its parent stands for it).
    - AMD: ``ROCR_VISIBLE_DEVICES``, and of what that leaves ``HIP_VISIBLE_DEVICES`` or, where
      that is not set, ``CUDA_VISIBLE_DEVICES``.
    - Intel: ``ZE_AFFINITY_MASK`` (``0,2`` or ``0.1``); it selects and does not reorder.

    As CUDA has it: an empty value means none, the first invalid entry (-1, a number that is too
    high, an unknown or ambiguous UUID) ends the list, and an entry that is named twice leaves none.
    A UUID that cannot be looked up, because no UUID of the machine is known, is kept as a `Gpu`
    with index -1.

    CUDA numbers GPUs from fastest to slowest unless ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` is set,
    whereas ours stand in PCI order. The two differ only on a machine with GPUs of several kinds:
    set the variable there.

    Rules: CUDA Programming Guide, "CUDA Environment Variables"; ROCm, "GPU isolation techniques";
    oneAPI Level Zero specification, "Affinity Mask".

    Example:
        >>> two = (Gpu(0, "nvidia", "0000:1b:00.0"), Gpu(1, "nvidia", "0000:c1:00.0"))
        >>> [gpu.index for gpu in visible_gpus(two, {"CUDA_VISIBLE_DEVICES": "1,0"})]
        [1, 0]
    """
    nvidia, amd, intel = ([g for g in gpus if g.vendor == name] for name in _VENDORS.values())
    nvidia = _selected(nvidia, env.get("CUDA_VISIBLE_DEVICES"))
    amd = _selected(amd, env.get("ROCR_VISIBLE_DEVICES"))
    amd = _selected(amd, env.get("HIP_VISIBLE_DEVICES", env.get("CUDA_VISIBLE_DEVICES")))
    return (*nvidia, *amd, *_masked(intel, env.get("ZE_AFFINITY_MASK")))


def _selected(gpus: list[Gpu], value: str | None) -> list[Gpu]:
    """What a ``*_VISIBLE_DEVICES`` variable selects of ``gpus``, whose order gives the indices."""
    if value is None or not gpus:
        return gpus
    entries: list[Gpu] = []
    seen: set[str] = set()
    for entry in (part.strip() for part in value.split(",")):
        gpu = _entry(gpus, entry)
        if gpu is None:
            break
        # Two MIG devices of one GPU are two entries, and so are their parents.
        key = entry if entry.startswith("MIG-") else gpu.pci_address or entry
        if key in seen:
            return []
        seen.add(key)
        entries.append(gpu)
    return entries


def _entry(gpus: list[Gpu], entry: str) -> Gpu | None:
    if entry.startswith(("GPU-", "MIG-")):
        return _by_uuid(gpus, entry)
    # CUDA reads numbers as C's strtoul does: what follows the digits is ignored.
    number = re.match(r"[+-]?[0-9]+", entry)
    index = int(number[0]) if number else -1
    return gpus[index] if 0 <= index < len(gpus) else None


def _by_uuid(gpus: list[Gpu], entry: str) -> Gpu | None:
    if entry.startswith("MIG-GPU-"):
        # Drivers before R470: MIG-<UUID of the GPU>/<GPU instance>/<compute instance>.
        entry = entry.removeprefix("MIG-").partition("/")[0]
    known = [(uuid, gpu) for gpu in gpus for uuid in (gpu.uuid, *gpu.mig_uuids) if uuid]
    wanted = entry.lower()
    found = [gpu for uuid, gpu in known if uuid.lower().startswith(wanted)]
    if len(found) == 1:
        return found[0]
    if any(uuid.startswith(entry[:4]) for uuid, _ in known):
        return None
    return Gpu(-1, gpus[0].vendor, "", uuid=entry)


def _masked(gpus: list[Gpu], mask: str | None) -> list[Gpu]:
    if not mask:
        return gpus  # an empty mask masks nothing
    numbers = [part.strip().partition(".")[0] for part in mask.split(",")]
    wanted = {int(number) for number in numbers if number.isascii() and number.isdigit()}
    return [gpu for place, gpu in enumerate(gpus) if place in wanted]
