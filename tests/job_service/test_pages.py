"""The job service's pages, in a real browser, and with the real server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser import OpenPage, take_pictures
from tests.conftest import wait_gone
from tests.job_service.server import Gate, Server, held

pytestmark = pytest.mark.pages

if TYPE_CHECKING:
    from playwright.sync_api import Page


def expect(found: Any) -> Any:
    from playwright.sync_api import expect

    return expect(found)


def test_twenty_jobs_four_at_a_time(
    page: Page, fresh_server: Server, gate: Gate, pictures: Path
) -> None:
    server = fresh_server
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


def test_a_job_fails_and_says_why(page: Page, fresh_server: Server, pictures: Path) -> None:
    server = fresh_server
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
    before = server.jobs()
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
    assert server.jobs() == before


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
    row = page.locator(f".job[href$='{job}']")
    expect(row.locator(".command")).to_contain_text("<b>hostile<i>")
    assert page.evaluate("[window.acted, document.querySelectorAll('img, b').length]") == [None, 0]


def test_a_job_that_is_not_known(open_page: OpenPage, server: Server) -> None:
    page = open_page(tolerates="status of 404")
    answer = page.goto(f"{server.url}follow/1-00000000")
    assert answer is not None
    assert answer.status == 404
    expect(page.locator("#missing")).to_be_visible()


def test_a_page_that_cannot_keep_up_says_so(page: Page, server: Server, gate: Gate) -> None:
    flood = 'read line < "$GATE"; seq -f "line %.0f" 100000'
    job = server.submit(["sh", "-c", flood], env=gate.env)
    page.goto(f"{server.url}follow/{job}")
    expect(page.locator("#state")).to_have_text("running")
    gate.open(1)
    expect(page.locator("#state")).to_have_text("succeeded")
    output = page.locator("#output li")
    expect(output.filter(has_text="line 100000")).to_be_visible()
    expect(output).to_have_count(2000)
    # Its first and its last word are the service's.
    expect(page.locator("#missed")).to_have_text(re.compile(r"^98,00\d lines not shown"))


def test_pages_say_that_the_service_has_gone(
    open_page: OpenPage, fresh_server: Server, gate: Gate, pictures: Path
) -> None:
    job = held(fresh_server, gate)
    follower, overview = open_page(), open_page(tolerates="ERR_")
    follower.goto(f"{fresh_server.url}follow/{job}")
    overview.goto(fresh_server.url)
    expect(overview.locator(".state.running")).to_have_count(1)
    expect(follower.locator("#output")).to_contain_text("hello from 0")
    fresh_server.end()
    # Each is told the end before the connections are closed.
    expect(follower.locator("#state")).to_have_text("cancelled")
    expect(follower.locator("#lost")).to_be_hidden()
    expect(overview.locator(".state.cancelled")).to_have_count(1)
    expect(overview.locator("#lost")).to_contain_text("No connection")
    take_pictures(overview, pictures, "jobs-gone")


def test_the_report_is_shown_where_it_can_do_nothing(page: Page, server: Server) -> None:
    # So that there is one in any case.
    script = 'echo "<h1>mine</h1>" > "${TORCHELASTIC_ERROR_FILE%/*/*/*}/report.html"; exit 3'
    job = server.submit(["sh", "-c", script])
    page.goto(f"{server.url}follow/{job}")
    page.get_by_role("link", name="Report").click()
    page.wait_for_url("**/files/report.html")
    expect(page.locator("h1")).to_be_visible()
    assert page.evaluate("window.origin") == "null"
