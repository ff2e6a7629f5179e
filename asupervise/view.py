"""``python -m asupervise.view``: what a run has left in its folder, as a person wants to see it.

::

    python -m asupervise.view show   RUN_DIR        how it ended, in the terminal
    python -m asupervise.view logs   RUN_DIR -f     its logs, merged by time
    python -m asupervise.view report RUN_DIR        its report.html, made again

RUN_DIR is the folder of a run, or the ``--log-dir`` of several: then it is the newest one's.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, Final, NoReturn, TypeVar

import asupervise
from asupervise.errors import SupervisorError
from asupervise.views.files import LogFile, log_files
from asupervise.views.loglines import Choice, Line, chosen, lines_of, merged, tail_start
from asupervise.views.plain import ranks_text
from asupervise.views.printing import Format, headline, printed
from asupervise.views.rundir import EVENTS_FILE, RunFolderError, find_run, read_run
from asupervise.views.story import Run

__all__ = ["main"]

_USAGE_ERROR: Final = 2
_MOST_RANK: Final = 1 << 31
_BATCH: Final = 256
_MOST_RANGES: Final = 8

T = TypeVar("T")

_LOGS_EPILOG: Final = """\
Merged by time: workers write their files themselves, so a line's time is what it begins with, if
that is a date and a time (2026-11-29 13:47:08,035 or 2026-11-29T13:47:08Z, after a bracket or the
name of a level) at which its file was written to. A line without is as old as the one before it,
and the lines of one file keep their order. A file of which no line has a time stands in one piece,
at the time when its worker was started. With --follow, new lines come as they are written.

