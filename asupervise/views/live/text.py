r"""Text of workers as it may be written to a terminal: nothing in it acts. Pure.

As in every view: what has no shape is shown by a sign that stands for it, and escape sequences are
left out. But colours may stay, where they end in their own line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from asupervise.views.plain import SEQUENCE, UNSHOWN, shown, without_sequences

__all__ = ["are_harmless", "harmless", "in_a_cell"]

_ESC: Final = "\x1b"
# C0 but for the newline, the tab and ESC, and DEL.
_CONTROLS: Final = tuple(chr(code) for code in (*range(9), *range(11, 32), 127) if code != 27)
# What begins anything else than a colour that ends where it should.
_ELSE: Final = re.compile(r"\x1b(?!\[(?:0?m|[0-9;:]{1,64}m[^\x1b\n]*\x1b\[0?m))")
_UNSHOWN_BUT_ESC: Final = re.compile(rf"(?!\x1b){UNSHOWN.pattern}")
# What ends a line on other systems is no part of it.
_TOKEN: Final = re.compile(rf"{SEQUENCE.pattern}|(?P<end>\r+$)|{UNSHOWN.pattern}")
_MOST_COLOURS: Final = 64
_END_OF_COLOURS: Final = "\x1b[0m"
_COLOUR: Final = re.compile(rf"\x1b\[[0-9;:]{{0,{_MOST_COLOURS}}}m")
_COLOURED: Final = re.compile(r"^[^\n\x1b]*\x1b.*", re.MULTILINE)
_PLAIN: Final = bytes(range(0x20, 0x7F)) + b"\t\n"
# A prefix in a colour, which ends with it.
_PREFIX: Final = re.compile(rf"(?:{_COLOUR.pattern})+[ -~]{{1,200}}?\x1b\[0m".encode())


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
    if text.isascii() and are_harmless([text.encode()], colours=colours):
        return text
    if _is_harmless(text, colours):
        return text
    if colours and _is_harmless(_COLOUR.sub("", text), colours):
        return _COLOURED.sub(rf"\g<0>{_END_OF_COLOURS}", text)
    made = _coloured if colours else _uncoloured
    return "\n".join(
        line if _is_harmless(line, colours) else made(line) for line in text.split("\n")
    )


def are_harmless(parts: Sequence[bytes], *, colours: bool) -> bool:
    """Whether lines are harmless as they are, as far as that is seen at once.

    Of most workers there is nothing special but one prefix, often, in a colour that ends with it,
    and a lot of that: this is sixty times as fast as to look at each line.

    Args:
        parts: whole lines, as UTF-8, in pieces.
        colours: whether colours stay.
    """
    special = [part.translate(None, _PLAIN) for part in parts]
    if not any(special):
        return True
    prefix = _PREFIX.match(parts[0])
    if not colours or prefix is None or any(each.strip(b"\x1b") for each in special):
        return False
    of_prefix = prefix[0].count(b"\x1b")
    # All that is special is the beginning of a colour, and all of those are the prefix's.
    return all(
        len(each) == of_prefix * part.count(prefix[0])
        for each, part in zip(special, parts, strict=True)
    )


def in_a_cell(text: str) -> str:
    r"""A piece of a line, for a table.

    Example:
        >>> in_a_cell("\x1b[1mstep\t3\n4")
        'step 3 4'
    """
    if text.isascii() and text.isprintable():
        return text
    return without_sequences(text.replace("\t", " ").replace("\n", " "))


def _is_harmless(text: str, colours: bool) -> bool:
    if _ESC in text and not (colours and _ELSE.search(text) is None):
        return False
    # To look for each character by itself is fifteen times faster than a pattern of them.
    if text.isascii():
        return not any(control in text for control in _CONTROLS)
    return _UNSHOWN_BUT_ESC.search(text) is None


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
