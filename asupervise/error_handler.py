"""Runs inside workers: `record` writes an uncaught exception into the worker's error file.

The supervisor names the file in ``TORCHELASTIC_ERROR_FILE`` and reads it when the worker has
failed; without that variable nothing is written. The format is torch's (see
`asupervise.failures`), so torch's launcher reads our files and ours reads torch's.

A worker pays for every import at its start, so what is only needed once an exception has been
caught (json, traceback) is imported then.
"""

from __future__ import annotations

import errno
import faulthandler
import functools
import os
import sys
import time

TYPE_CHECKING = False  # type checkers take this name for true; `typing` itself costs an import
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, ParamSpec, TypeVar, overload

    P = ParamSpec("P")
    R = TypeVar("R")

__all__ = ["ErrorHandler", "get_error_handler", "record"]

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"

# JSON spends up to 12 bytes on a character: both together stay below what the reader takes in.
_MAX_MESSAGE_CHARS = 16_384
_MAX_TRACEBACK_CHARS = 49_152
_CO_COROUTINE = 0x80  # inspect.CO_COROUTINE, without importing inspect
_NOT_AVAILABLE = "<N/A>"
RECORDED = "_asupervise_recorded"
_NOT_REPLACEABLE = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV)


class ErrorHandler:
    """Writes an exception, with its traceback and time, into this worker's error file.

    To be subclassed where errors are to be handled differently: override `initialize` and
    `record_exception`. Nothing that `record` calls here may replace the worker's own exception:
    a file that cannot be written is a line on stderr.

    Example:
        >>> handler = ErrorHandler()
        >>> try:
        ...     raise ValueError("no such batch")
        ... except ValueError as error:
        ...     handler.record_exception(error)
    """

    def _get_error_file_path(self) -> str | None:
        """The file to write, or None to write none."""
        return os.environ.get(ERROR_FILE_VARIABLE) or None

    def initialize(self) -> None:
        """Prepare the process, before the recorded function runs.

        Has the interpreter print the stacks of all threads to stderr when it dies of a fault
        (SIGSEGV, SIGFPE, SIGABRT, SIGBUS, SIGILL), unless the program has arranged for that; and
        lets the supervisor ask for the stacks while it runs.
        """
        from asupervise.worker import arm_stack_dumps

        arm_stack_dumps()
        if faulthandler.is_enabled():
            return
        try:
            faulthandler.enable(all_threads=True)
        except (AttributeError, OSError, RuntimeError, ValueError):
            # `sys.stderr` is closed, missing, or no file (a notebook, a test's capture).
            try:
                faulthandler.enable(2, all_threads=True)
            except (OSError, RuntimeError, ValueError) as error:
                _complain(f"cannot enable faulthandler: {_describe(error)}")

    def record_exception(self, e: BaseException) -> None:
        """Write `e` into the error file, if there is one to write.

        Args:
            e: the exception; it need not be the one being handled.

        Never raises on account of the exception or of the file.
        """
        now_ns = time.time_ns()
        file = self._get_error_file_path()
        if not file:
            return
        import json

        extra = {
            "py_callstack": _cut_middle(_format(e), _MAX_TRACEBACK_CHARS),
            "timestamp": str(now_ns // 10**9),
            "timestamp_ns": str(now_ns),
        }
        message = {"message": _cut_middle(_describe(e), _MAX_MESSAGE_CHARS), "extraInfo": extra}
        self._write_error_file(file, json.dumps({"message": message}))

    def override_error_code_in_rootcause_data(
        self,
        rootcause_error_file: str,
        rootcause_error: dict[str, Any],
        error_code: int = 0,
    ) -> None:
        """Put the worker's exit code into its record, which could not know it.

        Args:
            rootcause_error_file: where the record was read from.
            rootcause_error: the record; changed in place.
            error_code: the exit code; negative for a signal.
        """
        message = rootcause_error.get("message")
        if isinstance(message, dict):
            message["errorCode"] = error_code
        else:
            _complain(
                f"{rootcause_error_file} has no record that could hold exit code {error_code}"
            )

    def dump_error_file(self, rootcause_error_file: str, error_code: int = 0) -> None:
        """Make a worker's error file that of this process, as a launcher within a worker does.

        Args:
            rootcause_error_file: the worker's file. One that is missing or unreadable is passed
                over, with a line on stderr.
            error_code: the worker's exit code, noted in the copy unless it is 0.
        """
        from asupervise.error_files import read_error_file

        read = read_error_file(rootcause_error_file)
        if read is None or not read.data:
            why = read.note if read is not None else "there is no such file"
            _complain(f"cannot pass on the worker's error file {rootcause_error_file}: {why}")
            return
        import json

        _stamp(read.data, read.timestamp)
        if error_code:
            self.override_error_code_in_rootcause_data(rootcause_error_file, read.data, error_code)
        file = self._get_error_file_path()
        if file:
            self._write_error_file(file, json.dumps(read.data))
        else:
            _complain(f"${ERROR_FILE_VARIABLE} is not set: {rootcause_error_file} is not passed on")

    def _write_error_file(self, file_path: str, error_msg: str) -> None:
        """Write the file, whole or not at all; a line on stderr where that is not possible."""
        try:
            _write_atomically(file_path, error_msg.encode())
        except (OSError, ValueError) as error:
            _complain(f"cannot write the error file: {_describe(error)}")


def get_error_handler() -> ErrorHandler:
    """The handler that `record` uses where it is given none.

    Example:
        >>> type(get_error_handler()).__name__
        'ErrorHandler'
    """
    return ErrorHandler()


if TYPE_CHECKING:

    @overload
    def record(
        fn: Callable[P, Coroutine[Any, Any, R]], error_handler: ErrorHandler | None = None
    ) -> Callable[P, Coroutine[Any, Any, R | None]]: ...

    @overload
    def record(
        fn: Callable[P, R], error_handler: ErrorHandler | None = None
    ) -> Callable[P, R | None]: ...


def record(fn: Callable[..., Any], error_handler: ErrorHandler | None = None) -> Callable[..., Any]:
    """Decorate a worker's main function, so that the supervisor learns of its exception.

    Args:
        fn: the function, plain or ``async``; decorate one a process.
        error_handler: what writes the exception; `get_error_handler` by default.

    Returns:
        A function of the same signature. It returns None where `fn` exits with status 0 by
        ``SystemExit``, and raises whatever else `fn` raises, having recorded it if it is an
        `Exception`. Any other ``SystemExit`` and ``KeyboardInterrupt`` are not recorded: they are
        decisions, not errors. Of a ``ChildFailedError``, ours or torch's, the worker's own error
        file is passed on.

    Example:
        >>> @record
        ... def main() -> None:
        ...     raise SystemExit(0)
        >>> main()
    """
    handler = get_error_handler() if error_handler is None else error_handler

    if _is_async(fn):

        @functools.wraps(fn)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            with _Recording(handler):
                return await fn(*args, **kwargs)
    else:

        @functools.wraps(fn)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with _Recording(handler):
                return fn(*args, **kwargs)

    return wrapper


class _Recording:
    """Records the exception that leaves its block, and swallows a ``SystemExit`` of success."""

    def __init__(self, handler: ErrorHandler) -> None:
        self._handler = handler

    def __enter__(self) -> None:
        self._handler.initialize()

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> bool:
        if isinstance(error, SystemExit):
            return error.code is None or (isinstance(error.code, int) and error.code == 0)
        if isinstance(error, Exception):
            record_error(self._handler, error)
        return False


def record_error(handler: ErrorHandler, error: BaseException) -> None:
    """Record `error`, or pass on the file of a worker's; once, where several `record` it.

    Whatever the handler does wrong is a line on stderr: the user must see their own exception.
    """
    if getattr(error, RECORDED, False):
        return
    try:
        _hand_over(handler, error)
        setattr(error, RECORDED, True)
    except Exception as failure:
        _complain(f"cannot record {type(error).__name__}: {_describe(failure)}")


def _hand_over(handler: ErrorHandler, error: Any) -> None:
    if not _is_child_failed_error(error):
        handler.record_exception(error)
        return
    _rank, failure = error.get_first_failure()
    if failure.error_file != _NOT_AVAILABLE:
        handler.dump_error_file(failure.error_file, failure.exitcode)


def _stamp(data: dict[str, Any], time_s: float | None) -> None:
    """Give a record the stamp without which torch refuses to read it."""
    message = data.get("message")
    extra = message.setdefault("extraInfo", {}) if isinstance(message, dict) else None
    if isinstance(extra, dict):
        extra.setdefault("timestamp", str(int(time.time() if time_s is None else time_s)))


def _is_child_failed_error(error: Any) -> bool:
    # By its shape: torch's is another class, and importing either to compare costs a worker.
    return hasattr(error, "failures") and callable(getattr(error, "get_first_failure", None))


def _is_async(fn: Any) -> bool:
    while isinstance(fn, functools.partial):
        fn = fn.func
    if not hasattr(fn, "__code__"):
        fn = getattr(fn, "__func__", None) or type(fn).__call__
    code = getattr(fn, "__code__", None)
    return code is not None and bool(code.co_flags & _CO_COROUTINE)


def _describe(error: BaseException) -> str:
    """``ValueError: no such batch``, also where the exception cannot be printed."""
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception as failure:  # the user's __str__: there is nothing else to show
        return f"{name}: <its text raised {type(failure).__name__}>"


def _format(error: BaseException) -> str:
    import traceback

    try:
        return "".join(traceback.format_exception(error))
    except Exception as failure:
        # What is being formatted is the user's: causes, notes, source files, __str__.
        return f"{_describe(error)}\n<its traceback cannot be shown: {type(failure).__name__}>"


def _cut_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... ({len(text) - 2 * half} characters left out) ...\n{text[-half:]}"


def _write_atomically(path: str, data: bytes) -> None:
    temporary = f"{path}.{os.getpid()}.{time.monotonic_ns()}.tmp"
    try:
        _write_new(temporary, data)
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        # A file that is mounted (Kubernetes' /dev/termination-log) cannot be replaced, and the
        # folder of one that we own need not be ours.
        if error.errno not in _NOT_REPLACEABLE or not os.path.isfile(path):
            raise
        _overwrite(path, data)


def _write_new(path: str, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "wb") as file:
        file.write(data)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # it was never made, or cannot be removed: the caller reports the first error


def _overwrite(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "wb") as file:
        file.write(data)


def _complain(text: str) -> None:
    try:
        sys.stderr.write(f"asupervise.record: {text}\n")
        sys.stderr.flush()
    except Exception:
        pass  # stderr is closed or full, and the user's exception is still to be raised
