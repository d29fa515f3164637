"""How well a model answers: from late labels, from scores, and from confidence alone. Pure.

    confusion counts ------------------------> classification: accuracy, precision, recall, F1
    scores of both classes, binned ----------> ranking: area under the ROC curve
    (wrong, right) by confidence decile -----> calibration: expected calibration error
    predicted class x confidence decile,
    and the reference's calibration ---------> expected_accuracy: without any label

C classes, S score bins in ascending order, D = 10 confidence deciles (of the reference's
confidence, whose edges are told, or tenths of 0 to 1). Leading axes ``...`` are
windows, devices or groups; counts merge by addition, so a coarser question is the same call.

Estimates come with intervals (Wilson's, at ``confidence``) whose coverage assumes that predictions
are independent; neighbouring windows of a sensor are not, and real intervals are wider.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .special import normal_above, normal_quantile

Array = NDArray[np.float64]

DECILES: Final = 10
PRIOR: Final = 2.0  # answers that an unseen cell of the reference is worth, at its decile's share


@dataclass(frozen=True, slots=True)
class Share:
    """A share and its interval, arrays of one shape; NaN where nothing was counted."""

    estimate: Array
    low: Array
    high: Array


@dataclass(frozen=True, slots=True)
class Classification:
    """Figures of late labels; the per-class ones have shape (..., C), all others (...)."""

    labelled: Array
    accuracy: Share
    precision: Share
    recall: Share
    f1: Share
    precision_macro: Share
    """Mean over the classes that were predicted or true; an undefined share of those is 0."""
    recall_macro: Share
    f1_macro: Share


@dataclass(frozen=True, slots=True)
class Ranking:
    """Area under the ROC curve, fields (...); NaN where one class has no scores."""

    estimate: Array
    """Pairs within one bin count half."""
    low: Array
    """If all pairs within one bin were the wrong way round; no sampling error in it."""
    high: Array
    """If all of them were the right way round."""
    error: Array
    """Standard error of the estimate by sampling."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Expected calibration error, fields (...), 0 to 1; NaN where nothing was counted."""

    estimate: Array
    """With each decile's confidence at its middle."""
    low: Array
    """With each decile's confidence at the place in the decile that fits best."""
    high: Array
    """At the place that fits worst."""
    usual: Array
    """Mean of the estimate for a perfectly calibrated model: so much comes from few labels."""


@dataclass(frozen=True, slots=True)
class ExpectedAccuracy:
    """Accuracy to be expected of predictions without labels, fields (...) if not said otherwise."""

    estimate: Array
    error: Array
    """Standard error of ``estimate`` as a forecast of the share that is right."""
    reference: float
    """Accuracy of the reference."""
    precision: Array
    """Expected precision of each predicted class, (..., C); NaN where none was predicted."""
    p_value: Array
    """One-sided, of the null "cells come as often as in the reference": small if the answers
    moved to cells in which the model is more often wrong."""


def wilson(right: ArrayLike, total: ArrayLike, *, confidence: float = 0.95) -> Share:
    """Return shares with Wilson's score interval.

    Args:
        right: Successes, 0 to ``total``, any shape.
        total: Trials; 0 makes NaN.
        confidence: Coverage, within (0, 1), on average over the true share.

    Raises:
        ValueError: Counts are not finite, negative or more than the total; confidence.

    Source: Wilson, JASA 22 (1927); Brown, Cai, DasGupta, Statistical Science 16 (2001).
    """
    z = _z(confidence)
    x, n = np.broadcast_arrays(_counts(right), _counts(total))
    if (x > n * (1 + 1e-12)).any():
        raise ValueError("more successes than trials")
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.minimum(x / n, 1.0)
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # The formula's ends meet p where it is 0 or 1, but for rounding.
    return Share(p, np.clip(middle - half, 0.0, p), np.clip(middle + half, p, 1.0))


