"""The zygote: kept and reused, refused and lost, and gone whatever happens."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from asupervise import (
    ChildFailedError,
    DefaultLogsSpecs,
    RunProcsResult,
    Std,
    Zygote,
    ZygoteError,
    start_processes,
)
from asupervise.functions import environment
from asupervise.functions.environment import check_facts
from tests import function_workers as workers
from tests.conftest import ROOT, clean_environment, open_files, own_children, wait_gone
from tests.workers import Channel, gone, is_alive

Write = Callable[[str, str], str]

pytestmark = pytest.mark.usefixtures("own_temporary_folder")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module that can be preloaded, and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, code: str) -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
        return name

    return write


def start(function: Any, *args: tuple[Any, ...], method: Any = "forkserver", **options: Any) -> Any:
    by_rank = dict(enumerate(args or ((),)))
    envs = options.pop("envs", {rank: {} for rank in by_rank})
    return start_processes("t", function, by_rank, envs, start_method=method, **options)


async def run(function: Any, *args: tuple[Any, ...], **options: Any) -> RunProcsResult:
    async with start(function, *args, **options) as ctx:
        return await ctx.wait()


async def value_of(function: Any, *args: Any, **options: Any) -> Any:
    result = await run(function, args, **options)
    result.raise_for_failure("t")
    return result.return_values[0]


def report_of(result: RunProcsResult) -> str:
    with pytest.raises(ChildFailedError) as caught:
        result.raise_for_failure("t")
    return str(caught.value)


# --- kept -----------------------------------------------------------------------------------------


async def test_many_groups_one_after_the_other() -> None:
    """No descriptors and no children are added, here and in the zygote."""
    async with Zygote(["tests.function_workers"]) as zygote:
        await run(workers.echo, (1,), (2,), method=zygote)
        files, children = open_files(), own_children()
        zygote_files = os.listdir(f"/proc/{zygote.pid}/fd")
        for number in range(30):
            result = await run(workers.echo, (number,), ("x",), method=zygote)
            assert result.return_values == {0: (number,), 1: ("x",)}
        assert open_files() == files
        assert own_children() == children
        assert os.listdir(f"/proc/{zygote.pid}/fd") == zygote_files
        assert not children_of(zygote.pid)
        assert not any((zygote._answers, zygote._children, zygote._being_reaped, zygote._outbox))


async def test_many_groups_at_once(channel: Channel) -> None:
    async with Zygote() as zygote:
        groups = (run(workers.echo, (n,), (n, n), method=zygote) for n in range(12))
        async with start(workers.held, (str(channel.path), 0), method=zygote) as ctx:
            await channel.lines(1)
            results = await asyncio.gather(*groups)
            assert await ctx.wait(0) is None
            await channel.open_gate()
            assert (await ctx.wait()).return_values == {0: 0}
    assert [r.return_values for r in results] == [{0: (n,), 1: (n, n)} for n in range(12)]


async def test_after_a_failure_it_goes_on() -> None:
    async with Zygote() as zygote:
        for function, args in (
            (workers.raise_of, ("ValueError",)),
            (workers.die_of, (int(signal.SIGKILL),)),
            (workers.os_exit, (3,)),
            (workers.segfault, ()),
            (workers.close_all_and_return, ("value",)),
        ):
            assert (await run(function, args, method=zygote)).is_failed()
        assert await value_of(workers.echo, 1, method=zygote) == (1,)


async def test_a_worker_cannot_change_what_the_next_one_gets() -> None:
    async with Zygote(["tests.function_workers"]) as zygote:
        before = await value_of(workers.surroundings, method=zygote)
        code = "import os, sys; os.environ['X'] = '1'; os.chdir('/'); sys.path.clear(); os.umask(0)"
        await value_of(exec, code, method=zygote)
        after = await value_of(workers.surroundings, method=zygote)
        for what in ("cwd", "path", "argv"):
            assert before[what] == after[what]
        assert "X" not in after["env"]


async def test_what_has_been_imported_is_there(write: Write) -> None:
    name = write("preloaded", "import os; PID = os.getpid(); VALUES = ['there']")
    code = f"__import__('sys').modules['{name}'].PID"
    async with Zygote([name, "xml.dom.minidom"]) as zygote:
        assert zygote.preload == (name, "xml.dom.minidom")
        assert await value_of(eval, code, method=zygote) == zygote.pid
        assert "xml.dom.minidom" in await value_of(eval, "list(__import__('sys').modules)",
                                                   method=zygote)  # fmt: skip
    assert await value_of(eval, code, preload=[name]) != os.getpid()


async def test_the_functions_own_module_is_imported_by_the_zygote(write: Write) -> None:
    name = write("imported_late", "import os\nPID = os.getpid()\ndef pid(): return PID")
    module = __import__(name)
    async with Zygote() as zygote:
        found = {await value_of(module.pid, method=zygote) for _ in range(2)}
    assert found == {zygote.pid}
    del sys.modules[name]


async def test_a_preload_with_a_signal_handler_of_its_own(write: Write) -> None:
    """The worker has it; the zygote hears of its children nevertheless."""
    code = "import signal; signal.signal(signal.SIGCHLD, lambda *_: print('heard'))"
    name = write("hears", code)
    get = "(s := __import__('signal')).getsignal(s.SIGCHLD).__module__"
    async with Zygote([name]) as zygote:
        for _ in range(2):
            assert await value_of(eval, get, method=zygote) == name
        assert "heard" not in zygote.said()


async def test_the_zygotes_environment() -> None:
    """Of the zygote for its imports, and of its workers, but for what a group says itself."""
    code = "[__import__('os').environ.get(name) for name in ('A', 'B', 'C')]"
    async with Zygote(env={"A": "zygote", "B": "zygote"}) as zygote:
        [seen] = (await run(eval, (code,), envs={0: {"B": "rank"}}, method=zygote)
                  ).return_values.values()  # fmt: skip
    assert seen == ["zygote", "rank", None]


async def test_changes_of_our_own_environment_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "[__import__('os').environ.get(name) for name in ('NEW', 'OLD')]"
    monkeypatch.setenv("OLD", "old")
    async with Zygote() as zygote:
        assert await value_of(eval, code, method=zygote) == [None, "old"]
        monkeypatch.setenv("NEW", "new")
        monkeypatch.delenv("OLD")
        assert await value_of(eval, code, method=zygote) == ["new", None]


async def test_its_life() -> None:
    zygote = Zygote()
    assert zygote.pid == 0
    assert not zygote.running
    assert "not running" in repr(zygote)
    with pytest.raises(ZygoteError, match="is not running"):
        await run(workers.nothing, method=zygote)
    async with zygote:
        assert zygote.running
        assert str(zygote.pid) in repr(zygote)
        with pytest.raises(RuntimeError, match="started already"):
            await zygote.start()
        assert await value_of(workers.echo, method=zygote) == ()
    assert not zygote.running
    assert not is_alive(zygote.pid)
    await zygote.close()
    with pytest.raises(RuntimeError, match="started already"):
        await zygote.start()
    with pytest.raises(ZygoteError, match="is not running"):
        await run(workers.nothing, method=zygote)


async def test_closed_before_it_is_started() -> None:
    await Zygote().close()


async def test_it_is_no_orphan_of_a_group_whose_orphans_come_to_us(channel: Channel) -> None:
    """Its own guardian neither."""
    async with Zygote() as zygote:
        before = own_children()
        assert before == zygote.helpers
        group = start(workers.held, (str(channel.path), 0), method=zygote, subreaper=True)
        async with group as ctx:
            await channel.lines(1)
            # Longer than the time in which only processes younger than the group are looked at.
            assert await ctx.wait(0.6) is None
            await channel.open_gate()
            assert (await ctx.wait()).return_values == {0: 0}
        assert own_children() == before
    group = start(workers.orphan_and_return, (str(channel.path),), subreaper=True)
    async with group as ctx:
        [[_, _, pid]] = await channel.lines(1)
        assert (await ctx.wait()).warnings == ()
    await gone(int(pid))


# --- what is refused ------------------------------------------------------------------------------


async def check_refused(words: str, *preload: str) -> ZygoteError:
    """As a zygote of the group's own, and as a kept one."""
    with pytest.raises(ZygoteError, match=words):
        await run(workers.nothing, preload=preload)
    with pytest.raises(ZygoteError, match=words) as caught:
        await Zygote(preload).start()
    return caught.value


