"""Categorical drift from frequent items: mix of categories, new ones, vanished ones. Pure.

    [(item, low, high)], n --> FrequentCounts --homogeneity--> least chi-squared, p-value
                                              --new_items, vanished_items--> [ItemChange]

A frequent-items sketch (Misra–Gries) knows each count as an interval: the true count is within
[low, high], with certainty; an item it does not list was seen at most ``unlisted_high`` times. All
that is said here holds for every set of counts within the intervals, thus for the true one.

The null of all tests: both samples are independent draws from one distribution over items.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from .special import chi_square_above
from .statistics import EXPECTED_MIN

Item = TypeVar("Item", bound=int | str)
Array = NDArray[np.float64]

CATEGORIES_MAX: Final = 256  # more do not help a test, and items are as many as people type


@dataclass(frozen=True, slots=True)
class FrequentCounts(Generic[Item]):
    """Counts of items, each within an interval."""

    low: Mapping[Item, int]
    """At least so often, 0 or more, of each listed item."""
    high: Mapping[Item, int]
    """At most so often, at least ``low``, of the same items."""
    total: int
    """All values, listed or not; at least the sum of ``low``."""
    unlisted_high: int
    """At most so often, each item that is not listed; 0: all items are listed."""

    def __post_init__(self) -> None:
        """Check what the tests rely on."""
        if self.low.keys() != self.high.keys():
            raise ValueError("every listed item needs a lower and an upper bound")
        if any(not 0 <= low <= self.high[item] for item, low in self.low.items()):
            raise ValueError("bounds of an item must be 0 <= low <= high")
        if not 0 <= self.unlisted_high <= self.total or sum(self.low.values()) > self.total:
            raise ValueError(
                "the total must be at least what the bounds say, which are not below 0"
            )

    @classmethod
    def of(
        cls,
        items: Iterable[tuple[Item, int, int]],
        total: int,
        *,
        unlisted_high: int | None = None,
    ) -> FrequentCounts[Item]:
        """Return the counts of a sketch's answer.

        Args:
            items: (item, low, high), each item once, as the sketch lists them.
            total: All values that the sketch has seen.
            unlisted_high: Its greatest error; None: the greatest ``high - low`` of the list, which
                is the same in a sketch that lists all it holds. Without any item: ``total``.

        Raises:
            ValueError: An item comes twice, or bounds contradict each other or the total.
        """
        listed = list(items)
        low = {item: least for item, least, _ in listed}
        if len(low) < len(listed):
            raise ValueError("an item is listed twice")
        high = {item: min(most, total) for item, _, most in listed}
        if unlisted_high is None:
            unlisted_high = max((high[item] - low[item] for item in low), default=total)
        return cls(low, high, total, min(unlisted_high, total))

    def bounds(self, item: Item) -> tuple[int, int]:
        """Return the interval of an item, listed or not."""
        return self.low.get(item, 0), self.high.get(item, self.unlisted_high)


@dataclass(frozen=True, slots=True)
class Homogeneity(Generic[Item]):
    """What the test of the mix found."""

    statistic: float
    """The least chi-squared that any counts within the bounds can have."""
    freedom: int
    """Categories, with "other", minus 1; 0: nothing could be tested, and ``p_value`` is 1."""
    p_value: float
    effect: float
    """Cramer's V at equal weight of both samples, at least so much; 0 to 1."""
    largest: tuple[Item, ...]
    """The items that contribute most, at most 3, largest first; without "other"."""


@dataclass(frozen=True, slots=True)
class ItemChange(Generic[Item]):
    """An item that one side has and the other has not."""

    item: Item
    share_low: float
    """Its share where it is, at least, 0 to 1."""
    p_value: float
    """Bonferroni over all items listed on that side."""


