"""Make the golden messages in ``golden/``: one file per kind of record and per message.

    python tests/proto/make_golden.py tests/proto/golden

Run once per released version of the format, into files of its own; what is there is never made
again, because devices in the field wrote it. Only ``msgpack`` is used, none of the product's code.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgpack

STREAM = bytes(range(16))
MODEL = "0123456789abcdef" * 4
TIME_MS = 1_764_072_000_000

BODIES: dict[str, dict[str, Any]] = {
    "window": {
        "model": MODEL, "index": 3, "start_ms": TIME_MS - 60_000, "end_ms": TIME_MS,
        "predictions": 60, "errors": 1, "classes": [20, 39, 0], "sketch": b"\x00sketch\xff",
        "latency_us": [0, 50, 9],
    },
    "labels": {
        "model": MODEL, "index": 3, "split": 1, "labelled": 10, "correct": 9,
        "confusion": [5, 1, 0, 4],
    },
    "event": {
        "name": "update_rejected", "severity": "warning", "text": "grüße ✓",
        "data": {"reason": "hash", "bytes": 17, "ok": False, "raw": b"\x01\x02"},
    },
    "reported": {
        "version": 4, "model": MODEL, "desired": 2, "agent": "0.1.0", "rss_bytes": 52_428_800,
        "state": {"slot": "a"},
    },
    "update": {
        "rollout": "r-1", "counter": 5, "model": MODEL, "state": "confirmed", "reason": "",
    },
    "gap": {
        "stream": STREAM, "class": "window", "runs": [2, 5, 9, 9], "count": 5,
        "reason": "spool full",
    },
}  # fmt: skip

# What version 0.2 added: a kind, and optional fields.
BODIES_0_2: dict[str, dict[str, Any]] = {
    "capture": {
        "model": MODEL, "slice": "night", "prediction": 812, "reason": "threshold",
        "shape": [1, 2, 2], "data": b"\x00\x00\x80?\x00\x00\x00@\x00\x00\x80\x7f\x00\x00\xc0\x7f",
    },
    "window_0_2": {
        **BODIES["window"], "slice": "grüße", "aligned_ms": TIME_MS - 60_000,
        "quality": {
            "below": [0, 0], "above": [7, 0], "stuck": [300, 0], "schema": [1], "rate": [60, 60],
        },
        "scores": [0, 0, 0, 0, 0, 0, 0, 1, 4, 15] * 3, "projection": b"\x00\x00\x80?" * 4,
        "projected": 600, "shed": 12, "carried": 2, "bins_only": True,
    },
    "labels_0_2": {
        **BODIES["labels"], "slice": "grüße",
        "calibration": [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 3, 4],
    },
}  # fmt: skip

MESSAGES: dict[str, dict[str, Any]] = {
    "ack": {"stream": STREAM, "upto": 70_000},
    "presence_online": {"state": "online", "boot": STREAM},
    "presence_offline": {"state": "offline", "boot": STREAM},
    "nudge_tasks": {"look": "tasks"},
    "nudge_desired": {"look": "desired"},
    "desired": {"version": 300},
}


def files() -> dict[str, bytes]:
    """Return name and bytes of every golden file."""
    found = {
        f"record_{kind}": msgpack.packb([seq, kind, TIME_MS, body])
        for seq, (kind, body) in enumerate(BODIES.items(), 1)
    }
    found |= {
        f"record_{name}": msgpack.packb([seq, name.split("_")[0], TIME_MS, body])
        for seq, (name, body) in enumerate(BODIES_0_2.items(), 1)
    }
    records = [[seq, kind, TIME_MS, body] for seq, (kind, body) in enumerate(BODIES.items(), 1)]
    found["batch"] = msgpack.packb([1, STREAM, records])
    newer = [[1, "event", TIME_MS, {**BODIES["event"], "new_field": [1, {"deep": None}]}]]
    found["batch_newer_minor"] = msgpack.packb([1, STREAM, newer])
    found["batch_newer_major"] = msgpack.packb([2, STREAM, records])
    return found | {name: msgpack.packb(message) for name, message in MESSAGES.items()}


if __name__ == "__main__":
    for name, data in files().items():
        path = Path(sys.argv[1]) / f"{name}.bin"
        if not path.exists():
            path.write_bytes(data)
