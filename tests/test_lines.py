"""Log lines as a stream: nothing lost, nobody held up, nothing left behind."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise import (
    DefaultLogsSpecs,
    LogLine,
    RunProcsResult,
    Std,
    run_services,
    start_processes,
    tailing,
)
from asupervise.elastic.decide import Policy
from asupervise.lines import LineReader, Source
from asupervise.tailing import Tailer
from asupervise.whole_lines import WholeLineFramer
from tests.conftest import new_files, open_files
from tests.workers import HELD, PYTHON, READY, SLEEP, Channel, settle, shell, start

CEILING_S = 40.0
ALL = DefaultLogsSpecs(redirects=Std.ALL)
Lines = AsyncGenerator[LogLine, None]

pytestmark = pytest.mark.usefixtures("own_temporary_folder")


def redirected(mask: Std = Std.ALL, log_dir: Path | None = None) -> DefaultLogsSpecs:
    return DefaultLogsSpecs(str(log_dir) if log_dir else None, redirects=mask)


async def texts(lines: Lines) -> list[str]:
    async with asyncio.timeout(CEILING_S):
        return [line.text async for line in lines]


# --- cutting: pure ------------------------------------------------------------------------------


def fed(data: bytes, cuts: list[int], max_held: int = 1 << 20) -> list[tuple[str, bool]]:
    """What comes out of a framer that is fed `data` in pieces, and when it ends."""
    framer = WholeLineFramer(max_held=max_held)
    found: list[tuple[str, bool]] = []
    ends = sorted({*(cut % (len(data) + 1) for cut in cuts), len(data)})
    for begin, end in zip([0, *ends], ends, strict=False):
        if (framed := framer.feed(data[begin:end])) is not None:
            found += framer.texts(framed)
    if (framed := framer.end()) is not None:
        found += framer.texts(framed)
    return found


FEW_BYTES = st.lists(st.sampled_from([b"a", b"\n", b"\xc3", b"\xa9", b"\xe2\x82\xac", b"\0"]))


@given(FEW_BYTES.map(b"".join), st.lists(st.integers(0, 100)))
def test_however_it_is_cut_the_lines_are_those_of_the_file(data: bytes, cuts: list[int]) -> None:
    *lines, rest = data.decode(errors="backslashreplace").split("\n")
    wanted = [*lines, rest] if rest else lines
    assert fed(data, cuts) == [(line, False) for line in wanted]


@given(FEW_BYTES.map(b"".join), st.lists(st.integers(0, 100)), st.integers(1, 9))
def test_the_pieces_of_long_lines_are_the_lines(
    data: bytes, cuts: list[int], max_held: int
) -> None:
    lines, begun = [], ""
    for text, continues in fed(data, cuts, max_held):
        begun += text
        if not continues:
            lines.append(begun)
            begun = ""
    assert not begun
    *wanted, rest = data.decode(errors="backslashreplace").split("\n")
    assert lines == ([*wanted, rest] if rest else wanted)


def test_of_a_progress_bar_there_is_its_last_state() -> None:
    assert fed(b"1%\r50%\r100%\r\nend\r\n", [3, 5, 9]) == [("100%", False), ("end", False)]


def test_a_long_line_that_is_overwritten_is_ended_first() -> None:
    assert fed(b"abcdef\rgh\nij\n", [5, 6], max_held=4) == [
        ("abcde", True), ("", False), ("gh", False), ("ij", False),
    ]  # fmt: skip


def test_the_time_is_that_of_the_last_reading() -> None:
    times = iter([1.0, 2.0])
    framer = WholeLineFramer(clock=lambda: next(times))
    framer.feed(b"a")
    framer.feed(b"b")
    framer.end()
    assert framer.read_at == 2.0


# --- every line, whole, in order ----------------------------------------------------------------


async def test_all_lines_of_all_ranks_and_streams_in_order(tmp_path: Path) -> None:
    script = "for i in $(seq 500); do echo out $i; echo err $i >&2; done; printf end"
    async with start(None, script, script, script, logs_specs=redirected()) as ctx:
        async with asyncio.timeout(CEILING_S):
            lines = [line async for line in ctx.lines()]
        result = await ctx.wait()
    assert result is not None
    assert not result.is_failed()
    assert result.log_dir is None
    for rank in range(3):
        for stream, word, last in (("stdout", "out", ["end"]), ("stderr", "err", [])):
            found = [x for x in lines if x.local_rank == rank and x.stream == stream]
            assert [x.text for x in found] == [*(f"{word} {i}" for i in range(1, 501)), *last]
            times = [x.time for x in found]
            assert times == sorted(times)
            assert {(x.rank, x.continues) for x in found} == {(rank, False)}


async def test_what_was_written_before_is_there_too(channel: Channel) -> None:
    async with start(channel, "seq 1000; " + READY + HELD + "echo end", logs_specs=ALL) as ctx:
        await channel.pids(1)
        lines = ctx.lines(streams=Std.OUT)
        assert (await anext(lines)).text == "1"
        await channel.open_gate()
        assert await texts(lines) == [*map(str, range(2, 1001)), "end"]


async def test_a_line_comes_when_it_is_written(channel: Channel) -> None:
    async with (
        asyncio.timeout(CEILING_S),
        start(channel, *["echo a; " + SLEEP] * 2, logs_specs=ALL) as ctx,
        aclosing(ctx.lines()) as lines,
    ):
        assert {(await anext(lines)).local_rank for _ in range(2)} == {0, 1}


async def test_a_line_that_is_shown_in_part_is_delivered_whole(
    channel: Channel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The console shows a prompt before its line has an end; whoever wants lines waits for it."""
    monkeypatch.setattr(tailing, "IDLE_S", 0.001)
    shown = asyncio.Event()
    peek = tailing.LineFramer.peek

    def peeked(framer: tailing.LineFramer) -> Any:
        shown.set()
        return peek(framer)

    monkeypatch.setattr(tailing.LineFramer, "peek", peeked)
    logs = DefaultLogsSpecs(tee=Std.OUT)
    script = "printf 'name? '; " + READY + HELD + "echo joe"
    async with asyncio.timeout(CEILING_S), start(channel, script, logs_specs=logs) as ctx:
        lines = ctx.lines()
        first = asyncio.ensure_future(anext(lines))
        await channel.pids(1)
        await shown.wait()
        assert not first.done()
        await channel.open_gate()
        assert (await first).text == "name? joe"
        assert await texts(lines) == []
    assert capfd.readouterr().out == "[t0]:name? joe\n"


