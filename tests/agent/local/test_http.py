"""Stories: the HTTP face over real sockets, with a simulated core behind it.

The invariant under bad input, in one sentence: whatever bytes a client sends, it gets an answer
that says why or its connection closed, and the next client is served.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import gzip
import json
import os
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPResponse
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal import ShoalError
from shoal.agent.errors import ModelClosedError, ModelError, ModelInputError
from shoal.agent.local import http_codec as codec
from shoal.agent.local import http_server
from shoal.agent.local.errors import ListenError, RequestError
from shoal.agent.local.http_front import HttpFront
from shoal.agent.local.http_parser import Budget, MessageLimits, Refusal, Request, Requests
from shoal.agent.local.http_server import HttpConfig
from shoal.agent.local.oip import InferRequest, InferResponse
from tests.agent.local.echo import DeadlineError, EchoCore, OverloadError

SIZE = "Inference-Header-Content-Length"
HEALTH = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


class _Core(EchoCore):
    """The echo core with ``submit``, on two threads of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = ThreadPoolExecutor(2)
        self.failure: Exception | None = None

    def submit(
        self,
        request: InferRequest,
        done: Callable[[InferResponse | ShoalError], None],
        *,
        left_s: float | None = None,
    ) -> None:
        """Answer from another thread."""
        if self.failure is not None:
            raise self.failure

        def run() -> None:
            try:
                answer: InferResponse | ShoalError = self.infer(request, left_s=left_s)
            except ShoalError as exc:
                answer = exc
            done(answer)

        self.pool.submit(run)


class _Wire:
    """A front, and ways to ask it."""

    def __init__(self, core: _Core, front: HttpFront) -> None:
        self.core, self.front = core, front
        host, _, port = (front.address or "").rpartition(":")
        self.where = (host, int(port))

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, HTTPResponse, bytes]:
        """Return status, response and body; headers have _ for -."""
        if isinstance(body, (dict, list)):
            body = json.dumps(body).encode()
        with contextlib.closing(HTTPConnection(*self.where, timeout=20)) as client:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            client.request(method, path, body, named)
            answer = client.getresponse()
            return answer.status, answer, answer.read()

    def json(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Return status and what the JSON says."""
        status, _, text = self.ask(method, path, body, **headers)
        return status, json.loads(text)

    @contextlib.contextmanager
    def raw(self) -> Iterator[socket.socket]:
        """Give a bare connection."""
        with socket.create_connection(self.where, timeout=20) as made:
            yield made

    def tell(self, data: bytes) -> bytes:
        """Send bytes and return all that comes until the server closes."""
        with self.raw() as client:
            with contextlib.suppress(OSError):  # it may have been refused in the middle
                client.sendall(data)
            return until_closed(client)

    def alive(self) -> bool:
        """Say whether a new client is served."""
        return self.json("GET", "/v2/health/live") == (200, {"live": True})


def until_closed(client: socket.socket) -> bytes:
    """Return all that comes until the end, or a reset."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            found += part
    return found


def last(request: bytes) -> bytes:
    """Return a request after which the client wants no more."""
    return request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)


def statuses(answer: bytes) -> list[int]:
    """Return the status codes in a stream of answers."""
    return [int(each[:3]) for each in answer.split(b"HTTP/1.1 ")[1:]]


@pytest.fixture
def serve() -> Iterator[Callable[..., _Wire]]:
    """Start fronts as asked; each is stopped at the end, with what it still does."""
    opened: list[_Wire] = []

    def start(**limits: Any) -> _Wire:
        core = _Core()
        front = HttpFront(core, HttpConfig(**{"address": "127.0.0.1:0", **limits}))
        front.start()
        opened.append(_Wire(core, front))
        return opened[-1]

    yield start
    for wire in opened:
        wire.core.hold.set()
        wire.front.stop(5.0)
        wire.core.pool.shutdown()
        wire.core.shm_unregister("")


@pytest.fixture
def wire(serve: Callable[..., _Wire]) -> _Wire:
    """A front with the default limits."""
    return serve()


def question(data: Any = (1.0, 2.0), datatype: str = "FP32", **fields: Any) -> dict[str, Any]:
    """Return the JSON of a request with one input."""
    given = {"name": "x", "datatype": datatype, "shape": [len(data)], "data": list(data)}
    return {"inputs": [given], **fields}


INFER = "/v2/models/echo/infer"


