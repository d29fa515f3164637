"""Join labels that come late to the windows of their predictions, each exactly once.

    open --join*--> closed --all joined, or given up--> settled --take--> LABELS records

Pure: the caller says which window a label belongs to, when windows close, and how far the
predictions have come. A prediction gives up waiting when ``pending_max`` newer ones were made.

K classes; a table is true x predicted, a calibration (wrong, right) x confidence bin.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

DECILES = 10


@dataclass(slots=True, eq=False)
class Tally:
    """Labels of one split of a window that were not told yet."""

    table__kk: NDArray[np.int64]
    calibration__2d: NDArray[np.int64]


@dataclass(slots=True, eq=False)
class _Window:
    predictions: int = -1
    """-1 while it is open."""
    joined: int = 0
    """Predictions whose label came."""
    splits: dict[int, Tally] = field(default_factory=dict)


class LateLabels:
    """Labels of the windows of one model."""

    def __init__(self, classes: int, *, pending_max: int) -> None:
        self._classes, self._pending_max = classes, pending_max
        self._windows: dict[int, _Window] = {}
        self._closed: deque[tuple[int, int]] = deque()  # (predictions at its end, window)

    def open(self, window: int) -> None:
        """A window begins."""
        self._windows[window] = _Window()

    def close(self, window: int, *, predictions: int, made: int) -> None:
        """A window ended.

        Args:
            window: Its number.
            predictions: How many are in it.
            made: Predictions of the model so far, in all windows.
        """
        self._windows[window].predictions = predictions
        self._closed.append((made, window))

    def drop(self, window: int) -> None:
        """A window will not be told; its labels are unknown from now on."""
        self._windows.pop(window, None)

    def join(self, window: int, *, predicted: int, decile: int, truth: int, split: int) -> bool:
        """Count a label; return whether the window is known and the model knows the class."""
        found = self._windows.get(window)
        if found is None:
            return False
        found.joined += 1
        if not 0 <= truth < self._classes:
            return False
        tally = found.splits.get(split)
        if tally is None:
            size = (self._classes, self._classes)
            tally = Tally(np.zeros(size, np.int64), np.zeros((2, DECILES), np.int64))
            found.splits[split] = tally
        tally.table__kk[truth, predicted] += 1
        tally.calibration__2d[int(truth == predicted), decile] += 1
        return True

    def complete(self, window: int) -> bool:
        """Return whether a window is closed and has all its labels."""
        found = self._windows.get(window)
        return found is not None and found.joined == found.predictions

    def given_up(self, made: int) -> list[int]:
        """Return closed windows whose predictions have all given up, each once."""
        found = []
        while self._closed and made - self._pending_max >= self._closed[0][0]:
            window = self._closed.popleft()[1]
            if window in self._windows:
                found.append(window)
        return found

    def waiting(self) -> list[int]:
        """Return the windows that have labels to tell, or may get some, by age."""
        return list(self._windows)

    def take(self, window: int) -> list[tuple[int, Tally]]:
        """Return (split, tally) of what was not told yet, by split; it counts as told."""
        found = self._windows[window]
        splits, found.splits = sorted(found.splits.items()), {}
        return splits
