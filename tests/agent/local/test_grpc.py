"""Stories: the gRPC face over real sockets, with a simulated core behind it.

The invariant under bad input, in one sentence: whatever bytes a client sends, it gets an answer or
a status that says why, and the next client is served.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import grpc
import pytest

from shoal.agent.errors import ModelClosedError, ModelInputError
from shoal.agent.local import grpc_codec as codec
from shoal.agent.local.errors import ListenError
from shoal.agent.local.grpc_front import HEALTH, SERVICE, UNSUPPORTED, GrpcFront
from shoal.agent.local.grpc_server import GrpcConfig
from shoal.proto import inference_pb2 as pb
from tests.agent.local.echo import DeadlineError, EchoCore, OverloadError

Code = grpc.StatusCode
KINDS: dict[str, tuple[Any, Any]] = {
    "ServerLive": (pb.Empty, pb.ServerLiveResponse),
    "ServerReady": (pb.Empty, pb.ServerReadyResponse),
    "ModelReady": (pb.ModelRequest, pb.ModelReadyResponse),
    "ServerMetadata": (pb.Empty, pb.ServerMetadataResponse),
    "ModelMetadata": (pb.ModelRequest, pb.ModelMetadataResponse),
    "ModelConfig": (pb.ModelRequest, pb.ModelConfigResponse),
    "ModelStatistics": (pb.ModelRequest, pb.ModelStatisticsResponse),
    "ModelInfer": (pb.ModelInferRequest, pb.ModelInferResponse),
    "RepositoryIndex": (pb.RepositoryIndexRequest, pb.RepositoryIndexResponse),
    "RepositoryModelLoad": (pb.RepositoryModelRequest, pb.RepositoryModelResponse),
    "RepositoryModelUnload": (pb.RepositoryModelRequest, pb.RepositoryModelResponse),
    "SystemSharedMemoryStatus": (pb.SharedMemoryRequest, pb.SharedMemoryStatusResponse),
    "SystemSharedMemoryRegister": (pb.SharedMemoryRegisterRequest, pb.Empty),
    "SystemSharedMemoryUnregister": (pb.SharedMemoryRequest, pb.Empty),
}


class _Wire:
    """A raw channel to a front, by method name."""

    def __init__(self, address: str, core: EchoCore) -> None:
        self.core = core
        self.address = address
        self.channel = grpc.insecure_channel(address, options=[("grpc.enable_retries", 0)])

    def raw(self, path: str, body: bytes = b"", **how: Any) -> bytes:
        answer: bytes = self.channel.unary_unary(path)(body, timeout=20, **how)
        return answer

    def call(self, name: str, /, **fields: Any) -> Any:
        kind, answer = KINDS[name]
        return answer.FromString(self.raw(SERVICE + name, kind(**fields).SerializeToString()))

    def infer(self, request: pb.ModelInferRequest, **how: Any) -> pb.ModelInferResponse:
        raw = self.raw(SERVICE + "ModelInfer", request.SerializeToString(), **how)
        return pb.ModelInferResponse.FromString(raw)

    def refusal(self, name: str, /, **fields: Any) -> tuple[grpc.StatusCode, str]:
        return status(lambda: self.call(name, **fields))


def status(act: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    """Return the status that a call ends with; it must not succeed."""
    with pytest.raises(grpc.RpcError) as caught:
        act()
    return caught.value.code(), caught.value.details() or ""


@pytest.fixture
def serve() -> Iterator[Callable[..., _Wire]]:
    """Start fronts as asked; each is stopped at the end, with what it still does."""
    opened: list[tuple[GrpcFront, _Wire]] = []

    def start(**limits: Any) -> _Wire:
        core = EchoCore()
        front = GrpcFront(core, GrpcConfig(**{"address": "127.0.0.1:0", **limits}))
        front.start()
        opened.append((front, _Wire(front.address, core)))
        return opened[-1][1]

    yield start
    for front, wire in opened:
        wire.core.hold.set()
        wire.channel.close()
        front.stop(0.0)
        wire.core.shm_unregister("")


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    """An object in system shared memory, of 64 bytes, as a client makes it."""
    made = SharedMemory(create=True, size=64)
    yield made
    made.close()
    made.unlink()


@pytest.fixture
def wire(serve: Callable[..., _Wire]) -> _Wire:
    """A front with the default limits."""
    return serve()


def question(*values: float, **fields: Any) -> pb.ModelInferRequest:
    """Return a request for "echo" with one raw FP32 input."""
    request = pb.ModelInferRequest(model_name="echo", **fields)
    request.inputs.add(name="x", datatype="FP32", shape=[len(values)])
    request.raw_input_contents.append(struct.pack(f"<{len(values)}f", *values))
    return request


# ---- health, metadata, repository, shared memory


def test_health_and_metadata(wire: _Wire) -> None:
    """The plain questions have the protocol's answers."""
    assert wire.call("ServerLive").live
    assert wire.call("ServerReady").ready
    assert wire.call("ModelReady", name="echo").ready
    assert list(wire.call("ServerMetadata").extensions) == ["statistics"]
    told = wire.call("ModelMetadata", name="echo", version="1")
    assert (told.name, list(told.versions), told.platform) == ("echo", ["1"], "echo")
    assert [(each.name, each.datatype, list(each.shape)) for each in told.inputs] == [
        ("x", "FP32", [-1, 2])
    ]


