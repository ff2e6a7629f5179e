"""The web: routes, and the streams that pages follow. All that is decided is decided elsewhere."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from .guard import Guard
from .jobs import REPORT, BadJob, Job, JobSpec, State
from .service import JobService, Refused

STATIC: Final = Path(__file__).parent / "static"
MAX_BODY_BYTES: Final = 256 * 1024
SANDBOX: Final = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:; font-src data:"
)
# So that proxies, and browsers, do not take a stream without news for a dead one.
KEEPALIVE_S: Final = 15.0
# Nobody reads faster than twenty times a second. What comes meanwhile is sent in one piece, so that
# a job that prints a hundred thousand lines a second costs us no more than its lines.
PAUSE_S: Final = 0.05


def create_app(service: JobService) -> Starlette:
    """The app around a service, which it starts and ends with itself."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with service:
            yield

    app = Starlette(
        lifespan=lifespan,
        middleware=[Middleware(Guard)],
        routes=[
            Route("/", show_list),
            Route("/follow/{id}", show_job),
            Route("/stream", stream_list),
            Route("/jobs", list_jobs, methods=["GET"]),
            Route("/jobs", submit, methods=["POST"]),
            Route("/jobs/{id}", get_job),
            Route("/jobs/{id}/stream", stream_job),
            Route("/jobs/{id}/cancel", cancel, methods=["POST"]),
            Route("/jobs/{id}/files/{name:path}", get_file),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
    )
    app.state.service = service
    return app


def default_app() -> Starlette:
    """For ``uvicorn --factory``."""
    return create_app(JobService())


# --- pages --------------------------------------------------------------------------------------


async def show_list(request: Request) -> Response:
    return FileResponse(STATIC / "list.html")


async def show_job(request: Request) -> Response:
    status = 200 if _job(request) else 404
    return FileResponse(STATIC / "job.html", status_code=status)


# --- the API ------------------------------------------------------------------------------------


async def list_jobs(request: Request) -> Response:
    service = _service(request)
    return JSONResponse({**_counts(service), "jobs": [job.as_row() for job in service.jobs]})


async def submit(request: Request) -> Response:
    # A form of another page could send anything but this type without being asked first.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return _problem(415, "Content-Type: expected application/json")
    body = await _body(request)
    if body is None:
        return _problem(413, f"expected at most {MAX_BODY_BYTES} bytes")
    try:
        job = _service(request).submit(JobSpec.from_json(json.loads(body)))
    except BadJob as exc:
        return _problem(400, str(exc))
    except (ValueError, RecursionError) as exc:
        return _problem(400, f"not JSON: {exc}")
    except Refused as exc:
        return _problem(503, str(exc))
    headers = {"Location": f"/jobs/{job.id}"}
    return JSONResponse(job.as_dict(), status_code=201, headers=headers)


async def get_job(request: Request) -> Response:
    job = _job(request)
    return _problem(404, "no such job") if job is None else JSONResponse(job.as_dict())


async def cancel(request: Request) -> Response:
    job = _job(request)
    if job is None:
        return _problem(404, "no such job")
    if not job.ended:
        _service(request).cancel(job.id)
    return JSONResponse(job.as_dict(), status_code=200 if job.ended else 202)


async def get_file(request: Request) -> Response:
    """The report of a job that has ended, and its logs."""
    job = _job(request)
    file = job.file(request.path_params["name"]) if job else None
    if file is None:
        return _problem(404, "no such file, or the job has not ended")
    kind = "text/html" if file.name == REPORT else "text/plain"
    # In a sandbox it has an origin of its own: whatever a job gets into a file of its folder
    # cannot ask the service for anything.
    return FileResponse(file, media_type=kind, headers={"Content-Security-Policy": SANDBOX})


def _service(request: Request) -> JobService:
    service: JobService = request.app.state.service
    return service


def _job(request: Request) -> Job | None:
    return _service(request).get(request.path_params["id"])


def _problem(status: int, error: str) -> Response:
    return JSONResponse({"error": error}, status_code=status)


async def _body(request: Request) -> bytes | None:
    """The body, or None if it is too long; no more of it is read then."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            return None
    return body


def _counts(service: JobService) -> dict[str, Any]:
    return {
        "running": service.count(State.RUNNING),
        "queued": service.count(State.QUEUED),
        "at_once": service.at_once,
        "now": time.time(),
    }


# --- streams: Server-Sent Events ----------------------------------------------------------------


async def stream_list(request: Request) -> Response:
    return _stream(_list_events(_service(request)))


async def stream_job(request: Request) -> Response:
    job = _job(request)
    if job is None:
        return _problem(404, "no such job")
    # A browser that has lost its connection says how far it had got.
    seen = request.headers.get("last-event-id", "")
    after = int(seen) if seen.isascii() and seen.isdigit() and len(seen) < 18 else 0
    return _stream(_job_events(job, after))


def _stream(events: AsyncIterator[str]) -> Response:
    return StreamingResponse(events, media_type="text/event-stream")


async def _list_events(service: JobService) -> AsyncIterator[str]:
    """Rows that have changed, and which there are; all rows at first."""
    sent: dict[str, Any] | None = None
    while True:
        rows = {job.id: job.as_row() for job in service.jobs}
        if rows != sent:
            changed = [row for id, row in rows.items() if (sent or {}).get(id) != row]
            sent = rows
            yield _event("jobs", {**_counts(service), "rows": changed, "ids": list(rows)})
            await asyncio.sleep(PAUSE_S)
        elif service.closing and all(job.ended for job in service.jobs):
            yield _event("end", {})
            return
        elif not await service.bell.wait(KEEPALIVE_S):
            yield _NO_NEWS


async def _job_events(job: Job, after: int) -> AsyncIterator[str]:
    """The job whenever it has changed, and its output as fast as the browser takes it.

    A browser that takes nothing holds this up, and nothing else: see `output.Output`.
    """
    version = -1
    while True:
        # In this order: when it has ended, there is no more output than what is seen here.
        ended, piece = job.ended, job.output.after(after)
        changed = job.version != version
        if changed:
            version = job.version
            yield _event("job", {**job.as_dict(), "now": time.time()})
        if piece.items or piece.lost:
            after = piece.last
            yield _event("output", {"items": piece.items, "lost": piece.lost}, id=after)
            await asyncio.sleep(PAUSE_S)
        elif changed:
            await asyncio.sleep(PAUSE_S)
        elif ended:
            yield _event("end", {})
            return
        elif not await job.bell.wait(KEEPALIVE_S):
            yield _NO_NEWS


_NO_NEWS: Final = ": no news\n\n"


def _event(name: str, data: object, id: int | None = None) -> str:
    # JSON has no line ends of its own, so that the data is one line.
    number = "" if id is None else f"id: {id}\n"
    return f"{number}event: {name}\ndata: {json.dumps(data)}\n\n"
