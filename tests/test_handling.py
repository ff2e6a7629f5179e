"""Event handlers: each in a thread of its own, and nothing that one does harms a run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import asupervise
from asupervise import EventBus, handle_events
from asupervise.events import Event, Warned
from tests.workers import Channel, start


class Kept:
    """A handler that keeps what it is handed."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.threads: set[str] = set()
        self.closed = 0

    def handle(self, event: Event, /) -> None:
        self.threads.add(threading.current_thread().name)
        self.events.append(event)

    def close(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.closed += 1

    @property
    def texts(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Warned)]


class Held(Kept):
    """One that waits, in its thread, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()
        self.gate = threading.Event()

    def handle(self, event: Event, /) -> None:
        self.reached.set()
        self.gate.wait()
        super().handle(event)


pytestmark = pytest.mark.usefixtures("own_temporary_folder")


@pytest.fixture
def held() -> Iterator[Held]:
    handler = Held()
    yield handler
    handler.gate.set()


def warn(bus: EventBus, *texts: str) -> None:
    for text in texts:
        bus.tell("Warned", text=text)


async def in_thread(event: threading.Event) -> None:
    await asyncio.to_thread(event.wait)


# --- what it is handed ----------------------------------------------------------------------------


async def test_it_is_handed_all_of_a_run_in_order_and_in_one_thread() -> None:
    bus, kept = EventBus(), Kept()
    async with handle_events(bus, kept), start(None, "true", "exit 3", events=bus) as ctx:
        await ctx.wait()
    assert not bus.closed
    assert kept.events == bus.subscribe().take()
    assert kept.threads == {"asupervise-Kept"}
    assert kept.closed == 1


async def test_it_is_handed_what_was_before_and_nothing_that_comes_after() -> None:
    bus, kept = EventBus(), Kept()
    warn(bus, "a")
    async with handle_events(bus, kept):
        warn(bus, "b")
    warn(bus, "c")
    assert kept.texts == ["a", "b"]
    assert not bus.has_listeners


async def test_a_bus_that_is_closed_first_is_as_good() -> None:
    bus, kept = EventBus(), Kept()
    async with handle_events(bus, kept):
        warn(bus, "a")
        bus.close()
    assert (kept.texts, kept.closed) == (["a"], 1)


async def test_several_are_handed_the_same() -> None:
    bus, first, second = EventBus(), Kept(), Kept()
    async with handle_events(bus, first), handle_events(bus, second):
        warn(bus, "a", "b")
    assert first.events == second.events
    assert first.texts == ["a", "b"]


async def test_an_exception_of_the_host_passes_through() -> None:
    bus, kept = EventBus(), Kept()
    warn(bus, "a")
    with pytest.raises(LookupError):
        async with handle_events(bus, kept):
            raise LookupError
    assert (kept.texts, kept.closed) == (["a"], 1)


async def test_who_is_cancelled_has_its_handler_closed(held: Held) -> None:
    bus, inside = EventBus(), asyncio.Event()

    async def main() -> None:
        async with handle_events(bus, held):
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(main())
    await inside.wait()
    warn(bus, "a", "b")
    await in_thread(held.reached)
    task.cancel()
    await asyncio.sleep(0)
    # Once more while it is being ended.
    task.cancel()
    held.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (held.texts, held.closed) == (["a", "b"], 1)


async def test_no_thread_is_left() -> None:
    before = threading.active_count()
    for _ in range(5):
        async with handle_events(EventBus(), Kept()):
            pass
    for thread in threading.enumerate():
        if thread.name == "asupervise-Kept":
            await asyncio.to_thread(thread.join)
    # That of `to_thread` may have come.
    assert threading.active_count() <= before + 1


# --- one that is slow -----------------------------------------------------------------------------


async def test_a_slow_handler_slows_nobody(channel: Channel, held: Held) -> None:
    bus = EventBus()
    async with handle_events(bus, held):
        async with start(None, "true", events=bus) as ctx:
            await in_thread(held.reached)
            result = await ctx.wait()
        assert result is not None
        assert not result.is_failed()
        assert held.events == []
        held.gate.set()
    assert held.events == bus.subscribe().take()


async def test_what_waits_is_bounded_and_what_is_dropped_is_said(held: Held) -> None:
    bus, warnings = EventBus(), []
    async with handle_events(bus, held, name="--mine", on_warning=warnings.append, maxsize=2):
        warn(bus, "first")
        await in_thread(held.reached)
        warn(bus, *"abcde")
        held.gate.set()
    assert held.texts == ["first", "3 events were left out here", "d", "e"]
    assert warnings == ["--mine: 3 events left out: too slow"]


async def test_one_that_hangs_is_not_waited_for_longer(held: Held) -> None:
    bus, warnings = EventBus(), []
    async with handle_events(bus, held, name="--mine", on_warning=warnings.append, patience_s=0.05):
        warn(bus, "a")
        await in_thread(held.reached)
        warn(bus, "b", "c")
    assert warnings == ["--mine: 3 events left out: too slow"]
    assert held.closed == 0


async def test_one_that_can_be_told_to_give_up_is(held: Held) -> None:
    class Giving(Held):
        def abandon(self) -> None:
            self.gate.set()

    bus, giving = EventBus(), Giving()
    warnings: list[str] = []
    async with handle_events(bus, giving, on_warning=warnings.append, patience_s=0.05):
        warn(bus, "a", "b")
        await in_thread(giving.reached)
    assert giving.closed == 1
    assert warnings == ["Giving: 2 events left out: too slow"]


async def test_an_end_that_hangs_is_not_waited_for_either() -> None:
    gate = threading.Event()

    class Hanging(Kept):
        def close(self) -> None:
            gate.wait()

    bus, handler = EventBus(), Hanging()
    async with handle_events(bus, handler, patience_s=0.05):
        warn(bus, "a")
    gate.set()
    assert handler.texts == ["a"]


# --- one that is wrong ----------------------------------------------------------------------------


class Wrong(Kept):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def handle(self, event: Event, /) -> None:
        super().handle(event)
        raise self._error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LookupError("no luck"), "LookupError: no luck"),
        (OSError(32, "Broken pipe"), "[Errno 32] Broken pipe"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
        (StopIteration(), "StopIteration: "),
    ],
    ids=lambda given: type(given).__name__,
)
async def test_what_it_raises_is_warned_of_once(error: BaseException, words: str) -> None:
    bus, wrong, warnings = EventBus(), Wrong(error), []
    handling = handle_events(bus, wrong, name="--mine", on_warning=warnings.append)
    async with handling, start(None, "true", events=bus) as ctx:
        result = await ctx.wait()
    assert result is not None
    assert not result.is_failed()
    assert result.warnings == ()
    assert len(wrong.events) == 4
    assert len(warnings) == 1
    assert warnings[0].startswith(f"--mine: events could not be handled: {words}")
    assert wrong.closed == 1


async def test_an_end_that_raises_is_warned_of() -> None:
    class Wrong(Kept):
        def close(self) -> None:
            raise LookupError("no luck")

    bus, warnings = EventBus(), []
    async with handle_events(bus, Wrong(), on_warning=warnings.append):
        warn(bus, "a")
    assert warnings == ["Wrong: events could not be handled: LookupError: no luck"]


async def test_the_loop_hears_of_it_where_nobody_else_wants_to() -> None:
    heard: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: heard.append(context))
    bus = EventBus()
    async with handle_events(bus, Wrong(LookupError("no luck"))):
        warn(bus, "a")
    assert heard == [{"message": "Wrong: events could not be handled: LookupError: no luck"}]


def test_one_that_hangs_keeps_no_program_from_ending(run_cli: Any) -> None:
    program = """
import asyncio, threading
from asupervise import EventBus, handle_events

class Hangs:
    def handle(self, event):
        threading.Event().wait()

async def main():
    bus = EventBus()
    async with handle_events(bus, Hangs(), on_warning=print, patience_s=0.05):
        bus.tell("Warned", text="a")
        await asyncio.sleep(0)

asyncio.run(main())
"""
    import sys

    done = run_cli(command=(sys.executable, "-c", program))
    assert done.stdout == b"Hangs: 1 event left out: too slow\n"
    assert (done.returncode, done.stderr) == (0, b"")


async def test_a_queue_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="maxsize: 0"):
        async with handle_events(EventBus(), Kept(), maxsize=0):
            pass


def test_they_are_public_names() -> None:
    assert asupervise.handle_events is handle_events
    assert asupervise.EventHandler.__name__ == "EventHandler"


class Asynchronous:
    async def handle(self, event: Event) -> None: ...


@pytest.mark.parametrize("handler", [None, print, Asynchronous()], ids=["a", "b", "c"])
async def test_what_is_no_handler_is_refused_at_once(handler: Any) -> None:
    with pytest.raises(ValueError, match=r"handler: .* expected an object with a method `handle"):
        async with handle_events(EventBus(), handler):
            pass
