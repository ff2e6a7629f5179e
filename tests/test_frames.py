"""How values travel through descriptors: any value, in any pieces, and whatever is none."""

from __future__ import annotations

import array
import os
import pickle
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asupervise.functions import frames
from asupervise.functions.frames import EXCEPTION, VALUE, BadFrame, FrameReader

# Hypothesis draws slowly on a busy machine, and that is no fault of ours.
slow = settings(deadline=None, max_examples=30)

MEBIBYTE = 1 << 20
HEADER_BYTES = 9
VOID = b"X" + bytes(8)


class Blob:
    """Memory that travels out of band, as numpy's arrays do (PEP 574)."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Blob, (pickle.PickleBuffer(self.memory),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blob) and bytes(self.memory) == bytes(other.memory)

    __hash__ = None  # type: ignore[assignment]


class Refuses:
    """Begins to be pickled, and then cannot be."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


def into(out: bytearray) -> frames.Writer:
    def write(_fd: int, parts: Sequence[bytes | memoryview]) -> None:
        for part in parts:
            out.extend(part)

    return write


def wire(value: object, kind: bytes = VALUE) -> bytes:
    """What is sent for a value."""
    out = bytearray()
    frames.send(-1, kind, value, write=into(out))
    return bytes(out)


def pieces(data: bytes, cuts: Sequence[int]) -> Iterator[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return (data[a:b] for a, b in pairwise(edges))


def read(data: bytes, cuts: Sequence[int] = ()) -> FrameReader:
    reader = FrameReader()
    for piece in pieces(data, cuts):
        reader.feed(piece)
    return reader


scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=9)
blobs = st.builds(Blob, st.binary() | st.builds(bytearray, st.binary(max_size=300)))
values = st.recursive(
    scalars | blobs,
    lambda inner: st.lists(inner) | st.dictionaries(st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=6,
)
cuts = st.lists(st.integers(0, 10_000), max_size=8)


# --- from one end to the other ------------------------------------------------------------------


@slow
@given(value=values, kind=st.sampled_from([VALUE, EXCEPTION]), cuts=cuts)
def test_a_value_in_any_pieces(value: object, kind: bytes, cuts: list[int]) -> None:
    reader = read(wire(value, kind), cuts)
    assert reader.kind == kind
    assert not reader.is_cut_off
    assert reader.load() == value


def test_a_value_byte_by_byte() -> None:
    data = wire([1, "two", Blob(b"three"), Blob(b"")])
    reader = read(data, range(len(data)))
    assert reader.load() == [1, "two", Blob(b"three"), Blob(b"")]


@slow
@given(value=values, counts=st.lists(st.integers(1, 70_000), min_size=1, max_size=5))
def test_a_reader_may_put_bytes_where_they_belong(value: object, counts: list[int]) -> None:
    data, reader, at, turn = memoryview(wire(value)), FrameReader(), 0, 0
    while at < len(data):
        count = counts[turn % len(counts)]
        target = reader.wanted()
        if target is None:
            count = min(count, len(data) - at)
            reader.feed(data[at : at + count])
        else:
            count = min(count, target.nbytes, len(data) - at)
            target[:count] = data[at : at + count]
            reader.filled(count)
        at, turn = at + count, turn + 1
    assert reader.load() == value


@slow
@given(all_values=st.lists(values, min_size=1, max_size=4), cuts=cuts)
def test_the_last_value_is_the_word(all_values: list[object], cuts: list[int]) -> None:
    reader = read(b"".join(map(wire, all_values)), cuts)
    assert reader.load() == all_values[-1]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_any_protocol(protocol: int) -> None:
    value = {"a": [1, 2.5, "text\nof lines", None, True], "b": {array.array: (10**40,)}}
    data = pickle.dumps(value, protocol)
    middle = len(data) // 2
    records = [b"D" + len(d).to_bytes(8, "little") + d for d in (data[:middle], data[middle:])]
    assert read(b"".join(records) + VALUE + bytes(8)).load() == value


@pytest.mark.parametrize("size", [0, 1, MEBIBYTE - 1, MEBIBYTE, 4 * MEBIBYTE, 9 * MEBIBYTE + 7])
@pytest.mark.parametrize("make", [bytes, bytearray, lambda data: Blob(bytearray(data))])
def test_sizes_around_the_limits(size: int, make: Any) -> None:
    value = make(bytes(range(251)) * (size // 251) + bytes(size % 251))
    assert read(wire(value), [size // 2, size]).load() == value


def test_out_of_band_memory_is_whole_and_as_writable_as_before() -> None:
    numbers = array.array("d", range(200_000))
    sent = [Blob(numbers), Blob(bytearray(b"ab")), Blob(b"fixed")]
    got = read(wire(sent)).load()
    assert bytes(got[0].memory) == numbers.tobytes()
    assert not memoryview(got[1].memory).readonly
    assert memoryview(got[2].memory).readonly


def test_out_of_band_memory_is_not_copied_before_it_is_sent() -> None:
    memory = bytearray(MEBIBYTE)
    seen: list[bytes | memoryview] = []
    frames.send(-1, VALUE, Blob(memory), write=lambda _fd, parts: seen.extend(parts))
    views = [part.obj for part in seen if isinstance(part, memoryview)]
    assert any(view is memory for view in views)


def test_many_small_buffers() -> None:
    """More than one call of writev takes (IOV_MAX), through a pipe that holds less than all."""
    value = [Blob(bytes([n % 256]) * 100) for n in range(3000)]
    read_end, write_end = os.pipe()

    def send() -> None:
        frames.send(write_end, VALUE, value)
        os.close(write_end)

    sender = threading.Thread(target=send)
    sender.start()
    with open(read_end, "rb") as pipe:
        data = pipe.read()
    sender.join()
    assert read(data).load() == value


def test_a_value_from_a_file() -> None:
    value = [Blob(bytearray(3 * MEBIBYTE)), "text", {1: 2}]
    fd = os.memfd_create("test")
    try:
        os.write(fd, b"setup")
        frames.send(fd, VALUE, value)
        os.lseek(fd, 0, os.SEEK_SET)
        assert frames.read_exactly(fd, 5) == b"setup"
        assert frames.load(fd) == value
        with pytest.raises(BadFrame, match="cut off"):
            frames.load(fd)
        with pytest.raises(BadFrame, match="cut off"):
            frames.read_exactly(fd, 1)
    finally:
        os.close(fd)


def test_nobody_is_there_to_read() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        with pytest.raises(BrokenPipeError):
            frames.send(write_end, VALUE, bytes(100))
    finally:
        os.close(write_end)


# --- void ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [[], [b"x" * (3 * MEBIBYTE)], [Blob(b"y" * 500)]])
@pytest.mark.parametrize("error", [TypeError("no"), KeyboardInterrupt()])
def test_what_cannot_be_pickled_is_void(before: list[object], error: BaseException) -> None:
    out = bytearray()
    with pytest.raises(type(error)):
        frames.send(-1, VALUE, [*before, Refuses(error)], write=into(out))
    reader = read(bytes(out))
    assert not reader.kind
    assert not reader.is_cut_off
    frames.send(-1, EXCEPTION, "why", write=into(out))
    reader = read(bytes(out), range(0, len(out), 1000))
    assert reader.kind == EXCEPTION
    assert reader.load() == "why"


def test_memory_that_is_not_in_one_piece_is_void() -> None:
    out = bytearray()
    with pytest.raises(pickle.PicklingError):
        frames.send(-1, VALUE, Blob(memoryview(bytearray(100))[::2]), write=into(out))
    assert not read(bytes(out)).kind


@slow
@given(value=values, cuts=cuts)
def test_a_void_takes_back_what_came_before(value: object, cuts: list[int]) -> None:
    reader = read(wire("first") + VOID + wire(value) + VOID + wire("last"), cuts)
    assert reader.load() == "last"
    assert not read(wire(value) + VOID, cuts).kind


# --- what is no value ---------------------------------------------------------------------------


@slow
@given(value=values, at=st.integers(0, 1 << 30), cuts=cuts)
def test_cut_off(value: object, at: int, cuts: list[int]) -> None:
    data = wire(value)
    reader = read(data[: at % len(data)], cuts)
    assert not reader.kind
    assert reader.is_cut_off == (at % len(data) > 0)
    with pytest.raises(BadFrame):
        reader.load()


def test_a_value_and_the_beginning_of_another_is_cut_off() -> None:
    # What will follow is unknown; whoever began it meant to take the first one back.
    reader = read(wire("first") + wire("second")[: HEADER_BYTES + 1])
    assert not reader.kind
    assert reader.is_cut_off


@slow
@given(garbage=st.binary(min_size=HEADER_BYTES), cuts=cuts)
def test_garbage_is_refused_or_no_value(garbage: bytes, cuts: list[int]) -> None:
    reader = FrameReader()
    try:
        for piece in pieces(garbage, cuts):
            reader.feed(piece)
    except BadFrame:
        return
    assert not reader.kind or garbage[:1] in (b"D", b"B", b"X", VALUE, EXCEPTION)


@pytest.mark.parametrize(
    "garbage",
    [
        b"hello, world",
        b"Traceback (most recent call last):\n",
        bytes(9),
        VALUE + (1).to_bytes(8, "little"),
        b"X" + (7).to_bytes(8, "little"),
        b"B" + b"\xff" * 8,
        b"B" + (1 << 62).to_bytes(8, "little"),
    ],
)
@pytest.mark.parametrize("before", [b"", wire("a value")])
def test_what_belongs_to_no_frame(before: bytes, garbage: bytes) -> None:
    with pytest.raises(BadFrame):
        read(before + garbage)


def test_a_length_that_is_a_lie_takes_no_memory() -> None:
    """A part of the pickle is taken in pieces: nobody trusts its length."""
    reader = read(b"D" + b"\xff" * 8 + b"x" * 100)
    assert not reader.kind
    assert reader.is_cut_off


@pytest.mark.parametrize("pickled", [b"", b"garbage", pickle.dumps([1, 2])[:-1]])
def test_a_frame_that_holds_no_pickle(pickled: bytes) -> None:
    frame = b"D" + len(pickled).to_bytes(8, "little") + pickled + VALUE + bytes(8)
    with pytest.raises((EOFError, pickle.UnpicklingError)):
        read(frame).load()


def test_a_frame_is_loaded_once() -> None:
    reader = read(wire("value"))
    assert reader.load() == "value"
    with pytest.raises(BadFrame, match="incomplete"):
        reader.load()
