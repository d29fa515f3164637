"""Make bundles: train a float model, quantize it, and pack it with all that a device needs.

    data set --train--> source (float model + windows) --build_bundle--> bundle
                          source + other parameters ----build_bundle--> candidate

The same source makes the same bundle, to the byte: a step that a crash interrupted is done again
and registers nothing twice.

Not here: processes (``worker``), the database (``training``), the parts of the work itself.

P parameters, N windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from ...proto.bundle import Manifest, pack
from ..drift import profile
from .autodiff import training_graph
from .config import ProfileConfig
from .dataset import TRAIN, VALIDATION, Dataset, Source, npz
from .errors import DatasetError, LearningError
from .fit import FitConfig, evaluate, fit
from .networks import (
    INPUT,
    PROBABILITIES,
    conv1d_classifier,
    parameters,
    trainable_names,
    with_parameters,
)
from .quantize import QuantizeConfig, quantize_int8

GOLDEN: Final = 16  # windows: enough to see a wrong kernel, 40 KB of a bundle

Told = Callable[[dict[str, Any]], None]
"""Hears the progress, as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """How models are made."""

    fit: FitConfig = field(default_factory=FitConfig)
    """Of the float model."""
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    """Of the int8 model."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Of the reference profile."""


def train(data: Dataset, *, epochs: int, seed: int, config: PipelineConfig, told: Told) -> Source:
    """Return the source of a model that is trained on the training windows alone.

    Args:
        data: The data set.
        epochs: Passes; 0 = the configured number.
        seed: Of the weights and the order.
        config: How.
        told: Hears ``epoch``, ``epochs``, ``loss`` after each epoch.

    Raises:
        DatasetError: A channel does not vary.
        ProfileError: The reference profile would have too many groups or bytes; nothing was
            trained yet.
        LearningError: The loss stopped being a number.
    """
    x__nct, y__n = data.of(TRAIN)
    scale__c = x__nct.std((0, 2))
    if not (scale__c > 0).all():
        flat = data.channels[int(scale__c.argmin())]
        raise DatasetError(f"channel {flat} never changes in the training windows")
    kept = (data.split__n == TRAIN) | (data.split__n == VALIDATION)
    part = replace(
        data,
        x__nct=data.x__nct[kept],
        y__n=data.y__n[kept],
        split__n=data.split__n[kept],
        group__n=data.group__n[kept],
    )
    # Its size depends on the data and hardly on the answers. That it does not fit is thus known
    # before an hour of training, for the time of one to five epochs.
    answers__nk = np.linspace(0, 1, len(part.y__n), dtype=np.float32)[:, None]
    _reference(part, answers__nk, config.profile).to_json()
    model = conv1d_classifier(
        mean__c=x__nct.mean((0, 2)),
        scale__c=scale__c,
        samples=x__nct.shape[2],
        classes=len(data.classes),
        seed=seed,
    )
    used = config.fit
    how = FitConfig(
        epochs=epochs or used.epochs,
        batch_size=used.batch_size,
        learning_rate=used.learning_rate,
        optimizer=used.optimizer,
        threads=used.threads,
    )

    def progress(epoch: int, loss: float) -> None:
        told({"epoch": epoch, "epochs": how.epochs, "loss": round(loss, 6)})

    found = fit(model, x__nct, y__n, config=how, seed=seed, progress=progress)
    return Source(found.model, part)


def build_bundle(
    source: Source, *, name: str, facts: Mapping[str, str], config: PipelineConfig
) -> tuple[bytes, dict[str, Any]]:
    """Return (bundle, figures) of a source.

    The profile's confidence and accuracy are those of the int8 model on the validation windows;
    golden vectors are its answers to some of them.

    Args:
        source: The float model and its windows.
        name: Of the model.
        facts: Lineage for people, kept in the manifest.
        config: How.

    Returns:
        The bytes, and ``accuracy_float``, ``accuracy_int8`` (shares, validation windows),
        ``windows`` (of validation), ``bytes`` (of the bundle).

    Raises:
        LearningError: The model cannot be quantized or trained further.
        ProfileError: The reference profile has too many groups or bytes.
    """
    data, model = source.dataset, source.model
    held__n = data.split__n == VALIDATION
    int8 = quantize_int8(model, data.x__nct[~held__n], config=config.quantize, probabilities=True)
    answers = evaluate(int8, data.x__nct, data.y__n).probabilities__nk
    correct__n = answers.argmax(1) == data.y__n
    rows = np.flatnonzero(held__n)
    rows = rows[np.linspace(0, len(rows) - 1, min(GOLDEN, len(rows))).astype(int)]
    golden = {INPUT: data.x__nct[rows], PROBABILITIES: _one_by_one(int8, data, rows)}
    graph = training_graph(model, trainable=trainable_names(model), proximal=True)
    manifest = Manifest(
        name=name,
        model="model.onnx",
        input=INPUT,
        output=PROBABILITIES,
        channels=data.channels,
        classes=data.classes,
        samples=data.x__nct.shape[2],
        facts=dict(facts),
    )
    parts = {
        "model.onnx": int8.SerializeToString(deterministic=True),
        "golden.npz": npz(golden),
        "profile.json": _reference(data, answers, config.profile).to_json(),
        "training.onnx": graph.SerializeToString(deterministic=True),
    }
    bundle = pack(manifest, parts)
    float_ = evaluate(model, *data.of(VALIDATION))
    figures = {
        "accuracy_float": round(float_.accuracy, 6),
        "accuracy_int8": round(float(correct__n[held__n].mean()), 6),
        "windows": int(held__n.sum()),
        "bytes": len(bundle),
    }
    return bundle, figures


def vector(model: onnx.ModelProto) -> bytes:
    """Return the parameters as a vector: float32 little-endian, in the training graph's order."""
    return b"".join(value.astype("<f4").tobytes() for value in parameters(model).values())


def with_vector(model: onnx.ModelProto, data: bytes) -> onnx.ModelProto:
    """Return the model with the parameters of a vector.

    Raises:
        LearningError: The vector has another length, or is not finite.
    """
    old = parameters(model)
    new__p = np.frombuffer(data, "<f4").astype(np.float32)
    if len(new__p) != sum(value.size for value in old.values()) or not np.isfinite(new__p).all():
        raise LearningError(f"{len(data)} bytes are not the parameters of the model")
    pieces = np.split(new__p, np.cumsum([value.size for value in old.values()])[:-1])
    return with_parameters(
        model,
        {name: piece.reshape(old[name].shape) for name, piece in zip(old, pieces, strict=True)},
    )


def _reference(
    data: Dataset, answers__nk: NDArray[np.float32], config: ProfileConfig
) -> profile.ReferenceProfile:
    """Return the reference profile of training and validation windows and a model's answers."""
    predicted__n = answers__nk.argmax(1)
    return profile.build(
        data.x__nct,
        answers__nk.max(1),
        predicted__n == data.y__n,
        data.group__n,
        data.split__n == VALIDATION,
        channels=data.channels,
        bins=config.bins,
        kinds=data.kinds,
        predicted__n=predicted__n,
        classes=len(data.classes),
        projected=config.projected,
    )


def _one_by_one(
    model: onnx.ModelProto, data: Dataset, rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return answers to single windows, as a device will ask."""
    found = evaluate(model, data.x__nct[rows], data.y__n[rows], batch_size=1)
    return found.probabilities__nk
