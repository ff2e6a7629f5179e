"""Random groups, random faults, random endings; after each round nothing may be left.

``python tests/chaos/run.py --seed 7 --rounds 300``. After a round there is no process of it
(known by a marker in its command line), and in the supervisor no descriptor, no task, no thread
and no child more than before; and each line that a worker has confirmed to have written stands
in its log. A violation is printed with what it needs to be played again:
``--seed 7 --only 123``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from asupervise import DefaultLogsSpecs, Std, start_processes  # noqa: E402
from tests.conftest import clean_environment, describe, open_files, own_children  # noqa: E402
from tests.conftest import wait_gone as wait_until_gone  # noqa: E402

WORKER = Path(__file__).with_name("worker.py")
# The promise is a second; where the machine is busy with other things as well, some more.
WITHIN_S = 1.0
WITHIN_ON_A_BUSY_MACHINE_S = 4.0
ROUND_LIMIT_S = 30.0
# Threads of pools, which are there to stay.
POOLS = ("asyncio_", "chaos_", "AnyIO worker thread")

CHILDREN = (
    "",
    "ignore",
    "stop",
    "setsid",
    "setsid,ignore",
    "setsid,stop",
    "setsid,fork",
    "setsid,fork,ignore",
    "fork",
    "fork,setsid,fork",
    "setpgid",
    "setpgid,ignore",
)
CRASHES = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM, signal.SIGUSR1)


@dataclass
class Round:
    """What one round does, chosen by its seed alone."""

    number: int
    ending: str
    ranks: list[list[str]]
    delay_s: float
    grace_s: float
    sig: int
    tee: bool
    folder: Path = field(default_factory=Path)
    marker: str = ""
    # Processes seen that have no marker: supervisors' children, guardians among them.
    others: set[int] = field(default_factory=set)

    def arguments(self) -> dict[str, Any]:
        """Of `start_processes`, except for the logs."""
        return {
            "name": "chaos",
            "entrypoint": [sys.executable, "-I", "-S", str(WORKER), self.marker],
            "args": {
                rank: [f"{self.folder}/confirmed.{rank}", str(rank), *wishes]
                for rank, wishes in enumerate(self.ranks)
            },
            "envs": {rank: {} for rank in range(len(self.ranks))},
            "shutdown_timeout": self.grace_s,
        }

    def logs(self) -> DefaultLogsSpecs:
        return DefaultLogsSpecs(
            str(self.folder / "logs"), Std.ALL, Std.OUT if self.tee else Std.NONE
        )


def choose(seed: int, number: int) -> Round:
    rng = random.Random(f"{seed}:{number}")
    ending = rng.choice(list(ENDINGS))
    ranks = [_wishes(rng, ending) for _ in range(rng.randint(1, 6))]
    return Round(
        number=number,
        ending=ending,
        ranks=ranks,
        delay_s=rng.choice((0.0, 0.0, 0.01, 0.05, 0.1, 0.2)),
        grace_s=rng.choice((0.0, 0.05, 0.1, 0.2)),
        sig=rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGKILL)),
        tee=rng.random() < 0.4,
    )


def _wishes(rng: random.Random, ending: str) -> list[str]:
    wishes = []
    if rng.random() < 0.25:
        wishes.append("ignore")
    elif rng.random() < 0.1:
        wishes.append("daemon-at-end")
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        wishes.append(f"child={rng.choice(CHILDREN)}")
    if ending in WITH_SUBREAPER and rng.random() < 0.3:
        wishes.append("child=setsid,fork,wipe")
    for wish in ("rename", "lines=50", "flood=300", "storm=30", "close"):
        if rng.random() < 0.15:
            wishes.append(wish)
    if rng.random() < 0.5:
        wishes.append(f"pause={rng.choice((0, 0.02, 0.1))}")
    end = rng.random()
    if end < 0.1:
        wishes.append("stop")
    elif end < 0.25:
        wishes.append(f"crash={int(rng.choice(CRASHES))}")
    elif end < 0.4:
        wishes.append(f"exit={rng.choice((0, 0, 1, 3, 255))}")
    return wishes


# --- endings ------------------------------------------------------------------------------------


async def by_itself(round_: Round) -> None:
    """Whatever happens first; ended in order if nothing does."""
    async with start_processes(**round_.arguments(), logs_specs=round_.logs()) as ctx:
        if await ctx.wait(0.4) is None:
            await ctx.close(timeout=round_.grace_s)
        assert await ctx.wait() is not None


async def by_close(round_: Round) -> None:
    ctx = await start_processes(**round_.arguments(), logs_specs=round_.logs())
    await asyncio.sleep(round_.delay_s)
    await ctx.close(round_.sig, round_.grace_s)


async def by_two_closes(round_: Round) -> None:
    ctx = await start_processes(**round_.arguments(), logs_specs=round_.logs())
    first = asyncio.create_task(ctx.close(round_.sig, 10))
    await asyncio.sleep(round_.delay_s)
    await ctx.close(signal.SIGKILL, 0)
    await first


async def by_cancellation(round_: Round) -> None:
    async def use() -> None:
        async with start_processes(**round_.arguments(), logs_specs=round_.logs()) as ctx:
            await ctx.wait()
            await asyncio.sleep(ROUND_LIMIT_S)

    using = asyncio.create_task(use())
    await asyncio.sleep(round_.delay_s)
    using.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await using


async def by_exception(round_: Round) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async with start_processes(**round_.arguments(), logs_specs=round_.logs()):
            await asyncio.sleep(round_.delay_s)
            _ = 1 / 0


async def by_the_loops_end(round_: Round) -> None:
    async def main() -> None:
        await start_processes(**round_.arguments(), logs_specs=round_.logs())
        await asyncio.sleep(round_.delay_s)

    done: list[BaseException | None] = []

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as exc:
            done.append(exc)

    thread = threading.Thread(target=run, name="chaos_loop")
    thread.start()
    await asyncio.to_thread(thread.join)
    if done:
        raise RuntimeError("asyncio.run") from done[0]


HOST = """
import asyncio, json, sys
from asupervise import DefaultLogsSpecs, Std, start_processes

