"""The rule of acknowledgement: the last number before which nothing is missing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.server.ingest.rules import advance

NUMBERS = st.sets(st.integers(1, 60))


@given(NUMBERS, NUMBERS, st.integers(0, 30))
def test_equals_counting_one_by_one(stored: set[int], lost: set[int], upto: int) -> None:
    """Advance = the plain loop over single numbers, whatever is stored or covered."""
    lost -= stored
    expected = upto
    while expected + 1 in stored or expected + 1 in lost:
        expected += 1
    runs: list[tuple[int, int]] = []
    for number in sorted(lost, reverse=True):
        if runs and runs[-1][0] == number + 1:
            runs[-1] = (number, runs[-1][1])
        else:
            runs.append((number, number))
    assert advance(upto, sorted(n for n in stored if n > upto), runs) == expected
