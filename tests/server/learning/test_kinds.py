"""Kinds of channels, the whole way: data set, training, bundle, device, ingest, drift, figures.

A story with real parts and no network: a model is trained on six machines with a real number
(heat), a count (parts) and a code (gear); devices run it on real inferences; what they send is
ingested, judged and asked for as an operator does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from sqlalchemy import select

from shoal.agent.monitor import MonitorConfig, WindowMonitor
from shoal.agent.profile import DeviceProfile
from shoal.agent.runtime import Runtime
from shoal.proto import topics
from shoal.proto.bundle import Bundle, unpack
from shoal.proto.records import Kind, Record, encode_batch, encode_record
from shoal.proto.session import Message
from shoal.server.cli import main
from shoal.server.drift import profile_feature
from shoal.server.drift.config import DriftWorkerConfig
from shoal.server.drift.detectors import DriftConfig
from shoal.server.drift.profile import ReferenceProfile
from shoal.server.drift.worker import Drift
from shoal.server.lake import Lake, LakeConfig
from shoal.server.learning import pipeline
from shoal.server.learning.config import ProfileConfig
from shoal.server.learning.dataset import Source, npz, read_dataset, read_source
from shoal.server.learning.fit import FitConfig
from shoal.server.store import Store
from shoal.server.store.tables import Alert, Device, Model
from tests.sims.server import FleetServer
from tests.sims.stores import fresh_store, writer_of

CHANNELS, KINDS = ("heat", "parts", "gear"), ("float", "integer", "category")
GEARS = (0, 1, 2, 5)  # 3, 4 and what is beyond were never seen
USUAL = (0.4, 0.3, 0.2, 0.1)
T, MACHINES, EACH = 16, 6, 80
WINDOWS, PREDICTIONS = 12, 60
NOW_MS = 1_790_000_000_000
CONFIG = pipeline.PipelineConfig(fit=FitConfig(epochs=2))


def windows(
    rng: np.random.Generator, y__n: NDArray[np.int64], *, gears: Any = GEARS, mix: Any = USUAL
) -> NDArray[np.float32]:
    """Return windows of machines: the class is the form of the heat; a gear lasts four samples."""
    n = len(y__n)
    heat = rng.normal(size=(n, T)) + 2 * np.sin(np.arange(T) * (1 + y__n[:, None]))
    parts = rng.poisson(3, (n, T))
    gear = rng.choice(gears, (n, T // 4), p=mix).repeat(4, 1)
    return np.stack([heat, parts, gear], 1).astype(np.float32)


def arrays() -> dict[str, NDArray[Any]]:
    """Return the data set of six machines."""
    rng = np.random.default_rng(2)
    n = MACHINES * EACH
    y__n = rng.integers(0, 2, n)
    return {
        "x__nct": windows(rng, y__n),
        "y__n": y__n,
        "split__n": np.resize(np.array([0, 0, 0, 1], np.uint8), n),
        "group__n": np.repeat(np.arange(MACHINES), EACH),
        "channels": np.array(json.dumps(CHANNELS)),
        "classes": np.array(json.dumps(["slow", "fast"])),
        "kinds": np.array(json.dumps(KINDS)),
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A model trained on them."""
    path = tmp_path_factory.mktemp("kinds") / "train.npz"
    path.write_bytes(npz(arrays()))
    return pipeline.train(
        read_dataset(path), epochs=0, seed=0, config=CONFIG, told=lambda news: None
    )


def bundle_of(source: Source, config: pipeline.PipelineConfig = CONFIG) -> Bundle:
    """Return its bundle, as a device has it."""
    return unpack(pipeline.build_bundle(source, name="mill", facts={}, config=config)[0])


def kinds_of(bundle: Bundle) -> tuple[str, ...]:
    """Return what a device reads in a bundle."""
    profile = bundle.parts["profile.json"]
    return DeviceProfile.from_json(profile, features=len(bundle.manifest.channels) + 1).kinds


def test_kinds_survive_the_source_and_a_candidate(source: Source, tmp_path: Path) -> None:
    """Training, a stored source, other parameters: devices count each channel as what it is."""
    (tmp_path / "source").write_bytes(source.to_bytes())
    again = read_source(tmp_path / "source")
    assert again.dataset.kinds == KINDS and again.to_bytes() == source.to_bytes()
    changed = (np.frombuffer(pipeline.vector(again.model), "<f4") * 2).astype("<f4").tobytes()
    candidate = Source(pipeline.with_vector(again.model, changed), again.dataset)
    for each in (source, candidate):
        assert kinds_of(bundle_of(each)) == (*KINDS, "float")


