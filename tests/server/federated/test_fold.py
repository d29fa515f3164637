"""Properties and faults of the fold: order never matters, to the bit; attackers stay out."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from shoal.server.federated.errors import DeltaError
from shoal.server.federated.fold import BLOCK, Fold, FoldConfig

CONFIG = FoldConfig(deltas_max=64, weight_max=10_000, norm_max=64.0)

deltas = arrays.arrays(np.float32, 7, elements=st.floats(-20, 20, width=32, allow_subnormal=True))
parts = st.lists(st.tuples(deltas, st.integers(0, 20_000)), min_size=1, max_size=8)


def fold(given_: list[tuple[NDArray[np.float32], int]], config: FoldConfig = CONFIG) -> Fold:
    """Return the fold of the parts, in order."""
    found = Fold(len(given_[0][0]), config=config)
    for delta__p, weight in given_:
        found.update(delta__p, weight=weight)
    return found


def weighty(given_: list[tuple[NDArray[np.float32], int]]) -> list[tuple[NDArray[np.float32], int]]:
    """Return the parts with at least one that counts."""
    return [*given_, (np.ones(7, np.float32), 5)]


@settings(deadline=None)
@given(parts, st.randoms(use_true_random=False))
def test_the_order_never_matters(
    given_: list[tuple[NDArray[np.float32], int]], random: object
) -> None:
    """The mean is the same to the bit, whatever the order in which devices answer."""
    given_ = weighty(given_)
    shuffled = list(given_)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert fold(given_).finalize().tobytes() == fold(shuffled).finalize().tobytes()


@settings(deadline=None)
@given(parts, parts, parts)
def test_merging_is_associative(
    a: list[tuple[NDArray[np.float32], int]],
    b: list[tuple[NDArray[np.float32], int]],
    c: list[tuple[NDArray[np.float32], int]],
) -> None:
    """(a + b) + c = a + (b + c) = one fold of all, to the bit: gateways may fold first."""
    a = weighty(a)
    left = fold(a)
    left.merge(fold(b))
    left.merge(fold(c))
    tail = fold(b)
    tail.merge(fold(c))
    right = fold(a)
    right.merge(tail)
    whole = fold([*a, *b, *c])
    assert left.finalize().tobytes() == right.finalize().tobytes() == whole.finalize().tobytes()
    assert left.count == right.count == whole.count and left.weight == whole.weight


@settings(deadline=None)
@given(parts)
def test_the_mean_is_within_the_stated_error(given_: list[tuple[NDArray[np.float32], int]]) -> None:
    """|mean - exact| <= n 2^-s / W + 2^-23 x weighted mean of |delta|, for every entry."""
    given_ = weighty(given_)
    found = fold(given_)
    weights = [min(weight, CONFIG.weight_max) for _, weight in given_]
    exact = np.array(
        [
            math.fsum(float(d[i]) * w for (d, _), w in zip(given_, weights, strict=True))
            for i in range(7)
        ]
    ) / sum(weights)
    size = sum(np.abs(d.astype(np.float64)) * w for (d, _), w in zip(given_, weights, strict=True))
    bound = found.count * 2.0**-CONFIG.scale_bits / found.weight + 2.0**-23 * size / sum(weights)
    assert (np.abs(found.finalize() - exact) <= bound).all()


def test_the_sum_cannot_overflow() -> None:
    """The largest deltas with the largest weights, as many as are allowed, still add up."""
    config = FoldConfig(deltas_max=100, weight_max=1000, norm_max=8.0)
    for sign in (1, -1):
        delta__p = np.array([sign * 8.0, 0.0], np.float32)
        found = Fold(2, config=config)
        for _ in range(100):
            found.update(delta__p, weight=10**9)
        assert found.finalize().tolist() == [sign * 8.0, 0.0]
        with pytest.raises(DeltaError, match="holds 100 deltas"):
            found.update(delta__p, weight=1)
        assert found.weight == 100_000


@pytest.mark.parametrize(
    ("delta", "said"),
    [
        (np.array([np.nan, 0, 0], np.float32), "NaN"),
        (np.array([0, np.inf, 0], np.float32), "infinity"),
        (np.array([0, 3e38, 3e38], np.float32), "far too large"),
        (np.array([100, 0, 0], np.float32), "norm 100, above the bound 64"),
        (np.zeros(2, np.float32), r"float32 \(3,\), not float32 \(2,\)"),
        (np.zeros((3, 1), np.float32), r"\(3, 1\)"),
        (np.zeros(3, np.float64), "not float64"),
    ],
)
def test_an_attacker_changes_nothing(delta: NDArray[np.float32], said: str) -> None:
    """A delta that is refused leaves no trace in the sum (fault 75)."""
    honest = np.array([1, 2, 3], np.float32)
    found = Fold(3, config=CONFIG)
    found.update(honest, weight=10)
    with pytest.raises(DeltaError, match=said):
        found.update(delta, weight=10)
    assert found.finalize().tolist() == honest.tolist() and found.count == 1
    with pytest.raises(DeltaError, match="weight -1"):
        found.update(honest, weight=-1)


def test_a_scaled_update_is_clipped_and_a_loud_device_is_capped() -> None:
    """One of ten devices with 1000 times the norm and the weight moves the mean a bounded bit."""
    config = FoldConfig(deltas_max=16, weight_max=100, norm_max=1000.0, clip_norm=1.0)
    found = Fold(4, config=config)
    for _ in range(9):
        contribution = found.update(np.array([0.5, 0, 0, 0], np.float32), weight=100)
        assert not contribution.clipped and contribution.norm == pytest.approx(0.5)
    contribution = found.update(np.array([-900.0, 0, 0, 0], np.float32), weight=10**6)
    assert contribution.clipped and contribution.weight == 100
    assert found.finalize()[0] == pytest.approx((9 * 0.5 - 1.0) / 10, rel=1e-6)


def test_devices_without_examples_give_no_nan() -> None:
    """Weight 0 counts for nothing; a round of only such devices has no mean (flower#7645)."""
    found = Fold(3, config=CONFIG)
    found.update(np.ones(3, np.float32), weight=0)
    assert (found.count, found.weight) == (0, 0)
    with pytest.raises(DeltaError, match="no delta"):
        found.finalize()
    found.update(np.ones(3, np.float32), weight=3)
    assert found.finalize().tolist() == [1, 1, 1]


def test_folds_that_do_not_fit_are_not_merged() -> None:
    """Other size, other bounds, or too many together: refused, nothing changed."""
    found = fold([(np.ones(3, np.float32), 4)])
    for other in (Fold(4, config=CONFIG), Fold(3, config=FoldConfig(clip_norm=1.0))):
        with pytest.raises(DeltaError, match="do not merge"):
            found.merge(other)
    small = FoldConfig(deltas_max=1)
    one, two = Fold(3, config=small), Fold(3, config=small)
    one.update(np.ones(3, np.float32), weight=1)
    two.update(np.ones(3, np.float32), weight=1)
    with pytest.raises(DeltaError, match="beyond the bound"):
        one.merge(two)
    assert found.finalize().tolist() == [1, 1, 1]


def test_blocks_join_without_a_seam() -> None:
    """Sizes around the block give the same numbers as one column alone."""
    rng = np.random.default_rng(3)
    for size in itertools.chain((1, BLOCK - 1, BLOCK, BLOCK + 1), (2 * BLOCK + 17,)):
        given_ = [(rng.normal(0, 1e-3, size).astype(np.float32), w) for w in (3, 7, 100)]
        mean = fold(given_).finalize()
        for column in {0, size // 2, size - 1}:
            alone = fold([(d[column : column + 1], w) for d, w in given_])
            assert mean[column] == alone.finalize()[0]


def test_memory_is_one_sum_whatever_the_number_of_devices() -> None:
    """100 deltas of 256k parameters take the sum, the mean and two blocks: 12 bytes each."""
    size = 1 << 18
    delta__p = np.full(size, 1e-3, np.float32)
    tracemalloc.start()
    try:
        found = Fold(size)
        for _ in range(100):
            found.update(delta__p, weight=10)
        found.finalize()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * size + 20 * BLOCK + 200_000
