"""The rules of acknowledgement and of loss, against counting one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.server.ingest.rules import advance, untold

NUMBERS = st.sets(st.integers(1, 60))


def runs_of(numbers: set[int]) -> list[tuple[int, int]]:
    """Return numbers as ascending runs."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


@given(NUMBERS, NUMBERS, st.integers(0, 30))
def test_equals_counting_one_by_one(stored: set[int], lost: set[int], upto: int) -> None:
    """Advance = the plain loop over single numbers, whatever is stored or covered."""
    lost -= stored
    expected = upto
    while expected + 1 in stored or expected + 1 in lost:
        expected += 1
    told = runs_of(lost)[::-1]  # any order
    assert advance(upto, sorted(n for n in stored if n > upto), told) == expected


@given(NUMBERS, NUMBERS, NUMBERS)
def test_only_what_is_neither_stored_nor_told_is_lost(
    given_up: set[int], stored: set[int], before: set[int]
) -> None:
    """A number is stored, or lost, or neither; never both, and never lost twice."""
    found = untold(runs_of(given_up), sorted(stored, reverse=True), runs_of(before)[::-1])
    numbers = [n for first, last in found for n in range(first, last + 1)]
    assert len(numbers) == len(set(numbers))
    assert set(numbers) == given_up - stored - before
