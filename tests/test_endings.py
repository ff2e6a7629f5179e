"""However a group ends, nothing of it is alive: endings x kinds of workers, with real processes.

Every process of a cell has the cell's marker in its command line (the odd number of seconds that
its ``sleep`` takes), so that it is found whatever it did to its session, its parent or its
environment, and without the token that the cleanup itself goes by.

What the library cannot find is said in `KINDS` (`needs_subreaper`): a process that has left its
session, wiped its environment *and* lost its parent. Where the caller owns the process, and lets
it be a subreaper as the command line does, that one is found as well; not after a SIGKILL of the
supervisor though, which takes the subreaper away.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from asupervise import start_processes
from tests.conftest import ROOT, clean_environment, describe, wait_gone
from tests.workers import PYTHON, Channel

# The promise: a second after the end nothing is alive. A machine that has much more to do than it
# can gets longer for the start of an interpreter, which is what this time is needed for.
WITHIN_S = 1.0 if os.getloadavg()[0] < 1.5 * (os.cpu_count() or 1) else 3.0
GRACE_S = 0.25
# Who is alive then, and gone this much later, was late; who is not, was missed.
LATE_S = 5.0
LATE = " (late)"
# Ends that cost much at once (an interpreter's start each) happen so many at a time.
AT_ONCE = 3


# --- the kinds ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One kind of worker.

    Attributes:
        setup: what the worker's shell does first, with the names that `Cell.fill` fills in.
        ready: how many lines come through the channel once all of it is there.
        leaves: whether the leader exits at once, with the status that the ending demands.
        holds: what the leader does then, instead of sleeping until it is ended.
        needs_subreaper: only found by a subreaper.
    """

    setup: str
    ready: int = 1
    leaves: bool = False
    holds: str = ""
    needs_subreaper: bool = False


# In a child, `report` says that it is there and then sleeps.
KINDS = {
    "plain": Kind("{say}"),
    "ignores SIGTERM": Kind("trap '' TERM INT HUP; {say}"),
    # A subshell says it, when its parent is stopped already ($$ is the parent's).
    "stopped": Kind("(kill -STOP $$; {say})"),
    "child in its group": Kind("sh -c '{report}' & {say}", 2),
    "stopped child": Kind("sh -c '(kill -STOP $$; {say}); {sleep}' & {say}", 2),
    "setsid grandchild": Kind("setsid sh -c '{report}' & {say}", 2),
    "daemon": Kind("(setsid sh -c '{report}' &); {say}", 2),
    "stubborn daemon": Kind("(trap '' TERM; setsid sh -c '{report}' &); {say}", 2),
    "stopped daemon": Kind("(setsid sh -c '(kill -STOP $$; {say}); {sleep}' &); {say}", 2),
    # The child hears of the leader's death by the end of a pipe, and only then is ready.
    "leader dead": Kind(
        '{python} "import os; r, w = os.pipe(); pid = os.fork(); pid and os._exit({status}); '
        "os.close(w); os.read(r, 1); os.execvp('sh', ['sh', '-c', '''{report}'''])\" & wait $!; "
        "exit {status}",
        leaves=True,
    ),
    "wiped environment": Kind("env -i setsid sh -c '{report}' & {say}", 2),
    "wiped daemon": Kind("(env -i setsid sh -c '{report}' &); {say}", 2, needs_subreaper=True),
    # The leader of a session cannot change its group; what it starts can.
    "other group": Kind(
        "{python} \"import os; os.setpgid(0, 0); os.execvp('sh', ['sh', '-c', '''{report}'''])\" & "
        "{say}",
        2,
    ),
    # Told to end, it starts a daemon first.
    "starts one at its end": Kind(
        "trap '(setsid {pause} &); exit 0' TERM INT; {say}",
        holds="while :; do {pause} & wait $!; done",
    ),
}


