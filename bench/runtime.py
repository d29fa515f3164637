"""The runtime against onnxruntime's and LiteRT's own Python, in the same run, one thread.

    python bench/runtime.py [--json FILE] [--rounds 30]

Calls take turns within a round, so that the machine's noise meets them alike; a figure is the
median over the rounds of the mean of a round. "ort" is the engine over ONNX Runtime's C
interface, "auto" what Runtime.load chooses; "+mon" has the agent's monitor on.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import _models as models
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from shoal.agent.monitor import MonitorConfig, WindowMonitor
from shoal.agent.profile import DeviceProfile
from shoal.agent.runtime import Model, Prepare, Runtime

ROUND_S = 0.01

Inputs = dict[str, NDArray[Any]]


def times_us(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median over the rounds of each call's mean time, microseconds."""
    counts = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        for _ in range(20):
            call()
        counts[name] = max(3, min(5000, int(ROUND_S / ((time.perf_counter() - start) / 20))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                call()
            found[name].append((time.perf_counter() - start) / counts[name] * 1e6)
    return {name: statistics.median(each) for name, each in found.items()}


def session(data: bytes) -> ort.InferenceSession:
    """Return the peer, one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def inputs_for(peer: ort.InferenceSession) -> Inputs:
    """Return one seeded input for each of a model's; free axes are what the real models want."""
    rng = np.random.default_rng(0)
    sizes = {"input": {0: 1, 1: 512}, "bytes": {0: 1}, "state": {1: 1}}
    found: Inputs = {}
    for each in peer.get_inputs():
        shape = [
            size if isinstance(size, int) else sizes.get(each.name, {}).get(axis, 1)
            for axis, size in enumerate(each.shape)
        ]
        if each.name == "x" and len(shape) == 4:
            shape = [1, 3, 48, 192]
        if each.type == "tensor(int64)":
            found[each.name] = np.full(shape, 16_000, np.int64)
        elif each.type == "tensor(int32)":
            found[each.name] = rng.integers(0, 255, shape).astype(np.int32)
        else:
            found[each.name] = rng.normal(size=shape).astype(np.float32) * 0.1
    return found


def monitor_for(peer: ort.InferenceSession, inputs: Inputs) -> WindowMonitor | None:
    """Return the agent's monitor if the model is a classifier of windows."""
    (first, *more), outputs = peer.get_inputs(), peer.get_outputs()
    x = inputs[first.name]
    if more or len(outputs) != 1 or x.dtype != np.float32 or x.ndim not in (2, 3):
        return None
    features = x.shape[1] + 1
    profile = DeviceProfile(
        names=tuple(str(i) for i in range(features)),
        edges=(np.linspace(-2, 2, 15, dtype=np.float32),) * features,
        kinds=("float",) * features,
        low__d=np.full(features, -4, np.float32),
        high__d=np.full(features, 4, np.float32),
        deciles__9=np.linspace(0.1, 0.9, 9, dtype=np.float32),
        projection=None,
    )
    return WindowMonitor(
        model_sha256="0" * 64,
        inputs=[first.name],
        outputs=[outputs[0].name],
        input_name=first.name,
        output_name=outputs[0].name,
        samples=x.size // x.shape[1],
        classes=outputs[0].shape[-1],
        profile=profile,
        config=MonitorConfig(window_predictions=1000, window_s=86_400),
        emit=lambda kind, body: None,
        clock=lambda: 0,
    )


def one_model(name: str, data: bytes, rounds: int) -> dict[str, Any]:
    """Measure one ONNX model all ways."""
    peer = session(data)
    inputs = inputs_for(peer)
    want = peer.run(None, inputs)
    binding = peer.io_binding()
    for key, value in inputs.items():
        binding.bind_cpu_input(key, value)
    for output in peer.get_outputs():
        binding.bind_output(output.name)
    with Runtime() as runtime:
        plain, auto = runtime.load(data, backend="ort"), runtime.load(data)
        got = [auto.infer(inputs)[each.name] for each in peer.get_outputs()]
        error = max(
            float(np.abs(a.astype(float) - b).max() / max(1e-30, np.abs(b).max()))
            for a, b in zip(got, want, strict=True)
        )
        calls: dict[str, Callable[[], object]] = {
            "run": lambda: peer.run(None, inputs),
            "iobinding": lambda: peer.run_with_iobinding(binding),
            "ort": lambda: plain.infer(inputs),
            "auto": lambda: auto.infer(inputs),
        }
        first = monitor_for(peer, inputs)
        if first is not None:
            second = monitor_for(peer, inputs)
            watched = runtime.load(data, backend="ort", monitor=first)
            auto_watched = runtime.load(data, monitor=second)
            calls["ort+mon"] = lambda: watched.infer(inputs)
            calls["auto+mon"] = lambda: auto_watched.infer(inputs)
        found = times_us(calls, rounds)
        return {"model": name, "chosen": auto.backend, "error": error, **found}


def fused(data: bytes, rounds: int) -> dict[str, float]:
    """Measure bytes in, converted, run, sketched and counted: in NumPy, and in the step."""
    peer = session(data)
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (1, 32), dtype=np.uint8)
    scale, bias = np.float32(1 / 64), np.float32(-2)
    edges = np.linspace(-2, 2, 15, dtype=np.float32)
    counts = np.zeros((33, 16), np.int64)
    rows = np.arange(33)
    moments = np.zeros((3, 33))
    low, high = np.full(33, np.inf), np.full(33, -np.inf)
    latency_us = np.zeros(64, np.int64)
    latency_edges = 2.0 ** (np.arange(63) / 3)

    def numpy_step() -> object:
        start = time.perf_counter_ns()
        x = raw.astype(np.float32) * scale + bias
        (y,) = peer.run(None, {"x": x})
        values = np.append(x[0], y.max())
        counts[rows, np.searchsorted(edges, values, side="right")] += 1
        moments[0] += 1
        apart = values - moments[1]
        moments[1] += apart / moments[0]
        moments[2] += apart * (values - moments[1])
        np.minimum(low, values, out=low)
        np.maximum(high, values, out=high)
        took = (time.perf_counter_ns() - start) / 1000
        latency_us[np.searchsorted(latency_edges, took, side="right")] += 1
        return y

    def monitor() -> WindowMonitor:
        made = monitor_for(peer, {"x": np.zeros((1, 32), np.float32)})
        assert made is not None
        return made

    prepare = {"x": Prepare(type="uint8", scale=[float(scale)], bias=[float(bias)])}
    with Runtime() as runtime:
        plain = runtime.load(data, backend="ort", monitor=monitor(), prepare=prepare)
        auto = runtime.load(data, monitor=monitor(), prepare=prepare)
        return times_us(
            {
                "numpy + run": numpy_step,
                "run alone": lambda: peer.run(None, {"x": np.zeros((1, 32), np.float32)}),
                "step, ort": lambda: plain.infer({"x": raw}),
                "step, auto": lambda: auto.infer({"x": raw}),
            },
            rounds,
        )


def two_threads(data: bytes, rounds: int) -> dict[str, float]:
    """Return calls per second of one and two threads that share a model, and the ratio."""
    with Runtime() as runtime:
        model = runtime.load(data, backend="ort")
        x = np.random.default_rng(0).normal(size=(1, 6, 100)).astype(np.float32)

        def rate(threads: int) -> float:
            done = [0] * threads
            stop = time.perf_counter() + 0.3

            def work(number: int) -> None:
                while time.perf_counter() < stop:
                    model.infer({"x": x})
                    done[number] += 1

            pool = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
            for each in pool:
                each.start()
            for each in pool:
                each.join()
            return sum(done) / 0.3

        rate(2)
        pairs = [(rate(1), rate(2)) for _ in range(max(3, rounds // 6))]
        one, two = (statistics.median(each) for each in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        return {"one": one, "two": two, "ratio": ratio}


def tflite(name: str, data: bytes, rounds: int) -> dict[str, Any]:
    """Measure a .tflite model against LiteRT's Python interpreter."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=data, num_threads=1)
    interpreter.allocate_tensors()
    (entry,) = interpreter.get_input_details()
    outputs = [each["index"] for each in interpreter.get_output_details()]
    rng = np.random.default_rng(0)
    if entry["dtype"] == np.int8:
        x = rng.integers(-128, 128, entry["shape"], dtype=np.int8)
    else:
        x = rng.random(entry["shape"], dtype=np.float32)

    def peer() -> object:
        interpreter.set_tensor(entry["index"], x)
        interpreter.invoke()
        return [interpreter.get_tensor(index) for index in outputs]

    with Runtime() as runtime:
        ours: Model = runtime.load(data)
        inputs = {ours.inputs[0].name: x}
        found = times_us({"litert": peer, "auto": lambda: ours.infer(inputs)}, rounds)
        return {"model": name, "chosen": ours.backend, **found}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    rounds = arguments.rounds
    print(
        f"{platform.machine()}, {platform.python_version()}, onnxruntime {ort.__version__}, "
        f"ai-edge-litert {version('ai-edge-litert')}, numpy {np.__version__}"
    )
    mlp = models.mlp(32, 64, 64, 8)
    mlp_int8 = models.int8(mlp, 32)
    cases = {
        "one operator": models.relu(),
        "MLP float32": mlp,
        "MLP int8": mlp_int8,
        "conv1d float32": models.classifier(quantized=False),
        "conv1d int8": models.classifier(quantized=True),
    }
    for file in ("silero_vad.onnx", "rapidocr_cls.onnx", "magika.onnx"):
        data = models.real(file)
        if data is None:
            print(f"{file}: not here, run `make models`")
        else:
            cases[file.removesuffix(".onnx")] = data
    columns = ("run", "iobinding", "ort", "ort+mon", "auto", "auto+mon")
    print(f"\nmicroseconds, median of {rounds} rounds; xN = times faster than run")
    print(f"{'model':15}" + "".join(f"{each:>16}" for each in columns) + "  auto is   error")
    rows = []
    for name, data in cases.items():
        row = one_model(name, data, rounds)
        rows.append(row)
        line = f"{name:15}"
        for each in columns:
            cell = f"{row[each]:.2f} x{row['run'] / row[each]:.2f}" if each in row else "-"
            line += f"{cell:>16}"
        print(f"{line}  {row['chosen']:8}{row['error']:8.1e}")
    step = fused(mlp_int8, rounds)
    print("\nbytes in, convert, run, 33 sketches, latency histogram (MLP int8), microseconds")
    for each, value in step.items():
        print(f"  {each:14}{value:8.2f}  x{step['numpy + run'] / value:.2f} of numpy + run")
    threads = two_threads(cases["conv1d int8"], rounds)
    print(f"\ntwo threads on one model: {threads['ratio']:.2f} of one ({threads['one']:.0f}/s)")
    lite = []
    for file in ("okay_nabu.tflite", "hand_landmark_lite.tflite"):
        data = models.real(file)
        if data is None:
            print(f"{file}: not here, run `make models`")
            continue
        row = tflite(file, data, rounds)
        lite.append(row)
        print(
            f"{file:26} LiteRT Python {row['litert']:9.2f} us, shoal {row['auto']:9.2f} us, "
            f"x{row['litert'] / row['auto']:.2f}"
        )
    if arguments.json:
        found = {"models": rows, "step": step, "threads": threads, "tflite": lite}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
