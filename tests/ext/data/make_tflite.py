"""Write the tiny .tflite models of tests/ext/test_litert.py; needs ai-edge-litert and numpy.

    python tests/ext/data/make_tflite.py

The same bytes at every run. The models are made here from nothing but this file, with LiteRT's
generated schema classes; no converter, no foreign model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flatbuffers  # type: ignore[import-untyped]
import numpy as np
from ai_edge_litert import schema_py_generated as schema  # type: ignore[import-untyped]

HERE = Path(__file__).parent
TYPES = schema.TensorType
OPS = schema.BuiltinOperator
Shape = tuple[int, ...]


class Graph:
    """One graph: tensors and operators are added in order, and named as given."""

    def __init__(self, model: Model, name: str) -> None:
        self.model = model
        self.made = schema.SubGraphT()
        self.made.name = name
        self.made.tensors, self.made.operators = [], []
        self.made.inputs, self.made.outputs = [], []

    def tensor(
        self,
        name: str,
        shape: Shape,
        kind: int = TYPES.FLOAT32,
        *,
        data: np.ndarray[Any, Any] | None = None,
        scale: list[float] | None = None,
        zero_point: list[int] | None = None,
        axis: int = 0,
        variable: bool = False,
    ) -> int:
        """Add a tensor and return its index; -1 in the shape is a free axis."""
        tensor = schema.TensorT()
        tensor.name, tensor.type, tensor.isVariable = name, kind, variable
        tensor.shape = [max(axis, 1) if axis < 0 else axis for axis in shape]
        tensor.hasRank = True
        if -1 in shape:
            tensor.shapeSignature = list(shape)
        if scale is not None:
            quantization = schema.QuantizationParametersT()
            quantization.scale = scale
            quantization.zeroPoint = zero_point or [0] * len(scale)
            quantization.quantizedDimension = axis
            tensor.quantization = quantization
        tensor.buffer = self.model.buffer(data)
        self.made.tensors.append(tensor)
        return len(self.made.tensors) - 1

    def add(
        self,
        code: int,
        inputs: list[int],
        outputs: list[int],
        options: Any = None,
        *,
        custom: str = "",
    ) -> None:
        """Add an operator."""
        operator = schema.OperatorT()
        operator.opcodeIndex = self.model.code(code, custom)
        operator.inputs, operator.outputs = inputs, outputs
        if options is not None:
            kind = type(options).__name__.removesuffix("T")
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            operator.builtinOptions = options
        self.made.operators.append(operator)


class Model:
    """One file."""

    def __init__(self) -> None:
        self.made = schema.ModelT()
        self.made.version, self.made.description = 3, "shoal test data"
        self.made.operatorCodes, self.made.subgraphs, self.made.signatureDefs = [], [], []
        self.made.buffers = [schema.BufferT()]  # the first is the empty one
        self.codes: dict[tuple[int, str], int] = {}

    def buffer(self, data: np.ndarray[Any, Any] | None) -> int:
        """Add the bytes of an array and return the index; 0 for none."""
        if data is None:
            return 0
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
        self.made.buffers.append(buffer)
        return len(self.made.buffers) - 1

    def code(self, code: int, custom: str) -> int:
        """Return the index of an operator's code."""
        if (code, custom) not in self.codes:
            entry = schema.OperatorCodeT()
            entry.builtinCode, entry.version = code, 1
            entry.deprecatedBuiltinCode = min(code, OPS.PLACEHOLDER_FOR_GREATER_OP_CODES)
            entry.customCode = custom or None
            if code in (OPS.CONV_2D, OPS.FULLY_CONNECTED):
                entry.version = 3 if code == OPS.CONV_2D else 4
            self.made.operatorCodes.append(entry)
            self.codes[code, custom] = len(self.codes)
        return self.codes[code, custom]

    def graph(self, name: str = "main") -> Graph:
        """Add a graph."""
        graph = Graph(self, name)
        self.made.subgraphs.append(graph.made)
        return graph

    def signature(
        self, key: str, graph: int, inputs: dict[str, int], outputs: dict[str, int]
    ) -> None:
        """Add a signature."""
        made = schema.SignatureDefT()
        made.signatureKey, made.subgraphIndex = key, graph
        made.inputs, made.outputs = [], []
        for rows, ports in ((made.inputs, inputs), (made.outputs, outputs)):
            for name, index in ports.items():
                row = schema.TensorMapT()
                row.name, row.tensorIndex = name, index
                rows.append(row)
        self.made.signatureDefs.append(made)

    def write(self, name: str) -> None:
        """Write the file."""
        builder = flatbuffers.Builder(1024)
        builder.Finish(self.made.Pack(builder), b"TFL3")
        (HERE / name).write_bytes(bytes(builder.Output()))


