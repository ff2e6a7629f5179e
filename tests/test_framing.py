"""Whatever the chunking: each line once, whole, in order, with one prefix."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TextIO

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asupervise import framing
from asupervise.console import Console
from asupervise.framing import Framed, LineFilter, LineFramer, Picked

# What breaks line handling: line endings, carriage returns, NUL, bytes that are no UTF-8, the
# halves of a character.
PIECES = [
    *(b"a", b"bc", b"\n", b"\n", b"\r", b"\r\n", b"\0", b"\xff\xfe", b" ", b"\x1b[2K"),
    *("é".encode()[:1], "é".encode()[1:], b"prefix:", b"\t", b"\x0b", b"\x85"),
]
PLAIN_PIECES = [piece for piece in PIECES if b"\r" not in piece]

streams = st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join)
plain_streams = st.lists(st.sampled_from(PLAIN_PIECES), max_size=40).map(b"".join)


def last_state(line: bytes) -> bytes:
    """What a terminal shows of a line, if what carriage returns overwrite were rubbed out."""
    text = line.rstrip(b"\r")
    return text.split(b"\r")[-1] + line[len(text) :]


def lines_of(data: bytes) -> list[bytes]:
    lines = data.split(b"\n")
    return lines if lines[-1] else lines[:-1]


def shown(data: bytes, prefix: bytes) -> bytes:
    return b"".join(prefix + last_state(line) + b"\n" for line in lines_of(data))


@st.composite
def chunked(draw: st.DrawFn, data: st.SearchStrategy[bytes] = streams) -> list[bytes]:
    """A stream in the pieces in which it happens to be read."""
    whole = draw(data)
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def alone(framings: Iterable[Framed | None]) -> bytes:
    """What a console shows of one framer that nobody interrupts."""
    out = b""
    resumes = False
    for framed in framings:
        if framed is not None:
            out += (framed.resumed if resumes else framed.fresh) + b"".join(framed.rest)
            resumes = framed.unfinished
    return out


# --- one stream ---------------------------------------------------------------------------------


@given(chunked())
def test_each_line_once_and_whole(chunks: list[bytes]) -> None:
    framer = LineFramer(b"[w0]:")
    out = alone([*map(framer.feed, chunks), framer.end()])
    assert out == shown(b"".join(chunks), b"[w0]:")


@given(chunked(plain_streams), st.data())
def test_a_look_at_an_unfinished_line_changes_nothing(
    chunks: list[bytes], data: st.DataObject
) -> None:
    framer = LineFramer(b"[w0]:")
    framings: list[Framed | None] = []
    for chunk in chunks:
        framings.append(framer.feed(chunk))
        if data.draw(st.booleans()):
            framings.append(framer.peek())
            assert framer.peek() is None, "shown twice"
    assert alone([*framings, framer.end()]) == shown(b"".join(chunks), b"[w0]:")


@given(chunked(plain_streams), st.integers(0, 6), st.data())
def test_a_line_too_long_to_be_held_goes_out_in_pieces(
    chunks: list[bytes], max_held: int, data: st.DataObject
) -> None:
    framer = LineFramer(b"[w0]:", max_held=max_held)
    framings: list[Framed | None] = []
    for chunk in chunks:
        framings.append(framer.feed(chunk))
        assert len(framer._held) <= max_held
        if data.draw(st.booleans()):
            framings.append(framer.peek())
    assert alone([*framings, framer.end()]) == shown(b"".join(chunks), b"[w0]:")


@given(chunked(), st.integers(0, 6), st.data())
def test_progress_in_a_long_line_ends_with_its_last_state(
    chunks: list[bytes], max_held: int, data: st.DataObject
) -> None:
    """What is out already cannot be rubbed out: the next state begins a line of its own."""
    framer = LineFramer(b"[w0]:", max_held=max_held)
    framings: list[Framed | None] = []
    for chunk in chunks:
        framings.append(framer.feed(chunk))
        if data.draw(st.booleans()):
            framings.append(framer.peek())
    out = alone([*framings, framer.end()]).split(b"\n")
    assert out.pop() == b""
    wanted = iter(out)
    for line in lines_of(b"".join(chunks)):
        state = last_state(line)
        assert any(found.endswith(state) for found in wanted), (state, out)


@pytest.mark.parametrize(
    ("written", "on_console"),
    [
        (b"", b""),
        (b"\n", b"[w0]:\n"),
        (b"\n\n", b"[w0]:\n[w0]:\n"),
        (b"no end", b"[w0]:no end\n"),
        (b"a\0b\n", b"[w0]:a\0b\n"),
        (b"\xff\xfe\n", b"[w0]:\xff\xfe\n"),
        (b"a\r\nb\r\n", b"[w0]:a\r\n[w0]:b\r\n"),
        (b"10%\r20%\r30%\n", b"[w0]:30%\n"),
        (b"\r10%\r20%\r\n", b"[w0]:20%\r\n"),
        (b"x\n1\r2\ny\n3\r4\nz\n", b"[w0]:x\n[w0]:2\n[w0]:y\n[w0]:4\n[w0]:z\n"),
        (b"\r", b"[w0]:\r\n"),
        (b"a\rb", b"[w0]:b\n"),
    ],
)
def test_what_is_shown(written: bytes, on_console: bytes) -> None:
    at_once, bytewise = LineFramer(b"[w0]:"), LineFramer(b"[w0]:")
    assert alone([at_once.feed(written), at_once.end()]) == on_console
    pieces = [bytewise.feed(bytes([byte])) for byte in written]
    assert alone([*pieces, bytewise.end()]) == on_console


def test_a_progress_bar_is_shown_in_its_state_then() -> None:
    framer = LineFramer(b"[w0]:")
    assert framer.feed(b"10%") is None
    first = framer.peek()
    assert first is not None
    assert first.fresh == b"[w0]:10%"
    assert framer.feed(b"\r20%\r30%") is None
    assert framer.in_progress
    second = framer.peek()
    assert second is not None
    # Nobody has written since; still it is a new state, and not "10%30%".
    assert second.resumed == b"\n[w0]:30%"
    assert framer.peek() is None
    assert alone([first, second, framer.feed(b"\r40%\n")]) == b"[w0]:10%\n[w0]:30%\n[w0]:40%\n"
    assert not framer.in_progress


def test_a_megabyte_with_a_return_at_its_end_takes_no_quadratic_time() -> None:
    framer = LineFramer(b"[w0]:")
    line = b"x" * 1_000_000 + b"\r"
    assert framer.feed(line) is None
    framed = framer.feed(b"\n")
    assert framed is not None
    assert framed.fresh == b"[w0]:" + line + b"\n"
    framed = framer.feed((b"y" * 50 + b"\r") * 20_000 + b"z\n")
    assert framed is not None
    assert framed.fresh == b"[w0]:z\n"


# --- several streams on one console -------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One owner's next piece, with a look at what is unfinished before it or not."""

    owner: int
    peek: bool


