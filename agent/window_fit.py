"""Fit a window into a record: what is too much goes step by step, the least useful first.

    sketches -> fewer picks of each -> bins alone -> no scores -> no projection -> nothing at all

Drift is judged by the bins, so they stay the longest. A record tells what it lacks: ``bins_only``
is true, or the field is not there.

Pure: who counts, logs and withholds is ``monitor.py``. The bounds are those of
``shoal.proto.records``; a body that fits here is never refused there for its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, Final, NamedTuple, Protocol

from ..proto.records import SKETCH_BYTES_MAX, room

FEATURE_BYTES_MAX: Final = 350  # of a sketch: more adds little to its ranks


class Step(IntEnum):
    """What a window had to do without; each also does without what those before it did."""

    WHOLE = 0
    BINS_ALONE = 1
    NO_SCORES = 2
    NO_PROJECTION = 3
    WITHHELD = 4


_FIELDS: Final = {
    Step.NO_SCORES: ("scores",),
    Step.NO_PROJECTION: ("projection", "projected"),
}


class Write(Protocol):
    """Writes a bank, as ``SketchBank.to_bytes`` does."""

    def __call__(self, *, bins_only: bool, bytes_max: int) -> bytes:
        """Return the record; ``bytes_max`` is a budget per feature that counters may exceed."""


class Fitted(NamedTuple):
    """A window as it fits."""

    step: Step
    body: dict[str, Any] | None
    """With ``sketch`` and, if need be, ``bins_only``; None: nothing fits."""


class WindowFit:
    """The rule for the windows of one model.

    Attributes:
        best: The step that no window of the model can do without, however little it counted.
    """

    def __init__(self, empty: Write, *, features: int, edges: int, bins_only: bool) -> None:
        """Measure what cannot ever fit.

        Args:
            empty: Writes a bank of the model's features that has counted nothing.
            features: Of the bank.
            edges: Of the feature that has most.
            bins_only: For privacy more than bins must not leave the device.
        """
        self._features, self._edges, self._bins_only = features, edges, bins_only
        self.best = Step.WHOLE
        if len(empty(bins_only=True, bytes_max=0)) > SKETCH_BYTES_MAX:
            self.best = Step.WITHHELD
        elif not bins_only and len(empty(bins_only=False, bytes_max=0)) > SKETCH_BYTES_MAX:
            self.best = Step.BINS_ALONE

    def fit(self, body: Mapping[str, Any], write: Write) -> Fitted:
        """Return a window that the record's contract takes.

        Args:
            body: All fields of the window but ``sketch`` and ``bins_only``.
            write: Writes its bank.
        """
        if self.best is Step.WITHHELD:
            return Fitted(Step.WITHHELD, None)
        whole = {**body, "sketch": b""}
        if not self._bins_only and self.best is Step.WHOLE:
            space = _space(whole)
            budget = max(0, min(FEATURE_BYTES_MAX, space // self._features))
            sketch = write(bins_only=False, bytes_max=budget)
            if len(sketch) <= space:
                return Fitted(Step.WHOLE, whole | {"sketch": sketch})
        whole["bins_only"] = True
        sketch = write(bins_only=True, bytes_max=0)
        step = Step.WHOLE if self._bins_only else Step.BINS_ALONE
        if len(sketch) <= _space(whole):
            return Fitted(step, whole | {"sketch": sketch})
        for step, names in _FIELDS.items():
            if not whole.keys() & set(names):
                continue
            whole = {name: value for name, value in whole.items() if name not in names}
            if len(sketch) <= _space(whole):
                return Fitted(step, whole | {"sketch": sketch})
        return Fitted(Step.WITHHELD, None)

    def hindrance(self, step: Step) -> str:
        """Return for an operator what a step leaves out and why, at most 150 characters."""
        if step is Step.WHOLE:
            return ""
        shape = f"{self._features} features x {self._edges} edges do not fit a record"
        if step is Step.WITHHELD:
            return f"windows are withheld: {shape}, not even as bins alone"
        parts = [] if self._bins_only else ["bins alone"]
        parts += ["no scores"] if step >= Step.NO_SCORES else []
        parts += ["no projection"] if step >= Step.NO_PROJECTION else []
        return f"{', '.join(parts)}: {shape}"


def _space(body: Mapping[str, Any]) -> int:
    return min(SKETCH_BYTES_MAX, room(body))
