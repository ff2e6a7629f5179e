r"""Text of workers as it may be written to a terminal: nothing in it acts. Pure.

What would act is shown instead, as `cat -v` shows it (``^G``); colours may stay, because a
terminal can be given them without harm where each line ends with their end. Sequences that move the
cursor or clear something are left out whole, for nobody wants to read them.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["harmless", "plain"]

# C0 but for the newline and the tab, and DEL.
_CONTROLS: Final = tuple(map(chr, (*range(9), *range(11, 32), 127)))
# What turns the direction of writing: it could show one thing in the place of another.
_TURNS: Final = "\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069"
# C1 is as powerful as ESC and a letter, where a terminal knows it.
_ACTS = re.compile(f"[\0-\x08\x0b-\x1f\x7f-\x9f{_TURNS}]")
# ECMA-48, 5.4: parameters, intermediates, and the byte that says what it is. Bounded: it is looked
# for in whatever a worker wrote.
_CSI: Final = r"\x1b\[[0-?]{0,64}[ -/]{0,8}[@-~]"
_SGR = re.compile(r"\x1b\[[0-9;:]{0,64}m")
_TOKEN = re.compile(rf"(?P<sequence>{_CSI})|(?P<end>\r+(?=\n|\Z))|{_ACTS.pattern}")
_END_OF_COLOURS: Final = "\x1b[0m"


def harmless(text: str, *, colours: bool = False) -> str:
    r"""Lines for a terminal.

    Args:
        text: lines, the last one perhaps without its end.
        colours: whether colours stay.

    Example:
        >>> harmless("a\x1b[2Jb\x07\r\n")
        'ab^G\n'
        >>> harmless("\x1b[31mred\n", colours=True)
        '\x1b[31mred\x1b[0m\n'
    """
    if _is_harmless(text):
        return text
    if not colours:
        return _TOKEN.sub(_without_colour, text)
    return "\n".join(map(_coloured, text.split("\n")))


def plain(text: str) -> str:
    r"""A piece of a line: for a cell of a table.

    Example:
        >>> plain("\x1b[1mstep\t3\n4")
        'step 3 4'
    """
    if text.isascii() and text.isprintable():
        return text
    return _TOKEN.sub(_without_colour, text.replace("\t", " ").replace("\n", " "))


def _is_harmless(text: str) -> bool:
    # To look for each character by itself is fifteen times faster than a pattern of them.
    if text.isascii():
        return not any(control in text for control in _CONTROLS)
    return _ACTS.search(text) is None


def _coloured(line: str) -> str:
    if _is_harmless(line):
        return line
    shown = _TOKEN.sub(_with_colour, line)
    return f"{shown}{_END_OF_COLOURS}" if "\x1b" in shown else shown


def _with_colour(found: re.Match[str]) -> str:
    return found[0] if _SGR.fullmatch(found[0]) else _without_colour(found)


def _without_colour(found: re.Match[str]) -> str:
    if found.lastgroup is not None:
        # A whole sequence, or what ends a line on other systems.
        return ""
    code = ord(found[0])
    if code < 0x20 or code == 0x7F:
        return f"^{chr(code ^ 0x40)}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
