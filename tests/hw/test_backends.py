"""What backends say of themselves: on this machine, on recorded and made-up ones, and in trouble.

The backends' real work is tested where their packages are: in ``tests/npu``.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.ext.call import Call
from shoal.hw.backends import (
    BACKENDS,
    BackendError,
    Placed,
    Placement,
    base,
    interpreters,
    probe_all,
    sessions,
)
from shoal.hw.tree import Tree
from tests.hw.board_files import laid_out

DATA = Path(__file__).parents[1] / "ext" / "data"
CONV = (DATA / "conv_int8.tflite").read_bytes()
CPU = sessions.Provider(name=sessions.CPU_PROVIDER, device="npu")  # as if it were an accelerator


def ask(engine: Any, array: NDArray[Any]) -> NDArray[Any]:
    """Return the first output of an engine for its only input."""
    ((name, _, _),) = engine.inputs
    return next(iter(Call(engine).infer({name: array}).values()))


def machine(folder: Path, *nodes: str, may_open: bool = True) -> Tree:
    """Return a recorded machine that has these device nodes and nothing else."""
    for node in nodes:
        path = folder / node.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    about = {node: {"open": may_open, "group": "apex"} for node in nodes}
    (folder / "recording.json").write_text(json.dumps({"nodes": about}))
    return Tree(folder)


def executable(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Let children run a shell script instead of Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


# --- probes ----------------------------------------------------------------------------------


def test_every_backend_answers_and_none_is_imported() -> None:
    """In a fresh process: probing leaves no vendor's library behind, not even NumPy."""
    script = (
        "import sys, json; from shoal.hw.backends import probe_all;"
        "found = [(each.name, each.state, each.detail) for each in probe_all()];"
        "heavy = {'numpy', 'onnxruntime', 'openvino', 'ai_edge_litert', 'ethosu'};"
        "print(json.dumps([found, sorted(heavy & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    found, loaded = json.loads(done.stdout)
    assert loaded == []
    assert [name for name, _, _ in found] == list(BACKENDS)
    states = {name: state for name, state, _ in found}
    assert states["ort"] == states["litert"] == states["kernel"] == "ready"
    for name, state, detail in found:
        assert state == "ready" or "need" in detail, (name, detail)


def test_the_names_are_the_keys() -> None:
    """The trial, the cache and the engines name a backend alike."""
    assert {name: backend.name for name, backend in BACKENDS.items()} == {n: n for n in BACKENDS}
    assert {suffix for each in BACKENDS.values() for suffix in each.suffixes} == {
        ".onnx",
        ".tflite",
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qnn", "/dev/fastrpc-cdsp"),
        ("cuda", "/dev/nvidia0"),
        ("tensorrt", "/dev/nvidia0"),
        ("coral", "/dev/apex_0"),
    ],
)
def test_a_bare_machine_needs_the_device(tmp_path: Path, name: str, text: str) -> None:
    """The text names the node that an operator can look for."""
    found = BACKENDS[name].probe(machine(tmp_path))
    assert found.state == "missing"
    assert found.detail.startswith("needs ")
    assert text in found.detail


def test_a_device_that_may_not_be_opened_is_told_apart(tmp_path: Path) -> None:
    """A missing group is mended otherwise than missing hardware."""
    found = BACKENDS["coral"].probe(machine(tmp_path, "/dev/apex_0", may_open=False))
    assert found.state == "missing"
    assert "not in group apex" in found.detail


@pytest.mark.parametrize(
    ("board", "name", "needs", "has"),
    [
        ("jetson-orin-nano", "cuda", "the package onnxruntime-gpu", "NVIDIA"),
        ("jetson-orin-nano", "tensorrt", "the package onnxruntime-gpu", "NVIDIA"),
        ("jetson-orin-nano", "qnn", "a Hexagon NPU", ""),
        ("raspberry-pi-4", "coral", "access to the device (Coral Edge TPU (USB): user is", ""),
        ("raspberry-pi-5", "coral", "a Coral Edge TPU", ""),
        ("x86-gateway", "cuda", "an NVIDIA GPU", ""),
        ("orange-pi-5", "qnn", "a Hexagon NPU", ""),
    ],
)
def test_recorded_boards_need_what_they_lack(
    tmp_path: Path, board: str, name: str, needs: str, has: str
) -> None:
    """What the board has is not asked for."""
    found = BACKENDS[name].probe(Tree(laid_out(board, tmp_path)))
    assert found.state == "missing"
    assert needs in found.detail
    assert not has or has not in found.detail


