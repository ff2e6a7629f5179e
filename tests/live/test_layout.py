"""The table in a terminal of any size: never wider, never higher, and what matters first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from asupervise.views.live.layout import Layout, lay_out, room
from asupervise.views.live.rows import NS, News, Picture, Row, State
from asupervise.views.live.spans import ASCII, UNICODE

S = State


def picture(rows: list[Row], **fields: Any) -> Picture:
    counts = {state: sum(row.state is state for row in rows) for state in State}
    values = {"now_ns": 1000 * NS, "title": "train.py", "elapsed_s": 83.0, **fields}
    return Picture(rows=tuple(rows), counts=counts, **values)


def running(count: int, **fields: Any) -> list[Row]:
    values = {"state": S.RUNNING, "started_ns": 900 * NS, "last_line": "step 7", **fields}
    return [Row(group="job", local_rank=rank, rank=rank, **values) for rank in range(count)]


def shown(layout: Layout) -> list[str]:
    return ["".join(span.text for span in line) for line in layout.lines]


states = st.sampled_from(list(State))
texts = st.text(max_size=200) | st.sampled_from(
    ["数据" * 50, "e\u0301" * 30, "\x1b[2J", "👩‍👩‍👧" * 9]
)
numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
rows = st.builds(
    Row,
    group=st.sampled_from(["", "job", "数据" * 20]),
    rank=st.integers(0, 10**6),
    state=states,
    started_ns=st.integers(0, 2000 * NS),
    ended_ns=st.integers(0, 2000 * NS),
    changed_ns=st.integers(0, 2000 * NS),
    due_ns=st.integers(0, 10**6 * NS),
    exitcode=st.none() | st.integers(-70, 255),
    restarts=st.integers(0, 10**9),
    cpu=st.none() | st.floats(0, 1e6),
    rss_bytes=st.none() | st.integers(0, 2**70),
    done=numbers,
    total=numbers,
    message=texts,
    last_line=texts,
    gpu=texts,
)
pictures = st.builds(
    picture,
    st.lists(rows, max_size=40),
    title=texts,
    elapsed_s=st.floats(0, 1e9),
    restarts=st.tuples(st.integers(0, 10**6), st.none() | st.integers(0, 10**6)),
    round=st.none() | st.tuples(*[st.integers(0, 10**6)] * 3),
    fraction=st.none() | st.floats(0, 1),
    left_s=st.none() | st.floats(0, 1e9),
    news=st.none() | st.builds(News, texts, st.booleans()),
    dropped=st.integers(0, 10**6),
)


@given(pictures, st.integers(0, 250), st.integers(0, 70), st.sampled_from([UNICODE, ASCII]))
def test_it_is_never_wider_nor_higher(given: Picture, width: int, height: int, glyphs: Any) -> None:
    layout = lay_out(given, width, height, glyphs)
    assert len(layout.lines) <= height
    for line in shown(layout):
        assert cell_len(line) <= width
        assert "\n" not in line
        assert "\x1b" not in line


@pytest.mark.parametrize("count", [1, 4, 16, 256, 1024])
@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (200, 60), (40, 10), (20, 5), (5, 2)])
def test_it_leaves_room_for_the_log(count: int, columns: int, lines: int) -> None:
    height = room(count, lines)
    assert 1 <= height < lines
    given = picture(running(count), fraction=0.5, news=News("rank 3 failed", True))
    assert len(lay_out(given, columns - 1, height).lines) <= height


def test_a_few_ranks_are_all_there_in_their_order() -> None:
    rows = running(4, rss_bytes=3 << 29, cpu=0.98, done=120.0, total=400.0)
    rows[2] = replace(rows[2], state=S.FAILED, exitcode=3, ended_ns=950 * NS)
    layout = lay_out(picture(rows, fraction=0.3, left_s=70.0), 79, 14)
    assert shown(layout)[0] == (
        "── train.py  ✗ 1 failed ● 3 running ──────────────────────────────────── 1:23 ─"
    )
    assert shown(layout)[1].endswith("─ 30%  1:10 left")
    assert shown(layout)[2].split() == [
        "RANK", "STATE", "UP", "CPU", "MEMORY", "PROGRESS", "LAST", "LINE",
    ]  # fmt: skip
    assert shown(layout)[3] == (
        "   0  ● running       1:40    98%    1.5G  ━━━───────  30%  step 7             "
    )
    assert shown(layout)[5].startswith("   2  ✗ exit 3        0:50 ")
    assert [row.rank for row in layout.rows] == [0, 1, 2, 3]


def test_of_many_ranks_those_come_first_that_somebody_looks_for() -> None:
    rows = running(256)
    for rank, state, fields in (
        (200, S.FAILED, {"exitcode": 1}),
        (90, S.FAILED, {"exitcode": -9, "root_cause": True}),
        (17, S.RESTARTING, {"due_ns": 1003 * NS}),
        (250, S.QUIET, {}),
        (30, S.DONE, {"changed_ns": 999 * NS}),
        (3, S.DONE, {"changed_ns": 500 * NS}),
    ):
        rows[rank] = replace(rows[rank], state=state, **fields)
    layout = lay_out(picture(rows), 79, 14)
    assert [row.rank for row in layout.rows] == [90, 200, 17, 250, 30, 0, 1]
    lines = shown(layout)
    assert lines[0].startswith("── train.py  ✗ 2 ↻ 1 ○ 1 ● 250 ✓ 2 ──")
    assert lines[-1] == "… and 249 more: 248 running, 1 done"
    # Every rank has its mark: of rank 90 in the second line of 64.
    marks = [line for line in lines if set(line[4:]) <= set(" ●✗↻○✓·■")]
    assert [int(line[:3]) for line in marks] == [0, 64, 128, 192]
    every = "".join(line[4:].replace(" ", "") for line in marks)
    assert len(every) == 256
    assert (every[90], every[200], every[17], every[250], every[3]) == tuple("✗✗↻○✓")


def test_where_there_is_no_room_a_mark_stands_for_several_and_shows_the_worst() -> None:
    rows = running(1024)
    rows[777] = replace(rows[777], state=S.FAILED, exitcode=1)
    lines = shown(lay_out(picture(rows), 79, 12))
    marks = [line for line in lines if set(line[5:]) <= set(" ●✗")]
    assert 1 <= len(marks) <= 4
    assert sum(line.count("✗") for line in marks) == 1
    assert int(marks[-1][:4]) + 1024 // sum(len(m[5:].replace(" ", "")) for m in marks) <= 1024


@pytest.mark.parametrize(
    ("width", "heads"),
    [
        (199, "RANK STATE UP CPU MEMORY GPU RESTARTS PROGRESS LAST LINE"),
        (79, "RANK STATE UP CPU MEMORY PROGRESS LAST LINE"),
        (60, "RANK STATE UP PROGRESS LAST LINE"),
        (39, "RANK STATE LAST LINE"),
        (24, "RANK STATE"),
    ],
)
def test_a_narrow_terminal_has_the_columns_that_matter(width: int, heads: str) -> None:
    rows = running(2, rss_bytes=1, cpu=1.0, done=1.0, total=2.0, restarts=1, gpu="0 50% 3G")
    (line,) = (line for line in shown(lay_out(picture(rows), width, 9)) if "RANK" in line)
    assert " ".join(line.split()) == heads


def test_a_terminal_of_one_line_says_how_many_run() -> None:
    rows = running(3)
    (line,) = shown(lay_out(picture(rows), 40, 1))
    assert "● 3 running" in line
    assert "1:23" in line


def test_what_failed_is_told_before_its_last_line() -> None:
    row = Row(group="job", state=S.FAILED, exitcode=1, message="ValueError: 3", last_line="step 9")
    lines = shown(lay_out(picture([row], news=News("rank 0 failed", True)), 79, 9))
    assert lines[1] == "rank 0 failed"
    assert "ValueError: 3" in lines[-1]


def test_groups_side_by_side_have_their_names() -> None:
    rows = [Row(group="train", state=S.RUNNING), Row(group="serve", state=S.RUNNING)]
    lines = shown(lay_out(picture(rows), 79, 9))
    assert [line.split()[0] for line in lines[-2:]] == ["train0", "serve0"]


def test_without_unicode() -> None:
    rows = running(2, last_line="x" * 200, done=1.0, total=2.0)
    lines = shown(lay_out(picture(rows, fraction=0.5), 79, 9, ASCII))
    assert all(line.isascii() for line in lines)
    assert lines[-1].endswith("xxx...")
    assert "#####....." in lines[-1]
