"""The live view as people see it: in tmux, of several sizes, while ranks fail and sizes change."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asupervise.views.live.layout import room
from tests.browser import PICTURES_VARIABLE
from tests.conftest import ROOT, clean_environment, wait_gone
from tests.live.screens import Screen, take_picture, tmux_or_skip

# Each says something and how far it is, and goes on when it is told to; told to end, it stays until
# it is released.
WORKER = r"""
trap "released=1" TERM
echo "hello from rank $RANK"
printf '%s 100 ' $((RANK % 90 + 5)) > "$ASUPERVISE_PROGRESS_FILE"
read order < "$GATES/$RANK"
case "$order" in
    fail) echo "boom of rank $RANK" >&2; exit 3;;
esac
[ -n "$released" ] || exit 0
read order < "$GATES/end"
exit 1
"""
RULE = re.compile("^── ", re.MULTILINE)

pytestmark = [pytest.mark.pages, pytest.mark.usefixtures("_camera")]

Start = Callable[..., Screen]


@pytest.fixture(scope="module")
def _camera(request: pytest.FixtureRequest) -> None:
    """The browser that takes pictures is none of any test's processes: it is there before."""
    if os.environ.get(PICTURES_VARIABLE):
        request.getfixturevalue("browser")


class Gates:
    """What workers wait for.

    Args:
        folder: where the pipes are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._fds: dict[str, int] = {}

    def make(self, name: object) -> None:
        path = self.folder / str(name)
        os.mkfifo(path)
        self._fds[str(name)] = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def tell(self, name: object, order: str) -> None:
        os.write(self._fds[str(name)], f"{order}\n".encode())

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)


@pytest.fixture
def gates(tmp_path: Path) -> Iterator[Gates]:
    made = Gates(tmp_path / "gates")
    yield made
    made.close()


@pytest.fixture
def start(tmp_path: Path, gates: Gates) -> Iterator[Start]:
    """Runs the command line in a terminal."""
    tmux_or_skip()
    screens: list[Screen] = []

    def run(
        *words: object,
        columns: int = 80,
        lines: int = 24,
        before: str = "",
        end: str = "",
        shell: str = "",
        **env: str,
    ) -> Screen:
        argv = shlex.join([sys.executable, "-m", "asupervise", *map(str, words)])
        environ = clean_environment() | {"GATES": str(gates.folder), **env}
        command = f"cd {shlex.quote(str(ROOT))}; {before} {argv} {end}"
        if shell:
            (tmp_path / "command").write_text(command)
        screens.append(Screen(tmp_path, shell or command, columns, lines, environ))
        if shell:
            screens[-1].type(f". {tmp_path / 'command'}", "Enter")
        return screens[-1]

    yield run
    for screen in screens:
        screen.close()
        wait_gone([screen.server])


def sh(count: int, script: str, *flags: object) -> list[object]:
    return ["--live", "--nproc-per-node", count, *flags, "--no-python", "sh", "-c", script]


def table_at(lines: list[str]) -> int:
    """Where the table begins."""
    return max(number for number, line in enumerate(lines) if RULE.match(line))


def text(lines: list[str]) -> str:
    return "\n".join(line.rstrip() for line in lines).rstrip()


@pytest.mark.parametrize("count", [4, 256])
@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (200, 60)])
def test_a_rank_fails(
    start: Start, gates: Gates, request: Any, count: int, columns: int, lines: int
) -> None:
    for name in (*range(count), "end"):
        gates.make(name)
    screen = start(*sh(count, WORKER), columns=columns, lines=lines)
    name = f"live-{columns}x{lines}-{count}"
    # Who has not said so does not mind a SIGTERM yet.
    screen.wait(lambda lines: len(re.findall("]:hello", text(lines))) == count, history=True)
    running = screen.wait_for(f"● {count} running", "%", " hello from rank")
    take_picture(screen, request, f"{name}-running")
    at = table_at(running)
    assert len(running) == lines
    # The log is above the table, and the table reaches to the last line but for a free one.
    assert all(re.match(r"\[default\d+\]:hello|$", line) for line in running[:at])
    assert not text(running[at + room(count, lines) :])
    assert not screen.cursor_is_shown
    assert not screen.shows_what_is_typed

    gates.tell(3, "fail")
    failed = screen.wait_for(
        "✗ exit 3", f"◐ {count - 1} ending", "]:boom of rank 3", " boom of rank 3"
    )
    take_picture(screen, request, f"{name}-failed")
    table = failed[table_at(failed) :]
    assert [line for line in table if re.match(r" +3  ✗ exit 3 .* boom of rank 3$", line)]
    assert "rank 3 failed: exit 3; ending the others: SIGTERM" in text(table)
    if count > 4:
        marks = [line[4:] for line in table if set(line[4:].strip()) <= set("◐ ✗")]
        assert "".join(marks).replace(" ", "") == "◐◐◐✗" + "◐" * (count - 4)

    gates.tell("end", "\n" * (count - 1))
    screen.wait_for("exit status 3")
    take_picture(screen, request, f"{name}-ended")
    ended = screen.lines(history=True)
    # The last state stays, and the report stands below it.
    report = next(n for n, line in enumerate(ended) if line.endswith("FAILED"))
    assert f"✗ 1 failed ■ {count - 1} ended" in ended[table_at(ended)]
    assert table_at(ended) < report
    assert screen.cursor_is_shown
    assert screen.shows_what_is_typed


SAY = r"""
echo "supervisor $PPID of rank $RANK"
read order < "$GATES/$RANK"
"""


def test_the_size_changes_while_it_runs(start: Start, gates: Gates, request: Any) -> None:
    script = """
    for i in 1 2 3 4 5 6 7 8 9 10; do
        echo "line $i of rank $RANK, which is a long one, and is broken on a narrow terminal"
    done
    printf "5 10 " > "$ASUPERVISE_PROGRESS_FILE"
    read order < "$GATES/$RANK"
    """
    for rank in range(2):
        gates.make(rank)
    screen = start(*sh(2, script), columns=100, lines=24)
    screen.wait_for("● 2 running", "50%", "line 10 of rank 0, which is a long one, and is")
    for columns, lines in ((60, 24), (33, 12), (120, 30), (20, 6), (100, 24)):
        screen.resize(columns, lines)
        screen.wait(lambda seen, size=(columns, lines): is_whole(seen, *size))
        take_picture(screen, request, f"live-resized-{columns}x{lines}")
    for rank in range(2):
        gates.tell(rank, "end")
    screen.wait_for("✓ 2 done", "exit status 0")


def is_whole(seen: list[str], columns: int, lines: int) -> bool:
    """Whether one table of that width is on a screen of that height, below the log's end."""
    titles = [number for number, line in enumerate(seen) if "● 2" in line]
    if len(seen) != lines or len(titles) != 1 or len(seen[titles[0]]) != columns - 1:
        return False
    log = "".join(seen[: titles[0]])
    return log.endswith("is broken on a narrow terminal") and not RULE.search(log)