async def test_ranks_are_local_and_lines_tell_the_global_one() -> None:
    words = shell(None, ["echo a", "echo b", "echo c"], env={})
    for rank, given_rank in enumerate(("7", "nonsense", "9")):
        words["envs"][rank]["RANK"] = given_rank
    async with start_processes(**words, logs_specs=ALL) as ctx:
        lines = [line async for line in ctx.lines([2, 1])]
    assert sorted((x.rank, x.local_rank, x.text) for x in lines) == [(1, 1, "b"), (9, 2, "c")]


async def test_binary_output_and_lines_too_long_to_be_held() -> None:
    program = r"import sys; w = sys.stdout.buffer.write; w(b'\0\xff\xc3\xa9\n' + b'x' * 3000000)"
    words = shell(None, [program])
    words["entrypoint"] = PYTHON
    async with start_processes(**words, logs_specs=ALL) as ctx:
        first, *pieces = [line async for line in ctx.lines()]
    assert first.text == "\0\\xffé"
    assert "".join(line.text for line in pieces) == "x" * 3_000_000
    assert [line.continues for line in pieces] == [*[True] * (len(pieces) - 1), False]
    assert max(len(line.text) for line in pieces) < 1_500_000


async def test_the_lines_end_with_a_group_that_fails_or_is_closed(channel: Channel) -> None:
    async with start(None, "echo last words; exit 3", logs_specs=ALL) as ctx:
        assert await texts(ctx.lines()) == ["last words"]
    async with start(channel, "echo a; " + SLEEP, logs_specs=ALL) as ctx:
        await channel.pids(1)
        following = asyncio.ensure_future(texts(ctx.lines()))
        await settle()
        await ctx.close()
        assert await following == ["a"]


async def test_a_log_that_is_rotated_goes_on(channel: Channel, tmp_path: Path) -> None:
    script = "echo 1; " + READY + HELD + "echo 2"
    async with asyncio.timeout(CEILING_S), start(channel, script, logs_specs=ALL) as ctx:
        lines = ctx.lines(streams=Std.OUT)
        assert (await anext(lines)).text == "1"
        path = Path(ctx.stdouts[0])
        path.rename(path.with_suffix(".1"))
        path.write_text("by another\n")
        assert (await anext(lines)).text == "by another"
        await channel.open_gate()
        assert await texts(lines) == ["2"]


# --- nobody is held up --------------------------------------------------------------------------


