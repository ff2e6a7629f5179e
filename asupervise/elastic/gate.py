"""What must be true before a node is ready for another group: the former has left nothing behind.

Nobody of it lives, the port that its rank 0 listened at is free where the next one has to have the
same, and the memory of the GPUs is free again, which takes the driver some time after a process has
ended. The last two have no event that could be waited for: they are looked at again and again, for
a bounded time, and if that is not enough the group is started all the same and says itself what it
lacks. A survivor is another matter: with it, two workers of one rank would be there at once.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from asupervise.elastic.ports import is_taken
from asupervise.errors import SupervisorError

if TYPE_CHECKING:
    from asupervise.elastic.records import Round
    from asupervise.result import RunProcsResult

__all__ = ["Gate", "GpuMemory", "SurvivorsError", "nvml_memory"]

T = TypeVar("T")

_PORT_LIMIT_S: Final = 10.0
_DRAIN_LIMIT_S: Final = 30.0
_PORT_PAUSE_S: Final = 0.05
_DRAIN_PAUSE_S: Final = 0.1
# What one look may take, however late it is.
_LOOK_S: Final = 1.0
# What the driver itself uses more or less of from one look to the next. The context of one process
# on a GPU takes some hundreds of MiB.
_SLACK_BYTES: Final = 64 * 2**20
# Where NVIDIA's driver is: its control device, or WSL's.
_DRIVERS: Final = ("/dev/nvidiactl", "/dev/dxg")


class SurvivorsError(SupervisorError):
    """Processes of the former group could not be ended, so this node starts no other one."""


class GpuMemory(Protocol):
    """How much memory of the node's GPUs is in use: a seam to the driver."""

    def used(self) -> Mapping[str, int]:
        """Bytes by GPU; called in a thread of its own. Empty where the driver does not say."""


class Gate:
    """Between one group of this node and the next.

    Args:
        max_restarts: of the run: the failure after so many is the last.
        port: that rank 0 was told to listen at, or None if each round has another.
        memory: gives what reads the GPUs' memory, or None if there are none; asked once, and only
            if a group is going to be started.
        on_warning: called with what was not as it should be, a sentence.
        port_limit_s: how long the port is waited for.
        drain_limit_s: how long the GPUs' memory is waited for, from the former group's end.

    Example::

        gate = Gate(max_restarts=3)
        await gate.before_start()
        ...                                   # a group runs, and ends
        gate.shut(round, result, ctx.survivors, listened=True)
        await gate.passed()
    """

    def __init__(
        self,
        *,
        max_restarts: int,
        port: int | None = None,
        memory: Callable[[], GpuMemory | None] = lambda: None,
        on_warning: Callable[[str], None] = lambda _: None,
        port_limit_s: float = _PORT_LIMIT_S,
        drain_limit_s: float = _DRAIN_LIMIT_S,
    ) -> None:
        self._max_restarts = max_restarts
        self._port = port
        self._find_memory = memory
        self._memory: GpuMemory | None = None
        self._on_warning = on_warning
        self._port_limit_s = port_limit_s
        self._drain_limit_s = drain_limit_s
        self._used: Mapping[str, int] | None = None
        self._survivors: Sequence[str] = ()
        self._shut_at: float | None = None
        self._listened = False

    async def before_start(self) -> None:
        """To be awaited before each group: notes how much of the GPUs' memory is used without it.

        Raises:
            SurvivorsError: as `passed`.
        """
        self._check_survivors()
        if self._used is None:
            self._memory = self._find_memory()
            self._used = await self._look(self._drain_limit_s)

    def shut(
        self, round: Round, result: RunProcsResult, survivors: Sequence[str], *, listened: bool
    ) -> None:
        """A group has ended: `passed` is to be awaited before this node is ready again.

        Args:
            round: that it was started in.
            result: its own.
            survivors: of it, a sentence each.
            listened: whether rank 0 was one of it.
        """
        self._survivors = survivors
        last = result.root_cause is not None and round.restarts >= self._max_restarts
        if result.is_failed() and not last:
            self._shut_at, self._listened = time.monotonic(), listened

    async def passed(self) -> None:
        """Wait until nothing of the former group is left; at once where none will follow it.

        Raises:
            SurvivorsError: if there are processes that could not be ended, naming them.
        """
        if self._shut_at is None:
            return
        shut_at, self._shut_at = self._shut_at, None
        self._check_survivors()
        if self._port is not None and self._listened:
            await self._port_free(self._port, shut_at + self._port_limit_s)
        if self._memory is not None:
            await self._drained(shut_at + self._drain_limit_s)

    def _check_survivors(self) -> None:
        if self._survivors:
            raise SurvivorsError(
                f"no other group is started on this node: {'; '.join(self._survivors)}",
                hint="what cannot be killed waits for the kernel: a device, a file system",
            )

    async def _port_free(self, port: int, deadline: float) -> None:
        # A fallback that polls: the kernel tells nobody that a port is free.
        while is_taken(port):
            if time.monotonic() >= deadline:
                self._on_warning(f"port {port} is still taken {self._port_limit_s:g} s later")
                return
            await asyncio.sleep(_PORT_PAUSE_S)

    async def _drained(self, deadline: float) -> None:
        # A fallback that polls: NVML has no event for it.
        before = self._used or {}
        while True:
            used = await self._look(max(_LOOK_S, deadline - time.monotonic()))
            excess = {
                gpu: bytes - before[gpu]
                for gpu, bytes in used.items()
                if gpu in before and bytes - before[gpu] > _SLACK_BYTES
            }
            if not excess:
                break
            if time.monotonic() >= deadline:
                self._on_warning(_not_drained(excess, self._drain_limit_s))
                break
            await asyncio.sleep(_DRAIN_PAUSE_S)
        # Others may use the same GPUs: the next group is measured by what it finds.
        self._used = used or before

    async def _look(self, limit_s: float) -> Mapping[str, int]:
        if self._memory is None:
            return {}
        try:
            async with asyncio.timeout(limit_s):
                return await _in_daemon_thread(self._memory.used)
        except TimeoutError:
            self._on_warning("the GPUs' driver does not say how much of their memory is used")
            self._memory = None
            return {}


