"""The command line: ``python -m asupervise [flags] SCRIPT [args]``.

The only place that prints and that installs signal handlers. Messages go to stderr; stdout belongs
to the workers, and to ``--help``, ``--version`` and ``--dry-run``, which start none.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from signal import SIG_IGN, Signals, getsignal
from typing import TYPE_CHECKING, Any, Final, TextIO, cast

import asupervise
from asupervise.errors import SupervisorError
from asupervise.options import LaunchOptions, UsageError, help_text, parse_options

if TYPE_CHECKING:
    from asupervise.bus import EventBus
    from asupervise.elastic.agent import Outcome
    from asupervise.elastic.records import Round
    from asupervise.failures import ProcessFailure
    from asupervise.job import Job
    from asupervise.signals import Signalled

__all__ = ["main"]

_USAGE_ERROR: Final = 2
_INTERNAL_ERROR: Final = 1
# What an argument is called here, of which an error speaks by its name in the library.
_FLAGS: Final = {
    "log_dir": "--log-dir",
    "affinity_mode": "--numa-binding",
    "max_restarts": "--max-restarts",
    "within_s": "--restart-within",
}
_OURS: Final = re.compile(rf"\b(?:{'|'.join(_FLAGS)})(?=[:=])")
_ENDING_SIGNALS: Final = (Signals.SIGTERM, Signals.SIGINT, Signals.SIGHUP, Signals.SIGQUIT)
# What the machine cannot give just now is nobody's mistake on the command line.
_SHORTAGES: Final = frozenset(
    {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EIO}
)


def main(
    argv: Sequence[str] | None = None,
    *,
    on_started: Callable[[], None] = lambda: None,
    alone: bool = False,
) -> int:
    """Run the command line.

    Args:
        argv: its words; those of this process by default.
        on_started: called when the workers have been started.
        alone: whether this process is there for nothing else.

    Returns:
        The exit status: 0, that of the worker that failed first, 2 for a usage error, 128+N where
        signal N ended the job.
    """
    _open_standard_streams()
    try:
        options = parse_options(sys.argv[1:] if argv is None else argv, os.environ)
        if alone and not options.runs_others_code:
            _load_asyncio_without_ssl()
        return _run(options, on_started)
    except UsageError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return 128 + Signals.SIGINT
    finally:
        _flush(sys.stdout, 1)
        _flush(sys.stderr, 2)


def _load_asyncio_without_ssl() -> None:
    """It does without where it is missing; to load it is a fifteenth of a short run's time."""
    if not {"asyncio", "ssl"} & sys.modules.keys():
        sys.modules["ssl"] = cast(Any, None)
        try:
            import asyncio  # noqa: F401
        finally:
            del sys.modules["ssl"]


def _run(options: LaunchOptions, on_started: Callable[[], None]) -> int:
    if options.help:
        _print(help_text(), end="")
        return 0
    if options.version:
        _print(f"asupervise {asupervise.__version__}")
        return 0
    # Here and below, what only a run needs is imported only then.
    from asupervise.job import prepare

    try:
        job = prepare(options, os.environ)
        for warning in job.warnings:
            _warn(warning)
        if options.dry_run:
            from asupervise.dryrun import describe
            from asupervise.elastic.node import preview
            from asupervise.procs import plan_processes

            arguments = job.blueprint.start_arguments(preview(job.request), os.environ)
            _print(describe(job, plan_processes(**arguments)))
            return 0
    except (SupervisorError, ValueError, OSError) as error:
        return _refuse(error)
    import asyncio

    return asyncio.run(_supervise(job, options, on_started))


# --- one job ---------------------------------------------------------------------------------


def _handled(options: LaunchOptions) -> tuple[Signals, ...]:
    if options.signals_to_handle is not None:
        return options.signals_to_handle
    # Who started us with a signal ignored (nohup; a shell's background job) wants to survive it.
    return tuple(
        sig
        for sig in _ENDING_SIGNALS
        if getsignal(sig) is not SIG_IGN and sig not in options.forward_signals
    )