async def test_a_preload_that_does_not_exist() -> None:
    error = await check_refused("preload: .*no_such_module", "json", "no_such_module")
    assert "ModuleNotFoundError: No module named 'no_such_module'" in str(error)
    assert error.hint


async def test_a_preload_that_raises(write: Write) -> None:
    name = write(
        "raises_at_import",
        """\
        def inner():
            raise ValueError("at import")
        inner()
        """,
    )
    error = await check_refused("raises_at_import", name)
    assert "Traceback (most recent call last)" in str(error)
    assert f'{name}.py", line 2, in inner' in str(error)
    assert "ValueError: at import" in str(error)
    assert "asupervise/functions" not in str(error)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        (
            "import os; os.write(2, b'last words'); os._exit(4)",
            "exit status 4; it said:\nlast words",
        ),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        ("import os; os.closerange(3, 4096)", "the zygote .* is gone"),
    ],
)
async def test_a_preload_that_ends_the_zygote(code: str, words: str, write: Write) -> None:
    await check_refused(words, write("ends_at_import", code))


async def test_a_preload_that_starts_a_thread(write: Write) -> None:
    name = write(
        "starts_thread",
        """\
        import threading, time
        threading.Thread(target=time.sleep, args=(1000,), name="ticker", daemon=True).start()
        """,
    )
    error = await check_refused("starts_thread", "json", name)
    assert "the import of starts_thread has started the thread 'ticker'" in str(error)
    assert "spawn" in str(error.hint)


