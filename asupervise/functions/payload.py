"""How a function and its arguments travel: pickled, checked, and laid down for one worker.

By reference where the worker can import what they refer to, as with multiprocessing; by value,
with cloudpickle, where it cannot: lambdas, closures, what was defined in a notebook or in a
module that no path leads to. What can travel neither way is refused, by name, before anything
is started.
"""

from __future__ import annotations

import copyreg
import functools
import importlib.machinery
import io
import marshal
import os
import pickle
import sys
import tempfile
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, ClassVar

from asupervise.errors import NotPicklableError
from asupervise.functions import frames
from asupervise.functions.running import InheritedFd

__all__ = ["Call", "Luggage", "main_module", "make_call_file", "module_of", "pack_calls"]

_NEEDS_CLOUDPICKLE = "install cloudpickle (pip install 'asupervise[functions]')"
# The second name is that of the first in a worker, which may start workers of its own.
_MAIN = frozenset({"__main__", "__mp_main__"})


@dataclass(frozen=True, slots=True)
class Call:
    """One worker's call, ready to travel.

    Attributes:
        parts: the frame that holds function and arguments.
        main: where the main module comes from, if it is referred to; None otherwise.
        by_value: whether cloudpickle is needed at the other end.
        fds: descriptors that belong to it, for multiprocessing's pipes and the like.
    """

    parts: Sequence[bytes | memoryview]
    main: Mapping[str, str] | None = None
    by_value: bool = False
    fds: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Luggage:
    """What every call of a group takes along, read once from this process."""

    path: list[str]
    argv: list[str]
    authkey: bytes | None = None
    tracker: int | None = None

    @classmethod
    def of_this_process(cls) -> Luggage:
        authkey = tracker = None
        if "multiprocessing.connection" in sys.modules:
            from multiprocessing import process

            authkey = bytes(process.current_process().authkey)
        if resource_tracker := sys.modules.get("multiprocessing.resource_tracker"):
            tracker = resource_tracker._resource_tracker._fd
        return cls(
            [str(entry or os.getcwd()) for entry in sys.path], list(sys.argv), authkey, tracker
        )


# --- pickling -----------------------------------------------------------------------------------


def pack_calls(
    function: Callable[..., Any], args: Mapping[int, Sequence[object]]
) -> dict[int, Call]:
    """Pickle the function with each rank's arguments.

    Raises:
        NotPicklableError: naming the rank and the argument that cannot travel.
    """
    return {rank: _pack(function, tuple(args[rank]), rank) for rank in sorted(args)}


def _pack(function: Callable[..., Any], args: tuple[object, ...], rank: int) -> Call:
    try:
        return _pickled((function, args))
    except Exception as error:
        raise _named(function, args, rank, error) from error


def _named(
    function: Callable[..., Any], args: tuple[object, ...], rank: int, error: Exception
) -> NotPicklableError:
    """The error with the one among function and arguments that is to blame."""
    name = getattr(function, "__qualname__", None) or repr(function)
    suspects: list[tuple[str, object]] = [(f"entrypoint: {name}", function)]
    suspects += [
        (f"args: local rank {rank}: argument {place} (a {type(arg).__qualname__})", arg)
        for place, arg in enumerate(args)
    ]
    for what, suspect in suspects:
        try:
            _pickled(suspect)
        except Exception as reason:
            hint = reason.hint if isinstance(reason, NotPicklableError) else None
            text = f"{what} cannot travel to a worker: {reason}"
            return NotPicklableError(text, local_rank=rank, hint=hint)
    text = f"args: local rank {rank}: they cannot travel to a worker: {error}"
    return NotPicklableError(text, local_rank=rank)


def _pickled(value: object) -> Call:
    """Pickle by reference where the worker will find what is referred to, else by value.

    Raises:
        NotPicklableError: it would need cloudpickle, which is not installed.
        Exception: what pickling it raises.
    """
    seen: set[str] = set()
    main = main_module()
    try:
        call = _dumped(pickle.Pickler, value, seen)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    else:
        unknown = sorted(m for m in seen if not (main if m in _MAIN else _is_importable(m)))
        if not unknown:
            return Call(call.parts, main if seen & _MAIN else None, fds=call.fds)
        why = f"a worker cannot import {', '.join(unknown)}"
    try:
        import cloudpickle
    except ImportError:
        # What is no code, such as a lock, it could not pickle either.
        code = not why.startswith("TypeError")
        raise NotPicklableError(why, hint=_NEEDS_CLOUDPICKLE if code else None) from None
    while True:
        modules = _unreachable(seen)
        with _by_value(cloudpickle, modules):
            call = _dumped(cloudpickle.Pickler, value, seen)
        # What travels by value may refer to further modules, which shows only when it does.
        if _unreachable(seen) == modules:
            break
    # Its functions may look up by name what the main module has: no worker needs to run it again.
    return Call(call.parts, None, by_value=True, fds=call.fds)


def _unreachable(names: set[str]) -> list[ModuleType]:
    """Those of the modules that no worker can import."""
    unknown = [m for m in sorted(names - _MAIN) if m in sys.modules and not _is_importable(m)]
    return [sys.modules[m] for m in unknown]


