"""Vectors, properties and faults of the pipeline: data set in, reproducible bundle out."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from shoal.agent.profile import DeviceProfile
from shoal.proto.bundle import unpack
from shoal.server.drift.profile import ReferenceProfile
from shoal.server.learning import pipeline
from shoal.server.learning.dataset import (
    DatasetConfig,
    Source,
    npz,
    read_dataset,
    read_source,
)
from shoal.server.learning.errors import DatasetError, LearningError
from shoal.server.learning.fit import FitConfig
from shoal.server.learning.networks import parameters

C, T, K, N = 2, 8, 3, 120
CONFIG = pipeline.PipelineConfig(fit=FitConfig(epochs=4))


def arrays(seed: int = 0) -> dict[str, NDArray[Any]]:
    """Return the arrays of a small data set: the class shifts the mean of channel 0."""
    rng = np.random.default_rng(seed)
    y__n = rng.integers(0, K, N)
    x__nct = rng.normal(size=(N, C, T))
    x__nct[:, 0] += 2 * np.sin(np.arange(T) * (1 + y__n[:, None]))
    return {
        "x__nct": x__nct.astype(np.float32),
        "y__n": y__n,
        "split__n": np.resize(np.array([0, 0, 0, 1, 2], np.uint8), N),
        "group__n": np.repeat([5, 7], N // 2),
        "channels": np.array(json.dumps(["a", "b"])),
        "classes": np.array(json.dumps(["k", "l", "m"])),
    }


def source(folder: Path, *, seed: int = 0) -> Source:
    """Return a trained source."""
    path = folder / "data.npz"
    path.write_bytes(npz(arrays()))
    return pipeline.train(
        read_dataset(path), epochs=0, seed=seed, config=CONFIG, told=lambda news: None
    )


def test_a_bundle_holds_what_a_device_needs(tmp_path: Path) -> None:
    """Probabilities, golden vectors of the int8 model, the profile, a runnable training graph."""
    made = source(tmp_path)
    data, figures = pipeline.build_bundle(made, name="m", facts={"seed": "0"}, config=CONFIG)
    found = unpack(data)
    manifest = found.manifest
    assert (manifest.input, manifest.output, manifest.samples) == ("x", "probabilities", T)
    assert (manifest.channels, manifest.classes) == (("a", "b"), ("k", "l", "m"))
    assert manifest.facts == {"seed": "0"}
    session = ort.InferenceSession(found.model)
    with np.load(io.BytesIO(found.parts["golden.npz"]), allow_pickle=False) as golden:
        x__nct, want__nk = golden["x"], golden["probabilities"]
    (got__nk,) = session.run(["probabilities"], {"x": x__nct})
    assert len(x__nct) == pipeline.GOLDEN
    np.testing.assert_allclose(got__nk, want__nk, atol=1e-5)
    np.testing.assert_allclose(got__nk.sum(1), 1, atol=1e-5)
    profile = ReferenceProfile.from_json(found.parts["profile.json"])
    assert [each.name for each in profile.features] == ["a", "b", "confidence"]
    assert profile.groups == ("5", "7") and sum(profile.labelled) == figures["windows"] == N // 5
    assert figures["accuracy_int8"] == pytest.approx(sum(profile.correct) / sum(profile.labelled))
    assert profile.confidence is not None and profile.confidence.classes == 3
    wrong, right = np.array(profile.confidence.wrong), np.array(profile.confidence.right)
    assert right.sum() == sum(profile.correct) and (wrong + right).sum() == figures["windows"]
    assert profile.projection is not None and profile.projection.columns == 2
    assert figures["bytes"] == len(data)
    step = ort.InferenceSession(found.parts["training.onnx"])
    meta = json.loads(step.get_modelmeta().custom_metadata_map["shoal.training"])
    size = sum(int(np.prod(each["shape"])) for each in meta["params"])
    assert 4 * size == len(pipeline.vector(made.model)) and meta["mu"] and not meta["state"]
    names = [each["name"] for each in meta["params"]]
    assert names == list(parameters(made.model)), "the vector has one order everywhere"


def test_the_test_windows_stay_out_of_everything(tmp_path: Path) -> None:
    """Neither training, calibration, profile nor source see the test split."""
    path = tmp_path / "data.npz"
    given = arrays()
    path.write_bytes(npz(given))
    clean, _ = pipeline.build_bundle(source(tmp_path), name="m", facts={}, config=CONFIG)
    given["x__nct"][given["split__n"] == 2] = 1e6
    other = tmp_path / "other"
    other.mkdir()
    (other / "data.npz").write_bytes(npz(given))
    made = pipeline.train(
        read_dataset(other / "data.npz"), epochs=0, seed=0, config=CONFIG, told=lambda news: None
    )
    poisoned, _ = pipeline.build_bundle(made, name="m", facts={}, config=CONFIG)
    assert poisoned == clean
    assert len(made.dataset.y__n) == N * 4 // 5


def test_the_same_source_makes_the_same_bytes(tmp_path: Path) -> None:
    """A step that a crash interrupted registers nothing twice, also after a round trip."""
    made = source(tmp_path)
    (tmp_path / "source").write_bytes(made.to_bytes())
    again = read_source(tmp_path / "source")
    assert again.to_bytes() == made.to_bytes()
    bundles = {
        pipeline.build_bundle(each, name="m", facts={}, config=CONFIG)[0] for each in (made, again)
    }
    assert len(bundles) == 1


def test_a_vector_goes_in_and_out(tmp_path: Path) -> None:
    """Parameters of a model are a vector and back; what does not fit is refused."""
    model = source(tmp_path).model
    data = pipeline.vector(model)
    new = (np.frombuffer(data, "<f4") + 1).astype("<f4").tobytes()
    assert pipeline.vector(pipeline.with_vector(model, new)) == new
    bad = np.frombuffer(data, "<f4").copy()
    bad[3] = np.inf
    for wrong in (data[:-4], data + b"1234", b"", bad.tobytes()):
        with pytest.raises(LearningError):
            pipeline.with_vector(model, wrong)


def test_training_tells_its_progress_and_learns(tmp_path: Path) -> None:
    """One message per epoch; the loss falls."""
    path = tmp_path / "data.npz"
    path.write_bytes(npz(arrays()))
    told: list[dict[str, Any]] = []
    pipeline.train(read_dataset(path), epochs=3, seed=0, config=CONFIG, told=told.append)
    assert [each["epoch"] for each in told] == [1, 2, 3] and told[0]["epochs"] == 3
    assert told[-1]["loss"] < told[0]["loss"]


def test_a_channel_that_never_changes_is_named(tmp_path: Path) -> None:
    """A dead sensor would become a division by zero."""
    given = arrays()
    given["x__nct"][:, 1] = 4
    (tmp_path / "data.npz").write_bytes(npz(given))
    with pytest.raises(DatasetError, match="channel b never changes"):
        pipeline.train(
            read_dataset(tmp_path / "data.npz"), epochs=1, seed=0, config=CONFIG,
            told=lambda news: None,
        )  # fmt: skip


def test_a_model_of_as_many_channels_as_there_may_be_is_made(tmp_path: Path) -> None:
    """1,024 of them and the confidence: server and device read the profile of the bundle."""
    names = [f"channel_{i:04}" for i in range(1024)]
    rng = np.random.default_rng(0)
    given = arrays() | {
        "x__nct": rng.normal(size=(N, 1024, 4)).astype(np.float32),
        "channels": np.array(json.dumps(names)),
    }
    (tmp_path / "data.npz").write_bytes(npz(given))
    data = read_dataset(tmp_path / "data.npz")
    made = pipeline.train(data, epochs=1, seed=0, config=CONFIG, told=lambda news: None)
    bundle = unpack(pipeline.build_bundle(made, name="wide", facts={}, config=CONFIG)[0])
    found = ReferenceProfile.from_json(bundle.parts["profile.json"])
    assert [each.name for each in found.features] == [*names, "confidence"]
    device = DeviceProfile.from_json(bundle.parts["profile.json"], features=1025)
    assert [each.tolist() for each in device.edges] == [list(f.edges) for f in found.features]


def changed(**how: Any) -> dict[str, NDArray[Any]]:
    """Return the arrays with some replaced; None removes one."""
    return {name: value for name, value in (arrays() | how).items() if value is not None}


def nan() -> NDArray[np.float32]:
    """Return windows with one NaN."""
    x__nct: NDArray[np.float32] = arrays()["x__nct"]
    x__nct[3, 1, 2] = np.nan
    return x__nct


WRONG: dict[str, tuple[dict[str, NDArray[Any]], str]] = {
    "missing": (changed(y__n=None), "holds"),
    "extra": (changed(more=np.zeros(2)), "holds"),
    "float64": (changed(x__nct=np.zeros((N, C, T))), "float32"),
    "two axes": (changed(x__nct=np.zeros((N, C), np.float32)), "float32"),
    "labels float": (changed(y__n=np.zeros(N)), "int64"),
    "labels short": (changed(y__n=np.zeros(N - 1, np.int64)), "int64"),
    "class too many": (changed(y__n=np.full(N, K)), "label"),
    "negative class": (changed(y__n=np.full(N, -1)), "label"),
    "nan": (changed(x__nct=nan()), "NaN"),
    "split dtype": (changed(split__n=np.zeros(N, np.int64)), "split__n must be uint8"),
    "split value": (changed(split__n=np.full(N, 3, np.uint8)), "0 train, 1 validation"),
    "no validation": (changed(split__n=np.zeros(N, np.uint8)), "one for validation"),
    "no training": (changed(split__n=np.ones(N, np.uint8)), "0 training windows"),
    "group": (changed(group__n=np.zeros(3, np.int64)), "group__n"),
    "channels": (changed(channels=np.array(json.dumps(["a"]))), "2 channels, 1 are named"),
    "twice": (changed(channels=np.array(json.dumps(["a", "a"]))), "different names"),
    "taken": (changed(channels=np.array(json.dumps(["a", "confidence"]))), "none of them"),
    "taken by labels": (changed(channels=np.array(json.dumps(["a", "accuracy"]))), "none of them"),
    "no text": (changed(channels=np.array('["a", "\\ud800"]')), "channels holds .* no text"),
    "no json": (changed(classes=np.array("k, l, m")), "classes is not the JSON"),
    "no names": (changed(classes=np.array("[1, 2, 3]")), "no short name"),
    "long name": (changed(classes=np.array(json.dumps(["k" * 81] * 3))), "no short name"),
    "empty": (changed(classes=np.array("[]")), "must list 1 to 1024"),
    "many": (changed(classes=np.array(json.dumps(["k"] * 1025))), "has 1025 classes, .* most 1024"),
    "kinds no json": (changed(kinds=np.array("float, float")), "kinds is not the JSON"),
    "kinds of an array": (changed(kinds=np.array(["float", "float"])), "kinds is not the JSON"),
    "kinds no list": (changed(kinds=np.array('{"a": "float"}')), "kinds must list texts"),
    "kinds no texts": (changed(kinds=np.array("[1, 0]")), "kinds must list texts"),
    "kinds short": (changed(kinds=np.array('["float"]')), "1 kinds are listed, there are 2"),
    "kind unknown": (changed(kinds=np.array('["float", "text"]')), "channel b is of kind 'text'"),
    "kind double": (changed(kinds=np.array('["double", "float"]')), "channel a .*double.*float32"),
    "fraction": (changed(kinds=np.array('["integer", "float"]')), "channel a .*integer and holds"),
    "huge code": (
        changed(kinds=np.array('["float", "category"]'), x__nct=np.full((N, C, T), 2**25, "f4")),
        "channel b .*category and holds 33554432, .*16777216",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_data_set_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    """Each is a DatasetError that says what is wrong."""
    given, said = WRONG[name]
    (tmp_path / "data.npz").write_bytes(npz(given))
    with pytest.raises(DatasetError, match=said):
        read_dataset(tmp_path / "data.npz")


def test_a_file_that_is_no_data_set_is_refused(tmp_path: Path) -> None:
    """Garbage, a pickle, a cut file, a bomb, none at all."""
    path = tmp_path / "data.npz"
    whole = npz(arrays())
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x__nct.npy", bytes(3_000_000))
    pickled = io.BytesIO()
    odd: dict[str, Any] = changed(channels=np.array({"a": 1}))
    np.savez(pickled, **odd)
    with pytest.raises(DatasetError, match="cannot be read"):
        read_dataset(path)
    for data in (b"", b"garbage", whole[: len(whole) // 2], pickled.getvalue()):
        path.write_bytes(data)
        with pytest.raises(DatasetError, match="cannot be read"):
            read_dataset(path)
    path.write_bytes(bomb.getvalue())
    with pytest.raises(DatasetError, match="inflates"):
        read_dataset(path, config=DatasetConfig(bytes_max=1_000_000))
    path.write_bytes(whole)
    with pytest.raises(DatasetError, match="larger than"):
        read_dataset(path, config=DatasetConfig(bytes_max=1000))
    with pytest.raises(DatasetError, match="no model"):
        read_source(path)
    read_dataset(path)
