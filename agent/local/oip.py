"""What a client asks and gets, in the terms of the Open Inference Protocol v2; pure.

A tensor is its bytes: little-endian elements in row-major order; for BYTES a 4-byte little-endian
length before each element. Here are the types that all faces (gRPC, HTTP, ring) share, the table
of datatypes, the coding of BYTES, cutting and joining along the first axis, and classification.

The types are named tuples: making frozen dataclasses would take a third of a small model's call.

Source: Open Inference Protocol v2; Triton's extensions for binary tensors and classification.
"""

from __future__ import annotations

import heapq
import math
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from .errors import RequestError

Value = bool | int | float | str


class Region(NamedTuple):
    """A part of a registered shared-memory region; offset and size in bytes."""

    name: str
    offset: int
    byte_size: int


class InferInput(NamedTuple):
    """One input: its bytes, or where they are."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview | None
    region: Region | None


class WantedOutput(NamedTuple):
    """One output that was asked for; ``classes`` > 0 asks for the best classes instead."""

    name: str
    region: Region | None
    classes: int


class InferRequest(NamedTuple):
    """What a client asks; ``outputs`` empty means all."""

    model: str
    version: str
    inputs: tuple[InferInput, ...]
    outputs: tuple[WantedOutput, ...]
    parameters: Mapping[str, Value]


class InferOutput(NamedTuple):
    """One output: its bytes, or where they were written."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview | None
    region: Region | None


class InferResponse(NamedTuple):
    """What the model said."""

    model: str
    version: str
    outputs: tuple[InferOutput, ...]


DATATYPES: Final[Mapping[str, tuple[str, int]]] = {
    "bool": ("BOOL", 1),
    "uint8": ("UINT8", 1),
    "uint16": ("UINT16", 2),
    "uint32": ("UINT32", 4),
    "uint64": ("UINT64", 8),
    "int8": ("INT8", 1),
    "int16": ("INT16", 2),
    "int32": ("INT32", 4),
    "int64": ("INT64", 8),
    "float16": ("FP16", 2),
    "float": ("FP32", 4),
    "double": ("FP64", 8),
    "bfloat16": ("BF16", 2),
    "string": ("BYTES", 0),
}
"""ONNX's name of a type -> the protocol's, and the bytes of an element; 0 = each its own."""

CONFIG_TYPES: Final[Mapping[str, str]] = {
    name: "TYPE_" + ("STRING" if name == "BYTES" else name) for name, _ in DATATYPES.values()
}
"""The protocol's datatype -> its name in Triton's model configuration."""

_CODES: Final[Mapping[str, str]] = {
    "BOOL": "B", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "INT8": "b",
    "INT16": "h", "INT32": "i", "INT64": "q", "FP32": "f", "FP64": "d",
}  # fmt: skip


def encode_bytes(elements: Iterable[bytes]) -> bytes:
    """Return elements of a BYTES tensor in their wire form.

    >>> encode_bytes([b"a", b""]).hex()
    '010000006100000000'
    """
    return b"".join(len(each).to_bytes(4, "little") + each for each in elements)


def bytes_ends(data: bytes | memoryview) -> list[int]:
    """Return where each element of a BYTES tensor ends, in bytes from the start.

    Raises:
        RequestError: The data ends inside a length or an element.
    """
    ends: list[int] = []
    at, size = 0, len(data)
    while at < size:
        start = at + 4
        at = start + int.from_bytes(data[at:start], "little")
        if at > size:
            raise RequestError(f"a BYTES tensor of {size} bytes ends inside element {len(ends)}")
        ends.append(at)
    return ends


def decode_bytes(data: bytes | memoryview) -> list[bytes]:
    """Return the elements of a BYTES tensor.

    Raises:
        RequestError: As ``bytes_ends``.

    >>> decode_bytes(encode_bytes([b"a", b""]))
    [b'a', b'']
    """
    start, found = 0, []
    for end in bytes_ends(data):
        found.append(bytes(data[start + 4 : end]))
        start = end
    return found


def split_rows(
    element_size: int, shape: Sequence[int], data: bytes | memoryview, rows: Sequence[int]
) -> list[memoryview]:
    """Cut a tensor along its first axis into parts of so many rows each; nothing is copied.

    Args:
        element_size: Bytes of an element, 0 for BYTES.
        shape: Of the whole; ``shape[0]`` is the sum of ``rows``.
        data: All bytes of it.
        rows: Rows of each part.
    """
    view = memoryview(data)
    each = math.prod(shape[1:])
    ends = None if element_size else [0, *bytes_ends(view)]
    parts, at = [], 0
    for count in rows:
        start, stop = at * each, (at + count) * each
        if ends is None:
            parts.append(view[start * element_size : stop * element_size])
        else:
            parts.append(view[ends[start] : ends[stop]])
        at += count
    return parts


def values(datatype: str, data: bytes | memoryview) -> Sequence[Any]:
    """Return the elements of a tensor of numbers as Python numbers.

    Raises:
        RequestError: The datatype has no numbers.
    """
    if datatype in _CODES:
        found = array(_CODES[datatype])
        found.frombytes(data)
        return found
    if datatype == "FP16":
        return struct.unpack(f"<{len(data) // 2}e", data)
    if datatype == "BF16":  # the upper half of a float
        raw = bytearray(2 * len(data))
        raw[2::4], raw[3::4] = data[0::2], data[1::2]
        return struct.unpack(f"<{len(raw) // 4}f", raw)
    raise RequestError(f"datatype '{datatype}' cannot be classified")


def classify(
    datatype: str, data: bytes | memoryview, batch: int | None, classes: int
) -> tuple[tuple[int, ...], bytes]:
    """Return the best classes of an output as a BYTES tensor of ``value:index``, best first.

    Args:
        datatype: Of the output.
        data: Its bytes.
        batch: Rows to classify each by itself; None: the output is one row.
        classes: How many are wanted, at least 1; fewer come if the output has fewer.

    Returns:
        Shape (classes,) or (batch, classes), and the tensor's bytes. Equal values come in the
        order of their index; NaN comes last.
    """
    numbers = values(datatype, data)
    rows = 1 if batch is None else batch
    each = len(numbers) // rows if rows else 0
    kept = min(classes, each)
    whole = datatype not in ("FP16", "BF16", "FP32", "FP64")
    texts = []
    for row in range(rows):
        part = numbers[row * each : (row + 1) * each]
        best = heapq.nsmallest(kept, range(each), key=lambda i, p=part: _rank(p[i]))  # type: ignore[misc]
        # six digits after the point, as Triton's clients have always seen them
        texts += [f"{part[i]}:{i}" if whole else f"{part[i]:f}:{i}" for i in best]
    shape = (kept,) if batch is None else (rows, kept)
    return shape, encode_bytes(text.encode() for text in texts)


def _rank(value: float) -> tuple[bool, float]:
    return value != value, -value