def _dumped(base: Any, value: object, seen: set[str]) -> Call:
    """Pickle with `base`; into `seen` go the modules of whatever is referred to on the way."""
    own: Any = getattr(base, "dispatch_table", None)
    if not isinstance(own, Mapping):  # the C pickler has a slot of that name
        own = copyreg.dispatch_table

    class Noting(base):  # type: ignore[misc]
        dispatch_table: ClassVar[Any] = ChainMap(_multiprocessing_reducers(), own)

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, type | FunctionType | BuiltinFunctionType):
                seen.add(getattr(obj, "__module__", None) or "builtins")
            elif isinstance(obj, ModuleType):
                seen.add(obj.__name__)
            if hasattr(base, "reducer_override"):
                return super().reducer_override(obj)
            return NotImplemented

    out = _Collected()
    with _spawning(out.fds):
        frames.send(-1, frames.VALUE, value, Noting, write=out.take)
    return Call(out.parts, fds=out.fds)


class _Collected:
    """Takes a frame's parts as they are: the memory of arrays is not copied before it is sent."""

    def __init__(self) -> None:
        self.parts: list[bytes | memoryview] = []
        self.fds: list[int] = []

    def take(self, _fd: int, parts: Sequence[bytes | memoryview]) -> None:
        self.parts += parts


@contextmanager
def _by_value(cloudpickle: Any, modules: list[ModuleType]) -> Iterator[None]:
    registered = []
    try:
        for module in modules:
            if module.__name__ not in cloudpickle.list_registry_pickle_by_value():
                cloudpickle.register_pickle_by_value(module)
                registered.append(module)
        yield
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)


def _is_importable(name: str) -> bool:
    """Whether a fresh interpreter with our ``sys.path`` would import the same module."""
    module = sys.modules.get(name)
    if module is None:
        return True  # not a module's name at all, or gone: pickle has found it by other means
    parent, _, _ = name.rpartition(".")
    path = None
    if parent:
        if parent not in sys.modules or not _is_importable(parent):
            return False
        path = getattr(sys.modules[parent], "__path__", None)
    spec = _spec(name, path)
    if spec is None:
        # Made by its parent (os.path, and the like): importing that makes it again.
        return bool(parent) and getattr(module, "__spec__", None) is None
    ours, theirs = getattr(module, "__file__", None), spec.origin
    if isinstance(ours, str) and theirs and spec.has_location:
        return os.path.realpath(ours) == os.path.realpath(theirs)
    return True


def _spec(name: str, path: Any) -> importlib.machinery.ModuleSpec | None:
    # Not importlib.util.find_spec: it answers from sys.modules.
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path)
        except (AttributeError, ImportError, ValueError):
            continue
        if spec is not None:
            return spec
    return None


def main_module() -> dict[str, str] | None:
    """Where a worker finds our main module; None where it has no file (a notebook, ``-c``)."""
    main = sys.modules.get("__main__")
    name = getattr(getattr(main, "__spec__", None), "name", None)
    if name and name != "__main__":  # the latter for a folder
        return {"name": name}
    path = getattr(main, "__file__", None)
    if isinstance(path, str) and os.path.isfile(path):
        return {"path": os.path.abspath(path)}
    return None


def module_of(function: Callable[..., Any]) -> str | None:
    """The module that defines a function, if a worker can import it; not the main module."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__module__", None) or type(function).__module__
    return name if name not in _MAIN and name in sys.modules and _is_importable(name) else None


# --- multiprocessing's objects ------------------------------------------------------------------


def _multiprocessing_reducers() -> dict[Any, Any]:
    """How pipes, sockets and shared tensors are pickled, if multiprocessing is in use here."""
    reduction = sys.modules.get("multiprocessing.reduction")
    return dict(reduction.ForkingPickler._extra_reducers) if reduction else {}


@contextmanager
def _spawning(fds: list[int]) -> Iterator[None]:
    """multiprocessing's locks and queues let themselves be pickled for a child that it starts.

    They hand their descriptors to whoever starts it, and that is us.
    """
    context = sys.modules.get("multiprocessing.context")
    if context is None:
        yield
        return

    class Spawning:
        @staticmethod
        def duplicate_for_child(fd: int) -> int:
            fds.append(fd)
            return len(fds) - 1

        DupFd = InheritedFd

    context.set_spawning_popen(Spawning())
    try:
        yield
    finally:
        context.set_spawning_popen(None)


# --- the call as a file -------------------------------------------------------------------------


def make_call_file(setup: Mapping[str, Any], parts: Sequence[bytes | memoryview] = ()) -> int:
    """A file without a name that holds a call; in memory, where the system has such files.

    A file, and not a pipe: whoever reads it reads as fast as it can, and nobody has to feed it.

    Returns:
        Its descriptor, at its start.

    Raises:
        OSError: no memory or no descriptor is left.
    """
    data = marshal.dumps(dict(setup))
    fd = unnamed_file()
    try:
        frames.write_all(fd, [len(data).to_bytes(8, "little"), data, *parts])
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def unnamed_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("asupervise-call")
    with tempfile.TemporaryFile(buffering=0) as file:  # macOS
        assert isinstance(file, io.FileIO)
        return os.dup(file.fileno())
