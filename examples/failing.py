"""One rank fails while the others wait for it: see what is said about it.

Run it, and look at the report and at the exit status::

    python -m asupervise --nproc-per-node 3 examples/failing.py

`@record` is what carries the traceback from the worker into the report. Without it the report
still names the rank and its exit status.
"""

import os
import signal

from asupervise import record

BROKEN_RANK = 1


def load_shard(rank: int) -> list[float]:
    if rank == BROKEN_RANK:
        raise ValueError(f"shard {rank} is truncated: 1,024 records expected, 17 found")
    return [0.0] * 1024


@record
def main() -> None:
    load_shard(int(os.environ["RANK"]))
    # A collective operation waits for all ranks: it would do so for ever.
    signal.pause()


if __name__ == "__main__":
    main()
