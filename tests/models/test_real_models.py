"""Real models answer through shoal as through their vendor's own runtime. Vectors made on the spot.

`make models` brings them; without it these tests are skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from shoal.agent.runtime import Runtime
from tests.models.fetch import ENTRIES, digest

FOLDER = Path(__file__).parents[2] / ".models"
SEEDS = range(5)


def path(name: str) -> Path:
    """Return a model's path; skip if it was not brought."""
    found = FOLDER / name
    if not found.exists():
        pytest.skip(f"{name} is not here: run `make models`")
    return found


def inputs(name: str, seed: int) -> dict[str, NDArray[Any]]:
    """Return inputs of the kind that a model is for."""
    rng = np.random.default_rng(seed)
    if name == "silero_vad.onnx":
        return {
            "input": (rng.normal(size=(1, 512)) * 0.1).astype(np.float32),
            "state": np.zeros((2, 1, 128), np.float32),
            "sr": np.array(16_000, np.int64),
        }
    if name == "magika.onnx":
        return {"bytes": rng.integers(0, 257, (1 + seed, 2048)).astype(np.int32)}
    return {"x": rng.normal(size=(1 + seed, 3, 48, 192)).astype(np.float32)}


@pytest.mark.parametrize("name", [each.file for each in ENTRIES])
def test_is_the_file_of_the_table(name: str) -> None:
    """What the figures are about is the pinned file."""
    (entry,) = (each for each in ENTRIES if each.file == name)
    assert digest(path(name)) == entry.sha256


@pytest.mark.parametrize("name", ["silero_vad.onnx", "magika.onnx", "rapidocr_cls.onnx"])
@pytest.mark.parametrize("seed", SEEDS)
def test_onnx_answers_as_onnxruntime(name: str, seed: int) -> None:
    """To 1e-6 of an output's largest value, free batch axes and a carried state included."""
    session = ort.InferenceSession(path(name), providers=["CPUExecutionProvider"])
    with Runtime() as runtime:
        model = runtime.load(path(name))
        feed = inputs(name, seed)
        for _ in range(20 if name == "silero_vad.onnx" else 1):
            want = session.run(None, feed)
            got = model.infer(feed)
            for spec, right in zip(model.outputs, want, strict=True):
                assert got[spec.name].shape == right.shape
                far = np.abs(got[spec.name].astype(float) - right).max()
                assert far <= 1e-6 * np.abs(right).max()
            if name == "silero_vad.onnx":
                feed = {**feed, "state": want[1]}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["okay_nabu.tflite", "hand_landmark_lite.tflite"])
def test_tflite_answers_as_litert(name: str, seed: int) -> None:
    """Bit for bit, over fifty steps of a streaming model."""
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    peer = interpreter.Interpreter(model_path=str(path(name)), num_threads=1)
    peer.allocate_tensors()
    (entry,) = peer.get_input_details()
    rng = np.random.default_rng(seed)
    with Runtime() as runtime:
        model = runtime.load(path(name))
        assert model.backend == "litert" and model.stateful == (name == "okay_nabu.tflite")
        for _ in range(50 if model.stateful else 2):
            if entry["dtype"] == np.int8:
                x = rng.integers(-128, 128, entry["shape"], dtype=np.int8)
            else:
                x = rng.random(entry["shape"], dtype=np.float32)
            peer.set_tensor(entry["index"], x)
            peer.invoke()
            got = model.infer({model.inputs[0].name: x})
            want = [peer.get_tensor(each["index"]) for each in peer.get_output_details()]
            assert len(got) == len(want)
            left = [value.tobytes() for value in got.values()]
            for right in want:
                left.remove(right.tobytes())
