"""The reader of ONNX models against the onnx package; properties and faults.

The invariant: whatever bytes come, the reader yields a Model or raises OnnxFormatError; and what
it yields is what the onnx package reads from the same bytes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from shoal.ext.errors import KernelError
from shoal.ext.onnx_graph import Graph, Model, OnnxFormatError, ReadLimits, Tensor, read_model

TYPES: dict[int, Any] = {
    1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64,
    9: np.bool_, 11: np.float64, 12: np.uint32, 13: np.uint64,
}  # fmt: skip


def tensor(rng: np.random.Generator, name: str) -> onnx.TensorProto:
    """Draw a tensor, raw or in typed fields."""
    kind = int(rng.choice(list(TYPES)))
    shape = rng.integers(0, 4, rng.integers(0, 4)).tolist()
    drawn = rng.integers(0, 2, shape) if kind == 9 else rng.normal(size=shape) * 50
    values = np.asarray(drawn).astype(np.int64).astype(TYPES[kind])
    if kind in (1, 11):
        values = np.asarray(drawn).astype(TYPES[kind])
    if rng.integers(2):
        return numpy_helper.from_array(values, name)
    return helper.make_tensor(name, kind, shape, values.ravel().tolist())


def attributes(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    """Draw attributes of every type."""
    every: dict[str, Any] = {
        "a": int(rng.integers(-5, 1 << 40)),
        "b": float(rng.normal()),
        "c": "text é",
        "d": rng.integers(-9, 9, 5).tolist(),
        "e": rng.normal(size=4).tolist(),
        "f": ["x", "y"],
        "g": tensor(rng, "t"),
        "h": [tensor(rng, "u"), tensor(rng, "v")],
    }
    if depth < 2:
        every["i"] = graph(rng, depth + 1)
        every["j"] = [graph(rng, depth + 1), graph(rng, depth + 1)]
    return {name: value for name, value in every.items() if rng.integers(3) == 0}


def graph(rng: np.random.Generator, depth: int = 0) -> onnx.GraphProto:
    """Draw a graph; it need not make sense."""
    nodes = [
        helper.make_node(
            f"Op{rng.integers(9)}",
            [f"v{each}" for each in rng.integers(0, 9, rng.integers(0, 4))],
            [f"o{depth}{i}"],
            name=f"n{i}",
            domain=str(rng.choice(["", "com.microsoft"])),
            **attributes(rng, depth),
        )
        for i in range(rng.integers(0, 5))
    ]
    dims = [[], ["batch", 3], [None, 7, "t"], [0], None]
    infos = [
        helper.make_tensor_value_info(f"x{i}", int(rng.choice(list(TYPES))), dims[i])
        for i in range(5)
    ]
    tensors = [tensor(rng, f"w{i}") for i in range(rng.integers(0, 6))]
    return helper.make_graph(nodes, f"g{depth}", infos[:3], infos[3:], tensors)


def model(seed: int) -> onnx.ModelProto:
    """Draw a model by seed."""
    rng = np.random.default_rng(seed)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph(rng), opset_imports=opsets, doc_string="text")


def same_tensor(got: Tensor, want: onnx.TensorProto) -> None:
    """Compare a tensor, its elements bit by bit if they can be read."""
    assert (got.name, got.type, got.dims) == (want.name, want.data_type, tuple(want.dims))
    assert got.external == (want.data_location != 0 or bool(want.external_data))
    if got.external or got.type not in TYPES:
        return
    try:
        values = got.values()
    except OnnxFormatError:
        return  # not as many elements as its dims say: compared by the tests of tensors
    array = numpy_helper.to_array(want)
    assert values.tobytes() == array.astype(array.dtype.newbyteorder("="), order="C").tobytes()


def same_graph(got: Graph, want: onnx.GraphProto) -> None:
    """Compare all that the reader gives."""
    assert got.name == want.name
    for ours, theirs in ((got.inputs, want.input), (got.outputs, want.output)):
        assert [each.name for each in ours] == [each.name for each in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            dense = other.type.HasField("tensor_type")
            assert mine.type == (other.type.tensor_type.elem_type if dense else 0)
            if not dense or not other.type.tensor_type.HasField("shape"):
                assert mine.shape is None
                continue
            dims = [
                getattr(dim, dim.WhichOneof("value")) if dim.WhichOneof("value") else None
                for dim in other.type.tensor_type.shape.dim
            ]
            dims = [None if isinstance(dim, int) and dim < 0 else dim for dim in dims]
            assert mine.shape == tuple(dims)
    assert list(got.initializers) == [each.name for each in want.initializer]
    for tensor_, other_ in zip(got.initializers.values(), want.initializer, strict=True):
        same_tensor(tensor_, other_)
    assert len(got.nodes) == len(want.node)
    for node, proto in zip(got.nodes, want.node, strict=True):
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        assert (node.op, node.domain, node.name) == (proto.op_type, domain, proto.name)
        assert (node.inputs, node.outputs) == (tuple(proto.input), tuple(proto.output))
        assert list(node.attributes) == [each.name for each in proto.attribute]
        for value, attribute in zip(node.attributes.values(), proto.attribute, strict=True):
            same_value(value, attribute)


def same_value(got: object, want: onnx.AttributeProto) -> None:
    """Compare an attribute with the field that its type names."""
    fields = {1: "f", 2: "i", 3: "s", 4: "t", 5: "g", 6: "floats", 7: "ints", 8: "strings",
              9: "tensors", 10: "graphs"}  # fmt: skip
    if want.type not in fields:
        assert got is None
        return
    value = getattr(want, fields[want.type])
    if want.type in (4, 5) and not want.HasField(fields[want.type]):
        assert got is None
    elif isinstance(got, Tensor):
        same_tensor(got, value)
    elif isinstance(got, Graph):
        same_graph(got, value)
    elif want.type in (9, 10):
        assert isinstance(got, tuple) and len(got) == len(value)
        for mine, other in zip(got, value, strict=True):
            same_tensor(mine, other) if want.type == 9 else same_graph(mine, other)
    elif want.type in (6, 7, 8):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(tuple(value)))
    else:
        np.testing.assert_equal(got, value)  # NaN equals NaN


def same(got: Model, want: onnx.ModelProto) -> None:
    """Compare a model."""
    assert got.ir_version == want.ir_version
    assert got.functions == len(want.functions)
    known = {("" if each.domain == "ai.onnx" else each.domain) for each in want.opset_import}
    assert set(got.opsets) == known
    same_graph(got.graph, want.graph)


@pytest.mark.parametrize("block", range(4))
def test_models_read_as_the_onnx_package_reads_them(block: int) -> None:
    """Every type of attribute, tensor and shape, graphs within graphs."""
    for seed in range(block * 20, block * 20 + 20):
        want = model(seed)
        got = read_model(want.SerializeToString())
        same(got, want)
        assert got.opsets == {"": 17, "com.microsoft": 1}


def test_mutations_are_refused_or_read_alike() -> None:
    """600 models with some bytes changed, cut out or doubled; where both read, they agree."""
    rng = np.random.default_rng(0)
    read = 0
    small = [data for seed in range(200) if len(data := model(seed).SerializeToString()) < 1500]
    for i in range(600):
        data = bytearray(small[i % len(small)])
        for _ in range(rng.integers(1, 4)):
            at, kind = int(rng.integers(len(data))), rng.integers(4)
            if kind == 0:
                data[at] = rng.integers(256)
            elif kind == 1:
                data[at] ^= 1 << int(rng.integers(8))
            elif kind == 2:
                del data[at : at + int(rng.integers(1, 9))]
            else:
                data[at:at] = data[at : at + int(rng.integers(1, 9))]
            if not data:
                break
        try:
            got = read_model(bytes(data))
        except OnnxFormatError:
            continue
        try:
            want = onnx.ModelProto.FromString(bytes(data))
        except DecodeError:  # broken where this reader does not look
            continue
        read += 1
        same(got, want)
    assert read > 30


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused_or_read(data: bytes) -> None:
    """No other error, whatever comes."""
    try:
        found = read_model(data)
    except OnnxFormatError:
        return
    assert isinstance(found, Model)


@pytest.mark.parametrize("seed", [3, 8, 21])
def test_a_cut_model_is_refused_or_read_as_protobuf_does(seed: int) -> None:
    """At every byte: a cut between two fields of the outermost message is a valid model."""
    data = model(seed).SerializeToString()
    for size in range(0, len(data), max(len(data) // 400, 1)):
        try:
            got = read_model(data[:size])
        except OnnxFormatError:
            continue
        same(got, onnx.ModelProto.FromString(data[:size]))


# ---- external data ------------------------------------------------------------------------------


def away(name: str, location: str) -> onnx.TensorProto:
    """A tensor whose elements are in another file."""
    made = TensorProto(name=name, data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
    made.external_data.add(key="location", value=location)
    return made


def test_external_data_is_found_wherever_it_stands() -> None:
    """In initializers, attributes, graphs within graphs, sparse tensors, functions, training."""
    inner = helper.make_graph([], "inner", [], [], [away("w", "graph")])
    nodes = [
        helper.make_node("A", [], ["a"], value=away("t", "attribute")),
        helper.make_node("B", [], ["b"], body=inner),
        helper.make_node("C", [], ["c"], values=[away("u", "list")]),
    ]
    outer = helper.make_graph(nodes, "outer", [], [], [away("w", "../secret")])
    outer.sparse_initializer.add().values.CopyFrom(away("s", "sparse"))
    made = helper.make_model(outer)
    function = helper.make_function("d", "F", [], [], nodes[:1], [])
    function.node[0].attribute[0].t.external_data[0].value = "function"
    made.functions.append(function)
    made.training_info.add().algorithm.initializer.append(away("w", "training"))
    sparse = made.graph.node.add(op_type="D").attribute.add(name="s", type=11)
    sparse.sparse_tensor.indices.CopyFrom(away("i", "indices"))
    found = read_model(made.SerializeToString())
    assert sorted(found.external) == sorted(
        ["graph", "attribute", "list", "../secret", "sparse", "function", "training", "indices"]
    )
    assert found.graph.initializers["w"].location == "../secret"
    assert found.graph.sparse == ("s",)
    with pytest.raises(OnnxFormatError):
        found.graph.initializers["w"].values()


def test_two_graphs_in_one_model_are_refused() -> None:
    """Protobuf merges them: a reader that took the last would overlook the first's files."""
    first = helper.make_model(helper.make_graph([], "g", [], [], [away("w", "secret")]))
    second = helper.make_model(helper.make_graph([], "g", [], []))
    data = first.SerializeToString() + second.SerializeToString()
    assert onnx.ModelProto.FromString(data).graph.initializer
    with pytest.raises(OnnxFormatError, match="twice"):
        read_model(data)


