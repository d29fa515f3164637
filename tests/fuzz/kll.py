"""Fuzz the KLL reader: whatever bytes come, they are a sketch that keeps the rules, or refused.

    python tests/fuzz/kll.py [--mutations 1000000] [--seed 0] [--deep 100]

Each mutation is a sketch of the corpus with bits flipped, bytes or whole fields set to values
at the edge, its end cut or grown, or a piece of another sketch inside. Bytes that the reader takes
are read once more in Python and their invariant is asserted, and every ``--deep`` of them is merged
(all of them with ``--deep 1``): a merger then holds exactly n values.

Sanitizers: build ext/_kll.pyx with ``-g -O1 -fsanitize=address,undefined``, then run this with
LD_PRELOAD of libasan.so and libubsan.so and ASAN_OPTIONS=detect_leaks=0.
"""

from __future__ import annotations

import argparse
import random
import struct
import time
from pathlib import Path

import numpy as np
from datasketches import kll_doubles_sketch, kll_floats_sketch

from shoal.ext import _kll
from shoal.ext.kll import BulkMerger, SketchRecordError, read_kll

EDGES = {
    1: [0, 1, 2, 3, 4, 5, 6, 7, 8, 15, 53, 54, 55, 61, 62, 127, 128, 255],
    2: [0, 1, 7, 8, 9, 199, 200, 201, 0x7FFF, 0x8000, 0xFFFF],
    4: [0, 1, 199, 200, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FC00000, 0x7F800000, 0xFF800000],
    8: [0, 1, 2, 2**32 - 1, 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 0x7FF8 << 48],
}
FORMATS = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}


def corpus() -> list[bytes]:
    """Return sketches of many k and n, of both types, merged ones among them."""
    rng = np.random.default_rng(0)
    found = []
    for kind, dtype in ((kll_floats_sketch, np.float32), (kll_doubles_sketch, np.float64)):
        for k in (8, 9, 64, 200):
            whole = kind(k)
            for n in (0, 1, 2, 3, 17, 100, 1000, 20_000):
                sketch = kind(k)
                sketch.update(rng.standard_normal(n).astype(dtype))
                whole.merge(sketch)
                found += [sketch.serialize(), whole.serialize()]
    return found


def mutate(coins: random.Random, seeds: list[bytes]) -> bytes:
    """Return one mutation of one of the seeds."""
    data = bytearray(coins.choice(seeds))
    for _ in range(coins.choice((1, 1, 1, 2, 3, 8))):
        deed = coins.randrange(6)
        size = len(data)
        if deed == 0 and size:
            data[coins.randrange(size)] ^= 1 << coins.randrange(8)
        elif deed == 1 and size:
            data[coins.randrange(size)] = coins.randrange(256)
        elif deed == 2:
            width = coins.choice((1, 2, 4, 8))
            reach = coins.choice((20, 60, size)) - width
            if 0 <= reach <= size - width:
                value = coins.choice(EDGES[width])
                struct.pack_into(FORMATS[width], data, coins.randrange(reach + 1), value)
        elif deed == 3:
            del data[coins.randrange(size + 1) :]
        elif deed == 4:
            data += coins.randbytes(coins.choice((1, 2, 4, 8, 40)))
        else:
            other = coins.choice(seeds)
            at, begin = coins.randrange(size + 1), coins.randrange(len(other))
            piece = other[begin : begin + coins.choice((1, 4, 8, 64))]
            data[at : at + len(piece) * coins.randrange(2)] = piece
    return bytes(data)


def check(data: bytes, *, deep: bool) -> None:
    """Assert the invariant for bytes that the reader took."""
    sketch = read_kll(data)
    assert sketch.weights.sum() == sketch.n
    assert (sketch.values[:-1] <= sketch.values[1:]).all()
    if sketch.n:
        assert sketch.minimum <= sketch.values[0] and sketch.values[-1] <= sketch.maximum
    if deep:
        merger = BulkMerger(64, seed=0)
        merger.add_many([data] * min(20, (1 << 53) // max(1, sketch.n)))
        _, _, n, _, _, _, tiles = merger.dump()
        size = 8 if sketch.values.dtype == np.float64 else 4
        assert n == sum(len(items) // size << level for level, items in tiles)


def main() -> None:
    """Mutate and read; print how many were taken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deep", type=int, default=100, help="merge each so-many-th taken")
    parser.add_argument("--keep", type=Path, help="write each mutation here before it is read")
    options = parser.parse_args()
    coins, seeds, taken = random.Random(options.seed), corpus(), 0
    begin = time.monotonic()
    for _ in range(options.mutations):
        data = mutate(coins, seeds)
        if options.keep is not None:
            options.keep.write_bytes(data)
        if _kll.parses(data):
            taken += 1
            check(data, deep=taken % options.deep == 0)
        elif taken % options.deep == 0:
            try:
                read_kll(data)
            except SketchRecordError:
                continue
            raise AssertionError(f"refused and taken: {data.hex()}")
    passed_s = time.monotonic() - begin
    print(f"{options.mutations} mutations in {passed_s:.0f} s, {taken} taken, seed {options.seed}")


if __name__ == "__main__":
    main()
