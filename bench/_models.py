"""Models that benchmarks run: small networks of sensors, made here, and real ones if fetched."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from shoal.server.learning.networks import conv1d_classifier
from shoal.server.learning.quantize import quantize_int8

CACHE = Path(__file__).parent.parent / ".models"  # `make models`


def relu() -> bytes:
    """Return a model of one operator."""
    return _model([helper.make_node("Relu", ["x"], ["y"])], [], width=32, classes=32)


def mlp(*sizes: int) -> bytes:
    """Return a float32 multi-layer perceptron with Relu and a Softmax."""
    rng = np.random.default_rng(0)
    nodes, weights, at = [], [], "x"
    for i, (a, b) in enumerate(pairwise(sizes)):
        scale = np.float32(1 / np.sqrt(a))
        weights.append(_weights(f"w{i}", rng.normal(size=(a, b)).astype(np.float32) * scale))
        weights.append(_weights(f"b{i}", rng.normal(size=b).astype(np.float32)))
        nodes.append(helper.make_node("Gemm", [at, f"w{i}", f"b{i}"], [f"g{i}"]))
        at = f"g{i}"
        if i < len(sizes) - 2:
            nodes.append(helper.make_node("Relu", [at], [f"r{i}"]))
            at = f"r{i}"
    nodes.append(helper.make_node("Softmax", [at], ["y"], axis=1))
    return _model(nodes, weights, width=sizes[0], classes=sizes[-1])


class _Normals(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    def __init__(self, width: int) -> None:
        rng = np.random.default_rng(1)
        self._left: Iterator[dict[str, Any]] = iter(
            [{"x": rng.normal(size=(1, width)).astype(np.float32)} for _ in range(64)]
        )

    def get_next(self) -> dict[str, Any] | None:
        """Return the next input, as quantize_static asks for it."""
        return next(self._left, None)


def int8(model: bytes, width: int) -> bytes:
    """Return a model in int8 QDQ, 7-bit weights (docs/adr/0005)."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "f.onnx", Path(folder) / "q.onnx"
        source.write_bytes(model)
        quantize_static(
            source,
            target,
            _Normals(width),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
        return target.read_bytes()


def classifier(*, quantized: bool) -> bytes:
    """Return the network that the fleet server trains for windows of 6 channels, 100 samples."""
    rng = np.random.default_rng(0)
    net = conv1d_classifier(
        mean__c=np.zeros(6), scale__c=np.ones(6), samples=100, classes=7, seed=0
    )
    if quantized:
        net = quantize_int8(net, rng.normal(size=(300, 6, 100)).astype(np.float32))
    data: bytes = net.SerializeToString()
    return data


def real(name: str) -> bytes | None:
    """Return a fetched model, None if `make models` was not run."""
    path = CACHE / name
    return path.read_bytes() if path.exists() else None


def _weights(name: str, values: NDArray[np.float32]) -> onnx.TensorProto:
    return numpy_helper.from_array(values, name)


def _model(nodes: list[Any], weights: list[Any], *, width: int, classes: int) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, classes])],
        weights,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    data: bytes = made.SerializeToString()
    return data
