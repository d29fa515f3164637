"""Turn the protocol's messages into plain values and back; pure, no socket, no model.

A tensor is its bytes from here on: little-endian elements in row-major order; for BYTES a 4-byte
little-endian length before each. Whether they fit the model is for the core to say.

Source: Open Inference Protocol v2 (gRPC), and Triton's extensions for system shared memory,
model configuration and statistics.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message

from ...proto import inference_pb2 as pb
from ..errors import ModelInputError
from .oip import InferInput, InferRequest, InferResponse, Region, Value, WantedOutput

M = TypeVar("M", bound=Message)

# datatype -> its field of Contents, and array's code of an element ("" has no fixed size)
_FIELDS: Final[Mapping[str, tuple[str, str]]] = {
    "BOOL": ("bool_contents", "B"),
    "INT8": ("int_contents", "b"),
    "INT16": ("int_contents", "h"),
    "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"),
    "UINT8": ("uint_contents", "B"),
    "UINT16": ("uint_contents", "H"),
    "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"),
    "FP32": ("fp32_contents", "f"),
    "FP64": ("fp64_contents", "d"),
    "BYTES": ("bytes_contents", ""),
}


def parse(kind: type[M], raw: bytes) -> M:
    """Return the message that ``raw`` is.

    Raises:
        ModelInputError: The bytes are not such a message.
    """
    try:
        return kind.FromString(raw)
    except DecodeError as exc:
        name = kind.DESCRIPTOR.name
        raise ModelInputError(f"the request is not a {name} message: {exc}") from exc


def filled(kind: type[M], facts: Mapping[str, Any]) -> M:
    """Return the message that says ``facts``, given in the protocol's JSON form.

    Facts that this face has no field for are left out: HTTP may say more than gRPC.
    """
    return json_format.ParseDict(dict(facts), kind(), ignore_unknown_fields=True)


def parameters(given: Mapping[str, Any]) -> dict[str, Value]:
    """Return a map of Parameter or RepositoryParameter as values; an empty one is left out."""
    found: dict[str, Value] = {}
    for name, parameter in given.items():
        choice = parameter.WhichOneof("choice")
        if choice is not None:
            found[name] = getattr(parameter, choice)
    return found


def contents_bytes(name: str, datatype: str, contents: pb.Contents) -> bytes:
    """Return typed contents as the bytes they would be if they were sent raw.

    Args:
        name: Of the input, for the message of an error.
        datatype: Of the input, e.g. ``"FP32"``.
        contents: Elements, flat, in row-major order, in the one field of that datatype.

    Raises:
        ModelInputError: The datatype has no typed form (FP16, BF16, or unknown), a field that is
            not its own is filled, or a value is outside the datatype's range.
    """
    known = _FIELDS.get(datatype)
    if known is None:
        raise ModelInputError(
            f"input '{name}' has datatype '{datatype}', which has no typed contents",
            hint="send it in raw_input_contents",
        )
    field, code = known
    for filled_field, _ in contents.ListFields():
        if filled_field.name != field:
            raise ModelInputError(
                f"input '{name}' of datatype '{datatype}' has its contents in "
                f"'{filled_field.name}', expected '{field}'"
            )
    values = getattr(contents, field)
    if not code:
        return b"".join(len(each).to_bytes(4, "little") + each for each in values)
    try:
        return array(code, values).tobytes()
    except OverflowError as exc:
        raise ModelInputError(
            f"input '{name}' has a value outside the range of its datatype '{datatype}': {exc}"
        ) from exc


def infer_request(request: pb.ModelInferRequest) -> InferRequest:
    """Return what a client asks.

    Raises:
        ModelInputError: Raw and typed contents are mixed, the count of raw ones is not the count
            of inputs outside shared memory, or a parameter of shared memory or of classification
            is not what it should be.
    """
    raw, tensors = request.raw_input_contents, list(request.inputs)
    regions = [_region(each.name, each.parameters) for each in tensors]
    outside = regions.count(None)
    if raw and len(raw) != outside:
        raise ModelInputError(
            f"unexpected number of raw input contents {len(raw)}, expecting {outside}: one for "
            "each input that is not in shared memory"
        )
    left = iter(raw)
    inputs = []
    for each, region in zip(tensors, regions, strict=True):
        data = None
        if (raw or region) and each.HasField("contents") and each.contents.ListFields():
            other = "it is in shared memory" if region else "raw_input_contents is used"
            raise ModelInputError(
                f"contents field must not be specified for input '{each.name}' when {other}"
            )
        if region is None:
            data = next(left) if raw else contents_bytes(each.name, each.datatype, each.contents)
        inputs.append(InferInput(each.name, each.datatype, tuple(each.shape), data, region))
    return InferRequest(
        model=request.model_name,
        version=request.model_version,
        inputs=tuple(inputs),
        outputs=tuple(map(_wanted, request.outputs)),
        parameters=parameters(request.parameters),
    )


def infer_response(response: InferResponse, request_id: str) -> pb.ModelInferResponse:
    """Return the message for what the model said; every output is raw."""
    message = pb.ModelInferResponse(
        model_name=response.model, model_version=response.version, id=request_id
    )
    for each in response.outputs:
        output = message.outputs.add(name=each.name, datatype=each.datatype, shape=each.shape)
        # One entry for each output, empty or not: clients count along.
        message.raw_output_contents.append(b"" if each.data is None else bytes(each.data))
        if each.region is not None:
            region = output.parameters
            region["shared_memory_region"].string_param = each.region.name
            region["shared_memory_offset"].int64_param = each.region.offset
            region["shared_memory_byte_size"].int64_param = each.region.byte_size
    return message


def _wanted(output: pb.ModelInferRequest.Output) -> WantedOutput:
    given = output.parameters
    if not given:
        return WantedOutput(output.name, None, 0)
    classes = _whole(output.name, parameters(given), "classification", 0)
    return WantedOutput(output.name, _region(output.name, given), classes)


def _region(tensor: str, parameter: Mapping[str, Any]) -> Region | None:
    if not parameter:  # most tensors have none
        return None
    given = parameters(parameter)
    name = given.get("shared_memory_region")
    if name is None:
        return None
    if not isinstance(name, str) or "shared_memory_byte_size" not in given:
        raise ModelInputError(
            f"'{tensor}' is in shared memory: 'shared_memory_region' must be a string and "
            "'shared_memory_byte_size' must be given, in bytes"
        )
    return Region(
        name,
        _whole(tensor, given, "shared_memory_offset", 0),
        _whole(tensor, given, "shared_memory_byte_size", 0),
    )


def _whole(tensor: str, given: Mapping[str, Value], name: str, default: int) -> int:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ModelInputError(
            f"parameter '{name}' of '{tensor}' must be a whole number, at least 0, not {value!r}"
        )
    return value
