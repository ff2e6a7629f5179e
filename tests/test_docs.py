"""The README and the docs: their form, and that what they show is true."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / name
    for name in (
        "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/design.md", "docs/functions.md",
        "examples/job_service/README.md",
    )
]  # fmt: skip


@dataclass(frozen=True)
class Block:
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [Block(language, text) for language, text in found]


def shown(containing: str) -> str:
    """The README's one block of output that has this in it."""
    (text,) = (block.text for block in blocks(README) if containing in block.text)
    return text


def test_readme_opens_with_one_sentence() -> None:
    title, sentence, *_ = README.split("\n\n")
    assert title == "# asupervise"
    assert "\n" not in sentence
    assert len(re.findall(r"[.!?](?=\s|$)", sentence)) == 1


def test_readme_has_its_two_commands_before_any_other_block() -> None:
    first, second, *others = blocks(README)
    assert (first, second) == (Block("sh", "make demo\n"), Block("sh", "make test\n"))
    assert not {"sh", "bash", "console", "shell"} & {block.language for block in others}


def test_readme_example_is_short() -> None:
    (example,) = (block.text for block in blocks(README) if block.language == "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize(
    "snippet", [block.text for block in blocks(README) if block.language == "python"]
)
def test_readme_python_runs(snippet: str, tmp_path: Path) -> None:
    argv = [sys.executable, "-W", "error", "-c", snippet]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert sorted(lines) == ["[hello0]:from 0", "[hello1]:from 1"]
    assert last == "all ranks succeeded"
    assert list(tmp_path.iterdir()) == []


def test_the_function_example_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "functions.md").read_text()
    (example,) = (block.text for block in blocks(page) if block.language == "python")
    script = tmp_path / "factorials.py"
    script.write_text(example)
    argv = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    (shown_start,) = re.findall(r"This prints `(\{0: \d+), ", page)
    assert done.stdout.startswith(shown_start)


def test_the_demo_that_is_shown_is_the_one_that_runs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (arguments,) = re.findall(r"^DEMO_ARGS := (.*)$", makefile, re.MULTILINE)
    assert f"-m asupervise {arguments}" in shown("words, ")


def test_the_flags_that_are_named_exist(run_cli) -> None:
    done = run_cli("--help")
    assert done.returncode == 0
    known = set(re.findall(r"--[a-z][a-z-]+", done.stdout.decode()))
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    named = {flag for flag in re.findall(r"`(--[a-z][a-z-]+)", prose) if flag != "--help"}
    assert named
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_path_of_somebodys_machine(page: Path) -> None:
    assert not re.search(r"/(home|root|work|Users)/", page.read_text())
