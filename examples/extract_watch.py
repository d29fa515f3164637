"""Make watch.npz out of the data set that seglearn 1.2.5 carries; run once, by hand.

    pip download --no-deps seglearn==1.2.5 && unzip seglearn-1.2.5-*.whl
    python examples/extract_watch.py seglearn/data/watch_dataset.npy examples/watch.npz

The original is a pickled dictionary, which the product never loads: this script does, on the
machine of whoever repeats the extraction.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def extract(source: Path, target: Path) -> None:
    """Write the recordings as int16 with one scale per channel.

    Args:
        source: ``watch_dataset.npy`` of seglearn 1.2.5.
        target: The ``.npz`` to write.
    """
    raw = np.load(source, allow_pickle=True).item()
    samples = np.concatenate(raw["X"])
    scale = np.abs(samples).max(0) / 32_767
    np.savez_compressed(
        target,
        samples__nd=np.rint(samples / scale).astype("<i2"),
        scale__d=scale.astype("<f8"),
        length__r=np.array([len(each) for each in raw["X"]], "<i4"),
        subject__r=np.asarray(raw["subject"], "u1"),
        exercise__r=np.asarray(raw["y"], "u1"),
        side__r=np.asarray(raw["side"], "u1"),
    )


if __name__ == "__main__":
    extract(Path(sys.argv[1]), Path(sys.argv[2]))
