"""Count the words of Python's standard library, each rank its share of the files.

A ranked program without torch: a rank learns who it is from its environment (`RANK`,
`WORLD_SIZE`), and meets the others at `MASTER_ADDR:MASTER_PORT`, where rank 0 adds up what they
counted. Run it with four ranks and their output on the console::

    python -m asupervise --nproc-per-node 4 --tee 3 examples/word_count.py
"""

import json
import os
import re
import socket
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

from asupervise import record

WORD = re.compile(r"[A-Za-z_]\w+")
FILES_A_REPORT = 75
LINES_IN_RESULT = 5
MEETING_TIMEOUT_S = 30.0


def library_files() -> list[Path]:
    """The standard library's modules, in the same order in every rank."""
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    return sorted(
        path
        for path in library.rglob("*.py")
        if left_out.isdisjoint(path.relative_to(library).parts)
    )


def count_words(files: list[Path]) -> Counter[str]:
    words: Counter[str] = Counter()
    for done, path in enumerate(files, start=1):
        words.update(WORD.findall(path.read_text(encoding="utf-8", errors="replace")))
        if done % FILES_A_REPORT == 0:
            print(f"{done} of {len(files)} files", file=sys.stderr)
    return words


def send_counts(words: Counter[str], address: tuple[str, int]) -> None:
    """Hand this rank's counts to rank 0."""
    with connect(address) as conn:
        conn.sendall(json.dumps(words).encode())


def connect(address: tuple[str, int]) -> socket.socket:
    """Connect to rank 0, which may not listen yet: nothing tells when it does but trying."""
    deadline = time.monotonic() + MEETING_TIMEOUT_S
    while True:
        try:
            return socket.create_connection(address, timeout=MEETING_TIMEOUT_S)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def receive_counts(listener: socket.socket) -> Counter[str]:
    """One rank's counts, from whichever rank connects next."""
    conn, _ = listener.accept()
    with conn, conn.makefile("rb") as stream:
        return Counter(json.load(stream))


def print_result(words: Counter[str], ranks: int) -> None:
    print(f"{words.total():,} words, {len(words):,} of them different, by {ranks} ranks")
    for word, times in words.most_common(LINES_IN_RESULT):
        print(f"{times:>9,}  {word}")


@record
def main() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    files = library_files()[rank::ranks]
    if rank > 0:
        words = count_words(files)
        print(f"counted {words.total():,} words in {len(files)} files")
        send_counts(words, address)
        return
    with socket.create_server(address, backlog=ranks) as listener:
        listener.settimeout(MEETING_TIMEOUT_S)
        words = count_words(files)
        print(f"counted {words.total():,} words in {len(files)} files")
        for _ in range(ranks - 1):
            words += receive_counts(listener)
    print_result(words, ranks)


if __name__ == "__main__":
    main()
