# ruff: noqa: D102, D103 - the name of a test is its promise; a docstring says why where it must
"""The core with real models: what it answers, refuses, counts and says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from shoal.agent.errors import ModelClosedError, ModelError, ModelInputError
from shoal.agent.local.config import CoreConfig, ModelLimits, ModelSource
from shoal.agent.local.core import LocalCore
from shoal.agent.local.errors import (
    DeadlineError,
    OverloadError,
    RequestError,
    UnknownModelError,
)
from shoal.agent.local.oip import (
    InferInput,
    InferRequest,
    Region,
    WantedOutput,
    classify,
    decode_bytes,
    encode_bytes,
    split_rows,
)
from shoal.agent.runtime import Runtime
from tests.agent.local.models import FLOAT, adder, ask, model, pack, said, unpack

WAIT_S = 30.0
Serve = Callable[..., LocalCore]


@dataclass
class Spec:
    """A tensor of a simulated model."""

    name: str = "x"
    type: str = "float"
    shape: tuple[int, ...] = (-1, 3)


@dataclass
class Gate:
    """A model that gives back what it gets, when it is let to; fails on what begins with 0xff."""

    backend: str = "gate"
    version: str = "0"
    stateful: bool = False
    inputs: Sequence[Spec] = (Spec(),)
    outputs: Sequence[Spec] = (Spec(),)
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    running: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    shapes: list[Sequence[int]] = field(default_factory=list)
    rows_lost: int = 0
    closed: bool = False

    def infer_raw(
        self, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None
    ) -> dict[str, tuple[tuple[int, ...], bytes]]:
        self.running.release()
        assert self.go.acquire(timeout=WAIT_S)
        shape, data = inputs["x"]
        self.shapes.append(tuple(shape))
        if b"\xff\xff\xff\xff" in bytes(data):
            raise ModelError("the model fails on this")
        return {"x": ((shape[0] - self.rows_lost, *shape[1:]), bytes(data))}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a core of one model, "m": ONNX bytes or a simulated one."""
    cores: list[tuple[LocalCore, Any]] = []
    with Runtime() as runtime:

        def start(made: Any, limits: ModelLimits | None = None, **facts: Any) -> LocalCore:
            path = tmp_path / "m.onnx"
            path.write_bytes(made if isinstance(made, bytes) else b"simulated")
            source = ModelSource(name="m", path=path, limits=limits or ModelLimits())
            config = CoreConfig(models=(source,), shm_folder=tmp_path, **facts)
            core = LocalCore(
                config, runtime.load if isinstance(made, bytes) else lambda *_, **__: made
            )
            cores.append((core, made))
            core.start()
            return core

        yield start
        for core, made in cores:
            if isinstance(made, Gate):
                made.go.release(1000)
            core.drain(WAIT_S)


class Told:
    """Collects the outcomes of submitted requests, by number."""

    def __init__(self) -> None:
        self.outcomes: dict[int, Any] = {}
        self.some = threading.Semaphore(0)

    def done(self, number: int) -> Callable[[Any], None]:
        def tell(outcome: Any) -> None:
            assert number not in self.outcomes
            self.outcomes[number] = outcome
            self.some.release()

        return tell

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self.some.acquire(timeout=WAIT_S)


# ---- answers -----------------------------------------------------------------------------------


def test_infers_both_ways(serve: Serve) -> None:
    core, told = serve(adder()), Told()
    response = core.infer(ask(1, 2, 3, 4, 5, 6), left_s=5.0)
    assert (response.model, response.version) == ("m", "1")
    (output,) = response.outputs
    assert (output.name, output.datatype, output.shape) == ("y", "FP32", (2, 3))
    assert said(response) == [2, 3, 4, 5, 6, 7]
    core.submit(ask(0, 0, 0, version="1"), told.done(0))
    told.wait(1)
    assert said(told.outcomes[0]) == [1, 1, 1]