def post(body: bytes, *headers: str, path: str = INFER) -> bytes:
    """Return the bytes of a POST."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


# ---- routes


def test_plain_questions(wire: _Wire) -> None:
    """Health has a body, as KServe needs it; facts come as the core says them."""
    assert wire.json("GET", "/v2/health/live") == (200, {"live": True})
    assert wire.json("GET", "/v2/health/ready") == (200, {"ready": True})
    assert wire.json("GET", "/v2") == (200, wire.core.server_metadata())
    assert wire.json("GET", "/v2/") == (200, wire.core.server_metadata())
    for path in ("/v2/models/echo", "/v2/models/echo/versions/1", "/v2/models/%65cho?x=1"):
        assert wire.json("GET", path) == (200, wire.core.model_metadata("echo", "1"))
    config = wire.core.model_config("echo", "")
    assert wire.json("GET", "/v2/models/echo/config") == (200, config)
    assert wire.json("GET", "/v2/models/echo/versions/1/ready") == (
        200,
        {"name": "echo", "ready": True},
    )
    for path in ("/v2/models/stats", "/v2/models/echo/stats", "/v2/models/echo/versions/1/stats"):
        assert wire.json("GET", path) == (200, wire.core.statistics("", ""))


def test_repository(wire: _Wire) -> None:
    """Unload, load and index; the server is not ready without its model."""
    assert wire.json("POST", "/v2/repository/models/echo/unload") == (200, {})
    assert wire.json("GET", "/v2/models/echo/ready") == (503, {"name": "echo", "ready": False})
    assert wire.json("GET", "/v2/health/ready") == (503, {"ready": False})
    index = "/v2/repository/index"
    assert wire.json("POST", index)[1][0]["state"] == "UNAVAILABLE"
    assert wire.json("POST", index, {"ready": True}) == (200, [])
    assert wire.json("POST", "/v2/repository/models/echo/load", {"parameters": {}}) == (200, {})
    assert wire.json("POST", index, {"ready": True})[1][0]["name"] == "echo"
    assert wire.json("POST", "/v2/repository/models/other/load")[0] == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/nothing", 404),
        ("GET", "/v2/models/nothing/ready", 404),
        ("GET", "/v2/models/echo/versions/2", 404),
        ("POST", "/v2/models/nothing/infer", 404),
        ("GET", "/v2/nothing", 404),
        ("GET", "/", 404),
        ("GET", "/v2/models/echo/infer", 405),
        ("POST", "/v2/health/live", 405),
        ("DELETE", "/v2/models/echo", 405),
        ("GET", "/v2/models/%ff", 400),
        ("GET", "/v2/cudasharedmemory/status", 501),
        ("GET", "/v2/trace/setting", 501),
        ("GET", "/v2/logging", 501),
    ],
)
def test_refused_routes(wire: _Wire, method: str, path: str, status: int) -> None:
    """Each has its status and a text."""
    found, told = wire.json(method, path, question() if method == "POST" else None)
    assert found == status
    assert told["error"]


def test_head_has_no_body(wire: _Wire) -> None:
    """HEAD says how long the body would be; the connection goes on."""
    head = HEALTH.replace(b"GET", b"HEAD")
    answer = wire.tell(head + last(HEALTH))
    assert statuses(answer) == [200, 200]
    assert answer.count(b"Content-Length: 13") == 2
    assert answer.count(b'{"live":true}') == 1


# ---- tensors


@pytest.mark.parametrize(
    ("datatype", "values", "packed"),
    [
        ("BOOL", [True, False], b"\1\0"),
        ("INT8", [-128, 127], b"\x80\x7f"),
        ("UINT16", [0, 65535], b"\0\0\xff\xff"),
        ("INT64", [-(2**63), 2**63 - 1], struct.pack("<2q", -(2**63), 2**63 - 1)),
        ("UINT64", [2**64 - 1], b"\xff" * 8),
        ("FP32", [0.5, -2], struct.pack("<2f", 0.5, -2)),
        ("FP64", [0.1, 1e300], struct.pack("<2d", 0.1, 1e300)),
        ("BYTES", ["ü", ""], b"\2\0\0\0\xc3\xbc\0\0\0\0"),
    ],
)
def test_json_and_binary(wire: _Wire, datatype: str, values: list[Any], packed: bytes) -> None:
    """What came as JSON is the same bytes as what came in binary, and goes back either way."""
    asked = question(values, datatype, id="7")
    status, told = wire.json("POST", INFER, asked)
    assert (status, told["id"], told["model_name"], told["model_version"]) == (
        200,
        "7",
        "echo",
        "1",
    )
    assert told["outputs"] == [
        {"name": "x", "datatype": datatype, "shape": [len(values)], "data": values}
    ]
    assert bytes(wire.core.requests[-1].inputs[0].data or b"") == packed

    given = {"name": "x", "datatype": datatype, "shape": [len(values)]}
    head = {"inputs": [given | {"parameters": {"binary_data_size": len(packed)}}]}
    for wish in (
        {"parameters": {"binary_data_output": True}},
        {"outputs": [{"name": "x", "parameters": {"binary_data": True}}]},
    ):
        text = json.dumps(head | wish).encode()
        status, answer, body = wire.ask("POST", INFER, text + packed, **{SIZE: str(len(text))})
        size = int(answer.headers[SIZE])
        assert status == 200
        assert answer.headers["Content-Type"] == "application/octet-stream"
        [output] = json.loads(body[:size])["outputs"]
        assert output["parameters"] == {"binary_data_size": len(packed)}
        assert "data" not in output
        assert body[size:] == packed


def test_own_wish_of_an_output_wins() -> None:
    """JSON for one output though binary is the rule."""
    asked, wishes = codec.infer_request(
        "echo",
        "",
        json.dumps(
            question(
                parameters={"binary_data_output": True, "priority": 1},
                outputs=[{"name": "x", "parameters": {"binary_data": False}}],
            )
        ).encode(),
        None,
        values_max=100,
    )
    assert wishes == codec.Wishes("", True, {"x": False})
    assert asked.parameters == {"priority": 1}


@pytest.mark.parametrize("shape", [[2, 2], [4], [1, 2, 2], [2, 2, 1]])
def test_nested_lists(shape: list[int]) -> None:
    """Nested as the shape, or flat."""
    nested: Any = [1, 2, 3, 4]
    for size in reversed(shape[1:]):
        nested = [nested[i : i + size] for i in range(0, len(nested), size)]
    expected = bytes([1, 2, 3, 4])
    assert codec.json_bytes("x", "UINT8", shape, nested) == expected
    assert codec.json_bytes("x", "UINT8", shape, [1, 2, 3, 4]) == expected


def test_empty_tensors() -> None:
    """No elements are elements too."""
    assert codec.json_bytes("x", "FP32", [0], []) == b""
    assert codec.json_bytes("x", "FP32", [0, 3], []) == b""
    assert codec.json_bytes("x", "FP32", [2, 0], [[], []]) == b""


@pytest.mark.parametrize(
    ("datatype", "shape", "data"),
    [
        ("INT8", [1], [128]),
        ("UINT8", [1], [-1]),
        ("UINT64", [1], [2**64]),
        ("INT64", [1], [1.0]),
        ("INT64", [1], [True]),
        ("INT64", [1], ["1"]),
        ("INT64", [1], [None]),
        ("INT64", [1], [{}]),
        ("BOOL", [1], [2]),
        ("BOOL", [1], [1.0]),
        ("FP32", [1], [1e40]),
        ("FP32", [1], [10**400]),
        ("FP64", [1], [10**400]),
        ("FP32", [1], [True]),
        ("BYTES", [1], [1]),
        ("BYTES", [1], ["\ud800"]),
        ("FP16", [1], [1.0]),
        ("BF16", [1], [1.0]),
        ("COMPLEX", [1], [1]),
        ("FP32", [2], [1.0]),
        ("FP32", [2, 2], [[1.0, 2.0], [3.0]]),
        ("FP32", [2, 2], [[1.0, 2.0], 3.0]),
        ("FP32", [2, 2], [[1.0, 2.0, 3.0, 4.0]]),
        ("FP32", [1], [[1.0]]),
        ("FP32", [1], 1.0),
        ("FP32", [1], "1"),
        ("FP32", [2**40, 2**40], [1.0]),
    ],
)
def test_json_that_is_no_such_tensor(datatype: str, shape: list[int], data: Any) -> None:
    """Nothing is cast, cut or filled up."""
    with pytest.raises(RequestError, match="input 'x'"):
        codec.json_bytes("x", datatype, shape, data)


def test_infinities_and_nan_are_values() -> None:
    """They are told apart from what is too large."""
    packed = codec.json_bytes("x", "FP32", [3], [float("inf"), float("-inf"), float("nan")])
    assert packed[:8] == struct.pack("<2f", float("inf"), float("-inf"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"inputs":' + b"1" * 5000 + b"}",
        b"{}",
        b'{"inputs":[1]}',
        b'{"inputs":{}}',
        b'{"inputs":[{}]}',
        b'{"inputs":[{"name":"x","datatype":"FP32"}]}',
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[-1],"data":[1]}]}',
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1.0],"data":[1]}]}',
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1]}]}',
        b'{"inputs":[{"name":1,"datatype":"FP32","shape":[1],"data":[1]}]}',
        b'{"inputs":[],"id":7}',
        b'{"inputs":[],"parameters":[]}',
        b'{"inputs":[],"parameters":{"a":{}}}',
        b'{"inputs":[],"parameters":{"binary_data_output":1}}',
        b'{"inputs":[],"outputs":[{"parameters":{}}]}',
        b'{"inputs":[],"outputs":[{"name":"x","parameters":{"classification":-1}}]}',
        b'{"inputs":[],"outputs":[{"name":"x","parameters":{"binary_data":"no"}}]}',
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],'
        b'"parameters":{"shared_memory_region":"a"}}]}',
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],'
        b'"parameters":{"binary_data_size":4}}]}',
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1],'
        b'"parameters":{"binary_data_size":0}}]}',
    ],
)
def test_bad_bodies(wire: _Wire, body: bytes) -> None:
    """400 with a text; the core is not asked, the next client is served."""
    status, told = wire.json("POST", INFER, body)
    assert (status, bool(told["error"])) == (400, True)
    assert not wire.core.requests
    assert wire.alive()


def test_half_a_character_is_told_back_as_it_came(wire: _Wire) -> None:
    """JSON can say what UTF-8 cannot: no reason to fail inside, in an id or in an error."""
    status, told = wire.json("POST", INFER, question(id="\ud800"))
    assert (status, told["id"]) == (200, "\ud800")
    for name, value in (("name", "\ud800"), ("datatype", "\udfff"), ("data", ["\ud800"])):
        asked = question()
        asked["inputs"][0][name] = value
        status, told = wire.json("POST", INFER, asked | {"outputs": [{"name": "\ud800"}]})
        assert status in (200, 400), told


def test_binary_sizes_must_fit(wire: _Wire) -> None:
    """The header's size is checked against the body, and nothing may be left over."""
    text = json.dumps(question()).encode()
    for size, rest in ((len(text) + 1, b""), (len(text), b"more"), (5, b"")):
        assert wire.json("POST", INFER, text + rest, **{SIZE: str(size)})[0] == 400
    for bad in ("-1", "x", "", "9" * 30, "5, 5"):
        assert wire.json("POST", INFER, text, **{SIZE: bad})[0] == 400
    assert wire.json("POST", INFER, text, **{SIZE: str(len(text))})[0] == 200


