"""Bounds of the artefact store."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtefactConfig:
    """How much the artefact store takes."""

    bytes_max: int = 256 << 20
    """Largest artefact, in bytes; a sensor model has some megabytes, a data set some hundred."""
    total_bytes_max: int = 16 << 30
    """All artefacts together, in bytes."""
    note_chars_max: int = 500
    """Longest note of a model, in characters."""

    def __post_init__(self) -> None:
        """Refuse bounds that cannot work.

        Raises:
            ValueError: A bound is below 1, or one artefact may be larger than the store.
        """
        if not 1 <= self.bytes_max <= self.total_bytes_max:
            raise ValueError("bytes_max must be 1 to total_bytes_max bytes")
        if self.note_chars_max < 1:
            raise ValueError("note_chars_max must be at least 1")
