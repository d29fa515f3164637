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

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ext.sketch import SketchBank
from ..ext.tap import WindowTap
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

    first: int
    """Id of its first prediction."""
    end: int = -1
    """Id behind its last prediction; -1 while it is open."""
    joined: int = 0
    """Predictions whose label came."""
    tables: dict[int, NDArray[np.int64]] = field(default_factory=dict)


class WindowMonitor:
    """Monitor of one loaded model, which one thread at a time feeds, labels and ends.

    Attributes:
        tap: What counts inside the runtime's step; ``Runtime.load(monitor=...)`` takes it.
    """

    def __init__(
        self,
        *,
        model_sha256: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        input_name: str,
        output_name: str,
        samples: int,
        classes: int,
        edges: Sequence[NDArray[np.float32]],
        config: MonitorConfig,
        emit: Emit,
        clock: Callable[[], int],
    ) -> None:
        """Start the first window.

        Args:
            model_sha256: The bundle that the windows belong to.
            inputs: Names of the model's inputs, in its order.
            outputs: … and of its outputs.
            input_name: Input tensor, float32 (1, C, T).
            output_name: Output tensor, float32 (1, classes), probabilities.
            samples: T.
            classes: Number of classes.
            edges: Bin edges of the C channels and, last, of the confidence.
            config: Sizes.
            emit: Takes finished records.
            clock: Unix ms.
        """
        self._model = model_sha256
        self._input, self._output, self._classes = input_name, output_name, classes
        self._config, self._emit, self._clock = config, emit, clock
        self._bank = SketchBank(len(edges), edges=edges)
        self.tap = WindowTap(
            self._bank,
            input=list(inputs).index(input_name),
            output=list(outputs).index(output_name),
            channels=len(edges) - 1,
            samples=samples,
            classes=classes,
            pending_max=config.pending_max,
            limit=config.window_predictions,
            ready=self._end,
        )
        self._labels: dict[int, _Labelled] = {}
        self._index = -1
        self.errors = 0
        """Calls that failed."""
        self.labels_missed = 0
        """Labels that came for a prediction that had given up waiting, or was unknown."""
        self._begin()

    @property
    def predictions(self) -> int:
        """Predictions seen; the id of the newest is one less."""
        return self.tap.predictions

    def observe(
        self,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]],
        latency_ns: int,
    ) -> None:
        """Count one prediction from arrays, and end the window if it is full."""
        self.tap.put(inputs[self._input].reshape(-1), outputs[self._output][0], latency_ns)
        self.tick()

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
        predicted = self.tap.claim(prediction)
        if predicted < 0:
            self.labels_missed += 1
            return
        indices = list(self._labels)
        index = indices[
            bisect_right([self._labels[each].first for each in indices], prediction) - 1
        ]
        labelled = self._labels[index]
        labelled.joined += 1
        if 0 <= truth < self._classes:
            tables = labelled.tables
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
        self._window_errors = 0
        self._labels[self._index] = _Labelled(first=self.predictions)
        self.tap.begin()

    def _end(self) -> None:
        index, seen = self._index, self.tap.seen
        if not seen and not self._window_errors:
            self._start_ms = self._clock()  # nothing to tell: the same window begins anew
            return
        classes, latency_us = self.tap.read()
        self._emit(
            Kind.WINDOW,
            {
                "model": self._model,
                "index": index,
                "start_ms": self._start_ms,
                "end_ms": max(self._start_ms, self._clock()),
                "predictions": seen,
                "errors": self._window_errors,
                "classes": classes,
                "sketch": self._bank.to_bytes(),
                "latency_us": latency_us,
            },
        )
        self._labels[index].end = self.predictions
        self._begin()
        for each in list(self._labels):
            if not self._settle(each):
                break  # predictions give up waiting in their order

    def _settle(self, index: int) -> bool:
        """Tell a window's labels if none can come any more; return whether that is so."""
        labelled = self._labels[index]
        if labelled.end < 0:
            return False
        given_up = self.predictions - self._config.pending_max >= labelled.end
        if labelled.joined < labelled.end - labelled.first and not given_up:
            return False
        self._tell(index)
        del self._labels[index]
        return True

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
