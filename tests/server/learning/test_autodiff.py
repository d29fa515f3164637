"""Training graphs: every rule against numerical differences, and what has no rule is refused.

Properties. The oracle of a gradient is ONNX's own reference evaluator on the inference graph in
float64: it shares no line with the training graph, neither forward nor backward.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from shoal.server.learning.autodiff import training_facts, training_graph
from shoal.server.learning.errors import LearningError, UnsupportedOperatorError

RNG = np.random.default_rng()
Node = tuple[str, list[str], str, dict[str, Any]]


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    """Each test draws the same weights, in whatever order tests run."""
    RNG.bit_generator.state = np.random.default_rng(7).bit_generator.state


def network(
    nodes: list[Node],
    weights: dict[str, Any],
    x_shape: list[int],
    out_shape: list[int],
    *,
    opset: int = 18,
) -> onnx.ModelProto:
    """Return a graph from x to out with free batch."""
    graph = helper.make_graph(
        [helper.make_node(kind, ins, [out], name=out, **attrs) for kind, ins, out, attrs in nodes],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *x_shape])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", *out_shape])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def w(*shape: int) -> NDArray[np.float32]:
    """Return random float32 weights."""
    return RNG.normal(0, 0.5, shape).astype(np.float32)


def ints(*values: int) -> NDArray[np.int64]:
    """Return an int64 vector."""
    return np.array(values, np.int64)


def simple(kind: str, **attrs: Any) -> Callable[[], tuple[onnx.ModelProto, list[str]]]:
    """A linear layer, then one elementwise operator."""

    def make() -> tuple[onnx.ModelProto, list[str]]:
        nodes: list[Node] = [
            ("Gemm", ["x", "w", "b"], "h", {"transB": 1}),
            (kind, ["h"], "a", attrs),
            ("MatMul", ["a", "v"], "out", {}),
        ]
        return network(nodes, {"w": w(6, 5), "b": w(6), "v": w(6, 3)}, [5], [3]), ["w", "b", "v"]

    return make


def binary(kind: str, shape: tuple[int, ...]) -> Callable[[], tuple[onnx.ModelProto, list[str]]]:
    """A linear layer combined with a broadcast parameter, on either side."""

    def make() -> tuple[onnx.ModelProto, list[str]]:
        offset = np.abs(w(*shape)) + 1
        nodes: list[Node] = [
            ("Gemm", ["x", "w"], "h", {}),
            (kind, ["h", "p"], "a", {}),
            (kind, ["p", "big"], "c", {}),
            ("Gemm", ["a", "v"], "o", {"alpha": 0.5}),
            ("ReduceMean", ["c", "all"], "m", {"keepdims": 0}),
            ("Add", ["o", "m"], "out", {}),
        ]
        weights = {
            "w": w(5, 4), "v": w(4, 3), "p": offset, "big": np.abs(w(7, 4)) + 1, "all": ints(0, 1),
        }  # fmt: skip
        return network(nodes, weights, [5], [3]), ["w", "p", "v", "big"]

    return make


def conv(
    channels: int, outputs: int, kernel: list[int], size: list[int], **attrs: Any
) -> Callable[[], tuple[onnx.ModelProto, list[str]]]:
    """Two convolutions, so that the second's input gradient is tested through the first."""

    def make() -> tuple[onnx.ModelProto, list[str]]:
        group = attrs.get("group", 1)
        spots = [1] * len(kernel)
        nodes: list[Node] = [
            ("Conv", ["x", "w0"], "h", {"kernel_shape": spots}),
            ("Tanh", ["h"], "t", {}),
            ("Conv", ["t", "w", "b"], "c", {"kernel_shape": kernel, **attrs}),
            ("GlobalAveragePool", ["c"], "p", {}),
            ("Flatten", ["p"], "f", {}),
            ("Mul", ["f", "k"], "out", {}),
        ]
        weights = {
            "w0": w(channels, 3, *spots), "w": w(outputs, channels // group, *kernel),
            "b": w(outputs), "k": w(outputs),
        }  # fmt: skip
        return network(nodes, weights, [3, *size], [outputs]), ["w0", "w", "b", "k"]

    return make


def pool(kind: str, **attrs: Any) -> Callable[[], tuple[onnx.ModelProto, list[str]]]:
    """A convolution, a pooling, a linear layer over all that is left."""

    def make() -> tuple[onnx.ModelProto, list[str]]:
        nodes: list[Node] = [
            ("Conv", ["x", "w"], "c", {"kernel_shape": [3], "pads": [1, 1]}),
            (kind, ["c"], "p", attrs),
            ("Flatten", ["p"], "f", {}),
            ("Gemm", ["f", "v"], "out", {}),
        ]
        stride = attrs.get("strides", [1])[0]
        pads = sum(attrs.get("pads", [0, 0]))
        left = (12 + pads - attrs["kernel_shape"][0]) // stride + 1
        return network(nodes, {"w": w(4, 3, 3), "v": w(4 * left, 3)}, [3, 12], [3]), ["w", "v"]

    return make


def norm(kind: str) -> Callable[[], tuple[onnx.ModelProto, list[str]]]:
    """A convolution and a normalisation; group norm as exporters write it."""

    def make() -> tuple[onnx.ModelProto, list[str]]:
        weights: dict[str, Any] = {"w": w(4, 3, 3), "v": w(4 * 8, 3)}
        names = ["w", "v"]
        if kind == "group":
            middle: list[Node] = [
                ("Reshape", ["c", "split"], "g", {}),
                ("InstanceNormalization", ["g", "one", "zero"], "u", {"epsilon": 1e-3}),
                ("Reshape", ["u", "join"], "r", {}),
                ("Mul", ["r", "s"], "m", {}),
                ("Add", ["m", "b"], "n", {}),
            ]
            weights |= {
                "split": ints(0, 2, -1), "join": ints(0, 4, 8), "s": w(1, 4, 1), "b": w(1, 4, 1),
                "one": np.ones(2, np.float32), "zero": np.zeros(2, np.float32),
            }  # fmt: skip
            names += ["s", "b"]
        elif kind == "group op":
            attrs = {"num_groups": 2, "epsilon": 1e-3, "stash_type": TensorProto.DOUBLE}
            middle = [("GroupNormalization", ["c", "s", "b"], "n", attrs)]
            weights |= {"s": w(4), "b": w(4)}
            names += ["s", "b"]
        elif kind == "layer without bias":
            middle = [("LayerNormalization", ["c", "s"], "n", {"axis": 1})]
            weights |= {"s": w(4, 8)}
            names += ["s"]
        elif kind == "layer":
            middle = [("LayerNormalization", ["c", "s", "b"], "n", {"axis": -1})]
            weights |= {"s": w(8), "b": w(8)}
            names += ["s", "b"]
        elif kind == "instance":
            middle = [("InstanceNormalization", ["c", "s", "b"], "n", {})]
            weights |= {"s": w(4), "b": w(4)}
            names += ["s", "b"]
        else:
            middle = [("BatchNormalization", ["c", "s", "b", "mean", "var"], "n", {})]
            weights |= {
                "s": w(4), "b": w(4), "mean": w(4), "var": np.ones(4, np.float32),
            }  # fmt: skip
            names += ["s", "b"]
        nodes: list[Node] = [
            ("Conv", ["x", "w"], "c", {"kernel_shape": [3], "pads": [1, 1]}),
            *middle,
            ("Tanh", ["n"], "t", {}),
            ("Flatten", ["t"], "f", {}),
            ("Gemm", ["f", "v"], "out", {}),
        ]
        return network(nodes, weights, [3, 8], [3], opset=21 if "op" in kind else 18), names

    return make


def shapes() -> tuple[onnx.ModelProto, list[str]]:
    """Transpose, Concat, Identity, a value that is used twice."""
    nodes: list[Node] = [
        ("Transpose", ["w"], "wt", {"perm": [1, 0]}),
        ("MatMul", ["x", "wt"], "h", {}),
        ("Sigmoid", ["h"], "s", {}),
        ("Identity", ["h"], "i", {}),
        ("Concat", ["s", "i"], "c", {"axis": 1}),
        ("Softmax", ["c"], "q", {"axis": 1}),
        ("Gemm", ["q", "v"], "out", {"transB": 1}),
    ]
    return network(nodes, {"w": w(4, 5), "v": w(3, 8)}, [5], [3]), ["w", "v"]


def reductions() -> tuple[onnx.ModelProto, list[str]]:
    """Sums and means over an axis, kept or not, Squeeze, Unsqueeze, a shape read at run time."""
    nodes: list[Node] = [
        ("Conv", ["x", "w"], "c", {"kernel_shape": [3]}),
        ("Shape", ["c"], "size", {}),
        ("Reshape", ["c", "size"], "same", {}),
        ("ReduceMean", ["same", "last"], "m", {"keepdims": 1}),
        ("Squeeze", ["m", "last"], "ms", {}),
        ("ReduceSum", ["c", "last"], "rs", {"keepdims": 0}),
        ("Mul", ["ms", "rs"], "h", {}),
        ("Unsqueeze", ["h", "first"], "u", {}),
        ("ReduceSum", ["u"], "u2", {"noop_with_empty_axes": 1}),
        ("Flatten", ["u2"], "f", {}),
        ("Gemm", ["f", "v"], "out", {}),
    ]
    weights = {"w": w(4, 3, 3), "v": w(4, 3), "last": ints(2), "first": ints(1)}
    return network(nodes, weights, [3, 8], [3]), ["w", "v"]


def attention() -> tuple[onnx.ModelProto, list[str]]:
    """Products of two batched matrices, and of a stack of matrices with a matrix."""
    nodes: list[Node] = [
        ("MatMul", ["x", "q"], "xq", {}),
        ("MatMul", ["x", "k"], "xk", {}),
        ("Transpose", ["xk"], "kt", {"perm": [0, 2, 1]}),
        ("MatMul", ["xq", "kt"], "scores", {}),
        ("Softmax", ["scores"], "a", {"axis": -1}),
        ("MatMul", ["a", "xq"], "mixed", {}),
        ("MatMul", ["stack", "mixed"], "stacked", {}),
        ("Flatten", ["stacked"], "f", {}),
        ("Gemm", ["f", "v"], "out", {}),
    ]
    weights = {"q": w(4, 4), "k": w(4, 4), "stack": w(1, 3, 6), "v": w(12, 3)}
    return network(nodes, weights, [6, 4], [3]), ["q", "k", "stack", "v"]


def positive(kind: str) -> Callable[[], tuple[onnx.ModelProto, list[str]]]:
    """A function of positive numbers, behind Exp and Neg."""

    def make() -> tuple[onnx.ModelProto, list[str]]:
        nodes: list[Node] = [
            ("Gemm", ["x", "w"], "h", {}),
            ("Neg", ["h"], "n", {}),
            ("Exp", ["n"], "e", {}),
            (kind, ["e"], "a", {}),
            ("Gemm", ["a", "v"], "out", {}),
        ]
        return network(nodes, {"w": w(5, 4), "v": w(4, 3)}, [5], [3]), ["w", "v"]

    return make


def clip() -> tuple[onnx.ModelProto, list[str]]:
    """ReLU6, as exporters write it."""
    nodes: list[Node] = [
        ("Gemm", ["x", "w"], "h", {}),
        ("Clip", ["h", "low", "high"], "a", {}),
        ("Dropout", ["a", "ratio", "yes"], "d", {}),
        ("Gemm", ["d", "v"], "out", {}),
    ]
    bounds = {"low": np.float32(0), "high": np.float32(0.5), "ratio": np.float32(0.5)}
    weights = {"w": w(5, 8), "v": w(8, 3), "yes": np.bool_(False), **bounds}
    return network(nodes, weights, [5], [3]), ["w", "v"]


CASES: dict[str, Callable[[], tuple[onnx.ModelProto, list[str]]]] = {
    "relu": simple("Relu"),
    "sigmoid": simple("Sigmoid"),
    "tanh": simple("Tanh"),
    "leaky relu": simple("LeakyRelu", alpha=0.2),
    "log softmax": simple("LogSoftmax", axis=1),
    "exp, neg, log": positive("Log"),
    "exp, neg, sqrt": positive("Sqrt"),
    "clip": clip,
    "add": binary("Add", (4,)),
    "sub": binary("Sub", (1, 4)),
    "mul": binary("Mul", (4,)),
    "div": binary("Div", (1, 1)),
    "conv1d": conv(4, 5, [3], [9], pads=[1, 1]),
    "conv1d strided": conv(4, 5, [3], [10], strides=[2], pads=[1, 0]),
    "conv1d dilated": conv(4, 5, [3], [11], dilations=[2], pads=[2, 2]),
    "conv2d": conv(4, 5, [3, 2], [6, 5], pads=[1, 0, 1, 1]),
    "conv2d strided": conv(4, 5, [3, 3], [7, 6], strides=[2, 2], pads=[1, 1, 1, 1]),
    "conv2d grouped": conv(4, 6, [3, 3], [6, 5], group=2, pads=[1, 1, 1, 1]),
    "conv2d depthwise": conv(4, 4, [3, 3], [6, 5], group=4, pads=[1, 1, 1, 1]),
    "max pool": pool("MaxPool", kernel_shape=[2], strides=[2]),
    "max pool overlapping": pool("MaxPool", kernel_shape=[3], strides=[2], pads=[1, 1]),
    "average pool": pool("AveragePool", kernel_shape=[3], strides=[2]),
    "average pool padded": pool(
        "AveragePool", kernel_shape=[3], strides=[1], pads=[1, 1], count_include_pad=1
    ),
    "max pool that leaves a rest": pool("MaxPool", kernel_shape=[5], strides=[5]),
    "max pool up to the edge": pool("MaxPool", kernel_shape=[5], strides=[5], pads=[0, 3]),
    "group norm": norm("group"),
    "group norm operator": norm("group op"),
    "layer norm without bias": norm("layer without bias"),
    "layer norm": norm("layer"),
    "instance norm": norm("instance"),
    "batch norm": norm("batch"),
    "shapes": shapes,
    "reductions": reductions,
    "attention": attention,
}


class Step:
    """Runs a training graph."""

    def __init__(self, model: onnx.ModelProto, names: list[str], **kw: Any) -> None:
        graph = training_graph(model, trainable=names, **kw)
        self.facts = training_facts(graph)
        self.session = ort.InferenceSession(graph.SerializeToString())
        values = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
        self.values: dict[str, NDArray[Any]] = {name: values[name] for name in names}
        for each in self.facts["state"]:
            start = values.get(each["input"], np.zeros(each["shape"], np.float32))
            self.values[each["input"]] = start

    def run(self, values: dict[str, NDArray[Any]], batch: dict[str, Any]) -> dict[str, Any]:
        """Run one step; x, y, w, lr, mu and loss go by their short names."""
        short = {key: self.facts[key] for key in ("x", "y", "w", "lr", "mu", "loss")}
        fed = {short.get(name, name): value for name, value in batch.items()}
        names = [each.name for each in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(names, values | fed), strict=True))
        return found | {"loss": found[short["loss"]]}


