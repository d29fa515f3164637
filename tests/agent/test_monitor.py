"""The monitor: windows of sketches, and labels that come late."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shoal.agent.monitor import MonitorConfig, WindowMonitor
from shoal.ext.sketch import SketchBank
from shoal.proto.records import Kind, check_body

EDGES = [np.array([-1.0, 0.0, 1.0], np.float32)] * 2 + [np.array([0.5, 0.9], np.float32)]


class Bench:
    """A monitor with a clock in hand and its records in a list."""

    def __init__(self, **config: Any) -> None:
        self.now_ms = 1_000_000
        self.told: list[tuple[Kind, dict[str, Any]]] = []
        self.monitor = WindowMonitor(
            model_sha256="a" * 64,
            inputs=["x"],
            outputs=["p"],
            input_name="x",
            output_name="p",
            samples=10,
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
