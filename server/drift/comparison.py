"""Every figure of merged counters against a reference profile. Pure.

    one feature of G groups: bins, nulls, sketch, items, distinct -compare-----> G dicts
    one group: scores, projection, late labels ---------------------assess-----> one dict

Nothing here decides and nothing is corrected for multiplicity: these are the figures that a person
or a script asks for. What each figure is, its null, its error control and its source stand at the
functions that compute it: :mod:`.statistics`, :mod:`.quantile_tests`, :mod:`.frequent_tests`,
:mod:`.projection_test`, :mod:`.performance`. **All p-values take values as independent samples**,
which those of a sensor are not: they rank, the alarms of :mod:`.detectors` and :mod:`.streams`
judge.

A figure that cannot be told is None. The codes of a category have no order, so what needs one is
None for them: ``ks``, ``wasserstein``, ``direction`` and ``out_of_range_share``. G groups, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import performance
from .frequent_tests import FrequentCounts, homogeneity, new_items, vanished_items
from .profile import ReferenceProfile
from .profile_feature import FeatureProfile
from .projection_test import groups_test, mean_test, means
from .quantile_tests import Quantiles, ks, ks_binned, wasserstein
from .statistics import chi_square, distances

DIGITS: Final = 6
ITEMS_SHOWN: Final = 8  # new or vanished items of a feature, the most frequent first
GROUPS_MIN: Final = 5  # that a test against groups needs
CONFIDENCE_SKETCH: Final = 0.99  # of the bounds that sketches give
CONFIDENCE: Final = 0.95  # of the intervals of shares

BINNED: Final = (
    "psi",
    "psi_p_value",
    "jensen_shannon",
    "jensen_shannon_debiased",
    "jensen_shannon_distance",
    "hellinger",
    "direction",
)
TESTED: Final = ("chi_square", "ks", "wasserstein", "frequent", "distinct")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Merged counters of one feature of one group."""

    n: int
    """Values that are not null."""
    nulls: int
    below: int = 0
    """Values below the profile's range …"""
    above: int = 0
    """… and above it."""
    bins: Sequence[float] | NDArray[np.float64] | None = None
    """Counts between the reference's edges; None: not known."""
    sketch: Quantiles | None = None
    """The values, as their merged sketch knows them."""
    frequent: FrequentCounts[int] | None = None
    """For integers and categories."""
    distinct: tuple[float, float, float] | None = None
    """For them too: (estimate, low, high) of the number of distinct values."""


def compare(feature: FeatureProfile, observed: Sequence[Observed]) -> list[dict[str, Any]]:
    """Return all distances and tests of one feature of many groups.

    Args:
        feature: The reference.
        observed: Of each group; ``bins`` are as many as the reference's, or None.

    Returns:
        For each group a dict of JSON values: ``kind``, ``psi`` (debiased), ``psi_p_value``,
        ``jensen_shannon`` (bits), ``jensen_shannon_debiased``, ``jensen_shannon_distance``
        (its root), ``hellinger``, ``direction``; ``chi_square`` {p_value, freedom, cramers_v};
        ``ks`` {statistic, low, high, p_value, sketch}, of the bins where there is no sketch;
        ``wasserstein`` {estimate, low, high, usual, normalised}; ``frequent`` {p_value, freedom,
        cramers_v, largest, new, vanished}; ``distinct`` {estimate, low, high, reference}, the
        reference None if it has more than it lists; ``null_share`` and ``out_of_range_share``
        {estimate, low, high, reference}.

    Raises:
        ValueError: Bins do not fit the reference's, or counts are negative or not finite.
    """
    found: list[dict[str, Any]] = [
        {"kind": feature.kind, **dict.fromkeys((*BINNED, *TESTED)), **shares}
        for shares in _shares(feature, observed)
    ]
    some = [i for i, each in enumerate(observed) if each.bins is not None and each.n]
    if some:
        bins = np.stack([np.asarray(observed[i].bins, np.float64) for i in some])
        _binned(feature, bins, [found[i] for i in some])
    reference = _reference(feature) if feature.ordered else None
    items = _items(feature)
    for shown, each in zip(found, observed, strict=True):
        if reference is not None and each.sketch is not None:
            shown |= _sketched(reference, each.sketch)
        if items is not None and each.frequent is not None and each.n:
            shown["frequent"] = _frequent(items, each.frequent)
        if each.distinct is not None:
            estimate, low, high = each.distinct
            known = len(feature.items) if feature.items and not feature.other else None
            shown["distinct"] = {
                "estimate": _real(estimate),
                "low": _real(low),
                "high": _real(high),
                "reference": known,
            }
    return found