OWNERS = 3
steps_strategy = st.lists(
    st.builds(Step, owner=st.integers(0, OWNERS - 1), peek=st.booleans()), max_size=30
)


def on_one_console(
    chunks: Sequence[Sequence[bytes]], steps: Sequence[Step], **options: int
) -> bytes:
    """What is on a real console, when owners feed their chunks in the order of `steps`."""
    framers = [LineFramer(b"[%d]:" % owner, **options) for owner in range(OWNERS)]
    left = [list(pieces) for pieces in chunks]

    async def write(stream: TextIO) -> None:
        with ThreadPoolExecutor(1) as threads:
            console = Console(stream, threads)

            async def show(owner: int, framed: Framed | None) -> None:
                if framed is not None:
                    async with console.turn:
                        await console.write(framers[owner], framed)

            for step in steps:
                if step.peek:
                    await show(step.owner, framers[step.owner].peek())
                if left[step.owner]:
                    await show(step.owner, framers[step.owner].feed(left[step.owner].pop(0)))
            for owner, framer in enumerate(framers):
                for piece in left[owner]:
                    await show(owner, framer.feed(piece))
                await show(owner, framer.end())

    with open(os.memfd_create("console"), "w+") as stream:
        asyncio.run(write(stream))
        stream.seek(0)
        return stream.buffer.read()


three = st.tuples(*[chunked()] * OWNERS)
three_plain = st.tuples(*[chunked(plain_streams)] * OWNERS)


def earlier_states(line: bytes) -> set[bytes]:
    """All that a look at a line can have found before its end."""
    states = set()
    for end in range(1, len(line) + 1):
        states.add(last_state(line[:end]))
    return states


@settings(deadline=None)
@given(three, steps_strategy)
@example(
    # The whole line is out but for its newline, and somebody else comes between: it is whole
    # already, and not to be repeated.
    ([b"abc", b"\n"], [b"x\n"], []),
    [Step(0, False), Step(0, True), Step(1, False)],
)
@example(
    ([b"abc", b"\r", b"\n"], [b"x\n"], []),
    [Step(0, False), Step(0, True), Step(1, False), Step(0, True)],
)
def test_lines_of_several_are_whole_and_in_order(
    chunks: tuple[list[bytes], ...], steps: list[Step]
) -> None:
    out = on_one_console(chunks, steps)
    assert out == b"" or out.endswith(b"\n")
    found: dict[int, list[bytes]] = {owner: [] for owner in range(OWNERS)}
    for line in out.split(b"\n")[:-1]:
        assert line[:1] + line[2:4] == b"[]:", "not begun with a prefix"
        found[int(line[1:2])].append(line[4:])
    for owner in range(OWNERS):
        looks = sum(step.peek and step.owner == owner for step in steps)
        check_one(found[owner], lines_of(b"".join(chunks[owner])), looks)


