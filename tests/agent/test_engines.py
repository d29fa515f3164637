"""What runs a model: the kernel path only where it agrees, a trial's choice only where it fits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort_python
import pytest

from shoal.agent import engines
from shoal.agent.errors import ModelFormatError
from shoal.agent.runtime import Runtime
from shoal.ext import micro, ort
from shoal.ext._engine import Engine
from shoal.ext._pyengine import PyEngine
from shoal.hw.board import Board
from shoal.hw.cache import Cache, versions
from shoal.hw.choice import Choice
from shoal.server.learning.networks import conv1d_classifier
from shoal.server.learning.quantize import quantize_int8


def classifier(quantized: bool) -> bytes:
    """Return the network that the fleet's devices run."""
    net = conv1d_classifier(mean__c=np.zeros(6), scale__c=np.ones(6), samples=50, classes=5, seed=3)
    if quantized:
        rng = np.random.default_rng(0)
        net = quantize_int8(net, rng.normal(size=(200, 6, 50)).astype(np.float32))
    data: bytes = net.SerializeToString()
    return data


@pytest.mark.parametrize("quantized", [False, True])
def test_auto_answers_as_onnxruntime_does(quantized: bool) -> None:
    """To 1e-6 of the largest value, whatever engine it took."""
    data = classifier(quantized)
    session = ort_python.InferenceSession(data, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    with Runtime() as runtime:
        model = runtime.load(data)
        assert model.backend in ("kernel", "ort") and model.version
        for scale in (0.1, 1, 10, 100):
            x = (rng.normal(size=(1, 6, 50)) * scale).astype(np.float32)
            (want,) = session.run(None, {"x": x})
            (got,) = model.infer({"x": x}).values()
            assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


class Wrong:
    """Makes of a model an engine that is fast and wrong by a little."""

    def __init__(self, error: float) -> None:
        self.error = error

    def compile(self, model: bytes) -> Engine:
        """Return that engine."""
        right = ort.load(model)
        return PyEngine(
            "kernel", "1", right.inputs, right.outputs,
            lambda arrays: [np.full((1, 5), 0.2 + self.error, np.float32)],
        )  # fmt: skip


def test_a_kernel_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast it is."""
    monkeypatch.setattr(micro, "compile", Wrong(1e-3).compile)
    with Runtime() as runtime:
        assert runtime.load(classifier(False)).backend == "ort"


def test_a_rounding_that_differs_in_a_few_of_a_hundred_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Quantized layers of another rounding differ seldom, by a whole step."""
    data = classifier(False)
    session = ort_python.InferenceSession(data, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def call(arrays: list[Any]) -> list[Any]:
        (found,) = session.run(None, {name: arrays[0]})
        seldom = int(arrays[0].view(np.uint32).sum()) % 50 == 0
        return [found + np.float32(seldom) / 256]

    right = ort.load(data)
    monkeypatch.setattr(
        micro, "compile", lambda model: PyEngine("kernel", "1", right.inputs, right.outputs, call)
    )
    monkeypatch.setattr(engines, "LOOK_S", 60.0)
    monkeypatch.setattr(engines, "FASTER_MIN", 0.0)
    with Runtime() as runtime:
        assert runtime.load(data).backend == "ort"


def test_a_kernel_that_is_not_faster_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same engine twice: neither is 1.1 times as fast as the other by more than noise."""

    def same(model: bytes) -> Any:
        found = ort.load(model)
        return PyEngine("kernel", "1", found.inputs, found.outputs, slow(model))

    def slow(model: bytes) -> Any:
        session = ort_python.InferenceSession(model, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda arrays: [session.run(None, {name: arrays[0]})[0] for _ in range(3)][:1]

    monkeypatch.setattr(micro, "compile", same)
    with Runtime() as runtime:
        assert runtime.load(classifier(False)).backend == "ort"


def choice(**changed: Any) -> Choice:
    """Return a choice of plain ORT on two threads."""
    values: dict[str, Any] = {
        "backend": "ort", "variant": "-", "threads": 2, "options": {}, "p50_us": 1.0,
        "p99_us": 2.0, "ram_bytes": None, "energy_uj": None, "error_rel": 0.0,
        "fallback": 0.0, "why": "test",
    }  # fmt: skip
    return Choice(**(values | changed))


def test_auto_follows_the_trial_of_this_device(tmp_path: Path) -> None:
    """A choice for this model, board and these versions is followed, if its numbers are ORT's."""
    data = classifier(False)
    digest, board = hashlib.sha256(data).hexdigest(), Board.read().digest
    cache = Cache(tmp_path)
    with Runtime(trials=tmp_path) as runtime:
        cache.keep(digest, board, versions(), choice())
        assert runtime.load(data).backend == "ort"
        cache.keep(digest, board, versions(), choice(backend="kernel", threads=1))
        assert runtime.load(data).backend in ("kernel", "ort")  # it is looked at in any case
        cache.keep(digest, board, versions(), choice(backend="openvino", error_rel=1e-4))
        assert runtime.load(data).backend in ("kernel", "ort")
        cache.keep(digest, board, versions(), choice(backend="nonesuch"))
        with pytest.raises(ValueError, match="backend must be"):
            engines.engine_for(data, backend="nonesuch", threads=1)
        assert runtime.load(data).backend in ("kernel", "ort")
        for path in tmp_path.iterdir():
            path.write_text(json.dumps(["hostile"]))
        assert runtime.load(data).backend in ("kernel", "ort")


def test_a_named_backend_is_taken_or_refused() -> None:
    """No silent change of backend."""
    data = classifier(False)
    with Runtime() as runtime:
        assert runtime.load(data, backend="ort").backend == "ort"
        assert runtime.load(data, backend="kernel").backend == "kernel"
        for other in ("coral", "litert"):
            with pytest.raises(ModelFormatError, match=r"not a \.tflite model"):
                runtime.load(data, backend=other)
        with pytest.raises(ValueError, match="backend must be auto or one of ort, kernel"):
            runtime.load(data, backend="fastest")


def test_models_with_text_or_several_inputs_are_onnxruntimes() -> None:
    """What the kernel path does not take falls through."""
    assert isinstance(micro.recognise(b"junk"), micro.NotRecognised)
    assert engines.is_tflite(b"\0\0\0\0TFL3") and not engines.is_tflite(classifier(False))
