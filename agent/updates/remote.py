"""The server as updates see it: files of metadata, and chunks of artefacts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple, Protocol

import grpc

from ...proto import model_pb2, model_pb2_grpc
from .errors import RemoteError, RemoteNotFoundError


class Chunk(NamedTuple):
    """A piece of an artefact."""

    offset: int
    """Of its first byte."""
    data: bytes
    length: int
    """Of the whole artefact, as the server says."""


class Remote(Protocol):
    """Where metadata and artefacts come from. Every method raises RemoteError, to be retried."""

    def metadata(self, name: str, *, timeout_s: float) -> bytes:
        """Return a file of approval metadata.

        Raises:
            RemoteNotFoundError: There is none of that name.
        """

    def artefact(self, sha256: str, offset: int, *, timeout_s: float) -> Iterator[Chunk]:
        """Yield an artefact from an offset on; ends by itself after ``timeout_s``."""


class GrpcRemote:
    """The fleet server, over a channel that the caller owns. Thread-safe."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = model_pb2_grpc.ModelServiceStub(channel)

    def metadata(self, name: str, *, timeout_s: float) -> bytes:
        """Return a file of approval metadata."""
        try:
            found = self._stub.FetchMetadata(
                model_pb2.FetchMetadataRequest(name=name), timeout=timeout_s
            )
        except grpc.RpcError as exc:
            raise _error(exc, name) from exc
        return bytes(found.data)

    def artefact(self, sha256: str, offset: int, *, timeout_s: float) -> Iterator[Chunk]:
        """Yield an artefact from an offset on."""
        request = model_pb2.FetchArtefactRequest(sha256=sha256, offset=offset)
        call = self._stub.FetchArtefact(request, timeout=timeout_s)
        try:
            for found in call:
                yield Chunk(found.offset, found.data, found.length)
        except grpc.RpcError as exc:
            raise _error(exc, sha256[:12]) from exc
        finally:
            call.cancel()


def _error(exc: grpc.RpcError, name: str) -> RemoteError:
    code, details = exc.code(), exc.details()
    text = f"the server did not deliver {name}: {code.name}: {details!s:.200}"
    if code is grpc.StatusCode.NOT_FOUND:
        return RemoteNotFoundError(text)
    after_s = 0.0
    for key, value in exc.trailing_metadata() or ():
        if key == "retry-after-ms":
            with suppress(ValueError):
                after_s = min(3600.0, max(0.0, int(value) / 1000))
    return RemoteError(text, retry_after_s=after_s)
