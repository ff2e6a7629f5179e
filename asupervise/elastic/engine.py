"""What the nodes of a run agree through: keys that change in transactions, watches and leases.

etcd is one; whatever gives the same promises can be another. The promises are those of etcd's API
(https://etcd.io/docs/v3.5/learning/api_guarantees/): revisions grow by one with each transaction
that writes, a watch misses nothing and keeps their order, and a leased key outlives
:attr:`Engine.alive_until`, after which nobody can be sure.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from asupervise.errors import EngineError, LeaseLostError

__all__ = [
    "Absent",
    "Change",
    "Condition",
    "Delete",
    "Engine",
    "EngineError",
    "Entry",
    "LeaseLostError",
    "Put",
    "Snapshot",
    "Unchanged",
    "Write",
]


class Entry(NamedTuple):
    """What a key holds.

    Attributes:
        value: text.
        created: the revision at which it came into being.
        modified: the revision at which it was last written.
    """

    value: str
    created: int
    modified: int


class Snapshot(NamedTuple):
    """Keys as they were at one revision."""

    entries: Mapping[str, Entry]
    revision: int


class Change(NamedTuple):
    """A key was written, or is gone: deleted, or its lease has ended."""

    key: str
    entry: Entry | None
    revision: int


class Absent(NamedTuple):
    """A transaction's condition: there is no such key."""

    key: str


class Unchanged(NamedTuple):
    """A transaction's condition: nobody has written the key since this revision."""

    key: str
    modified: int


class Put(NamedTuple):
    """Write a key.

    Attributes:
        leased: it is gone when our lease ends.
        keep_s: it is gone after so many seconds, whatever becomes of us; 0 for never.
    """

    key: str
    value: str
    leased: bool = False
    keep_s: float = 0.0


class Delete(NamedTuple):
    """Remove a key, if it is there; `under`: all keys that begin with it."""

    key: str
    under: bool = False


Condition = Absent | Unchanged
Write = Put | Delete


class Engine(Protocol):
    """A connection to an engine, and our lease there, which it keeps alive.

    Keys are relative to the run. Every method raises `EngineError` when the engine cannot be had
    for too long, and `LeaseLostError` when a leased key was to be written without a lease.

    Attributes:
        lease_s: how long the lease is granted for each time.
        operations: how many calls were made, by name; watches count once each.
        on_renewal: called whenever `alive_until` is another.
    """

    lease_s: float
    operations: dict[str, int]
    on_renewal: Callable[[], None]

    @property
    def alive_until(self) -> float:
        """Until when our leased keys are there for certain: seconds on ``time.monotonic()``."""

    async def new_lease(self) -> None:
        """Begin anew with another lease, after the former has ended."""

    async def read(self, under: str = "") -> Snapshot:
        """All keys that begin with `under`."""

    async def commit(self, conditions: Sequence[Condition], writes: Sequence[Write]) -> int | None:
        """Write all, if all conditions hold, as one transaction.

        Returns:
            Its revision, or None if a condition did not hold.
        """

    def watch(self, under: str, after: int) -> AsyncIterator[Sequence[Change]]:
        """The changes of keys that begin with `under`, from the revision behind `after` on.

        Raises:
            EngineError: as the others; also when what was asked for is forgotten already (a
                compaction) or the engine has lost its data: then read again.
        """

    async def close(self) -> None:
        """Give the lease back, which removes our leased keys, and let go of the engine."""
