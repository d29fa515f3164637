"""Check the fields of a profile's JSON: each returns what was asked for, or raises ProfileError.

Nothing is computed with, and nothing allocated for, what has not passed here.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .errors import ProfileError

COUNT_MAX: Final = 2**53
NAME_CHARS_MAX: Final = 80
FLOAT_MAX: Final = float(np.finfo(np.float32).max)
COUNT_SIZES: Final = (1, 2, 4, 8)
"""Bytes of a count in a packed table: the fewest that hold its largest one."""


def mapping(raw: Any, name: str) -> Mapping[str, Any]:
    """Return an object."""
    if not isinstance(raw, Mapping):
        raise ProfileError(f"the profile's {name} is no object")
    return raw


def items(raw: Mapping[str, Any], name: str, *, bound: int) -> list[Any]:
    """Return a list of at most ``bound`` items."""
    found = raw.get(name)
    if not isinstance(found, list) or len(found) > bound:
        raise ProfileError(f"the profile's {name} is not a list of at most {bound}")
    return found


def whole(raw: Mapping[str, Any], name: str, *, low: int = 0, high: int = COUNT_MAX) -> int:
    """Return an integer, ``low`` to ``high``."""
    found = raw.get(name)
    if type(found) is not int or not low <= found <= high:
        raise ProfileError(f"the profile's {name} is not a whole number of {low} to {high}")
    return found


def counts(raw: Any, size: int, name: str) -> tuple[int, ...]:
    """Return ``size`` counts, each 0 to 2**53."""
    if not isinstance(raw, list) or len(raw) != size:
        raise ProfileError(f"the profile's {name} is not a list of {size} counts")
    if not all(type(count) is int and 0 <= count <= COUNT_MAX for count in raw):
        raise ProfileError(f"the profile's {name} holds something that is no count")
    return tuple(raw)


def tables(raw: Any, rows: int, columns: int, name: str) -> tuple[tuple[int, ...], ...]:
    """Return ``rows`` rows of ``columns`` counts: of lists, or of what :func:`table_text` makes."""
    if isinstance(raw, str):
        return _unpacked(raw, rows, columns, name)
    if not isinstance(raw, list) or len(raw) != rows:
        raise ProfileError(f"the profile's {name} is not a list of {rows} rows of counts")
    return tuple(counts(row, columns, name) for row in raw)


def real(raw: Mapping[str, Any], name: str, *, low: float, high: float) -> float:
    """Return a number, ``low`` to ``high``; NaN is none."""
    found = raw.get(name)
    if type(found) is not float or not low <= found <= high:
        raise ProfileError(f"the profile's {name} is not a number of {low} to {high}")
    return found


def float32s(raw: Any, size: int, name: str) -> tuple[float, ...]:
    """Return ``size`` finite float32, each written exactly or as :func:`short` writes it."""
    if not isinstance(raw, list) or len(raw) != size:
        raise ProfileError(f"the profile's {name} is not a list of {size} numbers")
    if not all(type(each) is float and abs(each) <= FLOAT_MAX for each in raw):
        raise ProfileError(f"the profile's {name} holds what is no finite float32")
    found = tuple(float(each) for each in np.array(raw, np.float64).astype(np.float32))
    if any(b not in (a, c) for a, b, c in zip(found, raw, short(found), strict=True)):
        raise ProfileError(f"the profile's {name} holds what is no float32")
    return found


def short(values: Sequence[float]) -> tuple[float, ...]:
    """Return numbers whose JSON is the shortest that reads back to the same float32.

    Who reads a decimal as float64 and rounds that to float32 rounds twice. A number that this
    would change, or carry beyond the largest float32, is written as it is.

    Args:
        values: Finite float32.

    >>> short([float(np.float32(0.1)), 2.0])
    (0.1, 2.0)
    """
    found = tuple(float(str(np.float32(each))) for each in values)
    back = np.clip(found, -FLOAT_MAX, FLOAT_MAX).astype(np.float32)
    return tuple(
        b if abs(b) <= FLOAT_MAX and float(c) == a and len(repr(b)) < len(repr(a)) else a
        for a, b, c in zip(values, found, back, strict=True)
    )


def packed(raw: Mapping[str, Any], name: str, dtype: str, size: int) -> bytes:
    """Return the bytes of a base64 text of ``size`` finite numbers.

    The length is checked before the text is decoded, and the text must be the one that
    :func:`text` makes: one array, one text.
    """
    found = raw.get(name)
    size_bytes = size * np.dtype(dtype).itemsize
    if not isinstance(found, str) or len(found) != (size_bytes + 2) // 3 * 4:
        raise ProfileError(f"the profile's {name} is not the base64 of {size} numbers")
    try:
        data = base64.b64decode(found, validate=True)
    except ValueError as exc:
        raise ProfileError(f"the profile's {name} is not base64") from exc
    if len(data) != size_bytes or text(data) != found:
        raise ProfileError(f"the profile's {name} is not the base64 of {size} numbers")
    if not np.isfinite(np.frombuffer(data, dtype)).all():
        raise ProfileError(f"the profile's {name} holds what is not finite")
    return data


def table_text(table: Sequence[Sequence[int]]) -> str:
    """Return the base64 of a table of counts: row by row, little-endian, ``COUNT_SIZES`` each."""
    counts__k = np.array(table, np.int64).reshape(-1)
    most = int(counts__k.max(initial=0))
    size = next(size for size in COUNT_SIZES if most < 1 << 8 * size)
    return text(pack(counts__k, f"<u{size}"))


def _unpacked(raw: str, rows: int, columns: int, name: str) -> tuple[tuple[int, ...], ...]:
    cells = rows * columns
    what = f"the profile's {name} is not the base64 of {rows} x {columns} counts"
    if len(raw) > (max(COUNT_SIZES) * cells + 2) // 3 * 4:  # before it is decoded
        raise ProfileError(what)
    try:
        data = base64.b64decode(raw, validate=True)
    except ValueError as exc:
        raise ProfileError(what) from exc
    size = len(data) // max(cells, 1)
    if len(data) != cells * size or (cells and size not in COUNT_SIZES):
        raise ProfileError(what)
    counts__k = np.frombuffer(data, f"<u{size or 1}")
    if counts__k.max(initial=0) > COUNT_MAX:
        raise ProfileError(f"the profile's {name} holds something that is no count")
    found = tuple(tuple(row) for row in counts__k.reshape(rows, columns).tolist())
    if table_text(found) != raw:
        raise ProfileError(what)
    return found


def text(data: bytes) -> str:
    """Return the base64 of bytes."""
    return base64.b64encode(data).decode()


def pack(values: NDArray[Any], dtype: str) -> bytes:
    """Return the bytes of an array in C order, e.g. in ``"<f4"``."""
    return np.ascontiguousarray(values).astype(dtype).tobytes()
