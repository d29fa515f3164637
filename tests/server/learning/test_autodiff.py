"""Training graphs: every rule against numerical differences, and what has no rule is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shoal.server.learning.autodiff import training_facts, training_graph
from shoal.server.learning.errors import LearningError, UnsupportedOperatorError

RNG = np.random.default_rng()
Node = tuple[str, list[str], str, dict[str, Any]]


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    """Each test draws the same weights, in whatever order tests run."""
    RNG.bit_generator.state = np.random.default_rng(7).bit_generator.state


def network(
    nodes: list[Node], weights: dict[str, Any], x_shape: list[int], out_shape: list[int]
) -> onnx.ModelProto:
    """Return a graph from x to out with free batch."""
    graph = helper.make_graph(
        [helper.make_node(kind, ins, [out], name=out, **attrs) for kind, ins, out, attrs in nodes],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *x_shape])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", *out_shape])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


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
        return network(nodes, weights, [3, 8], [3]), names

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


CASES: dict[str, Callable[[], tuple[onnx.ModelProto, list[str]]]] = {
    "relu": simple("Relu"),
    "sigmoid": simple("Sigmoid"),
    "tanh": simple("Tanh"),
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
    "group norm": norm("group"),
    "layer norm": norm("layer"),
    "instance norm": norm("instance"),
    "batch norm": norm("batch"),
    "shapes": shapes,
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
    for name in names:
        grad = step.values[name] - found[f"new.{name}"]
        slope = rng.normal(size=grad.shape).astype(np.float32)
        slope /= np.linalg.norm(slope)

        def at(h: float, name: str = name, slope: NDArray[np.float32] = slope) -> float:
            moved = step.values | {name: step.values[name] + np.float32(h) * slope}
            return float(step.run(moved, batch)["loss"])

        h = 2e-3 if "pool" in case or case == "relu" else 1e-2
        numeric = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        exact = float((grad * slope).sum())
        # float32 losses of about 1 know their seventh digit, so the noise is 1e-7 / h. A ReLU or
        # a maximum that switches within h is a kink, so h is small where there are any.
        assert numeric == pytest.approx(exact, rel=2e-2, abs=2e-4), name


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
        ([("Erf", ["h"], "out", {})], "Erf node 'out': there is no gradient rule"),
        ([("MaxPool", ["h3"], "p", {"kernel_shape": [2], "auto_pad": "SAME_UPPER"}),
          ("Flatten", ["p"], "out", {})], "MaxPool node 'p': auto_pad"),
    ],
)  # fmt: skip
def test_what_has_no_rule_is_refused_by_name(nodes: list[Node], said: str) -> None:
    """An operator without a rule is an error that names the node, never a silent zero."""
    start: list[Node] = [("Gemm", ["x", "w"], "h", {}), ("Reshape", ["h", "s"], "h3", {})]
    model = network([*start, *nodes], {"w": w(5, 4), "s": ints(0, 1, 4)}, [5], [4])
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
