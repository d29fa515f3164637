"""Memory of the runtime: at rest, over millions of calls, over a thousand loads. Own process each.

    python bench/footprint.py [--json FILE] [--calls 5000000] [--loads 1000]

Peers in the same run: onnxruntime's Python module with the same model, and LiteRT's.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _models as models

# Each runs in a fresh interpreter: what another part imported must not count.
_HEAD = """
import os, sys, time
data = open(sys.argv[1], 'rb').read()
def rss():
    return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGESIZE') / 2**20
start = time.perf_counter()
"""
_PARTS = {
    "bare interpreter": "",
    "onnxruntime Python": """
import numpy as np, onnxruntime as ort
options = ort.SessionOptions(); options.intra_op_num_threads = 1
session = ort.InferenceSession(data, options, providers=['CPUExecutionProvider'])
session.run(None, {'x': np.zeros((1, 6, 100), np.float32)})
""",
    "shoal, arrays": """
import numpy as np
from shoal.agent.runtime import Runtime
model = Runtime().load(data, backend='ort')
model.infer({'x': np.zeros((1, 6, 100), np.float32)})
""",
    "shoal, bytes": """
from shoal.agent.runtime import Runtime
model = Runtime().load(data, backend='ort')
model.infer_raw({'x': ((1, 6, 100), bytes(2400))})
""",
    "shoal, kernel path": """
from shoal.ext import micro
from shoal.ext.call import Call
model = Call(micro.compile(data))
model.infer_raw({'x': ((1, 6, 100), bytes(2400))})
""",
}
_TAIL = """
print(rss(), time.perf_counter() - start)
"""
_CALLS = """
import gc
import numpy as np
from shoal.agent.runtime import Runtime
calls = int(sys.argv[2])
with Runtime() as runtime:
    model = runtime.load(data, backend=sys.argv[3])
    x = {'x': np.zeros((1, 32), np.float32)}
    raw = {'x': ((1, 32), bytes(128))}
    for _ in range(2000):
        model.infer(x); model.infer_raw(raw)
    before = rss()
    start = time.perf_counter()
    for _ in range(calls // 2):
        model.infer(x); model.infer_raw(raw)
    print(rss() - before, (time.perf_counter() - start) / calls * 1e6)
"""
_LOADS = """
import gc
import numpy as np
from shoal.agent.runtime import Runtime
loads = int(sys.argv[2])
x = {'x': np.zeros((1, 6, 100), np.float32)}
with Runtime() as runtime:
    def cycle():
        model = runtime.load(data, backend=sys.argv[3])
        model.infer(x)
        model.close()
    for _ in range(loads // 5):
        cycle()
    before = rss()
    start = time.perf_counter()
    for _ in range(loads):
        cycle()
    print(rss() - before, (time.perf_counter() - start) / loads * 1e3)
"""


def run(code: str, model: Path, *arguments: str) -> tuple[float, float]:
    """Run code in a fresh interpreter; return the two numbers that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), *arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, second = done.stdout.split()
    return float(first), float(second)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--calls", type=int, default=5_000_000)
    parser.add_argument("--loads", type=int, default=1000)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {platform.python_version()}")
    folder = Path(__file__).parent.parent / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    conv, mlp = folder / "conv.onnx", folder / "mlp.onnx"
    conv.write_bytes(models.classifier(quantized=True))
    mlp.write_bytes(models.int8(models.mlp(32, 64, 64, 8), 32))
    found: dict[str, Any] = {"rest": {}, "calls": {}, "loads": {}}
    print(f"\n{'with one int8 conv1d model':28}{'RSS MiB':>9}{'ready ms':>10}")
    for name, code in _PARTS.items():
        mib, seconds = run(_HEAD + code + _TAIL, conv)
        found["rest"][name] = {"rss_mib": mib, "ready_ms": seconds * 1000}
        print(f"{name:28}{mib:>9.1f}{seconds * 1000:>10.0f}")
    start = time.perf_counter()
    for backend in ("ort", "kernel"):
        grown, micros = run(_HEAD + _CALLS, mlp, str(arguments.calls), backend)
        found["calls"][backend] = {"grown_mib": grown, "call_us": micros}
        print(
            f"\n{arguments.calls} calls, {backend}: RSS grew {grown:.2f} MiB, {micros:.2f} us each"
        )
        grown, millis = run(_HEAD + _LOADS, conv, str(arguments.loads), backend)
        found["loads"][backend] = {"grown_mib": grown, "load_ms": millis}
        print(f"{arguments.loads} loads, {backend}: RSS grew {grown:.2f} MiB, {millis:.1f} ms each")
    print(f"took {time.perf_counter() - start:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
