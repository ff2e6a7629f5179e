"""A group of function workers: their calls, how each is launched, and what comes back."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from typing import Any, cast

from asupervise._compat import Exit, ExitCallback
from asupervise.functions import environment
from asupervise.functions.payload import (
    Call,
    Luggage,
    main_module,
    make_call_file,
    module_of,
    pack_calls,
)
from asupervise.functions.results import ResultChannel
from asupervise.functions.spec import FunctionSpec
from asupervise.functions.zygote import Zygote
from asupervise.handler import Surroundings, WorkerProcess, exec_program
from asupervise.plan import TOKEN_VARIABLE, GroupPlan, WorkerPlan

__all__ = ["FunctionWork"]

_NO_MEMORY_POLICY = "none"


class FunctionWork:
    """What `PContext` asks of its work, for functions.

    Args:
        spec: the function and how it is started.
        args: by local rank.

    Raises:
        NotPicklableError: the function, or an argument, cannot travel to a worker.
    """

    def __init__(self, spec: FunctionSpec, args: Mapping[int, Sequence[object]]) -> None:
        self._spec = spec
        self._calls = pack_calls(spec.function, args)
        self._luggage = Luggage.of_this_process()
        self._channels: dict[int, ResultChannel] = {}
        self._zygote = cast("Zygote | None", spec.zygote)
        self._cgroup = ""

    returns_values = True

    @property
    def helpers(self) -> frozenset[int]:
        """Processes of ours that are no workers."""
        return self._zygote.helpers if self._zygote else frozenset()

    @asynccontextmanager
    async def prepared(
        self,
        plan: GroupPlan,
        warnings: list[str],
        *,
        cgroup: str,
        on_lost: Callable[[str], None],
    ) -> AsyncIterator[None]:
        """All that the workers need, for as long as they run.

        Args:
            plan: of the group.
            warnings: sentences for the user are added to it.
            cgroup: the folder of the group's own cgroup, or "".
            on_lost: called with the reason when no worker can go on.

        Raises:
            ZygoteError: the zygote cannot be started, or must not be forked.
        """
        self._cgroup = cgroup
        try:
            if not self._spec.forks:
                yield
                return
            private = self._zygote is None
            zygote = self._zygote or Zygote(
                self._spec.preload, env=environment.common(w.env for w in plan.workers)
            )
            try:
                if private:
                    await zygote.start()
                    self._zygote = zygote
                facts = await self._loaded(zygote)
                warnings += environment.warnings(
                    [w.env for w in plan.workers], zygote.environ, facts
                )
                stop = zygote.on_lost(on_lost)
                try:
                    yield
                finally:
                    stop()
            finally:
                if private:
                    await zygote.close()
        finally:
            for channel in self._channels.values():
                channel.close()

    async def _loaded(self, zygote: Zygote) -> dict[str, Any]:
        module = module_of(self._spec.function)
        main = main_module() if any(call.main for call in self._calls.values()) else None
        return await zygote.load(modules=[module] if module else [], main=main)

    async def launch(
        self, plan: WorkerPlan, around: Surroundings, on_exit: ExitCallback, /
    ) -> WorkerProcess:
        """Start one worker, as `handler.exec_program` does for programs."""
        call = self._calls.pop(plan.local_rank)
        channel = self._channels[plan.local_rank] = ResultChannel.open()

        def ended(exit: Exit) -> None:
            channel.finish()
            on_exit(exit)

        channel.listen()
        start = self._fork if self._spec.forks else self._spawn
        try:
            process = await start(plan, call, channel.worker_end, around, ended)
        except BaseException:
            channel.close()
            raise
        channel.hand_over()
        return process

    async def _spawn(
        self,
        plan: WorkerPlan,
        call: Call,
        result: int,
        around: Surroundings,
        on_exit: ExitCallback,
    ) -> WorkerProcess:
        more = self._more_fds(call)
        call_file = make_call_file(self._setup(call, more), call.parts)
        try:
            return await exec_program(plan, around, on_exit, descriptors=(*more, call_file, result))
        finally:
            os.close(call_file)

    async def _fork(
        self,
        plan: WorkerPlan,
        call: Call,
        result: int,
        around: Surroundings,
        on_exit: ExitCallback,
    ) -> WorkerProcess:
        assert self._zygote is not None, "it is prepared"
        more = self._more_fds(call)
        token = f"{self._zygote.token}:{around.env.get(TOKEN_VARIABLE, '')}"
        setup = self._setup(call, more) | {
            "fork": {
                "env": {**around.env, **self._zygote.env, **plan.env, TOKEN_VARIABLE: token},
                "cwd": around.cwd or os.getcwd(),
                "cgroup": self._cgroup,
                "cpus": sorted(plan.binding.cpus) if plan.binding else None,
                "memory": _memory(plan),
            }
        }
        with _descriptors(around.std) as std:
            return await self._zygote.fork(
                setup, call.parts, result=result, std=std, more=more, on_exit=on_exit
            )

    def _more_fds(self, call: Call) -> list[int]:
        tracker = self._luggage.tracker
        return [*call.fds, *([] if tracker is None else [tracker])]

    def _setup(self, call: Call, fds: Sequence[int]) -> dict[str, Any]:
        return asdict(self._luggage) | {
            "tracker": None if self._luggage.tracker is None else len(fds) - 1,
            "main": call.main,
            "cloudpickle": call.by_value,
            "fds": list(fds),
        }

    # --- what came back ---------------------------------------------------------------------

    def values(self, ranks: Iterable[int]) -> tuple[dict[int, Any], dict[int, str]]:
        """What the functions returned, by local rank; and of which ranks it cannot be had, and why.

        To be called once, in a thread.
        """
        values: dict[int, Any] = {}
        problems: dict[int, str] = {}
        for rank in ranks:
            try:
                values[rank] = self._channels[rank].value()
            except Exception as error:
                problems[rank] = (
                    "the worker succeeded, but its return value cannot be had: "
                    f"{type(error).__name__}: {error}"
                )
        return values, problems

    def exception(self, rank: int) -> BaseException | str | None:
        """What the function raised, where that could be sent, or why it cannot be had."""
        channel = self._channels.get(rank)
        return channel.exception() if channel is not None else None


@contextmanager
def _descriptors(std: Sequence[int | None]) -> Iterator[list[int]]:
    """Standard streams as `Surroundings` has them, as descriptors."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield [ours if fd is None else null if fd < 0 else fd for ours, fd in enumerate(std)]
    finally:
        os.close(null)


def _memory(plan: WorkerPlan) -> tuple[str, list[int]] | None:
    binding = plan.binding
    if binding is None or str(binding.memory_policy) == _NO_MEMORY_POLICY:
        return None
    return str(binding.memory_policy), sorted(binding.memory_nodes)
