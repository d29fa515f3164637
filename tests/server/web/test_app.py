"""The console's server: who may ask, what every answer carries, how it starts and ends."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from shoal.server.errors import ConfigError, PortInUseError
from shoal.server.store import Store
from shoal.server.store.tables import Device
from shoal.server.web import Console, ConsoleConfig

from .conftest import Serve, Served

SECTIONS = ("fleet", "accuracy", "rollouts", "alerts", "drift", "rounds", "summary")


def ask(
    served: Served, path: str, *, method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    """Return the answer to one request."""
    netloc = urlsplit(served.url).netloc
    connection = http.client.HTTPConnection(netloc, timeout=20)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def watch(served: Served, **settings: Any) -> ClientConnection:
    """Open the live socket as a page would."""
    url = served.url.replace("http", "ws") + "api/v1/live"
    settings.setdefault("origin", served.url.rstrip("/"))
    page: ClientConnection = connect(url, open_timeout=20, max_size=1 << 24, **settings)
    return page


def news(page: ClientConnection) -> Any:
    """Return the next message that is no tick: on a slow machine one may come before it."""
    while (message := json.loads(page.recv(timeout=20)))["type"] == "tick":
        pass
    return message


@pytest.mark.parametrize("path", ["/", "/main.js", "/nothing", "/api/v1/fleet", "/api/v1/no"])
def test_every_answer_carries_the_headers(store: Store, serve: Serve, path: str) -> None:
    """Pages, files, data and errors alike: no inline script, no framing, no sniffing."""
    response, _ = ask(serve(store), path)
    policy = dict(
        part.strip().split(" ", 1)
        for part in (response.getheader("Content-Security-Policy") or "").split(";")
    )
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'"
    assert policy["style-src"] == "'self'" and policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'" and policy["img-src"] == "'self' data:"
    assert "unsafe" not in str(policy) and "http" not in str(policy)
    assert response.getheader("X-Content-Type-Options") == "nosniff"
    assert response.getheader("Referrer-Policy") == "no-referrer"
    assert response.getheader("Server") is None
    assert response.getheader("Access-Control-Allow-Origin") is None


def test_the_page_loads_files_of_its_own_only(store: Store, serve: Serve) -> None:
    """Modules come with a type that nosniff accepts, and can be revalidated."""
    served = serve(store)
    _, page = ask(served, "/")
    assert b"<script src=" in page and b"http://" not in page and b"https://" not in page
    for path in ("/main.js", "/vendor/echarts.mjs", "/vendor/licences/echarts.txt"):
        response, _ = ask(served, path)
        assert response.status == 200 and response.getheader("ETag")
    response, _ = ask(served, "/vendor/preact.mjs")
    assert response.getheader("Content-Type", "").startswith("text/javascript")


@pytest.mark.parametrize("section", SECTIONS)
def test_each_section_answers(store: Store, serve: Serve, section: str) -> None:
    """The API has what the page shows."""
    response, body = ask(serve(store), f"/api/v1/{section}")
    assert response.status == 200
    assert json.loads(body).keys() == {"now_ms", section}


def test_an_unknown_section_names_the_known_ones(store: Store, serve: Serve) -> None:
    """A typing error gets a 404 with a hint."""
    response, body = ask(serve(store), "/api/v1/fleets")
    assert response.status == 404
    error = json.loads(body)["error"]
    assert error["code"] == "server.not_found" and "rollouts" in error["hint"]


@pytest.mark.parametrize("path", ["/nothing", "/../app.py", "/%2e%2e/app.py", "/..%2fapp.py"])
def test_no_file_outside_static(store: Store, serve: Serve, path: str) -> None:
    """Dots lead nowhere."""
    response, body = ask(serve(store), path)
    assert response.status == 404 and json.loads(body)["error"]["code"] == "web.not_found"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/api/v1/fleet"])
def test_nothing_can_be_changed(store: Store, serve: Serve, method: str, path: str) -> None:
    """The console reads: no other method exists."""
    response, _ = ask(serve(store), path, method=method)
    assert response.status == 405


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[", "127.0.0.2"]
)
def test_another_name_is_refused(store: Store, serve: Serve, host: str) -> None:
    """A page that rebinds its own name to this address reads nothing (DNS rebinding)."""
    response, body = ask(serve(store), "/api/v1/fleet", Host=host)
    assert response.status == 421 and b"wrist" not in body


def test_names_may_be_added(store: Store, serve: Serve) -> None:
    """A proxy's name is accepted when the operator says so; ports do not matter."""
    served = serve(store, names=("Fleet.Example",))
    for host in ("fleet.example", "fleet.example:8443", "localhost:1", "127.0.0.1", "[::1]:8"):
        assert ask(served, "/api/v1/summary", Host=host)[0].status == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", ""])