def test_a_coral_without_its_library_is_broken(tmp_path: Path) -> None:
    """The node is there, the interpreter is there, libedgetpu is not: said by the loader."""
    found = BACKENDS["coral"].probe(machine(tmp_path, "/dev/apex_0"))
    assert found.state == "broken"
    assert "libedgetpu.so.1 does not open" in found.detail


@pytest.mark.parametrize(
    ("name", "provider", "library"),
    [
        ("cuda", "CUDAExecutionProvider", "libonnxruntime_providers_cuda.so"),
        ("tensorrt", "TensorrtExecutionProvider", "libonnxruntime_providers_tensorrt.so"),
    ],
)
def test_a_gpu_under_an_onnxruntime_without_it_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, provider: str, library: str
) -> None:
    """Both packages share a folder: the file can be there and the build be the other one."""
    here = sessions.installed()
    assert here is not None
    tree = machine(tmp_path, "/dev/nvidia0")
    assert "needs the package onnxruntime-gpu" in BACKENDS[name].probe(tree).detail
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / library).touch()
    monkeypatch.setattr(sessions, "installed", lambda: base.Package("1.0", tmp_path))
    found = BACKENDS[name].probe(tree)
    assert found.state == "broken"
    assert provider in found.detail


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is imported to find out."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tree = machine(tmp_path)
    named = [name for name in BACKENDS if name != "kernel"]  # ours, and always there
    needs = {name: BACKENDS[name].probe(tree).detail for name in named}
    assert needs["ort"] == "needs the package onnxruntime"
    assert needs["litert"] == "needs the package ai-edge-litert"
    assert needs["openvino"] == "needs the package openvino"
    assert needs["vela"] == "needs the package ethos-u-vela"
    assert "needs the package onnxruntime-qnn and the package onnxruntime" in needs["qnn"]
    for name in ("ort", "openvino", "qnn", "vela", "cuda", "tensorrt"):
        with pytest.raises(BackendError, match="needs"):
            backend = BACKENDS[name]
            backend.prepare(CONV if ".tflite" in backend.suffixes else sessions.SMALLEST)


# --- a library that misbehaves ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("kill -SEGV $$", "crashed the process (signal 11)"),
        ("echo no such symbol >&2; exit 1", "ended the process: no such symbol"),
        ("echo hello", "ended the process"),
        ('echo \'{"error": "no firmware"}\'', "no firmware"),
        ("exec sleep 60", "did not answer within 0.3 s"),
    ],
)
def test_a_library_that_misbehaves_is_broken_and_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, text: str
) -> None:
    """A probe never raises anything else and never hangs."""
    executable(monkeypatch, tmp_path, script)
    with pytest.raises(BackendError) as caught:
        base.ask_in_child("ort", seconds=0.3 if "sleep" in script else 20)
    assert text in str(caught.value)