async def test_a_thread_that_the_functions_module_starts(write: Write) -> None:
    name = write(
        "module_with_thread",
        """\
        import os, threading, time
        if os.environ.get("WORKER"):
            threading.Thread(target=time.sleep, args=(1000,), name="own", daemon=True).start()
        def function(): return threading.active_count()
        """,
    )
    module = __import__(name)
    try:
        with pytest.raises(ZygoteError, match=r"import of module_with_thread .*the thread 'own'"):
            await run(module.function, envs={0: {"WORKER": "1"}})
        assert await value_of(module.function, envs={0: {"WORKER": "1"}}, method="spawn") == 2
    finally:
        del sys.modules[name]


async def test_a_native_thread_is_warned_of(write: Write) -> None:
    """One that Python does not know by name."""
    name = write(
        "starts_native",
        "import _thread, time; _thread.start_new_thread(time.sleep, (1000,)); time.sleep(0.01)",
    )
    async with Zygote([name]) as zygote:
        for _ in range(2):
            result = await run(workers.nothing, method=zygote)
            [warning] = result.warnings
            assert "the import of starts_native has started native threads" in warning
            assert not result.is_failed()


async def test_a_thread_that_has_ended_is_none(write: Write) -> None:
    name = write(
        "joins_thread",
        "import threading; t = threading.Thread(target=int); t.start(); t.join()",
    )
    assert (await run(workers.nothing, preload=[name])).warnings == ()


def test_an_accelerators_context_is_refused() -> None:
    facts = {"devices": {"/dev/nvidia-uvm": "uses_cuda"}, "threads": {}}
    with pytest.raises(ZygoteError, match="the import of uses_cuda has opened /dev/nvidia-uvm"):
        check_facts(facts)
    check_facts({"devices": {}, "threads": {}})


# --- variables that come too late -----------------------------------------------------------------