def conv_int8() -> None:
    """Convolution per channel, fully connected and softmax on int8: a small vision net."""
    rng = np.random.default_rng(1)
    model = Model()
    graph = model.graph()
    x = graph.tensor("x", (1, 16, 16, 3), TYPES.INT8, scale=[0.02], zero_point=[-3])
    scales = [0.01 + 0.001 * i for i in range(8)]
    kernel = graph.tensor(
        "kernel", (8, 3, 3, 3), TYPES.INT8, scale=scales, zero_point=[0] * 8,
        data=rng.integers(-127, 128, (8, 3, 3, 3)).astype(np.int8),
    )  # fmt: skip
    bias = graph.tensor(
        "bias", (8,), TYPES.INT32, scale=[0.02 * s for s in scales], zero_point=[0] * 8,
        data=rng.integers(-500, 500, 8).astype(np.int32),
    )  # fmt: skip
    hidden = graph.tensor("hidden", (1, 8, 8, 8), TYPES.INT8, scale=[0.05], zero_point=[-128])
    convolve = schema.Conv2DOptionsT()
    convolve.padding, convolve.strideW, convolve.strideH = schema.Padding.SAME, 2, 2
    convolve.dilationWFactor = convolve.dilationHFactor = 1
    convolve.fusedActivationFunction = schema.ActivationFunctionType.RELU
    graph.add(OPS.CONV_2D, [x, kernel, bias], [hidden], convolve)
    flat = graph.tensor("flat", (1, 512), TYPES.INT8, scale=[0.05], zero_point=[-128])
    shape = graph.tensor("shape", (2,), TYPES.INT32, data=np.array([1, 512], np.int32))
    graph.add(OPS.RESHAPE, [hidden, shape], [flat])
    weights = graph.tensor(
        "weights", (10, 512), TYPES.INT8, scale=[0.0002], zero_point=[0],
        data=rng.integers(-127, 128, (10, 512)).astype(np.int8),
    )  # fmt: skip
    offset = graph.tensor(
        "offset", (10,), TYPES.INT32, scale=[0.00001], zero_point=[0],
        data=rng.integers(-900, 900, 10).astype(np.int32),
    )  # fmt: skip
    logits = graph.tensor("logits", (1, 10), TYPES.INT8, scale=[0.05], zero_point=[5])
    graph.add(
        OPS.FULLY_CONNECTED, [flat, weights, offset], [logits], schema.FullyConnectedOptionsT()
    )
    scores = graph.tensor("scores", (1, 10), TYPES.INT8, scale=[1 / 256], zero_point=[-128])
    softmax = schema.SoftmaxOptionsT()
    softmax.beta = 1.0
    graph.add(OPS.SOFTMAX, [logits], [scores], softmax)
    graph.made.inputs, graph.made.outputs = [x], [scores]
    model.write("conv_int8.tflite")


def free_batch() -> None:
    """A float layer with a free batch axis, in a file with a signature."""
    rng = np.random.default_rng(2)
    model = Model()
    graph = model.graph()
    x = graph.tensor("serving_x", (-1, 4))
    weights = graph.tensor("w", (3, 4), data=rng.normal(size=(3, 4)).astype(np.float32))
    bias = graph.tensor("b", (3,), data=rng.normal(size=3).astype(np.float32))
    y = graph.tensor("serving_y", (-1, 3))
    graph.add(OPS.FULLY_CONNECTED, [x, weights, bias], [y], schema.FullyConnectedOptionsT())
    graph.made.inputs, graph.made.outputs = [x], [y]
    model.signature("serve", 0, {"x": x}, {"y": y})
    model.write("free_batch.tflite")


def two_signatures() -> None:
    """The sum and the product of two vectors, each a signature with its own graph."""
    model = Model()
    for index, (key, code, options) in enumerate(
        (("add", OPS.ADD, schema.AddOptionsT()), ("multiply", OPS.MUL, schema.MulOptionsT()))
    ):
        graph = model.graph(key)
        a = graph.tensor(f"{key}_a", (4,))
        b = graph.tensor(f"{key}_b", (4,))
        y = graph.tensor(f"{key}_y", (4,))
        graph.add(code, [a, b], [y], options)
        graph.made.inputs, graph.made.outputs = [a, b], [y]
        model.signature(key, index, {"left": a, "right": b}, {"result": y})
    model.write("two_signatures.tflite")


def counter() -> None:
    """A resource variable that adds up what comes: the state of a streaming model."""
    model = Model()
    graph, start = model.graph(), model.graph("start")
    handles = []
    for each in (graph, start):
        options = schema.VarHandleOptionsT()
        options.container, options.sharedName = "", "total"
        handle = each.tensor("handle", (), TYPES.RESOURCE)
        each.add(OPS.VAR_HANDLE, [], [handle], options)
        handles.append(handle)
    zero = start.tensor("zero", (1, 2), data=np.zeros((1, 2), np.float32))
    start.add(OPS.ASSIGN_VARIABLE, [handles[1], zero], [], schema.AssignVariableOptionsT())
    once = schema.CallOnceOptionsT()
    once.initSubgraphIndex = 1
    graph.made.operators.insert(0, graph.made.operators.pop())
    graph.add(OPS.CALL_ONCE, [], [], once)
    x = graph.tensor("x", (1, 2))
    before = graph.tensor("before", (1, 2))
    total = graph.tensor("total", (1, 2))
    graph.add(OPS.READ_VARIABLE, [handles[0]], [before], schema.ReadVariableOptionsT())
    graph.add(OPS.ADD, [before, x], [total], schema.AddOptionsT())
    graph.add(OPS.ASSIGN_VARIABLE, [handles[0], total], [], schema.AssignVariableOptionsT())
    graph.made.inputs, graph.made.outputs = [x], [total]
    model.write("counter.tflite")


