"""Read what an ONNX model says of itself, without onnx, protobuf or numpy.

    bytes --read_graph--> Model(graph: inputs, outputs, nodes, initializers; external, opsets)

Rule 1: whatever bytes come, the reader yields a Model or raises OnnxFormatError.
Rule 2: every count and depth is bounded by ReadLimits, nothing is allocated on a length that was
        not checked against the bytes that are there, and the work grows with the bytes, no faster.
Rule 3: it is stricter than protobuf: a singular message that stands twice, a field of the wrong
        wire type or a number beyond its type is refused, because two readers could understand
        two things. Where protobuf takes the same bytes, it reads the same model; what is not
        asked for here (documentation, value_info, …) is skipped and may be broken.

Weights are not copied: they are views of the bytes that were given.

Source: onnx.proto of ONNX 1.18; the protobuf encoding specification.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from .errors import KernelError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
FLOAT, UINT8, INT8, INT32, INT64, DOUBLE = 1, 2, 3, 6, 7, 11  # TensorProto.DataType

_ITEM_BYTES: Final[Mapping[int, int]] = {
    1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 14: 8, 15: 16,
    16: 2, 17: 1, 18: 1, 19: 1, 20: 1,
}  # fmt: skip
_ARRAY_CODE: Final[Mapping[int, str]] = {
    1: "f", 2: "B", 3: "b", 4: "H", 5: "h", 6: "i", 7: "q", 9: "B", 11: "d", 12: "I", 13: "Q",
}  # fmt: skip

Value: TypeAlias = "int | float | str | bytes | Tensor | Graph | tuple[int, ...] | tuple[float, ...] | tuple[bytes, ...] | tuple[Tensor, ...] | tuple[Graph, ...] | None"  # noqa: E501 - one type


class OnnxFormatError(KernelError, ValueError):
    """Bytes are not an ONNX model that this reader takes; nothing was made of them."""

    code = "ext.onnx.format"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimits:
    """How much of a model is read."""

    bytes_max: int = (1 << 31) - 1
    """Size of the model, bytes; protobuf itself takes no more."""
    fields_max: int = 2_000_000
    """Fields in all messages together: bounds time and memory to some seconds and 1 GB."""
    values_max: int = 1_000_000
    """Numbers in one attribute or in the typed fields of one tensor that is read."""
    depth_max: int = 16
    """Graphs within graphs; ONNX Runtime's own limit is of this order."""
    dims_max: int = 64
    """Axes of one tensor."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if min(self.bytes_max, self.fields_max, self.values_max, self.depth_max) < 1:
            raise ValueError("every limit must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueInfo:
    """Name and type of a graph's input or output."""

    name: str
    type: int
    """TensorProto.DataType of a dense tensor; 0 if it is none (a sequence, map, optional…)."""
    shape: tuple[int | str | None, ...] | None
    """Each axis: its length >= 0, its symbolic name, or None. None as a whole: rank unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One TensorProto."""

    name: str
    type: int
    dims: tuple[int, ...]
    raw: memoryview | None
    """Little-endian elements, if the tensor has raw data."""
    typed: Mapping[int, tuple[memoryview, ...]]
    """Wire bytes of the typed fields, by field number."""
    external: bool
    """Whether its elements are said to be in another file."""
    location: str
    """Path of that file as the model has it, or empty."""
    values_max: int

    @property
    def count(self) -> int:
        """Number of elements that the dims say."""
        count = 1
        for dim in self.dims:
            count *= dim
        return count

    def values(self) -> array[Any]:
        """Return the elements in C order, in the machine's byte order.

        Raises:
            OnnxFormatError: The tensor is external, of a type without an array type, or its bytes
                are not as many as its dims say.
        """
        code = _ARRAY_CODE.get(self.type)
        if self.external or code is None:
            raise OnnxFormatError(f"tensor {self.name!r} of type {self.type} cannot be read here")
        found = array(code)
        count = self.count
        if self.raw is not None:
            if len(self.raw) != count * found.itemsize:
                raise OnnxFormatError(
                    f"tensor {self.name!r} has {len(self.raw)} bytes, its dims say "
                    f"{count * found.itemsize}"
                )
            found.frombytes(self.raw)
            if sys.byteorder == "big":
                found.byteswap()
            return found
        if count > self.values_max:
            raise OnnxFormatError(f"tensor {self.name!r} has {count} elements in typed fields")
        number = _TYPED_FIELD[self.type]
        try:
            numbers: list[Any] = list(_numbers(self.typed.get(number, ()), number, count))
            found.extend(numbers)
        except OverflowError as exc:
            raise OnnxFormatError(f"tensor {self.name!r} has a number beyond its type") from exc
        if len(found) != count:
            raise OnnxFormatError(
                f"tensor {self.name!r} has {len(found)} elements, its dims say {count}"
            )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One operator of a graph."""

    op: str
    domain: str
    """Empty for ONNX's own operators ("ai.onnx" is read as empty)."""
    name: str
    inputs: tuple[str, ...]
    """Names; an empty one is an optional input left out."""
    outputs: tuple[str, ...]
    attributes: Mapping[str, Value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """One GraphProto."""

    name: str
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]
    nodes: tuple[Node, ...]
    initializers: Mapping[str, Tensor]
    sparse: tuple[str, ...]
    """Names of sparse initializers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One ModelProto."""

    ir_version: int
    opsets: Mapping[str, int]
    """Version by domain; ONNX's own domain is empty."""
    graph: Graph
    functions: int
    """Number of functions that the model defines."""
    subgraphs: int
    """Number of graphs inside attributes."""
    external: tuple[str, ...] = field(default=())
    """Location of each tensor, anywhere in the model, whose elements are in another file."""


