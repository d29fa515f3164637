"""Captures: which predictions are wanted, and a budget that no clock and no restart exceeds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.agent.capture import DAY_S, RECORD_EXTRA_BYTES, CaptureConfig, CapturePolicy

BUDGET = 80_000


@given(
    st.lists(st.tuples(st.floats(-1e5, 1e5), st.integers(0, 12_000)), max_size=60),
    st.floats(0, 1e6),
)
def test_no_24_hours_see_more_than_the_budget(
    steps: list[tuple[float, int]], start_s: float
) -> None:
    """Whatever is asked and wherever the clock goes; the bucket starts empty."""
    policy = CapturePolicy(CaptureConfig(bytes_per_day=BUDGET, random_share=1), now_s=start_s)
    now_s = latest_s = start_s
    granted: list[tuple[float, int]] = []
    for step_s, size in steps:
        now_s += step_s
        latest_s = max(latest_s, now_s)  # a clock that goes back counts as standing still
        if policy.spend(size, now_s=now_s):
            granted.append((latest_s, size + RECORD_EXTRA_BYTES))
    for at_s, _ in granted:
        day = sum(size for when_s, size in granted if at_s - DAY_S < when_s <= at_s)
        assert day <= BUDGET
    assert policy.spent_bytes == sum(size for _, size in granted)
    assert policy.refused == len(steps) - len(granted)


def test_a_restart_brings_no_new_budget() -> None:
    """An agent that starts each second sends nothing: its bucket was never filled."""
    for start_s in range(100):
        policy = CapturePolicy(CaptureConfig(bytes_per_day=BUDGET, random_share=1), now_s=start_s)
        assert not policy.spend(1000, now_s=start_s + 1)


def test_a_quiet_day_lets_an_eighth_go_at_once() -> None:
    """What is worth capturing comes in bursts."""
    policy = CapturePolicy(CaptureConfig(bytes_per_day=BUDGET, margin_below=0.1), now_s=0)
    assert policy.fits(BUDGET // 8 - RECORD_EXTRA_BYTES)
    assert not policy.fits(BUDGET // 8 - RECORD_EXTRA_BYTES + 1)
    assert policy.spend(BUDGET // 8 - RECORD_EXTRA_BYTES, now_s=DAY_S)
    assert not policy.spend(0, now_s=DAY_S)


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_waiting_times_are_those_of_independent_choices(share: float) -> None:
    """Geometric: mean 1 / share, within five standard errors of 20,000 draws; the seed is fixed."""
    policy = CapturePolicy(CaptureConfig(bytes_per_day=BUDGET, random_share=share), now_s=0)
    waits = [policy.random_in(each) for each in np.random.default_rng(5).random(20_000)]
    error = np.sqrt(1 - share) / share / np.sqrt(len(waits))
    assert min(waits) >= 1 and abs(np.mean(waits) - 1 / share) <= 5 * error


def test_off_by_default_and_without_a_budget() -> None:
    """Raw values leave a device only if someone said so twice: a rule, and a budget."""
    assert not CaptureConfig().on and not CaptureConfig(bytes_per_day=BUDGET).on
    assert CapturePolicy(CaptureConfig(), now_s=0).random_in(0.5) == -1
    for rule in ({"random_share": 0.1}, {"margin_below": 0.1}, {"outside_above": 0.5}):
        with pytest.raises(ValueError, match="bytes_per_day"):
            CaptureConfig(**rule)  # type: ignore[arg-type]
        assert CaptureConfig(bytes_per_day=BUDGET, **rule).on


@pytest.mark.parametrize(
    "fields",
    [
        {"random_share": 1.1},
        {"margin_below": -0.1},
        {"outside_above": float("nan")},
        {"bytes_per_day": -1},
    ],
)
def test_limits(fields: dict[str, float]) -> None:
    """Each is checked."""
    with pytest.raises(ValueError, match="must be"):
        CaptureConfig(**fields)  # type: ignore[arg-type]