@pytest.mark.parametrize("junk", ["1,", "[],", "{},", '{"a":1},', '"",'])
@pytest.mark.parametrize("path", [INFER, "/v2/repository/models/echo/load"])
def test_values_of_a_json_are_bounded(serve: Callable[..., _Wire], junk: str, path: str) -> None:
    """Counted before they are made: a few KB of gzip can be millions of lists."""
    wire = serve(message=MessageLimits(json_values_max=1000))
    text = f'{{"inputs":[{junk * 1000}0]}}'.encode()
    for body, headers in ((text, {}), (gzip.compress(text), {"Content-Encoding": "gzip"})):
        status, told = wire.json("POST", path, body, **headers)
        assert (status, "more than 1000 values" in told["error"]) == (413, True)
    assert wire.json("POST", INFER, question(list(range(900))))[0] == 200
    assert wire.alive()


def test_values_of_an_answer_are_bounded(serve: Callable[..., _Wire]) -> None:
    """Zeros that took no room as gzip are not made to lists; binary has no such bound."""
    wire = serve(message=MessageLimits(json_values_max=1000))
    given = {"name": "x", "datatype": "UINT8", "shape": [1001]}
    facts = {"inputs": [given | {"parameters": {"binary_data_size": 1001}}]}
    for binary, status in ((False, 400), (True, 200)):
        head = json.dumps(facts | {"parameters": {"binary_data_output": binary}}).encode()
        got, _, body = wire.ask("POST", INFER, head + bytes(1001), **{SIZE: str(len(head))})
        assert (got, b"more than 1000 values" in body) == (status, not binary)


