"""Event handlers by name: ``--event-log-handler``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final

from asupervise.errors import NotSupportedError

if TYPE_CHECKING:
    from asupervise.exporters.handling import EventHandler

__all__ = ["BUILT_IN", "load_handler", "of_extra"]

BUILT_IN: Final = ("console", "null", "otel", "prometheus")
_ENTRY_POINT_GROUP: Final = "asupervise.event_handlers"


def load_handler(name: str) -> EventHandler:
    """Make the handler that an entry point of that name is for.

    An entry point (group ``asupervise.event_handlers``) names what is called without arguments and
    returns an `EventHandler`: a class, mostly.

    Raises:
        NotSupportedError: if there is none, or it makes none, naming those that there are.
    """
    points = entry_points(group=_ENTRY_POINT_GROUP)
    point = next(iter(points.select(name=name)), None)
    if point is None:
        known = ", ".join(sorted({*BUILT_IN, *points.names}))
        raise NotSupportedError(f"there is no event handler {name!r}; known: {known}")
    try:
        handler: Any = point.load()()
    except Exception as exc:
        raise NotSupportedError(
            f"event handler {name!r} ({point.value}): {type(exc).__name__}: {exc}"
        ) from exc
    if not callable(getattr(handler, "handle", None)):
        raise NotSupportedError(
            f"event handler {name!r} ({point.value}): {handler!r} has no method handle()"
        )
    made: EventHandler = handler
    return made


@contextmanager
def of_extra(extra: str, package: str, module: str) -> Iterator[None]:
    """What is imported inside needs that package and its module, which the extra installs.

    Raises:
        NotSupportedError: if it is not there.
    """
    try:
        yield
    except ModuleNotFoundError as exc:
        if str(exc.name).partition(".")[0] != module:
            raise
        raise NotSupportedError(
            f"{extra} needs the package {package}", hint=f"pip install 'asupervise[{extra}]'"
        ) from None
