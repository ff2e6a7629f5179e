"""The result of a group, and the exception that reports it at the border."""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from asupervise.errors import SupervisorError

if TYPE_CHECKING:
    from asupervise.failures import ProcessFailure

__all__ = ["ChildFailedError", "RunProcsResult"]


@dataclass
class RunProcsResult:
    """How a group of workers on one node ended; every map is by local rank.

    Attributes:
        return_values: what each worker returned; None for a program.
        failures: the workers that did not end with exit status 0; empty after success.
        stdouts: the path of each worker's stdout file, where it was redirected.
        stderrs: the path of each worker's stderr file, where it was redirected.
        log_dir: the folder of this run's files, where it still exists.
        warnings: what went wrong beside the workers, a sentence each.

    Example:
        >>> RunProcsResult(return_values={0: None, 1: None}).is_failed()
        False
    """

    return_values: dict[int, Any] = field(default_factory=dict)
    failures: dict[int, ProcessFailure] = field(default_factory=dict)
    stdouts: dict[int, str] = field(default_factory=dict)
    stderrs: dict[int, str] = field(default_factory=dict)
    log_dir: str | None = field(default=None, kw_only=True)
    warnings: tuple[str, ...] = field(default=(), kw_only=True)

    def is_failed(self) -> bool:
        """Whether any worker failed."""
        return len(self.failures) > 0

    @property
    def root_cause(self) -> tuple[int, ProcessFailure] | None:
        """The local rank that failed first of its own accord; see `root_cause`."""
        if not self.failures:
            return None
        from asupervise.failures import root_cause  # most groups end well

        return root_cause(self.failures)

    @property
    def why(self) -> str:
        """Why the group has failed, in a line; "" if it has not.

        Example:
            >>> failure = ProcessFailure(1, 4711, 3, "<N/A>", record=None)
            >>> RunProcsResult(failures={1: failure}).why
            'rank 1 failed: exit code 3'
        """
        if not self.failures:
            return ""
        if (cause := self.root_cause) is None:
            return "it was ended, and no rank failed by itself"
        from asupervise.report import headline

        return headline(*cause)

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        from asupervise.views.notebook import result_html

        cause = self.root_cause
        culprit = cause[0] if cause else None
        return result_html(self.return_values, self.failures, culprit, self.log_dir, self.warnings)

    def raise_for_failure(
        self, name: str, *, global_ranks: Mapping[int, int] | None = None
    ) -> None:
        """Raise `ChildFailedError` where any worker failed, and do nothing otherwise.

        Args:
            name: of the program, for the report's title.
            global_ranks: the global rank of each local rank; left out, they are the same.
        """
        if self.failures:
            ranks = global_ranks or {}
            raise ChildFailedError(
                name,
                {ranks.get(local, local): failure for local, failure in self.failures.items()},
                log_dir=self.log_dir,
            )


def _hint(failure: ProcessFailure) -> str | None:
    from asupervise.report import hint_for

    return hint_for(failure) or None


class ChildFailedError(SupervisorError):
    """Workers failed. Its text is the report: who failed, who was ended, and the root cause.

    Raised out of a function under ``@record``, the error file of the first failure becomes that
    of this process, so that whoever supervises this process sees the worker's own error. What a
    function worker raised is its ``__cause__``.

    Args:
        name: of what was run, for the title.
        failures: by global rank; not empty.
        culprit: the global rank of the root cause, where that is known otherwise than from
            `failures`: the nodes of a run agree on it.
        log_dir: where the logs and the report lie, if they do; a traceback names it, and says
            what to do.

    Raises:
        AssertionError: there are no failures (torch's exception, too).

    Example:
        >>> failure = ProcessFailure(1, 4711, -11, "<N/A>", record=None)
        >>> error = ChildFailedError("train.py", {1: failure})
        >>> error.get_first_failure()[0], "(SIGSEGV)" in str(error)
        (1, True)
    """

    def __init__(
        self,
        name: str,
        failures: Mapping[int, ProcessFailure],
        *,
        culprit: int | None = None,
        log_dir: str | None = None,
    ) -> None:
        if not failures:
            raise AssertionError("ChildFailedError needs at least one failure")
        self.name = name
        self.failures = dict(failures)
        self.culprit = culprit
        self.log_dir = log_dir
        first = self.get_first_failure()[1]
        super().__init__(
            self.format_msg(), local_rank=first.local_rank, pid=first.pid, hint=_hint(first)
        )
        if log_dir:
            self.add_note(f"logs: {log_dir}")
        self.__cause__ = first.exception

    def __reduce__(self) -> tuple[Any, ...]:
        # Without calling `__init__`, whose arguments are not `args`: a subclass may have others.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, ranks={sorted(self.failures)})"

    def _repr_html_(self) -> str:
        from asupervise.views.notebook import error_html

        rank, failure = self.get_first_failure()
        return error_html(self.name, self.failures, None if failure.ended_by_us else rank)

    def get_first_failure(self) -> tuple[int, ProcessFailure]:
        """The root cause: global rank and failure.

        Where we ended all of them there is no root cause; then it is the first that ended.
        """
        from asupervise.failures import in_order, root_cause

        if self.culprit is not None:
            return self.culprit, self.failures[self.culprit]
        return root_cause(self.failures) or in_order(self.failures)[0]

    def format_msg(self, boarder_delim: str = "=", section_delim: str = "-") -> str:
        """The report.

        Args:
            boarder_delim: the character above and below (spelt as torch spells it).
            section_delim: the character between the sections.
        """
        from asupervise.report import format_report

        return format_report(
            self.name, self.failures, boarder_delim, section_delim, culprit=self.culprit
        )
