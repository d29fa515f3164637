"""Devices against their own first windows: silent without a change, quick with one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.server.drift import streams
from shoal.server.drift.detectors import Finding
from shoal.server.drift.e_cusum import ECusumConfig
from shoal.server.drift.e_cusum_null import NullConfig
from shoal.server.drift.special import normal_quantile
from shoal.server.drift.streams import Layout, StreamConfig, Streams
from shoal.server.drift.verdicts import changes_text

BINS, ROWS, HOUR_MS = 16, 120, 3_600_000
EDGES = np.array([normal_quantile(i / BINS) for i in range(1, BINS)])
NAMES = ("a", "b", "c", "confidence")
CONFIG = StreamConfig(baseline_windows=48)


def reference(names: tuple[str, ...] = NAMES) -> Any:
    """Return what is read of a profile: names, counts and whether they have an order."""
    return SimpleNamespace(
        features=[SimpleNamespace(name=n, counts=(40,) * BINS, ordered=True) for n in names]
    )


class Fleet:
    """Devices whose rows depend on their neighbours and whose means have a day."""

    def __init__(self, devices: int, *, cycle: float = 0.1, seed: int = 1, **config: Any) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape = (devices, len(NAMES))
        self.last = self.rng.standard_normal(self.shape)
        self.phase = self.rng.uniform(0, 2 * math.pi, self.shape)
        self.habit = self.rng.normal(0, 0.3, self.shape)  # none is like the reference
        self.shift = np.zeros(self.shape)
        self.cycle, self.window = cycle, 0
        self.config = StreamConfig(baseline_windows=48, **config)
        layout = Layout.of([BINS] * len(NAMES), self.config)
        self.devices = [Streams.from_dict({}, layout) for _ in range(devices)]

    def counts(self) -> NDArray[np.int64]:
        """Return one window of each device, D x F x B."""
        hour = 2 * math.pi * self.window / 24
        mean = self.habit + self.shift + self.cycle * np.sin(hour + self.phase)
        found = np.zeros((*self.shape, BINS), np.int64).reshape(-1, BINS)
        at = np.arange(len(found))
        for _ in range(ROWS):
            self.last = 0.5 * self.last + math.sqrt(0.75) * self.rng.standard_normal(self.shape)
            found[at, np.searchsorted(EDGES, (self.last + mean).ravel(), side="right")] += 1
        self.window += 1
        return found.reshape(*self.shape, BINS)

    def play(self, windows: int) -> dict[int, tuple[int, list[Finding]]]:
        """Return the devices that were told of: after how many windows, and what."""
        found: dict[int, tuple[int, list[Finding]]] = {}
        for at in range(windows):
            time_ms = self.window * HOUR_MS
            told = [[(each.tolist(), time_ms)] for each in self.counts()]
            streams.fold(self.devices, told, reference(), config=self.config)
            for i, each in enumerate(self.findings()):
                if each and i not in found:
                    found[i] = at + 1, each
        return found

    def findings(self) -> list[list[Finding]]:
        """Return what is found of each device now."""
        return streams.findings(self.devices, reference(), config=self.config)


def test_a_fleet_that_does_not_change_is_silent() -> None:
    """Habits, neighbouring rows that are alike and a day's cycle are no change."""
    fleet = Fleet(25)
    assert fleet.play(200) == {}
    assert all(each.vector is not None for each in fleet.devices)


def test_a_small_shift_of_few_devices_is_found_soon() -> None:
    """Half a standard deviation of one feature in 2 of 40; with the window it began in."""
    fleet = Fleet(40, seed=2)
    assert fleet.play(72) == {}
    fleet.shift[:2, 1] = 0.5
    found = fleet.play(20)
    assert set(found) == {0, 1}
    for after, (first, *_) in found.values():
        assert after <= 16
        assert first.feature == "b" and first.direction > 0.1 and first.effect > first.normal
        assert 72 <= first.since <= 72 + after
        assert first.since_ms == (first.since - 1) * HOUR_MS
        assert 0 < first.p_value < 0.01


def test_it_ends_soon_after_the_change_did() -> None:
    """However long that lasted."""
    fleet = Fleet(3)
    fleet.play(60)
    fleet.shift[0, 0] = 1.0
    fleet.play(60)
    assert [bool(each) for each in fleet.findings()] == [True, False, False]
    fleet.shift[0, 0] = 0.0
    fleet.play(8)
    assert fleet.findings() == [[], [], []]


def test_a_confidence_that_rises_is_no_finding() -> None:
    """One that falls is."""
    fleet = Fleet(2)
    fleet.play(60)
    fleet.shift[:, 3] = 1.0, -1.0
    fleet.play(12)
    assert [[f.feature for f in each] for each in fleet.findings()] == [[], ["confidence"]]


def test_a_category_changes_its_mix_and_goes_neither_up_nor_down() -> None:
    """Its codes are names: the same change of a number has a direction."""
    fleet = Fleet(1)
    fleet.play(60)
    fleet.shift[0, 0] = 1.0
    fleet.play(12)
    profile = reference()
    found = []
    for ordered in (True, False):
        profile.features[0].ordered = ordered
        found.append(streams.findings(fleet.devices, profile, config=fleet.config)[0][0])
    number, code = found
    assert (number.way, code.way, code.direction) == ("higher", "in another mix", 0.0)
    assert changes_text([code]).startswith("a in another mix since window ")
    assert code.psi == number.psi > 0.1


