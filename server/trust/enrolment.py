"""Enrol devices, renew their certificates, revoke them.

A token is bound to the first public key that shows it. The same key gets the same certificate
again, so a lost reply is harmless (fault 30); another key is refused, and somebody is told: either
the token leaked, or a device was installed twice (fault 29). Whoever is refused learns nothing
but that.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from ...proto import enrolment_pb2 as pb
from ...proto import enrolment_pb2_grpc as pb_grpc
from ...proto.errors import ContractError
from ...proto.names import check_name
from ..drift.alerts import LIVE
from ..errors import BusyError, DeniedError, InvalidError, NotFoundError
from ..store import Store, audit
from ..store.tables import Alert, Certificate, Device, Token
from .ca import FleetCa, public_key_sha256, read_request
from .tokens import SECRET_CHARS, AttemptLimit, LimitConfig, hash_secret, new_secret, text

VERSION_CHARS_MAX: Final = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolmentConfig:
    """How long tokens live, and how often they may be shown."""

    token_hours: int = 24
    """Life of a token."""
    tokens_max: int = 100
    """Tokens of one device that have not expired."""
    limit: LimitConfig = field(default_factory=LimitConfig)

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 1 <= self.token_hours <= 24 * 365 or self.tokens_max < 1:
            raise ValueError("token_hours must be 1 to 8760, tokens_max at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetFacts:
    """What a device is told when it joins."""

    tuf_root: bytes
    """First root metadata of the approval repository."""
    director_key: bytes
    """Public ed25519 key of the director, 32 bytes."""
    broker_url: str
    server_address: str
    """host:port of the device port."""


class Minted(NamedTuple):
    """A new token."""

    token: str
    """The text of ``tokens``; a secret."""
    expires_ms: int
    """Unix ms."""


class Enrolment:
    """The rules of joining. Thread-safe."""

    def __init__(
        self,
        store: Store,
        ca: FleetCa,
        *,
        config: EnrolmentConfig,
        clock: Callable[[], int],
    ) -> None:
        self._store, self._ca, self._config, self._clock = store, ca, config, clock

    @property
    def ca(self) -> FleetCa:
        """The fleet's CA."""
        return self._ca

    def mint(
        self, device: str, *, host: str, port: int, ttl_s: int = 0, actor: str = "operator"
    ) -> Minted:
        """Return a new token for a device; the only time its secret is seen.

        Args:
            device: Id the device will have.
            host: Where the device reaches this server.
            port: The enrolment port.
            ttl_s: Its life; 0 = ``token_hours``, which is also the most.
            actor: Who asks, for the audit log.

        Raises:
            ContractError: The id is not legal.
            BusyError: The device has too many tokens already.
        """
        now_ms, secret = self._clock(), new_secret()
        made = text(device, secret, ca_sha256=self._ca.sha256, host=host, port=port)
        with self._store.begin() as session:
            live = select(Token).where(Token.device_name == device, Token.expires_ms > now_ms)
            if len(session.scalars(live).all()) >= self._config.tokens_max:
                raise BusyError(
                    f"{device} has {self._config.tokens_max} tokens that have not expired",
                    hint="use one of them, or revoke the device",
                )
            most_s = self._config.token_hours * 3600
            expires_ms = now_ms + 1000 * (min(ttl_s, most_s) if ttl_s > 0 else most_s)
            session.add(
                Token(
                    device_name=device,
                    secret_sha256=hash_secret(secret),
                    created_ms=now_ms,
                    expires_ms=expires_ms,
                )
            )
            audit.append(
                session, now_ms=now_ms, actor=actor, action="token.made", subject=device,
                detail={"expires_ms": expires_ms},
            )  # fmt: skip
        return Minted(made, expires_ms)

    def revoke(self, device: str, reason: str = "", *, actor: str = "operator") -> None:
        """Shut a device out: its certificates and tokens are worth nothing from now on.

        A token that is made afterwards lets it in again, with a new key.

        Raises:
            NotFoundError: There is no such device.
        """
        now_ms = self._clock()
        with self._store.begin() as session:
            row = session.scalar(select(Device).where(Device.name == device))
            if row is None:
                raise NotFoundError(f"there is no device {device!r:.60}")
            row.revoked_ms = row.revoked_ms or now_ms
            session.execute(
                update(Certificate)
                .where(Certificate.device_id == row.id, Certificate.revoked_ms.is_(None))
                .values(revoked_ms=now_ms)
            )
            session.execute(
                update(Token)
                .where(Token.device_name == device, Token.expires_ms > now_ms)
                .values(expires_ms=now_ms)
            )
            audit.append(
                session, now_ms=now_ms, actor=actor, action="device.revoked", subject=device,
                detail={"reason": reason},
            )  # fmt: skip

    def enrol(self, device: str, secret: str, csr_der: bytes, *, agent_version: str = "") -> bytes:
        """Return the certificate (PEM) of a device that shows its token.

        Raises:
            InvalidError: The id or the signing request is not acceptable.
            DeniedError: The token is unknown, expired, of another device, or bound to another key.
        """
        try:
            check_name(device)
        except ContractError as exc:
            raise InvalidError(str(exc), hint=exc.hint) from exc
        key = read_request(csr_der)
        with self._store.begin() as session:
            issued = self._enrol(session, device, secret, key, agent_version[:VERSION_CHARS_MAX])
        if issued is None:  # raised after the commit: what was noted of it stays
            raise DeniedError(
                "the token is not valid for this device", hint="ask the operator for a new token"
            )
        return issued

    def _enrol(
        self, session: Session, name: str, secret: str, key: ec.EllipticCurvePublicKey, version: str
    ) -> bytes | None:
        now_ms, key_sha256 = self._clock(), public_key_sha256(key)
        digest = hash_secret(secret[: 2 * SECRET_CHARS])
        # The index finds a hash, not a secret: its timing tells nothing that helps a guess.
        token = session.scalar(select(Token).where(Token.secret_sha256 == digest))
        if (
            token is None
            or not hmac.compare_digest(token.secret_sha256, digest)
            or token.device_name != name
            or now_ms >= token.expires_ms
        ):
            return None
        if token.key_sha256 is not None:
            if not hmac.compare_digest(token.key_sha256, key_sha256):
                self._alarm(session, name, key_sha256, now_ms)
                return None
            return (token.certificate_pem or "").encode()
        device = session.scalar(select(Device).where(Device.name == name))
        if device is None:
            device = Device(name=name, created_ms=now_ms)
            session.add(device)
        device.revoked_ms, device.agent_version = None, version
        session.flush()
        issued = self._ca.issue_device(session, device, key)
        token.key_sha256, token.certificate_pem = key_sha256, issued.decode()
        audit.append(
            session, now_ms=now_ms, actor=f"device:{name}", action="device.enrolled", subject=name,
            detail={"key_sha256": key_sha256, "agent_version": version},
        )  # fmt: skip
        return issued

    def _alarm(self, session: Session, name: str, key_sha256: str, now_ms: int) -> None:
        device = session.scalar(select(Device).where(Device.name == name))
        device_id = device.id if device else None
        known = session.scalar(
            select(Alert).where(
                Alert.kind == "key_conflict", Alert.state.in_(LIVE), Alert.device_id == device_id
            )
        )
        if known is not None:  # one alert and one audit entry, however often it is tried
            known.evidence = {**known.evidence, "attempts": known.evidence["attempts"] + 1}
            return
        session.add(
            Alert(
                device_id=device_id,
                model_sha256="",
                kind="key_conflict",
                state="open",
                text=f"a second key showed the used enrolment token of {name}: the token leaked, "
                "or the device was installed again; revoke the device if in doubt",
                evidence={"key_sha256": key_sha256, "attempts": 1},
                opened_ms=now_ms,
            )
        )
        audit.append(
            session, now_ms=now_ms, actor="server", action="enrolment.refused", subject=name,
            detail={"reason": "another key", "key_sha256": key_sha256},
        )  # fmt: skip

    def renew(self, device_id: int, csr_der: bytes, *, key_sha256: str) -> bytes:
        """Return a new certificate (PEM) for a device that still has a valid one.

        Args:
            device_id: Row of the device, known from its connection.
            csr_der: The request.
            key_sha256: Of the key that the connection uses; the new one must be another.

        Raises:
            InvalidError: The request is not acceptable, or its key is the old one.
            DeniedError: The device was revoked.
        """
        key = read_request(csr_der)
        if public_key_sha256(key) == key_sha256:
            raise InvalidError("a renewal needs a new key")
        with self._store.begin() as session:
            device = session.get(Device, device_id)
            if device is None or device.revoked_ms is not None:
                raise DeniedError("the device was revoked")
            issued = self._ca.issue_device(session, device, key)
            audit.append(
                session, now_ms=self._clock(), actor=f"device:{device.name}",
                action="device.renewed", subject=device.name,
            )  # fmt: skip
        return issued