async def test_variables_that_a_preload_has_read(write: Write) -> None:
    name = write("reads", "import os; os.environ.get('CUDA_VISIBLE_DEVICES'); os.getenv('NCCL_X')")
    envs = {
        0: {"CUDA_VISIBLE_DEVICES": "0", "LD_PRELOAD": "", "PYTHONHASHSEED": "1", "FREE": "1"},
        1: {"CUDA_VISIBLE_DEVICES": "1", "PYTHONHASHSEED": "1", "FREE": "2", "CUDA_OTHER": "1"},
    }
    async with Zygote([name]) as zygote:
        result = await run(workers.nothing, (), (), envs=envs, method=zygote)
        assert not result.is_failed()
        cuda, preload, seed = sorted(result.warnings)
        assert "envs: CUDA_VISIBLE_DEVICES='0' of local rank 0 comes too late" in cuda
        assert "the import of reads has already read it" in cuda
        assert "LD_PRELOAD='' of local rank 0" in preload
        assert "PYTHONHASHSEED='1'" in seed
        assert all("Zygote(env=...)" in warning for warning in result.warnings)
    # What the zygote has been given is not too late; nor what is the same for all workers.
    async with Zygote([name], env={"CUDA_VISIBLE_DEVICES": "0"}) as zygote:
        same = {0: {"CUDA_VISIBLE_DEVICES": "0"}}
        assert (await run(workers.nothing, envs=same, method=zygote)).warnings == ()
    same = {rank: {"CUDA_VISIBLE_DEVICES": "0", "LD_PRELOAD": ""} for rank in range(2)}
    assert (await run(workers.nothing, (), (), envs=same, preload=[name])).warnings == ()


FACTS: dict[str, Any] = {"read": {}, "openmp": "", "native": []}


@pytest.mark.parametrize(
    ("name", "facts", "words"),
    [
        ("LD_LIBRARY_PATH", {}, "when a program is loaded"),
        ("MALLOC_ARENA_MAX", {}, "when a program is loaded"),
        ("PYTHONUTF8", {}, "when the interpreter starts"),
        ("OMP_NUM_THREADS", {"openmp": "torch"}, "the import of torch has loaded"),
        ("OMP_NUM_THREADS", {}, ""),
        ("CUDA_VISIBLE_DEVICES", {"read": {"CUDA_VISIBLE_DEVICES": "lib"}}, "import of lib"),
        ("CUDA_VISIBLE_DEVICES", {"read": {"CUDA_HOME": "lib"}}, ""),
        ("MY_OWN", {"read": {"MY_OWN": "lib"}}, ""),
    ],
)
def test_who_comes_too_late(name: str, facts: dict[str, Any], words: str) -> None:
    found = environment.warnings([{}, {name: "1"}], {name: "0"}, FACTS | facts)
    assert len(found) == bool(words)
    assert all(words in text and f"{name}='1' of local rank 1" in text for text in found)
    assert environment.warnings([{name: "1"}], {name: "1"}, FACTS | facts) == []


# --- lost -----------------------------------------------------------------------------------------


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


async def test_killed_while_workers_run(channel: Channel) -> None:
    ranks = [(str(channel.path), rank) for rank in range(3)]
    async with Zygote() as zygote, start(workers.ready_then_sleep, *ranks, method=zygote) as ctx:
        pids = await channel.pids(3)
        assert sorted(children_of(zygote.pid)) == sorted(pids.values())
        os.kill(zygote.pid, signal.SIGKILL)
        result = await ctx.wait()
        for pid in pids.values():
            await gone(pid)
    assert result.return_values == {}
    assert result.root_cause is not None
    cause = result.root_cause[1].cause
    assert f"the zygote (process {zygote.pid}) is gone: it ended by SIGKILL" in cause
    assert report_of(result).count("is gone") == 1


async def test_killed_while_workers_run_that_are_its_only_groups(channel: Channel) -> None:
    async with start(workers.ready_then_sleep, (str(channel.path), 0)) as ctx:
        [[_, _, pid]] = await channel.lines(1)
        zygote = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(zygote, signal.SIGKILL)
        result = await ctx.wait()
        await gone(int(pid))
    assert "the zygote" in report_of(result)


