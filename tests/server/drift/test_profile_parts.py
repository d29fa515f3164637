"""What version 2 of the profile added: range, nulls, quantiles, items, confidence, projection.

Properties against NumPy on data that is bad, discrete, or tied together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from numpy.typing import NDArray

from shoal.agent.profile import DeviceProfile
from shoal.ext.projection import RandomFeatures
from shoal.server.drift import profile_confidence, profile_feature
from shoal.server.drift.profile import FeatureProfile, ReferenceProfile, build

Floats = NDArray[np.float32]


def measured(
    values: Any, *, kind: str = "float", name: str = "a", bins: int = 16
) -> FeatureProfile:
    """Return the feature of values, without groups."""
    array = np.asarray(values, np.float32)
    return profile_feature.measure(array, name="a", kind=kind, bins=16, trained=[], held=[])


def built(x__nct: Floats, **arguments: Any) -> ReferenceProfile:
    """Return a profile of windows: two groups, every fourth window held out."""
    n = len(x__nct)
    given: dict[str, Any] = {
        "channels": [f"c{i}" for i in range(x__nct.shape[1])],
        "held__n": np.arange(n) % 4 == 3,
    }
    given |= arguments
    return build(
        x__nct, np.linspace(0, 1, n, dtype=np.float32), np.ones(n, bool), np.arange(n) % 2, **given
    )


# --- features ----------------------------------------------------------------------------------


def test_moments_range_and_nulls_are_those_of_the_values() -> None:
    """Nulls are counted apart; the range is wider than a healthy sensor's next extreme."""
    rng = np.random.default_rng(3)
    x = rng.normal(5, 2, 20_000).astype(np.float32)
    x[:500] = np.nan
    found, values = measured(x), x[500:].astype(np.float64)
    assert (found.values, found.nulls, found.null_rate) == (19_500, 500, 0.025)
    assert found.mean == pytest.approx(values.mean()) and sum(found.counts) == 19_500
    assert found.variance == pytest.approx(values.var())
    assert (found.minimum, found.maximum) == (values.min(), values.max())
    # The inner 99.8 % of a normal are 6.18 sigma wide; half of that is added on each side.
    assert found.low == pytest.approx(5 - 2 * 6.18, abs=1)
    assert found.high == pytest.approx(5 + 2 * 6.18, abs=1)
    assert found.below == found.above == 0


def test_an_outlier_in_the_training_data_does_not_widen_the_range() -> None:
    """It is out of range itself, and counted as that; infinities too, and they move no moment."""
    x = np.random.default_rng(3).normal(0, 1, 10_000).astype(np.float32)
    good = measured(x)
    x[:5] = 1e30, 3e38, np.inf, -np.inf, -1e20
    found = measured(x)
    assert found.low == pytest.approx(good.low, abs=0.5)
    assert (found.below, found.above, found.values) == (2, 3, 10_000)
    assert found.maximum == np.float32(3e38) and np.isfinite(found.mean)
    assert sum(found.counts) == 10_000 and all(np.isfinite(found.edges))


def test_a_mostly_constant_channel_has_its_extremes_as_range() -> None:
    """A rain gauge: nearly always 0, and no rain is not out of range."""
    x = np.zeros(10_000, np.float32)
    x[:3] = 7
    found = measured(x)
    assert (found.low, found.high, found.below, found.above) == (0, 7, 0, 0)


@pytest.mark.parametrize(
    "values",
    [[0.0], [-0.0, 0.0], [1e-45, 2e-45], [3e38, -3e38], [np.nan, 1.0], [2**24, 2**24 + 2]],
)
def test_small_and_extreme_samples_survive_json(values: list[float]) -> None:
    """One value, denormals, the whole range of float32: what is written is read."""
    x = np.resize(np.array(values, np.float32), (40, 1, 2))
    found = built(x)
    assert ReferenceProfile.from_json(found.to_json()) == found
    device = DeviceProfile.from_json(found.to_json(), features=2)
    assert device.low__d[0] == np.float32(found.features[0].low)


@settings(deadline=None, max_examples=100)
@given(
    st_np.arrays(
        np.float32,
        st.integers(1, 400),
        elements=st.floats(-100, 100, width=32) | st.sampled_from([0.0, 1.0, 50.0]),
    )
)
def test_the_quantiles_keep_their_bound(values: Floats) -> None:
    """Nowhere is the summary's distribution further off than 1/256 + 1/n."""
    found = measured(values)
    points = np.array(found.quantiles)
    assert found.values == len(values) and (np.diff(points) >= 0).all()
    at = np.concatenate([values, points, [-101, 101]]).astype(np.float64)
    exact = (values[None] <= at[:, None]).mean(1)
    summary = (points[None] <= at[:, None]).mean(1)
    bound = profile_feature.QUANTILES_ERROR + 1 / len(values)
    assert np.abs(exact - summary).max() <= bound + 1e-9
    assert set(points) <= set(values.astype(np.float64))


