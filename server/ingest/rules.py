"""The rules of ingest. Pure."""

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
