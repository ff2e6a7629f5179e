"""The least that an asyncio program can do: start N processes, wait until all have ended.

python bare_asyncio.py N PROGRAM [ARGUMENT ...]
"""

import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO


def use_pidfds() -> None:
    """As asyncio does by itself from 3.12 on; 3.11 would start one thread a child."""
    if sys.version_info < (3, 12):
        watcher = asyncio.PidfdChildWatcher()
        watcher.attach_loop(asyncio.get_running_loop())
        asyncio.set_child_watcher(watcher)


async def start_all(
    number: int, *argv: str, folder: str | None = None
) -> list[asyncio.subprocess.Process]:
    """Start them one after the other, their output in two new files each of `folder`, if any."""
    use_pidfds()
    if folder is not None:
        os.makedirs(folder, exist_ok=True)
    return [await _start(argv, rank, folder) for rank in range(number)]


async def _start(argv: Sequence[str], rank: int, folder: str | None) -> asyncio.subprocess.Process:
    with ExitStack() as files:
        out, err = (_opened(files, folder, f"{rank}.{name}") for name in ("out", "err"))
        return await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )


def _opened(files: ExitStack, folder: str | None, name: str) -> IO[bytes] | None:
    return files.enter_context(open(os.path.join(folder, name), "wb")) if folder else None


async def run_all(number: int, *argv: str, folder: str | None = None) -> list[int]:
    """Start them, and return their exit statuses."""
    return [await process.wait() for process in await start_all(number, *argv, folder=folder)]


if __name__ == "__main__":
    sys.exit(max(asyncio.run(run_all(int(sys.argv[1]), *sys.argv[2:]))))
