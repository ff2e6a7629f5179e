"""The gate: what must be true before a node is ready for another group."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from asupervise.elastic import gate as gates
from asupervise.elastic.gate import Gate, NvmlMemory, SurvivorsError, nvml_memory
from asupervise.elastic.records import Round
from asupervise.failures import ProcessFailure
from asupervise.result import RunProcsResult

MIB = 2**20
FAILED = RunProcsResult(failures={0: ProcessFailure(0, 1, 1, "", record=None)})
SUCCEEDED = RunProcsResult(return_values={0: None})
ENDED = RunProcsResult(failures={0: ProcessFailure(0, 1, -15, "", record=None, ended_by_us=True)})


class Memory:
    """GPUs of which each look finds what it is told to; the last answer stays."""

    def __init__(self, *looks: Mapping[str, int]) -> None:
        self._looks = list(looks)
        self.count = 0
        self.release = threading.Event()
        self.release.set()

    def used(self) -> Mapping[str, int]:
        self.count += 1
        self.release.wait()
        look = self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]
        return {name: mib * MIB for name, mib in look.items()}


async def passed(gate: Gate, result: RunProcsResult = FAILED, **options: Any) -> float:
    """Through the gate after a group; for how many seconds it was shut."""
    await gate.before_start()
    survivors = options.pop("survivors", ())
    listened = options.pop("listened", True)
    gate.shut(Round(0, "running", **options), result, survivors, listened=listened)
    started = time.monotonic()
    await gate.passed()
    return time.monotonic() - started


@pytest.fixture
def warnings() -> list[str]:
    return []


# --- the group ------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [FAILED, ENDED])
async def test_with_a_survivor_there_is_no_other_group(result: RunProcsResult) -> None:
    with pytest.raises(SurvivorsError, match=r"process 7 \(train\) could not be ended") as caught:
        await passed(
            Gate(max_restarts=1), result, survivors=("process 7 (train) could not be ended",)
        )
    assert caught.value.hint


async def test_nor_after_a_success_that_another_round_follows() -> None:
    gate = Gate(max_restarts=1)
    # The run may be over: then it has succeeded, whoever is left.
    await passed(gate, SUCCEEDED, survivors=("process 7 could not be ended",))
    with pytest.raises(SurvivorsError):
        await gate.before_start()


# --- the port -------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


async def test_a_port_is_waited_for(server: socket.socket, warnings: list[str]) -> None:
    gate = Gate(max_restarts=1, port=server.getsockname()[1], on_warning=warnings.append)
    passing = asyncio.create_task(passed(gate))
    done, _ = await asyncio.wait({passing}, timeout=0.2)
    assert not done
    server.close()
    await asyncio.wait_for(passing, 5.0)
    assert not warnings


async def test_a_port_is_not_waited_for_for_ever(
    server: socket.socket, warnings: list[str]
) -> None:
    port = server.getsockname()[1]
    gate = Gate(max_restarts=1, port=port, on_warning=warnings.append, port_limit_s=0.2)
    assert 0.2 <= await passed(gate) < 5.0
    assert warnings == [f"port {port} is still taken 0.2 s later"]


async def test_another_nodes_port_is_not_ours_to_wait_for(server: socket.socket) -> None:
    gate = Gate(max_restarts=1, port=server.getsockname()[1])
    assert await passed(gate, listened=False) < 5.0


# --- the memory of GPUs ---------------------------------------------------------------------------


async def test_memory_is_waited_for(warnings: list[str]) -> None:
    memory = Memory({"GPU 0": 10}, {"GPU 0": 900}, {"GPU 0": 80}, {"GPU 0": 20})
    gate = Gate(max_restarts=1, memory=lambda: memory, on_warning=warnings.append)
    await passed(gate)
    assert memory.count == 4
    assert not warnings


async def test_memory_is_not_waited_for_for_ever(warnings: list[str]) -> None:
    memory = Memory({"GPU 0": 10, "GPU 1": 10}, {"GPU 0": 11, "GPU 1": 910})
    gate = Gate(
        max_restarts=1, memory=lambda: memory, on_warning=warnings.append, drain_limit_s=0.2
    )
    assert 0.2 <= await passed(gate) < 5.0
    (said,) = warnings
    assert "not free again after 0.2 s (GPU 1: 900 MiB more" in said
    # The next group is not blamed for it.
    assert await passed(gate) < 0.2
    assert len(warnings) == 1


async def test_a_driver_that_never_answers_holds_nobody_up(
    warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "_LOOK_S", 0.1)
    memory = Memory({"GPU 0": 10})
    gate = Gate(
        max_restarts=1, memory=lambda: memory, on_warning=warnings.append, drain_limit_s=0.1
    )
    await gate.before_start()
    memory.release.clear()
    assert await passed(gate) < 5.0
    assert warnings == ["the GPUs' driver does not say how much of their memory is used"]
    assert await passed(gate) < 5.0
    assert memory.count == 2
    memory.release.set()


async def test_an_error_of_the_seam_is_not_swallowed() -> None:
    class Broken:
        def used(self) -> Mapping[str, int]:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await Gate(max_restarts=1, memory=Broken).before_start()


# --- where nobody waits ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "restarts", "looks"),
    [(SUCCEEDED, 0, 1), (FAILED, 1, 1), (FAILED, 0, 2), (ENDED, 1, 2)],
)
async def test_it_is_shut_only_where_another_group_may_follow(
    result: RunProcsResult, restarts: int, looks: int
) -> None:
    """Not after a success, nor after the failure that ends the run; others' failures may not."""
    memory = Memory({"GPU 0": 10})
    await passed(Gate(max_restarts=1, memory=lambda: memory), result, restarts=restarts)
    assert memory.count == looks


def test_without_anything_to_wait_for_it_takes_no_time_and_no_thread() -> None:
    gate = Gate(max_restarts=10**6, memory=nvml_memory)
    threads = threading.active_count()
    for _ in range(1000):
        # It is over without having waited for anything, not even for a turn of a loop.
        with pytest.raises(StopIteration):
            passed(gate).send(None)
    assert threading.active_count() <= threads


def test_without_a_driver_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_DRIVERS", ("/nowhere",))
    monkeypatch.setitem(sys.modules, "pynvml", None)  # its import would be an error
    assert nvml_memory() is None


# --- NVML -----------------------------------------------------------------------------------------


class FakeNvml:
    """The part of ``pynvml`` that is used, with four GPUs."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.users = 0
        self.broken = False

    def nvmlInit(self) -> None:
        self.users += 1

    def nvmlShutdown(self) -> None:
        self.users -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 4

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if self.broken:
            raise self.NVMLError
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=handle * MIB)

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:
        return SimpleNamespace(domain=0, bus=handle, device=0)

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "fake"

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: int) -> int:
        raise self.NVMLError


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(gates, "_DRIVERS", ("/dev/null",))
    return fake


def test_the_memory_of_the_visible_gpus_is_read(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    memory = nvml_memory()
    assert memory is not None
    assert memory.used() == {"GPU 1": 1 * MIB, "GPU 3": 3 * MIB}
    assert nvml.users == 0


def test_a_driver_that_fails_says_nothing(nvml: FakeNvml) -> None:
    memory = NvmlMemory(nvml, {})
    assert len(memory.used()) == 4
    nvml.broken = True
    assert memory.used() == {}
    assert nvml.users == 0
