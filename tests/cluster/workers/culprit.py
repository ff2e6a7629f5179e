"""A worker of which one fails: ``culprit.py GATE RANK HOW``, once there is a file GATE.

HOW is ``raise``, or the exit status. Each says ``started RANK``, and the one that fails
``failing NODE SECONDS``, by the monotonic clock.
"""

import os
import sys
import time

from asupervise import record

GATE, RANK, HOW = sys.argv[1:4]


def say(text: str) -> None:
    # One call: what several say at once is never mixed.
    os.write(1, f"{text}\n".encode())


@record
def main() -> None:
    mine = os.environ["RANK"] == RANK
    say(f"started {os.environ['RANK']}")
    while not (mine and os.path.exists(GATE)):
        time.sleep(0.01)
    say(f"failing {os.environ['NODE']} {time.monotonic()}")
    if HOW != "raise":
        os._exit(int(HOW))
    raise ValueError(f"shard {RANK} is truncated")


if __name__ == "__main__":
    main()
