"""Turn errors into gRPC statuses at the edge, in one place.

    ShoalError        -> status by its kind; message as details; code and hint as trailers
    anything else     -> INTERNAL without details; the traceback goes to the log

Trailers: ``shoal-code`` (stable), ``shoal-hint-bin`` (UTF-8), and ``retry-after-ms`` when all
that is wrong is the moment.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc

from ... import ShoalError
from ..errors import (
    BusyError,
    ConfigError,
    ConflictError,
    DeniedError,
    InvalidError,
    NotFoundError,
    StoreError,
)

_log = logging.getLogger(__name__)

CODE: Final = "shoal-code"
HINT: Final = "shoal-hint-bin"
RETRY: Final = "retry-after-ms"
DETAILS_CHARS_MAX: Final = 1000

_STATUS: Final[dict[type[ShoalError], grpc.StatusCode]] = {
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    ConflictError: grpc.StatusCode.FAILED_PRECONDITION,
    InvalidError: grpc.StatusCode.INVALID_ARGUMENT,
    DeniedError: grpc.StatusCode.PERMISSION_DENIED,
    BusyError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    StoreError: grpc.StatusCode.UNAVAILABLE,
    ConfigError: grpc.StatusCode.FAILED_PRECONDITION,
}
_STATUS_OF_CODE: Final = {
    # What the .proto files promise, where the kind of the error alone does not say it.
    "server.api.unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "server.api.offset": grpc.StatusCode.OUT_OF_RANGE,
    "server.api.slow": grpc.StatusCode.DEADLINE_EXCEEDED,
    "server.federated.closed": grpc.StatusCode.DEADLINE_EXCEEDED,
}


class UnauthenticatedError(DeniedError):
    """The connection shows no certificate; nothing was done."""

    code = "server.api.unauthenticated"


class OffsetError(InvalidError):
    """The offset lies beyond the artefact; nothing was sent."""

    code = "server.api.offset"


class SlowReaderError(BusyError):
    """The reader took too long for a chunk; it may resume where it is."""

    code = "server.api.slow"


def status_of(exc: ShoalError) -> grpc.StatusCode:
    """Return the gRPC status of an error."""
    if exc.code in _STATUS_OF_CODE:
        return _STATUS_OF_CODE[exc.code]
    for kind in type(exc).__mro__:
        if kind in _STATUS:
            return _STATUS[kind]
    if exc.code.startswith("proto."):  # what the peer sent breaks a contract
        return grpc.StatusCode.INVALID_ARGUMENT
    return grpc.StatusCode.UNAVAILABLE if exc.retry else grpc.StatusCode.FAILED_PRECONDITION


def trailers_of(exc: ShoalError, *, retry_after_ms: int) -> tuple[tuple[str, str | bytes], ...]:
    """Return the trailers of an error."""
    found: list[tuple[str, str | bytes]] = [(CODE, exc.code)]
    if exc.hint:
        found.append((HINT, exc.hint[:DETAILS_CHARS_MAX].encode()))
    if exc.retry:
        found.append((RETRY, str(retry_after_ms)))
    return tuple(found)


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """Stands before every servicer, so that servicers raise and never abort."""

    def __init__(self, *, retry_after_ms: int) -> None:
        """Take how long a peer waits, ms, before it tries again what failed for the moment."""
        self._retry_after_ms = retry_after_ms

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        """Return the method's handler with its errors turned into statuses."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            behaviour = getattr(handler, kind)
            if behaviour is not None:
                make = getattr(grpc, f"{kind}_rpc_method_handler")
                return make(
                    self._guarded(behaviour, method),
                    request_deserializer=handler.request_deserializer,
                    response_serializer=handler.response_serializer,
                )
        return handler

    def _guarded(self, behaviour: Callable[..., Any], method: str) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(behaviour):

            async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
                try:
                    async for response in behaviour(request, context):
                        yield response
                except Exception as exc:
                    await self._abort(context, exc, method)

            return stream

        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                return await behaviour(request, context)
            except Exception as exc:
                await self._abort(context, exc, method)

        return call

    async def _abort(self, context: grpc.aio.ServicerContext, exc: Exception, method: str) -> None:
        if isinstance(exc, grpc.aio.AbortError):  # somebody aborted already
            raise exc
        if isinstance(exc, ShoalError):
            await context.abort(
                status_of(exc),
                str(exc)[:DETAILS_CHARS_MAX],
                trailing_metadata=trailers_of(exc, retry_after_ms=self._retry_after_ms),
            )
        _log.error("%s failed", method, exc_info=exc)
        await context.abort(
            grpc.StatusCode.INTERNAL,
            "the server failed at this call; its log says why",
            trailing_metadata=((CODE, "server.internal"),),
        )
