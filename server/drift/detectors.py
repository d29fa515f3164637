"""Decide whether a device is unlike the groups that the model was made with. Pure.

    window counts --fold--> block of the last K windows --compare--> verdict

The null hypothesis is not "the same distribution": no two people move alike, and a test that
asks for equality always fires. It is "one more member of the population that the held-out groups
of the reference profile were drawn from":

- **covariate**: the debiased PSI of the device's block against the reference, in logarithms, is
  compared with the same figure of the G held-out groups by a Student prediction interval (G - 1
  degrees of freedom). Dependence between neighbouring samples raises the groups' figures as it
  raises the device's, so it needs no model of its own.
- **confidence**: by how much it lies below the reference (Cliff's delta), compared with the
  groups' in the same way, one-sided: a model that grows surer is no alarm.
- **accuracy_loss**: the share of right answers among late labels, compared with the groups'
  under their over-dispersion (the moments of a beta-binomial).

The p-values speak of which member was drawn, which happens once: looking at a device again
after more windows adds no new draw, only less noise. :func:`judge_fleet` controls the share of
false discoveries in two families: the accuracy of all devices (independent people:
Benjamini–Hochberg), and device × feature (dependent: Benjamini–Yekutieli). An alarm opens after
``confirm_windows`` judgements in a row and ends after ``clear_windows``.

Covariate shift is not accuracy loss; a verdict says which of the two was seen, and names the
features that are most unlike the reference in either case.

Sources: Student prediction interval: Hahn, Meeker, "Statistical Intervals" (1991) ch. 4;
beta-binomial moments: Kleinman, JASA 68 (1973); false discoveries: Benjamini, Hochberg, JRSS B 57
(1995) and, under dependence, Benjamini, Yekutieli, Annals of Statistics 29 (2001).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from . import statistics
from .errors import ProfileError
from .profile import ReferenceProfile

CONFIDENCE: Final = "confidence"
ACCURACY: Final = "accuracy"
PSI_FLOOR: Final = 1e-3  # logarithms of distances below this are noise


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftConfig:
    """When a device is called unlike the others."""

    windows_min: int = 4
    """Telemetry windows before a device is judged."""
    block_windows: int = 12
    """Windows that a judgement looks back on."""
    discoveries_false_max: float = 0.2
    """Expected share of false ones among the findings of one look at the fleet."""
    psi_min: float = 0.1
    """Distances below this are too small to matter, whatever their p-value."""
    confidence_loss_min: float = 0.1
    """Lowerings of the confidence below this (Cliff's delta) are too small to matter."""
    accuracy_loss_min: float = 0.03
    """Losses below this share are too small to matter."""
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
        if self.psi_min < 0 or min(self.confirm_windows, self.clear_windows) < 1:
            raise ValueError("psi_min must be at least 0, confirm and clear windows at least 1")


@dataclass(frozen=True, slots=True)
class Finding:
    """The evidence about one feature (or the accuracy) of one device."""

    feature: str
    p_value: float
    """Of the null in the module head, 0 to 1."""
    effect: float
    """Debiased PSI; for the confidence, Cliff's delta below the reference; for the accuracy, the
    loss as a share."""
    normal: float
    """The same figure of a typical group; for the accuracy, the expected share itself."""
    direction: float
    """-1 lower … +1 higher than the reference; 0 for the accuracy."""


@dataclass(slots=True)
class DeviceState:
    """What was folded of one device and model. ``to_dict`` is what the server keeps."""

    windows: int = 0
    blocks: list[list[list[int]]] = field(default_factory=list)
    """Counts of the last windows, K x F x B."""
    labelled: int = 0
    correct: int = 0
    recent: list[tuple[int, int]] = field(default_factory=list)
    """(labelled, correct) of the last label records."""
    streak: int = 0
    """Judgements in a row with a finding; negative: without."""
    open: bool = False
    opened_windows: int = 0
    """Telemetry windows seen when the alarm opened."""

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "windows": self.windows,
            "blocks": self.blocks,
            "labelled": self.labelled,
            "correct": self.correct,
            "recent": [list(pair) for pair in self.recent],
            "streak": self.streak,
            "open": self.open,
            "opened_windows": self.opened_windows,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DeviceState:
        """Return the state that :meth:`to_dict` wrote; {} is a new one."""
        state = cls(**{key: raw[key] for key in raw if key != "recent"})
        state.recent = [(int(a), int(b)) for a, b in raw.get("recent", [])]
        return state

    def fold(self, counts: Sequence[Sequence[int]], *, config: DriftConfig) -> None:
        """Add one telemetry window.

        Args:
            counts: Counts of each feature of the profile in its order, F x B.
            config: How far back to look.
        """
        self.windows += 1
        self.blocks = [*self.blocks, [list(row) for row in counts]][-config.block_windows :]

    def label(self, labelled: int, correct: int, *, config: DriftConfig) -> None:
        """Add late labels: how many came, and how many of their predictions were right."""
        self.labelled += labelled
        self.correct += correct
        # Each window brings at most one record for each of three splits.
        self.recent = [*self.recent, (labelled, correct)][-3 * config.block_windows :]


def findings(
    state: DeviceState, profile: ReferenceProfile, *, config: DriftConfig
) -> list[Finding]:
    """Return the evidence about every feature and the accuracy; empty before ``windows_min``.

    Raises:
        ProfileError: The folded counts do not have the profile's bins.
    """
    if state.windows < config.windows_min:
        return []
    found = []
    for i, feature in enumerate(profile.features):
        rows = [block[i] for block in state.blocks if i < len(block)]
        if len(rows) != len(state.blocks) or any(len(r) != len(feature.counts) for r in rows):
            raise ProfileError(f"counts of {feature.name} do not have the profile's bins")
        observed = np.sum(rows, axis=0)
        lean = statistics.direction(feature.counts, observed)
        if feature.name == CONFIDENCE:
            effect = -lean
            others = [-statistics.direction(feature.counts, row) for row in feature.groups]
            p_value, normal = _prediction(effect, others)
        else:
            effect = statistics.psi(feature.counts, observed)
            others = [statistics.psi(feature.counts, row) for row in feature.groups]
            p_value, normal = _prediction(
                math.log(max(effect, PSI_FLOOR)), np.log(np.maximum(others, PSI_FLOOR)).tolist()
            )
            normal = math.exp(normal)
        found.append(Finding(feature.name, p_value, effect, normal, lean))
    labelled = sum(pair[0] for pair in state.recent)
    if labelled:
        correct = sum(pair[1] for pair in state.recent)
        p_value, expected = _accuracy(labelled, correct, profile)
        found.append(Finding(ACCURACY, p_value, expected - correct / labelled, expected, 0.0))
    return found


def judge_fleet(
    fleet: Mapping[str, Sequence[Finding]], *, config: DriftConfig
) -> dict[str, list[Finding]]:
    """Return the findings of each device that stand, strongest first.

    Args:
        fleet: Findings by device.
        config: Share of false discoveries and smallest effects.

    Returns:
        For each device of ``fleet``, those of its findings that are discoveries at the expected
        false share over the whole fleet, and large enough to matter.
    """
    kept: dict[str, list[Finding]] = {device: [] for device in fleet}
    for family in (True, False):
        flat = [
            (device, finding)
            for device, found in fleet.items()
            for finding in found
            if (finding.feature == ACCURACY) is family
        ]
        for device, finding in _discoveries(flat, dependent=not family, config=config):
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
    features = [f for f in found if f.feature != ACCURACY and f.effect > f.normal]
    return sorted(features, key=lambda f: (f.p_value, -f.effect))[:most]


def _discoveries(
    flat: Sequence[tuple[str, Finding]], *, dependent: bool, config: DriftConfig
) -> list[tuple[str, Finding]]:
    ranked = sorted(flat, key=lambda item: item[1].p_value)
    total = len(ranked)
    penalty = sum(1 / i for i in range(1, total + 1)) if dependent else 1.0
    passed = 0
    for rank, (_, finding) in enumerate(ranked, start=1):
        if finding.p_value <= rank * config.discoveries_false_max / (total * penalty):
            passed = rank
    return ranked[:passed]


def _effect_min(finding: Finding, config: DriftConfig) -> float:
    if finding.feature == ACCURACY:
        return config.accuracy_loss_min
    return config.confidence_loss_min if finding.feature == CONFIDENCE else config.psi_min


def settle(state: DeviceState, kept: Sequence[Finding], *, config: DriftConfig) -> None:
    """Open or end the device's alarm after one judgement."""
    if kept:
        state.streak = max(0, state.streak) + 1
        if not state.open and state.streak >= config.confirm_windows:
            state.open, state.opened_windows = True, state.windows
    else:
        state.streak = min(0, state.streak) - 1
        if state.open and -state.streak >= config.clear_windows:
            state.open = False


def kind(kept: Sequence[Finding]) -> str:
    """Return the alert kind of a device's findings: what hurts most names it."""
    names = {finding.feature for finding in kept}
    if ACCURACY in names:
        return "accuracy_loss"
    return "confidence_drift" if names == {CONFIDENCE} else "covariate_drift"


def sentence(device: str, kept: Sequence[Finding], found: Sequence[Finding]) -> str:
    """Return what was found in one plain sentence for an operator.

    Args:
        device: Its id.
        kept: Its findings that stand.
        found: All its findings, for the features that are most unlike.
    """
    if not kept:
        return f"{device}: like the reference"
    parts = []
    for finding in kept:
        if finding.feature == ACCURACY:
            parts.append(
                f"accuracy {finding.normal - finding.effect:.0%}, {100 * finding.effect:.0f} "
                f"points below the expected {finding.normal:.0%}"
            )
    shown = {finding.feature: finding for finding in (*kept, *unlike(found))}
    shown.pop(ACCURACY, None)
    features = [_feature_text(finding) for finding in shown.values()]
    if features:
        parts.append(("most unlike: " if parts else "drifts in ") + ", ".join(features))
    return f"{device}: {'; '.join(parts)}"


def _feature_text(finding: Finding) -> str:
    if finding.feature == CONFIDENCE:
        return f"confidence lower ({-finding.effect:+.2f})"
    way = "higher" if finding.direction > 0.1 else "lower" if finding.direction < -0.1 else "wider"
    return f"{finding.feature} {way} (PSI {finding.effect:.2f}, usual {finding.normal:.2f})"


def _prediction(value: float, others: Sequence[float]) -> tuple[float, float]:
    """Return (one-sided p-value, mean of the others) of a value among exchangeable ones."""
    if len(others) < 3:  # two groups say nothing about a spread: the smallest effect decides
        mean = float(np.mean(others)) if len(others) else 0.0
        return (0.0 if value > mean else 1.0), mean
    mean = float(np.mean(others))
    spread = max(float(np.std(others, ddof=1)), 1e-2) * math.sqrt(1 + 1 / len(others))
    return _student_above((value - mean) / spread, len(others) - 1), mean


def _accuracy(labelled: int, correct: int, profile: ReferenceProfile) -> tuple[float, float]:
    """Return (one-sided p-value, expected share) of a number of right answers."""
    sizes = np.array([n for n in profile.labelled if n], np.float64)
    rights = np.array(
        [c for n, c in zip(profile.labelled, profile.correct, strict=True) if n], np.float64
    )
    if not len(sizes):
        return 1.0, 0.0
    # Jeffreys' prior keeps a group without an error from meaning that errors are impossible.
    expected = float((rights.sum() + 0.5) / (sizes.sum() + 1))
    shares = rights / sizes
    between = float(shares.var(ddof=1)) if len(sizes) > 1 else 0.0
    within = float((expected * (1 - expected) / sizes).mean())
    spread = max(between - within, 0.0)
    # Neighbouring windows show one movement: about one in three is independent evidence.
    variance = spread * (1 + 1 / len(sizes)) + 3 * expected * (1 - expected) / labelled
    t = (expected - correct / labelled) / math.sqrt(variance)
    return _student_above(t, max(1, len(sizes) - 1)), expected


def _student_above(t: float, freedom: int) -> float:
    """Return P(T > t) for Student's distribution, by its incomplete beta integral.

    Source: Abramowitz, Stegun 26.7.3 (odd) and 26.7.4 (even degrees of freedom), exact sums.
    """
    theta = math.atan(t / math.sqrt(freedom))
    sin, cos = math.sin(theta), math.cos(theta)
    if freedom % 2:
        term, total = cos, (cos if freedom > 1 else 0.0)
        for k in range(3, freedom - 1, 2):
            term *= cos * cos * (k - 1) / k
            total += term
        middle = 2 / math.pi * (theta + sin * total)
    else:
        term = total = 1.0
        for k in range(2, freedom - 1, 2):
            term *= cos * cos * (k - 1) / k
            total += term
        middle = sin * total
    return min(1.0, max(0.0, (1 - middle) / 2))
