"""Text of workers on a terminal: nothing in it acts, and nothing of it is lost that can be read."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise.views.live.text import are_harmless, harmless, in_a_cell

COLOUR = re.compile(r"\x1b\[[0-9;:]*m")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("step 1\tloss 2\n", "step 1\tloss 2\n"),
        ("größer 数\n", "größer 数\n"),
        ("a\x1b[2J\x1b[Hb\n", "ab\n"),
        ("a\x1b[31mb\n", "ab\n"),
        ("a\x07\x00\x08b\x7f\n", "a␇␀␈b␡\n"),
        # A title, the clipboard, a device's string, one that is not closed.
        ("\x1b]0;owned\x07a\x1b]52;c;aGk=\x1b\\b\n", "ab\n"),
        ("\x1bP+q\x1b\\c\x1bcd\x1b]0;begun\n", "cd␛]0;begun\n"),
        ("\x9b2J\x85\n", "\\x9b2J\\x85\n"),
        # What turns the direction of writing.
        ("abc\u202ecba\u2066\n", "abc\\u202ecba\\u2066\n"),
        ("windows\r\nover\rwritten\r\n", "windows\nover␍written\n"),
        # What is left of one that another stands in.
        ("\x1b\x1b[31m[2J\x1b[3", "␛[2J␛[3"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert harmless(text) == shown


def test_colours_stay_and_end_with_their_line() -> None:
    text = "\x1b[1;31mred\nplain\x1b[38;2;1;2;3mtrue\x1b[2J\n\x1b[?25l\x1b[3 q\n"
    shown = "\x1b[1;31mred\x1b[0m\nplain\x1b[38;2;1;2;3mtrue\x1b[0m\n\n"
    assert harmless(text, colours=True) == shown
    assert harmless("\x1b[" + "1" * 100 + "mlong", colours=True) == "long"
    # As prefixes have them: as they are, and each of these that is not ended is.
    ended = "\x1b[34m[w0]:\x1b[0mtext\n" * 3
    assert harmless(ended, colours=True) == ended
    for begun in ("\x1b[34mopen", "\x1b[0;1mopen", "\x1b[1ma\x1b[2mopen", "a\x1b[mb\x1b[1m"):
        *before, ends, more = harmless(f"{ended}{begun}\nmore", colours=True).split("\n")
        # To end what has ended already does no harm.
        assert [line.removesuffix("\x1b[0m") for line in before] == ended.split("\n")[:-1]
        assert (ends, more) == (f"{begun}\x1b[0m", "more")


PREFIX = "\x1b[36m[w0]:\x1b[0m"


@pytest.mark.parametrize(
    "said",
    [
        "hello",
        "",
        "\t",
        "ü",
        "\x1b[31mred",
        "red\x1b[0m",
        "\x1b[2J",
        "\r",
        PREFIX,
        f"{PREFIX}\x1b[31m",
    ],
)
def test_a_prefix_in_a_colour_does_not_hide_what_stands_beside_it(said: str) -> None:
    """Many lines at once are as one by one, but for an end of colours that nothing needs."""
    lines = [f"{PREFIX}{text}\n" for text in ("a", said, "b")]
    at_once = harmless("".join(lines), colours=True)
    one_by_one = [harmless(line, colours=True) for line in lines]
    for line, alone in zip(at_once.splitlines(), one_by_one, strict=True):
        assert line.removesuffix("\x1b[0m") == alone.removesuffix("\n").removesuffix("\x1b[0m")
        assert line.rindex("\x1b") == line.rindex("\x1b[0m")


def test_a_cell_has_one_line_without_colours() -> None:
    assert in_a_cell("a\tb\nc \x1b[31md\x1b[0m\x00") == "a b c d␀"


@given(st.text(st.characters() | st.sampled_from("\x1b[]m;0\x9b\n\r\0")), st.booleans())
def test_nothing_acts(text: str, colours: bool) -> None:
    shown = COLOUR.sub("", harmless(text, colours=colours)) if colours else harmless(text)
    acting = [c for c in shown if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    assert not acting
    # What begins as a colour ends on its own line.
    for line in harmless(text, colours=colours).split("\n"):
        assert "\x1b" not in line or line.rindex("\x1b") == line.rindex("\x1b[0m")


@given(st.text())
def test_a_cell_is_one_line(text: str) -> None:
    assert not {c for c in in_a_cell(text) if unicodedata.category(c) in ("Cc", "Zl", "Zp")}


def test_it_takes_linear_time() -> None:
    # Each would take minutes with a pattern that goes back and forth.
    for piece in ("\x1b[", "\x1b[1;", "\r", "\x1b[" + " " * 9, "\x1b[31m", "\x1b]"):
        harmless(piece * 200_000, colours=True)


pieces = st.sampled_from(
    [PREFIX, "hello", "\n", "\x1b[31m", "\x1b[0m", "\x1b", "[w0]:", "ü", "\0", "\t", "\x1b[36m"]
)


@given(st.lists(st.lists(pieces).map("".join), min_size=1), st.booleans())
def test_what_passes_as_it_is_is_what_would_be_shown(parts: list[str], colours: bool) -> None:
    if are_harmless([part.encode() for part in parts], colours=colours):
        text = "".join(parts)
        shown = harmless(text, colours=colours)
        # Beside an end of colours that nothing needs.
        assert shown.replace("\x1b[0m\n", "\n").removesuffix("\x1b[0m") == (
            text.replace("\x1b[0m\n", "\n").removesuffix("\x1b[0m")
        )


def test_lines_of_one_worker_pass_as_they_are() -> None:
    prefix = PREFIX.encode()
    block = b"two\n" + prefix + b"three"
    assert are_harmless([prefix + b"one\n", prefix, block, b"\n"], colours=True)
    assert not are_harmless([prefix + b"one\n", prefix, block, b"\n"], colours=False)
    assert not are_harmless([prefix + b"one\n", b"\x1b[31mred\n"], colours=True)
    assert are_harmless([b"[w0]:one\n", b"\ttwo\n"], colours=False)
