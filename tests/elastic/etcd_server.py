"""A real etcd for the tests: one member or several on free ports, that can be killed and halted."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import importlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from tests.elastic.certificates import Certificates

__all__ = ["EtcdCluster", "etcd", "etcd_cluster", "grpc_kept", "not_installed"]

# What a machine with many tests at once needs at the most.
START_S = 30.0
# Quicker than the default (100, 1000), so that a new leader is found sooner.
HEARTBEAT_MS, ELECTION_MS = 50, 500


def not_installed() -> str | None:
    """Why there is no etcd here, or None."""
    return None if shutil.which("etcd") else "etcd is not installed (Debian: etcd-server)"


class Port:
    """A free port of `host` that is ours until it is closed, also while no member listens.

    It is bound with SO_REUSEADDR and does not listen: so a member, which sets that as well, can
    have it, and nobody is given it by chance.
    """

    def __init__(self, host: str) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, 0))
        self.at = f"{host}:{self._socket.getsockname()[1]}"

    def close(self) -> None:
        self._socket.close()


class Member:
    """One process of etcd, which can be started again on the same data and ports."""

    def __init__(self, name: str, folder: Path, host: str) -> None:
        self.name = name
        self.folder = folder
        self.log = folder / f"{name}.log"
        self.client, self.peer, self.metrics = Port(host), Port(host), Port("127.0.0.1")
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> Path:
        return self.folder / f"{self.name}.data"

    def end(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()

    def signal(self, number: int) -> None:
        assert self.process is not None, f"{self.name} was ended"
        self.process.send_signal(number)

    def healthy(self) -> bool:
        """Whether it has a leader and serves; False also where nobody listens yet."""
        try:
            return self.get("/health")[0] == 200
        except OSError:
            return False

    def leads(self) -> bool:
        try:
            return b"\netcd_server_is_leader 1\n" in self.get("/metrics")[1]
        except OSError:
            return False  # ended, or halted

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.metrics.at, timeout=2.0)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

    def close(self) -> None:
        self.end()
        for port in (self.client, self.peer, self.metrics):
            port.close()


class EtcdCluster:
    """Members of etcd; made by :func:`etcd_cluster`. All calls block.

    Attributes:
        endpoints: ``host:port`` of each member.
        certificates: of its TLS, or None.
    """

    def __init__(
        self,
        folder: Path,
        members: int,
        host: str,
        certificates: Certificates | None,
        client_certs: bool,
        auth: tuple[str, str] | None,
        token_ttl_s: int,
    ) -> None:
        self.certificates = certificates
        self._client_certs = client_certs
        self._auth = auth
        self._token_ttl_s = token_ttl_s
        # Ends all of its process group, which is the members', also when we are killed: then it
        # reads the end of its input.
        self._keeper = subprocess.Popen(
            ["sh", "-c", "read -r _; kill -KILL 0"], stdin=subprocess.PIPE, process_group=0
        )
        self.members = [Member(f"m{i}", folder, host) for i in range(members)]
        self.endpoints = tuple(member.client.at for member in self.members)

    def __enter__(self) -> EtcdCluster:
        try:
            self._start_all()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all members, halted ones too; their data stays."""
        for member in self.members:
            member.close()
        self._keeper.kill()
        self._keeper.communicate()

    # --- what happens to members -----------------------------------------------------------------

    def kill(self, i: int) -> None:
        """End a member by SIGKILL; it can be started again."""
        self.members[i].end()

    def start(self, i: int) -> None:
        """Start a member that was killed, on its data; ready when it has found the others."""
        self._spawn(self.members[i])
        self._wait_ready(self.members[i])

    def stop(self, i: int) -> None:
        """Halt a member by SIGSTOP: it keeps its connections and does not answer."""
        self.members[i].signal(signal.SIGSTOP)

    def cont(self, i: int) -> None:
        """Let a member that was halted go on."""
        self.members[i].signal(signal.SIGCONT)

    def leader(self, timeout_s: float = START_S) -> int:
        """Which member leads; waits until one does."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for i, member in enumerate(self.members):
                if member.leads():
                    return i
            # Members tell nobody of an election.
            time.sleep(0.05)
        raise TimeoutError(f"no leader after {timeout_s:g} s{self._logs()}")

    def wipe(self) -> None:
        """End all, delete their data and start anew: their revisions begin again."""
        for member in self.members:
            member.end()
            shutil.rmtree(member.data)
        self._start_all()

    # --- another client --------------------------------------------------------------------------

    def post(self, path: str, i: int = 0, **body: object) -> dict[str, Any]:
        """Call etcd's JSON gateway: ``post("kv/put", key=b"a", value=b"b")``; bytes are encoded."""
        encoded = {
            name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
            for name, value in body.items()
        }
        at = self.endpoints[i]
        connection = (
            http.client.HTTPSConnection(at, timeout=10.0, context=self._tls_context())
            if self.certificates
            else http.client.HTTPConnection(at, timeout=10.0)
        )
        with contextlib.closing(connection):
            connection.request("POST", f"/v3/{path}", json.dumps(encoded))
            response = connection.getresponse()
            content = response.read()
        if response.status != 200:
            raise RuntimeError(f"{path}: {response.status} {content.decode()}")
        return dict(json.loads(content))

    def _tls_context(self) -> ssl.SSLContext:
        assert self.certificates is not None
        context = ssl.create_default_context(cafile=str(self.certificates.ca))
        context.load_cert_chain(self.certificates.cert, self.certificates.key)
        return context

    # --- starting --------------------------------------------------------------------------------

    def _start_all(self) -> None:
        for member in self.members:
            self._spawn(member)
        for member in self.members:
            self._wait_ready(member)
        if self._auth is not None:
            self._ask_for_password(*self._auth)

    def _spawn(self, member: Member) -> None:
        assert member.process is None, f"{member.name} runs already"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ETCD_")}
        with member.log.open("ab") as log:
            member.process = subprocess.Popen(
                self._argv(member),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                process_group=self._keeper.pid,
            )

    def _argv(self, member: Member) -> list[str]:
        scheme = "https" if self.certificates else "http"
        peers = ",".join(f"{m.name}=http://{m.peer.at}" for m in self.members)
        flags = {
            "name": member.name,
            "data-dir": member.data,
            "listen-client-urls": f"{scheme}://{member.client.at}",
            "advertise-client-urls": f"{scheme}://{member.client.at}",
            "listen-peer-urls": f"http://{member.peer.at}",
            "initial-advertise-peer-urls": f"http://{member.peer.at}",
            # Of its own, so that we need no certificate and no password to look at it.
            "listen-metrics-urls": f"http://{member.metrics.at}",
            "initial-cluster": peers,
            "heartbeat-interval": HEARTBEAT_MS,
            "election-timeout": ELECTION_MS,
            "auth-token-ttl": self._token_ttl_s,
            "bcrypt-cost": 4,
            "logger": "zap",
            "log-outputs": "stderr",
            "log-level": "warn",
            **self._tls_flags(),
        }
        return ["etcd", *(f"--{name}={value}" for name, value in flags.items())]

    def _tls_flags(self) -> dict[str, object]:
        if (made := self.certificates) is None:
            return {}
        flags: dict[str, object] = {"cert-file": made.server_cert, "key-file": made.server_key}
        if self._client_certs:
            flags |= {"client-cert-auth": "true", "trusted-ca-file": made.ca}
        return flags

    def _wait_ready(self, member: Member) -> None:
        deadline = time.monotonic() + START_S
        assert member.process is not None
        while not member.healthy():
            if member.process.poll() is not None:
                raise RuntimeError(f"{member.name} has ended{self._logs()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{member.name} is not ready{self._logs()}")
            # etcd says when it is ready to nobody but systemd.
            time.sleep(0.02)

    def _logs(self) -> str:
        return "".join(f"\n--- {m.log}:\n{m.log.read_text()[-2000:]}" for m in self.members)

    def _ask_for_password(self, user: str, password: str) -> None:
        """From now on nobody is served without; another user than root may touch every key."""
        self.post("auth/user/add", name="root", password=password)
        self.post("auth/role/add", name="root")
        self.post("auth/user/grant", user="root", role="root")
        if user != "root":
            everything = {"permType": "READWRITE", "key": "AA==", "range_end": "AA=="}
            self.post("auth/user/add", name=user, password=password)
            self.post("auth/role/add", name="tests")
            self.post("auth/role/grant", name="tests", perm=everything)
            self.post("auth/user/grant", user=user, role="tests")
        self.post("auth/enable")


