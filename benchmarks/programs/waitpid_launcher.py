"""The least that ends a group when one of it dies: spawn, block in waitpid, SIGTERM to the rest.

python waitpid_launcher.py N PROGRAM [ARGUMENT ...]
"""

import os
import signal
import sys


def main() -> None:
    number, argv = int(sys.argv[1]), sys.argv[2:]
    pids = {
        os.posix_spawn(argv[0], argv, {**os.environ, "RANK": str(rank)}, setsid=True)
        for rank in range(number)
    }
    died, _ = os.wait()
    pids.discard(died)
    for pid in pids:
        os.killpg(pid, signal.SIGTERM)
    for pid in pids:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
