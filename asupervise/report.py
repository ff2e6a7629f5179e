"""The report of a failed group as text: pure."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping
from typing import Any, Final

from asupervise.error_files import join_notes
from asupervise.failures import NOT_AVAILABLE, ProcessFailure, exit_status, in_order
from asupervise.hints import hint_of
from asupervise.ranges import format_ranges

_MAX_WIDTH = 60
_MAX_OTHERS = 16
_ROOT_TEXT_CHARS = 16_384
_OTHER_TEXT_CHARS = 4_096
_TAIL_CHARS = 4_096
# How a traceback of Python ends, and its words about a crash.
_ALL_ENDED: Final = "  No rank failed by itself: the supervisor ended them all."
_TERMINAL_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def format_report(
    name: str,
    failures: Mapping[int, ProcessFailure],
    border_delim: str,
    section_delim: str,
    *,
    culprit: int | None = None,
    culprit_first: bool = False,
) -> str:
    """The text of `ChildFailedError`: title, failures, and the root cause.

    Args:
        name: of what was run.
        failures: by global rank; not empty.
        border_delim: the character above and below.
        section_delim: the character between the sections.
        culprit: the rank of the root cause, where it is not the first of `failures`.
        culprit_first: whether the root cause stands before the others, as people want it, and
            not behind them, as torch has it.
    """
    title = f"{_printable(name)} FAILED"
    others, root = _sections(failures, culprit)
    width = max(len(line) for part in (title, others, root) for line in part.split("\n"))
    width = min(width, _MAX_WIDTH)
    border, section = border_delim * width, section_delim * width
    parts = [f"Failures:\n{others}", f"Root Cause (first observed failure):\n{root}"]
    one, other = reversed(parts) if culprit_first else parts
    return f"\n{border}\n{title}\n{section}\n{one}\n{section}\n{other}\n{border}"


def headline(rank: int, failure: ProcessFailure) -> str:
    """What a rank has failed of, in a line.

    Example:
        >>> headline(3, ProcessFailure(1, 4711, -11, "<N/A>", record=None))
        'rank 3 failed: SIGSEGV'
    """
    where = f" on {failure.host}" if failure.host else ""
    return f"rank {rank}{_printable(where)} failed: {failure.why}"


def _message(failure: ProcessFailure) -> str:
    message = failure.message
    text = message if isinstance(message, str) else message.get("message")
    return text if isinstance(text, str) else ""


def hint_for(failure: ProcessFailure, **known: Any) -> str:
    """What to do about it, in a sentence; "" if nothing is known that would help.

    Args:
        failure: of the rank that failed first.
        known: what else `hint_of` takes.
    """
    return hint_of(failure.exitcode, stack=failure.stack, **_known(failure), **known)


def _known(failure: ProcessFailure) -> dict[str, Any]:
    name = failure.signal_name()
    return {
        "cause": failure.cause,
        "signal": name if name != NOT_AVAILABLE else "",
        "message": _message(failure),
        "stderr_tail": failure.stderr_tail,
    }


def _sections(failures: Mapping[int, ProcessFailure], culprit: int | None) -> tuple[str, str]:
    own = in_order({r: f for r, f in failures.items() if not f.ended_by_us})
    own.sort(key=lambda item: item[0] != culprit)  # stable: it alone comes to the front
    ended = {r: f for r, f in failures.items() if f.ended_by_us}
    blocks = [
        _block(index, rank, failure, _OTHER_TEXT_CHARS)
        for index, (rank, failure) in enumerate(own[1 : _MAX_OTHERS + 1], 1)
    ]
    rest = dict(own[_MAX_OTHERS + 1 :])
    if rest:
        blocks.append(f"Failed later: {_grouped(rest)}")
    others = blocks or ["  <NO_OTHER_FAILURES>"]
    if ended:
        others.append(f"Ended by the supervisor: {_grouped(ended)}")
    if stacks := _stack_groups(failures):
        others.append(f"Where they were before they were ended:\n{stacks}")
    root = _block(0, *own[0], _ROOT_TEXT_CHARS, with_stderr=True) if own else _ALL_ENDED
    return "\n".join(others), root


def _block(
    index: int, rank: int, failure: ProcessFailure, limit: int, *, with_stderr: bool = False
) -> str:
    fields = _fields(rank, failure, limit)
    if with_stderr and not failure.traceback and failure.stderr_tail:
        tail = _printable(failure.stderr_tail).rstrip("\n")
        fields.append(("stderr", "last lines:\n" + _cut_head(tail, _TAIL_CHARS)))
    lines = [f"  {label:<10}: {_indented(text)}" for label, text in fields]
    return "\n".join([f"[{index}]:", *lines])


def _fields(rank: int, failure: ProcessFailure, limit: int) -> list[tuple[str, str]]:
    name = failure.signal_name()
    signal_text = f" ({name})" if name != NOT_AVAILABLE else ""
    record_note = failure.record.note if failure.record is not None else ""
    text = failure.traceback or (failure.message if isinstance(failure.message, str) else "")
    fields = [
        ("time", failure.timestamp_isoformat()),
        # Not getfqdn(): DNS can hold it up for seconds.
        ("host", _printable(failure.host) or os.uname().nodename),
        ("rank", f"{rank} (local_rank: {failure.local_rank})"),
        ("exitcode", f"{failure.exitcode} (pid: {failure.pid}){signal_text}"),
        ("cause", _printable(failure.cause) if failure.cause != text else ""),
        ("memory", _memory_text(failure)),
        ("stack", _printable(failure.stack)),
        ("error_file", _printable(failure.error_file)),
        ("note", _printable(join_notes(failure.note, record_note))),
        ("traceback", _cut_middle(_printable(text).rstrip("\n"), limit) or NOT_AVAILABLE),
    ]
    return [(label, text) for label, text in fields if text]


def _memory_text(failure: ProcessFailure) -> str:
    """For a death by SIGKILL alone: otherwise memory is beside the point."""
    known = (("peak", failure.peak_rss_bytes), ("last seen", failure.last_rss_bytes))
    if exit_status(failure.exitcode) != 128 + signal.SIGKILL:
        return ""
    return ", ".join(f"{label} {size / (1 << 20):.1f} MiB" for label, size in known if size)


def _stack_groups(failures: Mapping[int, ProcessFailure]) -> str:
    """``ranks 0-6: in wait (job.py:3)`` for each different stack, the largest group first."""
    groups: dict[str, list[int]] = {}
    for rank, failure in sorted(failures.items()):
        if failure.stack:
            groups.setdefault(failure.stack, []).append(rank)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[1]))
    return "\n".join(f"  {_ranks_text(ranks)}: {_printable(stack)}" for stack, ranks in ordered)


def _grouped(failures: Mapping[int, ProcessFailure]) -> str:
    """``ranks 0, 2-7 (SIGTERM); rank 9 (exit code 1)``."""
    groups: dict[str, list[int]] = {}
    for rank, failure in sorted(failures.items()):
        code = failure.exitcode
        how = failure.signal_name() if code < 0 else f"exit code {code}"
        groups.setdefault(f"signal {-code}" if how == NOT_AVAILABLE else how, []).append(rank)
    return "; ".join(f"{_ranks_text(ranks)} ({how})" for how, ranks in groups.items())


def _ranks_text(ranks: list[int]) -> str:
    text = format_ranges(ranks).replace(",", ", ")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}"


def _printable(text: str) -> str:
    """The text as any terminal or UTF-8 file takes it: no control sequences, no surrogates."""
    text = _TERMINAL_SEQUENCE.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _indented(text: str) -> str:
    return text.replace("\n", "\n  ")


def _cut_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... ({len(text) - 2 * half} characters left out) ...\n{text[-half:]}"


def _cut_head(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"... {text[-limit:]}"
