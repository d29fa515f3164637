"""Read what a .tflite file says, and refuse one that does not hold together.

    bytes --read--> TfliteGraph: graphs, tensors, operators, signatures; every index in range

LiteRT checks that a file is a well-formed flatbuffer, and then trusts its indices, types and
counts: a file with a wrong one ends the process. So ``read`` believes nothing. It knows the
graph and how many operands an operator has, not what the operators do: the trial runs an unknown
model in a child, because options that are hostile on purpose can still harm.

Rule: an operator reads only what an earlier one, the caller or the file wrote, and writes
      nothing twice: LiteRT would read freed memory and write into the file's bytes.

Source of the fields' numbers: LiteRT's schema.fbs, version 3.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Final, NamedTuple

from .errors import KernelError
from .flatbuffer import FlatbufferError, Reader, Table

__all__ = [
    "Quantization",
    "TfliteError",
    "TfliteGraph",
    "TfliteLimits",
    "TfliteOperator",
    "TfliteSignature",
    "TfliteSubgraph",
    "TfliteTensor",
    "read",
]

NO_SIGNATURE = ""  # the key of the only graph of a file without signatures
# How many operands LiteRT's kernels take for granted; one input and one output for the others.
# By number in the schema's BuiltinOperator.
_INPUTS_LEAST: Final[dict[int, int]] = {
    **dict.fromkeys((119, 129, 136, 142, 173, 196, 200, 206), 0),  # WHILE, VAR_HANDLE, ...
    **dict.fromkeys((0, 18, 41, 42, 55, 57, 58, 61, 62, 63, 71, 72, 78, 84, 86, 90, 95, 99), 2),
    **dict.fromkeys((3, 4, 7, 9, 15, 23, 34, 36, 39, 40, 48, 49, 54, 56, 69, 70, 74, 79), 2),
    **dict.fromkeys((81, 82, 89, 91, 94, 97, 100, 105, 107, 112, 115, 125, 126, 128, 130), 2),
    **dict.fromkeys((131, 132, 140, 144, 145, 149, 156, 160, 161, *range(163, 167)), 2),
    **dict.fromkeys((176, 181, 183, 184, 185, 188, 191, 193, 195, 197, 201, 207), 2),
    **dict.fromkeys((10, 37, 38, 60, 64, 65, 67, 96, 102, 122, 123, 137, 138, 141, 151), 3),
    **dict.fromkeys((153, 154, 155, 157, 168, 187, 190, 194, 203), 3),
    **dict.fromkeys((45, 68, 85), 4),  # STRIDED_SLICE, SPARSE_TO_DENSE, ONE_HOT
    **dict.fromkeys((16, 24, 27, 33, 35, 44, 46, 52, 120), 5),  # recurrent ones, NMS
    121: 6,
}
_OUTPUTS_LEAST: Final[dict[int, int]] = {
    **dict.fromkeys((31, 118, 119, 129, 138, 144, 173, 200, 206, 209), 0),  # CALL_ONCE, ASSIGN
    **dict.fromkeys((48, 103, 120), 2),  # TOPK_V2, UNIQUE
    121: 3,
}
# Which inputs may be left out (-1): LiteRT follows the others without a look.
_LSTM_OPTIONAL = frozenset({1, 5, *range(9, 13), 16, 17, *range(20, 24)})
_OPTIONAL: Final[dict[int, frozenset[int]]] = {
    **dict.fromkeys((3, 4, 9, 132), frozenset({2})),  # convolutions, FULLY_CONNECTED: the bias
    **dict.fromkeys((27, 67, 141), frozenset({3})),  # SVDF, transposed convolutions: the bias
    **dict.fromkeys((16, 44), _LSTM_OPTIONAL),
    52: frozenset(range(1, 48)),
}
# Operators that move bytes and do not look at the types: the first input's is the output's.
# RESHAPE, PAD, GATHER, BATCH_TO_SPACE_ND, SPACE_TO_BATCH_ND, TRANSPOSE, SQUEEZE, ...
_SAME_TYPE: Final = frozenset(
    {5, 22, 26, 34, 36, 37, 38, 39, 43, 45, 65, 69, 70, 88, 100, 105, 130}
)
# Which operands are handles of resources (variables, tables), for those operators that have any.
_RESOURCE_INPUTS: Final = {137: 1, 138: 1, 139: 1, 143: 1, 144: 1}
_RESOURCE_OUTPUTS: Final = {136: 1, 142: 1}
_RESOURCE_ANY: Final = frozenset({31, 32, 118, 119})  # CALL, CUSTOM, IF, WHILE pass them on
BUILTIN_CUSTOM = 32
BUILTIN_STRIDED_SLICE = 45
BUILTIN_VAR_HANDLE = 142
BUILTIN_READ_VARIABLE = 143
BUILTIN_ASSIGN_VARIABLE = 144


class TfliteError(KernelError, ValueError):
    """Bytes are not a .tflite model that can be run; LiteRT has not seen them."""

    code = "ext.litert.model"


class _Kind(NamedTuple):
    name: str
    onnx: int  # onnx.TensorProto.DataType; 0: cannot be an input or output
    element: int  # LiteRtElementType
    size: int  # bytes of an element; 0: not a whole number of them


# by number in the schema's TensorType
_KINDS: Final = {
    0: _Kind("float", 1, 1, 4),
    1: _Kind("float16", 10, 10, 2),
    2: _Kind("int32", 6, 2, 4),
    3: _Kind("uint8", 2, 3, 1),
    4: _Kind("int64", 7, 4, 8),
    5: _Kind("string", 0, 5, 0),
    6: _Kind("bool", 9, 6, 1),
    7: _Kind("int16", 5, 7, 2),
    8: _Kind("complex64", 0, 8, 8),
    9: _Kind("int8", 3, 9, 1),
    10: _Kind("double", 11, 11, 8),
    11: _Kind("complex128", 0, 12, 16),
    12: _Kind("uint64", 13, 13, 8),
    13: _Kind("resource", 0, 14, 0),
    14: _Kind("variant", 0, 15, 0),
    15: _Kind("uint32", 12, 16, 4),
    16: _Kind("uint16", 4, 17, 2),
    17: _Kind("int4", 0, 18, 0),
    18: _Kind("bfloat16", 16, 19, 2),
    19: _Kind("int2", 0, 20, 0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TfliteLimits:
    """How large a file may be inside; what is beyond is refused before LiteRT sees it."""

    tables_max: int = 250_000
    """Tables visited. The largest model met has 8,000; offsets may share, so size bounds none."""
    tensor_bytes_max: int = 1 << 30
    """Bytes of any one tensor. A file of 1 KB can declare petabytes, and LiteRT would try."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How integers mean real numbers: real = scale * (integer - zero_point)."""

    scale: tuple[float, ...]
    """One for the tensor, or one for each index of ``axis``."""
    zero_point: tuple[int, ...]
    """As many as scales."""
    axis: int
    """Which axis has its own scales, if there is more than one."""


