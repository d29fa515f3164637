"""Properties of the networks that are built without a framework."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shoal.server.learning.errors import LearningError
from shoal.server.learning.networks import (
    conv1d_classifier,
    parameters,
    trainable_names,
    with_parameters,
    with_probabilities,
)

MEAN, SCALE = np.array([5.0, -3.0]), np.array([2.0, 0.5])


def network(**kw: Any) -> onnx.ModelProto:
    """Return a small network."""
    given: dict[str, Any] = {"mean__c": MEAN, "scale__c": SCALE, "samples": 12, "classes": 3}
    return conv1d_classifier(**given | {"widths": (4, 8)} | kw)


def run(model: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the model's one output."""
    session = ort.InferenceSession(model.SerializeToString())
    found: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return found


def test_the_seed_decides_every_byte() -> None:
    """The same seed is the same file; another one is not."""
    assert network(seed=3).SerializeToString() == network(seed=3).SerializeToString()
    assert network(seed=3).SerializeToString() != network(seed=4).SerializeToString()


@pytest.mark.parametrize("batch", [1, 5])
def test_the_batch_is_free(batch: int) -> None:
    """A device asks for one window, training for many; the answers are the same."""
    x = np.random.default_rng(0).normal(size=(batch, 2, 12)).astype(np.float32)
    together = run(network(), x)
    assert together.shape == (batch, 3)
    alone = np.concatenate([run(network(), row[None]) for row in x])
    assert together == pytest.approx(alone, abs=1e-5)


def test_normalisation_travels_with_the_model() -> None:
    """Raw units in: a sensor with another offset and gain, told to the graph, answers the same."""
    unit = np.random.default_rng(0).normal(size=(4, 2, 12)).astype(np.float32)
    raw = (unit * SCALE[:, None] + MEAN[:, None]).astype(np.float32)
    plain = network(mean__c=np.zeros(2), scale__c=np.ones(2))
    assert run(network(), raw) == pytest.approx(run(plain, unit), abs=1e-4)


def test_weights_have_the_scale_of_he() -> None:
    """Variance 2 / fan-in, so that deep activations neither vanish nor explode."""
    values = parameters(network(widths=(64, 128), samples=100))
    weight = values["conv2.weight"]
    assert weight.std() == pytest.approx(np.sqrt(2 / (64 * 5)), rel=0.03)
    assert not values["conv2.bias"].any()


def test_only_what_may_move_is_trainable() -> None:
    """The normalisation of the input and the group norm's inner ones stay as they are."""
    assert trainable_names(network()) == (
        "conv1.bias", "conv1.weight", "norm1.scale", "norm1.shift",
        "conv2.bias", "conv2.weight", "norm2.scale", "norm2.shift",
        "head.bias", "head.weight",
    )  # fmt: skip


def test_running_statistics_are_not_trainable() -> None:
    """They move by averaging; a gradient step on a variance could make it negative."""
    names = ["scale", "bias", "mean", "variance"]
    node = helper.make_node("BatchNormalization", ["x", *names], ["out"])
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 2]) for n in ("x", "out")]
    held = [numpy_helper.from_array(np.ones(2, np.float32), name) for name in names]
    model = helper.make_model(helper.make_graph([node], "g", info[:1], info[1:], held))
    assert trainable_names(model) == ("scale", "bias")


def test_parameters_go_out_and_in() -> None:
    """What was read and put back answers the same; the given model is left alone."""
    model, other = network(seed=1), network(seed=2)
    before = model.SerializeToString()
    moved = with_parameters(model, parameters(other))
    assert moved.SerializeToString() == other.SerializeToString()
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    "values",
    [
        {"nothing": np.zeros(3, np.float32)},
        {"head.bias": np.zeros(4, np.float32)},
        {"head.bias": np.zeros(3, np.float64)},
    ],
    ids=["name", "shape", "dtype"],
)
def test_parameters_that_do_not_fit_are_refused(values: dict[str, NDArray[Any]]) -> None:
    """A vector of another network never becomes a model."""
    with pytest.raises(LearningError, match="does not fit the model"):
        with_parameters(network(), values)


def test_probabilities_are_the_softmax_of_the_logits() -> None:
    """They sum to 1, and the output says by its name what it is."""
    x = np.random.default_rng(0).normal(size=(4, 2, 12)).astype(np.float32)
    logits, chances = run(network(), x), run(with_probabilities(network()), x)
    want = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert chances == pytest.approx(want, abs=1e-6)
    assert [each.name for each in with_probabilities(network()).graph.output] == ["probabilities"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"scale__c": np.array([1.0, 0.0])}, "scale above 0"),
        ({"mean__c": np.array([np.nan, 0.0])}, "finite"),
        ({"samples": 3}, "samples >= 4"),
        ({"classes": 1}, "classes >= 2"),
        ({"widths": (6, 8)}, "multiples of 4"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any], said: str) -> None:
    """Before a graph is built that would divide by zero or not run."""
    with pytest.raises(LearningError, match=said):
        network(**wrong)