def read_model(data: bytes | bytearray | memoryview, limits: ReadLimits | None = None) -> Model:
    """Return what a serialized ModelProto says.

    Args:
        data: The bytes; they must not change while the model is in use.
        limits: How much is read.

    Raises:
        OnnxFormatError: The bytes are no model, or one beyond the limits.
    """
    view = memoryview(data)
    if view.ndim != 1 or not view.contiguous:
        raise TypeError("a model is read from contiguous bytes")
    view = view.cast("B").toreadonly()
    limits = limits or ReadLimits()
    if len(view) > limits.bytes_max:
        raise OnnxFormatError(f"a model of {len(view)} bytes is larger than {limits.bytes_max}")
    return _Reader(limits).model(view)


# ---- wire --------------------------------------------------------------------------------------


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """Return an unsigned number of up to 64 bits and the position behind it."""
    value = shift = 0
    for byte in view[at : at + 10]:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            if value >> 64:
                break
            return value, at + shift // 7
    raise OnnxFormatError(f"no number of 64 bits at byte {at} of a message")


def _signed(value: int, bits: int) -> int:
    """Return two's complement; a number of 32 bits is sent as 64, sign-extended."""
    number = value - (1 << 64) if value >> 63 else value
    if not -(1 << (bits - 1)) <= number < 1 << (bits - 1):
        raise OnnxFormatError(f"{number} does not fit {bits} bits")
    return number


def _numbers(parts: Sequence[memoryview], number: int, count_max: int) -> Iterator[int | float]:
    """Yield the elements of a tensor's typed field, at most count_max + 1."""
    left = count_max + 1
    for part in parts:
        if number in (4, 10):  # float_data, double_data
            size, code = (4, "<f") if number == 4 else (8, "<d")
            if len(part) % size:
                raise OnnxFormatError("packed numbers do not fill their field")
            for (value,) in struct.iter_unpack(code, part[: left * size]):
                left -= 1
                yield value
        else:
            at = 0
            while at < len(part) and left:
                value, at = _varint(part, at)
                left -= 1
                # uint64_data, or int32_data and int64_data
                yield value if number == 11 else _signed(value, 32 if number == 5 else 64)


_TYPED_FIELD: Final[Mapping[int, int]] = {
    1: 4, 2: 5, 3: 5, 4: 5, 5: 5, 6: 5, 7: 7, 9: 5, 11: 10, 12: 11, 13: 11,
}  # fmt: skip
_TYPED_WIRE: Final[Mapping[int, int]] = {
    4: FIXED32, 5: VARINT, 7: VARINT, 10: FIXED64, 11: VARINT,
}  # fmt: skip


