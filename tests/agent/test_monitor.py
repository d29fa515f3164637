"""The monitor: windows of sketches, and labels that come late."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from shoal import ShoalError
from shoal.agent import window_fit
from shoal.agent.capture import CaptureConfig
from shoal.agent.monitor import MonitorConfig, WindowMonitor, WindowNumbers
from shoal.agent.profile import DeviceProfile, DeviceProjection
from shoal.agent.runtime import Runtime
from shoal.ext.sketch import SketchBank
from shoal.proto.records import Kind, check_body

PROFILE = DeviceProfile(
    names=("a", "b", "confidence"),
    edges=(np.array([-1, 0, 1], np.float32),) * 2 + (np.array([0.5, 0.9], np.float32),),
    kinds=("float",) * 3,
    low__d=np.array([-5, -5, 0], np.float32),
    high__d=np.array([5, 5, 1], np.float32),
    deciles__9=np.linspace(0.1, 0.9, 9, dtype=np.float32),
    projection=None,
)


class Bench:
    """A monitor with a clock in hand and its records in a list."""

    def __init__(
        self,
        *,
        samples: int = 10,
        profile: DeviceProfile = PROFILE,
        numbers: WindowNumbers | None = None,
        classes: int = 2,
        values: int = 1,
        **config: Any,
    ) -> None:
        self.now_ms = 1_000_000
        self.mono_s = 0.0
        self.told: list[tuple[Kind, dict[str, Any]]] = []
        self.monitor = WindowMonitor(
            model_sha256="a" * 64,
            inputs=["x"],
            outputs=["p"],
            input_name="x",
            output_name="p",
            samples=samples,
            classes=classes,
            values=values,
            profile=profile,
            config=MonitorConfig(**{"cpu_share_max": 1.0} | config),
            emit=self._emit,
            clock=lambda: self.now_ms,
            monotonic=lambda: self.mono_s,
            numbers=numbers,
            chance=random.Random(7).random,
        )

    def _emit(self, kind: Kind, body: dict[str, Any]) -> None:
        check_body(kind, body)  # every record is one that the contract takes
        self.told.append((kind, body))

    def see(
        self, predicted: int, *, value: float = 0.5, confidence: float = 0.8, slice: str = ""
    ) -> None:
        """Observe one window and an answer."""
        x = np.full((1, 2, 10), value, np.float32)
        p = np.full((1, 2), 1 - confidence, np.float32)
        p[0, predicted] = confidence
        self.monitor.observe({"x": x}, {"p": p}, 5_000, slice)

    def of(self, kind: Kind) -> list[dict[str, Any]]:
        """Return the bodies of one kind."""
        return [body for each, body in self.told if each is kind]


def averager(samples: int) -> bytes:
    """Return a model of two classes; any number of samples if it is negative."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[2], keepdims=0),
        helper.make_node("Softmax", ["m"], ["p"], axis=1),
    ]
    size: int | str = samples if samples > 0 else "samples"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, size])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, [1, 2])],
    )
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return data