def test_plain_questions_are_small(wire: _Wire) -> None:
    """A request without tensors is read on the loop, so what it inflates to is bounded too."""
    for path in ("/v2/repository/index", "/v2/systemsharedmemory/region/r/register"):
        for body, headers in (
            (bytes(70_000), {}),
            (gzip.compress(bytes(1_000_000)), {"Content-Encoding": "gzip"}),
        ):
            assert wire.ask("POST", path, body, **headers)[0] == 413
    assert wire.alive()


def test_outputs_without_a_form_in_json(wire: _Wire) -> None:
    """FP16, and BYTES that are not UTF-8, must be asked for as binary; the text says so."""
    for datatype, packed in (("FP16", b"\0\0"), ("BYTES", b"\1\0\0\0\xff")):
        given = {"name": "x", "datatype": datatype, "shape": [1]}
        head = {"inputs": [given | {"parameters": {"binary_data_size": len(packed)}}]}
        text = json.dumps(head).encode()
        status, told = wire.json("POST", INFER, text + packed, **{SIZE: str(len(text))})
        assert status == 400
        assert "binary_data" in told["error"]


def test_shared_memory(wire: _Wire) -> None:
    """A region is registered, read, written, told and taken out."""
    with contextlib.closing(SharedMemory(create=True, size=64)) as memory:
        assert memory.buf is not None
        memory.buf[:8] = struct.pack("<2f", 1, 2)
        region = {"key": "/" + memory.name.lstrip("/"), "offset": 0, "byte_size": 64}
        root = "/v2/systemsharedmemory"
        assert wire.json("POST", root + "/region/io/register", region) == (200, {})
        told = [{"name": "io", **region}]
        assert wire.json("GET", root + "/status") == (200, told)
        assert wire.json("GET", root + "/region/io/status") == (200, told)
        at = {"shared_memory_region": "io", "shared_memory_byte_size": 8}
        status, answer = wire.json(
            "POST",
            INFER,
            {
                "inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "parameters": at}],
                "outputs": [{"name": "x", "parameters": at | {"shared_memory_offset": 8}}],
            },
        )
        assert status == 200
        [output] = answer["outputs"]
        assert output["parameters"] == at | {"shared_memory_offset": 8}
        assert "data" not in output
        assert bytes(memory.buf[8:16]) == struct.pack("<2f", 1, 2)
        assert wire.json("POST", root + "/region/io/unregister") == (200, {})
        assert wire.json("POST", root + "/unregister") == (200, {})
        assert wire.json("GET", root + "/status") == (200, [])
        for bad in ({}, {"key": 1, "byte_size": 1}, {"key": "a", "byte_size": "1"}):
            assert wire.json("POST", root + "/region/io/register", bad)[0] == 400
        memory.unlink()


