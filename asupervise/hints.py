"""What to do about a failure, in a sentence: a pure leaf, for whoever shows one."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["hint_of"]

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
    (r"Connection refused|Connection reset by peer|Broken pipe|timed out",
     "The other end was gone or unreachable: look whether another rank, or another machine, "
     "failed first."),
    (r"PermissionError|Permission denied",
     "The workers run as another user, or in another place, than the file expects."),
    (r"FileNotFoundError: .*'([^'\n]{1,200})'",
     "Workers start in the folder that the run was started in; relative paths begin there."),
)  # fmt: skip
_KNOWN_COMPILED: list[tuple[re.Pattern[str], str]] = []
_NO_RECORD: Final = "No traceback was recorded"


def hint_of(
    exitcode: int | None,
    *,
    cause: str = "",
    signal: str = "",
    message: str = "",
    stderr_tail: str = "",
    stderr_in_file: bool = True,
    python: str | None = None,
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
        stacks: the file in which all frames of it stand.
        look: the command that shows what it has written, for where nothing else is known.

    Example:
        >>> hint_of(1, message="ModuleNotFoundError: No module named 'numpy'")
        'numpy is not installed in the Python that runs the workers.'
    """
    if "OOM killer" in cause:
        return (
            "The kernel ended it because memory ran out: give the job more, run fewer workers on a "
            "node, or keep less in each. --memory-sample-interval 5 shows its growth."
        )
    if cause.startswith("hang:"):
        return (
            "Compare where the ranks were: the one that is not where all the others wait is the "
            "one to look at. Others may wait for it."
            + (f" All its frames: {stacks}" if stacks else "")
        )
    if signal == "SIGKILL" or "SIGKILL" in cause:
        return (
            "Somebody outside killed it: a scheduler that enforces a limit, or an administrator. "
            "Its log, or dmesg, says more."
        )
    if found := _known(f"{message[-4096:]}\n{stderr_tail[-4096:]}"):
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


def _of_exit(
    exitcode: int | None,
    signal: str,
    message: str,
    stderr_tail: str,
    stderr_in_file: bool,
    records: bool,
) -> str:
    if signal in _CRASHES:
        return (
            f"A crash outside Python ({_CRASHES[signal]}). PYTHONFAULTHANDLER=1 shows the Python "
            "line; after ulimit -c unlimited there is a core file for gdb."
        )
    if exitcode in (126, 127):
        return "A program was not found, or may not be executed: look at PATH and at its mode."
    if message.startswith(_NO_RECORD) and not stderr_tail:
        if not stderr_in_file:
            also = ", and @record on its main function keeps the exception" if records else ""
            return f"What it said went to the console. --tee 3 keeps it here as well{also}."
        if records:
            return "@record on its main function keeps the exception, with its traceback."
    return ""
