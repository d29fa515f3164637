"""Properties: the kernel path gives what onnxruntime gives, and refuses what it does not know.

Networks are drawn by seed, so that every run of the tests sees the same ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shoal.ext import micro
from shoal.server.learning import networks, quantize

Array = NDArray[Any]
VARIANTS = micro.variants()
DEEP = 2e-6
"""Several layers, one behind the other: each side rounds hundreds of sums in its own order, and is
itself off the exact value by this much. One layer alone keeps 1e-6, see below."""
DRAWN = 1e-5
"""Networks that nobody chose: of 5,600 drawn ones 6 were beyond 2e-6 and the worst at 2.7e-6, so
that one run of 60 in twenty would fail at DEEP. A wrong kernel is off by far more than this."""


def called(engine: micro.MicroEngine, x: Array) -> tuple[tuple[int, ...], bytes]:
    """Call with an array's own shape."""
    return engine.call(x.shape, np.ascontiguousarray(x).data)


def single(value: float) -> float:
    """Round to float32."""
    return float(np.float32(value))


class Net:
    """A chain in the making; `shape` is that of one sample."""

    def __init__(self, seed: int, shape: Sequence[int], *, batch: int | str = "batch") -> None:
        self.rng = np.random.default_rng(seed)
        self.shape = list(shape)
        self.batch = batch
        self.first = tuple(shape)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.last = "x"

    def name(self) -> str:
        """A new name."""
        return f"v{len(self.nodes)}_{len(self.tensors)}"

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        """Add an initializer and return its name."""
        name = self.name()
        self.tensors.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind: str, *more: str, first: bool = True, **attributes: Any) -> Net:
        """Add a node that reads the last value; `more` are constants."""
        out = self.name()
        inputs = [self.last, *more] if first else [*more, self.last]
        self.nodes.append(helper.make_node(kind, inputs, [out], **attributes))
        self.last = out
        return self

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        """Draw float32 numbers."""
        return (self.rng.normal(size=shape) * scale).astype(np.float32)

    def weights(self, *shape: int) -> Array:
        """Draw weights that keep the scale of what they multiply (He)."""
        return self.normal(*shape, scale=float(np.sqrt(2 / np.prod(shape[1:]))))

    def model(self, opset: int = 17) -> bytes:
        """Return the serialized model."""
        shape = [self.batch, *self.first]
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(self.last, TensorProto.FLOAT, None)],
            self.tensors,
        )
        opsets = [helper.make_opsetid("", opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()  # type: ignore[no-any-return]

    # ---- layers

    def dense(self, outs: int, *, matmul: bool = False) -> Net:
        """Add a linear layer."""
        (inside,) = self.shape
        self.shape = [outs]
        weights, bias = self.weights(outs, inside), self.const(self.normal(outs))
        if matmul:
            return self.op("MatMul", self.const(weights.T)).op("Add", bias)
        if self.rng.integers(2):
            return self.op("Gemm", self.const(weights), bias, transB=1)
        return self.op("Gemm", self.const(weights.T), bias)

    def conv(self, outs: int, kernel: Sequence[int], *, groups: int = 1, **window: Any) -> Net:
        """Add a convolution, with a bias or without."""
        weights = self.weights(outs, self.shape[0] // groups, *kernel)
        more = [self.const(weights)]
        if self.rng.integers(2):
            more.append(self.const(self.normal(outs)))
        return self.slide(
            outs, kernel, lambda w: self.op("Conv", *more, group=groups, **w), **window
        )

    def slide(
        self, outs: int, kernel: Sequence[int], make: Callable[[dict[str, Any]], Any],
        *, strides: Sequence[int] = (), pads: Sequence[int] = (), dilations: Sequence[int] = (),
    ) -> Net:  # fmt: skip
        """Add what `make` adds and compute the sizes behind a sliding window."""
        n = len(kernel)
        strides, dilations = strides or [1] * n, dilations or [1] * n
        pads = pads or [0] * 2 * n
        make({"strides": strides, "pads": pads, "dilations": dilations})
        self.shape = [
            outs,
            *(
                (self.shape[1 + i] + pads[i] + pads[n + i] - (kernel[i] - 1) * dilations[i] - 1)
                // strides[i]
                + 1
                for i in range(n)
            ),
        ]
        return self

    def pool(self, kind: str, kernel: Sequence[int], **window: Any) -> Net:
        """Add a pool."""

        def make(w: dict[str, Any]) -> None:
            if kind == "AveragePool":
                del w["dilations"]
                w["count_include_pad"] = int(self.rng.integers(2))
            self.op(kind, kernel_shape=list(kernel), **w)

        return self.slide(self.shape[0], kernel, make, **window)

    def flatten(self) -> Net:
        """Make the value flat."""
        self.shape = [int(np.prod(self.shape))]
        return self.op("Flatten")

    # ---- QDQ

    def quant(self, scale: float, zero: int, kind: Any = np.uint8) -> Net:
        """Add QuantizeLinear and DequantizeLinear."""
        pair = [self.const(scale), self.const(zero, kind)]
        return self.op("QuantizeLinear", *pair).op("DequantizeLinear", *pair)

    def held(self, values: Array, scale: Any, kind: Any, axis: int = 0, zero: Any = 0) -> str:
        """A constant behind a DequantizeLinear."""
        out = self.name() + "d"
        zeros = np.broadcast_to(np.asarray(zero, kind), np.shape(scale))
        inputs = [self.const(values, kind), self.const(scale), self.const(zeros, kind)]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [out], axis=axis))
        return out


def session(model: bytes) -> ort.InferenceSession:
    """Open a model in onnxruntime, on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def own(model: bytes, x: Array, variant: str | None = None) -> Array:
    """Run a model on the kernel path."""
    shape, data = called(micro.compile(model, variant=variant), x)
    return np.frombuffer(data, np.float32).reshape(shape)


def check(model: bytes, x: Array, *, bound: float = 1e-6) -> None:
    """Every variant is within the bound of the largest value; the shape is the same."""
    found = micro.recognise(model)
    assert isinstance(found, micro.Recognised), found
    want = session(model).run(None, {"x": x})[0]
    for variant in VARIANTS:
        got = own(model, x, variant)
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= bound * np.abs(want).max(), variant


# ---- networks by seed ---------------------------------------------------------------------------


def window(rng: np.random.Generator, axes: int) -> dict[str, list[int]]:
    """Draw strides, pads, dilations."""
    return {
        "strides": [int(rng.integers(1, 3)) for _ in range(axes)],
        "pads": [int(rng.integers(0, 3)) for _ in range(2 * axes)],
        "dilations": [int(rng.integers(1, 3)) for _ in range(axes)],
    }


def activate(net: Net, choice: int) -> None:
    """Add one of three activations, or none."""
    if choice < 3:
        net.op(("Relu", "Sigmoid", "Tanh")[choice])


def dense_net(seed: int) -> Net:
    """A network of linear layers."""
    rng = np.random.default_rng(seed)
    net = Net(seed, [int(rng.integers(1, 90))])
    for _ in range(rng.integers(1, 4)):
        net.dense(int(rng.integers(1, 150)), matmul=bool(rng.integers(2)))
        activate(net, int(rng.integers(4)))
    return net


def conv_net(seed: int, axes: int) -> Net:
    """A network of convolutions in 1 or 2 dimensions."""
    rng = np.random.default_rng(seed)
    channels = int(rng.integers(1, 9))
    net = Net(seed, [channels, *(int(rng.integers(9, 30)) for _ in range(axes))])
    each = (channels, *(1,) * axes)
    if rng.integers(2):
        net.op("Sub", net.const(net.normal(1, *each)))
        net.op("Div", net.const(np.abs(net.normal(*each)) + 0.5))
    for _ in range(rng.integers(1, 4)):
        if min(net.shape[1:]) < 10:
            break
        groups = int(rng.choice([1, 1, net.shape[0]]))
        outs = groups * int(rng.integers(1, 4)) if groups > 1 else int(rng.integers(1, 40))
        net.conv(outs, rng.integers(1, 5, axes).tolist(), groups=groups, **window(rng, axes))
        kind = int(rng.integers(8))
        if kind == 3:
            three = [net.const(net.normal(outs)) for _ in range(3)]
            net.op("BatchNormalization", *three, net.const(np.abs(net.normal(outs)) + 0.5))
        elif kind == 4:
            net.op("Mul", net.const(net.normal(*net.shape)))
        elif kind == 5:
            net.op("Add", net.const(net.normal(1, 1, *net.shape[1:])))
        elif kind == 6:
            net.op("Sub", net.const(net.normal(outs, *(1,) * axes)), first=False)
        activate(net, int(rng.integers(4)))
        if rng.integers(3) == 0 and min(net.shape[1:]) > 3:
            pads = rng.integers(0, 2, 2 * axes).tolist()
            strides = rng.integers(1, 3, axes).tolist()
            kind_of_pool = str(rng.choice(["MaxPool", "AveragePool"]))
            net.pool(kind_of_pool, [2] * axes, strides=strides, pads=pads)
    ending(net, int(rng.integers(4)), axes)
    return net


def ending(net: Net, choice: int, axes: int) -> None:
    """Add one of three ways from a map to a flat value, or none."""
    channels = net.shape[0]
    if choice == 0:
        net.op("GlobalAveragePool")
        net.shape = [channels]
        net.flatten()
    elif choice == 1:
        net.op("ReduceMean", axes=list(range(2, 2 + axes)), keepdims=0)
        net.shape = [channels]
    elif choice == 2:
        net.flatten()
    if choice < 3:
        net.dense(7)


def int8_net(seed: int) -> Net:
    """Quantized layers with weights of 7 bits, which no kernel of onnxruntime saturates."""
    rng = np.random.default_rng(seed)
    kind: Any = np.uint8 if rng.integers(2) else np.int8
    least, most = (0, 255) if kind is np.uint8 else (-128, 127)
    axes = int(rng.integers(0, 3))
    net = Net(seed, [int(rng.integers(1, 20)), *(int(rng.integers(9, 30)) for _ in range(axes))])
    source = single(rng.uniform(0.02, 0.04))
    net.quant(source, int(rng.integers(least + 90, most - 90)), kind)
    for _ in range(rng.integers(1, 4)):
        if axes and min(net.shape[1:]) < 10:
            break
        groups = int(rng.choice([1, 1, net.shape[0]])) if axes else 1
        outs = groups * int(rng.integers(1, 3)) if groups > 1 else int(rng.integers(1, 70))
        kernel = rng.integers(1, 5, axes).tolist()
        weights = rng.integers(-63, 64, [outs, net.shape[0] // groups, *kernel])
        size = outs if rng.integers(2) else ()
        scales = (rng.uniform(0.01, 0.03, size) / np.sqrt(weights[0].size)).astype(np.float32)
        more = []
        if rng.integers(3):
            bias = rng.integers(-3000, 3000, outs)
            more = [net.held(bias, (np.float32(source) * scales).astype(np.float32), np.int32)]
        if axes:
            held = net.held(weights, scales, np.int8)
            net.slide(
                outs,
                kernel,
                lambda w, held=held, more=more, groups=groups: net.op(  # type: ignore[misc]
                    "Conv", held, *more, group=groups, **w
                ),
                **window(rng, axes),
            )
        else:
            net.shape = [outs]
            if rng.integers(2):
                net.op("MatMul", net.held(weights.T, scales, np.int8, axis=1))
            else:
                net.op("Gemm", net.held(weights, scales, np.int8), *more, transB=1)
        relu = bool(rng.integers(2))
        if relu:
            net.op("Relu")
        source = single(rng.uniform(0.02, 0.04))
        zero = least if relu else int(rng.integers(least + 90, most - 90))
        net.quant(source, zero, kind)
        if axes and rng.integers(3) == 0 and min(net.shape[1:]) > 3:
            net.pool("MaxPool", [2] * axes)
            if rng.integers(2):
                net.quant(source, zero, kind)
    if axes and rng.integers(2):
        net.op("GlobalAveragePool")
        net.shape = [net.shape[0]]
        if rng.integers(2):
            net.quant(0.02, 0 if kind is np.uint8 else -128, kind)
    if axes:
        net.flatten()
    return net


def rows(net: Net, count: int = 3) -> Array:
    """Draw inputs."""
    return np.random.default_rng(count).normal(size=(count, *net.first)).astype(np.float32)


# ---- float --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(4))
def test_dense_networks_equal_onnxruntime(block: int) -> None:
    """Gemm in both orders, MatMul and Add, every activation, any width."""
    for seed in range(block * 25, block * 25 + 25):
        net = dense_net(seed)
        check(net.model(), rows(net), bound=DEEP)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("block", range(4))
def test_convolutions_equal_onnxruntime(block: int, axes: int) -> None:
    """Any kernel, stride, dilation, padding and group; pools, constants, normalisation."""
    for seed in range(block * 25, block * 25 + 25):
        net = conv_net(seed, axes)
        check(net.model(), rows(net, 2), bound=DEEP)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(1000, 1_000_000), batch=st.integers(1, 4), axes=st.integers(0, 2))
def test_any_float_network_equals_onnxruntime(seed: int, batch: int, axes: int) -> None:
    """The same for networks that hypothesis looks for."""
    net = conv_net(seed, axes) if axes else dense_net(seed)
    check(net.model(), rows(net, batch), bound=DRAWN)


@pytest.mark.parametrize("outs", [1, 7, 8, 16, 33, 64, 130])
def test_one_layer_stays_within_a_millionth(outs: int) -> None:
    """Each width of panel, each remainder; positions below and above a block of six."""
    for products in (1, 31, 64, 200):
        net = Net(outs * 1000 + products, [products])
        check(net.dense(outs).model(), rows(net))
    for length in (3, 5, 6, 7, 12, 40):
        net = Net(outs * 1000 + length, [5, length])
        check(net.conv(outs, [3]).model(), rows(net))


@pytest.mark.parametrize(("op", "ulps"), [("Sigmoid", 3), ("Tanh", 3)])
def test_activations_are_accurate(op: str, ulps: int) -> None:
    """Against double precision, over the whole range of floats that matter."""
    spans = [np.linspace(-100, 100, 40001), np.linspace(-1, 1, 20001), np.logspace(-30, 1.9, 9001)]
    x = np.concatenate(spans).astype(np.float32)[None]
    net = Net(0, [x.shape[1]]).op(op)
    wide = x.astype(np.float64)
    want = 1 / (1 + np.exp(-wide)) if op == "Sigmoid" else np.tanh(wide)
    for variant in VARIANTS:
        got = own(net.model(), x, variant).astype(np.float64)
        ulp = np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)
        assert (np.abs(got - want) <= ulps * ulp)[want > 1e-37].all()
        assert np.abs(got - want)[want <= 1e-37].max(initial=0) < 1 or op == "Tanh"


@pytest.mark.parametrize("op", ["Relu", "Sigmoid", "Tanh"])
def test_special_values_pass_as_in_onnxruntime(op: str) -> None:
    """NaN stays NaN, infinities saturate."""
    x = np.array([[np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38]], np.float32)
    net = Net(0, [x.shape[1]]).op(op)
    want = session(net.model()).run(None, {"x": x})[0]
    for variant in VARIANTS:
        got = own(net.model(), x, variant)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-38)


def test_softmax_sums_to_one_and_survives_large_logits() -> None:
    """The largest logit is taken off before the exponential."""
    net = Net(0, [19]).op("Softmax", axis=-1)
    x = rows(net, 50) * 300
    check(net.model(), x)
    np.testing.assert_allclose(own(net.model(), x).sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_padding(auto: str) -> None:
    """ONNX's three kinds, for lengths that leave each remainder."""
    for length in (9, 10, 11):
        net = Net(length, [3, length])
        net.op("Conv", net.const(net.weights(8, 3, 4)), auto_pad=auto, strides=[2])
        check(net.model(), rows(net))


def test_shapes_may_change_without_mixing_the_batch() -> None:
    """Reshape, Squeeze, Unsqueeze keep the planar order of ONNX."""
    net = Net(0, [4, 6, 5])
    net.op("Reshape", net.const([0, 8, -1], np.int64)).op("Relu")
    net.op("Unsqueeze", net.const([2], np.int64)).op("Tanh").op("Squeeze", net.const([2], np.int64))
    net.op("Reshape", net.const([-1, 120], np.int64))
    net.shape = [120]
    check(net.dense(5).model(), rows(net))


# ---- int8 ---------------------------------------------------------------------------------------


def same_bits(model: bytes, x: Array) -> None:
    """Every variant gives the bits of onnxruntime."""
    found = micro.recognise(model)
    assert isinstance(found, micro.Recognised), found
    want = session(model).run(None, {"x": x})[0]
    for variant in VARIANTS:
        np.testing.assert_array_equal(own(model, x, variant), want, err_msg=variant)


@pytest.mark.parametrize("block", range(8))
def test_int8_networks_give_the_bits_of_onnxruntime(block: int) -> None:
    """Per channel and per tensor, uint8 and int8 activations, groups, bias, Relu, pools."""
    quantized = 0
    for seed in range(block * 40, block * 40 + 40):
        net = int8_net(seed)
        model = net.model()
        same_bits(model, rows(net))
        found = micro.recognise(model)
        quantized += isinstance(found, micro.Recognised) and found.quantized
    assert quantized > 30  # the generator does not drift away from what is to be tested


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(1000, 1_000_000), batch=st.integers(1, 3))
def test_any_int8_network_gives_the_bits_of_onnxruntime(seed: int, batch: int) -> None:
    """The same for networks that hypothesis looks for."""
    net = int8_net(seed)
    same_bits(net.model(), rows(net, batch))


