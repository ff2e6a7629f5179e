"""``python -m examples.job_service``: the service on 127.0.0.1, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import socket
import sys

try:
    import uvicorn

    from .app import create_app
    from .service import JobService
except ModuleNotFoundError as exc:
    sys.exit(f"error: {exc.name} is not installed\nhint: pip install asupervise starlette uvicorn")

HOST = "127.0.0.1"
DESCRIPTION = "Runs commands as groups of ranks, and shows them on a web page, until Ctrl-C."


class Server(uvicorn.Server):
    """Ends the jobs before it waits for connections to end.

    The other way round, which is uvicorn's, it would wait for ever: a page that follows a job is
    a connection that ends with the job.
    """

    def __init__(self, config: uvicorn.Config, service: JobService) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._service.close()
        await super().shutdown(sockets)


def main() -> int:
    parser = argparse.ArgumentParser(prog="job_service", description=DESCRIPTION)
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    parser.add_argument("--at-once", type=int, default=4, help="how many jobs run at a time")
    options = parser.parse_args()
    if options.at_once < 1:
        parser.error(f"--at-once: {options.at_once}: expected at least 1")
    try:
        listener = socket.create_server((HOST, options.port))
    except (OSError, OverflowError) as exc:
        parser.error(f"--port: {options.port}: {exc}")
    print(f"http://{HOST}:{listener.getsockname()[1]}/", flush=True)
    service = JobService(at_once=options.at_once)
    config = uvicorn.Config(create_app(service), log_level="warning")
    try:
        Server(config, service).run(sockets=[listener])
    except KeyboardInterrupt:
        return 130  # uvicorn has ended in order, and then passes the signal on
    return 0


if __name__ == "__main__":
    sys.exit(main())
