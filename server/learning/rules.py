"""Reverse-mode gradient rules, one for each operator.

A rule takes the tape, the node, the gradient of its first output and which inputs need one, and
returns one gradient (or None) for each input. ``RULES`` is the table; what it lacks is refused.

Traps that the rules step around: a weight gradient as one huge convolution is an order slower
than a batched product of shifted slices; ReLU' is Sign(y); the mean of a normalisation must be
recomputed, for the fused operators do not say it.

Sources: Griewank, Walther, "Evaluating Derivatives" (2008) for the calculus; Dumoulin, Visin,
"A guide to convolution arithmetic" (2016) for transposed convolutions; Ioffe, Szegedy (2015) and
Ba, Kiros, Hinton (2016) for the normalisations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import onnx

from .errors import UnsupportedOperatorError
from .tape import Tape, attributes

Grads = list[str | None]
Rule = Callable[[Tape, onnx.NodeProto, str, Sequence[bool]], Grads]

EPSILON: Final = 1e-5  # the default of every normalisation operator


def refuse(node: onnx.NodeProto, why: str) -> UnsupportedOperatorError:
    """Return the error for a use of an operator that has no rule."""
    label = node.name or (node.output[0] if node.output else "?")
    return UnsupportedOperatorError(
        f"{node.op_type} node {label!r}: {why}",
        hint="train another form of the network, or freeze what comes before this node",
    )


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


def _relu(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    return [t.op("Mul", [grad, t.op("Sign", [node.output[0]])])]


def _sigmoid(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    y = node.output[0]
    slope = t.op("Mul", [y, t.op("Sub", [t.constant(1.0), y])])
    return [t.op("Mul", [grad, slope])]


def _tanh(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    y = node.output[0]
    slope = t.op("Sub", [t.constant(1.0), t.op("Mul", [y, y])])
    return [t.op("Mul", [grad, slope])]


def _softmax(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    y, axis = node.output[0], attributes(node).get("axis", -1)
    weighted = t.op("Mul", [grad, y])
    total = t.sum(weighted, [axis], keep=True)
    return [t.op("Sub", [weighted, t.op("Mul", [y, total])])]


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


def _reduce_mean(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    x = node.input[0]
    rank, found = len(t.shape(x)), attributes(node)
    axes = found.get("axes")
    if axes is None and len(node.input) > 1 and node.input[1]:
        axes = t.constants[node.input[1]].tolist()
    chosen = sorted(axis % rank for axis in (axes if axes is not None else range(rank)))
    if not found.get("keepdims", 1):
        grad = t.op("Unsqueeze", [grad, t.ints(*chosen)])
    count = int(np.prod(t.sizes(x, chosen)))
    share = t.op("Mul", [grad, t.constant(1 / count)])
    return [t.op("Expand", [share, t.op("Shape", [x])]), *[None] * (len(node.input) - 1)]


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
    if len(shape_a) < 2 or len(shape_b) != 2:
        raise refuse(node, "the second operand must be a matrix")
    grads: Grads = [None, None]
    if need[0]:
        grads[0] = t.op("MatMul", [grad, t.transpose(b, [1, 0])])
    if need[1]:
        rows_a = t.reshape(a, [None, shape_a[-1]])
        rows_g = t.reshape(grad, [None, out[-1]])
        grads[1] = t.op("Gemm", [rows_a, rows_g], transA=1)
    return grads


# --- convolution and pooling -----------------------------------------------------------------


def _spatial(t: Tape, node: onnx.NodeProto) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return (strides, dilations, pads at the start, pads at the end)."""
    found = attributes(node)
    rank = len(t.shape(node.input[0])) - 2
    if found.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") or found.get("ceil_mode", 0):
        raise refuse(node, "auto_pad and ceil_mode have no rule; export explicit pads")
    pads = list(found.get("pads", [0] * 2 * rank))
    return (
        list(found.get("strides", [1] * rank)),
        list(found.get("dilations", [1] * rank)),
        pads[:rank],
        pads[rank:],
    )


