"""What an `Engine` promises, kept by a real etcd."""

from __future__ import annotations

import asyncio
import os
import resource
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from asupervise.elastic.engine import (
    Absent,
    Change,
    Delete,
    Engine,
    EngineError,
    LeaseLostError,
    Put,
    Snapshot,
    Unchanged,
)
from tests.elastic.etcd_server import EtcdCluster, etcd, grpc_kept, not_installed  # noqa: F401

pytest.importorskip("aetcd", reason="the extra etcd is not installed")

from asupervise.elastic.rendezvous.etcd_engine import EtcdConfig, EtcdEngine

pytestmark = pytest.mark.skipif(not_installed() is not None, reason=not_installed() or "")


class Prefixed:
    """A run of its own on the cluster."""

    def __init__(self, cluster: EtcdCluster) -> None:
        self.cluster = cluster
        self.prefix = f"/tests/{secrets.token_hex(6)}/"

    @asynccontextmanager
    async def engine(self, **changes: Any) -> AsyncIterator[EtcdEngine]:
        settings = {"endpoints": self.cluster.endpoints, "prefix": self.prefix, "lease_s": 5.0}
        engine = await EtcdEngine.open(EtcdConfig(**(settings | changes)))
        try:
            yield engine
        finally:
            await engine.close()

    def put(self, name: str, value: str) -> None:
        """As another client."""
        key = (self.prefix + name).encode()
        self.cluster.post("kv/put", key=key, value=value.encode())

    def keys(self) -> int:
        """How many there are, whatever they are for."""
        start = self.prefix.encode()
        end = start[:-1] + bytes([start[-1] + 1])
        got = self.cluster.post("kv/range", key=start, range_end=end)
        return int(got.get("count", 0))

    def leases(self) -> int:
        return len(self.cluster.post("lease/leases").get("leases", []))


@pytest.fixture
def run(etcd: EtcdCluster) -> Prefixed:  # noqa: F811
    return Prefixed(etcd)


async def changes_of(
    engine: Engine, under: str, after: int, count: int, timeout_s: float = 20.0
) -> list[Change]:
    """The next `count` changes."""
    found: list[Change] = []
    async with asyncio.timeout(timeout_s), aclosing(engine.watch(under, after)) as watch:
        async for changes in watch:
            found += changes
            if len(found) >= count:
                return found
    raise AssertionError("a watch has no end")


def names_and_values(changes: Sequence[Change]) -> list[tuple[str, str | None]]:
    return [(c.key, c.entry.value if c.entry else None) for c in changes]


# --- keys -----------------------------------------------------------------------------------------


async def test_what_was_committed_is_read_with_its_revisions(run: Prefixed) -> None:
    async with run.engine() as engine:
        first = await engine.commit([], [Put("a", "ä"), Put("b/c", "")])
        second = await engine.commit([], [Put("a", "2")])
        assert first is not None
        assert second is not None
        assert second > first
        snapshot = await engine.read()
        assert snapshot.revision >= second
        assert snapshot.entries == {"a": ("2", first, second), "b/c": ("", first, first)}
        assert set((await engine.read("b/")).entries) == {"b/c"}
        assert (await engine.read("nothing")).entries == {}


async def test_revisions_grow_by_one_with_each_transaction(run: Prefixed) -> None:
    async with run.engine() as engine:
        first = await engine.commit([], [Put("a", "1"), Put("b", "1", leased=True)])
        second = await engine.commit([], [Put("a", "2"), Delete("b")])
        assert (first or 0) + 1 == second


async def test_all_conditions_must_hold_or_nothing_is_written(run: Prefixed) -> None:
    async with run.engine() as engine:
        first = await engine.commit([Absent("a")], [Put("a", "1")])
        assert first is not None
        assert await engine.commit([Absent("a")], [Put("a", "2"), Put("b", "2")]) is None
        assert await engine.commit([Unchanged("a", first + 1)], [Delete("a")]) is None
        assert await engine.commit([Unchanged("a", first), Absent("a")], [Delete("a")]) is None
        assert set((await engine.read()).entries) == {"a"}
        assert await engine.commit([Unchanged("a", first), Absent("b")], [Delete("a")])
        assert (await engine.read()).entries == {}


