"""The job service as programs use it, and how its server ends."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.conftest import ROOT, wait_gone
from tests.job_service.server import CEILING_S, Gate, Server, events_in, held


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
    before = server.jobs()
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
    assert server.jobs() == before


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
def test_the_commands_of_the_readme_work(fresh_server: Server) -> None:
    server = fresh_server
    readme = (ROOT / "examples" / "job_service" / "README.md").read_text()
    blocks = re.findall(r"^```sh[^\n]*\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
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
    fresh_server: Server, gate: Gate, tmp_path: Path, sig: int, status: int
) -> None:
    server = fresh_server
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
