"""Ingest: what devices say over MQTT becomes rows, exactly once."""

from .worker import Ingest, IngestConfig

__all__ = ["Ingest", "IngestConfig"]
