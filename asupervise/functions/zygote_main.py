"""The zygote: a process that has imported what workers need, and forks them.

It speaks with its supervisor through a socket that keeps messages apart (``SOCK_SEQPACKET``),
each a marshalled tuple, descriptors beside it (``SCM_RIGHTS``, unix(7)):

==================================  ================================================================
from the supervisor
``("load", id)`` + 1                import what the file names; the answer is ``loaded``
``("more", id)`` + n                descriptors for a worker that needs more than one message holds
``("fork", id)`` + n                fork a worker: call, result, stdin, stdout, stderr, more
``("reap", pid)``                   its end has been noted: give its pid back
to the supervisor
``("loaded", id, facts)``           what the imports have come to, and what this process now holds
``("forked", id, pid)``             from the worker itself, once it is in its own session
``("failed", id, errno, text)``     it cannot be started
``("ended", id, pid, code, core)``  a worker has ended; it stays a zombie until it is reaped
``("reaped", pid, peak)``           its pid is free; the peak in KiB where it exceeds the zygote's
==================================  ================================================================

So no pid is given to anybody else while the supervisor may still signal it. It is one thread and
holds nothing that a fork would break; the end of the socket is its end.
"""

from __future__ import annotations

import _socket
import marshal
import os
import resource
import select
import signal
import sys

import asupervise.worker  # noqa: F401 - each worker needs it
from asupervise.functions import running
from asupervise.functions.witness import Witness

TYPE_CHECKING = False  # type checkers take this name for true; `typing` itself costs an import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

LINE = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from asupervise.functions.zygote_main import main; main()"
)

TOKEN_VARIABLE = "ASUPERVISE_TOKEN"
_MESSAGE_BYTES = 1 << 16
_FDS_A_MESSAGE = 253  # the kernel's SCM_MAX_FD
_TEXT_CHARS = 16_384
_PEAK_SLACK_KIB = 4096


def main() -> None:
    """Serve the supervisor until it is gone."""
    zygote = _Zygote(_socket.socket(fileno=int(sys.argv[-1])))
    worker = zygote.serve()
    if worker is not None:
        _end_as_interpreter(worker)
    os._exit(0)


