"""What a failure was, in a line, and what to do about it: a pure leaf, for whoever shows one."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["hint_of", "is_hang", "is_oom", "what_failed"]

_CRASHES: Final = {
    "SIGSEGV": "native code touched memory that it must not",
    "SIGBUS": "memory was not there: often a full /dev/shm, or a mapped file that was cut short",
    "SIGILL": "native code was built for another CPU than this one",
    "SIGFPE": "native code divided by zero",
    "SIGABRT": "native code gave up: what it said stands in its standard error",
}
_SOME_PYTHON: Final = "the Python that runs"
# By what stands in the message, the traceback's last line or the last lines of standard error.
_KNOWN: Final = (
    (r"No module named '?([\w.]+)", "{0} is not installed in the Python that runs the workers."),
    (r"CUDA out of memory|OutOfMemoryError",
     "A GPU's memory is used up: a smaller batch, or fewer workers for each GPU. Look with "
     "nvidia-smi whether somebody else uses it, too."),
    (r"\bMemoryError\b|Cannot allocate memory",
     "The machine gave no more memory: fewer workers on it, or less data in each."),
    (r"Address already in use|EADDRINUSE",
     "A port is taken, mostly by an earlier run: leave --master-port out, and a free one is "
     "chosen and held."),
    (r"No space left on device",
     "A disk is full: df -h, and df -i for inodes; --log-dir puts the logs elsewhere."),
    (r"Too many open files",
     "Raise the limit of open files: ulimit -n."),
    (r"NCCL (error|WARN|failure)|ncclUnhandledCudaError|ncclSystemError|ncclRemoteError",
     "NCCL says more with NCCL_DEBUG=INFO. If another rank failed first, that one is the cause."),
    (r"Connection (?:refused|reset by peer|timed out)|BrokenPipeError|\bTimeoutError\b|timeout: "
     r"timed out",
     "The other end was gone or unreachable: look whether another rank, or another machine, "
     "failed first."),
    (r"PermissionError|Permission denied",
     "The workers run as another user, or in another place, than the file expects."),
    (r"FileNotFoundError: .*'[^/'\n][^'\n]{0,200}'",
     "Workers start in the folder that the run was started in; relative paths begin there."),
)  # fmt: skip
# What stands before the last exception of a chain (CPython's traceback module).
_CHAINED: Final = re.compile(
    r"\n(?:The above exception was the direct cause|During handling of the above exception)[^\n]*"
)
_KNOWN_COMPILED: list[tuple[re.Pattern[str], str]] = []
_NO_RECORD: Final = "No traceback was recorded"


_LAST_WORDS: Final = re.compile(
    r"[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt)(?::|$)|Fatal Python error"
)
_TRACEBACK: Final = "Traceback (most recent call last):\n"


def is_oom(cause: str) -> bool:
    """Whether a cause of `memory.explain_sigkill` says that it was the OOM killer."""
    return cause.startswith("the kernel's OOM killer")


def is_hang(cause: str) -> bool:
    """Whether it is one of `hang`'s."""
    return cause.startswith("hang:")


def what_failed(
    exitcode: int | None,
    *,
    cause: str = "",
    signal: str = "",
    message: str = "",
    traceback: str = "",
    stderr_tail: str = "",
) -> str:
    """What a worker failed of: the first thing known of the recorded exception, the cause, its last
    words and its exit code. Of several lines, if the exception has several.

    The arguments are those of `hint_of`, and the recorded traceback or message.

    Example:
        >>> what_failed(1, message="No traceback was recorded.", stderr_tail="...\\nKeyError: 'lr'")
        "KeyError: 'lr'"
    """
    how = signal or (f"exit code {exitcode}" if exitcode is not None else "no exit code is known")
    if traceback and message:
        # Of another node's worker the traceback may be all that has come.
        return _last_words(message) if message.startswith(_TRACEBACK) else message
    return cause or _last_words(stderr_tail) or how


def _last_words(stderr_tail: str) -> str:
    """What Python has said last of an exception that nobody has recorded."""
    lines = stderr_tail.splitlines()
    if words := [line for line in lines if _LAST_WORDS.match(line)]:
        return words[-1]
    # An exception whose name says nothing of the kind stands where the indented frames end.
    _, found, body = stderr_tail.rpartition(_TRACEBACK)
    said = (line for line in body.splitlines() if line.strip() and not line[0].isspace())
    return next(said, "") if found else ""


