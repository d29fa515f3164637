"""The runtime's promises: what it refuses, what it returns, what it counts."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from shoal.agent.errors import ModelClosedError, ModelError, ModelFormatError, ModelInputError
from shoal.agent.runtime import Prepare, Runtime


def doubler(*, dtype: int = TensorProto.FLOAT) -> bytes:
    """Return a model that adds its input (batch, 3) to itself."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["twice"])],
        "doubler",
        [helper.make_tensor_value_info("x", dtype, ["batch", 3])],
        [helper.make_tensor_value_info("twice", dtype, ["batch", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_answers_and_describes_itself(tmp_path: Path) -> None:
    """The example of the README works, from bytes and from a path."""
    (tmp_path / "doubler.onnx").write_bytes(doubler())
    with Runtime() as runtime:
        for source in (doubler(), tmp_path / "doubler.onnx"):
            model = runtime.load(source)
            assert model.infer({"x": X})["twice"].tolist() == (2 * X).tolist()
            assert [(s.name, str(s.dtype), s.shape) for s in model.inputs] == [
                ("x", "float32", (-1, 3))
            ]
            assert [s.name for s in model.outputs] == ["twice"]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"y": X}, r"takes the inputs \['x'\], not \['y'\]"),
        ({"x": X, "y": X}, "takes the inputs"),
        ({"x": X.astype(np.float64)}, "must be float32, not float64"),
        ({"x": X[0]}, r"must have shape \(-1, 3\), not \(3,\)"),
        ({"x": X[:, :2].copy()}, r"not \(2, 2\)"),
        ({"x": np.asfortranarray(X)}, "not C-contiguous"),
        ({"x": X.tolist()}, "must be a numpy array, not list"),
    ],
)
def test_refuses_what_the_model_does_not_take(inputs: dict[str, Any], said: str) -> None:
    """A wrong input is refused with what was expected; nothing is cast or copied silently."""
    with Runtime() as runtime:
        model = runtime.load(doubler())
        with pytest.raises(ModelInputError, match=said):
            model.infer(inputs)
        assert model.stats().calls == 0
        model.infer({"x": X})


@pytest.mark.parametrize(
    "data",
    [b"", b"not a model", b"\x80\x04pickle", bytes(1000), doubler()[:-20]],
    ids=["empty", "text", "pickle", "zeros", "cut"],
)
def test_refuses_a_file_that_is_no_onnx(data: bytes, tmp_path: Path) -> None:
    """Whatever the file holds, loading it is a typed error and the runtime goes on."""
    (tmp_path / "model.onnx").write_bytes(data)
    with Runtime() as runtime:
        with pytest.raises(ModelFormatError, match="model"):
            runtime.load(tmp_path / "model.onnx")
        with pytest.raises(ModelFormatError, match="cannot read"):
            runtime.load(tmp_path / "missing.onnx")
        runtime.load(doubler()).infer({"x": X})