def test_config_lists_inputs_and_outputs(wire: _Wire) -> None:
    """Clients size their tensors by it; facts that gRPC has no field for do no harm."""
    config = wire.call("ModelConfig", name="echo").config
    assert (config.name, config.max_batch_size) == ("echo", 4)
    assert [(each.data_type, list(each.dims)) for each in config.input] == [(pb.TYPE_FP32, [2])]
    assert [(each.data_type, list(each.dims)) for each in config.output] == [(pb.TYPE_FP32, [2])]


def test_statistics(wire: _Wire) -> None:
    """Counts come through, and 64-bit times too; an empty name means every model."""
    wire.infer(question(1.0))
    for name in ("", "echo"):
        [told] = wire.call("ModelStatistics", name=name).model_stats
        assert (told.name, told.inference_count, told.last_inference) == ("echo", 1, 1 << 41)
        assert told.inference_stats.success.ns == 5


@pytest.mark.parametrize("field", ["model_name", "repository_name"])
def test_load_and_unload_of_triton_and_of_kserve(wire: _Wire, field: str) -> None:
    """Triton names the model in field 2, KServe in field 1."""
    gone = wire.call("RepositoryModelUnload", **{field: "echo"})
    assert (gone.model_name, gone.done) == ("echo", True)
    assert not wire.call("ModelReady", name="echo").ready
    assert not wire.call("ServerReady").ready
    assert not wire.call("RepositoryIndex", ready=True).models
    [listed] = wire.call("RepositoryIndex").models
    assert (listed.name, listed.version, listed.state) == ("echo", "1", "UNAVAILABLE")
    assert wire.call("RepositoryModelLoad", **{field: "echo"}).done
    assert wire.call("ModelReady", name="echo").ready


def test_shared_memory_regions(wire: _Wire, memory: SharedMemory) -> None:
    """Regions are registered, told, and taken out, singly and all."""
    key = f"/{memory.name}"
    wire.call("SystemSharedMemoryRegister", name="r", key=key, offset=8, byte_size=16)
    told = wire.call("SystemSharedMemoryStatus").regions["r"]
    assert (told.name, told.key, told.offset, told.byte_size) == ("r", key, 8, 16)
    assert not wire.call("SystemSharedMemoryStatus", name="other").regions
    wire.call("SystemSharedMemoryUnregister")
    assert not wire.call("SystemSharedMemoryStatus").regions


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_missing_says_so(wire: _Wire, name: str) -> None:
    """CUDA memory, tracing and log settings are not here; the text says which."""
    code, text = status(lambda: wire.raw(SERVICE + name))
    assert (code, text) == (Code.UNIMPLEMENTED, UNSUPPORTED[name])