def test_a_lane_runs_what_stands_in_its_memory_now(serve: Serve) -> None:
    core = serve(adder())
    memory = bytearray(pack(1, 2, 3))
    request = ask(0, 0, 0)
    (x,) = request.inputs
    lane = core.lane(request._replace(inputs=(x._replace(data=memoryview(memory)),)))
    assert lane.datatypes == {"y": "FP32"}
    assert lane.run() == {"y": ((1, 3), pack(2, 3, 4))}
    memory[:] = pack(7, 8, 9)
    assert lane.run() == {"y": ((1, 3), pack(8, 9, 10))}
    (facts,) = core.statistics("m", "")["model_stats"]
    assert facts["inference_count"] == facts["inference_stats"]["success"]["count"] == 2
    with pytest.raises(UnknownModelError):
        core.lane(ask(1, 2, 3, name="n"))
    with pytest.raises(ModelInputError):
        core.lane(request._replace(inputs=(x._replace(datatype="INT8"),)))
    core.unload("m")
    with pytest.raises(ModelClosedError):
        lane.run()


def test_a_lane_waits_its_turn_and_counts_failures(serve: Serve) -> None:
    gate = Gate()
    core = serve(gate, ModelLimits(workers=1))
    good, bad = core.lane(ask(1, 2, 3)), core.lane(_failing())
    told = Told()
    core.submit(ask(1, 2, 3), told.done(0))
    assert gate.running.acquire(timeout=WAIT_S)
    assert good.run() is None
    gate.go.release()
    told.wait(1)
    gate.go.release(2)
    while (found := good.run()) is None:  # the worker has answered, and now gives its slot back
        pass
    assert found["x"][0] == (1, 3)
    with pytest.raises(ModelError):
        bad.run()
    (facts,) = core.statistics("m", "")["model_stats"]
    assert facts["inference_stats"]["fail"]["count"] == 1


def _failing() -> InferRequest:
    request = ask(1, 2, 3)
    (x,) = request.inputs
    return request._replace(inputs=(x._replace(data=b"\xff" * 12),))


def test_outputs_are_those_that_were_asked_for(serve: Serve) -> None:
    two = model(
        [helper.make_node("Neg", ["x"], ["a"]), helper.make_node("Abs", ["x"], ["b"])],
        [("x", FLOAT, ["n", 3])],
        [("a", FLOAT, ["n", 3]), ("b", FLOAT, ["n", 3])],
    )
    core = serve(two)
    every = core.infer(ask(1, 2, 3), left_s=None).outputs
    assert [each.name for each in every] == ["a", "b"]
    one = core.infer(ask(1, 2, 3, outputs=(WantedOutput("b", None, 0),)), left_s=None)
    assert [(each.name, unpack(each.data)) for each in one.outputs] == [("b", [1, 2, 3])]


def test_text_goes_through(serve: Serve) -> None:
    text = model(
        [helper.make_node("Identity", ["x"], ["y"])],
        [("x", TensorProto.STRING, ["n"])], [("y", TensorProto.STRING, ["n"])],
    )  # fmt: skip
    core = serve(text)
    data = encode_bytes([b"ab", b"", "ü".encode()])
    request = InferRequest("m", "", (InferInput("x", "BYTES", (3,), data, None),), (), {})
    (output,) = core.infer(request, left_s=None).outputs
    assert (output.datatype, output.data) == ("BYTES", data)
    for bad in (data[:-1], data + b"\0", data[:6], b"\xff" * 12):
        wrong = request._replace(inputs=(InferInput("x", "BYTES", (3,), bad, None),))
        with pytest.raises((ModelInputError, RequestError)):
            core.infer(wrong, left_s=None)


