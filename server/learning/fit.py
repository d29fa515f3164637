"""Fit a network to labelled windows with plain onnxruntime, and evaluate it.

One session runs every step; parameters go out and in as arrays, which costs a few microseconds.

N windows, C channels, T samples, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from .autodiff import Optimizer, training_facts, training_graph
from .errors import DatasetError, LearningError
from .networks import parameters, trainable_names, with_parameters
from .prepare import arrays

Progress = Callable[[int, float], None]
"""Hears the finished epoch (from 1) and its mean loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    """How to fit."""

    epochs: int = 40
    """Passes over the data."""
    batch_size: int = 32
    """Windows per step."""
    learning_rate: float = 0.15
    """Of the first epoch; falls to 0 along half a cosine (Loshchilov, Hutter 2017)."""
    optimizer: Optimizer = "sgd"
    threads: int = 1
    """Threads of one step."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 1 <= self.epochs <= 100_000 or not 1 <= self.batch_size <= 1 << 20:
            raise ValueError("epochs must be 1 to 100000, batch_size 1 to 2**20")
        if not 0 < self.learning_rate < 100 or self.threads < 1:
            raise ValueError("learning_rate must be in (0, 100), threads at least 1")


@dataclass(frozen=True, slots=True, eq=False)
class FitResult:
    """A fitted model."""

    model: onnx.ModelProto
    losses: tuple[float, ...]
    """Mean loss of each epoch, nats."""


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What a model answered to labelled windows."""

    windows: int
    correct: int
    confusion__kk: NDArray[np.int64]
    """True class × predicted class."""
    loss_mean: float
    """Cross-entropy, nats."""
    probabilities__nk: NDArray[np.float32]

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 when there was no window."""
        return self.correct / self.windows if self.windows else 0.0


def fit(
    model: onnx.ModelProto,
    x__nct: NDArray[np.float32],
    y__n: NDArray[np.int64],
    *,
    config: FitConfig,
    seed: int = 0,
    progress: Progress | None = None,
) -> FitResult:
    """Train every trainable initializer of a classifier by cross-entropy.

    Args:
        model: Inference graph with logits, as :mod:`.networks` makes them.
        x__nct: Windows, float32 (N, C, T), finite.
        y__n: Classes, int64 (N,).
        config: How.
        seed: Of the order of windows; the same seed and data give the same bits on one machine.
        progress: Hears each epoch.

    Raises:
        DatasetError: Shapes do not fit, a value is not finite, a label is no class, no window.
        LearningError: The loss stopped being a number.
    """
    check_windows(x__nct, y__n, classes=_classes(model))
    graph = training_graph(model, trainable=trainable_names(model), optimizer=config.optimizer)
    facts = training_facts(graph)
    session = _session(graph, threads=config.threads)
    held = arrays(model.graph)
    kept = [each["input"] for each in facts["state"] if each["kind"] == "statistics"]
    values: dict[str, NDArray[Any]] = {name: held[name] for name in (*parameters(model), *kept)}
    values |= {
        each["input"]: np.zeros(each["shape"], np.float32)
        for each in facts["state"]
        if each["kind"] == "optimizer"
    }
    links = [(each["input"], each["output"]) for each in (*facts["params"], *facts["state"])]
    outputs = [output for _, output in links] + [facts["loss"]]
    rng = np.random.default_rng(seed)
    losses = []
    for epoch in range(config.epochs):
        rate = config.learning_rate * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
        total = 0.0
        order = rng.permutation(len(y__n))
        for start in range(0, len(order), config.batch_size):
            rows = order[start : start + config.batch_size]
            batch = {
                facts["x"]: x__nct[rows],
                facts["y"]: y__n[rows],
                facts["w"]: np.ones(len(rows), np.float32),
                facts["lr"]: np.array(rate, np.float32),
            }
            found = session.run(outputs, values | batch)
            values = {name: value for (name, _), value in zip(links, found, strict=False)}
            total += float(found[-1]) * len(rows)
        losses.append(total / len(order))
        if not math.isfinite(losses[-1]):
            raise LearningError(
                f"the loss stopped being a number in epoch {epoch + 1}",
                hint="use a smaller learning rate, or look for wild values in the data",
            )
        if progress is not None:
            progress(epoch + 1, losses[-1])
    trained = {name: values[name] for name in (*trainable_names(model), *kept)}
    return FitResult(with_parameters(model, trained), tuple(losses))


def evaluate(
    model: onnx.ModelProto | bytes,
    x__nct: NDArray[np.float32],
    y__n: NDArray[np.int64],
    *,
    batch_size: int = 256,
    threads: int = 1,
) -> Evaluation:
    """Return how a classifier answers labelled windows.

    Args:
        model: Graph whose one output is logits or probabilities, (batch, K).
        x__nct: Windows, float32 (N, C, T).
        y__n: Classes, int64 (N,).
        batch_size: Windows per call, bounds memory.
        threads: Threads of one call.

    Raises:
        DatasetError: As for :func:`fit`.
    """
    session = _session(model, threads=threads)
    output = session.get_outputs()[0]
    check_windows(x__nct, y__n, classes=int(output.shape[1]), empty=True)
    name = session.get_inputs()[0].name
    parts = [
        session.run([output.name], {name: x__nct[start : start + batch_size]})[0]
        for start in range(0, len(y__n), batch_size)
    ]
    classes = int(output.shape[1])
    scores = np.concatenate(parts) if parts else np.zeros((0, classes), np.float32)
    if output.name == "logits":
        shifted = np.exp(scores - scores.max(1, keepdims=True, initial=-np.inf))
        scores = shifted / shifted.sum(1, keepdims=True)
    answers = scores.argmax(1) if len(scores) else np.zeros(0, np.int64)
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (y__n, answers), 1)
    chosen = scores[np.arange(len(y__n)), y__n]
    loss = float(-np.log(np.maximum(chosen, 1e-12)).mean()) if len(y__n) else 0.0
    return Evaluation(len(y__n), int(confusion.trace()), confusion, loss, scores)


def check_windows(
    x__nct: NDArray[np.float32], y__n: NDArray[np.int64], *, classes: int, empty: bool = False
) -> None:
    """Raise DatasetError unless windows and labels fit each other and a classifier."""
    if x__nct.ndim != 3 or x__nct.dtype != np.float32:
        raise DatasetError(f"windows must be float32 (N, C, T), not {x__nct.dtype} {x__nct.shape}")
    if y__n.shape != x__nct.shape[:1] or y__n.dtype != np.int64:
        raise DatasetError(f"labels must be int64 ({len(x__nct)},), not {y__n.dtype} {y__n.shape}")
    if not len(y__n):
        if empty:
            return
        raise DatasetError("there is no window to learn from")
    if not np.isfinite(x__nct).all():
        raise DatasetError("the windows hold NaN or infinity", hint="clean or drop those windows")
    if y__n.min() < 0 or y__n.max() >= classes:
        raise DatasetError(f"labels must be 0 to {classes - 1}, found {y__n.min()}..{y__n.max()}")


def _classes(model: onnx.ModelProto) -> int:
    return int(model.graph.output[0].type.tensor_type.shape.dim[1].dim_value)


def _session(model: onnx.ModelProto | bytes, *, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
