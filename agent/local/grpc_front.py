"""Speak the Open Inference Protocol v2 over gRPC, so that unmodified Triton clients work.

    bytes --grpc_codec--> InferRequest --> Core.infer --> InferResponse --grpc_codec--> bytes

``_UNARY`` below is the whole service, with ``ModelStreamInfer``. Models, queues, deadlines and
shared memory are the core's; threads and the limit of calls are ``grpc_server.py``'s. What the core
raises becomes a status by ``STATUS``, by its code; any other error is INTERNAL, is logged, and the
server lives.

Source: kserve/open-inference-protocol; Triton's extension documents; gRPC's health checking.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Protocol

import grpc

from ... import ShoalError
from ...proto import inference_pb2 as pb
from . import grpc_codec as codec
from .facts import Facts
from .grpc_server import GrpcConfig, GrpcServer, Method
from .oip import InferRequest, InferResponse

_log = logging.getLogger(__name__)

SERVICE: Final = "/inference.GRPCInferenceService/"
HEALTH: Final = "/grpc.health.v1.Health/Check"

STATUS: Final[Mapping[str, grpc.StatusCode]] = {
    "agent.local.model.unknown": grpc.StatusCode.NOT_FOUND,
    "agent.local.request": grpc.StatusCode.INVALID_ARGUMENT,
    "agent.model.input": grpc.StatusCode.INVALID_ARGUMENT,
    "agent.local.overload": grpc.StatusCode.UNAVAILABLE,
    "agent.model.closed": grpc.StatusCode.UNAVAILABLE,
    "agent.local.deadline": grpc.StatusCode.UNAVAILABLE,  # as Triton's queue policy says it
}
_UNKNOWN: Final = "agent.local.model.unknown"

UNSUPPORTED: Final = {
    "CudaSharedMemoryStatus": "CUDA shared memory is not supported; use system shared memory",
    "CudaSharedMemoryRegister": "CUDA shared memory is not supported; use system shared memory",
    "CudaSharedMemoryUnregister": "CUDA shared memory is not supported; use system shared memory",
    "TraceSetting": "tracing is not supported by this server",
    "LogSettings": "log settings cannot be changed over the network",
}


class Core(Facts, Protocol):
    """What this face needs of the local core."""

    def infer(self, request: InferRequest, *, left_s: float | None) -> InferResponse:
        """Run a model; blocks until it has run, is refused, or ``left_s`` seconds are over."""


class GrpcFront:
    """The gRPC face of a core. States: new -> serving -> stopped; each once.

    Args:
        core: Answers the calls, from many threads at once.
        config: Where to listen, and the limits.

    Raises:
        ListenError: The address is taken, or is none; nothing was started.
    """

    def __init__(self, core: Core, config: GrpcConfig) -> None:
        self._core = core
        self._server = GrpcServer(self._methods(), config)
        self.address = self._server.address
        """What a client dials: ``HOST:PORT`` with the port that was chosen, or ``unix:PATH``."""

    def start(self) -> None:
        """Take calls from now on."""
        self._server.start()

    def stop(self, drain_s: float) -> None:
        """Refuse new calls, let those under way end for ``drain_s`` seconds, then cut them."""
        self._server.stop(drain_s)

    def _methods(self) -> dict[str, Method]:
        core = self._core

        def repository(
            act: Callable[[pb.RepositoryModelRequest, str], None],
        ) -> Callable[[pb.RepositoryModelRequest], pb.RepositoryModelResponse]:
            def run(request: pb.RepositoryModelRequest) -> pb.RepositoryModelResponse:
                # KServe has no repository and puts the model where Triton has one.
                name = request.model_name or request.repository_name
                act(request, name)
                return pb.RepositoryModelResponse(model_name=name, done=True)

            return run

        def ready(request: pb.ModelRequest) -> pb.ModelReadyResponse:
            try:
                return pb.ModelReadyResponse(ready=core.model_ready(request.name, request.version))
            except ShoalError as error:
                if error.code != _UNKNOWN:
                    raise
                return pb.ModelReadyResponse(ready=False)  # as Triton: a question, not a mistake

        def register(request: pb.SharedMemoryRegisterRequest) -> pb.Empty:
            core.shm_register(request.name, request.key, request.offset, request.byte_size)
            return pb.Empty()

        def unregister(request: pb.SharedMemoryRequest) -> pb.Empty:
            core.shm_unregister(request.name)
            return pb.Empty()

        unary: dict[str, tuple[type[Any], Callable[[Any], Any]]] = {
            "ServerLive": (pb.Empty, lambda _: pb.ServerLiveResponse(live=core.live())),
            "ServerReady": (pb.Empty, lambda _: pb.ServerReadyResponse(ready=core.ready())),
            "ModelReady": (pb.ModelRequest, ready),
            "ServerMetadata": (
                pb.Empty,
                lambda _: codec.filled(pb.ServerMetadataResponse, core.server_metadata()),
            ),
            "ModelMetadata": (
                pb.ModelRequest,
                lambda r: codec.filled(
                    pb.ModelMetadataResponse, core.model_metadata(r.name, r.version)
                ),
            ),
            "ModelConfig": (
                pb.ModelRequest,
                lambda r: codec.filled(
                    pb.ModelConfigResponse, {"config": core.model_config(r.name, r.version)}
                ),
            ),
            "ModelStatistics": (
                pb.ModelRequest,
                lambda r: codec.filled(
                    pb.ModelStatisticsResponse, core.statistics(r.name, r.version)
                ),
            ),
            "RepositoryIndex": (
                pb.RepositoryIndexRequest,
                lambda r: codec.filled(
                    pb.RepositoryIndexResponse, {"models": core.repository_index(ready=r.ready)}
                ),
            ),
            "RepositoryModelLoad": (
                pb.RepositoryModelRequest,
                repository(lambda r, name: core.load(name, codec.parameters(r.parameters))),
            ),
            "RepositoryModelUnload": (
                pb.RepositoryModelRequest,
                repository(lambda _, name: core.unload(name)),
            ),
            "SystemSharedMemoryStatus": (
                pb.SharedMemoryRequest,
                lambda r: codec.filled(
                    pb.SharedMemoryStatusResponse, {"regions": core.shm_status(r.name)}
                ),
            ),
            "SystemSharedMemoryRegister": (pb.SharedMemoryRegisterRequest, register),
            "SystemSharedMemoryUnregister": (pb.SharedMemoryRequest, unregister),
        }
        health = {"ServerLive", "ServerReady"}
        found = {
            SERVICE + name: Method(_answers(kind, run), health=name in health)
            for name, (kind, run) in unary.items()
        }
        found |= {SERVICE + name: Method(_unsupported(why)) for name, why in UNSUPPORTED.items()}
        found[SERVICE + "ModelInfer"] = Method(self._infer)
        found[SERVICE + "ModelStreamInfer"] = Method(self._stream, stream=True)
        found[HEALTH] = Method(_answers(pb.HealthCheckRequest, self._check), health=True)
        return found

    def _check(self, request: pb.HealthCheckRequest) -> pb.HealthCheckResponse:
        # An unknown service is NOT_FOUND by the health protocol; model_ready raises just that.
        name = request.service
        if name in ("", SERVICE.strip("/")):
            serving = self._core.ready()
        else:
            serving = self._core.model_ready(name, "")
        status = pb.HealthCheckResponse.Status
        return pb.HealthCheckResponse(
            status=status.STATUS_SERVING if serving else status.STATUS_NOT_SERVING
        )

    def _infer(self, raw: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            request = codec.parse(pb.ModelInferRequest, raw)
            return self._run(request, context).SerializeToString()
        except Exception as exc:
            context.abort(*_status(exc))
            raise  # abort has raised; this is for the reader

    def _stream(self, incoming: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Answer in order; an error is an answer too, and the stream goes on."""
        for raw in incoming:
            answer = pb.ModelStreamInferResponse()
            try:
                request = codec.parse(pb.ModelInferRequest, raw)
                answer.infer_response.id = request.id  # tells the client which request failed
                answer.infer_response.CopyFrom(self._run(request, context))
                answer.infer_response.parameters["triton_final_response"].bool_param = True
            except Exception as exc:
                answer.error_message = _status(exc)[1]
            yield answer.SerializeToString()

    def _run(
        self, request: pb.ModelInferRequest, context: grpc.ServicerContext
    ) -> pb.ModelInferResponse:
        response = self._core.infer(codec.infer_request(request), left_s=context.time_remaining())
        return codec.infer_response(response, request.id)


def _answers(kind: type[Any], run: Callable[[Any], Any]) -> Callable[..., bytes]:
    """Wrap a method on messages as one on bytes.

    Bytes are parsed here and not by grpc, which would do it on its one serving thread and answer
    what it cannot parse without saying so.
    """

    def method(raw: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            answer: bytes = run(codec.parse(kind, raw)).SerializeToString()
        except Exception as exc:
            context.abort(*_status(exc))
            raise  # abort has raised; this is for the reader
        return answer

    return method


def _unsupported(why: str) -> Callable[..., bytes]:
    def method(_: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, why)
        raise AssertionError("abort raises")

    return method


def _status(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Return status and text of an error; one that is not ours is logged and told as internal."""
    if not isinstance(error, ShoalError):
        _log.error("a gRPC method failed", exc_info=error)
        return grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}; see the log"
    text = f"{error}; {error.hint}" if error.hint else str(error)
    if error.code in STATUS:
        return STATUS[error.code], text
    kept = grpc.StatusCode.UNAVAILABLE if error.retry else grpc.StatusCode.INTERNAL
    return kept, text