class Reference:
    """The loss of an inference graph in float64, batch normalisation as in training."""

    def __init__(self, model: onnx.ModelProto) -> None:
        double = onnx.ModelProto()
        double.CopyFrom(model)
        self.weights = {}
        for each in double.graph.initializer:
            value = numpy_helper.to_array(each)
            if value.dtype == np.float32:
                value = value.astype(np.float64)
                each.CopyFrom(numpy_helper.from_array(value, each.name))
            self.weights[each.name] = value
        for info in (*double.graph.input, *double.graph.output):
            info.type.tensor_type.elem_type = TensorProto.DOUBLE
        for node in double.graph.node:
            if node.op_type == "BatchNormalization":
                node.attribute.append(helper.make_attribute("training_mode", 1))
                node.output.extend(["moved.mean", "moved.variance"])
        self.model = double

    def loss(
        self, kind: str, batch: dict[str, Any], moved: dict[str, NDArray[np.float64]] | None = None
    ) -> float:
        """Return the loss after a move of some weights."""
        for each in self.model.graph.initializer:
            if moved and each.name in moved:
                value = self.weights[each.name] + moved[each.name]
                each.CopyFrom(numpy_helper.from_array(value, each.name))
        out = ReferenceEvaluator(self.model).run(None, {"x": batch["x"].astype(np.float64)})[0]
        for each in self.model.graph.initializer:
            if moved and each.name in moved:
                each.CopyFrom(numpy_helper.from_array(self.weights[each.name], each.name))
        weight = batch["w"].astype(np.float64)
        if kind == "mse":
            rows = ((out - batch["y"]) ** 2).mean(1)
        else:
            logs = out - np.log(np.exp(out).sum(1, keepdims=True))
            rows = -logs[np.arange(len(out)), batch["y"]]
        return float((rows * weight).sum() / weight.sum())


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_differences(case: str, loss: str) -> None:
    """Along random directions the gradient is the fourth-order central difference of the loss."""
    model, names = CASES[case]()
    step = Step(model, names, loss=loss)
    x_shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    out = [d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim][1:]
    rng = np.random.default_rng(3)
    batch: dict[str, Any] = {
        "x": rng.normal(size=(5, *x_shape)).astype(np.float32),
        "y": rng.integers(0, out[0], 5),
        "w": np.array([1, 2, 0, 1, 0.5], np.float32),
        "lr": np.array(1, np.float32),
    }
    if loss == "mse":
        batch["y"] = rng.normal(size=(5, *out)).astype(np.float32)
    found = step.run(step.values, batch)
    reference = Reference(model)
    exact_loss = reference.loss(loss, batch)
    assert float(found["loss"]) == pytest.approx(exact_loss, rel=1e-5)
    for name in names:
        grad = (step.values[name] - found[f"new.{name}"]).astype(np.float64)
        slope = rng.normal(size=grad.shape)
        slope /= np.linalg.norm(slope)
        at = {k: reference.loss(loss, batch, {name: k * 1e-5 * slope}) for k in (-2, -1, 1, 2)}
        numeric = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * 1e-5)
        # What is left is the rounding of the float32 step; p - lr grad loses digits of grad.
        assert float((grad * slope).sum()) == pytest.approx(numeric, rel=1e-4, abs=3e-6), name


