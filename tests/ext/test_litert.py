"""LiteRtEngine and the reader of .tflite files: vectors, properties and faults.

The tiny models are made by ``data/make_tflite.py``; the real ones come from ``make models``.
The invariant of the fuzz: whatever the bytes, they run or raise an error of ours, and the process
lives.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.ext import litert, tflite
from shoal.ext.litert import LiteRtEngine, LiteRtError, LiteRtMissingError, TfliteError

pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed: the extra [litert]")

DATA = Path(__file__).parent / "data"
MODELS = Path(__file__).parents[2] / ".models"
TINY = ("conv_int8", "free_batch", "two_signatures", "counter", "window", "kinds", "where")
DTYPES = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    4: np.uint16,
    5: np.int16,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
    12: np.uint32,
    13: np.uint64,
}
Arrays = list[NDArray[Any]]


def tiny(name: str) -> bytes:
    """Return a tiny model."""
    return (DATA / f"{name}.tflite").read_bytes()


def real(name: str) -> bytes:
    """Return a real model, or skip."""
    path = MODELS / f"{name}.tflite"
    if not path.exists():
        pytest.skip(f"{path.name} is not here: run `make models`")
    return path.read_bytes()


def call(engine: LiteRtEngine, *arrays: NDArray[Any]) -> Arrays:
    """Run once on arrays."""
    found = engine.call([(a.shape, a) for a in arrays])
    return [
        np.frombuffer(data, DTYPES[kind]).reshape(shape)
        for (shape, data), (_, kind, _) in zip(found, engine.outputs, strict=True)
    ]


def draw(engine: LiteRtEngine, rng: np.random.Generator) -> Arrays:
    """Return random inputs that use the whole range of their type."""
    arrays: Arrays = []
    for _, kind, shape in engine.inputs:
        raw = rng.integers(0, 256, (*shape, np.dtype(DTYPES[kind]).itemsize), np.uint8)
        made: NDArray[Any] = raw.view(DTYPES[kind])[..., 0]
        if made.dtype.kind in "fb":
            made = rng.normal(size=shape).astype(DTYPES[kind])
        arrays.append(made)
    return arrays


class Reference:
    """LiteRT's own interpreter."""

    def __init__(self, model: bytes) -> None:
        from ai_edge_litert.interpreter import (  # type: ignore[import-untyped]
            Interpreter,
        )

        self.interpreter = Interpreter(model_content=model, num_threads=1)
        self.interpreter.allocate_tensors()

    def __call__(self, arrays: Sequence[NDArray[Any]]) -> Arrays:
        """Run once."""
        details = self.interpreter.get_input_details()
        for detail, array in zip(details, arrays, strict=True):
            self.interpreter.set_tensor(detail["index"], array)
        self.interpreter.invoke()
        outputs = self.interpreter.get_output_details()
        return [self.interpreter.get_tensor(detail["index"]) for detail in outputs]


@pytest.mark.parametrize("threads", [1, 2])
def test_int8_convolution_answers_as_the_interpreter_bit_for_bit(threads: int) -> None:
    """Quantised answers are compared with golden vectors: one step off is a failure."""
    engine, reference = (
        LiteRtEngine(tiny("conv_int8"), threads=threads),
        Reference(tiny("conv_int8")),
    )
    rng, seen = np.random.default_rng(3), set()
    for _ in range(20):
        arrays = draw(engine, rng)
        (got,), (want,) = call(engine, *arrays), reference(arrays)
        assert got.dtype == want.dtype == np.int8
        np.testing.assert_array_equal(got, want)
        seen.add(got.tobytes())
    assert len(seen) == 20  # the answers depend on the inputs


def test_every_type_passes_through() -> None:
    """A reshape gives back the same bytes, for each type that an input may have."""
    engine = LiteRtEngine(tiny("kinds"))
    arrays = draw(engine, np.random.default_rng(4))
    assert {kind for _, kind, _ in engine.inputs} == set(DTYPES)
    for given, got in zip(arrays, call(engine, *arrays), strict=True):
        assert got.dtype == given.dtype
        assert got.shape == (3, 2)
        np.testing.assert_array_equal(got, given.reshape(3, 2))


