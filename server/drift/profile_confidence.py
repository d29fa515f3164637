"""How sure a model was on held-out data, and how often right: the reference of its scores.

    held-out answers --predicted class x confidence decile--> right, wrong

With it the accuracy of windows without labels is estimated from their score table (CBPE), and the
calibration of windows with late labels is compared. The deciles are those of the held-out
confidence, not tenths of 0 to 1: a good model's answers would nearly all be in the last tenth.

K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from . import profile_fields as fields
from .errors import ProfileError

DECILES: Final = 10
CLASSES_MAX: Final = 1024

Counts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class ConfidenceProfile:
    """Held-out answers by predicted class and confidence decile, K x 10 each."""

    deciles: tuple[float, ...]
    """9 ascending inner edges, some may be equal; a confidence on an edge is above it:
    ``np.searchsorted(deciles, confidence, side="right")``."""
    right: Counts
    wrong: Counts

    @property
    def classes(self) -> int:
        """Number of classes, K; 1 also if the classes were not told apart."""
        return len(self.right)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object; the edges stand apart, for the device."""
        return {"right": self.right, "wrong": self.wrong}

    @classmethod
    def from_dict(cls, raw: Any, *, deciles: Any) -> ConfidenceProfile:
        """Return the profile of parsed JSON.

        Raises:
            ProfileError: A field is missing, ill-typed or out of bounds.
        """
        raw = fields.mapping(raw, "confidence")
        edges = fields.float32s(deciles, DECILES - 1, "deciles")
        if edges[0] < 0 or edges[-1] > 1 or any(b < a for a, b in pairwise(edges)):
            raise ProfileError("the profile's deciles do not ascend from 0 to 1")
        classes = len(fields.items(raw, "right", bound=CLASSES_MAX))
        if not classes:
            raise ProfileError("the profile's confidence has no class")
        right, wrong = (
            fields.tables(raw.get(key), classes, DECILES, key) for key in ("right", "wrong")
        )
        return cls(edges, right, wrong)


def measure(
    confidence__n: NDArray[np.float32],
    correct__n: NDArray[np.bool_],
    predicted__n: NDArray[np.int64],
    *,
    classes: int,
) -> ConfidenceProfile:
    """Return the profile of held-out answers.

    Args:
        confidence__n: Largest probability of each answer, float32 (N,), 0 to 1.
        correct__n: Whether it was right, bool (N,).
        predicted__n: Its class, int64 (N,), 0 to classes - 1.
        classes: Number of classes, 1 to 1,024.

    Raises:
        ValueError: A class or a confidence is out of range, or there is no answer.
    """
    if not 1 <= classes <= CLASSES_MAX:
        raise ValueError(f"classes must be 1 to {CLASSES_MAX}, not {classes}")
    # A softmax in float32 may answer 1 + 2**-23.
    if not (np.abs(confidence__n - 0.5) <= 0.5 + 1e-6).all() or not len(confidence__n):
        raise ValueError("a profile needs held-out confidence, each 0 to 1")
    if ((predicted__n < 0) | (predicted__n >= classes)).any():
        raise ValueError(f"a predicted class is not 0 to {classes - 1}")
    inner = np.arange(1, DECILES) / DECILES
    confidence__n = np.clip(confidence__n, 0, 1)
    edges = np.quantile(confidence__n, inner, method="inverted_cdf").astype(np.float32)
    bins = predicted__n * DECILES + np.searchsorted(edges, confidence__n, side="right")
    right, wrong = (
        tuple(
            tuple(int(count) for count in row)
            for row in np.bincount(bins[chosen], minlength=classes * DECILES).reshape(classes, -1)
        )
        for chosen in (correct__n, ~correct__n)
    )
    return ConfidenceProfile(tuple(float(edge) for edge in edges), right, wrong)
