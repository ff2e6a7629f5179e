"""The engine is torch's own `TCPStore`: for those who have torch, and no etcd.

The store knows keys that are set, counted, compared and waited for, but neither transactions nor
leases, so the nodes keep a log in it (:mod:`asupervise.elastic.store_log`) of what is to be done
(:mod:`asupervise.elastic.replay`).

The store lives in the process of one node. When that ends the others have nothing left to agree
through; that is the price of having no server.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final

import psutil

from asupervise.elastic.coordinator import Coordinator
from asupervise.elastic.engine import EngineError
from asupervise.elastic.log_engine import LogEngine, Reader
from asupervise.elastic.records import Round, read_record
from asupervise.elastic.rendezvous import Request
from asupervise.elastic.store_log import Store, StoreLog, first_line
from asupervise.elastic.values import seconds_of

__all__ = ["C10dOptions", "open", "open_engine"]

# torch's: DEFAULT_PORT of c10d_rendezvous_backend.py, and the defaults of its handlers.
DEFAULT_PORT: Final = 29400
_READ_TIMEOUT_S: Final = 60.0
_KEEP_ALIVE_INTERVAL_S: Final = 5.0
_KEEP_ALIVE_MAX_ATTEMPT: Final = 3.0
_KEYS: Final = frozenset(
    {
        *("is_host", "read_timeout", "keep_alive_interval", "keep_alive_max_attempt", "lease_ttl"),
        # Of `Policy`, and of torch only: what it does with them is not ours to do.
        *("join_timeout", "last_call_timeout", "close_timeout", "heartbeat_timeout"),
    }
)

_PAUSES_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0)
# Of the time that a lease lasts: how long a number may be taken without an entry. Our lease cannot
# be renewed before that entry is passed; a third of it is left when a renewal is due (three
# quarters) until workers are ended for it (0.4, see the coordinator), and twice this share is less.
_HOLE_SHARE: Final = 0.08


@dataclass(frozen=True)
class C10dOptions:
    """Where the store is, and what was said about it in ``--rdzv-conf``, with torch's names.

    Attributes:
        host: of the node that hosts the store.
        port: there; 0 for a free one, which only who hosts it knows.
        is_host: whether that is we; None to find out.
        read_timeout_s: how long the store is waited for.
        lease_s: after so long a silence a node is gone.
    """

    host: str = "localhost"
    port: int = DEFAULT_PORT
    is_host: bool | None = None
    read_timeout_s: float = _READ_TIMEOUT_S
    lease_s: float = _KEEP_ALIVE_INTERVAL_S * _KEEP_ALIVE_MAX_ATTEMPT

    @classmethod
    def of(cls, request: Request) -> C10dOptions:
        """What the request says.

        Raises:
            EngineError: if that is not possible, naming it.
        """
        host, port = _endpoint(request.endpoint)
        conf = dict(request.conf)
        # torch has a store in a file as well, for all who see that file system.
        if conf.pop("store_type", "tcp") != "tcp":
            raise EngineError(f"--rdzv-conf store_type={request.conf['store_type']}: tcp is known")
        if unknown := sorted(set(conf) - _KEYS):
            raise EngineError(
                f"--rdzv-conf: {', '.join(unknown)}: not known to the c10d backend",
                hint=f"known: {', '.join(sorted(_KEYS))}",
            )
        interval = _above_0(conf, "keep_alive_interval", _KEEP_ALIVE_INTERVAL_S)
        attempts = _above_0(conf, "keep_alive_max_attempt", _KEEP_ALIVE_MAX_ATTEMPT)
        return cls(
            host,
            port,
            _truth(conf.get("is_host")),
            _above_0(conf, "read_timeout", _READ_TIMEOUT_S),
            _above_0(conf, "lease_ttl", interval * attempts),
        )

    @property
    def name(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"the TCPStore at {host}:{self.port}"


def _endpoint(text: str) -> tuple[str, int]:
    bare = text.strip()
    if not bare:
        return "localhost", DEFAULT_PORT
    host, colon, port = bare, "", ""
    if not bare.endswith("]"):
        host, colon, port = bare.rpartition(":")
        if not colon:
            host = bare
    if colon and not (port.isascii() and port.isdigit() and int(port) < 2**16):
        raise EngineError(f"--rdzv-endpoint={text}: HOST:PORT is expected, PORT below 65536")
    return host.removeprefix("[").removesuffix("]"), int(port) if colon else DEFAULT_PORT


def _truth(text: str | None) -> bool | None:
    if text is None:
        return None
    if text.lower() in ("1", "true", "t", "yes", "y"):
        return True
    if text.lower() in ("0", "false", "f", "no", "n"):
        return False
    raise EngineError(f"--rdzv-conf is_host={text}: true or false is expected")


def _above_0(conf: Mapping[str, str], key: str, default: float) -> float:
    value = seconds_of(conf, key, default)
    if not value:
        raise EngineError(f"--rdzv-conf {key}={conf[key]}: expected more than 0")
    return value


def _is_ours(host: str) -> bool:
    """Whether it is a name or an address of this machine."""
    if host in ("localhost", socket.gethostname()):
        return True
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    ours = {a.address.partition("%")[0] for all_ in psutil.net_if_addrs().values() for a in all_}
    return any(address in ours or ipaddress.ip_address(address).is_loopback for address in found)


def _tcp_store() -> Any:
    try:
        from torch import distributed
    except ImportError as exc:
        raise EngineError(
            f"--rdzv-backend=c10d is torch's own store, and torch cannot be imported: {exc}",
            hint="pip install torch, or use etcd: --rdzv-backend=etcd",
        ) from None
    if not distributed.is_available():
        raise EngineError(
            "--rdzv-backend=c10d: this torch was built without torch.distributed",
            hint="use etcd: --rdzv-backend=etcd",
        )
    return distributed.TCPStore


async def _listens(options: C10dOptions) -> bool:
    try:
        async with asyncio.timeout(2.0):
            _, writer = await asyncio.open_connection(options.host, options.port)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


async def _wait_listens(options: C10dOptions) -> None:
    # Not left to torch, which fills the console with stacks of its own when nobody answers.
    attempts = 0
    while not await _listens(options):
        await asyncio.sleep(_PAUSES_S[min(attempts, len(_PAUSES_S) - 1)])
        attempts += 1


async def _hosted(make: Any, options: C10dOptions) -> Any:
    """The store, if it is for us to host it and nobody on this machine does so already."""
    is_host = options.is_host
    if is_host is None:
        is_host = await asyncio.to_thread(_is_ours, options.host)
        if is_host and options.port and await _listens(options):
            return None
    if not is_host:
        return None
    timeout = timedelta(seconds=options.read_timeout_s)
    try:
        return await asyncio.to_thread(
            make, options.host, options.port, is_master=True, multi_tenant=True, timeout=timeout
        )
    except (RuntimeError, OSError, ValueError) as exc:
        if options.is_host is None:
            return None  # another agent on this machine was faster
        raise EngineError(f"{options.name} cannot be hosted here: {first_line(exc)}") from None


async def _opened(make: Any, options: C10dOptions, prefix: str, reader: Reader) -> StoreLog:
    timeout = timedelta(seconds=options.read_timeout_s)

    def connect() -> Store:
        store: Store = make(
            options.host, options.port, is_master=False, multi_tenant=True, timeout=timeout
        )
        return store

    try:
        async with asyncio.timeout(options.read_timeout_s):
            return await StoreLog.open(
                options.name, prefix, connect, lambda: _wait_listens(options),
                options.lease_s * _HOLE_SHARE, reader,
            )  # fmt: skip
    except TimeoutError:
        raise EngineError(
            f"{options.name} does not answer within {options.read_timeout_s:g} s",
            hint="is the node that hosts it up? --rdzv-endpoint HOST:PORT, the same for all nodes",
        ) from None


async def _linger(engine: LogEngine, timeout_s: float) -> None:
    """Who hosts the store leaves last, when the run is over, so that all can read that it is."""
    with contextlib.suppress(EngineError, TimeoutError):
        entry = (await engine.read("state/round")).entries.get("state/round")
        if entry and read_record(Round, entry.value, "state/round").state == "over":
            async with asyncio.timeout(timeout_s):
                await engine.wait_alone()


@asynccontextmanager
async def open_engine(options: C10dOptions, run_id: str) -> AsyncIterator[LogEngine]:
    """An engine in the store, which lives as long as the context where it is ours.

    Raises:
        EngineError: if torch is missing, or the store cannot be had.
    """
    make = await asyncio.to_thread(_tcp_store)
    server = await _hosted(make, options)
    try:
        if server is not None:
            options = replace(options, port=server.port)
        engine = await LogEngine.open(
            lambda reader: _opened(make, options, f"asupervise/{run_id}/", reader),
            lease_s=options.lease_s,
            timeout_s=min(10.0, options.read_timeout_s),
        )
        try:
            try:
                yield engine
            except Exception:
                if server is not None:
                    await _linger(engine, options.read_timeout_s)
                raise
            if server is not None:
                await _linger(engine, options.read_timeout_s)
        finally:
            await engine.close()
    finally:
        del server


@asynccontextmanager
async def open(request: Request) -> AsyncIterator[Coordinator]:
    """Take part in a run whose nodes agree through torch's store.

    Raises:
        EngineError: if torch is missing, the store cannot be had, or an option is impossible.
    """
    options = C10dOptions.of(request)
    async with (
        open_engine(options, request.run_id) as engine,
        Coordinator.open(engine, request.node, request.terms, request.policy) as coordinator,
    ):
        yield coordinator