class Cell:
    """One worker of a kind (local rank 0) beside a plain one (local rank 1), and its marker."""

    def __init__(self, kind: str, ending: str, folder: Path) -> None:
        self.name = kind
        self.kind = KINDS[kind]
        self.ending = ending
        # Seconds; nothing else sleeps just so long.
        self.marker = f"100000.{secrets.randbelow(10**15):015}"
        self.folder = folder / kind.replace(" ", "_")
        self.folder.mkdir()
        self.channel = Channel(self.folder)
        self.go = f"{self.folder}/go"
        os.mkfifo(self.go)
        self._go = os.open(self.go, os.O_RDWR | os.O_CLOEXEC)
        # Held while a supervisor that has a process of its own ends.
        self.turn = asyncio.Semaphore(AT_ONCE)
        # What an ending has found to be left by itself.
        self.seen: list[str] = []

    def close(self) -> None:
        self.channel.close()
        os.close(self._go)

    @property
    def scripts(self) -> tuple[str, str]:
        """Of local rank 0 and 1."""
        waits_for_go = 'read line < "{go}"; exit {status}'
        first = self.kind.setup
        if not self.kind.leaves:
            hold = self.kind.holds or "{sleep}"
            first += "; " + (waits_for_go if self.ending == "success" else hold)
        other = "{say}; " + (waits_for_go if self.ending in ("success", "failure") else "{sleep}")
        return self.fill(first), self.fill(other)

    def fill(self, script: str) -> str:
        say = f"echo ready >> {self.channel.path}"
        sleep = f"exec sleep {self.marker}"
        names = {
            "{report}": f"{say}; {sleep}",
            "{say}": say,
            "{sleep}": sleep,
            "{pause}": f"sleep {self.marker}",
            "{go}": self.go,
            "{status}": "3" if self.ending == "failure" else "0",
            "{python}": " ".join(PYTHON),
        }
        for name, value in names.items():
            script = script.replace(name, value)
        return script

    def arguments(self, **options: Any) -> dict[str, Any]:
        """Of `start_processes`."""
        return {
            "name": "t",
            "entrypoint": ["/bin/sh", "-c"],
            "args": {rank: (script,) for rank, script in enumerate(self.scripts)},
            "envs": {0: {}, 1: {}},
            "shutdown_timeout": GRACE_S,
            **options,
        }

    async def ready(self) -> None:
        # One line more is the other worker's. A group that fails by itself may have ended it.
        failing = self.kind.leaves and self.ending == "failure"
        await self.channel.lines(self.kind.ready + (not failing))

    def let_go(self) -> None:
        os.write(self._go, b"\n\n")

    def alive(self) -> list[int]:
        return processes_with(self.marker)

    def left(self, within_s: float) -> list[str]:
        """Who is alive still, so many seconds from now; ended for good then."""
        # Once more, for those that came into being while the others were waited for.
        alive = wait_gone(self.alive(), within_s) | set(self.alive())
        names = {pid: describe(pid) for pid in alive}
        missed = wait_gone(alive, LATE_S if within_s else 0)
        for pid in missed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return [name if pid in missed else name + LATE for pid, name in names.items()]


def processes_with(marker: str) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                words = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            if marker.encode() in words:
                found.append(int(name))
    return found


# --- the endings --------------------------------------------------------------------------------

Ending = Callable[[Cell], Awaitable[None]]


async def _by_itself(cell: Cell) -> None:
    """All succeed, or one fails."""
    ctx = await start_processes(**cell.arguments())
    await cell.ready()
    cell.let_go()
    result = await ctx.wait()
    assert result is not None
    assert result.is_failed() == (cell.ending == "failure"), result


async def _by_close(cell: Cell) -> None:
    ctx = await start_processes(**cell.arguments())
    await cell.ready()
    await ctx.close(timeout=GRACE_S)


async def _by_close_at_once(cell: Cell) -> None:
    ctx = await start_processes(**cell.arguments())
    await cell.ready()
    await ctx.close(timeout=0)


async def _by_cancellation(cell: Cell) -> None:
    async def use() -> None:
        async with start_processes(**cell.arguments()) as ctx:
            started.set()
            await ctx.wait()

    started = asyncio.Event()
    using = asyncio.create_task(use())
    await started.wait()
    await cell.ready()
    using.cancel()
    with pytest.raises(asyncio.CancelledError):
        await using


async def _by_exception(cell: Cell) -> None:
    async def use() -> None:
        async with start_processes(**cell.arguments()):
            await cell.ready()
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        await use()


async def _by_the_loops_end(cell: Cell) -> None:
    """``asyncio.run`` ends with the group open, in a thread."""

    async def main() -> None:
        await start_processes(**cell.arguments())
        await cell.ready()

    await asyncio.to_thread(asyncio.run, main())


@asynccontextmanager
async def _command_line(cell: Cell) -> AsyncIterator[asyncio.subprocess.Process]:
    first, other = cell.scripts
    script = f'if [ "$LOCAL_RANK" = 0 ]; then {first}; else {other}; fi'
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "asupervise", "--nproc-per-node", "2", "--shutdown-timeout",
        str(GRACE_S), "--no-python", "sh", "-c", script,
        cwd=ROOT, env=clean_environment(), start_new_session=True,
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        await cell.ready()
        async with cell.turn:
            yield process
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def _by_sigterm(cell: Cell) -> None:
    async with _command_line(cell) as process:
        process.send_signal(signal.SIGTERM)


async def _by_two_sigints(cell: Cell) -> None:
    async with _command_line(cell) as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        # Signals that are pending together are one (signal(7)).
        await process.stderr.readuntil(b"SIGINT")
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)


async def _by_kill_9(cell: Cell) -> None:
    async with _command_line(cell) as process:
        process.kill()


HOST = """
import asyncio, gc, json, os, sys
from asupervise import start_processes

async def start():
    args = dict(enumerate(cell.pop("args")))
    return await start_processes(args=args, envs={rank: {} for rank in args}, **cell)

async def main():
    ctx = await start()
    await asyncio.to_thread(sys.stdin.readline)
    {end}

def throw_the_loop_away():
    # The host lives on, the loop and whoever knew of the group do not.
    loop = asyncio.new_event_loop()
    loop.run_until_complete(start())
    sys.stdin.readline()
    loop.close()
    del loop
    gc.collect()
    print("closed", flush=True)
    sys.stdin.readline()

with open(sys.argv[1]) as file:
    cell = json.load(file)
throw_the_loop_away() if "{end}" == "loop" else asyncio.run(main())
"""


