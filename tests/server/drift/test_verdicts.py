"""Verdicts: what broke, what is new, what the world did, what was lost; each in its own words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

import pytest

from shoal.server.drift import verdicts
from shoal.server.drift.detectors import ACCURACY, INPUTS, Finding
from shoal.server.drift.localise import Place, Scope
from shoal.server.drift.profile import CONFIDENCE
from shoal.server.drift.quality import Fault
from shoal.server.drift.verdicts import FAULT, LOSS, SHIFT, SUSPICION, Look, Verdict, VerdictConfig

CONFIG = VerdictConfig()
SITES = ("east", "north", "south", "west", "yard")
CHANNELS = ("ax", "ay", "az")
ALL = [f"d-{i:03d}" for i in range(100)]
PLACES = {name: Place(SITES[i // 20], "arm" if i % 2 else "x86") for i, name in enumerate(ALL)}


def finding(feature: str, p_value: float = 1e-6, effect: float = 0.4) -> Finding:
    """Return a finding that stands."""
    return Finding(feature, p_value, effect, 0.05, 0.5, "3")


def usual(*names: str) -> list[Finding]:
    """Return findings of what is as usual."""
    return [Finding(name, 0.6, 0.04, 0.05, 0.0, "3") for name in names]


def look(name: str, kept: Iterable[Finding] = (), faults: Iterable[Fault] = ()) -> Look:
    """Return what is known of a device; what is not kept is as usual."""
    standing = list(kept)
    seen = {each.feature for each in standing}
    found = [*standing, *usual(*[c for c in (*CHANNELS, INPUTS, CONFIDENCE) if c not in seen])]
    return Look(place=PLACES[name], found=found, kept=standing, faults=list(faults))


STRANGE = [finding(INPUTS), finding("ax"), finding("ay")]
BROKEN = [finding(INPUTS), finding("ax")]
STUCK = Fault("ax", "stuck", 0.4, 0.02, 12, 12, 1e-12)
LOST = Finding(ACCURACY, 1e-4, 0.2, 0.9, 0.0, rarity=2_500)
UNSURE = [finding(CONFIDENCE, effect=0.3)]


def told(looks: dict[str, Look], *, confirmed: bool = True, **more: object) -> list[Verdict]:
    """Return the verdicts on a fleet whose other devices are as usual."""
    whole = {name: looks.get(name) or look(name) for name in ALL}
    alarms = {
        name: dict.fromkeys(verdicts.causes(each, config=CONFIG), confirmed)
        for name, each in whole.items()
    }
    return verdicts.judge(whole, alarms, config=CONFIG, **more)  # type: ignore[arg-type]


def names(found: list[Verdict]) -> list[tuple[str, str, str]]:
    """Return (kind, scope, subject) of verdicts."""
    return [(each.kind, str(each.scope), each.subject) for each in found]


def test_no_finding_no_verdict() -> None:
    """Silence is an answer."""
    assert told({}) == []


def test_one_channel_alone_is_a_sensor() -> None:
    """It is far off while every other one is as usual."""
    (verdict,) = told({"d-007": look("d-007", BROKEN)})
    assert names([verdict]) == [("sensor_fault", "device", "d-007")]
    assert verdict.features == ("ax",)
    assert verdict.text == (
        "d-007: ax alone is far off while every other feature is as usual, which looks like a "
        "broken or badly mounted sensor: check it before anything is retrained"
    )


def test_inputs_that_are_unlike_as_a_whole_are_a_shift() -> None:
    """A person that the model never saw."""
    (verdict,) = told({"d-007": look("d-007", STRANGE)})
    assert names([verdict]) == [("local_shift", "device", "d-007")]
    assert "distance 0.40 to group 3, the nearest; usual 0.05" in verdict.text
    assert "0 of 99 other devices drift" in verdict.text


def test_a_shift_does_not_become_a_fault_by_turns() -> None:
    """With a channel on the border of usual, a device that was told as shifted stays so."""
    named = [("local_shift", "device", "d-007")]
    assert names(told({"d-007": look("d-007", BROKEN)}, named=named)) == named
    other = [("local_shift", "device", "d-008"), ("sensor_fault", "device", "d-007")]
    found = told({"d-007": look("d-007", BROKEN)}, named=other)
    assert names(found) == [("sensor_fault", "device", "d-007")]
    found = told({"d-007": look("d-007", STRANGE)}, named=other)
    assert names(found) == named


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (STUCK, "ax stands still in 40% (12 of 12 windows; 2% may)"),
        (Fault("", "rate", 0.7, 0.5, 12, 12, 1e-12), "data comes too rarely in 70%"),
    ],
)
def test_facts_about_the_data_are_a_sensor(fault: Fault, said: str) -> None:
    """Nulls, range, stuck values, rate: whether the inputs drift or not."""
    (verdict,) = told({"d-007": look("d-007", faults=[fault])})
    assert verdict.kind == "sensor_fault" and said in verdict.text
    assert verdict.evidence["faults"][0]["check"] == fault.check


NEW = Fault("ax", "unknown", 0.058, 0.02, 12, 12, 1e-12, (9,))


def test_an_unknown_code_is_a_shift_and_named() -> None:
    """Alone, with inputs that are unlike, with a change; it is never a sensor to replace."""
    (verdict,) = told({"d-007": look("d-007", faults=[NEW])})
    assert names([verdict]) == [("local_shift", "device", "d-007")]
    assert verdict.features == ("ax",) and verdict.evidence["faults"][0]["codes"] == [9]
    assert verdict.text == (
        "d-007: ax: unknown code 9 in 6% (12 of 12 windows; 2% may); 0 of 99 other devices "
        "drift: find out what is new there"
    )
    (verdict,) = told({"d-007": look("d-007", STRANGE, [NEW])})
    assert verdict.kind == "local_shift" and verdict.features[0] == "ax"
    assert "unlike all" in verdict.text and "; ax: unknown code 9 in 6%" in verdict.text
    (verdict,) = told({"d-007": look("d-007", [finding(INPUTS), finding("ay")], [NEW])})
    assert verdict.kind == "local_shift", "ay does not stand alone"
    several = replace(NEW, codes=(9, 4))
    (verdict,) = told({"d-007": look("d-007", faults=[several])})
    assert "ax: unknown codes 9, 4 in 6%" in verdict.text


def test_a_site_with_an_unknown_code_is_one_shift() -> None:
    """A new product comes to all machines of a hall."""
    found = told({name: look(name, faults=[NEW]) for name in ALL[20:40]})
    assert names(found) == [("local_shift", "site", "north")]
    assert "; ax: unknown code 9 in up to 6%" in found[0].text and "sensor" not in found[0].text


def test_what_is_broken_beside_an_unknown_code_is_told_apart() -> None:
    """Each in its own words."""
    stuck = Fault("ay", "stuck", 0.4, 0.02, 12, 12, 1e-12)
    fault, shift = told({"d-007": look("d-007", faults=[NEW, stuck])})
    assert names([fault, shift]) == [
        ("sensor_fault", "device", "d-007"), ("local_shift", "device", "d-007"),
    ]  # fmt: skip
    assert "unknown" not in fault.text and "stands still" not in shift.text


def test_a_code_that_is_no_whole_number_is_no_sensor_to_replace() -> None:
    """Whoever averages codes makes some; beside a broken sensor it is one of two facts."""
    half = Fault("ax", "fraction", 0.3, 0.02, 12, 12, 1e-12)
    (verdict,) = told({"d-007": look("d-007", BROKEN, [half])})
    assert verdict.kind == "sensor_fault" and verdict.text == (
        "d-007: ax is no whole number in 30% (12 of 12 windows; 2% may): "
        "find what averages or scales codes"
    )


def test_a_shift_that_a_fault_explains_is_the_fault() -> None:
    """One alert, not two; what lies in other channels as well is told beside it."""
    assert names(told({"d-007": look("d-007", BROKEN, [STUCK])})) == [
        ("sensor_fault", "device", "d-007")
    ]
    assert names(told({"d-007": look("d-007", STRANGE, [STUCK])})) == [
        ("sensor_fault", "device", "d-007"), ("local_shift", "device", "d-007"),
    ]  # fmt: skip


def test_a_site_is_one_shift_and_not_twenty() -> None:
    """Also where each device shows one channel only: twenty sensors do not break together."""
    for kept in (STRANGE, BROKEN):
        found = told({name: look(name, kept) for name in ALL[20:40]})
        assert names(found) == [("local_shift", "site", "north")]
        assert "20 of 20 devices and 0 of 80 elsewhere (by chance: below 1e-9)" in found[0].text
        assert "most of all ax (20)" in found[0].text
        assert found[0].evidence["affected"] == 20 and found[0].evidence["judged"] == 20


def test_a_class_and_the_fleet_are_a_fleet_shift() -> None:
    """Batch, driver, or the world."""
    arm = told({name: look(name, STRANGE) for name in ALL[1::2]})
    assert names(arm) == [("fleet_shift", "hardware", "arm")]
    assert "drivers and firmware" in arm[0].text
    every = told({name: look(name, STRANGE) for name in ALL})
    assert names(every) == [("fleet_shift", "fleet", "")]
    assert every[0].text.startswith("the fleet: inputs of 100 of 100 devices")
    assert len(every[0].evidence["devices"]) == verdicts.DEVICES_SHOWN


def test_a_stuck_value_is_a_fault_however_many_have_it() -> None:
    """A driver that repeats itself is no change of the world."""
    (verdict,) = told({name: look(name, faults=[STUCK]) for name in ALL[1::2]})
    assert names([verdict]) == [("sensor_fault", "hardware", "arm")]
    assert "look for a common cause" in verdict.text


def test_a_shift_is_no_loss_and_a_loss_no_shift() -> None:
    """Both may be open at once, each with its own words."""
    both = told({"d-007": look("d-007", [*STRANGE, LOST])})
    assert names(both) == [
        ("accuracy_loss", "device", "d-007"), ("local_shift", "device", "d-007"),
    ]  # fmt: skip
    assert "accuracy 70%, 20 points below the expected 90%" in both[0].text
    assert (
        "by chance at most once in 2,500 looks" in both[0].text and "accuracy" not in both[1].text
    )
    assert names(told({"d-007": look("d-007", [LOST])})) == [("accuracy_loss", "device", "d-007")]
    assert both[0].evidence["basis"] == "labels" and not both[0].suspected


def test_a_fall_of_the_confidence_is_a_suspicion() -> None:
    """Where no label tells; where labels say that all is well it is no loss at all."""
    (verdict,) = told({"d-007": look("d-007", UNSURE)})
    assert names([verdict]) == [("accuracy_loss", "device", "d-007")]
    assert verdict.suspected and verdict.evidence["basis"] == "estimate"
    assert "no label says so yet" in verdict.text
    fine = Finding(ACCURACY, 1.0, -0.01, 0.9, 0.0)
    seen = look("d-007", UNSURE)
    labelled = Look(place=seen.place, found=[*seen.found, fine], kept=seen.kept)
    (verdict,) = told({"d-007": labelled})
    assert verdict.kind == "local_shift"


def test_labels_of_some_confirm_what_the_others_are_suspected_of() -> None:
    """A site where two devices have labels: one loss, no suspicion any more."""
    fleet = {name: look(name, [LOST] if name in ALL[20:22] else UNSURE) for name in ALL[20:40]}
    (verdict,) = told(fleet)
    assert names([verdict]) == [("accuracy_loss", "site", "north")]
    assert not verdict.suspected and "labels tell of 2" in verdict.text
    assert verdict.evidence["labelled"] == 2


def test_two_broken_sensors_of_a_device_are_one_alert() -> None:
    """With both in its words, and both in its evidence."""
    other = Fault("ay", "nulls", 0.9, 0.02, 12, 12, 1e-12)
    (verdict,) = told({"d-007": look("d-007", faults=[STUCK, other])})
    assert set(verdict.features) == {"ax", "ay"}
    assert "ax stands still" in verdict.text and "ay is missing" in verdict.text
    assert "ay" in json.dumps(verdict.evidence)


def test_a_group_is_awaited_before_its_devices_are_told_one_by_one() -> None:
    """The last of a site's devices are still being confirmed when the first are."""
    looks = {name: look(name, STRANGE) for name in ALL[20:40]}
    whole = {name: looks.get(name) or look(name) for name in ALL}
    alarms = {name: {SHIFT: name in ALL[20:22]} for name in looks}
    assert verdicts.judge(whole, alarms, config=CONFIG) == []
    # What was told alone before stays told until the group is.
    named = [("local_shift", "device", "d-020")]
    assert names(verdicts.judge(whole, alarms, config=CONFIG, named=named)) == named
    alarms["d-022"] = {SHIFT: True}
    assert names(verdicts.judge(whole, alarms, config=CONFIG, named=named)) == [
        ("local_shift", "site", "north")
    ]