# ---- bounds -------------------------------------------------------------------------------------


def field(number: int, body: bytes) -> bytes:
    """A field of bytes on the wire."""
    size, out = len(body), bytearray()
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    return bytes((number << 3 | 2,)) + bytes(out) + bytes((size,)) + body


def test_nesting_is_bounded() -> None:
    """A graph within a graph within … ends at the limit, not at Python's."""
    body = b""
    for _ in range(1200):
        body = field(1, field(5, b"\xa0\x01\x05" + field(6, body)))
    with pytest.raises(OnnxFormatError, match="nested more than 16"):
        read_model(field(7, body))


def test_every_bound_is_kept() -> None:
    """Size, fields, numbers, axes."""
    data = model(5).SerializeToString()
    with pytest.raises(OnnxFormatError, match="larger than 10"):
        read_model(data, ReadLimits(bytes_max=10))
    with pytest.raises(OnnxFormatError, match="more than 20 fields"):
        read_model(data, ReadLimits(fields_max=20))
    many = helper.make_node("A", [], ["a"], n=list(range(100)))
    data = helper.make_model(helper.make_graph([many], "g", [], [])).SerializeToString()
    with pytest.raises(OnnxFormatError, match="too many numbers"):
        read_model(data, ReadLimits(values_max=99))
    read_model(data, ReadLimits(values_max=100))
    with pytest.raises(OnnxFormatError, match="dims"):
        read_model(field(7, field(5, field(1, b"\x01" * 65))))
    with pytest.raises(OnnxFormatError, match="dims"):
        read_model(field(7, field(5, b"\x08" + b"\xff" * 9 + b"\x01")))
    with pytest.raises(ValueError, match="limit"):
        ReadLimits(depth_max=0)


