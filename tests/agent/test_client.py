"""The client, over a ring and over HTTP. Kinds: stories, faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import count
from pathlib import Path
from socketserver import UnixStreamServer
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from shoal.agent.client import (
    Client,
    ClientError,
    ClientInputError,
    DeadlineError,
    OverloadedError,
    RingFullError,
    ServerFailedError,
    ServerGoneError,
    UnknownModelError,
)
from shoal.agent.local.oip import InferInput, InferRequest
from shoal.agent.local.ring_front import RingConfig, RingFront
from tests.sims.ring_server import Doubler, ServerProcess

_names = count()
CONFIG = RingConfig(clients_max=2, request_bytes=16384, response_bytes=8192, reap_s=0.02)


def new_name() -> str:
    """Return a name that no other test has."""
    return f"shoal-client-{os.getpid()}-{next(_names)}"


class _Handler(BaseHTTPRequestHandler):
    """The doubler behind the protocol's HTTP form, as far as the client speaks it."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one segment per answer: no waiting for a delayed ACK
    core = Doubler()
    answer: tuple[int, dict[str, str], bytes] | None = None  # instead of what it would say

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""

    def address_string(self) -> str:
        """Name the peer; a Unix socket has no address."""
        return "peer"

    def do_GET(self) -> None:
        """Answer metadata."""
        name = self.path.removeprefix("/v2/models/")
        self.say(lambda: (json.dumps(self.core.model_metadata(name, "")).encode(), {}))

    def do_POST(self) -> None:
        """Answer the index, or run."""
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v2/repository/index":
            self.say(lambda: (json.dumps(self.core.repository_index(ready=False)).encode(), {}))
            return
        length = int(self.headers["Inference-Header-Content-Length"])
        head, at, inputs = json.loads(raw[:length]), length, []
        for each in head["inputs"]:
            size = each["parameters"]["binary_data_size"]
            row = each["name"], each["datatype"], tuple(each["shape"])
            inputs.append(InferInput(*row, raw[at : at + size], None))
            at += size
        assert at == len(raw)
        assert head["parameters"]["binary_data_output"] is True
        name = self.path.split("/")[3]

        def run() -> tuple[bytes, dict[str, str]]:
            response = self.core.infer(InferRequest(name, "", tuple(inputs), (), {}), left_s=None)
            rows = [
                {
                    "name": each.name,
                    "datatype": each.datatype,
                    "shape": list(each.shape),
                    "parameters": {"binary_data_size": len(each.data or b"")},
                }
                for each in response.outputs
            ]
            text = json.dumps({"model_name": name, "outputs": rows}).encode()
            tail = b"".join(bytes(each.data or b"") for each in response.outputs)
            return text + tail, {"Inference-Header-Content-Length": str(len(text))}

        self.say(run)

    def say(self, run: Callable[[], tuple[bytes, dict[str, str]]]) -> None:
        """Send what ``run`` gives, or the status of its error."""
        try:
            status, (body, headers) = 200, run()
        except Exception as exc:
            codes = {"agent.local.model.unknown": 404, "agent.local.overload": 503}
            codes["agent.model.input"] = 400
            status, headers = codes.get(getattr(exc, "code", ""), 500), {}
            body = json.dumps({"error": str(exc)}).encode()
        if self.answer is not None:
            status, headers, body = self.answer
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


class _UnixServer(UnixStreamServer):
    def get_request(self) -> tuple[Any, Any]:
        return super().get_request()[0], ("local", 0)


@contextmanager
def http_server(path: Path | None = None) -> Iterator[str]:
    """Give the address of an HTTP server of one thread."""
    made: HTTPServer | _UnixServer
    if path is None:
        made = HTTPServer(("127.0.0.1", 0), _Handler)
        address = f"http://127.0.0.1:{made.server_port}"
    else:
        made, address = _UnixServer(str(path), _Handler), f"unix:{path}"
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield address
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


@pytest.fixture
def name() -> Iterator[str]:
    """Give the name of a ring that is served."""
    made = new_name()
    front = RingFront(Doubler(), made, CONFIG)
    front.start()
    yield made
    front.stop(20.0)


