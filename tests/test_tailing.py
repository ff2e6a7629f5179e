"""Following files: what may happen to them, who is woken, and where the kernel does not help."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from asupervise import growing, tailing, watches
from asupervise.framing import Framed, LineFramer
from asupervise.tailing import Tailer
from asupervise.watches import InotifyWatches, PollWatches, Watches

CEILING_S = 30.0
PREFIX = b"[w0]:"


class Recorder:
    """Stands for a console: keeps what it is given, and tells who waits for it."""

    # Whether it takes some lines at once, as an empty pipe does, while it admits anything.
    at_once = True
    keeps_together = True

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.blocks = asyncio.Semaphore(4)
        self.broken: Exception | None = None
        self.data = b""
        # True: much at once is written in a thread, as to a descriptor.
        self.takes_streams = False
        self._unfinished_by: object = None
        self._written = asyncio.Event()
        self.admit = asyncio.Event()
        self.admit.set()

    @property
    def takes_lines(self) -> bool:
        return self.at_once and self.broken is None and not self.turn.locked()

    def write_lines(self, owner: object, framed: Framed) -> bool:
        assert not self.turn.locked()
        if self.admit.is_set():
            self._add(owner, framed)
        return self.admit.is_set()

    async def write_all(self, owner: object, framings: Iterator[Framed]) -> None:
        assert self.turn.locked()
        await self.admit.wait()
        for framed in await asyncio.to_thread(list, framings):
            self._add(owner, framed)

    async def write(self, owner: object, framed: Framed) -> None:
        assert self.turn.locked()
        await self.admit.wait()
        self._add(owner, framed)

    def _add(self, owner: object, framed: Framed) -> None:
        resumes = self._unfinished_by is owner
        if self._unfinished_by is not None and not resumes:
            self.data += b"\n"
        self._unfinished_by = owner if framed.unfinished else None
        self.data += (framed.resumed if resumes else framed.fresh) + b"".join(framed.rest)
        self._written.set()

    async def until(self, holds: Callable[[bytes], bool]) -> None:
        async with asyncio.timeout(CEILING_S):
            while not holds(self.data):
                self._written.clear()
                await self._written.wait()

    async def until_shown(self, text: bytes) -> None:
        await self.until(lambda data: text in data)


class Following:
    """Tailers of one file and of those that take its place, as a group's streams have them."""

    def __init__(self, console: Recorder, watches: Watches, threads: ThreadPoolExecutor) -> None:
        self.console = console
        self.threads = threads
        self.watches = watches
        self.tailers: list[Tailer] = []
        self.tasks: dict[Tailer, asyncio.Task[None]] = {}
        self.started = asyncio.Event()
        self.sideline: Any = None
        self.max_held = 1 << 20

    def follow(self, path: Path, *, prefix: bytes = PREFIX, prompts: bool = False) -> Tailer:
        tailer = Tailer(
            str(path),
            LineFramer(prefix, max_held=self.max_held),
            self.console,  # type: ignore[arg-type]
            self.watches,
            self.threads,
            start=self._start,
            on_replaced=lambda old: self._replaced(old, prefix),
            sideline=self.sideline,
            prompts=prompts,
        )
        self.tailers.append(tailer)
        tailer.follow()
        return tailer

    def _start(self, tailer: Tailer) -> None:
        assert tailer not in self.tasks, "started twice"
        self.tasks[tailer] = asyncio.ensure_future(tailer.run())
        self.started.set()

    def _replaced(self, old: Tailer, prefix: bytes) -> bool:
        try:
            self.follow(Path(old.path), prefix=prefix)
        except OSError:
            return False
        return True

    async def finish(self) -> bytes:
        for tailer in self.tailers:
            tailer.stop()
        async with asyncio.timeout(CEILING_S):
            await asyncio.gather(*self.tasks.values())
        return self.console.data


@asynccontextmanager
async def following() -> AsyncIterator[Following]:
    watches = Watches(asyncio.get_running_loop())
    with ThreadPoolExecutor(2) as threads:
        files = Following(Recorder(), watches, threads)
        try:
            yield files
        finally:
            for task in files.tasks.values():
                task.cancel()
            await asyncio.gather(*files.tasks.values(), return_exceptions=True)
            for tailer in files.tailers:
                tailer.close()
            await watches.close(threads)


def refuse(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, "no more watches")


