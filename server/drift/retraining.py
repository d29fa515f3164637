"""Decide whether a model is trained again. Pure.

    losses, comparisons, labels, past runs --decide--> nothing | propose | start

A shift of the inputs alone never retrains: on real streams it fires long before the accuracy
moves, if it ever does, and a model taught for nothing is a risk for nothing. Two things do:

- an **accuracy loss that labels tell of** (not a suspected one), which is an e-process's alarm and
  has stood through its confirmations: see ``detectors.py``;
- a **challenger's win**: on the same windows, the candidate is right where the champion is wrong
  more often than the other way round. Null: of the windows on which exactly one of the two is
  right, each is as likely to be the one. One-sided exact McNemar (sign) test at ``level``. Where
  only the two sums are known and not the pairs, the pairs that fit them and speak least for the
  candidate are taken, so the test can only err on the safe side. Windows count as independent;
  those of one device are not quite, hence a level of 0.001.

Both are held back by a cool-down, a budget per week and a minimum of new labels: a loop that
retrains itself must be slower than the labels that would tell that it was wrong. What waits for an
operator is proposed once: again for another alert or another challenger, or when an alert that was
resolved is followed by a new one.

Sources: McNemar, Psychometrika 12 (1947); exact form: Mosteller, Biometrics 8 (1952).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

WEEK_MS: Final = 7 * 86_400_000
MODES: Final = ("off", "manual", "automatic")
ROADS: Final = ("rounds", "training")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainingConfig:
    """The policy."""

    mode: str = "manual"
    """off: never looked at; manual: proposed, and an operator starts it; automatic: started."""
    road: str = "rounds"
    """rounds: the devices learn on their own labels; training: the newest data set of the model's
    name is trained on again, centrally."""
    cooldown_s: int = 86_400
    """Shortest time between two runs or proposals of one model, s."""
    per_week_max: int = 2
    """Runs or proposals of one model within seven days."""
    labels_min: int = 500
    """Labels of the model that must have come since the last run, or since it was made."""
    level: float = 0.001
    """A challenger wins with a p-value of at most this, in (0, 1)."""
    windows_min: int = 100
    """Windows of a comparison that counts."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.mode not in MODES or self.road not in ROADS:
            raise ValueError(f"mode must be one of {MODES}, road one of {ROADS}")
        if self.cooldown_s < 0 or self.labels_min < 0:
            raise ValueError("cooldown_s and labels_min must be at least 0")
        if self.per_week_max < 1 or self.windows_min < 1 or not 0 < self.level < 1:
            raise ValueError("per_week_max, windows_min must be at least 1, level in (0, 1)")


@dataclass(frozen=True, slots=True)
class Loss:
    """One live accuracy loss of the model."""

    where: str
    """For people: ``the fleet``, ``site north``, ``wrist-03``."""
    suspected: bool
    """No label says so."""
    key: str = ""
    """Of the alert, see :attr:`Facts.proposed`."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Champion and candidate on the same windows of the same devices."""

    evaluation_id: str
    candidate_sha256: str
    windows: int
    champion_correct: int
    candidate_correct: int
    pairs: tuple[int, int] | None = None
    """(windows that only the candidate, only the champion answered right), if it is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of one model at one time."""

    losses: Sequence[Loss] = ()
    comparisons: Sequence[Comparison] = ()
    labels_new: int = 0
    """Labels since the last run, or since the model was made."""
    runs_ms: Sequence[int] = ()
    """When runs were decided or proposed, Unix ms."""
    proposed: Collection[str] = ()
    """``Decision.asked_by`` of all proposals of the model."""
    busy: bool = False
    """A run of the model is going on."""


