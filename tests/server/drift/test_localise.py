"""Localisation: the smallest scope that explains what drifts, and nothing where nothing does."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.server.drift.localise import (
    LocaliseConfig,
    Place,
    Scope,
    binomial_tail,
    hypergeometric_tail,
    localise,
)

CONFIG = LocaliseConfig()
SITES = ("east", "north", "south", "west", "yard")
FLEET = {
    f"d-{i:03d}": Place(SITES[i // 20], "arm" if i % 2 else "x86") for i in range(100)
}  # 5 sites of 20; each has 10 of both hardware classes


def at(site: str = "", hardware: str = "") -> list[str]:
    """Return the devices of a site, of a hardware class, or of both."""
    return [
        name
        for name, place in FLEET.items()
        if site in ("", place.site) and hardware in ("", place.hardware)
    ]


def named(devices: list[str], **settings: object) -> list[tuple[str, str]]:
    """Return the scopes that are named for these devices."""
    found = localise({name: ["x"] for name in devices}, FLEET, config=CONFIG, **settings)  # type: ignore[arg-type]
    return [(str(each.scope), each.subject) for each in found]


def test_no_drift_names_nothing() -> None:
    """An empty finding is an empty answer."""
    assert named([]) == []


def test_one_device_is_itself() -> None:
    """Whatever it belongs to."""
    (locus,) = localise({"d-007": ["gyro"]}, FLEET, config=CONFIG)
    assert (locus.scope, locus.subject, locus.affected) == (Scope.DEVICE, "d-007", ("d-007",))
    assert locus.features == (("gyro", 1),) and locus.share == 1 and locus.p_value == 1
    assert (locus.rest_affected, locus.rest_judged) == (0, 99)


def test_a_site_is_named_once_and_not_its_devices() -> None:
    """Also if a few of its devices do not show it, and a stranger elsewhere does."""
    assert named(at("north")) == [("site", "north")]
    assert named(at("north")[:15]) == [("site", "north")]
    assert named([*at("north"), "d-099"]) == [("site", "north"), ("device", "d-099")]


def test_two_sites_are_two_facts() -> None:
    """Each is named beside the other."""
    assert named([*at("east"), *at("west")]) == [("site", "east"), ("site", "west")]
    three = [*at("east"), *at("west"), *at("yard")]
    assert named(three) == [("site", "east"), ("site", "west"), ("site", "yard")]


def test_a_hardware_class_is_told_from_the_sites_it_stands_at() -> None:
    """Half of each site drifts: no site is above the others, one class is."""
    (locus,) = localise({n: ["x"] for n in at(hardware="arm")}, FLEET, config=CONFIG)
    assert (locus.scope, locus.subject) == (Scope.HARDWARE, "arm")
    assert (len(locus.affected), locus.judged, locus.rest_affected) == (50, 50, 0)
    assert locus.p_value < 1e-20


def test_the_whole_fleet_is_one_fact() -> None:
    """Also if some devices or a whole site do not show it."""
    assert named(list(FLEET)) == [("fleet", "")]
    assert named(list(FLEET)[:85]) == [("fleet", "")]
    most = [name for name in FLEET if int(name[2:]) % 10]
    assert named(most) == [("fleet", "")]


def test_scattered_devices_are_no_group() -> None:
    """A few in each site, however many sites."""
    scattered = [name for name in FLEET if int(name[2:]) % 10 == 3]
    assert {scope for scope, _ in named(scattered)} == {"device"}
    assert len(named(scattered)) == 10


def test_a_group_that_fits_as_well_is_told_of() -> None:
    """A site whose devices are all of one class: the data cannot tell, and say so."""
    places = {
        name: Place(p.site, "new" if p.site == "yard" else "old") for name, p in FLEET.items()
    }
    (locus,) = localise({n: ["x"] for n in at("yard")}, places, config=CONFIG)
    assert (locus.scope, locus.subject) == (Scope.SITE, "yard")
    assert locus.confounded == (("hardware", "new"),)


def test_small_groups_are_their_devices() -> None:
    """Two devices are two devices; a site that is the fleet has nothing beside it."""
    places = {"a": Place("one"), "b": Place("one"), "c": Place("two"), "d": Place("two")}
    found = localise({"a": [], "b": []}, places, config=CONFIG)
    assert [each.subject for each in found] == ["a", "b"]
    lone = {f"d{i}": Place("only", "only") for i in range(10)}
    assert [e.scope for e in localise({f"d{i}": [] for i in range(9)}, lone, config=CONFIG)] == [
        Scope.FLEET
    ]
    # Three of ten strangers, as in the demonstration: no group says so, so each is named.
    assert len(localise({f"d{i}": [] for i in range(3)}, lone, config=CONFIG)) == 3


def test_what_has_not_said_where_it_is_is_in_no_group() -> None:
    """Devices without a site are not a site."""
    places = {f"d{i:02d}": Place("", "") for i in range(40)}
    found = localise({f"d{i:02d}": [] for i in range(12)}, places, config=CONFIG)
    assert len(found) == 12 and {each.scope for each in found} == {Scope.DEVICE}


def test_a_group_that_is_named_is_kept_while_it_holds() -> None:
    """An alert does not change its scope with every device that comes or goes."""
    half = at("north")[:9]
    assert len(named(half)) == 9
    assert named(half, named={("site", "north")}) == [("site", "north")]
    few = at("north")[:7]
    assert len(named(few, named={("site", "north")})) == 7
    assert named(list(FLEET)[::2], named={("fleet", "")}) != [("fleet", "")]  # that is x86
    assert named(list(FLEET)[:50:1], named={("fleet", "")})[0] == ("site", "east")


def test_a_device_without_a_place_is_a_mistake() -> None:
    """It would be in no denominator."""
    with pytest.raises(ValueError, match="place of device 'x'"):
        localise({"x": []}, FLEET, config=CONFIG)


@settings(deadline=None, max_examples=100)
@given(st.sets(st.integers(0, 99)))
def test_each_affected_device_is_told_of_exactly_once(chosen: set[int]) -> None:
    """Whichever drift: no device is lost, none is told of twice, no other one is blamed."""
    affected = {f"d-{i:03d}": ["x"] for i in chosen}
    found = localise(affected, FLEET, config=CONFIG)
    told = [name for locus in found for name in locus.affected]
    if all(locus.scope is not Scope.SITE and locus.scope is not Scope.HARDWARE for locus in found):
        assert sorted(told) == sorted(affected)
    assert set(told) == set(affected)  # a site and a class may cross in devices of both
    assert all(locus.share >= CONFIG.share_min for locus in found)


def test_the_chance_of_naming_a_group_wrongly_is_bounded() -> None:
    """K of 100 devices at random, for many K: a group is named in at most 5 % of looks."""
    rng, names, wrong, looks = np.random.default_rng(5), list(FLEET), 0, 600
    for look in range(looks):
        chosen = rng.choice(100, size=1 + look % 55, replace=False)
        found = localise({names[i]: ["x"] for i in chosen}, FLEET, config=CONFIG)
        wrong += any(each.scope in (Scope.SITE, Scope.HARDWARE) for each in found)
    assert wrong / looks <= CONFIG.level


def test_the_tails_are_exact() -> None:
    """Against counting all choices, and against the sum of the definition."""
    for inside in range(5):
        hits = sum(len({0, 1, 2, 3} & set(c)) >= inside for c in combinations(range(10), 5))
        assert hypergeometric_tail(inside, 4, 5, 10) == pytest.approx(hits / comb(10, 5), abs=1e-12)
        want = sum(comb(7, k) * 0.3**k * 0.7 ** (7 - k) for k in range(inside, 8))
        assert binomial_tail(inside, 7, 0.3) == pytest.approx(want, abs=1e-12)
    assert hypergeometric_tail(20, 20, 100, 100) == pytest.approx(1)
    assert binomial_tail(8, 7, 0.3) == 0


@pytest.mark.parametrize(
    "change",
    [{"members_min": 1}, {"share_min": 0.3}, {"share_keep": 0.0}, {"share_min": 1.1},
     {"alone_max": 0.0}, {"level": 1.0}],
)  # fmt: skip
def test_limits_of_the_configuration(change: dict[str, float]) -> None:
    """Nonsense is refused at once."""
    with pytest.raises(ValueError, match="must"):
        LocaliseConfig(**change)  # type: ignore[arg-type]