def classification(confusion: ArrayLike, *, confidence: float = 0.95) -> Classification:
    """Return the figures of confusion tables.

    Args:
        confusion: Counts, true x predicted, shape (..., C, C), C >= 2.
        confidence: Of all intervals.

    Returns:
        Intervals: Wilson's for accuracy, precision (given the predictions) and recall (given the
        truth). F1 = 2J / (1 + J) rises with J = TP / (TP + FP + FN), which is a share: Wilson's
        interval of J, transformed. Macro means: squares of the classes' distances to their limits
        are added (MOVER), which takes the classes as independent: right for precision and recall.
        An error lowers the F1 of two classes at once: its macro interval is as wide as the delta
        method over the whole table says, if that is wider (coverage measured in the tests).

    Raises:
        ValueError: Not a table, or a count is not finite or negative.

    Source: Zou, Donner, Statistics in Medicine 27 (2008), for the macro means;
    Takahashi et al., Applied Intelligence 52 (2022), for the macro F1.
    """
    table = _counts(confusion)
    if table.ndim < 2 or table.shape[-1] != table.shape[-2] or table.shape[-1] < 2:
        raise ValueError(f"a confusion table is (..., C, C) with C >= 2, not {table.shape}")
    hit = np.diagonal(table, axis1=-2, axis2=-1)
    true, predicted, total = table.sum(-1), table.sum(-2), table.sum((-2, -1))
    joint = wilson(hit, true + predicted - hit, confidence=confidence)
    f1 = Share(*(2 * each / (1 + each) for each in (joint.estimate, joint.low, joint.high)))
    precision = wilson(hit, predicted, confidence=confidence)
    recall = wilson(hit, true, confidence=confidence)
    seen = (true + predicted) > 0
    return Classification(
        total,
        wilson(hit.sum(-1), total, confidence=confidence),
        precision,
        recall,
        f1,
        _macro(precision, seen),
        _macro(recall, seen),
        _macro_f1(table, f1, seen, confidence),
    )


def ranking(negative: ArrayLike, positive: ArrayLike) -> Ranking:
    """Return the area under the ROC curve from two histograms of scores.

    ``low <= area of the scores themselves <= high``, with certainty. The error is DeLong's: each
    score is placed among those of the other class, ties half; exact for binned scores.

    Args:
        negative: Counts of scores where the class is not true, ascending bins, shape (..., S).
        positive: Counts of scores where it is, same bins.

    Raises:
        ValueError: Bins differ, there is none, or a count is not finite or negative.

    Source: Hanley, McNeil, Radiology 143 (1982): area = P(positive > negative); DeLong, DeLong,
    Clarke-Pearson, Biometrics 44 (1988).
    """
    a, b = _counts(negative), _counts(positive)
    if a.ndim < 1 or b.ndim < 1 or a.shape[-1] != b.shape[-1] or not a.shape[-1]:
        raise ValueError("scores of both classes need the same bins, at least one")
    a, b = np.broadcast_arrays(a, b)
    n, m = a.sum(-1, keepdims=True), b.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = a / n, b / m
        below, above = np.cumsum(p, -1) - p, 1 - np.cumsum(q, -1)
        low = (q * below).sum(-1)
        same = (q * p).sum(-1)
        estimate = low + same / 2
        of_positive, of_negative = below + p / 2, above + q / 2
        spread = [
            (share * (placed - estimate[..., None]) ** 2).sum(-1) / np.maximum(size[..., 0] - 1, 1)
            for share, placed, size in ((q, of_positive, m), (p, of_negative, n))
        ]
    return Ranking(
        estimate,
        np.clip(low, 0.0, 1.0),
        np.clip(low + same, 0.0, 1.0),
        np.sqrt(spread[0] + spread[1]),
    )