class _Zygote:
    def __init__(self, control: _socket.socket) -> None:
        self._control = control
        control.setblocking(True)
        os.set_inheritable(control.fileno(), False)
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)
        self._on_child: Any = None
        self._running: dict[int, int] = {}
        self._more: dict[int, list[int]] = {}
        self._mark = _EnvironMark.find()
        self._witness = Witness()
        self._forks = 0

    def serve(self) -> Callable[[], None] | None:
        """Answer until the supervisor is gone: None; in a forked worker: what it is to do."""
        poll = select.poll()
        poll.register(self._control.fileno(), select.POLLIN)
        poll.register(self._wake_r, select.POLLIN)
        self._watch_children()
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._wake_r in ready:
                self._children_ended()
            if self._control.fileno() in ready:
                message, fds = self._receive()
                if message is None:
                    return None
                worker = self._answer(message, fds)
                if worker is not None:
                    return worker

    def _watch_children(self) -> None:
        # After what was imported: a library's own handler would keep us from hearing of workers.
        previous = signal.signal(signal.SIGCHLD, _hear)
        if previous is not _hear:
            self._on_child = previous
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)

    def _receive(self) -> tuple[Any, list[int]]:
        space = _socket.CMSG_SPACE(_FDS_A_MESSAGE * 4)
        try:
            data, ancillary, _, _ = self._control.recvmsg(
                _MESSAGE_BYTES, space, getattr(_socket, "MSG_CMSG_CLOEXEC", 0)
            )
        except ConnectionResetError:
            return None, []
        fds: list[int] = []
        for level, kind, content in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                fds += memoryview(content[: len(content) // 4 * 4]).cast("i")
        return (marshal.loads(data) if data else None), fds

    def _send(self, *message: Any) -> None:
        try:
            self._control.send(marshal.dumps(message))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the supervisor is gone, which the next look at the socket tells

    def _answer(self, message: tuple[Any, ...], fds: list[int]) -> Callable[[], None] | None:
        what, number = message
        if what == "load":
            self._load(number, fds[0])
        elif what == "more":
            self._more.setdefault(number, []).extend(fds)
        elif what == "fork":
            return self._fork(number, self._more.pop(number, []) + fds)
        elif what == "reap":
            self._reap(number)
        return None

    # --- importing --------------------------------------------------------------------------

    def _load(self, number: int, fd: int) -> None:
        setup = running.read_setup(fd)
        os.close(fd)
        running.prepare(setup)
        error = ""
        with self._witness:
            try:
                running.import_modules(setup["preload"], self._witness.look)
            except BaseException as raised:
                error = _traceback_of(raised)
            if not error:
                self._try_to_import(setup)
        # What has been imported is there for good: the workers' collectors need not touch it,
        # and so not copy it.
        import gc

        gc.freeze()
        _keep_finalizers()
        self._watch_children()
        self._send("loaded", number, {"error": error, **self._witness.facts()})

    def _try_to_import(self, setup: dict[str, Any]) -> None:
        """Import the function's own module; where that fails, the worker will fail and say so."""
        try:
            if setup["main"]:
                running.import_main(setup["main"])
                self._witness.look("__main__")
            running.import_modules(setup["modules"], self._witness.look)
        except BaseException:
            # Whatever it is, sys.exit included, each worker meets it again and reports it as its
            # own end; here it would end the zygote of all other groups as well.
            pass

    # --- workers ----------------------------------------------------------------------------

    def _fork(self, number: int, fds: list[int]) -> Callable[[], None] | None:
        _flush()
        self._forks += 1
        try:
            pid = os.fork()
        except OSError as error:
            self._send("failed", number, error.errno, f"fork: {error.strerror}")
            pid = -1
        if pid == 0:
            return self._become_worker(number, fds)
        for fd in fds:
            os.close(fd)
        if pid > 0:
            self._running[pid] = number
        return None

    def _children_ended(self) -> None:
        try:
            os.read(self._wake_r, 4096)
        except BlockingIOError:
            pass
        for pid, number in list(self._running.items()):
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                del self._running[pid]
                by_signal = ended.si_code != os.CLD_EXITED
                code = -ended.si_status if by_signal else ended.si_status
                core = ended.si_code == os.CLD_DUMPED
                self._send("ended", number, pid, code, core)

    def _reap(self, pid: int) -> None:
        peak = 0
        try:
            peak = os.wait4(pid, 0)[2].ru_maxrss
        except ChildProcessError:
            pass  # a library that was preloaded has reaped it
        # A fork begins with the peak of whoever forked it.
        ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._send("reaped", pid, peak if peak > ours + _PEAK_SLACK_KIB else 0)

    def _become_worker(self, number: int, fds: list[int]) -> Callable[[], None]:
        """Leave the zygote behind, and say so. Returns the call, to be run with an empty stack."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, self._on_child or signal.SIG_DFL)
            os.setsid()
            os.close(self._wake_r)
            os.close(self._wake_w)
            call_fd, result_fd, *std = fds[-5:]
            setup = running.read_setup(call_fd)
            setup["fds"] = fds[:-5]
            self._settle(setup["fork"], std)
            self._send("forked", number, os.getpid())
        except BaseException as error:
            code = getattr(error, "errno", None) or 0
            text = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            self._send("failed", number, code, text)
            os._exit(1)
        self._control.close()
        return lambda: _run(call_fd, result_fd, setup)

    def _settle(self, fork: dict[str, Any], std: list[int]) -> None:
        if self._mark is not None:
            self._mark.write(fork["env"].get(TOKEN_VARIABLE, ""))
        if fork["cgroup"]:
            with open(os.path.join(fork["cgroup"], "cgroup.procs"), "w") as file:
                file.write("0")
        for number, fd in enumerate(std):
            os.dup2(fd, number)
            os.close(fd)
        _set_environment(fork["env"])
        if fork["cwd"]:
            os.chdir(fork["cwd"])
        if fork["cpus"]:
            os.sched_setaffinity(0, fork["cpus"])
        if fork["memory"]:
            from asupervise.functions.memory_policy import set_memory_policy

            set_memory_policy(*fork["memory"])


def _keep_finalizers() -> None:
    """What was made here is not taken apart at the end of each worker.

    torch leaves 134 finalizers behind, and to run them takes each worker 50 ms. The exit handlers
    themselves are run: multiprocessing's, for one, waits for a worker's own children.
    """
    weakref = sys.modules.get("weakref")
    registry = getattr(weakref.finalize, "_registry", {}) if weakref is not None else {}
    for finalizer in list(registry):
        finalizer.atexit = False


def _hear(_signal: int, _frame: object) -> None:
    """Heard through the wakeup descriptor; a handler of Python's there must be."""


def _run(call_fd: int, result_fd: int, setup: dict[str, Any]) -> None:
    running.inherited = setup["fds"]
    for stream in (sys.stdout, sys.stderr):
        # As the interpreter opens them: by lines only on a terminal.
        if hasattr(stream, "reconfigure"):
            at_once = bool(os.environ.get("PYTHONUNBUFFERED"))
            stream.reconfigure(line_buffering=stream.isatty(), write_through=at_once)
    random = sys.modules.get("numpy.random")
    if random is not None:
        # Python's own generator is seeded anew after a fork; this one would be the same in all.
        random.seed()
    running.prepare(setup)
    running.run_call(call_fd, result_fd, setup)


def _set_environment(env: dict[str, str]) -> None:
    for name in [name for name in os.environ if name not in env]:
        del os.environ[name]
    for name, value in env.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


# --- the end of a worker --------------------------------------------------------------------------


def _end_as_interpreter(work: Callable[[], None]) -> NoReturn:
    """Run `work`, and end as the interpreter does, but for taking its modules apart.

    Threads are waited for, exit handlers run, streams flushed. What the zygote imported belongs
    to all of its workers: to tear it down would first copy it.
    """
    try:
        code = _code_of(work)
        if threading := sys.modules.get("threading"):
            threading._shutdown()
        import atexit

        atexit._run_exitfuncs()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not _flush() and code == 0:
        code = 120  # as Python's own exit status then
    os._exit(code)


def _code_of(work: Callable[[], None]) -> int:
    try:
        work()
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        _flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _flush() -> bool:
    done = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            done = False  # closed, full, or missing
    return done


def _traceback_of(error: BaseException) -> str:
    import traceback

    error.__traceback__ = running.without_ours(error.__traceback__)
    return "".join(traceback.format_exception(error))[-_TEXT_CHARS:]


class _EnvironMark:
    """Where the token stands in the memory that ``/proc/<pid>/environ`` shows.

    That is the environment with which a process was executed (proc(5)), and a fork's is that of
    the zygote. By the token the cleanup knows whom it may end, so each worker overwrites it with
    its group's, in the room that the supervisor has left behind it.
    """

    def __init__(self, address: int, room: int) -> None:
        self._address = address
        self._room = room

    @classmethod
    def find(cls) -> _EnvironMark | None:
        try:
            with open("/proc/self/stat", "rb") as file:
                env_start = int(file.read().rpartition(b")")[2].split()[47])
            with open("/proc/self/environ", "rb") as file:
                text = b"\0" + file.read()
        except (OSError, ValueError, IndexError):
            return None
        name = b"\0" + TOKEN_VARIABLE.encode() + b"="
        start = text.find(name)
        if start < 0 or not env_start:
            return None
        at = start + len(name)
        return cls(env_start + at - 1, text.find(b"\0", at) - at)

    def write(self, token: str) -> None:
        data = token.encode()
        if len(data) > self._room:
            return  # by its session, then, and by its ancestors
        try:
            with open("/proc/self/mem", "r+b", buffering=0) as file:
                file.seek(self._address)
                file.write(data.ljust(self._room, b" "))
        except OSError:
            pass
