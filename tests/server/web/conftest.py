"""A seeded fleet of ten wrists, and a console that serves it."""

from __future__ import annotations

import asyncio
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from shoal.server.store import Store
from shoal.server.store.tables import (
    Alert,
    Device,
    DriftState,
    Gap,
    Labels,
    Model,
    Quarantine,
    RecordRow,
    Rollout,
    RolloutDevice,
    RoundsRun,
    Stream,
)
from shoal.server.web import Console, ConsoleConfig

NOW_MS = 1_790_000_010_000
MINUTE_MS = 60_000
V1, V2 = "1" + "a3f9c07d2b5e" * 5 + "0de", "2" + "e81b64d9f03c" * 5 + "47a"
WRISTS = [f"wrist-{number:02d}" for number in range(1, 11)]
DRIFTING = {
    "wrist-03": ["gyro_z", "accel_x"],
    "wrist-06": ["accel_y"],
    "wrist-09": ["gyro_x", "gyro_z", "accel_z", "confidence"],
}
OFFERED = {"wrist-01": 9, "wrist-03": 9} | {name: 3 for name in WRISTS if name[-1] in "245678"}
STATES = {
    "wrist-01": "confirmed", "wrist-03": "confirmed", "wrist-02": "confirmed",
    "wrist-04": "confirmed", "wrist-05": "trial", "wrist-06": "trial", "wrist-07": "downloading",
    "wrist-08": "offered",
}  # fmt: skip


SAID: dict[str, Any] = {
    "wrist-04": {
        "monitor": {
            "withheld": 3200, "sketch_stride": 1, "bins_alone": 12,
            "sketch_hindrance": "bins alone: 600 features x 31 edges do not fit a record",
        },
        "warnings": [
            {
                "code": "monitor.sketch", "severity": "warning",
                "text": "bins alone: 600 features x 31 edges do not fit a record",
            },
            {
                "code": "spool.refused", "severity": "error",
                "text": "the spool has no room in 67108864 bytes, or on its disk, and nothing may "
                "be given up",
            },
        ],
    },
    "wrist-07": {"monitor": {"withheld": 0, "sketch_stride": 4, "sketch_hindrance": ""}},
}  # fmt: skip
"""States that devices reported, where they say more than nothing."""


def seed(session: Session, *, now_ms: int = NOW_MS) -> None:
    """Write a fleet in the middle of its second rollout; 40 minutes of history."""
    rng = random.Random(7)
    for version, sha in ((1, V1), (2, V2)):
        session.add(
            Model(
                name="wearable", version=version, sha256=sha, size=61_440, created_ms=now_ms,
                manifest={}, profile={}, approved_ms=now_ms,
            )
        )  # fmt: skip
    session.add(_rollout("r1", V1, "completed", 40, now_ms, evidence=[]))
    session.add(_rollout("r2", V2, "running", 9, now_ms, evidence=[PASSED], wave=1))
    session.flush()
    for number, name in enumerate(WRISTS):
        silent = name == "wrist-10"
        moved = STATES.get(name) in ("confirmed", "trial")
        device = Device(
            name=name, created_ms=now_ms - 45 * MINUTE_MS, online=not silent,
            seen_ms=now_ms - (4 * MINUTE_MS if silent else rng.randrange(100, 4000)),
            reported={"model": V2 if moved else V1, "state": SAID.get(name, {})},
            reported_ms=now_ms - 20_000,
            site="" if number == 9 else "north" if number < 4 else "south", hardware="m4",
        )  # fmt: skip
        session.add(device)
        session.flush()
        stream = Stream(device_id=device.id, stream=bytes([number]) * 16, first_ms=now_ms, upto=9)
        session.add(stream)
        session.flush()
        _labels(session, rng, name, device.id, stream.id, now_ms)
        _progress(session, name, device.id, now_ms)
        _watch(session, name, device.id, V2 if moved else V1, now_ms)
        for seq in range(1, 60):
            session.add(
                RecordRow(
                    stream_id=stream.id, seq=seq, kind="window", device_time_ms=now_ms,
                    received_ms=now_ms, body=b"\x80",
                )
            )  # fmt: skip
    _rest(session, now_ms)