def test_an_old_source_still_makes_its_bundle() -> None:
    """Without the key all are "float", and what is written is what was read, to the byte."""
    path = Path(__file__).parent / "golden" / "source-0.1.0"
    found = read_source(path)
    assert found.dataset.kinds == () and found.to_bytes() == path.read_bytes()
    assert kinds_of(bundle_of(found)) == ("float",) * 3


def test_the_profile_is_as_fine_as_configured(source: Source) -> None:
    """Fewer bins than codes, and no projection."""
    config = pipeline.PipelineConfig(profile=ProfileConfig(bins=3, projected=0))
    parts = [bundle_of(source, each).parts["profile.json"] for each in (CONFIG, config)]
    usual, coarse = map(ReferenceProfile.from_json, parts)
    assert usual.projection is not None and coarse.projection is None
    assert [len(each.counts) for each in usual.features][::2] == [16, 7]
    assert all(len(each.counts) <= 3 for each in coarse.features)


@dataclass(frozen=True, slots=True)
class World:
    """A server's store with what devices sent."""

    store: Store
    bundle: Bundle
    profile: ReferenceProfile
    worker: Drift


def sent(
    bundle: Bundle,
    rng: np.random.Generator,
    *,
    bins_only: bool = False,
    change: Callable[[NDArray[np.float32]], None] = lambda x__nct: None,
    **how: Any,
) -> list[dict[str, Any]]:
    """Return the WINDOW records of a device that runs the model; it changes gear rarely."""
    told: list[tuple[Kind, dict[str, Any]]] = []
    manifest = bundle.manifest
    monitor = WindowMonitor(
        model_sha256=bundle.sha256,
        inputs=[manifest.input],
        outputs=[manifest.output],
        input_name=manifest.input,
        output_name=manifest.output,
        samples=manifest.samples,
        classes=len(manifest.classes),
        profile=DeviceProfile.from_json(bundle.parts["profile.json"], features=4),
        config=MonitorConfig(
            window_predictions=PREDICTIONS, cpu_share_max=1.0, bins_only=bins_only
        ),
        emit=lambda kind, body: told.append((kind, body)),
        clock=lambda: NOW_MS - 60_000,
    )
    x__nct = windows(rng, rng.integers(0, 2, WINDOWS * PREDICTIONS), **how)
    x__nct[:, 2] = np.sort(x__nct[:, 2].reshape(WINDOWS, -1)).reshape(-1, T)
    change(x__nct)
    with Runtime() as runtime:
        model = runtime.load(bundle.model, monitor=monitor)
        for each in x__nct:
            model.infer({manifest.input: each[None]})
    assert [kind for kind, _ in told] == [Kind.WINDOW] * WINDOWS
    return [body for _, body in told]


def judged(
    bundle: Bundle, told: dict[str, list[dict[str, Any]]], folder: Path, *, profile: bytes = b""
) -> World:
    """Return a store that took what devices sent, judged window by window."""
    found = ReferenceProfile.from_json(profile or bundle.parts["profile.json"])
    store = fresh_store(folder / "fleet.db")
    with store.begin() as session:
        session.add(
            Model(
                name="mill", version=1, sha256=bundle.sha256, size=1, created_ms=1, manifest={},
                profile=json.loads(found.to_json()),
            )
        )  # fmt: skip
        for name in told:
            session.add(Device(name=name, created_ms=1, reported={"model": bundle.sha256}))
    writer = writer_of(store, clock=lambda: NOW_MS)
    rules = DriftConfig(windows_min=4, predictions_min=100)
    worker = Drift(store, clock=lambda: NOW_MS, config=DriftWorkerConfig(rules=rules))
    for at in range(WINDOWS):
        messages = [
            Message(
                topics.topic(name, topics.Leaf.TELEMETRY),
                encode_batch(
                    bytes([i] * 16),
                    [encode_record(Record(at + 1, Kind.WINDOW, NOW_MS, bodies[at]))],
                ),
                (at, i),
            )
            for i, (name, bodies) in enumerate(told.items())
        ]
        written = writer.write(messages)
        assert (written.stored, written.quarantined) == (len(told), 0)
        worker.step()
    return World(store, bundle, found, worker)


