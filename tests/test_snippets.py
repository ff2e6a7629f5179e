"""Every block of code on every page is run, or says why it is not: see `tests/snippets.py`."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import pkgutil
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import asupervise
from asupervise.options import parse_options
from tests.conftest import clean_environment
from tests.snippets import ROOT, Page, Snippet, commands_of, snippets_of

pytestmark = pytest.mark.pages

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    )
)
SNIPPETS = [snippet for page in PAGES for snippet in snippets_of(page)]
# Blocks whose form is fixed: the README begins with two commands, which whoever runs this has run.
RUN_ELSEWHERE = {("README.md", "make demo\n"), ("README.md", "make test\n")}
LANGUAGES = {"python", "console", "sh", "text", "yaml", "toml", "json", "dockerfile"}


def is_run(snippet: Snippet) -> bool:
    return snippet.is_run and (snippet.page, snippet.text) not in RUN_ELSEWHERE


WITH_CODE = [page for page in PAGES if any(is_run(s) for s in SNIPPETS if s.page == page)]
NOT_RUN = [snippet for snippet in SNIPPETS if snippet.not_run is not None]


@pytest.mark.parametrize("page", WITH_CODE)
def test_what_a_page_shows_is_what_happens(page: str, tmp_path: Path) -> None:
    running = Page(tmp_path, clean_environment())
    try:
        for snippet in snippets_of(page):
            if (page, snippet.text) not in RUN_ELSEWHERE:
                running.run(snippet)
    finally:
        running.close()


@pytest.mark.parametrize("snippet", NOT_RUN, ids=str)
def test_what_is_not_run_says_why_and_is_well_formed(snippet: Snippet) -> None:
    """The names of these tests are the list of what is not run: ``pytest -k not_run -v``."""
    assert len(str(snippet.not_run)) > 10
    if snippet.language == "python":
        compile(snippet.text, str(snippet), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if snippet.language == "sh":
        subprocess.run(["bash", "-n", "-c", snippet.text], check=True)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_each_block_is_of_its_language(snippet: Snippet) -> None:
    assert snippet.language in LANGUAGES
    known = {"title", "not-run", "not-compared", "any-order", "any-numbers"} | {
        "output",
        "hl_lines",
    }
    assert set(snippet.attributes) <= known
    if snippet.language == "yaml":
        assert list(yaml.safe_load_all(snippet.text))
    if snippet.language == "toml":
        tomllib.loads(snippet.text)
    if snippet.language == "json":
        json.loads(snippet.text)


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if s.title is not None], ids=str)
def test_each_file_is_used(snippet: Snippet) -> None:
    later = [s for s in SNIPPETS if s.page == snippet.page and s.line > snippet.line]
    name = Path(str(snippet.title))
    used = any(re.search(rf"\b({re.escape(name.name)}|{name.stem})\b", s.text) for s in later)
    assert used or snippet.not_run is not None


def commands(snippet: Snippet) -> Iterator[list[str]]:
    """The words after each ``python -m asupervise`` in a block."""
    if snippet.language == "yaml":
        for document in yaml.safe_load_all(snippet.text):
            yield from commands_of_containers(document)
    if snippet.is_console:
        text = "\n".join(command for command, _ in commands_of(snippet.text))
    else:
        text = snippet.text
    for line in text.replace("\\\n", " ").splitlines():
        before, found, after = line.partition("python -m asupervise ")
        if found and not before.lstrip().startswith("#"):
            yield list(words_of(re.sub(r"\$\{?[A-Z_]+\}?", "1", after)))


def commands_of_containers(node: object) -> Iterator[list[str]]:
    """The arguments of each container of a manifest that runs us."""
    if isinstance(node, dict):
        if node.get("command") == ["python", "-m", "asupervise"]:
            yield node["args"]
        for value in node.values():
            yield from commands_of_containers(value)
    elif isinstance(node, list):
        for value in node:
            yield from commands_of_containers(value)


def words_of(line: str) -> Iterator[str]:
    """The words of a command, up to whatever ends it in a shell."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    for word in words:
        if set(word) <= set(";|&<>()"):
            return
        yield word


@pytest.mark.parametrize("page", PAGES)
def test_each_command_is_one(page: str) -> None:
    for snippet in snippets_of(page):
        for words in commands(snippet):
            if not {"...", "…"} & set(words):
                parse_options(words, {})


def test_the_examples_of_docstrings_are_true() -> None:
    names = {name: getattr(asupervise, name) for name in asupervise.__all__}
    attempted = 0
    for found in pkgutil.walk_packages(asupervise.__path__, "asupervise."):
        if found.name.endswith("__main__") or found.name.endswith(".c10d"):
            continue
        module = importlib.import_module(found.name)
        done = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS)
        assert not done.failed, found.name
        attempted += done.attempted
    assert attempted > 90
