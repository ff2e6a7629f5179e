"""The last line of what workers have written, whatever there is in the place of their files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from asupervise.views.live.last_lines import LastLines, last_line


@pytest.fixture
def reader() -> Iterator[LastLines[str]]:
    reader: LastLines[str] = LastLines()
    yield reader
    reader.close()


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


def test_of_two_files_that_which_was_written_last(tmp_path: Path, reader: LastLines[str]) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    out.write_text("from out\n")
    err.write_text("from err\n")
    at(out, 100)
    at(err, 200)
    files = {"w": (str(out), str(err))}
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


def test_a_long_file_is_read_at_its_end(tmp_path: Path, reader: LastLines[str]) -> None:
    path = tmp_path / "out"
    path.write_text("x" * 100_000 + "\nthe end\n")
    assert reader.read({"w": (str(path),)}) == {"w": "the end"}
    path.write_text("x" * 100_000 + "\n")
    assert reader.read({"w": (str(path),)}) == {"w": "x" * 4095}


def test_empty_lines_at_the_end_keep_what_was_there(tmp_path: Path, reader: LastLines[str]) -> None:
    path = tmp_path / "out"
    path.write_text("said\n")
    assert reader.read({"w": (str(path),)}) == {"w": "said"}
    path.write_text("said\n" + "\n" * 5000)
    assert reader.read({"w": (str(path),)}) == {"w": "said"}


def test_what_is_no_file(tmp_path: Path, reader: LastLines[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    names = ("pipe", "folder", "nothing", "nul\0")
    files = {name: (str(tmp_path / name),) for name in names}
    assert reader.read({**files, "none": (), "null": (os.devnull,)}) == {}


def test_what_was_said_last_is_known_when_the_folder_is_gone(
    tmp_path: Path, reader: LastLines[str]
) -> None:
    shown, kept, unknown = (tmp_path / name for name in ("shown", "kept", "unknown"))
    for path in (shown, kept, unknown):
        path.write_text("first\n")
    reader.keep([str(kept)])
    assert reader.read({"shown": (str(shown),)}) == {"shown": "first"}
    for path in (shown, kept, unknown):
        with path.open("a") as file:
            file.write("last\n")
        path.unlink()
    files = {path.name: (str(path),) for path in (shown, kept, unknown)}
    assert reader.read(files) == {"shown": "last", "kept": "last"}


def test_another_file_in_its_place_is_read(tmp_path: Path, reader: LastLines[str]) -> None:
    path = tmp_path / "out"
    path.write_text("old\n")
    assert reader.read({"w": (str(path),)}) == {"w": "old"}
    path.rename(tmp_path / "rotated")
    path.write_text("new\n")
    assert reader.read({"w": (str(path),)}) == {"w": "new"}