def test_a_broken_runtime_is_reported_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its version: that is what an operator has to change."""
    executable(monkeypatch, tmp_path, "kill -ABRT $$")
    for found in probe_all():
        if found.name in ("ort", "litert", "kernel"):
            assert found.state == "broken"
            assert "signal 6" in found.detail
            assert found.version


def test_what_a_library_prints_does_not_disturb_the_answer() -> None:
    """Its standard output is not ours."""
    script = (
        "import os; from shoal.hw.backends import child, BACKENDS;"
        "BACKENDS['ort'].ask = lambda: os.write(1, b'banner') and {'devices': ['x']};"
        "child.main('ort')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert json.loads(done.stdout) == {"devices": ["x"]}
    assert done.stderr == b"banner"


# --- placement -----------------------------------------------------------------------------------


def test_the_share_on_the_cpu_is_by_operators_and_by_time() -> None:
    """Two small operators of four, which take a tenth of the time."""
    nodes = [
        Placed("a", "Conv", "npu", 80.0),
        Placed("b", "Conv", "npu", 10.0),
        Placed("c", "Cast", "cpu", 6.0),
        Placed("d", "Cast", "cpu", 4.0),
    ]
    placement = Placement.of(nodes)
    assert placement.cpu_share == 0.5
    assert placement.cpu_time_share == pytest.approx(0.1)
    assert placement.counts == {"npu": 2, "cpu": 2}


def test_what_is_not_known_is_none_with_a_reason() -> None:
    """An empty list is not "nothing fell back"."""
    placement = Placement.of([])
    assert placement.cpu_share is None
    assert placement.reason
    assert Placement.of([Placed("a", "Conv", "npu")]).cpu_time_share is None


# --- sessions on an execution provider -----------------------------------------------------------


def load(model: bytes, *, fallback: bool = True, profile: bool = False) -> Any:
    """Load on the CPU provider, taken for an accelerator."""
    return sessions.load(
        model, backend="test", provider=CPU, threads=1, cpu_fallback=fallback, profile=profile
    )


def test_a_session_is_an_engine() -> None:
    """Names, types and shapes come from the model; the answer is its own."""
    engine = load(sessions.SMALLEST)
    assert (engine.backend, engine.inputs) == ("test", (("x", 1, (1,)),))
    assert engine.outputs == (("y", 1, (1,)),)
    assert ask(engine, np.array([2.5], np.float32)).tolist() == [5.0]


def test_a_profile_gives_the_time_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked twice, it answers the same: a profile can be read once."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine = load(sessions.SMALLEST, profile=True)
    for _ in range(3):
        ask(engine, np.array([1], np.float32))
    assert list(tmp_path.iterdir()) != []
    placement = engine.attest()
    assert placement.counts == {"npu": 1}
    assert (placement.cpu_share, placement.cpu_time_share) == (0.0, 0.0)
    assert engine.attest() is placement
    del engine
    assert list(tmp_path.iterdir()) == []


def test_before_1_24_the_profile_is_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a placement is of the nodes that ran, or not known at all."""
    import onnxruntime as ort

    monkeypatch.delattr(ort.InferenceSession.__base__, "get_provider_graph_assignment_info")
    silent = load(sessions.SMALLEST).attest()
    assert silent.cpu_share is None
    assert "profile=on" in silent.reason
    engine = load(sessions.SMALLEST, profile=True)
    ask(engine, np.array([1], np.float32))
    (node,) = engine.attest().nodes
    assert (node.op, node.device) == ("Add", "npu")
    assert node.time_us is not None
    assert node.time_us >= 0


def test_a_provider_that_is_not_built_in_is_refused() -> None:
    """ONNX Runtime itself would warn and run on the CPU."""
    absent = sessions.Provider(name="CUDAExecutionProvider", device="gpu")
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(BackendError, match="did not load CUDAExecutionProvider"),
    ):
        sessions.load(
            sessions.SMALLEST,
            backend="test",
            provider=absent,
            threads=1,
            cpu_fallback=True,
            profile=False,
        )


def test_a_type_that_cannot_be_passed_on_is_refused() -> None:
    """Text, for one: before a call, and with the name of the input."""
    from onnx import TensorProto, helper

    text = helper.make_tensor_value_info("words", TensorProto.STRING, (2,))
    out = helper.make_tensor_value_info("same", TensorProto.STRING, (2,))
    node = helper.make_node("Identity", ["words"], ["same"])
    graph = helper.make_graph([node], "text", [text], [out])
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    with pytest.raises(BackendError, match=r"input 'words' is of type tensor\(string\)"):
        load(model)


