"""The reference profile: what it counts, and that nothing malformed gets in.

Vectors (files of both versions), properties, faults. What is in the parts that version 2 added is
tested in ``test_profile_parts.py``.
"""

from __future__ import annotations

import base64
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.agent.profile import DeviceProfile
from shoal.server.drift import profile_fields
from shoal.server.drift.errors import ProfileError
from shoal.server.drift.profile import (
    BYTES_MAX,
    FEATURES_MAX,
    GROUPS_MAX,
    FeatureProfile,
    ReferenceProfile,
    build,
    with_devices,
)

from .conftest import CHANNELS, SAMPLES, People

# Written by People(default_rng(0)).profile(3): v1 by the release that had version 1, v2 by the one
# that spelled float32 as float64 and tables as lists, v2_short by the one after it; never edited.
GOLDEN = Path(__file__).parent / "golden"
VALID = People(np.random.default_rng(0)).profile(3).to_json()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def packed(values: Any, dtype: str = "<f4") -> str:
    """Return the base64 of an array."""
    return base64.b64encode(np.asarray(values).astype(dtype).tobytes()).decode()


def changed(path: tuple[str | int, ...], value: Any) -> bytes:
    """Return the valid profile with one value replaced."""
    raw = json.loads(VALID)
    at = raw
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(raw).encode()


@pytest.mark.parametrize("name", ["v1", "v2", "v2_short"])
def test_files_of_all_releases_are_read(name: str) -> None:
    """Bundles of existing fleets carry them; what is written back says what was read."""
    data = (GOLDEN / f"profile_{name}.json").read_bytes()
    found = ReferenceProfile.from_json(data)
    written = found.to_json()
    assert found.version == int(name[1]) and ReferenceProfile.from_json(written) == found
    assert written == data if name != "v2" else len(written) < 0.9 * len(data)
    assert [each.name for each in found.features] == [*CHANNELS, "confidence"]
    assert found.features[0].edges[7] == 0.18608728051185608
    assert found.features[2].counts[:2] == (1125, 1125) and found.groups == ("0", "1", "2")
    device = DeviceProfile.from_json(data, features=4)
    assert [each.tolist() for each in device.edges] == [list(f.edges) for f in found.features]


def test_the_two_spellings_of_version_2_say_the_same() -> None:
    """But for what the second one added: how many values were stuck."""
    old, new = (
        ReferenceProfile.from_json((GOLDEN / f"profile_{name}.json").read_bytes())
        for name in ("v2", "v2_short")
    )
    assert [each.stuck for each in old.features] == [None] * 4
    assert [each.stuck for each in new.features] == [0, 0, 0, None]
    assert replace(new, features=tuple(replace(f, stuck=None) for f in new.features)) == old


def test_version_1_knows_nothing_new() -> None:
    """What it lacks is told from what it says: no values, no range, no tables."""
    found = ReferenceProfile.from_json((GOLDEN / "profile_v1.json").read_bytes())
    assert found.confidence is None and found.projection is None
    for each in found.features:
        assert (each.kind, each.values, each.quantiles, each.null_rate) == ("float", 0, (), 0)
        assert each.low == -np.inf and each.high == np.inf


def test_the_old_parts_are_made_as_before() -> None:
    """The same data gives the edges and counts that version 1 had of it."""
    old = ReferenceProfile.from_json((GOLDEN / "profile_v1.json").read_bytes())
    new = People(np.random.default_rng(0)).profile(3)
    assert (new.labelled, new.correct, new.groups) == (old.labelled, old.correct, old.groups)
    for a, b in zip(old.features, new.features, strict=True):
        assert a.edges == pytest.approx(b.edges, rel=1e-6)
        assert (a.counts, a.trained, a.held) == (b.counts, b.trained, b.held)


def test_the_same_data_makes_the_same_bytes() -> None:
    """A step that a crash interrupted is done again, and registers nothing twice."""
    assert People(np.random.default_rng(0)).profile(3).to_json() == VALID


