"""Mutate HLL sketches and read them.

    python tests/fuzz/distinct.py [--mutations 1000000] [--seed 0]

The invariant: whatever bytes come, HllSketch.from_bytes returns a sketch that writes, merges and
estimates like any other and reads back as itself, or it raises SketchRecordError.
"""

from __future__ import annotations

import argparse
import random
import time

import numpy as np
from numpy.typing import NDArray

from shoal.ext.hll import HllSketch, SketchRecordError

WORDS = (0, 1, 7, 8, 24, 255, 2**26 - 1, 2**26, 2**31, 2**32 - 1, 63 << 26)


def seeds() -> list[bytes]:
    """Return sound sketches of every mode and kind, with exceptions among them."""
    blobs = []
    for lg_k in (4, 5, 8, 10):
        for n in (0, 1, 7, 8, 24, 90, 2000):
            sketch = HllSketch(lg_k)
            sketch.update(np.arange(n) * 7919)
            blobs += [sketch.to_bytes("hll4"), sketch.to_bytes("hll8")]
            if blobs[-1][7] & 3 == 2:
                blobs += [six_bits(sketch), exceptional(sketch)]
    return blobs


def six_bits(sketch: HllSketch) -> bytes:
    """Return the HLL_6 form, which we read but do not write."""
    registers = np.frombuffer(sketch.registers(), np.uint8)
    bits = np.unpackbits(registers, bitorder="little").reshape(-1, 8)[:, :6]
    head = bytearray(sketch.to_bytes("hll8")[:40])
    head[7] = 2 | 1 << 2
    return bytes(head) + np.packbits(bits, bitorder="little").tobytes() + b"\0"


def exceptional(sketch: HllSketch) -> bytes:
    """Return the HLL_4 form with two registers so high that they are exceptions."""
    wide = bytearray(sketch.to_bytes("hll8"))
    wide[41], wide[44] = 62, 63
    return HllSketch.from_bytes(wide).to_bytes("hll4")


def folded(registers: bytes, lg_k: int) -> NDArray[np.uint8]:
    """Return the registers that a sketch with a smaller lg_k would have."""
    every: NDArray[np.uint8] = np.frombuffer(registers, np.uint8).reshape(-1, 1 << lg_k)
    return np.asarray(every.max(axis=0))


def mutate(rng: random.Random, blobs: list[bytes]) -> bytes:
    """Return a sound sketch with one to three things wrong."""
    data = bytearray(rng.choice(blobs))
    for _ in range(rng.choice((1, 1, 2, 3))):
        deed, at = rng.randrange(8), rng.randrange(len(data) or 1)
        if deed == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif deed == 1 and data:
            data[at] = rng.randrange(256)
        elif deed == 2 and data:
            data[rng.randrange(min(8, len(data)))] = rng.randrange(23)
        elif deed == 3:
            at = at & ~3
            data[at : at + 4] = rng.choice(WORDS).to_bytes(4, "little")
        elif deed == 4:
            del data[at:]
        elif deed == 5:
            data += rng.randbytes(rng.choice((1, 4, 8, 16)))
        elif deed == 6:
            other = rng.choice(blobs)
            data[at:] = other[rng.randrange(len(other)) :]
        else:
            other = rng.choice(blobs)
            data[:8] = other[:8]
    return bytes(data)


def check(data: bytes, standing: HllSketch) -> bool:
    """Return whether bytes were taken for a sketch; raise if the invariant is broken."""
    try:
        sketch = HllSketch.from_bytes(data)
    except SketchRecordError:
        return False
    estimate, (low, high) = sketch.estimate(), sketch.bounds()
    assert 0.0 <= estimate <= 2.0**88 and 0.0 <= low <= high, (estimate, low, high)
    written = sketch.to_bytes("hll4")
    again = HllSketch.from_bytes(written)
    assert again.registers() == sketch.registers() and again.to_bytes() == written
    assert HllSketch.from_bytes(sketch.to_bytes("hll8")).to_bytes() == written
    before = standing.registers()
    standing.merge(sketch)
    lg_k = min(standing.lg_k, sketch.lg_k)
    union = np.maximum(folded(before, lg_k), folded(sketch.registers(), lg_k))
    assert np.array_equal(union, folded(standing.registers(), lg_k))
    return True


def main() -> None:
    """Run and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, blobs, taken, begin = random.Random(args.seed), seeds(), 0, time.monotonic()
    for blob in blobs:
        assert check(blob, HllSketch(10)), blob.hex()
    standing = HllSketch(10)
    for i in range(args.mutations):
        if i % 256 == 0:
            standing = HllSketch(rng.randrange(4, 13))
        data = mutate(rng, blobs)
        try:
            taken += check(data, standing)
        except Exception:
            print(f"mutation {i} of seed {args.seed} broke the invariant: {data.hex()}")
            raise
    seconds = time.monotonic() - begin
    print(
        f"distinct: {args.mutations} mutations of seed {args.seed}, {taken} taken, "
        f"{args.mutations - taken} refused, {args.mutations / max(seconds, 1e-9) * 60:.0f} a minute"
    )


if __name__ == "__main__":
    main()