EVIL = r"""
printf 'clear\033[2J\033[H\033[3Jed\n'
printf 'title \033]0;owned\007 gone\n'
printf 'up\033[99A\033[99Dand over\n'
printf 'nul \000 bell \007 shift \016 here\n'
printf 'modes \033[?1049h\033[?25h\033[4h\033#8 unset\n'
printf 'eight \233\062\112 bits\n'
printf '\033[31;1mcoloured\033[44m\n'
printf 'turned \342\200\256 around\n'
echo last
read order < "$GATES/$RANK"
"""


def test_nothing_that_a_worker_prints_acts(start: Start, gates: Gates, request: Any) -> None:
    gates.make(0)
    screen = start(*sh(1, EVIL))
    seen = screen.wait_for("● 1 running", "]:last", " last")
    take_picture(screen, request, "live-evil")
    at = table_at(seen)
    assert text(seen[:at]).split("\n") == [
        "[default0]:cleared",
        "[default0]:title  gone",
        "[default0]:upand over",
        "[default0]:nul ␀ bell ␇ shift ␎ here",
        "[default0]:modes  unset",
        r"[default0]:eight \x9b2J bits",
        "[default0]:coloured",
        r"[default0]:turned \u202e around",
        "[default0]:last",
    ]
    assert screen.tmux("display-message", "-p", "#{pane_title}").strip() != "owned"
    assert not screen.cursor_is_shown
    # The colours end with their line.
    coloured, turned = screen.lines(colours=True)[6:8]
    assert coloured.endswith("\x1b[1m\x1b[31mcoloured")
    assert turned.startswith("\x1b[0m")
    gates.tell(0, "end")
    screen.wait_for("exit status 0")


def supervisor(lines: list[str]) -> int:
    return next(int(found[1]) for line in lines if (found := re.search(r"supervisor (\d+)", line)))


@pytest.mark.parametrize("how", ["keys", "SIGTERM", "SIGHUP"])
def test_the_terminal_is_given_back_after_a_signal(start: Start, gates: Gates, how: str) -> None:
    gates.make(0)
    screen = start(*sh(1, SAY))
    seen = screen.wait_for("● 1 running", "]:supervisor")
    if how == "keys":
        screen.type("C-c")
    else:
        os.kill(supervisor(seen), signal.Signals[how])
    number = signal.Signals["SIGINT" if how == "keys" else how]
    ended = screen.wait_for(f"exit status {128 + number}")
    said = next(n for n, line in enumerate(ended) if line.startswith(f"asupervise: {number.name}"))
    assert said < table_at(ended)
    assert "■ 1 ended" in ended[table_at(ended)]
    assert screen.cursor_is_shown
    assert screen.shows_what_is_typed