@pytest.fixture(params=["ring", "http", "unix"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Client]:
    """Give a client of each kind, and its server."""
    if request.param == "ring":
        with Client(request.getfixturevalue("name")) as made:
            yield made
        return
    path = None if request.param == "http" else tmp_path / "socket"
    with http_server(path) as address, Client(address) as made:
        yield made


# ---- the same over every way -------------------------------------------------------------------


def test_arrays_in_arrays_out(client: Client) -> None:
    """The outputs are the caller's own, writable, and stay as they are after later calls."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    first = client.infer("m", {"x": x})
    second = client.infer("m", {"x": x + 1})
    np.testing.assert_array_equal(first["y"], 2 * x)
    np.testing.assert_array_equal(second["y"], 2 * x + 2)
    first["y"][:] = 0
    np.testing.assert_array_equal(second["y"], 2 * x + 2)


def test_shapes_may_change_from_call_to_call(client: Client) -> None:
    """A model with free axes takes each; also empty and scalar arrays."""
    for shape in ((3,), (2, 2), (), (0,), (3,), (1, 3)):
        x = np.ones(shape, np.float32)
        np.testing.assert_array_equal(client.infer("m", {"x": x})["y"], 2 * x)


@pytest.mark.parametrize(
    "dtype",
    ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "q", "Q", "l"],
)
def test_every_dtype_comes_back(client: Client, dtype: str) -> None:
    """Numbers and bool, with what the platform calls long too."""
    x = np.arange(4).astype(dtype)
    found = client.infer("echo", {"x": x})["x"]
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(found, x)


def test_strings_and_bfloat16_come_back(client: Client) -> None:
    """What NumPy itself has no buffer for."""
    words = np.array([["a", "ü"], ["", "long " * 50]])
    coded = np.char.encode(words, "utf-8")
    for each in (words, coded, words.astype(object)):
        found = client.infer("echo", {"s": each})["s"]
        assert found.dtype == object
        assert found.shape == (2, 2)
        assert found.tolist() == coded.tolist()
    x = np.array([1, 2.5], ml_dtypes.bfloat16)
    found = client.infer("echo", {"x": x})["x"]
    assert found.dtype == x.dtype
    assert found.tolist() == [1, 2.5]


def test_any_buffer_goes_in(client: Client) -> None:
    """array, bytes, memoryview; two inputs at once."""
    found = client.infer("echo", {"a": array("i", [1, 2]), "b": b"xy", "c": memoryview(b"z")})
    assert {key: value.tolist() for key, value in found.items()} == {
        "a": [1, 2],
        "b": [120, 121],
        "c": [122],
    }


def test_bytes_in_bytes_out(client: Client) -> None:
    """Without NumPy: datatype, shape, bytes."""
    x = array("f", [1, 2])
    found = client.infer_raw("m", {"x": ("FP32", (2,), x)})
    assert found == {"y": ("FP32", (2,), bytearray(array("f", [2, 4])))}


def test_an_array_that_cannot_be_sent_is_refused(client: Client) -> None:
    """Never cast, never copied behind the caller's back; the client works on."""
    good = np.ones((4, 4), np.float32)
    client.infer("echo", {"x": good})
    for wrong, said in (
        (good.T[:2], "C-contiguous"),
        (good[:, ::2], "C-contiguous"),
        (good.astype(np.complex64), "format"),
        (good.astype(">f4"), "format"),
        ([1.0, 2.0], "list"),
        (None, "NoneType"),
        (np.array([1, "a"], object), "int among its strings"),
    ):
        with pytest.raises(ClientInputError, match=said):
            client.infer("echo", {"x": wrong})
    for raw, said in ((("FP99", (1,), b"1234"), "FP99"), (("FP32", (-1,), b"1234"), "shape")):
        with pytest.raises(ClientInputError, match=said):
            client.infer_raw("echo", {"x": raw})
    np.testing.assert_array_equal(client.infer("echo", {"x": good})["x"], good)


def test_what_the_server_refuses_is_typed(client: Client) -> None:
    """Each with the server's text; the client works on."""
    x = {"x": np.ones(1, np.float32)}
    for model, error, said in (
        ("nobody", UnknownModelError, "no model 'nobody'"),
        ("full", OverloadedError, "the queue is full"),
        ("broken", ServerFailedError, "RuntimeError|500|as a bug would"),
    ):
        with pytest.raises(error, match=said) as caught:
            client.infer(model, x)
        assert caught.value.retry == (error is OverloadedError)
    with pytest.raises(ClientInputError, match="one FP32 input"):
        client.infer("m", {"x": np.ones(1, np.int32)})
    assert client.infer("m", x)["y"].tolist() == [2]


def test_models_and_metadata(client: Client) -> None:
    """In the protocol's form, whichever way."""
    assert [each["name"] for each in client.models()] == ["m"]
    assert client.metadata("m")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1]}]
    with pytest.raises(UnknownModelError):
        client.metadata("nobody")


