# ruff: noqa: D103 - the name of a test is its promise; a docstring says why where it must
"""The repository through the core: loading, loading anew, taking out, and what may be loaded."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from onnx import helper

from shoal.agent.errors import ModelClosedError, ModelError, ModelFormatError
from shoal.agent.local.config import CoreConfig, ModelLimits, ModelSource
from shoal.agent.local.core import LocalCore
from shoal.agent.local.errors import RequestError, UnknownModelError
from shoal.agent.runtime import Model, Runtime
from tests.agent.local.models import FLOAT, adder, ask, model, said

Serve = Callable[..., LocalCore]
READY = {"version": "1", "state": "READY", "reason": ""}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a core with the models that are given by name and bytes."""
    cores: list[LocalCore] = []
    with Runtime() as runtime:

        def start(limits: ModelLimits | None = None, load: Any = None, **facts: Any) -> LocalCore:
            models = facts.pop("models", {"m": adder()})
            for name, data in models.items():
                (tmp_path / f"{name}.onnx").write_bytes(data)
            config = CoreConfig(
                models=tuple(
                    ModelSource(
                        name=name, path=tmp_path / f"{name}.onnx", limits=limits or ModelLimits()
                    )
                    for name in models
                ),
                **facts,
            )
            core = LocalCore(config, load or runtime.load)
            cores.append(core)
            core.start()
            return core

        yield start
        for core in cores:
            core.drain(10.0)


def state(core: LocalCore) -> dict[str, str]:
    return {each["name"]: each["state"] for each in core.repository_index(ready=False)}


def test_load_unload_and_index(serve: Serve) -> None:
    core = serve(models={"m": adder(1.0), "k": adder(5.0)})
    assert core.repository_index(ready=True) == [{"name": "k", **READY}, {"name": "m", **READY}]
    core.unload("m")
    assert core.repository_index(ready=True) == [{"name": "k", **READY}]
    assert core.repository_index(ready=False)[1] == {
        "name": "m", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded",
    }  # fmt: skip
    assert core.model_ready("m", "") is False
    assert core.ready()  # it was asked for, so nothing is amiss
    with pytest.raises(UnknownModelError, match="Request for unknown model: 'm' is not found"):
        core.infer(ask(0, 0, 0), left_s=None)
    core.unload("m")
    core.load("m", {})
    assert core.model_ready("m", "1")
    assert said(core.infer(ask(0, 1, 2), left_s=None)) == [1, 2, 3]


def test_a_reload_takes_the_new_file(serve: Serve, tmp_path: Path) -> None:
    core = serve()
    (tmp_path / "m.onnx").write_bytes(adder(10.0))
    assert said(core.infer(ask(0, 0, 0), left_s=None)) == [1, 1, 1]
    core.load("m", {})
    assert said(core.infer(ask(0, 0, 0), left_s=None)) == [10, 10, 10]
    (stats,) = core.statistics("m", "")["model_stats"]
    assert stats["inference_count"] == 2  # counts survive


@pytest.mark.parametrize("damage", ["garbage", "empty", "missing", "fifo", "folder", "huge"])
def test_a_failed_reload_keeps_the_model(serve: Serve, tmp_path: Path, damage: str) -> None:
    core = serve(model_bytes_max=10_000)
    path = tmp_path / "m.onnx"
    path.unlink()
    if damage == "garbage":
        path.write_bytes(b"\x00\xff" * 50)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "fifo":
        os.mkfifo(path)
    elif damage == "folder":
        path.mkdir()
    elif damage == "huge":
        path.write_bytes(adder() + bytes(10_000))
    with pytest.raises(ModelError):
        core.load("m", {})
    assert core.ready()
    (entry,) = core.repository_index(ready=True)
    assert entry["state"] == "READY"
    assert "still the one before" in entry["reason"]
    assert said(core.infer(ask(0, 0, 0), left_s=None)) == [1, 1, 1]


def test_a_model_that_does_not_load_stops_the_start(serve: Serve) -> None:
    with pytest.raises(ModelFormatError):
        serve(models={"m": adder(), "k": b"no model"})


def test_a_failed_load_of_a_configured_model_is_not_ready(serve: Serve, tmp_path: Path) -> None:
    core = serve()
    core.unload("m")
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ModelFormatError):
        core.load("m", {})
    assert not core.ready()
    assert state(core) == {"m": "UNAVAILABLE"}
    (tmp_path / "m.onnx").write_bytes(adder())
    core.load("m", {})
    assert core.ready()


def test_only_configured_names_without_a_folder(serve: Serve, tmp_path: Path) -> None:
    core = serve()
    (tmp_path / "other.onnx").write_bytes(adder())
    with pytest.raises(RequestError, match="failed to load 'other'"):
        core.load("other", {})
    with pytest.raises(UnknownModelError):
        core.unload("other")
    assert state(core) == {"m": "READY"}


