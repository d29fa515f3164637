"""The local API: round trips from another process, against MLServer in the same run.

    python bench/local_api.py [--json FILE] [--calls 3000] [--mlserver PYTHON]

Both serve the same ONNX model (256 float32 in: 1 KB; one session, one thread). Calls of all ways
take turns in short rounds. PYTHON has mlserver and onnxruntime: `make .venv-mlserver` makes one.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import _models as models
import grpc
import numpy as np

from shoal.agent.client import Client
from shoal.proto import inference_pb2 as pb

ROOT = Path(__file__).parent.parent
METHOD = "/inference.GRPCInferenceService/ModelInfer"
ROUNDS = 15
X = np.random.default_rng(0).normal(size=(1, 256)).astype(np.float32)


def port() -> int:
    """Return a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


def rss_mib(pid: int) -> float:
    """Return a process's resident memory, with its children's, MiB."""
    pids = [pid]
    for each in pids:
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            pids += [int(word) for word in task.read_text().split()]
    page = os.sysconf("SC_PAGESIZE")
    return sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) * page for p in pids) / 2**20


@contextmanager
def process(
    command: list[str], *, ready: Callable[[], bool], env: dict[str, str] | None = None
) -> Iterator[tuple[int, float]]:
    """Run a server; give its process id and how long it took to be ready, seconds."""
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
    ) as running:
        try:
            while not ready():
                if running.poll() is not None or time.perf_counter() - start > 60:
                    raise RuntimeError(f"{command[0]} did not get ready")
                time.sleep(0.01)
            yield running.pid, time.perf_counter() - start
        finally:
            running.send_signal(signal.SIGTERM)
            try:
                running.wait(15)
            except subprocess.TimeoutExpired:
                running.kill()


def answers(number: int, model: str) -> Callable[[], bool]:
    """Return a function that says whether the model is ready on an HTTP port."""

    def ready() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", number, timeout=5)
        try:
            connection.request("GET", f"/v2/models/{model}/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    return ready


def http_json(number: int, model: str) -> Callable[[], object]:
    """Return a call over HTTP with JSON numbers, on one kept connection."""
    connection = http.client.HTTPConnection("127.0.0.1", number)
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 256], "data": X[0].tolist()}
    body = json.dumps({"inputs": [entry]})
    headers = {"Content-Type": "application/json"}

    def call() -> object:
        connection.request("POST", f"/v2/models/{model}/infer", body, headers)
        return json.loads(connection.getresponse().read())["outputs"][0]["data"]

    return call


def over_grpc(target: str, model: str) -> Callable[[], object]:
    """Return a call over gRPC with raw contents."""
    channel = grpc.insecure_channel(target)
    infer = channel.unary_unary(
        METHOD,
        request_serializer=pb.ModelInferRequest.SerializeToString,
        response_deserializer=pb.ModelInferResponse.FromString,
    )
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype="FP32", shape=[1, 256])
    request.raw_input_contents.append(X.tobytes())

    def call() -> object:
        return infer(request)

    return call


def through(client: Client, model: str) -> Callable[[], object]:
    """Return a call through shoal's own client."""
    return lambda: client.infer(model, {"x": X})


