r"""The director manifest: which bundle a device shall run, signed online, never enough alone.

A device installs a bundle only if the approval metadata (TUF targets) lists the same hash and
length. ``counter`` grows per device and is never reused: a replayed assignment is refused.

Signing bytes (all signatures of the product): ``b"shoal-sig\0" + context + b"\0" + payload``,
so that a signature made for one purpose is worth nothing for another.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from .errors import ContractError, SignatureError
from .names import check_digest, check_name

CONTEXT: Final = b"shoal.assignment.v1"
PAYLOAD_BYTES_MAX: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What one device shall run."""

    device: str
    """Id of the device."""
    counter: int
    """Grows by at least one with every assignment of this device; from 1."""
    issued_unix_ms: int
    """When it was signed; raises the device's floor of "latest time seen"."""
    expires_unix_ms: int
    """Not acted on after this time."""
    model: str
    """Name of the model."""
    path: str
    """Target path in the approval metadata."""
    sha256: str
    """Of the bundle."""
    length: int
    """Of the bundle, bytes."""
    rollout: str
    """Rollout that asks for it."""


def signing_bytes(context: bytes, payload: bytes) -> bytes:
    """Return the bytes that a signature covers."""
    return b"shoal-sig\0" + context + b"\0" + payload


def sign(assignment: Assignment, key: Ed25519PrivateKey) -> tuple[bytes, bytes]:
    """Return (payload, signature) of an assignment; the payload is canonical JSON."""
    payload = json.dumps(asdict(assignment), sort_keys=True, separators=(",", ":")).encode()
    return payload, key.sign(signing_bytes(CONTEXT, payload))


def verify(payload: bytes, signature: bytes, key: Ed25519PublicKey) -> Assignment:
    """Return the assignment of a signed payload.

    Who calls this still checks device, counter, expiry and the approval metadata.

    Raises:
        SignatureError: Too long, the signature is wrong, or the payload is not an assignment.
    """
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise SignatureError(f"assignment of {len(payload)} bytes exceeds {PAYLOAD_BYTES_MAX}")
    try:
        key.verify(signature, signing_bytes(CONTEXT, payload))
    except InvalidSignature as exc:
        raise SignatureError("the assignment's signature is not the director's") from exc
    try:
        raw = json.loads(payload)
        kinds = {field.name: int if field.type == "int" else str for field in fields(Assignment)}
        if not isinstance(raw, dict) or set(raw) != set(kinds):
            raise SignatureError("the assignment has other fields than the contract")
        if any(type(raw[name]) is not kind for name, kind in kinds.items()):
            raise SignatureError("the assignment has a field of the wrong type")
        found = Assignment(**raw)
        check_name(found.device)
        check_name(found.model, what="model name")
        check_digest(found.sha256)
    except (ContractError, ValueError, RecursionError) as exc:
        raise SignatureError(f"the signed payload is not an assignment: {exc}") from exc
    if found.counter < 1 or found.length < 1:
        raise SignatureError("the assignment's counter or length is below 1")
    return found
