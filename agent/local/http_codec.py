"""Turn JSON and binary tensors into plain values and back; pure, no socket, no numpy.

    body = JSON header, then the bytes of each input that has ``binary_data_size``, in order

A tensor is its bytes from here on, see ``oip.py``. Whether they fit the model is for the core to
say. NaN and Infinity are written and read as bare words, as Triton does.

Source: Open Inference Protocol v2 (HTTP), and Triton's extensions for binary tensors, system
shared memory, classification and compression.
"""

from __future__ import annotations

import json
import math
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from .errors import RequestError
from .oip import (
    InferInput,
    InferRequest,
    InferResponse,
    Region,
    Value,
    WantedOutput,
    decode_bytes,
    encode_bytes,
)

_CODES: Final[Mapping[str, str]] = {
    "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "INT8": "b", "INT16": "h",
    "INT32": "i", "INT64": "q", "FP32": "f", "FP64": "d",
}  # fmt: skip
"""Datatype -> array's code of an element. FP16 and BF16 have no form in JSON."""

_BINARY: Final = "binary_data_size"
_CODINGS: Final = {"gzip": 31, "deflate": 15}  # zlib's wbits; deflate is zlib's form, RFC 9110
_DIMENSIONS_MAX: Final = 64  # of a shape; no runtime takes more


@dataclass(frozen=True, slots=True)
class Wishes:
    """How the answer shall look: what the core need not know."""

    id: str = ""
    binary: bool = False
    """Whether outputs that say nothing themselves are binary."""
    each: Mapping[str, bool] | None = None
    """Output -> whether it is binary, for those that say so."""


