"""TwinService: what the fleet wants of the calling device."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import grpc
from sqlalchemy import select

from ...proto import twin_pb2 as pb
from ...proto.twin_pb2_grpc import TwinServiceServicer
from ..federated.leases import Peer
from ..store import Store
from ..store.tables import AssignmentRow, Device


class Current(Protocol):
    """Who knows a device's assignment."""

    def current(self, device_id: int) -> AssignmentRow | None:
        """Return the assignment, signed such that it can still be acted on; None = none."""


class TwinServicer(TwinServiceServicer):
    """Registered on the device server; raises ShoalErrors."""

    def __init__(
        self,
        store: Store,
        director: Current,
        *,
        peer: Callable[[grpc.aio.ServicerContext], Awaitable[Peer]],
    ) -> None:
        """Take the database, the director, and who finds the device behind a call."""
        self._store, self._director, self._peer = store, director, peer

    async def GetDesired(
        self, request: pb.GetDesiredRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetDesiredResponse:
        """Return the desired state, whatever version was seen: a lost reply is harmless."""
        peer = await self._peer(context)
        return await asyncio.to_thread(self._desired, peer)

    def _desired(self, peer: Peer) -> pb.GetDesiredResponse:
        # The version first: should the assignment change in between, the device looks again.
        with self._store.read() as session:
            version = session.scalar(select(Device.desired_version).where(Device.id == peer.id))
        row = self._director.current(peer.id)
        found = pb.GetDesiredResponse(version=version or 0)
        if row is not None:
            found.assignment.payload, found.assignment.signature = row.payload, row.signature
        return found
