"""Fencing: the workers of a node that cannot renew its lease are dead before others have its ranks.

**The arithmetic.** All times are of this machine's CLOCK_MONOTONIC unless said otherwise.

====== ==========================================================================================
s      when a keep-alive was *sent*: read off the clock before its first byte leaves
r      when it was handled; r > s
L      for how long the lease is granted then (TTL), on the engine's clock
d      drift: so much faster, at the most, may that clock run than ours (a thousandth; crystals
       differ by a ten-thousandth)
A      ``alive_until`` = s + L (1 - d)
k      from the watchdog's deadline until the last worker is dead: it wakes up, looks, sends
       SIGKILL, and the kernel takes the processes down
====== ==========================================================================================

1. The lease ends no sooner than L after r on the engine's clock, that is L (1 - d) after r on ours,
   so not before A. Nobody learns of its end before that, nobody decides on a round without us
   before that, and no worker of that round starts before that. An answer that is lost, or comes
   late, leaves A where it was: too early, never too late. Renewals are sent one after another, so
   A never moves back but when the engine says that the lease is gone.
2. At A - 0.4 L our agent asks the workers to end (SIGTERM), at A - 0.2 L it sends SIGKILL: the two
   that only an agent can do that runs. Renewals are L / 4 apart, so that one may fail and be tried
   again before the first of them.
3. At A - 0.1 L the watchdog sends SIGKILL, whatever the agent does: stopped, swapped out, or with
   its event loop blocked. It was told A when A was known, or not at all; and then it acts on the
   former one, which is sooner.
4. So the last worker is dead at A - 0.1 L + k at the latest, which is before A as long as
   k < 0.1 L: 1 s of the default 10 s, 0.2 s of the least that etcd grants. It takes some
   10 ms for a few hundred processes.

5. An agent that has stood still starts no worker behind the watchdog's back: it looks at the clock
   before each one's start, and the watchdog knows the group before the first.

Hence no two workers of one global rank are alive at once.

**What is not guaranteed.** A process in uninterruptible sleep dies when the kernel lets it, and one
that has changed its user when somebody else kills it. The watchdog has to run within those 0.1 L:
it does not where it is stopped as well (a frozen cgroup, then with the workers in it), was killed,
or finds neither memory nor a processor. A descendant that has wiped its environment, left its
session and lost its parent is not found, unless a cgroup was delegated. A lease that an
administrator revokes, or an engine that loses its data, ends it without a warning: then A is what
is left of it, nothing, as soon as the next keep-alive is answered. And an agent that is stopped in
the microseconds between its look at the clock and a worker's start lets that one live, when it goes
on, until it looks again.

And a machine that is suspended as a whole: CLOCK_MONOTONIC stands still meanwhile, and the workers
with it, but others' clocks go on. CLOCK_BOOTTIME would go on, too, but nothing wakes a process for
it before the workers run as well: it would make their second life shorter and not prevent it, and
nothing at all in a virtual machine that is paused, where both stand still. So all of the reckoning
is on CLOCK_MONOTONIC, which is asyncio's clock and, unlike that of CLOCK_BOOTTIME, the one that
poll(2) waits on. Wall clocks, which may jump, have no part in it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from math import inf
from typing import TYPE_CHECKING, Final, NamedTuple

from asupervise import procfs
from asupervise._compat import Exit, spawn
from asupervise.shielding import run_in_any_case

if TYPE_CHECKING:
    from asupervise.context import PContext
    from asupervise.elastic.rendezvous import Rendezvous

__all__ = ["Deadlines", "Watchdog", "deadlines_of", "watched"]

_ASK_SHARE: Final = 0.4
_KILL_SHARE: Final = 0.2
_WATCHDOG_SHARE: Final = 0.1
_GOODBYE_LIMIT_S: Final = 2.0
_PROGRAM: Final = (
    "import sys; sys.path.insert(0, sys.argv[2]); "
    "from asupervise.elastic.watchdog_main import main; main(int(sys.argv[3]))"
)


class Deadlines(NamedTuple):
    """When the workers of a node must end if its lease is not renewed, on ``time.monotonic()``.

    Attributes:
        ask: the agent sends SIGTERM.
        kill: the agent sends SIGKILL.
        watchdog: the watchdog does.
    """

    ask: float
    kill: float
    watchdog: float


def deadlines_of(alive_until: float, lease_s: float) -> Deadlines:
    """The deadlines of a lease; the module's text says why these.

    Args:
        alive_until: how long it lasts for certain.
        lease_s: for how long it is granted each time.

    Example:
        >>> deadlines_of(alive_until=110.0, lease_s=10.0)
        Deadlines(ask=106.0, kill=108.0, watchdog=109.0)
    """
    return Deadlines(
        *(alive_until - share * lease_s for share in (_ASK_SHARE, _KILL_SHARE, _WATCHDOG_SHARE))
    )


class Watchdog:
    """The agent's side of the process; made by :func:`watched`.

    Attributes:
        pid: its process id; 0 where there is none, because no lease can be lost.
        lost: whether it has ended before we told it to.
    """

    def __init__(self) -> None:
        self.pid = 0
        self.lost = False
        self._deadline = inf
        self._socket: socket.socket | None = None
        self._exited = asyncio.Event()
        self._heard = b""

    async def start(self) -> None:
        """Start the process.

        Raises:
            OSError: if it cannot be started.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            try:
                process = await spawn(
                    _command(),
                    on_exit=self._on_exit,
                    stdin=theirs,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    # Not ours: a token of an outer supervisor would make it a victim of that sweep.
                    env={"PATH": os.defpath},
                    cwd="/",
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        self.pid, self._socket = process.pid, ours
        self.until(self._deadline)

    def _on_exit(self, exit: Exit) -> None:
        self.lost = self._socket is not None
        self._exited.set()

    def until(self, deadline: float) -> None:
        """The workers may live until then, and no longer unless another moment is told."""
        self._deadline = deadline
        self._write(f"until {deadline!r}\n")

    def permits(self) -> bool:
        """Whether a worker may be started now."""
        return time.monotonic() < self._deadline

    @contextmanager
    def guarding(self, token: str) -> Iterator[None]:
        """All with this token in their environment are the group, for as long as this lasts."""
        self._write(f"group {token}\n")
        try:
            yield
        finally:
            self._write("none\n")

    def adopt(self, ctx: PContext) -> None:
        """The group has been started: it is known by more than its token from now on."""
        if not self.pid:
            return
        ctx.spare(self.pid)
        leaders = (procfs.read_entry(pid) for pid in ctx.pids().values())
        named = " ".join(f"{entry.pid}:{entry.start_ticks}" for entry in leaders if entry)
        cgroup = f"cgroup {ctx.cgroup}\n" if ctx.cgroup else ""
        self._write(f"leaders {named}\n{cgroup}")

    def has_ended(self, token: str) -> bool:
        """Whether it has ended that group, or is about to."""
        if self._socket is not None:
            try:
                self._heard += self._socket.recv(1 << 16)
            except OSError:
                pass  # nothing new; or it is gone, and what it has said we have read
        return f"ended {token}".encode() in self._heard.split(b"\n")

    async def close(self) -> None:
        """Let the process end. Returns when it has."""
        if self._socket is not None:
            ours, self._socket = self._socket, None
            ours.close()
        if not self.pid:
            return
        try:
            async with asyncio.timeout(_GOODBYE_LIMIT_S):
                await self._exited.wait()
        except TimeoutError:
            # Somebody has stopped it.
            os.kill(self.pid, signal.SIGKILL)
            await self._exited.wait()

    def _write(self, lines: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendall(lines.encode(errors="surrogateescape"))
        except OSError:
            # Gone, as `lost` tells; or it has not read for so long that there is no more room.
            self.lost = True


def _command() -> tuple[str, ...]:
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    options = (sys.executable, "-I", "-S", "-c", _PROGRAM)
    return (*options, "asupervise-watchdog", root, str(os.getpid()))


@asynccontextmanager
async def watched(rendezvous: Rendezvous) -> AsyncIterator[Watchdog]:
    """A watchdog beside this process for as long as the context lasts, where there is a lease.

    Raises:
        OSError: if it cannot be started.
    """
    watchdog = Watchdog()
    if not rendezvous.tell_deadlines(watchdog.until):
        yield watchdog
        return
    try:
        await watchdog.start()
    except OSError as exc:
        why = exc.strerror or str(exc)
        raise OSError(exc.errno, f"cannot start the watchdog: {why}") from exc
    try:
        yield watchdog
    finally:
        await run_in_any_case(watchdog.close)
