"""What nodes write down for each other."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asupervise.elastic.engine import EngineError
from asupervise.elastic.records import (
    Culprit,
    Member,
    Node,
    RecordError,
    Round,
    Terms,
    read_record,
    text_of,
)

NUMBERS = st.integers(min_value=-1, max_value=10**9)
SECONDS = st.floats(min_value=0.0, max_value=1e9)
TEXTS = st.text(max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=10,
)
MEMBERS = st.builds(
    Member,
    TEXTS,
    TEXTS,
    TEXTS,
    NUMBERS,
    TEXTS,
    st.none() | NUMBERS,
)
CULPRITS = st.builds(
    Culprit,
    node=TEXTS,
    round=NUMBERS,
    rank=st.integers(min_value=0, max_value=10**9),
    age_s=SECONDS,
    uptime_s=SECONDS,
    exitcode=NUMBERS,
    port_taken=st.booleans(),
    failure=st.dictionaries(TEXTS, JSON, max_size=3),
)
RECORDS = st.one_of(
    st.builds(Terms, NUMBERS, NUMBERS, NUMBERS),
    st.builds(
        Node,
        TEXTS,
        TEXTS,
        TEXTS,
        NUMBERS,
        node_rank=st.none() | NUMBERS,
        ready=NUMBERS,
        how=st.sampled_from(["", "failed"]),
    ),
    CULPRITS,
    st.builds(
        Round,
        NUMBERS,
        st.sampled_from(["open", "running", "over"]),
        members=st.lists(MEMBERS, max_size=3).map(tuple),
        delay_s=SECONDS,
        why=TEXTS,
        succeeded=st.booleans(),
        culprit=st.none() | CULPRITS,
        order=st.lists(TEXTS, max_size=3).map(tuple),
        lost=st.lists(TEXTS, max_size=3).map(tuple),
    ),
)


@given(RECORDS)
def test_what_is_written_is_read(record) -> None:
    assert read_record(type(record), text_of(record), "key") == record


@given(RECORDS, st.text(max_size=10).filter(bool), JSON)
def test_what_a_later_version_adds_is_left_out(record, name: str, value) -> None:
    data = json.loads(text_of(record))
    if name not in data and name not in set(record._fields):
        data[name] = value
        assert read_record(type(record), json.dumps(data), "key") == record


@given(st.sampled_from([Culprit, Node, Round, Terms]), JSON | st.text() | st.binary())
def test_whatever_else_is_there_is_one_clear_error(kind, found) -> None:
    text = found if isinstance(found, str) else json.dumps(found, default=str)
    with pytest.raises(RecordError, match=f"^some/key: no {kind.__name__.lower()} that this"):
        read_record(kind, text, "some/key")


@given(RECORDS, st.data())
def test_values_of_other_types_are_refused(record, data: st.DataObject) -> None:
    changed = json.loads(text_of(record))
    name = data.draw(st.sampled_from(sorted(set(changed) - {"format", "failure"})))
    value = data.draw(st.sampled_from([None, True, 1, 1.5, "text", [1], {"a": 1}, [[]], [None]]))
    changed[name] = value
    try:
        read = read_record(type(record), json.dumps(changed), "key")
    except RecordError:
        return
    # Then it is of the right type, as far as anybody can tell: it can be written again.
    assert read_record(type(record), text_of(read), "key") == read


def test_an_endless_nesting_is_one_clear_error() -> None:
    with pytest.raises(RecordError):
        read_record(Round, "[" * 100_000, "key")


def test_it_is_an_engines_error() -> None:
    assert issubclass(RecordError, EngineError)


def test_ranks_are_laid_out_node_by_node() -> None:
    members = [Member(name, name, "", nproc) for name, nproc in [("a", 3), ("b", 1), ("c", 2)]]
    round = Round(0, "running", members=tuple(members))
    assert [round.first_rank(place) for place in range(3)] == [0, 3, 4]
    assert round.world_size == 6
    assert [round.group_rank(name) for name in "abcd"] == [0, 1, 2, None]
