"""Say which of many findings stand, with a bound on the share of false ones. Pure.

    p-values --bh, by--> discoveries          e-values --e_bh, hierarchy--> discoveries

Null of each: that its p-value is stochastically no smaller than uniform, or that its e-value is
non-negative with a mean of at most 1. Error control of each: the expected share of false
discoveries among the discoveries (FDR) is at most ``share``, and therefore, where nothing has
changed anywhere, so is the probability of any discovery at all:

- :func:`bh`: p-values that are independent or positively dependent (PRDS);
- :func:`by`, :func:`e_bh`, :func:`hierarchy`: whatever the dependence.

Sources: Benjamini, Hochberg, JRSS B 57 (1995); Benjamini, Yekutieli, Annals of Statistics 29
(2001); Wang, Ramdas, "False discovery rate control with e-values", JRSS B 84 (2022); families
that were selected: Benjamini, Bogomolov, JRSS B 76 (2014).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

Mask = NDArray[np.bool_]

TINY: Final = 1e-300  # e-values below it are no evidence, and their reciprocal overflows


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Discoveries of two levels."""

    devices__d: Mask
    """Devices in which something has changed, (D,)."""
    features__df: Mask
    """What has changed in them, (D, F); False everywhere in a device that was not discovered."""


def bh(p_values: ArrayLike, share: float) -> Mask:
    """Return which p-values are discoveries after Benjamini and Hochberg.

    Args:
        p_values: Shape (N,), 0 to 1; N may be 0.
        share: Bound of the false discovery rate, 0 < share < 1.

    Returns:
        Shape (N,). Equal p-values fare alike.

    Raises:
        ValueError: A p-value or the share is out of range.

    >>> bh([0.001, 0.02, 0.4], 0.05).tolist()
    [True, True, False]
    """
    return _step_up(_p_values(p_values), _share(share))


def by(p_values: ArrayLike, share: float) -> Mask:
    """Return which p-values are discoveries after Benjamini and Yekutieli; else as :func:`bh`."""
    values = _p_values(p_values)
    return _step_up(values, _share(share) / max(1.0, sum(1 / k for k in range(1, len(values) + 1))))


def e_bh(e_values: ArrayLike, share: float) -> Mask:
    """Return which e-values are discoveries: BH on their reciprocals.

    Args:
        e_values: Shape (N,), each >= 0, infinity included; N may be 0.
        share: Bound of the false discovery rate, 0 < share < 1.

    Returns:
        Shape (N,).

    Raises:
        ValueError: An e-value is negative or NaN, or the share is out of range.

    >>> e_bh([100.0, 30.0, 1.0], 0.1).tolist()
    [True, True, False]
    """
    values = _e_values(e_values)
    if values.ndim != 1:
        raise ValueError("e-values must be a vector")
    return _step_up(_reciprocal(values), _share(share))


def hierarchy(e_values__df: ArrayLike, share: float) -> Hierarchy:
    """Return which devices have changed, and in them which features.

    The mean of a device's e-values is an e-value of "nothing has changed in this device", however
    they depend on each other; e-BH over the devices bounds the share of false devices. Within
    each of the R devices discovered of D, e-BH runs at ``share * R / D``: the false share of
    features, averaged over the discovered devices, is then at most ``share`` in expectation.
    (Proof: a discovery of e-BH at level a among F has 1 / discoveries <= a e / F, hence the mean
    of the false shares is at most (1 / R) sum over devices (share R / D) mean(null e), whose
    expectation is at most ``share``, for any selection and any dependence.)

    Args:
        e_values__df: Shape (D, F), each >= 0; what was not measured is 1.
        share: Bound at both levels, 0 < share < 1.

    Raises:
        ValueError: As for :func:`e_bh`, or the array has not two axes with F >= 1.
    """
    values = _e_values(e_values__df)
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError("e-values of a hierarchy must be devices x features, with a feature")
    devices = e_bh(values.mean(1), share)
    features = np.zeros(values.shape, np.bool_)
    level = share * int(devices.sum()) / max(1, len(values))
    for i in np.flatnonzero(devices):
        features[i] = e_bh(values[i], level)
    return Hierarchy(devices, features)


def _step_up(p_values: NDArray[np.float64], share: float) -> Mask:
    """Return which lie at or below the largest p(k) <= k share / N."""
    count = len(p_values)
    ranked = np.sort(p_values)
    passed = np.flatnonzero(ranked <= np.arange(1, count + 1) * share / max(count, 1))
    if not len(passed):
        return np.zeros(count, np.bool_)
    return np.asarray(p_values <= ranked[passed[-1]])


def _p_values(values: ArrayLike) -> NDArray[np.float64]:
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or not ((found >= 0) & (found <= 1)).all():
        raise ValueError("p-values must be a vector of numbers from 0 to 1")
    return found


def _e_values(values: ArrayLike) -> NDArray[np.float64]:
    found = np.asarray(values, np.float64)
    if not (found >= 0).all():
        raise ValueError("e-values must be numbers that are not negative")
    return found


def _reciprocal(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(1.0, values, out=np.full_like(values, math.inf), where=values > TINY)


def _share(share: float) -> float:
    if not 0 < share < 1:
        raise ValueError(f"a share of false discoveries must be in (0, 1), not {share}")
    return share
