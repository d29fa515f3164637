"""Decide which raw inputs leave the device, and how many bytes of them: by default none.

    prediction --random, near a threshold, out of range--> wanted --budget--> CAPTURE record

Pure: time and chance are arguments. The kernel's tap compares every prediction with the numbers
that this policy gives it and holds one input at a time; what it holds comes here.

The budget is a bucket that is empty at first, holds an eighth of the day's bytes, and fills with
the other seven eighths over 24 hours of the monotonic clock. So no 24 hours see more than the
day's bytes, whatever the wall clock does and however often the agent starts.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Final

DAY_S: Final = 86_400.0
CAPTURE_BYTES_MAX: Final = 32 << 10  # of one input, as the record's contract says
RECORD_EXTRA_BYTES: Final = 256  # a record around an input: 64 of them are the digest
_BURST: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureConfig:
    """Which raw inputs are sent. Each rule is off by default; so is the whole without a budget."""

    bytes_per_day: int = 0
    """Budget in bytes of any 24 hours, at least 4096 if a rule is on; 0: nothing is captured."""
    random_share: float = 0.0
    """Share of predictions that are wanted by chance, 0 to 1."""
    margin_below: float = 0.0
    """A prediction is wanted whose best two classes are less apart, as probabilities, 0 to 1;
    0: none is."""
    outside_above: float = 1.0
    """A prediction is wanted if a greater share of its values is out of the profile's range, 0 to
    1; 1: none is."""

    def __post_init__(self) -> None:
        """Check the limits."""
        shares = (self.random_share, self.margin_below, self.outside_above)
        if not all(0 <= each <= 1 for each in shares):
            raise ValueError("random_share, margin_below and outside_above must be 0 to 1")
        if not 0 <= self.bytes_per_day <= 1 << 40:
            raise ValueError("bytes_per_day must be 0 to 1 TiB")
        wanted = self.random_share > 0 or self.margin_below > 0 or self.outside_above < 1
        if wanted and self.bytes_per_day < 4096:
            raise ValueError("a capture rule needs bytes_per_day of at least 4096 bytes")

    @property
    def on(self) -> bool:
        """Whether anything may be captured."""
        return self.bytes_per_day > 0 and (
            self.random_share > 0 or self.margin_below > 0 or self.outside_above < 1
        )


class CapturePolicy:
    """Rules and budget of one agent's captures. Any thread may call it.

    Attributes:
        spent_bytes: Bytes granted so far.
        refused: Captures that the budget did not allow, or that could not be sent.
    """

    def __init__(self, config: CaptureConfig, *, now_s: float) -> None:
        """Start with an empty bucket.

        Args:
            config: Rules and budget.
            now_s: Monotonic seconds.
        """
        self._config = config
        self._room_max = config.bytes_per_day // _BURST
        self._rate_bs = (config.bytes_per_day - self._room_max) / DAY_S
        self._room = 0.0
        self._lock = threading.Lock()
        self._now_s = now_s
        self.spent_bytes = 0
        self.refused = 0

    def fits(self, input_bytes: int) -> bool:
        """Return whether an input of this size can ever be captured."""
        room = self._room_max - RECORD_EXTRA_BYTES
        return self._config.on and input_bytes <= min(CAPTURE_BYTES_MAX, room)

    def random_in(self, chance: float) -> int:
        """Return after how many predictions the next is wanted by chance; -1: none is.

        Args:
            chance: Uniform, 0 <= chance < 1. The result has the distribution of waiting for a
                prediction that is chosen with probability ``random_share``, each by itself.
        """
        share = self._config.random_share
        if share <= 0:
            return -1
        if share >= 1:
            return 1
        return 1 + min(1 << 52, int(math.log1p(-chance) / math.log1p(-share)))

    def spend(self, input_bytes: int, *, now_s: float) -> bool:
        """Take an input's bytes, and those of the record around it, from the budget.

        Args:
            input_bytes: Size of the input.
            now_s: Monotonic seconds; one that is earlier than before counts as the same moment.

        Returns:
            Whether it may be sent; if not, nothing was taken and ``refused`` grew.
        """
        with self._lock:
            elapsed_s = max(0.0, now_s - self._now_s)
            self._now_s += elapsed_s
            self._room = min(self._room_max, self._room + elapsed_s * self._rate_bs)
            size = input_bytes + RECORD_EXTRA_BYTES
            if size > self._room:
                self.refused += 1
                return False
            self._room -= size
            self.spent_bytes += size
            return True

    def refuse(self) -> None:
        """Count a granted capture that could not be sent; its bytes stay spent."""
        with self._lock:
            self.refused += 1
