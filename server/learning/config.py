"""What of the bundles that the server makes is for an operator to choose."""

from __future__ import annotations

from dataclasses import dataclass

from ..drift.profile import BINS_MAX
from ..drift.profile_projection import FEATURES_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileConfig:
    """How finely the reference profile of a bundle looks at its windows.

    It holds for bundles made from then on: a device counts as the profile of its bundle says.
    """

    bins: int = 16
    """Bins of a feature, at most. More see a change of shape sooner and of location later, and
    cost some two bytes each in every record; categories with more codes share bins."""
    projected: int = 64
    """Random features of the joint distribution of the channels: 2 us of a device's time and 256
    bytes of a record. 0: it is not watched, e.g. on the smallest boards."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 2 <= self.bins <= BINS_MAX:
            raise ValueError(f"bins must be 2 to {BINS_MAX}")
        if not 0 <= self.projected <= FEATURES_MAX:
            raise ValueError(f"projected must be 0 to {FEATURES_MAX}")
