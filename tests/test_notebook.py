"""What a notebook shows of results and running groups, and that its cells may await."""

from __future__ import annotations

import ast
import html
import inspect
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from asupervise import ChildFailedError, Policy, ProcessFailure, RunProcsResult, run_services
from asupervise.error_files import ErrorRecord
from tests.workers import SLEEP, Channel, shell

EVIL = "<script>alert(1)</script>\x1b[31m\0\u202e\ud800'\"</pre>"


class Checker(HTMLParser):
    """What a piece of HTML consists of; complains of tags that do not fit."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self._open.append(tag)
        assert {name for name, _ in attrs} <= {"style", "title", "open"}

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


HARMLESS = {"div", "span", "b", "code", "table", "tr", "th", "td", "details", "summary", "pre"}


def text_of(shown: str) -> str:
    assert set(Checker(shown).tags) <= HARMLESS
    return html.unescape(re.sub(r"<[^>]+>", " ", shown))


def failure(rank: int, exitcode: int = 1, **more: Any) -> ProcessFailure:
    record = more.pop("record", None)
    return ProcessFailure(rank, 100 + rank, exitcode, "<N/A>", record=record, **more)


RECORD = ErrorRecord(
    message={"message": "ValueError: no such batch",
             "extraInfo": {"py_callstack": "Traceback\n  boom\nValueError: no such batch"}}
)  # fmt: skip


def test_a_success() -> None:
    text = text_of(RunProcsResult(return_values={0: None, 1: None})._repr_html_())
    assert text.split() == ["\u25cf", "2", "workers", "succeeded"]


def test_values_that_were_returned() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise ValueError("no")

    values = {0: {"loss": 0.5}, 1: "x" * 1000, 2: Odd(), 3: None}
    text = text_of(RunProcsResult(return_values=values)._repr_html_())
    assert "{'loss': 0.5}" in text
    assert "<Odd: its repr() raised ValueError>" in text
    assert len(text) < 600


def test_a_failure_and_who_was_ended_for_it() -> None:
    result = RunProcsResult(
        failures={
            0: failure(0, -15, ended_by_us=True),
            1: failure(1, 1, record=RECORD, peak_rss_bytes=3 << 20, stack="in read (a.py:3)"),
            2: failure(2, -11, observed_at=2e9),
        },
        log_dir="/logs/run",
        warnings=("the disk is full",),
    )
    text = " ".join(text_of(result._repr_html_()).split())
    assert text.startswith("\u25cf rank 1 failed ValueError: no such batch exit code 1, pid 101, ")
    assert "Traceback boom ValueError: no such batch" in text
    assert "failed as well: rank 2 SIGSEGV" in text
    assert "ended by the supervisor: rank 0 the disk is full logs and report: /logs/run" in text


def test_all_were_ended() -> None:
    result = RunProcsResult(failures={0: failure(0, -15, ended_by_us=True)})
    assert "no rank failed by itself" in text_of(result._repr_html_())
    assert "was ended by the supervisor" in text_of(result.failures[0]._repr_html_())


def test_an_error_has_global_ranks_and_the_runs_culprit() -> None:
    error = ChildFailedError(
        "train.py", {9: failure(1, stderr_tail="last words"), 8: failure(0)}, culprit=9
    )
    text = text_of(error._repr_html_())
    assert text.split()[:5] == ["train.py", "\u25cf", "rank", "9", "failed"]
    assert "last words" in text


def test_many_ranks() -> None:
    failures = {rank: failure(rank) for rank in range(1000)}
    shown = RunProcsResult(failures=failures)._repr_html_()
    assert len(shown) < 20_000
    assert "and 967 more" in text_of(shown)


@given(st.text() | st.just(EVIL), st.integers(-64, 255))
def test_whatever_workers_say_is_text(said: str, exitcode: int) -> None:
    record = ErrorRecord(message={"message": said, "extraInfo": {"py_callstack": said}})
    one = failure(0, exitcode, record=record, stderr_tail=said, cause=said, stack=said)
    for shown in (
        one._repr_html_(),
        RunProcsResult(failures={0: one}, log_dir=said, warnings=(said,))._repr_html_(),
        RunProcsResult(return_values={0: said})._repr_html_(),
        ChildFailedError(said, {0: one})._repr_html_(),
    ):
        text_of(shown).encode()
        assert not re.search("[\0\x1b\u202e]", shown)


CELLS = (
    "from asupervise import DefaultLogsSpecs, Std, start_processes",
    """
    specs = DefaultLogsSpecs(folder, redirects=Std.ALL)
    script = 'read line < "$GATE"; exit 3'
    args, env = {0: ("-c", script), 1: ("-c", "true")}, {"GATE": gate}
    ctx = await start_processes("trainer", "sh", args, {0: env, 1: env}, specs)
    """,
    "shown = [ctx._repr_html_()]",
    """
    with open(gate, "w") as file: file.write("go\\n")
    result = await ctx.wait()
    shown += [ctx._repr_html_(), result._repr_html_()]
    """,
)


async def test_cells_may_await(tmp_path: Path) -> None:
    """As IPython runs them: each in the loop that goes on, in one namespace."""
    import os
    import textwrap

    gate = tmp_path / "gate"
    os.mkfifo(gate)
    names: dict[str, Any] = {"folder": str(tmp_path / "logs"), "gate": str(gate)}
    for cell in CELLS:
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(textwrap.dedent(cell), "<cell>", "exec", flags=flags)
        if code.co_flags & inspect.CO_COROUTINE:
            await eval(code, names)
        else:
            exec(code, names)
    running, ended, result = map(text_of, names["shown"])
    assert "trainer: 2 workers, " in running
    assert "running" in running
    assert "trainer: 2 workers, 0 running" in ended
    assert "rank 0 failed" in result
    assert str(tmp_path / "logs") in result


async def test_services_tell_how_often_each_was_started_anew(channel: Channel) -> None:
    once = f"[ $TORCHELASTIC_RESTART_COUNT = 0 ] && exit 3; {SLEEP}"
    policy = Policy(backoff_s=0.0, min_uptime_s=0.0)
    async with run_services(**shell(channel, [SLEEP, once]), policy=policy) as services:
        await channel.pids(2)
        pids = services.pids()
        running = text_of(services._repr_html_())
        await services.close()
    assert "2 workers, 2 running" in running
    words = running.split()
    rows = ["0", str(pids[0]), "running", "0", "1", str(pids[1]), "running", "1"]
    at = words.index("restarts") + 1
    assert words[at : at + len(rows)] == rows
    assert "0 running" in text_of(services._repr_html_())
