"""Properties of the statistics, and what each check says at and around its limit."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.proto import latency
from shoal.server.rollouts import gates
from shoal.server.rollouts.config import GateConfig
from shoal.server.rollouts.gates import Cluster, Observed, Seen, Verdict

CONFIG = GateConfig()


Pairs = Sequence[tuple[int, int]]


def seen(*, labels: Pairs = (), windows: Pairs = (), us: float = 0.0) -> Seen:
    """Return what a device showed: (trials, hits) each, and 1000 calls of one latency."""
    found = Seen([Cluster(*each) for each in windows], [Cluster(*each) for each in labels])
    if us:
        found.latency_us[latency.bin_of(us)] = 1000
    return found


@given(st.integers(1, 5000), st.floats(0, 1), st.sampled_from([0.01, 0.1, 0.5]))
def test_an_interval_holds_its_estimate_and_shrinks(n: int, share: float, alpha: float) -> None:
    """The estimate lies inside, and ten times the trials never make it wider."""
    hits = round(share * n)
    low, high = gates.interval(hits, n, alpha)
    assert 0 <= low <= hits / n <= high <= 1
    narrow_low, narrow_high = gates.interval(10 * hits, 10 * n, alpha)
    assert narrow_high - narrow_low <= high - low + 1e-9


def test_the_interval_is_where_the_mixture_says() -> None:
    """Pinned: the ratio of mixture to likelihood is 1/alpha at both ends, by plain arithmetic."""
    low, high = gates.interval(7, 20, 0.1)
    beta = math.gamma(7.5) * math.gamma(13.5) / math.gamma(21) / math.pi
    for p in (low, high):
        assert beta / (p**7 * (1 - p) ** 13) == pytest.approx(10, rel=1e-6)
    assert gates.interval(0, 0, 0.1) == (0.0, 1.0)


def test_wilson_is_the_textbooks() -> None:
    """81 of 263 at 95 %: (0.2553, 0.3662), Newcombe 1998, table I, method 3."""
    low, high = gates.wilson(81, 263, 0.05)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_the_sequence_covers_at_every_look() -> None:
    """Peeking after each of 400 trials, the interval ever misses in at most alpha of the runs."""
    rng, alpha, missed = random.Random(7), 0.1, 0
    for _ in range(200):
        hits = 0
        for n in range(1, 401):
            hits += rng.random() < 0.3
            if n % 10 == 0:
                low, high = gates.interval(hits, n, alpha)
                if not low <= 0.3 <= high:
                    missed += 1
                    break
    assert missed <= 200 * alpha


def test_clusters_that_differ_are_worth_less() -> None:
    """Labels come in situations: 10 windows all right or all wrong are 10 trials, not 1000."""
    even = gates.pooled([(1.0, [Cluster(100, 50)] * 10)])
    lumpy = gates.pooled([(1.0, [Cluster(100, 100), Cluster(100, 0)] * 5)])
    assert even.value == lumpy.value == 0.5
    assert even.trials == pytest.approx(1000, rel=0.01)
    assert lumpy.trials == pytest.approx(9, rel=0.2)
    assert even.counted == lumpy.counted == 1000


def test_few_trials_without_a_hit_are_not_certain() -> None:
    """0 errors of 5 predictions must not pass for proof that there are none."""
    share = gates.pooled([(1.0, [Cluster(5, 0)])])
    assert share.trials <= 5
    assert gates.interval(0, share.trials, 0.1)[1] > 0.3


@pytest.mark.parametrize(
    ("now", "before", "verdict"),
    [
        (0.90, 0.90, Verdict.PASS),
        (0.95, 0.90, Verdict.PASS),
        (0.80, 0.90, Verdict.FAIL),
        (0.85, 0.90, Verdict.INSUFFICIENT),  # just at the limit: no number of labels decides
    ],
)
def test_accuracy_is_judged_against_the_limit(now: float, before: float, verdict: str) -> None:
    """20,000 labels on each side decide all but the limit itself."""
    new = seen(labels=[(1000, round(1000 * now))] * 20)
    old = seen(labels=[(1000, round(1000 * before))] * 20)
    check = gates.accuracy(Observed({1: new}, {1: old}, Seen()), CONFIG)
    assert check.verdict == verdict
    assert check.limit == -CONFIG.accuracy_drop_max
    assert check.low is not None
    assert check.high is not None
    assert check.low < now - before < check.high


def test_accuracy_compares_each_device_with_itself() -> None:
    """A canary that was always bad is no evidence against the model (Simpson's paradox)."""
    now = {1: seen(labels=[(500, 250)] * 10), 2: seen(labels=[(500, 475)])}
    before = {1: seen(labels=[(500, 250)]), 2: seen(labels=[(500, 475)] * 10)}
    check = gates.accuracy(Observed(now, before, Seen()), GateConfig(accuracy_drop_max=0.1))
    assert check.value == pytest.approx(0.0, abs=1e-9)
    assert check.verdict == Verdict.PASS


def test_a_device_without_a_past_is_compared_with_the_control() -> None:
    """A new device joins a fleet that runs something already."""
    now = {1: seen(labels=[(1000, 700)] * 10)}
    control = seen(labels=[(1000, 900)] * 10)
    check = gates.accuracy(Observed(now, {}, control), CONFIG)
    assert check.before == pytest.approx(0.9)
    assert check.verdict == Verdict.FAIL


def test_nothing_to_compare_with_does_not_count() -> None:
    """The first model of a fleet without labels can still be rolled out."""
    observed = Observed({1: seen(windows=[(100, 0)], us=100)}, {}, Seen())
    entry = gates.judge({"confirmed": 1}, observed, CONFIG)
    assert [each["verdict"] for each in entry["checks"]] == ["PASS", *["UNMEASURED"] * 3]
    assert entry["verdict"] == "PASS"


def test_labels_that_are_late_are_waited_for() -> None:
    """There were labels before, so there will be some now."""
    observed = Observed({1: Seen()}, {1: seen(labels=[(100, 90)])}, Seen())
    assert gates.accuracy(observed, CONFIG).verdict == Verdict.INSUFFICIENT


@pytest.mark.parametrize(
    ("now_us", "control_us", "verdict"),
    [
        (100.0, 0.0, Verdict.PASS),
        (300.0, 0.0, Verdict.PASS),
        (900.0, 0.0, Verdict.FAIL),
        (900.0, 400.0, Verdict.PASS),  # the whole fleet got slow: a hot day, not the model
    ],
)
def test_latency_is_compared_with_the_slower_base(
    now_us: float, control_us: float, verdict: str
) -> None:
    """Fault 64: throttling must not be blamed on the new model."""
    observed = Observed({1: seen(us=now_us)}, {1: seen(us=100.0)}, seen(us=control_us))
    assert gates.slowness(observed, CONFIG).verdict == verdict


def test_a_single_slow_call_is_no_proof() -> None:
    """One outlier of forty is what a 99th percentile is made of."""
    now = Seen()
    now.latency_us[latency.bin_of(100)] = 39
    now.latency_us[latency.bin_of(5000)] = 1
    check = gates.slowness(Observed({1: now}, {1: seen(us=100.0)}, Seen()), CONFIG)
    assert check.verdict == Verdict.INSUFFICIENT


@pytest.mark.parametrize(
    ("now", "verdict"), [(0, Verdict.PASS), (15, Verdict.FAIL), (2, Verdict.INSUFFICIENT)]
)
def test_errors_may_rise_by_the_limit(now: int, verdict: str) -> None:
    """Percent of failed predictions, 3,000 of them; none failed before."""
    new, old = seen(windows=[(100, now)] * 30), seen(windows=[(100, 0)] * 30)
    assert gates.errors(Observed({1: new}, {1: old}, Seen()), CONFIG).verdict == verdict


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ({"confirmed": 9, "failed": 1}, "PASS"),
        ({"confirmed": 8, "failed": 1, "silent": 1}, "FAIL"),
        ({"confirmed": 1, "failed": 1, "superseded": 100}, "FAIL"),
        ({"superseded": 3}, "PASS"),
        ({"offered": 5, "silent": 5}, "FAIL"),
    ],
)
def test_denominators_are_honest(counts: dict[str, int], verdict: str) -> None:
    """Silence counts against the wave; devices that another rollout took do not dilute it."""
    entry = gates.judge(counts, None, CONFIG)
    assert entry["verdict"] == verdict
    assert sum(entry["counts"].values()) == sum(counts.values())


def test_false_alarms_over_many_looks_are_rare() -> None:
    """40 looks at a model that is as good as the old one: it fails in none of 60 runs."""
    rng = random.Random(3)

    def draw(share: float, clusters: int) -> list[tuple[int, int]]:
        return [(25, sum(rng.random() < share for _ in range(25))) for _ in range(clusters)]

    for _ in range(60):
        before, now = seen(labels=draw(0.85, 20)), Seen()
        for _ in range(40):
            now.labels += [Cluster(*each) for each in draw(0.85, 2)]
            check = gates.accuracy(Observed({1: now}, {1: before}, Seen()), CONFIG)
            assert check.verdict != Verdict.FAIL
            if check.verdict == Verdict.PASS:
                break
