"""The detectors: silent where nothing is wrong, and right about what is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.server.drift import detectors, statistics
from shoal.server.drift.detectors import ACCURACY, INPUTS, DeviceState, DriftConfig, Finding
from shoal.server.drift.errors import ProfileError
from shoal.server.drift.profile import FeatureProfile, ReferenceProfile, with_devices

from .conftest import People

CONFIG = DriftConfig()
SIZE = 60


def watched(
    people: People,
    profile: ReferenceProfile,
    person: int,
    *,
    windows: int = 14,
    break_channel: int | None = None,
    confidence: float = 20,
) -> DeviceState:
    """Return the state of a device that a person wore for some telemetry windows."""
    state = DeviceState()
    x: NDArray[np.float32] = people.windows(person, SIZE * windows)
    if break_channel is not None:
        x[:, break_channel] *= 0.2  # a wrong scale
    for part in np.split(x, windows):
        state.fold(people.counts(profile, part, confidence=confidence), config=CONFIG)
    return state


def accurate(labelled: tuple[int, ...], correct: tuple[int, ...]) -> ReferenceProfile:
    """Return a profile that says nothing but how right the model was."""
    row = tuple((1, 1) for _ in labelled)
    names = tuple(str(i) for i in range(len(labelled)))
    return ReferenceProfile(
        (FeatureProfile("a", (0.0,), (1, 1), row, row),), names, labelled, correct, 1
    )


def one_channel(trained: NDArray[np.int64], held: NDArray[np.int64]) -> ReferenceProfile:
    """Return a profile of one channel whose G groups were counted twice, each (G, B)."""
    rows = [tuple(tuple(map(int, row)) for row in counts) for counts in (trained, held)]
    total = tuple(int(each) for each in trained.sum(0))
    edges = tuple(float(at) for at in range(trained.shape[1] - 1))
    names, none = tuple(str(g) for g in range(len(trained))), (0,) * len(trained)
    return ReferenceProfile(
        (FeatureProfile("a", edges, total, rows[0], rows[1]),), names, none, none, 1
    )


def finding(feature: str, p_value: float, effect: float = 1.0) -> Finding:
    """Return a finding with that much evidence."""
    return Finding(feature, p_value, effect, 0.0, 0.0)


# --- inputs, channels, confidence -------------------------------------------------------------


def test_people_of_the_training_data_are_no_strangers(people: People) -> None:
    """On another day, with other windows."""
    profile = people.profile()
    fleet = {
        str(p): detectors.findings(watched(people, profile, p), profile, config=CONFIG)
        for p in range(7)
    }
    assert not any(detectors.judge_fleet(fleet, config=CONFIG).values())
    for person, found in fleet.items():
        assert next(f for f in found if f.feature == INPUTS).nearest == person


def test_strangers_are_found_and_the_others_not_blamed(people: People) -> None:
    """Three of ten people are new."""
    profile = people.profile()
    fleet = {
        str(p): detectors.findings(watched(people, profile, p), profile, config=CONFIG)
        for p in range(10)
    }
    kept = detectors.judge_fleet(fleet, config=CONFIG)
    assert {name for name, found in kept.items() if found} == {"7", "8", "9"}


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_one_broken_sensor_is_named(people: People, channel: int) -> None:
    """The device's person is known; one channel has a wrong scale."""
    profile = people.profile()
    fleet = {
        str(p): detectors.findings(
            watched(people, profile, p, break_channel=channel if p == 3 else None),
            profile,
            config=CONFIG,
        )
        for p in range(7)
    }
    kept = detectors.judge_fleet(fleet, config=CONFIG)
    assert [name for name, found in kept.items() if found] == ["3"]
    name = profile.features[channel].name
    assert name in {f.feature for f in kept["3"]}
    assert detectors.unlike(fleet["3"])[0].feature == name
    assert name in detectors.sentence("wrist-03", kept["3"], fleet["3"])


def test_falling_confidence_is_its_own_kind(people: People) -> None:
    """Inputs as always, answers less sure; growing surer is no alarm."""
    profile = people.profile()
    sure = {0: 3.0, 1: 200.0}
    fleet = {
        str(p): detectors.findings(
            watched(people, profile, p, confidence=sure.get(p, 20)), profile, config=CONFIG
        )
        for p in range(7)
    }
    kept = detectors.judge_fleet(fleet, config=CONFIG)
    assert [name for name, found in kept.items() if found] == ["0"]
    assert [finding.feature for finding in kept["0"]] == ["confidence"]


