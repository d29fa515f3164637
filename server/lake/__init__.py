"""The lake: telemetry windows as plain Parquet files, and questions about their history."""

from .config import LakeConfig
from .history import History
from .query import Query
from .worker import Lake

__all__ = ["History", "Lake", "LakeConfig", "Query"]
