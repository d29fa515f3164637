"""Ten people with smartwatches as a fleet, through the product's own code at both ends.

    recordings --train, build_bundle--> int8 model, profile          as the server makes them
    recordings --WindowMonitor--> records --Writer--> window rows    as devices send them
    window rows --drift worker--> alerts

A person is a device. A prediction is one window of the recordings, two seconds of one exercise;
``SIZE`` predictions are a telemetry window.

N windows, C = 6 channels, T = 100 samples, K = 7 classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select

from shoal.agent.monitor import MonitorConfig, WindowMonitor
from shoal.agent.profile import DeviceProfile
from shoal.examples import watch
from shoal.proto import topics
from shoal.proto.bundle import Bundle, unpack
from shoal.proto.records import Kind, Record, encode_batch, encode_record
from shoal.proto.session import Message
from shoal.server.drift.config import DriftWorkerConfig
from shoal.server.drift.worker import Drift
from shoal.server.ingest.writer import Writer
from shoal.server.learning.dataset import Dataset
from shoal.server.learning.fit import evaluate
from shoal.server.learning.pipeline import PipelineConfig, build_bundle, train
from shoal.server.store import Store
from shoal.server.store.tables import Alert, Device, Model, Quarantine, Window

PEOPLE: Final = range(1, 11)
SIZE: Final = 60  # as the demo's devices
EPOCHS: Final = 3
START_MS: Final = 1_790_000_000_000
MINUTE_MS: Final = 60_000
LATENCY_NS: Final = 150_000


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A model as it is registered, and as a device unpacks it."""

    bundle: Bundle
    accuracy: float
    """Of the int8 model on the validation windows, a share."""


def load() -> dict[int, watch.Windows]:
    """Return the windows of each person."""
    data = watch.load()
    return {person: watch.windows(data, person) for person in PEOPLE}


def make(data: Mapping[int, watch.Windows], known: Collection[int], *, seed: int = 0) -> Made:
    """Train on the known people and build what a device gets; the people are its groups."""
    parts = [data[person] for person in known]
    x, y, split = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("x__nct", "y__n", "split__n")
    )
    group = np.repeat(np.array([*known], np.int64), [len(part.y__n) for part in parts])
    dataset = Dataset(x, y, split, group, watch.CHANNELS, watch.EXERCISES)
    config = PipelineConfig()
    source = train(dataset, epochs=EPOCHS, seed=seed, config=config, told=lambda _: None)
    data_, figures = build_bundle(source, name="exercise", facts={}, config=config)
    return Made(unpack(data_), figures["accuracy_int8"])


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """One alert."""

    kind: str
    scope: str
    devices: frozenset[int]
    """The people it is about."""
    windows: int
    """Telemetry windows of each device when it was seen first."""
    text: str


