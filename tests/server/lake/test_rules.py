"""Time ranges, tiers and what is due: pure rules, on any input."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.server.lake import rules
from shoal.server.lake.config import ClockConfig, LakeConfig
from shoal.server.lake.rules import DAY_MS, HOUR_MS, STEP_MS, WIDTH_MS, FileFacts, Grain, Tier

NOW_MS = 1_764_028_800_000 + 5 * HOUR_MS + 12_345
TIMES = st.integers(0, 2 * NOW_MS)


def file(**changes: object) -> FileFacts:
    """Return a file of the present day."""
    facts: dict[str, object] = {
        "id": 1,
        "dataset": "features",
        "grain": Grain.DEVICE,
        "tier": Tier.FINE,
        "model": "ab" * 32,
        "day": rules.day_name(NOW_MS),
        "path": "p",
        "rows": 10,
        "bytes": 1,
        "windows": 1,
        "first_ms": NOW_MS,
        "last_ms": NOW_MS,
        "created_ms": NOW_MS,
        "folded": False,
    }
    return FileFacts(**(facts | changes))  # type: ignore[arg-type]


@given(since=TIMES, length=st.integers(1, 9 * DAY_MS), coarsest=st.sampled_from(rules.TIERS))
def test_a_plan_is_the_range_without_gap_or_overlap(
    since: int, length: int, coarsest: Tier
) -> None:
    """Spans follow each other; a coarse one begins and ends on its own border."""
    low, high = rules.widen(since, since + length, NOW_MS, every_ms=0, config=LakeConfig())
    spans = rules.plan(low, high, coarsest=coarsest)
    assert spans[0].since_ms == low
    assert spans[-1].until_ms == high
    for one, two in itertools.pairwise(spans):
        assert one.until_ms == two.since_ms
    for span in spans:
        assert span.since_ms < span.until_ms
        assert span.since_ms % WIDTH_MS[span.tier] == span.until_ms % WIDTH_MS[span.tier] == 0
        assert rules.TIERS.index(span.tier) <= rules.TIERS.index(coarsest)
    # The coarsest tier answers all that it can: a whole day is never made of hours.
    if coarsest is Tier.DAY:
        fine = [s for s in spans if s.tier is not Tier.DAY]
        assert sum(s.until_ms - s.since_ms for s in fine) < 2 * DAY_MS


@given(since=TIMES, length=st.integers(1, 400 * DAY_MS), every=st.sampled_from([0, HOUR_MS]))
def test_a_range_widens_as_little_as_what_is_kept_allows(
    since: int, length: int, every: int
) -> None:
    """Fine where windows are kept, whole hours and days before."""
    config = LakeConfig()
    low, high = rules.widen(since, since + length, NOW_MS, every_ms=every, config=config)
    assert low <= since < since + length <= high
    for time_ms, moved in ((since, since - low), (since + length - 1, high - since - length)):
        width = max(every, rules.step_ms(time_ms, NOW_MS, config=config))
        assert moved < width
        assert low % STEP_MS == high % STEP_MS == 0


@given(start=st.integers(0, 2**53), length=st.integers(-(2**40), 2**53), received=TIMES)
def test_a_window_has_a_time_whatever_its_clock_says(
    start: int, length: int, received: int
) -> None:
    """The time can always be named, and is near the receipt if the clock is not believed."""
    config = ClockConfig()
    found = rules.align(start, start + length, received, config=config)
    assert rules.day_name(found.time_ms)
    late_ms = received - start - length
    if found.clock_off:
        assert abs(received - found.time_ms) <= config.late_s_max * 1000
    else:
        assert found.time_ms == start
        assert -config.ahead_s_max * 1000 <= late_ms <= config.late_s_max * 1000


@pytest.mark.parametrize(
    ("start", "end", "time", "off"),
    [
        (NOW_MS - 300_000, NOW_MS, NOW_MS - 300_000, False),
        (NOW_MS - 9 * DAY_MS, NOW_MS - 9 * DAY_MS + 1, NOW_MS - 9 * DAY_MS, False),  # out of reach
        (0, 300_000, NOW_MS - 300_000, True),  # a clock without a battery
        (NOW_MS + 400 * DAY_MS, NOW_MS + 400 * DAY_MS + 60_000, NOW_MS - 60_000, True),
        (0, NOW_MS, NOW_MS, True),  # the clock was set while the window was open
        (NOW_MS, NOW_MS - 1, NOW_MS, True),
        (2**53, 2**53, NOW_MS, True),
    ],
)
def test_clocks_off_by_years(start: int, end: int, time: int, off: bool) -> None:
    """Each way a clock can be wrong has its answer."""
    assert rules.align(start, end, NOW_MS, config=ClockConfig()) == rules.Aligned(time, off)


def test_a_file_answers_its_own_tier_and_coarser_ones_until_it_is_folded() -> None:
    """Rule 2."""
    day = rules.Span(Tier.DAY, rules.floor(NOW_MS, DAY_MS), rules.floor(NOW_MS, DAY_MS) + DAY_MS)
    fine = rules.Span(Tier.FINE, day.since_ms, day.until_ms)
    assert rules.answers(file(), day)
    assert not rules.answers(file(folded=True), day)
    assert rules.answers(file(folded=True), fine)
    assert not rules.answers(file(tier=Tier.DAY), fine)
    outside = rules.Span(Tier.FINE, NOW_MS + 1, NOW_MS + 2)
    assert not rules.answers(file(), outside)


@given(ages=st.lists(st.tuples(st.sampled_from(rules.TIERS), st.integers(0, 3000), st.booleans())))
def test_nothing_expires_that_is_in_no_coarser_tier(ages: list[tuple[Tier, int, bool]]) -> None:
    """Rule 3: however old a file is."""
    config = LakeConfig()
    files = [
        file(id=i, tier=tier, folded=folded, day=rules.day_name(max(0, NOW_MS - days * DAY_MS)))
        for i, (tier, days, folded) in enumerate(ages)
    ]
    for each in rules.expired(files, NOW_MS, config=config):
        tier, days, folded = ages[each.id]
        assert tier is Tier.DAY or folded
        assert days > config.keep_days[rules.TIERS.index(tier)]


def test_files_are_folded_when_old_or_many() -> None:
    """A quiet model waits for an hour; a busy one does not pile up files."""
    config = LakeConfig(files_max=3, job_files_max=4)

    def due(files: list[FileFacts], now_ms: int = NOW_MS) -> list[tuple[list[int], bool]]:
        found = rules.jobs(files, now_ms, config=config)
        return [([each.id for each in job.files], job.folds) for job in found]

    young = [file(id=i) for i in range(2)]
    assert due(young) == []
    assert due(young, NOW_MS + HOUR_MS) == [([0, 1], True)]
    assert due([file(id=i) for i in range(9)]) == [([0, 1, 2, 3], True)]
    cohorts = [file(id=i, grain=Grain.COHORT, rows=9 - i) for i in range(3)]
    assert due(cohorts) == [([2, 1, 0], False)]
    assert due(cohorts, NOW_MS + HOUR_MS) == [([0, 1, 2], True)]
    done = [file(id=i, folded=True) for i in range(3)]
    assert due(done, NOW_MS + DAY_MS) == [([0, 1, 2], False)]
    assert due(done[:2], NOW_MS + DAY_MS) == []
    days = [file(id=i, tier=Tier.DAY) for i in range(3)]
    assert due(days) == [([0, 1, 2], False)]
    assert due(days[:2], NOW_MS + 9 * DAY_MS) == []


@pytest.mark.parametrize(
    "bad",
    [
        {"tick_s": 0},
        {"export_rows_max": 0},
        {"keep_days": (8, 7, 9)},
        {"kll_k": (7, 200)},
        {"files_max": 1},
        {"fold_s": (-1, 0)},
        {"database_days": -1},
    ],
)
def test_impossible_settings_are_refused(bad: dict[str, object]) -> None:
    """At start, not in the night."""
    with pytest.raises(ValueError, match="must"):
        LakeConfig(**bad)  # type: ignore[arg-type]
