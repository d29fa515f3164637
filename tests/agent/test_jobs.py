"""Vectors and faults of the child's jobs, called in this process: arithmetic against numpy."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shoal.agent import jobs
from shoal.agent.errors import ModelFormatError, NoLabelsError
from shoal.proto.bundle import Manifest, pack
from shoal.server.learning.autodiff import training_graph

C, T, K = 2, 4, 3
RNG = np.random.default_rng(5)
X__nct = RNG.normal(size=(37, C, T)).astype(np.float32)
Y__n = RNG.integers(0, K, 37)
WEIGHT = RNG.normal(size=(C * T, K)).astype(np.float32)
BIAS = RNG.normal(size=K).astype(np.float32)
PARAMETERS = np.concatenate([WEIGHT.ravel(), BIAS])


def linear(*, probabilities: bool) -> onnx.ModelProto:
    """Return softmax regression on flattened windows."""
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits"]),
    ]
    if probabilities:
        nodes.append(helper.make_node("Softmax", ["logits"], ["p"], axis=1))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", C, T])],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ["batch", K])],
        [numpy_helper.from_array(WEIGHT, "weight"), numpy_helper.from_array(BIAS, "bias")],
    )
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def softmax(x__nct: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any]) -> NDArray[Any]:
    """Return the probabilities in float64."""
    logits = x__nct.reshape(len(x__nct), -1).astype(np.float64) @ weight + bias
    power = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(power / power.sum(1, keepdims=True))


def write(folder: Path, *, training: bytes | None = None) -> dict[str, Any]:
    """Write bundle, parameters and windows; return the arguments that name them."""
    if training is None:
        graph = training_graph(
            linear(probabilities=False), trainable=["weight", "bias"], proximal=True
        )
        training = graph.SerializeToString()
    golden = io.BytesIO()
    np.savez(golden, x=X__nct[:4], p=softmax(X__nct[:4], WEIGHT, BIAS).astype(np.float32))
    parts = {
        "model.onnx": linear(probabilities=True).SerializeToString(),
        "golden.npz": golden.getvalue(),
        "profile.json": b"{}",
    }
    if training:
        parts["training.onnx"] = training
    manifest = Manifest(
        name="linear", model="model.onnx", input="x", output="p", channels=("a", "b"),
        classes=("k", "l", "m"), samples=T,
    )  # fmt: skip
    data = pack(manifest, parts)
    (folder / "bundle").write_bytes(data)
    (folder / "parameters").write_bytes(PARAMETERS.astype("<f4").tobytes())
    np.savez(folder / "windows.npz", x__nct=X__nct, y__n=Y__n)
    return {
        "bundle": str(folder / "bundle"),
        "sha256": hashlib.sha256(data).hexdigest(),
        "parameters": str(folder / "parameters"),
        "windows": str(folder / "windows.npz"),
    }


HOW: dict[str, Any] = {
    "epochs": 3, "batch_size": 8, "learning_rate": 0.2, "proximal_mu": 0.0, "clip_norm": 0.0,
    "seed": 11,
}  # fmt: skip


def reference(*, mu: float) -> NDArray[np.float64]:
    """Return the delta that numpy finds in float64 with the same shuffles."""
    weight, bias = WEIGHT.astype(np.float64), BIAS.astype(np.float64)
    rng = np.random.default_rng(HOW["seed"])
    for _ in range(HOW["epochs"]):
        order = rng.permutation(len(Y__n))
        for start in range(0, len(order), HOW["batch_size"]):
            rows = order[start : start + HOW["batch_size"]]
            error = softmax(X__nct[rows], weight, bias)
            error[np.arange(len(rows)), Y__n[rows]] -= 1
            error /= len(rows)
            flat = X__nct[rows].reshape(len(rows), -1)
            step_weight = flat.T @ error + mu * (weight - WEIGHT)
            step_bias = error.sum(0) + mu * (bias - BIAS)
            weight = weight - HOW["learning_rate"] * step_weight
            bias = bias - HOW["learning_rate"] * step_bias
    return np.concatenate([(weight - WEIGHT).ravel(), bias - BIAS])


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_the_delta_is_that_of_plain_sgd(tmp_path: Path, mu: float) -> None:
    """Batches, shuffles, the short last batch and FedProx: within float32 of numpy's float64."""
    found = jobs.train(**write(tmp_path), **HOW | {"proximal_mu": mu})
    delta = np.frombuffer(found["delta"], "<f4")
    np.testing.assert_allclose(delta, reference(mu=mu), atol=2e-6)
    assert found["windows"] == 37 and found["loss_last"] < found["loss_first"]


def test_the_same_task_gives_the_same_delta(tmp_path: Path) -> None:
    """A task that is done again after a crash changes nothing; another seed does."""
    where = write(tmp_path)
    first, again, other = (jobs.train(**where, **HOW | {"seed": s})["delta"] for s in (1, 1, 2))
    assert first == again != other


