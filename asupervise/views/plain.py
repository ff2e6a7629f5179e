r"""What workers have written, such that it is text and nothing else: pure.

Escape sequences, control characters, characters that turn the direction of writing, lone
surrogates: none of them may act on a page or on a terminal. What has no shape is shown by a sign or
an escape that stands for it; of escape sequences only colours and the like (SGR, ECMA-48 8.3.117)
mean something, to whoever can show them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

__all__ = [
    "PLAIN",
    "SEQUENCE",
    "UNSHOWN",
    "Style",
    "cut_middle",
    "decoded",
    "one_line",
    "overwritten",
    "ranks_text",
    "shown",
    "styled",
    "without_sequences",
]

# A sequence ends in its own line: a string that is never closed must not swallow what follows.
SEQUENCE: Final = re.compile(
    r"\x1b(?:"
    r"\[(?P<sgr>[0-9;:]*)m"
    r"|\[[0-?]*[ -/]*[@-~]"  # other control sequences: the cursor, erasing, modes
    r"|[]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)"  # titles, hyperlinks, the clipboard
    r"|[ -/]+[0-~]|[0-Z\\`-~]"
    r")"
)
# Beside control characters: marks, embeddings and isolates of direction; separators that end lines
# for some; what has no width and is used to hide text (byte order mark, tags).
UNSHOWN: Final = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_UNSHOWN_RUN: Final = re.compile(f"{UNSHOWN.pattern}+")


def decoded(data: bytes) -> str:
    r"""The bytes of a log as text; what is no UTF-8 as ``\xff``."""
    return data.decode("utf-8", "backslashreplace")


def shown(text: str) -> str:
    r"""The text with a visible sign for each character that has none; tabs and newlines stay.

    Example:
        >>> shown("a\0b\u202ec")
        'a\u2400b\\u202ec'
    """
    return _UNSHOWN_RUN.sub(_signs, text)


def _signs(found: re.Match[str]) -> str:
    # Where there is one there are mostly many: sparse files are full of zeros.
    text = found[0]
    one = _sign(ord(text[0]))
    return (
        one * len(text)
        if text.count(text[0]) == len(text)
        else "".join(_sign(ord(character)) for character in text)
    )


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's control pictures
    if code == 0x7F:
        return "\u2421"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def without_sequences(text: str) -> str:
    r"""The text as it reads without its escape sequences, and safe to show.

    Example:
        >>> without_sequences("\x1b[31mred\x1b[0m \x1b]0;title\x07!")
        'red !'
    """
    return shown(SEQUENCE.sub("", text) if "\x1b" in text else text)


def one_line(text: str, limit: int = 200) -> str:
    """The first line that says something, such that it fits into a title."""
    line = next((line for line in without_sequences(text[:8192]).splitlines() if line.strip()), "")
    line = " ".join(line.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def overwritten(line: str) -> str:
    r"""A line as a terminal would leave it: what stands before its last carriage return is gone.

    Example:
        >>> overwritten("10 %\r20 %\r")
        '20 %'
    """
    return line.rstrip("\r").rpartition("\r")[2] if "\r" in line else line


def cut_middle(text: str, limit: int) -> str:
    """The text, if it is not too long; else its start and its end."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n… ({len(text) - 2 * half:,} characters left out) …\n{text[-half:]}"


def ranks_text(ranks: Iterable[int], most: int = 24) -> str:
    """Numbers as ranges.

    Example:
        >>> ranks_text([0, 1, 2, 5])
        '0-2, 5'
    """
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    texts = ["-".join(map(str, run)) for run in runs]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


# --- colours ------------------------------------------------------------------------------------


class Style(NamedTuple):
    """How a piece of text looks, as far as we show that.

    Attributes:
        fg: colour, 0 to 15 as a terminal counts them; None for the usual.
        bg: of the background.
        bold, dim, italic, underline, inverse: as they say.
    """

    fg: int | None = None
    bg: int | None = None
    bold: bool = False
    dim: bool = False
    italic: bool = False
    underline: bool = False
    inverse: bool = False


PLAIN: Final = Style()
_ON: Final = {1: "bold", 2: "dim", 3: "italic", 4: "underline", 7: "inverse"}
_OFF: Final = {
    22: ("bold", "dim"), 23: ("italic",), 24: ("underline",), 27: ("inverse",),
    39: ("fg",), 49: ("bg",),
}  # fmt: skip
_DEFAULTS: Final = Style._field_defaults


def styled(text: str, style: Style = PLAIN) -> Iterator[tuple[Style, str]]:
    r"""The pieces of a text and how each looks, safe to show; sequences are gone.

    Example:
        >>> [(style.fg, piece) for style, piece in styled("a\x1b[31mb")]
        [(None, 'a'), (1, 'b')]
    """
    start = 0
    for found in SEQUENCE.finditer(text):
        if found.start() > start:
            yield style, shown(text[start : found.start()])
        start = found.end()
        if (codes := found["sgr"]) is not None:
            style = _after(style, codes)
    if start < len(text):
        yield style, shown(text[start:])


def _after(style: Style, codes: str) -> Style:
    numbers = [int(code) if len(code) < 4 and code else 0 for code in re.split("[;:]", codes)]
    position = 0
    while position < len(numbers):
        code = numbers[position]
        position += 1
        if code in (38, 48):
            colour, position = _extended(numbers, position)
            style = style._replace(fg=colour) if code == 38 else style._replace(bg=colour)
        else:
            style = _simple(style, code)
    return style


def _simple(style: Style, code: int) -> Style:
    if code == 0:
        return PLAIN
    if code in _ON:
        return style._replace(**{_ON[code]: True})
    if code in _OFF:
        return style._replace(**{name: _DEFAULTS[name] for name in _OFF[code]})
    for first, name, colour in ((30, "fg", 0), (40, "bg", 0), (90, "fg", 8), (100, "bg", 8)):
        if first <= code < first + 8:
            changes: dict[str, Any] = {name: colour + code - first}
            return style._replace(**changes)
    return style


def _extended(numbers: list[int], position: int) -> tuple[int | None, int]:
    """One of 256 colours, or of all, as the nearest of the 16; and where its numbers end."""
    kind = numbers[position] if position < len(numbers) else None
    if kind == 5 and position + 1 < len(numbers):
        return _of_256(numbers[position + 1]), position + 2
    if kind == 2 and position + 3 < len(numbers):
        red, green, blue = numbers[position + 1 : position + 4]
        return _nearest(red, green, blue), position + 4
    return None, len(numbers)


def _of_256(number: int) -> int | None:
    if number < 16:
        return number
    if number >= 232:
        grey = 8 + 10 * (number - 232)
        return _nearest(grey, grey, grey)
    number -= 16
    return _nearest(*(51 * (number // part % 6) for part in (36, 6, 1)))


def _nearest(red: int, green: int, blue: int) -> int | None:
    high, low = max(red, green, blue), min(red, green, blue)
    if high - low < 40:  # a grey: as much of it as reads well on either background
        return None if high > 170 or high < 60 else 8
    middle = (high + low) / 2
    colour = (red > middle) | (green > middle) << 1 | (blue > middle) << 2
    return colour + 8 if high > 200 and low > 60 else colour
