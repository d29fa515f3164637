"""Tests of categories from bounded counts: golden values, honesty of the bounds, size, power."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import datasketches
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.server.drift.frequent_tests import (
    FrequentCounts,
    homogeneity,
    new_items,
    vanished_items,
)
from shoal.server.drift.statistics import chi_square

Drawn = NDArray[np.int64]
Item = TypeVar("Item", bound=int | str)
tables = st.dictionaries(st.integers(0, 12), st.integers(0, 400), min_size=1, max_size=9)


def sketch(items: Drawn, lg_size: int) -> FrequentCounts[str]:
    """Return the library's frequent-items sketch of items, in its own bounds."""
    found = datasketches.frequent_strings_sketch(lg_size)
    names, counts = np.unique(items, return_counts=True)
    order = np.random.default_rng(len(items)).permutation(len(names))
    for i in order:
        found.update(f"item-{names[i]}", int(counts[i]))
    listed = found.get_frequent_items(datasketches.frequent_items_error_type.NO_FALSE_NEGATIVES)
    return FrequentCounts.of(
        [(name, low, high) for name, _, low, high in listed], found.total_weight
    )


def counted(counts: Mapping[Item, int]) -> FrequentCounts[Item]:
    """Return counts that are known exactly."""
    return FrequentCounts(counts, counts, sum(counts.values()), 0)


def exact(items: Drawn) -> FrequentCounts[str]:
    """Return exact counts of items."""
    names, counts = np.unique(items, return_counts=True)
    return counted({f"item-{n}": int(c) for n, c in zip(names, counts, strict=True)})


# --- vectors ----------------------------------------------------------------------------------


def test_exact_counts_make_the_classical_test() -> None:
    """The table of test_statistics whose value is scipy's; V at equal weight by hand."""
    a = counted({"x": 90, "y": 110, "z": 100})
    b = counted({"x": 40, "y": 70, "z": 90})
    found = homogeneity(a, b)
    classical = chi_square([90, 110, 100], [40, 70, 90])
    assert found.statistic == pytest.approx(float(classical.statistic), rel=1e-12)
    assert found.p_value == pytest.approx(float(classical.p_value), rel=1e-12)
    assert found.effect == pytest.approx(float(classical.effect), rel=1e-12)
    assert found.freedom == 2 and found.largest == ("x", "z", "y")


def test_bounds_that_face_each_other_make_the_least_statistic() -> None:
    """x: 300 to 320 of 1000 against 380 to 400; y and other meet."""
    a = FrequentCounts.of([("x", 300, 320), ("y", 300, 320)], 1000)
    b = FrequentCounts.of([("x", 380, 400), ("y", 310, 330)], 1000)
    found = homogeneity(a, b)
    # other: 360 to 400 of a, 270 to 310 of b: faces at 360 and 310
    expected = (320 - 380) ** 2 / 700 + (360 - 310) ** 2 / 670
    assert found.statistic == pytest.approx(expected, rel=1e-12)
    assert found.freedom == 2 and found.largest == ("x",)
    half = 0.06**2 / 0.7 / 2 + 0.05**2 / 0.67 / 2
    assert found.effect == pytest.approx(math.sqrt(half), rel=1e-12)


def test_rare_items_are_other() -> None:
    """Expected counts below 5 are no category; "other" takes the least until it expects 5."""
    a = counted({1: 500, 2: 480, 3: 12, 4: 4, 5: 4})
    b = counted({1: 480, 2: 505, 3: 8, 4: 3, 5: 4})
    found = homogeneity(a, b)
    by_hand = chi_square([500, 480, 12, 8], [480, 505, 8, 7])
    assert found.statistic == pytest.approx(float(by_hand.statistic))
    assert found.freedom == 3
    fewer = homogeneity(
        counted({1: 500, 2: 484, 3: 12, 4: 4}),
        counted({1: 480, 2: 509, 3: 8, 4: 3}),
    )
    by_hand = chi_square([500, 484, 16], [480, 509, 11])
    assert fewer.statistic == pytest.approx(float(by_hand.statistic))
    assert fewer.freedom == 2


def test_new_and_vanished_items_by_hand() -> None:
    """An exact reference of 900, 100 seen: P = items * (1/10)^x; with error e by the bound."""
    a = counted({"x": 890, "gone": 10})
    b = counted({"x": 96, "new": 4})
    (found,) = new_items(a, b)
    assert (found.item, found.share_low) == ("new", 0.04)
    assert found.p_value == pytest.approx(2 * 0.1**4)
    (lost,) = vanished_items(a, b)
    assert (lost.item, lost.share_low) == ("gone", 10 / 900)
    assert lost.p_value == pytest.approx(2 * 0.9**10)
    assert new_items(a, b, share_min=0.05) == []
    unsure = FrequentCounts.of([("x", 880, 886)], 900)
    (found,) = new_items(unsure, b)
    # 4 of 10 where 1 of 10 is expected: exp(-10 KL(.4 || .1))
    divergence = 0.4 * math.log(4) + 0.6 * math.log(0.6 / 0.9)
    assert found.p_value == pytest.approx(2 * math.exp(-10 * divergence))
    blind = FrequentCounts.of([("x", 400, 900)], 900)
    (found,) = new_items(blind, b)
    assert found.p_value == 1


# --- honesty of the bounds --------------------------------------------------------------------


