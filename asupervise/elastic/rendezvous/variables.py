"""Numbers and texts in the variables that schedulers and users set: pure.

What is no number, or contradicts another variable, is an error that names both.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Final, NamedTuple

from asupervise.errors import SupervisorError

__all__ = [
    "COUNTS",
    "RANKS",
    "Environ",
    "Number",
    "SchedulerError",
    "Text",
    "agreed",
    "check_same",
    "job_named",
    "needed",
    "number_in",
    "text_in",
]

Environ = Mapping[str, str]

# A node's place, and how many there are, where users say it.
RANKS: Final = ("PET_NODE_RANK", "NODE_RANK", "GROUP_RANK")
COUNTS: Final = ("PET_NNODES", "NNODES", "GROUP_WORLD_SIZE")


class SchedulerError(SupervisorError, ValueError):
    """What the scheduler's variables say cannot be, or is not enough: names variable and value."""


class Number(NamedTuple):
    """A variable that holds a number."""

    name: str
    value: int

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


class Text(NamedTuple):
    """A text, and the variable that it comes from."""

    name: str
    value: str


def text_in(environ: Environ, *names: str) -> Text | None:
    """The first of these variables that is set to something."""
    for name in names:
        if value := environ.get(name, "").strip():
            return Text(name, value)
    return None


def number_in(environ: Environ, name: str) -> Number | None:
    text = text_in(environ, name)
    if text is None:
        return None
    # torch writes a fixed number of nodes as 2:2 too.
    low, _, high = text.value.partition(":") if name in COUNTS else (text.value, "", "")
    if not low.isascii() or not low.isdecimal() or high not in ("", low):
        raise SchedulerError(f"{name}={text.value!r}: expected a number, 0 or more")
    return Number(name, int(low))


def needed(environ: Environ, name: str, beside: str) -> Number:
    number = number_in(environ, name)
    if number is None:
        raise SchedulerError(f"{beside} is set, and {name} is not: expected both of them")
    return number


def agreed(environ: Environ, names: tuple[str, ...]) -> Number | None:
    """The number that these variables hold, of which one is enough."""
    numbers = [number for name in names if (number := number_in(environ, name)) is not None]
    for other in numbers[1:]:
        check_same(numbers[0], other)
    return numbers[0] if numbers else None


def check_same(one: Number, other: Number) -> None:
    if one.value != other.value:
        raise SchedulerError(
            f"{one} and {other} contradict each other",
            hint="unset the wrong one (a batch script's SLURM_NODEID is 0, whichever node a step "
            "of it runs on), or say who is right: --rdzv-conf scheduler=slurm, openmpi, pmix, "
            "kubernetes or variables",
        )


def job_named(text: Text | None) -> Number | None:
    return None if text is None else Number(text.name, zlib.crc32(text.value.encode()))