def test_kubernetes_health_check(wire: _Wire) -> None:
    """Probes of kind gRPC call grpc.health.v1; 1 is SERVING, 2 is not."""
    assert wire.raw(HEALTH) == b"\x08\x01"
    assert wire.raw(HEALTH, b"\x0a\x04echo") == b"\x08\x01"
    wire.call("RepositoryModelUnload", model_name="echo")
    assert wire.raw(HEALTH) == b"\x08\x02"
    assert status(lambda: wire.raw(HEALTH, b"\x0a\x01?"))[0] is Code.NOT_FOUND


# ---- inference


def test_raw_infer_echoes_bytes_and_id(wire: _Wire) -> None:
    """The answer is raw, little-endian, with the request's id and the version that ran."""
    answer = wire.infer(question(1.5, -2.0, id="q-7"))
    assert (answer.model_name, answer.model_version, answer.id) == ("echo", "1", "q-7")
    assert [(each.name, each.datatype, list(each.shape)) for each in answer.outputs] == [
        ("x", "FP32", [2])
    ]
    assert list(answer.raw_output_contents) == [struct.pack("<2f", 1.5, -2.0)]


@pytest.mark.parametrize(
    ("datatype", "field", "values", "raw"),
    [
        ("BOOL", "bool_contents", [True, False], b"\x01\x00"),
        ("INT8", "int_contents", [-128, 127], b"\x80\x7f"),
        ("INT16", "int_contents", [-2], b"\xfe\xff"),
        ("INT32", "int_contents", [1 << 30], b"\x00\x00\x00\x40"),
        ("INT64", "int64_contents", [-1], b"\xff" * 8),
        ("UINT8", "uint_contents", [255, 0], b"\xff\x00"),
        ("UINT16", "uint_contents", [258], b"\x02\x01"),
        ("UINT32", "uint_contents", [1 << 31], b"\x00\x00\x00\x80"),
        ("UINT64", "uint64_contents", [1 << 63], b"\x00" * 7 + b"\x80"),
        ("FP32", "fp32_contents", [1.0], b"\x00\x00\x80\x3f"),
        ("FP64", "fp64_contents", [1.0], b"\x00" * 6 + b"\xf0\x3f"),
        ("BYTES", "bytes_contents", [b"ab", b""], b"\x02\0\0\0ab\0\0\0\0"),
    ],
)
def test_typed_contents(wire: _Wire, datatype: str, field: str, values: Any, raw: bytes) -> None:
    """Typed elements reach the core as the bytes they would be if sent raw."""
    request = pb.ModelInferRequest(model_name="echo")
    entry = request.inputs.add(name="x", datatype=datatype, shape=[len(values)])
    getattr(entry.contents, field).extend(values)
    assert list(wire.infer(request).raw_output_contents) == [raw]


def test_half_floats_travel_raw_only(wire: _Wire) -> None:
    """FP16 and BF16 have no typed field; raw they pass."""
    request = question(0.0)
    for datatype in ("FP16", "BF16"):
        request.inputs[0].datatype = datatype
        request.raw_input_contents[:] = [b"\x00\x3c"]
        assert list(wire.infer(request).raw_output_contents) == [b"\x00\x3c"]
        request.raw_input_contents[:] = []
        request.inputs[0].contents.fp32_contents[:] = [1.0]
        code, text = status(lambda: wire.infer(request))
        assert code is Code.INVALID_ARGUMENT
        assert "raw_input_contents" in text
        request.inputs[0].ClearField("contents")


def test_raw_and_typed_are_never_mixed(wire: _Wire) -> None:
    """Which of the two is the tensor would be a guess."""
    request = question(1.0)
    request.inputs[0].contents.fp32_contents.append(1.0)
    code, text = status(lambda: wire.infer(request))
    assert code is Code.INVALID_ARGUMENT
    assert text.startswith("contents field must not be specified for input 'x'")
    assert not wire.core.requests, "the model must not have been asked"


