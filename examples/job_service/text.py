"""What a job printed, as text that does nothing, wherever it is shown. Pure.

A browser is safe already, because the pages put text in as text, never as HTML. But the same lines
go to a terminal through `curl`, and a right-to-left override makes any line say what it does not.
"""

from __future__ import annotations

import re
from typing import Final

# Colours, cursor movements, window titles: a terminal's business. They are left out.
_SEQUENCES: Final = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, movements
    r"|\x1b[\]P^_X][^\x07\x1b]*(?:\x07|\x1b\\)?"  # OSC, DCS: titles, the clipboard
    r"|\x1b[ -/]*[0-~]"  # short ones
)
# Any other control character is shown by its picture (NUL is U+2400), so that it can be seen.
_PICTURES: Final = {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421}
_REPLACED: Final = dict.fromkeys(
    (*range(0x80, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),
    0xFFFD,
)
_TABLE: Final = _PICTURES | _REPLACED | {ord("\t"): ord("\t"), ord("\n"): ord("\n")}


def printable(text: str, limit: int = 4096) -> str:
    r"""The text without anything that acts, and no longer than `limit` characters.

    Line ends and tabs stay.

    Example:
        >>> printable("\x1b[31mred\x1b[0m, NUL \0 and BEL \a")
        'red, NUL \u2400 and BEL \u2407'
        >>> printable("0123456789", limit=4)
        '0123 ... (6 more characters)'
    """
    left_out = len(text) - limit
    if left_out <= 0 and text.isprintable():
        return text  # as most lines
    text = _SEQUENCES.sub("", text[:limit]).translate(_TABLE)
    # Bytes that were no UTF-8 may be lone surrogates, which nobody can encode.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return f"{text} ... ({left_out} more characters)" if left_out > 0 else text
