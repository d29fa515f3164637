"""Judge a wave: did its devices come through, and is the new model no worse than the old?

A bad model installs perfectly, so that installs succeed is only the first check:

    failures    (failed + silent) / devices of the wave             over the limit -> FAIL
    errors      share of predictions that failed, now - before      risen by more than the limit?
    latency     share of calls above factor x the old p99           above 1 % for sure?
    accuracy    share of right late labels, now - before            fallen by more than the limit?

Each comparison gives an interval, and a verdict: FAIL or PASS when the interval lies wholly on
one side of the limit, else INSUFFICIENT: wait for more windows. The wave fails if one check does,
and passes only when none is insufficient. ``before`` is the same device with the model before;
devices that ran none are compared with the devices that wait for a later wave (control).

The wave is looked at again and again while it bakes, so fixed-sample intervals would err more
often than they say. Here is a confidence sequence: for a share p with s hits in n,

    { p : B(s + 1/2, n - s + 1/2) / B(1/2, 1/2)  <  p^s (1 - p)^(n-s) / alpha }

covers p at all n at once with probability 1 - alpha (mixture martingale: Robbins, Ann. Math.
Stat. 41, 1970; Howard, Ramdas, McAuliffe, Sekhon, Ann. Stat. 49, 2021). Hits come in clusters,
windows of one device in one situation, so counts are first divided by the design effect (Rao,
Scott, Biometrics 48, 1992). Differences of two shares by square-and-add of the two intervals
(Newcombe, Stat. Med. 17, 1998; Zou, Donner, Stat. Med. 27, 2008). With effective counts and
square-and-add the error probability is nearly, not exactly, what alpha says.

Nothing here reads a database or a clock: that is ``evidence.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from statistics import NormalDist
from typing import Any, Final, NamedTuple

from ...proto import latency
from .config import GateConfig
from .states import DeviceState

TAIL: Final = 0.01  # the share of calls above the 99th percentile
TAIL_MAX: Final = 0.05  # and what must be excluded for a PASS: 240 good calls do


class Verdict(StrEnum):
    """What a check or a wave came to."""

    PASS = "PASS"
    FAIL = "FAIL"
    INSUFFICIENT = "INSUFFICIENT"
    UNMEASURED = "UNMEASURED"
    """There is nothing to compare with, and waiting brings nothing: the check does not count."""


class Cluster(NamedTuple):
    """Counts that came together: a telemetry window, or one record of late labels."""

    trials: int
    hits: int


@dataclass(slots=True)
class Seen:
    """What one device showed with one model."""

    windows: list[Cluster] = field(default_factory=list)
    """(predictions, errors) of each telemetry window."""
    labels: list[Cluster] = field(default_factory=list)
    """(labelled, right) of each record of late labels, held-out splits only."""
    latency_us: list[int] = field(default_factory=lambda: [0] * latency.BINS)
    """Merged latency histogram, the bins of shoal.proto.latency."""


@dataclass(frozen=True, slots=True)
class Observed:
    """The evidence of a wave."""

    now: Mapping[int, Seen]
    """By device of the wave: with the new model, since its offer."""
    before: Mapping[int, Seen]
    """By device of the wave: with the model before."""
    control: Seen
    """Devices of later waves, meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check, with the numbers that it rests on."""

    name: str
    verdict: Verdict
    text: str
    """A sentence for people."""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    now: float | None = None
    before: float | None = None
    trials_now: int = 0
    trials_before: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """A share, and how many independent trials it is worth."""

    value: float
    trials: float
    """Effective number: the real one divided by the design effect."""
    counted: int
    """The real number."""


def judge(
    counts: Mapping[str, int], observed: Observed | None, config: GateConfig
) -> dict[str, Any]:
    """Return the evidence entry of a wave.

    Args:
        counts: Devices of the wave by state.
        observed: The evidence for the comparisons; None = the rollout asked for none.
        config: The limits.

    Returns:
        ``{"verdict", "reasons": [sentence], "counts", "checks": [Check as a map]}``.
    """
    checks = [failures(counts, config)]
    if observed is not None:
        checks += [errors(observed, config), slowness(observed, config), accuracy(observed, config)]
    verdicts = {check.verdict for check in checks}
    worst = next((v for v in (Verdict.FAIL, Verdict.INSUFFICIENT) if v in verdicts), Verdict.PASS)
    return {
        "verdict": str(worst),
        "reasons": [check.text for check in checks],
        "counts": {str(state): counts.get(state, 0) for state in DeviceState},
        "checks": [_plain(check) for check in checks],
    }


def failures(counts: Mapping[str, int], config: GateConfig) -> Check:
    """Return the check of the wave's own denominators; devices taken over do not count."""
    total = sum(counts.values()) - counts.get(DeviceState.SUPERSEDED, 0)
    failed = counts.get(DeviceState.FAILED, 0)
    silent = counts.get(DeviceState.SILENT, 0)
    value = (failed + silent) / total if total else 0.0
    low, high = wilson(failed + silent, total, config.alpha)
    return Check(
        name="failures",
        verdict=Verdict.FAIL if value > config.failures_max_share else Verdict.PASS,
        text=f"{failed} failed and {silent} fell silent of {total} devices; "
        f"{config.failures_max_share:.0%} may",
        value=value,
        low=low,
        high=high,
        limit=config.failures_max_share,
        trials_now=total,
    )


