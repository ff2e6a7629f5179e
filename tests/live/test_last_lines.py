"""The last line of what workers have written, whatever there is in the place of their files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from asupervise.views.live.last_lines import LastLines, last_line


@pytest.mark.parametrize(
    ("end", "line"),
    [
        (b"", ""),
        (b"one\ntwo\n", "two"),
        (b"one\ntwo", "two"),
        (b"one\n\n  \n", "one"),
        (b" 10%\r 20%\r", "20%"),
        (b"\xff\xfe\n", r"\xff\xfe"),
        (b"windows\r\n", "windows"),
    ],
)
def test_the_last_line_with_something_in_it(end: bytes, line: str) -> None:
    assert last_line(end) == line


def at(path: Path, seconds: float) -> None:
    os.utime(path, (seconds, seconds))


def test_of_two_files_that_which_was_written_last(tmp_path: Path) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    out.write_text("from out\n")
    err.write_text("from err\n")
    at(out, 100)
    at(err, 200)
    files = {"w": (str(out), str(err))}
    reader: LastLines[str] = LastLines()
    assert reader.read(files) == {"w": "from err"}
    with out.open("a") as file:
        file.write("more\n")
    at(out, 300)
    assert reader.read(files) == {"w": "more"}
    # What has not changed is not read again, and neither is what nobody asks for.
    out.write_text("cut\n!")
    at(out, 300)
    assert reader.read(files) == {"w": "!"}
    assert reader.read({}) == {}


def test_a_long_file_is_read_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("x" * 100_000 + "\nthe end\n")
    assert LastLines[str]().read({"w": (str(path),)}) == {"w": "the end"}
    path.write_text("x" * 100_000 + "\n")
    assert LastLines[str]().read({"w": (str(path),)}) == {"w": "x" * 4095}


def test_empty_lines_at_the_end_keep_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("said\n")
    reader: LastLines[str] = LastLines()
    assert reader.read({"w": (str(path),)}) == {"w": "said"}
    path.write_text("said\n" + "\n" * 5000)
    assert reader.read({"w": (str(path),)}) == {"w": "said"}


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    names = ("pipe", "folder", "nothing", "nul\0")
    files = {name: (str(tmp_path / name),) for name in names}
    assert LastLines[str]().read({**files, "none": (), "null": (os.devnull,)}) == {}
