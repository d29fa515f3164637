"""Count what a model has done, in the shape of Triton's statistics.

Counts only grow, and survive a reload. Durations are nanoseconds.

Source: Triton's statistics extension.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

_PARTS: Final = ("queue", "compute_input", "compute_infer", "compute_output")


class Statistics:
    """Counts of one model. Thread-safe.

    Args:
        wall_ns: Nanoseconds since 1970.
    """

    def __init__(self, wall_ns: Callable[[], int] = time.time_ns) -> None:
        self._wall_ns = wall_ns
        self._lock = threading.Lock()
        self._requests = [0, 0, 0, 0, 0]  # count, ns of _PARTS, summed over requests
        self._failed = [0, 0]  # count, ns
        self._batches: dict[int, list[int]] = {}  # rows -> runs, ns of input, infer, output
        self._last_ns = 0

    def ran(
        self,
        since_ns: Sequence[int],
        rows: int,
        start_ns: int,
        ready_ns: int,
        ran_ns: int,
        end_ns: int,
    ) -> None:
        """Count one run.

        Args:
            since_ns: When each of its requests that succeeded came.
            rows: Rows of all its requests.
            start_ns: When its turn came.
            ready_ns: When its inputs were gathered.
            ran_ns: When the model had run.
            end_ns: When its outputs were handed out.
        """
        count = len(since_ns)
        input_ns, infer_ns, output_ns = ready_ns - start_ns, ran_ns - ready_ns, end_ns - ran_ns
        queue_ns = count * start_ns - sum(since_ns)
        with self._lock:
            total = self._requests
            total[0] += count
            total[1] += queue_ns
            total[2] += count * input_ns
            total[3] += count * infer_ns
            total[4] += count * output_ns
            batch = self._batches.get(rows)
            if batch is None:
                batch = self._batches[rows] = [0, 0, 0, 0]
            batch[0] += 1
            batch[1] += input_ns
            batch[2] += infer_ns
            batch[3] += output_ns
            self._last_ns = self._wall_ns()

    def failed(self, took_ns: int) -> None:
        """Count one request that had no answer, whatever the reason."""
        with self._lock:
            self._failed[0] += 1
            self._failed[1] += took_ns

    def facts(self, name: str, version: str) -> dict[str, Any]:
        """Return the counts as one entry of ``model_stats``."""
        with self._lock:
            count, *parts_ns = self._requests
            failed, failed_ns = self._failed
            batches = {rows: list(taken) for rows, taken in sorted(self._batches.items())}
            last_ns = self._last_ns
        return {
            "name": name,
            "version": version,
            "last_inference": last_ns // 1_000_000,  # Triton's unit
            "inference_count": sum(rows * taken[0] for rows, taken in batches.items()),
            "execution_count": sum(taken[0] for taken in batches.values()),
            "inference_stats": {
                "success": _duration(count, sum(parts_ns)),
                "fail": _duration(failed, failed_ns),
                **{p: _duration(count, ns) for p, ns in zip(_PARTS, parts_ns, strict=True)},
            },
            "batch_stats": [
                {
                    "batch_size": rows,
                    "compute_input": _duration(taken[0], taken[1]),
                    "compute_infer": _duration(taken[0], taken[2]),
                    "compute_output": _duration(taken[0], taken[3]),
                }
                for rows, taken in batches.items()
            ],
        }


def _duration(count: int, ns: int) -> dict[str, int]:
    return {"count": count, "ns": ns}
