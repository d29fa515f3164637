"""Errors of the kernels: what they cannot take from a peer.

A wrong argument is the caller's mistake, and a plain TypeError, ValueError or IndexError.
"""

from __future__ import annotations

from .. import ShoalError


class KernelError(ShoalError):
    """Root of the kernels' errors."""

    code = "ext"


class SketchRecordError(KernelError, ValueError):
    """Bytes are not a sketch record this version can read; no bank was made of them."""

    code = "ext.sketch.record"


class SketchMismatchError(KernelError, ValueError):
    """Two sketches, banks or mergers do not count the same thing; neither was changed."""

    code = "ext.sketch.mismatch"
