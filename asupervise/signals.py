"""The command line's behaviour on signals, for apps that want it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

ENDING_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# signal(7): nobody is asked about these two.
_NOT_HANDLED: Final = (signal.SIGKILL, signal.SIGSTOP)


class Signalled(Protocol):
    """What signals can go to: a `PContext`, and what is like one."""

    def send_signal(self, sig: int) -> None:
        """Pass it on to the workers."""

    async def close(self, death_sig: int | None, timeout: float) -> None:
        """End them by it, and by SIGKILL after so many seconds."""


class SignalHandling:
    """What signals do to a group: made by :func:`handle_signals`.

    Attributes:
        received: the first ending signal that came, or None.
    """

    def __init__(
        self,
        ctx: Signalled | None,
        ending: Iterable[int],
        forwarded: Iterable[int],
        grace_s: float,
        on_signal: Callable[[signal.Signals, bool], None] | None,
    ) -> None:
        self.received: signal.Signals | None = None
        self._ctx = ctx
        self._ending = frozenset(ending)
        self._forwarded = frozenset(forwarded)
        self._grace_s = grace_s
        self._on_signal = on_signal
        self._again = False
        self._waiting: list[int] = []
        self._closing: set[asyncio.Task[None]] = set()

    def attend(self, ctx: Signalled | None) -> None:
        """From now on signals go to `ctx`; those that have come before do so at once.

        None: the group has ended, and signals wait for the next.
        """
        self._ctx = ctx
        if ctx is None:
            return
        waiting, self._waiting = self._waiting, []
        for sig in waiting:
            self._act(sig, ctx)

    def on_signal(self, sig: int) -> None:
        """A signal has come; called in the event loop."""
        if sig in self._ending:
            self._again = self.received is not None
            self.received = self.received or _named(sig)
        if self._ctx is None:
            self._waiting.append(sig)
        else:
            self._act(sig, self._ctx)
        # Last: the group is ended whatever the app's own function does.
        if sig in self._ending and self._on_signal is not None:
            self._on_signal(_named(sig), self._again)

    def _act(self, sig: int, ctx: Signalled) -> None:
        if sig in self._forwarded:
            self._forward(sig, ctx)
        elif self._again:
            self._close(ctx, signal.SIGKILL, 0)
        else:
            self._close(ctx, sig, self._grace_s)

    def _forward(self, sig: int, ctx: Signalled) -> None:
        try:
            ctx.send_signal(sig)
        except OSError as exc:
            # A worker that has changed its user, most likely. Nobody waits here for an exception:
            # it goes where the app has those of its event loop go.
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"signal {sig} could not be forwarded to {ctx!r}", "exception": exc}
            )

    def _close(self, ctx: Signalled, sig: int, grace_s: float) -> None:
        task = asyncio.get_running_loop().create_task(ctx.close(sig, grace_s))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


@contextmanager
def handle_signals(
    ctx: Signalled | None = None,
    signals: Iterable[int] = ENDING_SIGNALS,
    *,
    forward: Iterable[int] = (),
    shutdown_timeout: float = 30.0,
    on_signal: Callable[[signal.Signals, bool], None] | None = None,
) -> Iterator[SignalHandling]:
    """Let signals end a group as the command line does, for the duration of the context.

    The first of `signals` is passed to the workers, and SIGKILL follows after
    `shutdown_timeout`; a second one kills them at once. What was installed for those signals
    before is put back at the end. A handler that the app has put in place with
    ``loop.add_signal_handler`` is called as well, because the event loop learns of signals by a
    descriptor.

    Args:
        ctx: the group; None to name it later with :meth:`SignalHandling.attend`.
        signals: those that end the group.
        forward: those that are passed to every worker and end nothing.
        shutdown_timeout: seconds from the first signal to SIGKILL.
        on_signal: called with each ending signal and whether it is a further one.

    Returns:
        A context manager; what it gives has ``received``, the first ending signal that came, or
        None.

    Raises:
        ValueError: for a signal that does not exist or cannot be handled, for one that is to end
            the group and to be forwarded as well, for a negative `shutdown_timeout`, or in
            another thread than the main one (Python's signals are handled there).

    Example::

        async with start_processes(...) as ctx:
            with handle_signals(ctx):
                result = await ctx.wait()
    """
    loop = asyncio.get_running_loop()
    ending, forwarded = _checked("signals", signals), _checked("forward", forward)
    if both := sorted(set(ending) & set(forwarded)):
        raise ValueError(f"forward: {_names(both)}: to end the group as well, by `signals`")
    if not shutdown_timeout >= 0:
        raise ValueError(f"shutdown_timeout: {shutdown_timeout!r}: expected seconds, zero or more")
    handling = SignalHandling(ctx, ending, forwarded, shutdown_timeout, on_signal)

    def handler(sig: int, frame: Any) -> None:
        loop.call_soon_threadsafe(handling.on_signal, sig)

    replaced: dict[int, Any] = {}
    try:
        for sig in dict.fromkeys((*ending, *forwarded)):
            replaced[sig] = signal.signal(sig, handler)
        yield handling
    finally:
        for sig, previous in replaced.items():
            # None: installed by other means than Python's, and out of its reach.
            if previous is not None:
                signal.signal(sig, previous)


class Shown(Protocol):
    """What is on the terminal: a live view."""

    def resized(self) -> None:
        """The terminal may have another size."""

    def pause(self) -> None:
        """Give the terminal back, because the process is about to be stopped."""

    def resume(self) -> None:
        """Take it again."""


@contextmanager
def handle_terminal(shown: Shown) -> Iterator[None]:
    """Let a live view hear of the terminal, for the duration of the context.

    Of its size (SIGWINCH) at once, and of Ctrl-Z (SIGTSTP), which stops the process as before.

    Raises:
        ValueError: in another thread than the main one.
    """
    loop = asyncio.get_running_loop()

    def stop() -> None:
        shown.pause()
        ours = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)
        # Here it goes on.
        signal.signal(signal.SIGTSTP, ours)
        shown.resume()

    actions = {signal.SIGWINCH: shown.resized, signal.SIGTSTP: stop}

    def handler(sig: int, frame: Any) -> None:
        loop.call_soon_threadsafe(actions[signal.Signals(sig)])

    before = {sig: signal.getsignal(sig) for sig in actions}
    # A shell without job control has it ignored: nobody would let us go on.
    handled = [sig for sig in actions if before[sig] is not signal.SIG_IGN]
    try:
        for sig in handled:
            signal.signal(sig, handler)
        yield
    finally:
        for sig in handled:
            if before[sig] is not None:
                signal.signal(sig, before[sig])


def _checked(what: str, signals: Iterable[int]) -> tuple[int, ...]:
    found = tuple(dict.fromkeys(signals))
    if wrong := [s for s in found if s not in signal.valid_signals() or s in _NOT_HANDLED]:
        raise ValueError(f"{what}: {_names(wrong)}: cannot be handled on this system")
    return found


def _names(signals: Iterable[int]) -> str:
    return ", ".join(getattr(_named(sig), "name", repr(sig)) for sig in signals)


def _named(sig: int) -> signal.Signals:
    """With its name where it has one: most real-time signals are numbers only."""
    try:
        return signal.Signals(sig)
    except ValueError:
        return sig  # type: ignore[return-value]
