"""Events as values: what each holds, into JSON and back, and what is refused without raising."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

import asupervise
from asupervise import events
from asupervise.events import KINDS, Event, Warned, WorkerEvent, from_dict

ROOT = Path(__file__).resolve().parent.parent
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

# Whatever a worker, a path or a host may be called; a lone surrogate included.
texts = st.text(st.characters(), max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False)


def of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple:
        return st.lists(of(args[0]), max_size=3).map(tuple)
    if args and type(None) in args:
        return st.none() | of(args[0])
    if origin is not None:  # the one mapping that there is
        return st.dictionaries(st.integers(0, 1 << 20), texts, max_size=3)
    return {
        int: st.integers(1 - 2**63, 2**63 - 1), float: numbers, str: texts, bool: st.booleans(),
    }[hint]  # fmt: skip


def made(kind: type[Event]) -> st.SearchStrategy[Event]:
    hints = get_type_hints(kind)
    return st.builds(kind, **{each.name: of(hints[each.name]) for each in dataclasses.fields(kind)})


@every_kind
@given(data=st.data())
def test_each_kind_comes_back_from_json(kind: type[Event], data: st.DataObject) -> None:
    event = data.draw(made(kind))
    line = json.dumps(event.as_dict())
    assert "\n" not in line
    assert json.loads(line)["event"] == kind.kind
    assert from_dict(json.loads(line)) == event


@every_kind
def test_each_kind_is_frozen_and_knows_no_places(kind: type[Event]) -> None:
    event = _least(kind)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.time = 1.0
    with pytest.raises(TypeError):
        kind(1, 2.0)


def _least(kind: type[Event]) -> Event:
    """With no more than must be there."""
    values = {int: 1, float: 2.0, str: "x", bool: False}
    hints = get_type_hints(kind)
    return kind(**{
        each.name: values[hints[each.name]]
        for each in dataclasses.fields(kind)
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    })  # fmt: skip


def test_kinds_has_every_kind() -> None:
    def below(kind: type[Event]) -> set[type[Event]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    assert set(KINDS.values()) == below(Event) - {Event, WorkerEvent}
    for name, kind in KINDS.items():
        words = re.findall("[A-Z][a-z]*", kind.__name__)
        assert name == kind.kind == "_".join(words).lower()
        assert kind.__name__ in events.__all__


@pytest.mark.parametrize("kind", [Event, WorkerEvent, *KINDS.values()])
def test_each_field_is_documented(kind: type[Event]) -> None:
    own = [name for name in inspect.get_annotations(kind) if name != "kind"]
    doc = inspect.getdoc(kind) or ""
    documented = re.findall(r"^    (\w+): ", doc.partition("Attributes:")[2], re.MULTILINE)
    assert documented == own


def test_events_are_public() -> None:
    assert asupervise.events is events
    assert asupervise.EventBus.__module__ == "asupervise.bus"


# --- what is read is distrusted -----------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(list(KINDS)), st.data())
def test_reading_never_raises_and_what_it_returns_is_sound(kind: str, data: st.DataObject) -> None:
    names = [each.name for each in dataclasses.fields(KINDS[kind])]
    values = data.draw(st.dictionaries(st.sampled_from(names) | texts, json_values))
    valid = data.draw(st.none() | made(KINDS[kind]))
    event = from_dict({**(valid.as_dict() if valid else {}), **values, "event": kind})
    if event is not None:
        assert type(event) is KINDS[kind]
        assert from_dict(json.loads(json.dumps(event.as_dict(), allow_nan=False))) == event


@given(json_values)
def test_nothing_that_is_no_event_is_taken_for_one(value: Any) -> None:
    assert from_dict(value) is None


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"text": "full", "later": 1}, "full"),  # of a later version
        ({"text": "full", "attempt": True}, "full"),
        ({"text": "full", "attempt": "3"}, "full"),
        ({"text": "full", "node": None}, "full"),
        ({"text": 3}, None),
        ({}, None),
        ({"text": "full", "time": float("nan")}, None),
        ({"text": "full", "time": float("inf")}, None),
        ({"text": "full", "time": 10**400}, None),
        ({"text": "full", "time": "1"}, None),
        ({"text": "full", "monotonic_ns": 1.0}, None),
        ({"text": "full", "monotonic_ns": 2**63}, None),
    ],
)
def test_what_is_of_another_type_gets_its_default_or_is_passed_over(
    given: dict[str, Any], read: str | None
) -> None:
    event = from_dict({"event": "warned", "monotonic_ns": 1, "time": 2, **given})
    if read is None:
        assert event is None
    else:
        assert event == Warned(monotonic_ns=1, time=2.0, text=read)


def test_stacks_that_are_of_nobody_are_left_out() -> None:
    stacks = {"0": "in f", "x": "in g", "-1": "in h", "²": "in i", "2": 3, "9" * 5000: "in j"}
    event = from_dict({"event": "stacks_dumped", "monotonic_ns": 1, "time": 2, "stacks": stacks})
    assert isinstance(event, events.StacksDumped)
    assert event.stacks == {0: "in f"}


# --- whoever tells says what the events hold ----------------------------------------------------

TELLERS = ("telling.py", "elastic/telling.py")


def told_in(path: str) -> list[tuple[str, set[str], bool]]:
    """Each event that is told there: its class, the fields that are named, whether of a worker."""
    found = []
    for node in ast.walk(ast.parse((ROOT / "asupervise" / path).read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr not in ("_tell", "_of_worker", "tell") or not node.args:
            continue
        named = {keyword.arg for keyword in node.keywords if keyword.arg} - {"at_ns"}
        first = node.args[0]
        kinds = [first] if isinstance(first, ast.Constant) else []
        found += [(kind.value, named, node.func.attr == "_of_worker") for kind in kinds]
    return found


TOLD = [told for path in TELLERS for told in told_in(path)]


@pytest.mark.parametrize(("kind", "named", "of_worker"), TOLD, ids=[kind for kind, *_ in TOLD])
def test_what_is_told_is_what_the_event_holds(kind: str, named: set[str], of_worker: bool) -> None:
    told = getattr(events, kind)
    fields = {each.name: each for each in dataclasses.fields(told)}
    common = {each.name for each in dataclasses.fields(WorkerEvent if of_worker else Event)}
    assert named <= fields.keys() - common
    needed = {
        name
        for name, each in fields.items()
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    }
    assert needed <= named | common
    assert issubclass(told, WorkerEvent) is of_worker


def test_every_kind_is_told_by_somebody() -> None:
    # `Escalated` and `SignalSent` are one call, whose kind is chosen.
    assert {kind for kind, *_ in TOLD} | {"Escalated"} == {kind.__name__ for kind in KINDS.values()}
