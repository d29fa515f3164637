"""The engine over the oldest ONNX Runtime that it accepts, and over what is no ONNX Runtime.

The oldest library is fetched by `make test` into .models/; a process loads one version only, so
each test has a child.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLDEST = ROOT / ".models" / "onnxruntime-1.20.0"

STORY = """
import sys
import numpy as np
from onnx import TensorProto as T, helper as h
from shoal.ext import ort
from shoal.ext.call import Call

def model(nodes, inputs, outputs):
    values = [[h.make_tensor_value_info(*each) for each in side] for side in (inputs, outputs)]
    return h.make_model(
        h.make_graph(nodes, "g", *values), opset_imports=[h.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()

engine = ort.load(model([h.make_node("MatMul", ["x", "x"], ["y"])], [("x", T.FLOAT, [None, 3])],
                        [("y", T.FLOAT, [None, 3])]))
call = Call(engine)
x = np.arange(9, dtype=np.float32).reshape(3, 3)
assert (call.infer({"x": x})["y"] == x @ x).all()
large = np.ones((3, 3), np.float32)
for kind, dtype in ((T.INT64, np.int64), (T.BOOL, np.bool_), (T.FLOAT16, np.float16)):
    call = Call(ort.load(model([h.make_node("Identity", ["x"], ["y"])], [("x", kind, [None])],
                               [("y", kind, [None])])))
    for count in (0, 3, 100_000):
        assert (call.infer({"x": np.ones(count, dtype)})["y"] == np.ones(count, dtype)).all()
text = Call(ort.load(model([h.make_node("Identity", ["x"], ["y"])], [("x", T.STRING, [None])],
                           [("y", T.STRING, [None])])))
assert text.infer({"x": np.array(["a", "", "long" * 99], object)})["y"].tolist() == [
    "a", "", "long" * 99]
try:
    Call(ort.load(model([h.make_node("Reshape", ["x", "s"], ["y"])],
        [("x", T.FLOAT, [None]), ("s", T.INT64, [2])], [("y", T.FLOAT, [None, None])]))
    ).infer({"x": np.ones(6, np.float32), "s": np.array([4, 3])})
except RuntimeError as exc:
    assert "eshape" in str(exc), exc
else:
    raise AssertionError("no error")
try:
    ort.load(b"junk")
except Exception as exc:
    assert type(exc).__name__ == "OnnxFormatError", exc
print(engine.backend, engine.version)
"""


def child(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run code with another folder first on the path."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(path)!r})\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_oldest_version_answers() -> None:
    """The table of functions is append-only: 1.20 runs what the newest runs."""
    if not OLDEST.exists():
        pytest.skip("onnxruntime 1.20.0 was not fetched: run `make test`")
    done = child(STORY, OLDEST)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ort", "1.20.0"]


def test_the_installed_version_answers(tmp_path: Path) -> None:
    """The same story on the version of the lock."""
    done = child(STORY, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "ort" and done.stdout.split()[1] != "1.20.0"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nothing", "ships no libonnxruntime.so"),
        ("text", "cannot use libonnxruntime.so.1.99.0"),
        ("another", "does not export OrtGetApiBase"),
    ],
)
def test_what_is_no_onnxruntime_is_said(tmp_path: Path, what: str, said: str) -> None:
    """A broken package is a typed error with the loader's words, not a crash."""
    capi = tmp_path / "onnxruntime" / "capi"
    capi.mkdir(parents=True)
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('broken')")
    if what == "text":
        (capi / "libonnxruntime.so.1.99.0").write_text("not a library")
    if what == "another":
        source = tmp_path / "empty.c"
        source.write_text("int nothing;")
        subprocess.run(
            ["gcc", "-shared", "-o", capi / "libonnxruntime.so.1.99.0", source], check=True
        )
    done = child(
        "from shoal.ext import ort\n"
        "try:\n    ort.library()\nexcept ort.OrtMissingError as exc:\n    print(exc)\n",
        tmp_path,
    )
    assert said in done.stdout, done.stdout + done.stderr
