"""A trial's child process with other backends: run as a script in place of `hw.trial_child`.

FAKES names those it has, separated by commas. All of them answer by onnxruntime's Python API and
then do, each in its own way, what a backend must not. The limits are the real ones.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import sys
import time
import types
from collections.abc import Mapping
from typing import Any

import shoal.hw.backends as backends
from shoal.hw import trial_child
from shoal.hw.backends.base import BackendError, Found, Placed, Placement

_TYPES = {"tensor(float)": 1, "tensor(int32)": 6, "tensor(int64)": 7, "tensor(string)": 8}


class FakeEngine:
    """A session of onnxruntime."""

    stateful = False

    def __init__(self, backend: str, model: bytes, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        try:
            self.session = ort.InferenceSession(model, options)
        except Exception as exc:
            raise BackendError(f"{exc!s:.500}") from exc
        self.backend, self.version = backend, ort.__version__
        self.inputs = tuple(_port(each) for each in self.session.get_inputs())
        self.outputs = tuple(_port(each) for each in self.session.get_outputs())


def _port(found: Any) -> tuple[str, int, tuple[int, ...]]:
    shape = tuple(each if isinstance(each, int) else -1 for each in found.shape)
    return found.name, _TYPES[found.type], shape


def _confinement() -> str:
    """Return what this process may do, as the kernel has it."""
    limits = {
        name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1]
        for name in ("DATA", "CORE", "NOFILE", "FSIZE")
    }
    with open("/proc/self/status") as file:
        privileges = next(line.split()[1] for line in file if line.startswith("NoNewPrivs"))
    with open("/proc/self/oom_score_adj") as file:
        first = int(file.read())
    gone = not os.path.exists(os.readlink("/proc/self/cwd"))
    leads = os.getpgid(0) == os.getpid()
    return json.dumps([limits, privileges, first, gone, leads])


class Call:
    """Calls a fake engine, in place of the compiled one."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine

    def infer(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run once; the wrong one answers too much."""
        names = [each[0] for each in self.engine.outputs]
        found = self.engine.session.run(names, dict(inputs))
        if self.engine.backend == "wrong":
            found = [each + each.dtype.type(1) for each in found]
        if self.engine.backend == "nan":
            found = [each * each.dtype.type("nan") for each in found]
        return dict(zip(names, found, strict=True))

    def time_ns(self, inputs: Mapping[str, Any], repeats: int) -> list[int]:
        """Run several times."""
        took = []
        for _ in range(repeats):
            start = time.perf_counter_ns()
            self.infer(inputs)
            took.append(time.perf_counter_ns() - start)
        return took


class Fake:
    """A backend that does what its name says."""

    suffixes = (".onnx",)

    def __init__(self, name: str) -> None:
        self.name = name

    def probe(self, tree: Any = None) -> Found:
        """Say that it is ready, unless it is absent; or never say anything."""
        if self.name == "sleepy":
            time.sleep(600)
        if self.name == "absent":
            return Found(name=self.name, state="missing", detail="needs a board")
        return Found(name=self.name, state="ready", simulated=self.name == "simulated")

    def prepare(self, model: bytes, *, threads: int = 1, options: Any = None) -> Any:
        """Load the model, or fail as a native library does."""
        if self.name == "crash":
            os.abort()
        if self.name == "hang":
            time.sleep(600)
        if self.name == "refuse":
            raise BackendError("\x1b[31mno such operator", hint="take another")
        if self.name == "tell":
            raise BackendError(_confinement())
        if self.name == "hog":  # shared memory: RLIMIT_DATA does not count it
            shared = mmap.mmap(-1, 4 << 30)
            for at in range(0, 4 << 30, 4096):
                shared[at] = 1
        return FakeEngine(self.name, model, threads)

    def placement(self, model: bytes, engine: Any) -> Placement:
        """Say where the operators ran."""
        if self.name == "fallback":
            return Placement.of([Placed("a", "Relu", "npu"), Placed("b", "Conv", "cpu")])
        if self.name == "unplaced":
            return Placement(nodes=(), cpu_share=None, reason="the vendor does not tell")
        return Placement(nodes=(Placed("a", "Relu", "cpu"),), cpu_share=0.0)

    def ask(self) -> dict[str, Any]:
        """Nobody asks a fake."""
        return {}


if __name__ == "__main__":
    fakes = [Fake(name) for name in os.environ["FAKES"].split(",")]
    backends.BACKENDS.clear()
    backends.BACKENDS.update({each.name: each for each in fakes})
    module = types.ModuleType("shoal.ext.call")
    module.Call = Call  # type: ignore[attr-defined]
    sys.modules["shoal.ext.call"] = module
    sys.exit(trial_child.main(sys.argv[1:]))