# ---- compression


@pytest.mark.parametrize("count", [2, 50_000])
@pytest.mark.parametrize(
    ("coding", "squeeze"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_compressed_both_ways(
    wire: _Wire, coding: str, squeeze: Callable[[bytes], bytes], count: int
) -> None:
    """The body is compressed as asked, if it is worth it; sizes are of the plain body."""
    body = squeeze(json.dumps(question([1.0] * count)).encode())
    status, answer, got = wire.ask(
        "POST", INFER, body, Content_Encoding=coding, Accept_Encoding=f"br, {coding}"
    )
    assert status == 200
    if count > 2:
        assert answer.headers["Content-Encoding"] == coding
        got = zlib.decompress(got, 47)
    assert json.loads(got)["outputs"][0]["data"] == [1.0] * count


def test_compressed_request_is_bounded(serve: Callable[..., _Wire]) -> None:
    """A bomb is stopped at the limit; damage, truncation and other codings are told."""
    wire = serve(message=MessageLimits(body_bytes_max=100_000))
    plain = json.dumps(question()).encode()
    good = gzip.compress(plain)
    cases = [
        (gzip.compress(bytes(10_000_000)), "gzip", 413),
        (gzip.compress(plain[:9]) + gzip.compress(plain[9:]), "gzip", 200),
        (good[:-4], "gzip", 400),
        (b"no gzip", "gzip", 400),
        (good + b"x", "gzip", 400),
        (good, "br", 415),
        (plain, "identity", 200),
    ]
    for body, coding, status in cases:
        assert wire.json("POST", INFER, body, Content_Encoding=coding)[0] == status, coding
    with pytest.raises(codec.OversizeError):
        codec.decompress("gzip", gzip.compress(bytes(101)), 100)
    assert codec.decompress("gzip", gzip.compress(bytes(100)), 100) == bytes(100)


# ---- errors


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ModelInputError("i"), 400),
        (RequestError("r"), 400),
        (OverloadError("o"), 503),
        (DeadlineError("d"), 503),
        (ModelClosedError("c"), 503),
        (ModelError("m"), 500),
    ],
)
def test_errors_of_the_core(wire: _Wire, error: Exception, status: int) -> None:
    """Both what is refused at once and what comes later."""
    wire.core.failure = error
    assert wire.json("POST", INFER, question()) == (status, {"error": str(error)})
    wire.core.failure, wire.core.error = None, error
    found, answer, body = wire.ask("POST", INFER, question())
    assert (found, json.loads(body)) == (status, {"error": str(error)})
    assert (answer.headers["Retry-After"] is not None) == (status == 503)


