"""HTML that cannot be anything else than what was meant: text is escaped by being text. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Final

from asupervise.views.plain import PLAIN, Style, shown, styled

__all__ = ["Child", "Html", "escape", "log_html", "raw", "tag"]

_ESCAPES: Final = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"}
)
# Most texts of a page are such, and one look is enough for them.
_HARMLESS: Final = re.compile(r"[\t\n !#-%(-;=?-~]*")
_VOID: Final = frozenset({"br", "hr", "input", "link", "meta"})


class Html(str):
    """Markup. Made by the functions below alone; every other text is text."""

    __slots__ = ()


Child = str | Iterable["Child"] | None


def escape(text: str) -> Html:
    """The text, to stand in an element or in an attribute's quotes.

    Example:
        >>> escape("<b>&")
        '&lt;b&gt;&amp;'
    """
    if _HARMLESS.fullmatch(text):
        return Html(text)
    return Html(shown(text).translate(_ESCAPES))


def raw(text: str) -> Html:
    """What we have written ourselves: never anything that was read."""
    return Html(text)


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """An element. A text among the children is escaped; None is left out, lists are opened.

    Attributes: ``class_`` is ``class``, an underscore a dash; True has no value, None and False
    are left out.

    Example:
        >>> tag("a", "1 < 2", class_="x", href="#y", hidden=False)
        '<a class="x" href="#y">1 &lt; 2</a>'
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        written = _written(key)
        parts.append(f" {written}" if value is True else f' {written}="{_value(value)}"')
    parts.append(">")
    if name not in _VOID:
        _add(parts, children)
        parts.append(f"</{name}>")
    return Html("".join(parts))


@cache
def _written(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _value(value: str | float) -> str:
    if isinstance(value, str):
        return escape(value)
    return str(value) if isinstance(value, int) else f"{value:.3f}".rstrip("0").rstrip(".")


def _add(parts: list[str], children: Iterable[Child]) -> None:
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(escape(child))
        elif child is not None:
            _add(parts, child)


def log_html(text: str) -> Html:
    """The text of a log with its colours. No element of it goes over the end of a line."""
    if "\x1b" not in text:
        return escape(text)
    parts: list[str] = []
    for style, piece in styled(text):
        escaped = piece.translate(_ESCAPES)
        if style == PLAIN:
            parts.append(escaped)
            continue
        opened = f'<span class="{_classes(style)}">'
        lines = escaped.split("\n")
        parts.append("\n".join(f"{opened}{line}</span>" if line else "" for line in lines))
    return Html("".join(parts))


def _classes(style: Style) -> str:
    fg, bg = style.fg, style.bg
    if style.inverse:
        # The usual colours in turn are a class of their own.
        fg, bg = bg, fg
    names = [] if fg is None else [f"f{fg}"]
    names += [] if bg is None else [f"g{bg}"]
    names += ["iv"] if style.inverse and fg is None and bg is None else []
    flags = (("b", style.bold), ("d", style.dim), ("i", style.italic), ("u", style.underline))
    return " ".join([*names, *(name for name, on in flags if on)])
