"""The runtime against onnxruntime's own Python call, in the same run, on the demo's network.

    python bench/runtime.py [--json FILE]

Prints the machine, the input, median and quartiles of microseconds per call, and the ratio.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from shoal.agent.runtime import Runtime
from shoal.server.learning.networks import conv1d_classifier
from shoal.server.learning.quantize import quantize_int8

ROUNDS, CALLS = 40, 100


def times_us(calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Return the mean time of each call in each of ROUNDS rounds, microseconds.

    The calls take turns within a round, so that noise of the machine meets them alike.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            found[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 6, 100)).astype(np.float32)
    net = conv1d_classifier(
        mean__c=np.zeros(6), scale__c=np.ones(6), samples=100, classes=7, seed=0
    )
    calibration = rng.normal(size=(300, 6, 100)).astype(np.float32)
    rows = []
    for name, model in (("float32", net), ("int8", quantize_int8(net, calibration))):
        data = model.SerializeToString()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        with Runtime() as runtime:
            ours = runtime.load(data)
            pairs = {"onnxruntime": lambda s=session: s.run(None, {"x": x})}
            pairs["shoal"] = lambda m=ours: m.infer({"x": x})
            times_us(pairs)  # warm up
            found = times_us(pairs)
        medians = {label: statistics.median(each) for label, each in found.items()}
        rows.append(
            {
                "model": name,
                **{f"{label}_us": round(value, 1) for label, value in medians.items()},
                "ratio": round(medians["onnxruntime"] / medians["shoal"], 3),
            }
        )
    print(f"{platform.machine()}, {platform.python_version()}, onnxruntime {ort.__version__}")
    print(f"window 1x6x100, 1 thread, median of {ROUNDS} rounds of {CALLS} calls")
    print(f"{'model':10}{'onnxruntime us':>16}{'shoal us':>12}{'ratio':>8}")
    for row in rows:
        print(f"{row['model']:10}{row['onnxruntime_us']:>16}{row['shoal_us']:>12}{row['ratio']:>8}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