PASSED = {
    "wave": 0,
    "verdict": "PASS",
    "checks": [
        {"verdict": "PASS", "text": "0 failed and 0 fell silent of 2 devices; 10% may"},
        {
            "verdict": "PASS",
            "text": "81.6% right answers before, 92.1% now: +10.5 points (+4.1 to +16.6) "
            "of 640 now and 800 before",
        },
        {
            "verdict": "PASS",
            "text": "3 of 1280 calls took longer than 1.02 ms, 1.5 times the old 99th percentile",
        },
    ],
}
ALERTS = [
    (
        "accuracy_loss", "device", "wrist-09", "open", 21,
        "accuracy 67%, 24 points below the expected 91% (false with a chance of at most 0.0001): "
        "retrain on new labels, or go back to the model before",
    ),
    (
        "local_shift", "site", "north", "acknowledged", 26,
        "inputs of 3 of 4 devices and 1 of 6 elsewhere (by chance: 0.03) are unlike all that the "
        "model was made with; most of all gyro_x (3), gyro_z (2): look at what changed there; the "
        "model may not know these conditions",
    ),
    (
        "sensor_fault", "device", "wrist-06", "open", 24,
        "accel_y stands still in 38% (12 of 12 windows; 2% may): check or replace the sensor",
    ),
    (
        "local_shift", "device", "wrist-03", "resolved", 28,
        "drifts in gyro_z higher (PSI 0.88, usual 0.22), accel_x lower (PSI 0.62, usual 0.25)",
    ),
    (
        "accuracy_loss", "fleet", "", "open", 12,
        "the model is less sure than it ever was on 7 of 10 devices (by chance: 0.0009), so it may "
        "be right less often; no label says so yet: collect labels there before anything is "
        "retrained",
    ),
]  # fmt: skip


def _rollout(
    rollout_id: str, sha: str, state: str, ago_min: int, now_ms: int, *, evidence: list[Any],
    wave: int = 0,
) -> Rollout:  # fmt: skip
    at = now_ms - ago_min * MINUTE_MS
    return Rollout(
        id=rollout_id, model_sha256=sha, state=state, wave=wave,
        waves=[10] if rollout_id == "r1" else [2, 10], bake_windows=2, deadline_s=600,
        created_ms=at, changed_ms=at + MINUTE_MS, evidence=evidence,
    )  # fmt: skip


def _labels(
    session: Session, rng: random.Random, name: str, device: int, stream: int, now_ms: int
) -> None:
    known = 0.90 + 0.01 * (WRISTS.index(name) % 4)
    for seq, minute in enumerate(range(39, -1, -1)):
        if name == "wrist-10" and minute < 4:
            continue
        moved = STATES.get(name) in ("confirmed", "trial") and minute < OFFERED[name] - 1
        share = known + 0.02 * moved
        if name in DRIFTING and not moved:
            share = 0.66 + 0.03 * (WRISTS.index(name) % 3)
        correct = sum(rng.random() < share for _ in range(80))
        session.add(
            Labels(
                device_id=device, stream_id=stream, seq=seq, number=seq, split=0,
                model_sha256=V2 if moved else V1, received_ms=now_ms - minute * MINUTE_MS - 9_000,
                labelled=80, correct=correct, confusion=[],
            )
        )  # fmt: skip


def _progress(session: Session, name: str, device: int, now_ms: int) -> None:
    first = RolloutDevice(
        rollout_id="r1", device_id=device, wave=0, state="confirmed",
        offered_ms=now_ms - 39 * MINUTE_MS, changed_ms=now_ms,
    )  # fmt: skip
    session.add(first)
    session.flush()
    minutes = OFFERED.get(name)
    session.add(
        RolloutDevice(
            rollout_id="r2", device_id=device, wave=0 if minutes == 9 else 1,
            state=STATES.get(name, "eligible"), changed_ms=now_ms,
            offered_ms=None if minutes is None else now_ms - minutes * MINUTE_MS,
        )
    )  # fmt: skip


def _watch(session: Session, name: str, device: int, sha: str, now_ms: int) -> None:
    features = DRIFTING.get(name, [])
    for model in {V1, sha}:
        drifting = bool(features) and (model == V1 or name == "wrist-06")
        text = f"{name}: drifts in {', '.join(features)}" if drifting else f"{name}: as usual"
        session.add(
            DriftState(
                device_id=device, model_sha256=model, windows=31, changed_ms=now_ms,
                state={"trace": _trace(name, features if drifting else [], now_ms)},
                verdict={"drifting": drifting, "text": text,
                         "features": features if drifting else []},
            )
        )  # fmt: skip


FEATURES = ("accel_x", "accel_y", "accel_z", "gyro_x", "gyro_y", "gyro_z", "confidence", "inputs")


def _trace(name: str, drifting: list[str], now_ms: int) -> dict[str, Any]:
    """Return 24 judgements in which these features became unlike the reference."""
    rng = random.Random(name)
    points = []
    for at in range(24):
        row = [round(abs(rng.gauss(0, 0.4)), 1) for _ in FEATURES]
        for feature in drifting:
            strength = 2.0 + 1.5 * drifting.index(feature) + rng.random()
            row[FEATURES.index(feature)] = round(strength * min(1, max(0, at - 6) / 8), 1)
        points.append([now_ms - (23 - at) * MINUTE_MS, row])
    return {"features": list(FEATURES), "points": points}


