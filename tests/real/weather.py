"""Fifty years of one weather station as a fleet of one device, through the product's own code.

    rainfall_data.csv --days--> network --fit--> float model --build_bundle--> int8 model, profile
    days --SketchBank--> window rows --drift worker--> alerts, retrainings --> the next model

A day is a prediction: it rains or not. ``SIZE`` days are a telemetry window; their labels come
``LAG`` windows later. Days are counted from 1970, for the store's clocks know no earlier time.

N days, C = 8 channels, T = 1 sample, K = 2 classes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sqlalchemy import select

from shoal.ext.sketch import SketchBank
from shoal.proto.bundle import unpack
from shoal.server.drift import detectors, verdicts
from shoal.server.drift.alerts import LIVE
from shoal.server.drift.config import DriftWorkerConfig
from shoal.server.drift.detectors import DeviceState, DriftConfig
from shoal.server.drift.profile import ReferenceProfile
from shoal.server.drift.retraining import RetrainingConfig, mcnemar
from shoal.server.drift.worker import Drift, Request
from shoal.server.learning.autodiff import IR_VERSION
from shoal.server.learning.dataset import TRAIN, VALIDATION, Dataset, Source
from shoal.server.learning.fit import FitConfig, evaluate, fit
from shoal.server.learning.networks import INPUT, LOGITS
from shoal.server.learning.pipeline import PipelineConfig, build_bundle
from shoal.server.learning.prepare import OPSET
from shoal.server.store import Store
from shoal.server.store.tables import Alert, Audit, Device, Labels, Model, Stream, Window

CHANNELS: Final = (
    "temperature",
    "dew point",
    "pressure",
    "visibility",
    "wind",
    "gust",
    "coldest",
    "warmest",
)
CLASSES: Final = ("dry", "rain")
DAY_MS: Final = 86_400_000
YEAR: Final = 365
SIZE: Final = 30
LAG: Final = 3
REFERENCE: Final = 4_540  # the first quarter, which trains and calibrates
GROUPS: Final = 6  # periods of two years: one trains, the next one is held out
STRETCHES: Final = (2 * YEAR, 4 * YEAR)  # days that a later model may be made of
GATE: Final = YEAR  # the newest days with labels: which stretch is best, and whether it is better
GATE_LEVEL: Final = 0.05  # a later model runs if it won by chance no more often than that
BREAK: Final = 12_000  # from this day on the file's columns carry other quantities: PROVENANCE.md
LAST: Final = 13_619  # the last quarter
# A judgement looks back on 14 to 36 months: never on less than a year, for summer is no drift.
# 1,000 windows of 30 days are 82 years: one false alarm in the life of a station.
RULES: Final = DriftConfig(
    windows_min=14, block_windows=36, predictions_min=400, windows_per_false_alarm=1_000
)
DEVICE, STREAM, STATION = 1, 1, "station"
FIT: Final = FitConfig(epochs=40, batch_size=64, learning_rate=0.05)
HIDDEN: Final = 16


@dataclass(frozen=True, slots=True, eq=False)
class Days:
    """A stretch of the stream."""

    x__nct: NDArray[np.float32]
    y__n: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of days."""
        return len(self.y__n)

    def take(self, rows: Any) -> Days:
        """Return some days, in that order."""
        return Days(self.x__nct[rows], self.y__n[rows])


def load(path: Path) -> Days:
    """Return the stream in the file."""
    rows = np.loadtxt(path, delimiter=",", skiprows=1)
    return Days(rows[:, 1:9].astype(np.float32)[:, :, None], rows[:, 9].astype(np.int64))


