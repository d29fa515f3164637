"""Data quality: broken sensors are found soon, sound ones are left alone."""

from __future__ import annotations

import json

import numpy as np
import pytest

from shoal.server.drift import quality
from shoal.server.drift.localise import binomial_tail
from shoal.server.drift.quality import Counters, Fault, QualityConfig, QualityState

CONFIG = QualityConfig()
FEATURES = ("ax", "ay", "confidence")


def told(windows: int, *, before: int = 0, **failed: tuple[int, ...]) -> QualityState:
    """Return a state after windows of 100 values each, of which so many fail; sound ones first."""
    state = QualityState()
    for at in range(before + windows):
        now = failed if at >= before else {name: (0, 0, 0) for name in failed}
        state.fold(Counters(values=(100,) * 3, failed=now), FEATURES, config=CONFIG)
    return state


def faults(state: QualityState, **expected: float) -> list[Fault]:
    """Return the faults of a state."""
    return quality.faults(
        state, expected={k.replace("__", ":"): v for k, v in expected.items()}, config=CONFIG
    )


def test_a_sound_device_costs_nothing() -> None:
    """Nothing is kept of what never fails, and what failed once is forgotten after a while."""
    state = told(50, nulls=(0, 0, 0), stuck=(0, 0, 0))
    assert state.seen == {} and faults(state) == []
    state = told(1, nulls=(0, 1, 0))
    assert list(state.seen) == ["ay:nulls"]
    for _ in range(CONFIG.block_windows):
        state.fold(Counters(values=(100,) * 3, failed={"nulls": (0,) * 3}), FEATURES, config=CONFIG)
    assert state.seen == {}


def test_a_broken_sensor_is_found_after_a_few_windows() -> None:
    """One of 100 devices; its p-value is that of the windows, not of the values in them."""
    fleet: dict[str, list[Fault]] = {f"d{i}": [] for i in range(99)}
    found_after = []
    for windows in range(1, 13):
        fleet["broken"] = faults(told(windows, stuck=(0, 40, 0), nulls=(0, 0, 0)))
        kept = quality.judge(fleet, features=3, config=CONFIG)
        assert not any(found for name, found in kept.items() if name != "broken")
        if kept["broken"]:
            found_after.append(windows)
    assert found_after == list(range(found_after[0], 13)) and found_after[0] <= 8
    (fault,) = faults(told(12, stuck=(0, 40, 0)))
    assert (fault.feature, fault.check, fault.key) == ("ay", "stuck", "ay:stuck")
    assert (fault.share, fault.windows_bad, fault.windows) == (0.4, 12, 12)
    assert fault.p_value == pytest.approx(1e-12)


def test_the_windows_before_the_first_failure_count() -> None:
    """Otherwise the first bad window of any device would be all there is."""
    (fault,) = faults(told(1, before=30, nulls=(50, 0, 0)))
    assert (fault.windows_bad, fault.windows) == (1, 12)
    assert fault.p_value == pytest.approx(1 - 0.9**12)


def test_what_the_training_data_had_is_allowed() -> None:
    """A feature that is null in a tenth of the training data is no fault with a tenth."""
    state = told(12, nulls=(10, 0, 0))
    assert faults(state)[0].windows_bad == 12
    assert faults(state, ax__nulls=0.1)[0].windows_bad == 0


def test_a_device_that_falls_silent_or_sends_the_wrong_shape() -> None:
    """They are faults of the device as a whole."""
    state = QualityState()
    for _ in range(12):
        window = quality.counters({"rate": [100, 30], "schema": [20]}, [10, 10], [0, 0])
        state.fold(window, FEATURES, config=CONFIG)
    found = {fault.check: fault for fault in faults(state)}
    assert set(found) == {"rate", "schema"} and {f.feature for f in found.values()} == {""}
    assert found["rate"].share == 0.7 and found["schema"].share == 0.4
    assert all(fault.windows_bad == 12 for fault in found.values())


@pytest.mark.parametrize(
    "raw",
    [{}, {"stuck": 3}, {"stuck": [-1, 0]}, {"stuck": ["x"]}, {"stuck": [1.5, 0]}, {"rate": [5]},
     {"rate": [0, 0]}, {"schema": []}, {"stuck": [True, False]}, {"unknown": [9, 9]}],
)  # fmt: skip
def test_what_a_device_garbles_costs_its_own_evidence(raw: dict[str, object]) -> None:
    """Nothing raises, nothing is made up."""
    state = QualityState()
    state.fold(quality.counters(raw, [10, 10], [0, 0]), FEATURES, config=CONFIG)
    assert faults(state) == []


def test_a_device_that_tells_of_more_failures_than_values_is_bounded() -> None:
    """A share is at most 1, and lists of another length are cut to the features."""
    state = QualityState()
    window = quality.counters({"stuck": [999, 999, 999, 999, 999]}, [10, 10, 10], [0, 0, 0])
    state.fold(window, FEATURES, config=CONFIG)
    assert {fault.share for fault in faults(state)} == {1.0}
    assert len(state.seen) == 3


def test_false_faults_are_rare() -> None:
    """300 devices whose windows exceed what is allowed now and then: few looks find anything."""
    rng, wrong = np.random.default_rng(3), 0
    for _ in range(60):
        fleet = {}
        for i in range(300):
            bad = int(rng.binomial(12, CONFIG.windows_bad_max))
            p_value = binomial_tail(bad, 12, CONFIG.windows_bad_max)
            fleet[f"d{i}"] = [Fault("ax", "nulls", 0.1, 0.02, bad, 12, p_value)]
        wrong += any(quality.judge(fleet, features=1, config=CONFIG).values())
    assert wrong <= 6


def test_a_state_survives_json() -> None:
    """What is kept and read again goes on as if nothing had happened."""
    state = told(5, nulls=(50, 0, 0))
    back = QualityState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert back == state and faults(back) == faults(state)
    assert QualityState.from_dict({}) == QualityState()


@pytest.mark.parametrize(
    "change",
    [{"block_windows": 1}, {"share_allowed": 1.0}, {"rate_min": -0.1}, {"windows_bad_max": 0.0},
     {"discoveries_false_max": 1.0}],
)  # fmt: skip
def test_limits_of_the_configuration(change: dict[str, float]) -> None:
    """Nonsense is refused at once."""
    with pytest.raises(ValueError, match="must"):
        QualityConfig(**change)  # type: ignore[arg-type]
