"""The README and the docs: their form, and that what they show is true."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import asupervise
from asupervise.flags import FLAGS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
REFERENCE = ROOT / "docs" / "reference"
MADE_WITH_THE_SITE = "../assets/example-run/report.html"


@dataclass(frozen=True)
class Block:
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    found = re.findall(r"^```(\w*)[^`\n]*\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
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


def test_the_reference_has_every_public_name_once() -> None:
    text = "\n".join(path.read_text() for path in REFERENCE.glob("*.md"))
    described = re.findall(r"^::: asupervise\.(\w+)$", text, re.MULTILINE)
    # A module, whose names stand together.
    described.remove("events")
    assert sorted(described) == sorted(set(asupervise.__all__) - {"__version__"})


@pytest.mark.parametrize("name", sorted(set(asupervise.__all__) - {"__version__"}))
def test_every_public_name_is_described(name: str) -> None:
    """In more words than its name has; and so is what can be called of it."""
    public = getattr(asupervise, name)
    assert len((public.__doc__ or "").split()) > 5
    for member, value in vars(public).items() if isinstance(public, type) else ():
        is_method = callable(value) or isinstance(value, property | classmethod | staticmethod)
        if is_method and not member.startswith("_") and not isinstance(value, type):
            assert getattr(public, member).__doc__ or value.__doc__, f"{name}.{member}"


def test_the_command_line_is_described_from_its_flags() -> None:
    path = ROOT / "docs" / "hooks" / "command_line.py"
    spec = importlib.util.spec_from_file_location("command_line", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    text = made.flags()
    for heading, group in FLAGS.items():
        assert f"## {heading}\n" in text
        for flag in group:
            assert text.count(f"{{ #{flag.name[2:]} .flag }}") == 1
    assert "`PET_NPROC_PER_NODE`" in text
    assert set(re.findall(r"#([a-z-]+)\)", made.ours())) == {
        flag.name[2:] for group in FLAGS.values() for flag in group if flag.ours
    }


def test_the_table_of_torchruns_flags_has_ours_that_are_theirs() -> None:
    """tests/torch looks whether these are torchrun's."""
    theirs = [flag.name for group in FLAGS.values() for flag in group if not flag.ours]
    assert sorted(theirs) == sorted(flags_in_the_table())


def flags_in_the_table() -> list[str]:
    text = (REFERENCE / "torchrun-flags.md").read_text()
    return re.findall(r"^\| `(--[a-z-]+)` \| ", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        known = target.startswith("https://") or (page.parent / target).exists()
        assert known or target == MADE_WITH_THE_SITE, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_path_of_somebodys_machine(page: Path) -> None:
    assert not re.search(r"/(home|root|work|Users)/", page.read_text())
