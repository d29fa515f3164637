"""Calls: every type of tensor, arrays and bytes, lanes and threads. Vectors and properties."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort_python
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from shoal.ext import ort
from shoal.ext._pyengine import PyEngine
from shoal.ext.call import TYPES, Call, Tap, bin_of_ns, from_raw, to_raw
from shoal.proto import latency


def model(nodes: list[Any], inputs: list[Any], outputs: list[Any], *, opset: int = 21) -> bytes:
    """Return a model's bytes."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    data: bytes = made.SerializeToString()
    return data


def identity(kind: int, shape: list[Any]) -> bytes:
    """Return a model that gives what it gets."""
    return model([helper.make_node("Identity", ["x"], ["y"])], [("x", kind, shape)],
                 [("y", kind, shape)])  # fmt: skip


NUMBERS = {
    TensorProto.FLOAT: np.float32,
    TensorProto.DOUBLE: np.float64,
    TensorProto.FLOAT16: np.float16,
    TensorProto.INT8: np.int8,
    TensorProto.UINT8: np.uint8,
    TensorProto.INT16: np.int16,
    TensorProto.UINT16: np.uint16,
    TensorProto.INT32: np.int32,
    TensorProto.UINT32: np.uint32,
    TensorProto.INT64: np.int64,
    TensorProto.UINT64: np.uint64,
    TensorProto.BOOL: np.bool_,
    TensorProto.BFLOAT16: np.uint16,
}


@pytest.mark.parametrize("kind", NUMBERS, ids=[TYPES[k][0] for k in NUMBERS])
@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (3, 5), (2, 0, 4), (1, 1, 2, 3), (300, 300)], ids=str
)
@pytest.mark.parametrize("free", [False, True], ids=["fixed", "free"])
def test_every_number_goes_through_whole(kind: int, shape: tuple[int, ...], free: bool) -> None:
    """Bits come back as they went, for fixed and free axes, small (lane) and large (bound)."""
    call = Call(ort.load(identity(kind, [None] * len(shape) if free else list(shape))))
    rng = np.random.default_rng(0)
    count = int(np.prod(shape))
    if NUMBERS[kind] is np.bool_:
        x = (rng.integers(0, 2, count) > 0).reshape(shape)
    else:
        size = np.dtype(NUMBERS[kind]).itemsize
        x = np.frombuffer(rng.bytes(count * size), NUMBERS[kind]).reshape(shape)
    y = call.infer({"x": x})["y"]
    assert y.dtype == x.dtype and y.shape == x.shape and y.tobytes() == x.tobytes()
    raw = call.infer_raw({"x": (shape, x.tobytes())})
    assert raw == {"y": (shape, x.tobytes())}
    into = np.zeros_like(x)
    call.infer_into({"x": x}, {"y": into})
    assert into.tobytes() == x.tobytes()
    call.close()


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4])
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_four_bit_numbers(kind: int, count: int) -> None:
    """One value per element outside, two in a byte inside; what does not fit is refused."""
    scale = helper.make_node("Constant", [], ["s"], value_float=1.0)
    low, high, dtype = (-8, 8, np.int8) if kind == TensorProto.INT4 else (0, 16, np.uint8)
    x = np.random.default_rng(0).integers(low, high, count).astype(dtype)
    _, packed = to_raw(kind, x)
    assert from_raw(kind, (count,), packed).tolist() == x.tolist()
    widen = Call(ort.load(model(
        [scale, helper.make_node("DequantizeLinear", ["x", "s"], ["y"])],
        [("x", kind, [count])], [("y", TensorProto.FLOAT, [count])],
    )))  # fmt: skip
    assert widen.infer({"x": x})["y"].tolist() == x.tolist()
    raw = widen.infer_raw({"x": ((count,), packed)})["y"][1]
    assert np.frombuffer(raw, np.float32).tolist() == x.tolist()
    narrow = Call(ort.load(model(
        [scale, helper.make_node("QuantizeLinear", ["x", "s"], ["y"], output_dtype=kind)],
        [("x", TensorProto.FLOAT, [count])], [("y", kind, [count])],
    )))  # fmt: skip
    y = narrow.infer({"x": x.astype(np.float32)})["y"]
    assert y.dtype == dtype and y.tolist() == x.tolist()
    x[0] = high
    with pytest.raises(ValueError, match="4-bit input"):
        widen.infer({"x": x})


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8")), max_size=6))
def test_text(words: list[str]) -> None:
    """Text of any length goes in and comes out, also as bytes with lengths."""
    call = Call(TEXT)
    x = np.array([*words, ""], object)[: len(words)]
    y = call.infer({"x": x})["y"]
    assert y.dtype == object and y.tolist() == words
    raw = to_raw(8, x)
    assert call.infer_raw({"x": raw})["y"] == raw