# --- the services --------------------------------------------------------------------------------


class Caller(Protocol):
    """The device behind a call."""

    @property
    def id(self) -> int:
        """Its row."""

    @property
    def name(self) -> str:
        """Its id on the wire."""


class EnrolmentServicer(pb_grpc.EnrolmentServiceServicer):
    """``EnrolmentService``: for the enrolment port, where the caller has no certificate yet.

    Raises ShoalErrors.
    """

    def __init__(
        self,
        enrolment: Enrolment,
        facts: FleetFacts,
        *,
        config: EnrolmentConfig,
        clock: Callable[[], int],
    ) -> None:
        self._enrolment, self._facts, self._clock = enrolment, facts, clock
        self._limit = AttemptLimit(config.limit)

    async def Enrol(
        self, request: pb.EnrolRequest, context: grpc.aio.ServicerContext
    ) -> pb.EnrolResponse:
        """Exchange a token and a signing request for a certificate."""
        self._limit.check(_address(context.peer()), now_ms=self._clock())
        issued = await asyncio.to_thread(
            self._enrolment.enrol,
            request.device_id,
            request.token,
            request.csr_der,
            agent_version=request.agent_version,
        )
        return pb.EnrolResponse(
            certificate_pem=issued,
            ca_pem=self._enrolment.ca.certificate_pem,
            tuf_root=self._facts.tuf_root,
            director_key=self._facts.director_key,
            fleet=self._enrolment.ca.fleet,
            broker_url=self._facts.broker_url,
            server_address=self._facts.server_address,
        )


