"""The least that an asyncio program can do: start N processes, wait until all have ended.

python bare_asyncio.py N PROGRAM [ARGUMENT ...]
"""

import asyncio
import sys


def use_pidfds() -> None:
    """As asyncio does by itself from 3.12 on; 3.11 would start one thread a child."""
    if sys.version_info < (3, 12):
        watcher = asyncio.PidfdChildWatcher()
        watcher.attach_loop(asyncio.get_running_loop())
        asyncio.set_child_watcher(watcher)


async def run_all(number: int, *argv: str) -> list[int]:
    """Start them one after the other; returns their exit statuses."""
    use_pidfds()
    processes = [
        await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
        )
        for _ in range(number)
    ]
    return [await process.wait() for process in processes]


if __name__ == "__main__":
    sys.exit(max(asyncio.run(run_all(int(sys.argv[1]), *sys.argv[2:]))))