def check_one(found: list[bytes], written: list[bytes], looks: int) -> None:
    """Every line as it ended, in order; before each at most what looks at it have found."""
    extra = 0
    left = iter(found)
    for line in written:
        for text in left:
            # Of a line that was out but for its end, a "\r" in that is of no use any more.
            if text.rstrip(b"\r") == last_state(line).rstrip(b"\r"):
                break
            assert text in earlier_states(line)
            extra += 1
        else:
            pytest.fail(f"{line!r} is not there: {found}")
    assert list(left) == []
    assert extra <= looks


@settings(deadline=None)
@given(three_plain, steps_strategy, st.integers(0, 4))
def test_no_byte_is_lost_where_long_lines_meet(
    chunks: tuple[list[bytes], ...], steps: list[Step], max_held: int
) -> None:
    silent = [Step(step.owner, peek=False) for step in steps]
    out = on_one_console(chunks, silent, max_held=max_held)
    for owner in range(OWNERS):
        prefix = b"[%d]:" % owner
        parts = [line[4:] for line in out.split(b"\n") if line.startswith(prefix)]
        assert b"".join(parts) == b"".join(chunks[owner]).replace(b"\n", b"")


def test_an_interrupted_prompt_is_whole_again_later() -> None:
    chunks = ([b"name? ", b"Ada\n"], [b"hello\n"], [])
    steps = [Step(0, False), Step(0, True), Step(1, False)]
    # The look comes before the piece: so the second step shows the prompt and feeds the answer.
    assert on_one_console(chunks, steps) == b"[0]:name? Ada\n[1]:hello\n"
    chunks = ([b"name? ", b"", b"Ada\n"], [b"hello\n"], [])
    assert on_one_console(chunks, steps) == b"[0]:name? \n[1]:hello\n[0]:name? Ada\n"


# --- the filter ---------------------------------------------------------------------------------


def picked(framings: Iterable[Picked], source: bytes, prefix: bytes) -> bytes:
    out = b""
    for found in framings:
        if found.long is not None:
            start, end = found.long
            line = source[start:end]
            assert line.count(b"\n") <= 1
            out += prefix + line.removesuffix(b"\n") + b"\n"
        out += found.lines
    return out


def grep(data: bytes, needles: Sequence[str], prefix: bytes) -> bytes:
    wanted = [needle.encode() for needle in needles]
    lines = [line + b"\n" for line in lines_of(data)]
    return b"".join(prefix + line for line in lines if any(needle in line for needle in wanted))


NEEDLES = ["a", "bc", "é", "", "\n", "a\n", "ab", "bcbc", "a\nb", "prefix", "\r", "\0", "Z"]
needles_strategy = st.lists(st.sampled_from(NEEDLES), max_size=4)


@given(
    chunked(), needles_strategy, st.sampled_from([0, 1, 5, 1 << 20]), st.sampled_from([512, 8, 1])
)
@example([b"abc", b"def\nabcdef", b"xxx\n"], ["bc"], 0, 512)
@example([b"ab", b"cd", b"\n"], ["bc"], 1, 512)
@example([b"bbc c c\nb c c\n"], ["bc"], 1 << 20, 1)
@example([b"b c %s\n" % (b"x" * 99), b"%s bc\nx\n" % (b"b" * 50)], ["bc"], 1 << 20, 8)
def test_the_filter_picks_what_grep_does(
    chunks: list[bytes], needles: list[str], max_held: int, seldom: int
) -> None:
    """Whether it goes from string to string, or from one of its characters to the next."""
    line_filter = LineFilter(needles, b"[w0]:", max_held=max_held)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(framing, "_SELDOM_BYTES", seldom)
        found = [*map(line_filter.feed, chunks), line_filter.end()]
    data = b"".join(chunks)
    assert picked(found, data, b"[w0]:") == grep(data, needles, b"[w0]:")
    assert len(line_filter._held) <= max(max_held, 10)


@given(st.lists(st.booleans(), max_size=300), needles_strategy.map(lambda more: ["loss", *more]))
def test_dense_and_sparse_matches_are_the_same(hits: list[bool], needles: list[str]) -> None:
    """Past a number of matches the filter looks at each line, instead of searching the next."""
    data = b"".join(
        b"a loss of %d\n" % i if hit else b"nothing\n" * 90 for i, hit in enumerate(hits)
    )
    line_filter = LineFilter(needles, b"")
    found = [line_filter.feed(data[i : i + 1000]) for i in range(0, len(data), 1000)]
    assert picked([*found, line_filter.end()], data, b"") == grep(data, needles, b"")


def test_the_filter_begins_anew_after_the_end() -> None:
    line_filter = LineFilter(["x"], b"", max_held=2)
    assert line_filter.feed(b"abcdef").long is None
    assert line_filter.end() == Picked(None, b"")
    line_filter.feed(b"..xxxx")
    assert line_filter.feed(b"\nx\n") == Picked((0, 7), b"x\n")
