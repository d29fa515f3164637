"""Watch one model on this device: windows of sketches out, labels joined when they come late.

    observe(inputs, outputs, latency)  --window full-->  WINDOW record
    label(prediction, truth, split)    --window labelled-->  LABELS records, one per split

A window is a number of predictions (or a time, whichever ends first), and carries sketches of
every input channel and of the confidence, class counts, errors and a latency histogram: about a
kilobyte whatever the rate. Raw inputs never leave the device. LABELS records are increments: a
window's labels may come in several of them.

Not here: which label belongs to which prediction (the application knows), and the spool.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ext.sketch import SketchBank
from ..proto import latency
from ..proto.records import Kind

Emit = Callable[[Kind, dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorConfig:
    """How telemetry is cut into windows, and how long a prediction waits for its label."""

    window_predictions: int = 100
    """A window ends after this many predictions."""
    window_s: float = 60.0
    """… or this many seconds after it began, if that is sooner."""
    pending_max: int = 20_000
    """Predictions that may wait for a label; the oldest gives up beyond it, and is counted."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 1 <= self.window_predictions <= 1_000_000:
            raise ValueError("window_predictions must be 1 to 1000000")
        if not 0 < self.window_s <= 86_400 or not 1 <= self.pending_max <= 10_000_000:
            raise ValueError("window_s must be up to 86400 s, pending_max 1 to 10000000")


@dataclass(slots=True)
class _Labelled:
    """Labels of one window that were not told yet."""

    waiting: int = 0
    closed: bool = False
    tables: dict[int, NDArray[np.int64]] = field(default_factory=dict)


class WindowMonitor:
    """Monitor of one loaded model. Not thread-safe: one owner feeds it."""

    def __init__(
        self,
        *,
        model_sha256: str,
        input_name: str,
        output_name: str,
        classes: int,
        edges: Sequence[NDArray[np.float32]],
        config: MonitorConfig,
        emit: Emit,
        clock: Callable[[], int],
    ) -> None:
        """Start the first window.

        Args:
            model_sha256: The bundle that the windows belong to.
            input_name: Input tensor, float32 (1, C, T).
            output_name: Output tensor, float32 (1, classes), probabilities.
            classes: Number of classes.
            edges: Bin edges of the C channels and, last, of the confidence.
            config: Sizes.
            emit: Takes finished records.
            clock: Unix ms.
        """
        self._model = model_sha256
        self._input, self._output, self._classes = input_name, output_name, classes
        self._config, self._emit, self._clock = config, emit, clock
        self._channels = len(edges) - 1
        self._bank = SketchBank(len(edges), edges=edges)
        self._confidence__11 = np.empty((1, 1, 1), np.float32)
        self._pending: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._labels: dict[int, _Labelled] = {}
        self._index = -1
        self.predictions = 0
        """Predictions seen; the id of the newest is one less."""
        self.errors = 0
        """Calls that failed."""
        self.labels_missed = 0
        """Labels that came for a prediction that had given up waiting, or was unknown."""
        self._begin()

    def observe(
        self,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]],
        latency_ns: int,
    ) -> None:
        """Count one prediction and end the window if it is full."""
        probabilities = outputs[self._output][0]
        predicted = int(probabilities.argmax())
        self._confidence__11[0, 0, 0] = probabilities[predicted]
        self._bank.update_channels(inputs[self._input])
        self._bank.update_channels(self._confidence__11, first=self._channels)
        self._class_counts[predicted] += 1
        self._latency_us[latency.bin_of(latency_ns / 1000)] += 1
        self._pending[self.predictions] = (self._index, predicted)
        self._labels[self._index].waiting += 1
        self.predictions += 1
        self._seen += 1
        while len(self._pending) > self._config.pending_max:
            _, (index, _) = self._pending.popitem(last=False)
            self._settle(index)
        self.tick()
        if self._seen >= self._config.window_predictions:
            self._end()

    def failed(self) -> None:
        """Count a call that the engine refused."""
        self.errors += 1
        self._window_errors += 1
        self.tick()

    def tick(self) -> None:
        """End the window if its time is over."""
        if self._clock() - self._start_ms >= self._config.window_s * 1000:
            self._end()

    def label(self, prediction: int, truth: int, split: int) -> None:
        """Join a label that arrived.

        Args:
            prediction: Id of the prediction: its number since the model was loaded, from 0.
            truth: Class index; one that the model does not know counts as missed.
            split: 0 train, 1 validation, 2 test.
        """
        waiting = self._pending.pop(prediction, None)
        if waiting is None:
            self.labels_missed += 1
            return
        index, predicted = waiting
        if 0 <= truth < self._classes:
            tables = self._labels[index].tables
            if split not in tables:
                tables[split] = np.zeros((self._classes, self._classes), np.int64)
            tables[split][truth, predicted] += 1
        else:
            self.labels_missed += 1
        self._settle(index)

    def finish(self) -> None:
        """End the window in progress, as when another model takes over; labels may still come."""
        self._end()

    def flush_labels(self) -> None:
        """Tell the labels that came so far; the rest, if it comes, follows as an increment."""
        for index in list(self._labels):
            self._tell(index)

    def _begin(self) -> None:
        self._index += 1
        self._start_ms = self._clock()
        self._seen = 0
        self._window_errors = 0
        self._class_counts = [0] * self._classes
        self._latency_us = [0] * latency.BINS
        self._labels[self._index] = _Labelled()
        self._bank.reset()

    def _end(self) -> None:
        index = self._index
        if not self._seen and not self._window_errors:
            self._start_ms = self._clock()  # nothing to tell: the same window begins anew
            return
        self._emit(
            Kind.WINDOW,
            {
                "model": self._model,
                "index": index,
                "start_ms": self._start_ms,
                "end_ms": max(self._start_ms, self._clock()),
                "predictions": self._seen,
                "errors": self._window_errors,
                "classes": self._class_counts,
                "sketch": self._bank.to_bytes(),
                "latency_us": self._latency_us,
            },
        )
        self._begin()
        self._labels[index].closed = True
        if not self._labels[index].waiting:
            self._tell(index)

    def _settle(self, index: int) -> None:
        """One prediction of the window needs no label any more."""
        labelled = self._labels[index]
        labelled.waiting -= 1
        if labelled.closed and not labelled.waiting:
            self._tell(index)

    def _tell(self, index: int) -> None:
        labelled = self._labels[index]
        for split, table in sorted(labelled.tables.items()):
            self._emit(
                Kind.LABELS,
                {
                    "model": self._model,
                    "index": index,
                    "split": split,
                    "labelled": int(table.sum()),
                    "correct": int(table.trace()),
                    "confusion": [int(count) for count in table.reshape(-1)],
                },
            )
        labelled.tables.clear()
        if labelled.closed and not labelled.waiting:
            del self._labels[index]
