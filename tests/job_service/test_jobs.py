"""The job service without its web: what it accepts, how it queues, and who may ask."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from examples.job_service.guard import refusal
from examples.job_service.jobs import BadJob, Job, JobSpec, State
from examples.job_service.output import PIECE_ITEMS, Output
from examples.job_service.service import JobService, Refused
from examples.job_service.text import printable
from tests.job_service.server import Gate

SLEEP = JobSpec(command=("sleep", "1000"))
TRUE = JobSpec(command=("true",))


# --- what is accepted ---------------------------------------------------------------------------


def test_a_command_may_be_a_list_or_a_line() -> None:
    wanted = JobSpec(command=("echo", "a b"), ranks=2, env={"A": "1"}, hang_timeout_s=3.0)
    rest = {"ranks": 2, "env": {"A": "1"}, "hang_timeout": 3}
    assert JobSpec.from_json({"command": ["echo", "a b"], **rest}) == wanted
    assert JobSpec.from_json({"command": "echo 'a b'", **rest}) == wanted
    assert JobSpec.from_json({"command": "true"}) == TRUE


def test_a_script_is_run_by_python() -> None:
    spec = JobSpec.from_json({"command": "train.py --lr 0.1"})
    assert spec.argv == (sys.executable, "train.py", "--lr", "0.1")
    assert spec.shown == "train.py --lr 0.1"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ([], "expected an object"),
        ({}, "command: expected a string"),
        ({"command": ""}, "command: expected a program"),
        ({"command": []}, "command: expected a program"),
        ({"command": ["a", 1]}, "command: expected a string or a list of strings"),
        ({"command": "it's"}, "command: No closing quotation"),
        ({"command": ["a\0b"]}, "command: .*NUL"),
        ({"command": ["\ud800"]}, "command: .*not valid Unicode"),
        ({"command": ["a"] * 1001}, "command: 1001 words"),
        ({"command": ["a" * 64_001]}, "command: 64001 characters"),
        ({"command": "a", "ranks": 0}, "ranks: 0: expected a whole number from 1 to 64"),
        ({"command": "a", "ranks": 65}, "ranks: 65"),
        ({"command": "a", "ranks": True}, "ranks: True"),
        ({"command": "a", "ranks": "2"}, "ranks: '2'"),
        ({"command": "a", "env": ["A"]}, "env: expected an object"),
        ({"command": "a", "env": {"A": 1}}, "env: expected an object of strings"),
        ({"command": "a", "env": {"A=B": "1"}}, "env: 'A=B' is no name"),
        ({"command": "a", "env": {"": "1"}}, "env: '' is no name"),
        ({"command": "a", "env": {"A": "\0"}}, "env: .*NUL"),
        ({"command": "a", "hang_timeout": 0}, "hang_timeout: 0: expected seconds"),
        ({"command": "a", "hang_timeout": float("nan")}, "hang_timeout: nan"),
        ({"command": "a", "hang_timeout": "1"}, "hang_timeout: '1'"),
        ({"command": "a", "rank": 2}, "'rank': unknown; expected command, env"),
    ],
)
def test_bad_jobs_are_refused_by_name(data: object, why: str) -> None:
    with pytest.raises(BadJob, match=why):
        JobSpec.from_json(data)


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("plain\ttext", "plain\ttext"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07rest", "rest"),
        ("\x1b]8;;http://a\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]52;c;never ended", ""),
        ("\x1bcreset", "reset"),
        ("a\0b\x08c\x7f", "a\u2400b\u2408c\u2421"),
        ("\x9b31m and \u202etxt.exe", "\ufffd31m and \ufffdtxt.exe"),
        ("\udcff", "?"),
        ("<b>&amp;", "<b>&amp;"),
    ],
)
def test_text_does_nothing(printed: str, shown: str) -> None:
    assert printable(printed) == shown


# --- the output, for slow readers too -----------------------------------------------------------


def texts(output: Output, after: int) -> tuple[list[str], int, int]:
    piece = output.after(after)
    return [item["text"] for item in piece.items], piece.lost, piece.last


def test_readers_go_on_from_where_they_are() -> None:
    output = Output()
    assert texts(output, 0) == ([], 0, 0)
    output.add("a", rank=3)
    output.add("b")
    assert output.after(0).items == [{"text": "a", "rank": 3}, {"text": "b"}]
    assert texts(output, 1) == (["b"], 0, 2)
    assert texts(output, 2) == ([], 0, 2)
    # From another service, maybe, that was here before.
    assert texts(output, 99) == ([], 0, 2)


def test_who_lags_too_far_behind_is_told_what_was_lost() -> None:
    output = Output(keep_items=3)
    for number in range(1, 11):
        output.add(str(number))
    assert texts(output, 0) == (["8", "9", "10"], 7, 10)
    assert texts(output, 5) == (["8", "9", "10"], 2, 10)
    assert texts(output, 8) == (["9", "10"], 0, 10)


def test_long_lines_are_bounded_by_their_length() -> None:
    output = Output(keep_chars=10)
    for text in ("123456", "abcdef", "x" * 11):
        output.add(text)
    assert texts(output, 0) == ([], 3, 3)
    output.add("y")
    assert texts(output, 0) == (["y"], 3, 4)


def test_a_reader_is_not_handed_everything_at_once() -> None:
    output = Output()
    for number in range(PIECE_ITEMS + 1):
        output.add(str(number))
    first = output.after(0)
    assert (len(first.items), first.last, first.lost) == (PIECE_ITEMS, PIECE_ITEMS, 0)
    assert texts(output, first.last) == ([str(PIECE_ITEMS)], 0, PIECE_ITEMS + 1)


# --- who may ask --------------------------------------------------------------------------------

HOST = "127.0.0.1:8000"


@pytest.mark.parametrize(
    ("method", "headers", "why"),
    [
        ("GET", {"host": HOST}, ""),
        ("GET", {"host": "localhost:8000"}, ""),
        ("GET", {"host": "[::1]:8000"}, ""),
        ("GET", {}, "Host"),
        ("GET", {"host": "evil.example"}, "Host"),
        ("GET", {"host": "127.0.0.1.evil.example"}, "Host"),
        ("GET", {"host": "[::1"}, "Host"),
        # A link from elsewhere may lead here.
        ("GET", {"host": HOST, "sec-fetch-site": "cross-site"}, ""),
        # curl says neither where it comes from nor from which site.
        ("POST", {"host": HOST}, ""),
        ("POST", {"host": HOST, "origin": f"http://{HOST}", "sec-fetch-site": "same-origin"}, ""),
        ("POST", {"host": HOST, "origin": "http://evil.example"}, "Origin"),
        ("POST", {"host": HOST, "origin": "null"}, "Origin"),
        ("POST", {"host": HOST, "origin": "http://127.0.0.1:9999"}, "Origin"),
        ("POST", {"host": HOST, "origin": f"http://{HOST}.evil.example"}, "Origin"),
        ("POST", {"host": HOST, "sec-fetch-site": "cross-site"}, "Sec-Fetch-Site"),
        ("POST", {"host": HOST, "sec-fetch-site": "same-site"}, "Sec-Fetch-Site"),
        ("DELETE", {"host": HOST, "origin": "http://evil.example"}, "Origin"),
    ],
)
def test_who_may_ask(method: str, headers: dict[str, str], why: str) -> None:
    said = refusal(method, Headers(headers))
    assert said.partition(":")[0] == why


# --- the queue, with real processes -------------------------------------------------------------


SCRIPT = 'echo "here as $RANK"; read line < "$GATE"; echo gone'


def held(gate: Gate, ranks: int = 1) -> JobSpec:
    return JobSpec(command=("sh", "-c", SCRIPT), ranks=ranks, env=gate.env)


@pytest.fixture
async def service() -> AsyncIterator[JobService]:
    async with JobService(at_once=4, max_queued=30, keep_ended=25) as made:
        yield made


async def until(changing: JobService | Job, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(50):
        while not condition():
            await changing.bell.wait()


def ended(*jobs: Job) -> Callable[[], bool]:
    return lambda: all(job.ended for job in jobs)


def lines(job: Job) -> list[str]:
    return [item["text"] for item in job.output.after(0).items if "rank" in item]


async def watched(service: JobService, most: list[int]) -> None:
    while True:
        await service.bell.wait()
        most.append(service.count(State.RUNNING))


async def test_twenty_jobs_run_in_order_four_at_a_time(service: JobService, gate: Gate) -> None:
    most: list[int] = []
    watcher = asyncio.create_task(watched(service, most))
    jobs = [service.submit(held(gate)) for _ in range(20)]
    await until(service, lambda: service.count(State.RUNNING) == 4)
    assert [job.number for job in jobs if job.state is State.RUNNING] == [1, 2, 3, 4]
    gate.open(20)
    await until(service, ended(*jobs))
    watcher.cancel()
    assert {job.state for job in jobs} == {State.SUCCEEDED}
    assert max(most) == 4
    starts = [job.started or 0 for job in jobs]
    assert starts == sorted(starts)
    assert all(lines(job) == ["here as 0", "gone"] for job in jobs)


async def test_a_job_that_fails_and_one_that_cannot_start_harm_no_other(
    service: JobService, tmp_path: Path
) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        "import os\n"
        "from asupervise import record\n"
        "@record\n"
        "def main():\n"
        "    assert os.environ['RANK'] != '1', 'not me'\n"
        "main()\n"
    )
    failing = service.submit(JobSpec(command=(str(script),), ranks=2))
    missing = service.submit(JobSpec(command=("/no/such/program",)))
    good = service.submit(TRUE)
    await until(service, ended(failing, missing, good))
    assert failing.state is State.FAILED
    assert failing.culprit is not None
    assert failing.culprit.rank == 1
    assert failing.why == "rank 1: exit code 1: AssertionError: not me"
    assert missing.state is State.FAILED
    assert missing.error.startswith("FileNotFoundError: ")
    assert good.state is State.SUCCEEDED


async def test_a_job_is_cancelled_while_it_runs_and_while_it_waits(
    service: JobService, gate: Gate
) -> None:
    running = [service.submit(held(gate, ranks=2)) for _ in range(4)]
    waiting = service.submit(TRUE)
    await until(service, lambda: service.count(State.RUNNING) == 4)
    service.cancel(waiting.id)
    assert waiting.state is State.CANCELLED
    assert waiting.started is None
    service.cancel(running[0].id)
    service.cancel(running[0].id)  # again: no harm
    await until(service, ended(running[0]))
    assert running[0].state is State.CANCELLED
    assert {rank.state for rank in running[0].ranks} <= {"ended", "waiting"}
    gate.open(6)
    await until(service, ended(*running))
    assert [job.state for job in running[1:]] == [State.SUCCEEDED] * 3


async def test_a_rank_that_failed_by_itself_is_named_though_the_job_was_cancelled() -> None:
    # It fails, and the other rank takes its time to end: meanwhile somebody cancels.
    script = 'trap "" TERM; [ "$RANK" = 0 ] && exit 7; while :; do sleep 1000; done'
    async with JobService(grace_s=0.5) as service:
        job = service.submit(JobSpec(command=("sh", "-c", script), ranks=2))
        await until(job, lambda: job.ranks[0].state == "failed" or job.ended)
        service.cancel(job.id)
        await until(service, ended(job))
    assert job.state is State.FAILED
    assert job.why == "rank 0: exit code 7"


async def test_who_cancels_does_not_wait_for_lines_that_nobody_can_read_so_fast(
    service: JobService,
) -> None:
    # Written in a moment, and read in most of a minute.
    job = service.submit(JobSpec(command=("sh", "-c", "yes | head -c 30000000")))
    await until(job, lambda: job.ranks[0].state == "succeeded")
    assert not job.ended
    service.cancel(job.id)
    await until(service, ended(job))
    assert job.state is State.SUCCEEDED
    assert job.output.after(job.output.last - 1).items[0]["text"].startswith("its last lines")


async def test_why_it_died_where_its_exit_code_does_not_say_it(service: JobService) -> None:
    hanging = service.submit(JobSpec(command=("sleep", "1000"), hang_timeout_s=0.5))
    killed = service.submit(JobSpec(command=("sh", "-c", "kill -9 $$")))
    talking = service.submit(JobSpec(command=("sh", "-c", "echo first >&2; echo last >&2; exit 3")))
    await until(service, ended(hanging, killed, talking))
    assert hanging.why.startswith("rank 0: hang: no output and no CPU use for ")
    assert killed.why.startswith("rank 0: SIGKILL from outside")
    assert talking.why == "rank 0: exit code 3: last"
    assert {job.state for job in (hanging, killed, talking)} == {State.FAILED}


async def test_the_queue_and_the_history_are_bounded(gate: Gate) -> None:
    async with JobService(at_once=1, max_queued=2, keep_ended=2) as service:
        first = service.submit(held(gate))
        await until(service, lambda: first.state is State.RUNNING)
        service.submit(TRUE)
        service.submit(TRUE)
        with pytest.raises(Refused, match="2 jobs are waiting already"):
            service.submit(TRUE)
        for _ in range(5):
            service.cancel(service.jobs[-1].id)
            service.submit(TRUE)
        assert len(service.jobs) == 1 + 2 + 2
        gate.open(1)
        await until(service, lambda: service.get(first.id) is None)
        assert len(service.jobs) <= 1 + 2


async def test_files_go_with_the_job_that_is_forgotten(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    async with JobService(at_once=1, keep_ended=1) as service:
        jobs = [service.submit(TRUE) for _ in range(3)]
        await until(service, ended(*jobs))
        (folder,) = tmp_path.glob("job_service_*")
        # The next job runs when the files before it are gone.
        last = service.submit(TRUE)
        await until(service, ended(last))
        assert jobs[0].id not in os.listdir(folder)
        assert jobs[1].id not in os.listdir(folder)
    assert list(tmp_path.glob("job_service_*")) == []


async def test_leaving_ends_what_runs_and_what_waits(gate: Gate) -> None:
    async with JobService(at_once=2) as service:
        jobs = [service.submit(held(gate, ranks=2)) for _ in range(5)]
        await until(service, lambda: service.count(State.RUNNING) == 2)
    assert {job.state for job in jobs} == {State.CANCELLED}
    with pytest.raises(Refused, match="ending"):
        service.submit(TRUE)


async def test_an_exception_in_the_app_ends_them_too() -> None:
    jobs: list[Job] = []

    async def app() -> None:
        async with JobService() as service:
            jobs.append(service.submit(SLEEP))
            await until(service, lambda: jobs[0].state is State.RUNNING)
            raise RuntimeError("a mistake in the app")

    with pytest.raises(RuntimeError, match="a mistake"):
        await app()
    assert jobs[0].state is State.CANCELLED


async def test_cancelling_the_closing_ends_them_all_the_same() -> None:
    stubborn = JobSpec(
        command=("sh", "-c", 'trap "" TERM; echo here; while :; do sleep 1000; done')
    )
    jobs: list[Job] = []
    started = asyncio.Event()

    async def app() -> None:
        async with JobService(grace_s=1.0) as service:
            jobs.append(service.submit(stubborn))
            await until(jobs[0], lambda: lines(jobs[0]) == ["here"])
            started.set()

    task = asyncio.create_task(app())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert jobs[0].state is State.CANCELLED
