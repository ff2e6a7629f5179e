"""How nodes come together: one protocol, several backends.

A backend is found by its name: those that come with us, or an entry point of the group
``asupervise.rendezvous`` that gives a function ``open(request) -> async context manager`` of a
:class:`Rendezvous`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from types import MappingProxyType
from typing import NamedTuple, Protocol

from asupervise.elastic.decide import Policy
from asupervise.elastic.interruption import Interruption
from asupervise.elastic.records import Culprit, Node, Round, Terms

__all__ = ["Opener", "Rendezvous", "Request"]


class Request(NamedTuple):
    """What a backend is given.

    Attributes:
        run_id: names the run.
        node: how this node presents itself; its id is its own.
        terms: that all nodes share.
        policy: when to begin rounds, and when to try again.
        endpoint: of the engine, as given; "" for none.
        conf: the pairs of ``--rdzv-conf``.
        master_addr: as given, or None.
        master_port: as given, or None.
    """

    run_id: str
    node: Node
    terms: Terms
    policy: Policy
    endpoint: str = ""
    conf: Mapping[str, str] = MappingProxyType({})
    master_addr: str | None = None
    master_port: int | None = None


class Rendezvous(Protocol):
    """This node's part in a run: the same calls whatever the backend.

    Attributes:
        node: ourselves; its id changes when the engine has lost us.
        on_opened: set by whoever wants to hear, before it is waited for, that there will be
            another round, and why; called more than once for one, or not at all where it follows
            at once.
    """

    node: Node
    on_opened: Callable[[Round], None]

    async def join(self, port: int) -> Round:
        """Wait for a running round with us in it, or for the run to be over."""

    async def interruption(self) -> Interruption:
        """Wait until our workers are to be ended, for a reason that is not theirs."""

    async def fenced(self) -> float:
        """Wait until our workers must end because the others may soon take us to be gone.

        Returns:
            By when SIGKILL must have been sent: seconds on ``time.monotonic()``.
        """

    def tell_deadlines(self, tell: Callable[[float], None]) -> bool:
        """Call `tell` with when the last of our workers must be dead: now, and whenever it changes.

        Returns:
            False where there is no such moment, because nobody takes our place.
        """

    async def failing(self, culprit: Culprit) -> None:
        """A worker of ours has failed of its own."""

    async def ended(self, how: str) -> None:
        """No worker of ours is left of this round: ``succeeded``, ``failed`` or ``stopped``."""

    async def rejoin(self) -> None:
        """Come back after we were fenced."""


class Opener(Protocol):
    """What a backend's module, or entry point, has as ``open``."""

    def __call__(self, request: Request) -> AbstractAsyncContextManager[Rendezvous]: ...