@pytest.fixture(params=["inotify", "inotify, nothing at once", "no inotify", "no watches"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """However we learn of a change, we learn of it."""
    if request.param == "inotify, nothing at once":
        monkeypatch.setattr(Recorder, "at_once", False)
    elif request.param == "no inotify":
        monkeypatch.setattr(InotifyWatches, "__init__", refuse)
    elif request.param == "no watches":
        monkeypatch.setattr(InotifyWatches, "_add", refuse)
    return str(request.param)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log file that is there and empty."""
    path = tmp_path / "stdout.log"
    path.touch()
    return path


def append(path: Path, data: bytes) -> None:
    with open(path, "ab", buffering=0) as file:
        file.write(data)


@contextmanager
def worker(path: Path) -> Iterator[Callable[[bytes], object]]:
    """Writes as a worker does: with one descriptor from its start to its end, appending."""
    with open(path, "ab", buffering=0) as file:
        yield file.write


# --- from the beginning to the end --------------------------------------------------------------


async def test_lines_are_shown_as_they_come(log: Path, way: str) -> None:
    async with following() as files:
        files.follow(log)
        with worker(log) as write:
            for number in range(20):
                write(b"line %d\n" % number)
                await files.console.until_shown(b"line %d\n" % number)
        assert await files.finish() == b"".join(b"[w0]:line %d\n" % i for i in range(20))


async def test_what_was_there_before_is_shown(log: Path, way: str) -> None:
    append(log, b"early\nand late")
    async with following() as files:
        files.follow(log)
        await files.console.until_shown(b"early\n")
        assert await files.finish() == b"[w0]:early\n[w0]:and late\n"


@pytest.mark.parametrize("much_at_once", [False, True])
async def test_stop_reads_to_the_end(log: Path, way: str, much_at_once: bool) -> None:
    async with following() as files:
        files.console.takes_streams = much_at_once
        files.follow(log)
        lines = [b"%06d\n" % number for number in range(200_000)]
        append(log, b"".join(lines))
        # At once, in the same turn of the loop: nobody has read anything yet.
        assert await files.finish() == PREFIX + PREFIX.join(lines)


async def test_stop_reads_what_was_there_then(log: Path) -> None:
    """A grandchild that writes without end must not keep the group from ending."""
    async with following() as files:
        files.follow(log)
        append(log, b"early\n")
        await files.console.until_shown(b"early\n")
        files.tailers[0].stop()
        append(log, b"late\n")
        assert await files.finish() == b"[w0]:early\n"


async def test_a_silent_file_costs_no_task_and_no_thread(log: Path, way: str) -> None:
    before = threading.active_count()
    async with following() as files:
        files.follow(log)
        os.utime(log)
        assert await files.finish() == b""
        assert files.tasks == {}
        assert threading.active_count() <= before


async def test_a_closed_tailer_holds_nothing(log: Path, way: str) -> None:
    async with following() as files:
        tailer = files.follow(log)
        append(log, b"x\n")
        await files.console.until_shown(b"x\n")
        await files.finish()
        tailer.close()
        tailer.stop()
        append(log, b"y\n")
        assert files.console.data == b"[w0]:x\n"
        inotify = files.watches._inotify
        if inotify is not None:
            assert inotify._waiting == {}
            # The kernel says so, in an event.
            async with asyncio.timeout(CEILING_S):
                while list(inotify._inotify.watches):
                    await asyncio.sleep(0)


async def test_a_file_on_a_file_system_that_cannot_say(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then every read goes through a thread."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "preadv", refuse)
    async with following() as files:
        files.follow(log)
        for number in range(3):
            append(log, b"%d\n" % number)
            await files.console.until_shown(b"%d\n" % number)
        assert await files.finish() == b"[w0]:0\n[w0]:1\n[w0]:2\n"


async def test_a_file_in_memory() -> None:
    folder = Path("/dev/shm")
    if not growing.is_memory(folder.stat().st_dev):
        pytest.skip("/dev/shm is no tmpfs here")
    log = folder / f"asupervise-test-{os.getpid()}"
    log.touch()
    try:
        async with following() as files:
            files.follow(log)
            for number in range(3):
                append(log, b"%d\n" % number)
                await files.console.until_shown(b"%d\n" % number)
            assert await files.finish() == b"[w0]:0\n[w0]:1\n[w0]:2\n"
    finally:
        log.unlink()


# --- what may happen to a file ------------------------------------------------------------------


async def test_truncated(log: Path, way: str) -> None:
    async with following() as files:
        files.follow(log)
        with worker(log) as write:
            write(b"before, and an unfinished")
            write(b" line\nwith more")
            await files.console.until_shown(b"line\n")
            # `: > stdout.log`
            os.truncate(log, 0)
            await files.console.until_shown(b"with more\n")
            write(b"after\n")
            await files.console.until_shown(b"after\n")
            os.truncate(log, 0)
            write(b"x\n")
            await files.console.until_shown(b"x\n")
        assert await files.finish() == (
            b"[w0]:before, and an unfinished line\n[w0]:with more\n[w0]:after\n[w0]:x\n"
        )


async def test_replaced_by_rename(log: Path, way: str) -> None:
    async with following() as files:
        files.follow(log)
        append(log, b"old\n")
        await files.console.until_shown(b"old\n")
        new = log.with_suffix(".new")
        new.write_bytes(b"new\n")
        new.rename(log)
        await files.console.until_shown(b"new\n")
        append(log, b"more\n")
        await files.console.until_shown(b"more\n")
        assert await files.finish() == b"[w0]:old\n[w0]:new\n[w0]:more\n"


async def test_moved_away_and_still_written(log: Path, way: str) -> None:
    """What a worker does whose log is rotated: its descriptor goes with the file."""
    async with following() as files:
        files.follow(log)
        with worker(log) as write:
            write(b"old\n")
            await files.console.until_shown(b"old\n")
            log.rename(log.with_suffix(".1"))
            write(b"moved\n")
            await files.console.until_shown(b"moved\n")
            # And one that opens its log anew.
            log.write_bytes(b"new\n")
            await files.console.until_shown(b"new\n")
            write(b"still the old one\n")
            await files.console.until_shown(b"still the old one\n")
            append(log, b"and the new one\n")
            await files.console.until_shown(b"and the new one\n")
        data = await files.finish()
        assert sorted(data.splitlines()) == sorted(
            PREFIX + line
            for line in (b"old", b"moved", b"new", b"still the old one", b"and the new one")
        )


async def test_deleted_and_still_written(log: Path, way: str) -> None:
    async with following() as files:
        files.follow(log)
        with worker(log) as write:
            write(b"old\n")
            await files.console.until_shown(b"old\n")
            log.unlink()
            write(b"still there\n")
            await files.console.until_shown(b"still there\n")
            write(b"to the end")
        assert await files.finish() == b"[w0]:old\n[w0]:still there\n[w0]:to the end\n"


async def test_deleted_with_its_folder(tmp_path: Path, way: str) -> None:
    folder = tmp_path / "0"
    folder.mkdir()
    log = folder / "stdout.log"
    log.touch()
    async with following() as files:
        files.follow(log)
        with worker(log) as write:
            write(b"old\n")
            await files.console.until_shown(b"old\n")
            log.unlink()
            folder.rmdir()
            write(b"still there\n")
            await files.console.until_shown(b"still there\n")
        assert await files.finish() == b"[w0]:old\n[w0]:still there\n"


async def test_replaced_by_what_is_no_file(log: Path, way: str) -> None:
    async with following() as files:
        files.follow(log)
        with worker(log) as write:
            write(b"old\n")
            await files.console.until_shown(b"old\n")
            log.unlink()
            os.mkfifo(log)
            write(b"still there\n")
            await files.console.until_shown(b"still there\n")
        assert await files.finish() == b"[w0]:old\n[w0]:still there\n"
        assert len(files.tailers) == 1


async def test_two_follow_one_file(log: Path, way: str) -> None:
    async with following() as files:
        files.follow(log)
        files.follow(log, prefix=b"[w1]:")
        for number in range(3):
            append(log, b"%d\n" % number)
            await files.console.until(
                lambda data, n=number: data.count(b"%d\n" % n) == 2  # type: ignore[misc]
            )
        files.tailers[0].stop()
        append(log, b"last\n")
        await files.console.until_shown(b"[w1]:last\n")
        await files.finish()
    assert b"[w0]:last\n" not in files.console.data


# --- unfinished lines ---------------------------------------------------------------------------


async def test_a_prompt_appears(log: Path, way: str) -> None:
    async with following() as files:
        files.follow(log)
        append(log, b"name? ")
        await files.console.until_shown(b"[w0]:name? ")
        append(log, b"Ada\n")
        await files.console.until_shown(b"Ada\n")
        assert await files.finish() == b"[w0]:name? Ada\n"


async def test_a_prompt_that_somebody_waits_for_appears_sooner(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tailing, "IDLE_S", 0.5)
    other = tmp_path / "other.log"
    other.touch()
    async with following() as files:
        files.follow(other, prefix=b"[w1]:")
        files.follow(log, prompts=True)
        append(other, b"later? ")
        append(log, b"sooner? ")
        await files.console.until_shown(b"later? ")
        assert await files.finish() == b"[w0]:sooner? \n[w1]:later? \n"


async def test_a_line_in_pieces_is_shown_once(log: Path) -> None:
    """Pieces that keep coming are not silence: nothing is shown before the line's end."""
    async with following() as files:
        files.follow(log)
        for piece in (b"hel", b"lo", b" wor"):
            append(log, piece)
            await asyncio.sleep(0)
        append(log, b"ld\n")
        await files.console.until_shown(b"world\n")
        assert await files.finish() == b"[w0]:hello world\n"


async def test_a_prompt_interrupted_by_another_rank_comes_whole(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tailing, "IDLE_S", 0.01)
    other = tmp_path / "other.log"
    other.touch()
    async with following() as files:
        files.follow(log)
        files.follow(other, prefix=b"[w1]:")
        append(log, b"name? ")
        await files.console.until_shown(b"name? ")
        append(other, b"hello\n")
        await files.console.until_shown(b"hello\n")
        append(log, b"Ada\n")
        await files.console.until_shown(b"Ada\n")
        assert await files.finish() == b"[w0]:name? \n[w1]:hello\n[w0]:name? Ada\n"


async def test_a_progress_bar_that_moves_is_shown_seldom(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tailing, "IDLE_S", CEILING_S)
    monkeypatch.setattr(tailing, "PROGRESS_S", 0.05)
    async with following() as files:
        files.follow(log)
        percent = 0
        with worker(log) as write:
            while files.console.data.count(b"%") < 3:
                percent += 1
                write(b"\r%d%%" % percent)
                await asyncio.sleep(0)
            write(b"\rdone\n")
        data = await files.finish()
        assert data.endswith(b"[w0]:done\n")
        assert data.count(b"[w0]:") == data.count(b"\n") == 4
        assert percent > 4


async def test_a_progress_bar_that_has_stopped_is_shown(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tailing, "IDLE_S", 0.05)
    monkeypatch.setattr(tailing, "PROGRESS_S", CEILING_S)
    async with following() as files:
        files.follow(log)
        append(log, b"\r1%\r2%")
        await files.console.until_shown(b"[w0]:2%")
        append(log, b"\r3%")
        await files.finish()
        assert files.console.data == b"[w0]:2%\n[w0]:3%\n"


@pytest.mark.parametrize("much_at_once", [False, True])
async def test_a_long_line_is_not_cut_into(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, much_at_once: bool
) -> None:
    # However slow the machine is, these pieces come soon enough.
    monkeypatch.setattr(tailing, "IDLE_S", CEILING_S)
    monkeypatch.setattr(tailing, "BLOCK_BYTES", 1000)
    other = tmp_path / "other.log"
    other.touch()
    async with following() as files:
        files.console.takes_streams = much_at_once
        files.max_held = 1000
        files.follow(log)
        files.follow(other, prefix=b"[w1]:")
        pieces = [b"%d" % (piece % 10) * 1600 for piece in range(20)]
        size = 0
        with worker(log) as write:
            for piece in pieces:
                write(piece)
                append(other, b"x\n")
                size += len(piece)
                await files.console.until(lambda data, due=size - 1000: len(data) >= due)  # type: ignore[misc]
            write(b"end\n")
            await files.console.until_shown(b"end\n")
        data = await files.finish()
        assert PREFIX + b"".join(pieces) + b"end\n" in data
        assert data.count(b"[w1]:x\n") == 20


async def test_a_long_line_that_drips_does_not_keep_the_console(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tailing, "IDLE_S", 0.05)
    other = tmp_path / "other.log"
    other.touch()
    dripping = True

    async def drip() -> None:
        with worker(log) as write:
            write(b"a" * 2000)
            while dripping:
                write(b".")
                await asyncio.sleep(0.001)

    async with following() as files:
        files.max_held = 1000
        files.follow(log)
        files.follow(other, prefix=b"[w1]:")
        task = asyncio.create_task(drip())
        await files.console.until_shown(b"aaa")
        append(other, b"let me through\n")
        await files.console.until_shown(b"[w1]:let me through\n")
        dripping = False
        await task
        await files.finish()


TRACEBACK = (
    b"Traceback (most recent call last):\n",
    b'  File "train.py", line 1, in <module>\n',
    b"    main()\n",
    b"ValueError: 3\n",
)


@pytest.mark.parametrize("before", [b"", b"x" * 99 + b"\n"], ids=["alone", "after much"])
@pytest.mark.parametrize("much_at_once", [False, True])
async def test_a_traceback_is_not_cut_into(
    log: Path,
    tmp_path: Path,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    before: bytes,
    much_at_once: bool,
) -> None:
    monkeypatch.setattr(tailing, "NEXT_LINE_S", CEILING_S)
    monkeypatch.setattr(tailing, "_TRACEBACK_S", CEILING_S)
    monkeypatch.setattr(tailing, "BLOCK_BYTES", 4000)
    other = tmp_path / "other.log"
    other.touch()
    shown = before + b"".join(TRACEBACK)
    first, *rest = TRACEBACK
    append(log, 50 * before + first)
    async with following() as files:
        files.console.takes_streams = much_at_once
        files.follow(log)
        waiting = files.follow(other, prefix=b"[w1]:")
        for line in rest:
            await files.console.until_shown(PREFIX + shown[: shown.index(line)].split(b"\n")[-2])
            append(other, b"x\n")
            # It has been read, and waits for its turn.
            while not waiting.position:
                await asyncio.sleep(0)
            append(log, line)
        data = await files.finish()
    assert b"".join(PREFIX + line for line in TRACEBACK) in data
    assert data.count(b"[w1]:x\n") == 3


async def test_those_that_go_together_are_not_parted(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tailing, "_NEXT_TRACEBACK_S", CEILING_S)
    monkeypatch.setattr(tailing, "_TRACEBACK_S", CEILING_S)
    other = tmp_path / "other.log"
    other.touch()
    chain = (b"\n", b"During handling of the above exception, another exception occurred:\n", b"\n")
    async with following() as files:
        files.follow(log)
        waiting = files.follow(other, prefix=b"[w1]:")
        append(log, b"".join(TRACEBACK))
        await files.console.until_shown(b"ValueError: 3\n")
        append(other, b"x\n")
        while not waiting.position:
            await asyncio.sleep(0)
        for line in (*chain, *TRACEBACK, b"and on\n"):
            append(log, line)
        data = await files.finish()
    whole = (*TRACEBACK, *chain, *TRACEBACK)
    assert b"".join(PREFIX + line for line in whole) in data
    assert b"[w1]:x\n" in data


@pytest.mark.parametrize("ends", [False, True])
async def test_a_traceback_that_does_not_go_on_does_not_keep_the_console(
    log: Path, tmp_path: Path, ends: bool
) -> None:
    other = tmp_path / "other.log"
    other.touch()
    async with following() as files:
        files.follow(log)
        files.follow(other, prefix=b"[w1]:")
        append(log, b"".join(TRACEBACK if ends else TRACEBACK[:2]))
        await files.console.until_shown(b"[w0]:  File")
        append(other, b"let me through\n")
        await files.console.until_shown(b"[w1]:let me through\n")
        await files.finish()


async def test_a_traceback_without_an_end_does_not_keep_the_console(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tailing, "_TRACEBACK_S", 0.05)
    other = tmp_path / "other.log"
    other.touch()
    going_on = True

    async def go_on() -> None:
        with worker(log) as write:
            write(TRACEBACK[0])
            while going_on:
                write(TRACEBACK[1])
                await asyncio.sleep(0)

    async with following() as files:
        files.follow(log)
        files.follow(other, prefix=b"[w1]:")
        task = asyncio.create_task(go_on())
        await files.console.until_shown(b"[w0]:  File")
        append(other, b"let me through\n")
        await files.console.until_shown(b"[w1]:let me through\n")
        going_on = False
        await task
        await files.finish()


async def test_the_end_waits_for_no_traceback(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tailing, "NEXT_LINE_S", 10 * CEILING_S)
    monkeypatch.setattr(tailing, "_TRACEBACK_S", 10 * CEILING_S)
    async with following() as files:
        files.follow(log)
        append(log, TRACEBACK[0])
        await files.console.until_shown(TRACEBACK[0])
        assert await files.finish() == PREFIX + TRACEBACK[0]


# --- a consumer that is slow --------------------------------------------------------------------


async def test_a_slow_console_holds_few_blocks(tmp_path: Path) -> None:
    """The file on the disk is the buffer, however many files there are."""
    logs = [tmp_path / f"{number}.log" for number in range(16)]
    line = b"x" * 99 + b"\n"
    for log in logs:
        log.write_bytes(line * 20_000)
    async with following() as files:
        files.console.admit.clear()
        for log in logs:
            files.follow(log)
        async with asyncio.timeout(CEILING_S):
            while not files.console.blocks.locked():
                await asyncio.sleep(0)
        assert sum(tailer.position > 0 for tailer in files.tailers) <= 4
        files.console.admit.set()
        assert await files.finish() == (PREFIX + line) * 20_000 * 16


async def test_what_the_console_did_not_take_at_once_is_not_lost(log: Path) -> None:
    async with following() as files:
        files.follow(log)
        files.console.admit.clear()
        with worker(log) as write:
            write(b"a\n")
            async with asyncio.timeout(CEILING_S):
                await files.started.wait()
            write(b"b\n")
            files.console.admit.set()
            await files.console.until_shown(b"b\n")
        assert await files.finish() == b"[w0]:a\n[w0]:b\n"


async def test_whole_lines_end_what_was_begun(log: Path, way: str) -> None:
    async with following() as files:
        files.follow(log, prompts=True)
        with worker(log) as write:
            for number in range(3):
                write(b"name? ")
                await files.console.until(lambda data, n=number: data.count(b"name? ") > n)
                write(b"x\nyes\n")
                await files.console.until(lambda data, n=number: data.count(b"yes\n") > n)
                write(b"no\n")
                await files.console.until(lambda data, n=number: data.count(b"no\n") > n)
        expected = b"[w0]:name? x\n[w0]:yes\n[w0]:no\n" * 3
        assert await files.finish() == expected


async def test_nobody_reads_for_a_console_that_is_gone(log: Path) -> None:
    async with following() as files:
        files.follow(log)
        append(log, b"x\n")
        await files.console.until_shown(b"x\n")
        files.console.broken = BrokenPipeError()
        append(log, b"y\n")
        async with asyncio.timeout(CEILING_S):
            await asyncio.gather(*files.tasks.values())


@pytest.mark.parametrize("much_at_once", [False, True])
async def test_a_sideline_gets_every_byte(log: Path, much_at_once: bool) -> None:
    class Sideline:
        def __init__(self) -> None:
            self.data = b""
            self.ends: list[int | None] = []

        def feed(self, data: bytes, fd: int) -> Callable[[], None]:
            def work() -> None:
                os.fstat(fd)
                self.data += data

            return work

        def end(self, fd: int | None) -> None:
            self.ends.append(fd)

    async with following() as files:
        files.console.takes_streams = much_at_once
        files.sideline = Sideline()
        files.max_held = 100
        files.follow(log)
        written = b"a" * 1_000_000 + b"\n" + b"b\n" * 10
        append(log, written)
        await files.console.until_shown(b"b\n")
        os.truncate(log, 0)
        append(log, b"c\n")
        await files.console.until_shown(b"c\n")
        await files.finish()
        assert files.sideline.data == written + b"c\n"
        # What was in the file before it was truncated is not to be had from it any more.
        assert [fd is None for fd in files.sideline.ends] == [True, False]


# --- the watches --------------------------------------------------------------------------------


class Waiter:
    """Somebody who waits for a file: counts his wakings."""

    def __init__(self, path: Path, *, goes_on: bool = True) -> None:
        self.file = open(path, "rb")  # noqa: SIM115 - closed by `Waiter.close`
        self.fd = self.file.fileno()
        self.path = str(path)
        self.wakings = 0
        self.woken = asyncio.Event()
        self.goes_on = goes_on

    def changed(self, *, only_written: bool = False) -> bool:
        self.wakings += 1
        self.woken.set()
        return self.goes_on

    async def wait(self) -> None:
        async with asyncio.timeout(CEILING_S):
            await self.woken.wait()
        self.woken.clear()

    def close(self) -> None:
        self.file.close()


@pytest.fixture
async def inotify() -> AsyncIterator[InotifyWatches]:
    watches = InotifyWatches(asyncio.get_running_loop())
    yield watches
    with ThreadPoolExecutor(1) as threads:
        await watches.close(threads)


@pytest.fixture
async def waiter(log: Path) -> AsyncIterator[Waiter]:
    waiter = Waiter(log)
    yield waiter
    waiter.close()


async def test_a_watch_lasts_while_somebody_waits(
    inotify: InotifyWatches, waiter: Waiter, log: Path
) -> None:
    inotify.arm(waiter)
    for _ in range(3):
        append(log, b"x")
        await waiter.wait()
        inotify.arm(waiter)
    assert len(list(inotify._inotify.watches)) == 1


async def test_a_busy_tailer_hears_no_more(
    inotify: InotifyWatches, waiter: Waiter, log: Path
) -> None:
    waiter.goes_on = False
    inotify.arm(waiter)
    append(log, b"x")
    await waiter.wait()
    assert inotify._waiting == {}
    for _ in range(1000):
        append(log, b"x")
    waiter.goes_on = True
    inotify.arm(waiter)
    append(log, b"x")
    await waiter.wait()
    # The one for the write after it was armed, and none for the thousand before.
    assert waiter.wakings == 2
    # Neither we nor the library keep those that have ended.
    assert len(inotify._waiting) == len(list(inotify._inotify.watches)) == 1


async def test_dropped_events_wake_everybody(
    inotify: InotifyWatches, waiter: Waiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    inotify.arm(waiter)
    overflow = watches._EVENT.pack(-1, inotify._overflow, 0, 0)
    monkeypatch.setattr(os, "read", lambda *_: overflow)
    inotify._dispatch()
    monkeypatch.undo()
    assert waiter.wakings == 1


async def test_a_watch_that_the_kernel_ended_wakes_and_is_forgotten(
    inotify: InotifyWatches, waiter: Waiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its file system is unmounted: IN_IGNORED without our doing."""
    inotify.arm(waiter)
    (watch,) = inotify._waiting
    ended = watches._EVENT.pack(watch, inotify._ended, 0, 0)
    monkeypatch.setattr(os, "read", lambda *_: ended)
    inotify._dispatch()
    monkeypatch.undo()
    assert waiter.wakings == 1
    assert inotify._waiting == {}


async def test_two_in_one_folder_share_its_watch(
    inotify: InotifyWatches, tmp_path: Path, log: Path
) -> None:
    waiters = [Waiter(log), Waiter(log)]
    for waiter in waiters:
        inotify.arm_folder(waiter)
        inotify.arm_folder(waiter)
    (tmp_path / "with a name that is long enough to need some padding").touch()
    for waiter in waiters:
        await waiter.wait()
    inotify.forget(waiters[0])
    (tmp_path / "b").touch()
    await waiters[1].wait()
    inotify.forget(waiters[1])
    assert [waiter.wakings for waiter in waiters] == [1, 2]
    assert inotify._waiting == {}
    for waiter in waiters:
        waiter.close()


async def test_who_asks_after_all_were_let_go_of_is_woken(waiter: Waiter, log: Path) -> None:
    watches = Watches(asyncio.get_running_loop())
    with ThreadPoolExecutor(1) as threads:
        for _ in range(3):
            watches.arm(waiter)
            append(log, b"x")
            await waiter.wait()
            watches.release(threads)
        append(log, b"x")
        watches.arm(waiter)
        await watches.close(threads)
    assert waiter.wakings == 3


async def test_a_reader_of_events_never_waits(inotify: InotifyWatches) -> None:
    inotify._dispatch()


async def test_polling_runs_only_while_somebody_has_asked(waiter: Waiter) -> None:
    polling = PollWatches(asyncio.get_running_loop())
    try:
        assert polling._timer is None
        polling.arm(waiter)
        await waiter.wait()
        assert polling._timer is None
        polling.arm(waiter)
        polling.forget(waiter)
        other = Waiter(Path(waiter.path))
        polling.arm(other)
        await other.wait()
        other.close()
        assert waiter.wakings == 1
    finally:
        polling.close()
