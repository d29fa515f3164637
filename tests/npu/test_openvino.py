"""OpenVINO for real: answers, placement, threads, and what it refuses."""

from __future__ import annotations

import importlib.util
import sys
import threading

import numpy as np
import pytest

from shoal.hw.backends import BACKENDS, BackendError
from tests.npu.cnn import Noise, ask, reference, run

if importlib.util.find_spec("openvino") is None:
    pytest.skip("openvino is not installed here: `make test-npu` has it", allow_module_level=True)

OPENVINO = BACKENDS["openvino"]


def test_the_probe_lists_devices_and_imports_nothing() -> None:
    """A doctor that imports 100 MB of a vendor's library is no longer a doctor."""
    loaded = "openvino" in sys.modules
    found = OPENVINO.probe()
    assert found.state == "ready"
    assert found.version.startswith("20")
    assert any(each.startswith("CPU: ") for each in found.devices)
    assert found.variants[""] == {}
    assert ("openvino" in sys.modules) is loaded


@pytest.mark.parametrize("threads", [1, 2])
def test_the_float_model_answers_as_onnxruntime(cnn: bytes, noise: Noise, threads: int) -> None:
    """With one thread too: ONNX Runtime's provider of OpenVINO answered wrongly with one."""
    engine = OPENVINO.prepare(cnn, threads=threads)
    want, got = reference(cnn, noise), run(engine, noise)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert engine.inputs == (("x", 1, (1, 3, 64, 64)),)
    assert engine.outputs == (("y", 1, (1, 10)),)
    assert engine.backend == "openvino"
    assert not engine.stateful


def test_the_int8_model_is_within_two_steps(cnn_int8: bytes, noise: Noise) -> None:
    """Both round each layer's sums to 8 bits, at places of their own."""
    want, got = reference(cnn_int8, noise), run(OPENVINO.prepare(cnn_int8), noise)
    step = np.min(np.diff(np.unique(want)))
    assert np.abs(got - want).max() <= 2.01 * step
    assert (got.argmax(axis=1) == want.argmax(axis=1)).mean() >= 0.75


def test_an_answer_survives_the_next_call(cnn: bytes, noise: Noise) -> None:
    """The request is reused, so its memory must not be handed out."""
    engine = OPENVINO.prepare(cnn)
    first = ask(engine, noise[0])
    kept = first.copy()
    ask(engine, noise[1])
    assert np.array_equal(first, kept)


def test_threads_do_not_mix_their_reference(cnn: bytes, noise: Noise) -> None:
    """A request is for one thread: each call borrows its own."""
    engine = OPENVINO.prepare(cnn)
    want = [ask(engine, each) for each in noise]
    wrong: list[int] = []

    def call(index: int) -> None:
        for _ in range(50):
            if not np.array_equal(ask(engine, noise[index]), want[index]):
                wrong.append(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert wrong == []


def test_the_cpu_that_was_asked_for_is_no_fallback(cnn: bytes, noise: Noise) -> None:
    """On the device CPU nothing falls back; the operators are those that OpenVINO made of it."""
    engine = OPENVINO.prepare(cnn, options={"profile": "on"})
    plan = OPENVINO.placement(cnn, engine)
    assert {each.op for each in plan.nodes} >= {"Convolution", "FullyConnected"}
    ask(engine, noise[0])
    measured = OPENVINO.placement(cnn, engine)
    assert measured.cpu_share == 0.0
    assert sum(each.time_us or 0 for each in measured.nodes) > 0
    assert set(measured.counts) == {"cpu"}


def test_a_split_graph_counts_what_is_on_the_cpu(cnn: bytes) -> None:
    """Asked for several devices, OpenVINO says which takes an operator; here the CPU takes all."""
    engine = OPENVINO.prepare(cnn, options={"device": "HETERO:CPU"})
    placement = OPENVINO.placement(cnn, engine)
    assert placement.cpu_share == 1.0
    assert sum(each.op == "Convolution" for each in placement.nodes) == 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"device": "NPU"}, "refuses the model on NPU"),
        ({"device": "AUTO"}, "AUTO"),
        ({"precision": "i4"}, "precision"),
        ({"profile": "yes"}, "on or off"),
        ({"colour": "red"}, "no option colour"),
    ],
)
def test_what_it_cannot_do_is_refused(cnn: bytes, options: dict[str, str], text: str) -> None:
    """Nothing falls back to the CPU in silence, and a misspelt option is not ignored."""
    with pytest.raises(BackendError, match=text):
        OPENVINO.prepare(cnn, options=options)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_broken_model_is_refused(cnn: bytes, cut: int) -> None:
    """By our reader, before a vendor's."""
    with pytest.raises(BackendError, match="not an ONNX model"):
        OPENVINO.prepare(cnn[:cut] if cut else b"not a model")