def test_a_signature_is_chosen_by_its_key() -> None:
    """Two entries of one file are two engines, with the signature's names."""
    model = tiny("two_signatures")
    assert litert.signatures(model) == ("add", "multiply")
    a, b = np.array([1, 2, 3, 4], np.float32), np.array([5, 6, 7, 8], np.float32)
    for key, want in (("add", a + b), ("multiply", a * b), (None, a + b)):
        engine = LiteRtEngine(model, key)
        assert [name for name, _, _ in engine.inputs] == ["left", "right"]
        assert engine.outputs == (("result", 1, (4,)),)
        np.testing.assert_array_equal(call(engine, a, b)[0], want)
    with pytest.raises(TfliteError, match="no signature 'divide'; it has 'add', 'multiply'"):
        LiteRtEngine(model, "divide")


def test_a_free_axis_takes_any_size_and_a_refused_one_changes_nothing() -> None:
    """Batches come in any size; LiteRT resizes only when the size changes."""
    engine = LiteRtEngine(tiny("free_batch"))
    assert engine.inputs == (("x", 1, (-1, 4)),)
    assert engine.outputs == (("y", 1, (-1, 3)),)
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(33, 4)).astype(np.float32)
    alone = np.concatenate([call(engine, row[None])[0] for row in rows])
    for size in (1, 33, 2, 2, 17, 1):
        (got,) = call(engine, rows[:size])
        np.testing.assert_allclose(got, alone[:size], rtol=1e-6)
        with pytest.raises(LiteRtError, match="shape: kLiteRtStatusErrorInvalid"):
            call(engine, np.zeros((0, 4), np.float32))


@pytest.mark.parametrize("shape", [(1, 3), (4,), (1, 4, 1), (1, 1, 1, 1, 1, 1, 1, 1, 1)])
def test_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    """Neither a wrong fixed axis nor a wrong rank reaches LiteRT."""
    with pytest.raises(LiteRtError, match=r"shape|rank|axes"):
        call(LiteRtEngine(tiny("free_batch")), np.zeros(shape, np.float32))


def test_wrong_bytes_and_counts_are_refused() -> None:
    """The bytes must be those of the shape: LiteRT would read past their end."""
    engine = LiteRtEngine(tiny("free_batch"))
    with pytest.raises(LiteRtError, match="bytes do not fit"):
        engine.call([((2, 4), b"\0" * 31)])
    with pytest.raises(LiteRtError, match="has 1 inputs, not 2"):
        engine.call([((1, 4), b"\0" * 16), ((1, 4), b"\0" * 16)])


def test_state_lasts_from_call_to_call_until_reset() -> None:
    """A streaming model counts on it; two engines never share it."""
    first, second = LiteRtEngine(tiny("counter")), LiteRtEngine(tiny("counter"))
    assert first.stateful
    assert not LiteRtEngine(tiny("conv_int8")).stateful
    step = np.array([[1, 10]], np.float32)
    for count in range(1, 6):
        assert call(first, step)[0].tolist() == [[count, 10 * count]]
    assert call(second, step)[0].tolist() == [[1, 10]]
    first.reset()
    assert call(first, step)[0].tolist() == [[1, 10]]
    assert call(second, step)[0].tolist() == [[2, 20]]


def test_a_window_slides_over_what_came() -> None:
    """The state of a streaming convolution, on int8."""
    engine = LiteRtEngine(tiny("window"))
    rows = np.arange(-10, 10, dtype=np.int8).reshape(10, 1, 1, 2)
    seen = np.concatenate([np.zeros((3, 2), np.int8), rows[:, 0, 0]])
    for count, row in enumerate(rows, start=1):
        np.testing.assert_array_equal(call(engine, row)[0], seen[None, count : count + 3])


def test_threads_share_an_engine_and_none_sees_another_s_answer() -> None:
    """An interpreter is not reentrant: calls of one engine wait for each other."""
    shared, failed = LiteRtEngine(tiny("free_batch")), []
    weights = [call(shared, row[None])[0][0] for row in np.eye(4, dtype=np.float32)]
    bias = call(shared, np.zeros((1, 4), np.float32))[0][0]

    def work(seed: int) -> None:
        rng, own = np.random.default_rng(seed), LiteRtEngine(tiny("conv_int8"))
        x = draw(own, rng)
        want = call(own, *x)[0]
        for _ in range(150):
            rows = rng.normal(size=(rng.integers(1, 9), 4)).astype(np.float32)
            (got,) = call(shared, rows)
            exact = rows @ (np.array(weights) - bias) + bias
            if not np.allclose(got, exact, atol=1e-4) or (call(own, *x)[0] != want).any():
                failed.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failed == []


