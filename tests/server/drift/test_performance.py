"""Figures of late labels, of scores and of confidence: golden values, coverage, laws. Seeded."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.server.drift.performance import (
    ExpectedAccuracy,
    calibration,
    classification,
    expected_accuracy,
    ranking,
    wilson,
)

Array = NDArray[np.float64]
tables = st.integers(2, 5).flatmap(
    lambda c: st.lists(st.lists(st.integers(0, 60), min_size=c, max_size=c), min_size=c, max_size=c)
)
WILSON = [  # (right, total, confidence, low, high)
    (0, 10, 0.95, 0.0, 0.27753279986288926),
    (3, 10, 0.95, 0.10779126740630102, 0.6032218525388546),
    (10, 10, 0.99, 0.6011459066950919, 1.0),
    (456, 500, 0.95, 0.8839235279346098, 0.933794015525071),
    (1, 1, 0.9, 0.2698659487840541, 1.0),
]
AREA = 0.8559523809523809
LEVELS = (np.arange(10) + 0.5) / 10


# --- late labels ------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "total", "confidence", "low", "high"), WILSON)
def test_wilson_against_stored_values(
    right: int, total: int, confidence: float, low: float, high: float
) -> None:
    """Values of scipy 1.17.1, stats.binomtest(...).proportion_ci(method="wilson")."""
    found = wilson(right, total, confidence=confidence)
    assert float(found.estimate) == right / total
    assert float(found.low) == pytest.approx(low, rel=1e-9, abs=1e-15)
    assert float(found.high) == pytest.approx(high, rel=1e-9)


def test_a_worked_table() -> None:
    """Three classes, by hand; the last was neither true nor predicted in the second table."""
    found = classification([[[40, 10, 0], [5, 30, 5], [0, 2, 8]], [[3, 1, 0], [0, 4, 0], [0] * 3]])
    assert found.labelled.tolist() == [100, 8]
    assert found.accuracy.estimate == pytest.approx([0.78, 7 / 8])
    assert found.precision.estimate[0] == pytest.approx([40 / 45, 30 / 42, 8 / 13])
    assert found.recall.estimate[0] == pytest.approx([0.8, 0.75, 0.8])
    assert found.f1.estimate[0] == pytest.approx([80 / 95, 60 / 82, 16 / 23])
    assert float(found.f1_macro.estimate[0]) == pytest.approx((80 / 95 + 60 / 82 + 16 / 23) / 3)
    assert np.isnan(found.recall.estimate[1, 2]) and np.isnan(found.f1.low[1, 2])
    assert found.recall_macro.estimate[1] == pytest.approx((0.75 + 1) / 2)
    # MOVER by hand: two classes of the second table
    one, two = wilson(3, 4), wilson(4, 4)
    down = math.hypot(0.75 - float(one.low), 1 - float(two.low)) / 2
    assert found.recall_macro.low[1] == pytest.approx(0.875 - down)
    nothing = classification(np.zeros((2, 2)))
    assert np.isnan(nothing.accuracy.estimate) and np.isnan(nothing.f1_macro.low)
    never = classification([[0, 5], [0, 5]])  # a true class that is never predicted has precision 0
    assert float(never.precision_macro.estimate) == 0.25


def test_intervals_cover() -> None:
    """95 % intervals of accuracy, recall, F1 and macro means, 200 labels, 4,000 tables."""
    rng = np.random.default_rng(3)
    joint = np.array([[0.4, 0.06, 0.04], [0.05, 0.25, 0.02], [0.01, 0.04, 0.13]])
    drawn = rng.multinomial(200, joint.ravel(), 4000).reshape(-1, 3, 3)
    found = classification(drawn)
    hit, true, said = np.diag(joint), joint.sum(1), joint.sum(0)
    f1 = 2 * hit / (true + said)
    pairs = [
        (found.accuracy, hit.sum()), (found.precision, hit / said), (found.recall, hit / true),
        (found.f1, f1), (found.recall_macro, (hit / true).mean()), (found.f1_macro, f1.mean()),
        (found.precision_macro, (hit / said).mean()),
    ]  # fmt: skip
    for share, value in pairs:
        covered = ((share.low <= value) & (value <= share.high)).mean(0)
        assert ((covered > 0.93) & (covered < 0.985)).all()


@settings(deadline=None, max_examples=60)
@given(tables)
def test_laws_of_tables(table: list[list[int]]) -> None:
    """Bounds enclose estimates; transposing exchanges precision and recall; F1 lies between."""
    found, other = classification(table), classification(np.transpose(table))
    for share in (found.accuracy, found.precision, found.recall, found.f1, found.f1_macro):
        known = ~np.isnan(share.estimate)
        values = [np.atleast_1d(each[known]) for each in (share.low, share.estimate, share.high)]
        assert (values[0] >= 0).all() and (values[2] <= 1).all()
        assert (values[0] <= values[1] + 1e-12).all() and (values[1] <= values[2] + 1e-12).all()
    assert found.precision.estimate == pytest.approx(other.recall.estimate, nan_ok=True)
    assert found.f1.estimate == pytest.approx(other.f1.estimate, nan_ok=True)
    pair = np.stack([found.precision.estimate, found.recall.estimate])
    both = ~np.isnan(pair).any(0)
    assert (found.f1.estimate[both] <= pair[:, both].max(0) + 1e-12).all()
    assert (found.f1.estimate[both] >= pair[:, both].min(0) - 1e-12).all()


# --- scores -----------------------------------------------------------------------------------


def test_area_against_the_rank_test() -> None:
    """U / nm of scipy 1.17.1, stats.mannwhitneyu, on bins; DeLong's variance by its definition."""
    negative, positive = [5, 9, 4, 2, 0], [1, 2, 4, 6, 8]
    found = ranking(negative, positive)
    assert float(found.estimate) == pytest.approx(AREA, rel=1e-12)
    x, y = np.repeat(range(5), negative), np.repeat(range(5), positive)
    wins = (y[:, None] > x) + (y[:, None] == x) / 2
    variance = wins.mean(1).var(ddof=1) / len(y) + wins.mean(0).var(ddof=1) / len(x)
    # Placements over the class size minus 1, divided by the size: the same sum in shares.
    assert float(found.error) == pytest.approx(math.sqrt(variance), rel=1e-12)
    assert float(found.low) == pytest.approx((y[:, None] > x).mean())
    assert float(found.high) == pytest.approx((y[:, None] >= x).mean())


