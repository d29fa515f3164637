"""Bring an approved model to devices in waves, and back when it is worse."""

from .config import GateConfig, RolloutConfig
from .worker import Rollouts

__all__ = ["GateConfig", "RolloutConfig", "Rollouts"]
