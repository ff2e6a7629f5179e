"""What runs inside workers beside `record`: stack dumps on request, heartbeats, progress.

The supervisor names the files in the environment; without them nothing here does anything, so
a program may call it whoever started it.
"""

from __future__ import annotations

import os

try:
    # Without the module around it, whose enumerations take each worker 2 ms.
    import _signal as signal  # type: ignore[import-not-found]
except ImportError:  # another Python than CPython
    import signal

STACKS_VARIABLE = "ASUPERVISE_STACKS_FILE"
HEARTBEAT_VARIABLE = "ASUPERVISE_HEARTBEAT_FILE"
PROGRESS_VARIABLE = "ASUPERVISE_PROGRESS_FILE"
# Two numbers of any size that a float has, in a line: written as one, so never read in part.
_PROGRESS_BYTES = 64

# A real-time signal that neither libc, nor launchers, nor users have a meaning for: SIGUSR1 and
# SIGUSR2 belong to the programs. The supervisor sends it only to processes that catch it.
STACKS_SIGNAL = signal.SIGRTMAX - 3 if hasattr(signal, "SIGRTMAX") else signal.SIGUSR2

_armed = False


def arm_stack_dumps() -> bool:
    """Let the supervisor's signal write all threads' stacks to the file that it has named.

    faulthandler writes them from the signal handler, in C: also while the interpreter is stuck
    in C code that holds the GIL. `record` calls this for its program.

    Returns:
        Whether it is armed: False where no supervisor has named a file.

    Example:
        >>> arm_stack_dumps()
        False
    """
    global _armed
    path = os.environ.get(STACKS_VARIABLE)
    if _armed or not path:
        return _armed
    import faulthandler

    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        faulthandler.register(STACKS_SIGNAL, file=fd, all_threads=True)
    except (OSError, RuntimeError, ValueError):
        # A diagnostic aid must not stop the program: the supervisor looks at /proc then.
        return False
    _armed = True
    return True


def heartbeat() -> None:
    """Tell the supervisor that this worker makes progress.

    From the first call on, ``hang_timeout`` counts from the last heartbeat, and neither output
    nor CPU use counts as a sign of life. Costs one system call: it sets the time of a file, which
    a full disk does not hinder. Outside a supervisor it does nothing.

    Example:
        >>> heartbeat()
    """
    # No descriptor is kept: a program that closes all of its own would give ours to a file of its
    # own.
    path = os.environ.get(HEARTBEAT_VARIABLE)
    if not path:
        return
    try:
        try:
            os.utime(path)
        except FileNotFoundError:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError:
        # A diagnostic aid must not end the program (no inode is left, the folder is gone).
        pass


def progress(done: float, total: float | None = None) -> None:
    """Tell the supervisor how far this worker has come: for the live view, and for events.

    May be called often: it writes some bytes to a file, and the latest ones count. It is no
    heartbeat. Outside a supervisor it does nothing.

    Args:
        done: how much is done, in a unit of your own.
        total: of how much; None if that is not known.

    Raises:
        TypeError, ValueError: for what is no finite number.

    Example:
        >>> for step in range(3):
        ...     progress(step + 1, 3)
    """
    text = f"{_finite('done', done)!r} {'' if total is None else repr(_finite('total', total))}"
    path = os.environ.get(PROGRESS_VARIABLE)
    if not path:
        return
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, text.ljust(_PROGRESS_BYTES - 1).encode() + b"\n", 0)
        finally:
            os.close(fd)
    except OSError:
        # Whoever watches must not end the program: the disk is full, the folder is gone.
        pass


def _finite(name: str, value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"{name}: {value!r}: expected a finite number")
    return number


def parse_progress(text: bytes) -> tuple[float, float | None] | None:
    """What a worker's :func:`progress` has written; None for anything else.

    Example:
        >>> parse_progress(b"3.0 10.0   \\n")
        (3.0, 10.0)
    """
    numbers = text.decode("ascii", "replace").split()
    try:
        told = [_finite("", float(number)) for number in numbers]
    except ValueError:
        return None
    if len(told) not in (1, 2):
        return None
    return told[0], told[1] if len(told) == 2 else None