class RenewalServicer(pb_grpc.RenewalServiceServicer):
    """``RenewalService``: for the device port; raises ShoalErrors.

    ``peer`` returns the calling device, or raises.
    """

    def __init__(
        self,
        enrolment: Enrolment,
        peer: Callable[[grpc.aio.ServicerContext], Awaitable[Caller]],
        *,
        config: EnrolmentConfig,
        clock: Callable[[], int],
    ) -> None:
        self._enrolment, self._peer, self._clock = enrolment, peer, clock
        self._limit = AttemptLimit(config.limit)

    async def Renew(
        self, request: pb.RenewRequest, context: grpc.aio.ServicerContext
    ) -> pb.RenewResponse:
        """Replace the certificate of the calling device."""
        caller = await self._peer(context)
        self._limit.check(caller.name, now_ms=self._clock())
        issued = await asyncio.to_thread(
            self._enrolment.renew,
            caller.id,
            request.csr_der,
            key_sha256=_peer_key_sha256(context),
        )
        return pb.RenewResponse(certificate_pem=issued, ca_pem=self._enrolment.ca.certificate_pem)


def _address(peer: str) -> str:
    """Return the address of a gRPC peer (``ipv4:1.2.3.4:567``) without its port."""
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer


def _peer_key_sha256(context: grpc.aio.ServicerContext) -> str:
    found = context.auth_context().get("x509_pem_cert", ())
    for pem in found:
        key = x509.load_pem_x509_certificate(pem).public_key()
        if isinstance(key, ec.EllipticCurvePublicKey):
            return public_key_sha256(key)
    raise DeniedError("the connection shows no certificate")