def test_unexpected_error_is_logged(wire: _Wire, caplog: pytest.LogCaptureFixture) -> None:
    """500 without the inside; the log has it."""
    wire.core.failure = KeyError("secret")
    status, told = wire.json("POST", INFER, question())
    assert status == 500
    assert "secret" not in told["error"]
    assert "secret" in caplog.text
    assert wire.alive()


# ---- HTTP itself


def test_pipelined_answers_come_in_order(wire: _Wire) -> None:
    """A slow one first: nothing overtakes it."""
    wire.core.hold.clear()
    with wire.raw() as client:
        first = post(json.dumps(question(id="first")).encode())
        client.sendall(first + HEALTH * 500 + last(HEALTH))
        assert wire.core.running.acquire(timeout=20)
        assert wire.alive()  # others do not wait
        wire.core.hold.set()
        answer = until_closed(client)
    assert statuses(answer) == [200] * 502
    assert answer.index(b'"first"') < answer.index(b'{"live":true}')


def test_chunked_bodies(wire: _Wire) -> None:
    """Any size of chunk, with extensions and trailers."""
    body = json.dumps(question()).encode()
    head = (
        f"POST {INFER} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    ).encode()
    for size in (1, 7, 1000):
        parts = [body[i : i + size] for i in range(0, len(body), size)]
        chunks = b"".join(b"%x;a=b\r\n%s\r\n" % (len(each), each) for each in parts)
        assert statuses(wire.tell(head + chunks + b"0\r\nT: v\r\n\r\n")) == [200]


def test_expect_continue(serve: Callable[..., _Wire]) -> None:
    """100 comes before the body is sent, 413 instead of it; other expectations are 417."""
    wire = serve(message=MessageLimits(body_bytes_max=10_000))
    body = json.dumps(question()).encode()
    asked = post(body, "Expect: 100-continue", "Connection: close")
    with wire.raw() as client:
        client.sendall(HEALTH + asked[: -len(body)])
        found = b""
        while b"100 Continue\r\n\r\n" not in found:
            found += client.recv(65536)
        client.sendall(body)
        assert statuses(found + until_closed(client)) == [200, 100, 200]
    assert statuses(wire.tell(post(bytes(20_000), "Expect: 100-continue")[:200])) == [413]
    assert statuses(wire.tell(post(b"", "Expect: tea"))) == [417]


def test_connections_are_kept_or_closed(wire: _Wire) -> None:
    """HTTP/1.1 keeps, HTTP/1.0 closes, unless the client says otherwise."""
    old = HEALTH.replace(b"1.1", b"1.0")
    assert statuses(wire.tell(old)) == [200]
    kept = old.replace(b"\r\n\r\n", b"\r\nConnection: keep-alive\r\n\r\n")
    answer = wire.tell(kept + old)
    assert statuses(answer) == [200, 200]
    assert answer.count(b"Connection: keep-alive") == 1
    upgrade = HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
    assert statuses(wire.tell(upgrade + old)) == [200, 200]
    absolute = old.replace(b"/v2", b"http://x:80/v2")
    assert statuses(wire.tell(absolute)) == [200]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nA b: c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nA: \0\r\n\r\n", 400),
        (b"GET /\xff\0 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (post(b"")[:-4] + b"\r\nContent-Length: 99999999999\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"a" * 200_000, 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a" * 600_000, 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 65 + b"\r\n", 431),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
            + b"T: v\r\n" * 100,
            431,
        ),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"e" * 600_000,
            431,
        ),
    ],
)
def test_malformed_is_told_and_closed(wire: _Wire, data: bytes, status: int) -> None:
    """One answer with the reason, then the end; what follows is not taken for a request."""
    answer = wire.tell(HEALTH + data + HEALTH)
    assert statuses(answer)[0] == 200
    assert statuses(answer)[1:] == [status]
    assert b'{"error":' in answer
    assert wire.alive()


def test_slow_clients_are_cut(serve: Callable[..., _Wire]) -> None:
    """A head or a body that does not come is 408; silence is closed without a word."""
    wire = serve(head_s=0.1, body_s=0.1, idle_s=0.1)
    assert wire.tell(b"") == b""
    assert statuses(wire.tell(b"GET / HT")) == [408]
    assert statuses(wire.tell(HEALTH + post(b"12345")[:-1])) == [200, 408]
    assert statuses(wire.tell(HEALTH)) == [200]
    assert wire.alive()