def test_a_shell_gets_the_terminal_while_it_is_stopped(start: Start, gates: Gates) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no shell that manages jobs: bash")
    gates.make(0)
    screen = start(*sh(1, SAY), shell="bash --norc --noprofile -i")
    screen.wait_for("● 1 running", "]:supervisor")
    screen.type("C-z")
    screen.wait_for("Stopped")
    screen.wait(lambda _: screen.cursor_is_shown)
    screen.type("echo $((40 + 2))", "Enter")
    screen.wait_for("42")
    screen.type("fg", "Enter")
    screen.wait(lambda seen: "● 1 running" in text(seen[-6:]) and not screen.cursor_is_shown)
    gates.tell(0, "end")
    screen.wait_for("✓ 1 done")
    screen.wait(lambda _: screen.cursor_is_shown)


def test_standard_output_is_a_file(start: Start, gates: Gates, tmp_path: Path) -> None:
    gates.make(0)
    screen = start(*sh(1, SAY), end=f"> {tmp_path / 'out'}")
    seen = screen.wait_for("● 1 running", " supervisor")
    assert not text(seen[: table_at(seen)])
    gates.tell(0, "end")
    screen.wait_for("✓ 1 done", "exit status 0")
    lines = (tmp_path / "out").read_text().splitlines()
    assert [line.startswith("[default0]:supervisor") for line in lines] == [True]


def test_a_pipe_that_leads_to_the_terminal_all_the_same(start: Start, gates: Gates) -> None:
    gates.make(0)
    screen = start(*sh(1, SAY), end="| cat | cat")
    screen.wait_for("]:supervisor")
    gates.tell(0, "end")
    ended = screen.wait_for("exit status 0")
    assert text(ended).startswith("note: --live: a pipe leads to this terminal")
    assert "running" not in text(screen.lines(history=True))


def test_a_dumb_terminal_has_lines_only(start: Start, gates: Gates) -> None:
    gates.make(0)
    screen = start(*sh(1, SAY), before="TERM=dumb")
    screen.wait_for("]:supervisor")
    gates.tell(0, "end")
    ended = text(screen.wait_for("exit status 0"))
    assert ended.startswith("note: --live: TERM=dumb can show no table; only lines are shown\n")
    assert "running" not in ended


def test_without_rich_it_says_what_to_install(start: Start, tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('no', name='rich')")
    screen = start(*sh(1, "echo never"), PYTHONPATH=str(tmp_path))
    ended = text(screen.wait_for("exit status 2"))
    assert ended.startswith("error: the live view needs the package rich\n")
    assert "hint: pip install 'asupervise[ui]'" in ended
    assert "never" not in ended


def test_a_job_that_is_started_anew(start: Start, gates: Gates, request: Any) -> None:
    script = """
    echo "start $TORCHELASTIC_RESTART_COUNT of rank $RANK"
    read order < "$GATES/$RANK.$TORCHELASTIC_RESTART_COUNT"
    [ "$order" = fail ] && exit 9 || exit 0
    """
    for name in ("0.0", "1.0", "0.1", "1.1"):
        gates.make(name)
    flags = ("--max-restarts", "2", "--restart-backoff", "0", "--min-uptime", "0")
    screen = start(*sh(2, script, *flags), columns=110)
    screen.wait_for("● 2 running", "]:start 0 of rank 0", "]:start 0 of rank 1")
    gates.tell("1.0", "fail")
    seen = screen.wait_for(
        "● 2 running", "]:start 1 of rank 0", " start 1 of rank 1", "restarts 1/2"
    )
    take_picture(screen, request, "live-restarted")
    assert re.search(r"^   1  ● running +0:0\d .* 1  start 1 of rank 1$", text(seen), re.MULTILINE)
    assert "restart 1 of 2" in text(seen)
    for rank in range(2):
        gates.tell(f"{rank}.1", "end")
    screen.wait_for("✓ 2 done", "exit status 0")


def test_services_are_started_anew_one_by_one(start: Start, gates: Gates, request: Any) -> None:
    for name in ("0", "1"):
        gates.make(name)
    flags = (
        "--max-restarts",
        "5",
        "--restart",
        "worker",
        "--restart-backoff",
        "2",
        "--min-uptime",
        "0",
    )
    screen = start(*sh(2, SAY, *flags), columns=110)
    screen.wait_for("● 2 running", "]:supervisor")
    gates.tell("1", "end")
    seen = screen.wait_for("↻ 1 restarting", "↻ in ", "● 1 running")
    take_picture(screen, request, "live-service")
    assert "asupervise: rank 1 has ended: restart 1, in " in text(seen[: table_at(seen)])
    screen.wait_for("● 2 running", "─ restarts 1 ─")
    screen.type("C-c")
    screen.wait_for("exit status 130")
