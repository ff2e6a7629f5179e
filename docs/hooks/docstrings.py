"""Our docstrings are read in a terminal first; this is what mkdocstrings needs changed in them."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`~?\.?([^`]+)`")
_LITERAL = re.compile(r"^( *)(.*)::\n\n((?:\1 +.*\n|\n)+)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Sphinx roles into code, and ``::`` with what is indented below it into a block."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = adapted(obj.docstring.value)


def adapted(text: str) -> str:
    """Markdown of what is written as reStructuredText.

    Example:
        >>> adapted("See :func:`run`.")
        'See `run`.'
    """
    text = _LITERAL.sub(_fenced, _ROLE.sub(r"`\1`", text + "\n"))
    return re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE).rstrip("\n")


def _fenced(found: re.Match[str]) -> str:
    indent, words, block = found.groups()
    # "Example" alone would begin a section, which wants prompts.
    opening = "For example" if words.strip() == "Example" else words
    code = textwrap.indent(textwrap.dedent(block).strip("\n"), indent)
    return f"{indent}{opening}:\n\n{indent}```python\n{code}\n{indent}```\n\n"