@pytest.mark.parametrize("lg_size", [4, 6])
def test_a_sketch_claims_no_more_than_the_counts(lg_size: int) -> None:
    """Zipf items, maps too small for them: never a larger statistic, never a new item that is not.

    The exact counts have the finer categories, so that their statistic is no less for that either.
    """
    rng = np.random.default_rng(lg_size)
    for shift in (0, 0, 3):
        x, y = rng.zipf(1.4, 6000), rng.zipf(1.4, 2500) + shift
        one, two = sketch(x, lg_size), sketch(y, lg_size)
        real, seen = exact(x), exact(y)
        for item in {**one.low, **real.low}:
            low, high = one.bounds(item)
            assert low <= real.low.get(item, 0) <= high
        found = homogeneity(one, two)
        true = homogeneity(real, seen)
        assert found.statistic <= true.statistic * (1 + 1e-12)
        assert {each.item for each in vanished_items(one, two) if each.p_value < 0.01} <= {
            item for item in real.low if seen.low.get(item, 0) < real.low[item]
        }


@settings(deadline=None, max_examples=60)
@given(tables, tables, st.integers(0, 20), st.integers(0, 20))
def test_wider_bounds_say_less(
    a: dict[int, int], b: dict[int, int], below: int, above: int
) -> None:
    """For one set of categories; symmetric; within range."""
    total_a, total_b = sum(a.values()) + 900, sum(b.values()) + 700
    a, b = a | {99: 900}, b | {99: 700}

    def wide(counts: dict[int, int], total: int, low: int, high: int) -> FrequentCounts[int]:
        items = [(i, max(0, c - low), c + high) for i, c in counts.items()]
        return FrequentCounts.of(items, total, unlisted_high=high)

    there = homogeneity(wide(a, total_a, 0, above), wide(b, total_b, 0, above))
    back = homogeneity(wide(b, total_b, 0, above), wide(a, total_a, 0, above))
    assert there.statistic == pytest.approx(back.statistic, abs=1e-9)
    assert there.p_value == pytest.approx(back.p_value, abs=1e-12)
    assert 0 <= there.p_value <= 1 and 0 <= there.effect <= 1
    exact_one = homogeneity(counted(a), counted(b))
    assert there.statistic <= exact_one.statistic + 1e-9
    wider = homogeneity(wide(a, total_a, below, above), wide(b, total_b, below, above))
    assert 0 <= wider.effect <= 1
    same = homogeneity(counted(a), counted(a))
    assert same.statistic == 0 and same.p_value == 1


# --- size and power ---------------------------------------------------------------------------


def test_sizes_without_a_change() -> None:
    """Exact counts keep .05; sketches stay below; new items stay below their family's level."""
    rng = np.random.default_rng(5)
    share = 1 / np.arange(1, 41) ** 1.2
    share /= share.sum()
    trials, mixes, sketched, news = 400, [], [], []
    for _ in range(trials):
        x, y = rng.choice(40, 3000, p=share), rng.choice(40, 300, p=share)
        mixes.append(homogeneity(exact(x), exact(y)).p_value)
        sketched.append(homogeneity(sketch(x, 5), sketch(y, 5)).p_value)
        short = rng.choice(40, 60, p=share)
        news.append(min([each.p_value for each in new_items(exact(short), exact(y))], default=1.0))
    most = 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / trials)
    assert 0.02 <= np.mean(np.array(mixes) <= 0.05) <= most
    assert np.mean(np.array(sketched) <= 0.05) <= most
    assert np.mean(np.array(news) <= 0.05) <= most
    assert min(news) < 1  # there were new items; a short reference excuses them


def test_changes_are_found_through_sketches() -> None:
    """A new firmware sends a new code in 10 %, and one code no more."""
    rng = np.random.default_rng(6)
    x = rng.integers(0, 12, 20_000)
    y = np.where(rng.random(800) < 0.1, 77, rng.integers(1, 12, 800))
    one, two = sketch(x, 5), sketch(y, 5)
    (new,) = new_items(one, two)
    assert new.item == "item-77" and new.p_value < 1e-9
    (gone,) = vanished_items(one, two)
    assert gone.item == "item-0" and gone.p_value < 1e-9
    tilted = np.where(rng.random(800) < 0.15, 3, rng.integers(0, 12, 800))
    found = homogeneity(one, sketch(tilted, 5))
    assert found.p_value < 1e-9 and found.largest[0] == "item-3"
    assert new_items(one, sketch(tilted, 5)) == []


# --- edges ------------------------------------------------------------------------------------


def test_without_values_nothing_is_said() -> None:
    """Empty sides, and one category."""
    some = counted({"x": 50})
    nothing: FrequentCounts[str] = FrequentCounts.of([], 0)
    for a, b in ((some, nothing), (nothing, some), (nothing, nothing), (some, some)):
        found = homogeneity(a, b)
        assert (found.statistic, found.freedom, found.p_value, found.effect) == (0, 0, 1, 0)
    assert new_items(nothing, some) == vanished_items(some, nothing) == []
    unlisted: FrequentCounts[str] = FrequentCounts.of([], 500)
    assert unlisted.unlisted_high == 500 and homogeneity(unlisted, some).p_value == 1


@pytest.mark.parametrize(
    ("items", "total"),
    [
        ([("x", 5, 4)], 9), ([("x", -1, 4)], 9), ([("x", 5, 6)], 4),
        ([("x", 1, 2), ("x", 1, 2)], 9), ([], -1),
    ],
)  # fmt: skip
def test_bounds_that_contradict_are_refused(items: list[tuple[str, int, int]], total: int) -> None:
    """Order, sign, total, an item twice."""
    with pytest.raises(ValueError, match=r"bounds|total|twice"):
        FrequentCounts.of(items, total)


def test_other_bad_input_is_refused() -> None:
    """Unequal lists, shares out of range."""
    with pytest.raises(ValueError, match="upper bound"):
        FrequentCounts({"x": 1}, {}, 3, 0)
    one = counted({"x": 5})
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="share_min"):
            new_items(one, one, share_min=share)
