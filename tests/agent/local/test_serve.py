"""Stories: the real command in a process of its own, with real models."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from shoal.agent.local.serve import END_S
from tests.agent.local import models

# The command as installed; `before` may break something first.
COMMAND = """
import sys
from shoal.agent.local import serve
{before}
from shoal.agent.main import main
sys.exit(main())
"""


class _Served:
    """A running command, and what it said."""

    def __init__(self, process: subprocess.Popen[str], endpoints: int) -> None:
        self.process = process
        assert process.stdout is not None
        self.lines = [process.stdout.readline().strip() for _ in range(endpoints)]

    @property
    def address(self) -> tuple[str, int]:
        """Where HTTP is."""
        [url] = [line.split()[1] for line in self.lines if "http://" in line]
        host, _, port = url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Return status and JSON."""
        with contextlib.closing(HTTPConnection(*self.address, timeout=30)) as client:
            client.request(method, path, None if body is None else json.dumps(body))
            answer = client.getresponse()
            return answer.status, json.loads(answer.read())

    def end(self) -> int:
        """Ask it to end; return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(END_S + 20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the models echo, texts, add."""
    for name, kind, shape in (
        ("echo", TensorProto.FLOAT, ["n", 2]),
        ("texts", TensorProto.STRING, ["n"]),
    ):
        node = helper.make_node("Identity", ["x"], ["y"])
        made = models.model([node], [("x", kind, shape)], [("y", kind, shape)])
        (tmp_path / f"{name}.onnx").write_bytes(made)
    (tmp_path / "add.onnx").write_bytes(models.adder())
    return tmp_path


@pytest.fixture
def run() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, before: str = "") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND.format(before=before), "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def question(values: list[float]) -> dict[str, Any]:
    """Return a request for "add"."""
    given = {"name": "x", "datatype": "FP32", "shape": [1, len(values)], "data": values}
    return {"inputs": [given]}


def test_every_face_serves_the_same_model(
    run: Callable[..., subprocess.Popen[str]], folder: Path
) -> None:
    """TCP, Unix socket, ring and gRPC are told when ready; SIGTERM ends it all, leaving nothing."""
    path, name = folder / "s", f"test-serve-{os.getpid()}"
    served = _Served(
        run(
            *("--model", f"add={folder / 'add.onnx'}", "--http", "127.0.0.1:0"),
            *("--socket", str(path), "--shm", name, "--grpc", "127.0.0.1:0"),
        ),
        4,
    )
    kinds = [line.split()[1].partition(":")[0] for line in served.lines]
    assert kinds == ["http", "unix", "grpc", "shm"], served.lines
    assert all(line.startswith("ready: ") and line.endswith(" add") for line in served.lines)
    assert served.ask("GET", "/v2/health/ready") == (200, {"ready": True})
    status, told = served.ask("POST", "/v2/models/add/infer", question([1.0, 2.0, 3.0]))
    assert (status, told["outputs"][0]["data"]) == (200, [2.0, 3.0, 4.0])
    status, told = served.ask("POST", "/v2/models/add/infer", question([1.0, 2.0]))
    assert status == 400
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(20)
        client.connect(str(path))
        client.sendall(b"GET /v2/models/add HTTP/1.0\r\n\r\n")
        assert b'"name":"add"' in client.recv(65536)
    assert served.end() == 0
    assert not path.exists()


def test_nothing_heavy_is_imported(run: Callable[..., subprocess.Popen[str]], folder: Path) -> None:
    """60 MB are only kept without numpy, grpc, asyncio and onnxruntime's Python."""
    code = (
        "import sys; from shoal.agent import runtime; "
        "from shoal.agent.local import core, http_front, ring_front, serve; "
        "print({'numpy', 'grpc', 'google', 'asyncio', 'onnxruntime', 'ssl'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_models_are_loaded_and_taken_out(
    run: Callable[..., subprocess.Popen[str]], folder: Path
) -> None:
    """Clients may load what is in the allowed folder, and nothing else."""
    served = _Served(run("--http", "127.0.0.1:0", "--allow-load", str(folder)), 1)
    ask = "/v2/models/add/infer", question([1.0, 2.0, 3.0])
    assert served.ask("POST", *ask)[0] == 404
    assert served.ask("POST", "/v2/repository/models/add/load")[0] == 200
    assert served.ask("POST", *ask)[0] == 200
    assert served.ask("POST", "/v2/repository/models/..%2Fadd/load")[0] in (400, 404)
    assert served.ask("POST", "/v2/repository/models/nothing/load")[0] in (400, 404)
    assert served.ask("POST", "/v2/repository/models/add/unload")[0] == 200
    assert served.ask("POST", *ask)[0] in (404, 503)
    assert served.end() == 0


