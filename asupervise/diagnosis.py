"""What is found out about workers while they run, so that their end can be explained."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping
from typing import Any

from asupervise import memory, stacks
from asupervise._compat import Exit
from asupervise.handler import SubprocessHandler
from asupervise.hang import HangDetector

# When workers are first looked at. Not at once: a group that is over sooner pays nothing.
FIRST_LOOK_S = 0.05


class Diagnosis:
    """Watches one group.

    Args:
        handlers: its workers by local rank, filled while they are started.
        sample_interval_s: seconds between looks at their memory; 0 for never.
        hang_timeout_s: seconds without a sign of life that count as a hang; None for never.
        end_group: called when a hang has been found and the stacks have been taken.
    """

    def __init__(
        self,
        handlers: Mapping[int, SubprocessHandler],
        *,
        sample_interval_s: float,
        hang_timeout_s: float | None,
        end_group: Callable[[], None],
    ) -> None:
        self._handlers = handlers
        self._hang_timeout_s = hang_timeout_s
        self._end_group = end_group
        self._sample_interval_s = sample_interval_s
        self._sampler = memory.MemorySampler(self._running_pids, sample_interval_s)
        self._detector: HangDetector | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._before: memory.OomCounts | None = None
        self._cgroups: dict[int, str] = {}
        self._stacks: dict[int, stacks.Stack] = {}
        self._hung: dict[int, str] = {}
        self._hang_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """All workers have been started."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(FIRST_LOOK_S, self._first_look)
        if self._hang_timeout_s is not None:
            self._detector = HangDetector(
                list(self._handlers.values()), self._hang_timeout_s, self._on_hang
            )
            self._detector.start()

    def stop(self) -> None:
        """The group ends: nothing is looked at any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._sampler.stop()
        if self._detector is not None:
            self._detector.stop()

    def _running_pids(self) -> list[int]:
        return [handler.pid for handler in self._handlers.values() if handler.running]

    def _first_look(self) -> None:
        ours = memory.memory_cgroup("self")
        for pid in self._running_pids():
            self._cgroups[pid] = memory.memory_cgroup(pid) or ours or ""
        self._before = memory.read_counts({*self._cgroups.values(), ours or ""})
        if self._sample_interval_s > 0:
            self._sampler.start()

    # --- stacks -----------------------------------------------------------------------------

    async def dump_stacks(self) -> dict[int, stacks.Stack]:
        """The stacks of all running workers; remembered for the report."""
        found = await stacks.dump(list(self._handlers.values()))
        self._stacks.update(found)
        return found

    async def before_kill(self) -> None:
        """The grace is over and somebody is left: look where it is before it is killed."""
        running = [h for h in self._handlers.values() if h.running]
        missing = [h for h in running if h.local_rank not in self._stacks]
        self._stacks.update(await stacks.dump(missing))

    def _on_hang(self, causes: dict[int, str]) -> None:
        self._hang_task = asyncio.get_running_loop().create_task(self._explain_hang(causes))

    async def _explain_hang(self, causes: dict[int, str]) -> None:
        found = await self.dump_stacks()
        # Who waits for somebody is silent, who is waited for may be busy: where all the others
        # are in the same place, the culprit is the one that is not.
        culprit = stacks.odd_one_out(found)
        if culprit is None:
            culprit = min(causes)
        first = next(iter(causes.values()))
        self._hung = {culprit: causes.get(culprit, f"{first} in other ranks, which wait for it")}
        self._end_group()

    # --- the end ----------------------------------------------------------------------------

    def details(self, handler: SubprocessHandler, exit: Exit, ours: bool) -> dict[str, Any]:
        """What is known about a worker that did not succeed, as fields of its failure.

        Args:
            handler: the worker.
            exit: how it ended.
            ours: whether a signal of ours explains that.
        """
        rank = handler.local_rank
        stack = self._stacks.get(rank)
        details: dict[str, Any] = {
            "peak_rss_bytes": exit.peak_rss_bytes or self._sampler.peak_bytes.get(handler.pid),
            "last_rss_bytes": self._sampler.last_bytes.get(handler.pid),
            "stack": stack.summary if stack else "",
            "cause": self._cause(handler, exit, ours=ours),
        }
        if rank in self._hung:
            details["own"] = True
        return details

    def _cause(self, handler: SubprocessHandler, exit: Exit, *, ours: bool) -> str:
        if hang := self._hung.get(handler.local_rank):
            return hang
        if exit.code == -signal.SIGKILL and not ours:
            folders = self._before.groups if self._before else ()
            after = memory.read_counts(folders)
            return memory.explain_sigkill(self._before, after, self._cgroups.get(handler.pid))
        return "a core dump was written" if exit.core_dumped else ""