def test_weights_of_zero_leave_a_row_out() -> None:
    """A padded batch trains like the batch without its padding."""
    model, names = CASES["group norm"]()
    step = Step(model, names)
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(4, 3, 8)).astype(np.float32), np.array([0, 1, 2, 1])
    rate = {"lr": np.array(0.1, np.float32)}
    short = step.run(step.values, {"x": x[:3], "y": y[:3], "w": np.ones(3, np.float32), **rate})
    weights = np.array([1, 1, 1, 0], np.float32)
    padded = step.run(step.values, {"x": x, "y": y, "w": weights, **rate})
    for name, value in short.items():
        assert padded[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_the_proximal_term_pulls_home() -> None:
    """FedProx: the step moves by lr (grad + mu (p - global))."""
    model, names = simple("Tanh")()
    plain, pulled = Step(model, names), Step(model, names, proximal=True)
    rng = np.random.default_rng(5)
    batch = {
        "x": rng.normal(size=(4, 5)).astype(np.float32),
        "y": np.array([0, 1, 2, 1]),
        "w": np.ones(4, np.float32),
        "lr": np.array(0.1, np.float32),
    }
    home = {f"global.{name}": pulled.values[name] - 1 for name in names}
    with_mu = pulled.run(pulled.values, batch | home | {"mu": np.array(0.5, np.float32)})
    without = plain.run(plain.values, batch)
    for name in names:
        moved = without[f"new.{name}"] - with_mu[f"new.{name}"]
        assert moved == pytest.approx(np.full_like(moved, 0.1 * 0.5), abs=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_optimizers_follow_their_formulas(optimizer: Any) -> None:
    """Three steps equal the textbook in float64."""
    model, names = simple("Tanh")()
    step, plain = Step(model, names, optimizer=optimizer), Step(model, names)
    rng = np.random.default_rng(5)
    batch = {
        "x": rng.normal(size=(4, 5)).astype(np.float32),
        "y": np.array([0, 1, 2, 1]),
        "w": np.ones(4, np.float32),
        "lr": np.array(0.05, np.float32),
    }
    one = batch | {"lr": np.array(1, np.float32)}
    values = {name: step.values[name].astype(np.float64) for name in names}
    speed = {name: np.zeros_like(value) for name, value in values.items()}
    mean, square = dict(speed), dict(speed)
    for t in range(1, 4):
        now = {name: value.astype(np.float32) for name, value in values.items()}
        grads = plain.run(now, one)
        found = step.run(step.values, batch)
        for name in names:
            grad = (now[name] - grads[f"new.{name}"]).astype(np.float64)
            if optimizer == "sgd":
                values[name] = values[name] - 0.05 * grad
            elif optimizer == "momentum":
                speed[name] = 0.9 * speed[name] + grad
                values[name] = values[name] - 0.05 * speed[name]
            else:
                mean[name] = 0.9 * mean[name] + 0.1 * grad
                square[name] = 0.999 * square[name] + 0.001 * grad**2
                hat = mean[name] / (1 - 0.9**t), square[name] / (1 - 0.999**t)
                values[name] = values[name] - 0.05 * hat[0] / (np.sqrt(hat[1]) + 1e-8)
            assert found[f"new.{name}"] == pytest.approx(values[name], rel=2e-4, abs=2e-5)
        step.values = {each["input"]: found[each["output"]] for each in step.facts["params"]} | {
            each["input"]: found[each["output"]] for each in step.facts["state"]
        }


def test_batch_norm_moves_its_statistics() -> None:
    """Running mean and unbiased variance move by one tenth towards the batch's."""
    model, names = norm("batch")()
    step = Step(model, names)
    assert [each["kind"] for each in step.facts["state"]] == ["statistics", "statistics"]
    rng = np.random.default_rng(5)
    x = rng.normal(size=(6, 3, 8)).astype(np.float32)
    batch = {
        "x": x, "y": np.zeros(6, np.int64), "w": np.ones(6, np.float32),
        "lr": np.array(0.1, np.float32),
    }  # fmt: skip
    found = step.run(step.values, batch)
    inner = network(
        [("Conv", ["x", "w"], "out", {"kernel_shape": [3], "pads": [1, 1]})],
        {"w": step.values["w"]}, [3, 8], [4, 8],
    )  # fmt: skip
    c = ort.InferenceSession(inner.SerializeToString()).run(None, {"x": x})[0]
    mean = 0.9 * step.values["mean"] + 0.1 * c.mean((0, 2))
    variance = 0.9 * step.values["var"] + 0.1 * c.var((0, 2), ddof=1)
    assert found["new.mean"] == pytest.approx(mean, abs=1e-5)
    assert found["new.var"] == pytest.approx(variance, abs=1e-5)


def test_a_softmax_at_the_end_is_left_out() -> None:
    """The loss takes logits: a classifier that ends in probabilities trains the same."""
    model, names = simple("Tanh")()
    ended = onnx.ModelProto()
    ended.CopyFrom(model)
    ended.graph.node.append(helper.make_node("Softmax", ["out"], ["probabilities"], axis=1))
    ended.graph.output[0].name = "probabilities"
    assert training_graph(ended, trainable=names) == training_graph(model, trainable=names)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([("Atan", ["h"], "out", {})], "Atan node 'out': there is no gradient rule"),
        ([("AveragePool", ["h3"], "p", {"kernel_shape": [2], "auto_pad": "SAME_UPPER"}),
          ("Flatten", ["p"], "out", {})], "AveragePool node 'p': auto_pad"),
        ([("AveragePool", ["h3"], "p", {"kernel_shape": [3], "pads": [1, 1]}),
          ("Flatten", ["p"], "out", {})], "AveragePool node 'p': pads that are not counted"),
        ([("MatMul", ["h3", "vector"], "p", {}), ("MatMul", ["p", "one"], "out", {})],
         "MatMul node 'p': a vector"),
    ],
)  # fmt: skip
def test_what_has_no_rule_is_refused_by_name(nodes: list[Node], said: str) -> None:
    """An operator without a rule is an error that names the node, never a silent zero."""
    start: list[Node] = [("Gemm", ["x", "w"], "h", {}), ("Reshape", ["h", "s"], "h3", {})]
    weights = {"w": w(5, 4), "s": ints(0, 1, 4), "vector": w(4), "one": w(1, 4)}
    model = network([*start, *nodes], weights, [5], [4])
    with pytest.raises(UnsupportedOperatorError, match=said):
        training_graph(model, trainable=["w"])


