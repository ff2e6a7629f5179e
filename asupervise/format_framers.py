"""Framers that put a time before each line, or make a JSON object of it; pure."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from asupervise.formats import Speaker, stamp
from asupervise.framing import Framed, LineFramer
from asupervise.whole_lines import WholeLineFramer

__all__ = ["JsonFramer", "StampedFramer", "json_fields", "json_line"]


class StampedFramer(LineFramer):
    """As `LineFramer`; before the prefix stands when the line's end was read.

    Args:
        prefix: put before each line.
        clock: tells the time, in seconds since the epoch.
    """

    __slots__ = ("_clock", "_plain")

    def __init__(self, prefix: bytes, *, clock: Callable[[], float] = time.time) -> None:
        super().__init__(prefix)
        self._plain = prefix
        self._clock = clock

    def feed(self, data: bytes) -> Framed | None:
        self._prefix = stamp(self._clock()).encode() + self._plain
        return super().feed(data)


def json_line(seconds: float, fields: str, text: str, *, continues: bool = False) -> bytes:
    """One object and a newline, in ASCII: whatever a worker has printed, it is but text there.

    Args:
        seconds: when it was read.
        fields: members that are JSON already, as `json_fields` gives them.
        text: the line.
        continues: whether more of the line follows in the next object.
    """
    more = ', "continues": true' if continues else ""
    return f'{{"time": {seconds:.3f}, {fields}, "text": {json.dumps(text)}{more}}}\n'.encode()


def json_fields(fields: Mapping[str, Any]) -> str:
    """Members of an object, without its braces.

    Example:
        >>> json_fields({"rank": 0, "stream": "stdout"})
        '"rank": 0, "stream": "stdout"'
    """
    return json.dumps(fields)[1:-1]


# What JSON takes as it is between quotes; and the ends of lines.
_PLAIN: Final = bytes(range(0x20, 0x7F)).translate(None, b'"\\') + b"\n"


class JsonFramer(WholeLineFramer):
    """Makes an object of each whole line; a line that is too long to be held makes several."""

    __slots__ = ("_fields",)

    def __init__(self, speaker: Speaker, *, clock: Callable[[], float] = time.time) -> None:
        super().__init__(clock=clock)
        self._fields = json_fields(
            {
                "rank": speaker.rank,
                "local_rank": speaker.local_rank,
                "stream": speaker.stream,
                "group": speaker.group,
            }
        )

    def feed(self, data: bytes) -> Framed | None:
        first, end = data.find(b"\n") + 1, data.rfind(b"\n") + 1
        whole = data[first:end]
        if not whole or whole.translate(None, _PLAIN):
            return self._objects(super().feed(data))
        # Lines in which nothing is to be escaped, all at once: ten times as fast.
        begun = self._objects(super().feed(data[:first]))
        assert begun is not None, "a line has come to its end"
        head, tail = json_line(self.read_at, self._fields, "\n").rsplit(rb"\n", 1)
        rest: tuple[bytes, ...] = (head, whole[:-1].replace(b"\n", tail + head), tail)
        # At the same time; too long a piece comes out at once.
        if (grown := self._objects(LineFramer.feed(self, data[end:]))) is not None:
            rest = (*rest, grown.fresh)
        return Framed(begun.fresh, begun.fresh, rest, unfinished=False)

    def end(self) -> Framed | None:
        return self._objects(super().end())

    def _objects(self, framed: Framed | None) -> Framed | None:
        if framed is None:
            return None
        lines = b"".join(
            json_line(self.read_at, self._fields, text, continues=continues)
            for text, continues in self.texts(framed)
        )
        return Framed(lines, lines, (), unfinished=False)
