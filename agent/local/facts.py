"""What every face asks of the local core besides answers, whatever protocol it speaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Facts(Protocol):
    """The core without inference. Facts are in the protocol's JSON form; load and unload block."""

    def live(self) -> bool:
        """Say whether the process can answer at all."""

    def ready(self) -> bool:
        """Say whether every model that should be served is."""

    def model_ready(self, name: str, version: str) -> bool:
        """Say whether a model can be asked."""

    def server_metadata(self) -> Mapping[str, Any]:
        """Return name, version, extensions."""

    def model_metadata(self, name: str, version: str) -> Mapping[str, Any]:
        """Return name, versions, platform, inputs, outputs."""

    def model_config(self, name: str, version: str) -> Mapping[str, Any]:
        """Return Triton's model configuration."""

    def statistics(self, name: str, version: str) -> Mapping[str, Any]:
        """Return ``model_stats`` of one model, or of all where the name is empty."""

    def repository_index(self, *, ready: bool) -> list[Mapping[str, Any]]:
        """Return name, version, state and reason of each model."""

    def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Load a model, or load it anew."""

    def unload(self, name: str) -> None:
        """Take a model out."""

    def shm_status(self, name: str) -> Mapping[str, Mapping[str, Any]]:
        """Return the registered regions by name; all where the name is empty."""

    def shm_register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Map a region of system shared memory."""

    def shm_unregister(self, name: str) -> None:
        """Unmap a region; all where the name is empty."""
