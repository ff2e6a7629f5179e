"""A callable as entrypoint, checked before anything is started. Pure."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asupervise.functions import bootstrap
from asupervise.functions.interpreter import checked_preload, interpreter

__all__ = ["FunctionSpec", "checked_function", "name_of"]


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """A function that each worker calls with its own arguments.

    Attributes:
        function: what is called.
        name: ``module.qualname``, to be shown.
        argv: of an interpreter that is started afresh, without the two descriptors at its end;
            empty where a zygote forks the workers.
        preload: modules that a zygote imports first.
        zygote: a kept one; None for one of the group's own, or none.
    """

    function: Callable[..., Any]
    name: str
    argv: tuple[str, ...]
    preload: tuple[str, ...] = ()
    zygote: object | None = None

    @property
    def forks(self) -> bool:
        """Whether workers are forked, by a zygote."""
        return not self.argv


def checked_function(
    function: Callable[..., Any],
    args: Mapping[int, Sequence[object]],
    start_method: object,
    preload: Sequence[str],
) -> FunctionSpec:
    """The callable and how it is started, as a value.

    Raises:
        TypeError: its arguments do not fit its signature; names the rank.
        ValueError: a generator function; preload where nothing is preloaded.
        NotSupportedError: there is no interpreter to start.
    """
    kept = not isinstance(start_method, str)
    preload = checked_preload(preload)
    if preload and (kept or start_method == "spawn"):
        why = "the zygote has its own" if kept else "a spawned worker imports for itself"
        raise ValueError(f"preload: {list(preload)!r}: {why}; only for start_method 'forkserver'")
    _check_signature(function, args)
    spawned = start_method == "spawn"
    name = name_of(function)
    return FunctionSpec(
        function=function,
        name=name,
        argv=interpreter(bootstrap.LINE, name) if spawned else (),
        preload=preload,
        zygote=None if isinstance(start_method, str) else start_method,
    )


def name_of(function: Callable[..., Any]) -> str:
    """``module.qualname`` of a callable; its repr where it has no name.

    Example:
        >>> name_of(name_of)
        'asupervise.functions.spec.name_of'
    """
    inner = getattr(function, "func", function)  # functools.partial
    name = getattr(inner, "__qualname__", None)
    if name is None:
        return repr(function)
    module = getattr(inner, "__module__", None)
    return f"{module}.{name}" if module and module != "builtins" else str(name)


def _check_signature(function: Callable[..., Any], args: Mapping[int, Sequence[object]]) -> None:
    inner = inspect.unwrap(getattr(function, "func", function))
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        raise ValueError(
            f"entrypoint: {name_of(function)} is a generator function: calling it runs nothing of "
            "it; pass a function that runs to its end and returns a value"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # written in C, without a signature: the call itself will tell
    for rank, given in args.items():
        try:
            signature.bind(*given)
        except TypeError as error:
            raise TypeError(
                f"args: local rank {rank}: {reprlib.repr(tuple(given))} does not fit "
                f"{name_of(function)}{signature}: {error}"
            ) from None