def test_what_is_not_confirmed_is_not_told() -> None:
    """One judgement alone is no verdict."""
    assert told({"d-007": look("d-007", STRANGE)}, confirmed=False) == []


def test_devices_that_could_not_be_judged_are_in_no_denominator() -> None:
    """A site of 20 of which 4 were judged and all 4 drift is 4 of 4, and says so."""
    whole = {name: look(name) for name in ALL if name not in ALL[20:36]}
    whole |= {name: Look(place=PLACES[name], told=False) for name in ALL[20:36]}
    whole |= {name: look(name, STRANGE) for name in ALL[36:40]}
    alarms = {name: {SHIFT: True} for name in ALL[36:40]}
    (verdict,) = verdicts.judge(whole, alarms, config=CONFIG)
    assert names([verdict]) == [("local_shift", "site", "north")]
    assert (verdict.locus.judged, verdict.locus.rest_judged) == (4, 80)


def test_an_alarm_that_is_about_to_end_keeps_its_verdict() -> None:
    """Without evidence in this look there is still something to say, and it is JSON."""
    for cause in (LOSS, SUSPICION, SHIFT, FAULT + "ax"):
        whole = {name: look(name) for name in ALL}
        (verdict,) = verdicts.judge(whole, {"d-007": {cause: True}}, config=CONFIG)
        assert verdict.subject == "d-007" and verdict.text.startswith("d-007: ")
        json.dumps(verdict.evidence, allow_nan=False)
        assert verdict.scope is Scope.DEVICE


