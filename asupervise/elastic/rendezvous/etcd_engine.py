"""The engine is etcd, by its v3 API (https://etcd.io/docs/v3.5/learning/api/).

The calls are gRPC's own stubs for etcd's protocol as `aetcd` ships them. Its client is not used,
for it knows one endpoint, no TLS, and not when a keep-alive was sent, which fencing is reckoned
from. `etcd-client-py`, the other one that is kept, cannot put a key under a lease and tells no
revisions.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

from asupervise.elastic.engine import (
    Absent,
    Change,
    Condition,
    Delete,
    EngineError,
    Entry,
    LeaseLostError,
    Put,
    Snapshot,
    Write,
)
from asupervise.elastic.rendezvous.etcd_calls import (
    ATTEMPT_S,
    REQUIRE_LEADER,
    EtcdCalls,
    EtcdConfig,
)

__all__ = ["EtcdConfig", "EtcdEngine"]

# How much faster than ours a clock of a member may run, which ends leases sooner: crystals differ
# by a ten-thousandth at the most.
_DRIFT: Final = 0.001
# After a renewal has failed at every endpoint.
_PAUSE_S: Final = 0.2
# Before all names of the run: what a range over all of them leaves out.
_MARKS: Final = "\0"


class EtcdEngine:
    """An `Engine`; made by :meth:`open`."""

    def __init__(self, config: EtcdConfig) -> None:
        self._config = config
        self._calls = EtcdCalls(config)
        self._rpc = self._calls.rpc
        self._lease = 0
        self._alive_until = 0.0
        self.on_renewal: Callable[[], None] = lambda: None
        # The newest of raft's terms that a member has shown us.
        self._term = 0
        self._keeper: asyncio.Task[None] | None = None
        self._committing = asyncio.Lock()
        self._commits = 0
        # The revision of the last commit of ours under this lease that we know of.
        self._mark = 0
        self.lease_s = config.lease_s
        self.operations = self._calls.operations

    @classmethod
    async def open(cls, config: EtcdConfig) -> EtcdEngine:
        """Connect, and begin a lease.

        Raises:
            EngineError: if no endpoint answers in time, naming them; if the user is refused.
        """
        engine = cls(config)
        try:
            await engine.new_lease()
        except BaseException:
            await engine.close()
            raise
        return engine

    @property
    def alive_until(self) -> float:
        return self._alive_until

    # --- the lease ---------------------------------------------------------------------------

    async def new_lease(self) -> None:
        await self._end_lease()
        # Before it is sent: the member counts from when it arrives.
        sent = time.monotonic()
        granted = await self._grant(self._config.lease_s)
        self._lease, self._mark = granted.ID, 0
        self.lease_s = float(granted.TTL)
        self._lasts_until(sent + self._certain_s(granted.TTL))
        self._keeper = asyncio.create_task(self._keep(), name="asupervise etcd lease")

    async def _grant(self, seconds: float) -> Any:
        request = self._rpc.LeaseGrantRequest(TTL=max(2, round(seconds)))
        return await self._calls.call("lease", "Lease.LeaseGrant", request)

    @staticmethod
    def _certain_s(ttl: int) -> float:
        return ttl * (1 - _DRIFT)

    async def _keep(self) -> None:
        """Refresh the lease until it is lost."""
        pause_s = self.lease_s / 4
        while self._lease:
            await asyncio.sleep(pause_s)
            try:
                await self._refresh()
                pause_s = self.lease_s / 4
            except EngineError:
                # Tried again for as long as it may still be there; `alive_until` says the rest.
                pause_s = _PAUSE_S

    async def _refresh(self) -> None:
        lease = self._lease
        if not lease:
            return
        self.operations["keep-alive"] += 1

        async def once(endpoint: str, timeout_s: float) -> tuple[float, int]:
            return await self._renewed(lease, endpoint, timeout_s)

        # So that two members may be halted, and the lease is renewed when half of it is over.
        sent, ttl = await self._calls.retried(
            "keep-alive", once, timeout_s=self.lease_s / 2, attempt_s=self.lease_s / 8
        )
        if lease != self._lease:
            return  # given back meanwhile
        if ttl:
            self._lasts_until(sent + self._certain_s(ttl))
        else:
            self._lose_lease()

    async def _renewed(self, lease: int, endpoint: str, timeout_s: float) -> tuple[float, int]:
        """When a renewal was sent, and for how many seconds it is granted; 0: it is gone."""
        call = self._calls.stub(endpoint, "Lease").LeaseKeepAlive(
            metadata=self._calls.metadata(REQUIRE_LEADER), timeout=timeout_s
        )
        try:
            sent = time.monotonic()
            await call.write(self._rpc.LeaseKeepAliveRequest(ID=lease))
            reply = await call.read()
        finally:
            call.cancel()
        if reply is self._calls.EOF:
            raise self._calls.error("UNAVAILABLE", "the keep-alive was not answered")
        if reply.header.raft_term < self._term:
            # A leader that was halted, and is none by now, renews leases until it learns of that
            # (etcd issue 15247).
            raise self._calls.error("UNAVAILABLE", "the member is behind the others")
        self._term = reply.header.raft_term
        return sent, reply.TTL

    def _lose_lease(self) -> None:
        self._lease = 0
        self._lasts_until(min(self._alive_until, time.monotonic()))

    def _lasts_until(self, moment: float) -> None:
        self._alive_until = moment
        self.on_renewal()

    async def _end_lease(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        if lease := self._lease:
            self._lose_lease()
            request = self._rpc.LeaseRevokeRequest(ID=lease)
            # What cannot be given back ends by itself.
            with contextlib.suppress(EngineError):
                await self._calls.call("revoke", "Lease.LeaseRevoke", request, timeout_s=ATTEMPT_S)

    async def close(self) -> None:
        try:
            await self._end_lease()
        finally:
            await self._calls.close()

    # --- keys --------------------------------------------------------------------------------

    async def read(self, under: str = "") -> Snapshot:
        start, end = self._range(under)
        got = await self._calls.call(
            "read", "KV.Range", self._rpc.RangeRequest(key=start, range_end=end)
        )
        entries = {self._name(kv.key): self._entry(kv) for kv in got.kvs}
        return Snapshot(entries, got.header.revision)

    async def commit(self, conditions: Sequence[Condition], writes: Sequence[Write]) -> int | None:
        """Write all, if all conditions hold, once.

        An attempt that was not answered may come through, at once or when a halted member goes on.
        So each commit also writes a mark, and is done only if nobody of us has written that since:
        it is done once at the most, never after a later one of ours, and if we ask again we learn
        that it was done.
        """
        leases = [await self._lease_of(write) for write in writes]
        operations = [self._operation(w, n) for w, n in zip(writes, leases, strict=True)]
        compare = [self._compare(condition) for condition in conditions]
        async with self._committing:
            self._commits += 1
            try:
                while self._lease:
                    done, revision = await self._commit_marked(compare, operations)
                    if done:
                        return revision
            except LeaseLostError:
                self._lose_lease()
            if any(isinstance(write, Put) and write.leased for write in writes):
                raise LeaseLostError("our lease has ended")
            return await self._commit_unmarked(compare, operations)

    async def _commit_marked(
        self, compare: list[Any], operations: list[Any]
    ) -> tuple[bool, int | None]:
        """Whether it is decided, and the revision if it is done."""
        key, number = self._key(f"{_MARKS}{self._lease:x}"), str(self._commits).encode()
        mark = self._rpc.PutRequest(key=key, value=number, lease=self._lease)
        request = self._rpc.TxnRequest(
            compare=[self._compare_key(key, self._mark), *compare],
            success=[self._rpc.RequestOp(request_put=mark), *operations],
            failure=[self._rpc.RequestOp(request_range=self._rpc.RangeRequest(key=key))],
        )
        reply = await self._calls.call("commit", "KV.Txn", request)
        if reply.succeeded:
            self._mark = reply.header.revision
            return True, self._mark
        found = [(kv.mod_revision, kv.value) for kv in reply.responses[0].response_range.kvs]
        before = self._mark
        self._mark, value = found[0] if found else (0, b"")
        if self._mark == before:
            return True, None
        # If it is not this one, then one that was given up has come through.
        return value == number, self._mark

    async def _commit_unmarked(self, compare: list[Any], operations: list[Any]) -> int | None:
        request = self._rpc.TxnRequest(compare=compare, success=operations)
        reply = await self._calls.call("commit", "KV.Txn", request)
        return reply.header.revision if reply.succeeded else None

    async def _lease_of(self, write: Write) -> int:
        if isinstance(write, Delete):
            return 0
        if write.leased and not self._lease:
            raise LeaseLostError("our lease has ended")
        if write.keep_s:
            return int((await self._grant(write.keep_s)).ID)
        return self._lease if write.leased else 0

    def _compare(self, condition: Condition) -> Any:
        modified = 0 if isinstance(condition, Absent) else condition.modified
        return self._compare_key(self._key(condition.key), modified)

    def _compare_key(self, key: bytes, modified: int) -> Any:
        compare = self._rpc.Compare
        # Of a key that is not there, 0.
        return compare(key=key, target=compare.MOD, result=compare.EQUAL, mod_revision=modified)

    def _operation(self, write: Write, lease: int) -> Any:
        if isinstance(write, Delete):
            start, end = self._range(write.key) if write.under else (self._key(write.key), b"")
            request = self._rpc.DeleteRangeRequest(key=start, range_end=end)
            return self._rpc.RequestOp(request_delete_range=request)
        put = self._rpc.PutRequest(
            key=self._key(write.key), value=write.value.encode(), lease=lease
        )
        return self._rpc.RequestOp(request_put=put)

    def _key(self, name: str) -> bytes:
        return (self._config.prefix + name).encode()

    def _range(self, under: str) -> tuple[bytes, bytes]:
        start = self._key(under)
        end = start[:-1] + bytes([start[-1] + 1])
        return (start if under else start + b"\x01"), end

    def _name(self, key: bytes) -> str:
        return key.decode(errors="replace")[len(self._config.prefix) :]

    @staticmethod
    def _entry(kv: Any) -> Entry:
        return Entry(kv.value.decode(errors="replace"), kv.create_revision, kv.mod_revision)

    # --- watches -----------------------------------------------------------------------------

    async def watch(self, under: str, after: int) -> AsyncIterator[Sequence[Change]]:
        self.operations["watch"] += 1
        seen = after
        failures = 0
        while True:
            endpoint, call = await self._open_watch(under, seen)
            try:
                while True:
                    response = self._checked(await call.read())
                    if response.events:
                        changes = [self._change(event) for event in response.events]
                        # Not the header's: while it catches up that is where etcd is, and not
                        # where the events have come to.
                        seen, failures = changes[-1].revision, 0
                        yield changes
            except self._calls.RpcError:
                await self._calls.after_failure(endpoint, failures)
                failures += 1
            finally:
                call.cancel()

    async def _open_watch(self, under: str, seen: int) -> tuple[str, Any]:
        """A watch that a member has begun, and which member."""
        start, end = self._range(under)
        create = self._rpc.WatchCreateRequest(key=start, range_end=end, start_revision=seen + 1)

        async def once(endpoint: str, timeout_s: float) -> tuple[str, Any, int]:
            metadata = self._calls.metadata(REQUIRE_LEADER)
            call = self._calls.stub(endpoint, "Watch").Watch(metadata=metadata)
            try:
                # The call itself has no end.
                async with asyncio.timeout(timeout_s):
                    await call.write(self._rpc.WatchRequest(create_request=create))
                    created = self._checked(await call.read())
            except TimeoutError:
                call.cancel()
                raise self._calls.error("DEADLINE_EXCEEDED", "the watch was not begun") from None
            except BaseException:
                call.cancel()
                raise
            return endpoint, call, created.header.revision

        endpoint, call, revision = await self._calls.retried("watch", once)
        if revision < seen:
            try:
                await self._check_data(seen)
            except BaseException:
                call.cancel()
                raise
        return endpoint, call

    def _checked(self, response: Any) -> Any:
        if response is self._calls.EOF:
            raise self._calls.error("UNAVAILABLE", "the watch has ended")
        if response.compact_revision:
            raise EngineError("watch: what was asked for is compacted away")
        if response.canceled:
            # As a failed call: "no leader", mostly, so that another member is asked; or our token
            # has ended.
            raise self._calls.error("UNKNOWN", response.cancel_reason)
        return response

    async def _check_data(self, seen: int) -> None:
        """A member that is merely behind begins a watch as well; all together are not behind."""
        if (await self.read("watch")).revision < seen:
            raise EngineError("etcd has lost its data: its revisions begin anew")

    def _change(self, event: Any) -> Change:
        deleted = event.type == self._rpc.Event.DELETE
        entry = None if deleted else self._entry(event.kv)
        return Change(self._name(event.kv.key), entry, event.kv.mod_revision)