def test_threads_load_and_unload_at_the_same_time() -> None:
    """The agent loads a candidate while the active model runs; the GIL is not held."""
    x, answers = np.array([[1, 2]], np.float32), []

    def work() -> None:
        for _ in range(100):
            engine = LiteRtEngine(tiny("counter"))
            answers.append(call(engine, x)[0].tolist())

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert answers == [[[1, 2]]] * 300


def test_an_operator_that_litert_lacks_is_named_at_load() -> None:
    """Not at the first call, when the model is already the active one."""
    with pytest.raises(LiteRtError, match="ShoalNoSuchOperator") as caught:
        LiteRtEngine(tiny("custom"))
    assert "ShoalNoSuchOperator" in caught.value.hint
    assert tflite.read(tiny("custom")).custom == {"ShoalNoSuchOperator"}


def test_strings_are_refused() -> None:
    """They have no fixed size, and LiteRT's buffers do."""
    with pytest.raises(TfliteError, match="'x' is of type string"):
        LiteRtEngine(tiny("strings"))


def test_the_python_interpreter_gives_outputs_whose_shape_depends_on_the_data() -> None:
    """The C API cannot; it says so in a typed error, and the other way works."""
    x = np.array([1, 0, 1, 1, 0, 1], np.bool_)
    with pytest.raises(LiteRtError, match="kLiteRtStatusErrorRuntimeFailure"):
        call(LiteRtEngine(tiny("where")), x)
    made = litert.interpret(tiny("where"))
    assert made.outputs == (("y", 7, (-1, 1)),)
    assert made.call([x])[0].tolist() == [[0], [2], [3], [5]]
    assert made.call([~x])[0].tolist() == [[1], [4]]


@pytest.mark.parametrize("name", ["free_batch", "two_signatures", "conv_int8", "counter"])
def test_the_python_interpreter_answers_as_the_c_api(name: str) -> None:
    """It stands in where the version's C functions are not known."""
    engine, made = LiteRtEngine(tiny(name)), litert.interpret(tiny(name))
    assert (made.inputs, made.outputs) == (engine.inputs, engine.outputs)
    assert made.stateful is engine.stateful
    rng = np.random.default_rng(6)
    for size in (1, 3, 3, 1):
        arrays: Arrays = []
        for _, kind, shape in engine.inputs:
            fixed = tuple(size if axis < 0 else axis for axis in shape)
            arrays.append((rng.normal(size=fixed) * 9).astype(DTYPES[kind]))
        for got, want in zip(made.call(arrays), call(engine, *arrays), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6)


def test_the_engine_is_the_c_api_where_it_can_be() -> None:
    """The Python interpreter costs microseconds and NumPy's memory: it is the last resort."""
    assert isinstance(litert.engine(tiny("conv_int8"), threads=2), LiteRtEngine)
    assert isinstance(litert.engine(tiny("two_signatures"), "multiply"), LiteRtEngine)
    with pytest.raises(LiteRtError, match="npu gives no outputs whose shape depends"):
        litert.engine(tiny("where"), accelerator="npu")


def test_the_python_interpreter_is_an_engine_too() -> None:
    """The runtime binds and runs it as any other."""
    pytest.importorskip("shoal.ext._pyengine")
    made = litert.engine(tiny("where"))
    assert made.backend == "litert-python"
    assert made.outputs == (("y", 7, (-1, 1)),)


def test_an_accelerator_that_is_not_there_is_an_error_unless_the_cpu_may_stand_in() -> None:
    """A silent fallback would be measured, and believed."""
    with pytest.raises(LiteRtError, match=r"npu|compiles"):
        LiteRtEngine(tiny("conv_int8"), accelerator="npu")
    engine = LiteRtEngine(tiny("conv_int8"), accelerator="npu", fallback=True)
    assert not engine.accelerated
    x = draw(engine, np.random.default_rng(7))
    np.testing.assert_array_equal(call(engine, *x)[0], Reference(tiny("conv_int8"))(x)[0])


