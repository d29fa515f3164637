"""Follow a model's confidence and accuracy on a device; evidence beside verdicts. Pure.

    mean confidence of a window --------+--> Page–Hinkley: has it fallen since the first windows?
    share of right answers of a record -+--> ADWIN: since when is it as it is?
    predicted class x confidence decile ---> expected accuracy of the last windows, without labels

**Nothing here raises an alert.** A verdict that stands for other reasons shows these lines, so that
its reader sees when the score changed and what the answers lead one to expect. Nulls, error control
and sources are those of :mod:`.changes` (one stream each; over a fleet of many devices some lines
are false) and of :func:`.performance.expected_accuracy`, which no change of the world's meaning is
seen by.

The state is bounded: two numbers for each baseline window, then nine for a test, ADWIN's histogram
(at most 200 buckets, by the logarithm of the windows), and one table of scores that forgets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from .changes import Adwin, AdwinConfig, PageHinkley, PageHinkleyConfig
from .performance import DECILES, expected_accuracy
from .profile import ReferenceProfile

CONFIDENCE: Final = "confidence"
ACCURACY: Final = "accuracy"
SCORES: Final = (CONFIDENCE, ACCURACY)
CLASSES_MAX: Final = 256  # of a table that is kept: 20 KiB; a model of more has no estimate
LEAST: Final = 1e-3  # of a cell: what is forgotten so far is nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig:
    """How scores are followed."""

    baseline_windows: int = 20
    """Windows that say what is usual, 3 to 1000."""
    memory_windows: int = 12
    """Windows after which a table of scores has lost two thirds of its weight, 1 to 1000."""
    answers_min: int = 400
    """Answers that an estimate without labels needs."""
    page_hinkley: PageHinkleyConfig = field(default_factory=PageHinkleyConfig)
    """When a score has risen or fallen."""
    adwin: AdwinConfig = field(default_factory=AdwinConfig)
    """When the past is cut off."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 3 <= self.baseline_windows <= 1000 or not 1 <= self.memory_windows <= 1000:
            raise ValueError("baseline_windows must be 3 to 1000, memory_windows 1 to 1000")
        if self.answers_min < 1:
            raise ValueError("answers_min must be at least 1")


@dataclass(slots=True)
class Score:
    """One score of one device."""

    windows: int = 0
    """Windows that told of it."""
    baseline: list[tuple[float, float]] = field(default_factory=list)
    """(sum, count) of the first windows, until the test is made of them."""
    test: PageHinkley | None = None
    moved: int = 0
    """-1 it has fallen, +1 risen, 0 neither …"""
    moved_window: int = 0
    """… said first at this window."""
    adwin: Adwin = field(default_factory=Adwin)
    cut: tuple[int, float] | None = None
    """Last cut: (first window of what is kept, mean before it)."""

    def add(self, total: float, count: float, config: ScoreConfig) -> None:
        """Add one window's sum of values in [0, 1]."""
        self.windows += 1
        cut = self.adwin.add(total, count, config=config.adwin)
        if cut is not None:
            self.cut = (self.windows - self.adwin.windows + 1, cut[0])
        if self.test is None:
            self.baseline.append((total, count))
            if len(self.baseline) >= config.baseline_windows:
                sums, counts = zip(*self.baseline, strict=True)
                self.test, self.baseline = PageHinkley.baseline([sums], [counts]), []
            return
        moved = int(self.test.fold([total], [count], config=config.page_hinkley)[0])
        if moved != self.moved:
            self.moved, self.moved_window = moved, self.windows if moved else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "windows": self.windows,
            "baseline": [list(each) for each in self.baseline],
            "test": self.test.to_dict() if self.test is not None else None,
            "moved": [self.moved, self.moved_window],
            "adwin": self.adwin.to_dict(),
            "cut": list(self.cut) if self.cut is not None else None,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Score:
        """Return the state that :meth:`to_dict` wrote.

        Raises:
            ValueError, KeyError, TypeError: It is damaged.
        """
        moved, at = map(int, raw["moved"])
        cut = raw["cut"]
        return cls(
            int(raw["windows"]),
            [(float(total), float(count)) for total, count in raw["baseline"]],
            PageHinkley.from_dict(raw["test"]) if raw["test"] is not None else None,
            moved,
            at,
            Adwin.from_dict(raw["adwin"]),
            (int(cut[0]), float(cut[1])) if cut is not None else None,
        )


