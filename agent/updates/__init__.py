"""Updates: which bundle this device runs, and how it gets there safely."""

from .config import UpdateConfig
from .slots import peek
from .updater import Updater

__all__ = ["UpdateConfig", "Updater", "peek"]
