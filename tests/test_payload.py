"""How functions and arguments travel: by reference, by value, or not at all, and who says so."""

from __future__ import annotations

import functools
import multiprocessing
import operator
import os.path
import pickle
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asupervise import NotPicklableError, start_processes
from asupervise.functions import frames, payload
from asupervise.functions.payload import Call, Luggage, make_call_file, module_of, pack_calls
from asupervise.functions.spec import name_of
from tests import function_workers as workers
from tests.conftest import Run
from tests.function_workers import Point

METHODS = ("spawn", "forkserver")

pytestmark = pytest.mark.usefixtures("own_temporary_folder")


@pytest.fixture
def no_cloudpickle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cloudpickle", None)


@pytest.fixture
def unreachable() -> Iterator[types.ModuleType]:
    """A module that no path leads to, as a plug-in loader or a test runner makes them."""
    module = types.ModuleType("unreachable_module")
    code = """if True:
        class Thing:
            def __init__(self, number): self.number = number
            def plus(self, other): return Thing(self.number + helper(other))
        def helper(number): return number * 10
        def function(number): return helper(number) + 1
        """
    sys.modules["unreachable_module"] = module
    exec(code, module.__dict__)
    yield module
    del sys.modules["unreachable_module"]


def packed(function: Any, *args: object) -> Call:
    return pack_calls(function, {0: args})[0]


async def value_of(function: Any, *args: Any, method: str = "spawn") -> Any:
    group = start_processes("t", function, {0: args}, {0: {}}, start_method=method)
    async with group as ctx:
        result = await ctx.wait()
    assert result is not None
    result.raise_for_failure("t")
    return result.return_values[0]


# --- by reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "args", "expected"),
    [
        (operator.add, (1, 2), 3),
        (functools.partial(operator.add, 1), (2,), 3),
        (functools.partial(functools.partial(workers.echo, 1), 2), (3,), (1, 2, 3)),
        (Point, (1, 2), Point(1, 2)),
        (Point(1).moved, (2,), Point(3)),
        (Point.origin, (), Point(0)),
        (Point.distance, (Point(1), Point(2)), 1),
        (workers.Adder(3), (4,), 7),
        (workers.AsyncAdder(3), (4,), 7),
        (functools.partial(workers.later), ("x",), "x"),
        ("text".upper, (), "TEXT"),
        (len, ([1, 2],), 2),
        (os.path.basename, ("/a/b",), "b"),
        (workers.echo, (os.path, int), None),
    ],
    ids=lambda value: name_of(value).partition(" object at")[0] if callable(value) else "",
)
async def test_callables_of_all_kinds(function: Any, args: Any, expected: Any) -> None:
    if args and isinstance(args[0], types.ModuleType):
        args = (os.path.basename, int)
        expected = args
    call = packed(function, *args)
    assert not call.by_value
    assert call.main is None
    assert await value_of(function, *args) == expected


async def test_callables_of_all_kinds_are_forked_too() -> None:
    for function, args, expected in (
        (functools.partial(operator.add, 1), (2,), 3),
        (Point(1).moved, (2,), Point(3)),
        (workers.AsyncAdder(3), (4,), 7),
        (len, ("ab",), 2),
    ):
        assert await value_of(function, *args, method="forkserver") == expected  # type: ignore[operator]


