"""What workers have written is shown as text, on a page and on a terminal."""

from __future__ import annotations

import html
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise.hints import hint_of, what_failed
from asupervise.memory import OomCounts, explain_sigkill
from asupervise.views.lives import Failure, Life
from asupervise.views.markup import Html, escape, log_html, raw, tag
from asupervise.views.plain import (
    Style,
    cut_middle,
    decoded,
    one_line,
    overwritten,
    ranks_text,
    shown,
    styled,
    without_sequences,
)
from asupervise.views.words import clock, duration, how_ended, moment, offset, size

ESC = "\x1b"
# All that there is, and what is of interest more often than by chance.
texts = st.text(st.characters() | st.sampled_from("\x1b[]0;m\0\r\n\t\u202e<&>\"'\ud800\x9b\x07\\"))


def acts(character: str) -> bool:
    """Whether a terminal or a page may do something else with it than to show it."""
    return character not in "\t\n" and (
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF")
        or unicodedata.bidirectional(character) in ("LRI", "RLI", "FSI", "PDI")
        or character in "\u200e\u200f\u061c\ufeff"
    )


@given(texts)
def test_nothing_that_is_shown_acts(text: str) -> None:
    for result in (shown(text), without_sequences(text), one_line(text)):
        assert not [character for character in result if acts(character)]
        result.encode()
    pieces = list(styled(text))
    assert "".join(piece for _, piece in pieces) == without_sequences(text)


@given(st.binary())
def test_any_bytes_are_text(data: bytes) -> None:
    shown(decoded(data)).encode()


@pytest.mark.parametrize(
    "sequence",
    [
        "[2J", "[1;1H", "[?25l", "[38;5;196m", "[31;1m", "]0;title\x07", "]52;c;aGk=\x1b\\", "c",
        "P1$r0m\x1b\\", "_app\x1b\\", "(B", "7", "[>4;2m", "]8;;http://x\x07",
    ],
)  # fmt: skip
def test_sequences_are_left_out_and_what_is_around_them_stays(sequence: str) -> None:
    assert without_sequences(f"a{ESC}{sequence}b") == "ab"


def test_a_sequence_that_is_never_closed_swallows_nothing() -> None:
    assert without_sequences(f"a{ESC}]0;title\nb") == "a\u241b]0;title\nb"
    assert without_sequences(f"a{ESC}") == "a\u241b"
    assert without_sequences(f"a{ESC}[") == "a\u241b["


def test_signs_stand_for_what_has_no_shape() -> None:
    assert shown("a\0\x7f\x9b\u202e\ud800\tb\n") == "a\u2400\u2421\\x9b\\u202e\\ud800\tb\n"
    assert decoded(b"\xff\xc3\xa4") == "\\xff\xe4"


def test_one_line_is_the_first_that_says_something() -> None:
    assert one_line(f"\n  \n{ESC}[1mno  such\tbatch{ESC}[0m\nmore") == "no such batch"
    assert one_line("x" * 300) == "x" * 199 + "…"
    assert one_line("") == ""


def test_what_a_progress_bar_has_overwritten_is_gone() -> None:
    assert overwritten("10 %\r20 %\r\r") == "20 %"
    assert overwritten("plain") == "plain"


def test_long_texts_keep_both_ends() -> None:
    assert cut_middle("abc", 10) == "abc"
    assert cut_middle("a" * 600 + "b" * 600, 10).startswith("aaaaa\n… (1,190 characters")


def test_ranks_are_ranges() -> None:
    assert ranks_text([]) == ""
    assert ranks_text([3, 1, 2, 2, 9]) == "1-3, 9"
    assert ranks_text(range(0, 100, 2), 2) == "0, 2 and 48 more"


# --- colours ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "style"),
    [
        ("31", Style(fg=1)),
        ("1;4;97;41", Style(fg=15, bg=1, bold=True, underline=True)),
        ("38;5;9", Style(fg=9)),
        ("38;5;196", Style(fg=1)),
        ("38;2;255;80;80", Style(fg=9)),
        ("48;2;10;10;10", Style()),
        ("38:2:0:200:0", Style(fg=2)),
        ("31;0", Style()),
        ("", Style()),
        ("31;39;2;22;7;27", Style()),
        ("38;5", Style()),
        ("38", Style()),
        ("99999;31", Style(fg=1)),
    ],
)
def test_colours(codes: str, style: Style) -> None:
    assert next(styled(f"{ESC}[{codes}mx"))[0] == style


@given(st.text(st.sampled_from("0123456789;:")))
def test_any_codes_are_a_style(codes: str) -> None:
    ((style, text),) = styled(f"{ESC}[{codes}mx")
    assert text == "x"
    assert style.fg is None or style.fg in range(16)
    assert style.bg is None or style.bg in range(16)


# --- HTML ---------------------------------------------------------------------------------------


@given(texts)
def test_text_is_escaped_as_the_standard_library_does(text: str) -> None:
    assert escape(text) == html.escape(shown(text))
    assert html.unescape(tag("p", text)) == f"<p>{shown(text)}</p>"


@given(texts)
def test_a_log_is_nothing_but_text_in_spans(text: str) -> None:
    result = log_html(text)
    for line in result.split("\n"):
        assert line.count("<span ") == line.count("</span>") == line.count("<") / 2
    assert html.unescape(without_tags(result)) == without_sequences(text)


def without_tags(markup: str) -> str:
    import re

    return re.sub(r'<span class="[a-z0-9 ]+">|</span>', "", markup)