def test_a_deadline_ends_the_call_and_not_the_client(client: Client) -> None:
    """The next call waits until the slot or the connection can be used, and is served."""
    slow = {"x": np.array([0.3], np.float32)}
    with pytest.raises(DeadlineError):
        client.infer("slow", slow, timeout_s=0.02)
    assert client.infer("m", {"x": np.ones(1, np.float32)})["y"].tolist() == [2]


def test_threads_may_share_a_client(client: Client) -> None:
    """Their calls go one after another; none gets another's answer."""
    wrong: list[object] = []

    def work(i: int) -> None:
        try:
            for j in range(50):
                x = np.array([i, j], np.float32)
                if client.infer("m", {"x": x})["y"].tolist() != [2 * i, 2 * j]:
                    wrong.append((i, j))
        except Exception as exc:
            wrong.append(exc)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_a_closed_client_connects_again(client: Client) -> None:
    """Closing gives the slot back, and is no end."""
    client.close()
    client.close()
    assert client.infer("m", {"x": np.ones(1, np.float32)})["y"].tolist() == [2]


# ---- the ring ----------------------------------------------------------------------------------


def test_no_numpy_where_none_is_asked_for() -> None:
    """The client and a call of bytes import neither NumPy nor http."""
    with ServerProcess(new_name_ := new_name()):
        script = (
            "import sys; from shoal.agent.client import Client\n"
            "with Client(sys.argv[1]) as c: c.infer_raw('echo', {'x': ('UINT8', (1,), b'1')})\n"
            "assert not {'numpy', 'http', 'http.client', 'asyncio', 'grpc'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", script, new_name_], check=True)


def test_a_full_ring_says_so_until_a_slot_is_free(name: str) -> None:
    """Two slots, three clients."""
    x = {"x": np.ones(1, np.float32)}
    with Client(name) as first, Client(name) as second, Client(name) as third:
        first.infer("m", x)
        second.infer("m", x)
        with pytest.raises(RingFullError, match="2 clients") as caught:
            third.infer("m", x)
        assert caught.value.retry
        first.close()
        third.infer("m", x)


def test_what_does_not_fit_the_ring_is_refused(name: str) -> None:
    """With the sizes, before anything is written; also names that are too long."""
    with Client(name) as client:
        with pytest.raises(ClientInputError, match="room for 16384"):
            client.infer("m", {"x": np.ones(5000, np.float32)})
        with pytest.raises(ClientInputError, match="255 bytes"):
            client.infer("m", {"x" * 256: np.ones(1, np.float32)})
        with pytest.raises(ClientInputError, match="16 axes; 8 are allowed"):
            client.infer("m", {"x": np.ones((1,) * 16, np.float32)})
        with pytest.raises(ClientInputError, match="64"):
            client.infer("m", {f"x{i}": np.ones(1, np.float32) for i in range(65)})
        assert client.infer("m", {"x": np.ones(1, np.float32)})["y"].tolist() == [2]


def test_many_plans_do_not_pile_up(name: str) -> None:
    """A model of any shape, asked with a thousand shapes, costs 64 plans."""
    with Client(name) as client:
        for n in range(1, 300):
            assert client.infer("m", {"x": np.ones(n, np.float32)})["y"].shape == (n,)
        way: Any = client._way
        assert len(way._exact) <= 64


def test_a_server_that_dies_is_noticed_in_a_call_and_the_next_one_connects() -> None:
    """Kill -9 while the model runs; a new server of the same name; the same client."""
    name = new_name()
    x = {"x": np.ones(1, np.float32)}
    with ServerProcess(name) as server, Client(name, timeout_s=60) as client:
        client.infer("m", x)
        killer = threading.Timer(0.1, server.kill)
        killer.start()
        with pytest.raises(ServerGoneError, match="ended before") as caught:
            client.infer("slow", {"x": np.array([30], np.float32)})
        assert caught.value.retry
        killer.join()
        with pytest.raises(ServerGoneError):
            client.infer("m", x)
        server.process.wait()
        with ServerProcess(name) as second:
            assert client.infer("m", x)["y"].tolist() == [2]
            second.end()
        with ServerProcess(name):  # ended properly in between: the client need not even fail
            assert client.infer("m", x)["y"].tolist() == [2]


