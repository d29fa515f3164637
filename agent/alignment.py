"""Say when a time window is over, on a clock that may jump by years or stand still.

    device clock:  |--- interval ---|--- interval ---|      intervals start at multiples of window_s
    window:           (began) ------|                       so that a fleet's windows line up

A window is over when the device's clock is in another interval than at its beginning, earlier or
later, or when ``window_s`` have passed on the monotonic clock. Whatever the clocks do, a window
is over sooner or later, and what ends and begins are always one act: nothing is counted twice
or lost. Its length is measured on the monotonic clock, its place on the device's.
"""

from __future__ import annotations

from typing import Final

LOOK_S: Final = 1.0  # a jump of the device's clock is noticed within this


class Alignment:
    """The interval in which the windows of one model began. Pure: time is an argument."""

    def __init__(self, window_s: float, *, now_ms: int, mono_s: float) -> None:
        """Begin an interval.

        Args:
            window_s: Its length, from 0.001; 0: windows end by count alone.
            now_ms: The device's clock, Unix ms.
            mono_s: The monotonic clock, seconds.
        """
        self._window_ms = round(window_s * 1000)
        self.begin(now_ms=now_ms, mono_s=mono_s)

    @property
    def aligned_ms(self) -> int:
        """Start of the interval on the device's clock, Unix ms; 0 if windows end by count."""
        return self._interval * self._window_ms

    def begin(self, *, now_ms: int, mono_s: float) -> None:
        """Begin the interval of this moment."""
        self._interval = now_ms // self._window_ms if self._window_ms else 0
        self._mono_s = mono_s

    def over(self, *, now_ms: int, mono_s: float) -> bool:
        """Return whether the interval is over."""
        if not self._window_ms:
            return False
        if now_ms // self._window_ms != self._interval:
            return True
        return (mono_s - self._mono_s) * 1000 >= self._window_ms

    def look_s(self, *, now_ms: int, mono_s: float) -> float:
        """Return when to look at the clock again, in seconds of the monotonic clock."""
        if not self._window_ms:
            return mono_s + LOOK_S
        return mono_s + min(LOOK_S, (self._window_ms - now_ms % self._window_ms) / 1000)
