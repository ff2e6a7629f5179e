"""Work that goes on to its end while whoever waits for it is being cancelled."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

T = TypeVar("T")


async def finished_in_any_case(task: asyncio.Task[Any]) -> None:
    """Wait for `task` even while being cancelled, and pass the cancellation on afterwards.

    Neither raises what the task raised nor cancels it.

    Example:
        >>> async def main() -> bool:
        ...     task = asyncio.create_task(asyncio.sleep(0))
        ...     await finished_in_any_case(task)
        ...     return task.done()
        >>> asyncio.run(main())
        True
    """
    cancelled = await _finished(task)
    if cancelled is not None:
        raise cancelled


async def run_in_any_case(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `work()` to its end even while being cancelled, and pass the cancellation on then.

    At its end ``asyncio.run`` cancels every task, that of the work as well: it is begun anew
    then, so it must bear that.
    """
    loop = asyncio.get_running_loop()
    cancelled: asyncio.CancelledError | None = None
    while True:
        task = loop.create_task(work())
        cancelled = await _finished(task) or cancelled
        if not task.cancelled():
            break
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result


async def _finished(task: asyncio.Task[Any]) -> asyncio.CancelledError | None:
    """Wait for `task`; returns the cancellation that came meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    with _anyio_shield():
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError as exc:
                cancelled = exc
    return cancelled


def _anyio_shield() -> AbstractContextManager[object]:
    # In an anyio cancel scope, every await would be cancelled anew. Where nobody has imported
    # anyio there is no such scope.
    if "anyio" not in sys.modules:
        return nullcontext()
    import anyio

    return anyio.CancelScope(shield=True)


def check_loop(what: str, life: asyncio.Task[Any] | None) -> None:
    """Refuse another event loop than that in which it lives, as asyncio's own things do.

    Raises:
        RuntimeError: if it is called in another.
    """
    running = asyncio._get_running_loop()
    if life is not None and running not in (None, life.get_loop()):
        raise RuntimeError(
            f"{what} belongs to another event loop: asyncio.run_coroutine_threadsafe() reaches it"
        )