A line's prefix is its rank, with | for stdout and ! for stderr, and the attempt before it where
there are several: 1/3 ! is rank 3's stderr in attempt 1."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its words; those of this process by default.

    Returns:
        The exit status: 0, or 2 if it is used wrongly or the folder cannot be read.
    """
    options = _parser().parse_args(argv)
    # A name or a word that no encoding has is shown as an escape.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has enough (`| head`). What is left must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        pass  # the way to end --follow
    except (SupervisorError, OSError, ValueError) as error:
        return _refuse(error)
    return 0


def _refuse(error: Exception) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = ": ".join(map(str, filter(None, (error.filename, error.strerror))))
    print(f"error: {text}", file=sys.stderr)
    if hint := getattr(error, "hint", ""):
        print(f"hint: {hint}", file=sys.stderr)
    return _USAGE_ERROR


# --- the commands -------------------------------------------------------------------------------


def _found(options: argparse.Namespace) -> str:
    run_dir = find_run(options.run_dir)
    given = os.path.abspath(options.run_dir)
    if run_dir != given:
        where = "the run of" if given.startswith(f"{run_dir}/") else "the newest run in"
        print(f"{where} {options.run_dir}: {run_dir}", file=sys.stderr)
    return run_dir


def _show(options: argparse.Namespace) -> None:
    from asupervise.views.show import shown_run

    run = read_run(_found(options))
    for line in shown_run(run, colours=_coloured(options), events=options.events):
        print(line)
    report = os.path.join(run.run_dir, "report.html")
    print()
    if os.path.isfile(report):
        print(f"report: {report}")
    print(f"logs: {run.run_dir}")


def _report(options: argparse.Namespace) -> None:
    from asupervise.views.report import REPORT_FILE, render, write_report

    run_dir = _found(options)
    if options.output == "-":
        print(render(read_run(run_dir), f"{run_dir}/"))
    else:
        path = options.output or ""
        if os.path.isdir(path):
            path = os.path.join(path, REPORT_FILE)
        try:
            print(write_report(run_dir, path))
        except OSError as error:
            # Of the file that it has for a moment nobody has heard.
            raise RunFolderError(f"{path or run_dir}: {error.strerror}") from error


def _logs(options: argparse.Namespace) -> None:
    run_dir = _found(options)
    run = read_run(run_dir)
    choice = Choice(options.rank, options.stream, _attempt(options.attempt, run))
    there = list(log_files(run))
    files = chosen(there, choice)
    if not files and not options.follow:
        raise _no_logs(run, there)
    how = Format(
        prefix=not options.by_rank if options.prefix is None else options.prefix,
        timestamps=options.timestamps,
        colours=_coloured(options),
        pattern=options.grep,
    ).of(files)
    if options.follow:
        _follow(run, choice, files, how, options)
    else:
        _print_files(files, how, options)


def _no_logs(run: Run, there: Sequence[LogFile]) -> RunFolderError:
    if not there:
        return RunFolderError(
            f"{run.run_dir}: none of its workers has a log",
            "--tee 3 or --redirects 3 keeps what they print",
        )
    ranks = ranks_text((file.life.rank for file in there), _MOST_RANGES)
    attempts = ranks_text(file.life.attempt for file in there)
    streams = " and ".join(sorted({file.stream for file in there}, reverse=True))
    return RunFolderError(
        f"{run.run_dir}: there is no such log",
        f"there are logs of {streams} of rank {ranks}, attempt {attempts}",
    )


def _attempt(text: str | None, run: Run) -> int | None:
    if text == "last":
        return max((life.attempt for life in run.lives), default=0)
    return None if text in (None, "all") else int(text)


def _print_files(files: Sequence[LogFile], how: Format, options: argparse.Namespace) -> None:
    starts = {}
    if options.tail is not None:
        starts = {file.path: tail_start(file, options.tail) for file in files}
    if not options.by_rank:
        _print(merged(files, starts), how)
        return
    for file in files:
        if file.size and not how.prefix:
            sys.stdout.write(headline(file, how))
        _print(lines_of(file, starts.get(file.path, 0)), how)


def _print(lines: Iterable[Line], how: Format) -> None:
    batch: list[str] = []
    for text in printed(lines, how):
        batch.append(text)
        if len(batch) >= _BATCH:
            sys.stdout.write("".join(batch))
            batch.clear()
    sys.stdout.write("".join(batch))


def _follow(
    run: Run, choice: Choice, files: Sequence[LogFile], how: Format, options: argparse.Namespace
) -> None:
    import asyncio

    from asupervise.views.following import Follower, whole_end

    files = [file._replace(size=whole_end(file)) for file in files]
    seen = {file.path: file for file in files}

    def show(lines: Sequence[Line]) -> None:
        nonlocal how
        if lines and lines[0].file.path not in seen:
            # Of a further attempt, perhaps, which prefixes then must say.
            seen[lines[0].file.path] = lines[0].file
            how = how.of(seen.values())
        _print(lines, how)
        sys.stdout.flush()

    async def follow() -> bool:
        return await Follower(run.run_dir, choice, {f.path: f.size for f in files}, show).run()

    # Its loop is there before anything is shown: Ctrl-C then finds it whole, and closes it.
    with asyncio.Runner() as runner:
        runner.get_loop()
        _print_files(files, how, options)
        sys.stdout.flush()
        ended = runner.run(follow())
    if not ended:
        why = f"its workers are gone, and {EVENTS_FILE} has no end"
        print(f"{run.run_dir}: {why}", file=sys.stderr)


def _coloured(options: argparse.Namespace) -> bool:
    if options.color != "auto":
        return bool(options.color == "always")
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and (
        os.environ.get("TERM") != "dumb")  # fmt: skip


# --- the words ----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as ``python -m asupervise`` does.

    Attributes:
        flags: of all commands.
    """

    flags: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        words = message.partition("unrecognized arguments: ")[2].split()
        flag = next((word for word in words if word.startswith("-")), "")
        alike = get_close_matches(flag.partition("=")[0], self.flags, n=1) if flag else []
        hint = f"did you mean {alike[0]}?" if alike else f"{self.prog} --help"
        self.exit(_USAGE_ERROR, f"error: {message}\nhint: {hint}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m asupervise.view",
        description="Show what a run has left in its folder.",
        epilog="RUN_DIR is a run's folder, or the --log-dir of several: then the newest one's.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"asupervise {asupervise.__version__}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_show(commands)
    _add_logs(commands)
    _add_report(commands)
    known = commands.choices.values()
    parser.flags = [name for each in known for name in each._option_string_actions]
    return parser


def _command(commands: Any, name: str, does: str, call: Callable[..., None], **more: Any) -> Any:
    parser = commands.add_parser(
        name, help=does, description=f"{does[0].upper()}{does[1:]}.", allow_abbrev=False, **more
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a run's folder, or a --log-dir")
    parser.set_defaults(command=call)
    return parser


def _add_color(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto",
        help="auto: on a terminal, unless NO_COLOR is set (default)",
    )  # fmt: skip


def _add_show(commands: Any) -> None:
    parser = _command(commands, "show", "how a run ended, and why", _show)
    parser.add_argument("--events", action="store_true", help="all that happened, too")
    _add_color(parser)


def _add_report(commands: Any) -> None:
    parser = _command(commands, "report", "make a run's report.html again", _report)
    parser.add_argument(
        "-o", "--output", metavar="FILE",
        help="write it there; - for standard output (default: report.html in the run's folder)",
    )  # fmt: skip


def _add_logs(commands: Any) -> None:
    parser = _command(
        commands, "logs", "the logs of a run", _logs, epilog=_LOGS_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--rank", type=_read(_ranges), metavar="RANKS", help="those alone, as in 0,2-5")
    add(
        "--stream",
        type=_read(_streams),
        default=("stdout", "stderr"),
        metavar="STREAM",
        help="stdout or stderr (default: both)",
    )
    add("--attempt", type=_read(_attempt_word), metavar="N", help="that alone; last: the last")
    add(
        "--grep",
        type=_read(re.compile),
        metavar="PATTERN",
        help="lines that match this regular expression; (?i) at its start: in either case",
    )
    add("--tail", type=_read(_count), metavar="N", help="the last N lines of each log")
    add(
        "-f", "--follow", action="store_true", help="go on with what is written, until the run ends"
    )
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--merge", action="store_true", help="merged by time (default)")
    order.add_argument("--by-rank", action="store_true", help="one log after the other")
    add(
        "--prefix",
        action=argparse.BooleanOptionalAction,
        help="whose a line is, before it (default: where they are merged)",
    )
    add(
        "--timestamps",
        action="store_true",
        help="when a line was written, before it, as far as that is known",
    )
    _add_color(parser)  # fmt: skip


def _read(read: Callable[[str], T]) -> Callable[[str], T]:
    """argparse tells of the message only where it is of a type of its own."""

    def checked(text: str) -> T:
        try:
            return read(text)
        except (ValueError, re.error, RecursionError, OverflowError) as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None

    return checked


def _ranges(text: str) -> tuple[tuple[int, int], ...]:
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,10})(?:\s*-\s*([0-9]{1,10}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < _MOST_RANK:
            raise ValueError("expected ranks and ranges with commas between them, such as 0,2-5")
        found.append((first, last))
    return tuple(found)


def _streams(text: str) -> tuple[str, ...]:
    if text not in ("stdout", "stderr", "both"):
        raise ValueError("expected stdout, stderr or both")
    return ("stdout", "stderr") if text == "both" else (text,)


def _attempt_word(text: str) -> str:
    if text not in ("last", "all") and not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError("expected a number, last or all")
    return text


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ValueError("expected a number of lines, 0 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