@pytest.mark.parametrize("kind", ["integer", "category"])
def test_codes_are_counted_each(kind: str) -> None:
    """A bin for each code, the most frequent items first, exact range."""
    x = np.repeat([3, -1, 7, 9], [5, 20, 5, 1]).astype(np.float32)
    found = measured(np.append(x, np.nan), kind=kind)
    assert [count for count in found.counts if count] == [20, 5, 5, 1]
    assert found.items == ((-1, 20), (3, 5), (7, 5), (9, 1)) and found.other == 0
    assert (found.low, found.high, found.nulls) == (-1, 9, 1)


def test_a_code_that_training_never_saw_is_in_a_bin_that_was_empty() -> None:
    """Of a category: below, in each gap, beyond. A count has neighbours, and shares theirs."""
    x = np.repeat([3, -1, 7, 8], [5, 20, 5, 1]).astype(np.float32)
    found = measured(x, kind="category")
    assert found.edges == (-1, 0, 3, 4, 7, 8, 9)
    assert found.counts == (0, 20, 0, 5, 0, 5, 1, 0) and not found.ordered
    edges = np.array(found.edges, np.float32)
    for code in (-2, -1, 0, 2, 3, 4, 6, 7, 8, 9, 1000):
        counted = profile_feature.histogram(np.array([code], np.float32), edges)
        assert (found.counts[counted.index(1)] == 0) == (code not in x)
    assert measured(x, kind="integer").edges == (3, 7, 8) and measured(x, kind="integer").ordered


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-(2**24), 2**24), min_size=1, max_size=60),
    st.sampled_from(["integer", "category"]),
    st.integers(2, 256),
)
def test_codes_never_take_more_bins_than_there_may_be(
    codes: list[int], kind: str, bins: int
) -> None:
    """And a device reads every profile of them."""
    x = np.resize(np.array(codes, np.float32), (40, 1, 2))
    found = built(x, kinds=[kind], bins=bins)
    feature = found.features[0]
    assert 2 <= len(feature.counts) <= bins and sum(feature.counts) == 60
    assert ReferenceProfile.from_json(found.to_json()) == found
    assert DeviceProfile.from_json(found.to_json(), features=2).kinds[0] == kind


def test_many_codes_are_bounded() -> None:
    """Beyond 64 items the rest is ``other``; beyond ``bins`` codes the bins are quantiles."""
    x = np.arange(200).repeat(2).astype(np.float32)
    x = np.append(x, [150.0] * 3).astype(np.float32)
    found = measured(x, kind="category")
    assert found.items[0] == (150, 5) and len(found.items) == profile_feature.ITEMS_MAX
    assert found.items[1:3] == ((0, 2), (1, 2)) and found.other == 403 - 5 - 63 * 2
    assert len(found.counts) == 16 and max(found.counts) < 35
    assert measured(x).items == () and measured(x).other == 0


@pytest.mark.parametrize("bad", [0.5, np.inf, 2.0**60])
def test_what_is_no_code_is_refused(bad: float) -> None:
    """A fraction, an infinity, a number that no int64 of a frequent-items sketch means."""
    with pytest.raises(ValueError, match="channel a is of kind integer"):
        measured([1.0, bad], kind="integer")


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 1.0, np.nan]), st.sampled_from([1, 2, 150, 199, 200, 201, 450])
        ),
        max_size=8,
    )
)
def test_stuck_values_are_those_in_long_runs(runs: list[tuple[float, int]]) -> None:
    """Counted one by one: 200 equal values, over the ends of windows; a null equals nothing."""
    flat = [value for value, size in runs for _ in range(size)]
    stuck, run = 0, 0
    for before, value, after in zip([np.nan, *flat], flat, [*flat[1:], np.nan], strict=False):
        run = run + 1 if value == before else 1
        if run >= profile_feature.STUCK_MIN and value != after:
            stuck += run
    values = np.array(flat, np.float32).reshape(-1, 1)
    found = profile_feature.measure(
        np.append(values, np.ones((1, 1), np.float32), 0),
        name="a", kind="float", bins=16, trained=[values, values[:0]], held=[],
    )  # fmt: skip
    assert found.stuck == stuck


def test_each_group_is_stuck_by_itself() -> None:
    """Two people who rest at the same value are no longer run; the confidence is not asked."""
    x = np.random.default_rng(0).normal(size=(40, 1, 50)).astype(np.float32)
    x[8:14] = 0  # 150 values of one group's training data, 100 of the other's
    found = built(x)
    assert [each.stuck for each in found.features] == [0, None]
    x[8:20] = 0
    assert built(x, held__n=np.arange(40) >= 20).features[0].stuck == 600
    assert ReferenceProfile.from_json(found.to_json()) == found


