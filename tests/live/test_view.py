"""`live_view` in an application: what it does to the host, and that it gives all of it back."""

from __future__ import annotations

import asyncio
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TextIO

import pytest

from asupervise import DefaultLogsSpecs, EventBus, Std, live_view, start_processes
from asupervise.views.live.above import Above
from asupervise.views.live.driving import LiveView
from asupervise.views.live.tty import Terminal, find_terminal
from asupervise.views.live.view import place_of_view

CEILING_S = 30.0


class Pty:
    """A terminal whose other end is ours.

    Args:
        reads: whether we read what is written to it, as a terminal does.
    """

    def __init__(self, *, reads: bool = True) -> None:
        self._ours, self._theirs = pty.openpty()
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
        self.stream = os.fdopen(os.dup(self._theirs), "w")
        self._seen = bytearray()
        self._more = threading.Condition()
        self._thread: threading.Thread | None = None
        if reads:
            self._thread = threading.Thread(target=self._read)
            self._thread.start()

    def _read(self) -> None:
        with suppress(OSError):  # EIO: nobody has it open any more
            while data := os.read(self._ours, 65536):
                with self._more:
                    self._seen += data
                    self._more.notify_all()

    def wait_for(self, text: str, times: int = 1) -> str:
        """All that was written, once this has been."""
        with self._more:
            found = self._more.wait_for(
                lambda: self._seen.count(text.encode()) >= times, timeout=CEILING_S
            )
            assert found, bytes(self._seen)
            return self._seen.decode()

    async def seen(self, text: str, times: int = 1) -> str:
        """The same, for the event loop's thread."""
        return await asyncio.to_thread(self.wait_for, text, times)

    @property
    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self._theirs)[3] & termios.ECHO)

    def close(self) -> None:
        with suppress(OSError):
            termios.tcflush(self._theirs, termios.TCOFLUSH)
        self.stream.close()
        os.close(self._theirs)
        if self._thread is not None:
            self._thread.join(CEILING_S)
        os.close(self._ours)


@pytest.fixture
def terminal() -> Iterator[Pty]:
    made = Pty()
    yield made
    made.close()


@pytest.fixture
def deaf_terminal() -> Iterator[Pty]:
    made = Pty(reads=False)
    yield made
    made.close()


@contextmanager
def as_standard_streams(terminal: Pty) -> Iterator[None]:
    # Not in a fixture: pytest puts streams of its own there after that.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", terminal.stream)
        patch.setattr(sys, "stderr", terminal.stream)
        patch.setenv("TERM", "xterm")
        patch.delenv("NO_COLOR", raising=False)
        yield


@asynccontextmanager
async def view_on(
    terminal: Pty, bus: EventBus | None = None, **options: str
) -> AsyncIterator[LiveView]:
    with as_standard_streams(terminal):
        async with live_view(bus or EventBus(), **options) as view:
            assert view is not None
            yield view


def tell(bus: EventBus, kind: str, **fields: object) -> None:
    bus.tell(kind, group="job", **fields)


async def test_it_shows_what_the_bus_tells(terminal: Pty) -> None:
    bus = EventBus()
    async with view_on(terminal, bus, title="my job"):
        tell(bus, "GroupStarting", nprocs=2)
        tell(bus, "WorkerStarted", local_rank=0, rank=0, pid=7)
        await terminal.seen("● 1 running")
        tell(bus, "WorkerExited", local_rank=0, rank=0, pid=7, exitcode=0, uptime_s=1.0)
        # Told and not seen when it ends: the last state is shown in any case.
    seen = await terminal.seen("\x1b[?25h", times=2)
    assert "my job" in seen
    assert "✓ 1 done" in seen
    bus.close()


async def test_what_is_printed_appears_above_from_any_thread(terminal: Pty) -> None:
    async with view_on(terminal):
        print("from the loop")
        print("to stderr", file=sys.stderr)
        await asyncio.to_thread(print, "from a thread", "\x1b[2J")
        sys.stdout.write("begun")
        await terminal.seen("begun")
        print(" and ended")
        sys.stdout.write("never ended")
    seen = await terminal.seen("never ended\r\n")
    for line in ("from the loop\r\n", "to stderr\r\n", "from a thread \r\n", "begun and ended\r\n"):
        assert line in seen
    assert "\x1b[2J" not in seen


async def test_the_last_line_of_a_run_that_is_over_at_once(terminal: Pty, tmp_path: Path) -> None:
    """Its files are gone before the table is drawn a second time."""
    bus = EventBus()
    async with view_on(terminal, bus):
        logs = DefaultLogsSpecs(tee=Std.OUT, local_ranks_filter=set())
        args = {0: ("-c", "echo first; echo last")}
        async with start_processes("job", "sh", args, {0: {}}, logs, events=bus) as ctx:
            result = await ctx.wait()
    assert result.log_dir is None
    seen = await terminal.seen("\x1b[?25h", times=2)
    assert re.search(r"done +\d:\d\d +.*last ", seen.rpartition("LAST LINE")[2])
    bus.close()


