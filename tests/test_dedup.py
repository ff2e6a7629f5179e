"""Equal lines of many ranks put together: nothing lost, nothing invented, no order changed."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise import dedup
from asupervise.dedup import HOLD_S, Dedup, Merged

RANKS = 4
# What happens: who says what, after how long; then whether somebody looks.
SAID = st.tuples(
    st.integers(0, RANKS - 1),
    st.sampled_from("aab1"),
    st.sampled_from([0.0, 0.01, HOLD_S / 2, HOLD_S]),
    st.booleans(),
)


class Story:
    """Ranks that speak, a clock that is moved by hand, and what is shown of it."""

    def __init__(self, ranks: int = RANKS, **options: float) -> None:
        self.dedup: Dedup[str] = Dedup(**options)  # type: ignore[arg-type]
        self.now = 100.0
        self.said: dict[int, list[str]] = defaultdict(list)
        self.shown: list[Merged[str]] = []
        for rank in range(ranks):
            self.dedup.join(rank)

    def say(self, rank: int, text: str, *, look: bool = True) -> list[tuple[str, list[int]]]:
        self.said[rank].append(text)
        self.dedup.add(rank, text, now=self.now, at=self.now)
        return self.look() if look else []

    def look(self, after: float = 0.0) -> list[tuple[str, list[int]]]:
        self.now += after
        return self._show(self.dedup.take(self.now))

    def end(self) -> list[tuple[str, list[int]]]:
        return self._show(self.dedup.take_all())

    def _show(self, lines: list[Merged[str]]) -> list[tuple[str, list[int]]]:
        self.shown += lines
        return [(line.text, line.ranks) for line in lines]

    def by_rank(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = defaultdict(list)
        for line in self.shown:
            assert len(set(line.ranks)) == len(line.ranks)
            for rank in line.ranks:
                found[rank].append(line.text)
        return found


@given(st.lists(SAID), st.lists(st.integers(0, RANKS - 1), unique=True), st.integers(1, 5))
def test_each_rank_keeps_its_lines_and_their_order(
    said: list[tuple[int, str, float, bool]], leaving: list[int], max_lines: int
) -> None:
    story = Story(max_lines=max_lines)
    for number, (rank, text, after, look) in enumerate(said):
        story.now += after
        story.say(rank, text, look=look)
        if number % 3 == 0 and leaving:
            # It may speak all the same: what it has written is read later.
            story.dedup.leave(leaving.pop())
        if look:
            due = story.dedup.due()
            assert due is None or story.now < due <= story.now + HOLD_S
            assert not story.dedup.overfull
    story.end()
    assert story.by_rank() == story.said
    assert story.dedup.due() is None


@given(st.lists(st.sampled_from("ab1"), min_size=1), st.permutations(range(RANKS)))
def test_what_all_say_is_shown_once_and_at_once(texts: list[str], order: list[int]) -> None:
    story = Story()
    for rank in order:
        for text in texts:
            story.say(rank, text)
    assert [(line.text, line.ranks) for line in story.shown] == [(text, order) for text in texts]


def test_a_line_waits_for_a_moment_at_the_most() -> None:
    story = Story(2)
    assert story.say(0, "a") == []
    assert story.dedup.due() == story.now + HOLD_S
    assert story.look(after=HOLD_S / 2) == []
    assert story.say(0, "b") == []
    assert story.look(after=HOLD_S / 2) == [("a", [0])]
    # Too late for it.
    assert story.say(1, "a") == []
    assert story.look(after=HOLD_S) == [("b", [0]), ("a", [1])]


def test_who_has_gone_on_is_not_waited_for() -> None:
    """Rank 1 cannot say "a" any more without changing the order of its lines."""
    story = Story(2)
    story.say(0, "a")
    assert story.say(1, "b") == []
    assert story.say(0, "b") == [("a", [0]), ("b", [1, 0])]


def test_what_each_says_alone_does_not_part_what_all_say() -> None:
    story = Story(3)
    for rank in range(3):
        for text in ("begin", f"rank {rank}", f"of {rank}", "end"):
            story.say(rank, text)
    assert story.look() == []
    assert [(line.text, line.ranks) for line in story.shown] == [
        ("begin", [0, 1, 2]),
        *((text, [rank]) for rank in range(3) for text in (f"rank {rank}", f"of {rank}")),
        ("end", [0, 1, 2]),
    ]


def test_what_is_put_before_another_line_does_not_make_it_wait_longer() -> None:
    story = Story(3)
    story.say(0, "a")
    story.look(after=HOLD_S / 2)
    story.say(1, "alone")
    story.say(1, "a")
    assert story.look(after=HOLD_S / 2) == [("alone", [1]), ("a", [0, 1])]


def test_lines_that_differ_in_a_number_are_different() -> None:
    story = Story(2)
    story.say(0, "step 1: loss 0.5")
    story.say(1, "step 1: loss 0.6")
    story.end()
    assert len(story.shown) == 2


def test_a_line_is_not_put_before_one_that_was_said_earlier() -> None:
    story = Story(3)
    for rank, text in ((0, "a"), (0, "b"), (1, "b"), (1, "a")):
        story.say(rank, text)
    assert story.end() == [("a", [0]), ("b", [0, 1]), ("a", [1])]
    for rank, text in ((0, "a"), (0, "b"), (1, "b"), (2, "b"), (2, "c"), (1, "c"), (1, "a")):
        story.say(rank, text)
    story.end()
    assert [(line.text, line.ranks) for line in story.shown[3:]] == [
        ("a", [0]), ("b", [0, 1, 2]), ("c", [2, 1]), ("a", [1]),
    ]  # fmt: skip


def test_a_rank_that_repeats_itself_is_not_put_together_with_itself() -> None:
    story = Story(2)
    for _ in range(3):
        story.say(0, "a", look=False)
    for _ in range(2):
        story.say(1, "a", look=False)
    assert story.end() == [("a", [0, 1]), ("a", [0, 1]), ("a", [0])]


def test_whoever_has_said_all_is_not_waited_for() -> None:
    story = Story(3)
    story.say(0, "a")
    story.say(1, "a")
    story.dedup.leave(2)
    assert story.look() == [("a", [0, 1])]
    story.dedup.join(2)
    assert story.say(0, "b") == []
    story.dedup.join(2)
    story.dedup.leave(2)
    assert story.say(1, "b") == []
    story.dedup.leave(2)
    assert story.look() == [("b", [0, 1])]


def test_so_much_is_held_at_the_most() -> None:
    story = Story(2, max_lines=3)
    shown = [story.say(0, str(number)) for number in range(5)]
    assert shown == [[], [], [], [("0", [0])], [("1", [0])]]
    story = Story(2, max_size=3)
    assert story.say(0, "abc") == []
    assert story.say(0, "d") == [("abc", [0])]


def test_many_equal_lines_take_no_longer_than_others() -> None:
    """A worker that repeats itself without end must not hold up the event loop."""
    story = Story(2, max_lines=20_000)
    for rank in range(2):
        for _ in range(20_000):
            story.say(rank, "a", look=False)
    assert story.end() == [("a", [0, 1])] * 20_000


@pytest.mark.parametrize("room", [1024, 1])
def test_however_many_say_something_alone_before(
    monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """And where the numbers between two places run out, nothing is lost."""
    monkeypatch.setattr(dedup, "_ROOM", room)
    story = Story(1000)
    for rank in range(1000):
        for text in ("begin", f"rank {rank}", "end"):
            story.say(rank, text, look=False)
    story.end()
    assert story.by_rank() == story.said
    assert len(story.shown) == 1002 or room == 1
