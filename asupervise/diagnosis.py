"""What is found out about workers while they run, so that their end can be explained."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from asupervise import memory, procfs
from asupervise._compat import Exit
from asupervise.handler import SubprocessHandler

if TYPE_CHECKING:
    from asupervise import stacks
    from asupervise.hang import HangDetector
    from asupervise.telling import GroupTeller

# When workers are first looked at. Not at once: a group that is over sooner pays nothing.
FIRST_LOOK_S: Final = 0.05
# Stacks that somebody has asked for explain an end that comes soon afterwards.
_STACKS_EXPLAIN_S: Final = 60.0
# How long to wait for what is still being found out when the group ends.
_LAST_WORDS_S: Final = 3.0
_COUNTING_SLACK_BYTES: Final = 4 << 20
_BY_SIGKILL: Final = (-signal.SIGKILL, 128 + signal.SIGKILL)


class Diagnosis:
    """Watches one group.

    Args:
        handlers: its workers by local rank, filled while they are started.
        teller: who is told what is found out.
        sample_interval_s: seconds between looks at their memory; 0 for never.
        hang_timeout_s: seconds without a sign of life that count as a hang; None for never.
        end_group: called when a hang has been found and the stacks have been taken.
        on_helper: called with the pid of each process that is started to find something out.
    """

    def __init__(
        self,
        handlers: Mapping[int, SubprocessHandler],
        *,
        teller: GroupTeller,
        sample_interval_s: float,
        hang_timeout_s: float | None,
        end_group: Callable[[], None],
        on_helper: Callable[[int], None],
    ) -> None:
        self._handlers = handlers
        self._teller = teller
        self._hang_timeout_s = hang_timeout_s
        self._end_group = end_group
        self._on_helper = on_helper
        self._sampler = memory.MemorySampler(self._look_at_memory, sample_interval_s)
        self._samples = sample_interval_s > 0
        self._detector: HangDetector | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._before = memory.OomCounts()
        self._own_cgroup: str | None = None
        self._cgroups: dict[int, str] = {}
        self._used: dict[int, memory.MemoryUse] = {}
        self._own_peak = 0
        self._killed_by: dict[int, str] = {}
        self._stacks: dict[int, tuple[float, stacks.Stack]] = {}
        self._hung: dict[int, str] = {}
        self._hang_task: asyncio.Task[None] | None = None
        self._dumping: asyncio.Task[dict[int, stacks.Stack]] | None = None

    def before_start(self) -> None:
        """Workers are about to be started."""
        # They are in our cgroup until they move: who dies at once is explained, too.
        self._own_cgroup = memory.memory_cgroup("self")
        self._before = memory.read_counts([self._own_cgroup] if self._own_cgroup else [])

    def start(self) -> None:
        """All workers have been started."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(FIRST_LOOK_S, self._first_look)
        if self._hang_timeout_s is not None:
            from asupervise.hang import HangDetector

            self._detector = HangDetector(
                list(self._handlers.values()), self._hang_timeout_s, self._on_hang
            )
            self._detector.start()

    async def group_ends(self) -> None:
        """The group is being ended: from now on nobody hangs any more."""
        if self._detector is not None:
            self._detector.stop()
        if self._hang_task is not None:
            self._hang_task.cancel()
            await asyncio.wait({self._hang_task}, timeout=_LAST_WORDS_S)

    async def group_has_ended(self) -> None:
        """Nothing is looked at any more; what is being found out is waited for, not long."""
        if self._timer is not None:
            self._timer.cancel()
        self._sampler.stop()
        if self._dumping is not None:
            _, late = await asyncio.wait({self._dumping}, timeout=_LAST_WORDS_S)
            for task in late:
                task.cancel()
                await asyncio.wait({task}, timeout=_LAST_WORDS_S)

    def forget_owner(self) -> None:
        """The group has its result: nobody is called any more.

        What its workers returned may be large, and is to go with the last reference to it, not
        when the collector finds the circle.
        """
        self._end_group, self._on_helper = _nothing, _nothing_for
        self._detector = None

    def on_exit(self, handler: SubprocessHandler, exit: Exit) -> None:
        """A worker has ended: the OOM killer's counters are read before others change them."""
        if exit.code in _BY_SIGKILL and signal.SIGKILL not in handler.our_signals(exit)[0]:
            folder = self._cgroups.get(handler.pid, self._own_cgroup)
            after = memory.read_counts([folder] if folder else [])
            self._killed_by[handler.pid] = memory.explain_sigkill(self._before, after, folder)

    # --- memory -----------------------------------------------------------------------------

    def _running(self) -> list[SubprocessHandler]:
        return [handler for handler in self._handlers.values() if handler.running]

    def _first_look(self) -> None:
        ours = memory.memory_of("self")
        self._own_peak = ours.peak if ours else 0
        self._look_at_memory()
        if self._samples:
            self._sampler.start()

    def _look_at_memory(self) -> None:
        groups = dict(self._before.groups)
        folders: dict[str, str | None] = {}  # most workers are in the same
        # Who is not asked for the CPU time reads one file less for each worker.
        tells = self._samples and self._teller.bus.has_listeners
        for handler in self._running():
            pid = handler.pid
            text = memory.cgroup_text(pid)
            used = memory.memory_of(pid)
            if used is None:
                # It is ending, and out of its cgroup already: v1 then names the topmost one.
                continue
            if self._samples:
                self._used[pid] = used
            if tells and (entry := procfs.read_entry(pid)) is not None:
                self._teller.sampled(handler, used, entry.cpu_ticks * procfs.TICK_S)
            if text not in folders:
                folders[text] = memory.folder_of(text)
            if folder := folders[text]:
                self._cgroups[pid] = folder
                if folder not in groups and (group := memory.read_group(folder)):
                    groups[folder] = group
        self._before = memory.OomCounts(groups, self._before.machine)

    def peak(self, handler: SubprocessHandler, exit: Exit) -> int | None:
        """The largest of what was seen and of what the kernel says at the end.

        What the kernel says counts from the fork, when the child still had our memory: unless it
        exceeds that, it tells nothing about the worker (getrusage(2), `ru_maxrss`; vfork(2)).
        """
        used = self._used.get(handler.pid)
        at_end = exit.peak_rss_bytes or 0
        # The kernel counts pages by processor and adds up late: two readings of one size differ.
        ours = self._own_peak + self._own_peak // 16 + _COUNTING_SLACK_BYTES
        told = at_end if self._own_peak and at_end > ours else 0
        return max(told, used.peak if used else 0) or None

    # --- stacks -----------------------------------------------------------------------------

    async def dump_stacks(self) -> dict[int, stacks.Stack]:
        """The stacks of all running workers; remembered for the report.

        Who asks while others are waiting for an answer gets the same one: two dumps at once
        would be mixed up in the workers' files.
        """
        if self._dumping is None or self._dumping.done():
            self._dumping = asyncio.get_running_loop().create_task(
                self._dump(), name="asupervise: stacks"
            )
        dumping = self._dumping
        # Not awaited directly: who is cancelled must not take it away from the others.
        await asyncio.wait({dumping})
        return {} if dumping.cancelled() else dumping.result()

    async def _dump(self) -> dict[int, stacks.Stack]:
        # Here and below: most groups end without anybody asking where they are.
        from asupervise import stacks

        found = await stacks.dump(list(self._handlers.values()), self._on_helper)
        now_s = time.monotonic()  # the clock of exits, unlike uvloop's own
        self._stacks.update({rank: (now_s, stack) for rank, stack in found.items()})
        self._teller.stacks_dumped(found)
        return found

    async def before_kill(self) -> None:
        """The grace is over and somebody is left: look where it is before it is killed."""
        # What a hang looked like must not be replaced by how it took the signal.
        if not self._hung:
            await self.dump_stacks()

    # --- hangs ------------------------------------------------------------------------------

    def _on_hang(self, causes: dict[int, str]) -> None:
        self._hang_task = asyncio.get_running_loop().create_task(
            self._explain_hang(causes), name="asupervise: hang"
        )

    async def _explain_hang(self, causes: dict[int, str]) -> None:
        assert self._detector is not None, "it has called us"
        found = await self.dump_stacks()
        left = {rank: cause for rank, cause in causes.items() if self._handlers[rank].running}
        if not left:
            # Who was silent has ended meanwhile, as it should.
            self._detector.start()
            return
        # Who waits for somebody is silent, who is waited for may be busy: where all the others
        # are in the same place, the culprit is the one that is not; unless its heart beats.
        from asupervise import stacks

        culprit = stacks.odd_one_out(found)
        if culprit is None or (culprit not in left and self._detector.beats(culprit)):
            culprit = min(left)
        first = next(iter(left.values()))
        self._hung = {culprit: left.get(culprit, f"{first} in other ranks, which wait for it")}
        self._end_group()

    def on_lost(self, why: str) -> None:
        """No worker that still runs can go on, and who dies of that does not say so itself."""
        lost = [rank for rank, handler in sorted(self._handlers.items()) if handler.running]
        if lost and not self._hung:
            self._hung = {lost[0]: why}

    @property
    def faulty(self) -> frozenset[int]:
        """The local ranks that have ended the group without ending themselves: one that hung."""
        return frozenset(self._hung)

    # --- the end ----------------------------------------------------------------------------

    def details(self, handler: SubprocessHandler, exit: Exit) -> dict[str, Any]:
        """What is known about a worker that did not succeed, as fields of its failure.

        Args:
            handler: the worker.
            exit: how it ended.
        """
        rank = handler.local_rank
        used = self._used.get(handler.pid)
        details: dict[str, Any] = {
            "peak_rss_bytes": self.peak(handler, exit),
            "last_rss_bytes": used.last if used else None,
            "stack": self._stack_near_end(rank, exit),
            "cause": self._cause(handler, exit),
        }
        if rank in self._hung:
            details["own"] = True
        return details

    def _stack_near_end(self, rank: int, exit: Exit) -> str:
        taken_s, stack = self._stacks.get(rank, (0.0, None))
        soon = exit.monotonic_ns / 10**9 - taken_s < _STACKS_EXPLAIN_S
        return stack.summary if stack is not None and soon else ""

    def _cause(self, handler: SubprocessHandler, exit: Exit) -> str:
        if hang := self._hung.get(handler.local_rank):
            return hang
        if killed_by := self._killed_by.get(handler.pid):
            return killed_by
        return _core_dump() if exit.core_dumped else ""


def _nothing() -> None:
    """In the place of what ends the group."""


def _nothing_for(_pid: int) -> None:
    """In the place of whoever wants to know of helpers."""


def _core_dump() -> str:
    """With the pattern that says where (core(5))."""
    pattern = procfs.read_text("/proc/sys/kernel/core_pattern").strip()
    return "a core dump was written" + (f" (core_pattern: {pattern})" if pattern else "")
