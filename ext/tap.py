"""Watch a model inside the step without the GIL: the public name of the kernel's tap."""

from __future__ import annotations

from ._tap import WindowTap

__all__ = ["WindowTap"]