def errors(observed: Observed, config: GateConfig) -> Check:
    """Return the check of predictions that failed."""
    return _compare(
        "errors",
        observed,
        lambda seen: seen.windows,
        worse=+1,
        limit=config.errors_rise_max,
        alpha=config.alpha,
        noun="failed predictions",
    )


def accuracy(observed: Observed, config: GateConfig) -> Check:
    """Return the check of late labels."""
    return _compare(
        "accuracy",
        observed,
        lambda seen: seen.labels,
        worse=-1,
        limit=config.accuracy_drop_max,
        alpha=config.alpha,
        noun="right answers",
    )


def slowness(observed: Observed, config: GateConfig) -> Check:
    """Return the check of latency.

    The old 99th percentile is the slower one of the same devices before and of the control
    meanwhile: a hot day or a busy neighbour is not the model's fault.
    """
    now = _merged([seen.latency_us for seen in observed.now.values()])
    old = [
        latency.quantile_us(counts, 1 - TAIL)
        for counts in (
            _merged([seen.latency_us for seen in observed.before.values()]),
            observed.control.latency_us,
        )
        if sum(counts)
    ]
    trials = sum(now)
    if not old:
        text = "latency has nothing to be compared with"
        return Check(name="latency", verdict=Verdict.UNMEASURED, text=text, trials_now=trials)
    steps = math.ceil(3 * math.log2(config.latency_factor_max) - 1e-9)
    first = min(latency.bin_of(max(old)) + steps, latency.BINS - 1)
    slow = sum(now[first:])
    low, high = interval(slow, trials, config.alpha)
    verdict = _side(low, high, TAIL, TAIL_MAX)
    bound_us = latency.EDGES_US[first - 1]
    return Check(
        name="latency",
        verdict=verdict,
        text=f"{slow} of {trials} calls took longer than {bound_us / 1000:.3g} ms, "
        f"{config.latency_factor_max:g} times the old 99th percentile",
        value=slow / trials if trials else None,
        low=low,
        high=high,
        limit=TAIL,
        now=latency.quantile_us(now, 1 - TAIL),
        before=max(old),
        trials_now=trials,
    )


def interval(hits: float, trials: float, alpha: float) -> tuple[float, float]:
    """Return the confidence sequence of a share at this number of trials.

    Args:
        hits: 0 <= hits <= trials; need not be whole.
        trials: Number of trials, >= 0.
        alpha: Probability that the sequence ever misses, 0 < alpha < 1.

    Returns:
        (low, high), 0 <= low <= hits / trials <= high <= 1; (0, 1) without trials.
    """
    if trials <= 0:
        return 0.0, 1.0
    misses = trials - hits
    mixture = _log_beta(hits + 0.5, misses + 0.5) - _log_beta(0.5, 0.5)

    def outside(p: float) -> bool:
        likelihood = (hits * math.log(p) if hits else 0.0) + (
            misses * math.log1p(-p) if misses else 0.0
        )
        return mixture - likelihood >= -math.log(alpha)

    mode = hits / trials
    return _edge(outside, 0.0, mode), _edge(outside, 1.0, mode)