def test_one_raw_entry_for_each_input(wire: _Wire) -> None:
    """Too few or too many would shift one tensor into the next."""
    request = question(1.0)
    request.raw_input_contents.append(b"")
    code, text = status(lambda: wire.infer(request))
    assert code is Code.INVALID_ARGUMENT
    assert "unexpected number of raw input contents 2, expecting 1" in text


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [("INT8", "int_contents", [128]), ("UINT16", "uint_contents", [1 << 16]),
     ("FP32", "fp64_contents", [1.0]), ("COMPLEX", "fp32_contents", [1.0])],
)  # fmt: skip
def test_contents_that_are_not_the_datatype(
    wire: _Wire, datatype: str, field: str, values: Any
) -> None:
    """A value is never wrapped or cast; the error names the input."""
    request = pb.ModelInferRequest(model_name="echo")
    entry = request.inputs.add(name="x", datatype=datatype, shape=[1])
    getattr(entry.contents, field).extend(values)
    code, text = status(lambda: wire.infer(request))
    assert code is Code.INVALID_ARGUMENT
    assert "input 'x'" in text


def view(memory: SharedMemory) -> memoryview:
    """Return the bytes of an object that is open."""
    assert memory.buf is not None
    return memory.buf


def shared(parameters: Any, **values: Any) -> None:
    """Write parameters of shared memory into a map."""
    for name, value in values.items():
        kind = "string_param" if isinstance(value, str) else "int64_param"
        setattr(parameters[f"shared_memory_{name}"], kind, value)


def test_shared_memory_in_and_out(wire: _Wire, memory: SharedMemory) -> None:
    """An input in shared memory takes no raw entry; an output there has an empty one."""
    view(memory)[8:12] = b"data"
    wire.call("SystemSharedMemoryRegister", name="r", key=f"/{memory.name}", byte_size=64)
    request = pb.ModelInferRequest(model_name="echo")
    first = request.inputs.add(name="a", datatype="FP32", shape=[1])
    shared(first.parameters, region="r", offset=8, byte_size=4)
    request.inputs.add(name="b", datatype="UINT8", shape=[3])
    request.raw_input_contents.append(b"raw")
    shared(request.outputs.add(name="b").parameters, region="r", offset=32, byte_size=3)
    answer = wire.infer(request)
    assert list(answer.raw_output_contents) == [b"data", b""]
    assert codec.parameters(answer.outputs[1].parameters) == {
        "shared_memory_region": "r",
        "shared_memory_offset": 32,
        "shared_memory_byte_size": 3,
    }
    assert bytes(view(memory)[32:35]) == b"raw"


@pytest.mark.parametrize(
    "values",
    [{"region": "r"}, {"region": 7, "byte_size": 4}, {"region": "r", "byte_size": -1},
     {"region": "r", "byte_size": "4"}, {"region": "r", "byte_size": 4, "offset": -8}],
)  # fmt: skip
def test_bad_shared_memory_parameters(wire: _Wire, values: dict[str, Any]) -> None:
    """A region is never guessed: a negative offset would be someone else's memory."""
    request = pb.ModelInferRequest(model_name="echo")
    shared(request.inputs.add(name="x", datatype="FP32", shape=[1]).parameters, **values)
    code, text = status(lambda: wire.infer(request))
    assert code is Code.INVALID_ARGUMENT
    assert "shared_memory" in text


def test_parameters_reach_the_core(wire: _Wire) -> None:
    """Priority, timeout and classification are the core's to keep."""
    request = question(1.0)
    request.parameters["priority"].uint64_param = 2
    request.parameters["timeout"].int64_param = 1500
    request.parameters["note"].string_param = "n"
    request.parameters["flag"].bool_param = True
    request.parameters["share"].double_param = 0.5
    request.parameters["empty"].SetInParent()
    request.outputs.add(name="x").parameters["classification"].int64_param = 3
    wire.infer(request)
    [seen] = wire.core.requests
    assert seen.parameters == {
        "priority": 2, "timeout": 1500, "note": "n", "flag": True, "share": 0.5,
    }  # fmt: skip
    assert [(each.name, each.classes) for each in seen.outputs] == [("x", 3)]


