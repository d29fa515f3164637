"""Read a labelled data set, and the source that a bundle is built from; trust nothing in them.

A data set is an ``.npz`` of x__nct float32, y__n int64, split__n uint8 (0 train, 1 validation,
2 test), group__n int64 and the JSON texts ``channels`` and ``classes``. A JSON text ``kinds`` may
say what each channel is, see :class:`Dataset`. A source is the float model with the training and
validation windows of the data set it was made from: all that is needed to build a bundle with
other parameters later.

N windows, C channels, T samples.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from ..drift.profile_feature import KINDS, RESERVED
from .errors import DatasetError
from .fit import check_windows

TRAIN: Final = 0
VALIDATION: Final = 1
SPLITS: Final = 3
NAMES_MAX: Final = 1024  # of channels or classes, as in a manifest
NAME_CHARS_MAX: Final = 80
CODE_MAX: Final = 1 << 24  # a float32 tells whole numbers up to here from their neighbours
_KINDS_HINT: Final = 'e.g. np.array(json.dumps(["float", "category"]))'
_TIME: Final = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """Bounds of a data set."""

    bytes_max: int = 1 << 30
    """Size of the file and, uncompressed, of its arrays."""
    windows_min: int = 16
    """Training windows; fewer are a mistake."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.bytes_max < 1 or self.windows_min < 1:
            raise ValueError("bytes_max and windows_min must be at least 1")


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """A checked data set."""

    x__nct: NDArray[np.float32]
    y__n: NDArray[np.int64]
    split__n: NDArray[np.uint8]
    group__n: NDArray[np.int64]
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    """What each channel is: "float" (a real number), "integer" (a count: whole, ordered) or
    "category" (a code: whole, its order means nothing); empty: all are "float".

    Whole numbers are -2**24 to 2**24. "double", which a reference profile knows too, is refused:
    windows are float32, so its sketch would hold the same values in twice the bytes.
    """

    def of(self, split: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return (x__nct, y__n) of a split."""
        rows = self.split__n == split
        return self.x__nct[rows], self.y__n[rows]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A float model and the windows that a bundle of it is built from."""

    model: onnx.ModelProto
    dataset: Dataset
    """Without the test windows."""

    def to_bytes(self) -> bytes:
        """Return the ``.npz``; the same source makes the same bytes."""
        data = self.dataset
        arrays: dict[str, NDArray[Any]] = {
            "model": np.frombuffer(self.model.SerializeToString(deterministic=True), np.uint8),
            "x__nct": data.x__nct,
            "y__n": data.y__n,
            "split__n": data.split__n,
            "group__n": data.group__n,
            "channels": np.array(json.dumps(data.channels)),
            "classes": np.array(json.dumps(data.classes)),
        }
        if data.kinds:  # a source from before there were kinds keeps its bytes
            arrays["kinds"] = np.array(json.dumps(data.kinds))
        return npz(arrays)


def read_dataset(path: Path, *, config: DatasetConfig | None = None) -> Dataset:
    """Return the data set in a file.

    Raises:
        DatasetError: It is not one; the message says what is wrong.
    """
    config = config or DatasetConfig()
    return _dataset(_arrays(path, config), config)


def read_source(path: Path, *, config: DatasetConfig | None = None) -> Source:
    """Return the source in a file.

    Raises:
        DatasetError: It is not one.
    """
    config = config or DatasetConfig()
    arrays = _arrays(path, config)
    try:
        model = onnx.load_from_string(arrays.pop("model").tobytes())
    except (KeyError, DecodeError, ValueError) as exc:
        raise DatasetError(f"the source holds no model: {exc!s:.200}") from exc
    return Source(model, _dataset(arrays, config))


def npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the bytes of an uncompressed ``.npz`` without times: equal arrays, equal bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            part = io.BytesIO()
            np.lib.format.write_array(part, np.asarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _TIME), part.getvalue())
    return out.getvalue()


def _arrays(path: Path, config: DatasetConfig) -> dict[str, NDArray[Any]]:
    try:
        if path.stat().st_size > config.bytes_max:
            raise DatasetError(f"the data set is larger than {config.bytes_max} bytes")
        with zipfile.ZipFile(path) as archive:  # before numpy allocates what a header claims
            if sum(each.file_size for each in archive.infolist()) > config.bytes_max:
                raise DatasetError(f"the data set inflates to more than {config.bytes_max} bytes")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as exc:
        raise DatasetError(
            f"the data set cannot be read: {exc!s:.200}", hint="upload an .npz made by numpy.savez"
        ) from exc


