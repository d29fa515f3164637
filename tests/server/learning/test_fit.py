"""Properties of fitting and evaluating, and what bad data gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shoal.server.learning.errors import DatasetError, LearningError
from shoal.server.learning.fit import FitConfig, evaluate, fit
from shoal.server.learning.networks import conv1d_classifier, with_probabilities

Data = tuple[NDArray[np.float32], NDArray[np.int64]]
CONFIG = FitConfig(epochs=12, batch_size=16, learning_rate=0.1)


def data(count: int, seed: int = 0) -> Data:
    """Return windows whose class is the frequency of a sine in noise."""
    rng = np.random.default_rng(seed)
    y__n = rng.integers(0, 3, count)
    phase = rng.uniform(0, 6.28, (count, 1, 1)) + np.arange(20) * (0.4 + 0.5 * y__n[:, None, None])
    x__nct = np.sin(phase) + rng.normal(0, 0.3, (count, 2, 20))
    return x__nct.astype(np.float32), y__n


def network(seed: int = 0) -> onnx.ModelProto:
    """Return an untrained network for the data."""
    return conv1d_classifier(
        mean__c=np.zeros(2), scale__c=np.ones(2), samples=20, classes=3, widths=(4, 8), seed=seed
    )


def test_it_learns() -> None:
    """The loss falls, and windows that were never seen are told apart."""
    heard: list[tuple[int, float]] = []
    found = fit(
        network(),
        *data(240),
        config=CONFIG,
        progress=lambda epoch, loss: heard.append((epoch, loss)),
    )
    assert [epoch for epoch, _ in heard] == list(range(1, 13))
    assert tuple(loss for _, loss in heard) == found.losses
    assert found.losses[-1] < 0.6 * found.losses[0]
    held = data(120, seed=1)
    assert evaluate(found.model, *held).accuracy > 0.9 > evaluate(network(), *held).accuracy


def test_the_seed_decides_every_bit() -> None:
    """A run can be repeated: the same order and data make the same model."""
    config = FitConfig(epochs=2, batch_size=16)
    runs = [fit(network(), *data(50), config=config, seed=seed) for seed in (1, 1, 2)]
    first, again, other = (run.model.SerializeToString() for run in runs)
    assert first == again
    assert first != other


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_every_optimizer_learns(optimizer: Any) -> None:
    """Their state goes from step to step."""
    config = FitConfig(epochs=4, batch_size=16, learning_rate=0.02, optimizer=optimizer)
    losses = fit(network(), *data(240), config=config).losses
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("count", [1, 2, 17])
def test_a_tiny_set_is_enough(count: int) -> None:
    """Fewer windows than a batch, or one over, make a smaller batch."""
    found = fit(network(), *data(count), config=FitConfig(epochs=1, batch_size=16))
    assert np.isfinite(found.losses).all()


def test_the_given_model_is_left_alone() -> None:
    """Fitting returns another model."""
    model = network()
    before = model.SerializeToString()
    fit(model, *data(20), config=FitConfig(epochs=1))
    assert model.SerializeToString() == before


def test_running_statistics_are_part_of_the_fitted_model() -> None:
    """A batch normalisation answers with the data's mean, not the initial one."""
    names = {"s": 1.0, "b": 0.0, "mean": 0.0, "variance": 1.0}
    held = [numpy_helper.from_array(np.full(2, v, np.float32), n) for n, v in names.items()]
    held.append(numpy_helper.from_array(np.ones((40, 3), np.float32) / 40, "w"))
    graph = helper.make_graph(
        [
            helper.make_node("BatchNormalization", ["x", *names], ["n"], momentum=0.0),
            helper.make_node("Flatten", ["n"], ["f"]),
            helper.make_node("Gemm", ["f", "w"], ["logits"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 2, 20])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 3])],
        held,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    x__nct, y__n = data(30)
    config = FitConfig(epochs=1, batch_size=30, learning_rate=0.01)
    fitted = fit(model, x__nct + 4, y__n, config=config).model
    found = {each.name: numpy_helper.to_array(each) for each in fitted.graph.initializer}
    assert found["mean"] == pytest.approx((x__nct + 4).mean((0, 2)), abs=1e-4)
    assert found["variance"] == pytest.approx(x__nct.var((0, 2), ddof=1), rel=1e-3)


