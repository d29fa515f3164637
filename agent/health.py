"""What is wrong with this agent right now: typed warnings, set and cleared by their owners."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HealthWarning:
    """One thing that is wrong."""

    code: str
    """Stable, e.g. ``link.down``."""
    severity: str
    """``warning`` or ``error``."""
    text: str
    since_ms: int
    """Unix ms of the first report without a break."""


class Health:
    """The set of present warnings. Thread-safe."""

    def __init__(self, *, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._found: dict[str, HealthWarning] = {}

    def warn(self, code: str, text: str, *, severity: str = "warning") -> None:
        """Report that something is wrong; the first time counts as since."""
        with self._lock:
            known = self._found.get(code)
            since = known.since_ms if known else self._clock()
            self._found[code] = HealthWarning(code, severity, text, since)

    def clear(self, code: str) -> None:
        """Report that it is right again."""
        with self._lock:
            self._found.pop(code, None)

    def warnings(self) -> tuple[HealthWarning, ...]:
        """Return what is wrong, oldest first."""
        with self._lock:
            return tuple(sorted(self._found.values(), key=lambda each: each.since_ms))
