"""All figures of a group against its reference: they see what changed, and are JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shoal.server.drift import comparison
from shoal.server.drift import profile as profiles
from shoal.server.drift.comparison import Observed, assess, compare
from shoal.server.drift.frequent_tests import FrequentCounts
from shoal.server.drift.profile_feature import FeatureProfile
from shoal.server.drift.quantile_tests import Quantiles

RNG = np.random.default_rng(3)


def made() -> profiles.ReferenceProfile:
    """Return the profile of a model with a float and an integer channel, and two classes."""
    n = 1200
    x = RNG.normal(size=(n, 2, 4)).astype(np.float32)
    x[:, 1] = RNG.integers(0, 5, (n, 4))
    sure = RNG.uniform(0.5, 1, n).astype(np.float32)
    right = RNG.random(n) < sure
    groups, held = np.repeat(np.arange(6), n // 6), np.tile([False, True], n // 2)
    return profiles.build(
        x, sure, right, groups, held, channels=("heat", "gear"), kinds=("float", "integer"),
        predicted__n=RNG.integers(0, 2, n), classes=2,
    )  # fmt: skip


PROFILE = made()
HEAT, GEAR = PROFILE.features[:2]


def seen(feature: FeatureProfile, values: Any, *, nulls: int = 0, items: bool = False) -> Observed:
    """Return what a group counted of values."""
    edges = np.array(feature.edges, np.float32)
    where = np.searchsorted(edges, np.asarray(values, np.float32), side="right")
    whole = {int(v): int((values == v).sum()) for v in np.unique(values)} if items else {}
    return Observed(
        n=len(values),
        nulls=nulls,
        below=int((values < feature.low).sum()),
        above=int((values > feature.high).sum()),
        bins=np.bincount(where, minlength=len(edges) + 1).astype(float),
        sketch=Quantiles(
            np.sort(values), np.ones(len(values)), 0.0, float(values.min()), float(values.max())
        ),
        frequent=FrequentCounts(whole, whole, len(values), 0) if items else None,
    )


def test_every_figure_sees_a_shift_and_none_sees_equality() -> None:
    """Two groups at once; each dict is JSON."""
    same, moved = compare(
        HEAT, [seen(HEAT, RNG.normal(size=3000)), seen(HEAT, RNG.normal(0.5, 1, 3000))]
    )
    json.dumps([same, moved], allow_nan=False)
    assert same["psi"] < 0.01 < 0.15 < moved["psi"]
    for name in ("hellinger", "jensen_shannon", "jensen_shannon_distance"):
        assert same[name] < 0.3 * moved[name]
    assert same["jensen_shannon_debiased"] < 0.002
    for test in ("chi_square", "ks"):
        assert moved[test]["p_value"] < 1e-6 < 1e-3 < same[test]["p_value"]
    assert moved["psi_p_value"] < 1e-6 < 1e-3 < same["psi_p_value"]
    assert moved["direction"] > 0.2 and abs(same["direction"]) < 0.06
    assert moved["ks"]["sketch"] and moved["ks"]["low"] <= moved["ks"]["statistic"]
    far = moved["wasserstein"]
    assert far["low"] <= far["estimate"] <= far["high"]
    assert far["estimate"] == pytest.approx(0.5, abs=0.1) and far["normalised"] > 0.25
    assert same["wasserstein"]["normalised"] < 0.05


def test_nulls_and_values_out_of_range_stand_beside_the_reference() -> None:
    """With Wilson's intervals."""
    values = np.concatenate([RNG.normal(size=90), np.full(10, 1e6)])
    (shown,) = compare(HEAT, [seen(HEAT, values, nulls=25)])
    assert shown["null_share"]["estimate"] == 0.2 and shown["null_share"]["reference"] == 0.0
    assert shown["null_share"]["low"] < 0.2 < shown["null_share"]["high"]
    assert shown["out_of_range_share"]["estimate"] >= 0.1


def test_categories_are_compared_by_item() -> None:
    """A gear that training never saw is new; one that never comes has vanished."""
    mix = RNG.choice([0, 1, 2, 3, 7], 800, p=[0.2, 0.2, 0.2, 0.2, 0.2]).astype(float)
    (shown,) = compare(GEAR, [seen(GEAR, mix, items=True)])
    assert GEAR.kind == "integer"
    assert [each["item"] for each in shown["frequent"]["new"]] == [7]
    assert [each["item"] for each in shown["frequent"]["vanished"]] == [4]
    assert shown["frequent"]["p_value"] < 1e-6


