"""Bounds of the gRPC servers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    """What one peer, and all of them, may take."""

    downloads_max: int = 32
    """Artefacts streamed at once; a further device is told when to come again. Each costs about
    1.4 MB of memory when its reader is slow."""
    retry_after_ms: int = 2000
    """When a device that found all downloads taken comes again, ms."""
    chunk_s: float = 30.0
    """A reader that does not take a chunk of 256 KiB within this time, s, is dropped."""
    upload_idle_s: float = 60.0
    """An operator's upload that sends no chunk for this long, s, is dropped."""
    message_bytes_max: int = 1 << 20
    """Largest message from a device, bytes; chunks are 256 KiB."""
    document_bytes_max: int = 64 << 20
    """Largest message to or from an operator, bytes: the table of a large fleet."""
    metadata_bytes_max: int = 16 << 10
    """Headers of one call, bytes."""
    calls_max: int = 20_000
    """Calls at once on the device port; each device waits in one for its next task."""
    operator_calls_max: int = 64
    """Calls at once on the operator's socket."""
    enrolment_calls_max: int = 64
    """Calls at once on the enrolment port."""
    streams_max: int = 16
    """Calls at once on one connection."""
    connection_age_s: int = 3600
    """A connection is ended after this long, s: an expired certificate must not outlive it. gRPC
    spreads it by a tenth."""
    connection_grace_s: int = 300
    """How long calls on such a connection may go on, s."""
    keepalive_s: int = 60
    """A silent connection is asked for a sign of life this often, s."""
    ping_s_min: int = 10
    """A peer that pings more often than this, s, is dropped as a flood."""
    stop_s: float = 5.0
    """How long calls may go on when the server stops, s."""

    def __post_init__(self) -> None:
        """Refuse bounds that cannot work.

        Raises:
            ValueError: A bound is out of its range.
        """
        for name in (
            "downloads_max", "retry_after_ms", "metadata_bytes_max", "calls_max",
            "operator_calls_max", "enrolment_calls_max", "streams_max", "connection_age_s",
            "connection_grace_s", "keepalive_s", "ping_s_min",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if min(self.message_bytes_max, self.document_bytes_max) < 512 << 10:
            raise ValueError("message_bytes_max and document_bytes_max must be 512 KiB or more")
        if self.chunk_s <= 0 or self.upload_idle_s <= 0 or self.stop_s < 0:
            raise ValueError("chunk_s and upload_idle_s must be above 0 s, stop_s at least 0 s")
