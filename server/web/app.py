"""Serve the console: static files, a JSON API, and a WebSocket that tells of every change.

    GET  /                          the page
    GET  /api/v1/{section}          fleet, accuracy, rollouts, alerts, rounds, summary
    GET  /api/v1/snapshot           all sections at once
    WS   /api/v1/live               {"type": "snapshot" | "tick" | "error", "now_ms": …, …}

All of it reads; no route changes anything. What the sections hold is in ``views.py``, who may ask
in ``guard.py``, and how often the database is looked at in ``feed.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Final

import uvicorn
from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocketDisconnect

from ... import ShoalError, __version__
from ..errors import ConfigError, NotFoundError, PortInUseError
from ..store import Store
from . import views
from .config import ConsoleConfig
from .feed import Feed
from .guard import Guard

STATIC: Final = Path(__file__).parent / "static"
TICK_S: Final = 5.0  # a page that hears nothing for 3 ticks says that it is stale
MESSAGE_BYTES_MAX: Final = 1024  # of a page to us; a page has nothing to say
SHUTDOWN_S: Final = 2


class Console:
    """The console's server. Made cheap, run once in a task group, ended by cancellation."""

    def __init__(
        self,
        store: Store,
        *,
        config: ConsoleConfig,
        clock: Callable[[], int],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep what is needed; nothing is opened.

        Args:
            store: The database; only read.
            config: Settings.
            clock: Unix ms.
            monotonic: Seconds that never go back.
        """
        self._config, self._clock = config, clock
        self._feed = Feed(
            lambda: views.look(store, now_ms=clock(), config=config),
            refresh_s=config.refresh_s,
            monotonic=monotonic,
        )
        self._sockets = 0
        self.url = ""
        """Where the page is, e.g. ``http://127.0.0.1:8460/``; set before ``started``."""
        self.started = asyncio.Event()
        """Set when requests are answered."""

    def app(self) -> FastAPI:
        """Return the ASGI application; :meth:`run` serves it."""
        app = FastAPI(
            title="shoal console",
            version=__version__,
            openapi_url=None,  # its pages load scripts from elsewhere
            middleware=[
                Middleware(Guard, names=(self._config.host, *self._config.names)),
                Middleware(GZipMiddleware, minimum_size=1024, compresslevel=5),
            ],
            exception_handlers={ShoalError: _on_shoal_error, HTTPException: _on_http_error},
        )
        app.add_api_route("/api/v1/{section}", self._section, methods=["GET"])
        app.add_api_websocket_route("/api/v1/live", self._live)
        app.mount("/", StaticFiles(directory=STATIC, html=True))
        return app

    async def run(self) -> None:
        """Serve until cancelled.

        Raises:
            PortInUseError: Another program has the address.
            ConfigError: The address cannot be listened on, or the page's files are missing.
        """
        if not (STATIC / "vendor" / "preact.mjs").is_file():
            raise ConfigError(
                "the console's npm packages are missing; no console was started",
                hint="build again with Node, or set enabled = false in [console]",
            )
        with _listen(self._config.host, self._config.port) as listener:
            server = _Server(self.app(), self._config, started=self.started)
            host, port = listener.getsockname()[:2]
            self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
            async with asyncio.TaskGroup() as group:
                looking = group.create_task(self._feed.run())
                serving = group.create_task(server.serve(sockets=[listener]))
                try:
                    # Cancelling uvicorn leaves its connections open; asking it closes them.
                    await asyncio.shield(serving)
                finally:
                    server.should_exit = True
                    await asyncio.wait([serving])
                    looking.cancel()

    async def _section(self, section: str) -> JSONResponse:
        snapshot = await self._feed.current()
        if section == "snapshot":
            return JSONResponse({"now_ms": self._clock(), **snapshot.content})
        if section not in snapshot.content:
            known = ", ".join(sorted(snapshot.content))
            raise NotFoundError(f"there is no section {section!r:.80}", hint=f"sections: {known}")
        return JSONResponse({"now_ms": self._clock(), section: snapshot.content[section]})

    async def _live(self, page: WebSocket) -> None:
        await page.accept()
        if self._sockets >= self._config.sockets_max:
            await page.close(1013, f"{self._sockets} pages are watching, which is the limit")
            return
        self._sockets += 1
        try:
            # The page has nothing to say: what comes is a goodbye or a mistake, and ends it.
            async with asyncio.TaskGroup() as group:
                telling = group.create_task(self._tell(page))
                message = await page.receive()
                telling.cancel()
            if message["type"] != "websocket.disconnect":
                await page.close(1008, "this socket only tells")
        finally:
            self._sockets -= 1

    async def _tell(self, page: WebSocket) -> None:
        number = -1
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                snapshot = await self._feed.after(number, wait_s=TICK_S)
                head: dict[str, Any] = {"type": "tick", "now_ms": self._clock()}
                if snapshot is None:
                    await page.send_text(json.dumps(head))
                    continue
                if snapshot.error is not None:
                    head |= {"type": "error", "error": _error(snapshot.error)}
                    await page.send_text(json.dumps(head))
                else:
                    head["type"] = "snapshot"
                    await page.send_text(f'{json.dumps(head)[:-1]},"data":{snapshot.text}}}')
                number = snapshot.number


class _Server(uvicorn.Server):
    """uvicorn inside a program that has its own signals and listening socket."""

    def __init__(self, app: FastAPI, config: ConsoleConfig, *, started: asyncio.Event) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="websockets-sansio",
                ws_max_size=MESSAGE_BYTES_MAX,
                limit_concurrency=config.connections_max,
                timeout_graceful_shutdown=SHUTDOWN_S,
            )
        )
        self._on_started = started

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals to the program."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell when requests are answered."""
        await super().startup(sockets)
        self._on_started.set()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as exc:
        where = f"{host}:{port}"
        if exc.errno == errno.EADDRINUSE:
            raise PortInUseError(
                f"the console's address {where} is taken by another program",
                hint="set port in [console] of the server's configuration, or stop that program",
            ) from exc
        raise ConfigError(
            f"the console cannot listen on {where}: {exc.strerror or exc}",
            hint="check host and port in [console] of the server's configuration",
        ) from exc


def _error(exc: ShoalError) -> dict[str, Any]:
    return {"code": exc.code, "message": str(exc), "hint": exc.hint, "retry": exc.retry}


async def _on_shoal_error(_request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, ShoalError)
    return JSONResponse(
        {"error": _error(exc)}, status_code=404 if isinstance(exc, NotFoundError) else 503
    )


async def _on_http_error(_request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, HTTPException)
    code = {404: "web.not_found", 405: "web.method"}.get(exc.status_code, "web.request")
    body = {"error": {"code": code, "message": exc.detail, "hint": "", "retry": False}}
    return JSONResponse(body, status_code=exc.status_code, headers=exc.headers)