def test_one_code_makes_one_edge() -> None:
    """As for a constant: below, and from there on."""
    found = measured([4.0, 4.0], kind="integer")
    assert found.edges == (4,) and found.counts == (0, 2) and found.items == ((4, 2),)


# --- confidence --------------------------------------------------------------------------------


def test_the_tables_say_how_right_the_model_was() -> None:
    """Each answer is in one cell: its class, its decile, right or wrong."""
    rng = np.random.default_rng(0)
    confidence = rng.beta(8, 2, 5000).astype(np.float32)
    correct, predicted = rng.random(5000) < confidence, rng.integers(0, 3, 5000)
    found = profile_confidence.measure(confidence, correct, predicted, classes=4)
    decile = np.searchsorted(np.array(found.deciles, np.float32), confidence, side="right")
    for k in range(4):
        for d in range(10):
            here = (predicted == k) & (decile == d)
            assert found.right[k][d] == (here & correct).sum()
            assert found.wrong[k][d] == (here & ~correct).sum()
    assert found.classes == 4
    wrong, right = np.sum(found.wrong, 0), np.sum(found.right, 0)
    assert (wrong + right).sum() == 5000 and set(wrong + right) <= {499, 500, 501}
    shares = right / (wrong + right)
    assert shares[0] < 0.6 and shares[9] > 0.9  # surer is righter, as it was drawn


def test_a_model_that_is_always_sure_has_one_decile() -> None:
    """Equal edges make empty deciles, and the last one has all; 1 + 2**-23 is 1."""
    confidence = np.full(20, np.float32(1.0000001))
    found = profile_confidence.measure(
        confidence, np.ones(20, bool), np.zeros(20, np.int64), classes=1
    )
    assert found.deciles == (1.0,) * 9 and found.right == ((0,) * 9 + (20,),)


def test_the_confidence_is_of_held_out_windows() -> None:
    """The tables hold each of them once: on its training data a model is surer."""
    found = built(np.random.default_rng(0).normal(0, 1, (80, 2, 4)).astype(np.float32))
    assert found.confidence is not None
    answers = np.add(found.confidence.right, found.confidence.wrong).sum()
    assert answers == sum(found.labelled) == 20
    assert found.features[-1].values == 20 and found.features[-1].high == 1


# --- projection --------------------------------------------------------------------------------


def tied(rng: np.random.Generator, n: int, *, correlation: float) -> Floats:
    """Return windows of two channels whose own distributions are the same for any correlation."""
    a, b = rng.standard_normal((2, n, 20))
    c = correlation * a + np.sqrt(1 - correlation**2) * b
    return np.stack([a, c], 1).astype(np.float32)


def test_means_are_those_of_the_kernel_in_numpy() -> None:
    """Of all training rows, and of each group's training and held-out rows; bad rows left out."""
    x = np.random.default_rng(4).normal(3, 2, (80, 3, 40)).astype(np.float32)
    x[0, 1, 0], x[5, 2, 3], x[3, 0, 6] = np.nan, np.inf, np.nan
    found = built(x).projection
    assert found is not None and found.stride == 3 and found.features == 64
    weights = np.frombuffer(found.weights, "<f2").astype(float).reshape(64, 3)
    mean, scale, phases = (
        np.frombuffer(each, "<f4").astype(float) for each in (found.mean, found.scale, found.phases)
    )
    assert mean == pytest.approx([3, 3, 3], abs=0.2) and scale == pytest.approx([2] * 3, abs=0.2)
    trained__gf = np.frombuffer(found.trained, "<f2").astype(float).reshape(-1, 64)
    held = np.arange(80) % 4 == 3
    for windows, means, rows in (
        (~held, found.means__f(), found.rows),
        (~held & (np.arange(80) % 2 == 0), trained__gf[0], found.trained_rows[0]),
        (held & (np.arange(80) % 2 == 1), found.held__gf()[1], found.held_rows[1]),
    ):
        z = (x[windows][:, :, ::3].transpose(0, 2, 1).reshape(-1, 3).astype(float) - mean) / scale
        z = z[np.isfinite(z).all(1)]
        assert rows == len(z) and means == pytest.approx(
            np.cos(z @ weights.T + phases).mean(0), abs=6e-4
        )
    # Every window of group 0 is trained on: its held-out part has no row.
    assert found.held_rows[0] == 0 and not found.held__gf()[0].any()


