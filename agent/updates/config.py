"""Bounds of updates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateConfig:
    """What an update may cost, and how long it may take."""

    bundle_bytes_max: int = 64 << 20
    """Largest bundle that is downloaded, in bytes; it is unpacked in memory once."""
    deadline_s: float = 3600.0
    """A download that is not complete after this long is broken off; it resumes later."""
    rate_bytes_s_min: int = 1024
    """Least average rate of a download, bytes per second, after the grace."""
    grace_s: float = 30.0
    """How long a download may be slower than that at its start."""
    attempts_max: int = 5
    """Connections per download before it waits for the next check."""
    retry_s: float = 0.5
    """Wait before the second connection; doubles with each."""
    metadata_timeout_s: float = 30.0
    """Per file of approval metadata."""
    metadata_deadline_s: float = 120.0
    """For all files of one refresh."""
    clock_skew_s: float = 300.0
    """The clock may be this far behind a signed time."""
    tries: int = 3
    """How often a model is loaded without passing its trial before it is given up."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 1 <= self.bundle_bytes_max <= 2 << 30:
            raise ValueError("bundle_bytes_max must be 1 to 2147483648 bytes")
        times = (self.deadline_s, self.grace_s, self.metadata_timeout_s, self.metadata_deadline_s)
        if min(times) <= 0 or min(self.retry_s, self.clock_skew_s) < 0:
            raise ValueError("deadlines and timeouts must be above 0 s")
        if self.rate_bytes_s_min < 1:
            raise ValueError("rate_bytes_s_min must be at least 1 byte per second")
        if not 1 <= self.attempts_max <= 100 or not 1 <= self.tries <= 100:
            raise ValueError("attempts_max and tries must be 1 to 100")