def test_refuses_weights_outside_the_file(tmp_path: Path) -> None:
    """A model is one file that was verified as a whole."""
    model = onnx.load_from_string(doubler())
    weight = onnx.numpy_helper.from_array(np.ones(3, np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="secret")
    model.graph.initializer.append(weight)
    model.graph.node[0].input[1] = "w"
    (tmp_path / "secret").write_bytes(np.ones(3, np.float32).tobytes())
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with Runtime() as runtime, pytest.raises(ModelFormatError):
        runtime.load(tmp_path / "model.onnx")


def test_outputs_outlive_the_model() -> None:
    """Arrays that infer returned stay as they are after later calls and after close."""
    with Runtime() as runtime:
        model = runtime.load(doubler())
        first = model.infer({"x": X})["twice"]
        model.infer({"x": X + 100})
    assert first.tolist() == (2 * X).tolist()


def test_closed_means_closed() -> None:
    """A closed model or runtime says so."""
    runtime = Runtime()
    model = runtime.load(doubler())
    runtime.close()
    with pytest.raises(ModelClosedError, match="closed"):
        model.infer({"x": X})
    with pytest.raises(ModelClosedError):
        runtime.load(doubler())


def test_an_engine_error_is_typed_and_counted() -> None:
    """A model that fails in the middle raises ModelError and stays usable."""
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "reshaper",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info("shape", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m"])],
    )
    data = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    x = np.ones(4, np.float32)
    with Runtime() as runtime:
        model = runtime.load(data, name="reshaper")
        with pytest.raises(ModelError, match="reshaper failed"):
            model.infer({"x": x, "shape": np.array([3])})
        assert model.infer({"x": x, "shape": np.array([4])})["y"].tolist() == x.tolist()
        assert (model.stats().calls, model.stats().errors) == (1, 1)


def test_the_monitor_sees_each_call_and_threads_share_a_model() -> None:
    """Four threads at once: every call is answered right, counted and observed."""
    seen: list[float] = []

    class Monitor:
        def observe(
            self,
            inputs: Mapping[str, NDArray[Any]],
            outputs: Mapping[str, NDArray[Any]],
            latency_ns: int,
        ) -> None:
            assert latency_ns > 0
            seen.append(float(outputs["twice"][0, 0] - inputs["x"][0, 0]))

    with Runtime() as runtime:
        model = runtime.load(doubler(), monitor=Monitor())

        def work(value: int) -> None:
            for _ in range(50):
                x = np.full((1, 3), value, np.float32)
                assert model.infer({"x": x})["twice"][0, 0] == 2 * value

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = model.stats()
    assert stats.calls == 200 and stats.errors == 0
    assert 0 < stats.latency_p50_us <= stats.latency_p99_us
    assert sorted(seen) == [float(i) for i in range(4) for _ in range(50)]


DATA = Path(__file__).parents[1] / "ext" / "data"


def test_streaming_models_keep_state_and_forget_it() -> None:
    """The same input counts up until reset; other models have nothing to forget."""
    pytest.importorskip("ai_edge_litert")
    with Runtime() as runtime:
        model = runtime.load(DATA / "counter.tflite")
        assert model.backend == "litert" and model.stateful
        inputs = {
            each.name: np.ones([max(1, size) for size in each.shape], each.dtype)
            for each in model.inputs
        }
        (name,) = (each.name for each in model.outputs)
        first = model.infer(inputs)[name].tolist()
        assert model.infer(inputs)[name].tolist() != first
        model.reset()
        assert model.infer(inputs)[name].tolist() == first
        with pytest.raises(ModelError, match="keeps no state"):
            runtime.load(doubler()).reset()
        model.close()
        with pytest.raises(ModelClosedError):
            model.reset()


def test_a_signature_of_a_tflite_model_is_chosen_by_its_key() -> None:
    """Each signature has its own graph; ONNX has none."""
    pytest.importorskip("ai_edge_litert")
    from shoal.ext import litert

    data = (DATA / "two_signatures.tflite").read_bytes()
    with Runtime() as runtime:
        answers = set()
        for key in litert.signatures(data):
            model = runtime.load(data, signature=key)
            inputs = {
                each.name: np.full([max(1, size) for size in each.shape], 3, each.dtype)
                for each in model.inputs
            }
            answers.add(tuple(value.tobytes() for value in model.infer(inputs).values()))
        assert len(answers) == 2
        with pytest.raises(ModelFormatError):
            runtime.load(data, signature="nonesuch")
        with pytest.raises(ValueError, match="signatures"):
            runtime.load(doubler(), signature="a")


@pytest.mark.parametrize("what", ["fifo", "/dev/zero", "folder"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, what: str) -> None:
    """A fifo would wait for ever, a device would fill the memory."""
    path = Path(what) if what.startswith("/") else tmp_path / what
    if what == "fifo":
        os.mkfifo(path)
    if what == "folder":
        path.mkdir()
    with Runtime() as runtime, pytest.raises(ModelFormatError):
        runtime.load(path)


def test_arguments_that_cannot_be_meant_are_refused() -> None:
    """At load, not at the first call."""
    with Runtime() as runtime:
        with pytest.raises(TypeError):
            runtime.load(doubler(), threads=1.5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="observe"):
            runtime.load(doubler(), monitor=3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="nan must be"):
            runtime.load(doubler(), nan="drop")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="no input"):
            runtime.load(doubler(), prepare={"z": Prepare()})
        with pytest.raises(ValueError, match="raw values"):
            Prepare(type="zzz")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="finite"):
            Prepare(scale=[float("nan")])
        with runtime.load(doubler()) as model:
            assert repr(model).startswith("<Model model ")
        assert repr(model).endswith(" closed>")
