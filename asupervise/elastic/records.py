"""What the nodes of a run write down for each other, as text: pure.

Whatever is read is distrusted: it may come from another version of us, or from somebody else.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeVar, get_type_hints

from asupervise.errors import EngineError

__all__ = [
    "Culprit",
    "Member",
    "Node",
    "RecordError",
    "Round",
    "Terms",
    "read_record",
    "text_of",
]

FORMAT: Final = 1

R = TypeVar("R", "Culprit", "Node", "Round", "Terms")


class RecordError(EngineError):
    """What is written there is none of ours; to ask again brings nothing else."""


# NamedTuples: a frozen dataclass costs every start of the command line half a millisecond more.
class Terms(NamedTuple):
    """What all nodes of a run must agree on before they begin.

    Attributes:
        min_nodes: fewest nodes to run with.
        max_nodes: most.
        max_restarts: how often the whole job is restarted after failures.
    """

    min_nodes: int
    max_nodes: int
    max_restarts: int = 0


class Node(NamedTuple):
    """One node, as it presents itself.

    Attributes:
        id: its own, and another one after each loss of its lease.
        host: its name, for people.
        address: where the others reach it.
        nproc: how many workers it starts.
        role: of its workers.
        node_rank: the place that it was given, or None.
        port: free there for `MASTER_PORT`, and held.
        ready: the round that it is prepared for: nothing of an earlier one runs there.
        done: the last round that it has ended.
        how: how that ended there: ``"succeeded"``, ``"failed"``, ``"stopped"``.
        told: the engine's revision with the last of what it has told of failures.
    """

    id: str
    host: str
    address: str
    nproc: int
    role: str = "default"
    node_rank: int | None = None
    port: int = 0
    ready: int = -1
    done: int = -1
    how: str = ""
    told: int = 0


class Member(NamedTuple):
    """A node in a round; its place there is its `GROUP_RANK`.

    A row and no record of its own, in text too: in a round of 1,000 each node reads 1,000 of them.
    """

    id: str
    host: str
    address: str
    nproc: int
    role: str = "default"
    node_rank: int | None = None


class Culprit(NamedTuple):
    """A node's first failure of its own in a round.

    Attributes:
        node: its id.
        round: the round's number.
        rank: global rank.
        age_s: how long ago the failure was when this was written, on the node's own clock.
        uptime_s: how long the worker had run.
        exitcode: as in `ProcessFailure`.
        port_taken: whether it is that rank 0's port was in use.
        failure: all of it, for the report (`cause_over_nodes`).
    """

    node: str
    round: int
    rank: int
    age_s: float = 0.0
    uptime_s: float = 0.0
    exitcode: int = 1
    port_taken: bool = False
    failure: Mapping[str, Any] = MappingProxyType({})


class Round(NamedTuple):
    """A round of the run; there is one at a time.

    Attributes:
        number: grows by one with each.
        state: ``"open"``: nodes get ready; ``"running"``; ``"over"``: the run has ended.
        members: by group rank; empty while it is open.
        master_port: where rank 0's node holds a port.
        restarts: how many failures the job has survived so far.
        broken: how many of the last ones were broken starts, one after the other.
        retries: how many of the last rounds ended because the port was taken.
        delay_s: what each node waits before it gets ready.
        why: why there is this round, or why the run is over, in a sentence.
        succeeded: of a run that is over.
        culprit: what it failed of, if it did.
        order: ids of the former round's members, whose places are kept.
        lost: hosts of those of them whose lease has ended: why there is this round.
    """

    number: int
    state: str
    members: tuple[Member, ...] = ()
    master_port: int = 0
    restarts: int = 0
    broken: int = 0
    retries: int = 0
    delay_s: float = 0.0
    why: str = ""
    succeeded: bool = False
    culprit: Culprit | None = None
    order: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return sum(member.nproc for member in self.members)

    def group_rank(self, node: str) -> int | None:
        """The place of a node, by its id; None if it is no member."""
        for rank, member in enumerate(self.members):
            if member.id == node:
                return rank
        return None

    def first_rank(self, group_rank: int) -> int:
        """The global rank of a node's local rank 0: ranks are laid out node by node."""
        return sum(member.nproc for member in self.members[:group_rank])


def text_of(record: Terms | Node | Round | Culprit) -> str:
    """The record as text."""
    # Imported here: a run of one node writes nothing down.
    import json

    return json.dumps({"format": FORMAT, **_data_of(record)}, separators=(",", ":"))


def _data_of(record: Terms | Node | Round | Culprit) -> dict[str, Any]:
    data = record._asdict()
    if isinstance(record, Round) and record.culprit is not None:
        data["culprit"] = _data_of(record.culprit)
    if isinstance(record, Culprit):
        data["failure"] = dict(record.failure)
    return data


def read_record(kind: type[R], text: str, key: str) -> R:
    """The record that a key holds.

    Raises:
        RecordError: if that is none of ours, naming the key.
    """
    import json

    try:
        data = json.loads(text)
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError("another format")
        made: R = _made(kind, data)
        return made
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as exc:
        raise RecordError(
            f"{key}: no {kind.__name__.lower()} that this version of asupervise knows: {exc}"
        ) from None


def _made(kind: Any, data: dict[str, Any]) -> Any:
    hints = _hints(kind)
    # What a later version has added is none of ours.
    values = {name: _checked(hints[name], name, v) for name, v in data.items() if name in hints}
    return kind(**values)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of its fields. Evaluated once: it takes longer than all the rest."""
    return get_type_hints(kind)


_MEMBER_TYPES: Final = ((str, str, str, int, str, type(None)), (str, str, str, int, str, int))


def _member(row: Any) -> Member:
    # Here, too, a later version may have added something.
    known = row[: len(Member._fields)]
    if tuple(map(type, known)) not in _MEMBER_TYPES:
        raise ValueError(f"members: {row!r}")
    return Member._make(known)


def _checked(hint: Any, name: str, value: Any) -> Any:
    if name == "rank" and type(value) is int and value < 0:
        raise ValueError(f"rank: {value}")  # and what tells of ranks could not tell of it
    if type(value) is hint:
        return value
    if hint == tuple[Member, ...]:
        return tuple(map(_member, value))
    if hint == tuple[str, ...]:
        return tuple(str(item) for item in value)
    if hint == Culprit | None:
        return None if value is None else _made(Culprit, value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = dict if hint == Mapping[str, Any] else hint
    if isinstance(value, bool) is not (hint is bool) or not isinstance(value, expected):
        raise ValueError(f"{name}: {value!r}")
    return value