def test_a_usual_profile_is_small() -> None:
    """20 channels, 64 random features, 8 groups, 6 classes: 40 KiB, far from the bound."""
    rng = np.random.default_rng(1)
    n, channels = 800, [f"channel_{i:02}" for i in range(20)]
    found = build(
        rng.normal(0, 1, (n, 20, 50)).astype(np.float32), rng.random(n).astype(np.float32),
        rng.random(n) < 0.9, np.arange(n) % 8, rng.random(n) < 0.3, channels=channels,
        predicted__n=rng.integers(0, 6, n), classes=6, projected=64,
    )  # fmt: skip
    assert len(found.to_json()) < 44 << 10
    assert ReferenceProfile.from_json(found.to_json()) == found
    device = DeviceProfile.from_json(found.to_json(), features=21)
    assert device.projection is not None and found.projection is not None
    assert device.projection.weights__fc.shape == (64, 20)


def test_it_counts_what_it_says(people: People) -> None:
    """Right-open bins at quantiles; trained and held apart, confidence of held windows only."""
    x = np.concatenate([people.windows(p, 50) for p in (4, 9)])
    group, held = np.repeat([4, 9], 50), np.tile(np.arange(50) >= 40, 2)
    confidence = np.linspace(0, 1, 100, dtype=np.float32)
    correct = np.arange(100) % 10 > 0
    found = build(x, confidence, correct, group, held, channels=CHANNELS, bins=4)
    assert [each.name for each in found.features] == [*CHANNELS, "confidence"]
    assert found.groups == ("4", "9") and found.samples_per_window == SAMPLES
    assert found.labelled == (10, 10) and found.correct == (9, 9)
    for i, feature in enumerate(found.features[:3]):
        bounds = np.array([-np.inf, *feature.edges, np.inf])
        assert len(feature.counts) == 4 and sum(feature.counts) == 80 * SAMPLES
        assert max(feature.counts) - min(feature.counts) <= 2  # quantiles: equal shares
        for g, name in enumerate((4, 9)):
            for counts, rows in ((feature.trained, ~held), (feature.held, held)):
                expected = np.histogram(x[rows & (group == name), i], bounds)[0]
                assert list(counts[g]) == expected.tolist()
    last = found.features[-1]
    assert sum(last.counts) == 20 and np.sum(last.held, 0).tolist() == list(last.counts)


def test_a_constant_channel_has_two_bins(people: People) -> None:
    """Its edges are one: below, and from there on."""
    x = people.windows(0, 20)
    x[:, 1] = 3
    found = build(
        x, np.full(20, 0.5, np.float32), np.ones(20, bool), np.zeros(20, np.int64),
        np.arange(20) >= 10, channels=CHANNELS,
    )  # fmt: skip
    assert found.features[1].edges == (3.0,)
    assert found.features[1].counts == (0, 10 * SAMPLES)
    assert ReferenceProfile.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"channels": ("a", "b")}, "channels"),
        ({"channels": ("a", "b", "a")}, "different names"),
        ({"channels": ("a", "b", "confidence")}, "different names"),
        ({"bins": 1}, "bins"),
        ({"bins": 257}, "bins"),
        ({"held__n": np.zeros(20, bool)}, "held-out"),
        ({"held__n": np.ones(20, bool)}, "held-out"),
        ({"confidence__n": np.zeros(19, np.float32)}, "one entry per window"),
        ({"confidence__n": np.full(20, 1.1, np.float32)}, "each 0 to 1"),
        ({"confidence__n": np.full(20, np.nan, np.float32)}, "no finite value"),
        ({"predicted__n": np.zeros(19, np.int64)}, "one entry per window"),
        ({"predicted__n": np.full(20, 2), "classes": 2}, "class is not 0 to 1"),
        ({"predicted__n": np.full(20, -1), "classes": 2}, "class is not 0 to 1"),
        ({"classes": 0}, "classes must be"),
        ({"classes": 1025}, "classes must be"),
        ({"projected": -1}, "projected must be"),
        ({"projected": 257}, "projected must be"),
        ({"kinds": ("float",)}, "1 kinds do not fit"),
        ({"kinds": ("float", "text", "float")}, "kind 'text'"),
        ({"kinds": ("integer", "float", "float")}, "no whole number"),
        ({"x__nct": np.full((20, 3, 4), np.nan, np.float32)}, "a has no finite value"),
        ({"x__nct": np.full((20, 3, 4), np.inf, np.float32)}, "a has no finite value"),
    ],
)
def test_what_makes_no_profile_is_refused(
    people: People, change: dict[str, Any], says: str
) -> None:
    """The message says which argument."""
    arguments: dict[str, Any] = {
        "x__nct": people.windows(0, 20),
        "confidence__n": np.ones(20, np.float32),
        "correct__n": np.ones(20, bool),
        "group__n": np.zeros(20, np.int64),
        "held__n": np.arange(20) >= 10,
        "channels": CHANNELS,
    }
    with pytest.raises(ValueError, match=says):
        build(**(arguments | change))


