"""The retraining policy: what asks for a run, what holds it back, and what never does."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.server.drift.retraining import (
    WEEK_MS,
    Action,
    Comparison,
    Decision,
    Facts,
    Loss,
    RetrainingConfig,
    decide,
    least_favourable,
    mcnemar,
)

NOW_MS = 10 * WEEK_MS
AUTOMATIC = RetrainingConfig(mode="automatic")
LOST = Facts(losses=[Loss("site north", False)], labels_new=1000)


def act(facts: Facts, config: RetrainingConfig = AUTOMATIC) -> Decision:
    """Return the decision."""
    return decide(facts, now_ms=NOW_MS, config=config)


def test_a_loss_that_labels_tell_of_asks_for_a_run() -> None:
    """Automatic starts, manual proposes, off does not look."""
    decision = act(LOST)
    assert (decision.action, decision.trigger) == (Action.START, "accuracy_loss")
    assert decision.reasons == ("labels tell of lost accuracy: site north",)
    assert act(LOST, RetrainingConfig(mode="manual")).action is Action.PROPOSE
    assert act(LOST, RetrainingConfig(mode="off")) == Decision(
        Action.NOTHING, "", ("the policy is off",)
    )


def test_nothing_else_asks_for_one() -> None:
    """No shift (it is no fact of the policy at all), and no suspicion."""
    assert "shift" not in {*Facts.__dataclass_fields__}
    for facts in (Facts(labels_new=10_000), Facts(losses=[Loss("w", True)], labels_new=10_000)):
        decision = act(facts)
        assert (decision.action, decision.trigger) == (Action.NOTHING, "")
    assert "no label says so" in act(Facts(losses=[Loss("w", True)])).reasons[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels_new": 499}, "499 new labels, 500 are needed"),
        ({"busy": True}, "a run of this model is going on"),
        ({"runs_ms": [NOW_MS - 86_399_000]}, "the cool-down lasts 1 s more"),
        ({"runs_ms": [NOW_MS - 3_600_000]}, "the cool-down lasts 23 hours more"),
        ({"runs_ms": [NOW_MS - 2 * 86_400_000, NOW_MS - 3 * 86_400_000]}, "the budget is 2"),
    ],
)
def test_what_holds_it_back(change: dict[str, object], said: str) -> None:
    """The reasons name what asked for it and what held it."""
    decision = act(replace(LOST, **change))  # type: ignore[arg-type]
    assert (decision.action, decision.trigger) == (Action.NOTHING, "accuracy_loss")
    assert "labels tell of lost accuracy" in decision.reasons[0]
    assert said in decision.reasons[1]


def test_a_proposal_is_made_once_for_each_alert() -> None:
    """A second loss asks again; one that starts by itself is held by the cool-down alone."""
    manual = RetrainingConfig(mode="manual")
    one, two = Loss("site north", False, "alert 1"), Loss("site south", False, "alert 2")
    first = act(replace(LOST, losses=[one]), manual)
    assert (first.action, first.asked_by) == (Action.PROPOSE, ("alert 1",))
    waiting = replace(LOST, losses=[one], proposed=first.asked_by)
    held = act(waiting, manual)
    assert held.action is Action.NOTHING and "proposed already" in held.reasons[1]
    assert act(replace(waiting, losses=[one, two]), manual).action is Action.PROPOSE
    assert act(waiting).action is Action.START


def test_old_runs_do_not_hold_it_back() -> None:
    """A cool-down ends, and a week has seven days."""
    assert act(replace(LOST, runs_ms=[NOW_MS - 86_400_000])).action is Action.START
    old = [NOW_MS - WEEK_MS, NOW_MS - WEEK_MS - 1, NOW_MS - 86_400_001]
    assert act(replace(LOST, runs_ms=old)).action is Action.START


def compared(champion: int, candidate: int, windows: int = 1000, **more: object) -> Facts:
    """Return the facts of one comparison."""
    comparison = Comparison("e1", "c" * 64, windows, champion, candidate, **more)  # type: ignore[arg-type]
    return Facts(comparisons=[comparison], labels_new=1000)


def test_a_challenger_that_wins_asks_for_a_run() -> None:
    """By the sums alone if they are far apart, by the pairs if they are not."""
    decision = act(compared(600, 720))
    assert (decision.action, decision.trigger) == (Action.START, "challenger_win")
    assert "720 of 1000 windows right, the champion 600" in decision.reasons[0]
    assert act(compared(700, 710)).trigger == ""
    assert act(compared(700, 720, pairs=(20, 0))).trigger == "challenger_win"
    assert act(compared(700, 720, pairs=(120, 100))).trigger == ""
    assert act(compared(720, 600)).trigger == ""
    assert act(compared(40, 90, windows=99)).trigger == ""  # too few windows to count


def test_mcnemar_is_the_sign_test() -> None:
    """Against the sum of its definition, and exact where a float would not be."""
    for wins, losses in product(range(8), range(8)):
        n = wins + losses
        want = sum(comb(n, k) for k in range(wins, n + 1)) / 2**n
        assert mcnemar(wins, losses) == pytest.approx(want, abs=1e-12)
    assert 0 < mcnemar(1200, 900) < 1e-9


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), *[st.integers(0, n)] * 2)))
def test_the_pairs_taken_speak_least_for_the_candidate(case: tuple[int, int, int]) -> None:
    """No pairs that fit the sums have a larger p-value: the test errs on the safe side."""
    windows, champion, candidate = case
    wins, losses = least_favourable(windows, champion, candidate)
    fitting = [
        (w, w - (candidate - champion))
        for w in range(windows + 1)
        if w - (candidate - champion) >= 0 and w <= min(candidate, windows - champion)
    ]
    assert (wins, losses) in fitting
    if candidate > champion:
        assert mcnemar(wins, losses) >= max(mcnemar(*pair) for pair in fitting) - 1e-12


@pytest.mark.parametrize(
    "change",
    [{"mode": "always"}, {"road": "none"}, {"cooldown_s": -1}, {"per_week_max": 0},
     {"level": 0.0}, {"labels_min": -1}, {"windows_min": 0}],
)  # fmt: skip
def test_limits_of_the_configuration(change: dict[str, object]) -> None:
    """Nonsense is refused at once."""
    with pytest.raises(ValueError, match="must"):
        RetrainingConfig(**change)  # type: ignore[arg-type]