def test_elements() -> None:
    assert tag("p", "a", None, [raw("<b>"), "<"], class_="x", data_n=1) == (
        '<p class="x" data-n="1">a<b>&lt;</p>'
    )
    assert tag("input", "left out", hidden=True, open=False, value='"') == (
        '<input hidden value="&quot;">'
    )
    assert tag("rect", x=1.5, width=2.0, name="n") == '<rect x="1.5" width="2" name="n"></rect>'
    assert isinstance(tag("p"), Html)


def test_a_log_keeps_its_colours_line_by_line() -> None:
    assert log_html(f"a {ESC}[1;31mb\nc{ESC}[0m <d>") == (
        'a <span class="f1 b">b</span>\n<span class="f1 b">c</span> &lt;d&gt;'
    )
    assert log_html(f"{ESC}[7mx") == '<span class="iv">x</span>'


# --- words --------------------------------------------------------------------------------------


@given(st.floats(0, 1e15))
def test_any_number_can_be_said(number: float) -> None:
    assert duration(number)
    assert offset(number)
    assert size(number)
    assert moment(number)
    assert clock(number)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ms"), (0.0994, "99.4 ms"), (0.0996, "0.0996 s"), (59.99, "1 min"), (61, "1 min 1 s"),
     (3600, "1 h"), (48 * 3600, "2 d")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- hints --------------------------------------------------------------------------------------


FROM_OUTSIDE = explain_sigkill(OomCounts(machine=1), OomCounts(machine=1), None)
CHAIN = """FileNotFoundError: [Errno 2] No such file or directory: 'shard'

The above exception was the direct cause of the following exception:

RuntimeError: cannot load"""


@pytest.mark.parametrize(
    ("given", "begins"),
    [
        ({"cause": "the kernel's OOM killer (cgroup /g)"}, "The kernel ended it because memory"),
        ({"cause": FROM_OUTSIDE}, "Somebody outside killed it"),
        ({"cause": "hang: no heartbeat for 4 s"}, "Compare where the ranks were"),
        ({"cause": "hang: no CPU use for 4 s, and its output is not seen"}, "--tee 3 lets output"),
        ({"cause": "hang: no output", "stack": "state S, waiting in nap"}, "@record, or the extra"),
        ({"signal": "SIGKILL"}, "Somebody outside killed it"),
        ({"signal": "SIGSEGV"}, "A crash outside Python (native code touched"),
        ({"exitcode": 127}, "A program was not found"),
        ({"message": "ModuleNotFoundError: No module named 'a.b'"}, "a.b is not installed"),
        ({"stderr_tail": "torch.OutOfMemoryError: CUDA out of memory"}, "A GPU's memory"),
        ({"message": "OSError: [Errno 98] Address already in use"}, "A port is taken"),
        ({"message": "No traceback was recorded."}, "@record on its main function"),
        ({"message": "No traceback was recorded.", "exitcode": 4}, ""),
        ({"message": "ValueError: timed out = 5"}, ""),
        ({"message": "TimeoutError: timed out"}, "The other end was gone"),
        ({"stderr_tail": CHAIN}, ""),
        ({"stderr_tail": "FileNotFoundError: [Errno 2] No such file: 'a.txt'"}, "Workers start in"),
        ({"message": "No traceback was recorded.", "stderr_in_file": False}, "What it said went"),
        ({"message": "No traceback was recorded.", "python": "", "look": "v"}, "See what it has"),
        ({"message": "ValueError: no such batch"}, ""),
        ({}, ""),
        (
            {"message": "No module named 'a'", "python": "/p"},
            "a is not installed in /p, which runs",
        ),
        ({"message": "ValueError", "look": "view logs"}, "See what it has written: view logs"),
    ],
)
def test_hints(given: dict[str, object], begins: str) -> None:
    exitcode = given.pop("exitcode", 1)
    assert hint_of(exitcode, **given).startswith(begins)  # type: ignore[arg-type]
    assert begins or not hint_of(exitcode, **given)  # type: ignore[arg-type]


def test_a_kill_from_outside_is_no_lack_of_memory() -> None:
    oom, outside = Failure(cause="the kernel's OOM killer (cgroup /g)"), Failure(cause=FROM_OUTSIDE)
    assert how_ended(Life(0, 0, 0, exitcode=-9, failure=oom)) == "out of memory"
    assert how_ended(Life(0, 0, 0, exitcode=-9, failure=outside)) == "SIGKILL"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "exit code 1"),
        ({"signal": "SIGSEGV"}, "SIGSEGV"),
        ({"signal": "SIGSEGV", "stderr_tail": "Fatal Python error: x\n"}, "Fatal Python error: x"),
        ({"message": "No traceback was recorded."}, "exit code 1"),
        ({"message": "KeyError: 'a'", "traceback": "..."}, "KeyError: 'a'"),
        ({"cause": "hang: no heartbeat", "stderr_tail": "KeyError: 'a'"}, "hang: no heartbeat"),
        ({"stderr_tail": "KeyError: 'a'\nlater words"}, "KeyError: 'a'"),
        ({"stderr_tail": "Traceback (most recent call last):\n  f()\na.B: c\nd"}, "a.B: c"),
        ({"stderr_tail": "just words"}, "exit code 1"),
    ],
)  # fmt: skip
def test_what_a_worker_failed_of(given: dict[str, str], said: str) -> None:
    assert what_failed(1, **given) == said


def test_the_hint_about_a_hang_names_the_file_of_its_frames() -> None:
    hint = hint_of(1, cause="hang: no heartbeat for 4 s", stacks="/runs/stacks.txt", look="view")
    assert hint.endswith("Others may wait for it. All its frames: /runs/stacks.txt")