TEXT = ort.load(identity(TensorProto.STRING, [None]))


@given(st.binary(max_size=40), st.integers(0, 4))
def test_hostile_text_bytes(data: bytes, count: int) -> None:
    """Whatever bytes come as text, they are strings of exactly that length or refused."""
    call = Call(TEXT)
    try:
        shape, back = call.infer_raw({"x": ((count,), data)})["y"]
    except ValueError as exc:
        assert "string" in str(exc)
    else:
        assert (shape, back) == ((count,), data)


def test_text_that_c_cannot_hold_is_refused() -> None:
    """A NUL would end the string early, silently."""
    with pytest.raises(ValueError, match="NUL"):
        Call(TEXT).infer({"x": np.array(["a\0b"], object)})


@pytest.mark.parametrize(
    ("given_inputs", "said"),
    [
        ({"x": ((2, 3), bytes(20))}, "takes 24 bytes, not 20"),
        ({"x": ((2,), bytes(24))}, "must have shape"),
        ({"x": ((-1, 3), bytes(24))}, "must have shape"),
        ({"y": ((2, 3), bytes(24))}, "takes the inputs"),
        ({}, "takes the inputs"),
        ({"x": ((1 << 30, 3), b"")}, "bytes, not 0"),
        ({"x": ((1 << 70, 3), b"")}, "must have shape"),
        ({"x": ((2.0, 3), bytes(24))}, "must have shape"),
    ],
)
def test_wrong_bytes_are_refused(given_inputs: dict[str, Any], said: str) -> None:
    """Sizes are checked against the shape before anything is read."""
    call = Call(ort.load(identity(TensorProto.FLOAT, [None, 3])))
    with pytest.raises(ValueError, match=said):
        call.infer_raw(given_inputs)
    with pytest.raises(ValueError, match="has the outputs"):
        call.infer_raw({"x": ((2, 3), bytes(24))}, ["z"])


