"""How lines look: colour, time, JSON, the prefix of several ranks."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise import ConsoleFormat
from asupervise.environ import log_line_prefix
from asupervise.format_framers import JsonFramer, StampedFramer
from asupervise.formats import Speaker, colored, merged_prefix, stamp, wants_color
from asupervise.framing import Framed, LineFramer, with_prefix

NOON = 1_800_000_000.0


def speaker(rank: int, prefix: str | None = None, *, first: int = 0) -> Speaker:
    return Speaker(f"[w{rank}]:" if prefix is None else prefix, rank, first + rank, "stdout", "w")


def templated(template: str, *ranks: int, role: str = "default", first: int = 0) -> str:
    return merged_prefix(
        [
            speaker(
                rank,
                log_line_prefix(template, role_name=role, rank=first + rank, local_rank=rank),
                first=first,
            )
            for rank in ranks
        ]
    )


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"color": "blue"}, "color: 'blue': expected one of auto, always, never"),
        ({"log_format": "xml"}, "log_format: 'xml': expected one of text, json"),
    ],
)
def test_a_word_that_means_nothing_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConsoleFormat(**given)


@pytest.mark.parametrize(
    ("color", "environ", "is_terminal", "wanted"),
    [
        ("auto", {}, True, True),
        ("auto", {}, False, False),
        ("auto", {"NO_COLOR": "1"}, True, False),
        ("auto", {"NO_COLOR": ""}, True, True),
        ("auto", {"TERM": "dumb"}, True, False),
        ("always", {"NO_COLOR": "1", "TERM": "dumb"}, False, True),
        ("never", {}, True, False),
    ],
)
def test_colour_is_for_terminals_that_want_it(
    color: str, environ: dict[str, str], is_terminal: bool, wanted: bool
) -> None:
    assert wants_color(color, environ, is_terminal=is_terminal) is wanted


def test_each_rank_has_its_colour_and_several_are_bold() -> None:
    shown = [colored("p", [rank]) for rank in range(4)]
    assert len(set(shown)) == 4
    assert shown[0] == "\x1b[36mp\x1b[0m"
    assert colored("p", [1000]).endswith("mp\x1b[0m")
    assert colored("p", [0, 1]) == "\x1b[1mp\x1b[0m"
    assert colored("", [0]) == ""


def test_the_time_is_local_with_milliseconds() -> None:
    local = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(NOON))
    assert stamp(NOON + 0.0079) == f"{local}.007 "


# --- the prefix of several ranks ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("[${role_name}${local_rank}]:", "[default0-2,10]:"),
        ("<${rank}/${local_rank}> ", "<20-22,30/0-2,10> "),
        ("${role_name} ${rank}: ", "default 20-22,30: "),
        ("[host7:${local_rank}] ", "[host7:0-2,10] "),
        ("[${role_name}]:", "[default]:"),
        ("", ""),
    ],
)
def test_a_template_is_filled_in_with_all_ranks(template: str, shown: str) -> None:
    assert templated(template, 0, 1, 2, 10, first=20) == shown


def test_a_role_may_end_in_a_number() -> None:
    template = "[${role_name}${local_rank}]:"
    assert templated(template, 0, 1, 2, 10, role="stage2") == "[stage20-2,10]:"
    assert templated("[${role_name}${rank}]:", 0, 1, role="v3", first=8) == "[v38-9]:"


def test_prefixes_of_ones_own_stand_side_by_side() -> None:
    assert merged_prefix([speaker(0, "left> "), speaker(1, "right> ")]) == "left> ,right> "
    assert merged_prefix([speaker(0, "a1b"), speaker(1, "ab2")]) == "a1b,ab2"
    assert merged_prefix([speaker(0, "x7"), speaker(1, "x3")]) == "x3,7"
    assert merged_prefix([speaker(3)]) == "[w3]:"


@given(st.sets(st.integers(0, 300), min_size=1))
def test_every_rank_is_named(ranks: set[int]) -> None:
    merged = merged_prefix([speaker(rank) for rank in sorted(ranks)])
    named: set[int] = set()
    for part in merged.removeprefix("[w").removesuffix("]:").split(","):
        low, _, high = part.partition("-")
        named |= set(range(int(low), int(high or low) + 1))
    assert named == ranks


# --- framers ------------------------------------------------------------------------------------


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({*(cut % (len(data) + 1) for cut in cuts), len(data)})
    return [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def shown(framed: Framed | None) -> bytes:
    return b"" if framed is None else b"".join((framed.fresh, *framed.rest))


def test_the_time_is_that_of_the_reading_of_a_lines_end() -> None:
    times = iter([NOON, NOON + 1, NOON + 2])
    framer = StampedFramer(b"[w0]:", clock=lambda: next(times))
    assert framer.feed(b"a") is None
    assert shown(framer.peek()).endswith(b".000 [w0]:a")
    late, later = (stamp(NOON + after).encode() for after in (1, 2))
    assert shown(framer.feed(b"b\nc\nd")) == late + b"[w0]:ab\n" + late + b"[w0]:c\n"
    assert shown(framer.feed(b"e\n")) == later + b"[w0]:de\n"


BYTES = st.lists(
    st.sampled_from([b"a", b"\n", b"\xff", b'"', b"\\", b"\x1b[31m", b"\0", b"\xc3\xa9", b"\x7f"])
)


@given(BYTES.map(b"".join), st.lists(st.integers(0, 50)))
def test_each_line_is_an_object_whatever_is_in_it(data: bytes, cuts: list[int]) -> None:
    framer = JsonFramer(speaker(1, first=8), clock=lambda: NOON)
    out = b"".join(shown(framer.feed(piece)) for piece in pieces(data, cuts)) + shown(framer.end())
    *wanted, rest = data.decode(errors="backslashreplace").split("\n")
    objects = [json.loads(line) for line in out.splitlines()]
    assert [each.pop("text") for each in objects] == ([*wanted, rest] if rest else wanted)
    member = {"time": NOON, "rank": 9, "local_rank": 1, "stream": "stdout", "group": "w"}
    assert all(each == member for each in objects)
    # Nothing that acts on a terminal.
    assert all(byte == 10 or 32 <= byte < 127 for byte in out)


@given(st.integers(0, 999), st.sampled_from('"\\\t\x00\x1b\x7fé\x85'))
def test_what_is_to_be_escaped_is_found_wherever_it_stands(at: int, special: str) -> None:
    """In a block of many times the bytes that are searched at a time."""
    lines = ["a line of some length " * 4] * 1_000
    lines[at] += special
    framer = JsonFramer(speaker(0), clock=lambda: NOON)
    out = shown(framer.feed("".join(f"{line}\n" for line in lines).encode()))
    assert [json.loads(line)["text"] for line in out.splitlines()] == lines
    assert all(byte == 10 or 32 <= byte < 127 for byte in out)


def test_a_line_too_long_to_be_held_makes_several_objects() -> None:
    framer = JsonFramer(speaker(0))
    out = shown(framer.feed(b"x" * 1_100_000)) + shown(framer.feed(b"y\nz\n"))
    first, second, third = (json.loads(line) for line in out.splitlines())
    assert first["text"] + second["text"] == "x" * 1_100_000 + "y"
    assert (first["continues"], "continues" in second, third["text"]) == (True, False, "z")


@pytest.mark.parametrize("last", ["c", 'c"'], ids=["nothing to escape", "something to escape"])
def test_what_follows_whole_lines_is_held_or_comes_in_pieces(last: str) -> None:
    """Where nothing is to be escaped they are all made at once."""
    framer = JsonFramer(speaker(0), clock=lambda: NOON)
    first = shown(framer.feed(b"a\nb\n\n" + last.encode() + b"\n" + b"x" * 1_100_000))
    then = shown(framer.feed(b"y\n" + b"d\ne"))
    objects = [json.loads(line) for line in (first + then + shown(framer.end())).splitlines()]
    texts = [each["text"] for each in objects]
    assert texts[:4] == ["a", "b", "", last]
    assert "".join(texts[4:-2]) == "x" * 1_100_000 + "y"
    assert texts[-2:] == ["d", "e"]
    assert [each for each in objects if each.get("continues")] == objects[4:5]
    assert {each["time"] for each in objects} == {NOON}


@given(
    st.lists(st.sampled_from([b"a", b"b\n", b"\r", b"c\rd", None]), max_size=12),
    st.integers(1, 4),
    st.booleans(),
)
def test_a_prefix_that_is_put_before_later_is_the_same(
    feeds: list[bytes | None], max_held: int, ends: bool
) -> None:
    """As if the framer had had it; for one line at a time."""
    plain = LineFramer(b"", max_held=max_held)
    prefixed = LineFramer(b"[w0]:", max_held=max_held)
    begun = False
    for data in feeds:
        ours = plain.peek() if data is None else plain.feed(data)
        wanted = prefixed.peek() if data is None else prefixed.feed(data)
        if ours is None or ours.rest:
            assert (ours is None) is (wanted is None)
        else:
            assert with_prefix(ours, b"[w0]:", begun=begun) == wanted
        begun = begun if ours is None else ours.unfinished
    if ends and (ours := plain.end()) is not None:
        assert with_prefix(ours, b"[w0]:", begun=begun) == prefixed.end()
