"""The device's reader of a profile: what it takes of one, and that nothing hostile gets in.

Vectors (profiles written by the server, kept with its tests), faults, and a story: a changed
profile is not this model's any more.
"""

from __future__ import annotations

import base64
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.agent.errors import ModelFormatError
from shoal.agent.profile import BYTES_MAX, DECILES, VALUES_MAX, DeviceProfile
from shoal.agent.updates.errors import BundleRejectedError
from shoal.ext.projection import RandomFeatures
from shoal.proto.bundle import Manifest, pack, unpack

from .updates.test_updater import Device

GOLDEN = Path(__file__).parents[1] / "server" / "drift" / "golden"
V1, V2 = ((GOLDEN / f"profile_v{version}.json").read_bytes() for version in (1, 2))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def packed(values: Any, dtype: str = "<f4") -> str:
    """Return the base64 of an array."""
    return base64.b64encode(np.asarray(values).astype(dtype).tobytes()).decode()


def changed(path: tuple[str | int, ...], value: Any) -> bytes:
    """Return the profile of version 2 with one value replaced."""
    raw = json.loads(V2)
    at = raw
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(raw).encode()


def test_it_says_how_to_count() -> None:
    """Edges, kinds, ranges, deciles and the projection, as arrays that the kernels take."""
    found = DeviceProfile.from_json(V2, features=4)
    assert found.names == ("a", "b", "c", "confidence") and found.kinds == ("float",) * 4
    assert [len(each) for each in found.edges] == [15] * 4
    assert all(each.dtype == np.float32 for each in (*found.edges, found.low__d, found.deciles__9))
    assert found.low__d[0] == np.float32(-6.460715293884277) and found.high__d[3] == 1
    assert found.deciles__9.shape == (DECILES - 1,) and found.deciles__9[0] > 0.8
    projection = found.projection
    assert projection is not None and projection.stride == 2
    kernel = RandomFeatures(
        projection.weights__fc, projection.phases__f, projection.mean__c, projection.scale__c
    )
    assert (kernel.features, kernel.columns) == (64, 3)


def test_version_1_counts_as_it_did() -> None:
    """Bundles of existing fleets: edges as before, all that is new stays out of the way."""
    found = DeviceProfile.from_json(V1, features=4)
    assert found.kinds == ("float",) * 4 and found.projection is None
    assert (found.low__d == -np.inf).all() and (found.high__d == np.inf).all()
    assert found.deciles__9 == pytest.approx(np.arange(1, 10) / 10)
    edges = [each["edges"] for each in json.loads(V1)["features"]]
    assert [each.tolist() for each in found.edges] == edges


def test_nothing_in_it_can_be_changed() -> None:
    """The monitor of every window reads the same."""
    found = DeviceProfile.from_json(V2, features=4)
    assert found.projection is not None
    projection = found.projection
    for array in (
        *found.edges, found.low__d, found.high__d, found.deciles__9, projection.weights__fc,
        projection.phases__f, projection.mean__c, projection.scale__c,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 3),
        (("version",), True),
        (("version",), 1.0),
        (("version",), "2"),
        (("version",), [1]),
        (("features",), {}),
        (("features",), [1, 2, 3, 4]),
        (("features",), []),
        (("features", 0, "name"), 5),
        (("features", 0, "name"), "x" * 81),
        (("features", 0, "kind"), "text"),
        (("features", 0, "kind"), ["float"]),
        (("features", 0, "kind"), None),
        (("features", 0, "edges"), None),
        (("features", 0, "edges"), []),
        (("features", 0, "edges"), [1.0] * 2),
        (("features", 0, "edges"), [float(i) for i in range(256)]),
        (("features", 0, "edges", 0), 1e3),
        (("features", 0, "edges", 0), float("nan")),
        (("features", 0, "edges", 0), float("-inf")),
        (("features", 0, "edges", 0), -1e39),
        (("features", 0, "edges", 0), -(10**400)),
        (("features", 0, "edges", 0), True),
        (("features", 0, "edges", 0), [0.0]),
        (("features", 0, "low"), 100.0),
        (("features", 0, "low"), None),
        (("features", 0, "low"), float("nan")),
        (("features", 0, "high"), float("inf")),
        (("features", 0, "high"), "1"),
        (("deciles",), None),
        (("deciles",), [0.5] * 10),
        (("deciles", 0), 0.99),
        (("deciles", 0), -0.1),
        (("deciles", 8), 1.1),
        (("deciles", 8), float("nan")),
        (("projection",), 5),
        (("projection",), []),
        (("projection",), {}),
        (("projection", "features"), 0),
        (("projection", "features"), 257),
        (("projection", "features"), 10**30),
        (("projection", "features"), 63),
        (("projection", "features"), True),
        (("projection", "stride"), 0),
        (("projection", "stride"), 2**24 + 1),
        (("projection", "stride"), 2.0),
        (("projection", "weights"), None),
        (("projection", "weights"), ""),
        (("projection", "weights"), "é" * 512),
        (("projection", "weights"), "=" * 512),
        (("projection", "weights"), packed(np.full(192, 17), "<f2")),
        (("projection", "weights"), packed(np.full(192, np.nan), "<f2")),
        (("projection", "weights"), packed(np.zeros(192))),
        (("projection", "phases"), packed(np.full(64, -0.1))),
        (("projection", "phases"), packed(np.full(64, 6.3))),
        (("projection", "phases"), packed(np.full(64, np.inf))),
        (("projection", "mean"), packed(np.full(3, np.nan))),
        (("projection", "scale"), packed(np.zeros(3))),
        (("projection", "scale"), packed(np.full(3, -1))),
        (("projection", "scale"), packed(np.full(3, 1e-42))),
        (("projection", "scale"), packed(np.ones(2))),
    ],
)
def test_what_is_out_of_bounds_is_refused(path: tuple[str | int, ...], value: object) -> None:
    """Every field is checked before a kernel is made of it, and the message is short."""
    with pytest.raises(ModelFormatError) as caught:
        DeviceProfile.from_json(changed(path, value), features=4)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"1", b"{", b"\xff", b"null", b"{}", b"[" * 100_000, b" " * (BYTES_MAX + 1)],
)
def test_what_is_no_profile_is_refused(data: bytes) -> None:
    """Not JSON, not an object, too deep, too long."""
    with pytest.raises(ModelFormatError):
        DeviceProfile.from_json(data, features=4)


