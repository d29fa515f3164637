"""Properties of int8 models: as right as float, reproducible, quiet, and clean behind."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shoal.server.learning.errors import DatasetError
from shoal.server.learning.fit import FitConfig, evaluate, fit
from shoal.server.learning.networks import conv1d_classifier
from shoal.server.learning.quantize import QuantizeConfig, quantize_int8

C, T, K = 3, 40, 4


def windows(count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return windows whose class is a frequency, hard enough that some answers are wrong."""
    rng = np.random.default_rng(seed)
    y__n = rng.integers(0, K, count)
    rate = 0.35 + 0.12 * y__n[:, None, None] + rng.normal(0, 0.03, (count, 1, 1))
    x__nct = 9 + 4 * np.sin(rng.uniform(0, 6.28, (count, 1, 1)) + np.arange(T) * rate)
    return (x__nct + rng.normal(0, 2, (count, C, T))).astype(np.float32), y__n


@pytest.fixture(scope="module")
def trained() -> onnx.ModelProto:
    """Return a network that has learned."""
    x__nct, y__n = windows(600, 0)
    model = conv1d_classifier(
        mean__c=x__nct.mean((0, 2)), scale__c=x__nct.std((0, 2)), samples=T, classes=K,
        widths=(8, 16),
    )  # fmt: skip
    return fit(model, x__nct, y__n, config=FitConfig(epochs=8)).model


def test_int8_is_within_a_point_of_float(trained: onnx.ModelProto) -> None:
    """On windows that neither training nor calibration saw."""
    held = windows(1000, 2)
    exact = evaluate(trained, *held)
    int8 = evaluate(quantize_int8(trained, windows(300, 1)[0]), *held)
    assert 0.8 < exact.accuracy < 1
    assert int8.accuracy == pytest.approx(exact.accuracy, abs=0.01)
    assert int8.loss_mean == pytest.approx(exact.loss_mean, abs=0.03)


def test_layers_are_int8_and_the_rest_is_float(trained: onnx.ModelProto) -> None:
    """Every convolution and linear layer has int8 weights per channel, uint8 activations."""
    graph = quantize_int8(trained, windows(100, 1)[0]).graph
    values = {each.name: each for each in graph.initializer}
    source = {name: node for node in graph.node for name in node.output}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 3
    for node in layers:
        weight, activation = source[node.input[1]], source[node.input[0]]
        assert weight.op_type == activation.op_type == "DequantizeLinear"
        assert values[weight.input[0]].data_type == TensorProto.INT8
        assert list(values[weight.input[1]].dims) == [values[weight.input[0]].dims[0]]
        assert values[activation.input[2]].data_type == TensorProto.UINT8
    assert not {"DynamicQuantizeLinear", "ConvInteger"} & {node.op_type for node in graph.node}


def test_the_same_windows_make_the_same_bytes(trained: onnx.ModelProto) -> None:
    """A candidate that is made again after a crash is the same artefact."""
    chosen = windows(100, 1)[0]
    first, again = (quantize_int8(trained, chosen) for _ in range(2))
    data = first.SerializeToString(deterministic=True)
    assert data == again.SerializeToString(deterministic=True)
    assert data != quantize_int8(trained, windows(100, 5)[0]).SerializeToString(deterministic=True)


@pytest.mark.parametrize(("probabilities", "name"), [(True, "probabilities"), (False, "logits")])
def test_the_output_says_what_it_is(
    trained: onnx.ModelProto, probabilities: bool, name: str
) -> None:
    """Any batch goes in; probabilities sum to 1."""
    model = quantize_int8(trained, windows(40, 1)[0], probabilities=probabilities)
    session = ort.InferenceSession(model.SerializeToString())
    assert [each.name for each in session.get_outputs()] == [name]
    for batch in (1, 7):
        found = session.run(None, {"x": windows(batch, 3)[0]})[0]
        assert found.shape == (batch, K)
        if probabilities:
            assert found.sum(1) == pytest.approx(np.ones(batch), abs=1e-5)


@pytest.mark.parametrize("count", [1, 29, 31, 65])
def test_any_number_of_windows_calibrates(trained: onnx.ModelProto, count: int) -> None:
    """Fewer than a batch, or some over."""
    model = quantize_int8(trained, windows(count, 1)[0])
    assert evaluate(model, *windows(50, 2)).windows == 50


def test_rare_spikes_do_not_widen_the_range(trained: onnx.ModelProto) -> None:
    """One sample of 30 standard deviations in the calibration costs no accuracy."""
    chosen = windows(300, 1)[0]
    chosen[7, 0, 3] = 300
    held = windows(500, 2)
    int8 = evaluate(quantize_int8(trained, chosen), *held)
    assert int8.accuracy == pytest.approx(evaluate(trained, *held).accuracy, abs=0.02)


def overflowing() -> onnx.ModelProto:
    """Return a network whose int8 form overflows 16 bits where weights have 8 bits."""
    rng = np.random.default_rng(0)
    held: dict[str, Any] = {
        "w": rng.normal(0, 0.3, (4, C, 3)), "s": rng.uniform(0.5, 2, 4), "b": rng.normal(size=4),
        "m": rng.normal(size=4), "v": rng.uniform(0.5, 2, 4), "h": rng.normal(size=(4, K)),
    }  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[3]),
            helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"]),
            helper.make_node("GlobalAveragePool", ["n"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Gemm", ["f", "h"], ["logits"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", C, T])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", K])],
        [numpy_helper.from_array(v.astype(np.float32), n) for n, v in held.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def logits(model: onnx.ModelProto, *, fused: bool = True) -> NDArray[np.float32]:
    """Return answers by onnxruntime's int8 kernels, or by float arithmetic on the same numbers."""
    options = ort.SessionOptions()
    if not fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    found: NDArray[np.float32] = session.run(None, {"x": windows(200, 2)[0]})[0]
    return found


def test_batch_normalisation_is_folded_into_the_convolution() -> None:
    """It costs nothing on the device, and the answers stay."""
    model = overflowing()
    int8 = quantize_int8(model, windows(100, 1)[0], probabilities=False)
    assert "BatchNormalization" not in {node.op_type for node in int8.graph.node}
    exact = logits(model)
    assert np.abs(logits(int8) - exact).max() < 0.05 * np.abs(exact).max()


def test_int8_kernels_do_not_saturate() -> None:
    """Golden vectors hold on every processor: x86 without VNNI saturates with 8-bit weights."""
    int8 = quantize_int8(overflowing(), windows(100, 1)[0], probabilities=False)
    exact = logits(int8, fused=False)
    assert np.abs(logits(int8) - exact).max() < 0.02 * np.abs(exact).max()


def test_it_is_quiet_and_leaves_nothing_behind(
    trained: onnx.ModelProto,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No line on a terminal, no file, no changed log level, no place of the maker in the model."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger().level
    model = quantize_int8(trained, windows(40, 1)[0])
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().level == level
    assert str(tmp_path).encode() not in model.SerializeToString()
    assert not model.metadata_props


def test_no_window_is_refused(trained: onnx.ModelProto) -> None:
    """Ranges out of nothing would be made up."""
    with pytest.raises(DatasetError, match="needs calibration windows"):
        quantize_int8(trained, windows(0, 1)[0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"windows_max": 0},
        {"batch_size": 0},
        {"percentile": 50.0},
        {"percentile": 101.0},
        {"weight_bits": 4},
    ],
)
def test_limits_of_the_config(wrong: dict[str, Any]) -> None:
    """A wrong setting is refused where it is written."""
    with pytest.raises(ValueError, match="must be"):
        QuantizeConfig(**wrong)
