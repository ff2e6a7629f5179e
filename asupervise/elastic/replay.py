"""Keys, transactions and leases out of a log of commands that every node reads: pure.

Each node applies the same commands in the same order to a map of keys of its own, and nothing but
the commands decides what becomes of them: so all maps are equal at each place of the log, and that
place is the revision. Only *when* a lease ends is for the nodes' clocks: whoever has applied no
beat of it for long enough asks for its end in a command that names the last beat it knows; that
comes true only where no later beat stands before it in the log.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from asupervise.elastic.engine import (
    Absent,
    Change,
    Condition,
    Delete,
    Entry,
    Put,
    Snapshot,
    Unchanged,
    Write,
)
from asupervise.elastic.records import RecordError

__all__ = ["NOTHING", "Applied", "Command", "Replica", "command_of"]

FORMAT: Final = 1

_DOINGS: Final = ("beat", "begin", "commit", "end", "expire", "nothing")


@dataclass(frozen=True)
class Command:
    """An entry of the log.

    Attributes:
        do: ``"commit"``: write if all conditions hold; ``"begin"``, ``"beat"``, ``"end"``: a lease
            begins, lives on, is given back; ``"expire"``: a lease has not been heard of for too
            long; ``"nothing"``.
        id: no other command has it.
        lease: which one; of a commit: for the writes that are leased.
        lease_s: how long it lasts after each sign of life.
        last: of ``"expire"``: the place in the log of the last sign of life that is known.
        conditions: of a commit.
        writes: of a commit.
    """

    do: str
    id: str = ""
    lease: str = ""
    lease_s: float = 0.0
    last: int = 0
    conditions: tuple[Condition, ...] = ()
    writes: tuple[Write, ...] = ()

    def text(self) -> str:
        """As it stands in the log."""
        data: dict[str, Any] = {"format": FORMAT, "do": self.do, "id": self.id}
        if self.lease:
            data["lease"] = self.lease
        if self.do == "begin":
            data["lease_s"] = self.lease_s
        if self.do == "expire":
            data["last"] = self.last
        if self.conditions:
            data["if"] = [[type(c).__name__, *c] for c in self.conditions]
        if self.writes:
            data["then"] = [[type(w).__name__, *w] for w in self.writes]
        return json.dumps(data, separators=(",", ":"))


# What is put where somebody has taken a place and written nothing.
NOTHING: Final = Command("nothing").text()

_PARTS: Final[Mapping[str, tuple[Any, tuple[type, ...]]]] = {
    "Absent": (Absent, (str,)),
    "Unchanged": (Unchanged, (str, int)),
    "Put": (Put, (str, str, bool, float)),
    "Delete": (Delete, (str, bool)),
}


def command_of(text: str, index: int) -> Command:
    """The command at a place of the log.

    Raises:
        RecordError: if this is none. To skip it would be to disagree with those who know it.
    """
    try:
        data = json.loads(text)
        if data["format"] != FORMAT or data["do"] not in _DOINGS:
            raise ValueError("another format")
        return Command(
            data["do"],
            str(data["id"]),
            str(data.get("lease", "")),
            float(data.get("lease_s", 0.0)),
            int(data.get("last", 0)),
            tuple(_part(item) for item in data.get("if", ())),
            tuple(_part(item) for item in data.get("then", ())),
        )
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as exc:
        raise RecordError(
            f"entry {index} of the log is none that this version of asupervise knows: {exc!r}"
        ) from None


def _part(item: list[Any]) -> Any:
    kind, types = _PARTS[item[0]]
    values = item[1:]
    for value, expected in zip(values, types, strict=True):
        if not isinstance(value, (int, float) if expected is float else expected):
            raise ValueError(f"{item[0]}: {value!r}")
    return kind(*values)


class Applied(NamedTuple):
    """What became of a command.

    Attributes:
        changes: of keys.
        done: whether it had its effect: the conditions held, the lease was there.
        lease_lost: it had none because the lease is not there.
    """

    changes: tuple[Change, ...] = ()
    done: bool = True
    lease_lost: bool = False


@dataclass
class _Lease:
    lease_s: float
    last: int
    seen: float


@dataclass
class Replica:
    """All keys and leases after the first `index` commands of a log.

    Times are seconds on the caller's monotonic clock.
    """

    index: int = 0
    _entries: dict[str, Entry] = field(default_factory=dict)
    _owners: dict[str, str] = field(default_factory=dict)
    _leases: dict[str, _Lease] = field(default_factory=dict)

    @property
    def leases(self) -> frozenset[str]:
        """Those that last."""
        return frozenset(self._leases)

    def read(self, under: str = "") -> Snapshot:
        """The keys that begin with `under`."""
        entries = {key: entry for key, entry in self._entries.items() if key.startswith(under)}
        return Snapshot(entries, self.index)

    def apply(self, command: Command, now: float) -> Applied:
        """Do what the next command in the log says."""
        self.index += 1
        if command.do == "commit":
            return self._commit(command, now)
        if command.do == "begin":
            self._leases[command.lease] = _Lease(command.lease_s, self.index, now)
            return Applied()
        if command.do == "nothing":
            return Applied()
        lease = self._leases.get(command.lease)
        if lease is None:
            return Applied(done=False, lease_lost=True)
        if command.do == "beat":
            lease.last, lease.seen = self.index, now
            return Applied()
        if command.do == "expire" and lease.last != command.last:
            return Applied(done=False)
        return Applied(self._ended(command.lease))

    def _commit(self, command: Command, now: float) -> Applied:
        if not all(self._holds(condition) for condition in command.conditions):
            return Applied(done=False)
        leased = any(isinstance(write, Put) and write.leased for write in command.writes)
        if leased and command.lease not in self._leases:
            return Applied(done=False, lease_lost=True)
        changes: dict[str, Change] = {}
        for number, write in enumerate(command.writes):
            for change in self._write(write, command.lease, number, now):
                changes[change.key] = change
        return Applied(tuple(changes.values()))

    def _holds(self, condition: Condition) -> bool:
        entry = self._entries.get(condition.key)
        if isinstance(condition, Absent):
            return entry is None
        return entry is not None and entry.modified == condition.modified

    def _write(self, write: Write, lease: str, number: int, now: float) -> list[Change]:
        if isinstance(write, Delete):
            return [
                self._removed(key)
                for key in list(self._entries)
                if key == write.key or (write.under and key.startswith(write.key))
            ]
        former = self._entries.get(write.key)
        entry = Entry(write.value, former.created if former else self.index, self.index)
        self._entries[write.key] = entry
        self._owners.pop(write.key, None)
        if write.leased:
            self._owners[write.key] = lease
        elif write.keep_s:
            # A lease of its own that nobody renews.
            kept = f"keep/{self.index}/{number}"
            self._leases[kept] = _Lease(write.keep_s, self.index, now)
            self._owners[write.key] = kept
        return [Change(write.key, entry, self.index)]

    def _removed(self, key: str) -> Change:
        del self._entries[key]
        self._owners.pop(key, None)
        return Change(key, None, self.index)

    def _ended(self, lease: str) -> tuple[Change, ...]:
        del self._leases[lease]
        owned = [key for key, owner in self._owners.items() if owner == lease]
        return tuple(self._removed(key) for key in owned)

    # --- the leases' ends --------------------------------------------------------------------

    def next_end(self, but: str = "") -> float:
        """When the first lease is due to end if it is not heard of; `inf` if there is none.

        Args:
            but: a lease that is left out: who asks knows best about its own.
        """
        ends = [lease.seen + lease.lease_s for name, lease in self._leases.items() if name != but]
        return min(ends, default=float("inf"))

    def overdue(self, now: float, but: str = "") -> list[Command]:
        """What is to be appended about leases that have not been heard of for too long."""
        return [
            Command("expire", lease=name, last=lease.last)
            for name, lease in self._leases.items()
            if name != but and now >= lease.seen + lease.lease_s
        ]

    # --- for those who come late -------------------------------------------------------------

    def text(self) -> str:
        """All of it, in place of the commands until here."""
        entries = {k: [*entry, self._owners.get(k, "")] for k, entry in self._entries.items()}
        leases = {name: [lease.lease_s, lease.last] for name, lease in self._leases.items()}
        data = {"format": FORMAT, "index": self.index, "entries": entries, "leases": leases}
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def of(cls, text: str, now: float) -> Replica:
        """What :meth:`text` has written; the leases count as heard of just now.

        Raises:
            RecordError: if this is none.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError("another format")
            entries = {
                str(key): (Entry(str(value), int(created), int(modified)), str(owner))
                for key, (value, created, modified, owner) in data["entries"].items()
            }
            return cls(
                int(data["index"]),
                {key: entry for key, (entry, _) in entries.items()},
                {key: owner for key, (_, owner) in entries.items() if owner},
                {n: _Lease(float(s), int(last), now) for n, (s, last) in data["leases"].items()},
            )
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as exc:
            raise RecordError(
                f"the log's summary is none that this version of asupervise knows: {exc!r}"
            ) from None
