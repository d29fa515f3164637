"""Errors of what this machine is and of what runs on it, sorted by who must act."""

from __future__ import annotations

from .. import ShoalError


class HwError(ShoalError):
    """Root of the errors of this part."""

    code = "hw"


class RecordingError(HwError):
    """A recorded board cannot be read or written; no file was left half-written."""

    code = "hw.recording"
