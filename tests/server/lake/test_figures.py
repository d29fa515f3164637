"""All figures of a group, out of the lake: exact bins, sketches, late labels, scores."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from shoal.server.drift.statistics import chi_square

from .conftest import FEATURES, MIDNIGHT, MODEL, World

HOUR_MS = 3_600_000


@pytest.fixture
def told(make_world: Callable[..., World]) -> World:
    """Two sites, an hour of windows; the confidences of the north are low."""
    world = make_world()
    world.now_ms = MIDNIGHT + HOUR_MS
    world.device("d-1", site="north", hardware="pi4")
    world.device("d-2", site="south", hardware="pi4")
    for at in range(6):
        for name, scores in (("d-1", [60, *[0] * 9]), ("d-2", [6] * 10)):
            world.window(name, MIDNIGHT + at * 300_000, labelled=True, extra={"scores": scores})
    return world


def test_rows_have_every_figure(told: World) -> None:
    """Tests of bins, of sketches, nulls and ranges, equal to what the values say."""
    args = (MODEL, "site", MIDNIGHT, MIDNIGHT + HOUR_MS)
    found = told.lake.history.drift_table(*args, told.profile)
    json.dumps(found, allow_nan=False)
    assert len(found) == 2 * len(FEATURES)
    by_key = {(row["group"], row["feature"]): row for row in found}
    row = by_key["north", "speed"]
    values = np.concatenate([t.x__nd[:, 0] for t in told.told if t.site == "north"])
    seen = values[~np.isnan(values)]
    feature = told.profile.features[0]
    where = np.searchsorted(np.array(feature.edges, np.float32), seen, side="right")
    bins = np.bincount(where, minlength=len(feature.counts))
    want = float(chi_square(feature.counts, bins).p_value)
    assert row["chi_square"]["p_value"] == pytest.approx(want, rel=1e-2, abs=1e-6)
    assert row["null_share"]["estimate"] == pytest.approx(np.isnan(values).mean(), abs=1e-6)
    assert row["ks"]["sketch"] and row["ks"]["low"] <= row["ks"]["statistic"] <= row["ks"]["high"]
    assert row["wasserstein"]["low"] <= row["wasserstein"]["estimate"]
    # Confidences of the profile are uniform, those of these devices normal.
    assert by_key["north", "confidence"]["ks"]["p_value"] < 1e-6
    assert row["frequent"] is None


def test_models_are_assessed_by_group(told: World) -> None:
    """Late labels and scores of each site, beside the counts of its windows."""
    args = (MODEL, "site", MIDNIGHT, MIDNIGHT + HOUR_MS)
    north, south = told.lake.history.model_table(*args, told.profile)
    json.dumps([north, south], allow_nan=False)
    assert (north["group"], south["group"], north["windows"]) == ("north", "south", 6)
    confusion = np.sum([t.confusion for t in told.told if t.site == "north"], 0)
    accuracy = (confusion[0] + confusion[3]) / confusion.sum()
    assert north["accuracy"]["estimate"] == pytest.approx(accuracy, abs=1e-6)
    assert north["accuracy"]["labelled"] == confusion.sum()
    expected = [each["expected_accuracy"] for each in (north, south)]
    assert all(0 < each["estimate"] <= 1 for each in expected)
    assert north["mmd"] is None  # no device sent a projection