def test_the_main_module_is_only_named_where_it_is_referred_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = types.ModuleType("__main__")
    main.__file__ = str(tmp_path / "script.py")
    (tmp_path / "script.py").write_text("")
    exec("def function(x): return x", main.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert packed(operator.neg, 1).main is None
    for function, args in ((main.function, (1,)), (operator.is_not, (main.function, 1))):
        call = packed(function, *args)
        assert call.main == {"path": main.__file__}
        assert not call.by_value
    assert module_of(main.function) is None
    assert module_of(workers.echo) == "tests.function_workers"
    assert module_of(functools.partial(workers.echo)) == "tests.function_workers"


def test_a_large_argument_is_not_copied() -> None:
    memory = bytearray(1 << 20)
    call = packed(workers.echo, workers.Array(memory))
    assert any(isinstance(part, memoryview) and part.obj is memory for part in call.parts)


# --- by value -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
async def test_lambdas_and_closures(method: str) -> None:
    pytest.importorskip("cloudpickle")
    number = 10

    def closure(other: int) -> int:
        return number + other

    class Local:
        def __init__(self, number: int) -> None:
            self.number = number

    def make(number: int) -> Local:
        return Local(number)

    assert await value_of(lambda x, y=2: x * y, 21, method=method) == 42
    assert await value_of(closure, 1, method=method) == 11
    assert await value_of(functools.partial(closure), 2, method=method) == 12
    assert await value_of(workers.echo, {"f": closure}, method=method) is not None
    local = await value_of(make, 3, method=method)
    assert type(local) is Local
    assert local.number == 3
    assert (await value_of(lambda: closure, method=method))(5) == 15


@pytest.mark.parametrize("method", METHODS)
async def test_a_local_coroutine_function(method: str) -> None:
    pytest.importorskip("cloudpickle")

    async def local(value: str) -> str:
        import asyncio

        await asyncio.sleep(0)
        return value

    assert await value_of(local, "value", method=method) == "value"


@pytest.mark.parametrize("method", METHODS)
async def test_a_module_that_cannot_be_imported_there(
    unreachable: types.ModuleType, method: str
) -> None:
    cloudpickle = pytest.importorskip("cloudpickle")
    assert packed(unreachable.function, 1).by_value
    assert packed(operator.is_, unreachable.Thing(1), 1).by_value
    # Together with what cannot be pickled by reference, in either order.
    for args in ((lambda: 0, unreachable.Thing(1)), (unreachable.Thing(1), lambda: 0)):
        assert (await value_of(workers.echo, *args, method=method))[0] is not None
    # By a closure that refers to the module itself.
    assert await value_of(lambda: unreachable.function(4), method=method) == 41
    # The registry of the application is as it was.
    assert not cloudpickle.list_registry_pickle_by_value()
    assert await value_of(unreachable.function, 4, method=method) == 41
    thing = await value_of(unreachable.Thing(1).plus, 2, method=method)
    assert thing.number == 21
    assert module_of(unreachable.function) is None


def test_a_module_that_another_would_shadow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker would import something, and not what is meant."""
    pytest.importorskip("cloudpickle")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shadowed_module.py").write_text("def function(): return __file__")
    monkeypatch.syspath_prepend(tmp_path / "second")
    import shadowed_module  # type: ignore[import-not-found]

    try:
        assert not packed(shadowed_module.function).by_value
        monkeypatch.syspath_prepend(tmp_path / "first")
        assert packed(shadowed_module.function).by_value
    finally:
        del sys.modules["shadowed_module"]


# --- refused --------------------------------------------------------------------------------------


def make_closure() -> Any:
    number = 1
    return lambda: number


@pytest.mark.usefixtures("no_cloudpickle")
@pytest.mark.parametrize("function", [lambda: 0, make_closure()])
def test_lambdas_without_cloudpickle(function: Any) -> None:
    with pytest.raises(NotPicklableError, match=r"entrypoint: \S*<lambda> cannot travel") as e:
        packed(function)
    assert e.value.local_rank == 0
    assert "pip install 'asupervise[functions]'" in str(e.value.hint)


@pytest.mark.usefixtures("no_cloudpickle")
def test_a_lambda_as_argument_without_cloudpickle() -> None:
    args = {0: (1, 2), 1: (1, lambda: 0)}
    with pytest.raises(NotPicklableError, match=r"local rank 1: argument 1 \(a function\)") as e:
        pack_calls(workers.echo, args)
    assert e.value.local_rank == 1
    assert "cloudpickle" in str(e.value.hint)


@pytest.mark.usefixtures("no_cloudpickle")
def test_an_unreachable_module_without_cloudpickle(unreachable: types.ModuleType) -> None:
    with pytest.raises(NotPicklableError, match="a worker cannot import unreachable_module") as e:
        packed(unreachable.function)
    assert "cloudpickle" in str(e.value.hint)
    with pytest.raises(NotPicklableError, match=r"argument 0 \(a Thing\) .*unreachable_module"):
        packed(workers.echo, unreachable.Thing(1))


@pytest.mark.usefixtures("no_cloudpickle")
async def test_the_rest_works_without_cloudpickle() -> None:
    assert await value_of(workers.echo, 1, [Point(2)]) == (1, [Point(2)])


def test_what_nobody_can_pickle() -> None:
    lock = threading.Lock()
    with pytest.raises(NotPicklableError, match=r"rank 2: argument 0 \(a lock\).*cannot pickle"):
        pack_calls(workers.echo, {0: (), 1: (1,), 2: (lock, lock)})
    with pytest.raises(NotPicklableError, match="entrypoint: "):
        packed(functools.partial(workers.echo, lock))
    with pytest.raises(NotPicklableError, match=r"argument 1 \(a generator\)"):
        packed(workers.echo, 1, (n for n in ()))
    with pytest.raises(TypeError):  # as torch and multiprocessing raise
        packed(workers.echo, sys._getframe())


def test_what_runs_too_deep() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(NotPicklableError, match=r"argument 0 \(a list\)"):
        packed(workers.echo, nested)
    while nested:  # its own end would be too deep, too
        nested = nested.pop()


class OnlyTogether:
    """Cannot be pickled beside a second one."""

    pickled: list[object] = []  # noqa: RUF012

    def __reduce__(self) -> Any:
        self.pickled.append(self)
        if len(self.pickled) % 2 == 0:
            raise ValueError("one is enough")
        return OnlyTogether, ()


def test_who_is_only_refused_together() -> None:
    with pytest.raises(NotPicklableError, match="local rank 0: "):
        packed(workers.echo, OnlyTogether(), OnlyTogether())


def test_pickling_leaves_no_trace_in_multiprocessing() -> None:
    multiprocessing.get_context("spawn")
    from multiprocessing.context import get_spawning_popen

    packed(workers.echo, 1)
    with pytest.raises(NotPicklableError):
        packed(workers.echo, threading.Lock())
    assert get_spawning_popen() is None


# --- what is shown --------------------------------------------------------------------------------


def test_names() -> None:
    assert name_of(workers.echo) == "tests.function_workers.echo"
    assert name_of(functools.partial(workers.echo, 1)) == "tests.function_workers.echo"
    assert name_of(Point(1).moved) == "tests.function_workers.Point.moved"
    assert name_of(len) == "len"
    assert "Adder" in name_of(workers.Adder(1))


# --- the call as a file ---------------------------------------------------------------------------


def test_a_call_file_holds_setup_and_call() -> None:
    call = packed(operator.add, 1, [2])
    fd = make_call_file({"a": [1, "b"]}, call.parts)
    try:
        from asupervise.functions.running import read_setup

        assert read_setup(fd) == {"a": [1, "b"]}
        assert frames.load(fd) == (operator.add, (1, [2]))
        assert read_setup(fd) == {"a": [1, "b"]}
    finally:
        import os

        os.close(fd)


def test_a_call_file_where_the_system_has_none_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delattr(os, "memfd_create")
    fd = payload.unnamed_file()
    try:
        os.write(fd, b"x")
        assert os.fstat(fd).st_nlink == 0
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_luggage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty entry of the path means the working directory, which may be another there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "/a", Path("/b")])
    monkeypatch.setattr(sys, "argv", ["program", "--flag"])
    luggage = Luggage.of_this_process()
    assert luggage.path == [str(tmp_path), "/a", "/b"]
    assert luggage.argv == ["program", "--flag"]


NOTEBOOK = """
import asyncio
import {module} as library
import asupervise
SCALE = 10
class Model:
    def __init__(self, size): self.size = size
def scaled(model): return Model(helper(model.size))
def helper(size): return size * SCALE
async def cell():
    for method in ("spawn", "forkserver"):
        group = asupervise.start_processes(
            "t", scaled, {{0: (Model(1),), 1: (Model(2),)}}, {{0: {{}}, 1: {{}}}},
            start_method=method,
        )
        async with group as ctx:
            result = await ctx.wait()
        result.raise_for_failure("t")
        models = result.return_values.values()
        print([type(m) is Model and m.size for m in models])
asyncio.run(cell())
"""


def test_a_notebook(run_cli: Run) -> None:
    """Functions and classes of a main module that no worker can import or run again."""
    pytest.importorskip("cloudpickle")
    code = NOTEBOOK.format(module="json")
    cells = f"exec({code!r}, __import__('__main__').__dict__)"
    done = run_cli("-c", cells, command=(sys.executable,))
    assert done.stdout.decode() == "[10, 20]\n" * 2


def test_a_notebook_without_cloudpickle(run_cli: Run) -> None:
    code = NOTEBOOK.format(module="json")
    cells = f"import sys; sys.modules['cloudpickle'] = None\n{code}"
    done = run_cli("-c", cells, command=(sys.executable,))
    assert done.returncode == 1
    last, hint = done.stderr.decode().splitlines()[-2:]
    assert "NotPicklableError: entrypoint: scaled cannot travel" in last
    assert "a worker cannot import __main__" in last
    assert hint == "hint: install cloudpickle (pip install 'asupervise[functions]')"


def test_pickles_are_what_the_pickle_module_makes() -> None:
    """Nothing of ours is needed to read a call that has no descriptors."""
    parts = b"".join(packed(operator.add, 1, 2).parts)
    assert pickle.loads(parts[9:-9]) == (operator.add, (1, 2))