async def test_of_many_who_want_the_same_key_one_gets_it(run: Prefixed) -> None:
    async with run.engine() as one, run.engine() as two:
        wishes = [
            engine.commit([Absent("leader")], [Put("leader", str(i))])
            for i, engine in enumerate([one, two] * 20)
        ]
        won = [i for i, done in enumerate(await asyncio.gather(*wishes)) if done is not None]
        assert len(won) == 1
        assert (await one.read()).entries["leader"].value == str(won[0])


async def test_a_deletion_under_a_prefix_spares_the_others(run: Prefixed) -> None:
    async with run.engine() as engine:
        names = ("f/", "f/1/a", "f/2", "f", "e/9", "g")
        await engine.commit([], [Put(name, "") for name in names])
        await engine.commit([], [Delete("f/", under=True), Delete("not there")])
        assert sorted((await engine.read()).entries) == ["e/9", "f", "g"]
        await engine.commit([], [Delete("", under=True)])
        assert (await engine.read()).entries == {}
        # Also after its own marks are gone.
        assert await engine.commit([Absent("g")], [Put("g", "")])


async def test_runs_do_not_see_each_other(etcd: EtcdCluster) -> None:  # noqa: F811
    one, two = Prefixed(etcd), Prefixed(etcd)
    two.prefix = one.prefix[:-1] + "x/"
    async with one.engine() as engine, two.engine() as other:
        after = await engine.commit([], [Put("mine", "")])
        await other.commit([], [Put("theirs", ""), Delete("", under=True)][:1])
        await engine.commit([], [Put("last", "")])
        assert set((await engine.read()).entries) == {"mine", "last"}
        assert names_and_values(await changes_of(engine, "", after or 0, 1)) == [("last", "")]
        await other.commit([], [Delete("", under=True)])
        assert set((await engine.read()).entries) == {"mine", "last"}


async def test_what_is_kept_for_a_time_is_gone_after_it_and_not_with_us(run: Prefixed) -> None:
    async with run.engine() as reader:
        async with run.engine() as engine:
            written = time.monotonic()
            after = await engine.commit([], [Put("over", "yes", keep_s=2.0)])
        assert (await reader.read()).entries["over"].value == "yes"
        changes = await changes_of(reader, "over", after or 0, 1)
        assert names_and_values(changes) == [("over", None)]
        assert time.monotonic() - written >= 1.99


async def test_operations_are_counted_by_name(run: Prefixed) -> None:
    async with run.engine() as engine:
        await engine.read()
        await engine.commit([], [Put("a", "")])
        await changes_of(engine, "", (await engine.commit([], [Put("b", "")]) or 0) - 1, 1)
        assert engine.operations == {"lease": 1, "read": 1, "commit": 2, "watch": 1}


# --- watches --------------------------------------------------------------------------------------


async def test_a_watch_misses_nothing_and_keeps_the_order_of_many_writers(run: Prefixed) -> None:
    async with run.engine() as reader, run.engine() as one, run.engine() as two:
        after = (await reader.read()).revision

        async def write(engine: EtcdEngine, name: str) -> list[int]:
            return [await engine.commit([], [Put(name, str(i))]) or 0 for i in range(300)]

        watching = asyncio.create_task(changes_of(reader, "w/", after, 600))
        by_one, by_two = await asyncio.gather(write(one, "w/1"), write(two, "w/2"))
        changes = await watching
        assert [c.revision for c in changes] == sorted(by_one + by_two)
        for name in ("w/1", "w/2"):
            values = [c.entry.value for c in changes if c.key == name and c.entry]
            assert values == [str(i) for i in range(300)]