def _dataset(arrays: Mapping[str, NDArray[Any]], config: DatasetConfig) -> Dataset:
    need = {"x__nct", "y__n", "split__n", "group__n", "channels", "classes"}
    if set(arrays) - {"kinds"} != need:
        raise DatasetError(
            f"the data set holds {sorted(arrays)!r:.200}, not {sorted(need)} and, at will, kinds"
        )
    channels, classes = (_names(arrays[name], name) for name in ("channels", "classes"))
    x, y, split, group = (arrays[name] for name in ("x__nct", "y__n", "split__n", "group__n"))
    check_windows(x, y, classes=len(classes))
    if x.shape[1] != len(channels):
        raise DatasetError(f"the windows have {x.shape[1]} channels, {len(channels)} are named")
    if len({*channels, *RESERVED}) != len(channels) + len(RESERVED):
        raise DatasetError(
            f"channels need different names, none of them {', '.join(RESERVED)}",
            hint="rename it, e.g. gps_accuracy",
        )
    for name, array, dtype in (("split__n", split, np.uint8), ("group__n", group, np.int64)):
        if array.dtype != dtype or array.shape != y.shape:
            raise DatasetError(f"{name} must be {np.dtype(dtype)} with one entry per window")
    if split.max() >= SPLITS:
        raise DatasetError("split__n holds something else than 0 train, 1 validation, 2 test")
    count = int((split == TRAIN).sum())
    if count < config.windows_min or not (split == VALIDATION).any():
        raise DatasetError(
            f"{count} training windows; {config.windows_min} and one for validation are needed"
        )
    kinds = _kinds(arrays["kinds"], channels) if "kinds" in arrays else ()
    for i, kind in enumerate(kinds):
        if kind in ("integer", "category"):
            _check_whole(x[:, i], channels[i], kind)
    return Dataset(np.ascontiguousarray(x), y, split, group, channels, classes, kinds)


def _names(array: NDArray[Any], name: str) -> tuple[str, ...]:
    try:
        found = json.loads(str(array[()]))
    except (ValueError, RecursionError) as exc:
        raise DatasetError(f"{name} is not the JSON of a list of names") from exc
    if isinstance(found, list) and len(found) > NAMES_MAX:
        other = "train several models" if name == "channels" else "join rare ones"
        raise DatasetError(
            f"the data set has {len(found)} {name}, a model at most {NAMES_MAX}",
            hint=f"leave out {name}, or {other}",
        )
    if not isinstance(found, list) or not found:
        raise DatasetError(f"{name} must list 1 to {NAMES_MAX} names")
    if not all(isinstance(each, str) and 0 < len(each) <= NAME_CHARS_MAX for each in found):
        raise DatasetError(f"{name} holds something that is no short name")
    try:
        "".join(found).encode()
    except UnicodeEncodeError as exc:  # half a surrogate pair: no database takes it
        raise DatasetError(f"{name} holds something that is no text") from exc
    return tuple(found)


def _kinds(array: NDArray[Any], channels: tuple[str, ...]) -> tuple[str, ...]:
    try:
        found = json.loads(str(array[()]))
    except (ValueError, RecursionError) as exc:
        raise DatasetError("kinds is not the JSON of a list of kinds", hint=_KINDS_HINT) from exc
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise DatasetError("kinds must list texts, one for each channel", hint=_KINDS_HINT)
    if len(found) != len(channels):
        raise DatasetError(f"{len(found)} kinds are listed, there are {len(channels)} channels")
    for name, kind in zip(channels, found, strict=True):
        if kind == "double":
            raise DatasetError(
                f"channel {name} is of kind double, and windows are float32",
                hint="say float: it keeps all that a float32 holds",
            )
        if kind not in KINDS:
            raise DatasetError(
                f"channel {name} is of kind {kind!r:.40}", hint="say float, integer or category"
            )
    return tuple(found)


def _check_whole(values: NDArray[np.float32], name: str, kind: str) -> None:
    bad = (np.abs(values) > CODE_MAX) | (values != np.rint(values))
    if bad.any():
        other = "number the categories from 0 on" if kind == "category" else "say float"
        raise DatasetError(
            f"channel {name} is of kind {kind} and holds {float(values[bad][0]):.9g}, which is no "
            f"whole number from -{CODE_MAX} to {CODE_MAX}",
            hint=f"round its values, or {other}",
        )
