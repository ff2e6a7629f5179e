"""The report in a real browser, of real runs: as a person sees it, on a desk and on a phone."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from asupervise.views.report import REPORT_FILE, write_report
from tests.browser import PHONE, OpenPage, take_pictures
from tests.conftest import ROOT, clean_environment
from tests.run_folders import a_failure, write
from tests.test_report import many

pytestmark = pytest.mark.pages

if TYPE_CHECKING:
    from playwright.sync_api import Locator, LocatorAssertions, Page, Request

TRAIN = """
import os, sys, time
from asupervise import record

def step(rank, held):
    held.append(bytearray((1 + rank) << 17))
    end = time.perf_counter() + 0.004
    while time.perf_counter() < end:
        pass
    time.sleep(0.01)

@record
def main():
    rank, held = int(os.environ["RANK"]), []
    for number in range(24):
        step(rank, held)
        print(f"\\x1b[2mstep\\x1b[0m {number:3} \\x1b[32mloss\\x1b[0m {2.5 / (1 + number):.4f}")
    print(f"rank {rank}: the cache is cold", file=sys.stderr)
    if os.environ.get("FAIL") == str(rank):
        raise ValueError("shard 1 is truncated: 1,024 records expected, 17 found")

main()
"""

HANG = """
import os, time
from asupervise import record

def all_reduce():
    time.sleep(1000)

def load_batch():
    time.sleep(1000)

@record
def main():
    print("ready", flush=True)
    load_batch() if os.environ["RANK"] == "3" else all_reduce()

main()
"""

EAT = """
import os, time
rank, eaten = os.environ["RANK"], []
if rank == "1":
    with open(os.environ["SMALL"] + "/cgroup.procs", "w") as file:
        file.write("0")
for number in range(400):
    if rank == "1":
        eaten.append(b"x" * (1 << 20))
    time.sleep(0.01)
    if number % 10 == 0:
        print(number, "MiB", flush=True)
"""

FLAKY = """
import os, time
from asupervise import record

@record
def main():
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    print(f"attempt {attempt}: checkpoint {attempt * 100} loaded", flush=True)
    time.sleep(0.2)
    if rank == attempt:
        raise RuntimeError(f"NCCL error in attempt {attempt}: unhandled system error")
    time.sleep(100)