def test_names_that_are_no_parameters_are_refused() -> None:
    """A typing error in a name is an error."""
    model, names = simple("Tanh")()
    for wrong in ([*names, "nothing"], []):
        with pytest.raises(LearningError, match="no initializers"):
            training_graph(model, trainable=wrong)


def test_a_parameter_that_the_loss_never_sees_is_refused() -> None:
    """Training it would change nothing."""
    nodes: list[Node] = [("Gemm", ["x", "w"], "out", {}), ("Gemm", ["x", "v"], "dead", {})]
    model = network(nodes, {"w": w(5, 3), "v": w(5, 3)}, [5], [3])
    with pytest.raises(LearningError, match="does not depend on 'v'"):
        training_graph(model, trainable=["w", "v"])


def test_a_device_learns_how_to_call_it_from_the_session() -> None:
    """The device has onnxruntime and no onnx: the facts come out of the loaded model."""
    model, names = norm("batch")()
    step = Step(model, names, optimizer="adam", proximal=True)
    facts = json.loads(step.session.get_modelmeta().custom_metadata_map["shoal.training"])
    assert facts == step.facts
    inputs = {each.name: each for each in step.session.get_inputs()}
    outputs = {each.name: each for each in step.session.get_outputs()}
    assert [each["name"] for each in facts["params"]] == names
    both = [*facts["params"], *facts["state"]]
    scalars = {facts[key] for key in ("x", "y", "w", "lr", "mu")}
    homes = {each["global"] for each in facts["params"]}
    assert inputs.keys() == {each["input"] for each in both} | scalars | homes
    assert outputs.keys() == {each["output"] for each in both} | {facts["loss"]}
    for each in both:
        assert inputs[each["input"]].shape == outputs[each["output"]].shape == each["shape"]
    assert inputs[facts["x"]].shape[0] == "batch"


