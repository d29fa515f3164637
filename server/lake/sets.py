"""Merge the set sketches of integer and category features: distinct counts and frequent items.

Few features have them, so these merge one by one.

Axes: R rows, G groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...ext.frequent import FrequentItems
from ...ext.hll import HllSketch

Kind = type[HllSketch] | type[FrequentItems]


def merge(column: Any, kind: Kind, group__r: NDArray[np.int64], groups: int) -> Any:
    """Return the sketches of each group together.

    Args:
        column: HLL or frequent items (int64) as Apache DataSketches bytes, or null; R of them.
        kind: Which of the two.
        group__r: Group of each row, 0 to G - 1.
        groups: G.

    Returns:
        Apache DataSketches bytes, G of them; null for a group without a sketch.

    Raises:
        SketchRecordError: The bytes of a row are damaged.
    """
    found: dict[int, Any] = {}
    there = np.flatnonzero(column.is_valid().to_numpy())
    for row, blob in zip(there.tolist(), column.drop_null().to_pylist(), strict=True):
        group = int(group__r[row])
        sketch = kind.from_bytes(blob)
        if group in found:
            found[group].merge(sketch)
        else:
            found[group] = sketch
    blobs = [found[group].to_bytes() if group in found else None for group in range(groups)]
    return pa.array(blobs, pa.binary())