def test_a_length_beyond_the_bytes_allocates_nothing() -> None:
    """65 bytes that claim 2^60 elements are read at once, and refused when they are asked for."""
    huge = TensorProto(name="w", data_type=1, dims=[1 << 30, 1 << 30], raw_data=b"1234")
    typed = TensorProto(name="t", data_type=1, dims=[1 << 40], float_data=[1.0])
    made = helper.make_model(helper.make_graph([], "g", [], [], [huge, typed]))
    found = read_model(made.SerializeToString()).graph.initializers
    assert found["w"].count == 1 << 60
    for each in found.values():
        with pytest.raises(OnnxFormatError):
            each.values()


def test_the_work_grows_with_the_bytes() -> None:
    """A hundred thousand empty fields, names or unpacked numbers take seconds at most."""
    began = time.process_time()
    for body in (
        b"\x0a\x00" * 100_000,  # nodes
        b"".join(field(11, field(1, b"%d" % i)) for i in range(50_000)),
        field(1, field(5, b"\x40\x01" * 100_000 + b"\xa0\x01\x07")),
        field(5, b"".join(b"\x25" + bytes(4) for _ in range(100_000))),
    ):
        read_model(field(7, body))
    assert time.process_time() - began < 60  # quadratic work would take an hour


def test_a_number_beyond_its_type_is_refused() -> None:
    """An int8 tensor that says 300."""
    made = TensorProto(name="w", data_type=3, dims=[1], int32_data=[300])
    data = helper.make_model(helper.make_graph([], "g", [], [], [made])).SerializeToString()
    with pytest.raises(OnnxFormatError, match="beyond its type"):
        read_model(data).graph.initializers["w"].values()
    assert issubclass(OnnxFormatError, KernelError)


def test_views_of_the_bytes_are_not_copies() -> None:
    """Weights of 100 MB are not taken twice."""
    weights = np.arange(1000, dtype=np.float32)
    info = [numpy_helper.from_array(weights, "w")]
    data = helper.make_model(helper.make_graph([], "g", [], [], info)).SerializeToString()
    source = bytearray(data)
    raw = read_model(source).graph.initializers["w"].raw
    assert raw is not None and raw.readonly and raw.obj is source
    with pytest.raises(TypeError):
        read_model(memoryview(data)[::2])


def test_nothing_heavy_is_imported() -> None:
    """The agent reads models without numpy, onnx or protobuf."""
    code = (
        "import sys, shoal.ext.onnx_graph, shoal.ext.micro; "
        "print({'numpy', 'onnx', 'google.protobuf', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