def test_what_is_frozen_stays() -> None:
    """Personalising the head alone: a batch normalisation before it is that of inference."""
    model, _ = norm("batch")()
    step = Step(model, ["v"])
    assert [each["name"] for each in step.facts["params"]] == ["v"]
    assert step.facts["state"] == []
    rng = np.random.default_rng(5)
    x = rng.normal(size=(6, 3, 8)).astype(np.float32)
    batch = {
        "x": x, "y": np.zeros(6, np.int64), "w": np.ones(6, np.float32),
        "lr": np.array(0.1, np.float32),
    }  # fmt: skip
    logits = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    want = -(logits - np.log(np.exp(logits).sum(1, keepdims=True)))[:, 0].mean()
    assert float(step.run(step.values, batch)["loss"]) == pytest.approx(want, rel=1e-5)


def test_older_opsets_are_converted() -> None:
    """Opset 13 wrote the axes of a mean as an attribute."""
    nodes: list[Node] = [
        ("Conv", ["x", "w"], "c", {"kernel_shape": [3]}),
        ("ReduceMean", ["c"], "out", {"axes": [2], "keepdims": 0}),
    ]
    old = network(nodes, {"w": w(4, 3, 3)}, [3, 8], [4], opset=13)
    nodes[1] = ("ReduceMean", ["c", "axes"], "out", {"keepdims": 0})
    weights = {each.name: numpy_helper.to_array(each) for each in old.graph.initializer}
    new = network(nodes, weights | {"axes": ints(2)}, [3, 8], [4])
    batch = {
        "x": RNG.normal(size=(5, 3, 8)).astype(np.float32), "y": np.array([0, 1, 2, 3, 0]),
        "w": np.ones(5, np.float32), "lr": np.array(0.1, np.float32),
    }  # fmt: skip
    found = [step.run(step.values, batch) for step in (Step(old, ["w"]), Step(new, ["w"]))]
    assert np.array_equal(found[0]["new.w"], found[1]["new.w"])


