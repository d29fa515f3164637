"""The director: signs, online, which approved bundle each device shall run.

Its key decides among approved models and cannot introduce one (docs/adr/0004). The counter of a
device grows with every assignment and is never used for another bundle; the same assignment may
be signed again with a later expiry, so that a device that was away for long can still act on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.orm import Session

from ...proto import assignment as contract
from ...proto.assignment import Assignment
from ..errors import ConflictError
from ..store import Store
from ..store.tables import AssignmentRow, Device, Model
from . import files
from .approval import target_path

DAY_MS: Final = 86_400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectorConfig:
    """How long an assignment may be acted on."""

    expires_days: int = 7
    """Life of a signed assignment; it is signed again when half of it is over."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 1 <= self.expires_days <= 365:
            raise ValueError("expires_days must be 1 to 365")


def load_key(root: Path) -> Ed25519PrivateKey:
    """Return the director's key in ``root/keys/director.pem``; the first time it is made.

    Raises:
        ConfigError: The file is damaged or may be read by others.
    """
    path = root / "keys" / "director.pem"
    if not path.exists():
        files.make_private_dir(path.parent)
        files.write_key(path, Ed25519PrivateKey.generate())
    return files.read_key(path)


class Director:
    """Signs assignments. Thread-safe: the database orders the counters."""

    def __init__(
        self,
        store: Store,
        key: Ed25519PrivateKey,
        *,
        clock: Callable[[], int],
        config: DirectorConfig,
    ) -> None:
        self._store, self._key, self._clock, self._config = store, key, clock, config

    @property
    def public_key(self) -> bytes:
        """The public key that devices get at enrolment, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def assign(
        self, session: Session, device: Device, model: Model, rollout_id: str
    ) -> AssignmentRow:
        """Let a device run a model, within the caller's write transaction.

        Args:
            session: An open write transaction.
            device: The device; its desired version grows.
            model: An approved model.
            rollout_id: Who asks.

        Raises:
            ConflictError: The device is revoked, or the model is not approved.
        """
        if device.revoked_ms is not None:
            raise ConflictError(f"device {device.name} is revoked", hint="enrol it again first")
        if model.approved_ms is None:
            raise ConflictError(
                f"model {model.name} {model.sha256[:12]} is not approved", hint="approve it first"
            )
        row = session.get(AssignmentRow, device.id)
        counter = row.counter + 1 if row else 1
        row = row or AssignmentRow(device_id=device.id)
        row.counter, row.rollout_id, row.model_sha256 = counter, rollout_id, model.sha256
        self._sign(
            row,
            device=device.name,
            model=model.name,
            path=target_path(model.name, model.sha256),
            length=model.size,
        )
        session.add(row)
        device.desired_version += 1
        session.flush()
        return row

    def current(self, device_id: int) -> AssignmentRow | None:
        """Return a device's assignment, signed again if half of its life is over; None = none."""
        with self._store.read() as session:
            row = session.get(AssignmentRow, device_id)
        half_ms = self._config.expires_days * DAY_MS // 2
        if row is None or self._clock() < row.issued_ms + half_ms:
            return row
        with self._store.begin() as session:
            row = session.get(AssignmentRow, device_id)
            if row is not None:
                old = contract.verify(row.payload, row.signature, self._key.public_key())
                self._sign(
                    row, device=old.device, model=old.model, path=old.path, length=old.length
                )
        return row

    def _sign(self, row: AssignmentRow, *, device: str, model: str, path: str, length: int) -> None:
        row.issued_ms = self._clock()
        row.payload, row.signature = contract.sign(
            Assignment(
                device=device,
                counter=row.counter,
                issued_unix_ms=row.issued_ms,
                expires_unix_ms=row.issued_ms + self._config.expires_days * DAY_MS,
                model=model,
                path=path,
                sha256=row.model_sha256,
                length=length,
                rollout=row.rollout_id,
            ),
            self._key,
        )
