"""A set of numbers as text, as the kernel and people write it."""

from __future__ import annotations

from collections.abc import Iterable


def format_ranges(numbers: Iterable[int]) -> str:
    """A list with ranges in it, as ``taskset`` and ``numactl`` take it.

    Raises:
        ValueError: a number is negative.

    Example:
        >>> format_ranges({4, 2, 1, 0})
        '0-2,4'
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if number < 0:
            raise ValueError(f"the number of a CPU, node or rank cannot be negative: {number}")
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
