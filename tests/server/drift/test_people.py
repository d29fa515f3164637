"""The detectors on the recordings of ten real people: strangers are found, the known are not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.examples import watch
from shoal.server.drift import detectors, verdicts
from shoal.server.drift.detectors import DeviceState, DriftConfig
from shoal.server.drift.profile import ReferenceProfile, build
from shoal.server.drift.verdicts import Look, VerdictConfig

PEOPLE = range(1, 11)
SIZE = 60  # predictions per telemetry window, two seconds of the demo
CONFIG = DriftConfig()


@dataclass
class Fleet:
    """Ten devices, each replaying one person; a model that is as sure and as right of everyone."""

    data: dict[int, watch.Windows]

    def profile(self, known: list[int]) -> ReferenceProfile:
        """Return the profile of the known people's training and validation windows."""
        parts = [self.data[p] for p in known]
        group = np.repeat(known, [len(part.y__n) for part in parts])
        x, split = (np.concatenate([getattr(p, n) for p in parts]) for n in ("x__nct", "split__n"))
        kept = split != watch.TEST
        sure = np.full(kept.sum(), 0.9, np.float32)
        return build(
            x[kept], sure, np.ones(kept.sum(), bool), group[kept], split[kept] == watch.VALIDATION,
            channels=watch.CHANNELS,
        )  # fmt: skip

    def opened(
        self, profile: ReferenceProfile, *, windows: int, broken: dict[int, int] | None = None
    ) -> tuple[dict[int, int], dict[int, set[str]]]:
        """Return whose alarm opened, after how many windows, and which sensors were blamed.

        ``broken`` says which channel of whom is off by a standard deviation.
        """
        edges = [np.array(f.edges, np.float32) for f in profile.features[:-1]]
        rows = {p: self._rows(p, edges, broken=(broken or {}).get(p)) for p in PEOPLE}
        states = {p: DeviceState() for p in PEOPLE}
        found: dict[int, int] = {}
        blamed: dict[int, set[str]] = {}
        for at in range(windows):
            for p, state in states.items():
                order = self.data[p].order
                chosen = order[np.arange(at * SIZE, (at + 1) * SIZE) % len(order)]
                counts = [each[chosen].sum(0).tolist() for each in rows[p]]
                state.fold([*counts, [0, SIZE]], config=CONFIG)
            fleet = {
                str(p): detectors.findings(state, profile, config=CONFIG)
                for p, state in states.items()
            }
            levels = {
                str(p): detectors.level(state, standing="shift" in state.alarms, config=CONFIG)
                for p, state in states.items()
            }
            kept = detectors.judge_fleet(fleet, config=CONFIG, levels=levels)
            for p, state in states.items():
                detectors.settle(state, ["shift"] if kept[str(p)] else [], config=CONFIG)
                if state.open:
                    found.setdefault(p, at + 1)
                    look = Look(found=fleet[str(p)], kept=kept[str(p)])
                    blamed.setdefault(p, set()).add(verdicts.single(look, config=VerdictConfig()))
        return found, {p: names - {""} for p, names in blamed.items()}

    def _rows(
        self, person: int, edges: list[NDArray[np.float32]], *, broken: int | None
    ) -> list[NDArray[np.int64]]:
        """Return the counts of each window, for each channel (N, B)."""
        found = []
        for i, each in enumerate(edges):
            x__nt = self.data[person].x__nct[:, i]
            if i == broken:
                x__nt = x__nt + x__nt.std()
            where = np.searchsorted(each, x__nt, side="right")
            found.append(np.stack([(where == b).sum(1) for b in range(len(each) + 1)], 1))
        return found


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    """The recordings, cut."""
    data = watch.load()
    return Fleet({person: watch.windows(data, person) for person in PEOPLE})


@pytest.mark.parametrize("unseen", [(6, 7, 10), (4, 5, 8), (1, 2, 3), (1, 3, 9), (6, 8, 10)])
def test_strangers_and_only_they_are_found(fleet: Fleet, unseen: tuple[int, ...]) -> None:
    """From the histograms of their movements alone, over two replays of the recordings.

    Some move unlike others in one channel only, and little: no sensor is blamed for it.
    """
    profile = fleet.profile([p for p in PEOPLE if p not in unseen])
    found, blamed = fleet.opened(profile, windows=20)
    assert set(found) == set(unseen)
    assert max(found.values()) <= 12
    assert not any(blamed.values())


def test_a_sensor_that_is_off_is_blamed(fleet: Fleet) -> None:
    """By one standard deviation, of people whom the model knows."""
    broken = {2: 0, 5: 4}
    found, blamed = fleet.opened(fleet.profile(list(PEOPLE)), windows=20, broken=broken)
    assert set(found) == set(broken)
    assert blamed == {p: {watch.CHANNELS[channel]} for p, channel in broken.items()}


def test_nobody_is_found_where_all_are_known(fleet: Fleet) -> None:
    """The control: the same rules stay silent."""
    assert fleet.opened(fleet.profile(list(PEOPLE)), windows=20) == ({}, {})
