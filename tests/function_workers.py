"""Functions that tests run as workers, which import this module: it imports next to nothing."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

READ_ONLY = "/proc/self/status"


# --- return values --------------------------------------------------------------------------------


def echo(*args: Any) -> Any:
    return args


def big_dict(size: int) -> dict[int, str]:
    return {number: str(number) for number in range(size)}


def big_bytes(size: int) -> bytes:
    return bytes(range(256)) * (size // 256)


class Array:
    """Memory that travels out of band, as numpy's arrays do (PEP 574)."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory

    def __reduce_ex__(self, protocol: Any) -> Any:
        from pickle import PickleBuffer

        return Array, (PickleBuffer(self.memory),)


def big_array(size: int) -> Array:
    return Array(bytearray(big_bytes(size)))


def nothing() -> None:
    pass


def a_lock() -> Any:
    return threading.Lock()


def much_and_a_lock() -> Any:
    """Megabytes are on their way when it shows that the rest cannot be pickled."""
    return [*(bytes(1 << 20) for _ in range(8)), Array(bytearray(1 << 20)), threading.Lock()]


class Point:
    def __init__(self, x: int, y: int = 0) -> None:
        self.x, self.y = x, y

    def moved(self, by: int) -> Point:
        return Point(self.x + by, self.y)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and (self.x, self.y) == (other.x, other.y)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def origin(cls) -> Point:
        return cls(0)

    @staticmethod
    def distance(one: Point, other: Point) -> int:
        return abs(one.x - other.x) + abs(one.y - other.y)


class Adder:
    def __init__(self, to: int) -> None:
        self.to = to

    def __call__(self, number: int) -> int:
        return self.to + number


class AsyncAdder(Adder):
    async def __call__(self, number: int) -> int:  # type: ignore[override]
        return self.to + number


class UnpicklableHere:
    """What a worker returns, and the parent cannot make of it what it was."""

    def __reduce__(self) -> Any:
        return _only_in_a_worker, (os.getpid(),)


def _only_in_a_worker(pid: int) -> UnpicklableHere:
    if os.getpid() != pid:
        raise ValueError("this is only to be had where it was made")
    return UnpicklableHere()


def unpicklable_here() -> UnpicklableHere:
    return UnpicklableHere()


async def later(value: Any) -> Any:
    import asyncio

    await asyncio.sleep(0)
    return value


async def fail_later(text: str) -> None:
    import asyncio

    await asyncio.sleep(0)
    raise ValueError(text)


def count_up() -> Any:
    yield 1


async def count_up_later() -> Any:
    yield 1


# --- failures -------------------------------------------------------------------------------------


class NeedsTwo(Exception):
    """Pickles, and does not unpickle."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


class HoldsLock(Exception):
    """Does not pickle."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Beyond(BaseException):
    """Neither an Exception, nor a decision to end."""


KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (ValueError, KeyError, OSError, KeyboardInterrupt, SystemExit, Unprintable)
} | {"NeedsTwo": NeedsTwo, "HoldsLock": HoldsLock, "Beyond": Beyond}


def raise_of(kind: str, *args: Any) -> None:
    raise KINDS[kind](*args)


def raise_chained() -> None:
    try:
        inner_step()
    except ValueError as error:
        error.add_note("a note")
        raise KeyError("outer") from error


def inner_step() -> None:
    raise ValueError("inner")


def os_exit(code: int) -> None:
    os._exit(code)


def die_of(sig: int) -> None:
    signal.signal(sig, signal.SIG_DFL) if sig not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), sig)


def segfault() -> None:
    ctypes.string_at(8)


def recurse(depth: int = 0) -> int:
    return 1 + recurse(depth + 1)


def close_all_and_return(value: Any) -> Any:
    os.closerange(3, 4096)
    return value


def close_all_and_exit(code: int) -> None:
    os.closerange(3, 4096)
    sys.exit(code)


def close_all_and_raise() -> None:
    os.closerange(3, 4096)
    raise ValueError("after closing")


def reuse_and_return(path: str, value: Any) -> Any:
    """Closes everything, and opens files that get the numbers of what it closed."""
    os.closerange(3, 4096)
    kept = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for _ in range(60)]
    assert kept
    return value


