"""A byte stream into whole lines of text: pure, no I/O.

For those who take lines one by one, and not a picture of what stands on a terminal.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable

from asupervise.framing import MAX_HELD_BYTES, Framed, LineFramer


class WholeLineFramer(LineFramer):
    r"""Frames one stream of one worker; a line comes out when it is there to its end.

    Of a line that carriage returns have overwritten, as progress bars do, there is what stood there
    in the end. One that is longer than `max_held` comes in pieces.

    Args:
        clock: tells the time, in seconds since the epoch.
        max_held: how many bytes of an unfinished line are held back at the most.

    Attributes:
        read_at: when what was last fed was read.

    Example:
        >>> framer = WholeLineFramer(clock=lambda: 7.0)
        >>> framer.feed(b"hel")
        >>> framer.texts(framer.feed(b"lo\r\n10%\r99%\n"))
        [('hello', False), ('99%', False)]
    """

    __slots__ = ("_clock", "_decoder", "read_at")

    def __init__(
        self, *, clock: Callable[[], float] = time.time, max_held: int = MAX_HELD_BYTES
    ) -> None:
        super().__init__(b"", max_held=max_held)
        self._clock = clock
        # Of a line that comes in pieces, one may end in the middle of a character.
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self.read_at = 0.0

    @property
    def unfinished(self) -> bool:
        """False: nothing is shown before its line is there to its end."""
        return False

    def feed(self, data: bytes) -> Framed | None:
        self.read_at = self._clock()
        return super().feed(data)

    def texts(self, framed: Framed) -> list[tuple[str, bool]]:
        """The lines of what this framer has just given out, without their ends.

        Returns:
            Text, and whether more of this line follows. Bytes that are not UTF-8 are shown as
            escapes (``\\xff``).
        """
        data = b"".join((framed.resumed, *framed.rest))
        *lines, piece = self._decoder.decode(data).split("\n")
        texts = [(line.rstrip("\r"), False) for line in lines]
        return [*texts, (piece, True)] if piece else texts
