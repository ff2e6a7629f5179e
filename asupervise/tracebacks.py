"""Where a Python traceback begins and ends in a stream of lines: pure.

So that what one rank says of its failure is shown in one piece, with nobody else's lines between.
It decides how long others wait, never what is shown: where it errs, nothing is lost.
"""

from __future__ import annotations

import enum

_HEADER = b"Traceback (most recent call last):"
_GROUP = b"Exception Group "
_CHAINS = (
    b"During handling of the above exception, another exception occurred:",
    b"The above exception was the direct cause of the following exception:",
)
# What is read is searched from so far before its end: few tracebacks are longer, and this takes
# next to no time, however large a block is.
_SEARCHED_BYTES = 16 * 1024


class Stage(enum.Enum):
    """How far a traceback has come."""

    INSIDE = enum.auto()
    # Its last line is there; another one may follow that goes with it.
    COMPLETE = enum.auto()
    OVER = enum.auto()


class OpenTraceback:
    """A traceback that has begun, and is fed what follows.

    Args:
        lead: what stands before ``Traceback`` in its first line: nothing mostly; the margin of an
            exception group; or a prefix before each line, as torch has it (``[rank0]: ``).

    Attributes:
        stage: how far it has come.
    """

    def __init__(self, lead: bytes) -> None:
        self._begin(lead)
        self._unfinished = b""

    def _begin(self, lead: bytes) -> None:
        self.stage = Stage.INSIDE
        self._lead = lead.removesuffix(_GROUP)
        self._margin = self._lead.rstrip(b" +|")
        self._in_group = self._lead.rstrip()[-1:] in (b"+", b"|")

    def feed(self, data: bytes) -> None:
        """Take what was read next."""
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        for line in lines:
            if self.stage is Stage.OVER:
                break
            self._take(line.rstrip())
        if self.stage is Stage.OVER and (later := begun_in(data)) is not None:
            self.__dict__.update(later.__dict__)
        if len(self._unfinished) > _SEARCHED_BYTES:
            self.stage = Stage.OVER  # no line of a traceback

    def _take(self, line: bytes) -> None:
        if line.endswith(_HEADER):
            self._begin(line[: -len(_HEADER)])
        elif not line.startswith(self._margin.rstrip()):
            self.stage = Stage.OVER if self.stage is Stage.COMPLETE else Stage.COMPLETE
        elif self._in_group:
            self._take_of_group(line[len(self._margin) :].lstrip())
        elif line[len(self._lead) :].startswith(_CHAINS):
            self.stage = Stage.INSIDE
        elif self.stage is Stage.INSIDE:
            if line[len(self._lead) :].strip() and not line.startswith(self._lead + b"  "):
                self.stage = Stage.COMPLETE
        elif line[len(self._lead) :].strip():
            self.stage = Stage.OVER

    def _take_of_group(self, text: bytes) -> None:
        if text[:1] in (b"|", b"+"):
            ends = text[:1] == b"+" and not text.strip(b"+-")
            self.stage = Stage.COMPLETE if ends else Stage.INSIDE
        elif text.startswith(_CHAINS):
            self.stage = Stage.INSIDE
        elif text:
            self.stage = Stage.OVER


def begun_in(data: bytes) -> OpenTraceback | None:
    """The traceback that `data` ends in, or that others may yet follow; None if there is none.

    Example:
        >>> begun_in(b"x\\nTraceback (most recent call last):\\n  File ...\\n").stage
        <Stage.INSIDE: 1>
        >>> begun_in(b"Traceback (most recent call last):\\n  File ...\\nValueError\\nx\\n")
    """
    at = data.rfind(_HEADER, max(0, len(data) - _SEARCHED_BYTES))
    if at < 0:
        return None
    after = at + len(_HEADER)
    end = data.find(b"\n", after) + 1
    if not end or data[after:end].strip():
        return None
    begun = OpenTraceback(data[data.rfind(b"\n", 0, at) + 1 : at])
    begun.feed(data[end:])
    return None if begun.stage is Stage.OVER else begun
