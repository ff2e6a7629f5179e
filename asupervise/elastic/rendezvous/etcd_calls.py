"""Calls to etcd over several endpoints: tried again elsewhere, authenticated, errors explained."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from asupervise.elastic.engine import EngineError, LeaseLostError

__all__ = ["ATTEMPT_S", "REQUIRE_LEADER", "EtcdCalls", "EtcdConfig"]

T = TypeVar("T")

# One that does not answer is left for the next endpoint after so long.
ATTEMPT_S: Final = 2.0
# A member without a leader answers at once; so does a port where nobody listens.
_PAUSES_S: Final = (0.02, 0.05, 0.1, 0.2, 0.5)
# For gRPC, to let go of calls that were cancelled.
_LET_GO_S: Final = 0.2
_OPTIONS: Final = (
    # Every 5 s is as often as etcd takes by default (--grpc-keepalive-min-time).
    ("grpc.keepalive_time_ms", 5_500),
    ("grpc.keepalive_timeout_ms", 2_000),
    # Without it a ping that is not answered counts for nothing for a minute (seen with 1.85).
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    # A member that was cut off and has come back is not to be waited for (up to two minutes).
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # By its name a pause; it is the time that connecting may take, TLS included (gRPC's
    # doc/connection-backoff.md, MIN_CONNECT_TIMEOUT).
    ("grpc.min_reconnect_backoff_ms", int(ATTEMPT_S * 1000)),
    ("grpc.use_local_subchannel_pool", 1),
    # A proxy of the site's is for its web.
    ("grpc.enable_http_proxy", 0),
)
# A member that has lost the others says so, instead of serving what was true then
# (etcd's clientv3.WithRequireLeader).
REQUIRE_LEADER: Final = (("hasleader", "true"),)


@dataclass(frozen=True)
class EtcdConfig:
    """Where etcd is, and how to speak to it.

    Attributes:
        endpoints: ``host:port`` of one or several members.
        prefix: stands before all keys of the run.
        lease_s: seconds after which a node that is silent is gone; etcd grants no less than 2.
        timeout_s: how long a call may take over all endpoints.
        tls: whether to use TLS.
        ca: PEM of the authorities, where they are not the system's.
        cert: PEM of our certificate, where the members ask for one.
        key: PEM of its key.
        user: where the members ask for one.
        password: of the user.
    """

    endpoints: tuple[str, ...]
    prefix: str
    lease_s: float = 10.0
    timeout_s: float = 10.0
    tls: bool = False
    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = None
    user: str | None = None
    password: str | None = None


class EtcdCalls:
    """Channels to the members of an etcd.

    Attributes:
        rpc: gRPC's messages and stubs of etcd's API.
        RpcError: what gRPC raises.
        EOF: what a stream that has ended reads.
        operations: how many calls were made, by name.
    """

    def __init__(self, config: EtcdConfig) -> None:
        import grpc
        from aetcd import rpc

        self.rpc: Any = rpc
        self.RpcError: Any = grpc.aio.AioRpcError
        self.EOF: Any = grpc.aio.EOF
        self.operations: dict[str, int] = Counter()
        self._grpc: Any = grpc
        self._config = config
        self._channels: dict[str, Any] = {}
        # Not all nodes ask the first member.
        self._endpoints = list(config.endpoints)
        random.shuffle(self._endpoints)
        self._token: str | None = None

    async def call(
        self, name: str, method: str, request: Any, *, timeout_s: float | None = None
    ) -> Any:
        """Make a call of one request and one answer.

        Args:
            name: that it is counted by.
            method: such as ``"KV.Range"``.
            request: its message.
            timeout_s: seconds over all endpoints, where they are not the configuration's.

        Raises:
            EngineError: when nobody answers in time; when it is refused; see `refusal`.
        """
        service, function = method.split(".")

        async def once(endpoint: str, attempt_s: float) -> Any:
            call = getattr(self.stub(endpoint, service), function)
            return await call(request, timeout=attempt_s, metadata=self.metadata())

        self.operations[name] += 1
        return await self.retried(name, once, timeout_s=timeout_s)

    async def retried(
        self,
        name: str,
        once: Callable[[str, float], Awaitable[T]],
        *,
        timeout_s: float | None = None,
        attempt_s: float = ATTEMPT_S,
    ) -> T:
        """Try endpoint after endpoint, each for `attempt_s`, until one answers or time is up."""
        deadline = time.monotonic() + (timeout_s or self._config.timeout_s)
        failures = 0
        refused = False
        while True:
            endpoint = self._endpoints[0]
            # Also where there is hardly any time, so that the reason is the engine's.
            left_s = max(0.05, min(attempt_s, deadline - time.monotonic()))
            try:
                await self._authenticate(endpoint, left_s)
                return await once(endpoint, left_s)
            except self.RpcError as error:
                # The token has ended with the member that gave it, with time, or with a change of
                # users; a new one that is refused as well is no matter of time.
                renewed = self._forget_token(error) and not refused
                refused = refused or renewed
                passing = renewed or self._may_pass(error, failures)
                if passing:
                    # Also where our time is up: somebody else's next call is not to wait for it.
                    self._leave(endpoint)
                if not passing or time.monotonic() >= deadline:
                    raise self.refusal(name, error) from None
                await self._pause(failures)
                failures += 1

    async def after_failure(self, endpoint: str, failures: int) -> None:
        """Turn to the next endpoint; after all have failed, only in a moment."""
        self._leave(endpoint)
        await self._pause(failures)

    def _leave(self, endpoint: str) -> None:
        if self._endpoints[0] == endpoint:
            self._endpoints.append(self._endpoints.pop(0))

    async def _pause(self, failures: int) -> None:
        rounds = failures // len(self._endpoints)
        await asyncio.sleep(_PAUSES_S[min(rounds, len(_PAUSES_S) - 1)])

    def stub(self, endpoint: str, service: str) -> Any:
        """The calls of ``KV``, ``Lease``, ``Watch`` or ``Auth`` at a member."""
        return getattr(self.rpc, f"{service}Stub")(self._channel(endpoint))

    def metadata(self, more: tuple[tuple[str, str], ...] = ()) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        return more if self._token is None else (("token", self._token), *more)

    async def close(self) -> None:
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()
        # gRPC lets go of a call that was cancelled in a task of its own, an instant later, and
        # tells nobody. Such a task may also be of a call that is none of ours: not for long.
        left = [
            task
            for task in asyncio.all_tasks()
            if getattr(task.get_coro(), "__qualname__", "").startswith("_AioCall.")
        ]
        if left:
            await asyncio.wait(left, timeout=_LET_GO_S)

    def _channel(self, endpoint: str) -> Any:
        if endpoint not in self._channels:
            aio, config = self._grpc.aio, self._config
            if config.tls:
                credentials = self._grpc.ssl_channel_credentials(config.ca, config.key, config.cert)
                channel = aio.secure_channel(endpoint, credentials, options=_OPTIONS)
            else:
                channel = aio.insecure_channel(endpoint, options=_OPTIONS)
            self._channels[endpoint] = channel
        return self._channels[endpoint]

    # --- who we are ------------------------------------------------------------------------------

    async def _authenticate(self, endpoint: str, timeout_s: float) -> None:
        if self._config.user is None or self._token is not None:
            return
        request = self.rpc.AuthenticateRequest(
            name=self._config.user, password=self._config.password or ""
        )
        stub = self.stub(endpoint, "Auth")
        self._token = (await stub.Authenticate(request, timeout=timeout_s)).token

    def _forget_token(self, error: Any) -> bool:
        """Whether the error may be our token's, which is then not used again."""
        if self._token is None or not self._is_refusal(error):
            return False
        self._token = None
        return True

    def _is_refusal(self, error: Any) -> bool:
        status = self._grpc.StatusCode
        if error.code() in (status.UNAVAILABLE, status.DEADLINE_EXCEEDED):
            return False
        # "etcdserver: revision of auth store is old" has no status of its own, and a watch none.
        said = (
            "authentication", "auth store", "auth token", "user name is empty", "permission denied",
        )  # fmt: skip
        return error.code() in (status.UNAUTHENTICATED, status.PERMISSION_DENIED) or any(
            words in (error.details() or "") for words in said
        )

    # --- errors ----------------------------------------------------------------------------------

    def error(self, code: str, details: str) -> Exception:
        """As a call raises it, for what a stream says in its own words."""
        empty = self._grpc.aio.Metadata()
        error: Exception = self.RpcError(
            getattr(self._grpc.StatusCode, code), empty, empty, details=details
        )
        return error

    def _may_pass(self, error: Any, failures: int) -> bool:
        """Whether another endpoint, or another moment, may bring another answer."""
        code = self._grpc.StatusCode
        if self._is_about_tls(error):
            # No time mends a certificate; and gRPC writes a line to stderr each time.
            return failures + 1 < len(self._endpoints)
        return not self._is_refusal(error) and error.code() in (
            code.UNAVAILABLE, code.DEADLINE_EXCEEDED, code.CANCELLED, code.INTERNAL, code.UNKNOWN,
            code.RESOURCE_EXHAUSTED,
        )  # fmt: skip

    def _is_about_tls(self, error: Any) -> bool:
        # What BoringSSL and gRPC say of one that is not trusted, is not there, or is none.
        said = ("TSI_PROTOCOL_FAILURE", "TSI_DATA_CORRUPTED", "security handshaker")
        return self._config.tls and any(words in (error.details() or "") for words in said)

    def refusal(self, name: str, error: Any) -> EngineError:
        """What to tell the user of a call that has failed for good."""
        where = ", ".join(sorted(self._config.endpoints))
        code, details = error.code(), error.details() or ""
        status = self._grpc.StatusCode
        if "requested lease not found" in details:
            return LeaseLostError("our lease has ended")
        if self._is_about_tls(error):
            return EngineError(
                f"etcd at {where}: no TLS with it: {details}",
                hint="--rdzv-conf cacert=FILE; also cert=FILE,key=FILE where it asks for ours",
            )
        if self._is_refusal(error):
            return EngineError(
                f"etcd at {where} refuses us: {details}",
                hint="--rdzv-conf user=NAME,password_file=FILE",
            )
        if code in (status.UNAVAILABLE, status.DEADLINE_EXCEEDED):
            how = "with TLS" if self._config.tls else "without TLS"
            return EngineError(
                f"etcd at {where} does not answer within {self._config.timeout_s:g} s: {details}",
                hint=f"is it running, reachable from here, and {how}? --rdzv-endpoint HOST:PORT",
            )
        return EngineError(f"etcd at {where}: {name}: {details or code.name}")
