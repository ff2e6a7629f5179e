"""The workers of a run as a table, and what they were bound to. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from asupervise.views.lives import Life
from asupervise.views.markup import Child, Html, tag
from asupervise.views.plain import one_line, ranks_text
from asupervise.views.story import Run
from asupervise.views.summary import headline
from asupervise.views.words import count, duration, how_ended, size

__all__ = ["binding_of", "ranks_table", "stacks_of"]

_MOST_ROWS: Final = 64
_MOST_FAILED: Final = 128
_MOST_GROUPS: Final = 64
_MANY: Final = 12

Group = tuple[Life, ...]


def ranks_table(run: Run) -> Html | None:
    """Each start of each worker; where these are many, those that fared the same in one row."""
    if not run.lives:
        return None
    groups = _groups(run.lives)
    attempts = len({life.attempt for life in run.lives}) > 1
    peak = max((life.peak_rss_bytes or 0 for life in run.lives), default=0)
    cpu = any(life.samples for life in run.lives)
    names = [
        "Rank", *(["Attempt"] if attempts else []), "Ended", "Ran",
        *(["Peak memory"] if peak else []),
        *(["CPU time"] if cpu else []), "",
    ]  # fmt: skip
    left_out = sum(map(len, groups[_MOST_GROUPS + _MOST_FAILED :]))
    last = {id(life) for life in {life.rank: life for life in run.lives}.values()}
    return tag(
        "section",
        tag("h2", "Ranks"),
        tag(
            "div",
            tag(
                "table",
                tag("thead", tag("tr", [tag("th", name, scope="col") for name in names])),
                tag("tbody", [_row(group, attempts, cpu, peak, last)
                              for group in groups[: _MOST_GROUPS + _MOST_FAILED]]),
            ),
            class_="wide",
        ),
        tag("p", f"{count(left_out, 'more start')} of workers", class_="note")
        if left_out
        else None,
        id="ranks",
    )  # fmt: skip


def _groups(lives: Sequence[Life]) -> list[Group]:
    if len(lives) <= _MOST_ROWS:
        return [(life,) for life in lives]
    failed = [life for life in lives if life.outcome == "failed"]
    alone = failed[:_MOST_FAILED]
    singles = set(map(id, alone))
    equal: dict[object, list[Life]] = {}
    for life in lives:
        if id(life) not in singles:
            key = (life.attempt, life.outcome, how_ended(life), _where(life))
            equal.setdefault(key, []).append(life)
    return [*((life,) for life in alone), *map(tuple, equal.values())]


def _row(group: Group, attempts: bool, cpu: bool, peak: int, last: set[int]) -> Html:
    life = group[0]
    ranks = [each.rank for each in group]
    name: Child = f"{life.rank}" if len(group) == 1 else (
        tag("span", ranks_text(ranks, 6), tag("small", count(len(ranks), "rank"))))  # fmt: skip
    ended = tag("span", how_ended(life), class_=f"end {life.outcome}")
    by_us = tag("small", "by the supervisor") if life.outcome == "ended" else None
    peaks = [each.peak_rss_bytes for each in group if each.peak_rss_bytes]
    cells: list[tuple[str, Child]] = [
        *([("attempt", f"{life.attempt}")] if attempts else []),
        ("", [ended, by_us]),
        ("ran", _between([each.end_s - each.start_s for each in group
                          if each.end_s is not None and each.start_s is not None])),
        *([("peak", _memory(peaks, peak))] if peak else []),
        *([("CPU", _cpu(group))] if cpu else []),
        ("", _what(life)),
    ]  # fmt: skip
    return tag(
        "tr",
        tag("th", name, scope="row"),
        [tag("td", cell, data_name=label or None) for label, cell in cells],
        # Where the timeline leads to.
        id=f"rank-{life.rank}" if len(group) == 1 and id(life) in last else None,
    )


def _between(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = duration(min(values)), duration(max(values))
    return low if low == high else f"{low} to {high}"


def _memory(values: Sequence[int], peak: int) -> Child:
    if not values:
        return None
    low, high = size(min(values)), size(max(values))
    bar = tag("svg", tag("rect", width=f"{100 * max(values) / peak:.1f}%", height=4, rx=1),
              width=56, height=4, class_="share", aria_hidden="true")  # fmt: skip
    return [low if low == high else f"{low} to {high}", bar]


def _cpu(group: Group) -> str:
    return _between([life.samples[-1].cpu_s for life in group if life.samples])


def _what(life: Life) -> Child:
    """What it failed of, or where it was."""
    failure = life.failure
    if failure is not None and not failure.ended_by_us:
        return tag("span", one_line(headline(life), 160), class_="what")
    return tag("span", _where(life), class_="what") if _where(life) else None


def _where(life: Life) -> str:
    stack = (life.failure.stack if life.failure else "") or life.stack
    return one_line(stack, 160)


def stacks_of(run: Run, whole: Sequence[tuple[Life, str]]) -> Html | None:
    """Where all were when that was asked last, equal ones together.

    Args:
        run: the run.
        whole: of some workers all that is known of where they were.
    """
    groups: dict[str, list[Life]] = {}
    for life in run.lives:
        if _where(life):
            groups.setdefault(_where(life), []).append(life)
    if not groups:
        return None
    texts = {(life.attempt, life.local_rank): text for life, text in whole}
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[1][0].rank))
    shown = [_stack(where, lives, texts) for where, lives in ordered[:_MOST_GROUPS]]
    rest = sum(len(lives) for _, lives in ordered[_MOST_GROUPS:])
    more = tag("p", f"{count(rest, 'other')} elsewhere", class_="note") if rest else None
    return tag("section", tag("h2", "Where they were"), shown, more, id="stacks")


def _stack(where: str, lives: Sequence[Life], texts: dict[tuple[int, int], str]) -> Html:
    many = "s" if len(lives) > 1 else ""
    title = (tag("b", f"Rank{many} {ranks_text(life.rank for life in lives)}"), f" {where}")
    text = next(
        (texts[key] for each in lives if (key := (each.attempt, each.local_rank)) in texts), ""
    )
    if not text:
        return tag("p", title, class_="other")
    return tag("details", tag("summary", title), tag("pre", text, tabindex=0))


def binding_of(run: Run) -> Html | None:
    """What each worker was bound to; None if to nothing."""
    groups: dict[str, list[int]] = {}
    for life in run.lives:
        if life.binding:
            groups.setdefault(one_line(life.binding, 400), []).append(life.rank)
    if not groups:
        return None
    rows = [
        tag("tr", tag("th", ranks_text(ranks), scope="row"), tag("td", text))
        for text, ranks in list(groups.items())[:_MOST_GROUPS]
    ]
    head = tag("thead", tag("tr", tag("th", "Rank", scope="col"), tag("th", "CPUs", scope="col")))
    table = tag("div", tag("table", head, tag("tbody", rows)), class_="wide")
    if len(rows) > _MANY:
        many = count(len(groups), "way to be bound", "ways to be bound")
        table = tag("details", tag("summary", many), table)
    return tag("section", tag("h2", "Binding"), table, id="binding")
