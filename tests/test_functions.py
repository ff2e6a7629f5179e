"""Python functions as workers, as callers see them: what they get, return, raise, and leave."""

from __future__ import annotations

import array
import asyncio
import functools
import importlib
import json
import multiprocessing
import operator
import os
import re
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import AsyncIterator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from asupervise import (
    BindingError,
    ChildFailedError,
    DefaultLogsSpecs,
    MemoryPolicy,
    NotPicklableError,
    NumaOptions,
    ProcessFailure,
    RunProcsResult,
    Std,
    Zygote,
    ZygoteError,
    plan_processes,
    record,
    start_processes,
)
from asupervise.functions.memory_policy import can_set_memory_policy
from tests import function_workers as workers
from tests.conftest import Run, carries_token
from tests.function_workers import Point
from tests.workers import Channel, count_threads, gone, is_alive

pytestmark = pytest.mark.timeout(60)

METHODS = ("spawn", "forkserver")
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def _multiprocessing_has_its_heap() -> None:
    """What shared values lie in is kept for the next one."""
    multiprocessing.get_context("spawn").RawValue("i", 0)


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[*METHODS, "zygote"])
async def any_method(request: pytest.FixtureRequest) -> AsyncIterator[str | Zygote]:
    """Each way to start there is: the names, and a zygote that is kept."""
    if request.param != "zygote":
        yield request.param
        return
    async with Zygote(["tests.function_workers"]) as zygote:
        yield zygote


@pytest.fixture
def context() -> Iterator[Any]:
    """The spawn context; what it starts beside us is ended again."""
    from multiprocessing import resource_tracker

    yield multiprocessing.get_context("spawn")
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


def start(function: Any, *args: tuple[Any, ...], **options: Any) -> Any:
    """A group of one worker for each tuple of arguments; of one worker without any for none."""
    by_rank = dict(enumerate(args or ((),)))
    options = {"envs": {rank: {} for rank in by_rank}} | options
    envs = options.pop("envs")
    start_method = options.pop("method", "spawn")
    return start_processes("t", function, by_rank, envs, start_method=start_method, **options)


async def run(function: Any, *args: tuple[Any, ...], **options: Any) -> RunProcsResult:
    async with start(function, *args, **options) as ctx:
        return await ctx.wait()


async def value_of(function: Any, *args: Any, **options: Any) -> Any:
    """What one worker returns."""
    result = await run(function, args, **options)
    result.raise_for_failure("t")
    return result.return_values[0]


async def failure_of(function: Any, *args: Any, **options: Any) -> ProcessFailure:
    """How one worker fails."""
    result = await run(function, args, **options)
    assert result.return_values == {}
    assert result.root_cause is not None
    assert list(result.failures) == [0]
    return result.root_cause[1]


def report_of(result: RunProcsResult | ProcessFailure) -> str:
    if isinstance(result, ProcessFailure):
        result = RunProcsResult(failures={0: result})
    with pytest.raises(ChildFailedError) as caught:
        result.raise_for_failure("t")
    return str(caught.value)


def to_files(tmp_path: Path) -> DefaultLogsSpecs:
    return DefaultLogsSpecs(str(tmp_path / "logs"), redirects=Std.ALL)


# --- return values --------------------------------------------------------------------------------


async def test_arguments_by_rank_and_values_by_rank(any_method: Any) -> None:
    result = await run(workers.echo, (1, "two"), (), (None, {"a": b"b"}), method=any_method)
    assert result.return_values == {0: (1, "two"), 1: (), 2: (None, {"a": b"b"})}
    assert not result.is_failed()
    assert result.warnings == ()
    assert result.root_cause is None
    result.raise_for_failure("t")


async def test_large_dictionaries_of_four(any_method: Any) -> None:
    result = await run(workers.big_dict, *([(200_000,)] * 4), method=any_method)
    assert list(result.return_values) == [0, 1, 2, 3]
    assert all(value == workers.big_dict(200_000) for value in result.return_values.values())


async def test_large_values_of_several_kinds_at_once(method: str) -> None:
    size = 64 * MEBIBYTE
    assert await value_of(workers.big_bytes, size, method=method) == workers.big_bytes(size)
    value = await value_of(workers.big_array, size, method=method)
    assert bytes(value.memory) == workers.big_bytes(size)


async def test_large_values_do_not_pass_through_the_disk(method: str, tmp_path: Path) -> None:
    """Neither the log folder nor the temporary one may hold a file, whatever is returned."""
    async with start(
        workers.big_bytes, (8 * MEBIBYTE,), method=method, logs_specs=to_files(tmp_path)
    ) as ctx:
        result = await ctx.wait()
    assert len(result.return_values[0]) == 8 * MEBIBYTE
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MEBIBYTE


async def test_a_large_argument(method: str) -> None:
    numbers = array.array("q", range(MEBIBYTE))
    value = await value_of(workers.echo, workers.Array(numbers), numbers, method=method)
    assert bytes(value[0].memory) == numbers.tobytes()
    assert value[1] == numbers


async def test_nothing_is_returned(any_method: Any) -> None:
    result = await run(workers.nothing, (), (), method=any_method)
    assert result.return_values == {0: None, 1: None}


