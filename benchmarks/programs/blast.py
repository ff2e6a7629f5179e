"""A worker that writes a file to its standard output as fast as it can, in blocks of 64 KiB.

python blast.py FILE [TIMES]
"""

import sys

BLOCK_BYTES = 64 * 1024

if __name__ == "__main__":
    for _ in range(int(sys.argv[2]) if len(sys.argv) > 2 else 1):
        with open(sys.argv[1], "rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                sys.stdout.buffer.write(block)
    sys.stdout.buffer.flush()
