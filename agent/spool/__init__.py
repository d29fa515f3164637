"""The spool: records wait on disk until the server says that it holds them."""

from .spool import Spool, SpoolConfig, SpoolError, SpoolFullError, Totals, read_totals

__all__ = ["Spool", "SpoolConfig", "SpoolError", "SpoolFullError", "Totals", "read_totals"]