async def _by_the_hosts_end(cell: Cell) -> None:
    """A host application that is killed, or ends without a word to us."""
    end = {"os._exit": "os._exit(0)", "sys.exit": "sys.exit(0)", "loop thrown away": "loop"}
    how = end.get(cell.ending, "")
    arguments = {**cell.arguments(), "args": [(script,) for script in cell.scripts]}
    del arguments["envs"]
    file = cell.folder / "arguments.json"
    file.write_text(json.dumps(arguments))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOST.replace("{end}", how), str(file),
        cwd=ROOT, env=clean_environment(), start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        await cell.ready()
        async with cell.turn:
            if not how:
                process.kill()
            process.stdin.write(b"\n")
            if how == "loop":
                assert await process.stdout.readline() == b"closed\n"
                # Here, because this host lives on.
                cell.seen = await asyncio.to_thread(cell.left, WITHIN_S)
            else:
                await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


ENDINGS: dict[str, Ending] = {
    "success": _by_itself,
    "failure": _by_itself,
    "close()": _by_close,
    "close(timeout=0)": _by_close_at_once,
    "cancellation": _by_cancellation,
    "exception": _by_exception,
    "asyncio.run ends": _by_the_loops_end,
    "loop thrown away": _by_the_hosts_end,
    "SIGTERM to CLI": _by_sigterm,
    "two SIGINTs to CLI": _by_two_sigints,
    "kill -9 of CLI": _by_kill_9,
    "kill -9 of host": _by_the_hosts_end,
    "os._exit": _by_the_hosts_end,
    "sys.exit": _by_the_hosts_end,
}
WITH_SUBREAPER = ("SIGTERM to CLI", "two SIGINTs to CLI")


def kinds_for(ending: str) -> list[str]:
    return [
        name
        for name, kind in KINDS.items()
        if not (kind.needs_subreaper and ending not in WITH_SUBREAPER)
        # A group whose worker is stopped does not succeed.
        and not (name == "stopped" and ending == "success")
        # It is asked for nothing there.
        and not (name == "starts one at its end" and ending == "success")
        # Its parent is gone before there is anything to end, as with a "wiped daemon": by itself,
        # or because asyncio kills its children when their loop is thrown away.
        and not (name == "wiped environment" and ending in ("success", "loop thrown away"))
    ]


# --- the table ----------------------------------------------------------------------------------

# What is left alive, by ending and kind.
_table: dict[str, dict[str, list[str]]] = {}


def table() -> str:
    width = max(map(len, ENDINGS))
    head = [f"{'':{width}}  " + " ".join(f"{n:>2}" for n in range(1, len(KINDS) + 1))]
    rows = [
        f"{ending:{width}}  "
        + " ".join(f"{len(row[kind]):2}" if kind in row else " -" for kind in KINDS)
        for ending, row in _table.items()
    ]
    legend = [f"{n:2}: {kind}" for n, kind in enumerate(KINDS, 1)]
    return "\n".join([*head, *rows, *legend])


@contextmanager
def cells_of(ending: str, folder: Path, kinds: list[str]) -> Iterator[list[Cell]]:
    cells = [Cell(kind, ending, folder) for kind in kinds]
    try:
        yield cells
    finally:
        for cell in cells:
            cell.left(0)
            cell.close()


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_left(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    async def end(cell: Cell) -> list[str]:
        try:
            async with asyncio.timeout(20):
                await ENDINGS[ending](cell)
        except Exception as exc:
            # The whole row is to be seen, not the first cell that could not be tried.
            return [f"not tried: {exc!r}"]
        return cell.seen or await asyncio.to_thread(cell.left, WITHIN_S)

    async def main(cells: list[Cell]) -> list[list[str]]:
        turn = asyncio.Semaphore(AT_ONCE)
        for cell in cells:
            cell.turn = turn
        return await asyncio.gather(*map(end, cells))

    with cells_of(ending, tmp_path, kinds_for(ending)) as cells:
        found = asyncio.run(main(cells))
    row = {cell.name: left for cell, left in zip(cells, found, strict=True)}
    # A dozen groups end at once in a row, each by an interpreter of its own: what was ended, but
    # late, has its second once more, alone. What was not ended at all has no second chance.
    for kind, left in row.items():
        if left and all(name.endswith(LATE) for name in left):
            alone = tmp_path / "alone"
            alone.mkdir(exist_ok=True)
            with cells_of(ending, alone, [kind]) as cells:
                [row[kind]] = asyncio.run(main(cells))
    _table[ending] = row
    if any(row.values()):
        alive = {kind: left for kind, left in row.items() if left}
        pytest.fail(f"{ending}: {alive}\n{table()}", pytrace=False)


def test_the_table() -> None:
    """Shown by ``pytest -rP`` (and in full where a cell is not 0)."""
    print(table())
    assert not any(left for row in _table.values() for left in row.values())
