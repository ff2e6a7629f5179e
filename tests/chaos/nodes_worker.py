"""One worker of a chaos run over nodes: ``nodes_worker.py FOLDER``.

Every 10 ms it writes to FOLDER/history that it is alive. It ends with success when there is
FOLDER/done, and with the exit code that it finds in FOLDER/order.PID. Run with ``python -I -S``.
"""

import os
import sys
import time
from pathlib import Path

FOLDER = Path(sys.argv[1])
BEAT_S = 0.01


def main() -> int:
    # One write each, and no file position of our own: lines of different workers do not mix.
    history = os.open(FOLDER / "history", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "CHAOS_SLOT")
    said = " ".join(os.environ[name] for name in names)
    # A pid may come again.
    itself = f"{os.getpid()} {time.monotonic_ns()}"
    order, done = FOLDER / f"order.{os.getpid()}", FOLDER / "done"
    while True:
        os.write(history, f"{time.monotonic_ns()} {said} {itself}\n".encode())
        if order.exists():
            return int(order.read_text())
        if done.exists():
            return 0
        time.sleep(BEAT_S)


if __name__ == "__main__":
    sys.exit(main())