def test_arguments_are_checked() -> None:
    """What a caller can get wrong is a ValueError that lists what is right."""
    for bad in (0, 1025):
        with pytest.raises(ValueError, match="threads must be 1 to 1024"):
            LiteRtEngine(tiny("counter"), threads=bad)
    with pytest.raises(ValueError, match="'cpu', 'gpu', 'npu'"):
        LiteRtEngine(tiny("counter"), accelerator="tpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["1.4.0", "2.1.5", "2.4.0", "3.0.0.dev20270101"])
def test_an_unknown_version_is_not_called(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument lists moved between versions: a wrong guess ends the process."""
    monkeypatch.setattr(litert, "_libraries", {})
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.raises(LiteRtMissingError, match=version.replace(".", r"\.")) as caught:
        LiteRtEngine(tiny("counter"))
    assert "2.1.6" in caught.value.hint


def test_a_machine_without_litert_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """LiteRT is an extra; the agent runs without it."""
    monkeypatch.setattr(litert, "_libraries", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for load in (LiteRtEngine, litert.interpret):
        with pytest.raises(LiteRtMissingError) as caught:
            load(tiny("counter"))
        assert "shoal[litert]" in caught.value.hint


def test_the_old_runtime_beside_numpy_2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """tflite-runtime was built for NumPy 1 and ends the process under 2."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "ai_edge_litert" else find("json"),
    )
    with pytest.raises(LiteRtMissingError, match="needs numpy < 2"):
        litert.interpret(tiny("counter"))


def test_running_a_model_imports_neither_numpy_nor_the_package() -> None:
    """`shoal-agent serve` has 60 MB; each of them would take a third of it."""
    code = f"""
        import sys
        from shoal.ext.litert import LiteRtEngine
        engine = LiteRtEngine(open({str(DATA / "counter.tflite")!r}, "rb").read())
        (shape, data), = engine.call([((1, 2), bytes(8))])
        assert (shape, data) == ((1, 2), bytes(8)), (shape, data)
        assert not {{"numpy", "ai_edge_litert", "flatbuffers", "asyncio"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


def test_loading_a_thousand_times_keeps_the_memory() -> None:
    """A runtime loads and unloads for years; the process must not grow."""
    code = f"""
        from shoal.ext.litert import LiteRtEngine
        model = open({str(DATA / "counter.tflite")!r}, "rb").read()
        def rss_kb():
            with open("/proc/self/status") as status:
                return int(next(l for l in status if l.startswith("VmRSS")).split()[1])
        def cycle(count):
            for _ in range(count):
                engine = LiteRtEngine(model)
                engine.call([((1, 2), bytes(8))])
                engine.reset()
        cycle(300)
        before = rss_kb()
        cycle(1000)
        assert rss_kb() - before < 1024, (before, rss_kb())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


def test_read_tells_shapes_types_quantization_and_operators() -> None:
    """The trial, the doctor and the console show it without running the model."""
    graph = tflite.read(tiny("conv_int8"))
    (main,) = graph.subgraphs
    by_name = {t.name: t for t in main.tensors}
    assert graph.description == "shoal test data"
    assert [o.code for o in main.operators] == [3, 22, 9, 25]
    assert by_name["x"].shape == (1, 16, 16, 3)
    assert by_name["x"].type == "int8"
    assert by_name["x"].quantization == tflite.Quantization((float(np.float32(0.02)),), (-3,), 0)
    kernel = by_name["kernel"].quantization
    assert kernel is not None
    assert kernel.axis == 0
    np.testing.assert_allclose(kernel.scale, [0.01 + 0.001 * i for i in range(8)], rtol=1e-6)
    assert by_name["kernel"].constant
    assert not by_name["x"].constant
    assert LiteRtEngine(tiny("conv_int8")).quantization == {
        "x": by_name["x"].quantization,
        "scores": tflite.Quantization((1 / 256,), (-128,), 0),
    }
    assert tflite.read(tiny("free_batch")).signature().inputs == (("x", 0),)
    assert tflite.read(tiny("counter")).stateful


@pytest.mark.parametrize("name", TINY)
def test_a_file_cut_anywhere_is_refused(name: str) -> None:
    """A download that broke off must not reach LiteRT."""
    model = tiny(name)
    for size in {*range(min(len(model), 1200)), *range(len(model) - 400, len(model))}:
        try:
            graph = tflite.read(model[:size])
        except TfliteError:
            continue
        # what was cut off is only padding, or nothing that is referred to
        assert graph == tflite.read(model), size
        assert len(model) - size < 16


@pytest.mark.parametrize("model", [b"", b"TFL3", b"\0" * 64, b"\x08\0\0\0TFL3", b"PK\3\4" * 99])
def test_what_is_no_tflite_is_refused(model: bytes) -> None:
    """Operators drop the wrong file."""
    with pytest.raises(TfliteError):
        LiteRtEngine(model)


def test_what_is_too_large_inside_is_refused() -> None:
    """A small file can declare petabytes, or visit the same table forever."""
    with pytest.raises(TfliteError, match="more than 5 parts") as caught:
        tflite.read(tiny("counter"), tflite.TfliteLimits(tables_max=5))
    assert "tables_max" in caught.value.hint
    limits = tflite.TfliteLimits(tensor_bytes_max=767)
    with pytest.raises(TfliteError, match="more than 767 bytes"):
        LiteRtEngine(tiny("conv_int8"), limits=limits)
    assert tflite.read(tiny("conv_int8"), tflite.TfliteLimits(tensor_bytes_max=5120))
    model = bytearray(tiny("conv_int8"))
    at = bytes(model).index(struct.pack("<5i", 4, 1, 16, 16, 3))  # the shape of the input
    struct.pack_into("<5i", model, at, 4, 1 << 20, 1 << 20, 1 << 20, 3)
    with pytest.raises(TfliteError, match="bytes"):
        LiteRtEngine(bytes(model))


def altered(name: str, change: Callable[[Any], None]) -> bytes:
    """Return a tiny model as a well-formed flatbuffer with one thing changed."""
    import flatbuffers  # type: ignore[import-untyped]
    from ai_edge_litert import schema_py_generated as schema  # type: ignore[import-untyped]

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(tiny(name), 0))
    change(model)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def put(path: str, value: Any) -> Callable[[Any], None]:
    """Return a change that sets one thing, as ``subgraphs.0.tensors.1.shape``."""

    def change(node: Any) -> None:
        *steps, last = path.split(".")
        for step in steps:
            node = node[int(step)] if step.isdigit() else getattr(node, step)
        setattr(node, last, value)

    return change