def test_many_callers_of_a_real_model_get_their_own_answers(serve: Serve) -> None:
    core = serve(adder(), ModelLimits(batch_max=8, workers=2, queue_max=100, batch_wait_us=200))
    wrong: list[Any] = []

    def call(i: int) -> None:
        for j in range(50):
            values = [float(i * 1000 + j)] * 3 * (1 + i % 3)
            answer = said(core.infer(ask(*values), left_s=WAIT_S))
            if answer != [each + 1 for each in values]:
                wrong.append((values, answer))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert wrong == []
    (stats,) = core.statistics("m", "")["model_stats"]
    assert stats["inference_stats"]["success"]["count"] == 400
    assert stats["execution_count"] < 400  # it did run in batches
    assert stats["inference_count"] == 50 * sum(1 + i % 3 for i in range(8))


# ---- refusals ----------------------------------------------------------------------------------

X = InferInput("x", "FP32", (1, 3), pack(1, 2, 3), None)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ((), r"expected 1 inputs but got 0 inputs for model 'm'"),
        ((X, X), "expected 1 inputs but got 2"),
        ((X._replace(name="z"),), "unexpected inference input 'z' for model 'm'"),
        ((X._replace(datatype="FP64"),), "data-type is 'FP64', but model 'm' expects 'FP32'"),
        ((X._replace(shape=(1, 4)),), r"unexpected shape .* Expected \[-1,3\], got \[1,4\]"),
        ((X._replace(shape=(3,)),), r"Expected \[-1,3\], got \[3\]"),
        ((X._replace(shape=(-1, 3)),), r"got \[-1,3\]"),
        ((X._replace(shape=(1 << 70, 3)),), "unexpected shape"),
        ((X._replace(shape=(2, 3)),), "got unexpected byte size 12, expected 24"),
        ((X._replace(data=b""),), "got unexpected byte size 0, expected 12"),
        ((X._replace(data=None),), "has no data"),
    ],
)
def test_inputs_that_the_model_does_not_take(serve: Serve, inputs: Any, text: str) -> None:
    """With Triton's texts; the same whether it is called or submitted."""
    core = serve(adder())
    request = InferRequest("m", "", inputs, (), {})
    with pytest.raises(ModelInputError, match=text):
        core.infer(request, left_s=None)
    with pytest.raises(ModelInputError, match=text):
        core.submit(request, lambda outcome: pytest.fail("told, too"))
    assert said(core.infer(ask(0, 0, 0), left_s=None)) == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "version", "text"),
    [
        ("nope", "", "Request for unknown model: 'nope' is not found"),
        ("m", "2", "Request for unknown model: 'm' version 2 is not found"),
        ("", "", "Request for unknown model: '' is not found"),
    ],
)
def test_an_unknown_model_is_told_with_tritons_words(
    serve: Serve, name: str, version: str, text: str
) -> None:
    core = serve(adder())
    asked: list[Callable[[], object]] = [
        lambda: core.infer(ask(0, 0, 0, name=name, version=version), left_s=None),
        lambda: core.model_metadata(name, version),
        lambda: core.model_config(name, version),
        lambda: core.model_ready(name, version),
    ]
    if name:  # "" asks for all
        asked.append(lambda: core.statistics(name, version))
    for each in asked:
        with pytest.raises(UnknownModelError, match=text):
            each()


def test_outputs_and_parameters_that_are_wrong(serve: Serve) -> None:
    core = serve(adder())
    y = WantedOutput("y", None, 0)
    for outputs in ((WantedOutput("z", None, 0),), (y, y)):
        with pytest.raises(ModelInputError):
            core.infer(ask(0, 0, 0, outputs=outputs), left_s=None)
    for parameters in ({"priority": "high"}, {"priority": -1}, {"timeout": True}):
        with pytest.raises(RequestError):
            core.infer(ask(0, 0, 0, **parameters), left_s=None)
    core.infer(ask(0, 0, 0, priority=99, timeout=10**9, other="x"), left_s=None)


