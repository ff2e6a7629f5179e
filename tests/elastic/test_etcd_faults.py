"""What becomes of an `Engine` when etcd, or a part of it, is not as it should be."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from asupervise.elastic.engine import Absent, Change, EngineError, LeaseLostError, Put
from tests.elastic.certificates import Certificates
from tests.elastic.etcd_server import (
    EtcdCluster,
    Port,
    etcd_cluster,
    grpc_kept,  # noqa: F401
    not_installed,
)

pytest.importorskip("aetcd", reason="the extra etcd is not installed")

from asupervise.elastic.rendezvous.etcd_engine import EtcdConfig, EtcdEngine

pytestmark = pytest.mark.skipif(not_installed() is not None, reason=not_installed() or "")


def config(endpoints: tuple[str, ...], **settings: Any) -> EtcdConfig:
    return EtcdConfig(endpoints, "/tests/", **settings)


@asynccontextmanager
async def opened(endpoints: tuple[str, ...], **settings: Any) -> AsyncIterator[EtcdEngine]:
    engine = await EtcdEngine.open(config(endpoints, **settings))
    try:
        yield engine
    finally:
        await engine.close()


async def works(engine: EtcdEngine) -> bool:
    """Whether it can be written and watched."""
    after = await engine.commit([], [Put("works", os.urandom(4).hex(), leased=True)])
    async with asyncio.timeout(20), aclosing(engine.watch("works", (after or 0) - 1)) as watch:
        return bool(await anext(watch))


async def in_thread(do: Callable[..., Any], *args: Any) -> Any:
    """While the engine goes on."""
    return await asyncio.to_thread(do, *args)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def three(folder: Path) -> Iterator[EtcdCluster]:
    with etcd_cluster(folder, 3) as cluster:
        yield cluster


# --- nobody there ---------------------------------------------------------------------------------


@pytest.fixture
def closed_port() -> Iterator[str]:
    with closing(Port("127.0.0.1")) as port:
        yield port.at


@pytest.fixture
def silent_port() -> Iterator[str]:
    """One that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


async def is_refused(endpoint: str, timeout_s: float, **settings: Any) -> EngineError:
    began = time.monotonic()
    with pytest.raises(EngineError) as refused:
        await EtcdEngine.open(config((endpoint,), timeout_s=timeout_s, **settings))
    # However loaded the machine is: what takes longer has another timeout than the given one.
    assert time.monotonic() - began < 10 + 3 * timeout_s
    assert endpoint in str(refused.value)
    return refused.value


async def test_a_closed_port_is_named_in_time(closed_port: str) -> None:
    error = await is_refused(closed_port, timeout_s=0.5)
    assert "within 0.5 s" in str(error)
    assert "--rdzv-endpoint" in (error.hint or "")


async def test_one_that_never_answers_is_named_in_time(silent_port: str) -> None:
    await is_refused(silent_port, timeout_s=1.0)
    await is_refused(silent_port, timeout_s=3.0)


async def test_a_name_that_means_nothing_is_named_in_time() -> None:
    await is_refused("etcd.invalid:2379", timeout_s=1.0)


async def test_who_waits_for_nobody_can_be_cancelled(silent_port: str) -> None:
    opening = asyncio.create_task(EtcdEngine.open(config((silent_port,), timeout_s=60.0)))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(opening, 0.5)
    assert opening.cancelled()


async def test_one_that_is_not_there_yet_is_waited_for(folder: Path) -> None:
    with etcd_cluster(folder) as cluster:
        cluster.kill(0)
        starting = asyncio.create_task(in_thread(cluster.start, 0))
        async with opened(cluster.endpoints, timeout_s=20.0) as engine:
            assert await works(engine)
        await starting