def test_deadline_reaches_the_core(wire: _Wire) -> None:
    """The core may drop what nobody waits for: it is told the seconds that are left."""
    wire.infer(question(1.0))
    left_s = wire.core.left_s[0]
    assert left_s is not None
    assert 0.0 < left_s <= 20.0


# ---- errors


def test_an_unknown_model_is_not_ready(wire: _Wire) -> None:
    """Whether a model is ready is a question; Triton answers no and makes no error of it."""
    assert not wire.call("ModelReady", name="x").ready


@pytest.mark.parametrize("name", ["ModelInfer", "ModelMetadata", "ModelConfig"])
def test_unknown_model(wire: _Wire, name: str) -> None:
    """Status and text are Triton's: clients look for both."""
    field = "model_name" if name == "ModelInfer" else "name"
    assert wire.refusal(name, **{field: "x"}) == (
        Code.NOT_FOUND,
        "Request for unknown model: 'x' is not found",
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelInputError("got 3, expected 2"), Code.INVALID_ARGUMENT),
        (OverloadError("queue is full"), Code.UNAVAILABLE),
        (ModelClosedError("unloaded"), Code.UNAVAILABLE),
        (DeadlineError("Request timeout expired"), Code.UNAVAILABLE),
    ],
)
def test_status_of_an_error(wire: _Wire, error: Exception, code: grpc.StatusCode) -> None:
    """What the core raises is told with its text."""
    wire.core.error = error
    assert status(lambda: wire.infer(question(1.0))) == (code, str(error))


def test_an_error_that_is_not_ours_is_internal(
    wire: _Wire, caplog: pytest.LogCaptureFixture
) -> None:
    """Its text may hold anything, so it goes to the log and not to the client."""
    wire.core.error = RuntimeError("secret")
    with caplog.at_level(logging.ERROR):
        code, text = status(lambda: wire.infer(question(1.0)))
    assert code is Code.INTERNAL
    assert "secret" not in text
    assert "secret" in caplog.text
    wire.core.error = None
    assert wire.infer(question(1.0)).id == ""


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("body", [b"\xff", b"\x0a\x7f", b"\x2a\x7f\x0a", b"\0" * 9])
def test_malformed_message(wire: _Wire, name: str, body: bytes) -> None:
    """Bytes that are no message get a status, and the server lives."""
    code, text = status(lambda: wire.raw(SERVICE + name, body))
    assert code is Code.INVALID_ARGUMENT
    assert "message" in text
    assert wire.call("ServerLive").live


def test_every_cut_of_a_message_is_answered(wire: _Wire) -> None:
    """A message that ends early is a status or, where a cut is a message too, an answer."""
    whole = question(1.0, 2.0, id="i").SerializeToString()
    for size in range(len(whole)):
        try:
            wire.raw(SERVICE + "ModelInfer", whole[:size])
        except grpc.RpcError as error:
            assert error.code() in (Code.INVALID_ARGUMENT, Code.NOT_FOUND)
    assert wire.infer(question(1.0)).model_name == "echo"


@pytest.mark.parametrize(
    "junk",
    [
        b"GET /v2 HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64,
        bytes(4096),
        b"",
    ],
)
def test_junk_on_the_socket(wire: _Wire, junk: bytes) -> None:
    """What is not HTTP/2 is cut, and the next client is served."""
    host, port = wire.address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as peer:
        peer.sendall(junk)
        peer.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while peer.recv(4096):
                pass
    assert wire.infer(question(1.0)).model_name == "echo"


@pytest.mark.parametrize("error", [None, ModelInputError("no")])
def test_a_client_that_goes_away(
    serve: Callable[..., _Wire], caplog: pytest.LogCaptureFixture, error: Exception | None
) -> None:
    """Its call ends unheard: no noise in the log, and its thread serves the next client."""
    wire = serve(calls_max=1, streams_max=1)
    wire.core.hold.clear()
    wire.core.error = error
    method = wire.channel.unary_unary(SERVICE + "ModelInfer")
    gone = method.future(question(1.0).SerializeToString(), timeout=30)
    assert wire.core.running.acquire(timeout=30)
    gone.cancel()
    wire.core.hold.set()
    code = Code.UNAVAILABLE
    while code is Code.UNAVAILABLE:  # until the thread is free, a call is refused
        again = method.future(question(1.0).SerializeToString(), timeout=30)
        code = again.code()
    assert code is (Code.OK if error is None else Code.INVALID_ARGUMENT)
    assert len(wire.core.requests) == 2
    assert not caplog.records


