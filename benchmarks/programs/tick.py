"""A worker that says what time it is (`time.monotonic_ns()`), a line at a time.

python tick.py LINES SECONDS_BETWEEN
"""

import os
import sys
import time

if __name__ == "__main__":
    between_s = float(sys.argv[2])
    for _ in range(int(sys.argv[1])):
        time.sleep(between_s)
        os.write(1, b"%d\n" % time.monotonic_ns())
