"""Models of many channels are watched: from a real runtime to the lake and the drift worker.

A story: 600 features x 15 edges, whose sketches no record holds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from shoal.agent.monitor import MonitorConfig, WindowMonitor
from shoal.agent.profile import DeviceProfile
from shoal.agent.runtime import Runtime
from shoal.ext.sketch import SketchBank
from shoal.proto import topics
from shoal.proto.records import Kind, Record, encode_batch, encode_record
from shoal.proto.session import Message
from shoal.server.drift import profile as profiles
from shoal.server.drift.config import DriftWorkerConfig
from shoal.server.drift.worker import Drift
from shoal.server.lake import Lake, LakeConfig
from shoal.server.lake.query import Query
from shoal.server.store import Store
from shoal.server.store.tables import DriftState, Model, Quarantine
from tests.sims.stores import enrolled_store, writer_of

MODEL = "c" * 64
SAMPLES = 20
NOW_MS = 1_764_028_800_000


def averager(channels: int) -> bytes:
    """Return a model of two classes that looks at every channel's mean."""
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((channels, 2)).astype(np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[2], keepdims=0),
        helper.make_node("MatMul", ["m", "w"], ["l"]),
        helper.make_node("Softmax", ["l"], ["p"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, SAMPLES])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(weights, "w")],
    )
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()
    return data


def profile_of(channels: int, edges: int) -> DeviceProfile:
    """Return what a device needs of a profile, with edges where normal values are."""
    features = channels + 1
    return DeviceProfile(
        names=(*(f"c{i}" for i in range(channels)), "confidence"),
        edges=(np.linspace(-3, 3, edges).astype(np.float32),) * features,
        kinds=("float",) * features,
        low__d=np.full(features, -np.inf, np.float32),
        high__d=np.full(features, np.inf, np.float32),
        deciles__9=np.linspace(0.1, 0.9, 9, dtype=np.float32),
        projection=None,
    )


class Watched:
    """A model of many channels in a real runtime, and all that went in and came out."""

    def __init__(self, profile: DeviceProfile) -> None:
        self.profile, self.channels = profile, len(profile.edges) - 1
        self.rng = np.random.default_rng(1)
        self.seen: list[Any] = []
        self.records: list[bytes] = []
        self.told: list[dict[str, Any]] = []

    def watch(self, predictions: int, **config: Any) -> WindowMonitor:
        """Let the model answer, and return its monitor."""
        monitor = WindowMonitor(
            model_sha256=MODEL,
            inputs=["x"],
            outputs=["p"],
            input_name="x",
            output_name="p",
            samples=SAMPLES,
            classes=2,
            profile=self.profile,
            config=MonitorConfig(cpu_share_max=1.0, window_s=0, **config),
            emit=self._emit,
            clock=lambda: NOW_MS,
            chance=random.Random(7).random,
        )
        with Runtime() as runtime:
            model = runtime.load(averager(self.channels), backend="ort", monitor=monitor)
            for _ in range(predictions):
                x = self.rng.standard_normal((1, self.channels, SAMPLES)).astype(np.float32)
                model.infer({"x": x})
                self.seen.append(x[0])
            monitor.finish()
        return monitor

    def _emit(self, kind: Kind, body: dict[str, Any]) -> None:
        self.records.append(encode_record(Record(len(self.records) + 1, kind, NOW_MS, body)))
        self.told.append(body)


