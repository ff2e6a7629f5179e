"""The head of the report: what ran, how it ended, and who was the culprit. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from asupervise.hints import hint_of, what_failed
from asupervise.views.lives import Life
from asupervise.views.markup import Child, Html, log_html, tag
from asupervise.views.plain import cut_middle, one_line, overwritten, ranks_text
from asupervise.views.story import Attempt, Run
from asupervise.views.words import count, duration, how_ended, moment, size

__all__ = ["STATES", "culprit_of", "head", "headline", "took", "verdict"]

STATES: Final = {
    "succeeded": "Succeeded",
    "failed": "Failed",
    "ended": "Ended",
    "running": "Running",
    "unknown": "No end known",
}
_TEXT_CHARS: Final = 16_384
_SHOWN_OTHERS: Final = 16
# What stands in the place of an exception that was not recorded (`failures`).


def head(run: Run) -> Html:
    """What ran and how it ended."""
    return tag(
        "header",
        tag("p", tag("span", STATES[run.state], class_=f"state {run.state}"), class_="pill"),
        tag("h1", one_line(run.title) or "A run"),
        tag("p", verdict(run), class_="verdict"),
        tag("dl", *_facts(run), class_="facts"),
        [tag("p", note, class_="note") for note in run.notes],
    )


def verdict(run: Run) -> str:
    """How it ended, in a sentence.

    Example:
        >>> verdict(Run("succeeded", duration_s=2.0, nprocs=4))
        'All 4 workers succeeded.'
    """
    restarts = len(run.attempts) - 1
    if run.state == "succeeded":
        again = f", after {count(restarts, 'restart')}" if restarts > 0 else ""
        all_of = f"All {run.nprocs:,} workers" if run.nprocs > 1 else "The worker"
        return f"{all_of} succeeded{again}."
    if run.state == "running":
        return f"It was still running at {moment(run.read_at)}."
    if run.state == "unknown":
        return (
            "Its end is written down nowhere: its supervisor was killed, or its folder was copied "
            "while it ran."
        )
    return _failed(run)


def _failed(run: Run) -> str:
    life = run.culprit
    if life is None:
        if run.root_cause is not None:
            why = run.why if run.why != f"rank {run.root_cause} failed" else ""
            return f"Rank {run.root_cause}, on another node, failed first. {_sentence(why)}".strip()
        nobody = ""
        if any(each.outcome == "ended" for each in run.lives):
            nobody = "No rank failed by itself: those that ran were ended."
        return " ".join(filter(None, (_sentence(run.why), nobody)))
    ended = sum(each.outcome == "ended" and each.attempt == life.attempt for each in run.lives)
    rest = f"; {count(ended, 'other')} {'was' if ended == 1 else 'were'} ended" if ended else ""
    return f"Rank {life.rank} failed first: {how_ended(life)}{_ran(life)}{rest}."


def _sentence(text: str) -> str:
    text = one_line(text)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _ran(life: Life) -> str:
    if life.start_s is None or life.end_s is None:
        return ""
    return f" after {duration(life.end_s - life.start_s)}"


def took(run: Run) -> str:
    """What the length of a run is called."""
    names = {"running": "has run for", "unknown": "known of for"}
    return names.get(run.state, "took")


def _facts(run: Run) -> Iterable[Html]:
    peaks = [(life.peak_rss_bytes, life.rank) for life in run.lives if life.peak_rss_bytes]
    attempts = max(len(run.attempts), len({life.attempt for life in run.lives}))
    facts: list[tuple[str, Child]] = [
        ("began", moment(run.began_at) if run.began_at else ""),
        (took(run), duration(run.duration_s) if run.duration_s is not None else ""),
        ("workers", f"{run.nprocs:,}"),
        ("attempts", f"{attempts:,}" if attempts > 1 else ""),
        ("host", one_line(run.node)),
        ("folder", one_line(run.cwd, 400)),
        ("exit status", "" if run.exit_status is None else str(run.exit_status)),
        ("most memory", f"{size(max(peaks)[0])} (rank {max(peaks)[1]})" if peaks else ""),
        ("run id", one_line(run.run_id) if run.run_id != "none" else ""),
    ]  # fmt: skip
    return (tag("div", tag("dt", name), tag("dd", value)) for name, value in facts if value)


# --- the culprit --------------------------------------------------------------------------------


def culprit_of(run: Run, stack: str = "", tail: str = "") -> Html | None:
    """Who failed first and why, and who failed beside.

    Args:
        run: the run.
        stack: all that is known of where the culprit was.
        tail: the last lines of its standard error.
    """
    if run.state == "succeeded":
        return _former(run)
    life = run.culprit
    others = _others(run)
    if life is None and others is None:
        return None
    return tag(
        "section",
        _culprit(life, stack, tail) if life is not None else None,
        others,
        _former(run),
        id="culprit",
        class_="culprit",
    )


def _culprit(life: Life, stack: str, tail: str) -> Html:
    failure = life.failure
    tail = tail or (failure.stderr_tail if failure else "")
    traceback = failure.traceback if failure else ""
    return tag(
        "div",
        tag("h2", f"Rank {life.rank}", tag("small", _where(life))),
        tag("p", headline(life, tail), class_="headline"),
        _hint(life, tail),
        tag("dl", *_culprit_facts(life, tail), class_="facts"),
        _text("Traceback", traceback),
        _text("Where it was", stack or (failure.stack if failure else "")),
        None if traceback else _text("Last lines of stderr", tail),
    )


def headline(life: Life, tail: str = "") -> str:
    """What a worker failed of, in a line.

    Args:
        life: that start of it.
        tail: the last lines of its standard error.
    """
    failure = life.failure
    if failure is None:
        said = what_failed(life.exitcode, stderr_tail=tail)
    else:
        said = what_failed(
            life.exitcode,
            cause=failure.cause,
            signal=failure.signal,
            message=failure.message,
            traceback=failure.traceback,
            stderr_tail=tail or failure.stderr_tail,
        )
    return one_line(said, 400) or how_ended(life)


def _where(life: Life) -> str:
    attempt = f"attempt {life.attempt}, " if life.attempt else ""
    local = f"local rank {life.local_rank}, " if life.local_rank != life.rank else ""
    return f"{attempt}{local}pid {life.pid}" if life.pid else f"{attempt}{local}".rstrip(", ")


def _hint(life: Life, tail: str) -> Html | None:
    failure = life.failure
    if failure is None:
        return None
    hint = hint_of(
        life.exitcode,
        cause=failure.cause,
        signal=failure.signal,
        message=failure.message,
        stderr_tail=tail,
        stderr_in_file=bool(life.stderr),
        stack=failure.stack,
    )
    return tag("p", tag("strong", "What to do "), hint, class_="hint") if hint else None


def _culprit_facts(life: Life, tail: str) -> Iterable[Html]:
    failure = life.failure
    cause = one_line(failure.cause, 400) if failure else ""
    facts = [
        ("ended", how_ended(life)),
        ("cause", cause if cause != headline(life, tail) else ""),
        ("after", _ran(life).removeprefix(" after ")),
        ("peak memory", size(life.peak_rss_bytes) if life.peak_rss_bytes else ""),
        ("progress", _progress(life)),
        ("bound to", one_line(life.binding)),
    ]
    return (tag("div", tag("dt", name), tag("dd", value)) for name, value in facts if value)


def _progress(life: Life) -> str:
    if life.progress is None:
        return ""
    done, total = life.progress
    return f"{done:,.6g}" + (f" of {total:,.6g}" if total is not None else "")


def _text(title: str, text: str) -> Html | None:
    text = cut_middle(text.strip("\n"), _TEXT_CHARS)
    if not text.strip():
        return None
    lines = "\n".join(map(overwritten, text.split("\n")))
    return tag("figure", tag("figcaption", title), tag("pre", log_html(lines), tabindex=0))


def _others(run: Run) -> Html | None:
    """Who failed beside the culprit by itself, in the last attempt."""
    culprit = run.culprit
    last = culprit.attempt if culprit else max((life.attempt for life in run.lives), default=0)
    own = [each for each in run.lives if each.outcome == "failed" and each.attempt == last]
    own = [each for each in own if each != culprit]
    if not own:
        return None
    rest = own[_SHOWN_OTHERS:]
    more = tag("p", f"and ranks {ranks_text(life.rank for life in rest)}") if rest else None
    return tag("div", tag("h3", "Failed as well"), map(_other, own[:_SHOWN_OTHERS]), more)


def _other(life: Life) -> Html:
    failure = life.failure
    what = one_line(failure.cause or failure.message) if failure else ""
    text = (failure.traceback or failure.stderr_tail) if failure else ""
    title = (tag("b", f"Rank {life.rank}"), f" {how_ended(life)}", tag("span", what, class_="what"))
    if not text.strip():
        return tag("p", title, class_="other")
    return tag("details", tag("summary", title), _text("", text))


def _former(run: Run) -> Html | None:
    """What ended the attempts before."""
    former = [attempt for attempt in run.attempts if attempt.succeeded is False]
    if run.state in ("failed", "ended"):
        former = former[:-1]
    if not former:
        return None
    shown = [_former_attempt(attempt) for attempt in former[-_SHOWN_OTHERS:]]
    if run.state == "succeeded":
        return tag("section", tag("h2", "Earlier failures"), shown, id="culprit")
    return tag("div", tag("h3", "Earlier failures"), shown)


def _former_attempt(attempt: Attempt) -> Html:
    if attempt.culprit is None:
        return tag("p", f"Attempt {attempt.number}: ended, and no rank failed by itself")
    return tag(
        "div", tag("span", f"Attempt {attempt.number}", class_="tag"), _other(attempt.culprit),
        class_="former",
    )  # fmt: skip