def network(x__nct: NDArray[np.float32], *, seed: int) -> onnx.ModelProto:
    """Return a perceptron with one hidden layer that normalises its input, with random weights."""
    rng = np.random.default_rng(seed)
    channels = x__nct.shape[1]
    values = {
        "fixed.mean": x__nct.mean((0, 2)).reshape(1, -1, 1),
        "fixed.gain": (1 / x__nct.std((0, 2))).reshape(1, -1, 1),
        "hidden.weight": rng.normal(0, np.sqrt(2 / channels), (HIDDEN, channels)),
        "hidden.bias": np.zeros(HIDDEN),
        "head.weight": rng.normal(0, np.sqrt(1 / HIDDEN), (len(CLASSES), HIDDEN)),
        "head.bias": np.zeros(len(CLASSES)),
    }
    nodes = [
        helper.make_node("Sub", [INPUT, "fixed.mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "fixed.gain"], ["normal"]),
        helper.make_node("Flatten", ["normal"], ["flat"]),
        helper.make_node("Gemm", ["flat", "hidden.weight", "hidden.bias"], ["hidden"], transB=1),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Gemm", ["active", "head.weight", "head.bias"], [LOGITS], transB=1),
    ]
    shapes: list[tuple[str, list[Any]]] = [
        (INPUT, ["batch", channels, 1]), (LOGITS, ["batch", len(CLASSES)])
    ]  # fmt: skip
    told = [helper.make_tensor_value_info(name, TensorProto.FLOAT, s) for name, s in shapes]
    held = [numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in values.items()]
    graph = helper.make_graph(nodes, "weather", told[:1], told[1:], held)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A model as it is registered and as it runs."""

    sha256: str
    graph: bytes
    """int8, with probabilities."""
    profile: ReferenceProfile
    figures: dict[str, Any]

    def answers(self, days: Days) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return (confidence, whether it was right) of each day."""
        found = evaluate(self.graph, days.x__nct, days.y__n).probabilities__nk
        return found.max(1), found.argmax(1) == days.y__n


def make(days: Days, *, groups: int, seed: int = 0) -> Made:
    """Train on a stretch and build what a device gets.

    The stretch is cut into periods, the groups of the profile: the first half of each trains, the
    second half is the same period's "another time". A half of at least a year has all seasons.
    """
    period__n = np.arange(len(days)) * groups // len(days)
    starts = np.searchsorted(period__n, np.arange(groups + 1))
    held__n = np.zeros(len(days), bool)
    for start, end in pairwise(starts):
        held__n[(start + end) // 2 : end] = True
    split__n = np.where(held__n, VALIDATION, TRAIN).astype(np.uint8)
    data = Dataset(days.x__nct, days.y__n, split__n, period__n.astype(np.int64), CHANNELS, CLASSES)
    x__nct, y__n = data.of(TRAIN)
    model = fit(network(x__nct, seed=seed), x__nct, y__n, config=FIT, seed=seed).model
    bundle, figures = build_bundle(
        Source(model, data), name="rain", facts={}, config=PipelineConfig()
    )
    checked = unpack(bundle)
    profile = ReferenceProfile.from_json(checked.parts["profile.json"])
    return Made(hashlib.sha256(bundle).hexdigest(), checked.model, profile, figures)


Trainer = Callable[[int, Made], Made | None]
"""Makes the next model of the labels until a day; None = it is no better than the present one."""


def trainer(days: Days, *, seed: int) -> Trainer:
    """Return one that tries ``STRETCHES`` on the newest days, and refits the best with these."""

    def of(end: int, length: int) -> Made:
        part = days.take(slice(end - length, end))
        return make(part, groups=length // (2 * YEAR), seed=seed)

    def train(known: int, present: Made) -> Made | None:
        newest = days.take(slice(known - GATE, known))
        now__n = present.answers(newest)[1]
        right = {length: of(known - GATE, length).answers(newest)[1] for length in STRETCHES}
        best = max(right, key=lambda length: right[length].sum())
        wins, losses = int((right[best] & ~now__n).sum()), int((now__n & ~right[best]).sum())
        pays = wins > losses and mcnemar(wins, losses) <= GATE_LEVEL
        return of(known, best) if pays else None

    return train


@dataclass
class Told:
    """One alert as it was when it opened."""

    day: int
    """Days of the stream that the server had heard of."""
    kind: str
    scope: str
    subject: str
    model: str
    text: str
    suspected: bool


@dataclass
class Play:
    """What came of playing a stream."""

    told: list[Told] = field(default_factory=list)
    """Alerts, as they opened."""
    retrained: list[int] = field(default_factory=list)
    """Day on which each later model came."""
    refused: list[int] = field(default_factory=list)
    """Day on which one came that was no better."""
    right__n: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    """Whether the running model was right, for each day."""
    live: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    """(day, kinds of live alerts) after each window."""

    def first(self, kind: str) -> int | None:
        """Return the day of the first alert of a kind."""
        return min((each.day for each in self.told if each.kind == kind), default=None)


class Station:
    """A store with one device, and the drift worker over it."""

    def __init__(
        self,
        store: Store,
        model: Made,
        *,
        train: Trainer | None = None,
    ) -> None:
        self._store, self._train = store, train
        self._models: list[Made] = []
        self._now_ms, self._known, self._seq = DAY_MS, 0, 0
        mode = "automatic" if train else "manual"
        policy = RetrainingConfig(mode=mode, road="training")
        config = DriftWorkerConfig(rules=RULES, retraining=policy)
        self._worker = Drift(
            store, clock=lambda: self._now_ms, config=config, retrain=self._retrain
        )
        self.told = Play()
        with store.begin() as session:
            session.add(Device(id=DEVICE, name=STATION, created_ms=1, reported={}))
            session.flush()
            session.add(Stream(id=STREAM, device_id=DEVICE, stream=bytes(16), first_ms=1))
        self._run(model)

    @property
    def model(self) -> Made:
        """What the device runs."""
        return self._models[-1]

    def play(self, days: Days, *, start: int = 0) -> Play:
        """Play days as windows of ``SIZE``, with their labels ``LAG`` windows later.

        Args:
            days: The stream; what is left over at its end is not played.
            start: Day of the stream that is the first one here, for what is told.
        """
        waiting: list[tuple[str, int, int]] = []
        rights: list[NDArray[np.bool_]] = []
        for number in range(len(days) // SIZE):
            part = days.take(slice(number * SIZE, (number + 1) * SIZE))
            model = self.model
            sure__n, right__n = model.answers(part)
            rights.append(right__n)
            waiting.append((model.sha256, number, int(right__n.sum())))
            self._known = start + (number + 1 - LAG) * SIZE
            self._now_ms += SIZE * DAY_MS
            with self._store.begin() as session:
                session.add(self._window(model, part, sure__n, number))
                if len(waiting) > LAG:
                    session.add(self._labels(*waiting.pop(0)))
            while self._worker.step():
                pass
            self._look(start + (number + 1) * SIZE)
            asyncio.run(self._worker.start_asked())
        self.told.right__n = np.concatenate(rights)
        return self.told

    def _run(self, model: Made) -> None:
        self._models.append(model)
        with self._store.begin() as session:
            session.add(
                Model(
                    name="rain", version=len(self._models), sha256=model.sha256, size=1,
                    created_ms=self._now_ms, manifest={},
                    profile=json.loads(model.profile.to_json()),
                )
            )  # fmt: skip
            session.get_one(Device, DEVICE).reported = {"model": model.sha256}

    async def _retrain(self, request: Request) -> str:
        assert self._train is not None
        made, day = self._train(self._known, self.model), self._known + LAG * SIZE
        (self.told.refused if made is None else self.told.retrained).append(day)
        if made is not None:
            self._run(made)
        return f"run-{len(self._models)}"

    def _window(self, model: Made, part: Days, sure__n: NDArray[np.float32], number: int) -> Window:
        features = model.profile.features
        bank = SketchBank(len(features), edges=[np.array(f.edges, np.float32) for f in features])
        bank.update_channels(part.x__nct)
        bank.update_channels(sure__n.reshape(-1, 1, 1), first=len(CHANNELS))
        values = [*part.x__nct[:, :, 0].T, sure__n]
        quality = {
            "below": [int((v < f.low).sum()) for v, f in zip(values, features, strict=True)],
            "above": [int((v > f.high).sum()) for v, f in zip(values, features, strict=True)],
        }
        return Window(
            device_id=DEVICE, stream_id=STREAM, model_sha256=model.sha256, number=number,
            device_start_ms=self._now_ms - SIZE * DAY_MS, device_end_ms=self._now_ms,
            received_ms=self._now_ms, predictions=len(part), errors=0,
            classes=[], latency_us=[],
            sketch=bank.to_bytes(), extra={"quality": quality},
        )  # fmt: skip

    def _labels(self, sha256: str, number: int, correct: int) -> Labels:
        self._seq += 1
        return Labels(
            device_id=DEVICE, stream_id=STREAM, seq=self._seq, model_sha256=sha256, number=number,
            split=2, received_ms=self._now_ms, labelled=SIZE, correct=correct, confusion=[],
        )  # fmt: skip

    def _look(self, day: int) -> None:
        """Keep what is new among the alerts, and what is live."""
        with self._store.read() as session:
            alerts = session.scalars(select(Alert).order_by(Alert.id)).all()
            for alert in alerts[len(self.told.told) :]:
                self.told.told.append(
                    Told(
                        day, alert.kind, alert.scope, alert.subject, alert.model_sha256,
                        alert.text, bool(alert.evidence.get("suspected")),
                    )
                )  # fmt: skip
            live = {alert.kind for alert in alerts if alert.state in LIVE}
        self.told.live.append((day, tuple(sorted(live))))

    def audit(self) -> Sequence[tuple[str, dict[str, Any]]]:
        """Return (action, detail) of what the policy wrote into the log."""
        with self._store.read() as session:
            rows = session.scalars(
                select(Audit).where(Audit.action.startswith("retraining")).order_by(Audit.id)
            )
            return [(row.action, row.detail) for row in rows]


def opened(made: Made, days: Days, orders: Sequence[NDArray[np.int64]]) -> list[list[str]]:
    """Return the alarms that open while days are played in some orders, without a database.

    The same folding, judging and settling as the worker's, for a fleet of this one device: many
    seeds in little time.
    """
    sure__n, right__n = made.answers(days)
    features = made.profile.features
    values = [*days.x__nct[:, :, 0].T, sure__n]
    where = [
        np.searchsorted(np.array(f.edges, np.float32), each, side="right")
        for f, each in zip(features, values, strict=True)
    ]
    found: list[list[str]] = []
    for order in orders:
        state, alarms = DeviceState(), list[str]()
        for start in range(0, len(order) - SIZE + 1, SIZE):
            rows = order[start : start + SIZE]
            counts = [
                np.bincount(each[rows], minlength=len(f.counts)).tolist()
                for each, f in zip(where, features, strict=True)
            ]
            state.fold(counts, config=RULES)
            state.label(SIZE, int(right__n[rows].sum()), profile=made.profile, config=RULES)
            evidence = detectors.findings(state, made.profile, config=RULES)
            standing = verdicts.SHIFT in state.alarms
            level = detectors.level(state, standing=standing, config=RULES)
            kept = detectors.judge_fleet(
                {STATION: evidence}, config=RULES, levels={STATION: level}
            )[STATION]
            look = verdicts.Look(found=evidence, kept=kept)
            causes = verdicts.causes(look, config=verdicts.VerdictConfig())
            before = {name for name, alarm in state.alarms.items() if alarm.open}
            detectors.settle(state, causes, config=RULES)
            now = {name for name, alarm in state.alarms.items() if alarm.open}
            alarms += sorted(now - before)
        found.append(alarms)
    return found


def shuffled(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    """Return days of the reference drawn one by one: no drift, and no season."""
    return rng.integers(0, REFERENCE, count)


def other_years(rng: np.random.Generator, count: int, *, block: int = 90) -> NDArray[np.int64]:
    """Return the seasons in their order, each block of days out of some year of the reference."""
    years, found, day = REFERENCE // YEAR, list[NDArray[np.int64]](), 0
    while day < count:
        size = min(block, YEAR - day % YEAR)
        found.append(rng.integers(years) * YEAR + day % YEAR + np.arange(size))
        day += size
    return np.concatenate(found)[:count]