@pytest.mark.parametrize("op", ["Add", "Mul"])
@pytest.mark.parametrize("left", [False, True])
def test_quantized_constants_give_the_same_bits(op: str, left: bool) -> None:
    """All 256 values, constants per tensor and per channel, on either side."""
    for seed in range(20):
        net = Net(seed, [40])
        rng = net.rng
        scales = rng.uniform(0.01, 0.05, 3).astype(np.float32)
        scales[2] = scales[2] if op == "Add" else scales[0] * scales[1] * 60
        zeros = rng.integers(60, 200, 3)
        net.quant(scales[0], int(zeros[0]))
        size = 40 if seed % 2 else 1
        constant = net.held(rng.integers(0, 256, size), scales[1], np.uint8, zero=zeros[1])
        net.op(op, constant, first=not left).quant(scales[2], int(zeros[2]))
        values = (np.arange(256).repeat(40).reshape(256, 40) - zeros[0]) * scales[0]
        same_bits(net.model(), values.astype(np.float32))


def test_quantized_ends_give_the_same_bits() -> None:
    """Sigmoid, Softmax, average pools between two quantized values have integer kernels there."""
    for seed in range(20):
        kind: Any = np.int8 if seed % 2 else np.uint8
        least = -128 if seed % 2 else 0
        net = Net(seed, [6, 12]).quant(0.02, least + 120, kind)
        net.pool("AveragePool", [2], strides=[2]).quant(0.015, least + 110, kind)
        net.op("Sigmoid").quant(1 / 256, least, kind).flatten()
        net.op("Softmax", axis=-1).quant(1 / 256, least, kind)
        same_bits(net.model(), rows(net, 20))


