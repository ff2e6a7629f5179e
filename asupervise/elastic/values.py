"""The values of ``--rdzv-conf``: pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from asupervise.elastic.decide import Policy

__all__ = ["policy_of", "seconds_of"]

# Keys that are the policy's, with torch's names.
_POLICY_KEYS: Final = {"join_timeout": "join_timeout_s", "last_call_timeout": "last_call_s"}


def policy_of(conf: Mapping[str, str], **given: float) -> Policy:
    """The policy, with what ``--rdzv-conf`` says of it.

    Args:
        conf: the pairs.
        given: fields of `Policy` that come from elsewhere.

    Raises:
        ValueError: for what is no number of seconds.
    """
    values: dict[str, Any] = dict(given)
    for key, name in _POLICY_KEYS.items():
        if key in conf:
            values[name] = seconds_of(conf, key)
    return Policy(**values)


def seconds_of(conf: Mapping[str, str], key: str, default: float = 0.0) -> float:
    """A pair's value as seconds.

    Raises:
        ValueError: naming the pair.

    Example:
        >>> seconds_of({"lease_ttl": "5"}, "lease_ttl", 10.0), seconds_of({}, "timeout", 10.0)
        (5.0, 10.0)
    """
    try:
        value = float(conf.get(key, default))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"--rdzv-conf {key}={conf[key]}: expected a number of seconds, 0 or more")
    return value