@pytest.mark.parametrize("profile", [False, True])
def test_a_broken_model_is_refused_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: bool
) -> None:
    """With ONNX Runtime's own message, where the bytes are a model at all."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(BackendError, match="not an ONNX model"):
        load(b"garbage", profile=profile)
    unknown = sessions.SMALLEST.replace(b"Add", b"Odd")
    with pytest.raises(BackendError, match=r"refuses the model: .*Odd"):
        load(unknown, profile=profile)
    assert list(tmp_path.iterdir()) == []


# --- interpreters and compiled files -------------------------------------------------------------


def test_weights_in_other_files_are_refused() -> None:
    """A vendor's reader would open a path of the model's choice."""
    from onnx import external_data_helper, load_from_string

    model = load_from_string(gemm())
    external_data_helper.set_external_data(model.graph.initializer[0], "../../etc/passwd")
    with pytest.raises(BackendError, match=r"weights in other files: \.\./\.\./etc"):
        load(model.SerializeToString())


def test_the_interpreter_answers_as_the_c_interface() -> None:
    """The path of a delegate, without one: same file, same bits, from any thread."""
    from shoal.ext.litert import LiteRtEngine

    engine: Any = interpreters.load(
        CONV, backend="test", version="1", threads=1, delegate=None, attest=Placement.of
    )
    session: Any = LiteRtEngine(CONV)
    ((_, _, shape),) = engine.inputs
    assert [each[1:] for each in engine.inputs] == [each[1:] for each in session.inputs]
    random = np.random.default_rng(3)
    dtype = {1: np.float32, 3: np.int8}[engine.inputs[0][1]]
    rows = [random.integers(-128, 128, shape).astype(dtype) for _ in range(4)]
    want = [session.call([(shape, row)])[0][1] for row in rows]
    got: dict[int, list[bytes]] = {}

    def call(index: int) -> None:
        got[index] = [ask(engine, rows[index]).tobytes() for _ in range(20)]

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert {index: set(found) for index, found in got.items()} == {
        index: {bytes(want[index])} for index in range(4)
    }


def test_a_model_that_was_not_compiled_for_the_edge_tpu_is_refused() -> None:
    """It would run, on the CPU, and nobody would know."""
    with pytest.raises(BackendError, match="no operator edgetpu-custom-op") as caught:
        BACKENDS["coral"].prepare(CONV)
    assert "edgetpu_compiler" in caught.value.hint
    custom = (DATA / "custom.tflite").read_bytes()
    placement = interpreters.custom_placement(custom, "edgetpu-custom-op", "edgetpu")
    assert placement.cpu_share == 1.0


def test_any_bytes_have_a_placement_or_are_refused() -> None:
    """A compiled file may come from anywhere, too."""
    random = np.random.default_rng(4)
    read = 0
    for round_index in range(500):
        broken = bytearray(CONV)
        for place in random.integers(0, len(CONV), 1 + round_index % 20):
            broken[place] = random.integers(0, 256)
        if round_index % 5 == 0:
            del broken[random.integers(0, len(CONV)) :]
        try:
            interpreters.custom_placement(bytes(broken), "ethos-u", "ethos-u")
            read += 1
        except BackendError:
            pass
    assert 0 < read < 500


@pytest.mark.parametrize("name", ["litert", "vela", "coral"])
def test_a_broken_tflite_is_refused(name: str) -> None:
    """By our reader, before a vendor's code sees it."""
    with pytest.raises(BackendError, match="model"):
        BACKENDS[name].prepare(CONV[:64])


# --- the CPU's own backends ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ort", "kernel", "litert"])
def test_on_the_cpu_nothing_falls_back(name: str) -> None:
    """The CPU is where they were asked to run."""
    model = CONV if name == "litert" else sessions.SMALLEST
    if name == "kernel":
        model = gemm()
    backend = BACKENDS[name]
    engine = backend.prepare(model)
    placement = backend.placement(model, engine)
    assert placement.cpu_share == 0.0
    assert set(placement.counts) == {"cpu"}
    with pytest.raises(BackendError, match="no option colour"):
        backend.prepare(model, options={"colour": "red"})


def test_the_kernels_refuse_what_is_not_theirs() -> None:
    """With the reason that they have."""
    with pytest.raises(BackendError, match="kernel path"):
        BACKENDS["kernel"].prepare(b"garbage")
    with pytest.raises(BackendError, match="does not run"):
        BACKENDS["kernel"].prepare(gemm(), options={"variant": "v9"})


def gemm() -> bytes:
    """Return a linear layer with a Relu, 4 to 2."""
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.arange(8, dtype=np.float32).reshape(4, 2), "w")
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], "linear"),
        helper.make_node("Relu", ["h"], ["y"], "relu"),
    ]
    graph = helper.make_graph(
        nodes,
        "gemm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 2))],
        [weights],
    )
    opsets = [helper.make_opsetid("", 17)]
    made: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return made
