"""Forward forms and gradient rules of the normalisations.

    unit = (x - mean) / sqrt(variance + epsilon),   y = unit * scale + bias

The fused operators do not give mean and variance away, so a training graph writes them out: the
forward pass and the gradient then share ``unit``, which costs less than the fused forward and a
second computation. The variance is the mean square of centred values, never a difference of
squares: channels with a large offset would lose all their digits.

Batch statistics normalise in training, and the running ones move; rows of weight 0 count in them.

Sources: Ioffe, Szegedy (2015), batch; Ba, Kiros, Hinton (2016), layer; Wu, He (2018), group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import onnx

from .tape import Grads, Tape, attributes, refuse

EPSILON: Final = 1e-5  # the default of every normalisation operator


def _unit(t: Tape, x: str, axes: Sequence[int], epsilon: float) -> tuple[str, str]:
    """Return (unit, 1 / standard deviation); the same question gets the same nodes."""

    def write() -> tuple[str, str]:
        centred = t.op("Sub", [x, t.mean(x, axes)])
        variance = t.mean(t.op("Mul", [centred, centred]), axes)
        root = t.op("Sqrt", [t.op("Add", [variance, t.constant(epsilon)])])
        inverse = t.op("Reciprocal", [root])
        return t.op("Mul", [centred, inverse]), inverse

    return t.once(("unit", x, tuple(axes), epsilon), write)


def _before(t: Tape, grad: str, unit: str, inverse: str, axes: Sequence[int]) -> str:
    """Return the gradient before a normalisation over ``axes``, from that of ``unit``."""
    parallel = t.op("Mul", [unit, t.mean(t.op("Mul", [grad, unit]), axes)])
    rest = t.op("Sub", [t.op("Sub", [grad, parallel]), t.mean(grad, axes)])
    return t.op("Mul", [rest, inverse])


def _axes(t: Tape, node: onnx.NodeProto) -> list[int]:
    """Return what an operator averages over."""
    rank = len(t.shape(node.input[0]))
    if node.op_type == "BatchNormalization":
        return [0, *range(2, rank)]
    if node.op_type == "LayerNormalization":
        return list(range(attributes(node).get("axis", -1) % rank, rank))
    return list(range(2, rank))


def _wide(t: Tape, node: onnx.NodeProto, name: str) -> str:
    """Return scale or bias in a shape that broadcasts over x: one value for each channel."""
    if node.op_type == "LayerNormalization":
        return name
    rank = len(t.shape(node.input[0]))
    return t.reshape(name, [*t.sizes(name, [0]), *[1] * (rank - 2)])


def _all(t: Tape, name: str, value: float) -> bool:
    """Tell whether a constant is nothing but ``value``, so that its operation can be left out."""
    return name in t.constants and bool((t.constants[name] == value).all())


def _units(t: Tape, node: onnx.NodeProto) -> tuple[str, str, list[int], list[int | None] | None]:
    """Return (unit, inverse, axes, shape of the groups or None), for x in its own shape."""
    x, found = node.input[0], attributes(node)
    epsilon = float(found.get("epsilon", EPSILON))
    if node.op_type != "GroupNormalization":
        axes = _axes(t, node)
        return *_unit(t, x, axes, epsilon), axes, None
    channels, *sizes = t.sizes(x, range(1, len(t.shape(x))))
    if t.sizes(node.input[1], [0]) != [channels]:
        raise refuse(node, "scale and bias must be per channel, as from opset 21 on")
    groups = int(found["num_groups"])
    split: list[int | None] = [None, groups, channels // groups * int(np.prod(sizes))]
    grouped = t.once(("groups", x), lambda: t.reshape(x, split))
    return *_unit(t, grouped, [2], epsilon), [2], split


def _forward(t: Tape, node: onnx.NodeProto) -> dict[str, str]:
    """Write the training form of a normalisation; return {running statistic: its new value}."""
    unit, _, _, split = _units(t, node)
    if split is not None:
        unit = t.once(("channels", unit), lambda: t.reshape(unit, t.shape(node.input[0])))
    scale, bias = node.input[1], node.input[2] if len(node.input) > 2 else ""
    scaled = unit if _all(t, scale, 1) else t.op("Mul", [unit, _wide(t, node, scale)])
    if not bias or _all(t, bias, 0):
        t.op("Identity", [scaled], out=node.output[0])
    else:
        t.op("Add", [scaled, _wide(t, node, bias)], out=node.output[0])
    return _moved(t, node) if node.op_type == "BatchNormalization" else {}


def _moved(t: Tape, node: onnx.NodeProto) -> dict[str, str]:
    """Return the running statistics after the batch.

    They move by ``1 - momentum``, the variance unbiased, as the operator's specification and torch
    have it.
    """
    x, _, _, mean, variance = node.input
    keep, axes, channels = attributes(node).get("momentum", 0.9), _axes(t, node), t.sizes(x, [1])[0]
    centre = t.mean(x, axes)
    centred = t.op("Sub", [x, centre])
    square = t.sum(t.op("Mul", [centred, centred]), axes)
    rows = t.op("Div", [t.op("Size", [x]), t.constant(channels, np.int64)])
    freedom = t.op("Sub", [t.op("Cast", [rows], to=onnx.TensorProto.FLOAT), t.constant(1.0)])
    unbiased = t.op("Div", [square, t.op("Max", [freedom, t.constant(1.0)])])
    moved = {}
    for name, now in ((mean, t.reshape(centre, [channels])), (variance, unbiased)):
        old = t.op("Mul", [name, t.constant(keep)])
        moved[name] = t.op("Add", [old, t.op("Mul", [now, t.constant(1 - keep)])])
    return moved


def normalisation(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    """Give the gradients of a normalisation whose training form the forward pass wrote."""
    x, scale = node.input[:2]
    unit, inverse, axes, split = _units(t, node)
    own = unit
    if split is not None:
        own = t.once(("channels", unit), lambda: t.reshape(unit, t.shape(x)))
    grads: Grads = [None] * len(node.input)
    if need[0]:
        inner = grad if _all(t, scale, 1) else t.op("Mul", [grad, _wide(t, node, scale)])
        if split is None:
            grads[0] = _before(t, inner, unit, inverse, axes)
        else:
            grouped = _before(t, t.reshape(inner, split), unit, inverse, axes)
            grads[0] = t.reshape(grouped, t.shape(x))
    if need[1]:
        grads[1] = _narrow(t, node, t.op("Mul", [grad, own]), scale)
    if len(node.input) > 2 and need[2]:
        grads[2] = _narrow(t, node, grad, node.input[2])
    return grads


def _narrow(t: Tape, node: onnx.NodeProto, whole: str, name: str) -> str:
    """Sum a gradient in the shape of x down to scale or bias; the inverse of :func:`_wide`."""
    shape = t.shape(node.input[0])
    if node.op_type == "LayerNormalization":
        return t.unbroadcast(whole, shape, t.shape(name))
    return t.sum(whole, [0, *range(2, len(shape))])


FORWARD: Final[Mapping[str, Callable[[Tape, onnx.NodeProto], dict[str, str]]]] = {
    kind: _forward
    for kind in (
        "BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization",
    )
}  # fmt: skip