def test_the_delta_is_clipped(tmp_path: Path) -> None:
    """The L2 norm is at most the bound, and the direction stays."""
    where = write(tmp_path)
    free = np.frombuffer(jobs.train(**where, **HOW)["delta"], "<f4")
    bound = float(np.linalg.norm(free)) / 3
    tight = np.frombuffer(jobs.train(**where, **HOW | {"clip_norm": bound})["delta"], "<f4")
    assert np.linalg.norm(tight) == pytest.approx(bound, rel=1e-5)
    np.testing.assert_allclose(tight, free / 3, rtol=1e-4, atol=1e-8)


def test_evaluation_counts_what_numpy_counts(tmp_path: Path) -> None:
    """Top-1, cross-entropy and the confusion table."""
    where = write(tmp_path)
    (score,) = jobs.evaluate(
        bundles=[[where["bundle"], where["sha256"]]], windows=where["windows"]
    )["scores"]
    p = softmax(X__nct, WEIGHT, BIAS)
    assert score["windows"] == 37 and score["correct"] == int((p.argmax(1) == Y__n).sum())
    assert score["loss_sum"] == pytest.approx(-np.log(p[np.arange(37), Y__n]).sum(), rel=1e-5)
    table = np.zeros((K, K), int)
    for truth, answer in zip(Y__n, p.argmax(1), strict=True):
        table[truth, answer] += 1
    assert score["confusion"] == table.ravel().tolist()


def test_labels_and_windows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """No windows, a class too many, another shape, another dtype: typed, nothing is run."""
    where = write(tmp_path)
    wrong: list[tuple[Any, Any, type[Exception]]] = [
        (X__nct[:0], Y__n[:0], NoLabelsError),
        (X__nct, Y__n + 1, jobs.LabelError),
        (X__nct, Y__n - 1, jobs.LabelError),
        (X__nct[:, :1], Y__n, jobs.LabelError),
        (X__nct.astype(np.float64), Y__n, jobs.LabelError),
        (X__nct, Y__n.astype(np.int32), jobs.LabelError),
    ]
    for number, (x__nct, y__n, error) in enumerate(wrong):
        where["windows"] = str(tmp_path / f"{number}.npz")
        np.savez(where["windows"], x__nct=x__nct, y__n=y__n)
        with pytest.raises(error):
            jobs.train(**where, **HOW)
        with pytest.raises(error):
            jobs.evaluate(bundles=[[where["bundle"], where["sha256"]]], windows=where["windows"])


@pytest.mark.parametrize(
    "data",
    [
        PARAMETERS[:-1].tobytes(), PARAMETERS.tobytes() + b"1234", b"",
        np.where(np.arange(len(PARAMETERS)) == 3, np.nan, PARAMETERS).astype("<f4").tobytes(),
    ],
    ids=["short", "long", "empty", "nan"],
)  # fmt: skip
def test_parameters_that_do_not_fit_are_refused(tmp_path: Path, data: bytes) -> None:
    """They come from the network: length and finiteness are checked."""
    where = write(tmp_path)
    (tmp_path / "parameters").write_bytes(data)
    with pytest.raises(jobs.ParametersError):
        jobs.train(**where, **HOW)


def test_divergence_is_an_error(tmp_path: Path) -> None:
    """A step size that explodes gives no delta of NaN."""
    loud = tmp_path / "loud.npz"
    where = write(tmp_path)
    np.savez(loud, x__nct=X__nct * np.float32(1e18), y__n=Y__n)
    with pytest.raises(jobs.DivergedError):
        jobs.train(**where | {"windows": str(loud)}, **HOW | {"learning_rate": 1e20})


def test_a_bundle_without_a_usable_training_graph_is_refused(tmp_path: Path) -> None:
    """No graph, no description, a wrong description, optimizer state, no proximal term."""
    model = linear(probabilities=False)
    adam = training_graph(model, trainable=["weight", "bias"], optimizer="adam")
    plain = training_graph(model, trainable=["weight", "bias"])
    mute = onnx.ModelProto()
    mute.CopyFrom(plain)
    del mute.metadata_props[:]
    liar = onnx.ModelProto()
    liar.CopyFrom(plain)
    liar.metadata_props[0].value = liar.metadata_props[0].value.replace('"weight"', '"weigh"')
    cases: list[tuple[bytes, dict[str, Any], type[Exception]]] = [
        (b"", {}, jobs.NotTrainableError),
        (mute.SerializeToString(), {}, jobs.NotTrainableError),
        (liar.SerializeToString(), {}, jobs.NotTrainableError),
        (adam.SerializeToString(), {}, jobs.NotTrainableError),
        (plain.SerializeToString(), {"proximal_mu": 0.1}, jobs.NotTrainableError),
        (b"garbage", {}, ModelFormatError),
    ]
    for training, how, error in cases:
        where = write(tmp_path, training=training)
        with pytest.raises(error):
            jobs.train(**where, **HOW | how)
    jobs.train(**write(tmp_path, training=plain.SerializeToString()), **HOW)
