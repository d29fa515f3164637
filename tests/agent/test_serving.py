"""Serving: models change between two windows and no window is dropped; a bad one goes back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from shoal.agent import window_fit
from shoal.agent.errors import ModelError, ModelFormatError
from shoal.agent.health import Health
from shoal.agent.monitor import MonitorConfig
from shoal.agent.serving import ActiveModel, Labelled, Serving, SourceConfig, TrialConfig
from shoal.agent.source import Recording
from shoal.ext import ort
from shoal.proto import bundle
from shoal.proto.bundle import Bundle, Manifest
from shoal.proto.records import Kind

PROFILE = (
    b'{"version":1,"features":[{"name":"a","edges":[0.0]},{"name":"b","edges":[0.0]},'
    b'{"name":"confidence","edges":[0.5]}]}'
)


def model(answer: int, *, scale: float = 1.0, fail_above: float | None = None) -> bytes:
    """Return a classifier that always answers ``answer``; it may answer NaN for large inputs."""
    logits = np.zeros((1, 2), np.float32)
    logits[0, answer] = 3 * scale
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[1, 2], keepdims=0),
        helper.make_node("Unsqueeze", ["m", "one"], ["u"]),
        helper.make_node("Mul", ["u", "zero"], ["z"]),
        helper.make_node("Add", ["z", "logits"], ["l"]),
        helper.make_node("Softmax", ["l"], ["s"], axis=1),
    ]
    values = {"one": np.array([1]), "zero": np.zeros((1, 1), np.float32), "logits": logits}
    if fail_above is None:
        nodes.append(helper.make_node("Identity", ["s"], ["p"]))
    else:
        values |= {"limit": np.array(fail_above, np.float32), "nan": np.array(np.nan, np.float32)}
        nodes += [
            helper.make_node("Greater", ["u", "limit"], ["bad"]),
            helper.make_node("Where", ["bad", "nan", "s"], ["p"]),
        ]
    graph = helper.make_graph(
        nodes,
        "m",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, 4])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return data


def packed(data: bytes, *, samples: int = 4) -> Bundle:
    """Return a bundle of a model."""
    manifest = Manifest(
        name="m", model="model.onnx", input="x", output="p", channels=("a", "b"),
        classes=("no", "yes"), samples=samples,
    )  # fmt: skip
    parts = {"model.onnx": data, "golden.npz": b"-", "profile.json": PROFILE}
    return bundle.unpack(bundle.pack(manifest, parts))


class Bench:
    """Serving over a recording whose windows hold their own number."""

    def __init__(self, tmp_path: Path, **trial: Any) -> None:
        numbers = np.arange(1000, dtype=np.float32)
        self.recording = Recording(
            np.ascontiguousarray(np.broadcast_to(numbers[:, None, None], (1000, 2, 4))),
            np.ones(1000, np.int64),
            (np.arange(1000) % 3).astype(np.uint8),
        )
        self.told: list[tuple[Kind, dict[str, Any]]] = []
        self.labelled = Labelled(tmp_path / "labelled", self.recording)
        self.health = Health(clock=lambda: 0)
        self.serving = Serving(
            self.recording,
            source=SourceConfig(rate_hz=2000, label_delay_s=0.01),
            trial=TrialConfig(**trial),
            monitor=MonitorConfig(window_predictions=50),
            labelled=self.labelled,
            health=self.health,
            emit=lambda kind, body: self.told.append((kind, body)),
            clock=lambda: 1,
        )

    @asynccontextmanager
    async def serves(self) -> AsyncIterator[None]:
        """Serve meanwhile."""
        task = asyncio.create_task(self.serving.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait for a condition, ten seconds at most."""
        for _ in range(1000):
            if true():
                return
            await asyncio.sleep(0.01)
        pytest.fail("the condition never came true")

    def predictions(self) -> dict[str, int]:
        """Return the predictions that windows told, by model."""
        found: dict[str, int] = {}
        for kind, body in self.told:
            if kind is Kind.WINDOW:
                found[body["model"]] = found.get(body["model"], 0) + body["predictions"]
        return found


def run(story: Callable[[], Any]) -> None:
    """Run a story."""
    asyncio.run(story())


