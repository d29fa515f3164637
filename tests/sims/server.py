"""A fleet server on 127.0.0.1 made of the product's own parts, without broker and learning.

Three real gRPC servers, in a thread of their own: enrolment, devices (mutual TLS), operator (Unix
socket). Behind them the real database, artefacts, registry, approval, director and rollouts.
Learning jobs are recorded and answered from memory.
"""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import select

from shoal.proto import bundle as bundles
from shoal.proto import (
    enrolment_pb2_grpc,
    model_pb2_grpc,
    operator_pb2_grpc,
    twin_pb2_grpc,
)
from shoal.server.api import servers
from shoal.server.api.config import ApiConfig
from shoal.server.api.identity import Identity
from shoal.server.api.models import ModelServicer
from shoal.server.api.operator import Components, OperatorServicer
from shoal.server.api.twin import TwinServicer
from shoal.server.drift.config import DriftWorkerConfig
from shoal.server.drift.profile import ReferenceProfile
from shoal.server.drift.worker import Drift
from shoal.server.errors import NotFoundError
from shoal.server.federated.leases import entitled
from shoal.server.registry import ArtefactConfig, Artefacts, Models
from shoal.server.rollouts import RolloutConfig, Rollouts
from shoal.server.store.tables import Model
from shoal.server.trust.approval import Approval, ApprovalConfig, target_path
from shoal.server.trust.ca import CaConfig, FleetCa
from shoal.server.trust.director import Director, DirectorConfig, load_key
from shoal.server.trust.enrolment import Enrolment, EnrolmentConfig, EnrolmentServicer, FleetFacts
from tests.sims.stores import fresh_store


def make_bundle(name: str = "wearable", *, salt: int = 0) -> bytes:
    """Return a well-formed bundle; another salt makes another digest."""
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros((1, 2, 4), np.float32), probabilities=np.ones((1, 1), np.float32))
    manifest = bundles.Manifest(
        name=name, model="model.onnx", input="x", output="probabilities",
        channels=("ax", "ay"), classes=("rest",), samples=4, facts={"salt": str(salt)},
    )  # fmt: skip
    parts = {"model.onnx": b"\x08\x07", "golden.npz": buffer.getvalue(), "profile.json": b"{}"}
    return bundles.pack(manifest, parts)


