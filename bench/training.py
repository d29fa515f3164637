"""Time a training step of the smartwatch network on plain onnxruntime, one thread.

    python bench/training.py [--json FILE] [--repeats 15] [--batch 32]

Each figure is the median CPU time of one step over repeats, with the quartiles beside it, and its
ratio to one inference of the same batch in the same run: forward, backward by the inputs and
backward by the weights cost about three, the rest is normalisation and the optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime as ort

from shoal.server.learning.autodiff import Optimizer, training_facts, training_graph
from shoal.server.learning.networks import conv1d_classifier, parameters, trainable_names

CHANNELS, SAMPLES, CLASSES = 6, 100, 7  # of the smartwatch
WIDTHS = ((16, 32), (24, 48))
LOOPS = 20  # steps of one repeat: some 40 ms, long against the scheduler's tick

Deed = Callable[[], object]


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    """Return a session of one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def step_of(model: onnx.ModelProto, graph: onnx.ModelProto, batch: int) -> Deed:
    """Return a deed that runs one training step on random windows."""
    facts, rng = training_facts(graph), np.random.default_rng(0)
    feeds: dict[str, Any] = dict(parameters(model))
    feeds |= {each["input"]: np.zeros(each["shape"], np.float32) for each in facts["state"]}
    feeds |= {
        facts["x"]: rng.normal(size=(batch, CHANNELS, SAMPLES)).astype(np.float32),
        facts["y"]: rng.integers(0, CLASSES, batch),
        facts["w"]: np.ones(batch, np.float32),
        facts["lr"]: np.array(0.1, np.float32),
    }
    made = session(graph)
    return lambda: made.run(None, feeds)


def time_us(deed: Deed) -> float:
    """Return the mean CPU time of one deed, in µs: other load waits outside."""
    begin = time.thread_time_ns()
    for _ in range(LOOPS):
        deed()
    return (time.thread_time_ns() - begin) / LOOPS / 1e3


def measure(widths: tuple[int, int], optimizer: Optimizer, batch: int, repeats: int) -> Any:
    """Time steps and inferences of one network in turns."""
    model = conv1d_classifier(
        mean__c=np.zeros(CHANNELS), scale__c=np.ones(CHANNELS), samples=SAMPLES,
        classes=CLASSES, widths=widths,
    )  # fmt: skip
    graph = training_graph(model, trainable=trainable_names(model), optimizer=optimizer)
    x = np.random.default_rng(0).normal(size=(batch, CHANNELS, SAMPLES)).astype(np.float32)
    plain = session(model)
    deeds: tuple[Deed, Deed] = (
        step_of(model, graph, batch),
        lambda: plain.run(None, {"x": x}),
    )
    for deed in deeds:
        deed()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for row, deed in zip(times, deeds, strict=True):
            row.append(time_us(deed))
    low, median, high = quantiles(times[0], n=4)
    inference = quantiles(times[1], n=4)[1]
    return {
        "network": f"{widths[0]}-{widths[1]}", "optimizer": optimizer,
        "graph_bytes": graph.ByteSize(), "nodes": len(graph.graph.node),
        "step_us": {"best": min(times[0]), "low": low, "median": median, "high": high},
        "inference_us": inference, "ratio": median / inference,
    }  # fmt: skip


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32, help="windows per step")
    given = parser.parse_args()
    about = {
        "machine": platform.machine(), "cpus": os.cpu_count(), "batch": given.batch,
        "python": platform.python_version(), "onnxruntime": ort.__version__,
    }  # fmt: skip
    print(" ".join(f"{key}={value}" for key, value in about.items()))
    print(
        f"{'network':>8} {'optimizer':>9} {'bytes':>7} {'nodes':>5} "
        f"{'best µs':>8} {'low':>7} {'median':>7} {'high':>7} {'inference':>9} {'ratio':>6}"
    )
    rows = []
    for widths in WIDTHS:
        for optimizer in get_args(Optimizer):
            row = measure(widths, optimizer, given.batch, given.repeats)
            rows.append(row)
            step = row["step_us"]
            print(
                f"{row['network']:>8} {optimizer:>9} {row['graph_bytes']:>7} {row['nodes']:>5} "
                f"{step['best']:>8.0f} {step['low']:>7.0f} {step['median']:>7.0f} "
                f"{step['high']:>7.0f} {row['inference_us']:>9.0f} {row['ratio']:>6.2f}"
            )
    if given.json:
        given.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
