"""The bettor: it earns nothing under its null, whatever the looks, and much from a loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.server.drift import betting
from shoal.server.drift.betting import DROPS, EVIDENCE_MAX, Scatter


def chances(n: int, wrong: float, rho: float) -> list[float]:
    """Return the beta-binomial's probabilities of 0 … n wrong answers, from its definition."""
    size = 1 / rho - 1
    a, b = size * wrong, size * (1 - wrong)

    def ln_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    return [
        math.comb(n, c) * math.exp(ln_beta(a + c, b + n - c) - ln_beta(a, b)) for c in range(n + 1)
    ]


def expected(chance: list[float], before: float, floor: float, rho: float) -> float:
    """Return the largest expected evidence of a drop after one look."""
    n = len(chance) - 1
    after = np.zeros(len(DROPS))
    for wrong, share in enumerate(chance):
        found = betting.after([before] * len(DROPS), n, n - wrong, floor=floor, rho=rho)
        after += share * np.array(found)
    return float(after.max())


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 60), st.floats(0.02, 0.98), st.floats(0.02, 0.9),
    st.floats(0, 1), st.floats(0.05, 1), st.floats(0, 1e6),
)  # fmt: skip
def test_a_bet_earns_nothing_under_the_null(
    n: int, floor: float, rho: float, surplus: float, tighter: float, before: float
) -> None:
    """Exactly so at its border; where it is right more often, or answers depend less, it loses.

    Without the bound on the evidence, which takes some of the rarest and largest wins away.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(betting, "EVIDENCE_MAX", math.inf)
        border = expected(chances(n, 1 - floor, rho), before, floor, rho)
    assert border == pytest.approx(before + 1, rel=1e-6)
    wrong, less = (1 - floor) * (1 - 0.99 * surplus), rho * tighter
    assert expected(chances(n, wrong, less), before, floor, rho) <= (before + 1) * (1 + 1e-6)


@pytest.mark.parametrize(("n", "rho"), [(1, 0.3), (20, 0.0), (20, 0.05), (5000, 0.02)])
def test_more_wrong_answers_are_more_evidence(n: int, rho: float) -> None:
    """And none at all take some away."""
    found = [
        betting.total(betting.after([1.0] * 4, n, right, floor=0.8, rho=rho))
        for right in range(n, -1, -max(1, n // 50))
    ]
    assert found == sorted(found) and found[0] < 2 < found[-1]


def test_extremes_stay_numbers() -> None:
    """A floor of 0 cannot be lost; more evidence than enough is enough."""
    assert betting.after(betting.begun(), 100, 0, floor=0.0, rho=0.05) == pytest.approx([1.0] * 4)
    evidence = betting.begun()
    for _ in range(400):
        evidence = betting.after(evidence, 10**9, 0, floor=0.999, rho=0.95)
    assert evidence == [EVIDENCE_MAX] * 4
    for _ in range(400):
        evidence = betting.after(evidence, 10**9, 10**9, floor=0.5, rho=0.01)
    assert 0 <= betting.total(evidence) < 1


@pytest.mark.parametrize("true", [0.0, 0.02, 0.1, 0.3])
def test_the_correlation_is_learned(true: float) -> None:
    """Eight devices within a tenth or a hundredth on average; a loss hardly changes it."""
    learned, size = [], 1 / max(true, 1e-9) - 1
    for seed in range(8):
        rng, scatter, right = np.random.default_rng(seed), Scatter(), 0
        for look in range(600):
            share = 0.9 if look < 300 else 0.75
            p = rng.beta(size * share, size * (1 - share)) if true else share
            correct = int(rng.binomial(50, p))
            scatter.add(50, correct)
            right += correct
        learned.append(scatter.rho(right / 30_000, prior=0.05))
    assert np.mean(learned) == pytest.approx(true, abs=max(0.0101, true / 10))
    assert Scatter().rho(0.9, prior=0.05) == 0.05


@pytest.mark.parametrize(
    ("share", "true", "n"), [(0.87, 0.05, 60), (0.87, 0.1, 60), (0.87, 0.05, 20), (0.9, 0.2, 60)]
)
def test_false_alarms_are_as_rare_as_stated(share: float, true: float, n: int) -> None:
    """30,000 looks at the floor of .87, correlated, of 30 devices: 1 in 1,000 is allowed.

    The limit is the mean of 30 and 2.33 standard deviations. (0.9, 0.2): as a model that lost
    nothing, whose answers are right and wrong in spells.
    """
    size, alarms = 1 / true - 1, 0
    for seed in range(30):
        rng, scatter, evidence = np.random.default_rng(seed), Scatter(), betting.begun()
        right, total = 0, 0
        for p in rng.beta(size * share, size * (1 - share), 1000):
            rho = scatter.rho(right / total if total else 0.87, prior=0.05)
            correct = int(rng.binomial(n, p))
            evidence = betting.after(evidence, n, correct, floor=0.87, rho=rho)
            scatter.add(n, correct)
            right, total = right + correct, total + n
            if betting.total(evidence) >= 1000:
                alarms, evidence = alarms + 1, betting.begun()
    assert alarms <= 30 + 2.33 * math.sqrt(30)


@pytest.mark.parametrize(("good", "most"), [(0, 60), (100, 30), (1000, 35)])
def test_a_fall_from_90_to_80_is_found_however_late(good: int, most: int) -> None:
    """Looks of 60; seven points below the floor. One purse took 14, 38 and 56 looks, for 1 in 10.

    The limits: ln(10,000 x 4 drops) over what a look of such a correlation earns.
    """
    rng, scatter, evidence = np.random.default_rng(0), Scatter(), betting.begun()
    right, total, looks = 0, 0, 0
    while betting.total(evidence) < 10_000:
        looks += 1
        rho = scatter.rho(right / total if total else 0.87, prior=0.05)
        correct = int(rng.binomial(60, 0.9 if looks <= good else 0.8))
        evidence = betting.after(evidence, 60, correct, floor=0.87, rho=rho)
        scatter.add(60, correct)
        right, total = right + correct, total + 60
        assert looks < good + 200
    assert good < looks <= good + most
