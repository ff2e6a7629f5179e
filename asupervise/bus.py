"""The stream of events: told by whoever makes something happen, consumed by whoever shows it.

What is told costs next to nothing while nobody listens: it is kept as a tuple, and the typed event
of :mod:`asupervise.events` is made, and that module imported, for the first one who wants it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from heapq import merge
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakSet

if TYPE_CHECKING:
    from asupervise.events import Event

__all__ = ["EventBus", "Subscription", "Told"]

_HISTORY: Final = 10_000
_QUEUE: Final = 1024
# Who lags behind loses these first: the next one says the same, only newer.
_PASSING: Final = frozenset({"Heartbeat", "Progress", "ResourceSample"})


class Told(NamedTuple):
    """Something that has happened, before anybody wanted it as an event.

    Attributes:
        monotonic_ns: when.
        time: when, in seconds since the epoch.
        kind: the name of the event's class.
        fields: its further fields.
    """

    monotonic_ns: int
    time: float
    kind: str
    fields: dict[str, Any]

    def event(self) -> Event:
        """As its own type."""
        from asupervise import events

        made: Event = getattr(events, self.kind)(
            monotonic_ns=self.monotonic_ns, time=self.time, **self.fields
        )
        return made


class EventBus:
    """Carries the events of one group, or of a run's groups one after another.

    Not safe for threads: everybody is in one event loop.

    Args:
        history: how many events are kept for those who come later. Of more, `Heartbeat`,
            `Progress` and `ResourceSample` are dropped first, the oldest first.
        parent: a bus that is told all that this one is told.

    Raises:
        ValueError: for a `history` below zero, or a parent that is no bus.

    Example::

        bus = EventBus()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(show(bus.subscribe()))
            await launch(config, train, events=bus)
            bus.close()
    """

    def __init__(self, history: int = _HISTORY, parent: EventBus | None = None) -> None:
        if history < 0:
            raise ValueError(f"history: {history!r}: expected zero or more")
        if not (parent is None or isinstance(parent, EventBus)):
            raise ValueError(f"events: {parent!r}: expected an EventBus")
        self._history = _Bounded(history)
        self._parent = parent
        # Who has stopped to consume, and says no word of it (`break`), is none any more.
        self._subscriptions: WeakSet[Subscription] = WeakSet()
        # What is to be called, and the bus that was asked for it: ours, or one below.
        self._wanted: dict[Callable[[], None], EventBus] = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether nothing will happen any more."""
        return self._closed

    @property
    def has_listeners(self) -> bool:
        """Whether anybody consumes the stream now, who only records it included."""
        return any(bus._subscriptions for bus in self._upwards())

    def when_listened(self, call: Callable[[], None]) -> None:
        """Call this once, as soon as somebody consumes the stream; now, if somebody does.

        Who only records it does not count.
        """
        if any(not each.records for bus in self._upwards() for each in bus._subscriptions):
            call()
            return
        for bus in self._upwards():
            if not bus._closed:
                bus._wanted[call] = self

    def forget(self, call: Callable[[], None]) -> None:
        """Never mind what was asked for with :meth:`when_listened`."""
        for bus in self._upwards():
            bus._wanted.pop(call, None)

    def _upwards(self) -> Iterator[EventBus]:
        """This one and all that are told what it is told."""
        bus: EventBus | None = self
        while bus is not None:
            yield bus
            bus = bus._parent

    @property
    def dropped(self) -> int:
        """How many events those who come now have missed for good."""
        return self._history.dropped

    def tell(self, kind: str, at_ns: int | None = None, /, **fields: Any) -> None:
        """Something has happened; after :meth:`close` nobody hears of it.

        Args:
            kind: the name of its class in :mod:`asupervise.events`.
            at_ns: when, on ``time.monotonic_ns()``; now by default.
            fields: the event's own.
        """
        if self._closed:
            return
        now_ns, now = time.monotonic_ns(), time.time()
        at_ns = now_ns if at_ns is None else at_ns
        self._take(Told(at_ns, now - (now_ns - at_ns) / 10**9, kind, fields))

    def _take(self, told: Told) -> None:
        if self._closed:
            return
        self._history.add(told)
        for subscription in self._subscriptions:
            subscription._add(told)
        if self._parent is not None:
            self._parent._take(told)

    def subscribe(self, maxsize: int = _QUEUE, *, records: bool = False) -> Subscription:
        """Hear of everything, from the beginning as far as the history has it.

        Args:
            maxsize: how many events may wait to be taken, besides the history.
            records: whether nobody looks at it now: what costs something to find out (first
                output, heartbeats, progress) is then left out, unless somebody else wants it.

        Raises:
            ValueError: for a `maxsize` below 1.
        """
        if maxsize < 1:
            raise ValueError(f"maxsize: {maxsize!r}: expected at least 1")
        subscription = Subscription(self, maxsize, self._history, records=records)
        if not records:
            for call, asked in list(self._wanted.items()):
                asked.forget(call)
                call()
        return subscription

    def close(self) -> None:
        """Nothing will happen any more: who consumes comes to the end. May be called again."""
        self._closed = True
        self._wanted.clear()
        for subscription in list(self._subscriptions):
            subscription._wake()