@pytest.mark.parametrize("function", [workers.a_lock, workers.much_and_a_lock])
async def test_a_value_that_cannot_be_pickled(function: Any, method: str) -> None:
    failure = await failure_of(function, method=method)
    assert failure.exitcode == 1
    assert not failure.ended_by_us
    text = report_of(failure)
    assert "return value" in text
    assert "cannot be pickled" in text
    assert "_thread.lock" in text


async def test_a_value_that_cannot_be_had_here(method: str) -> None:
    failure = await failure_of(workers.unpicklable_here, method=method)
    assert "return value cannot be had" in failure.cause
    assert "only to be had where it was made" in report_of(failure)


async def test_all_or_nothing(method: str, channel: Channel) -> None:
    """Ranks that have returned something give nothing when another one fails."""
    gate = f"{channel.path}.gate"
    ranks = [(rank, 1, gate) for rank in range(3)]
    async with start(workers.fail_if, *ranks, method=method) as ctx:
        for rank in (0, 2):
            await gone(ctx.pids()[rank])
        await channel.open_gate()
        result = await ctx.wait()
    assert result.return_values == {}
    assert list(result.failures) == [1]


async def test_fork_is_served_by_a_zygote() -> None:
    seen = await value_of(workers.surroundings, method="fork")
    assert seen["ppid"] != os.getpid()
    assert seen["threads"] == 1


async def test_a_coroutine_function(any_method: Any) -> None:
    assert await value_of(workers.later, "value", method=any_method) == "value"


async def test_coroutine_functions_of_other_kinds() -> None:
    result = await run(workers.AsyncAdder(1), (2,), (3,))
    assert result.return_values == {0: 3, 1: 4}
    assert await value_of(functools.partial(workers.later, "value")) == "value"
    failure = await failure_of(workers.fail_later, "later")
    assert repr(failure.exception) == "ValueError('later')"


# --- exceptions -----------------------------------------------------------------------------------


async def test_an_exception_is_recorded(any_method: Any, tmp_path: Path) -> None:
    logs = to_files(tmp_path)
    result = await run(workers.raise_of, ("KeyError", "k"), method=any_method, logs_specs=logs)
    [failure] = result.failures.values()
    assert failure.exitcode == 1
    record = json.loads(Path(failure.error_file).read_text())
    assert record["message"]["message"] == "KeyError: 'k'"
    assert "raise_of" in record["message"]["extraInfo"]["py_callstack"]
    assert "KeyError: 'k'" in Path(result.stderrs[0]).read_text()
    assert repr(failure.exception) == "KeyError('k')"
    with pytest.raises(ChildFailedError) as caught:
        result.raise_for_failure("t")
    assert caught.value.__cause__ is failure.exception
    assert "KeyError: 'k'" in str(caught.value)


async def test_a_traceback_begins_with_the_function(method: str, tmp_path: Path) -> None:
    logs = to_files(tmp_path)
    result = await run(workers.raise_chained, (), method=method, logs_specs=logs)
    [failure] = result.failures.values()
    stderr = Path(result.stderrs[0]).read_text()
    for text in (failure.traceback, stderr, report_of(result)):
        assert "raise_chained" in text
        assert "in inner_step" in text
        assert "a note" in text
        assert "The above exception was the direct cause" in text
        assert "asupervise/functions" not in text
    # Who chains it shows the worker's own traceback.
    shown = "".join(traceback.format_exception(failure.exception))
    assert "in inner_step" in shown
    assert "direct cause" in shown


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [("NeedsTwo", ("one", "two"), "one and two"), ("HoldsLock", ("held",), "HoldsLock: held")],
)
async def test_an_exception_that_does_not_travel(
    kind: str, args: tuple[str, ...], words: str, method: str
) -> None:
    failure = await failure_of(workers.raise_of, kind, *args, method=method)
    assert failure.exception is None
    assert failure.exitcode == 1
    assert ("cannot be unpickled here: TypeError" in failure.note) is (kind == "NeedsTwo")
    assert words in report_of(failure)
    assert "in raise_of" in failure.traceback


async def test_the_original_exception_is_recorded_where_it_is_raised_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = await failure_of(workers.raise_of, "ValueError", "again")
    assert vars(failure.exception) == {}
    file = tmp_path / "ours.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    @record
    def main() -> None:
        assert failure.exception is not None
        raise failure.exception

    with pytest.raises(ValueError, match="again"):
        main()
    assert "ValueError: again" in file.read_text()


async def test_an_exception_that_cannot_be_printed() -> None:
    failure = await failure_of(workers.raise_of, "Unprintable")
    assert type(failure.exception) is workers.Unprintable
    assert "Unprintable" in report_of(failure)


async def test_an_exception_beyond_exceptions(method: str) -> None:
    failure = await failure_of(workers.raise_of, "Beyond", "there", method=method)
    assert failure.exitcode == 1
    assert "Beyond: there" in report_of(failure)
    assert "without an exception" not in report_of(failure)


