"""Qualcomm's NPU in its simulator: compiled and run for real, and compared with the CPU."""

from __future__ import annotations

import importlib.util
import platform
import tempfile
from pathlib import Path

import numpy as np
import pytest

from shoal.hw.backends import BACKENDS, BackendError, sessions
from tests.npu.cnn import Noise, ask, reference, run

if importlib.util.find_spec("onnxruntime_qnn") is None or platform.machine() != "x86_64":
    pytest.skip("no onnxruntime-qnn or no x86: `make test-npu`", allow_module_level=True)

QNN = BACKENDS["qnn"]


def unsupported() -> bytes:
    """Return a model with one operator that the HTP has, and one that it lacks."""
    from onnx import TensorProto, helper

    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Det", ["r"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "det",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 4, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1,))],
    )
    opsets = [helper.make_opsetid("", 17)]
    made: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return made


def test_the_probe_says_that_it_is_a_simulator() -> None:
    """Its times must not be taken for the NPU's."""
    found = QNN.probe()
    assert (found.state, found.simulated) == ("ready", True)
    assert "simulator" in found.detail
    assert any("QNNExecutionProvider" in each for each in found.devices)
    assert set(found.variants) == {"", "split"}


def test_the_int8_model_differs_by_few_steps_and_all_of_it_is_on_the_npu(
    cnn_int8: bytes, noise: Noise
) -> None:
    """The HTP rounds otherwise than the CPU does: a step here and there, and the trial judges."""
    engine = QNN.prepare(cnn_int8)
    want, got = reference(cnn_int8, noise), run(engine, noise)
    step, off = np.min(np.diff(np.unique(want))), np.abs(got - want).max()
    print(f"QNN int8: off by {off:.4f} = {off / step:.2f} steps, of {np.abs(want).max():.2f}")
    assert off <= 4.01 * step
    placement = QNN.placement(cnn_int8, engine)
    assert placement.cpu_share == 0.0
    assert set(placement.counts) == {"htp-simulator"}
    assert sum(each.op == "Conv" for each in placement.nodes) == 3


def test_the_float_model_runs_too(cnn: bytes, noise: Noise) -> None:
    """The simulator has float; on a device it is float16, which the trial would see."""
    want, got = reference(cnn, noise[:2]), run(QNN.prepare(cnn), noise[:2])
    assert np.abs(got - want).max() <= 0.01 * np.abs(want).max()


def test_the_split_variant_counts_what_fell_back(cnn_int8: bytes, noise: Noise) -> None:
    """By operators and by time: quantizing the input and dequantizing the output is the CPU's."""
    engine = QNN.prepare(cnn_int8, options={"cpu_fallback": "on", "profile": "on"})
    for each in noise[:2]:
        ask(engine, each)
    placement = QNN.placement(cnn_int8, engine)
    on_cpu = [each for each in placement.nodes if each.device == "cpu"]
    assert {each.op for each in on_cpu} == {"QuantizeLinear", "DequantizeLinear"}
    assert placement.cpu_share == len(on_cpu) / len(placement.nodes)
    assert placement.cpu_time_share is not None
    assert 0 < placement.cpu_time_share < 0.5
    assert QNN.placement(cnn_int8, engine) is placement  # the profile has ended, its result stays


def test_an_operator_that_the_npu_lacks_is_an_error_unless_allowed() -> None:
    """A silent fallback is what the whole attestation is about."""
    model = unsupported()
    with pytest.raises(BackendError, match="fallback to CPU EP has been explicitly disabled"):
        QNN.prepare(model)
    engine = QNN.prepare(model, options={"cpu_fallback": "on"})
    matrix = np.diag([1, 2, 3, 4]).astype(np.float32)[None]
    assert ask(engine, matrix) == pytest.approx([24.0])
    placement = QNN.placement(model, engine)
    assert [(each.op, each.device) for each in placement.nodes if each.op == "Det"] == [
        ("Det", "cpu")
    ]
    assert placement.cpu_share is not None
    assert placement.cpu_share > 0


def test_a_plugin_that_cannot_open_its_library_is_not_taken_for_a_working_one(
    cnn_int8: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime lists the provider all the same and runs everything on the CPU."""
    import onnxruntime as ort

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    QNN.prepare(sessions.SMALLEST)  # registers the plugin
    provider = sessions.Provider(
        name="QNNExecutionProvider",
        device="htp",
        options={"backend_path": "/nowhere/libQnnHtp.so"},
        ep_devices=tuple(sessions.ep_devices(ort, "QNNExecutionProvider"))[:1],
    )
    for fallback, text in ((True, "takes no operator"), (False, "refuses the model")):
        with pytest.raises(BackendError, match=text):
            sessions.load(
                cnn_int8,
                backend="qnn",
                provider=provider,
                threads=1,
                cpu_fallback=fallback,
                profile=True,
            )
    assert list(tmp_path.iterdir()) == []  # no profile is left


def test_a_broken_model_is_refused(cnn_int8: bytes) -> None:
    """By our reader, before a vendor's."""
    with pytest.raises(BackendError, match="not an ONNX model"):
        QNN.prepare(cnn_int8[:200])
