"""Wire the agent: the one file that constructs its parts and knows them all.

    source -> serving -> monitor -> spool -> link -> broker
                 ^                              |
              updates <- desired state <- nudge-+-> trainer -> server

What was in flight before a restart is settled first: the spool is mended, the slots say which
bundle to load and whether it is in trial.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc

from .. import ShoalError, __version__
from ..hw.board import Board
from ..proto import bundle, twin_pb2
from ..proto.bundle import Bundle
from ..proto.errors import RecordError
from ..proto.records import PLACE_CHARS_MAX, Kind
from ..proto.session import Tls
from ..proto.twin_pb2_grpc import TwinServiceStub
from . import children, source
from .config import AgentConfig
from .errors import ModelError, StateError
from .health import Health
from .identity import EnrolmentUnavailableError, Identity, enroll, renew
from .link import Link
from .serving import ActiveModel, Labelled, Serving
from .spool import Spool, SpoolError
from .trainer import Trainer
from .updates import Updater
from .updates.fs import Disk
from .updates.metadata import Approvals
from .updates.remote import GrpcRemote

log = logging.getLogger(__name__)

RETRY_S_MIN: Final = 1.0
RETRY_S_MAX: Final = 60.0
RENEWAL_CHECK_S: Final = 3600.0


def wall_ms() -> int:
    """Return the wall clock, Unix ms."""
    return int(time.time() * 1000)


def enrolled(config: AgentConfig) -> Identity:
    """Return the device's identity, enrolling it first if a token file is configured.

    Raises:
        IdentityError: There is none, and no token to get one.
    """
    token_file = config.enrolment.token_file
    if (config.state_dir / "identity" / "current").exists() or token_file is None:
        return Identity.load(config.state_dir)
    try:
        token = token_file.read_text()
    except OSError as exc:
        raise StateError(
            f"cannot read the enrolment token {token_file}: {exc.strerror}",
            hint="make a token with `shoal devices token` and write it there",
        ) from exc
    pause_s = RETRY_S_MIN
    while True:
        try:
            identity = enroll(token, config.state_dir)
            break
        except EnrolmentUnavailableError as exc:
            log.warning("%s; trying again in %.0f s", exc, pause_s)
            time.sleep(pause_s)
            pause_s = min(RETRY_S_MAX, pause_s * 2)
    token_file.unlink(missing_ok=True)
    log.info("enrolled as %s of fleet %s", identity.device, identity.fleet)
    return identity


@contextlib.contextmanager
def alone(state_dir: Path) -> Iterator[None]:
    """Hold a state folder: two agents on one spool would count against each other.

    Raises:
        StateError: Another agent runs on it.
    """
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (state_dir / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise StateError(
                f"another agent runs on {state_dir}; this one did nothing",
                hint="stop it first, or give this one a state_dir of its own",
            ) from exc
        yield


class App:
    """One agent. ``run`` does the work, once."""

    def __init__(self, config: AgentConfig, identity: Identity) -> None:
        self._config, self._identity = config, identity
        self._health = Health(clock=wall_ms)
        state = config.state_dir
        self._spool = Spool(state / "spool", config=config.spool, clock=wall_ms)
        self._look = asyncio.Event()
        self._report = asyncio.Event()
        self._stop = asyncio.Event()
        self._version = 0
        self._desired = 0
        self._running: tuple[Path, str] | None = None
        self._counted: dict[str, int] = {}
        self._serving: Serving | None = None
        self._trainer: Trainer | None = None
        self._aio_channel: grpc.aio.Channel | None = None
        self._hardware = config.hardware or _hardware()

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT, then send what waits and end."""
        config, identity = self._config, self._identity
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        await asyncio.to_thread(self._spool.open)
        recording = None
        if config.source.path is not None:
            recording = await asyncio.to_thread(
                partial(source.read, config.source.path, slices=config.source.slices)
            )
        log.info(
            "%s of fleet %s: server %s, broker %s, state in %s",
            identity.device,
            identity.fleet,
            identity.server_address,
            identity.broker_url,
            config.state_dir,
        )
        self._aio_channel = identity.aio_channel()
        with identity.channel() as channel:
            updater = self._updater(channel)
            tasks = [
                self._link_up(),
                self._flush(),
                self._reports(),
                self._renewals(),
                self._follow(updater, TwinServiceStub(channel), recording),
            ]
            if recording is not None:
                labelled = Labelled(config.state_dir / "labelled", recording)
                self._serving = Serving(
                    recording,
                    source=config.source,
                    trial=config.trial,
                    monitor=config.monitor,
                    labelled=labelled,
                    health=self._health,
                    emit=self.tell,
                    clock=wall_ms,
                )
                self._trainer = Trainer(
                    config.state_dir / "trainer",
                    channel=self._channel,
                    labelled=labelled,
                    active=lambda: self._running,
                    config=config.trainer,
                )
                tasks += [self._trainer.run()]
            try:
                async with asyncio.TaskGroup() as group:
                    started = [group.create_task(each) for each in tasks]
                    if self._serving is not None:
                        serving = group.create_task(self._serving.run())
                    await self._stop.wait()
                    if self._serving is not None:
                        serving.cancel()  # its end tells the windows in progress
                        await asyncio.wait([serving])
                    self._spool.flush()
                    log.info("stopping: sending what waits")
                    if not await self._link.drain(config.drain_s):
                        log.warning("%d records stay in the spool", self._spool.totals().spooled)
                    for each in started:
                        each.cancel()
            finally:
                self._count()
                self._spool.close()
                await self._aio_channel.close()

    def tell(self, kind: Kind, body: dict[str, Any]) -> None:
        """Write a record to the spool, for who counts what could not be told.

        Raises:
            SpoolError: The spool refused the record; it will not be sent. Health warns of it.
            RecordError: The record breaks its contract; likewise.
        """
        try:
            self._spool.append(kind, body)
            self._health.clear("spool.refused")
        except (SpoolError, RecordError) as exc:
            self._health.warn("spool.refused", str(exc), severity="error")
            raise

    def emit(self, kind: Kind, body: dict[str, Any]) -> None:
        """Write a record to the spool; a spool that refuses is a health warning, not a crash."""
        with contextlib.suppress(SpoolError, RecordError):
            self.tell(kind, body)

    # --- parts -----------------------------------------------------------------------------

    def _updater(self, channel: grpc.Channel) -> Updater:
        config, identity = self._config, self._identity
        root = config.state_dir / "updates"
        root.mkdir(mode=0o700, exist_ok=True)
        remote = GrpcRemote(channel)
        return Updater(
            root,
            device=identity.device,
            director_key=identity.director_key,
            approvals=Approvals(
                root / "approvals",
                tuf_root=identity.tuf_root,
                remote=remote,
                fs=Disk(),
                config=config.updates,
                clock=wall_ms,
                monotonic=time.monotonic,
            ),
            remote=remote,
            self_test=partial(children.self_test_blocking, config=config.trainer.child),
            emit=self.emit,
            clock=wall_ms,
            config=config.updates,
        )

    async def _link_up(self) -> None:
        identity = self._identity
        self._link = Link(
            self._spool,
            url=identity.broker_url,
            device=identity.device,
            boot=self._spool.stream,
            config=self._config.link,
            health=self._health,
            on_nudge=self._nudged,
            on_desired=self._desired_changed,
            tls=Tls(identity.ca_path, identity.certificate_path, identity.key_path),
        )
        await self._link.run()

    def _channel(self) -> grpc.aio.Channel:
        assert self._aio_channel is not None
        return self._aio_channel

    def _nudged(self, look: str) -> None:
        if look == "desired":
            self._look.set()
        elif self._trainer is not None:
            self._trainer.nudge()

    def _desired_changed(self, version: int) -> None:
        if version > self._desired:
            self._look.set()

    # --- updates ---------------------------------------------------------------------------

    async def _follow(
        self, updater: Updater, twin: TwinServiceStub, recording: source.Recording | None
    ) -> None:
        """Load what the slots hold, then follow the desired state."""
        path = await asyncio.to_thread(updater.boot)
        if updater.in_trial and path is not None:
            before = await asyncio.to_thread(updater.fallback)
            if before is not None:
                await self._activate(before)
            await self._try(updater, path)
        elif path is not None:
            await self._activate(path)
        else:
            log.info("no model yet: a rollout of the fleet brings one")
        pause_s = RETRY_S_MIN
        while True:
            self._look.clear()
            try:
                await self._obey(updater, twin)
                pause_s = RETRY_S_MIN
                wait_s = self._config.desired_poll_s
                self._health.clear("updates")
            except grpc.RpcError as exc:
                log.info("the desired state could not be read: %s", _status(exc))
                wait_s = pause_s = min(RETRY_S_MAX, pause_s * 2)
            except ShoalError as exc:
                log.warning("%s", exc)
                self._health.warn("updates", str(exc))
                retry_s = pause_s = min(RETRY_S_MAX, pause_s * 2)
                wait_s = retry_s if exc.retry else self._config.desired_poll_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._look.wait()

    async def _obey(self, updater: Updater, twin: TwinServiceStub) -> None:
        request = twin_pb2.GetDesiredRequest(version_seen=self._desired)
        reply = await asyncio.to_thread(partial(twin.GetDesired, request, timeout=30))
        if reply.HasField("assignment"):
            path = await updater.apply(reply.assignment)
            if path is not None:
                await self._try(updater, path)
        self._desired = max(self._desired, int(reply.version))
        self._report.set()

    async def _activate(self, path: Path) -> None:
        """Serve a confirmed bundle at once."""
        found = await asyncio.to_thread(_unpacked, path)
        if self._serving is not None:
            self._serving.activate(await self._serving.load(found))
        self._running = (path, found.sha256)
        log.info("bundle %.12s answers", found.sha256)
        self._report.set()

    async def _try(self, updater: Updater, path: Path) -> None:
        """Let a verified bundle answer live windows; confirm it, or go back."""
        before = self._running
        try:
            found = await asyncio.to_thread(_unpacked, path)
            if self._serving is not None:
                candidate: ActiveModel = await self._serving.load(found)
                self._running = (path, found.sha256)
                await self._serving.trial(candidate)
            self._running = (path, found.sha256)
        except ModelError as exc:
            self._running = before
            await asyncio.to_thread(updater.trial_failed, str(exc))
            log.warning("trial failed: %s", exc)
        else:
            await asyncio.to_thread(updater.trial_passed)
            log.info("bundle %.12s is confirmed", found.sha256)
        self._report.set()

    # --- telling ---------------------------------------------------------------------------

    async def _reports(self) -> None:
        while True:
            self._report.clear()
            self._version += 1
            self.emit(Kind.REPORTED, self._state())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.report_s):
                    await self._report.wait()

    def _state(self) -> dict[str, Any]:
        serving = self._serving
        counters = serving.counters if serving else None
        latency = sorted(counters.latency_us) if counters else []
        return {
            "version": self._version,
            "model": self._running[1] if self._running else "",
            "desired": self._desired,
            "agent": __version__,
            "rss_bytes": _rss_bytes(),
            "state": {
                "boot": self._spool.stream.hex(),
                "site": self._config.site,
                "hardware": self._hardware,
                "fleet": self._identity.fleet,
                "windows": counters.answered if counters else 0,
                "windows_skipped": counters.skipped if counters else 0,
                "labels": counters.labels if counters else 0,
                "tasks": self._trainer.tasks_done if self._trainer else 0,
                "monitor": serving.monitored() if serving else {},
                "latency_p50_us": round(latency[len(latency) // 2], 1) if latency else 0.0,
                "warnings": [
                    {"code": each.code, "severity": each.severity, "text": each.text[:200]}
                    for each in self._health.warnings()[:10]
                ],
            },
        }

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(self._config.spool.flush_s)
            self._count()
            if self._serving is not None:
                self._serving.tick()
            try:
                await asyncio.to_thread(self._spool.flush)
                self._health.clear("spool.flush")
            except SpoolError as exc:
                self._health.warn("spool.flush", str(exc), severity="error")

    def _count(self) -> None:
        """Bring counters that must survive a restart into the spool's ledger."""
        now: dict[str, int] = {}
        if self._serving is not None:
            now["windows_offered"] = self._serving.counters.offered
            now["windows_answered"] = self._serving.counters.answered
            now |= self._serving.untold()
        if self._trainer is not None:
            now["bytes_up"] = self._trainer.bytes_up
        for name, value in now.items():
            self._spool.count(name, value - self._counted.get(name, 0))
        self._counted = now

    async def _renewals(self) -> None:
        """Replace the certificate in time; the new one is used from the next start on."""
        while True:
            if self._identity.is_renewal_due(wall_ms()):
                try:
                    await asyncio.to_thread(renew, self._config.state_dir)
                    log.info("the certificate is renewed; starting again with the new one")
                    self._stop.set()
                except ShoalError as exc:
                    self._health.warn("identity.renewal", str(exc))
            await asyncio.sleep(RENEWAL_CHECK_S)


def _unpacked(path: Path) -> Bundle:
    return bundle.unpack(path.read_bytes())


def _status(exc: grpc.RpcError) -> str:
    code = getattr(exc, "code", None)
    return str(code().name) if callable(code) else type(exc).__name__


def _hardware() -> str:
    board = Board.read()
    return (board.model or board.kind or board.machine)[:PLACE_CHARS_MAX]


def _rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
