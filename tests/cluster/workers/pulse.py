"""A worker that shows that it lives: ``pulse.py PULSES FINISH [stubborn]``.

Every 10 ms it appends ``NODE RANK PID NANOSECONDS`` to the file PULSES, by the monotonic clock,
which all nodes of one machine have in common. It ends when there is a file FINISH.

It says ``started WORLD_SIZE NODE RANK PID GROUP_RANK`` at first, and ``ending WORLD_SIZE NODE RANK
PID`` when it is told to end, which a stubborn one does not then do.
"""

import os
import signal
import sys
import time

PULSES, FINISH = sys.argv[1:3]
WHO = " ".join((os.environ["NODE"], os.environ["RANK"], str(os.getpid())))
WORLD = os.environ["WORLD_SIZE"]


def say(text: str) -> None:
    # One call: what several say at once is never mixed.
    os.write(1, f"{text}\n".encode())


def end(*_: object) -> None:
    say(f"ending {WORLD} {WHO}")
    if "stubborn" not in sys.argv:
        os._exit(0)


def pulse() -> None:
    os.write(pulses, f"{WHO} {time.monotonic_ns()}\n".encode())


signal.signal(signal.SIGTERM, end)
pulses = os.open(PULSES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
pulse()
say(f"started {WORLD} {WHO} {os.environ['GROUP_RANK']}")
while not os.path.exists(FINISH):
    pulse()
    time.sleep(0.01)
