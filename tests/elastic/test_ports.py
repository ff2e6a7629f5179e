"""`HeldPort`: nobody else is given the port, and rank 0 can listen there."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys

import pytest

from asupervise import start_processes
from asupervise.elastic.ports import HeldPort
from tests.conftest import ROOT

V6 = socket.has_dualstack_ipv6()


def bound(family: int, address: str, port: int, *, reuse: bool) -> socket.socket:
    """A server's socket, bound as a server in another process would bind it."""
    server = socket.socket(family)
    try:
        if reuse:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
    except BaseException:
        server.close()
        raise
    return server


ADDRESSES = [
    (socket.AF_INET, "127.0.0.1"),
    (socket.AF_INET, ""),
    *([(socket.AF_INET6, "::1"), (socket.AF_INET6, "::")] if V6 else []),
]


@pytest.mark.parametrize(("family", "address"), ADDRESSES)
def test_a_server_that_reuses_addresses_listens(family: int, address: str) -> None:
    with HeldPort() as port:
        with bound(family, address, port.number, reuse=True) as server:
            server.listen()
            target = address or "127.0.0.1"
            with (
                socket.create_connection((target, port.number), timeout=5.0) as client,
                server.accept()[0] as served,
            ):
                client.sendall(b"x")
                assert served.recv(1) == b"x"
        # One after another, as the groups of a round that is begun anew.
        with bound(family, address, port.number, reuse=True) as server:
            server.listen()


@pytest.mark.parametrize(("family", "address"), ADDRESSES)
def test_a_server_that_does_not_is_refused(family: int, address: str) -> None:
    with HeldPort() as port, pytest.raises(OSError) as caught:  # noqa: PT011
        bound(family, address, port.number, reuse=False)
    assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.skipif(not V6, reason="no IPv6 here")
def test_a_dual_stack_server_listens() -> None:
    with (
        HeldPort() as port,
        socket.create_server(
            ("::", port.number), family=socket.AF_INET6, dualstack_ipv6=True
        ) as server,
        socket.create_connection(("127.0.0.1", port.number), timeout=5.0),
    ):
        server.accept()[0].close()


def test_nobody_listens_there_until_rank_0_does() -> None:
    with HeldPort() as port, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port.number), timeout=5.0)


def test_it_is_let_go_of() -> None:
    with HeldPort() as port:
        pass
    bound(socket.AF_INET, "", port.number, reuse=False).close()


# Holds as many as it is told, and then all of its numbers; again, until it is told to end.
HOLDER = """
import sys
from asupervise.elastic.ports import HeldPort
for line in sys.stdin:
    held = [HeldPort() for _ in range(int(line))]
    print(*(port.number for port in held), flush=True)
    sys.stdin.readline()
    for port in held:
        port.close()
    print(flush=True)
"""


def test_two_processes_never_hold_the_same() -> None:
    """Thousands at once of some 28,000 (ip_local_port_range): by chance there would be many."""
    rounds, each = 4, 800
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        for _ in range(rounds):
            # It draws while we do.
            print(each, file=holder.stdin, flush=True)
            ours = [HeldPort() for _ in range(each)]
            try:
                theirs = holder.stdout.readline().split()
                numbers = [port.number for port in ours] + [int(number) for number in theirs]
                assert len(set(numbers)) == len(numbers) == 2 * each
            finally:
                for port in ours:
                    port.close()
            print(file=holder.stdin, flush=True)
            holder.stdout.readline()
        holder.stdin.close()
    assert holder.returncode == 0


def test_whoever_asks_for_any_port_is_given_none_that_is_held() -> None:
    with HeldPort() as port:
        for reuse in (False, True):
            others = [bound(socket.AF_INET, "", 0, reuse=reuse) for _ in range(800)]
            try:
                assert port.number not in {other.getsockname()[1] for other in others}
            finally:
                for other in others:
                    other.close()


async def test_workers_inherit_nothing_of_it() -> None:
    with HeldPort() as port:
        inode = os.readlink(f"/proc/self/fd/{port._socket.fileno()}")
        script = f"! readlink /proc/self/fd/* | grep -F '{inode}'"
        async with start_processes("t", "sh", {0: ("-c", script)}, {0: {}}) as ctx:
            assert not (await ctx.wait()).is_failed()


def test_no_port_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is the kernel's, and the socket is closed (the fixtures would find it open)."""

    class Refused(socket.socket):
        def bind(self, address: object) -> None:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    monkeypatch.setattr(socket, "socket", Refused)
    with pytest.raises(OSError, match="in use"):
        HeldPort()
