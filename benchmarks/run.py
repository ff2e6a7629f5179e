"""Runs the benchmarks and says which goals are met: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks import (
    consumers,
    death,
    delay,
    filters,
    function_workers,
    growth,
    idle,
    imports,
    launch_api,
    launch_cli,
    report,
    results,
    rounds,
    scale,
    tee,
)
from benchmarks.documents import Document
from benchmarks.measure import measure
from benchmarks.peers import FOLDER, ROOT, Peers
from benchmarks.processes import left_behind
from benchmarks.results import Measured
from benchmarks.topics import Setup, Topic

TOPICS: dict[str, Topic] = {
    module.TOPIC.name: module.TOPIC
    for module in (
        *(imports, launch_cli, launch_api, death, tee, consumers, delay, filters, idle, scale),
        *(function_workers, rounds, growth),
    )
}
# Of a run of everything, in full.
_HOME: Final = Path(__file__).resolve().parent


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
    with tempfile.TemporaryDirectory(prefix="asupervise-benchmarks-") as folder:
        scratch = Path(folder)
        # Who is killed, or keeps what a failed group has logged, leaves its folders there as well.
        os.environ["TMPDIR"] = folder
        peers = Peers(options.peers, scratch)
        deadline_s = time.monotonic() + 60 * options.minutes
        setup = Setup(scratch, peers, options.quick, options.seconds, options.rounds, deadline_s)
        try:
            measured = [_measure(topic, setup) for topic in chosen]
        finally:
            setup.remove_memory_folders()
        made = results.document(setup, measured, left_behind())
    _conclude(made)
    _keep(made, _folder(options))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure asupervise beside its peers and the limit that the system sets.",
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
        "--seconds", type=float, default=60.0, help="length of the idle window (default: 60)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=17.0,
        help="after so many, each case that is left gets one round (default: 17)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="where results.json, RESULTS.md and plots go (default: benchmarks, if everything is "
        "run in full; or else nowhere)",
    )
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="FOLDER",
        help="where torchrun, honcho, circusd and their python lie (default: .venv-bench/bin, "
        "then beside our python, then PATH)",
    )
    return parser


def _folder(options: argparse.Namespace) -> Path | None:
    """Where results go. A part of them does not replace the whole unasked."""
    given: Path | None = options.results
    partial = options.topics or options.quick or options.rounds
    return given if given is not None or partial else _HOME


def _allow_many_files() -> None:
    """1,024 workers need more descriptors than the usual soft limit; candidates inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _measure(topic: Topic, setup: Setup) -> Measured:
    """Its outcomes, those before a failure included: one topic's must not cost us the others'."""
    measured = Measured(topic)
    _say(f"{topic.name}: begins", lasting=True)
    started = time.monotonic()
    try:
        for case in topic.cases(setup):
            measured.outcomes.append(measure(case, _say, setup.deadline_s))
    except Exception as error:
        traceback.print_exc()
        measured.failed = f"{type(error).__name__}: {error}"
    if time.monotonic() > setup.deadline_s:
        setup.left_out.add(f"{topic.name}: all rounds but one of what came after the time was up")
    measured.seconds = time.monotonic() - started
    _say(f"{topic.name}: {measured.seconds:.0f} s", lasting=True)
    print(report.table(results.topic_document(measured)), flush=True)
    return measured


def _conclude(made: Document) -> None:
    print(report.totals(made["topics"]))
    for why in made["left_out"]:
        print(f"left out: {why}")
    for what in made["left_behind"]:
        print(f"warning: {what}")


def _keep(made: Document, folder: Path | None) -> None:
    if folder is None:
        return
    path = folder / "results.json"
    results.write(path, made)
    # In the environment that has what draws plots; the page does without, if need be.
    beside = FOLDER / "bin" / "python"
    python = str(beside) if beside.exists() else sys.executable
    subprocess.run(
        [python, "-m", "benchmarks.page", str(path.resolve())], cwd=ROOT, check=True, timeout=300
    )


def _say(what: str, *, lasting: bool = False) -> None:
    """Show what is going on: in one line that is written over, where there is a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{what[:100]}" + ("\n" if lasting else ""))
    elif lasting:
        sys.stderr.write(f"{what}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
