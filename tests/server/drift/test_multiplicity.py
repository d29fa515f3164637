"""Discoveries among many: vectors, properties against the definitions, and simulated control."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.server.drift import multiplicity
from shoal.server.drift.multiplicity import bh, by, e_bh, hierarchy

SHARES = st.floats(0.01, 0.5)
P_VALUES = st.lists(st.floats(0, 1), max_size=30)
E_VALUES = st.lists(st.floats(0, 1e6) | st.just(math.inf), max_size=30)

# Benjamini, Hochberg (1995), section 4: 15 comparisons, four of which stand at 0.05
BH_1995 = [
    *(0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240),
    *(0.4262, 0.5719, 0.6528, 0.7590, 1.0000),
]


def test_benjamini_and_hochberg_find_what_they_published() -> None:
    """Their own example; Bonferroni finds three."""
    assert bh(BH_1995, 0.05).tolist() == [True] * 4 + [False] * 11
    assert by(BH_1995, 0.05).tolist() == [True] * 3 + [False] * 12


@given(P_VALUES, SHARES)
def test_bh_is_its_definition(values: list[float], share: float) -> None:
    """The largest k with p(k) <= k share / N; all up to p(k) stand."""
    count = len(values)
    ks = [k for k in range(1, count + 1) if sorted(values)[k - 1] <= k * share / count]
    limit = sorted(values)[max(ks) - 1] if ks else -1.0
    assert bh(values, share).tolist() == [each <= limit for each in values]


@given(P_VALUES, SHARES)
def test_by_is_bh_at_a_smaller_share(values: list[float], share: float) -> None:
    """Divided by 1 + 1/2 + … + 1/N."""
    harmonic = max(1.0, sum(1 / k for k in range(1, len(values) + 1)))
    assert by(values, share).tolist() == bh(values, share / harmonic).tolist()


@given(E_VALUES, SHARES)
def test_e_bh_is_its_definition(values: list[float], share: float) -> None:
    """The largest k with e(k) >= N / (k share), e sorted downwards."""
    found = e_bh(values, share)
    count, stood = len(values), int(found.sum())
    # self-consistent: every discovery is large enough for their number, and no more would be
    assert all(1 / e <= stood * share / count for e, f in zip(values, found, strict=True) if f)
    down = sorted(values, reverse=True)
    for k in range(stood + 1, count + 1):
        assert down[k - 1] == 0 or 1 / down[k - 1] > k * share / count


@given(st.permutations(range(12)), st.integers(0, 2**32 - 1))
def test_order_does_not_matter(order: list[int], seed: int) -> None:
    """Discoveries go with their values."""
    values = np.random.default_rng(seed).random(12) ** 4
    assert bh(values[order], 0.2).tolist() == bh(values, 0.2)[order].tolist()
    assert e_bh(1 / values[order], 0.2).tolist() == e_bh(1 / values, 0.2)[order].tolist()


def test_nothing_is_found_in_nothing() -> None:
    """An empty fleet, and one without evidence."""
    assert not bh([], 0.1).size and not e_bh([], 0.1).size
    assert not e_bh([0.0, 1.0, 1.0], 0.1).any()
    assert e_bh([math.inf, 0.0], 0.1).tolist() == [True, False]
    assert not hierarchy(np.empty((0, 3)), 0.1).devices__d.size


def test_hierarchy_names_devices_and_what_changed_in_them() -> None:
    """A device of weak but many signs is found; a feature only within a device that is."""
    values = np.ones((20, 4))
    values[3, 1] = 5000.0
    values[7] = 300.0
    values[9, 0] = 30.0  # strong enough for a feature alone, not for one of 80
    found = hierarchy(values, 0.1)
    assert np.flatnonzero(found.devices__d).tolist() == [3, 7]
    assert [tuple(each) for each in np.argwhere(found.features__df)] == [
        *((3, 1), (7, 0), (7, 1), (7, 2), (7, 3)),
    ]


@given(st.integers(0, 2**32 - 1), SHARES)
def test_no_feature_without_its_device(seed: int, share: float) -> None:
    """Whatever the values."""
    rng = np.random.default_rng(seed)
    values = np.exp(rng.normal(0, 4, (rng.integers(1, 8), rng.integers(1, 6))))
    found = hierarchy(values, share)
    assert not found.features__df[~found.devices__d].any()
    assert found.devices__d.tolist() == e_bh(values.mean(1), share).tolist()


def dependent(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Return e-values of mean 1 that all depend on one common factor."""
    common = rng.normal(0, 1)
    own = 0.8 * common + 0.6 * rng.normal(0, 1, shape)
    return np.exp(2 * own - 2)


def test_false_share_keeps_its_bound_under_dependence() -> None:
    """Simulated: a common factor in all streams, a tenth of the devices changed."""
    rng = np.random.default_rng(3)
    share, flat, devices, features, found = 0.2, [], [], [], 0
    for _ in range(2000):
        values = dependent(rng, (20, 5))
        values[:2] *= 400.0
        null = np.ones((20, 5), np.bool_)
        null[:2] = False
        stood = e_bh(values.ravel(), share)
        flat.append((stood & null.ravel()).sum() / max(1, stood.sum()))
        both = hierarchy(values, share)
        devices.append(both.devices__d[2:].sum() / max(1, both.devices__d.sum()))
        each = (both.features__df & null).sum(1) / np.maximum(1, both.features__df.sum(1))
        features.append(each[both.devices__d].sum() / max(1, both.devices__d.sum()))
        found += int(both.devices__d[:2].sum())
    assert np.mean(flat) <= share and np.mean(devices) <= share and np.mean(features) <= share
    assert found > 2000  # of 4000: the bound is not kept by finding nothing


@pytest.mark.parametrize("rule", [bh, by])
@pytest.mark.parametrize("bad", [[-0.1], [1.1], [math.nan], [[0.5]]])
def test_refuses_what_is_no_p_value(
    rule: Callable[[object, float], multiplicity.Mask], bad: object
) -> None:
    """A NaN must not pass for evidence, or for none."""
    with pytest.raises(ValueError, match="p-values"):
        rule(bad, 0.1)


@pytest.mark.parametrize("bad", [[-0.1], [math.nan], [[2.0]]])
def test_refuses_what_is_no_e_value(bad: object) -> None:
    """As above."""
    with pytest.raises(ValueError, match="e-values"):
        e_bh(bad, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hierarchy"):
        hierarchy([1.0], 0.1)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, math.nan])
def test_refuses_a_share_that_is_none(share: float) -> None:
    """0 finds nothing, 1 bounds nothing."""
    for rule in (bh, by, e_bh):
        with pytest.raises(ValueError, match="share"):
            rule([0.5], share)