def test_json_and_back_is_the_same_to_the_byte() -> None:
    """Canonical: one profile, one text."""
    found = ReferenceProfile.from_json(VALID)
    assert found.to_json() == VALID
    assert ReferenceProfile.from_dict(json.loads(VALID)) == found


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 0),
        (("version",), 3),
        (("version",), "2"),
        (("version",), 2.0),
        (("version",), True),
        (("version",), None),
        (("groups",), ["0", "1"]),
        (("groups", 0), 5),
        (("groups", 0), "x" * 81),
        (("groups",), [str(i) for i in range(GROUPS_MAX + 1)]),
        (("labelled", 0), -1),
        (("labelled", 0), 1.0),
        (("labelled", 0), True),
        (("correct", 0), 101),
        (("samples_per_window",), 0),
        (("features",), []),
        (("features", 1, "name"), "a"),
        (("features", 0, "name"), "x" * 81),
        (("features", 0, "name"), None),
        (("features", 0, "edges", 0), float("nan")),
        (("features", 0, "edges", 0), float("-inf")),
        (("features", 0, "edges", 0), -1e300),
        (("features", 0, "edges", 0), -0.1 - 2**31),
        (("features", 0, "edges", 0), -(10**400)),
        (("features", 0, "edges", 0), 1000.0),
        (("features", 0, "edges"), [float(i) for i in range(256)]),
        (("features", 0, "counts"), [1, 2]),
        (("features", 0, "counts", 3), 2**53 + 1),
        (("features", 0, "trained"), []),
        (("features", 0, "held"), [[1] * 16, [1] * 16, None]),
        (("features", 0, "held"), [[1] * 16, [1] * 16, ["1"] * 16]),
        (("features", 0, "held"), None),
        (("features", 0, "held"), ""),
        (("features", 0, "held"), packed(np.ones(47), "<u1")),
        (("features", 0, "held"), packed(np.ones(48), "<u2")),
        (("features", 0, "held"), packed(np.full(48, 300), "<u4")),
        (("features", 0, "held"), packed(np.full(48, 2**53 + 1), "<u8")),
        (("features", 0, "held"), "é" * 64),
        (("features", 0, "held"), "=" * 64),
        (("features", 0, "held"), "A" * 10_000),
        (("features", 0, "stuck"), -1),
        (("features", 0, "stuck"), 18_001),
        (("features", 0, "stuck"), 1.0),
        (("features", 0, "kind"), "text"),
        (("features", 0, "kind"), ["float"]),
        (("features", 0, "kind"), "integer"),
        (("features", 0, "low"), None),
        (("features", 0, "low"), 7.5),
        (("features", 0, "low"), float("-inf")),
        (("features", 0, "low"), -7),
        (("features", 0, "high"), float("nan")),
        (("features", 0, "high"), -6.5),
        (("features", 0, "values"), 0),
        (("features", 0, "values"), -1),
        (("features", 0, "nulls"), 2**53 + 1),
        (("features", 0, "nulls"), 0.0),
        (("features", 0, "below"), 18001),
        (("features", 0, "above"), None),
        (("features", 0, "minimum"), 0.0),
        (("features", 0, "maximum"), 0.0),
        (("features", 0, "mean"), 100.0),
        (("features", 0, "mean"), float("nan")),
        (("features", 0, "variance"), -1.0),
        (("features", 0, "variance"), float("inf")),
        (("features", 0, "quantiles"), ""),
        (("features", 0, "quantiles"), [0.0] * 128),
        (("features", 0, "quantiles"), packed(np.zeros(127))),
        (("features", 0, "quantiles"), packed(np.linspace(1, 0, 128))),
        (("features", 0, "quantiles"), packed(np.full(128, np.nan))),
        (("features", 0, "quantiles"), packed(np.zeros(128))[:-4] + "!!=="),
        (("features", 0, "quantiles"), packed(np.zeros(128))[:-4] + "AAé="),
        (("features", 0, "quantiles"), packed(np.zeros(128))[:-4] + "AAB="),
        (("features", 0, "items"), None),
        (("features", 0, "items"), [[1, 1]]),
        (("features", 0, "items"), [[1]]),
        (("features", 0, "items"), [[1.0, 0]]),
        (("features", 0, "items"), [[True, 0]]),
        (("features", 0, "items"), [[2**53 + 1, 0]]),
        (("features", 0, "items"), [[1, 0], [1, 0]]),
        (("features", 0, "items"), [[i, 0] for i in range(65)]),
        (("features", 0, "other"), 1),
        (("deciles",), None),
        (("deciles",), [0.5] * 8),
        (("deciles", 0), -0.5),
        (("deciles", 8), 1.5),
        (("deciles", 0), 0.999),
        (("deciles", 4), 0.9),
        (("confidence",), None),
        (("confidence", "right"), []),
        (("confidence", "right"), [[0] * 10] * 1025),
        (("confidence", "right"), [[0] * 10] * 2),
        (("confidence", "wrong", 0), [0] * 9),
        (("confidence", "wrong", 0, 0), -1),
        (("projection",), []),
        (("projection", "features"), 0),
        (("projection", "features"), 63),
        (("projection", "features"), 257),
        (("projection", "features"), 10**9),
        (("projection", "stride"), 0),
        (("projection", "stride"), 2**24 + 1),
        (("projection", "bandwidth"), 0.0),
        (("projection", "bandwidth"), float("nan")),
        (("projection", "weights"), packed(np.full(192, 17), "<f2")),
        (("projection", "weights"), packed(np.full(192, np.inf), "<f2")),
        (("projection", "weights"), packed(np.zeros(192))),
        (("projection", "phases"), packed(np.full(64, 6.3))),
        (("projection", "phases"), packed(np.full(64, -0.1))),
        (("projection", "mean"), packed(np.full(3, np.nan))),
        (("projection", "mean"), packed(np.zeros(4))),
        (("projection", "scale"), packed(np.zeros(3))),
        (("projection", "rows"), 0),
        (("projection", "means"), packed(np.full(64, 1.01))),
        (("projection", "variances"), packed(np.full(64, -0.01))),
        (("projection", "variances"), packed(np.full(64, 1.01))),
        (("projection", "covariance_square"), -1.0),
        (("projection", "covariance_square"), 4097.0),
        (("projection", "trained_rows"), [1, 2]),
        (("projection", "trained"), packed(np.full(192, 1.01), "<f2")),
        (("projection", "held"), packed(np.zeros(64), "<f2")),
    ],
)
def test_what_is_out_of_bounds_is_refused(path: tuple[str | int, ...], value: object) -> None:
    """Every field is checked before anything is computed with it."""
    with pytest.raises(ProfileError) as caught:
        ReferenceProfile.from_json(changed(path, value))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"1", b"{", b"\xff", b"null", b"[" * 100_000, b" " * (BYTES_MAX + 1)],
)
def test_what_is_no_profile_is_refused(data: bytes) -> None:
    """Not JSON, not an object, too deep, too long."""
    with pytest.raises(ProfileError):
        ReferenceProfile.from_json(data)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_whatever_comes_is_a_profile_or_refused(data: st.DataObject) -> None:
    """A value anywhere in the tree is replaced by any other."""
    raw = json.loads(VALID)
    at: Any = raw
    path: list[Any] = []
    while isinstance(at, (dict, list)) and at and (not path or data.draw(st.booleans())):
        keys = sorted(at) if isinstance(at, dict) else range(len(at))
        path.append(data.draw(st.sampled_from(list(keys))))
        at = at[path[-1]]
    text = changed(tuple(path), data.draw(json_values))
    try:
        found = ReferenceProfile.from_json(text)
    except ProfileError:
        return
    assert ReferenceProfile.from_json(found.to_json()) == found
    if len(found.features) > 1 and all(each.edges for each in found.features):
        device = DeviceProfile.from_json(found.to_json(), features=len(found.features))
        assert device.kinds == tuple(each.kind for each in found.features)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=255)
)
def test_device_and_server_read_the_very_same_edges(values: list[float]) -> None:
    """Those that were written, whatever decimals they have: they count in the same bins."""
    edges = tuple(sorted({float(each) + 0.0 for each in values}))
    valid = ReferenceProfile.from_json(VALID)
    nothing = (0,) * (len(edges) + 1)
    feature = replace(
        valid.features[0], edges=edges, counts=nothing, trained=(nothing,) * 3, held=(nothing,) * 3
    )
    data = replace(valid, features=(feature, *valid.features[1:])).to_json()
    assert ReferenceProfile.from_json(data).features[0].edges == edges
    assert DeviceProfile.from_json(data, features=4).edges[0].tolist() == list(edges)
    spelled = json.dumps(json.loads(data)["features"][0]["edges"])
    assert len(spelled) <= len(json.dumps(edges))