class Action(StrEnum):
    """What follows."""

    NOTHING = "nothing"
    PROPOSE = "propose"
    START = "start"


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows, and why; for the audit log."""

    action: Action
    trigger: str
    """accuracy_loss, challenger_win, or "" = nothing asked for it."""
    reasons: tuple[str, ...]
    """Sentences: what asked for it, then what held it back."""
    asked_by: tuple[str, ...] = ()
    """Alerts or the evaluation that asked for it."""


def decide(facts: Facts, *, now_ms: int, config: RetrainingConfig) -> Decision:
    """Return whether to retrain.

    Args:
        facts: Of the model.
        now_ms: Unix ms.
        config: The policy.
    """
    if config.mode == "off":
        return Decision(Action.NOTHING, "", ("the policy is off",))
    trigger, asked, keys = _trigger(facts, config)
    if not trigger:
        return Decision(Action.NOTHING, "", asked)
    held = _held(facts, now_ms, config)
    if config.mode == "manual" and set(keys) <= set(facts.proposed):
        held = ("it was proposed already: an operator starts it", *held)
    if held:
        return Decision(Action.NOTHING, trigger, (*asked, *held), keys)
    action = Action.START if config.mode == "automatic" else Action.PROPOSE
    return Decision(action, trigger, asked, keys)


def mcnemar(wins: int, losses: int) -> float:
    """Return the one-sided exact p-value of "the candidate wins", P(Bin(n, 1/2) >= wins).

    Args:
        wins: Windows that only the candidate answered right, at least 0.
        losses: Windows that only the champion answered right, at least 0.

    >>> mcnemar(8, 1)
    0.01953125
    """
    n = wins + losses
    whole = n * math.log(2)
    terms = (
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - whole)
        for k in range(wins, n + 1)
    )
    return min(1.0, round(math.fsum(terms), 15))


def least_favourable(windows: int, champion: int, candidate: int) -> tuple[int, int]:
    """Return the (wins, losses) that fit two sums and speak least for the candidate.

    The difference of the two is known, ``candidate - champion``; the more windows they disagree
    on, the less it says. They disagree on at most so many as both sums leave room for.

    Args:
        windows: Of the comparison.
        champion: Windows that the champion answered right, 0 to ``windows``.
        candidate: The same of the candidate.

    >>> least_favourable(100, 60, 75)
    (40, 25)
    """
    wins = min(candidate, windows - champion)
    return wins, wins - (candidate - champion)


def _trigger(
    facts: Facts, config: RetrainingConfig
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Return (trigger, what asks for a run in words, its keys)."""
    told = [loss.where for loss in facts.losses if not loss.suspected]
    if told:
        more = f" and {len(told) - 3} more" if len(told) > 3 else ""
        said = f"labels tell of lost accuracy: {', '.join(told[:3])}{more}"
        keys = tuple(loss.key for loss in facts.losses if not loss.suspected)
        return "accuracy_loss", (said,), keys
    for each in facts.comparisons:
        if each.windows < config.windows_min:
            continue
        wins, losses = each.pairs or least_favourable(
            each.windows, each.champion_correct, each.candidate_correct
        )
        p_value = mcnemar(wins, losses) if wins > losses else 1.0
        if p_value <= config.level:
            said = (
                f"the challenger {each.candidate_sha256:.12} answered {each.candidate_correct} of "
                f"{each.windows} windows right, the champion {each.champion_correct} "
                f"(by chance: {p_value:.1g}; evaluation {each.evaluation_id:.12})"
            )
            return "challenger_win", (said,), (f"evaluation {each.evaluation_id}",)
    if facts.losses:
        return "", ("an accuracy loss is suspected, but no label says so: collect labels",), ()
    return "", ("no label tells of a loss, and no challenger has won",), ()


def _held(facts: Facts, now_ms: int, config: RetrainingConfig) -> tuple[str, ...]:
    held = []
    if facts.busy:
        held.append("a run of this model is going on")
    last_ms = max(facts.runs_ms, default=None)
    if last_ms is not None and now_ms - last_ms < 1000 * config.cooldown_s:
        left_s = config.cooldown_s - (now_ms - last_ms) // 1000
        left = f"{left_s} s" if left_s < 7200 else f"{left_s / 3600:.0f} hours"
        held.append(f"the cool-down lasts {left} more")
    recent = sum(now_ms - at < WEEK_MS for at in facts.runs_ms)
    if recent >= config.per_week_max:
        held.append(f"{recent} runs within seven days, the budget is {config.per_week_max}")
    if facts.labels_new < config.labels_min:
        held.append(f"{facts.labels_new} new labels, {config.labels_min} are needed")
    return tuple(held)
