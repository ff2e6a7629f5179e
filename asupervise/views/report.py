"""The report of a run as one page, made from what the run has left in its folder.

Nothing of it comes from elsewhere, and nothing in it may: its Content-Security-Policy allows no
request, and of scripts and styles the page's own, by their hashes.
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from hashlib import sha256
from typing import Final

from asupervise.events import Event
from asupervise.views.excerpts import excerpts_of, link_to, logs_section
from asupervise.views.files import log_files, tail
from asupervise.views.happenings import Happening, happenings
from asupervise.views.lives import Life
from asupervise.views.markup import Html, raw, tag
from asupervise.views.plain import decoded, one_line
from asupervise.views.ranks import binding_of, ranks_table, stacks_of
from asupervise.views.resources import resources
from asupervise.views.rundir import EVENTS_FILE, read_run
from asupervise.views.story import Run
from asupervise.views.summary import STATES, culprit_of, head
from asupervise.views.timeline import timeline
from asupervise.views.words import count, moment, offset

__all__ = ["REPORT_FILE", "render", "write_report"]

REPORT_FILE: Final = "report.html"
_STACK_BYTES: Final = 16 << 10
_TAIL_BYTES: Final = 4 << 10
_MOST_STACKS: Final = 16
_ICON: Final = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'%3E"
    "%3Ccircle cx='4' cy='4' r='3.5' fill='{}'/%3E%3C/svg%3E"
)
_ICON_COLOURS: Final = {"failed": "%23c62f3b", "succeeded": "%232e8b57", "running": "%232f6fdb"}


def write_report(run_dir: str, path: str = "", told: Sequence[Event] | None = None) -> str:
    """Write the report, for the user alone, and at once: nobody sees a half of it.

    Args:
        run_dir: the run's folder.
        path: where; ``report.html`` in that folder by default.
        told: the run's events, all of them, where they are at hand; else they are read.

    Returns:
        Where it is.

    Raises:
        RunFolderError: for a folder that is missing, or was written by a later version.
        OSError: if it cannot be written.
    """
    path = path or os.path.join(run_dir, REPORT_FILE)
    run = read_run(run_dir, told)
    folder = os.path.dirname(os.path.abspath(path))
    page = render(run, _base(run_dir, folder))
    _replace(path, page.encode("utf-8", "backslashreplace"))
    return path


def _base(run_dir: str, folder: str) -> str:
    relative = os.path.relpath(run_dir, folder)
    return "" if relative == "." else f"{relative}/"


def _replace(path: str, data: bytes) -> None:
    beside = f"{path}.{os.urandom(4).hex()}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(beside, flags, 0o600), "wb") as file:
            file.write(data)
        os.replace(beside, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(beside)
        raise


# --- the page -----------------------------------------------------------------------------------


def render(run: Run, base: str = "") -> str:
    """The page.

    Args:
        run: what it tells of; its logs are read here.
        base: from the page to the run's folder, "" or with a slash at its end.
    """
    told, left_out = happenings(run)
    stacks = _stacks(run)
    culprit = run.culprit
    whole = next((text for life, text in stacks if life == culprit), "")
    files = list(log_files(run))
    excerpts = excerpts_of(files, (culprit.attempt, culprit.local_rank) if culprit else None)
    sections = [
        head(run),
        culprit_of(run, whole, _last_words(run, culprit)),
        stacks_of(run, stacks),
        timeline(run, told),
        resources(run),
        ranks_table(run),
        binding_of(run),
        logs_section(excerpts, files, base, failed=culprit is not None) if run.lives else None,
        _story(told, left_out),
        _foot(run, base),
    ]
    body = tag("main", [_navigation(filter(None, sections)), *sections])
    return "<!doctype html>\n" + tag(
        "html", _html_head(run), tag("body", body, _script()), lang="en"
    )


def _html_head(run: Run) -> Html:
    style, script = _asset("report.css"), _asset("report.js")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    title = f"{STATES[run.state]}: {one_line(run.title) or 'a run'}"
    icon = _ICON.format(_ICON_COLOURS.get(run.state, "%23888"))
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("link", rel="icon", href=icon),
        tag("style", raw(style)),
    )


def _script() -> Html:
    return tag("script", raw(_asset("report.js")))


@cache
def _asset(name: str) -> str:
    with open(os.path.join(os.path.dirname(__file__), name), encoding="utf-8") as file:
        return file.read()


@cache
def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


_NAMES: Final = {
    "culprit": "Failure", "stacks": "Stacks", "timeline": "Timeline", "resources": "Memory",
    "ranks": "Ranks", "binding": "Binding", "logs": "Logs", "story": "Events",
}  # fmt: skip


def _navigation(sections: Iterable[Html]) -> Html:
    there = "".join(section[: section.find(">")] for section in sections)
    links = [
        tag("a", name, href=f"#{anchor}")
        for anchor, name in _NAMES.items()
        if f' id="{anchor}"' in there
    ]
    return tag("nav", links, aria_label="sections")


def _story(told: list[Happening], left_out: int) -> Html | None:
    if not told:
        return None
    rows = [
        tag("tr", tag("th", offset(each.at_s), scope="row"), tag("td", each.text), class_=each.kind)
        for each in told
    ]
    if left_out:
        half = len(rows) // 2
        rows.insert(half, tag("tr", tag("th"), tag("td", f"{count(left_out, 'more event')}")))
    return tag(
        "section",
        tag("h2", "Events"),
        tag(
            "details",
            tag("summary", count(len(told) + left_out, "entry", "entries")),
            tag("div", tag("table", tag("tbody", rows), class_="story"), class_="wide"),
            open=len(told) <= 12,
        ),
        id="story",
    )


def _foot(run: Run, base: str) -> Html:
    version = f" by asupervise {one_line(run.version)}" if run.version else ""
    made = f"From what the run has left in its folder, as of {moment(run.read_at)}. "
    link = tag("a", EVENTS_FILE, href=link_to(base + EVENTS_FILE)) if run.events else None
    command = _command(run)
    return tag(
        "footer",
        tag("details", tag("summary", "Command"), tag("pre", command, tabindex=0))
        if command
        else None,
        tag("p", made, link, version if run.events else ""),
    )


def _command(run: Run) -> str:
    argv = next((life.argv for life in run.lives if life.argv), ())
    if not argv:
        return ""
    from shlex import join

    text = join(argv)
    return text if len(text) <= 4096 else f"{text[:4096]} …"


# --- what is read for it ------------------------------------------------------------------------


def _stacks(run: Run) -> list[tuple[Life, str]]:
    """The whole stacks of some workers: the culprit, and one of each that were elsewhere."""
    chosen = [] if run.culprit is None else [run.culprit]
    seen: set[str] = set()
    for life in run.lives:
        where = (life.failure.stack if life.failure else "") or life.stack
        if where and where not in seen and len(chosen) < _MOST_STACKS:
            seen.add(where)
            chosen.append(life)
    found = [(life, _stack_text(run, life)) for life in chosen]
    return [(life, text) for life, text in found if text]


def _stack_text(run: Run, life: Life) -> str:
    folder = os.path.join(run.run_dir, f"attempt_{life.attempt}", str(life.local_rank))
    return decoded(tail(os.path.join(folder, "stacks.txt"), _STACK_BYTES)).strip()


def _last_words(run: Run, culprit: Life | None) -> str:
    if culprit is None or not culprit.stderr:
        return ""
    return decoded(tail(os.path.join(run.run_dir, culprit.stderr), _TAIL_BYTES))