@pytest.mark.parametrize(
    ("y", "said"),
    [
        (np.zeros((2, 3), np.float64), "must be float32"),
        (np.zeros((3, 3), np.float32), "came with shape"),
        (np.zeros((2, 4), np.float32), "must have shape"),
        (np.zeros((3, 2), np.float32).T, "C-contiguous"),
        ([0.0], "numpy array"),
    ],
)
def test_wrong_output_arrays_are_refused(y: Any, said: str) -> None:
    """infer_into never casts, never writes beside an array."""
    call = Call(ort.load(identity(TensorProto.FLOAT, [None, 3])))
    with pytest.raises(ValueError, match=said):
        call.infer_into({"x": np.ones((2, 3), np.float32)}, {"y": y})
    frozen = np.zeros((2, 3), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        call.infer_into({"x": np.ones((2, 3), np.float32)}, {"y": frozen})


def test_byte_order_and_alignment_are_refused() -> None:
    """Memory that the engine would misread is refused."""
    call = Call(ort.load(identity(TensorProto.FLOAT, [3])))
    with pytest.raises(ValueError, match="not >f4"):
        call.infer({"x": np.ones(3, ">f4")})
    odd = np.frombuffer(bytes(13), np.uint8)[1:].view(np.float32)
    with pytest.raises(ValueError, match="aligned"):
        call.infer({"x": odd})


@pytest.mark.parametrize("raw_kind", [np.uint8, np.int8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_step_converts(raw_kind: Any, channels: int) -> None:
    """Value = raw * scale + bias per channel, in float32, as NumPy computes it."""
    numbers = {np.uint8: 2, np.int8: 3, np.uint16: 4, np.int16: 5, np.float32: 1}
    rng = np.random.default_rng(1)
    scale = rng.normal(size=channels).astype(np.float32)
    bias = rng.normal(size=channels).astype(np.float32)
    call = Call(
        ort.load(identity(TensorProto.FLOAT, [None, 3, 7])),
        prepare={"x": (numbers[raw_kind], 1, scale.tolist(), bias.tolist())},
    )
    x: NDArray[Any] = (rng.normal(size=(2, 3, 7)) * 50).astype(raw_kind)
    want = x.astype(np.float32) * scale[None, :, None] + bias[None, :, None]
    np.testing.assert_allclose(call.infer({"x": x})["y"], want, rtol=2e-6, atol=1e-5)
    raw = call.infer_raw({"x": ((2, 3, 7), x.tobytes())})["y"][1]
    np.testing.assert_allclose(
        np.frombuffer(raw, np.float32).reshape(2, 3, 7), want, rtol=2e-6, atol=1e-5
    )
    if raw_kind is not np.float32:
        with pytest.raises(ValueError, match="must be"):
            call.infer({"x": x.astype(np.float32)})


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_nan_of_any_float_can_be_refused(kind: int) -> None:
    """Half-size floats are floats."""
    strict = Call(ort.load(identity(kind, [3])), nan_refused=True)
    if kind == TensorProto.BFLOAT16:
        good, bad = np.array([0x3F80] * 3, np.uint16), np.array([0x3F80, 0x7FC0, 0], np.uint16)
    else:
        dtype = np.float16 if kind == TensorProto.FLOAT16 else np.float64
        good, bad = np.ones(3, dtype), np.array([1, np.inf, 0], dtype)
    assert strict.infer({"x": good})["y"].tobytes() == good.tobytes()
    with pytest.raises(ValueError, match="NaN or an infinity"):
        strict.infer({"x": bad})


@pytest.mark.parametrize("given_inputs", [None, [1], 3, "x"])
def test_what_is_no_mapping_is_refused(given_inputs: Any) -> None:
    """With the error that says what was expected."""
    call = Call(ort.load(identity(TensorProto.FLOAT, [3])))
    with pytest.raises(ValueError, match=r"takes a mapping|takes the inputs"):
        call.infer(given_inputs)


def test_large_answers_are_not_kept() -> None:
    """What the engine placed for one call is free after it."""
    data = model(
        [helper.make_node("ConstantOfShape", ["s"], ["y"])],
        [("s", TensorProto.INT64, [1])],
        [("y", TensorProto.FLOAT, [None])],
    )
    call = Call(ort.load(data))

    def rss() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    call.infer({"s": np.array([10], np.int64)})
    before = rss()
    assert call.infer({"s": np.array([50_000_000], np.int64)})["y"].nbytes == 200_000_000
    assert rss() - before < 100_000_000


@pytest.mark.parametrize("size", [3, 100_000])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_can_be_refused(size: int, bad: float) -> None:
    """By default a model sees NaN; asked to, the runtime refuses it, in a lane or bound."""
    data = identity(TensorProto.FLOAT, [None])
    x = np.ones(size, np.float32)
    x[-1] = bad
    assert np.array_equal(Call(ort.load(data)).infer({"x": x})["y"], x, equal_nan=True)
    strict = Call(ort.load(data), nan_refused=True)
    with pytest.raises(ValueError, match="NaN or an infinity"):
        strict.infer({"x": x})
    assert strict.counters()[0] == 0
    strict.infer({"x": np.ones(size, np.float32)})


def test_many_tensors_and_shapes_that_change() -> None:
    """More inputs than fit on the stack; a lane is made anew when free axes change."""
    names = [f"x{i}" for i in range(20)]
    data = model(
        [helper.make_node("Sum", names, ["y"])],
        [(name, TensorProto.FLOAT, [None]) for name in names],
        [("y", TensorProto.FLOAT, [None])],
    )
    call = Call(ort.load(data))
    for size in (1, 5, 5, 2, 0, 9, 100_000, 3):
        inputs = {name: np.full(size, i, np.float32) for i, name in enumerate(names)}
        assert call.infer(inputs)["y"].tolist() == [190.0] * size
        raw = call.infer_raw({name: (x.shape, x.tobytes()) for name, x in inputs.items()})
        assert np.frombuffer(raw["y"][1], np.float32).tolist() == [190.0] * size


def test_answers_outlive_the_call_and_the_model() -> None:
    """What infer returned is the caller's: later calls and close leave it alone."""
    for size in (4, 50_000):
        call = Call(ort.load(identity(TensorProto.FLOAT, [None])))
        first = call.infer({"x": np.full(size, 1, np.float32)})["y"]
        call.infer({"x": np.full(size, 2, np.float32)})
        call.close()
        assert (first == 1).all() and call.closed
        with pytest.raises(RuntimeError, match="is closed"):
            call.infer({"x": np.full(size, 1, np.float32)})
        with pytest.raises(RuntimeError, match="is closed"):
            call.infer_raw({"x": ((1,), bytes(4))})
        call.close()


def test_threads_share_a_model_and_one_closes_it() -> None:
    """Every answer belongs to its call; a close in the middle is an error or an answer."""
    call = Call(ort.load(identity(TensorProto.FLOAT, [None])))
    wrong: list[Any] = []

    def work(number: int) -> None:
        for size in range(1, 2000):
            x = np.full(size % 7 + 1, number * 10_000 + size, np.float32)
            try:
                if call.infer({"x": x})["y"].tolist() != x.tolist():
                    wrong.append(size)
            except RuntimeError:
                return

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    threads[0].join(0.05)
    call.close()
    for thread in threads:
        thread.join()
    assert not wrong


class Seen:
    """A monitor that notes what it saw."""

    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, Any], dict[str, Any], int]] = []

    def observe(self, inputs: Any, outputs: Any, latency_ns: int) -> None:
        """Note one call."""
        self.calls.append((dict(inputs), dict(outputs), latency_ns))


