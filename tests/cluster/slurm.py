"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, started as root."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PROC, ROOT, all_pids, clean_environment, describe, wait_gone

__all__ = ["Slurm", "not_possible", "slurm"]

# What a machine with many tests at once needs at the most.
START_S = 30.0
# slurmd waits for the ends of steps, and slurmctld writes down its state.
END_S = 15.0
# Not for the tests to inherit, should they run on a cluster themselves.
_SCHEDULERS = ("SLURM", "OMPI_", "PMIX_", "PMI_", "NODE_RANK", "NNODES", "JOB_COMPLETION_INDEX")
_NEEDED = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "salloc", "scancel")

# Two slurmd on one machine, each with a name and a port of its own (slurm.conf(5), NodeHostname).
# CPUs as written here, whatever there are: a node with fewer would
# be drained. No cgroups and no accounting: those would reach beyond the folder.
_CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
PlugStackConfig={folder}/plugstack.conf
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/linear
SchedulerType=sched/builtin
MailProg=/bin/true
ReturnToService=2
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def not_possible() -> str | None:
    """Why there can be no Slurm here, or None."""
    missing = [name for name in _NEEDED if shutil.which(name, path=_path()) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurm-wlm and munge)"
    if os.geteuid() != 0:
        return "slurmd must be started by root"
    try:
        socket.gethostbyname(_host())
    except OSError as error:
        return f"the machine's own name, {_host()}, cannot be looked up: {error}"
    return None


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


class _Daemon:
    """A process that runs in the foreground and says on stderr when it is ready."""

    def __init__(self, command: list[str], ready: str, env: dict[str, str], group: int) -> None:
        self._name = command[0]
        self._ready_word = ready
        self._ready = threading.Event()
        self._log: deque[str] = deque(maxlen=100)
        self._process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            process_group=group,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._log.append(line)
                if self._ready_word in line:
                    self._ready.set()
        # Whoever waits learns from the process that it was not to be.
        self._ready.set()

    def wait_ready(self) -> None:
        in_time = self._ready.wait(START_S)
        if not in_time or not any(self._ready_word in line for line in self._log):
            pytest.fail(f"{self._name} is not ready:\n{self.log}", pytrace=False)

    @property
    def log(self) -> str:
        return "".join(self._log)

    def end(self) -> bool:
        """Whether it has ended by itself when it was told to."""
        self._process.terminate()
        try:
            self._process.wait(END_S)
            return True
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return False
        finally:
            self._reader.join()