def test_unknown_method(wire: _Wire) -> None:
    """A method that no version of the protocol has."""
    assert status(lambda: wire.raw(SERVICE + "Nothing"))[0] is Code.UNIMPLEMENTED


# ---- limits


@pytest.mark.parametrize("how", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compression(wire: _Wire, how: grpc.Compression) -> None:
    """Compressed requests are read."""
    values = [1.0] * 1000
    assert wire.infer(question(*values), compression=how).outputs[0].shape == [1000]


@pytest.mark.parametrize("how", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_message_bound(serve: Callable[..., _Wire], how: grpc.Compression) -> None:
    """The bound is on what a message becomes: a small gzip body must not fill the memory."""
    wire = serve(message_bytes_max=100_000)
    request = pb.ModelInferRequest(model_name="echo", raw_input_contents=[bytes(5_000_000)])
    assert status(lambda: wire.infer(request, compression=how))[0] is Code.RESOURCE_EXHAUSTED
    assert wire.infer(question(1.0)).model_name == "echo"


def test_a_crowd_is_refused_at_once(serve: Callable[..., _Wire]) -> None:
    """Beyond the limit a call is UNAVAILABLE now, not when a thread is free; health still answers.

    1,000 calls come while every thread is held by a slow model: none waits, and none is lost.
    """
    wire = serve(calls_max=4, streams_max=1, refusals_max=2000)
    wire.core.hold.clear()
    body = question(1.0).SerializeToString()
    method = wire.channel.unary_unary(SERVICE + "ModelInfer")
    held = [method.future(body, timeout=60) for _ in range(4)]
    for _ in held:
        assert wire.core.running.acquire(timeout=30)
    crowd = [method.future(body, timeout=60) for _ in range(1000)]
    assert {future.code() for future in crowd} == {Code.UNAVAILABLE}
    assert wire.call("ServerLive").live
    assert wire.raw(HEALTH) == b"\x08\x01"
    assert not any(future.done() for future in held)
    wire.core.hold.set()
    assert {future.code() for future in held} == {Code.OK}
    assert wire.infer(question(1.0)).model_name == "echo"


def test_streams_leave_threads_for_calls(serve: Callable[..., _Wire]) -> None:
    """An open stream holds a thread for as long as its client likes; there is a limit for it."""
    wire = serve(calls_max=4, streams_max=1)
    release = threading.Event()

    def slowly() -> Iterator[bytes]:
        yield question(1.0).SerializeToString()
        release.wait(30)

    method = wire.channel.stream_stream(SERVICE + "ModelStreamInfer")
    stream = method(slowly(), timeout=30)
    assert pb.ModelStreamInferResponse.FromString(next(stream)).infer_response.outputs
    assert status(lambda: next(method(iter([b""]), timeout=30)))[0] is Code.UNAVAILABLE
    assert wire.infer(question(1.0)).model_name == "echo"
    release.set()
    assert list(stream) == []


def test_stream_answers_in_order_and_survives_errors(wire: _Wire) -> None:
    """An error is an answer with the id of its request; the stream goes on after it."""
    unknown = pb.ModelInferRequest(model_name="x", id="2")
    bodies = [question(1.0, id="1"), unknown, question(3.0, id="3")]
    sent = [each.SerializeToString() for each in bodies]
    sent.insert(2, b"\xff")
    method = wire.channel.stream_stream(SERVICE + "ModelStreamInfer")
    got = [pb.ModelStreamInferResponse.FromString(each) for each in method(iter(sent), timeout=20)]
    assert [each.infer_response.id for each in got] == ["1", "2", "", "3"]
    assert [bool(each.error_message) for each in got] == [False, True, True, False]
    assert got[1].error_message == "Request for unknown model: 'x' is not found"
    assert got[3].infer_response.parameters["triton_final_response"].bool_param


# ---- life


def test_unix_socket(serve: Callable[..., _Wire], tmp_path: Path) -> None:
    """A face that no other machine can reach."""
    wire = serve(address=f"unix:{tmp_path}/s")
    assert wire.address == f"unix:{tmp_path}/s"
    assert wire.infer(question(1.0)).model_name == "echo"


@pytest.mark.parametrize("address", ["taken", "nonsense", "unix:/no/such/folder/s"])
def test_address_that_cannot_be_listened_on(wire: _Wire, address: str) -> None:
    """A second server must not share the port in silence."""
    where = wire.address if address == "taken" else address
    with pytest.raises(ListenError, match="nothing was started"):
        GrpcFront(EchoCore(), GrpcConfig(address=where))
    assert wire.call("ServerLive").live


def test_stop_lets_calls_end(wire: _Wire) -> None:
    """A drain gives what is under way its answer, and refuses what comes."""
    core = EchoCore()
    front = GrpcFront(core, GrpcConfig(address="127.0.0.1:0"))
    front.start()
    other = _Wire(front.address, core)
    core.hold.clear()
    held = other.channel.unary_unary(SERVICE + "ModelInfer").future(
        question(1.0).SerializeToString(), timeout=30
    )
    assert core.running.acquire(timeout=30)
    stopping = threading.Thread(target=front.stop, args=(30.0,))
    stopping.start()
    code = None
    while code is not Code.UNAVAILABLE:  # until the stop has begun, calls are still taken
        try:
            other.call("ServerLive")
        except grpc.RpcError as error:
            code = error.code()
    core.hold.set()
    assert held.code() is Code.OK
    stopping.join(30)
    assert not stopping.is_alive()
    other.channel.close()


def test_stop_cuts_what_does_not_end() -> None:
    """The drain is bounded: a client that never reads its answer does not keep the process."""
    core = EchoCore()
    front = GrpcFront(core, GrpcConfig(address="127.0.0.1:0"))
    front.start()
    wire = _Wire(front.address, core)
    opened = threading.Event()

    def forever() -> Iterator[bytes]:
        yield question(1.0).SerializeToString()
        opened.wait(30)

    stream = wire.channel.stream_stream(SERVICE + "ModelStreamInfer")(forever(), timeout=60)
    next(stream)
    front.stop(0.05)
    assert status(lambda: next(stream))[0] in (Code.CANCELLED, Code.UNAVAILABLE)
    opened.set()
    wire.channel.close()


@pytest.mark.parametrize(
    "limits",
    [{"calls_max": 0}, {"streams_max": 65}, {"message_bytes_max": 0}, {"keepalive_s": 0.0}],
)
def test_limits_are_checked(limits: dict[str, Any]) -> None:
    """A limit that cannot be kept is refused before anything listens."""
    with pytest.raises(ValueError, match="must"):
        GrpcConfig(**limits)


# ---- the foreign client itself

TRITON = os.environ.get("SHOAL_TRITON_PYTHON", sys.executable)
"""An interpreter that has tritonclient[grpc]; it wants an older protobuf than shoal does."""
HAS_TRITON = not subprocess.run(
    [TRITON, "-c", "import tritonclient.grpc"], capture_output=True, check=False
).returncode


@pytest.mark.skipif(
    not HAS_TRITON,
    reason="tritonclient[grpc] is not installed; give SHOAL_TRITON_PYTHON an interpreter that has "
    "it: that unmodified Triton clients work was NOT tested",
)
def test_unmodified_triton_client(wire: _Wire) -> None:
    """Everything that ``tritonclient.grpc`` can ask works, from a process without shoal."""
    script = Path(__file__).parent / "triton_client.py"
    done = subprocess.run(
        [TRITON, str(script), wire.address],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("kept:") == 10
