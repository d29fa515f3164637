"""Scores of a device: what is told of them, and that they stay small."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from shoal.server.drift import profile as profiles
from shoal.server.drift.scores import ACCURACY, CONFIDENCE, ScoreConfig, ScoreState, lines

CONFIG = ScoreConfig()
RNG = np.random.default_rng(5)


def made() -> profiles.ReferenceProfile:
    """Return the profile of a calibrated model of two classes."""
    n = 2000
    sure = RNG.uniform(0.5, 1, n).astype(np.float32)
    return profiles.build(
        RNG.normal(size=(n, 1, 2)).astype(np.float32), sure, RNG.random(n) < sure,
        np.repeat(np.arange(5), n // 5), np.tile([False, True], n // 2), channels=("a",),
        predicted__n=RNG.integers(0, 2, n), classes=2,
    )  # fmt: skip


PROFILE = made()


def follow(state: ScoreState, windows: int, share: float, name: str = ACCURACY) -> None:
    """Add windows of 200 values with this share."""
    for _ in range(windows):
        state.score(name, float(RNG.binomial(200, share)), 200, config=CONFIG)


def told(state: ScoreState) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the lines by score and detector."""
    found = lines(state, PROFILE, config=CONFIG)
    json.dumps(found, allow_nan=False)
    return {(each["score"], each["detector"]): each for each in found}


def test_a_score_that_stays_tells_nothing() -> None:
    """300 windows."""
    state = ScoreState()
    follow(state, 300, 0.9)
    follow(state, 300, 0.8, CONFIDENCE)
    assert told(state) == {}


def test_a_fall_is_told_by_both_with_its_window() -> None:
    """Page–Hinkley says that it fell, ADWIN since when."""
    state = ScoreState()
    follow(state, 60, 0.9)
    follow(state, 60, 0.75)
    found = told(state)
    fell = found[ACCURACY, "page_hinkley"]
    assert fell["direction"] == -1 and 60 < fell["since_window"] <= 72
    cut = found[ACCURACY, "adwin"]
    assert 50 <= cut["since_window"] <= 75
    assert cut["before"] == pytest.approx(0.9, abs=0.03)
    assert cut["after"] == pytest.approx(0.75, abs=0.05)
    follow(state, 200, 0.9)
    assert (ACCURACY, "page_hinkley") not in told(state)  # it is over


def test_answers_let_expect_an_accuracy() -> None:
    """As the reference's: the same; less sure ones: less. Old answers fade."""
    state = ScoreState()
    sure = PROFILE.confidence
    assert sure is not None
    usual = np.add(sure.right, sure.wrong).ravel().tolist()
    state.answers(usual, 2, config=CONFIG)
    line = told(state)[ACCURACY, "cbpe"]
    assert line["estimate"] == pytest.approx(line["reference"], abs=0.01)
    doubtful = [100, 100, *[0] * 8] * 2
    for _ in range(100):
        state.answers(doubtful, 2, config=CONFIG)
    line = told(state)[ACCURACY, "cbpe"]
    assert line["estimate"] < line["reference"] - 0.1 and line["p_value"] < 1e-6
    assert "expect an accuracy" in line["text"]
    assert sum(state.table) == pytest.approx(400 / (1 - math.exp(-1 / 12)), rel=0.01)


@pytest.mark.parametrize(
    "table", [None, [], [1] * 19, [-1] * 20, [1.5] * 20, "x" * 20, [1 << 50] * 20]
)
def test_a_devices_mistake_is_left_out(table: Any) -> None:
    """Neither a table that does not fit, nor a mean that cannot be."""
    state = ScoreState()
    state.answers(table, 2, config=CONFIG)
    for total, count in ((math.nan, 5), (math.inf, 5), (6.0, 5), (-1.0, 5), (0.0, 0)):
        state.score(ACCURACY, total, count, config=CONFIG)
    assert state == ScoreState()


def test_the_state_is_bounded_and_goes_through_json() -> None:
    """5,000 windows of both scores in less than 8 KiB, and the next window is told alike."""
    state = ScoreState()
    follow(state, 5000, 0.9)
    follow(state, 10, 0.9, CONFIDENCE)
    state.answers([3] * 20, 2, config=CONFIG)
    text = json.dumps(state.to_dict())
    assert len(text) < 8192
    again = ScoreState.from_dict(json.loads(text))
    for each in (state, again):
        for _ in range(40):
            each.score(ACCURACY, 100.0, 200, config=CONFIG)
    assert told(again) == told(state) and told(state)


@pytest.mark.parametrize(
    "raw",
    [
        {"scores": 3},
        {"scores": {"accuracy": {}}},
        {"scores": {"accuracy": None}},
        {"table": ["x"]},
    ],
)
def test_a_damaged_state_starts_anew(raw: dict[str, Any]) -> None:
    """It is evidence only."""
    assert ScoreState.from_dict(raw) == ScoreState()


@pytest.mark.parametrize(
    "settings", [{"baseline_windows": 2}, {"memory_windows": 0}, {"answers_min": 0}]
)
def test_a_configuration_is_checked(settings: dict[str, Any]) -> None:
    """Limits have reasons."""
    with pytest.raises(ValueError, match="must"):
        ScoreConfig(**settings)
