"""A run's end in a few lines, for a terminal: pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from asupervise.hints import hint_of
from asupervise.views.happenings import happenings
from asupervise.views.lives import Life
from asupervise.views.plain import cut_middle, one_line, ranks_text, without_sequences
from asupervise.views.story import Run
from asupervise.views.summary import STATES, headline, took, verdict
from asupervise.views.words import duration, how_ended, moment, offset, size

__all__ = ["shown_run"]

_SIGNS: Final = {"failed": "31", "succeeded": "32", "ended": "33", "running": "34", "unknown": "33"}
_TEXT_CHARS: Final = 8192
_MOST_GROUPS: Final = 16


def shown_run(run: Run, *, colours: bool, events: bool = False) -> Iterator[str]:
    """The lines, without their ends.

    Args:
        run: what is shown.
        colours: whether there may be colours.
        events: whether all that happened is told, too.
    """
    bold, red, end = ("\x1b[1m", "\x1b[31m", "\x1b[0m") if colours else ("", "", "")
    state = f"\x1b[{_SIGNS[run.state]}m{STATES[run.state]}{end}" if colours else STATES[run.state]
    yield f"{bold}{one_line(run.title) or 'a run'}{end}: {state}"
    yield verdict(run)
    yield ", ".join(_facts(run))
    yield from run.notes
    if run.culprit is not None:
        yield ""
        yield f"{bold}{red}Rank {run.culprit.rank}:{end} {bold}{headline(run.culprit)}{end}"
        yield from _culprit(run.culprit)
    yield ""
    yield from _ranks(run)
    if events:
        yield ""
        yield from _events(run)


def _facts(run: Run) -> Iterator[str]:
    if run.began_at:
        yield f"began {moment(run.began_at)}"
    if run.duration_s is not None:
        yield f"{took(run)} {duration(run.duration_s)}"
    yield f"{run.nprocs:,} worker{'s' if run.nprocs != 1 else ''}"
    if run.node:
        yield f"on {one_line(run.node)}"
    if run.cwd:
        yield f"in {one_line(run.cwd, 400)}"
    if len(run.attempts) > 1:
        yield f"{len(run.attempts):,} attempts"
    if run.exit_status is not None:
        yield f"exit status {run.exit_status}"


def _culprit(life: Life) -> Iterator[str]:
    failure = life.failure
    if failure is None:
        return
    text = failure.traceback or failure.stderr_tail
    for line in without_sequences(cut_middle(text.strip("\n"), _TEXT_CHARS)).splitlines():
        yield f"  {line}"
    if failure.stack:
        yield f"  it was {one_line(failure.stack, 400)}"
    hint = hint_of(
        life.exitcode, cause=failure.cause, signal=failure.signal, message=failure.message,
        stderr_tail=failure.stderr_tail, stderr_in_file=bool(life.stderr), stack=failure.stack,
    )  # fmt: skip
    if hint:
        yield f"hint: {hint}"


def _ranks(run: Run) -> Iterator[str]:
    """How each start of a worker ended, those that ended the same in one line."""
    groups: dict[tuple[str, ...], list[Life]] = {}
    several = len({life.attempt for life in run.lives}) > 1
    for life in run.lives:
        attempt = f"attempt {life.attempt}, " if several else ""
        by_us = ", by the supervisor" if life.outcome == "ended" else ""
        where = one_line((life.failure.stack if life.failure else "") or life.stack, 120)
        key = (attempt, f"{how_ended(life)}{by_us}", where)
        groups.setdefault(key, []).append(life)
    for (attempt, how, where), lives in list(groups.items())[:_MOST_GROUPS]:
        many = "s" if len(lives) > 1 else ""
        peak = max((life.peak_rss_bytes or 0 for life in lives), default=0)
        rest = [f"peak memory {size(peak)}"] if peak else []
        rest += [where] if where else []
        ranks = f"{attempt}rank{many} {ranks_text((life.rank for life in lives), 8)}"
        yield "; ".join([f"{ranks}: {how}", *rest])
    if len(groups) > _MOST_GROUPS:
        left = sum(len(lives) for lives in list(groups.values())[_MOST_GROUPS:])
        yield f"and {left:,} more"


def _events(run: Run) -> Iterator[str]:
    told, left_out = happenings(run)
    width = max((len(offset(each.at_s)) for each in told), default=0)
    for number, each in enumerate(told):
        if left_out and number == len(told) // 2:
            yield f"{'':>{width}}  {left_out:,} more"
        yield f"{offset(each.at_s):>{width}}  {each.text}"
