"""How teed lines look on the console, by the command line and by the library: real workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from asupervise import (
    ConsoleFormat,
    DefaultLogsSpecs,
    LaunchConfig,
    Std,
    dedup,
    launch,
    run_services,
    start_processes,
    tailing,
)
from asupervise.elastic.decide import Policy
from tests.conftest import ROOT, clean_environment
from tests.workers import HELD, PYTHON, READY, SLEEP, Channel, shell, start

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]
CEILING_S = 40.0
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}"
# Each ends with a newline of its own, so that nothing waits for another one.
SAY = ("--no-python", "sh", "-c")

pytestmark = pytest.mark.usefixtures("own_temporary_folder")


# --- the command line ---------------------------------------------------------------------------


def on_terminal(*args: object, env: dict[str, str] | None = None) -> bytes:
    """What the command line writes to a terminal."""
    ours, theirs = pty.openpty()
    try:
        argv = [sys.executable, "-m", "asupervise", *map(str, args)]
        environment = {**clean_environment(), "TERM": "xterm", **(env or {})}
        with subprocess.Popen(
            argv, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
            stdout=theirs, stderr=subprocess.PIPE, start_new_session=True,
        ) as process:  # fmt: skip
            os.close(theirs)
            theirs = -1
            data = b""
            with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
                while piece := os.read(ours, 65536):
                    data += piece
            process.communicate()
        return data.replace(b"\r\n", b"\n")
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)


WORDS = ("--nproc-per-node", 2, "--tee", 1)
PLAIN = [b"[default0]:hi", b"[default1]:hi"]
COLORED = [b"\x1b[33m[default1]:\x1b[0mhi", b"\x1b[36m[default0]:\x1b[0mhi"]


@pytest.mark.parametrize(
    ("flags", "env", "shown"),
    [
        ([], {}, COLORED),
        ([], {"NO_COLOR": "1"}, PLAIN),
        ([], {"TERM": "dumb"}, PLAIN),
        (["--color", "never"], {}, PLAIN),
        (["--color=always"], {"NO_COLOR": "1"}, COLORED),
    ],
)
def test_prefixes_are_coloured_on_a_terminal(
    flags: list[str], env: dict[str, str], shown: list[bytes]
) -> None:
    assert sorted(on_terminal(*WORDS, *flags, *SAY, "echo hi", env=env).splitlines()) == shown


def test_elsewhere_they_are_not_unless_that_is_asked_for(run_cli: Run, tmp_path: Path) -> None:
    words = (*WORDS, "--log-dir", tmp_path, "--duplicate-stdout-filters", "h")
    assert sorted(run_cli(*words, *SAY, "echo hi").stdout.splitlines()) == PLAIN
    done = run_cli(*words, "--color", "always", "--timestamps", *SAY, "echo hi")
    lines = sorted(line.partition(b" ")[2] for line in done.stdout.splitlines())
    assert lines == COLORED
    # Files are never changed.
    for run in tmp_path.iterdir():
        assert (run / "attempt_0/0/stdout.log").read_bytes() == b"hi\n"
        filtered = (run / "attempt_0/filtered_stdout.log").read_bytes()
        assert sorted(filtered.splitlines()) == PLAIN


def test_the_time_stands_before_the_prefix(run_cli: Run) -> None:
    before = time.time()
    done = run_cli(*WORDS, "--timestamps", *SAY, "echo hi")
    after = time.time()
    lines = sorted(done.stdout.decode().splitlines(), key=lambda line: line[-5:])
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        found = re.fullmatch(rf"({TIME}) \[default{rank}\]:hi", line)
        assert found is not None
        at = time.mktime(time.strptime(found[1][:-4], "%Y-%m-%dT%H:%M:%S"))
        assert before - 1 <= at <= after


def test_json_lines(run_cli: Run) -> None:
    before = time.time()
    script = r'printf "hi\n\377\033[31m\n" >&2; printf "no newline"'
    done = run_cli("--nproc-per-node", 2, "--tee", 3, "--role", "t", "--log-format", "json",
                   *SAY, script)  # fmt: skip
    out, err = ([json.loads(x) for x in data.splitlines()] for data in (done.stdout, done.stderr))
    assert sorted(x["rank"] for x in out) == [0, 1]
    assert {x["text"] for x in out} == {"no newline"}
    assert [x["text"] for x in err if x["local_rank"] == 1] == ["hi", "\\xff\x1b[31m"]
    assert all(before - 1 <= x["time"] <= time.time() for x in out + err)
    assert {(x["stream"], x["group"]) for x in out} == {("stdout", "t")}
    assert {(x["stream"], x["group"]) for x in err} == {("stderr", "t")}


# However slow this machine is, what is said soon is said within a moment.
PATIENT = (
    "from asupervise import dedup; dedup.HOLD_S = 1000.0; "
    "import sys; from asupervise.__main__ import main; sys.exit(main())"
)


def patient(run_cli: Run, *args: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return run_cli(*args, command=(sys.executable, "-c", PATIENT), **options)


def test_what_all_say_is_shown_once(run_cli: Run) -> None:
    script = "echo the same; echo rank $$RANK; echo the end"
    done = patient(run_cli, "--nproc-per-node", 4, "--tee", 1, "--dedup", *SAY, script)
    first, *own, last = done.stdout.splitlines()
    assert (first, last) == (b"[default0-3]:the same", b"[default0-3]:the end")
    assert sorted(own) == [b"[default%d]:rank %d" % (rank, rank) for rank in range(4)]
    done = patient(run_cli, "--nproc-per-node", 3, "--tee", 1, "--dedup", "--log-format", "json",
                   *SAY, "echo the same")  # fmt: skip
    [found] = map(json.loads, done.stdout.splitlines())
    assert found.pop("time") > 0
    assert found == {
        "ranks": [0, 1, 2],
        "local_ranks": [0, 1, 2],
        "stream": "stdout",
        "group": "default",
        "text": "the same",
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--color", "blue"], "error: --color 'blue': expected one of auto, always, never"),
        (["--tee", "1", "--log-format", "xml"], "error: --log-format 'xml': expected one of"),
        (["--dedup"], "error: --dedup is for lines that pass through this console"),
        (["--timestamps"], "hint: --tee 3"),
        (["--log-format", "json", "--redirects", "3"], "error: --log-format json is for lines"),
        (["--dedup=1", "--tee", "1"], "error: --dedup is a switch and takes no value"),
    ],
)
def test_what_cannot_be_is_refused(run_cli: Run, flags: list[str], message: str) -> None:
    done = run_cli(*flags, *SAY, "echo hi")
    assert (done.returncode, done.stdout) == (2, b"")
    assert message in done.stderr.decode()


def test_variables_are_understood(run_cli: Run) -> None:
    env = {"PET_DEDUP": "1", "PET_TEE": "1", "PET_COLOR": "always"}
    done = patient(run_cli, "--nproc-per-node", 2, *SAY, "echo hi", env=env)
    assert done.stdout == b"\x1b[1m[default0-1]:\x1b[0mhi\n"


# --- lines that are put together ----------------------------------------------------------------

CHATTER = r"""
import os, random, sys, time
rank = int(os.environ["RANK"])
dice, own = random.Random(int(sys.argv[1])), random.Random(rank)
held = b""
for number in range(int(sys.argv[2])):
    if dice.random() < 0.7:
        line = b"all say %d" % dice.randrange(20)
    else:
        line = b"rank %d says %d" % (rank, dice.randrange(20))
    if own.random() < 0.001:
        line = b"%d" % rank * 3000
    held += line + b"\n"
    if own.random() < 0.05:
        cut = own.randrange(len(held) + 1)
        os.write(1, held[:cut])
        held = held[cut:]
    if own.random() < 0.002:
        time.sleep(own.random() * 0.02)