class Watches:
    """A store with a device for each person, their monitors, and the drift worker."""

    def __init__(
        self, store: Store, made: Made, data: Mapping[int, watch.Windows], *, split: int | None
    ) -> None:
        """Let all of them run a model.

        Args:
            store: Empty.
            made: The model.
            data: The people.
            split: What the devices replay: one split of the recordings; None = all of them.
        """
        self._store, self._now_ms = store, START_MS
        self._sha256 = made.bundle.sha256
        self._devices = {person: _Wrist(made, part, split, self) for person, part in data.items()}
        self._writer = Writer(
            store,
            clock=self.now_ms,
            on_update=_ignore,
            on_reported=_ignore,
            quarantine_rows_max=100,
        )
        self.worker = Drift(store, clock=self.now_ms, config=DriftWorkerConfig())
        self.told: list[Told] = []
        with store.begin() as session:
            session.add(
                Model(
                    name="exercise", version=1, sha256=self._sha256, size=1, created_ms=START_MS,
                    manifest={}, profile=json.loads(made.bundle.parts["profile.json"]),
                )
            )  # fmt: skip
            for person in data:
                session.add(
                    Device(name=_name(person), created_ms=1, reported={"model": self._sha256})
                )

    def now_ms(self) -> int:
        """Return the time of the story, Unix ms."""
        return self._now_ms

    def play(self, windows: int) -> list[Told]:
        """Let each device make some telemetry windows, judge after each, return the alerts."""
        for number in range(windows):
            self._now_ms += MINUTE_MS
            messages = [
                _message(_name(person), device.stream, device.window())
                for person, device in self._devices.items()
            ]
            self._writer.write(messages)
            while self.worker.step():
                pass
            self._look(number + 1)
        return self.told

    def stored(self) -> tuple[int, int]:
        """Return (telemetry windows, messages that were refused)."""
        with self._store.read() as session:
            return (
                len(session.scalars(select(Window.id)).all()),
                len(session.scalars(select(Quarantine.id)).all()),
            )

    def drifting(self) -> dict[int, dict[str, Any]]:
        """Return the report of each device that drifts."""
        report = self.worker.report(self._sha256)["devices"]
        return {_person(each["device"]): each for each in report if each["drifting"]}

    def _look(self, windows: int) -> None:
        with self._store.read() as session:
            alerts = session.scalars(select(Alert).order_by(Alert.id)).all()
            for alert in alerts[len(self.told) :]:
                devices = alert.evidence.get("devices") or [alert.subject]
                people = frozenset(_person(each) for each in devices)
                self.told.append(Told(alert.kind, alert.scope, people, windows, alert.text))


class _Wrist:
    """One device: what its model answered, and the monitor that counts it."""

    def __init__(self, made: Made, part: watch.Windows, split: int | None, fleet: Watches) -> None:
        manifest = made.bundle.manifest
        self._names = manifest.input, manifest.output
        self._x, self._y, self._split = part.x__nct, part.y__n, part.split__n
        self._p = evaluate(made.bundle.model, part.x__nct, part.y__n).probabilities__nk
        chosen = part.order if split is None else part.order[part.split__n[part.order] == split]
        self._order: NDArray[np.int64] = chosen
        self._records: list[tuple[Kind, dict[str, Any]]] = []
        self._at = self._seq = 0
        self._now_ms = fleet.now_ms
        self.stream = hashlib.sha256(part.x__nct.tobytes()).digest()[:16]
        self._monitor = WindowMonitor(
            model_sha256=made.bundle.sha256,
            inputs=[manifest.input],
            outputs=[manifest.output],
            input_name=manifest.input,
            output_name=manifest.output,
            samples=manifest.samples,
            classes=len(manifest.classes),
            profile=DeviceProfile.from_json(
                made.bundle.parts["profile.json"], features=len(manifest.channels) + 1
            ),
            config=MonitorConfig(window_predictions=SIZE, window_s=0, cpu_share_max=1),
            emit=lambda kind, body: self._records.append((kind, body)),
            clock=fleet.now_ms,
        )

    def window(self) -> list[bytes]:
        """Answer until a telemetry window ends; return the encoded records that are to be sent."""
        for _ in range(SIZE):
            row = self._order[self._at % len(self._order)]
            self._at += 1
            inputs = {self._names[0]: self._x[row : row + 1]}
            self._monitor.observe(inputs, {self._names[1]: self._p[row : row + 1]}, LATENCY_NS)
            # What was trained on is told by its split: the server leaves it out of the accuracy.
            self._monitor.label(self._at - 1, int(self._y[row]), int(self._split[row]))
        told, self._records = self._records, []
        found = []
        for kind, body in told:
            self._seq += 1
            found.append(encode_record(Record(self._seq, kind, self._now_ms(), body)))
        return found


def _message(device: str, stream: bytes, records: Iterable[bytes]) -> Message:
    topic = topics.topic(device, topics.Leaf.TELEMETRY)
    return Message(topic, encode_batch(stream, [*records]), (1, 1))


def _name(person: int) -> str:
    return f"wrist-{person:02d}"


def _person(device: str) -> int:
    return int(device.removeprefix("wrist-"))


def _ignore(*_: object) -> None:
    """Stands in for parts of the server that this story does without."""
