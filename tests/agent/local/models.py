"""Make small ONNX models, and requests for them, for the tests of the local API."""

from __future__ import annotations

import struct
from typing import Any

import onnx
from onnx import TensorProto, helper

from shoal.agent.local.oip import InferInput, InferRequest, InferResponse, WantedOutput

FLOAT = TensorProto.FLOAT


def model(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: Any = ()) -> bytes:
    """Return a model; inputs and outputs are (name, type, shape)."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        list(constants),
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    data: bytes = made.SerializeToString()
    return data


def adder(amount: float = 1.0) -> bytes:
    """Return a model: y = x + amount, x of (free, 3)."""
    return model(
        [helper.make_node("Add", ["x", "c"], ["y"])],
        [("x", FLOAT, ["n", 3])],
        [("y", FLOAT, ["n", 3])],
        [helper.make_tensor("c", FLOAT, [1], [amount])],
    )


def pack(*values: float) -> bytes:
    """Return floats as the bytes of a tensor."""
    return struct.pack(f"<{len(values)}f", *values)


def unpack(data: bytes | memoryview | None) -> list[float]:
    """Return the floats of a tensor."""
    assert data is not None
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def ask(
    *values: float,
    name: str = "m",
    version: str = "",
    outputs: tuple[WantedOutput, ...] = (),
    **parameters: Any,
) -> InferRequest:
    """Return a request for ``adder``; values in rows of three."""
    shape = (len(values) // 3, 3)
    x = InferInput("x", "FP32", shape, pack(*values), None)
    return InferRequest(name, version, (x,), outputs, parameters)


def said(response: InferResponse | Any) -> list[float]:
    """Return the floats of a response's only output."""
    assert isinstance(response, InferResponse), response
    (output,) = response.outputs
    return unpack(output.data)
