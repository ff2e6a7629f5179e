"""The exceptions that `asupervise` raises of its own accord: a leaf module.

Every one of them derives from `SupervisorError`, and from the built-in type that torch raises in
the same place, so that an ``except RuntimeError`` of a ported program still catches it.
`ChildFailedError`, which says that a worker failed, stands in `asupervise.failures`, beside the
results that it reports.
"""

from __future__ import annotations

import signal
from typing import Any

__all__ = [
    "BindingError",
    "EngineError",
    "LeaseLostError",
    "NotPermittedError",
    "NotPicklableError",
    "NotSupportedError",
    "RankMapError",
    "SignalException",
    "SupervisorError",
    "ZygoteError",
]


class SupervisorError(Exception):
    """The base of our errors: a message, and whom and what it concerns.

    Args:
        message: what is wrong, with the name of the argument and its value.
        local_rank: the worker that it concerns, or None where it concerns none in particular.
        pid: that worker's process id, or None where it had none.
        hint: what the user can do about it; the command line, and a traceback, show it as
            ``hint: ...``.

    Pickles and copies keep all four.

    Example:
        >>> error = SupervisorError("cannot start ./train", local_rank=3, hint="chmod +x ./train")
        >>> error
        SupervisorError('cannot start ./train', local_rank=3, hint='chmod +x ./train')
        >>> print(error)
        cannot start ./train
    """

    def __init__(
        self,
        message: str,
        *,
        local_rank: int | None = None,
        pid: int | None = None,
        hint: str | None = None,
    ) -> None:
        # Exception pickles its positional arguments and then `__dict__`: only the message may be
        # positional, and the rest must be plain attributes.
        super().__init__(message)
        self.message = message
        self.local_rank = local_rank
        self.pid = pid
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        known = {"local_rank": self.local_rank, "pid": self.pid, "hint": self.hint}
        said = [repr(self.message), *(f"{k}={v!r}" for k, v in known.items() if v is not None)]
        return f"{type(self).__name__}({', '.join(said)})"


class RankMapError(SupervisorError, RuntimeError):
    """A map by local rank is empty or has gaps, or two maps are of different ranks.

    Example:
        >>> start_processes("job", "true", args={0: (), 2: ()}, envs={0: {}, 2: {}})
        Traceback (most recent call last):
        ...
        asupervise.errors.RankMapError: args: expected local ranks 0..1, got [0, 2]: missing [1]...
    """


class BindingError(SupervisorError, RuntimeError):
    """A worker cannot be bound to CPUs or memory as asked: no GPU, no tool, no permission.

    ``NumaOptions(should_fall_back_if_binding_fails=True)`` starts it unbound instead. Its `hint`
    names what to install, or what to ask for instead.
    """


class NotPermittedError(SupervisorError):
    """Workers were not started, because the node has lost its place in the run meanwhile."""


class NotPicklableError(SupervisorError, TypeError):
    """A function or an argument that cannot be pickled, and so cannot travel to a worker.

    The message names the local rank and the argument. Nothing has been started.
    """


class ZygoteError(SupervisorError, RuntimeError):
    """The zygote cannot fork workers: an import failed, it holds threads, or it has ended.

    The message has the traceback of the import, or names the import that left the thread behind.
    """


class NotSupportedError(SupervisorError, ValueError):
    """Something valid was asked for that is not there: logs specs, a platform, a feature.

    The message names what is there instead, where that is a list.
    """


class EngineError(SupervisorError):
    """What nodes agree through cannot be reached, or refuses us; says which and why."""


class LeaseLostError(EngineError):
    """Our lease has ended: our leased keys are gone, or will be in a moment."""


class SignalException(Exception):
    """The supervisor was asked to end by a signal.

    Kept for programs that port from torch, whose agent raises it from its signal handlers.

    Args:
        msg: what happened.
        sigval: the signal that arrived.

    Example:
        >>> SignalException("told to end", signal.SIGTERM).sigval.name
        'SIGTERM'
    """

    def __init__(self, msg: str, sigval: signal.Signals) -> None:
        super().__init__(msg)
        self.sigval = sigval

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call `SignalException(msg)`, without the signal.
        return type(self), (self.args[0], self.sigval), self.__dict__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.args[0]!r}, {self.sigval!r})"