async def main():
    args = dict(enumerate(given.pop("args")))
    tee = Std.OUT if given.pop("tee") else Std.NONE
    logs = DefaultLogsSpecs(given.pop("logs"), Std.ALL, tee)
    ctx = await start_processes(args=args, envs={rank: {} for rank in args}, logs_specs=logs, **given)
    print("started", file=sys.stderr, flush=True)
    await asyncio.sleep(1000)

given = json.loads(sys.argv[1])
asyncio.run(main())
"""  # noqa: E501


async def by_killing_the_host(round_: Round) -> None:
    given = round_.arguments()
    given["args"] = [given["args"][rank] for rank in range(len(round_.ranks))]
    del given["envs"]
    given |= {"tee": round_.tee, "logs": f"{round_.folder}/logs"}
    await _supervisor(round_, [sys.executable, "-c", HOST, json.dumps(given)], "started", "kill")


async def by_signal_to_cli(round_: Round) -> None:
    script = "; ".join(
        f'[ "$LOCAL_RANK" = {rank} ] && exec {sys.executable} -I -S {WORKER} {round_.marker} '
        f"{round_.folder}/confirmed.{rank} {rank} {' '.join(wishes)}"
        for rank, wishes in enumerate(round_.ranks)
    )
    argv = [
        sys.executable, "-m", "asupervise", "--nproc-per-node", str(len(round_.ranks)),
        "--log-dir", f"{round_.folder}/logs", "--redirects", "3",
        "--tee", "1" if round_.tee else "0",
        "--shutdown-timeout", str(round_.grace_s), "--no-python", "sh", "-c", script,
    ]  # fmt: skip
    await _supervisor(round_, argv, "", round_.ending)


async def _supervisor(round_: Round, argv: list[str], word: str, how: str) -> None:
    with open(round_.folder / "stderr", "wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *argv, cwd=ROOT, env=clean_environment() | {"TMPDIR": str(round_.folder)},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
        )  # fmt: skip
    try:
        # A first line of any worker says that they are being started.
        await _until(lambda: process.returncode is not None or any(confirmed_of(round_).values()))
        await asyncio.sleep(round_.delay_s)
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            round_.others |= set(map(int, children.split()))
        with contextlib.suppress(ProcessLookupError):
            if how == "kill" or how == "kill -9 of CLI":
                process.kill()
            else:
                sig = signal.SIGINT if how == "two SIGINTs to CLI" else signal.SIGTERM
                process.send_signal(sig)
                if sig == signal.SIGINT:
                    await asyncio.sleep(0.05)
                    process.send_signal(sig)
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _until(done: Callable[[], bool]) -> None:
    while not done():
        await asyncio.sleep(0.01)


ENDINGS: dict[str, Callable[[Round], Awaitable[None]]] = {
    "by itself": by_itself,
    "close": by_close,
    "two closes": by_two_closes,
    "cancellation": by_cancellation,
    "exception": by_exception,
    "asyncio.run ends": by_the_loops_end,
    "kill -9 of host": by_killing_the_host,
    "SIGTERM to CLI": by_signal_to_cli,
    "two SIGINTs to CLI": by_signal_to_cli,
    "kill -9 of CLI": by_signal_to_cli,
}
WITH_SUBREAPER = ("SIGTERM to CLI", "two SIGINTs to CLI")


# --- what is left -------------------------------------------------------------------------------


def processes_with(marker: str) -> set[int]:
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                words = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            if marker.encode() in words:
                found.add(int(name))
    return found


def threads() -> set[str]:
    return {t.name for t in threading.enumerate() if not t.name.startswith(POOLS)}


def confirmed_of(round_: Round) -> dict[int, list[int]]:
    found = {}
    for rank in range(len(round_.ranks)):
        try:
            data = (round_.folder / f"confirmed.{rank}").read_bytes()
        except FileNotFoundError:
            data = b""
        found[rank] = [int(line) for line in data.split(b"\n")[:-1]]
    return found


def lost_lines(round_: Round) -> list[str]:
    complaints = []
    for rank, numbers in confirmed_of(round_).items():
        # What it wrote to its standard output while that was its log.
        if not numbers or "close" in round_.ranks[rank]:
            continue
        logs = list((round_.folder / "logs").glob(f"*/attempt_0/{rank}/stdout.log"))
        text = b"".join(log.read_bytes() for log in logs)
        there = {int(line.split(b":")[1]) for line in text.split(b"\n")[:-1]}
        if lost := sorted(set(numbers) - there):
            complaints.append(f"rank {rank}: lines lost from {logs}: {lost[:10]}")
    return complaints


def left_processes(round_: Round) -> list[str]:
    within_s = WITHIN_S
    if os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1):
        within_s = WITHIN_ON_A_BUSY_MACHINE_S
    others = {pid for pid in round_.others if _is_running(pid)}
    left = wait_until_gone(processes_with(round_.marker) | others, within_s)
    left |= processes_with(round_.marker)
    described = [f"process left: {describe(pid)}" for pid in left]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return described


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def play(round_: Round, parent: Path) -> list[str]:
    """One round; returns the violations."""
    round_.folder = parent / str(round_.number)
    round_.folder.mkdir()
    round_.marker = f"100000.{random.SystemRandom().randrange(10**15):015}"
    files, children, before = open_files(), own_children(), threads()
    complaints: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(f"loop: {context}"))
    try:
        async with asyncio.timeout(ROUND_LIMIT_S):
            await ENDINGS[round_.ending](round_)
    except Exception as exc:
        cause = f" from {exc.__cause__!r}" if exc.__cause__ else ""
        complaints.append(f"{type(exc).__name__}: {exc}{cause}")
    if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.sleep(0)
        complaints += [f"task left: {task!r}" for task in tasks if not task.done()]
    complaints += await asyncio.to_thread(left_processes, round_)
    complaints += [f"child left: {describe(pid)}" for pid in own_children() - children]
    after = open_files()
    new = {fd: name for fd, name in after.items() if files.get(fd) != name}
    complaints += [f"file left open: {fd} on {name}" for fd, name in new.items()]
    complaints += [f"thread left: {name}" for name in threads() - before]
    complaints += lost_lines(round_)
    if not complaints:
        shutil.rmtree(round_.folder)
    return complaints


# --- the run ------------------------------------------------------------------------------------


async def run(seed: int, numbers: range, parent: Path, out: Any) -> int:
    pool = ThreadPoolExecutor(4, thread_name_prefix="chaos_pool")
    asyncio.get_running_loop().set_default_executor(pool)
    # What is opened once for good is no leak: round 0 is a rehearsal.
    await play(choose(seed, 0), parent)
    begin, violations = time.monotonic(), 0
    for count, number in enumerate(numbers, 1):
        round_ = choose(seed, number)
        complaints = await play(round_, parent)
        if complaints:
            violations += 1
            print(
                f"round {number} ({round_.ending}): replay: --seed {seed} --only {number}", file=out
            )
            for words in (f"{round_}", *complaints):
                print(f"  {words}", file=out, flush=True)
        if count % 20 == 0:
            took = time.monotonic() - begin
            print(f"{count} rounds, {violations} violations, {took:.0f} s", file=out, flush=True)
    print(f"seed {seed}: {len(numbers)} rounds, {violations} violations", file=out, flush=True)
    return violations


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--only", type=int, default=None, help="play just this round")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    numbers = range(1, options.rounds + 1)
    if options.only is not None:
        numbers = range(options.only, options.only + 1)
    out = os.fdopen(os.dup(1), "w")
    print(f"seed {seed}", file=out, flush=True)
    parent = Path(tempfile.mkdtemp(prefix="asupervise-chaos-"))
    os.environ["TMPDIR"] = str(parent)
    # The workers' teed lines are not what this run has to say.
    with open(os.devnull, "w") as sys.stdout:
        violations = asyncio.run(run(seed, numbers, parent, out))
    sys.stdout = sys.__stdout__
    if violations:
        print(f"kept: {parent}", file=out, flush=True)
        return 1
    shutil.rmtree(parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