def test_area_bounds_hold_and_its_error_covers() -> None:
    """Normal scores one deviation apart: area Phi(1 / sqrt 2) = 0.7602; 20 bins lose little."""
    rng = np.random.default_rng(4)
    edges = np.linspace(-2, 3, 19)
    covered = 0
    for _ in range(200):
        x, y = rng.standard_normal(150), rng.standard_normal(100) + 1
        counts = [
            np.histogram(each, np.concatenate([[-np.inf], edges, [np.inf]]))[0] for each in (x, y)
        ]
        found = ranking(*counts)
        exact = (y[:, None] > x).mean()
        assert found.low <= exact <= found.high and found.high - found.low < 0.12
        covered += bool(abs(found.estimate - 0.76025) <= 1.96 * found.error)
    assert covered >= 200 * 0.95 - 2.6 * math.sqrt(200 * 0.95 * 0.05)


def test_ranking_of_many_and_of_nothing() -> None:
    """One per row; NaN where a class has no score; mirrored classes mirror the area."""
    a = np.array([[3, 2, 1], [0, 0, 0], [4, 0, 0]])
    b = np.array([[1, 2, 3], [1, 1, 1], [0, 0, 4]])
    found, other = ranking(a, b), ranking(b, a)
    assert np.isnan(found.estimate).tolist() == [False, True, False]
    assert found.estimate[2] == 1 and found.error[2] == 0
    assert found.estimate[[0, 2]] == pytest.approx(1 - other.estimate[[0, 2]])


def test_calibration_by_hand() -> None:
    """Deciles 7 and 9; the rest is empty."""
    table = np.zeros((2, 10))
    table[:, 7], table[:, 9] = (40, 60), (3, 97)
    found = calibration(table)
    assert float(found.estimate) == pytest.approx((0.15 + 0.02) / 2)
    assert float(found.low) == pytest.approx((0.10 + 0.0) / 2)
    assert float(found.high) == pytest.approx((0.20 + 0.07) / 2)
    noise = sum(math.sqrt(2 * c * (1 - c) / (math.pi * 100)) for c in (0.75, 0.95)) / 2
    assert float(found.usual) == pytest.approx(noise)
    assert np.isnan(calibration(np.zeros((3, 2, 10))).estimate).all()


