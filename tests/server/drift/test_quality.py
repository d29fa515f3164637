"""Data quality: broken sensors are found soon, sound ones are left alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from shoal.server.drift import profile_feature, quality
from shoal.server.drift.localise import binomial_tail
from shoal.server.drift.profile import FeatureProfile
from shoal.server.drift.quality import Codes, Counters, Fault, QualityConfig, QualityState

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


@pytest.mark.parametrize(
    ("reference", "device", "bad"),
    [
        (0.0, 40, True),  # what is never stuck in training is stuck on the device
        (0.02, 20, False),  # a fifth of it may be, once in ten windows
        (0.02, 100, True),  # but not all of it all the time
        (0.3, 100, False),  # a count that rests for hours: nothing that a device could show
    ],
)
def test_stuck_is_judged_against_how_often_training_was(
    reference: float, device: int, bad: bool
) -> None:
    """Share p of training: at most a tenth of the windows have a share above 10 p."""
    (fault,) = faults(told(12, stuck=(0, device, 0)), ay__stuck=reference)
    kept = quality.judge({"d": [fault]}, features=3, config=CONFIG)["d"]
    assert (fault.windows_bad == 12, bool(kept)) == (bad, bad)


def test_what_a_profile_does_not_tell_is_not_expected() -> None:
    """A profile from before stuck values were counted: as if none had been."""
    x = np.arange(400, dtype=np.float32)
    x[:100], x[100:300] = np.nan, 7
    feature = profile_feature.measure(
        x, name="a", kind="float", bins=4, trained=[x], held=[]
    )  # fmt: skip
    assert quality.expected([feature]) == {"a:nulls": 0.25, "a:stuck": 0.5}
    assert quality.expected([replace(feature, stuck=None)]) == {"a:nulls": 0.25}


def category(*codes: int, bins: int = 16) -> FeatureProfile:
    """Return a category whose training data had these codes, ten times each."""
    x = np.repeat(np.array(codes, np.float32), 10)
    return profile_feature.measure(
        x, name="gear", kind="category", bins=bins, trained=[], held=[]
    )  # fmt: skip


def counted(feature: FeatureProfile, values: Sequence[float], *, sketch: bool = True) -> Codes:
    """Return what a window of values tells of a category."""
    x = np.array(values, np.float32)
    whole = x[x == np.rint(x)].astype(np.int64).tolist()
    often = Counter(whole).most_common()
    items = [(int(item), count, count) for item, count in often]
    bins = profile_feature.histogram(x, np.array(feature.edges, np.float32))
    return quality.codes(
        feature, bins=bins, items=items if sketch else None, whole=len(whole) if sketch else 0
    )


@pytest.mark.parametrize("sketch", [True, False])
def test_unknown_codes_are_counted_and_named(sketch: bool) -> None:
    """In a gap, below, beyond; without a sketch they are counted all the same, by their bins."""
    values = [0, 1, 2, 5, 5, 9, 9, 9, 4, -1]
    found = counted(category(0, 1, 2, 5), values, sketch=sketch)
    assert found == Codes(unknown=5, fractions=0, named=(9, 4, -1) if sketch else ())
    assert counted(category(0, 1, 2, 5), [0, 1, 2, 5], sketch=sketch) == Codes(
        unknown=0, fractions=0
    )


def test_what_is_no_whole_number_is_counted_apart() -> None:
    """Wherever it is: between known codes, in a gap, beyond; it is no unknown code."""
    values = [0, 1, 0.5, 1.5, 3.5, 9.5, 9]
    assert counted(category(0, 1, 5), values) == Codes(unknown=1, fractions=4, named=(9,))


def test_with_more_codes_than_bins_or_items_what_is_sure_is_told() -> None:
    """A code that shares a bin is known by its item; with more than 64, by the range alone."""
    few = category(*range(0, 40, 2), bins=4)
    assert counted(few, [0, 2, 7]) == Codes(unknown=1, fractions=0, named=(7,))
    assert counted(few, [0, 2, 7], sketch=False) == Codes(unknown=0, fractions=0)
    many = category(*range(0, 200, 2))
    assert many.other and counted(many, [77, 150, 300]) == Codes(
        unknown=1, fractions=0, named=(300,)
    )


def test_a_code_that_devices_taught_is_known() -> None:
    """A federated model's profile has their bins, and no items of theirs."""
    feature = category(0, 1, 5)
    edges = np.array(feature.edges, np.float32)
    early = profile_feature.histogram(np.full(30, 3, np.float32), edges)
    total = tuple(a + b for a, b in zip(feature.counts, early, strict=True))
    assert counted(feature, [3, 0]).unknown == 1
    assert counted(replace(feature, counts=total), [3, 0]) == Codes(unknown=0, fractions=0)


def test_a_category_is_out_of_no_range_and_never_stuck() -> None:
    """Its counters of those are of unknown codes, or say nothing; the others keep theirs."""
    raw = {"above": [3, 4, 0], "below": [1, 2, 0], "stuck": [7, 10, 0]}
    codes = Codes(unknown=1, fractions=2, named=(9,))
    found = quality.counters(raw, [10] * 3, [0] * 3, {1: codes})
    assert found.failed["above"] == (3, 0, 0) and found.failed["stuck"] == (7, 0, 0)
    assert found.failed["unknown"] == (0, 4, 0), "6 are out of range, 2 of them no whole number"
    assert found.failed["fraction"] == (0, 2, 0)
    state = QualityState()
    for _ in range(12):
        state.fold(found, FEATURES, config=CONFIG)
    told_of = {fault.key: fault for fault in faults(state)}
    assert set(told_of) == {
        "ax:above", "ax:below", "ax:stuck", "ay:unknown", "ay:fraction",
    }  # fmt: skip
    assert told_of["ay:unknown"].said == "ay: unknown code 9"
    assert told_of["ay:unknown"].share == 0.4 and told_of["ay:unknown"].codes == (9,)
    assert told_of["ay:fraction"].said == "ay is no whole number"
    assert QualityState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    for _ in range(12):
        sound = quality.counters({}, [10] * 3, [0] * 3, {1: Codes(unknown=0, fractions=0)})
        state.fold(sound, FEATURES, config=CONFIG)
    assert "ay:unknown" not in state.seen and state.codes == {}


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