class Subscription:
    """One consumer's part of the stream: ``async for event in subscription``.

    It ends when the bus is closed and all is taken, or at :meth:`close`; whoever leaves the loop
    before, and keeps no reference, need not close it. Where more waits to be taken than there is
    room for, the oldest `Heartbeat`, `Progress` or `ResourceSample` is dropped, and where there is
    none of these the oldest event: what ends a group always arrives.

    Attributes:
        records: see :meth:`EventBus.subscribe`.

    Example::

        subscription = ctx.events()
        async for event in subscription:
            print(event.kind)
        print(subscription.dropped, "were dropped")
    """

    def __init__(
        self, bus: EventBus, maxsize: int, history: _Bounded, *, records: bool = False
    ) -> None:
        self.records = records
        self._bus = bus
        self._queue = _Bounded(maxsize + len(history))
        for told in history:
            self._queue.add(told)
        self._queue.dropped = history.dropped
        self._admitted = 0
        self._maxsize = maxsize
        self._stirred = asyncio.Event()
        self._ended = False
        bus._subscriptions.add(self)

    @property
    def dropped(self) -> int:
        """How many events were dropped because they were not taken in time."""
        return self._queue.dropped

    def _add(self, told: Told) -> None:
        self._queue.add(told)
        self._wake()

    def _wake(self) -> None:
        self._stirred.set()

    def close(self) -> None:
        """Hear of nothing any more, and let go of what waits."""
        self._queue.clear()
        self.finish()

    def finish(self) -> None:
        """Hear of nothing more; what waits can still be taken, and then it ends."""
        self._ended = True
        self._bus._subscriptions.discard(self)
        self._wake()

    @property
    def waiting(self) -> int:
        """How many events wait to be taken."""
        return len(self._queue)

    def take(self) -> list[Event]:
        """All that waits to be taken, without waiting."""
        taken = [told.event() for told in self._queue]
        self._queue.clear()
        self._queue.shrink(self._maxsize)
        return taken

    def take_saying_gaps(self) -> list[Event]:
        """As :meth:`take`, with a `Warned` at the beginning if some have been dropped since."""
        taken = self.take()
        missing, self._admitted = self.dropped - self._admitted, self.dropped
        if taken and missing:
            from asupervise.events import Warned

            first = taken[0]
            text = f"{missing} event{'s were' if missing > 1 else ' was'} left out here"
            gap = Warned(
                monotonic_ns=first.monotonic_ns, time=first.time, run_id=first.run_id,
                group=first.group, attempt=first.attempt, node=first.node, text=text,
            )  # fmt: skip
            taken.insert(0, gap)
        return taken

    async def wait(self) -> bool:
        """Wait until there is something to take; False if there will be nothing any more."""
        while not self._queue:
            if self._ended or self._bus.closed:
                self._bus._subscriptions.discard(self)
                return False
            self._stirred.clear()
            await self._stirred.wait()
        return True

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        if not await self.wait():
            raise StopAsyncIteration
        told = self._queue.pop_oldest()
        if not self._queue:
            self._queue.shrink(self._maxsize)
        return told.event()


class _Bounded:
    """A queue that, where it is full, drops what passes, and else what is oldest."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._count = 0
        # Each with its number, by which they are in one order.
        self._passing: deque[tuple[int, Told]] = deque()
        self._lasting: deque[tuple[int, Told]] = deque()
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._passing) + len(self._lasting)

    def __iter__(self) -> Iterator[Told]:
        # No two have the same number, so what was told is never compared.
        return (told for _, told in merge(self._passing, self._lasting))

    def add(self, told: Told) -> None:
        self._count += 1
        (self._passing if told.kind in _PASSING else self._lasting).append((self._count, told))
        if len(self) > self._size:
            (self._passing or self._lasting).popleft()
            self.dropped += 1

    def pop_oldest(self) -> Told:
        passing, lasting = self._passing, self._lasting
        passes = passing and (not lasting or passing[0][0] < lasting[0][0])
        return (passing if passes else lasting).popleft()[1]

    def shrink(self, size: int) -> None:
        """From now on there is room for so many; it holds none."""
        self._size = size

    def clear(self) -> None:
        self._passing.clear()
        self._lasting.clear()