def test_overload_and_deadline(serve: Serve) -> None:
    gate, told = Gate(), Told()
    core = serve(gate, ModelLimits(queue_max=2))
    core.submit(ask(1, 1, 1), told.done(0))
    assert gate.running.acquire(timeout=WAIT_S)
    core.submit(ask(2, 2, 2, timeout=1000), told.done(1))  # 1 ms, in Triton's microseconds
    told.wait(1)
    assert isinstance(told.outcomes[1], DeadlineError)
    core.submit(ask(3, 3, 3), told.done(2))
    core.submit(ask(4, 4, 4), told.done(3))
    with pytest.raises(OverloadError):
        core.submit(ask(5, 5, 5), told.done(4))
    with pytest.raises(OverloadError):
        core.infer(ask(5, 5, 5), left_s=None)
    for left_s in (0.0, -1.0):
        with pytest.raises(DeadlineError):
            core.infer(ask(5, 5, 5), left_s=left_s)
    gate.go.release(3)
    told.wait(3)
    assert [said(told.outcomes[i])[0] for i in (0, 2, 3)] == [1, 3, 4]
    (stats,) = core.statistics("", "")["model_stats"]
    assert stats["inference_stats"]["success"]["count"] == 3
    assert stats["inference_stats"]["fail"]["count"] == 3


def _note(order: list[int], number: int, outcome: Any) -> None:
    order.append(number)


def test_priority_of_a_request(serve: Serve) -> None:
    gate, told = Gate(), Told()
    core = serve(gate)
    core.submit(ask(0, 0, 0), told.done(0))
    assert gate.running.acquire(timeout=WAIT_S)
    order: list[int] = []
    for number, priority in ((1, 3), (2, 0), (3, 1)):  # 0: the default, which is 2 of 3
        core.submit(ask(0, 0, 0, priority=priority), partial(_note, order, number))
    gate.go.release(4)
    core.drain(WAIT_S)
    assert order == [3, 2, 1]


# ---- batches -----------------------------------------------------------------------------------


def together(core: LocalCore, gate: Gate, requests: Sequence[InferRequest]) -> dict[int, Any]:
    """Let requests wait until all are there, and return their outcomes."""
    told = Told()
    core.submit(ask(0, 0, 0), lambda _: None)
    assert gate.running.acquire(timeout=WAIT_S)
    for number, request in enumerate(requests):
        core.submit(request, told.done(number))
    gate.go.release(1000)
    told.wait(len(requests))
    return told.outcomes


def test_requests_of_one_shape_run_as_one(serve: Serve) -> None:
    gate = Gate()
    core = serve(gate, ModelLimits(batch_max=4))
    outcomes = together(core, gate, [ask(1, 1, 1), ask(2, 2, 2, 3, 3, 3), ask(4, 4, 4)])
    assert [said(outcomes[i]) for i in range(3)] == [[1] * 3, [2] * 3 + [3] * 3, [4] * 3]
    assert gate.shapes == [(1, 3), (4, 3)]
    (stats,) = core.statistics("m", "")["model_stats"]
    assert stats["inference_count"] == 5
    assert stats["execution_count"] == 2
    batches = [
        (each["batch_size"], each["compute_infer"]["count"]) for each in stats["batch_stats"]
    ]
    assert batches == [(1, 1), (4, 1)]


def test_one_bad_request_fails_alone(serve: Serve) -> None:
    gate = Gate()
    core = serve(gate, ModelLimits(batch_max=4))
    bad = ask(1, 1, 1)._replace(inputs=(X._replace(data=b"\xff" * 12),))
    outcomes = together(core, gate, [ask(1, 1, 1), bad, ask(2, 2, 2)])
    assert said(outcomes[0]) == [1, 1, 1]
    assert isinstance(outcomes[1], ModelError)
    assert said(outcomes[2]) == [2, 2, 2]
    (stats,) = core.statistics("m", "")["model_stats"]
    assert stats["inference_stats"]["success"]["count"] == 3
    assert stats["inference_stats"]["fail"]["count"] == 1