def test_evaluation_counts() -> None:
    """Confusion, accuracy and loss follow from the probabilities, from logits or not."""
    x__nct, y__n = data(50)
    found = evaluate(network(), x__nct, y__n, batch_size=16)
    answers = found.probabilities__nk.argmax(1)
    want = np.zeros((3, 3), np.int64)
    for truth, answer in zip(y__n, answers, strict=True):
        want[truth, answer] += 1
    assert found.confusion__kk.tolist() == want.tolist()
    assert (found.windows, found.correct) == (50, int((answers == y__n).sum()))
    assert found.accuracy == found.correct / 50
    assert found.loss_mean == pytest.approx(
        -np.log(found.probabilities__nk[np.arange(50), y__n]).mean(), rel=1e-5
    )
    other = evaluate(with_probabilities(network()).SerializeToString(), x__nct, y__n)
    assert other.probabilities__nk == pytest.approx(found.probabilities__nk, abs=1e-6)


def test_no_window_is_an_evaluation_of_nothing() -> None:
    """A device without test windows answers zero counts, not an error."""
    x__nct, y__n = data(0)
    found = evaluate(network(), x__nct, y__n)
    assert (found.windows, found.correct, found.accuracy, found.loss_mean) == (0, 0, 0.0, 0.0)


def broken(kind: str) -> Data:
    """Return data with one fault."""
    x__nct, y__n = data(10)
    if kind in ("nan", "inf"):
        x__nct[3, 1, 2] = float(kind)
    elif kind == "high":
        y__n[4] = 3
    elif kind == "low":
        y__n[4] = -1
    elif kind == "float64":
        return x__nct.astype(np.float64), y__n
    elif kind == "int32":
        return x__nct, y__n.astype(np.int32)
    elif kind == "short":
        return x__nct, y__n[:-1]
    elif kind == "flat":
        return x__nct[0], y__n
    elif kind == "empty":
        return x__nct[:0], y__n[:0]
    return x__nct, y__n


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nan", "NaN or infinity"), ("inf", "NaN or infinity"),
        ("high", r"labels must be 0 to 2, found 0\.\.3"),
        ("low", r"labels must be 0 to 2, found -1\.\.2"),
        ("float64", "must be float32"), ("int32", "must be int64"),
        ("short", r"must be int64 \(10"),
        ("flat", "must be float32"), ("empty", "no window to learn from"),
    ],
)  # fmt: skip
def test_bad_data_is_refused_before_the_first_step(kind: str, said: str) -> None:
    """With an error that says what is wrong; nothing is trained on it."""
    with pytest.raises(DatasetError, match=said):
        fit(network(), *broken(kind), config=CONFIG)


def test_a_rate_that_explodes_is_an_error_not_a_model() -> None:
    """A model of NaN must not leave training."""
    rng = np.random.default_rng(0)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["f"]),
            helper.make_node("Gemm", ["f", "v"], ["h"]),
            helper.make_node("Gemm", ["h", "w"], ["logits"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 2, 20])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 3])],
        [
            numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
            for name, shape in (("v", (40, 8)), ("w", (8, 3)))
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    x__nct, y__n = data(40)
    wild = FitConfig(epochs=50, learning_rate=99.0)
    with pytest.raises(LearningError, match="stopped being a number in epoch"):
        fit(model, x__nct * np.float32(1e6), y__n, config=wild)


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"threads": 0}],
)
def test_limits_of_the_config(wrong: dict[str, Any]) -> None:
    """A wrong setting is refused where it is written."""
    with pytest.raises(ValueError, match="must be"):
        FitConfig(**wrong)