def test_a_decimal_that_would_be_read_as_another_number_is_not_shortened() -> None:
    """The largest float32 in nine digits is a float64 beyond it, which a device refuses."""
    most = float(np.finfo(np.float32).max)
    assert float(str(np.float32(most))) > most
    assert profile_fields.short([most, -most, 0.10000000149011612]) == (most, -most, 0.1)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 5), st.integers(1, 6), st.sampled_from([8, 16, 32, 53]), st.data())
def test_a_packed_table_is_read_as_it_was(rows: int, columns: int, bits: int, data: Any) -> None:
    """Of any counts, in one text for one table, as lists are."""
    row = st.tuples(*[st.integers(0, 2**bits - 1)] * columns)
    table = tuple(data.draw(st.tuples(*[row] * rows)))
    text = profile_fields.table_text(table)
    assert profile_fields.tables(text, rows, columns, "x") == table
    assert profile_fields.tables([list(each) for each in table], rows, columns, "x") == table


def wide(channels: int, *, bins: int, groups: int) -> ReferenceProfile:
    """Return a profile of so many channels, made of one, with counts of two bytes."""
    rng, n = np.random.default_rng(0), 2 * groups
    found = build(
        rng.standard_normal((n, 1, 512)).astype(np.float32), rng.random(n).astype(np.float32),
        rng.random(n) < 0.9, np.arange(n) // 2, np.arange(n) % 2 == 1, channels=["a"], bins=bins,
    )  # fmt: skip
    many = tuple(map(tuple, rng.integers(256, 60_000, (groups, bins)).tolist()))
    feature = replace(found.features[0], trained=many, held=many)
    features: list[FeatureProfile] = [
        replace(feature, name=f"channel_{i:04}") for i in range(channels)
    ]
    return replace(found, features=(*features, found.features[1]), projection=None)


