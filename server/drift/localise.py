"""Name the smallest scope that explains which devices drift. Pure.

    affected devices --compare with the rest--> device < site < hardware class < fleet

A broken sensor is one device, a draught is one site, a bad batch or driver is one hardware class,
and a changed world is the whole fleet. Twenty alerts of one site are one fact; this file finds it.

- **site, hardware class**: Null: which of the judged devices drift has nothing to do with the
  group (any choice of K of the N devices is as likely). Given K, the number inside a group of n is
  hypergeometric; the one-sided tail is Fisher's exact test of "its share is above the rest's".
- **fleet**: there is no rest. Null: each device drifts by itself with a probability of at most
  ``alone_max``; the exact binomial tail of K of N.
- A scope is named when its tail is at most ``level`` over the number of scopes that were looked at
  (Bonferroni), at least ``share_min`` of its judged devices are affected, and it has at least
  ``members_min`` of them. What is left over is named device by device.

Error control: without any group effect, the chance that a look names one or more scopes is at most
``level`` however the groups overlap. After a group was named its devices are set aside and the
others are looked at again at the same bound: for these further names the bound holds given that
the first ones are right. It bounds the *naming* alone; whether a device drifts at all is decided,
and its false discoveries are controlled, by ``detectors.py`` and ``quality.py``.

Among groups that fit equally well (a site whose devices are all of one hardware class) the smaller
scope is named and the other one is told of as confounded: the data cannot tell them apart.

Sources: Fisher's exact test: Fisher, "The Design of Experiments" (1935) §11; Bonferroni with
subset search: Glaz, Naus, Wallenstein, "Scan Statistics" (2001) ch. 1; binomial tail: Clopper,
Pearson, Biometrika 26 (1934).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final


class Scope(StrEnum):
    """How far a finding reaches, smallest first."""

    DEVICE = "device"
    SITE = "site"
    HARDWARE = "hardware"
    FLEET = "fleet"


SCOPES: Final = tuple(Scope)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocaliseConfig:
    """When a group of devices is named instead of its members."""

    members_min: int = 3
    """Judged devices of a group that is named: two that agree are two devices."""
    share_min: float = 0.6
    """Share of a group's judged devices that must be affected …"""
    share_keep: float = 0.4
    """… and share that keeps a group that is named already: alerts must not change their scope
    with every device that comes or goes."""
    alone_max: float = 0.2
    """Share of devices that may drift each for a reason of its own, 0 to 1; for the fleet."""
    level: float = 0.05
    """Chance of naming a group wrongly in one look, in (0, 1)."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.members_min < 2 or not 0 < self.share_keep <= self.share_min <= 1:
            raise ValueError("members_min must be at least 2, 0 < share_keep <= share_min <= 1")
        if not 0 < self.alone_max < 1 or not 0 < self.level < 1:
            raise ValueError("alone_max and level must be in (0, 1)")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a device stands and what it is; "" = it has not said, and is in no such group."""

    site: str = ""
    hardware: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Locus:
    """One scope that was named, with its evidence."""

    scope: Scope
    subject: str
    """Name of the device, site or hardware class; "" = the fleet."""
    affected: tuple[str, ...]
    """Its devices that drift, by name."""
    judged: int
    """Its devices that could be judged."""
    p_value: float
    """Of the null in the module head; 1 for a single device, which is compared with nothing, and
    for a group that was named before and is kept."""
    rest_affected: int = 0
    """Devices outside it that drift …"""
    rest_judged: int = 0
    """… of so many outside it that were judged."""
    features: tuple[tuple[str, int], ...] = ()
    """(feature, affected devices that show it), most common first."""
    confounded: tuple[tuple[str, str], ...] = ()
    """(scope, subject) of groups that are the same devices."""

    @property
    def share(self) -> float:
        """Share of its judged devices that drift, in (0, 1]."""
        return len(self.affected) / self.judged


@dataclass(frozen=True, slots=True)
class _Group:
    scope: Scope
    subject: str
    members: frozenset[str]


@dataclass(slots=True)
class _Scene:
    """Who is still to be explained."""

    judged: set[str]
    affected: set[str]
    looked: int
    """Scopes that are looked at in all: the divisor of the level."""
    features: Mapping[str, Collection[str]]
    named: list[Locus] = field(default_factory=list)


def localise(
    affected: Mapping[str, Collection[str]],
    places: Mapping[str, Place],
    *,
    config: LocaliseConfig,
    named: Collection[tuple[str, str]] = (),
) -> list[Locus]:
    """Return the scopes that explain the devices that drift; each affected device is in one.

    Args:
        affected: Device -> the features in which it drifts; devices that do not are absent.
        places: Where each *judged* device stands, the affected ones and all others.
        config: When a group is named.
        named: (scope, subject) of the groups that are named already.

    Returns:
        Groups first, larger scopes before smaller ones, then single devices, each by name; empty
        if no device is affected.

    Raises:
        ValueError: An affected device has no place.
    """
    if missing := sorted(set(affected) - set(places)):
        raise ValueError(f"the place of device {missing[0]!r:.60} is not given")
    groups = _groups(places, config)
    scene = _Scene(set(places), set(affected), len(groups) + 1, affected)
    _name_groups(scene, groups, places, set(named), config)
    _name_fleet(scene, places, affected, ("fleet", "") in set(named), config)
    alone = [
        Locus(
            scope=Scope.DEVICE,
            subject=device,
            affected=(device,),
            judged=1,
            p_value=1.0,
            rest_affected=len(affected) - 1,
            rest_judged=len(places) - 1,
            features=_features((device,), affected),
        )
        for device in scene.affected
    ]
    order = {scope: -at for at, scope in enumerate(SCOPES)}
    return sorted([*scene.named, *alone], key=lambda each: (order[each.scope], each.subject))