async def test_a_watch_begins_in_the_past_and_tells_what_went(run: Prefixed) -> None:
    async with run.engine() as engine:
        after = (await engine.read()).revision
        created = await engine.commit([], [Put("a", "1"), Put("b", "1")])
        changed = await engine.commit([], [Put("a", "2")])
        gone = await engine.commit([], [Delete("a"), Delete("b")])
        changes = await changes_of(engine, "a", after, 3)
        assert changes == [
            ("a", ("1", created, created), created),
            ("a", ("2", created, changed), changed),
            ("a", None, gone),
        ]
        # What is written in one transaction is told as one.
        async with aclosing(engine.watch("", (gone or 0) - 1)) as watch:
            assert {c.key for c in await anext(watch)} == {"a", "b"}


async def test_a_watch_of_the_future_tells_nothing_of_now(run: Prefixed) -> None:
    async with run.engine() as engine:
        now = await engine.commit([], [Put("a", "now")])
        watching = asyncio.create_task(changes_of(engine, "a", now or 0, 1))
        await engine.commit([], [Put("a", "then")])
        assert names_and_values(await watching) == [("a", "then")]


async def test_what_is_compacted_away_cannot_be_watched(run: Prefixed) -> None:
    async with run.engine() as engine:
        first = await engine.commit([], [Put("a", "1")])
        await engine.commit([], [Put("a", "2")])
        last = await engine.commit([], [Put("a", "3")])
        run.cluster.post("kv/compaction", revision=last)
        with pytest.raises(EngineError, match="compacted"):
            await changes_of(engine, "a", first or 0, 1)
        assert (await engine.read()).entries["a"].value == "3"


async def test_a_revision_that_is_yet_to_come_tells_of_lost_data(run: Prefixed) -> None:
    async with run.engine() as engine:
        revision = (await engine.read()).revision
        with pytest.raises(EngineError, match="lost its data"):
            await changes_of(engine, "", revision + 1000, 1)


