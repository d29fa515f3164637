"""A small builder of ONNX nodes for gradient rules: names, constants, shapes.

Every generated name starts with ``grad.``, so that it never meets a name of the user's graph.
Shapes are those that shape inference found; the batch is the one unknown size, written None.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import ArrayLike, DTypeLike
from onnx import helper

from .errors import UnsupportedOperatorError

T = TypeVar("T")
Shape = tuple[int | None, ...]
Grads = list[str | None]
"""One gradient for each input of a node; None for what needs none."""
Rule = Callable[["Tape", onnx.NodeProto, str, Sequence[bool]], Grads]
"""(tape, node, gradient of its first output, which inputs need one) -> gradients."""


def refuse(node: onnx.NodeProto, why: str) -> UnsupportedOperatorError:
    """Return the error for a use of an operator that has no rule."""
    label = node.name or (node.output[0] if node.output else "?")
    return UnsupportedOperatorError(
        f"{node.op_type} node {label!r}: {why}",
        hint="train another form of the network, or freeze what comes before this node",
    )


class Tape:
    """Collects nodes and constants. One for each graph that is built."""

    def __init__(self, shapes: dict[str, Shape], constants: dict[str, np.ndarray]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants = dict(constants)
        self._shapes = shapes
        self._made: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._once: dict[Hashable, Any] = {}
        self._count = 0

    def name(self, hint: str) -> str:
        """Return a new name."""
        self._count += 1
        return f"grad.{hint.lower()}.{self._count}"

    def shape(self, name: str) -> Shape:
        """Return the shape of a tensor of the user's graph.

        Raises:
            UnsupportedOperatorError: Shape inference did not find it.
        """
        try:
            return self._shapes[name]
        except KeyError as exc:
            raise UnsupportedOperatorError(
                f"the shape of {name!r} is not known before the model runs",
                hint="give the graph's inputs fixed sizes, all but the batch",
            ) from exc

    def sizes(self, name: str, axes: Sequence[int]) -> list[int]:
        """Return sizes along axes that must be known.

        Raises:
            UnsupportedOperatorError: One of them is the batch or unknown.
        """
        shape = self.shape(name)
        found = [shape[axis] for axis in axes]
        if any(size is None for size in found):
            raise UnsupportedOperatorError(f"{name!r} of shape {shape} must have fixed sizes")
        return [int(size) for size in found if size is not None]

    def op(self, kind: str, inputs: Sequence[str], *, out: str = "", **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        return self.ops(kind, inputs, outs=[out or self.name(kind)], **attributes)[0]

    def ops(
        self, kind: str, inputs: Sequence[str], *, outs: Sequence[str], **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs and return their names."""
        name = f"grad.node.{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, outs, name=name, **attributes))
        return list(outs)

    def constant(self, value: ArrayLike, dtype: DTypeLike = np.float32) -> str:
        """Return the name of a constant; equal ones are shared."""
        array = np.asarray(value, dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._made:
            self._made[key] = self.name("constant")
            self.constants[self._made[key]] = array
        return self._made[key]

    def ints(self, *values: int) -> str:
        """Return the name of an int64 vector."""
        return self.constant(list(values), np.int64)

    def once(self, key: Hashable, write: Callable[[], T]) -> T:
        """Return what ``write`` gave for this key the first time."""
        if key not in self._once:
            self._once[key] = write()
        found: T = self._once[key]
        return found

    def reshape(self, name: str, shape: Sequence[int | None]) -> str:
        """Reshape; the one None becomes whatever is left.

        Raises:
            UnsupportedOperatorError: More than one size is unknown.
        """
        if list(shape).count(None) > 1:
            raise UnsupportedOperatorError(
                f"a tensor of shape {tuple(shape)} has more than one unknown size",
                hint="give the graph's inputs fixed sizes, all but the batch",
            )
        return self.op("Reshape", [name, self.ints(*(-1 if d is None else d for d in shape))])

    def transpose(self, name: str, order: Sequence[int]) -> str:
        """Reorder axes."""
        return self.op("Transpose", [name], perm=list(order))

    def sum(self, name: str, axes: Sequence[int], *, keep: bool = False) -> str:
        """Sum over axes."""
        return self.op("ReduceSum", [name, self.ints(*axes)], keepdims=int(keep))

    def mean(self, name: str, axes: Sequence[int]) -> str:
        """Average over axes, which stay with size 1."""
        return self.op("ReduceMean", [name, self.ints(*axes)], keepdims=1)

    def spread(self, grad: str, name: str, axes: Sequence[int], factor: float) -> str:
        """Repeat a gradient along axes that were reduced to size 1, times a factor.

        A product with a constant, for onnxruntime's Expand is several times slower.
        """
        sizes = dict(zip(axes, self.sizes(name, axes), strict=True))
        shape = self.ints(*(sizes.get(axis, 1) for axis in range(len(self.shape(name)))))
        # Folded when the graph is loaded: the file stays small.
        return self.op("Mul", [grad, self.op("Expand", [self.constant(factor), shape])])

    def unbroadcast(self, grad: str, source: Shape, target: Shape) -> str:
        """Sum a gradient of shape ``source`` down to the operand's shape ``target``."""
        if source == target:
            return grad
        lead = len(source) - len(target)
        axes = [*range(lead)] + [
            lead + i for i, size in enumerate(target) if size == 1 and source[lead + i] != 1
        ]
        if axes:
            grad = self.sum(grad, axes)
        return self.reshape(grad, target)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name."""
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}
