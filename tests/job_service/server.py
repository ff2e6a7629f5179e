"""The job service as its own process, and what tests do with it from outside."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, clean_environment

CEILING_S = 40.0
# Says who it is, waits to be let go, says so.
HELD = 'echo "hello from $RANK"; read line < "$GATE"; echo "bye from $RANK"'
JSON = {"Content-Type": "application/json"}


class Server:
    """The service as its own process, on a port that is free."""

    def __init__(
        self,
        folder: Path,
        argv: tuple[str, ...] = ("-m", "examples.job_service", "--port", "0"),
        pass_fds: tuple[int, ...] = (),
        port: int | None = None,
    ) -> None:
        self.errors = folder / "server.err"
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", *argv],
                cwd=ROOT,
                env=clean_environment() | {"TMPDIR": str(folder)},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                pass_fds=pass_fds,
            )
        self.port = self._port_that_it_says() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}/"

    def _port_that_it_says(self) -> int:
        assert self.process.stdout is not None
        said = re.search(r":(\d+)/$", self.process.stdout.readline())
        assert said, self.errors.read_text()
        return int(said[1])

    def ask(
        self, method: str, path: str, data: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of the answer."""
        body = data if data is None or isinstance(data, bytes) else json.dumps(data).encode()
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, CEILING_S)) as connection:
            connection.request(method, path, body, {**(JSON if body else {}), **(headers or {})})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def fetch(self, path: str) -> tuple[int, str, bytes]:
        """Status, type and body of the answer."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, CEILING_S)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.headers.get("Content-Type", ""), answer.read()

    def submit(self, command: object, **rest: object) -> str:
        status, job = self.ask("POST", "/jobs", {"command": command, **rest})
        assert status == 201, job
        return str(job["id"])

    def job(self, id: str) -> Any:
        return self.ask("GET", f"/jobs/{id}")[1]

    def jobs(self) -> list[Any]:
        found: list[Any] = self.ask("GET", "/jobs")[1]["jobs"]
        return found

    def stream(self, path: str) -> Iterator[tuple[str, Any]]:
        """Names and data of the events, until the service ends them."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, CEILING_S)) as connection:
            connection.request("GET", path)
            yield from events_in(connection.getresponse())

    def wait_for(self, path: str, condition: Callable[[Any], bool]) -> None:
        """Until something that the stream says is so."""
        assert any(condition(data) for _, data in self.stream(path)), f"{path} has ended"

    def wait_ended(self, id: str) -> Any:
        for _ in self.stream(f"/jobs/{id}/stream"):
            pass
        return self.job(id)

    def end(self, sig: int = signal.SIGTERM) -> int:
        self.process.send_signal(sig)
        try:
            return self.process.wait(CEILING_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def close(self) -> None:
        if self.process.poll() is None:
            self.end()
        self.process.communicate()
        print(self.errors.read_text())  # shown if the test fails


def events_in(answer: http.client.HTTPResponse) -> Iterator[tuple[str, Any]]:
    name = ""
    for raw in answer:
        field, _, value = raw.decode().rstrip("\n").partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


class Gate:
    """A pipe by name, of which each held worker takes one line."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.env = {"GATE": str(path)}
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def open(self, workers: int) -> None:
        os.write(self._fd, b"\n" * workers)

    def close(self) -> None:
        os.close(self._fd)


def held(server: Server, gate: Gate, ranks: int = 1) -> str:
    return server.submit(["sh", "-c", HELD], ranks=ranks, env=gate.env)