def test_causes_of_a_look() -> None:
    """What the confidence says depends on whether labels tell."""
    assert verdicts.causes(look("d-000"), config=CONFIG) == {}
    assert verdicts.causes(look("d-000", UNSURE), config=CONFIG) == {SUSPICION: (CONFIDENCE,)}
    assert set(verdicts.causes(look("d-000", [*UNSURE, LOST]), config=CONFIG)) == {LOSS}
    assert verdicts.single(look("d-000", BROKEN), config=CONFIG) == "ax"
    assert verdicts.single(look("d-000", STRANGE), config=CONFIG) == ""
    near = [finding(INPUTS), finding("ax", effect=0.19)]
    assert (
        verdicts.single(look("d-000", near), config=CONFIG) == ""
    )  # another use, no broken sensor
    lone = Look(place=Place(), found=[finding("ax")], kept=[finding("ax")])
    assert verdicts.single(lone, config=CONFIG) == ""  # there is no other one that is as usual


def test_limits_of_the_configuration() -> None:
    """Nonsense is refused at once."""
    with pytest.raises(ValueError, match="must"):
        VerdictConfig(usual_min=0.0)
    with pytest.raises(ValueError, match="must"):
        VerdictConfig(far_min=1.0)


def test_two_faults_of_a_place_with_a_colon_are_told_together() -> None:
    """Devices and sites choose their names."""
    (verdict,) = told({"d-007": look("d-007", BROKEN)})
    one, other = (replace(verdict, subject="a: b", text=f"a: b: {what}") for what in "xy")
    assert verdicts._merged(one, other).text == "a: b: x; also: y"