async def test_killed_while_idle() -> None:
    async with Zygote() as zygote:
        await run(workers.nothing, method=zygote)
        os.kill(zygote.pid, signal.SIGKILL)
        for _ in range(2):  # at once, and when its end is known
            with pytest.raises(ZygoteError, match=r"zygote.* is (gone|not running)"):
                await run(workers.nothing, method=zygote)
        assert not zygote.running


def imports_for_long(write: Write, channel: Channel) -> str:
    code = f"""\
        import time
        with open({str(channel.path)!r}, "w") as file:
            file.write("importing\\n")
        time.sleep(1000)
        """
    return write("imports_for_long", code)


async def test_killed_while_it_imports(write: Write, channel: Channel) -> None:
    name = imports_for_long(write, channel)
    zygote = Zygote([name])
    starting = asyncio.create_task(zygote.start())
    await channel.lines(1)
    os.kill(zygote.pid, signal.SIGKILL)
    with pytest.raises(ZygoteError, match="ended by SIGKILL"):
        await starting


async def test_cancelled_while_it_imports(write: Write, channel: Channel) -> None:
    name = imports_for_long(write, channel)
    zygote = Zygote([name])
    starting = asyncio.create_task(zygote.start())
    await channel.lines(1)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not is_alive(zygote.pid)


async def test_closed_while_groups_run(channel: Channel) -> None:
    """Every worker ends with it, the stubborn too, and says why."""
    path = str(channel.path)
    async with Zygote() as zygote, start(workers.stubborn, (path, 0), method=zygote,
                                         shutdown_timeout=0.1) as stubborn:  # fmt: skip
        async with start(workers.with_family, (path, 1), method=zygote) as ctx:
            lines = await channel.lines(2)
            pids = [int(pid) for line in lines for pid in line[2:]]
            await zygote.close()
            result = await ctx.wait()
        assert "it has been closed" in report_of(result)
        assert "it has been closed" in report_of(await stubborn.wait())
    for pid in pids:
        await gone(pid)


HOST = """
import asyncio, os, sys
sys.path.insert(0, {root!r})
from asupervise import Zygote, start_processes
from tests import function_workers as workers

async def main():
    async with Zygote(guardian={guardian}) as zygote:
        args = {{0: ({path!r}, 0), 1: ({path!r}, 1)}}
        group = start_processes("t", workers.with_family, args, {{0: {{}}, 1: {{}}}},
                                start_method={method}, guardian={guardian})
        async with group as ctx:
            with open({path!r}, "w") as file:
                file.write(f"host {{os.getpid()}} {{zygote.pid}}\\n")
            await ctx.wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("method", ["zygote", "'forkserver'", "'spawn'"])
async def test_the_supervisor_is_killed(method: str, channel: Channel, tmp_path: Path) -> None:
    """Zygote, workers and whatever they have started are gone, by the guardian."""
    code = HOST.format(root=str(ROOT), path=str(channel.path), method=method, guardian=True)
    host = subprocess.Popen([sys.executable, "-c", code], env=clean_environment())
    try:
        lines = await channel.lines(3)
        pids = [int(pid) for line in lines for pid in line[1 if line[0] == "host" else 2 :]]
        assert len(pids) == 2 + 2 * 4
        assert all(map(is_alive, pids))
    finally:
        host.kill()
        host.wait()
    assert not wait_gone(pids, timeout=10)


async def test_the_end_of_the_supervisor_ends_the_zygote_without_a_guardian(
    channel: Channel,
) -> None:
    zygote = Zygote(guardian=False)
    await zygote.start()
    assert zygote._control is not None
    zygote._hang_up()  # as the kernel does for who is killed
    await gone(zygote.pid)
    await zygote.close()


# --- forking fails --------------------------------------------------------------------------------


async def test_no_descriptor_is_left() -> None:
    async with Zygote(["tests.function_workers"]) as zygote:
        await run(workers.nothing, method=zygote)
        files = open_files()
        for spare in range(0, 24, 3):
            with few_descriptors(spare), pytest.raises(OSError) as caught:  # noqa: PT011
                await run(workers.sleep_long, *([()] * 30), method=zygote)
            assert caught.value.errno == errno.EMFILE
            assert open_files() == files
        assert await value_of(workers.echo, method=zygote) == ()


@contextmanager
def few_descriptors(spare: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    held = []
    try:
        with suppress(OSError):
            while True:
                held.append(os.dup(0))
        for _ in range(spare):
            os.close(held.pop())
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_worker_that_cannot_be_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so itself, and the zygote goes on."""
    async with Zygote() as zygote:
        with monkeypatch.context() as patch:
            patch.setattr("asupervise.functions.work._memory", lambda plan: ("no such", [0]))
            for _ in range(3):
                with pytest.raises(OSError, match=r"local rank 0: cannot start .*no such"):
                    await run(workers.nothing, method=zygote)
        assert await value_of(workers.echo, method=zygote) == ()
        assert not children_of(zygote.pid)
        assert not zygote._children


