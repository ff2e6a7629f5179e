"""Where tracebacks begin and end: those that Python writes, cut wherever a read may end."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise.tracebacks import OpenTraceback, Stage, begun_in

INSIDE, COMPLETE = Stage.INSIDE, Stage.COMPLETE


def plain() -> None:
    raise ValueError("of one line")


def while_handling() -> None:
    try:
        plain()
    except ValueError:
        {}["no such key"]


def caused() -> None:
    try:
        plain()
    except ValueError as exc:
        raise RuntimeError("caused") from exc


def endless() -> None:
    endless()


def no_syntax() -> None:
    compile("a b c", "<text>", "exec")


def grouped() -> None:
    def failing(function: Callable[[], None]) -> Exception:
        try:
            function()
        except Exception as exc:
            return exc
        raise AssertionError

    inner = ExceptionGroup("inner", [failing(plain), failing(caused)])
    raise ExceptionGroup("outer", [failing(while_handling), inner, KeyError("no traceback")])


FAILING = [plain, while_handling, caused, endless, no_syntax, grouped]


def text_of(function: Callable[[], None]) -> bytes:
    try:
        function()
    except Exception:
        return traceback.format_exc().encode()
    raise AssertionError


def stage_after(*pieces: bytes) -> Stage | None:
    """How far it has come when so much was read, in pieces; None where none is open."""
    begun: OpenTraceback | None = None
    for piece in pieces:
        if begun is None:
            begun = begun_in(piece)
        else:
            begun.feed(piece)
        if begun is not None and begun.stage is Stage.OVER:
            begun = None
    return None if begun is None else begun.stage


@pytest.mark.parametrize("prefix", [b"", b"[rank0]: ", b"    ", b"2026-01-01 ERROR "])
@pytest.mark.parametrize("function", FAILING)
def test_it_is_open_from_its_first_line_to_its_last(
    function: Callable[[], None], prefix: bytes
) -> None:
    lines = [prefix + line + b"\n" for line in text_of(function).splitlines()]
    for count in range(1, len(lines)):
        assert stage_after(b"before\n", b"".join(lines[:count])) is not None, lines[:count]
        assert stage_after(*lines[:count]) is not None, lines[count - 1]
    assert stage_after(b"".join(lines)) is COMPLETE
    assert stage_after(*lines) is COMPLETE
    assert stage_after(*lines, b"after\n") is None
    assert stage_after(b"".join(lines) + b"after\n") is None


def test_between_two_that_go_together_it_may_be_complete_and_is_not_over() -> None:
    lines = text_of(caused).splitlines(keepends=True)
    ends = [n for n, line in enumerate(lines) if line.startswith(b"ValueError")]
    for count in range(1, len(lines)):
        expected = COMPLETE if count - 1 in (ends[0], ends[0] + 1) else INSIDE
        assert stage_after(*lines[:count]) is expected, lines[:count]


@given(st.sampled_from(FAILING), st.lists(st.integers(0, 5000)), st.booleans())
def test_however_it_is_cut(function: Callable[[], None], cuts: list[int], ends: bool) -> None:
    text = text_of(function) + (b"after\n" if ends else b"")
    # Its first line is written at once, and read so.
    first = text.index(b"\n") + 1
    places = sorted({first, *(max(first, cut % len(text)) for cut in cuts), len(text)})
    pieces = [text[a:b] for a, b in zip([0, *places], places, strict=False)]
    assert stage_after(*pieces) is (None if ends else COMPLETE)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"all is well\n",
        b"Traceback (most recent call last): is what Python says\n",
        b"Traceback (most recent call last):",
        b"Traceback (most recent call last):\n  File\nValueError: 1\nnext line\n",
        b"Traceback (most recent call last):\n  File\nValueError: 1\n" + b"x" * 20_000,
        b"Traceback (most recent call last):\n" + b"x\n" * 20_000,
    ],
)
def test_none_is_open(data: bytes) -> None:
    assert begun_in(data) is None


def test_the_next_one_is_open_where_one_is_over() -> None:
    first, second = text_of(plain), text_of(caused)
    begun = begun_in(first)
    assert begun is not None
    begun.feed(b"between\n" + second[:-10])
    assert begun.stage is INSIDE


def test_what_is_no_line_of_a_traceback_ends_it() -> None:
    begun = begun_in(b"Traceback (most recent call last):\n")
    assert begun is not None
    begun.feed(b"x" * 20_000)
    assert begun.stage is Stage.OVER
