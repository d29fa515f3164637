"""Reverse-mode gradient rules, one for each operator: ``RULES`` is the table.

A rule takes the tape, the node, the gradient of its first output and which inputs need one, and
returns one gradient (or None) for each input. What the table lacks is refused. Convolutions and
pooling are in ``spatial``, normalisations in ``normalise``.

Measured on onnxruntime's CPU kernels: a mask is cast and multiplied, for Where and Sign take four
and two times as long.

Source: Griewank, Walther, "Evaluating Derivatives" (2008).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import onnx

from . import normalise, spatial
from .tape import Grads, Rule, Shape, Tape, attributes, refuse

# --- elementwise -----------------------------------------------------------------------------


def _add(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    out = t.shape(node.output[0])
    return [
        t.unbroadcast(grad, out, t.shape(name)) if wanted else None
        for name, wanted in zip(node.input, need, strict=True)
    ]


def _sub(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    a, b = node.input
    out = t.shape(node.output[0])
    return [
        t.unbroadcast(grad, out, t.shape(a)) if need[0] else None,
        t.unbroadcast(t.op("Neg", [grad]), out, t.shape(b)) if need[1] else None,
    ]


def _mul(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    a, b = node.input
    out = t.shape(node.output[0])
    return [
        t.unbroadcast(t.op("Mul", [grad, b]), out, t.shape(a)) if need[0] else None,
        t.unbroadcast(t.op("Mul", [grad, a]), out, t.shape(b)) if need[1] else None,
    ]


def _div(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    a, b = node.input
    out = t.shape(node.output[0])
    to_a = t.op("Div", [grad, b])
    to_b = t.op("Neg", [t.op("Mul", [to_a, node.output[0]])]) if need[1] else ""
    return [
        t.unbroadcast(to_a, out, t.shape(a)) if need[0] else None,
        t.unbroadcast(to_b, out, t.shape(b)) if need[1] else None,
    ]


def _neg(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    return [t.op("Neg", [grad])]


def _mask(t: Tape, test: str, a: str, b: str) -> str:
    """Return 1.0 where a comparison holds, else 0.0."""
    return t.op("Cast", [t.op(test, [a, b])], to=onnx.TensorProto.FLOAT)


def _relu(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    return [t.op("Mul", [grad, _mask(t, "Greater", node.output[0], t.constant(0.0))])]


def _leaky_relu(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    alpha = attributes(node).get("alpha", 0.01)
    above = _mask(t, "Greater", node.input[0], t.constant(0.0))
    slope = t.op("Add", [t.op("Mul", [above, t.constant(1 - alpha)]), t.constant(alpha)])
    return [t.op("Mul", [grad, slope])]


def _clip(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    inside = _mask(t, "Equal", node.input[0], node.output[0])
    return [t.op("Mul", [grad, inside]), *[None] * (len(node.input) - 1)]


def _sigmoid(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    y = node.output[0]
    slope = t.op("Mul", [y, t.op("Sub", [t.constant(1.0), y])])
    return [t.op("Mul", [grad, slope])]


def _tanh(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    y = node.output[0]
    slope = t.op("Sub", [t.constant(1.0), t.op("Mul", [y, y])])
    return [t.op("Mul", [grad, slope])]


def _exp(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    return [t.op("Mul", [grad, node.output[0]])]


def _log(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    return [t.op("Div", [grad, node.input[0]])]


def _sqrt(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    return [t.op("Div", [t.op("Mul", [grad, t.constant(0.5)]), node.output[0]])]


def _softmax(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    y, axis = node.output[0], attributes(node).get("axis", -1)
    weighted = t.op("Mul", [grad, y])
    total = t.sum(weighted, [axis], keep=True)
    return [t.op("Sub", [weighted, t.op("Mul", [y, total])])]


def _log_softmax(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    total = t.sum(grad, [attributes(node).get("axis", -1)], keep=True)
    return [t.op("Sub", [grad, t.op("Mul", [t.op("Exp", [node.output[0]]), total])])]


def _cast(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    if attributes(node)["to"] != onnx.TensorProto.FLOAT:
        raise refuse(node, "only float32 can be trained")
    return [grad]


def _pass(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    return [grad, *[None] * (len(node.input) - 1)]


# --- shapes ----------------------------------------------------------------------------------


def _reshape(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    return [t.reshape(grad, t.shape(node.input[0])), *[None] * (len(node.input) - 1)]


def _transpose(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    rank = len(t.shape(node.input[0]))
    order = attributes(node).get("perm", list(range(rank))[::-1])
    return [t.transpose(grad, [int(i) for i in np.argsort(order)])]


def _concat(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    if len(node.input) == 1:
        return [grad]
    axis = attributes(node)["axis"]
    sizes = [t.sizes(name, [axis])[0] for name in node.input]
    outs = [t.name("split") for _ in sizes]
    return list(t.ops("Split", [grad, t.ints(*sizes)], outs=outs, axis=axis))


def _reduce(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    """Sum and mean over some axes; none named are all, unless ``noop_with_empty_axes``."""
    x, found = node.input[0], attributes(node)
    rank, axes = len(t.shape(x)), []
    if len(node.input) > 1 and node.input[1]:
        if node.input[1] not in t.constants:
            raise refuse(node, "the axes must be constants")
        axes = t.constants[node.input[1]].tolist()
    if not axes and found.get("noop_with_empty_axes", 0):
        return [grad, *[None] * (len(node.input) - 1)]
    chosen = sorted(axis % rank for axis in axes or range(rank))
    if not found.get("keepdims", 1):
        grad = t.op("Unsqueeze", [grad, t.ints(*chosen)])
    count = float(np.prod(t.sizes(x, chosen))) if node.op_type == "ReduceMean" else 1.0
    return [t.spread(grad, x, chosen, 1 / count), *[None] * (len(node.input) - 1)]


# --- linear ----------------------------------------------------------------------------------


def _gemm(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    found = attributes(node)
    flip_a, flip_b = found.get("transA", 0), found.get("transB", 0)
    alpha, beta = found.get("alpha", 1.0), found.get("beta", 1.0)
    a, b = node.input[:2]
    grads: Grads = [None] * len(node.input)
    if need[0]:
        grads[0] = (
            t.op("Gemm", [b, grad], alpha=alpha, transA=flip_b, transB=1)
            if flip_a
            else t.op("Gemm", [grad, b], alpha=alpha, transB=1 - flip_b)
        )
    if need[1]:
        grads[1] = (
            t.op("Gemm", [grad, a], alpha=alpha, transA=1, transB=flip_a)
            if flip_b
            else t.op("Gemm", [a, grad], alpha=alpha, transA=1 - flip_a)
        )
    if len(node.input) > 2 and need[2]:
        scaled = grad if beta == 1 else t.op("Mul", [grad, t.constant(beta)])
        grads[2] = t.unbroadcast(scaled, t.shape(node.output[0]), t.shape(node.input[2]))
    return grads


def _matmul(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    a, b = node.input
    shape_a, shape_b, out = t.shape(a), t.shape(b), t.shape(node.output[0])
    if len(shape_a) < 2 or len(shape_b) < 2:
        raise refuse(node, "a vector as operand has no rule; export a matrix")
    grads: Grads = [None, None]
    if need[0]:
        whole: Shape = (*out[:-2], *shape_a[-2:])
        product = t.op("MatMul", [grad, _flipped(t, b)])
        grads[0] = t.unbroadcast(product, whole, shape_a)
    if need[1] and len(shape_b) == 2:  # one product over all rows, without a batch of results
        rows_a = t.reshape(a, [None, shape_a[-1]])
        rows_g = t.reshape(grad, [None, out[-1]])
        grads[1] = t.op("Gemm", [rows_a, rows_g], transA=1)
    elif need[1]:
        whole = (*out[:-2], *shape_b[-2:])
        grads[1] = t.unbroadcast(t.op("MatMul", [_flipped(t, a), grad]), whole, shape_b)
    return grads


def _flipped(t: Tape, name: str) -> str:
    """Transpose the last two axes."""
    rank = len(t.shape(name))
    return t.transpose(name, [*range(rank - 2), rank - 1, rank - 2])


RULES: Final[Mapping[str, Rule]] = {
    "Add": _add,
    "AveragePool": spatial.average_pool,
    "BatchNormalization": normalise.normalisation,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": spatial.conv,
    "Div": _div,
    "Dropout": _pass,
    "Exp": _exp,
    "Flatten": _reshape,
    "Gemm": _gemm,
    "GlobalAveragePool": spatial.global_average_pool,
    "GroupNormalization": normalise.normalisation,
    "Identity": _pass,
    "InstanceNormalization": normalise.normalisation,
    "LayerNormalization": normalise.normalisation,
    "LeakyRelu": _leaky_relu,
    "Log": _log,
    "LogSoftmax": _log_softmax,
    "MatMul": _matmul,
    "MaxPool": spatial.max_pool,
    "Mul": _mul,
    "Neg": _neg,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
    "Relu": _relu,
    "Reshape": _reshape,
    "Sigmoid": _sigmoid,
    "Softmax": _softmax,
    "Sqrt": _sqrt,
    "Squeeze": _reshape,
    "Sub": _sub,
    "Tanh": _tanh,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}
