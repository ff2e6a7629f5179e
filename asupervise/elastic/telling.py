"""Tells an event bus what becomes of a run, between its groups."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from asupervise.bus import EventBus
from asupervise.elastic.records import Culprit, Round

if TYPE_CHECKING:
    from signal import Signals

    from asupervise.result import RunProcsResult

__all__ = ["RunTeller"]


class RunTeller:
    """What becomes of one run on this node, as events of it.

    Args:
        bus: who is told.
        run_id: of the run.
        max_restarts: of the run.
    """

    def __init__(self, bus: EventBus, run_id: str, max_restarts: int) -> None:
        self.bus = bus
        self._max_restarts = max_restarts
        self._ids = {"run_id": run_id, "node": os.uname().nodename}
        self._last: Round | None = None

    def round_is_news(self, round: Round) -> bool:
        """Tell of a round, where that has not been done; returns whether it had not."""
        last = self._last
        known = last is not None and (round.number, round.state == "over") <= (
            last.number, last.state == "over",
        )  # fmt: skip
        if known:
            return False
        self._last = round
        if last is not None and round.number > last.number:
            for host in round.lost:
                self.bus.tell("MemberLost", **self._ids, member=host, reason=round.why)
        if last is not None and round.restarts > last.restarts:
            self._restarting(round)
        return True

    def _restarting(self, round: Round) -> None:
        self.bus.tell(
            "Restarting", **self._ids, restarts=round.restarts, max_restarts=self._max_restarts,
            reason=round.why, delay_s=round.delay_s,
        )  # fmt: skip

    def round_completed(self, round: Round) -> None:
        """It has its members, and this node is one."""
        hosts = tuple(member.host or member.address or member.id for member in round.members)
        self.bus.tell(
            "RoundCompleted", **self._ids,
            round=round.number, members=hosts, world_size=round.world_size,
        )  # fmt: skip

    def ended(
        self,
        round: Round | None,
        culprit: Culprit | None,
        result: RunProcsResult | None,
        stopped_by: Signals | None = None,
    ) -> None:
        """There will be no other group.

        Args:
            round: the last state of the run, as far as this node knows.
            culprit: what it failed of.
            result: of this node's last group.
            stopped_by: the signal by which this node was told to leave.
        """
        succeeded = round is not None and round.succeeded
        over = round is not None and round.state == "over"
        status = 0 if succeeded else _status(culprit, result)
        # What an unfinished round says is why it began.
        why = round.why if round is not None and over else "this node was told to leave the run"
        if stopped_by is not None:
            status = 128 + stopped_by
            why = why if culprit is not None else f"interrupted by {stopped_by.name}"
        self.bus.tell(
            "RunEnded", **self._ids,
            succeeded=succeeded,
            why=why,
            exit_status=status,
            root_cause=culprit.rank if culprit is not None else None,
            signal=stopped_by.name if stopped_by is not None else "",
        )  # fmt: skip

    def broke_off(self, error: BaseException) -> None:
        """It could not be run (any further)."""
        self.bus.tell("RunEnded", **self._ids, succeeded=False, why=str(error), exit_status=1)


def _status(culprit: Culprit | None, result: RunProcsResult | None) -> int:
    # Imported here: most runs end well.
    from asupervise.failures import exit_status

    if culprit is not None:
        return exit_status(culprit.exitcode)
    cause = result.root_cause if result is not None else None
    return (exit_status(cause[1].exitcode) if cause else 0) or 1