os.write(1, held + b"the end, without a newline")
"""


def expanded(data: bytes) -> dict[int, list[bytes]]:
    """By rank, the lines that are shown."""
    found: dict[int, list[bytes]] = defaultdict(list)
    for line in data.splitlines():
        prefix, text = re.fullmatch(rb"\[t([0-9,-]+)\]:(.*)", line).groups()  # type: ignore[union-attr]
        for part in prefix.split(b","):
            low, _, high = part.partition(b"-")
            for rank in range(int(low), int(high or low) + 1):
                found[rank].append(text)
    return found


@pytest.mark.parametrize("seed", [1, 2])
async def test_no_rank_loses_a_line_or_its_order(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], seed: int
) -> None:
    ranks, count = 4, 5_000
    words = shell(None, [""] * ranks)
    words |= {"entrypoint": (*PYTHON, CHATTER), "args": dict.fromkeys(range(ranks), (seed, count))}
    logs = DefaultLogsSpecs(str(tmp_path / "logs"), tee=Std.OUT)
    async with start_processes(**words, logs_specs=logs, console=ConsoleFormat(dedup=True)) as ctx:
        await ctx.wait()
    out = capfd.readouterr().out.encode()
    found = expanded(out)
    for rank in range(ranks):
        assert found[rank] == Path(ctx.stdouts[rank]).read_bytes().splitlines()
    shown, said = len(out.splitlines()), ranks * (count + 1)
    assert shown < said


async def test_a_line_waits_for_nobody_longer_than_a_moment(
    channel: Channel, capfd: pytest.CaptureFixture[str]
) -> None:
    """The other rank says nothing at all, and goes on."""
    options = {"logs_specs": DefaultLogsSpecs(tee=Std.OUT), "console": ConsoleFormat(dedup=True)}
    async with asyncio.timeout(CEILING_S), start(channel, "echo a; " + SLEEP, SLEEP, **options):
        out = ""
        while not out:
            await asyncio.sleep(0)
            out = capfd.readouterr().out
        assert out == "[t0]:a\n"


async def test_what_all_say_waits_for_nobody(
    channel: Channel, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup, "HOLD_S", 1000.0)
    options = {"logs_specs": DefaultLogsSpecs(tee=Std.OUT), "console": ConsoleFormat(dedup=True)}
    async with (
        asyncio.timeout(CEILING_S),
        start(channel, *["echo a; " + SLEEP] * 3, **options),
    ):
        out = ""
        while not out:
            await asyncio.sleep(0)
            out = capfd.readouterr().out
        assert out == "[t0-2]:a\n"


async def test_the_end_waits_for_no_moment(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup, "HOLD_S", 1000.0)
    options = {"logs_specs": DefaultLogsSpecs(tee=Std.OUT), "console": ConsoleFormat(dedup=True)}
    async with asyncio.timeout(CEILING_S):
        async with start(None, "echo a", ":", "echo b; printf c", **options) as ctx:
            await ctx.wait()
    assert sorted(capfd.readouterr().out.splitlines()) == ["[t0]:a", "[t2]:b", "[t2]:c"]


async def test_a_prompt_is_shown_among_lines_that_are_put_together(
    channel: Channel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"logs_specs": DefaultLogsSpecs(tee=Std.OUT), "console": ConsoleFormat(dedup=True)}
    asks = "echo hi; printf 'name? '; " + READY + HELD + "echo joe; echo bye"
    other = tmp_path / "other"
    os.mkfifo(other)
    says = f"echo hi; {READY} read x < {other}; echo between"
    async with asyncio.timeout(CEILING_S), start(channel, asks, says, **options) as ctx:
        await channel.pids(2)
        out = ""

        async def until(text: str) -> None:
            nonlocal out
            while text not in out:
                await asyncio.sleep(0)
                out += capfd.readouterr().out

        await until("name? ")
        await asyncio.to_thread(other.write_text, "go\n")
        await until("between\n")
        await channel.open_gate()
        await ctx.wait()
    out += capfd.readouterr().out
    assert out == ("[t0-1]:hi\n[t0]:name? \n[t1]:between\n[t0]:name? joe\n[t0]:bye\n")


async def test_lines_too_long_to_be_held_go_straight_on(capfd: pytest.CaptureFixture[str]) -> None:
    program = "print('a'); print('x' * 3000000); print('b')"
    words = shell(None, ["", ""])
    words |= {"entrypoint": (*PYTHON, program), "args": {0: (), 1: ()}}
    for form in (ConsoleFormat(dedup=True), ConsoleFormat(dedup=True, log_format="json")):
        async with start_processes(
            **words, logs_specs=DefaultLogsSpecs(tee=Std.OUT), console=form
        ) as ctx:
            await ctx.wait()
        out = capfd.readouterr().out
        assert out.count("x") >= 6_000_000
        if form.log_format == "text":
            assert {rank: len(lines) for rank, lines in _whole(out).items()} == {0: 3, 1: 3}
            continue
        text: dict[int, str] = defaultdict(str)
        for each in map(json.loads, out.splitlines()):
            for rank in each["ranks"]:
                text[rank] += each["text"] + ("" if each.get("continues") else "\n")
        assert set(text.values()) == {"a\n" + "x" * 3_000_000 + "\nb\n"}


def _whole(out: str) -> dict[int, list[bytes]]:
    # One of the two long lines may be broken off by the other: its rest stands on a new line.
    found = expanded(out.encode())
    for lines in found.values():
        long = [line for line in lines if line.startswith(b"x")]
        assert sum(map(len, long)) == 3_000_000
        assert (lines[0], lines[-1]) == (b"a", b"b")
        lines[:] = [lines[0], b"".join(long), lines[-1]]
    return found


# --- tracebacks ---------------------------------------------------------------------------------

FAIL = """
import os, sys, time, traceback
def load(depth):
    if depth:
        return load(depth - 1)
    raise ValueError("no such shard")
