"""A port for `MASTER_PORT`, kept for the worker of rank 0 until it listens there."""

from __future__ import annotations

import errno
import socket
from types import TracebackType

__all__ = ["HeldPort", "is_taken"]


class HeldPort:
    """A TCP port of this host that nobody else is given, but that a server of ours can listen on.

    A socket is bound to it and does not listen. Whoever asks the kernel for any free port does
    not get this one, so two jobs on one host never have the same. A server that sets
    SO_REUSEADDR, as torch's TCPStore and nearly all do, may bind to it all the same, because our
    socket has the option as well and does not listen (socket(7), ip(7)). It is set only after
    binding: two sockets that both have it when they ask for any port may be given the same.

    Attributes:
        number: the port.

    Raises:
        OSError: if there is none left.

    Example:
        >>> with HeldPort() as port, socket.create_server(("", port.number)) as server:
        ...     server.getsockname()[1] == port.number
        True
    """

    def __init__(self) -> None:
        self._socket = _unbound()
        try:
            self._socket.bind(("", 0))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.number: int = self._socket.getsockname()[1]
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Let go of it."""
        self._socket.close()

    def __enter__(self) -> HeldPort:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def is_taken(port: int) -> bool:
    """Whether somebody listens there, so that no server of ours can, whatever it sets.

    Example:
        >>> with HeldPort() as port:
        ...     is_taken(port.number)
        False
    """
    with _unbound() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as exc:
            return exc.errno == errno.EADDRINUSE
    return False


def _unbound() -> socket.socket:
    """For all addresses of this host."""
    dual = socket.has_dualstack_ipv6()
    made = socket.socket(socket.AF_INET6 if dual else socket.AF_INET)
    try:
        if dual:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    except BaseException:
        made.close()
        raise
    return made
