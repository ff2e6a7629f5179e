"""What becomes of a run: pure. One node at a time decides, from what all have written down.

open ──(enough nodes are ready)──► running ──(all succeeded)──► over
  ▲                                  │ │
  └──(a failure, a node lost or new)─┘ └──(no restart is left)──► over
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from asupervise.elastic.records import Culprit, Member, Node, Round, Terms

__all__ = ["Clock", "Policy", "View", "after_failure", "decide", "earliest"]

# A port that somebody takes between our choice and rank 0's use of it: so often at the most in a
# row a round is tried again for it.
_PORT_RETRIES: Final = 3


class Policy(NamedTuple):
    """When to try again, and, over several nodes, when to begin a round.

    `run_services` takes one; `launch` makes its own of `LaunchConfig`.

    Attributes:
        last_call_s: how long more nodes are waited for once there are enough, in the first round;
            services have no nodes.
        join_timeout_s: how long enough nodes are waited for; the same.
        min_uptime_s: a worker that fails sooner is a broken start.
        max_broken_starts: so many of them in a row end the run, whatever restarts are left.
        backoff_s: the wait before the first restart, doubled with each further one in a row.
        backoff_max_s: the longest such wait.
        stable_s: a failure after so long a run begins the doubling anew.

    Example:
        >>> Policy(backoff_s=0.5, backoff_max_s=8.0).delay_s(3, spread=1.0)
        2.0
    """

    last_call_s: float = 30.0
    join_timeout_s: float = 600.0
    min_uptime_s: float = 1.0
    max_broken_starts: int = 3
    backoff_s: float = 1.0
    backoff_max_s: float = 30.0
    stable_s: float = 300.0

    def delay_s(self, in_a_row: int, spread: float) -> float:
        """The wait before a restart.

        Args:
            in_a_row: how many restarts there were in a row, this one included.
            spread: 0 to 1; the wait lies between a half and the whole, so that jobs that failed
                of one cause do not come back at one moment.
        """
        whole = min(self.backoff_max_s, self.backoff_s * 2.0 ** min(in_a_row - 1, 32))
        return whole * (0.5 + 0.5 * spread)


class Clock(NamedTuple):
    """Of the deciding node, in seconds on its monotonic clock.

    Attributes:
        now: the present.
        opened: since when this round has been open, as far as the node knows.
        enough: since when there have been enough nodes; None while there are not.
    """

    now: float
    opened: float
    enough: float | None


class View(NamedTuple):
    """What is written down, as the deciding node knows it.

    Attributes:
        round: the present one.
        nodes: those whose lease lasts, with the revision at which each has come.
        culprits: failures of this round, with the time at which each became known here.
    """

    round: Round
    nodes: Mapping[str, tuple[Node, int]]
    culprits: Sequence[tuple[Culprit, float]] = ()

    @property
    def ready(self) -> list[Node]:
        """The nodes that are prepared for this round, in the order of their places in it."""
        former = {node: place for place, node in enumerate(self.round.order)}

        def place(item: tuple[Node, int]) -> tuple[float, float, int]:
            node, created = item
            given = math.inf if node.node_rank is None else node.node_rank
            return given, former.get(node.id, math.inf), created

        return [node for node, _ in sorted(self._prepared, key=place)]

    @property
    def ready_count(self) -> int:
        """How many they are: asked with every node that comes, where their order is not."""
        return len(self._prepared)

    @property
    def _prepared(self) -> list[tuple[Node, int]]:
        number = self.round.number
        return [item for item in self.nodes.values() if item[0].ready == number]


def decide(view: View, terms: Terms, policy: Policy, clock: Clock) -> Round | float | None:
    """What follows.

    Returns:
        The round as it is to be from now on; or when to ask again, should nothing change until
        then; or None, if there is nothing to wait for but changes.
    """
    if view.round.state == "open":
        return _of_open(view, terms, policy, clock)
    if view.round.state == "running":
        return _of_running(view, terms, policy)
    return None


def _of_open(view: View, terms: Terms, policy: Policy, clock: Clock) -> Round | float | None:
    ready = view.ready_count
    if ready >= terms.max_nodes:
        return _begun(view.round, view.ready[: terms.max_nodes])
    give_up = clock.opened + policy.join_timeout_s
    if ready >= terms.min_nodes:
        # Whoever is late for a later round causes another one; before the first there is nothing
        # that would be interrupted by it.
        complete = view.round.number > 0 and ready == len(view.nodes)
        due = (clock.now if clock.enough is None else clock.enough) + policy.last_call_s
        return _begun(view.round, view.ready) if complete or clock.now >= due else due
    if clock.now >= give_up:
        return view.round._replace(
            state="over",
            culprit=None,
            why=f"{ready} of at least {terms.min_nodes} nodes came within "
            f"{policy.join_timeout_s:g} s",
        )
    return give_up


def _begun(round: Round, nodes: Sequence[Node]) -> Round:
    members = tuple(Member(n.id, n.host, n.address, n.nproc, n.role, n.node_rank) for n in nodes)
    return round._replace(state="running", members=members, master_port=nodes[0].port)


def _of_running(view: View, terms: Terms, policy: Policy) -> Round | None:
    round = view.round
    here = [view.nodes[m.id][0] for m in round.members if m.id in view.nodes]
    lost = [m for m in round.members if m.id not in view.nodes]
    ended = [node for node in here if node.done == round.number]
    if lost:
        # Even where another has failed: what is left when a node goes breaks of that.
        hosts = tuple(member.host for member in lost)
        return _opened(round, f"node {', '.join(hosts)} is lost")._replace(lost=hosts)
    if view.culprits:
        # Only when all have answered is it certain that none of them was lost before.
        if len(ended) < len(here):
            return None
        return after_failure(round, earliest(view.culprits), terms, policy)
    if len(ended) == len(round.members):
        if all(node.how == "succeeded" for node in ended):
            return round._replace(
                state="over", succeeded=True, culprit=None, why="all workers succeeded"
            )
        return _opened(round, "a node has ended its workers")
    waiting = len(view.nodes) - len(here)
    if waiting and not ended and len(round.members) < terms.max_nodes:
        return _opened(round, "a node has joined")
    return None


def _opened(round: Round, why: str, **changes: float) -> Round:
    return Round(
        number=round.number + 1,
        state="open",
        restarts=int(changes.get("restarts", round.restarts)),
        broken=int(changes.get("broken", round.broken)),
        retries=int(changes.get("retries", 0)),
        delay_s=float(changes.get("delay_s", 0.0)),
        why=why,
        order=tuple(member.id for member in round.members),
    )


def earliest(culprits: Sequence[tuple[Culprit, float]]) -> Culprit:
    """Who failed first.

    No node's wall clock is compared with another's: how old a failure was when it was written
    down is known by its node's own monotonic clock, when it came here by ours. What is left is
    the difference of two ways through the network. Ties: the order in which they came.
    """
    return min(culprits, key=lambda known: known[1] - known[0].age_s)[0]


def after_failure(
    round: Round,
    culprit: Culprit,
    terms: Terms,
    policy: Policy,
    spread: Callable[[], float] | None = None,
) -> Round:
    """The next round, or the end of the run, after a round of which all workers have ended."""
    if spread is None:
        # Imported here: who restarts nothing has no use for it.
        from random import random

        spread = random
    why = f"rank {culprit.rank} failed"
    if culprit.port_taken and round.retries:
        why = f"rank 0's port {round.master_port} was taken {round.retries + 1} times in a row"
    if culprit.port_taken and round.retries < _PORT_RETRIES:
        return _opened(round, "rank 0's port was taken", retries=round.retries + 1)
    broken = round.broken + 1 if culprit.uptime_s < policy.min_uptime_s else 0
    over = round._replace(state="over", succeeded=False, culprit=culprit, why=why, broken=broken)
    if round.restarts >= terms.max_restarts:
        used = f"all {round.restarts} restarts are" if round.restarts > 1 else "the one restart is"
        return over._replace(why=f"{why}: {used} used up") if round.restarts else over
    if broken >= policy.max_broken_starts:
        return over._replace(
            why=f"{why}: {broken} times in a row sooner than {policy.min_uptime_s:g} s after its "
            "start, which no restart mends",
        )
    in_a_row = 1 if culprit.uptime_s >= policy.stable_s else round.restarts + 1
    again = _opened(
        round,
        f"{why}: restart {round.restarts + 1} of {terms.max_restarts}",
        restarts=round.restarts + 1,
        broken=broken,
        delay_s=policy.delay_s(in_a_row, spread()),
    )
    return again._replace(culprit=culprit)
