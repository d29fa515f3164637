"""A CNN made of a fixed seed, what ONNX Runtime answers to it, and what an engine does."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.ext.call import Call

Noise = list[NDArray[np.float32]]
SHAPE = (1, 3, 64, 64)


def make_cnn() -> bytes:
    """Return three convolutions, a pool and a linear layer: (1, 3, 64, 64) to (1, 10), float."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    constants: list[Any] = []
    nodes: list[Any] = []

    def constant(name: str, values: NDArray[Any]) -> str:
        constants.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    value = "x"
    for index, (fan, width, stride) in enumerate(((3, 16, 2), (16, 32, 2), (32, 32, 1))):
        weights = random.standard_normal((width, fan, 3, 3)) * np.sqrt(2 / (9 * fan))
        inputs = [
            value,
            constant(f"w{index}", weights),
            constant(f"b{index}", random.standard_normal(width) * 0.1),
        ]
        nodes += [
            helper.make_node(
                "Conv",
                inputs,
                [f"c{index}"],
                f"conv{index}",
                pads=[1] * 4,
                strides=[stride] * 2,
                kernel_shape=[3, 3],
            ),
            helper.make_node("Relu", [f"c{index}"], [f"r{index}"], f"relu{index}"),
        ]
        value = f"r{index}"
    linear = constant("w", random.standard_normal((32, 10)))
    nodes += [
        helper.make_node("GlobalAveragePool", [value], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", linear], ["y"], "linear"),
    ]
    graph = helper.make_graph(
        nodes,
        "cnn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 10))],
        constants,
    )
    opsets = [helper.make_opsetid("", 17)]
    made: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return made


def reference(model: bytes, inputs: Noise) -> NDArray[np.float32]:
    """Return what ONNX Runtime's CPU kernels answer: (inputs, 10)."""
    import onnxruntime as ort

    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": each})[0] for each in inputs])


def run(engine: Any, inputs: Noise) -> NDArray[np.float32]:
    """Return the answers of an engine: (inputs, 10)."""
    return np.concatenate([ask(engine, each) for each in inputs])


def ask(engine: Any, array: NDArray[Any]) -> NDArray[Any]:
    """Return the first output of an engine for its only input."""
    ((name, _, _),) = engine.inputs
    return next(iter(Call(engine).infer({name: array}).values()))
