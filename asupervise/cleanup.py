"""The cleanup ladder: how a group ends, whatever made it end.

1. the chosen signal to every worker's process group, also where its leader is dead; a stopped
   process is continued, so that it can answer;
2. after the grace, SIGKILL to what is left of the groups;
3. a sweep for descendants that left their group or session (``setsid``, double fork), found by
   the token that they inherited in their environment;
4. a bounded wait: what cannot die is named and no longer waited for.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from asupervise import procfs
from asupervise.newcomers import Newcomers

if TYPE_CHECKING:
    # A guardian that has become the sweeper has a second from its first instruction to the last
    # orphan's end; it needs neither handlers nor what they import.
    from asupervise.cgroups import OwnCgroup
    from asupervise.handler import SubprocessHandler

# How long a SIGKILLed process may take to go: longer means uninterruptible sleep.
KILL_WAIT_S = 5.0
# The grace of descendants that outlived their worker: nobody is left who could need them.
SWEEP_GRACE_S = 1.0
_SWEEP_ROUNDS = 200
# When those that have not ended are continued, in case that they are stopped.
_RESUME_S = 0.005
# How often to look around before nobody counts as found, on a machine where processes come and go.
_LOOKS = 5
_CHASES = 100
# How long a look at the stacks of those about to be killed may take.
_LAST_LOOK_S = 8.0


class Survivor(NamedTuple):
    """A process of the group that could not be ended.

    Attributes:
        entry: which one.
        local_rank: the worker that it is or descends from, where known.
        wait_channel: the kernel function that it sleeps in.
        why: what stood in the way, in words.
    """

    entry: procfs.ProcessEntry
    local_rank: int | None
    wait_channel: str
    why: str

    def __str__(self) -> str:
        rank = "" if self.local_rank is None else f" of local rank {self.local_rank}"
        channel = f" in {self.wait_channel}" if self.wait_channel else ""
        return (
            f"process {self.entry.pid} ({self.entry.name}){rank} could not be ended: {self.why} "
            f"(state {self.entry.state}{channel})"
        )


class Cleanup:
    """Ends one group. Made before the first process starts; :meth:`run` is called once.

    Args:
        token: what every process of the group inherits in its environment.
        leaders: processes, by pid and start time, whose sessions belong to the group; for a
            group that somebody else has started.
        adopts: whether orphans of the group become our children (a subreaper): then whoever is
            our child and not ours by other means is one, whatever it did to its environment.
        before_kill: awaited, for a bounded time, when the grace is over and a worker still
            runs; not where there was no grace, or somebody is in a hurry.
        on_signal: told which signal went to which local ranks, those that still ran.
    """

    def __init__(
        self,
        token: str,
        *,
        leaders: Sequence[tuple[int, int]] = (),
        adopts: Callable[[int], bool] | None = None,
        before_kill: Callable[[], Awaitable[None]] | None = None,
        on_signal: Callable[[int, Sequence[int]], None] = lambda _sig, _ranks: None,
    ) -> None:
        self._on_signal = on_signal
        self._token = token.encode()
        self._leaders = leaders
        self._adopts = adopts
        self._before_kill = before_kill
        self._newcomers = Newcomers()
        self._handlers: Sequence[SubprocessHandler] = ()
        self._wake = asyncio.Event()
        self._deadline = float("inf")
        self._signal = 0
        self._refused: dict[int, str] = {}
        self._hurried = False
        self._resuming: asyncio.TimerHandle | None = None
        self._look: asyncio.Timeout | None = None
        # Descendants, by pid and start time, that were seen while their parents still lived.
        self._family: set[tuple[int, int]] = set()
        # What a sweep has found and could not end.
        self._unkillable: list[procfs.ProcessEntry] = []
        # Processes that the supervisor has started beside the workers.
        self.helpers: set[int] = set()
        # The group's own cgroup, where one has been delegated to us.
        self.cgroup: OwnCgroup | None = None
        self.running = False

    def forget_owner(self) -> None:
        """Everything has ended: nobody is asked any more (see `Diagnosis.forget_owner`)."""
        self._adopts = self._before_kill = None
        self._on_signal = lambda _sig, _ranks: None

    def note_forks(self) -> None:
        """To be called once, soon after the start, of a group that goes on: see `Newcomers`."""
        self._newcomers.note_forks()

    def woken_by_exit(self) -> None:
        """To be called when the last worker has exited."""
        self._wake.set()

    def hurry(self, sig: int, grace_s: float) -> None:
        """A second request while the first is under way: only ever ends the group sooner."""
        self._deadline = min(self._deadline, time.monotonic() + grace_s)
        self._hurried = self._hurried or sig == signal.SIGKILL
        if self._look is not None and self._hurried:
            self._look.reschedule(asyncio.get_running_loop().time() + grace_s)
        if sig != self._signal:
            self._signal_groups(sig)
        self._wake.set()

    async def run(
        self, handlers: Sequence[SubprocessHandler], sig: int, grace_s: float
    ) -> list[Survivor]:
        """Climb the ladder. Bounded: grace + ``2 * KILL_WAIT_S`` + ``SWEEP_GRACE_S``.

        Args:
            handlers: the group's workers, as far as they were started.
            sig: the first signal.
            grace_s: how long to wait before SIGKILL, in seconds.

        Returns:
            Those that could not be ended: nobody, normally.
        """
        self._handlers, self.running = handlers, True
        self._deadline = time.monotonic() + grace_s
        self._family = self._descendants_of_workers()
        if self._somebody_left():
            self._signal_groups(sig)
            if not await self._groups_gone():
                if grace_s > 0:
                    await self._last_look()
                self._signal_groups(signal.SIGKILL)
                self._deadline = time.monotonic() + KILL_WAIT_S
                await self._groups_gone()
        if self._resuming is not None:
            self._resuming.cancel()
        await self._sweep(sig)
        return self._survivors()

    def _descendants_of_workers(self) -> set[tuple[int, int]]:
        # Now, while parents live: a child that has wiped its environment is known by them alone.
        known = [h.pid for h in self._handlers if h.running]
        known += [entry.pid for entry in self._stragglers()]
        if not known:
            return set()
        table, _ = self._table()
        return {(pid, table[pid].start_ticks) for pid in _descendants(known, table)}

    async def _last_look(self) -> None:
        workers_run = any(handler.running for handler in self._handlers)
        if self._before_kill is None or not workers_run or self._signal == signal.SIGKILL:
            return
        try:
            async with asyncio.timeout(_LAST_LOOK_S) as self._look:
                await self._before_kill()
        except Exception:
            # Out of time: what was found until then is kept by whoever looked. Anything else (a
            # full disk, no descriptor) must not keep us from ending the group either.
            pass
        finally:
            self._look = None

    def _somebody_left(self) -> bool:
        return any(h.running for h in self._handlers) or bool(self._stragglers())

    def _stragglers(self) -> list[procfs.ProcessEntry]:
        return [e for h in self._handlers for e in h.stragglers if procfs.is_same(e)]

    def _signal_groups(self, sig: int) -> None:
        self._signal = sig
        if running := [handler.local_rank for handler in self._handlers if handler.running]:
            self._on_signal(sig, running)
        self._tell(lambda handler: handler.close(sig, resume=False))
        if sig != signal.SIGKILL:
            # Hardly ever is anybody stopped, and most are gone in a moment: nobody waits for
            # us to ask those, too.
            self._resuming = asyncio.get_running_loop().call_later(
                _RESUME_S, self._tell, lambda handler: handler.resume()
            )

    def _tell(self, what: Callable[[SubprocessHandler], object]) -> None:
        for handler in self._handlers:
            try:
                what(handler)
            except PermissionError:
                self._refused[handler.pid] = "we may not signal it (EPERM)"

    async def _groups_gone(self) -> bool:
        """Wait until no group has a member left, or the deadline has passed."""
        if not await self._until(lambda: not any(h.running for h in self._handlers)):
            return False
        return await self._gone(self._stragglers())

    async def _gone(self, entries: Iterable[procfs.ProcessEntry]) -> bool:
        """Wait until these processes have ended, or the deadline has passed."""
        alive = {entry.pid: entry for entry in entries}
        with ExitStack() as stack:
            for entry in list(alive.values()):
                if not self._watch(entry, alive, stack):
                    alive.pop(entry.pid, None)
            return await self._until(lambda: not alive)

    def _watch(
        self,
        entry: procfs.ProcessEntry,
        alive: dict[int, procfs.ProcessEntry],
        stack: ExitStack,
    ) -> bool:
        try:
            pidfd = os.pidfd_open(entry.pid)
        except OSError:
            return False
        if not procfs.is_same(entry):
            os.close(pidfd)
            return False
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(pidfd)
            alive.pop(entry.pid, None)
            self._wake.set()

        loop.add_reader(pidfd, ended)
        stack.callback(os.close, pidfd)
        stack.callback(loop.remove_reader, pidfd)
        return True

    async def _until(self, done: Callable[[], bool]) -> bool:
        while not done():
            # Cleared before the look at the deadline, which `hurry` moves.
            self._wake.clear()
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                return False
            try:
                async with asyncio.timeout(left_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
        return True

    async def _sweep(self, sig: int) -> None:
        """End what left its group: first as asked, then with SIGKILL, until none is found."""
        for round_ in range(_SWEEP_ROUNDS):
            found = self._escaped()
            if not found:
                return
            first = round_ == 0 and sig != signal.SIGKILL and not self._hurried
            for entry in found:
                self._end_one(entry, sig if first else signal.SIGKILL)
            if self.cgroup is not None and not first:
                self.cgroup.kill()
            grace_s = min(SWEEP_GRACE_S, max(0.0, self._deadline - time.monotonic()))
            self._deadline = time.monotonic() + (grace_s if first else KILL_WAIT_S)
            if not await self._gone(found) and not first:
                self._unkillable = found
                return

    def _end_one(self, entry: procfs.ProcessEntry, sig: int) -> None:
        try:
            procfs.send_to_process(entry, sig)
            if sig != signal.SIGKILL:
                procfs.send_to_process(entry, signal.SIGCONT)
        except PermissionError:
            self._refused[entry.pid] = "we may not signal it (EPERM)"

    def _escaped(self) -> list[procfs.ProcessEntry]:
        """As :meth:`_look_around`, and nobody slips through while we look.

        Who forks and exits at once (a daemon that is just being born) may have ended when we come
        to it, and its child has come too late for our list. So where nobody is found, but
        somebody has ended meanwhile, we look again.
        """
        ended: set[int] = set()
        newest_pid = procfs.newest_pid()
        for _ in range(_LOOKS):
            found, ended_now = self._look_around()
            if found:
                return found
            if ended_now <= ended:
                break
            ended = ended_now
        return self._chased(newest_pid)

    def _chased(self, newest_pid: int | None) -> list[procfs.ProcessEntry]:
        """Somebody of ours among the pids that have been given out since we began to look.

        A process that hops from pid to pid is faster than a look at the whole table, but not
        faster than one at the pid that was given out last.
        """
        workers = {h.pid for h in self._handlers if h.running}
        for _ in range(_CHASES):
            now = procfs.newest_pid()
            if newest_pid is None or now is None or now <= newest_pid:
                return []
            for entry in procfs.entries(range(newest_pid + 1, now + 1)):
                unknown = entry.pid not in workers and entry.pid not in self._refused
                if unknown and procfs.environment_holds(entry.pid, self._token):
                    return [entry]
            newest_pid = now
        return []

    def _look_around(self) -> tuple[list[procfs.ProcessEntry], set[int]]:
        """Everybody alive who is proven ours, except the workers that are still running.

        By the token in the environment, by the session or the cgroup, as an orphan that came to
        us, or as a descendant of somebody who is proven ours.

        Returns:
            Them, and the pids of those that were listed and had ended when they were looked at.
        """
        table, ended = self._table()
        inside = set(self.cgroup.pids()) if self.cgroup is not None else set()
        sessions = self._living_sessions()
        ours = {
            entry.pid
            for entry in table.values()
            if entry.pid in inside
            or entry.session in sessions
            or (entry.pid, entry.start_ticks) in self._family
            or procfs.environment_holds(entry.pid, self._token)
            or (self._adopts is not None and self._is_adopted(entry))
        }
        workers = {h.pid for h in self._handlers if h.running}
        ours |= _descendants(ours | workers, table)
        return [table[pid] for pid in sorted(ours - self._refused.keys())], ended

    def _table(self) -> tuple[dict[int, procfs.ProcessEntry], set[int]]:
        """The living processes that may be ours: all that have been started since the group.

        But for the workers that run. And the pids of those that have ended, as zombies or while
        we looked.
        """
        pids = self._newcomers.pids() if self._handlers else None
        if pids is None:
            pids = procfs.all_pids()
        # Their own lines tell nothing new, and they are most of those that have been started.
        known = {h.pid for h in self._handlers if h.running}
        unknown = [pid for pid in pids if pid not in known]
        table = {entry.pid: entry for entry in procfs.entries(unknown)}
        return table, set(unknown) - table.keys()

    def _living_sessions(self) -> set[int]:
        """Sessions whose leader is still the process that we mean."""
        return {
            pid
            for pid, start_ticks in self._leaders
            if (entry := procfs.read_entry(pid)) and entry.start_ticks == start_ticks
        }

    def _is_adopted(self, entry: procfs.ProcessEntry) -> bool:
        return (
            entry.parent_pid == os.getpid() and self._adopts is not None and self._adopts(entry.pid)
        )

    def _survivors(self) -> list[Survivor]:
        ranks = {h.pid: h.local_rank for h in self._handlers}
        left = [e for h in self._handlers if h.running and (e := procfs.read_entry(h.pid))]
        left += self._stragglers()
        left += [entry for entry in self._unkillable if procfs.is_same(entry)]
        left += [e for pid in self._refused if (e := procfs.read_entry(pid)) and e.alive]
        return [
            Survivor(
                entry,
                ranks.get(entry.process_group),
                procfs.wait_channel(entry.pid),
                self._refused.get(entry.pid, f"still there {KILL_WAIT_S:g} s after SIGKILL"),
            )
            for entry in {e.pid: e for e in left}.values()
        ]


def _descendants(of: Iterable[int], table: Mapping[int, procfs.ProcessEntry]) -> set[int]:
    """Children of these processes, and theirs, as far as they stand in the table."""
    children: dict[int, list[int]] = {}
    for entry in table.values():
        children.setdefault(entry.parent_pid, []).append(entry.pid)
    found: set[int] = set()
    todo = list(of)
    while todo:
        new = [pid for pid in children.get(todo.pop(), ()) if pid not in found]
        found.update(new)
        todo += new
    return found


async def end_orphans(
    token: str,
    leaders: Sequence[tuple[int, int]],
    grace_s: float,
    cgroup: OwnCgroup | None = None,
) -> None:
    """End a group whose supervisor is gone: the ladder without workers of our own.

    Args:
        token: the supervisor's.
        leaders: its workers, by pid and start time.
        grace_s: seconds from SIGTERM to SIGKILL.
        cgroup: its own cgroup, if it had one; removed.
    """
    cleanup = Cleanup(token, leaders=leaders)
    cleanup.cgroup = cgroup
    await cleanup.run((), signal.SIGTERM, grace_s)
    if cgroup is not None:
        cgroup.remove()