async def test_deep_recursion(method: str) -> None:
    failure = await failure_of(workers.recurse, method=method)
    assert "RecursionError" in report_of(failure)
    assert isinstance(failure.exception, RecursionError)


async def test_the_others_are_ended_and_not_blamed(method: str, channel: Channel) -> None:
    path = str(channel.path)
    async with start(_fail_when_the_other_is_ready, (path, 0), (path, 1), method=method) as ctx:
        result = await ctx.wait()
    assert result.root_cause is not None
    assert result.root_cause[0] == 1
    assert result.failures[0].ended_by_us
    assert result.failures[0].exitcode == -signal.SIGTERM
    assert str(result.failures[1].exception) == "rank 1"


def _fail_when_the_other_is_ready(path: str, rank: int) -> None:
    if rank == 0:
        workers.ready_then_sleep(path, rank)
    with open(path) as file:
        file.readline()
    raise ValueError("rank 1")


# --- other ends -----------------------------------------------------------------------------------


async def test_exit_statuses(any_method: Any) -> None:
    failure = await failure_of(sys.exit, 3, method=any_method)
    assert failure.exitcode == 3
    assert "exit status 3" in report_of(failure)
    failure = await failure_of(workers.os_exit, 4, method=any_method)
    assert failure.exitcode == 4
    assert "exit status 4" in report_of(failure)
    result = await run(workers.raise_of, ("SystemExit", 0), ("SystemExit",), method=any_method)
    assert result.return_values == {0: None, 1: None}
    assert await value_of(workers.os_exit, 0, method=any_method) is None


async def test_an_exit_with_words(method: str, tmp_path: Path) -> None:
    logs = to_files(tmp_path)
    failure = await failure_of(sys.exit, "no more data", method=method, logs_specs=logs)
    assert failure.exitcode == 1
    assert "no more data" in report_of(failure)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGRTMIN])
async def test_a_death_by_signal(sig: signal.Signals, method: str) -> None:
    failure = await failure_of(workers.die_of, int(sig), method=method)
    assert failure.exitcode == -sig
    assert not failure.ended_by_us
    if sig != signal.SIGRTMIN:
        assert sig.name in report_of(failure)


async def test_a_keyboard_interrupt(method: str, tmp_path: Path) -> None:
    """As the interpreter ends then: by the signal, so that shells know."""
    logs = to_files(tmp_path)
    failure = await failure_of(
        workers.raise_of, "KeyboardInterrupt", method=method, logs_specs=logs
    )
    assert failure.exitcode == -signal.SIGINT
    assert "KeyboardInterrupt" in failure.stderr_tail


async def test_a_segmentation_fault(any_method: Any, tmp_path: Path) -> None:
    logs = to_files(tmp_path)
    failure = await failure_of(workers.segfault, method=any_method, logs_specs=logs)
    assert failure.exitcode == -signal.SIGSEGV
    report = report_of(failure)
    assert "Fatal Python error: Segmentation fault" in report
    assert "in segfault" in report


def module_that(folder: Path, code: str) -> Any:
    """A module that imports here, and runs `code` where it is imported elsewhere."""
    guard = f"import os\nif os.getpid() != {os.getpid()}:\n    {code}\n"
    (folder / "ends_at_import.py").write_text(guard + "def function(): pass\n")
    return importlib.import_module("ends_at_import")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("ends_at_import", None)


@pytest.mark.parametrize(
    ("code", "exitcode", "words"),
    [
        ("import sys; sys.exit(5)", 5, "exit status 5"),
        ("raise ValueError('at import')", 1, "ValueError: at import"),
    ],
)
async def test_an_end_during_import(
    code: str, exitcode: int, words: str, any_method: Any, folder: Path
) -> None:
    failure = await failure_of(module_that(folder, code).function, method=any_method)
    assert failure.exitcode == exitcode
    assert words in report_of(failure)


async def test_a_hard_end_during_import(method: str, folder: Path) -> None:
    function = module_that(folder, "os._exit(6)").function
    if method == "spawn":
        assert (await failure_of(function)).exitcode == 6
    else:
        # The zygote imports it, too, so that it is there when workers are forked.
        with pytest.raises(ZygoteError, match="it ended with exit status 6"):
            await run(function, method=method)


# --- who closes the result channel ----------------------------------------------------------------


async def test_who_closes_the_channel_and_returns_a_value(method: str) -> None:
    failure = await failure_of(workers.close_all_and_return, "value", method=method)
    assert failure.exitcode == 1
    assert "has closed the descriptor" in report_of(failure)


async def test_who_closes_the_channel_and_returns_nothing(method: str) -> None:
    assert await value_of(workers.close_all_and_return, None, method=method) is None


async def test_who_closes_the_channel_and_lives_on(method: str, channel: Channel) -> None:
    """Its group goes on until it ends, and its end is told as it is."""
    path = str(channel.path)
    async with start(workers.close_all_and_be_held, (path, 0, None), method=method) as ctx:
        await channel.lines(1)
        assert await ctx.wait(0.1) is None
        await channel.open_gate()
        result = await ctx.wait()
    assert result.return_values == {0: None}
    failure = await failure_of(workers.close_all_and_exit, 7, method=method)
    assert failure.exitcode == 7
    failure = await failure_of(workers.close_all_and_raise, method=method)
    assert "ValueError: after closing" in report_of(failure)


