"""``shoal demo``: the command itself is shoal.server.demo."""

from __future__ import annotations

from ..demo.command import demo

__all__ = ["demo"]
