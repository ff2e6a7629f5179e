"""What stands before the app: who may ask, and what a page may do.

The service runs whatever command it is sent, and knows no users. Whoever can send it a request can
do what its user can do. Binding to 127.0.0.1 keeps other machines out, but not the pages that are
open in a browser on this one: any of them can send requests to 127.0.0.1, in two ways.

- Directly (CSRF). The browser then says where the request comes from, in ``Origin`` and
  ``Sec-Fetch-Site``, and no page can forge these. A request that changes something and comes from
  another page than ours is refused. One without these headers comes from no browser.
- By a name of its own that it lets resolve to 127.0.0.1 (DNS rebinding); then it is the same
  origin for the browser. But that name is in ``Host``, and only our own names are accepted.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL_NAMES: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_SAFE_METHODS: Final = frozenset({"GET", "HEAD"})
# A page may load its own files and ask its own server, and nothing else: even if markup got into
# it, no script in it would run.
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def refusal(method: str, headers: Headers, names: Collection[str] = LOCAL_NAMES) -> str:
    """Why a request is refused; "" if it is not. Pure.

    Args:
        method: of HTTP.
        headers: of the request.
        names: by which the service may be called, without a port.
    """
    host = headers.get("host", "")
    if _name(host) not in names:
        return f"Host: {host!r}: expected one of {', '.join(sorted(names))}"
    if method in _SAFE_METHODS:
        return ""
    origin = headers.get("origin")
    if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
        return f"Origin: {origin!r}: another page than ours may not do this"
    site = headers.get("sec-fetch-site", "none")
    if site not in ("same-origin", "none"):
        return f"Sec-Fetch-Site: {site!r}: another page than ours may not do this"
    return ""


def _name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


class Guard:
    """Refuses requests, and adds headers to all answers."""

    def __init__(self, app: ASGIApp, names: Collection[str] = LOCAL_NAMES) -> None:
        self._app, self._names = app, frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        why = refusal(scope["method"], Headers(scope=scope), self._names)
        app = JSONResponse({"error": why}, status_code=403) if why else self._app
        await app(scope, receive, send_with_headers)