@pytest.mark.parametrize("at", ["body", "emit"])
def test_a_window_that_cannot_be_told_is_counted_and_the_next_one_begins(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever called the model does not hear of it; labels of the lost window are missed."""
    bench = Bench(window_predictions=3)

    def broken(*_: Any) -> Any:
        raise ShoalError("no room in the record")

    with monkeypatch.context() as patched:
        patched.setattr(bench.monitor, f"_{at}", broken)
        for predicted in (0, 1, 1):
            bench.see(predicted)
    assert bench.told == [] and bench.monitor.withheld == 3
    bench.monitor.label(0, 0, 2)
    for predicted in (0, 1, 0):
        bench.see(predicted)
    assert [body["predictions"] for body in bench.of(Kind.WINDOW)] == [3]
    assert bench.monitor.withheld == 3 and bench.monitor.labels_missed == 1
    bench.monitor.label(3, 0, 2)
    bench.monitor.flush_labels()
    assert [body["labelled"] for body in bench.of(Kind.LABELS)] == [1]


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
    data = averager(samples)
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
    return [(bank.counts(i).tolist(), bank.nulls(i), bank.moments(i)) for i in range(bank.features)]


def test_an_answer_that_is_not_finite_is_not_counted() -> None:
    """Its owner calls it an error; no class and no confidence is invented for it."""
    bench = Bench(window_predictions=2)
    x = np.zeros((1, 2, 10), np.float32)
    bench.monitor.observe({"x": x}, {"p": np.array([[np.nan, 1.0]], np.float32)}, 5_000)
    assert bench.monitor.predictions == 0
    bench.see(1)
    assert bench.monitor.predictions == 1


# --- clocks ----------------------------------------------------------------------------------

YEAR_MS = 365 * 86_400_000


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),  # predictions
            st.one_of(st.integers(-20_000, 20_000), st.sampled_from([-9 * YEAR_MS, 9 * YEAR_MS])),
            st.floats(0, 20),
        ),
        max_size=40,
    ),
    st.sampled_from([0, 2, 5]),
    st.sampled_from([0.0, 10.0]),
)
@settings(deadline=None)
def test_every_prediction_is_in_one_window_whatever_the_clock_does(
    steps: list[tuple[int, int, float]], size: int, window_s: float
) -> None:
    """Jumps of years, back and forth, a clock that stands still: sums and numbers hold."""
    if not size and not window_s:
        return
    bench = Bench(window_predictions=size, window_s=window_s)
    made = 0
    for count, jump_ms, elapsed_s in steps:
        for _ in range(count):
            bench.see(made % 2, value=made % 7)
            made += 1
        bench.now_ms += jump_ms
        bench.mono_s += elapsed_s
    bench.monitor.finish()
    windows = bench.of(Kind.WINDOW)
    assert sum(each["predictions"] for each in windows) == made == bench.monitor.predictions
    assert [each["index"] for each in windows] == list(range(len(windows)))
    banks = [SketchBank.from_bytes(each["sketch"]) for each in windows]
    assert sum(int(bank.counts(2).sum()) for bank in banks) == made
    for each in windows:
        assert 0 <= each["end_ms"] - each["start_ms"] <= sum(s for _, _, s in steps) * 1000
        assert each["aligned_ms"] == each["start_ms"] // 10_000 * 10_000 * (window_s > 0)
        if size:
            assert each["predictions"] <= size


def test_windows_start_at_multiples_of_their_length() -> None:
    """Devices that never heard of each other cut time at the same moments."""
    told = []
    for offset_ms in (0, 3_210, 9_999):
        bench = Bench(window_predictions=0, window_s=10)
        bench.now_ms = 5_000_000 + offset_ms
        bench.monitor.tick()
        while bench.now_ms < 5_030_000:
            bench.see(0)
            bench.now_ms += 500
            bench.mono_s += 0.5
        bench.monitor.tick()
        told.append([each["aligned_ms"] for each in bench.of(Kind.WINDOW)])
    assert told == [[5_000_000, 5_010_000, 5_020_000]] * 3


def test_a_clock_that_stands_still_does_not_hold_a_window_open() -> None:
    """The monotonic clock ends it; its length is told as it was."""
    bench = Bench(window_predictions=0, window_s=10)
    bench.see(0)
    bench.mono_s += 9.5
    bench.monitor.tick()
    assert bench.of(Kind.WINDOW) == []
    bench.mono_s += 0.5
    bench.see(1)
    (window,) = bench.of(Kind.WINDOW)
    assert (window["predictions"], window["end_ms"] - window["start_ms"]) == (1, 10_000)


def test_a_prediction_after_a_pause_is_not_counted_in_the_window_before_it() -> None:
    """Inside the step too: the clock is looked at before the call."""
    bench = Bench(samples=3, window_predictions=0, window_s=10)
    with Runtime() as runtime:
        model = runtime.load(averager(3), backend="ort", monitor=bench.monitor)
        for _ in range(3):
            model.infer({"x": np.zeros((1, 2, 3), np.float32)})
            bench.now_ms += 10_000
    bench.monitor.finish()
    windows = bench.of(Kind.WINDOW)
    assert [each["predictions"] for each in windows] == [1, 1, 1]
    assert [each["aligned_ms"] for each in windows] == [1_000_000, 1_010_000, 1_020_000]


def test_a_model_that_comes_back_goes_on_with_its_numbers() -> None:
    """Replaced in the middle of a window and loaded again in one boot: no number is used twice."""
    numbers = WindowNumbers()
    told: list[tuple[str, int, int]] = []
    for _ in range(3):
        bench = Bench(window_predictions=4, numbers=numbers)
        for _ in range(6):
            bench.see(0)
        bench.monitor.finish()
        told += [(each["model"], each["index"], each["predictions"]) for _, each in bench.told]
    assert told == [("a" * 64, index, (4, 2)[index % 2]) for index in range(6)]


# --- slices ----------------------------------------------------------------------------------


@given(
    st.integers(1, 7),
    st.integers(0, 3),
    st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 1), st.booleans()), max_size=40),
    st.randoms(),
)
@settings(deadline=None)
def test_slices_are_windows_of_their_own(
    size: int, most: int, answers: list[tuple[str, int, bool]], rng: Any
) -> None:
    """Predictions and labels are told in their slice once; tags beyond the bound share one."""
    bench = Bench(window_predictions=size, slice_max=most)
    own = list(dict.fromkeys(tag for tag, _, _ in answers))[:most]
    for tag, predicted, _ in answers:
        bench.see(predicted, slice=tag)
    late = [i for i, (_, _, labelled) in enumerate(answers) if labelled]
    rng.shuffle(late)
    for i in late:
        bench.monitor.label(i, 1, 0)
    bench.monitor.finish()
    bench.monitor.flush_labels()
    windows, labels = bench.of(Kind.WINDOW), bench.of(Kind.LABELS)
    tags = {each["slice"] for each in windows}
    assert len(tags) <= most + 1 and tags <= {*own, "other"}
    assert bench.monitor.slices_over == sum(tag not in own for tag, _, _ in answers)
    assert bench.monitor.labels_missed == 0
    for tag in tags:
        mine = [
            i
            for i, answer in enumerate(answers)
            if tag == (answer[0] if answer[0] in own else "other")
        ]
        of_tag = [each for each in windows if each["slice"] == tag]
        assert sum(each["predictions"] for each in of_tag) == len(mine)
        assert [each["index"] for each in of_tag] == list(range(len(of_tag)))
        # each label is told with the very window that has its prediction
        for each in of_tag:
            first = each["index"] * size
            members = mine[first : first + each["predictions"]]
            told = [b for b in labels if (b["slice"], b["index"]) == (tag, each["index"])]
            assert sum(b["labelled"] for b in told) == sum(answers[i][2] for i in members)
            assert sum(b["correct"] for b in told) == sum(
                answers[i][2] and answers[i][1] == 1 for i in members
            )


def test_the_runtime_takes_the_slice_with_the_call() -> None:
    """Calls of several threads may be of different slices: the tag belongs to the call."""
    bench = Bench(samples=3, window_predictions=0, window_s=0.001 * 86_400)
    x = np.zeros((1, 2, 3), np.float32)
    with Runtime() as runtime:
        model = runtime.load(averager(3), backend="ort", monitor=bench.monitor)
        plain = runtime.load(averager(3), backend="ort")

        def work(tag: str | None) -> None:
            for _ in range(100):
                model.infer({"x": x}, slice=tag)

        pool = [threading.Thread(target=work, args=(tag,)) for tag in (None, "day", "night")]
        for each in pool:
            each.start()
        for each in pool:
            each.join()
        model.infer_into({"x": x}, {"p": np.empty((1, 2), np.float32)}, slice="day")
        model.infer_raw({"x": ((1, 2, 3), x.tobytes())}, slice="night")
        for wrong in ("x" * 41, 5):
            with pytest.raises(ValueError, match="a slice tag is text"):
                model.infer({"x": x}, slice=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="no monitor that keeps slices"):
            plain.infer({"x": x}, slice="day")
    bench.monitor.finish()
    found = {body.get("slice", ""): body["predictions"] for body in bench.of(Kind.WINDOW)}
    assert found == {"": 100, "day": 101, "night": 101}


def test_threads_lose_no_prediction_when_windows_end() -> None:
    """A window is read and begun anew while others wait: sums hold over hundreds of ends."""
    bench = Bench(samples=3, window_predictions=7)
    x = np.zeros((1, 2, 3), np.float32)
    with Runtime() as runtime:
        model = runtime.load(averager(3), backend="ort", monitor=bench.monitor)
        pool = [
            threading.Thread(target=lambda: [model.infer({"x": x}) for _ in range(700)])
            for _ in range(3)
        ]
        for each in pool:
            each.start()
        for each in pool:
            each.join()
    bench.monitor.finish()
    windows = bench.of(Kind.WINDOW)
    assert sum(window["predictions"] for window in windows) == 2100
    for window in windows:
        assert SketchBank.from_bytes(window["sketch"]).moments(2).count == window["predictions"]


# --- labels, quality, scores -----------------------------------------------------------------


def test_scores_and_calibration_are_by_confidence_decile() -> None:
    """A confidence on an edge is in the bin above it, as in the profile."""
    bench = Bench(window_predictions=4)
    for predicted, confidence in ((0, 0.8), (1, 0.55), (1, 0.95), (1, 0.55)):
        bench.see(predicted, confidence=confidence)
    for prediction, truth in ((0, 0), (1, 0), (2, 1), (3, 1)):
        bench.monitor.label(prediction, truth, 2)
    (window,), (labels,) = bench.of(Kind.WINDOW), bench.of(Kind.LABELS)
    scores = np.array(window["scores"]).reshape(2, 10)
    assert scores[0].tolist() == [0] * 8 + [1, 0] and scores[1].tolist() == [0] * 5 + [
        2,
        0,
        0,
        0,
        1,
    ]
    wrong, right = np.array(labels["calibration"]).reshape(2, 10)
    assert wrong.tolist() == [0] * 5 + [1] + [0] * 4
    assert right.tolist() == [0] * 5 + [1, 0, 0, 1, 1]


def test_windows_count_what_a_broken_sensor_does() -> None:
    """Below and above the profile's range, stuck, null; outputs count none of it."""
    bench = Bench(window_predictions=6, stuck_min=20)
    for value in (-6.0, 7.0, np.nan, 0.5, 0.5, 2.5):
        bench.see(0, value=value)
    (window,) = bench.of(Kind.WINDOW)
    quality = window["quality"]
    assert (quality["below"], quality["above"]) == ([10, 10, 0], [10, 10, 0])
    assert (quality["stuck"], quality["schema"]) == ([20, 20, 0], [0])
    assert SketchBank.from_bytes(window["sketch"]).nulls(0) == 10


def test_calls_that_do_not_fit_are_counted() -> None:
    """From the runtime's step, from arrays, and as the owner says it."""
    bench = Bench(samples=4, window_predictions=10)
    with Runtime() as runtime:
        model = runtime.load(averager(-1), backend="ort", monitor=bench.monitor)
        model.infer({"x": np.zeros((1, 2, 5), np.float32)})
        model.infer({"x": np.zeros((1, 2, 4), np.float32)})
    p = np.full((1, 2), 0.5, np.float32)
    bench.monitor.observe({"x": np.zeros((1, 2, 4))}, {"p": p}, 1)
    bench.monitor.observe({"x": np.zeros((1, 3, 4), np.float32)}, {"p": p}, 1)
    bench.monitor.misfit()
    bench.monitor.finish()
    (window,) = bench.of(Kind.WINDOW)
    assert (window["predictions"], window["quality"]["schema"]) == (1, [4])


def test_the_rate_adds_up_over_windows_and_slices() -> None:
    """Expected and seen since the last that was told; silence is told too."""
    bench = Bench(window_predictions=0, window_s=10, rate_hz=2)
    for step in range(30):
        if step < 20:
            bench.see(0, slice="ab"[step % 2])
        bench.mono_s += 0.75
        bench.now_ms += 750
        bench.monitor.tick()
    bench.mono_s, bench.now_ms = bench.mono_s + 20, bench.now_ms + 20_000
    bench.monitor.tick()
    rates = [each["quality"].get("rate") for each in bench.of(Kind.WINDOW)]
    told = [each for each in rates if each is not None]
    assert sum(seen for _, seen in told) == 20
    assert sum(expected for expected, _ in told) == int(bench.mono_s * 2)
    assert told[-1][1] == 0 and bench.of(Kind.WINDOW)[-1]["predictions"] == 0


def test_a_model_that_is_no_classifier_is_watched_too() -> None:
    """Its output values are features; it has no classes, scores or labels."""
    profile = DeviceProfile(
        names=("a", "b", "out0", "out1"),
        edges=(np.array([0], np.float32),) * 4,
        kinds=("float",) * 4,
        low__d=np.full(4, -1, np.float32),
        high__d=np.full(4, 1, np.float32),
        deciles__9=np.linspace(0.1, 0.9, 9, dtype=np.float32),
        projection=None,
    )
    bench = Bench(profile=profile, classes=0, values=2, window_predictions=3)
    for value in (-5.0, 2.0, 3.0):
        bench.monitor.observe(
            {"x": np.zeros((1, 2, 10), np.float32)},
            {"p": np.array([[value, -value]], np.float32)},
            1,
        )
    bench.monitor.label(0, 1, 0)
    (window,) = bench.of(Kind.WINDOW)
    bank = SketchBank.from_bytes(window["sketch"])
    assert [bank.counts(i).tolist() for i in (2, 3)] == [[1, 2], [2, 1]]
    assert bank.moments(2).minimum == -5 and bank.moments(3).maximum == 5
    assert window["classes"] == [] and "scores" not in window
    assert bench.monitor.labels_missed == 1


def test_random_features_travel_with_the_window() -> None:
    """Sums as float32, and how many rows are in them."""
    projection = DeviceProjection(
        weights__fc=np.array([[0.5, -1.0], [2.0, 0.0]], np.float32),
        phases__f=np.array([0.0, 1.0], np.float32),
        mean__c=np.zeros(2, np.float32),
        scale__c=np.ones(2, np.float32),
        stride=4,
    )
    bench = Bench(profile=replace(PROFILE, projection=projection), window_predictions=2)
    for value in (0.25, 1.0):
        bench.see(0, value=value)
    (window,) = bench.of(Kind.WINDOW)
    rows = np.repeat([0.25, 1.0], 3)  # samples 0, 4 and 8 of each window
    want = [np.cos(rows * -0.5).sum(), np.cos(rows * 2 + 1).sum()]
    assert window["projected"] == 6
    np.testing.assert_allclose(np.frombuffer(window["projection"], "<f4"), want, rtol=1e-5)


# --- privacy, captures, budget ---------------------------------------------------------------


def test_a_window_with_too_few_predictions_goes_on() -> None:
    """It is told when it has enough, with how often it was put off; never if it stays small."""
    bench = Bench(window_predictions=0, window_s=10, window_min=5)
    for _ in range(3):
        for _ in range(2):
            bench.see(0)
        bench.now_ms += 10_000
        bench.monitor.tick()
    (window,) = bench.of(Kind.WINDOW)
    assert (window["predictions"], window["carried"], window["aligned_ms"]) == (6, 2, 1_000_000)
    bench.see(1)
    bench.monitor.label(6, 1, 0)
    bench.monitor.flush_labels()
    bench.monitor.finish()
    bench.monitor.label(2, 0, 0)
    bench.monitor.flush_labels()
    assert len(bench.of(Kind.WINDOW)) == 1 and bench.monitor.withheld == 1
    assert [each["labelled"] for each in bench.of(Kind.LABELS)] == [1]


def test_bins_alone_hold_no_value_that_was_seen() -> None:
    """Neither the sketch nor an extreme nor a mean of random features."""
    secret = 0.123456789
    bench = Bench(window_predictions=3, bins_only=True)
    for _ in range(3):
        bench.see(0, value=secret)
    (window,) = bench.of(Kind.WINDOW)
    assert window["bins_only"] is True and "projection" not in window
    for form in ("<f4", "<f8"):
        assert np.array(np.float32(secret), form).tobytes() not in window["sketch"]
    bank = SketchBank.from_bytes(window["sketch"])
    assert bank.counts(0).tolist() == [0, 0, 30, 0]
    with pytest.raises(ValueError, match="capture is on"):
        MonitorConfig(bins_only=True, capture=CaptureConfig(bytes_per_day=9999, random_share=1))


def test_scores_go_before_the_sketch_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A record without them is told, counted, and said once for the model."""
    bench = Bench(window_predictions=2)
    monkeypatch.setattr(window_fit, "room", lambda body: 0 if "scores" in body else 300)
    for _ in range(6):
        bench.see(1)
    windows = bench.of(Kind.WINDOW)
    assert [each["classes"] for each in windows] == [[0, 2]] * 3
    assert all(each["bins_only"] and "scores" not in each for each in windows)
    monitor = bench.monitor
    assert (monitor.bins_alone, monitor.curtailed, monitor.withheld) == (3, 3, 0)
    assert monitor.sketch_hindrance.startswith("bins alone, no scores: 3 features x 3 edges")
    assert len([each for each in caplog.messages if "no scores" in each]) == 1


def refuse(*_: Any) -> None:
    """Take no record, as a spool without room."""
    raise ShoalError("the spool has no room")


@pytest.mark.parametrize("refused", [False, True], ids=["does not fit", "is refused"])
def test_the_rate_of_a_window_that_is_not_sent_is_told_with_the_next(
    refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is expected and what came add up though a window is missing."""
    bench = Bench(window_predictions=2, rate_hz=1.0)
    with monkeypatch.context() as patched:
        if refused:
            patched.setattr(bench.monitor, "_emit", refuse)
        else:
            patched.setattr(window_fit, "room", lambda body: -1)
        bench.mono_s += 3
        for _ in range(2):
            bench.see(0)
    bench.mono_s += 4
    for _ in range(2):
        bench.see(0)
    (window,) = bench.of(Kind.WINDOW)
    assert window["quality"]["rate"] == [7, 4] and bench.monitor.withheld == 2


def test_labels_that_are_refused_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who brings a label does not hear of it; the increment after it is told."""
    bench = Bench(window_predictions=2)
    for _ in range(4):
        bench.see(0)
    with monkeypatch.context() as patched:
        patched.setattr(bench.monitor, "_emit", refuse)
        bench.monitor.label(0, 0, 2)
        bench.monitor.label(1, 1, 2)
        bench.monitor.label(2, 0, 2)
        bench.monitor.flush_labels()
    assert (bench.monitor.labels_missed, bench.of(Kind.LABELS)) == (3, [])
    bench.monitor.label(3, 0, 2)
    assert [each["labelled"] for each in bench.of(Kind.LABELS)] == [1]
    assert bench.monitor.labels_missed == 3


@pytest.mark.parametrize("classes", [64, 65, 1024])
def test_labels_of_many_classes_are_told_as_right_or_wrong(classes: int) -> None:
    """A record holds the confusion of 64 classes; more are no reason to lose the accuracy."""
    bench = Bench(classes=classes, window_predictions=2)
    for truth, said in ((0, 0), (1, classes - 1)):
        p = np.full((1, classes), 0.1 / classes, np.float32)
        p[0, said] = 0.9
        bench.monitor.observe({"x": np.zeros((1, 2, 10), np.float32)}, {"p": p}, 5_000)
        bench.monitor.label(bench.monitor.predictions - 1, truth, 2)
    (window,), (labels,) = bench.of(Kind.WINDOW), bench.of(Kind.LABELS)
    assert len(window["classes"]) == classes
    assert (labels["labelled"], labels["correct"], sum(labels["calibration"])) == (2, 1, 2)
    assert len(labels["confusion"]) == (classes**2 if classes <= 64 else 0)


def capturing(**rule: Any) -> Bench:
    """Return a bench whose budget has filled."""
    bench = Bench(capture=CaptureConfig(bytes_per_day=80_000, **rule), window_predictions=10)
    bench.mono_s += 86_400
    return bench


def test_captures_are_chosen_by_rule() -> None:
    """Near the threshold, out of range, or by chance; with slice, reason and the whole input."""
    bench = capturing(margin_below=0.1, outside_above=0.5)
    bench.see(0)
    bench.see(1, confidence=0.51, slice="night")
    bench.see(0, value=9)
    bench.see(1)
    first, second = bench.of(Kind.CAPTURE)
    assert (first["prediction"], first["reason"], first["slice"]) == (1, "threshold", "night")
    assert (second["prediction"], second["reason"], second["slice"]) == (2, "drift", "")
    assert second["shape"] == [1, 2, 10]
    assert np.frombuffer(second["data"], "<f4").tolist() == [9.0] * 20


def test_captures_by_chance_keep_to_their_share() -> None:
    """A tenth of 400 is captured, give or take five standard errors; the seed is fixed."""
    bench = capturing(random_share=0.1)
    bench.mono_s += 86_400
    for i in range(400):
        bench.see(0, value=i % 5)
        bench.mono_s += 600
    found = bench.of(Kind.CAPTURE)
    assert abs(len(found) - 40) <= 30
    assert {each["reason"] for each in found} == {"random"}
    assert len({each["prediction"] for each in found}) == len(found)


def test_captures_keep_to_their_budget() -> None:
    """An eighth of the day at once: 10,000 bytes hold 29 inputs of 80 and their records."""
    bench = capturing(random_share=1)
    for _ in range(200):
        bench.see(0)
    assert len(bench.of(Kind.CAPTURE)) == 10_000 // (80 + 256)
    assert Bench(
        samples=20_000, capture=CaptureConfig(bytes_per_day=80_000, random_share=1)
    ).monitor.capture_hindrance


def test_labels_that_came_before_their_window_was_refused_are_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A label may be there before its window ends: it is lost with it, and counted."""
    bench = Bench(window_predictions=3)
    with monkeypatch.context() as patched:
        patched.setattr(bench.monitor, "_emit", refuse)
        bench.see(0)
        bench.see(1)
        bench.monitor.label(0, 0, 2)
        bench.see(0)
    bench.monitor.label(1, 0, 2)
    bench.monitor.flush_labels()
    assert (bench.monitor.withheld, bench.monitor.labels_missed) == (3, 2)
    assert bench.told == []


def test_captures_that_are_refused_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their bytes stay spent: a spool that fails brings no budget back."""
    bench = capturing(margin_below=0.1)
    policy = bench.monitor._captures
    with monkeypatch.context() as patched:
        patched.setattr(bench.monitor, "_emit", refuse)
        bench.see(1, confidence=0.51)
    assert (policy.refused, bench.of(Kind.CAPTURE)) == (1, [])
    spent = policy.spent_bytes
    bench.see(1, confidence=0.51)
    assert (policy.refused, len(bench.of(Kind.CAPTURE))) == (1, 1)
    assert policy.spent_bytes == 2 * spent


def test_nothing_is_captured_by_default() -> None:
    """Whatever comes."""
    bench = Bench(window_predictions=10)
    bench.mono_s += 86_400
    for value in (0, 9, np.inf, np.nan):
        bench.see(0, value=value, confidence=0.501)
    assert bench.of(Kind.CAPTURE) == []


def test_what_the_budget_sheds_is_told() -> None:
    """A fast model with a large input: some predictions are in no sketch, all are counted."""
    bench = Bench(samples=1 << 16, window_predictions=40, cpu_share_max=0.001)
    x = np.random.default_rng(0).normal(size=(1, 2, 1 << 16)).astype(np.float32)
    for _ in range(40):
        bench.monitor.observe({"x": x}, {"p": np.array([[0.8, 0.2]], np.float32)}, 5_000)
    bench.monitor.finish()
    windows = bench.of(Kind.WINDOW)
    shed = sum(each.get("shed", 0) for each in windows)
    sketched = sum(SketchBank.from_bytes(w["sketch"]).moments(2).count for w in windows)
    assert sum(each["predictions"] for each in windows) == 40 == shed + sketched
    assert shed > 0 and bench.monitor.sketch_stride > 1


def test_ends_that_cost_too_much_are_put_off() -> None:
    """Windows of one prediction by a clock that stands still: few ends, and no prediction lost."""
    bench = Bench(window_predictions=1, cpu_share_max=0.5)
    for _ in range(200):
        bench.see(0)
    bench.monitor.finish()
    windows = bench.of(Kind.WINDOW)
    assert len(windows) < 50 and sum(each["predictions"] for each in windows) == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"window_predictions": -1},
        {"window_predictions": 0, "window_s": 0},
        {"window_s": 1e-9},
        {"window_min": 101},
        {"pending_max": 0},
        {"slice_max": -1},
        {"stuck_min": 1},
        {"rate_hz": -1},
        {"cpu_share_max": 0},
    ],
)
def test_limits(fields: dict[str, Any]) -> None:
    """Each is checked, by name."""
    with pytest.raises(ValueError, match=next(iter(fields))):
        MonitorConfig(**fields)