def homogeneity(
    reference: FrequentCounts[Item], observed: FrequentCounts[Item]
) -> Homogeneity[Item]:
    """Test whether both sides have the same mix of items.

    Categories are the items that are certain to be frequent: whose lower bounds, of both sides
    together, make every expected count at least 5, at most ``CATEGORIES_MAX``, by falling sum; all
    else is "other", which takes the least of them until it expects 5 too. The rule looks at sums of
    both sides alone, on which the test conditions, so that it cannot favour a rejection. An item
    that is new in a short window is too rare in the sums to be one: :func:`new_items` finds it.

    Null: in the module head. Error control: P(p_value <= a) <= a up to the chi-squared limit. The
    contribution of a category, (a sqrt(m/n) - b sqrt(n/m))^2 / (a + b), rises in the side with the
    greater share and falls in the other: its least value within the bounds is at the two ends that
    face each other, and 0 where the intervals of shares meet. The sum of the least is at most the
    true statistic. One test; multiplicity is the caller's.

    Raises:
        Nothing: sides without values make ``p_value`` 1.

    Source: Pearson, Biometrika 8 (1911); bounds: Misra, Gries, Sci. Comput. Program. 2 (1982);
    Cochran, Biometrics 10 (1954), for the least expected count.
    """
    n, m = reference.total, observed.total
    if not n or not m:
        return Homogeneity(0.0, 0, 1.0, 0.0, ())
    share = min(n, m) / (n + m)
    listed = {**reference.low, **observed.low}
    sums = {item: reference.low.get(item, 0) + observed.low.get(item, 0) for item in listed}
    ranked = [(count, item) for item, count in sums.items() if count * share >= EXPECTED_MIN]
    ranked = sorted(ranked, key=lambda pair: (-pair[0], str(pair[1])))[:CATEGORIES_MAX]
    rest = n + m - sum(count for count, _ in ranked)
    while 0 < rest * share < EXPECTED_MIN and ranked:
        rest += ranked.pop()[0]
    items = [item for _, item in ranked]
    bounds = np.array(
        [[*reference.bounds(item), *observed.bounds(item)] for item in items], np.float64
    ).reshape(-1, 4)
    if rest > 0:
        summed = bounds.sum(0)
        other = [n - summed[1], n - summed[0], m - summed[3], m - summed[2]]
        bounds = np.vstack([bounds, np.maximum(other, 0)])
    freedom = len(bounds) - 1
    if freedom < 1:
        return Homogeneity(0.0, 0, 1.0, 0.0, ())
    a_low, a_high, b_low, b_high = bounds.T
    # The facing ends: the greater share at its least, the other at its most; equal where they meet.
    a_more, b_more = a_low / n > b_high / m, b_low / m > a_high / n
    a = np.where(a_more, a_low, a_high)
    b = np.where(a_more, b_high, b_low)
    apart = a_more | b_more
    terms = np.zeros(len(bounds))
    halves = np.zeros(len(bounds))
    gap = a * math.sqrt(m / n) - b * math.sqrt(n / m)
    terms[apart] = gap[apart] ** 2 / (a + b)[apart]
    p, q = a / n, b / m
    halves[apart] = (p - q)[apart] ** 2 / (p + q)[apart] / 2
    statistic = float(terms.sum())
    order = np.argsort(-terms[: len(items)], kind="stable")[:3]
    return Homogeneity(
        statistic,
        freedom,
        float(chi_square_above(statistic, freedom)),
        math.sqrt(min(1.0, float(halves.sum()))),
        tuple(items[i] for i in order if terms[i] > 0),
    )


def new_items(
    reference: FrequentCounts[Item], observed: FrequentCounts[Item], *, share_min: float = 0.01
) -> list[ItemChange[Item]]:
    """Return the items that the reference does not list and that are certainly frequent now.

    Null: in the module head, for each item. Error control: family-wise over the items that
    ``observed`` lists, by Bonferroni. Given that an item was seen K times in n + m draws, the
    number of them in the m observed ones is hypergeometric under the null, and

        P(at least x of K observed) <= exp(-K KL(x/K || m / (n + m)))

    with x the lower bound here and K = x + the most that the reference can have missed. For an
    exact reference (K = x) this is (m / (n + m))^x.

    Args:
        reference: What was known.
        observed: What was seen.
        share_min: Items that are certain of a smaller share of ``observed`` are no news, 0 to 1.

    Returns:
        Largest share first. p-values are given, not judged: a short reference makes many items
        new that it just had no time to meet.

    Raises:
        ValueError: ``share_min`` is not within [0, 1].

    Source: Hoeffding, JASA 58 (1963): the bound by KL, which holds without replacement too.
    """
    if not 0 <= share_min <= 1:
        raise ValueError(f"share_min is within [0, 1], not {share_min}")
    n, m = reference.total, observed.total
    found = []
    for item, low in observed.low.items():
        if item in reference.low or not low or low < share_min * m or not n:
            continue
        most = reference.unlisted_high
        whole, expected = low + most, m / (n + m)
        part = low / whole
        bound = 0.0
        if part > expected:
            bound = part * math.log(part / expected)
            if most:
                bound += (1 - part) * math.log((1 - part) / (1 - expected))
        p_value = min(1.0, len(observed.low) * math.exp(-whole * bound))
        found.append(ItemChange(item, low / m, p_value))
    return sorted(found, key=lambda each: -each.share_low)


def vanished_items(
    reference: FrequentCounts[Item], observed: FrequentCounts[Item], *, share_min: float = 0.01
) -> list[ItemChange[Item]]:
    """Return the items that were certainly frequent and that ``observed`` does not list.

    :func:`new_items` with the sides exchanged: shares are of the reference, and the family is what
    it lists. Null, error control, errors and source are the same.
    """
    return new_items(observed, reference, share_min=share_min)