def test_a_thousand_clients(run: Callable[..., subprocess.Popen[str]], folder: Path) -> None:
    """All at once: each is served or refused, none waits; then the next one is served."""
    count = 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count + 200:
        pytest.skip(f"this system allows {hard} open files, {count + 200} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + 200), hard))
    served = _Served(run("--model", f"add={folder / 'add.onnx'}", "--http", "127.0.0.1:0"), 1)
    body = json.dumps(question([1.0, 2.0, 3.0])).encode()
    asked = (
        f"POST /v2/models/add/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    statuses: list[bytes] = []
    with contextlib.ExitStack() as opened:
        clients = [
            opened.enter_context(socket.create_connection(served.address, timeout=30))
            for _ in range(count)
        ]
        for client in clients:
            client.sendall(asked)
        for client in clients:
            statuses.append(client.recv(65536)[9:12])
    assert len(statuses) == count
    assert set(statuses) <= {b"200", b"503"}
    assert b"200" in statuses
    assert served.ask("GET", "/v2/health/live")[0] == 200
    assert served.end() == 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def slow_model() -> bytes:
    """Return a model that runs for as many rounds as it is told."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Sin", ["v"], ["w"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, [1000]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [1000]),
        ],
    )
    start = helper.make_tensor("start", TensorProto.FLOAT, [1000], [0.5] * 1000)
    loop = helper.make_node("Loop", ["rounds", "", "start"], ["y"], body=body)
    return models.model(
        [loop],
        [("rounds", TensorProto.INT64, [])],
        [("y", TensorProto.FLOAT, [1000])],
        [start],
    )


@contextlib.contextmanager
def asking(served: _Served, rounds: int) -> Iterator[socket.socket]:
    """Have the slow model run, for a client whose answer is yet to come."""
    given = {"name": "rounds", "datatype": "INT64", "shape": [], "data": [rounds]}
    body = json.dumps({"inputs": [given]}).encode()
    head = f"POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(served.address, timeout=30) as client:
        client.sendall(head.encode() + body)
        assert served.ask("GET", "/v2/health/ready")[0] == 200  # read later, so the other was read
        yield client


def test_sigterm_lets_a_running_request_end(
    run: Callable[..., subprocess.Popen[str]], folder: Path
) -> None:
    """Not ready and 503 to new ones at once; the one under way is answered; exit status 0."""
    (folder / "slow.onnx").write_bytes(slow_model())
    served = _Served(run("--model", f"slow={folder / 'slow.onnx'}", "--http", "127.0.0.1:0"), 1)
    with asking(served, 200_000) as client:
        served.process.send_signal(signal.SIGTERM)
        while (status := served.ask("GET", "/v2/health/ready")[0]) == 200:
            pass  # the signal is on its way
        assert status == 503
        assert served.ask("POST", "/v2/models/slow/infer", {"inputs": []})[0] in (400, 503)
        assert client.recv(65536)[9:12] == b"200"
    assert served.process.wait(30) == 0


def test_sigterm_ends_what_never_ends(
    run: Callable[..., subprocess.Popen[str]], folder: Path
) -> None:
    """A model that runs for ever keeps neither the process nor its client."""
    (folder / "slow.onnx").write_bytes(slow_model())
    served = _Served(
        run(
            *("--model", f"slow={folder / 'slow.onnx'}", "--http", "127.0.0.1:0"),
            before="serve.DRAIN_S = 0.2",
        ),
        1,
    )
    with asking(served, 1 << 60) as client:
        assert served.end() in (0, 1)
        assert client.recv(65536)[9:12] in (b"503", b"")


def test_sigterm_ends_a_load_that_never_ends(
    run: Callable[..., subprocess.Popen[str]], folder: Path
) -> None:
    """The process ends without it, and its status tells."""
    served = _Served(
        run(
            *("--model", f"add={folder / 'add.onnx'}", "--http", "127.0.0.1:0"),
            before="import time; from shoal.agent.local.core import LocalCore; serve.END_S = 0.2; "
            "LocalCore.start = lambda self: (print('loading', flush=True), time.sleep(60))",
        ),
        1,
    )
    assert served.lines == ["loading"]
    assert served.end() == 1


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--http", "127.0.0.1:0"], 2, "nothing to serve"),
        (
            ["--model", "m=/nowhere.onnx", "--shm", "x", "--shm-response-bytes", "65"],
            2,
            "response_bytes",
        ),
        (["--model", "m"], 2, "NAME=PATH"),
        (["--model", "m=/nowhere.onnx"], 2, "nobody could ask"),
        (["--model", "m=/nowhere.onnx", "--http", "127.0.0.1:0"], 1, "m"),
        (["--model", "../m=/nowhere.onnx", "--http", "127.0.0.1:0"], 2, "cannot be called"),
        (["--model", "m=a", "--model", "m=b", "--http", "127.0.0.1:0"], 2, "must differ"),
        (["--model", "m=a", "--http", "127.0.0.1:0", "--queue", "0"], 2, "queue_max"),
        (["--model", "m=a", "--http", "nowhere"], 1, "cannot listen"),
        (["--model", "m=a", "--shm", "s", "--socket-group", "g"], 2, "must come with socket"),
        (["--model", "m=a", "--socket", "s", "--socket-group", "a b"], 1, "no group"),
    ],
)
def test_wrong_command_lines(
    run: Callable[..., subprocess.Popen[str]], arguments: list[str], status: int, text: str
) -> None:
    """Each ends at once and says why."""
    process = run(*arguments)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert text in said
    assert "Traceback" not in said


def test_triton_client(run: Callable[..., subprocess.Popen[str]], folder: Path) -> None:
    """An unmodified ``tritonclient[http]`` gets all it asks."""
    python = os.environ.get("SHOAL_TRITON_PYTHON")
    if not python:
        pytest.skip("SHOAL_TRITON_PYTHON names no python that has tritonclient[http]")
    served = _Served(
        run(
            *("--model", f"echo={folder / 'echo.onnx'}", "--http", "127.0.0.1:0"),
            *("--model", f"texts={folder / 'texts.onnx'}"),
        ),
        1,
    )
    script = Path(__file__).with_name("triton_http_client.py")
    host, port = served.address
    done = subprocess.run(
        [python, str(script), f"{host}:{port}"], capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("kept:") == 9
    assert served.end() == 0
