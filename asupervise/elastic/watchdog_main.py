"""A small process that ends a node's workers when nobody has said in time that they may live on.

It sleeps in poll(2) until there is something to read or the deadline has come, and has loaded by
then whatever it needs to act. See `asupervise.elastic.watchdog` for who tells it what, and why.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from math import inf

from asupervise import procfs
from asupervise.cgroups import OwnCgroup

__all__ = ["Orders", "end_group", "main"]

# Whom we talk to: one end of a pair of sockets.
_AGENT = 0
_ROUNDS = 200
# How long one that has been sent SIGKILL may take to go: longer means uninterruptible sleep.
_KILL_WAIT_S = 5.0


class Orders:
    """What the agent has told so far: pure.

    Its words are lines: ``until SECONDS``, ``group TOKEN``, ``leaders PID:START ...``,
    ``cgroup FOLDER`` and ``none``.

    Attributes:
        deadline: when to end the group, on ``time.monotonic()``.
        token: the present group's, which stands in the environment of all its processes; "" while
            there is none.
        leaders: of its sessions, by pid and start time in ticks since boot.
        cgroup: the folder of its own cgroup, or "".

    Example:
        >>> orders = Orders()
        >>> orders.take(b"until 20.5\\ngroup asv-1\\nlead")
        >>> orders.take(b"ers 7:100 8:101\\n")
        >>> orders.leaders, orders.wait_s(now=20.0), orders.wait_s(now=21.0)
        ([(7, 100), (8, 101)], 0.5, 0.0)
    """

    def __init__(self) -> None:
        self.deadline = inf
        self.token = ""
        self.leaders: list[tuple[int, int]] = []
        self.cgroup = ""
        self._done = False
        self._rest = b""

    def take(self, data: bytes) -> None:
        """Read what has come; the last line may not be complete yet."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            word, _, text = line.decode(errors="surrogateescape").partition(" ")
            self._obey(word, text)

    def _obey(self, word: str, text: str) -> None:
        # Whoever comes after the group has been ended was started by an agent that did not know.
        self._done = False
        if word == "until":
            self.deadline = float(text)
        elif word == "group":
            self.token, self.leaders, self.cgroup = text, [], ""
        elif word == "leaders":
            pairs = (pair.partition(":") for pair in text.split())
            self.leaders += [(int(pid), int(start)) for pid, _, start in pairs]
        elif word == "cgroup":
            self.cgroup = text
        elif word == "none":
            self.token, self.leaders, self.cgroup = "", [], ""

    def wait_s(self, now: float) -> float | None:
        """How long until the deadline, 0 if it is over; None if there is nothing to wait for."""
        if self._done or self.deadline == inf:
            return None
        return max(0.0, self.deadline - now)

    def done(self) -> None:
        """The deadline has passed, and the group has been ended."""
        self._done = True


def main(agent: int) -> None:
    """Serve the agent until it closes its end; it is our parent, of this pid."""
    os.set_blocking(_AGENT, False)
    orders = Orders()
    poller = select.poll()
    poller.register(_AGENT, select.POLLIN)
    told = True
    while told or (orders.token and orders.wait_s(time.monotonic()) is not None):
        wait_s = orders.wait_s(time.monotonic())
        # What has been told comes first, even where the deadline is over: it may be another by now.
        if poller.poll(None if wait_s is None else wait_s * 1000):
            data = _read()
            orders.take(data)
            if not data:
                # Without a goodbye its guardian ends the workers, if it has one that lives. What is
                # left of them is ours when the time has come.
                poller.unregister(_AGENT)
                told = False
        elif wait_s == 0:
            _act(orders)
            # Its end may still be open in a process that it has forked.
            told = told and os.getppid() == agent


def _read() -> bytes:
    try:
        return os.read(_AGENT, 1 << 16)
    except ConnectionResetError:
        # It has ended without reading what we had said.
        return b""


def _act(orders: Orders) -> None:
    if orders.token:
        try:
            # Before anybody dies: whoever sees a worker killed by us finds that it was us.
            os.write(_AGENT, f"ended {orders.token}\n".encode())
        except OSError:
            # It is gone, or has read nothing for so long that there is no room.
            pass
        end_group(orders)
    orders.done()


def end_group(group: Orders) -> None:
    """Send SIGKILL to everybody of the group until nobody is left.

    Whoever is found by session, by the token, by the cgroup, or as a descendant of these. A leader
    counts only if its start time is the one that we were told.
    """
    cgroup = OwnCgroup(group.cgroup) if group.cgroup else None
    # Before the leaders die: when one is reaped nobody can say whose session it was.
    known = {(entry.pid, entry.start_ticks) for entry in _relatives(group, frozenset())}
    for pid in _sessions(group.leaders):
        _send(procfs.send_to_group, pid)
    if cgroup is not None:
        cgroup.kill()
    for _ in range(_ROUNDS):
        found = _relatives(group, known, group.token.encode(), cgroup)
        if not found:
            return
        known |= {(entry.pid, entry.start_ticks) for entry in found}
        for entry in found:
            _send(procfs.send_to_process, entry)
        if not _gone(found):
            return


def _send(send: object, whom: object) -> None:
    try:
        send(whom, signal.SIGKILL)  # type: ignore[operator]
    except PermissionError:
        # It has changed its user. Nobody is there who could be told.
        pass


def _relatives(
    group: Orders,
    known: Iterable[tuple[int, int]],
    token: bytes = b"",
    cgroup: OwnCgroup | None = None,
) -> list[procfs.ProcessEntry]:
    """Who of the living is the group's."""
    table = {entry.pid: entry for entry in procfs.entries()}
    sessions, before = set(_sessions(group.leaders)), set(known)
    inside = set(cgroup.pids()) if cgroup is not None else set()
    ours = {
        entry.pid
        for entry in table.values()
        if entry.session in sessions
        or entry.pid in inside
        or (entry.pid, entry.start_ticks) in before
        or (token and procfs.environment_holds(entry.pid, token))
    }
    ours |= set(_descendants(ours, table.values()))
    return [table[pid] for pid in sorted(ours)]


def _sessions(leaders: Sequence[tuple[int, int]]) -> Iterator[int]:
    """The leaders whose pid nobody else has got; also those that have ended and are not reaped."""
    for pid, start_ticks in leaders:
        entry = procfs.read_entry(pid)
        if entry is not None and entry.start_ticks == start_ticks:
            yield pid


def _descendants(of: Iterable[int], entries: Iterable[procfs.ProcessEntry]) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for entry in entries:
        children.setdefault(entry.parent_pid, []).append(entry.pid)
    todo = list(of)
    while todo:
        born = children.pop(todo.pop(), [])
        yield from born
        todo += born


def _gone(entries: Iterable[procfs.ProcessEntry]) -> bool:
    """Wait until they have ended; False if one has not within `_KILL_WAIT_S`."""
    deadline = time.monotonic() + _KILL_WAIT_S
    with ExitStack() as stack:
        poller = select.poll()
        left = 0
        for entry in entries:
            try:
                pidfd = os.pidfd_open(entry.pid)
            except OSError:
                continue  # gone, or no descriptor is left: we look again anyway
            stack.callback(os.close, pidfd)
            if procfs.is_same(entry):
                poller.register(pidfd, select.POLLIN)
                left += 1
        while left:
            ended = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ended:
                return False
            for pidfd, _ in ended:
                poller.unregister(pidfd)
            left -= len(ended)
    return True