def test_no_window_is_dropped_when_models_change(tmp_path: Path) -> None:
    """Every offered window is answered by exactly one model, and told by it."""
    bench = Bench(tmp_path, predictions=20)

    async def story() -> None:
        old, new = packed(model(0)), packed(model(1))
        async with bench.serves():
            bench.serving.activate(await bench.serving.load(old))
            await bench.until(lambda: bench.serving.counters.answered > 60)
            await bench.serving.trial(await bench.serving.load(new))
            assert bench.serving.active_sha256 == new.sha256
            await bench.until(lambda: bench.serving.counters.answered > 200)
        counters = bench.serving.counters
        assert counters.offered == counters.answered
        told = bench.predictions()
        assert set(told) == {old.sha256, new.sha256}
        assert sum(told.values()) == counters.answered
        assert bench.labelled.count(0) + bench.labelled.count(1) + bench.labelled.count(2) > 100

    run(story)


def test_a_model_that_is_answering_is_not_taken_away(tmp_path: Path) -> None:
    """Another one is activated in the middle of an answer: it is given and told all the same."""
    bench = Bench(tmp_path)
    entered, go_on = threading.Event(), threading.Event()

    async def story() -> None:
        old, new = packed(model(0)), packed(model(1))
        first = await bench.serving.load(old)
        answer = first.model.infer

        def slowly(*args: Any, **kwargs: Any) -> Any:
            entered.set()
            assert go_on.wait(10)
            return answer(*args, **kwargs)

        slow = Mock(wraps=first.model, infer=slowly)
        async with bench.serves():
            bench.serving.activate(ActiveModel(first.bundle, slow, first.monitor))
            await bench.until(entered.is_set)
            bench.serving.activate(await bench.serving.load(new))
            go_on.set()
            await bench.until(lambda: bench.serving.counters.answered > 60)
        counters = bench.serving.counters
        assert counters.offered == counters.answered
        told = bench.predictions()
        assert told == {old.sha256: 1, new.sha256: counters.answered - 1}
        slow.close.assert_called_once()

    run(story)


def test_a_candidate_that_fails_hands_its_window_back(tmp_path: Path) -> None:
    """The model before it answers that very window; the trial says why it failed."""
    bench = Bench(tmp_path, predictions=500)

    async def story() -> None:
        old, bad = packed(model(0)), packed(model(1, fail_above=100))
        async with bench.serves():
            bench.serving.activate(await bench.serving.load(old))
            await bench.until(lambda: bench.serving.counters.answered > 20)
            with pytest.raises(ModelError, match="not finite"):
                await bench.serving.trial(await bench.serving.load(bad))
            assert bench.serving.active_sha256 == old.sha256
            before = bench.serving.counters.answered
            await bench.until(lambda: bench.serving.counters.answered > before + 20)
        counters = bench.serving.counters
        assert counters.offered == counters.answered == sum(bench.predictions().values())
        errors = [body["errors"] for kind, body in bench.told if kind is Kind.WINDOW]
        assert sum(errors) == 1

    run(story)


def test_a_first_model_that_fails_leaves_none(tmp_path: Path) -> None:
    """Nothing is served until a model is activated; then serving goes on."""
    bench = Bench(tmp_path, predictions=500)

    async def story() -> None:
        async with bench.serves():
            with pytest.raises(ModelError):
                bad = packed(model(1, fail_above=50))
                await bench.serving.trial(await bench.serving.load(bad))
            assert bench.serving.active_sha256 == ""
            bench.serving.activate(await bench.serving.load(packed(model(0))))
            before = bench.serving.counters.answered
            await bench.until(lambda: bench.serving.counters.answered > before + 20)

    run(story)


def test_a_model_for_another_sensor_is_refused(tmp_path: Path) -> None:
    """Channels and samples must be the source's."""
    bench = Bench(tmp_path)

    async def story() -> None:
        with pytest.raises(ModelFormatError, match="takes windows of"):
            await bench.serving.load(packed(model(0), samples=8))

    run(story)


def test_labelled_rows_survive_a_restart(tmp_path: Path) -> None:
    """Also when the last number was torn by the crash."""
    bench = Bench(tmp_path)
    for row in (3, 4, 7, 3):
        bench.labelled.add(row)
    with (tmp_path / "labelled").open("ab") as file:
        file.write(b"\x09")
    again = Labelled(tmp_path / "labelled", bench.recording)
    assert [again.count(split) for split in range(3)] == [1, 2, 0]
    x, y = again.windows(1)
    assert x[:, 0, 0].tolist() == [4.0, 7.0] and y.tolist() == [1, 1]