def test_squared_error_keeps_a_softmax() -> None:
    """Only cross entropy takes logits; squared error is of what the model says."""
    nodes: list[Node] = [("Gemm", ["x", "w"], "h", {}), ("Softmax", ["h"], "out", {"axis": 1})]
    model = network(nodes, {"w": w(5, 3)}, [5], [3])
    step = Step(model, ["w"], loss="mse")
    x = RNG.normal(size=(4, 5)).astype(np.float32)
    y = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    out = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    one = np.ones(4, np.float32)
    batch = {"x": x, "y": y, "w": one, "lr": np.array(0.1, np.float32)}
    found = float(step.run(step.values, batch)["loss"])
    assert found == pytest.approx(float(((out - y) ** 2).mean()), rel=1e-5)


def refused(kind: str) -> tuple[onnx.ModelProto, list[str]]:
    """Return a graph that cannot be trained, whatever its operators."""
    model, names = simple("Tanh")()
    if kind == "twice":
        names.append("w")
    elif kind == "reserved":
        model.graph.node[0].output[0] = model.graph.node[1].input[0] = "new.h"
    elif kind == "float64":
        value = numpy_helper.from_array(np.zeros((6, 3)), "v")
        model.graph.initializer[2].CopyFrom(value)
    elif kind == "integer input":
        model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    elif kind == "two outputs":
        model.graph.output.append(model.graph.output[0])
    elif kind == "fixed batch":
        shape = numpy_helper.from_array(ints(4, 3), "shape")
        model.graph.initializer.append(shape)
        model.graph.node[-1].output[0] = "o"
        model.graph.node.append(helper.make_node("Reshape", ["o", "shape"], ["out"]))
    elif kind == "shapes that clash":
        model.graph.initializer[2].dims[0] = 3
        model.graph.initializer[2].dims[1] = 6
    elif kind == "foreign":
        model.graph.node[1].domain = "com.example"
        model.opset_import.append(helper.make_opsetid("com.example", 1))
    return model, names


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("twice", "stands twice"),
        ("reserved", r"'new\.h' is reserved"),
        ("float64", "'v' is float64"),
        ("integer input", "'x' must be a float32 tensor"),
        ("two outputs", "one input and one output"),
        ("fixed batch", "fixed batch size"),
        ("shapes that clash", "not valid ONNX"),
        ("foreign", r"operators of com\.example"),
    ],
)
def test_a_graph_that_cannot_be_trained_is_refused(kind: str, said: str) -> None:
    """With one of our errors, before anything is written."""
    model, names = refused(kind)
    with pytest.raises(LearningError, match=said):
        training_graph(model, trainable=names)


def test_only_training_graphs_have_facts() -> None:
    """An inference graph is refused as such."""
    with pytest.raises(LearningError, match="no training facts"):
        training_facts(simple("Tanh")()[0])