@pytest.mark.parametrize("how", ["returns", "raises"])
async def test_the_host_gets_everything_back(terminal: Pty, how: str) -> None:
    async def show() -> None:
        async with live_view(EventBus()):
            assert sys.stdout is not terminal.stream
            assert sys.stdout.isatty()
            assert sys.stdout.encoding == "utf-8"
            with pytest.raises(io.UnsupportedOperation):
                sys.stdout.fileno()
            await terminal.seen("\x1b[?25l")
            await terminal.seen("\x1b[?2026l")
            assert not terminal.echoes
            if how == "raises":
                raise KeyError

    assert terminal.echoes
    with as_standard_streams(terminal):
        with suppress(KeyError):
            await show()
        assert sys.stdout is sys.stderr is terminal.stream
    assert terminal.echoes
    await terminal.seen("\x1b[?25h")


async def test_another_stream_that_was_put_there_meanwhile_stays(terminal: Pty) -> None:
    other = io.StringIO()
    with as_standard_streams(terminal):
        async with live_view(EventBus()):
            sys.stdout = other
        assert sys.stdout is other


async def test_a_terminal_that_takes_nothing_is_waited_for_until_cancelled(
    deaf_terminal: Pty,
) -> None:
    inside = asyncio.Event()

    async def show() -> None:
        async with view_on(deaf_terminal):
            for _ in range(100):
                print("x" * 10_000)
            inside.set()

    showing = asyncio.create_task(show())
    await inside.wait()
    done, _ = await asyncio.wait({showing}, timeout=0.2)
    assert not done
    showing.cancel()
    async with asyncio.timeout(CEILING_S):
        await asyncio.wait({showing})
    assert showing.cancelled()
    assert deaf_terminal.echoes


async def test_who_has_much_to_show_waits_for_the_terminal(deaf_terminal: Pty) -> None:
    async def show() -> None:
        async with view_on(deaf_terminal) as view:
            for _ in range(10):
                await view.streams["stdout"].awrite("x" * 100_000 + "\n")
            raise AssertionError("nobody has taken it")

    showing = asyncio.create_task(show())
    done, _ = await asyncio.wait({showing}, timeout=0.2)
    assert not done
    showing.cancel()
    await asyncio.wait({showing})
    assert showing.cancelled()


async def test_a_terminal_that_is_gone_is_told_to_who_writes(
    terminal: Pty, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang_up(self: Terminal, parts: list[bytes]) -> None:
        raise OSError(5, "Input/output error")

    async def write_on(above: Above) -> None:
        while True:
            await above.awrite("x" * 300_000 + "\n")

    async with view_on(terminal) as view:
        await terminal.seen("\x1b[?2026l")
        monkeypatch.setattr(Terminal, "write", hang_up)
        with pytest.raises(OSError, match="Input/output"):
            await write_on(view.streams["stdout"])


async def test_no_terminal_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = io.StringIO(), io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        assert place_of_view().why_not == "there is no terminal"
        async with live_view(EventBus()) as view:
            assert view is None
            assert (sys.stdout, sys.stderr) == streams
    assert [stream.getvalue() for stream in streams] == ["", ""]


async def test_a_colour_that_is_none() -> None:
    with pytest.raises(ValueError, match="color: 'blue': expected one of auto, always, never"):
        async with live_view(EventBus(), color="blue"):
            pass


async def test_without_colours(terminal: Pty) -> None:
    bus = EventBus()
    async with view_on(terminal, bus, color="never"):
        tell(bus, "GroupStarting", nprocs=1)
        tell(bus, "WorkerStarted", local_rank=0, rank=0, pid=7)
        print("\x1b[31mred")
        await terminal.seen("● 1 running")
    seen = await terminal.seen("red\r\n")
    assert "\x1b[31m" not in seen
    assert "\x1b[32m" not in seen


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_that_can_show_no_table(terminal: Pty, term: str) -> None:
    place = find_terminal({"stdout": terminal.stream}, {"TERM": term})
    assert (place.fd, place.why_not) == (None, f"TERM={term} can show no table")


def test_of_two_terminals_the_first_is_taken(terminal: Pty) -> None:
    other = Pty()
    try:
        environ = {"TERM": "xterm"}
        both: dict[str, TextIO] = {"stdout": terminal.stream, "stderr": other.stream}
        place = find_terminal(both, environ)
        assert (place.fd, place.streams) == (terminal.stream.fileno(), ("stdout",))
        alone = find_terminal({"stdout": io.StringIO(), "stderr": other.stream}, environ)
        assert (alone.fd, alone.streams) == (other.stream.fileno(), ("stderr",))
    finally:
        other.close()


def test_a_terminal_that_says_nothing_of_its_size(terminal: Pty) -> None:
    fcntl.ioctl(terminal.stream, termios.TIOCSWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
    shown = Terminal(terminal.stream.fileno())
    assert shown.size() == (80, 24)
    shown.close()