try:
    try:
        load(3)
    except ValueError as exc:
        raise RuntimeError("later") from exc
except RuntimeError:
    # Line by line, as Python does, and slower than it.
    for line in traceback.format_exc().splitlines(keepends=True):
        os.write(2, line.encode())
        time.sleep(0.001)
"""


@pytest.mark.parametrize(
    "form", [None, ConsoleFormat(timestamps=True), ConsoleFormat(dedup=True)], ids=str
)
async def test_tracebacks_of_many_ranks_stand_in_one_piece(
    form: ConsoleFormat | None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """All fail at the same moment; however slow this machine is, the next line comes soon."""
    for name in ("NEXT_LINE_S", "_NEXT_TRACEBACK_S", "_TRACEBACK_S"):
        monkeypatch.setattr(tailing, name, CEILING_S)
    # No two say the same, for that would be put together.
    program = FAIL.replace("line.encode()", "b'  %s' % os.environb[b'RANK'] + line.encode()")
    words = shell(None, [""] * 6)
    words |= {"entrypoint": (*PYTHON, program), "args": dict.fromkeys(range(6), ())}
    logs = DefaultLogsSpecs(tee=Std.ERR)
    async with start_processes(**words, logs_specs=logs, console=form) as ctx:
        await ctx.wait()
    shown = re.findall(rf"^(?:{TIME} )?\[t(\d)\]:", capfd.readouterr().err, re.MULTILINE)
    assert len(shown) > 50
    assert sum(one != other for one, other in pairwise(shown)) == 5


# --- the library --------------------------------------------------------------------------------


async def test_by_every_call_that_starts_workers(capfd: pytest.CaptureFixture[str]) -> None:
    logs, form = DefaultLogsSpecs(tee=Std.OUT), ConsoleFormat(color="always")
    async with start(None, "echo a", logs_specs=logs, console=form) as ctx:
        await ctx.wait()
    assert capfd.readouterr().out == "\x1b[36m[t0]:\x1b[0ma\n"
    async with run_services(
        **shell(None, ["echo a"]), logs_specs=logs, console=form, restart="temporary",
        policy=Policy(min_uptime_s=0.0),
    ) as services:  # fmt: skip
        await services.wait()
    assert capfd.readouterr().out == "\x1b[36m[t0]:\x1b[0ma\n"
    config = LaunchConfig(1, 1, 1, role="t", logs_specs=DefaultLogsSpecs(tee=Std.OUT), console=form)
    await launch(config, "echo", "a")
    assert capfd.readouterr().out == "\x1b[36m[t0]:\x1b[0ma\n"


async def test_a_stream_that_is_no_file_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        written = ""

        def write(self, text: str) -> None:
            self.written += text

    odd = Odd()
    monkeypatch.setattr(sys, "stdout", odd)
    async with start(None, "echo a", logs_specs=DefaultLogsSpecs(tee=Std.OUT)) as ctx:
        await ctx.wait()
    assert odd.written == "[t0]:a\n"


async def test_a_file_that_cannot_be_opened_is_not_waited_for(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, channel: Channel
) -> None:
    monkeypatch.setattr(dedup, "HOLD_S", 1000.0)
    make = tailing.Tailer.__init__

    def refuse(tailer: Any, path: str, *args: Any, **options: Any) -> None:
        if path.endswith("1/stdout.log"):
            raise FileNotFoundError(2, "gone")
        make(tailer, path, *args, **options)

    monkeypatch.setattr(tailing.Tailer, "__init__", refuse)
    options = {"logs_specs": DefaultLogsSpecs(tee=Std.OUT), "console": ConsoleFormat(dedup=True)}
    script = "echo a; " + SLEEP
    async with asyncio.timeout(CEILING_S), start(channel, script, script, **options):
        out = ""
        while not out:
            await asyncio.sleep(0)
            out = capfd.readouterr().out
        assert out == "[t0]:a\n"
