"""The rules of ingest. Pure.

A number of a stream is stored, or told as lost, or neither; never both. Runs are (first, last),
both inclusive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def advance(upto: int, seqs: Iterable[int], runs: Sequence[tuple[int, int]]) -> int:
    """Return the last number of a stream before which nothing is missing.

    Args:
        upto: Where the last call came to.
        seqs: Stored numbers above ``upto``, ascending.
        runs: Runs (first, last) that stored gap records cover, in any order.

    Returns:
        The largest n such that each of upto + 1 … n is stored or covered.
    """
    covered = sorted(run for run in runs if run[1] > upto)
    held = iter(seqs)
    following = next(held, None)
    at = 0
    while True:
        while following is not None and following <= upto:
            following = next(held, None)
        while at < len(covered) and covered[at][1] <= upto:
            at += 1
        if following == upto + 1:
            upto += 1
        elif at < len(covered) and covered[at][0] <= upto + 1:
            upto = covered[at][1]
        else:
            return upto


def untold(
    runs: Sequence[tuple[int, int]], held: Iterable[int], told: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return which of the numbers that a gap record gives up are lost, and news.

    A device that never heard the acknowledgement of a record may give the record up: it is
    stored, so it is not lost.

    Args:
        runs: What the gap record says, ascending, disjoint.
        held: Stored numbers in reach of ``runs``.
        told: Runs that were entered before, in any order, disjoint.
    """
    found = []
    known = sorted([*told, *((number, number) for number in held)])
    at = 0
    for first, last in runs:
        while at < len(known) and known[at][1] < first:
            at += 1
        ahead = at
        while ahead < len(known) and known[ahead][0] <= last:
            if known[ahead][0] > first:
                found.append((first, known[ahead][0] - 1))
            first = max(first, known[ahead][1] + 1)
            ahead += 1
        if first <= last:
            found.append((first, last))
    return found