def test_a_model_whose_rows_are_none_is_never_cut_wrong(serve: Serve, caplog: Any) -> None:
    """It is run one by one from then on, and says so."""
    gate = Gate(rows_lost=1)
    core = serve(gate, ModelLimits(batch_max=4))
    outcomes = together(core, gate, [ask(1, 1, 1), ask(2, 2, 2)])
    assert [said(outcomes[i])[0] for i in range(2)] == [1, 2]
    assert gate.shapes == [(1, 3), (2, 3), (1, 3), (1, 3)]
    assert "not run in batches" in caplog.text
    for left in (gate.go, gate.running):
        while left.acquire(blocking=False):
            pass
    outcomes = together(core, gate, [ask(3, 3, 3), ask(4, 4, 4)])
    assert [said(outcomes[i])[0] for i in range(2)] == [3, 4]
    assert gate.shapes[4:] == [(1, 3)] * 3


def test_texts_with_wrong_counts_do_not_mix(serve: Serve) -> None:
    """Two that are wrong by one each way would fit together, and swap an element."""
    spec = Spec("x", "string", (-1,))
    gate = Gate(inputs=(spec,), outputs=(spec,))
    core = serve(gate, ModelLimits(batch_max=8))
    first = InferInput("x", "BYTES", (2,), encode_bytes([b"a"]), None)
    second = InferInput("x", "BYTES", (2,), encode_bytes([b"b", b"c", b"d"]), None)
    told = Told()
    core.submit(InferRequest("m", "", (first,), (), {}), told.done(9))
    assert gate.running.acquire(timeout=WAIT_S)
    for number, each in enumerate((first, second)):
        core.submit(InferRequest("m", "", (each,), (), {}), told.done(number))
    gate.go.release(100)
    told.wait(3)
    assert gate.shapes == [(2,), (2,), (2,)]  # each alone, where the model refuses it


def test_batches_are_bounded_for_each_request(serve: Serve) -> None:
    core = serve(adder(), ModelLimits(batch_max=2))
    with pytest.raises(ModelInputError, match="batch-size must be <= 2 for 'm'"):
        core.infer(ask(*range(9)), left_s=None)


def test_inputs_of_a_batch_have_as_many_rows(serve: Serve) -> None:
    gate = Gate(inputs=(Spec("x"), Spec("z")))
    core = serve(gate, ModelLimits(batch_max=4))
    z = InferInput("z", "FP32", (2, 3), pack(*range(6)), None)
    with pytest.raises(ModelInputError, match="batch size does not match other inputs for 'm'"):
        core.infer(InferRequest("m", "", (X, z), (), {}), left_s=None)
    with pytest.raises(ModelInputError, match="an input is given twice"):
        core.infer(InferRequest("m", "", (X, X), (), {}), left_s=None)


@pytest.mark.parametrize(
    "facts",
    [
        {"stateful": True},
        {"inputs": (Spec(shape=(1, 3)),)},
        {"outputs": (Spec(shape=()),)},
        {"inputs": (Spec(type="int4"),)},
    ],
)
def test_models_that_cannot_be_served_so(serve: Serve, facts: dict[str, Any]) -> None:
    made = Gate(**facts)
    with pytest.raises(ModelError):
        serve(made, ModelLimits(batch_max=2))
    assert made.closed


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.binary(max_size=5), min_size=2, max_size=2), max_size=6), st.data())
def test_cutting_joins_again(rows: list[list[bytes]], data: st.DataObject) -> None:
    """Whatever a tensor is cut into, each part is its own rows."""
    counts, left = [], len(rows)
    while left:
        counts.append(data.draw(st.integers(1, left)))
        left -= counts[-1]
    whole = encode_bytes(each for row in rows for each in row)
    parts = split_rows(0, (len(rows), 2), whole, counts)
    at = 0
    for count, part in zip(counts, parts, strict=True):
        assert decode_bytes(part) == [each for row in rows[at : at + count] for each in row]
        at += count
    fixed = bytes(range(len(rows) * 4))
    assert b"".join(split_rows(2, (len(rows), 2), fixed, counts)) == fixed


