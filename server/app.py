"""Wire the server: the one file that constructs its parts and knows them all.

devices --MQTT--> ingest --> database <-- drift, rollouts, rounds, console
devices --gRPC--> twin, models, federated exchange
operator --Unix socket--> all of it
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Final

# Arrow's own pool keeps each thread's peak for ever: 40 MB after 600 windows of telemetry. Which
# pool is used, Arrow reads once, when it is imported.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

from .. import ShoalError
from ..proto import (
    enrolment_pb2_grpc,
    federated_pb2_grpc,
    model_pb2_grpc,
    operator_pb2_grpc,
    twin_pb2_grpc,
)
from ..proto.session import Tls
from .api import servers
from .api.identity import Identity
from .api.models import ModelServicer
from .api.operator import Components, OperatorServicer
from .api.twin import TwinServicer
from .config import BrokerConfig, ServerConfig, load
from .drift.worker import Drift, Request
from .errors import ConfigError
from .federated.coordinator import Rounds
from .federated.evaluations import Evaluations
from .federated.leases import Leases, entitled
from .federated.service import FederatedServicer
from .ingest import Ingest
from .lake import Lake
from .learning.training import Training, Workshop
from .learning.worker import Executor
from .registry.artefacts import Artefacts
from .registry.models import Models
from .rollouts.worker import Rollouts
from .store import Store
from .trust.approval import Approval, target_path
from .trust.ca import FleetCa
from .trust.director import Director, load_key
from .trust.enrolment import Enrolment, EnrolmentServicer, FleetFacts, RenewalServicer
from .web.app import Console

log = logging.getLogger(__name__)

OPERATOR_SOCKET: Final = "operator.sock"
REFRESH_S: Final = 60.0  # approval metadata are looked at this often; they live for hours


def wall_ms() -> int:
    """Return the wall clock, Unix ms."""
    return int(time.time() * 1000)


class App:
    """One fleet server. ``run`` does the work, once."""

    def __init__(self, config: ServerConfig) -> None:
        """Open the state and construct every part; nothing listens yet.

        Raises:
            ConfigError: The state folder is not usable, or belongs to another fleet.
            StoreError: The database cannot be opened.
        """
        self._config, state = config, config.state_dir
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            state.chmod(0o700)
        except OSError as exc:
            raise ConfigError(
                f"the state folder {state} is not usable: {exc.strerror}", hint="check its owner"
            ) from exc
        clock = wall_ms
        self.store = Store(config.database or f"sqlite:///{state / 'fleet.db'}")
        self.store.migrate()
        ca = FleetCa.open(state, config.fleet, config=config.ca, clock=clock)
        self._approval = Approval(state, config=config.approval, clock=clock)
        self._approval.initialise()
        director = Director(self.store, load_key(state), clock=clock, config=config.director)
        artefacts = Artefacts(state / "artefacts", self.store, clock=clock, config=config.artefacts)
        artefacts.sweep()  # what a crash left behind, before anything new comes
        models = Models(self.store, artefacts, clock=clock, config=config.artefacts)
        self._rollouts = Rollouts(
            self.store,
            director,
            clock=clock,
            publish_desired=lambda device, version: self._ingest.publish_desired(device, version),
            config=config.rollouts,
        )
        self._drift = Drift(self.store, clock=clock, config=config.drift, retrain=self._retrain)
        self._lake = Lake(self.store, state / "lake", clock=clock, config=config.lake)
        self._ingest = Ingest(
            self.store,
            url=config.broker.url,
            tls=_tls(config.broker),
            config=config.ingest,
            clock=clock,
            on_update=self._rollouts.on_update,
            on_reported=self._rollouts.on_reported,
            on_stored=self._drift.wake,
        )
        executor = Executor(config=config.executor)
        self._training = Training(
            self.store,
            artefacts,
            models,
            executor,
            clock=clock,
            config=config.training,
            profile=config.profile,
        )
        leases = Leases(self.store, state / "exchange", clock=clock, config=config.leases)
        self._rounds = Rounds(
            self.store,
            artefacts,
            leases,
            Workshop(artefacts, models, executor, profile=config.profile),
            clock=clock,
            nudge=self._ingest.nudge,
            config=config.rounds,
        )
        self._evaluations = Evaluations(
            self.store, leases, clock=clock, nudge=self._ingest.nudge, config=config.evaluations
        )
        self._enrolment = Enrolment(self.store, ca, config=config.enrolment, clock=clock)
        peer = Identity(self.store, clock=clock)
        key, chain = ca.server_identity()
        shown = servers.ServerIdentity(key=key, chain=chain, ca=ca.certificate_pem)
        facts = FleetFacts(
            tuf_root=self._approval.root_bytes,
            director_key=director.public_key,
            broker_url=config.broker.device_url or config.broker.url,
            server_address=self._advertised(config.listen.devices),
        )
        self._listeners = {
            "enrolment": servers.enrolment(
                config.listen.enrolment,
                shown,
                [
                    partial(
                        enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server,
                        EnrolmentServicer(
                            self._enrolment, facts, config=config.enrolment, clock=clock
                        ),
                    )
                ],
                config=config.api,
            ),
            "devices": servers.devices(
                config.listen.devices,
                shown,
                [
                    partial(
                        enrolment_pb2_grpc.add_RenewalServiceServicer_to_server,
                        RenewalServicer(
                            self._enrolment, peer, config=config.enrolment, clock=clock
                        ),
                    ),
                    partial(
                        twin_pb2_grpc.add_TwinServiceServicer_to_server,
                        TwinServicer(self.store, director, peer=peer),
                    ),
                    partial(
                        model_pb2_grpc.add_ModelServiceServicer_to_server,
                        ModelServicer(
                            self.store,
                            artefacts,
                            self._approval,
                            peer=peer,
                            entitled=entitled,
                            clock=clock,
                            config=config.api,
                        ),
                    ),
                    partial(
                        federated_pb2_grpc.add_FederatedServiceServicer_to_server,
                        FederatedServicer(leases, peer=peer, clock=clock),
                    ),
                ],
                config=config.api,
            ),
            "operator": servers.operator(
                state / OPERATOR_SOCKET,
                [
                    partial(
                        operator_pb2_grpc.add_OperatorServiceServicer_to_server,
                        OperatorServicer(
                            Components(
                                store=self.store,
                                artefacts=artefacts,
                                models=models,
                                rollouts=self._rollouts,
                                approval=self._approval,
                                target_path=target_path,
                                create_token=self._token,
                                revoke_device=self._enrolment.revoke,
                                drift_report=self._drift.report,
                                drift_table=self._lake.history.drift_table,
                                model_table=self._lake.history.model_table,
                                control_alert=self._drift.control,
                                training=self._training,
                                rounds=self._rounds,
                                evaluations=self._evaluations,
                            ),
                            clock=clock,
                            config=config.api,
                        ),
                    )
                ],
                config=config.api,
            ),
        }
        self._console = Console(self.store, config=config.console, clock=clock)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            PortInUseError: An address is taken; nothing stays running.
        """
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        parts: list[Coroutine[Any, Any, None]] = [
            self._ingest.run(),
            self._drift.run(),
            self._lake.run(),
            self._rollouts.run(),
            self._training.run(),
            self._rounds.run(),
            self._evaluations.run(),
            self._refresh(),
            *(each.run() for each in self._listeners.values()),
        ]
        if self._config.console.enabled:
            parts.append(self._console.run())
        parts.append(self._announce())
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(part) for part in parts]
                await stop.wait()
                for task in tasks:
                    task.cancel()
        finally:
            self.store.close()

    async def _announce(self) -> None:
        """Say once where everything is."""
        for each in self._listeners.values():
            await each.started.wait()
        listen, state = self._config.listen, self._config.state_dir
        log.info("devices join at %s, then speak to %s", listen.enrolment, listen.devices)
        log.info("broker: %s", self._config.broker.url)
        log.info("operators: shoal --state %s", state)
        if self._config.console.enabled:
            await self._console.started.wait()
            log.info("console: %s", self._console.url)

    async def _retrain(self, request: Request) -> str:
        """Start the run that the retraining policy asks for."""
        if request.road == "training":
            return await self._training.start(
                name=request.name, dataset_sha256=request.dataset_sha256, note=request.note
            )
        return await self._rounds.start(bundle_sha256=request.model_sha256)

    async def _refresh(self) -> None:
        """Sign approval metadata again before devices would call them stale."""
        while True:
            await asyncio.to_thread(self._approval.refresh, wall_ms())
            await asyncio.sleep(REFRESH_S)

    def _token(self, device: str, ttl_s: int) -> tuple[str, int]:
        host, _, port = self._advertised(self._config.listen.enrolment).rpartition(":")
        made = self._enrolment.mint(device, host=host.strip("[]"), port=int(port), ttl_s=ttl_s)
        return made.token, made.expires_ms

    def _advertised(self, address: str) -> str:
        _, _, port = address.rpartition(":")
        if not port.isdecimal() or not 1 <= int(port) <= 65_535:
            raise ConfigError(f"{address!r:.80} is not host:port with a fixed port")
        return f"{self._config.listen.advertise}:{port}"


def _tls(broker: BrokerConfig) -> Tls | None:
    if broker.ca is None or broker.certificate is None or broker.key is None:
        return None
    return Tls(broker.ca, broker.certificate, broker.key)


def run(path: Path) -> None:
    """Run the server of a configuration file until it is told to end.

    Raises:
        ShoalError: It could not start; the message says why.
    """
    config = load(path)
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for chatty in ("alembic", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)

    async def serve() -> None:
        await App(config).run()

    try:
        asyncio.run(serve())
    except BaseExceptionGroup as group:
        known, _ = group.split(ShoalError)
        if known is None:
            raise
        raise _first(known) from group  # whatever else broke, broke because of it


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found