async def test_a_member_that_is_merely_behind_has_lost_nothing(
    run: Prefixed, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run.engine() as engine:
        now = (await engine.read()).revision

        async def read_elsewhere(under: str = "") -> Snapshot:
            return Snapshot({}, now + 1)

        monkeypatch.setattr(engine, "read", read_elsewhere)
        watching = asyncio.create_task(changes_of(engine, "", now + 1, 1))
        # It catches up: what we have seen elsewhere is not told again.
        assert await engine.commit([], [Put("a", "seen")]) == now + 1
        await engine.commit([], [Put("a", "not seen")])
        assert names_and_values(await watching) == [("a", "not seen")]


async def test_a_watch_that_is_cancelled_ends_at_once(run: Prefixed) -> None:
    async with run.engine() as engine:
        revision = (await engine.read()).revision
        watching = asyncio.create_task(changes_of(engine, "", revision, 1))
        run.put("a", "1")
        assert len(await watching) == 1
        watching = asyncio.create_task(changes_of(engine, "none/", revision, 1))
        await engine.read()
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching
        assert (await engine.read()).entries["a"].value == "1"


# --- the lease ------------------------------------------------------------------------------------


async def test_alive_until_grows_while_the_lease_is_renewed(run: Prefixed) -> None:
    async with run.engine(lease_s=2.0) as engine, run.engine() as other:
        first = engine.alive_until
        assert first - time.monotonic() <= 2.0
        await engine.commit([], [Put("node", "", leased=True)])
        # The key lives on for more than the time that was granted at first: shown by another's
        # key, which is gone after it.
        after = await other.commit([], [Put("clock", "", keep_s=3.0)])
        await changes_of(other, "clock", after or 0, 1)
        assert time.monotonic() > first
        assert engine.alive_until > time.monotonic()
        assert "node" in (await other.read()).entries
        assert engine.operations["keep-alive"] >= 4


async def test_close_gives_the_lease_back_and_takes_all_our_keys_along(run: Prefixed) -> None:
    async with run.engine() as other:
        leases = run.leases()
        # Long enough that its end is not what takes them.
        async with run.engine(lease_s=1000.0) as engine:
            after = await engine.commit([], [Put("node", "", leased=True), Put("stays", "")])
            assert run.leases() == leases + 1
        closed = time.monotonic()
        changes = await changes_of(other, "node", after or 0, 1)
        assert names_and_values(changes) == [("node", None)]
        assert run.leases() == leases
        # Nothing is kept but what was to be.
        assert run.keys() == 1
        assert engine.alive_until <= closed


async def test_a_lease_that_was_ended_is_noticed_and_replaced(run: Prefixed) -> None:
    async with run.engine() as engine:
        await engine.commit([], [Put("node", "", leased=True)])
        run.cluster.post("lease/revoke", ID=str(engine._lease))
        with pytest.raises(LeaseLostError):
            await engine.commit([], [Put("node", "again", leased=True)])
        assert engine.alive_until <= time.monotonic()
        # It is refused here too, without asking.
        with pytest.raises(LeaseLostError):
            await engine.commit([], [Put("node", "again", leased=True)])
        # What needs no lease is written all the same.
        assert await engine.commit([], [Put("failed", "rank 5")])
        await engine.new_lease()
        assert engine.alive_until > time.monotonic()
        assert await engine.commit([Absent("node")], [Put("node", "again", leased=True)])


async def test_a_lease_that_was_ended_is_noticed_by_its_renewal(run: Prefixed) -> None:
    async with run.engine(lease_s=2.0) as engine:
        keeper = engine._keeper
        assert keeper is not None
        run.cluster.post("lease/revoke", ID=str(engine._lease))
        async with asyncio.timeout(10):
            await keeper
        assert engine.alive_until <= time.monotonic()
        with pytest.raises(LeaseLostError):
            await engine.commit([], [Put("node", "", leased=True)])


async def test_what_needs_no_lease_is_written_where_its_loss_is_not_known_yet(
    run: Prefixed,
) -> None:
    async with run.engine() as engine:
        run.cluster.post("lease/revoke", ID=str(engine._lease))
        assert await engine.commit([Absent("failed")], [Put("failed", "rank 5")])
        assert await engine.commit([Absent("failed")], [Put("failed", "rank 6")]) is None
        assert (await engine.read()).entries["failed"].value == "rank 5"


async def test_a_leader_of_the_past_renews_nothing(run: Prefixed) -> None:
    async with run.engine() as engine:
        before = engine.alive_until
        await engine._refresh()
        renewed = engine.alive_until
        assert renewed > before
        # As if another member had shown us a newer term.
        engine._term += 1
        with pytest.raises(EngineError, match="behind"):
            await engine._refresh()
        assert engine.alive_until == renewed


# --- commits that were not answered ---------------------------------------------------------------


class Unanswered:
    """Lets a number of transactions come through whose answers are lost."""

    def __init__(self, engine: EtcdEngine, lost: int) -> None:
        self._stub = engine._calls.stub
        self._error = engine._calls.error
        self.left = lost
        engine._calls.stub = self  # type: ignore[method-assign, assignment]

    def __call__(self, endpoint: str, service: str) -> Any:
        self._real = self._stub(endpoint, service)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def Txn(self, request: Any, **how: Any) -> Any:
        reply = await self._real.Txn(request, **how)
        if self.left:
            self.left -= 1
            raise self._error("UNAVAILABLE", "the answer was lost")
        return reply


@pytest.mark.parametrize("lost", [1, 3])
async def test_a_commit_that_came_through_unheard_is_known_to_be_done(
    run: Prefixed, lost: int
) -> None:
    async with run.engine() as engine:
        before = await engine.commit([], [Put("a", "0")])
        Unanswered(engine, lost)
        revision = await engine.commit([Unchanged("a", before or 0)], [Put("a", "1")])
        entry = (await engine.read()).entries["a"]
        assert entry.modified == revision
        assert revision == (before or 0) + 1
        # And that one was not: the mark is ours to tell.
        assert await engine.commit([Unchanged("a", before or 0)], [Put("a", "2")]) is None


async def test_one_that_was_given_up_and_came_through_does_not_hinder_the_next(
    run: Prefixed,
) -> None:
    async with run.engine(timeout_s=0.1) as engine:
        lost = Unanswered(engine, 1000)
        with pytest.raises(EngineError, match="does not answer"):
            await engine.commit([], [Put("a", "1")])
        lost.left = 0
        revision = await engine.commit([], [Put("a", "2")])
        assert (await engine.read()).entries["a"][::2] == ("2", revision)


async def test_one_that_comes_late_changes_nothing(run: Prefixed) -> None:
    async with run.engine() as engine:
        late: list[Any] = []
        real = engine._calls.call

        async def keeping(name: str, method: str, request: Any, **how: Any) -> Any:
            late.append((name, method, request))
            return await real(name, method, request, **how)

        engine._calls.call = keeping  # type: ignore[method-assign]
        await engine.commit([], [Put("a", "old")])
        await engine.commit([], [Put("a", "new")])
        # As a member that was halted would take it from its socket.
        reply = await real(*late[0])
        assert not reply.succeeded
        assert (await engine.read()).entries["a"].value == "new"


# --- the process we are ---------------------------------------------------------------------------


async def inherited() -> str:
    """What a child has open to which we leave what is not closed by itself."""
    show = "import os; print(sorted(os.listdir('/proc/self/fd')))"
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", show, stdout=asyncio.subprocess.PIPE, close_fds=False
    )
    return (await child.communicate())[0].decode()


