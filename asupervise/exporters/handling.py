"""Events to whoever handles them, in a thread of its own: one that is slow slows nobody."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from inspect import iscoroutinefunction
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from asupervise.bus import EventBus, Subscription
from asupervise.shielding import finished_in_any_case

if TYPE_CHECKING:
    from asupervise.events import Event

__all__ = ["EventHandler", "handle_events"]

# So many may wait for a slow handler.
_QUEUE: Final = 10_000
# How long the end waits for one that lags behind.
_PATIENCE_S: Final = 5.0
# For one that was told to give up.
_GIVING_UP_S: Final = 1.0


class EventHandler(Protocol):
    """Who is handed events, one after the other, in one thread.

    `handle` may block and may raise. There may be two further methods, without arguments:
    ``close()``, called once at the end, in the same thread; and ``abandon()``, called in another
    thread where ``handle`` takes too long at the end, which it is to make return.

    Example::

        class Mail:
            def handle(self, event: Event) -> None:
                if isinstance(event, GroupEnded) and not event.succeeded:
                    send_mail(f"{event.group}: rank {event.root_cause} failed")

    `launch` and the command line tell of a `RunEnded` as well, after all groups.
    """

    def handle(self, event: Event, /) -> None:
        """Something has happened."""


@asynccontextmanager
async def handle_events(
    bus: EventBus,
    handler: EventHandler,
    *,
    name: str = "",
    on_warning: Callable[[str], None] | None = None,
    maxsize: int = _QUEUE,
    patience_s: float = _PATIENCE_S,
) -> AsyncIterator[None]:
    """Hand all events of a bus to a handler, for the duration of the context.

    At its end what has been told is handed on, for so long as `patience_s`; the handler is then
    closed. What it raises harms nobody, and the first time is warned of.

    Args:
        bus: who tells; it stays open.
        handler: see :class:`EventHandler`.
        name: of the handler, for warnings; by default that of its class.
        on_warning: called in the event loop with what goes wrong, a sentence; by default the event
            loop's exception handler hears of it.
        maxsize: how many events may wait; of more some are dropped (see `Subscription`), which the
            handler is told as a `Warned`.
        patience_s: how long the end of the context may wait for a slow handler, in seconds.

    Raises:
        ValueError: for a `maxsize` below 1, and for what is no handler.

    Example::

        bus = EventBus()
        async with handle_events(bus, PrometheusExporter()):
            await launch(config, train, events=bus)
    """
    handle = getattr(handler, "handle", None)
    if not callable(handle) or iscoroutinefunction(handle):
        raise ValueError(
            f"handler: {handler!r}: expected an object with a method `handle(event)`, which is "
            "called in a thread and so is no coroutine function"
        )
    if not patience_s >= 0:
        raise ValueError(f"patience_s: {patience_s!r}: expected seconds, zero or more")
    handing = _Handing(
        bus.subscribe(maxsize), handler, name or type(handler).__name__, on_warning or _to_loop
    )
    try:
        yield
    finally:
        ending = asyncio.get_running_loop().create_task(
            handing.end(patience_s), name=f"asupervise: end of {handing.name}"
        )
        await finished_in_any_case(ending)


def _to_loop(text: str) -> None:
    asyncio.get_running_loop().call_exception_handler({"message": text})


class _Handing:
    """Takes events from the stream, and hands them on to the thread as they come."""

    def __init__(
        self,
        heard: Subscription,
        handler: EventHandler,
        name: str,
        on_warning: Callable[[str], None],
    ) -> None:
        self.name = name
        self._heard = heard
        self._handler = handler
        self._on_warning = on_warning
        self._thread = _Thread(f"asupervise-{name}")
        self._waiting = 0
        self._warned = False
        self._task = asyncio.get_running_loop().create_task(
            self._hand_on(), name=f"asupervise: {name}"
        )

    async def _hand_on(self) -> None:
        while await self._heard.wait():
            events = self._heard.take_saying_gaps()
            self._waiting = len(events)
            await self._in_thread(partial(self._handle, events))
            self._waiting = 0
        if (close := getattr(self._handler, "close", None)) is not None:
            await self._in_thread(close)

    async def _in_thread(self, call: Callable[[], object]) -> None:
        # Its error is a value: not each exception can be set to a future (StopIteration).
        error = await asyncio.wrap_future(self._thread.submit(call))
        if error is not None and not self._warned:
            self._warned = True
            self._on_warning(f"{self.name}: events could not be handled: {_in_words(error)}")

    def _handle(self, events: Sequence[Event]) -> None:
        """In the thread. One event that cannot be handled does not cost the others."""
        first: BaseException | None = None
        for event in events:
            try:
                self._handler.handle(event)
            except BaseException as exc:
                first = first or exc
            self._waiting -= 1
        if first is not None:
            raise first

    async def end(self, patience_s: float) -> None:
        self._heard.finish()
        _, late = await asyncio.wait({self._task}, timeout=patience_s)
        left = self._waiting + self._heard.waiting if late else 0
        if late:
            if (abandon := getattr(self._handler, "abandon", None)) is not None:
                abandon()
            self._heard.close()
            _, late = await asyncio.wait({self._task}, timeout=_GIVING_UP_S)
        if late:
            # It hangs, and its thread with it, which keeps nobody from ending.
            self._task.cancel()
            await asyncio.wait({self._task})
        self._thread.end()
        missing = self._heard.dropped + left
        if missing:
            self._on_warning(
                f"{self.name}: {missing} event{'s' if missing > 1 else ''} left out: too slow"
            )


def _in_words(exc: BaseException) -> str:
    return str(exc) if isinstance(exc, OSError) else f"{type(exc).__name__}: {exc}"


_Answer: TypeAlias = "Future[BaseException | None]"


class _Thread:
    """Runs calls one after the other.

    None of an executor's: those are waited for at the end of the interpreter, however long.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], object], _Answer] | None] = SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, call: Callable[[], object]) -> _Answer:
        """Call it; the answer is what it has raised, or None."""
        answer: _Answer = Future()
        self._calls.put((call, answer))
        return answer

    def end(self) -> None:
        """It ends when its calls are done; nobody waits for that."""
        self._calls.put(None)

    def _run(self) -> None:
        while (asked := self._calls.get()) is not None:
            call, answer = asked
            # From here on nobody can take it back, and it has an answer.
            if answer.set_running_or_notify_cancel():
                answer.set_result(_raised_by(call))


def _raised_by(call: Callable[[], object]) -> BaseException | None:
    try:
        call()
    except BaseException as exc:
        return exc
    return None
