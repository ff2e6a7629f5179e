"""Between the tailers of a group and a console: equal lines of many ranks are shown once.

See `dedup` for which lines these are. What cannot be put together, a prompt or a part of a very
long line, goes straight to the console, after all that was said before.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Generic, TypeVar

import anyio

from asupervise.console import Console
from asupervise.dedup import Dedup, Merged
from asupervise.format_framers import json_fields, json_line
from asupervise.formats import Speaker, colored, merged_prefix, stamp
from asupervise.framing import Framed, LineFramer, with_prefix
from asupervise.sinks import Sink
from asupervise.whole_lines import WholeLineFramer

__all__ = ["JsonMerger", "Lane", "Merger", "TextMerger"]

Text = TypeVar("Text", bytes, str)
Spawn = Callable[[Callable[[], Coroutine[Any, Any, None]]], object]

_BLOCKS_AHEAD = 4
# So many sets of ranks are known by their prefix.
_MAX_KNOWN = 1024


class Merger(ABC, Generic[Text]):
    """One stream of a group, on its way to the console.

    Args:
        console: where it goes.
        spawn: runs a task for as long as something is held back.
        clock: tells the time of day, in seconds since the epoch.

    Attributes:
        turn: held by whoever adds to it.
        blocks: as those of a `Console`.
    """

    def __init__(
        self, console: Console, spawn: Spawn, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.console = console
        self.turn = asyncio.Lock()
        self.blocks = asyncio.Semaphore(_BLOCKS_AHEAD)
        self.clock = clock
        self._spawn = spawn
        self._dedup: Dedup[Text] = Dedup()
        self._speakers: dict[int, Speaker] = {}
        self._heads: dict[tuple[int, ...], str] = {}
        self._flushing = False
        self._nothing_held = asyncio.Event()

    @abstractmethod
    def lane(self, speaker: Speaker) -> Lane[Text]:
        """The way of one worker's lines."""

    def join(self, speaker: Speaker) -> None:
        """A worker may say something from now on, by one lane (more)."""
        self._speakers[speaker.local_rank] = speaker
        self._dedup.join(speaker.local_rank)

    def leave(self, speaker: Speaker) -> None:
        """It has said all, by one of its lanes."""
        self._dedup.leave(speaker.local_rank)

    # `turn` must be held by whoever calls the following.

    async def say(self, speaker: Speaker, texts: Iterable[Text], at: float) -> None:
        """Show lines when it is time to."""
        now = asyncio.get_running_loop().time()
        for text in texts:
            self._dedup.add(speaker.local_rank, text, now=now, at=at)
            if self._dedup.overfull:
                await self._show(self._dedup.take(now))
        await self.show_ready()

    async def show_ready(self) -> None:
        """Show what need not be held any longer."""
        await self._show(self._dedup.take(asyncio.get_running_loop().time()))
        if self._dedup.due() is None:
            self._nothing_held.set()
        elif not self._flushing:
            self._flushing = True
            self._spawn(self._flush)

    async def show_all(self) -> None:
        """Show all that is held."""
        await self._show(self._dedup.take_all())

    async def write(self, owner: object, framed: Framed) -> None:
        """Write to the console itself, after :meth:`show_all`."""
        async with self.console.turn:
            await self.console.write(owner, framed)

    async def _show(self, lines: Sequence[Merged[Text]]) -> None:
        if lines:
            data = b"".join(map(self.rendered, lines))
            await self.write(self, Framed(data, data, (), unfinished=False))

    async def _flush(self) -> None:
        """Show each line when its moment is over, until nothing is held any more."""
        loop = asyncio.get_running_loop()
        while (due := self._dedup.due()) is not None:
            self._nothing_held.clear()
            with anyio.move_on_after(due - loop.time()):
                await self._nothing_held.wait()
            async with self.turn:
                await self._show(self._dedup.take(loop.time()))
        self._flushing = False

    @abstractmethod
    def rendered(self, merged: Merged[Text]) -> bytes:
        """A line as it is shown, its newline included."""

    def head(self, ranks: Iterable[int]) -> str:
        """What is said of several ranks before, or beside, their line."""
        known = tuple(sorted(ranks))
        if known not in self._heads:
            if len(self._heads) >= _MAX_KNOWN:
                self._heads.clear()
            self._heads[known] = self.make_head([self._speakers[rank] for rank in known])
        return self._heads[known]

    @abstractmethod
    def make_head(self, speakers: Sequence[Speaker]) -> str:
        """See :meth:`head`."""


