"""What a device needs of a bundle's reference profile: how to count, and what is out of range.

    profile.json --from_json--> DeviceProfile --> sketch bank, quality counters, score table,
                                                  random features

The bundle is signed, and still nothing of it is believed: whatever bytes come, they yield a
profile within the bounds below, or ModelFormatError. What the server compares with (counts,
groups, quantiles, calibration) is skipped here. The writer is the server's ``drift/profile.py``;
its docstring has the fields.

D features (the input channels and, last, the confidence), C channels, F random features.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from .errors import ModelFormatError

BYTES_MAX: Final = 8 << 20
"""Of the JSON; the server writes no more. Most of a long profile is the server's tables in base64,
which cost a device their bytes and no objects: 17 MB and 0.04 s (x86) in all."""
VALUES_MAX: Final = 1 << 20
"""Commas and opening brackets in it: at least as many as numbers, lists and objects, which cost a
device 130 MB at most. 1,025 features of 256 bins and 64 items have three quarters of it, and no
profile of up to 1 MiB, as servers once wrote them, can have more."""
EDGES_MAX: Final = 255
NAME_CHARS_MAX: Final = 80
PROJECTED_MAX: Final = 256  # random features: 1 KiB of a record, some 0.3 us a row
STRIDE_MAX: Final = 1 << 24
WEIGHT_MAX: Final = 16.0  # per standard deviation: 64 times a usual weight of 4 channels
SCALE_MIN: Final = 1e-38  # 1 / scale must be a float32
DECILES: Final = 10
KINDS: Final = ("float", "double", "integer", "category")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceProjection:
    """Random features of a row of C channels: cos(weights . (row - mean) / scale + phases)."""

    weights__fc: NDArray[np.float32]
    """Finite, magnitude at most ``WEIGHT_MAX``."""
    phases__f: NDArray[np.float32]
    """0 to 2 pi, radians."""
    mean__c: NDArray[np.float32]
    scale__c: NDArray[np.float32]
    """Above ``SCALE_MIN``."""
    stride: int
    """A row is taken at every ``stride``-th sample of a window, the first at 0."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceProfile:
    """A checked profile; its arrays are read-only."""

    names: tuple[str, ...]
    """Names of the D features."""
    edges: tuple[NDArray[np.float32], ...]
    """Bin edges of each feature: 1 to 255, strictly ascending, finite."""
    kinds: tuple[str, ...]
    """What each feature is, one of ``KINDS``."""
    low__d: NDArray[np.float32]
    """A value below is out of range; -inf: nothing is."""
    high__d: NDArray[np.float32]
    """A value above is out of range; +inf: nothing is."""
    deciles__9: NDArray[np.float32]
    """Edges of the ten confidence bins: 9, ascending, some may be equal. A confidence is in bin
    ``np.searchsorted(deciles__9, confidence, side="right")``."""
    projection: DeviceProjection | None
    """None: the model's windows are not projected."""

    @classmethod
    def from_json(cls, data: bytes, *, features: int) -> Self:
        """Return the profile of a bundle.

        A profile of version 1 has no kinds (all are "float"), no ranges (nothing is out of them),
        no deciles (tenths take their place) and no projection.

        Args:
            data: ``profile.json`` of a bundle.
            features: How many features the model has: its channels and the confidence.

        Raises:
            ModelFormatError: Too long, not JSON, or a field is missing, ill-typed or out of
                bounds, or the model has another number of features.
        """
        if len(data) > BYTES_MAX:
            raise _damaged(f"{len(data)} bytes exceed {BYTES_MAX}")
        if sum(map(data.count, (b",", b"[", b"{"))) > VALUES_MAX:  # before they are made
            raise _damaged(f"it holds more than {VALUES_MAX} values")
        try:
            raw: Any = json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise _damaged(f"no JSON: {exc!s:.100}") from exc
        version = raw.get("version") if isinstance(raw, Mapping) else None
        if type(version) is not int or not 1 <= version <= 2:
            raise _damaged("no version 1 or 2")
        found = raw.get("features")
        if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
            raise _damaged("no list of features")
        if len(found) != features:
            raise ModelFormatError(
                f"the bundle's profile has {len(found)} features, the model needs {features}"
            )
        first = version == 1
        low, high = (
            np.full(features, bound, np.float32)
            if first
            else _floats([each.get(key) for each in found], features, key)
            for key, bound in (("low", -np.inf), ("high", np.inf))
        )
        if (low > high).any():
            raise _damaged("low above high")
        tenths = [i / DECILES for i in range(1, DECILES)]
        deciles = _floats(tenths if first else raw.get("deciles"), DECILES - 1, "deciles")
        if (np.diff(deciles) < 0).any() or deciles[0] < 0 or deciles[-1] > 1:
            raise _damaged("deciles that do not ascend from 0 to 1")
        projection = None if first else raw.get("projection")
        for array in (low, high, deciles):
            array.flags.writeable = False
        return cls(
            names=tuple(_name(each.get("name")) for each in found),
            edges=tuple(_edges(each.get("edges")) for each in found),
            kinds=tuple("float" if first else _kind(each.get("kind")) for each in found),
            low__d=low,
            high__d=high,
            deciles__9=deciles,
            projection=None if projection is None else _projection(projection, features - 1),
        )


