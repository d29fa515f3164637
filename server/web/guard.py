"""Refuse requests that a browser was tricked into, and put the security headers on every answer.

Two checks, before any route:

* ``Host`` must be a name of ours: a page of another site that rebinds its own DNS name to
  127.0.0.1 speaks with that name (421).
* ``Origin``, when a browser sends it, must be the very host that is asked: WebSockets have no
  same-origin policy of their own (403).

The policy below lets a page load from here and nowhere else, and run no inline script or style.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")

HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cache-Control": "no-cache",  # revalidate: files carry ETags, the API changes every second
}


def refusal(headers: Headers, names: frozenset[str]) -> tuple[int, str] | None:
    """Return (HTTP status, reason) when the request must be refused, else None.

    Args:
        headers: Of the request.
        names: Host names that are ours, lower case, no port, no brackets.
    """
    host = headers.get("host", "").lower()
    if _hostname(host) not in names:
        return 421, "this server does not go by the name in the Host header"
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
        return 403, "the request comes from a page of another origin"
    return None


def _hostname(netloc: str) -> str | None:
    try:
        return urlsplit(f"//{netloc}").hostname
    except ValueError:
        return None


class Guard:
    """ASGI middleware: the two checks, and the headers."""

    def __init__(self, app: ASGIApp, *, names: Iterable[str]) -> None:
        self._app = app
        self._names = frozenset(name.lower().strip("[]") for name in (*LOOPBACK, *names))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with the reason for refusing it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refused = refusal(Headers(scope=scope), self._names)
        if refused is None:
            await self._app(scope, receive, send_guarded)
        elif scope["type"] == "websocket":
            await WebSocketClose(code=1008, reason=refused[1])(scope, receive, send)
        else:
            body = {"error": {"code": "web.refused", "message": refused[1], "hint": ""}}
            await JSONResponse(body, status_code=refused[0])(scope, receive, send_guarded)