def wilson(hits: float, trials: float, alpha: float) -> tuple[float, float]:
    """Return Wilson's interval (JASA 22, 1927) of a share that is looked at once.

    Args and result are those of :func:`interval`.
    """
    if trials <= 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(1 - alpha / 2)
    share, spread = hits / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def pooled(strata: Sequence[tuple[float, Sequence[Cluster]]]) -> Share:
    """Return the weighted mean of shares.

    Args:
        strata: (weight, clusters) of each device; weights are > 0 and sum to 1; each device has
            at least one trial.

    Its variance in each stratum is the larger one of the binomial's and of the spread between
    clusters; the effective number of trials is what a plain share of that variance would have.
    """
    value = variance = smoothed = 0.0
    counted = 0
    for weight, clusters in strata:
        trials = sum(cluster.trials for cluster in clusters)
        share = sum(cluster.hits for cluster in clusters) / trials
        # Smoothed, so that 0 of 5 hits is not taken for a share without variance.
        gentle = (share * trials + 0.5) / (trials + 1)
        plain = gentle * (1 - gentle) / trials
        count = len(clusters)
        spread = 0.0
        if count > 1:
            squares = sum((cluster.hits - share * cluster.trials) ** 2 for cluster in clusters)
            spread = squares / trials**2 * count / (count - 1)
        value += weight * share
        smoothed += weight * gentle
        variance += weight**2 * max(plain, spread)
        counted += trials
    return Share(value, min(float(counted), smoothed * (1 - smoothed) / variance), counted)


def _compare(
    name: str,
    observed: Observed,
    pick: Callable[[Seen], list[Cluster]],
    *,
    worse: int,
    limit: float,
    alpha: float,
    noun: str,
) -> Check:
    """Compare a share now with before, device by device; ``worse`` is the sign of a worsening."""
    now = {device: _filled(pick(seen)) for device, seen in observed.now.items()}
    before = {device: _filled(pick(seen)) for device, seen in observed.before.items()}
    control = _filled(pick(observed.control))
    based = {
        device: before.get(device) or control for device in now if before.get(device) or control
    }
    if not based:
        text = f"{noun} have nothing to be compared with"
        return Check(name=name, verdict=Verdict.UNMEASURED, text=text)
    trials = {device: sum(each.trials for each in now[device]) for device in based}
    total = sum(trials.values())
    if not total:
        text = f"no {noun} are counted yet with the new model"
        return Check(name=name, verdict=Verdict.INSUFFICIENT, text=text, limit=limit)
    weights = {device: count / total for device, count in trials.items() if count}
    new = pooled([(weight, now[device]) for device, weight in weights.items()])
    # Devices that share the control as their base are one stratum of it, not many.
    own = [(weight, before[device]) for device, weight in weights.items() if before.get(device)]
    shared = 1.0 - sum(weight for weight, _ in own)
    old = pooled([*own, (shared, control)] if control and shared > 1e-9 else own)
    change = new.value - old.value
    new_low, new_high = interval(new.value * new.trials, new.trials, alpha)
    # What was before stands still while the wave bakes: one look. The control goes on.
    once = interval if control and shared > 1e-9 else wilson
    old_low, old_high = once(old.value * old.trials, old.trials, alpha)
    low = change - math.hypot(new.value - new_low, old_high - old.value)
    high = change + math.hypot(new_high - new.value, old.value - old_low)
    rise_low, rise_high = (low, high) if worse > 0 else (-high, -low)
    return Check(
        name=name,
        verdict=_side(rise_low, rise_high, limit, limit),
        text=f"{old.value:.1%} {noun} before, {new.value:.1%} now: {100 * change:+.1f} points "
        f"({100 * low:+.1f} to {100 * high:+.1f}) of {new.counted} now and {old.counted} before",
        value=change,
        low=low,
        high=high,
        limit=worse * limit,
        now=new.value,
        before=old.value,
        trials_now=new.counted,
        trials_before=old.counted,
    )


def _side(low: float, high: float, fail_above: float, pass_below: float) -> Verdict:
    if low > fail_above:
        return Verdict.FAIL
    return Verdict.PASS if high < pass_below else Verdict.INSUFFICIENT


def _filled(clusters: Sequence[Cluster]) -> list[Cluster]:
    return [cluster for cluster in clusters if cluster.trials]


def _merged(histograms: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*histograms, strict=True)] or [0] * latency.BINS


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _edge(outside: Callable[[float], bool], far: float, near: float) -> float:
    """Bisect for the border between ``near``, which is inside, and ``far``."""
    if near == far:
        return far
    for _ in range(60):
        middle = (far + near) / 2
        if middle in (far, near):
            break
        far, near = (middle, near) if outside(middle) else (far, middle)
    return far


def _plain(check: Check) -> dict[str, Any]:
    found = asdict(check)
    for name, value in found.items():
        if isinstance(value, float):
            found[name] = round(value, 6)
    found["verdict"] = str(check.verdict)
    return found