def test_codes_of_a_category_are_compared_without_an_order() -> None:
    """Bins and items see a mix that any numbering would show; what needs an order is None."""
    code = replace(GEAR, kind="category")
    mix = RNG.choice([0, 1, 2, 3, 4], 800, p=[0.6, 0.1, 0.1, 0.1, 0.1]).astype(float)
    observed = replace(seen(code, mix, items=True), distinct=(5.0, 5.0, 5.2))
    (shown,) = compare(code, [observed])
    assert shown["kind"] == "category"
    ordered = ("ks", "wasserstein", "direction", "out_of_range_share")
    assert [shown[name] for name in ordered] == [None] * 4
    assert shown["psi"] > 0.3 and shown["chi_square"]["p_value"] < 1e-6
    assert shown["frequent"]["p_value"] < 1e-6 and shown["frequent"]["largest"][0] == 0
    assert shown["distinct"] == {"estimate": 5.0, "low": 5.0, "high": 5.2, "reference": 5}
    (counted,) = compare(GEAR, [observed])
    assert counted["direction"] < -0.2 and counted["ks"]["p_value"] < 1e-6
    (more,) = compare(replace(GEAR, other=1, values=GEAR.values + 1), [observed])
    assert more["distinct"]["reference"] is None, "the reference lists not all it had"


def test_what_is_not_known_is_none() -> None:
    """No bins, no sketch, no value at all; and a reference of version 1."""
    (bare,) = compare(HEAT, [Observed(n=5, nulls=0)])
    assert bare["psi"] is None and bare["ks"] is None and bare["wasserstein"] is None
    (empty,) = compare(HEAT, [Observed(n=0, nulls=0, bins=np.zeros(len(HEAT.counts)))])
    assert empty["psi"] is None and empty["null_share"] is None
    old = replace(HEAT, quantiles=(), values=0, items=())
    (shown,) = compare(old, [seen(old, RNG.normal(size=100))])
    assert shown["psi"] is not None and shown["wasserstein"] is None
    assert not shown["ks"]["sketch"]
    assert compare(HEAT, []) == []


def test_bins_of_another_reference_are_refused() -> None:
    """They would be compared with what they are not."""
    with pytest.raises(ValueError, match="bins"):
        compare(HEAT, [Observed(n=3, nulls=0, bins=np.array([1.0, 2.0]))])


def test_a_model_is_assessed_with_and_without_labels() -> None:
    """Less sure answers make a lower expected accuracy; labels make all the rest."""
    sure = PROFILE.confidence
    assert sure is not None
    usual = assess(PROFILE, scores=np.add(sure.right, sure.wrong).ravel())
    low = np.zeros((2, 10), int)
    low[:, :2] = 200
    doubtful = assess(
        PROFILE,
        scores=low.ravel(),
        answers=(200, 160),
        confusion=[90, 10, 30, 70],
        calibration=np.stack([np.sum(sure.wrong, 0), np.sum(sure.right, 0)]).ravel(),
    )
    json.dumps(doubtful, allow_nan=False)
    at = usual["expected_accuracy"]
    assert at["estimate"] == pytest.approx(at["reference"], abs=0.01) and at["p_value"] > 0.1
    assert doubtful["expected_accuracy"]["estimate"] < at["reference"] - 0.05
    assert doubtful["expected_accuracy"]["p_value"] < 1e-3
    assert doubtful["accuracy"]["estimate"] == 0.8 and doubtful["accuracy"]["labelled"] == 200
    assert doubtful["accuracy"]["low"] < 0.8 < doubtful["accuracy"]["high"]
    assert 0.75 < doubtful["f1_macro"]["estimate"] < 0.85
    assert doubtful["calibration_error"]["low"] <= doubtful["calibration_error"]["estimate"]
    assert 0.5 < doubtful["confidence_auc"]["estimate"] < 0.9
    assert usual["accuracy"] is None and usual["mmd"] is None


def test_labels_of_many_classes_tell_the_accuracy() -> None:
    """Devices send no confusion of more than 64 classes, and how many were right all the same."""
    shown = assess(made(), answers=(50, 40))
    assert (shown["accuracy"]["estimate"], shown["accuracy"]["labelled"]) == (0.8, 50)
    assert shown["accuracy"]["low"] < 0.8 < shown["accuracy"]["high"] and shown["f1_macro"] is None


def test_a_projection_sees_what_changed() -> None:
    """The reference's own means are near, others far; damaged sums tell nothing."""
    reference = PROFILE.projection
    assert reference is not None
    rows = 500
    own = assess(PROFILE, projection=reference.means__f() * rows, projected=rows)["mmd"]
    far = assess(PROFILE, projection=np.zeros(reference.features), projected=rows)["mmd"]
    assert own["squared"] < far["squared"] and far["p_value"] < 1e-6 < own["p_value"]
    assert far["groups_p_value"] < own["groups_p_value"]
    assert assess(PROFILE, projection=[1.0, 2.0], projected=rows)["mmd"] is None
    assert assess(PROFILE, projection=np.full(reference.features, 1e9), projected=3)["mmd"] is None


@pytest.mark.parametrize("counts", [[], [1, 2, 3], [0] * 20, None])
def test_counters_that_do_not_fit_tell_nothing(counts: Any) -> None:
    """A device's mistake costs its own figures."""
    shown = assess(PROFILE, scores=counts, confusion=counts, calibration=counts)
    assert set(shown.values()) == {None}


def test_small_numbers_keep_their_power_of_ten() -> None:
    """A p-value of 1e-20 is not 0."""
    assert comparison._real(1.23456e-20) == 1.23e-20
    assert comparison._real(0.12345678) == 0.123457
    assert comparison._real(float("inf")) is None
