"""Assignments: signed for one purpose, checked field by field."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from shoal.proto.assignment import CONTEXT, Assignment, sign, signing_bytes, verify
from shoal.proto.errors import SignatureError

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
ASSIGNMENT = Assignment(
    device="wrist-01",
    counter=7,
    issued_unix_ms=1_700_000_000_000,
    expires_unix_ms=1_700_000_600_000,
    model="wearable",
    path="models/wearable/" + "a" * 64 + ".shoal",
    sha256="a" * 64,
    length=1000,
    rollout="r-1",
)


def test_vector() -> None:
    """The signed bytes never change: devices in the field verify them."""
    payload, signature = sign(ASSIGNMENT, KEY)
    assert payload == (
        b'{"counter":7,"device":"wrist-01","expires_unix_ms":1700000600000,'
        b'"issued_unix_ms":1700000000000,"length":1000,"model":"wearable",'
        b'"path":"models/wearable/' + b"a" * 64 + b'.shoal","rollout":"r-1",'
        b'"sha256":"' + b"a" * 64 + b'"}'
    )
    assert signing_bytes(CONTEXT, b"x") == b"shoal-sig\0shoal.assignment.v1\0x"
    assert verify(payload, signature, KEY.public_key()) == ASSIGNMENT


def test_refuses_other_keys_and_other_purposes() -> None:
    """A signature by another key, or made for another purpose, is worth nothing."""
    payload, signature = sign(ASSIGNMENT, KEY)
    with pytest.raises(SignatureError, match="not the director's"):
        verify(payload, signature, Ed25519PrivateKey.generate().public_key())
    with pytest.raises(SignatureError):
        verify(payload, KEY.sign(payload), KEY.public_key())
    with pytest.raises(SignatureError):
        verify(payload, KEY.sign(signing_bytes(b"shoal.other.v1", payload)), KEY.public_key())


@pytest.mark.parametrize(
    "change",
    [{"device": "Evil/.."}, {"sha256": "zz"}, {"counter": 0}, {"length": 0}, {"counter": True},
     {"counter": "7"}, {"surprise": 1}],
    ids=str,
)  # fmt: skip
def test_refuses_signed_nonsense(change: dict[str, object]) -> None:
    """Even what the director signed is checked."""
    payload = json.dumps(asdict(ASSIGNMENT) | change).encode()
    signature = KEY.sign(signing_bytes(CONTEXT, payload))
    with pytest.raises(SignatureError):
        verify(payload, signature, KEY.public_key())


@pytest.mark.parametrize("payload", [b"[]", b"{}", b"7", b"\xff", b"[" * 4000, b"x" * 5000])
def test_refuses_signed_garbage(payload: bytes) -> None:
    """Whatever was signed, nothing but SignatureError comes out."""
    with pytest.raises(SignatureError):
        verify(payload, KEY.sign(signing_bytes(CONTEXT, payload)), KEY.public_key())


@given(st.integers(0, 300), st.integers(1, 255))
def test_any_flipped_byte_is_refused(at: int, flip: int) -> None:
    """The signature covers every byte."""
    payload, signature = sign(replace(ASSIGNMENT), KEY)
    both = bytearray(payload + signature)
    both[at % len(both)] ^= flip
    with pytest.raises(SignatureError):
        verify(bytes(both[: len(payload)]), bytes(both[len(payload) :]), KEY.public_key())
