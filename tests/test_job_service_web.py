"""The job service as people use it: the real server, its API, and its pages in a real browser."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser import OpenPage, take_pictures
from tests.conftest import ROOT, clean_environment, wait_gone

if TYPE_CHECKING:
    from playwright.sync_api import Page

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
        with self.errors.open("wb") as errors:
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


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(tmp_path)
    try:
        yield started
    finally:
        started.close()
    # Nothing is wrong in a test that passes, and nothing stays in its folder for temporary files.
    assert started.errors.read_text() == ""


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


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    made = Gate(tmp_path / "gate")
    yield made
    made.close()


def expect(found: Any) -> Any:
    from playwright.sync_api import expect

    return expect(found)


def held(server: Server, gate: Gate, ranks: int = 1) -> str:
    return server.submit(["sh", "-c", HELD], ranks=ranks, env=gate.env)


# --- the pages ----------------------------------------------------------------------------------


def test_twenty_jobs_four_at_a_time(page: Page, server: Server, gate: Gate, pictures: Path) -> None:
    page.goto(server.url)
    expect(page.locator("#none")).to_have_text("No jobs yet.")
    ids = [held(server, gate) for _ in range(20)]
    expect(page.locator("#counts")).to_have_text("4 of 4 running, 16 queued")
    expect(page.locator(".state.running")).to_have_count(4)
    numbers = [f"#{number}" for number in range(1, 21)]
    expect(page.locator(".jobs .number")).to_have_text(numbers)
    gate.open(1)
    expect(page.locator("#counts")).to_have_text("4 of 4 running, 15 queued")
    take_pictures(page, pictures, "jobs-queue")
    gate.open(19)
    expect(page.locator("#counts")).to_have_text("0 of 4 running, 0 queued")
    expect(page.locator(".state.succeeded")).to_have_count(20)
    expect(page.locator(".jobs .number")).to_have_text(numbers[::-1])
    jobs = server.jobs()
    assert [job["id"] for job in jobs] == ids
    starts = [job["started"] for job in jobs]
    assert starts == sorted(starts)
    for moment in starts:
        assert sum(job["started"] <= moment < job["ended"] for job in jobs) <= 4


def test_a_job_is_followed_while_it_runs(
    page: Page, server: Server, gate: Gate, pictures: Path
) -> None:
    job = held(server, gate, ranks=2)
    page.goto(f"{server.url}follow/{job}")
    output = page.locator("#output")
    for rank in range(2):
        expect(output).to_contain_text(f"[{rank}] hello from {rank}")
    expect(page.locator("#state")).to_have_text("running")
    expect(page.locator("#ranks .state")).to_have_text(["running", "running"])
    take_pictures(page, pictures, "job-running")
    gate.open(2)
    for rank in range(2):
        expect(output).to_contain_text(f"[{rank}] bye from {rank}")
    expect(page.locator("#state")).to_have_text("succeeded")
    expect(page.locator("#ranks .state")).to_have_text(["succeeded", "succeeded"])
    expect(page.locator("#cancel")).to_be_hidden()
    expect(page.locator("#lost")).to_be_hidden()


def test_progress_is_shown(page: Page, server: Server, gate: Gate, tmp_path: Path) -> None:
    script = tmp_path / "progress.py"
    script.write_text(
        "import asupervise, os\nasupervise.progress(30, 120)\nopen(os.environ['GATE']).readline()\n"
    )
    job = server.submit([str(script)], env=gate.env)
    page.goto(f"{server.url}follow/{job}")
    expect(page.locator("#ranks progress")).to_be_visible()
    assert page.locator("#ranks progress").evaluate("bar => bar.value / bar.max") == 0.25
    gate.open(1)
    expect(page.locator("#state")).to_have_text("succeeded")


def test_a_job_is_cancelled_from_its_page(
    page: Page, server: Server, gate: Gate, pictures: Path
) -> None:
    job = held(server, gate, ranks=3)
    page.goto(f"{server.url}follow/{job}")
    expect(page.locator("#output")).to_contain_text("[2] hello from 2")
    pids = [rank["pid"] for rank in server.job(job)["by_rank"]]
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#state")).to_have_text("cancelled")
    expect(page.locator("#ranks .state")).to_have_text(["ended: SIGTERM"] * 3)
    expect(page.locator("#cancel")).to_be_hidden()
    assert not wait_gone(pids, 0.0)
    take_pictures(page, pictures, "job-cancelled")
    assert "bye" not in page.locator("#output").inner_text()


def test_a_job_fails_and_says_why(page: Page, server: Server, pictures: Path) -> None:
    page.goto(server.url)
    page.get_by_role("button", name="New job").click()
    page.get_by_label("Command").fill("examples/failing.py --seed 1")
    page.get_by_label("Ranks").fill("3")
    page.get_by_label("Environment").fill("GREETING=hello = there\n")
    take_pictures(page, pictures, "job-form")
    page.get_by_role("button", name="Start").click()
    page.wait_for_url("**/follow/*")
    expect(page.locator("#state")).to_have_text("failed")
    expect(page.locator("#culprit-title")).to_have_text("Rank 1 failed first: exit code 1")
    why = "ValueError: shard 1 is truncated: 1,024 records expected, 17 found"
    expect(page.locator("#culprit-message")).to_have_text(why)
    expect(page.locator("#culprit-text")).to_contain_text("line 21, in load_shard")
    expect(page.locator("#facts")).to_contain_text("GREETING")
    take_pictures(page, pictures, "job-failed", full_page=True)
    page.get_by_role("link", name="All jobs").click()
    expect(page.locator(".why")).to_have_text(f"rank 1: exit code 1: {why}")
    # The service goes on.
    server.submit("true")
    expect(page.locator(".state.succeeded")).to_have_count(1)
    take_pictures(page, pictures, "jobs-failed")


def test_a_job_that_cannot_start_says_why(page: Page, server: Server) -> None:
    job = server.submit("no-such-program-at-all")
    page.goto(f"{server.url}follow/{job}")
    expect(page.locator("#state")).to_have_text("failed")
    expect(page.locator("#culprit-title")).to_have_text("It could not be run")
    expect(page.locator("#culprit-message")).to_contain_text("no-such-program-at-all")


def test_the_form_says_what_is_wrong_with_a_job(open_page: OpenPage, server: Server) -> None:
    page = open_page(tolerates="status of 400")
    page.goto(server.url)
    page.get_by_role("button", name="New job").click()
    page.get_by_label("Command").fill("echo 'never ended")
    page.get_by_label("Environment").fill("no value")
    page.get_by_role("button", name="Start").click()
    problem = page.get_by_role("alert")
    expect(problem).to_have_text("environment: no value: expected NAME=value")
    page.get_by_label("Environment").fill("")
    page.get_by_role("button", name="Start").click()
    expect(problem).to_have_text("command: No closing quotation")
    assert server.jobs() == []


HOSTILE = r"""
import sys
out = sys.stdout.buffer
out.write(b"<script>window.acted = 1</script><img src=x onerror='window.acted = 2'>\n")
out.write(b"\x1b[31mred\x1b[0m \x1b]0;title\x07and nul \x00 and bell \x07 and \xff\n")
out.write("right \u202e to left\n".encode())
out.write(b"first\rsecond\r\n")
out.write(b"x" * 100_000 + b"\n")
out.flush()
raise SystemExit("</pre><script>window.acted = 3</script>")
"""


def test_what_a_job_prints_is_text(
    page: Page, server: Server, tmp_path: Path, pictures: Path
) -> None:
    script = tmp_path / "<b>hostile<i>.py"
    script.write_text(HOSTILE)
    name = "<img src=y onerror='window.acted = 4'>"
    job = server.submit([str(script), name], env={"<u>NAME": "1"})
    page.goto(f"{server.url}follow/{job}")
    expect(page.locator("#state")).to_have_text("failed")
    output = page.locator("#output")
    expect(output).to_contain_text("[0] <script>window.acted = 1</script><img src=x onerror=")
    expect(output).to_contain_text("red and nul \u2400 and bell \u2407 and \\xff")
    expect(output).to_contain_text("right \ufffd to left")
    expect(output).to_contain_text("second")
    expect(output).to_contain_text("more characters)")
    expect(page.locator("#culprit-text")).to_contain_text("</pre><script>window.acted = 3")
    expect(page.locator("#command")).to_contain_text(name.replace("'", "'\"'\"'"))
    expect(page.locator("#facts")).to_contain_text("<u>NAME")
    take_pictures(page, pictures, "job-hostile", full_page=True)
    assert page.evaluate("document.querySelectorAll('img, b, i, u, pre script').length") == 0
    page.get_by_role("link", name="All jobs").click()
    expect(page.locator(".job .command")).to_contain_text("<b>hostile<i>")
    assert page.evaluate("[window.acted, document.querySelectorAll('img, b').length]") == [None, 0]


def test_a_job_that_is_not_known(open_page: OpenPage, server: Server) -> None:
    page = open_page(tolerates="status of 404")
    answer = page.goto(f"{server.url}follow/1-00000000")
    assert answer is not None
    assert answer.status == 404
    expect(page.locator("#missing")).to_be_visible()


# --- the API ------------------------------------------------------------------------------------


def test_a_slow_reader_is_told_what_it_has_lost_and_holds_up_nobody(
    server: Server, gate: Gate
) -> None:
    lines = 200_000
    flood = f'read line < "$GATE"; seq -f "line %.0f, and what makes it longer" {lines}'
    job = server.submit(["sh", "-c", flood], env=gate.env)
    with closing(socket.socket()) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        request = f"GET /jobs/{job}/stream HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n"
        slow.sendall(request.encode())
        # It is connected, and takes nothing until the job is over.
        assert slow.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
        gate.open(1)
        assert server.wait_ended(job)["state"] == "succeeded"
        slow.settimeout(CEILING_S)
        with http.client.HTTPResponse(slow) as answer:
            answer.begin()
            told = list(events_in(answer))
    assert told[-1] == ("end", {})
    outputs = [data for name, data in told if name == "output"]
    items = [item for data in outputs for item in data["items"]]
    written = [item["text"] for item in items if "rank" in item]
    lost = sum(data["lost"] for data in outputs)
    assert lost > 0
    # Started and ended are notes of the service.
    assert lost + len(items) == lines + 2
    assert written[-1] == f"line {lines}, and what makes it longer"


def test_a_stream_goes_on_where_it_was_cut(server: Server) -> None:
    job = server.submit(["sh", "-c", "echo one; echo two"])
    server.wait_ended(job)
    everything = [data for name, data in server.stream(f"/jobs/{job}/stream") if name == "output"]
    (first,) = everything
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, CEILING_S)) as connection:
        connection.request("GET", f"/jobs/{job}/stream", headers={"Last-Event-ID": "2"})
        told = dict(events_in(connection.getresponse()))
    assert told["output"]["items"] == first["items"][2:]


def test_other_pages_are_refused(server: Server) -> None:
    for headers in (
        {"Host": "evil.example"},
        {"Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        (name,) = headers
        for path in ("/jobs", "/jobs/1/cancel"):
            status, said = server.ask("POST", path, {"command": "true"}, headers)
            assert (status, said["error"].partition(":")[0]) == (403, name)
    # Of these a page may send any, without having asked first.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; a=b"):
        status, _ = server.ask("POST", "/jobs", {"command": "true"}, {"Content-Type": kind})
        assert status == 415
    assert server.jobs() == []


def test_bad_requests_are_answered(server: Server) -> None:
    for body in (
        b"{",
        b"[" * 100_000,
        b'{"command": "true", "ranks": NaN}',
        b"\xff",
        b"1" * 10_000,
    ):
        status, said = server.ask("POST", "/jobs", body)
        assert (status, bool(said["error"])) == (400, True)
    assert server.ask("POST", "/jobs", b" " * 300_000)[0] == 413
    assert server.ask("POST", "/jobs/none/cancel")[0] == 404
    job = server.submit("true")
    server.wait_ended(job)
    assert server.ask("POST", f"/jobs/{job}/cancel")[0] == 200


# --- the end ------------------------------------------------------------------------------------


def test_the_files_of_a_job_and_no_others(server: Server, gate: Gate) -> None:
    script = (
        'echo whole; ln -s /etc/hostname "${TORCHELASTIC_ERROR_FILE%/*}/link"; read x < "$GATE"'
    )
    job = server.submit(["sh", "-c", script], env=gate.env)
    server.wait_for(f"/jobs/{job}/stream", lambda data: "whole" in json.dumps(data))
    folder = f"/jobs/{job}/files"
    assert server.fetch(f"{folder}/attempt_0/0/stdout.log")[0] == 404
    gate.open(1)
    server.wait_ended(job)
    status, kind, text = server.fetch(f"{folder}/attempt_0/0/stdout.log")
    assert (status, kind, text) == (200, "text/plain; charset=utf-8", b"whole\n")
    assert server.fetch(f"{folder}/events.jsonl")[0] == 200
    for outside in (
        "attempt_0/0/link",
        "../../../etc/hostname",
        "/etc/hostname",
        "attempt_0",
        "%00",
    ):
        assert server.fetch(f"{folder}/{outside}")[0] == 404


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing")
def test_the_commands_of_the_readme_work(server: Server) -> None:
    readme = (ROOT / "examples" / "job_service" / "README.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    start, asking, _ = blocks
    assert start == "python -m examples.job_service --port 8000 --at-once 4\n"
    script = "set -e\n" + asking.replace("http://127.0.0.1:8000/", server.url)
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=CEILING_S)
    assert done.returncode == 0, done.stderr
    (job,) = server.jobs()
    assert json.loads(done.stdout.partition("}{")[0] + "}")["id"] == job["id"]
    assert server.wait_ended(job["id"])["culprit"]["rank"] == 1


def test_under_uvicorn_alone_open_pages_have_a_limit(tmp_path: Path, gate: Gate) -> None:
    readme = (ROOT / "examples" / "job_service" / "README.md").read_text()
    (command,) = re.findall(r"^uvicorn (.*)$", readme, re.MULTILINE)
    # It listens already, so that nobody has to find out when the server does.
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        fd, port = listener.fileno(), listener.getsockname()[1]
        argv = ("-m", "uvicorn", *command.split(), "--fd", str(fd))
        server = Server(tmp_path, argv, pass_fds=(fd,), port=port)
    try:
        job = held(server, gate)
        follower = server.stream(f"/jobs/{job}/stream")
        assert any("hello from 0" in json.dumps(data) for _, data in follower)
        pids = [rank["pid"] for rank in server.job(job)["by_rank"]]
        assert server.end() == -signal.SIGTERM
        assert not wait_gone(pids, 0.0)
        follower.close()
    finally:
        server.close()


@pytest.mark.parametrize(
    ("sig", "status"),
    [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_no_process_is_left_when_the_server_is_ended(
    server: Server, gate: Gate, tmp_path: Path, sig: int, status: int
) -> None:
    running = [held(server, gate, ranks=2) for _ in range(4)]
    waiting = held(server, gate)
    for id in running:
        server.wait_for(f"/jobs/{id}/stream", lambda data: "hello from 1" in json.dumps(data))
    pids = [rank["pid"] for id in running for rank in server.job(id)["by_rank"]]
    assert len(pids) == 8
    # Pages that are open do not hold it up, and are told the end.
    follower = server.stream(f"/jobs/{running[0]}/stream")
    lists = server.stream("/stream")
    assert next(follower)[0] == "job"
    assert waiting in next(lists)[1]["ids"]
    assert server.end(sig) == status
    if sig == signal.SIGKILL:
        assert not wait_gone(pids)  # by their guardians
        return
    assert not wait_gone(pids, 0.0)
    *_, (name, _) = follower
    assert name == "end"
    *_, (_, rows), (name, _) = lists
    assert name == "end"
    assert {row["state"] for row in rows["rows"]} <= {"cancelled"}
    assert not list(tmp_path.glob("job_service_*"))


def test_a_port_that_is_taken_is_an_error(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        argv = [sys.executable, "-m", "examples.job_service", "--port", str(port)]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=CEILING_S)
    assert done.returncode == 2
    assert re.search(rf"--port: {port}: .*in use", done.stderr)
