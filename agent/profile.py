"""What a device needs of a bundle's reference profile: the edges of its sketches."""

from __future__ import annotations

import json
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .errors import ModelFormatError

EDGES_MAX: Final = 255


def edges(profile: bytes, *, features: int) -> list[NDArray[np.float32]]:
    """Return the bin edges of each feature, the confidence last.

    Args:
        profile: ``profile.json`` of a bundle.
        features: How many features the model has: its channels and the confidence.

    Raises:
        ModelFormatError: The profile does not say them as it should.
    """
    try:
        found = [each["edges"] for each in json.loads(profile)["features"]]
        if not all(isinstance(e, list) and 1 <= len(e) <= EDGES_MAX for e in found):
            raise ValueError("not lists of edges")
        arrays = [np.array(each, np.float32) for each in found]
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise ModelFormatError(f"the bundle's profile is damaged: {exc!s:.100}") from exc
    if len(arrays) != features:
        raise ModelFormatError(
            f"the bundle's profile has {len(arrays)} features, the model needs {features}"
        )
    for each in arrays:
        if each.ndim != 1 or not np.isfinite(each).all() or (np.diff(each) <= 0).any():
            raise ModelFormatError("the bundle's profile has edges that do not ascend")
    return arrays
