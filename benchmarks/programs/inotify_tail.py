"""The least between a worker's write to a file and a console: inotify, read, prefix, write.

One thread, no event loop, every wait in the kernel::

    python inotify_tail.py WORKERS FOLDER PROGRAM [ARGUMENT ...]
"""

import ctypes
import os
import select
import subprocess
import sys
import threading

_IN_MODIFY = 0x2
_BLOCK_BYTES = 64 * 1024


def main() -> None:
    workers, folder, argv = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    libc = ctypes.CDLL(None, use_errno=True)
    inotify = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    files = []
    processes = []
    for rank in range(workers):
        path = os.path.join(folder, f"{rank}.log")
        with open(path, "wb") as log:
            processes.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log))
        files.append((f"[default{rank}]:".encode(), os.open(path, os.O_RDONLY)))
        if libc.inotify_add_watch(inotify, path.encode(), _IN_MODIFY) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch", path)
    ended, tell = os.pipe()
    threading.Thread(target=_tell_when_over, args=(processes, tell), daemon=True).start()
    follow(inotify, ended, files)


def _tell_when_over(processes: list[subprocess.Popen[bytes]], tell: int) -> None:
    for process in processes:
        process.wait()
    os.close(tell)


def follow(inotify: int, ended: int, files: list[tuple[bytes, int]]) -> None:
    """Show what is written to `files`, until `ended` can be read."""
    poll = select.poll()
    poll.register(inotify, select.POLLIN)
    poll.register(ended, select.POLLIN)
    while True:
        ready = [fd for fd, _ in poll.poll()]
        if inotify in ready:
            os.read(inotify, _BLOCK_BYTES)
        for prefix, fd in files:
            while data := os.read(fd, _BLOCK_BYTES):
                # Each write of a worker is one line here: nothing is held back.
                os.write(1, prefix + data[:-1].replace(b"\n", b"\n" + prefix) + b"\n")
        if ended in ready:
            return


if __name__ == "__main__":
    main()
