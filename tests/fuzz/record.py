"""Fuzz the bank's record: whatever bytes come, they are a bank that keeps the rules, or refused.

    python tests/fuzz/record.py [--mutations 1000000] [--seed 0] [--deep 50]

Each mutation is a record of the corpus with bits flipped, bytes or fields set to values at the
edge, its end cut or grown, or a piece of another record inside; most get their checksum made right
again, for it refuses all others. What the reader takes is written again, byte for byte the same,
and every ``--deep`` of them becomes a bank that is read, merged, written and reset.
"""

from __future__ import annotations

import argparse
import random
import struct
import time
import zlib

import numpy as np

from shoal.ext import sketch_record
from shoal.ext.kll import read_kll
from shoal.ext.sketch import SketchBank, SketchMismatchError, SketchRecordError

BYTES = [0, 1, 2, 7, 8, 0x7F, 0x80, 0xF0, 0xFF]
REALS = [0.0, -0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 2.0**53, 1e308, 5e-324]


def corpus() -> list[bytes]:
    """Return records of many shapes: kinds, edges that travel, bins only, empty ones."""
    rng = np.random.default_rng(0)
    found = []
    for features in (1, 2, 5):
        for kinds in (None, ["float", "double", "integer", "category", "float"][:features]):
            for edges_n in (0, 3, 31):
                edges = [np.linspace(-2, 2, edges_n, dtype=np.float32)] * features
                bank = SketchBank(
                    features, k=int(rng.choice([8, 64, 200])), edges=edges, kinds=kinds
                )
                found.append(bank.to_bytes())
                for rows in (1, 50, 3000):
                    x__nd = rng.standard_normal((rows, features)).round(2)
                    x__nd[::7, 0] = np.nan
                    x__nd[::31, -1] = np.inf
                    bank.update(x__nd)
                    found += [bank.to_bytes(edges=rows == 50), bank.to_bytes(bins_only=True)]
    return found


def mutate(coins: random.Random, seeds: list[bytes]) -> bytes:
    """Return one mutation of one of the seeds."""
    data = bytearray(coins.choice(seeds))
    whole = coins.random() < 0.95
    if whole:
        del data[-4:]
    for _ in range(coins.choice((1, 1, 1, 2, 3))):
        at = coins.randrange(len(data)) if data else 0
        deed = coins.randrange(7)
        if not data or deed == 0:
            data += coins.randbytes(coins.randrange(1, 9))
        elif deed == 1:
            data[at] ^= 1 << coins.randrange(8)
        elif deed == 2:
            data[at] = coins.choice(BYTES)
        elif deed == 3:
            data[at : at + 8] = struct.pack("<d", coins.choice(REALS))
        elif deed == 4:
            data[at : at + 4] = struct.pack("<f", coins.choice([0.0, -0.0, 1.5, np.nan, np.inf]))
        elif deed == 5:
            del data[at : at + coins.randrange(1, 9)]
        else:
            other = coins.choice(seeds)
            begin = coins.randrange(len(other))
            data[at : at + coins.randrange(1, 40)] = other[begin : begin + coins.randrange(1, 40)]
    return bytes(data) + (struct.pack("<I", zlib.crc32(data)) if whole else b"")


def use(data: bytes) -> None:
    """Do with a record all that a server does; an assertion or a crash is the finding."""
    bank = SketchBank.from_bytes(data)
    for i in range(bank.features):
        moments = bank.moments(i)
        assert bank.counts(i).sum() == moments.count and not moments.variance < 0
        if bank.bins_only:
            continue
        if bank.kinds[i] != "category":
            assert read_kll(bank.kll_bytes(i)).n == moments.count
            assert bank.variance_certificate(i) >= 0
        if bank.kinds[i] in ("integer", "category"):
            assert bank.distinct(i)[0] >= 0
    SketchBank.from_bytes(bank.to_bytes())
    try:
        bank.merge(bank)
    except SketchMismatchError as error:
        assert "values together" in str(error)
    if data[5] & 1:
        bank.update(np.full((20, bank.features), 0.5))
    bank.reset()


def main() -> None:
    """Mutate until enough; print what was taken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deep", type=int, default=50, metavar="N", help="use each Nth taken")
    options = parser.parse_args()
    coins, seeds, taken = random.Random(options.seed), corpus(), 0
    begin = time.monotonic()
    for _ in range(options.mutations):
        data = mutate(coins, seeds)
        try:
            record = sketch_record.decode(data)
        except SketchRecordError:
            continue
        taken += 1
        assert sketch_record.encode(record) == data, data.hex()
        if taken % options.deep == 0:
            use(data)
    seconds = time.monotonic() - begin
    print(f"record: {options.mutations:,} mutations, {taken:,} taken, {seconds:.0f} s, none broke")


if __name__ == "__main__":
    main()