def test_files_of_the_folder_by_name(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    (folder / "deep" / "1").mkdir(parents=True)
    (folder / "deep" / "1" / "model.onnx").write_bytes(adder(7.0))
    (folder / "flat.onnx").write_bytes(adder(8.0))
    (folder / "notes.txt").write_bytes(b"")
    core = serve(allow_load=folder)
    assert state(core) == {"deep": "UNAVAILABLE", "flat": "UNAVAILABLE", "m": "READY"}
    core.load("deep", {})
    core.load("flat", {})
    assert said(core.infer(ask(0, 0, 0, name="deep"), left_s=None)) == [7, 7, 7]
    assert said(core.infer(ask(0, 0, 0, name="flat"), left_s=None)) == [8, 8, 8]
    core.unload("flat")
    assert state(core) == {"deep": "READY", "flat": "UNAVAILABLE", "m": "READY"}


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../out", "a/../../out", "/etc/passwd", "link", "dirlink", "x\0",
             "none", "a" * 200, "flat.onnx"],
)  # fmt: skip
def test_no_name_reaches_out_of_the_folder(serve: Serve, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "flat.onnx").write_bytes(adder())
    (tmp_path / "out.onnx").write_bytes(adder())
    (folder / "link.onnx").symlink_to(tmp_path / "out.onnx")
    (tmp_path / "outside" / "1").mkdir(parents=True)
    (tmp_path / "outside" / "1" / "model.onnx").write_bytes(adder())
    (folder / "dirlink").symlink_to(tmp_path / "outside")
    core = serve(allow_load=folder)
    with pytest.raises(RequestError, match="failed to load"):
        core.load(name, {})
    assert set(state(core)) == {"m", "flat"}


def test_links_inside_the_folder_are_followed(serve: Serve, tmp_path: Path) -> None:
    """Mounted volumes are made of them."""
    folder = tmp_path / "repository"
    (folder / "..data").mkdir(parents=True)
    (folder / "..data" / "a.onnx").write_bytes(adder(4.0))
    (folder / "a.onnx").symlink_to(folder / "..data" / "a.onnx")
    core = serve(allow_load=folder)
    core.load("a", {})
    assert said(core.infer(ask(0, 0, 0, name="a"), left_s=None)) == [4, 4, 4]


def test_loaded_models_are_bounded(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.onnx").write_bytes(adder())
    core = serve(allow_load=folder, models_max=2)
    core.load("a", {})
    core.load("a", {})
    with pytest.raises(RequestError, match="the most there may be"):
        core.load("b", {})
    core.unload("a")
    core.load("b", {})


def test_parameters_of_a_load_are_refused(serve: Serve) -> None:
    """What would be ignored is refused: the client believes in it."""
    with pytest.raises(RequestError, match="config"):
        serve().load("m", {"config": "{}"})


@pytest.mark.parametrize("limits", [ModelLimits(), ModelLimits(workers=2, batch_max=8)])
def test_reloads_lose_no_request(serve: Serve, limits: ModelLimits) -> None:
    """While a model is loaded anew again and again, every request has its right answer."""
    core = serve(limits)
    wrong: list[Any] = []
    stop = threading.Event()
    counts = [0, 0]

    def call() -> None:
        while not stop.is_set():
            try:
                if said(core.infer(ask(1, 2, 3), left_s=None)) != [2, 3, 4]:
                    wrong.append("other values")
            except Exception as error:  # whatever it is, it is a lost request
                wrong.append(error)
            counts[0] += 1

    def submit() -> None:
        while not stop.is_set():
            told = threading.Event()

            def done(outcome: Any, told: threading.Event = told) -> None:
                if isinstance(outcome, Exception):
                    wrong.append(outcome)
                told.set()

            core.submit(ask(1, 2, 3), done)
            if not told.wait(30):
                wrong.append("never told")
            counts[1] += 1

    threads = [threading.Thread(target=each) for each in (call, call, submit)]
    for thread in threads:
        thread.start()
    for _ in range(25):
        core.load("m", {})
    stop.set()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert min(counts) > 0
    (stats,) = core.statistics("m", "")["model_stats"]
    assert stats["inference_stats"]["success"]["count"] == sum(counts)
    assert stats["inference_stats"]["fail"]["count"] == 0


def test_concurrent_loads_and_unloads_end_in_one_state(serve: Serve, tmp_path: Path) -> None:
    """And no model is left loaded that nobody knows of."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "a.onnx").write_bytes(adder())
    loaded: list[Model] = []
    wrong: list[Exception] = []
    with Runtime() as runtime:

        def load(data: bytes, /, *, name: str, threads: int) -> Model:
            loaded.append(runtime.load(data, name=name, threads=threads))
            return loaded[-1]

        core = serve(load=load, allow_load=folder)

        def change() -> None:
            for _ in range(10):
                try:
                    core.load("a", {})
                    core.unload("a")
                except UnknownModelError:
                    pass  # another one has taken it out
                except Exception as error:
                    wrong.append(error)

        threads = [threading.Thread(target=change) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert wrong == []
        assert state(core) == {"a": "UNAVAILABLE", "m": "READY"}
        assert [each.closed for each in loaded] == [False] + [True] * 30


def test_a_model_that_cannot_be_served_as_wanted_is_closed(serve: Serve) -> None:
    """Batches of a model without a batch axis: refused, and its memory is free."""
    fixed = model(
        [helper.make_node("Neg", ["x"], ["y"])], [("x", FLOAT, [2, 3])], [("y", FLOAT, [2, 3])]
    )
    loaded: list[Model] = []
    with Runtime() as runtime:

        def load(data: bytes, /, *, name: str, threads: int) -> Model:
            loaded.append(runtime.load(data, name=name, threads=threads))
            return loaded[-1]

        with pytest.raises(ModelFormatError, match="cannot run in batches"):
            serve(ModelLimits(batch_max=2), load, models={"m": fixed})
        assert [each.closed for each in loaded] == [True]


def test_nothing_is_loaded_after_the_end(serve: Serve) -> None:
    core = serve()
    core.drain(1.0)
    with pytest.raises(ModelClosedError):
        core.load("m", {})
    with pytest.raises(ModelClosedError):
        core.infer(ask(0, 0, 0), left_s=None)
    assert core.live()
    assert not core.ready()
