"""What stands in the place of ``sys.stdout`` and ``sys.stderr`` while a table is on the screen."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, Protocol

from asupervise.views.live.text import are_harmless, harmless, in_a_cell

__all__ = ["Above", "Taker", "standing_in"]

# Of a line without its end; one that is longer is shown in pieces.
_UNFINISHED_CHARS: Final = 8192


class Taker(Protocol):
    """Who shows lines above the table."""

    def take(self, lines: bytes) -> None:
        """Show them soon; may be called in any thread."""

    async def wait_taken(self) -> None:
        """Return when more may come.

        Raises:
            OSError: the terminal is gone.
        """

    def show_now(self, lines: Sequence[bytes]) -> None:
        """Show them, given in pieces; for a thread that may wait.

        Raises:
            OSError: the terminal is gone.
        """


class Above(io.TextIOBase):
    """A text stream whose lines appear above the table, made harmless.

    Args:
        taker: who shows them.
        colours: whether colours stay.
    """

    def __init__(self, taker: Taker, *, colours: bool) -> None:
        super().__init__()
        self._taker = taker
        self._colours = colours
        self._begun = ""
        # The host may print in threads.
        self._turn = threading.Lock()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    @property
    def unfinished(self) -> str:
        """The begun line, made harmless."""
        return in_a_cell(self._begun)

    def isatty(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        """Show it; returns at once. For those who print a line now and then."""
        # Also where there is no whole line: the begun one is shown as well.
        self._taker.take(self._whole_lines(text))
        return len(text)

    async def awrite(self, text: str) -> None:
        """Show it, and wait while the terminal is slow: `asupervise.console` asks for this."""
        self.write(text)
        await self._taker.wait_taken()

    def write_waiting(self, text: str) -> None:
        """Likewise in a thread: where there is much, that is less work."""
        self._taker.show_now([self._whole_lines(text)])

    def write_as_is(self, parts: Sequence[bytes]) -> bool:
        """Likewise of bytes, which need not become text for it; False if they have to."""
        if self._begun or not parts[-1].endswith(b"\n"):
            return False
        if not are_harmless(parts, colours=self._colours):
            return False
        self._taker.show_now(parts)
        return True

    def _whole_lines(self, text: str) -> bytes:
        """What it completes."""
        end = text.rfind("\n") + 1
        with self._turn:
            whole = self._begun + text[:end] if end else ""
            self._begun = text[end:] if end else self._begun + text
            if len(self._begun) > _UNFINISHED_CHARS:
                whole, self._begun = f"{whole}{self._begun}\n", ""
        return harmless(whole, colours=self._colours).encode("utf-8", "replace")

    def finish(self) -> None:
        """Nothing more will come: what there is of a line is shown as one."""
        if self._begun:
            self.write("\n")


@contextmanager
def standing_in(streams: Mapping[str, Above]) -> Iterator[None]:
    """Put them into the place of those in `sys`, for the duration of the context."""
    before = {name: getattr(sys, name) for name in streams}
    for name, stream in streams.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in streams.items():
            # Somebody else may have put his own there meanwhile.
            if getattr(sys, name) is stream:
                setattr(sys, name, before[name])
            stream.finish()