def hint_of(
    exitcode: int | None,
    *,
    cause: str = "",
    signal: str = "",
    message: str = "",
    stderr_tail: str = "",
    stderr_in_file: bool = True,
    python: str | None = None,
    stack: str = "",
    stacks: str = "",
    look: str = "",
) -> str:
    """What to do about the failure of a worker; "" where nothing is known that would help.

    Args:
        exitcode: its exit status, or minus the signal that it died of.
        cause: why, as far as was found out (`ProcessFailure.cause`).
        signal: the name of the signal.
        message: the recorded exception.
        stderr_tail: the last lines of its standard error.
        stderr_in_file: whether its standard error went into a file.
        python: the interpreter that ran it; "" for a program that is none of Python's, None where
            nobody knows.
        stack: where it was before it was ended, in a line.
        stacks: the file in which all frames of it stand.
        look: the command that shows what it has written, for where nothing else is known.

    Example:
        >>> hint_of(1, message="ModuleNotFoundError: No module named 'numpy'")
        'numpy is not installed in the Python that runs the workers.'
    """
    if is_oom(cause):
        return (
            "The kernel ended it because memory ran out: give the job more, run fewer workers on a "
            "node, or keep less in each. --memory-sample-interval 5 shows its growth."
        )
    if is_hang(cause):
        return _of_hang(cause, stack, stacks)
    if signal == "SIGKILL" or "SIGKILL" in cause:
        return (
            "Somebody outside killed it: a scheduler that enforces a limit, or an administrator. "
            "Its log, or dmesg, says more."
        )
    last = _CHAINED.split(stderr_tail[-4096:])[-1]
    if found := _known(f"{message[-4096:]}\n{last}"):
        return found.replace(_SOME_PYTHON, f"{python}, which runs" if python else _SOME_PYTHON)
    hint = _of_exit(exitcode, signal, message, stderr_tail, stderr_in_file, python != "")
    return hint or (f"See what it has written: {look}" if look else "")


def _known(text: str) -> str:
    if not _KNOWN_COMPILED:
        _KNOWN_COMPILED.extend((re.compile(pattern), hint) for pattern, hint in _KNOWN)
    for pattern, hint in _KNOWN_COMPILED:
        if found := pattern.search(text):
            return hint.format(*found.groups())
    return ""


def _of_hang(cause: str, stack: str, stacks: str) -> str:
    unseen = ""
    if "not seen" in cause:
        unseen = "--tee 3 lets output count as a sign of life. "
    # Only where the kernel was asked (`stacks._by_kernel`).
    if stack.startswith("state "):
        how = "@record, or the extra `stacks` (py-spy), shows where in its Python each rank is."
    else:
        how = (
            "Compare where the ranks were: the one that is not where all the others wait is the "
            "one to look at. Others may wait for it."
        )
    return f"{unseen}{how}" + (f" All its frames: {stacks}" if stacks else "")


def _of_exit(
    exitcode: int | None,
    signal: str,
    message: str,
    stderr_tail: str,
    stderr_in_file: bool,
    records: bool,
) -> str:
    if signal in _CRASHES:
        # Unless faulthandler has just shown it.
        line = "PYTHONFAULTHANDLER=1 shows the Python line. "
        return (
            f"A crash outside Python ({_CRASHES[signal]}). "
            f"{'' if 'Fatal Python error' in stderr_tail else line}"
            "With ulimit -c unlimited there is a core file for gdb."
        )
    if exitcode in (126, 127):
        return "A program was not found, or may not be executed: look at PATH and at its mode."
    if message.startswith(_NO_RECORD) and not stderr_tail:
        # Python's own status for an exception that nobody catches is 1.
        records = records and exitcode == 1
        if not stderr_in_file:
            also = ", and @record on its main function keeps an exception" if records else ""
            return f"What it said went to the console. --tee 3 keeps it here as well{also}."
        if records:
            return (
                "@record on its main function keeps an exception, with its traceback; "
                "sys.exit(1) leaves none."
            )
    return ""
