"""How results and running groups look in a notebook: small pieces of HTML. Pure.

A page of somebody else's stands around them: so there is no style sheet, no identifier and no
script, colours are its own, and what is put over its background is half transparent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

from asupervise.views.lives import Failure, Life
from asupervise.views.markup import Child, Html, tag
from asupervise.views.plain import cut_middle, one_line, ranks_text, without_sequences
from asupervise.views.summary import headline
from asupervise.views.words import count, how_ended, size

__all__ = ["RUNNING", "Failed", "error_html", "failure_html", "group_html", "result_html"]

_TEXT_CHARS: Final = 8192
_MOST_ROWS: Final = 32
_VALUE_CHARS: Final = 120
_CELL: Final = "text-align:left;padding:2px 14px 2px 0;vertical-align:top"
_DIM: Final = "opacity:.65"
_MONO: Final = "font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.9em"
_PRE: Final = (
    f"{_MONO};white-space:pre;overflow-x:auto;max-height:24em;margin:4px 0;padding:8px 10px;"
    "background:rgba(128,128,128,.12);border-radius:4px"
)
RUNNING: Final = "running"
_SIGNS: Final = {"failed": ("#d1353f", "failed"), "succeeded": ("#2a8a52", "succeeded"),
                 RUNNING: ("#2f6fdb", "running"), "ended": ("#888", "ended")}  # fmt: skip


class Failed(Protocol):
    """What is shown of a `ProcessFailure`."""

    @property
    def local_rank(self) -> int: ...
    @property
    def pid(self) -> int: ...
    @property
    def exitcode(self) -> int: ...
    @property
    def ended_by_us(self) -> bool: ...
    @property
    def cause(self) -> str: ...
    @property
    def message(self) -> str | dict[str, Any]: ...
    @property
    def traceback(self) -> str: ...
    @property
    def stack(self) -> str: ...
    @property
    def stderr_tail(self) -> str: ...
    @property
    def peak_rss_bytes(self) -> int | None: ...
    def signal_name(self) -> str: ...


def result_html(
    values: Mapping[int, object],
    failures: Mapping[int, Failed],
    culprit: int | None,
    log_dir: str | None,
    warnings: Sequence[str],
) -> str:
    """A `RunProcsResult`."""
    below = [
        *(tag("div", one_line(text, 400), style="color:#a06a00") for text in warnings[:8]),
        _path(log_dir) if log_dir else None,
    ]
    if failures:
        return _box([_failures(failures, culprit), below])
    told = {rank: value for rank, value in values.items() if value is not None}
    rows = [(str(rank), tag("code", _said(value))) for rank, value in sorted(told.items())]
    return _box([
        _title("succeeded", f"{count(len(values), 'worker')} succeeded"),
        _table(("rank", "returned"), rows) if rows else None,
        below,
    ])  # fmt: skip


def error_html(name: str, failures: Mapping[int, Failed], culprit: int | None) -> str:
    """A `ChildFailedError`: its failures are by global rank."""
    return _box([tag("div", one_line(name), style=_DIM), _failures(failures, culprit)])


def failure_html(failure: Failed) -> str:
    """A `ProcessFailure` by itself."""
    return _box([_failure(failure.local_rank, failure)])


def group_html(
    name: str,
    states: Mapping[int, str],
    pids: Mapping[int, int],
    log_dir: str | None,
    restarts: Mapping[int, int] | None = None,
) -> str:
    """A `PContext`, or `Services`, which have `restarts`; all are by local rank."""
    alive = sum(state == RUNNING for state in states.values())
    title = f"{one_line(name)}: {count(len(states), 'worker')}, {alive:,} running"
    names, rows = ["rank", "pid", "state"], []
    for rank, state in sorted(states.items()):
        rows.append([str(rank), str(pids.get(rank, "")), state])
    if restarts is not None:
        names.append("restarts")
        for row in rows:
            row.append(f"{restarts[int(row[0])]:,}")
    return _box([
        _title(RUNNING if alive else "ended", title), _table(names, rows),
        _path(log_dir) if log_dir else None,
    ])  # fmt: skip


# --- parts --------------------------------------------------------------------------------------


def _box(children: Iterable[Child]) -> str:
    # A `str` of its own: whoever shows it need not know ours.
    return str(tag("div", children, style="font-size:.95em;line-height:1.5;max-width:60em"))


def _title(state: str, text: str) -> Html:
    colour, word = _SIGNS[state]
    dot = tag("span", "\u25cf ", style=f"color:{colour}", title=word)
    return tag("div", dot, tag("b", text))


def _table(names: Sequence[str], rows: Sequence[Sequence[Child]]) -> Html:
    head = tag("tr", [tag("th", name, style=f"{_CELL};font-weight:400;{_DIM}") for name in names])
    shown = [tag("tr", [tag("td", cell, style=_CELL) for cell in row]) for row in rows[:_MOST_ROWS]]
    left = len(rows) - _MOST_ROWS
    more = tag("div", f"and {left:,} more", style=_DIM) if left > 0 else None
    return tag("div", tag("table", head, shown, style="border-collapse:collapse"), more)


def _path(log_dir: str) -> Html:
    return tag("div", "logs and report: ", tag("code", one_line(log_dir, 400)), style=_DIM)


def _said(value: object) -> str:
    try:
        return one_line(repr(value), _VALUE_CHARS)
    except Exception as exc:
        # A value's own repr(): what is wrong with it must not hide all the others.
        return f"<{type(value).__name__}: its repr() raised {type(exc).__name__}>"


def _life(rank: int, failure: Failed) -> Life:
    message = failure.message
    text = message if isinstance(message, str) else str(message.get("message", ""))
    name = failure.signal_name() if failure.exitcode < 0 else ""
    told = Failure(
        message=text, cause=failure.cause, signal=name, traceback=failure.traceback,
        stack=failure.stack, stderr_tail=failure.stderr_tail, ended_by_us=failure.ended_by_us,
    )  # fmt: skip
    return Life(
        0, failure.local_rank, rank, failure.pid, exitcode=failure.exitcode,
        peak_rss_bytes=failure.peak_rss_bytes, failure=told,
    )  # fmt: skip


def _failures(failures: Mapping[int, Failed], culprit: int | None) -> list[Child]:
    own = {r: f for r, f in failures.items() if not f.ended_by_us and r != culprit}
    ended = {r: f for r, f in failures.items() if f.ended_by_us and r != culprit}
    parts: list[Child] = []
    if culprit is not None and culprit in failures:
        parts.append(_failure(culprit, failures[culprit]))
    elif not own:
        parts.append(_title("ended", "no rank failed by itself: all were ended"))
    rows = [(str(rank), *_row(rank, failure)) for rank, failure in sorted(own.items())]
    if rows:
        parts.append(tag("div", "failed as well:", style=f"{_DIM};margin-top:6px"))
        parts.append(_table(("rank", "", ""), rows))
    if ended:
        many = "s" if len(ended) > 1 else ""
        text = f"ended by the supervisor: rank{many} {ranks_text(ended)}"
        parts.append(tag("div", text, style=_DIM))
    return parts


def _row(rank: int, failure: Failed) -> tuple[Child, Child]:
    life = _life(rank, failure)
    return how_ended(life), tag("span", headline(life), style=_MONO)


def _failure(rank: int, failure: Failed) -> Html:
    life = _life(rank, failure)
    facts = [how_ended(life), f"pid {failure.pid}" if failure.pid else ""]
    if failure.peak_rss_bytes:
        facts.append(f"peak memory {size(failure.peak_rss_bytes)}")
    by_us = failure.ended_by_us
    title = f"rank {rank} {'was ended by the supervisor' if by_us else 'failed'}"
    said = headline(life, failure.stderr_tail)
    return tag(
        "div",
        _title("ended" if by_us else "failed", title),
        tag("div", said, style=f"{_MONO};font-weight:600") if said not in facts else None,
        tag("div", ", ".join(filter(None, facts)), style=_DIM),
        _text("traceback", failure.traceback),
        _text("where it was", failure.stack),
        None if failure.traceback else _text("last lines of stderr", failure.stderr_tail),
    )


def _text(title: str, text: str) -> Html | None:
    text = cut_middle(text.strip("\n"), _TEXT_CHARS)
    if not text.strip():
        return None
    # A log's colours are classes of the report's: here they are left out.
    plain = without_sequences(text)
    summary = tag("summary", title, style=f"{_DIM};cursor:pointer")
    return tag("details", summary, tag("pre", plain, style=_PRE), open=title != "where it was")
