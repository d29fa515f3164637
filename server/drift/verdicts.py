"""Say what was seen, where, how sure it is, and what to do. Pure.

    findings, faults of a device --causes--> what is wrong with it --settle--> alarms
    alarms of all devices --localise--> scopes --judge--> verdicts

Four verdicts, each with its evidence:

- ``sensor_fault``: data are broken. A check of ``quality.py`` fails, at whatever scope (a stuck
  value is no change of the world, however many devices have it); or one channel of one device is
  far off while every other one is as usual.
- ``local_shift``: the inputs of one device or one site, as a whole, are unlike all that the model
  was made with: a person it never saw, a room with another light; or a category has codes that
  training never met: a product, a mode.
- ``fleet_shift``: the same for a hardware class or the whole fleet: a batch, a driver, the world.
- ``accuracy_loss``: late labels say that the model is right less often than it was. Without
  labels, a fall of its confidence is told as the same kind but *suspected*: it is an estimate, and
  nothing may be retrained for it.

**A shift of the inputs is no loss of accuracy**: the two are found apart, told apart, and may be
open at once. Which devices drift is decided in ``detectors.py`` and ``quality.py``, with the
control of false discoveries that is stated there; the scope in ``localise.py``. Here nothing is
tested anew but one question: whether one channel alone explains a device. Null: the other
channels are as in a group that the model was made with; they are called usual while the smallest
of their p-values is above ``usual_min`` over their number (Bonferroni: a device that is no single
fault is called one with a probability that no bound here states, and the text says "looks like").
It must be off by ``far_min`` at least, an effect and no test.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from .detectors import ACCURACY, INPUTS, Finding
from .localise import LocaliseConfig, Locus, Place, Scope, localise
from .profile import CONFIDENCE
from .quality import CHECKS, FRACTION, SHIFTS, Fault
from .scores import expected_text

SENSOR_FAULT: Final = "sensor_fault"
LOCAL_SHIFT: Final = "local_shift"
FLEET_SHIFT: Final = "fleet_shift"
ACCURACY_LOSS: Final = "accuracy_loss"
KINDS: Final = (ACCURACY_LOSS, SENSOR_FAULT, FLEET_SHIFT, LOCAL_SHIFT)
"""Kinds of verdicts, the most urgent one first."""

LOSS: Final = "loss"
SUSPICION: Final = "suspicion"
SHIFT: Final = "shift"
FAULT: Final = "fault:"
"""Causes: what is wrong with one device; a fault is followed by its feature."""

SCORES_SHOWN: Final = 10  # devices whose scores stand in the evidence of one alert
CHANGES_SHOWN: Final = 8  # features of a device in the evidence of one alert
DEVICES_SHOWN: Final = 50  # names in the evidence of one alert; the counts are always whole


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictConfig:
    """How findings become verdicts."""

    usual_min: float = 0.05
    """The other channels of a device are usual while none has a p-value below this over their
    number."""
    far_min: float = 0.2
    """Hellinger distance from which one channel alone looks like a broken sensor: of a normal that
    is off by 0.6 standard deviations. People in motion whom the model never saw, unlike in one
    channel, came to 0.16; sensors off by half a deviation to 0.20 and more, by one to 0.37."""
    localise: LocaliseConfig = field(default_factory=LocaliseConfig)
    """When a group of devices is named instead of its members."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 0 < self.usual_min < 1:
            raise ValueError("usual_min must be in (0, 1)")
        if not 0 <= self.far_min < 1:
            raise ValueError("far_min must be in [0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What one judgement knows of one device."""

    place: Place = field(default_factory=Place)
    found: Sequence[Finding] = ()
    """All findings; empty = it could not be judged yet."""
    kept: Sequence[Finding] = ()
    """Those that stand over the whole fleet."""
    faults: Sequence[Fault] = ()
    """Faults that stand over the whole fleet."""
    changes: Sequence[Finding] = ()
    """What changed since the device's first windows, strongest first; :mod:`.streams` bounds how
    often such a thing is said falsely."""
    scores: Sequence[Mapping[str, Any]] = ()
    """What its confidence and accuracy tell, from :mod:`.scores`: shown, never a cause."""
    told: bool = True
    """Whether its quality counters tell anything yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One thing to tell an operator."""

    kind: str
    """One of ``KINDS``."""
    scope: Scope
    subject: str
    """Name of the device, site or hardware class; "" = the fleet."""
    suspected: bool
    """For an accuracy loss: no label says so, the model's confidence does."""
    text: str
    """One sentence: what, where, how sure, what to do."""
    features: tuple[str, ...]
    """Most concerned first."""
    locus: Locus
    evidence: dict[str, Any]
    """JSON: devices, counts, shares, p-values, findings, faults, thresholds."""


def causes(look: Look, *, config: VerdictConfig) -> dict[str, tuple[str, ...]]:
    """Return what is wrong with a device in one judgement: cause -> the features concerned.

    ``loss`` and ``suspicion`` exclude each other: where labels tell, the confidence says nothing
    about the accuracy. A shift that lies in channels whose data are broken is the fault's.
    """
    found: dict[str, tuple[str, ...]] = {}
    broken = {fault.feature for fault in look.faults if fault.check not in SHIFTS}
    strange = [fault.feature for fault in look.faults if fault.check in SHIFTS]
    for fault in look.faults:
        if fault.check in SHIFTS:
            continue
        name = FAULT + fault.feature
        found[name] = (*found.get(name, ()), fault.key)
    standing = {finding.feature for finding in look.kept}
    changed = [each.feature for each in look.changes]
    unsure = CONFIDENCE in standing or CONFIDENCE in changed
    labelled = any(finding.feature == ACCURACY for finding in look.found)
    if ACCURACY in standing:
        found[LOSS] = (ACCURACY,)
    elif unsure and not labelled:
        found[SUSPICION] = (CONFIDENCE,)
    channels = standing - {ACCURACY, INPUTS, CONFIDENCE}
    moved = [name for name in changed if name != CONFIDENCE]
    if INPUTS in standing or channels or moved or strange:
        unlike = [each.feature for each in _unlike(look, config)]
        shown = tuple(dict.fromkeys([*strange, *unlike, *sorted(channels), *moved])) or (INPUTS,)
        if not set(shown) <= broken:
            found[SHIFT] = shown
    elif unsure and labelled and ACCURACY not in standing:
        found[SHIFT] = (CONFIDENCE,)
    return found


def single(look: Look, *, config: VerdictConfig) -> str:
    """Return the one channel that is far off while all others are as usual; "" = there is none.

    One that is a little off is a shift: another use of a device may show in one channel. A category
    is none: another mix of codes is another use of the device, not a broken sensor.
    Nor is a channel that goes with codes which nobody knows.
    """
    if any(fault.check in SHIFTS for fault in look.faults):
        return ""
    unlike = _unlike(look, config)
    channels = _channels(look.found)
    if len(unlike) != 1 or len(channels) < 2 or not unlike[0].ordered:
        return ""
    if unlike[0].effect < config.far_min:
        return ""
    return unlike[0].feature


def judge(
    looks: Mapping[str, Look],
    alarms: Mapping[str, Mapping[str, bool]],
    *,
    config: VerdictConfig,
    named: Collection[tuple[str, str, str]] = (),
) -> list[Verdict]:
    """Return what is to be told of a model's devices, the most urgent and largest first.

    Args:
        looks: What the judgement knows of each device that runs the model.
        alarms: Device -> its alarms by cause: True = confirmed, False = found but not yet
            confirmed. Groups are looked for in both, so that the members of a site that drift are
            not told one by one while the last of them are being confirmed.
        config: How findings become verdicts.
        named: (kind, scope, subject) of the alerts that are live.

    Returns:
        Verdicts with at most one for each (kind, scope, subject).
    """
    found: dict[tuple[str, str, str], Verdict] = {}
    faults = sorted({c for each in alarms.values() for c in each if c.startswith(FAULT)})
    found_of = {name: look for name, look in looks.items() if look.found}
    told_of = {name: look for name, look in looks.items() if look.told}
    families: list[tuple[Collection[str], Collection[str], Mapping[str, Look]]] = [
        ((LOSS, SUSPICION), (ACCURACY_LOSS,), found_of),
        ((SHIFT,), (LOCAL_SHIFT, FLEET_SHIFT), found_of),
        *(((cause,), (SENSOR_FAULT,), told_of) for cause in faults),
    ]
    # All families of one look share the chance of naming a group wrongly.
    rules = replace(config.localise, level=config.localise.level / len(families))
    for family, kinds, judged in families:
        mine = {n: {c: a for c, a in alarms.get(n, {}).items() if c in family} for n in judged}
        mine = {name: each for name, each in mine.items() if each}
        live = {(scope, subject) for kind, scope, subject in named if kind in kinds}
        features = {name: _concerned(judged[name], each, config) for name, each in mine.items()}
        places = {name: look.place for name, look in judged.items()}
        for locus in localise(features, places, config=rules, named=live):
            confirmed = [name for name in locus.affected if any(mine[name].values())]
            enough = min(config.localise.members_min, len(locus.affected))
            if locus.scope is Scope.DEVICE and not confirmed:
                continue
            if len(confirmed) < enough:
                # A group is about to be told; who was told alone already stays so until then.
                loci = [_alone(name, features, len(judged)) for name in confirmed]
            else:
                loci = [locus]
            for each in loci:
                verdict = _verdict(each, judged, mine, config, live=named)
                key = (verdict.kind, str(verdict.scope), verdict.subject)
                if each is not locus and key not in named:
                    continue
                found[key] = _merged(found[key], verdict) if key in found else verdict
    order = {kind: at for at, kind in enumerate(KINDS)}
    scopes = {scope: -at for at, scope in enumerate(Scope)}
    return sorted(found.values(), key=lambda v: (order[v.kind], scopes[v.scope], v.subject))


# --- what one device shows --------------------------------------------------------------------


def _channels(found: Sequence[Finding]) -> list[Finding]:
    return [each for each in found if each.feature not in (ACCURACY, INPUTS, CONFIDENCE)]


def _unlike(look: Look, config: VerdictConfig) -> list[Finding]:
    """Return the channels that are not as usual, strongest first."""
    channels = _channels(look.found)
    bound = config.usual_min / max(1, len(channels) - 1)
    standing = {finding.feature for finding in look.kept}
    unusual = [
        each
        for each in channels
        if each.effect > each.normal and (each.p_value < bound or each.feature in standing)
    ]
    return sorted(unusual, key=lambda each: (each.p_value, -each.effect))


def _concerned(look: Look, alarms: Mapping[str, bool], config: VerdictConfig) -> tuple[str, ...]:
    now = causes(look, config=config)
    # An alarm that is about to end has no evidence in this look, and keeps its name until it does.
    return tuple(dict.fromkeys(f for cause in alarms for f in now.get(cause, (cause,))))


def _alone(device: str, features: Mapping[str, Collection[str]], judged: int) -> Locus:
    return Locus(
        scope=Scope.DEVICE,
        subject=device,
        affected=(device,),
        judged=1,
        p_value=1.0,
        rest_affected=len(features) - 1,
        rest_judged=judged - 1,
        features=tuple((name, 1) for name in features[device]),
    )


# --- what is told -----------------------------------------------------------------------------


def _verdict(
    locus: Locus,
    looks: Mapping[str, Look],
    alarms: Mapping[str, Mapping[str, bool]],
    config: VerdictConfig,
    live: Collection[tuple[str, str, str]],
) -> Verdict:
    family = {cause for name in locus.affected for cause in alarms[name]}
    labelled = [name for name in locus.affected if LOSS in alarms[name]]
    faults = [
        fault
        for name in locus.affected
        for fault in looks[name].faults
        if FAULT + fault.feature in family and fault.check not in SHIFTS
    ]
    one = ""
    if family & {LOSS, SUSPICION}:
        kind = ACCURACY_LOSS
    elif any(cause.startswith(FAULT) for cause in family):
        kind = SENSOR_FAULT
    else:
        # What was told as a shift of the whole stays one: with a channel on the border of usual,
        # the same device would else be told as one thing and as the other by turns.
        alone = (
            locus.scope is Scope.DEVICE
            and (LOCAL_SHIFT, str(locus.scope), locus.subject) not in live
        )
        one = single(looks[locus.subject], config=config) if alone else ""
        wide = locus.scope in (Scope.HARDWARE, Scope.FLEET)
        kind = SENSOR_FAULT if one else FLEET_SHIFT if wide else LOCAL_SHIFT
    suspected = kind == ACCURACY_LOSS and not labelled
    features = tuple(dict.fromkeys(_feature(name) for name, _ in locus.features))
    texts = {
        ACCURACY_LOSS: lambda: _loss_text(locus, looks, labelled),
        SENSOR_FAULT: lambda: _fault_text(locus, faults, one),
        LOCAL_SHIFT: lambda: _shift_text(locus, looks),
        FLEET_SHIFT: lambda: _shift_text(locus, looks),
    }
    return Verdict(
        kind=kind,
        scope=locus.scope,
        subject=locus.subject,
        suspected=suspected,
        text=f"{place_name(locus.scope, locus.subject)}: {texts[kind]()}",
        features=features,
        locus=locus,
        evidence=_evidence(locus, looks, labelled, suspected, family),
    )


def changes_text(changes: Sequence[Finding]) -> str:
    """Return what changed, how and since when: ``temp higher since window 112 (PSI 0.31)``."""
    return ", ".join(
        f"{each.feature} {each.way} since window {each.since} (PSI {each.psi:.2f})"
        for each in changes[:3]
    )


def place_name(scope: str, subject: str) -> str:
    """Return how a place is spoken of: ``wrist-03``, ``site north``, ``the fleet``."""
    if scope == Scope.DEVICE:
        return subject
    if scope == Scope.FLEET:
        return "the fleet"
    return f"{'site' if scope == Scope.SITE else 'hardware class'} {subject}"


def _feature(key: str) -> str:
    return key.rpartition(":")[0] if key.rpartition(":")[2] in CHECKS else key


def _sure(locus: Locus) -> str:
    if locus.scope is Scope.DEVICE:
        return ""
    if locus.scope is Scope.FLEET:
        return f" (by chance: {_p(locus.p_value)})"
    rest = f"{locus.rest_affected} of {locus.rest_judged} elsewhere"
    same = "".join(f", the same devices as {place_name(*each)}" for each in locus.confounded)
    return f" and {rest}{same} (by chance: {_p(locus.p_value)})"


def _p(value: float) -> str:
    return f"{value:.1g}" if value >= 1e-9 else "below 1e-9"


def _who(locus: Locus) -> str:
    if locus.scope is Scope.DEVICE:
        return ""
    return f"{len(locus.affected)} of {locus.judged} devices"


def _most(locus: Locus) -> str:
    names = [
        f"{name} ({count})" if locus.scope is not Scope.DEVICE else name
        for name, count in locus.features
        if name not in (INPUTS, SHIFT)
    ]
    return f"; most of all {', '.join(names[:3])}" if names else ""


def _fault_text(locus: Locus, faults: Sequence[Fault], one: str) -> str:
    if one:
        return (
            f"{one} alone is far off while every other feature is as usual, which looks like a "
            "broken or badly mounted sensor: check it before anything is retrained"
        )
    what = _said(faults, locus) or "no new evidence; the fault is about to be settled"
    if locus.scope is Scope.DEVICE:
        coded = bool(faults) and all(fault.check == FRACTION for fault in faults)
        what_to_do = (
            "find what averages or scales codes" if coded else "check or replace the sensor"
        )
        return f"{what}: {what_to_do}"
    return (
        f"{_who(locus)}{_sure(locus)}: {what}: look for a common cause, such as a batch, "
        "a driver or wiring"
    )


def _said(faults: Sequence[Fault], locus: Locus) -> str:
    """Return the three worst of the faults of a place, each where it is worst; "" = none."""
    worst: dict[str, Fault] = {}
    for fault in faults:
        if fault.key not in worst or fault.share > worst[fault.key].share:
            worst[fault.key] = fault
    most = "" if locus.scope is Scope.DEVICE else "up to "
    return ", ".join(
        f"{fault.said} in {most}{fault.share:.0%} "
        f"({fault.windows_bad} of {fault.windows} windows; {fault.allowed:.0%} may)"
        for fault in sorted(worst.values(), key=lambda f: -f.share)[:3]
    )


def _shift_text(locus: Locus, looks: Mapping[str, Look]) -> str:
    strange = [f for n in locus.affected for f in looks[n].faults if f.check in SHIFTS]
    new = f"; {_said(strange, locus)}" if strange else ""
    if locus.scope is not Scope.DEVICE:
        where = {
            Scope.SITE: "look at what changed there; the model may not know these conditions",
            Scope.HARDWARE: "compare its sensors, drivers and firmware with the other classes",
            Scope.FLEET: "the world or the software changed; see the accuracy before retraining",
        }[locus.scope]
        shown = [looks[name] for name in locus.affected]
        unlike = any(each.feature != ACCURACY for look in shown for each in look.kept)
        only = not unlike and any(look.changes for look in shown)
        what = (
            "have changed since their first windows, still like what the model was made with"
            if only and not new
            else "are unlike all that the model was made with"
        )
        return f"inputs of {_who(locus)}{_sure(locus)} {what}{_most(locus)}{new}: {where}"
    look = looks[locus.subject]
    since = f"; changed since its first windows: {changes_text(look.changes)}"
    rest = f"; {locus.rest_affected} of {locus.rest_judged} other devices drift"
    if new and not any(each.feature != ACCURACY for each in look.kept):
        return f"{new[2:]}{since if look.changes else ''}{rest}: find out what is new there"
    if _only_changed(look):
        return (
            f"its inputs are like what the model was made with, but {since[2:]}{rest}: find out "
            "what changed there"
        )
    inputs = next((f for f in look.found if f.feature == INPUTS), None)
    far = (
        f" (distance {inputs.effect:.2f} to group {inputs.nearest}, the nearest; "
        f"usual {inputs.normal:.2f})"
        if inputs
        else ""
    )
    return (
        f"its inputs are unlike all that the model was made with{far}{_most(locus)}{new}"
        f"{since if look.changes else ''}{rest}: find out who or what is new there"
    )


def _only_changed(look: Look) -> bool:
    """Whether a device is unlike its first windows alone, and like what its model knows."""
    return bool(look.changes) and not any(each.feature != ACCURACY for each in look.kept)


def _loss_text(locus: Locus, looks: Mapping[str, Look], labelled: Sequence[str]) -> str:
    who = f" on {_who(locus)}{_sure(locus)}" if _who(locus) else ""
    if not labelled:
        kept = any(each.feature == CONFIDENCE for n in locus.affected for each in looks[n].kept)
        than = "it ever was" if kept else "in its first windows"
        said = [expected_text(looks[name].scores) for name in locus.affected[:1]]
        hint = f"; {said[0]}" if said[0] and locus.scope is Scope.DEVICE else ""
        return (
            f"the model is less sure than {than}{who}, so it may be right less often{hint}; no "
            "label says so yet: collect labels there before anything is retrained"
        )
    found = [f for name in labelled for f in looks[name].found if f.feature == ACCURACY]
    if not found:
        return f"labels told of a loss of accuracy{who}; it is about to be settled"
    worst = max(found, key=lambda each: each.effect)
    few = f", labels tell of {len(labelled)}" if len(labelled) < len(locus.affected) else ""
    least = "accuracy" if locus.scope is Scope.DEVICE else "accuracy down to"
    return (
        f"{least} {worst.normal - worst.effect:.0%}, {100 * worst.effect:.0f} points below the "
        f"expected {worst.normal:.0%}{who}{few} (by chance at most once in "
        f"{min(worst.rarity, 1e9):,.0f} looks): retrain on new labels, or go back to the model "
        "before"
    )


def _evidence(
    locus: Locus,
    looks: Mapping[str, Look],
    labelled: Sequence[str],
    suspected: bool,
    family: set[str],
) -> dict[str, Any]:
    shown = locus.affected[:DEVICES_SHOWN]
    document: dict[str, Any] = {
        "devices": list(shown),
        "affected": len(locus.affected),
        "judged": locus.judged,
        "share": round(locus.share, 4),
        "rest": {"affected": locus.rest_affected, "judged": locus.rest_judged},
        "p_value": locus.p_value,
        "features": [{"feature": name, "devices": count} for name, count in locus.features],
        "confounded": [{"scope": scope, "subject": name} for scope, name in locus.confounded],
    }
    if family & {LOSS, SUSPICION}:
        document |= {"basis": "estimate" if suspected else "labels", "labelled": len(labelled)}
    if locus.scope is Scope.DEVICE:
        look = looks[locus.subject]
        document["findings"] = [finding_json(each) for each in (look.kept or look.found)]
        document["faults"] = [fault_json(each) for each in look.faults]
    document["scores"] = [
        {"device": name, **line}
        for name in locus.affected[:SCORES_SHOWN]
        for line in looks[name].scores
    ]
    changes = {n: looks[n].changes for n in locus.affected if looks[n].changes}
    document["changes"] = [
        {"device": name, **finding_json(each)}
        for name, found in list(changes.items())[:DEVICES_SHOWN]
        for each in found[:CHANGES_SHOWN]
    ]
    return document


def _merged(one: Verdict, other: Verdict) -> Verdict:
    """Return two verdicts of the same kind and place as one: two broken sensors of a device."""
    first, second = sorted((one, other), key=lambda each: -len(each.locus.affected))
    said = second.text.removeprefix(f"{place_name(second.scope, second.subject)}: ")
    return Verdict(
        kind=first.kind,
        scope=first.scope,
        subject=first.subject,
        suspected=first.suspected and second.suspected,
        text=first.text if said in first.text else f"{first.text}; also: {said}",
        features=tuple(dict.fromkeys([*first.features, *second.features])),
        locus=first.locus,
        evidence={**first.evidence, "also": [*first.evidence.get("also", []), second.evidence]},
    )


def finding_json(found: Finding) -> dict[str, Any]:
    """Return a finding as JSON values; with its change point, if it is a change."""
    since = {"since_window": found.since, "since_ms": found.since_ms, "psi": round(found.psi, 4)}
    return {
        "feature": found.feature,
        "p_value": float(f"{found.p_value:.3g}"),
        "effect": round(found.effect, 4),
        "normal": round(found.normal, 4),
        "direction": round(found.direction, 3),
        **(since if found.since else {}),
    }


def fault_json(fault: Fault) -> dict[str, Any]:
    """Return a fault as JSON values."""
    return {
        "feature": fault.feature,
        "check": fault.check,
        "share": round(fault.share, 4),
        "allowed": round(fault.allowed, 4),
        "windows_bad": fault.windows_bad,
        "windows": fault.windows,
        "p_value": fault.p_value,
        **({"codes": list(fault.codes)} if fault.codes else {}),
    }