def asked_version(python: Path) -> str:
    """Return the version of the MLServer of an environment."""
    code = "from importlib.metadata import version; print(version('mlserver'))"
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def measure(calls: dict[str, Callable[[], object]], count: int) -> dict[str, dict[str, float]]:
    """Return p50 and p99 of each way, microseconds."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(50):
            call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            for _ in range(max(1, count // ROUNDS)):
                start = time.perf_counter()
                call()
                took[name].append((time.perf_counter() - start) * 1e6)
    return {
        name: {"p50_us": statistics.median(each), "p99_us": statistics.quantiles(each, n=100)[98]}
        for name, each in took.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--mlserver", type=Path, default=ROOT / ".venv-mlserver/bin/python")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = folder / "m.onnx"
        model.write_bytes(models.mlp(256, 64, 8))
        ring, sock = f"shoal-bench-{os.getpid()}", folder / "s"
        numbers = [port(), port()]
        pid, ready_s = stack.enter_context(
            process(
                [
                    sys.executable, "-m", "shoal.agent.main", "serve", "--model", f"m={model}",
                    "--http", f"127.0.0.1:{numbers[0]}", "--grpc", f"127.0.0.1:{numbers[1]}",
                    "--socket", str(sock), "--shm", ring,
                ],
                ready=answers(numbers[0], "m"),
            )
        )  # fmt: skip
        time.sleep(0.5)
        start_mib = rss_mib(pid)
        # Alone, before gRPC's threads are in this process: a ring's two ends spin for each other.
        found = measure(
            {"shm ring": through(stack.enter_context(Client(ring)), "m")}, arguments.calls
        )
        calls = {
            "HTTP unix, binary": through(stack.enter_context(Client(f"unix:{sock}")), "m"),
            "HTTP TCP, binary": through(
                stack.enter_context(Client(f"http://127.0.0.1:{numbers[0]}")), "m"
            ),
            "HTTP TCP, JSON": http_json(numbers[0], "m"),
            "gRPC TCP": over_grpc(f"127.0.0.1:{numbers[1]}", "m"),
        }
        peer: dict[str, Any] = {}
        if arguments.mlserver.exists():
            ports = [port(), port(), port()]
            served = folder / "peer"
            served.mkdir()
            settings = {
                "http_port": ports[0], "grpc_port": ports[1], "metrics_port": ports[2],
                "host": "127.0.0.1", "parallel_workers": 0, "debug": False,
            }  # fmt: skip
            (served / "settings.json").write_text(json.dumps(settings))
            entry = {
                "name": "m", "implementation": "_mlserver_runtime.OnnxRuntime",
                "parameters": {"uri": str(model)},
            }  # fmt: skip
            (served / "model-settings.json").write_text(json.dumps(entry))
            peer_pid, peer_s = stack.enter_context(
                process(
                    [str(arguments.mlserver), "-m", "mlserver.cli.main", "start", str(served)],
                    ready=answers(ports[0], "m"),
                    env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
                )
            )
            calls["MLServer HTTP TCP, JSON"] = http_json(ports[0], "m")
            calls["MLServer gRPC TCP"] = over_grpc(f"127.0.0.1:{ports[1]}", "m")
            peer = {"ready_s": peer_s, "rss_mib": rss_mib(peer_pid)}
            peer["version"] = asked_version(arguments.mlserver)
        else:
            peer = {"skipped": f"{arguments.mlserver} is not there (make .venv-mlserver)"}
            print(f"NO PEER: {peer['skipped']}")
        found |= measure(calls, arguments.calls)
        end_mib = rss_mib(pid)
        machine = {
            "machine": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()[0],
            "python": platform.python_version(), "onnxruntime": version("onnxruntime"),
            "grpcio": version("grpcio"),
        }  # fmt: skip
        print(", ".join(f"{name} {value}" for name, value in machine.items()))
        print("1 KB in, one client process")
        print(f"{'way':26}{'p50 us':>9}{'p99 us':>9}  ratio to MLServer")
        for name, row in found.items():
            like = f"MLServer {name}"
            other = found[like]["p50_us"] / row["p50_us"] if like in found else None
            ratio = f"x{other:.2f} faster" if other else ""
            print(f"{name:26}{row['p50_us']:>9.1f}{row['p99_us']:>9.1f}  {ratio}")
        print(
            f"shoal-agent serve: ready in {ready_s:.2f} s, RSS {start_mib:.1f} MiB, "
            f"{end_mib:.1f} after {len(found)} x {arguments.calls} calls (gRPC on)"
        )
        if "ready_s" in peer:
            name = f"MLServer {peer['version']}"
            print(f"{name}: ready in {peer['ready_s']:.2f} s, RSS {peer['rss_mib']:.1f} MiB")
        if arguments.json:
            ours = {"ready_s": ready_s, "rss_mib": start_mib, "rss_end_mib": end_mib}
            everything = {"machine": machine, "ways": found, "shoal": ours, "mlserver": peer}
            arguments.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
