"""Call engines with NumPy arrays or bytes: names of types, texts, and the class ``Call``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from ._call import LATENCY_BINS_N as LATENCY_BINS
from ._call import Call, Tap, bin_of_ns

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["LATENCY_BINS", "TYPES", "Call", "Tap", "bin_of_ns", "dtype_name"]

TYPES: Final[dict[int, tuple[str, str]]] = {
    1: ("float", "float32"),
    2: ("uint8", "uint8"),
    3: ("int8", "int8"),
    4: ("uint16", "uint16"),
    5: ("int16", "int16"),
    6: ("int32", "int32"),
    7: ("int64", "int64"),
    8: ("string", "object"),
    9: ("bool", "bool"),
    10: ("float16", "float16"),
    11: ("double", "float64"),
    12: ("uint32", "uint32"),
    13: ("uint64", "uint64"),
    16: ("bfloat16", "uint16"),
    17: ("float8e4m3fn", "uint8"),
    18: ("float8e4m3fnuz", "uint8"),
    19: ("float8e5m2", "uint8"),
    20: ("float8e5m2fnuz", "uint8"),
    21: ("uint4", "uint8"),
    22: ("int4", "int8"),
}
"""ONNX name and NumPy dtype of each number of onnx.TensorProto.DataType that tensors may have."""


def dtype_name(type_number: int) -> str:
    """Return how errors call a type: its NumPy dtype, and what that stands for if it is another."""
    onnx, dtype = TYPES[type_number]
    if onnx == "string":
        return "object (of str or bytes)"
    return dtype if onnx in ("float", "double", dtype) else f"{dtype} (holding {onnx})"


def decode_strings(data: bytes, shape: Sequence[int]) -> NDArray[np.object_]:
    """Return a text tensor as an array of str; bytes that are no UTF-8 become surrogates."""
    import numpy as np

    found = []
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        found.append(data[at + 4 : at + 4 + length].decode("utf-8", "surrogateescape"))
        at += 4 + length
    made = np.empty(len(found), object)
    made[:] = found
    return made.reshape(tuple(shape))


def from_raw(
    type_number: int, shape: Sequence[int], data: bytes | bytearray | memoryview
) -> NDArray[Any]:
    """Return raw bytes of a tensor as an array."""
    import numpy as np

    if TYPES[type_number][0] == "string":
        return decode_strings(bytes(data), shape)
    if TYPES[type_number][0] in ("int4", "uint4"):
        packed = np.frombuffer(data, np.uint8)
        values = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[: int(np.prod(shape))]
        if TYPES[type_number][0] == "int4":
            values = (values.astype(np.int8) ^ 8) - np.int8(8)
        return values.reshape(tuple(shape))
    return np.frombuffer(data, TYPES[type_number][1]).reshape(tuple(shape))


def to_raw(type_number: int, array: NDArray[Any]) -> tuple[tuple[int, ...], bytes]:
    """Return the shape and raw bytes of an array that a model gave."""
    import numpy as np

    kind = TYPES[type_number][0]
    if kind == "string":
        parts = [text.encode("utf-8", "surrogateescape") for text in array.reshape(-1).tolist()]
        return array.shape, b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    if kind in ("int4", "uint4"):
        flat = array.reshape(-1).view(np.uint8) & 15
        flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
        return array.shape, (flat[0::2] | (flat[1::2] << 4)).tobytes()
    return array.shape, array.tobytes()