async def test_children_are_started_beside_it_and_inherit_nothing(
    run: Prefixed, capfd: pytest.CaptureFixture[str]
) -> None:
    before = await inherited()
    async with run.engine() as engine:
        revision = (await engine.read()).revision
        watching = asyncio.create_task(changes_of(engine, "", revision, 1))
        for _ in range(5):
            assert await inherited() == before
        run.put("a", "1")
        assert len(await watching) == 1
    assert capfd.readouterr().err == ""


async def test_it_does_nothing_while_nothing_happens(run: Prefixed) -> None:
    async with run.engine(lease_s=10.0) as engine, run.engine() as other:
        watching = asyncio.create_task(
            changes_of(engine, "", (await engine.read()).revision, 1, timeout_s=30)
        )
        clock = await other.commit([], [Put("clock", "", keep_s=4.0)])
        assert len(await watching) == 1
        used = resource.getrusage(resource.RUSAGE_SELF)
        before = used.ru_utime + used.ru_stime
        began = time.monotonic()
        await changes_of(engine, "clock", clock or 0, 1)
        used = resource.getrusage(resource.RUSAGE_SELF)
        share = (used.ru_utime + used.ru_stime - before) / (time.monotonic() - began)
        assert time.monotonic() - began > 2.0
        assert share < 0.05, share


async def test_opening_it_again_and_again_leaves_nothing(run: Prefixed) -> None:
    async def once() -> None:
        async with run.engine() as engine:
            revision = await engine.commit([], [Put("a", "", leased=True)])
            await changes_of(engine, "a", (revision or 0) - 1, 1)

    for _ in range(3):
        await once()
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    tasks = len(os.listdir("/proc/self/task"))
    for _ in range(20):
        await once()
    # gRPC lets go of a connection in a moment of its own, and has threads that Python does not
    # know: some, but not one for each.
    assert len(os.listdir("/proc/self/fd")) < files + 10
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/task")) < tasks + 10


def test_a_program_that_uses_it_ends_silently(run: Prefixed) -> None:
    program = """
import asyncio, sys
from asupervise.elastic.engine import Put
from asupervise.elastic.rendezvous.etcd_engine import EtcdConfig, EtcdEngine

async def main():
    engine = await EtcdEngine.open(EtcdConfig((sys.argv[1],), sys.argv[2]))
    revision = await engine.commit([], [Put("a", "", leased=True)])
    watch = engine.watch("a", revision - 1)
    assert await anext(watch)
    print("told")
    if sys.argv[3] == "closed":
        await engine.close()

asyncio.run(main())
"""
    for how in ("closed", "left open"):
        done = subprocess.run(
            [
                sys.executable,
                "-W",
                "default",
                "-c",
                program,
                *run.cluster.endpoints,
                run.prefix,
                how,
            ],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "told\n", "")