@pytest.mark.parametrize(
    ("channels", "bins", "groups"),
    [(1024, 16, 5), (1024, 16, 50), (1024, 32, 32), (1024, 64, 10), (340, 16, 256), (64, 256, 90)],
)
def test_a_wide_model_has_a_profile(channels: int, bins: int, groups: int) -> None:
    """All channels that a manifest may name; and it costs a device little more than its bytes."""
    data = wide(channels, bins=bins, groups=groups).to_json()
    assert len(ReferenceProfile.from_json(data).features) == channels + 1 <= FEATURES_MAX
    tracemalloc.start()
    try:
        device = DeviceProfile.from_json(data, features=channels + 1)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(device.edges) == channels + 1
    assert kept < 4 << 20 and most < 3 * len(data) + (12 << 20)


def test_what_nobody_would_read_is_not_written() -> None:
    """Too long, too many channels, too many groups: the message has the numbers, the hint a way."""
    with pytest.raises(ProfileError, match="1024 channels in 16 bins and 90 groups takes") as long:
        wide(1024, bins=16, groups=90).to_json()
    assert "fewer bins" in long.value.hint
    with pytest.raises(ProfileError, match="1025 channels are more than the 1024"):
        wide(1025, bins=16, groups=2).to_json()
    with pytest.raises(ProfileError, match="257 groups are more than the 256"):
        wide(1, bins=16, groups=GROUPS_MAX + 1).to_json()


