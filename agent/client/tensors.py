"""Turn arrays and buffers into typed bytes, and typed bytes into arrays.

Types are numbers of onnx.TensorProto.DataType, as in the ring; the Open Inference Protocol has a
name for most. NumPy is imported only where an array is made.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .errors import ClientInputError, ServerFailedError

if TYPE_CHECKING:
    from typing_extensions import Buffer

STRING: Final = 8
BFLOAT16: Final = 16

OIP_NAMES: Final[dict[int, str]] = {
    1: "FP32",
    2: "UINT8",
    3: "INT8",
    4: "UINT16",
    5: "INT16",
    6: "INT32",
    7: "INT64",
    8: "BYTES",
    9: "BOOL",
    10: "FP16",
    11: "FP64",
    12: "UINT32",
    13: "UINT64",
    16: "BF16",
}
OIP_NUMBERS: Final = {name: number for number, name in OIP_NAMES.items()}

# By (kind of PEP 3118 format, bytes of an element): "l" has 4 or 8 by platform.
_NUMBERS: Final[dict[tuple[str, int], int]] = {
    ("f", 4): 1,
    ("f", 8): 11,
    ("f", 2): 10,
    ("u", 1): 2,
    ("u", 2): 4,
    ("u", 4): 12,
    ("u", 8): 13,
    ("i", 1): 3,
    ("i", 2): 5,
    ("i", 4): 6,
    ("i", 8): 7,
    ("?", 1): 9,
}
_KINDS: Final = {
    **dict.fromkeys("efd", "f"),
    **dict.fromkeys("BHILQN", "u"),
    **dict.fromkeys("bhilqn", "i"),
    "?": "?",
}
_DTYPES: Final = {
    1: "<f4",
    2: "u1",
    3: "i1",
    4: "<u2",
    5: "<i2",
    6: "<i4",
    7: "<i8",
    9: "?",
    10: "<f2",
    11: "<f8",
    12: "<u4",
    13: "<u8",
}


class Typed(NamedTuple):
    """A tensor as it is sent."""

    type: int
    shape: tuple[int, ...]
    data: Buffer
    """Little-endian, C order; for strings the length, 4 bytes, before each."""
    size: int
    """Bytes of the data."""
    format: str
    """With which a later array of the same plan is compared; empty: it must be encoded anew."""


def typed(name: str, value: Any) -> Typed:
    """Return an input as it is sent.

    Args:
        name: Of the input, for the message of an error.
        value: An array, or anything with the buffer protocol and a C-contiguous buffer; arrays of
            str, bytes or objects of these become BYTES.

    Raises:
        ClientInputError: It is no buffer, not C-contiguous, or of a type that is not sent.
    """
    dtype = getattr(value, "dtype", None)
    if getattr(dtype, "kind", "") in ("O", "S", "U"):
        data = strings(name, value.ravel().tolist())
        return Typed(STRING, tuple(value.shape), data, len(data), "")
    if getattr(dtype, "name", "") == "bfloat16":  # ml_dtypes; it has no buffer
        bits = memoryview(value.view("u2"))
        _contiguous(name, bits)
        return Typed(BFLOAT16, tuple(value.shape), bits, bits.nbytes, "")
    try:
        view = memoryview(value)
    except (TypeError, ValueError) as exc:
        raise ClientInputError(
            f"the input {name!r} is {type(value).__name__}, not an array or a buffer: {exc}"
        ) from exc
    _contiguous(name, view)
    format_ = view.format.lstrip("@=" if sys.byteorder == "big" else "@=<")
    number = _NUMBERS.get((_KINDS.get(format_, ""), view.itemsize))
    if number is None:
        raise ClientInputError(
            f"the input {name!r} has elements of format {view.format!r}, which are not sent",
            hint="numbers and bool in the machine's byte order, or strings",
        )
    kept = view.format if len(view.format) < 8 else ""
    return Typed(number, view.shape or (), view, view.nbytes, kept)


def raw(name: str, value: tuple[str, Sequence[int], Buffer]) -> Typed:
    """Return an input given as (datatype of the protocol, shape, bytes) as it is sent.

    Raises:
        ClientInputError: The datatype is unknown, or there is no such buffer.
    """
    datatype, shape, data = value
    if datatype not in OIP_NUMBERS:
        raise ClientInputError(
            f"the input {name!r} has the unknown datatype {datatype!r}",
            hint="one of " + ", ".join(OIP_NUMBERS),
        )
    try:
        view = memoryview(data)
    except TypeError as exc:
        raise ClientInputError(f"the input {name!r} is no buffer: {exc}") from exc
    _contiguous(name, view)
    if any(axis < 0 for axis in shape):
        raise ClientInputError(f"the input {name!r} has the shape {tuple(shape)}")
    return Typed(OIP_NUMBERS[datatype], tuple(shape), data, view.nbytes, "")


def _contiguous(name: str, view: memoryview) -> None:
    if not view.c_contiguous:
        raise ClientInputError(
            f"the input {name!r} is not C-contiguous", hint="numpy.ascontiguousarray makes it so"
        )


def strings(name: str, values: Sequence[Any]) -> bytes:
    """Return strings with the length, 4 bytes, before each."""
    parts: list[bytes] = []
    for value in values:
        if not isinstance(value, str | bytes):
            raise ClientInputError(
                f"the input {name!r} has a {type(value).__name__} among its strings"
            )
        coded = value.encode() if isinstance(value, str) else value
        parts += (len(coded).to_bytes(4, "little"), coded)
    return b"".join(parts)


@cache
def dtype_of(number: int) -> Any:
    """Return the NumPy dtype of a type; None for what has none: strings, bfloat16, four bits."""
    import numpy as np

    return np.dtype(_DTYPES[number]) if number in _DTYPES else None


def array(name: str, number: int, shape: tuple[int, ...], data: bytearray) -> Any:
    """Return typed bytes as an array: strings as objects of bytes, bfloat16 as ml_dtypes has it.

    Without ml_dtypes, bfloat16 comes as uint16: the upper halves of float32.

    Raises:
        ServerFailedError: The bytes are not what type and shape say.
    """
    import numpy as np

    dtype = dtype_of(number)
    if number == BFLOAT16:
        try:
            import ml_dtypes

            dtype = np.dtype(ml_dtypes.bfloat16)
        except ImportError:
            dtype = np.dtype("<u2")
    if number == STRING:
        made = np.empty(prod(shape), object)
        at = 0
        for i in range(made.size):
            end = at + 4 + int.from_bytes(data[at : at + 4], "little")
            if at + 4 > len(data) or end > len(data):
                raise ServerFailedError(f"the strings of the output {name!r} are cut short")
            made[i] = bytes(data[at + 4 : end])
            at = end
        return made.reshape(shape)
    if dtype is None:
        raise ServerFailedError(f"the output {name!r} is of type {number}: use infer_raw")
    if prod(shape) * dtype.itemsize != len(data):
        raise ServerFailedError(f"the output {name!r} has {len(data)} bytes for {shape}")
    return np.ndarray(shape, dtype, data)