def _damaged(what: str) -> ModelFormatError:
    return ModelFormatError(
        f"the bundle's profile is damaged: {what}; the model is not loaded",
        hint="build the bundle again, or update the agent",
    )


def _floats(raw: Any, size: int, name: str) -> NDArray[np.float32]:
    """Return numbers of JSON; each must be finite as a float32."""
    if not isinstance(raw, list) or len(raw) != size:
        raise _damaged(f"{name} is not {size} numbers")
    if not all(type(each) in (int, float) for each in raw):
        raise _damaged(f"{name} holds something that is no number")
    try:
        wide = np.array(raw, np.float64)
    except OverflowError as exc:
        raise _damaged(f"{name} is out of range") from exc
    return _finite(wide, name)


def _finite(wide: NDArray[Any], name: str) -> NDArray[np.float32]:
    # NaN compares false: it is refused too. No cast before the check: it would warn.
    if not (np.abs(wide) <= np.finfo(np.float32).max).all():
        raise _damaged(f"{name} is not finite")
    return wide.astype(np.float32)


def _name(raw: Any) -> str:
    if not isinstance(raw, str) or len(raw) > NAME_CHARS_MAX:
        raise _damaged("a feature has no short name")
    return raw


def _kind(raw: Any) -> str:
    if raw not in KINDS:
        raise _damaged(f"a feature is none of {', '.join(KINDS)}")
    return str(raw)


def _edges(raw: Any) -> NDArray[np.float32]:
    if not isinstance(raw, list) or not 1 <= len(raw) <= EDGES_MAX:
        raise _damaged(f"a feature does not have 1 to {EDGES_MAX} edges")
    found = _floats(raw, len(raw), "edges")
    if (found[1:] <= found[:-1]).any():
        raise _damaged("edges do not ascend")
    found.flags.writeable = False
    return found


def _projection(raw: Any, channels: int) -> DeviceProjection:
    if not isinstance(raw, Mapping):
        raise _damaged("the projection is no object")
    stride, count = raw.get("stride"), raw.get("features")
    if type(stride) is not int or not 1 <= stride <= STRIDE_MAX:
        raise _damaged("the projection's stride is out of range")
    if type(count) is not int or not 1 <= count <= PROJECTED_MAX:
        raise _damaged("the projection's features are out of range")
    weights__fc = _decoded(raw, "weights", "<f2", count * channels).reshape(count, channels)
    phases__f = _decoded(raw, "phases", "<f4", count)
    mean__c = _decoded(raw, "mean", "<f4", channels)
    scale__c = _decoded(raw, "scale", "<f4", channels)
    if (np.abs(weights__fc) > WEIGHT_MAX).any() or not (scale__c > SCALE_MIN).all():
        raise _damaged("the projection's weights or scale are out of range")
    if (phases__f < 0).any() or (phases__f > np.float32(2 * np.pi)).any():
        raise _damaged("the projection's phases are out of range")
    for array in (weights__fc, phases__f, mean__c, scale__c):
        array.flags.writeable = False
    return DeviceProjection(
        weights__fc=weights__fc,
        phases__f=phases__f,
        mean__c=mean__c,
        scale__c=scale__c,
        stride=stride,
    )


def _decoded(raw: Mapping[str, Any], name: str, dtype: str, size: int) -> NDArray[np.float32]:
    """Return the base64 of a little-endian array; the length is checked before it is decoded."""
    text = raw.get(name)
    size_bytes = size * np.dtype(dtype).itemsize
    if not isinstance(text, str) or len(text) != (size_bytes + 2) // 3 * 4:
        raise _damaged(f"the projection's {name} are not {size} numbers")
    try:
        data = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as exc:
        raise _damaged(f"the projection's {name} are no base64") from exc
    if len(data) != size_bytes:
        raise _damaged(f"the projection's {name} are not {size} numbers")
    return _finite(np.frombuffer(data, dtype), name)