class TextMerger(Merger[bytes]):
    """Lines with a prefix.

    Args:
        color: whether the prefix is coloured.
        timestamps: whether the time when a line was read stands before it.
    """

    def __init__(
        self, console: Console, spawn: Spawn, *, color: bool, timestamps: bool, **options: Any
    ) -> None:
        super().__init__(console, spawn, **options)
        self._color = color
        self._timestamps = timestamps

    def lane(self, speaker: Speaker) -> Lane[bytes]:
        return _TextLane(self, speaker)

    def rendered(self, merged: Merged[bytes]) -> bytes:
        return self.prefix(merged.ranks, merged.at) + merged.text + b"\n"

    def prefix(self, ranks: Iterable[int], at: float) -> bytes:
        head = self.head(ranks)
        return (stamp(at) + head if self._timestamps else head).encode("utf-8", "surrogateescape")

    def make_head(self, speakers: Sequence[Speaker]) -> str:
        prefix = merged_prefix(speakers)
        return colored(prefix, [s.local_rank for s in speakers]) if self._color else prefix


class JsonMerger(Merger[str]):
    """An object for each line, in which ``ranks`` and ``local_ranks`` are lists."""

    def lane(self, speaker: Speaker) -> Lane[str]:
        return _JsonLane(self, speaker)

    def rendered(self, merged: Merged[str]) -> bytes:
        return json_line(merged.at, self.head(merged.ranks), merged.text)

    def make_head(self, speakers: Sequence[Speaker]) -> str:
        return json_fields(
            {
                "ranks": sorted(speaker.rank for speaker in speakers),
                "local_ranks": [speaker.local_rank for speaker in speakers],
                "stream": speakers[0].stream,
                "group": speakers[0].group,
            }
        )


class Lane(Sink, Generic[Text]):
    """The way of one worker's lines into a `Merger`.

    Attributes:
        framer: cuts what the worker writes for this lane.
    """

    framer: LineFramer

    def __init__(self, merger: Merger[Text], speaker: Speaker) -> None:
        self.turn = merger.turn
        self.blocks = merger.blocks
        self._merger: Merger[Text] = merger
        self._speaker = speaker
        # Whether the last line stands on the console without its end.
        self._begun = False

    @property
    def broken(self) -> Exception | None:
        return self._merger.console.broken

    def leave(self) -> None:
        """The worker has said all."""
        self._merger.leave(self._speaker)

    async def finish(self) -> None:
        """The worker has said all, and nobody need wait for it any more."""
        async with self.turn:
            self.leave()
            await self._merger.show_ready()


class _TextLane(Lane[bytes]):
    def __init__(self, merger: TextMerger, speaker: Speaker) -> None:
        super().__init__(merger, speaker)
        self.framer = LineFramer(b"")
        self._text_merger = merger

    @property
    def keeps_together(self) -> bool:
        return True

    async def write(self, owner: object, framed: Framed) -> None:
        merger, at = self._text_merger, self._text_merger.clock()
        prefix = merger.prefix([self._speaker.local_rank], at)
        parts: tuple[bytes, ...] = (framed.fresh, *framed.rest)
        if self._begun:
            # Nothing of this worker is held: what was said before went out with the beginning.
            begun = Framed(framed.resumed, framed.fresh, (), framed.unfinished and not framed.rest)
            await merger.write(self, with_prefix(begun, prefix, begun=True))
            parts = framed.rest
        *lines, tail = b"".join(parts).split(b"\n")
        await merger.say(self._speaker, lines, at)
        if tail:
            await merger.show_all()
            begun = Framed(tail, tail, (), unfinished=True)
            await merger.write(self, with_prefix(begun, prefix, begun=False))
        self._begun = framed.unfinished


class _JsonLane(Lane[str]):
    def __init__(self, merger: JsonMerger, speaker: Speaker) -> None:
        super().__init__(merger, speaker)
        self.framer = self._whole_lines = WholeLineFramer()
        self._json_merger = merger

    async def write(self, owner: object, framed: Framed) -> None:
        merger, at = self._json_merger, self._whole_lines.read_at
        lines: list[str] = []
        for text, continues in self._whole_lines.texts(framed):
            if not (continues or self._begun):
                lines.append(text)
                continue
            await merger.say(self._speaker, lines, at)
            lines = []
            await merger.show_all()
            fields = merger.head([self._speaker.local_rank])
            data = json_line(at, fields, text, continues=continues)
            await merger.write(self, Framed(data, data, (), unfinished=False))
            self._begun = continues
        await merger.say(self._speaker, lines, at)
