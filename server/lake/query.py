"""What is asked of the lake, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa

from ..errors import InvalidError
from .kll import Sketches
from .rules import DAY_MS, HOUR_MS

GROUPS: Final = ("fleet", "device", "site", "hardware", "slice")
EVERY: Final = {"": 0, "hour": HOUR_MS, "day": DAY_MS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What is asked."""

    model: str
    """Digest of the model, hex."""
    since_ms: int
    """Begin, Unix ms, inclusive; taken down to a whole step (5 min, or what is still kept)."""
    until_ms: int
    """End, exclusive; taken up."""
    group_by: str = "fleet"
    """fleet (one group), device, site, hardware or slice."""
    every: str = ""
    """hour or day: one answer for each; "" = one for the whole range."""
    features: tuple[str, ...] = ()
    """Names of the features asked for; none = all."""
    where: Mapping[str, str] = field(default_factory=dict)
    """Only windows of this device, site, hardware or slice."""

    def __post_init__(self) -> None:
        """Refuse what cannot be asked.

        Raises:
            InvalidError: A name is unknown.
        """
        if self.group_by not in GROUPS or self.every not in EVERY:
            raise InvalidError(
                f"windows are not grouped by {self.group_by!r} every {self.every!r}",
                hint=f"group by {', '.join(GROUPS)}; every hour or day",
            )
        if unknown := set(self.where) - set(GROUPS[1:]):
            raise InvalidError(f"windows have no {', '.join(sorted(unknown))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Merged counters."""

    since_ms: int
    until_ms: int
    """The range that was really answered; at least the one asked for."""
    table: pa.Table
    """One row per group, bucket and feature (or split): ``group``, ``bucket_ms``, the counters."""
    sketches: Sketches | None
    """The sketches of each row of the table; of features only."""