def test_an_active_connection_is_kept(
    serve: Callable[..., _Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time without a request counts from the last one, also where the loop itself answers."""
    jump_s = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: time.monotonic() + jump_s[0],
        time=time.time, strftime=time.strftime, gmtime=time.gmtime,
    )  # fmt: skip
    monkeypatch.setattr(http_server, "time", clock)
    wire = serve(head_s=1000, idle_s=1000)
    with contextlib.closing(HTTPConnection(*wire.where, timeout=20)) as client:
        for _ in range(5):
            client.request("GET", "/v2/health/live")
            assert client.getresponse().read() == b'{"live":true}'
            jump_s[0] += 600
            assert wire.alive()  # the loop has seen the jump, and looked who is due
        kept = client.sock
        jump_s[0] += 1001
        assert wire.alive()
        assert kept is not None and kept.recv(1) == b""


def test_dripping_does_not_help(serve: Callable[..., _Wire]) -> None:
    """A byte now and then does not give a head more time."""
    wire = serve(head_s=0.2)
    with wire.raw() as client:
        with contextlib.suppress(OSError):
            for each in HEALTH[:-1] * 3:
                client.sendall(bytes([each]))
                time.sleep(0.01)
        assert statuses(until_closed(client)) in ([408], [])  # [] is a reset while dripping
    assert wire.alive()


def test_client_that_does_not_read(serve: Callable[..., _Wire]) -> None:
    """Its answer waits for a bounded time, then the connection is cut."""
    wire = serve(write_s=0.2, linger_s=0.1)
    with wire.raw() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        given = {"name": "x", "datatype": "UINT8", "shape": [8 << 20]}
        text = json.dumps(
            {
                "inputs": [given | {"parameters": {"binary_data_size": 8 << 20}}],
                "parameters": {"binary_data_output": True},
            }
        ).encode()
        client.sendall(post(text + bytes(8 << 20), f"{SIZE}: {len(text)}"))
        assert wire.core.running.acquire(timeout=20)
        deadline = time.monotonic() + 20
        while wire.front._server._connections and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not wire.front._server._connections
    assert wire.alive()


def test_too_many_clients(serve: Callable[..., _Wire]) -> None:
    """One more is 503 at once; when one has gone there is room again."""
    wire = serve(connections_max=2, refusals_max=1)
    with wire.raw() as first, wire.raw() as second:
        for each in (first, second):
            each.sendall(HEALTH)
            assert statuses(each.recv(65536)) == [200]
        assert statuses(wire.tell(HEALTH)) == [503]
    deadline = time.monotonic() + 20
    while statuses(wire.tell(last(HEALTH))) != [200]:  # a 503, or a reset where that is too much
        assert time.monotonic() < deadline


def test_many_clients_are_all_answered(serve: Callable[..., _Wire]) -> None:
    """400 at once on 300 places: everyone has an answer or was closed, nobody waits."""
    wire = serve(connections_max=300, refusals_max=50)
    with contextlib.ExitStack() as opened:
        clients = [opened.enter_context(wire.raw()) for _ in range(400)]
        asked = post(json.dumps(question()).encode())
        for each in clients:
            with contextlib.suppress(OSError):
                each.sendall(asked)
        found = []
        for each in clients:
            with contextlib.suppress(ConnectionResetError):
                found += statuses(each.recv(65536))
    assert found.count(200) == 300
    assert set(found) == {200, 503}


def test_bodies_share_a_budget(serve: Callable[..., _Wire]) -> None:
    """A body that would be too much beside the others is 503; later it is taken."""
    wire = serve(bodies_bytes_max=100_000)
    wire.core.hold.clear()
    large = json.dumps(question([1.0] * 15_000)).encode()
    with wire.raw() as client:
        client.sendall(post(large, "Connection: close"))
        assert wire.core.running.acquire(timeout=20)
        assert statuses(wire.tell(post(large))) == [503]
        wire.core.hold.set()
        assert statuses(until_closed(client)) == [200]
    assert wire.json("POST", INFER, large)[0] == 200


def test_client_that_leaves(wire: _Wire) -> None:
    """What it asked may run; its answer is nobody's."""
    wire.core.hold.clear()
    with wire.raw() as client:
        client.sendall(post(json.dumps(question()).encode()))
        assert wire.core.running.acquire(timeout=20)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    wire.core.hold.set()
    assert wire.alive()


def test_garbage(wire: _Wire) -> None:
    """Requests with bytes changed, cut and joined, from a fixed seed; then all is as before."""
    rng = random.Random(7)
    seeds = [
        HEALTH,
        post(json.dumps(question()).encode()),
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    ]
    for _ in range(300):
        data = bytearray(b"".join(rng.choices(seeds, k=rng.randint(1, 3))))
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(len(data))
            cut, put = rng.choice([(0, 1), (1, 1), (rng.randint(1, 20), 0)])
            data[at : at + cut] = rng.randbytes(put)
            if not data:
                data = bytearray(b"x")
        with wire.raw() as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            answer = until_closed(client)
        assert all(100 <= each < 600 for each in statuses(answer))
    assert wire.alive()


def test_parser_is_the_same_for_any_cut() -> None:
    """Bytes in one piece, or one by one, are the same requests."""
    stream = HEALTH + post(b"12345") + HEALTH + b"bad\r\n\r\n"
    found = []
    for size in (1, 2, 17, len(stream)):
        requests = Requests(MessageLimits(), Budget(1000))
        for start in range(0, len(stream), size):
            requests.feed(stream[start : start + size])
        found.append(list(requests.items))
        requests.close()
    assert all(each == found[0] for each in found)
    assert [type(each) for each in found[0]] == [Request, Request, Request, Refusal]


# ---- the Unix socket, start and stop


def ask_unix(path: Path) -> list[int]:
    """Return the status of a health question over a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(20)
        client.connect(str(path))
        client.sendall(last(HEALTH))
        return statuses(until_closed(client))


def test_unix_socket(serve: Callable[..., _Wire], tmp_path: Path) -> None:
    """For this user only; a dead server's is replaced, a living one's or a file is not."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    wire = serve(socket=path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert ask_unix(path) == [200]
    with pytest.raises(ListenError, match="a server is listening there"):
        serve(socket=path)
    other = tmp_path / "file"
    other.write_text("mine")
    with pytest.raises(ListenError, match="no socket"):
        serve(socket=other)
    assert other.read_text() == "mine"
    assert ask_unix(path) == [200]
    wire.front.stop(0.0)
    assert not path.exists()


def test_unix_socket_for_a_group(
    serve: Callable[..., _Wire], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group's users too, and nobody else; what cannot be given to it is not left behind."""
    gid = os.getgid()
    for number, group in enumerate((str(gid), grp.getgrgid(gid).gr_name)):
        path = tmp_path / str(number)
        serve(socket=path, socket_group=group)
        facts = path.stat()
        assert (facts.st_mode & 0o777, facts.st_gid) == (0o660, gid)
        assert ask_unix(path) == [200]
    path = tmp_path / "s"
    for none in ("there is none", "a\0b", "", "4294967295", "9" * 30, "-1"):
        with pytest.raises(ListenError, match="no group"):
            serve(socket=path, socket_group=none)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(ListenError, match="not yours"):
        serve(socket=path, socket_group=str(gid))
    assert not path.exists()


@pytest.mark.parametrize(
    "address", ["nowhere", "127.0.0.1:x", "127.0.0.1:70000", ":1", "1.2.3.4:1"]
)
def test_addresses_that_are_none(serve: Callable[..., _Wire], address: str) -> None:
    """The error names the address."""
    with pytest.raises(ListenError, match=address):
        serve(address=address)


def test_taken_address(serve: Callable[..., _Wire], wire: _Wire) -> None:
    """A second server is refused; the first one lives."""
    with pytest.raises(ListenError, match="in use"):
        serve(address=wire.front.address)
    assert wire.alive()


def test_stop_lets_requests_end(wire: _Wire) -> None:
    """Who waits is answered, with the end of the connection; who is idle is closed."""
    wire.core.hold.clear()
    with wire.raw() as client, wire.raw() as idle:
        idle.sendall(HEALTH)
        assert statuses(idle.recv(65536)) == [200]
        client.sendall(post(json.dumps(question()).encode()))
        assert wire.core.running.acquire(timeout=20)
        stopping = threading.Thread(target=wire.front.stop, args=(20.0,))
        stopping.start()
        assert until_closed(idle) == b""
        wire.core.hold.set()
        answer = until_closed(client)
        stopping.join(20)
    assert statuses(answer) == [200]
    assert b"Connection: close" in answer
    with pytest.raises(ConnectionRefusedError):
        wire.ask("GET", "/v2")


def test_stop_cuts_at_the_end(wire: _Wire) -> None:
    """A request that does not end is cut."""
    wire.core.hold.clear()
    with wire.raw() as client:
        client.sendall(post(json.dumps(question()).encode()))
        assert wire.core.running.acquire(timeout=20)
        wire.front.stop(0.05)
        assert until_closed(client) == b""


def test_limits_are_checked() -> None:
    """Nonsense is refused where it is written."""
    for bad in (
        {"address": None}, {"connections_max": 0}, {"head_s": 0.0}, {"bodies_bytes_max": 0},
        {"socket_group": "x"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must "):
            HttpConfig(**bad)
    with pytest.raises(ValueError, match="must be"):
        MessageLimits(headers_max=0)
    with pytest.raises(ValueError, match="must be"):
        MessageLimits(json_values_max=0)