def test_rounding_is_half_to_even() -> None:
    """Values in the very middle of two steps."""
    net = Net(0, [256]).quant(0.5, 128)
    x = (np.arange(-128, 128) * 0.25).astype(np.float32)[None]
    same_bits(net.model(), x)


# ---- the networks that shoal trains -------------------------------------------------------------


@pytest.fixture(scope="module", params=[(6, 100, (24, 48)), (9, 63, (16, 8)), (1, 21, (4, 12))])
def classifier(request: pytest.FixtureRequest) -> tuple[bytes, bytes, bytes, Array]:
    """Float, int8 and int8 with Softmax of one network, and windows."""
    channels, samples, widths = request.param
    rng = np.random.default_rng(samples)
    model = networks.conv1d_classifier(
        mean__c=rng.normal(size=channels), scale__c=rng.uniform(0.5, 2, channels),
        samples=samples, classes=6, widths=widths,
    )  # fmt: skip
    moved = {
        name: (value + rng.normal(size=value.shape) * 0.2).astype(np.float32)
        for name, value in networks.parameters(model).items()
    }
    model = networks.with_parameters(model, moved)
    x = rng.normal(size=(64, channels, samples)).astype(np.float32)
    plain = quantize.quantize_int8(model, x, probabilities=False)
    soft = quantize.quantize_int8(model, x)
    return *(each.SerializeToString() for each in (model, plain, soft)), x