async def test_a_consumer_that_does_not_read_holds_nobody_up() -> None:
    """Neither the worker nor the end of the group; it gets everything, in bounded memory."""
    before = open_files()
    async with asyncio.timeout(CEILING_S):
        async with start(None, "seq 1000000", logs_specs=ALL) as ctx:
            lines = ctx.lines(streams=Std.OUT)
            assert (await anext(lines)).text == "1"
            result = await ctx.wait()
        assert isinstance(result, RunProcsResult)
        assert result.log_dir is None
        assert not Path(ctx.stdouts[0]).exists()
        reader: LineReader = lines.ag_frame.f_locals["self"]
        [tailer] = reader._outlets
        # One block is being used, one waits, and so many more are read at the most.
        assert tailer.position <= 3 * tailing.BLOCK_BYTES
        number = 1
        async for line in lines:
            number += 1
            assert line.text == str(number)
    assert number == 1_000_000
    assert new_files(before) == {}


async def test_lines_that_nobody_has_asked_for_yet_are_not_lost() -> None:
    """The files are open from the call on, also where their folder is removed."""
    async with start(None, "echo a", logs_specs=ALL) as ctx:
        lines = ctx.lines()
        assert (await ctx.wait()).log_dir is None
    assert await texts(lines) == ["a"]


async def test_several_consumers_each_get_all() -> None:
    async with start(None, "seq 20000", "seq 20000", logs_specs=ALL) as ctx:
        slow, all_lines, of_one = ctx.lines(), ctx.lines(), ctx.lines([1])
        assert (await anext(slow)).text == "1"
        quick, one = await asyncio.gather(texts(all_lines), texts(of_one))
        assert len(quick) == 40_000
        assert one == [str(number) for number in range(1, 20_001)]
        assert len(await texts(slow)) == 39_999


async def test_other_tasks_have_their_turn(tmp_path: Path) -> None:
    """All of it is there, and can be read without waiting for anything."""
    log = tmp_path / "log"
    log.write_text("".join(f"{number}\n" for number in range(100_000)))
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    ended.set_result(None)
    delivered = 0

    async def consume() -> None:
        nonlocal delivered
        async for _ in LineReader([Source(str(log), 0, 0, "stdout")]).lines(ended):
            delivered += 1

    consuming = asyncio.ensure_future(consume())
    at_once = before = 0
    while not consuming.done():
        await asyncio.sleep(0)
        at_once, before = max(at_once, delivered - before), delivered
    assert delivered == 100_000
    assert at_once < 1000