# ---- shared memory, classification ---------------------------------------------------------------


def test_tensors_in_shared_memory(serve: Serve, tmp_path: Path) -> None:
    core = serve(adder())
    (tmp_path / "in").write_bytes(bytes(8) + pack(1, 2, 3))
    (tmp_path / "out").write_bytes(bytes(100))
    core.shm_register("i", "/in", 0, 20)
    core.shm_register("o", "/out", 4, 64)
    given = InferInput("x", "FP32", (1, 3), None, Region("i", 8, 12))
    wanted = WantedOutput("y", Region("o", 4, 40), 0)
    request = InferRequest("m", "", (given,), (wanted,), {})
    (output,) = core.infer(request, left_s=None).outputs
    assert (output.data, output.region, output.shape) == (None, Region("o", 4, 12), (1, 3))
    assert (tmp_path / "out").read_bytes() == bytes(8) + pack(2, 3, 4) + bytes(80)
    with pytest.raises(RequestError, match="should be at least 12 bytes"):
        core.infer(
            request._replace(outputs=(WantedOutput("y", Region("o", 0, 8), 0),)), left_s=None
        )
    with pytest.raises(ModelInputError, match="byte size 8, expected 12"):
        core.infer(
            request._replace(inputs=(given._replace(region=Region("i", 8, 8)),)), left_s=None
        )
    os.truncate(tmp_path / "in", 10)
    with pytest.raises(RequestError, match="not there any more"):
        core.infer(request, left_s=None)
    core.shm_unregister("")
    assert core.shm_status("") == {}
    with pytest.raises(RequestError, match="Unable to find shared memory region: 'i'"):
        core.infer(request, left_s=None)


def test_without_shared_memory(serve: Serve) -> None:
    core = serve(adder(), shm=False)
    assert "system_shared_memory" not in core.server_metadata()["extensions"]
    with pytest.raises(RequestError, match="not enabled"):
        core.shm_register("r", "/x", 0, 1)


def test_classification_of_a_model(serve: Serve) -> None:
    core = serve(adder(), ModelLimits(batch_max=4))
    wanted = (WantedOutput("y", None, 2),)
    (output,) = core.infer(ask(1, 3, 2, 6, 4, 5, outputs=wanted), left_s=None).outputs
    assert (output.datatype, output.shape) == ("BYTES", (2, 2))
    assert output.data is not None
    assert decode_bytes(output.data) == [b"4.000000:1", b"3.000000:2", b"7.000000:0", b"6.000000:2"]


@pytest.mark.parametrize(
    ("datatype", "data", "batch", "classes", "shape", "said"),
    [
        ("INT8", b"\xff\x05\x05", None, 2, (2,), [b"5:1", b"5:2"]),
        ("INT8", b"\xff\x05\x05", None, 9, (3,), [b"5:1", b"5:2", b"-1:0"]),
        ("FP16", b"\x00\x3c\x00\x40", 2, 1, (2, 1), [b"1.000000:0", b"2.000000:0"]),
        ("BF16", b"\x80\x3f\x00\x40", None, 1, (1,), [b"2.000000:1"]),
        ("FP32", pack(float("nan"), -1, float("inf")), None, 3, (3,),
         [b"inf:2", b"-1.000000:1", b"nan:0"]),
        ("FP32", b"", 0, 3, (0, 0), []),
        ("UINT64", b"\xff" * 8 + b"\xfe" + b"\xff" * 7, None, 1, (1,), [b"%d:0" % (2**64 - 1)]),
    ],
)  # fmt: skip
def test_classes(
    datatype: str, data: bytes, batch: int | None, classes: int, shape: Any, said: list[bytes]
) -> None:
    found, encoded = classify(datatype, data, batch, classes)
    assert (found, decode_bytes(encoded)) == (shape, said)


