"""What imports leave behind in a zygote, by module: threads, devices, variables that were read."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # type checkers take this name for true; `typing` itself costs an import
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Witness"]

# Opened by an accelerator's runtime only: NVIDIA's unified memory, AMD's compute, others.
_ACCELERATORS = ("/dev/nvidia-uvm", "/dev/kfd", "/dev/dri/render", "/dev/accel", "/dev/davinci")
_OPENMP = ("libgomp", "libiomp", "libomp", "libmkl_rt")
_FORK_SAFE_THREADS = "openblas"  # it stops and starts its threads around a fork


class Witness:
    """Notes what each import leaves behind that a fork would not survive, or comes too late for."""

    def __init__(self) -> None:
        self._tasks: set[str] = set(_tasks())
        self._threads: dict[str, str] = {}
        self._native: dict[str, str] = {}
        self._devices: dict[str, str] = {}
        self._read: dict[str, str] = {}
        self._openmp = ""
        self._openblas = False
        self._reading: set[str] = set()

    def __enter__(self) -> None:
        environ: Any = os.environ
        reading = self._reading

        class Noting(type(environ)):  # type: ignore[misc]
            def __getitem__(self, name: str) -> str:
                reading.add(name)
                value: str = super().__getitem__(name)
                return value

        environ.__class__ = Noting

    def __exit__(self, *exc_info: object) -> None:
        environ: Any = os.environ
        environ.__class__ = type(environ).__mro__[1]

    def look(self, module: str) -> None:
        """`module` has just been imported."""
        for name in _python_threads():
            self._threads.setdefault(name, module)
        maps = _text("/proc/self/maps")
        openblas = _FORK_SAFE_THREADS in maps
        new = set(_tasks()) - self._tasks
        if new and not (openblas and not self._openblas):
            for task in new:
                self._native[task] = module
        self._openblas = openblas
        self._tasks |= new
        for device in _devices():
            self._devices.setdefault(device, module)
        if not self._openmp and any(library in maps for library in _OPENMP):
            self._openmp = module
        for name in self._reading:
            self._read.setdefault(name, module)
        self._reading.clear()

    def facts(self) -> dict[str, Any]:
        """What is so now; each with the module whose import has made it so."""
        alive = set(_tasks())
        return {
            "threads": {name: self._threads.get(name, "") for name in _python_threads()},
            "native": sorted({module for task, module in self._native.items() if task in alive}),
            "devices": {path: self._devices.get(path, "") for path in _devices()},
            "read": self._read,
            "openmp": self._openmp,
        }


def _python_threads() -> list[str]:
    threading = sys.modules.get("threading")
    if threading is None:
        return []
    main = threading.main_thread()
    return sorted(thread.name for thread in threading.enumerate() if thread is not main)


def _tasks() -> list[str]:
    try:
        return os.listdir("/proc/self/task")
    except OSError:
        return []


def _devices() -> list[str]:
    found = set()
    try:
        for fd in os.listdir("/proc/self/fd"):
            try:
                path = os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                continue  # that by which the folder was listed
            if path.startswith(_ACCELERATORS):
                found.add(path)
    except OSError:
        pass  # no /proc: nothing is known
    return sorted(found)


def _text(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""
