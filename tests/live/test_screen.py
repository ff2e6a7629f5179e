"""The live view as people see it: in tmux, of several sizes, while ranks fail and sizes change."""

from __future__ import annotations

import os
import re
import shlex
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
RULE = re.compile("^── ")

pytestmark = pytest.mark.usefixtures("_camera")

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
        *words: object, columns: int = 80, lines: int = 24, end: str = "", **env: str
    ) -> Screen:
        argv = shlex.join([sys.executable, "-m", "asupervise", *map(str, words)])
        environ = clean_environment() | {"GATES": str(gates.folder), **env}
        command = f"cd {shlex.quote(str(ROOT))}; {argv} {end}"
        screens.append(Screen(tmp_path, command, columns, lines, environ))
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
