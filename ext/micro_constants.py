"""Constants of an ONNX graph, quantized ones too, and the attributes of its nodes.

A DequantizeLinear of a constant is a constant: it is kept as integers minus their zero point, with
the scales beside them.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .micro_program import NotAChainError, check
from .onnx_graph import FLOAT, INT8, INT32, INT64, UINT8, Graph, Node, Tensor

WEIGHTS_MAX = 4_000_000  # in one constant: what is larger gains nothing in the kernel path


def single(value: float) -> float:
    """Round to float32."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


@dataclass(frozen=True, slots=True)
class Quant:
    """How values are quantized: real = scale * (value - zero)."""

    scale: float
    zero: int
    type: int

    @property
    def low(self) -> int:
        """Smallest value minus the zero point."""
        return (-128 if self.type == INT8 else 0) - self.zero

    @property
    def high(self) -> int:
        """Largest value minus the zero point."""
        return self.low + 255

    def nearest(self, value: float, *, minus: int = 0) -> int:
        """Return a number rounded half to even, less `minus`, in the range."""
        return int(min(max(round(min(max(value, -1e6), 1e6)) - minus, self.low), self.high))


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant of the graph, in C order; quantized, if it comes from a DequantizeLinear."""

    shape: tuple[int, ...]
    values: array[Any]
    """Float32; or integers, minus the zero point if they are quantized."""
    type: int
    scales: tuple[float, ...] = ()
    """One, or one for each index of `axis`."""
    axis: int = 0
    zero: int = 0
    """Zero point that was taken off, if it is one."""

    def real(self) -> array[float]:
        """Return float32 values."""
        if not self.scales:
            check(self.type == FLOAT, "a constant is not float32")
            return self.values
        if len(self.scales) == 1:
            return array("f", [value * self.scales[0] for value in self.values])
        inner = math.prod(self.shape[self.axis + 1 :])
        count = len(self.scales)
        return array(
            "f",
            [value * self.scales[i // inner % count] for i, value in enumerate(self.values)],
        )


def _sane(scale: float) -> bool:
    """Whether ratios of such scales stay finite; NaN is none."""
    return 1e-18 < scale < 1e18


class Constants:
    """The constants of one graph, each read once."""

    def __init__(self, graph: Graph) -> None:
        self._tensors = graph.initializers
        self._made = {name: node for node in graph.nodes for name in node.outputs}
        self._known: dict[str, Constant | None] = {}

    def get(self, name: str) -> Constant | None:
        """Return the constant of that name; None if it is computed from the input.

        Raises:
            NotAChainError: It is of a type or size that the kernel path does not take.
            OnnxFormatError: Its bytes are not as many as its dims say.
        """
        if name not in self._known:
            node = self._made.get(name)
            dequantized = node is not None and node.op == "DequantizeLinear" and not node.domain
            made = self._dequantized(node) if node is not None and dequantized else None
            self._known[name] = made or self._plain(name)
        return self._known[name]

    def _plain(self, name: str) -> Constant | None:
        """Return an initializer, or what a Constant node holds."""
        tensor: object = self._tensors.get(name)
        node = self._made.get(name)
        if tensor is None and node is not None and node.op == "Constant" and not node.domain:
            tensor = node.attributes.get("value")
        if not isinstance(tensor, Tensor):
            return None
        check(tensor.count <= WEIGHTS_MAX, f"constant {name!r} has {tensor.count} elements")
        known = tensor.type in (FLOAT, UINT8, INT8, INT32, INT64)
        check(known, f"constant {name!r} has type {tensor.type}")
        return Constant(tensor.dims, tensor.values(), tensor.type)

    def _dequantized(self, node: Node) -> Constant | None:
        """Return the constant behind a DequantizeLinear; None if it is an activation."""
        held = [self._plain(name) for name in node.inputs if name]
        if len(held) < 2 or held[0] is None:
            return None
        data, scale = held[0], held[1]
        zero = held[2] if len(held) > 2 else Constant((), array("q", [0]), data.type)
        if scale is None or zero is None or scale.type != FLOAT or zero.type != data.type:
            raise NotAChainError("a scale or zero point is not constant, or of another type")
        scales, zeros = scale.values, zero.values
        check(data.type in (UINT8, INT8, INT32), "a quantized constant is not of 8 or 32 bits")
        check(data.type != INT32 or not any(zeros), "a zero point of 32 bits")
        check(not node.attributes.get("block_size"), "blocked quantization")
        check(len(scales) > 0 and all(map(_sane, scales)), "a scale is not > 0, or extreme")
        rank, axis = len(data.shape), int_of(node, "axis", 1)
        axis += rank if axis < 0 else 0
        if len(scales) > 1:
            check(0 <= axis < rank and data.shape[axis] == len(scales), "a scale does not fit")
        check(len(zeros) in (1, len(scales)), "a zero point does not fit")
        values = array("i", data.values)
        if any(zeros):
            inner = math.prod(data.shape[axis + 1 :]) if len(zeros) > 1 else 1
            for i, value in enumerate(values):
                values[i] = value - zeros[i // inner % len(zeros)]
        return Constant(data.shape, values, data.type, tuple(scales), axis, int(zeros[0]))

    def quant_of(self, node: Node) -> Quant:
        """Return the parameters of a QuantizeLinear or DequantizeLinear of an activation."""
        scale = self._plain(node.inputs[1])
        if scale is None or len(scale.values) != 1 or scale.type != FLOAT:
            raise NotAChainError("an activation is not quantized by one constant scale")
        kind, zero = UINT8, 0
        if len(node.inputs) > 2 and node.inputs[2]:
            held = self._plain(node.inputs[2])
            if held is None or len(held.values) != 1:
                raise NotAChainError("an activation is not quantized by one constant zero point")
            kind, zero = held.type, held.values[0]
        check(kind in (UINT8, INT8), "an activation is not quantized to 8 bits")
        for name, default in (("output_dtype", (0, kind)), ("precision", (0, FLOAT))):
            check(int_of(node, name, 0) in default, f"{name} of {node.op}")
        check(_sane(scale.values[0]), "a scale is not > 0, or extreme")
        return Quant(float(scale.values[0]), zero, kind)

    def ints(self, name: str) -> Sequence[int]:
        """Return a constant list of int64."""
        held = self.get(name)
        if held is None or held.type != INT64:
            raise NotAChainError("a shape or a list of axes is not constant")
        return tuple(held.values)


def int_of(node: Node, name: str, default: int) -> int:
    """Return an attribute that is an integer."""
    value = node.attributes.get(name, default)
    if not isinstance(value, int):
        raise NotAChainError(f"attribute {name} of {node.op} is no integer")
    return value


def float_of(node: Node, name: str, default: float) -> float:
    """Return an attribute that is a float."""
    value = node.attributes.get(name, default)
    if not isinstance(value, float):
        raise NotAChainError(f"attribute {name} of {node.op} is no float")
    return value


def bytes_of(node: Node, name: str, default: bytes) -> bytes:
    """Return an attribute that is a string."""
    value = node.attributes.get(name, default)
    if not isinstance(value, bytes):
        raise NotAChainError(f"attribute {name} of {node.op} is no string")
    return value


def ints_of(node: Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """Return an attribute that is a list of integers."""
    value = node.attributes.get(name, default)
    if not isinstance(value, tuple) or not all(isinstance(each, int) for each in value):
        raise NotAChainError(f"attribute {name} of {node.op} is no list of integers")
    return tuple(int(each) for each in value if isinstance(each, int))
