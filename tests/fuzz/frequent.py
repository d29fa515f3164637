"""Mutate sketches of frequent items and read them.

    python tests/fuzz/frequent.py [--mutations 1000000] [--seed 0]

The invariant: whatever bytes come, from_bytes of FrequentItems and FrequentTexts returns a sketch
whose counts and error do not exceed its total, that merges without losing a bound and reads back
as itself, or it raises SketchRecordError.
"""

from __future__ import annotations

import argparse
import random
import time

import numpy as np

from shoal.ext.frequent import TOTAL_MAX, FrequentItems, FrequentTexts, SketchRecordError

WORDS = (0, 1, 2, 6, 7, 48, 255, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def seeds() -> list[bytes]:
    """Return sound sketches of both kinds, empty, exact and purged."""
    blobs = []
    for lg_max in (3, 4, 6):
        for n in (0, 1, 6, 7, 48, 500):
            numbers = np.arange(n) ** 2 % (n // 2 + 1)
            items, texts = FrequentItems(lg_max), FrequentTexts(lg_max)
            items.update(numbers)
            texts.update("é" * (number % 9) + str(number) for number in numbers.tolist())
            blobs += [items.to_bytes(), texts.to_bytes()]
    return blobs


def mutate(rng: random.Random, blobs: list[bytes]) -> bytes:
    """Return a sound sketch with one to three things wrong."""
    data = bytearray(rng.choice(blobs))
    for _ in range(rng.choice((1, 1, 2, 3))):
        deed, at = rng.randrange(9), rng.randrange(len(data) or 1)
        if deed == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif deed == 1 and data:
            data[at] = rng.randrange(256)
        elif deed == 2 and data:
            data[rng.randrange(min(12, len(data)))] = rng.randrange(17)
        elif deed == 3:
            at = at & ~7
            data[at : at + 8] = rng.choice(WORDS).to_bytes(8, "little")
        elif deed == 4:
            at = at & ~3
            data[at : at + 4] = (rng.choice(WORDS) & 2**32 - 1).to_bytes(4, "little")
        elif deed == 5:
            del data[at:]
        elif deed == 6:
            data += rng.randbytes(rng.choice((1, 4, 8, 16)))
        elif deed == 7:
            other = rng.choice(blobs)
            data[at:] = other[rng.randrange(len(other)) :]
        else:
            other = rng.choice(blobs)
            data[:32] = other[:32]
    return bytes(data)


def check_items(data: bytes, standing: FrequentItems) -> bool:
    """Return whether bytes were taken for a sketch; raise if the invariant is broken."""
    try:
        sketch = FrequentItems.from_bytes(data)
    except SketchRecordError:
        return False
    rows = sketch.items(threshold=0)
    assert sum(low for _, low, _ in rows) + sketch.error_max <= sketch.total <= TOTAL_MAX
    written = sketch.to_bytes()
    assert FrequentItems.from_bytes(written).to_bytes() == written
    if sketch.total > TOTAL_MAX - standing.total:
        standing.reset()
    before = standing.error_max + sketch.error_max
    standing.merge(sketch)
    assert standing.error_max >= before
    for item, low, _ in rows[:3]:
        assert standing.estimate(item)[1] >= low
    return True


def check_texts(data: bytes, standing: FrequentTexts) -> bool:
    """Return whether bytes were taken for a sketch; raise if the invariant is broken."""
    try:
        sketch = FrequentTexts.from_bytes(data)
    except SketchRecordError:
        return False
    rows = sketch.items(threshold=0)
    assert sum(low for _, low, _ in rows) + sketch.error_max <= sketch.total <= TOTAL_MAX
    written = sketch.to_bytes()
    assert FrequentTexts.from_bytes(written).to_bytes() == written
    if sketch.total > TOTAL_MAX - standing.total:
        standing.reset()
    before = standing.error_max + sketch.error_max
    standing.merge(sketch)
    assert standing.error_max >= before
    for text, low, _ in rows[:3]:
        assert standing.estimate(text)[1] >= low
    return True


def main() -> None:
    """Run and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, blobs, begin = random.Random(args.seed), seeds(), time.monotonic()
    items, texts, taken = FrequentItems(4), FrequentTexts(4), 0
    for i, blob in enumerate(blobs):
        assert check_texts(blob, texts) if i % 2 else check_items(blob, items), blob.hex()
    for i in range(args.mutations):
        if i % 256 == 0:
            items, texts = FrequentItems(rng.randrange(3, 9)), FrequentTexts(rng.randrange(3, 9))
        data = mutate(rng, blobs)
        try:
            taken += check_items(data, items) | check_texts(data, texts)
        except Exception:
            print(f"mutation {i} of seed {args.seed} broke the invariant: {data.hex()}")
            raise
    seconds = time.monotonic() - begin
    print(
        f"frequent: {args.mutations} mutations of seed {args.seed}, {taken} taken, "
        f"{args.mutations - taken} refused, {args.mutations / max(seconds, 1e-9) * 60:.0f} a minute"
    )


if __name__ == "__main__":
    main()
