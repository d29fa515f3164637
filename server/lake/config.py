"""Settings of the lake: pace, sizes, and how long each tier is kept."""

from __future__ import annotations

from dataclasses import dataclass, field

DAY_S = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockConfig:
    """When a device's clock is believed."""

    late_s_max: int = 30 * DAY_S
    """A window may end this long, s, before it is received: the device was out of reach."""
    ahead_s_max: int = 600
    """It may end this long, s, after it is received: clocks that are set by hand."""

    def __post_init__(self) -> None:
        """Refuse bounds that are none.

        Raises:
            ValueError: A bound is negative.
        """
        if self.late_s_max < 0 or self.ahead_s_max < 0:
            raise ValueError("late_s_max and ahead_s_max must be at least 0 s")


@dataclass(frozen=True, slots=True, kw_only=True)
class LakeConfig:
    """Pace and bounds of the lake."""

    tick_s: float = 2.0
    """The worker looks for work this often, s."""
    export_s: float = 60.0
    """A window waits at most this long, s, in the database for its file."""
    export_rows_min: int = 200
    """So many windows do not wait: a question reads those that wait one by one, some ms each."""
    export_rows_max: int = 5_000
    """Windows, and label records, of one export: about 1 MB of memory per 100 windows."""
    fold_s: tuple[int, int] = (3_600, DAY_S)
    """Files of windows are folded into hours when the oldest is this old, s; hours into days."""
    files_max: int = 32
    """So many files of one dataset, tier, model and day are folded or compacted without waiting."""
    job_rows_max: int = 400_000
    """Rows in memory at a time while folding; some 1 kB each."""
    job_files_max: int = 512
    """Files folded in one transaction."""
    keep_days: tuple[int, int, int] = (7, 90, 5 * 365)
    """How long windows, hours and days are kept, in days; each at least as long as the finer."""
    grace_s: int = 900
    """A retired file stays this long, s: a query that began before may still read it."""
    orphan_days: int = 7
    """Files that no manifest knows are set aside for this long: a crash, or an old database."""
    database_days: int = 0
    """Exported and judged windows leave the database after this long; 0 = they stay. Rollout gates
    and references of federated models read windows from the database."""
    kll_k: tuple[int, int] = (64, 128)
    """KLL parameter of merged sketches in hours and days, 8 to 65535: about 12 k bytes each. Errors
    of many sketches cancel: 64 in each hour is 0.1 % in a day of a site."""
    groups_max: int = 100_000
    """Groups × features of one answer."""
    clock: ClockConfig = field(default_factory=ClockConfig)
    """When a device's clock is believed."""

    def __post_init__(self) -> None:
        """Refuse a pace that cannot work.

        Raises:
            ValueError: A value is out of its range.
        """
        if self.tick_s <= 0 or self.export_s < 0 or self.grace_s < 0:
            raise ValueError("tick_s must be above 0 s, export_s and grace_s at least 0 s")
        if not 1 <= self.export_rows_max <= 100_000 or self.export_rows_min < 1:
            raise ValueError("export_rows_max must be 1 to 100000, export_rows_min at least 1")
        if min(self.files_max, self.job_files_max) < 2 or self.job_rows_max < 1_000:
            raise ValueError("files_max and job_files_max must be at least 2, job_rows_max 1000")
        if min(self.fold_s) < 0 or min(self.groups_max, self.orphan_days) < 1:
            raise ValueError("fold_s must be at least 0 s, groups_max and orphan_days at least 1")
        fine, hour, day = self.keep_days
        if not 1 <= fine <= hour <= day or self.database_days < 0:
            raise ValueError("keep_days must be at least 1 and not fall; database_days at least 0")
        if not all(8 <= k <= 65_535 for k in self.kll_k):
            raise ValueError("kll_k must be 8 to 65535")