def _not_drained(excess: Mapping[str, int], limit_s: float) -> str:
    said = ", ".join(f"{gpu}: {bytes / 2**20:.0f} MiB more" for gpu, bytes in excess.items())
    return f"the GPUs' memory is not free again after {limit_s:g} s ({said} than before the group)"


async def _in_daemon_thread(work: Callable[[], T]) -> T:
    """What `work` returns; its thread, should it never return, does not hold up our end."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(set_it: Callable[[Any], None], value: Any) -> None:
        if not answer.done():
            set_it(value)

    def run() -> None:
        outcome: tuple[Callable[[Any], None], Any]
        try:
            outcome = answer.set_result, work()
        except BaseException as exc:
            outcome = answer.set_exception, exc
        try:
            loop.call_soon_threadsafe(settle, *outcome)
        except RuntimeError:
            # The loop is closed: nobody waits any more.
            pass

    threading.Thread(target=run, name="asupervise gpu memory", daemon=True).start()
    return await answer


# --- NVIDIA's management library ----------------------------------------------------------------


def nvml_memory() -> GpuMemory | None:
    """By NVML; None without its package (extra ``gpu``) or where there is no driver.

    Imports nothing in the latter case.
    """
    if not any(map(os.path.exists, _DRIVERS)):
        return None
    try:
        import pynvml
    except ImportError:
        return None
    return NvmlMemory(pynvml, os.environ)


class NvmlMemory:
    """The memory of those NVIDIA GPUs that our workers may see.

    Args:
        nvml: the module ``pynvml``.
        environ: whose ``CUDA_VISIBLE_DEVICES`` counts.
    """

    def __init__(self, nvml: Any, environ: Mapping[str, str]) -> None:
        self._nvml = nvml
        self._environ = environ
        self._indices: tuple[int, ...] | None = None

    def used(self) -> Mapping[str, int]:
        nvml = self._nvml
        try:
            if self._indices is None:
                self._indices = self._visible()
            nvml.nvmlInit()
        except Exception:
            # As in `asupervise.gpus`: a driver that does not answer keeps nobody from starting.
            return {}
        try:
            return {f"GPU {index}": self._used(index) for index in self._indices}
        except nvml.NVMLError:
            return {}
        finally:
            nvml.nvmlShutdown()

    def _used(self, index: int) -> int:
        handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        return int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used)

    def _visible(self) -> tuple[int, ...]:
        from asupervise.gpus import read_gpus, visible_gpus

        gpus = [gpu for gpu in read_gpus() if gpu.vendor == "nvidia"]
        seen = visible_gpus(gpus, self._environ)
        return tuple(sorted({gpu.index for gpu in seen if gpu.index >= 0}))
