"""Gradient rules of convolutions and pooling, in one, two or three dimensions.

A convolution's gradient by its input is a transposed convolution. By its weights it is a batched
product of shifted slices: as one convolution with a kernel as large as the image it would be an
order slower.

Source: Dumoulin, Visin, "A guide to convolution arithmetic for deep learning" (2016).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from .tape import Grads, Tape, attributes, refuse


@dataclass(frozen=True, slots=True)
class _Window:
    """Where a kernel stands; one entry for each spatial axis."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    starts: list[int]
    ends: list[int]
    size: list[int]
    """Of the input."""
    out: list[int]
    """Of the output."""

    @property
    def axes(self) -> list[int]:
        return list(range(2, 2 + len(self.kernel)))

    @property
    def rest(self) -> list[int]:
        """What a stride cut off at the end: without it the gradient would be too short."""
        reach = [
            (o - 1) * s + d * (k - 1) + 1
            for o, s, d, k in zip(self.out, self.strides, self.dilations, self.kernel, strict=True)
        ]
        padded = [a + b + c for a, b, c in zip(self.size, self.starts, self.ends, strict=True)]
        return [a - b for a, b in zip(padded, reach, strict=True)]


def _window(t: Tape, node: onnx.NodeProto, kernel: list[int]) -> _Window:
    found, rank = attributes(node), len(kernel)
    if found.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") or found.get("ceil_mode", 0):
        raise refuse(node, "auto_pad and ceil_mode have no rule; export explicit pads")
    pads = list(found.get("pads", [0] * 2 * rank))
    axes = range(2, 2 + rank)
    return _Window(
        kernel,
        list(found.get("strides", [1] * rank)),
        list(found.get("dilations", [1] * rank)),
        pads[:rank],
        pads[rank:],
        t.sizes(node.input[0], axes),
        t.sizes(node.output[0], axes),
    )


def conv(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    """Convolution, with groups, strides, dilations and pads."""
    x, w = node.input[:2]
    outputs, depth, *kernel = t.sizes(w, range(len(t.shape(w))))
    at = _window(t, node, kernel)
    groups = attributes(node).get("group", 1)
    grads: Grads = [None] * len(node.input)
    if need[0]:
        grads[0] = t.op(
            "ConvTranspose", [grad, w], strides=at.strides, dilations=at.dilations,
            pads=at.starts + at.ends, group=groups, output_padding=at.rest,
        )  # fmt: skip
    if need[1]:
        shifts = _shifts(t, x, at)
        if groups == outputs and depth == 1:  # depthwise: one sum for each tap
            over = [0, *at.axes]
            sums = [t.sum(t.op("Mul", [each, grad]), over) for each in shifts]
            columns = [t.op("Unsqueeze", [each, t.ints(1)]) for each in sums]
            stacked = t.op("Concat", columns, axis=1)
            grads[1] = t.reshape(stacked, [outputs, 1, *kernel])
        else:
            length, taps = int(np.prod(at.out)), len(shifts)
            columns = [t.reshape(each, [None, groups, depth, length]) for each in shifts]
            matrix = t.op("Concat", columns, axis=2)
            rows = t.reshape(grad, [None, groups, outputs // groups, length])
            product = t.sum(t.op("MatMul", [rows, t.transpose(matrix, [0, 1, 3, 2])]), [0])
            # (groups, outputs / groups, taps * depth) -> (outputs, depth, *kernel)
            split = t.reshape(product, [outputs, taps, depth])
            grads[1] = t.reshape(t.transpose(split, [0, 2, 1]), [outputs, depth, *kernel])
    if len(node.input) > 2 and need[2]:
        grads[2] = t.sum(grad, [0, *at.axes])
    return grads


def _shifts(t: Tape, x: str, at: _Window) -> list[str]:
    """Return what each tap of the kernel sees, in the output's shape."""
    padded = x
    if any(at.starts + at.ends):
        padded = t.op("Pad", [x, t.ints(0, 0, *at.starts, 0, 0, *at.ends)])
    shifts = []
    for tap in itertools.product(*[range(k) for k in at.kernel]):
        first = [a * d for a, d in zip(tap, at.dilations, strict=True)]
        last = [f + (o - 1) * s + 1 for f, o, s in zip(first, at.out, at.strides, strict=True)]
        where = [t.ints(*each) for each in (first, last, at.axes, at.strides)]
        shifts.append(t.op("Slice", [padded, *where]))
    return shifts


def max_pool(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    """Maximum: the winner takes the gradient. Any geometry, for the node itself says who won."""
    x, found = node.input[0], attributes(node)
    if found.get("storage_order", 0):
        raise refuse(node, "storage_order 1 has no rule")
    if len(node.output) < 2:
        node.output.append(t.name("winner"))
    winner, kernel = node.output[1], list(found["kernel_shape"])
    plain = not any(found.get("pads", [0])) and not found.get("ceil_mode", 0)
    plain = plain and found.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    plain = plain and max(found.get("dilations", [1])) == 1
    if plain and kernel == list(found.get("strides", [1] * len(kernel))):
        size = t.op("Shape", [x])
        return [t.op("MaxUnpool", [grad, winner, size], kernel_shape=kernel, strides=kernel)]
    # Windows overlap: the winners' gradients are added at their flat positions.
    zeros = t.op("ConstantOfShape", [t.op("ReduceProd", [t.op("Shape", [x])], keepdims=1)])
    where, flat = (t.reshape(name, [None]) for name in (winner, grad))
    added = t.op("ScatterElements", [zeros, where, flat], axis=0, reduction="add")
    return [t.op("Reshape", [added, t.op("Shape", [x])])]


def average_pool(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    """Mean of each window: a transposed convolution with equal weights."""
    found = attributes(node)
    at = _window(t, node, list(found["kernel_shape"]))
    uncounted = any(at.starts + at.ends) and not found.get("count_include_pad", 0)
    if uncounted or max(at.dilations) > 1:
        raise refuse(node, "pads that are not counted, and dilations, have no rule")
    channels = t.sizes(node.input[0], [1])[0]
    equal = t.constant(np.full((channels, 1, *at.kernel), 1 / np.prod(at.kernel)))
    spread = t.op(
        "ConvTranspose", [grad, equal], strides=at.strides, pads=at.starts + at.ends,
        group=channels, output_padding=at.rest,
    )  # fmt: skip
    return [spread]


def global_average_pool(t: Tape, node: onnx.NodeProto, grad: str, need: Sequence[bool]) -> Grads:
    """Mean over all of space."""
    x = node.input[0]
    axes = list(range(2, len(t.shape(x))))
    return [t.spread(grad, x, axes, 1 / float(np.prod(t.sizes(x, axes))))]