class MemoryJob:
    """A learning job that only remembers what it was asked."""

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self.asked: list[dict[str, Any]] = []
        self.answers: list[dict[str, Any]] = []
        """What looks at a job are answered, in order; the last one stays."""

    async def start(self, **settings: Any) -> str:
        """Remember the settings."""
        self.asked.append(settings)
        return f"{self.noun}-{len(self.asked)}"

    async def get(self, run_id: str, /) -> dict[str, Any]:
        """Return the next answer."""
        if not self.answers:
            raise NotFoundError(f"there is no {self.noun} {run_id:.40}")
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class FleetServer:
    """A context manager: inside it, the three servers answer."""

    def __init__(
        self, root: Path, *, api: ApiConfig | None = None, clock: Callable[[], int] | None = None
    ) -> None:
        self.state = root / "state"
        self.state.mkdir(mode=0o700)
        self.clock = clock or (lambda: int(time.time() * 1000))
        self.api = api or ApiConfig(stop_s=0.0)
        self.store = fresh_store(self.state / "fleet.db")
        self.ca = FleetCa.open(self.state, "demo", config=CaConfig(), clock=self.clock)
        self.approval = Approval(self.state, config=ApprovalConfig(), clock=self.clock)
        self.approval.initialise()
        self.director = Director(
            self.store, load_key(self.state), clock=self.clock, config=DirectorConfig()
        )
        self.artefacts = Artefacts(
            self.state / "artefacts",
            self.store,
            clock=self.clock,
            config=ArtefactConfig(bytes_max=32 << 20),
        )
        self.models = Models(self.store, self.artefacts, clock=self.clock)
        self.published: list[tuple[str, int]] = []
        self.rollouts = Rollouts(
            self.store,
            self.director,
            clock=self.clock,
            publish_desired=lambda name, version: self.published.append((name, version)),
            config=RolloutConfig(tick_s=0.05, gate_s=0.0),
        )
        self.enrolment = Enrolment(self.store, self.ca, config=EnrolmentConfig(), clock=self.clock)
        self.training, self.rounds = MemoryJob("training"), MemoryJob("rounds")
        self.evaluations = MemoryJob("evaluation")
        self.drift: dict[str, Any] = {"devices": []}
        self.watch = Drift(self.store, clock=self.clock, config=DriftWorkerConfig())
        self.table: list[dict[str, Any]] = []
        """What the history answers …"""
        self.models_table: list[dict[str, Any]] = []
        """… of the model as a whole as well …"""
        self.tables_asked: list[tuple[Any, ...]] = []
        """… and what it was asked: model, group_by, since_ms, until_ms, every."""
        self.socket = self.state / "operator.sock"
        self.device_address = self.enrolment_address = ""
        self.failure: BaseException | None = None

    def __enter__(self) -> FleetServer:
        """Start."""
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        assert self._ready.wait(60)
        if self.failure is not None:
            self._end()
            raise self.failure
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._end()

    def _end(self) -> None:
        self._thread.join(60)
        self._loop.close()
        self.store.close()

    def _serve(self) -> None:
        try:
            self._loop.run_until_complete(self._run())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        except BaseException as exc:
            self.failure = exc
        finally:
            self._ready.set()

    async def _run(self) -> None:
        self._stop = asyncio.Event()
        peer = Identity(self.store, clock=self.clock)
        key, chain = self.ca.server_identity()
        shown = servers.ServerIdentity(key=key, chain=chain, ca=self.ca.certificate_pem)
        facts = FleetFacts(
            tuf_root=self.approval.root_bytes, director_key=self.director.public_key,
            broker_url="mqtt://127.0.0.1:1", server_address="127.0.0.1:1",
        )  # fmt: skip
        joining = EnrolmentServicer(
            self.enrolment, facts, config=EnrolmentConfig(), clock=self.clock
        )
        twin = TwinServicer(self.store, self.director, peer=peer)
        models = ModelServicer(
            self.store, self.artefacts, self.approval,
            peer=peer, entitled=entitled, clock=self.clock, config=self.api,
        )  # fmt: skip
        operating = OperatorServicer(
            Components(
                store=self.store, artefacts=self.artefacts, models=self.models,
                rollouts=self.rollouts, approval=self.approval, target_path=target_path,
                create_token=self._token, revoke_device=self.enrolment.revoke,
                drift_report=lambda sha256: {**self.drift, "model_sha256": sha256},
                control_alert=self.watch.control, drift_table=self._table,
                model_table=lambda *_, every: self.models_table,
                training=self.training, rounds=self.rounds, evaluations=self.evaluations,
            ),
            clock=self.clock,
            config=self.api,
        )  # fmt: skip
        listeners = [
            servers.enrolment(
                "127.0.0.1:0",
                shown,
                [partial(enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server, joining)],
                config=self.api,
            ),
            servers.devices(
                "127.0.0.1:0",
                shown,
                [
                    partial(twin_pb2_grpc.add_TwinServiceServicer_to_server, twin),
                    partial(model_pb2_grpc.add_ModelServiceServicer_to_server, models),
                ],
                config=self.api,
            ),
            servers.operator(
                self.socket,
                [partial(operator_pb2_grpc.add_OperatorServiceServicer_to_server, operating)],
                config=self.api,
            ),
        ]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each.run()) for each in listeners]
            tasks.append(group.create_task(self.rollouts.run()))
            for listener in listeners:
                await listener.started.wait()
            self.enrolment_address = f"127.0.0.1:{listeners[0].port}"
            self.device_address = f"127.0.0.1:{listeners[1].port}"
            self._ready.set()
            await self._stop.wait()
            for task in tasks:
                task.cancel()

    def _table(
        self, model: str, group_by: str, since_ms: int, until_ms: int, profile: Any, *, every: str
    ) -> list[dict[str, Any]]:
        self.tables_asked.append((model, group_by, since_ms, until_ms, every))
        return self.table

    def _token(self, device: str, ttl_s: int) -> tuple[str, int]:
        port = int(self.enrolment_address.rpartition(":")[2])
        made = self.enrolment.mint(device, host="127.0.0.1", port=port, ttl_s=ttl_s)
        return made.token, made.expires_ms

    # --- devices -----------------------------------------------------------------------------

    def enrol(self, name: str) -> tuple[bytes, bytes]:
        """Let a device in and return its private key and certificate, PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([]))
            .sign(key, hashes.SHA256())
        )
        token, _ = self._token(name, 0)
        secret = token.split(".")[2]
        issued = self.enrolment.enrol(
            name, secret, request.public_bytes(serialization.Encoding.DER)
        )
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return pem, issued

    def channel(self, identity: tuple[bytes, bytes] | None) -> grpc.Channel:
        """Return a channel to the device port, with a device's key and certificate or without."""
        key, chain = identity or (None, None)
        credentials = grpc.ssl_channel_credentials(
            root_certificates=self.ca.certificate_pem, private_key=key, certificate_chain=chain
        )
        return grpc.secure_channel(self.device_address, credentials)

    def operator(self) -> grpc.Channel:
        """Return a channel to the operator's socket."""
        return grpc.insecure_channel(f"unix:{self.socket}")

    def approved_model(self, name: str = "wearable", *, salt: int = 0) -> str:
        """Register and approve a bundle, and return its digest."""
        sha256 = self.artefacts.put(make_bundle(name, salt=salt), "bundle")
        version = self.models.register(name, sha256)
        model = self.models.get(sha256)
        listed = self.approval.approve(
            target_path(name, sha256), sha256, model.size, {"version": version}
        )
        self.models.approved(sha256, evidence={"gate": "ok"}, targets_version=listed)
        return sha256

    def profiled_model(self, profile: ReferenceProfile) -> str:
        """Register and approve a bundle that the history can be compared with."""
        sha256 = self.approved_model()
        with self.store.begin() as session:
            row = session.scalars(select(Model).where(Model.sha256 == sha256)).one()
            row.profile = json.loads(profile.to_json())
        return sha256