def test_shoals_float_classifier(classifier: tuple[bytes, bytes, bytes, Array]) -> None:
    """The very graph that the server trains."""
    check(classifier[0], classifier[3])


def test_shoals_int8_classifier(classifier: tuple[bytes, bytes, bytes, Array]) -> None:
    """The bits of the logits; the Softmax behind them is float, and within a millionth."""
    _, plain, soft, x = classifier
    same_bits(plain, x)
    check(soft, x)


# ---- faults -------------------------------------------------------------------------------------


def refusal(model: bytes) -> str:
    """Return why a model is not taken."""
    found = micro.recognise(model)
    assert isinstance(found, micro.NotRecognised), found
    with pytest.raises(micro.MicroError, match="does not take this model"):
        micro.compile(model)
    return found.reason


def test_what_is_unknown_is_refused_with_a_reason() -> None:
    """The reason names what is in the way."""

    def reason(net: Net) -> str:
        return refusal(net.model())

    assert refusal(b"\xff\xff") and "\n" not in refusal(b"garbage")
    net = Net(0, [4, 8])
    assert "Transpose" in reason(net.op("Transpose", perm=[0, 2, 1]))
    net = Net(0, [4])
    assert "twice" in reason(net.op("Add", "x"))
    net = Net(0, [4])
    assert "2 consumers" in reason(net.op("Relu").op("Add", "x"))
    net = Net(0, [4])
    assert "mixes the batch" in reason(net.op("Reshape", net.const([2, -1], np.int64)))
    net = Net(0, [4, 8])
    assert "Softmax" in reason(net.op("Softmax", axis=2))
    net = Net(0, [4])
    assert "batch" in reason(net.op("Add", net.const(net.normal(2, 4))))
    net = Net(0, [4])
    assert "left" in reason(net.op("MatMul", net.const(net.normal(4, 4)), first=False))
    assert "axis 1" in reason(Net(0, ["length"]).op("Relu"))  # type: ignore[list-item]
    assert "opset" in refusal(Net(0, [4]).op("Relu").model(opset=8))
    net = Net(0, [3])
    assert "int32" not in reason(net.op("Cast", to=TensorProto.INT32))


