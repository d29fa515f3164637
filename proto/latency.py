"""The latency histogram that windows carry: 64 fixed bins, so that counts add across a fleet.

bin i holds latencies in [EDGES_US[i-1], EDGES_US[i]) microseconds; bin 0 starts at 0,
bin 63 has no end. Edges grow by 2**(1/3): a percentile is known within 26 %, from 1 us to 2 s.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

EDGES_US: Final[tuple[float, ...]] = tuple(float(2.0 ** (i / 3)) for i in range(63))
BINS: Final = len(EDGES_US) + 1


def bin_of(latency_us: float) -> int:
    """Return the bin of a latency in microseconds, 0 to 63."""
    return bisect_right(EDGES_US, latency_us)


def quantile_us(counts: Sequence[int], share: float) -> float:
    """Return the latency below which ``share`` of the counted calls stayed.

    Args:
        counts: 64 counts, or fewer when the last ones are zero.
        share: 0 < share <= 1.

    Returns:
        The upper edge of the bin that reaches the share, in microseconds (a bound from above,
        within a factor 2**(1/3)); 0 when nothing was counted.
    """
    need, seen = share * sum(counts), 0
    if not need:
        return 0.0
    for i, count in enumerate(counts):
        seen += count
        if seen >= need:
            return EDGES_US[min(i, len(EDGES_US) - 1)]
    return EDGES_US[-1]
