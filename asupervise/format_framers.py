"""Framers that put a time before each line, or make a JSON object of it; pure."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from json.encoder import encode_basestring_ascii
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
    quoted = _without_del(json.dumps(text))
    return f'{{"time": {seconds:.3f}, {fields}, "text": {quoted}{more}}}\n'.encode()


def _without_del(quoted: str) -> str:
    # The one control character that JSON takes as it is.
    return quoted.replace("\x7f", r"\u007f") if "\x7f" in quoted else quoted


def json_fields(fields: Mapping[str, Any]) -> str:
    """Members of an object, without its braces.

    Example:
        >>> json_fields({"rank": 0, "stream": "stdout"})
        '"rank": 0, "stream": "stdout"'
    """
    return json.dumps(fields)[1:-1]


# What JSON does not take as it is between quotes, and DEL; the newline ends a line. Numbers, for
# which `in` is memchr(3) alone.
_ESCAPED: Final = (*range(10), *range(11, 32), ord('"'), ord("\\"), 0x7F)
# So much of a block stays in the innermost cache while each of them is looked for: 0.31 ns a byte,
# and 0.38 where the whole block is gone through so many times.
_SEARCHED_BYTES: Final = 24 << 10


def _is_plain(data: bytes, start: int, end: int) -> bool:
    """Whether JSON takes all of a part as it is, but for the ends of lines."""
    for first in range(start, end, _SEARCHED_BYTES):
        part = data[first : min(first + _SEARCHED_BYTES, end)]
        if not part.isascii():
            return False
        for byte in _ESCAPED:
            if byte in part:
                return False
    return True


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
        if first == end or not _is_plain(data, first, end):
            return self._objects(super().feed(data))
        # Lines in which nothing is to be escaped, all at once.
        begun = self._objects(super().feed(data[:first]))
        assert begun is not None, "a line has come to its end"
        head, tail = json_line(self.read_at, self._fields, "\n").rsplit(rb"\n", 1)
        rest: tuple[bytes, ...] = (head, data[first : end - 1].replace(b"\n", tail + head), tail)
        # At the same time; too long a piece comes out at once.
        if (grown := self._objects(LineFramer.feed(self, data[end:]))) is not None:
            rest = (*rest, grown.fresh)
        return Framed(begun.fresh, begun.fresh, rest, unfinished=False)

    def end(self) -> Framed | None:
        return self._objects(super().end())

    def _objects(self, framed: Framed | None) -> Framed | None:
        if framed is None:
            return None
        texts = self.texts(framed)
        # Only of the last line may more follow.
        last, continues = texts.pop() if texts[-1:] and texts[-1][1] else ("", False)
        lines = b""
        if texts:
            head, tail = json_line(self.read_at, self._fields, "").rsplit(b'""', 1)
            between = (tail + head).decode()
            quoted = between.join(encode_basestring_ascii(text) for text, _ in texts)
            lines = head + _without_del(quoted).encode() + tail
        if continues:
            lines += json_line(self.read_at, self._fields, last, continues=True)
        return Framed(lines, lines, (), unfinished=False)