def hypergeometric_tail(inside: int, group: int, affected: int, judged: int) -> float:
    """Return P(X >= inside) where X of ``affected`` fall into ``group`` of ``judged`` devices.

    Args:
        inside: Affected ones of the group, 0 to min(group, affected).
        group: Devices of the group, 0 to ``judged``.
        affected: Affected devices in all, 0 to ``judged``.
        judged: All devices.

    >>> round(hypergeometric_tail(3, 3, 3, 10), 6)
    0.008333
    """
    whole = _choose(judged, affected)
    terms = (
        math.exp(_choose(group, k) + _choose(judged - group, affected - k) - whole)
        for k in range(max(inside, affected - (judged - group)), min(group, affected) + 1)
    )
    return min(1.0, sum(terms))


def binomial_tail(hits: int, trials: int, chance: float) -> float:
    """Return P(X >= hits) for X of ``trials`` with ``chance`` each, 0 < chance < 1.

    >>> round(binomial_tail(2, 3, 0.2), 6)
    0.104
    """
    hit, miss = math.log(chance), math.log1p(-chance)
    terms = (
        math.exp(_choose(trials, k) + k * hit + (trials - k) * miss)
        for k in range(max(hits, 0), trials + 1)
    )
    return min(1.0, sum(terms))


def _choose(n: int, k: int) -> float:
    """Return the logarithm of the number of ways to choose k of n."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _groups(places: Mapping[str, Place], config: LocaliseConfig) -> list[_Group]:
    """Return the groups that can be told from the rest: large enough, and not all there is."""
    members: dict[tuple[Scope, str], set[str]] = defaultdict(set)
    for device, place in places.items():
        for scope, subject in ((Scope.SITE, place.site), (Scope.HARDWARE, place.hardware)):
            if subject:
                members[scope, subject].add(device)
    return [
        _Group(scope, subject, frozenset(found))
        for (scope, subject), found in sorted(members.items())
        if config.members_min <= len(found) < len(places)
    ]


def _name_groups(
    scene: _Scene,
    groups: list[_Group],
    places: Mapping[str, Place],
    named: set[tuple[str, str]],
    config: LocaliseConfig,
) -> None:
    left = list(groups)
    while left and scene.affected:
        tails = [(_tail(scene, group, named, config), group) for group in left]
        fitting = [(p, g) for p, g in tails if p <= config.level / scene.looked]
        if not fitting:
            return
        p_value, best = min(
            fitting, key=lambda item: (item[0], SCOPES.index(item[1].scope), item[1].subject)
        )
        members = best.members & scene.judged
        same = [g for g in left if g is not best and g.members & scene.judged == members]
        scene.named.append(
            Locus(
                scope=best.scope,
                subject=best.subject,
                affected=tuple(sorted(best.members & set(scene.features))),
                judged=len(best.members),
                p_value=p_value,
                rest_affected=len(set(scene.features) - best.members),
                rest_judged=len(set(places) - best.members),
                features=_features(best.members, scene.features),
                confounded=tuple((str(g.scope), g.subject) for g in same),
            )
        )
        scene.affected -= members
        scene.judged -= members
        left = [group for group in left if group is not best and group not in same]


def _tail(
    scene: _Scene, group: _Group, named: set[tuple[str, str]], config: LocaliseConfig
) -> float:
    """Return Fisher's tail of a group among the devices left; 2 if it cannot be named."""
    members = group.members & scene.judged
    inside = len(members & scene.affected)
    if len(members) < config.members_min or inside == 0:
        return 2.0
    kept = (str(group.scope), group.subject) in named
    if inside < (config.share_keep if kept else config.share_min) * len(members):
        return 2.0
    if len(members) == len(scene.judged):
        return 2.0  # nothing is left to compare with: that is the fleet's question
    tail = hypergeometric_tail(inside, len(members), len(scene.affected), len(scene.judged))
    # A group that is named already needs no new proof, but comes after what has one.
    return min(tail, config.level / scene.looked) if kept else tail


def _name_fleet(
    scene: _Scene,
    places: Mapping[str, Place],
    affected: Mapping[str, Collection[str]],
    kept: bool,
    config: LocaliseConfig,
) -> None:
    """Name the fleet, which then explains every device, if what no group explains is most of it."""
    share = config.share_keep if kept else config.share_min
    hits, trials = len(scene.affected), len(scene.judged)
    if trials < config.members_min or hits < share * trials or hits == 0:
        return
    if len(affected) < share * len(places):
        return
    p_value = binomial_tail(hits, trials, config.alone_max)
    if p_value > config.level / scene.looked and not kept:
        return
    scene.named = [
        Locus(
            scope=Scope.FLEET,
            subject="",
            affected=tuple(sorted(affected)),
            judged=len(places),
            p_value=p_value,
            features=_features(affected, affected),
        )
    ]
    scene.affected.clear()


def _features(
    devices: Collection[str], affected: Mapping[str, Collection[str]]
) -> tuple[tuple[str, int], ...]:
    counted = Counter(name for device in devices for name in set(affected.get(device, ())))
    return tuple(sorted(counted.items(), key=lambda item: (-item[1], item[0])))