def test_devices_join_as_groups(people: People) -> None:
    """Their counts are added; the confidence knows nothing of them, nor does the accuracy."""
    base = people.profile(3)
    early, late = (people.counts(base, people.windows(9, 40)) for _ in range(2))
    found = with_devices(base, {"wrist-09": (early[:3], late[:3])})
    assert found.groups == ("0", "1", "2", "wrist-09")
    assert found.labelled == (*base.labelled, 0) and found.correct == (*base.correct, 0)
    for i in range(3):
        assert found.features[i].edges == base.features[i].edges
        assert found.features[i].trained[3] == tuple(early[i])
        assert found.features[i].held[3] == tuple(late[i])
        assert np.subtract(found.features[i].counts, base.features[i].counts).tolist() == early[i]
    assert found.features[3].counts == base.features[3].counts
    assert found.projection is not None and base.projection is not None
    assert found.projection.trained_rows == (*base.projection.trained_rows, 0)
    assert (found.projection.held__gf()[:3] == base.projection.held__gf()).all()
    assert not found.projection.held__gf()[3].any()
    assert sum(found.features[3].trained[3]) == sum(found.features[3].held[3]) == 0
    assert ReferenceProfile.from_json(found.to_json()) == found
    assert with_devices(base, {}) == base
    old = ReferenceProfile.from_json((GOLDEN / "profile_v1.json").read_bytes())
    assert with_devices(old, {"wrist-09": (early[:3], late[:3])}).version == 1


def test_devices_that_do_not_fit_are_refused(people: People) -> None:
    """Other bins, fewer channels, a name that is taken, too many."""
    base = people.profile(3)
    good = [list(each.counts) for each in base.features[:3]]
    for bad in (good[:2], [*good[:2], [1, 2]]):
        with pytest.raises(ValueError, match="bins"):
            with_devices(base, {"x": (bad, good)})
    with pytest.raises(ProfileError, match="share a name"):
        with_devices(base, {"2": (good, good)})
    with pytest.raises(ProfileError, match="more than"):
        with_devices(base, {f"x{i}": (good, good) for i in range(GROUPS_MAX)})
