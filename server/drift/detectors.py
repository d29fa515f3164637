"""Decide whether a device is unlike all that its model was made with. Pure.

    window counts --fold--> block of the last K windows --compare--> findings
    late labels   --label--> wealth of a bettor         --compare--> findings
    findings of all devices --judge_fleet--> discoveries --settle--> alarm of each device

The null hypothesis of a device is not "the same distribution": no two people move alike, nor does
one person on two days, and a test for equality always fires. It is "one of the groups that the
model was made with, at another time":

- **inputs**: the Hellinger distance of the device's block to the *nearest* group's training data,
  averaged over the channels, against the distances of the groups' own held-out data from their
  training data: a Student prediction interval with G - 1 degrees of freedom. The nearest group is
  the one for which the null is hardest to reject. A distance grows with fewer values: sampling
  alone adds (B - 1) / 8 (1/n + 1/m) to the square of one of n and m independent values in B bins,
  so the groups' distances are first brought to as many values as the device has sent. Neighbouring
  samples depend on each other in the groups' data as in the device's: beyond that no independence
  of samples is assumed, a group is one sample.
- **each channel**: the same for one channel, with the same nearest group. Finds a single broken
  sensor, and ranks what is unlike.
- **confidence**: how far it lies below the reference (Cliff's delta), against the groups' own
  held-out confidence in the same way; one-sided: a model that grows surer is no alarm.
- **accuracy**: late labels, by betting, see :mod:`.betting`. Null: in every look, given the past,
  the expected share of right answers is at least the reference's minus a tolerance (what matters,
  or twice the standard deviation between groups), however the looks depend on each other.

:func:`judge_fleet` controls the share of false discoveries among the devices in three families:
accuracy (e-BH: any dependence), inputs (Benjamini–Hochberg: all devices are compared with the same
groups, which makes their p-values positively dependent), device × feature
(Benjamini–Yekutieli: any dependence). **Over time**:

- In its first ``block_windows`` windows a device is asked once who it is: its inputs are judged at
  ``discoveries_false_max``. That is the expected share of false ones among the devices named in
  one look; looks within the block share its data, and are no further questions.
- After that, only a look that ends a block may begin an alarm, at ``block_windows /
  windows_per_false_alarm``. The chances of false discoveries add up whatever their dependence:
  where nothing has changed, a family begins at most one in ``windows_per_false_alarm`` windows of
  the fleet, on average. What changes in between is for :mod:`.streams`, which compares a device
  with itself.
- While a device is found already, it stays so at ``discoveries_false_max``: this ends alarms, and
  begins none.
- The evidence of the accuracy has the same bound by itself, as :mod:`.betting` says.

An alarm opens after ``confirm_windows`` judgements in a row and ends after ``clear_windows``.

Covariate shift is not accuracy loss; a verdict says which of the two was seen, and names the
features that are most unlike in either case.

Sources: prediction interval: Hahn, Meeker, "Statistical Intervals" (1991) ch. 4; bias of the
squared distance: the delta method; e-BH: Wang, Ramdas, JRSS B 84 (2022); BH with a shared
calibration set: Bates et al., Annals of Statistics 51 (2023); unequal levels: Genovese, Roeder,
Wasserman, Biometrika 93 (2006); BY: Benjamini, Yekutieli, Annals of Statistics 29 (2001).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from . import betting, multiplicity, statistics
from .betting import Scatter
from .errors import ProfileError
from .profile import CONFIDENCE, ReferenceProfile

ACCURACY: Final = "accuracy"
INPUTS: Final = "inputs"
DIRECTION_MIN: Final = 0.1  # of a change that is called higher or lower
DISTANCE_USUAL: Final = 0.05  # assumed of one group at two times, where no group tells


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftConfig:
    """When a device is called unlike the others."""

    windows_min: int = 4
    """Telemetry windows before a device is judged …"""
    predictions_min: int = 400
    """… and predictions in them: with fewer, the mix of what was done just then is what differs."""
    block_windows: int = 12
    """Windows that a judgement looks back on."""
    discoveries_false_max: float = 0.1
    """Expected share of false ones among the findings of one look at the fleet."""
    windows_per_false_alarm: int = 10_000
    """Windows of a fleet on average, at least, in which nothing has changed and one alarm begins
    all the same, for each family of findings; 10,000 windows of 5 minutes are five weeks."""
    distance_min: float = 0.05
    """Hellinger distances (0 to 1) below this are too small to matter, whatever their p-value."""
    confidence_loss_min: float = 0.1
    """Lowerings of the confidence below this (Cliff's delta) are too small to matter."""
    accuracy_loss_min: float = 0.03
    """Losses below this share are too small to matter."""
    labels_min: int = 20
    """Labels in one look at the accuracy."""
    labels_correlation: float = 0.05
    """Of two answers of one look, 0 to 1, until a device's own looks tell how much it is."""
    confirm_windows: int = 2
    """Judgements in a row that must agree before an alarm opens."""
    clear_windows: int = 4
    """Judgements in a row without a finding before it ends."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 1 <= self.windows_min <= self.block_windows <= 1000:
            raise ValueError("1 <= windows_min <= block_windows <= 1000 must hold")
        if not 0 < self.discoveries_false_max < 1 or not 0 <= self.accuracy_loss_min < 1:
            raise ValueError("discoveries_false_max must be in (0, 1), accuracy_loss_min in [0, 1)")
        if not 0 <= self.distance_min < 1 or not 0 <= self.confidence_loss_min < 1:
            raise ValueError("distance_min and confidence_loss_min must be in [0, 1)")
        if not self.block_windows < self.windows_per_false_alarm or not (
            0 <= self.labels_correlation < 1
        ):
            raise ValueError(
                "windows_per_false_alarm must be above block_windows, labels_correlation in [0, 1)"
            )
        if min(self.predictions_min, self.labels_min) < 1:
            raise ValueError("predictions_min and labels_min must be at least 1")
        if min(self.confirm_windows, self.clear_windows) < 1:
            raise ValueError("confirm_windows and clear_windows must be at least 1")


@dataclass(frozen=True, slots=True)
class Finding:
    """The evidence about one feature, the inputs as a whole, or the accuracy of one device."""

    feature: str
    p_value: float
    """Of the null in the module head, 0 to 1; for the accuracy, ``discoveries_false_max`` where
    the evidence is that of ``windows_per_false_alarm``, and in proportion."""
    effect: float
    """Hellinger distance; for the confidence, Cliff's delta below the reference; for the
    accuracy, the loss as a share."""
    normal: float
    """The same figure of a typical group; for the accuracy, the expected share itself."""
    direction: float
    """-1 lower … +1 higher than the nearest group; 0 for inputs and accuracy."""
    nearest: str = ""
    """The group that the device is most like; empty where none is compared with."""
    psi: float = 0.0
    """Debiased PSI against that group: the figure that many know. Nothing is decided by it."""
    since: int = 0
    """Of a change since the device's first windows, see :mod:`.streams`: the number, from 1, of
    the window in which it began; 0 = it is compared with the reference, not with itself."""
    since_ms: int = 0
    """Time of that window, Unix ms."""
    rarity: float = 0.0
    """For the accuracy: looks in which such evidence comes by chance once, at least."""
    ordered: bool = True
    """False: the feature is a category, whose ``direction`` says nothing."""

    @property
    def way(self) -> str:
        """How a feature changed, in words."""
        if not self.ordered:
            return "in another mix"
        if abs(self.direction) <= DIRECTION_MIN:
            return "spread"
        return "higher" if self.direction > 0 else "lower"


@dataclass(slots=True)
class Alarm:
    """One thing that is said of a device, again and again."""

    streak: int = 0
    """Judgements in a row that found it; negative: that did not."""
    open: bool = False
    opened_windows: int = 0
    """Telemetry windows seen when it opened."""


@dataclass(slots=True)
class DeviceState:
    """What was folded of one device and model. ``to_dict`` is what the server keeps."""

    windows: int = 0
    blocks: list[list[list[int]]] = field(default_factory=list)
    """Counts of the last windows, K x F x B."""
    labelled: int = 0
    correct: int = 0
    recent: list[tuple[int, int]] = field(default_factory=list)
    """(labelled, correct) of the last looks; the newest may still be filling."""
    looks: int = 0
    """Looks at the accuracy that were bet on."""
    wealth: list[float] = field(default_factory=betting.begun)
    """Evidence of a loss of accuracy, for each drop that is bet on."""
    scatter: Scatter = field(default_factory=Scatter)
    """Of the looks at the accuracy."""
    judged_windows: int = 0
    """Windows seen at the last judgement: without a new one there is nothing to judge."""
    alarms: dict[str, Alarm] = field(default_factory=dict)
    """What was found of the device, by what it is; ``verdicts.py`` names the keys."""
    slices: list[str] = field(default_factory=list)
    """Slices that the newest block holds."""
    aligned_ms: int = 0
    """Start of the newest block on the device's clock; 0 = it is not aligned."""

    @property
    def open(self) -> bool:
        """Whether anything is found and confirmed."""
        return any(alarm.open for alarm in self.alarms.values())

    @property
    def opened_windows(self) -> int:
        """Telemetry windows seen when the first of the open alarms opened; 0 without one."""
        return min((a.opened_windows for a in self.alarms.values() if a.open), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON values; its lists are the state's own, not copies."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        found["scatter"] = asdict(self.scatter)
        return found | {"alarms": {name: asdict(alarm) for name, alarm in self.alarms.items()}}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DeviceState:
        """Return the state that :meth:`to_dict` wrote; {} is a new one."""
        known = {each.name for each in fields(cls)}  # older servers kept other things as well
        state = cls(**{name: value for name, value in raw.items() if name in known})
        state.alarms = {name: Alarm(**each) for name, each in raw.get("alarms", {}).items()}
        state.recent = [(int(a), int(b)) for a, b in state.recent]
        state.scatter = Scatter(**raw.get("scatter", {}))
        if len(state.wealth) != len(betting.DROPS):  # of another bettor
            state.wealth = betting.begun()
        return state

    @property
    def evidence(self) -> float:
        """Evidence of a loss of accuracy: looks in which it comes by chance once, at least."""
        return betting.total(self.wealth)

    def fold(
        self,
        counts: Sequence[Sequence[int]],
        *,
        config: DriftConfig,
        slice_: str = "",
        aligned_ms: int = 0,
    ) -> None:
        """Add one telemetry window, or one slice of it.

        A device is judged as a whole: the slices of one window are added up. A slice that the
        newest block holds already, or another aligned start, begins the next one.

        Args:
            counts: Counts of each feature of the profile in its order, F x B.
            config: How far back to look.
            slice_: Value of the slice tag that the predictions share; "" = no slicing.
            aligned_ms: Start of the aligned window on the device's clock; 0 = not aligned.
        """
        same = [[*map(len, counts)]] == [[*map(len, block)] for block in self.blocks[-1:]]
        another = bool(slice_ and self.slices) and not {slice_, ""} & {*self.slices}
        if same and another and aligned_ms == self.aligned_ms:
            self.blocks[-1] = [
                [a + b for a, b in zip(old, new, strict=True)]
                for old, new in zip(self.blocks[-1], counts, strict=True)
            ]
            self.slices.append(slice_)
            return
        self.windows += 1
        self.blocks = [*self.blocks, [list(row) for row in counts]][-config.block_windows :]
        self.slices, self.aligned_ms = [slice_], aligned_ms

    def label(
        self, labelled: int, correct: int, *, profile: ReferenceProfile, config: DriftConfig
    ) -> None:
        """Add late labels, once ``labels_min`` have come as a look that is bet on.

        Args:
            labelled: How many came. Leave out labels of windows that the model may have been
                trained on: they say nothing about new ones.
            correct: How many of their predictions were right, 0 to ``labelled``.
            profile: Of the model.
            config: The tolerance.
        """
        self.labelled += labelled
        self.correct += correct
        if self.recent and self.recent[-1][0] < config.labels_min:
            waiting, right = self.recent.pop()
            labelled, correct = labelled + waiting, correct + right
        self.recent = [*self.recent, (labelled, correct)][-config.block_windows :]
        if labelled < config.labels_min:
            return
        floor = _floor(profile, config)
        # Of looks before this one alone: a bet must not know what it is on.
        seen = self.labelled - labelled
        share = (self.correct - correct) / seen if seen else floor
        rho = self.scatter.rho(share, prior=config.labels_correlation)
        self.wealth = betting.after(self.wealth, labelled, correct, floor=floor, rho=rho)
        self.scatter.add(labelled, correct)
        self.looks += 1


def findings(
    state: DeviceState, profile: ReferenceProfile, *, config: DriftConfig
) -> list[Finding]:
    """Return the evidence about inputs, features and accuracy; what cannot be told yet is absent.

    Raises:
        ProfileError: The folded counts do not have the profile's bins.
    """
    found = []
    totals = _totals(state, profile)
    if state.windows >= config.windows_min and sum(totals[-1]) >= config.predictions_min:
        found = [*_inputs(totals, profile), *_confidence(totals, profile)]
    looks = [pair for pair in state.recent if pair[0] >= config.labels_min]
    if looks and sum(profile.labelled):
        share = sum(pair[1] for pair in looks) / sum(pair[0] for pair in looks)
        expected, _ = _expected(profile)
        evidence = state.evidence
        rare = config.discoveries_false_max * config.windows_per_false_alarm
        p_value = min(1.0, rare / evidence) if evidence else 1.0
        loss = Finding(ACCURACY, p_value, expected - share, expected, 0.0, rarity=evidence)
        found.append(loss)
    return found


def level(state: DeviceState, *, standing: bool, config: DriftConfig) -> float:
    """Return the level at which the inputs of a device are judged now, see the module head.

    Args:
        state: Of the device, before :func:`settle` has been told of this look.
        standing: Whether they were found unlike in the look before.
        config: How far back a look goes, and how rare false alarms are.
    """
    size = config.block_windows
    if standing or state.windows <= size:
        return config.discoveries_false_max
    ended = state.windows // size > state.judged_windows // size
    usual = size / config.windows_per_false_alarm
    return min(config.discoveries_false_max, usual) if ended else 0.0


def judge_fleet(
    fleet: Mapping[str, Sequence[Finding]],
    *,
    config: DriftConfig,
    levels: Mapping[str, float] | None = None,
) -> dict[str, list[Finding]]:
    """Return the findings of each device that stand, strongest first.

    Args:
        fleet: Findings by device.
        config: Share of false discoveries and smallest effects.
        levels: :func:`level` of each device; None = all are judged for the first time.

    Returns:
        For each device of ``fleet``, those of its findings that are discoveries at the expected
        false share over the whole fleet, and large enough to matter: accuracy, inputs, features.
    """
    kept: dict[str, list[Finding]] = {device: [] for device in fleet}
    families: dict[str, list[tuple[str, Finding]]] = {ACCURACY: [], INPUTS: [], "": []}
    for device, found in fleet.items():
        for finding in found:
            families.get(finding.feature, families[""]).append((device, finding))
    for name, family in families.items():
        weights = {} if levels is None or name == ACCURACY else levels
        for device, finding in _discoveries(family, weights, dependent=not name, config=config):
            if finding.effect >= _effect_min(finding, config):
                kept[device].append(finding)
    return kept


def unlike(found: Sequence[Finding], *, most: int = 3) -> list[Finding]:
    """Return the features of a device that are most unlike the reference, strongest first.

    Evidence that goes with a verdict; no alarm of its own.

    Args:
        found: All findings of the device.
        most: How many at most.
    """
    features = [f for f in found if f.feature not in (ACCURACY, INPUTS) and f.effect > f.normal]
    return sorted(features, key=lambda f: (f.p_value, -f.effect))[:most]


def settle(state: DeviceState, found: Collection[str], *, config: DriftConfig) -> None:
    """Open or end the device's alarms after one judgement.

    Args:
        state: Of the device.
        found: What this judgement found of it, by what it is.
        config: How many judgements in a row must agree.
    """
    state.judged_windows = state.windows
    for name in found:
        state.alarms.setdefault(name, Alarm())
    for name, alarm in list(state.alarms.items()):
        if name in found:
            alarm.streak = max(0, alarm.streak) + 1
            if not alarm.open and alarm.streak >= config.confirm_windows:
                alarm.open, alarm.opened_windows = True, state.windows
            continue
        alarm.streak = min(0, alarm.streak) - 1
        if alarm.open and -alarm.streak >= config.clear_windows:
            alarm.open = False
        if not alarm.open:
            del state.alarms[name]


def sentence(device: str, kept: Sequence[Finding], found: Sequence[Finding]) -> str:
    """Return what was found in one plain sentence for an operator.

    Args:
        device: Its id.
        kept: Its findings that stand.
        found: All its findings, for the features that are most unlike.
    """
    if not kept:
        return f"{device}: like what the model was made with"
    parts = []
    for finding in kept:
        if finding.feature == ACCURACY:
            parts.append(
                f"accuracy {finding.normal - finding.effect:.0%}, {100 * finding.effect:.0f} "
                f"points below the expected {finding.normal:.0%}"
            )
        elif finding.feature == INPUTS:
            parts.append(
                f"inputs unlike every group of the training data (distance {finding.effect:.2f} "
                f"to group {finding.nearest}, the nearest; usual {finding.normal:.2f})"
            )
    # One whose figures read alike tells a person nothing.
    further = [f for f in unlike(found) if f"{f.effect:.2f}" != f"{f.normal:.2f}"]
    shown = {finding.feature: finding for finding in (*kept, *further)}
    features = [_text(f) for name, f in shown.items() if name not in (ACCURACY, INPUTS)]
    if features:
        parts.append(("most unlike: " if parts else "drifts in ") + ", ".join(features))
    return f"{device}: {'; '.join(parts)}"


def _text(finding: Finding) -> str:
    if finding.feature == CONFIDENCE:
        return f"confidence lower ({-finding.effect:+.2f})"
    return f"{finding.feature} {finding.way} ({finding.effect:.2f}, usual {finding.normal:.2f})"


def _totals(state: DeviceState, profile: ReferenceProfile) -> list[NDArray[np.int64]]:
    """Return the counts of the block, for each feature (B,)."""
    totals = []
    for i, feature in enumerate(profile.features):
        total = np.zeros(len(feature.counts), np.int64)
        for block in state.blocks:
            if len(block) != len(profile.features) or len(block[i]) != len(total):
                raise ProfileError(f"counts of {feature.name} do not have the profile's bins")
            total += np.asarray(block[i], np.int64)
        totals.append(total)
    return totals


def _inputs(totals: Sequence[NDArray[np.int64]], profile: ReferenceProfile) -> list[Finding]:
    """Return the findings about all channels together and about each of them."""
    channels = [each for each in profile.features if each.name != CONFIDENCE]
    columns = [i for i, each in enumerate(profile.features) if each.name != CONFIDENCE]
    groups = [
        g for g in range(len(profile.groups)) if all(sum(each.trained[g]) for each in channels)
    ]
    if not channels or not groups:
        return []
    apart__gi, scatter__gi, changed__gi, noise__gi = np.empty((4, len(groups), len(channels)))
    free__i = np.array([len(each.counts) - 1 for each in channels])
    for at, (i, each) in enumerate(zip(columns, channels, strict=True)):
        trained__gb, held__gb = np.array(each.trained)[groups], np.array(each.held)[groups]
        apart__gi[:, at] = _apart(trained__gb, totals[i])
        scatter__gi[:, at] = _scatter(trained__gb, totals[i])
        changed__gi[:, at] = _apart(trained__gb, held__gb)
        noise__gi[:, at] = free__i[at] * _scatter(trained__gb, held__gb)
    again = [at for at, g in enumerate(groups) if all(sum(each.held[g]) for each in channels)]
    best = int(np.sqrt(apart__gi).mean(1).argmin())
    nearest, distances, scatter__i = groups[best], np.sqrt(apart__gi[best]), scatter__gi[best]
    # Of groups that were seen at another time, as if as little had been seen as of the device.
    changed__gi = np.sqrt(np.maximum(changed__gi - noise__gi, 0.0)[again] + free__i * scatter__i)
    name = profile.groups[nearest]
    effect = float(distances.mean())
    chance__i = np.sqrt(scatter__i / 2)  # standard deviation of a distance that is sampling's alone
    chance = float(np.sqrt((chance__i**2).sum()) / len(channels))
    p_value, normal = _prediction(effect, changed__gi.mean(1), chance)
    found = [Finding(INPUTS, p_value, effect, normal, 0.0, name)]
    shifted = _shifts([each.trained[nearest] for each in channels], [totals[i] for i in columns])
    for at, feature in enumerate(channels):
        effect = float(distances[at])
        p_value, normal = _prediction(effect, changed__gi[:, at], float(chance__i[at]))
        psi, lean = shifted[at]
        ordered = feature.ordered
        lean = lean if ordered else 0.0
        found.append(
            Finding(feature.name, p_value, effect, normal, lean, name, psi, ordered=ordered)
        )
    return found


def _shifts(
    expected: Sequence[Sequence[int]], observed: Sequence[NDArray[np.int64]]
) -> list[tuple[float, float]]:
    """Return (PSI, direction) of features, those of equal B at once."""
    found = [(0.0, 0.0)] * len(expected)
    for bins in {len(each) for each in expected}:
        at = [i for i, each in enumerate(expected) if len(each) == bins]
        psi, lean = statistics.shifts(
            [expected[i] for i in at], np.stack([observed[i] for i in at])
        )
        for j, i in enumerate(at):
            found[i] = float(psi[j]), float(lean[j])
    return found


def _apart(one__gb: NDArray[np.int64], other__gb: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return squared Hellinger distances of G pairs, (G,): a device has one for each group."""
    p, q = (
        (counts + statistics.PRIOR)
        / (counts.sum(-1, keepdims=True) + statistics.PRIOR * counts.shape[-1])
        for counts in (one__gb, other__gb)
    )
    found: NDArray[np.float64] = np.maximum(0.0, 1 - np.sqrt(p * q).sum(-1))
    return found


def _scatter(one__gb: NDArray[np.int64], other__gb: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (1/n + 1/m) / 8 of G pairs: what sampling adds to a squared distance, for each bin."""
    n, m = one__gb.sum(-1), other__gb.sum(-1)
    found: NDArray[np.float64] = (1 / np.maximum(n, 1) + 1 / np.maximum(m, 1)) / 8
    return found


def _confidence(totals: Sequence[NDArray[np.int64]], profile: ReferenceProfile) -> list[Finding]:
    found = []
    for feature, total in zip(profile.features, totals, strict=True):
        if feature.name == CONFIDENCE:
            lean = statistics.direction(feature.counts, total)
            held = [row for row in feature.held if sum(row)]
            others = -statistics.shifts(feature.counts, held)[1] if held else np.zeros(0)
            p_value, normal = _prediction(-lean, others)
            found.append(Finding(CONFIDENCE, p_value, -lean, normal, lean))
    return found


def _discoveries(
    flat: Sequence[tuple[str, Finding]],
    levels: Mapping[str, float],
    *,
    dependent: bool,
    config: DriftConfig,
) -> list[tuple[str, Finding]]:
    share = config.discoveries_false_max
    ranked = sorted(flat, key=lambda item: item[1].p_value)
    stands = multiplicity.by if dependent else multiplicity.bh
    weights = [levels.get(device, share) / share for device, _ in ranked]
    # A p-value of 0 is none at a level of 0; a weight above 1 is no device's.
    weighted = [
        min(1.0, finding.p_value / weight) if weight > 0 else 1.0
        for (_, finding), weight in zip(ranked, weights, strict=True)
    ]
    mask = stands(weighted, share)
    return [each for each, stood in zip(ranked, mask, strict=True) if stood]


def _effect_min(finding: Finding, config: DriftConfig) -> float:
    if finding.feature == ACCURACY:
        return config.accuracy_loss_min
    return config.confidence_loss_min if finding.feature == CONFIDENCE else config.distance_min


def _prediction(
    value: float, others__g: NDArray[np.float64], least: float = 0.0
) -> tuple[float, float]:
    """Return (one-sided p-value, mean of the others) of a value among exchangeable ones.

    Their standard deviation is taken for ``least`` where it is smaller: few may agree by chance.
    """
    count = len(others__g)
    mean = float(others__g.mean()) if count else DISTANCE_USUAL
    # Two groups say nothing about a spread; half of what is usual stands in for it.
    spread = float(others__g.std(ddof=1)) if count >= 3 else abs(mean) / 2
    error = max(spread, least, 5e-3) * math.sqrt(1 + 1 / max(count, 1))
    return statistics.student_above((value - mean) / error, max(count - 1, 2)), mean


def _expected(profile: ReferenceProfile) -> tuple[float, float]:
    """Return (expected share of right answers, its standard deviation between groups)."""
    pairs = [(n, c) for n, c in zip(profile.labelled, profile.correct, strict=True) if n]
    sizes, rights = (np.array([pair[i] for pair in pairs], np.float64) for i in (0, 1))
    # Jeffreys' prior keeps a group without an error from meaning that errors are impossible.
    expected = float((rights.sum() + 0.5) / (sizes.sum() + 1))
    if len(pairs) < 2:
        return expected, 0.0
    within = float((expected * (1 - expected) / sizes).mean())
    between = float((rights / sizes).var(ddof=1)) - within
    return expected, math.sqrt(max(between, 0.0))


def _floor(profile: ReferenceProfile, config: DriftConfig) -> float:
    """Return the smallest expected share of right answers that is no loss, in [0, 1)."""
    expected, spread = _expected(profile)
    return max(0.0, expected - max(config.accuracy_loss_min, 2 * spread))
