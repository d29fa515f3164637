"""Decide where windows lie in time, which tiers answer a question, what is folded and retired.

Rule 1: a window is in the tier ``fine`` of its dataset exactly once. ``fold`` copies files into
the next tier and marks them folded in one transaction; so a window is in each tier at most once,
and in tier T exactly if it is in a file of T, or not yet, in a finer file that is not folded.
Rule 2: whatever is asked of tier T reads the files of T and the finer ones that are not folded.
Rule 3: a file is retired for its age only when it is folded: its windows are in a coarser tier.
Only days, the last tier, end for good.
Rule 4: this file knows no database, file or clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from .config import ClockConfig, LakeConfig

STEP_MS: Final = 300_000
"""Times of questions are taken to whole five minutes, and so are rows of cohorts."""
HOUR_MS: Final = 3_600_000
DAY_MS: Final = 86_400_000
TIME_MS_MAX: Final = 253_402_300_800_000  # the year 10000: a day's name has a 4-digit year


class Tier(StrEnum):
    """How coarse the rows of a file are in time."""

    FINE = "fine"
    HOUR = "hour"
    DAY = "day"


TIERS: Final = (Tier.FINE, Tier.HOUR, Tier.DAY)
WIDTH_MS: Final = {Tier.FINE: STEP_MS, Tier.HOUR: HOUR_MS, Tier.DAY: DAY_MS}


class Grain(StrEnum):
    """Whom a row is about."""

    DEVICE = "device"
    COHORT = "cohort"
    """All devices of one site, hardware class and slice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """What the manifest knows of one file."""

    id: int
    dataset: str
    grain: Grain
    tier: Tier
    model: str
    """Digest of the model, hex."""
    day: str
    """UTC day of its rows, YYYY-MM-DD."""
    path: str
    """Under the lake's folder, with slashes."""
    rows: int
    bytes: int
    windows: int
    """Windows (or label records) that its rows hold together."""
    first_ms: int
    last_ms: int
    """Times of its first and last row."""
    created_ms: int
    folded: bool
    """Its windows are in the next tier too."""


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a time range and the tier that answers it."""

    tier: Tier
    since_ms: int
    until_ms: int
    """Exclusive."""


@dataclass(frozen=True, slots=True)
class Job:
    """Files of one partition that become one."""

    files: tuple[FileFacts, ...]
    """All folded, or none."""
    folds: bool
    """They become one of the next tier too."""


@dataclass(frozen=True, slots=True)
class Aligned:
    """Where a window lies in time."""

    time_ms: int
    clock_off: bool
    """The device's clock is not believed; ``time_ms`` comes from the time of receipt."""


def align(start_ms: int, end_ms: int, received_ms: int, *, config: ClockConfig) -> Aligned:
    """Return the time of a window: its start by the device's clock if that can be believed.

    Args:
        start_ms: Start on the device's clock, Unix ms; any number.
        end_ms: End on the device's clock.
        received_ms: When the server stored it.
        config: What is believed.

    Returns:
        A time of 0 to the year 9999. A window of a clock that is off begins as long before its
        receipt as it lasted, if it lasted no longer than a device may be late.
    """
    lasted_ms = end_ms - start_ms
    late_ms = received_ms - end_ms
    sane = 0 <= lasted_ms <= config.late_s_max * 1000
    known = -config.ahead_s_max * 1000 <= late_ms <= config.late_s_max * 1000
    if sane and known and 0 <= start_ms < TIME_MS_MAX:
        return Aligned(start_ms, False)
    back = received_ms - (lasted_ms if sane else 0)
    return Aligned(min(max(0, back), TIME_MS_MAX - 1), True)


def floor(time_ms: int, width_ms: int) -> int:
    """Return the start of the bucket of ``width_ms`` that a time is in."""
    return time_ms - time_ms % width_ms