@pytest.mark.parametrize("value", [b"[]", b"{}", b"1.5", b'{"a":1}', b'"a"', b"null"])
def test_what_is_hostile_costs_no_more_memory_than_is_said(value: bytes) -> None:
    """As many of the smallest values as the bounds let through; one more is refused unread."""
    marks = sum(value.count(mark) for mark in (b",", b"[", b"{")) + 1  # and the comma after it
    many = min((VALUES_MAX - 2) // marks, (BYTES_MAX - 2) // (len(value) + 1))
    data = b"[" + b",".join([value] * many) + b"]"
    over = b"[" + b"1," * VALUES_MAX + b"1]"
    tracemalloc.start()
    try:
        with pytest.raises(ModelFormatError, match="no version"):
            DeviceProfile.from_json(data, features=4)
        _, most = tracemalloc.get_traced_memory()
        assert most < 130 << 20
        tracemalloc.reset_peak()
        with pytest.raises(ModelFormatError, match="more than"):
            DeviceProfile.from_json(over, features=4)
        _, more = tracemalloc.get_traced_memory()
        assert more < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("features", [3, 5])
@pytest.mark.parametrize("data", [V1, V2])
def test_another_models_profile_is_refused(data: bytes, features: int) -> None:
    """The message names both numbers."""
    with pytest.raises(ModelFormatError, match=f"has 4 features, the model needs {features}"):
        DeviceProfile.from_json(data, features=features)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_whatever_comes_is_usable_or_refused(data: st.DataObject) -> None:
    """A value anywhere is replaced by any other: the kernels take what was not refused."""
    raw = json.loads(V2)
    at: Any = raw
    path: list[Any] = []
    while isinstance(at, (dict, list)) and at and (not path or data.draw(st.booleans())):
        keys = sorted(at) if isinstance(at, dict) else range(len(at))
        path.append(data.draw(st.sampled_from(list(keys))))
        at = at[path[-1]]
    try:
        found = DeviceProfile.from_json(changed(tuple(path), data.draw(json_values)), features=4)
    except ModelFormatError:
        return
    assert (found.low__d <= found.high__d).all() and len(found.kinds) == len(found.edges) == 4
    if (projection := found.projection) is not None:
        RandomFeatures(
            projection.weights__fc, projection.phases__f, projection.mean__c, projection.scale__c
        )


@settings(deadline=None, max_examples=100)
@given(st.integers(0, len(V2) - 1), st.integers(0, 7))
def test_whatever_bit_flips(at: int, bit: int) -> None:
    """A profile or ModelFormatError; never another error."""
    data = bytearray(V2)
    data[at] ^= 1 << bit
    try:
        found = DeviceProfile.from_json(bytes(data), features=4)
    except ModelFormatError:
        return
    assert len(found.edges) == 4


def test_a_changed_profile_is_not_this_models(tmp_path: Path) -> None:
    """The profile is signed with the model: a wider range, well-formed, is refused by its hash."""
    manifest = Manifest(
        name="demo", model="model.onnx", input="x", output="p", channels=("a", "b", "c"),
        classes=("no", "yes"), samples=20,
    )  # fmt: skip
    parts = {"model.onnx": b"graph", "golden.npz": b"golden", "profile.json": V2}
    blind = V2.replace(b'"high":6.884901523590088', b'"high":9.884901523590088')
    assert blind != V2 and DeviceProfile.from_json(blind, features=4).high__d[0] > 9
    signed, forged = pack(manifest, parts), pack(manifest, {**parts, "profile.json": blind})
    assert len(forged) == len(signed) and unpack(forged).sha256 != unpack(signed).sha256
    device = Device(tmp_path / "state")
    device.install(1, counter=1)
    device.repo.approve("models/demo/2", signed)
    assignment = device.repo.assign("models/demo/2", counter=2)
    device.repo.tamper = lambda data: forged if data == signed else data
    with pytest.raises(BundleRejectedError, match="hash"):
        device.apply(assignment)
    device.repo.tamper = lambda data: data
    device.repo.approve("models/demo/3", signed)
    path = device.apply(device.repo.assign("models/demo/3", counter=3))
    assert path is not None and unpack(path.read_bytes()).parts["profile.json"] == V2
