"""The c10d backend with torch's own `TCPStore`: the suite of all engines, and what is its own."""

from __future__ import annotations

import asyncio
import inspect
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from asupervise.elastic.decide import Policy
from asupervise.elastic.engine import EngineError, Put
from asupervise.elastic.log_engine import LogEngine
from asupervise.elastic.records import Node, Terms
from asupervise.elastic.rendezvous import Request
from asupervise.elastic.rendezvous import c10d as backend_module
from asupervise.elastic.rendezvous.c10d import C10dOptions, open_engine
from tests.elastic import test_rendezvous as suite

# Importing torch takes seconds on a machine that has much else to do.
pytestmark = [pytest.mark.torch, pytest.mark.timeout(120)]

# torch asks the name server for the name behind each address that it connects to, to show it in
# messages. Read by glibc when it first asks.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

ROOT = Path(__file__).resolve().parents[2]

# The suite's tests run here too, on the engine below; but a TCPStore does not lose its data and
# live on.
for _name in dir(suite):
    _test = getattr(suite, _name)
    if _name.startswith("test_") and "nodes" in inspect.signature(_test).parameters:
        globals()[_name] = _test


@pytest.fixture(scope="module", autouse=True)
def _what_torch_keeps_open() -> None:
    """The first store makes pipes that last as long as the process."""
    from torch.distributed import TCPStore

    TCPStore("127.0.0.1", 0, is_master=True)


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


class TorchBackend:
    """One process hosts the store and is all nodes; each has connections of its own."""

    lease_s = 1.0

    def __init__(self, stack: AsyncExitStack, host: C10dOptions) -> None:
        self._stack = stack
        self._options = replace(host, is_host=False)

    async def engine(self) -> LogEngine:
        return await self._stack.enter_async_context(open_engine(self._options, "suite"))

    async def lose_data(self) -> None:
        raise AssertionError("not with a TCPStore")


@pytest.fixture
async def backend() -> AsyncIterator[TorchBackend]:
    host = C10dOptions("127.0.0.1", free_port(), True, read_timeout_s=30.0, lease_s=1.0)
    async with open_engine(host, "host"), AsyncExitStack() as stack:
        yield TorchBackend(stack, host)


@pytest.fixture
async def nodes(backend: TorchBackend) -> AsyncIterator[suite.Nodes]:
    async with suite.nodes_on(backend) as found:
        yield found


# --- what is its own ------------------------------------------------------------------------------


def request_of(name: str, port: int, **conf: str) -> Request:
    node = Node(f"{name}-{secrets.token_hex(2)}", name, "127.0.0.1", 1)
    conf = {"lease_ttl": "2", **conf}
    policy = Policy(last_call_s=600.0)
    return Request("job", node, Terms(2, 2), policy, f"127.0.0.1:{port}", conf)


async def test_whoever_comes_first_hosts_and_the_rest_are_clients() -> None:
    port = free_port()
    async with AsyncExitStack() as stack:
        one, other = [
            await stack.enter_async_context(backend_module.open(request_of(name, port)))
            for name in "ab"
        ]
        async with asyncio.timeout(30):
            rounds = await asyncio.gather(one.join(1), other.join(2))
        assert rounds[0] == rounds[1]
        assert {member.host for member in rounds[0].members} == {"a", "b"}


PEER = """
import asyncio, sys
from asupervise.elastic.decide import Policy
from asupervise.elastic.records import Node, Terms
from asupervise.elastic.rendezvous import Request
from asupervise.elastic.rendezvous.c10d import open

async def main(name, port):
    conf = {"lease_ttl": "5"}
    node = Node(name, name, "127.0.0.1", 1)
    request = Request("job", node, Terms(2, 2), Policy(), f"127.0.0.1:{port}", conf)
    async with open(request) as rendezvous:
        await rendezvous.join(0)
        print("running", flush=True)
        await rendezvous.ended("succeeded")
        over = await rendezvous.join(0)
        print(over.state, over.why, flush=True)
        # Reads the end later than the host does.
        sys.stdin.readline()
        print("left", flush=True)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


async def test_the_host_leaves_when_the_others_have_read_that_the_run_is_over() -> None:
    port = free_port()
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(backend_module.open(request_of("a", port)))
        peer = subprocess.Popen(
            [sys.executable, "-c", PEER, "b", str(port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        with peer:
            async with asyncio.timeout(60):
                await host.join(0)
                await host.ended("succeeded")
                assert (await host.join(0)).succeeded
            leaving = asyncio.ensure_future(stack.aclose())
            assert await asyncio.to_thread(peer.stdout.readline) == b"running\n"
            assert await asyncio.to_thread(peer.stdout.readline) == b"over all workers succeeded\n"
            assert not leaving.done()
            out, err = await asyncio.to_thread(peer.communicate, b"\n", 60)
            await leaving
        assert (peer.returncode, out) == (0, b"left\n")
        assert err == b"", "a store that goes too early makes torch complain"


async def test_nobody_there_is_one_clear_error_in_the_given_time(
    capfd: pytest.CaptureFixture[str],
) -> None:
    port = free_port()
    before = time.monotonic()
    with pytest.raises(EngineError) as caught:
        async with backend_module.open(request_of("a", port, is_host="false", read_timeout="1")):
            pass
    assert time.monotonic() - before < 20
    assert str(caught.value) == f"the TCPStore at 127.0.0.1:{port} does not answer within 1 s"
    assert caught.value.hint
    assert capfd.readouterr().err == "", "torch's own complaints are spared"


async def test_what_is_no_store_is_one_clear_error() -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(EngineError, match=rf"^the TCPStore at 127\.0\.0\.1:{port}"):
            async with backend_module.open(
                request_of("a", port, is_host="false", read_timeout="2")
            ):
                pass


async def test_a_port_that_is_taken_cannot_be_hosted() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        with pytest.raises(EngineError, match="cannot be hosted here"):
            async with backend_module.open(request_of("a", port, is_host="true")):
                pass


async def test_its_threads_are_few_and_end_with_it() -> None:
    before, others = threading.active_count(), threading.enumerate()
    options = C10dOptions("127.0.0.1", free_port(), True, lease_s=1.0)
    async with open_engine(options, "job") as engine:
        for number in range(50):
            await engine.commit([], [Put("k", str(number))])
        ours = [t for t in threading.enumerate() if t.name == "asupervise c10d" and t not in others]
        assert len(ours) == 2
    # Told to end they do so by themselves: nobody waits for a call that the network holds up.
    for thread in ours:
        await asyncio.to_thread(thread.join, 30)
    assert not [thread for thread in ours if thread.is_alive()]
    # asyncio.to_thread keeps its own for the loop's life.
    assert threading.active_count() <= before + 2


async def test_a_store_whose_host_dies_is_an_error_in_time() -> None:
    port = free_port()
    host = subprocess.Popen(
        [sys.executable, "-c", PEER, "a", str(port)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT,
    )  # fmt: skip
    with host:
        try:
            options = C10dOptions("127.0.0.1", port, False, read_timeout_s=60.0, lease_s=1.0)
            async with open_engine(options, "other") as engine:
                engine._timeout_s = 1.0
                assert await engine.commit([], [Put("k", "", leased=True)]) is not None
                host.kill()
                await asyncio.to_thread(host.wait)
                with pytest.raises(EngineError):
                    await engine.commit([], [Put("k", "", leased=True)])
                with pytest.raises(EngineError, match="does not answer within 1 s"):
                    await engine.new_lease()
        finally:
            host.kill()