@dataclass(frozen=True, slots=True)
class TfliteTensor:
    """One tensor as the file declares it."""

    name: str
    type: str
    """ONNX's name of the element type, lower case, or the schema's if ONNX has none."""
    onnx_type: int
    """Number of the type in onnx.TensorProto.DataType; 0 if it cannot be an input or output."""
    shape: tuple[int, ...]
    """Axes; -1 is free."""
    quantization: Quantization | None
    variable: bool
    """Whether it keeps its value from one call to the next."""
    constant: bool
    """Whether the file has its value."""
    element: int
    """Number of the type in LiteRtElementType."""


@dataclass(frozen=True, slots=True)
class TfliteOperator:
    """One operator of a graph."""

    code: int
    """Number in the schema's BuiltinOperator; 32 is a custom one."""
    custom: str
    """Name of a custom operator, else empty."""
    inputs: tuple[int, ...]
    """Indices of tensors; -1 is an optional one left out."""
    outputs: tuple[int, ...]
    resource: str
    """Name of the variable that a VAR_HANDLE stands for, else empty."""


@dataclass(frozen=True, slots=True)
class TfliteSubgraph:
    """One graph of the file; those beyond the first are for signatures and control flow."""

    name: str
    tensors: tuple[TfliteTensor, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    operators: tuple[TfliteOperator, ...]


@dataclass(frozen=True, slots=True)
class TfliteSignature:
    """A named entry: which tensor is which input and output."""

    key: str
    subgraph: int
    inputs: tuple[tuple[str, int], ...]
    """(name, index of the tensor) each."""
    outputs: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class TfliteGraph:
    """What a .tflite file says, checked: every index in it is in range."""

    description: str
    subgraphs: tuple[TfliteSubgraph, ...]
    signatures: tuple[TfliteSignature, ...]
    """Never empty: a file without any has one with the key "" and the tensors' own names."""

    @property
    def custom(self) -> frozenset[str]:
        """Names of the custom operators."""
        return frozenset(o.custom for g in self.subgraphs for o in g.operators if o.custom)

    @property
    def stateful(self) -> bool:
        """Whether a call can change what later calls answer."""
        return any(
            any(o.code == BUILTIN_VAR_HANDLE for o in g.operators)
            or any(t.variable for t in g.tensors)
            for g in self.subgraphs
        )

    def signature(self, key: str | None = None) -> TfliteSignature:
        """Return the signature of that key; None is the first.

        Raises:
            TfliteError: There is none; the message lists those that are.
        """
        for found in self.signatures:
            if key is None or found.key == key:
                return found
        keys = ", ".join(repr(s.key) for s in self.signatures)
        raise TfliteError(f"the model has no signature {key!r}; it has {keys}")


def _indices(found: Sequence[int], count: int, what: str, *, least: int = 0) -> tuple[int, ...]:
    for index in found:
        if not least <= index < count:
            raise TfliteError(f"broken model: {what} {index} does not exist, there are {count}")
    return tuple(found)


class _File:
    """The parts of a file, read in the order in which they refer to each other."""

    def __init__(self, model: bytes, limits: TfliteLimits) -> None:
        self.limits = limits
        self.reader = Reader(model, tables_max=limits.tables_max)
        root = self.reader.root()
        if (version := root.scalar(0, "<I")) != 3:
            raise TfliteError(f"the model is of schema version {version}, not 3")
        if root.tables(8) or root.tables(9):
            raise TfliteError("the model keeps weights in other files, which are not followed")
        self.description = root.text(3)
        self.codes = [
            (max(code.scalar(0, "<b"), code.scalar(3, "<i")), code.text(1))
            for code in root.tables(1)
        ]
        self.buffers = [self.buffer(b) for b in root.tables(4)]
        for metadata in root.tables(6):
            metadata.text(0)
            _indices([metadata.scalar(1, "<I")], len(self.buffers), "buffer")
        self.subgraphs = tuple(self.subgraph(g) for g in root.tables(2))
        if not self.subgraphs:
            raise TfliteError("broken model: it has no graph")
        _check_variables(self.subgraphs)
        self.signatures = tuple(self.signature(s) for s in root.tables(7))

    def buffer(self, table: Table) -> tuple[int, int]:
        """Return where the bytes start, and how many they are."""
        data = table.target(0)
        if data:
            return self.reader.vector(data, 1)
        offset, size = table.scalar(1, "<Q"), table.scalar(2, "<Q")  # behind the flatbuffer
        if offset > 1 and offset + size > len(self.reader.data):
            raise TfliteError(f"broken model: a buffer at byte {offset} ends outside of it")
        return (offset, size) if offset > 1 else (0, 0)

    def tensor(self, table: Table) -> TfliteTensor:
        kind = _KINDS.get(number := table.scalar(1, "<b"))
        if kind is None:
            raise TfliteError(f"the model has a tensor of type {number}, which is not known")
        declared, free = table.numbers(0, "i"), table.numbers(7, "i")
        if free and len(free) != len(declared):
            raise TfliteError(f"broken model: shape {declared} and shape signature {free} differ")
        if any(d < 0 for d in declared) or any(
            f not in (d, -1) for f, d in zip(free, declared, strict=False)
        ):
            raise TfliteError(f"broken model: no such shape: {declared}, {free}")
        size = prod(declared) * max(kind.size, 1)
        if size > self.limits.tensor_bytes_max:
            raise TfliteError(
                f"a tensor of shape {declared} takes more than "
                f"{self.limits.tensor_bytes_max} bytes",
                hint="raise tensor_bytes_max if it comes from a source you trust",
            )
        (buffer,) = _indices([table.scalar(2, "<I")], len(self.buffers), "buffer")
        held = self.buffers[buffer][1]
        sparse = table.table(6) is not None
        if held and kind.size and not sparse and held != size:
            raise TfliteError(f"broken model: {held} bytes for a tensor of {size}")
        return TfliteTensor(
            table.text(3),
            kind.name,
            kind.onnx,
            tuple(free or declared),
            _quantization(table.table(4), declared),
            bool(table.scalar(5, "<B")),
            held > 0,
            kind.element,
        )

    def operator(self, table: Table, count: int) -> TfliteOperator:
        """Return an operator of a graph with that many tensors."""
        (index,) = _indices([table.scalar(0, "<I")], len(self.codes), "operator code")
        code, custom = self.codes[index]
        inputs = _indices(table.numbers(1, "i"), count, "tensor", least=-1)
        outputs = _indices(table.numbers(2, "i"), count, "tensor")
        table.numbers(5, "B")
        _indices(table.numbers(8, "i"), count, "tensor", least=-1)
        options = table.table(4)
        table.table(12)
        resource = ""
        if code == BUILTIN_VAR_HANDLE and options is not None:
            resource = f"{options.text(0)}/{options.text(1)}"
        return TfliteOperator(
            code, custom if code == BUILTIN_CUSTOM else "", inputs, outputs, resource
        )

    def subgraph(self, table: Table) -> TfliteSubgraph:
        rows, operators = table.tables(0), table.tables(3)
        tensors = tuple(self.tensor(row) for row in rows)
        graph = TfliteSubgraph(
            table.text(4),
            tensors,
            _indices(table.numbers(1, "i"), len(tensors), "tensor"),
            _indices(table.numbers(2, "i"), len(tensors), "tensor"),
            tuple(self.operator(o, len(tensors)) for o in operators),
        )
        for row, operator in zip(operators, graph.operators, strict=True):
            _check_operands(operator, tensors)
            if operator.code == BUILTIN_STRIDED_SLICE:
                bounds = [self.integers(rows[i], tensors[i]) for i in operator.inputs[1:4]]
                _check_slice(row.table(4), operator, tensors, bounds)
        _check_order(graph)
        return graph

    def integers(self, table: Table, tensor: TfliteTensor) -> tuple[int, ...]:
        """Return the values of a constant of int32; empty if it is none."""
        first, size = self.buffers[table.scalar(2, "<I")]
        if tensor.type != "int32":
            return ()
        return struct.unpack_from(f"<{size // 4}i", self.reader.data, first)

    def signature(self, table: Table) -> TfliteSignature:
        (index,) = _indices([table.scalar(4, "<I")], len(self.subgraphs), "subgraph")
        graph = self.subgraphs[index]
        ports: list[tuple[tuple[str, int], ...]] = []
        for field, allowed in ((0, graph.inputs), (1, graph.outputs)):
            rows = tuple((m.text(0), int(m.scalar(1, "<I"))) for m in table.tables(field))
            if any(i not in allowed for _, i in rows) or len(rows) != len(set(allowed)):
                raise TfliteError("broken model: a signature's ports are not those of its graph")
            ports.append(rows)
        if not (key := table.text(2)):
            raise TfliteError("broken model: a signature has no key")
        return TfliteSignature(key, index, *ports)


def _quantization(table: Table | None, shape: tuple[int, ...]) -> Quantization | None:
    if table is None or not (scale := table.numbers(2, "f")):
        return None
    zero_point = table.numbers(3, "q") or (0,) * len(scale)
    axis = table.scalar(6, "<i")
    if len(zero_point) == 1:  # short for the same everywhere
        zero_point = zero_point * len(scale)
    if len(zero_point) != len(scale):
        raise TfliteError(f"broken model: {len(scale)} scales, {len(zero_point)} zero points")
    if len(scale) > 1 and not (0 <= axis < len(shape) and shape[axis] == len(scale)):
        raise TfliteError(f"broken model: {len(scale)} scales do not fit axis {axis} of {shape}")
    return Quantization(scale, zero_point, axis)


def _check_order(graph: TfliteSubgraph) -> None:
    """Check the rule at the head of this file."""
    held = {
        i for i, t in enumerate(graph.tensors) if t.constant or t.variable or 0 in t.shape
    } | set(graph.inputs)
    for operator in graph.operators:
        for index in operator.inputs:
            if index >= 0 and index not in held:
                raise TfliteError(f"broken model: tensor {index} is read before it is written")
        for index in operator.outputs:
            if index in held and not graph.tensors[index].variable:
                raise TfliteError(f"broken model: tensor {index} is written twice")
            held.add(index)
    for index in graph.outputs:
        if index not in held:
            raise TfliteError(f"broken model: output tensor {index} is never written")


def _check_operands(operator: TfliteOperator, tensors: Sequence[TfliteTensor]) -> None:
    """Check that an operator has the operands, of the kinds, that LiteRT takes for granted."""
    code, inputs, outputs = operator.code, operator.inputs, operator.outputs
    if code == BUILTIN_CUSTOM:
        return
    optional = _OPTIONAL.get(code, frozenset())
    if (
        len(inputs) < _INPUTS_LEAST.get(code, 1)
        or len(outputs) < _OUTPUTS_LEAST.get(code, 1)
        or any(t < 0 and i not in optional for i, t in enumerate(inputs))
    ):
        raise TfliteError(f"broken model: an operator {code} with operands {inputs}, {outputs}")
    if code in _SAME_TYPE:
        kinds = {tensors[i].type for i in (inputs[0], *outputs)}
        if len(kinds) > 1:
            raise TfliteError(f"broken model: an operator {code} mixes {sorted(kinds)}")
    if code in _RESOURCE_ANY:
        return
    for operands, handles in (
        (inputs, _RESOURCE_INPUTS.get(code, 0)),
        (outputs, _RESOURCE_OUTPUTS.get(code, 0)),
    ):
        for place, index in enumerate(operands):
            is_handle = index >= 0 and tensors[index].type == "resource"
            if is_handle is not (place < handles):
                raise TfliteError(f"broken model: an operator {code} mixes values and handles")


def _check_slice(
    options: Table | None,
    operator: TfliteOperator,
    tensors: Sequence[TfliteTensor],
    bounds: Sequence[tuple[int, ...]],
) -> None:
    """Check that a STRIDED_SLICE gives the shape that the file says.

    It is what cuts the state of a streaming model, and a state that is larger than said is
    written past the end of its tensor. Shapes that are free or given by data are left out.
    """
    given, said = tensors[operator.inputs[0]].shape, tensors[operator.outputs[0]].shape
    masks = [options.scalar(i, "<i") if options is not None else 0 for i in range(6)]
    begin_mask, end_mask, ellipsis, added, dropped = masks[:5]
    axes = len(bounds[0])
    if -1 in given or -1 in said or ellipsis or added or not all(len(b) == axes for b in bounds):
        return
    if axes == 0 or axes > len(given):
        return
    shape = list(given)
    for axis, (begin, end, stride) in enumerate(zip(*bounds, strict=True)):
        if stride == 0:
            raise TfliteError("broken model: a slice with stride 0")
        try:
            chosen = range(given[axis])[
                None if begin_mask >> axis & 1 else begin : None
                if end_mask >> axis & 1
                else end : stride
            ]
        except ValueError as exc:
            raise TfliteError("broken model: no such slice") from exc
        shape[axis] = 1 if dropped >> axis & 1 else len(chosen)
    kept = [d for axis, d in enumerate(shape) if not dropped >> axis & 1]
    if tuple(kept) != said:
        raise TfliteError(f"broken model: a slice of {given} gives {kept}, the file says {said}")


def _check_variables(subgraphs: Sequence[TfliteSubgraph]) -> None:
    """Check that a variable is read and written with one type and shape."""
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}
    for graph in subgraphs:
        names = {o.outputs[0]: o.resource for o in graph.operators if o.code == BUILTIN_VAR_HANDLE}
        for operator in graph.operators:
            if operator.code == BUILTIN_READ_VARIABLE:
                value = graph.tensors[operator.outputs[0]]
            elif operator.code == BUILTIN_ASSIGN_VARIABLE:
                value = graph.tensors[operator.inputs[1]]
            else:
                continue
            name = names.get(operator.inputs[0], "")
            if name and seen.setdefault(name, (value.type, value.shape)) != (
                value.type,
                value.shape,
            ):
                raise TfliteError(f"broken model: the variable {name!r} has two shapes")


def read(model: bytes, limits: TfliteLimits | None = None) -> TfliteGraph:
    """Check a .tflite file and return what it says.

    Args:
        model: The file's bytes.
        limits: How large it may be inside.

    Returns:
        The graphs, with names, types, shapes, quantization and operators; no weights.

    Raises:
        TfliteError: It is not such a file, is cut off, points outside of itself, or is too large.
    """
    if model[4:8] != b"TFL3":
        raise TfliteError("not a .tflite model: bytes 4 to 7 are not TFL3")
    try:
        file = _File(model, limits or TfliteLimits())
    except FlatbufferError as exc:
        raise TfliteError(f"not a .tflite model: {exc}", hint=exc.hint) from exc
    named = file.signatures
    if not named:
        first = file.subgraphs[0]
        ports = [
            tuple((first.tensors[i].name, i) for i in indices)
            for indices in (first.inputs, first.outputs)
        ]
        named = (TfliteSignature(NO_SIGNATURE, 0, *ports),)
    return TfliteGraph(file.description, file.subgraphs, named)
