"""Who is calling: from the client certificate of the connection to the device's row.

TLS checks the chain once, when the connection is made; a connection outlives that by hours. So
each call checks what may have changed: the serial is one that this fleet's CA issued and nobody
revoked, the device is not revoked, and the certificate has not expired (fault 33).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import grpc
from cryptography import x509
from cryptography.x509.oid import NameOID
from sqlalchemy import select

from ..errors import DeniedError
from ..federated.leases import Peer
from ..store import Store
from ..store.tables import Certificate, Device
from .errors import UnauthenticatedError

PARSED_MAX: Final = 4096  # certificates kept parsed, 200 bytes each; parsing takes 30 us


@dataclass(frozen=True, slots=True)
class _Shown:
    """What a client certificate says."""

    name: str
    serial: str
    expires_ms: int


class Identity:
    """Finds the device behind a call; an instance is the ``peer`` that servicers are given."""

    def __init__(self, store: Store, *, clock: Callable[[], int]) -> None:
        """Take the database and a clock of Unix ms."""
        self._store, self._clock = store, clock

    async def __call__(self, context: grpc.aio.ServicerContext) -> Peer:
        """Return the calling device.

        Raises:
            UnauthenticatedError: The connection shows no certificate.
            DeniedError: The certificate is unknown, revoked or expired, or the device is revoked.
        """
        found = context.auth_context().get("x509_pem_cert", ())
        if not found:
            raise UnauthenticatedError("the connection shows no client certificate")
        return await asyncio.to_thread(self.check, bytes(found[0]))

    def check(self, pem: bytes) -> Peer:
        """Return the device of a client certificate that TLS has accepted.

        Raises:
            DeniedError: As for calling the instance.
        """
        shown = _parse(pem)
        with self._store.read() as session:
            row = session.execute(
                select(
                    Device.id, Device.name, Device.revoked_ms.label("device_revoked_ms"),
                    Certificate.revoked_ms,
                )
                .join(Certificate, Certificate.device_id == Device.id)
                .where(Certificate.serial == shown.serial)
            ).first()  # fmt: skip
        if row is None or row.name != shown.name:
            raise DeniedError(
                "the certificate is not one of this fleet", hint="enrol the device again"
            )
        if row.revoked_ms is not None or row.device_revoked_ms is not None:
            raise DeniedError(f"device {row.name} is revoked", hint="enrol the device again")
        if self._clock() >= shown.expires_ms:
            raise DeniedError(
                f"the certificate of {row.name} has expired", hint="enrol the device again"
            )
        return Peer(row.id, row.name)


@lru_cache(maxsize=PARSED_MAX)
def _parse(pem: bytes) -> _Shown:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        name = str(names[0].value) if len(names) == 1 else ""
    except ValueError as exc:
        raise DeniedError("the client certificate cannot be read") from exc
    return _Shown(
        name,
        f"{certificate.serial_number:x}",
        int(certificate.not_valid_after_utc.timestamp() * 1000),
    )
