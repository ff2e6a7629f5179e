"""The stream of events: who hears what, what is dropped, and when it ends. No processes."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from asupervise.bus import EventBus, Subscription
from asupervise.events import Event, Heartbeat, Warned

WORKER = {"local_rank": 0, "rank": 0, "pid": 1}


def warn(bus: EventBus, *texts: str) -> None:
    for text in texts:
        bus.tell("Warned", text=text)


def beat(bus: EventBus, rank: int = 0) -> None:
    bus.tell("Heartbeat", **{**WORKER, "rank": rank})


def said(events: list[Event]) -> list[object]:
    """Of a warning its text, of a heartbeat its rank."""
    return [getattr(event, "text", None) or getattr(event, "rank", None) for event in events]


async def heard(stream: AsyncIterator[Event]) -> list[object]:
    return said([event async for event in stream])


# --- who hears what -----------------------------------------------------------------------------


async def test_each_consumer_hears_everything() -> None:
    bus = EventBus()
    both = [asyncio.create_task(heard(bus.subscribe())) for _ in range(2)]
    for text in "abc":
        warn(bus, text)
        await asyncio.sleep(0)
    bus.close()
    assert await asyncio.gather(*both) == [["a", "b", "c"]] * 2


async def test_who_comes_later_hears_all_from_the_beginning() -> None:
    bus = EventBus()
    warn(bus, "a", "b")
    late = bus.subscribe(maxsize=1)
    assert said(late.take()) == ["a", "b"]
    warn(bus, "c")
    bus.close()
    assert await heard(late) == ["c"]
    assert late.dropped == 0
    # Also after the end.
    assert await heard(bus.subscribe()) == ["a", "b", "c"]
    assert bus.closed


async def test_what_is_told_after_the_end_is_heard_by_nobody() -> None:
    bus = EventBus()
    bus.close()
    bus.close()
    warn(bus, "too late")
    assert await heard(bus.subscribe()) == []


async def test_events_are_typed_and_have_both_clocks() -> None:
    bus = EventBus()
    bus.tell("Warned", text="a", run_id="r", node="n")
    bus.tell("Heartbeat", 17, **WORKER)
    first, second = bus.subscribe().take()
    assert isinstance(first, Warned)
    assert (first.run_id, first.node, first.group, first.attempt) == ("r", "n", "", 0)
    assert isinstance(second, Heartbeat)
    assert second.monotonic_ns == 17
    # Of the two clocks at the same moment.
    apart_s = (first.monotonic_ns - second.monotonic_ns) / 10**9
    assert first.time - second.time == pytest.approx(apart_s, abs=0.1)


async def test_a_parent_hears_what_its_children_are_told() -> None:
    top = EventBus()
    middle = EventBus(parent=top)
    below, beside = EventBus(parent=middle), EventBus(parent=top)
    warn(below, "a")
    warn(beside, "b")
    below.close()
    beside.close()
    warn(below, "nobody")
    warn(top, "c")
    assert not top.closed
    top.close()
    # Its owner did not wait for the end: the group goes on.
    warn(middle, "d")
    middle.close()
    assert await heard(top.subscribe()) == ["a", "b", "c"]
    assert await heard(middle.subscribe()) == ["a", "d"]
    assert await heard(below.subscribe()) == ["a"]


# --- the end of a consumer ----------------------------------------------------------------------


async def test_who_leaves_the_loop_listens_no_more() -> None:
    bus = EventBus()
    warn(bus, "a", "b")
    async for event in bus.subscribe():
        assert bus.has_listeners
        assert said([event]) == ["a"]
        break
    gc.collect()
    assert not bus.has_listeners


async def test_who_leaves_the_loop_may_go_on_later() -> None:
    bus = EventBus()
    warn(bus, "a", "b")
    stream = bus.subscribe()
    async for _ in stream:
        break
    warn(bus, "c")
    bus.close()
    assert await heard(stream) == ["b", "c"]


async def test_closing_a_subscription_ends_who_waits_for_it() -> None:
    bus = EventBus()
    stream = bus.subscribe()
    waiting = asyncio.create_task(heard(stream))
    await asyncio.sleep(0)
    stream.close()
    assert await waiting == []
    warn(bus, "a")
    assert stream.take() == []
    assert not bus.has_listeners
    stream.close()


async def test_a_cancelled_consumer_misses_nothing() -> None:
    bus = EventBus()
    stream = bus.subscribe()
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    waiting.cancel()
    warn(bus, "a")
    await asyncio.gather(waiting, return_exceptions=True)
    bus.close()
    assert await heard(stream) == ["a"]


async def test_several_tasks_may_share_a_subscription() -> None:
    bus = EventBus()
    stream = bus.subscribe()
    shared = [asyncio.create_task(heard(stream)) for _ in range(3)]
    for text in "abcdef":
        warn(bus, text)
        await asyncio.sleep(0)
    bus.close()
    taken = await asyncio.gather(*shared)
    assert sorted(str(text) for each in taken for text in each) == list("abcdef")


# --- who is in want of them ---------------------------------------------------------------------


async def test_costly_things_are_asked_for_once_somebody_listens() -> None:
    bus = EventBus()
    calls: list[str] = []
    bus.when_listened(lambda: calls.append("a"))
    recording = bus.subscribe(records=True)
    assert bus.has_listeners
    assert calls == []
    first = bus.subscribe()
    assert calls == ["a"]
    second = bus.subscribe()
    assert calls == ["a"]
    bus.when_listened(lambda: calls.append("b"))
    assert calls == ["a", "b"]
    for stream in (recording, first, second):
        stream.close()
    bus.when_listened(lambda: calls.append("c"))
    assert calls == ["a", "b"]


async def test_it_is_called_once_though_many_listen_above_and_below() -> None:
    top = EventBus()
    middle = EventBus(parent=top)
    below = EventBus(parent=middle)
    calls: list[str] = []

    def call() -> None:
        calls.append("called")

    below.when_listened(call)
    streams = [bus.subscribe() for bus in (middle, below, top, below)]
    assert calls == ["called"]
    assert below.has_listeners
    assert len(streams) == 4


async def test_what_is_forgotten_is_not_called() -> None:
    top = EventBus()
    below = EventBus(parent=top)
    calls: list[str] = []

    def call() -> None:
        calls.append("called")

    below.when_listened(call)
    below.forget(call)
    below.forget(call)
    assert [bus.subscribe() for bus in (top, below)]
    assert calls == []


async def test_nobody_is_called_after_the_end() -> None:
    bus = EventBus()
    calls: list[str] = []
    bus.when_listened(lambda: calls.append("called"))
    bus.close()
    assert bus.subscribe()
    assert calls == []


# --- what is dropped ----------------------------------------------------------------------------


async def test_the_oldest_of_what_passes_is_dropped_first() -> None:
    bus = EventBus(history=0)
    stream = bus.subscribe(maxsize=3)
    warn(bus, "a")
    beat(bus, 1)
    beat(bus, 2)
    warn(bus, "b")
    beat(bus, 3)
    assert stream.dropped == 2
    assert said(stream.take()) == ["a", "b", 3]
    warn(bus, *"cdef")
    assert stream.dropped == 3
    assert said(stream.take()) == ["d", "e", "f"]


async def test_the_history_is_bounded_and_what_it_lacks_is_counted() -> None:
    bus = EventBus(history=2)
    warn(bus, "a")
    beat(bus, 1)
    warn(bus, "b", "c")
    assert bus.dropped == 2
    stream = bus.subscribe(maxsize=5)
    assert stream.dropped == 2
    assert said(stream.take()) == ["b", "c"]


async def test_a_gap_is_said_once_where_that_is_wanted() -> None:
    bus = EventBus(history=0)
    stream = bus.subscribe(maxsize=2)
    warn(bus, "a", "b", "c")
    assert said(stream.take_saying_gaps()) == ["1 event was left out here", "b", "c"]
    assert stream.take_saying_gaps() == []
    warn(bus, "d")
    assert said(stream.take_saying_gaps()) == ["d"]
    warn(bus, *"efgh")
    assert said(stream.take_saying_gaps()) == ["2 events were left out here", "g", "h"]


async def test_a_slow_consumer_slows_nobody() -> None:
    bus = EventBus(history=10)
    slow, quick = bus.subscribe(maxsize=10), bus.subscribe(maxsize=10_000)
    for _ in range(5_000):
        warn(bus, "a")
    assert slow.dropped == 4_990
    assert (quick.dropped, len(quick.take())) == (0, 5_000)


def test_sizes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"history: -1: expected zero or more"):
        EventBus(history=-1)
    with pytest.raises(ValueError, match=r"maxsize: 0: expected at least 1"):
        EventBus().subscribe(maxsize=0)


class Model:
    """What a bounded queue is to do, as plainly as can be said."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.items: list[object] = []
        self.dropped = 0

    def add(self, item: object) -> None:
        self.items.append(item)
        if len(self.items) > self.size:
            beats = [index for index, item in enumerate(self.items) if isinstance(item, int)]
            del self.items[beats[0] if beats else 0]
            self.dropped += 1