BROKEN = [
    ("conv_int8", "version", 4, "schema version 4"),
    ("conv_int8", "subgraphs", [], "no graph"),
    ("conv_int8", "subgraphs.0.operators.0.opcodeIndex", 9, "operator code 9"),
    ("conv_int8", "subgraphs.0.operators.0.inputs", [0, 99, 2], "tensor 99"),
    ("conv_int8", "subgraphs.0.operators.0.inputs", [-1, 1, 2], "with operands"),
    ("conv_int8", "subgraphs.0.operators.0.inputs", [0], "with operands"),
    ("conv_int8", "subgraphs.0.operators.0.outputs", [], "with operands"),
    ("conv_int8", "subgraphs.0.operators.0.inputs", [9, 1, 2], "tensor 9 is read before"),
    ("conv_int8", "subgraphs.0.operators.0.outputs", [1], "tensor 1 is written twice"),
    ("conv_int8", "subgraphs.0.operators.1.outputs", [3], "tensor 3 is written twice"),
    ("conv_int8", "subgraphs.0.operators", [], "tensor 9 is never written"),
    ("conv_int8", "subgraphs.0.inputs", [-1], "tensor -1"),
    ("conv_int8", "subgraphs.0.tensors.1.shape", [8, 3, 3, 4], "864 bytes|216 bytes"),
    ("conv_int8", "subgraphs.0.tensors.1.shape", [8, 3, -3, 3], "no such shape"),
    ("conv_int8", "subgraphs.0.tensors.1.buffer", 77, "buffer 77"),
    ("conv_int8", "subgraphs.0.tensors.1.type", 22, "type 22"),
    ("conv_int8", "subgraphs.0.tensors.1.quantization.zeroPoint", [0, 0], "8 scales, 2 zero"),
    ("conv_int8", "subgraphs.0.tensors.1.quantization.quantizedDimension", 1, "do not fit axis 1"),
    ("two_signatures", "signatureDefs.0.subgraphIndex", 5, "subgraph 5"),
    ("two_signatures", "signatureDefs.0.inputs.0.tensorIndex", 2, "ports are not those"),
    ("two_signatures", "signatureDefs.0.signatureKey", "", "no key"),
    ("two_signatures", "signatureDefs.0.inputs.1.name", "left", "two ports .* 'left'"),
    ("kinds", "subgraphs.0.operators.0.inputs", [19, 0], "mixes"),
    ("counter", "subgraphs.0.operators.4.inputs", [0, 0], "values and handles"),
    ("counter", "subgraphs.0.operators.2.inputs", [1], "values and handles"),
    ("counter", "subgraphs.0.tensors.2.shape", [50, 2], "two shapes"),
    ("window", "subgraphs.0.operators.4.builtinOptions.beginMask", 7, "a slice of"),
    ("free_batch", "subgraphs.0.tensors.0.shapeSignature", [-1, 5], "no such shape"),
    ("free_batch", "subgraphs.0.tensors.0.shapeSignature", [-1], "differ"),
]


