"""What becomes of a run, decided without any node or engine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise.elastic.decide import Clock, Policy, View, after_failure, decide, earliest
from asupervise.elastic.records import Culprit, Member, Node, Round, Terms

POLICY = Policy(last_call_s=30.0, join_timeout_s=600.0)
NOW = Clock(now=100.0, opened=100.0, enough=100.0)
OPEN = Round(0, "open")


def node(name: str, **more) -> Node:
    return Node(name, f"host-{name}", f"10.0.0.{name}", more.pop("nproc", 1), **more)


def nodes(*given_: Node) -> dict[str, tuple[Node, int]]:
    """In the order in which they have come."""
    return {known.id: (known, place + 1) for place, known in enumerate(given_)}


def ready(names: str, number: int = 0, **more) -> list[Node]:
    return [node(name, ready=number, **more) for name in names]


def running(names: str, number: int = 0, **more) -> Round:
    members = tuple(Member(name, f"host-{name}", f"10.0.0.{name}", 1) for name in names)
    return Round(number, "running", members=members, **more)


def culprit(name: str, **more) -> Culprit:
    return Culprit(name, more.pop("round", 0), more.pop("rank", 0), uptime_s=60.0, **more)


def ids(round: object) -> str:
    assert isinstance(round, Round)
    return "".join(member.id for member in round.members)


# --- a round that is open -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "terms", "clock", "expected"),
    [
        ("", Terms(1, 2), NOW, 700.0),
        ("a", Terms(2, 2), NOW, 700.0),
        ("a", Terms(2, 2), NOW._replace(now=699.0), 700.0),
        ("a", Terms(1, 2), NOW, 130.0),
        ("a", Terms(1, 2), NOW._replace(now=129.0), 130.0),
        ("a", Terms(1, 2), NOW._replace(enough=110.0), 140.0),
    ],
)
def test_what_is_waited_for(names: str, terms: Terms, clock: Clock, expected: float) -> None:
    view = View(OPEN, nodes(*ready(names)))
    assert decide(view, terms, POLICY, clock) == expected


@pytest.mark.parametrize(
    ("names", "terms", "clock", "members"),
    [
        ("a", Terms(1, 1), NOW, "a"),
        ("ab", Terms(1, 2), NOW, "ab"),
        ("abc", Terms(1, 2), NOW, "ab"),
        ("a", Terms(1, 2), NOW._replace(now=130.0), "a"),
        ("abc", Terms(2, 4), NOW._replace(now=131.0), "abc"),
    ],
)
def test_when_a_round_begins(names: str, terms: Terms, clock: Clock, members: str) -> None:
    begun = decide(View(OPEN, nodes(*ready(names))), terms, POLICY, clock)
    assert ids(begun) == members
    assert (begun.number, begun.state) == (0, "running")


def test_who_is_not_ready_is_no_member() -> None:
    view = View(OPEN, nodes(node("a"), *ready("bc")))
    assert ids(decide(view, Terms(1, 2), POLICY, NOW)) == "bc"


def test_a_later_round_waits_for_those_who_are_there() -> None:
    later = Round(3, "open", order=("a", "b"))
    view = View(later, nodes(*ready("a", 3), node("b", ready=2)))
    assert decide(view, Terms(1, 3), POLICY, NOW) == 130.0
    view = View(later, nodes(*ready("ab", 3)))
    assert ids(decide(view, Terms(1, 3), POLICY, NOW)) == "ab"


def test_former_members_keep_their_order_and_newcomers_follow() -> None:
    later = Round(3, "open", order=("c", "x", "a"))
    view = View(later, nodes(*ready("nabc", 3)))
    assert ids(decide(view, Terms(4, 4), POLICY, NOW)) == "canb"


def test_given_ranks_come_before_everything() -> None:
    given_ = [node("a", ready=0, node_rank=2), node("b", ready=0), node("c", ready=0, node_rank=0)]
    assert ids(decide(View(OPEN, nodes(*given_)), Terms(3, 3), POLICY, NOW)) == "cab"


def test_the_port_is_the_first_members() -> None:
    given_ = [node("a", ready=0, port=7, node_rank=1), node("b", ready=0, port=8, node_rank=0)]
    begun = decide(View(OPEN, nodes(*given_)), Terms(2, 2), POLICY, NOW)
    assert begun.master_port == 8


def test_too_few_for_too_long_is_the_end() -> None:
    view = View(OPEN, nodes(*ready("a")))
    over = decide(view, Terms(2, 2), POLICY, Clock(700.0, 100.0, None))
    assert (over.state, over.succeeded, over.culprit) == ("over", False, None)
    assert over.why == "1 of at least 2 nodes came within 600 s"


# --- a round that runs ----------------------------------------------------------------------------


def done(names: str, how: str = "succeeded", number: int = 0) -> list[Node]:
    return [node(name, ready=number, done=number, how=how) for name in names]


@pytest.mark.parametrize(
    ("known", "terms"),
    [
        (ready("ab"), Terms(2, 2)),
        ([*ready("a"), *done("b")], Terms(2, 2)),
        # A spare, where there is no room.
        ([*ready("ab"), node("c", ready=1)], Terms(1, 2)),
        # Nobody is interrupted shortly before the end.
        ([*ready("a"), *done("b"), node("c", ready=1)], Terms(1, 3)),
    ],
)
def test_nothing_is_to_be_done(known: list[Node], terms: Terms) -> None:
    assert decide(View(running("ab"), nodes(*known)), terms, POLICY, NOW) is None


def test_all_have_succeeded() -> None:
    over = decide(View(running("ab"), nodes(*done("ab"))), Terms(2, 2), POLICY, NOW)
    assert (over.state, over.succeeded, over.number) == ("over", True, 0)


@pytest.mark.parametrize(
    ("known", "why"),
    [
        (ready("a"), "node host-b is lost"),
        ([], "node host-a, host-b is lost"),
        ([*ready("ab"), node("c")], "a node has joined"),
        ([*done("a"), *done("b", "stopped")], "a node has ended its workers"),
    ],
)
def test_a_new_round_that_is_no_failure(known: list[Node], why: str) -> None:
    lost = tuple(host for host in ("host-a", "host-b") if host in why)
    before = running("ab", 4, restarts=2, broken=1)
    known = [n._replace(done=4 if n.done == 0 else n.done) for n in known]
    opened = decide(View(before, nodes(*known)), Terms(1, 3), POLICY, NOW)
    more = {"why": why, "order": ("a", "b"), "lost": lost}
    assert opened == Round(5, "open", restarts=2, broken=1, **more)


def test_a_failure_is_judged_when_all_have_answered() -> None:
    known = [(culprit("a"), 5.0)]
    view = View(running("ab"), nodes(*done("a", "failed"), *ready("b")), known)
    assert decide(view, Terms(2, 2), POLICY, NOW) is None
    view = View(running("ab"), nodes(*done("a", "failed"), *done("b", "stopped")), known)
    over = decide(view, Terms(2, 2), POLICY, NOW)
    assert (over.state, over.succeeded, over.culprit.node) == ("over", False, "a")


def test_a_lost_node_explains_the_failures_of_the_others() -> None:
    view = View(running("ab"), nodes(*done("a", "failed")), [(culprit("a"), 5.0)])
    opened = decide(view, Terms(1, 2), POLICY, NOW)
    assert (opened.state, opened.restarts, opened.why) == ("open", 0, "node host-b is lost")


def test_nothing_follows_the_end() -> None:
    over = Round(0, "over")
    assert decide(View(over, nodes(*ready("ab", 1))), Terms(1, 2), POLICY, NOW) is None


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "first"),
    [
        ([("a", 10.0, 0.0)], "a"),
        ([("a", 10.0, 0.0), ("b", 11.0, 0.0)], "a"),
        ([("a", 10.0, 0.0), ("b", 11.0, 2.0)], "b"),
        ([("a", 10.0, 3.0), ("b", 11.0, 2.0)], "a"),
        ([("b", 10.0, 0.0), ("a", 10.0, 0.0)], "b"),
    ],
)
def test_who_failed_first(known: list[tuple[str, float, float]], first: str) -> None:
    """The time at which it became known, less how old it was then."""
    assert earliest([(culprit(n, age_s=age), at) for n, at, age in known]).node == first


@pytest.mark.parametrize(
    ("before", "more", "state", "expected"),
    [
        ({}, {}, "over", {"restarts": 0}),
        ({"max": 1}, {}, "open", {"restarts": 1, "broken": 0}),
        ({"max": 1, "restarts": 1}, {}, "over", {"restarts": 1}),
        ({"max": 9}, {"uptime_s": 0.5}, "open", {"restarts": 1, "broken": 1}),
        ({"max": 9, "broken": 1}, {"uptime_s": 0.5}, "open", {"broken": 2}),
        ({"max": 9, "broken": 2}, {"uptime_s": 0.5}, "over", {"broken": 3}),
        ({"max": 9, "broken": 2}, {"uptime_s": 1.0}, "open", {"broken": 0}),
        ({"max": 0}, {"port_taken": True}, "open", {"restarts": 0, "retries": 1}),
        ({"max": 0, "retries": 3}, {"port_taken": True}, "over", {}),
        ({"max": 1, "retries": 3}, {"port_taken": True}, "open", {"restarts": 1, "retries": 0}),
    ],
)
def test_what_follows_a_failure(before: dict, more: dict, state: str, expected: dict) -> None:
    before = dict(before)
    terms = Terms(1, 1, max_restarts=before.pop("max", 0))
    failed = culprit("a")._replace(**more)
    next_ = after_failure(running("a", 4, **before), failed, terms, POLICY, lambda: 1.0)
    assert next_.state == state
    assert next_.number == (4 if state == "over" else 5)
    assert {name: getattr(next_, name) for name in expected} == expected
    if state == "over":
        assert next_.culprit == failed


def test_waits_double_and_begin_anew_after_a_stable_run() -> None:
    terms, policy = Terms(1, 1, 10), POLICY._replace(backoff_s=1.0, backoff_max_s=5.0)

    def delay_s(restarts: int, uptime_s: float) -> float:
        failed = culprit("a")._replace(uptime_s=uptime_s)
        before = running("a", restarts=restarts)
        return after_failure(before, failed, terms, policy, lambda: 1.0).delay_s

    assert [delay_s(restarts, 60.0) for restarts in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert delay_s(4, policy.stable_s) == 1.0


@given(
    st.integers(min_value=1, max_value=10**6),
    st.floats(min_value=0.0, max_value=1.0),
    st.floats(min_value=0.0, max_value=1e6),
    st.floats(min_value=0.0, max_value=1e6),
)
def test_a_wait_is_bounded(in_a_row: int, spread: float, first_s: float, max_s: float) -> None:
    policy = Policy(backoff_s=first_s, backoff_max_s=max_s)
    whole = policy.delay_s(in_a_row, 1.0)
    assert 0.0 <= policy.delay_s(in_a_row, spread) <= whole <= max_s
    assert policy.delay_s(in_a_row, spread) >= whole / 2


# --- whatever happens -----------------------------------------------------------------------------

NAMES = "abcde"
NODES = st.lists(
    st.builds(
        lambda name, rank, ready_, done_, how: node(
            name, node_rank=rank, ready=ready_, done=done_, how=how
        ),
        st.sampled_from(NAMES),
        st.none() | st.integers(min_value=0, max_value=4),
        st.integers(min_value=-1, max_value=4),
        st.integers(min_value=-1, max_value=4),
        st.sampled_from(["succeeded", "failed", "stopped"]),
    ),
    max_size=5,
    unique_by=lambda known: known.id,
)
TERMS = st.tuples(
    st.integers(min_value=1, max_value=3),
    st.integers(min_value=0, max_value=2),
    st.integers(min_value=0, max_value=3),
).map(lambda t: Terms(t[0], t[0] + t[1], t[2]))
COUNTS = st.integers(min_value=0, max_value=3)
MEMBERS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True).map("".join)
ROUNDS = st.one_of(
    st.builds(lambda number, order: Round(number, "open", order=tuple(order)), COUNTS, MEMBERS),
    st.builds(
        lambda names, number, restarts, broken, retries: running(
            names, number, restarts=restarts, broken=broken, retries=retries
        ),
        MEMBERS,
        COUNTS,
        COUNTS,
        COUNTS,
        COUNTS,
    ),
)
CULPRITS = st.lists(
    st.tuples(
        st.builds(
            lambda name, age, uptime, taken: Culprit(
                name, 0, 0, age_s=age, uptime_s=uptime, port_taken=taken
            ),
            st.sampled_from(NAMES),
            st.floats(min_value=0.0, max_value=100.0),
            st.floats(min_value=0.0, max_value=1000.0),
            st.booleans(),
        ),
        st.floats(min_value=0.0, max_value=100.0),
    ),
    max_size=3,
)
CLOCKS = st.builds(
    lambda now, opened, enough: Clock(now, min(now, opened), enough and min(now, enough)),
    st.floats(min_value=0.0, max_value=2000.0),
    st.floats(min_value=0.0, max_value=2000.0),
    st.none() | st.floats(min_value=0.0, max_value=2000.0),
)


@given(ROUNDS, NODES, CULPRITS, TERMS, CLOCKS)
def test_whatever_happens(
    round: Round,
    known: list[Node],
    culprits: list[tuple[Culprit, float]],
    terms: Terms,
    clock: Clock,
) -> None:
    round = round._replace(restarts=min(round.restarts, terms.max_restarts))
    view = View(round, nodes(*known), culprits)
    decision = decide(view, terms, POLICY, clock)
    if decision is None:
        assert round.state == "running"
        return
    if isinstance(decision, float):
        assert round.state == "open"
        assert decision > clock.now, "what is due is done"
        return
    assert decision.restarts <= terms.max_restarts
    assert decision.restarts - round.restarts in (0, 1)
    assert decision.number == round.number + (decision.state == "open")
    assert decision.why or decision.state == "running"
    if decision.state == "running":
        assert terms.min_nodes <= len(decision.members) <= terms.max_nodes
        assert len({member.id for member in decision.members}) == len(decision.members)
        here = {n.id for n in known if n.ready == round.number}
        assert {member.id for member in decision.members} <= here
    if decision.state == "open":
        assert decision.delay_s <= POLICY.backoff_max_s
        assert decision.order == tuple(member.id for member in round.members)
    if decision.succeeded:
        assert not culprits
        assert all(n.how == "succeeded" for n in known if round.group_rank(n.id) is not None)


@given(NODES, TERMS, CLOCKS)
def test_the_order_in_which_nodes_are_known_makes_no_difference(
    known: list[Node], terms: Terms, clock: Clock
) -> None:
    forwards = nodes(*known)
    backwards = dict(reversed(forwards.items()))
    one = decide(View(OPEN, forwards), terms, POLICY, clock)
    assert decide(View(OPEN, backwards), terms, POLICY, clock) == one