class Slurm:
    """A cluster of two nodes; made by :func:`slurm`.

    Attributes:
        nodes: their names, in Slurm's order. The first can be looked up: it is this machine's.
    """

    nodes = (_host(), f"{_host()}-second")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._conf = folder / "slurm.conf"
        clean = {k: v for k, v in clean_environment().items() if not k.startswith(_SCHEDULERS)}
        self._env = clean | {"PATH": _path(), "SLURM_CONF": str(self._conf)}
        self._daemons: list[_Daemon] = []
        # Ends all of its process group, which is the daemons', also when we are killed: then it
        # reads the end of its input.
        self._keeper = subprocess.Popen(
            ["sh", "-c", "read -r _; kill -KILL 0"], stdin=subprocess.PIPE, process_group=0
        )

    def start(self) -> None:
        """Start all of it; ready when a step has run on both nodes."""
        folder = self._folder
        for name in ("state", *(f"spool.{node}" for node in self.nodes)):
            (folder / name).mkdir()
        (folder / "plugstack.conf").touch()
        key = folder / "munge.key-file"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        with contextlib.ExitStack() as held:
            ports = [held.enter_context(_free_port()).getsockname()[1] for _ in range(3)]
        self._conf.write_text(
            _CONFIGURATION.format(host=_host(), folder=folder, ports=ports, nodes=self.nodes)
        )
        # --force: the folder is root's alone, and munged would have it readable for everybody.
        files = ("socket", "key-file", "seed-file", "pid-file", "log-file")
        options = [f"--{name}={folder}/munge.{name}" for name in files]
        self._spawn("Created socket", "munged", "--foreground", "--force", *options)
        self._spawn("Running as primary controller", "slurmctld", "-D", "-f", str(self._conf))
        for node in self.nodes:
            self._spawn("slurmd started on", "slurmd", "-D", "-N", node, "-f", str(self._conf))
        self.run("srun", "--nodes=2", "--ntasks=2", "true", timeout=START_S)

    def _spawn(self, ready: str, *command: str) -> None:
        daemon = _Daemon(list(command), ready, self._env, self._keeper.pid)
        self._daemons.append(daemon)
        daemon.wait_ready()

    def run(
        self, *command: object, timeout: float = 40.0, check: bool = True, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a client of Slurm's, or what `command` says, to its end."""
        argv = [str(word) for word in command]
        options: dict[str, Any] = {"cwd": ROOT, "env": self._env | env, "timeout": timeout}
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, **options
            )
        except subprocess.TimeoutExpired as expired:
            logs = "\n".join(daemon.log for daemon in self._daemons)
            pytest.fail(f"{expired}: {expired.stdout!r} {expired.stderr!r}\n{logs}", pytrace=False)
        if check and done.returncode:
            pytest.fail(f"{argv}: {done.returncode}: {done.stdout} {done.stderr}", pytrace=False)
        return done

    def python(self, program: str, *srun: str, **env: str) -> list[str]:
        """The lines that a Python program writes as a step, in no particular order."""
        return self.run("srun", *srun, sys.executable, "-c", program, **env).stdout.splitlines()

    def batch(self, script: str, *sbatch: str) -> str:
        """What a batch script writes to its standard output, once it has ended."""
        # `sbatch --wait` only looks every 2 to 10 s; the end of a pipe is seen at once.
        pipe, path = self._folder / "batch.pipe", self._folder / "batch.sh"
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        path.write_text(f"#!/bin/sh\nexec > {pipe}\n{script}\n")
        self.run("sbatch", *sbatch, f"--output={self._folder}/batch.err", path)
        return self.run("cat", pipe).stdout

    def close(self) -> None:
        """End all of it, and fail if anything is left."""
        complaints = []
        if len(self._daemons) == 2 + len(self.nodes):
            self.run("scancel", "--user=root", check=False)
        # The last started first: slurmd says good-bye to slurmctld, and both of them to munged.
        for daemon in reversed(self._daemons):
            if not daemon.end():
                complaints.append(f"had to be killed:\n{daemon.log}")
        self._keeper.kill()
        self._keeper.communicate()
        wait_gone(self._pids())
        complaints += [f"process left behind: {describe(pid)}" for pid in self._pids()]
        for pid in self._pids():
            os.kill(pid, 9)
        if complaints:
            pytest.fail("\n".join(complaints), pytrace=False)

    def _pids(self) -> set[int]:
        """Whatever was started with our configuration: daemons, slurmstepd, and tasks."""
        mark = f"SLURM_CONF={self._conf}".encode()
        found = set()
        for pid in all_pids() - {os.getpid()}:
            # Gone since, or a zombie that another process is to reap.
            with contextlib.suppress(OSError):
                if mark in (PROC / str(pid) / "environ").read_bytes().split(b"\0"):
                    found.add(pid)
        return found


def _free_port() -> socket.socket:
    """A port that is free, and that nobody is given as long as this is open."""
    found = socket.socket()
    found.bind(("127.0.0.1", 0))
    return found


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """A cluster for the tests of a module; skips them where there can be none."""
    if reason := not_possible():
        pytest.skip(reason)
    # Not `tmp_path`: its name may be longer than a socket's may be (unix(7): 108 bytes).
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as name:
        cluster = Slurm(Path(name))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.close()
