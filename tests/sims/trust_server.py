"""The trust side of a fleet server on 127.0.0.1: real gRPC, TLS, database and repository.

Made of the product's own parts, in a thread of its own, so that the device's side is tested as it
runs. Artefacts are in memory.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc

from shoal.proto import (
    enrolment_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    twin_pb2_grpc,
)
from shoal.server.api.errors import ErrorInterceptor
from shoal.server.api.identity import Identity
from shoal.server.api.twin import TwinServicer
from shoal.server.trust import director as directors
from shoal.server.trust.approval import Approval, ApprovalConfig
from shoal.server.trust.ca import CaConfig, FleetCa
from shoal.server.trust.director import Director, DirectorConfig
from shoal.server.trust.enrolment import (
    Enrolment,
    EnrolmentConfig,
    EnrolmentServicer,
    FleetFacts,
    RenewalServicer,
)
from tests.sims.stores import fresh_store


class TrustServer:
    """A context manager: enrolment port and device port are open inside it."""

    def __init__(self, root: Path, *, clock: Callable[[], int]) -> None:
        self.store = fresh_store(root / "fleet.db")
        self.ca = FleetCa.open(root / "state", "demo", config=CaConfig(), clock=clock)
        self.config = EnrolmentConfig()
        self.clock = clock
        self.enrolment = Enrolment(self.store, self.ca, config=self.config, clock=clock)
        self.approval = Approval(root / "state", config=ApprovalConfig(), clock=clock)
        self.approval.initialise()
        key = directors.load_key(root / "state")
        self.director = Director(self.store, key, clock=clock, config=DirectorConfig())
        self.artefacts: dict[str, bytes] = {}
        self.enrolment_port = self.device_port = 0
        self.callers: list[str] = []
        """Devices that asked for their desired state, in order."""
        self.drop_replies = 0
        """So many enrolments are carried out and not answered."""

    def __enter__(self) -> TrustServer:
        """Open the ports."""
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        """Close them."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        self._loop.close()
        self.store.close()

    def token(self, device: str = "wrist-01") -> str:
        """Return a new token."""
        return self.enrolment.mint(device, host="127.0.0.1", port=self.enrolment_port).token

    async def _run(self) -> None:
        self._stop = asyncio.Event()
        key, chain = self.ca.server_identity()
        ca_pem = self.ca.certificate_pem
        plain = grpc.ssl_server_credentials([(key, chain)])
        mutual = grpc.ssl_server_credentials(
            [(key, chain)], root_certificates=ca_pem, require_client_auth=True
        )
        interceptors = [ErrorInterceptor(retry_after_ms=1000)]
        front = grpc.aio.server(interceptors=interceptors)
        device = grpc.aio.server(interceptors=interceptors)
        peer = Identity(self.store, clock=self.clock)
        self.enrolment_port = front.add_secure_port("127.0.0.1:0", plain)
        self.device_port = device.add_secure_port("127.0.0.1:0", mutual)
        facts = FleetFacts(
            tuf_root=self.approval.root_bytes,
            director_key=self.director.public_key,
            broker_url="mqtt://127.0.0.1:1883",
            server_address=f"127.0.0.1:{self.device_port}",
        )
        enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server(_Enrolment(self, facts), front)
        enrolment_pb2_grpc.add_RenewalServiceServicer_to_server(
            RenewalServicer(self.enrolment, peer, config=self.config, clock=self.clock),
            device,
        )
        twin_pb2_grpc.add_TwinServiceServicer_to_server(_Twin(self, peer), device)
        model_pb2_grpc.add_ModelServiceServicer_to_server(_Models(self), device)
        await front.start()
        await device.start()
        self._ready.set()
        await self._stop.wait()
        await front.stop(0)
        await device.stop(0)


class _Enrolment(EnrolmentServicer):
    def __init__(self, server: TrustServer, facts: FleetFacts) -> None:
        super().__init__(server.enrolment, facts, config=server.config, clock=server.clock)
        self._server = server

    async def Enrol(self, request: Any, context: Any) -> Any:
        reply = await super().Enrol(request, context)
        if self._server.drop_replies:
            self._server.drop_replies -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the reply was lost")
        return reply


class _Twin(TwinServicer):
    def __init__(self, server: TrustServer, peer: Identity) -> None:
        super().__init__(server.store, server.director, peer=peer)
        self._server = server

    async def GetDesired(self, request: Any, context: Any) -> Any:
        self._server.callers.append((await self._peer(context)).name)
        return await super().GetDesired(request, context)


class _Models(model_pb2_grpc.ModelServiceServicer):
    def __init__(self, server: TrustServer) -> None:
        self._server = server

    async def FetchMetadata(self, request: Any, context: Any) -> Any:
        data = self._server.approval.metadata(request.name)
        return model_pb2.FetchMetadataResponse(data=data)

    async def FetchArtefact(self, request: Any, context: Any) -> AsyncIterator[Any]:
        data = self._server.artefacts[request.sha256]
        for start in range(request.offset, len(data), 4096):
            yield model_pb2.FetchArtefactResponse(
                offset=start, data=data[start : start + 4096], length=len(data)
            )