def window() -> None:
    """The last three rows that came, kept in a variable: a streaming convolution's state."""
    model = Model()
    graph, start = model.graph(), model.graph("start")
    handles = []
    for each in (graph, start):
        options = schema.VarHandleOptionsT()
        options.container, options.sharedName = "", "rows"
        handle = each.tensor("handle", (), TYPES.RESOURCE)
        each.add(OPS.VAR_HANDLE, [], [handle], options)
        handles.append(handle)
    zero = start.tensor("zero", (1, 3, 2), TYPES.INT8, data=np.zeros((1, 3, 2), np.int8))
    start.add(OPS.ASSIGN_VARIABLE, [handles[1], zero], [], schema.AssignVariableOptionsT())
    once = schema.CallOnceOptionsT()
    once.initSubgraphIndex = 1
    graph.add(OPS.CALL_ONCE, [], [], once)
    x = graph.tensor("x", (1, 1, 2), TYPES.INT8)
    before = graph.tensor("before", (1, 3, 2), TYPES.INT8)
    longer = graph.tensor("longer", (1, 4, 2), TYPES.INT8)
    rows = graph.tensor("rows", (1, 3, 2), TYPES.INT8)
    graph.add(OPS.READ_VARIABLE, [handles[0]], [before], schema.ReadVariableOptionsT())
    join = schema.ConcatenationOptionsT()
    join.axis = 1
    graph.add(OPS.CONCATENATION, [before, x], [longer], join)
    bounds = [
        graph.tensor(name, (3,), TYPES.INT32, data=np.array(values, np.int32))
        for name, values in (("begin", [0, -3, 0]), ("end", [0, 0, 0]), ("step", [1, 1, 1]))
    ]
    cut = schema.StridedSliceOptionsT()
    cut.beginMask, cut.endMask = 0b101, 0b111
    graph.add(OPS.STRIDED_SLICE, [longer, *bounds], [rows], cut)
    graph.add(OPS.ASSIGN_VARIABLE, [handles[0], rows], [], schema.AssignVariableOptionsT())
    graph.made.inputs, graph.made.outputs = [x], [rows]
    model.write("window.tflite")


def kinds() -> None:
    """Every type that an input or output may have, passed through a reshape."""
    model = Model()
    graph = model.graph()
    shape = graph.tensor("shape", (2,), TYPES.INT32, data=np.array([3, 2], np.int32))
    for name in (
        "FLOAT32", "FLOAT16", "INT32", "UINT8", "INT64", "BOOL", "INT16", "INT8", "FLOAT64",
        "UINT64", "UINT32", "UINT16",
    ):  # fmt: skip
        a = graph.tensor(f"{name.lower()}_in", (2, 3), getattr(TYPES, name))
        b = graph.tensor(f"{name.lower()}_out", (3, 2), getattr(TYPES, name))
        graph.add(OPS.RESHAPE, [a, shape], [b])
        graph.made.inputs.append(a)
        graph.made.outputs.append(b)
    model.write("kinds.tflite")


def where() -> None:
    """An output whose shape depends on the values of the input."""
    model = Model()
    graph = model.graph()
    x = graph.tensor("x", (6,), TYPES.BOOL)
    y = graph.tensor("y", (-1, 1), TYPES.INT64)
    graph.add(OPS.WHERE, [x], [y], schema.WhereOptionsT())
    graph.made.inputs, graph.made.outputs = [x], [y]
    model.write("where.tflite")


def custom() -> None:
    """An operator that LiteRT does not have."""
    model = Model()
    graph = model.graph()
    x, y = graph.tensor("x", (2,)), graph.tensor("y", (2,))
    graph.add(OPS.CUSTOM, [x], [y], custom="ShoalNoSuchOperator")
    graph.made.inputs, graph.made.outputs = [x], [y]
    model.write("custom.tflite")


def strings() -> None:
    """A string input, which is not offered."""
    model = Model()
    graph = model.graph()
    x, y = graph.tensor("x", (2,), TYPES.STRING), graph.tensor("y", (1, 2), TYPES.STRING)
    shape = graph.tensor("shape", (2,), TYPES.INT32, data=np.array([1, 2], np.int32))
    graph.add(OPS.RESHAPE, [x, shape], [y])
    graph.made.inputs, graph.made.outputs = [x], [y]
    model.write("strings.tflite")


if __name__ == "__main__":
    for make in (
        conv_int8,
        free_batch,
        two_signatures,
        counter,
        window,
        kinds,
        where,
        custom,
        strings,
    ):
        make()