def test_a_device_that_taught_the_model_is_no_stranger(people: People) -> None:
    """After a federated round the reference knows it from its counters."""
    profile = people.profile()
    taught = {}
    for person in (7, 8):
        halves = [people.counts(profile, people.windows(person, 400))[:3] for _ in range(2)]
        taught[f"wrist-{person}"] = (halves[0], halves[1])
    known = with_devices(profile, taught)
    for reference, flagged in ((profile, {"7", "8", "9"}), (known, {"9"})):
        fleet = {
            str(p): detectors.findings(watched(people, reference, p), reference, config=CONFIG)
            for p in range(10)
        }
        kept = detectors.judge_fleet(fleet, config=CONFIG)
        assert {name for name, found in kept.items() if found} == flagged


def test_nothing_is_said_before_there_is_enough(people: People) -> None:
    """Windows and predictions both count."""
    profile = people.profile()
    few = watched(people, profile, 9, windows=CONFIG.predictions_min // SIZE)
    assert detectors.findings(few, profile, config=CONFIG) == []
    enough = watched(people, profile, 9, windows=CONFIG.predictions_min // SIZE + 1)
    assert len(detectors.findings(enough, profile, config=CONFIG)) == 5
    slow = DriftConfig(windows_min=12)
    assert detectors.findings(enough, profile, config=slow) == []


def test_only_the_last_windows_count(people: People) -> None:
    """A device that a known person takes over is like the training data again."""
    profile = people.profile()
    state = watched(people, profile, 9)
    for part in np.split(people.windows(2, SIZE * CONFIG.block_windows), CONFIG.block_windows):
        state.fold(people.counts(profile, part), config=CONFIG)
    assert len(state.blocks) == CONFIG.block_windows
    found = detectors.findings(state, profile, config=CONFIG)
    assert next(f for f in found if f.feature == INPUTS).nearest == "2"
    assert detectors.judge_fleet({"x": found}, config=CONFIG) == {"x": []}


@pytest.mark.parametrize("groups", [1, 2])
def test_few_groups_still_make_a_reference(people: People, groups: int) -> None:
    """One or two groups tell no spread; a stranger is found all the same."""
    profile = people.profile(groups)
    same, other = (
        detectors.findings(watched(people, profile, p), profile, config=CONFIG) for p in (0, 9)
    )
    kept = detectors.judge_fleet({"same": same, "other": other}, config=CONFIG)
    assert not kept["same"] and kept["other"]


def test_counts_of_other_bins_are_refused(people: People) -> None:
    """As when a device answers with the edges of another model."""
    profile = people.profile()
    state = watched(people, profile, 0)
    state.fold([[1, 2, 3]] * 4, config=CONFIG)
    with pytest.raises(ProfileError, match="bins"):
        detectors.findings(state, profile, config=CONFIG)
    state = DeviceState()
    state.fold([[1] * 16] * 3, config=CONFIG)
    with pytest.raises(ProfileError, match="bins"):
        detectors.findings(state, profile, config=CONFIG)


# --- accuracy by betting ----------------------------------------------------------------------


def test_looking_for_ever_raises_few_false_alarms() -> None:
    """5,000 looks of 40 whose share is the floor, in spells: one alarm in 500 at most."""
    profile, rng = accurate((1000, 1000), (950, 950)), np.random.default_rng(3)
    config = DriftConfig(windows_per_false_alarm=500)
    floor = (1900.5 / 2001) - config.accuracy_loss_min
    alarms = 0
    for run in range(50):
        state = DeviceState()
        for _ in range(100):
            spread = 0.05 if run % 2 else 0.02
            share = floor + spread * rng.choice((-1, 1))
            state.label(40, int(rng.binomial(40, share)), profile=profile, config=config)
            loss = detectors.findings(state, profile, config=config)
            if loss[0].p_value <= config.discoveries_false_max:
                alarms, state = alarms + 1, DeviceState()
    assert alarms <= 10 + 2.33 * np.sqrt(10)


@pytest.mark.parametrize(("good", "most"), [(0, 20), (60, 15)])
def test_a_loss_is_found_soon_even_if_it_comes_late(good: int, most: int) -> None:
    """Fifteen points, from the first look on or after many good ones.

    The bounds: ln(10,000 x 4 drops) / (half a nat that a look of 40 labels earns, or more once
    the correlation is learned).
    """
    profile, rng = accurate((1000, 1000), (960, 960)), np.random.default_rng(1)
    state = DeviceState()
    for _ in range(good):
        state.label(40, rng.binomial(40, 0.96), profile=profile, config=CONFIG)
    assert state.evidence <= 10
    looks = 0
    while state.evidence < 10_000:
        state.label(40, rng.binomial(40, 0.81), profile=profile, config=CONFIG)
        looks += 1
    assert looks <= most
    found = detectors.findings(state, profile, config=CONFIG)
    assert [f.feature for f in found] == [ACCURACY]
    assert found[0].p_value <= 0.1 and found[0].rarity == state.evidence
    if not good:
        assert found[0].effect == pytest.approx(0.15, abs=0.06)
        kept = detectors.judge_fleet({"x": found}, config=CONFIG)["x"]
        assert [f.feature for f in kept] == [ACCURACY]


def test_labels_gather_until_they_make_a_look() -> None:
    """However few come at a time; what was counted is exact."""
    profile, state = accurate((100,), (90,)), DeviceState()
    for _ in range(7):
        state.label(9, 8, profile=profile, config=CONFIG)
    assert (state.labelled, state.correct, state.looks) == (63, 56, 2)
    assert state.recent == [(27, 24), (27, 24), (9, 8)]


def test_groups_that_differ_make_the_floor_lower() -> None:
    """The same share right is a loss for a model of equals, and normal for one of unequals."""
    values = []
    for correct in ((950, 950, 950), (1000, 950, 900)):
        state = DeviceState()
        for _ in range(20):
            state.label(100, 88, profile=accurate((1000,) * 3, correct), config=CONFIG)
        values.append(state.evidence)
    assert values[0] > 30 and values[1] < 1


def test_a_model_that_was_never_right_cannot_lose() -> None:
    """The floor is 0, and no bet can be lost by more than it costs."""
    profile, state = accurate((100,), (1,)), DeviceState()
    for correct in (0, 100, 50, 0):
        state.label(100, correct, profile=profile, config=CONFIG)
        assert 0 <= state.evidence <= state.looks


def test_without_expectation_there_is_no_finding() -> None:
    """A profile without held-out windows says nothing about accuracy."""
    profile, state = accurate((0,), (0,)), DeviceState()
    state.label(100, 1, profile=profile, config=CONFIG)
    assert detectors.findings(state, profile, config=CONFIG) == []


# --- the fleet --------------------------------------------------------------------------------

p_values = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(p_values, p_values, p_values)
def test_discoveries_are_those_of_the_definition(
    accuracy: list[float], inputs: list[float], features: list[float]
) -> None:
    """The largest k whose k-th p-value is at most k a / n; with BY's penalty for features."""
    fleet: dict[str, list[Finding]] = {}
    for name, family in ((ACCURACY, accuracy), (INPUTS, inputs), ("gyro", features)):
        for i, p in enumerate(family):
            fleet.setdefault(str(i), []).append(finding(name, p))
    kept = detectors.judge_fleet(fleet, config=CONFIG)
    for name, family in ((ACCURACY, accuracy), (INPUTS, inputs), ("gyro", features)):
        n = len(family)
        penalty = sum(1 / i for i in range(1, n + 1)) if name == "gyro" else 1
        bound = max(
            (p for p in family
             if p <= sum(q <= p for q in family) * CONFIG.discoveries_false_max / (n * penalty)),
            default=-1.0,
        )  # fmt: skip
        found = {d for d, each in kept.items() if name in {f.feature for f in each}}
        assert found == {str(i) for i, p in enumerate(family) if p <= bound}


def test_under_the_null_few_looks_find_anything() -> None:
    """Uniform p-values: a look at a fleet of 20 finds something in at most 10 % of looks."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(1000):
        fleet = {str(i): [finding(INPUTS, float(p))] for i, p in enumerate(rng.random(20))}
        wrong += any(detectors.judge_fleet(fleet, config=CONFIG).values())
    assert wrong / 1000 <= 0.1 + 2.33 * np.sqrt(0.1 * 0.9 / 1000)


@pytest.mark.parametrize(
    ("feature", "smallest"),
    [(ACCURACY, CONFIG.accuracy_loss_min), (INPUTS, CONFIG.distance_min),
     ("gyro", CONFIG.distance_min), ("confidence", CONFIG.confidence_loss_min)],
)  # fmt: skip
def test_what_is_too_small_to_matter_is_no_finding(feature: str, smallest: float) -> None:
    """Whatever its p-value."""
    fleet = {
        "small": [finding(feature, 0.0, smallest - 1e-6)],
        "large": [finding(feature, 0.0, smallest)],
    }
    kept = detectors.judge_fleet(fleet, config=CONFIG)
    assert not kept["small"] and len(kept["large"]) == 1


def test_an_alarm_needs_agreement_to_open_and_to_end() -> None:
    """Two looks open it, four without a finding end it; one look alone does neither."""
    state, seen = DeviceState(), []
    for look in "+-++-+----+":
        state.windows += 1
        detectors.settle(state, ["shift"] if look == "+" else [], config=CONFIG)
        seen.append(state.opened_windows)
    assert seen == [0] * 3 + [4] * 6 + [0] * 2
    assert state.judged_windows == 11 and not state.open


def test_each_cause_has_an_alarm_of_its_own() -> None:
    """One that goes on does not keep another one open, and none hides one that begins."""
    state = DeviceState()
    for found in (["loss"], ["loss", "shift"], ["loss", "shift"], *[["shift"]] * 4):
        state.windows += 1
        detectors.settle(state, found, config=CONFIG)
    assert {name: alarm.open for name, alarm in state.alarms.items()} == {"shift": True}
    assert state.open and state.opened_windows == 3


def test_slices_of_a_window_are_one_window() -> None:
    """A device is judged as a whole: its slices add up, whichever comes first."""
    state = DeviceState()
    for slice_, aligned_ms, count in (
        ("day", 60_000, 1), ("night", 60_000, 2),  # one window
        ("night", 120_000, 4), ("day", 120_000, 8),  # the next one
        ("", 0, 16), ("", 0, 32),  # without slices each record is a window
        ("a", 0, 64), ("b", 0, 128), ("a", 0, 256),  # not aligned: a slice that comes again
    ):  # fmt: skip
        state.fold([[count, 0]], config=CONFIG, slice_=slice_, aligned_ms=aligned_ms)
    assert [block[0][0] for block in state.blocks] == [3, 12, 16, 32, 64 + 128, 256]
    assert state.windows == 6


def test_distances_of_many_groups_are_those_of_each() -> None:
    """The detectors' own loop over groups says what the one distance says."""
    rng = np.random.default_rng(2)
    one, other = rng.integers(0, 50, (5, 16)), rng.integers(0, 50, 16)
    want = [statistics.hellinger(row, other) ** 2 for row in one]
    assert detectors._apart(one, other) == pytest.approx(want, abs=1e-12)
    want = [statistics.hellinger(a, b) ** 2 for a, b in zip(one, one[::-1], strict=True)]
    assert detectors._apart(one, one[::-1]) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("sent", [60, 300, 3000])
def test_a_device_that_sends_little_is_not_unlike_for_it(sent: int) -> None:
    """Four groups with much data, a device that is one of them: p below .05 in about 1 of 20.

    What few values scatter is no change, and is counted on both sides.
    """
    rng, low, normals = np.random.default_rng(sent), 0, list[float]()
    p = rng.dirichlet(np.full(16, 20.0))
    trained, held = (rng.multinomial(5000, p, 4) for _ in range(2))
    profile = one_channel(trained, held)
    for _ in range(400):
        inputs = detectors._inputs([rng.multinomial(sent, p)], profile)[0]
        low, normals = low + (inputs.p_value < 0.05), [*normals, inputs.normal - inputs.effect]
    assert low <= 20 + 2.33 * np.sqrt(400 * 0.05 * 0.95)
    assert abs(np.mean(normals)) < 0.3 / np.sqrt(sent)


def test_only_the_end_of_a_block_begins_an_alarm_later_on() -> None:
    """In the first block any look does; what stands already stays at the usual level."""
    state, levels = DeviceState(), []
    for _ in range(37):
        state.windows += 1
        levels.append(detectors.level(state, standing=False, config=CONFIG))
        assert detectors.level(state, standing=True, config=CONFIG) == 0.1
        detectors.settle(state, [], config=CONFIG)
    later = [0.0] * 11 + [12 / 10_000]
    assert levels == pytest.approx([0.1] * 12 + later * 2 + [0.0])


def test_levels_of_devices_are_prices_of_their_p_values() -> None:
    """A tenth of the level asks for a tenth of the p-value; at level 0 nothing is found."""
    fleet = {name: [finding(INPUTS, 0.004)] for name in ("first", "end", "between")}
    fleet["sure"] = [finding(INPUTS, 0.0)]
    levels = {"first": 0.1, "end": 0.01, "between": 0.0, "sure": 0.0}
    kept = detectors.judge_fleet(fleet, config=CONFIG, levels=levels)
    assert [name for name, found in kept.items() if found] == ["first", "end"]
    fleet["end"] = [finding(INPUTS, 0.006)]
    kept = detectors.judge_fleet(fleet, config=CONFIG, levels=levels)
    assert [name for name, found in kept.items() if found] == ["first"]


@pytest.mark.parametrize("devices", [1, 20])
def test_false_alarms_over_time_are_as_rare_as_stated(devices: int) -> None:
    """Uniform p-values, one draw a block: after the first, 1 alarm in 600 windows may begin."""
    config = DriftConfig(windows_per_false_alarm=600, confirm_windows=1, clear_windows=1)
    rng, alarms, windows = np.random.default_rng(1), 0, 0
    for _ in range(200 // devices + 40):
        states = {str(i): DeviceState() for i in range(devices)}
        drawn = {name: 1.0 for name in states}
        opened: dict[str, bool] = {}
        for at in range(120):
            if at % 12 == 11:
                drawn = {name: float(rng.random()) for name in states}
            levels = {}
            for name, state in states.items():
                state.windows += 1
                standing = "shift" in state.alarms
                levels[name] = detectors.level(state, standing=standing, config=config)
            found = {name: [finding(INPUTS, p)] for name, p in drawn.items()}
            kept = detectors.judge_fleet(found, config=config, levels=levels)
            for name, state in states.items():
                detectors.settle(state, ["shift"] if kept[name] else [], config=config)
            now = {name: state.open for name, state in states.items()}
            alarms += at >= 12 and any(now[n] and not opened.get(n, False) for n in now)
            opened, windows = now, windows + (at >= 12)
    allowed = windows / 600
    assert alarms <= allowed + 2.33 * np.sqrt(allowed)


def test_a_state_of_an_older_server_is_read() -> None:
    """What it kept beside is left out; its counts go on."""
    raw = {"windows": 3, "streak": 2, "open": True, "opened_windows": 2, "labelled": 9}
    state = DeviceState.from_dict(raw)
    assert (state.windows, state.labelled, state.open) == (3, 9, False)


def test_a_state_survives_json(people: People) -> None:
    """What is kept and read again goes on as if nothing had happened."""
    profile = people.profile()
    state = watched(people, profile, 9)
    state.label(30, 20, profile=profile, config=CONFIG)
    state.label(5, 5, profile=profile, config=CONFIG)
    detectors.settle(state, ["shift"], config=CONFIG)
    back = DeviceState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert back == state
    for each in (state, back):
        each.fold([[1] * len(f.counts) for f in profile.features], config=CONFIG)
        each.label(40, 10, profile=profile, config=CONFIG)
    assert back == state
    assert detectors.findings(back, profile, config=CONFIG) == detectors.findings(
        state, profile, config=CONFIG
    )
    assert DeviceState.from_dict({}) == DeviceState()


def test_sentences() -> None:
    """What an operator reads."""
    inputs = Finding(INPUTS, 0.001, 0.091, 0.052, 0.0, "5")
    gyro = Finding("gyro_y", 0.002, 0.171, 0.06, 0.3, "5", 0.24)
    acc = Finding("acc_x", 0.004, 0.12, 0.07, -0.02, "5", 0.1)
    usual = Finding("acc_y", 0.8, 0.02, 0.07, -0.9, "5", 0.0)
    hardly = Finding("acc_z", 0.4, 0.071, 0.07, 0.1, "5", 0.0)
    confidence = Finding("confidence", 0.0001, 0.3, 0.02, -0.3)
    accuracy = Finding(ACCURACY, 1e-4, 0.21, 0.96, 0.0)
    assert detectors.sentence("wrist-06", [inputs], [inputs, gyro, acc, usual, hardly]) == (
        "wrist-06: inputs unlike every group of the training data (distance 0.09 to group 5, "
        "the nearest; usual 0.05); most unlike: gyro_y higher (0.17, usual 0.06), acc_x spread "
        "(0.12, usual 0.07)"
    )
    assert detectors.sentence("w", [accuracy], [accuracy, usual]) == (
        "w: accuracy 75%, 21 points below the expected 96%"
    )
    assert detectors.sentence("w", [confidence], [confidence]) == (
        "w: drifts in confidence lower (-0.30)"
    )
    assert detectors.sentence("w", [], [gyro]) == "w: like what the model was made with"


@pytest.mark.parametrize(
    "change",
    [
        {"windows_min": 0}, {"windows_min": 13}, {"block_windows": 1001},
        {"discoveries_false_max": 0.0}, {"discoveries_false_max": 1.0}, {"accuracy_loss_min": 1.0},
        {"distance_min": -0.1}, {"confidence_loss_min": 1.0}, {"predictions_min": 0},
        {"labels_min": 0}, {"windows_per_false_alarm": 12}, {"labels_correlation": 1.0},
        {"confirm_windows": 0}, {"clear_windows": 0},
    ],
)  # fmt: skip
def test_limits_of_the_configuration(change: dict[str, float]) -> None:
    """Nonsense is refused at once."""
    with pytest.raises(ValueError, match="must"):
        DriftConfig(**change)  # type: ignore[arg-type]
