"""How a fresh interpreter is started, for a worker or for a zygote."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from asupervise.errors import NotSupportedError

__all__ = ["checked_preload", "interpreter"]


def interpreter(line: str, *words: str) -> tuple[str, ...]:
    """The argv of a fresh interpreter with our flags that runs one line of Python."""
    if not sys.executable:
        raise NotSupportedError(
            "entrypoint: a function needs a Python interpreter, and sys.executable is empty here",
            hint="set sys.executable to the path of a Python that has the same packages",
        )
    # The same flags as multiprocessing passes on (-X, -W, -O, -E, ...), by the same function.
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return (sys.executable, *flags, "-c", line, _package_folder(), *words)


def _package_folder() -> str:
    return str(Path(__file__).resolve().parents[2])


def checked_preload(preload: Sequence[str]) -> tuple[str, ...]:
    """The names of modules, as a tuple.

    Raises:
        ValueError: it is one string, or has something else than names in it.
    """
    if isinstance(preload, str):
        raise ValueError(f"preload: {preload!r}: expected a sequence of module names, not one")
    for name in preload:
        if not all(part.isidentifier() for part in str(name).split(".")):
            raise ValueError(f"preload: {name!r}: expected the name of a module")
    return tuple(preload)
