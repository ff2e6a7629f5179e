"""What the workers of a group run: how each is launched, and what comes back from it.

Two kinds exist: programs (here) and Python functions (`asupervise.functions`), which are only
imported where there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from asupervise.handler import Launch, exec_program

if TYPE_CHECKING:
    from asupervise.plan import GroupPlan
    from asupervise.spec import GroupSpec

__all__ = ["ProgramWork", "Work", "work_of"]


class Work(Protocol):
    """What `PContext` asks of the work of its group.

    Attributes:
        launch: starts one worker.
        returns_values: whether its workers return anything.
        helpers: pids of processes that it has started beside the workers.
    """

    @property
    def launch(self) -> Launch: ...

    @property
    def returns_values(self) -> bool: ...

    @property
    def helpers(self) -> frozenset[int]: ...

    def prepared(
        self,
        plan: GroupPlan,
        warnings: list[str],
        *,
        cgroup: str,
        on_lost: Callable[[str], None],
    ) -> AbstractAsyncContextManager[None]:
        """All that the workers need, for as long as they run."""

    def values(self, ranks: Iterable[int]) -> tuple[dict[int, Any], dict[int, str]]:
        """What the workers returned, and why it cannot be had from some; called in a thread."""

    def exception(self, rank: int) -> BaseException | str | None:
        """What the worker raised, as an object, where there is one; called in a thread.

        Text: why it cannot be had.
        """


class ProgramWork:
    """Programs: they need nothing, and return nothing."""

    launch = staticmethod(exec_program)
    returns_values = False
    helpers: frozenset[int] = frozenset()

    def prepared(
        self,
        plan: GroupPlan,
        warnings: list[str],
        *,
        cgroup: str,
        on_lost: Callable[[str], None],
    ) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def values(self, ranks: Iterable[int]) -> tuple[dict[int, Any], dict[int, str]]:
        return dict.fromkeys(ranks), {}

    def exception(self, rank: int) -> BaseException | str | None:
        return None


def work_of(spec: GroupSpec) -> Work:
    """The work of a group.

    Raises:
        NotPicklableError: a function or an argument cannot travel to a worker.
    """
    if spec.function is None:
        return ProgramWork()
    from asupervise.functions.work import FunctionWork

    return FunctionWork(spec.function, spec.args)