def reference(channels: int) -> profiles.ReferenceProfile:
    """Return a profile as the server makes it."""
    rng = np.random.default_rng(2)
    return profiles.build(
        rng.standard_normal((40, channels, SAMPLES)).astype(np.float32),
        rng.random(40).astype(np.float32),
        np.ones(40, np.bool_),
        np.zeros(40, np.int64),
        np.arange(40) % 2 == 0,
        channels=[f"c{i}" for i in range(channels)],
        bins=16,
        projected=16,
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store with the device."""
    found = enrolled_store(tmp_path / "fleet.db")
    yield found
    found.close()


def test_a_model_of_600_features_is_watched_as_bins_alone(store: Store, tmp_path: Path) -> None:
    """Every prediction arrives, and the lake and the drift worker count every value."""
    profile = reference(599)
    wide = Watched(DeviceProfile.from_json(profile.to_json(), features=600))
    monitor = wide.watch(300, window_predictions=150)
    assert (monitor.withheld, monitor.bins_alone, monitor.curtailed) == (0, 2, 0)
    assert monitor.sketch_hindrance == "bins alone: 600 features x 15 edges do not fit a record"
    assert all(each["bins_only"] and "projection" in each for each in wide.told)
    bank = SketchBank.from_bytes(wide.told[0]["sketch"])
    assert bank.bins_only and bank.moments(598).count == 150 * SAMPLES

    with store.begin() as session:
        session.add(
            Model(
                name="m", version=1, sha256=MODEL, size=1, created_ms=1, manifest={},
                profile=json.loads(profile.to_json()),
            )
        )  # fmt: skip
    writer = writer_of(store, clock=lambda: NOW_MS)
    topic = topics.topic("d-1", topics.Leaf.TELEMETRY)
    for record in wide.records:
        writer.write([Message(topic, encode_batch(bytes(16), [record]), (1, 1))])
    drift = Drift(store, clock=lambda: NOW_MS, config=DriftWorkerConfig())
    while drift.step():
        pass
    with store.read() as session:
        assert session.query(Quarantine).count() == 0
        assert session.query(DriftState).one().windows == 2

    lake = Lake(store, tmp_path / "lake", clock=lambda: NOW_MS, config=LakeConfig(export_s=0.0))
    values__ct = np.concatenate(wide.seen, axis=1)
    query = Query(model=MODEL, since_ms=NOW_MS - 1, until_ms=NOW_MS + 1)
    for _ in ("from the database", "from files"):
        rows = {each["feature"]: each for each in lake.history.features(query).table.to_pylist()}
        assert len(rows) == 600
        for i in (0, 300, 598):
            edges = np.array(profile.features[i].edges, np.float32)
            want = np.histogram(values__ct[i], [-np.inf, *edges, np.inf])[0]
            assert rows[f"c{i}"]["bins"] == want.tolist()
        assert rows["confidence"]["n"] == 300
        (windows,) = lake.history.windows(query).table.to_pylist()
        assert (windows["predictions"], windows["refused"]) == (300, 0)
        while lake.step():
            pass


def test_what_can_never_fit_is_withheld_counted_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The warning says what to do; the model answers all the same."""
    wide = Watched(profile_of(200, 255))
    monitor = wide.watch(60, window_predictions=20)
    assert wide.records == [] and len(wide.seen) == 60
    assert (monitor.withheld, monitor.bins_alone) == (60, 0)
    assert monitor.sketch_hindrance.startswith("windows are withheld: 201 features x 255 edges")
    (said,) = [each for each in caplog.messages if "withheld" in each]
    assert "fewer bins" in said


def test_a_window_that_counts_too_much_is_withheld_and_the_next_one_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Counters grow with what they count: shorter windows of the same model fit."""
    wide = Watched(profile_of(1000, 31))
    monitor = wide.watch(600, window_predictions=300)
    assert wide.records == [] and monitor.withheld == 600
    assert [each for each in caplog.messages if "withheld" in each][1:] == []
    again = wide.watch(10, window_predictions=5)
    assert again.withheld == 0 and again.bins_alone == len(wide.told) == 2


def test_long_and_short_windows_of_one_model_are_sketches_or_bins_alone() -> None:
    """What fits is decided for each window; the hindrance stays."""
    wide = Watched(profile_of(449, 31))
    monitor = wide.watch(301, window_predictions=300)
    assert [each.get("bins_only", False) for each in wide.told] == [True, False]
    assert (monitor.bins_alone, monitor.withheld) == (1, 0)
    assert monitor.sketch_hindrance == "bins alone: 450 features x 31 edges do not fit a record"
    banks = [SketchBank.from_bytes(each["sketch"]) for each in wide.told]
    assert banks[0].edges_digest == banks[1].edges_digest
    assert np.isfinite(banks[1].quantiles(5, 0.5))