def write_into_pipes(size: int) -> str:
    """Somebody writes into each pipe that it finds open, as a confused library might."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if fd > 2 and os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:"):
                os.write(fd, b"garbage! " * (size // 9))
        except OSError:
            pass  # not ours to write to
    return "value"


def fail_if(rank: int, failing: int, go: str) -> int:
    """Rank `failing` fails when all others have returned or wait; see `go`."""
    if rank == failing:
        with open(go) as gate:
            gate.readline()
        raise ValueError(f"rank {rank}")
    return rank


# --- what a worker sees ---------------------------------------------------------------------------


def surroundings() -> dict[str, Any]:
    main = sys.modules["__main__"]
    return {
        "argv": sys.argv,
        "path": sys.path,
        "cwd": os.getcwd(),
        "main": main.__name__,
        "stdin": sys.stdin.read(),
        "session": os.getsid(0),
        "group": os.getpgid(0),
        "pid": os.getpid(),
        "ppid": os.getppid(),
        "fds": open_fds(),
        "env": dict(os.environ),
        "sigchld": signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL,
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "threads": threading.active_count(),
        "faulthandler": faulthandler.is_enabled(),
        "line_buffering": sys.stdout.line_buffering,  # type: ignore[union-attr]
    }


def open_fds() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the one that listed the directory
    return found


def says() -> None:
    """By all ways that lead to the standard streams."""
    print("by print")
    sys.stdout.flush()
    os.write(1, b"by os.write\n")
    subprocess.run(["/bin/sh", "-c", "echo by a grandchild; echo grandchild err >&2"], check=True)
    libc = ctypes.CDLL(None)
    libc.printf(b"by printf\n")
    libc.fflush(None)
    print("by stderr", file=sys.stderr)
    print("unflushed at the end", end="")


def exit_hooks(path: str) -> None:
    import atexit

    def note(text: str) -> None:
        with open(path, "a") as file:
            file.write(text + "\n")

    atexit.register(note, "atexit")
    threading.Thread(target=lambda: (time.sleep(0.05), note("thread"))).start()


def read_file(path: str) -> str:
    with open(path) as file:
        return file.read()


def affinity_and_policy() -> tuple[list[int], int]:
    """The CPUs that it may use, and its memory policy (get_mempolicy(2)); -1 where unknown."""
    mode = ctypes.c_int(-1)
    try:
        numa = ctypes.CDLL("libnuma.so.1", use_errno=True)
        numa.get_mempolicy(ctypes.byref(mode), None, ctypes.c_ulong(0), None, ctypes.c_ulong(0))
    except OSError:
        pass
    return sorted(os.sched_getaffinity(0)), mode.value


# --- workers that go on ---------------------------------------------------------------------------


def ready_then_sleep(channel: str, rank: int) -> None:
    tell(channel, rank)
    sleep_long()


def tell(channel: str, rank: int, *words: object) -> None:
    with open(channel, "w") as file:
        file.write(" ".join(map(str, ("ready", rank, os.getpid(), *words))) + "\n")


def sleep_long() -> None:
    while True:
        time.sleep(1000)


def stubborn(channel: str, rank: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tell(channel, rank)
    sleep_long()


def tell_of_signals(channel: str, rank: int) -> None:
    signal.signal(signal.SIGUSR1, lambda *_: tell(channel, rank, "got"))
    tell(channel, rank)
    sleep_long()


def held(channel: str, rank: int) -> int:
    """Waits for the gate to open."""
    tell(channel, rank)
    with open(f"{channel}.gate") as gate:
        gate.readline()
    return rank


def close_all_and_be_held(channel: str, rank: int, value: Any) -> Any:
    os.closerange(3, 4096)
    held(channel, rank)
    return value


def with_family(channel: str, rank: int, wiped: bool = False) -> None:
    """A grandchild in the worker's group, and one that has left its session."""
    child = subprocess.Popen(["sleep", "1000"])
    env = {"PATH": os.environ["PATH"]} if wiped else None
    escaped = subprocess.Popen(["sleep", "1000"], start_new_session=True, env=env)
    # By a fork that executes nothing, too: its environment is the zygote's as the kernel shows it.
    fork = os.fork()
    if fork == 0:
        os.setsid()
        os.closerange(3, 4096)
        sleep_long()
    tell(channel, rank, child.pid, escaped.pid, fork)
    sleep_long()


def orphan_and_return(channel: str) -> str:
    """A daemon in a session of its own, whose parent is gone when this returns."""
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        tell(channel, 0)
        os.write(write_end, b"told")
        sleep_long()
    os.wait()
    os.read(read_end, 4)
    return "done"


# --- multiprocessing inside a worker, and its objects as arguments --------------------------------


def square(number: int) -> int:
    return number * number


def square_in_pool(numbers: list[int]) -> list[int]:
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(square, numbers)
        pool.close()
        pool.join()
    return found


def put(queue: Any, value: Any) -> None:
    queue.put(value)


def square_in_process(method: str, number: int) -> int:
    import multiprocessing

    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=put, args=(queue, square(number)))
    process.start()
    found: int = queue.get()
    process.join()
    queue.close()
    queue.join_thread()
    return found


def is_locked(lock: Any) -> bool:
    if lock.acquire(block=False):
        lock.release()
        return False
    return True


def put_and_send(queue: Any, connection: Any, value: Any) -> Any:
    queue.put(value)
    connection.send(value)
    return connection.recv()


def send_and_close(*connections: Any) -> None:
    for number, connection in enumerate(connections):
        connection.send(number)
        connection.close()


def add_to(shared: Any, key: Any, value: Any) -> int:
    shared[key] = value
    return len(shared)


def count_in(name: str) -> int:
    """Count up what is in shared memory."""
    from multiprocessing.shared_memory import SharedMemory

    memory = SharedMemory(name)
    memory.buf[0] += 1
    found = int(memory.buf[0])
    memory.close()
    return found


def authkey() -> bytes:
    import multiprocessing

    return bytes(multiprocessing.current_process().authkey)


def increment(counter: Any) -> None:
    with counter.get_lock():
        counter.value += 1


def numbers_at_random() -> tuple[float, ...]:
    import random

    return tuple(random.random() for _ in range(3))