def test_deciles_may_be_those_of_the_reference() -> None:
    """Edges as a profile tells them, two of them equal; the unseen decile leans on its middle."""
    edges = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.95, 0.98, 0.99]
    table = np.zeros((2, 10))
    table[:, 0], table[:, 9] = (3, 1), (2, 98)
    found = calibration(table, edges=edges)
    shares = (4 / 104, 100 / 104)
    assert float(found.estimate) == pytest.approx(shares[1] * (0.995 - 0.98))
    assert float(found.low) == pytest.approx(shares[1] * 0.01)
    assert float(found.high) == pytest.approx(shares[0] * 0.25 + shares[1] * 0.02)
    seen = np.zeros((2, 10))
    seen[0, 7] = 10
    unseen = expected_accuracy(seen, table, edges=edges)
    assert float(unseen.estimate) == pytest.approx((0.95 + 0.98) / 2)


def test_usual_calibration_error_is_that_of_a_calibrated_model() -> None:
    """100 labels, 2,000 times."""
    rng = np.random.default_rng(5)
    sizes = rng.multinomial(100, np.linspace(0.02, 0.18, 10), 2000)
    right = rng.binomial(sizes, LEVELS)
    found = calibration(np.stack([sizes - right, right], 1))
    assert found.estimate.mean() == pytest.approx(found.usual.mean(), rel=0.08)
    assert (found.low <= found.estimate).all() and (found.estimate <= found.high).all()


# --- without labels ---------------------------------------------------------------------------

TRUTH = np.clip(LEVELS + np.array([[-0.05], [0.04], [-0.2]]), 0.02, 0.98)  # right share, C x D
MIX = np.outer([0.5, 0.3, 0.2], np.linspace(0, 0.2, 10) / np.linspace(0, 0.2, 10).sum())


def reference(rng: np.random.Generator, size: int = 4000) -> Array:
    """Return a reference's (wrong, right) counts, (3, 2, 10)."""
    sizes = rng.multinomial(size, MIX.ravel()).reshape(3, 10)
    right = rng.binomial(sizes, TRUTH)
    return np.stack([sizes - right, right], 1).astype(float)


def shifted(power: float) -> Array:
    """Return a mix that leans to the unsure deciles the more, the larger the power."""
    mix = MIX * (1.05 - LEVELS) ** power
    return np.asarray(mix / mix.sum())


def test_expected_accuracy_is_right_when_only_the_mix_changes() -> None:
    """Covariate shift: forecast within 1.96 errors of what the labels say in about 95 %."""
    rng = np.random.default_rng(6)
    for mix in (MIX, shifted(2)):
        covered, bias = 0, []
        for _ in range(300):
            seen = rng.multinomial(500, mix.ravel()).reshape(3, 10)
            found = expected_accuracy(seen, reference(rng))
            real = rng.binomial(seen, TRUTH).sum() / 500
            covered += bool(abs(real - found.estimate) <= 1.96 * found.error)
            bias.append(float(found.estimate) - (mix * TRUTH).sum())
        assert 0.91 <= covered / 300 <= 0.985
        assert abs(np.mean(bias)) < 0.005
    # The deciles' own confidence would be off by much more: the table says how sure is sure.
    assert (shifted(2) * LEVELS).sum() - (shifted(2) * TRUTH).sum() > 0.05


def test_p_values_without_and_with_a_shift() -> None:
    """Uniform in the tail under equal mixes; a mix that costs accuracy is found."""
    rng = np.random.default_rng(7)
    known = [reference(rng) for _ in range(40)]
    same = np.concatenate([expected_accuracy(draw(rng, MIX, 50), each).p_value for each in known])
    for level in (0.01, 0.05, 0.2):
        most = level * 1.15 + 2.6 * math.sqrt(level / len(same))
        assert (same <= level).mean() <= most
    assert (same <= 0.2).mean() > 0.15
    other = expected_accuracy(draw(rng, shifted(0.7), 200), known[0])
    assert (other.p_value < 1e-3).mean() > 0.9
    better = expected_accuracy(draw(rng, MIX * LEVELS / (MIX * LEVELS).sum(), 50), known[0])
    assert (better.p_value > 0.5).all()


def draw(rng: np.random.Generator, mix: Array, windows: int) -> NDArray[np.int64]:
    """Return the cells of windows of 400 answers, flat as a WINDOW carries them."""
    return rng.multinomial(400, mix.ravel(), windows)


def test_a_changed_concept_is_not_seen_and_labels_see_it() -> None:
    """What the docstring says it cannot do: the same cells, half as often right."""
    rng = np.random.default_rng(8)
    seen = rng.multinomial(500, MIX.ravel()).reshape(3, 10)
    found = expected_accuracy(seen, reference(rng))
    right = rng.binomial(seen, TRUTH / 2).sum()
    assert right / 500 < found.estimate - 10 * found.error
    assert float(wilson(right, 500).high) < found.reference and found.p_value > 0.01


