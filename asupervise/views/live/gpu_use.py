"""How busy each worker's GPU is, and how much of its memory is used, by NVML (extra ``gpu``).

Local rank *r* is taken to use the *r*-th GPU that this process may see, as programs for torch do,
and as binding takes it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

__all__ = ["GpuUse", "gpu_use"]

# Where one of these is, a driver of NVIDIA's is loaded: nothing is imported otherwise.
_DRIVERS: Final = ("/dev/nvidiactl", "/dev/dxg")
_INTERVAL_S: Final = 2.0


def gpu_use(environ: Mapping[str, str] = os.environ) -> GpuUse | None:
    """What tells of the GPUs; None without NVML's package, or where there is no driver."""
    if not any(map(os.path.exists, _DRIVERS)):
        return None
    try:
        import pynvml
    except ImportError:
        return None
    return GpuUse(pynvml, environ)


class GpuUse:
    """Looks at the GPUs every two seconds.

    In a thread that nobody waits for: a driver whose GPU has failed may never answer.

    Args:
        nvml: the module ``pynvml``.
        environ: whose ``CUDA_VISIBLE_DEVICES`` counts.

    Attributes:
        latest: by local rank, which GPU, how busy it is, and how much of its memory is used.
    """

    def __init__(self, nvml: Any, environ: Mapping[str, str]) -> None:
        self.latest: Mapping[int, str] = {}
        self._nvml = nvml
        self._environ = environ
        self._ended = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="asupervise gpu use", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()

    def _run(self) -> None:
        # As in `asupervise.gpus`: the package raises more than its own error, and a driver that
        # fails is nothing that should end a view.
        with suppress(Exception):
            self._nvml.nvmlInit()
            try:
                indices = self._visible()
                while indices and not self._ended.is_set():
                    self.latest = {rank: self._said(index) for rank, index in enumerate(indices)}
                    self._ended.wait(_INTERVAL_S)
            finally:
                self.latest = {}
                self._nvml.nvmlShutdown()

    def _visible(self) -> list[int]:
        from asupervise.gpus import read_gpus, visible_gpus

        gpus = [gpu for gpu in read_gpus() if gpu.vendor == "nvidia"]
        return [gpu.index for gpu in visible_gpus(gpus, self._environ) if gpu.index >= 0]

    def _said(self, index: int) -> str:
        handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        used = int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used)
        busy = ""
        with suppress(self._nvml.NVMLError):  # one that is split (MIG) does not tell
            busy = f" {self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu:.0f}%"
        return f"{index}{busy} {used / 2**30:.1f}G"
