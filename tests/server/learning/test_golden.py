"""Ten steps of networks that torch exported equal torch's own ten steps.

Vectors: made by ``make_golden.py`` beside this file, with torch 2.13.0 on a CPU; never edited.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from shoal.server.learning.autodiff import training_facts, training_graph

FOLDER = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in FOLDER.glob("*.npz"))


def test_there_are_golden_runs() -> None:
    """A folder that went missing is no success."""
    assert len(CASES) == 8


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_equal_torch(case: str) -> None:
    """Losses, parameters and running statistics are torch's, to float32's rounding."""
    golden = np.load(FOLDER / f"{case}.npz", allow_pickle=False)
    model = onnx.load_from_string(golden["model"].tobytes())
    values: dict[str, Any] = {
        each.name: numpy_helper.to_array(each) for each in model.graph.initializer
    }
    trainable = [name for name in values if name.endswith((".weight", ".bias"))]
    optimizer: Any = str(golden["optimizer"])
    graph = training_graph(model, trainable=trainable, optimizer=optimizer)
    facts = training_facts(graph)
    session = ort.InferenceSession(graph.SerializeToString())
    links = [(each["input"], each["output"]) for each in (*facts["params"], *facts["state"])]
    state = {
        name: values.get(name, np.zeros(each["shape"], np.float32))
        for each in (*facts["params"], *facts["state"])
        for name in [each["input"]]
    }
    outputs = [facts["loss"], *[output for _, output in links]]
    for x, y, w, want in zip(
        golden["x__sbi"], golden["y__sb"], golden["w__sb"], golden["loss__s"], strict=True
    ):
        batch = {
            facts["x"]: x.astype(np.float32) / 32, facts["y"]: y, facts["w"]: w,
            facts["lr"]: golden["lr"],
        }  # fmt: skip
        loss, *found = session.run(outputs, state | batch)
        assert float(loss) == pytest.approx(float(want), rel=1e-5)
        state = {name: value for (name, _), value in zip(links, found, strict=True)}
    after = {name[6:] for name in golden if name.startswith("after.")}
    assert after == {name for name in state if not name.startswith("state.")}
    for name in after:
        want = golden[f"after.{name}"]
        assert np.abs(state[name] - want).max() <= 1e-5 * max(1.0, np.abs(want).max()), name