def test_the_device_sums_what_the_server_expects() -> None:
    """The projection that a device reads gives the sums that the reference was made with."""
    x = np.random.default_rng(4).normal(3, 2, (80, 3, 40)).astype(np.float32)
    found = built(x)
    device = DeviceProfile.from_json(found.to_json(), features=4).projection
    assert device is not None and found.projection is not None
    kernel = RandomFeatures(device.weights__fc, device.phases__f, device.mean__c, device.scale__c)
    kernel.add_channels(x[np.arange(80) % 4 != 3], stride=device.stride)
    sums, rows = kernel.read()
    assert rows == found.projection.rows
    assert sums / rows == pytest.approx(found.projection.means__f(), abs=1e-6)


def test_a_broken_tie_shows_where_no_histogram_does() -> None:
    """Correlation .9 -> 0: the distance of means is 100 times that of an unchanged sample."""
    rng = np.random.default_rng(8)
    profile = built(tied(rng, 2000, correlation=0.9))
    device = DeviceProfile.from_json(profile.to_json(), features=3).projection
    found = profile.projection
    assert device is not None and found is not None
    apart = []
    for correlation in (0.9, 0.0):
        kernel = RandomFeatures(
            device.weights__fc, device.phases__f, device.mean__c, device.scale__c
        )
        kernel.add_channels(tied(rng, 500, correlation=correlation), stride=found.stride)
        sums, rows = kernel.read()
        apart.append(float(np.square(sums / rows - found.means__f()).sum()))
        unchanged = found.variances__f().sum() * (1 / rows + 1 / found.rows)
    assert apart[0] < 5 * unchanged and apart[1] > 100 * apart[0]
    # Effective degrees of freedom lie between one and the number of features.
    freedom = found.variances__f().sum() ** 2 / found.covariance_square
    assert 1 <= freedom <= 64


def test_a_channel_that_no_longer_goes_with_a_category_shows() -> None:
    """Codes take part as numbers: each channel by itself is as ever, together they are not."""
    rng = np.random.default_rng(8)
    gear = rng.choice([0, 1, 2, 5], (2000, 20))
    heat = gear.astype(bool) + rng.normal(0, 0.3, gear.shape)
    together = np.stack([heat, gear], 1).astype(np.float32)
    apart = np.stack([rng.permuted(heat), gear], 1).astype(np.float32)
    found = built(together, kinds=["float", "category"]).projection
    assert found is not None
    kernel = RandomFeatures(
        np.frombuffer(found.weights, "<f2").astype(np.float32).reshape(64, 2),
        *(np.frombuffer(each, "<f4") for each in (found.phases, found.mean, found.scale)),
    )
    far = []
    for x in (together, apart):
        kernel.reset()
        kernel.add_channels(x[:500], stride=found.stride)
        sums, rows = kernel.read()
        far.append(float(np.square(sums / rows - found.means__f()).sum()))
    assert far[1] > 50 * far[0]


@pytest.mark.parametrize(("samples", "stride", "rows"), [(1, 1, 1), (16, 1, 16), (17, 2, 9)])
def test_a_window_gives_at_most_16_rows(samples: int, stride: int, rows: int) -> None:
    """One for a model that takes single rows."""
    x = np.random.default_rng(0).normal(0, 1, (40, 2, samples)).astype(np.float32)
    found = built(x).projection
    assert found is not None and (found.stride, found.rows) == (stride, 30 * rows)


def test_a_constant_or_broken_channel_can_be_projected() -> None:
    """A constant has scale 1; a channel with outliers keeps the scale of the rest."""
    x = np.random.default_rng(0).normal(0, 1, (2000, 3, 2)).astype(np.float32)
    x[:, 1] = 5
    x[0, 2] = 1e30
    found = built(x)
    assert found.projection is not None
    scale = np.frombuffer(found.projection.scale, "<f4")
    assert scale[1] == 1 and scale[2] == pytest.approx(1, abs=0.1)
    assert ReferenceProfile.from_json(found.to_json()) == found


def test_all_rows_alike_have_a_bandwidth() -> None:
    """No distance to take the median of: 1, and the weights stay in bounds."""
    found = built(np.full((40, 2, 3), 5, np.float32)).projection
    assert found is not None and found.bandwidth == 1 and found.covariance_square < 1e-20


def test_what_cannot_be_projected_is_not() -> None:
    """Channels that never have a value at the same time, or no features asked for."""
    x = np.random.default_rng(0).normal(0, 1, (40, 2, 4)).astype(np.float32)
    assert built(x, projected=0).projection is None
    x[::2, 0], x[1::2, 1] = np.nan, np.nan
    found = built(x)
    assert found.projection is None
    assert ReferenceProfile.from_json(found.to_json()) == found
    assert DeviceProfile.from_json(found.to_json(), features=3).projection is None
