"""The metadata database: tables, engine, migrations."""

from .engine import Store
from .tables import Base

__all__ = ["Base", "Store"]