def test_another_origin_is_refused(store: Store, serve: Serve, origin: str) -> None:
    """Neither a request nor a socket of another site's page is served."""
    served = serve(store)
    response, body = ask(served, "/api/v1/fleet", Origin=origin)
    assert response.status == 403 and b"wrist" not in body
    with pytest.raises(InvalidStatus) as caught:
        watch(served, origin=None, additional_headers={"Origin": origin})
    assert caught.value.response.status_code == 403


def test_the_socket_tells_of_a_change(store: Store, serve: Serve) -> None:
    """First all there is, then what changed, without asking."""
    served = serve(store)
    with watch(served) as page:
        first = news(page)
        assert first["type"] == "snapshot" and first["data"]["fleet"]["total"] == 10
        with store.begin() as session:
            session.add(Device(name="wrist-11", created_ms=1))
        second = news(page)
        assert second["type"] == "snapshot" and second["data"]["fleet"]["total"] == 11


def test_the_socket_tells_of_trouble(store: Store, serve: Serve) -> None:
    """A database that cannot be read is said, with a hint; the socket stays."""
    served = serve(store)
    with watch(served) as page:
        news(page)
        with store.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE labels RENAME TO gone")
        told = news(page)
        assert told["type"] == "error" and told["error"]["code"] == "server.store"
        assert ask(served, "/api/v1/fleet")[0].status == 503
        with store.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE gone RENAME TO labels")
        assert news(page)["type"] == "snapshot"


def test_who_talks_to_the_socket_is_shown_out(store: Store, serve: Serve) -> None:
    """A page has nothing to say; a message ends the connection, and frees its place."""
    served = serve(store, sockets_max=1)
    for _ in range(3):
        with watch(served) as page:
            page.send("hello")
            with pytest.raises(ConnectionClosed) as caught:
                while True:
                    page.recv(timeout=20)
            assert caught.value.rcvd is not None and caught.value.rcvd.code == 1008


def test_sockets_are_bounded(store: Store, serve: Serve) -> None:
    """One page too many is told to come later; those that watch keep watching."""
    served = serve(store, sockets_max=2)
    with watch(served) as first, watch(served) as second:
        news(first)
        news(second)
        with watch(served) as third, pytest.raises(ConnectionClosed) as caught:
            third.recv(timeout=20)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1013
        with store.begin() as session:
            session.add(Device(name="wrist-11", created_ms=1))
        assert news(first)["data"]["fleet"]["total"] == 11


def test_a_port_in_use_is_a_clear_error(store: Store) -> None:
    """The operator learns which address and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = ConsoleConfig(port=taken.getsockname()[1])
        with pytest.raises(PortInUseError, match=str(config.port)) as caught:
            asyncio.run(Console(store, config=config, clock=lambda: 0).run())
    assert "[console]" in caught.value.hint


def test_an_address_of_another_machine_is_a_clear_error(store: Store) -> None:
    """So is a host that this machine does not have."""
    config = ConsoleConfig(host="192.0.2.1", port=0)
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        asyncio.run(Console(store, config=config, clock=lambda: 0).run())


def test_open_pages_do_not_hold_up_the_end(store: Store, serve: Serve) -> None:
    """Cancelling the server says goodbye to pages that still watch."""
    served = serve(store)
    with watch(served) as page:
        page.recv(timeout=20)
        served.stop()
        with pytest.raises(ConnectionClosed):
            page.recv(timeout=20)


@pytest.mark.parametrize(
    "settings", [{"port": 70000}, {"refresh_s": 0.0}, {"history_s": 1}, {"sockets_max": 0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    """A bound that cannot work is said at once."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        ConsoleConfig(**settings)