async def _supervise(job: Job, options: LaunchOptions, on_started: Callable[[], None]) -> int:
    import asyncio

    from asupervise.elastic.agent import Hooks
    from asupervise.elastic.running import run, serve
    from asupervise.signals import handle_signals

    stop = asyncio.Event()
    folders: list[str] = []

    def announce(sig: Signals, again: bool) -> None:
        stop.set()
        _announce(sig, again)

    # Before anything is started: a signal that arrives while the workers start is not lost.
    with handle_signals(
        signals=_handled(options),
        forward=options.forward_signals,
        shutdown_timeout=options.shutdown_timeout,
        on_signal=announce,
    ) as handling:

        def on_group(ctx: Signalled | None) -> None:
            handling.attend(ctx)
            if ctx is not None:
                folders[:] = [getattr(ctx, "log_dir", None) or ""]
                on_started()

        try:
            hooks = Hooks(on_group, _tell_round, stop, _warn, lambda: handling.received)
            async with _consumed(options) as events:
                if options.restart == "worker":
                    outcome = await serve(
                        job.blueprint, job.request, hooks,
                        within_s=options.restart_within, on_restart=_tell_restart,
                        events=events, report=options.report,
                    )  # fmt: skip
                else:
                    outcome = await run(
                        job.blueprint, job.backend, job.request, hooks,
                        events=events, report=options.report,
                    )  # fmt: skip
        except (SupervisorError, ValueError, OSError) as error:
            status = _refuse(error)
            if not folders:
                return status
            # It was not the command line: workers have run, until what nodes agree through was
            # lost, or a restart was not possible.
            _say_where(folders[0])
            return _INTERNAL_ERROR
    return _concluded(job, outcome, handling.received)


def _consumed(options: LaunchOptions) -> AbstractAsyncContextManager[EventBus | None]:
    """The bus that whoever shows the run hears of it by; None where nobody does."""
    if not options.is_consumed:
        return nullcontext()
    from asupervise.consumers import consuming

    return consuming(options, _say, _warn)


def _tell_round(round: Round) -> None:
    if round.number and round.state != "over":
        culprit = round.culprit
        how = f", exit code {culprit.exitcode}" if culprit is not None else ""
        when = f", in {round.delay_s:.1f} s" if round.delay_s else ""
        _say(f"asupervise: {round.why}{how}{when}")


def _tell_restart(
    local_rank: int, count: int, failure: ProcessFailure | None, delay_s: float
) -> None:
    how, code = "has ended", ""
    if failure is not None:
        how, code = "failed", f", exit code {failure.exitcode}"
    _say(f"asupervise: rank {local_rank} {how}: restart {count}{code}, in {delay_s:.1f} s")


def _announce(sig: Signals, again: bool) -> None:
    if again:
        _say(f"asupervise: {sig.name} again: killing the workers")
    else:
        _say(f"asupervise: {sig.name}: ending the workers (again: kill them)")


def _concluded(job: Job, outcome: Outcome, received: Signals | None) -> int:
    """Say how the job ended; returns the exit status."""
    for warning in outcome.result.warnings if outcome.result is not None else ():
        _warn(warning)
    succeeded = outcome.round is not None and outcome.round.succeeded
    if outcome.round is not None and outcome.result is None and (succeeded or outcome.culprit):
        _say(f"asupervise: the run was over before this node came: {outcome.round.why}")
    if succeeded:
        return 0 if received is None else 128 + received
    status = _failed(job, outcome)
    return status if received is None else 128 + received


def _failed(job: Job, outcome: Outcome) -> int:
    """Say what failed; returns the exit status."""
    from asupervise.elastic.launching import failures_of
    from asupervise.failures import exit_status, root_cause

    failures, culprit = failures_of(outcome), outcome.culprit
    cause = root_cause(failures)
    if cause is not None or culprit is not None:
        _report(job, failures, culprit.rank if culprit is not None else None, outcome)
    else:
        _say_where(outcome.result.log_dir if outcome.result is not None else None)
    if culprit is not None:
        return exit_status(culprit.exitcode)
    if outcome.round is not None and outcome.round.state == "over" and cause is None:
        _say(f"error: {outcome.round.why}")
    # Ended by us, though by no signal that we got: something is wrong with us. And a service that
    # has ended too often has failed, though each end was a success.
    return (exit_status(cause[1].exitcode) if cause else 0) or _INTERNAL_ERROR


