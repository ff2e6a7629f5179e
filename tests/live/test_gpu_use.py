"""What NVML tells of the workers' GPUs, at its seam: there need not be any."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from asupervise import gpus
from asupervise.gpus import Gpu
from asupervise.views.live import gpu_use as module
from asupervise.views.live.gpu_use import GpuUse, gpu_use

CEILING_S = 30.0


class FakeNvml:
    """The part of ``pynvml`` that is used, with three GPUs; the last one is split."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self) -> None:
        self.begun = 0
        self.looked, self.ended = threading.Event(), threading.Event()
        self.fails = False

    def nvmlInit(self) -> None:
        self.begun += 1

    def nvmlShutdown(self) -> None:
        self.begun -= 1
        self.ended.set()

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if self.fails:
            raise OSError("fallen off the bus")
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=(handle + 1) * (3 << 29))

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        self.looked.set()
        if handle == 2:
            raise self.NVMLError("not supported")
        return SimpleNamespace(gpu=87)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    three = tuple(Gpu(index, "nvidia", f"0000:0{index}:00.0") for index in range(3))
    monkeypatch.setattr(gpus, "read_gpus", lambda: three)
    return FakeNvml()


def seen(use: GpuUse, nvml: FakeNvml) -> dict[int, str]:
    """What it tells while it looks; afterwards it has let go of the driver."""
    found: dict[int, str] = {}
    # Only when it waits for its next look, all is there.
    wait = use._ended.wait

    def waits(timeout: float | None = None) -> bool:
        found.update(use.latest)
        use.stop()
        return wait(timeout)

    use._ended.wait = waits  # type: ignore[method-assign]
    use.start()
    assert nvml.ended.wait(CEILING_S)
    assert nvml.begun == 0
    return found


def test_each_rank_has_the_gpu_of_its_place(nvml: FakeNvml) -> None:
    assert seen(GpuUse(nvml, {}), nvml) == {0: "0 87% 1.5G", 1: "1 87% 3.0G", 2: "2 4.5G"}


def test_of_those_that_may_be_seen(nvml: FakeNvml) -> None:
    use = GpuUse(nvml, {"CUDA_VISIBLE_DEVICES": "2,0"})
    assert seen(use, nvml) == {0: "2 4.5G", 1: "0 87% 1.5G"}


def test_a_driver_that_fails_tells_nothing(nvml: FakeNvml) -> None:
    nvml.fails = True
    use = GpuUse(nvml, {})
    use.start()
    assert nvml.ended.wait(CEILING_S)
    assert use.latest == {}


def test_without_a_driver_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # its import would be an error
    monkeypatch.setattr(module, "_DRIVERS", ("/nowhere/nvidiactl",))
    assert gpu_use({}) is None


def test_without_its_package_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DRIVERS", ("/",))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_use({}) is None
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace())
    assert isinstance(gpu_use({}), GpuUse)
