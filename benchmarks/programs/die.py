"""A worker that kills itself after a while, and leaves behind when it did so.

python die.py SECONDS FILE
"""

import os
import sys
import time

if __name__ == "__main__":
    time.sleep(float(sys.argv[1]))
    fd = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.write(fd, b"%d" % time.monotonic_ns())
    os.kill(os.getpid(), 9)
