"""``Zygote``: the supervisor's side of a process that has imported what workers need."""

from __future__ import annotations

import asyncio
import marshal
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any

from asupervise import procfs
from asupervise._compat import Exit, ExitCallback, exit_now
from asupervise.cleanup import Cleanup
from asupervise.errors import ZygoteError
from asupervise.functions import environment, zygote_main
from asupervise.functions.forked import ZygoteChild
from asupervise.functions.interpreter import checked_preload, interpreter
from asupervise.functions.payload import Luggage, make_call_file, unnamed_file
from asupervise.guardian import Guardian, guarded
from asupervise.handler import (
    SubprocessHandler,
    Surroundings,
    WorkerProcess,
    exec_program,
)
from asupervise.plan import TOKEN_VARIABLE, WorkerPlan
from asupervise.shielding import finished_in_any_case, run_in_any_case

__all__ = ["Zygote"]

# Room for the tokens of a group and of the supervisors around it, behind the zygote's own.
_TOKEN_ROOM = 480
_FDS_A_MESSAGE = 200
_MESSAGE_BYTES = 1 << 16
_SAID_BYTES = 8192
_END_GRACE_S = 2.0


class Zygote:
    """A process that has imported modules, and forks function workers in milliseconds.

    Pass it as ``start_method`` of any number of groups, one after the other or at once::

        async with Zygote(preload=["torch"]) as zygote:
            for lr in (0.1, 0.01):
                async with start_processes(
                    "sweep", train, {0: (lr,)}, {0: {}}, start_method=zygote
                ) as ctx:
                    result = await ctx.wait()

    What it has imported stays as it was then: a module that changes on disk afterwards is not
    read again. Leaving the block ends it, and with it every worker that still runs.

    Args:
        preload: names of modules to import, in this order.
        env: laid over our environment, for the zygote, for what its imports read, and for its
            workers, where a group's own `envs` say nothing else.
        guardian: whether a small process ends it and its workers when this process is killed.

    Attributes:
        preload: the names.
        env: as given.
        pid: its process id; 0 before it is started.

    Raises:
        ZygoteError: when entered, if a module cannot be imported (the traceback is in the
            message), or leaves behind what no fork survives: a running thread of Python's, the
            context of an accelerator.
        ValueError: for an empty name.
    """

    def __init__(
        self,
        preload: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        guardian: bool = True,
    ) -> None:
        self.preload = checked_preload(preload)
        self.pid = 0
        self.env = dict(env or {})
        self._with_guardian = guardian
        self._token = f"asv-{os.urandom(8).hex()}"
        self._guardian: Guardian | None = None
        self._handler: SubprocessHandler | None = None
        self._control: socket.socket | None = None
        self._output = -1
        self._number = 0
        self._imports = 0  # asked for and not answered, also where nobody waits any more
        self._answers: dict[int, asyncio.Future[tuple[Any, ...]]] = {}
        self._children: dict[int, ZygoteChild] = {}
        self._being_reaped: dict[int, tuple[ZygoteChild | None, int, bool]] = {}
        self._outbox: deque[tuple[bytes, Sequence[int]]] = deque()
        self._on_lost: list[Callable[[str], None]] = []
        self._begun = False
        self._ending = False
        self._loaded: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._stack = AsyncExitStack()
        self._life: asyncio.Task[None] | None = None
        self.environ: dict[str, str] = {}

    # --- its life ---------------------------------------------------------------------------

    async def __aenter__(self) -> Zygote:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Start it, and wait until it has imported everything.

        Raises:
            ZygoteError: see the class.
            RuntimeError: it has been started before.
        """
        if self._begun:
            raise RuntimeError("this zygote has been started already: make another one")
        self._begun = True
        try:
            if self._with_guardian:
                self._guardian = await self._stack.enter_async_context(guarded(self._token))
            await self._launch()
            await self.load(self.preload)
        except BaseException:
            await run_in_any_case(self._end)
            raise
        self._life = asyncio.get_running_loop().create_task(
            self._live(), name=f"asupervise: zygote {self.pid}"
        )

    async def close(self) -> None:
        """End it and every worker that it has forked and that still runs. May be called again.

        The end of its event loop does so, too.
        """
        life, self._life = self._life, None
        if life is not None:
            life.cancel()
            await finished_in_any_case(life)
        # Again, because a task that is cancelled before its first step does not take it.
        await run_in_any_case(self._end)

    async def _live(self) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await run_in_any_case(self._end)

    async def _launch(self) -> None:
        self._cleanup = Cleanup(self._token)
        outer = os.environ.get(TOKEN_VARIABLE)
        token = f"{outer}:{self._token}" if outer else self._token
        self.environ = {**os.environ, **self.env}
        plan = WorkerPlan(
            local_rank=0,
            argv=interpreter(zygote_main.LINE),
            env={**self.env, TOKEN_VARIABLE: token.ljust(len(token) + _TOKEN_ROOM)},
        )
        self._output = unnamed_file()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)

        async def launch(
            plan: WorkerPlan, around: Surroundings, on_exit: ExitCallback, /
        ) -> WorkerProcess:
            quiet = around._replace(std=(around.std[0], self._output, self._output))
            return await exec_program(plan, quiet, on_exit, descriptors=(theirs.fileno(),))

        self._control = ours
        try:
            self._handler = await SubprocessHandler.start(
                plan, os.environ, on_exit=self._ended, launch=launch
            )
        except OSError as error:
            raise ZygoteError(f"cannot start the zygote: {error}") from error
        finally:
            theirs.close()
        self.pid = self._handler.pid
        asyncio.get_running_loop().add_reader(ours.fileno(), self._on_readable)

    async def _end(self) -> None:
        self._ending = True
        self._hang_up()
        if self._handler is not None:
            if self._handler.running:
                await self._ended_by_itself(self._handler)
            await self._cleanup.run([self._handler], signal.SIGTERM, _END_GRACE_S)
            if self._handler.running:
                self._handler.abandon()
        self._lose("it has been closed")
        await self._stack.aclose()
        if self._output >= 0:
            os.close(self._output)
            self._output = -1

    async def _ended_by_itself(self, handler: SubprocessHandler) -> None:
        # The end of the socket tells it to go; unless it is busy with an import.
        with suppress(TimeoutError):
            async with asyncio.timeout(0 if self._imports else _END_GRACE_S):
                await handler.wait_exit()

    def _hang_up(self) -> None:
        if self._control is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._control.fileno())
        loop.remove_writer(self._control.fileno())
        self._control.close()
        self._control = None
        for _, fds in self._outbox:
            for fd in fds:
                os.close(fd)
        self._outbox.clear()

    def _ended(self, handler: SubprocessHandler, exit: Exit) -> None:
        if self._control is not None:
            self._on_readable()  # what it still said
        self._hang_up()
        self._cleanup.woken_by_exit()
        how = f"it ended {_how(exit.code)}{self._last_words()}"
        self._lose("it has been closed" if self._ending else how)

    def _lose(self, why: str) -> None:
        """It is gone: nobody waits for its answers any more."""
        text = f"the zygote (process {self.pid}) is gone: {why}"
        answers, self._answers = self._answers, {}
        for answer in answers.values():
            if not answer.done():
                answer.set_exception(ZygoteError(text, pid=self.pid))
        zombies, self._being_reaped = self._being_reaped, {}
        for zombie, code, core in zombies.values():
            if zombie is not None:
                zombie.ended(exit_now(code), core)
        # Before the others are taken for ended: they are what this concerns.
        for tell in list(self._on_lost):
            tell(text)
        children, self._children = self._children, {}
        for child in children.values():
            child.orphaned()

    def _last_words(self) -> str:
        said = self.said()
        return f"; it said:\n{said}" if said else ""

    def said(self) -> str:
        """The end of what its imports have printed."""
        if self._output < 0:
            return ""
        size = os.fstat(self._output).st_size
        data = os.pread(self._output, _SAID_BYTES, max(0, size - _SAID_BYTES))
        return data.decode(errors="backslashreplace").strip()

    @property
    def running(self) -> bool:
        """Whether it can fork workers."""
        return self._handler is not None and self._handler.running and not self._ending

    @property
    def helpers(self) -> frozenset[int]:
        """The pids of itself and of its guardian."""
        guardian = self._guardian.pid if self._guardian is not None else 0
        return frozenset({self.pid, guardian} - {0})

    def __repr__(self) -> str:
        state = f"pid {self.pid}" if self.running else "not running"
        return f"<Zygote {list(self.preload)}: {state}>"

    # --- what groups ask of it --------------------------------------------------------------

    async def load(
        self,
        preload: Sequence[str] = (),
        modules: Sequence[str] = (),
        main: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Have it import `preload`, which must succeed, then `modules` and the main module.

        Returns:
            What it holds now; see `zygote_main`.

        Raises:
            ZygoteError: an import failed or left behind what no fork survives, or it is gone.
        """
        luggage = Luggage.of_this_process()
        setup = {
            "path": luggage.path,
            "argv": luggage.argv,
            "preload": list(preload),
            "modules": list(modules),
            "main": dict(main) if main else None,
        }
        if setup == self._loaded:
            return self._facts
        fd = make_call_file(setup)
        self._imports += 1
        try:
            answer = await self._asked("load", [fd])
        finally:
            os.close(fd)
        facts: dict[str, Any] = answer[0]
        if facts["error"]:
            name = ", ".join(preload)
            raise ZygoteError(
                f"preload: {name}: the import failed in the zygote:\n{facts['error'].rstrip()}",
                pid=self.pid,
                hint="the names must be importable with this process's sys.path",
            )
        environment.check_facts(facts)
        self._loaded, self._facts = setup, facts
        return facts

    async def fork(
        self,
        setup: Mapping[str, Any],
        parts: Sequence[bytes | memoryview],
        *,
        result: int,
        std: Sequence[int],
        more: Sequence[int],
        on_exit: ExitCallback,
    ) -> ZygoteChild:
        """Fork a worker.

        Args:
            setup: of the worker; see `running` and `zygote_main`.
            parts: the frame of its call.
            result: the worker's end of its result channel.
            std: its stdin, stdout and stderr.
            more: descriptors that its call refers to.
            on_exit: called in the loop when it has ended.

        Raises:
            OSError: it cannot be forked, or not be given what it needs.
            ZygoteError: the zygote is gone.
        """
        child = ZygoteChild(on_exit)
        number = self._number = self._number + 1
        call = make_call_file(setup, parts)
        self._children[number] = child
        try:
            for start in range(0, len(more), _FDS_A_MESSAGE):
                self._send(("more", number), more[start : start + _FDS_A_MESSAGE])
            (child.pid,) = await self._asked("fork", [call, result, *std], number)
        except BaseException:
            self._children.pop(number, None)
            raise
        finally:
            os.close(call)
        return child

    @property
    def token(self) -> str:
        """What marks the zygote and all that it forks."""
        return self._token

    def on_lost(self, tell: Callable[[str], None]) -> Callable[[], None]:
        """Have `tell` called with the reason when it is gone; returns what stops that."""
        self._on_lost.append(tell)

        def stop() -> None:
            if tell in self._on_lost:
                self._on_lost.remove(tell)

        return stop

    # --- the socket -------------------------------------------------------------------------

    async def _asked(self, what: str, fds: Sequence[int], number: int = 0) -> tuple[Any, ...]:
        if not number:
            number = self._number = self._number + 1
        answer = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            self._send((what, number), fds)
            result: tuple[Any, ...] = await answer
            return result
        finally:
            self._answers.pop(number, None)

    def _send(self, message: tuple[Any, ...], fds: Sequence[int] = ()) -> None:
        if self._control is None:
            raise ZygoteError(
                f"the zygote is not running{self._last_words()}",
                pid=self.pid,
                hint="it runs inside `async with zygote:`" if not self.pid else None,
            )
        # Descriptors may be closed before it is their turn, so who waits gets copies.
        if self._outbox or not self._sent(marshal.dumps(message), fds):
            self._outbox.append((marshal.dumps(message), [os.dup(fd) for fd in fds]))
            asyncio.get_running_loop().add_writer(self._control.fileno(), self._on_writable)

    def _sent(self, data: bytes, fds: Sequence[int]) -> bool:
        assert self._control is not None
        try:
            socket.send_fds(self._control, [data], list(fds))
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has ended, which we are about to hear
        return True

    def _on_writable(self) -> None:
        while self._outbox:
            data, fds = self._outbox[0]
            if not self._sent(data, fds):
                return
            self._outbox.popleft()
            for fd in fds:
                os.close(fd)
        assert self._control is not None
        asyncio.get_running_loop().remove_writer(self._control.fileno())

    def _on_readable(self) -> None:
        while self._control is not None:
            try:
                data = self._control.recv(_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            if not data:
                asyncio.get_running_loop().remove_reader(self._control.fileno())
                return
            self._heard(*marshal.loads(data))

    def _heard(self, what: str, number: int, *rest: Any) -> None:
        if what == "loaded":
            self._imports -= 1
        if what == "ended":
            self._child_ended(number, *rest)
        elif what == "reaped":
            self._child_reaped(number, *rest)
        elif (answer := self._answers.get(number)) is not None and not answer.done():
            if what == "failed":
                answer.set_exception(OSError(*rest))
            else:
                answer.set_result(rest)
        elif what == "forked":
            # Whoever asked was cancelled meanwhile.
            procfs.send_to_group(rest[0], signal.SIGKILL)

    def _child_ended(self, number: int, pid: int, code: int, core: bool) -> None:
        child = self._children.pop(number, None)
        if (answer := self._answers.get(number)) is not None and not answer.done():
            answer.set_exception(OSError(0, f"the forked process ended {_how(code)}"))
            child = None
        if child is not None:
            child.is_zombie = True
        self._being_reaped[pid] = (child, code, core)
        self._send(("reap", pid))

    def _child_reaped(self, pid: int, peak_kib: int) -> None:
        child, code, core = self._being_reaped.pop(pid)
        if child is not None:
            child.ended(exit_now(code, peak_kib=peak_kib or None), core)


def _how(code: int) -> str:
    if code >= 0:
        return f"with exit status {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"