def test_a_variant_that_is_not_there_is_refused() -> None:
    """The hint names those that are."""
    with pytest.raises(micro.MicroError, match="kernels 'v9'") as failed:
        micro.compile(Net(0, [4]).op("Relu").model(), variant="v9")
    assert VARIANTS[0] in failed.value.hint


def test_a_wrong_input_is_refused_and_the_engine_stays_usable() -> None:
    """Wrong shapes, sizes that overflow, an empty batch."""
    net = Net(0, [4]).dense(3)
    engine = micro.compile(net.model())
    x = rows(net, 2)
    for shape, data in (((2, 3), x), ((8,), x), ((1, 4), x), ((-1, 4), x), ((1 << 62, 4), x)):
        with pytest.raises(ValueError, match="input"):
            engine.call(shape, data.data)
    assert engine.call((0, 4), b"") == ((0, 3), b"")
    assert called(engine, x)[0] == (2, 3)
    fixed = micro.compile(Net(0, [4], batch=2).op("Relu").model())
    assert fixed.inputs == (("x", 1, (2, 4)),)
    with pytest.raises(ValueError, match="input"):
        called(fixed, x[:1])


def test_mutated_models_are_refused_or_run() -> None:
    """Whatever bytes come, recognise answers, compile raises only MicroError, a run returns."""
    rng = np.random.default_rng(0)
    known = 0
    for seed in range(600):
        net = int8_net(seed % 30) if seed % 2 else conv_net(seed % 30, 1 + seed % 4 // 2)
        data = bytearray(net.model())
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        model = bytes(data)
        try:
            engine = micro.compile(model)
        except micro.MicroError:
            continue
        known += 1
        shape = tuple(2 if dim < 0 else dim for dim in engine.inputs[0][2])
        if np.prod(shape) < 1 << 16:
            called(engine, np.ones(shape, np.float32))
    assert known > 100


def test_a_cycle_ends() -> None:
    """A graph that leads back to its input is no endless loop."""
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Relu", ["y"], ["x"])]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xz"]
    graph = helper.make_graph(nodes, "net", info[:1], info[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    assert "cycle" in refusal(model.SerializeToString())


def test_threads_share_an_engine(classifier: tuple[bytes, bytes, bytes, Array]) -> None:
    """The program is only read."""
    engine = micro.compile(classifier[1])
    x = classifier[3]
    want = [called(engine, x[i : i + 1]) for i in range(len(x))]
    wrong: list[int] = []

    def work(start: int) -> None:
        for i in [*range(start, len(x)), *range(start)]:
            if called(engine, x[i : i + 1]) != want[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 13, 29, 47)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
