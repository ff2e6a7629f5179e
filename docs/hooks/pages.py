"""What mkdocs does with our pages beyond its own: see each function.

Pages of docs/ are written to be read in the repository as well. So links that lead out of docs/
stay what they are there, and lead to a page of the site here; and what a fence says to the tests
(`not-run="..."`) is left out.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import posixpath
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import asupervise  # noqa: E402
from asupervise.views.report import render  # noqa: E402
from asupervise.views.rundir import read_run  # noqa: E402

# Reported by mkdocs as its own: under --strict each is an error.
log = logging.getLogger("mkdocs.hooks.pages")

# Of the repository, files that are pages of the site, too.
TEXTS = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks/how.md",
    "benchmarks/RESULTS.md": "benchmarks/results.md",
    "benchmarks/MISSED.md": "benchmarks/missed.md",
    "benchmarks/nodes/RESULTS.md": "benchmarks/nodes.md",
    "examples/job_service/README.md": "examples/job_service/about.md",
}
EXAMPLE_RUN = "assets/example-run"
_SHOWN = {".py": "python", ".html": "html", ".js": "javascript", ".css": "css"}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^( *```+)([\w-]+)([^`\n]*)$", re.MULTILINE)
_BLOCK = re.compile(r"^( *)(```+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
_KEPT = re.compile(r' (?:title|hl_lines|linenums)="[^"]*"')
_NAME = re.compile(r"<code>((?:asupervise\.)?([A-Za-z_]\w*)(?:\.\w+)?(?:\(\))?)</code>(?!</a>)")
_REMOTE = re.compile(r'<(?:script|img|iframe|link rel="(?:stylesheet|preconnect)")[^>]*"https?://')


def shown_files() -> dict[str, str]:
    """Sources that are shown as pages: by path in the repository, their page."""
    paths = sorted(path for path in (ROOT / "examples").rglob("*.*") if path.suffix in _SHOWN)
    names = [path.relative_to(ROOT).as_posix() for path in paths if path.stat().st_size]
    return {name: f"{name}.md" for name in names}


PAGES = TEXTS | shown_files()
SOURCES = {page: name for name, page in PAGES.items() if name != "README.md"}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made of files outside of docs/."""
    for page, name in SOURCES.items():
        text = (ROOT / name).read_text()
        if name not in TEXTS:
            language = _SHOWN[posixpath.splitext(name)[1]]
            text = (
                f'# {posixpath.basename(name)}\n\n``````{language} title="{name}"\n{text}``````\n'
            )
        files.append(File.generated(config, page, content=text))
    # Of a run that is kept with the documentation: so the page is what it is made like now.
    run = read_run(str(ROOT / "docs" / EXAMPLE_RUN))
    files.append(File.generated(config, f"{EXAMPLE_RUN}/report.html", content=render(run)))
    for plot in sorted(ROOT.glob("benchmarks/**/plots/*.svg")):
        name = plot.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links, fences, and what is generated."""
    source = page.file.src_uri
    for marker, make in GENERATED.items():
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    markdown = _outside_blocks(markdown, lambda text: _LINK.sub(_relinked(source), text))
    return _FENCE.sub(lambda m: m[1] + m[2] + "".join(_KEPT.findall(m[3])), markdown)


def public_names() -> str:
    """A table of all public names: where each is described, and in which words it begins."""
    rows = []
    for path in sorted((ROOT / "docs" / "reference").glob("*.md")):
        text = path.read_text()
        for name in re.findall(r"^::: asupervise\.(\w+)$", text, re.MULTILINE):
            if name not in asupervise.__all__:
                continue  # a module
            words = (getattr(asupervise, name).__doc__ or "").strip().partition("\n\n")[0]
            words = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", words.replace("\n", " "))
            page = text.partition("\n")[0].removeprefix("# ")
            rows.append(f"| `{name}` | {' '.join(words.split())} | [{page}]({path.name}) |")
    return "\n".join(["| name | | page |", "|---|---|---|", *sorted(rows, key=str.lower)])


def _beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What stands on a page for what is made when it is built.
GENERATED = {
    "<!-- flags -->": _beside("command_line").flags,
    "<!-- ours -->": _beside("command_line").ours,
    "<!-- names -->": public_names,
}


def _outside_blocks(markdown: str, change: Any) -> str:
    """`change` applied to what stands outside of fences."""
    done, at = [], 0
    for block in _BLOCK.finditer(markdown):
        done += [change(markdown[at : block.start()]), block[0]]
        at = block.end()
    return "".join([*done, change(markdown[at:])])


def _relinked(source: str) -> Any:
    here = posixpath.dirname(SOURCES.get(source, f"docs/{source}"))

    def relink(found: re.Match[str]) -> str:
        image, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        if not target or re.match(r"[a-z]+:", target):
            return found[0]
        name = posixpath.normpath(posixpath.join(here, target))
        if not (ROOT / name).exists() and EXAMPLE_RUN not in name:
            log.warning("%s: there is no %s", source, name)
        to = PAGES.get(name) or (name if image else name.removeprefix("docs/"))
        if to == name and not image:
            return text  # a file of the repository that the site does not have
        return f"{image}[{text}]({posixpath.relpath(to, posixpath.dirname(source) or '.')}{anchor})"

    return relink


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Let each public name that stands in the text lead to its place in the reference."""
    if page.file.src_uri in SOURCES:
        return html

    def linked(found: re.Match[str]) -> str:
        code, name = found[1], found[2]
        if name not in asupervise.__all__ or f'id="asupervise.{name}"' in html:
            return found[0]
        return f'<autoref identifier="asupervise.{name}" optional><code>{code}</code></autoref>'

    headings = re.split(r"(<h[1-6].*?</h[1-6]>|<a .*?</a>)", html, flags=re.DOTALL)
    return "".join(
        part if number % 2 else _NAME.sub(linked, part) for number, part in enumerate(headings)
    )


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Whoever reads the site asks nobody but the site."""
    for tag in _REMOTE.findall(output):
        log.warning("%s: loads something from elsewhere: %s", page.file.src_uri, tag)
    return output


def on_post_build(config: Any) -> None:
    """Leave our own code out of the site, where mkdocs has copied it."""
    assert not os.path.exists(os.path.join(config["site_dir"], "hooks")), "exclude_docs"