def test_an_engine_that_is_slow_for_want_of_a_library_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device answers all the same, and its health says why it is slow."""
    bench = Bench(tmp_path)

    def missing() -> str:
        raise ort.OrtMissingError("no library")

    async def story() -> None:
        fine = await bench.serving.load(packed(model(0)))
        assert not bench.health.warnings()
        monkeypatch.setattr(ort, "library", missing)
        slow = await bench.serving.load(packed(model(1)))
        assert [each.code for each in bench.health.warnings()] == ["runtime.slow"]
        monkeypatch.undo()
        again = await bench.serving.load(packed(model(0)))
        assert not bench.health.warnings()
        for each in (fine, slow, again):
            each.model.close()

    asyncio.run(story())


def test_slices_of_the_recording_have_windows_of_their_own(tmp_path: Path) -> None:
    """Each window is told in the slice its tag says; the model that comes back goes on."""
    bench = Bench(tmp_path, predictions=20)
    tags = tuple("even" if i % 2 == 0 else "odd" for i in range(1000))
    bench.serving._recording = replace(bench.recording, slice__n=tags)

    async def story() -> None:
        bundle_ = packed(model(0))
        async with bench.serves():
            bench.serving.activate(await bench.serving.load(bundle_))
            await bench.until(lambda: bench.serving.counters.answered > 130)
            await bench.serving.trial(await bench.serving.load(bundle_))
            await bench.until(lambda: bench.serving.counters.answered > 260)
        windows = [body for kind, body in bench.told if kind is Kind.WINDOW]
        keys = [(each["model"], each["slice"], each["index"]) for each in windows]
        assert len(set(keys)) == len(keys)
        answered = bench.serving.counters.answered
        found = {
            tag: sum(each["predictions"] for each in windows if each["slice"] == tag)
            for tag in ("even", "odd")
        }
        assert found == {"even": (answered + 1) // 2, "odd": answered // 2}
        labels = [body for kind, body in bench.told if kind is Kind.LABELS]
        assert {each["slice"] for each in labels} == {"even", "odd"}

    run(story)


def test_what_does_not_fit_a_record_is_said_at_load_and_counted_over_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning of the agent's health while the model is active; the totals outlast it."""
    bench = Bench(tmp_path)

    async def story() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(window_fit, "SKETCH_BYTES_MAX", 10)
            wide = await bench.serving.load(packed(model(0)))
        (warning,) = bench.health.warnings()
        assert warning.code == "monitor.sketch"
        assert warning.text.startswith("windows are withheld: 3 features x 1 edges")
        async with bench.serves():
            bench.serving.activate(wide)
            await bench.until(lambda: wide.monitor.withheld >= 100)
            assert bench.serving.monitored()["sketch_hindrance"] == warning.text
            fine = await bench.serving.load(packed(model(1)))
            bench.serving.activate(fine)
            bench.serving.tick()
            assert bench.health.warnings() == ()
            assert bench.serving.monitored()["sketch_hindrance"] == ""
            await bench.until(lambda: fine.monitor.predictions > 100)
        withheld = wide.monitor.predictions
        assert bench.serving.untold() == {
            "predictions_withheld": withheld, "windows_bins_alone": 0
        }  # fmt: skip
        assert bench.predictions() == {fine.bundle.sha256: fine.monitor.predictions}
        assert bench.serving.counters.answered == withheld + fine.monitor.predictions

    run(story)


def test_windows_as_bins_alone_are_said_when_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window that counts much may not fit though an empty one did."""
    bench = Bench(tmp_path)

    async def story() -> None:
        async with bench.serves():
            active = await bench.serving.load(packed(model(0)))
            monkeypatch.setattr(window_fit, "room", lambda body: 200)
            bench.serving.activate(active)
            assert bench.health.warnings() == ()
            await bench.until(lambda: active.monitor.bins_alone > 0)
            bench.serving.tick()
            (warning,) = bench.health.warnings()
            assert (warning.code, warning.text) == (
                "monitor.sketch", "bins alone: 3 features x 1 edges do not fit a record"
            )  # fmt: skip
        assert bench.serving.untold()["windows_bins_alone"] == active.monitor.bins_alone

    run(story)
