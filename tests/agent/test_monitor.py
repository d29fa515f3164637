"""The monitor: windows of sketches, and labels that come late."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from shoal.agent.monitor import MonitorConfig, WindowMonitor
from shoal.agent.runtime import Runtime
from shoal.ext.sketch import SketchBank
from shoal.proto.records import Kind, check_body

EDGES = [np.array([-1.0, 0.0, 1.0], np.float32)] * 2 + [np.array([0.5, 0.9], np.float32)]


class Bench:
    """A monitor with a clock in hand and its records in a list."""

    def __init__(self, *, samples: int = 10, **config: Any) -> None:
        self.now_ms = 1_000_000
        self.told: list[tuple[Kind, dict[str, Any]]] = []
        self.monitor = WindowMonitor(
            model_sha256="a" * 64,
            inputs=["x"],
            outputs=["p"],
            input_name="x",
            output_name="p",
            samples=samples,
            classes=2,
            edges=EDGES,
            config=MonitorConfig(**config),
            emit=self._emit,
            clock=lambda: self.now_ms,
        )

    def _emit(self, kind: Kind, body: dict[str, Any]) -> None:
        check_body(kind, body)  # every record is one that the contract takes
        self.told.append((kind, body))

    def see(self, predicted: int, *, value: float = 0.5) -> None:
        """Observe one window and an answer of 0.8."""
        x = np.full((1, 2, 10), value, np.float32)
        p = np.full((1, 2), 0.2, np.float32)
        p[0, predicted] = 0.8
        self.monitor.observe({"x": x}, {"p": p}, 5_000)

    def of(self, kind: Kind) -> list[dict[str, Any]]:
        """Return the bodies of one kind."""
        return [body for each, body in self.told if each is kind]


def test_a_full_window_is_told_and_counts_everything() -> None:
    """Sketches of both channels and of the confidence, classes, latency."""
    bench = Bench(window_predictions=3)
    for predicted in (0, 1, 1, 0):
        bench.see(predicted)
    (window,) = bench.of(Kind.WINDOW)
    assert (window["index"], window["predictions"], window["errors"]) == (0, 3, 0)
    assert window["classes"] == [1, 2] and sum(window["latency_us"]) == 3
    bank = SketchBank.from_bytes(window["sketch"])
    assert [bank.counts(i).tolist() for i in range(3)] == [[0, 0, 30, 0], [0, 0, 30, 0], [0, 3, 0]]
    assert bank.moments(2).count == 3


def test_time_ends_a_window_too() -> None:
    """A slow device tells a short window rather than none; an empty one is not told."""
    bench = Bench(window_predictions=100, window_s=10)
    bench.now_ms += 11_000
    bench.monitor.tick()
    assert bench.told == []
    bench.see(0)
    bench.now_ms += 11_000
    bench.monitor.tick()
    assert [w["predictions"] for w in bench.of(Kind.WINDOW)] == [1]


def test_errors_are_counted_in_their_window() -> None:
    """A window of errors alone is told as well."""
    bench = Bench(window_predictions=100)
    bench.monitor.failed()
    bench.monitor.finish()
    (window,) = bench.of(Kind.WINDOW)
    assert (window["predictions"], window["errors"]) == (0, 1)


def test_labels_are_told_when_the_last_of_a_window_came() -> None:
    """One record for each split, with its confusion table, after the window itself."""
    bench = Bench(window_predictions=3)
    for predicted in (0, 1, 1):
        bench.see(predicted)
    bench.monitor.label(0, 0, 0)
    bench.monitor.label(2, 0, 2)
    assert bench.of(Kind.LABELS) == []
    bench.monitor.label(1, 1, 2)
    first, second = bench.of(Kind.LABELS)
    assert (first["split"], first["labelled"], first["correct"]) == (0, 1, 1)
    assert (second["split"], second["labelled"], second["correct"]) == (2, 2, 1)
    assert second["confusion"] == [0, 1, 0, 1]


def test_labels_that_nobody_waits_for_are_counted() -> None:
    """Unknown, repeated and given-up predictions change no table."""
    bench = Bench(window_predictions=2, pending_max=2)
    for _ in range(4):
        bench.see(0)
    for prediction in (0, 99, 3, 3):
        bench.monitor.label(prediction, 0, 0)
    assert bench.monitor.labels_missed == 3
    bench.monitor.flush_labels()
    assert sum(each["labelled"] for each in bench.of(Kind.LABELS)) == 1


@given(
    st.integers(1, 7),
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2), st.booleans()), max_size=40),
    st.randoms(),
)
def test_every_prediction_and_label_is_told_exactly_once(
    size: int, answers: list[tuple[int, int, bool]], rng: Any
) -> None:
    """Whatever the order of labels: sums over records equal what went in."""
    bench = Bench(window_predictions=size)
    for predicted, _, _ in answers:
        bench.see(predicted)
    late = [i for i, (_, _, labelled) in enumerate(answers) if labelled]
    rng.shuffle(late)
    for prediction in late:
        bench.monitor.label(prediction, 1, answers[prediction][1])
    bench.monitor.finish()
    bench.monitor.flush_labels()
    windows, labels = bench.of(Kind.WINDOW), bench.of(Kind.LABELS)
    assert sum(each["predictions"] for each in windows) == len(answers)
    assert [each["index"] for each in windows] == list(range(len(windows)))
    assert sum(each["labelled"] for each in labels) == len(late)
    assert sum(each["correct"] for each in labels) == sum(answers[i][0] for i in late)


@given(st.integers(0, 2**32), st.sampled_from([1, 7, 64, 150]), st.sampled_from([3, 400]))
@settings(max_examples=20, deadline=None)
def test_inside_the_step_it_counts_as_outside(seed: int, count: int, samples: int) -> None:
    """Windows small enough to be put by, and larger ones, are told as if seen one by one."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[2], keepdims=0),
        helper.make_node("Softmax", ["m"], ["p"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, samples])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, [1, 2])],
    )
    data = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    rng = np.random.default_rng(seed)
    inside = Bench(samples=samples, window_predictions=50)
    outside = Bench(samples=samples, window_predictions=50)
    with Runtime() as runtime:
        model = runtime.load(data, backend="ort", monitor=inside.monitor)
        plain = runtime.load(data, backend="ort")
        for _ in range(count):
            inputs = {"x": rng.normal(size=(1, 2, samples)).astype(np.float32)}
            model.infer(inputs)
            outside.monitor.observe(inputs, plain.infer(inputs), 5_000)
    for bench in (inside, outside):
        bench.monitor.finish()
    windows = [
        [
            {**each, "latency_us": sum(each["latency_us"]), "sketch": counted(each["sketch"])}
            for each in bench.of(Kind.WINDOW)
        ]
        for bench in (inside, outside)
    ]
    assert windows[0] == windows[1] and sum(each["predictions"] for each in windows[0]) == count


def counted(sketch: bytes) -> list[object]:
    """Return what a record holds but for the picks of its sketches, which its own coins chose."""
    bank = SketchBank.from_bytes(sketch)
    return [
        (bank.counts(i).tolist(), bank.nulls(i), bank.moments(i)) for i in range(bank.features)
    ]


def test_an_answer_that_is_not_finite_is_not_counted() -> None:
    """Its owner calls it an error; no class and no confidence is invented for it."""
    bench = Bench(window_predictions=2)
    x = np.zeros((1, 2, 10), np.float32)
    bench.monitor.observe({"x": x}, {"p": np.array([[np.nan, 1.0]], np.float32)}, 5_000)
    assert bench.monitor.predictions == 0
    bench.see(1)
    assert bench.monitor.predictions == 1