def test_cells_by_hand() -> None:
    """Prior of two answers: cells lean on their decile, deciles on their middle."""
    known = np.zeros((2, 2, 10))
    known[0, :, 9], known[1, :, 9] = (10, 88), (0, 0)
    seen = np.zeros((2, 10))
    seen[0, 9], seen[1, 9], seen[1, 3] = 50, 25, 25
    found = expected_accuracy(seen, known)
    decile = (88 + 2 * 0.95) / 100
    first = (88 + 2 * decile) / 100
    assert float(found.estimate) == pytest.approx(0.5 * first + 0.25 * decile + 0.25 * 0.35)
    assert found.precision == pytest.approx([first, (decile + 0.35) / 2])
    assert found.reference == 88 / 98
    variance = [p * (1 - p) for p in (first, decile, 0.35)]
    chance = (0.5 * variance[0] + 0.25 * variance[1] + 0.25 * variance[2]) / 100
    doubt = 0.25 * variance[0] / 101 + (variance[1] + variance[2]) / 16 / 3
    assert float(found.error) == pytest.approx(math.sqrt(chance + doubt))


def test_one_table_for_all_classes_and_empty_windows() -> None:
    """(2, 10), flat scores, leading axes; no answers say nothing."""
    rng = np.random.default_rng(9)
    known = reference(rng)
    seen = rng.multinomial(300, MIX.ravel(), (2, 4))
    flat, table = (
        expected_accuracy(seen, known),
        expected_accuracy(seen.reshape(2, 4, 3, 10), known),
    )
    assert flat.estimate == pytest.approx(table.estimate) and flat.estimate.shape == (2, 4)
    assert flat.precision.shape == (2, 4, 3)
    together = expected_accuracy(seen, known.sum(0))
    assert together.reference == pytest.approx(flat.reference)
    assert (abs(together.estimate - flat.estimate) < 0.05).all()
    nothing: ExpectedAccuracy = expected_accuracy(np.zeros((3, 10)), known)
    assert np.isnan(nothing.estimate) and nothing.p_value == 1
    certain = np.zeros((2, 10))
    certain[1, 9] = 50  # all alike: no mix can be unlike another
    assert expected_accuracy(np.eye(2, 10), certain).p_value <= 1


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson(3, 2), lambda: wilson(-1, 2), lambda: wilson(1, math.inf),
        lambda: wilson(1, 2, confidence=1.0), lambda: wilson(1, 2, confidence=math.nan),
        lambda: classification([[1, 2]]), lambda: classification([[5]]),
        lambda: classification([[1, -2], [0, 1]]), lambda: classification([1, 2]),
        lambda: ranking([1, 2], [1]), lambda: ranking([], []), lambda: ranking(1, 2),
        lambda: ranking([1, math.nan], [1, 2]), lambda: calibration(np.ones((2, 9))),
        lambda: calibration(np.ones(10)), lambda: calibration(-np.ones((2, 10))),
        lambda: expected_accuracy(np.ones((3, 10)), np.zeros((2, 10))),
        lambda: expected_accuracy(np.ones((3, 10)), np.ones((2, 2, 10))),
        lambda: expected_accuracy(np.ones(25), np.ones((2, 10))),
        lambda: expected_accuracy(3, np.ones((2, 10))),
        lambda: expected_accuracy(np.ones((3, 10)), np.ones((2, 10)), edges=[0.1]),
        lambda: calibration(np.ones((2, 10)), edges=np.linspace(0.9, 0.1, 9)),
        lambda: calibration(np.ones((2, 10)), edges=np.linspace(0.1, 1.1, 9)),
        lambda: calibration(np.ones((2, 10)), edges=np.full(9, math.nan)),
        lambda: expected_accuracy(np.ones((3, 10)), np.ones((3, 3, 10))),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call: Callable[[], object]) -> None:
    """Shapes, signs, NaN, empty references, confidences."""
    with pytest.raises(
        ValueError, match=r"successes|counts|confidence|table|bins|scores|reference|edges"
    ):
        call()


def test_an_interval_holds_its_estimate() -> None:
    """Whatever rounding says of none or of all."""
    total = np.arange(1, 3000)
    for right in (np.zeros_like(total), total):
        share = wilson(right, total)
        assert (share.low <= share.estimate).all() and (share.estimate <= share.high).all()
        assert ((share.low == 0) | (share.high == 1)).all()
