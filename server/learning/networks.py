"""Networks that shoal trains from scratch, as plain ONNX graphs. No framework builds them.

The normalisation of the input is part of the graph: pre-processing travels with the model, and a
device feeds what its sensor says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

from .autodiff import IR_VERSION
from .errors import LearningError
from .prepare import OPSET

INPUT, LOGITS, PROBABILITIES = "x", "logits", "probabilities"
FIXED = "fixed."  # names of initializers that no training touches start with this


class _Graph:
    """Nodes and initializers of a network in the making."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.values: dict[str, NDArray[np.generic]] = {}
        self._rng = rng

    def op(self, kind: str, inputs: Sequence[str], out: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [out], name=out, **attributes))
        return out

    def value(self, name: str, value: ArrayLike) -> str:
        self.values[name] = np.asarray(value, np.float32)
        return name

    def ints(self, name: str, *values: int) -> str:
        self.values[FIXED + name] = np.array(values, np.int64)
        return FIXED + name

    def he(self, name: str, shape: Sequence[int]) -> str:
        """He, Zhang, Ren, Sun (2015): variance 2 / fan-in keeps a ReLU network's scale."""
        fan_in = int(np.prod(shape[1:]))
        return self.value(name, self._rng.normal(0, np.sqrt(2 / fan_in), shape))

    def group_norm(self, x: str, label: str, *, channels: int, length: int, groups: int) -> str:
        """Normalise groups of channels (Wu, He 2018), by operators that every runtime has."""
        split = self.op("Reshape", [x, self.ints(f"{label}.split", 0, groups, -1)], f"{label}.in")
        ones = self.value(f"{FIXED}{label}.one", np.ones(groups))
        zeros = self.value(f"{FIXED}{label}.zero", np.zeros(groups))
        unit = self.op("InstanceNormalization", [split, ones, zeros], f"{label}.unit")
        back = self.op(
            "Reshape", [unit, self.ints(f"{label}.join", 0, channels, length)], f"{label}.out"
        )
        scale = self.value(f"{label}.scale", np.ones((1, channels, 1)))
        shift = self.value(f"{label}.shift", np.zeros((1, channels, 1)))
        return self.op("Add", [self.op("Mul", [back, scale], f"{label}.mul"), shift], label)


def conv1d_classifier(
    *,
    mean__c: ArrayLike,
    scale__c: ArrayLike,
    samples: int,
    classes: int,
    widths: tuple[int, int] = (24, 48),
    seed: int = 0,
) -> onnx.ModelProto:
    """Return a small convolutional classifier of windows, with random weights.

    Normalise → Conv 7 → GroupNorm → ReLU → MaxPool 2 → Conv 5 → GroupNorm → ReLU → average over
    time → linear. Group normalisation, because federated clients are small and unlike: batch
    statistics of one person are no statistics of the fleet.

    Args:
        mean__c: Mean of each of the C channels.
        scale__c: Standard deviation of each, > 0.
        samples: Samples per window, at least 4.
        classes: Classes, at least 2.
        widths: Channels of the two convolutions, multiples of 4.
        seed: Of the weights.

    Returns:
        A graph from ``x`` float32 (batch, C, samples) to ``logits`` float32 (batch, classes).

    Raises:
        LearningError: An argument is out of range.
    """
    mean, scale = np.asarray(mean__c, np.float32), np.asarray(scale__c, np.float32)
    channels = len(mean)
    if not (np.isfinite(mean).all() and np.isfinite(scale).all() and (scale > 0).all()):
        raise LearningError("the channels' mean and scale must be finite, and the scale above 0")
    if samples < 4 or classes < 2 or any(width % 4 or width < 4 for width in widths):
        raise LearningError("samples >= 4, classes >= 2 and widths in multiples of 4 are needed")
    first, second = widths
    g = _Graph(np.random.default_rng(seed))
    centred = g.op("Sub", [INPUT, g.value(f"{FIXED}mean", mean.reshape(1, -1, 1))], "centred")
    x = g.op("Mul", [centred, g.value(f"{FIXED}gain", 1 / scale.reshape(1, -1, 1))], "normal")
    bias = g.value("conv1.bias", np.zeros(first))
    x = g.op("Conv", [x, g.he("conv1.weight", (first, channels, 7)), bias], "conv1", pads=[3, 3])
    x = g.op("Relu", [g.group_norm(x, "norm1", channels=first, length=samples, groups=4)], "relu1")
    x = g.op("MaxPool", [x], "pool1", kernel_shape=[2], strides=[2])
    bias = g.value("conv2.bias", np.zeros(second))
    x = g.op("Conv", [x, g.he("conv2.weight", (second, first, 5)), bias], "conv2", pads=[2, 2])
    length = samples // 2
    x = g.op("Relu", [g.group_norm(x, "norm2", channels=second, length=length, groups=4)], "relu2")
    x = g.op("Flatten", [g.op("GlobalAveragePool", [x], "average")], "flat")
    bias = g.value("head.bias", np.zeros(classes))
    g.op("Gemm", [x, g.he("head.weight", (classes, second)), bias], LOGITS, transB=1)
    return _model(g, channels=channels, samples=samples, classes=classes)


def with_probabilities(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with a Softmax behind its logits: its output sums to 1."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    graph = found.graph
    logits = graph.output[0]
    graph.node.append(
        helper.make_node("Softmax", [logits.name], [PROBABILITIES], name=PROBABILITIES, axis=1)
    )
    logits.name = PROBABILITIES
    return found


def trainable_names(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the names of what training may change, in the graph's order.

    Not the running statistics of a BatchNormalization: they move, but no gradient moves them.
    """
    statistics = {
        name
        for node in model.graph.node
        if node.op_type == "BatchNormalization"
        for name in node.input[3:5]
    }
    return tuple(
        each.name
        for each in model.graph.initializer
        if each.data_type == TensorProto.FLOAT
        and not each.name.startswith(FIXED)
        and each.name not in statistics
    )


def parameters(model: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
    """Return the trainable initializers by name, in the graph's order."""
    names = set(trainable_names(model))
    return {
        each.name: numpy_helper.to_array(each).copy()
        for each in model.graph.initializer
        if each.name in names
    }


def with_parameters(
    model: onnx.ModelProto, values: Mapping[str, NDArray[np.float32]]
) -> onnx.ModelProto:
    """Return a copy of the model with some initializers replaced.

    Raises:
        LearningError: A name is no initializer of the model, or a shape or dtype differs.
    """
    found = onnx.ModelProto()
    found.CopyFrom(model)
    held = {each.name: each for each in found.graph.initializer}
    for name, value in values.items():
        if name not in held or tuple(held[name].dims) != value.shape or value.dtype != np.float32:
            raise LearningError(f"{name!r} of {value.dtype} {value.shape} does not fit the model")
        held[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return found


def _model(g: _Graph, *, channels: int, samples: int, classes: int) -> onnx.ModelProto:
    shape_in, shape_out = ["batch", channels, samples], ["batch", classes]
    graph = helper.make_graph(
        g.nodes,
        "conv1d_classifier",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape_in)],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, shape_out)],
        [numpy_helper.from_array(value, name) for name, value in g.values.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
        producer_name="shoal",
    )  # fmt: skip
    onnx.checker.check_model(model)
    return model