# ---- what it says of itself ---------------------------------------------------------------------


def test_metadata_and_config(serve: Serve) -> None:
    core = serve(adder(), ModelLimits(batch_max=4, batch_wait_us=300, workers=2))
    metadata = core.model_metadata("m", "1")
    assert metadata["versions"] == ["1"]
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    config = core.model_config("m", "")
    assert config["max_batch_size"] == 4
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [3]}]
    assert config["output"] == [{"name": "y", "data_type": "TYPE_FP32", "dims": [3]}]
    assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 300
    assert config["instance_group"][0]["count"] == 2


def test_config_without_batches_says_the_whole_shape(serve: Serve) -> None:
    config = serve(adder()).model_config("m", "")
    assert config["max_batch_size"] == 0
    assert config["input"][0]["dims"] == [-1, 3]
    assert "dynamic_batching" not in config


def test_statistics_add_up(serve: Serve) -> None:
    core = serve(adder())
    for _ in range(3):
        core.infer(ask(0, 0, 0), left_s=None)
    (stats,) = core.statistics("m", "")["model_stats"]
    assert (stats["name"], stats["version"]) == ("m", "1")
    assert (stats["inference_count"], stats["execution_count"]) == (3, 3)
    assert stats["last_inference"] > 1_600_000_000_000  # milliseconds, after 2020
    parts = stats["inference_stats"]
    whole = sum(
        parts[p]["ns"] for p in ("queue", "compute_input", "compute_infer", "compute_output")
    )
    assert parts["success"] == {"count": 3, "ns": whole}


# ---- the end ------------------------------------------------------------------------------------


def test_drain_ends_what_waits_and_refuses_what_comes(serve: Serve) -> None:
    gate, told = Gate(), Told()
    core = serve(gate)
    core.submit(ask(1, 1, 1), told.done(0))
    assert gate.running.acquire(timeout=WAIT_S)
    core.submit(ask(2, 2, 2), told.done(1))
    drain = threading.Thread(target=core.drain, args=(WAIT_S,))
    drain.start()
    refused = False
    while not refused:
        try:
            core.submit(ask(3, 3, 3), lambda _: None)
        except (ModelClosedError, UnknownModelError, OverloadError) as error:
            refused = isinstance(error, ModelClosedError)
    assert not core.ready()
    gate.go.release(100)
    drain.join(WAIT_S)
    assert not drain.is_alive()
    assert [said(told.outcomes[i])[0] for i in (0, 1)] == [1, 2]
    assert gate.closed


def test_drain_gives_up_in_time(serve: Serve) -> None:
    gate, told = Gate(), Told()
    core = serve(gate)
    core.submit(ask(1, 1, 1), told.done(0))
    assert gate.running.acquire(timeout=WAIT_S)
    core.submit(ask(2, 2, 2), told.done(1))
    core.drain(0.0)
    assert isinstance(told.outcomes[1], ModelClosedError)
    gate.go.release()
    told.wait(2)


def test_threads_and_files_are_gone_after_the_end(serve: Serve, tmp_path: Path) -> None:
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    core, told = serve(adder(), ModelLimits(workers=3)), Told()
    (tmp_path / "in").write_bytes(bytes(8))
    core.shm_register("i", "/in", 0, 8)
    for number in range(5):
        core.submit(ask(0, 0, 0), told.done(number))
    told.wait(5)
    core.drain(WAIT_S)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_nothing_heavy_is_imported() -> None:
    """A server without gRPC stays small: 60 MB is less than NumPy and grpc take."""
    program = (
        "import sys, shoal.agent.local.core, shoal.agent.runtime\n"
        "heavy = {'numpy', 'grpc', 'google.protobuf', 'asyncio', 'onnxruntime', 'onnx'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == ""
