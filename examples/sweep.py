"""A parameter sweep over a Python function, on one zygote that is kept for all of it.

Each trial is a group of one worker that runs `train` with its own parameters. The zygote has
imported what the trials need, so that a trial starts in milliseconds; at most `AT_ONCE` run at a
time; a trial that fails says why, and the others go on::

    python examples/sweep.py
"""

import asyncio
import itertools
import random
import time
from dataclasses import dataclass

import asupervise

AT_ONCE = 4
STEPS = 4_000


@dataclass(frozen=True)
class Trial:
    """One set of parameters."""

    learning_rate: float
    momentum: float


@dataclass(frozen=True)
class Fit:
    """What a trial came to: the slope and intercept that it found, and how far off they are."""

    slope: float
    intercept: float
    loss: float


def train(trial: Trial) -> Fit:
    """Fit a line to noisy points by gradient descent. Runs in a worker of its own."""
    rng = random.Random(20)
    points = [(x, 3 * x - 1 + rng.gauss(0, 0.1)) for x in (rng.random() for _ in range(200))]
    slope = intercept = slope_step = intercept_step = 0.0
    for _ in range(STEPS):
        x, y = rng.choice(points)
        error = slope * x + intercept - y
        slope_step = trial.momentum * slope_step - trial.learning_rate * error * x
        intercept_step = trial.momentum * intercept_step - trial.learning_rate * error
        slope, intercept = slope + slope_step, intercept + intercept_step
        if abs(error) > 1e6:
            raise ArithmeticError(f"diverged with a learning rate of {trial.learning_rate}")
    loss = sum((slope * x + intercept - y) ** 2 for x, y in points) / len(points)
    return Fit(slope, intercept, loss)


async def run(
    trial: Trial, zygote: asupervise.Zygote, places: asyncio.Semaphore
) -> Fit | BaseException:
    """The fit, or the exception that the worker raised."""
    async with (
        places,
        asupervise.start_processes(
            "trial", train, {0: (trial,)}, {0: {}}, start_method=zygote
        ) as ctx,
    ):
        result = await ctx.wait()
    if result.root_cause is None:
        fit: Fit = result.return_values[0]
        return fit
    failure = result.root_cause[1]
    return failure.exception or RuntimeError(str(failure.message))


async def main() -> None:
    trials = [
        Trial(learning_rate, momentum)
        for learning_rate, momentum in itertools.product((0.01, 0.1, 0.5, 3.0), (0.0, 0.5, 0.9))
    ]
    started = time.monotonic()
    places = asyncio.Semaphore(AT_ONCE)
    async with asupervise.Zygote(preload=["random", "dataclasses"]) as zygote:
        outcomes = await asyncio.gather(*(run(trial, zygote, places) for trial in trials))
    fits = {}
    for trial, outcome in zip(trials, outcomes, strict=True):
        if isinstance(outcome, Fit):
            fits[trial] = outcome
            print(f"{trial}: loss {outcome.loss:.4f}")
        else:
            print(f"{trial}: {type(outcome).__name__}: {outcome}")
    best = min(fits, key=lambda trial: fits[trial].loss)
    print(f"best of {len(trials)} in {time.monotonic() - started:.1f} s: {best} -> {fits[best]}")


if __name__ == "__main__":
    asyncio.run(main())
