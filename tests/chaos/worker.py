"""One worker of a chaos round: ``worker.py MARKER CONFIRMED RANK WISH...``.

Writes numbered lines to its standard output and, after each, its number into the file CONFIRMED:
what stands there must stand in the log, however the worker dies. Run with ``python -I -S``.
"""

import os
import signal
import sys
import time

MARKER, CONFIRMED, RANK = sys.argv[1:4]
WISHES = sys.argv[4:]


def sleeper(*before: str) -> list[str]:
    return [*before, "sleep", MARKER]


def fork_and(*steps: str) -> None:
    """A child that takes these steps and sleeps then."""
    if os.fork():
        return
    for step in steps:
        if step == "setsid":
            os.setsid()
        elif step == "setpgid":
            os.setpgid(0, 0)
        elif step == "fork":
            if os.fork():
                os._exit(0)
        elif step == "ignore":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif step == "wipe":
            os.execvpe("sleep", sleeper(), {})
        elif step == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
    os.execvp("sleep", sleeper())


def confirm(number: int) -> None:
    os.write(confirmed, b"%d\n" % number)


def write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def lines(count: int, width: int = 20) -> None:
    global written
    for _ in range(count):
        write(b"%s:%d:%s\n" % (RANK.encode(), written, b"x" * width))
        confirm(written)
        written += 1


def storm(count: int) -> None:
    for _ in range(count):
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)


def rename() -> None:
    with open("/proc/self/comm", "w") as file:
        file.write(") R 1 (x")


written = 0
confirmed = os.open(CONFIRMED, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
lines(3)
for wish in WISHES:
    name, _, value = wish.partition("=")
    if name == "child":
        fork_and(*filter(None, value.split(",")))
    elif name == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    elif name == "daemon-at-end":

        def at_end(*_: object) -> None:
            fork_and("setsid", "fork")
            os._exit(0)

        signal.signal(signal.SIGTERM, at_end)
    elif name == "lines":
        lines(int(value))
    elif name == "flood":
        lines(int(value), 1000)
    elif name == "close":
        os.close(1)
        os.open(os.devnull, os.O_WRONLY)
    elif name == "storm":
        storm(int(value))
    elif name == "rename":
        rename()
    elif name == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif name == "pause":
        time.sleep(float(value))
    elif name == "crash":
        os.kill(os.getpid(), int(value))
    elif name == "exit":
        os._exit(int(value))
while True:
    lines(1)
    time.sleep(0.02)