def test_a_baseline_lasts_as_long_as_it_must_in_bounded_room() -> None:
    """Windows of a minute: 1,440 of them are the baseline, in at most twice 48 rows."""
    fleet = Fleet(1)
    (device,) = fleet.devices
    counts = fleet.counts()[0].tolist()
    for at in range(1500):
        streams.fold([device], [[(counts, 60_000 * at)]], reference(), config=fleet.config)
        if device.vector is not None:
            break
        assert device.rows is not None and len(device.rows) <= 96
        assert device.rows.sum() == (at + 1) * ROWS * len(NAMES)  # nothing is lost
    assert 1440 < device.windows <= 1440 + 32
    assert fleet.findings() == [[]]


def test_many_windows_at_once_are_folded_like_one_by_one() -> None:
    """A device that was off the net sends a day together; the fit falls in the middle of it."""
    one, all_ = Fleet(2), Fleet(2)
    one.shift[:] = all_.shift[:] = np.eye(2, 4)
    one.play(60)
    told: list[list[Any]] = [[], []]
    for _ in range(60):
        time_ms = all_.window * HOUR_MS
        for queue, each in zip(told, all_.counts(), strict=True):
            queue.append((each.tolist(), time_ms))
    streams.fold(all_.devices, told, reference(), config=all_.config)
    for a, b in zip(one.devices, all_.devices, strict=True):
        assert a.vector is not None and b.vector is not None
        np.testing.assert_allclose(a.vector, b.vector, rtol=1e-9)


@pytest.mark.parametrize("windows", [0, 30, 60])
def test_a_state_goes_through_json_exactly(windows: int) -> None:
    """In the baseline and after it; and it is small."""
    fleet = Fleet(1)
    fleet.play(windows)
    (device,) = fleet.devices
    layout = Layout.of([BINS] * len(NAMES), CONFIG)
    text = json.dumps(device.to_dict())
    again = Streams.from_dict(json.loads(text), layout)
    assert again.to_dict() == device.to_dict()
    assert len(text) < 8 * 1024 * len(NAMES)
    fleet.devices = [again]
    fleet.play(2)
    assert again.windows + (again.vector is not None) >= min(windows, 48)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.pop("shape"),
        lambda raw: raw.update(shape=[1, 2, 3]),
        lambda raw: raw.update(vector="???"),
        lambda raw: raw.update(vector="AAAA"),
        lambda raw: raw.update(span_ms=[1]),
        lambda raw: raw.pop("vector"),
    ],
)
def test_a_damaged_state_is_learned_anew(change: Callable[[dict[str, Any]], Any]) -> None:
    """It costs the device its baseline, and nobody the worker."""
    fleet = Fleet(1)
    fleet.play(50)
    raw = fleet.devices[0].to_dict()
    change(raw)
    again = Streams.from_dict(raw, Layout.of([BINS] * len(NAMES), CONFIG))
    assert again.windows == 0 and again.vector is None and again.rows is not None


def test_features_that_tell_nothing_are_never_found() -> None:
    """One bin alone, and a feature of nulls only; the others are watched as ever."""
    profile = reference(("a", "b", "c"))
    profile.features[1].counts = (640,)
    config = StreamConfig(baseline_windows=20, baseline_s=0)
    device = Streams.from_dict({}, Layout.of([BINS, 1, BINS], config))
    rng = np.random.default_rng(1)
    for at in range(40):
        mean = 1.0 if at > 25 else 0.0
        where = np.searchsorted(EDGES, rng.normal(mean, 1, ROWS), side="right")
        a = np.bincount(where, minlength=BINS).tolist()
        c = [0] * BINS if at < 30 else a
        streams.fold([device], [[([a, [ROWS], c], at)]], profile, config=config)
    ((found,),) = streams.findings([device], profile, config=config)
    assert found.feature == "a"


def test_a_fleet_of_none_has_no_finding() -> None:
    """And one whose baselines are not complete either."""
    assert streams.findings([], reference(), config=CONFIG) == []
    fleet = Fleet(2)
    fleet.play(3)
    assert fleet.findings() == [[], []]


@pytest.mark.parametrize(
    "settings",
    [
        {"baseline_windows": 19},
        {"baseline_windows": 1001},
        {"baseline_s": -1},
        {"discoveries_false_max": 0.0},
        {"null": NullConfig(baseline_windows_min=80)},
    ],
)
def test_a_configuration_is_checked(settings: dict[str, Any]) -> None:
    """Limits have reasons."""
    with pytest.raises(ValueError, match="must"):
        StreamConfig(**settings)


def test_another_look_back_learns_anew() -> None:
    """Its numbers are of another shape."""
    fleet = Fleet(1)
    fleet.play(50)
    other = StreamConfig(alarm=ECusumConfig(look_back=4))
    raw = fleet.devices[0].to_dict()
    assert Streams.from_dict(raw, Layout.of([BINS] * len(NAMES), other)).windows == 0
