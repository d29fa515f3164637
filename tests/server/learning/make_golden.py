"""Make the golden training runs in ``golden/``: torch trains, and exports the network it trained.

Not a test, and no test needs torch. To make the files again, in an environment of its own with
torch 2.13, onnx and onnxscript:

    python tests/server/learning/make_golden.py tests/server/learning/golden

Each file holds ``model`` (the untrained network, bytes of an ONNX file as torch exports it),
``x__sbi`` (int8, inputs in units of 1/32), ``y__sb``, ``w__sb``, ``lr``, ``optimizer``, the
``loss__s`` before each step, and ``after.<name>``: parameters and statistics after the last.

S steps, B batch, I the shape of one input.
"""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch  # type: ignore[import-not-found]  # only its maker has it
from torch import nn

STEPS, BATCH, CLASSES = 10, 8, 5


def mlp() -> nn.Module:
    """Three linear layers."""
    return nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, CLASSES)
    )


def conv1d() -> nn.Module:
    """Two 1-D convolutions with group normalisation: the shape of the smartwatch network."""
    return nn.Sequential(
        nn.Conv1d(3, 8, 5, padding=2), nn.GroupNorm(4, 8), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(8, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, CLASSES),
    )  # fmt: skip


def conv2d() -> nn.Module:
    """Strided and overlapping windows, batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1), nn.Conv2d(8, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


def depthwise() -> nn.Module:
    """A block of a mobile network: depthwise, pointwise, ReLU6.

    No bias in front of a batch normalisation: its gradient is 0, and Adam walks along the rounding.
    """
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 12, 1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, CLASSES),
    )  # fmt: skip


CASES: dict[str, tuple[Any, tuple[int, ...], str, float]] = {
    "mlp_sgd": (mlp, (12,), "sgd", 0.1),
    "mlp_adam": (mlp, (12,), "adam", 0.01),
    "conv1d_sgd": (conv1d, (3, 20), "sgd", 0.1),
    "conv1d_momentum": (conv1d, (3, 20), "momentum", 0.05),
    "conv2d_sgd": (conv2d, (1, 9, 9), "sgd", 0.1),
    "conv2d_momentum": (conv2d, (1, 9, 9), "momentum", 0.05),
    "depthwise_sgd": (depthwise, (2, 8, 8), "sgd", 0.1),
    "depthwise_adam": (depthwise, (2, 8, 8), "adam", 0.01),
}


def exported(network: nn.Module, shape: tuple[int, ...]) -> bytes:
    """Return the network as an ONNX file, its batch free and nothing folded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network.eval(), (torch.zeros(2, *shape),), dynamo=True, optimize=False,
            input_names=["x"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.functions):
        del part.metadata_props[:]  # paths of the machine that exported
    for node in model.graph.node:
        node.doc_string = ""
    out = io.BytesIO()
    onnx.save(model, out)
    return out.getvalue()


def run(name: str) -> dict[str, Any]:
    """Train one case and return what its file holds."""
    make, shape, optimizer, lr = CASES[name]
    torch.manual_seed(len(name))
    torch.set_num_threads(1)
    network = make()
    for value in network.parameters():  # the exporter merges equal initializers, silently
        value.data += 0.01 * torch.randn_like(value)
    for value in network.buffers():
        if value.is_floating_point():
            value.data += 0.01 * torch.rand_like(value)
    rng = np.random.default_rng(1)
    x = np.clip(np.round(rng.normal(0, 32, (STEPS, BATCH, *shape))), -127, 127).astype(np.int8)
    y = rng.integers(0, CLASSES, (STEPS, BATCH))
    w = rng.integers(1, 4, (STEPS, BATCH)).astype(np.float32)
    found: dict[str, Any] = {
        "model": np.frombuffer(exported(network, shape), np.uint8),
        "x__sbi": x, "y__sb": y, "w__sb": w, "lr": np.float32(lr), "optimizer": optimizer,
    }  # fmt: skip
    network.train()
    kinds: dict[str, Any] = {
        "sgd": lambda p: torch.optim.SGD(p, lr),
        "momentum": lambda p: torch.optim.SGD(p, lr, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr),
    }
    stepper = kinds[optimizer](network.parameters())
    losses = []
    for step in range(STEPS):
        stepper.zero_grad()
        rows = nn.functional.cross_entropy(
            network(torch.tensor(x[step].astype(np.float32) / 32)),
            torch.tensor(y[step]), reduction="none",
        )  # fmt: skip
        weights = torch.tensor(w[step])
        loss = (rows * weights).sum() / weights.sum()
        loss.backward()
        stepper.step()
        losses.append(loss.item())
    found["loss__s"] = np.array(losses)
    for label, value in network.state_dict().items():
        if value.is_floating_point():
            found[f"after.{label}"] = value.numpy()
    return found


if __name__ == "__main__":
    for case in CASES:
        np.savez_compressed(Path(sys.argv[1]) / f"{case}.npz", **run(case))