@contextlib.contextmanager
def etcd_cluster(
    folder: Path,
    members: int = 1,
    *,
    tls: bool = False,
    client_certs: bool = False,
    auth: tuple[str, str] | None = None,
    token_ttl_s: int = 300,
    host: str = "127.0.0.1",
) -> Iterator[EtcdCluster]:
    """Start an etcd and end it; ready when every member serves.

    Args:
        folder: where data, logs and certificates go.
        members: how many.
        tls: whether clients must use TLS; see ``cluster.certificates``.
        client_certs: whether they also need a certificate.
        auth: the user and the password that clients need.
        token_ttl_s: seconds after which one that is not used must authenticate again.
        host: address that the members listen on.

    Example:
        >>> with etcd_cluster(tmp_path, members=3) as cluster:
        ...     cluster.kill(cluster.leader())
    """
    certificates = Certificates(folder / "tls", host) if tls or client_certs else None
    with EtcdCluster(
        folder, members, host, certificates, client_certs, auth, token_ttl_s
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module", autouse=True)
def grpc_kept() -> Iterator[None]:
    """Holds gRPC ready for the module that imports this.

    What it has for the whole process it lets go of when the last channel is gone, in a thread of
    its own and at its leisure: a test would seem to leave that behind.
    """
    try:
        grpc = importlib.import_module("grpc")
    except ImportError:
        yield  # and the tests that need it are skipped
        return

    async def begin() -> None:
        grpc.aio.init_grpc_aio()

    # It asks for a loop that runs, and needs it no further.
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        loop.run_until_complete(begin())
    # Its engine of events lives as long as any channel, whether that is used or not.
    with grpc.insecure_channel("unix:nowhere"):
        yield
    grpc.aio.shutdown_grpc_aio()


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    """One member for all tests of the session; each test has keys of its own.

    It is not to be killed, started anew or left halted: for that a test has its own cluster. Ask
    for it as an argument: what `request.getfixturevalue` starts in the middle of a test counts as
    left behind by that, and is ended.
    """
    if reason := not_installed():
        pytest.skip(reason)
    # It syncs every write to the disk, which is quicker where there is none.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="asupervise-etcd-", dir=memory) as folder,
        etcd_cluster(Path(folder)) as cluster,
    ):
        yield cluster
