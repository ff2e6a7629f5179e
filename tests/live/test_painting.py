"""What is written so that lines scroll above a table; how it looks, tmux tells (test_screen.py)."""

from __future__ import annotations

import re

import pytest

from asupervise.views.live.painting import Drawn, Painter, drawer, end_of
from asupervise.views.live.rows import Size
from asupervise.views.live.spans import Span

SIZE = Size(40, 10)
TABLE = [Drawn("one", 3), Drawn("two", 3), Drawn("three", 5)]


def written(parts: list[bytes]) -> str:
    """Without what makes it appear at once, with ESC as a letter that can be read."""
    text = b"".join(parts).decode()
    assert text.startswith("\x1b[?2026h")
    assert text.endswith("\x1b[?2026l")
    return text[8:-8].replace("\x1b[", "E").replace("\r\n", "\n")


def test_a_table_is_drawn_over_itself() -> None:
    painter = Painter()
    assert written(painter.paint([], TABLE, SIZE)) == "\roneEK\ntwoEK\nthreeEKEJ"
    assert written(painter.paint([], TABLE[:2], SIZE)) == "\rE2AoneEK\ntwoEKEJ"
    assert written(painter.paint([], [], SIZE)) == "\rE1AEJ"


def test_lines_take_the_place_of_the_table_which_goes_below() -> None:
    painter = Painter()
    painter.paint([], TABLE, SIZE)
    assert written(painter.paint([b"a\n", b"b\n"], TABLE[:1], SIZE)) == "\rE2AE3Ma\nb\noneEKEJ"


def test_a_table_that_is_forgotten_stays() -> None:
    painter = Painter()
    painter.paint([], TABLE, SIZE)
    painter.forget_table()
    assert written(painter.paint([b"a\n"], TABLE[:1], SIZE)) == "\ra\noneEKEJ"


def test_another_size_draws_all_of_the_screen_anew() -> None:
    painter = Painter()
    lines = "".join(f"line {i} {'x' * 30}\n" for i in range(20))
    painter.paint([lines.encode()], TABLE, SIZE)
    # The last ones, for seven rows of twenty cells: of the first, only its end is on the screen.
    drawn = written(painter.paint([], TABLE, Size(20, 10)))
    assert drawn == (
        "EH" + f"{'x' * 18}EK\n" + "".join(f"line {i} {'x' * 30}EK\n" for i in (17, 18, 19))
        + "oneEK\ntwoEK\nthreeEKEJ"
    )  # fmt: skip
    assert written(painter.paint([], TABLE, Size(80, 4))).startswith("EHline 19 ")


def test_what_was_there_before_us_goes_into_the_history_once() -> None:
    painter = Painter()
    painter.paint([b"a\n"], [Drawn("x" * 39, 39)], SIZE)
    drawn = written(painter.paint([b"b\n"], TABLE, Size(20, 6)))
    # Its 39 cells take two rows by now.
    assert drawn == "\rE1AE2ME6;1H" + "\n" * 6 + "EHaEK\nb\noneEK\ntwoEK\nthreeEKEJ"
    assert written(painter.paint([], TABLE, SIZE)).startswith("EHaEK\nbEK\none")


def test_a_line_that_fills_its_row_keeps_its_last_cell() -> None:
    painter = Painter()
    painter.paint([f"{'x' * 20}\n\x1b[31m{'y' * 19}\x1b[0m\n".encode()], TABLE, SIZE)
    drawn = written(painter.paint([], TABLE, Size(20, 5)))
    assert f"EH{'x' * 20}\nE31m{'y' * 19}E0mEK\n" in drawn


def test_colours_of_the_terminal_only() -> None:
    line = (Span("a", "failed"), Span("b"), Span("数", "dim"))
    assert drawer(coloured=True)(line) == ("\x1b[1;31ma\x1b[0mb\x1b[2m数\x1b[0m", 4)
    assert drawer(coloured=False)(line) == ("\x1b[1ma\x1b[0mb\x1b[2m数\x1b[0m", 4)
    # None of a palette that might not be read on somebody's background.
    every = drawer(coloured=True)(
        tuple(Span("x", name) for name in ("quiet", "done", "bad", "bar"))
    )
    assert {int(code) for code in re.findall(r"\d+", every.text)} <= {0, 1, 2, *range(30, 38)}


@pytest.mark.parametrize(
    ("text", "cells", "end"),
    [("abc", 5, "abc"), ("abcdef", 3, "def"), ("数数数", 4, "数数"), ("数", 1, "")],
)
def test_of_a_begun_line_the_end_is_shown(text: str, cells: int, end: str) -> None:
    assert end_of(text, cells) == end