class Streams(RuleBasedStateMachine):
    """A bus, its consumers, and what each should have."""

    def __init__(self) -> None:
        super().__init__()
        self.consumers: list[tuple[Subscription, Model, int]] = []
        self.count = 0

    @initialize(history=st.integers(0, 5))
    def begin(self, history: int) -> None:
        self.bus, self.history = EventBus(history), Model(history)

    def _tell(self, item: object, tell: Callable[..., None]) -> None:
        tell(self.bus, item)
        for model in (self.history, *(model for _, model, _ in self.consumers)):
            model.add(item)

    @rule()
    def warns(self) -> None:
        self.count += 1
        self._tell(f"text {self.count}", warn)

    @rule(times=st.integers(1, 4))
    def beats(self, times: int) -> None:
        for _ in range(times):
            self.count += 1
            self._tell(self.count, beat)

    @rule(maxsize=st.integers(1, 4))
    def subscribes(self, maxsize: int) -> None:
        model = Model(maxsize + len(self.history.items))
        model.items, model.dropped = list(self.history.items), self.history.dropped
        self.consumers.append((self.bus.subscribe(maxsize), model, maxsize))

    @precondition(lambda self: self.consumers)
    @rule(data=st.data())
    def takes_all(self, data: st.DataObject) -> None:
        stream, model, maxsize = data.draw(st.sampled_from(self.consumers))
        assert said(stream.take()) == model.items
        model.items, model.size = [], maxsize

    @precondition(lambda self: any(model.items for _, model, _ in self.consumers))
    @rule(data=st.data())
    def takes_one(self, data: st.DataObject) -> None:
        waiting = [each for each in self.consumers if each[1].items]
        stream, model, maxsize = data.draw(st.sampled_from(waiting))
        assert said([_at_once(stream)]) == [model.items.pop(0)]
        if not model.items:
            model.size = maxsize

    @precondition(lambda self: self.consumers)
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        stream, *_ = leaver = data.draw(st.sampled_from(self.consumers))
        self.consumers.remove(leaver)
        stream.close()

    @invariant()
    def all_counts_are_right(self) -> None:
        for stream, model, _ in self.consumers:
            assert stream.dropped == model.dropped
        assert self.bus.dropped == self.history.dropped
        assert self.bus.has_listeners is bool(self.consumers)


def _at_once(stream: Subscription) -> Event:
    """What is there, without a loop: nothing has to be waited for."""
    coroutine: Any = anext(stream)
    with pytest.raises(StopIteration) as ended:
        coroutine.send(None)
    event: Event = ended.value.value
    return event


def test_a_queue_drops_what_it_says() -> None:
    run_state_machine_as_test(Streams, settings=settings(max_examples=60, stateful_step_count=40))


@given(st.lists(st.sampled_from("wb"), max_size=30), st.integers(1, 5))
def test_the_last_that_lasts_always_arrives(told: list[str], maxsize: int) -> None:
    bus = EventBus()
    stream = bus.subscribe(maxsize)
    for kind in told:
        if kind == "w":
            warn(bus, "a")
        else:
            beat(bus)
    warn(bus, "end")
    for _ in range(10):
        beat(bus)
    assert "end" in said(stream.take())
