"""Our docstrings are read in a terminal first; this is what mkdocstrings needs changed in them."""

from __future__ import annotations

import enum
import importlib
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`~?\.?([^`]+)`")
_LITERAL = re.compile(r"^( *)(.*)::\n\n((?:\1 +.*\n|\n)+)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Sphinx roles into code, ``::`` with what is indented below it into a block; and defaults.

    A default that is a constant of ours is shown by its value: what it is called is our affair.
    """

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = adapted(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        for scope in scopes_of(pkg):
            if isinstance(scope, griffe.Class) and scope.name in NOT_CALLED:
                scope.del_member("__init__")
            for member in scope.members.values():
                if isinstance(member, griffe.Function):
                    for each in member.parameters:
                        each.default = _valued(each.default, scope.module.path, loader)
                elif isinstance(member, griffe.Attribute):
                    _value_field(member, loader)


# Classes that are made by a function of ours, and whose own arguments are nobody's affair.
NOT_CALLED = frozenset({"PContext", "Services", "Subscription"})


def scopes_of(scope: griffe.Object) -> Iterator[griffe.Object]:
    """A module or class, and all below it; what it has only imported stands elsewhere."""
    yield scope
    for member in scope.members.values():
        if not member.is_alias and isinstance(member, griffe.Module | griffe.Class):
            yield from scopes_of(member)


def _value_field(attribute: griffe.Attribute, loader: griffe.GriffeLoader) -> None:
    """The default of a dataclass's field, as `field(default=...)` has it."""
    if isinstance(attribute.value, griffe.ExprCall):
        for argument in attribute.value.arguments:
            if isinstance(argument, griffe.ExprKeyword) and argument.name == "default":
                argument.value = _valued(argument.value, attribute.module.path, loader)


def _valued(default: Any, module: str, loader: griffe.GriffeLoader) -> Any:
    """A name as its value: a number or a text, or what it was made of."""
    if not isinstance(default, griffe.ExprName | griffe.ExprAttribute):
        return default
    try:
        value = eval(str(default), vars(importlib.import_module(module)))
    except (ImportError, NameError, AttributeError):
        return default
    if isinstance(value, int | float | str) and not isinstance(value, enum.Enum):
        return repr(value)
    try:
        return loader.modules_collection[default.canonical_path].value or default
    except (KeyError, AttributeError, griffe.AliasResolutionError):
        return default  # none of ours


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