def test_a_monitor_sees_arrays_whatever_came() -> None:
    """Bytes are shown to a Python monitor as arrays."""
    seen = Seen()
    call = Call(ort.load(identity(TensorProto.FLOAT, [2])), monitor=seen)
    x = np.array([1, 2], np.float32)
    call.infer({"x": x})
    call.infer_raw({"x": ((2,), x.tobytes())})
    assert [each[0]["x"].tolist() for each in seen.calls] == [[1, 2]] * 2
    assert [each[1]["y"].tolist() for each in seen.calls] == [[1, 2]] * 2
    assert all(each[2] > 0 for each in seen.calls)


def test_engine_failures_are_counted_and_leave_the_model_usable() -> None:
    """ORT's own words are in the error."""
    data = model(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        [("x", TensorProto.FLOAT, [None]), ("s", TensorProto.INT64, [2])],
        [("y", TensorProto.FLOAT, [None, None])],
    )
    call = Call(ort.load(data))
    good: dict[str, NDArray[Any]] = {"x": np.ones(6, np.float32), "s": np.array([2, 3], np.int64)}
    assert call.infer(good)["y"].shape == (2, 3)
    with pytest.raises(RuntimeError, match=r"Reshape|reshape"):
        call.infer({**good, "s": np.array([4, 3], np.int64)})
    assert call.infer(good)["y"].shape == (2, 3)
    calls, errors, bins = call.counters()
    assert (calls, errors, sum(bins)) == (2, 1, 2)


def test_an_input_of_no_rank_is_refused_and_an_output_of_none_works() -> None:
    """A tensor without a shape is not a scalar."""
    node = [helper.make_node("Relu", ["x"], ["y"])]
    with pytest.raises(ort.OrtError, match="input x has no shape"):
        ort.load(model(node, [("x", TensorProto.FLOAT, None)], [("y", TensorProto.FLOAT, [2])]))
    call = Call(
        ort.load(model(
            [helper.make_node("Reshape", ["x", "s"], ["y"])],
            [("x", TensorProto.FLOAT, [6]), ("s", TensorProto.INT64, [None])],
            [("y", TensorProto.FLOAT, None)],
        ))
    )  # fmt: skip
    x = np.arange(6, dtype=np.float32)
    for shape in ((6,), (2, 3), (1, 2, 3)):
        assert call.infer({"x": x, "s": np.array(shape, np.int64)})["y"].shape == shape


