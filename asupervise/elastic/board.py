"""What one node knows of a run: what is written under ``state/``, kept up to date by a watch."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Final

from asupervise.elastic.engine import Change, Engine, EngineError, Entry
from asupervise.elastic.records import Culprit, RecordError, Round, Terms, read_record

__all__ = ["FAILED", "FOR_GOOD", "LEADER", "ROUND", "Board", "TermsError"]

ROUND: Final = "state/round"
LEADER: Final = "state/leader"
FAILED: Final = "state/failed/"


class TermsError(EngineError):
    """This node and the run do not fit: other numbers of nodes, a place that is taken."""


# To try again brings nothing else.
FOR_GOOD: Final = (TermsError, RecordError)


class Board:
    """The present round, who leads, and who has failed, as far as this node knows.

    Args:
        engine: where it is written.
        terms: that all nodes share.

    Attributes:
        round: the present one, or None.
        round_entry: the entry that holds it.
        leader: the entry that says who leads, or None.
        failed: each node's failure in the present round, and when it became known here.
        last: the last round that we knew, should the engine lose it.
        revision: how far we know what is written.
        heard: how often there were news.
        broken: why nothing more will be known.
    """

    def __init__(self, engine: Engine, terms: Terms) -> None:
        self._engine = engine
        self._terms = terms
        self._news = asyncio.Event()
        self.round: Round | None = None
        self.round_entry: Entry | None = None
        self.leader: Entry | None = None
        self.failed: dict[str, tuple[Culprit, float]] = {}
        self.last: Round | None = None
        self.revision = 0
        self.heard = 0
        self.broken: BaseException | None = None

    @property
    def leader_id(self) -> str:
        """The id of the node that leads; "" for none."""
        return "" if self.leader is None else str(json.loads(self.leader.value).get("leader", ""))

    def fail(self, error: BaseException) -> None:
        """Let everybody who waits for news have this error."""
        self.broken = self.broken or error
        self.tell()

    async def load(self, *, anew: bool = False) -> int:
        snapshot = await self._engine.read("state/")
        if snapshot.revision < self.revision and not anew:
            # The watch was faster: this is older than what we know.
            self.tell()
            return self.revision
        self.revision = snapshot.revision
        self.round, self.round_entry, self.leader, self.failed = None, None, None, {}
        for key, entry in snapshot.entries.items():
            self.learn(Change(key, entry, entry.modified))
        self.tell()
        return snapshot.revision

    async def follow(self, revision: int) -> None:
        while True:
            try:
                async for changes in self._engine.watch("state/", revision):
                    for change in changes:
                        self.learn(change)
                    self.tell()
            except FOR_GOOD:
                raise
            except EngineError:
                revision = await self._loaded_again()

    async def _loaded_again(self) -> int:
        """Read all anew, as soon as the engine can be had; the lease decides what that means."""
        while True:
            await self.pause()
            try:
                return await self.load(anew=True)
            except FOR_GOOD:
                raise
            except EngineError:
                continue

    def learn(self, change: Change) -> None:
        key, entry = change.key, change.entry
        self.revision = max(self.revision, change.revision)
        known = {LEADER: self.leader, ROUND: self.round_entry}.get(key)
        if known is not None and change.revision < known.modified:
            return  # read already, in a newer state than the watch has come to
        if key == LEADER:
            self.leader = entry
            if entry is not None:
                self._check_terms(entry)
        elif key == ROUND:
            self.round_entry = entry
            self.round = None if entry is None else read_record(Round, entry.value, key)
            if self.round is not None:
                self.last = self.round
            self.failed = {
                node: known
                for node, known in self.failed.items()
                if self.round is not None and known[0].round == self.round.number
            }
        elif key.startswith(FAILED) and entry is not None:
            culprit = read_record(Culprit, entry.value, key)
            if self.round is not None and culprit.round >= self.round.number:
                # What is written again tells more of the same failure, at another age.
                self.failed[culprit.node] = (culprit, time.monotonic())

    def _check_terms(self, entry: Entry) -> None:
        theirs = read_record(Terms, entry.value, LEADER)
        if theirs != self._terms:
            raise TermsError(
                f"this node was started with {_said(self._terms)}, the run has {_said(theirs)}",
                hint="all nodes of a run are started with the same --nnodes and --max-restarts",
            )

    def tell(self) -> None:
        self.heard += 1
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def next_news(self, after: int | None = None) -> None:
        """Wait until there are some.

        Args:
            after: what `heard` was when the caller looked; to be given by whoever has awaited
                something else since, for there may have been news meanwhile, and the last ones.
        """
        if self.broken is not None:
            raise self.broken
        if after is None or after == self.heard:
            await self._news.wait()
        if self.broken is not None:
            raise self.broken

    async def pause(self) -> None:
        """Before something is tried again that the engine has refused, for the moment."""
        await asyncio.sleep(min(1.0, self._engine.lease_s / 10))


def _said(terms: Terms) -> str:
    return f"--nnodes={terms.min_nodes}:{terms.max_nodes} --max-restarts={terms.max_restarts}"