def calibration(table: ArrayLike, *, edges: ArrayLike | None = None) -> Calibration:
    """Return the expected calibration error of labelled answers.

    Args:
        table: Counts (wrong, right) x confidence decile, shape (..., 2, 10), as LABELS carries.
        edges: The 9 inner edges of the deciles, ascending in 0 to 1, as the reference profile has
            them; None: 0.1 ... 0.9.

    Returns:
        ``sum n_d / N |right share - confidence|``; the confidences are known to their decile only,
        which ``low`` and ``high`` say.

    Raises:
        ValueError: Another shape, edges that do not ascend, or a count that is not finite or
            negative.

    Source: Naeini, Cooper, Hauskrecht, AAAI 2015; ``usual`` is the mean of the absolute
    normal deviation of each decile, sqrt(2 c (1 - c) / (pi n_d)).
    """
    counts, (left, upper) = _table(table), _deciles(edges)
    n = counts.sum(-2)
    total = n.sum(-1)
    middle = (left + upper) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = n / total[..., None]
        right = np.where(n > 0, counts[..., 1, :] / n, middle)
    near = np.maximum(0.0, np.maximum(left - right, right - upper))
    far = np.maximum(abs(right - left), abs(right - upper))
    noise = np.sqrt(2 / math.pi * middle * (1 - middle) / np.maximum(n, 1))
    found = [(weight * each).sum(-1) for each in (abs(right - middle), near, far, noise)]
    return Calibration(*found)


