"""Ask a server whatever ``tritonclient[http]`` can ask; the package is used as it is.

    python tests/agent/local/triton_http_client.py HOST:PORT

The server has the models "echo" (FP32 "x" of shape [-1, 2] to "y", the same) and "texts" (BYTES
"x" of shape [-1], likewise). Prints one line per promise kept, and ends with 1 at the first that is
not. Runs in an environment of its own, as ``triton_client.py`` does; nothing of shoal is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import tritonclient.http as triton  # type: ignore[import-not-found]
from tritonclient.utils import (  # type: ignore[import-not-found]
    InferenceServerException,
    shared_memory,
)

NUMBERS = np.array([[1.5, -2.0], [0.25, 4.0]], np.float32)
TEXTS = np.array([b"ab", b"", "ü".encode()], np.object_)


def tensor(value: Any, datatype: str = "FP32", *, binary: bool = True) -> Any:
    """Return the input with its elements."""
    made = triton.InferInput("x", list(value.shape), datatype)
    made.set_data_from_numpy(value, binary_data=binary)
    return made


def health(client: Any) -> None:
    """Liveness, readiness, metadata, configuration."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("echo")
    assert client.is_model_ready("echo", "1")
    assert not client.is_model_ready("nothing")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    told = client.get_model_metadata("echo")
    assert told["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}], told
    config = client.get_model_config("echo")
    assert config["input"][0]["data_type"] == "TYPE_FP32", config


def infer(client: Any) -> None:
    """Binary and JSON, in and out, numbers and strings; the id too."""
    for model, value, datatype in (("echo", NUMBERS, "FP32"), ("texts", TEXTS, "BYTES")):
        for given in (True, False):
            for wanted in (True, False):
                answer = client.infer(
                    model,
                    [tensor(value, datatype, binary=given)],
                    outputs=[triton.InferRequestedOutput("y", binary_data=wanted)],
                    request_id="7",
                )
                found = answer.as_numpy("y")
                if datatype == "BYTES":  # JSON has strings, binary has bytes
                    found = [e if isinstance(e, bytes) else e.encode() for e in found]
                assert np.array_equal(found, value), (model, given, wanted)
                assert answer.get_response()["id"] == "7"
        answer = client.infer(model, [tensor(value, datatype)])  # all outputs, as the client likes
        assert np.array_equal(answer.as_numpy("y"), value), model


def options(client: Any) -> None:
    """Priority, timeout, parameters, compression both ways, of small and large tensors."""
    for value in (NUMBERS, np.zeros((60_000, 2), np.float32)):
        ask = partial(client.infer, "echo", [tensor(value)])
        for how in (
            {"priority": 1}, {"timeout": 5_000_000}, {"model_version": "1"},
            {"request_compression_algorithm": "gzip"},
            {"request_compression_algorithm": "deflate"},
            {"response_compression_algorithm": "gzip"},
            {"response_compression_algorithm": "deflate"},
            {
                "request_compression_algorithm": "gzip",
                "response_compression_algorithm": "deflate",
            },
        ):  # fmt: skip
            assert np.array_equal(ask(**how).as_numpy("y"), value), how


def classes(client: Any) -> None:
    """The best class of the batch's rows."""
    wanted = [triton.InferRequestedOutput("y", class_count=1)]
    found = client.infer("echo", [tensor(NUMBERS)], outputs=wanted).as_numpy("y")
    assert found.ravel()[0].split(b":")[:2] in (
        [b"1.500000", b"0"],
        [b"4.000000", b"3"],  # where the first axis is no batch
    ), found


def concurrent(client: Any) -> None:
    """Asynchronous calls, all under way at once."""
    calls = [
        client.async_infer("echo", [tensor(np.full((1, 2), number, np.float32))])
        for number in range(20)
    ]
    got = [call.get_result(timeout=20).as_numpy("y")[0, 0] for call in calls]
    assert got == list(range(20))


def memory(client: Any) -> None:
    """Input and output in system shared memory; regions are told and taken out."""
    size = NUMBERS.nbytes
    client.unregister_system_shared_memory()
    region = shared_memory.create_shared_memory_region("io", "/shoal_triton_http", 2 * size)
    try:
        shared_memory.set_shared_memory_region(region, [NUMBERS])
        client.register_system_shared_memory("io", "/shoal_triton_http", 2 * size)
        [told] = client.get_system_shared_memory_status("io")
        assert (told["key"], told["byte_size"]) == ("/shoal_triton_http", 2 * size)
        given = triton.InferInput("x", [2, 2], "FP32")
        given.set_shared_memory("io", size)
        wanted = triton.InferRequestedOutput("y")
        wanted.set_shared_memory("io", size, size)
        answer = client.infer("echo", [given], outputs=[wanted])
        output = answer.get_output("y")
        assert output["parameters"]["shared_memory_region"] == "io"
        assert output["shape"] == [2, 2]
        found = shared_memory.get_contents_as_numpy(region, np.float32, [2, 2], size)
        assert np.array_equal(found, NUMBERS)
        client.unregister_system_shared_memory("io")
        assert client.get_system_shared_memory_status() == []
    finally:
        shared_memory.destroy_shared_memory_region(region)


def statistics(client: Any) -> None:
    """The calls above were counted."""
    [told] = client.get_inference_statistics("echo")["model_stats"]
    assert told["inference_stats"]["success"]["count"] >= 10, told
    assert len(client.get_inference_statistics()["model_stats"]) == 2


def repository(client: Any) -> None:
    """Unload, load, index; an unloaded model is not ready."""
    client.unload_model("echo")
    assert not client.is_model_ready("echo")
    client.load_model("echo")
    assert client.is_model_ready("echo")
    told = {each["name"]: each["state"] for each in client.get_model_repository_index()}
    assert told == {"echo": "READY", "texts": "READY"}, told


def errors(client: Any) -> None:
    """Errors carry a status and a text."""
    few = tensor(np.zeros((1, 2), np.float32))
    few.set_shape([3, 2])
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("404", lambda: client.infer("nothing", [tensor(NUMBERS)])),
        ("404", lambda: client.get_model_metadata("nothing")),
        ("400", lambda: client.infer("echo", [tensor(NUMBERS.astype(np.float64), "FP64")])),
        ("400", lambda: client.infer("echo", [few])),
        ("501", client.get_cuda_shared_memory_status),
        ("501", client.get_trace_settings),
        ("501", client.get_log_settings),
    ]
    for status, ask in cases:
        try:
            ask()
        except InferenceServerException as error:
            assert error.status() == status, (status, error)
            assert error.message()
        else:
            raise AssertionError(f"expected {status}")


def main(address: str) -> None:
    """Ask everything."""
    with triton.InferenceServerClient(address, concurrency=8) as client:
        for ask in (
            health, infer, options, classes, concurrent, memory, statistics, repository, errors,
        ):  # fmt: skip
            ask(client)
            print("kept:", ask.__name__, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
