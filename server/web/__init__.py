"""The console: one live page that shows the fleet; it reads and never changes anything."""

from __future__ import annotations

from .app import Console
from .config import ConsoleConfig

__all__ = ["Console", "ConsoleConfig"]