def test_a_deadline_holds_while_the_slot_is_taken(name: str) -> None:
    """An earlier call still runs: the next one waits no longer than it may."""
    with Client(name) as client:
        with pytest.raises(DeadlineError):
            client.infer("slow", {"x": np.array([0.5], np.float32)}, timeout_s=0.01)
        with pytest.raises(DeadlineError, match="earlier call"):
            client.infer("m", {"x": np.ones(1, np.float32)}, timeout_s=0.01)
        assert client.infer("m", {"x": np.ones(1, np.float32)})["y"].tolist() == [2]


def test_a_fork_has_a_slot_of_its_own() -> None:
    """The child neither uses nor frees its parent's."""
    script = """
import os, sys
from shoal.agent.client import Client
client = Client(sys.argv[1])
ask = lambda byte: client.infer_raw('echo', {'x': ('UINT8', (1,), byte)})['x'][2] == byte
assert ask(b'1')
child = os.fork()
if child == 0:
    ok = all(ask(b'2') for _ in range(100))
    client.close()
    os._exit(0 if ok else 1)
assert all(ask(b'3') for _ in range(100))
assert os.waitpid(child, 0)[1] == 0
assert ask(b'4')
"""
    name = new_name()
    with ServerProcess(name, clients_max=2):
        subprocess.run([sys.executable, "-c", script, name], check=True)


def test_a_signal_interrupts_a_call() -> None:
    """Ctrl-C is heard while the client sleeps, and the client works on."""
    script = """
import signal, sys, threading, os
from array import array
from shoal.agent.client import Client
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
with Client(sys.argv[1], timeout_s=60) as client:
    client.models()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        client.infer_raw('slow', {'x': ('FP32', (1,), array('f', [1.0]))})
    except KeyboardInterrupt:
        assert client.infer_raw('echo', {'x': ('UINT8', (1,), b'1')})['x'][2] == b'1'
        print('heard')
"""
    name = new_name()
    with ServerProcess(name):
        done = subprocess.run(
            [sys.executable, "-c", script, name], check=True, capture_output=True, text=True
        )
    assert done.stdout == "heard\n"


# ---- addresses and HTTP ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("nobody-serves-this", ServerGoneError),
        ("../etc/passwd", ClientInputError),
        ("", ClientInputError),
        ("unix:", ClientInputError),
        ("unix:/nowhere/at/all", ServerGoneError),
        ("http://", ClientInputError),
        ("http://127.0.0.1:99999", ClientInputError),
        ("http://127.0.0.1:1/path", ClientInputError),
        ("http://127.0.0.1:1", ServerGoneError),
    ],
)
def test_an_address_that_leads_nowhere(address: str, error: type[ClientError]) -> None:
    """Refused, or told that nobody is there."""
    with pytest.raises(error), Client(address) as client:
        client.models()


def test_a_timeout_of_nothing_is_refused() -> None:
    """A call needs time."""
    with pytest.raises(ClientInputError, match="above 0"):
        Client("x", timeout_s=0)


def test_a_connection_that_the_server_closed_is_made_anew() -> None:
    """An idle one, silently: nothing was answered on it."""
    _Handler.timeout = 0.05
    try:
        with http_server() as address, Client(address) as client:
            client.models()
            time.sleep(0.3)
            assert [each["name"] for each in client.models()] == ["m"]
    finally:
        _Handler.timeout = None


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (200, {}, b"no json"),
        (200, {}, b"[]"),
        (200, {}, b"{}"),
        (200, {"Inference-Header-Content-Length": "x"}, b"{}"),
        (200, {}, b'{"outputs": [{"name": "y", "datatype": "FP32", "shape": [1]}]}'),
        (
            200,
            {},
            b'{"outputs": [{"name": "y", "datatype": "FP32", "shape": [9], '
            b'"parameters": {"binary_data_size": 36}}]}',
        ),
        (
            200,
            {"Inference-Header-Content-Length": "97"},
            b'{"outputs": [{"name": "y", "datatype": "FP32", "shape": [9], '
            b'"parameters": {"binary_data_size":4}}]}1234',
        ),
        (500, {}, b"<html>"),
        (500, {}, b'{"error": "it broke"}'),
    ],
)
def test_an_answer_that_makes_no_sense(status: int, headers: dict[str, str], body: bytes) -> None:
    """Is the server's failure, typed; never a KeyError."""
    _Handler.answer = (status, headers, body)
    try:
        with http_server() as address, Client(address) as client, pytest.raises(ServerFailedError):
            client.infer("m", {"x": np.ones(1, np.float32)})
    finally:
        _Handler.answer = None
