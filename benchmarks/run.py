"""Runs the benchmarks and says which goals are met: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import death, delay, idle, imports, launch_api, launch_cli, report, tee
from benchmarks.measure import Outcome, measure
from benchmarks.processes import left_behind
from benchmarks.topics import Setup, Topic, find_torchrun

TOPICS: dict[str, Topic] = {
    module.TOPIC.name: module.TOPIC
    for module in (imports, launch_cli, launch_api, death, tee, delay, idle)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit status does not depend on the figures."""
    parser = _parser()
    options = parser.parse_args(argv)
    if unknown := [name for name in options.topics if name not in TOPICS]:
        parser.error(f"no such topic: {', '.join(unknown)} (there are: {', '.join(TOPICS)})")
    chosen = [TOPICS[name] for name in options.topics or TOPICS]
    if options.list:
        for topic in chosen:
            print(f"{topic.name:<12} {topic.title}")
        return 0
    _allow_many_files()
    with tempfile.TemporaryDirectory(prefix="asupervise-benchmarks-") as scratch:
        setup = Setup(
            Path(scratch), options.quick, options.seconds, options.rounds, *_torchrun(options)
        )
        measured = [(topic, _measure(topic, setup)) for topic in chosen]
    _conclude(setup, measured)
    if options.json is not None:
        report.write_json(options.json, setup, measured)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure asupervise beside the limit that the system sets.",
    )
    parser.add_argument(
        "topics", nargs="*", metavar="TOPIC", help=f"any of: {', '.join(TOPICS)}; all by default"
    )
    parser.add_argument(
        "--list", action="store_true", help="say what there is, and measure nothing"
    )
    parser.add_argument("--quick", action="store_true", help="few rounds and small sizes")
    parser.add_argument("--rounds", type=int, help="rounds of each case, instead of its own number")
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="length of the idle windows (default: 15)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument(
        "--torchrun", metavar="PATH", help="torch's launcher (default: beside python, or on PATH)"
    )
    return parser


def _torchrun(options: argparse.Namespace) -> tuple[Path | None, set[str]]:
    path, why_not = find_torchrun(options.torchrun)
    return path, {why_not} if why_not else set()


def _allow_many_files() -> None:
    """1,024 workers need more descriptors than the usual soft limit; candidates inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _measure(topic: Topic, setup: Setup) -> list[Outcome]:
    outcomes = [measure(case, _say) for case in topic.cases(setup)]
    _say("")
    print(report.table(topic, outcomes), flush=True)
    return outcomes


def _conclude(setup: Setup, measured: Sequence[tuple[Topic, Sequence[Outcome]]]) -> None:
    print(report.totals([outcome for _, outcomes in measured for outcome in outcomes]))
    for why in sorted(setup.left_out):
        print(f"left out: {why}")
    for what in left_behind():
        print(f"warning: {what}")


def _say(what: str) -> None:
    """Show what is going on, in one line that is written over."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{what[:100]}")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