def _report(
    job: Job, failures: Mapping[int, ProcessFailure], culprit: int | None, outcome: Outcome
) -> None:
    from asupervise.error_handler import ERROR_FILE_VARIABLE, get_error_handler
    from asupervise.report import format_report, headline
    from asupervise.result import ChildFailedError

    error = ChildFailedError(job.title, failures, culprit=culprit)
    rank, failure = error.get_first_failure()
    _say(format_report(job.title, failures, "=", "-", culprit=culprit, culprit_first=True))
    if not failure.ended_by_us:
        _say(f"error: {headline(rank, failure)}")
    if outcome.round is not None and outcome.round.state == "over":
        why = outcome.round.why
        if why and why != f"rank {rank} failed":
            _say(f"no restart: {_in_flags(why)}")
    _say_where(outcome.result.log_dir if outcome.result is not None else None)
    if hint := _hint(job, rank, failure, outcome):
        _say(f"hint: {hint}")
    # We are a worker of another launcher: it is to see the exception, not just our status.
    if os.environ.get(ERROR_FILE_VARIABLE) and os.path.exists(failure.error_file):
        get_error_handler().dump_error_file(failure.error_file, failure.exitcode)


def _say_where(folder: str | None) -> None:
    """What the run has left."""
    if folder and os.path.isdir(folder):
        _say(f"logs: {folder}")
        report = os.path.join(folder, "report.html")
        if os.path.isfile(report):
            _say(f"report: {report}")


def _hint(job: Job, rank: int, failure: ProcessFailure, outcome: Outcome) -> str:
    """What to do about the root cause; of another node's worker there are no files here."""
    import shlex

    from asupervise.report import hint_for

    result, local = outcome.result, failure.local_rank
    if failure.host or result is None:
        return hint_for(failure, python=job.python)
    folder = result.log_dir or ""
    look = f"python -m asupervise.view logs {shlex.quote(folder)} --rank {rank}"
    return hint_for(
        failure,
        stderr_in_file=local in result.stderrs,
        python=job.python,
        stacks=_stacks_file(folder, local, outcome),
        look=look if local in result.stdouts or local in result.stderrs else "",
    )


def _stacks_file(folder: str, local_rank: int, outcome: Outcome) -> str:
    """Where all frames of a worker stand; "" if nobody has looked at them."""
    if outcome.standing is None:
        return ""
    attempt = outcome.standing.attempt or outcome.standing.round.restarts
    path = os.path.join(folder, f"attempt_{attempt}", str(local_rank), "stacks.txt")
    return path if os.path.isfile(path) and os.path.getsize(path) else ""


# --- printing --------------------------------------------------------------------------------


def _refuse(error: Exception) -> int:
    """Say what is wrong in a line, and with a hint what to do; returns the exit status."""
    _say(f"error: {_in_flags(_in_one_line(error))}")
    for note in getattr(error, "__notes__", ()):
        _say(note)  # a hint
    shortage = isinstance(error, OSError) and error.errno in _SHORTAGES
    return _INTERNAL_ERROR if shortage else _USAGE_ERROR


def _in_flags(text: str) -> str:
    return _OURS.sub(lambda found: _FLAGS[found[0]], text)


def _in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        # str() of it starts with "[Errno 2]", which says nothing to who reads it.
        named = error.filename is not None and str(error.filename) not in error.strerror
        return f"{error.strerror}: {error.filename!r}" if named else error.strerror
    return str(error)


def _warn(text: str) -> None:
    _say(f"warning: {text}")


def _say(text: str) -> None:
    _write(sys.stderr, f"{text}\n")


def _print(text: str, end: str = "\n") -> None:
    _write(sys.stdout, f"{text}{end}")


def _write(stream: TextIO | Any, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except UnicodeEncodeError:
        stream.write(text.encode("ascii", "backslashreplace").decode())
    except OSError:
        pass  # its reader has gone (`| head`): there is nobody to tell


def _flush(stream: TextIO | Any, fd: int) -> None:
    try:
        stream.flush()
    except OSError:
        # Else the interpreter tries once more at its end, and complains that it could not.
        os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def _open_standard_streams() -> None:
    """Open those that we were started without, as /dev/null.

    Otherwise the next file that is opened, a log or a socket of ours, would be a worker's stdout.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            assert opened == fd, "descriptors are given out from the lowest"
            os.set_inheritable(fd, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, mode, closefd=False))
