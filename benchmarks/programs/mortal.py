"""A worker of a whole command: rank 3 kills itself, the others say when they get SIGTERM.

python -m benchmarks.programs.mortal FOLDER

Each leaves its marks in FOLDER, and rank 3 waits there for the word to die.
"""

import os
import signal
import sys
import time

from benchmarks.programs.ranks import rank

_VICTIM = 3
_FIRST_LOOK_S = 0.002
# So that all are asleep again who were woken by the word.
_BETWEEN_S = 0.1


def die(folder: str) -> None:
    while not os.path.exists(f"{folder}/go"):
        time.sleep(_FIRST_LOOK_S)
    time.sleep(_BETWEEN_S)
    fd = os.open(f"{folder}/killed_at", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.write(fd, b"%d" % time.monotonic_ns())
    os.kill(os.getpid(), signal.SIGKILL)


def mourn(folder: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    told = os.open(f"{folder}/told.{os.getpid()}", os.O_WRONLY | os.O_CREAT, 0o600)
    os.close(os.open(f"{folder}/ready.{os.getpid()}", os.O_WRONLY | os.O_CREAT, 0o600))
    signal.sigwait([signal.SIGTERM])
    os.write(told, b"%d" % time.monotonic_ns())
    # An interpreter that ends takes longer than what is measured.
    os._exit(0)


if __name__ == "__main__":
    if rank() == _VICTIM:
        die(sys.argv[1])
    else:
        mourn(sys.argv[1])
