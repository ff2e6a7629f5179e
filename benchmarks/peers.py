"""The other launchers: which of them are here, and how each is told to start N workers."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

from benchmarks.measure import SUBJECT

ROOT: Final = Path(__file__).resolve().parent.parent
FOLDER: Final = ROOT / ".venv-bench"

# Each name, the program that it is, and what brings it.
_PROGRAMS: Final = {
    "torchrun": ("torchrun", "pip install torch"),
    "mpirun": ("mpirun", "apt-get install openmpi-bin"),
    "parallel": ("parallel", "apt-get install parallel"),
    "honcho": ("honcho", "pip install honcho"),
    "circus": ("circusd", "pip install circus"),
}
_SAY_VERSIONS: Final = """
from importlib.metadata import PackageNotFoundError, version
for name in ("torch", "honcho", "circus"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        pass
"""


@dataclass(frozen=True)
class Command:
    """What starts a peer: its words, and variables that it needs."""

    argv: Sequence[str]
    env: dict[str, str] = field(default_factory=dict)


class Peers:
    """The launchers that are here.

    Args:
        given: the folder that they lie in; by default ``.venv-bench/bin``, then the folder of our
            interpreter, then PATH.
        scratch: a folder for the files that some of them want to read.
    """

    def __init__(self, given: Path | None, scratch: Path) -> None:
        self._folders = [given] if given else [FOLDER / "bin", Path(sys.executable).parent]
        self._scratch = scratch
        self._numbers = itertools.count()
        found = {name: self._find(program) for name, (program, _) in _PROGRAMS.items()}
        self.paths = {name: path for name, path in found.items() if path is not None}

    def _find(self, program: str) -> Path | None:
        for folder in self._folders:
            if (folder / program).is_file():
                return (folder / program).absolute()
        on_path = shutil.which(program)
        return Path(on_path).absolute() if on_path else None

    @property
    def missing(self) -> list[str]:
        """Who is not here, a sentence each."""
        return [
            f"{name}: not installed here ({how})"
            for name, (_, how) in _PROGRAMS.items()
            if name not in self.paths
        ]

    @cached_property
    def torch_python(self) -> str | None:
        """An interpreter that has torch."""
        return self._python_beside("torchrun")

    def _python_beside(self, name: str) -> str | None:
        beside = self.paths[name].with_name("python") if name in self.paths else None
        return str(beside) if beside is not None and beside.exists() else None

    def versions(self) -> dict[str, str]:
        """Of those who are here, as far as they say."""
        said: dict[str, str] = {}
        for python in {self._python_beside(name) for name in ("torchrun", "honcho", "circus")}:
            if python is not None:
                lines = _output([python, "-I", "-c", _SAY_VERSIONS]).splitlines()
                said.update((name, version) for name, version in map(str.split, lines))
        for name in ("mpirun", "parallel"):
            if name in self.paths and (said_of := _output([str(self.paths[name]), "--version"])):
                said[name] = said_of.splitlines()[0].split()[-1]
        return said

    def commands(
        self,
        names: Sequence[str],
        workers: int,
        argv: Sequence[str],
        *,
        tee: bool = False,
        all_or_nothing: bool = False,
    ) -> Iterator[tuple[str, Command]]:
        """How those of `names` who are here are told to run `workers` times `argv`.

        Args:
            tee: each line of output on our standard output, with a mark of the worker's. Some
                know no other way.
            all_or_nothing: the failure of one is to end the others, where that is not so anyway.
        """
        for name in names:
            if name in self.paths:
                yield name, self._command(name, workers, argv, tee, all_or_nothing)

    def _command(
        self, name: str, workers: int, argv: Sequence[str], tee: bool, all_or_nothing: bool
    ) -> Command:
        program, count = str(self.paths[name]), str(workers)
        if name == "torchrun":
            return Command([program, *ranked_flags(workers, tee), *argv])
        if name == "mpirun":
            # It refuses to run as root, and more ranks than cores, unless told otherwise.
            flags = ["--allow-run-as-root", "--oversubscribe", *(["--tag-output"] if tee else [])]
            return Command([program, *flags, "-np", count, *argv])
        if name == "parallel":
            flags = ["--line-buffer", "--tagstring", "{#}"] if tee else ["--ungroup"]
            flags += ["--halt", "now,fail=1"] if all_or_nothing else []
            ranks = [":::", *map(str, range(workers))]
            flags = ["--plain", "--will-cite", "-j", count, "-N0", *flags]
            return Command([program, *flags, *argv, *ranks], self._parallel_home())
        if name == "honcho":
            procfile = self._file(f"Procfile-{next(self._numbers)}", f"w: exec {' '.join(argv)}")
            return Command([program, "--no-colour", "start", "-f", procfile, "-c", f"w={count}"])
        assert name == "circus"
        return Command([program, self._circus_file(workers, argv)])

    def _parallel_home(self) -> dict[str, str]:
        # What it learns about the machine it writes into the user's home otherwise.
        home = self._scratch / "parallel"
        home.mkdir(exist_ok=True)
        return {"PARALLEL_HOME": str(home)}

    def _circus_file(self, workers: int, argv: Sequence[str]) -> str:
        sockets = self._scratch / f"circus-{workers}"
        lines = [
            "[circus]",
            f"endpoint = ipc://{sockets}-endpoint",
            f"pubsub_endpoint = ipc://{sockets}-pubsub",
            "[watcher:w]",
            f"cmd = {' '.join(argv)}",
            f"numprocesses = {workers}",
            # By a variable of ours its workers are known, and ended if it leaves them behind.
            "copy_env = True",
        ]
        return self._file(f"circus-{workers}.ini", "\n".join(lines))

    def _file(self, name: str, text: str) -> str:
        path = self._scratch / name
        path.write_text(text + "\n")
        return str(path)


def ranked_flags(workers: int, tee: bool) -> list[str]:
    """The flags that torchrun and we have in common."""
    flags = ["--no-python", "--nproc-per-node", str(workers)]
    return [*flags, "--tee", "3"] if tee else flags


def our_command(workers: int, argv: Sequence[str], *, tee: bool = False) -> Command:
    return Command([sys.executable, "-m", SUBJECT, *ranked_flags(workers, tee), *argv])


def _output(argv: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")
