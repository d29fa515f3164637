"""Ask a server whatever ``tritonclient[grpc]`` can ask; the package is used as it is.

    python tests/agent/local/triton_client.py HOST:PORT

The server has one model, "echo": its outputs are its inputs. Prints one line per promise kept, and
ends with 1 at the first that is not. Runs in an environment of its own, because tritonclient wants
an older protobuf than shoal; so nothing of shoal is imported here.
"""

from __future__ import annotations

import queue
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import tritonclient.grpc as triton  # type: ignore[import-not-found]
from tritonclient.utils import (  # type: ignore[import-not-found]
    InferenceServerException,
    shared_memory,
)

NUMBERS = np.array([[1.5, -2.0], [0.25, 4.0]], np.float32)
ARRAYS: dict[str, Any] = {
    "BOOL": np.array([True, False]),
    "INT8": np.array([-128, 127], np.int8),
    "INT64": np.array([-(2**63), 2**63 - 1], np.int64),
    "UINT16": np.array([0, 65535], np.uint16),
    "FP16": np.array([0.5, -2.0], np.float16),
    "FP32": NUMBERS,
    "FP64": np.array([[0.1]], np.float64),
    "BYTES": np.array([b"ab", b"", "ü".encode()], np.object_),
}


def tensor(name: str, value: Any, datatype: str = "FP32") -> Any:
    """Return an input with its elements."""
    made = triton.InferInput(name, list(value.shape), datatype)
    made.set_data_from_numpy(value)
    return made


def health(client: Any) -> None:
    """Liveness, readiness, metadata, configuration."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("echo")
    assert client.is_model_ready("echo", "1")
    assert client.get_server_metadata().extensions
    told = client.get_model_metadata("echo")
    assert [each.name for each in told.inputs] == ["x"], told
    assert client.get_model_config("echo").config.input[0].data_type == 11, "TYPE_FP32"
    assert client.get_model_config("echo", as_json=True)["config"]["name"] == "echo"


def infer(client: Any) -> None:
    """Every datatype comes back as it went; the id too."""
    for datatype, value in ARRAYS.items():
        answer = client.infer("echo", [tensor("x", value, datatype)], request_id="7")
        assert answer.get_response().id == "7"
        assert np.array_equal(answer.as_numpy("x"), value), datatype


def typed(client: Any) -> None:
    """Typed contents, which the client's own stubs can send."""
    request = triton.service_pb2.ModelInferRequest(model_name="echo")
    entry = request.inputs.add(name="x", datatype="FP32", shape=[2, 2])
    entry.contents.fp32_contents.extend(NUMBERS.ravel().tolist())
    answer = client._client_stub.ModelInfer(request)
    assert np.array_equal(triton.InferResult(answer).as_numpy("x"), NUMBERS)


def options(client: Any) -> None:
    """Priority, timeouts, parameters, chosen outputs, compression both ways."""
    ask = partial(client.infer, "echo", [tensor("x", NUMBERS)])
    wanted = [triton.InferRequestedOutput("x")]
    for how in (
        {"priority": 1}, {"timeout": 5_000_000}, {"client_timeout": 5.0}, {"outputs": wanted},
        {"parameters": {"note": "n", "share": 1}}, {"compression_algorithm": "gzip"},
        {"compression_algorithm": "deflate"}, {"model_version": "1"},
    ):  # fmt: skip
        assert np.array_equal(ask(**how).as_numpy("x"), NUMBERS), how


def concurrent(client: Any) -> None:
    """Asynchronous calls, all under way at once."""
    done: queue.Queue[Any] = queue.Queue()
    for number in range(20):
        value = np.full((1, 2), number, np.float32)
        client.async_infer(
            "echo", [tensor("x", value)], callback=lambda result, error: done.put((result, error))
        )
    got = [done.get(timeout=20) for _ in range(20)]
    assert not [error for _, error in got if error]
    assert sorted(result.as_numpy("x")[0, 0] for result, _ in got) == list(range(20))


def stream(client: Any) -> None:
    """Answers come in order, an error between them; the stream goes on."""
    done: queue.Queue[Any] = queue.Queue()
    client.start_stream(callback=lambda result, error: done.put((result, error)))
    for number, model in enumerate(("echo", "nothing", "echo")):
        value = np.full((1, 2), number, np.float32)
        client.async_stream_infer(model, [tensor("x", value)], request_id=str(number))
    got = [done.get(timeout=20) for _ in range(3)]
    client.stop_stream()
    assert [error is None for _, error in got] == [True, False, True], got
    assert "unknown model" in str(got[1][1])
    assert [got[each][0].as_numpy("x")[0, 0] for each in (0, 2)] == [0.0, 2.0]


def memory(client: Any) -> None:
    """Input and output in system shared memory; regions are told and taken out."""
    size = NUMBERS.nbytes
    client.unregister_system_shared_memory()
    region = shared_memory.create_shared_memory_region("io", "/shoal_triton_test", 2 * size)
    try:
        shared_memory.set_shared_memory_region(region, [NUMBERS])
        client.register_system_shared_memory("io", "/shoal_triton_test", 2 * size)
        told = client.get_system_shared_memory_status().regions["io"]
        assert (told.key, told.byte_size) == ("/shoal_triton_test", 2 * size)
        given = triton.InferInput("x", [2, 2], "FP32")
        given.set_shared_memory("io", size)
        wanted = triton.InferRequestedOutput("x")
        wanted.set_shared_memory("io", size, size)
        answer = client.infer("echo", [given], outputs=[wanted])
        output = answer.get_output("x")
        assert output.parameters["shared_memory_region"].string_param == "io"
        found = shared_memory.get_contents_as_numpy(region, np.float32, [2, 2], size)
        assert np.array_equal(found, NUMBERS)
        client.unregister_system_shared_memory("io")
        assert not client.get_system_shared_memory_status().regions
    finally:
        shared_memory.destroy_shared_memory_region(region)


def statistics(client: Any) -> None:
    """Every call above was counted."""
    [told] = client.get_inference_statistics("echo").model_stats
    assert told.inference_count >= len(ARRAYS)
    assert told.inference_stats.success.count >= len(ARRAYS)


def repository(client: Any) -> None:
    """Unload, load, index; an unloaded model is not ready."""
    client.unload_model("echo")
    assert not client.is_model_ready("echo")
    client.load_model("echo")
    assert client.is_model_ready("echo")
    [told] = client.get_model_repository_index().models
    assert (told.name, told.state) == ("echo", "READY")


def errors(client: Any) -> None:
    """Errors carry Triton's status and text."""
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("StatusCode.NOT_FOUND", lambda: client.infer("nothing", [tensor("x", NUMBERS)])),
        ("StatusCode.NOT_FOUND", lambda: client.get_model_metadata("nothing")),
        ("StatusCode.UNIMPLEMENTED", client.get_cuda_shared_memory_status),
        ("StatusCode.UNIMPLEMENTED", client.get_trace_settings),
        ("StatusCode.UNIMPLEMENTED", client.get_log_settings),
    ]
    for status, ask in cases:
        try:
            ask()
        except InferenceServerException as error:
            assert error.status() == status, error
        else:
            raise AssertionError(f"expected {status}")


def main(address: str) -> None:
    """Ask everything."""
    with triton.InferenceServerClient(address) as client:
        for ask in (
            health, infer, typed, options, concurrent, stream, memory, statistics, repository,
            errors,
        ):  # fmt: skip
            ask(client)
            print("kept:", ask.__name__, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
