"""Keys, transactions and leases on a log: the pure part, the engine, and the log in a store."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise.elastic import log_engine
from asupervise.elastic.engine import (
    Absent,
    Change,
    Delete,
    EngineError,
    Entry,
    LeaseLostError,
    Put,
    Unchanged,
)
from asupervise.elastic.log_engine import LogEngine, Reader
from asupervise.elastic.records import RecordError
from asupervise.elastic.replay import NOTHING, Command, Replica, command_of
from asupervise.elastic.store_log import StoreLog
from tests.elastic.memory_engine import MemoryEngines
from tests.elastic.memory_store import MemoryStore

PATIENCE_S = 20.0
LEASE_S = 1.0


def commit(*writes, conditions=(), lease="") -> Command:
    return Command("commit", lease=lease, conditions=conditions, writes=writes)


def begin(lease: str, lease_s: float = 10.0) -> Command:
    return Command("begin", lease=lease, lease_s=lease_s)


def applied_to(replica: Replica, *commands: Command, now: float = 0.0):
    """What became of the last one."""
    results = [replica.apply(command, now) for command in commands]
    return results[-1]


def values(replica: Replica, under: str = "") -> dict[str, str]:
    return {key: entry.value for key, entry in replica.read(under).entries.items()}


# --- transactions ---------------------------------------------------------------------------------


def test_revisions_are_places_in_the_log() -> None:
    replica = Replica()
    applied_to(replica, Command("nothing"), commit(Put("a", "1")), commit(Put("b", "x")))
    done = applied_to(replica, commit(Put("a", "2")))
    assert done.changes == (Change("a", Entry("2", 2, 4), 4),)
    assert replica.read() == ({"a": Entry("2", 2, 4), "b": Entry("x", 3, 3)}, 4)


@pytest.mark.parametrize(
    ("conditions", "holds"),
    [
        ((), True),
        ((Absent("a"),), False),
        ((Absent("b"),), True),
        ((Unchanged("a", 1),), True),
        ((Unchanged("a", 2),), False),
        ((Unchanged("b", 0),), False),
        ((Unchanged("a", 1), Absent("a")), False),
    ],
)
def test_all_conditions_must_hold(conditions, holds: bool) -> None:
    replica = Replica()
    done = applied_to(replica, commit(Put("a", "1")), commit(Put("a", "2"), conditions=conditions))
    assert done.done is holds
    assert not done.lease_lost
    assert values(replica) == {"a": "2" if holds else "1"}


def test_keys_are_deleted_one_by_one_or_under_a_name() -> None:
    replica = Replica()
    puts = [Put(key, "") for key in ("a", "a/1", "a/2", "b")]
    done = applied_to(replica, commit(*puts), commit(Delete("a/", under=True), Delete("nothing")))
    assert [(change.key, change.entry) for change in done.changes] == [("a/1", None), ("a/2", None)]
    applied_to(replica, commit(Delete("a")))
    assert values(replica) == {"b": ""}


def test_a_transaction_tells_the_last_state_of_a_key_once() -> None:
    done = applied_to(Replica(), commit(Put("a", "1"), Delete("a"), Put("a", "2")))
    assert [change.entry and change.entry.value for change in done.changes] == ["2"]


# --- leases ---------------------------------------------------------------------------------------


def test_what_is_leased_goes_with_the_lease() -> None:
    replica = Replica()
    leased = commit(Put("a", "", leased=True), Put("b", ""), lease="L")
    done = applied_to(replica, begin("L"), leased, Command("end", lease="L"))
    assert [change.key for change in done.changes] == ["a"]
    assert values(replica) == {"b": ""}
    assert applied_to(replica, leased) == ((), False, True)
    assert values(replica) == {"b": ""}


def test_what_is_written_again_without_the_lease_stays() -> None:
    replica = Replica()
    applied_to(replica, begin("L"), commit(Put("a", "", leased=True), lease="L"))
    applied_to(replica, commit(Put("a", "mine")), Command("end", lease="L"))
    assert values(replica) == {"a": "mine"}


def test_a_lease_that_is_silent_is_overdue_until_it_is_heard_of() -> None:
    replica = Replica()
    replica.apply(begin("L", 10.0), now=100.0)
    assert replica.next_end() == 110.0
    assert replica.next_end(but="L") == float("inf")
    assert replica.overdue(109.9) == []
    assert replica.overdue(110.0, but="L") == []
    (expire,) = replica.overdue(110.0)
    replica.apply(Command("beat", lease="L"), now=110.1)
    assert not replica.apply(expire, now=110.2).done
    assert replica.leases == {"L"}
    (expire,) = replica.overdue(120.1)
    assert replica.apply(expire, now=120.2).done
    assert replica.leases == frozenset()


def test_a_lease_ends_once() -> None:
    replica = Replica()
    replica.apply(begin("L", 1.0), now=0.0)
    replica.apply(commit(Put("a", "", leased=True), lease="L"), now=0.0)
    (expire,) = replica.overdue(5.0)
    assert [change.key for change in replica.apply(expire, 5.0).changes] == ["a"]
    assert replica.apply(expire, 5.0) == ((), False, True)
    assert replica.apply(Command("beat", lease="L"), 5.0).lease_lost


def test_a_key_can_be_kept_for_a_time() -> None:
    replica = Replica()
    replica.apply(commit(Put("a", "", keep_s=60.0)), now=0.0)
    assert replica.overdue(59.9) == []
    (expire,) = replica.overdue(60.0)
    assert [change.key for change in replica.apply(expire, 60.0).changes] == ["a"]


# --- all replicas are equal -----------------------------------------------------------------------

KEYS = st.sampled_from(["a", "a/1", "a/2", "b"])
LEASES = st.sampled_from(["L", "M"])
CONDITIONS = st.one_of(
    st.builds(Absent, KEYS), st.builds(Unchanged, KEYS, st.integers(min_value=0, max_value=30))
)
WRITES = st.one_of(
    st.builds(
        Put,
        KEYS,
        st.text(max_size=3),
        st.booleans(),
        st.sampled_from([0.0, 1.0]),
    ),
    st.builds(Delete, KEYS, st.booleans()),
)
COMMANDS = st.one_of(
    st.just(Command("nothing")),
    st.builds(
        Command,
        st.just("commit"),
        lease=LEASES,
        conditions=st.lists(CONDITIONS, max_size=2).map(tuple),
        writes=st.lists(WRITES, max_size=3).map(tuple),
    ),
    st.builds(begin, LEASES, st.sampled_from([1.0, 5.0])),
    st.builds(lambda do, lease: Command(do, lease=lease), st.sampled_from(["beat", "end"]), LEASES),
    st.builds(
        lambda lease, last: Command("expire", lease=lease, last=last),
        LEASES,
        st.integers(min_value=0, max_value=30),
    ),
)


@given(st.lists(COMMANDS, max_size=30), st.data())
def test_the_log_alone_decides(commands: list[Command], data: st.DataObject) -> None:
    """Another clock, a summary in between and the way through text make no difference."""
    one, other = Replica(), Replica()
    cut = data.draw(st.integers(min_value=0, max_value=len(commands)))
    for number, command in enumerate(commands):
        if number == cut:
            other = Replica.of(other.text(), now=1e6)
        first = one.apply(command, now=float(number))
        second = other.apply(command_of(command.text(), number), now=1000.0 * number)
        assert first == second
    assert one.read() == other.read()
    assert one.leases == other.leases
    assert one.text() == other.text()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "[]",
        "{}",
        '{"format":1,"do":"dance","id":""}',
        '{"format":2,"do":"nothing","id":""}',
        '{"format":1,"do":"commit","id":"","then":[["Put","a"]]}',
        '{"format":1,"do":"commit","id":"","then":[["Put","a",1,false,0]]}',
        '{"format":1,"do":"commit","id":"","if":[["Perhaps","a"]]}',
        '{"format":1,"do":"begin","id":"","lease":"L","lease_s":"long"}',
        "[" * 100_000,
    ],
)
def test_what_is_no_command_is_one_clear_error(text: str) -> None:
    with pytest.raises(RecordError, match=r"^entry 7 of the log is none that this version"):
        command_of(text, 7)


def test_what_is_no_summary_is_one_clear_error() -> None:
    with pytest.raises(RecordError, match=r"^the log's summary is none that this version"):
        Replica.of('{"format":1,"index":3,"entries":{"a":["x"]},"leases":{}}', 0.0)


# --- the engine -----------------------------------------------------------------------------------


async def next_of(changes: AsyncIterator) -> dict[str, str | None]:
    async with asyncio.timeout(PATIENCE_S):
        found = await anext(changes)
    return {change.key: change.entry and change.entry.value for change in found}


async def wait_until(condition: Callable[[], bool], engine: LogEngine) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await engine._stir()


async def test_what_one_writes_the_others_see_in_order() -> None:
    engines = MemoryEngines()
    one, other = await engines.open(LEASE_S), await engines.open(LEASE_S)
    start = await other.read()
    changes = other.watch("k", start.revision)
    first = await one.commit([Absent("k/1")], [Put("k/1", "a"), Put("else", "")])
    assert await one.commit([Absent("k/1")], [Put("k/1", "b")]) is None
    second = await one.commit([Unchanged("k/1", first)], [Put("k/1", "c"), Put("k/2", "d")])
    assert await next_of(changes) == {"k/1": "a"}
    assert await next_of(changes) == {"k/1": "c", "k/2": "d"}
    again = other.watch("k", first)
    assert await next_of(again) == {"k/1": "c", "k/2": "d"}
    assert (await other.read("k/1")).entries == {"k/1": Entry("c", first, second)}
    await changes.aclose()
    await again.aclose()
    await one.close()
    await other.close()


async def test_a_lease_lives_on_while_it_is_kept_and_is_gone_when_it_is_given_back() -> None:
    engines = MemoryEngines()
    one, other = await engines.open(LEASE_S), await engines.open(LEASE_S)
    await one.commit([], [Put("k", "", leased=True)])
    until = one.alive_until
    await wait_until(lambda: one.alive_until > until + LEASE_S, one)
    changes = other.watch("k", (await other.read()).revision)
    assert "k" in (await other.read()).entries
    await one.close()
    assert await next_of(changes) == {"k": None}
    await changes.aclose()
    await other.close()


async def test_nobody_takes_a_node_to_be_gone_before_it_says_so_itself() -> None:
    """What fencing rests on: `alive_until` lies before the end that others see."""
    engines = MemoryEngines()
    one, other = await engines.open(LEASE_S), await engines.open(LEASE_S)
    await one.commit([], [Put("k", "", leased=True)])
    changes = other.watch("k", (await other.read()).revision)
    engines.cut(one)
    assert await next_of(changes) == {"k": None}
    assert time.monotonic() >= one.alive_until
    assert one.alive_until - time.monotonic() > -LEASE_S, "and not much before"
    engines.heal(one)
    with pytest.raises(LeaseLostError):
        await one.commit([], [Put("k", "", leased=True)])
    await one.new_lease()
    assert one.alive_until > time.monotonic()
    assert await one.commit([], [Put("k", "", leased=True)]) is not None
    await changes.aclose()
    await one.close()
    await other.close()


async def test_who_is_cut_off_is_told_so_in_time() -> None:
    engines = MemoryEngines()
    engine = await engines.open(LEASE_S, timeout_s=0.1)
    engines.cut(engine)
    for call in (engine.read(), engine.commit([], [Put("k", "")]), engine.new_lease()):
        with pytest.raises(EngineError, match=r"^the log in memory does not answer within 0\.1 s"):
            await call
    engines.heal(engine)
    await engine.close()


async def test_a_log_that_has_lost_its_data_tells_whoever_watches() -> None:
    engines = MemoryEngines()
    engine = await engines.open(LEASE_S)
    await engine.commit([], [Put("k", "", leased=True)])
    revision = (await engine.read()).revision
    changes = engine.watch("k", revision)
    waiting = asyncio.ensure_future(anext(changes))
    await asyncio.sleep(0)
    engines.reset()
    with pytest.raises(EngineError, match="does not have what it had"):
        await waiting
    assert engine.alive_until <= time.monotonic()
    with pytest.raises(EngineError, match="forgotten"):
        await anext(engine.watch("k", revision))
    assert (await engine.read()).entries == {}
    await engine.new_lease()
    assert await engine.commit([Absent("k")], [Put("k", "")]) is not None
    await engine.close()


async def test_an_entry_that_nobody_knows_ends_the_engine_with_one_error() -> None:
    engines = MemoryEngines()
    engine = await engines.open(LEASE_S)
    engines.append('{"format":99}')
    await wait_until(lambda: engine._broken is not None, engine)
    with pytest.raises(RecordError, match="none that this version of asupervise knows"):
        await engine.read()
    with pytest.raises(RecordError):
        await anext(engine.watch("", 0))
    await engine.close()


# --- the log in a store ---------------------------------------------------------------------------


class Heard:
    """Who is told what stands in the log."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._news = asyncio.Event()

    def receive(self, text: str) -> None:
        self.texts.append(text)
        self._news.set()

    def begin_anew(self, summary: str) -> None:
        self.texts = [f"summary {summary}"]
        self._news.set()

    def fail(self, error: EngineError) -> None:
        raise error

    async def wait_for(self, *texts: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.texts != list(texts):
                self._news.clear()
                await self._news.wait()


Opener = Callable[[Reader], Awaitable[StoreLog]]


@asynccontextmanager
async def opened(store: MemoryStore, hole_s: float = 0.2) -> AsyncIterator[tuple[StoreLog, Heard]]:
    heard = Heard()
    log = await StoreLog.open("the store", "p/", store.connect, store.reachable, hole_s, heard)
    try:
        yield log, heard
    finally:
        await log.close()


async def test_all_hear_the_same_also_who_comes_late() -> None:
    store = MemoryStore()
    async with opened(store) as (one, first), opened(store) as (other, second):
        await one.append("a")
        await other.append("b")
        await first.wait_for("a", "b")
        await second.wait_for("a", "b")
        async with opened(store) as (_, third):
            await third.wait_for("a", "b")


async def test_who_dies_between_number_and_entry_holds_nobody_up() -> None:
    store = MemoryStore()
    async with opened(store) as (log, heard), opened(store) as (_, other):
        store.connect().add("p/length", 1)
        await log.append("a")
        await heard.wait_for(NOTHING, "a")
        await other.wait_for(NOTHING, "a")


async def test_several_holes_in_a_row_are_filled() -> None:
    store = MemoryStore()
    async with opened(store, hole_s=0.05) as (log, heard):
        for _ in range(3):
            store.connect().add("p/length", 1)
        await log.append("a")
        await heard.wait_for(NOTHING, NOTHING, NOTHING, "a")


async def test_who_was_taken_for_dead_writes_again() -> None:
    store = MemoryStore()
    go_on = threading.Event()

    def late(name: str, key: str) -> None:
        if name == "compare_set" and key == "p/log/1" and threading.current_thread() in slow:
            assert go_on.wait(PATIENCE_S)

    slow: set[threading.Thread] = set()
    async with opened(store) as (one, first), opened(store) as (other, second):
        # The line's thread is made by its first use.
        await one._write(lambda _: slow.add(threading.current_thread()))
        store.before = late
        writing = asyncio.ensure_future(one.append("late"))
        await asyncio.to_thread(store.wait_for, "p/length")
        await other.append("b")
        await second.wait_for(NOTHING, "b")
        go_on.set()
        await writing
        await first.wait_for(NOTHING, "b", "late")
        await second.wait_for(NOTHING, "b", "late")


async def test_a_connection_that_is_lost_is_made_again() -> None:
    store = MemoryStore()
    async with opened(store) as (log, heard):
        await log.append("a")
        await heard.wait_for("a")
        store.drop()
        # The one that writes is made again too, once it has been found out.
        with pytest.raises(EngineError, match=r"^the store: Connection was likely closed$"):
            await log.append("b")
        await log.append("b")
        await heard.wait_for("a", "b")


async def test_a_write_that_fails_says_why_and_the_next_one_is_made() -> None:
    store = MemoryStore()

    def refuse(name: str, key: str) -> None:
        if name == "add":
            raise RuntimeError("Broken pipe\nframe #0: c10::Error")

    async with opened(store) as (log, heard):
        store.before = refuse
        with pytest.raises(EngineError, match=r"^the store: Broken pipe$"):
            await log.append("a")
        store.before = lambda name, key: None
        await log.append("b")
        await heard.wait_for("b")


async def test_a_store_that_has_lost_its_data_begins_anew() -> None:
    store = MemoryStore()
    async with opened(store) as (log, heard):
        await log.append("a")
        await heard.wait_for("a")
        store.lose()
        await heard.wait_for("summary ")
        with pytest.raises(EngineError, match="Connection was likely closed"):
            await log.append("b")
        await log.append("b")
        await heard.wait_for("summary ", "b")


async def test_a_summary_stands_for_what_is_removed() -> None:
    store = MemoryStore()
    async with opened(store) as (log, heard):
        for number in range(1, 2101):
            await log.append(str(number))
        await heard.wait_for(*map(str, range(1, 2101)))
        await log.summarise(2050, "all until 2050")
        await log.summarise(2000, "an older one that comes later")
        assert sum(key.startswith("p/log/") for key in store.keys) == 2100 - 1050
        async with opened(store) as (_, late):
            await late.wait_for("summary all until 2050", *map(str, range(2051, 2101)))
        assert heard.texts[:2100] == [*map(str, range(1, 2101))], "it has read all already"


async def test_who_is_far_behind_goes_on_from_the_summary() -> None:
    """Its next entry is gone: what is put there is not taken for an entry that is none."""
    store = MemoryStore()
    async with opened(store) as (log, heard):
        await log.append("1")
        await heard.wait_for("1")
        # As if it had slept meanwhile.
        store.keys.update({"p/length": "3000", "p/summary": "3000 all", "p/trimmed": "3000"})
        await log.append("3001")
        await heard.wait_for("summary all", "3001")


async def test_engines_agree_in_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many transactions by several at once, with summaries: each counts once, for all alike."""
    monkeypatch.setattr(log_engine, "_SUMMARY_EVERY", 25)
    store = MemoryStore()

    def opener(reader: Reader) -> Awaitable[StoreLog]:
        return StoreLog.open("the store", "p/", store.connect, store.reachable, 0.2, reader)

    engines = [await LogEngine.open(opener, lease_s=5.0, timeout_s=PATIENCE_S) for _ in range(3)]

    async def count(engine: LogEngine) -> None:
        for _ in range(20):
            while True:
                entry = (await engine.read("n")).entries.get("n")
                number = int(entry.value) if entry else 0
                before = Unchanged("n", entry.modified) if entry else Absent("n")
                if await engine.commit([before], [Put("n", str(number + 1))]) is not None:
                    break

    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*map(count, engines))
    late = await LogEngine.open(opener, lease_s=5.0, timeout_s=PATIENCE_S)
    assert (await late.read("n")).entries["n"].value == "60"
    assert "p/summary" in store.keys
    for engine in itertools.chain(engines, [late]):
        await engine.close()


async def test_nothing_is_asked_of_the_store_behind_the_end_of_the_last_lease() -> None:
    """Whoever hosts it goes when no lease is left; torch complains of a call that this cuts."""
    store = MemoryStore()
    after_end: list[str] = []

    def note(name: str, key: str) -> None:
        ends = [known for known, text in store.keys.items() if '"do":"end"' in text]
        # It has been waited for in the store since before.
        if ends and (name, key) != ("get", ends[0]):
            after_end.append(f"{name} {key}")

    engine = await LogEngine.open(
        lambda reader: StoreLog.open(
            "the store", "p/", store.connect, store.reachable, 0.2, reader
        ),
        lease_s=5.0,
        timeout_s=PATIENCE_S,
    )  # fmt: skip
    await engine.commit([], [Put("k", "v", leased=True)])
    store.before = note
    await engine.close()
    assert any('"do":"end"' in text for text in store.keys.values())
    assert after_end == []
