"""Runs inside workers: take the call, run it, send back what it returns or raises.

The same for a worker that is a fresh interpreter (`bootstrap`) and for one that a zygote has
forked (`zygote_main`). What only some calls need is imported when one does.
"""

from __future__ import annotations

import marshal
import os
import sys

from asupervise.error_handler import RECORDED, get_error_handler, record_error
from asupervise.functions import frames

TYPE_CHECKING = False  # type checkers take this name for true; `typing` itself costs an import
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType, TracebackType
    from typing import Any

__all__ = ["NotSendableError", "importing_main", "prepare", "run_call"]

_LENGTH_BYTES = 8

# Descriptors that came with the call, for objects of multiprocessing's that refer to them by place.
inherited: list[int] = []

# While this process runs the supervisor's main script again, only to have its functions.
_importing_main = False


def importing_main() -> bool:
    """Whether the main script is just being imported by a worker: nothing may be started then."""
    return _importing_main


class NotSendableError(TypeError):
    """What the function has returned cannot be pickled, so it cannot be sent back."""


def read_setup(call_fd: int) -> dict[str, Any]:
    """The first part of a call: what is needed before it can be unpickled."""
    os.lseek(call_fd, 0, os.SEEK_SET)
    length = int.from_bytes(frames.read_exactly(call_fd, _LENGTH_BYTES), "little")
    return dict(marshal.loads(frames.read_exactly(call_fd, length)))


def prepare(setup: dict[str, Any]) -> None:
    """Make this interpreter as the supervisor's: ``sys.path``, ``sys.argv``, multiprocessing."""
    sys.path[:] = setup["path"]
    sys.argv[:] = setup["argv"]
    if setup.get("authkey"):
        from multiprocessing import process

        process.current_process().authkey = setup["authkey"]
    if setup.get("tracker") is not None:
        from multiprocessing import resource_tracker

        # As multiprocessing's own children do: with a tracker of its own each worker would
        # remove, at its end, shared memory that others still use (bpo-38119).
        tracker: Any = resource_tracker._resource_tracker
        tracker._fd = inherited[setup["tracker"]]


def import_main(main: dict[str, str]) -> None:
    """Have the supervisor's main module here, too, as ``__mp_main__`` and under its own name.

    As under multiprocessing's spawn: what stands below ``if __name__ == "__main__":`` is not run.
    """
    global _importing_main
    # multiprocessing, once imported, gives that name to whatever main module there is.
    if getattr(sys.modules.get("__mp_main__"), "__name__", "") == "__mp_main__":
        return
    import runpy
    import types

    module = types.ModuleType("__mp_main__")
    _importing_main = True
    try:
        if name := main.get("name"):
            content = runpy.run_module(name, run_name="__mp_main__", alter_sys=True)
        else:
            content = runpy.run_path(main["path"], run_name="__mp_main__")
    finally:
        _importing_main = False
    module.__dict__.update(content)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module


def run_call(call_fd: int, result_fd: int, setup: dict[str, Any]) -> None:
    """Run the call, and send what comes of it.

    Returns normally after success. An exception has been recorded, sent and shown on stderr when
    this raises ``SystemExit(1)``; a ``SystemExit`` of the function goes on as it is.
    """
    channel = _Channel(result_fd, setup)
    handler = get_error_handler()
    handler.initialize()
    try:
        value = _called(call_fd, setup)
        channel.send(frames.VALUE, value)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        # Whatever else derives from BaseException (a CancelledError) is no decision to end.
        error.__traceback__ = without_ours(error.__traceback__)
        try:
            record_error(handler, error)
        finally:
            channel.send_exception(error)
        sys.excepthook(type(error), error, error.__traceback__)
        # Nothing may keep the traceback's frames, and what they hold, until the very end.
        code = 1
    else:
        return
    raise SystemExit(code)


class InheritedFd:
    """A descriptor that travelled with the call: what stands for it in the pickle."""

    def __init__(self, place: int) -> None:
        self._place = place

    def detach(self) -> int:
        """The descriptor, which now belongs to whoever asked."""
        fd, inherited[self._place] = inherited[self._place], -1
        # Two objects may be the same descriptor, and each closes its own.
        return os.dup(fd) if fd in inherited else fd


def _called(call_fd: int, setup: dict[str, Any]) -> Any:
    try:
        if setup.get("main"):
            import_main(setup["main"])
        function, args = frames.load(call_fd)
    finally:
        os.close(call_fd)
    result = function(*args)
    if type(result).__name__ == "coroutine" and hasattr(result, "cr_frame"):
        import asyncio

        result = asyncio.run(result)
    return result


class _Channel:
    """Where the result goes, as long as it is still there.

    A program that closes all descriptors of its own may open a file then that gets our number.
    """

    def __init__(self, fd: int, setup: dict[str, Any]) -> None:
        self._fd = fd
        self._identity = _identity(fd)
        self._by_value = setup.get("cloudpickle", False)
        os.set_inheritable(fd, False)

    def send(self, kind: bytes, value: object) -> None:
        if _identity(self._fd) != self._identity:
            if value is None:
                return  # who ends well without a word has returned None
            raise NotSendableError(
                f"the return value (a {_name_of(value)}) cannot be sent: the worker has closed "
                "the descriptor that leads to its supervisor"
            )
        try:
            self._pickled(kind, value)
        except OSError as error:
            # The supervisor has gone, or waits no longer for this group.
            raise NotSendableError(f"the return value cannot be sent: {error}") from error
        except Exception as error:
            raise NotSendableError(
                f"the return value (a {_name_of(value)}) cannot be pickled: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _pickled(self, kind: bytes, value: object) -> None:
        try:
            frames.send(self._fd, kind, value)
        except OSError:
            raise
        except Exception:
            if not self._by_value:
                raise
            # It came by value, so its classes can be found by nobody's name.
            import cloudpickle

            frames.send(self._fd, kind, value, cloudpickle.Pickler)

    def send_exception(self, error: BaseException) -> None:
        """Send the exception itself; where it cannot be pickled, its record has to do."""
        # The mark is of this process: whoever raises it again in ours has an error file, too.
        vars(error).pop(RECORDED, None)
        try:
            self.send(frames.EXCEPTION, error)
        except NotSendableError:
            pass


def _identity(fd: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _name_of(value: object) -> str:
    kind = type(value)
    module = getattr(kind, "__module__", "builtins")
    name: str = kind.__qualname__
    return name if module == "builtins" else f"{module}.{name}"


def without_ours(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback from the user's first frame on; whole where it never got there."""
    inner = traceback
    while inner is not None and inner.tb_frame.f_globals.get("__name__", "").startswith(
        "asupervise.functions."
    ):
        inner = inner.tb_next
    return inner or traceback


def import_modules(names: list[str], after_each: Callable[[str], None]) -> ModuleType | None:
    """Import modules one after the other; returns the last."""
    module = None
    for name in names:
        __import__(name)
        module = sys.modules[name]
        after_each(name)
    return module
