"""Candidates measured in turn: rounds, medians, quartiles, and ratios pair by pair.

On a shared machine absolute figures move by a third from minute to minute. What is compared here
was therefore measured within one round, a moment apart, and it is the ratios of the rounds whose
median is taken.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

SUBJECT: Final = "asupervise"

# After each run, so that what ends just behind it (a guardian, the kernel's freeing of memory)
# is not charged to the next.
_PAUSE_S: Final = 0.03
# A candidate that has failed so often without a success between is not asked again in its case:
# what hangs once hangs again, and each time costs its whole time limit.
_GIVE_UP_AFTER: Final = 3
# What a case does at least, however long it takes.
_FEWEST_ROUNDS: Final = 3

Sample = Mapping[str, float]


class MeasureError(Exception):
    """A candidate gave no figure: it failed, hung, or did not do what it was asked to."""


@dataclass(frozen=True)
class Metric:
    """What a sample holds under `name`."""

    name: str
    unit: str
    digits: int = 2


@dataclass(frozen=True)
class Candidate:
    """Somebody who does the work that is measured.

    Attributes:
        name: in tables; that of ours is `SUBJECT`.
        run: does the work once and returns a figure for each metric.
        rounds: how many rounds it takes part in at the most, for the slow ones. A candidate that
            has such a limit takes part in one warm-up at the most.
        cold: whether it takes part in none: a command that takes seconds is not worth warming.
        give_up_after: so many failures in a row, and it is not asked again.
    """

    name: str
    run: Callable[[], Sample]
    rounds: int | None = None
    cold: bool = False
    give_up_after: int = _GIVE_UP_AFTER


@dataclass(frozen=True)
class Goal:
    """What is wanted of `SUBJECT`.

    Attributes:
        metric: the name of a metric.
        sign: whether the figure may be at most or at least `bound`.
        bound: of the figure itself, or of a ratio.
        against: the candidate by whose figure ours is divided; None for no ratio.
        inverse: divide that candidate's figure by ours ("so many times faster").
        statistic: of the rounds.
    """

    metric: str
    sign: Literal["<=", ">="]
    bound: float
    against: str | None = None
    inverse: bool = False
    statistic: Literal["median", "p90"] = "median"

    def text(self, unit: str) -> str:
        """As a goal is written; `unit` is the metric's."""
        if self.against is None:
            what = f"{self.bound:g} {unit}".rstrip()
        elif self.inverse:
            what = f"{self.bound:g} x faster than {self.against}"
        else:
            what = f"{self.bound:g} x {self.against}"
        decile = ", in nine of ten rounds" if self.statistic == "p90" else ""
        return f"{self.metric} {self.sign} {what}{decile}"


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: what sets it apart from the topic's other cases.
        group: what it has in common with some of them, which differ in their `size` only: they
            make one table, and one plot.
        size: for instance the number of workers.
        metrics: what is measured.
        candidates: who is measured, in this order and then in rotation.
        limit: the candidate that does the least that could be done: the others are divided by it.
        goals: what is wanted; those against a candidate that is not here are left out.
        rounds: how often each is measured.
        warmups: rounds before, not counted.
        budget_s: no further round is begun after so many seconds, once a few are done: the whole
            must come to an end on a slow machine as well.
        check: run once at the end, untimed; returns what it found to be right.
    """

    name: str
    metrics: Sequence[Metric]
    candidates: Sequence[Candidate]
    limit: str | None
    goals: Sequence[Goal] = ()
    group: str = ""
    size: float | None = None
    rounds: int = 5
    warmups: int = 1
    budget_s: float = 30.0
    check: Callable[[], str] | None = None


@dataclass(frozen=True)
class Summary:
    """The middle of some figures, and how far they spread."""

    count: int
    median: float
    low_quartile: float
    high_quartile: float
    ninth_decile: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Summary | None:
        if not figures:
            return None
        return cls(
            len(figures),
            statistics.median(figures),
            quantile(figures, 0.25),
            quantile(figures, 0.75),
            quantile(figures, 0.9),
        )


@dataclass
class Outcome:
    """What came out of a case.

    Attributes:
        case: which one.
        samples: by candidate, one for each round; None where it gave none.
        errors: by candidate, why.
        failed_in_a_row: by candidate, how often since it last gave a figure.
        check: what the check found, if there was one.
        check_failed: whether that was wrong.
    """

    case: Case
    samples: dict[str, list[Sample | None]] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=dict)
    failed_in_a_row: dict[str, int] = field(default_factory=dict)
    check: str = ""
    check_failed: bool = False

    def figures(self, candidate: str, metric: str) -> list[float]:
        return [s[metric] for s in self.samples.get(candidate, ()) if s is not None and metric in s]

    def ratios(self, candidate: str, to: str, metric: str) -> list[float]:
        """`candidate` divided by `to`, round by round."""
        pairs = zip(self.samples.get(candidate, ()), self.samples.get(to, ()), strict=False)
        return [
            a[metric] / b[metric]
            for a, b in pairs
            if a is not None and b is not None and metric in a and b.get(metric)
        ]

    def judged(self, goal: Goal) -> Verdict | None:
        """Whether `goal` is met; None where what it needs was not measured."""
        if goal.against is None:
            figures = self.figures(SUBJECT, goal.metric)
        elif goal.inverse:
            figures = self.ratios(goal.against, SUBJECT, goal.metric)
        else:
            figures = self.ratios(SUBJECT, goal.against, goal.metric)
        if not figures:
            return None
        value = statistics.median(figures) if goal.statistic == "median" else quantile(figures, 0.9)
        met = value <= goal.bound if goal.sign == "<=" else value >= goal.bound
        return Verdict(goal, value, met)


@dataclass(frozen=True)
class Verdict:
    """A goal and the figure that it was held against."""

    goal: Goal
    value: float
    met: bool


def measure(
    case: Case, say: Callable[[str], None] = lambda _: None, deadline_s: float = math.inf
) -> Outcome:
    """Measure the candidates of `case` in turn.

    Each round begins with another candidate, so that none always follows the same one.

    Args:
        case: whom, and how often.
        say: told what is being done, a short line each.
        deadline_s: by time.monotonic(), after which there is a single round.
    """
    outcome = Outcome(case, {c.name: [] for c in case.candidates})
    for warmup in range(case.warmups):
        for candidate in case.candidates:
            if not candidate.cold and (candidate.rounds is None or warmup == 0):
                say(f"{case.name}: warm-up {warmup + 1}: {candidate.name}")
                _run(candidate, outcome)
    start_s = time.monotonic()
    for round_ in range(case.rounds):
        if round_ >= _FEWEST_ROUNDS and time.monotonic() - start_s > case.budget_s:
            break
        if round_ > 0 and time.monotonic() > deadline_s:
            break
        for candidate in _rotated(case.candidates, round_):
            if _takes_part(candidate, round_, outcome):
                say(f"{case.name}: round {round_ + 1} of {case.rounds}: {candidate.name}")
                outcome.samples[candidate.name].append(_run(candidate, outcome))
    if case.check is not None:
        say(f"{case.name}: check")
        try:
            outcome.check = case.check()
        except MeasureError as error:
            outcome.check, outcome.check_failed = str(error), True
    return outcome


def _takes_part(candidate: Candidate, round_: int, outcome: Outcome) -> bool:
    if candidate.rounds is not None and round_ >= candidate.rounds:
        return False
    return outcome.failed_in_a_row.get(candidate.name, 0) < candidate.give_up_after


def _run(candidate: Candidate, outcome: Outcome) -> Sample | None:
    in_a_row = outcome.failed_in_a_row
    try:
        sample = candidate.run()
        in_a_row[candidate.name] = 0
        return sample
    except (MeasureError, OSError, ValueError) as error:
        # What a candidate did not do may show itself as a process or a file that is not there.
        in_a_row[candidate.name] = in_a_row.get(candidate.name, 0) + 1
        said = str(error) if isinstance(error, MeasureError) else repr(error)
        outcome.errors.setdefault(candidate.name, []).append(said)
        return None
    finally:
        time.sleep(_PAUSE_S)


def _rotated(candidates: Sequence[Candidate], by: int) -> list[Candidate]:
    by %= len(candidates)
    return [*candidates[by:], *candidates[:by]]


def quantile(figures: Sequence[float], share: float) -> float:
    """The figure below which `share` of them lie, interpolated."""
    ordered = sorted(figures)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
