"""Installs what `make bench` measures asupervise beside: ``python -m benchmarks.install_peers``.

What pip has goes into ``.venv-bench``, so that the project's own environment stays as it is; what
the system's packages have is installed as root on Debian and Ubuntu only. Whatever cannot be
installed is said, and left out of the benchmarks: the exit status is 0 all the same.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.peers import FOLDER, ROOT

_PIP_TIMEOUT_S: Final = 480.0
_APT_TIMEOUT_S: Final = 240.0
# Each program that the system's packages bring, and its package there.
_PACKAGES: Final = {"mpirun": "openmpi-bin", "parallel": "parallel", "etcd": "etcd-server"}


def main() -> int:
    started = time.monotonic()
    for what in (*_install_packages(), *_install_with_pip()):
        print(f"note: could not install {what} here; it is left out", file=sys.stderr)
    print(f"peers: ready after {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 0


def _install_packages() -> list[str]:
    """The packages that are neither here nor could be installed."""
    missing = [package for program, package in _PACKAGES.items() if shutil.which(program) is None]
    if not missing or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return missing
    print(f"peers: installing {', '.join(missing)}", file=sys.stderr)
    deadline = time.monotonic() + _APT_TIMEOUT_S
    _run(["apt-get", "update", "-qq"], deadline)
    for package in missing:
        # One at a time: what is not to be had must not keep out the others.
        _run(["apt-get", "install", "-qq", "-y", "--no-install-recommends", package], deadline)
    return [package for program, package in _PACKAGES.items() if shutil.which(program) is None]


def _install_with_pip() -> list[str]:
    """The requirements that could not be installed."""
    python = FOLDER / "bin" / "python"
    wanted = _requirements()
    stamp = FOLDER / ".installed"
    if stamp.is_file() and stamp.read_text() == "\n".join(wanted):
        return []
    if not python.exists() and not _run([sys.executable, "-m", "venv", str(FOLDER)]):
        return wanted
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    deadline = time.monotonic() + _PIP_TIMEOUT_S
    missing = []
    for requirement in wanted:
        print(f"peers: installing {requirement}", file=sys.stderr)
        if not _run([*pip, *requirement.split()], deadline):
            missing.append(requirement)
    if not missing:
        stamp.write_text("\n".join(wanted))
    return missing


def _requirements() -> list[str]:
    """What pyproject.toml names as ``bench``, and ourselves: functions need us beside torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return ["-e .", *project["dependency-groups"]["bench"]]


def _run(argv: Sequence[str], deadline: float | None = None) -> bool:
    """Whether it succeeded in time; what it said is shown where it did not."""
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    timeout_s = _PIP_TIMEOUT_S if deadline is None else max(1.0, deadline - time.monotonic())
    try:
        done = subprocess.run(
            argv,
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"peers: {Path(argv[0]).name}: {error}", file=sys.stderr)
        return False
    if done.returncode != 0:
        tail = done.stdout.decode(errors="replace").splitlines()[-3:]
        print("\n".join(tail), file=sys.stderr)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
