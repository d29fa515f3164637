"""The reference profile: what it counts, and that nothing malformed gets in."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.server.drift.errors import ProfileError
from shoal.server.drift.profile import (
    BYTES_MAX,
    GROUPS_MAX,
    ReferenceProfile,
    build,
    with_devices,
)

from .conftest import CHANNELS, SAMPLES, People

VALID = People(np.random.default_rng(0)).profile(3).to_json()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def changed(path: tuple[str | int, ...], value: Any) -> bytes:
    """Return the valid profile with one value replaced."""
    raw = json.loads(VALID)
    at = raw
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(raw).encode()


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
        (("version",), 2),
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
        (("features", 0, "held", 2), None),
        (("features", 0, "held", 2, 0), "1"),
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


def test_too_large_a_profile_is_not_written(people: People) -> None:
    """What nobody would read is not sent."""
    found = ReferenceProfile.from_json(VALID)
    wide = ReferenceProfile(
        found.features * 800, found.groups, found.labelled, found.correct, SAMPLES
    )
    with pytest.raises(ProfileError, match="exceeds"):
        wide.to_json()


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
    assert sum(found.features[3].trained[3]) == sum(found.features[3].held[3]) == 0
    assert ReferenceProfile.from_json(found.to_json()) == found
    assert with_devices(base, {}) == base


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
