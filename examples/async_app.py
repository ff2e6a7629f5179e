"""Two groups of workers inside one asyncio application, and no worker left at the end.

A service of two ranks runs for as long as the application wants it; beside it, a batch job of two
ranks runs to its end. Then the service is cancelled: leaving its `async with` ends its workers.

    python examples/async_app.py
"""

import asyncio
import os
import socket
import sys
from contextlib import closing
from pathlib import Path

from asupervise import DefaultLogsSpecs, PContext, Std, rank_environments, start_processes

WORD_COUNT = Path(__file__).with_name("word_count.py")
# Stands for a server: it says that it is there, and works until it is ended.
SERVICE = "import os, signal; print('serving as rank', os.environ['RANK']); signal.pause()"
RANKS = 2


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port: int = listener.getsockname()[1]
        return port


async def serve(started: asyncio.Future[PContext]) -> None:
    async with start_processes(
        "service",
        (sys.executable, "-u", "-c", SERVICE),
        args={rank: () for rank in range(RANKS)},
        envs=rank_environments(RANKS, parent_env=os.environ, master_port=free_port()),
        logs_specs=DefaultLogsSpecs(tee=Std.ALL),
    ) as workers:
        started.set_result(workers)
        await workers.wait()


async def count() -> None:
    async with start_processes(
        "count",
        (sys.executable, "-u", str(WORD_COUNT)),
        args={rank: () for rank in range(RANKS)},
        envs=rank_environments(RANKS, parent_env=os.environ, master_port=free_port()),
        logs_specs=DefaultLogsSpecs(tee=Std.OUT),
    ) as workers:
        result = await workers.wait()
    if result.is_failed():
        raise SystemExit(f"the count failed: {result}")


async def main() -> None:
    started: asyncio.Future[PContext] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as tasks:
        service = tasks.create_task(serve(started))
        workers = await started
        print("the service runs as", len(workers.pids()), "processes")
        await count()
        service.cancel()
    print("the batch is done and the service has ended")


if __name__ == "__main__":
    asyncio.run(main())