def assess(
    profile: ReferenceProfile,
    *,
    scores: ArrayLike | None = None,
    projection: ArrayLike | None = None,
    projected: int = 0,
    answers: Sequence[int] = (0, 0),
    confusion: ArrayLike | None = None,
    calibration: ArrayLike | None = None,
) -> dict[str, Any]:
    """Return what one group tells of the model as a whole, with labels and without.

    Args:
        profile: The reference.
        scores: Counts, predicted class x confidence decile, flat as WINDOW carries them.
        projection: Sums of the random features, (F,).
        projected: Rows in these sums.
        answers: Late labels, 2 counts: all, and how many of them the model got right.
        confusion: Counts of late labels, true x predicted, flat and row-major; models of many
            classes send none.
        calibration: Counts (wrong, right) x confidence decile, flat.

    Returns:
        ``mmd`` {squared, p_value, groups_p_value}; ``expected_accuracy`` {estimate, error,
        reference, p_value}, an estimate without labels that no concept drift is seen by;
        ``accuracy`` {estimate, low, high, labelled, reference}; ``f1_macro`` {estimate, low, high};
        ``calibration_error`` {estimate, low, high, usual}; ``confidence_auc`` {estimate, low, high,
        error}: how well the confidence tells right answers from wrong ones. What was not sent, or
        does not fit the profile, is None.
    """
    sure = profile.confidence
    deciles = sure.deciles if sure is not None else None
    shown: dict[str, Any] = dict.fromkeys(
        ("mmd", "expected_accuracy", "accuracy", "f1_macro", "calibration_error", "confidence_auc")
    )
    table = _whole(scores)
    if sure is not None and len(table) == sure.classes * performance.DECILES and table.sum():
        known = np.stack([np.array(sure.wrong), np.array(sure.right)], 1)
        expected = performance.expected_accuracy(table, known, edges=deciles)
        shown["expected_accuracy"] = {
            "estimate": _real(expected.estimate),
            "error": _real(expected.error),
            "reference": _real(expected.reference),
            "p_value": _real(expected.p_value),
        }
    if projected > 0:
        shown["mmd"] = _discrepancy(profile, np.asarray(projection, np.float64), projected)
    labelled, correct = answers
    correct = min(correct, labelled)
    if labelled:
        right, held = sum(profile.correct), sum(profile.labelled)
        shown["accuracy"] = {
            **_interval(performance.wilson(correct, labelled, confidence=CONFIDENCE)),
            "labelled": labelled,
            "reference": _real(right / held) if held else None,
        }
    counts = _whole(confusion)
    classes = math.isqrt(len(counts))
    if classes >= 2 and classes * classes == len(counts) and counts.sum():
        told = performance.classification(counts.reshape(classes, classes))
        shown["f1_macro"] = _interval(told.f1_macro)
    sureness = _whole(calibration)
    if len(sureness) == 2 * performance.DECILES and sureness.sum():
        wrong_right = sureness.reshape(2, -1)
        error = performance.calibration(wrong_right, edges=deciles)
        shown["calibration_error"] = {
            name: _real(getattr(error, name)) for name in ("estimate", "low", "high", "usual")
        }
        area = performance.ranking(*wrong_right)
        if wrong_right.sum(1).all():
            shown["confidence_auc"] = {
                name: _real(getattr(area, name)) for name in ("estimate", "low", "high", "error")
            }
    return shown


def _binned(
    feature: FeatureProfile, bins__gb: NDArray[np.float64], found: Sequence[dict[str, Any]]
) -> None:
    far = distances(feature.counts, bins__gb)
    square = chi_square(feature.counts, bins__gb)
    statistic, p_value = ks_binned(feature.counts, bins__gb)
    columns = [getattr(far, name).tolist() for name in BINNED]
    tests = [square.p_value, square.freedom, square.effect, statistic, p_value]
    rows = zip(zip(*columns, strict=True), *(each.tolist() for each in tests), strict=True)
    for shown, (values, chance, freedom, effect, largest, ks_chance) in zip(
        found, rows, strict=True
    ):
        shown |= {name: _real(value) for name, value in zip(BINNED, values, strict=True)}
        shown["chi_square"] = {
            "p_value": _real(chance),
            "freedom": int(freedom),
            "cramers_v": _real(effect),
        }
        shown["ks"] = {
            "statistic": _real(largest),
            "low": _real(largest),  # the bins' difference is at most that of the values
            "high": 1.0,
            "p_value": _real(ks_chance),
            "sketch": False,
        }
        if not feature.ordered:
            shown |= {"ks": None, "direction": None}


