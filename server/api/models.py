"""ModelService: approval metadata, and the artefacts that a device is entitled to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import BinaryIO, Final, Protocol

import grpc
from sqlalchemy import select
from sqlalchemy.orm import Session

from ...proto import model_pb2 as pb
from ...proto.model_pb2_grpc import ModelServiceServicer
from ...proto.names import check_digest
from ..errors import BusyError, NotFoundError
from ..federated.leases import Peer
from ..registry import Artefacts
from ..store import Store
from ..store.tables import AssignmentRow
from .config import ApiConfig
from .errors import OffsetError, SlowReaderError

CHUNK_BYTES: Final = 256 << 10


class Metadata(Protocol):
    """Who holds the approval metadata."""

    def metadata(self, name: str) -> bytes:
        """Return a file by its repository name; raises NotFoundError or InvalidError."""


class Entitled(Protocol):
    """Says which further artefacts a device may fetch now: those of its open tasks."""

    def __call__(self, session: Session, device_id: int, *, now_ms: int) -> set[str]:
        """Return their digests."""


class ModelServicer(ModelServiceServicer):
    """Registered on the device server; raises ShoalErrors."""

    def __init__(
        self,
        store: Store,
        artefacts: Artefacts,
        metadata: Metadata,
        *,
        peer: Callable[[grpc.aio.ServicerContext], Awaitable[Peer]],
        entitled: Entitled,
        clock: Callable[[], int],
        config: ApiConfig,
    ) -> None:
        """Prepare.

        Args:
            store: The database.
            artefacts: The artefact store.
            metadata: The approval repository.
            peer: Returns the device behind a call, or raises.
            entitled: Says what tasks entitle a device to.
            clock: Unix ms.
            config: The bounds.
        """
        self._store, self._artefacts, self._metadata = store, artefacts, metadata
        self._peer, self._entitled, self._clock = peer, entitled, clock
        self._config = config
        self._downloads = asyncio.Semaphore(config.downloads_max)

    async def FetchMetadata(
        self, request: pb.FetchMetadataRequest, context: grpc.aio.ServicerContext
    ) -> pb.FetchMetadataResponse:
        """Return one file of approval metadata."""
        await self._peer(context)
        data = await asyncio.to_thread(self._metadata.metadata, request.name)
        return pb.FetchMetadataResponse(data=data)

    async def FetchArtefact(
        self, request: pb.FetchArtefactRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Stream an artefact from an offset on; at the offset of its end, nothing."""
        peer = await self._peer(context)
        check_digest(request.sha256, what="artefact")
        if self._downloads.locked():
            raise BusyError("all downloads are taken; come again")
        async with self._downloads:
            length = await asyncio.to_thread(self._check, peer, request.sha256)
            if request.offset > length:
                raise OffsetError(f"offset {request.offset} is beyond the {length} bytes there are")
            file = await asyncio.to_thread(self._artefacts.open, request.sha256)
            try:
                await self._send(file, request.offset, length, context)
            finally:
                file.close()

    async def _send(
        self, file: BinaryIO, offset: int, length: int, context: grpc.aio.ServicerContext
    ) -> None:
        file.seek(offset)
        while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
            try:
                async with asyncio.timeout(self._config.chunk_s):
                    await context.write(
                        pb.FetchArtefactResponse(offset=offset, data=data, length=length)
                    )
            except TimeoutError as exc:
                raise SlowReaderError(
                    f"a chunk was not taken within {self._config.chunk_s:g} s; resume at {offset}"
                ) from exc
            offset += len(data)

    def _check(self, peer: Peer, sha256: str) -> int:
        """Return the length; what the device is not entitled to does not exist for it."""
        with self._store.read() as session:
            assigned = session.scalar(
                select(AssignmentRow.model_sha256).where(AssignmentRow.device_id == peer.id)
            )
            if sha256 != assigned and sha256 not in self._entitled(
                session, peer.id, now_ms=self._clock()
            ):
                raise NotFoundError(f"there is no artefact {sha256[:12]} for {peer.name}")
        return self._artefacts.size(sha256)
