"""A worker that writes numbered lines with its rank as fast as it can, cut anywhere by its buffer.

python -m benchmarks.programs.speak LINES
"""

import sys

from benchmarks.programs.ranks import rank

BLOCK_BYTES = 64 * 1024


if __name__ == "__main__":
    own = rank()
    text = b"".join(b"{%02d %08d %s}\n" % (own, i, b"x" * 86) for i in range(int(sys.argv[1])))
    for place in range(0, len(text), BLOCK_BYTES):
        sys.stdout.buffer.write(text[place : place + BLOCK_BYTES])
    sys.stdout.buffer.flush()