def expected_accuracy(
    scores: ArrayLike, reference: ArrayLike, *, edges: ArrayLike | None = None
) -> ExpectedAccuracy:
    """Return the accuracy to be expected of predictions whose labels nobody has.

    Each answer counts as right with the share that was right, on the reference's held-out data,
    among answers of the same predicted class and confidence decile. A cell with few answers leans
    on its decile over all classes (two answers' worth), a decile without any on its middle.

    Assumes, and cannot check: **no concept drift**. Given class and decile, the model is right as
    often as it was. Inputs that merely come in another mix are covered; a world in which the same
    input means something else, or inputs so new that confidence is wrong about them, is not. Late
    labels alone see those (:func:`classification`).

    Null of the p-value, one-sided: the answers are independent draws of the reference's mix of
    classes and confidences, so no lower accuracy is to be expected than of them.

    Error control: the estimate's mean is the true accuracy under that assumption, up to the cells'
    lean; ``error`` adds the chance of the answers, ``a (1 - a) / N`` each, to that of the
    reference's cells. The p-value is normal in the limit, one test; multiplicity is the caller's.

    Args:
        scores: Counts, predicted class x confidence decile, (..., C, 10) or, flat as WINDOW
            carries them, (..., 10 C).
        reference: Counts (wrong, right) x decile of each predicted class, (C, 2, 10), or of all
            classes together, (2, 10).
        edges: The 9 inner edges of the deciles, as for :func:`calibration`.

    Returns:
        NaN where ``scores`` are empty; then ``p_value`` is 1.

    Raises:
        ValueError: Classes differ, an empty reference, or a count is not finite or negative.

    Source: the idea is NannyML's confidence-based performance estimation (CBPE); Guillory et al.,
    "Predicting with confidence on unseen distributions", ICCV 2021, for its mean; the
    cells are histogram binning, Zadrozny, Elkan, ICML 2001.
    """
    known = _table(reference)
    known = known[None] if known.ndim == 2 else known
    counts = _counts(scores)
    if counts.ndim >= 1 and (counts.ndim == 1 or counts.shape[-1] != DECILES):
        if counts.shape[-1] % DECILES:
            raise ValueError(f"scores are classes x {DECILES}, not {counts.shape[-1]} long")
        counts = counts.reshape(*counts.shape[:-1], -1, DECILES)
    if counts.ndim < 2 or known.ndim != 3 or known.shape[0] not in (1, counts.shape[-2]):
        raise ValueError(f"scores {counts.shape} do not fit a reference {known.shape}")
    if not known.sum():
        raise ValueError("the reference has no answers")
    right__cd, size__cd = known[:, 1], known.sum(1)
    middle = sum(_deciles(edges)) / 2
    decile = (right__cd.sum(0) + PRIOR * middle) / (size__cd.sum(0) + PRIOR)
    share = (right__cd + PRIOR * decile) / (size__cd + PRIOR)
    doubt = share * (1 - share) / (size__cd + PRIOR + 1)  # variance of the cell's beta posterior
    total = counts.sum((-2, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = counts / total[..., None, None]
        estimate = (weight * share).sum((-2, -1))
        chance = (weight * share * (1 - share)).sum((-2, -1)) / total
        pooled = weight.sum(-2, keepdims=True) if len(known) == 1 else weight
        error = np.sqrt(chance + (pooled**2 * doubt).sum((-2, -1)))
        precision = (counts * share).sum(-1) / counts.sum(-1)
    mix = size__cd / size__cd.sum()
    mean = float((mix * share).sum())
    spread = float((mix * (share - mean) ** 2).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        deviation = np.sqrt(spread * (1 / total + 1 / size__cd.sum()))
        z = np.where((total > 0) & (deviation > 0), (mean - estimate) / deviation, -np.inf)
    return ExpectedAccuracy(
        estimate, error, float(right__cd.sum() / size__cd.sum()), precision, normal_above(z)
    )


def _macro(each: Share, seen: NDArray[np.bool_]) -> Share:
    size = seen.sum(-1)
    known = seen & ~np.isnan(each.estimate)
    middle = np.where(known, each.estimate, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = middle.sum(-1) / size
        down = np.sqrt((np.where(known, middle - each.low, 0.0) ** 2).sum(-1)) / size
        up = np.sqrt((np.where(known, each.high - middle, 0.0) ** 2).sum(-1)) / size
    return Share(mean, np.maximum(mean - down, 0.0), np.minimum(mean + up, 1.0))


def _macro_f1(table: Array, f1: Share, seen: NDArray[np.bool_], confidence: float) -> Share:
    """Return the macro mean with the wider of MOVER's and the delta method's interval."""
    found = _macro(f1, seen)
    size = table.shape[-1]
    pull = np.where(seen, f1.estimate, 0.0) / np.maximum(table.sum(-1) + table.sum(-2), 1)
    push = np.where(seen, 2.0, 0.0) / np.maximum(table.sum(-1) + table.sum(-2), 1)
    # What one more count in a cell moves the sum of all F1; its mean over the counts is 0.
    slope = np.eye(size) * push[..., None] - pull[..., :, None] - pull[..., None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        half = _z(confidence) * np.sqrt((table * slope**2).sum((-2, -1))) / seen.sum(-1)
    return Share(
        found.estimate,
        np.maximum(np.minimum(found.low, found.estimate - half), 0.0),
        np.minimum(np.maximum(found.high, found.estimate + half), 1.0),
    )


def _counts(counts: ArrayLike) -> Array:
    values = np.asarray(counts, np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("counts must be finite, non-negative numbers")
    return values


def _table(counts: ArrayLike) -> Array:
    values = _counts(counts)
    if values.ndim < 2 or values.shape[-2:] != (2, DECILES):
        raise ValueError(f"calibration counts are (..., 2, {DECILES}), not {values.shape}")
    return values


def _deciles(edges: ArrayLike | None) -> tuple[Array, Array]:
    """Return the lower and the upper end of each decile, (10,) each."""
    inner = np.arange(1, DECILES) / DECILES if edges is None else np.asarray(edges, np.float64)
    ends = np.concatenate([[0.0], inner.ravel(), [1.0]])
    if inner.shape != (DECILES - 1,) or not (ends[1:] >= ends[:-1]).all():
        raise ValueError("the edges of confidence deciles are 9, ascending in 0 to 1")
    return ends[:-1], ends[1:]


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence is within (0, 1), not {confidence}")
    return normal_quantile((1 + confidence) / 2)
