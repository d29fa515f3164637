"""Watch a model inside the step without the GIL: the public names of the kernel's taps."""

from __future__ import annotations

from ._tap import Journal, WindowTap

__all__ = ["Journal", "WindowTap"]