main()
"""

EVIL = b"""\
<script>window.pwned = true</script><img src=x onerror='window.pwned = true'>
</pre></details></main></body><h1>out of the box</h1><style>body { display: none }</style>
\x1b[31mred\x1b[0m \x1b[1;44mblue\x1b[0m \x1b]0;title\x07\x1b[2J\x1b]8;;http://evil\x07link\x1b]8;;\x07
NUL \0 BEL \x07 DEL \x7f C1 \xc2\x9b[31m bidi \xe2\x80\xae\xd7\x90bc invalid \xff\xfe
10 %\r20 %\r30 %\r
"""

NASTY = f"""
import os, sys
from asupervise import record

@record
def main():
    sys.stdout.buffer.write({EVIL!r} + b"w" * 5000 + b"\\n")
    sys.stdout.flush()
    if os.environ["RANK"] == "1":
        raise ValueError("<script>window.pwned = true</script> \\x1b[31m\\0 \\u202e &amp;")

main()
"""

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Runs a script by the command line; returns the run's folder."""

    def made(script: str, nproc: int, *flags: object, env: dict[str, str] | None = None) -> Path:
        path = tmp_path / "train.py"
        path.write_text(textwrap.dedent(script))
        argv = [
            *(sys.executable, "-m", "asupervise", "--nproc-per-node", nproc, "--redirects", 3),
            *("--log-dir", tmp_path / "logs", "--memory-sample-interval", 0.05, *flags, path),
        ]
        environment = clean_environment() | {"PYTHONPATH": str(ROOT)} | (env or {})
        done = subprocess.run(
            list(map(str, argv)), env=environment, capture_output=True, timeout=50, check=False
        )
        (folder,) = (tmp_path / "logs").iterdir()
        assert (folder / REPORT_FILE).is_file(), done.stderr.decode()
        return folder

    return made


def show(page: Page, folder: Path) -> Page:
    """Open its report; nothing may be asked of anybody for it."""
    asked: list[Request] = []
    page.on("request", lambda request: asked.append(request))
    page.goto((folder / REPORT_FILE).as_uri())
    assert [request.url for request in asked] == [(folder / REPORT_FILE).as_uri()]
    return page


def expect(locator: Locator) -> LocatorAssertions:
    from playwright.sync_api import expect

    return expect(locator)


# --- as people see it ---------------------------------------------------------------------------


def test_a_success(page: Page, pictures: Path, make_run: MakeRun) -> None:
    show(page, make_run(TRAIN, 4))
    assert page.inner_text(".state") == "Succeeded"
    assert page.locator(".bar.succeeded").count() == 4
    assert page.locator(".graph path.curve").count() == 8
    take_pictures(page, pictures, "report-success", full_page=True)


def test_a_failure_with_a_traceback(page: Page, pictures: Path, make_run: MakeRun) -> None:
    show(page, make_run(TRAIN, 4, env={"FAIL": "1"}))
    assert page.inner_text(".headline").startswith("ValueError: shard 1 is truncated")
    assert "in main" in page.inner_text("#culprit pre")
    take_pictures(page, pictures, "report-failure", full_page=True)


def test_a_hang_with_stacks(page: Page, pictures: Path, make_run: MakeRun) -> None:
    show(page, make_run(HANG, 4, "--hang-timeout", 1))
    assert page.inner_text(".culprit h2").startswith("Rank 3")
    assert "load_batch" in page.inner_text("#culprit pre")
    assert "Ranks 0-2" in page.inner_text("#stacks")
    take_pictures(page, pictures, "report-hang", full_page=True)


def test_an_oom_kill(page: Page, pictures: Path, make_run: MakeRun, small_cgroup: Path) -> None:
    show(page, make_run(EAT, 3, env={"SMALL": str(small_cgroup)}))
    assert page.inner_text(".headline").startswith("the kernel's OOM killer")
    assert "memory ran out" in page.inner_text(".hint")
    take_pictures(page, pictures, "report-oom", full_page=True)


def test_three_attempts(page: Page, pictures: Path, make_run: MakeRun) -> None:
    flags = ("--max-restarts", 2, "--restart-backoff", 0.1, "--min-uptime", 0)
    show(page, make_run(FLAKY, 3, *flags))
    assert page.inner_text(".headline").startswith("RuntimeError: NCCL error in attempt 2")
    assert page.locator(".former").count() == 2
    assert page.locator(".band").count() == 3
    page.select_option("#attempt", "1")
    found(page, "2 of 6 logs")
    page.select_option("#attempt", "")
    found(page, "")
    take_pictures(page, pictures, "report-attempts", full_page=True)


def test_logs_full_of_traps(page: Page, pictures: Path, make_run: MakeRun) -> None:
    show(page, make_run(NASTY, 2))
    for summary in page.locator(".log > summary").all():
        if summary.evaluate("summary => !summary.parentElement.open"):
            summary.click()
    text = page.inner_text("#logs")
    assert "<script>window.pwned = true</script><img src=x" in text
    assert "</pre></details></main></body><h1>out of the box</h1>" in text
    assert "NUL \u2400 BEL \u2407 DEL \u2421 C1 \\x9b[31m bidi \\u202e\u05d0bc" in text
    assert "\n30 %\n" in text
    assert page.locator("h1").count() == 1
    assert page.locator("img, iframe, object").count() == 0
    assert page.locator(".log .f1").all_inner_texts()[-1] == "red"
    # A search goes over the lines as elements: they are made of the same text.
    page.fill("#find", "window.pwned")
    found(page, "3 lines in 2 of 2 logs")
    page.fill("#find", "/out of .* box/")
    found(page, "1 line in 1 of 2 logs")
    page.fill("#find", "")
    found(page, "")
    assert page.evaluate("window.pwned") is None
    page.evaluate("window.scrollTo(0, 0)")
    take_pictures(page, pictures, "report-traps", full_page=True)


def test_1024_ranks(page: Page, pictures: Path, tmp_path: Path) -> None:
    write_report(str(many(tmp_path, 1024)))
    show(page, tmp_path)
    assert page.inner_text("#more > summary").endswith("more logs")
    take_pictures(page, pictures, "report-1024-ranks", full_page=True)
    page.fill("#find", "step 399 of rank 1000")
    found(page, "1 line in 1 of 1,025 logs")
    assert page.locator(".log:visible").count() == 1
    assert page.locator(".log:visible pre > div:visible").all_inner_texts() == [
        "step 399 of rank 1000"
    ]
    page.fill("#find", "")
    page.fill("#only", "3, 1000-1001")
    found(page, "4 of 1,025 logs")


# --- search and filters -------------------------------------------------------------------------


@pytest.fixture
def searched(page: Page, tmp_path: Path) -> Page:
    folder = write(tmp_path, a_failure(tmp_path))
    for rank in range(3):
        inner = folder / "attempt_0" / str(rank)
        lines = "".join(f"\x1b[32mstep\x1b[0m {n} of rank {rank}\n" for n in range(50))
        (inner / "stdout.log").write_text(lines)
        (inner / "stderr.log").write_text(f"Warning {rank}: a[b is cold\n")
    write_report(str(folder))
    return show(page, folder)


def found(page: Page, text: str) -> None:
    # Not `wait_for_function`, which evaluates a text: the page's policy forbids that.
    expect(page.locator("#found")).to_have_text(text)


def test_a_search_shows_the_lines_that_match(searched: Page) -> None:
    searched.fill("#find", "STEP 7 OF")
    found(searched, "3 lines in 3 of 6 logs")
    assert searched.locator(".log pre > div:visible").all_inner_texts() == [
        "step 7 of rank 1", "step 7 of rank 0", "step 7 of rank 2",
    ]  # fmt: skip
    # Each over several elements: the first word has a colour of its own.
    marked = "[...CSS.highlights.get('found')].map(String)"
    assert searched.evaluate(marked) == ["step 7 of"] * 3
    searched.fill("#find", "of rank 2")
    found(searched, "50 lines in 1 of 6 logs")
    assert searched.evaluate("CSS.highlights.get('found').size") == 50
    searched.fill("#find", "")
    found(searched, "")
    assert searched.locator(".log").count() == searched.locator(".log:visible").count() == 6
    assert searched.locator(".log[open]").count() == 1, "the culprit's, as in the beginning"


def test_a_search_by_pattern(searched: Page) -> None:
    searched.fill("#find", "/^step 4\\d .*[12]$/")
    found(searched, "20 lines in 2 of 6 logs")
    searched.fill("#find", "a[b")
    found(searched, "3 lines in 3 of 6 logs")
    searched.fill("#find", "/a[b/")
    expect(searched.locator("#find:invalid")).to_have_count(1)


def test_filters_by_rank_and_stream(searched: Page) -> None:
    searched.fill("#only", "0, 2-9")
    found(searched, "4 of 6 logs")
    searched.select_option("#stream", "stderr")
    found(searched, "2 of 6 logs")
    searched.fill("#find", "warning 2")
    found(searched, "1 line in 1 of 6 logs")
    searched.fill("#find", "nothing of the kind")
    searched.wait_for_selector("#none:visible")


def test_a_key_goes_to_the_search(searched: Page) -> None:
    searched.keyboard.press("/")
    searched.keyboard.type("a/b")
    assert searched.input_value("#find") == "a/b"


# --- without scripts, on a phone, on paper --------------------------------------------------------


def test_without_scripts_all_is_there(open_page: OpenPage, tmp_path: Path) -> None:
    folder = write(tmp_path, a_failure(tmp_path))
    (folder / "attempt_0/0/stdout.log").write_text("said by rank 0\n")
    (folder / "attempt_0/1/stdout.log").write_text("said by rank 1\n")
    write_report(str(folder))
    page = show(open_page(PHONE, dark=True, java_script_enabled=False), folder)
    assert page.inner_text(".headline") == "ValueError: no such batch"
    assert not page.is_visible("#filters")
    assert not page.is_visible("text=said by rank 0")
    assert page.is_visible("text=said by rank 1")
    page.click(".log:nth-of-type(2) > summary")
    assert page.is_visible("text=said by rank 0")
    page.click("nav a[href='#ranks']")
    assert page.url.endswith("#ranks")


def test_links_lead_to_the_files(page: Page, tmp_path: Path) -> None:
    folder = write(tmp_path / "a b", a_failure(tmp_path / "a b"))
    (folder / "attempt_0/1/stdout.log").write_text("<script>document.title = 'pwned'</script>\n")
    write_report(str(folder))
    show(page, folder).click("a[href$='stdout.log']")
    page.wait_for_url(re.compile(r"attempt_0/1/stdout\.log$"))
    # A browser shows such a file as text: it does not run what stands in it.
    assert "<script>" in page.inner_text("body")
    assert page.title() != "pwned"


def test_on_paper(page: Page, tmp_path: Path, pictures: Path) -> None:
    folder = write(tmp_path, a_failure(tmp_path))
    write_report(str(folder))
    show(page, folder).emulate_media(media="print")
    assert not page.is_visible("nav")
    assert page.is_visible(".headline")
    page.pdf(path=pictures / "report-print.pdf")