async def test_more_workers_than_the_socket_takes_at_once() -> None:
    """Messages wait for their turn, with copies of their descriptors."""
    async with Zygote(["tests.function_workers"]) as zygote:
        fill_up(zygote)
        groups = [asyncio.create_task(run(workers.echo, (n,), method=zygote)) for n in range(20)]
        while not zygote._outbox:
            await asyncio.sleep(0)
        os.kill(zygote.pid, signal.SIGCONT)
        results = await asyncio.gather(*groups)
    assert [result.return_values[0] for result in results] == [(n,) for n in range(20)]


def fill_up(zygote: Zygote) -> None:
    """Stop it, and have its socket hold next to nothing."""
    os.kill(zygote.pid, signal.SIGSTOP)
    assert zygote._control is not None
    zygote._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)


@pytest.mark.parametrize("closed", [False, True])
async def test_messages_that_wait_when_the_zygote_goes(closed: bool) -> None:
    async with Zygote(["tests.function_workers"]) as zygote:
        files = open_files()
        fill_up(zygote)
        groups = [asyncio.create_task(run(workers.echo, (n,), method=zygote)) for n in range(20)]
        while not zygote._outbox:
            await asyncio.sleep(0)
        if closed:
            await zygote.close()
        else:
            os.kill(zygote.pid, signal.SIGKILL)
        results = await asyncio.gather(*groups, return_exceptions=True)
        assert all(isinstance(result, ZygoteError) for result in results)
        assert open_files().keys() <= files.keys()


# --- output ---------------------------------------------------------------------------------------


async def test_what_imports_print_is_kept_out_of_the_workers_output(
    write: Write, tmp_path: Path
) -> None:
    name = write("prints", "import os; print('by import'); os.write(1, b'more')")
    logs = DefaultLogsSpecs(str(tmp_path / "logs"), redirects=Std.ALL)
    async with Zygote([name]) as zygote:
        result = await run(workers.nothing, method=zygote, logs_specs=logs)
        assert "more" in zygote.said()
    assert Path(result.stdouts[0]).read_text() == ""


@pytest.mark.parametrize("groups", [0, 1])
def test_it_ends_with_its_event_loop(groups: int) -> None:
    """Nobody has closed it; a group of it has not been closed, either."""

    async def forgetful() -> tuple[Zygote, list[int]]:
        zygote = Zygote(["json"])
        await zygote.start()
        pids = [zygote.pid]
        maps: Any = ({0: (1000,)}, {0: {}})
        for _ in range(groups):
            ctx = await start_processes("t", time.sleep, *maps, start_method=zygote)
            pids += ctx.pids().values()
        return zygote, pids

    zygote, pids = asyncio.run(forgetful())
    assert not zygote.running
    assert not wait_gone(pids)
