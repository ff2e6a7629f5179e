"""The flags of the command line as Markdown, from the table that the command line itself reads."""

from __future__ import annotations

from asupervise.flags import FLAGS, Flag
from asupervise.options import LaunchOptions

_NO_VARIABLE = {"help", "version"}


def flags() -> str:
    """A section for each heading of `--help`, and in it each flag."""
    return "\n".join(
        f"## {heading}\n\n" + "\n".join(map(described, group)) for heading, group in FLAGS.items()
    )


def ours() -> str:
    """A table of the flags that torchrun does not have, with the first sentence of each."""
    rows = [
        f"| [`{flag.name}`](command-line.md#{flag.name[2:]}) | {_first_sentence(flag.help)} |"
        for group in FLAGS.values()
        for flag in group
        if flag.ours
    ]
    return "\n".join(["| flag | |", "|---|---|", *rows])


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".")


def described(flag: Flag) -> str:
    """One flag: how it is written, what it does, and which variables stand for it."""
    value = f" {flag.metavar}" if flag.metavar else ""
    names = f"`{flag.name}{value}`{{ #{flag.name[2:]} .flag }}"
    if flag.short:
        names += f", `{flag.short}{value}`"
    about = [flag.help.replace("<", "&lt;").replace("*", "\\*"), _variables(flag)]
    return f"{names}\n:   " + " ".join(part for part in about if part) + "\n"


def _variables(flag: Flag) -> str:
    known = flag.field in LaunchOptions._fields and flag.field not in _NO_VARIABLE
    names = [f"PET_{flag.field.upper()}"] if known and not flag.negates else []
    names += [flag.variable] if flag.variable and flag.variable not in flag.help else []
    return "(" + ", ".join(f"`{name}`" for name in names) + ")" if names else ""
