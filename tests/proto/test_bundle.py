"""The bundle: the same parts make the same bytes, and whatever bytes come, nothing is trusted."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.proto.bundle import Manifest, pack, unpack
from shoal.proto.errors import BundleError

MANIFEST = Manifest(
    name="wearable",
    model="model.onnx",
    input="x",
    output="probabilities",
    channels=("ax", "ay"),
    classes=("rest", "walk"),
    samples=100,
    facts={"run": "r1"},
)
PARTS = {"model.onnx": b"graph", "golden.npz": b"golden", "profile.json": b"{}"}
BYTES = pack(MANIFEST, PARTS)


def test_round_trip_and_reproducible() -> None:
    """A bundle yields what went in; packing again yields the same bytes and identity."""
    bundle = unpack(BYTES)
    assert bundle.manifest == MANIFEST
    assert dict(bundle.parts) == PARTS
    assert bundle.model == b"graph"
    assert bundle.length == len(BYTES)
    assert pack(bundle.manifest, bundle.parts) == BYTES
    with_training = unpack(pack(MANIFEST, {**PARTS, "training.onnx": b"t"}))
    assert with_training.parts["training.onnx"] == b"t"
    assert with_training.sha256 != bundle.sha256


@pytest.mark.parametrize(
    "parts", [{}, {"model.onnx": b""}, {**PARTS, "../evil": b""}, {**PARTS, "model.tflite": b""}]
)
def test_packing_takes_exactly_its_parts(parts: dict[str, bytes]) -> None:
    """A missing part and a part that has no place are refused."""
    with pytest.raises(BundleError, match="a bundle takes"):
        pack(MANIFEST, parts)


def archive(names: dict[str, bytes], *, compress: int = zipfile.ZIP_STORED) -> bytes:
    """Return a ZIP with these entries."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as target:
        for name, data in names.items():
            target.writestr(name, data)
    return out.getvalue()


TEXT = json.dumps(asdict(MANIFEST)).encode()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a model bundle"),
        (b"PK\x03\x04 and then nothing", "not a model bundle"),
        (archive({"manifest.json": TEXT, **PARTS, "../../etc/passwd": b"x"}), "unexpected parts"),
        (archive({"manifest.json": TEXT, **PARTS}, compress=zipfile.ZIP_DEFLATED), "compressed"),
        (archive(PARTS), "manifest of 0 bytes"),
        (archive({"manifest.json": TEXT, "model.onnx": b"m"}), "lacks a part"),
        (archive({"manifest.json": b"[]", **PARTS}), "not acceptable"),
        (archive({"manifest.json": b"{" * 40_000, **PARTS}), "not acceptable"),
        (archive({"manifest.json": b"{" * 70_000, **PARTS}), "manifest of 70000 bytes"),
    ],
)
def test_refuses_with_a_reason(data: bytes, said: str) -> None:
    """Each way to be wrong is named."""
    with pytest.raises(BundleError, match=said):
        unpack(data)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"name": "Evil Name"},
        {"model": "../model.onnx"},
        {"channels": []},
        {"classes": [1, 2]},
        {"samples": True},
        {"samples": 0},
        {"golden_abs_max": 2},
        {"input": ""},
        {"facts": []},
        {"surprise": 1},
    ],
    ids=str,
)
def test_refuses_a_bad_manifest(change: dict[str, object]) -> None:
    """Every field of the manifest is checked."""
    text = json.dumps(asdict(MANIFEST) | change).encode()
    with pytest.raises(BundleError):
        unpack(archive({"manifest.json": text, **PARTS}))


@given(st.integers(0, len(BYTES) - 1), st.integers(1, 255))
def test_whatever_byte_flips_it_yields_or_raises(at: int, flip: int) -> None:
    """A changed byte yields another identity or BundleError; nothing else escapes."""
    data = BYTES[:at] + bytes([BYTES[at] ^ flip]) + BYTES[at + 1 :]
    with contextlib.suppress(BundleError):
        assert unpack(data).sha256 != unpack(BYTES).sha256


@given(st.integers(0, len(BYTES)))
def test_every_cut_is_refused(at: int) -> None:
    """A truncated bundle is never accepted."""
    if at < len(BYTES):
        with pytest.raises(BundleError):
            unpack(BYTES[:at])


def test_manifest_is_a_value() -> None:
    """Manifests compare by value, so that a rebuilt one is recognised."""
    assert replace(MANIFEST, samples=50) != MANIFEST