@pytest.mark.parametrize(("name", "path", "value", "match"), BROKEN)
def test_what_litert_would_follow_blindly_is_refused(
    name: str, path: str, value: Any, match: str
) -> None:
    """Each of these is a well-formed flatbuffer; most of them end LiteRT's process."""
    model = altered(name, put(path, value))
    with pytest.raises((TfliteError, LiteRtError), match=match):
        LiteRtEngine(model)


def test_altering_nothing_changes_nothing() -> None:
    """So that the cases above fail for what they change."""
    for name in TINY:
        assert tflite.read(altered(name, lambda _: None)) == tflite.read(tiny(name))


FUZZ = """
    import random, struct, sys
    from math import prod
    from shoal.ext.errors import KernelError
    from shoal.ext.litert import LiteRtEngine
    SIZES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
    path, count = sys.argv[1], int(sys.argv[2])
    base = open(path, "rb").read()
    def mutate(rng):
        model = bytearray(base)
        if rng.random() < 0.1:
            return bytes(model[: rng.randrange(len(model))])
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            near = rng.random() < 0.5  # the graph is at the end, the weights before
            at = len(model) - 1 - rng.randrange(min(4096, len(model))) if near \\
                else rng.randrange(len(model))
            way = rng.random()
            if way < 0.4:
                model[at] = rng.randrange(256)
            elif way < 0.6:
                model[at] ^= 1 << rng.randrange(8)
            elif at + 4 <= len(model):
                number = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, len(model), rng.randrange(64)))
                struct.pack_into("<I", model, at // 4 * 4, number)
        return bytes(model)
    ran = 0
    for seed in range(count):
        with open(sys.argv[3], "w") as last:
            last.write(str(seed))
        try:
            engine = LiteRtEngine(mutate(random.Random(seed)))
            inputs = []
            for _, kind, shape in engine.inputs:
                fixed = [2 if axis < 0 else axis for axis in shape]
                inputs.append((fixed, bytes(SIZES[kind] * prod(fixed))))
            engine.call(inputs)
            ran += 1
        except KernelError:
            pass
    print(ran)
"""


def fuzz(path: Path, count: int, last: Path) -> int:
    """Run mutations of a file in a child that must live; return how many were valid models."""
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FUZZ), str(path), str(count), str(last)],
        capture_output=True,
        timeout=240,
        check=False,
    )
    seed = last.read_text()
    assert child.returncode == 0, f"seed {seed}: {child.returncode} {child.stderr[-500:]!r}"
    return int(child.stdout)


@pytest.mark.parametrize("name", TINY[:-1])
def test_mutated_files_never_end_the_process(name: str, tmp_path: Path) -> None:
    """Load and run of a broken model give an error of ours, or an answer."""
    assert fuzz(DATA / f"{name}.tflite", 600, tmp_path / "seed") > 10  # some stay valid


def test_mutated_real_model_never_ends_the_process(tmp_path: Path) -> None:
    """The same on a real streaming model."""
    real("okay_nabu")
    assert fuzz(MODELS / "okay_nabu.tflite", 600, tmp_path / "seed") > 10


def test_streaming_wake_word_answers_as_the_interpreter_for_50_steps() -> None:
    """Okay Nabu: int8 in, uint8 out, six resource variables."""
    model = real("okay_nabu")
    engine, reference = LiteRtEngine(model), Reference(model)
    assert engine.stateful
    assert engine.quantization["input_audio"].zero_point == (-128,)
    rng = np.random.default_rng(8)
    steps = [np.clip(rng.normal(20 * (i % 7), 50, (1, 3, 40)), -128, 127) for i in range(50)]
    got = [call(engine, step.astype(np.int8))[0].tolist() for step in steps]
    want = [reference([step.astype(np.int8)])[0].tolist() for step in steps]
    assert got == want
    engine.reset()
    assert [call(engine, step.astype(np.int8))[0].tolist() for step in steps] == want


def test_hand_landmarks_answer_as_the_interpreter() -> None:
    """A float model of 2 MB with four outputs."""
    model = real("hand_landmark_lite")
    engine, reference = LiteRtEngine(model), Reference(model)
    rng = np.random.default_rng(9)
    for _ in range(3):
        x = rng.random((1, 224, 224, 3), np.float32)
        pairs = list(zip(call(engine, x), reference([x]), strict=True))
        assert len(pairs) == 4
        for got, want in pairs:
            np.testing.assert_allclose(got, want, atol=1e-5)
        assert np.ptp(pairs[0][0]) > 1
