"""What a window's sketches say in the terms of a profile. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ...ext.frequent import FrequentItems
from ...ext.sketch import SketchBank
from ..store.tables import Window
from . import quality
from .errors import ProfileError
from .profile import CONFIDENCE, ReferenceProfile

AHEAD_MS_MAX: Final = 3_600_000  # a clock set by hand may be an hour ahead …
LATE_MS_MAX: Final = 30 * 86_400_000  # … and a device off the net for a month


def window_counts(
    bank: SketchBank, profile: ReferenceProfile
) -> tuple[list[list[int]], list[int], tuple[float, int]]:
    """Return (counts of each feature's bins, nulls of each, (sum, count) of the confidence).

    Raises:
        ProfileError: The window was counted in other features or bins than the profile's.
    """
    if bank.features != len(profile.features):
        raise ProfileError(
            f"the sketch has {bank.features} features, the profile {len(profile.features)}"
        )
    counts = [[int(count) for count in bank.counts(i)] for i in range(bank.features)]
    for row, feature in zip(counts, profile.features, strict=True):
        if len(row) != len(feature.counts):
            raise ProfileError(f"{feature.name} has {len(row)} bins, not {len(feature.counts)}")
    nulls, sure = [int(bank.nulls(i)) for i in range(bank.features)], (0.0, 0)
    if profile.features[-1].name == CONFIDENCE:
        told = bank.moments(bank.features - 1)
        sure = (float(told.mean) * int(told.count), int(told.count))
    return counts, nulls, sure


def window_codes(
    bank: SketchBank, counts: Sequence[Sequence[int]], profile: ReferenceProfile
) -> dict[int, quality.Codes]:
    """Return what a window tells of each category, by position."""
    found = {}
    for i, feature in enumerate(profile.features):
        if feature.ordered:
            continue
        items, whole = None, 0
        if not bank.bins_only and bank.kinds[i] == "category":
            sketch = FrequentItems.from_bytes(bank.frequent_bytes(i))
            items, whole = sketch.items(threshold=0, no_false_positives=False), sketch.total
        found[i] = quality.codes(feature, bins=counts[i], items=items, whole=whole)
    return found


def window_ms(window: Window) -> int:
    """Return when a window began by the device's clock, or by its receipt if that is off."""
    late_ms = window.received_ms - window.device_start_ms
    return window.device_start_ms if -AHEAD_MS_MAX <= late_ms <= LATE_MS_MAX else window.received_ms
