"""Metrics by HTTP, for Prometheus to scrape: ``--metrics-port``. Needs the extra ``prometheus``."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from socketserver import TCPServer, ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

__all__ = ["serving"]

# Who says nothing for so long is not waited for.
_SILENCE_S = 10.0


@asynccontextmanager
async def serving(registry: CollectorRegistry, host: str, port: int) -> AsyncIterator[int]:
    """Serve a registry for the duration of the context.

    Each request is answered in a thread of its own, and no thread waits for one:
    `prometheus_client.start_http_server` has one that wakes up twice a second.

    Args:
        registry: of what.
        host: an address of this machine.
        port: 0 for any free one.

    Returns:
        The port.

    Raises:
        OSError: if it cannot be had.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, *_, address = found[0]
    with _server_of(family)((str(address[0]), port), _Silent) as server:
        server.set_app(make_wsgi_app(registry))
        # It never waits: whoever has come may have gone again.
        server.timeout = 0
        server.socket.setblocking(False)
        loop.add_reader(server.fileno(), server.handle_request)
        try:
            yield server.server_port
        finally:
            loop.remove_reader(server.fileno())


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # Not the one of `HTTPServer`, which asks the name server for our name.
        TCPServer.server_bind(self)
        self.server_name = str(self.server_address[0])
        self.server_port = self.server_address[1]
        self.setup_environ()


def _server_of(family: socket.AddressFamily) -> type[_Server]:
    class Server(_Server):
        address_family = family

    return Server


class _Silent(WSGIRequestHandler):
    timeout = _SILENCE_S

    def log_message(self, format: str, *args: object) -> None:
        """Standard error is for the workers."""
