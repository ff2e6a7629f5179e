"""Writing to whatever `sys.stdout` may be, and never waiting for it in the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import io
import os
import pty
import sys
import termios
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import pytest

from asupervise.console import Console, Consoles
from asupervise.framing import Framed

CEILING_S = 30.0
# Invalid UTF-8, NUL, and a character of two bytes.
RAW = b"[w0]:\xff\xfe\0 \xc3\xa9\n"
BIG = b"".join(b"[w0]:%07d %s\n" % (i, b"x" * 80) for i in range(5000))


def whole(data: bytes) -> Framed:
    return Framed(data, data, (), unfinished=False)


def begun(resumed: bytes, fresh: bytes) -> Framed:
    return Framed(resumed, fresh, (), unfinished=True)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


async def put(console: Console, *framings: Framed, owner: object = "w0") -> None:
    for framed in framings:
        async with console.turn:
            await console.write(owner, framed)


class Pipe:
    """A pipe with a text stream on its writing end, and a reader in the event loop."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        self.stream = os.fdopen(self.writing, "w")

    async def read(self, size: int) -> bytes:
        """`size` bytes, or all until the end if that comes first."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        found = b""
        while len(found) < size:
            ready.clear()
            loop.add_reader(self.reading, ready.set)
            async with asyncio.timeout(CEILING_S):
                await ready.wait()
            loop.remove_reader(self.reading)
            piece = os.read(self.reading, min(65536, size - len(found)))
            if not piece:
                break
            found += piece
        return found

    def close_reading(self) -> None:
        os.close(self.reading)
        self.reading = -1

    def close(self) -> None:
        if self.reading >= 0:
            os.close(self.reading)
        # What could not be written comes out as an error here, too.
        with contextlib.suppress(OSError):
            self.stream.close()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


async def go_round(times: int) -> None:
    """Wait until the event loop has gone round so many times: it is not blocked."""
    for _ in range(times):
        await asyncio.sleep(0)


# --- destinations -------------------------------------------------------------------------------


async def test_a_pipe_takes_bytes_as_they_are(pipe: Pipe, threads: ThreadPoolExecutor) -> None:
    console = Console(pipe.stream, threads)
    await put(console, whole(RAW), whole(b"more\n"))
    assert await pipe.read(len(RAW) + 5) == RAW + b"more\n"


async def test_a_pipe_takes_more_than_it_holds(pipe: Pipe, threads: ThreadPoolExecutor) -> None:
    console = Console(pipe.stream, threads)
    writing = asyncio.create_task(put(console, whole(BIG), whole(RAW)))
    assert await pipe.read(len(BIG) + len(RAW)) == BIG + RAW
    await writing


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 16_384, 16_385, 65_537])
async def test_every_size_arrives(pipe: Pipe, threads: ThreadPoolExecutor, size: int) -> None:
    """Small pieces go without a thread, large ones with one, and both stay in order."""
    console = Console(pipe.stream, threads)
    pieces = [bytes([65 + i]) * size + b"\n" for i in range(8)]
    writing = asyncio.create_task(put(console, *map(whole, pieces)))
    assert await pipe.read(8 * (size + 1)) == b"".join(pieces)
    await writing


async def test_a_pipe_on_a_kernel_that_cannot_be_asked(
    pipe: Pipe, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "before Linux 6.4")

    monkeypatch.setattr(os, "pwritev", refuse)
    console = Console(pipe.stream, threads)
    await put(console, whole(RAW), whole(RAW))
    assert await pipe.read(2 * len(RAW)) == RAW * 2
    assert console.broken is None


async def test_a_pipe_that_somebody_made_non_blocking(
    pipe: Pipe, threads: ThreadPoolExecutor
) -> None:
    """The flag is shared by all who have the pipe: ssh and node set it on ours."""
    os.set_blocking(pipe.writing, False)
    console = Console(pipe.stream, threads)
    pipe.stream.write("printed first\n")
    writing = asyncio.create_task(put(console, whole(BIG), whole(BIG)))
    assert await pipe.read(14 + 2 * len(BIG)) == b"printed first\n" + BIG + BIG
    await writing


async def test_a_file(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    with open(tmp_path / "out", "w") as stream:
        await put(Console(stream, threads), whole(RAW), whole(BIG))
    assert (tmp_path / "out").read_bytes() == RAW + BIG


async def test_a_terminal(threads: ThreadPoolExecutor) -> None:
    ours, theirs = pty.openpty()
    settings = termios.tcgetattr(theirs)
    settings[1] &= ~termios.OPOST
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    try:
        with os.fdopen(theirs, "w") as stream:
            await put(Console(stream, threads), whole(RAW), begun(b"name? ", b"[w0]:name? "))
            wanted = RAW + b"[w0]:name? "
            found = b""
            while len(found) < len(wanted):
                found += os.read(ours, 1024)
        assert found == wanted
    finally:
        os.close(ours)


async def test_what_the_host_printed_comes_first(pipe: Pipe, threads: ThreadPoolExecutor) -> None:
    console = Console(pipe.stream, threads)
    print("the host's", file=pipe.stream)
    await put(console, whole(b"[w0]:a\n"))
    print("again", file=pipe.stream)
    await put(console, whole(b"[w0]:" + b"b" * 20_000 + b"\n"))
    wanted = b"the host's\n[w0]:a\nagain\n[w0]:" + b"b" * 20_000 + b"\n"
    assert await pipe.read(len(wanted)) == wanted


async def test_capsys(capsys: pytest.CaptureFixture[str], threads: ThreadPoolExecutor) -> None:
    await put(Console(sys.stdout, threads), whole(b"[w0]:\xc3\xa9\n"))
    assert capsys.readouterr().out == "[w0]:é\n"


async def test_capfd(capfd: pytest.CaptureFixture[str], threads: ThreadPoolExecutor) -> None:
    print("first")
    await put(Console(sys.stdout, threads), whole(b"[w0]:\xc3\xa9\n"))
    assert capfd.readouterr().out == "first\n[w0]:é\n"


async def test_memory_holds_nothing_but_text(
    capsys: pytest.CaptureFixture[str], threads: ThreadPoolExecutor
) -> None:
    """pytest decodes what it has captured, and ends with an internal error where it cannot."""
    await put(Console(sys.stdout, threads), whole(RAW))
    assert capsys.readouterr().out == "[w0]:\\xff\\xfe\0 é\n"


async def test_a_stream_of_text_alone(threads: ThreadPoolExecutor) -> None:
    memory = io.StringIO()
    with contextlib.redirect_stdout(memory):
        console = Console(sys.stdout, threads)
        # A character in two writes is one character.
        await put(console, begun(b"\xc3", b"[w0]:\xc3"), whole(b"\xa9\n"), whole(RAW))
    assert memory.getvalue() == "[w0]:é\n[w0]:\\xff\\xfe\0 é\n"


class OnlyWrite:
    """What some people put into `sys.stdout`."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, text: str) -> None:
        self.written.append(text)