class _Reader:
    """One reading: counts the fields and collects what is asked of the whole model."""

    def __init__(self, limits: ReadLimits) -> None:
        self._limits = limits
        self._fields = 0
        self._subgraphs = 0
        self._external: list[str] = []

    def _each(
        self, view: memoryview, kinds: Mapping[int, int], once: frozenset[int] = frozenset()
    ) -> Iterator[tuple[int, int, int, memoryview]]:
        """Yield (field, wire type, number, bytes) of each field in kinds; skip the unknown."""
        at, end = 0, len(view)
        seen: set[int] = set()
        while at < end:
            self._fields += 1
            if self._fields > self._limits.fields_max:
                raise OnnxFormatError(f"more than {self._limits.fields_max} fields")
            key, at = _varint(view, at)
            number, wire = key >> 3, key & 7
            if not 0 < number < 1 << 29:
                raise OnnxFormatError(f"field number {number} does not exist")
            value, part = 0, view[:0]
            if wire == VARINT:
                value, after = _varint(view, at)
                part = view[at:after]
                at = after
            elif wire == BYTES:
                size, at = _varint(view, at)
                if size > end - at:
                    raise OnnxFormatError(f"field {number} is cut: {size} bytes, {end - at} left")
                part = view[at : at + size]
                at += size
            elif wire in (FIXED32, FIXED64):
                size = 4 if wire == FIXED32 else 8
                if size > end - at:
                    raise OnnxFormatError(f"field {number} is cut")
                part = view[at : at + size]
                at += size
            else:
                raise OnnxFormatError(f"field {number} has wire type {wire}")
            wanted = kinds.get(number)
            if wanted is None:
                continue
            # A repeated number is packed (one field of bytes) or not: both are valid.
            if wire != wanted and not (wire == BYTES and number not in once):
                raise OnnxFormatError(f"field {number} has wire type {wire}, not {wanted}")
            if number in once:
                if number in seen:
                    raise OnnxFormatError(f"field {number} stands twice in a message")
                seen.add(number)
            yield number, wire, value, part

    def model(self, view: memoryview) -> Model:
        kinds = {1: VARINT, 7: BYTES, 8: BYTES, 20: BYTES, 25: BYTES}
        ir_version, functions = 0, 0
        opsets: dict[str, int] = {}
        graph: Graph | None = None
        for number, _, value, part in self._each(view, kinds, frozenset((1, 7))):
            if number == 1:
                ir_version = _signed(value, 64)
            elif number == 7:
                graph = self._graph(part, 0)
            elif number == 8:
                domain, version = self._opset(part)
                opsets[domain] = max(version, opsets.get(domain, version))
            elif number == 20:  # training_info: two graphs that are not run, but may name files
                for _, _, _, inner in self._each(part, {1: BYTES, 2: BYTES}, frozenset((1, 2))):
                    self._graph(inner, 1)
            else:
                functions += 1
                self._function(part)
        if graph is None:
            raise OnnxFormatError("there is no graph in these bytes")
        return Model(
            ir_version=ir_version,
            opsets=opsets,
            graph=graph,
            functions=functions,
            subgraphs=self._subgraphs,
            external=tuple(self._external),
        )

    def _opset(self, view: memoryview) -> tuple[str, int]:
        domain, version = "", 0
        for number, _, value, part in self._each(view, {1: BYTES, 2: VARINT}, frozenset((1, 2))):
            if number == 1:
                domain = _domain(part)
            else:
                version = _signed(value, 64)
        return domain, version

    def _function(self, view: memoryview) -> None:
        for number, _, _, part in self._each(view, {7: BYTES, 11: BYTES}):
            if number == 7:
                self._node(part, 1)
            else:
                self._attribute(part, 1)

    def _graph(self, view: memoryview, depth: int) -> Graph:
        if depth > self._limits.depth_max:
            raise OnnxFormatError(f"graphs are nested more than {self._limits.depth_max} deep")
        kinds = {1: BYTES, 2: BYTES, 5: BYTES, 11: BYTES, 12: BYTES, 15: BYTES}
        name = ""
        nodes: list[Node] = []
        inputs: list[ValueInfo] = []
        outputs: list[ValueInfo] = []
        sparse: list[str] = []
        tensors: dict[str, Tensor] = {}
        for number, _, _, part in self._each(view, kinds, frozenset((2,))):
            if number == 1:
                nodes.append(self._node(part, depth))
            elif number == 2:
                name = _text(part)
            elif number == 5:
                tensor = self._tensor(part)
                if tensor.name in tensors:
                    raise OnnxFormatError(f"initializer {tensor.name!r} stands twice")
                tensors[tensor.name] = tensor
            elif number == 15:
                sparse.append(self._sparse(part))
            else:
                (inputs if number == 11 else outputs).append(self._value_info(part))
        return Graph(
            name=name,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            nodes=tuple(nodes),
            initializers=tensors,
            sparse=tuple(sparse),
        )

    def _sparse(self, view: memoryview) -> str:
        """Return the name of a sparse tensor: that of its values."""
        name = ""
        for number, _, _, part in self._each(view, {1: BYTES, 2: BYTES}, frozenset((1, 2))):
            tensor = self._tensor(part)
            name = tensor.name if number == 1 else name
        return name

    def _node(self, view: memoryview, depth: int) -> Node:
        texts = {3: "", 4: "", 7: ""}
        inputs: list[str] = []
        outputs: list[str] = []
        attributes: dict[str, Value] = {}
        kinds = dict.fromkeys((1, 2, 3, 4, 5, 7), BYTES)
        for number, _, _, part in self._each(view, kinds, frozenset(texts)):
            if number in (1, 2):
                (inputs if number == 1 else outputs).append(_text(part))
            elif number == 5:
                name, value = self._attribute(part, depth)
                if name in attributes:
                    raise OnnxFormatError(f"attribute {name!r} stands twice")
                attributes[name] = value
            else:
                texts[number] = _domain(part) if number == 7 else _text(part)
        return Node(
            op=texts[4],
            domain=texts[7],
            name=texts[3],
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            attributes=attributes,
        )

    def _attribute(self, view: memoryview, depth: int) -> tuple[str, Value]:
        """Return name and value; the value is that of the declared type, None if not read here."""
        kinds = {
            1: BYTES, 2: FIXED32, 3: VARINT, 4: BYTES, 5: BYTES, 6: BYTES, 7: FIXED32, 8: VARINT,
            9: BYTES, 10: BYTES, 11: BYTES, 20: VARINT, 22: BYTES, 23: BYTES,
        }  # fmt: skip
        name, kind = "", 0
        single: dict[int, Value] = {}
        floats: list[float] = []
        ints: list[int] = []
        strings: list[bytes] = []
        tensors: list[Tensor] = []
        graphs: list[Graph] = []
        once = frozenset((1, 2, 3, 4, 5, 6, 20, 22))
        for number, wire, value, part in self._each(view, kinds, once):
            if number == 1:
                name = _text(part)
            elif number == 2:
                single[1] = struct.unpack("<f", part)[0]
            elif number == 3:
                single[2] = _signed(value, 64)
            elif number == 4:
                single[3] = bytes(part)
            elif number == 5:
                single[4] = self._tensor(part)
            elif number == 6:
                self._subgraphs += 1
                single[5] = self._graph(part, depth + 1)
            elif number == 7:
                floats += _numbers((part,), 4, self._room(floats))
            elif number == 8:
                ints += self._ints(wire, value, part, self._room(ints))
            elif number == 9:
                strings.append(bytes(part))
            elif number == 10:
                tensors.append(self._tensor(part))
            elif number == 11:
                self._subgraphs += 1
                graphs.append(self._graph(part, depth + 1))
            elif number == 20:
                kind = value
            else:
                self._sparse(part)
            if max(len(floats), len(ints)) > self._limits.values_max:
                raise OnnxFormatError(f"attribute {name!r} has too many numbers")
        many: dict[int, Value] = {
            1: 0.0, 2: 0, 3: b"", 6: tuple(floats), 7: tuple(ints), 8: tuple(strings),
            9: tuple(tensors), 10: tuple(graphs),
        }  # fmt: skip
        return name, single.get(kind, many.get(kind))

    def _ints(self, wire: int, value: int, part: memoryview, room: int) -> list[int]:
        """Return the numbers of one field, packed or not; at most room + 1."""
        if wire == VARINT:
            return [_signed(value, 64)]
        return [int(each) for each in _numbers((part,), 7, room)]

    def _room(self, values: Sequence[object]) -> int:
        return self._limits.values_max - len(values)

    def _tensor(self, view: memoryview) -> Tensor:
        kinds = {1: VARINT, 2: VARINT, 8: BYTES, 9: BYTES, 13: BYTES, 14: VARINT, **_TYPED_WIRE}
        name, location, kind, external = "", "", 0, False
        raw: memoryview | None = None
        dims: list[int] = []
        typed: dict[int, list[memoryview]] = {}
        once = frozenset((2, 8, 9, 14))
        for number, wire, value, part in self._each(view, kinds, once):
            if number == 1:
                room = self._limits.dims_max - len(dims)
                dims += self._ints(wire, value, part, room)
                if len(dims) > self._limits.dims_max or min(dims, default=0) < 0:
                    raise OnnxFormatError("a tensor's dims are negative or too many")
            elif number == 2:
                kind = _signed(value, 32)
            elif number == 8:
                name = _text(part)
            elif number == 9:
                raw = part
            elif number == 13:
                external = True
                key, text = self._entry(part)
                location = text if key == "location" else location
            elif number == 14:
                external = external or value != 0
            else:
                typed.setdefault(number, []).append(part)
        if external:
            self._external.append(location)
        return Tensor(
            name=name,
            type=kind,
            dims=tuple(dims),
            raw=raw,
            typed={number: tuple(parts) for number, parts in typed.items()},
            external=external,
            location=location,
            values_max=self._limits.values_max,
        )

    def _entry(self, view: memoryview) -> tuple[str, str]:
        texts = {1: "", 2: ""}
        for number, _, _, part in self._each(view, {1: BYTES, 2: BYTES}, frozenset((1, 2))):
            texts[number] = _text(part)
        return texts[1], texts[2]

    def _value_info(self, view: memoryview) -> ValueInfo:
        name, kind = "", 0
        shape: tuple[int | str | None, ...] | None = None
        for number, _, _, part in self._each(view, {1: BYTES, 2: BYTES}, frozenset((1, 2))):
            if number == 1:
                name = _text(part)
                continue
            kinds = dict.fromkeys((1, 4, 5, 8, 9), BYTES)
            found = list(self._each(part, kinds, frozenset(kinds)))
            if len(found) > 1:
                raise OnnxFormatError(f"{name!r} has two types")
            if found and found[0][0] == 1:
                kind, shape = self._tensor_type(found[0][3])
        return ValueInfo(name=name, type=kind, shape=shape)

    def _tensor_type(self, view: memoryview) -> tuple[int, tuple[int | str | None, ...] | None]:
        kind = 0
        shape: tuple[int | str | None, ...] | None = None
        for number, _, value, part in self._each(view, {1: VARINT, 2: BYTES}, frozenset((1, 2))):
            if number == 1:
                kind = _signed(value, 32)
                continue
            dims = [self._dim(dim) for _, _, _, dim in self._each(part, {1: BYTES})]
            if len(dims) > self._limits.dims_max:
                raise OnnxFormatError("a shape has too many axes")
            shape = tuple(dims)
        return kind, shape

    def _dim(self, view: memoryview) -> int | str | None:
        found: int | str | None = None
        for number, _, value, part in self._each(view, {1: VARINT, 2: BYTES}, frozenset((1, 2))):
            if found is not None:
                raise OnnxFormatError("an axis has two lengths")
            found = _signed(value, 64) if number == 1 else _text(part)
        # A negative length is how some exporters write a free axis.
        return None if isinstance(found, int) and found < 0 else found


def _text(part: memoryview) -> str:
    try:
        return str(part, "utf-8")
    except UnicodeDecodeError as exc:
        raise OnnxFormatError("a name is not UTF-8") from exc


def _domain(part: memoryview) -> str:
    domain = _text(part)
    return "" if domain == "ai.onnx" else domain