async def test_a_file_that_got_the_channels_number(method: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    failure = await failure_of(workers.reuse_and_return, str(file), "value", method=method)
    assert "has closed the descriptor" in report_of(failure)
    assert file.read_bytes() == b""


@pytest.mark.parametrize("size", [90, 900_000])
async def test_somebody_else_writes_into_the_channel(size: int, method: str) -> None:
    """More than a pipe holds, too: who writes must not wait for ever for us to read."""
    failure = await failure_of(workers.write_into_pipes, size, method=method)
    assert not failure.ended_by_us
    assert "return value" in report_of(failure)


# --- what a worker sees ---------------------------------------------------------------------------


async def test_it_is_as_under_multiprocessings_spawn(context: Any, any_method: Any) -> None:
    """The same function, started by multiprocessing, sees the same."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send_surroundings, args=(theirs,))
    process.start()
    theirs.close()
    expected = await asyncio.to_thread(ours.recv)
    process.join()
    process.close()
    ours.close()
    seen = await value_of(workers.surroundings, method=any_method)
    for what in ("argv", "path", "cwd", "stdin", "blocked", "threads", "sigchld"):
        assert seen[what] == expected[what], what
    assert seen["faulthandler"]
    assert not seen["line_buffering"]


def _send_surroundings(connection: Any) -> None:
    connection.send(workers.surroundings())


async def test_its_session_and_parent(any_method: Any) -> None:
    async with start(workers.surroundings, (), (), method=any_method) as ctx:
        pids = ctx.pids()
        result = await ctx.wait()
    for rank, seen in result.return_values.items():
        assert seen["pid"] == seen["session"] == seen["group"] == pids[rank]
        assert seen["ppid"] == (any_method.pid if isinstance(any_method, Zygote) else seen["ppid"])
    if any_method == "spawn":
        assert {seen["ppid"] for seen in result.return_values.values()} == {os.getpid()}


async def test_it_holds_what_it_needs_and_no_more(any_method: Any) -> None:
    """Nothing of ours, whatever is inheritable here, and nothing of the zygote's."""
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    try:
        async with start(workers.ready_then_sleep, ("/dev/null", 0), method=any_method):
            seen = await value_of(workers.surroundings, method=any_method)
    finally:
        os.close(read_end)
        os.close(write_end)
    more = {fd: what for fd, what in seen["fds"].items() if fd > 2}
    kinds = sorted(what.partition(":")[0] for what in more.values())
    assert len([what for what in kinds if what == "pipe"]) == 1, more
    # Beside the result channel there is the file for stack dumps, which the group's folder holds.
    assert all(what.startswith(("pipe", "/")) for what in more.values()), more
    assert len(more) <= 2, more


def test_it_imports_next_to_nothing(run_cli: Run) -> None:
    """What is there beside what an interpreter has, when a function of C's runs."""
    code = """if True:
        import asyncio, asupervise
        async def main():
            what = {0: ("' '.join(__import__('sys').modules)",)}
            async with asupervise.start_processes("t", eval, what, {0: {}}) as ctx:
                print((await ctx.wait()).return_values[0])
        asyncio.run(main())
        """
    names = run_cli("-c", code, command=(sys.executable,)).stdout.decode().split()
    assert "asupervise.functions.running" in names
    for heavy in ("asyncio", "typing", "inspect", "pickle", "multiprocessing", "psutil", "json"):
        assert heavy not in names


@pytest.mark.parametrize("how", METHODS)
async def test_its_environment(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "ours")
    monkeypatch.setenv("BOTH", "ours")
    envs = {0: {"BOTH": "0", "RANK": "0"}, 1: {"BOTH": "1", "RANK": "1"}}
    result = await run(workers.surroundings, (), (), method=how, envs=envs)
    for rank in (0, 1):
        env = result.return_values[rank]["env"]
        assert (env["OURS"], env["BOTH"], env["RANK"]) == ("ours", str(rank), str(rank))
        assert "TORCHELASTIC_ERROR_FILE" in env


async def test_its_working_directory(any_method: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    seen = await value_of(workers.surroundings, method=any_method, cwd=str(folder))
    assert seen["cwd"] == str(folder)
    with pytest.raises(NotADirectoryError, match="cwd: no such folder"):
        await run(workers.surroundings, (), method=any_method, cwd=str(tmp_path / "none"))


async def test_its_standard_input(method: str) -> None:
    """Of one rank ours, of the others empty."""
    read_end, write_end = os.pipe()
    kept = os.dup(0)
    os.dup2(read_end, 0)
    try:
        os.write(write_end, b"for rank 1\n")
        os.close(write_end)
        result = await run(workers.surroundings, (), (), method=method, stdin=1)
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(read_end)
    stdin = {rank: seen["stdin"] for rank, seen in result.return_values.items()}
    assert stdin == {0: "", 1: "for rank 1\n"}


async def test_output_is_redirected_at_the_descriptors(any_method: Any, tmp_path: Path) -> None:
    logs = to_files(tmp_path)
    result = await run(workers.says, (), (), method=any_method, logs_specs=logs)
    assert not result.is_failed()
    for rank in (0, 1):
        stdout, stderr = (
            Path(paths[rank]).read_text() for paths in (result.stdouts, result.stderrs)
        )
        assert stdout.splitlines() == [
            "by print", "by os.write", "by a grandchild", "by printf", "unflushed at the end"
        ]  # fmt: skip
        assert stderr.splitlines() == ["grandchild err", "by stderr"]


async def test_output_is_teed_with_prefixes(
    method: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logs = DefaultLogsSpecs(str(tmp_path / "logs"), tee=Std.ALL)
    await run(workers.says, (), (), method=method, logs_specs=logs)
    out, err = capfd.readouterr()
    for rank in (0, 1):
        for line in ("by print", "by a grandchild", "by printf", "unflushed at the end"):
            assert f"[t{rank}]:{line}\n" in out
        assert f"[t{rank}]:by stderr\n" in err


async def test_threads_and_exit_handlers(any_method: Any, tmp_path: Path) -> None:
    """A worker ends as the interpreter does: it waits for threads, and exit handlers run."""
    notes = tmp_path / "notes"
    assert await value_of(workers.exit_hooks, str(notes), method=any_method) is None
    assert notes.read_text() == "thread\natexit\n"


async def test_random_numbers_differ(method: str) -> None:
    result = await run(workers.numbers_at_random, (), (), (), method=method)
    assert len(set(result.return_values.values())) == 3


# --- multiprocessing ------------------------------------------------------------------------------


@pytest.mark.timeout(90)
async def test_multiprocessing_inside_a_worker(method: str) -> None:
    assert await value_of(workers.square_in_pool, [1, 2, 3], method=method) == [1, 4, 9]
    assert await value_of(workers.square_in_process, "spawn", 7, method=method) == 49
    assert await value_of(workers.square_in_process, "fork", 8, method=method) == 64


async def test_objects_of_multiprocessing_as_arguments(context: Any, method: str) -> None:
    queue, lock, counter = context.Queue(), context.Lock(), context.Value("i", 0)
    ours, theirs = context.Pipe()
    try:
        with lock:
            assert await value_of(workers.is_locked, lock, method=method)
        assert not await value_of(workers.is_locked, lock, method=method)
        ours.send("to it")
        given = (queue, theirs, "from it")
        assert await value_of(workers.put_and_send, *given, method=method) == "to it"
        assert ours.recv() == "from it"
        assert await asyncio.to_thread(queue.get) == "from it"
        await run(workers.increment, *([(counter,)] * 4), method=method)
        assert counter.value == 4
    finally:
        queue.close()
        queue.join_thread()
        for end in (ours, theirs):
            end.close()


async def test_two_objects_that_are_one_descriptor(context: Any, method: str) -> None:
    """Each may be closed without harm to the other."""
    ours, theirs = context.Pipe()
    same = Connection(theirs.fileno())
    try:
        await value_of(workers.send_and_close, theirs, same, method=method)
        assert [ours.recv(), ours.recv()] == [0, 1]
    finally:
        same._handle = None  # type: ignore[attr-defined]
        ours.close()
        theirs.close()


async def test_a_lock_of_another_context_is_refused() -> None:
    lock = multiprocessing.get_context("fork").Lock()
    with pytest.raises(NotPicklableError, match=r"rank 1: argument 0 \(a Lock\).*fork context"):
        await run(workers.is_locked, (1,), (lock,))


async def test_shared_memory_outlives_a_worker(context: Any, method: str) -> None:
    """With a tracker of its own a worker would remove it at its end (bpo-38119)."""
    from multiprocessing.shared_memory import SharedMemory

    ours = SharedMemory(create=True, size=1)
    try:
        for count in (1, 2):
            assert await value_of(workers.count_in, ours.name, method=method) == count
        assert ours.buf[0] == 2
    finally:
        ours.close()
        ours.unlink()


async def test_the_key_of_multiprocessing(context: Any, any_method: Any) -> None:
    """By which its connections recognise each other."""
    importlib.import_module("multiprocessing.connection")
    key = await value_of(workers.authkey, method=any_method)
    assert key == bytes(multiprocessing.current_process().authkey)


async def test_a_managers_proxy(context: Any, method: str) -> None:
    with context.Manager() as manager:
        shared = manager.dict()
        result = await run(workers.add_to, (shared, "a", 1), (shared, "b", 2), method=method)
        result.raise_for_failure("t")
        assert dict(shared) == {"a": 1, "b": 2}


# --- signals and the end --------------------------------------------------------------------------


async def test_signals(method: str, channel: Channel) -> None:
    ranks = [(str(channel.path), rank) for rank in range(2)]
    async with start(workers.tell_of_signals, *ranks, method=method) as ctx:
        assert await channel.pids(2) == ctx.pids()
        ctx.send_signal(signal.SIGUSR1, ranks=[1])
        [[_, rank, _, word]] = await channel.lines(1)
        assert (rank, word) == ("1", "got")
        assert await ctx.wait(0) is None
        ctx.send_signal(signal.SIGSTOP, ranks=[0])
        await ctx.close(signal.SIGINT)
        result = await ctx.wait()
    assert {f.exitcode for f in result.failures.values()} == {-signal.SIGINT}
    assert all(failure.ended_by_us for failure in result.failures.values())


async def test_leaving_the_block_ends_all(any_method: Any, channel: Channel) -> None:
    ranks = [(str(channel.path), rank) for rank in range(2)]
    async with start(workers.ready_then_sleep, *ranks, method=any_method) as ctx:
        pids = (await channel.pids(2)).values()
    result = await ctx.wait()
    assert not any(map(is_alive, pids))
    assert {f.exitcode for f in result.failures.values()} == {-signal.SIGTERM}
    assert result.root_cause is None


async def test_the_stubborn_are_killed(method: str, channel: Channel) -> None:
    async with start(
        workers.stubborn, (str(channel.path), 0), method=method, shutdown_timeout=0.1
    ) as ctx:
        await channel.pids(1)
    [failure] = (await ctx.wait()).failures.values()
    assert failure.exitcode == -signal.SIGKILL
    assert failure.ended_by_us


@pytest.mark.parametrize("wiped", [False, True])
async def test_families_and_escapees_are_ended(
    any_method: Any, wiped: bool, channel: Channel
) -> None:
    async with start(workers.with_family, (str(channel.path), 0, wiped), method=any_method) as ctx:
        [[_, _, *pids]] = await channel.lines(1)
        assert len(pids) == 4
        assert all(is_alive(int(pid)) for pid in pids)
    result = await ctx.wait()
    assert result.warnings == ()
    for pid in pids:
        await gone(int(pid))


async def test_daemons_are_ended(any_method: Any, channel: Channel) -> None:
    """An orphan in a session of its own that was executed by nobody: known by its environment."""
    async with start(workers.orphan_and_return, (str(channel.path),), method=any_method) as ctx:
        [[_, _, pid]] = await channel.lines(1)
        assert carries_token(int(pid))
        result = await ctx.wait()
    await gone(int(pid))
    assert result.return_values == {0: "done"}
    assert result.warnings == ()


async def test_another_groups_daemon_is_left_alone(channel: Channel) -> None:
    """All that a zygote forks has its environment as the kernel shows it, but for the token."""
    rank = (str(channel.path), 0)
    async with Zygote() as zygote, start(workers.ready_then_sleep, rank, method=zygote) as ctx:
        await channel.lines(1)
        await run(workers.nothing, (), method=zygote)
        assert await ctx.wait(0) is None
        assert all(map(is_alive, ctx.pids().values()))


async def test_cancelling_who_waits_harms_nobody(method: str, channel: Channel) -> None:
    async with start(workers.held, (str(channel.path), 0), method=method) as ctx:
        await channel.lines(1)
        waiting = asyncio.create_task(ctx.wait())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await channel.open_gate()
        assert (await ctx.wait()).return_values == {0: 0}


@pytest.mark.parametrize("turns", [0, 2, 5, 9])
async def test_cancelled_while_starting(any_method: Any, turns: int) -> None:
    """Nothing stays: conftest looks."""

    async def go() -> None:
        async with start(workers.sleep_long, (), (), (), method=any_method) as ctx:
            await ctx.wait()

    task = asyncio.create_task(go())
    for _ in range(turns):
        await asyncio.sleep(0.02 if turns > 4 else 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_no_threads_and_no_descriptors_are_added(method: str, channel: Channel) -> None:
    before = count_threads()
    path = str(channel.path)
    async with start(workers.ready_then_sleep, *((path, rank) for rank in range(6)), method=method):
        await channel.pids(6)
        assert all(map(operator.le, count_threads(), before))


# --- stacks and hangs -----------------------------------------------------------------------------


async def test_stacks(any_method: Any, channel: Channel) -> None:
    async with start(workers.ready_then_sleep, (str(channel.path), 0), method=any_method) as ctx:
        await channel.lines(1)
        stacks = await ctx.dump_stacks()
    # It has told us that it is ready, and may still be about to go to sleep.
    assert "ready_then_sleep" in str(stacks[0])


async def test_a_hang(method: str, channel: Channel) -> None:
    async with start(
        workers.ready_then_sleep, (str(channel.path), 0), method=method, hang_timeout=0.5
    ) as ctx:
        result = await ctx.wait()
    assert result.root_cause is not None
    rank, failure = result.root_cause
    assert rank == 0
    assert "hang" in failure.cause or "no progress" in failure.cause or "0.5" in failure.cause
    assert "sleep_long" in report_of(result)


# --- binding --------------------------------------------------------------------------------------


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU for all")
async def test_binding_to_cpus(any_method: Any) -> None:
    options = NumaOptions(affinity_mode="exclusive")
    expected = plan_processes("t", workers.nothing, {0: (), 1: ()}, {0: {}, 1: {}},
                              numa_options=options)  # fmt: skip
    result = await run(workers.affinity_and_policy, (), (), method=any_method, numa_options=options)
    result.raise_for_failure("t")
    for rank, (cpus, _) in result.return_values.items():
        binding = expected.workers[rank].binding
        assert binding is not None
        assert cpus == sorted(binding.cpus)
        assert len(cpus) < len(os.sched_getaffinity(0))


@pytest.mark.skipif(not can_set_memory_policy(), reason="no libnuma, or no NUMA")
@pytest.mark.skipif(shutil.which("numactl") is None, reason="numactl is missing")
@pytest.mark.parametrize(
    ("policy", "mode"),
    [(MemoryPolicy.LOCAL, 4), (MemoryPolicy.PREFERRED, 1), (MemoryPolicy.INTERLEAVE, 3)],
)
async def test_binding_of_memory(policy: MemoryPolicy, mode: int, method: str) -> None:
    options = NumaOptions(affinity_mode="node", memory_policy=policy)
    _, seen = await value_of(workers.affinity_and_policy, method=method, numa_options=options)
    assert seen == mode


async def test_memory_that_a_fork_cannot_bind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asupervise.functions.memory_policy._libnuma", lambda: None)
    options = NumaOptions(affinity_mode="node", memory_policy=MemoryPolicy.LOCAL)
    with pytest.raises(BindingError, match=r"memory_policy='local' in a forked worker .*libnuma"):
        await run(workers.nothing, (), method="forkserver", numa_options=options)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "args", "words"),
    [
        (
            workers.square,
            (1, 2),
            r"args: local rank 1: \(1, 2\) does not fit .*square\(number: 'int'\)",
        ),
        (workers.square, (), r"rank 1: \(\) does not fit .*missing a required argument: 'number'"),
        (workers.later, (1, 2), "rank 1: .*later"),
        (functools.partial(workers.square, 1), (1,), "rank 0: .*square"),
        (Point, (), "rank 1: .*missing a required argument: 'x'"),
        (workers.Adder(1), (), "rank 1: "),
    ],
)
def test_arguments_that_do_not_fit(function: Any, args: tuple[Any, ...], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        start(function, (1,), args)


async def test_arguments_by_an_iterator() -> None:
    """It is read once, though the signature is checked before the arguments travel."""
    assert (await run(workers.echo, iter((1, 2)))).return_values == {0: (1, 2)}  # type: ignore[arg-type]


def test_a_large_argument_is_not_shown_whole() -> None:
    with pytest.raises(TypeError) as caught:
        start(workers.nothing, (workers.big_dict(100_000),))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("method", ["threads", "SPAWN", "", None, 3, object()])
def test_a_start_method_that_does_not_exist(method: Any) -> None:
    with pytest.raises(
        ValueError, match=r"start_method: .*: expected 'spawn', 'fork', 'forkserver'"
    ):
        start(workers.nothing, method=method)


@pytest.mark.parametrize(
    "function",
    [workers.count_up, workers.count_up_later, functools.partial(workers.count_up)],
)
def test_a_generator_function(function: Any) -> None:
    with pytest.raises(ValueError, match=r"entrypoint: .*count_up.* is a generator function"):
        start(function)


def test_what_a_program_has_no_use_for() -> None:
    zygote = Zygote()
    with pytest.raises(ValueError, match="start_method: entrypoint 'true' is a program"):
        start_processes("t", "true", {0: ()}, {0: {}}, start_method=zygote)
    with pytest.raises(ValueError, match="preload: entrypoint 'true' is a program"):
        start_processes("t", "true", {0: ()}, {0: {}}, start_method="fork", preload=["os"])


def test_preload_where_nothing_is_preloaded() -> None:
    with pytest.raises(
        ValueError, match=r"preload: \['json'\]: a spawned worker imports for itself"
    ):
        start(workers.nothing, preload=["json"])
    with pytest.raises(ValueError, match=r"preload: \['json'\]: the zygote has its own"):
        start(workers.nothing, method=Zygote(), preload=["json"])
    with pytest.raises(ValueError, match="preload: 'json': expected a sequence"):
        start(workers.nothing, method="forkserver", preload="json")
    for name in ("", "a b", "a..b", "/x.py"):
        with pytest.raises(ValueError, match=r"preload: .*expected the name of a module"):
            start(workers.nothing, method="forkserver", preload=[name])


def test_a_plan_of_functions() -> None:
    plan = plan_processes(
        "t", workers.square, {0: (1,)}, {0: {}}, start_method="forkserver", preload=["json"]
    )
    [worker] = plan.workers
    assert worker.program == "tests.function_workers.square"
    with pytest.raises(ValueError, match="preload: "):
        plan_processes("t", workers.square, {0: (1,)}, {0: {}}, preload=["json"])


async def test_what_cannot_travel_is_refused_before_anything_is_started(
    method: str, tmp_path: Path
) -> None:
    logs = to_files(tmp_path)
    lock = workers.a_lock()
    with pytest.raises(NotPicklableError, match=r"args: local rank 1: argument 2 \(a lock\)") as e:
        await run(workers.echo, (1, 2, 3), (1, 2, lock), method=method, logs_specs=logs)
    assert e.value.local_rank == 1
    assert not list((tmp_path / "logs").rglob("*"))


# --- scripts --------------------------------------------------------------------------------------


SCRIPT = """
import asyncio, os, sys
from asupervise import start_processes

class Result:
    def __init__(self, number, name):
        self.number, self.name = number, name

def square(number):
    return Result(number ** 2, __name__)

async def main(method):
    numbers = {0: (3,), 1: (4,)}
    async with start_processes("t", square, numbers, {0: {}, 1: {}}, start_method=method) as ctx:
        result = await ctx.wait()
    result.raise_for_failure("t")
    values = result.return_values
    print([value.number for value in values.values()], values[0].name)
    print("same class:", all(type(value) is Result for value in values.values()))

sys.stderr.write(f"module {__name__}\\n")  # in one piece, beside the other worker
"""
GUARDED = (
    SCRIPT
    + """
if __name__ == "__main__":
    for method in ("spawn", "forkserver"):
        asyncio.run(main(method))
"""
)
UNGUARDED = (
    SCRIPT
    + """
asyncio.run(main("{method}"))
"""
)


def check_script(done: Any, name: str) -> None:
    assert done.returncode == 0
    assert done.stdout.decode() == f"[9, 16] {name}\nsame class: True\n" * 2


def test_a_script(run_cli: Run, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(GUARDED)
    done = run_cli(script, command=(sys.executable,))
    check_script(done, "__mp_main__")
    # Once in each spawned worker, and once in the zygote.
    assert done.stderr.decode().splitlines().count("module __mp_main__") == 2


MULTIPROCESSING = """
import asyncio, multiprocessing
import asupervise

def is_locked(lock):
    return not lock.acquire(block=False)

async def main(start_method, preload):
    lock = multiprocessing.get_context("spawn").Lock()
    with lock:
        group = asupervise.start_processes(
            "t", is_locked, {0: (lock,)}, {0: {}}, start_method=start_method, preload=preload
        )
        async with group as ctx:
            result = await ctx.wait()
    result.raise_for_failure("t")
    print(result.return_values)

if __name__ == "__main__":
    asyncio.run(main("spawn", []))
    asyncio.run(main("forkserver", ["multiprocessing.pool"]))
"""


def test_a_script_with_multiprocessing(run_cli: Run, tmp_path: Path) -> None:
    """Importing multiprocessing gives the name __mp_main__ to what is the main module then."""
    script = tmp_path / "script.py"
    script.write_text(MULTIPROCESSING)
    done = run_cli(script, command=(sys.executable,))
    assert done.stdout.decode() == "{0: True}\n" * 2
    assert done.stderr == b""


def test_a_module_as_script(run_cli: Run, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "job.py").write_text(GUARDED)
    (package / "__main__.py").write_text(GUARDED)
    for name in ("package.job", "package"):
        check_script(run_cli("-m", name, command=(sys.executable,), cwd=tmp_path), "__mp_main__")


def test_a_folder_as_script(run_cli: Run, tmp_path: Path) -> None:
    (tmp_path / "__main__.py").write_text(GUARDED)
    check_script(run_cli(tmp_path, command=(sys.executable,)), "__mp_main__")


def test_a_script_without_a_file(run_cli: Run) -> None:
    """Its functions travel by value, and its classes are ours again when they come back."""
    check_script(run_cli("-c", GUARDED, command=(sys.executable,)), "__main__")
    done = run_cli("-", command=(sys.executable,), input=GUARDED.encode())
    check_script(done, "__main__")


def test_flags_of_the_interpreter_are_passed_on(run_cli: Run) -> None:
    code = SCRIPT.replace("number ** 2, __name__", "sys.flags.optimize, sys.flags.dev_mode")
    code += "\nif __name__ == '__main__': asyncio.run(main('spawn')); asyncio.run(main('fork'))"
    done = run_cli("-OO", "-X", "dev", "-W", "ignore", "-c", code, command=(sys.executable,))
    assert done.stdout.decode().splitlines()[::2] == ["[2, 2] True"] * 2


@pytest.mark.parametrize("how", METHODS)
def test_a_script_without_a_guard(how: str, run_cli: Run, tmp_path: Path) -> None:
    """One clear error instead of workers that start workers, and so on."""
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED.replace("{method}", how))
    done = run_cli(script, command=(sys.executable,), timeout=30)
    assert done.returncode == 1
    stderr = done.stderr.decode()
    assert 'if __name__ == "__main__":' in stderr
    assert "ChildFailedError" in stderr
    # Ours, each worker's, and the zygote's; none of a worker's worker.
    assert len(re.findall("^module ", stderr, re.MULTILINE)) <= 4
    assert not re.search("^module __main__", stderr.partition("__mp_main__")[2], re.MULTILINE)


def test_a_zygote_in_a_script_without_a_guard(run_cli: Run, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + textwrap.dedent("""
        from asupervise import Zygote
        async def with_zygote():
            async with Zygote() as zygote:
                await main(zygote)
        asyncio.run(with_zygote())
        """))  # fmt: skip
    done = run_cli(script, command=(sys.executable,), timeout=30)
    assert done.returncode == 1
    assert 'if __name__ == "__main__":' in done.stderr.decode()