def parse(body: bytes | memoryview, *, values_max: int) -> dict[str, Any]:
    """Return the JSON object that a body is; an empty one is an empty object.

    Args:
        body: The text.
        values_max: Most values that it may have; commas inside of strings count too.

    Raises:
        RequestError: It is no JSON object, or nested too deeply.
        OversizeError: It has more values; nothing of it was read.
    """
    if not body:
        return {}
    text = bytes(body)
    # Counted before any is made: a value takes up to 40 times the bytes of its text.
    if text.count(b",") + text.count(b"[") + text.count(b"{") > values_max:
        raise OversizeError(
            f"the JSON has more than {values_max} values",
            hint=f"send large tensors as binary data, with '{_BINARY}', or in shared memory",
        )
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as exc:  # bad UTF-8 and huge numbers are ValueErrors
        raise RequestError(f"the request is not JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise RequestError(f"the request must be a JSON object, not a {type(found).__name__}")
    return found


def dumps(facts: Any) -> bytes:
    """Return the JSON text of ``facts``."""
    text = json.dumps(facts, separators=(",", ":"), ensure_ascii=False)
    # A client may send half a surrogate pair as an escape; it gets it back as one.
    return text.encode(errors="backslashreplace")


def infer_request(
    model: str,
    version: str,
    body: bytes | memoryview,
    header_size: int | None,
    *,
    values_max: int,
) -> tuple[InferRequest, Wishes]:
    """Return what a client asks, and how it wants to be answered.

    Args:
        model: Name of the model, of the URL.
        version: Of the model, "" is any.
        body: After decompression.
        header_size: Bytes of JSON at its start; None: all of it.
        values_max: Most values that the JSON may have.

    Raises:
        RequestError: The JSON is not such a request; binary data is missing or left over; a value
            is not of its datatype, or outside its range.
        OversizeError: The JSON has too many values.
    """
    view = memoryview(body)
    size = len(view) if header_size is None else header_size
    if size > len(view):
        raise RequestError(
            f"Inference-Header-Content-Length is {size}, the body has {len(view)} bytes"
        )
    asked = parse(view[:size], values_max=values_max)
    inputs, at = [], size
    for each in _objects(asked, "inputs"):
        made, at = _input(each, view, at)
        inputs.append(made)
    if at != len(view):
        raise RequestError(
            f"{len(view) - at} bytes follow the JSON and the inputs with '{_BINARY}'"
        )
    given = _parameters(asked, "the request")
    binary = _flag(given, "binary_data_output", "the request")
    given.pop("binary_data_output", None)
    wanted, wishes = [], {}
    for each in _objects(asked, "outputs"):
        name = _text(each, "name", "an output")
        own = _parameters(each, f"output '{name}'")
        if "binary_data" in own:
            wishes[name] = _flag(own, "binary_data", f"output '{name}'")
        classes = _whole(own, "classification", f"output '{name}'")
        wanted.append(WantedOutput(name, _region(own, f"output '{name}'"), classes))
    request = InferRequest(model, version, tuple(inputs), tuple(wanted), given)
    identity = _text(asked, "id", "the request") if asked.get("id") is not None else ""
    return request, Wishes(identity, binary, wishes)


def infer_response(
    response: InferResponse, wishes: Wishes, *, values_max: int
) -> tuple[list[bytes | memoryview], int | None]:
    """Return the parts of the body for what the model said, and the JSON's size in bytes.

    The size is None where no output is binary: then the body is the JSON alone.

    Raises:
        RequestError: An output has no form in JSON, or the outputs have more than ``values_max``
            values there, and it was not asked for as binary.
    """
    outputs, blobs, left = [], [], values_max
    for each in response.outputs:
        facts: dict[str, Any] = {
            "name": each.name,
            "datatype": each.datatype,
            "shape": list(each.shape),
        }
        if each.region is not None:
            facts["parameters"] = {
                "shared_memory_region": each.region.name,
                "shared_memory_offset": each.region.offset,
                "shared_memory_byte_size": each.region.byte_size,
            }
        elif (wishes.each or {}).get(each.name, wishes.binary):
            data = b"" if each.data is None else each.data
            facts["parameters"] = {_BINARY: len(data)}
            blobs.append(data)
        else:
            left -= math.prod(each.shape)
            if left < 0:
                raise RequestError(
                    f"the outputs up to '{each.name}' have more than {values_max} values and "
                    "cannot be JSON",
                    hint="ask for them with the parameter 'binary_data': true",
                )
            facts["data"] = json_data(each.name, each.datatype, each.data or b"")
        outputs.append(facts)
    told: dict[str, Any] = {"model_name": response.model, "model_version": response.version}
    if wishes.id:
        told["id"] = wishes.id
    head = dumps(told | {"outputs": outputs})
    return [head, *blobs], len(head) if blobs else None


def json_bytes(name: str, datatype: str, shape: Sequence[int], data: object) -> bytes:
    """Return JSON elements, flat or nested as the shape is, as the bytes of the tensor.

    Args:
        name: Of the input, for the message of an error.
        datatype: Of the input, e.g. ``"FP32"``.
        shape: Of the input, each 0 or more.
        data: What the JSON says; a list.

    Raises:
        RequestError: The datatype has no form in JSON, the nesting or the count does not match
            the shape, or a value is not of the datatype or outside its range.

    >>> json_bytes("x", "INT16", (2, 1), [[1], [-1]]).hex()
    '0100ffff'
    """
    flat = _flat(name, shape, data)
    kinds = set(map(type, flat))
    if datatype == "BYTES" and kinds <= {str}:
        try:
            return encode_bytes(each.encode() for each in flat)
        except UnicodeEncodeError as exc:
            raise RequestError(f"input '{name}' has a string that is not Unicode: {exc}") from exc
    if datatype == "BOOL" and (kinds <= {bool} or (kinds <= {bool, int} and set(flat) <= {0, 1})):
        return bytes(flat)
    if datatype in ("FP32", "FP64") and kinds <= {int, float}:
        return _floats(name, datatype, flat)
    if datatype in _CODES and kinds <= {int}:
        try:
            return array(_CODES[datatype], flat).tobytes()
        except OverflowError as exc:
            raise _outside(name, datatype, exc) from exc
    if datatype in ("FP16", "BF16"):
        raise RequestError(
            f"input '{name}' of datatype '{datatype}' cannot be JSON",
            hint=f"send it as binary data, with '{_BINARY}'",
        )
    if datatype != "BOOL" and datatype != "BYTES" and datatype not in _CODES:
        raise RequestError(f"input '{name}' has unknown datatype '{datatype}'")
    found = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise RequestError(f"input '{name}' of datatype '{datatype}' has elements of type {found}")


def json_data(name: str, datatype: str, data: bytes | memoryview) -> list[Any]:
    """Return the elements of an output for JSON, flat.

    Raises:
        RequestError: They have no form in JSON: FP16, BF16, or BYTES that are not UTF-8.
    """
    if datatype in _CODES:
        found = array(_CODES[datatype])
        found.frombytes(data)
        return found.tolist()
    if datatype == "BOOL":
        return [bool(each) for each in data]
    if datatype == "BYTES":
        try:
            return [each.decode() for each in decode_bytes(data)]
        except UnicodeDecodeError as exc:
            raise RequestError(
                f"output '{name}' is not UTF-8 and cannot be JSON",
                hint="ask for it with the parameter 'binary_data': true",
            ) from exc
    raise RequestError(
        f"output '{name}' of datatype '{datatype}' cannot be JSON",
        hint="ask for it with the parameter 'binary_data': true",
    )


def decompress(coding: str, body: bytes, bytes_max: int) -> bytes:
    """Return what a compressed body holds.

    Args:
        coding: "gzip" or "deflate".
        body: As it came.
        bytes_max: Most that it may hold, in bytes; not more than that is ever made.

    Raises:
        RequestError: It is damaged or truncated.
        OversizeError: It holds more.
    """
    parts, left = [], bytes_max + 1
    data = body
    while data:  # gzip may have several members
        member = zlib.decompressobj(_CODINGS[coding])
        try:
            parts.append(member.decompress(data, left))
        except zlib.error as exc:
            raise RequestError(f"the body is not {coding}: {exc}") from exc
        left -= len(parts[-1])
        if not left:
            raise OversizeError(f"the body holds more than {bytes_max} bytes when decompressed")
        if not member.eof:
            raise RequestError(f"the body ends inside its {coding} data")
        data = member.unused_data
    return parts[0] if len(parts) == 1 else b"".join(parts)


def compress(coding: str, parts: Sequence[bytes | memoryview]) -> bytes:
    """Return the parts as one compressed body; level 1, since the way is short."""
    made = zlib.compressobj(1, zlib.DEFLATED, _CODINGS[coding])
    return b"".join([*map(made.compress, parts), made.flush()])


def accepted(header: bytes) -> str:
    """Return which coding of ours an Accept-Encoding header likes best; "" is none.

    >>> accepted(b"br, gzip;q=0.5, deflate;q=0"), accepted(b"identity")
    ('gzip', '')
    """
    best, found = 0.0, ""
    for entry in header.decode("latin-1").lower().split(","):
        coding, _, weight = entry.partition(";")
        try:
            share = float(weight.partition("=")[2]) if weight else 1.0
        except ValueError:
            continue
        if coding.strip() in _CODINGS and share > best:
            best, found = share, coding.strip()
    return found


class OversizeError(RequestError):
    """A body is larger than the limit; nothing of it was used."""

    code = "agent.local.request.oversize"


def _input(given: Mapping[str, Any], view: memoryview, at: int) -> tuple[InferInput, int]:
    """Return an input, and where in the body the next one's binary data starts."""
    name = _text(given, "name", "an input")
    where = f"input '{name}'"
    datatype = _text(given, "datatype", where)
    shape = given.get("shape")
    if not isinstance(shape, list) or len(shape) > _DIMENSIONS_MAX:
        raise RequestError(f"{where} needs 'shape', a list of whole numbers")
    if not all(type(each) is int and 0 <= each < 1 << 63 for each in shape):
        raise RequestError(f"{where} has a shape with an entry that is no whole number from 0 up")
    own = _parameters(given, where)
    region = _region(own, where)
    binary = _BINARY in own
    if (region is not None) + binary + ("data" in given) != 1:
        raise RequestError(
            f"{where} must have exactly one of 'data', the parameter '{_BINARY}' and the "
            "parameter 'shared_memory_region'"
        )
    if region is not None:
        return InferInput(name, datatype, tuple(shape), None, region), at
    if binary:
        end = at + _whole(own, _BINARY, where)
        if end > len(view):
            raise RequestError(
                f"{where} has '{_BINARY}' {end - at}, but only {len(view) - at} bytes are left"
            )
        return InferInput(name, datatype, tuple(shape), view[at:end], None), end
    data = json_bytes(name, datatype, shape, given["data"])
    return InferInput(name, datatype, tuple(shape), data, None), at


def _flat(name: str, shape: Sequence[int], data: object) -> list[Any]:
    """Return the elements in row-major order; nested lists must have just the shape."""
    if not isinstance(data, list):
        raise RequestError(f"input '{name}' has 'data' that is no list")
    level, seen = data, [len(data)]
    while level and type(level[0]) is list and len(seen) < len(shape):
        sizes = {len(each) if type(each) is list else -1 for each in level}
        if len(sizes) != 1 or -1 in sizes:
            raise RequestError(f"input '{name}' has 'data' whose nested lists differ in length")
        seen.append(sizes.pop())
        level = list(chain.from_iterable(level))
    expected = math.prod(shape)
    if len(level) != expected or (len(seen) > 1 and seen != list(shape)):
        raise RequestError(
            f"input '{name}' has data of shape {seen}, expected {list(shape)} or a flat list of "
            f"{expected}"
        )
    return level


def _floats(name: str, datatype: str, flat: Sequence[float]) -> bytes:
    try:
        made = array(_CODES[datatype], flat)
    except OverflowError as exc:  # a whole number beyond FP64
        raise _outside(name, datatype, exc) from exc
    if datatype == "FP32":
        # array narrows as C does: what is too large becomes infinite and says nothing
        for bad in (math.inf, -math.inf):
            if made.count(bad) != flat.count(bad):
                raise _outside(name, datatype, "too large")
    return made.tobytes()


def _outside(name: str, datatype: str, why: object) -> RequestError:
    return RequestError(
        f"input '{name}' has a value outside the range of its datatype '{datatype}': {why}"
    )


def _objects(given: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = given.get(name)
    if found is None and name == "outputs":
        return []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise RequestError(f"the request needs '{name}', a list of objects")
    return found


def _parameters(given: Mapping[str, Any], where: str) -> dict[str, Value]:
    found = given.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise RequestError(f"'parameters' of {where} must be an object")
    for name, value in found.items():
        if not isinstance(value, (bool, int, float, str)):
            raise RequestError(f"parameter '{name}' of {where} must be a value, not {value!r:.80}")
    return dict(found)


def _region(given: Mapping[str, Value], where: str) -> Region | None:
    name = given.get("shared_memory_region")
    if name is None:
        return None
    if not isinstance(name, str) or "shared_memory_byte_size" not in given:
        raise RequestError(
            f"{where} is in shared memory: 'shared_memory_region' must be a string and "
            "'shared_memory_byte_size' must be given, in bytes"
        )
    return Region(
        name,
        _whole(given, "shared_memory_offset", where),
        _whole(given, "shared_memory_byte_size", where),
    )


def _whole(given: Mapping[str, Value], name: str, where: str) -> int:
    value = given.get(name, 0)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise RequestError(
            f"parameter '{name}' of {where} must be a whole number, at least 0, not {value!r:.80}"
        )
    return value


def _flag(given: Mapping[str, Value], name: str, where: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"parameter '{name}' of {where} must be true or false")
    return value


def _text(given: Mapping[str, Any], name: str, where: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where} needs '{name}', a string")
    return value
