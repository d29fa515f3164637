"""The reference of the joint distribution: mean random features of the training data.

    window --every stride-th sample--> rows of C values --RandomFeatures--> sums --> mean of F

A row is one sample of all channels, not a summary of the window. It needs no choice of summaries
that fits one kind of sensor and not another; what ties the channels together at one time is what
no histogram of a single channel sees (their own distributions are watched there); and it costs F
times C operations wherever it is taken. Neighbouring samples say nearly the same, so a window
gives at most 16 of them, ``stride`` samples apart: some 2 us of a device's time at F = 64. They
still are no independent evidence. The groups' means, of training and of held-out windows, say how
far apart the means of equally healthy devices, and of one device's two times, are.

The weights are Gaussian, so the features are those of a Gaussian kernel; its bandwidth is the
median distance of two rows. They are drawn here, once, and travel with the model: a device
draws nothing. They are rounded to float16 before anything is computed with them, so both ends use
the same.

Codes of a category take part as the numbers they are. Their numbering has no meaning, and gives
none to the test: a Gaussian kernel tells any two distributions apart, and the null, one
distribution, stays what it is. It only decides how soon: codes whose numbers are far apart are told
apart sooner. Left out, nothing would see that a channel no longer goes with the category, while
both by themselves are as ever.

G groups, C channels, F random features, N windows, T samples, R rows.

Source: Rahimi, Recht, "Random features for large-scale kernel machines", NIPS 2007; Gretton et al.,
"A kernel two-sample test", JMLR 13, 2012 (the median heuristic).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...ext.projection import RandomFeatures
from . import profile_fields as fields
from .errors import ProfileError

FEATURES_MAX: Final = 256
WEIGHT_MAX: Final = 16.0
STRIDE_MAX: Final = 1 << 24
ROWS_PER_WINDOW_MAX: Final = 16
BANDWIDTH_MIN: Final = 0.25  # of a standard deviation: below, the features see noise alone
_WINDOWS: Final = 4096  # windows whose scale and distances are taken: memory for 65,536 rows
_PAIRS: Final = 4096  # distances whose median is taken: its error is below 2 %
_ROWS: Final = 4096  # rows whose covariance is taken
_TURN: Final = float(np.float32(2 * np.pi))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionProfile:
    """A projection and the mean features of the reference. Bytes are little-endian arrays."""

    features: int
    """F."""
    columns: int
    """C."""
    stride: int
    """Samples between two rows of a window; the first row is sample 0."""
    bandwidth: float
    """Of the Gaussian kernel exp(-distance^2 / (2 bandwidth^2)), in scales."""
    weights: bytes
    """float16 (F, C), radians per scale."""
    phases: bytes
    """float32 (F,), radians."""
    mean: bytes
    """float32 (C,): what is subtracted of a row."""
    scale: bytes
    """float32 (C,): what it is divided by then."""
    rows: int
    """Rows of the training data of all groups."""
    means: bytes
    """float32 (F,): mean features of these rows."""
    variances: bytes
    """float32 (F,): variance of each feature from row to row."""
    covariance_square: float
    """Sum of the squares of the F x F covariances. With the variances it says how many degrees of
    freedom the squared distance of two means has: (sum of variances)^2 / this."""
    trained_rows: tuple[int, ...]
    """Rows of each group's training data, G."""
    trained: bytes
    """float16 (G, F): their mean features; 0 where there is no row."""
    held_rows: tuple[int, ...]
    """Rows of each group's held-out data, G."""
    held: bytes
    """float16 (G, F): their mean features."""

    def means__f(self) -> NDArray[np.float64]:
        """Return the mean features of the training data."""
        return _array(self.means, "<f4")

    def variances__f(self) -> NDArray[np.float64]:
        """Return the variance of each feature from row to row."""
        return _array(self.variances, "<f4")

    def held__gf(self) -> NDArray[np.float64]:
        """Return the mean features of each group's held-out data."""
        return _array(self.held, "<f2").reshape(-1, self.features)

    def with_groups(self, count: int) -> ProjectionProfile:
        """Return the profile with so many more groups that have no row."""
        nothing, empty = (0,) * count, bytes(2 * self.features * count)
        return replace(
            self,
            trained_rows=self.trained_rows + nothing,
            trained=self.trained + empty,
            held_rows=self.held_rows + nothing,
            held=self.held + empty,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object; the number of columns is that of the profile's channels."""
        raw: dict[str, Any] = {
            "features": self.features,
            "stride": self.stride,
            "bandwidth": self.bandwidth,
            "rows": self.rows,
            "covariance_square": self.covariance_square,
            "trained_rows": self.trained_rows,
            "held_rows": self.held_rows,
        }
        for name in ("weights", "phases", "mean", "scale", "means", "variances"):
            raw[name] = fields.text(getattr(self, name))
        return raw | {"trained": fields.text(self.trained), "held": fields.text(self.held)}

    @classmethod
    def from_dict(cls, raw: Any, *, columns: int, groups: int) -> ProjectionProfile:
        """Return the profile of parsed JSON.

        Raises:
            ProfileError: A field is missing, ill-typed or out of bounds.
        """
        raw = fields.mapping(raw, "projection")
        count = fields.whole(raw, "features", low=1, high=FEATURES_MAX)
        found = cls(
            features=count,
            columns=columns,
            stride=fields.whole(raw, "stride", low=1, high=STRIDE_MAX),
            bandwidth=fields.real(raw, "bandwidth", low=BANDWIDTH_MIN, high=1e6),
            weights=fields.packed(raw, "weights", "<f2", count * columns),
            phases=fields.packed(raw, "phases", "<f4", count),
            mean=fields.packed(raw, "mean", "<f4", columns),
            scale=fields.packed(raw, "scale", "<f4", columns),
            rows=fields.whole(raw, "rows", low=1),
            means=fields.packed(raw, "means", "<f4", count),
            variances=fields.packed(raw, "variances", "<f4", count),
            covariance_square=fields.real(raw, "covariance_square", low=0.0, high=float(count**2)),
            trained_rows=fields.counts(raw.get("trained_rows"), groups, "trained_rows"),
            trained=fields.packed(raw, "trained", "<f2", groups * count),
            held_rows=fields.counts(raw.get("held_rows"), groups, "held_rows"),
            held=fields.packed(raw, "held", "<f2", groups * count),
        )
        phases, variances = _array(found.phases, "<f4"), found.variances__f()
        means = (found.means__f(), _array(found.trained, "<f2"), found.held__gf())
        if (
            (np.abs(_array(found.weights, "<f2")) > WEIGHT_MAX).any()
            or (phases < 0).any()
            or (phases > _TURN).any()
            or (_array(found.scale, "<f4") <= 1e-38).any()
            or (variances < 0).any()
            or (variances > 1).any()
            or any((np.abs(each) > 1).any() for each in means)
        ):
            raise ProfileError("a weight, phase, scale, mean or variance is out of range")
        return found


def measure(
    x__nct: NDArray[np.float32],
    *,
    trained: Sequence[NDArray[np.bool_]],
    held: Sequence[NDArray[np.bool_]],
    bounds__c2: NDArray[np.float32],
    features: int,
    seed: int,
) -> ProjectionProfile | None:
    """Return the projection of training windows; None if no row is finite.

    Args:
        x__nct: Windows, float32 (N, C, T).
        trained: Which of them are each group's training data, bool (N,) each, N > 0.
        held: Which of them are each group's held-out data.
        bounds__c2: The channels' (low, high): what is outside does not widen the scale.
        features: Random features, 1 to 256.
        seed: Of the weights and the rows that are looked at.
    """
    _, columns, samples = x__nct.shape
    stride = -(-samples // ROWS_PER_WINDOW_MAX)
    rng = np.random.default_rng(seed)
    base = np.flatnonzero(np.any(trained, axis=0))
    seen = rng.permutation(base)[:_WINDOWS]
    rows__rc = x__nct[seen][:, :, ::stride].transpose(0, 2, 1).reshape(-1, columns)
    rows__rc = rows__rc[np.isfinite(rows__rc).all(1)]
    if not len(rows__rc):
        return None
    inside = np.clip(rows__rc, bounds__c2[:, 0], bounds__c2[:, 1]).astype(np.float64)
    mean__c = inside.mean(0).astype(np.float32)
    spread = inside.std(0)
    scale__c = np.where(spread > 1e-30, spread, 1.0).astype(np.float32)
    z = (inside - mean__c) / scale__c
    pairs = rng.integers(0, len(z), (2, _PAIRS))
    apart = np.sqrt(np.square(z[pairs[0]] - z[pairs[1]]).sum(1))
    median = float(np.median(apart[apart > 0])) if (apart > 0).any() else 1.0
    bandwidth = max(median, BANDWIDTH_MIN)
    drawn = rng.standard_normal((features, columns)) / bandwidth
    weights__fc = np.clip(drawn, -WEIGHT_MAX, WEIGHT_MAX).astype("<f2")
    phases__f = np.clip(rng.uniform(0, _TURN, features), 0, _TURN).astype(np.float32)
    kernel = RandomFeatures(weights__fc.astype(np.float32), phases__f, mean__c, scale__c)
    angles = rng.permutation(z)[:_ROWS] @ weights__fc.T.astype(np.float64) + phases__f
    covariance = np.atleast_2d(np.cov(np.cos(angles).T, bias=True))
    early, late = (
        [_sums(kernel, x__nct[chosen], stride) for chosen in part] for part in (trained, held)
    )
    early_rows, late_rows = (tuple(rows for _, rows in part) for part in (early, late))
    total = np.sum([sums for sums, _ in early], axis=0)
    return ProjectionProfile(
        features=features,
        columns=columns,
        stride=stride,
        bandwidth=bandwidth,
        weights=weights__fc.tobytes(),
        phases=fields.pack(phases__f, "<f4"),
        mean=fields.pack(mean__c, "<f4"),
        scale=fields.pack(scale__c, "<f4"),
        rows=sum(early_rows),
        means=fields.pack(_mean(total, sum(early_rows)), "<f4"),
        variances=fields.pack(np.diag(covariance), "<f4"),
        covariance_square=float(np.square(covariance).sum()),
        trained_rows=early_rows,
        trained=fields.pack(np.array([_mean(*each) for each in early]), "<f2"),
        held_rows=late_rows,
        held=fields.pack(np.array([_mean(*each) for each in late]), "<f2"),
    )


def _sums(
    kernel: RandomFeatures, x__nct: NDArray[np.float32], stride: int
) -> tuple[NDArray[np.float64], int]:
    kernel.reset()
    kernel.add_channels(np.ascontiguousarray(x__nct), stride=stride)
    return kernel.read()


def _mean(sums__f: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
    """Return the mean features, zeros where there is no row."""
    # A cosine may round to 1 + 2**-23, which a reader refuses.
    return np.clip(sums__f / max(rows, 1), -1, 1)


def _array(data: bytes, dtype: str) -> NDArray[np.float64]:
    return np.frombuffer(data, dtype).astype(np.float64)