@dataclass(slots=True)
class ScoreState:
    """The scores of one device and model. ``to_dict`` is what the server keeps."""

    scores: dict[str, Score] = field(default_factory=dict)
    """By name, see ``SCORES``."""
    table: list[float] = field(default_factory=list)
    """Answers by predicted class x confidence decile, old ones fading."""

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "scores": {name: each.to_dict() for name, each in self.scores.items()},
            "table": self.table,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ScoreState:
        """Return the state that :meth:`to_dict` wrote; a new one if there is none, or a broken."""
        try:
            table = [float(each) for each in raw.get("table", [])]
            parts = {name: Score.from_dict(raw["scores"][name]) for name in raw.get("scores", {})}
        except (KeyError, TypeError, ValueError, AttributeError):
            return cls()
        return cls(parts, table if all(map(math.isfinite, table)) else [])

    def score(self, name: str, total: float, count: float, *, config: ScoreConfig) -> None:
        """Add a window's sum of a score.

        Args:
            name: One of ``SCORES``.
            total: Sum of values, each 0 to 1.
            count: How many; what is not finite or out of range, or 0, is left out.
            config: How scores are followed.
        """
        if math.isfinite(total) and count > 0 and -1e-6 <= total / count <= 1 + 1e-6:
            kept = min(max(total, 0.0), count)
            self.scores.setdefault(name, Score()).add(kept, count, config)

    def answers(self, table: Any, classes: int, *, config: ScoreConfig) -> None:
        """Add a window's answers.

        Args:
            table: Counts as WINDOW carries them, flat; what does not fit ``classes`` is left out.
            classes: Of the reference's confidence profile.
            config: How scores are followed.
        """
        size = classes * DECILES
        fits = isinstance(table, list) and len(table) == size and classes <= CLASSES_MAX
        if not fits or not all(type(each) is int and 0 <= each < 1 << 40 for each in table):
            return
        before = self.table if len(self.table) == size else [0.0] * size
        fade = math.exp(-1 / config.memory_windows)
        faded = [round(fade * old + new, 3) for old, new in zip(before, table, strict=True)]
        self.table = [each if each >= LEAST else 0.0 for each in faded]


def lines(
    state: ScoreState, profile: ReferenceProfile, *, config: ScoreConfig
) -> list[dict[str, Any]]:
    """Return what the scores of a device tell, as evidence: JSON with one plain sentence each.

    Returns:
        ``{score, detector, text, ...}``: ``page_hinkley`` (an alarm that stands), ``adwin`` (the
        last cut: ``since_window``, ``before``, ``after``), ``cbpe`` (``estimate``, ``error``,
        ``reference``, ``p_value`` of the accuracy to be expected), if they tell anything.
    """
    found: list[dict[str, Any]] = []
    for name, score in sorted(state.scores.items()):
        if score.moved:
            way = "risen" if score.moved > 0 else "fallen"
            found.append(
                {
                    "score": name,
                    "detector": "page_hinkley",
                    "direction": score.moved,
                    "since_window": score.moved_window,
                    "text": f"{name} has {way}: said at window {score.moved_window}",
                }
            )
        if score.cut is not None:
            (since, before), after = score.cut, score.adwin.mean
            found.append(
                {
                    "score": name,
                    "detector": "adwin",
                    "since_window": since,
                    "before": round(before, 4),
                    "after": round(after, 4),
                    "text": f"{name} {before:.1%} before window {since}, {after:.1%} since",
                }
            )
    sure = profile.confidence
    size = sure.classes * DECILES if sure is not None else 0
    if sure is not None and len(state.table) == size and sum(state.table) >= config.answers_min:
        known = np.stack([np.array(sure.wrong), np.array(sure.right)], 1)
        expected = expected_accuracy(state.table, known, edges=sure.deciles)
        estimate, error = float(expected.estimate), float(expected.error)
        found.append(
            {
                "score": ACCURACY,
                "detector": "cbpe",
                "estimate": round(estimate, 4),
                "error": round(error, 4),
                "reference": round(expected.reference, 4),
                "p_value": float(f"{float(expected.p_value):.3g}"),
                "text": (
                    f"its confidence lets expect an accuracy of {estimate:.1%} ± {2 * error:.1%} "
                    f"(reference {expected.reference:.1%}), unless the world's meaning changed"
                ),
            }
        )
    return found


def expected_text(evidence: Sequence[Mapping[str, Any]]) -> str:
    """Return the sentence about the expected accuracy, "" if there is none."""
    return next((str(each["text"]) for each in evidence if each["detector"] == "cbpe"), "")