@pytest.mark.parametrize("bad", ["closed_port", "silent_port"])
async def test_of_several_endpoints_one_that_answers_is_enough(
    folder: Path, request: pytest.FixtureRequest, bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As they are given: the bad one first.
    monkeypatch.setattr("asupervise.elastic.rendezvous.etcd_calls.random.shuffle", lambda _: None)
    with etcd_cluster(folder) as cluster:
        async with opened((request.getfixturevalue(bad), *cluster.endpoints)) as engine:
            assert await works(engine)
            # And is stayed with.
            assert engine._calls._endpoints[0] == cluster.endpoints[0]
            assert await works(engine)


# --- users ----------------------------------------------------------------------------------------


async def test_who_has_the_password_is_let_in_and_others_are_told(folder: Path) -> None:
    with etcd_cluster(folder, auth=("joe", "right")) as cluster:
        async with opened(cluster.endpoints, user="joe", password="right") as engine:
            assert await works(engine)
        for user, password in (("joe", "wrong"), ("jim", "right"), ("joe", None), (None, None)):
            # Time would change nothing, and none is waited.
            wish = config(cluster.endpoints, user=user, password=password, timeout_s=1000.0)
            with pytest.raises(EngineError, match="refuses us") as refused:
                await open_and_read(wish)
            assert cluster.endpoints[0] in str(refused.value)
            assert "right" not in str(refused.value)


async def open_and_read(wish: EtcdConfig) -> None:
    """Who gives no name may have a lease, and nothing else."""
    engine = await EtcdEngine.open(wish)
    try:
        await engine.read()
    finally:
        await engine.close()


async def test_a_token_that_has_expired_is_replaced(folder: Path) -> None:
    with etcd_cluster(folder, auth=("joe", "pw"), token_ttl_s=1) as cluster:
        at, who = cluster.endpoints, {"user": "joe", "password": "pw"}
        async with opened(at, **who) as engine, opened(at, **who) as reader:
            for _ in range(2):
                # By etcd's own clock, which ends tokens as well.
                after = await engine.commit([], [Put("clock", "", keep_s=3.0)])
                changes = await next_changes(engine, "clock", after or 0)
                assert changes[-1].entry is None
                # A watch is not told that its token has expired, but that it may not.
                assert await next_changes(reader, "clock", (after or 0) - 1)
            assert await works(engine)


async def test_a_token_from_before_a_change_of_users_is_replaced(folder: Path) -> None:
    with etcd_cluster(folder, auth=("root", "pw")) as cluster:
        async with opened(cluster.endpoints, user="root", password="pw") as engine:
            assert await works(engine)
            async with opened(cluster.endpoints, user="root", password="pw") as other:
                stub = other._calls.stub(cluster.endpoints[0], "Auth")
                request = other._calls.rpc.AuthUserAddRequest(name="new", password="new")
                await stub.UserAdd(request, metadata=other._calls.metadata())
                assert await works(engine)


async def next_changes(engine: EtcdEngine, under: str, after: int) -> list[Change]:
    async with asyncio.timeout(30), aclosing(engine.watch(under, after)) as watch:
        return list(await anext(watch))


# --- TLS ------------------------------------------------------------------------------------------


async def test_tls_needs_the_right_authority(folder: Path) -> None:
    with etcd_cluster(folder, tls=True) as cluster:
        assert cluster.certificates is not None
        ca = cluster.certificates.ca.read_bytes()
        async with opened(cluster.endpoints, tls=True, ca=ca) as engine:
            assert await works(engine)
        other = Certificates(folder / "others").ca.read_bytes()
        for wrong in (other, None, b"no certificate"):
            # At once: time would change nothing.
            error = await is_refused(cluster.endpoints[0], 1000.0, tls=True, ca=wrong)
            assert "no TLS" in str(error)
            assert "cacert=" in (error.hint or "")
        error = await is_refused(cluster.endpoints[0], 1.0, tls=False)
        assert "without TLS?" in (error.hint or "")


async def test_who_needs_a_certificate_is_refused_without(folder: Path) -> None:
    with etcd_cluster(folder, client_certs=True) as cluster:
        made = cluster.certificates
        assert made is not None
        ca, cert, key = (path.read_bytes() for path in (made.ca, made.cert, made.key))
        async with opened(cluster.endpoints, tls=True, ca=ca, cert=cert, key=key) as engine:
            assert await works(engine)
            error = await is_refused(cluster.endpoints[0], 1000.0, tls=True, ca=ca)
            assert "no TLS" in str(error)
            other = Certificates(folder / "others")
            cert, key = other.cert.read_bytes(), other.key.read_bytes()
            settings = {"tls": True, "ca": ca, "cert": cert, "key": key}
            await is_refused(cluster.endpoints[0], 1000.0, **settings)


# --- members that die or halt ---------------------------------------------------------------------


class Collector:
    """Watches, and remembers."""

    def __init__(self, engine: EtcdEngine, after: int) -> None:
        self.values: list[str] = []
        self._more = asyncio.Event()
        self._task = asyncio.create_task(self._watch(engine, after))

    async def _watch(self, engine: EtcdEngine, after: int) -> None:
        async with aclosing(engine.watch("w/", after)) as watch:
            async for changes in watch:
                self.values += [c.entry.value for c in changes if c.entry]
                self._more.set()

    async def wait_value(self, value: str, timeout_s: float = 25.0) -> None:
        async with asyncio.timeout(timeout_s):
            while value not in self.values:
                assert not self._task.done(), self._task
                self._more.clear()
                await self._more.wait()

    async def __aenter__(self) -> Collector:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.mark.parametrize("fault", ["killed", "halted"])
async def test_a_watch_misses_nothing_when_its_member_is_gone(
    three: EtcdCluster, fault: str
) -> None:
    async with (
        opened(three.endpoints) as engine,
        opened(three.endpoints) as writer,
        Collector(engine, (await engine.read()).revision) as collector,
    ):
        await writer.commit([], [Put("w/a", "0")])
        await collector.wait_value("0")
        victim = three.endpoints.index(engine._calls._endpoints[0])
        (three.kill if fault == "killed" else three.stop)(victim)
        for i in range(1, 200):
            await writer.commit([], [Put("w/a", str(i))])
        await collector.wait_value("199")
        assert collector.values == [str(i) for i in range(200)]


async def test_a_watch_that_breaks_while_it_catches_up_misses_nothing(folder: Path) -> None:
    with etcd_cluster(folder) as cluster:
        async with opened(cluster.endpoints, timeout_s=20.0) as engine:
            after = (await engine.read()).revision
            # etcd tells a thousand revisions at a time, here too much for a socket's buffers.
            for i in range(1500):
                await engine.commit([], [Put("w/a", f"{i:04}{'.' * 4000}")])
            found: list[int] = []
            async with asyncio.timeout(30), aclosing(engine.watch("w/", after)) as watch:
                async for changes in watch:
                    if not found:
                        assert len(changes) < 1500
                        cluster.kill(0)
                        await in_thread(cluster.start, 0)
                    found += [int(c.entry.value[:4]) for c in changes if c.entry]
                    if found[-1] == 1499:
                        break
            assert found == list(range(1500))


async def test_the_leaders_death_costs_a_commit_some_time_and_no_more(three: EtcdCluster) -> None:
    async with opened(three.endpoints, timeout_s=15.0) as engine:
        for _ in range(2):
            leader = await in_thread(three.leader)
            three.kill(leader)
            names = [f"{leader}/{i}" for i in range(20)]
            done = [await engine.commit([Absent(name)], [Put(name, "")]) for name in names]
            # None: an earlier attempt had come through, and was not recognised.
            assert None not in done
            assert done == sorted(revision or 0 for revision in done)
            await in_thread(three.start, leader)
        assert engine.alive_until > time.monotonic()


async def test_a_halted_leader_that_goes_on_overwrites_nothing(three: EtcdCluster) -> None:
    leader = await in_thread(three.leader)
    async with opened(three.endpoints, timeout_s=20.0) as engine:
        await engine.commit([], [Put("a", "0")])
        # The next attempt goes to the member that cannot answer, and waits in its socket.
        endpoints = engine._calls._endpoints
        endpoints.sort(key=lambda endpoint: endpoint != three.endpoints[leader])
        await engine.commit([], [Put("a", "1")])
        three.stop(leader)
        await engine.commit([], [Put("a", "2")])
        last = await engine.commit([], [Put("a", "3")])
        three.cont(leader)
        for _ in range(5):
            assert await works(engine)
        entry = (await engine.read()).entries["a"]
        assert (entry.value, entry.modified) == ("3", last)


async def test_without_a_majority_there_is_an_error_and_with_it_again_none(
    three: EtcdCluster,
) -> None:
    async with opened(three.endpoints, timeout_s=3.0) as engine:
        three.kill(0)
        three.kill(1)
        began = time.monotonic()
        with pytest.raises(EngineError, match="etcd at"):
            await engine.commit([], [Put("a", "")])
        assert time.monotonic() - began > 2.9
        with pytest.raises(EngineError):
            await next_changes(engine, "", 1)
        # A majority is needed to be ready.
        three._spawn(three.members[0])
        await in_thread(three.start, 1)
        assert await works(engine)


# --- the lease and its end ------------------------------------------------------------------------


async def test_no_key_of_ours_goes_before_alive_until(folder: Path) -> None:
    """Seen by another client: etcd is one member that is halted again and again.

    While it is halted nothing is renewed; so the lease ends in the middle of it.
    """
    with etcd_cluster(folder) as cluster:
        async with opened(cluster.endpoints, lease_s=30.0, timeout_s=30.0) as other:
            for lease_s in (2.0, 3.0):
                async with opened(cluster.endpoints, lease_s=lease_s) as engine:
                    after = await engine.commit([], [Put("node", "", leased=True)])
                    gone = asyncio.create_task(next_changes(other, "node", after or 0))
                    certain = await stopped_for_good(engine, cluster)
                    changes = await gone
                    seen = time.monotonic()
                    assert changes[0].entry is None
                    assert seen > certain
                    with pytest.raises(LeaseLostError):
                        await engine.commit([], [Put("node", "", leased=True)])


async def stopped_for_good(engine: EtcdEngine, cluster: EtcdCluster) -> float:
    """Halt etcd until the lease is over; returns until when it was certain."""
    cluster.stop(0)
    try:
        # A renewal that was on its way may be answered once it goes on, if the lease has not ended
        # in its own eyes by then.
        while (certain := engine.alive_until) + 1.0 > time.monotonic():
            await asyncio.sleep(certain + 1.0 - time.monotonic())
    finally:
        cluster.cont(0)
    return certain


async def test_a_key_stays_until_alive_until_when_we_fall_silent(folder: Path) -> None:
    with etcd_cluster(folder) as cluster:
        at = cluster.endpoints
        async with opened(at) as other, opened(at, lease_s=2.0) as engine:
            after = await engine.commit([], [Put("node", "", leased=True)])
            assert engine._keeper is not None
            engine._keeper.cancel()
            certain = engine.alive_until
            changes = await next_changes(other, "node", after or 0)
            assert time.monotonic() > certain
            assert changes[0].entry is None


async def test_a_short_halt_costs_no_lease(three: EtcdCluster) -> None:
    async with opened(three.endpoints, lease_s=5.0) as engine:
        await engine.commit([], [Put("node", "", leased=True)])
        first = engine.alive_until
        victim = three.endpoints.index(engine._calls._endpoints[0])
        three.stop(victim)
        async with opened(three.endpoints, timeout_s=20.0) as clock:
            after = await clock.commit([], [Put("clock", "", keep_s=6.0)])
            await next_changes(clock, "clock", after or 0)
            assert engine.alive_until > max(first, time.monotonic())
            assert "node" in (await clock.read()).entries


async def test_lost_data_is_noticed_by_the_watch_and_by_the_lease(folder: Path) -> None:
    with etcd_cluster(folder) as cluster:
        async with opened(cluster.endpoints, lease_s=2.0, timeout_s=20.0) as engine:
            for i in range(5):
                after = await engine.commit([], [Put("a", str(i), leased=True)])
            watching = asyncio.create_task(next_changes(engine, "a", after or 0))
            keeper = engine._keeper
            await in_thread(cluster.wipe)
            with pytest.raises(EngineError, match="lost its data"):
                await watching
            assert keeper is not None
            async with asyncio.timeout(10):
                await keeper
            assert engine.alive_until <= time.monotonic()
            assert (await engine.read()).entries == {}
            await engine.new_lease()
            assert await works(engine)


async def test_close_is_short_when_nobody_is_there(folder: Path) -> None:
    with etcd_cluster(folder) as cluster:
        # It does not take the time that another call has.
        engine = await EtcdEngine.open(config(cluster.endpoints, timeout_s=1000.0))
        try:
            cluster.stop(0)
        finally:
            await engine.close()