def _rest(session: Session, now_ms: int) -> None:
    for row, (kind, scope, subject, state, minutes, text) in enumerate(ALERTS):
        place = {"site": f"site {subject}", "fleet": "the fleet"}.get(scope, subject)
        evidence = {
            "devices": WRISTS[:3], "affected": 3, "judged": 4, "p_value": 0.03,
            "rest": {"affected": 1, "judged": 6}, "suspected": scope == "fleet",
            "features": [{"feature": "gyro_x", "devices": 3}, {"feature": "gyro_z", "devices": 2}],
        }  # fmt: skip
        session.add(
            Alert(
                id=row + 1, model_sha256=V1, kind=kind, scope=scope, subject=subject, state=state,
                device_id=WRISTS.index(subject) + 1 if scope == "device" else None,
                text=f"{place}: {text}", evidence=evidence, seen=7,
                opened_ms=now_ms - minutes * MINUTE_MS,
                resolved_ms=now_ms if state == "resolved" else None,
                note="on my way" if state == "acknowledged" else "",
            )
        )  # fmt: skip
    history = [
        {
            "round": number,
            "devices": 10 - (number % 7 == 0),
            "loss_first": 0.62 * 0.94**number + 0.21,
        }
        for number in range(1, 31)
    ]
    session.add(
        RoundsRun(
            id="f1", state="done", base_sha256=V1, settings={"rounds": 30}, round=30,
            parameters_sha256="", candidate_sha256=V2, history=history,
            created_ms=now_ms - 16 * MINUTE_MS, changed_ms=now_ms - 11 * MINUTE_MS,
        )
    )  # fmt: skip
    session.add(
        Gap(
            device_id=10, stream=b"\x09" * 16, spool_class="raw", first=1, last=4, count=4,
            reason="spool full", received_ms=now_ms,
        )
    )  # fmt: skip
    session.add(
        Quarantine(
            device_name="wrist-10", topic="t", reason="not msgpack", size=3, head=b"abc",
            received_ms=now_ms,
        )
    )  # fmt: skip


class Served:
    """A console running in a thread of its own, with the store it shows."""

    def __init__(self, store: Store, config: ConsoleConfig) -> None:
        self.store = store
        self.url = ""
        self._config = config
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._began_s = time.monotonic()

    def clock(self) -> int:
        """The server's time: the seeded moment, going on."""
        return NOW_MS + int(1000 * (time.monotonic() - self._began_s))

    async def _main(self) -> None:
        console = Console(self.store, config=self._config, clock=self.clock)
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(console.run())
        started = asyncio.create_task(console.started.wait())
        await asyncio.wait([self._task, started], return_when=asyncio.FIRST_COMPLETED)
        self.url = console.url
        self._ready.set()
        started.cancel()
        try:
            await self._task
        except asyncio.CancelledError:
            pass
        except BaseException as exc:
            self._failure = exc

    def start(self) -> None:
        """Return once requests are answered."""
        self._thread.start()
        assert self._ready.wait(30)

    def stop(self) -> None:
        """End it, once; a failure of the server is raised here."""
        assert self._loop is not None and self._task is not None
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._task.cancel)
            self._thread.join(30)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure


Serve = Callable[..., Served]


def _template(path: Path, *, seeded: bool) -> Path:
    store = Store(f"sqlite:///{path}")
    store.migrate()
    if seeded:
        with store.begin() as session:
            seed(session)
    store.close()
    return path


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An empty and a seeded database, made once: migrating takes longer than most tests."""
    home = tmp_path_factory.mktemp("web")
    return {
        "empty": _template(home / "empty.db", seeded=False),
        "seeded": _template(home / "seeded.db", seeded=True),
    }


@pytest.fixture
def empty_store(templates: dict[str, Path], tmp_path: Path) -> Iterator[Store]:
    """A migrated store without a row."""
    store = Store(f"sqlite:///{shutil.copy(templates['empty'], tmp_path / 'empty.db')}")
    yield store
    store.close()


@pytest.fixture
def store(templates: dict[str, Path], tmp_path: Path) -> Iterator[Store]:
    """The seeded fleet."""
    store = Store(f"sqlite:///{shutil.copy(templates['seeded'], tmp_path / 'seeded.db')}")
    yield store
    store.close()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start consoles that end with the test."""
    running: list[Served] = []

    def start(store: Store, **settings: Any) -> Served:
        served = Served(store, ConsoleConfig(**{"port": 0, "refresh_s": 0.1, **settings}))
        served.start()
        running.append(served)
        return served

    yield start
    for served in running:
        served.stop()