def _conv(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    x, w = node.input[:2]
    strides, dilations, starts, ends = _spatial(t, node)
    axes = range(2, 2 + len(strides))
    size, out = t.sizes(x, axes), t.sizes(node.output[0], axes)
    outputs, depth, *kernel = t.sizes(w, range(len(axes) + 2))
    groups, channels = attributes(node).get("group", 1), t.sizes(x, [1])[0]
    grads: Grads = [None] * len(node.input)
    if need[0]:
        # What a stride cut off at the end must come back, or the gradient is too short.
        rest = [
            size[i]
            - ((out[i] - 1) * strides[i] - starts[i] - ends[i] + dilations[i] * (kernel[i] - 1) + 1)
            for i in range(len(size))
        ]
        grads[0] = t.op(
            "ConvTranspose", [grad, w], strides=strides, dilations=dilations,
            pads=starts + ends, group=groups, output_padding=rest,
        )  # fmt: skip
    if need[1]:
        padded = x
        if any(starts + ends):
            padded = t.op("Pad", [x, t.ints(0, 0, *starts, 0, 0, *ends)])
        shifts = []
        for at in itertools.product(*[range(k) for k in kernel]):
            first = [a * d for a, d in zip(at, dilations, strict=True)]
            last = [f + (o - 1) * s + 1 for f, o, s in zip(first, out, strides, strict=True)]
            shifts.append(
                t.op(
                    "Slice",
                    [padded, t.ints(*first), t.ints(*last), t.ints(*axes), t.ints(*strides)],
                )
            )
        length, taps = int(np.prod(out)), len(shifts)
        if groups == channels == outputs and depth == 1:  # depthwise: one sum for each tap
            over = [0, *axes]
            sums = [
                t.op("Unsqueeze", [t.sum(t.op("Mul", [each, grad]), over), t.ints(1)])
                for each in shifts
            ]
            stacked = t.op("Concat", sums, axis=1) if taps > 1 else sums[0]
            grads[1] = t.reshape(stacked, [channels, 1, *kernel])
        else:
            columns = [t.reshape(each, [None, groups, depth, length]) for each in shifts]
            matrix = t.op("Concat", columns, axis=2) if taps > 1 else columns[0]
            rows = t.reshape(grad, [None, groups, outputs // groups, length])
            product = t.sum(t.op("MatMul", [rows, t.transpose(matrix, [0, 1, 3, 2])]), [0])
            # (groups, outputs / groups, taps * depth) -> (outputs, depth, *kernel)
            split = t.reshape(product, [outputs, taps, depth])
            grads[1] = t.reshape(t.transpose(split, [0, 2, 1]), [outputs, depth, *kernel])
    if len(node.input) > 2 and need[2]:
        grads[2] = t.sum(grad, [0, *axes])
    return grads


def _max_pool(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    x = node.input[0]
    _spatial(t, node)
    if attributes(node).get("storage_order", 0):
        raise refuse(node, "storage_order 1 has no rule")
    if len(node.output) < 2:
        node.output.append(t.name("where"))  # the forward node shall say which value won
    # Windows may overlap: the winners' gradients are added at their flat positions.
    zeros = t.op("ConstantOfShape", [t.op("ReduceProd", [t.op("Shape", [x])], keepdims=1)])
    where, flat = (t.reshape(name, [None]) for name in (node.output[1], grad))
    added = t.op("ScatterElements", [zeros, where, flat], axis=0, reduction="add")
    return [t.op("Reshape", [added, t.op("Shape", [x])])]


def _average_pool(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    x = node.input[0]
    strides, dilations, starts, ends = _spatial(t, node)
    found = attributes(node)
    if (any(starts + ends) and not found.get("count_include_pad", 0)) or max(dilations) > 1:
        raise refuse(node, "pads that are not counted, and dilations, have no rule")
    kernel = list(found["kernel_shape"])
    axes = range(2, 2 + len(kernel))
    size, out = t.sizes(x, axes), t.sizes(node.output[0], axes)
    rest = [
        size[i] - ((out[i] - 1) * strides[i] - starts[i] - ends[i] + kernel[i])
        for i in range(len(size))
    ]
    channels = t.sizes(x, [1])[0]
    ones = t.constant(np.full((channels, 1, *kernel), 1 / np.prod(kernel)))
    spread = t.op(
        "ConvTranspose", [grad, ones], strides=strides, pads=starts + ends, group=channels,
        output_padding=rest,
    )  # fmt: skip
    return [spread]


def _global_average_pool(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    x = node.input[0]
    count = int(np.prod(t.sizes(x, range(2, len(t.shape(x))))))
    share = t.op("Mul", [grad, t.constant(1 / count)])
    return [t.op("Expand", [share, t.op("Shape", [x])])]


# --- normalisation ---------------------------------------------------------------------------


def _normalised(t: Tape, x: str, axes: Sequence[int], epsilon: float) -> tuple[str, str]:
    """Return (normalised values, 1 / standard deviation)."""
    centred = t.op("Sub", [x, t.mean(x, axes)])
    variance = t.mean(t.op("Mul", [centred, centred]), axes)
    root = t.op("Sqrt", [t.op("Add", [variance, t.constant(epsilon)])])
    inverse = t.op("Reciprocal", [root])
    return t.op("Mul", [centred, inverse]), inverse


def _through(t: Tape, grad: str, unit: str, inverse: str, axes: Sequence[int]) -> str:
    """Return the gradient before a normalisation over ``axes``, from that of its result."""
    parallel = t.op("Mul", [unit, t.mean(t.op("Mul", [grad, unit]), axes)])
    rest = t.op("Sub", [grad, t.op("Add", [t.mean(grad, axes), parallel])])
    return t.op("Mul", [inverse, rest])


def _instance_norm(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    x, scale, _ = node.input
    rank = len(t.shape(x))
    axes = list(range(2, rank))
    unit, inverse = _normalised(t, x, axes, attributes(node).get("epsilon", EPSILON))
    wide = t.reshape(scale, [t.sizes(scale, [0])[0], *[1] * (rank - 2)])
    return [
        _through(t, t.op("Mul", [grad, wide]), unit, inverse, axes) if need[0] else None,
        t.sum(t.op("Mul", [grad, unit]), [0, *axes]) if need[1] else None,
        t.sum(grad, [0, *axes]) if need[2] else None,
    ]


def _layer_norm(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    x, scale = node.input[:2]
    rank = len(t.shape(x))
    found = attributes(node)
    first = found.get("axis", -1) % rank
    axes, lead = list(range(first, rank)), list(range(first))
    unit, inverse = _normalised(t, x, axes, found.get("epsilon", EPSILON))
    grads: Grads = [
        _through(t, t.op("Mul", [grad, scale]), unit, inverse, axes) if need[0] else None,
        t.sum(t.op("Mul", [grad, unit]), lead) if need[1] else None,
    ]
    if len(node.input) > 2:
        grads.append(t.sum(grad, lead) if need[2] else None)
    return grads


def _batch_norm(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    """Gradient of the training form, whose forward nodes :func:`batch_norm_forward` wrote."""
    x, scale = node.input[:2]
    rank = len(t.shape(x))
    axes = [0, *range(2, rank)]
    unit, inverse = _normalised(t, x, axes, attributes(node).get("epsilon", EPSILON))
    wide = t.reshape(scale, [t.sizes(scale, [0])[0], *[1] * (rank - 2)])
    return [
        _through(t, t.op("Mul", [grad, wide]), unit, inverse, axes) if need[0] else None,
        t.sum(t.op("Mul", [grad, unit]), axes) if need[1] else None,
        t.sum(grad, axes) if need[2] else None,
        None,
        None,
    ]


def batch_norm_forward(t: Tape, node: onnx.NodeProto) -> dict[str, str]:
    """Write the training form of a BatchNormalization and return {statistic: its new value}.

    The batch's own mean and variance normalise; the running ones move by ``1 - momentum``, the
    variance unbiased, as the operator's specification and torch have it.
    """
    x, scale, bias, mean, variance = node.input
    rank, found = len(t.shape(x)), attributes(node)
    channels, axes = t.sizes(x, [1])[0], [0, *range(2, rank)]
    wide = [channels, *[1] * (rank - 2)]
    unit, _ = _normalised(t, x, axes, found.get("epsilon", EPSILON))
    scaled = t.op("Mul", [unit, t.reshape(scale, wide)])
    t.op("Add", [scaled, t.reshape(bias, wide)], out=node.output[0])
    keep = found.get("momentum", 0.9)
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


RULES: Final[Mapping[str, Rule]] = {
    "Add": _add,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _div,
    "Dropout": _pass,
    "Flatten": _reshape,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "Identity": _pass,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "Mul": _mul,
    "ReduceMean": _reduce_mean,
    "Relu": _relu,
    "Reshape": _reshape,
    "Sigmoid": _sigmoid,
    "Softmax": _softmax,
    "Sub": _sub,
    "Tanh": _tanh,
    "Transpose": _transpose,
}
