"""Profiles and devices of made-up people, whose habits are known."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.server.drift import profile as profiles
from shoal.server.drift.profile import ReferenceProfile

CHANNELS = ("a", "b", "c")
SAMPLES = 20


@dataclass
class People:
    """Draws windows of people: each has a mean per channel, and drifts a little from day to day."""

    rng: np.random.Generator
    means: dict[int, NDArray[np.float64]] = field(default_factory=dict)

    def windows(self, person: int, count: int) -> NDArray[np.float32]:
        """Return (count, 3, SAMPLES) of one day; samples of a window depend on each other."""
        if person not in self.means:
            self.means[person] = self.rng.normal(0, 1, 3)
        day = self.means[person] + self.rng.normal(0, 0.05, 3)
        bouts = self.rng.normal(0, 0.3, (count, 3, 1))
        noise = self.rng.normal(0, 1, (count, 3, SAMPLES))
        return (day[None, :, None] + bouts + noise).astype(np.float32)

    def profile(self, persons: int = 7) -> ReferenceProfile:
        """Return a profile of people 0 … persons - 1, of a model that is right in 95 %."""
        parts = [self.windows(p, n) for p in range(persons) for n in (300, 100)]
        group = np.repeat(np.arange(persons), 400)
        held = np.tile(np.repeat([False, True], [300, 100]), persons)
        confidence = self.rng.beta(20, 2, 400 * persons).astype(np.float32)
        correct = self.rng.random(400 * persons) < 0.95
        return profiles.build(
            np.concatenate(parts), confidence, correct, group, held, channels=CHANNELS
        )

    def counts(
        self, profile: ReferenceProfile, x__nct: NDArray[np.float32], *, confidence: float = 20
    ) -> list[list[int]]:
        """Return what a device would count of windows and of its confidence in them."""
        values = [x__nct[:, i].ravel() for i in range(3)]
        values.append(self.rng.beta(confidence, 2, len(x__nct)).astype(np.float32))
        found = []
        for feature, each in zip(profile.features, values, strict=True):
            edges = np.array(feature.edges, np.float32)
            where = np.searchsorted(edges, each, side="right")
            found.append(np.bincount(where, minlength=len(edges) + 1).tolist())
        return found


@pytest.fixture
def people() -> People:
    """People of a fixed seed."""
    return People(np.random.default_rng(7))