def _sketched(reference: Quantiles, sketch: Quantiles) -> dict[str, Any]:
    test = ks(reference, sketch, confidence_sketch=CONFIDENCE_SKETCH)
    moved = wasserstein(reference, sketch, confidence_sketch=CONFIDENCE_SKETCH)
    return {
        "ks": {
            "statistic": _real(test.statistic),
            "low": _real(test.low),
            "high": _real(test.high),
            "p_value": _real(test.p_value),
            "sketch": True,
        },
        "wasserstein": {
            "estimate": _real(moved.estimate),
            "low": _real(moved.low),
            "high": _real(moved.high),
            "usual": _real(moved.usual),
            "normalised": _real(moved.effect),
        },
    }


def _frequent(items: FrequentCounts[int], observed: FrequentCounts[int]) -> dict[str, Any]:
    mix = homogeneity(items, observed)
    changes = {
        name: [
            {"item": each.item, "share": _real(each.share_low), "p_value": _real(each.p_value)}
            for each in found(items, observed)[:ITEMS_SHOWN]
        ]
        for name, found in (("new", new_items), ("vanished", vanished_items))
    }
    return {
        "p_value": _real(mix.p_value),
        "freedom": mix.freedom,
        "cramers_v": _real(mix.effect),
        "largest": list(mix.largest),
        **changes,
    }


def _shares(feature: FeatureProfile, observed: Sequence[Observed]) -> list[dict[str, Any]]:
    """Return the shares of nulls and of values out of range, beside those of the reference."""
    n__g = np.array([each.n for each in observed], np.float64)
    nulls__g = np.array([each.nulls for each in observed], np.float64)
    outside__g = np.array([each.below + each.above for each in observed], np.float64)
    usual = (feature.below + feature.above) / feature.values if feature.values else 0.0
    nulls = _share_of(nulls__g, n__g + nulls__g, feature.null_rate)
    outside = _share_of(np.minimum(outside__g, n__g), n__g, usual)
    return [
        {"null_share": null, "out_of_range_share": out if feature.ordered else None}
        for null, out in zip(nulls, outside, strict=True)
    ]


def _share_of(
    failed__g: NDArray[np.float64], of__g: NDArray[np.float64], reference: float
) -> list[dict[str, Any] | None]:
    share = performance.wilson(failed__g, of__g, confidence=CONFIDENCE)
    three = np.stack([share.estimate, share.low, share.high], axis=-1).tolist()
    usual = _real(reference)
    return [
        {"estimate": _real(p), "low": _real(low), "high": _real(high), "reference": usual}
        if of
        else None
        for (p, low, high), of in zip(three, of__g.tolist(), strict=True)
    ]


def _reference(feature: FeatureProfile) -> Quantiles | None:
    """Return the reference's values; None for a profile of version 1, which has none."""
    if not feature.quantiles or not feature.values:
        return None
    low, high = feature.quantiles[0], feature.quantiles[-1]
    return Quantiles.of_grid(
        feature.quantiles,
        n=feature.values,
        variance=0.0,
        minimum=min(feature.minimum, low),
        maximum=max(feature.maximum, high),
    )


def _items(feature: FeatureProfile) -> FrequentCounts[int] | None:
    """Return the reference's categories: exact counts of the listed ones."""
    if not feature.items:
        return None
    counts = dict(feature.items)
    # What is not listed came no more often than the rarest that is.
    unlisted = min(feature.other, min(counts.values()))
    total = sum(counts.values()) + feature.other
    return FrequentCounts(counts, dict(counts), total, unlisted)


def _discrepancy(
    profile: ReferenceProfile, sums__f: NDArray[np.float64], rows: int
) -> dict[str, Any] | None:
    reference = profile.projection
    if reference is None or sums__f.shape != (reference.features,):
        return None
    try:
        mean = means(sums__f, float(rows))
    except ValueError:
        return None  # sums of another projection, or damaged ones
    test = mean_test(
        reference.means__f(),
        mean,
        spread=reference.variances__f(),
        n=reference.rows,
        m=float(rows),
        square=reference.covariance_square,
    )
    held = reference.held__gf()[np.array(reference.held_rows) > 0]
    alike = groups_test(held, mean).p_value if len(held) >= GROUPS_MIN else None
    return {
        "squared": _real(test.discrepancy),
        "p_value": _real(test.p_value),
        "groups_p_value": _real(alike) if alike is not None else None,
    }


def _interval(share: performance.Share) -> dict[str, Any]:
    return {name: _real(getattr(share, name)) for name in ("estimate", "low", "high")}


def _whole(counts: ArrayLike | None) -> NDArray[np.float64]:
    return np.asarray([] if counts is None else counts, np.float64).ravel()


def _real(value: Any) -> float | None:
    """Return a number as JSON has it: no infinity, no NaN; p-values keep their power of ten."""
    number = float(value)
    if not math.isfinite(number):
        return None
    return round(number, DIGITS) if abs(number) >= 1e-3 else float(f"{number:.3g}")
