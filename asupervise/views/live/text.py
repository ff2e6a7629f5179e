r"""Text of workers as it may be written to a terminal: nothing in it acts. Pure.

As in every view: what has no shape is shown by a sign that stands for it, and escape sequences are
left out. But colours may stay, where each line that has some ends with their end.
"""

from __future__ import annotations

import re
from typing import Final

from asupervise.views.plain import SEQUENCE, UNSHOWN, shown, without_sequences

__all__ = ["harmless", "in_a_cell"]

# C0 but for the newline and the tab, and DEL.
_CONTROLS: Final = tuple(map(chr, (*range(9), *range(11, 32), 127)))
# What ends a line on other systems is no part of it.
_TOKEN: Final = re.compile(rf"{SEQUENCE.pattern}|(?P<end>\r+$)|{UNSHOWN.pattern}")
_MOST_COLOURS: Final = 64
_END_OF_COLOURS: Final = "\x1b[0m"


def harmless(text: str, *, colours: bool = False) -> str:
    r"""Lines for a terminal.

    Args:
        text: lines, the last one perhaps without its end.
        colours: whether colours stay.

    Example:
        >>> harmless("a\x1b[2Jb\x07\r\n")
        'ab\u2407\n'
        >>> harmless("\x1b[31mred\n", colours=True)
        '\x1b[31mred\x1b[0m\n'
    """
    if _is_harmless(text):
        return text
    made = _coloured if colours else _uncoloured
    return "\n".join(line if _is_harmless(line) else made(line) for line in text.split("\n"))


def in_a_cell(text: str) -> str:
    r"""A piece of a line, for a table.

    Example:
        >>> in_a_cell("\x1b[1mstep\t3\n4")
        'step 3 4'
    """
    if text.isascii() and text.isprintable():
        return text
    return without_sequences(text.replace("\t", " ").replace("\n", " "))


def _is_harmless(text: str) -> bool:
    # To look for each character by itself is fifteen times faster than a pattern of them.
    if text.isascii():
        return not any(control in text for control in _CONTROLS)
    return UNSHOWN.search(text) is None


def _uncoloured(line: str) -> str:
    return _TOKEN.sub(_without_colour, line)


def _coloured(line: str) -> str:
    made = _TOKEN.sub(_with_colour, line)
    return f"{made}{_END_OF_COLOURS}" if "\x1b" in made else made


def _with_colour(found: re.Match[str]) -> str:
    is_colour = found["sgr"] is not None and len(found["sgr"]) <= _MOST_COLOURS
    return found[0] if is_colour else _without_colour(found)


def _without_colour(found: re.Match[str]) -> str:
    # Of what has one character it is known that it has no shape; the others are sequences.
    is_sign = len(found[0]) == 1 and found["end"] is None
    return shown(found[0]) if is_sign else ""