async def test_the_last_file_to_fail_ends_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the group has ended, so that nobody is left whose end would tell."""
    failed = asyncio.Event()

    async def failing(tailer: Tailer, unread: int) -> bytes:
        failed.set()
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(Tailer, "_read", failing)
    logs = redirected(Std.OUT)
    async with (
        asyncio.timeout(CEILING_S),
        start(None, "echo a; exec sleep 1000", logs_specs=logs) as ctx,
    ):
        following = asyncio.ensure_future(texts(ctx.lines()))
        await failed.wait()
        await ctx.close()
        with pytest.raises(OSError, match="broken"):
            await following


# --- nothing is left behind ---------------------------------------------------------------------


async def test_leaving_the_loop_early_leaves_nothing(channel: Channel) -> None:
    async with start(channel, *["seq 100000; " + SLEEP] * 2, logs_specs=ALL) as ctx:
        await channel.pids(2)
        before, tasks = open_files(), asyncio.all_tasks()
        async with aclosing(ctx.lines()) as lines:
            async for _ in lines:
                break
            assert new_files(before)
        assert new_files(before) == {}
        assert asyncio.all_tasks() == tasks
        # Without `aclosing`: by asyncio's own way with generators that nobody refers to any more.
        async for _ in ctx.lines():
            break
        async with asyncio.timeout(CEILING_S):
            while left := asyncio.all_tasks() - tasks:
                await asyncio.wait(left)
        assert new_files(before) == {}


async def test_an_iterator_that_was_never_used_leaves_nothing(channel: Channel) -> None:
    async with start(channel, SLEEP, logs_specs=ALL) as ctx:
        await channel.pids(1)
        before = open_files()
        lines = ctx.lines()
        assert len(new_files(before)) == 2
        await lines.aclose()
        del lines
        gc.collect()
        assert new_files(before) == {}


@pytest.mark.parametrize("turns", [1, 2, 3, 5, 100])
async def test_a_cancelled_consumer_leaves_nothing(channel: Channel, turns: int) -> None:
    """However far it has come: while files are opened, watched, read."""
    async with start(channel, *["echo a; " + SLEEP] * 20, logs_specs=ALL) as ctx:
        await channel.pids(20)
        before = open_files()
        task = asyncio.ensure_future(texts(ctx.lines()))
        for _ in range(turns):
            await asyncio.sleep(0)
        assert new_files(before)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert new_files(before) == {}
        assert ctx.pids()


# --- what cannot be had -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "ranks", "streams", "message"),
    [
        (Std.ALL, [0, 5], Std.ALL, r"ranks: no local ranks \[5\]: expected 0..1"),
        (Std.ALL, [0], Std.NONE, r"streams: .*: expected Std.OUT, Std.ERR or Std.ALL"),
        (Std.NONE, None, Std.ALL, r"the output of local ranks \[0, 1\] does not go to a file"),
        (Std.OUT, None, Std.ERR, r"the stderr of local ranks \[0, 1\] does not go to a file"),
        ({0: Std.OUT}, [0, 1], Std.ALL, r"the output of local ranks \[1\] does not go to a file"),
        ({0: Std.OUT}, None, Std.OUT, r"the stdout of local ranks \[1\] does not go to a file"),
        (Std.ALL, [], Std.ALL, r"ranks: no local rank is given"),
    ],
)
async def test_what_does_not_go_to_a_file_is_refused(
    mask: Any, ranks: Any, streams: Std, message: str, channel: Channel
) -> None:
    async with start(channel, SLEEP, SLEEP, logs_specs=redirected(mask)) as ctx:
        await channel.pids(2)
        with pytest.raises(ValueError, match=message):
            ctx.lines(ranks, streams)


async def test_without_a_wish_there_is_all_that_goes_to_files(channel: Channel) -> None:
    script = "echo $RANK; echo oops >&2"
    async with start(None, script, script, logs_specs=redirected({1: Std.OUT})) as ctx:  # type: ignore[arg-type]
        assert await texts(ctx.lines()) == ["1"]


async def test_what_goes_to_dev_null_has_no_lines() -> None:
    logs = DefaultLogsSpecs(os.devnull, redirects=Std.ALL)
    async with start(None, "echo a", logs_specs=logs) as ctx:
        with pytest.raises(ValueError, match="does not go to a file"):
            ctx.lines()


async def test_files_that_are_gone_are_named(tmp_path: Path, channel: Channel) -> None:
    async with start(None, "echo a", logs_specs=ALL) as ctx:
        await ctx.wait()
        with pytest.raises(FileNotFoundError, match="stdout of local rank 0: its file is gone"):
            ctx.lines()
    before = open_files()
    async with start(channel, *[SLEEP] * 2, logs_specs=redirected(log_dir=tmp_path)) as ctx:
        await channel.pids(2)
        Path(ctx.stderrs[1]).unlink()
        os.mkfifo(ctx.stderrs[1])
        with pytest.raises(OSError, match="stderr of local rank 1: not a regular file"):
            ctx.lines()
        gc.collect()
        assert all("log" not in name for name in new_files(before).values())


async def test_a_disk_that_fails_ends_the_lines_with_its_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read = Tailer._read

    async def failing(tailer: Tailer, unread: int) -> bytes:
        if tailer.path.endswith("0/stdout.log"):
            raise OSError(errno.EIO, "broken")
        return await read(tailer, unread)

    monkeypatch.setattr(Tailer, "_read", failing)
    found: list[str] = []

    async def collect(lines: Lines) -> None:
        async for line in lines:
            found.append(line.text)

    async with start(None, *["echo $RANK"] * 3, logs_specs=redirected(log_dir=tmp_path)) as ctx:
        with pytest.raises(OSError, match="broken"):
            await collect(ctx.lines())
        assert not (await ctx.wait()).is_failed()
    assert sorted(found) == ["1", "2"]


# --- services -----------------------------------------------------------------------------------


async def test_the_lines_of_a_service_are_those_of_all_its_starts(channel: Channel) -> None:
    count = "$TORCHELASTIC_RESTART_COUNT"
    script = f"echo $RANK start {count}; {READY} exec sleep 1000"
    policy = Policy(backoff_s=0.0, min_uptime_s=0.0)
    words = shell(channel, [script, script])
    async with (
        asyncio.timeout(CEILING_S),
        run_services(**words, logs_specs=ALL, policy=policy, max_restarts=9) as services,
    ):
        await channel.pids(2)
        before = open_files()
        following = asyncio.ensure_future(texts(services.lines([1])))
        never_used = services.lines()
        for _ in range(2):
            os.kill(services.pids()[1], signal.SIGKILL)
            await channel.pids(1)
        with pytest.raises(ValueError, match="no local ranks"):
            services.lines([2])
        await never_used.aclose()
        del never_used
        await services.close()
        assert await following == ["1 start 0", "1 start 1", "1 start 2"]
        gc.collect()
        assert all("log" not in name for name in new_files(before).values())
