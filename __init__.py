"""shoal: an edge inference runtime, its fleet agent and its fleet server.

The repository root is this package: ``shoal.agent`` is the folder ``agent/``. This file is the
ground floor: it holds what every part may name, and imports nothing of the parts.
"""

from __future__ import annotations

from typing import ClassVar

__version__ = "0.1.0"


class ShoalError(Exception):
    """Root of every error this product raises on purpose.

    ``code`` is stable and goes on the wire; ``retry`` says whether the same call may work later;
    ``hint`` tells an operator what to do.
    """

    code: ClassVar[str] = "shoal"
    retry: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