@pytest.mark.parametrize("kind", ["sequence", "sparse_inside", "external"])
def test_what_the_engine_cannot_offer_is_refused(kind: str) -> None:
    """A sequence, and weights in another file, are refused by name."""
    if kind == "sequence":
        info = helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [None])
        graph = helper.make_graph(
            [helper.make_node("SequenceLength", ["x"], ["y"])],
            "g", [info], [helper.make_tensor_value_info("y", TensorProto.INT64, [])],
        )  # fmt: skip
        data = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
        ).SerializeToString()
        with pytest.raises(ort.OrtError, match="x is a sequence"):
            ort.load(data)
    elif kind == "external":
        weights = helper.make_tensor("w", TensorProto.FLOAT, [1], bytes(4), raw=True)
        onnx.external_data_helper.set_external_data(weights, "../secret.bin")
        weights.ClearField("raw_data")
        graph = helper.make_graph(
            [helper.make_node("Add", ["x", "w"], ["y"])], "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])], [weights],
        )  # fmt: skip
        data = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
        ).SerializeToString()
        with pytest.raises(ort.OrtError, match=r"other files \(\.\./secret\.bin\)"):
            ort.load(data)
    else:
        with pytest.raises(ort.OrtError):
            ort.load(model([helper.make_node("NoSuchOp", ["x"], ["y"])],
                           [("x", 1, [1])], [("y", 1, [1])]))  # fmt: skip


def test_an_engine_behind_python() -> None:
    """Shapes that only the result knows, and errors of the function."""

    def call(arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
        if arrays[0].size == 4:
            raise RuntimeError("four")
        return [np.repeat(arrays[0], 2)]

    engine = PyEngine("toy", "1", (("x", 1, (-1,)),), (("y", 1, (-1,)),), call)
    made = Call(engine)
    assert made.infer({"x": np.array([1, 2], np.float32)})["y"].tolist() == [1, 1, 2, 2]
    assert made.infer({"x": np.zeros(100_000, np.float32)})["y"].shape == (200_000,)
    with pytest.raises(RuntimeError, match="RuntimeError: four"):
        made.infer({"x": np.zeros(4, np.float32)})
    assert made.infer({"x": np.array([3], np.float32)})["y"].tolist() == [3, 3]


def test_the_python_module_is_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library the answers are the same, and the backend says so."""

    def missing() -> str:
        raise ort.OrtMissingError("no library")

    monkeypatch.setattr(ort, "library", missing)
    data = identity(TensorProto.FLOAT, [None, 3])
    engine = ort.load(data)
    assert engine.backend == "ort-python" and engine.version == ort_python.__version__
    x = np.ones((2, 3), np.float32)
    assert Call(engine).infer({"x": x})["y"].tolist() == x.tolist()


@given(st.integers(0, 10**13))
def test_latency_bins_are_those_of_the_records(latency_ns: int) -> None:
    """The step's histogram adds to the fleet's: same edges to the bit."""
    assert bin_of_ns(latency_ns) == latency.bin_of(latency_ns / 1000)


def test_taps_that_do_nothing_cost_nothing() -> None:
    """The base class may be used as it is."""
    call = Call(ort.load(identity(TensorProto.FLOAT, [2])), monitor=Tap())
    call.infer({"x": np.ones(2, np.float32)})
    assert len(call.time_ns({"x": np.ones(2, np.float32)}, 5)) == 5


def test_bytes_need_no_numpy() -> None:
    """A server of small models runs without NumPy, gRPC or onnxruntime's Python module."""
    code = (
        "import sys\n"
        "from shoal.agent.runtime import Runtime\n"
        f"data = {identity(TensorProto.FLOAT, [1, 2])!r}\n"
        "with Runtime() as runtime:\n"
        "    model = runtime.load(data)\n"
        "    assert model.infer_raw({'x': ((1, 2), bytes(8))}) == {'y': ((1, 2), bytes(8))}\n"
        "    assert [each.type for each in model.inputs] == ['float']\n"
        "print(*[m for m in ('numpy', 'grpc', 'google', 'onnxruntime', 'asyncio') "
        "if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