@pytest.fixture(scope="module")
def world(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One device as ever, one in gear 5 more often and sometimes in 4, which training never saw."""
    bundle, rng = bundle_of(source), np.random.default_rng(9)
    changed: dict[str, Any] = {"gears": (0, 1, 2, 4, 5), "mix": (0.2, 0.2, 0.2, 0.05, 0.35)}
    told = {"same": sent(bundle, rng), "other": sent(bundle, rng, **changed)}
    found = judged(bundle, told, tmp_path_factory.mktemp("fleet"))
    yield found
    found.store.close()


def test_a_new_code_and_another_mix_are_found_and_the_control_is_silent(world: World) -> None:
    """Judged window by window; a code in a gap is out of no range, and is seen all the same.

    That a gear stays for hundreds of samples is no stuck sensor, and its change no broken one.
    """
    other, same = world.worker.report(world.bundle.sha256)["devices"]
    assert (other["device"], same["device"]) == ("other", "same")
    assert (same["drifting"], same["faults"], same["open_alerts"]) == (False, [], [])
    assert (other["kind"], other["features"][0]) == ("local_shift", "gear")
    (fault,) = other["faults"]
    assert (fault["feature"], fault["check"], fault["codes"]) == ("gear", "unknown", [4])
    assert len(other["open_alerts"]) == 1
    assert "gear in another mix" in other["text"] and "gear: unknown code 4 in 6%" in other["text"]
    (gear,) = (each for each in other["findings"] if each["feature"] == "gear")
    assert gear["direction"] == 0


def test_codes_beyond_the_known_ones_are_no_broken_sensor(source: Source, tmp_path: Path) -> None:
    """They are new, and named with their share; without sketches they are counted by their bins.

    What is no whole number is no code at all: somebody averages them. A count beyond its range is
    told as before.
    """
    bundle, rng = bundle_of(source), np.random.default_rng(9)
    new: dict[str, Any] = {"gears": (*GEARS, 9), "mix": (0.38, 0.29, 0.19, 0.09, 0.05)}

    def halved(x__nct: NDArray[np.float32]) -> None:
        x__nct[:, 2, ::8] = 0.5

    def many(x__nct: NDArray[np.float32]) -> None:
        x__nct[:, 1, ::8] = 1000

    told = {
        "bare": sent(bundle, rng, bins_only=True, **new),
        "halved": sent(bundle, rng, change=halved),
        "many": sent(bundle, rng, change=many),
        "new": sent(bundle, rng, **new),
        "same": sent(bundle, rng),
    }
    found = judged(bundle, told, tmp_path)
    rows = {row["device"]: row for row in found.worker.report(bundle.sha256)["devices"]}
    with found.store.read() as session:
        alerts = {each.subject: each for each in session.scalars(select(Alert))}
    lake = Lake(found.store, tmp_path / "lake", clock=lambda: NOW_MS, config=LakeConfig())
    table = lake.history.drift_table(
        bundle.sha256, "device", NOW_MS - 3_600_000, NOW_MS, found.profile
    )
    found.store.close()
    fractions = {row["group"]: row["fraction_share"] for row in table if row["feature"] == "gear"}
    assert fractions.pop("halved") == pytest.approx(0.125)
    assert fractions == {"bare": None, "many": 0.0, "new": 0.0, "same": 0.0}
    kinds = {name: row["kind"] for name, row in rows.items()}
    assert kinds == {
        "bare": "local_shift", "halved": "sensor_fault", "many": "sensor_fault",
        "new": "local_shift", "same": "",
    }  # fmt: skip
    checks = {name: {fault["check"] for fault in row["faults"]} for name, row in rows.items()}
    assert checks == {
        "bare": {"unknown"}, "halved": {"fraction"}, "many": {"above"}, "new": {"unknown"},
        "same": set(),
    }  # fmt: skip
    assert rows["new"]["faults"][0]["share"] == pytest.approx(0.05, abs=0.015)
    assert "gear: unknown code 9 in" in alerts["new"].text and "sensor" not in alerts["new"].text
    assert "gear has unknown codes in" in alerts["bare"].text
    assert "gear is no whole number in 12%" in alerts["halved"].text
    assert "averages or scales" in alerts["halved"].text
    assert "parts is above its range in 12%" in alerts["many"].text


def test_a_count_that_rests_is_not_stuck(tmp_path: Path) -> None:
    """Where training rested too; a sensor that stands still is found all the same.

    The control is a profile that does not tell how long training rested: the count is stuck then.
    """
    raw = arrays()
    raw["x__nct"].reshape(MACHINES, EACH, 3, T)[:, : EACH // 2, 1] = 0
    (tmp_path / "train.npz").write_bytes(npz(raw))
    data = read_dataset(tmp_path / "train.npz")
    bundle = bundle_of(
        pipeline.train(data, epochs=0, seed=0, config=CONFIG, told=lambda news: None)
    )
    profile = ReferenceProfile.from_json(bundle.parts["profile.json"])
    heat, parts, gear = profile.features[:3]
    assert (heat.stuck, gear.stuck) == (0, 0)
    assert parts.stuck is not None and parts.stuck >= MACHINES * EACH * 3 // 8 * T
    rng, resting = np.random.default_rng(9), []

    def rest(x__nct: NDArray[np.float32]) -> None:
        x__nct[: 8 * PREDICTIONS, 1] = 0
        resting.append(x__nct[:, 1].copy())

    def stand(x__nct: NDArray[np.float32]) -> None:
        x__nct[:, 0] = 1

    told = {"rests": sent(bundle, rng, change=rest), "stands": sent(bundle, rng, change=stand)}
    measured = profile_feature.measure(
        resting[0], name="parts", kind="integer", bins=16, trained=resting, held=[]
    )
    counted = sum(body["quality"]["stuck"][1] for body in told["rests"])
    assert counted == measured.stuck, "the server counts the training data as a device does"
    silent = replace(profile, features=tuple(replace(f, stuck=None) for f in profile.features))
    found = []
    for name, data_ in (("new", b""), ("old", silent.to_json())):
        (tmp_path / name).mkdir()
        world = judged(bundle, told, tmp_path / name, profile=data_)
        rows = world.worker.report(bundle.sha256)["devices"]
        found.append([[(f["feature"], f["check"]) for f in row["faults"]] for row in rows])
        world.store.close()
    assert found == [[[], [("heat", "stuck")]], [[("parts", "stuck")], [("heat", "stuck")]]]


def test_the_figures_name_what_is_new(world: World, tmp_path: Path) -> None:
    """Out of the lake, and as the command prints them."""
    lake = Lake(world.store, tmp_path / "lake", clock=lambda: NOW_MS, config=LakeConfig())
    rows = lake.history.drift_table(
        world.bundle.sha256, "device", NOW_MS - 3_600_000, NOW_MS, world.profile
    )
    json.dumps(rows, allow_nan=False)
    by_key = {(row["group"], row["feature"]): row for row in rows}
    kinds = {name: by_key["same", name]["kind"] for name in (*CHANNELS, "confidence")}
    assert tuple(kinds.values()) == (*KINDS, "float")
    other, same = (by_key[name, "gear"] for name in ("other", "same"))
    assert [each["item"] for each in other["frequent"]["new"]] == [4]
    assert other["frequent"]["new"][0]["share"] == pytest.approx(0.05, abs=0.02)
    assert other["frequent"]["p_value"] < 1e-100 and other["frequent"]["largest"][0] == 5
    assert not same["frequent"]["new"] and not same["frequent"]["vanished"]
    assert [each["distinct"]["estimate"] for each in (other, same)] == pytest.approx([5, 4])
    assert other["distinct"]["reference"] == 4
    for name in (
        *("ks", "wasserstein", "direction", "p50"),
        *("below", "above", "mean", "deviation", "out_of_range_share"),
    ):
        assert other[name] is None, "codes have no order"
        assert by_key["other", "parts"][name] is not None
    assert by_key["other", "parts"]["frequent"]["p_value"] > 1e-3
    assert by_key["other", "heat"]["frequent"] is by_key["other", "heat"]["distinct"] is None
    with FleetServer(tmp_path) as server:
        sha256 = server.approved_model()
        with server.store.begin() as session:
            session.get_one(Model, 1).profile = json.loads(world.profile.to_json())
        server.table = rows
        arguments = ["drift", "show", "--model", sha256, "--group-by", "device"]
        shown = CliRunner().invoke(main, ["--state", str(server.state), *arguments])
    (gear,) = (x for x in shown.stdout.splitlines() if x.startswith("other") and " gear " in x)
    assert gear.split()[5] == "–" and gear.split()[8:] == ["–", "–"], "no P50, no way it moved"
    (said,) = shown.stderr.splitlines()
    assert said.startswith("other gear: new 4 (") and "another mix (Cramér's V 0.3" in said
    assert said.endswith("5 different values (reference 4)")