def day_name(time_ms: int) -> str:
    """Return the UTC day of a time, YYYY-MM-DD."""
    return datetime.fromtimestamp(time_ms // 1000, UTC).strftime("%Y-%m-%d")


def horizon_ms(tier: Tier, now_ms: int, *, config: LakeConfig) -> int:
    """Return the start of the oldest day that a tier keeps."""
    return floor(now_ms, DAY_MS) - config.keep_days[TIERS.index(tier)] * DAY_MS


def step_ms(time_ms: int, now_ms: int, *, config: LakeConfig) -> int:
    """Return how exactly a time can be asked for: the width of the finest tier kept there."""
    for tier in (Tier.FINE, Tier.HOUR):
        if time_ms >= horizon_ms(tier, now_ms, config=config):
            return WIDTH_MS[tier]
    return DAY_MS


def widen(
    since_ms: int, until_ms: int, now_ms: int, *, every_ms: int, config: LakeConfig
) -> tuple[int, int]:
    """Return the smallest range around a range that can be answered.

    Args:
        since_ms: Begin, inclusive.
        until_ms: End, exclusive, not before the begin.
        now_ms: Now.
        every_ms: Width of the buckets asked for; 0 = none.
        config: What is kept for how long.

    Raises:
        ValueError: The range is empty or not within the years 1970 to 9999.
    """
    if not 0 <= since_ms < until_ms <= TIME_MS_MAX:
        raise ValueError(f"the range {since_ms} to {until_ms} ms is empty or out of bounds")
    low = max(every_ms, step_ms(since_ms, now_ms, config=config))
    high = max(every_ms, step_ms(until_ms - 1, now_ms, config=config))
    return floor(since_ms, low), -floor(-until_ms, high)


def plan(since_ms: int, until_ms: int, *, coarsest: Tier) -> list[Span]:
    """Return the spans that together are the range: coarse within, fine at its edges.

    Args:
        since_ms: Begin, from :func:`widen`.
        until_ms: End, from :func:`widen`.
        coarsest: No coarser tier is used: buckets by hour need hours.
    """
    tier = coarsest
    while tier is not Tier.FINE:
        width = WIDTH_MS[tier]
        low, high = -floor(-since_ms, width), floor(until_ms, width)
        finer = TIERS[TIERS.index(tier) - 1]
        if low < high:
            return [
                *(plan(since_ms, low, coarsest=finer) if since_ms < low else []),
                Span(tier, low, high),
                *(plan(high, until_ms, coarsest=finer) if high < until_ms else []),
            ]
        tier = finer
    return [Span(Tier.FINE, since_ms, until_ms)]


def answers(file: FileFacts, span: Span) -> bool:
    """Tell whether a span is answered from a file (rule 2)."""
    rank, wanted = TIERS.index(file.tier), TIERS.index(span.tier)
    chosen = rank == wanted or (rank < wanted and not file.folded)
    return chosen and file.first_ms < span.until_ms and file.last_ms >= span.since_ms


def is_within(file: FileFacts, span: Span) -> bool:
    """Tell whether all rows of a file lie within a span."""
    return span.since_ms <= file.first_ms and file.last_ms < span.until_ms


def jobs(files: Sequence[FileFacts], now_ms: int, *, config: LakeConfig) -> list[Job]:
    """Return what should be done now with the files of one dataset, grain, tier, model and day.

    Files are folded when the oldest waited long enough. Cohorts that are in many small files are
    compacted meanwhile: a question reads all of them. Devices' files are folded early instead.
    """
    found = []
    for folded in (False, True):
        part = sorted((each for each in files if each.folded is folded), key=lambda each: each.id)
        if not part:
            continue
        last = folded or part[0].tier is Tier.DAY
        many = len(part) >= config.files_max
        if not last:
            limit_s = config.fold_s[TIERS.index(part[0].tier)]
            old = now_ms - part[0].created_ms >= limit_s * 1000
            if old or (many and part[0].grain is Grain.DEVICE):
                found.append(Job(tuple(part[: config.job_files_max]), folds=True))
                continue
        if many:
            small = sorted(part, key=lambda each: (each.rows, each.id))[: config.job_files_max]
            found.append(Job(tuple(small), folds=False))
    return found


def expired(files: Iterable[FileFacts], now_ms: int, *, config: LakeConfig) -> list[FileFacts]:
    """Return the files whose time is over (rule 3)."""
    return [
        each
        for each in files
        if each.day < day_name(max(0, horizon_ms(each.tier, now_ms, config=config)))
        and (each.folded or each.tier is Tier.DAY)
    ]
