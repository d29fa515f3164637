"""Fold the deltas of a round into their weighted mean, one at a time.

    delta --check, clip--> x weight x 2^s --truncate--> int64 --add--> sum      (update)
    sum --/ (2^s x total weight)--> mean delta                                   (finalize)

Invariants:
- Integer addition is associative and commutative: the sum does not depend on the order of
  updates or merges, to the bit. What one delta adds depends on that delta and its weight alone.
- No overflow: a delta's largest magnitude is at most its norm, so each entry of the sum is below
  ``deltas_max x weight_max x norm_max x 2^s <= 2^62``; ``s`` is chosen from these bounds.
- Memory is one int64 per parameter, whatever the number of devices.

Error of an entry of the mean, for total weight W of n deltas:
``|mean - exact| <= n x 2^-s / W + 2^-23 x weighted mean of |delta|``: truncation to the grid,
then float32 rounding of the product and of the result.

Not here: who takes part and what is done with the mean (``rules``, ``coordinator``).

Source: McMahan et al., "Communication-Efficient Learning", AISTATS 2017 (the weighted mean);
fixed-point sums as in Bonawitz et al., "Practical Secure Aggregation", CCS 2017, section 5.

P parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .errors import DeltaError

BLOCK: Final = 1 << 14  # 64 KiB of float32 and 128 KiB of int64: a block stays in the L2 cache


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldConfig:
    """Bounds of a fold; they fix its resolution."""

    deltas_max: int = 4096
    """Deltas in one sum."""
    weight_max: int = 1 << 17
    """A delta's weight (windows trained on) is cut to this: no device outvotes the fleet."""
    norm_max: float = 256.0
    """A delta with a larger L2 norm is refused."""
    clip_norm: float = 0.0
    """A delta with a larger L2 norm is scaled down to this; 0 = off."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 1 <= self.deltas_max <= 1 << 20 or not 1 <= self.weight_max <= 1 << 24:
            raise ValueError("deltas_max must be 1 to 2**20, weight_max 1 to 2**24")
        if not 0 < self.norm_max <= 65_536 or not 0 <= self.clip_norm <= self.norm_max:
            raise ValueError("norm_max must be up to 65536, clip_norm at most norm_max")

    @property
    def scale_bits(self) -> int:
        """``s``: the grid of the sum is 2^-s."""
        bound = self.deltas_max * self.weight_max * self.norm_max
        return 62 - math.ceil(math.log2(bound))


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one delta was, and what was done to it."""

    weight: int
    """Weight it counts with; 0 = it does not."""
    norm: float
    """L2 norm before clipping."""
    clipped: bool


class Fold:
    """A running weighted sum of deltas. One owner at a time."""

    def __init__(self, size: int, *, config: FoldConfig | None = None) -> None:
        """Start at zero.

        Args:
            size: Parameters P, at least 1.
            config: Bounds; folds that shall be merged need the same.
        """
        self._config = config or FoldConfig()
        self._sum__p = np.zeros(size, np.int64)
        self.count = 0
        """Deltas with a weight above 0."""
        self.weight = 0
        """Their total weight."""

    def update(self, delta__p: NDArray[np.float32], *, weight: int) -> Contribution:
        """Add one delta.

        Args:
            delta__p: New minus old parameters, shape (P,), float32; may be a memory map.
            weight: Windows it was trained on, at least 0; cut to ``weight_max``. A delta of
                weight 0 is checked and counts for nothing.

        Returns:
            The weight, norm and clipping that it got.

        Raises:
            DeltaError: Wrong shape or dtype, not finite, norm or count beyond its bound; the sum
                is unchanged.
        """
        contribution = check(delta__p, len(self._sum__p), weight=weight, config=self._config)
        if contribution.weight == 0:
            return contribution
        if self.count >= self._config.deltas_max:
            raise DeltaError(f"the sum holds {self.count} deltas already, which is its bound")
        factor = self._config.clip_norm / contribution.norm if contribution.clipped else 1.0
        scale = np.float32(factor * contribution.weight * 2.0**self._config.scale_bits)
        scaled__b = np.empty(BLOCK, np.float32)
        whole__b = np.empty(BLOCK, np.int64)
        for start in range(0, len(delta__p), BLOCK):
            block__b = delta__p[start : start + BLOCK]
            sum__b = self._sum__p[start : start + BLOCK]
            count = len(block__b)
            np.multiply(block__b, scale, out=scaled__b[:count])
            np.copyto(whole__b[:count], scaled__b[:count], casting="unsafe")  # truncates
            np.add(sum__b, whole__b[:count], out=sum__b)
        self.count += 1
        self.weight += contribution.weight
        return contribution

    def merge(self, other: Fold) -> None:
        """Add another fold's sum; the other is unchanged.

        Raises:
            DeltaError: Other size or bounds, or too many deltas together; nothing changed.
        """
        if len(other._sum__p) != len(self._sum__p) or other._config != self._config:
            raise DeltaError("folds of another size or with other bounds do not merge")
        if self.count + other.count > self._config.deltas_max:
            raise DeltaError(f"{self.count + other.count} deltas are beyond the bound of the sum")
        np.add(self._sum__p, other._sum__p, out=self._sum__p)
        self.count += other.count
        self.weight += other.weight

    def finalize(self) -> NDArray[np.float32]:
        """Return the weighted mean delta, shape (P,), float32; the fold stays usable.

        Raises:
            DeltaError: No delta has a weight: there is no mean.
        """
        if self.weight == 0:
            raise DeltaError("no delta of the round has a weight")
        mean__p = np.empty(len(self._sum__p), np.float32)
        divisor = self.weight * 2.0**self._config.scale_bits
        for start in range(0, len(mean__p), BLOCK):
            np.divide(
                self._sum__p[start : start + BLOCK],
                divisor,
                out=mean__p[start : start + BLOCK],
                casting="same_kind",
            )
        return mean__p


def check(
    delta__p: NDArray[np.float32], size: int, *, weight: int, config: FoldConfig
) -> Contribution:
    """Return what a delta would contribute, without adding it.

    Raises:
        DeltaError: As for :meth:`Fold.update`.
    """
    if delta__p.shape != (size,) or delta__p.dtype != np.float32:
        raise DeltaError(
            f"a delta must be float32 ({size},), not {delta__p.dtype} {delta__p.shape}"
        )
    if weight < 0:
        raise DeltaError(f"a delta has the weight {weight}")
    # float32 dot products per block, summed exactly: relative error below 1e-4, and the spare
    # bit of `scale_bits` (62 of 63) covers it. NaN and infinity reach the sum.
    with np.errstate(over="ignore", invalid="ignore"):
        squares = [
            float(np.dot(block__b, block__b))
            for block__b in (delta__p[i : i + BLOCK] for i in range(0, size, BLOCK))
        ]
    if not all(map(math.isfinite, squares)):
        raise DeltaError("a delta holds NaN, infinity or a value that is far too large")
    norm = math.sqrt(math.fsum(squares))
    if norm > config.norm_max:
        raise DeltaError(f"a delta has the norm {norm:.4g}, above the bound {config.norm_max:g}")
    clipped = 0 < config.clip_norm < norm
    return Contribution(min(weight, config.weight_max), norm, clipped)