async def test_an_object_that_can_only_write(threads: ThreadPoolExecutor) -> None:
    stream: Any = OnlyWrite()
    await put(Console(stream, threads), whole(RAW))
    assert "".join(stream.written) == "[w0]:\\xff\\xfe\0 é\n"


class Copying:
    """As in many a program: copies to a log what goes to the terminal, and is it otherwise."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.copy = ""
        self.threads: set[int] = set()

    def write(self, text: str) -> int:
        self.copy += text
        self.threads.add(threading.get_ident())
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


async def test_an_object_that_copies_sees_all_text(pipe: Pipe, threads: ThreadPoolExecutor) -> None:
    """It has a descriptor and a buffer, and yet they are not the same as its `write`."""
    stream: Any = Copying(pipe.stream)
    writing = asyncio.create_task(put(Console(stream, threads), whole(BIG)))
    assert await pipe.read(len(BIG)) == BIG
    await writing
    assert stream.copy == BIG.decode()
    assert stream.threads == {threading.get_ident()}


async def test_a_stream_that_writes_ascii_only(threads: ThreadPoolExecutor) -> None:
    class Ascii(io.StringIO):
        def write(self, text: str) -> int:
            text.encode("ascii")
            return super().write(text)

    stream = Ascii()
    await put(Console(stream, threads), whole(b"[w0]:\xc3\xa9\n"))
    assert stream.getvalue() == "[w0]:\\xe9\n"


async def test_a_compressed_file_is_one(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    """Its descriptor is that of the file, to which our bytes must not go."""
    with gzip.open(tmp_path / "out.gz", "wt") as stream:
        await put(Console(stream, threads), whole(RAW), whole(BIG))
    with gzip.open(tmp_path / "out.gz") as file:
        assert file.read() == RAW + BIG


# --- what has gone ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 100_000])
async def test_a_reader_that_has_gone(pipe: Pipe, threads: ThreadPoolExecutor, size: int) -> None:
    console = Console(pipe.stream, threads)
    pipe.close_reading()
    await put(console, whole(b"x" * size + b"\n"), whole(b"y\n"))
    assert isinstance(console.broken, BrokenPipeError)


async def test_a_reader_that_goes_while_we_wait(pipe: Pipe, threads: ThreadPoolExecutor) -> None:
    console = Console(pipe.stream, threads)
    writing = asyncio.create_task(put(console, whole(BIG)))
    await pipe.read(1)
    assert not writing.done()
    pipe.close_reading()
    await writing
    assert isinstance(console.broken, BrokenPipeError)


async def test_a_stream_that_is_closed(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    with open(tmp_path / "early", "w") as early:
        pass
    with open(tmp_path / "late", "w") as late:
        consoles = [Console(early, threads), Console(late, threads)]
    for console in consoles:
        await put(console, whole(RAW))
        assert "closed" in str(console.broken)


async def test_no_stream_at_all(threads: ThreadPoolExecutor) -> None:
    """`sys.stdout` is None where there is no console (pythonw, some daemons)."""
    console = Console(None, threads)
    await put(console, whole(RAW))
    assert console.broken is not None


async def test_an_object_that_raises(threads: ThreadPoolExecutor) -> None:
    class Broken:
        def write(self, text: str) -> None:
            raise RuntimeError("no")

    stream: Any = Broken()
    console = Console(stream, threads)
    await put(console, whole(RAW), whole(RAW))
    assert repr(console.broken) == "RuntimeError('no')"


# --- nobody waits in the loop ------------------------------------------------------------------


async def test_a_full_pipe_does_not_hold_up_the_loop(
    pipe: Pipe, threads: ThreadPoolExecutor
) -> None:
    console = Console(pipe.stream, threads)
    # Small pieces, each of which would go without a thread if there were room.
    pieces = [b"%05d %s\n" % (i, b"x" * 4000) for i in range(100)]
    writing = asyncio.create_task(put(console, *map(whole, pieces)))
    await go_round(1000)
    assert not writing.done()
    print("the host's own", file=pipe.stream)
    await go_round(1000)
    assert not writing.done()
    found = await pipe.read(sum(map(len, pieces)) + 15)
    assert found.replace(b"the host's own\n", b"") == b"".join(pieces)
    await writing


async def test_a_full_pipe_behind_an_object_does_not_either(
    pipe: Pipe, threads: ThreadPoolExecutor
) -> None:
    stream: Any = Copying(pipe.stream)
    writing = asyncio.create_task(put(Console(stream, threads), whole(BIG)))
    await go_round(1000)
    assert not writing.done()
    assert await pipe.read(len(BIG)) == BIG
    await writing


# --- one screen ---------------------------------------------------------------------------------


async def test_another_ones_line_begins_on_a_line_of_its_own(
    pipe: Pipe, threads: ThreadPoolExecutor
) -> None:
    console = Console(pipe.stream, threads)
    await put(console, begun(b"a?", b"[0]:a?"), owner=0)
    await put(console, whole(b"[1]:x\n"), owner=1)
    await put(
        console, Framed(b"!\n", b"[0]:a?!\n", (b"[0]:", b"b", b"\n"), unfinished=False), owner=0
    )
    # All but the newline is there, and whoever came next has supplied that.
    await put(console, begun(b"c", b"[0]:c"), owner=0)
    await put(console, begun(b"d", b"[1]:d"), owner=1)
    await put(console, Framed(b"\n", b"", (), unfinished=False), owner=0)
    await put(console, Framed(b"e\n", b"[1]:de\n", (), unfinished=False), owner=1)
    wanted = b"[0]:a?\n[1]:x\n[0]:a?!\n[0]:b\n[0]:c\n[1]:de\n"
    assert await pipe.read(len(wanted)) == wanted


async def test_two_streams_to_one_place_share_their_turn(
    pipe: Pipe, threads: ThreadPoolExecutor
) -> None:
    """`2>&1`: a line of stderr must not go into the middle of one of stdout."""
    consoles = Consoles(threads)
    with (
        os.fdopen(os.dup(pipe.writing), "w") as same,
        consoles.shared(pipe.stream) as out,
        consoles.shared(same) as err,
        consoles.shared(pipe.stream) as again,
    ):
        assert out is again
        assert out.turn is err.turn
        await put(out, begun(b"a?", b"[0]:a?"), owner=0)
        await put(err, whole(b"[0]:error\n"), owner=1)
        wanted = b"[0]:a?\n[0]:error\n"
        assert await pipe.read(len(wanted)) == wanted


async def test_two_streams_to_two_places_do_not(
    pipe: Pipe, tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    consoles = Consoles(threads)
    memory = io.StringIO()
    with (
        open(tmp_path / "out", "w") as file,
        consoles.shared(pipe.stream) as out,
        consoles.shared(file) as err,
        consoles.shared(memory) as third,
    ):
        assert len({id(console.turn) for console in (out, err, third)}) == 3
    with consoles.shared(pipe.stream) as later:
        assert later is not out


class Patient:
    """A stream that can make its writers wait."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, str]] = []

    def write(self, text: str) -> int:
        raise AssertionError("it can be waited for")

    async def awrite(self, text: str) -> None:
        await asyncio.sleep(0)
        self.taken.append(("loop", text))

    def write_as_is(self, parts: list[bytes]) -> bool:
        data = b"".join(parts)
        if data.isascii():
            self.taken.append(("as is", data.decode()))
        return data.isascii()

    def write_waiting(self, text: str) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.taken.append(("thread", text))


async def test_a_stream_that_can_be_waited_for_is(threads: ThreadPoolExecutor) -> None:
    stream = Patient()
    console = Console(stream, threads)  # type: ignore[arg-type]
    assert console.takes_streams
    assert not console.takes_lines
    await put(console, whole(RAW))
    async with console.turn:
        await console.write_all("w0", (whole(line) for line in (b"a\n", b"\xff\n")))
    assert stream.taken == [
        ("loop", "[w0]:\\xff\\xfe\0 \xe9\n"), ("as is", "a\n"), ("thread", "\\xff\n"),
    ]  # fmt: skip
